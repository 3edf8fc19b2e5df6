"""Recomputed blocks against the same network without: equal to the bit, with less kept."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from pit_networks import scatter
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from oneshot import (
    PIT,
    BinaryGates,
    GumbelSoftmax,
    LayerChoice,
    Repeat,
    Softmax,
    SuperNet,
    draw,
    set_sampler,
    weight_parameters,
)
from oneshot.errors import ConfigurationError, UnsupportedModelError
from oneshot.mutables import Sampler
from oneshot.trainers.modes import frozen_statistics, frozen_weights, normalisations
from oneshot.trainers.recompute import blocks_of, recomputed

# Every kind of layer that could differ a second time: statistics of three kinds, random numbers, iterations.


def block(width: int, momentum: float | None = 0.1) -> nn.Sequential:
    conv = spectral_norm(nn.Conv2d(width, width, 3, padding=1))
    norms = nn.BatchNorm2d(width, momentum=momentum), nn.InstanceNorm2d(width, track_running_stats=True)
    return nn.Sequential(conv, norms[0], nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Conv2d(width, width, 1), norms[1])


class Net(nn.Module):
    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList([block(6), block(6, momentum=None)])
        self.middle = nn.Identity() if middle is None else middle
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for each in self.blocks:
            x = x + each(x)
        return self.head(self.middle(x).mean((2, 3)))


def choices() -> nn.Module:
    inner = LayerChoice([block(6), nn.Conv2d(6, 6, 1)], label="inner")
    outer = LayerChoice([nn.Sequential(nn.BatchNorm2d(6), inner), block(6), nn.Identity()], label="outer")
    return nn.Sequential(nn.Conv2d(6, 6, 1), outer, Repeat(lambda i: block(6), depth=(1, 3), label="depth"))


def steps(
    model: nn.Module,
    blocks: Sequence[str],
    *,
    around: Callable[[nn.Module], AbstractContextManager[Any]] = lambda model: nullcontext(),
    backward_around: bool = True,
    n: int = 2,
    shape: tuple[int, ...] = (4, 3, 6, 6),
) -> list[Tensor]:
    """What two training steps of a copy compute: outputs, gradients, then its state and that of random numbers."""
    torch.manual_seed(0)
    model, found = copy.deepcopy(model).train(), []
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with recomputed(model, blocks) if blocks else nullcontext():
        for i in range(n):
            draw(model, torch.Generator().manual_seed(i))
            x = torch.randn(shape, dtype=dtype, requires_grad=i == 1)
            with ExitStack() as stack:
                stack.enter_context(around(model))
                output = model(x)
                if not backward_around:
                    stack.close()
                output.float().square().sum().backward()
            if x.grad is not None:
                found.append(x.grad)
            found += [output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            optimizer.step()
            optimizer.zero_grad()
    return [*found, *model.state_dict().values(), torch.get_rng_state()]


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) > 10 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def calls(module: nn.Module) -> list[int]:
    """Counts the calls of a leaf's forward, also the second ones."""
    counted = [0]

    def count(*_: Any) -> None:
        counted[0] += 1

    module.register_forward_hook(count)
    return counted


@pytest.mark.parametrize("blocks", [["blocks.*"], ["blocks.1", "stem"], ["blocks.?.[034]"], ["*"]])
def test_statistics_random_numbers_and_iterations(blocks: list[str]) -> None:
    model = Net().double()
    plain = steps(model, [])
    assert equal(steps(model, blocks), plain)
    changed = copy.deepcopy(model)
    changed.blocks[0][1].momentum = 0.19  # what a second update of the statistics comes to: 1 - 0.9^2
    assert not equal(steps(changed, []), plain)


SAMPLERS = [Softmax(), GumbelSoftmax(hard=True), BinaryGates(1), BinaryGates(2)]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("blocks", [["middle"], ["*.candidates.*", "*.blocks.?"]])
def test_choices_in_blocks_and_blocks_in_choices(sampler: Sampler, blocks: list[str]) -> None:
    model = Net(choices()).double()
    set_sampler(model, sampler)
    assert equal(steps(model, blocks), steps(model, []))


@pytest.mark.parametrize("statistics_too", [False, True])
@pytest.mark.parametrize("backward_around", [False, True])
def test_frozen_weights(statistics_too: bool, backward_around: bool) -> None:
    """As in a step of the alphas; also where the backward pass comes when all is put back."""

    @contextmanager
    def around(model: nn.Module) -> Iterator[None]:
        layers = normalisations(model) if statistics_too else []
        with frozen_weights(weight_parameters(model)), frozen_statistics(layers):
            yield

    model = Net(choices()).double()
    set_sampler(model, BinaryGates(2))
    plain, found = (
        steps(model, blocks, around=around, backward_around=backward_around) for blocks in ([], ["blocks.*", "middle"])
    )
    assert equal(found, plain)


class Masked(nn.Module):
    def __init__(self, with_choices: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        wide = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.3), nn.Conv2d(8, 6, 1))
        candidates = [wide, nn.Conv2d(6, 6, 1), nn.Identity()]
        self.middle = LayerChoice(candidates, label="choice") if with_choices else wide
        self.tail = nn.Sequential(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.middle(self.stem(x))).mean((2, 3)))


@pytest.mark.parametrize("blocks", [["stem", "middle", "tail"], ["middle*"], ["middle.*", "tail"]])
@pytest.mark.parametrize("with_choices", [False, True])
def test_masks(with_choices: bool, blocks: list[str]) -> None:
    """Masked weights are in the network only while it runs: the weights themselves would have other gradients."""
    model = PIT(Masked(with_choices).double(), (3, 6, 6), cost="params")
    scatter(model)
    for sampler in (Softmax(), BinaryGates(1), BinaryGates(2)) if with_choices else (Softmax(),):
        set_sampler(model, sampler)
        assert equal(steps(model, blocks), steps(model, []))


def test_a_supernet_has_the_names_of_the_network() -> None:
    model = SuperNet(Masked(True).double(), (3, 6, 6), cost="params")
    set_sampler(model, GumbelSoftmax())
    assert set(blocks_of(model, ["middle.*"])) == {f"middle.candidates.{i}" for i in range(3)}
    assert equal(steps(model, ["middle.*", "stem"]), steps(model, []))


def test_bfloat16() -> None:
    model = Net(choices())
    set_sampler(model, BinaryGates(2))

    def around(model: nn.Module) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    for backward_around in (True, False):
        plain, found = (steps(model, blocks, around=around, backward_around=backward_around) for blocks in ([], ["*"]))
        assert equal(found, plain)
    assert not equal(steps(model, []), plain)


class Twice(nn.Module):
    """One block at two places, with arguments of several kinds, that counts its calls."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.calls = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), 0

        def forward(self, both: tuple[Tensor, float], *, shift: dict[str, Tensor]) -> dict[str, Any]:
            self.calls += 1
            y = self.norm(self.conv(both[0])).tanh() * both[1] * self.calls
            return {"y": y + shift["by"].sigmoid(), "calls": self.calls}

    def __init__(self) -> None:
        super().__init__()
        self.part = self.again = Twice.Part()

    def forward(self, x: Tensor) -> Tensor:
        once = self.part((x, 2.0), shift={"by": x})
        twice = self.again((once["y"], 3.0), shift={"by": x})
        assert twice["calls"] == once["calls"] + 1
        return twice["y"]


@pytest.mark.parametrize("name", ["part", "again"])
def test_a_block_that_is_called_twice(name: str) -> None:
    model = Twice().double()
    assert list(blocks_of(model, ["part", "again"])) == ["part"]
    assert equal(steps(model, [name]), steps(model, []))
    with recomputed(model, [name]):
        model(torch.rand(2, 3, 4, 4, dtype=torch.float64)).sum().backward()
    assert model.part.calls == 2


def test_a_second_backward_pass() -> None:
    model, gradients = Net().double(), []
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    for blocks in ([], ["blocks.*"]):
        each = copy.deepcopy(model)
        torch.manual_seed(0)
        with recomputed(each, blocks):
            loss = each(x).square().sum()
            loss.backward(retain_graph=True)
            loss.backward()
        gradients.append([p.grad for p in each.parameters()] + list(each.buffers()))
    assert equal(*gradients)


def saved(model: nn.Module, blocks: Sequence[str]) -> int:
    """Bytes that autograd keeps, as it hands them over; each memory once, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with recomputed(model, blocks), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.ones(4, 8))
    return sum(kept.values())


def test_what_is_kept() -> None:
    """Three times Linear, Tanh, Linear, Tanh of 4 x 8 floats (128 bytes), whose parameters do not count.

    Kept are the input and the outputs of 6 tanh, which are the inputs of what follows: 7 x 128. Of a block that is
    recomputed only the input, which is an output of the one before it: each saves one.
    """
    parts = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]
    model = nn.Sequential(*parts)
    # The last output is that of a block, and not an input; so the last one saves two.
    assert [saved(model, blocks) for blocks in ([], ["0"], ["0", "1"], ["*"])] == [896, 768, 640, 384]


def test_in_eval_mode_and_without_gradient_nothing_is_done() -> None:
    model = Net().double()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    counted = calls(model.blocks[0][4])
    with recomputed(model, ["blocks.*"]):
        model.eval()(x).sum().backward()
        assert counted == [1]
        model.train()
        with torch.no_grad():
            model(x)
        assert counted == [2]
        model(x).sum().backward()
        assert counted == [4]
    model(x).sum().backward()
    assert counted == [5]


# ---- what is left of it ----------------------------------------------------------------------------------------------


def test_all_is_put_back() -> None:
    model = Net(choices())

    def mine(x: Tensor) -> Tensor:
        return x * 2

    model.middle[2].blocks[0].forward = mine
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(TypeError), recomputed(model, ["middle.2.blocks.*", "blocks.*"]):
        model.middle[2].blocks[0](torch.ones(1)) + "no tensor"
    with pytest.raises(ConfigurationError), recomputed(model, ["blocks.*", "nothing"]):
        pass
    assert [dict(vars(module)) for module in model.modules()] == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: _through_a_file(model)])
def test_copies_in_the_middle_are_of_the_network(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = Net(nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1))).double().train()
    model.blocks = nn.ModuleList()  # a parametrization cannot be pickled
    names, keys = [name for name, _ in model.named_modules()], list(model.state_dict())
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    with recomputed(model, ["middle"]):
        assert [name for name, _ in model.named_modules()] == names
        assert list(model.state_dict()) == keys
        other = copied(model)
        assert b"oneshot" not in _file(other).getvalue()
        nn.init.zeros_(model.stem.weight)
        mine, its = calls(model.middle[2]), calls(other.middle[2])
        other(x).sum().backward()
        assert (mine, its) == ([0], [1])
        assert other.middle[2].weight.grad.abs().sum() > 0
        assert model.middle[2].weight.grad is None


def _file(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def _through_a_file(model: nn.Module) -> nn.Module:
    loaded: nn.Module = torch.load(_file(model), weights_only=False)
    return loaded


# ---- names and errors ------------------------------------------------------------------------------------------------


def test_of_blocks_inside_each_other_the_outermost() -> None:
    model = Net()
    assert list(blocks_of(model, ["blocks.*"])) == ["blocks.0", "blocks.1"]
    assert list(blocks_of(model, ["*.0", "blocks.0.4", "blocks.1.4"])) == ["blocks.0", "blocks.1.0", "blocks.1.4"]
    assert list(blocks_of(model, ["*"])) == ["stem", "blocks.0", "blocks.1", "middle", "head"]
    assert blocks_of(model, []) == {}


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (["block.0"], r"'block\.0' matches no module; near names are blocks\.0"),
        (["blocks"], r"'blocks' is a ModuleList and is not called itself; name what is in it: \['blocks\.0'"),
        ("blocks.0", r"a list of names is needed: \['blocks\.0'\]"),
        (["network.blocks.0"], r"near names are .*blocks\.0"),
    ],
)
def test_names_that_are_none(blocks: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        blocks_of(Net(), blocks)


class Sliced(nn.Module):
    """A number in the code changes with the widths, so that PIT makes a graph of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()), nn.Conv2d(16, 16, 1))
        self.head = nn.Linear(144, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[:, 8:].reshape(-1, 72).repeat(1, 2).view(-1, 144))


def test_a_graph_has_no_blocks() -> None:
    model = PIT(Sliced(), (3, 3, 3), cost="params")
    assert model.report().as_graph
    with pytest.raises(ConfigurationError, match=r"body\.0.*has become a torch\.fx graph"):
        blocks_of(model, ["body.0"])
    assert list(blocks_of(model, ["body.*"])) == ["body.0.0", "body.0.1", "body.1"]


def test_an_input_that_is_changed_in_place() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 2)))
    with recomputed(model, ["1"]), pytest.raises(UnsupportedModelError, match="changes its input in place"):
        model(torch.ones(1, 2))


def test_weights_that_have_moved() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)))
    with recomputed(model, ["1"]):
        loss = model(torch.ones(1, 2)).sum()
        nn.init.ones_(model[1][0].weight)
        with pytest.raises(RuntimeError, match="changed in place between its forward and its backward"):
            loss.backward()
    assert vars(model[1]).get("forward") is None
