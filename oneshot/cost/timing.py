"""How long a run takes: repetitions, which of them count, and their median.

A repetition is as many runs as take half a millisecond, at least one. Right before and after it a probe runs: the
exponential of 8,192 numbers, some microseconds on one thread. The disturbance of a repetition is the larger of

* wall time / CPU time of it: above 1 when the process was taken off the processor;
* the slower of its two probes / the fastest probe of the whole measurement: above 1 when the processor was slow,
  because its clock was low, or because somebody else computed on the same core.

A repetition counts if its disturbance is at most 1.1; where fewer than 10 do, the 10 of the smallest disturbance
count. Nothing is judged by the time that is measured itself, so a run that scatters by nature keeps its scatter.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, final

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..graph import evaluated
from .runtimes import Run, check_runtime, prepared

__all__ = ["Repetition", "Timing", "interleaved", "measuring", "time_module", "time_modules", "undisturbed"]

_REPETITION = 5e-4  # seconds
_DISTURBED, _ENOUGH = 1.1, 10
_FEWEST = 3  # repetitions of one round
_PATIENCE = 10  # times min_run_time, for a round that is disturbed
_PROBE_SIZE = 8192  # numbers; up to 32,768 torch computes them on one thread, whatever the number of threads

K = TypeVar("K", bound=Hashable)


class Repetition(NamedTuple):
    """``ms`` per run, the ``cpu_share`` of its wall time, and the time of the slower probe beside it."""

    ms: float
    cpu_share: float
    probe_ms: float


Round = list[Repetition]


@final
@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run: median, 95th percentile and interquartile range of ``n`` repetitions.

    >>> Timing.of([1.0, 2.0, 3.0, 4.0, 5.0])
    Timing(median_ms=3.0, p95_ms=4.8, iqr_ms=2.0, n=5)
    """

    median_ms: float
    p95_ms: float
    iqr_ms: float
    n: int

    @classmethod
    def of(cls, ms: Sequence[float]) -> Timing:
        low, high, p95 = (float(q) for q in np.quantile(ms, (0.25, 0.75, 0.95)))
        return cls(float(statistics.median(ms)), p95, high - low, len(ms))


def undisturbed(repetitions: Sequence[Repetition], fastest_probe: float) -> list[float]:
    """The milliseconds of the repetitions that count, by the rule above.

    >>> clean, preempted, slow = Repetition(1.0, 1.0, 0.01), Repetition(3.0, 0.4, 0.01), Repetition(1.6, 1.0, 0.02)
    >>> undisturbed([clean] * 10 + [preempted, slow], 0.01) == [1.0] * 10
    True
    >>> undisturbed([clean] * 9 + [preempted, slow], 0.01)[-1]  # nine are too few
    1.6
    """
    kept = [r.ms for r in repetitions if _disturbance(r, fastest_probe) <= _DISTURBED]
    if len(kept) < _ENOUGH:
        kept = [r.ms for r in sorted(repetitions, key=lambda r: _disturbance(r, fastest_probe))[:_ENOUGH]]
    return kept


def _disturbance(repetition: Repetition, fastest_probe: float) -> float:
    return max(1 / max(repetition.cpu_share, 1e-9), repetition.probe_ms / fastest_probe)


def time_module(
    module: Callable[..., Any],
    args: Tensor | Sequence[Any],
    *,
    runtime: str = "torch",
    threads: int = 1,
    rounds: int = 5,
    min_run_time: float = 0.02,
) -> Timing:
    """Milliseconds of ``module(*args)`` in eval mode without grad, on a runtime ('torch' or 'onnxruntime').

    ``rounds`` of at least ``min_run_time`` seconds each. With one thread, it is pinned to one processor where the
    system can. Nothing is subtracted: the call itself is in it. Torch also takes a plain function.
    """
    return time_modules([module], args, runtime=runtime, threads=threads, rounds=rounds, min_run_time=min_run_time)[0]


def time_modules(
    modules: Sequence[Callable[..., Any]],
    args: Tensor | Sequence[Any],
    *,
    runtime: str = "torch",
    threads: int = 1,
    rounds: int = 5,
    min_run_time: float = 0.02,
) -> list[Timing]:
    """``time_module`` of several on the same arguments. They take turns, so that they meet the same machine."""
    check_timing(runtime, threads, rounds, min_run_time)
    found: dict[int, list[Round]] = {i: [] for i in range(len(modules))}
    with measuring(threads), ExitStack() as modes:
        for module in modules:
            if isinstance(module, nn.Module):
                modes.enter_context(evaluated(module))
        interleaved(
            {i: _preparing(module, args, runtime, threads) for i, module in enumerate(modules)},
            found,
            rounds=rounds,
            min_run_time=min_run_time,
            threads=threads,
        )
    timings = summarised(found)
    return [timings[i] for i in found]


def _preparing(
    module: Callable[..., Any], args: Tensor | Sequence[Any], runtime: str, threads: int
) -> Callable[[], Run]:
    given = (args,) if isinstance(args, Tensor) else args
    return lambda: prepared(module, given, {}, runtime=runtime, threads=threads)


def check_timing(runtime: str, threads: int, rounds: int, min_run_time: float) -> None:
    """ConfigurationError for what cannot be measured with."""
    check_runtime(runtime, threads)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ConfigurationError(f"rounds={rounds!r}: a whole number >= 1 is needed")
    if not 0 < min_run_time < float("inf"):
        raise ConfigurationError(f"min_run_time={min_run_time!r}: seconds above 0 are needed")


def summarised(found: Mapping[K, Sequence[Round]]) -> dict[K, Timing]:
    """The rounds of measurements that were made together, each as a Timing."""
    repetitions = {key: [r for one in rounds for r in one] for key, rounds in found.items()}
    fastest = min((r.probe_ms for row in repetitions.values() for r in row), default=1.0)
    return {key: Timing.of(undisturbed(row, fastest)) for key, row in repetitions.items()}


def interleaved(
    prepare: Mapping[K, Callable[[], Run]],
    found: dict[K, list[Round]],
    *,
    rounds: int,
    min_run_time: float,
    threads: int,
    before_round: Callable[[K], None] = lambda key: None,
    after_round: Callable[[int, int, K], None] = lambda done, n, key: None,
) -> None:
    """Add rounds to ``found`` until all have that many, round by round, so that slow moments meet all alike.

    A run is prepared when it is first needed. ``before_round(key)`` and ``after_round(round, number of the
    measurement, key)`` are told of each.
    """
    runs: dict[K, Run] = {}
    probe = Probe()
    for done in range(rounds):
        for n, key in enumerate(prepare):
            if len(found[key]) <= done:
                before_round(key)
                if key not in runs:
                    runs[key] = prepare[key]()
                found[key].append(one_round(runs[key], min_run_time, probe, threads))
                after_round(done, n, key)


class Probe:
    """A small, fixed piece of work, to see whether the processor is as fast as it was. Called: milliseconds."""

    def __init__(self) -> None:
        self.numbers = torch.full((_PROBE_SIZE,), 0.5, dtype=torch.float32, device="cpu")
        self.out = torch.empty_like(self.numbers)
        self.fastest = min(self() for _ in range(200))

    def __call__(self) -> float:
        # The first one brings the numbers back into the cache; a disturbance shows in either of the others.
        marks = []
        for _ in range(3):
            torch.exp(self.numbers, out=self.out)
            marks.append(time.perf_counter())
        return max(marks[1] - marks[0], marks[2] - marks[1]) * 1e3


def one_round(run: Run, min_run_time: float, probe: Probe, threads: int) -> Round:
    """Warm up, then repeat until ``min_run_time`` seconds of it were undisturbed, or ten times as long in all."""
    cpu_clock = _cpu_clock(threads)
    single = min(_seconds(run, 1, time.perf_counter)[0] for _ in range(_FEWEST))
    n_runs = max(1, round(min(_REPETITION, min_run_time) / max(single, 1e-7)))
    repetitions: Round = []
    clean = total = 0.0
    before = probe()
    while len(repetitions) < _FEWEST or (clean < min_run_time and total < _PATIENCE * min_run_time):
        wall, cpu = _seconds(run, n_runs, cpu_clock)
        after = probe()
        probe.fastest = min(probe.fastest, before, after)
        numbers = wall / n_runs * 1e3, min(1.0, cpu / max(wall, 1e-9)), max(before, after)
        repetition = Repetition(*(float(f"{number:.6g}") for number in numbers))
        repetitions.append(repetition)
        total += wall
        clean += wall if _disturbance(repetition, probe.fastest) <= _DISTURBED else 0.0
        before = after
    return repetitions


def _seconds(run: Run, n_runs: int, cpu_clock: Callable[[], float]) -> tuple[float, float]:
    """Wall and CPU seconds of some runs."""
    cpu, wall = cpu_clock(), time.perf_counter()
    for _ in range(n_runs):
        run()
    return time.perf_counter() - wall, cpu_clock() - cpu


def _cpu_clock(threads: int) -> Callable[[], float]:
    """CPU time of this thread, or of all of them; wall time where the system counts CPU time too coarsely."""
    if threads == 1:
        clock, info = time.thread_time, time.get_clock_info("thread_time")
    else:
        clock, info = time.process_time, time.get_clock_info("process_time")
    return clock if info.resolution <= 1e-6 else time.perf_counter


@contextmanager
def measuring(threads: int) -> Iterator[None]:
    """torch on so many threads, one thread on one processor, no garbage collection; all is put back afterwards.

    The random numbers of torch on the CPU too: how often something runs depends on the clock.
    """
    before, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(threads)
    gc.disable()
    # Until a large block has been freed, the C library hands back every large tensor to the system, and a run that
    # makes one takes several times longer than in a process that has worked for a while.
    block = torch.zeros(7_500_000)  # 30 MB: just below the largest block that this depends on
    del block
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), _pinned(threads):
            yield
    finally:
        if collecting:
            gc.enable()
        torch.set_num_threads(before)


@contextmanager
def _pinned(threads: int) -> Iterator[None]:
    """With one thread: on one processor only. Several are left to the system, which knows what shares a core."""
    allowed: set[int] = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if threads != 1 or len(allowed) < 2:
        yield
        return
    others = set(_thread_ids())
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        # A thread that was started meanwhile (by a library, for later) has inherited the one processor.
        for thread in {0, *(set(_thread_ids()) - others)}:
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, allowed)


def _thread_ids() -> Iterable[int]:
    tasks = Path("/proc/self/task")
    return [int(entry.name) for entry in tasks.iterdir()] if tasks.is_dir() else []
