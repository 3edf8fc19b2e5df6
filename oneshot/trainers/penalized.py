"""A search in which the network pays for its costs: weights and architecture together, or in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Subset

from ..cost import PeakMemory
from ..errors import ConfigurationError, InfeasibleTargetError
from ..export import arch_of, argmax_choices
from ..graph import evaluated
from ..mutables import Sampler, arch_parameters
from ..regularizers import Regularizer
from .arguments import SchedulerFactory, SharedArguments
from .base import Trainer
from .batches import even_batches
from .checkpoint import BEST
from .checkpoint_fit import check_fits
from .checkpoint_kinds import anything, mapping_of, optional, record
from .cost_loss import CostLoss
from .decidedness import Decidedness
from .gradients import add_gradients, weighted_gradients
from .modes import frozen_statistics, frozen_weights
from .payment import Payment, payment
from .penalty import Penalty
from .sampling import Sampling
from .searched import Searched
from .selection import Record, epochs_since, kept_record, larger_is_better
from .setup import OptimizerLike, check_counts

__all__ = ["PenalizedArguments", "PenalizedTrainer"]


class PenalizedArguments(SharedArguments, total=False):
    """What every such trainer takes besides, and hands on."""

    num_epochs: int
    finetune_epochs: int
    finetune_optimizer: OptimizerLike | None
    finetune_scheduler: SchedulerFactory | None
    strength: float | Mapping[str, float]
    normalize: bool
    targets: Mapping[str, float] | None
    regularizer: Regularizer | None
    arch_fraction: float
    shrink_every: int | None
    patience: int | None
    monitor: str
    monitor_mode: Literal["min", "max"] | None


class PenalizedTrainer(Trainer):
    """Warm-up, search, fine-tuning; in the search the loss of the architecture is

        L = F(CE, C) + sum_k s_k C_k + regularizers of costs + what keeps choices undecided,

    with the costs C of the step and F(CE, C) = CE unless a ``cost_loss`` says otherwise; targets pull besides that, as
    ``Budget`` says. The weights learn from CE and from regularizers of weights.
    With ``arch_fraction=0`` one forward and one backward of the same batch move both; else every step of the weights is
    followed by one of the architecture, on a batch of its own part, and no weight and no BatchNorm statistic moves in
    it.

    Which epoch is kept: with targets the best search epoch that meets all of them, else the last one; then the best of
    the fine-tuning. A concrete trainer says what is searched (``Searched``), and how decisions are sampled, if there
    are any (``sampling``) and pushed to one option (``decidedness``); see its docstring for the other arguments.
    """

    def __init__(
        self,
        searched: Searched,
        *,
        arch_optimizer: Callable[[list[nn.Parameter]], Optimizer],
        sampling: Sampling | None = None,
        decidedness: Decidedness | None = None,
        cost_loss: CostLoss | None = None,
        num_epochs: int = 100,
        strength: float | Mapping[str, float] = 0.0,
        normalize: bool = False,
        arch_fraction: float = 0.0,
        shrink_every: int | None = None,
        patience: int | None = None,
        monitor: str = "loss",
        monitor_mode: Literal["min", "max"] | None = None,
        **others: Any,
    ) -> None:
        self.penalty = Penalty(strength, normalize, searched.names)
        super().__init__(
            searched,
            arch_optimizer=arch_optimizer,
            num_epochs=num_epochs,
            arch_fraction=arch_fraction or None,
            **others,
        )
        if others.get("arch_dataset") is not None and self.arch_fraction is None:
            raise ConfigurationError(
                "arch_dataset: without arch_fraction the architecture learns from dataset; give a fraction"
            )
        self.sampling, self.decidedness = sampling, decidedness or Decidedness()
        self.cost_loss = cost_loss
        self.arch_parameters = arch_parameters(self.model)
        self.patience, self.monitor = patience, monitor
        check_counts(shrink_every=shrink_every)
        if shrink_every is not None and self._of_weights:
            raise ConfigurationError(
                f"shrink_every={shrink_every}: {[type(part).__name__ for part in self._of_weights]} have groups of the "
                "weights of the whole network; leave one of them out"
            )
        peaks = [name for name, source in searched.costs.sources.items() if isinstance(source, PeakMemory)]
        if shrink_every is not None and peaks:
            raise ConfigurationError(
                f"shrink_every={shrink_every}: the cost {peaks} is of all candidates; give it by name, 'peak_memory'"
            )
        self.shrink_every = shrink_every
        self.larger_is_better = larger_is_better(monitor, monitor_mode)
        self._check_patience()
        self._n_learning = len(self._learning())
        self._best: dict[str, Tensor] | None = None
        self._best_arch: dict[str, Any] = {}
        self._paid: Payment | None = None  # of the step that is being made
        self._of_terms: Sequence[Tensor | None] = []
        self._noted: dict[str, Tensor | float] = {}
        if not self.costs.measures:
            self._refer()

    # ---- the algorithm -----------------------------------------------------------------------------------------

    def _weight_step(self, batch: Any) -> None:
        with frozen_weights(self.arch_parameters):
            self._update_weights(batch, self._sampler())

    def _search_step(self, batch: Any) -> None:
        if not self._learning():
            self._weight_step(batch)
        elif self.arch_fraction is None:
            self._joint_step(batch)
        else:
            self._weight_step(batch)
            self._arch_step(self._next_arch_batch())

    def _learning(self) -> list[nn.Parameter]:
        """The architecture parameters that are trained."""
        return self.searched.learning(self._pulls)

    @property
    def _pulls(self) -> bool:
        """Whether any cost can ever pull at the architecture."""
        return self.targets.pulls or self.penalty.pulls or any(part.pulls for part in self._of_costs)

    def _still(self) -> list[nn.Parameter]:
        learning = {id(p) for p in self._learning()}
        return [p for p in self.arch_parameters if id(p) not in learning]

    def _sampler(self) -> Sampler | None:
        """How the decisions are sampled in a step of now; the temperature changes from epoch to epoch."""
        if self.sampling is None:
            return None
        done = max(self.epoch - self.warmup_epochs, 0)
        return self.sampling.of(self.phase, min(done / max(self.num_epochs - 1, 1), 1.0))

    def _draw(self) -> None:
        sampler = self._sampler()
        if sampler is not None:
            self._set(sampler)

    def _joint_step(self, batch: Any) -> None:
        """One step of weights and architecture on the same batch."""
        self._draw()
        self._weight_optimizer.zero_grad(set_to_none=True)
        self.arch_optimizer.zero_grad(set_to_none=True)
        with frozen_weights(self._still()):
            task, noted = self._gradients("loss", batch)
        if self._ready([self._weight_optimizer, self.arch_optimizer], {"loss": task}, moves_statistics=True):
            noted.update(self._regularize_weights(task))
            self._step_weights()
            self._step_arch(noted)

    def _arch_step(self, batch: Any) -> None:
        """One step of the architecture; the weights and the BatchNorm statistics stay."""
        self._draw()
        self.arch_optimizer.zero_grad(set_to_none=True)
        with frozen_weights([*self.weights, *self._still()]), frozen_statistics(self.norms):
            task, noted = self._gradients("arch_loss", batch)
        if self._ready([self.arch_optimizer], {"arch_loss": task}, moves_statistics=False):
            self._step_arch(noted)

    def _gradients(self, name: str, batch: Any) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The gradients of the task and, apart from them, what the architecture pays; its loss, and what to note."""
        task, measured = self._backward(
            batch, self.loss, before_last=self._pay_for_costs, evaluates_others=bool(self.decisions)
        )
        return task, {name: task, **(measured if name == "loss" else {}), **self._noted}

    def _pay_for_costs(self, task: Tensor) -> None:
        """What this step pays, before the graph of the task is gone: the masks of the step are in both graphs."""
        costs, learning = self.searched.step_costs(), self._learning()
        self._finite.add(self.step, costs)
        self._noted = {}

        def loss(task: Tensor, costs: Mapping[str, Tensor]) -> Tensor:
            terms = self._terms_of(costs)
            penalty = torch.stack([self.penalty(costs).to(task), *terms.values()]).sum()
            self._noted.update({"penalty": penalty.detach(), **_detached(terms)})
            return (task if self.cost_loss is None else self.cost_loss(task, costs)) + penalty

        pull = self.targets.pull(costs, learning, self._progress)
        self._paid = payment(self.processes.mean(task), costs, learning, loss, pull)
        terms = self.decidedness.terms([d.alpha for d in self.decisions.values()])
        self._of_terms = weighted_gradients(terms, {k: torch.ones_like(term) for k, term in terms.items()}, learning)
        self._noted.update(_detached(terms))

    def _step_arch(self, noted: Mapping[str, Tensor | float]) -> None:
        learning, paid = self._learning(), self._paid
        assert paid is not None
        shares = paid.add_to(learning, lambda: self._add_targets(paid.pull, learning))
        add_gradients(learning, self._of_terms)
        self._paid, self._of_terms = None, []
        for parameter in self.searched.idle():
            parameter.grad = None  # momentum would move it
        self._settle()
        self._move_architecture()
        self.searched.clip_()
        self._keep_targets()
        self._note({**noted, **shares})

    # ---- a network that gets smaller -------------------------------------------------------------------------------

    def _made_smaller(self, phase: str) -> dict[str, float]:
        if self.shrink_every is None or phase != "search":
            return {}
        done = self.search_step // self.steps_per_epoch
        return {"removed": float(self._shrink()) if done % self.shrink_every == 0 else 0.0}

    def _kept_state(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        return ({}, []) if self._best is None else (self._best, [self._best_arch])

    def _follow_model(self, averages: Mapping[str, Tensor]) -> None:
        super()._follow_model(averages)
        self.arch_parameters = arch_parameters(self.model)

    # ---- which epoch is kept -----------------------------------------------------------------------------------

    def _after_epoch(self, phase: str) -> None:
        if phase == "warmup" or (phase == "search" and not self.targets.by_cost):
            return
        if phase == "finetune" and self.valid_dataset is None:
            self._best = None  # the last one is kept, and it is the network itself
            return
        records = [record for record in self.history if record["phase"] == phase]
        judged_by = None if self.valid_dataset is None else f"valid_{self.monitor}"
        kept = kept_record(records, admits=self._is_met, judged_by=judged_by, larger=self.larger_is_better)
        if self.patience is not None and epochs_since(records, kept) >= self.patience:
            self._end_phase(phase, len(records))
        if kept is records[-1]:
            with self._averaged():
                self._best = _copied(self.model)
                self._best_arch = arch_of(self.model, argmax_choices(self.model))
            if self.checkpoint_dir is not None:
                self.save(self.checkpoint_dir / BEST)

    def _is_met(self, record: Record) -> bool:
        return self.targets.are_met({name: record[f"{name}_hard"] for name in self.targets.by_cost})

    def _enter_phase(self, phase: str) -> None:
        if phase == "finetune":
            if self.average is not None and self._best is None:
                self.average.adopt()  # of a kept epoch, it is averages that are taken
            self._take_best()
            if self.shrink_every is not None:
                self._shrink()

    def _after_run(self) -> None:
        if self._best is not None:
            self._take_best()

    def _take_best(self) -> None:
        """Make the network that of the kept epoch, or be sure that it may stay as it is."""
        if self._best is None:
            self._check_targets()
        else:
            self.model.load_state_dict(self._best)
            if self.average is not None:
                self.average.restart()  # these are averages already
        self._holds_kept = True

    def _check_targets(self) -> None:
        targets = self.targets.by_cost
        if not targets:
            return
        now = {name: hard for name, (_, hard) in self.searched.soft_and_hard().items()}
        if self.targets.are_met(now):
            return
        found = [record for record in self.history if record["phase"] != "warmup"]
        least, texts = self.searched.reachable(targets), []
        for name, target in targets.items():
            reached = min((record[f"{name}_hard"] for record in found), default=now[name])
            texts.append(f"{name} {target:g}, lowest so far {reached:g}, lowest possible {least[name][0]:g}")
        raise InfeasibleTargetError(
            f"no epoch met the targets: {'; '.join(texts)}. Search longer; masks keep targets from 60 % of a "
            "search on; export(best=False) gives the network as it is now"
        )

    @contextmanager
    def _as_kept(self, best: bool, budget: Mapping[str, float] | None) -> Iterator[None]:
        if not best:
            yield
            return
        now, held = _copied(self.model), self._holds_kept
        averages = None if self.average is None else self.average.state_dict()
        self._take_best()
        try:
            yield
        finally:
            self.model.load_state_dict(now)
            self._holds_kept = held
            if self.average is not None and averages is not None:
                self.average.load_state_dict(averages)

    # ---- before the run, and between two parts of it -----------------------------------------------------------

    def _refer(self) -> None:
        """Take over what the largest network costs."""
        if self.penalty.normalize:
            self.penalty.refer_to(self.searched.reachable(self.penalty.strength))

    def _check_patience(self) -> None:
        check_counts(patience=self.patience)
        if self.patience is None:
            return
        if self.valid_dataset is None:
            raise ConfigurationError(f"patience={self.patience}: it needs valid_dataset, which says what is better")
        if not self.targets.by_cost and not self.finetune_epochs:
            raise ConfigurationError(
                f"patience={self.patience}: it has no phase to end. Without targets validation cannot judge a search, "
                "since it is best before anything is cut; give targets or finetune_epochs"
            )

    def _check_run(self) -> None:
        if self.costs.measures:
            self._refer()
        if self.num_epochs and self.step == 0 and not self._learning():
            self._check_targets()  # nothing will change the network
        if self.cost_loss is not None:
            # What the search may come to, not only where it begins: the logarithm of a cost below 1 has no power.
            least = self.searched.reachable(self.searched.names)
            self.cost_loss(torch.tensor(1.0), {k: torch.tensor(least[k][0]) for k in self.searched.names})
        self._check_monitor()

    def _check_monitor(self) -> None:
        if self.valid_dataset is None or self.monitor == "loss":
            return
        inputs, target = next(iter(even_batches(Subset(self.valid_dataset, [0]), 1)))
        device = next(self.model.parameters()).device
        with evaluated(self.model):
            known = self._measured(self.model(inputs.to(device)), target.to(device))
        if self.monitor not in known:
            raise ConfigurationError(f"monitor={self.monitor!r}: allowed are {['loss', *known]}")

    def _own_settings(self) -> dict[str, Any]:
        penalty, cost_loss = self.penalty, self.cost_loss
        return {
            "strength": penalty.strength,
            "normalize": penalty.normalize,
            "arch_optimizer": type(self.arch_optimizer).__name__,
            "learning": self._n_learning,
            "shrink_every": self.shrink_every,
            "sampling": None if self.sampling is None else str(self.sampling),
            "decidedness": str(self.decidedness),
            "cost_loss": None if cost_loss is None else [cost_loss.kind, cost_loss.params, cost_loss.references],
        }

    def _own_state(self) -> dict[str, Any]:
        return {"best": self._best, "best_arch": self._best_arch}

    def _check_own_state(self, state: Mapping[str, Any], model: nn.Module, where: str) -> None:
        best = optional(lambda best, at: check_fits(best, model, at))
        record(best=best, best_arch=mapping_of(anything))(state, where)

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        self._best, self._best_arch = state["best"], state["best_arch"]


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _detached(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in values.items()}
