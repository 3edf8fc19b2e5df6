"""The residual networks against hand counts and the published parameters, and their shortcuts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from oneshot import count_macs, count_params
from oneshot.errors import ConfigurationError
from search_spaces.resnet import BasicBlock, PadShortcut, ResNet, ResNetSizes, resnet8, resnet18, resnet20


def counts(net: nn.Module, x: Tensor) -> tuple[float, float]:
    return count_params(net).of({}), count_macs(net, (x,)).of({})


def running_statistics(net: nn.Module) -> int:
    """Means and variances of the normalisations, which Keras counts as parameters."""
    return sum(buffer.numel() for name, buffer in net.named_buffers() if name.endswith(("_mean", "_var")))


def test_parameters_and_macs_of_resnet8() -> None:
    # Weights at 32x32, 16x16 and 8x8; a block is two 3x3 convolutions and, from the second on, a 1x1.
    at_32 = 9 * 3 * 16 + 2 * 9 * 16 * 16  # 432 + 4608 = 5040
    at_16 = 9 * 16 * 32 + 9 * 32 * 32 + 16 * 32  # 4608 + 9216 + 512 = 14336
    at_8 = 9 * 32 * 64 + 9 * 64 * 64 + 32 * 64  # 18432 + 36864 + 2048 = 57344
    biases = 3 * 16 + 3 * 32 + 3 * 64  # of the stem and all other convolutions: 336
    norms = 2 * (3 * 16 + 2 * 32 + 2 * 64)  # none in the shortcuts: 480
    params = at_32 + at_16 + at_8 + biases + norms + 64 * 10 + 10
    macs = 1024 * at_32 + 256 * at_16 + 64 * at_8 + 64 * 10
    assert (params, macs) == (78_186, 12_501_632)
    net = resnet8()
    assert counts(net, torch.rand(1, 3, 32, 32)) == (params, macs)
    assert params + running_statistics(net) == 78_666  # published with MLPerf Tiny


def test_parameters_and_macs_of_resnet20() -> None:
    # Six 3x3 convolutions per stage, the first of stages two and three from the narrower width.
    at_32 = 9 * 3 * 16 + 6 * 9 * 16 * 16  # 432 + 13824 = 14256
    at_16 = 9 * 16 * 32 + 5 * 9 * 32 * 32  # 4608 + 46080 = 50688
    at_8 = 9 * 32 * 64 + 5 * 9 * 64 * 64  # 18432 + 184320 = 202752
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)  # 1376
    params = at_32 + at_16 + at_8 + norms + 64 * 10 + 10
    macs = 1024 * at_32 + 256 * at_16 + 64 * at_8 + 64 * 10
    assert (params, macs) == (269_722, 40_551_040)
    image = torch.rand(1, 3, 32, 32)
    assert counts(resnet20(), image) == (params, macs)
    assert round(params / 1e6, 2) == 0.27  # table 6 of the paper
    # Option B: 16 * 32 at 16x16 and 32 * 64 at 8x8, each with a normalisation.
    option_b = (params + 512 + 64 + 2048 + 128, macs + 256 * 512 + 64 * 2048)
    assert counts(resnet20(shortcut="conv_bn"), image) == option_b == (272_474, 40_813_184)


def test_parameters_and_macs_of_resnet18() -> None:
    at_112 = 49 * 3 * 64  # 9408
    at_56 = 4 * 9 * 64 * 64  # 147456
    at_28 = 9 * 64 * 128 + 3 * 9 * 128 * 128 + 64 * 128  # 73728 + 442368 + 8192 = 524288
    at_14, at_7 = 4 * at_28, 16 * at_28  # twice as wide on both sides, once and twice
    norms = 2 * (64 + 4 * 64 + 5 * 128 + 5 * 256 + 5 * 512)  # 9600
    params = at_112 + at_56 + at_28 + at_14 + at_7 + norms + 512 * 1000 + 1000
    macs = 112**2 * at_112 + 56**2 * at_56 + 28**2 * at_28 + 14**2 * at_14 + 7**2 * at_7 + 512 * 1000
    assert (params, macs) == (11_689_512, 1_814_073_344)  # 11,689,512: published with torchvision
    assert counts(resnet18(), torch.rand(1, 3, 224, 224)) == (params, macs)


def test_shapes() -> None:
    small = torch.rand(2, 3, 32, 32)
    for net in (resnet8(7), resnet20(7), resnet20(7, shortcut="conv"), resnet20(7, shortcut="conv_bn")):
        assert isinstance(net, ResNet)
        assert net.blocks(net.stem(small)).shape == (2, 64, 8, 8)
        assert net(small).shape == (2, 7)
    large = resnet18(7)
    stem = large.stem(torch.rand(2, 3, 64, 64))
    assert stem.shape == (2, 64, 16, 16)  # a quarter
    assert large.blocks(stem).shape == (2, 512, 2, 2)


@pytest.mark.parametrize(("in_width", "out_width", "stride", "first"), [(2, 5, 2, 1), (3, 3, 1, 0), (2, 4, 3, 1)])
def test_the_padded_shortcut(in_width: int, out_width: int, stride: int, first: int) -> None:
    x = torch.rand(2, in_width, 7, 6)
    y = PadShortcut(in_width, out_width, stride)(x)
    expected = torch.zeros(2, out_width, -(-7 // stride), -(-6 // stride))
    for i in range(expected.shape[2]):
        for j in range(expected.shape[3]):
            expected[:, first : first + in_width, i, j] = x[:, :, stride * i, stride * j]
    assert torch.equal(y, expected)


def test_a_block_adds_its_shortcut() -> None:
    x = torch.randn(2, 4, 6, 6)
    for out_width, stride in ((4, 1), (8, 2)):
        block = BasicBlock(4, out_width, stride, "pad").eval()
        nn.init.zeros_(next(block.conv2.parameters()))
        nothing = block.conv2(block.conv1(x))  # the running mean is 0, so nothing is left of the convolutions
        assert torch.equal(nothing, torch.zeros_like(nothing))
        assert torch.equal(block(x), block.shortcut(x).relu())


def test_sizes_that_cannot_work() -> None:
    with pytest.raises(ConfigurationError, match=r"shortcut='none'\): allowed are 'pad', 'conv' and 'conv_bn'"):
        ResNetSizes(((8, 1, 1),), stem=8, n_classes=2, shortcut="none")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"PadShortcut\(16, 8\)"):
        ResNet(ResNetSizes(((16, 1, 1), (8, 1, 2)), stem=16, n_classes=2, shortcut="pad"))
    narrower = ResNet(ResNetSizes(((16, 1, 1), (8, 1, 2)), stem=16, n_classes=2))
    assert narrower(torch.rand(2, 3, 8, 8)).shape == (2, 2)
