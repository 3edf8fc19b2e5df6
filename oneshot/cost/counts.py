"""Counted costs: parameters and multiply-accumulates (MACs)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils import _pytree as pytree

from ..errors import UnknownCostError
from ..graph import Call, parameter_conditions, trace_calls, undecided_inside
from ..mutables import Mutable
from .model import CostModel, Term, terms_of_any

__all__ = ["MAC_RULES", "LayerSpec", "conv_macs", "count_macs", "count_params", "linear_macs"]


@dataclass(frozen=True)
class LayerSpec:
    """What a formula needs to know of one call of a layer, for one sample.

    ``positions``: at how many positions the layer is applied: output height * width of a convolution, input
    height * width of a transposed one, the product of all dimensions but the last of a Linear, the product of those
    after the channels of other layers. Where the network folds something into the batch (the windows of an image,
    the steps of a sequence), these are positions too.
    """

    in_channels: int
    out_channels: int
    kernel: tuple[int, ...] = ()
    groups: int = 1
    positions: int = 1


def conv_macs(spec: LayerSpec) -> float:
    """positions * out_channels * (in_channels / groups) * prod(kernel); the bias is not a MAC.

    >>> conv_macs(LayerSpec(in_channels=3, out_channels=8, kernel=(3, 3), positions=16 * 16))  # 8*256*27
    55296
    """
    return spec.positions * spec.out_channels * spec.in_channels * math.prod(spec.kernel) // spec.groups


def linear_macs(spec: LayerSpec) -> float:
    """positions * in_features * out_features.

    >>> linear_macs(LayerSpec(in_channels=10, out_channels=4, positions=5))
    200
    """
    return spec.positions * spec.in_channels * spec.out_channels


def no_macs(spec: LayerSpec) -> float:
    """A normalisation or an activation: its multiplications are elementwise, by convention not counted."""
    return 0


MacRule = Callable[[LayerSpec], float]

# Layer type -> formula; the most specific type of a layer's class decides.
MAC_RULES: Mapping[type[nn.Module], MacRule] = MappingProxyType(
    {
        _ConvNd: conv_macs,
        nn.Linear: linear_macs,
        _NormBase: no_macs,
        nn.LayerNorm: no_macs,
        nn.GroupNorm: no_macs,
        nn.PReLU: no_macs,
    }
)


def count_params(model: nn.Module) -> CostModel:
    """Parameters (elements) of the fixed model of each architecture; a shared module counts once."""
    terms = [
        term
        for parameter, conditions in parameter_conditions(model)
        for term in terms_of_any(float(parameter.numel()), conditions)
    ]
    return CostModel("params", "parameters", terms, model)


def count_macs(
    model: nn.Module, args: Sequence[Any], *, rules: Mapping[type[nn.Module], MacRule] = MAC_RULES
) -> CostModel:
    """MACs of one sample for each architecture, on an example input; a shared module counts at every call.

    A layer with parameters of its own that no rule covers is an UnknownCostError.
    """

    def is_unit(module: nn.Module) -> bool:
        return _rule(module, rules) is not None or _has_own_parameters(module)

    batch = _batch_size(args)
    terms = []
    for call in trace_calls(model, args, is_unit):
        rule = _rule(call.module, rules)
        name = f"macs: {call.path or 'the network'} is a {type(call.module).__name__}"
        if rule is None:
            raise UnknownCostError(
                f"{name} with parameters of its own, "
                f"and no rule covers it; the rules cover {sorted(t.__name__ for t in rules)}. "
                "Pass count_macs(..., rules={**MAC_RULES, YourLayer: formula})"
            )
        inner = undecided_inside(call.module)
        if inner is not None:
            raise UnknownCostError(
                f"{name}, which a rule counts as a whole, and holds {inner}, whose candidates it cannot tell apart. "
                "Move the choice out of it, or leave its type out of the rules"
            )
        terms.append(Term(float(rule(_layer_spec(call, batch))), call.when))
    return CostModel("macs", "MAC", terms, model)


def _rule(module: nn.Module, rules: Mapping[type[nn.Module], MacRule]) -> MacRule | None:
    return next((rules[cls] for cls in type(module).__mro__ if cls in rules), None)


def _has_own_parameters(module: nn.Module) -> bool:
    # A ParameterList is never called: what it holds is used by the module around it.
    lists = [child for child in module.children() if isinstance(child, nn.ParameterList | nn.ParameterDict)]
    holders = [] if isinstance(module, Mutable) else [module, *lists]
    return any(p is not None for holder in holders for p in holder._parameters.values())


def _layer_spec(call: Call, batch: int) -> LayerSpec:
    module, inputs, output = call.module, call.input_shape, call.output_shape
    if isinstance(module, _ConvNd):
        shape, d = inputs if isinstance(module, _ConvTransposeNd) else output, len(module.kernel_size)
        return LayerSpec(
            in_channels=module.in_channels,
            out_channels=module.out_channels,
            kernel=tuple(module.kernel_size),
            groups=module.groups,
            positions=_per_sample(math.prod(shape[: -d - 1]) * math.prod(shape[-d:]), batch),
        )
    if isinstance(module, nn.Linear):
        positions = _per_sample(math.prod(output[:-1]), batch)
        return LayerSpec(module.in_features, module.out_features, positions=positions)
    channels_in, channels_out = (shape[1] if len(shape) > 1 else 1 for shape in (inputs, output))
    positions = _per_sample(math.prod(output[:1] + output[2:]), batch)
    return LayerSpec(channels_in, channels_out, positions=positions)


def _batch_size(args: Sequence[Any]) -> int:
    tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    return max(1, tensors[0].shape[0]) if tensors and tensors[0].dim() else 1


def _per_sample(positions: int, batch: int) -> int:
    # What does not grow with the batch (a table of positions, say) is due in full for one sample.
    return positions // batch if positions % batch == 0 else positions
