"""A smaller copy of a network: parameters without some of their indices, and layers that know their new sizes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..errors import UnsupportedModelError
from .dimensions import Dimension

__all__ = ["conv_padding", "copied", "cut"]

_PADS = {1: nn.ConstantPad1d, 2: nn.ConstantPad2d, 3: nn.ConstantPad3d}


def cut(
    model: nn.Module,
    kept: Mapping[Dimension, Tensor],
    *,
    dilations: Mapping[str, Sequence[int]] | None = None,
    numbers: Mapping[str, Mapping[int, int]] | None = None,
) -> nn.Module:
    """A copy of ``model`` with the ``kept`` indices of its dimensions only, in their order. ``model`` stays as it is.

    ``dilations``: weight of a convolution whose kernel loses taps -> dilation of the taps that are left. Its padding is
    changed side by side, so that the values and the length of the output are those of the same taps before.
    ``numbers``: path of a module of the user -> number before -> number after, for its attributes that are sizes.

    >>> import torch
    >>> small = cut(nn.Sequential(nn.Linear(3, 4)), {Dimension("0.weight", 0): torch.tensor([0, 2])})
    >>> small[0], small[0].weight.shape
    (Linear(in_features=3, out_features=2, bias=True), torch.Size([2, 3]))
    """
    memo: dict[int, Any] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        dims = [d for d in range(tensor.dim()) if Dimension(name, d) in kept]
        if dims:
            small = tensor.detach()
            for d in dims:
                small = small.index_select(d, kept[Dimension(name, d)].to(small.device))
            small = small.clone() if small is tensor else small
            memo[id(tensor)] = nn.Parameter(small, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else small
    small_model = copied(model, memo)
    originals = dict(model.named_modules())
    for path, module in small_model.named_modules():
        _resize(module, originals[path])
        for name, value in _sizes(module) if numbers and path in numbers else ():
            setattr(module, name, _renumbered(value, numbers[path]))  # type: ignore[index]
    for path, module in list(small_model.named_modules()):
        weight = Dimension(f"{path}.weight".lstrip("."), 2)
        taps = [kept.get(weight._replace(dim=d)) for d in (2, 3, 4)]
        if isinstance(module, _ConvNd) and any(t is not None for t in taps):
            dilation = (dilations or {}).get(weight.name, module.dilation)
            small_model = _with_smaller_kernel(small_model, path, module, originals[path], taps, dilation)
    return small_model


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy, with copies of the results of a forward that a module keeps (an attention map, a normed weight)."""
    memo = {} if memo is None else memo
    for module in model.modules():
        for tensor in _tensors_in(vars(module)):
            if tensor.grad_fn is not None:
                memo.setdefault(id(tensor), tensor.detach().clone())
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied: {error}. Do not keep results of a forward, locks or files in "
            "the attributes of a module"
        ) from error


def _tensors_in(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for leaf in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors_in(leaf)


def _resize(module: nn.Module, before: nn.Module) -> None:
    """Let the attributes of a layer of torch say what its parameters are."""
    if isinstance(module, _ConvNd) and isinstance(before, _ConvNd):
        rows = 1 if isinstance(module, _ConvTransposeNd) else 0
        if module.groups > 1:
            module.groups = module.groups * module.weight.shape[0] // before.weight.shape[0]
        of_rows, of_columns = module.weight.shape[rows], module.weight.shape[1 - rows]
        transposed = isinstance(module, _ConvTransposeNd)
        module.out_channels = of_rows * (module.groups if transposed else 1)
        module.in_channels = of_columns * (1 if transposed else module.groups)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _NormBase):
        known = next((t for t in (module.weight, module.running_mean) if t is not None), None)
        module.num_features = module.num_features if known is None else known.numel()
    elif isinstance(module, nn.GroupNorm) and module.weight is not None and isinstance(before, nn.GroupNorm):
        module.num_groups = before.num_groups * module.weight.numel() // before.num_channels
        module.num_channels = module.weight.numel()
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]


def _sizes(module: nn.Module) -> list[tuple[str, Any]]:
    """The attributes of a module that are numbers, or tuples and lists of them."""

    def is_size(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return type(value) in (list, tuple) and len(value) > 0 and all(is_size(v) for v in value)
        return isinstance(value, int) and not isinstance(value, bool)

    return [(name, value) for name, value in vars(module).items() if not name.startswith("_") and is_size(value)]


def _renumbered(value: Any, numbers: Mapping[int, int]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_renumbered(v, numbers) for v in value)
    return numbers.get(value, value)


# --- kernels --------------------------------------------------------------------------------------------------------


def conv_padding(conv: _ConvNd) -> list[tuple[int, int]]:
    """What a convolution adds before and after each of its spatial dimensions.

    >>> conv_padding(nn.Conv1d(1, 1, 4, padding="same"))  # 3 in all: the larger part behind
    [(1, 2)]
    """
    if conv.padding == "valid":
        return [(0, 0)] * len(conv.kernel_size)
    return _same_padding(conv) if conv.padding == "same" else [(int(p), int(p)) for p in conv.padding]


def _same_padding(conv: _ConvNd) -> list[tuple[int, int]]:
    totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


def _with_smaller_kernel(
    model: nn.Module,
    path: str,
    conv: _ConvNd,
    before: _ConvNd,
    taps: Sequence[Tensor | None],
    dilation: Sequence[int],
) -> nn.Module:
    """Output t of a kernel is sum_j w_j x[t - left + j D]: what is left of it reads the same x."""
    sides = []
    for d, (left, right) in enumerate(conv_padding(before)):
        kept = taps[d]
        if kept is not None:
            step, last = before.dilation[d], before.kernel_size[d] - 1
            left, right = left - int(kept[0]) * step, right - (last - int(kept[-1])) * step
        sides.append((left, right))
    conv.kernel_size = tuple(conv.weight.shape[2:])
    conv.dilation = tuple(dilation)
    even = all(left == right >= 0 for left, right in sides)
    conv.padding = tuple(left for left, _ in sides) if even else (0,) * len(sides)
    conv._reversed_padding_repeated_twice = [n for left, right in reversed(sides) for n in (left, right)]
    # torch warns of 'same' where one side gets more: it copies the input into a larger one, as a pad in front does.
    if even and before.padding == "same" and _same_padding(conv) == sides:
        conv.padding = "same"
        return model
    if even:
        return model
    conv._reversed_padding_repeated_twice = [0] * (2 * len(sides))
    amounts = [n for left, right in reversed(sides) for n in (left, right)]
    # What is added comes first: a crop may be longer than the input.
    steps = [tuple(max(n, 0) for n in amounts), tuple(min(n, 0) for n in amounts)]
    pads = [_PADS[len(sides)](step, 0.0).train(conv.training) for step in steps if any(step)]  # type: ignore[arg-type]
    padded = nn.Sequential(*pads, conv)
    padded.training = conv.training
    return _replaced(model, conv, padded)


def _replaced(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """``model`` with another module wherever the old one stood."""
    if model is old:
        return new
    for module in list(model.modules()):
        if module is not new:
            for name, child in module._modules.items():
                if child is old:
                    module._modules[name] = new
    return model
