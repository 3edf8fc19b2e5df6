"""The cost of widths between the measured ones: hand counts, scipy, finite differences, files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator
from torch import Tensor

from oneshot.cost.grid import GridError, WidthGrid
from oneshot.errors import ConfigurationError, UnknownCostError

# ms by in_channels (8, 16), out_channels (10, 20, 40) and kernel (3, 5)
SMALL = WidthGrid(
    (8, 16),
    (10, 20, 40),
    (3, 5),
    [[[1.0, 2.0], [2.0, 4.0], [6.0, 8.0]], [[3.0, 5.0], [4.0, 10.0], [12.0, 20.0]]],  # type: ignore[arg-type]
)
TIED = WidthGrid((8, 16, 32), None, (3,), [[[1.0]], [[3.0]], [[4.0]]])  # type: ignore[arg-type]


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "by_hand"),
    [
        ((12, 10, 3), 2.0),  # half way from 1 to 3
        ((8, 15, 3), 1.5),  # half way from 1 to 2
        ((8, 30, 3), 4.0),  # half way from 2 to 6
        ((10, 25, 3), 3.75),  # at 20: 2 + (4 - 2) / 4 = 2.5; at 40: 6 + (12 - 6) / 4 = 7.5; 2.5 + (7.5 - 2.5) / 4
        ((8, 10, 4), 1.5),  # half way from 1 to 2
        ((12, 15, 4), 3.875),  # the mean of the eight corners 1 2 2 4 3 5 4 10: 31 / 8
        ((16, 40, 5), 20.0),
    ],
)
def test_by_hand(widths: tuple[int, int, int], by_hand: float) -> None:
    assert SMALL.at(*widths).item() == by_hand


def test_a_layer_with_as_many_outputs_as_inputs() -> None:
    assert [TIED.at(width, None, 3).item() for width in (8, 12, 24, 32)] == [1.0, 2.0, 3.5, 4.0]
    assert TIED.at(12, 12, 3).item() == 2.0
    assert TIED.shape == (3, 1, 1)
    with pytest.raises(ConfigurationError, match=r"out_channels 16 and in_channels 12 differ; .* Give None"):
        TIED.at(12, 16, 3)
    with pytest.raises(ConfigurationError, match="out_channels is None; only a tied grid"):
        SMALL.at(12, None, 3)


def axis(most: int = 3000) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, most), min_size=2, max_size=5, unique=True).map(sorted)


@settings(max_examples=80, deadline=None)
@given(ins=axis(), outs=axis(), kernels=axis(), seed=st.integers(0, 2**20))
def test_scipy_interpolates_the_same(ins: list[int], outs: list[int], kernels: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.random((len(ins), len(outs), len(kernels))) * 10
    grid = WidthGrid(ins, outs, kernels, torch.tensor(values))
    widths = [rng.uniform(points[0], points[-1], 20) for points in (ins, outs, kernels)]
    oracle = RegularGridInterpolator((ins, outs, kernels), values)(np.stack(widths, axis=1))
    ours = grid.at(*(torch.tensor(width) for width in widths))
    torch.testing.assert_close(ours, torch.tensor(oracle), rtol=1e-10, atol=1e-10)


@settings(max_examples=15, deadline=None)
@given(ins=axis(), outs=axis() | st.none(), kernels=axis() | st.just([3]), seed=st.integers(0, 2**20))
def test_a_grid_point_is_exactly_its_value(
    ins: list[int], outs: list[int] | None, kernels: list[int], seed: int
) -> None:
    values = torch.rand(
        len(ins), len(outs or [0]), len(kernels), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    grid = WidthGrid(ins, outs, kernels, values)
    assert torch.equal(grid.values, values)
    for i, o, k in product(*map(range, grid.shape)):
        point = ins[i], None if outs is None else outs[o], kernels[k]
        assert grid.at(*point).item() == values[i, o, k].item()
        single = grid.at(*(None if x is None else torch.tensor(float(x)) for x in point))  # type: ignore[arg-type]
        assert single.dtype == torch.float32
        assert single.item() == values[i, o, k].float().item()


def test_what_is_linear_in_every_width_is_met_everywhere() -> None:
    grid = WidthGrid.fill(lambda i, o, k: (2 * i + 1) * (3 * o + 2) * (k + 5), [4, 60, 9], [1, 100], [1, 7])
    for i, o, k in [(5, 7, 2), (59, 99, 6), (33, 50, 4.5), (9, 1, 1)]:
        assert grid.at(i, o, k).item() == pytest.approx((2 * i + 1) * (3 * o + 2) * (k + 5), rel=1e-13)


def test_shapes_broadcast_and_types_are_kept() -> None:
    ins, outs = torch.tensor([[8.0], [12.0]]), torch.tensor([10.0, 15.0, 20.0])
    table = SMALL.at(ins, outs, 3)
    assert (table.shape, table.dtype) == ((2, 3), torch.float32)
    assert table.tolist() == [[1.0, 1.5, 2.0], [2.0, 2.5, 3.0]]
    assert SMALL.at(torch.tensor([8, 16]), 10, 3).dtype == torch.float64  # whole numbers have no precision to keep
    for half in (torch.bfloat16, torch.float16):
        assert SMALL.at(torch.tensor(8.0, dtype=half), 10, 3).dtype == torch.float32
    assert SMALL.at(torch.tensor(8.0), torch.tensor(10.0, dtype=torch.float64), 3).dtype == torch.float64
    assert SMALL.at(torch.zeros(0), 10, 3).shape == (0,)
    with pytest.raises(ConfigurationError, match="at: in_channels, kernel, out_channels are no numbers of shapes that"):
        SMALL.at(torch.zeros(2), torch.zeros(3), 3)
    with pytest.raises(ConfigurationError, match="are no numbers"):
        SMALL.at("8", 10, 3)  # type: ignore[arg-type]


# --- gradients ------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    grid = WidthGrid([4, 9, 30], [2, 8, 64], [1, 3, 7], torch.rand(3, 3, 3, generator=generator, dtype=torch.float64))
    # off the grid points, where there are two slopes
    ins, outs, kernels = torch.tensor([[4.5, 8.9, 17.0], [2.3, 7.0, 63.0], [1.5, 2.9, 6.9]], dtype=torch.float64)
    for widths in ((ins, outs, kernels), (ins[0], outs, kernels[1]), (ins[:, None], outs, kernels[2])):
        inputs = tuple(x.clone().requires_grad_() for x in widths)
        assert torch.autograd.gradcheck(grid.at, inputs)


def test_gradient_of_a_tied_layer_and_at_the_points() -> None:
    # slopes: (3 - 1) / 8 below 16 and (4 - 3) / 16 above; at a point, that of the cell above, at the last the one below
    width = torch.tensor([8.0, 12.0, 16.0, 24.0, 32.0], requires_grad=True)
    TIED.at(width, None, 3).sum().backward()
    assert width.grad is not None
    assert width.grad.tolist() == [0.25, 0.25, 0.0625, 0.0625, 0.0625]


def test_an_axis_of_one_point_has_no_slope() -> None:
    kernel = torch.tensor(3.0, requires_grad=True)
    TIED.at(12, None, kernel).backward()
    assert kernel.grad is not None
    assert kernel.grad.item() == 0.0


def test_a_width_is_learned_down_to_a_budget() -> None:
    """Gradient descent on a relaxed width reaches the width that costs 2 ms: 12, half way from 1 to 3."""
    width = torch.tensor(30.0, requires_grad=True, dtype=torch.float64)
    optimizer = torch.optim.SGD([width], lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        ((TIED.at(width.clamp(8, 32), None, 3) - 2.0) ** 2).backward()
        optimizer.step()
    assert width.item() == pytest.approx(12.0, abs=1e-6)


# --- outside --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((7, 10, 3), "in_channels 7 is outside the grid, 8 to 16"),
        ((16.5, 10, 3), "in_channels 16.5 is outside the grid, 8 to 16"),
        ((8, 41, 3), "out_channels 41 is outside the grid, 10 to 40"),
        ((8, 10, 7), "kernel 7 is outside the grid, 3 to 5"),
        ((8, 10, -3), "kernel -3 is outside the grid, 3 to 5"),
        ((math.nan, 10, 3), "in_channels nan is outside the grid, 8 to 16"),
        ((8, math.inf, 3), "out_channels inf is outside the grid, 10 to 40"),
        ((torch.tensor([8.0, 4.0, 17.0]), 10, 3), "in_channels 4, 17 is outside the grid, 8 to 16"),
        ((torch.arange(100), 10, 3), "in_channels 0, 1, 2, ... is outside the grid, 8 to 16"),
        ((torch.tensor([8.0, math.nan]), 10, 3), "in_channels nan is outside"),
    ],
)
def test_nothing_is_extrapolated(widths: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(UnknownCostError) as caught:
        SMALL.at(*widths)
    assert f"the width grid: {message}" in str(caught.value)
    assert "Keep the layer inside, or fill a grid that reaches as far" in str(caught.value)


def test_one_kernel_is_not_another() -> None:
    with pytest.raises(UnknownCostError, match="kernel 5 is outside the grid, 3 to 3"):
        TIED.at(8, None, 5)


# --- filled, and judged ---------------------------------------------------------------------------------------------


def test_filled_at_every_point_once(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[int, int, int]] = []

    def cost_of(i: int, o: int, k: int) -> float:
        asked.append((i, o, k))
        return i + o / 100 + k / 10_000

    grid = WidthGrid.fill(cost_of, [16, 8], range(1, 4), [5, 3], runtime={"device": "this one"})
    assert asked == list(product((8, 16), (1, 2, 3), (3, 5)))
    assert (grid.in_channels, grid.out_channels, grid.kernel) == ((8, 16), (1, 2, 3), (3, 5))
    assert grid.at(16, 2, 3).item() == 16.0203
    assert grid.runtime == {"device": "this one"}
    asked.clear()
    tied = WidthGrid.fill(cost_of, [8, 16], None, [3], progress=False)
    assert asked == [(8, 8, 3), (16, 16, 3)]
    assert tied.out_channels is None
    assert capsys.readouterr() == ("", "")  # no terminal, no bar
    WidthGrid.fill(cost_of, [8], [1], [3], progress=True)
    assert "width grid" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, None, True, "1"])
def test_a_cost_that_is_none_names_its_point(bad: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"the given function: row 'cost_of\(16, 4, 3\)' is"):
        WidthGrid.fill(lambda i, o, k: bad if i == 16 else 1.0, [8, 16], [4], [3])


def test_error_by_hand() -> None:
    """The cost i * i between 2 and 6 is seen as the line 4 + 8 (i - 2): 12 for 9, 20 for 16, 28 for 25."""
    grid = WidthGrid.fill(lambda i, o, k: i * i, [2, 6], [3], [1])
    asked: list[tuple[int, int, int]] = []

    def truth(i: int, o: int, k: int) -> float:
        asked.append((i, o, k))
        return i * i

    error = grid.error(truth)
    assert sorted(asked) == [(3, 3, 1), (4, 3, 1), (5, 3, 1)]
    assert error.n == 3
    assert error.mean == pytest.approx((3 / 9 + 4 / 16 + 3 / 25) / 3)
    assert error.maximum == pytest.approx(3 / 9)
    assert (error.worst, error.worst_grid_ms, error.worst_true_ms) == ((3, 3, 1), 12.0, 9.0)
    assert error.within_10_percent == 0.0
    assert "3 points off the grid: error 23.4 % on average, at most 33.3 % at (3, 3, 1): 12 ms, not 9;" in str(error)


def test_share_within_ten_percent() -> None:
    """A grid of 1 ms everywhere: what takes 1.1 ms is 9.1 % off, what takes 1.2 ms 16.7 %."""
    grid = WidthGrid.fill(lambda i, o, k: 1.0, [1, 6], [1], [1])
    error = grid.error(lambda i, o, k: 1.1 if i < 5 else 1.2)  # 2, 3, 4 and 5
    assert error.within_10_percent == 0.75


@settings(max_examples=30, deadline=None)
@given(
    ins=axis(9) | axis(), outs=axis(9) | axis() | st.none(),
    kernels=st.sampled_from([[3], [3, 5], [1, 7], [1, 2, 4], [2, 6]]), n=st.integers(1, 60), seed=st.integers(0, 99),
)  # fmt: skip
def test_points_off_the_grid(ins: list[int], outs: list[int] | None, kernels: list[int], n: int, seed: int) -> None:
    grid = WidthGrid.fill(lambda i, o, k: i + o + k, ins, outs, kernels)
    asked: list[tuple[int, int, int]] = []

    def truth(i: int, o: int, k: int) -> float:
        asked.append((i, o, k))
        return i + o + k

    step = 2 if len({k % 2 for k in kernels}) == 1 else 1
    widths = (ins[-1] - ins[0] + 1) * (1 if outs is None else outs[-1] - outs[0] + 1)
    total = widths * len(range(kernels[0], kernels[-1] + 1, step)) - math.prod(grid.shape)
    assume(total > 0)
    error = grid.error(truth, n, seed)
    assert error.n == len(set(asked)) == len(asked) == min(n, total)
    assert error.maximum < 1e-12  # the cost is linear
    for i, o, k in asked:
        assert ins[0] <= i <= ins[-1]
        assert i == o if outs is None else outs[0] <= o <= outs[-1]
        assert k in range(kernels[0], kernels[-1] + 1, step)
        assert not (i in ins and (outs is None or o in outs) and k in kernels)
    first, again = list(asked), asked.clear()
    assert grid.error(truth, n, seed) == error
    assert (asked, again) == (first, None)  # one seed, one choice of points


def test_error_at_multiples_only() -> None:
    """From 8 to 64 there are 8 multiples of 8; 8 * 8 * 1 points, less the 2 * 3 of the grid, are 58."""
    grid = WidthGrid.fill(lambda i, o, k: i * o, [8, 64], [8, 24, 64], [3])
    asked: list[tuple[int, int, int]] = []

    def truth(i: int, o: int, k: int) -> float:
        asked.append((i, o, k))
        return i * o

    assert grid.error(truth, 100, multiple_of=8).n == 58
    assert {(i % 8, o % 8) for i, o, _ in asked} == {(0, 0)}
    with pytest.raises(ConfigurationError, match="multiple_of is 0; at least 1"):
        grid.error(truth, multiple_of=0)


def test_no_error_can_be_measured() -> None:
    whole = WidthGrid.fill(lambda i, o, k: 1.0, [3, 4, 5], [1], [3, 5])  # a kernel of 4 is none of its kind
    with pytest.raises(ConfigurationError, match="every such width from the first to the last point is on the grid"):
        whole.error(lambda i, o, k: 1.0)
    grid = WidthGrid.fill(lambda i, o, k: 1.0, [3, 5], [1], [3])
    with pytest.raises(ConfigurationError, match=r"cost_of\(4, 1, 3\) is 0 ms; an error relative to it"):
        grid.error(lambda i, o, k: 0.0)
    with pytest.raises(ConfigurationError, match=r"row 'cost_of\(4, 1, 3\)' is nan"):
        grid.error(lambda i, o, k: math.nan)
    with pytest.raises(ConfigurationError, match="n is 0; at least one"):
        grid.error(lambda i, o, k: 1.0, n=0)
    assert grid.error(lambda i, o, k: 1.0) == GridError(1, 0.0, 0.0, (4, 1, 3), 1.0, 1.0, 1.0)


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grids")


@settings(max_examples=15, deadline=None)
@given(
    ins=axis(), outs=axis() | st.none(), kernels=axis(), seed=st.integers(0, 2**20),
    runtime=st.dictionaries(st.sampled_from(["device", "on", "é", "1"]), st.text(max_size=5), max_size=2),
    ending=st.sampled_from([".json", ".yaml"]),
)  # fmt: skip
def test_what_is_written_is_read_back(
    folder: Path, ins: list[int], outs: list[int] | None, kernels: list[int], seed: int, runtime: Any, ending: str
) -> None:
    rng = np.random.default_rng(seed)
    values = torch.tensor(rng.random((len(ins), len(outs or [0]), len(kernels))) * 10.0 ** rng.integers(-9, 9))
    grid, path = WidthGrid(ins, outs, kernels, values, runtime), folder / f"grid{ending}"
    grid.write(path)
    again = WidthGrid.read(path)
    assert again.as_dict() == grid.as_dict() == WidthGrid.read(json.loads(json.dumps(grid.as_dict()))).as_dict()
    assert torch.equal(again.values, values)
    assert (again.in_channels, again.kernel, again.runtime) == (tuple(ins), tuple(kernels), runtime)
    assert again.out_channels == (None if outs is None else tuple(outs))
    assert [entry.name for entry in folder.iterdir() if "tmp" in entry.name] == []


GOOD: dict[str, Any] = {
    "format": "oneshot-width-grid",
    "version": 1,
    "unit": "ms",
    "in_channels": [8, 16],
    "out_channels": [4],
    "kernel": [3],
    "values": [[[1.0]], [[2.0]]],
}
BAD: dict[str, tuple[Mapping[Any, Any], str]] = {
    "another format": ({"format": "oneshot-latency"}, "format 'oneshot-latency', version 1, unit 'ms'; this library"),
    "a newer version": ({"version": 2}, "version 2, unit 'ms'; this library reads 'oneshot-width-grid', version 1"),
    "version of bool": ({"version": True}, "version True"),
    "seconds": ({"unit": "s"}, "unit 's'"),
    "an unknown key": ({"kernels": [3]}, "keys: 'kernels'; a width grid has format, version"),
    "no axis": ({"kernel": ...}, "keys: no kernel"),
    "no axis of outputs": ({"out_channels": ...}, "keys: no out_channels"),
    "no values": ({"values": ...}, "keys: no values"),
    "runtime": ({"runtime": [1]}, "'runtime' is a list"),
    "runtime of numbers": ({"runtime": {"threads": 1}}, "'runtime' is a mapping of texts to texts"),
    "an empty axis": ({"in_channels": []}, "in_channels is a list; a list of at least one whole number is needed"),
    "an axis of None": ({"in_channels": None}, "in_channels is None; a list of"),
    "an axis of text": ({"in_channels": "8"}, "in_channels is '8'; a list of"),
    "an axis of one number": ({"kernel": 3}, "kernel is 3; a list of"),
    "a width twice": ({"in_channels": [8, 8]}, "in_channels: 8 stands twice"),
    "widths that descend": ({"in_channels": [16, 8]}, "in_channels: 16 stands before 8; the points ascend"),
    "a width of float": ({"in_channels": [8, 16.0]}, "in_channels has 16.0; whole numbers from 1 to"),
    "a width of bool": ({"in_channels": [True, 16]}, "in_channels has True; whole numbers"),
    "a width of zero": ({"out_channels": [0]}, "out_channels has 0; whole numbers from 1"),
    "a width too large": ({"out_channels": [10**40]}, "out_channels has an integer of 133 bits"),
    "a row too few": ({"values": [[[1.0]]]}, "values: 1 items, where the axis in_channels has 2 points"),
    "a row too many": ({"values": [[[1.0]]] * 3}, "values: 3 items, where the axis in_channels has 2 points"),
    "a short row": ({"values": [[[1.0]], []]}, "a row of values: 0 items, where the axis out_channels has 1"),
    "a short column": ({"values": [[[1.0]], [[]]]}, "a column of values: 0 items, where the axis kernel has 1"),
    "flat values": ({"values": [1.0, 2.0]}, "a row of values: 1.0, where the axis out_channels has 1 points"),
    "deep values": ({"values": [[[1.0]], [[[2.0]]]]}, "row 'values/1' is a list; a finite number"),
    "values of text": ({"values": "12"}, "values: '12', where the axis"),
    "nan": ({"values": [[[1.0]], [[math.nan]]]}, "row 'values/1' is nan; a finite number of milliseconds >= 0"),
    "inf": ({"values": [[[math.inf]], [[1.0]]]}, "row 'values/0' is inf"),
    "minus": ({"values": [[[-1.0]], [[1.0]]]}, "row 'values/0' is -1.0"),
    "a value of bool": ({"values": [[[True]], [[1.0]]]}, "row 'values/0' is True"),
    "a value of None": ({"values": [[[None]], [[1.0]]]}, "row 'values/0' is None"),
    "a tied grid with outputs": (
        {"out_channels": None, "values": [[[1.0], [2.0]], [[3.0], [4.0]]]},
        "a row of values: 2 items, where the axis out_channels has 1 points (a tied one has 1)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_grid(case: str, tmp_path: Path) -> None:
    changes, message = BAD[case]
    data = {key: value for key, value in {**GOOD, **changes}.items() if value is not ...}
    assert WidthGrid.read(GOOD).at(12, 4, 3).item() == 1.5
    with pytest.raises(ConfigurationError) as caught:
        WidthGrid.read(data)
    assert message in str(caught.value)
    assert str(caught.value).startswith("the width grid: ")
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(ConfigurationError) as caught:
        WidthGrid.read(tmp_path / "grid.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "grid.yaml"))


def test_a_grid_that_is_made_by_hand_is_checked_as_a_file_is() -> None:
    for values in (torch.ones(2, 1), torch.ones(2, 1, 2), torch.tensor(1.0), torch.full((2, 1, 1), math.nan)):
        with pytest.raises(ConfigurationError, match="values"):
            WidthGrid((8, 16), (4,), (3,), values)
    with pytest.raises(ConfigurationError, match=r"kernel has 3\.0"):
        WidthGrid((8, 16), (4,), (3.0,), torch.ones(2, 1, 1))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="fill: in_channels: 8 stands twice"):
        WidthGrid.fill(lambda i, o, k: 1.0, [8, 4, 8], None, [3])
    with pytest.raises(ConfigurationError, match="fill: kernel has 'a'"):
        WidthGrid.fill(lambda i, o, k: 1.0, [8], None, [3, "a"])  # type: ignore[list-item]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.json"):
        with pytest.raises(ConfigurationError, match="there is no such file"):
            WidthGrid.read(path)
    endless = yaml.safe_dump({**GOOD, "out_channels": [4, 8], "kernel": [3, 5], "values": None})
    endless = endless.replace("values: null", "values: &v [*v, *v]")
    texts = {
        "list.yaml": ("- 1", "a mapping with the keys format, version, .* is needed, got a list"),
        "empty.yaml": ("", "is needed, got None"),
        "broken.json": ('{"format": ', "neither YAML nor JSON"),
        "twice.json": ('{"kernel": [3], "kernel": [5]}', "key 'kernel' stands twice in one mapping"),
        "code.yaml": ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        "endless.yaml": (endless, "row 'values/0' is a list"),
    }
    for name, (text, message) in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(ConfigurationError, match=message):
            WidthGrid.read(tmp_path / name)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=8)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from([*GOOD, "runtime"]), TREES | st.just([[[1.0]], [[2.0]]]), max_size=3))
def test_any_mapping_is_read_or_refused(changes: dict[str, Any]) -> None:
    try:
        grid = WidthGrid.read({**GOOD, **changes})
    except ConfigurationError:
        return
    corner: Tensor = grid.at(grid.in_channels[0], grid.out_channels and grid.out_channels[0], grid.kernel[0])
    assert 0 <= corner.item() < math.inf
