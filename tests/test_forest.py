"""Forests read from pickles: the same numbers as scikit-learn's own, and nothing of a hostile file is run."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pickle
import pickletools
import struct
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.ensemble import ExtraTreesRegressor, RandomForestRegressor
from sklearn.linear_model import LinearRegression
from sklearn.tree import DecisionTreeRegressor
from sklearn.tree._tree import Tree

from oneshot.cost.nn_meter import restricted_pickle
from oneshot.cost.nn_meter.forest import Forest
from oneshot.errors import ConfigurationError, UnsafePickleError

DATA = Path(__file__).resolve().parent / "data"
TINY = sorted((DATA / "nn_meter_tiny").glob("*.pkl"))
PYTHON27 = sorted((DATA / "forest_python27").glob("*.pkl"))
VARIANTS = Path(__file__).resolve().parents[2] / "shared" / "data" / "nn_meter" / "pkl_variants"
RECONSTRUCT = np.zeros(0).__reduce__()[0]  # numpy's own function for arrays


def refused(source: Path | bytes, *words: str) -> str:
    with pytest.raises(UnsafePickleError) as caught:
        Forest.from_pickle(source)
    message = str(caught.value)
    for word in (*words, str(source) if isinstance(source, Path) else "the given bytes", "Nothing of it was run"):
        assert word in message, message
    return message


# --- the same numbers ---------------------------------------------------------------------------------------------


def check(path: Path, expected: Path, tmp_path: Path) -> Forest:
    """Equal to what the scikit-learn that wrote the file predicted, also after a turn through .npz."""
    forest, known = Forest.from_pickle(path), np.load(expected)
    np.testing.assert_array_equal(forest.predict(known["X"]), known["y"])
    np.testing.assert_array_equal(forest.predict(known["X"].tolist()), known["y"])
    forest.save(tmp_path / "forest.npz")
    np.testing.assert_array_equal(Forest.load(tmp_path / "forest.npz").predict(known["X"]), known["y"])
    return forest


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.stem)
def test_kernel_forests_of_scikit_learn_0231(path: Path, tmp_path: Path) -> None:
    forest = check(path, path.with_suffix(".expected.npz"), tmp_path)
    report = json.loads((path.parent / "report.json").read_text())["kernels"][path.stem]
    assert (forest.n_trees, forest.n_nodes) == (report["trees"], report["nodes"])
    assert forest.sklearn_version == "0.23.1"


@pytest.mark.parametrize("path", PYTHON27, ids=lambda path: path.stem)
def test_forests_of_scikit_learn_018_under_python_27(path: Path, tmp_path: Path) -> None:
    forest = check(path, path.with_name("expected.npz"), tmp_path)
    assert (forest.sklearn_version, forest.n_features, forest.n_trees) == ("0.18.2", 3, 3)


def test_the_stored_forests_are_there() -> None:
    assert (len(TINY), len(PYTHON27)) == (16, 3)


def test_versions_and_protocols(tmp_path: Path) -> None:
    paths = sorted(VARIANTS.glob("*.pkl"))
    if not paths:
        pytest.skip(f"no {VARIANTS}: the forests of five versions are not part of the repository")
    versions = {check(path, path.with_suffix(".expected.npz"), tmp_path).sklearn_version for path in paths}
    assert versions == {"0.20.4", "0.23.1", "1.2.2", "1.5.0", "1.9.1"}


RANDOM_STATES: dict[str, Callable[[], Any]] = {
    "int": lambda: 1,
    "None": lambda: None,
    "RandomState(int)": lambda: np.random.RandomState(1),
    "RandomState(MT19937)": lambda: np.random.RandomState(np.random.MT19937(1)),
    "RandomState(PCG64)": lambda: np.random.RandomState(np.random.PCG64(1)),
}


def fitted(seed: int, kind: type = RandomForestRegressor, random_state: Any = 1, **arguments: Any) -> Any:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 30, (40, 3)) * rng.choice([0.1, 1.0, 1e4], 3)
    y = rng.choice([0.0, 1.0]) * rng.random(40) * x[:, 0] + rng.random()  # may be constant: a tree of one leaf
    return kind(3, random_state=random_state, **arguments).fit(x, y)


def hard_rows(forest: Any, seed: int) -> np.ndarray:
    """Random rows, and rows that stand exactly on a threshold, or the next float32 above or below."""
    rng = np.random.default_rng(seed)
    thresholds = np.concatenate([tree.tree_.threshold for tree in forest.estimators_])
    on = rng.choice(thresholds, (60, 3)).astype(np.float32)
    return np.concatenate([on, np.nextafter(on, np.float32(np.inf)), np.nextafter(on, np.float32(-np.inf))])


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    kind=st.sampled_from([RandomForestRegressor, ExtraTreesRegressor]),
    random_state=st.sampled_from(sorted(RANDOM_STATES)),
    n_jobs=st.sampled_from([None, 1, 2]),
    max_depth=st.sampled_from([None, 1, 4]),
    max_leaf_nodes=st.sampled_from([None, 5]),  # then nodes are numbered best first, not depth first
    protocol=st.integers(0, 5),
)
def test_forests_of_the_installed_scikit_learn(
    seed: int, kind: type, random_state: str, n_jobs: int | None, protocol: int, **sizes: int | None
) -> None:
    forest = fitted(seed, kind, RANDOM_STATES[random_state](), n_jobs=n_jobs, **sizes)
    forest.feature_names_in_ = np.array(["height", "width", "channels"], dtype=object)  # as after a fit to a table
    ours = Forest.from_pickle(pickle.dumps(forest, protocol))
    forest.n_jobs = 1  # several threads add the trees up in any order
    rows = hard_rows(forest, seed)
    del forest.feature_names_in_
    np.testing.assert_array_equal(ours.predict(rows), forest.predict(rows))


@pytest.mark.parametrize("protocol", range(6))
def test_numpy_numbers_as_arguments(protocol: int) -> None:
    forest = fitted(0, max_depth=np.int64(3), max_features=np.float64(0.5))
    forest.n_outputs_ = np.int32(1)
    forest.n_features_in_ = np.int64(3)
    ours = Forest.from_pickle(pickle.dumps(forest, protocol))
    assert (ours.n_features, ours.sklearn_version) == (3, importlib.import_module("sklearn").__version__)


def test_a_forest_that_saw_missing_values_prices_complete_rows() -> None:
    """Trees that ask "missing or not" have an infinite threshold."""
    x = np.random.default_rng(0).random((60, 2))
    x[::3, 0] = np.nan
    forest = RandomForestRegressor(5, random_state=0).fit(x, np.isnan(x[:, 0]) * 3.0 + x[:, 1])
    assert any(np.isinf(tree.tree_.threshold).any() for tree in forest.estimators_)
    rows = np.random.default_rng(1).random((50, 2))
    np.testing.assert_array_equal(Forest.from_pickle(pickle.dumps(forest)).predict(rows), forest.predict(rows))


def test_many_rows_in_blocks_are_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    forest, rows = Forest.from_pickle(TINY[0]), np.load(TINY[0].with_suffix(".expected.npz"))["X"]
    whole = forest.predict(rows)
    monkeypatch.setattr("oneshot.cost.nn_meter.forest._LANES", 5 * forest.n_trees + 1)
    np.testing.assert_array_equal(forest.predict(rows), whole)
    np.testing.assert_array_equal([forest.predict([row])[0] for row in rows], whole)


def test_scikit_learn_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*filter(lambda name: name.split(".")[0] == "sklearn", sys.modules), "sklearn"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        importlib.import_module("sklearn")
    assert Forest.from_pickle(TINY[0]).predict([[8.0] * 3]).shape == (1,)


# --- a forest written by hand -------------------------------------------------------------------------------------


class Said:
    """Pickled as a call of any function with any arguments, and a state."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.said = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.said


NODE = np.dtype([("left_child", "<i8"), ("right_child", "<i8"), ("feature", "<i8"), ("threshold", "<f8"), ("n", "<i8")])
# node 0: x0 <= 1 ? node 1 : node 4.    node 1: x1 <= 2 ? node 2 : node 3.    A leaf has children -1 and feature -2.
NODES = np.array(
    [(1, 4, 0, 1.0, 9), (2, 3, 1, 2.0, 5), (-1, -1, -2, -2.0, 3), (-1, -1, -2, -2.0, 2), (-1, -1, -2, -2.0, 4)], NODE
)
VALUES = np.arange(5.0).reshape(5, 1, 1)


def tree(nodes: Any = NODES, values: Any = VALUES, n_features: Any = 2) -> Said:
    state = {"max_depth": 2, "node_count": 5, "nodes": nodes, "values": values}
    return Said(Tree, n_features, np.array([1]), 1, state=state)


def forest_pickle(*trees: Any, protocol: int = 4, **state: Any) -> bytes:
    estimators = [Said(DecisionTreeRegressor, state={"tree_": made}) for made in trees]
    state = {"estimators_": estimators, "n_outputs_": 1, "_sklearn_version": "1.0", **state}
    return pickle.dumps(Said(RandomForestRegressor, state=state), protocol)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_two_trees_by_hand(protocol: int) -> None:
    swapped = np.array([(1, 2, 1, 2.0, 9), (-1, -1, -2, -2.0, 3), (-1, -1, -2, -2.0, 6)], NODE)  # x1 <= 2 ? 10 : 20
    both = forest_pickle(tree(), tree(swapped, np.array([0.0, 10, 20]).reshape(3, 1, 1)), protocol=protocol)
    # (0, 0): leaf 2, 10.  (1, 2.5): leaf 3, 20.  (1.001, 2): leaf 4, 10.
    forest = Forest.from_pickle(both)
    np.testing.assert_array_equal(forest.predict([(0, 0), (1, 2.5), (1.001, 2)]), [6.0, 11.5, 7.0])
    assert (forest.n_features, forest.n_trees, forest.n_nodes) == (2, 2, 8)
    np.testing.assert_array_equal(forest.roots, [0, 5])


def test_other_widths_and_byte_orders_of_the_numbers() -> None:
    other = [(name, code) for name, code in zip(NODE.names, (">i4", "<i4", ">i8", ">f8", "|u1"), strict=True)]
    forest = Forest.from_pickle(forest_pickle(tree(NODES.astype(other), VALUES.astype(">f8"))))
    np.testing.assert_array_equal(forest.predict([(0, 0), (1, 2.5), (1.001, 2)]), [2.0, 3.0, 4.0])


def test_a_float32_on_the_threshold_goes_left_and_a_float64_above_it_may() -> None:
    """0.1 as float32 is 0.100000001490...: above a threshold of 0.1, although the row says 0.1."""
    nodes = NODES.copy()
    nodes["threshold"][0] = 0.1
    forest = Forest.from_pickle(forest_pickle(tree(nodes)))
    np.testing.assert_array_equal(forest.predict([(0.1, 0), (0.0999999, 0)]), [4.0, 2.0])
    nodes["threshold"][0] = np.float32(0.1)
    forest = Forest.from_pickle(forest_pickle(tree(nodes)))
    np.testing.assert_array_equal(forest.predict([(0.1, 0), (0.1 + 1e-12, 0)]), [2.0, 2.0])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1.0, 2.0, 3.0]], r"rows of shape \(1, 3\); this forest takes \(rows, 2\)"),
        ([1.0, 2.0], r"rows of shape \(2,\)"),
        ([[1.0, 2.0], [1.0, np.nan]], "feature 1 of row 1 is nan"),
        ([[np.inf, 2.0]], "feature 0 of row 0 is inf"),
        ([[1e39, 2.0]], r"feature 0 of row 0 is 1e\+39; .* up to 3.4e\+38"),
        ([[1.0], [1.0, 2.0]], "no table of numbers"),
        ([["a", "b"]], "no table of numbers"),
        ([[10**400, 1]], "no table of numbers"),
        (None, "no table of numbers|rows of shape"),
    ],
)
def test_rows_that_no_forest_can_price(rows: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Forest.from_pickle(forest_pickle(tree())).predict(rows)


def test_no_rows() -> None:
    forest = Forest.from_pickle(forest_pickle(tree()))
    assert [forest.predict(rows).shape for rows in ([], np.zeros((0, 2)))] == [(0,), (0,)]


def changed(field: str, node: int, value: float) -> np.ndarray:
    nodes = NODES.copy()
    nodes[field][node] = value
    return nodes


CORRUPT: dict[str, tuple[Any, str]] = {
    "a cycle": (changed("left_child", 1, 0), "node 1 of a tree is damaged: its child 0 is not a later one of 5 nodes"),
    "a self loop": (changed("left_child", 1, 1), "its child 1 is not a later one"),
    "a self loop to the right": (changed("right_child", 1, 1), "its child 1 is not a later one"),
    "a child out of range": (changed("right_child", 0, 99), "its child 99 is not a later one"),
    "a child beyond 32 bits": (changed("right_child", 0, 2**32 + 4), "its child 4294967300 is not"),
    "a negative child": (changed("left_child", 0, -7), "its child -7 is not a later one"),
    "half a leaf": (changed("right_child", 2, 3), "node 2 of a tree is damaged: it is a leaf and has the child 3"),
    "the other half": (changed("left_child", 2, 3), "node 2 of a tree is damaged"),
    "two parents": (changed("right_child", 0, 3), "node 3 of a tree is damaged: it is the child of 2 nodes"),
    "no parent": (np.append(NODES, NODES[4:]), "node 5 of a tree is damaged: it is the child of 0 nodes"),
    "a feature out of range": (changed("feature", 0, 2), "feature 2 of rows of 2"),
    "a negative feature": (changed("feature", 0, -1), "its feature is -1"),
    "a feature beyond 16 bits": (changed("feature", 0, 2**16), "its feature is 65536"),
    "a threshold that is none": (changed("threshold", 0, np.nan), "its threshold is nan"),
    "no nodes": (NODES[:0], "a tree without nodes"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_a_corrupt_tree(case: str) -> None:
    nodes, message = CORRUPT[case]
    refused(forest_pickle(tree(), tree(nodes, np.zeros((len(nodes), 1, 1)))), message)


RAW = NODES.tobytes()


def array(shape: Any, dtype: Any, data: Any) -> Said:
    return Said(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, shape, dtype, False, data))


def dtype(code: str, *state: Any) -> Said:
    return Said(np.dtype, code, False, True, state=state)


def fields(**parts: Any) -> Said:
    return dtype("V40", 3, "|", None, tuple(parts), parts, 40, 1, 0)


PLAIN = ("<", None, None, None, -1, -1, 0)
DAMAGED: dict[str, tuple[Any, str]] = {
    "objects as nodes": (np.array([None] * 5, dtype=object), "no table"),
    "objects in the nodes": (NODES.astype([*NODE.descr[:4], ("n", object)]), "comes with"),
    "objects as a field": (NODES.astype([("left_child", object), *NODE.descr[1:]]), "numbers of type 'O8'"),
    "nodes without children": (NODES[["feature", "threshold"]].copy(), "no field 'left_child'"),
    "children that are floats": (NODES.astype([("left_child", "<f8"), *NODE.descr[1:]]), "'f8'; a forest has i8 or i4"),
    "a matrix of nodes": (NODES.reshape(5, 1), "the shape (5, 1), not (nodes,)"),
    "more nodes than values": (np.append(NODES, NODES), "10 nodes have values of shape (5, 1, 1)"),
    "a list as nodes": (NODES.tolist(), "the nodes of a tree are no array"),
    "a shape that is claimed": (array((2**40,), NODE, RAW), "an array of 43,980,465,111,040 bytes comes with 200"),
    "a shape beyond 64 bits": (array((2**70,), NODE, RAW), "an array of 2**63 or more bytes comes with 200"),
    "a negative shape": (array((-5,), NODE, RAW), "no array of numbers"),
    "a shape of text": (array(("5",), NODE, RAW), "no array of numbers"),
    "a shape of bool": (array((True,), NODE, RAW[:40]), "no array of numbers"),
    "no shape": (array(None, NODE, RAW), "no array of numbers"),
    "a short state": (Said(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (5,))), "no array of numbers"),
    "data that is a list": (array((5,), NODE, [0] * 200), "comes with list"),
    "text beyond latin-1": (array((5,), NODE, "€" * 200), "other characters"),
    "no dtype": (array((5,), None, RAW), "without a type of its numbers"),
    "a dtype without state": (array((5,), Said(np.dtype, "V40", False, True), RAW), "incomplete"),
    "a dtype without fields": (array((5,), dtype("V40", 3, "|", *PLAIN[1:]), RAW), "no table"),
    "a dtype of 2 GB": (array((5,), dtype("V40", 3, "|", None, ("a",), {}, 2**31, 1, 0), RAW), "no table"),
    "fields without offset": (array((5,), fields(left_child=(NODE,)), RAW), "no field 'left_child'"),
    "fields outside the node": (
        array((5,), fields(**dict.fromkeys(NODE.names, (np.dtype("<i8"), 33))), RAW),
        "outside its node of 40 bytes",
    ),
    "fields before the node": (
        array((5,), fields(**dict.fromkeys(NODE.names, (np.dtype("<i8"), -1))), RAW),
        "outside its node of 40 bytes",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_nodes_that_are_no_table_of_nodes(case: str) -> None:
    nodes, message = DAMAGED[case]
    refused(forest_pickle(tree(nodes)), message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((5, 2, 1)), "values of shape (5, 2, 1)"),
        (np.zeros((5, 1, 3)), "values of shape (5, 1, 3)"),
        (np.zeros(5), "values of shape (5)"),
        (np.zeros((5, 1, 1), "f4"), "numbers of type 'f4'"),
        (np.zeros((5, 1, 1), object), "numbers of type 'O8'"),
        (np.full((5, 1, 1), np.nan), "its value is nan"),
        (np.full((5, 1, 1), np.inf), "its value is inf"),
        (array((5, 1, 1), np.dtype("f8"), b"1234"), "an array of 40 bytes comes with 4 bytes"),
        (array((5, 1, 1), dtype("f8", 3, "<", (np.dtype("f8"), (2,)), None, None, -1, -1, 0), bytes(40)), "type 'f8'"),
        (None, "no array of numbers"),
    ],
)
def test_values_that_are_no_values(values: Any, message: str) -> None:
    refused(forest_pickle(tree(values=values)), message)


SHARED = tree()
NO_FOREST: dict[str, tuple[bytes, str]] = {
    "numbers": (pickle.dumps([1, 2, 3]), "it holds a list where a RandomForestRegressor"),
    "an array": (pickle.dumps(np.zeros(3)), "it holds a array where"),
    "a tree": (pickle.dumps(fitted(0).estimators_[0]), "it holds a estimator where"),
    "a forest in a list": (b"\x80\x04](" + forest_pickle(tree())[2:-1] + b"e.", "it holds a list where"),
    "not fitted": (pickle.dumps(RandomForestRegressor()), "it was never fitted"),
    "no trees": (forest_pickle(), "it was never fitted"),
    "trees in a dict": (forest_pickle(estimators_={}), "it was never fitted"),
    "two outputs": (forest_pickle(tree(), n_outputs_=2), "predicts 2 numbers"),
    "two outputs, for real": (
        pickle.dumps(RandomForestRegressor(2, bootstrap=False).fit([[0], [1]], [[0, 1], [1, 0]])),
        "values of shape (3, 2, 1)",
    ),
    "no tree": (forest_pickle(None), "an estimator without a tree"),
    "an array as tree": (forest_pickle(NODES), "an estimator without a tree"),
    "a tree without state": (forest_pickle(Said(Tree, 2, np.array([1]), 1)), "an estimator without a tree"),
    "a tree without nodes": (forest_pickle(Said(Tree, 2, state={"values": VALUES})), "a tree without nodes"),
    "a tree without arguments": (forest_pickle(Said(Tree, state=tree().said[2])), "an estimator without a tree"),
    "a forest as tree": (forest_pickle(Said(RandomForestRegressor, state={})), "an estimator without a tree"),
    "one tree twice": (forest_pickle(SHARED, SHARED), "an estimator without a tree of its own"),
    "features that differ": (forest_pickle(tree(), tree(n_features=3)), "rows of [2, 3] features"),
    "features that disagree": (forest_pickle(tree(), n_features_in_=7), "rows of [2, 7] features"),
    "no features": (forest_pickle(tree(n_features=0)), "rows of [0] features"),
    "too many features": (forest_pickle(tree(n_features=2**40)), "one number is needed, 1 to 32,767"),
    "features of text": (forest_pickle(tree(n_features="2")), "is a str, not a whole number"),
    "features of float": (forest_pickle(tree(), n_features_in_=np.float64(2)), "numbers of type 'f8'"),
    "a version of 1 MB": (forest_pickle(tree(), _sklearn_version="1" * 10**6), "is no version"),
    "a version of bytes": (forest_pickle(tree(), _sklearn_version=b"1.0"), "is no version"),
    "a version with a line": (forest_pickle(tree(), _sklearn_version="1.0\n"), "is no version"),
    "a list as state": (pickle.dumps(Said(RandomForestRegressor, state=[1])), "it holds a forest where"),
    "nothing": (b"", "1 bytes are claimed where 0 are left"),
    "text": (b"\xef\xbb\xbfhello", "the byte 0xef, which is no instruction"),
    "a .npz": ((DATA / "forest_python27" / "expected.npz").read_bytes(), "the instruction PERSID"),
    "protocol 9": (b"\x80\x09.", "pickle protocol 9"),
}


@pytest.mark.parametrize("case", NO_FOREST)
def test_what_is_not_one_forest(case: str) -> None:
    refused(*NO_FOREST[case])


def test_what_cannot_be_opened_or_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "missing.pkl", tmp_path, str(tmp_path / "a\0b")):
        for read in (Forest.from_pickle, Forest.load):
            with pytest.raises(ConfigurationError, match="the predictor cannot be opened"):
                read(path)
    monkeypatch.setattr("oneshot.cost.nn_meter.forest._MOST_BYTES", 100)
    refused(TINY[0], "at most 100 are read")


# --- hostile files ------------------------------------------------------------------------------------------------


def runs(function: Any, *args: Any) -> bytes:
    return pickle.dumps(Said(function, *args), 4)


def hostile(marker: str) -> dict[str, tuple[bytes, str]]:
    """Files that would write to ``marker``, or call something, if they were unpickled; and what must be named."""
    command, source = f"touch {marker}", f"open({marker!r}, 'w')"
    system = Said(os.system, command)
    return {
        "os.system": (runs(os.system, command), f"'{os.system.__module__}.system'"),
        "posix.system, protocol 0": (b"cposix\nsystem\n(S'" + command.encode() + b"'\ntR.", "'posix.system'"),
        "nt.system": (b"\x80\x02cnt\nsystem\nX\x01\x00\x00\x00a\x85R.", "'nt.system'"),
        "subprocess": (b"\x80\x02csubprocess\nPopen\nX\x01\x00\x00\x00a\x85R.", "'subprocess.Popen'"),
        "eval": (runs(eval, source), "'builtins.eval'"),
        "exec, Python 2": (b"c__builtin__\nexecfile\n(S'" + marker.encode() + b"'\ntR.", "'__builtin__.execfile'"),
        "open": (runs(open, marker, "w"), f"'{open.__module__}.open'"),
        "getattr": (runs(getattr, "x", "upper"), "'builtins.getattr'"),
        "import": (runs(__import__, "antigravity"), "'builtins.__import__'"),
        "np.load": (runs(np.load, marker), "'numpy.load'"),
        "np.save": (runs(np.save, marker, 1), "'numpy.save'"),
        "pickle.loads": (runs(pickle.loads, b"."), "'_pickle.loads'"),
        "a path": (pickle.dumps(Path(marker), 4), "pathlib"),
        "another estimator": (pickle.dumps(LinearRegression(), 4), "'sklearn.linear_model._base.LinearRegression'"),
        "another estimator, old": (pickle.dumps(LinearRegression(), 0), "LinearRegression'"),
        "a class of the same name": (b"\x80\x02cevil\nRandomForestRegressor\n)\x81.", "'evil.RandomForestRegressor'"),
        "_reconstructor of a foreign class": (
            b"ccopy_reg\n_reconstructor\n(cevil\nClass\nc__builtin__\nobject\nNtR.",
            "'evil.Class'",
        ),
        "_reconstructor of a value": (b"ccopy_reg\n_reconstructor\n(I1\nc__builtin__\nobject\nNtR.", "_reconstructor"),
        "_reconstructor with a base": (
            b"ccopy_reg\n_reconstructor\n(cnumpy\ndtype\ncnumpy\nndarray\nNtR.",
            "copyreg._reconstructor with other arguments",
        ),
        "rot13": (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00xX\x05\x00\x00\x00rot13\x86R.", "other than text"),
        "an encoding of bytes": (b"\x80\x03c_codecs\nencode\nC\x01xX\x06\x00\x00\x00latin1\x86R.", "other than text"),
        "codecs.decode": (b"\x80\x02c_codecs\ndecode\nX\x01\x00\x00\x00x\x85R.", "'_codecs.decode'"),
        "bytes of a number": (
            b"\x80\x02c__builtin__\nbytes\n\x8a\x05\x00\x00\x00\x00\x01\x85R.",
            "it holds a no bytes",
        ),
        "a dotted name": (
            b"\x80\x04\x8c\x18sklearn.ensemble._forest\x8c\x1eRandomForestRegressor.__init__\x93.",
            "'sklearn.ensemble._forest.RandomForestRegressor.__init__'",
        ),
        "a dotted name, old": (b"\x80\x02cnumpy\nndarray.tofile\n.", "'numpy.ndarray.tofile'"),
        "a persistent id": (b"Pfoo\n.", "the instruction PERSID"),
        "a persistent id, binary": (b"K\x01Q.", "the instruction BINPERSID"),
        "the extension registry": (b"\x80\x02\x82\x01.", "the instruction EXT1"),
        "a slot state on a class": (
            b"\x80\x02csklearn.ensemble._forest\nRandomForestRegressor\nN}X\x0c\x00\x00\x00__setstate__K\x01s\x86b.",
            "the state of a Name",
        ),
        "a slot state on a forest": (
            b"\x80\x02csklearn.ensemble._forest\nRandomForestRegressor\n)\x81N}X\x0c\x00\x00\x00__setstate__K\x01s\x86b.",
            "it holds a forest where",
        ),
        "a state twice": (forest_pickle(tree())[:-1] + b"}b.", "or has one already"),
        "a state of a dict": (b"\x80\x02}}b.", "the state of a dict"),
        "a call of a number": (b"\x80\x02K\x01)R.", "a call of a int"),
        "a call without arguments": (b"\x80\x02cnumpy\ndtype\nNR.", "with a NoneType"),
        "a name of numbers": (b"\x80\x04K\x01K\x02\x93.", "a int and a int where a name is due"),
        "a name of 1 MB": (b"\x80\x02c" + b"a" * 10**6 + b"\nb\n.", "a line of text does not end"),
        "in the state of a forest": (forest_pickle(tree(), n_jobs=system), "system'"),
        "in the state of a tree": (
            forest_pickle(Said(Tree, 2, state={"nodes": NODES, "values": VALUES, "x": system})),
            "system'",
        ),
        "in an array of objects": (forest_pickle(tree(), names=np.array([system], dtype=object)), "system'"),
        "as the trees": (forest_pickle(estimators_=system), "system'"),
        "as a random state": (forest_pickle(tree(), random_state=Said(np.random.RandomState)), "'numpy.random.mtrand"),
        "as nodes": (forest_pickle(tree(system)), "system'"),
    }


@pytest.mark.parametrize("case", hostile("unused"))
def test_a_hostile_file(case: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    data, named = hostile(str(marker))[case]
    path = tmp_path / "kernel.pkl"
    path.write_bytes(data)
    refused(data, named)
    refused(path, named)
    assert not marker.exists()


def test_the_marker_would_appear(tmp_path: Path) -> None:
    """What the test above rules out does happen when the same bytes are unpickled."""
    marker = tmp_path / "marker"
    pickle.loads(hostile(str(marker))["os.system"][0])  # noqa: S301 - written three lines above
    assert marker.exists()


def test_every_other_instruction_is_refused_by_its_name() -> None:
    unknown = [op for op in pickletools.opcodes if op.code.encode("latin-1") not in restricted_pickle._INSTRUCTIONS]
    names = {op.name for op in unknown}
    assert {"INST", "OBJ", "NEWOBJ_EX", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER", "DUP", "POP", "STOP"} <= names
    for op in unknown:
        if op.name != "STOP":
            refused(b"\x80\x05N" + op.code.encode("latin-1") + bytes(8), f"the instruction {op.name};", "byte 4 of 12")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x02a.", "finds nothing to work on"),
        (b"\x80\x02.", "finds nothing to work on"),
        (b"\x80\x02K\x01(.", "finds nothing to work on"),
        (b"\x80\x02]K\x01(\x85.", "finds nothing to work on"),
        (b"\x80\x02t.", "finds no mark"),
        (b"\x80\x02}(K\x01e.", "items for a list go into a dict"),
        (b"\x80\x02](K\x01K\x02u.", "2 keys and values go into a list"),
        (b"\x80\x02}(K\x01u.", "1 keys and values go into a dict"),
        (b"\x80\x02}K\x01K\x02s.", "a dict with a int as key"),
        (b"(K\x01K\x02d.", "a dict with a int as key"),
        (b"\x80\x02h\x05.", "refers to value 5, which is not there"),
        (b"g1\n.", "refers to value 1, which is not there"),
        (b"gx\n.", "b'x' is no number"),
        (b"I1.5\n.", "b'1.5' is no number"),
        (b"L" + b"9" * 5000 + b"L\n.", "a line of text does not end"),
        (b"F1,5\n.", "b'1,5' is no number"),
        (b"I\xff\n.", r"b'\xff' is no number"),
        (b"I1", "a line of text does not end"),
        (b"\x80\x02X\x01\x00\x00\x00\xff.", "is no utf-8 text"),
        (b"\x80\x02X\x03\x00\x00\x00\xed\xa0\x80.", "is no utf-8 text"),
        (b"V\\u12\n.", "is no raw-unicode-escape text"),
        (b"Sabc\n.", "a line of text without quotes"),
        (b"S'\n.", "a line of text without quotes"),
        (b"S'a\\q'\n.", "in a line of text: damaged"),
        (b"\x80\x04\x95" + b"\xff" * 8 + b"N.", "18,446,744,073,709,551,615 bytes are claimed where 2 are left"),
        (b"\x80\x02\x8b\xd0\x07\x00\x00" + bytes(2001), "a number of 2,000 bytes; at most 1,000 are read"),
        (b"\x80\x02\x8a\xff.", "255 bytes are claimed where 1 are left"),
    ],
)
def test_a_damaged_program(data: bytes, message: str) -> None:
    refused(data, message)


@pytest.mark.parametrize("path", [TINY[9], PYTHON27[0], PYTHON27[2]], ids=lambda path: path.stem)
def test_a_file_that_is_cut_off(path: Path) -> None:
    data = path.read_bytes()
    cuts = {*range(40), *range(40, len(data), len(data) // 60), *range(len(data) - 10, len(data))}
    for cut in cuts:
        refused(data[:cut])
    Forest.from_pickle(data + b"what follows is no part of a pickle")


# --- what a file merely claims --------------------------------------------------------------------------------------

GIGABYTE = 2**30
CLAIMS = {
    "BINBYTES": b"\x80\x04B" + struct.pack("<I", GIGABYTE),
    "BINBYTES8": b"\x80\x04\x8e" + struct.pack("<Q", GIGABYTE),
    "BINBYTES8, all bits": b"\x80\x04\x8e" + b"\xff" * 8,
    "BYTEARRAY8": b"\x80\x05\x96" + struct.pack("<Q", GIGABYTE),
    "BINUNICODE": b"\x80\x04X" + struct.pack("<I", GIGABYTE),
    "BINUNICODE8": b"\x80\x04\x8d" + struct.pack("<Q", GIGABYTE),
    "BINSTRING": b"\x80\x02T" + struct.pack("<I", GIGABYTE),
    "LONG4": b"\x80\x04\x8b" + struct.pack("<i", GIGABYTE),
    "LONG4, negative": b"\x80\x04\x8b" + struct.pack("<i", -1),
    "FRAME": b"\x80\x04\x95" + struct.pack("<Q", GIGABYTE),
    "LONG_BINPUT": b"\x80\x04Nr" + struct.pack("<I", 2**32 - 1) + b"0",
    "PUT": b"Np99999999999999\n0",
    "LONG_BINGET": b"\x80\x04j" + struct.pack("<I", 2**32 - 1),
    "a shape": forest_pickle(tree(array((2**27,), NODE, RAW))),
    "a dtype": forest_pickle(tree(array((5,), dtype("V40", 3, "|", None, NODE.names, {}, GIGABYTE, 1, 0), RAW))),
}


def peak(run: Callable[[], object]) -> int:
    """Bytes that Python and numpy held at once, at most, while ``run`` ran."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_peak_is_seen() -> None:
    assert peak(lambda: bytes(2**25)) >= 2**25
    assert peak(lambda: np.empty(2**25, np.int8)) >= 2**25


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_takes_no_memory(claim: str, tmp_path: Path) -> None:
    path = tmp_path / "kernel.pkl"
    path.write_bytes(CLAIMS[claim] + b"some bytes that are there.")
    refused(path)  # what the first error imports is not what the file takes
    assert peak(lambda: refused(path)) < 2**20
    assert peak(lambda: refused(path.read_bytes())) < 2**20


def test_reading_takes_little_more_than_the_arrays() -> None:
    """40 trees of 4,097 nodes, 26 bytes a node as arrays. The raw nodes, 40 bytes each, are let go tree by tree, and
    the columns of the trees as soon as they are joined: 1.3 times the arrays at most; 2.0 if the columns stayed."""
    n = 4097
    inner = np.arange(n) % 2 == 0
    inner[-1] = False
    ids = np.arange(n)  # a chain: the even nodes have the next node, a leaf, and the one after it
    nodes = np.zeros(n, NODE)
    nodes["left_child"], nodes["right_child"] = np.where(inner, ids + 1, -1), np.where(inner, ids + 2, -1)
    data = io.BytesIO(forest_pickle(*[tree(nodes.copy(), np.zeros((n, 1, 1))) for _ in range(40)], protocol=5))
    arrays = 26 * n * 40
    for _ in range(2):  # the first one warms up
        used = peak(lambda: Forest.from_pickle(data.getvalue()))
    assert arrays < used < 1.6 * arrays


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x04" + b"]" * 60_000 + b"a" * 59_999 + b".", "it holds a list"),
        (b"\x80\x04)" + b"\x85" * 60_000 + b".", "it holds a tuple"),
        (b"\x80\x04})" + b"\x85" * 60_000 + b"K\x01s.", "a dict with a tuple as key"),
        (b"\x80\x04" + b"(" * 60_000 + b"t" * 60_000 + b".", "it holds a tuple"),
        (b"\x80\x04" + b"cnumpy\ndtype\n" * 20_000 + b")" + b"R\x85" * 19_999 + b"R.", "it holds a dtype"),
        (b"\x80\x04c_codecs\nencode\n)" + b"\x85" * 60_000 + b"R.", "it encodes something other"),
        (b"\x80\x04]\x94h\x00a.", "it holds a list"),
        (b"\x80\x04]\x94h\x00a" + b"h\x00a" * 10_000 + b".", "it holds a list"),
    ],
    ids=["lists", "tuples", "tuples as key", "marks", "calls", "encode", "itself", "itself often"],
)
def test_a_recursion_bomb(data: bytes, message: str) -> None:
    refused(data, message)


def test_a_program_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restricted_pickle, "_MOST_INSTRUCTIONS", 1000)
    refused(b"]" * 1001 + b".", "more than 1,000 instructions")


def test_data_is_given_out_once() -> None:
    """One block of bytes, remembered, that is the data of two arrays."""
    nodes = array((50,), np.dtype("<f8"), bytes(400))
    data = pickle.dumps([nodes, nodes.said[2][4]])
    assert data.count(bytes(400)) == 1
    refused(forest_pickle(tree(array((5,), NODE, b"x" * 300)), tree(array((5,), NODE, b"x" * 300))), "comes with 300")
    block = bytes(480)
    both = [tree(array((12,), NODE, block), array((60,), np.dtype("<f8"), block))]
    refused(forest_pickle(*both), "values of shape (60)")
    values = array((12, 1, 1), np.dtype("<f8"), bytes(96))
    twice = forest_pickle(tree(array((12,), NODE, block), values), tree(array((12,), NODE, block), values))
    refused(twice, "damaged")


FUZZED = [path.read_bytes() for path in PYTHON27] + [pickle.dumps(fitted(2, max_depth=3), p) for p in range(6)]


def read_or_refused(source: bytes | Path, read: Callable[[Any], Forest]) -> None:
    """Nothing else may happen; and what is read predicts."""
    with contextlib.suppress(UnsafePickleError):
        forest = read(source)
        assert np.isfinite(forest.predict(np.ones((2, forest.n_features)))).all()


@settings(max_examples=300, deadline=None)
@given(
    which=st.integers(0, len(FUZZED) - 1),
    flips=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_flipped_bytes(which: int, flips: list[tuple[int, int]]) -> None:
    data = bytearray(FUZZED[which])
    for position, byte in flips:
        data[position % len(data)] = byte
    read_or_refused(bytes(data), Forest.from_pickle)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*restricted_pickle._INSTRUCTIONS]) | st.binary(max_size=3), max_size=40))
@example([b"c", b"numpy\ndtype\n", b")", b"R", b"N", b"b", b"N", b"b"])
def test_any_program(parts: list[bytes]) -> None:
    read_or_refused(b"".join(parts) + b".", Forest.from_pickle)


# --- the neutral file -----------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    forest, path = Forest.from_pickle(TINY[3]), tmp_path / "forest.npz"
    forest.save(path, "0" * 64)
    again = Forest.load(path)
    for name in ("roots", "left", "right", "feature", "threshold", "value"):
        old, new = getattr(forest, name), getattr(again, name)
        np.testing.assert_array_equal(old, new, strict=True)
        assert not old.flags.writeable
        assert not new.flags.writeable
    assert (again.n_features, again.sklearn_version) == (forest.n_features, "0.23.1")
    assert (forest.source_sha256, again.source_sha256) == ("", "0" * 64)
    again.save(path)  # what it came from is not forgotten
    assert Forest.load(path).source_sha256 == "0" * 64
    assert [entry.name for entry in tmp_path.iterdir()] == ["forest.npz"]
    with np.load(path, allow_pickle=False) as archive:  # an ordinary .npz
        assert json.loads(archive["about"].tobytes())["format"] == "oneshot-forest"
    with pytest.raises(ConfigurationError, match="source_sha256 is 'abc'"):
        forest.save(path, "abc")


HAND = Forest.from_pickle(forest_pickle(tree(), tree()))
ABOUT = {"format": "oneshot-forest", "version": 1, "n_features": 2, "sklearn_version": "1.0", "source_sha256": ""}


def members(**changes: Any) -> dict[str, Any]:
    columns = {name: getattr(HAND, name) for name in ("roots", "left", "right", "feature", "threshold", "value")}
    found = {"about": np.frombuffer(json.dumps(ABOUT).encode(), np.uint8), **columns, **changes}
    return {name: value for name, value in found.items() if value is not None}


def put(array: np.ndarray, index: int, value: float) -> np.ndarray:
    array = array.copy()
    array[index] = value
    return array


def about(**changes: Any) -> np.ndarray:
    return np.frombuffer(json.dumps({**ABOUT, **changes}).encode(), np.uint8)


BAD_FILES: dict[str, tuple[dict[str, Any], str]] = {
    "a cycle": ({"left": put(HAND.left, 6, 5)}, "node 1 of a tree is damaged: its child 0 is not a later one of 5"),
    "a child in the next tree": ({"right": put(HAND.right, 0, 7)}, "its child 7 is not a later one of 5"),
    "a child in the tree before": ({"right": put(HAND.right, 5, 4)}, "its child -1 is not"),
    "half a leaf": ({"right": put(HAND.right, 2, 3)}, "it is a leaf and has the child 3"),
    "no parent": ({"left": put(HAND.left, 1, 1), "right": put(HAND.right, 1, 1)}, "it is the child of 0 nodes"),
    "a feature out of range": ({"feature": put(HAND.feature, 0, 2)}, "feature 2 of rows of 2"),
    "a negative feature": ({"feature": put(HAND.feature, 0, -1)}, "its feature is -1"),
    "a threshold that is none": ({"threshold": put(HAND.threshold, 0, np.nan)}, "its threshold is nan"),
    "an infinite value": ({"value": put(HAND.value, 9, np.inf)}, "its value is inf"),
    "roots that do not ascend": ({"roots": np.array([0, 0], np.int32)}, "do not ascend from 0"),
    "roots out of range": ({"roots": np.array([0, 10], np.int32)}, "do not ascend from 0"),
    "negative roots": ({"roots": np.array([-5, 5], np.int32)}, "do not ascend from 0"),
    "no roots": ({"roots": np.zeros(0, np.int32)}, "do not ascend from 0"),
    "a short column": ({"value": HAND.value[:9]}, "columns of [10, 10, 10, 10, 9] nodes"),
    "a column missing": ({"right": None}, "the array 'right' is missing"),
    "other numbers": ({"left": HAND.left.astype(np.int64)}, "'left' is no array of numbers <i4"),
    "a matrix": ({"value": HAND.value.reshape(5, 2)}, "'value' is no array of numbers <f8 with one axis"),
    "objects": ({"value": np.array([None] * 10, dtype=object)}, "'value' is no array"),
    "no description": ({"about": None}, "the array 'about' is missing"),
    "another format": ({"about": about(format="x")}, "it is no 'oneshot-forest' file of version 1"),
    "a newer version": ({"about": about(version=2)}, "it is no 'oneshot-forest' file of version 1"),
    "a description that is none": ({"about": np.frombuffer(b"[" * 999, np.uint8)}, "it is no 'oneshot-forest'"),
    "a long description": ({"about": about(x="x" * 2000)}, "it is no 'oneshot-forest'"),
    "features": ({"about": about(n_features=0)}, "the number of features is not 1 to 32,767"),
    "features of text": ({"about": about(n_features="2")}, "the number of features is not 1 to 32,767"),
    "hash": ({"about": about(source_sha256="x")}, "where the forest comes from"),
    "version of scikit-learn": ({"about": about(sklearn_version=None)}, "where the forest comes from"),
}


def load_refused(path: Path, *words: str) -> None:
    with pytest.raises(UnsafePickleError) as caught:
        Forest.load(path)
    for word in (*words, str(path), "Nothing of it was run"):
        assert word in str(caught.value)


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_hostile_or_damaged_npz(case: str, tmp_path: Path) -> None:
    changes, message = BAD_FILES[case]
    np.savez(tmp_path / "forest.npz", **members(**changes))
    load_refused(tmp_path / "forest.npz", message)


def test_a_npz_that_would_run_code(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "forest.npz"
    np.savez(path, **members(value=np.array([Said(os.system, f"touch {marker}")], dtype=object)))
    load_refused(path, "'value' is no array of numbers")
    assert not marker.exists()


def test_a_npz_that_claims(tmp_path: Path) -> None:
    path = tmp_path / "forest.npz"
    np.savez_compressed(path, **members(about=np.zeros(2**25, np.uint8)))  # 32 MB in 32 kB
    load_refused(path, "the array 'about' is compressed")
    assert peak(lambda: load_refused(path)) < 2**21
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**40,)})
    np.savez(path, **members(value=None))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("value.npy", header.getvalue() + bytes(80))
    load_refused(path, "claims 1,099,511,627,776 numbers and has 80 bytes")
    assert peak(lambda: load_refused(path)) < 2**21


def test_what_is_no_npz(tmp_path: Path) -> None:
    path = tmp_path / "forest.npz"
    for data in (b"", b"PK", TINY[0].read_bytes(), bytes(1000)):
        path.write_bytes(data)
        load_refused(path, "it is no .npz file")
    HAND.save(path)
    data = path.read_bytes()
    for cut in range(0, len(data), 50):
        path.write_bytes(data[:cut])
        load_refused(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forests")


@pytest.fixture(scope="module")
def saved(folder: Path) -> bytes:
    HAND.save(folder / "hand.npz")
    return (folder / "hand.npz").read_bytes()


@settings(max_examples=200, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4))
@example(flips=[(2095, 7)])  # an offset that no file has
def test_flipped_bytes_in_a_npz(saved: bytes, folder: Path, flips: list[tuple[int, int]]) -> None:
    path = folder / "flipped.npz"
    data = bytearray(saved)
    for position, byte in flips:
        data[position % len(data)] = byte
    path.write_bytes(data)
    read_or_refused(path, Forest.load)


def test_a_forest_is_not_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        HAND.value[0] = 1.0
    with pytest.raises(AttributeError):
        HAND.n_features = 3  # type: ignore[misc]
    assert replace(HAND, source_sha256="").n_trees == 2
