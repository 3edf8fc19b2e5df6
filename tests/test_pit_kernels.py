"""Kernels and dilations of PIT networks: which taps stay, and that the smaller convolution computes the same."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from pit_networks import SimpleNN, export_equal, put, same
from torch import Tensor, nn

from oneshot.cost import CostSpec
from oneshot.graph.dimensions import Dimension
from oneshot.mutables.masks import DilationMask, KernelMask
from oneshot.pit import PIT

# torch says so at the first even kernel with padding "same"; it is about speed.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

TAPS = CostSpec("taps", "tap").with_rule(nn.Conv1d, lambda layer: layer.kernel[0])


class Paddings(nn.Module):
    """Input (2, L): one kernel of K taps under each way of padding; each with outputs of its own."""

    def __init__(self, taps: int, dilation: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 2, 1)
        self.pad = nn.ConstantPad1d(((taps - 1) * dilation, 0), 0.0)
        self.causal, self.valid = (nn.Conv1d(2, 1, taps, dilation=dilation) for _ in range(2))
        self.same = nn.Conv1d(2, 1, taps, padding="same", dilation=dilation)
        self.integer = nn.Conv1d(2, 1, taps, padding=(taps + 1) // 2, dilation=dilation)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        return self.causal(self.pad(x)), self.valid(x), self.same(x), self.integer(x)


PADDED = ("causal", "valid", "same", "integer")


def paddings(taps: int, dilation: int = 1) -> tuple[PIT, Tensor]:
    length = 3 + 2 * (taps - 1) * dilation
    pit = PIT(Paddings(taps, dilation).double(), (2, length), cost=TAPS).eval()
    return pit, torch.randn(2, 2, length, dtype=torch.float64)


def steps(taps: int) -> int:
    return max(math.ceil(math.log2(taps)), 1) if taps > 1 else 1


@pytest.mark.parametrize("taps", range(1, 18))
def test_the_relaxed_kernel_starts_at_its_size(taps: int) -> None:
    pit, _ = paddings(taps)
    assert pit.cost.item() == 4 * taps + 1
    assert pit.soft_cost("taps").item() == pytest.approx(4 * taps + 1, rel=1e-6)


def combinations(taps: int) -> list[tuple[int, int]]:
    """(how many betas, how many gammas are off from the front): what any setting of on and off comes to.

    All of them up to 9 taps and for 17, a third of the kernel sizes for the others.
    """
    off = range(taps) if taps <= 9 or taps == 17 else [*range(taps % 3, taps, 3), taps - 1]
    return list(itertools.product(off, range(steps(taps))))


@torch.no_grad()
@pytest.mark.parametrize("taps", range(2, 18))
def test_masked_and_exported_compute_the_same(taps: int) -> None:
    """In float64, for every size and dilation; what stays of K taps lies a power of two apart, from the newest one."""
    pit, x = paddings(taps)
    for betas_off, gammas_off in combinations(taps):
        for name in PADDED:
            put(pit, f"{name}.kernel_size", [0.0] * betas_off + [1.0] * (taps - betas_off))
            put(pit, f"{name}.dilation", [0.0] * gammas_off + [1.0] * (steps(taps) - gammas_off))
        left = [j for j in range(taps) if j >= betas_off and (taps - 1 - j) % 2**gammas_off == 0]
        small: Any = pit.rebuilt(pit.arch(), None)
        same(pit(x), small(x), 1e-9)
        assert pit.cost.item() == 4 * len(left) + 1
        for name in PADDED:
            convs = [m for m in small.get_submodule(name).modules() if isinstance(m, nn.Conv1d)]
            assert len(convs) == 1
            assert convs[0].kernel_size == (len(left),)
            original = pit.network.get_parameter(f"{name}.weight")
            assert torch.equal(convs[0].weight, original[:, :, left])
            assert len(left) == 1 or convs[0].dilation == (2**gammas_off,)


@pytest.mark.parametrize("taps", [4, 5, 9])
def test_a_dilation_of_the_seed_is_multiplied(taps: int) -> None:
    pit, x = paddings(taps, dilation=3)
    for kernel, dilation in itertools.product(range(1, taps + 1, 2), (1, 2)):
        arch = pit.arch()
        for name in PADDED:
            arch |= {f"{name}.kernel_size": kernel, f"{name}.dilation": dilation}
        pit.decide(arch)
        small: Any = export_equal(pit, x)
        left = [j for j in range(taps) if j >= taps - kernel and (taps - 1 - j) % dilation == 0]
        convs = [m for m in small.modules() if isinstance(m, nn.Conv1d)][1:]
        assert [c.kernel_size for c in convs] == [(len(left),)] * 4
        assert [c.dilation for c in convs] == [(3 * dilation,)] * 4 or len(left) == 1


@pytest.mark.parametrize("taps", [*range(1, 10), 17])
def test_no_setting_of_the_masks_leaves_an_empty_kernel(taps: int) -> None:
    """Every gamma on or off, with every single beta on, none on and all on: the newest tap stays."""
    kernel, dilation = KernelMask(taps), DilationMask(taps)
    for gamma in itertools.product([0.0, 1.0], repeat=len(dilation.alpha)):
        with torch.no_grad():
            dilation.alpha.copy_(torch.tensor(gamma))
        for beta in [torch.zeros(taps), torch.ones(taps), *torch.eye(taps)]:
            with torch.no_grad():
                kernel.alpha.copy_(beta)
            taken = kernel.hard() * dilation.hard()
            assert taken[-1] == 1
            left = taken.nonzero().flatten().tolist()
            assert {b - a for a, b in itertools.pairwise(left)} <= {dilation.decision()}


def test_nine_taps_with_five_off_and_the_first_step_off() -> None:
    """Taps 6 and 8 are left: two of them, 2 apart."""
    net = nn.Sequential(nn.ConstantPad1d((8, 0), 0.0), nn.Conv1d(2, 3, 9)).double()
    pit = PIT(net, (2, 20))
    put(pit, "1.kernel_size", [0.0] * 5 + [1.0] * 4)
    put(pit, "1.dilation", [0, 1, 1, 1])
    product = pit.masks["1.kernel_size"].hard() * pit.masks["1.dilation"].hard()
    assert product.nonzero().flatten().tolist() == [6, 8]
    small: Any = export_equal(pit, torch.randn(2, 2, 20, dtype=torch.float64))
    (conv,) = [m for m in small.modules() if isinstance(m, nn.Conv1d)]
    assert (conv.kernel_size, conv.dilation) == ((2,), (2,))
    assert torch.equal(conv.weight, pit.network.get_parameter("1.weight")[:, :, [6, 8]])


@torch.no_grad()
def test_a_causal_pad_of_ones() -> None:
    """What a shorter kernel no longer reads may be anything."""
    net = nn.Sequential(nn.ConstantPad1d((8, 0), 1.0), nn.Conv1d(2, 3, 9)).double()
    pit, x = PIT(net, (2, 20)).eval(), torch.randn(2, 2, 20, dtype=torch.float64)
    for kernel, dilation in itertools.product((1, 4, 9), (1, 2, 4, 8)):
        pit.decide({"1.kernel_size": kernel, "1.dilation": dilation})
        same(pit(x), pit.rebuilt(pit.arch(), None)(x), 1e-9)


def test_everything_near_zero_keeps_one_channel_and_one_tap() -> None:
    net: Any = nn.Sequential(nn.Conv1d(3, 6, 5, padding=2), nn.ReLU(), nn.Conv1d(6, 2, 1)).double()
    pit = PIT(net, (3, 12), cost="params_no_norm")
    with torch.no_grad():
        for _, mask in pit.masks.items():
            mask.alpha.fill_(0.05)
    assert pit.arch() == {"0": [5], "0.kernel_size": 1, "0.dilation": 4}
    assert pit.cost.item() == (3 + 1) + (1 + 1) * 2
    small: Any = export_equal(pit, torch.randn(2, 3, 12, dtype=torch.float64))
    assert torch.equal(small[0][-1].weight, net[0].weight[5:, :, 4:])


def test_rows_columns_and_taps_of_a_small_network() -> None:
    """24 and 56 channels; taps 1, 2 of 3 and, 4 apart, taps 0, 4 of 5."""
    net: Any = SimpleNN().double()
    pit = PIT(net, (3, 40))
    put(pit, "conv0", [1.0, 1, 0, 1] * 8)
    put(pit, "conv0.kernel_size", [0, 1, 1])
    put(pit, "conv1", [1.0] * 55 + [0, 1])
    put(pit, "conv1.dilation", [0, 0, 1])
    small: Any = export_equal(pit, torch.randn(2, 3, 40, dtype=torch.float64))
    one, two = (m for m in small.modules() if isinstance(m, nn.Conv1d))
    rows0, rows1 = [i for i in range(32) if i % 4 != 2], [*range(55), 56]
    assert (one.out_channels, one.kernel_size, one.dilation) == (24, (2,), (1,))
    assert (two.out_channels, two.in_channels, two.kernel_size, two.dilation) == (56, 24, (2,), (4,))
    assert torch.equal(one.weight, net.conv0.weight[rows0][:, :, [1, 2]])
    assert torch.equal(two.weight, net.conv1.weight[rows1][:, rows0][:, :, [0, 4]])
    assert torch.equal(small.bn0.running_var, net.bn0.running_var[rows0])
    assert torch.equal(small.fc.weight, net.fc.weight.reshape(3, 57, 10)[:, rows1].flatten(1))


def test_the_kernel_of_a_strided_convolution_stays() -> None:
    """Also once everything that can learn is told to, and the cost alone is followed."""
    net = nn.Sequential(nn.Conv1d(3, 8, 5, stride=2, padding=2), nn.ReLU(), nn.Conv1d(8, 4, 3, padding=1)).double()
    pit = PIT(net, (3, 24))
    assert list(pit.masks) == ["0", "2.kernel_size", "2.dilation"]
    assert "stride" in pit.space.frozen[Dimension("0.weight", 2)]
    pit.train_nas_only()
    names = [name for name, p in pit.named_nas_parameters() if p.requires_grad]
    assert len(names) == 3
    with torch.no_grad():
        for _, mask in pit.masks.items():
            mask.alpha.zero_()
    small: Any = export_equal(pit, torch.randn(2, 3, 24, dtype=torch.float64))
    assert (small[0].kernel_size, small[0].stride) == ((5,), (2,))
    assert pit.arch()["2.kernel_size"] == 1
