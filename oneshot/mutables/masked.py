"""Layers with masks placed by hand: what a ChannelMask, KernelMask and DilationMask do to one layer."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor, nn

from ..errors import ConfigurationError
from .masks import ChannelMask, DilationMask, KernelMask

__all__ = ["MaskedConv1d", "MaskedConv2d", "MaskedConv3d", "MaskedLinear"]


def _check(name: str, mask: nn.Module | None, kind: type, size: int, what: str) -> None:
    if mask is None:
        return
    if not isinstance(mask, kind):
        raise ConfigurationError(f"{name}: a {kind.__name__} is needed for its {what}, got {type(mask).__name__}")
    n = mask.taps if isinstance(mask, DilationMask) else len(mask.alpha)  # type: ignore[arg-type]
    if n != size:
        raise ConfigurationError(f"{name}: a {kind.__name__} of {n} for {size} {what}")


def _rows(mask: ChannelMask | None, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias without what makes the masked outputs: these are 0."""
    if mask is None:
        return weight, bias
    kept = mask.hard().to(weight.dtype)
    rows = kept.reshape([-1] + [1] * (weight.dim() - 1))
    return weight * rows, None if bias is None else bias * kept


@final
class MaskedConv1d(nn.Conv1d):
    """``nn.Conv1d`` with masks: of its output channels, of its kernel size, of its dilation; None: not searched.

    Each mask may be shared with other layers: one object, one decision. Alone, a masked output channel is 0; in a
    ``PIT`` network the masks are applied where they and a smaller layer come to the same.

    >>> import torch
    >>> conv = MaskedConv1d(1, 2, 3, channel_mask=ChannelMask(2), kernel_mask=KernelMask(3))
    >>> conv.channel_mask.keep([1])
    >>> conv(torch.ones(1, 1, 3))[0, 0].tolist()
    [0.0]
    """

    def __init__(
        self,
        *args: Any,
        channel_mask: ChannelMask | None = None,
        kernel_mask: KernelMask | None = None,
        dilation_mask: DilationMask | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        _check("MaskedConv1d", channel_mask, ChannelMask, self.out_channels, "output channels")
        _check("MaskedConv1d", kernel_mask, KernelMask, self.kernel_size[0], "taps")
        _check("MaskedConv1d", dilation_mask, DilationMask, self.kernel_size[0], "taps")
        if (kernel_mask is not None or dilation_mask is not None) and self.stride != (1,):
            raise ConfigurationError(f"MaskedConv1d: masks of the kernel need stride 1, got {self.stride[0]}")
        self.channel_mask, self.kernel_mask, self.dilation_mask = channel_mask, kernel_mask, dilation_mask

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _rows(self.channel_mask, self.weight, self.bias)
        for mask in (self.kernel_mask, self.dilation_mask):
            if mask is not None:
                weight = weight * mask.hard().to(weight.dtype)
        return self._conv_forward(x, weight, bias)


@final
class MaskedConv2d(nn.Conv2d):
    """``nn.Conv2d`` with a mask of its output channels.

    >>> import torch
    >>> MaskedConv2d(1, 4, 3, channel_mask=ChannelMask(4))(torch.ones(1, 1, 3, 3)).shape
    torch.Size([1, 4, 1, 1])
    """

    def __init__(self, *args: Any, channel_mask: ChannelMask | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check("MaskedConv2d", channel_mask, ChannelMask, self.out_channels, "output channels")
        self.channel_mask = channel_mask

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, *_rows(self.channel_mask, self.weight, self.bias))


@final
class MaskedConv3d(nn.Conv3d):
    """``nn.Conv3d`` with a mask of its output channels.

    >>> import torch
    >>> MaskedConv3d(1, 4, 1, channel_mask=ChannelMask(4))(torch.ones(1, 1, 2, 2, 2)).shape
    torch.Size([1, 4, 2, 2, 2])
    """

    def __init__(self, *args: Any, channel_mask: ChannelMask | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check("MaskedConv3d", channel_mask, ChannelMask, self.out_channels, "output channels")
        self.channel_mask = channel_mask

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, *_rows(self.channel_mask, self.weight, self.bias))


@final
class MaskedLinear(nn.Linear):
    """``nn.Linear`` with a mask of its output features.

    >>> import torch
    >>> MaskedLinear(3, 2, channel_mask=ChannelMask(2))(torch.ones(1, 3)).shape
    torch.Size([1, 2])
    """

    def __init__(self, *args: Any, channel_mask: ChannelMask | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check("MaskedLinear", channel_mask, ChannelMask, self.out_features, "output features")
        self.channel_mask = channel_mask

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, *_rows(self.channel_mask, self.weight, self.bias))


def placed_masks(layer: nn.Module) -> dict[str, nn.Module]:
    """The masks that a masked layer holds, by what they are of."""
    names = ("channel_mask", "kernel_mask", "dilation_mask")
    return {name: mask for name in names if (mask := getattr(layer, name, None)) is not None}


def plain_layer(layer: nn.Module) -> nn.Module:
    """The layer of torch that a masked one is, with the same parameters."""
    plain_type = type(layer).__mro__[1]
    plain: nn.Module = nn.Module.__new__(plain_type)
    plain.__dict__.update({k: v for k, v in layer.__dict__.items() if k != "_modules"})
    plain.__dict__["_modules"] = {}
    return plain


MASKED_LAYERS = (MaskedConv1d, MaskedConv2d, MaskedConv3d, MaskedLinear)
