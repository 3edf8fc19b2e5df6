"""DARTS (arXiv 1806.09055): mixtures of all candidates, alphas and weights by gradients on two parts of the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Subset

from ..cost import Cost, CostSpec
from ..cost.hardware import Hardware
from ..data import mix_seed
from ..errors import ConfigurationError
from ..mutables import Softmax
from ..regularizers import Regularizer
from .arguments import SharedArguments, known_arguments
from .base import Trainer
from .batches import even_batches
from .checkpoint_kinds import list_of, optional, record, row_of, tensor_like, text, whole
from .choices import Choices
from .collapse import CollapseMonitor, EarlyStop, Stopped
from .cost_loss import DEFAULT_REFERENCE, CostLoss
from .costs import CostSources
from .gradients import add_gradients
from .modes import batch_statistics, frozen_statistics, frozen_weights
from .payment import payment
from .penalty import Penalty
from .rng import user_state_kept
from .unrolled import (
    check_unrolls,
    difference_gradient,
    differentiable_gradients_of,
    exact_gradient,
    second_gradients_of,
    updates_of,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["DARTSTrainer"]


@final
class DARTSTrainer(Trainer):
    """Searches the mutables of a network as mixtures, y = sum_k softmax(alpha)_k o_k(x), with two levels of gradients.

    Every search step is an arch step on a batch of the held-out half, and then a weight step on one of the other:

    * arch step: alpha moves down the gradient of L_valid(w'(alpha), alpha). ``order=1``: w' = w. ``order=2``: w' are
      the weights after the step of SGD that is due, weight decay and momentum included, and the gradient through it is
      taken by a difference in the direction of grad L_valid, of length 0.01: three more passes. ``order='exact'``: by
      differentiating twice, for small networks. xi is the learning rate of the weights, of each group of parameters.
      No weight and no BatchNorm statistic moves, in any of these passes; dropout is the same in the passes that are
      compared.
    * weight step: SGD, or what else ``optimizer`` is, on L_train(w, alpha), gradients clipped to the norm
      ``grad_clip`` (which the unrolled step leaves out). BatchNorm statistics move here.

    All candidates run and keep their activations: memory grows with their number. The cost term is added to L_valid:
    either ProxylessNAS's, ``grad_reg_loss_type``, or with ``strength`` s_k and the expected cost E_k
    sum_k s_k E_k. ``targets`` are met by the network that is exported,
    with a strength or without, as in ``ProxylessTrainer``. BatchNorm statistics at the end are those of the mixture.

    Args:
        model, loss, metrics, optimizer, dataset, arch_loss, what costs are made of (cost, applied_hardware, missing,
            dummy_input), and all that is not named here: as in ``ProxylessTrainer``.
        num_epochs: search epochs; ``warmup_epochs`` epochs of weights alone come before them.
        order: 1, 2 or 'exact'. The latter two need ``torch.optim.SGD`` for the weights and full precision.
        arc_learning_rate: of Adam with betas (0.5, 0.999) and weight decay 1e-3 for the alphas; ``arch_optimizer``: a
            function from a list of parameters to another optimizer.
        alpha_std: alphas begin the search at normal random numbers of this deviation (1e-3 in the paper's code), from
            ``seed``. None: where they are, which is zero in a new model.
        grad_clip: as in ``ProxylessTrainer``; the paper's 5 for the weights.
        arch_fraction: of the training set, for the alphas; stratified and seeded.
        grad_reg_loss_type, grad_reg_loss_params, ref_latency: as in ``ProxylessTrainer``.
        strength: instead of these, per unit of a cost: one number for all costs, or cost -> number.
        targets, regularizer: as in ``ProxylessTrainer``.
        normalize: costs are divided by their expectation under equally probable options, or, with ``strength``, costs
            and targets by the largest cost of the space.
        early_stop: when to end the search before the alphas collapse into skips; see ``EarlyStop``. ``history`` has
            ``skip_share`` and ``eigenvalue`` then, and ``stopped`` says whether it was.

    >>> from oneshot import LayerChoice
    >>> net = nn.Sequential(LayerChoice([nn.Linear(4, 4), nn.Identity()]), nn.Linear(4, 2))
    >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.arange(64) % 2)
    >>> trainer = DARTSTrainer(
    ...     net, loss=nn.CrossEntropyLoss(), metrics=None, dataset=data, num_epochs=2, batch_size=8, workers=0,
    ...     optimizer=torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), device="cpu", order=2,
    ...     cost="params", strength=0.01, arc_learning_rate=0.1,
    ... )
    >>> history = trainer.train()
    >>> trainer.export()  # Linear(4, 4) costs 20 parameters, which is 0.2 of loss
    {'0': 1}
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_epochs: int = 50,
        order: Literal[1, 2, "exact"] = 1,
        arc_learning_rate: float = 3e-4,
        arch_optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        alpha_std: float | None = None,
        early_stop: EarlyStop | None = None,
        cost: str | Sequence[str] | Cost | CostSpec | Mapping[str, Any] | None = None,
        applied_hardware: Hardware | None = None,
        missing: Mapping[str, float] | None = None,
        dummy_input: Sequence[int] = (1, 3, 224, 224),
        grad_reg_loss_type: Literal["mul#log", "add#linear"] | None = "add#linear",
        grad_reg_loss_params: Mapping[str, float | Mapping[str, float]] | None = None,
        ref_latency: float | Mapping[str, float] = DEFAULT_REFERENCE,
        strength: float | Mapping[str, float] | None = None,
        targets: Mapping[str, float] | None = None,
        regularizer: Regularizer | None = None,
        normalize: bool = False,
        arch_loss: Callable[[Any, Any], Tensor] | None = None,
        arch_fraction: float = 0.5,
        **others: Unpack[SharedArguments],
    ) -> None:
        clip = others.get("grad_clip", 5.0)
        others["grad_clip"] = {"weights": 5.0, **clip} if isinstance(clip, Mapping) else clip
        _check_numbers(order, others.get("precision", "32-true"), alpha_std, others.get("accumulate", 1))
        self.choices = Choices(model, CostSources(cost, applied_hardware, missing), dummy_input, self._measured_once)
        super().__init__(
            self.choices,
            arch_optimizer=arch_optimizer or _arch_adam(arc_learning_rate),
            num_epochs=num_epochs,
            arch_fraction=arch_fraction,
            targets=targets,
            regularizer=regularizer,
            **known_arguments("DARTSTrainer", others),
        )
        self.arch_loss = self.loss if arch_loss is None else arch_loss
        if self.arch_fraction is None:
            raise ConfigurationError(
                "arch_fraction=None: a part of the data is for the architecture, above 0 and below 1"
            )
        self.order, self.alpha_std = order, alpha_std
        if order != 1:
            check_unrolls(self.optimizer)
        self.alphas = [d.alpha for d in self.decisions.values()]
        self.monitor = None if early_stop is None else CollapseMonitor(early_stop, self.decisions)
        self.stopped: Stopped | None = None
        self._take_costs(grad_reg_loss_type, grad_reg_loss_params, ref_latency, strength, normalize)

    def _take_costs(
        self,
        kind: str | None,
        params: Mapping[str, float | Mapping[str, float]] | None,
        references: float | Mapping[str, float],
        strength: float | Mapping[str, float] | None,
        normalize: bool,
    ) -> None:
        if normalize and references != DEFAULT_REFERENCE:
            raise ConfigurationError(f"normalize=True and ref_latency={references}: give one of them")
        if references is None and strength is None and self.costs.names:
            raise ConfigurationError("ref_latency=None: a finite number is needed, or normalize=True")
        priced = params is not None or references != DEFAULT_REFERENCE or normalize
        unasked = bool(self.targets or self.regularizer) and not priced
        if unasked:
            kind = None
        if strength is not None and (params is not None or references != DEFAULT_REFERENCE or not self.costs.names):
            raise ConfigurationError(
                f"strength={strength}: with it, give cost or applied_hardware, and leave out grad_reg_loss_params and "
                "ref_latency, which are of another cost term"
            )
        self.normalize = normalize
        self.penalty = None if strength is None else Penalty(strength, normalize, self.costs.names)
        units = {name: self.costs.unit(name) for name in self.costs.names} if strength is None else {}
        self.cost_loss = CostLoss(kind, params, None if normalize or unasked else references, units)

    # ---- the algorithm -----------------------------------------------------------------------------------------

    def _search_step(self, batch: Any) -> None:
        self._arch_step(self._next_arch_batch(), batch)
        self._weight_step(batch)
        if self.monitor is not None and (self.step + 1) % self.steps_per_epoch == 0:
            found = self.monitor.measure(self._monitored_loss)
            self._note({name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()})

    def _weight_step(self, batch: Any) -> None:
        with frozen_weights(self.alphas):
            self._update_weights(batch, Softmax())

    def _arch_step(self, arch_batch: Any, batch: Any) -> None:
        """One step of the alphas; weights and BatchNorm statistics stay. ``batch``: of the weight step to come."""
        self._set(Softmax())
        self.arch_optimizer.zero_grad(set_to_none=True)
        learning = [alpha for alpha in self.alphas if alpha.requires_grad and alpha.numel() > 1]
        decided = [alpha for alpha in self.alphas if alpha.numel() == 1]  # nothing to learn, and no second derivative
        with frozen_statistics(self.norms), frozen_weights(decided):
            if self.order == 1:
                with frozen_weights(self.weights):
                    task, _ = self._backward(arch_batch, self.arch_loss, again=True)
            else:
                task = self._unrolled_gradients(arch_batch, batch, learning)
        if not self._ready([self.arch_optimizer], {"arch_loss": task}, moves_statistics=False):
            return
        expected = self.choices.step_costs()
        self._finite.add(self.step, _named(expected))
        noted: dict[str, Tensor | float] = dict(_named(expected))

        def loss(task: Tensor, costs: Mapping[str, Tensor]) -> Tensor:
            terms = self._terms_of(costs)
            noted.update({name: term.detach() for name, term in terms.items()})
            return torch.stack([self._with_costs(task, costs), *terms.values()]).sum()

        pull = self.targets.pull(expected, learning, self._progress)
        paid = payment(self.processes.mean(task), expected, learning, loss, pull)
        shares = paid.add_to(learning, lambda: self._add_targets(paid.pull, learning))
        self._move_architecture()
        self._keep_targets()
        self._note({"arch_loss": paid.total, **shares, **noted})

    def _unrolled_gradients(self, arch_batch: Any, batch: Any, alphas: Sequence[nn.Parameter]) -> Tensor:
        """The gradients of the loss of the architecture after a step of the weights; its value."""
        task: list[Tensor] = []

        def valid() -> Tensor:
            loss, _, _ = self._forward(arch_batch, self.arch_loss, again=True)
            task.append(loss.detach())
            return loss

        def train() -> Tensor:
            loss, _, _ = self._forward(batch, self.loss, again=True)
            return loss

        weights, updates = updates_of(self.optimizer)
        if self.order == 2:
            gradients = difference_gradient(train, valid, weights, updates, alphas, mean=self._mean)
        else:
            gradients = exact_gradient(self.model, train, valid, weights, updates, alphas)
        add_gradients(alphas, gradients)
        return task[0]

    def _mean(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Of all processes; which weights have a gradient is the same in each."""
        self.processes.mean_([g for g in gradients if g is not None])
        return list(gradients)

    def _with_costs(self, task: Tensor, costs: Mapping[str, Tensor]) -> Tensor:
        return self.cost_loss(task, costs) if self.penalty is None else task + self.penalty(costs)

    def _cost_references(self) -> Mapping[str, float]:
        return {**self.cost_loss.references, **self.targets.by_cost}

    # ---- when to stop ------------------------------------------------------------------------------------------

    def _monitored_loss(self) -> Tensor:
        """The task loss on held-out samples that are the same in each epoch, without dropout, on batch statistics."""
        assert self.split is not None
        assert self.arch_dataset is not None
        generator = torch.Generator().manual_seed(mix_seed(self.seed, 8))
        order = torch.randperm(len(self.split.arch), generator=generator)[: self.batch_size].tolist()
        samples = Subset(self.arch_dataset, [self.split.arch[i] for i in order])
        with user_state_kept():
            batch = next(even_batches(samples, self.batch_size))
        decided = [alpha for alpha in self.alphas if alpha.numel() == 1]
        self._set(Softmax())
        with batch_statistics(self.model), frozen_weights([*self.weights, *decided]):
            loss, _, _ = self._forward(batch, self.arch_loss)
        return loss

    def _enter_phase(self, phase: str) -> None:
        if phase == "search" and self.alpha_std is not None:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, 7))  # of its own: this may be done twice
            with torch.no_grad():
                for alpha in (alpha for alpha in self.alphas if alpha.requires_grad):
                    alpha.copy_(torch.randn(alpha.shape, dtype=torch.float64, generator=generator) * self.alpha_std)

    def _after_epoch(self, phase: str) -> None:
        if self.monitor is None or phase != "search":
            return
        records = [record for record in self.history if record["phase"] == "search"]
        self.stopped = self.monitor.judge(records)
        if self.stopped is not None:
            self._end_phase("search", len(records))

    # ---- before the run, and between two parts of it -----------------------------------------------------------

    def _check_run(self) -> None:
        uniform = {k: torch.full((len(d.options),), 1 / len(d.options)) for k, d in self.decisions.items()}
        at_start = {name: self.choices.cost_model(name).soft(uniform) for name in self.costs.names}
        if self.penalty is not None and self.penalty.normalize:
            self.penalty.refer_to(self.choices.reachable(self.penalty.strength))
        elif self.penalty is None and self.normalize:
            self.cost_loss.refer_to({name: float(cost) for name, cost in at_start.items()})
        self._with_costs(torch.tensor(1.0), at_start)
        if self.penalty is None and self.cost_loss.kind == "mul#log":
            least = self.choices.reachable(self.costs.names)  # where the search may come to
            self.cost_loss(torch.tensor(1.0), {k: torch.tensor(least[k][0]) for k in self.costs.names})
        if self.order == "exact" and self.compile:
            raise ConfigurationError("order='exact', compile: compiled steps have no second derivative; leave it out")
        if self.order == "exact" and self.processes.count > 1:
            raise ConfigurationError(f"order='exact' on {self.processes.count} processes: use order=2, or one device")
        if self.order == "exact" or (self.monitor is not None and self.monitor.early_stop.ratio is not None):
            self._check_differentiates_twice()

    def _check_differentiates_twice(self) -> None:
        """UnsupportedModelError, before the first step, for what would be one in it."""
        assert self.dataset is not None
        inputs, target = next(even_batches(Subset(self.dataset, [0, 1]), 2))
        device = next(self.model.parameters()).device
        alphas = [alpha for alpha in self.alphas if alpha.requires_grad and alpha.numel() > 1]
        decided = [alpha for alpha in self.alphas if alpha.numel() == 1]
        self._set(Softmax())
        with batch_statistics(self.model), frozen_weights(decided):
            loss = self.arch_loss(self.model(inputs.to(device)), target.to(device))
        learning = [w for w in self.weights if w.requires_grad] if self.order == "exact" else []
        first = differentiable_gradients_of(loss, [*learning, *alphas])
        squares = torch.stack([gradient.square().sum() for gradient in first if gradient is not None]).sum()
        second_gradients_of(squares, alphas)

    def _own_settings(self) -> dict[str, Any]:
        return {
            "order": self.order,
            "alpha_std": self.alpha_std,
            "strength": None if self.penalty is None else self.penalty.strength,
            "normalize": self.normalize,
            "arch_optimizer": type(self.arch_optimizer).__name__,
            "early_stop": None if self.monitor is None else self.monitor.settings(),
        }

    def _own_state(self) -> dict[str, Any]:
        return {
            "stopped": None if self.stopped is None else list(self.stopped),
            "past": [] if self.monitor is None else self.monitor.state(),
        }

    def _check_own_state(self, state: Mapping[str, Any], model: nn.Module, where: str) -> None:
        of_epoch = record(**{label: tensor_like(d.alpha) for label, d in self.decisions.items()})
        record(stopped=optional(row_of(whole, whole, text)), past=list_of(of_epoch))(state, where)

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        self.stopped = None if state["stopped"] is None else Stopped(*state["stopped"])
        if self.monitor is not None:
            self.monitor.load_state(state["past"])


def _arch_adam(lr: float) -> Callable[[list[nn.Parameter]], Optimizer]:
    return lambda alphas: torch.optim.Adam(alphas, lr=lr, betas=(0.5, 0.999), weight_decay=1e-3)


def _check_numbers(order: object, precision: str, alpha_std: float | None, accumulate: int) -> None:
    if order not in (1, 2, "exact") or isinstance(order, bool):
        raise ConfigurationError(f"order={order!r}: allowed are 1, 2 and 'exact'")
    if order != 1 and precision != "32-true":
        raise ConfigurationError(
            f"order={order!r}, precision={precision!r}: a difference, or a second derivative, would be lost in the "
            "rounding; use precision='32-true', or order=1"
        )
    if order != 1 and accumulate != 1:
        raise ConfigurationError(
            f"order={order!r}, accumulate={accumulate}: the unrolled step is one of a whole batch; use accumulate=1"
        )
    is_number = isinstance(alpha_std, int | float) and not isinstance(alpha_std, bool)
    if alpha_std is not None and not (is_number and alpha_std > 0):
        raise ConfigurationError(f"alpha_std={alpha_std!r}: a number above 0 or None is needed")


def _named(costs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}_expected": cost.detach() for name, cost in costs.items()}
