"""Random networks with choices in them: exports, costs, training steps and architectures, for PIT and SuperNet.

The networks are those of ``random_networks``, with ``LayerChoice``, ``InputChoice`` and ``Repeat`` among their steps:
candidates of one or of different widths, identities, functions, nested choices, labels and modules at several places.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, final

import pytest
import torch
from pit_networks import same
from random_networks import COMMON, DrawnNetwork, Live, Writer, conv_class, heads, learned, to_width
from random_spaces import Block
from torch import Tensor, fx, nn

from oneshot import (
    PIT,
    BinaryGates,
    GumbelSoftmax,
    InputChoice,
    LayerChoice,
    OnePath,
    Repeat,
    Softmax,
    count_macs,
    decisions,
    draw,
    set_sampler,
)
from oneshot.errors import UnsupportedModelError
from oneshot.graph import evaluated, tensors_of
from oneshot.mutables import ChannelMask
from oneshot.mutables.samplers import Gate, Sampler
from oneshot.pit import SuperNet
from oneshot.pit.network import SearchedNetwork
from oneshot.pit.search_space import shapes_of
from oneshot.pit.trial import NoDropout

SEEDS, SEARCHABLE, MOST_ARCHS = 32, 0.75, 24
REFUSED = ("different widths", "more than 1 value per channel")
COSTS = ("params", "macs")


# ---- networks ------------------------------------------------------------------------------------------------------


class Halved(nn.Module):
    """A function as a candidate."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


class Residual(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def choose(*inputs: Any) -> Tensor:
    *tensors, choice = inputs
    chosen: Tensor = choice(tensors)
    return chosen


class Maker:
    """Candidates for tensors of one network, with what several of them share."""

    def __init__(self, w: Writer) -> None:
        self.w = w
        self.kept: dict[tuple[str, int], list[nn.Module]] = {}  # modules that keep a shape
        self.left = w.rng.randint(1, 5)  # choices to place
        self.has_label = False

    def learned(self, x: Live, c_in: int, c_out: int) -> nn.Module:
        """Layers that change the width and nothing else of the shape."""
        w = self.w
        if x.kind in ("image", "sequence"):
            make, norm = conv_class(x), nn.BatchNorm2d if x.kind == "image" else nn.BatchNorm1d
            conv = make(c_in, c_out, w.pick([3, 1, 5]), padding="same", bias=w.chance(2))
            middle = w.width()
            deep = (make(c_in, middle, 1), nn.ReLU(), make(middle, c_out, 3, padding=1))
            apart = (make(c_in, c_in, 3, padding=1, groups=c_in), make(c_in, c_out, 1))
            parts: Sequence[Sequence[nn.Module]] = [(conv,), (conv, norm(c_out), nn.ReLU()), deep, apart]
        else:
            middle, linear = w.width(), nn.Linear(c_in, c_out, bias=w.chance(2))
            normed = nn.LayerNorm(c_in) if x.kind == "tokens" else nn.BatchNorm1d(c_in)
            deep_linear = (nn.Linear(c_in, middle), nn.GELU(), nn.Linear(middle, c_out))
            parts = [(linear,), (linear, nn.ReLU()), deep_linear, (normed, linear)]
        chosen = w.pick(parts)
        return chosen[0] if len(chosen) == 1 else nn.Sequential(*chosen)

    def keeping(self, x: Live, width: int, depth: int = 0) -> nn.Module:
        """Anything that keeps the shape; now and then a module that is elsewhere too."""
        known = self.kept.setdefault((x.kind, width), [])
        if known and self.w.chance(5):
            return self.w.pick(known)
        kinds: list[Callable[[], nn.Module]] = [lambda: self.learned(x, width, width)] * 3
        kinds += [nn.Identity, Halved, nn.Tanh, lambda: Residual(self.learned(x, width, width))]
        if depth < 2 and self.left > 0:
            kinds += [lambda: self.choice(x, width, depth + 1), lambda: self.repeated(x, width, depth + 1)]
        made = self.w.pick(kinds)()
        if not isinstance(made, nn.Identity | Halved | nn.Tanh):
            known.append(made)
        return made

    def choice(self, x: Live, width: int, depth: int = 0) -> LayerChoice:
        self.left -= 1
        if self.w.chance(3):
            return LayerChoice({f"op{i}": Block(self.keeping(x, width, depth)) for i in range(2)}, label="label")
        return LayerChoice([self.keeping(x, width, depth) for _ in range(self.w.pick([2, 3]))])

    def repeated(self, x: Live, width: int, depth: int = 0) -> Repeat:
        self.left -= 1
        low, high = self.w.pick([(0, 1), (0, 2), (1, 2)])
        return Repeat([self.keeping(x, width, depth) for _ in range(high)], depth=(low, high))

    # ---- steps that hold choices ---------------------------------------------------------------------------------

    def place(self, x: Live) -> None:
        self.w.pick([self.same, self.same, self.same, self.changing, self.widths, self.widths, self.row, self.inputs])(
            x
        )

    def same(self, x: Live) -> None:
        self.call(x, self.choice(x, x.width))

    def changing(self, x: Live) -> None:
        self.left -= 1
        width = self.w.width()
        self.call(x, LayerChoice([self.learned(x, x.width, width) for _ in range(self.w.pick([2, 3]))]))

    def row(self, x: Live) -> None:
        self.call(x, self.repeated(x, x.width))

    def widths(self, x: Live) -> None:
        """Candidates of different widths, then what keeps zeros, then a layer that sums over the channels."""
        self.left -= 1
        base = x.width if x.width > 1 and self.w.chance(2) else self.w.width()
        found = [base, base + self.w.pick([2, 3, 4]), *([base + 6] if self.w.chance(3) else [])]
        candidates = [self.learned(x, x.width, width) for width in found]
        if base == x.width and self.w.chance(2):
            candidates[0] = self.w.pick([nn.Identity, Halved])()
        order = self.w.rng.sample(range(len(found)), len(found))
        choice = LayerChoice([candidates[i] for i in order])
        y = self.call(x, choice, index=max(range(len(found)), key=lambda k: found[order[k]]))
        for _ in range(self.w.pick([0, 0, 1, 2])):
            if y.kind == "image" and y.narrowest > 1 and self.w.chance(3):
                y = self.w.call(y, self.w.pick([nn.MaxPool2d, nn.AvgPool2d])(2))
            else:
                y = self.w.call(y, self.w.pick([nn.ReLU, nn.Tanh, nn.SiLU, nn.Hardtanh])())
        learned(self.w, y)

    def inputs(self, x: Live) -> None:
        self.left -= 1
        width = self.w.width()
        branches = [to_width(self.w, x, width) for _ in range(self.w.pick([2, 3]))]
        if x.width == width:
            branches[0] = x
        reductions: list[Literal["sum", "mean", "concat"]] = ["sum", "mean", "concat"]
        reduction = self.w.pick(reductions)
        n_chosen = self.w.pick([1, 2] if reduction == "concat" else [1, 2, None])
        choice = InputChoice(len(branches), n_chosen=n_chosen, reduction=reduction)
        self.w.one(choose, branches, self.w.layer("inputs", choice))

    def call(self, x: Live, mutable: nn.Module, index: int = 0) -> Live:
        """The values of the network are written along one path."""
        for decision in decisions(mutable).values():
            decision.set_sampler(OnePath(0))
        if isinstance(mutable, LayerChoice):
            mutable.sampler = OnePath(index)
        return self.w.call(x, mutable)


@dataclass
class Drawn:
    model: nn.Module
    inputs: tuple[Tensor, ...]
    program: str


@torch.no_grad()
def random_network(seed: int) -> Drawn:
    """Up to ten instructions, of them one to five choices, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        w = Writer(random.Random(seed), seed)
        maker = Maker(w)
        w.input(w.pick(["image", "image", "image", "sequence", "sequence", "tokens", "vector"]))
        learned(w, w.live[0])
        for _ in range(w.rng.randint(2, 9)):
            x = w.source()
            if maker.left > 0 and w.chance(2):
                maker.place(x)
            elif not w.pick(COMMON[x.kind])(w, x):
                learned(w, x)
        if not decisions(w.model):
            maker.same(w.source())
        heads(w)
        for decision in decisions(w.model).values():
            decision.set_sampler(Softmax())
            decision.alpha.normal_(0.0, 1.0, generator=w.generator)
    inputs = tuple(x.double() for x in w.inputs)
    return Drawn(w.model.double().eval(), inputs, "\n".join([f"seed {seed}", *w.lines]))


# ---- what is checked -----------------------------------------------------------------------------------------------


def converted(drawn: Drawn, kind: type[SearchedNetwork]) -> SearchedNetwork:
    """With another copy of the network: choices and samplers of the drawn one stay as they are."""
    network = kind(  # type: ignore[call-arg]
        copy.deepcopy(drawn.model), example_input=drawn.inputs, cost=list(COSTS), ignore=[DrawnNetwork, fx.GraphModule]
    )
    return network.double()  # alphas of masks too


@torch.no_grad()
def scatter(network: SearchedNetwork, rng: random.Random) -> None:
    """Masks that have lost something."""
    for label, mask in network.masks.items():
        if mask.alpha.requires_grad and isinstance(mask, ChannelMask):
            n = len(mask.alpha)
            network.masks[label].keep(sorted(rng.sample(range(n), rng.randint(max(1, mask.least), n))))
        elif mask.alpha.requires_grad:
            mask.alpha.copy_(torch.tensor([rng.random() for _ in mask.alpha]))


def every(network: SearchedNetwork) -> Iterator[dict[str, int]]:
    for options in itertools.product(*(range(len(d.options)) for d in network.choices.values())):
        yield dict(zip(network.choices, options, strict=True))


def arch_of(network: SearchedNetwork, choices: dict[str, int]) -> dict[str, Any]:
    """The masks of now with other choices, in the words of an architecture file."""
    options = {label: network.choices[label].options[k] for label, k in choices.items()}
    return {**network.arch(), **json.loads(json.dumps(options))}


@contextmanager
def pinned(network: nn.Module, choices: dict[str, int]) -> Iterator[None]:
    with evaluated(network):
        known = network.choices if isinstance(network, SearchedNetwork) else decisions(network)
        for label, decision in known.items():
            decision.set_sampler(OnePath(choices[label]))
        yield


def counted(small: nn.Module, inputs: Sequence[Tensor]) -> dict[str, float]:
    macs = count_macs(small, tuple(x[:1] for x in inputs), ignore=[DrawnNetwork, fx.GraphModule]).of({})
    return {"params": float(sum(p.numel() for p in small.parameters())), "macs": macs}


def check_exports(drawn: Drawn, network: SearchedNetwork, rng: random.Random, rounds: int) -> None:
    plain = {name: t.clone() for name, t in drawn.model.state_dict().items()}
    for _ in range(rounds):
        scatter(network, rng)
        choices = {label: rng.randrange(len(d.options)) for label, d in network.choices.items()}
        arch = arch_of(network, choices)
        network.decide(arch)
        small = network.export().eval()
        for args in (drawn.inputs, tuple(torch.randn_like(x) for x in drawn.inputs)):
            with pinned(network, choices):
                expected = network(*copy.deepcopy(args))
            with torch.no_grad():
                same(expected, small(*copy.deepcopy(args)), 1e-9)
        assert counted(small, drawn.inputs) == {name: network.hard_cost(name) for name in COSTS}
        set_sampler(network.choices, Softmax())
        assert network.get_cost("params").item() == pytest.approx(network.hard_cost("params"), rel=1e-9)
        check_round_trip(drawn, network, json.loads(json.dumps(arch)))
    assert all(torch.equal(plain[name], t) for name, t in drawn.model.state_dict().items())


def check_round_trip(drawn: Drawn, network: SearchedNetwork, arch: dict[str, Any]) -> None:
    assert json.loads(json.dumps(network.arch())) == arch
    network.check_arch(arch)
    other = copy.deepcopy(network)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in other.nas_parameters():
            parameter.uniform_(0, 1)
    other.decide(arch)
    assert json.loads(json.dumps(other.arch())) == arch
    assert {name: other.hard_cost(name) for name in COSTS} == {name: network.hard_cost(name) for name in COSTS}


def check_whole(drawn: Drawn, network: SearchedNetwork, rng: random.Random) -> None:
    """Before anything is cut, the network computes what the given one does, whatever is chosen."""
    choices = {label: rng.randrange(len(d.options)) for label, d in network.choices.items()}
    with pinned(drawn.model, choices), pinned(network, choices):
        try:
            expected = drawn.model(*copy.deepcopy(drawn.inputs))
        except RuntimeError:
            return  # the plain network of a narrower candidate: what follows is too wide for it
        same(expected, network(*copy.deepcopy(drawn.inputs)), 1e-9)


def check_expected_costs(drawn: Drawn, network: SearchedNetwork, rng: random.Random, most: int) -> bool:
    """Sum over all architectures of their probability times what is counted in them; False where there are too many."""
    if math.prod(len(d.options) for d in network.choices.values()) > most:
        return False
    scatter(network, rng)
    with torch.no_grad():
        for decision in network.choices.values():
            decision.alpha.copy_(torch.tensor([rng.gauss(0, 1) for _ in decision.options]))
    set_sampler(network.choices, Softmax(0.7))
    p = {label: (d.alpha.detach() / 0.7).softmax(0).tolist() for label, d in network.choices.items()}
    total = dict.fromkeys(COSTS, 0.0)
    for choices in every(network):
        small = network.rebuilt(arch_of(network, choices), None)
        of_arch = counted(small.eval(), drawn.inputs)
        likely = math.prod(p[label][k] for label, k in choices.items())
        total = {name: total[name] + likely * of_arch[name] for name in COSTS}
    got = network.costs()
    assert {name: got[name].item() for name in COSTS} == pytest.approx(total, rel=1e-7)
    low_high = network.reachable_costs()
    assert all(low_high[name][0] <= total[name] * (1 + 1e-9) for name in COSTS)
    return True


# ---- training steps ------------------------------------------------------------------------------------------------


@final
class InForward(Sampler):
    """The gates of another sampler, but every option of it runs in the forward pass, with autograd."""

    def __init__(self, inner: Sampler) -> None:
        self.inner = inner

    def draw(self, alpha: Tensor, generator: torch.Generator | None) -> Any:
        return self.inner.draw(alpha, generator)

    def gate(self, alpha: Tensor, drawn: Any) -> Gate:
        gate = self.inner.gate(alpha, drawn)
        return gate._replace(graph=gate.run)

    def probabilities(self, alpha: Tensor, drawn: Any) -> Tensor:
        return self.inner.probabilities(alpha, drawn)


def gradients(
    network: SearchedNetwork, call: Callable[[], Any], state: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor | None], set[str]]:
    """Loss, gradients, and the modules that ran with autograd; afterwards all buffers are as before."""
    ran: set[str] = set()

    def note(path: str, *_: Any) -> None:
        if torch.is_grad_enabled():
            ran.add(path)

    hooks = [
        module.register_forward_pre_hook(lambda *_, path=path: note(path))
        for path, module in network.network.named_modules(remove_duplicate=False)
    ]
    network.zero_grad(set_to_none=True)
    with NoDropout(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = [t for t in tensors_of(call()) if t.is_floating_point()]
        loss = torch.stack([(t * torch.randn(t.shape).to(t)).sum() for t in outputs]).sum()
        loss.backward()
    for hook in hooks:
        hook.remove()
    found = {name: p.grad for name, p in network.named_parameters()}
    network.load_state_dict(state)
    return loss.detach(), found, ran


def under_masks(network: SearchedNetwork, inputs: Sequence[Tensor]) -> Any:
    """All weights of the network times their masks by plain operators, wherever they are, for the whole forward."""
    flat, places = network.masks().hard, network.masks.places(shapes_of(network.network))
    weights = {**dict(network.network.named_parameters()), **dict(network.network.named_buffers())}
    masked: dict[int, Tensor] = {}
    for dimension in network.space.columns():
        weight = weights[dimension.name]
        shape = [-1 if d == dimension.dim else 1 for d in range(weight.dim())]
        masked[id(weight)] = masked.get(id(weight), weight) * flat[places[dimension]].to(weight).view(shape)
    held = [(m, leaf, p) for m in network.network.modules() for leaf, p in m._parameters.items() if id(p) in masked]
    for module, leaf, parameter in held:
        module._parameters[leaf] = masked[id(parameter)]  # type: ignore[assignment]
    try:
        return network.network(*inputs)
    finally:
        for module, leaf, parameter in held:
            module._parameters[leaf] = parameter


def check_training(drawn: Drawn, network: SearchedNetwork, sampler: Sampler, rng: random.Random) -> None:
    """The gradients are those of the plain network whose weights are multiplied by masks, all in one forward."""
    scatter(network, rng)
    network.train()
    held = [m for m in network.network.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    for norm in held:  # what runs in the backward pass would see other statistics, and move them
        norm.eval()
    state = copy.deepcopy(network.state_dict())
    inputs = copy.deepcopy(drawn.inputs)
    set_sampler(network.choices, sampler)
    draw(network.choices, torch.Generator().manual_seed(rng.randrange(1000)))
    held_draws = {label: d.drawn for label, d in network.choices.items()}
    loss, got, ran = gradients(network, lambda: network(*inputs), state)
    for label, decision in network.choices.items():
        for member in decision.members:
            member.sampler, member.drawn = InForward(sampler), held_draws[label]
    expected_loss, expected, _ = gradients(network, lambda: under_masks(network, inputs), state)
    assert torch.allclose(loss, expected_loss, rtol=1e-9, atol=1e-9)
    names = dict(network.named_parameters())
    for name, gradient in got.items():
        reference = expected[name]
        zero = torch.zeros_like(names[name])
        left, right = (zero if g is None else g for g in (gradient, reference))
        scale = max(1.0, float(right.abs().max())) if right.numel() else 1.0
        assert torch.allclose(left, right, rtol=1e-7, atol=1e-7 * scale), (name, sampler, left, right)
    untouched(network, got, ran)


def untouched(network: SearchedNetwork, got: dict[str, Tensor | None], ran: set[str]) -> None:
    """What did not run with autograd has no gradient."""
    owners: dict[int, list[str]] = {}
    for path, module in network.network.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(path)
    alphas = {id(d.alpha) for d in network.choices.values()}
    for name, parameter in network.network.named_parameters():
        if id(parameter) not in alphas and not any(path in ran for path in owners[id(parameter)]):
            assert got[f"network.{name}"] is None, name


# ---- tests ---------------------------------------------------------------------------------------------------------

SAMPLERS: tuple[Sampler, ...] = (
    BinaryGates(1),
    BinaryGates(2),
    BinaryGates("all"),
    GumbelSoftmax(hard=True),
    GumbelSoftmax(),
    Softmax(),
    Softmax(hard=True),
)


def check(seed: int, rounds: int = 1, most: int = MOST_ARCHS) -> str:
    """Everything about one network; the reason why it was refused, or ''."""
    rng, drawn = random.Random(seed), random_network(seed)
    kind: type[SearchedNetwork] = SuperNet if seed % 4 == 0 else PIT
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network = converted(drawn, kind)
        except UnsupportedModelError as error:
            return str(error)
        check_whole(drawn, network, rng)
        check_exports(drawn, network, rng, rounds)
        check_expected_costs(drawn, network, rng, most)
        for sampler in rng.sample(SAMPLERS, min(len(SAMPLERS), 2 * rounds)):
            check_training(drawn, network, sampler, rng)
    return ""


def test_random_networks_with_choices() -> None:
    """Three of four at least are searched; in the others candidates of different widths meet what cannot lose them."""
    refused = []
    for seed in range(SEEDS):
        reason = check(seed)
        if reason:
            assert any(text in reason for text in REFUSED), reason
            refused.append(seed)
    assert len(refused) <= (1 - SEARCHABLE) * SEEDS
