"""Random forests of scikit-learn, as plain arrays.

A forest predicts the mean of its trees, and a tree of a row x is a walk from its root:
    at an inner node, to the left child if float32(x[feature]) <= threshold (float64), else to the right one;
    at a leaf, its value. y = (sum over the trees, in their order) / number of trees, in float64,
which is what scikit-learn computes (sklearn/tree/_tree.pyx, Tree.apply; sklearn/ensemble/_forest.py,
ForestRegressor.predict), bit for bit.
"""

from __future__ import annotations

import io
import json
import os
import re
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np

from ...errors import ConfigurationError, UnsafePickleError
from ...files import atomic_write
from .pickled_forest import MOST_FEATURES, Tree, check_tree, read_forest

__all__ = ["Forest"]

_MOST_BYTES = 4 * 2**30  # the published predictors have 0.05 to 1.8 GB
_LANES = 2**22  # walks at a time
_FORMAT, _VERSION = "oneshot-forest", 1
_COLUMNS = {"roots": "<i4", "left": "<i4", "right": "<i4", "feature": "<i2", "threshold": "<f8", "value": "<f8"}
_HEADER = re.compile(rb"\{'descr': '(.{3})', 'fortran_order': False, 'shape': \((\d{1,20}),\), \} *\n")


@final
@dataclass(frozen=True, eq=False)
class Forest:
    """A fitted RandomForestRegressor or ExtraTreesRegressor; made by ``from_pickle`` and ``load``, which check it.

    The nodes of all trees stand one after the other. ``roots``: (trees,) int32, the first node of each tree;
    ``left``, ``right``: (nodes,) int32, a leaf points to itself; ``feature``: (nodes,) int16; ``threshold``,
    ``value``: (nodes,) float64. ``sklearn_version``: the one that wrote the pickle, '' if it does not say.
    ``source_sha256``: of the pickle, as ``save`` was told, else ''.

    >>> import pickle
    >>> from sklearn.ensemble import RandomForestRegressor
    >>> fitted = RandomForestRegressor(2, bootstrap=False).fit([[0.0], [1.0]], [3.0, 5.0])
    >>> forest = Forest.from_pickle(pickle.dumps(fitted))
    >>> forest.predict([[0.2], [0.5], [0.6]])  # the trees split at 0.5
    array([3., 3., 5.])
    >>> forest.n_features, forest.n_trees, forest.n_nodes
    (1, 2, 6)
    """

    roots: np.ndarray
    left: np.ndarray
    right: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    value: np.ndarray
    n_features: int
    sklearn_version: str = ""
    source_sha256: str = ""

    @property
    def n_trees(self) -> int:
        return len(self.roots)

    @property
    def n_nodes(self) -> int:
        return len(self.left)

    @classmethod
    def from_pickle(cls, source: str | Path | bytes) -> Forest:
        """Read what scikit-learn 0.18 or newer pickled, without scikit-learn, and without running any of it.

        Args:
            source: the path of the file, or its bytes.

        Raises:
            UnsafePickleError: the file holds anything but one such forest with one output, or is damaged. The
                message says what was found. Nothing of the file was run, and no memory was taken for what it
                merely claims.
            ConfigurationError: there is no such file.
        """
        if isinstance(source, bytes):
            with _explained("the given bytes"):
                return cls._from_file(io.BytesIO(source), len(source))
        with _explained(str(source)), _opened(source) as file:
            return cls._from_file(file, os.fstat(file.fileno()).st_size)

    @classmethod
    def _from_file(cls, file: BinaryIO, size: int) -> Forest:
        if size > _MOST_BYTES:
            raise UnsafePickleError(f"{size:,} bytes; at most {_MOST_BYTES:,} are read")
        trees, n_features, version = read_forest(file, size)
        sizes = [len(tree.left) for tree in trees]
        if sum(sizes) >= 2**31:
            raise UnsafePickleError(f"{sum(sizes):,} nodes; at most 2**31 - 1 can be numbered")
        roots = np.cumsum([0, *sizes[:-1]]).astype(np.int32)
        columns = [list(column) for column in zip(*trees, strict=True)]
        trees.clear()
        joined = []
        for k, column in enumerate(columns):
            shifted = [part + root for part, root in zip(column, roots, strict=True)] if k < 2 else column
            joined.append(np.concatenate(shifted))
            column.clear()  # each part goes once it is copied: a forest may have 30 million nodes
        return cls._checked([roots, *joined], n_features, version, "")

    @classmethod
    def _checked(cls, arrays: list[np.ndarray], n_features: int, version: str, sha256: str) -> Forest:
        roots, left, right, feature, threshold, value = arrays
        if feature.max() >= n_features:
            raise UnsafePickleError(f"a tree asks for feature {feature.max()} of rows of {n_features}: damaged")
        for array in arrays:
            array.setflags(write=False)
        return cls(roots, left, right, feature, threshold, value, n_features, version, sha256)

    # --- evaluation ---

    def predict(self, rows: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
        """y: (n,) float64 of rows (n, n_features), by the equation at the top of this file.

        Raises:
            ConfigurationError: rows of another width, or a number that is not finite in float32.
        """
        x = self._rows(rows)
        step = max(1, _LANES // self.n_trees)
        y = np.empty(len(x))
        for start in range(0, len(x), step):
            block = x[start : start + step]
            total = np.zeros(len(block))
            for values in self.value[self._leaves(block)]:  # one tree after the other, as scikit-learn adds them
                total += values
            y[start : start + step] = total / self.n_trees
        return y

    def _rows(self, rows: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
        try:
            with np.errstate(over="ignore"):
                x = np.asarray(rows, dtype=np.float32)
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigurationError(f"predict: the rows are no table of numbers: {error}") from error
        if not x.size and x.ndim == 1:
            return x.reshape(0, self.n_features)
        if x.ndim != 2 or x.shape[1] != self.n_features:
            raise ConfigurationError(
                f"predict: rows of shape {x.shape}; this forest takes (rows, {self.n_features}), one column per feature"
            )
        if not np.isfinite(x).all():
            row, column = np.argwhere(~np.isfinite(x))[0].tolist()
            raise ConfigurationError(
                f"predict: feature {column} of row {row} is {rows[row][column]}; scikit-learn's trees take finite "
                f"numbers up to {np.finfo(np.float32).max:.3g}"
            )
        return x

    def _leaves(self, x: np.ndarray) -> np.ndarray:
        """Node ids (n_trees, n) of the leaves that the rows x (n, n_features), float32, reach."""
        node = np.repeat(self.roots, len(x))
        row_start = np.tile(np.arange(len(x)) * self.n_features, self.n_trees)
        flat = x.ravel().astype(np.float64)
        walking = np.flatnonzero(self.left[node] != node)
        while walking.size:
            here = node[walking]
            goes_left = flat[row_start[walking] + self.feature[here]] <= self.threshold[here]
            there = np.where(goes_left, self.left[here], self.right[here])
            node[walking] = there
            walking = walking[self.left[there] != there]
        return node.reshape(self.n_trees, len(x))

    # --- the neutral file ---

    def save(self, path: str | Path, source_sha256: str = "") -> None:
        """Write arrays and nothing else, as .npz, atomically; 26 bytes per node.

        Args:
            path: the file; its folder must exist.
            source_sha256: of the pickle this forest came from, 64 hexadecimal digits, to know it again.
        """
        sha256 = source_sha256 or self.source_sha256
        if not _is_sha256(sha256):
            raise ConfigurationError(f"save: source_sha256 is {sha256!r}; it has 64 digits 0-9 a-f, or is ''")
        about = {
            "format": _FORMAT,
            "version": _VERSION,
            "n_features": self.n_features,
            "sklearn_version": self.sklearn_version,
            "source_sha256": sha256,
        }
        arrays = {name: getattr(self, name).astype(dtype, copy=False) for name, dtype in _COLUMNS.items()}
        text = np.frombuffer(json.dumps(about).encode(), np.uint8)
        atomic_write(path, lambda file: np.savez(file, about=text, **arrays))

    @classmethod
    def load(cls, path: str | Path) -> Forest:
        """Read what ``save`` wrote, checked as a pickle is.

        Raises:
            UnsafePickleError: the file is anything else, or damaged.
            ConfigurationError: there is no such file.
        """
        with _explained(str(path)), _opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                with zipfile.ZipFile(file) as archive:
                    about = _about(_member(archive, "about", "|u1", size).tobytes())
                    arrays = [_member(archive, name, dtype, size) for name, dtype in _COLUMNS.items()]
            # What zipfile raises for damaged archives, beside its own error: OSError and ValueError for an offset
            # before the file's start, RuntimeError for an encrypted member, struct.error for a short header.
            except (zipfile.BadZipFile, OSError, ValueError, EOFError, RuntimeError, struct.error) as error:
                if isinstance(error, UnsafePickleError):
                    raise
                raise UnsafePickleError(f"it is no .npz file, or damaged: {error}") from error
            _check_columns(arrays)
            return cls._checked(arrays, *about)


def _member(archive: zipfile.ZipFile, name: str, dtype: str, size: int) -> np.ndarray:
    """One array of the archive; it is stored as it is, so that no claim about its size can be larger than the file."""
    info = next((info for info in archive.infolist() if info.filename == f"{name}.npy"), None)
    if info is None:
        raise UnsafePickleError(f"the array {name!r} is missing: Forest.save did not write it")
    if info.compress_type != zipfile.ZIP_STORED or not info.compress_size == info.file_size <= size:
        raise UnsafePickleError(f"the array {name!r} is compressed, or larger than the file: damaged")
    data = archive.read(info)
    length = int.from_bytes(data[8:10], "little")
    header = _HEADER.fullmatch(data[10 : 10 + length])
    if data[:8] != b"\x93NUMPY\x01\x00" or not header or header[1] != dtype.encode():
        raise UnsafePickleError(f"{name!r} is no array of numbers {dtype} with one axis: damaged")
    n, expected = int(header[2]), len(data) - 10 - length
    if n * np.dtype(dtype).itemsize != expected:
        raise UnsafePickleError(f"the array {name!r} claims {n:,} numbers and has {expected:,} bytes: damaged")
    return np.frombuffer(data, dtype, n, 10 + length).astype(np.dtype(dtype).newbyteorder("="), copy=False)


def _about(text: bytes) -> tuple[int, str, str]:
    """Number of features, version of scikit-learn, and hash of the source."""
    try:
        about: Any = json.loads(text[:1000])
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict) or about.get("format") != _FORMAT or about.get("version") != _VERSION:
        raise UnsafePickleError(f"it is no {_FORMAT!r} file of version {_VERSION}, which Forest.save writes")
    n_features, version, sha256 = (about.get(name) for name in ("n_features", "sklearn_version", "source_sha256"))
    if type(n_features) is not int or not 0 < n_features <= MOST_FEATURES:
        raise UnsafePickleError(f"the number of features is not 1 to {MOST_FEATURES:,}: damaged")
    if type(version) is not str or type(sha256) is not str or not _is_sha256(sha256):
        raise UnsafePickleError("it does not say where the forest comes from: damaged")
    return n_features, version, sha256


def _is_sha256(text: str) -> bool:
    return re.fullmatch(r"([0-9a-f]{64})?", text) is not None


def _check_columns(arrays: list[np.ndarray]) -> None:
    roots, left, *others = arrays
    n = len(left)
    if any(len(column) != n for column in others):
        raise UnsafePickleError(f"columns of {[n, *map(len, others)]} nodes; they have one length")
    ends = np.append(roots, n)
    if not len(roots) or ends[0] != 0 or (np.diff(ends) <= 0).any():
        raise UnsafePickleError("the roots of the trees do not ascend from 0: damaged")
    for start, end in pairwise(ends.tolist()):
        parts = [column[start:end] for column in arrays[1:]]
        parts[:2] = (part.astype(np.int64) - start for part in parts[:2])
        check_tree(parts[0] == np.arange(end - start), Tree(*parts))


@contextmanager
def _explained(source: str) -> Iterator[None]:
    try:
        yield
    except UnsafePickleError as error:
        raise UnsafePickleError(
            f"{source}: {error}. Nothing of it was run. Only random forests (RandomForestRegressor, "
            "ExtraTreesRegressor) are read; fetch the file again, or have its author write one with scikit-learn"
        ) from error


def _opened(path: str | Path) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: the predictor cannot be opened: {error}") from error
