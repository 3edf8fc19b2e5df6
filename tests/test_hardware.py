"""One name for every hardware: measured here, a table, or the predictors of a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oneshot import LatencyTable, LayerChoice
from oneshot.cost import Timing, WidthGrid, hardware, latency_on, layer_latency
from oneshot.cost.nn_meter import NNMeterLatency, load_predictor_set
from oneshot.errors import ConfigurationError, UnknownCostError

TINY = Path(__file__).parent / "data" / "nn_meter_tiny"
X = torch.zeros(1, 4, 8, 8)


def space() -> nn.Sequential:
    return nn.Sequential(LayerChoice({"k3": nn.Conv2d(4, 4, 3, padding=1), "skip": nn.Identity()}, label="a"))


def conv(cin: int, cout: int, kernel: int) -> nn.Module:
    return nn.Conv2d(cin, cout, kernel, padding=kernel // 2)


def test_a_table_in_every_form(tmp_path: Path) -> None:
    rows = {"a": {"k3": 2.0, "skip": 0.0}, "fixed": 0.5}
    path = tmp_path / "table.json"
    path.write_text('{"a": {"k3": 2.0, "skip": 0.0}, "fixed": 0.5}')
    for given in (rows, LatencyTable.read(rows), path, str(path)):
        cost, table = latency_on(given, space(), (X,))
        assert isinstance(table, LatencyTable)
        assert [cost.of({"a": k}) for k in (0, 1)] == [2.5, 0.5]


def test_predictors_in_every_form() -> None:
    predictors = load_predictor_set(TINY)
    (conv_row,) = predictors.forests["conv-bn-relu"].predict(
        [(8, 4, 4, 3, 1, 2 * 64 * 148 / 2e6, 148 / 1e6)]
    )  # 4(36+1)
    for given in (predictors, TINY, str(TINY)):
        cost, found = latency_on(given, space(), (X,))
        assert isinstance(found, NNMeterLatency)
        assert [cost.of({"a": k}) for k in (0, 1)] == pytest.approx([conv_row, 0.0])


def test_this_machine_measures_by_the_runtime_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(model: nn.Module, example_input: Any, *, runtime: str) -> LatencyTable:
        return LatencyTable(by_place={"0": {"k3": 1.0 if runtime == "torch" else 3.0, "skip": 0.0}}, fixed=0.0)

    monkeypatch.setattr(hardware, "measure_table", measured)
    assert latency_on("this-machine", space(), (X,))[0].of({"a": 0}) == 1.0
    assert latency_on("this-machine-onnxruntime", space(), (X,))[0].of({"a": 0}) == 3.0


@pytest.mark.parametrize("given", [3.0, None, ["this-machine"]])
def test_what_is_no_hardware(given: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"allowed are .*'this-machine-onnxruntime'"):
        latency_on(given, space(), (X,))


def test_widths_between_those_of_a_grid_by_predictors() -> None:
    """At a grid point the predictor's own answer; between two of them the straight line."""
    predictors = load_predictor_set(TINY)
    of = layer_latency(predictors, conv, lambda channels: (1, channels, 8, 8))
    grid = WidthGrid.fill(of, [4, 8, 16], [4, 8], [1, 3], progress=False)
    assert float(grid.at(8, 4, 3)) == pytest.approx(of(8, 4, 3))
    assert float(grid.at(6, 4, 3)) == pytest.approx((of(4, 4, 3) + of(8, 4, 3)) / 2)
    width = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(grid.at(width, 8, 1), [width])
    assert float(slope) == pytest.approx((of(16, 8, 1) - of(8, 8, 1)) / 8)
    assert grid.error(of, n=50).n == 50
    with pytest.raises(UnknownCostError, match="17"):
        grid.at(17, 4, 3)


def test_a_measured_layer_is_what_it_takes_beyond_an_empty_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(modules: list[nn.Module], args: tuple[Tensor, ...], *, runtime: str) -> list[Timing]:
        assert runtime == "onnxruntime"
        return [Timing.of([0.01 + sum(p.numel() for p in m.parameters()) * args[0].shape[-1]]) for m in modules]

    monkeypatch.setattr(hardware, "time_modules", timed)
    of = layer_latency("this-machine-onnxruntime", conv, lambda channels: (1, channels, 8, 8))
    assert of(2, 3, 1) == pytest.approx((2 * 3 + 3) * 8)
    with pytest.raises(ConfigurationError, match=r"layer_latency\('table.yaml'\)"):
        layer_latency("table.yaml", conv, lambda channels: (1, channels, 8, 8))
