"""Networks under search: a copy of the user's network with masks, choices, or both, and its costs."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..cost.counts import MACS, OPS, PARAMS_NO_BIAS, PARAMS_NO_NORM
from ..cost.decode import best_under_budget
from ..cost.model import CostModel
from ..cost.spec import CostSpec
from ..errors import ArchMismatchError, ConfigurationError, ExportError, UnsupportedModelError
from ..export.fixed import check_equal, without_choices
from ..graph import evaluated
from ..graph.cut import copied
from ..graph.rewrite import Rewriter
from ..mutables import Argmax, Decision, GumbelSoftmax, Softmax, decisions, draw, set_sampler
from ..mutables.base import SearchModel
from ..mutables.in_place import Changes
from ..mutables.masks import ChannelMask, DilationMask, KernelMask
from ..mutables.samplers import first_argmax
from .arguments import CostArgument, check_model, example_of, named_costs
from .chances import Chances
from .conversion import Plan, find_space, learn_widths, take_masks
from .mask_set import FlatMasks, MaskSet
from .masked_cost import CostTerms, MaskedCosts, Odds, parameter_terms, spec_terms
from .presence import holds
from .projection import Projection
from .report import PITReport, report_of
from .search_space import SearchSpace, cut_network, rewriter_of, shapes_of
from .selection import check_labels, choose_, fixed_options, inverse_variation, sampler_of, set_choices, taken
from .sizes import Sizes
from .summary import summary_row
from .trial import NoDropout
from .weight_masks import MaskedWeights

__all__ = ["GoneMask", "SearchedNetwork"]

_SPECS = {spec.name: spec for spec in (MACS, OPS, PARAMS_NO_BIAS, PARAMS_NO_NORM)}


class GoneMask(NamedTuple):
    """A mask of a candidate that was dropped: what it had decided, and what could be decided there."""

    decision: Any
    signature: tuple[Hashable, ...]


class SearchedNetwork(SearchModel):
    """A copy of a network, with masks over its dimensions and the choices that it was written with.

    ``network``: the copy. ``masks``: label -> mask. ``choices``: label -> decision of a LayerChoice, InputChoice or
    Repeat in it. Costs are expectations over the choices, under the sampler and the draw that these have now, of the
    networks that the masks leave: sum_a p(a) C_a(masks) over all architectures a of the choices, exactly.
    """

    @abstractmethod
    def __init__(self) -> None:
        """A concrete network says what of it is searched."""

    def _build(
        self,
        model: nn.Module,
        input_shape: tuple[Any, ...] | None,
        example_input: Any,
        plan: Plan,
        cost: CostArgument | None,
        ignore: Sequence[str | type[nn.Module]],
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self._flat_of_step: tuple[FlatMasks, list[int]] | None = None
        self._own_sampler: Softmax | GumbelSoftmax | None = None
        self._quiet = Softmax()
        self.discrete_cost, self.ignore = False, ignore
        check_model(model, name)
        self.network = copied(model)
        self.example = example_of(name, self.network, input_shape, example_input)
        placed = take_masks(self.network)
        learn_widths(self.network, self.example)
        self.network, self.space, own = find_space(self.network, self.example, placed, plan)
        self.choices: dict[str, Decision] = decisions(self.network)
        if not self.space.labels and not self.choices:
            raise UnsupportedModelError(_nothing(model, self.space, plan))
        self.masks = MaskSet(self.space.channels, self.space.kernels, own)
        self._gone: dict[str, GoneMask] = {}
        self._searched = {label for label in self.masks if plan.autoconvert or label in own}
        # What is there only because candidates differ in their widths is no decision of its own.
        self._decided = [label for label in self.masks if label in self._searched or label not in self.space.presence]
        check_labels(list(self.choices), self._decided)
        self._trained = {ChannelMask: True, KernelMask: True, DilationMask: True}
        self._train_selection = True
        self.weight_masks = self._masked_weights(self.masks, self.space)
        self._follow_flags()
        self.cost_specification = cost
        self.training = model.training
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.masks.to(device)
        self.weight_masks.scopes.to(device)

    def _masked_weights(self, masks: MaskSet, space: SearchSpace) -> MaskedWeights:
        places = masks.places(shapes_of(self.network))
        return MaskedWeights(self.network, places, space.columns(), masks.size - 1)

    def _take_space(self, space: SearchSpace, costs: MaskedCosts, changes: Changes) -> None:
        """Search these axes from now on, some of those of before with what is left of their units, by their masks."""
        before, own = self.masks, dict(self.masks.items())
        masks = MaskSet(space.channels, space.kernels, own, before._keys)
        masks.training = before.training
        for name, buffer in before.named_buffers(recurse=False):
            setattr(masks, name, getattr(masks, name).to(buffer.device, buffer.dtype))
        weight_masks = self._masked_weights(masks, space)
        weight_masks.scopes.to(before.one.device)
        weight_masks.train(self.weight_masks.training)
        changes.set(self, "space", space)
        changes.set(self, "masks", masks)
        changes.set(self, "weight_masks", weight_masks)
        changes.set(self, "_costs", costs)
        changes.set(self, "_flat_of_step", None)
        options = {label: len(decision.options) for label, decision in self.choices.items()}
        changes.set(self, "_chances", Chances(costs.conditions, options) if options else None)

    # ---- the searched network ------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.__dict__.get("_is_replica"):
            raise ConfigurationError(
                f"{type(self).__name__} does not run in nn.DataParallel; use DistributedDataParallel, or a trainer"
            )
        if self._own_sampler is not None:
            self._sample(self._own_sampler)
        learns = self.training and torch.is_grad_enabled()
        if learns:
            self.masks.clip_()
        flat = self.masks()
        # The costs of the same step take these masks over: they are what the loss of this forward belongs to.
        keep = learns and not torch.compiler.is_compiling()
        self._flat_of_step = (flat, self._versions()) if keep else None
        with self.weight_masks.entering(self.network, flat.hard):
            return self.network(*args, **kwargs)

    def idle_masks(self) -> list[nn.Parameter]:
        """The alphas of masks with no part in the last forward: the candidates that they are of did not run.

        Their gradients are zeros, which an optimizer with momentum would still move them by: set these to None.
        """
        ran = self.weight_masks.ran()
        used = [axis.label for axis in self.space.channels if any(d.name in ran for d in axis.group.columns)]
        for kernel in self.space.kernels:
            if kernel.weight in ran:
                used += [kernel.kernel_label, *([kernel.dilation_label] if kernel.dilated else [])]
        return [mask.alpha for label, mask in self.masks.items() if label not in set(used)]

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
        named = named_costs(type(self).__name__, cost)
        options = {label: len(decision.options) for label, decision in self.choices.items()}
        sizes = Sizes(self.masks, shapes_of(self.network), self.space.found, self.space.presence, options)
        self._costs = MaskedCosts([self._terms(name, of_name, sizes) for name, of_name in named.items()], sizes.full)
        self._reachable: dict[str, tuple[float, float]] = {}
        self._chances = Chances(self._costs.conditions, options) if options else None
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
        return self._costs.of(self.masks, flat[0], self._odds(), discrete=self.discrete_cost)

    def costs_under(self, probabilities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All costs by name, expected under these probabilities of the options of each choice."""
        chances = None
        if self._chances is not None:
            device = self.masks.one.device
            chances = self._chances({label: p.to(device) for label, p in probabilities.items()})
        odds = None if chances is None else Odds(chances, chances)
        return self._costs.of(self.masks, self.masks(), odds, discrete=self.discrete_cost)

    def _odds(self) -> Odds | None:
        if self._chances is None:
            return None
        soft = {label: decision.probabilities() for label, decision in self.choices.items()}
        run = {label: taken(decision, soft[label]) for label, decision in self.choices.items()}
        return Odds(self._chances(soft), self._chances(run))

    def get_cost(self, name: str) -> Tensor:
        """The cost of the network that would be exported now, in its unit; of choices, the expected one.

        The gradient of the masks is that of ``soft_cost`` (or, with ``discrete_cost``, straight through), along the
        path that runs, if one was drawn; that of the choices is exact.
        """
        self._check_cost(name)
        return self.costs()[name]

    def soft_cost(self, name: str) -> Tensor:
        """The cost at the relaxed sizes, the sums of |alpha|, of which ``get_cost`` has the gradient."""
        self._check_cost(name)
        odds = self._odds()
        costs = self._costs(self.masks.sizes(self.masks().soft), None if odds is None else odds.of_costs)
        return costs[self._costs.names.index(name)]

    def hard_cost(self, name: str) -> float:
        """The cost of the network that would be exported now: the likeliest option of every choice."""
        self._check_cost(name)
        return self.hard_costs()[name]

    @torch.no_grad()
    def hard_costs(self) -> dict[str, float]:
        """All costs by name, as ``hard_cost`` returns them."""
        found = self._costs(self.masks.sizes(self.masks().hard), self._chances_now()).tolist()
        # As a decimal number of 15 digits, as CostModel.of has it: a budget that is met is not missed by a rounding.
        return {name: float(f"{cost:.15g}") for name, cost in zip(self.cost_names, found, strict=True)}

    def _chances_now(self) -> Tensor | None:
        """Which conditions hold in the network that would be exported now, as probabilities; None without choices."""
        if self._chances is None:
            return None
        every = {label: torch.eye(len(d.options), device=d.alpha.device) for label, d in self.choices.items()}
        return self._chances({label: every[label][index] for label, index in self._indices().items()})

    @torch.no_grad()
    def _cost_models(self) -> dict[str, CostModel]:
        """Name -> cost of every architecture of the choices under the masks of now."""
        return self._costs.at(self.masks.sizes(self.masks().hard), self.network)

    def _check_cost(self, name: str) -> None:
        if name not in self._costs.names:
            raise ConfigurationError(f"cost {name!r}: this network has {self._costs.names}")

    def reachable_costs(self) -> dict[str, tuple[float, float]]:
        """Name -> (smallest, largest) cost of the networks that can be exported.

        Of a search that has got smaller, in which units were removed or candidates dropped, of all at first.
        """
        return self._reachable or self._costs.reachable(self.masks, self.network)

    def check_reachable(self, targets: Mapping[str, float]) -> None:
        """InfeasibleTargetError unless some architecture of the choices meets all targets with the smallest masks."""
        for name in targets:
            self._check_cost(name)
        smallest = torch.tensor(self.masks.lowest(learning=True), dtype=torch.float64)
        costs = self._costs.at(smallest, self.network)
        uniform = {label: [0.0] * len(decision.options) for label, decision in self.choices.items()}
        best_under_budget(uniform, {name: costs[name] for name in targets}, targets, fixed=fixed_options(self.choices))

    @torch.no_grad()
    def keep_targets_(self, targets: Mapping[str, float], *, fills: bool = False) -> None:
        """Bring choices and masks to a network whose hard costs are at most ``targets``, cost -> largest value.

        Alphas move as little as they can. If no masks are small enough for the likeliest options, the most probable
        ones that can meet all targets take their place, exactly; then the units of the smallest |alpha| are switched
        off. ``fills``: where every target is used to less than 95 %, the largest ones that fit are switched on; without
        masks, the most probable options lead that use 95 % of the most that any do. Only what learns moves.
        InfeasibleTargetError if there is no such network.
        """
        for name in targets:
            self._check_cost(name)
        if self.choices:
            self._choose(targets, fills=fills and not len(self.masks))
        if len(self.masks):
            self._projection(targets)(fills=fills)

    def lift_masks_(self, limits: Mapping[str, float]) -> None:
        """Raise all alphas of masks alike until 95 % of one of these limits of hard costs are used."""
        if len(self.masks):
            self._projection(limits).lift()

    def _projection(self, limits: Mapping[str, float]) -> Projection:
        rows = [self._costs.names.index(name) for name in limits]
        # A target of 0 allows what costs nothing.
        tiny = torch.finfo(torch.float64).tiny
        most = torch.tensor([max(limit, tiny) for limit in limits.values()], dtype=torch.float64)
        most, chances = most.to(self.masks.one.device), self._chances_now()
        return Projection(self.masks, lambda sizes: self._costs(sizes, chances)[rows] / most)

    def _choose(self, targets: Mapping[str, float], *, fills: bool) -> None:
        """Let options lead that can meet the targets, with the smallest masks if need be."""
        smallest = torch.tensor(self.masks.lowest(learning=True), dtype=torch.float64, device=self.masks.one.device)
        every = self._costs.at(smallest, self.network)
        choose_(self.choices, {name: every[name] for name in targets}, targets, fills=fills)

    def get_regularization_loss(self) -> Tensor:
        """The only cost, for a loss: task + strength * this."""
        return self.cost

    # ---- choices -------------------------------------------------------------------------------------------------

    def update_softmax_options(
        self, temperature: float | None = None, *, gumbel: bool | None = None, hard: bool | None = None
    ) -> None:
        """Let forward sample the choices by itself, as a loop of one's own wants it; None leaves an option as it is.

        In train mode every forward mixes all options by softmax(alpha / temperature), or with new ``gumbel`` noise on
        alpha, from torch's own random numbers; in eval mode there is no noise. ``hard``: the likeliest one runs, with
        the gradient of the soft weights. Trainers set their own samplers, after which these options are off.
        """
        now = self._own_sampler or Softmax()
        sampler = self._own_sampler = sampler_of(
            now.temperature if temperature is None else temperature,
            gumbel=isinstance(now, GumbelSoftmax) if gumbel is None else gumbel,
            hard=now.hard if hard is None else hard,
        )
        self._quiet = Softmax(sampler.temperature, sampler.hard)
        set_sampler(self.choices, sampler)
        draw(self.choices)

    def _sample(self, sampler: Softmax | GumbelSoftmax) -> None:
        """A new draw of the own sampler; nothing once another one has been set."""
        held = [decision.sampler for decision in self.choices.values()]
        if all(one is sampler or one is self._quiet for one in held):
            set_sampler(self.choices, sampler if self.training else self._quiet)
            draw(self.choices)

    def get_total_icv(self, eps: float = 1e-3) -> Tensor:
        """sum over the choices of mean(p)^2 / (var(p) + eps): adding it to a loss pushes every p towards one option.

        0 without choices. Four equal probabilities: (1 / 16) / 1e-3 = 62.5.
        """
        values = [inverse_variation(d.probabilities(), eps) for d in self.choices.values()]
        return torch.stack(values).sum() if values else torch.zeros(())

    # ---- parameters ----------------------------------------------------------------------------------------------

    def named_nas_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The alphas of all masks and choices, by their names in this module."""
        yield from self.masks.named_parameters(prefix="masks")
        alphas = {id(decision.alpha) for decision in self.choices.values()}
        for name, parameter in self.network.named_parameters(prefix="network"):
            if id(parameter) in alphas:
                yield name, parameter

    def nas_parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self.named_nas_parameters())

    def named_net_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights; with the alphas disjoint and complete."""
        alphas = {id(decision.alpha) for decision in self.choices.values()}
        for name, parameter in self.network.named_parameters(prefix="network"):
            if id(parameter) not in alphas:
                yield name, parameter

    def net_parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self.named_net_parameters())

    # ---- what learns ---------------------------------------------------------------------------------------------

    @property
    def train_features(self) -> bool:
        """Whether the masks of channels learn."""
        return self._trained[ChannelMask]

    @train_features.setter
    def train_features(self, value: bool) -> None:
        self._trained[ChannelMask] = value
        self._follow_flags()

    @property
    def train_rf(self) -> bool:
        """Whether the masks of kernel sizes learn."""
        return self._trained[KernelMask]

    @train_rf.setter
    def train_rf(self, value: bool) -> None:
        self._trained[KernelMask] = value
        self._follow_flags()

    @property
    def train_dilation(self) -> bool:
        """Whether the masks of dilations learn."""
        return self._trained[DilationMask]

    @train_dilation.setter
    def train_dilation(self, value: bool) -> None:
        self._trained[DilationMask] = value
        self._follow_flags()

    @property
    def train_selection(self) -> bool:
        """Whether the alphas of choices learn."""
        return self._train_selection

    @train_selection.setter
    def train_selection(self, value: bool) -> None:
        self._train_selection = value
        self._follow_flags()

    def _follow_flags(self, learn: bool = True) -> None:
        for label, mask in self.masks.items():
            flag = any(flag for kind, flag in self._trained.items() if isinstance(mask, kind))
            mask.alpha.requires_grad_(learn and flag and label in self._searched)
        for decision in self.choices.values():
            decision.alpha.requires_grad_(learn and self._train_selection)

    def train_nas_only(self) -> None:
        """Let masks and choices learn, as far as the flags say so, and no weight."""
        self._set_learning(nas=True, net=False)

    def train_net_only(self) -> None:
        """Let the weights learn, and no mask and no choice."""
        self._set_learning(nas=False, net=True)

    def train_net_and_nas(self) -> None:
        self._set_learning(nas=True, net=True)

    def _set_learning(self, *, nas: bool, net: bool) -> None:
        self._follow_flags(nas)
        for parameter in self.net_parameters():
            parameter.requires_grad_(net)

    # ---- what was found ------------------------------------------------------------------------------------------

    def _indices(self) -> dict[str, int]:
        """Label of a choice -> option with the largest alpha."""
        return {label: first_argmax(d.alpha.detach().tolist()) for label, d in self.choices.items()}

    def arch(self) -> dict[str, Any]:
        """What is found now: label -> option of a choice, kept units, kernel size or dilation of a mask."""
        of_masks = {**{label: gone.decision for label, gone in self._gone.items()}, **self.masks.decisions()}
        return {**self._options(self._indices()), **{label: of_masks[label] for label in self._decided}}

    def _options(self, indices: Mapping[str, int]) -> dict[str, Any]:
        """Label -> option of a choice, JSON-ready."""
        found = {label: self.choices[label].options[index] for label, index in indices.items()}
        return {label: list(option) if isinstance(option, tuple) else option for label, option in found.items()}

    def arch_within(self, budget: Mapping[str, float]) -> dict[str, Any]:
        """The most probable options of the choices that keep the budget, cost -> limit, with the masks of now.

        Exact; InfeasibleTargetError if none does.
        """
        if not budget:
            return self.arch()
        for name in budget:
            self._check_cost(name)
        log_p = {k: d.alpha.detach().double().log_softmax(0).tolist() for k, d in self.choices.items()}
        costs = self._cost_models()
        found = best_under_budget(log_p, {name: costs[name] for name in budget}, budget)
        return {**self.arch(), **self._options(found)}

    def decide(self, arch: Mapping[str, Any]) -> None:
        """Set masks and choices to an architecture; ArchMismatchError, with nothing changed, if it is none of these.

        The logits of choices become 50 and 0: to search on from there, make them smaller.
        """
        indices, of_masks = self._checked(arch)
        self.masks.decide(of_masks)
        set_choices(self.choices, indices)

    def _checked(self, arch: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, Any]]:
        """The options of the choices, which are checked, and the decisions of the masks, which are not."""
        labels = [*self.choices, *self._decided]
        missing, extra = [x for x in labels if x not in arch], [x for x in arch if x not in set(labels)]
        if missing or extra:
            raise ArchMismatchError(
                f"missing labels {missing}, labels {extra} that the model does not have; its labels are {labels}"
            )
        indices = {label: decision.index_of(arch[label]) for label, decision in self.choices.items()}
        return indices, {x: arch[x] if x in labels else mask.everything() for x, mask in self.masks.items()}

    def offered(self) -> dict[str, tuple[Hashable, ...]]:
        """Label -> what is decided there: kind and size of a mask, options of a choice."""
        of_choices = {label: decision.members[0].signature() for label, decision in self.choices.items()}
        of_masks = {label: gone.signature for label, gone in self._gone.items()}
        of_masks.update({label: mask.signature() for label, mask in self.masks.items()})
        return {**of_choices, **{label: of_masks[label] for label in self._decided}}

    def check_arch(self, arch: Mapping[str, Any]) -> None:
        """ArchMismatchError unless this network can be set to it."""
        copy.deepcopy(self.masks).decide(self._checked(arch)[1])

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
        for renumber in (True,) if masked.space.as_graph else (True, False):
            small = masked._plain(renumber)
            try:
                masked._compare(small, examples or ())
            except ExportError as error:
                failure = failure or error
                continue
            return small
        assert failure is not None
        raise ExportError(f"{failure}. {masked._copy()._differing(examples or ())}") from failure

    def _plain(self, renumber: bool = True) -> nn.Module:
        """The network that this one stands for now, not compared with it."""
        rewriter, absent = self._rewriter(), self._absent()
        small = cut_network(self.space, self.masks, self.network, renumber=renumber, rewriter=rewriter, absent=absent)
        return without_choices(small, self._indices()) if self.choices else small

    def _absent(self) -> list[str]:
        """The axes of candidates that are wider than what is decided for now."""
        indices = self._indices()
        return [label for label, presence in self.space.presence.items() if not holds(presence, indices)]

    def _compare(self, small: nn.Module, examples: Sequence[Sequence[Any]]) -> None:
        """ExportError unless a cut of this network computes what it does."""
        with evaluated(self, Argmax()), NoDropout():  # which some networks have in eval mode too
            for args in examples:
                check_equal(self, small, args, "the exported network", seed=0)

    def _copy(self) -> SearchedNetwork:
        copy_of_self = copied(self)
        assert isinstance(copy_of_self, SearchedNetwork)
        return copy_of_self

    def _rewriter(self) -> Rewriter | None:
        return rewriter_of(self.space, self.network, self._on_device(self.example))

    def _differing(self, examples: Sequence[Sequence[Any]]) -> str:
        """Which masks alone make an export differ, in a sentence."""
        arch, full = self.arch(), {x: self.masks[x].everything() for x in self._decided if x not in self._gone}
        guilty = []
        for label in full:
            self.decide({**arch, **full, label: arch[label]})
            try:
                self._compare(self._plain(), examples)
            except ExportError:
                guilty.append(label)
        if not guilty:
            return "No mask alone makes it differ. Has the network been changed since this one was made?"
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
        now = self.hard_costs()
        return report_of(
            self.space,
            self.masks,
            {name: (low, now[name], high) for name, (low, high) in self.reachable_costs().items()},
        )

    def summary(self) -> dict[str, dict[str, Any]]:
        """Layer with searched dimensions -> its type and sizes in the network that would be exported now."""
        flat = self.masks().hard.detach().cpu() > 0
        for label in self._absent():
            flat[self.masks.start(label) : self.masks.start(label) + len(self.masks[label].alpha)] = False
        sizes = {d: int(flat[place].sum()) for d, place in self.masks.places(shapes_of(self.network)).items()}
        decided = self.masks.decisions()
        dilations = {k.weight: decided[k.dilation_label] for k in self.space.kernels if k.dilated}
        found = {}
        for path, module in self.network.named_modules():
            row = summary_row(f"{path}.weight".lstrip("."), module, sizes, dilations)
            if row:
                found[path] = row
        return found


def _nothing(model: nn.Module, space: SearchSpace, plan: Plan) -> str:
    if not plan.autoconvert:
        return (
            f"{type(model).__name__} has nothing to search: it holds no LayerChoice, InputChoice or Repeat, and no "
            "mask was placed in it. PIT(model, ...) searches the widths of any network"
        )
    reasons = [f"{dimension}: {reason}" for dimension, reason in list(space.frozen.items())[:5]]
    return f"{type(model).__name__} has nothing to search: " + "; ".join(reasons)
