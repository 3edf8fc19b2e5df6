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

from ..graph import Call, evaluated
from ..mutables import LayerChoice, Mutable, OnePath, Repeat, decisions
from .table import LatencyTable, mutable_calls, option_name, price

__all__ = ["measure_latency", "time_module"]

_ROUNDS = 3
_ENDS = (0, -1)  # the first and the last option of every choice


def time_module(module: nn.Module, args: Sequence[Any], *, min_run_time: float = 0.05) -> float:
    """Median milliseconds of ``module(*args)`` on one CPU thread, in eval mode without grad; modes are put back."""
    with evaluated(module):
        return _milliseconds([_timed(lambda: module(*args), min_run_time)])


def measure_latency(
    model: nn.Module,
    args: Sequence[Any],
    *,
    min_run_time: float = 0.02,
    progress: Callable[[str], None] | None = None,
) -> LatencyTable:
    """Time every candidate of every choice of a search model on the CPU with one thread.

    Every candidate is timed in ``3`` interleaved rounds of at least ``min_run_time`` seconds, and its median kept. A
    candidate that holds choices itself is priced without them. ``fixed`` is what two whole networks (the first
    and the last option everywhere) take beyond their priced candidates. Milliseconds for ``args`` as it is,
    whatever its batch size.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with evaluated(model):
            return _measure(model, args, min_run_time, progress)
    finally:
        torch.set_num_threads(threads)


def _measure(
    model: nn.Module, args: Sequence[Any], min_run_time: float, progress: Callable[[str], None] | None
) -> LatencyTable:
    calls = mutable_calls(model, args, keep=True)
    stages = {(call.path, option): run for call in calls for option, run in _stages(call)}
    samples: dict[Any, list[Measurement]] = {}
    # Interleaved, so that a slow moment of the machine meets all candidates alike.
    for done in range(_ROUNDS):
        for end in _ENDS:
            _pin(model, end)
            samples.setdefault(end, []).append(_timed(lambda: model(*args), min_run_time))
        _pin(model, 0)
        for n, (key, run) in enumerate(stages.items(), start=1):
            samples.setdefault(key, []).append(_timed(run, min_run_time))
            if progress is not None:
                progress(f"timing candidates, round {done + 1} of {_ROUNDS}: {n} of {len(stages)}")
    took = {key: _milliseconds(found) for key, found in samples.items()}
    places = _own_times(calls, took)
    candidates_only = price(model, args, LatencyTable(by_place=places, fixed=0.0))
    beyond = [took[end] - candidates_only.of(_ends(model, end)) for end in _ENDS]
    return LatencyTable(
        by_place=places, fixed=max(0.0, statistics.median(beyond)), runtime=_runtime(), source="this machine"
    )


def _stages(call: Call) -> list[tuple[str, Callable[[], Any]]]:
    """What is timed of one mutable: each candidate, or the row of blocks of each depth."""
    args, kwargs = pytree.tree_map_only(Tensor, _random_like, (call.args, dict(call.kwargs)))
    module = call.module
    if isinstance(module, Repeat):
        rows = [nn.Sequential(*module.blocks[:depth]) for depth in module.options]
        return [(option_name(depth), partial(row, *args)) for depth, row in zip(module.options, rows, strict=True)]
    assert isinstance(module, LayerChoice)
    return [
        (option_name(option), partial(candidate, *args, **kwargs))
        for option, candidate in zip(module.options, module, strict=True)
    ]


def _own_times(calls: Sequence[Call], took: Mapping[Any, float]) -> dict[str, dict[str, float]]:
    """Times without the choices inside, which ran at their first option and are priced by themselves."""
    places: dict[str, dict[str, float]] = {}
    for call in calls:
        module = call.module
        assert isinstance(module, Mutable)
        row = places.setdefault(call.path, {})
        for option in module.options:
            inner = _directly_inside(_prefixes(call.path, module, option), calls)
            of_inner = sum(took[c.path, option_name(_options(c)[0])] for c in inner)
            row[option_name(option)] = max(0.0, took[call.path, option_name(option)] - of_inner)
    return places


def _options(call: Call) -> tuple[Any, ...]:
    assert isinstance(call.module, Mutable)
    return call.module.options


def _prefixes(path: str, module: Mutable, option: Any) -> list[str]:
    head = f"{path}." if path else ""
    if isinstance(module, Repeat):
        return [f"{head}blocks.{i}" for i in range(option)]
    return [f"{head}candidates.{option}"]


def _directly_inside(prefixes: Sequence[str], calls: Sequence[Call]) -> list[Call]:
    def within(path: str, outer: str) -> bool:
        return path == outer or path.startswith(outer + ".")

    inside = [call for call in calls if any(within(call.path, prefix) for prefix in prefixes)]
    return [c for c in inside if not any(o is not c and c.path.startswith(o.path + ".") for o in inside)]


def _pin(model: nn.Module, end: int) -> None:
    for label, option in _ends(model, end).items():
        decisions(model)[label].set_sampler(OnePath(option))


def _ends(model: nn.Module, end: int) -> dict[str, int]:
    return {label: range(len(d.options))[end] for label, d in decisions(model).items()}


def _random_like(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return torch.rand(tensor.shape, dtype=tensor.dtype, generator=torch.Generator().manual_seed(0))


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
