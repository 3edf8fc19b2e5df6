"""Masks and choices brought within targets: against counts of exported networks, brute force and enumeration."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pit_networks import CatDepthwise, MultiPath, ToyAdd
from test_decode import BROKEN, WHOLE, Problem, architectures, meets, problems, score
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from oneshot import PIT, ChannelMask, CostSpec, LayerChoice, Repeat, SuperNet
from oneshot.cost.decode import best_under_budget, best_use
from oneshot.errors import ConfigurationError, InfeasibleTargetError
from oneshot.mutables.masks import KernelMask, kernel_scores
from oneshot.pit.mask_set import MaskSet
from oneshot.pit.network import SearchedNetwork
from oneshot.pit.selection import choose_

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")


class Residual(nn.Module):
    """Input (2, 6, 6): what is added is one mask, so that costs grow with its square."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.a, self.b = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.depthwise, self.point = nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Conv2d(8, 12, 1)
        self.norm, self.fc = nn.BatchNorm2d(12), nn.Linear(12 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.b(torch.relu(self.a(x)))
        x = torch.relu(self.norm(self.point(self.depthwise(x))))
        return self.fc(nn.functional.max_pool2d(x, 2).flatten(1))


class Temporal(nn.Module):
    """Input (3, 24): kernels of 9 and 5 taps whose sizes and dilations are searched too."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(3, 6, 9), nn.Conv1d(6, 8, 5)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.two(torch.relu(self.one(x)))).mean(2))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))


COSTS = {"params": "params", "macs": "macs"}
# name -> network, shape of an input, arguments of PIT
NETWORKS: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "mlp": (mlp, (5,), {}),
    "residual": (Residual, (2, 6, 6), {"train_rf": False}),
    "granular": (Residual, (2, 6, 6), {"train_rf": False, "granularity": 4}),
    "uneven": (ToyAdd, (3, 15), {"train_rf": False, "train_dilation": False, "granularity": 3}),
    "concatenated": (CatDepthwise, (16, 20), {"train_rf": False, "train_dilation": False}),
    "branches": (MultiPath, (3, 40), {"train_rf": False, "train_dilation": False, "granularity": 8}),
    "temporal": (Temporal, (3, 24), {}),
    "rings": (Residual, (2, 6, 6), {}),
    "kernels alone": (Temporal, (3, 24), {"train_features": False}),
    "dilations alone": (Temporal, (3, 24), {"train_features": False, "train_rf": False}),
}
_MADE: dict[str, PIT] = {}


def network(name: str) -> PIT:
    if name not in _MADE:
        model, shape, arguments = NETWORKS[name]
        torch.manual_seed(0)
        _MADE[name] = PIT(model(), shape, cost=COSTS, **arguments)
    return copy.deepcopy(_MADE[name])


@torch.no_grad()
def scatter(pit: SearchedNetwork, seed: int, low: float = 0.0) -> None:
    """Alphas at random, all different, of either sign; some masks near the threshold, some far below it."""
    generator = torch.Generator().manual_seed(seed)
    for mask in (mask for _, mask in pit.masks.items() if mask.alpha.requires_grad):
        width = torch.rand(1, generator=generator) * (1 - low)
        values = low + torch.rand(mask.alpha.shape, generator=generator) * width
        mask.alpha.copy_(values * torch.where(torch.rand(mask.alpha.shape, generator=generator) < 0.2, -1, 1))


def state(pit: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in pit.state_dict().items()}


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def counted(pit: SearchedNetwork) -> dict[str, float]:
    """Of the exported network: numbers in its parameters, and products as torch's own counter has them."""
    small = pit.export().eval()
    with FlopCounterMode(display=False) as counter:
        small(*(tensor[:1] for tensor in pit.example))
    return {"params": sum(p.numel() for p in small.parameters()), "macs": counter.get_total_flops() // 2}


def some_targets(pit: PIT, rng: random.Random) -> dict[str, float]:
    """One or both costs, anywhere between the smallest and the largest."""
    reachable = pit.reachable_costs()
    names = rng.choice([["params"], ["macs"], ["params", "macs"]])
    return {
        name: float(int(reachable[name][0] + rng.random() ** 2 * 1.1 * (reachable[name][1] - reachable[name][0])))
        for name in names
    }


def within(pit: SearchedNetwork, targets: Mapping[str, float]) -> bool:
    hard = pit.hard_costs()
    return all(hard[name] <= target for name, target in targets.items())


def use(pit: PIT, targets: Mapping[str, float]) -> float:
    hard = pit.hard_costs()
    return max(hard[name] / target for name, target in targets.items())


def channel_masks(pit: SearchedNetwork) -> dict[str, ChannelMask]:
    return {label: mask for label, mask in pit.masks.items() if isinstance(mask, ChannelMask)}


# --- down to the targets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fills", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_random_masks_onto_random_targets(name: str, fills: bool) -> None:
    rng = random.Random(f"{name} {fills}")
    for seed in range(4):
        pit = network(name)
        scatter(pit, seed, low=0.5 if seed % 3 == 0 else 0.0)
        targets = some_targets(pit, rng)
        before, was_within = copy.deepcopy(pit), within(pit, targets)
        pit.keep_targets_(targets, fills=fills)
        found = counted(pit)
        assert {k: found[k] for k in targets} == {k: pit.hard_costs()[k] for k in targets}
        assert all(found[k] <= target for k, target in targets.items()), (targets, found)
        for (label, old), (_, new) in zip(before.masks.items(), pit.masks.items(), strict=True):
            if not old.alpha.requires_grad:
                assert torch.equal(old.alpha, new.alpha), label
        rest = {k: v for k, v in before.state_dict().items() if not k.startswith("masks.")}
        assert equal(rest, pit.state_dict())
        if was_within and not fills:
            assert equal(before.state_dict(), pit.state_dict())
        for label, mask in channel_masks(pit).items():
            kept = len(mask.decision())
            assert kept >= mask.least, label
            assert kept % mask.granularity == 0 or kept == len(mask.alpha), label
        again = state(pit)
        pit.keep_targets_(targets, fills=fills)
        assert equal(again, pit.state_dict()) or fills
        if fills:  # the alphas may be lifted once more; what is exported stays within
            assert within(pit, targets)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ("temporal", "rings")])
def test_what_is_cut_has_the_smallest_alphas_of_its_mask_and_moves_to_the_threshold(name: str) -> None:
    for seed in range(4):
        pit = network(name)
        scatter(pit, seed)
        before = {label: mask.alpha.detach().clone() for label, mask in pit.masks.items()}
        kept_before = pit.masks.decisions()
        low, high = pit.reachable_costs()["params"]
        pit.keep_targets_({"params": low + (high - low) // 8})
        for label, mask in channel_masks(pit).items():
            old, new, kept = before[label], mask.alpha.detach(), set(mask.decision())
            cut = set(kept_before[label]) - kept
            assert kept <= set(kept_before[label]), label
            for unit in range(len(old)):
                if unit in cut:
                    assert new[unit] == old[unit].abs() <= 0.5 or 0.45 < new[unit] <= 0.5, label
                else:
                    assert new[unit] == old[unit], label
            if cut:
                assert max(old[u].abs() for u in cut) <= min(old[u].abs() for u in kept), label


def test_of_all_masks_the_units_of_the_smallest_alpha() -> None:
    """Two hidden layers by hand: the smallest alpha goes first, whatever it saves; but nothing large for a little."""
    pit = PIT(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 9)), (2,))
    # 3 * 2 + 3, 3 * 2 + 2, 2 * 9 + 9 = 44. A unit of the first saves 3 + 2 = 5, one of the second 3 + 1 + 9 = 13.
    with torch.no_grad():
        pit.masks["0"].alpha.copy_(torch.tensor([0.7, 0.9, 0.8]))
        pit.masks["2"].alpha.copy_(torch.tensor([1.0, 0.6]))
    pit.keep_targets_({"params": 31.0})  # both fit 31: without the 0.6
    assert pit.arch() == {"0": [0, 1, 2], "2": [0]}
    with torch.no_grad():
        pit.masks["2"].alpha.copy_(torch.tensor([1.0, 0.6]))
    pit.keep_targets_({"params": 40.0})  # without the 0.6 it would be 31, and 9 of 40 unused
    assert pit.arch() == {"0": [1, 2], "2": [0, 1]}
    pit = PIT(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)), (2,))
    # 28; a unit of the second saves 3 + 1 + 1 = 5 as well
    with torch.no_grad():
        pit.masks["0"].alpha.copy_(torch.tensor([0.7, 0.9, 0.8]))
        pit.masks["2"].alpha.copy_(torch.tensor([1.0, 0.8]))
    assert pit.hard_cost("params") == 20
    pit.keep_targets_({"params": 19.0})
    assert pit.arch() == {"0": [1, 2], "2": [0, 1]}


def test_a_ring_goes_where_it_is_worth_least() -> None:
    """The score of the outer ring comes down to the threshold, and nothing else moves."""
    pit = PIT(nn.Sequential(nn.Conv2d(1, 2, 5, padding=2), nn.Flatten(), nn.Linear(2 * 16, 2)), (1, 4, 4), cost="macs")
    kernel = next(mask for _, mask in pit.masks.items() if isinstance(mask, KernelMask))
    with torch.no_grad():
        kernel.alpha.copy_(torch.tensor([0.55, 0.9, 1.0]))
    most = pit.hard_cost("macs")  # 2 * 25 * 16 + 64
    assert most == 864
    pit.keep_targets_({"macs": most - 1})
    assert kernel.decision() == 3
    assert 0.45 < float(kernel_scores(kernel.alpha)[0].detach()) < 0.5
    assert kernel.alpha[1:].tolist() == pytest.approx([0.9, 1.0])
    assert pit.hard_cost("macs") == 2 * 9 * 16 + 64


@pytest.mark.parametrize("name", NETWORKS)
def test_the_smallest_network_can_be_asked_for_and_less_cannot(name: str) -> None:
    least = {cost: low for cost, (low, _) in network(name).reachable_costs().items()}
    pit = network(name)
    scatter(pit, 3)
    pit.keep_targets_(least)
    assert counted(pit) == least
    for cost in least:
        pit = network(name)
        scatter(pit, 3)
        with pytest.raises(InfeasibleTargetError):
            pit.keep_targets_({**least, cost: least[cost] - 1})


def test_costs_and_targets_beyond_single_precision() -> None:
    """3e7 + n of a spec: one more than the target is a violation, though it is 3e-8 of it."""
    spec = CostSpec("steps", "step").with_rule(nn.Linear, lambda layer: 10**7 + layer.out_channels)
    pit = PIT(mlp(), (5,), cost=spec)
    assert pit.hard_cost("steps") == 3 * 10**7 + 12 + 16 + 3
    for target in (30_000_030.0, 30_000_029.0, 30_000_005.0):
        pit.keep_targets_({"steps": target})
        assert pit.hard_cost("steps") <= target
    with pytest.raises(InfeasibleTargetError):
        pit.keep_targets_({"steps": 30_000_004.0})


@pytest.mark.parametrize("shift", [-1, 0])
def test_a_target_of_nothing(shift: int) -> None:
    """What costs nothing is within 0; what costs something is not."""
    spec = CostSpec("steps", "step").with_rule(nn.Linear, lambda layer: 2 * (layer.out_channels + shift))
    pit = PIT(
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)), (4,), cost={"steps": spec, "params": "params"}
    )
    scatter(pit, 1, low=0.5)
    if shift == 0:
        with pytest.raises(InfeasibleTargetError):
            pit.keep_targets_({"steps": 0.0})
        return
    pit.keep_targets_({"steps": 0.0, "params": 100.0})
    assert pit.hard_costs() == {"steps": 0.0, "params": 7.0}  # one unit of 4 + 1, and its reader with 1 + 1


def test_targets_of_unknown_costs() -> None:
    with pytest.raises(ConfigurationError, match="latency"):
        network("mlp").keep_targets_({"latency": 1.0})


def test_masks_that_do_not_learn_stay_and_the_others_pay() -> None:
    pit = network("mlp")
    scatter(pit, 2, low=0.5)
    pit.masks["0"].alpha.requires_grad_(False)
    before = pit.masks["0"].alpha.detach().clone()
    target = 12 * 6 + 12 + 1 + 3 + 3  # one unit of the second layer
    pit.keep_targets_({"params": float(target)})
    assert torch.equal(before, pit.masks["0"].alpha)
    assert pit.hard_cost("params") == target
    with pytest.raises(InfeasibleTargetError):
        pit.keep_targets_({"params": target - 1.0})


# --- filling --------------------------------------------------------------------------------------------------------


def one_more(pit: SearchedNetwork) -> list[SearchedNetwork]:
    """Each network with one further multiple of units in one mask: the largest of those that are off."""
    found = []
    for label, mask in channel_masks(pit).items():
        if not mask.alpha.requires_grad:
            continue
        kept, n = mask.decision(), len(mask.alpha)
        goal = min((len(kept) // mask.granularity + 1) * mask.granularity, n)
        off = sorted(set(range(n)) - set(kept), key=lambda unit: -mask.alpha[unit].abs().item())
        if off:
            more = copy.deepcopy(pit)
            more.masks[label].keep(sorted(kept + off[: goal - len(kept)]))
            found.append(more)
    return found


@pytest.mark.parametrize("name", [name for name in NETWORKS if "alone" not in name])
def test_filled_until_nothing_more_fits_or_nearly_all_is_used(name: str) -> None:
    rng = random.Random(f"fill {name}")
    for seed in range(5):
        pit = network(name)
        scatter(pit, seed)
        targets = some_targets(pit, rng)
        pit.keep_targets_(targets, fills=True)
        assert within(pit, targets)
        if use(pit, targets) < 0.95:
            assert not [more for more in one_more(pit) if within(more, targets)], (seed, targets)


def test_filling_leaves_what_is_used_well_as_it_is() -> None:
    pit = network("mlp")
    scatter(pit, 5, low=0.5)
    pit.keep_targets_({"params": 200.0}, fills=True)
    before, used = state(pit), pit.hard_cost("params") / 200
    assert 0 < used <= 1
    pit.keep_targets_({"params": 200.0}, fills=True)
    assert equal(before, pit.state_dict())


def test_filling_when_a_unit_costs_more_than_its_slope_says() -> None:
    """One mask reads and writes: n^2 + 3 n, so that one more costs 2 n + 4. It must not take another's place."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.fc = nn.Linear(2, 4, False), nn.Linear(4, 4, False), nn.Linear(4, 1, False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.fc(x + self.inner(x))

    pit = PIT(Square(), (2,))
    (mask,) = channel_masks(pit).values()
    with torch.no_grad():
        mask.alpha.copy_(torch.tensor([0.1, 0.4, 0.2, 0.3]))
    assert pit.arch() == {next(iter(pit.masks)): [1]}  # 2 + 1 + 1 = 4
    before = state(pit)
    with torch.no_grad():
        pit._projection({"params": 9.0})._fill()  # two units: 4 + 4 + 2 = 10
    assert mask.decision() == [1]
    assert equal(before, pit.state_dict())


@pytest.mark.parametrize("name", NETWORKS)
def test_lifting_keeps_the_order_and_reaches_the_limit(name: str) -> None:
    rng = random.Random(f"lift {name}")
    for seed in range(5):
        pit = network(name)
        scatter(pit, seed)
        limits = some_targets(pit, rng)
        before, used = copy.deepcopy(pit), use(pit, limits)
        pit.lift_masks_(limits)
        if used >= 0.95:
            assert equal(before.state_dict(), pit.state_dict())
            continue
        moved = [
            (old.alpha.detach().abs(), new.alpha.detach())
            for (_, old), (_, new) in zip(before.masks.items(), pit.masks.items(), strict=True)
            if old.alpha.requires_grad
        ]
        rises = torch.cat([(new - old)[new < 1] for old, new in moved])
        everything = all(bool((new == 1).all()) for _, new in moved)
        assert use(pit, limits) >= 0.95 or everything
        if not everything:
            assert float(rises.max() - rises.min()) < 1e-6  # one number for all
            assert 0 < float(rises.max()) <= 1
            less = copy.deepcopy(before)
            with torch.no_grad():
                for _, mask in less.masks.items():
                    if mask.alpha.requires_grad:
                        mask.alpha.copy_((mask.alpha.abs() + float(rises.max()) - 1e-3).clamp(max=1))
            assert use(less, limits) < 0.95  # and not more than it takes
        for old, new in moved:
            order = torch.argsort(old)
            assert bool((new[order].diff() >= 0).all())


# --- choices --------------------------------------------------------------------------------------------------------


def mixed(seed: int) -> nn.Sequential:
    """Three decisions of 3, 2 and 2 options, one inside of an option of the first."""
    torch.manual_seed(seed)
    inner = nn.Sequential(LayerChoice([nn.Linear(6, 6), nn.Identity()], label="inner"), nn.Linear(6, 6))
    first = LayerChoice({"wide": inner, "one": nn.Linear(6, 6, bias=False), "skip": nn.Identity()}, label="first")
    deep = Repeat(lambda i: nn.Sequential(nn.Linear(6, 6), nn.ReLU()), depth=(1, 2), label="depth")
    return nn.Sequential(nn.Linear(4, 6), first, deep, nn.Linear(6, 2))


def put(model: SearchedNetwork, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for decision in model.choices.values():
            decision.alpha.copy_(torch.randn(len(decision.alpha), generator=generator))


def log_probability(model: SearchedNetwork, options: Mapping[str, int]) -> float:
    return sum(float(d.alpha.detach().log_softmax(0)[options[k]]) for k, d in model.choices.items())


@pytest.mark.parametrize("fills", [False, True])
def test_choices_without_masks_are_the_best_of_all(fills: bool) -> None:
    """Every architecture is exported and counted: the most probable one within the targets, and with ``fills`` of
    those that use 95 % of the most that is used by any."""
    network = SuperNet(mixed(0), (4,), cost=COSTS)
    every = [
        dict(zip(network.choices, options, strict=True))
        for options in itertools.product(*(range(len(d.options)) for d in network.choices.values()))
    ]
    assert len(every) == 12
    costs = []
    for options in every:
        pinned = copy.deepcopy(network)
        pinned.decide({k: network.choices[k].options[i] for k, i in options.items()})
        costs.append(counted(pinned))
    values = {name: sorted({cost[name] for cost in costs}) for name in COSTS}
    rng = random.Random(0)
    for seed in range(25):
        put(network, seed)
        names = rng.choice([["params"], ["macs"], ["params", "macs"]])
        targets = {name: rng.choice(values[name]) + rng.choice([0, 1]) for name in names}
        allowed = [i for i in range(12) if all(costs[i][k] <= t for k, t in targets.items())]
        if fills and allowed:
            best = max((max(costs[i][name] for i in allowed) / targets[name], name) for name in targets)
            allowed = [i for i in allowed if costs[i][best[1]] / targets[best[1]] >= 0.95 * best[0] - 1e-12]
        scores = {i: log_probability(network, every[i]) for i in allowed}
        if not allowed:
            with pytest.raises(InfeasibleTargetError):
                network.keep_targets_(targets, fills=fills)
            continue
        before = {k: d.alpha.detach().clone() for k, d in network.choices.items()}
        network.keep_targets_(targets, fills=fills)
        found = {k: int(d.alpha.argmax()) for k, d in network.choices.items()}
        assert every.index(found) in allowed
        assert scores[every.index(found)] == pytest.approx(max(scores.values()), abs=1e-8)
        for k, decision in network.choices.items():
            assert torch.equal(before[k].sort().values, decision.alpha.detach().sort().values)  # two change places
            if int(before[k].argmax()) == found[k]:
                assert torch.equal(before[k], decision.alpha)


@pytest.mark.parametrize("fills", [False, True])
def test_masks_and_choices_together(fills: bool) -> None:
    """The likeliest options stay if masks can be small enough for them, else the best that can take their place."""
    torch.manual_seed(0)
    made = PIT(mixed(0), (4,), cost=COSTS)
    reachable = made.reachable_costs()
    rng, changed = random.Random(1), 0
    for seed in range(6):
        pit = copy.deepcopy(made)
        put(pit, seed)
        scatter(pit, seed, low=0.5)
        low, high = reachable["params"]
        targets = {"params": float(int(low + rng.random() ** 3 * (high - low)))}
        before = {k: int(d.alpha.argmax()) for k, d in pit.choices.items()}
        smallest: Any = copy.deepcopy(pit)
        for mask in channel_masks(smallest).values():
            mask.keep(list(range(mask.least)))
        possible = {}
        for options in itertools.product(*(range(len(d.options)) for d in pit.choices.values())):
            choice = dict(zip(pit.choices, options, strict=True))
            arch = {k: pit.choices[k].options[i] for k, i in choice.items()}
            other = copy.deepcopy(smallest)
            other.decide({**other.arch(), **arch})
            if other.hard_cost("params") <= targets["params"]:
                possible[options] = log_probability(pit, choice)
        pit.keep_targets_(targets, fills=fills)
        found = {k: int(d.alpha.argmax()) for k, d in pit.choices.items()}
        assert counted(pit)["params"] <= targets["params"]
        assert possible[tuple(found.values())] == pytest.approx(max(possible.values()), abs=1e-8)
        changed += found != before
    assert 0 < changed < 6


def test_filling_leaves_the_masks_of_candidates_that_are_not_decided_for() -> None:
    """They cost nothing now: there is no target to use, and nothing that was found out about them to throw away."""
    torch.manual_seed(0)
    choice = LayerChoice(
        {"a": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)), "b": nn.Linear(6, 6)}, label="choice"
    )
    inner = nn.Sequential(nn.Linear(4, 6), choice, nn.Linear(6, 2))
    pit = PIT(inner, (4,), cost="params")
    with torch.no_grad():
        pit.choices["choice"].alpha.copy_(torch.tensor([0.0, 1.0]))
        for label, mask in pit.masks.items():
            mask.alpha.fill_(0.3 if label.startswith("1.") else 0.9)
            mask.alpha[:2] = 0.8
    inside = [label for label in pit.masks if label.endswith(".a.0")]  # what a.2 returns, b returns too
    assert inside
    before = {label: pit.masks[label].alpha.detach().clone() for label in inside}
    with torch.no_grad():
        pit._projection({"params": pit.hard_cost("params") * 1.5})._fill()
    for label in inside:
        assert torch.equal(before[label], pit.masks[label].alpha), label


@pytest.mark.parametrize("fills", [False, True])
def test_choices_that_do_not_learn_stay(fills: bool) -> None:
    """The skip is fixed, and the rest is used as far as it goes: not what another choice there could use."""
    torch.manual_seed(0)
    options = {"big": nn.Linear(6, 6), "skip": nn.Identity()}
    model = nn.Sequential(
        LayerChoice(options, label="still"),
        LayerChoice({"small": nn.Linear(6, 6, bias=False), "skip": nn.Identity()}, label="free"),
    )
    network = SuperNet(model, (6,), cost="params")
    with torch.no_grad():
        network.choices["still"].alpha.copy_(torch.tensor([0.0, 1.0]))
        network.choices["free"].alpha.copy_(torch.tensor([0.0, 1.0]))
    network.choices["still"].alpha.requires_grad_(False)
    network.keep_targets_({"params": 50.0}, fills=fills)  # big 42, small 36
    assert network.arch() == {"still": "skip", "free": "small" if fills else "skip"}
    network.choices["free"].alpha.requires_grad_(False)
    before = state(network)
    network.keep_targets_({"params": 50.0}, fills=fills)
    assert equal(before, network.state_dict())


# --- the most that can be used --------------------------------------------------------------------------------------


def check_use(problem: Problem) -> None:
    log_p, costs, budget = problem
    inside = [c for c in architectures(log_p) if meets(costs, budget, c)]
    most = {name: max(cost.of(c) for c in inside) for name, cost in costs.items() if budget[name] > 0}
    found = best_use(costs, budget)
    if not most:
        assert found is None
        return
    assert found is not None
    name, value = found
    assert value == pytest.approx(most[name], rel=1e-9, abs=1e-6)
    assert value / budget[name] == pytest.approx(max(m / budget[k] for k, m in most.items()), rel=1e-6, abs=1e-9)
    assert value <= budget[name]
    least = 0.95 * most[name] if most[name] > 0 else most[name]
    enough = [c for c in inside if costs[name].of(c) >= least]
    got = best_under_budget(log_p, costs, budget, least={name: least})
    assert meets(costs, budget, got)
    assert costs[name].of(got) >= least - 1e-6 * max(abs(least), 1)
    assert score(log_p, got) >= max(score(log_p, c) for c in enough) - 1e-8


@settings(max_examples=40, deadline=None)
@given(problems(WHOLE))
def test_best_use_with_whole_costs(problem: Problem) -> None:
    check_use(problem)


@settings(max_examples=25, deadline=None)
@given(problems(BROKEN))
def test_best_use_with_costs_that_are_rounded(problem: Problem) -> None:
    check_use(problem)


@settings(max_examples=25, deadline=None)
@given(problems(WHOLE), st.integers(1, 3))
def test_nothing_fits(problem: Problem, below: int) -> None:
    log_p, costs, _ = problem
    budget = {name: min(cost.of(c) for c in architectures(log_p)) - below for name, cost in costs.items()}
    assert best_use(costs, budget) is None


def test_choose_moves_nothing_where_all_is_well() -> None:
    network = SuperNet(mixed(0), (4,), cost="params")
    put(network, 0)
    before = state(network)
    most = network.reachable_costs()["params"][1]
    costs: Any = network._cost_models()
    choose_(network.choices, costs, {"params": most}, fills=False)
    assert equal(before, network.state_dict())


def test_a_network_without_masks_has_none_to_lift() -> None:
    network = SuperNet(mixed(0), (4,), cost="params")
    assert isinstance(network.masks, MaskSet)
    assert len(network.masks) == 0
    before = state(network)
    network.lift_masks_({"params": 1e9})
    assert equal(before, network.state_dict())
