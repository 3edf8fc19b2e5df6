"""The temporal networks against hand counts, the figures of their papers, and what a causal network must not see."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from oneshot import count_macs, count_params
from oneshot.errors import ConfigurationError
from search_spaces.tcn import (
    SmallTCN,
    SmallTCNSizes,
    TCResNet,
    TCResNetSizes,
    TempoNet,
    TempoSizes,
    TempoStage,
    causal_conv,
    small_tcn,
    tc_resnet8,
    tc_resnet14,
    temponet,
)


def counts(net: nn.Module, x: Tensor) -> tuple[float, float]:
    return count_params(net).of({}), count_macs(net, (x,)).of({})


def running_statistics(net: nn.Module) -> int:
    """Means and variances of the normalisations, which some publications count as parameters."""
    return sum(buffer.numel() for name, buffer in net.named_buffers() if name.endswith(("_mean", "_var")))


# --- causal convolution -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "dilation", "stride"), [(1, 1, 1), (3, 1, 1), (4, 3, 1), (5, 2, 2), (9, 1, 4)])
def test_a_causal_convolution_is_the_sum_over_earlier_samples(kernel: int, dilation: int, stride: int) -> None:
    conv = causal_conv(2, 3, kernel, dilation=dilation, stride=stride).double()
    x = torch.rand(1, 2, 13, dtype=torch.float64)
    weight = dict(conv.named_parameters())["1.weight"].detach()  # (3, 2, kernel); the last tap is the newest
    expected = torch.zeros(1, 3, math.ceil(13 / stride), dtype=torch.float64)
    for t in range(expected.shape[2]):
        for i in range(kernel):
            if stride * t - i * dilation >= 0:
                expected[0, :, t] += weight[:, :, kernel - 1 - i] @ x[0, :, stride * t - i * dilation]
    torch.testing.assert_close(conv(x), expected)


# --- small TCN --------------------------------------------------------------------------------------------------


def test_parameters_and_macs_of_the_small_tcn() -> None:
    # Weights of each block (two convolutions of 9 taps, a 1x1 where the width changes), at 128, 64 and 32 samples:
    first = 9 * 6 * 16 + 9 * 16 * 16 + 6 * 16  # 864 + 2304 + 96 = 3264
    second = 9 * 16 * 32 + 9 * 32 * 32 + 16 * 32  # 4608 + 9216 + 512 = 14336
    third = 9 * 32 * 32 + 9 * 32 * 32  # 18432
    norms = 2 * (3 * 16 + 3 * 32 + 2 * 32)  # 416
    assert first + second + third + norms + 32 * 7 + 7 == 36_679
    macs = 128 * first + 64 * second + 32 * third + 32 * 7  # 417792 + 917504 + 589824 + 224
    assert macs == 1_925_344
    assert counts(small_tcn(), torch.rand(1, 6, 128)) == (36_679, macs)


def test_shapes_of_the_small_tcn() -> None:
    net = small_tcn(SmallTCNSizes(in_channels=3, blocks=((8, 5), (8, 3)), dilation=2, n_classes=4))
    assert isinstance(net, SmallTCN)
    assert net(torch.rand(2, 3, 50)).shape == (2, 4)
    assert net.blocks(torch.rand(2, 3, 50)).shape == (2, 8, 12)  # 50 -> 25 -> 12
    assert small_tcn()(torch.rand(2, 6, 128)).shape == (2, 7)


def test_the_blocks_of_the_small_tcn_are_causal() -> None:
    net = small_tcn().eval()
    x = torch.rand(1, 6, 128)
    later = x.clone()
    later[:, :, 64:] = torch.rand(1, 6, 64)
    before, after = net.blocks(x), net.blocks(later)  # each of the 16 outputs is the end of 8 samples
    torch.testing.assert_close(before[:, :, :8], after[:, :, :8])
    assert not torch.allclose(before[:, :, 8], after[:, :, 8])


# --- TEMPONet ---------------------------------------------------------------------------------------------------


def test_parameters_and_macs_of_the_seed() -> None:
    # Lengths: 256 | pool 128 | stride 2: 64, pool 32 | stride 4: 8, pool 4. The strided convolutions have 5 taps.
    at_256 = 5 * 4 * 32 + 5 * 32 * 32 + 5 * 32 * 64  # 640 + 5120 + 10240 = 16000
    at_128, at_64 = 2 * 9 * 64 * 64, 5 * 64 * 128  # 73728, 40960
    at_32, at_8 = 17 * 128 * 128 * 2, 5 * 128 * 128  # 557056, 81920
    linear = 4 * 128 * 256 + 256 * 128 + 128  # 163968
    norms = 2 * (32 + 32 + 64 + 64 + 64 + 128 + 128 + 128 + 128 + 256 + 128)  # 2304
    params = at_256 + at_128 + at_64 + at_32 + at_8 + linear + 1 + norms
    macs = 256 * at_256 + 128 * at_128 + 64 * at_64 + 32 * at_32 + 8 * at_8 + linear
    assert (params, macs) == (935_937, 34_799_744)
    assert counts(temponet(), torch.rand(1, 4, 256)) == (params, macs)


def test_parameters_and_macs_of_the_dilated_network() -> None:
    # As above, with 3 taps instead of 5, 9 and 17.
    at_256 = 3 * 4 * 32 + 3 * 32 * 32 + 5 * 32 * 64  # 384 + 3072 + 10240 = 13696
    at_128, at_64 = 2 * 3 * 64 * 64, 5 * 64 * 128  # 24576, 40960
    at_32, at_8 = 2 * 3 * 128 * 128, 5 * 128 * 128  # 98304, 81920
    params = at_256 + at_128 + at_64 + at_32 + at_8 + 163_968 + 1 + 2304
    macs = 256 * at_256 + 128 * at_128 + 64 * at_64 + 32 * at_32 + 8 * at_8 + 163_968
    assert (params, macs) == (425_729, 13_238_400)
    assert counts(temponet(dilated=True), torch.rand(1, 4, 256)) == (params, macs)


def test_the_dilated_network_is_the_seed_with_taps_at_zero() -> None:
    small = TempoSizes(
        in_channels=2, length=40, stages=(TempoStage(3, kernel=9, out_width=4, stride=2),), hidden=(5,), n_outputs=2
    )
    seed, dilated = temponet(small).eval(), temponet(small, dilated=True).eval()
    state = seed.state_dict()
    for name, value in dilated.state_dict().items():
        if value.shape == state[name].shape:
            state[name] = value
        else:  # 3 taps with dilation 4 are taps 0, 4 and 8 of 9
            state[name] = torch.zeros_like(state[name])
            state[name][:, :, ::4] = value
    seed.load_state_dict(state)
    x = torch.rand(3, 2, 40)
    torch.testing.assert_close(seed(x), dilated(x))
    assert seed(x).shape == (3, 2)


def test_the_length_decides_the_linear_layers() -> None:
    sizes = TempoSizes(length=250)  # 250 -> 125 -> ceil(125 / 2) // 2 = 31 -> ceil(31 / 4) // 2 = 4
    assert sizes.last_length == 4
    net = temponet(sizes)
    assert isinstance(net, TempoNet)
    assert net(torch.rand(2, 4, 250)).shape == (2, 1)


def test_sizes_of_temponet_that_cannot_work() -> None:
    with pytest.raises(ConfigurationError, match=r"length=8\): the 3 stages leave no sample"):
        TempoSizes(length=8)
    for stage in (TempoStage(8, 4, 8, 1), TempoStage(8, 1, 8, 1), TempoStage(8, 9, 8, 1, dilation=2)):
        with pytest.raises(ConfigurationError, match="odd kernels of at least 3 taps with dilation 1"):
            temponet(TempoSizes(stages=(stage,)), dilated=True)


# --- TC-ResNet --------------------------------------------------------------------------------------------------


def test_parameters_and_macs_of_tc_resnet8() -> None:
    # Weights at 98, 49, 25 and 13 frames: the stem, and blocks of 9 taps, 9 taps and a 1x1.
    at_98 = 3 * 40 * 16  # 1920
    at_49 = 9 * 16 * 24 + 9 * 24 * 24 + 16 * 24  # 3456 + 5184 + 384 = 9024
    at_25 = 9 * 24 * 32 + 9 * 32 * 32 + 24 * 32  # 6912 + 9216 + 768 = 16896
    at_13 = 9 * 32 * 48 + 9 * 48 * 48 + 32 * 48  # 13824 + 20736 + 1536 = 36096
    norms = 2 * (16 + 3 * 24 + 3 * 32 + 3 * 48)  # 656
    assert at_98 + at_49 + at_25 + at_13 + norms + 48 * 12 + 12 == 65_180
    macs = 98 * at_98 + 49 * at_49 + 25 * at_25 + 13 * at_13 + 48 * 12
    assert macs == 1_522_560
    assert counts(tc_resnet8(), torch.rand(1, 40, 98)) == (65_180, macs)


def test_parameters_and_macs_of_tc_resnet14() -> None:
    # TC-ResNet8, and one block of two convolutions more per stage: 2 * 9 * 24^2, 2 * 9 * 32^2 and 2 * 9 * 48^2.
    more = (10_368, 18_432, 41_472)
    norms = 2 * 2 * (24 + 32 + 48)  # 416
    params = 65_180 + sum(more) + norms
    macs = 1_522_560 + 49 * more[0] + 25 * more[1] + 13 * more[2]
    assert (params, macs) == (135_868, 3_030_528)
    assert counts(tc_resnet14(), torch.rand(1, 40, 98)) == (params, macs)


@pytest.mark.parametrize(
    ("net", "thousand_parameters", "million_operations"),
    [
        (tc_resnet8(), 66, 3.0),
        (tc_resnet8(width_mult=1.5), 145, 6.6),
        (tc_resnet14(), 137, 6.1),
        (tc_resnet14(width_mult=1.5), 305, 13.4),
    ],
)
def test_the_figures_of_the_paper(net: nn.Module, thousand_parameters: int, million_operations: float) -> None:
    # As published in arXiv 1904.03814: running statistics among the parameters, two operations per MAC.
    params, macs = counts(net, torch.rand(1, 40, 98))
    assert round((params + running_statistics(net)) / 1e3) == thousand_parameters
    assert round(2 * macs / 1e6, 1) == million_operations


def test_the_kernel_of_tc_resnet_keeps_the_shapes() -> None:
    x = torch.rand(2, 40, 101)
    for kernel in (1, 9, 17):
        net = tc_resnet14(10, kernel=kernel)
        assert isinstance(net, TCResNet)
        assert net.blocks(net.stem(x)).shape == (2, 48, 13)  # 101 -> 51 -> 26 -> 13
        assert net(x).shape == (2, 10)
    # A tap is 16 * 24 + 24 * 32 + 32 * 48 + 3 * (24^2 + 32^2 + 48^2) weights: 2688 + 11712.
    larger, smaller = (count_params(tc_resnet14(kernel=kernel)).of({}) for kernel in (11, 9))
    assert larger - smaller == 2 * 14_400


def test_sizes_of_tc_resnet_that_cannot_work() -> None:
    with pytest.raises(ConfigurationError, match=r"kernels \[4\] are even"):
        TCResNetSizes(stages=((8, 1, 1, 3), (8, 1, 1, 4)))
    with pytest.raises(ConfigurationError, match=r"kernels \[8, 8, 8\] are even"):
        tc_resnet8(kernel=8)
    for width_mult in (0.0, -1.0, 0.05, math.nan, math.inf):
        with pytest.raises(ConfigurationError, match="width_mult"):
            tc_resnet14(width_mult=width_mult)
