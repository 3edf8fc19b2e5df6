"""The fixed model against the search model pinned to the same choices, in float64, on spaces made at random."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from itertools import count, islice, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from oneshot import (
    BinaryGates,
    InputChoice,
    LayerChoice,
    OnePath,
    Repeat,
    as_graph,
    decisions,
    draw,
    fixed,
    fixed_arch,
    load_fixed,
    set_sampler,
)
from oneshot.errors import ArchMismatchError, ExportError, UnsupportedModelError
from oneshot.export import arch_of, fingerprint, verified_fixed, write_arch
from oneshot.graph import evaluated

WIDTH = 3


# ---- spaces made at random -----------------------------------------------------------------------------------------


class Merge(nn.Module):
    """Branches of which some are chosen; (N, 3) -> (N, 3) whatever the reduction."""

    def __init__(
        self, branches: list[nn.Module], n_chosen: int | None, reduction: Any, named: bool, label: Any
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.names = [f"b{i}" for i in range(len(branches))] if named else None
        n = None if named else len(branches)
        self.choice = InputChoice(n, self.names, n_chosen, reduction, label)
        self.after = nn.Linear(WIDTH * n_chosen, WIDTH) if reduction == "concat" and n_chosen else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        outputs = [branch(x) for branch in self.branches]
        y = self.choice(outputs if self.names is None else dict(zip(self.names, outputs, strict=True)))
        return torch.stack(y).prod(0) if isinstance(y, list) else self.after(y)


def shared() -> nn.Module:
    return LayerChoice([nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh()], label="shared")


LEAVES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "block": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.PReLU()),
    "identity": nn.Identity,
    "dropout": lambda: nn.Dropout(0.5),
    "shared": shared,
}

trees = st.recursive(
    st.sampled_from(sorted(LEAVES)),
    lambda inner: st.tuples(
        st.sampled_from(["row", "list", "names", "repeat", "sum", "mean", "concat", "none", "any"]),
        st.lists(inner, min_size=1, max_size=3),
        st.booleans(),
        st.integers(0, 2),
    ),
    max_leaves=9,
)


def built(tree: Any, numbers: Iterator[int]) -> nn.Module:
    if isinstance(tree, str):
        return LEAVES[tree]()
    kind, children, labelled, size = tree
    modules = [built(child, numbers) for child in children]
    label = f"label {next(numbers)}" if labelled else None
    if kind == "row":
        return nn.Sequential(*modules)
    if kind == "list":
        return LayerChoice(modules, label)
    if kind == "names":
        return LayerChoice({f"c{i}": module for i, module in enumerate(modules)}, label)
    if kind == "repeat":
        return Repeat(modules, (min(size, len(modules)), len(modules)), label)
    n_chosen = None if kind == "any" else min(size + 1, len(modules))
    return Merge(modules, n_chosen, "mean" if kind == "any" else kind, size == 2, label)


def network(tree: Any) -> nn.Module:
    """With random weights, and random statistics in its BatchNorms, in float64 and train mode."""
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), built(tree, count())).double()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.copy_(torch.randn(WIDTH))
                module.running_var.copy_(torch.rand(WIDTH) + 0.5)
    return net


def some_choices(net: nn.Module, most: int) -> list[dict[str, int]]:
    """All architectures, or some of them spread over all, the last one included."""
    sizes = {label: len(d.options) for label, d in decisions(net).items()}
    n = 1
    for size in sizes.values():
        n *= size
    step = max(1, n // most)
    rows = islice(product(*(range(size - 1, -1, -1) for size in sizes.values())), 0, None, step)
    return [dict(zip(sizes, row, strict=True)) for row in islice(rows, most)]


def pinned_output(net: nn.Module, choices: dict[str, int], x: Tensor) -> Tensor:
    with evaluated(net):
        for label, decision in decisions(net).items():
            decision.set_sampler(OnePath(choices[label]))
        return net(x)


def file_of(net: nn.Module, choices: dict[str, int]) -> dict[str, Any]:
    """What a file holds, by way of JSON."""
    arch = {"format": "oneshot-arch", "version": 1, "space": fingerprint(net), "arch": arch_of(net, choices)}
    return json.loads(json.dumps(arch))


def library_classes(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if type(module).__module__.split(".")[0] == "oneshot"]


@settings(deadline=None, max_examples=40)
@given(trees, st.integers(0, 99))
def test_the_fixed_model_is_the_pinned_search_model(tree: Any, seed: int) -> None:
    torch.manual_seed(seed)
    net = network(tree)
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    for choices in some_choices(net, 4):
        expected = pinned_output(net, choices, x)
        plain = fixed(net, file_of(net, choices))
        assert library_classes(plain) == []
        assert all(module.training for module in plain.modules())
        got = plain.eval()(x)
        assert torch.allclose(got, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
        own = {id(p) for p in plain.parameters()} | {id(b) for b in plain.buffers()}
        assert not own & ({id(p) for p in net.parameters()} | {id(b) for b in net.buffers()})
        verified_fixed(net, choices, [(x,)])


@settings(deadline=None, max_examples=40)
@given(trees)
def test_a_model_built_under_fixed_arch_is_the_same_network(tree: Any) -> None:
    """Same module classes, same state, same output; of the labelled mutables nothing else was kept."""
    net = network(tree)
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    for choices in some_choices(net, 3):
        expected = fixed(net, file_of(net, choices)).eval()
        with fixed_arch(file_of(net, choices)):
            small = network(tree)
        if not decisions(small):
            continue
        undecided = [d for d in decisions(small).values() if d.members[0].decided is None]
        assert all(d.members[0].label is None for d in undecided)
        plain = fixed(small).eval()
        assert library_classes(plain) == []
        assert [type(m).__qualname__ for m in plain.modules()] == [type(m).__qualname__ for m in expected.modules()]
        plain.load_state_dict(expected.state_dict())
        assert torch.equal(plain(x), expected(x))
        if not undecided:
            small.load_state_dict(renamed(small, expected))
            assert torch.equal(small.eval()(x), expected(x))


def renamed(small: nn.Module, plain: nn.Module) -> dict[str, Tensor]:
    """The state of the plain network under the names of the decided one: both list the same tensors in order."""
    return dict(zip(small.state_dict(), plain.state_dict().values(), strict=True))


# ---- one space by hand ---------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Weights: stem 3 * 3 + 3 = 12; op 12 or 3 * 5 + 5 + 5 * 3 + 3 = 38 or 0; each of 1 to 3 blocks 12."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 3)
        wide = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
        self.op = LayerChoice({"thin": nn.Linear(3, 3), "wide": wide, "skip": nn.Identity()}, label="op")
        self.merge = InputChoice(2, n_chosen=2, reduction="mean", label="merge")
        self.deep = Repeat(lambda i: nn.Linear(3, 3), (1, 3), label="deep")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.deep(self.merge([x, self.op(x)]))


ARCH = {"op": "wide", "merge": [0, 1], "deep": 2}
CHOICES = {"op": 1, "merge": 0, "deep": 1}


def n_weights(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def snapshot(net: nn.Module) -> list[Any]:
    """Everything about a model that an export must leave as it is."""
    return [
        {name: (id(t), t.tolist()) for name, t in net.state_dict(keep_vars=True).items()},
        [
            (id(m), type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)))
            for m in net.modules()
        ],
        [(d.sampler, d.drawn, d.alpha.grad is None) for d in decisions(net).values()],
        [p.requires_grad for p in net.parameters()],
        torch.random.get_rng_state().tolist(),
    ]


def test_only_what_was_chosen_is_there() -> None:
    plain = fixed(Net(), ARCH)
    assert n_weights(plain) == 12 + 38 + 2 * 12
    assert isinstance(plain.op, nn.Sequential)
    assert isinstance(plain.deep, nn.Sequential)
    assert len(plain.deep) == 2
    assert list(plain.state_dict()) == [
        *("stem.weight", "stem.bias", "op.0.weight", "op.0.bias", "op.1.weight", "op.1.bias"),
        *("deep.0.weight", "deep.0.bias", "deep.1.weight", "deep.1.bias"),
    ]
    assert isinstance(fixed(Net(), {**ARCH, "op": "skip"}).op, nn.Identity)
    assert isinstance(fixed(LayerChoice([nn.ReLU(), nn.Tanh()]), {"root": 1}), nn.Tanh)


def test_weights_are_copies_and_the_search_model_is_left_alone() -> None:
    net = Net()
    set_sampler(net, BinaryGates(2))
    draw(net)
    net.deep.eval()
    net.merge.eval()
    net.stem.weight.requires_grad_(False)
    x = torch.randn(2, 3)
    net(x).sum().backward()
    before = snapshot(net)
    plain = verified_fixed(net, CHOICES, [(x,)])
    assert snapshot(net) == before
    assert not plain.stem.weight.requires_grad
    assert all(p.grad is None for p in plain.parameters())
    assert [plain.training, plain.op.training, plain.deep.training, plain.merge.training] == [True, True, False, False]
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(1)
    assert snapshot(net) == before
    weights = [p.detach().clone() for p in plain.parameters()]
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    assert all(torch.equal(a, b) for a, b in zip(weights, plain.parameters(), strict=True))


def test_modules_that_are_shared_stay_shared() -> None:
    one = nn.Linear(3, 3)
    net = nn.Sequential(one, LayerChoice([nn.Sequential(one), nn.Identity()], label="a"), LayerChoice([one, one], "b"))
    plain = fixed(net, {"a": 0, "b": 1})
    assert plain[0] is plain[1][0]
    assert plain[0] is plain[2]
    assert plain[0] is not one


def test_a_choice_that_stands_in_two_places() -> None:
    """Registered before the candidate that holds it, and after it."""
    for order in (True, False):
        inner = LayerChoice([nn.Linear(3, 3), nn.Tanh()], label="inner")
        outer = LayerChoice([nn.Sequential(inner), nn.Identity()], label="outer")
        net = nn.Sequential(inner, outer) if order else nn.Sequential(outer, inner)
        plain = fixed(net, {"inner": 1, "outer": 0})
        assert library_classes(plain) == []
        assert [type(m) for m in plain.modules() if not list(m.children())] == [nn.Tanh]


def test_load_fixed_builds_and_fixes(tmp_path: Path) -> None:
    net = Net()
    write_arch(tmp_path / "arch.json", net, CHOICES, costs={}, created_by={})
    plain = load_fixed(Net, tmp_path / "arch.json")
    assert n_weights(plain) == 12 + 38 + 2 * 12
    plain.load_state_dict(fixed(net, tmp_path / "arch.json").state_dict())
    x = torch.randn(2, 3)
    assert torch.allclose(plain(x), pinned_output(net, CHOICES, x))


# ---- fixed_arch ----------------------------------------------------------------------------------------------------


def test_fixed_arch_keeps_only_the_chosen_candidates() -> None:
    with fixed_arch(ARCH):
        small = Net()
    assert n_weights(small) == 12 + 38 + 2 * 12
    assert [m.decided for m in (small.op, small.merge, small.deep)] == [1, 0, 1]
    assert all(m.alpha is None for m in (small.op, small.merge, small.deep))
    x = torch.randn(2, 3)
    assert torch.equal(fixed(small)(x), small(x))
    assert torch.equal(fixed(small, ARCH)(x), small(x))
    assert n_weights(Net()) == 12 + 12 + 38 + 3 * 12 + 3 + 1 + 3


def test_blocks_that_are_left_out_know_their_labels() -> None:
    def deep() -> Repeat:
        return Repeat(lambda i: LayerChoice([nn.Linear(3, 3), nn.Identity()], label=f"block {i}"), (1, 3), "depth")

    search = nn.Sequential(deep())
    arch = {"format": "oneshot-arch", "version": 1, "space": fingerprint(search)}
    arch["arch"] = {"depth": 2, "block 0": 1, "block 1": 0, "block 2": 0}
    with fixed_arch(arch):
        small = nn.Sequential(deep())
    assert n_weights(small) == 12
    assert [type(m) for m in fixed(small)[0]] == [nn.Identity, nn.Linear]


def test_a_model_built_under_fixed_arch_is_fixed_to_that_arch_only() -> None:
    with fixed_arch(ARCH):
        small = Net()
    with pytest.raises(ArchMismatchError, match=r"deep is 3, but the model was built under fixed_arch, where it is 2"):
        fixed(small, {**ARCH, "deep": 3})


def mixed() -> nn.Module:
    """With a label and without one, and one inside a candidate."""
    inner = LayerChoice([nn.Linear(3, 3), nn.Identity()])
    return nn.Sequential(
        LayerChoice([nn.Sequential(inner), nn.Linear(3, 3)], label="a"), LayerChoice([nn.ReLU(), nn.Tanh()])
    )


def test_mutables_without_a_label_are_resolved_by_fixed() -> None:
    arch = {"a": 0, "0.candidates.0.0": 1, "1": 1}
    with fixed_arch(arch):
        small = mixed()
    assert n_weights(small) == 12 + 2 + 2
    plain = fixed(small)
    assert [type(m) for m in plain.modules() if not list(m.children())] == [nn.Identity, nn.Tanh]
    with fixed_arch({**arch, "a": 1}):
        small = mixed()
    assert [type(m) for m in fixed(small)] == [nn.Linear, nn.Tanh]


def test_a_path_that_was_left_out_of_what_was_left_out() -> None:
    """``b`` drops the mutable without a label, and ``a`` drops ``b``."""

    def nested() -> nn.Module:
        inner = LayerChoice([nn.ReLU(), nn.Tanh()])
        b = LayerChoice([nn.Sequential(inner), nn.Identity()], label="b")
        return nn.Sequential(LayerChoice([nn.Sequential(b), nn.Sigmoid()], label="a"))

    choices = {"a": 1, "b": 1, "0.candidates.0.0.candidates.0.0": 1}
    arch = file_of(nested(), choices)
    assert list(arch["arch"]) == list(choices)
    with fixed_arch(arch):
        small = nested()
    assert list(decisions(small)) == ["a"]
    assert [type(m) for m in fixed(small)] == [nn.Sigmoid]


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ({"a": 0, "1": 1}, r"missing labels \['0.candidates.0.0'\]"),
        ({"a": 1, "0.candidates.0.0": 1, "1": 1, "2": 0}, r"labels \['2'\] that the model does not have"),
        ({"a": 1, "0.candidates.0.1": 1, "1": 1}, r"labels \['0.candidates.0.1'\] that the model does not have"),
        ({"a": 0, "0.candidates.0.0": 2, "1": 1}, "0.candidates.0.0: the arch says 2"),
    ],
)
def test_labels_that_only_fixed_can_check(arch: dict[str, Any], words: str) -> None:
    with fixed_arch(arch):
        small = mixed()
    with pytest.raises(ArchMismatchError, match=words):
        fixed(small)


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ({"op": "wide", "deep": 2}, r"no decision for label 'merge'; it has \['op', 'deep'\]"),
        ({**ARCH, "other": 1, "more": 2}, r"labels \['other', 'more'\] that no mutable built here has"),
        ({**ARCH, "op": "huge"}, "op: the arch says 'huge'"),
        ({**ARCH, "deep": 0}, "deep: the arch says depth 0"),
        (
            {"format": "oneshot-arch", "version": 1, "space": "0" * 16, "arch": ARCH},
            "made for search space 0000000000000000",
        ),
    ],
)
def test_an_arch_of_something_else_is_an_error_of_fixed_arch(arch: dict[str, Any], words: str) -> None:
    with pytest.raises(ArchMismatchError, match=words), fixed_arch(arch):
        Net()
    assert Net().op.decided is None


def test_the_context_ends_with_its_block() -> None:
    with pytest.raises(ZeroDivisionError), fixed_arch(ARCH):
        1 / 0
    assert Net().op.decided is None
    with fixed_arch(ARCH):
        Net()
        with fixed_arch({**ARCH, "op": "skip"}):
            assert Net().op.decided == 2
        assert Net().op.decided == 1
    assert Net().op.decided is None


def test_the_context_does_not_reach_another_thread() -> None:
    found: list[Net] = []
    with fixed_arch(ARCH):
        thread = threading.Thread(target=lambda: found.append(Net()))
        thread.start()
        thread.join()
        assert Net().op.decided == 1
    assert found[0].op.decided is None


def test_fixed_without_an_arch_needs_one_context() -> None:
    with fixed_arch({"a": 0}):
        one = LayerChoice([nn.ReLU(), nn.Tanh()], label="a")
    with fixed_arch({"b": 0}):
        two = LayerChoice([nn.ReLU(), nn.Tanh()], label="b")
    for net in (Net(), nn.Linear(2, 2), nn.Sequential(one, two), nn.Sequential(one, Net())):
        with pytest.raises(ArchMismatchError, match="Pass the arch"):
            fixed(net)


# ---- the proof -----------------------------------------------------------------------------------------------------


class Perturbed(nn.Linear):
    """Its copy is off by a relative error."""

    error = 0.0

    def __deepcopy__(self, memo: dict[int, Any]) -> Perturbed:
        twin = Perturbed(self.in_features, self.out_features, dtype=self.weight.dtype)
        with torch.no_grad():
            twin.weight.copy_(self.weight * (1 + self.error))
            twin.bias.copy_(self.bias * (1 + self.error))
        memo[id(self)] = twin
        return twin


@pytest.mark.parametrize(
    ("dtype", "error", "is_found"),
    [
        (torch.float64, 1e-8, True),
        (torch.float64, 1e-10, False),
        (torch.float32, 1e-3, True),
        (torch.float32, 1e-5, False),
        (torch.bfloat16, 0.1, True),
        (torch.bfloat16, 0.0, False),
    ],
)
def test_a_difference_is_found_and_the_layer_named(
    dtype: torch.dtype, error: float, is_found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Perturbed, "error", error)
    block = nn.Sequential(nn.Linear(3, 3), Perturbed(3, 3), nn.Linear(3, 3))
    net = nn.Sequential(nn.Linear(3, 3), LayerChoice([nn.Identity(), block], label="a"), nn.Tanh()).to(dtype)
    examples = [(torch.zeros(1, 3, dtype=dtype),), (torch.randn(4, 3, dtype=dtype),)]
    before = snapshot(net)
    if not is_found:
        assert library_classes(verified_fixed(net, {"a": 1}, examples)) == []
        return
    with pytest.raises(ExportError, match=r"differs from the searched one by .*first layer that differs is '1.1'"):
        verified_fixed(net, {"a": 1}, examples)
    assert snapshot(net) == before
    verified_fixed(net, {"a": 0}, examples)


class LooksAt(nn.Module):
    def __init__(self, look: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.choice = LayerChoice([nn.Linear(3, 3), nn.Identity()], label="a")
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        return self.look(self.choice, x)


LOOKS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "fails": (lambda c, x: c(x) * len(c), "does not run where .* has no len.*differs is '1'"),
    "fails inside": (
        lambda c, x: c(x) if isinstance(c, LayerChoice) else c(x[:, :2]),
        "does not run where .*shapes cannot be multiplied.*differs is '1.choice'",
    ),
    "differs": (lambda c, x: c(x) * (2 if hasattr(c, "sampler") else 1), "differs from .*differs is '1'"),
    "shape": (lambda c, x: c(x) if hasattr(c, "sampler") else c(x)[:1], "differs .* by inf .*differs is '1'"),
    "dtype": (lambda c, x: c(x) if hasattr(c, "sampler") else c(x).double(), "differs .* by inf .*differs is '1'"),
    "nan": (lambda c, x: c(x) if hasattr(c, "sampler") else c(x) * torch.nan, "differs .* by inf .*differs is '1'"),
    "random": (lambda c, x: F.dropout(c(x), 0.5, training=True), "differs from .*differs is '1'"),
}


@pytest.mark.parametrize("case", LOOKS)
def test_a_forward_that_does_not_call_the_choice_alike(case: str) -> None:
    look, words = LOOKS[case]
    net, x = nn.Sequential(nn.Linear(3, 3), LooksAt(look), nn.Tanh()), torch.randn(4, 3)
    before = snapshot(net)
    with pytest.raises(ExportError, match=words):
        verified_fixed(net, {"a": 0}, [(x,)])
    assert snapshot(net) == before


def test_the_forward_of_the_network_itself() -> None:
    with pytest.raises(ExportError, match="not a module: the forward of the network itself"):
        verified_fixed(LooksAt(LOOKS["differs"][0]), {"a": 0}, [(torch.randn(4, 3),)])


def test_a_choice_whose_output_is_changed_in_place() -> None:
    """The plain identity is its input; the search model keeps them apart, as a sum of candidates does."""
    net = LooksAt(lambda c, x: F.relu_(c(x)) + x)
    x = torch.randn(4, 3)
    verified_fixed(net, {"a": 0}, [(x,)])
    with pytest.raises(ExportError, match="change the output of a choice in place"):
        verified_fixed(net, {"a": 1}, [(x,)])


def test_a_network_that_changes_its_input_gets_the_same_one_twice() -> None:
    net = LooksAt(lambda c, x: c(x.add_(1)))
    x = torch.zeros(2, 3)
    verified_fixed(net, {"a": 0}, [(x,)])
    assert x.tolist() == [[0.0] * 3] * 2


def test_outputs_that_are_not_finite_or_not_floating() -> None:
    net = LooksAt(lambda c, x: {"log": c(x).clamp_max(0).log(), "index": c(x).argmax(1), "y": [c(x)]})
    assert verified_fixed(net, {"a": 1}, [(torch.randn(4, 3),)]) is not None
    other = LooksAt(lambda c, x: (c(x), c(x).argmax(1) + hasattr(c, "sampler")))
    with pytest.raises(ExportError, match="by inf"):
        verified_fixed(other, {"a": 1}, [(torch.randn(4, 3),)])


class OwnCopy(LooksAt):
    def __deepcopy__(self, memo: dict[int, Any]) -> OwnCopy:
        return OwnCopy(self.look)


def test_networks_that_cannot_be_copied() -> None:
    with pytest.raises(ExportError, match=r"mutables \['choice'\] are still in the rebuilt network"):
        fixed(OwnCopy(lambda c, x: c(x)), {"a": 0})
    net = Net()
    net.kept = net.stem(torch.randn(1, 3))
    with pytest.raises(ExportError, match=r"Net cannot be copied: .*Do not keep results of a forward"):
        fixed(net, ARCH)


# ---- as a graph ----------------------------------------------------------------------------------------------------


class Forks(nn.Module):
    def __init__(self, fork: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.fork = fork

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if self.fork(x) else x


@pytest.mark.parametrize("fork", [lambda x: x.sum() > 0, lambda x: float(x.sum()) > 0, lambda x: x.sum().item() > 0])
def test_a_forward_that_depends_on_values_is_no_graph(fork: Callable[[Tensor], Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="Forks cannot be written as a graph"):
        as_graph(Forks(fork), (torch.ones(1, 3),))


def test_a_graph_that_took_the_other_way_is_an_error() -> None:
    """What is traced is no tensor, so the tracing goes the way that no run goes."""
    with pytest.raises(ExportError, match="the graph of Forks differs"):
        as_graph(Forks(lambda x: isinstance(x, Tensor)), (torch.ones(1, 3),))


def test_a_search_model_is_no_graph() -> None:
    with pytest.raises(UnsupportedModelError, match=r"\['op', 'merge', 'deep'\] are undecided choices"):
        as_graph(Net(), (torch.ones(1, 3),))


def test_a_graph_is_a_copy_in_eval_mode() -> None:
    class WithDropout(Net):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 0.5, self.training)

    plain = fixed(WithDropout(), ARCH)
    x = torch.randn(5, 3)
    graph = as_graph(plain, (x,))
    assert all(module.training for module in plain.modules())
    assert not any(module.training for module in graph.modules())
    expected = plain.eval()(x)
    assert torch.equal(graph(x), expected)
    assert list(graph.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        for p in graph.parameters():
            p.zero_()
    assert torch.equal(plain(x), expected)
