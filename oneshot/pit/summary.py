"""What a layer with searched dimensions is in the network that would be exported now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..graph.dimensions import Dimension

__all__ = ["summary_row"]


def summary_row(
    weight: str, module: nn.Module, sizes: Mapping[Dimension, int], dilations: Mapping[str, int]
) -> dict[str, Any]:
    """Type and sizes of the layer of a weight, by the sizes of its searched dimensions; {} if it has none."""
    rank = module.weight.dim() if isinstance(module, _ConvNd | nn.Linear) else 0
    searched = [d for d in range(rank) if Dimension(weight, d) in sizes]
    if not searched:
        return {}
    shape = [sizes.get(Dimension(weight, d), n) for d, n in enumerate(module.weight.shape)]  # type: ignore[arg-type]
    if isinstance(module, nn.Linear):
        return {"type": type(module).__name__, "in_features": shape[1], "out_features": shape[0]}
    assert isinstance(module, _ConvNd)
    rows, columns = (1, 0) if isinstance(module, _ConvTransposeNd) else (0, 1)
    groups = module.groups * shape[0] // module.weight.shape[0] if module.groups > 1 else 1
    per_group = module.groups > 1 and isinstance(module, _ConvTransposeNd)
    return {
        "type": type(module).__name__,
        "in_channels": shape[columns] * (1 if per_group else groups),
        "out_channels": shape[rows] * (groups if per_group else 1),
        "kernel_size": tuple(shape[2:]),
        "dilation": tuple(d * dilations.get(weight, 1) for d in module.dilation),
    }
