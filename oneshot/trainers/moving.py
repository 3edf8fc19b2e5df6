"""Batches on their way to the device."""

from __future__ import annotations

from collections.abc import Iterator
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
    leaves, tree = pytree.tree_flatten(batch)
    n = next(leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim())
    count = min(count, n)
    cut = [leaf.tensor_split(count) if isinstance(leaf, Tensor) and leaf.dim() else [leaf] * count for leaf in leaves]
    parts = [pytree.tree_unflatten([pieces[i] for pieces in cut], tree) for i in range(count)]
    # As tensor_split has it: the first n mod count parts have one more.
    sizes = [n // count + (i < n % count) for i in range(count)]
    return [(size / n, part) for size, part in zip(sizes, parts, strict=True)]
