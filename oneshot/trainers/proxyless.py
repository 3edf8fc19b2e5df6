"""ProxylessNAS (arXiv 1812.00332): path-binarised search with a differentiable latency."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from ..cost import Cost, CostSpec
from ..cost.hardware import Hardware
from ..errors import ConfigurationError
from ..mutables import BinaryGates
from .base import SchedulerFactory, Trainer
from .choices import Choices
from .cost_loss import DEFAULT_REFERENCE, CostLoss
from .costs import CostSources
from .modes import frozen_statistics, frozen_weights
from .setup import OptimizerLike

__all__ = ["ProxylessTrainer"]


@final
class ProxylessTrainer(Trainer):
    """Searches the mutables of a network with binary gates and an expected latency.

    Each weight step draws one path from p = softmax(alpha) and trains its weights. Every ``arch_every`` such steps
    an arch step takes a batch of the held-out split, draws two paths per decision (or the gates of all, ``paths``)
    and moves alpha only: no weight and no BatchNorm buffer changes. Its loss L combines the task loss CE with the
    expected cost E, which is differentiable, dE/dalpha_i = p_i (t_i - sum_k p_k t_k):

    * ``'add#linear'``: L = CE + lambda (E - ref) / ref, needs ``grad_reg_loss_params={'lambda': ...}``;
    * ``'mul#log'``: L = CE alpha (ln E / ln ref)^beta, needs ``'alpha'`` and ``'beta'``, and E, ref > 1.

    With several costs there is such a term, or such a factor, for each; lambda and beta may be mappings by cost.
    Neither is a constraint: give ``export`` a ``budget`` to meet one exactly.

    Args:
        model: the network, with LayerChoice, InputChoice, Repeat in it.
        loss: ``(output, target) -> scalar``. ``arch_loss`` is used in arch steps instead, if given.
        metrics: ``(output, target) -> mapping of numbers`` (or one number), averaged over an epoch.
        optimizer: an optimizer built from ``model.parameters()``, or a function from a list of parameters to one.
            Its class, groups and settings are taken over for the weights; alphas in it are left out.
        num_epochs: search epochs; ``warmup_epochs`` epochs of weights alone come before them.
        dataset: training set of (input, target) pairs. ``arch_fraction`` of it, stratified and seeded, is held out
            for the alphas. ``arch_dataset``: the same samples in the same order with other transforms, for them.
        valid_dataset: evaluated on the argmax path after each epoch; nothing is trained on it.
        device, devices, strategy, precision: handed to Lightning Fabric; device None takes a GPU if there is one.
        log_frequency: steps between two lines of ``log.jsonl``; epochs are always logged.
        arc_learning_rate: of Adam with betas (0, 0.999) and no weight decay for the alphas.
        applied_hardware: what ``'latency_ms'`` is: ``'this-machine'`` or ``'this-machine-onnxruntime'`` (every
            candidate is timed on the CPU, by PyTorch or ONNX Runtime); a latency table as a mapping or
            ``LatencyTable``, or the path of one as YAML or JSON; predictors of nn-Meter, by name
            (``'cortexA76cpu_tflite21'``) or folder. ``'flops'``: MACs instead.
        missing: kernel -> ms, for what nn-Meter's predictors lack; without it such a kernel is an error.
        cost: ``'params'``, ``'macs'``, ``'peak_memory'`` and what else ``counted_cost`` knows, a ``CostSpec``, a
            ``CostModel``, or several: names, or name -> one of these (``'latency_ms'``: what applied_hardware takes).
        dummy_input: shape that costs are counted or timed for, with its batch dimension.
        ref_latency: the reference ref, in ms, or in the unit of the cost; for several costs a mapping by name.
            ``normalize=True``: what each costs in expectation before the search, all options being equally probable.
        arch_every, skip_first_epoch: an arch step after every so many weight steps; none in the first search epoch.
        paths: 2, or 'all'. ``rescale``: keep the probability of what was not drawn (two paths only).
        scheduler, warmup_scheduler: ``(optimizer, total_steps) -> scheduler``, stepped after every weight step.
        seed: of the split, the order of the data, augmentation, dropout and paths.
        checkpoint_dir: where checkpoints, ``log.jsonl``, TensorBoard files and the measured table go;
            ``checkpoint_every``: steps between checkpoints besides those at the end of an epoch.
        progress: show a progress line; None: on a terminal.

    >>> from oneshot import LayerChoice
    >>> net = nn.Sequential(LayerChoice([nn.Linear(4, 4), nn.Identity()]), nn.Linear(4, 2))
    >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.arange(64) % 2)
    >>> trainer = ProxylessTrainer(
    ...     net, loss=nn.CrossEntropyLoss(), metrics=None, dataset=data, num_epochs=2, batch_size=8, workers=0,
    ...     optimizer=torch.optim.SGD(net.parameters(), lr=0.1), device="cpu",
    ...     cost="params", grad_reg_loss_params={"lambda": 1.0}, ref_latency=20,
    ... )
    >>> history = trainer.train()
    >>> trainer.export(budget={"params": 10})  # Linear(4, 2) has 10, Linear(4, 4) 20 more
    {'0': 1}
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Callable[[Any, Any], Tensor],
        metrics: Callable[[Any, Any], Mapping[str, Tensor | float] | Tensor | float] | None,
        optimizer: OptimizerLike,
        num_epochs: int = 120,
        dataset: Dataset[Any] | None = None,
        warmup_epochs: int = 0,
        batch_size: int = 64,
        workers: int = 4,
        device: torch.device | str | None = None,
        log_frequency: int | None = None,
        arc_learning_rate: float = 1e-3,
        grad_reg_loss_type: Literal["mul#log", "add#linear"] | None = "add#linear",
        grad_reg_loss_params: Mapping[str, float | Mapping[str, float]] | None = None,
        applied_hardware: Hardware | None = None,
        dummy_input: Sequence[int] = (1, 3, 224, 224),
        ref_latency: float | Mapping[str, float] = DEFAULT_REFERENCE,
        normalize: bool = False,
        cost: str | Sequence[str] | Cost | CostSpec | Mapping[str, Any] | None = None,
        missing: Mapping[str, float] | None = None,
        arch_loss: Callable[[Any, Any], Tensor] | None = None,
        arch_dataset: Dataset[Any] | None = None,
        valid_dataset: Dataset[Any] | None = None,
        arch_fraction: float = 0.2,
        arch_every: int = 5,
        skip_first_epoch: bool = True,
        paths: Literal[2, "all"] = 2,
        rescale: bool = True,
        scheduler: SchedulerFactory | None = None,
        warmup_scheduler: SchedulerFactory | None = None,
        seed: int = 0,
        precision: str = "32-true",
        devices: int = 1,
        strategy: str = "auto",
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        progress: bool | None = None,
    ) -> None:
        if paths not in (2, "all"):
            raise ConfigurationError(f"paths={paths!r}: allowed are 2 and 'all'")
        if not isinstance(arch_every, int) or arch_every < 1:
            raise ConfigurationError(f"arch_every={arch_every!r}: an integer of at least 1 is needed")
        self.choices = Choices(model, CostSources(cost, applied_hardware, missing), dummy_input, self._measured_once)
        super().__init__(
            self.choices,
            loss=loss,
            metrics=metrics,
            optimizer=optimizer,
            arch_optimizer=_arch_adam(arc_learning_rate),
            num_epochs=num_epochs,
            dataset=dataset,
            arch_dataset=arch_dataset,
            valid_dataset=valid_dataset,
            arch_fraction=arch_fraction,
            warmup_epochs=warmup_epochs,
            batch_size=batch_size,
            workers=workers,
            device=device,
            log_frequency=log_frequency,
            scheduler=scheduler,
            warmup_scheduler=warmup_scheduler,
            seed=seed,
            precision=precision,
            devices=devices,
            strategy=strategy,
            checkpoint_dir=checkpoint_dir,
            checkpoint_every=checkpoint_every,
            progress=progress,
        )
        self.arch_loss = loss if arch_loss is None else arch_loss
        self.arch_every, self.skip_first_epoch = arch_every, skip_first_epoch
        self.gates, self.rescale = BinaryGates(paths), rescale
        if normalize and ref_latency != DEFAULT_REFERENCE:
            raise ConfigurationError(f"normalize=True and ref_latency={ref_latency}: give one of them")
        if ref_latency is None and self.costs.names:
            raise ConfigurationError("ref_latency=None: a finite number is needed, or normalize=True")
        self.normalize = normalize
        units = {name: self.costs.unit(name) for name in self.costs.names}
        references = None if normalize else ref_latency
        self.cost_loss = CostLoss(grad_reg_loss_type, grad_reg_loss_params, references, units)

    # ---- the algorithm -----------------------------------------------------------------------------------------

    def _weight_step(self, batch: Any) -> None:
        self._update_weights(batch, BinaryGates(1))

    def _search_step(self, batch: Any) -> None:
        self._update_weights(batch, BinaryGates(1))
        if self._arch_step_due():
            self._arch_step(self._next_arch_batch())

    def _arch_step_due(self) -> bool:
        done = self.search_step + 1 - (self.steps_per_epoch if self.skip_first_epoch else 0)
        return done > 0 and done % self.arch_every == 0

    def _arch_step(self, batch: Any) -> None:
        """One step of the alphas; the weights and the BatchNorm statistics stay."""
        self._set(self.gates)
        self.arch_optimizer.zero_grad(set_to_none=True)
        with frozen_weights(self.weights), frozen_statistics(self.norms):
            task, _, _ = self._forward(batch, self.arch_loss)
            expected = self._expected_costs()
            # The loss sees each cost as a variable of its own, so that both parts of alpha's gradient are known.
            variables = {name: cost.detach().requires_grad_() for name, cost in expected.items()}
            total = self.cost_loss(task, variables)
            self._check_finite({"arch_loss": total, "task_loss": task, **_named(expected)})
            self.fabric.backward(total)
        share = _add_cost_gradient([d.alpha for d in self.decisions.values()], expected, variables)
        self._average_gradients([d.alpha for d in self.decisions.values()])
        self.arch_optimizer.step()
        if self.rescale:
            self._after_arch_step()
        self._note({"arch_loss": total, "cost_share": share, **_named(expected)})

    def _expected_costs(self) -> dict[str, Tensor]:
        """E under the distribution that this step's gates have: in two-path mode the pair's own softmax."""
        if not self.costs.names:
            return {}
        probabilities = {label: decision.probabilities() for label, decision in self.decisions.items()}
        return {name: self.choices.cost_model(name).soft(probabilities) for name in self.costs.names}

    def _cost_references(self) -> Mapping[str, float]:
        return self.cost_loss.references

    def _check_run(self) -> None:
        searched = self.num_epochs - (1 if self.skip_first_epoch else 0)
        if searched * self.steps_per_epoch < self.arch_every and self.num_epochs:
            raise ConfigurationError(
                f"no arch step would be made: {self.num_epochs} search epochs of {self.steps_per_epoch} steps"
                f"{', the first one without' if self.skip_first_epoch else ''}, and one every {self.arch_every} steps"
            )
        uniform = {k: torch.full((len(d.options),), 1 / len(d.options)) for k, d in self.decisions.items()}
        at_start = {name: self.choices.cost_model(name).soft(uniform) for name in self.costs.names}
        if self.normalize:
            self.cost_loss.refer_to({name: float(cost) for name, cost in at_start.items()})
        measured = self.costs.measures and self.fabric.is_global_zero
        if measured and self.checkpoint_dir is not None and self.latency_table is not None:
            self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
            self.latency_table.write(self.checkpoint_dir / "latency_table.yaml")
        self.cost_loss(torch.tensor(1.0), at_start)


def _arch_adam(lr: float) -> Callable[[list[nn.Parameter]], Optimizer]:
    # The first beta is 0, as in the paper's code: with momentum a pair would drift on in steps it is not drawn in.
    return lambda alphas: torch.optim.Adam(alphas, lr=lr, betas=(0.0, 0.999), weight_decay=0.0)


def _add_cost_gradient(
    alphas: Sequence[nn.Parameter], expected: Mapping[str, Tensor], variables: Mapping[str, Tensor]
) -> float | Tensor:
    """Add sum_j dL/dE_j dE_j/dalpha to the gradients; returns the costs' share of their L1 norm, in [0, 1]."""
    names = [name for name, variable in variables.items() if variable.grad is not None]
    if not names:
        return 0.0
    of_cost = torch.autograd.grad(
        [expected[name] for name in names],
        list(alphas),
        grad_outputs=[variables[name].grad for name in names],
        allow_unused=True,
    )
    zero = torch.zeros((), device=variables[names[0]].device)
    norms = [zero, zero]
    for alpha, gradient in zip(alphas, of_cost, strict=True):
        if alpha.grad is not None:
            norms[0] = norms[0] + alpha.grad.abs().sum()
        if gradient is not None:
            norms[1] = norms[1] + gradient.abs().sum()
            alpha.grad = gradient if alpha.grad is None else alpha.grad + gradient
    return norms[1] / (norms[0] + norms[1]).clamp_min(1e-30)


def _named(costs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}_expected": cost for name, cost in costs.items()}
