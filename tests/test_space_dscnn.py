"""The depthwise separable networks against hand counts and the parameters published with MLPerf Tiny."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from oneshot import count_macs, count_params
from oneshot.errors import ConfigurationError
from search_spaces.dscnn import SeparableNet, SeparableSizes, dscnn, mobilenet_v1, separable_block


def counts(net: nn.Module, x: Tensor) -> tuple[float, float]:
    return count_params(net).of({}), count_macs(net, (x,)).of({})


def running_statistics(net: nn.Module) -> int:
    """Means and variances of the normalisations, which Keras counts as parameters."""
    return sum(buffer.numel() for name, buffer in net.named_buffers() if name.endswith(("_mean", "_var")))


def test_parameters_and_macs_of_dscnn() -> None:
    # Everything happens at 25x5. Of each block: 3x3 per channel, 64x64.
    stem, block = 10 * 4 * 64, 9 * 64 + 64 * 64  # 2560, 4672
    norms_and_biases = 9 * 3 * 64  # of 1 + 4 * 2 convolutions: 1728
    params = stem + 4 * block + norms_and_biases + 64 * 12 + 12
    macs = 125 * (stem + 4 * block) + 64 * 12
    assert (params, macs) == (23_756, 2_656_768)
    net = dscnn()
    assert counts(net, torch.rand(1, 1, 49, 10)) == (params, macs)
    assert params + running_statistics(net) == 24_908  # published


def test_parameters_and_macs_of_mobilenet() -> None:
    # (positions of the depthwise convolution, of the 1x1; channels in, out), from 48x48 down to 3x3
    blocks = [
        (48 * 48, 8, 16),
        (24 * 24, 16, 32),
        (24 * 24, 32, 32),
        (12 * 12, 32, 64),
        (12 * 12, 64, 64),
        (6 * 6, 64, 128),
        *[(6 * 6, 128, 128)] * 5,
        (3 * 3, 128, 256),
        (3 * 3, 256, 256),
    ]
    weights = [9 * n_in + n_in * n_out for _, n_in, n_out in blocks]
    channels = 8 + sum(n_in + n_out for _, n_in, n_out in blocks)  # of all convolutions: 2736
    params = 27 * 8 + sum(weights) + 3 * channels + 256 * 2 + 2
    macs = 48 * 48 * 27 * 8 + sum(at * weight for (at, *_), weight in zip(blocks, weights, strict=True)) + 256 * 2
    # 216 + 11160 + 196224 + 8208 + 514; 497664 + 6987456 + 512
    assert (params, macs) == (216_322, 7_489_664)
    net = mobilenet_v1()
    assert counts(net, torch.rand(1, 3, 96, 96)) == (params, macs)
    assert params + running_statistics(net) == 221_794  # published


def test_mobilenet_at_full_width() -> None:
    # The paper's 4.2 M parameters, at 1000 classes: 3,185,088 of 3x3 and 1x1, 1,025,000 of the linear layer, and 3
    # for each of 10,944 channels.
    assert count_params(mobilenet_v1(1000, 1.0)).of({}) == 3_185_088 + 1_025_000 + 3 * 10_944
    assert round((3_185_088 + 1_025_000) / 1e6, 1) == 4.2


def test_shapes() -> None:
    net = dscnn(5, width=8)
    assert isinstance(net, SeparableNet)
    assert net.blocks(net.stem(torch.rand(2, 1, 49, 10))).shape == (2, 8, 25, 5)
    assert net(torch.rand(2, 1, 49, 10)).shape == (2, 5)
    images = mobilenet_v1(3)
    assert images.stem(torch.rand(2, 3, 96, 96)).shape == (2, 8, 48, 48)
    assert images.blocks(images.stem(torch.rand(2, 3, 96, 96))).shape == (2, 256, 3, 3)
    assert images(torch.rand(2, 3, 96, 96)).shape == (2, 3)
    other = SeparableNet(SeparableSizes(4, ((8, 2), (6, 1)), n_classes=2, in_channels=2, stem_stride=(1, 1)))
    assert other.blocks(other.stem(torch.rand(1, 2, 9, 9))).shape == (1, 6, 5, 5)


def test_a_depthwise_convolution_mixes_no_channels() -> None:
    depthwise = separable_block(3, 5)[0]
    one, two = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    two[:, 1] = 1
    changed = (depthwise(two) - depthwise(one)).abs().sum((0, 2, 3)) > 0
    assert changed.tolist() == [False, True, False]


@pytest.mark.parametrize("width_mult", [0.0, -0.25, 0.03, math.nan, math.inf])
def test_widths_that_cannot_work(width_mult: float) -> None:
    with pytest.raises(ConfigurationError, match="leaves one of 32 channels"):
        mobilenet_v1(width_mult=width_mult)
