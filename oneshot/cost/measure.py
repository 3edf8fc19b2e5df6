"""A latency table measured on this machine: every candidate of every choice at its real input, on a runtime.

What is priced is the time of a candidate alone, less that of a graph which only passes its input on: starting a run
costs some microseconds, which a network pays once and not per layer. Candidates that execute the same operators on
the same shapes are one measurement. See ``timing`` for the repetitions and for which of them count.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import UnsupportedModelError
from ..graph import Call, evaluated
from ..loggers import Progress
from ..mutables import LayerChoice, Mutable, OnePath, Repeat, decisions
from .executed import executed_operators, operators_key
from .plain import Row, without_choices
from .runtimes import Run, prepared, runtime_facts
from .table import LatencyTable, mutable_calls, option_name, price
from .timing import Timing, check_timing, interleaved, measuring, summarised
from .timing_cache import TimingCache, cache_folder

__all__ = ["measure_table"]

_ENDS = (0, -1)  # the first and the last option of every choice

Key = tuple[Any, ...]


def measure_table(
    model: nn.Module,
    example_input: Any,
    *,
    runtime: str = "torch",
    threads: int = 1,
    rounds: int = 5,
    min_run_time: float = 0.02,
    cache: bool | str | Path = True,
    progress: bool | Callable[[str], None] | None = None,
) -> LatencyTable:
    """Time every candidate of every choice of a search model on the CPU.

    What an ``InputChoice`` adds, averages or concatenates is not priced, only what its inputs come from.

    Args:
        model: with choices; on the CPU. A candidate that holds choices itself is priced without them, and a choice
            that is called several times has the mean of its calls.
        example_input: a tensor, or a tuple of arguments. Times are for it as it is, whatever its batch size.
        runtime: 'torch' or 'onnxruntime' (extra ``[onnx]``; BatchNorm is then folded into convolutions).
        threads: of the runtime. With one, it is pinned to one processor where the system can.
        rounds: how often all are timed, one after the other; each at least ``min_run_time`` seconds.
        cache: True keeps what was measured in $ONESHOT_CACHE, else in the user's cache folder, by runtime, version,
            processor and threads, so that it is not measured again and an interrupted measurement goes on; a folder
            keeps it there; False nowhere.
        progress: None shows a bar on a terminal, True always, False never; a function gets a line of text instead.

    Returns:
        A table with a row per candidate, median, interquartile range and number of repetitions. ``fixed`` is what
        two whole networks (the first and the last option everywhere) take beyond their priced candidates.

    Raises:
        UnsupportedModelError: the model is elsewhere, does not run, or cannot be written as an ONNX graph.
        ExportError: ONNX Runtime does not compute what torch does.
        ConfigurationError: an argument is not allowed, or the runtime is not installed.

    The model, the number of threads and the random numbers of torch on the CPU are afterwards as they were.

    >>> net = nn.Sequential(LayerChoice({"conv": nn.Conv2d(3, 3, 3, padding=1), "skip": nn.Identity()}), nn.ReLU())
    >>> table = measure_table(net, torch.rand(1, 3, 8, 8), rounds=1, min_run_time=1e-3, cache=False)
    >>> table.by_place["0"]["skip"], table.by_place["0"]["conv"] > 0
    (0.0, True)
    """
    check_timing(runtime, threads, rounds, min_run_time)
    folder = cache_folder(cache)
    elsewhere = {p.device.type for p in model.parameters()} - {"cpu"}
    if elsewhere:
        raise UnsupportedModelError(
            f"latency is measured on the CPU, parameters of {type(model).__name__} are on {sorted(elsewhere)}: "
            "measure before the model is moved, or give a table of that device"
        )
    args, _ = _copied(example_input if isinstance(example_input, tuple) else (example_input,), {})
    facts = runtime_facts(runtime, threads)
    known = TimingCache(folder, facts)
    with known.alone(), measuring(threads), evaluated(model):
        parts = _Parts(model, args)
        timings = _timed(parts, known, runtime, threads, rounds, min_run_time, progress)
        return parts.table(timings, facts)


@dataclass
class _Part:
    """Something that is timed, and the operators it executes. ``pinned``: the decisions it is timed under."""

    run: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    pinned: Mapping[str, int]
    operators: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        return operators_key(self.operators)


class _Through(nn.Module):
    """Passes its first tensor on: what a run takes in which nothing is computed."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)


class _Parts:
    """The parts of a search model: two whole networks, and per call of a choice its candidates and nothing at all."""

    def __init__(self, model: nn.Module, args: Sequence[Any]) -> None:
        self.model, self.args = model, args
        self.known = decisions(model)
        self.ends = {end: {k: range(len(d.options))[end] for k, d in self.known.items()} for end in _ENDS}
        self.calls = mutable_calls(model, args, keep=True)
        self.parts: dict[Key, _Part] = {
            ("whole", end): _Part(self.pinned_view(model, self.ends[end]), args, {}, self.ends[end]) for end in _ENDS
        }
        for call in self.calls:
            self.parts |= dict(self._of(call))
        for part in self.parts.values():
            self.pin(part.pinned)
            part.operators = executed_operators(part.run, *_copied(part.args, part.kwargs))

    def _of(self, call: Call) -> Iterator[tuple[Key, _Part]]:
        args, kwargs = pytree.tree_map_only(Tensor, _random_like, (call.args, dict(call.kwargs)))
        module = call.module
        if isinstance(module, Repeat):
            stages: list[nn.Module] = [Row(module.blocks[:depth]) for depth in module.options]
        else:
            assert isinstance(module, LayerChoice)
            stages = list(module)
        for k, stage in enumerate(stages):
            view = self.pinned_view(stage, self.ends[0])
            yield (call.number, k), _Part(view.eval(), args, kwargs, self.ends[0])
        yield (call.number, "nothing"), _Part(_Through().eval(), args, kwargs, self.ends[0])

    def pinned_view(self, module: nn.Module, choices: Mapping[str, int]) -> nn.Module:
        options = {id(member): choices[label] for label, d in self.known.items() for member in d.members}
        return without_choices(module, options)

    def pin(self, choices: Mapping[str, int]) -> None:
        for label, option in choices.items():
            self.known[label].set_sampler(OnePath(option))

    def table(self, timings: Mapping[str, Timing], facts: Mapping[str, str]) -> LatencyTable:
        """The rows, and what the whole networks take beyond them."""
        by_key = {key: timings[part.key] for key, part in self.parts.items()}
        places, spread = self._rows(by_key)
        rows_only = price(self.model, self.args, LatencyTable(by_place=places, fixed=0.0))
        beyond = [by_key["whole", end].median_ms - rows_only.of(self.ends[end]) for end in _ENDS]
        fixed = max(0.0, statistics.median(beyond))
        return LatencyTable(by_place=places, fixed=fixed, runtime=dict(facts), source="this machine", spread=spread)

    def _rows(self, by_key: Mapping[Key, Timing]) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, Any]]]:
        """Per place and option: ms without the choices inside, which ran at their first option; and their spread."""
        labels = {id(member): label for label, d in self.known.items() for member in d.members}
        found: dict[str, dict[str, list[tuple[float, Timing]]]] = {}
        for call in self.calls:
            inside = [c for c in self.calls if c.parent is not None and c.parent[0] == call.number]
            row = found.setdefault(call.path, {})
            for k, option in enumerate(_options(call)):
                # Inside a candidate of its own label, a choice has only that option; the others say nothing.
                if k in call.when.get(labels[id(call.module)], (k,)):
                    own = _alone(by_key, call.number, k)
                    own -= sum(_alone(by_key, c.number, 0) for c in inside if c.parent and k in c.parent[1])
                    row.setdefault(option_name(option), []).append((max(0.0, own), by_key[call.number, k]))
        places = {
            path: {name: statistics.fmean(ms for ms, _ in seen) for name, seen in row.items()}
            for path, row in found.items()
        }
        spread = {
            path: {name: _spread([timing for _, timing in seen]) for name, seen in row.items()}
            for path, row in found.items()
        }
        return places, spread


def _alone(by_key: Mapping[Key, Timing], number: int, option: int) -> float:
    return by_key[number, option].median_ms - by_key[number, "nothing"].median_ms


def _spread(timings: Sequence[Timing]) -> dict[str, float]:
    """Of a candidate that is called several times, the mean; and the fewest repetitions."""
    return {"iqr": statistics.fmean(t.iqr_ms for t in timings), "n": min(t.n for t in timings)}


def _timed(
    parts: _Parts,
    cache: TimingCache,
    runtime: str,
    threads: int,
    rounds: int,
    min_run_time: float,
    progress: bool | Callable[[str], None] | None,
) -> dict[str, Timing]:
    """Every distinct part by its key."""
    distinct: dict[str, _Part] = {}
    for part in parts.parts.values():
        distinct.setdefault(part.key, part)

    def prepare(part: _Part) -> Run:
        return prepared(part.run, part.args, part.kwargs, runtime=runtime, threads=threads)

    found = {key: cache.rounds(key, min_run_time)[:rounds] for key in distinct}
    with _telling(progress, rounds, len(distinct)) as tell:

        def after_round(done: int, n: int, key: str) -> None:
            cache.write(key, distinct[key].operators, found[key], min_run_time)
            tell(done, n)

        interleaved(
            {key: partial(prepare, part) for key, part in distinct.items()},
            found,
            rounds=rounds,
            min_run_time=min_run_time,
            threads=threads,
            before_round=lambda key: parts.pin(distinct[key].pinned),
            after_round=after_round,
        )
    return summarised(found)


@contextmanager
def _telling(
    progress: bool | Callable[[str], None] | None, rounds: int, n_parts: int
) -> Iterator[Callable[[int, int], None]]:
    """A function that is told of each finished round of a part: a line of text, or a bar."""
    if callable(progress):
        write = progress
        yield lambda done, n: write(f"timing, round {done + 1} of {rounds}: {n + 1} of {n_parts}")
        return
    bar = Progress(rounds * n_parts, "measuring latency", enabled=progress)
    try:
        yield lambda done, n: bar.update({"round": f"{done + 1}/{rounds}"})
    finally:
        bar.close()


def _options(call: Call) -> tuple[Any, ...]:
    assert isinstance(call.module, Mutable)
    return call.module.options


def _copied(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """A layer may change its input in place."""
    copied: tuple[Any, Any] = pytree.tree_map_only(Tensor, torch.clone, (tuple(args), dict(kwargs)))
    return copied


def _random_like(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    # Filled in place, so that the layout in memory (channels last, say) is the one the network runs in.
    return torch.empty_like(tensor).uniform_(generator=torch.Generator().manual_seed(0))
