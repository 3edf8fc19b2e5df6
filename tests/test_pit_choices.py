"""Masks and choices in one network: expected costs, gradients, exports, and what is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from oneshot import (
    PIT,
    BinaryGates,
    GumbelSoftmax,
    InputChoice,
    LayerChoice,
    MaskedConv2d,
    OnePath,
    Repeat,
    Softmax,
    UniformPath,
    count_macs,
    draw,
    fixed,
    set_sampler,
)
from oneshot.errors import ArchMismatchError, ConfigurationError, UnsupportedModelError
from oneshot.export import write_arch
from oneshot.graph import evaluated
from oneshot.mutables import ChannelMask
from oneshot.mutables.samplers import Sampler
from oneshot.pit import SuperNet
from oneshot.pit.network import SearchedNetwork

SearchedType = type[PIT] | type[SuperNet]


def block(c_in: int, c_out: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())


class Mixed(nn.Module):
    """Different widths at one place, a nested choice, one label twice, depths and inputs to choose: 3*2*2*2*3 = 72."""

    def __init__(self, widths: tuple[int, int, int] = (4, 10, 8)) -> None:
        super().__init__()
        wide = max(widths)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        candidates = [
            block(6, widths[0], 3),
            block(6, widths[1], 5),
            nn.Sequential(block(6, 4, 1), block(4, widths[2], 3)),
        ]
        self.first = LayerChoice(dict(zip(("k3", "k5", "two"), candidates, strict=True)), label="first")
        inner = LayerChoice([nn.Conv2d(6, 6, 3, padding=1), nn.Identity()], label="twice")
        self.second = LayerChoice([nn.Conv2d(wide, 6, 3, padding=1), nn.Sequential(nn.Conv2d(wide, 6, 1), inner)])
        self.third = LayerChoice([nn.Conv2d(6, 6, 3, padding=1), nn.Identity()], label="twice")
        self.deep = Repeat(lambda i: block(6, 6, 3), depth=(0, 1), label="depth")
        self.inputs = InputChoice(n_candidates=3, n_chosen=2, label="inputs")
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(torch.relu(self.stem(x))))
        y = self.third(x)
        return self.head(self.inputs([x, y, self.deep(y)]).mean((2, 3)))


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def searched(kind: SearchedType, seed: int = 0, **changes: Any) -> SearchedNetwork:
    torch.manual_seed(seed)
    return kind(Mixed(**changes).double(), (3, 6, 6), cost=["params", "macs", "params_no_bias", "weight_bytes"])


def at_random(network: SearchedNetwork, seed: int) -> None:
    """Random logits, and masks that have lost something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for decision in network.choices.values():
            decision.alpha.copy_(torch.randn(decision.alpha.shape, generator=generator))
        for label, mask in network.masks.items():
            if mask.alpha.requires_grad and isinstance(mask, ChannelMask):
                count = int(torch.randint(1, len(mask.alpha) + 1, (), generator=generator))
                network.masks[label].keep(sorted(torch.randperm(len(mask.alpha), generator=generator)[:count].tolist()))
            elif mask.alpha.requires_grad:
                mask.alpha.copy_(torch.rand(mask.alpha.shape, generator=generator, dtype=mask.alpha.dtype))


def architectures(network: SearchedNetwork) -> list[tuple[float, dict[str, Any]]]:
    """Every architecture of the choices with its probability under softmax, with the masks as they are."""
    now, found = network.arch(), []
    probabilities = {label: d.alpha.detach().softmax(0).tolist() for label, d in network.choices.items()}
    for indices in itertools.product(*(range(len(d.options)) for d in network.choices.values())):
        p, arch = 1.0, dict(now)
        for (label, decision), index in zip(network.choices.items(), indices, strict=True):
            p *= probabilities[label][index]
            option = decision.options[index]
            arch[label] = list(option) if isinstance(option, tuple) else option
        found.append((p, arch))
    return found


@pytest.mark.parametrize(("kind", "widths"), [(PIT, (4, 10, 8)), (SuperNet, (4, 10, 8)), (PIT, (8, 8, 8))])
def test_expected_and_hard_costs_are_those_of_the_rebuilt_networks(
    kind: SearchedType, widths: tuple[int, int, int], image: Tensor
) -> None:
    network = searched(kind, widths=widths)
    at_random(network, 1)
    network.train_net_only()
    total = dict.fromkeys(("params", "macs"), 0.0)
    for i, (p, arch) in enumerate(architectures(network)):
        small = network.rebuilt(arch, [[image]] if i % 20 == 0 else None)
        counted = {
            "params": float(sum(t.numel() for t in small.parameters())),
            "macs": count_macs(small, (image,)).of({}),
        }
        total = {name: total[name] + p * counted[name] for name in total}
        if i % 20 == 0:
            pinned = network._copy()
            pinned.decide(arch)
            assert {name: pinned.hard_cost(name) for name in total} == counted
            assert pinned.arch() == arch
    for name in total:
        assert network.get_cost(name).item() == pytest.approx(total[name], rel=1e-12)


def test_ten_thousand_architectures_by_a_formula() -> None:
    """Four layers of ten widths each: cost of a path = sum of (c_in + 1) * c_out, with masks that keep every second."""
    widths = list(range(2, 22, 2))
    torch.manual_seed(0)
    pools = [{f"w{w}": nn.Sequential(nn.Linear(4, w), nn.Linear(w, 4)) for w in widths} for _ in range(4)]
    layers = [LayerChoice(pool) for pool in pools]
    network = PIT(nn.Sequential(*layers).double(), (4,), exclude="*.1")
    for _, mask in network.masks.items():
        mask.keep(list(range(0, len(mask.alpha), 2)))
    with torch.no_grad():
        for decision in network.choices.values():
            decision.alpha.copy_(torch.randn(10, dtype=torch.float64))
    p = [d.alpha.softmax(0).tolist() for d in network.choices.values()]
    one = [5 * (w // 2 + w % 2) + (w // 2 + w % 2 + 1) * 4 for w in widths]
    total = 0.0
    for a, b, c, d in itertools.product(range(10), repeat=4):
        total += p[0][a] * p[1][b] * p[2][c] * p[3][d] * (one[a] + one[b] + one[c] + one[d])
    assert network.cost.item() == pytest.approx(total, rel=1e-10)


@pytest.mark.parametrize("kind", [PIT, SuperNet])
def test_gradients_of_costs_by_finite_differences(kind: SearchedType) -> None:
    network = searched(kind).double()
    at_random(network, 2)
    with torch.no_grad():  # away from the kinks of |alpha| and of what has to stay
        for _, mask in network.masks.items():
            if mask.alpha.requires_grad:
                mask.alpha.copy_(0.1 + 0.8 * torch.rand(mask.alpha.shape, dtype=torch.float64))
    for name in network.cost_names:
        parameters = [parameter for parameter in network.nas_parameters() if parameter.requires_grad]
        of_cost = torch.autograd.grad(network.get_cost(name), parameters, allow_unused=True)
        alphas = {id(d.alpha) for d in network.choices.values()}
        for parameter, gradient in zip(parameters, of_cost, strict=True):
            # Of choices at the masks as they are; of masks that of the relaxed sizes.
            value: Callable[[str], Tensor] = network.get_cost if id(parameter) in alphas else network.soft_cost
            for i in range(min(3, len(parameter))):
                with torch.no_grad():
                    before = parameter[i].clone()
                    parameter[i] = before + 1e-6
                    above = value(name).item()
                    parameter[i] = before - 1e-6
                    below = value(name).item()
                    parameter[i] = before
                got = 0.0 if gradient is None else gradient[i].item()
                kept_by_force = id(parameter) not in alphas and (above - below) == 0
                if not kept_by_force:
                    assert got == pytest.approx((above - below) / 2e-6, rel=1e-5, abs=1e-4)


def outputs_of_options(network: SearchedNetwork, label: str, x: Tensor, others: dict[str, int]) -> list[Tensor]:
    """What the network returns for each option of one choice, with the others pinned."""
    found = []
    for index in range(len(network.choices[label].options)):
        with evaluated(network):
            for other, decision in network.choices.items():
                decision.set_sampler(OnePath(index if other == label else others[other]))
            found.append(network(x))
    return found


@pytest.mark.parametrize("sampler", [BinaryGates("all"), GumbelSoftmax(hard=True), Softmax(hard=True)])
def test_gradients_of_gates_see_the_masks_of_candidates_that_only_run_backward(sampler: Sampler, image: Tensor) -> None:
    """Behind a choice that linear layers follow, <dL/dy, o_k> is what option k makes the network give, summed up.

    dL/dalpha_i = p_i (c_i - sum_j p_j c_j) with c_k = sum of the outputs for option k, up to a constant.
    """
    torch.manual_seed(0)
    pool = LayerChoice({"a": block(6, 6, 3), "b": nn.Conv2d(6, 6, 1), "c": nn.Identity()}, label="pool")
    network = PIT(nn.Sequential(nn.Conv2d(3, 6, 1), pool, nn.Flatten(), nn.Linear(216, 4)).double(), (3, 6, 6))
    at_random(network, 4)
    assert any(len(kept) < 6 for label, kept in network.arch().items() if isinstance(kept, list))
    c = torch.stack([output.sum() for output in outputs_of_options(network, "pool", image, {"pool": 0})])
    set_sampler(network.choices, sampler)
    draw(network.choices, torch.Generator().manual_seed(3))
    network.eval()
    network(image).sum().backward()
    decision = network.choices["pool"]
    p = decision.probabilities().detach()
    assert torch.allclose(decision.alpha.grad, p * (c - (p * c).sum()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sampler", [Softmax(), GumbelSoftmax()])
def test_gradients_of_masks_under_a_mixture_by_hand(sampler: Sampler, image: Tensor) -> None:
    torch.manual_seed(0)
    pool = LayerChoice([nn.Conv2d(4, 4, 3, padding=1), nn.Identity()], label="pool")
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), pool, nn.Flatten(), nn.Linear(144, 2)).double()
    network = PIT(plain, (3, 6, 6), train_rf=False).double()
    assert next(iter(network.masks)) == "0"  # one mask of the channels that the choice reads and returns
    network.masks["0"].keep([0, 2, 3])
    set_sampler(network.choices, sampler)
    draw(network.choices, torch.Generator().manual_seed(0))
    network.eval()
    network(image).square().sum().backward()
    m = torch.tensor([1.0, 0, 1, 1], dtype=torch.float64, requires_grad=True)
    w = network.choices["pool"].probabilities().detach()
    first, conv, head = plain[0], plain[1][0], plain[3]
    x = F.conv2d(image, first.weight, first.bias)
    y = w[0] * F.conv2d(x, conv.weight * m.view(1, 4, 1, 1), conv.bias, padding=1) + w[1] * x
    z = F.linear(y.flatten(1), head.weight * m.repeat_interleave(36), head.bias)
    z.square().sum().backward()
    assert torch.allclose(network.masks["0"].alpha.grad, m.grad, rtol=1e-10)


@pytest.mark.parametrize("sampler", [BinaryGates(1), BinaryGates(2), UniformPath(), GumbelSoftmax(hard=True)])
def test_candidates_that_do_not_run_are_not_touched(sampler: Sampler, image: Tensor) -> None:
    network = searched(PIT)
    network.train()
    set_sampler(network.choices, sampler)
    for seed in range(4):
        draw(network.choices, torch.Generator().manual_seed(seed))
        network.zero_grad(set_to_none=True)
        statistics = {name: tensor.clone() for name, tensor in network.network.named_buffers() if "running" in name}
        network(image).sum().backward()
        taken = {label: d.members[0].gate().graph[0] for label, d in network.choices.items()}
        names = network.choices["first"].options
        chosen = names[taken["first"]]
        for name, parameter in network.network.named_parameters():
            if name.startswith("first.candidates"):
                assert (parameter.grad is not None) == (name.split(".")[2] == chosen), name
        for name, before in statistics.items():
            if name.startswith("first.candidates") and sampler in (BinaryGates(1), UniformPath()):
                now = network.network.get_buffer(name)
                assert torch.equal(before, now) == (name.split(".")[2] != chosen)
        idle = {id(alpha) for alpha in network.idle_masks()}
        for label, mask in network.masks.items():
            inside = label.split(".")[2] if label.startswith("first.candidates") else None
            if inside is not None and label.endswith("kernel_size"):
                assert (id(mask.alpha) in idle) == (inside != chosen), label
        moved = {id(m.alpha) for _, m in network.masks.items() if m.alpha.grad is not None and bool(m.alpha.grad.any())}
        assert moved
        assert not moved & idle


def test_every_option_exports_with_every_mask(image: Tensor, tmp_path: Path) -> None:
    network = searched(PIT)
    for seed in range(5):
        at_random(network, seed)
        _, arch = architectures(network)[37 * seed % 72]
        network.decide(arch)
        small = network.export()
        with evaluated(network, None), torch.no_grad():
            set_sampler(network.choices, OnePath(0))
            for label, index in network._indices().items():
                network.choices[label].set_sampler(OnePath(index))
            assert torch.allclose(network(image), small.eval()(image), rtol=1e-9, atol=1e-12)
        assert not any("oneshot" in type(m).__module__ for m in small.modules())
        path = tmp_path / "arch.json"
        write_arch(path, network, network.arch(), costs={}, created_by={})
        assert json.loads(path.read_text())["arch"]["first"] == arch["first"]
        other = searched(PIT, seed=0)
        rebuilt = fixed(other, path)
        assert [tuple(p.shape) for p in rebuilt.parameters()] == [tuple(p.shape) for p in small.parameters()]


@pytest.mark.parametrize(
    ("follow", "text"),
    [
        (lambda: [nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)], "meets 1.weight"),
        (lambda: [nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1)], "meets 1.weight"),
        (lambda: [nn.Sigmoid(), nn.Conv2d(6, 4, 1)], "computes something else"),
        (lambda: [nn.AdaptiveAvgPool2d(1)], "cannot be cut"),
        (lambda: [nn.LayerNorm(6), nn.Conv2d(6, 4, 1)], "computes something else"),
    ],
)
@pytest.mark.parametrize("kind", [PIT, SuperNet])
def test_different_widths_before_what_cannot_lose_them(
    kind: SearchedType, follow: Callable[[], list[nn.Module]], text: str
) -> None:
    pool = LayerChoice([nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)], label="pool")
    with pytest.raises(UnsupportedModelError, match=f"pool: .*different widths.*{text}"):
        kind(nn.Sequential(pool, *follow()), (3, 6, 6))


def test_different_widths_before_what_can() -> None:
    """relu and pooling keep zeros. The narrow candidate fills 4 of 6 channels of 9 pixels: 36 of 54 columns."""
    pool = LayerChoice([nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)], label="pool")
    plain = nn.Sequential(pool, nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(54, 4))
    network = SuperNet(plain, (3, 6, 6))
    network.decide({"pool": 0})
    assert network.hard_cost("params") == 3 * 4 + 4 + 36 * 4 + 4
    assert tuple(network.export()[4].weight.shape) == (4, 36)
    network.decide({"pool": 1})
    assert network.hard_cost("params") == 3 * 6 + 6 + 54 * 4 + 4
    with torch.no_grad():
        network.choices["pool"].alpha.zero_()
    assert network.get_cost("params").item() == (16 + 24) / 2 + 45 * 4 + 4


def test_a_mask_placed_in_a_candidate_is_searched_and_nothing_else() -> None:
    conv = MaskedConv2d(3, 8, 3, padding=1, channel_mask=ChannelMask(8))
    pool = LayerChoice([nn.Sequential(conv, nn.Conv2d(8, 3, 1)), nn.Identity()], label="pool")
    network = PIT(nn.Sequential(pool, nn.Conv2d(3, 2, 1)), (3, 6, 6), autoconvert_layers=False)
    assert list(network.arch()) == ["pool", "0.candidates.0.0"]


def test_without_conversion_a_network_of_choices_is_searched_by_its_choices_alone() -> None:
    pool = LayerChoice([nn.Conv2d(3, 3, 3, padding=1), nn.Identity()], label="pool")
    network = PIT(nn.Sequential(pool), (3, 6, 6), autoconvert_layers=False, regularizer="size")
    assert list(network.arch()) == ["pool"]
    assert network.get_regularization_loss().item() == 81 / 2


def test_errors_of_architectures(image: Tensor) -> None:
    network = searched(PIT)
    arch = network.arch()
    for wrong in ({**arch, "first": "k7"}, {**arch, "other": 1}, {k: v for k, v in arch.items() if k != "first"}):
        before = network.arch()
        with pytest.raises(ArchMismatchError):
            network.decide(wrong)
        with pytest.raises(ArchMismatchError):
            fixed(network, wrong)
        assert network.arch() == before


def test_a_choice_that_has_the_label_of_a_mask() -> None:
    pool = LayerChoice([nn.Conv2d(4, 4, 1), nn.Identity()], label="0")
    with pytest.raises(ArchMismatchError, match="name a choice and"):
        PIT(nn.Sequential(nn.Conv2d(3, 4, 1), pool, nn.Conv2d(4, 2, 1)), (3, 6, 6))


def test_a_model_built_under_an_architecture_is_refused() -> None:
    from oneshot import fixed_arch

    with fixed_arch({"pool": 0}):
        model = nn.Sequential(LayerChoice([nn.Conv2d(3, 3, 1), nn.Identity()], label="pool"), nn.Conv2d(3, 2, 1))
    with pytest.raises(ConfigurationError, match="decided under fixed_arch"):
        PIT(model, (3, 6, 6))


def test_parameters_are_split_completely() -> None:
    """C48: masks and selections in one set, disjoint from the weights, and nothing missing."""
    network = searched(PIT)
    nas, net = dict(network.named_nas_parameters()), dict(network.named_net_parameters())
    assert not set(nas) & set(net)
    assert {id(p) for p in (*nas.values(), *net.values())} == {id(p) for p in network.parameters()}
    assert {id(d.alpha) for d in network.choices.values()} < {id(p) for p in nas.values()}
    assert {id(m.alpha) for _, m in network.masks.items()} < {id(p) for p in nas.values()}
    every = dict(network.named_parameters())
    assert all(every[name] is p for name, p in (*nas.items(), *net.items()))


def test_copies_are_independent(image: Tensor) -> None:
    network = searched(PIT)
    other = network._copy()
    at_random(other, 3)
    before = [p.clone() for p in network.parameters()]
    other.train()
    set_sampler(other.choices, BinaryGates("all"))
    draw(other.choices, torch.Generator().manual_seed(0))
    other(image).sum().backward()
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert all(id(a) != id(b) for a in network.weight_masks.of_module for b in other.weight_masks.of_module)


def test_one_choice_in_the_trunk_and_inside_a_candidate(image: Tensor) -> None:
    """The masks of the shared choice hold in both of its calls, whatever was called between them."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))
            self.shared = LayerChoice([inner, nn.Conv2d(4, 4, 1)], label="shared")
            self.stem = nn.Conv2d(3, 4, 1)
            self.outer = LayerChoice([nn.Sequential(self.shared, nn.ReLU()), nn.Identity()], label="outer")

        def forward(self, x: Tensor) -> Tensor:
            x = self.shared(torch.relu(self.stem(x)))
            return self.shared(self.outer(x)).mean((2, 3))

    torch.manual_seed(0)
    network = PIT(Net().double(), (3, 6, 6))
    network.masks["shared.candidates.0.0"].keep([1, 4])
    network.train()(image).sum().backward()
    alpha = network.masks["shared.candidates.0.0"].alpha
    assert alpha.grad is not None
    assert alpha.grad.count_nonzero() >= 4  # ReLU leaves some channel dead
    for outer in (0, 1):
        network.decide({**network.arch(), "outer": outer, "shared": 0})
        small = network.export().eval()  # compared on the way
        assert small(image).shape == (2, 4)


def test_one_module_in_the_trunk_and_as_a_candidate(image: Tensor) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.block = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1))
            nested = LayerChoice([self.block, nn.Identity()], label="inner")
            self.outer = LayerChoice([self.block, nested, nn.Sequential(self.block, nn.ReLU())], label="outer")

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(self.block(self.stem(x))).mean((2, 3))

    torch.manual_seed(0)
    network = PIT(Net().double(), (3, 6, 6), cost="params")
    network.masks["block.0"].keep([0, 5])
    for sampler in (Softmax(), BinaryGates("all"), GumbelSoftmax(hard=True)):
        set_sampler(network.choices, sampler)
        draw(network.choices, torch.Generator().manual_seed(0))
        network.zero_grad(set_to_none=True)
        network.train()(image).sum().backward()
        assert all(p.grad_fn is None for p in network.network.block.parameters())  # put back
    set_sampler(network.choices, Softmax())
    for outer, inner in itertools.product(range(3), range(2)):
        network.decide({**network.arch(), "outer": outer, "inner": inner})
        assert sum(p.numel() for p in network.export().parameters()) == network.hard_cost("params")


def test_widths_one_apart() -> None:
    pool = LayerChoice([nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1)], label="pool")
    for kind in (PIT, SuperNet):
        network = kind(nn.Sequential(pool, nn.ReLU(), nn.Conv2d(5, 2, 1)), (3, 6, 6))
        network.decide({**network.arch(), "pool": 0})
        assert network.hard_cost("params") == 16 + 8 + 2
        assert tuple(network.export()[2].weight.shape) == (2, 4, 1, 1)
        network.decide({**network.arch(), "pool": 1})
        assert network.hard_cost("params") == 20 + 10 + 2


def test_what_an_exception_in_a_candidate_leaves(image: Tensor) -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fails = nn.Conv2d(4, 4, 3, padding=1), False

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            if self.fails:
                raise ValueError("on purpose")
            return y

    torch.manual_seed(0)
    pool = LayerChoice([Fails(), nn.Identity()], label="pool")
    network = PIT(nn.Sequential(nn.Conv2d(3, 4, 1), pool, nn.Conv2d(4, 2, 1)).double(), (3, 6, 6))
    before = dict(network.named_parameters())
    network.network[1][0].fails = True
    with pytest.raises(ValueError, match="on purpose"):
        network(image)
    assert all(p is before[name] for name, p in network.named_parameters())
    assert not network.weight_masks.in_place
    network.network[1][0].fails = False
    network(image).sum().backward()


def test_numbers_of_choices_are_not_sizes() -> None:
    """A mask that makes 2 of something 1 leaves option 2 of a choice and depth 2 of a Repeat."""
    pool = LayerChoice([nn.Conv2d(2, 2, 1), nn.Identity(), nn.Conv2d(2, 2, 3, padding=1, groups=2)], label="pool")
    deep = Repeat([nn.Conv2d(2, 2, 1, groups=2) for _ in range(3)], depth=(0, 3), label="depth")
    network = PIT(nn.Sequential(nn.Conv2d(3, 2, 1), pool, deep, nn.Conv2d(2, 4, 1)), (3, 6, 6))
    network.masks["0"].keep([1])
    for option, depth in itertools.product(range(3), range(4)):
        small = fixed(network, {**network.arch(), "pool": option, "depth": depth})
        assert isinstance(small[1], nn.Identity) == (option == 1)
        assert len(small[2]) == depth


def test_a_label_that_a_dilation_has() -> None:
    pool = LayerChoice([nn.Identity(), nn.ReLU()], label="0.dilation")
    with pytest.raises(ArchMismatchError, match=r"\['0.dilation'\] name a choice and"):
        PIT(nn.Sequential(nn.Conv1d(3, 6, 5, padding=2), pool, nn.Conv1d(6, 2, 1)), (3, 8))


def test_the_summary_of_a_narrow_candidate() -> None:
    pool = LayerChoice([nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1)], label="pool")
    network = PIT(nn.Sequential(pool, nn.Conv2d(8, 2, 1)), (3, 6, 6))
    network.decide({**network.arch(), "pool": 0})
    assert network.summary()["1"]["in_channels"] == 4
    network.decide({**network.arch(), "pool": 1})
    assert network.summary()["1"]["in_channels"] == 8


@pytest.mark.parametrize(("narrow", "wide"), [(1, 3), (8, 9), (1, 2)])
def test_narrow_widths(narrow: int, wide: int) -> None:
    pool = LayerChoice([nn.Conv2d(3, narrow, 1), nn.Conv2d(3, wide, 1)], label="pool")
    network = SuperNet(nn.Sequential(pool, nn.Conv2d(wide, 2, 1)), (3, 6, 6))
    network.decide({"pool": 0})
    assert network.hard_cost("params") == 4 * narrow + 2 * narrow + 2
    assert network.export()[1].in_channels == narrow


def test_a_narrow_identity_of_the_input() -> None:
    """What the convolution adds to the three channels of the image goes with it: 12 + 4 of weights, 8 of the reader."""
    pool = LayerChoice([nn.Identity(), nn.Conv2d(3, 8, 1)], label="pool")
    network = SuperNet(nn.Sequential(pool, nn.Conv2d(8, 2, 1)), (3, 6, 6))
    for option, width in ((0, 3), (1, 8)):
        network.decide({"pool": option})
        assert network.hard_cost("params") == 2 * width + 2 + option * 32
        assert network.export()[1].in_channels == width


def test_units_that_are_dead_for_one_input() -> None:
    for n in range(3, 13):
        pool = LayerChoice([nn.Sequential(nn.Linear(n, w), nn.ReLU()) for w in (8, 10)], label="pool")
        SuperNet(nn.Sequential(pool, nn.Linear(10, 2)), (n,))
        assert list(PIT(nn.Sequential(nn.Linear(n, 2), nn.ReLU(), nn.Linear(2, 8)), (n,)).masks) == ["0"]


def test_checkpointing_that_asks_for_a_gradient_first() -> None:
    class Frugal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.conv, x, use_reentrant=False) if x.requires_grad else self.conv(x)

    pool = LayerChoice([Frugal(), nn.Identity()], label="pool")
    with pytest.raises(UnsupportedModelError, match="activation checkpointing"):
        PIT(nn.Sequential(nn.Conv2d(3, 4, 1), pool, nn.Conv2d(4, 2, 1)), (3, 6, 6))


@pytest.mark.parametrize("sampler", [Softmax(), GumbelSoftmax(), UniformPath()])
def test_a_compiled_supernet_is_one_graph(sampler: Sampler) -> None:
    torch.manual_seed(0)
    pool = LayerChoice([nn.Conv2d(4, 4, 3, padding=1), nn.Identity()], label="pool")
    network = SuperNet(nn.Sequential(nn.Conv2d(3, 4, 1), pool, nn.Flatten(), nn.Linear(144, 2)), (3, 6, 6))
    set_sampler(network.choices, sampler)
    draw(network.choices, torch.Generator().manual_seed(0))
    x = torch.rand(2, 3, 6, 6)
    expected = network(x)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), expected, atol=1e-5)


def test_numbers_in_the_code_around_choices() -> None:
    """Such a network becomes a graph, in which they change with the masks; choices stay modules in it."""

    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.q, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(144, 4)
            self.pool = LayerChoice([nn.Conv2d(8, 8, 3, padding=1), nn.Identity()], label="pool")

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(x))
            y, z = self.pool(x[:, :8]), self.q(x[:, 8:])
            return self.head(torch.cat([y, z], 1).view(-1, 144))

    torch.manual_seed(0)
    network = PIT(Sliced().double(), (3, 3, 3), cost="params")
    assert network.space.as_graph
    halved = {label: kept[::2] if isinstance(kept, list) else kept for label, kept in network.arch().items()}
    # a: 8 channels of 27 + 1; q: 4 channels of 4 + 1; head: 4 of 72 + 1; pool: 4 channels of 36 + 1, or nothing
    for option, extra in ((0, 148), (1, 0)):
        network.decide({**halved, "pool": option})
        small = network.export()
        assert sum(p.numel() for p in small.parameters()) == network.hard_cost("params") == 224 + 20 + 292 + extra
    set_sampler(network.choices, BinaryGates(2))
    draw(network.choices, torch.Generator().manual_seed(0))
    network.train()(torch.rand(2, 3, 3, 3, dtype=torch.float64)).sum().backward()
    assert network.masks["a"].alpha.grad is not None
