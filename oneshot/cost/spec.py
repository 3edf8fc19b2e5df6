"""What a cost formula is told of a layer, and the table of layer types and formulas that a counted cost is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias, final

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..errors import ConfigurationError, UnknownCostError, UnsupportedModelError
from ..graph import Call, Operation

__all__ = ["OPERATORS", "CostSpec", "Formula", "LayerSpec", "Rule", "operator_spec", "read_layer"]

Count: TypeAlias = int | Tensor


@dataclass(frozen=True)
class LayerSpec:
    """What a formula needs to know of one call of a layer, for one sample.

    ``in_channels``, ``out_channels``: features of a Linear, rows and columns of a table of embeddings. They, the
    ``kernel`` and the ``groups`` are ints, or tensors (of no dimension) for a layer whose size is being searched.
    ``positions``: how many outputs of ``out_channels`` numbers there are: output height * width of a convolution, the
    product of all dimensions but the last of a Linear. Where the network folds something into the batch (the windows
    of an image, the steps of a sequence), these are positions too. ``in_positions``: the same of the input;
    ``output_size``: height and width of the output, or what else lies between the channels and the batch.
    ``has_bias``: whether ``out_channels`` numbers are added at each position. ``weighted``: whether the inputs are
    multiplied with weights of the layer, and not with each other. ``parts``: the products that an attention, a
    recurrent or a bilinear layer consists of.
    """

    in_channels: Count
    out_channels: Count
    kernel: tuple[Count, ...] = ()
    groups: Count = 1
    positions: int = 1
    in_positions: int = 1
    output_size: tuple[int, ...] = ()
    has_bias: bool = False
    transposed: bool = False
    weighted: bool = True
    parts: tuple[LayerSpec, ...] = ()

    @property
    def products(self) -> Count:
        """in_channels * out_channels * prod(kernel) / groups: products per position, and weights of the layer.

        >>> LayerSpec(in_channels=8, out_channels=8, kernel=(3, 3), groups=8).products
        72
        """
        total: Count = self.in_channels * self.out_channels
        for size in self.kernel:
            total = total * size
        if isinstance(self.groups, int) and (self.groups == 1 or isinstance(total, int)):
            return total if self.groups == 1 else total // self.groups
        return total / self.groups  # type: ignore[return-value]

    @property
    def depthwise(self) -> bool:
        """Whether each input channel is convolved on its own."""
        return bool(self.groups == self.in_channels) and bool(self.groups != 1)


Formula: TypeAlias = Callable[[LayerSpec], Any]
Condition: TypeAlias = Callable[[LayerSpec], bool]


class Rule(NamedTuple):
    """``formula`` prices the layers of a type (and of its subclasses) for which ``condition`` holds; None: all."""

    layer_type: type[nn.Module]
    formula: Formula
    condition: Condition | None = None

    def __str__(self) -> str:
        where = "" if self.condition is None else f" if {_name(self.condition)}"
        return f"{self.layer_type.__name__}{where}: {_name(self.formula)}"


@final
@dataclass(frozen=True)
class CostSpec:
    """A counted cost: a visible table (layer type, condition) -> formula. It is extended by ``with_rule``.

    ``unit``: what the formulas return. ``per_call``: whether a layer is due at each of its calls (operations) or once
    (parameters). ``functional``: the formula of what runs outside of all layers of the table, such as ``x @ w``,
    ``F.conv2d`` or ``F.scaled_dot_product_attention``; None makes such an operator an error. Parameters are not due per
    call, and need none.

    The most specific rule wins, in whatever order they came: a rule of the layer's own class before one of a base
    class, and in one class a condition that holds before the rule without condition. ConfigurationError for two
    rules of one type and condition.

    >>> bits = CostSpec("traffic", "bit").with_rule(nn.Linear, lambda layer: 8 * layer.products)
    >>> bits = bits.with_rule(nn.Linear, lambda layer: 32 * layer.products, lambda layer: layer.in_channels < 8)
    >>> small, large = LayerSpec(4, 2), LayerSpec(16, 4)
    >>> [bits.formula_for(nn.Linear, layer)(layer) for layer in (small, large)]
    [256, 512]
    """

    name: str
    unit: str
    rules: tuple[Rule, ...] = ()
    per_call: bool = True
    functional: Formula | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        seen: dict[tuple[type[nn.Module], Condition | None], Rule] = {}
        for rule in self.rules:
            if not (isinstance(rule.layer_type, type) and issubclass(rule.layer_type, nn.Module)):
                raise ConfigurationError(
                    f"{self.name}: a rule for {rule.layer_type!r}; a subclass of torch.nn.Module is needed"
                )
            other = seen.setdefault((rule.layer_type, rule.condition), rule)
            if other is not rule:
                raise ConfigurationError(
                    f"{self.name}: two rules of one layer type and condition, '{other}' and '{rule}'. Give one of them "
                    "another condition, or make the table anew: CostSpec(name, unit, rules)"
                )

    def with_rule(self, layer_type: type[nn.Module], formula: Formula, condition: Condition | None = None) -> CostSpec:
        """A new spec with one rule more. A formula may return 0 on purpose."""
        return replace(self, rules=(*self.rules, Rule(layer_type, formula, condition)))

    def covers(self, layer_type: type[nn.Module]) -> bool:
        """Whether there is a rule for a layer type or one of its bases."""
        return any(issubclass(layer_type, rule.layer_type) for rule in self.rules)

    def formula_for(self, layer_type: type[nn.Module], layer: LayerSpec) -> Formula | None:
        """The formula of the most specific rule, None without one; ConfigurationError when two conditions tie."""
        for cls in layer_type.__mro__:
            rules = [rule for rule in self.rules if rule.layer_type is cls]
            holding = [rule for rule in rules if rule.condition is not None and rule.condition(layer)]
            if len(holding) > 1:
                raise ConfigurationError(
                    f"{self.name}: {layer_type.__name__} has two rules whose conditions both hold, '{holding[0]}' and "
                    f"'{holding[1]}', for {layer}. Make the conditions exclude each other"
                )
            chosen = holding or [rule for rule in rules if rule.condition is None]
            if chosen:
                return chosen[0].formula
        return None


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", None) or repr(function))


# --- layers -----------------------------------------------------------------------------------------------------


def read_layer(module: nn.Module, call: Call | None) -> LayerSpec:
    """The LayerSpec of a call. Without a call (a layer whose weights are used from outside), positions are 1.

    UnsupportedModelError for a layer without a call of a type whose channels are known from its input only.
    """
    readers: list[tuple[type | tuple[type, ...], Callable[[Any, Call | None], LayerSpec]]] = [
        (_ConvNd, _convolution),
        (nn.Linear, _linear),
        (nn.Bilinear, _bilinear),
        ((nn.Embedding, nn.EmbeddingBag), _embedding),
        (nn.MultiheadAttention, _attention),
        (nn.RNNBase, _recurrent),
        (nn.RNNCellBase, _cell),
    ]
    reader = next((reader for types, reader in readers if isinstance(module, types)), None)
    return _by_shape(module, call) if reader is None else reader(module, call)


def _convolution(module: _ConvNd, call: Call | None) -> LayerSpec:
    d = len(module.kernel_size)
    inputs, outputs = (call.input_shape, call.output_shape) if call else ((1,) * (d + 1), (1,) * (d + 1))
    return LayerSpec(
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        kernel=tuple(module.kernel_size),
        groups=module.groups,
        positions=math.prod(outputs[: -d - 1]) * math.prod(outputs[-d:]),
        in_positions=math.prod(inputs[: -d - 1]) * math.prod(inputs[-d:]),
        output_size=outputs[-d:],
        has_bias=module.bias is not None,
        transposed=isinstance(module, _ConvTransposeNd),
    )


def _linear(module: nn.Linear, call: Call | None) -> LayerSpec:
    shape = call.output_shape[:-1] if call else (1,)
    return _rows(module.in_features, module.out_features, math.prod(shape), module.bias is not None, shape[1:])


def _bilinear(module: nn.Bilinear, call: Call | None) -> LayerSpec:
    """y_o = x1 A_o x2 + b_o: x1 times all columns of A, then for each o a sum of products with x2."""
    shape = call.output_shape[:-1] if call else (1,)
    one, two, out, n = module.in1_features, module.in2_features, module.out_features, math.prod(shape)
    bias = module.bias is not None
    parts = (_rows(one, two * out, n), replace(_rows(two, out, n, bias), weighted=False))
    return LayerSpec(one, out, positions=n, in_positions=n, output_size=shape[1:], has_bias=bias, parts=parts)


def _embedding(module: nn.Embedding | nn.EmbeddingBag, call: Call | None) -> LayerSpec:
    shape = call.output_shape[:-1] if call else (1,)
    return _rows(module.num_embeddings, module.embedding_dim, math.prod(shape), size=shape[1:])


def _attention(module: nn.MultiheadAttention, call: Call | None) -> LayerSpec:
    """Projections of queries, keys and values, scores, weighted sum, projection of the output."""
    width, bias = module.embed_dim, module.in_proj_bias is not None
    query, key = ((1, 1), (1, 1)) if call is None else (_shape_of(call, 0, "query"), _shape_of(call, 1, "key"))
    steps = key[-2] if module.batch_first or len(key) == 2 else key[0]
    queries, keys = math.prod(query[:-1]), math.prod(key[:-1])
    seen = steps + (module.bias_k is not None) + module.add_zero_attn
    added = LayerSpec(0, width, positions=0, has_bias=True)  # a learnt key, a learnt value
    parts = (
        _rows(width, width, queries, bias),
        _rows(module.kdim, width, keys, bias),
        _rows(module.vdim, width, keys, bias),
        *(added for learnt in (module.bias_k, module.bias_v) if learnt is not None),
        replace(_rows(width, seen, queries), weighted=False),
        replace(_rows(seen, width, queries), weighted=False),
        _rows(width, width, queries, module.out_proj.bias is not None),
    )
    return LayerSpec(width, width, positions=queries, in_positions=keys, has_bias=bias, parts=parts)


_GATES: dict[type[nn.Module], int] = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3, nn.RNN: 1, nn.RNNCell: 1}


def _gates(module: nn.Module) -> int:
    return next(gates for layer_type, gates in _GATES.items() if isinstance(module, layer_type))


def _recurrent(module: nn.RNNBase, call: Call | None) -> LayerSpec:
    """Per layer, direction and step: all gates from the input and from the last state, and maybe a projection."""
    shape = call.input_shape[:-1] if call else (1,)
    n, gates, state = math.prod(shape), _gates(module) * module.hidden_size, module.proj_size or module.hidden_size
    directions = 1 + module.bidirectional
    parts: list[LayerSpec] = []
    for layer in range(module.num_layers):
        below = state * directions if layer else module.input_size
        one = [_rows(below, gates, n, bool(module.bias)), _rows(state, gates, n, bool(module.bias))]
        if module.proj_size:
            one.append(_rows(module.hidden_size, module.proj_size, n))
        parts += one * directions
    bias = bool(module.bias)
    return LayerSpec(module.input_size, state * directions, positions=n, has_bias=bias, parts=tuple(parts))


def _cell(module: nn.RNNCellBase, call: Call | None) -> LayerSpec:
    n, gates = math.prod(call.input_shape[:-1]) if call else 1, _gates(module) * module.hidden_size
    bias = bool(module.bias)
    parts = (_rows(module.input_size, gates, n, bias), _rows(module.hidden_size, gates, n, bias))
    return LayerSpec(module.input_size, module.hidden_size, positions=n, has_bias=bias, parts=parts)


def _by_shape(module: nn.Module, call: Call | None) -> LayerSpec:
    if call is None:
        raise UnsupportedModelError(
            f"a {type(module).__name__} is never called: its channels are not known. Call it, or say ignore=(...)"
        )
    inputs, outputs = call.input_shape, call.output_shape
    channels_in, channels_out = (shape[1] if len(shape) > 1 else 1 for shape in (inputs, outputs))
    return LayerSpec(
        channels_in,
        channels_out,
        positions=math.prod(outputs[:1] + outputs[2:]),
        in_positions=math.prod(inputs[:1] + inputs[2:]),
        output_size=outputs[2:],
        has_bias=isinstance(getattr(module, "bias", None), Tensor),
    )


def _rows(inputs: int, outputs: int, n: int, bias: bool = False, size: tuple[int, ...] = ()) -> LayerSpec:
    """n rows of ``inputs`` numbers times a matrix."""
    return LayerSpec(inputs, outputs, positions=n, in_positions=n, output_size=size, has_bias=bias)


def _shape_of(call: Call, place: int, name: str) -> tuple[int, ...]:
    tensor = call.args[place] if place < len(call.args) else call.kwargs.get(name)
    if not isinstance(tensor, Tensor):
        raise UnsupportedModelError(
            f"{call.path or 'the network'} ({type(call.module).__name__}) is called without {name!r} as argument "
            f"{place}: its cost depends on the shape. Give its class a rule with with_rule(...)"
        )
    return tuple(tensor.shape)


# --- operators outside of layers --------------------------------------------------------------------------------


def operator_spec(operation: Operation) -> LayerSpec:
    """The LayerSpec of an operator that multiplies; UnknownCostError for one that is not in ``OPERATORS``."""
    reader = OPERATORS.get(operation.name.rstrip("_"))
    if reader is None:
        raise UnknownCostError(
            f"{operation.name}, run in {operation.path or 'the network'}, is an operator that cannot be counted; known "
            f"are {sorted(OPERATORS)}. Put it into a layer of its own and give this layer a rule with with_rule(...), "
            f"or say ignore=({operation.name!r},)"
        )
    return reader(operation)


def _product(operation: Operation) -> LayerSpec:
    return _of_matrices(operation.args[0], operation.args[1], bias=False)


def _product_and_sum(operation: Operation) -> LayerSpec:
    return _of_matrices(operation.args[1], operation.args[2], bias=True)


def _of_matrices(left: Tensor, right: Tensor, bias: bool) -> LayerSpec:
    columns = right.shape[-1] if right.dim() > 1 else 1
    return replace(_rows(left.shape[-1], columns, math.prod(left.shape[:-1]), bias), weighted=False)


def _functional_convolution(operation: Operation) -> LayerSpec:
    inputs, weight, bias, _, _, _, transposed, _, groups = operation.args[:9]
    first, second, *kernel = weight.shape
    size = tuple(operation.output.shape[2:])
    return LayerSpec(
        in_channels=first if transposed else second * groups,
        out_channels=second * groups if transposed else first,
        kernel=tuple(kernel),
        groups=groups,
        positions=operation.output.shape[0] * math.prod(size),
        in_positions=inputs.shape[0] * math.prod(inputs.shape[2:]),
        output_size=size,
        has_bias=bias is not None,
        transposed=transposed,
        weighted=False,
    )


def _functional_attention(operation: Operation) -> LayerSpec:
    """Scores, and the weighted sum of the values."""
    query, key, value = operation.args[:3]
    n, steps = math.prod(query.shape[:-1]), key.shape[-2]
    parts = (_rows(query.shape[-1], steps, n), _rows(steps, value.shape[-1], n))
    parts = (replace(parts[0], weighted=False), replace(parts[1], weighted=False))
    return LayerSpec(query.shape[-1], value.shape[-1], positions=n, weighted=False, parts=parts)


OPERATORS: Mapping[str, Callable[[Operation], LayerSpec]] = MappingProxyType(
    {
        "aten::mm": _product,
        "aten::bmm": _product,
        "aten::mv": _product,
        "aten::dot": _product,
        "aten::vdot": _product,
        "aten::_int_mm": _product,
        "aten::_scaled_mm": _product,
        "aten::addmm": _product_and_sum,
        "aten::addmv": _product_and_sum,
        "aten::addbmm": _product_and_sum,
        "aten::baddbmm": _product_and_sum,
        "aten::_addmm_activation": _product_and_sum,
        "aten::convolution": _functional_convolution,
        "aten::_convolution": _functional_convolution,
        "aten::_scaled_dot_product_flash_attention": _functional_attention,
        "aten::_scaled_dot_product_flash_attention_for_cpu": _functional_attention,
        "aten::_scaled_dot_product_efficient_attention": _functional_attention,
        "aten::_scaled_dot_product_cudnn_attention": _functional_attention,
    }
)
"""What multiplies two tensors, below the functions of torch: ``x @ w``, ``F.linear`` and ``einsum`` come to these."""
