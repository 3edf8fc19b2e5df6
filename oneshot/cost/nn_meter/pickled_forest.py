"""What a pickled random forest of scikit-learn says about its trees, as checked arrays."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ...errors import UnsafePickleError
from .restricted_pickle import Blob, Record, latin1, read_pickle

__all__ = ["MOST_FEATURES", "Tree", "check_tree", "read_forest"]

MOST_FEATURES = 2**15 - 1  # they are kept in 16 bits


def _known(kind: str, modules: str, names: str) -> dict[tuple[str, str], str]:
    return dict.fromkeys(product(modules.split(), names.split()), kind)


# Where scikit-learn 0.18 to 1.9 and numpy 1.11 to 2.4 keep them.
_NAMES = {
    **_known("forest", "sklearn.ensemble.forest sklearn.ensemble._forest", "RandomForestRegressor ExtraTreesRegressor"),
    **_known("estimator", "sklearn.tree.tree sklearn.tree._classes", "DecisionTreeRegressor ExtraTreeRegressor"),
    **_known("tree", "sklearn.tree._tree", "Tree"),
    **_known("dtype", "numpy", "dtype"),
    **_known("ndarray", "numpy", "ndarray"),
    **_known("array", "numpy.core.multiarray numpy._core.multiarray", "_reconstruct"),
    **_known("scalar", "numpy.core.multiarray numpy._core.multiarray", "scalar"),
    **_known("buffer", "numpy.core.numeric numpy._core.numeric", "_frombuffer"),
    # random_state=RandomState(...): written with the forest, of no use to a prediction
    **_known("random state", "numpy.random", "__RandomState_ctor"),
    **_known("random state", "numpy.random._pickle", "__randomstate_ctor __bit_generator_ctor"),
    **_known("random state", "numpy.random._mt19937", "MT19937"),
    **_known("random state", "numpy.random._pcg64", "PCG64"),
    **_known("random state", "numpy.random.bit_generator", "__pyx_unpickle_SeedSequence SeedSequence"),
}
_INTEGERS, _FLOATS = ("i8", "i4"), ("f8",)
_FIELDS = {"left_child": _INTEGERS, "right_child": _INTEGERS, "feature": _INTEGERS, "threshold": _FLOATS}


class Tree(NamedTuple):
    """One tree, arrays of one entry per node; a leaf is its own left and right child. Node 0 is the root."""

    left: np.ndarray  # int32
    right: np.ndarray  # int32
    feature: np.ndarray  # int16, 0 at a leaf
    threshold: np.ndarray  # float64, 0 at a leaf
    value: np.ndarray  # float64


def read_forest(file: BinaryIO, size: int) -> tuple[list[Tree], int, str]:
    """The trees, the number of features, and the version of scikit-learn that wrote them ('' if it does not say).

    Raises:
        UnsafePickleError: the file names anything else, is damaged, or holds something other than one forest.
    """
    forest = read_pickle(file, size, _NAMES, _compact)
    state = _state(forest, "forest", "a RandomForestRegressor or ExtraTreesRegressor")
    n_outputs = _whole(state.get("n_outputs_", 1), "n_outputs_")
    estimators, version = state.get("estimators_"), state.get("_sklearn_version", "")
    if n_outputs != 1:
        raise UnsafePickleError(f"the forest predicts {n_outputs} numbers per row; a latency is one")
    if type(estimators) is not list or not estimators:
        raise UnsafePickleError("the forest has no trees: it was never fitted, or is damaged")
    if type(version) is not str or not re.fullmatch(r"[\w.+-]{0,40}", version, re.ASCII):
        raise UnsafePickleError("the version of scikit-learn in it is no version: damaged")
    trees, widths = [], set()
    for estimator in estimators:
        record = _state(estimator, "estimator", "a decision tree").get("tree_")
        if type(record) is not Record or record.kind != "tree" or type(record.state) is not Tree or not record.args:
            raise UnsafePickleError("an estimator without a tree of its own: damaged")
        trees.append(record.state)
        widths.add(_whole(record.args[0], "the number of features of a tree"))
        record.state = None  # a tree that a thousand estimators refer to would be copied a thousand times
    return trees, _n_features(state, widths), version


def _n_features(state: Mapping[str, Any], widths: set[int]) -> int:
    """What the trees say; scikit-learn has called it n_features_ and n_features_in_, and wrote neither or both."""
    names = [name for name in ("n_features_", "n_features_in_", "_n_features") if name in state]
    widths = widths | {_whole(state[name], name) for name in names}
    (width, *others) = sorted(widths)
    if others or not 0 < width <= MOST_FEATURES:
        raise UnsafePickleError(f"rows of {sorted(widths)[:5]} features; one number is needed, 1 to {MOST_FEATURES:,}")
    return width


def _state(record: Any, kind: str, what: str) -> dict[str, Any]:
    if type(record) is not Record or record.kind != kind or type(record.state) is not dict:
        found = record.kind if type(record) is Record else type(record).__name__
        raise UnsafePickleError(f"it holds a {found} where {what} is due")
    return record.state


def _whole(value: Any, name: str) -> int:
    if type(value) is Record and value.kind == "scalar" and len(value.args) == 2:
        plain = _plain(value.args[0], _INTEGERS)
        return int(np.frombuffer(_raw(value.args[1], plain.itemsize), plain)[0])
    if type(value) is not int:
        raise UnsafePickleError(f"{name} is a {type(value).__name__}, not a whole number")
    return value


# --- trees ---


def _compact(record: Record) -> None:
    """Replace the state of a tree by its arrays at once: the raw nodes of an official file fill 0.5 to 1.8 GB."""
    if record.kind == "tree":
        if type(record.state) is not dict or not {"nodes", "values"} <= record.state.keys():
            raise UnsafePickleError("a tree without nodes and values: damaged")
        record.state = _tree(record.state["nodes"], record.state["values"])


def _tree(nodes: Any, values: Any) -> Tree:
    dtype, shape, data = _array(nodes, "the nodes of a tree")
    if len(shape) != 1:
        raise UnsafePickleError(f"the nodes of a tree have the shape {_shown(shape)}, not (nodes,)")
    table = _node_dtype(dtype)
    fields = np.frombuffer(_raw(data, shape[0] * table.itemsize), table)
    dtype, shape, data = _array(values, "the values of a tree")
    if shape != (len(fields), 1, 1):
        raise UnsafePickleError(f"{len(fields):,} nodes have values of shape {_shown(shape)}, not (nodes, 1, 1)")
    plain = _plain(dtype, _FLOATS)
    value = np.frombuffer(_raw(data, len(fields) * plain.itemsize), plain).astype(np.float64)
    left, right, feature = (fields[name].astype(np.int64) for name in ("left_child", "right_child", "feature"))
    leaf, own = left == -1, np.arange(len(fields))
    left, right = (np.where(leaf & (child == -1), own, child) for child in (left, right))
    feature, threshold = np.where(leaf, 0, feature), np.where(leaf, 0.0, fields["threshold"].astype(np.float64))
    check_tree(leaf, Tree(left, right, feature, threshold, value))
    narrow = (left.astype(np.int32), right.astype(np.int32), feature.astype(np.int16))
    return Tree(*narrow, threshold, value)


def check_tree(leaf: np.ndarray, tree: Tree) -> None:
    """UnsafePickleError unless every walk from node 0 reaches a leaf, and each node is reached by exactly one walk.

    Every inner node's children come after it, and every node but the first is the child of exactly one: so there is
    no cycle, and a walk back from any node ends at node 0.
    """
    left, right, feature, threshold, value = tree
    n, own, inner = len(left), np.arange(len(left)), ~leaf
    if not n:
        raise UnsafePickleError("a tree without nodes: damaged")
    for child in (left, right):
        _refuse_any(leaf & (child != own), child, "it is a leaf and has the child {}")
        _refuse_any(inner & ((child <= own) | (child >= n)), child, f"its child {{}} is not a later one of {n:,} nodes")
    parents = np.bincount(np.concatenate([left[inner], right[inner]]), minlength=n)
    _refuse_any((own > 0) & (parents != 1), parents, "it is the child of {} nodes, not of one")
    _refuse_any((feature < 0) | (feature >= MOST_FEATURES), feature, f"its feature is {{}}, not 0 to {MOST_FEATURES:,}")
    # An infinite threshold is what scikit-learn writes for "missing or not", and a walk knows what to do with it.
    _refuse_any(np.isnan(threshold), threshold, "its threshold is {}")
    _refuse_any(~np.isfinite(value), value, "its value is {}")


def _refuse_any(wrong: np.ndarray, values: np.ndarray, what: str) -> None:
    if wrong.any():
        node = int(wrong.argmax())
        raise UnsafePickleError(f"node {node} of a tree is damaged: {what.format(values[node])}")


# --- numpy's arrays, as they are pickled: shape, dtype, bytes ---


def _array(array: Any, what: str) -> tuple[Any, tuple[int, ...], Any]:
    """dtype, shape and bytes, not yet checked against each other."""
    found: tuple[Any, ...] = ()
    if type(array) is Record and array.kind == "array" and type(array.state) is tuple and len(array.state) == 5:
        _, shape, dtype, _, data = array.state
        found = (dtype, shape, data)
    elif type(array) is Record and array.kind == "buffer" and len(array.args) in (4, 5):
        data, dtype, shape = array.args[:3]
        found = (dtype, shape, data)
    if not found or type(found[1]) is not tuple or any(type(n) is not int or n < 0 for n in found[1]):
        raise UnsafePickleError(f"{what} are no array of numbers: damaged")
    return found[0], found[1], found[2]


def _shown(shape: tuple[int, ...]) -> str:
    return f"({', '.join(f'{n:,}' if n < 2**63 else 'huge' for n in shape[:4])}{', ...' if len(shape) > 4 else ''})"


def _raw(data: Any, size: int) -> bytes:
    taken = data.take() if type(data) is Blob else data
    raw = latin1(taken) if type(taken) is str else taken  # the bytes of Python 2 are text
    if type(raw) is not bytes or len(raw) != size:
        got = f"{len(raw):,} bytes" if type(raw) is bytes else type(raw).__name__
        claim = f"{size:,}" if size < 2**63 else "2**63 or more"
        raise UnsafePickleError(f"an array of {claim} bytes comes with {got}: damaged")
    return raw


def _dtype_parts(dtype: Any) -> tuple[Any, tuple[Any, ...]]:
    """The code ('f8', 'V56') and the state of a pickled dtype."""
    if type(dtype) is not Record or dtype.kind != "dtype" or not dtype.args:
        raise UnsafePickleError("an array without a type of its numbers: damaged")
    if type(dtype.state) is not tuple or len(dtype.state) < 8:
        raise UnsafePickleError("an array's type of numbers is incomplete: damaged")
    return dtype.args[0], dtype.state


def _plain(dtype: Any, allowed: tuple[str, ...]) -> np.dtype:
    code, (_, order, sub, names, *_) = _dtype_parts(dtype)
    if code not in allowed or sub is not None or names is not None or order not in ("<", ">"):
        shown = repr(code) if type(code) is str else type(code).__name__
        raise UnsafePickleError(f"numbers of type {shown}; a forest has {' or '.join(allowed)} there")
    return np.dtype(order + code)


def _node_dtype(dtype: Any) -> np.dtype:
    """The type of a node, with the four fields that a prediction needs; each version has others beside them."""
    _, (_, _, sub, _, fields, itemsize, *_) = _dtype_parts(dtype)
    if sub is not None or type(fields) is not dict or type(itemsize) is not int or not 0 < itemsize <= 256:
        raise UnsafePickleError("the nodes of a tree are no table: damaged")
    formats, offsets = [], []
    for name, allowed in _FIELDS.items():
        field = fields.get(name)
        if type(field) is not tuple or len(field) != 2 or type(field[1]) is not int:
            raise UnsafePickleError(f"the nodes of a tree have no field {name!r}: damaged")
        formats.append(_plain(field[0], allowed))
        offsets.append(field[1])
        if not 0 <= field[1] <= itemsize - formats[-1].itemsize:
            raise UnsafePickleError(f"the field {name!r} lies outside its node of {itemsize} bytes: damaged")
    return np.dtype({"names": list(_FIELDS), "formats": formats, "offsets": offsets, "itemsize": itemsize})
