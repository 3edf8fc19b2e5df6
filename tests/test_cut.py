"""Cut networks: attributes by hand, and kernels against the full convolution with zeros in it."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from oneshot.errors import UnsupportedModelError
from oneshot.graph.cut import conv_padding, cut
from oneshot.graph.dimensions import Dimension
from oneshot.pit.axes import rings


def small(model: nn.Module, **kept: Sequence[int]) -> nn.Module:
    """``weight_0=[...]`` keeps these indices of dimension 0 of the weight; __ stands for a dot."""
    dimensions = {}
    for key, indices in kept.items():
        name, _, dim = key.rpartition("_")
        dimensions[Dimension(name.replace("__", "."), int(dim))] = torch.tensor(indices)
    return cut(model, dimensions)


# --- layers ---------------------------------------------------------------------------------------------------------


def test_convolution() -> None:
    conv = nn.Conv2d(4, 6, 3)
    cut_conv = small(conv, weight_0=[1, 5], bias_0=[1, 5], weight_1=[0, 2, 3])
    assert (cut_conv.in_channels, cut_conv.out_channels, cut_conv.groups) == (3, 2, 1)
    assert torch.equal(cut_conv.weight, conv.weight[[1, 5]][:, [0, 2, 3]])
    assert torch.equal(cut_conv.bias, conv.bias[[1, 5]])
    assert cut_conv(torch.zeros(1, 3, 5, 5)).shape == (1, 2, 3, 3)


def test_depthwise_convolution() -> None:
    cut_conv = small(nn.Conv1d(6, 6, 3, groups=6), weight_0=[0, 2, 4, 5], bias_0=[0, 2, 4, 5])
    assert (cut_conv.in_channels, cut_conv.out_channels, cut_conv.groups) == (4, 4, 4)
    assert cut_conv(torch.zeros(1, 4, 5)).shape == (1, 4, 3)


def test_depthwise_convolution_with_two_outputs_for_each_channel() -> None:
    # Output channels 2c and 2c + 1 read channel c: c = 0 and 2 stay.
    conv = nn.Conv1d(3, 6, 1, groups=3)
    cut_conv = small(conv, weight_0=[0, 1, 4, 5], bias_0=[0, 1, 4, 5])
    assert (cut_conv.in_channels, cut_conv.out_channels, cut_conv.groups) == (2, 4, 2)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(cut_conv(x[:, [0, 2]]), conv(x)[:, [0, 1, 4, 5]])


def test_grouped_convolution() -> None:
    # 3 groups of 2 inputs and 4 outputs; the middle one goes.
    conv = nn.Conv2d(6, 12, 1, groups=3)
    rows = [0, 1, 2, 3, 8, 9, 10, 11]
    cut_conv = small(conv, weight_0=rows, bias_0=rows)
    assert (cut_conv.in_channels, cut_conv.out_channels, cut_conv.groups) == (4, 8, 2)
    x = torch.randn(2, 6, 3, 3)
    torch.testing.assert_close(cut_conv(x[:, [0, 1, 4, 5]]), conv(x)[:, rows])


def test_transposed_convolution() -> None:
    conv = nn.ConvTranspose2d(4, 6, 2, stride=2)
    cut_conv = small(conv, weight_0=[1, 3], weight_1=[0, 4, 5], bias_0=[0, 4, 5])
    assert (cut_conv.in_channels, cut_conv.out_channels) == (2, 3)
    x = torch.randn(1, 4, 3, 3)
    x[:, [0, 2]] = 0
    torch.testing.assert_close(cut_conv(x[:, [1, 3]]), conv(x)[:, [0, 4, 5]])


def test_linear() -> None:
    cut_linear = small(nn.Linear(5, 4), weight_0=[3, 0], bias_0=[3, 0], weight_1=[1, 2, 4])
    assert (cut_linear.in_features, cut_linear.out_features) == (3, 2)


def test_batch_norm() -> None:
    norm = nn.BatchNorm2d(5)
    norm.running_mean.copy_(torch.arange(5.0))
    keep = [1, 4]
    cut_norm = small(norm, weight_0=keep, bias_0=keep, running_mean_0=keep, running_var_0=keep)
    assert cut_norm.num_features == 2
    assert cut_norm.running_mean.tolist() == [1.0, 4.0]
    assert set(dict(cut_norm.named_buffers())) == {"running_mean", "running_var", "num_batches_tracked"}
    assert cut_norm.train()(torch.randn(3, 2, 2, 2)).shape == (3, 2, 2, 2)


def test_batch_norm_without_scale() -> None:
    cut_norm = small(nn.BatchNorm1d(5, affine=False), running_mean_0=[0, 2, 3], running_var_0=[0, 2, 3])
    assert cut_norm.num_features == 3
    assert cut_norm(torch.randn(4, 3)).shape == (4, 3)


def test_group_norm() -> None:
    # 3 groups of 2 channels: two of them stay.
    cut_norm = small(nn.GroupNorm(3, 6), weight_0=[0, 1, 4, 5], bias_0=[0, 1, 4, 5])
    assert (cut_norm.num_groups, cut_norm.num_channels) == (2, 4)
    assert cut_norm(torch.randn(2, 4, 3)).shape == (2, 4, 3)


def test_prelu_embedding_and_layer_norm() -> None:
    assert small(nn.PReLU(4), weight_0=[0, 3]).num_parameters == 2
    embedding = small(nn.Embedding(7, 4), weight_1=[0, 2, 3])
    assert (embedding.num_embeddings, embedding.embedding_dim) == (7, 3)
    assert small(nn.LayerNorm(4), weight_0=[0, 2], bias_0=[0, 2]).normalized_shape == (2,)


# --- the whole network ----------------------------------------------------------------------------------------------


def test_the_original_is_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 3))
    before = copy.deepcopy(model)
    keep = torch.tensor([0, 3])
    names = {
        "0.weight": 0,
        "0.bias": 0,
        "1.weight": 0,
        "1.bias": 0,
        "1.running_mean": 0,
        "1.running_var": 0,
        "2.weight": 1,
    }
    cut_model = cut(model, {Dimension(name, dim): keep for name, dim in names.items()})
    with torch.no_grad():
        for parameter in cut_model.parameters():
            parameter.zero_()
    assert repr(model) == repr(before)
    for name, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_modes_and_gradients_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    model[1].eval()
    cut_model = cut(model, {Dimension("0.weight", 0): torch.tensor([0, 1])})
    assert [m.training for m in cut_model] == [True, False, True]
    assert not cut_model[0].weight.requires_grad
    assert cut_model[2].weight.requires_grad
    assert all(p.is_leaf for p in cut_model.parameters())


class Tied(nn.Module):
    """The decoder has the encoder's weight; one block stands twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight
        self.block = nn.Linear(4, 4)
        self.again = self.block


def test_what_is_shared_stays_shared() -> None:
    keep = torch.tensor([0, 2, 3])
    dimensions = {Dimension(name, 0): keep for name in ("encoder.weight", "block.weight", "block.bias")}
    cut_model = cut(Tied(), dimensions)
    assert cut_model.encoder.weight is cut_model.decoder.weight
    assert cut_model.encoder.weight.shape == (3, 4)
    assert cut_model.decoder.out_features == 3
    assert cut_model.again is cut_model.block


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.shape, self.on = 3, (3, 4), True
        self.fc = nn.Linear(12, 12)


def test_numbers_in_attributes() -> None:
    model = nn.Sequential(Headed(), Headed())
    cut_model = cut(model, {}, numbers={"1": {3: 2, 1: 7}})
    assert (cut_model[1].heads, cut_model[1].shape, cut_model[1].on) == (2, (2, 4), True)
    assert (cut_model[0].heads, model[1].heads) == (3, 3)


def test_what_cannot_be_copied_is_an_error_that_says_so() -> None:
    model = nn.Linear(2, 2)
    model.last = model(torch.ones(1, 2)) * 1  # a result that is kept is copied with it
    assert torch.equal(cut(model, {}).last, model.last)
    model.lock = threading.Lock()
    with pytest.raises(UnsupportedModelError, match="Linear cannot be copied"):
        cut(model, {})


# --- kernels --------------------------------------------------------------------------------------------------------


def causal(conv: nn.Conv1d) -> nn.Module:
    return nn.Sequential(nn.ConstantPad1d(((conv.kernel_size[0] - 1) * conv.dilation[0], 0), 0.0), conv)


def with_zeros(model: nn.Module, name: str, kept: Mapping[int, Tensor]) -> nn.Module:
    """The same network with zeros in the taps that are not kept: the oracle."""
    full = copy.deepcopy(model)
    weight = full.get_parameter(name)
    for dim, indices in kept.items():
        flags = torch.zeros(weight.shape[dim], dtype=weight.dtype)
        flags[indices] = 1
        weight.data *= flags.reshape([-1 if d == dim else 1 for d in range(weight.dim())])
    return full


def check_kernel(model: nn.Module, name: str, kept: Mapping[int, Tensor], dilation: Sequence[int], x: Tensor) -> None:
    cut_model = cut(model, {Dimension(name, d): indices for d, indices in kept.items()}, dilations={name: dilation})
    with torch.no_grad(), warnings.catch_warnings():
        # torch says that an even kernel with padding 'same' copies its input
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        expected, got = with_zeros(model, name, kept)(x), cut_model(x)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    sizes = [p.shape[d] for p in cut_model.parameters() if p.dim() > 2 for d in kept]
    assert sizes == [len(indices) for indices in kept.values()]


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("taps", range(1, 10))
@pytest.mark.parametrize("padding", ["causal", "same", "half", "one", "none"])
def test_kernels_in_time(taps: int, first: int, padding: str) -> None:
    amounts = {"same": "same", "half": (taps - 1) * first // 2, "one": 1}
    conv = nn.Conv1d(2, 3, taps, padding=amounts.get(padding, 0), dilation=first).double()
    model, name = (causal(conv), "1.weight") if padding == "causal" else (nn.Sequential(conv), "0.weight")
    x = torch.randn(2, 2, 21, dtype=torch.float64)
    for size in range(1, taps + 1):
        step = 1
        while step <= max(1, taps - 1):
            kept = torch.tensor([j for j in range(taps) if taps - 1 - j < size and (taps - 1 - j) % step == 0])
            check_kernel(model, name, {2: kept}, (first * step,), x)
            step *= 2


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (7, 7), (3, 5), (4, 7), (1, 6)])
@pytest.mark.parametrize("padding", ["same", "half", "none"])
def test_kernels_in_space(size: tuple[int, int], dilation: int, padding: str) -> None:
    halves = tuple((k - 1) * dilation // 2 for k in size)
    amounts = {"same": "same", "half": halves, "none": 0}[padding]
    model = nn.Sequential(nn.Conv2d(2, 3, size, padding=amounts, dilation=dilation).double())
    x = torch.randn(1, 2, 15, 17, dtype=torch.float64)
    places = [rings(k) for k in size]
    for left in range(1, max(int(p.max()) for p in places) + 2):
        # The innermost rings: places count from the outermost.
        kept = {2 + d: (p > p.max() - left).nonzero().flatten() for d, p in enumerate(places)}
        check_kernel(model, "0.weight", kept, (dilation, dilation), x)


def test_a_smaller_kernel_by_hand() -> None:
    # 5 taps, 2 in front and 2 behind; the last 3 stay, those of x[t], x[t+1], x[t+2]: nothing in front.
    model = nn.Sequential(nn.Conv1d(1, 1, 5, padding=2))
    cut_model = cut(model, {Dimension("0.weight", 2): torch.tensor([2, 3, 4])}, dilations={"0.weight": (1,)})
    pad, conv = cut_model[0]
    assert (pad.padding, conv.padding, conv.kernel_size) == ((0, 2), (0,), (3,))
    # Taps 0, 2, 4 of them are symmetric: an integer padding of a dilated convolution is enough.
    cut_model = cut(model, {Dimension("0.weight", 2): torch.tensor([0, 2, 4])}, dilations={"0.weight": (2,)})
    assert (cut_model[0].padding, cut_model[0].kernel_size, cut_model[0].dilation) == ((2,), (3,), (2,))


def test_channels_and_kernel_together() -> None:
    conv = nn.Conv1d(3, 4, 4, padding="same").double()
    model = nn.Sequential(conv)
    kept = {Dimension("0.weight", 0): [1, 2], Dimension("0.bias", 0): [1, 2], Dimension("0.weight", 2): [3]}
    cut_model = cut(model, {d: torch.tensor(k) for d, k in kept.items()}, dilations={"0.weight": (1,)})
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        expected = with_zeros(model, "0.weight", {2: torch.tensor([3])})(x)[:, [1, 2]]
        torch.testing.assert_close(cut_model(x), expected, rtol=1e-12, atol=1e-12)


def test_padding_of_a_convolution() -> None:
    assert conv_padding(nn.Conv2d(1, 1, (3, 4), padding="same", dilation=(1, 2))) == [(1, 1), (3, 3)]
    assert conv_padding(nn.Conv2d(1, 1, (2, 3), padding="same")) == [(0, 1), (1, 1)]
    assert conv_padding(nn.Conv1d(1, 1, 3, padding="valid")) == [(0, 0)]
    assert conv_padding(nn.Conv2d(1, 1, 3, padding=(2, 0))) == [(2, 2), (0, 0)]
