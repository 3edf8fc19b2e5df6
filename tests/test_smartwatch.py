"""The smartwatch windows of the examples, on recordings of our own in the format of the package's file."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oneshot.errors import ConfigurationError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module as ``python examples/NAME.py`` imports it: with its folder on the path."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("smartwatch")


def content(lengths: dict[int, list[int]]) -> dict[str, Any]:
    """As the package has it: subject -> lengths of recordings; 1000 * subject + t on axis 0, noise on the rest."""
    rng = np.random.default_rng(0)
    signals, exercises, subjects = [], [], []
    for subject, of_subject in lengths.items():
        for exercise, n in enumerate(of_subject):
            signal = rng.normal(loc=3, scale=2, size=(n, 6))
            signal[:, 0] = 1000 * subject + np.arange(n)
            signals.append(signal)
            exercises.append(exercise)
            subjects.append(subject)
    return {
        "X": signals,
        "y": np.array(exercises),
        "subject": np.array(subjects),
        "side": np.ones(len(subjects)),
        "X_labels": ["ax", "ay", "az", "wx", "wy", "wz"],
        "y_labels": ["PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW"],
    }


def written(path: Path, of: Any) -> Path:
    with path.open("wb") as file:
        np.save(file, of, allow_pickle=True)
    return path


EVERYBODY = {subject: [200, 128, 127] for subject in range(1, 11)}  # 127: too short for a window


@pytest.fixture
def recordings(watch: Any, tmp_path: Path) -> Any:
    return watch.load_recordings(written(tmp_path / "watch.npy", content(EVERYBODY)))


# --- the file ---------------------------------------------------------------------------------------------------


def test_recordings_are_read_as_written(watch: Any, tmp_path: Path) -> None:
    wrote = content({3: [5, 7], 9: [6]})
    read = watch.load_recordings(str(written(tmp_path / "watch.npy", wrote)))
    assert [(rec.exercise, rec.subject, tuple(rec.signal.shape)) for rec in read] == [
        (0, 3, (6, 5)),
        (1, 3, (6, 7)),
        (0, 9, (6, 6)),
    ]
    for rec, signal in zip(read, wrote["X"], strict=True):
        assert rec.signal.dtype == torch.float32
        np.testing.assert_array_equal(rec.signal.numpy(), signal.T.astype(np.float32))


def test_the_pickle_of_the_published_file(watch: Any, tmp_path: Path) -> None:
    # The package's file was written with protocol 2 by an older numpy, whose arrays go through _codecs.encode.
    wrote = content({1: [4], 10: [6]})
    boxed = np.empty((), dtype=object)
    boxed[()] = wrote
    pickled = pickle.dumps(boxed, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"_codecs" in pickled
    path = tmp_path / "watch.npy"
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(117) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + pickled)
    read = watch.load_recordings(path)
    assert [rec.subject for rec in read] == [1, 10]
    np.testing.assert_array_equal(read[1].signal.numpy(), wrote["X"][1].T.astype(np.float32))


def test_the_file_is_found_without_running_the_package(
    watch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seglearn" / "data").mkdir(parents=True)
    (tmp_path / "seglearn" / "__init__.py").write_text("raise RuntimeError('was imported')")
    written(tmp_path / "seglearn" / "data" / "watch_dataset.npy", content({4: [3]}))
    monkeypatch.delitem(sys.modules, "seglearn", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [rec.subject for rec in watch.load_recordings()] == [4]
    assert "seglearn" not in sys.modules


def test_the_package_is_not_installed(watch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="not installed:\npython -m pip install --no-deps seglearn"):
        watch.load_recordings()


class MakesFolder:
    """Pickled as a call of os.mkdir."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_a_file_that_asks_for_a_call(watch: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "watch.npy", content({1: [3]}) | {"side": MakesFolder(tmp_path / "made")})
    with pytest.raises(ConfigurationError, match=r"it names \w+\.mkdir, which no array needs; nothing of it was run"):
        watch.load_recordings(path)
    assert not (tmp_path / "made").exists()


def test_files_that_hold_something_else(watch: Any, tmp_path: Path) -> None:
    good = content({1: [3, 4]})
    path = tmp_path / "watch.npy"
    with pytest.raises(ConfigurationError, match=r"cannot be read .*No such file"):
        watch.load_recordings(path)
    for damaged, message in (
        (np.zeros(3), r"an array of shape \(3,\) and type float64"),
        ([1, 2], r"an array of shape \(2,\)"),
        ({"X": [], "y": []}, r"no dict with the keys \('X', 'y', 'subject'\)"),
        (good | {"y": good["y"][:1]}, "2 signals, 1 exercises and 2 persons"),
        (good | {"X": [x[:, :5] for x in good["X"]]}, r"shape \(3, 5\) of exercise 0; allowed are \(T, 6\)"),
        (good | {"y": np.array([0, 7])}, r"shape \(4, 6\) of exercise 7; allowed are \(T, 6\) and 0 to 6"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            watch.load_recordings(written(path, damaged))
    whole = written(path, good).read_bytes()
    for cut in (0, 5, 60, 140, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ConfigurationError, match="cannot be read"):
            watch.load_recordings(path)


# --- windows ----------------------------------------------------------------------------------------------------


def test_windows_by_hand(watch: Any, recordings: Any) -> None:
    # 200 samples, stride 30: starts 0, 30 and 60 (60 + 128 <= 200 < 90 + 128). 128: start 0. 127: none.
    x, y = watch.windows(recordings, [2, 5], stride=30)
    assert x.shape == (8, 6, 128)
    assert y.tolist() == [0, 0, 0, 1, 0, 0, 0, 1]
    assert y.dtype == torch.int64
    assert x[:, 0, 0].tolist() == [2000, 2030, 2060, 2000, 5000, 5030, 5060, 5000]
    assert x[2, 0].tolist() == list(range(2060, 2188))
    assert torch.equal(x[1], recordings[3].signal[:, 30:158])  # person 2's first


def test_windows_that_cannot_be_cut(watch: Any, recordings: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"none of the 30 recordings is of \[11\] and has 128 samples"):
        watch.windows(recordings, [11])
    with pytest.raises(ConfigurationError, match="has 201 samples"):
        watch.windows(recordings, [1], size=201)
    for wrong in ({"size": 0}, {"stride": 0}, {"stride": -1}):
        with pytest.raises(ConfigurationError, match="at least 1"):
            watch.windows(recordings, [1], **wrong)


@pytest.mark.parametrize("held_out", [7, 2])
def test_no_person_is_in_two_sets(watch: Any, recordings: Any, held_out: int) -> None:
    sets = watch.datasets(recordings, stride=30, validation_subject=held_out)
    assert [len(part) for part in sets] == [6 * 4, 4, 3 * 4]  # 4 windows a person, as above
    # Axis 0 grows by 1000 per person: undo the normalisation with two known values and read the persons off.
    raw = watch.windows(recordings, [s for s in range(1, 8) if s != held_out], stride=30)[0][:, 0]
    persons = []
    for part in sets:
        x = part.tensors[0][:, 0] * raw.std() + raw.mean()
        persons.append({round(value / 1000) for value in x[:, 0].tolist()})
    assert persons == [set(range(1, 8)) - {held_out}, {held_out}, {8, 9, 10}]


def test_the_training_statistics_normalise_all(watch: Any, recordings: Any) -> None:
    train, validation, test = watch.datasets(recordings, stride=72)
    x = train.tensors[0].double()
    torch.testing.assert_close(x.mean((0, 2)), torch.zeros(6, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2)), torch.ones(6, dtype=torch.float64), atol=1e-4, rtol=0)
    raw = watch.windows(recordings, [1, 2, 3, 4, 5, 6], stride=72)[0].double().numpy()
    mean, std = raw.mean((0, 2)), raw.std((0, 2), ddof=1)
    for part, persons in ((validation, [7]), (test, [8, 9, 10])):
        own = watch.windows(recordings, persons, stride=72)[0].double().numpy()
        expected = (own - mean[:, None]) / std[:, None]
        np.testing.assert_allclose(part.tensors[0].numpy(), expected, rtol=1e-4, atol=1e-4)


def test_a_sample(watch: Any, recordings: Any) -> None:
    window, exercise = watch.datasets(recordings).test[0]
    assert (window.shape, window.dtype, exercise.dtype) == ((6, 128), torch.float32, torch.int64)


def test_sets_that_cannot_be_made(watch: Any, recordings: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"validation_subject=8\): allowed are \(1, 2, 3, 4, 5, 6, 7\)"):
        watch.datasets(recordings, validation_subject=8)
    with pytest.raises(ConfigurationError, match="is of \\[7\\] and has 128 samples"):
        watch.datasets([rec for rec in recordings if rec.subject != 7])
    for rec in recordings:
        rec.signal[4] = 2.5
    with pytest.raises(ConfigurationError, match=r"do not vary along the axes \['wy'\]"):
        watch.datasets(recordings)
