"""PIT: any network, with masks over its channels, kernels and dilations (arXiv 2203.14768)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils import _pytree as pytree

from ..cost.counts import COUNTED, MACS, OPS, PARAMS_NO_BIAS, PARAMS_NO_NORM
from ..cost.spec import CostSpec
from ..errors import ConfigurationError, ExportError, InputTypeError, UnsupportedModelError
from ..export.fixed import check_equal
from ..graph.cut import copied
from ..graph.dimensions import Dimension
from ..graph.masked_call import names_of_parameters
from ..graph.rewrite import Rewriter
from ..mutables.base import Mutable, SearchModel
from ..mutables.masks import ChannelMask, DilationMask, KernelMask
from .conversion import Excluded, Granularity, Plan, find_space, take_masks
from .mask_set import FlatMasks, MaskSet
from .masked_cost import CostTerms, MaskedCosts, parameter_terms, spec_terms
from .report import PITReport, report_of
from .search_space import SearchSpace, cut_network, rewriter_of, shapes_of
from .sizes import Sizes
from .trial import NoDropout
from .weight_masks import WeightMasks

__all__ = ["PIT", "CostArgument"]

CostArgument = str | CostSpec | Sequence[str | CostSpec] | Mapping[str, str | CostSpec]
_SPECS = {spec.name: spec for spec in (MACS, OPS, PARAMS_NO_BIAS, PARAMS_NO_NORM)}
_REGULARIZERS = {"size": "params_no_bias", "macs": "macs"}


@final
class PIT(SearchModel):
    """A copy of ``model`` whose channels, kernels and dilations are under masks; called as the model itself is.

    Every searched weight is multiplied by 0 or 1 along the dimensions that a product sums over: a convolution that
    reads channels x_c, of which the masks m_c say which are kept, computes sum_c W_oc m_c x_c. A zero there is the same
    as an absent column, whatever lies between the layer that makes a channel and the one that reads it (BatchNorm,
    sigmoid, padding with ones), so the exported network computes what this one does. Kernels lose their
    oldest taps (in space: their outermost ring) and every second, fourth, ... tap; see ``KernelMask`` and
    ``DilationMask``.

    What is cut together is found by following the operators that run, and confirmed by a trial cut; ``report()`` says
    for every dimension whether it is searched, with which others, or why not.

    Training takes three lines of a loop of one's own: ``loss = task(pit(x), y) + strength * pit.get_cost("params")``,
    ``loss.backward()``, ``optimizer.step()``. Give the masks an optimizer group of their own without weight decay,
    ``pit.nas_parameters()``. At its next forward in train mode the network clips them to [0, 1].

    Args:
        model: the network, which is copied and stays as it is, with its train and eval flags.
        input_shape: of one sample, without the batch; a tuple of such tuples for several inputs. Or
            ``example_input``: a tensor, or a tuple of all positional arguments.
        cost: a name (``'params'``, ``'macs'``, ``'ops'``, ``'params_no_norm'``, ``'params_no_bias'``,
            ``'weight_bytes'``), a ``CostSpec``, several of these, or name -> one of them.
        regularizer: ``'size'`` (weights without biases) or ``'macs'``, for ``get_regularization_loss()``.
        train_features, train_rf, train_dilation: whether masks of channels, kernel sizes and dilations learn.
        exclude: layers whose outputs stay as they are, with all that is coupled to them: paths, patterns, types.
        granularity: channel counts are a multiple of this; or pattern of layers -> multiple.
        discrete_cost: the gradient of a cost is taken at the network that would be exported, instead of at the relaxed
            sizes. The value is that of the former in both cases. With relaxed sizes, a channel whose alpha has sunk to
            0.6 makes its neighbours cheaper already; with discrete ones, only once it is gone.
        ignore: as in ``oneshot.count``: modules whose own parameters cost no operation.
        autoconvert_layers: search every layer; False: only the masks that the network was written with.

    Raises ConfigurationError without a shape, or for a cost or an entry of ``exclude`` that does not exist;
    UnsupportedModelError for a model that does not run on the input, or in which nothing can be searched.

    >>> net = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(80, 2))
    >>> pit = PIT(net, (3, 10), cost="params")
    >>> list(pit.masks), pit.cost.item()  # 8 * 9 + 8, 2 * 80 + 2
    (['0', '0.kernel_size', '0.dilation'], 242.0)
    >>> pit.masks["0"].keep([1, 5])
    >>> pit.masks["0.kernel_size"].decide(2)
    >>> pit.cost.item(), sum(p.numel() for p in pit.export().parameters())  # 2 * 6 + 2, 2 * 20 + 2
    (56.0, 56)
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[Any, ...] | None = None,
        *,
        example_input: Any = None,
        cost: CostArgument | None = None,
        regularizer: str | None = None,
        train_features: bool = True,
        train_rf: bool = True,
        train_dilation: bool = True,
        exclude: Excluded = (),
        granularity: Granularity = 1,
        discrete_cost: bool = False,
        ignore: Sequence[str | type[nn.Module]] = (),
        autoconvert_layers: bool = True,
    ) -> None:
        super().__init__()
        self._flat_of_step: tuple[FlatMasks, list[int]] | None = None
        _check_model(model)
        self.network = copied(model)
        self.example = _example(self.network, input_shape, example_input)
        placed = take_masks(self.network)
        plan = Plan(exclude, granularity, autoconvert_layers)
        self.network, self.space, own = find_space(self.network, self.example, placed, plan)
        if not self.space.labels:
            raise UnsupportedModelError(_nothing(model, self.space))
        self.masks = MaskSet(self.space.channels, self.space.kernels, own)
        self._searched = set(self.masks) if autoconvert_layers else set(own)
        self.discrete_cost, self.ignore = discrete_cost, ignore
        self._train_features, self._train_rf, self._train_dilation = train_features, train_rf, train_dilation
        self._place_masks()
        self._follow_flags()
        self.cost_specification = _cost_argument(cost, regularizer)
        self.training = model.training
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.masks.to(device)
        self.weight_masks.to(device)

    def _place_masks(self) -> None:
        """Where in the flat vector the indices of each masked dimension lie."""
        shapes = shapes_of(self.network)
        ranks = {name: len(shape) for name, shape in shapes.items()}
        columns = self.space.columns()
        self.weight_masks = WeightMasks(self.masks.places(shapes), columns, ranks, self.masks.size - 1)
        names = names_of_parameters(self.network)
        split = [[name.rpartition(".") for name in names[weight]] for weight in self.weight_masks.names]
        self._owners = [[(self.network.get_submodule(path), leaf) for path, _, leaf in of_one] for of_one in split]

    # ---- the masked network --------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.__dict__.get("_is_replica"):
            raise ConfigurationError("PIT does not run in nn.DataParallel; use DistributedDataParallel, or PITTrainer")
        learns = self.training and torch.is_grad_enabled()
        if learns:
            self.masks.clip_()
        flat = self.masks()
        # The costs of the same step take these masks over: they are what the loss of this forward belongs to.
        keep = learns and not torch.compiler.is_compiling()
        self._flat_of_step = (flat, self._versions()) if keep else None
        masked = self.weight_masks(flat.hard, [getattr(places[0][0], places[0][1]) for places in self._owners])
        with _in_place(self._owners, masked):
            return self.network(*args, **kwargs)

    def _versions(self) -> list[int]:
        """Count what was written into the masks."""
        return [alpha._version for alpha in self.masks.alphas()]

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles of a network hold no part of a graph.
        return {**self.__dict__, "_flat_of_step": None}

    # ---- costs ---------------------------------------------------------------------------------------------------

    @property
    def cost_specification(self) -> CostArgument | None:
        return self._cost_specification

    @cost_specification.setter
    def cost_specification(self, cost: CostArgument | None) -> None:
        named = _named_costs(cost)
        sizes = Sizes(self.masks, shapes_of(self.network), self.space.found)
        self._costs = MaskedCosts([self._terms(name, of_name, sizes) for name, of_name in named.items()], sizes)
        self._cost_specification = cost

    def _terms(self, name: str, cost: str | CostSpec, sizes: Sizes) -> CostTerms:
        if cost == "params":
            terms = parameter_terms(name, "parameters", self.network, sizes, lambda p: 1.0)
        elif cost == "weight_bytes":
            terms = parameter_terms(name, "bytes", self.network, sizes, lambda p: 1.0 if p.dim() > 1 else 4.0)
        else:
            spec = _SPECS[cost] if isinstance(cost, str) else cost
            terms = spec_terms(
                spec, self.network, self._on_device(self.example), sizes, self.space.found.products, self.ignore
            )
        return CostTerms(name, terms.unit, terms.parts, terms.asked)

    @property
    def cost_names(self) -> list[str]:
        return list(self._costs.names)

    def cost_unit(self, name: str) -> str:
        """The unit of a cost."""
        self._check_cost(name)
        return self._costs.unit(name)

    @property
    def cost(self) -> Tensor:
        """``get_cost`` of the only cost; ConfigurationError if there are several."""
        if len(self._costs.names) != 1:
            raise ConfigurationError(f"cost: this network has the costs {self._costs.names}; take get_cost(name)")
        return self.get_cost(self._costs.names[0])

    def costs(self) -> dict[str, Tensor]:
        """All costs by name, as ``get_cost`` returns them, with the masks computed once."""
        flat, self._flat_of_step = self._flat_of_step, None
        if flat is None or flat[1] != self._versions():
            flat = (self.masks(), [])
        return self._costs.of(self.masks, flat[0], discrete=self.discrete_cost)

    def get_cost(self, name: str) -> Tensor:
        """The cost of the network that would be exported now, in its unit."""
        self._check_cost(name)
        return self.costs()[name]

    def soft_cost(self, name: str) -> Tensor:
        """The cost at the relaxed sizes, the sums of |alpha|, of which ``get_cost`` has the gradient."""
        self._check_cost(name)
        return self._costs(self.masks.sizes(self.masks().soft))[self._costs.names.index(name)]

    def _check_cost(self, name: str) -> None:
        if name not in self._costs.names:
            raise ConfigurationError(f"cost {name!r}: this network has {self._costs.names}")

    def reachable_costs(self) -> dict[str, tuple[float, float]]:
        """Name -> (smallest, largest) cost of the networks that can be exported."""
        return self._costs.reachable(self.masks)

    def get_regularization_loss(self) -> Tensor:
        """The only cost, for a loss: task + strength * this."""
        return self.cost

    # ---- parameters ----------------------------------------------------------------------------------------------

    def named_nas_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The alphas of all masks, by their names in this module."""
        return self.masks.named_parameters(prefix="masks")

    def nas_parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self.named_nas_parameters())

    def named_net_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights; with the alphas disjoint and complete."""
        return self.network.named_parameters(prefix="network")

    def net_parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self.named_net_parameters())

    # ---- which masks learn ---------------------------------------------------------------------------------------

    @property
    def train_features(self) -> bool:
        """Whether the masks of channels learn."""
        return self._train_features

    @train_features.setter
    def train_features(self, value: bool) -> None:
        self._train_features = value
        self._follow_flags()

    @property
    def train_rf(self) -> bool:
        """Whether the masks of kernel sizes learn."""
        return self._train_rf

    @train_rf.setter
    def train_rf(self, value: bool) -> None:
        self._train_rf = value
        self._follow_flags()

    @property
    def train_dilation(self) -> bool:
        """Whether the masks of dilations learn."""
        return self._train_dilation

    @train_dilation.setter
    def train_dilation(self, value: bool) -> None:
        self._train_dilation = value
        self._follow_flags()

    def _follow_flags(self, learn: bool = True) -> None:
        flags = (
            (ChannelMask, self._train_features),
            (KernelMask, self._train_rf),
            (DilationMask, self._train_dilation),
        )
        for label, mask in self.masks.items():
            flag = any(flag for kind, flag in flags if isinstance(mask, kind))
            mask.alpha.requires_grad_(learn and flag and label in self._searched)

    def train_nas_only(self) -> None:
        """Let the masks learn, as far as the flags say so, and no weight."""
        self._set_learning(nas=True, net=False)

    def train_net_only(self) -> None:
        """Let the weights learn, and no mask."""
        self._set_learning(nas=False, net=True)

    def train_net_and_nas(self) -> None:
        self._set_learning(nas=True, net=True)

    def _set_learning(self, *, nas: bool, net: bool) -> None:
        self._follow_flags(nas)
        for parameter in self.net_parameters():
            parameter.requires_grad_(net)

    # ---- what was found ------------------------------------------------------------------------------------------

    def arch(self) -> dict[str, Any]:
        """What the masks keep now: label -> kept units, kernel size or dilation."""
        return self.masks.decisions()

    def decide(self, arch: Mapping[str, Any]) -> None:
        """Set the masks to an architecture; ArchMismatchError, with nothing changed, if it is none of this network."""
        self.masks.decide(arch)

    def offered(self) -> dict[str, tuple[Hashable, ...]]:
        """Label -> kind and size of its mask."""
        return {label: mask.signature() for label, mask in self.masks.items()}

    def check_arch(self, arch: Mapping[str, Any]) -> None:
        """ArchMismatchError unless the masks can be set to it."""
        copy.deepcopy(self.masks).decide(arch)

    def export(self) -> nn.Module:
        """The smaller network, compared with this one in eval mode: of the user's own classes, or a ``torch.fx`` graph.

        It is a graph where numbers in the code had to change (``report()`` says so), and has then no other methods.

        On the example input and on random ones, max |difference| / max |output| is at most 1e-4 in float32 and 1e-9 in
        float64; else ExportError. The result holds copies of the weights, in the modes that the modules are in.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.rebuilt(
                self.arch(), [self._on_device(self.example), self._on_device(self.example, random=True)]
            )

    def rebuilt(self, arch: Mapping[str, Any], examples: Sequence[Sequence[Any]] | None) -> nn.Module:
        """The plain network of an architecture with the weights of this one, verified on ``examples``."""
        masked = self
        if arch != self.arch():  # else the masks are left as they are, in the middle of a search
            masked = self._copy()
            masked.decide(arch)
        failure: ExportError | None = None
        rewriter = masked._rewriter()
        for renumber in (True,) if masked.space.as_graph else (True, False):
            small = cut_network(masked.space, masked.masks, masked.network, renumber=renumber, rewriter=rewriter)
            try:
                masked._compare(small, examples or ())
            except ExportError as error:
                failure = failure or error
                continue
            return small
        assert failure is not None
        raise ExportError(f"{failure}. {masked._copy()._differing(examples or ())}") from failure

    def _compare(self, small: nn.Module, examples: Sequence[Sequence[Any]]) -> None:
        """ExportError unless a cut of this network computes what it does."""
        with NoDropout():  # which some networks have in eval mode too
            for args in examples:
                check_equal(self, small, args, "the exported network", seed=0)

    def _copy(self) -> PIT:
        copy_of_self = copied(self)
        assert isinstance(copy_of_self, PIT)
        return copy_of_self

    def _rewriter(self) -> Rewriter | None:
        return rewriter_of(self.space, self.network, self._on_device(self.example))

    def _differing(self, examples: Sequence[Sequence[Any]]) -> str:
        """Which masks alone make an export differ, in a sentence."""
        arch, full = self.arch(), {label: mask.everything() for label, mask in self.masks.items()}
        guilty = []
        for label in arch:
            self.decide({**full, label: arch[label]})
            small = cut_network(self.space, self.masks, self.network, rewriter=self._rewriter())
            try:
                self._compare(small, examples)
            except ExportError:
                guilty.append(label)
        if not guilty:
            return "No mask alone makes it differ. Has the network been changed since PIT was made?"
        return f"The first mask that alone makes it differ is {guilty[0]!r}, of {len(guilty)}; exclude= its layer"

    def _on_device(self, args: Sequence[Any], random: bool = False) -> list[Any]:
        like = next((p for p in self.network.parameters() if p.is_floating_point()), torch.zeros(()))

        def moved(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor.to(like.device)
            return (torch.randn(tensor.shape) if random else tensor).to(like)

        found: list[Any] = pytree.tree_map_only(Tensor, moved, list(args))
        return found

    arch_export = export

    def report(self) -> PITReport:
        """Masks with what goes together, frozen dimensions with their reasons, smallest and largest costs."""
        now = {name: cost.item() for name, cost in self.costs().items()}
        return report_of(
            self.space,
            self.masks,
            {name: (low, now[name], high) for name, (low, high) in self.reachable_costs().items()},
        )

    def summary(self) -> dict[str, dict[str, Any]]:
        """Layer with searched dimensions -> its type and sizes in the network that would be exported now."""
        flat = self.masks().hard.detach().cpu() > 0
        sizes = {d: int(flat[place].sum()) for d, place in self.masks.places(shapes_of(self.network)).items()}
        decisions = self.arch()
        dilations = {k.weight: decisions[k.dilation_label] for k in self.space.kernels if k.dilated}
        found = {}
        for path, module in self.network.named_modules():
            row = _summary_row(f"{path}.weight".lstrip("."), module, sizes, dilations)
            if row:
                found[path] = row
        return found


@contextmanager
def _in_place(owners: Sequence[Sequence[tuple[nn.Module, str]]], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Other tensors in the place of parameters: ``torch.func.functional_call``, without looking the names up."""
    before = [_held(owner, leaf)[leaf] for (owner, leaf), *_ in owners]
    if any(tensor.grad_fn is not None for tensor in before):
        raise RuntimeError("a PIT network is called while another call of it runs, in another thread or from inside")
    try:
        for places, tensor in zip(owners, tensors, strict=True):
            for owner, leaf in places:
                _held(owner, leaf)[leaf] = tensor
        yield
    finally:
        for places, tensor in zip(owners, before, strict=True):
            for owner, leaf in places:
                _held(owner, leaf)[leaf] = tensor


def _held(owner: nn.Module, leaf: str) -> dict[str, Any]:
    """Where a module keeps a tensor: in fact in one of two mappings that forward looks at."""
    return owner._parameters if leaf in owner._parameters else owner._buffers


def _summary_row(
    weight: str, module: nn.Module, sizes: Mapping[Dimension, int], dilations: Mapping[str, int]
) -> dict[str, Any]:
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


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"PIT: a torch.nn.Module is needed, got {type(model).__name__}")
    if isinstance(model, PIT):
        raise ConfigurationError("PIT: this network is one already; give the plain network it was made of")
    inside = next((path for path, module in model.named_modules() if isinstance(module, Mutable)), None)
    if inside is not None:
        raise UnsupportedModelError(
            f"PIT: {inside or 'the network'} is a {type(model.get_submodule(inside)).__name__}, and masks inside of "
            "choices are not in this version: decide the choices first, fixed(model, arch), and give PIT the result"
        )


def _example(network: nn.Module, input_shape: tuple[Any, ...] | None, example_input: Any) -> tuple[Any, ...]:
    """The inputs to follow the network with."""
    if example_input is not None:
        if input_shape is not None:
            warnings.warn("PIT: input_shape and example_input are both given; example_input is taken", stacklevel=3)
        given = tuple(example_input) if isinstance(example_input, tuple | list) else (example_input,)
        kept: tuple[Any, ...] = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), given)
        return kept
    if input_shape is None:
        raise ConfigurationError("PIT: the shape of an input is needed: input_shape=(3, 32, 32), without the batch")
    if not isinstance(input_shape, tuple):
        raise InputTypeError(f"PIT: input_shape={input_shape!r} is a {type(input_shape).__name__}, a tuple is needed")
    shapes = input_shape if input_shape and all(isinstance(s, tuple) for s in input_shape) else (input_shape,)
    wrong = [n for shape in shapes for n in shape if not isinstance(n, int) or isinstance(n, bool) or n < 1]
    if wrong:
        raise ConfigurationError(f"PIT: input_shape={input_shape!r}: integers of at least 1 are needed, got {wrong}")
    parameter = next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, *shape, generator=generator).to(parameter) for shape in shapes)


def _cost_argument(cost: CostArgument | None, regularizer: str | None) -> CostArgument | None:
    if regularizer is None:
        return cost
    if cost is not None:
        raise ConfigurationError(f"PIT: cost={cost!r} and regularizer={regularizer!r}: give one of them")
    if regularizer not in _REGULARIZERS:
        raise ConfigurationError(f"PIT: regularizer={regularizer!r}: allowed are {sorted(_REGULARIZERS)}")
    return _REGULARIZERS[regularizer]


def _named_costs(cost: CostArgument | None) -> dict[str, str | CostSpec]:
    if cost is None:
        return {"params": "params"}
    if isinstance(cost, Mapping):
        named = dict(cost)
    elif not isinstance(cost, str | CostSpec | Sequence):
        raise InputTypeError(f"PIT: cost={cost!r}: a name, a CostSpec, several of them, or name -> one of them")
    else:
        several = [cost] if isinstance(cost, str | CostSpec) else list(cost)
        named = {one.name if isinstance(one, CostSpec) else one: one for one in several}
    for name, one in named.items():
        if not isinstance(one, CostSpec) and (not isinstance(one, str) or one not in COUNTED):
            raise ConfigurationError(f"cost {name!r}: {one!r} is none; allowed are {sorted(COUNTED)} and a CostSpec")
    return named


def _nothing(model: nn.Module, space: SearchSpace) -> str:
    reasons = [f"{dimension}: {reason}" for dimension, reason in list(space.frozen.items())[:5]]
    return f"{type(model).__name__} has nothing to search: " + "; ".join(reasons)
