"""Counted costs: parameters, multiply-accumulates (MACs), operations, bytes of weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import ConfigurationError, UnknownCostError, UnsupportedModelError
from ..graph import (
    Call,
    Condition,
    Operation,
    parameter_conditions,
    plain_attention,
    trace_operations,
    undecided_inside,
)
from ..mutables import Mutable, decisions
from .model import CostModel, Term, terms_of_any
from .spec import OPERATORS, CostSpec, Formula, LayerSpec, Rule, operator_spec, read_layer

__all__ = [
    "COUNTED",
    "MACS",
    "OPS",
    "PARAMS_NO_BIAS",
    "PARAMS_NO_NORM",
    "Counted",
    "CountedLayers",
    "bias_adds",
    "conv_macs",
    "count",
    "count_macs",
    "count_params",
    "counted_cost",
    "counted_layers",
    "linear_macs",
    "one_sample",
    "weight_bytes",
    "weights",
    "weights_and_biases",
]

# --- formulas ---------------------------------------------------------------------------------------------------


def conv_macs(layer: LayerSpec) -> Any:
    """positions * out_channels * (in_channels / groups) * prod(kernel); the bias is not a MAC.

    The positions of a transposed convolution are those of its input: each of them is spread over the kernel.

    >>> conv_macs(LayerSpec(in_channels=3, out_channels=8, kernel=(3, 3), positions=16 * 16))  # 256 * 8 * 27
    55296
    """
    return (layer.in_positions if layer.transposed else layer.positions) * layer.products


def linear_macs(layer: LayerSpec) -> Any:
    """positions * in_features * out_features.

    >>> linear_macs(LayerSpec(in_channels=10, out_channels=4, positions=5))
    200
    """
    return layer.positions * layer.in_channels * layer.out_channels


def bias_adds(layer: LayerSpec) -> Any:
    """positions * out_channels if there is a bias, else 0.

    >>> bias_adds(LayerSpec(in_channels=10, out_channels=4, positions=5, has_bias=True))
    20
    """
    return layer.positions * layer.out_channels if layer.has_bias else 0


def weights(layer: LayerSpec) -> Any:
    """out_channels * (in_channels / groups) * prod(kernel): the weights of a layer without its bias.

    >>> weights(LayerSpec(in_channels=3, out_channels=8, kernel=(3, 3), has_bias=True))
    216
    """
    return layer.products if layer.weighted else 0


def weights_and_biases(layer: LayerSpec) -> Any:
    """The weights of a layer, and out_channels if it has a bias.

    >>> weights_and_biases(LayerSpec(in_channels=3, out_channels=8, kernel=(3, 3), has_bias=True))
    224
    """
    return weights(layer) + (layer.out_channels if layer.has_bias else 0)


def _nothing(layer: LayerSpec) -> Any:
    return 0


def _macs_and_bias_adds(layer: LayerSpec) -> Any:
    return conv_macs(layer) + bias_adds(layer)


def _of_parts(formula: Formula) -> Formula:
    def of_parts(layer: LayerSpec) -> Any:
        return sum(formula(part) for part in layer.parts or (layer,))

    return of_parts


def _table(formula: Formula, embedding: Formula) -> tuple[Rule, ...]:
    """The rules of a formula that treats all products of a network alike; elementwise layers are 0 on purpose."""
    plain = (_ConvNd, nn.Linear)
    in_parts = (nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
    elementwise = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU)
    return (
        *(Rule(layer_type, formula) for layer_type in plain),
        *(Rule(layer_type, _of_parts(formula)) for layer_type in in_parts),
        *(Rule(layer_type, embedding) for layer_type in (nn.Embedding, nn.EmbeddingBag)),
        *(Rule(layer_type, _nothing) for layer_type in elementwise),
    )


MACS = CostSpec("macs", "MAC", _table(conv_macs, _nothing), functional=_of_parts(conv_macs))
"""Multiply-accumulates of convolutions, matrix products, attention and recurrence. Normalisation, activation, pooling,
interpolation and look-ups in embeddings are elementwise: 0."""

OPS = CostSpec("ops", "op", _table(_macs_and_bias_adds, _nothing), functional=_of_parts(_macs_and_bias_adds))
"""MACS, and one more for each number to which a bias is added: what PLiNIO calls ops."""

_PLAIN = _table(weights_and_biases, weights_and_biases)
PARAMS_NO_NORM = CostSpec("params_no_norm", "parameters", _PLAIN, per_call=False)
"""Weights and biases without those of normalisations and PReLUs: what PLiNIO calls params."""

PARAMS_NO_BIAS = CostSpec("params_no_bias", "parameters", _table(weights, weights), per_call=False)
"""PARAMS_NO_NORM without the biases."""

# --- public counts ----------------------------------------------------------------------------------------------

Scope = Literal["all", "searchable"]
Ignored = Sequence[type[nn.Module] | str]


def count_params(model: nn.Module) -> CostModel:
    """Parameters (elements) of the fixed model of each architecture; a shared module counts once.

    >>> count_params(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).of({})  # 8 * 27 + 8, 2 * 8
    240.0
    """
    return CostModel("params", "parameters", _parameter_terms(model, Tensor.numel), model)


def weight_bytes(model: nn.Module, bits: float = 8, vector_bits: float = 32) -> CostModel:
    """Bytes of the parameters of each architecture: numel * bits / 8; a shared module counts once.

    ``bits``: of a parameter of two or more dimensions (the kernels and matrices). ``vector_bits``: of the others
    (biases, and the scales of normalisations, which quantised networks keep in more bits). ConfigurationError for a
    width that is not above 0.

    >>> weight_bytes(nn.Linear(100, 10)).of({})  # 1000 of 8 bits, 10 of 32 bits
    1040.0
    """
    if not (bits > 0 and vector_bits > 0):
        raise ConfigurationError(f"weight_bytes(bits={bits}, vector_bits={vector_bits}): widths above 0 are needed")

    def size(parameter: Tensor) -> float:
        return parameter.numel() * (bits if parameter.dim() > 1 else vector_bits) / 8

    return CostModel("weight_bytes", "bytes", _parameter_terms(model, size), model)


def count_macs(
    model: nn.Module,
    args: Sequence[Any],
    *,
    spec: CostSpec = MACS,
    scope: Scope = "all",
    ignore: Ignored = (),
    batch_dim: int | None = 0,
) -> CostModel:
    """MACs of one sample for each architecture, on an example input: ``count`` with the spec ``MACS``.

    >>> import torch
    >>> count_macs(nn.Conv2d(3, 8, 3, padding=1), (torch.rand(1, 3, 16, 16),)).of({})
    55296.0
    """
    return count(model, args, spec, scope, ignore=ignore, batch_dim=batch_dim)


def count(
    model: nn.Module,
    args: Sequence[Any],
    spec: CostSpec,
    scope: Scope = "all",
    *,
    ignore: Ignored = (),
    batch_dim: int | None = 0,
) -> CostModel:
    """What ``spec`` counts for one sample in each architecture, on an example input ``model(*args)``.

    A shared layer is due at every call, or once if not ``spec.per_call``; then also if it is never called. What runs
    outside of the layers that ``spec`` covers (``x @ w``, ``F.linear``) is charged per call by ``spec.functional``.
    ``scope``: "all", or "searchable" for what depends on a decision only, without the part that all architectures
    have. ``batch_dim``: the dimension of ``args`` in which samples lie, of which only the first one runs; None if there
    is none, and ``args`` are one sample.

    ``ignore``: layer types, patterns of paths such as "head.*" and names of operators such as "aten::_fft_c2c". An
    ignored layer costs nothing where a rule covers it; where none does, its own parameters are no error any more,
    and what is called inside is counted as ever (a network with a class token, say).

    UnknownCostError for a layer with parameters of its own, or an operator, that no rule covers. ConfigurationError
    for a wrong scope or tied rules. UnsupportedModelError for a model that does not run, and for several samples in
    the first dimension where attention or recurrent layers are not ``batch_first``: these might be steps.
    """
    if scope not in ("all", "searchable"):
        raise ConfigurationError(f"count(scope={scope!r}): 'all' or 'searchable'")
    if isinstance(ignore, str | type) or not all(isinstance(entry, str | type) for entry in ignore):
        raise ConfigurationError(f"count(ignore={ignore!r}): a list of layer types and patterns is needed")
    counter = _Counter(model, spec, ignore)
    with _plain_operators():
        calls, operations = trace_operations(
            model, one_sample(model, args, batch_dim), counter.is_unit, counter.is_wanted
        )
    if spec.per_call:
        terms = [term for call in calls for term in counter.of_call(call)]
        terms += [counter.of_operation(operation) for operation in operations]
    else:
        terms = counter.once(calls)
    return CostModel(
        spec.name, spec.unit, [term for term in terms if scope == "all" or _varies(term.when, model)], model
    )


class Counted(NamedTuple):
    """A layer that is due once while any of ``conditions`` holds, for ``call``; None: it is never called."""

    path: str
    module: nn.Module
    call: Call | None
    formula: Formula
    conditions: Sequence[Condition]


class CountedLayers(NamedTuple):
    """The layers that a spec counts. ``is_outside(path, operator)``: whether it counts that operator by itself."""

    layers: tuple[Counted, ...]
    is_outside: Callable[[str, str], bool]


def counted_layers(model: nn.Module, args: Sequence[Any], spec: CostSpec, ignore: Ignored = ()) -> CountedLayers:
    """What ``count`` would charge, before any formula is evaluated; its errors."""
    counter = _Counter(model, spec, ignore)
    with _plain_operators():
        calls, operations = trace_operations(model, one_sample(model, args), counter.is_unit, counter.is_wanted)
    if spec.per_call:
        due: list[tuple[str, nn.Module, Call | None, Sequence[Condition]]] = [
            (call.path, call.module, call, [call.when]) for call in calls if id(call.module) not in counter.ignored
        ]
        for operation in operations:
            counter.of_operation(operation)
    else:
        due = [(path, module, own[0] if own else None, when) for path, module, own, when in counter.due_once(calls)]
    layers = tuple(
        Counted(path, module, call, counter.formula(path, module, call)[1], conditions)
        for path, module, call, conditions in due
    )
    units = {path for path, module in model.named_modules() if counter.is_unit(module)}

    def is_outside(path: str, operator: str) -> bool:
        above = path.split(".")
        return counter.is_wanted(operator) and not any(".".join(above[:i]) in units for i in range(len(above) + 1))

    return CountedLayers(layers, is_outside)


COUNTED = {
    "params": "parameters",
    "macs": "MAC",
    "ops": "op",
    "params_no_norm": "parameters",
    "params_no_bias": "parameters",
    "weight_bytes": "bytes",
}
"""The names of the counted costs, with their units."""


def counted_cost(name: str, model: nn.Module, args: Sequence[Any]) -> CostModel:
    """The cost of that name: 'macs', 'ops', 'params', 'params_no_bias', 'params_no_norm', 'weight_bytes' (8 bits).

    ConfigurationError for another name.

    >>> import torch
    >>> counted_cost("ops", nn.Linear(10, 4), (torch.rand(1, 10),)).of({})  # 40 MACs, 4 additions
    44.0
    """
    if name == "params":
        return count_params(model)
    if name == "weight_bytes":
        return weight_bytes(model)
    specs = {spec.name: spec for spec in (MACS, OPS, PARAMS_NO_BIAS, PARAMS_NO_NORM)}
    if name not in specs:
        raise ConfigurationError(f"cost {name!r}: allowed are {sorted(COUNTED)}")
    return count(model, args, specs[name])


def _varies(when: Condition, model: nn.Module) -> bool:
    """Whether there are architectures for which a condition does not hold."""
    known = decisions(model)
    return any(len(options) < len(known[label].options) for label, options in when.items())


def _parameter_terms(model: nn.Module, size: Callable[[Tensor], float]) -> list[Term]:
    owners = {id(parameter): name.rpartition(".")[0] for name, parameter in model.named_parameters()}
    return [
        term
        for parameter, conditions in parameter_conditions(model)
        for term in terms_of_any(float(size(parameter)), conditions, owners[id(parameter)])
    ]


# --- how a spec is applied --------------------------------------------------------------------------------------

# What multiplies two tensors and is not in OPERATORS; all other operators of torch are elementwise or move data.
_UNCOUNTED = re.compile(
    r"aten::(.*mm(_.*)?|_trilinear|_[cp]dist_forward|triangular_solve|ormqr|cholesky.*|_fft_.*|_?linalg_.*"
    r"|.*(rnn|lstm|convolution|conv\dd|depthwise|conv_tbc|attention|mkldnn_linear|transformer_encoder).*)"
)
_ELEMENTWISE = ("aten::linalg_vector_norm", "aten::linalg_cross", "aten::_linalg_check_errors")
_OF_TORCH = ("aten::", "prim::", "prims::", "profiler::")
# The names that parameters of torch's own layers have; weight_g, weight_v and weight_orig are those of its utilities.
_OF_LAYERS = re.compile(r"(weight|bias)(_.*)?|(in|[qkv])_proj_(weight|bias)|bias_[kv]")


class _Counter:
    """A spec on a model: which modules are counted as a whole, and the terms of what was seen."""

    def __init__(self, model: nn.Module, spec: CostSpec, ignore: Ignored) -> None:
        self.model, self.spec = model, spec
        self.types = tuple(entry for entry in ignore if isinstance(entry, type))
        self.patterns = tuple(entry for entry in ignore if isinstance(entry, str))
        self.ignored = {
            id(module)
            for path, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, self.types) or self._named(path)
        }

    def _named(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def is_unit(self, module: nn.Module) -> bool:
        """Whether calls of a module are counted as a whole, and not by what they call."""
        return self.spec.covers(type(module)) or (_has_own_parameters(module) and id(module) not in self.ignored)

    def is_wanted(self, operator: str) -> bool:
        """Whether an operator multiplies, or is not one of torch, so that nobody knows whether it does."""
        multiplies = operator.rstrip("_") in OPERATORS or (
            _UNCOUNTED.fullmatch(operator) is not None and operator not in _ELEMENTWISE
        )
        ignored = any("::" in pattern and fnmatchcase(operator, pattern) for pattern in self.patterns)
        return (multiplies or not operator.startswith(_OF_TORCH)) and not ignored

    def of_call(self, call: Call) -> list[Term]:
        if id(call.module) in self.ignored:
            return []
        return [Term(self._value(call.path, call.module, call), call.when, call.path)]

    def of_operation(self, operation: Operation) -> Term:
        layer = operator_spec(operation)
        if self.spec.functional is None:
            raise UnknownCostError(
                f"{self.spec.name}: {operation.name}, run in {operation.path or 'the network'} outside of all layers, "
                "and the spec has no formula for it: CostSpec(..., functional=formula)"
            )
        return Term(float(self.spec.functional(layer)), operation.when, operation.path)

    def once(self, calls: Sequence[Call]) -> list[Term]:
        """Each layer of the fixed model once, called or not."""
        return [
            term
            for path, module, own, conditions in self.due_once(calls)
            for term in terms_of_any(self._same_value(path, module, own), conditions, path)
        ]

    def due_once(self, calls: Sequence[Call]) -> Iterator[tuple[str, nn.Module, list[Call], list[Condition]]]:
        """Path, module, calls and conditions of the layers that are counted once."""
        of_parameter = {id(parameter): conditions for parameter, conditions in parameter_conditions(self.model)}
        of_module: dict[int, list[Call]] = {}
        for call in calls:
            of_module.setdefault(id(call.module), []).append(call)
        owners: dict[int, str] = {}
        for path, module in self._units():
            own = of_module.get(id(module), [])
            first = next(module.parameters(), None)
            conditions = [call.when for call in own] if first is None else of_parameter.get(id(first), [])
            if id(module) in self.ignored or not conditions:
                continue
            self._claim(owners, path, module)
            yield path, module, own, conditions

    def _same_value(self, path: str, module: nn.Module, own: Sequence[Call]) -> float:
        values = {self._value(path, module, call) for call in own} or {self._value(path, module, None)}
        if len(values) > 1:
            raise UnsupportedModelError(
                f"{self.spec.name}: {path} is due once, and its calls would cost {sorted(values)} "
                f"{self.spec.unit}. A cost that depends on the input is due per call: CostSpec(..., per_call=True)"
            )
        return values.pop()

    def _units(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules that are counted as a whole, each once, without those inside of others."""
        seen: set[int] = set()

        def visit(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
            if id(module) in seen:
                return
            seen.add(id(module))
            if self.is_unit(module):
                yield path, module
                return
            for name, child in module.named_children():
                yield from visit(f"{path}.{name}" if path else name, child)

        return visit("", self.model)

    def _claim(self, owners: dict[int, str], path: str, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(prefix=path):
            if owners.setdefault(id(parameter), name) != name:
                raise UnsupportedModelError(
                    f"{self.spec.name}: {owners[id(parameter)]} and {name} are one parameter, which a formula per "
                    "layer would count twice. count_params and weight_bytes count it once"
                )

    def _value(self, path: str, module: nn.Module, call: Call | None) -> float:
        layer, formula = self.formula(path, module, call)
        return float(formula(layer))

    def formula(self, path: str, module: nn.Module, call: Call | None) -> tuple[LayerSpec, Formula]:
        """What a layer is, and what prices it; UnknownCostError if nothing does."""
        name = f"{self.spec.name}: {path or 'the network'} is a {type(module).__name__}"
        covered = self.spec.covers(type(module))
        layer = read_layer(module, call) if covered else None
        formula = None if layer is None else self.spec.formula_for(type(module), layer)
        if layer is None or formula is None:
            reason = "for which no condition holds" if covered else "with parameters of its own"
            raise UnknownCostError(
                f"{name} {reason}, and no rule covers it; the rules cover "
                f"{sorted({rule.layer_type.__name__ for rule in self.spec.rules})}. "
                f"Give it one, spec.with_rule({type(module).__name__}, formula), or "
                "say that it costs nothing, ignore=(...)"
            )
        inner = undecided_inside(module)
        if inner is not None:
            raise UnknownCostError(
                f"{name}, which a rule counts as a whole, and holds {inner}, whose candidates it cannot tell apart. "
                "Move the choice out of it, or leave its type out of the rules"
            )
        added = _added(module, self.spec)
        if added:
            raise UnknownCostError(
                f"{name} with {added} besides what its base class has, which the rule of that does not count. "
                f"Give it a rule of its own, spec.with_rule({type(module).__name__}, formula)"
            )
        return layer, formula


def _added(module: nn.Module, spec: CostSpec) -> list[str]:
    """What the user's subclass of a torch layer holds besides the layer, and the rule of the layer cannot know."""
    bases = type(module).__mro__
    rule = next((i for i, cls in enumerate(bases) if any(r.layer_type is cls for r in spec.rules)), 0)
    of_torch = next((i for i, cls in enumerate(bases) if cls.__module__.startswith("torch.")), len(bases))
    if rule < of_torch:
        return []
    parameters = [name for name, p in module._parameters.items() if p is not None and not _OF_LAYERS.match(name)]
    children = [
        name
        for name, child in module._modules.items()
        if child is not None
        and name not in ("out_proj", "parametrizations")
        and next(child.parameters(), None) is not None
    ]
    return parameters + children


def _has_own_parameters(module: nn.Module) -> bool:
    # A ParameterList is never called: what it holds is used by the module around it.
    if isinstance(module, Mutable | nn.ParameterList | nn.ParameterDict):
        return False
    lists = [child for child in module.children() if isinstance(child, nn.ParameterList | nn.ParameterDict)]
    return any(p is not None for holder in [module, *lists] for p in holder._parameters.values())


def one_sample(model: nn.Module, args: Sequence[Any], dim: int | None = 0) -> list[Any]:
    """The first sample of a batch. What depends on the batch, and what does not, is then due as for one sample."""
    tensors = [leaf for leaf in pytree.tree_leaves(list(args)) if isinstance(leaf, Tensor)]
    if dim is None or not tensors:
        return list(args)
    if (
        isinstance(dim, bool)
        or not isinstance(dim, int)
        or not 0 <= dim < max(1, *(tensor.dim() for tensor in tensors))
    ):
        raise ConfigurationError(f"count(batch_dim={dim!r}): a dimension of the inputs, or None, is needed")
    # A time step or a temperature beside the images is one number for all of them.
    size = next((tensor.shape[dim] for tensor in tensors if tensor.dim() > dim and tensor.shape[dim] > 1), 1)
    if size == 1:
        return list(args)
    steps_first = next((m for m in model.modules() if getattr(m, "batch_first", True) is False), None)
    if dim == 0 and steps_first is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is given an input of {size} along its first dimension, and holds a "
            f"{type(steps_first).__name__} with batch_first=False: these may be samples or steps. Hand over one sample "
            "of a batch, or say where the samples are: batch_dim=1, or None for an input without a batch"
        )

    def first(tensor: Tensor) -> Tensor:
        fits = tensor.dim() > dim and tensor.shape[dim] == size
        return tensor.narrow(dim, 0, 1).contiguous() if fits else tensor

    cut: list[Any] = pytree.tree_map_only(Tensor, first, list(args))
    return cut


@contextmanager
def _plain_operators() -> Iterator[None]:
    """Attention as the products it consists of: fused kernels hide them, or pad them differently on each device."""
    with plain_attention(), sdpa_kernel(SDPBackend.MATH), _FusedBias():
        yield


class _FusedBias(TorchFunctionMode):
    """Makes ``F.linear`` add its bias where the product is: in one operator, and not in one that only adds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and args:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))
