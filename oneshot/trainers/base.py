"""The trainer base: data split, optimizers, phases, logs, checkpoints, export. Written once, for all algorithms."""

from __future__ import annotations

import copy
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, Subset

from ..cost import LatencyTable, measure_table, time_module
from ..data import BatchStream, Split, mix_seed, stratified_split, targets_of
from ..data.stream import worker_deaths_named
from ..errors import ArchMismatchError, CheckpointError, ConfigurationError, TrainingDivergedError
from ..export import arch_of, argmax_choices, fingerprint, verified_fixed, write_arch
from ..files import remove_leftovers
from ..loggers import Progress
from ..mutables import Sampler, after_step, arch_parameters, decisions, draw, set_sampler, weight_parameters
from ..pit.network import SearchedNetwork
from ..regularizers import Regularizer
from ..regularizers.base import Sum
from .arguments import SchedulerFactory
from .averaging import WeightAverage
from .batches import even_batches, example_inputs
from .checkpoint import LAST, read_checkpoint, write_checkpoint
from .checkpoint_fit import (
    check_argmax,
    check_fits,
    check_history,
    check_like,
    check_optimizer,
    check_regularizer,
    check_scheduler,
    check_targets_state,
)
from .checkpoint_kinds import record
from .checks import check_one_batch
from .clipping import GradientClip
from .compilation import Compilations, compile_arguments, compiled
from .finiteness import Finiteness
from .gradients import add_gradients
from .loss_scale import LossScale
from .meters import Meters
from .modes import frozen_statistics, normalisations
from .moving import moved, parts_of_batch
from .processes import Processes
from .recompute import blocks_of, recomputed
from .regularized import CostsOfStep, parts_of
from .report import ReportRow, SearchReport
from .rng import seed_global_state, user_state_kept
from .run_log import RunLog
from .searched import Priced, Searched
from .setup import (
    Devices,
    OptimizerLike,
    check_counts,
    library_version,
    own_fabric,
    own_optimizer,
    to_device_of_weights,
)
from .signals import signal_handled
from .targets import Pull, Targets

__all__ = ["Trainer"]

_AGREE_EVERY = 8
"""Steps between two questions to the other processes whether one of them was told to stop."""


class _Held(NamedTuple):
    """What the tensors of a checkpoint are of."""

    model: nn.Module
    optimizer: Optimizer
    finetune_optimizer: Optimizer
    arch_optimizer: Optimizer


class Trainer(ABC):
    """Searches a model: warm-up of the weights, then weights and alphas together, then perhaps the weights again.

    A concrete trainer says what is searched (``Searched``: choices or masks) and what a step of each phase does; see
    its docstring for the arguments. Life: construct, perhaps ``resume``, ``train`` (``fit`` is the same), ``export``.
    """

    def __init__(
        self,
        searched: Searched,
        *,
        loss: Callable[[Any, Any], Tensor],
        metrics: Callable[[Any, Any], Mapping[str, Tensor | float] | Tensor | float] | None,
        optimizer: OptimizerLike,
        arch_optimizer: Callable[[list[nn.Parameter]], Optimizer],
        num_epochs: int,
        arch_fraction: float | None,
        dataset: Dataset[Any] | None = None,
        arch_dataset: Dataset[Any] | None = None,
        valid_dataset: Dataset[Any] | None = None,
        warmup_epochs: int = 0,
        batch_size: int = 64,
        workers: int = 4,
        log_frequency: int | None = None,
        scheduler: SchedulerFactory | None = None,
        warmup_scheduler: SchedulerFactory | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        accelerator: str | None = None,
        devices: Devices = None,
        num_nodes: int | None = None,
        strategy: str = "auto",
        precision: str = "32-true",
        compile: bool | str | Mapping[str, Any] = False,  # noqa: A002  the word of PyTorch
        checkpoint_blocks: Sequence[str] = (),
        accumulate: int = 1,
        grad_clip: float | Mapping[str, float] | None = None,
        ema_decay: float | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        progress: bool | None = None,
        finetune_epochs: int = 0,
        finetune_optimizer: OptimizerLike | None = None,
        finetune_scheduler: SchedulerFactory | None = None,
        targets: Mapping[str, float] | None = None,
        regularizer: Regularizer | None = None,
    ) -> None:
        check_counts(num_epochs=num_epochs, warmup_epochs=warmup_epochs, batch_size=batch_size, workers=workers)
        check_counts(log_frequency=log_frequency, checkpoint_every=checkpoint_every, finetune_epochs=finetune_epochs)
        check_counts(accumulate=accumulate)
        if accumulate > batch_size:
            raise ConfigurationError(f"accumulate={accumulate}: more parts than the {batch_size} samples of a batch")
        if compile and checkpoint_blocks:
            raise ConfigurationError(
                f"compile={compile!r}, checkpoint_blocks={list(checkpoint_blocks)}: the compiler decides itself what "
                "is computed again in the backward pass; give one of them"
            )
        self.searched, self.costs = searched, searched.costs
        self.model = model = searched.model
        blocks_of(model, checkpoint_blocks)
        compile_arguments(compile)
        self.decisions = decisions(model)
        self.targets = Targets(searched, targets)
        if not searched.costs.measures:
            self.targets.check()
        self.regularizer = regularizer
        # The network as the user wrote it: its names are those that groups of weights were made with.
        self._network = model.network if isinstance(model, SearchedNetwork) else model
        self._of_costs, self._of_weights = parts_of(regularizer)
        self.loss, self.metrics = loss, metrics
        self.num_epochs, self.warmup_epochs, self.finetune_epochs = num_epochs, warmup_epochs, finetune_epochs
        self.dataset, self.valid_dataset = dataset, valid_dataset
        self.arch_dataset = dataset if arch_dataset is None else arch_dataset
        self.arch_fraction, self.batch_size, self.workers = arch_fraction, batch_size, workers
        self.log_frequency, self.seed = log_frequency, seed
        self.checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir)
        self.checkpoint_every, self.progress = checkpoint_every, progress
        self.fabric, scaler = own_fabric(
            device=device,
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
            precision=precision,
        )
        self.processes, self.scale = Processes(self.fabric), LossScale(scaler)
        self.compile, self.checkpoint_blocks, self.accumulate = compile, tuple(checkpoint_blocks), accumulate
        self.clip = GradientClip(grad_clip)
        self.weights, self.norms = weight_parameters(model), normalisations(model)
        self.optimizer = own_optimizer(optimizer, self.weights)
        self.arch_optimizer = arch_optimizer(arch_parameters(model))
        self.finetune_optimizer = self.optimizer
        if finetune_epochs:
            self.finetune_optimizer = own_optimizer(finetune_optimizer or optimizer, self.weights)
        self._optimizers = (self.optimizer, self.finetune_optimizer, self.arch_optimizer)
        self._first_lrs = {id(o): [g["lr"] for g in o.param_groups] for o in self._optimizers}
        self.average = None if ema_decay is None else WeightAverage(model, self.weights, ema_decay)
        self._group_sizes = [len(group["params"]) for group in self.optimizer.param_groups]  # of the whole model
        self._factories = {"warmup": warmup_scheduler, "search": scheduler, "finetune": finetune_scheduler}
        self.scheduler: LRScheduler | None = None
        self.generator = torch.Generator().manual_seed(mix_seed(seed, 0))
        self.step = 0
        self.arch_batches = 0
        self.history: list[dict[str, Any]] = []
        self.split: Split | None = None
        self._meters = Meters()
        self._finite = Finiteness(self._diverged)
        self._argmax = argmax_choices(model)
        self._ended: dict[str, int] = {}  # phases that are over, with the epochs they had
        self._latest: dict[str, Tensor | float] = {}
        self._scheduler_state: dict[str, Any] | None = None
        self._phase_of_step = "warmup"  # of the last one
        self._progress_before = 0.0  # of the search, in an earlier part of this run
        self._read_from = ""  # the checkpoint that this run goes on from
        self._holds_kept = False  # whether the model is, or has become, that of a chosen epoch
        self._of_processes: list[dict[str, Any]] | None = None  # of a checkpoint, until it is known which one we are
        self.compilations = Compilations([])
        self._stop_signal = 0
        self._log: RunLog | None = None
        self._log_size = 0
        self._arch_iterator: Iterator[Any] = iter(())

    # ---- what a user calls -------------------------------------------------------------------------------------

    def train(self) -> list[dict[str, Any]]:
        """Run what is left of the phases; returns one record per epoch, also ``history``.

        Everything that can be wrong is looked at before the first step. Checkpoints go to ``checkpoint_dir`` after
        every epoch and every ``checkpoint_every`` steps.
        """
        self._run(lambda: self.total_steps)
        return self.history

    fit = train

    def warm_up(self, path: str | os.PathLike[str]) -> None:
        """Train the warm-up alone, and write it to a file that other trainers can ``start_from``."""
        if not self.warmup_epochs:
            raise ConfigurationError("warm_up(): warmup_epochs=0, there is nothing to train before the search")
        self._run(lambda: self.warmup_epochs * self.steps_per_epoch)
        self.save(path)

    def start_from(self, path: str | os.PathLike[str]) -> None:
        """Begin, at the next ``train()``, with the search that follows a warm-up of another trainer, from ``warm_up``.

        It must have been the same network with the same data, seed and warm-up; how the architecture is searched, its
        costs, strengths and targets may differ. What follows is what a run with a warm-up of its own would have done.
        """
        state = self._read(path, own=False)
        epochs = [record["phase"] for record in state["history"]]
        if epochs != ["warmup"] * self.warmup_epochs:
            raise CheckpointError(
                f"{path}: has {len(epochs)} epochs {sorted(set(epochs))}; a warm-up of {self.warmup_epochs} epochs, as "
                "warm_up(path) writes it, is needed"
            )
        self._take(state)
        for part, of_part in zip(self._of_weights, state["regularizers"], strict=False):
            part.load_state_dict(of_part)
        self._log_size = 0  # the file of that log lies elsewhere

    def evaluate(self, dataset: Dataset[Any] | None = None) -> dict[str, float]:
        """Loss and metrics, on ``dataset`` (default: ``valid_dataset``), of the network that would be exported now.

        In eval mode, and nothing of the model moves. BatchNorm uses the running statistics under masks; along the
        argmax path of choices those of each batch, because the running ones of a supernet mix all its paths; after a
        fine-tuning of that path alone the running ones again. Samples are mixed, always alike: a batch of one class
        would have other statistics. Several processes share the batches, and all of them have to call it.
        """
        dataset = self.valid_dataset if dataset is None else dataset
        if dataset is None:
            raise ConfigurationError("evaluate(): no data; pass a dataset, or valid_dataset to the trainer")
        meters = Meters()
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        dataset = Subset(dataset, order.tolist()) if self.decisions else dataset
        with self._averaged(), self._within_targets(), self.searched.as_found(settled=self._is_settled):
            mine = even_batches(dataset, self.batch_size, self.processes.rank, self.processes.count)
            for inputs, target in mine:
                inputs, target = self._to_device(inputs), self._to_device(target)
                with self.fabric.autocast():
                    output = self.model(inputs)
                    loss = self.loss(output, target)
                meters.add({"loss": loss, **self._measured(output, target)}, weight=len(target))
        return self.processes.averages(meters)

    def export(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        budget: Mapping[str, float] | None = None,
        best: bool = True,
    ) -> dict[str, Any]:
        """The found architecture as label -> decision, and as a JSON file if ``path`` is given.

        Argmax of every choice, or what the masks keep; with ``budget`` (cost name -> limit) the most probable choices
        that keep it, exactly. ``best=False``: of the network as it is now, where a trainer keeps its best epoch. The
        network is rebuilt and compared with the searched one first; if they differ, ExportError says where and nothing
        is written. Of several processes, the first one writes the file, and all have to call it.
        """
        with self._as_kept(best, budget), self._averaged():
            choices = self.searched.decide(self._limits(budget))
            verified_fixed(self.model, choices, self._examples())
            if path is not None and self.is_first_process:
                costs = {name: self.cost_model(name).of(choices) for name in ("params", *self.searched.names)}
                created_by = {
                    "library": f"oneshot-nas {library_version()}",
                    "trainer": type(self).__name__,
                    "seed": self.seed,
                    "budget": dict(budget or {}),
                    "targets": self.targets.by_cost,
                    **self.costs.facts(),
                }
                write_arch(path, self.model, choices, costs=costs, created_by=created_by)
            if path is not None:
                self.processes.wait()  # for the file, which is there for all of them from now on
            return arch_of(self.model, choices)

    def export_model(self, *, budget: Mapping[str, float] | None = None, best: bool = True) -> nn.Module:
        """The found architecture as a plain network with the trained weights, compared with the searched one.

        Its BatchNorm statistics are the searched one's too, which mix all paths of choices unless a fine-tuning or
        ``SPOSTrainer`` has made them its own: ``recalibrate_(network, batches)`` before it is used as it is.
        """
        with self._as_kept(best, budget), self._averaged():
            return verified_fixed(self.model, self.searched.decide(self._limits(budget)), self._examples())

    def report(self, *, budget: Mapping[str, float] | None = None, best: bool = True) -> SearchReport:
        """The found network's costs: target, prediction and, for a latency of this machine, a measurement.

        ``budget`` as in ``export``; without one, targets are what the costs were compared with in the search. The
        rebuilt network is timed on the CPU, by the runtime and with the threads that the latency was measured with.
        """
        with self._as_kept(best, budget), self._averaged():
            choices = self.searched.decide(self._limits(budget))
            plain = verified_fixed(self.model, choices, self._examples())
            targets = budget or self._cost_references()
            rows = []
            for name in dict.fromkeys(("params", *self.searched.names, *targets)):
                cost, timing = self.cost_model(name), None
                if name == "latency_ms" and self.costs.runtime is not None:
                    runtime, threads = self.costs.runtime
                    args = tuple(tensor.cpu() for tensor in self.searched.example())
                    timing = time_module(plain.cpu(), args, runtime=runtime, threads=threads)
                rows.append(ReportRow(name, cost.unit, targets.get(name), cost.of(choices), timing))
            return SearchReport(arch_of(self.model, choices), tuple(rows), self.costs.notes())

    @property
    def is_first_process(self) -> bool:
        """Whether this process is the one that writes files; there is one more than that only with ``devices``."""
        return self.processes.is_first

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that ``resume`` needs into one file, atomically. Of several processes, all have to call it.

        TrainingDivergedError, and nothing is written, after a step whose loss was no number.
        """
        self._finite.look()
        self.processes.launch()
        of_processes = self._of_processes or self.processes.gathered({"meters": self._meters.state_dict()})
        if self.is_first_process:
            self._write(Path(path), of_processes)
        self.processes.wait()  # for the file, which is there for all of them from now on

    def _write(self, path: Path, of_processes: Sequence[Mapping[str, Any]]) -> None:
        if self._log is not None:
            self._log.sync()
        state = {
            "trainer": type(self).__name__,
            "space": fingerprint(self.model),
            "settings": self._settings(),
            "step": self.step,
            "arch_batches": self.arch_batches,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "arch_optimizer": self.arch_optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "generator": self.generator.get_state(),
            "processes": list(of_processes),
            "history": self.history,
            "argmax": self._argmax,
            "log_size": self._log_size if self._log is None else self._log.size,
            "latency_table": None if self.latency_table is None else asdict(self.latency_table),
            "ended": dict(self._ended),
            "finetune_optimizer": self.finetune_optimizer.state_dict(),
            "targets": self.targets.state_dict(),
            "progress": self._progress,
            "holds_kept": self._holds_kept,
            "regularizers": [part.state_dict() for part in (*self._of_weights, *self._of_costs)],
            "average": None if self.average is None else self.average.state_dict(),
            "scaler": self.scale.state_dict(),
            "removed": self.searched.removed(),
            "own": self._own_state(),
        }
        write_checkpoint(path, state)

    def resume(self, path: str | os.PathLike[str]) -> None:
        """Continue from a checkpoint file, or from the last one of a folder, at the next ``train()``.

        A file that is damaged, or of another model or setting, is a CheckpointError and nothing is changed.
        """
        state = self._read(path, own=True)
        self._take(state)
        self.arch_optimizer.load_state_dict(state["arch_optimizer"])
        if self.finetune_optimizer is not self.optimizer:
            self.finetune_optimizer.load_state_dict(state["finetune_optimizer"])
        self.targets.load_state_dict(state["targets"])
        for part, of_part in zip((*self._of_weights, *self._of_costs), state["regularizers"], strict=True):
            part.load_state_dict(of_part)
        self._load_own_state(state["own"])

    def _read(self, path: str | os.PathLike[str], *, own: bool) -> dict[str, Any]:
        """A checkpoint that fits; ``own``: also in what concerns the search."""
        state = read_checkpoint(path)
        where = str(path)
        if state["trainer"] != type(self).__name__ or state["space"] != fingerprint(self.model):
            raise CheckpointError(
                f"{where}: made by {state['trainer']} for search space {state['space']}, this is "
                f"{type(self).__name__} with {fingerprint(self.model)}"
            )
        there, here = state["settings"], self._settings() if own else self._shared_settings()
        different = {key: (there.get(key), value) for key, value in here.items() if there.get(key) != value}
        if different:
            text = ", ".join(f"{k} {was!r} there and {now!r} here" for k, (was, now) in different.items())
            raise CheckpointError(f"{where}: made with other settings: {text}")
        self._check_parts(state, self._held_without(state["removed"], where), where, own)
        self._read_from = where
        return state

    def _held_without(self, removed: Mapping[str, Any], where: str) -> _Held:
        """The model and its optimizers, or copies of them from which the same has been taken out."""
        held = _Held(self.model, *self._optimizers)
        if removed == self.searched.removed():
            return held
        held = copy.deepcopy(held)
        try:
            self.searched.remove_(held.model, removed, list({id(o): o for o in held[1:]}.values()))
        except (ArchMismatchError, ConfigurationError, TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: removed: {error}") from error
        return held

    def _check_parts(self, state: Mapping[str, Any], held: _Held, where: str, own: bool) -> None:
        """CheckpointError unless all that is taken from a checkpoint fits this trainer: then nothing can fail."""
        check_fits(state["model"], held.model, f"{where}: model")
        check_optimizer(state["optimizer"], held.optimizer, f"{where}: optimizer")
        check_argmax(state["argmax"], argmax_choices(held.model), f"{where}: argmax")
        check_history(state["history"], [f"{name}_hard" for name in self.targets.by_cost], f"{where}: history")
        if len(state["processes"]) != self.fabric.world_size:
            raise CheckpointError(f"{where}: of {len(state['processes'])} processes, here are {self.fabric.world_size}")
        followed = None
        if self.average is not None:
            names = [name for name in self.average.averages if name in held.model.state_dict()]
            tensors = held.model.state_dict()
            followed = {"updates": 0, "averages": {name: tensors[name] for name in names}}
        for name, mine in (("average", followed), ("scaler", self.scale.state_dict())):
            if mine is not None:
                check_like(state[name] or {}, mine, f"{where}: {name}")
        parts = (*self._of_weights, *(self._of_costs if own else ()))
        n = len(state["regularizers"])
        if n < len(parts) or (own and n != len(parts)):
            raise CheckpointError(f"{where}: regularizers: states of {n}, here are {len(parts)}")
        for k, (part, of_part) in enumerate(zip(parts, state["regularizers"], strict=False)):
            check_regularizer(of_part, part.state_dict(), f"{where}: regularizers[{k}]")
        if own:
            check_optimizer(state["arch_optimizer"], held.arch_optimizer, f"{where}: arch_optimizer")
            check_optimizer(state["finetune_optimizer"], held.finetune_optimizer, f"{where}: finetune_optimizer")
            check_targets_state(state["targets"], list(self.targets.by_cost), f"{where}: targets")
            self._check_own_state(state["own"], held.model, f"{where}: own")

    def _take(self, state: Mapping[str, Any]) -> None:
        """All of a checkpoint but what is of the search, or of what comes after it."""
        self._finite.forget()
        if state["latency_table"] is not None and self.costs.measures:
            self.searched.take_table(LatencyTable(**state["latency_table"]))
        if state["removed"] != self.searched.removed():
            self.searched.remove_(self.model, state["removed"], self._held_by())
            self._follow_model({})
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self._of_processes = state["processes"]
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.scale.load_state_dict(state["scaler"])
        self.step, self.arch_batches = state["step"], state["arch_batches"]
        self.history, self._argmax = list(state["history"]), dict(state["argmax"])
        self._scheduler_state = state["scheduler"]
        self._log_size = state["log_size"]
        self._ended = dict(state["ended"])
        self._phase_of_step = self.history[-1]["phase"] if self.history else "warmup"
        self._holds_kept = state["holds_kept"]
        self._progress_before = state["progress"]

    @property
    def latency_table(self) -> LatencyTable | None:
        """The table behind 'latency_ms', once it has been read or measured."""
        return self.costs.table

    def cost_model(self, name: str) -> Priced:
        """A cost of this search model by name: one that is counted, ``'peak_memory'``, or one the trainer was given."""
        return self.searched.cost_model(name)

    def _measured_once(self, runtime: str) -> LatencyTable:
        (example,) = self.searched.example()
        return self.processes.from_first(lambda: measure_table(self.model, example, runtime=runtime))

    # ---- what a concrete trainer says --------------------------------------------------------------------------

    @abstractmethod
    def _search_step(self, batch: Any) -> None:
        """One step of the search phase on a batch of the weight split."""

    @abstractmethod
    def _weight_step(self, batch: Any) -> None:
        """One step of the weights alone, in the warm-up and the fine-tuning."""

    @property
    def _trains_on_arch_part(self) -> bool:
        """Whether there are steps on batches of the part of the data that is for the architecture."""
        return True

    def _cost_references(self) -> Mapping[str, float]:
        """What these costs are compared with, in their units."""
        return self.targets.by_cost

    def _check_run(self) -> None:
        """Raise for a plan that cannot work, with everything known but before the first step."""

    def _enter_phase(self, phase: str) -> None:
        """What a phase begins with; it may be done twice, when a run is taken up exactly there."""

    def _made_smaller(self, phase: str) -> dict[str, float]:
        """At the end of an epoch, before it is looked at: the model may lose what is not searched any more."""
        return {}

    def _after_epoch(self, phase: str) -> None:
        """Look at ``history`` at the end of an epoch; may call ``_end_phase``."""

    def _after_run(self) -> None:
        """What is done when all phases are over."""

    def _limits(self, budget: Mapping[str, float] | None) -> dict[str, float]:
        """A budget with the targets of the run; none without a budget, as the targets are kept already."""
        targets = self.targets.by_cost
        return {} if not budget else {**targets, **{k: min(v, targets.get(k, v)) for k, v in budget.items()}}

    def _as_kept(self, best: bool, budget: Mapping[str, float] | None) -> AbstractContextManager[None]:
        """Inside, the model is as in the epoch that is kept, if ``best`` and one is; else within the targets."""
        # A budget is met by choices alone, together with the targets, and of any that are the most probable.
        is_decided = budget and not self.searched.has_masks
        return self.targets.kept(1.0) if best and not is_decided else nullcontext()

    def _own_settings(self) -> dict[str, Any]:
        """What else must be the same when a run is taken up again."""
        return {}

    def _own_state(self) -> dict[str, Any]:
        """What else a checkpoint holds, tensors and plain data."""
        return {}

    def _check_own_state(self, state: Mapping[str, Any], model: nn.Module, where: str) -> None:
        """CheckpointError unless it is what ``_own_state`` returns, and ``_load_own_state`` can take over.

        ``model``: the searched one, without what has been taken out of it.
        """
        record()(state, where)

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        """Take over what ``_own_state`` returned."""

    # ---- pieces of a step --------------------------------------------------------------------------------------

    def _shrink(self) -> int:
        """Take out of the model what the architecture of now has not; how many units and candidates went."""
        averages = {} if self.average is None else self.average.averages
        state, archs = self._kept_state()
        count = self.searched.shrink_(self._held_by(), [averages, state], archs)
        if count:
            self._follow_model(averages)
        return count

    def _kept_state(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """The state of the epoch that is kept, if one is, and its architecture."""
        return {}, []

    def _held_by(self) -> list[Optimizer]:
        """The optimizers, each once."""
        return list({id(optimizer): optimizer for optimizer in self._optimizers}.values())

    def _follow_model(self, averages: Mapping[str, Tensor]) -> None:
        """The model has become smaller, in place."""
        self.searched.follow_model()
        self.weights, self.norms = weight_parameters(self.model), normalisations(self.model)
        self._argmax = argmax_choices(self.model)
        if self.average is not None:
            self.average.follow(self.model, averages)

    def _set(self, sampler: Sampler) -> None:
        set_sampler(self.decisions, sampler)
        draw(self.decisions, self.generator)

    def _forward(
        self, batch: Any, loss: Callable[[Any, Any], Tensor], *, again: bool = False
    ) -> tuple[Tensor, Any, Any]:
        """Loss, output and target; ``again``: the batch will be used once more, and a network may write into it."""
        inputs, target = pytree.tree_map_only(Tensor, torch.clone, batch) if again else batch
        inputs, target = self._to_device(inputs), self._to_device(target)
        with self.fabric.autocast():
            output = self.model(inputs)
            return loss(output, target), output, target

    def _backward(
        self,
        batch: Any,
        loss: Callable[[Any, Any], Tensor],
        *,
        again: bool = False,
        before_last: Callable[[Tensor], None] | None = None,
        evaluates_others: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Add the gradients of the mean loss of a batch, part by part; the loss, and what is measured of the batch.

        ``before_last``: called with the loss when all of the forward passes are done, and not all graphs are gone.
        ``evaluates_others``: candidates may run in the backward pass, for the gradient of their gate alone.
        """
        total: Tensor | None = None
        measured: dict[str, Tensor | float] = {}
        parts = parts_of_batch(batch, self.accumulate)
        for i, (share, part) in enumerate(parts, start=1):
            of_part, output, target = self._forward(part, loss, again=again)
            of_part = of_part if share == 1.0 else of_part * share
            total = of_part.detach() if total is None else total + of_part.detach()
            for key, value in self._measured(output, target).items():
                measured[key] = value if share == 1.0 else value * share + measured.get(key, 0.0)
            if i == len(parts) and before_last is not None:
                before_last(total)
            del output
            with frozen_statistics(self.norms) if evaluates_others else nullcontext():
                self.fabric.backward(of_part)
        assert total is not None
        return total, measured

    def _ready(self, optimizers: Sequence[Optimizer], losses: Mapping[str, Tensor], *, moves_statistics: bool) -> bool:
        """Make the gradients those of all processes, in full scale; False if they overflow and the step is left out.

        ``losses``: what they are of, by name. One that is no number anywhere ends the run everywhere, before anything
        moves. ``moves_statistics``: with them, the running statistics: every process has seen other samples.
        """
        held = {name: loss.detach().clone() for name, loss in losses.items()} if self.processes.count > 1 else losses
        if self.processes.count > 1:
            parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
            self.processes.fill_gradients(parameters)
            gradients = [p.grad for p in parameters if p.grad is not None]
            self.processes.mean_([*gradients, *held.values(), *(self._statistics() if moves_statistics else ())])
        self._finite.add(self.step, held)
        is_ready = self.scale.unscale_(optimizers)
        if self.scale.scaler is not None:
            self._note({"overflows": float(not is_ready)})
        return is_ready

    def _statistics(self) -> list[Tensor]:
        return [buffer for norm in self.norms for buffer in norm.buffers() if buffer.is_floating_point()]

    def _update_weights(self, batch: Any, sampler: Sampler | None = None) -> None:
        """One step of the weights on the paths of ``sampler``, if given; what did not run is not touched."""
        if sampler is not None:
            self._set(sampler)
        self._weight_optimizer.zero_grad(set_to_none=True)
        loss, measured = self._backward(batch, self.loss)
        if self._ready([self._weight_optimizer], {"loss": loss}, moves_statistics=True):
            noted = self._regularize_weights(loss)
            self._step_weights()
            self._note({"loss": loss, **noted, **measured})

    def _regularize_weights(self, loss: Tensor) -> dict[str, Tensor | float]:
        """Add the gradients of the weights' regularizers to those there are; what to note of these."""
        if not self._of_weights:
            return {}
        noted: dict[str, Tensor | float] = {}
        total = torch.zeros_like(loss.detach())
        moved = [weight for weight in self.weights if weight.grad is not None]
        for i, part in enumerate(self._of_weights):
            value = part(self._network, self.epoch, sum(self.phases.values()))
            total = total + value.detach()
            again = sum(type(other) is type(part) for other in self._of_weights[:i])
            number = f"_{again + 1}" if again else ""
            noted.update({f"{name}{number}_value": at for name, at in part.last.items()})
            if value.requires_grad:
                gradients = torch.autograd.grad(value, moved, allow_unused=True)
                noted[f"{type(part).__name__}{number}_gradient_share"] = add_gradients(moved, gradients)
        return {**noted, "weight_penalty_share": total / (loss.detach() + total).clamp_min(1e-30)}

    def _step_weights(self) -> None:
        """Move the weights by the gradients that they have."""
        self.clip(self._weight_optimizer, "weights")
        self._weight_optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        if self.average is not None:
            self.average.update()

    def _averaged(self) -> AbstractContextManager[None]:
        """Inside, the weights are their moving averages, if these are kept."""
        return nullcontext() if self.average is None else self.average.swapped()

    def _next_arch_batch(self) -> Any:
        self.arch_batches += 1
        return next(self._arch_iterator)

    def _after_arch_step(self) -> None:
        after_step(self.decisions)

    @property
    def _progress(self) -> float:
        """The share of the search that is done."""
        if self.split is None:  # the run has not begun, here
            return self._progress_before
        done = self.search_step / max(self.phases["search"] * self.steps_per_epoch, 1)
        return min(max(done, 0.0), 1.0)

    def _terms_of(self, costs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the regularizers of costs add to the loss at these costs; their epochs are those of the search."""
        if not self._of_costs:
            return {}
        epoch = max(self.epoch - self.warmup_epochs, 0)
        return Sum(self._of_costs).terms(CostsOfStep(self.searched, costs), epoch, self.num_epochs)

    def _add_targets(self, pull: Pull | None, learning: Sequence[nn.Parameter]) -> Tensor | None:
        """Add what targets pull to the gradients of the task; their share, None without targets."""
        if pull is None:
            return None
        norm = torch.stack([p.grad.abs().sum().double() for p in learning if p.grad is not None]).sum()
        return self.targets.add(pull, learning, float(norm))

    def _move_architecture(self) -> None:
        """Move alphas and masks by the gradients that they have, to the same place in all processes."""
        self.clip(self.arch_optimizer, "arch")
        self.arch_optimizer.step()

    def _settle(self) -> None:
        """Before a step of the architecture."""
        self.targets.settle(self.arch_optimizer, self._first_lrs[id(self.arch_optimizer)], self._progress)

    def _keep_targets(self, every: int = 1) -> None:
        """After a step of the architecture, of which there is one every so many steps of the search."""
        if self.targets:
            steps = self.phases["search"] * self.steps_per_epoch / every
            self.targets.after_step(self._progress, steps=max(steps, 1))
        # Their gradients are the same, but a GPU may add up a cost in another order.
        self.processes.share([p for group in self.arch_optimizer.param_groups for p in group["params"]])

    def _within_targets(self) -> AbstractContextManager[None]:
        """Inside, the architecture keeps the targets; one that was chosen before the fine-tuning stays as it is."""
        return nullcontext() if self._holds_kept else self.targets.kept(self._progress)

    def _note(self, values: Mapping[str, Tensor | float]) -> None:
        self._meters.add(values)
        self._latest.update({name: v.detach() if isinstance(v, Tensor) else v for name, v in values.items()})

    def _measured(self, output: Any, target: Any) -> dict[str, Tensor | float]:
        if self.metrics is None:
            return {}
        with torch.no_grad():
            found = self.metrics(output.detach() if isinstance(output, Tensor) else output, target)
        return dict(found) if isinstance(found, Mapping) else {"metric": found}

    def _diverged(self, step: int, values: Mapping[str, float]) -> None:
        """Called for a step with a loss that is no number."""
        last = None if self.checkpoint_dir is None else self.checkpoint_dir / LAST
        where = f"resume({str(last)!r})" if last is not None and last.exists() else "none was written"
        text = ", ".join(f"{name} = {value}" for name, value in values.items())
        raise TrainingDivergedError(
            f"step {step} ({self._phase_of_step}, epoch {step // self.steps_per_epoch}): {text}. "
            f"Last good checkpoint: {where}. Lower the learning rate, or look at the data of this step"
        )

    # ---- where in the run we are -------------------------------------------------------------------------------

    @property
    def steps_per_epoch(self) -> int:
        """Weight batches of an epoch; known once the data are split."""
        if self.split is None:
            raise ConfigurationError("the number of steps is known once train() has split the data")
        return len(self.split.weight) // (self.batch_size * self.processes.count)

    @property
    def phases(self) -> dict[str, int]:
        """Phase -> its epochs, as planned or, where one is over, as they were."""
        planned = {"warmup": self.warmup_epochs, "search": self.num_epochs, "finetune": self.finetune_epochs}
        return {phase: self._ended.get(phase, epochs) for phase, epochs in planned.items()}

    @property
    def total_steps(self) -> int:
        return sum(self.phases.values()) * self.steps_per_epoch

    @property
    def epoch(self) -> int:
        """Epoch of the whole run, the warm-up included."""
        return self.step // self.steps_per_epoch

    @property
    def phase(self) -> str:
        phases = self.phases
        if self.epoch < phases["warmup"]:
            return "warmup"
        is_last = phases["finetune"] == 0 or self.epoch < phases["warmup"] + phases["search"]
        return "search" if is_last else "finetune"

    @property
    def search_step(self) -> int:
        """Steps done in the search phase, negative during the warm-up."""
        return self.step - self.warmup_epochs * self.steps_per_epoch

    # ---- the run -----------------------------------------------------------------------------------------------

    def _run(self, last_step: Callable[[], int]) -> None:
        """Train up to that step; the end of the run is what comes after the last one."""
        with user_state_kept(), ExitStack() as stack:
            seed_global_state(self.seed)
            weight_batches, arch_batches = self._prepare()
            stack.enter_context(self._running())
            stack.enter_context(worker_deaths_named())
            loaded = stack.enter_context(closing(weight_batches.iterate(self.step)))
            batches = moved(loaded, self.fabric)
            if arch_batches is not None:
                loaded = stack.enter_context(closing(arch_batches.iterate(self.arch_batches)))
                self._arch_iterator = moved(loaded, self.fabric)
            self._enter_run()
            self._end_open_epoch()
            while self.step < last_step():
                self._epoch(batches)
            if self.step >= self.total_steps:
                self._after_run()
                if self._log is not None:
                    self._log.table(self.step, self.history[-1:])
            self._stop(self.processes.largest(self._stop_signal))

    def _prepare(self) -> tuple[BatchStream, BatchStream | None]:
        dataset, arch_dataset = self.dataset, self.arch_dataset
        if dataset is None or arch_dataset is None:
            raise ConfigurationError(
                "train(): dataset=None; give the training set as dataset=, it is split into a part for the weights "
                "and a part for the architecture"
            )
        self.processes.launch()
        if self._of_processes is not None:
            self._meters.load_state_dict(self._of_processes[self.processes.rank]["meters"])
            self._of_processes = None
        table = None if self.latency_table is None else str(self.latency_table.by_place)
        self.processes.check_alike({"space": fingerprint(self.model), "latency table": table, **self._settings()})
        self.processes.share(list(self.model.state_dict().values()))
        if self.average is not None and self.step == 0:
            self.average.restart()  # with the weights of the first process, or those loaded meanwhile
        n, n_arch = len(dataset), len(arch_dataset)  # type: ignore[arg-type]
        if n != n_arch:
            raise ConfigurationError(
                f"dataset has {n} samples and arch_dataset {n_arch}; it must be the same samples in the same order"
            )
        self.split = self._split(dataset, n)
        common: dict[str, Any] = {
            "batch_size": self.batch_size,
            "workers": self.workers,
            "rank": self.fabric.global_rank,
            "world_size": self.processes.count,
        }
        weight_batches = BatchStream(dataset, self.split.weight, seed=mix_seed(self.seed, 5), **common)
        arch_batches = None
        if self.split.arch and self._trains_on_arch_part:
            arch_batches = BatchStream(arch_dataset, self.split.arch, seed=mix_seed(self.seed, 6), **common)
        check_one_batch(self.model, self.loss, dataset)
        self.searched.check_export(self._examples())
        self._check_regularizers()
        self._check_run()
        self.fabric.to_device(self.model)
        for optimizer in self._optimizers:
            to_device_of_weights(optimizer)
        self._calibrate_regularizers()
        if self.checkpoint_dir is not None and self.is_first_process:
            self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.checkpoint_dir)
        return weight_batches, arch_batches

    def _check_regularizers(self) -> None:
        """Errors of targets and regularizers, with everything known but before the first step."""
        self.targets.check()
        for part in self._of_costs:
            part.check(CostsOfStep(self.searched, {}))
        for part in self._of_weights:
            part.check(self._network)

    def _calibrate_regularizers(self) -> None:
        """Let strengths that are relative to the loss know it."""
        if self.step == 0 and self._of_weights:
            assert self.dataset is not None
            samples = Subset(self.dataset, range(min(self.batch_size, len(self.dataset))))  # type: ignore[arg-type]
            batch = next(even_batches(samples, self.batch_size))

            def closure() -> Tensor:
                return self._forward(batch, self.loss, again=True)[0]

            for part in self._of_weights:
                part.calibrate(self._network, closure)
                part.load_state_dict(self.processes.from_first(part.state_dict))

    def _split(self, dataset: Dataset[Any], n: int) -> Split:
        """What trains the weights and what trains the architecture; without ``arch_fraction``, all of it both."""
        seed = mix_seed(self.seed, 4) % 2**32
        if self.arch_fraction is None:
            return Split(tuple(range(n)), (), seed, 0)
        return stratified_split(targets_of(dataset), self.arch_fraction, seed, n)

    def _enter_run(self) -> None:
        """Schedulers, either fresh or as they were left."""
        scheduler, self._scheduler_state = self._scheduler_state, None
        if not self._at_phase_start():
            groups = self._weight_optimizer.param_groups
            lrs = [group["lr"] for group in groups]
            self._build_scheduler()
            if self.scheduler is not None and scheduler is not None:
                check_scheduler(scheduler, self.scheduler.state_dict(), self.step, f"{self._read_from}: scheduler")
                self.scheduler.load_state_dict(scheduler)
            for group, lr in zip(groups, lrs, strict=True):
                group["lr"] = lr

    @property
    def _weight_optimizer(self) -> Optimizer:
        return self.finetune_optimizer if self.phase == "finetune" else self.optimizer

    def _at_phase_start(self) -> bool:
        phases = self.phases
        starts = [0, phases["warmup"]]
        if phases["finetune"]:
            starts.append(phases["warmup"] + phases["search"])
        return self.step in [start * self.steps_per_epoch for start in starts]

    def _begin_phase(self, phase: str) -> None:
        phases = self.phases
        for earlier in list(phases)[: list(phases).index(phase)]:
            self._end_phase(earlier, phases[earlier])
        self._enter_phase(phase)
        self.targets.forget_step()
        if phase == "finetune":
            self.finetune_optimizer.state.clear()
            if self.average is not None:
                self.average.restart()
        self._build_scheduler()

    def _end_phase(self, phase: str, epochs: int) -> None:
        """The phase is over after so many epochs of it, whatever was planned."""
        self._ended[phase] = epochs

    def _build_scheduler(self) -> None:
        optimizer, factory = self._weight_optimizer, self._factories[self.phase]
        for group, lr in zip(optimizer.param_groups, self._first_lrs[id(optimizer)], strict=True):
            group.pop("initial_lr", None)
            group["lr"] = lr
        n_steps = self.phases[self.phase] * self.steps_per_epoch
        self.scheduler = None if factory is None else factory(optimizer, n_steps)

    def _epoch(self, batches: Iterator[Any]) -> None:
        """The rest of the current epoch."""
        epoch, phase = self.epoch, self.phase
        self._phase_of_step = phase
        if self._at_phase_start():
            self._begin_phase(phase)
        if self.step % self.steps_per_epoch == 0:
            self._meters = Meters()
        self.model.train()
        step_of = self._search_step if phase == "search" else self._weight_step
        last = sum(self.phases.values()) - 1
        line = Progress(self.total_steps, f"{phase}, epoch {epoch} of 0..{last}", self.step, self._shows())
        with closing(line):
            while self.epoch == epoch:
                self._latest = {}
                batch = next(batches)
                seed_global_state(self.seed, self.step, self.processes.rank)
                step_of(batch)
                self.step += 1
                line.update(self._progress_values)
                if self.log_frequency and self.step % self.log_frequency == 0:
                    self._finite.look()
                    self._log_values("step", phase, epoch, self._means(self._latest))
                if self.epoch != epoch:
                    self._end_epoch(phase, epoch)
                self._maybe_checkpoint(at_epoch_end=self.epoch != epoch)

    def _end_epoch(self, phase: str, epoch: int) -> None:
        self._finite.look()
        self.processes.check_same(list(self.model.parameters()))
        now = argmax_choices(self.model)
        averages = self.processes.averages(self._meters)
        values: dict[str, Any] = {**averages, **self.searched.numbers(self._argmax, now)}
        for name, (soft, hard) in self.searched.soft_and_hard().items():
            values[f"{name}_soft"], values[f"{name}_hard"] = soft, hard
        if self._log is not None:
            self._log.probabilities(self.step, self.searched.shares())
        if phase == "search":
            self.targets.after_epoch(self._progress)
        smaller = self._made_smaller(phase)
        if any(smaller.values()):
            now = argmax_choices(self.model)  # places of options that are left
        values.update(smaller)
        with self._within_targets():
            values.update(self.targets.values({name: values[f"{name}_hard"] for name in self.targets.by_cost}))
            if self.valid_dataset is not None:
                values.update({f"valid_{name}": value for name, value in self.evaluate().items()})
            self._argmax = now
            self.history.append({"phase": phase, "epoch": epoch, "step": self.step, **values})
            self._log_values("epoch", phase, epoch, values)
            self._after_epoch(phase)

    def _end_open_epoch(self) -> None:
        """An earlier ``train()`` may have been interrupted between the last step of an epoch and its record."""
        ended = self.history[-1]["step"] if self.history else 0
        if self.step > ended and self.step % self.steps_per_epoch == 0:
            self._end_epoch(self._phase_of_step, self.epoch - 1)
            self._maybe_checkpoint(at_epoch_end=True)

    def _means(self, values: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Over all processes."""
        meters = Meters()
        meters.add(values)
        return self.processes.averages(meters)

    def _log_values(self, kind: str, phase: str, epoch: int, values: Mapping[str, Any]) -> None:
        if self._log is not None:
            self._log.values(kind, phase, epoch, self.step, values)

    def _progress_values(self) -> dict[str, float | str]:
        shown: dict[str, float | str] = dict(self._meters.averages())
        shown.update(self.searched.numbers(self._argmax, argmax_choices(self.model)))
        references = self._cost_references()
        for name, (soft, hard) in self.searched.soft_and_hard().items():
            reference = f", reference {references[name]:.4g}" if name in references else ""
            shown[name] = f"{soft:.4g} soft, {hard:.4g} hard{reference}"
        return shown

    def _maybe_checkpoint(self, *, at_epoch_end: bool) -> None:
        due = at_epoch_end or (self.checkpoint_every is not None and self.step % self.checkpoint_every == 0)
        if self.checkpoint_dir is None:
            return
        if due or self.processes.count == 1 or self.step % _AGREE_EVERY == 0:
            stop = self.processes.largest(self._stop_signal)  # which one of them may have got
            if due or stop:
                self.save(self.checkpoint_dir / LAST)
            self._stop(stop)

    def _stop(self, number: int) -> None:
        """Leave, if there was a signal of that number; all processes together."""
        if number:
            # One that ends with an error makes the launcher kill the first one, which says how it ended.
            raise SystemExit(128 + number if self.is_first_process else 0)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Logs open, SIGTERM caught, and the run's random state kept for the next train()."""
        writes = self.checkpoint_dir is not None and self.is_first_process
        self._stop_signal = 0
        with ExitStack() as stack:
            stack.callback(self._leave_run)
            for optimizer in {id(o): o for o in (self.optimizer, self.finetune_optimizer)}.values():
                for part in self._of_weights:
                    part.attach(self._network, optimizer)
                    stack.callback(part.detach, optimizer)
            if writes and self.checkpoint_dir is not None:
                self._log = stack.enter_context(RunLog(self.checkpoint_dir, size=self._log_size, step=self.step))
            if self.checkpoint_dir is not None:
                stack.enter_context(signal_handled(signal.SIGTERM, self._request_stop))
            stack.enter_context(recomputed(self.model, self.checkpoint_blocks))
            self.compilations = stack.enter_context(compiled(self.model, self.compile))
            yield

    def _leave_run(self) -> None:
        self._scheduler_state = None if self.scheduler is None else self.scheduler.state_dict()
        self._log_size = 0 if self._log is None else self._log.size
        self._log = None

    def _request_stop(self, number: int) -> None:
        self._stop_signal = number

    # ---- small things ------------------------------------------------------------------------------------------

    def _examples(self) -> list[tuple[Any, ...]]:
        return example_inputs(self.model, self.dataset, self.searched.example())

    def _shared_settings(self) -> dict[str, Any]:
        """What must be the same in a warm-up that is taken over."""
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "arch_fraction": self.arch_fraction,
            "warmup_epochs": self.warmup_epochs,
            "world_size": self.fabric.world_size,
            "accumulate": self.accumulate,
            "grad_clip": self.clip.limits,
            "ema_decay": None if self.average is None else self.average.decay,
            "optimizer": type(self.optimizer).__name__,
            "parameters per group": self._group_sizes,
            "regularizers of weights": [part.settings() for part in self._of_weights],
        }

    def _settings(self) -> dict[str, Any]:
        """What must be the same when a run is taken up again."""
        return {
            **self._shared_settings(),
            "costs": self.searched.fingerprint(),
            "targets": self.targets.by_cost,
            "regularizers of costs": [part.settings() for part in self._of_costs],
            **self._own_settings(),
        }

    @property
    def _is_settled(self) -> bool:
        """Whether the running statistics are of the found network alone."""
        return self._phase_of_step == "finetune"

    def _shows(self) -> bool | None:
        return self.progress if self.processes.is_first else False

    def _to_device(self, data: Any) -> Any:
        return self.fabric.to_device(data)
