"""The whole of a dataset in order, for evaluation, and single inputs, for comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from ..errors import ConfigurationError

__all__ = ["even_batches", "example_inputs"]


def even_batches(
    dataset: Dataset[Any], batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Any, Any]]:
    """The whole dataset in order, in batches of nearly one size, so that none is too small for BatchNorm.

    Of several processes, each has every ``world_size``-th of the same batches, which may be one less than another has.
    """
    n = len(dataset)  # type: ignore[arg-type]
    if n == 0:
        raise ConfigurationError("the dataset is empty; at least one sample is needed")
    n_batches = math.ceil(n / batch_size)
    bounds = [round(i * n / n_batches) for i in range(n_batches + 1)]
    rows = [list(range(a, b)) for a, b in pairwise(bounds)]
    for batch in DataLoader(dataset, batch_sampler=rows[rank::world_size], generator=torch.Generator()):
        if not isinstance(batch, (list, tuple)) or len(batch) != 2:
            raise ConfigurationError(f"the dataset must give pairs (input, target), got {type(batch).__name__}")
        yield batch[0], batch[1]


def example_inputs(model: nn.Module, dataset: Dataset[Any] | None, example: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """What an export is verified on: a sample of the data if there are any, and random numbers of its shape."""
    if dataset is None:
        return [example]
    parameter = next(model.parameters())
    sample, _ = next(iter(even_batches(Subset(dataset, [0]), 1)))
    if not sample.is_floating_point():
        return [(sample.to(parameter.device),)]
    sample = sample.to(parameter)
    noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(0)).to(sample)
    return [(sample,), (noise,)]
