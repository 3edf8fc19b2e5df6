"""Batches on their way to the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["moved", "parts_of_batch"]


def moved(batches: Iterator[Any], fabric: Fabric) -> Iterator[Any]:
    """Each batch on the device. On a GPU it is copied beside the step before it, and nobody waits for it."""
    device = fabric.device
    if device.type != "cuda":
        for batch in batches:
            yield fabric.to_device(batch)
        return
    beside = torch.cuda.Stream(device)

    def copied(tensor: Tensor) -> Tensor:
        # Only from pinned memory a copy goes on by itself.
        return tensor if tensor.is_cuda else tensor.pin_memory().to(device, non_blocking=True)

    for batch in batches:
        with torch.cuda.stream(beside):
            on_device = pytree.tree_map_only(Tensor, copied, batch)
        now = torch.cuda.current_stream(device)
        now.wait_stream(beside)
        for tensor in pytree.tree_leaves(on_device):
            if isinstance(tensor, Tensor):
                tensor.record_stream(now)
        yield on_device


def parts_of_batch(batch: Any, count: int) -> list[tuple[float, Any]]:
    """A batch in so many parts of nearly one size, each with its share of the samples; the first dimension is cut.

    >>> [(share, x.tolist()) for share, (x, _) in parts_of_batch((torch.arange(4), torch.zeros(4)), 2)]
    [(0.5, [0, 1]), (0.5, [2, 3])]
    """
    if count == 1:
        return [(1.0, batch)]
    n = next(leaf.shape[0] for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim())
    count = min(count, n)
    sizes = [n // count + (i < n % count) for i in range(count)]
    ends = list(accumulate(sizes))
    return [(size / n, _rows(batch, end - size, end, n)) for size, end in zip(sizes, ends, strict=True)]


def _rows(data: Any, start: int, end: int, n: int) -> Any:
    """The samples from ``start`` to ``end`` of what holds ``n``: rows of tensors, items of a list of texts."""
    if isinstance(data, Tensor):
        return data[start:end] if data.dim() else data
    if isinstance(data, Mapping):
        return {key: _rows(value, start, end, n) for key, value in data.items()}
    if isinstance(data, list | tuple):
        if len(data) == n and not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(data)):
            return data[start:end]
        items = [_rows(item, start, end, n) for item in data]
        return type(data)(*items) if hasattr(data, "_fields") else type(data)(items)
    return data
