"""Compiled pieces of networks: how often they are compiled, counted by a backend, and that they compute the same."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from pit_networks import scatter
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from oneshot import (
    PIT,
    BinaryGates,
    GumbelSoftmax,
    InputChoice,
    LayerChoice,
    Repeat,
    Softmax,
    SuperNet,
    UniformPath,
    arch_parameters,
    draw,
    set_sampler,
    weight_parameters,
)
from oneshot.errors import ConfigurationError, InputTypeError, UnsupportedModelError
from oneshot.graph.cut import copied
from oneshot.mutables import Sampler
from oneshot.trainers.compilation import Compilations, compile_arguments, compiled, pieces
from oneshot.trainers.modes import frozen_statistics, frozen_weights, normalisations
from oneshot.trainers.recompute import recomputed


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)).relu()


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


def supernet(n: int, m: int) -> nn.Module:
    choices = [LayerChoice([Part() for _ in range(m)], label=f"c{i}") for i in range(n)]
    return nn.Sequential(nn.Linear(6, 6), *choices, nn.Linear(6, 3))


def weight_step(model: nn.Module, sampler: Sampler, seed: int, n: int = 4) -> list[Tensor]:
    """Output and gradients of a step of the weights."""
    set_sampler(model, sampler)
    draw(model, torch.Generator().manual_seed(seed))
    with frozen_weights(arch_parameters(model)):
        return _step(model, n)


def arch_step(model: nn.Module, sampler: Sampler, seed: int) -> list[Tensor]:
    """Output and gradients of a step of the alphas."""
    set_sampler(model, sampler)
    draw(model, torch.Generator().manual_seed(seed))
    with frozen_weights(weight_parameters(model)), frozen_statistics(normalisations(model)):
        return _step(model, 4)


def _step(model: nn.Module, n: int) -> list[Tensor]:
    model.zero_grad()
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(n)).to(next(model.parameters()))
    output = model(x)
    output.square().sum().backward()
    return [output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def close(one: list[Tensor], other: list[Tensor]) -> bool:
    tolerance = 1e-9 if one[0].dtype == torch.float64 else 1e-6
    assert len(one) > 1
    return all(
        float((a - b).abs().max()) <= tolerance * (1 + float(b.abs().max())) for a, b in zip(one, other, strict=True)
    )


# ---- how often -------------------------------------------------------------------------------------------------------


def test_the_number_of_paths_does_not_matter() -> None:
    """40 of 7^5 = 16807 paths, in steps of weights: each of 35 candidates of one class that runs, once."""
    model, counter = supernet(5, 7).train(), CompileCounterWithBackend("eager")
    ran = set()
    with compiled(model, {"backend": counter}) as compilations:
        for seed in range(40):
            weight_step(model, UniformPath(), seed)
            ran |= {f"{i}.candidates.{model[i].drawn}" for i in range(1, 6)}
    assert len(pieces(model)) == 35
    assert len(ran) > 30
    assert {path for path, count in compilations.by_piece.items() if count} == ran
    assert counter.frame_count == compilations.total == len(ran)
    assert str(compilations) == f"35 pieces, compiled {len(ran)} times, one of them at most 1 times"


@pytest.mark.parametrize(
    ("weights", "alphas", "each"),
    # Steps of alphas: the active candidate with frozen weights; others in the backward pass, without gradient.
    [
        (BinaryGates(1), BinaryGates(2), 3),
        (GumbelSoftmax(hard=True), GumbelSoftmax(hard=True), 3),
        (Softmax(), Softmax(), 2),
    ],
)
def test_steps_of_alphas(weights: Sampler, alphas: Sampler, each: int) -> None:
    model, counter = supernet(2, 2).train(), CompileCounterWithBackend("eager")
    with compiled(model, {"backend": counter}) as compilations:
        for seed in range(12):
            weight_step(model, weights, seed)
            arch_step(model, alphas, seed)
    assert compilations.by_piece == {f"{i}.candidates.{k}": each for i in (1, 2) for k in (0, 1)}
    assert counter.frame_count == compilations.total == 4 * each


def phases(model: Any, counts: Compilations, sampler: Sampler, n: int) -> list[int]:
    """Compilations of one piece at most, after warm-up, search and fine-tuning of a network with masks."""
    most = []
    for nas in (False, True, False):
        model._set_learning(nas=nas, net=True)
        for seed in range(n):
            scatter(model, seed)
            set_sampler(model.choices, sampler)
            draw(model.choices, torch.Generator().manual_seed(seed))
            _step(model, 4)
            if nas and model.choices:
                arch_step(model, sampler, seed)
        most.append(counts.most)
    return most


def test_masks_are_compiled_once_for_what_learns() -> None:
    model = PIT(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), (6,), cost="params")
    counter = CompileCounterWithBackend("eager")
    with compiled(model.train(), {"backend": counter}) as compilations:
        assert phases(model, compilations, Softmax(), 3) == [1, 2, 2]
    assert compilations.by_piece == {"PIT": 2}
    assert counter.frame_count == 2


@pytest.mark.parametrize(("sampler", "each"), [(Softmax(), 2), (BinaryGates(2), 4)])
def test_masks_and_choices(sampler: Sampler, each: int) -> None:
    """Masked tensors stand in the places of parameters: to a piece they are the same kind of thing in every step."""
    candidates = [nn.Sequential(nn.Linear(6, n), nn.ReLU(), nn.Linear(n, 6)) for n in (4, 7)]
    body = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), LayerChoice(candidates), nn.Linear(6, 3))
    model, counter = PIT(body, (6,), cost="params").train(), CompileCounterWithBackend("eager")
    with compiled(model, {"backend": counter}) as compilations:
        phases(model, compilations, sampler, 8)
    trunk = min(each, 2)  # its output is always needed
    assert compilations.by_piece == {"0": trunk, "1.candidates.0": each, "1.candidates.1": each}
    assert counter.frame_count == trunk + 2 * each


def test_a_supernet_of_candidates() -> None:
    body = nn.Sequential(LayerChoice([Block(), Block()], label="c"), nn.Linear(6, 3))
    model = SuperNet(body, (6,), cost="params").train()
    with compiled(model, "eager") as compilations:
        for seed in range(6):
            arch_step(model, BinaryGates(2), seed)
    assert compilations.by_piece == {"0.candidates.0": 2, "0.candidates.1": 2}


class Many(nn.Module):
    """Nested choices, a row of blocks, one candidate in two choices, a choice of inputs, and a function."""

    def __init__(self) -> None:
        super().__init__()
        shared = Block()
        self.stem = Block()
        self.outer = LayerChoice([nn.Sequential(Block(), LayerChoice([Block(), nn.Linear(6, 6)], label="in")), shared])
        self.again = LayerChoice({"shared": shared, "relu": torch.relu}, label="again")
        self.row = Repeat(lambda i: Block(), depth=(1, 3), label="row")
        self.inputs = InputChoice(n_candidates=2, n_chosen=1, label="inputs")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.row(self.again(self.outer(x)))
        return self.inputs([x, y])


def test_pieces_of_all_mutables() -> None:
    model, counter = Many().train(), CompileCounterWithBackend("eager")
    found = ["stem", "outer.candidates.0.0", "outer.candidates.0.1.candidates.0", "outer.candidates.1"]
    assert list(pieces(model)) == [*found, "row.blocks.0", "row.blocks.1", "row.blocks.2"]
    with compiled(model, {"backend": counter}) as compilations:
        for seed in range(20):
            weight_step(model, BinaryGates(1), seed)
    assert set(compilations.by_piece.values()) == {1}
    assert counter.frame_count == 7


def test_evaluation_and_other_sizes() -> None:
    """In eval mode nothing is compiled. In train mode a second size is compiled once, and then any."""
    model, counter = supernet(1, 1), CompileCounterWithBackend("eager")
    with compiled(model, {"backend": counter}) as compilations:
        for n in range(2, 8):
            model.eval()(torch.ones(n, 6)).sum().backward()
    assert (compilations.total, counter.frame_count) == (0, 0)
    model.train()
    with compiled(model, {"backend": counter}) as compilations:
        found = [(weight_step(model, UniformPath(), 0, n=n), compilations.total)[1] for n in (4, 4, 5, 6, 7, 4)]
    assert found == [1, 1, 2, 2, 2, 2]


def test_without_what_is_new_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch 2.6 the cache of a code object, which is for 8 graphs, cannot be divided; here are 10 candidates."""
    real = torch.compile

    def earlier(
        model: Any,
        *,
        fullgraph: bool = False,
        dynamic: bool | None = None,
        backend: Any = "inductor",
        mode: str | None = None,
        options: Any = None,
        disable: bool = False,
    ) -> Any:
        return real(model, fullgraph=fullgraph, dynamic=dynamic, backend=backend, mode=mode, options=options)

    monkeypatch.setattr(torch, "compile", earlier)
    model, counter = supernet(1, 10).train(), CompileCounterWithBackend("eager")
    with compiled(model, {"backend": counter}) as compilations:
        for _ in range(2):
            weight_step(model, Softmax(), 0)
    assert set(compilations.by_piece.values()) == {1}
    assert counter.frame_count == 10


# ---- that it is the same ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_search_is_the_same(dtype: torch.dtype) -> None:
    model = Many().to(dtype).train()
    other = copy.deepcopy(model)
    with compiled(model, "aot_eager") as compilations:
        for seed in range(2):
            assert close(weight_step(model, BinaryGates(1), seed), weight_step(other, BinaryGates(1), seed))
            assert close(arch_step(model, BinaryGates(2), seed), arch_step(other, BinaryGates(2), seed))
    assert compilations.total >= 8
    assert close(list(model.state_dict().values()), list(other.state_dict().values()))


@pytest.mark.parametrize(("with_choices", "blocks"), [(False, []), (False, ["0", "1"]), (True, ["0", "1"])])
def test_masked_networks_are_the_same(with_choices: bool, blocks: list[str]) -> None:
    """Also with blocks that are recomputed."""
    middle: nn.Module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 6))
    middle = LayerChoice([middle, nn.Linear(8, 6)], label="c") if with_choices else middle
    body = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()), middle, nn.Linear(6, 3))
    model = PIT(body.double(), (6,), cost="params").train()
    scatter(model)
    other, steps = copy.deepcopy(model), []
    for each, options, of_each in ((other, None, []), (model, "aot_eager", blocks)):
        torch.manual_seed(0)
        with compiled(each, options), recomputed(each, of_each):
            steps.append([weight_step(each, BinaryGates(1), 0), arch_step(each, BinaryGates(2), 1)])
    assert all(close(one, two) for one, two in zip(*steps, strict=True))
    assert close(list(model.state_dict().values()), list(other.state_dict().values()))


def test_recomputed_blocks_keep_less_in_compiled_networks() -> None:
    parts = [nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Sigmoid()) for _ in range(2)]
    model = PIT(nn.Sequential(*parts, nn.Linear(6, 3)).double(), (6,), cost="params").train()
    kept: dict[int, Tensor] = {}

    def number(blocks: list[str]) -> int:
        """Activations that are kept."""
        kept.clear()
        with (
            recomputed(model, blocks),
            compiled(model, "aot_eager"),
            torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(id(t), t), lambda t: t),
        ):
            model(torch.rand(500, 6, dtype=torch.float64))
        return len([t for t in kept.values() if t.shape == (500, 6)])

    # Of each tanh and sigmoid the result; or the inputs of the blocks, and that of the last layer.
    assert number(["0", "1"]) <= 3 < 4 <= number([])


def test_inductor() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU()).train()
    expected = _step(model, 4)
    with compiled(model, True) as compilations:
        found = _step(model, 4)
    assert close(found, expected)
    assert compilations.by_piece == {"Sequential": 1}


# ---- what is left of it ----------------------------------------------------------------------------------------------


def test_all_is_put_back() -> None:
    model = Many()
    set_sampler(model, UniformPath())
    draw(model)
    model.stem.compile(backend="eager")
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(TypeError), compiled(model, "eager"):
        model(torch.ones(2, 6)) + "no tensor"
    assert [dict(vars(module)) for module in model.modules()] == before


def _through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("take", [copy.deepcopy, copied, _through_a_file])
def test_copies_in_the_middle_are_not_compiled(take: Callable[[nn.Module], nn.Module]) -> None:
    """Of a torch.fx graph too, which copies all that it holds."""
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    model = nn.Sequential(nn.Linear(6, 6), LayerChoice([Block(), graph], label="c"))
    keys = list(model.state_dict())
    with compiled(model.train(), "eager") as compilations:
        weight_step(model, Softmax(), 0)
        assert compilations.by_piece == {"1.candidates.0": 1, "1.candidates.1": 1}
        assert list(model.state_dict()) == keys
        other = take(model)
        assert [m for m in other.modules() if getattr(m, "_compiled_call_impl", None) is not None] == []
        nn.init.zeros_(model[1][1].get_submodule("0").weight)
        assert other[1][1].get_submodule("0").weight.abs().sum() > 0
        assert not close(weight_step(other, Softmax(), 0), weight_step(model, Softmax(), 0))
        assert compilations.total == 2


def test_an_export_in_the_middle() -> None:
    model = PIT(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (6,), cost="params").train()
    with compiled(model, "eager") as compilations:
        _step(model, 4)
        scatter(model)
        small = model.export()
    assert compilations.total == 1
    assert {type(m).__module__.split(".")[0] for m in small.modules()} == {"torch"}
    assert sum(p.numel() for p in small.parameters()) == model.hard_cost("params")


def test_nothing() -> None:
    for options in (None, False):
        with compiled(nn.Linear(1, 1), options) as compilations:
            assert compilations.by_piece == {}


# ---- options and errors ----------------------------------------------------------------------------------------------


def test_options() -> None:
    given = {"mode": "max-autotune-no-cudagraphs", "dynamic": False}
    assert compile_arguments(given) == given
    counter = CompileCounterWithBackend("eager")
    assert compile_arguments({"backend": counter}) == {"backend": counter}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ("inducto", ConfigurationError, r"no backend 'inducto'; torch knows \[.*'inductor'.*'eager', 'aot_eager'\]"),
        ({"beckend": "eager"}, ConfigurationError, r"is given \['backend', 'mode'.*got \['beckend'\]"),
        ({"mode": "fast"}, ConfigurationError, r"no mode 'fast'; inductor has \['default'"),
        ({"mode": "default", "options": {}}, ConfigurationError, "takes one of them"),
        ({"backend": 3}, InputTypeError, "backend=3"),
        (3, InputTypeError, "compile=3: True, the name of a backend"),
    ],
)
def test_options_that_are_none(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compile_arguments(options)


@pytest.mark.parametrize(
    "options",
    [{"mode": "reduce-overhead"}, {"backend": "cudagraphs"}, {"options": {"triton.cudagraphs": True}}],
)
def test_recorded_graphs_of_paths(options: Mapping[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="CUDA graphs are recorded anew"), compiled(supernet(1, 2), options):
        pass


def test_a_network_without_pieces() -> None:
    model = nn.Sequential(nn.Linear(2, 2), LayerChoice([nn.Linear(2, 2), nn.Identity()]))
    with pytest.raises(UnsupportedModelError, match="made of single layers"), compiled(model, "eager"):
        pass


def test_without_a_compiler() -> None:
    import torch._inductor.config as inductor

    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with (
        inductor.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(ConfigurationError, match=r"cannot compile for cpu here: .*It needs a C\+\+ compiler"),
        compiled(model, True),
    ):
        pass
