"""Costs of a masked network: the counted costs of ``oneshot.cost`` as functions of the sizes of its axes.

A formula that is linear in each size it depends on (parameters, MACs) becomes a sum of products of sizes once, when the
network is converted: cost = sum_t c_t prod_j n_tj. Any other formula is asked again at every step, with sizes as
tensors; it is differentiable as far as the formula is. In a network with choices every term has the condition under
which it is due, and its probability P_t as a factor: labels are independent, so that the sum is the expected cost.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils import _pytree as pytree

from ..cost.counts import Counted, counted_layers
from ..cost.decode import cost_range
from ..cost.model import CostModel, Term, terms_of_any
from ..cost.spec import CostSpec, Formula, LayerSpec, operator_spec, read_layer
from ..graph import Condition, Operation, Value, parameter_conditions
from ..graph.dimensions import Product
from .mask_set import FlatMasks, MaskSet
from .presence import cases
from .sizes import Form, Sizes, form_matrix

__all__ = ["CostTerms", "MaskedCosts", "Odds", "parameter_terms", "spec_terms"]

MOST_SIZES = 10  # of one layer, for which 2^10 prices are asked
MOST_ELEMENTS = 1_000_000  # of a matrix from all units and taps to the sizes of all dimensions


class Part(NamedTuple):
    """coefficient * the product of the sizes of ``forms``, due while ``when`` holds."""

    coefficient: float
    forms: tuple[Form, ...]
    when: Condition = MappingProxyType({})


@dataclass(frozen=True)
class Asked:
    """A layer whose formula is not linear in its sizes: what it is told, and which of it are sizes.

    It is due ``sign`` times while ``when`` holds.
    """

    formula: Formula
    sized: Callable[[Sequence[Any]], LayerSpec]
    forms: tuple[Form, ...]
    sign: float
    when: Condition


@dataclass(frozen=True)
class CostTerms:
    """One cost of a masked network."""

    name: str
    unit: str
    parts: tuple[Part, ...]
    asked: tuple[Asked, ...] = ()


def parameter_terms(
    name: str, unit: str, model: nn.Module, sizes: Sizes, weight: Callable[[Tensor], float]
) -> CostTerms:
    """sum over the parameters of weight(p) * the product of their sizes, each parameter once."""
    names = {id(parameter): parameter_name for parameter_name, parameter in model.named_parameters()}
    parts = []
    for parameter, conditions in parameter_conditions(model):
        forms = tuple(sizes.of(names[id(parameter)], d) for d in range(parameter.dim()))
        for sign, when, present in _due(conditions, forms, sizes):
            constant = math.prod(form.constant for form in present if not form.parts)
            sized = tuple(form for form in present if form.parts)
            parts.append(Part(sign * weight(parameter) * constant, sized, when))
    return CostTerms(name, unit, tuple(parts))


def spec_terms(
    spec: CostSpec,
    model: nn.Module,
    args: Sequence[Any],
    sizes: Sizes,
    products: Sequence[Product],
    ignore: Sequence[str | type[nn.Module]] = (),
) -> CostTerms:
    """What a ``CostSpec`` counts for one sample, as ``oneshot.count`` does on the network that is exported."""
    names = {id(parameter): name for name, parameter in (*model.named_parameters(), *model.named_buffers())}
    counted = counted_layers(model, args, spec, ignore)
    parts: list[Part] = []
    asked: list[Asked] = []
    for item in counted.layers:
        sized, forms = _sized_layer(item, names, sizes)
        _add(parts, asked, item.formula, sized, forms, item.conditions, sizes)
    for product in products:
        if spec.per_call and counted.is_outside(product.operator.path, f"aten::{product.operator.name}"):
            _add(parts, asked, *_sized_product(product, spec, sizes), [product.operator.when], sizes)
    return CostTerms(spec.name, spec.unit, tuple(parts), tuple(asked))


def _due(
    conditions: Sequence[Condition], forms: Sequence[Form], sizes: Sizes
) -> Iterator[tuple[float, Condition, tuple[Form, ...]]]:
    """What is due once while any condition holds: sign, disjoint condition, and the sizes under it."""
    axes = {axis for form in forms for axis, _ in form.parts}
    presence = {axis: sizes.presence[axis] for axis in axes if axis in sizes.presence}
    for term in terms_of_any(1.0, conditions):
        for when, absent in cases(term.when, presence, sizes.options):
            yield term.value, when, tuple(form.without(absent) for form in forms)


def _add(
    parts: list[Part],
    asked: list[Asked],
    formula: Formula,
    sized: Callable[[Sequence[Any]], LayerSpec],
    forms: tuple[Form, ...],
    conditions: Sequence[Condition],
    sizes: Sizes,
) -> None:
    """The cost of one layer: in products of sizes if it is linear in each of them."""

    def price(values: Sequence[int]) -> Fraction:
        return Fraction(formula(sized(values)))

    low = [form.at(sizes.lowest) for form in forms]
    high = [form.at(sizes.full) for form in forms]
    coefficients: Coefficients | None = None
    if len(forms) <= MOST_SIZES:
        coefficients = _multilinear(price, low, high)
        if not all(_is_close(_value(coefficients, values), price(values)) for values in _checked(forms, sizes)):
            coefficients = None
    for sign, when, present in _due(conditions, forms, sizes):
        if coefficients is None:
            asked.append(Asked(formula, sized, present, sign, when))
            continue
        for places, c in coefficients.items():
            if c:
                used = tuple(form for form, is_used in zip(present, places, strict=True) if is_used)
                parts.append(Part(sign * float(c), used, when))


def _checked(forms: Sequence[Form], sizes: Sizes) -> Iterator[list[int]]:
    """Where a formula is compared with what it was taken for: all sizes of each axis, the others at both ends."""
    for others in (sizes.lowest, sizes.full):
        for axis in sorted({axis for form in forms for axis, _ in form.parts}):
            low, high = sizes.lowest[axis], sizes.full[axis]
            step = max(1, (high - low) // 64) | 1  # odd, so that steps of a power of two show
            for size in (*range(low, high + 1, step), *range(low, min(low + 9, high + 1))):
                yield [form.at([*others[:axis], size, *others[axis + 1 :]]) for form in forms]


Coefficients = Mapping[tuple[bool, ...], Fraction]


def _multilinear(price: Callable[[Sequence[int]], Fraction], low: Sequence[int], high: Sequence[int]) -> Coefficients:
    """f(n) = sum over subsets S of c_S prod_{i in S} n_i through the corners of a box, S as flags; exact.

    >>> _multilinear(lambda n: Fraction(3 + 2 * n[0]), [1], [5])
    {(False,): Fraction(3, 1), (True,): Fraction(2, 1)}
    """
    if not low:
        return {(): price([])}
    at_low = _multilinear(lambda rest: price([low[0], *rest]), low[1:], high[1:])
    if high[0] == low[0]:
        return {(False, *places): c for places, c in at_low.items()}
    at_high = _multilinear(lambda rest: price([high[0], *rest]), low[1:], high[1:])
    found: dict[tuple[bool, ...], Fraction] = {}
    for places, c in at_low.items():
        slope = (at_high[places] - c) / (high[0] - low[0])
        without, within = (False, *places), (True, *places)
        found[without], found[within] = c - slope * low[0], slope
    return found


def _value(coefficients: Coefficients, values: Sequence[int]) -> Fraction:
    return sum(
        (
            c * math.prod(v for v, used in zip(values, places, strict=True) if used)
            for places, c in coefficients.items()
        ),
        Fraction(0),
    )


def _is_close(one: Fraction, other: Fraction) -> bool:
    return abs(one - other) <= Fraction(1, 10**9) * max(abs(one), abs(other))


# --- what a layer is told -------------------------------------------------------------------------------------------


def _sized_layer(
    item: Counted, names: Mapping[int, str], sizes: Sizes
) -> tuple[Callable[[Sequence[Any]], LayerSpec], tuple[Form, ...]]:
    """A function from the searched sizes of a layer to what its formula is told, and the forms of these sizes."""
    module, layer = item.module, read_layer(item.module, item.call)
    weight = next((names[id(t)] for t in _tensors_of(module) if id(t) in names), None)
    if weight is None:
        return (lambda values: layer), ()
    fields: list[tuple[Form, Callable[[LayerSpec, Any], LayerSpec]]]
    if isinstance(module, _ConvNd):
        fields = _convolution_fields(module, weight, sizes)
    elif isinstance(module, nn.Linear):
        fields = [(sizes.of(weight, 0), _set_out), (sizes.of(weight, 1), _set_in)]
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        fields = [(sizes.of(weight, 1), _set_out)]
    elif len(sizes.shapes[weight]) == 1 and not layer.parts:
        fields = [(sizes.of(weight, 0), _set_both)]
    else:
        fields = []
    fields = [(form, setter) for form, setter in fields if form.parts]

    def sized(values: Sequence[Any]) -> LayerSpec:
        result = layer
        for value, (_, setter) in zip(values, fields, strict=True):
            result = setter(result, value)
        return result

    return sized, tuple(form for form, _ in fields)


def _tensors_of(module: nn.Module) -> list[Tensor]:
    own = {**module._parameters, **module._buffers}
    if isinstance(module, _ConvNd | nn.Linear) and own.get("weight") is None:
        return []  # computed from other parameters, whose sizes are not those of a weight
    return [own[name] for name in ("weight", "running_mean", "bias") if own.get(name) is not None]  # type: ignore[misc]


def _set_out(layer: LayerSpec, n: Any) -> LayerSpec:
    return replace(layer, out_channels=n)


def _set_in(layer: LayerSpec, n: Any) -> LayerSpec:
    return replace(layer, in_channels=n)


def _set_both(layer: LayerSpec, n: Any) -> LayerSpec:
    return replace(layer, in_channels=n, out_channels=n)


def _convolution_fields(
    conv: _ConvNd, weight: str, sizes: Sizes
) -> list[tuple[Form, Callable[[LayerSpec, Any], LayerSpec]]]:
    transposed = isinstance(conv, _ConvTransposeNd)
    rows, columns = (1, 0) if transposed else (0, 1)
    fields: list[tuple[Form, Callable[[LayerSpec, Any], LayerSpec]]] = []
    if conv.groups == 1:
        fields += [(sizes.of(weight, rows), _set_out), (sizes.of(weight, columns), _set_in)]
    else:
        per_group_out, per_group_in = conv.out_channels // conv.groups, conv.in_channels // conv.groups

        def set_groups(layer: LayerSpec, n: Any) -> LayerSpec:
            groups = n // per_group_out if isinstance(n, int) else n / per_group_out
            return replace(layer, out_channels=n, in_channels=groups * per_group_in, groups=groups)

        fields.append((sizes.of(weight, rows), set_groups))
    for d in range(len(conv.kernel_size)):

        def set_kernel(layer: LayerSpec, n: Any, d: int = d) -> LayerSpec:
            return replace(layer, kernel=tuple(n if i == d else k for i, k in enumerate(layer.kernel)))

        fields.append((sizes.of(weight, 2 + d), set_kernel))
    return fields


def _sized_product(
    product: Product, spec: CostSpec, sizes: Sizes
) -> tuple[Formula, Callable[[Sequence[Any]], LayerSpec], tuple[Form, ...]]:
    """The same of an operator outside of layers: the dimensions of its tensors that have one form are one size."""
    step = product.operator
    shapes: dict[int, list[int | Form]] = {}
    for value in (*step.inputs, *step.outputs):
        shape: list[int | Form] = list(value.shape)
        for label in product.labelled[value.number].labels if value.number in product.labelled else ():
            for d in range(label.dim()):
                if label.shape[d] > 1:
                    form = sizes.along(label, d)
                    shape[d] = form if form.parts else shape[d]
        shapes[value.number] = shape
    # Each dimension is a size of its own, also where two have one form: what reads them looks at shapes only.
    places = [(number, d) for number, shape in shapes.items() for d, n in enumerate(shape) if isinstance(n, Form)]
    forms = tuple(n for shape in shapes.values() for n in shape if isinstance(n, Form))

    def sized(values: Sequence[Any]) -> LayerSpec:
        of_place = dict(zip(places, values, strict=True))

        def tensor(value: Value) -> Tensor:
            shape = [of_place.get((value.number, d), n) for d, n in enumerate(shapes[value.number])]
            return torch.empty(shape, device="meta")

        args, kwargs = pytree.tree_map_only(Value, tensor, (list(step.args), dict(step.kwargs)))
        output = tensor(step.outputs[0])
        return operator_spec(Operation(f"aten::{step.name}", step.path, args, kwargs, output, {}))

    assert spec.functional is not None
    return spec.functional, sized, forms


# --- all costs at once ----------------------------------------------------------------------------------------------


class Odds(NamedTuple):
    """The probabilities of the conditions of ``MaskedCosts``, float64: of those that the costs have, differentiable,
    and those that weigh the gradients of the masks."""

    of_costs: Tensor
    of_masks: Tensor


class MaskedCosts:
    """Several costs of one network, from the sizes of its axes: each of them in its unit, float64.

    cost_k = sum_t c_kt P_t prod_j n_tj, where P_t is the probability of the condition under which term t is due. In
    what follows ``chances`` are the probabilities of ``conditions``, None for a network without choices. ``full``: the
    largest size of each axis.
    """

    def __init__(self, terms: Sequence[CostTerms], full: Sequence[int]) -> None:
        self.terms = {of_one.name: of_one for of_one in terms}
        self.names = [of_one.name for of_one in terms]
        used = [form for t in terms for part in t.parts for form in part.forms]
        used += [form for t in terms for layer in t.asked for form in layer.forms]
        forms = list(dict.fromkeys(used))
        place = {form: 1 + i for i, form in enumerate(forms)}
        number: dict[Key, int] = {(): 0}
        merged: dict[tuple[int, ...], list[float]] = {}
        most = max((len(part.forms) for of_one in terms for part in of_one.parts), default=0)
        for row, of_one in enumerate(terms):
            for part in of_one.parts:
                key = tuple(sorted(place[form] for form in part.forms))
                condition = number.setdefault(_key(part.when), len(number))
                key = (condition, *(0,) * (most - len(key)), *key)
                merged.setdefault(key, [0.0] * len(terms))[row] += part.coefficient
            for layer in of_one.asked:
                number.setdefault(_key(layer.when), len(number))
        self.conditions: list[Condition] = [dict(key) for key in number]
        self.number = number
        self.constants, self.matrix = form_matrix([Form(1), *forms], len(full))
        keys = torch.tensor(list(merged) or [[0] * (1 + most)], dtype=torch.int64)
        self.condition_of, self.factors = keys[:, 0].contiguous(), keys[:, 1:].contiguous()
        self.coefficients = torch.tensor(list(merged.values()) or [[0.0] * len(terms)], dtype=torch.float64).T
        self.place = place
        self.full = torch.tensor(full, dtype=torch.float64)
        self._on: dict[str, tuple[Tensor, ...]] = {}
        self._flat_on: dict[str, _OfFlat] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedCosts:
        return self  # it never changes

    def for_smaller_masks(self) -> MaskedCosts:
        """The same costs of the same axes, whose masks have become shorter."""
        other = copy.copy(self)
        other._flat_on = {}
        return other

    def narrowed(self, axes: Mapping[int, int], narrow: Callable[[Condition], Condition | None]) -> MaskedCosts:
        """Without what no architecture has any more. ``axes``: number before -> after of those that are left."""

        def forms(before: Sequence[Form]) -> tuple[Form, ...]:
            return tuple(Form(f.constant, tuple((axes[a], n) for a, n in f.parts if a in axes)) for f in before)

        terms = []
        for of_one in self.terms.values():
            parts = [(part, narrow(part.when)) for part in of_one.parts]
            asked = [(layer, narrow(layer.when)) for layer in of_one.asked]
            terms.append(
                replace(
                    of_one,
                    parts=tuple(p._replace(forms=forms(p.forms), when=when) for p, when in parts if when is not None),
                    asked=tuple(replace(a, forms=forms(a.forms), when=when) for a, when in asked if when is not None),
                )
            )
        full = self.full.tolist()
        return MaskedCosts(terms, [int(full[before]) for before in axes])

    def of(self, masks: MaskSet, flat: FlatMasks, odds: Odds | None, *, discrete: bool) -> dict[str, Tensor]:
        """Name -> cost of the network that these masks leave, in expectation over its choices.

        The gradient of the masks is that of the cost at the relaxed sizes, or, if ``discrete``, at the sizes
        themselves; that of the chances is exact.
        """
        leads = flat.hard if discrete else flat.soft
        if any(self.terms[name].asked for name in self.names):
            of_costs, of_masks = (None, None) if odds is None else odds
            value = self(masks.sizes(flat.hard.detach()), of_costs)
            surrogate = self(masks.sizes(leads), None if of_masks is None else of_masks.detach())
            costs = (value + surrogate - surrogate.detach()).unbind()
        else:
            costs = _Polynomials.apply(flat.hard, leads, *(odds or (None, None)), self._of_flat(masks))
        return dict(zip(self.names, costs, strict=True))

    def _of_flat(self, masks: MaskSet) -> _OfFlat:
        """Sizes of forms straight from the flat vector: n = c + M m."""
        device = masks.one.device
        key = str(device)
        if key not in self._flat_on:
            constants, matrix, factors, coefficients, condition_of = self._tensors(device)
            padded = torch.nn.functional.pad(matrix, (0, 1))
            is_small = len(matrix) * masks.size <= MOST_ELEMENTS
            wide = padded[:, masks.axis_of] * masks.count_of if is_small else None
            self._flat_on[key] = _OfFlat(
                constants, padded, masks.axis_of, masks.count_of, wide, factors, coefficients, condition_of
            )
        return self._flat_on[key]

    def __call__(self, sizes: Tensor, chances: Tensor | None) -> Tensor:
        """Every cost, of shape (costs,), from the sizes of the axes, of shape (axes,); differentiable."""
        constants, matrix, factors, coefficients, condition_of = self._tensors(sizes.device)
        n = constants + matrix @ sizes
        products = n[factors].prod(1)
        costs = coefficients @ (products if chances is None else products * chances[condition_of])
        if not any(of_one.asked for of_one in self.terms.values()):
            return costs
        return costs + torch.stack([self._asked(name, n, chances) for name in self.names])

    def _asked(self, name: str, n: Tensor, chances: Tensor | None) -> Tensor:
        total = torch.zeros((), dtype=n.dtype, device=n.device)
        for layer in self.terms[name].asked:
            value = layer.sign * layer.formula(layer.sized([n[self.place[form]] for form in layer.forms]))
            total = total + (value if chances is None else value * chances[self.number[_key(layer.when)]])
        return total

    def _tensors(self, device: torch.device) -> tuple[Tensor, ...]:
        key = str(device)
        if key not in self._on:
            held = (self.constants, self.matrix, self.factors, self.coefficients, self.condition_of)
            self._on[key] = tuple(tensor.to(device) for tensor in held)
        return self._on[key]

    def unit(self, name: str) -> str:
        return self.terms[name].unit

    @torch.no_grad()
    def at(self, sizes: Tensor, model: nn.Module) -> dict[str, CostModel]:
        """Name -> cost of every architecture of ``model`` in its choices, where its axes have these sizes."""
        every = torch.eye(len(self.conditions), dtype=torch.float64, device=sizes.device)
        values = torch.stack([self(sizes, chances) for chances in every]).tolist()
        found = {}
        for i, name in enumerate(self.names):
            terms = [Term(values[j][i], when) for j, when in enumerate(self.conditions) if values[j][i]]
            found[name] = CostModel(name, self.unit(name), terms, model)
        return found

    def reachable(self, masks: MaskSet, model: nn.Module) -> dict[str, tuple[float, float]]:
        """Name -> the smallest cost, with the smallest masks that learning can lead to, and the largest one."""
        lowest = torch.tensor(masks.lowest(learning=True), dtype=torch.float64)
        low, high = self.at(lowest, model), self.at(self.full, model)
        return {name: (cost_range(low[name])[0], cost_range(high[name])[1]) for name in self.names}


Key = tuple[tuple[str, frozenset[int]], ...]


def _key(when: Condition) -> Key:
    return tuple(sorted(when.items(), key=lambda item: item[0]))


class _OfFlat(NamedTuple):
    """n = constants + M m, cost_k = sum_t coefficients_kt P[condition_of_t] prod_j n[factors_tj]; float64.

    M sums the elements of each axis, and multiplies the sums: ``wide`` is M itself, None where it would be too large.
    """

    constants: Tensor
    of_axes: Tensor
    axis_of: Tensor
    count_of: Tensor
    wide: Tensor | None
    factors: Tensor
    coefficients: Tensor
    condition_of: Tensor

    def n(self, flat: Tensor) -> Tensor:
        """The sizes of all forms."""
        flat = flat.to(torch.float64)
        if self.wide is not None:
            return torch.addmv(self.constants, self.wide, flat)
        sizes = flat.new_zeros(self.of_axes.shape[1]).index_add_(0, self.axis_of, flat * self.count_of)
        return torch.addmv(self.constants, self.of_axes, sizes)

    def of_flat(self, of_forms: Tensor) -> Tensor:
        """The gradient of the flat vector, from that of the sizes."""
        if self.wide is not None:
            return of_forms @ self.wide
        return (of_forms @ self.of_axes)[self.axis_of] * self.count_of


class _Polynomials(torch.autograd.Function):
    """cost_k = sum_t c_kt P_t prod_j n_tj with n = c + M m, at one flat vector m, with the gradient at another one.

    dcost_k/dm = sum_t c_kt P_t sum_j (prod_{i != j} n_ti) M[place of j in t]. No size is ever 0: something stays of
    each. dcost_k/dP_t = c_kt prod_j n_tj, at the first vector. ``led``: P in dcost/dm.
    """

    @staticmethod
    def forward(
        ctx: Any, hard: Tensor, leads: Tensor, chances: Tensor | None, led: Tensor | None, of_flat: _OfFlat
    ) -> tuple[Tensor, ...]:
        # On ctx itself, where it stays: each cost of a step may be differentiated on its own.
        ctx.of_flat, ctx.leads = of_flat, leads.detach()
        ctx.set_materialize_grads(False)
        products = of_flat.n(hard)[of_flat.factors].prod(1)
        ctx.products, ctx.led = products, None if led is None else led.detach()
        due = products if chances is None else products * chances[of_flat.condition_of]
        return (of_flat.coefficients @ due).unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        of_flat: _OfFlat = ctx.of_flat
        constants, factors = of_flat.constants, of_flat.factors
        given = [constants.new_zeros(()) if gradient is None else gradient for gradient in gradients]
        of_terms = torch.stack(given) @ of_flat.coefficients
        of_chances = None
        if ctx.needs_input_grad[2]:
            of_chances = torch.zeros_like(ctx.led).index_add_(0, of_flat.condition_of, of_terms * ctx.products)
        if not ctx.needs_input_grad[1]:
            return None, None, of_chances, None, None
        n = of_flat.n(ctx.leads)[factors]
        due = of_terms if ctx.led is None else of_terms * ctx.led[of_flat.condition_of]
        of_factors = (n.prod(1) * due)[:, None] / n
        of_forms = torch.zeros_like(constants).index_add_(0, factors.flatten(), of_factors.flatten())
        return None, of_flat.of_flat(of_forms).to(ctx.leads.dtype), of_chances, None, None
