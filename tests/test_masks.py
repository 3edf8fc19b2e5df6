"""Masks by hand: each formula against loops over its definition, each gradient against the sum it stands for.

theta^beta_j = sum_{i <= j} |beta_i|; theta^gamma_j = sum of |gamma_p| over the p with 2^p | K - 1 - j; the last entries
of beta and of gamma count as 1. A tap stays while both are above 0.5.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from oneshot.errors import ArchMismatchError, ConfigurationError
from oneshot.graph.dimensions import Dimension, Group
from oneshot.mutables.masked import MaskedConv1d, MaskedConv2d, MaskedConv3d, MaskedLinear
from oneshot.mutables.masks import (
    ChannelMask,
    DilationMask,
    KernelMask,
    Mask,
    dilation_count,
    dilation_scores,
    kept_units,
    kernel_scores,
    magnitude,
    octaves,
    straight_through,
)
from oneshot.pit.axes import ChannelAxis, KernelAxis, rings
from oneshot.pit.mask_set import MaskSet

LEVELS = st.sampled_from([0.0, 0.2, 0.3, 0.5, 0.50001, 0.7, 1.0])


# ---- the definitions, in loops ---------------------------------------------------------------------------------------


def steps_by_hand(taps: int) -> int:
    """The smallest G of at least 1 with 2^G >= K."""
    g = 1
    while 2**g < taps:
        g += 1
    return g


def kernel_by_hand(beta: list[float]) -> list[float]:
    sizes = [abs(b) for b in beta[:-1]] + [1.0]
    return [sum(sizes[: j + 1]) for j in range(len(beta))]


def divides(p: int, taps: int, j: int) -> bool:
    return (taps - 1 - j) % 2**p == 0


def dilation_by_hand(gamma: list[float], taps: int) -> list[float]:
    sizes = [abs(g) for g in gamma[:-1]] + [1.0]
    return [sum(size for p, size in enumerate(sizes) if divides(p, taps, j)) for j in range(taps)]


def kept_by_hand(theta: list[float], granularity: int) -> list[bool]:
    wanted = max(1, sum(t > 0.5 for t in theta))
    while wanted % granularity:
        wanted += 1
    order = sorted(range(len(theta)), key=lambda i: (theta[i], i), reverse=True)
    return [i in order[:wanted] for i in range(len(theta))]


# ---- functions -------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.lists(LEVELS, min_size=1, max_size=9), st.integers(1, 5)), min_size=1, max_size=5))
def test_kept_units_are_those_of_each_mask_alone(masks: list[tuple[list[float], int]]) -> None:
    theta = torch.tensor([t for alpha, _ in masks for t in alpha], dtype=torch.float64)
    segments = torch.tensor([i for i, (alpha, _) in enumerate(masks) for _ in alpha])
    granularity = torch.tensor([g for _, g in masks])
    got = kept_units(theta, segments, granularity, torch.ones_like(granularity)).tolist()
    assert got == [kept for alpha, g in masks for kept in kept_by_hand(alpha, g)]


def test_the_threshold_itself_is_off() -> None:
    one = torch.tensor([0])
    assert kept_units(torch.tensor([0.5, 0.51, 0.5]), torch.zeros(3, dtype=torch.int64), one + 1, one).tolist() == [
        False,
        True,
        False,
    ]
    assert straight_through(torch.tensor([0.5, 0.5000001, -3.0])).tolist() == [0, 1, 0]


def test_straight_through_hands_any_gradient_on() -> None:
    x = torch.tensor([-2.0, 0.2, 0.5, 0.8, 7.0], requires_grad=True)
    weights = torch.tensor([1.0, -2.0, 3.0, 4.0, 5.0])
    (straight_through(x) * weights).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weights)


def test_magnitude_has_a_slope_everywhere() -> None:
    alpha = torch.tensor([-1.5, -0.0, 0.0, 0.5], requires_grad=True)
    size = magnitude(alpha)
    assert size.tolist() == [1.5, 0, 0, 0.5]
    size.sum().backward()
    assert alpha.grad is not None
    assert alpha.grad.tolist() == [-1, 1, 1, 1]


@pytest.mark.parametrize("taps", range(1, 34))
def test_octaves(taps: int) -> None:
    assert octaves(taps) == steps_by_hand(taps)
    count = dilation_count(taps)
    assert count.shape == (octaves(taps), taps)
    assert count.tolist() == [[float(divides(p, taps, j)) for j in range(taps)] for p in range(octaves(taps))]
    assert bool((count.sum(0) >= 1).all())  # a step of 1 reaches every tap


@settings(max_examples=100, deadline=None)
@given(taps=st.integers(1, 33), seed=st.integers(0, 10_000))
def test_scores(taps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    beta = torch.randn(taps, generator=generator, dtype=torch.float64)
    gamma = torch.randn(octaves(taps), generator=generator, dtype=torch.float64)
    assert kernel_scores(beta).tolist() == pytest.approx(kernel_by_hand(beta.tolist()))
    assert dilation_scores(gamma, taps).tolist() == pytest.approx(dilation_by_hand(gamma.tolist(), taps))
    two = torch.stack([beta, 2 * beta])
    assert torch.equal(kernel_scores(two), torch.stack([kernel_scores(beta), kernel_scores(2 * beta)]))


@pytest.mark.parametrize(
    ("beta", "theta", "hard"),
    [
        ([0.25, 0.4, 0.4], [0.25, 0.65, 1.65], [0, 1, 1]),
        ([0, 0.1, 0.4], [0, 0.1, 1.1], [0, 0, 1]),
        ([0.2, 0.6, 0.7], [0.2, 0.8, 1.8], [0, 1, 1]),
    ],
)
def test_three_taps(beta: list[float], theta: list[float], hard: list[int]) -> None:
    assert kernel_scores(torch.tensor(beta)).tolist() == pytest.approx(theta)
    mask = KernelMask(3)
    set_alpha(mask, beta)
    assert mask.hard().tolist() == hard
    assert mask.decision() == sum(hard)


@pytest.mark.parametrize(
    ("gamma", "theta", "hard", "dilation"),
    [([0.2, 0.5], [1.2, 0.2, 1.2], [1, 0, 1], 2), ([0.6, 0.4], [1.6, 0.6, 1.6], [1, 1, 1], 1)],
)
def test_dilations_of_three_taps(gamma: list[float], theta: list[float], hard: list[int], dilation: int) -> None:
    assert dilation_scores(torch.tensor(gamma), 3).tolist() == pytest.approx(theta)
    mask = DilationMask(3)
    set_alpha(mask, gamma)
    assert mask.hard().tolist() == hard
    assert mask.decision() == dilation


# (taps, betas off, gammas off) -> the taps that stay.
TABLE = {
    (3, 0, 0): [0, 1, 2],
    (3, 1, 0): [1, 2],
    (3, 2, 0): [2],
    (3, 0, 1): [0, 2],
    (3, 1, 1): [2],
    (5, 0, 0): [0, 1, 2, 3, 4],
    (5, 0, 1): [0, 2, 4],
    (5, 0, 2): [0, 4],
    (5, 2, 0): [2, 3, 4],
    (5, 2, 1): [2, 4],
    (5, 2, 2): [4],
    (9, 0, 1): [0, 2, 4, 6, 8],
    (9, 0, 2): [0, 4, 8],
    (9, 0, 3): [0, 8],
    (9, 3, 1): [4, 6, 8],
    (9, 5, 1): [6, 8],
    (9, 4, 2): [4, 8],
    (9, 5, 2): [8],
    (4, 0, 1): [1, 3],  # from the newest tap on: 3, 1
    (8, 0, 2): [3, 7],
}


@pytest.mark.parametrize(("taps", "betas_off", "gammas_off"), list(TABLE))
def test_taps_that_stay(taps: int, betas_off: int, gammas_off: int) -> None:
    kernel, dilation = KernelMask(taps), DilationMask(taps)
    set_alpha(kernel, [0.0] * betas_off + [1.0] * (taps - betas_off))
    set_alpha(dilation, [0.0] * gammas_off + [1.0] * (octaves(taps) - gammas_off))
    left = (kernel.hard() * dilation.hard()).nonzero().flatten().tolist()
    assert left == TABLE[taps, betas_off, gammas_off]
    assert (kernel.decision(), dilation.decision()) == (taps - betas_off, 2**gammas_off)


@torch.no_grad()
def set_alpha(mask: Mask, alpha: list[float]) -> None:
    mask.alpha.copy_(torch.tensor(alpha))


# ---- single masks ----------------------------------------------------------------------------------------------------


def gradient(mask: Any, weights: list[float]) -> list[float]:
    """Of sum_j w_j hard_j by alpha."""
    mask.alpha.grad = None
    (mask.hard() * torch.tensor(weights)).sum().backward()
    found: list[float] = mask.alpha.grad.tolist()
    return found


def test_gradients_of_hard_masks() -> None:
    channel = ChannelMask(4)
    set_alpha(channel, [0.9, -0.8, 0.1, 0.0])
    assert channel.hard().tolist() == [1, 1, 0, 0]
    assert gradient(channel, [1, 2, 3, 4]) == [1, -2, 3, 4]
    kernel = KernelMask(4)
    set_alpha(kernel, [0.2, -0.1, 0.4, 0.9])
    # beta_i is in theta_i and all that follow: 1+2+3+4, -(2+3+4), 3+4; the newest always counts as 1.
    assert gradient(kernel, [1, 2, 3, 4]) == [10, -9, 7, 0]
    dilation = DilationMask(5)
    set_alpha(dilation, [0.1, -0.2, 0.4])
    # gamma_0 reaches every tap, gamma_1 taps 0, 2 and 4; the last always counts as 1.
    assert gradient(dilation, [1, 2, 3, 4, 5]) == [15, -9, 0]


@settings(max_examples=60, deadline=None)
@given(alpha=st.lists(LEVELS, min_size=1, max_size=9), granularity=st.integers(1, 5))
def test_channels_that_stay(alpha: list[float], granularity: int) -> None:
    mask = ChannelMask(len(alpha), granularity=granularity)
    set_alpha(mask, alpha)
    kept = kept_by_hand(mask.alpha.tolist(), granularity)
    assert mask.hard().tolist() == [float(k) for k in kept]
    assert mask.decision() == [i for i, k in enumerate(kept) if k]
    assert mask.soft().tolist() == pytest.approx(alpha)
    before = mask.decision()
    mask.decide(before)
    assert mask.decision() == before
    assert set(mask.alpha.tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("taps", range(1, 34))
def test_every_size_and_dilation_comes_back(taps: int) -> None:
    kernel, dilation = KernelMask(taps), DilationMask(taps)
    assert (kernel.decision(), dilation.decision()) == (taps, 1)
    for size in range(1, taps + 1):
        kernel.decide(size)
        assert kernel.decision() == size
        assert kernel.hard().tolist() == [0.0] * (taps - size) + [1.0] * size
    for p in range(octaves(taps)):
        dilation.decide(2**p)
        assert dilation.decision() == 2**p
        assert dilation.hard().tolist() == [float(divides(p, taps, j)) for j in range(taps)]


@pytest.mark.parametrize("mask", [ChannelMask(5), ChannelMask(4, granularity=2), KernelMask(5), DilationMask(9)])
def test_masks_start_whole_and_are_clipped(mask: Mask) -> None:
    assert mask.alpha.tolist() == [1.0] * len(mask.alpha)
    first = mask.decision()
    with torch.no_grad():
        mask.alpha.copy_(torch.linspace(-2, 3, len(mask.alpha)))
    before = mask.alpha.tolist()
    mask.clip_()
    assert mask.alpha.tolist() == pytest.approx([min(max(x, 0), 1) for x in before])
    mask.decide(first)
    assert mask.decision() == first


def test_what_can_be_decided() -> None:
    assert ChannelMask(5).signature() == ("ChannelMask", 5)
    assert KernelMask(3).signature() == ("KernelMask", 1, 2, 3)
    assert KernelMask(3, sizes=(1, 3, 5)).signature() == ("KernelMask", 1, 3, 5)
    assert DilationMask(9).signature() == ("DilationMask", 4)


def test_a_kernel_with_sizes_of_its_own() -> None:
    mask = KernelMask(3, sizes=[1, 3, 5])
    assert mask.decision() == 5
    for size, hard in ((3, [0, 1, 1]), (1, [0, 0, 1]), (5, [1, 1, 1])):
        mask.decide(size)
        assert mask.hard().tolist() == hard
        assert mask.decision() == size
    with pytest.raises(ConfigurationError, match=r"\[1, 3, 5\]"):
        mask.decide(2)
    for wrong in ([1, 3], [1, 5, 3], [1, 1, 3], []):
        with pytest.raises(ConfigurationError, match="ascend"):
            KernelMask(3, sizes=wrong)


def test_a_channel_mask_multiplies_any_dimension() -> None:
    mask = ChannelMask(3)
    mask.keep([0, 2])
    x = torch.randn(2, 3, 5)
    expected = x.clone()
    expected[:, 1] = 0
    assert torch.equal(mask(x), expected)
    assert torch.equal(mask(x.transpose(1, 2), dim=-1), expected.transpose(1, 2))
    assert mask(x.bfloat16()).dtype == torch.bfloat16


def test_one_unit_always_stays() -> None:
    mask = ChannelMask(3)
    for alpha, kept in (([0.0, 0, 0], [2]), ([0.3, 0.4, 0.1], [1]), ([0.4, 0.2, 0.4], [2]), ([-0.5, 0.1, 0.2], [0])):
        set_alpha(mask, alpha)
        assert mask.decision() == kept


@pytest.mark.parametrize("build", [lambda n: ChannelMask(n), lambda n: KernelMask(n), lambda n: DilationMask(n)])
@pytest.mark.parametrize("n", [0, -3, 2.0, True, "4", None])
def test_a_number_of_units_is_needed(build: Callable[[Any], Mask], n: Any) -> None:
    with pytest.raises(ConfigurationError, match="at least 1"):
        build(n)


@pytest.mark.parametrize("granularity", [0, -1, 1.5, True])
def test_a_granularity_is_an_integer(granularity: Any) -> None:
    with pytest.raises(ConfigurationError, match="granularity"):
        ChannelMask(4, granularity=granularity)


@pytest.mark.parametrize(
    ("mask", "decision"),
    [
        *[(ChannelMask(4), wrong) for wrong in ([], [4], [-1], [0, 0], [True], [1.0], "01", None)],
        (ChannelMask(6, granularity=4), [0, 1]),
        *[(KernelMask(5), wrong) for wrong in (0, 6, -1, 2.5, True, "3", [3])],
        *[(DilationMask(5), wrong) for wrong in (0, 3, 8, True, "2", [1])],
    ],
)
def test_wrong_decisions_change_nothing(mask: Mask, decision: Any) -> None:
    before = mask.alpha.detach().clone()
    with pytest.raises(ConfigurationError):
        mask.decide(decision)
    assert torch.equal(mask.alpha, before)


def test_a_granularity_allows_all() -> None:
    mask = ChannelMask(6, granularity=4)
    mask.keep([5, 0, 1, 2])
    assert mask.decision() == [0, 1, 2, 5]
    mask.keep(range(6))
    assert mask.decision() == list(range(6))


def test_a_mask_of_another_size_says_so() -> None:
    with pytest.raises(ConfigurationError, match="4 units on dimension 1"):
        ChannelMask(4)(torch.zeros(2, 3))


# ---- layers with masks -----------------------------------------------------------------------------------------------


def test_masked_convolution_in_time() -> None:
    layer: Any = MaskedConv1d(
        2, 4, 5, padding=2, channel_mask=ChannelMask(4), kernel_mask=KernelMask(5), dilation_mask=DilationMask(5)
    )
    x = torch.randn(3, 2, 9)
    assert torch.equal(layer(x), F.conv1d(x, layer.weight, layer.bias, padding=2))
    layer.channel_mask.keep([1, 3])
    layer.kernel_mask.decide(4)
    layer.dilation_mask.decide(2)  # taps 2 and 4
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    weight[:, :, [0, 1, 3]] = 0
    weight[[0, 2]], bias[[0, 2]] = 0, 0
    assert torch.equal(layer(x), F.conv1d(x, weight, bias, padding=2))
    layer(x).sum().backward()
    assert all(m.alpha.grad is not None for m in (layer.channel_mask, layer.kernel_mask, layer.dilation_mask))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (MaskedConv2d(2, 4, 3, channel_mask=ChannelMask(4)), (2, 5, 5)),
        (MaskedConv3d(2, 4, 1, bias=False, channel_mask=ChannelMask(4)), (2, 2, 3, 3)),
        (MaskedLinear(2, 4, channel_mask=ChannelMask(4)), (2,)),
    ],
)
def test_masked_outputs_are_zero(layer: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(3, *shape)
    whole = layer(x)
    layer.channel_mask.keep([0, 3])
    assert bool((layer(x)[:, [1, 2]] == 0).all())
    assert torch.equal(layer(x)[:, [0, 3]], whole[:, [0, 3]])
    assert bool((whole != 0).any())


def test_layers_without_masks_are_those_of_torch() -> None:
    cases: list[tuple[Any, Tensor]] = [
        (MaskedConv1d(2, 3, 3), torch.randn(1, 2, 4)),
        (MaskedConv2d(2, 3, 1), torch.randn(1, 2, 2, 2)),
        (MaskedConv3d(2, 3, 1), torch.randn(1, 2, 2, 2, 2)),
        (MaskedLinear(2, 3), torch.randn(1, 2)),
    ]
    for layer, x in cases:
        plain = super(type(layer), layer).forward(x)
        assert torch.equal(layer(x), plain)


def test_a_mask_may_be_shared() -> None:
    mask = ChannelMask(3)
    one, two = MaskedLinear(2, 3, channel_mask=mask), MaskedLinear(4, 3, channel_mask=mask)
    net = nn.ModuleList([one, two])
    assert sum(1 for name, _ in net.named_parameters() if name.endswith("alpha")) == 1
    mask.keep([1])
    assert [layer(torch.ones(1, n)).ne(0).tolist() for layer, n in ((one, 2), (two, 4))] == [[[False, True, False]]] * 2


@pytest.mark.parametrize(
    "build",
    [
        lambda: MaskedConv1d(2, 4, 3, channel_mask=ChannelMask(3)),
        lambda: MaskedConv1d(2, 4, 3, kernel_mask=KernelMask(4)),
        lambda: MaskedConv1d(2, 4, 3, dilation_mask=DilationMask(5)),
        lambda: MaskedConv1d(2, 4, 3, kernel_mask=DilationMask(3)),  # type: ignore[arg-type]
        lambda: MaskedConv1d(2, 4, 3, channel_mask=KernelMask(4)),  # type: ignore[arg-type]
        lambda: MaskedConv1d(2, 4, 3, stride=2, kernel_mask=KernelMask(3)),
        lambda: MaskedConv1d(2, 4, 3, stride=2, dilation_mask=DilationMask(3)),
        lambda: MaskedConv2d(2, 4, 3, channel_mask=ChannelMask(2)),
        lambda: MaskedConv3d(2, 4, 3, channel_mask=ChannelMask(2)),
        lambda: MaskedLinear(2, 4, channel_mask=ChannelMask(2)),
    ],
)
def test_a_mask_fits_its_layer(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(ConfigurationError, match="Masked"):
        build()


# ---- precision, copies, files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half])
def test_alpha_keeps_its_precision(cast: Callable[[nn.Module], nn.Module]) -> None:
    net = nn.Sequential(MaskedLinear(3, 4, channel_mask=ChannelMask(4)))
    layer: Any = net[0]
    set_alpha(layer.channel_mask, [0.501, 0.4999, 0.75, 0.1])
    cast(net)
    assert layer.weight.dtype in (torch.bfloat16, torch.float16)
    assert layer.channel_mask.alpha.dtype == torch.float32
    assert layer.channel_mask.alpha.tolist() == pytest.approx([0.501, 0.4999, 0.75, 0.1], rel=1e-6)
    assert layer(torch.ones(2, 3, dtype=layer.weight.dtype)).dtype == layer.weight.dtype
    net.double()
    assert layer.channel_mask.alpha.dtype == torch.float64


def test_copies_and_files() -> None:
    mask = ChannelMask(4, granularity=2)
    set_alpha(mask, [0.1, 0.6, 0.3, 0.7])
    file = io.BytesIO()
    torch.save(mask, file)
    file.seek(0)
    for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), torch.load(file, weights_only=False)):  # noqa: S301
        assert (other.granularity, other.decision()) == (2, [1, 3])
        assert torch.equal(other.alpha, mask.alpha)
        other.keep([0, 1])
        assert mask.decision() == [1, 3]


# ---- all masks of a network ------------------------------------------------------------------------------------------


def channel_axis(label: str, units: int, granularity: int = 1) -> ChannelAxis:
    members = {Dimension(f"{label}.weight", 0): torch.arange(units)[:, None]}
    return ChannelAxis(label, Group(label, units, members, frozenset()), granularity)


def kernel_axis(label: str, taps: int) -> KernelAxis:
    weight = f"{label}.weight"
    return KernelAxis(label, weight, taps, {Dimension(weight, 2): torch.arange(taps)}, True)


def square_axis(label: str, side: int) -> KernelAxis:
    weight, places = f"{label}.weight", rings(side)
    positions = dict.fromkeys([Dimension(weight, 2), Dimension(weight, 3)], places)
    return KernelAxis(label, weight, int(places.max()) + 1, positions, False)


def mask_set(granularity: int = 1) -> MaskSet:
    """Three groups of channels, four kernels in time, one in space of side 5 (3 rings)."""
    channels = [channel_axis("a", 5), channel_axis("b.c", 1), channel_axis("d", 8, granularity)]
    kernels = [*(kernel_axis(f"t{taps}", taps) for taps in (3, 9, 1, 6)), square_axis("s", 5)]
    return MaskSet(channels, kernels)


@torch.no_grad()
def scatter(masks: MaskSet, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, mask in masks.items():
        ties = torch.randint(0, 11, mask.alpha.shape, generator=generator) / 10
        mask.alpha.copy_(ties if seed % 2 else torch.rand(mask.alpha.shape, generator=generator))


def one_by_one(masks: MaskSet) -> Tensor:
    """The flat vector from ``hard`` of each mask."""
    parts = [masks[axis.label].hard() for axis in masks.channels]
    for kernel in masks.kernels:
        taps = masks[kernel.kernel_label].hard()
        parts.append(taps * masks[kernel.dilation_label].hard() if kernel.dilated else taps)
    return torch.cat([*parts, torch.ones(1)])


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("granularity", [1, 3])
def test_the_flat_vector_is_that_of_the_masks(seed: int, granularity: int) -> None:
    masks = mask_set(granularity)
    scatter(masks, seed)
    flat = masks().hard
    assert torch.equal(flat, one_by_one(masks))
    weights = torch.randn(flat.shape)
    alphas = [mask.alpha for _, mask in masks.items()]
    together = torch.autograd.grad((flat * weights).sum(), alphas, allow_unused=True)
    alone = torch.autograd.grad((one_by_one(masks) * weights).sum(), alphas, allow_unused=True)
    for one, other, alpha in zip(together, alone, alphas, strict=True):
        none = torch.zeros_like(alpha)
        assert torch.allclose(none if one is None else one, none if other is None else other, atol=1e-5)


@pytest.mark.parametrize("taps", range(1, 34))
def test_relaxed_shares_of_taps(taps: int) -> None:
    """theta^beta_j / (j + 1) * theta^gamma_j / n_j, which are K ones at the start."""
    masks = MaskSet([], [kernel_axis("t", taps), kernel_axis("other", 7)])
    start = masks().soft
    assert start[:taps].tolist() == pytest.approx([1.0] * taps)
    assert masks.sizes(start)[0].item() == pytest.approx(taps)
    for seed in range(4):
        scatter(masks, seed)
        beta = kernel_by_hand(masks["t.kernel_size"].alpha.tolist())
        gamma = dilation_by_hand(masks["t.dilation"].alpha.tolist(), taps)
        n = [sum(divides(p, taps, j) for p in range(steps_by_hand(taps))) for j in range(taps)]
        shares = [beta[j] / (j + 1) * gamma[j] / n[j] for j in range(taps)]
        soft = masks().soft
        assert soft[:taps].tolist() == pytest.approx(shares, rel=1e-5)
        assert masks.sizes(soft)[0].item() == pytest.approx(sum(shares), rel=1e-5)


def test_relaxed_shares_of_channels() -> None:
    """|alpha|; a whole one for what stays only because something has to."""
    masks = MaskSet([channel_axis("a", 3), channel_axis("b", 3), channel_axis("c", 4, 2)], [])
    set_alpha(masks["a"], [0.7, 0.2, 0.9])
    set_alpha(masks["b"], [0.1, 0.4, 0.2])
    set_alpha(masks["c"], [0.8, 0.3, 0.1, 0.2])
    soft = masks().soft
    assert soft.tolist() == pytest.approx([0.7, 0.2, 0.9, 0.1, 1.0, 0.2, 0.8, 1.0, 0.1, 0.2, 1.0])
    assert masks.sizes(soft).tolist() == pytest.approx([1.8, 1.3, 2.1])
    assert masks.sizes(masks().hard).tolist() == [2, 1, 2]
    soft.sum().backward()
    assert masks["b"].alpha.grad.tolist() == [1, 0, 1]


def test_sizes_and_where_indices_lie() -> None:
    masks = mask_set()
    assert masks.full() == [5, 1, 8, 3, 9, 1, 6, 5]
    assert masks.sizes(masks().hard).tolist() == masks.full()
    masks["d"].keep([1, 2])
    masks["t9.kernel_size"].decide(5)
    masks["t9.dilation"].decide(2)  # taps 4, 6, 8
    masks["s.kernel_size"].decide(3)  # the two inner rings
    assert masks.sizes(masks().hard).tolist() == [5, 1, 2, 3, 3, 1, 6, 3]
    shapes: dict[str, tuple[int, ...]] = {"a.weight": (9, 2), "b.c.weight": (1, 1), "d.weight": (8, 2)}
    shapes |= {f"t{k}.weight": (1, 1, k) for k in (3, 9, 1, 6)} | {"s.weight": (1, 1, 5, 5)}
    flat, places = masks().hard, masks.places(shapes)
    assert flat[places[Dimension("d.weight", 0)]].tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    assert flat[places[Dimension("t9.weight", 2)]].tolist() == [0, 0, 0, 0, 1, 0, 1, 0, 1]
    assert flat[places[Dimension("s.weight", 3)]].tolist() == [0, 1, 1, 1, 0]
    # Indices of a dimension that belong to no unit follow the one at the end.
    assert flat[places[Dimension("a.weight", 0)]].tolist() == [1] * 9
    masks["a"].keep([3])
    assert masks().hard[places[Dimension("a.weight", 0)]].tolist() == [0, 0, 0, 1, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("taps", range(2, 18))
def test_the_smallest_sizes_are_reached(taps: int) -> None:
    """By all decisions of what learns: with a fixed kernel the largest dilation, with a fixed dilation the kernel."""
    for rf, dilation in itertools.product([True, False], repeat=2):
        masks = MaskSet([channel_axis("a", 6, 4)], [kernel_axis("t", taps)])
        masks["t.kernel_size"].alpha.requires_grad_(rf)
        masks["t.dilation"].alpha.requires_grad_(dilation)
        sizes = []
        for k, d in itertools.product(range(1, taps + 1) if rf else [taps], range(octaves(taps)) if dilation else [0]):
            masks["t.kernel_size"].decide(k)
            masks["t.dilation"].decide(2**d)
            sizes.append(masks.sizes(masks().hard)[1].item())
        assert masks.lowest(learning=True) == [4, min(sizes)]
        assert masks.lowest() == [4, 1]


@pytest.mark.parametrize("seed", range(6))
def test_decisions_come_back(seed: int) -> None:
    masks = mask_set(granularity=3)
    scatter(masks, seed)
    found = masks.decisions()
    assert list(found) == list(masks)
    assert found == {label: mask.decision() for label, mask in masks.items()}
    assert len(masks) == len(found) == 3 + 2 * 4 + 1
    other = mask_set(granularity=3)
    other.decide(found)
    assert other.decisions() == found
    assert torch.equal(other().hard, masks().hard)


@pytest.mark.parametrize(
    "change",
    [
        {"a": None},
        {"a": []},
        {"b.c": [1]},
        {"t9.kernel_size": 10},
        {"t9.dilation": 16},
        {"s.kernel_size": 2},
        {"new": [0]},
        {"s.dilation": 1},
    ],
)
def test_a_wrong_architecture_changes_nothing(change: dict[str, Any]) -> None:
    masks = mask_set()
    scatter(masks, 2)
    before = {label: mask.alpha.detach().clone() for label, mask in masks.items()}
    ((label, _),) = change.items()
    with pytest.raises(ArchMismatchError) as raised:
        masks.decide(masks.decisions() | change)
    assert repr(label) in str(raised.value)
    assert all(torch.equal(mask.alpha, before[label]) for label, mask in masks.items())


def test_a_missing_label_is_an_error() -> None:
    masks = mask_set()
    arch = masks.decisions()
    del arch["b.c"]
    with pytest.raises(ArchMismatchError, match=r"b\.c"):
        masks.decide(arch)
    with pytest.raises(ConfigurationError, match="nothing"):
        masks["nothing"]


def test_masks_of_a_network_are_saved_and_copied() -> None:
    masks = mask_set(granularity=3)
    scatter(masks, 6)
    loaded = mask_set(granularity=3)
    loaded.load_state_dict(masks.state_dict())
    assert all(name.endswith("alpha") for name in masks.state_dict())
    file = io.BytesIO()
    torch.save(masks, file)
    file.seek(0)
    for other in (loaded, copy.deepcopy(masks), torch.load(file, weights_only=False)):
        assert other.decisions() == masks.decisions()
        assert torch.equal(other().soft, masks().soft)
        other.decide(mask_set(granularity=3).decisions())
        assert other.decisions() != masks.decisions()


def test_masks_of_a_network_are_clipped_and_keep_their_precision() -> None:
    masks = mask_set()
    with torch.no_grad():
        for _, mask in masks.items():
            mask.alpha.copy_(torch.linspace(-1, 2, len(mask.alpha)))
    masks.clip_()
    assert all(0 <= a <= 1 for _, mask in masks.items() for a in mask.alpha.tolist())
    expected = masks()
    masks.bfloat16()
    assert {mask.alpha.dtype for _, mask in masks.items()} == {torch.float32}
    assert torch.equal(masks().hard, expected.hard)
    assert torch.equal(masks().soft, expected.soft)
    masks.double()
    assert masks().hard.dtype == torch.float64
    assert masks().soft.tolist() == pytest.approx(expected.soft.tolist(), rel=1e-6)


def test_own_masks_are_taken() -> None:
    mine: dict[str, Mask] = {"a": ChannelMask(5, granularity=2), "t3.kernel_size": KernelMask(3)}
    masks = MaskSet([channel_axis("a", 5)], [kernel_axis("t3", 3)], mine)
    assert masks["a"] is mine["a"]
    assert masks["t3.kernel_size"] is mine["t3.kernel_size"]
    set_alpha(mine["a"], [0.1, 0.9, 0.2, 0.3, 0.3])
    assert masks().hard[:5].tolist() == [0, 1, 0, 0, 1]
    assert masks.sizes(masks().hard).tolist() == [2, 3]


def test_a_kernel_in_space_shrinks_by_rings() -> None:
    for side in range(2, 10):
        places = rings(side).tolist()
        centre = side // 2
        assert places == [centre - abs(i - centre) for i in range(side)]
        masks = MaskSet([], [square_axis("s", side)])
        sizes = [sum(place >= ring for place in places) for ring in range(max(places), -1, -1)]
        assert sizes[-1] == side
        for size in sizes:
            masks.decide({"s.kernel_size": size})
            assert masks.decisions() == {"s.kernel_size": size}
            assert masks.sizes(masks().hard).tolist() == [size]
        assert math.isclose(masks.sizes(masks().soft)[0].item(), side)
