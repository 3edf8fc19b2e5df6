from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from oneshot.data import Split, stratified_split, targets_of
from oneshot.errors import ConfigurationError


class Pairs(Dataset[Any]):
    """(index, target) pairs that count how many samples were read; extra attributes as given."""

    def __init__(self, values: list[Any], **attributes: Any) -> None:
        self.pairs = list(enumerate(values))
        self.n_read = 0
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        self.n_read += 1
        return self.pairs[index]


@pytest.mark.parametrize(
    "values",
    [
        [3, 1, 1],
        (3, 1, 1),
        torch.tensor([3, 1, 1]),
        torch.tensor([3, 1, 1], dtype=torch.uint8),
        np.array([3, 1, 1], dtype=np.int16),
        [np.int64(3), torch.tensor(1), 1],
    ],
)
@pytest.mark.parametrize("name", ["targets", "labels"])
def test_labels_come_from_an_attribute_without_reading_a_sample(name: str, values: Any) -> None:
    dataset = Pairs([9, 9, 9], **{name: values})
    labels = targets_of(dataset)
    assert labels == [3, 1, 1]
    assert all(type(label) is int for label in labels)
    assert dataset.n_read == 0


@pytest.mark.parametrize(
    "attributes",
    [
        {"labels": ["cat", "dog", "cow"]},  # class names, not labels
        {"targets": [0, 1]},  # one too few
        {"targets": torch.zeros(3, 2, dtype=torch.int64)},  # one-hot
        {"targets": np.zeros((3, 1))},
        {"targets": torch.zeros(3)},
        {"targets": {0: 1}},
    ],
)
def test_an_attribute_that_is_not_one_label_per_sample_is_passed_over(attributes: dict[str, Any]) -> None:
    dataset = Pairs([2, np.int64(0), torch.tensor(2)], **attributes)
    assert targets_of(dataset) == [2, 0, 2]
    assert dataset.n_read == 3


def test_booleans_are_the_labels_zero_and_one() -> None:
    assert targets_of(Pairs([True, np.bool_(False)])) == [1, 0]
    assert targets_of(Pairs([5, 5], targets=torch.tensor([True, False]))) == [1, 0]


def test_regression_has_no_labels_and_reads_one_sample() -> None:
    dataset = Pairs([0.5, 1.0, 2.0], targets=[0.5, 1.0, 2.0])
    assert targets_of(dataset) is None
    assert dataset.n_read == 1


def test_samples_without_a_target_have_no_labels() -> None:
    class Images(Dataset[Any]):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            return torch.zeros(3)

    assert targets_of(Images()) is None


def test_tensor_dataset_uses_its_last_tensor_if_it_holds_labels() -> None:
    images = torch.zeros(3, 2)
    assert targets_of(TensorDataset(images, torch.tensor([4, 4, 0]))) == [4, 4, 0]
    assert targets_of(TensorDataset(images, torch.tensor([0.0, 1.0, 2.0]))) is None
    assert targets_of(TensorDataset(images, torch.tensor([[4], [4], [0]]))) is None
    assert targets_of(TensorDataset(torch.tensor([4, 4, 0]))) is None  # inputs only


def test_subsets_and_concatenations_are_looked_through() -> None:
    left = Pairs([0] * 4, targets=[10, 11, 12, 13])
    right = TensorDataset(torch.zeros(2, 1), torch.tensor([20, 21]))
    both: ConcatDataset[Any] = ConcatDataset([Subset(left, [3, 1]), right])  # 13 11 20 21
    assert targets_of(Subset(both, [2, 0, 0])) == [20, 13, 13]
    assert left.n_read == 0
    assert targets_of(ConcatDataset([left, Pairs([0.5])])) is None
    assert targets_of(Subset(Pairs([0.5, 1.5]), [1])) is None


def test_a_dataset_without_length_is_an_error() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(())

    with pytest.raises(ConfigurationError, match="Stream has no len"):
        targets_of(Stream())


def test_class_sorted_data_gives_all_classes_to_both_parts() -> None:
    # Cut in the middle, the halves would hold the classes 0-4 and 5-9.
    labels = [label for label in range(10) for _ in range(20)]
    split = stratified_split(labels, 0.5, seed=3)
    expected = Counter(dict.fromkeys(range(10), 10))  # half of 20 each
    assert Counter(labels[i] for i in split.weight) == expected
    assert Counter(labels[i] for i in split.arch) == expected
    assert split.n_classes == 10
    assert split.seed == 3


def test_equal_seeds_give_equal_splits_and_others_do_not() -> None:
    labels = [i % 4 for i in range(80)]
    assert stratified_split(labels, 0.25, seed=1) == stratified_split(labels, 0.25, seed=1)
    assert stratified_split(labels, 0.25, seed=1).arch != stratified_split(labels, 0.25, seed=2).arch


def test_classes_of_one_sample_go_to_the_weights() -> None:
    labels = [7, 0, 0, 0, 0, 1, 1, 1, 1, 8]
    split = stratified_split(labels, 0.4, seed=0)
    assert {0, 9} <= set(split.weight)
    assert Counter(labels[i] for i in split.arch) == {0: 2, 1: 2}  # round(10 * 0.4) = 4 of two equal classes
    assert split.n_classes == 4


def test_without_labels_the_split_is_random_of_the_right_size() -> None:
    split = stratified_split(None, 0.3, seed=5, n=10)
    assert (len(split.weight), len(split.arch), split.n_classes) == (7, 3, 0)
    assert sorted(split.weight + split.arch) == list(range(10))
    # 20 seeds: the one split 0-6 / 7-9 has chance 1/120 each time.
    assert len({stratified_split(None, 0.3, seed=seed, n=10).arch for seed in range(20)}) > 10


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ConfigurationError, match=f"fraction is {fraction}"):
        stratified_split([0, 0, 1, 1], fraction, seed=0)


@pytest.mark.parametrize(
    ("targets", "fraction", "seed", "n", "message"),
    [
        ([0, 0, 1, 1], 0.5, -1, None, "seed is -1"),
        ([0, 0, 1, 1], 0.5, 2**32, None, "seed is 4294967296"),
        ([0, 0, 1, 1], 0.5, 0, 5, "n is 5 but there are 4 targets"),
        (None, 0.5, 0, None, "both None"),
        (None, 0.01, 0, 10, "10 samples at fraction 0.01 give 0 to the architecture and 10"),
        ([0] * 10, 0.99, 0, None, "give 10 to the architecture and 0 to the weights"),
        ([], 0.5, 0, None, "0 samples"),
        ([0, 1, 2, 3], 0.5, 0, None, "0 classes have two or more samples"),
        ([0, 0, 1, 1, 2, 2], 0.25, 0, None, "3 classes .* 2 would go to the architecture and 4"),
        ([0] * 98 + [1] * 2, 0.1, 0, None, "class 1: 0 of its 2 samples .* from about 0.5 to 0.5"),
        ([0] * 98 + [1] * 2, 0.9, 0, None, "class 1: 2 of its 2 samples"),
    ],
)
def test_impossible_splits_say_the_numbers(
    targets: list[int] | None, fraction: float, seed: int, n: int | None, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        stratified_split(targets, fraction, seed, n)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 15), min_size=1, max_size=8),
    fraction=st.floats(0.02, 0.98),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_split_is_disjoint_complete_and_proportional(
    sizes: list[int], fraction: float, seed: int, data: st.DataObject
) -> None:
    labels = data.draw(st.permutations([label for label, size in enumerate(sizes) for _ in range(size)]))
    n_arch = round(len(labels) * fraction)
    shared = [size for size in sizes if size > 1]
    # The share of each class in the architecture part, before it is rounded up or down.
    if shared and all(1 <= size * n_arch / sum(shared) <= size - 1 for size in shared):
        _check(labels, stratified_split(labels, fraction, seed), fraction)
        return
    try:
        split = stratified_split(labels, fraction, seed)
    except ConfigurationError:
        return
    _check(labels, split, fraction)


def _check(labels: list[int], split: Split, fraction: float) -> None:
    n = len(labels)
    sizes = Counter(labels)
    assert sorted(split.weight + split.arch) == list(range(n))  # disjoint and complete
    assert list(split.weight) == sorted(split.weight)
    assert list(split.arch) == sorted(split.arch)
    assert len(split.arch) == round(n * fraction)
    assert split.n_classes == len(sizes)
    in_arch = Counter(labels[i] for i in split.arch)
    n_shared = sum(size for size in sizes.values() if size > 1)
    for label, size in sizes.items():
        if size == 1:
            assert in_arch[label] == 0
        else:
            assert 0 < in_arch[label] < size
            assert abs(in_arch[label] - size * len(split.arch) / n_shared) < 1
