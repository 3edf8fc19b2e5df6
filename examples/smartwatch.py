"""Windows of a smartwatch's motion sensor for the examples: which of seven shoulder exercises is it?

    python -m pip install --no-deps seglearn

The recordings (Burns, Leung, Hardisty, Whyne, Henry and McLachlin 2018, arXiv 1802.01489) are a file inside the
package seglearn, BSD 3-Clause: 140 recordings, 244,102 samples of 6 axes at 50 Hz, of 10 persons with 7 exercises on
each side. The package itself is not imported and may be older than everything else: its file is all that is read.

Persons 1 to 7 are for training and 8 to 10 for the test, so that what is reported holds for persons never seen.
"""

from __future__ import annotations

import importlib.util
import io
import pickle
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from oneshot.errors import ConfigurationError

AXES = ("ax", "ay", "az", "wx", "wy", "wz")  # acceleration in multiples of gravity, then the rate of rotation
EXERCISES = ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")  # the names that the file has for the classes 0 to 6
TRAIN_SUBJECTS, TEST_SUBJECTS = (1, 2, 3, 4, 5, 6, 7), (8, 9, 10)
SIZE = 128  # samples of a window: 2.56 s
_DAMAGED = (OSError, EOFError, ValueError, TypeError, AttributeError, LookupError)  # what numpy and pickle raise
INSTALL = "python -m pip install --no-deps seglearn"


@dataclass(frozen=True, eq=False)
class Recording:
    """One person doing one exercise 20 times with one arm. ``signal``: (6, T) float32, in the order of ``AXES``."""

    signal: Tensor
    exercise: int
    subject: int


class Datasets(NamedTuple):
    """Samples are (window (6, 128) float32, exercise int64); no person is in two of the sets."""

    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset


def datasets(recordings: Sequence[Recording], *, stride: int = 32, validation_subject: int = 7) -> Datasets:
    """Normalised windows, ``stride`` samples apart: six of persons 1 to 7, the seventh of them, persons 8 to 10.

    Every axis has mean 0 and standard deviation 1 over the windows of ``train``; the others take its two numbers.
    ConfigurationError if the validation person is none of 1 to 7, or a set gets no window.
    """
    if validation_subject not in TRAIN_SUBJECTS:
        raise ConfigurationError(
            f"datasets(validation_subject={validation_subject!r}): allowed are {TRAIN_SUBJECTS}; {TEST_SUBJECTS} are "
            "for the test alone"
        )
    train_subjects = [subject for subject in TRAIN_SUBJECTS if subject != validation_subject]
    parts = [windows(recordings, of, stride=stride) for of in (train_subjects, [validation_subject], TEST_SUBJECTS)]
    x = parts[0][0]
    std, mean = torch.std_mean(x, dim=(0, 2), keepdim=True)  # (1, 6, 1) each
    if not bool((std > 0).all()):
        raise ConfigurationError(
            f"datasets: the training windows do not vary along the axes {[AXES[i] for i in range(6) if not std[0, i]]}"
        )
    return Datasets(*(TensorDataset((x - mean) / std, y) for x, y in parts))


def windows(
    recordings: Sequence[Recording], subjects: Collection[int], *, size: int = SIZE, stride: int = 32
) -> tuple[Tensor, Tensor]:
    """All windows (N, 6, size) of these persons and their exercises (N,): floor((T - size) / stride) + 1 a recording.

    What is left at the end of a recording is dropped, and so is a recording shorter than a window.
    ConfigurationError for a size or stride below 1, or if there is no window at all.
    """
    if size < 1 or stride < 1:
        raise ConfigurationError(f"windows(size={size}, stride={stride}): allowed are sizes and strides of at least 1")
    long_enough = [rec for rec in recordings if rec.subject in subjects and rec.signal.shape[1] >= size]
    if not long_enough:
        raise ConfigurationError(
            f"windows: none of the {len(recordings)} recordings is of {sorted(subjects)} and has {size} samples; "
            f"there are the persons {sorted({rec.subject for rec in recordings})}"
        )
    cut = [rec.signal.unfold(1, size, stride).transpose(0, 1) for rec in long_enough]  # (n, 6, size) each
    labels = [torch.full((len(part),), rec.exercise) for part, rec in zip(cut, long_enough, strict=True)]
    return torch.cat(cut), torch.cat(labels)


# --- the file ---------------------------------------------------------------------------------------------------


def load_recordings(path: str | Path | None = None) -> tuple[Recording, ...]:
    """The recordings of a file, or of the installed package seglearn.

    ConfigurationError if the package or the file is absent, or if the file holds something else.
    """
    path = _file_of_package() if path is None else Path(path)
    content = _content(path)
    keys = ("X", "y", "subject")
    if not isinstance(content, dict) or not set(keys) <= content.keys():
        raise ConfigurationError(f"load_recordings: {path} holds no dict with the keys {keys}. {_again()}")
    signals, exercises, subjects = (list(content[key]) for key in keys)
    if not len(signals) == len(exercises) == len(subjects):
        raise ConfigurationError(
            f"load_recordings: {path} has {len(signals)} signals, {len(exercises)} exercises and {len(subjects)} "
            f"persons; one of each per recording is needed. {_again()}"
        )
    rows = zip(signals, exercises, subjects, strict=True)
    return tuple(_recording(np.asarray(signal), int(y), int(subject), path) for signal, y, subject in rows)


def _recording(signal: np.ndarray, exercise: int, subject: int, path: Path) -> Recording:
    if signal.ndim != 2 or signal.shape[1] != len(AXES) or exercise not in range(len(EXERCISES)):
        raise ConfigurationError(
            f"load_recordings: {path} has a recording of shape {signal.shape} of exercise {exercise}; allowed are "
            f"(T, {len(AXES)}) and 0 to {len(EXERCISES) - 1}. {_again()}"
        )
    # One time series per axis: (T, 6) -> (6, T)
    return Recording(torch.from_numpy(signal.T.astype(np.float32)), exercise, subject)


def _file_of_package() -> Path:
    # The specification of a top-level package is found without importing it: seglearn needs an old scikit-learn.
    spec = importlib.util.find_spec("seglearn")
    if spec is None or spec.origin is None:
        raise ConfigurationError(
            f"load_recordings: the recordings come with the package seglearn, which is not installed:\n{INSTALL}"
        )
    return Path(spec.origin).parent / "data" / "watch_dataset.npy"


def _content(path: Path) -> Any:
    """The one object in an .npy file of objects, which is a pickle: read without running what it may ask for."""
    try:
        file = io.BytesIO(path.read_bytes())
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if shape != () or not dtype.hasobject:
            raise ConfigurationError(f"an array of shape {shape} and type {dtype}, not one object")
        return _ArraysOnly(file).load().item()
    except (*_DAMAGED, pickle.UnpicklingError) as error:
        raise ConfigurationError(f"load_recordings: {path} cannot be read ({error}). {_again()}") from error


def _again() -> str:
    return f"The file of the package is the one to take:\n{INSTALL}"


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin1")


# The function that makes an empty array has no public name; this is what numpy itself tells pickle about it.
_EMPTY_ARRAY = np.empty(0).__reduce__()[0]
_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _EMPTY_ARRAY,
    ("numpy._core.multiarray", "_reconstruct"): _EMPTY_ARRAY,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}


class _ArraysOnly(pickle.Unpickler):
    """A pickle may name any function to be called; this one knows the four that numpy arrays are made of."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no array needs; nothing of it was run")
        return _KNOWN[module, name]
