"""SPOS (arXiv 1904.00420): a supernet trained on uniform single paths, then evolution under hard limits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, Subset

from ..cost import COUNTED, Cost, CostSpec
from ..cost.hardware import Hardware
from ..data import BatchStream, Split, mix_seed
from ..errors import CheckpointError, ConfigurationError, TrainingDivergedError
from ..export import arch_of
from ..files import atomic_write
from ..graph import evaluated
from ..loggers import Progress
from ..mutables import OnePath, UniformPath
from ..regularizers import Regularizer
from .arguments import SharedArguments, known_arguments
from .base import Trainer
from .batches import even_batches
from .checkpoint_kinds import (
    any_number,
    generator_state,
    index_below,
    list_of,
    mapping_of,
    optional,
    record,
    row_of,
    whole,
)
from .choices import Choices
from .costs import CostSources
from .evaluator import PathEvaluator, pinned
from .evolution import EvolutionarySearch, check_evolution
from .feasible import Candidate, FeasibleSpace, check_limits, ranked
from .random_search import RandomSearch
from .recalibration import recalibrate_, statistics_kept
from .regularized import parts_of
from .scored import ScoredChoices
from .selection import larger_is_better

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SPOSTrainer", "fair_paths"]

CANDIDATES = "candidates.json"


@final
class SPOSTrainer(Trainer):
    """Trains all paths of a network alike, then searches the best one by evolution, under hard limits.

    * Search epochs (and a warm-up, which only differs in its scheduler): every step trains one path, each option with
      probability 1/n: ``fairness='uniform'``. ``'strict'`` (FairNAS, arXiv 1907.01845, algorithm 1): with m the
      largest number of options of a decision, every step trains m paths on its batch, adds up their gradients and
      moves the weights once; each option of a decision with m options runs exactly once. Of a decision with n < m
      options each runs floor(m / n) or ceil(m / n) times, which ones more often is drawn anew in every step. A choice
      inside a candidate only runs where the candidate does. Modules that are on every path get the sum of m gradients.
    * Then, in the same ``train()``, evolution: up to ``population * generations`` architectures, all of them within
      ``limits`` and no two equal, are scored on the held-out part of the training set, with BatchNorm statistics
      recomputed for each on batches of the other part. No weight changes any more.

    The found architecture is the best one that was scored. Its options get alpha 1 and all others 0, so that argmax,
    ``evaluate``, ``export`` and ``report`` mean it; with ``budget``, the best scored one that also keeps the budget.
    ``export_model`` returns it with recomputed BatchNorm statistics, if there is a ``dataset``; those of the search
    model are left as the found path's. All that were scored are in ``candidates`` and, with ``checkpoint_dir``, best
    first in ``candidates.json``; a checkpoint after every generation says where to go on. ``random_search`` is the
    baseline: as many architectures at random, by the same evaluator under the same limits.

    Scores of a supernet are good for ranking: train the found network on its own before reporting an accuracy.

    Args:
        model, loss, metrics, optimizer, dataset, cost, applied_hardware, missing, dummy_input, and all that is not
            named here: as in ``ProxylessTrainer``. Costs are followed; only limits decide.
        num_epochs: of uniform paths, before the evolution; with 0 there is no search at all.
        limits: cost name -> largest value of any architecture that is scored, for a cost of the run or a counted one:
            ``{'macs': 5e7}``. InfeasibleTargetError before the first step if nothing keeps them. ``targets``: the same.
        regularizer: of weights, in every weight step: ``L1``, ``GroupLasso``, or a sum of some.
        arch_fraction: share of ``dataset``, stratified and seeded, that is held out for the scores. ``arch_dataset``:
            the same samples in the same order with other transforms, for them: without augmentation, say.
        valid_dataset: evaluated after each epoch, on the first option of each choice as nothing is found yet.
        fairness: ``'uniform'`` or ``'strict'``.
        monitor: ``'loss'``, or one of the metrics: what candidates are compared by; ``monitor_mode``: ``'min'`` or
            ``'max'`` is better, by default ``'min'`` for the loss and ``'max'`` for a metric.
        population, generations, parents, mutation: as in ``EvolutionarySearch``.
        recalibration_samples: of the weights' part of the dataset, rounded up to whole batches; about 2,000 suffice.

    >>> from oneshot import LayerChoice
    >>> net = nn.Sequential(LayerChoice([nn.Linear(4, 4), nn.Identity()]), nn.Linear(4, 2))
    >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.arange(64) % 2)
    >>> trainer = SPOSTrainer(
    ...     net, loss=nn.CrossEntropyLoss(), metrics=None, dataset=data, num_epochs=2, batch_size=8, workers=0,
    ...     optimizer=torch.optim.SGD(net.parameters(), lr=0.1), device="cpu", dummy_input=(1, 4),
    ...     limits={"params": 10},
    ... )
    >>> history = trainer.train()
    >>> trainer.export(), len(trainer.candidates)  # Linear(4, 2) has 10, Linear(4, 4) 20 more: one keeps the limit
    ({'0': 1}, 1)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_epochs: int = 120,
        limits: Mapping[str, float] | None = None,
        targets: Mapping[str, float] | None = None,
        regularizer: Regularizer | None = None,
        fairness: Literal["uniform", "strict"] = "uniform",
        monitor: str = "loss",
        monitor_mode: Literal["min", "max"] | None = None,
        population: int = 50,
        generations: int = 20,
        parents: int = 10,
        mutation: float = 0.1,
        recalibration_samples: int = 2000,
        applied_hardware: Hardware | None = None,
        dummy_input: Sequence[int] = (1, 3, 224, 224),
        cost: str | Sequence[str] | Cost | CostSpec | Mapping[str, Any] | None = None,
        missing: Mapping[str, float] | None = None,
        arch_fraction: float = 0.2,
        **others: Unpack[SharedArguments],
    ) -> None:
        if fairness not in ("uniform", "strict"):
            raise ConfigurationError(f"fairness={fairness!r}: allowed are 'uniform' and 'strict'")
        if arch_fraction is None:
            raise ConfigurationError("arch_fraction=None: a part must be held out for the scores; 0.2 is the default")
        if not isinstance(recalibration_samples, int) or recalibration_samples < 1:
            raise ConfigurationError(
                f"recalibration_samples={recalibration_samples!r}: an integer of at least 1 is needed"
            )
        check_evolution(population, generations, parents, mutation)
        if limits and targets:
            raise ConfigurationError(f"limits={dict(limits)} and targets={dict(targets)}: they mean the same, give one")
        limits = limits or targets
        check_limits(limits or {}, "limits")
        _check_regularizer(regularizer)
        larger_is_better(monitor, monitor_mode)
        self._search: EvolutionarySearch | None = None
        self._values: list[dict[str, float]] = []
        self._searched_at = 0  # the step after which the scores were made
        self.choices = Choices(model, CostSources(cost, applied_hardware, missing), dummy_input, self._measured_once)
        known = sorted({*COUNTED, "peak_memory", *self.choices.names})
        unknown = [name for name in limits or {} if name not in known]
        if unknown:
            raise ConfigurationError(f"limits: unknown costs {unknown}; allowed are {known}, or what cost= names")
        super().__init__(
            ScoredChoices(self.choices, limits or {}, lambda: self.candidates, self._recalibrate),
            arch_optimizer=_still,
            num_epochs=num_epochs,
            arch_fraction=arch_fraction,
            regularizer=regularizer,
            **known_arguments("SPOSTrainer", others),
        )
        self.limits, self.fairness = dict(limits or {}), fairness
        self.monitor, self.monitor_mode = monitor, monitor_mode
        self.population, self.generations, self.parents, self.mutation = population, generations, parents, mutation
        self.recalibration_samples = recalibration_samples
        self._evaluator: PathEvaluator | None = None
        self._recalibration: list[Any] | None = None

    # ---- the supernet ------------------------------------------------------------------------------------------

    def _weight_step(self, batch: Any) -> None:
        if self.fairness == "uniform":
            self._update_weights(batch, UniformPath())
        else:
            self._fair_step(batch)

    @property
    def _trains_on_arch_part(self) -> bool:
        return False  # it is evaluated on

    def _search_step(self, batch: Any) -> None:
        self._weight_step(batch)

    def _fair_step(self, batch: Any) -> None:
        """One step of the weights by the summed gradients of paths on which every option runs."""
        paths = fair_paths({label: len(d.options) for label, d in self.decisions.items()}, self.generator)
        self._weight_optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        for path in paths:
            for label, decision in self.decisions.items():
                decision.set_sampler(OnePath(path[label]))
            loss, measured = self._backward(batch, self.loss, again=True)
            losses.append(loss)
            self._note({"loss": loss, **measured})
        mean = torch.stack(losses).mean()
        if self._ready([self._weight_optimizer], {"loss": mean}, moves_statistics=True):
            self._note(self._regularize_weights(loss))
            self._step_weights()

    # ---- the search --------------------------------------------------------------------------------------------

    @property
    def candidates(self) -> list[Candidate]:
        """Every architecture that was scored, in that order, as (label -> option, score)."""
        return [] if self._search is None else list(self._search.candidates)

    @property
    def evaluator(self) -> PathEvaluator:
        """An architecture -> its score with the weights of this supernet; the held-out part is scored on."""
        if self._evaluator is None:
            dataset, arch_dataset = self.dataset, self.arch_dataset
            if dataset is None or arch_dataset is None:
                raise ConfigurationError("evaluator: dataset=None; part of the training set is what is scored on")
            self._evaluator = PathEvaluator(
                self.model,
                loss=self.loss,
                metrics=self.metrics,
                dataset=Subset(arch_dataset, self._parts(dataset).arch),
                recalibrate_on=self._recalibration_batches(dataset),
                monitor=self.monitor,
                monitor_mode=self.monitor_mode,
                batch_size=self.batch_size,
                autocast=self.fabric.autocast,
            )
        return self._evaluator

    def random_search(self, evaluations: int | None = None, *, seed: int = 0) -> RandomSearch:
        """The baseline, done: as many random architectures as were scored here, by the same evaluator and limits."""
        search = RandomSearch(
            self.model,
            self.evaluator,
            evaluations=len(self.candidates) if evaluations is None else evaluations,
            costs={name: self.choices.cost_model(name) for name in self.limits},
            limits=self.limits,
            seed=seed,
        )
        search.run()
        return search

    def _after_run(self) -> None:
        if not self.num_epochs:
            return
        if self.average is not None:
            self.average.adopt()  # what is scored is what is exported
        if self._search is None or self._searched_at != self.step:
            self._search, self._values, self._searched_at = self._new_search(), [], self.step
        self._evolve(self._search)
        best = self._search.best
        if best is None:
            raise TrainingDivergedError(
                f"no score of {len(self._values)} architectures is a number: the supernet has diverged. Lower the "
                "learning rate"
            )
        with torch.no_grad():
            for label, decision in self.decisions.items():
                decision.alpha.zero_()[best.choices[label]] = 1
        self._recalibrate(best.choices)
        self._argmax = dict(best.choices)
        self._write_candidates()
        self._maybe_checkpoint(at_epoch_end=True)

    def _new_search(self) -> EvolutionarySearch:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, 8))
        return EvolutionarySearch(
            self._space(),
            generator,
            population=self.population,
            generations=self.generations,
            parents=self.parents,
            mutation=self.mutation,
        )

    def _space(self) -> FeasibleSpace:
        sizes = {label: len(d.options) for label, d in self.decisions.items()}
        return FeasibleSpace(sizes, {name: self.choices.cost_model(name) for name in self.limits}, self.limits)

    def _evolve(self, search: EvolutionarySearch) -> None:
        n_most = search.population * search.generations
        line = Progress(n_most, "evolution", len(search.candidates), self._shows())
        with closing(line):
            while (choices := search.ask()) is not None:
                # All processes score, as layers may talk to one another; the search is that of the first one.
                values = self.processes.from_first(self._scored(choices))
                self._values.append(values)
                search.tell(self.evaluator.score(values))
                line.update({"best": search.best.score} if search.best is not None else {})
                ends = not search.pending
                if ends:
                    self._log_generation(search)
                if ends or self.processes.largest(self._stop_signal):
                    self._maybe_checkpoint(at_epoch_end=True)

    def _scored(self, choices: Mapping[str, int]) -> Callable[[], dict[str, float]]:
        values = self.evaluator.values(choices)
        return lambda: values

    def _log_generation(self, search: EvolutionarySearch) -> None:
        self._write_candidates()
        if self._log is not None and search.best is not None:
            number = search.generation - 1
            numbers = {"best": search.best.score, "evaluated": len(search.candidates)}
            self._log.values("generation", "evolution", number, number, numbers)

    def _write_candidates(self) -> None:
        if self.checkpoint_dir is None or not self.processes.is_first:
            return
        of = {id(c.choices): values for c, values in zip(self.candidates, self._values, strict=True)}
        rows = [self._row(c, of[id(c.choices)]) for c in ranked(self.candidates)]
        text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
        atomic_write(self.checkpoint_dir / CANDIDATES, lambda file: file.write(text.encode("utf-8")))

    def _row(self, candidate: Candidate, values: Mapping[str, float]) -> dict[str, Any]:
        costs = {name: self.choices.cost_model(name).of(candidate.choices) for name in self.searched.names}
        numbers = {"score": candidate.score, **values, **costs}
        finite = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
        return {"arch": arch_of(self.model, candidate.choices), **finite}

    # ---- BatchNorm ---------------------------------------------------------------------------------------------

    def _recalibration_batches(self, dataset: Dataset[Any]) -> list[Any]:
        """Inputs of the weights' part, the same ones for every candidate."""
        if self._recalibration is None:
            stream = BatchStream(
                dataset, self._parts(dataset).weight, batch_size=self.batch_size, seed=mix_seed(self.seed, 7)
            )
            n = min(-(-self.recalibration_samples // self.batch_size), stream.batches_per_pass)
            with closing(stream.iterate(0)) as batches:
                self._recalibration = [inputs for inputs, _ in islice(batches, n)]
        return self._recalibration

    def _parts(self, dataset: Dataset[Any]) -> Split:
        return self.split or self._split(dataset, len(dataset))  # type: ignore[arg-type]

    def _recalibrate(self, choices: Mapping[str, int]) -> None:
        """Leave the statistics of the path in the model."""
        if self.dataset is None or self._search is None:
            return
        with pinned(self.model, choices), self.fabric.autocast():
            recalibrate_(self.model, map(self._to_device, self._recalibration_batches(self.dataset)))

    @contextmanager
    def _as_kept(self, best: bool, budget: Mapping[str, float] | None) -> Iterator[None]:
        # Deciding for an architecture gives the model its statistics, which are the supernet's again afterwards.
        with statistics_kept(self.model):
            yield

    # ---- before the run, and between two parts of it -----------------------------------------------------------

    def _cost_references(self) -> Mapping[str, float]:
        return self.limits

    def _check_run(self) -> None:
        self._space()  # InfeasibleTargetError
        for name in self.searched.names:
            self.choices.cost_model(name)
        measured = self.costs.measures and self.processes.is_first
        if measured and self.checkpoint_dir is not None and self.latency_table is not None:
            self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
            self.latency_table.write(self.checkpoint_dir / "latency_table.yaml")
        if self.monitor != "loss" and self.arch_dataset is not None:
            self._check_monitor(self.arch_dataset)

    def _check_monitor(self, dataset: Dataset[Any]) -> None:
        inputs, target = next(iter(even_batches(Subset(dataset, [0]), 1)))
        device = next(self.model.parameters()).device
        with evaluated(self.model):
            known = self._measured(self.model(inputs.to(device)), target.to(device))
        if self.monitor not in known:
            raise ConfigurationError(f"monitor={self.monitor!r}: allowed are {['loss', *known]}")

    def _own_settings(self) -> dict[str, Any]:
        return {
            "limits": self.limits,
            "fairness": self.fairness,
            "monitor": [self.monitor, self.monitor_mode],
            "evolution": [self.population, self.generations, self.parents, self.mutation],
            "recalibration_samples": self.recalibration_samples,
        }

    def _own_state(self) -> dict[str, Any]:
        search = None if self._search is None else self._search.state_dict()
        return {"search": search, "values": self._values, "searched_at": self._searched_at}

    def _check_own_state(self, state: Mapping[str, Any], model: nn.Module, where: str) -> None:
        key = row_of(*(index_below(len(d.options)) for d in self.decisions.values()))
        candidates = list_of(row_of(key, any_number))
        search = record(generation=whole, candidates=candidates, pending=list_of(key), generator=generator_state)
        values = list_of(mapping_of(any_number))
        record(search=optional(search), values=values, searched_at=whole)(state, where)
        n = 0 if state["search"] is None else len(state["search"]["candidates"])
        if len(state["values"]) != n:
            raise CheckpointError(f"{where}: {n} candidates with the values of {len(state['values'])}")

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        self._search, self._values, self._searched_at = None, list(state["values"]), state["searched_at"]
        if state["search"] is not None:
            self._search = self._new_search()
            self._search.load_state_dict(state["search"])


def fair_paths(sizes: Mapping[str, int], generator: torch.Generator) -> list[dict[str, int]]:
    """m = max(sizes) paths on which every option of a label with m options stands once, in random order.

    An option of a label with n < m options stands floor(m / n) or ceil(m / n) times.

    >>> paths = fair_paths({"a": 4, "b": 3}, torch.Generator().manual_seed(0))
    >>> sorted(path["a"] for path in paths), sorted(path["b"] for path in paths)
    ([0, 1, 2, 3], [0, 1, 1, 2])
    """
    m = max(sizes.values())
    columns = {}
    for label, n in sizes.items():
        rounds = [torch.randperm(n, generator=generator) for _ in range(-(-m // n))]
        order = torch.cat(rounds)[:m]
        # Without this, the paths at the end would be those with the options that stand more often.
        columns[label] = order[torch.randperm(m, generator=generator)].tolist()
    return [{label: column[i] for label, column in columns.items()} for i in range(m)]


def _still(alphas: list[nn.Parameter]) -> Optimizer:
    # Alphas have no gradient here: the evolution writes them.
    return torch.optim.SGD(alphas, lr=0.0)


def _check_regularizer(regularizer: Regularizer | None) -> None:
    of_costs, _ = parts_of(regularizer)
    if of_costs:
        raise ConfigurationError(
            f"regularizer: {[type(part).__name__ for part in of_costs]} of costs have nothing to pull at: no alpha is "
            "trained here; give targets={...}, which every scored architecture keeps"
        )
