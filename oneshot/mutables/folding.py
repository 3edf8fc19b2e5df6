"""The weight of a candidate in a mixture, moved into the weights of the candidate's last layer.

w BN(z; gamma, beta) = BN(z; w gamma, w beta), and likewise for a convolution; with w >= 0 also behind a ReLU. So a sum
of weighted candidates is a plain sum: nothing of the size of an output is multiplied or kept for the gradient of w,
dL/dw = <dL/d(w gamma), gamma> + <dL/d(w beta), beta>.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

__all__ = ["last_affine", "scaled"]

# Of exactly these types: a subclass may do anything with its weights.
_NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)
_LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
# What hands a factor >= 0 on.
_BEHIND = (nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def last_affine(module: nn.Module, most: int) -> nn.Module | None:
    """The layer whose weights a factor of the output of ``module`` can be moved into; None if there is none.

    ``most``: of a convolution or linear layer with more weights than that, a factor is cheaper behind its output.

    >>> last_affine(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()), 0)
    BatchNorm2d(2, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    >>> last_affine(nn.Sequential(nn.BatchNorm2d(2), nn.Sigmoid()), 0)
    """
    found = None if _has_any_global_hook() else _last(module)
    if found is None or type(found) in _BEHIND or _times(module, found) > 1:
        return None
    weight = found._parameters.get("weight")
    if weight is None or (type(found) in _LINEAR and weight.numel() > most):
        return None
    return found


def _last(module: nn.Module) -> nn.Module | None:
    """The last layer that is no activation; an activation if there is nothing else; None where that cannot be known."""
    if not _is_as_written(module):
        return None
    if type(module) in (*_NORMALISATIONS, *_LINEAR, *_BEHIND):
        return module
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return None
    found = None
    for child in reversed(module._modules.values()):
        found = None if child is None else _last(child)
        if found is None or type(found) not in _BEHIND:
            return found
    return found


def _is_as_written(module: nn.Module) -> bool:
    """Whether nothing but the forward of its class is called: no hook, no function in its place."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    # One of this library is around the module's own forward, and knows what the module held then.
    instead = vars(module).get("forward")
    return instead is None or getattr(instead, "module", None) is module


def _times(module: nn.Module, layer: nn.Module) -> int:
    """How often a layer stands in a module."""
    return int(module is layer) + sum(_times(child, layer) for child in module._modules.values() if child is not None)


@contextmanager
def scaled(layer: nn.Module, factor: Tensor) -> Iterator[None]:
    """Inside, weight and bias of a layer are ``factor`` (0-dim) times what they are, differentiable in both.

    >>> import torch
    >>> layer = nn.Linear(1, 1)
    >>> with scaled(layer, torch.tensor(0.5)):
    ...     half = layer(torch.ones(1, 1))
    >>> bool(half * 2 == layer(torch.ones(1, 1)))
    True
    """
    held = layer._parameters
    before = {name: held[name] for name in ("weight", "bias") if held.get(name) is not None}
    try:
        for name, tensor in before.items():
            assert tensor is not None
            held[name] = tensor * factor.to(tensor.dtype)  # type: ignore[assignment]
        yield
    finally:
        held.update(before)
