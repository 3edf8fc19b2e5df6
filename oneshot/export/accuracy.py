"""How well a latency table predicts whole networks: predicted against measured, and a calibration by it.

Networks of a search space are drawn evenly over the range of predicted latencies, rebuilt without choices and timed.
Sorted by prediction, the 1st, 3rd, ... of them calibrate the table, the 2nd, 4th, ... judge it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from scipy.optimize import nnls
from scipy.stats import spearmanr
from torch import nn

from ..cost.decode import cost_range
from ..cost.model import CostModel
from ..cost.runtimes import RUNTIMES
from ..cost.table import LatencyTable, price
from ..cost.timing import Timing, time_modules
from ..errors import ConfigurationError
from ..loggers import markdown_table
from .fixed import fixed

__all__ = ["Agreement", "TableError", "TimedNetwork", "agreement", "fit_calibration", "stratified", "table_error"]

_TRIES = 20  # for another network in a stratum


@final
@dataclass(frozen=True)
class Agreement:
    """Of n pairs: the mean absolute relative error, the share of pairs within 10 %, Spearman's rank correlation.

    ``spearman`` is NaN where one side has a single value.
    """

    mape: float
    within_10_percent: float
    spearman: float
    n: int

    def __str__(self) -> str:
        return (
            f"MAPE {self.mape:.1%}, {self.within_10_percent:.0%} within 10 %, Spearman {self.spearman:.3f} "
            f"({self.n} networks)"
        )


@final
@dataclass(frozen=True)
class TimedNetwork:
    """An architecture with what the table says of it, before and after calibration, and what it took."""

    choices: Mapping[str, int]
    predicted_ms: float
    calibrated_ms: float
    timing: Timing
    held_out: bool


@final
@dataclass(frozen=True)
class TableError:
    """Predicted against measured latencies of whole networks.

    ``uncalibrated`` and ``calibrated`` judge the held out networks; without a calibration both are the same, of all
    networks, ``scale`` is 1 and ``offset`` 0. ``table``: the calibrated one. ``str()`` is a table of the networks.
    """

    networks: tuple[TimedNetwork, ...]
    uncalibrated: Agreement
    calibrated: Agreement
    scale: float
    offset: float
    table: LatencyTable

    def __str__(self) -> str:
        rows = [
            {
                "predicted ms": network.predicted_ms,
                "calibrated ms": network.calibrated_ms,
                "measured ms": network.timing.median_ms,
                "iqr ms": network.timing.iqr_ms,
                "error": f"{network.calibrated_ms / network.timing.median_ms - 1:+.1%}",
                "": "held out" if network.held_out else "calibrates",
            }
            for network in self.networks
        ]
        return (
            f"{markdown_table(rows)}\n\nas measured: {self.uncalibrated}\n"
            f"calibrated (x {self.scale:.4g} {self.offset:+.4g} ms): {self.calibrated}"
        )


def table_error(
    model: nn.Module,
    example_input: Any,
    table: LatencyTable,
    *,
    n: int = 20,
    seed: int = 0,
    calibrate: bool = True,
    runtime: str | None = None,
    threads: int | None = None,
    rounds: int = 5,
    min_run_time: float = 0.02,
    build: Callable[[nn.Module, Mapping[str, int]], nn.Module] = fixed,
) -> TableError:
    """Time ``n`` different networks of a search model, and compare with what a table predicts.

    Fewer where the space has fewer. ``example_input``: as in ``measure_table``. ``runtime`` and ``threads``: None are
    those of the table, torch with one thread for a table that does not say. ``calibrate``: fit a scale and an offset
    on half of the networks, by least squares of the relative errors. ``build(model, choices)`` makes the network of
    an architecture. ConfigurationError for fewer than 4 networks to calibrate and judge, 2 to judge.
    """
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    cost = price(model, args, table)
    archs = sorted(stratified(cost, n, random.Random(seed)), key=cost.of)
    fewest = 4 if calibrate else 2
    if len(archs) < fewest:
        raise ConfigurationError(
            f"table_error(n={n}, calibrate={calibrate}): the space gave {len(archs)} different networks, at least "
            f"{fewest} are needed"
        )
    predicted = [cost.of(choices) for choices in archs]
    timings = time_modules(
        [build(model, choices) for choices in archs],
        args,
        runtime=_runtime_of(table) if runtime is None else runtime,
        threads=_threads_of(table) if threads is None else threads,
        rounds=rounds,
        min_run_time=min_run_time,
    )
    measured = [timing.median_ms for timing in timings]
    return _judged(table, archs, predicted, measured, timings, calibrate)


def _judged(
    table: LatencyTable,
    archs: Sequence[Mapping[str, int]],
    predicted: Sequence[float],
    measured: Sequence[float],
    timings: Sequence[Timing],
    calibrate: bool,
) -> TableError:
    scale, offset = 1.0, 0.0
    if calibrate:
        scale, offset = fit_calibration(predicted[::2], measured[::2], table.fixed or 0.0)
        table = table.calibrated(scale, offset)
    calibrated = [scale * ms + offset for ms in predicted]
    held_out = slice(1, None, 2) if calibrate else slice(None)
    networks = tuple(
        TimedNetwork(choices, before, after, timing, not calibrate or i % 2 == 1)
        for i, (choices, before, after, timing) in enumerate(zip(archs, predicted, calibrated, timings, strict=True))
    )
    return TableError(
        networks,
        agreement(predicted[held_out], measured[held_out]),
        agreement(calibrated[held_out], measured[held_out]),
        scale,
        offset,
        table,
    )


def agreement(predicted: Sequence[float], measured: Sequence[float]) -> Agreement:
    """How well predictions meet measurements; both in the same unit, measured above 0.

    >>> print(agreement([1.0, 2.2, 3.0], [1.0, 2.0, 2.5]))  # errors of 0, 10 and 20 %
    MAPE 10.0%, 67% within 10 %, Spearman 1.000 (3 networks)
    """
    errors = [abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)]
    within = sum(error <= 0.1 + 1e-12 for error in errors) / len(errors)
    varies = len(set(predicted)) > 1 and len(set(measured)) > 1
    rank = float(spearmanr(predicted, measured).statistic) if varies else math.nan
    return Agreement(float(np.mean(errors)), within, rank, len(errors))


def fit_calibration(predicted: Sequence[float], measured: Sequence[float], fixed: float) -> tuple[float, float]:
    """The scale and offset for which scale * predicted + offset is nearest to measured, in relative error squared.

    The scale is not negative, and the offset leaves scale * ``fixed`` + offset (what a network without priced rows
    takes) not negative either. A scale of 0, where predictions say nothing, is an error.

    >>> scale, offset = fit_calibration([1.0, 2.0, 3.0], [2.5, 4.5, 6.5], 0.5)
    >>> round(scale, 9), round(offset, 9)
    (2.0, 0.5)
    """
    rows, took = np.asarray(predicted) - fixed, np.asarray(measured)
    # measured = scale * rows + rest, each equation divided by its measurement
    (scale, rest), _ = nnls(np.stack([rows / took, 1 / took], axis=1), np.ones(len(took)))
    if not scale > 0:
        raise ConfigurationError(
            f"no scale fits: networks that are predicted to take {min(predicted):.4g} to {max(predicted):.4g} ms take "
            f"{min(measured):.4g} to {max(measured):.4g} ms, without relation. Is the table of this space and machine?"
        )
    return float(scale), float(rest - scale * fixed)


def stratified(cost: CostModel, n: int, rng: random.Random) -> list[dict[str, int]]:
    """Up to ``n`` different architectures, one from each of n equal parts of the range of a cost where there is one.

    >>> from oneshot import LayerChoice, count_params
    >>> net = nn.Sequential(*(LayerChoice([nn.Linear(2, 2, bias=False), nn.Identity()]) for _ in range(4)))
    >>> cost = count_params(net)  # 4 for every Linear: 0, 4, 8, 12 or 16
    >>> sorted(cost.of(choices) for choices in stratified(cost, 5, random.Random(0)))
    [0.0, 4.0, 8.0, 12.0, 16.0]
    """
    low, high = cost_range(cost)
    found: dict[tuple[int, ...], dict[str, int]] = {}
    for part in range(min(n, math.prod(cost.sizes.values()))):
        bounds = low + (high - low) * part / n, low + (high - low) * (part + 1) / n
        choices = _new_within(cost, bounds, found, rng)
        found[tuple(choices.values())] = choices
    return list(found.values())


def _new_within(
    cost: CostModel, bounds: tuple[float, float], found: Collection[tuple[int, ...]], rng: random.Random
) -> dict[str, int]:
    """An architecture that is not among those found, between the bounds if some tries reach one."""
    outside: dict[str, int] | None = None
    for _ in range(_TRIES):
        choices = _towards(cost, rng.uniform(*bounds), rng)
        if tuple(choices.values()) not in found:
            if bounds[0] <= cost.of(choices) <= bounds[1]:
                return choices
            outside = choices
    while outside is None or tuple(outside.values()) in found:
        outside = {label: rng.randrange(size) for label, size in cost.sizes.items()}
    return outside


def _towards(cost: CostModel, target: float, rng: random.Random) -> dict[str, int]:
    """A random architecture, moved option by option towards a cost until none comes nearer."""
    choices = {label: rng.randrange(size) for label, size in cost.sizes.items()}
    distance = abs(cost.of(choices) - target)
    moved = True
    while moved:
        moved = False
        for label in rng.sample(list(cost.sizes), len(cost.sizes)):
            options = rng.sample(range(cost.sizes[label]), cost.sizes[label])
            near = min(options, key=lambda option: abs(cost.of({**choices, label: option}) - target))
            gained = distance - abs(cost.of({**choices, label: near}) - target)
            if gained > 1e-12 * abs(target):
                choices[label], distance, moved = near, distance - gained, True
    return choices


def _runtime_of(table: LatencyTable) -> str:
    name = table.runtime.get("runtime", "torch").split(" ")[0]
    return name if name in RUNTIMES else "torch"


def _threads_of(table: LatencyTable) -> int:
    text = table.runtime.get("threads", "1")
    return int(text) if text.isdecimal() and int(text) > 0 else 1
