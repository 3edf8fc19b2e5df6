"""PIT (arXiv 2203.14768): masks over the channels, kernels and dilations of a network, trained with its weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, Subset

from ..errors import ConfigurationError, InfeasibleTargetError, InputTypeError
from ..graph import evaluated
from ..mutables import arch_parameters
from ..pit import PIT
from .base import SchedulerFactory, Trainer
from .batches import even_batches
from .checkpoint import BEST
from .masks import Masks
from .modes import frozen_statistics, frozen_weights
from .penalty import Penalty
from .selection import Record, epochs_since, kept_record
from .setup import OptimizerLike, check_counts

__all__ = ["PITTrainer"]


@final
class PITTrainer(Trainer):
    """Searches the masks of a ``PIT`` network: warm-up, search, fine-tuning.

    * Warm-up: the weights alone; masks stay at 1.
    * Search: weights and masks. The loss of the masks is L = CE + sum_k s_k C_k, where C_k is the cost of the network
      that would be exported now, in its unit, with the gradient of the relaxed cost; with a target T_k the term is
      s_k max(0, C_k - T_k). Below its target a cost does not pull, and units may come back.
    * Fine-tuning: the weights alone, with masks as they were found, from the epoch that is kept and with a fresh
      optimizer. It is what training the exported network would be, in the size of the whole one.

    Masks have an optimizer of their own without weight decay, and are clipped to [0, 1] after each step. If no cost can
    pull (every strength is 0, or the whole network meets the targets), they stay where they are: the task alone would
    also switch units off, and buy nothing with it. Adam moves a mask by about its learning rate whatever the strength:
    what counts is which of the two gradients, of task and cost, is larger. SGD (``arch_optimizer``) keeps their scale.

    By default the same batches train weights and masks, in one step. What the weights have learnt by heart then looks
    like a network too large for its task. With ``arch_fraction`` that part of the training set, stratified and seeded,
    is held out for the masks, and every step of the weights is followed by one of the masks, on a batch of it, in which
    no weight and no BatchNorm statistic moves.

    Which epoch is kept: with ``targets``, of the search epochs whose network meets all of them, the best on
    ``valid_dataset``, or without one the last; without targets the last one, because validation alone would choose the
    network of before anything was cut. Of the fine-tuning the best on ``valid_dataset``, or the last one. After
    ``train`` the PIT network is that of the kept epoch; ``last.ckpt`` has the last one.

    Args:
        pit: the network, ``PIT(model, ...)``. The optimizer is built from its parameters, not from the model's.
        loss: ``(output, target) -> scalar``.
        metrics: ``(output, target) -> mapping of numbers`` (or one number), averaged over an epoch.
        optimizer: of the weights: one built from ``pit.parameters()``, or a function from a list of parameters to one.
            Its class, groups and settings are taken over; masks in it are left out. ``finetune_optimizer``: instead
            of it in the fine-tuning.
        num_epochs, warmup_epochs, finetune_epochs: of the three phases.
        strength: s_k, per unit of its cost (1e-6 per parameter, 1e-9 per MAC): one number for all costs, or with
            targets for those that have one; or cost -> number. ``normalize``: costs and targets are divided by the cost
            of the whole network.
        targets: cost -> largest value of the exported network. InfeasibleTargetError if no masks get there.
        mask_learning_rate: of Adam for the masks. ``arch_optimizer``: a function from a list of parameters to another
            optimizer, without weight decay.
        dataset: training set of (input, target) pairs; ``arch_fraction`` of it for the masks. ``arch_dataset``: the
            same samples in the same order with other transforms, for them.
        valid_dataset: evaluated after each epoch and used to choose one: report the accuracy on other data.
        monitor: ``'loss'``, or one of the metrics; ``monitor_mode``: ``'min'`` or ``'max'`` is better, by default
            ``'min'`` for the loss and ``'max'`` for a metric.
        patience: a phase ends after so many epochs without a better one on ``valid_dataset``. In the search only epochs
            that meet the targets count, so it needs these; the warm-up is never cut short.
        scheduler, warmup_scheduler, finetune_scheduler: ``(optimizer, total_steps) -> scheduler``, stepped after every
            weight step.
        seed, device, devices, strategy, precision, checkpoint_dir, checkpoint_every, log_frequency, progress: as in
            ``ProxylessTrainer``. ``best.ckpt`` in ``checkpoint_dir``: the epoch that targets or validation chose.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))  # 4 * 8 + 8 + 8 * 2 + 2 = 58 parameters
    >>> pit = PIT(net, input_shape=(4,))
    >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.arange(64) % 2)
    >>> trainer = PITTrainer(
    ...     pit, loss=nn.CrossEntropyLoss(), metrics=None, dataset=data, num_epochs=4, batch_size=8, workers=0,
    ...     optimizer=torch.optim.SGD(pit.parameters(), lr=0.1), device="cpu",
    ...     strength=1.0, targets={"params": 30}, mask_learning_rate=0.05,
    ... )
    >>> history = trainer.train()
    >>> small = trainer.export_model()
    >>> sum(p.numel() for p in small.parameters()) <= 30
    True
    """

    model: PIT

    def __init__(
        self,
        pit: PIT,
        *,
        loss: Callable[[Any, Any], Tensor],
        metrics: Callable[[Any, Any], Mapping[str, Tensor | float] | Tensor | float] | None,
        optimizer: OptimizerLike,
        strength: float | Mapping[str, float],
        num_epochs: int = 100,
        dataset: Dataset[Any] | None = None,
        warmup_epochs: int = 0,
        finetune_epochs: int = 0,
        targets: Mapping[str, float] | None = None,
        normalize: bool = False,
        mask_learning_rate: float = 1e-3,
        arch_optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        finetune_optimizer: OptimizerLike | None = None,
        arch_dataset: Dataset[Any] | None = None,
        valid_dataset: Dataset[Any] | None = None,
        arch_fraction: float = 0.0,
        patience: int | None = None,
        monitor: str = "loss",
        monitor_mode: Literal["min", "max"] | None = None,
        batch_size: int = 64,
        workers: int = 4,
        device: torch.device | str | None = None,
        log_frequency: int | None = None,
        scheduler: SchedulerFactory | None = None,
        warmup_scheduler: SchedulerFactory | None = None,
        finetune_scheduler: SchedulerFactory | None = None,
        seed: int = 0,
        precision: str = "32-true",
        devices: int = 1,
        strategy: str = "auto",
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        progress: bool | None = None,
    ) -> None:
        if not isinstance(pit, PIT):
            raise InputTypeError(
                f"PITTrainer: a {type(pit).__name__} is no PIT network; wrap it, PITTrainer(PIT(model, "
                "input_shape=...), ...), and build the optimizer from the parameters of the result"
            )
        self.penalty = Penalty(strength, targets, normalize, pit.reachable_costs())
        super().__init__(
            Masks(pit),
            loss=loss,
            metrics=metrics,
            optimizer=optimizer,
            arch_optimizer=_without_decay(
                arch_optimizer or (lambda masks: torch.optim.Adam(masks, mask_learning_rate))
            ),
            num_epochs=num_epochs,
            dataset=dataset,
            arch_dataset=arch_dataset,
            valid_dataset=valid_dataset,
            arch_fraction=arch_fraction or None,
            warmup_epochs=warmup_epochs,
            finetune_epochs=finetune_epochs,
            batch_size=batch_size,
            workers=workers,
            device=device,
            log_frequency=log_frequency,
            scheduler=scheduler,
            warmup_scheduler=warmup_scheduler,
            finetune_scheduler=finetune_scheduler,
            finetune_optimizer=finetune_optimizer,
            seed=seed,
            precision=precision,
            devices=devices,
            strategy=strategy,
            checkpoint_dir=checkpoint_dir,
            checkpoint_every=checkpoint_every,
            progress=progress,
        )
        if arch_dataset is not None and self.arch_fraction is None:
            raise ConfigurationError(
                "arch_dataset: without arch_fraction the masks learn from dataset; give a fraction"
            )
        self.masks = arch_parameters(pit)
        self.patience, self.monitor = patience, monitor
        self.larger_is_better = _larger_is_better(monitor, monitor_mode)
        self._check_patience()
        self._best: dict[str, Tensor] | None = None

    # ---- the algorithm -----------------------------------------------------------------------------------------

    def _weight_step(self, batch: Any) -> None:
        with frozen_weights(self.masks):
            self._update_weights(batch)

    def _search_step(self, batch: Any) -> None:
        if not self._learning():
            self._weight_step(batch)
        elif self.arch_fraction is None:
            self._joint_step(batch)
        else:
            self._weight_step(batch)
            self._mask_step(self._next_arch_batch())

    def _learning(self) -> list[nn.Parameter]:
        """The masks that are trained."""
        return [mask for mask in self.masks if mask.requires_grad] if self.penalty.pulls else []

    def _joint_step(self, batch: Any) -> None:
        """One step of weights and masks on the same batch."""
        self._weight_optimizer.zero_grad(set_to_none=True)
        self.arch_optimizer.zero_grad(set_to_none=True)
        task, output, target = self._forward(batch, self.loss)
        noted = self._backward("loss", task)
        self._step_weights()
        self._step_masks()
        self._note({**noted, **self._measured(output, target)})

    def _mask_step(self, batch: Any) -> None:
        """One step of the masks; the weights and the BatchNorm statistics stay."""
        self.arch_optimizer.zero_grad(set_to_none=True)
        with frozen_weights(self.weights), frozen_statistics(self.norms):
            task, _, _ = self._forward(batch, self.loss)
            noted = self._backward("arch_loss", task)
        self._step_masks()
        self._note(noted)

    def _backward(self, name: str, task: Tensor) -> dict[str, Tensor | float]:
        """The gradients of the task loss and, added for the masks, of the penalty; what to note of them."""
        costs = self.model.costs()
        penalty = self.penalty(costs)
        self._check_finite({name: task, **costs})
        masks = self._learning()
        # Apart, so that both parts are known; the masks of this step are in both graphs.
        of_cost = torch.autograd.grad(penalty, masks, retain_graph=True, allow_unused=True)
        self.fabric.backward(task)
        return {name: task, "penalty": penalty, "cost_share": _add(masks, of_cost)}

    def _step_masks(self) -> None:
        self._average_gradients(self._learning())
        self.arch_optimizer.step()
        self.model.masks.clip_()

    def _cost_references(self) -> Mapping[str, float]:
        return self.penalty.targets

    # ---- which epoch is kept -----------------------------------------------------------------------------------

    def _after_epoch(self, phase: str) -> None:
        if phase == "warmup" or (phase == "search" and not self.penalty.targets):
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
            self._best = _copied(self.model)
            if self.checkpoint_dir is not None and self.fabric.is_global_zero:
                self.save(self.checkpoint_dir / BEST)

    def _is_met(self, record: Record) -> bool:
        return self.penalty.is_met({name: record[f"{name}_hard"] for name in self.penalty.targets})

    def _enter_phase(self, phase: str) -> None:
        if phase == "finetune":
            self._take_best()

    def _after_run(self) -> None:
        if self._best is not None:
            self._take_best()

    def _take_best(self) -> None:
        """Make the network that of the kept epoch, or be sure that it may stay as it is."""
        if self._best is None:
            self._check_targets()
        else:
            self.model.load_state_dict(self._best)

    def _check_targets(self) -> None:
        now = {name: hard for name, (_, hard) in self.searched.soft_and_hard().items()}
        if self.penalty.is_met(now):
            return
        found = [record for record in self.history if record["phase"] != "warmup"]
        texts = []
        for name, target in self.penalty.targets.items():
            reached = min((record[f"{name}_hard"] for record in found), default=now[name])
            least = self.model.reachable_costs()[name][0]
            texts.append(f"{name} {target:g}, lowest so far {reached:g}, lowest possible {least:g}")
        raise InfeasibleTargetError(
            f"no epoch met the targets: {'; '.join(texts)}. Search longer, or with a larger strength or "
            "mask_learning_rate; export(best=False) gives the network as it is now"
        )

    @contextmanager
    def _as_kept(self, best: bool) -> Iterator[None]:
        if not best:
            yield
            return
        now = _copied(self.model)
        self._take_best()
        try:
            yield
        finally:
            self.model.load_state_dict(now)

    # ---- before the run, and between two parts of it -----------------------------------------------------------

    def _check_patience(self) -> None:
        check_counts(0, 0, 1, 0, None, None, patience=self.patience)
        if self.patience is None:
            return
        if self.valid_dataset is None:
            raise ConfigurationError(f"patience={self.patience}: it needs valid_dataset, which says what is better")
        if not self.penalty.targets and not self.finetune_epochs:
            raise ConfigurationError(
                f"patience={self.patience}: it has no phase to end. Without targets validation cannot judge a search, "
                "since it is best before anything is cut; give targets or finetune_epochs"
            )

    def _check_run(self) -> None:
        full = {name: high for name, (_, high) in self.model.reachable_costs().items()}
        if self.num_epochs and not self.penalty.pulls and not self.penalty.is_met(full):
            raise ConfigurationError(
                f"strength={self.penalty.strength}: nothing pulls the costs towards the targets {self.penalty.targets}"
            )
        if self.valid_dataset is None or self.monitor == "loss":
            return
        inputs, target = next(iter(even_batches(Subset(self.valid_dataset, [0]), 1)))
        device = next(self.model.parameters()).device
        with evaluated(self.model):
            known = self._measured(self.model(inputs.to(device)), target.to(device))
        if self.monitor not in known:
            raise ConfigurationError(f"monitor={self.monitor!r}: allowed are {['loss', *known]}")

    def _own_settings(self) -> dict[str, Any]:
        penalty = self.penalty
        return {
            "strength": penalty.strength,
            "targets": penalty.targets,
            "normalize": penalty.normalize,
            "arch_optimizer": type(self.arch_optimizer).__name__,
        }

    def _own_state(self) -> dict[str, Any]:
        return {"best": self._best}

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        self._best = state["best"]


def _without_decay(
    arch_optimizer: Callable[[list[nn.Parameter]], Optimizer],
) -> Callable[[list[nn.Parameter]], Optimizer]:
    def checked(masks: list[nn.Parameter]) -> Optimizer:
        optimizer = arch_optimizer(masks)
        if any(group.get("weight_decay") for group in optimizer.param_groups):
            raise ConfigurationError("arch_optimizer: weight decay switches masks off by itself; set weight_decay=0")
        return optimizer

    return checked


def _larger_is_better(monitor: str, mode: str | None) -> bool:
    if mode not in (None, "min", "max"):
        raise ConfigurationError(f"monitor_mode={mode!r}: allowed are 'min', 'max' and None")
    return monitor != "loss" if mode is None else mode == "max"


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _add(masks: Sequence[nn.Parameter], of_cost: Sequence[Tensor | None]) -> Tensor:
    """Add the cost's gradients to those there are; returns its share of their L1 norm, in [0, 1]."""
    norms = [torch.zeros((), device=masks[0].device)] * 2
    for mask, gradient in zip(masks, of_cost, strict=True):
        if mask.grad is not None:
            norms[0] = norms[0] + mask.grad.abs().sum()
        if gradient is not None:
            norms[1] = norms[1] + gradient.abs().sum()
            mask.grad = gradient if mask.grad is None else mask.grad + gradient
    return norms[1] / (norms[0] + norms[1]).clamp_min(1e-30)
