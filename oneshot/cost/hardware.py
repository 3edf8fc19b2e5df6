"""Latency on a hardware, by whatever name or file says what that is."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigurationError
from .measure import measure_table
from .model import CostModel
from .nn_meter import NNMeterLatency, PredictorSet, check_hardware, load_predictor_set, nn_meter_latency
from .table import LatencyTable, price
from .timing import time_modules

__all__ = ["RUNTIMES", "Hardware", "check_latency_source", "is_predicted", "latency_on", "layer_latency"]

Hardware = str | os.PathLike[str] | Mapping[str, Any] | LatencyTable | PredictorSet
RUNTIMES = {"this-machine": "torch", "this-machine-onnxruntime": "onnxruntime"}
"""The names that stand for a measurement here, with the runtime that is measured."""

_TABLES = (".json", ".yaml", ".yml")


def latency_on(
    hardware: Hardware,
    model: nn.Module,
    args: Sequence[Any],
    *,
    missing: Mapping[str, float] | None = None,
    measure: Callable[[str], LatencyTable] | None = None,
) -> tuple[CostModel, LatencyTable | NNMeterLatency]:
    """The latency of a search space on a hardware, in ms, and what it was priced by.

    ``hardware``: 'this-machine' (PyTorch) or 'this-machine-onnxruntime', which time it; a latency table as a mapping,
    a ``LatencyTable`` or the path of a YAML or JSON file; else predictors of nn-Meter, by name or folder.
    ``missing``: see ``nn_meter_latency``. ``measure``: runtime -> table, instead of ``measure_table``.
    """
    given = check_latency_source(hardware)
    if isinstance(hardware, str) and hardware in RUNTIMES:
        runtime = RUNTIMES[hardware]
        table = measure_table(model, tuple(args), runtime=runtime) if measure is None else measure(runtime)
        return price(model, args, table), table
    if is_predicted(hardware):
        predicted = nn_meter_latency(model, args, hardware, missing=missing)  # type: ignore[arg-type]
        return predicted.cost, predicted
    assert given is not None  # nothing else is left
    return price(model, args, given), given


def layer_latency(
    hardware: str | os.PathLike[str] | PredictorSet,
    make: Callable[[int, int, int], nn.Module],
    input_shape: Callable[[int], Sequence[int]],
    *,
    missing: Mapping[str, float] | None = None,
) -> Callable[[int, int, int], float]:
    """(input channels, output channels, kernel) -> ms of one layer alone, for ``WidthGrid.fill`` and ``.error``.

    ``make(in, out, kernel)``: the layer; ``input_shape(in)``: its input, batch included. ``hardware``: a runtime of
    this machine, where what a call takes without any layer is subtracted, or predictors of nn-Meter.

    >>> of_size = lambda channels: (1, channels, 16, 16)
    >>> cost = layer_latency("this-machine", lambda i, o, k: nn.Conv2d(i, o, k, padding=k // 2), of_size)
    >>> cost(8, 16, 3) >= 0
    True
    """
    if not is_predicted(hardware):
        if not isinstance(hardware, str) or hardware not in RUNTIMES:
            raise ConfigurationError(
                f"layer_latency({hardware!r}): allowed are {list(RUNTIMES)} and predictors of nn-Meter; a table has "
                "no rows for widths of a layer"
            )
        runtime = RUNTIMES[hardware]

        def measured(cin: int, cout: int, kernel: int) -> float:
            layers = [make(cin, cout, kernel), nn.Identity()]
            layer, nothing = time_modules(layers, (torch.rand(*input_shape(cin)),), runtime=runtime)
            return max(0.0, layer.median_ms - nothing.median_ms)

        return measured
    predictors = hardware if isinstance(hardware, PredictorSet) else load_predictor_set(hardware)  # type: ignore[arg-type]

    def predicted(cin: int, cout: int, kernel: int) -> float:
        args = (torch.zeros(*input_shape(cin)),)
        return nn_meter_latency(make(cin, cout, kernel), args, predictors, missing=missing).cost.of({})

    return predicted


def is_predicted(hardware: Hardware) -> bool:
    """Whether predictors of nn-Meter are meant: a PredictorSet, or a name or folder that is not a table's file."""
    if isinstance(hardware, PredictorSet):
        return True
    if not isinstance(hardware, str | os.PathLike) or hardware in RUNTIMES:
        return False
    return Path(hardware).suffix.lower() not in _TABLES and not Path(hardware).is_file()


def check_latency_source(hardware: Any) -> LatencyTable | None:
    """ConfigurationError for what ``latency_on`` cannot use; the table, if one is given. Nothing is measured."""
    if isinstance(hardware, LatencyTable | PredictorSet):
        return hardware if isinstance(hardware, LatencyTable) else None
    if isinstance(hardware, str) and hardware in RUNTIMES:
        return None
    allowed = (
        f"allowed are {list(RUNTIMES)}, a mapping of milliseconds, a LatencyTable or the path of one as YAML or "
        "JSON, and predictors of nn-Meter by name, folder or PredictorSet"
    )
    if not isinstance(hardware, str | os.PathLike | Mapping):
        raise ConfigurationError(f"hardware {hardware!r}: {allowed}")
    if is_predicted(hardware):
        try:
            check_hardware(hardware if isinstance(hardware, str) else Path(hardware))  # type: ignore[arg-type]
        except ConfigurationError as error:
            raise ConfigurationError(f"hardware {str(hardware)!r}: {allowed}. {error}") from error
        return None
    return LatencyTable.read(hardware if isinstance(hardware, Mapping) else Path(hardware))
