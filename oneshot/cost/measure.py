"""Latency measured on this machine: every candidate of every choice once, at its real input shape."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.benchmark import Measurement, Timer

from ..errors import UnsupportedModelError
from ..graph import Call, evaluated
from ..mutables import Decision, LayerChoice, Mutable, OnePath, Repeat, decisions
from .table import LatencyTable, mutable_calls, option_name, price

__all__ = ["measure_latency", "time_module"]

_ROUNDS = 5
_ENDS = (0, -1)  # the first and the last option of every choice


def time_module(module: Callable[..., Any], args: Sequence[Any], *, min_run_time: float = 0.05) -> float:
    """Median milliseconds of ``module(*args)`` on one CPU thread, in eval mode if it is a module, without grad."""
    with evaluated(module) if isinstance(module, nn.Module) else torch.no_grad():
        return _milliseconds([_timed(lambda: module(*args), min_run_time)])


def measure_latency(
    model: nn.Module,
    args: Sequence[Any],
    *,
    min_run_time: float = 0.02,
    progress: Callable[[str], None] | None = None,
) -> LatencyTable:
    """Time every candidate of every choice of a search model on the CPU with one thread.

    Every candidate is timed in 5 interleaved rounds of at least ``min_run_time`` seconds, and its median kept. A
    candidate that holds choices itself is priced without them; a choice that is called several times has the mean
    of its calls. ``fixed`` is what two whole networks (the first and the last option everywhere) take beyond their
    priced candidates. Milliseconds for ``args`` as it is, whatever its batch size. The model, the number of threads
    and the random numbers of torch on the CPU are afterwards as they were; UnsupportedModelError for a model that is
    elsewhere.
    """
    elsewhere = {p.device.type for p in model.parameters()} - {"cpu"}
    if elsewhere:
        raise UnsupportedModelError(
            f"latency is measured on the CPU, parameters of {type(model).__name__} are on {sorted(elsewhere)}: "
            "measure before the model is moved, or give a table of that device"
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # How often a candidate runs depends on the clock, so a random layer would leave a random state behind.
        with torch.random.fork_rng(devices=[]), evaluated(model):
            return _measure(model, args, min_run_time, progress)
    finally:
        torch.set_num_threads(threads)


def _measure(
    model: nn.Module, args: Sequence[Any], min_run_time: float, progress: Callable[[str], None] | None
) -> LatencyTable:
    known = decisions(model)
    ends = {end: {label: range(len(d.options))[end] for label, d in known.items()} for end in _ENDS}
    calls = mutable_calls(model, args, keep=True)
    stages = {(call.number, k): run for call in calls for k, run in enumerate(_stages(call))}
    samples: dict[Any, list[Measurement]] = {}
    # Interleaved, so that a slow moment of the machine meets all candidates alike.
    for done in range(_ROUNDS):
        for end in _ENDS:
            _pin(known, ends[end])
            samples.setdefault(end, []).append(_timed(lambda: model(*args), min_run_time))
        _pin(known, ends[0])
        for n, (key, run) in enumerate(stages.items(), start=1):
            samples.setdefault(key, []).append(_timed(run, min_run_time))
            if progress is not None:
                progress(f"timing candidates, round {done + 1} of {_ROUNDS}: {n} of {len(stages)}")
    took = {key: _milliseconds(found) for key, found in samples.items()}
    labels = {id(member): label for label, d in known.items() for member in d.members}
    places = _own_times(calls, labels, took)
    candidates_only = price(model, args, LatencyTable(by_place=places, fixed=0.0))
    beyond = [took[end] - candidates_only.of(ends[end]) for end in _ENDS]
    return LatencyTable(
        by_place=places, fixed=max(0.0, statistics.median(beyond)), runtime=_runtime(), source="this machine"
    )


def _stages(call: Call) -> list[Callable[[], Any]]:
    """What is timed of one call of a mutable: each candidate, or the row of blocks of each depth."""
    args, kwargs = pytree.tree_map_only(Tensor, _random_like, (call.args, dict(call.kwargs)))
    module = call.module
    if isinstance(module, Repeat):
        rows = [nn.Sequential(*module.blocks[:depth]) for depth in module.options]
        return [partial(row, *args, *kwargs.values()) for row in rows]
    assert isinstance(module, LayerChoice)
    return [partial(candidate, *args, **kwargs) for candidate in module]


def _own_times(
    calls: Sequence[Call], labels: Mapping[int, str], took: Mapping[Any, float]
) -> dict[str, dict[str, float]]:
    """Times without the choices inside, which ran at their first option and are priced by themselves."""
    found: dict[str, dict[str, list[float]]] = {}
    for call in calls:
        inner = [(c.parent[1], took[c.number, 0]) for c in calls if c.parent is not None and c.parent[0] == call.number]
        row = found.setdefault(call.path, {})
        for k, option in enumerate(_options(call)):
            # Inside a candidate of its own label, a choice has only that option; the others say nothing.
            if k in call.when.get(labels[id(call.module)], (k,)):
                own = took[call.number, k] - sum(ms for under, ms in inner if k in under)
                row.setdefault(option_name(option), []).append(max(0.0, own))
    return {path: {name: statistics.fmean(times) for name, times in row.items()} for path, row in found.items()}


def _options(call: Call) -> tuple[Any, ...]:
    assert isinstance(call.module, Mutable)
    return call.module.options


def _pin(known: Mapping[str, Decision], choices: Mapping[str, int]) -> None:
    for label, option in choices.items():
        known[label].set_sampler(OnePath(option))


def _random_like(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    # Filled in place, so that the layout in memory (channels last, say) is the one the network runs in.
    return torch.empty_like(tensor).uniform_(generator=torch.Generator().manual_seed(0))


def _timed(run: Callable[[], Any], min_run_time: float) -> Measurement:
    timer = Timer("run()", globals={"run": run}, num_threads=1)
    return timer.blocked_autorange(min_run_time=min_run_time)


def _milliseconds(found: Sequence[Measurement]) -> float:
    return float(statistics.median([t for m in found for t in m.times])) * 1e3


def _runtime() -> dict[str, str]:
    return {
        "runtime": f"torch {torch.__version__}",
        "machine": platform.machine(),
        "processor": platform.processor() or platform.node(),
        "threads": "1",
    }
