"""What leaves a PIT search: ONNX files, architecture files, pickles; and the masked network under torch.compile."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from models import randomize
from pit_networks import SimpleNN, same, scatter, shapes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from oneshot import fixed
from oneshot.errors import ArchMismatchError
from oneshot.export import argmax_choices, export_onnx, read_arch, write_arch
from oneshot.pit import PIT
from oneshot.trainers import PITTrainer


class AroundNow(nn.Module):
    """Convolutions that see 5 samples back and 3 ahead: pads of unlike sides, as a module and as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.ConstantPad1d((5, 3), 0.5), nn.Conv1d(3, 8, 9), nn.BatchNorm1d(8), nn.ReLU())
        self.second = nn.Conv1d(8, 8, 9)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)  # (N, 8, T)
        x = x + self.second(F.pad(x, (5, 3)))
        return self.head(x.mean(2))


class SmallCNN(nn.Module):
    """A residual block, a depthwise convolution and a concatenation, on (N, 3, 12, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Sigmoid())
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.side = nn.Conv2d(8, 6, 1, stride=2)
        self.head = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.block(x)
        both = torch.cat([self.depthwise(x), self.side(x)], 1)  # (N, 14, 6, 6)
        return self.head(F.relu(both).mean((2, 3)))


def sequential(width: int = 6) -> nn.Sequential:
    """Nothing but classes of torch: 4 inputs, 5 samples of ``width`` channels each, 3 outputs."""
    return nn.Sequential(
        *(nn.Conv1d(4, width, 3, padding=1), nn.BatchNorm1d(width), nn.ReLU()),
        *(nn.Conv1d(width, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(40, 3)),
    )


def pruned(build: Callable[[], nn.Module], shape: tuple[int, ...], seed: int = 0) -> PIT:
    """Random weights and statistics, and random masks."""
    pit = PIT(randomize(build(), seed=seed), shape, cost="params").eval()
    scatter(pit, seed)
    return pit


# ---- ONNX ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("build", "shape"), [(SmallCNN, (3, 12, 12)), (AroundNow, (3, 20))])
def test_onnx_runtime_computes_what_the_masked_network_did(
    build: Callable[[], nn.Module], shape: tuple[int, ...], tmp_path: Path
) -> None:
    pit = pruned(build, shape)
    small, path = pit.export(), tmp_path / "net.onnx"
    assert all(after != before for after, before in zip(shapes(small).values(), shapes(build()).values(), strict=True))
    example, others = torch.randn(5, *shape), torch.randn(5, *shape)
    export_onnx(small, (example,), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for x in (example, others):  # the second was not there when the file was written
        (output,) = session.run(None, {"input0": x.numpy()})
        same(pit(x), torch.from_numpy(output), 1e-4)


@torch.no_grad()
def test_the_pads_of_an_onnx_file_are_those_of_the_cut_kernels(tmp_path: Path) -> None:
    """The newest 5 of 9 taps, every second of them: 3 taps whose oldest sees 4 samples less far back than before."""
    pit = pruned(AroundNow, (3, 20))
    pit.decide({**pit.arch(), "second.kernel_size": 5, "second.dilation": 2})
    small, x, path = pit.export(), torch.randn(2, 3, 20), tmp_path / "net.onnx"
    pad, conv = small.get_submodule("second").children()
    assert (pad.padding, conv.kernel_size, conv.dilation) == ((-4, 0), (3,), (2,))  # taps 4, 6 and 8
    export_onnx(small, (x,), path)
    kernels = {
        tuple(value.ints)
        for node in onnx.load(path).graph.node
        if node.op_type == "Conv"
        for value in node.attribute
        if value.name == "kernel_shape"
    }
    assert (3,) in kernels
    (output,) = onnxruntime.InferenceSession(path).run(None, {"input0": x.numpy()})
    np.testing.assert_allclose(output, pit(x), rtol=1e-3, atol=1e-5)


# ---- the architecture file -------------------------------------------------------------------------------------------


def written(pit: PIT, path: Path) -> Path:
    write_arch(path, pit, argmax_choices(pit), costs={"params": pit.get_cost("params").item()}, created_by={})
    return path


def equal_weights(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@torch.no_grad()
def test_an_arch_rebuilds_the_network_with_the_given_weights_or_fresh_ones(tmp_path: Path) -> None:
    pit = pruned(SimpleNN, (3, 40))
    path, small, x = written(pit, tmp_path / "arch.json"), pit.export(), torch.randn(2, 3, 40)

    # The weights of the search, whatever its masks are by now.
    scatter(pit, seed=7)
    assert pit.arch() != read_arch(path).arch
    again = fixed(pit, path)
    assert equal_weights(small, again)
    same(small(x), again.eval()(x), 1e-6)

    # Fresh weights: the same structure, cut out of another network of the same class.
    net = randomize(SimpleNN(), seed=1).eval()
    fresh = fixed(PIT(net, (3, 40)), path)
    assert str(fresh) == str(small)
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in small.parameters()]
    assert not equal_weights(fresh, small)
    expected = PIT(net, (3, 40)).eval()
    expected.decide(read_arch(path).arch)
    same(expected(x), fresh.eval()(x), 1e-5)
    assert sum(p.numel() for p in fresh.parameters()) == json.loads(path.read_text())["costs"]["params"]


def test_the_file_of_a_trainer(tmp_path: Path) -> None:
    """8 hidden units of 4 + 1 + 2 = 7 parameters and 2 biases: at most 23 are 3 of them."""
    torch.manual_seed(0)
    pit = PIT(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (4,), cost="params")
    x = torch.randn(64, 4)
    trainer = PITTrainer(
        pit,
        loss=nn.CrossEntropyLoss(),
        metrics=None,
        optimizer=torch.optim.SGD(pit.net_parameters(), 0.1),
        dataset=TensorDataset(x, (x[:, 0] > 0).long()),
        num_epochs=5,
        batch_size=8,
        workers=0,
        device="cpu",
        strength=1.0,
        targets={"params": 23},
        mask_learning_rate=0.05,
    )
    trainer.train()
    arch = trainer.export(tmp_path / "arch.json")
    assert list(arch) == ["0"]
    assert len(arch["0"]) <= 3
    small = fixed(pit, tmp_path / "arch.json")
    assert equal_weights(small, trainer.export_model())
    assert torch.equal(small.get_parameter("0.weight"), pit.network.get_parameter("0.weight")[arch["0"]])
    fresh = fixed(PIT(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (4,)), tmp_path / "arch.json")
    assert str(fresh) == str(small)
    assert not equal_weights(fresh, small)
    assert 7 * len(arch["0"]) + 2 == sum(p.numel() for p in fresh.parameters())


@pytest.mark.parametrize(
    ("label", "decision", "message"),
    [
        ("0", [0, 6], r"units \[0, 6\] cannot be kept; needed are different integers from 0 to 5"),
        ("0", [], "at least one"),
        ("0", [1, 1], "different integers"),
        ("0", "all", "different integers"),
        ("0", [True], "different integers"),
        ("0.kernel_size", 0, r"size 0, allowed are \[1, 2, 3\]"),
        ("0.kernel_size", [1], r"size \[1\], allowed are"),
        ("3.dilation", 3, r"dilation 3, allowed are \[1, 2\]"),
    ],
)
def test_a_decision_that_no_mask_can_take(label: str, decision: Any, message: str) -> None:
    pit = PIT(sequential(), (4, 5))
    before = pit.arch()
    for change in (pit.decide, lambda arch: fixed(pit, arch)):
        with pytest.raises(ArchMismatchError, match=message) as caught:
            change({**before, label: decision})
        assert repr(label) in str(caught.value)
    assert pit.arch() == before


def test_labels_too_few_or_too_many() -> None:
    pit = PIT(sequential(), (4, 5))
    arch = pit.arch()
    with pytest.raises(ArchMismatchError, match=r"missing labels \['3'\]"):
        fixed(pit, {label: of for label, of in arch.items() if label != "3"})
    with pytest.raises(ArchMismatchError, match=r"labels \['stem'\] that the model does not have"):
        fixed(pit, {**arch, "stem": [0]})


def test_the_file_of_another_network(tmp_path: Path) -> None:
    path = written(PIT(sequential(), (4, 5), cost="params"), tmp_path / "arch.json")
    with pytest.raises(ArchMismatchError, match=r"arch\.json: missing labels .*conv0.* and labels \['0', "):
        fixed(PIT(SimpleNN(), (3, 40)), path)
    # The same labels, and each decision could be taken: but eight channels of it were offered six.
    with pytest.raises(ArchMismatchError, match="the labels agree, what they offer does not"):
        fixed(PIT(sequential(8), (4, 5)), path)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def counters() -> Iterator[Any]:
    """torch's own counts of what it compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


# torch's compiler itself makes an object of every autograd function that it follows, and warns of that.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("build", "shape"), [(SmallCNN, (3, 12, 12)), (AroundNow, (3, 20))])
def test_a_compiled_network_is_not_compiled_again_for_other_masks(
    build: Callable[[], nn.Module], shape: tuple[int, ...], counters: Any
) -> None:
    pit, x = PIT(randomize(build(), seed=0), shape, cost="params").train(), torch.randn(4, *shape)
    compiled = torch.compile(pit, backend="aot_eager")
    compiled(x).square().sum().backward()
    frames, graphs = dict(counters["frames"]), counters["stats"]["unique_graphs"]
    assert graphs >= 1
    for seed in range(3):
        scatter(pit, seed)
        found = []
        for network in (pit, compiled):
            pit.zero_grad()
            output = network(x)
            output.square().sum().backward()
            found.append([output.detach(), *(p.grad.clone() for p in pit.parameters() if p.grad is not None)])
        assert len(found[0]) == len(found[1]) > 1
        for eager, other in zip(*found, strict=True):
            assert (eager - other).abs().max() <= 1e-4 * (1 + eager.abs().max())
    assert (dict(counters["frames"]), counters["stats"]["unique_graphs"]) == (frames, graphs)
    assert not counters["graph_break"]


# ---- pickles ---------------------------------------------------------------------------------------------------------

CLEAN_PROCESS = """
import sys

sys.modules["oneshot"] = sys.modules["search_spaces"] = None  # importing them is an error from here on
import torch

torch.set_num_threads(1)
try:
    import oneshot
except ImportError:
    pass
else:
    raise SystemExit("oneshot could be imported")
small = torch.load("small.pt", weights_only=False)
x, expected = torch.load("output.pt")
assert torch.equal(small(x), expected)
assert not [name for name in sys.modules if name.startswith("oneshot.")]
print(type(small).__name__, [tuple(p.shape) for p in small.parameters()][0])
"""


@torch.no_grad()
def test_a_pickled_export_needs_torch_alone(tmp_path: Path) -> None:
    pit, x = pruned(sequential, (4, 5)), torch.randn(3, 4, 5)
    pit.decide({**pit.arch(), "0": [1, 4], "0.kernel_size": 2, "0.dilation": 1})
    small = pit.export().eval()
    torch.save(small, tmp_path / "small.pt")
    torch.save((x, small(x)), tmp_path / "output.pt")
    same(pit(x), small(x), 1e-5)
    assert b"oneshot" not in (tmp_path / "small.pt").read_bytes()
    # -I: neither the working folder nor PYTHONPATH are on the path.
    done = subprocess.run(
        [sys.executable, "-I", "-c", CLEAN_PROCESS], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(" ", 1)[1] == "(2, 4, 2)\n"
