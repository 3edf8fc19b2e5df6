"""The training set cut in two: one part trains the weights, the other the architecture."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from ..errors import ConfigurationError

__all__ = ["Split", "stratified_split", "targets_of"]


@dataclass(frozen=True)
class Split:
    """Sample indices of the two parts, each ascending, disjoint and together complete.

    Attributes:
        weight: indices of the samples that train the weights.
        arch: indices of the samples that train the architecture.
        seed: the seed that drew the split.
        n_classes: number of different class labels; 0 when the targets are no class labels.
    """

    weight: tuple[int, ...]
    arch: tuple[int, ...]
    seed: int
    n_classes: int


def targets_of(dataset: Dataset[Any]) -> list[int] | None:
    """Class label of every sample, in the order of the dataset; None when there are none (regression).

    The first source that gives one integer per sample is used:

    1. the attribute ``targets`` or ``labels`` (list, tuple, tensor or array), as torchvision has it;
    2. the parts of a ``TensorDataset`` (its last tensor), a ``Subset`` or a ``ConcatDataset``;
    3. ``dataset[i][1]`` of every sample. This is slow: it loads the whole dataset once, random
       augmentation included. It stops at the first target that is not an integer, so a regression
       dataset loads one sample.

    Raises:
        ConfigurationError: the dataset has no length.

    >>> from torch.utils.data import TensorDataset
    >>> targets_of(TensorDataset(torch.zeros(3, 2), torch.tensor([2, 0, 2])))
    [2, 0, 2]
    >>> targets_of(TensorDataset(torch.zeros(3, 2), torch.tensor([0.5, 1.5, 2.0]))) is None
    True
    """
    if not isinstance(dataset, Sized):
        raise ConfigurationError(
            f"targets_of: {type(dataset).__name__} has no len(). A split needs a map-style dataset "
            "(__len__ and __getitem__); an iterable dataset cannot be cut by sample index."
        )
    for name in ("targets", "labels"):
        labels = _integers(getattr(dataset, name, None))
        if labels is not None and len(labels) == len(dataset):
            return labels
    if isinstance(dataset, TensorDataset):
        return _integers(dataset.tensors[-1]) if len(dataset.tensors) > 1 else None
    if isinstance(dataset, Subset):
        labels = targets_of(dataset.dataset)
        return None if labels is None else [labels[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [targets_of(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [label for part in parts for label in part or ()]
    return _read_targets(dataset, len(dataset))


def _read_targets(dataset: Dataset[Any], n: int) -> list[int] | None:
    labels = []
    for i in range(n):
        sample = dataset[i]
        label = _integer(sample[1]) if isinstance(sample, (tuple, list)) and len(sample) > 1 else None
        if label is None:
            return None
        labels.append(label)
    return labels


def _integers(values: Any) -> list[int] | None:
    """The values as Python ints, or None when they are not a one-dimensional list of integers."""
    if isinstance(values, torch.Tensor):
        if values.is_floating_point() or values.is_complex() or values.ndim != 1:
            return None
        return [int(value) for value in values.tolist()]
    if isinstance(values, np.ndarray):
        if values.ndim != 1 or values.dtype.kind not in "iub":
            return None
        return [int(value) for value in values.tolist()]
    if not isinstance(values, (list, tuple)):
        return None
    labels = []
    for value in values:
        label = _integer(value)
        if label is None:
            return None
        labels.append(label)
    return labels


def _integer(value: Any) -> int | None:
    if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim != 0:
        return None
    if isinstance(value, np.bool_):
        return int(value)
    try:
        return operator.index(value)
    except TypeError:
        return None


def stratified_split(targets: Sequence[int] | None, fraction: float, seed: int, n: int | None = None) -> Split:
    """Cut samples 0 … n-1 at random into a weight part and an architecture part, class by class.

    The architecture part has round(n · fraction) samples (Python's ``round``, half to even). Every
    class is cut in the same proportion: of n_c samples, less than one more or less than
    n_c · |arch| / n goes to the architecture part. A class with a single sample cannot be in both
    parts; it goes to the weight part (and then does not count in n of that proportion).

    Cutting the *index range* in the middle instead, as NNI's one-shot trainers do, gives on a
    dataset sorted by class two halves with no class in common: the architecture is then judged on
    classes that the weights have never seen. Here the order of the samples plays no role.

    Args:
        targets: class label of every sample (``targets_of``). None: a plain random split of n samples.
        fraction: share of the architecture part, between 0 and 1, both excluded.
        seed: 0 … 2³²-1. Equal arguments give an equal split.
        n: number of samples; needed only when targets is None.

    Raises:
        ConfigurationError: the fraction or seed is out of range, n is missing or contradicts the
            targets, a part would be empty, or a class of two or more samples would miss in a part.

    Ten samples sorted by class, six of class 0 and four of class 1, halved: 3 + 2 and 3 + 2.

    >>> labels = [0] * 6 + [1] * 4
    >>> split = stratified_split(labels, 0.5, seed=0)
    >>> sorted(labels[i] for i in split.arch)
    [0, 0, 0, 1, 1]
    >>> sorted(split.weight + split.arch) == list(range(10))
    True
    """
    n = _checked_size(targets, n)
    if not 0 < fraction < 1:
        raise ConfigurationError(
            f"stratified_split: fraction is {fraction}; allowed is more than 0 and less than 1. "
            "It is the share of samples that train the architecture; 0.5 is the usual choice."
        )
    if not 0 <= seed < 2**32:
        raise ConfigurationError(f"stratified_split: seed is {seed}; allowed is 0 to 2**32 - 1 = {2**32 - 1}.")
    n_arch = round(n * fraction)
    if not 0 < n_arch < n:
        raise ConfigurationError(
            f"stratified_split: {n} samples at fraction {fraction} give {n_arch} to the architecture and "
            f"{n - n_arch} to the weights; both parts need at least 1. Use more samples or another fraction."
        )
    if targets is None:
        weight, arch = train_test_split(range(n), test_size=n_arch, random_state=seed)
        return Split(tuple(sorted(weight)), tuple(sorted(arch)), seed, 0)
    return _split_by_class(targets, n_arch, seed)


def _checked_size(targets: Sequence[int] | None, n: int | None) -> int:
    if targets is None:
        if n is None:
            raise ConfigurationError("stratified_split: targets and n are both None. Give the number of samples n.")
        return n
    if n is not None and n != len(targets):
        raise ConfigurationError(
            f"stratified_split: n is {n} but there are {len(targets)} targets. Leave n out, or give one "
            "target per sample."
        )
    return len(targets)


def _split_by_class(targets: Sequence[int], n_arch: int, seed: int) -> Split:
    sizes = Counter(targets)
    shared = [i for i, label in enumerate(targets) if sizes[label] > 1]
    single = [i for i, label in enumerate(targets) if sizes[label] == 1]
    n_shared_classes = len(sizes) - len(single)
    n_weight = len(shared) - n_arch
    if min(n_arch, n_weight) < n_shared_classes or n_shared_classes == 0:
        raise ConfigurationError(
            f"stratified_split: {n_shared_classes} classes have two or more samples, {len(shared)} samples in "
            f"all; {n_arch} would go to the architecture and {n_weight} to the weights, and each part needs "
            "at least one of every class. Change the fraction or add samples; when the targets are no "
            "classes, pass targets=None for a plain random split."
        )
    shared_labels = [targets[i] for i in shared]
    weight, arch = train_test_split(shared, test_size=n_arch, random_state=seed, stratify=shared_labels)
    in_arch = Counter(targets[i] for i in arch)
    missing = [label for label, size in sizes.items() if size > 1 and in_arch[label] in (0, size)]
    if missing:
        label = min(missing, key=lambda label: sizes[label])
        size = sizes[label]
        raise ConfigurationError(
            f"stratified_split: {len(missing)} of {n_shared_classes} classes would miss in one part, for "
            f"example class {label}: {in_arch[label]} of its {size} samples go to the architecture and "
            f"{size - in_arch[label]} to the weights; both need at least 1. Use a fraction from about "
            f"{1 / size:.3g} to {1 - 1 / size:.3g}, add samples of this class, or leave the class out."
        )
    return Split(tuple(sorted([*weight, *single])), tuple(sorted(arch)), seed, len(sizes))
