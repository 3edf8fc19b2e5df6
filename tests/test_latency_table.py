"""Latency tables: what is read, what is refused, and what an architecture costs by them."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_spaces import architectures, random_space
from torch import Tensor, nn

from oneshot import CostModel, InputChoice, LatencyTable, LayerChoice, OnePath, Repeat, decisions, fixed_arch
from oneshot.cost import count_macs, count_params, price
from oneshot.errors import ConfigurationError, UnknownCostError
from oneshot.mutables import Mutable
from search_spaces.mobilenet import MobileNet, proxylessnas

PUBLISHED = Path(__file__).parent / "data" / "proxyless_mobile_trim.yaml"
X = torch.rand(1, 3)


def linear(rng: Random | None = None) -> nn.Module:
    return nn.Linear(3, 3)


def net() -> nn.Module:
    """A choice by name at path '0' with label 'first', one without label at '1', and what costs nothing to choose."""
    first = LayerChoice({"small": linear(), "large": linear()}, label="first")
    return nn.Sequential(first, LayerChoice({"small": linear(), "skip": nn.Identity()}), linear())


def of(model: nn.Module, rows: Mapping[str, Any], choices: Mapping[str, int]) -> float:
    return price(model, (X,), LatencyTable.read(rows)).of(choices)


# --- prices by candidate ----------------------------------------------------------------------------------------


def test_rows_for_any_choice() -> None:
    rows = {"small": 1.0, "large": 2.5, "skip": 0, "fixed": 10}
    costs = [of(net(), rows, {"first": i, "1": j}) for i in (0, 1) for j in (0, 1)]
    assert costs == [12.0, 11.0, 13.5, 12.5]


def test_rows_of_a_label_and_of_a_path_come_before_rows_for_any_choice() -> None:
    rows = {"small": 1.0, "large": 2.0, "skip": 0.0, "first": {"small": 4.0}, "1": {"small": 8.0}, "fixed": 0.0}
    assert of(net(), rows, {"first": 0, "1": 0}) == 12.0
    assert of(net(), rows, {"first": 1, "1": 1}) == 2.0
    # a path says more than a label
    assert of(net(), {**rows, "0": {"small": 16.0}}, {"first": 0, "1": 1}) == 16.0


def test_depths_indices_and_the_root_are_choices_like_others() -> None:
    row = Repeat([linear(), LayerChoice([linear(), nn.Identity()], label="inner")], depth=(0, 2), label="row")
    rows = {"row": {0: 0.0, 1: 1.0, "2": 2.0}, "inner": {"0": 8.0, "1": 4.0}, "fixed": 0}
    costs = [of(nn.Sequential(row), rows, {"row": d, "inner": k}) for d in range(3) for k in (0, 1)]
    assert costs == [0, 0, 1, 1, 10, 6]
    assert of(LayerChoice([linear(), nn.Identity()]), {"root": {"0": 3.0, "1": 1.0}, "fixed": 0}, {"root": 0}) == 3.0


def test_choosing_an_input_takes_no_time() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.choice = InputChoice(2, label="in")
            self.op = LayerChoice([nn.Identity()], label="op")

        def forward(self, x: Tensor) -> Tensor:
            return self.op(self.choice([x, x]))

    assert of(Net(), {"0": 2.0, "fixed": 1.0}, {"in": 0, "op": 0}) == 3.0


def test_what_is_decided_needs_no_row() -> None:
    with fixed_arch({"first": "small"}):
        done = LayerChoice({"small": linear(), "large": linear()}, label="first")
    model = nn.Sequential(done, LayerChoice({"a": linear(), "b": nn.Identity()}, label="open"))
    assert of(model, {"a": 2.0, "b": 1.0, "fixed": 0}, {"open": 0}) == 2.0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_price_is_the_sum_over_the_choices_that_run(seed: int) -> None:
    """The oracle pins each architecture, runs it, and adds up the rows of the mutables that it saw running."""
    model, rng = random_space(seed, linear), Random(seed)
    known = decisions(model)
    rows = {label: {str(option): rng.randint(1, 999) for option in d.options} for label, d in known.items()}
    cost = price(model, (X,), LatencyTable.read({**rows, "fixed": 0.0}))
    ran: list[str] = []
    for label, decision in known.items():
        for member in decision.members:
            if not isinstance(member, InputChoice):
                member.register_forward_hook(lambda *_, label=label: ran.append(label))
    for choices in architectures(model):
        for label, decision in known.items():
            decision.set_sampler(OnePath(choices[label]))
        ran.clear()
        model(X)
        due = sum(rows[label][str(known[label].options[choices[label]])] for label in ran)
        assert cost.of(choices) == due, choices


def test_a_missing_row_names_the_candidate_and_the_choice() -> None:
    with pytest.raises(UnknownCostError, match=r"no row for candidate 'large' of choice 'first'.*\['skip', 'small'\]"):
        of(net(), {"small": 1.0, "skip": 0.0, "fixed": 0.0}, {})
    with pytest.raises(UnknownCostError, match=r"no row for candidate 'skip' of choice '1'"):
        of(net(), {"first": {"small": 1.0, "large": 2.0}, "1": {"small": 1.0}, "fixed": 0.0}, {})


def test_a_table_without_fixed_warns() -> None:
    with pytest.warns(UserWarning, match="a mapping has no row 'fixed', so the layers outside .* are priced 0 ms"):
        assert of(net(), {"small": 1.0, "large": 2.0, "skip": 0.0}, {"first": 0, "1": 0}) == 2.0


# --- prices by operator -----------------------------------------------------------------------------------------


class Op(nn.Module):
    """Priced whole: 'op-input:3-output:n'."""

    def __init__(self, n: int, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.linear, self.inner = nn.Linear(3, n), inner or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.linear(x))

    def latency_key(self, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> str:
        return f"op-input:{input_shape[1]}-output:{output_shape[1]}"


OPERATORS = {"op-input:3-output:3": {"mean": 2.0, "count": 9}, "op-input:3-output:5": 5.0}


def test_operators_by_their_key() -> None:
    op = Op(3)
    model = nn.Sequential(op, LayerChoice({"op": op, "skip": nn.Identity()}, label="a"), nn.ReLU(), Op(5))
    assert [of(model, OPERATORS, {"a": k}) for k in (0, 1)] == [2 + 2 + 5, 2 + 5]
    assert of(model, {**OPERATORS, "fixed": 0.5}, {"a": 0}) == 9.5


def test_an_operator_without_row_names_its_key_and_path() -> None:
    with pytest.raises(
        UnknownCostError, match=r"no row 'op-input:3-output:4', which 1 needs; .*\['op-input:3-output:3'"
    ):
        of(nn.Sequential(Op(3), Op(4)), OPERATORS, {})
    with pytest.raises(UnknownCostError, match=r"no row 'op-input:3-output:4', which the network needs"):
        of(Op(4), OPERATORS, {})


def test_a_layer_that_no_key_covers_is_an_error_with_its_path_and_type() -> None:
    with pytest.raises(UnknownCostError, match=r"latency: 1\.0 is a Linear that no module with a latency_key"):
        of(nn.Sequential(Op(3), nn.Sequential(linear())), OPERATORS, {})
    with pytest.raises(UnknownCostError, match=r"latency: the network is a Linear"):
        of(linear(), OPERATORS, {})


def test_a_choice_inside_an_operator_is_an_error() -> None:
    inner = LayerChoice([linear(), nn.Identity()], label="inner")
    with pytest.raises(
        UnknownCostError, match=r"latency: 0 is a Op with one latency_key .*LayerChoice\(label='inner'\)"
    ):
        of(nn.Sequential(Op(3, inner)), OPERATORS, {})


# --- the published table ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet() -> MobileNet:
    return proxylessnas()


@pytest.fixture(scope="module")
def published(imagenet: MobileNet) -> CostModel:
    return price(imagenet, (torch.zeros(1, 3, 224, 224),), LatencyTable.read(PUBLISHED))


def test_published_table_of_the_paper(imagenet: MobileNet, published: CostModel) -> None:
    known = decisions(imagenet)
    uniform = {k: torch.full((len(d.options),), 1 / len(d.options), dtype=torch.float64) for k, d in known.items()}
    assert float(published.expected(uniform)) == pytest.approx(113.988129, abs=1e-6)
    assert published.of({k: d.options.index("k3e3") for k, d in known.items()}) == pytest.approx(76.048099, abs=1e-6)
    assert (published.name, published.unit, published.products) == ("latency_ms", "ms", [])


def test_published_operations_at_the_widths_of_the_table(imagenet: MobileNet, published: CostModel) -> None:
    """The operations of proxyless_mobile, block by block, in the search space, whose widths the table holds."""
    facts = json.loads((PUBLISHED.parent / "proxyless_mobile.json").read_text())
    blocks = facts["blocks"][1:]  # the first one is not searched
    names = ["skip" if block is None else f"k{block['kernel']}e{block['expand']}" for block in blocks]
    known = decisions(imagenet)
    choices = {label: d.options.index(name) for (label, d), name in zip(known.items(), names, strict=True)}
    image = (torch.zeros(1, 3, 224, 224),)
    assert published.of(choices) == pytest.approx(82.523860, abs=1e-6)
    assert count_params(imagenet).of(choices) == 4_073_520
    assert count_macs(imagenet, image).of(choices) == 304_227_008


def test_a_skip_is_free_and_every_other_candidate_is_not(imagenet: MobileNet, published: CostModel) -> None:
    for label, decision in decisions(imagenet).items():
        free = [name for name, ms in zip(decision.options, published.table[label], strict=True) if ms == 0]
        assert free == [name for name in decision.options if name == "skip"]


def test_a_width_that_was_not_measured_names_the_missing_key() -> None:
    narrow = proxylessnas(width_mult=0.5)
    key = "Conv-input:224x224x3-output:112x112x16"  # the stem: 32 channels halved
    with pytest.raises(UnknownCostError, match=rf"mobile_trim\.yaml has no row '{key}', which stem needs"):
        price(narrow, (torch.zeros(1, 3, 224, 224),), LatencyTable.read(PUBLISHED))


# Rows of the table that Once-for-All (arXiv 1908.09791) publishes for the Note 10 at 224 pixels.
ONCE_FOR_ALL = """
Conv-input:224x224x3-output:112x112x24:
  count: 500
  mean: 0.994418
  std: 0.01726798413249215
expanded_conv-input:28x28x48-output:28x28x48-expand:192-kernel:3-stride:1-idskip:1-se:1-hs:0:
  count: 94
  mean: 1.406712765957447
  std: 0.024504720492020148
expanded_conv-input:28x28x48-output:28x28x48-expand:192-kernel:7-stride:1-idskip:1-se:1-hs:0:
  count: 115
  mean: 2.6231304347826083
  std: 0.08631202462845568
"""


class MobileV3(nn.Module):
    """Priced whole, by the keys of Once-for-All."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(48, 48, kernel, padding=kernel // 2, groups=48)

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x)

    def latency_key(self, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> str:
        size = f"{input_shape[2]}x{input_shape[3]}x{input_shape[1]}"
        kernel = self.depthwise.kernel_size[0]
        return f"expanded_conv-input:{size}-output:{size}-expand:192-kernel:{kernel}-stride:1-idskip:1-se:1-hs:0"


def test_published_table_of_once_for_all(tmp_path: Path) -> None:
    (tmp_path / "ofa.yaml").write_text(ONCE_FOR_ALL, encoding="utf-8")
    table = LatencyTable.read(tmp_path / "ofa.yaml")
    assert table.by_key
    choice = LayerChoice({"k3": MobileV3(3), "k7": MobileV3(7), "skip": nn.Identity()}, label="block")
    cost = price(nn.Sequential(choice), (torch.zeros(1, 48, 28, 28),), table)
    assert [cost.of({"block": k}) for k in range(3)] == [1.40671276595745, 2.62313043478261, 0.0]


# --- what is refused --------------------------------------------------------------------------------------------

BAD_NUMBERS = {
    "nan": math.nan,
    "-1": -1,
    "inf": math.inf,
    "'1.0'": "1.0",
    "True": True,
    "None": None,
    "a list": [1.0],
    "an integer of 16610 bits": 10**5000,
}


@pytest.mark.parametrize("shown", BAD_NUMBERS)
def test_a_number_that_is_none_is_named_with_its_row(shown: str) -> None:
    bad = BAD_NUMBERS[shown]
    measured = {"format": "oneshot-latency", "version": 1, "unit": "ms"}
    where = {
        "large": {"small": 1.0, "large": bad},
        "first/large": {"first": {"small": 1.0, "large": bad}},
        "op-input:3-output:3/mean": {"op-input:3-output:3": {"mean": bad}},
        "op-input:3-output:5": {"op-input:3-output:5": bad},
        "0/small": {**measured, "fixed": 0.0, "places": {"0": {"small": bad}}},
    }
    if bad is not None:  # a table need not say what is fixed
        where["fixed"] = {"small": 1.0, "fixed": bad}
    for row, table in where.items():
        with pytest.raises(ConfigurationError) as caught:
            LatencyTable.read(table)
        expected = f"a mapping: row '{row}' is {shown}; a finite number of milliseconds >= 0 is needed"
        assert str(caught.value) == expected


MEASURED = {"format": "oneshot-latency", "version": 1, "unit": "ms", "fixed": 1.0, "places": {"0": {"a": 1.0}}}


def version_2(row: Any) -> dict[str, Any]:
    return {**MEASURED, "version": 2, "places": {"0": {"a": row}}}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "a mapping: the latency table has no rows"),
        ({"fixed": 1.0}, "a mapping: the latency table has no rows"),
        ({**MEASURED, "version": 3}, "version 3 in unit 'ms'; this library reads versions 1 and 2 in unit 'ms'"),
        ({**MEASURED, "version": True}, "version True in unit 'ms'"),
        ({**MEASURED, "version": None}, "version None in unit 'ms'"),
        ({**MEASURED, "unit": "s"}, "version 1 in unit 's'"),
        ({**MEASURED, "places": None}, "'places': a mapping of rows is needed, got nothing"),
        ({**MEASURED, "places": [1.0]}, "'places': a mapping of rows is needed, got a list"),
        ({**MEASURED, "places": {"0": 1.0}}, "'0': a mapping of rows is needed, got a float"),
        ({**MEASURED, "runtime": "here"}, "'runtime': a mapping of rows is needed, got a str"),
        ({**MEASURED, "runtime": 5}, "'runtime': a mapping of rows is needed, got a int"),
        ({**MEASURED, "places": {"0": {"a": {"median": 1.0}}}}, "row '0/a' is a dict"),  # not in version 1
        (version_2({}), "row '0/a' is None"),
        (version_2({"median": "1"}), "row '0/a' is '1'"),
        (version_2({"median": 1.0}), "row '0/a/n' is None; a number of repetitions >= 1"),
        (version_2({"median": 1.0, "iqr": 0.1, "n": 0}), "row '0/a/n' is 0"),
        (version_2({"median": 1.0, "iqr": 0.1, "n": 1.5}), "row '0/a/n' is 1.5"),
        (version_2({"median": 1.0, "iqr": 0.1, "n": True}), "row '0/a/n' is True"),
        (version_2({"median": 1.0, "iqr": -0.1, "n": 9}), "row '0/a/iqr' is -0.1"),
        (version_2({"median": 1.0, "n": 9}), "row '0/a/iqr' is None"),
        ({True: 1.0}, "row True is named by a bool; a name is text (YAML reads on, off, yes, no"),
        ({None: 1.0}, "row None is named by a NoneType"),
        ({"a": {1.5: 1.0}}, "'a': row 1.5 is named by a float"),
        ({16**5000: 1.0}, "row an integer of 20001 bits is named by a int"),
        ({1: 1.0, "1": 2.0}, "row '1' stands twice, as text and as a number"),
        ({"a": {"b": {"c": 1.0}}}, "row 'a/b' is a dict"),
        ({"op-input:3-output:3": {}}, "row 'op-input:3-output:3/mean' is None"),
        ({"format": "other", "a": 1.0}, "row 'format' is 'other'"),
    ],
)
def test_a_damaged_mapping(table: Mapping[Any, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        LatencyTable.read(table)
    assert message in str(caught.value)


DAMAGED = {
    "empty.yaml": ("", "a mapping of rows is needed, got nothing"),
    "empty.json": ("", "neither YAML nor JSON"),
    "list.yaml": ("- 1.0", "a mapping of rows is needed, got a list"),
    "text.json": ('"a"', "a mapping of rows is needed, got a str"),
    "broken.yaml": ("a: [1", "neither YAML nor JSON"),
    "broken.json": ('{"a": 1', "neither YAML nor JSON"),
    "nan.json": ('{"a": NaN}', "row 'a' is nan"),
    "nan.yaml": ("a: .nan", "row 'a' is nan"),
    "minus.yaml": ("a: {b: -1.0}", "row 'a/b' is -1.0"),
    "infinity.yaml": ("a: 1.0e+999", "row 'a' is inf"),
    "quoted.yaml": ("a: '1.0'", "row 'a' is '1.0'"),
    "bool.yaml": ("a: yes", "row 'a' is True"),
    "list_row.yaml": ("a: [1.0]", "row 'a' is a list"),
    "long.json": ('{"a": 1' + "0" * 5000 + "}", "neither YAML nor JSON: Exceeds the limit"),
    "long.yaml": ("a: 1" + "0" * 5000, "neither YAML nor JSON: Exceeds the limit"),
    "hexadecimal.yaml": ("a: 0x" + "f" * 5000, "row 'a' is an integer of 20000 bits"),
    "name.yaml": ("on: 1.0", "row True is named by a bool"),
    "date.yaml": ("2001-01-01: 1.0", "named by a date"),
    "no_date.yaml": ("a: 2001-99-99", "neither YAML nor JSON: month must be in 1..12"),
    "no_bool.yaml": ("a: !!bool maybe", "neither YAML nor JSON"),
    "no_int.yaml": ("a: !!int ''", "neither YAML nor JSON"),
    "no_time.yaml": ("a: !!timestamp maybe", "neither YAML nor JSON"),
    "twice.yaml": ("a: {b: 1.0, b: 2.0}", "neither YAML nor JSON: key 'b' stands twice in one mapping"),
    "twice.json": ('{"a": 1, "a": 2}', "neither YAML nor JSON: key 'a' stands twice in one mapping"),
    "endless.yaml": ("a: &a {b: *a}", "row 'a/b' is a dict"),
    "deep.yaml": ("[" * 3_000, "neither YAML nor JSON"),
    "deep.json": ("[" * 200_000, "neither YAML nor JSON"),
    "two.yaml": ("a: 1\n---\na: 1", "neither YAML nor JSON"),
    "tuple.yaml": ("? [a]\n: 1.0", "neither YAML nor JSON"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file(tmp_path: Path, name: str) -> None:
    text, message = DAMAGED[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError) as caught:
        LatencyTable.read(tmp_path / name)
    assert message in str(caught.value)
    assert name in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"missing\.yaml': No such file .* applied_hardware takes"):
        LatencyTable.read(tmp_path / "missing.yaml")
    with pytest.raises(ConfigurationError, match="Is a directory"):
        LatencyTable.read(str(tmp_path))
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigurationError, match="neither YAML nor JSON"):
        LatencyTable.read(tmp_path / "bytes.yaml")


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    for i, call in enumerate(("os.mkdir", "pathlib.Path.mkdir", "subprocess.check_output")):
        target, table = tmp_path / f"made{i}", tmp_path / f"table{i}.yaml"
        table.write_text(f"a: !!python/object/apply:{call} ['{target}']", encoding="utf-8")
        with pytest.raises(ConfigurationError, match="could not determine a constructor"):
            LatencyTable.read(table)
        assert not target.exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(
        ["", "a", "fixed", "places", "mean", "x-input:1", "oneshot-latency", "ms", "\ud800", "é", 10**400]
    )
    | st.text(max_size=5)
)
KEYS = st.sampled_from(
    ["format", "version", "unit", "places", "fixed", "runtime", "a", "b", "mean", "median", "iqr", "n", "x-input:1"]
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | SCALARS, inner, max_size=4),
    max_leaves=12,
)
HEADS = st.sampled_from([{}, *({"format": "oneshot-latency", "version": v, "unit": "ms"} for v in (1, 2))])
TABLES = st.builds(lambda head, rows: {**head, **rows}, HEADS, st.dictionaries(KEYS | SCALARS, TREES, max_size=5))


def numbers(table: LatencyTable) -> Iterator[float]:
    yield from table.anywhere.values()
    yield from itertools.chain.from_iterable(rows.values() for rows in table.by_place.values())
    yield 0.0 if table.fixed is None else table.fixed
    yield from (row["iqr"] for rows in table.spread.values() for row in rows.values())


def read_or_refused(source: Mapping[Any, Any] | Path) -> None:
    """Nothing else may happen; and what is read is milliseconds."""
    with contextlib.suppress(ConfigurationError):
        assert all(type(ms) is float and 0 <= ms < math.inf for ms in numbers(LatencyTable.read(source)))


@settings(max_examples=120, deadline=None)
@given(TABLES)
def test_any_mapping_is_read_or_refused(table: Mapping[Any, Any]) -> None:
    read_or_refused(table)


@settings(max_examples=100, deadline=None)
@given(table=TABLES, ending=st.sampled_from([".yaml", ".json"]), cut=st.none() | st.integers(0, 200))
def test_any_written_file_is_read_or_refused(
    folder: Path, table: Mapping[Any, Any], ending: str, cut: int | None
) -> None:
    plain = {key: value for key, value in table.items() if isinstance(key, str)}
    text = json.dumps(plain, default=str, skipkeys=True) if ending == ".json" else yaml.safe_dump(table)
    path = folder / f"table{ending}"
    path.write_bytes(text.encode("utf-8", "surrogatepass")[:cut])
    read_or_refused(path)


YAML_LIKE = st.text(alphabet="ab01.:-+e{}[],&*!?|>'\"# \n\t<=~_x", max_size=40)


@settings(max_examples=200, deadline=None)
@given(content=YAML_LIKE.map(str.encode) | st.binary(max_size=40), ending=st.sampled_from([".yaml", ".json"]))
@example(content=b"a: &b [&a [], *a]\nb: *b", ending=".yaml")
@example(content=b"<<: {a: 1}\n<<: {a: 2}", ending=".yaml")
@example(content=b"a: !!float ''", ending=".yaml")
@example(content=b"a: 1:99:99.5", ending=".yaml")
@example(content=b"a: 2001-01-01 00:00:00 +99:99", ending=".yaml")
def test_any_file_is_read_or_refused(folder: Path, content: bytes, ending: str) -> None:
    path = folder / f"raw{ending}"
    path.write_bytes(content)
    read_or_refused(path)


# --- written and read back --------------------------------------------------------------------------------------

NAMES = st.sampled_from(["", "0", "1.candidates.a", "fixed", "places", "on", "null", "1e3", "é", "a: b", "x-input:1"])
ROWS = st.dictionaries(NAMES | st.text(max_size=5), st.floats(0, 1e9), max_size=4)


SPREAD = st.none() | st.fixed_dictionaries({"iqr": st.floats(0, 1e9), "n": st.integers(1, 10**9)})


@settings(max_examples=60, deadline=None)
@given(
    places=st.dictionaries(NAMES | st.text(max_size=5), ROWS, max_size=4),
    fixed=st.none() | st.floats(0, 1e9),
    ending=st.sampled_from([".yaml", ".json"]),
    data=st.data(),
)
def test_what_is_written_is_read_back(
    folder: Path, places: dict[str, dict[str, float]], fixed: float | None, ending: str, data: st.DataObject
) -> None:
    drawn = {place: {name: data.draw(SPREAD) for name in rows} for place, rows in places.items()}
    some = {place: {name: row for name, row in rows.items() if row is not None} for place, rows in drawn.items()}
    spread = {place: rows for place, rows in some.items() if rows}
    table = LatencyTable(by_place=places, fixed=fixed, runtime={"machine": "this one", "threads": "1"}, spread=spread)
    table.write(folder / f"written{ending}")
    again = LatencyTable.read(folder / f"written{ending}")
    assert again.as_dict() == table.as_dict()
    assert (again.by_place, again.fixed, again.runtime, again.by_key) == (places, fixed, table.runtime, False)
    assert again.spread == spread


def test_version_1_and_2_as_files(tmp_path: Path) -> None:
    runtime = {"runtime": "torch 2.13.0", "threads": "1"}
    first = {**MEASURED, "runtime": runtime}
    second = {**version_2({"median": 1.0, "iqr": 0.25, "n": 40}), "runtime": runtime}
    for i, data in enumerate((first, second)):
        (tmp_path / f"{i}.json").write_text(json.dumps(data), encoding="utf-8")
    one, two = (LatencyTable.read(tmp_path / f"{i}.json") for i in (0, 1))
    assert (one.by_place, one.fixed, one.runtime) == (two.by_place, two.fixed, two.runtime)
    assert (one.spread, two.spread) == ({}, {"0": {"a": {"iqr": 0.25, "n": 40}}})
    assert two.as_dict() == second
    assert one.as_dict() == {**first, "version": 2}


def test_a_calibrated_table_prices_scale_times_ms_plus_offset() -> None:
    rows = {"small": 1.0, "large": 2.5, "first": {"small": 4.0}, "skip": 0.0, "fixed": 10.0}
    model, table = net(), LatencyTable.read(rows)
    before, after = (price(model, (X,), t) for t in (table, table.calibrated(1.5, -2.0)))
    for choices in architectures(model):
        assert after.of(choices) == pytest.approx(1.5 * before.of(choices) - 2.0, rel=1e-12)
    assert LatencyTable(anywhere={"a": 1.0}).calibrated(2.0, 0.5).fixed == 0.5
    measured = LatencyTable.read(version_2({"median": 1.0, "iqr": 0.25, "n": 40})).calibrated(2.0, 0.0)
    assert measured.spread == {"0": {"a": {"iqr": 0.5, "n": 40}}}
    keys = LatencyTable.read(OPERATORS).calibrated(2.0, 0.0)
    assert (keys.by_key, keys.anywhere) == (True, {"op-input:3-output:3": 4.0, "op-input:3-output:5": 10.0})


@pytest.mark.parametrize(
    ("scale", "offset"), [(0, 1), (-1, 100), (math.nan, 0), (1, -10.1), (math.inf, 0), (1, math.nan)]
)
def test_a_calibration_to_negative_times_is_refused(scale: float, offset: float) -> None:
    with pytest.raises(ConfigurationError, match=r"of a table with fixed=10\.0: fixed would be"):
        LatencyTable.read({"a": 1.0, "fixed": 10.0}).calibrated(scale, offset)


def test_only_a_table_by_choice_is_written(tmp_path: Path) -> None:
    for rows in ({"a": 1.0, "fixed": 0.0}, OPERATORS):
        with pytest.raises(ConfigurationError, match="only a table by choice is written"):
            LatencyTable.read(rows).write(tmp_path / "table.yaml")
    assert list(tmp_path.iterdir()) == []


def test_a_choice_that_is_called_fixed_keeps_its_rows(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fixed = LayerChoice([linear(), nn.Identity()])

        def forward(self, x: Tensor) -> Tensor:
            return self.fixed(x)

    LatencyTable(by_place={"fixed": {"0": 2.0, "1": 0.5}}, fixed=1.0).write(tmp_path / "table.json")
    cost = price(Net(), (X,), LatencyTable.read(tmp_path / "table.json"))
    assert [cost.of({"fixed": k}) for k in (0, 1)] == [3.0, 1.5]


def test_mutables_are_priced_and_not_searched_for_keys() -> None:
    """A mutable has alpha, a parameter of its own, and still needs no key."""
    model = nn.Sequential(LayerChoice([Op(3), Op(3)], label="a"))
    assert any(isinstance(m, Mutable) and m.alpha is not None for m in model.modules())
    assert [of(model, OPERATORS, {"a": k}) for k in (0, 1)] == [2.0, 2.0]
