"""Units and candidates that leave a network during its search: what is left is, computes, costs and learns what it did.

The reference is the network of the full size, in which what would have gone has masks, or alphas, that stay at zero.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ZOO, randomize
from pit_networks import same
from random_networks import RandomNetwork, random_networks
from test_pit_choices_random import check_training, random_network
from test_pit_choices_random import converted as with_choices
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adafactor, Adam, Optimizer

from oneshot import LayerChoice, count_params, fixed
from oneshot.errors import ArchMismatchError, ConfigurationError, ExportError, UnsupportedModelError
from oneshot.export import fingerprint, read_arch, write_arch
from oneshot.export.arch import arch_of, argmax_choices, choices_of
from oneshot.export.dropping import drop_candidates_, dropped_candidates, narrowing, remove_candidates_
from oneshot.graph import evaluated
from oneshot.mutables import (
    Argmax,
    BinaryGates,
    ChannelMask,
    GumbelSoftmax,
    MaskedConv2d,
    OnePath,
    Softmax,
    after_step,
    arch_parameters,
    decisions,
    draw,
    set_sampler,
    weight_parameters,
)
from oneshot.mutables.samplers import Sampler
from oneshot.pit import PIT, SuperNet
from oneshot.pit.drop import drop_
from oneshot.pit.network import SearchedNetwork
from oneshot.pit.shrink import remove_units_, removed_units, shrink_
from oneshot.pit.smaller import remove_, removed

Optimizers = Callable[[list[nn.Parameter]], Optimizer]

# Modules of the user with parameters of their own, of which a count cannot know what they do: they cost nothing.
UNCOUNTED = {
    **dict.fromkeys(["vit_fused_qkv", "vit_separate_qkv", "multihead_attention", "swiglu", "tied_autoencoder"], ("",)),
    "convnext": ("[0-9]",),
    "channel_attention_einsum": ("",),
}
# What is cut there: plain, depthwise, residual, dense and nested concatenations, channels x positions, groups, heads,
# a pointwise product, group norms, shared modules, numbers in attributes, numbers in the code (a graph).
SOME = (
    "plain_cnn", "flatten_maps", "ds_cnn", "resnet_projection", "resnext", "se_conv", "densenet", "nested_concat",
    "shufflenet_v2", "shared_block", "vit_fused_qkv", "convnext", "group_norm", "glu_chunk", "tied_autoencoder",
    "head_permute_flatten", "slice_channels",
)  # fmt: skip


@cache
def converted(name: str) -> tuple[PIT, tuple[Tensor, ...]]:
    model = randomize(ZOO[name].build(), seed=0).eval().double()
    torch.manual_seed(0)
    inputs = tuple(t.double() if t.is_floating_point() else t for t in ZOO[name].inputs())
    pit = PIT(model, example_input=inputs, cost=["params", "macs"], ignore=UNCOUNTED.get(name, ()))
    return pit.double(), inputs  # alphas too


def of_zoo(name: str) -> tuple[PIT, tuple[Tensor, ...]]:
    """A copy of its own for each test."""
    pit, inputs = converted(name)
    return copy.deepcopy(pit), inputs


@torch.no_grad()
def scattered(network: SearchedNetwork, seed: int) -> None:
    """Every alpha of a mask from 0.1 to 1.1, of which 4 in 10 are off; every alpha of a choice anywhere."""
    generator = torch.Generator().manual_seed(seed)
    for _, mask in network.masks.items():
        if mask.alpha.requires_grad:
            mask.alpha.copy_(torch.rand(mask.alpha.shape, generator=generator) + 0.1)
    for decision in network.choices.values():
        decision.alpha.copy_(2.5 * torch.randn(decision.alpha.shape, generator=generator))


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def state_of(network: nn.Module) -> list[Any]:
    """Tensors, numbers and identities of all that a search holds."""
    tensors = [*network.named_parameters(), *network.named_buffers()]
    kept = [(name, id(t), t.tolist(), None if t.grad is None else t.grad.tolist()) for name, t in tensors]
    numbers = [
        (path, {k: v for k, v in vars(m).items() if type(v) in (int, tuple) and k[0] != "_"})
        for path, m in network.named_modules()
    ]
    return [kept, str(numbers)]


# ---- units: what is left computes and costs the same ---------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_two_shrinks_change_nothing_but_sizes(name: str) -> None:
    """Outputs, costs, architecture, export and what is offered, each time; parameters stay the objects they were."""
    pit, inputs = of_zoo(name)
    full = copy.deepcopy(pit)
    held = {id(p) for p in pit.parameters()}
    reachable, offered = pit.reachable_costs(), pit.offered()
    for seed in (0, 1):
        scattered(pit, seed)
        arch, costs = json.loads(json.dumps(pit.arch())), pit.hard_costs()
        with torch.no_grad():
            expected = pit(*copy.deepcopy(inputs))
        size, found = sum(p.numel() for p in pit.parameters()), shrink_(pit)
        assert (sum(p.numel() for p in pit.parameters()) < size) == (found != {})
        with torch.no_grad():
            same(expected, pit(*copy.deepcopy(inputs)), 1e-9)
        assert pit.hard_costs() == costs
        assert pit.arch() == arch
        assert {id(p) for p in pit.parameters()} == held
        full.decide(arch)
        assert shapes(pit.export()) == shapes(full.export())
        assert full.hard_costs() == costs
    assert pit.reachable_costs() == reachable
    assert pit.offered() == offered
    gone = removed_units(pit)
    assert {label: len(mask.alpha) for label, mask in pit.masks.items() if isinstance(mask, ChannelMask)} == {
        label: mask.made_with - len(gone.get(label, ()))
        for label, mask in full.masks.items()
        if isinstance(mask, ChannelMask)
    }


@settings(max_examples=8, derandomize=True, database=None, deadline=None)
@given(random_networks(), st.integers(0, 2**31 - 1))
def test_random_networks(network: RandomNetwork, seed: int) -> None:
    inputs = tuple(x.double() for x in network.inputs)
    try:
        pit = PIT(copy.deepcopy(network.model).double(), example_input=inputs, cost="params").eval()
    except UnsupportedModelError as error:
        if "has nothing to search" not in str(error):
            raise
        return
    for i in range(2):
        scattered(pit, seed + i)
        expected, cost = pit(*copy.deepcopy(inputs)), pit.hard_cost("params")
        shrink_(pit)
        with torch.no_grad():
            same(expected, pit(*copy.deepcopy(inputs)), 1e-9)
        assert pit.hard_cost("params") == cost == sum(p.numel() for p in pit.export().parameters())


def test_sizes_by_hand() -> None:
    """Channels x positions: of 6 channels 4 stay, of 8 maps 3, each with 2 * 3 columns of the Linear."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.Flatten(),
        nn.Linear(48, 5),
    )  # fmt: skip
    pit = PIT(net, (3, 2, 3), cost=["params", "macs"])
    pit.masks["0"].keep([0, 1, 3, 5])
    pit.masks["3"].keep([2, 4, 7])
    columns = net[5].weight[:, [*range(12, 18), *range(24, 30), *range(42, 48)]]
    assert shrink_(pit) == {"0": 2, "3": 5}
    assert shapes(pit.network) == {
        "0.weight": (4, 3, 3, 3), "0.bias": (4,), "1.weight": (4,), "1.bias": (4,),
        "3.weight": (3, 4, 3, 3), "3.bias": (3,), "5.weight": (5, 18), "5.bias": (5,),
    }  # fmt: skip
    assert torch.equal(pit.network[5].weight, columns)
    # (27 + 1) * 4 + 2 * 4 + (36 + 1) * 3 + (18 + 1) * 5 parameters; 27 * 4 * 6 + 36 * 3 * 6 + 18 * 5 products.
    assert pit.hard_costs() == {"params": 326.0, "macs": 1386.0}
    pit.masks["3"].keep([2, 7])
    assert pit.hard_costs() == {"params": 112 + 8 + 74 + 65, "macs": 648 + 432 + 60}
    assert shrink_(pit) == {"3": 1}
    assert pit.arch()["3"] == [2, 7]
    assert removed(pit) == {"units": {"0": [2, 4], "3": [0, 1, 3, 4, 5, 6]}}


def test_groups_of_channels_by_hand() -> None:
    """A grouped convolution loses whole groups, and so does the norm: 2 of 4 groups of 2 in, 3 out."""
    net = nn.Sequential(nn.Conv1d(2, 8, 1), nn.Conv1d(8, 12, 1, groups=4), nn.GroupNorm(4, 12), nn.Conv1d(12, 1, 1))
    pit = PIT(net, (2, 5), cost=["params", "macs"])
    (label,) = [axis.label for axis in pit.space.channels]
    pit.masks[label].keep([1, 2])
    assert shrink_(pit) == {label: 2}
    conv, norm = pit.network[1], pit.network[2]
    assert (conv.groups, conv.in_channels, conv.out_channels, norm.num_groups, norm.num_channels) == (2, 4, 6, 2, 6)
    # (2 + 1) * 4, (2 + 1) * 6, 2 * 6, 6 + 1; 2 * 4 * 5, 2 * 6 * 5, 6 * 5
    assert pit.hard_costs() == {"params": 12 + 18 + 12 + 7, "macs": 40 + 60 + 30}
    assert sum(p.numel() for p in pit.net_parameters()) == 49


def test_granularity_and_least_are_kept() -> None:
    """3 of 8 above the threshold: 4 stay with a granularity of 4, and go on to be all or none of them."""
    pit = PIT(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), (3,), cost="params", granularity=4)
    with torch.no_grad():
        pit.masks["0"].alpha.copy_(torch.tensor([0.9, 0.1, 0.8, 0.2, 0.3, 0.7, 0.4, 0.0]))
    lowest = pit.reachable_costs()
    assert shrink_(pit) == {"0": 4}
    assert pit.arch() == {"0": [0, 2, 5, 6]}
    with torch.no_grad():
        pit.masks["0"].alpha.mul_(0.1)
    assert shrink_(pit) == {}
    assert pit.reachable_costs() == lowest
    with pytest.raises(ArchMismatchError, match="multiple of 4"):
        pit.decide({"0": [0, 2, 5]})


def test_one_mask_at_two_places() -> None:
    """A mask object that two layers share is cut once."""
    mask = ChannelMask(6)
    net = nn.Sequential(
        MaskedConv2d(3, 6, 3, channel_mask=mask), nn.ReLU(), MaskedConv2d(6, 6, 3, channel_mask=mask), nn.Flatten(),
        nn.Linear(24, 2),
    )  # fmt: skip
    pit = PIT(net, (3, 6, 6), cost="params", autoconvert_layers=False)
    pit.masks["0"].keep([1, 2, 4])
    optimizer = Adam(pit.parameters())
    assert shrink_(pit, [optimizer]) == {"0": 3, "2": 3}
    assert pit.masks["0"] is pit.masks["2"]
    assert len(pit.masks["0"].alpha) == 3
    assert pit.arch() == {"0": [1, 2, 4], "2": [1, 2, 4]}
    # 27 * 3 + 3, 27 * 3 + 3, 12 * 2 + 2
    assert pit.hard_cost("params") == sum(p.numel() for p in pit.net_parameters()) == 84 + 84 + 26


def test_nothing_to_remove() -> None:
    pit, _ = of_zoo("plain_cnn")
    before = state_of(pit)
    masks = pit.masks
    assert shrink_(pit) == {}
    assert state_of(pit) == before
    assert pit.masks is masks
    assert removed(pit) == {}
    remove_(pit, {})
    assert state_of(pit) == before


def test_precision_flags_and_modes_stay() -> None:
    pit, _ = of_zoo("resnet_identity")
    pit.train()
    pit.network.stem.eval()
    pit.train_rf = False
    next(pit.net_parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in pit.parameters()]
    modes = [m.training for m in pit.network.modules()]
    types = {name: t.dtype for name, t in (*pit.named_parameters(), *pit.named_buffers())}
    scattered(pit, 0)
    assert shrink_(pit)
    assert [p.requires_grad for p in pit.parameters()] == flags
    assert [m.training for m in pit.network.modules()] == modes
    assert {name: t.dtype for name, t in (*pit.named_parameters(), *pit.named_buffers())} == types
    assert pit.masks.training


def test_soft_costs_count_what_is_left() -> None:
    """Before, a unit that is off has its |alpha| in the relaxed size; then it has nothing: as if alpha were 0."""
    pit = PIT(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), (3,), cost="params")
    with torch.no_grad():
        pit.masks["0"].alpha.copy_(torch.tensor([0.75, 0.25, 1.0, 0.5]))
    # 4 * 2.5 + 2 * 2.5 + 2 with it
    assert pit.soft_cost("params").item() == 17
    shrink_(pit)
    assert pit.soft_cost("params").item() == 6 * 1.75 + 2
    pit.get_cost("params").backward()
    assert pit.masks["0"].alpha.grad.tolist() == [6, 6]


def test_a_cost_that_is_set_later_is_that_of_the_whole_search() -> None:
    pit, _ = of_zoo("flatten_maps")
    full = copy.deepcopy(pit)
    scattered(pit, 0)
    arch = pit.arch()
    shrink_(pit)
    full.decide(arch)
    for network in (pit, full):
        network.cost_specification = ["params_no_norm", "macs"]
    assert pit.hard_costs() == full.hard_costs()
    assert pit.reachable_costs() == full.reachable_costs()


# ---- units: learning goes on ---------------------------------------------------------------------------------------


def sgd(parameters: list[nn.Parameter]) -> Optimizer:
    return SGD(parameters, lr=0.02, momentum=0.9, nesterov=True)


def adam(parameters: list[nn.Parameter]) -> Optimizer:
    # Where a gradient is 0 but for rounding, a small eps would make a step of it.
    return Adam(parameters, lr=0.01, eps=1e-3, amsgrad=True)


class Loop:
    """Steps of all weights and masks on the same batches, with a cost in the loss; ``dead``: alphas kept at 0."""

    def __init__(self, network: SearchedNetwork, inputs: tuple[Tensor, ...], make: Optimizers) -> None:
        self.network, self.inputs = network, inputs
        self.optimizers = [make(list(network.net_parameters())), make(list(network.nas_parameters()))]
        self.dead: dict[str, list[int]] = {}
        self.steps = 0

    def __call__(self, steps: int) -> None:
        self.network.train()
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.steps)
            inputs = [
                x + 0.1 * torch.randn(x.shape, generator=generator).to(x) if x.is_floating_point() else x
                for x in self.inputs
            ]
            outputs = self.network(*inputs)
            loss = sum(o.square().mean() for o in (outputs if isinstance(outputs, tuple) else [outputs]))
            costs = self.network.costs()
            (loss + 1e-4 * costs["params"] + 1e-6 * costs["macs"]).backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            self.network.masks.clip_()
            self.kill()
            self.steps += 1

    @torch.no_grad()
    def kill(self) -> None:
        for label, units in self.dead.items():
            self.network.masks[label].alpha[units] = 0

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, buffers, and all that the optimizers know of them."""
        named = dict(self.network.named_parameters())
        found = {**named, **dict(self.network.network.named_buffers(prefix="network"))}
        for optimizer in self.optimizers:
            for name, parameter in named.items():
                for key, value in optimizer.state.get(parameter, {}).items():
                    found[f"{name}: {key}"] = torch.as_tensor(value)
        return {name: tensor.detach().clone() for name, tensor in found.items()}


def left_of(full: SearchedNetwork, gone: Mapping[str, list[int]], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What stays of the tensors of a network of the full size without these units."""
    for axis in full.space.channels:
        units = [u for u in range(axis.units) if u not in gone.get(axis.label, [])]
        for name in list(tensors):
            if name.startswith(f"masks.by_label.{full.masks._keys[axis.label]}.") and tensors[name].dim():
                tensors[name] = tensors[name][units]
    shape = {name: p.shape for name, p in (*full.network.named_parameters(), *full.network.named_buffers())}
    alive: dict[tuple[str, int], Tensor] = {}
    for axis in full.space.channels:
        for (name, dim), indices in axis.dimensions.items():
            flags = alive.setdefault((name, dim), torch.ones(shape[name][dim], dtype=torch.bool))
            flags[indices[gone.get(axis.label, [])].flatten()] = False
    for (weight, dim), flags in alive.items():
        for name in list(tensors):
            if name.split(": ")[0] == f"network.{weight}" and tensors[name].dim():
                tensors[name] = tensors[name].index_select(dim, flags.nonzero().flatten())
    return tensors


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("name", ["ds_cnn", "densenet", "flatten_maps", "vit_fused_qkv", "slice_channels"])
def test_learning_goes_on_as_with_masks_at_zero(name: str, make: Optimizers) -> None:
    """Three steps, a shrink, three steps, a shrink, two steps: weights, alphas, statistics, momenta and moments."""
    pit, inputs = of_zoo(name)
    full = copy.deepcopy(pit)
    loop, reference = Loop(pit, inputs, make), Loop(full, inputs, make)
    for one in (loop, reference):
        scattered(one.network, 3)
        one(3)
    for steps in (3, 2):
        with torch.no_grad():
            for axis in pit.space.channels:
                mask = pit.masks[axis.label]
                full.masks[axis.label].alpha[max(mask.left)] = mask.alpha[-1] = 0.4
        shrink_(pit, loop.optimizers)
        reference.dead = removed_units(pit)
        reference.kill()
        assert reference.dead
        for one in (loop, reference):
            one(steps)
        expected = left_of(full, reference.dead, reference.tensors())
        got = loop.tensors()
        assert got.keys() == expected.keys()
        for key, tensor in got.items():
            torch.testing.assert_close(
                tensor, expected[key], rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}"
            )


def test_gradients_lose_the_same_units_and_a_graph_from_before_may_live_on() -> None:
    pit = PIT(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), (3,), cost="params")
    old = pit(torch.ones(1, 3)).sum()
    old.backward(retain_graph=True)
    weight, alpha = pit.network[0].weight, pit.masks["0"].alpha
    gradients = weight.grad.clone(), alpha.grad.clone()
    pit.masks["0"].keep([0, 3])
    shrink_(pit)
    assert torch.equal(weight.grad, gradients[0][[0, 3]])
    assert torch.equal(alpha.grad, gradients[1][[0, 3]])
    pit.zero_grad()
    pit(torch.ones(1, 3)).sum().backward()
    assert weight.grad.shape == (2, 3)
    assert old.grad_fn is not None


def test_followers_become_smaller_alike() -> None:
    """Copies of weights by their names: what they were at the units that are left."""
    pit, _ = of_zoo("ds_cnn")
    scattered(pit, 0)
    average = {name: tensor.detach() + 1 for name, tensor in followed(pit).items()}
    assert shrink_(pit, followers=[average])
    assert all(torch.equal(average[name], tensor + 1) for name, tensor in followed(pit).items())
    scattered(pit, 1)
    with pytest.raises(ConfigurationError, match=r"followers: .* has shape"):
        shrink_(pit, followers=[{name: torch.zeros(7) for name in average}])


def followed(network: SearchedNetwork) -> dict[str, Tensor]:
    return dict((*network.named_parameters(), *network.network.named_buffers(prefix="network")))


def test_an_earlier_architecture_stays_possible() -> None:
    """Of 12 units the ones of now and those of a kept epoch stay, in a multiple of 4; its state_dict goes along."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 2)).double()
    pit = PIT(net, (3,), cost="params", granularity=4).eval()
    x = torch.randn(5, 3, dtype=torch.float64)
    pit.masks["0"].keep([0, 1, 2, 3])
    kept, arch, expected = {k: t.clone() for k, t in pit.state_dict().items()}, pit.arch(), pit(x).detach()
    with torch.no_grad():
        pit.masks["0"].alpha.copy_(torch.tensor([0.0, 0.0, 0.9, 0.9, 0.9, 0.9, 0.1, 0.1, 0.3, 0.1, 0.2, 0.1]))
        pit.network[0].weight.add_(1)
    assert shrink_(pit, followers=[kept], archs=[arch]) == {"0": 4}
    assert removed_units(pit) == {"0": [6, 7, 9, 11]}  # 0 to 5 are those of both, 8 and 10 the largest others
    assert pit.arch() == {"0": [2, 3, 4, 5]}
    pit.load_state_dict(kept)
    assert pit.arch() == arch
    torch.testing.assert_close(pit(x).detach(), expected, rtol=1e-12, atol=1e-12)
    network = SuperNet(choices(), (4, 6, 6))
    set_alpha(network, twice=[-9.0, 9.0, -9.0])
    assert drop_(network, archs=[{**network.arch(), "twice": "skip"}]) == {"twice": ["k3"]}


@pytest.mark.parametrize(
    ("optimizer", "text"), [(Adafactor, "Adafactor keeps 'row_var' of shape"), (LBFGS, "LBFGS keeps '.*' of type list")]
)
def test_an_optimizer_whose_state_cannot_be_cut_is_refused(optimizer: type[Optimizer], text: str) -> None:
    pit, inputs = of_zoo("plain_cnn")
    used = optimizer(list(pit.net_parameters()))  # type: ignore[call-arg]

    def closure() -> Tensor:
        used.zero_grad()
        loss = pit(*inputs).square().sum()
        loss.backward()
        return loss

    used.step(closure)
    scattered(pit, 0)
    before = state_of(pit)
    with pytest.raises(ConfigurationError, match=text):
        shrink_(pit, [used])
    assert state_of(pit) == before


# ---- units: architectures, checkpoints, failures -------------------------------------------------------------------


def test_an_architecture_file_belongs_to_the_network_at_first(tmp_path: Any) -> None:
    pit, inputs = of_zoo("resnet_projection")
    full = copy.deepcopy(pit)
    scattered(pit, 0)
    costs, space = pit.hard_costs(), fingerprint(pit)
    shrink_(pit)
    write_arch(tmp_path / "arch.json", pit, argmax_choices(pit), costs=costs, created_by={})
    assert read_arch(tmp_path / "arch.json").space == space == fingerprint(full)
    full.decide(choices_of(full, tmp_path / "arch.json"))
    assert full.hard_costs() == costs
    with torch.no_grad():
        same(full.export().eval()(*inputs), pit.export().eval()(*inputs), 1e-9)
    label, units = next(iter(removed_units(pit).items()))
    with pytest.raises(ArchMismatchError, match=f"units .{units[0]}. have been removed in the search, of"):
        pit.decide({**pit.arch(), label: [units[0]]})
    report = {row.label: row for row in pit.report().masks}
    assert report[label].size - report[label].kept == len(units)


@pytest.mark.parametrize("name", ["ds_cnn", "densenet", "slice_channels"])
@pytest.mark.parametrize("make", [sgd, adam])
def test_a_fresh_network_takes_up_where_a_smaller_one_was(name: str, make: Optimizers) -> None:
    """remove_, then load_state_dict of everything: bit for bit, and so is what it learns from there."""
    pit, inputs = of_zoo(name)
    fresh, _ = of_zoo(name)
    loop, taken_up = Loop(pit, inputs, make), Loop(fresh, inputs, make)
    for seed in (0, 1):
        scattered(pit, seed)
        loop(1)
        shrink_(pit, loop.optimizers)
    saved = copy.deepcopy([pit.state_dict(), *(o.state_dict() for o in loop.optimizers)])
    remove_(fresh, json.loads(json.dumps(removed(pit))), taken_up.optimizers)
    for one, state in zip([fresh, *taken_up.optimizers], saved, strict=True):
        one.load_state_dict(state)
    taken_up.steps = loop.steps
    assert removed(fresh) == removed(pit)
    for _ in range(2):
        got, expected = taken_up.tensors(), loop.tensors()
        assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())
        assert fresh.arch() == pit.arch()
        assert fresh.reachable_costs() == pit.reachable_costs()
        loop(2)
        taken_up(2)


def test_units_that_cannot_go_are_an_error() -> None:
    pit, _ = of_zoo("plain_cnn")
    before = state_of(pit)
    for wrong, text in [
        ({"x": [0]}, "masks .'x'. that the network does not have"),
        ({"0": [0, 99]}, "has 8 of them"),
        ({"0": list(range(8))}, "keeps at least 1"),
    ]:
        with pytest.raises(ArchMismatchError, match=text):
            remove_units_(pit, wrong)
        assert state_of(pit) == before
    remove_units_(pit, {"0": [1]})
    with pytest.raises(ArchMismatchError, match="Begin with a network of the full size"):
        remove_units_(pit, {"0": [2]})
    with pytest.raises(ArchMismatchError, match=r"removed: .'other'."):
        remove_(pit, {"other": {}})


class Reading(nn.Module):
    """Looks at how wide its first layer is, if it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = False
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(x)))
        return x * 1.01 if self.looks and len(self.first.weight) == 6 else x


def test_what_differs_is_put_back() -> None:
    """A forward that has been changed since the trial cuts, so that it computes something else with 6 units."""
    pit = PIT(Reading(), (3,), cost="params", granularity=2)
    pit.train()
    pit.network.looks = True
    optimizer = sgd(list(pit.parameters()))
    pit(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    pit.masks["first"].keep([0, 1, 2, 3, 4, 6])
    before, space = state_of(pit), (pit.masks, pit.space, pit.weight_masks, pit._costs)
    momenta = copy.deepcopy(optimizer.state_dict())
    average = {"network.first.weight": torch.zeros(8, 3)}
    with pytest.raises(ExportError, match=r"differs from .* Nothing was removed: the network is as it was"):
        shrink_(pit, [optimizer], [average])
    assert state_of(pit) == before
    assert space == (pit.masks, pit.space, pit.weight_masks, pit._costs)
    assert str(optimizer.state_dict()) == str(momenta)
    assert average["network.first.weight"].shape == (8, 3)
    pit.masks["first"].keep([0, 1, 2, 4])
    assert shrink_(pit, [optimizer], [average]) == {"first": 4}


# ---- candidates ----------------------------------------------------------------------------------------------------


class Choices(nn.Module):
    """Three choices: by name, of one label at two places, and without names; a skip, a nested choice."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Conv2d(4, 4, 1), LayerChoice([nn.ReLU(), nn.Tanh()], label="inner"))
        self.one = LayerChoice(
            {"k3": nn.Conv2d(4, 4, 3, padding=1), "k1": nn.Conv2d(4, 4, 1), "skip": nn.Identity()}, label="twice"
        )
        self.two = LayerChoice(
            {"k3": nn.Conv2d(4, 4, 3, padding=1), "k1": nn.Conv2d(4, 4, 1), "skip": nn.Identity()}, label="twice"
        )
        self.three = LayerChoice([nn.Conv2d(4, 4, 5, padding=2), inner, nn.BatchNorm2d(4), nn.Identity()])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.three(self.two(torch.relu(self.one(x)))).mean((2, 3)))


IMAGE = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def choices() -> Choices:
    torch.manual_seed(0)
    return Choices().double()


@torch.no_grad()
def set_alpha(model: nn.Module | SearchedNetwork, **alphas: list[float]) -> None:
    known = model.choices if isinstance(model, SearchedNetwork) else decisions(model)
    for label, values in alphas.items():
        known[label].alpha.copy_(torch.tensor(values))


def test_candidates_go_by_their_probability() -> None:
    """Of three, one goes below 0.01 / 3, of four below 0.01 / 4; not what leads, is pinned or holds a choice."""
    model = choices()
    # softmax: 0.9933, 0.0034, 0.0033 (ln of 0.00335 is -5.7 below); 0.0024 and 0.0026 around 0.0025.
    set_alpha(model, twice=[5.7, 0.01, -0.01], three=[6.0, -20.0, -0.03, 0.03])
    limits = {label: d.alpha.softmax(0).tolist() for label, d in decisions(model).items()}
    assert limits["twice"][2] < 0.01 / 3 < limits["twice"][1]
    assert limits["three"][2] < 0.01 / 4 < limits["three"][3]
    weights = {id(p) for p in model.parameters()}
    alpha = model.one.alpha
    space = fingerprint(model)
    assert drop_candidates_(model, [(IMAGE,)]) == {"twice": ["skip"], "three": [2]}
    assert (model.one.options, model.two.options, model.three.options) == (("k3", "k1"), ("k3", "k1"), (0, 1, 3))
    assert model.one.alpha is model.two.alpha is alpha
    assert alpha.tolist() == pytest.approx([5.7, 0.01])
    assert {id(p) for p in model.parameters()} < weights
    assert fingerprint(model) == space
    assert dropped_candidates(model) == {"twice": ["skip"], "three": [2]}
    assert drop_candidates_(model, [(IMAGE,)]) == {}
    set_sampler({"twice": decisions(model)["twice"]}, OnePath(1))
    assert drop_candidates_(model, [(IMAGE,)], below=1.0) == {"three": [3]}
    assert model.three.options == (0, 1)
    assert model.one.sampler == OnePath(1)


def test_an_arch_of_a_smaller_model_belongs_to_the_model_at_first(tmp_path: Any) -> None:
    model, full = choices(), choices()
    set_alpha(model, twice=[-9.0, 0.0, 9.0], three=[-9.0, -9.0, -9.0, 9.0])
    expected = fixed(model, arch_of(model, argmax_choices(model)))
    drop_candidates_(model, [(IMAGE,)])
    assert model.three.options == (1, 3)
    write_arch(tmp_path / "arch.json", model, argmax_choices(model), costs={}, created_by={})
    assert read_arch(tmp_path / "arch.json").arch == {"twice": "skip", "three": 3, "inner": 0}
    for one in (model, full):
        plain = fixed(one, tmp_path / "arch.json")
        assert shapes(plain) == shapes(expected)
        with torch.no_grad():
            assert torch.equal(plain.eval()(IMAGE), expected.eval()(IMAGE))
    with pytest.raises(ArchMismatchError, match=r"says 'k3', which was dropped in the search; of .* there are"):
        choices_of(model, {"twice": "k3", "three": 3, "inner": 0})
    with pytest.raises(ArchMismatchError, match="says 2, which was dropped"):
        choices_of(model, {"twice": 2, "three": 2, "inner": 0})


@pytest.mark.parametrize("sampler", [Softmax(), GumbelSoftmax(), BinaryGates(2), BinaryGates(), Softmax(hard=True)])
def test_a_mixture_without_improbable_candidates_learns_on(sampler: Sampler) -> None:
    """Against a model of which the alphas of these candidates are so low that their share is exactly 0."""
    model, full = choices(), choices()
    low = -1e4
    for one in (model, full):
        set_alpha(one, twice=[0.3, low, 0.1], three=[0.2, 0.1, low, 0.0], inner=[0.2, 0.1])
    runs = []
    for one in (model, full):
        weights, alphas = weight_parameters(one), arch_parameters(one)
        runs.append((one, adam(weights), sgd(alphas)))
    for step in range(4):
        if step == 2:
            optimizers = runs[0][1:]
            assert drop_candidates_(model, [(IMAGE,)], optimizers=optimizers) == {"twice": ["k1"], "three": [2]}
        for one in (model, full):
            set_sampler(one, sampler)
            draw(one, torch.Generator().manual_seed(step))
        share_draws(model, full)
        for one, of_weights, of_alphas in runs:
            one.train()
            one(IMAGE).square().sum().backward()
            for optimizer in (of_weights, of_alphas):
                optimizer.step()
                optimizer.zero_grad()
            after_step(one)
    expected = dict(full.named_parameters())
    for name, parameter in model.named_parameters():
        wanted = expected[name]
        if name.endswith("alpha") and parameter.shape != wanted.shape:
            wanted = wanted[[0, 2] if len(wanted) == 3 else [0, 1, 3]]
        torch.testing.assert_close(parameter, wanted, rtol=1e-9, atol=1e-9)


def share_draws(model: nn.Module, full: nn.Module) -> None:
    """What was drawn for the full one, in the numbers of the options that are left."""
    known = decisions(model)
    for label, decision in decisions(full).items():
        names = [decision.options.index(option) for option in known[label].options]
        for member in known[label].members:
            member.drawn = in_numbers(decision.drawn, names)
            at_draw = decision.members[0].alpha_at_draw  # None for a sampler that does not read it
            member.alpha_at_draw = None if at_draw is None else at_draw[names]


def in_numbers(drawn: Any, names: list[int]) -> Any:
    if drawn is None:
        return None
    if isinstance(drawn, int):
        return names.index(drawn)
    if hasattr(drawn, "noise"):
        chosen = None if drawn.chosen is None else names.index(drawn.chosen)
        return drawn._replace(noise=drawn.noise[names], chosen=chosen)
    return drawn._replace(active=names.index(drawn.active), involved=tuple(names.index(k) for k in drawn.involved))


def test_parameters_that_no_candidate_has_leave_their_optimizers() -> None:
    """In groups, the parameters of what went are missing; moments of alpha lose its entries, others stay."""
    model = choices()
    convs, others = list(model.one.candidates["k3"].parameters()), list(model.head.parameters())
    optimizer = Adam([{"params": [*convs, *others], "lr": 0.1}, {"params": arch_parameters(model), "lr": 0.2}])
    model(IMAGE).square().sum().backward()
    optimizer.step()
    moments = optimizer.state[model.one.alpha]["exp_avg"].clone(), optimizer.state[model.head.weight]["exp_avg"].clone()
    set_alpha(model, twice=[-20.0, 1.0, 0.0])
    assert drop_candidates_(model, [(IMAGE,)], optimizers=[optimizer]) == {"twice": ["k3"]}
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in others]
    assert all(id(p) not in {id(q) for q in optimizer.state} for p in convs)
    assert torch.equal(optimizer.state[model.one.alpha]["exp_avg"], moments[0][1:])
    assert torch.equal(optimizer.state[model.head.weight]["exp_avg"], moments[1])
    fresh = choices()
    held = [*fresh.one.candidates["k3"].parameters(), *fresh.head.parameters()]
    taken_up = Adam([{"params": held, "lr": 0.1}, {"params": arch_parameters(fresh), "lr": 0.2}])
    assert remove_candidates_(fresh, dropped_candidates(model), [(IMAGE,)], optimizers=[taken_up]) == {"twice": ["k3"]}
    fresh.load_state_dict(model.state_dict())
    taken_up.load_state_dict(optimizer.state_dict())
    assert str(taken_up.state_dict()) == str(optimizer.state_dict())
    assert torch.equal(fresh(IMAGE), model(IMAGE))


def test_costs_are_narrowed_to_what_is_left() -> None:
    """A cost that was counted before, and one that is counted after, of every architecture that is left."""
    model = choices()
    before = count_params(model)
    found = drop_candidates_(model, [(IMAGE,)], below=0.0)
    assert found == {}
    set_alpha(model, twice=[0.0, -20.0, 0.1], three=[-20.0, 0.0, 0.0, -20.0])
    found = drop_candidates_(model, [(IMAGE,)])
    assert found == {"twice": ["k1"], "three": [0, 3]}
    narrowed, after = before.narrowed(narrowing(model, found), model), count_params(model)
    assert narrowed.sizes == {"twice": 2, "three": 2, "inner": 2}
    for twice, three, inner in itertools.product(range(2), range(2), range(2)):
        of_left = {"twice": twice, "three": three, "inner": inner}
        at_first = {"twice": [0, 2][twice], "three": [1, 2][three], "inner": inner}
        assert narrowed.of(of_left) == after.of(of_left) == before.of(at_first)
    # head 4 * 3 + 3; twice k3: 2 * (16 * 9 + 4); three inner: 16 + 4, norm: 8
    assert [after.of({"twice": 0, "three": k, "inner": 0}) for k in range(2)] == [15 + 296 + 20, 15 + 296 + 8]
    uniform = {label: torch.full((2,), 0.5) for label in after.sizes}
    assert float(narrowed.expected(uniform)) == float(after.expected(uniform)) == 15 + 148 + 14


class Asking(nn.Module):
    """A forward that looks at a candidate instead of calling its choice."""

    def __init__(self) -> None:
        super().__init__()
        self.choice = LayerChoice({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}, label="choice")

    def forward(self, x: Tensor) -> Tensor:
        return self.choice(x) + (x if "b" in self.choice.candidates else 0)


def test_a_model_that_misses_its_candidates_is_put_back() -> None:
    model = Asking()
    set_alpha(model, choice=[9.0, -9.0])
    optimizer = adam(list(model.parameters()))
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    before, moments = state_of(model), str(optimizer.state_dict())
    with pytest.raises(ExportError, match=r"differs from .* Nothing was dropped: the model is as it was"):
        drop_candidates_(model, [(torch.randn(2, 4),)], optimizers=[optimizer])
    assert state_of(model) == before
    assert str(optimizer.state_dict()) == moments
    assert list(model.choice.candidates) == ["a", "b"]


@pytest.mark.parametrize(
    ("dropped", "text"),
    [
        ({"x": ["k3"]}, "labels .'x'. that the model does not have"),
        ({"twice": ["k7"]}, "candidates .'k7'. of 'twice', which had"),
        ({"twice": ["k3", "k1", "skip"]}, "One at least stays"),
        ({"three": [1]}, "all that hold choices"),
    ],
)
def test_candidates_that_cannot_go_are_an_error(dropped: dict[str, list[Any]], text: str) -> None:
    model = choices()
    decisions(model)  # ties alphas
    before = state_of(model)
    with pytest.raises(ArchMismatchError, match=text):
        remove_candidates_(model, dropped, [(IMAGE,)])
    assert state_of(model) == before


def test_wrong_arguments_are_errors() -> None:
    with pytest.raises(ConfigurationError, match="below=2: a number from 0"):
        drop_candidates_(choices(), [(IMAGE,)], below=2)
    network = SuperNet(choices(), (4, 6, 6))
    with pytest.raises(ConfigurationError, match="SuperNet: its costs and masks lose candidates too"):
        drop_candidates_(network, [(IMAGE,)])


# ---- candidates of networks with masks and costs -------------------------------------------------------------------


class Widths(nn.Module):
    """Candidates of 4, 6 and 6 channels before a convolution of 6."""

    def __init__(self) -> None:
        super().__init__()
        self.choice = LayerChoice([nn.Conv2d(2, 4, 1), nn.Conv2d(2, 6, 1), nn.Conv2d(2, 6, 3, padding=1)], label="a")
        self.last, self.head = nn.Conv2d(6, 5, 1), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.last(torch.relu(self.choice(x)))).mean((2, 3)))


def test_channels_of_wider_candidates_go_with_the_last_of_these() -> None:
    """By hand: 2 * 4 + 4 + 4 * 5 + 5 + 5 * 3 + 3 = 55 parameters; with 6 channels of 1 x 1, 71, of 3 x 3, 167."""
    for kind in (PIT, SuperNet):
        torch.manual_seed(0)
        network = kind(Widths().double(), (2, 5, 5), cost="params")
        full = copy.deepcopy(network)
        optimizer = adam(list(network.parameters()))
        network(torch.ones(2, 2, 5, 5, dtype=torch.float64)).sum().backward()
        optimizer.step()
        set_alpha(network, a=[9.0, 4.0, -9.0])
        reachable = network.reachable_costs()
        assert drop_(network, optimizers=[optimizer]) == {"a": [2]}
        assert network.network.last.weight.shape == (5, 6, 1, 1)
        p = network.choices["a"].alpha.softmax(0).tolist()
        assert network.get_cost("params").item() == pytest.approx(p[0] * 55 + p[1] * 71, rel=1e-9)
        set_alpha(network, a=[9.0, -9.0])
        kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        assert drop_(network, optimizers=[optimizer], followers=[kept]) == {"a": [1]}
        assert kept.keys() == network.state_dict().keys()
        assert all(torch.equal(kept[name], tensor) for name, tensor in network.state_dict().items())
        assert network.network.last.weight.shape == (5, 4, 1, 1)
        assert optimizer.state[network.network.last.weight]["exp_avg"].shape == (5, 4, 1, 1)
        assert sum(p.numel() for p in network.net_parameters()) == 55
        assert network.hard_costs() == {"params": 55.0} == {"params": network.get_cost("params").item()}
        assert network.reachable_costs() == reachable
        arch = json.loads(json.dumps(network.arch()))
        assert arch["a"] == 0
        assert network.offered() == full.offered()
        full.decide(arch)
        assert shapes(full.export()) == shapes(network.export())
        with pytest.raises(ArchMismatchError, match="dropped in the search"):
            network.decide({**arch, "a": 1})
        assert network.choices["a"].members[0].padding.width == 0


def test_a_network_that_misses_its_candidates_is_put_back() -> None:
    torch.manual_seed(0)
    pit = PIT(nn.Sequential(nn.Linear(4, 4), Asking(), nn.Linear(4, 2)).double(), (4,), cost="params")
    set_alpha(pit, choice=[9.0, -9.0])
    optimizer = adam(list(pit.parameters()))
    pit(torch.randn(3, 4).double()).sum().backward()
    optimizer.step()
    follower = {name: tensor.clone() for name, tensor in pit.state_dict().items()}
    held = (pit.masks, pit.space, pit.weight_masks, pit._costs, pit._chances, pit._reachable, pit._gone)
    before, states = state_of(pit), str((optimizer.state_dict(), follower))
    with pytest.raises(ExportError, match="Nothing was removed: the network is as it was"):
        drop_(pit, 0.01, [optimizer], [follower])
    assert state_of(pit) == before
    assert str((optimizer.state_dict(), follower)) == states
    assert (pit.masks, pit.space, pit.weight_masks, pit._costs, pit._chances, pit._reachable, pit._gone) == held
    pit.cost.backward()


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 5])
def test_random_networks_with_choices(seed: int) -> None:
    """Shrinks and drops in turn: costs and exports as in the full network, gradients by plain operators, resume."""
    rng, drawn = random.Random(seed), random_network(seed)
    kind: type[SearchedNetwork] = SuperNet if seed % 4 == 0 else PIT
    torch.manual_seed(seed)
    network = with_choices(drawn, kind)
    full = copy.deepcopy(network)
    reachable, offered = network.reachable_costs(), network.offered()
    for i, step in enumerate((shrink_, partial(drop_, below=0.6), shrink_)):
        scattered(network, seed + i)
        set_sampler(network.choices, Softmax())
        arch, costs = json.loads(json.dumps(network.arch())), network.hard_costs()
        step(network)  # type: ignore[operator]
        assert network.hard_costs() == pytest.approx(costs, rel=1e-12)
        assert json.loads(json.dumps(network.arch())) == arch
        other = copy.deepcopy(full)
        other.decide(arch)
        assert other.hard_costs() == pytest.approx(costs, rel=1e-12)
        assert shapes(other.export()) == shapes(network.export())
    assert network.reachable_costs() == reachable
    assert network.offered() == offered
    remove_(full, json.loads(json.dumps(removed(network))))
    full.load_state_dict(network.state_dict())
    assert full.arch() == network.arch()
    with evaluated(full, Argmax()), evaluated(network, Argmax()):
        torch.manual_seed(0)
        expected = network(*copy.deepcopy(drawn.inputs))
        torch.manual_seed(0)
        same(expected, full(*copy.deepcopy(drawn.inputs)), 0.0)
    quiet = copy.deepcopy(network)
    quiet.train_net_only()  # leaves the masks of now
    check_training(drawn, quiet, BinaryGates("all"), rng)
    check_training(drawn, quiet, Softmax(), rng)
