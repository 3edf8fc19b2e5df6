"""Latencies by nn-Meter's predictors: nn-Meter's own sum where it is right, hand counts where it is silently wrong."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mobile_nets import mobilenet_v2, mobilenet_v3, resnet18
from torch import Tensor, nn

from oneshot import LayerChoice, fixed
from oneshot.cost.nn_meter import (
    NNMeterLatency,
    PredictorSet,
    load_predictor_set,
    nn_meter_graph,
    nn_meter_latency,
    nn_meter_package,
)
from oneshot.errors import ConfigurationError, UnknownCostError, UnsupportedModelError
from search_spaces.mobilenet import proxylessnas

TINY = Path(__file__).parent / "data" / "nn_meter_tiny"


@pytest.fixture(scope="module")
def predictors() -> PredictorSet:
    return load_predictor_set(TINY)


def own(model: nn.Module, x: Tensor, predictors: PredictorSet) -> float:
    """What nn-Meter itself says of our graph."""
    meter = nn_meter_package().nnMeterPredictor(dict(predictors.forests), str(predictors.fusion_rules))
    return float(meter.predict(nn_meter_graph(model, (x,)), "nnmeter-ir"))


def latency(model: nn.Module, shape: tuple[int, ...], predictors: PredictorSet, **missing: float) -> NNMeterLatency:
    return nn_meter_latency(model, (torch.zeros(shape),), predictors, missing=missing or None)


def asked(found: NNMeterLatency) -> list[tuple[str, tuple[float, ...], int]]:
    return [(part.kernel, part.features, part.times) for kernel in found.kernels for part in kernel.parts]


def pooling_at_height_1(found: NNMeterLatency, predictors: PredictorSet) -> float:
    """What our total would be with nn-Meter's rows of global pooling, whose height is always 1."""
    total = found.cost.of({})
    for kernel in found.kernels:
        for part in kernel.parts:
            if part.kernel == "global-avgpool":
                total += float(predictors.forests["global-avgpool"].predict([(1, part.features[1])])[0]) - part.ms
    return total


@pytest.mark.parametrize(
    ("factory", "params", "kernels"),
    [
        # 1 stem; 17 blocks with depthwise + projection, 16 of them with an expansion; 1 last; 10 sums; pool; linear
        (mobilenet_v2, 3_504_872, {"conv-relu": 18, "dwconv-relu": 17, "conv": 17, "add": 10, "gap": 1, "fc": 1}),
        # stem with pool; per block 2 convolutions, 8 in all with ReLU, 8 without; 3 projections; 8 sums with ReLU
        (
            resnet18,
            11_689_512,
            {"conv-relu-maxpool": 1, "conv-relu": 8, "conv": 11, "add-relu": 8, "gap": 1, "fc": 1},
        ),
        # 15 blocks, 14 with expansion: 6 blocks of ReLU (5 expansions), 9 of hard-swish (9 expansions); se after the
        # activation of 8 blocks; 10 sums; what feeds them and the next block is a bare convolution
        (
            mobilenet_v3,
            5_483_032,
            {
                "conv-hswish": 11,
                "conv-relu": 5,
                "dwconv-relu": 6,
                "dwconv": 9,
                "hswish": 10,
                "se": 8,
                "conv": 15,
                "add": 10,
                "gap": 1,
                "fc": 2,
            },
        ),
    ],
)
def test_networks_have_the_kernels_of_a_hand_count_and_the_latency_nn_meter_gives(
    factory: Callable[[], nn.Module], params: int, kernels: dict[str, int], predictors: PredictorSet
) -> None:
    torch.manual_seed(0)
    model, x = factory().eval(), torch.zeros(1, 3, 224, 224)
    assert sum(p.numel() for p in model.parameters()) == params
    found = nn_meter_latency(model, (x,), predictors)
    assert Counter("-".join(kernel.types) for kernel in found.kernels) == kernels
    assert pooling_at_height_1(found, predictors) == pytest.approx(own(model, x, predictors), rel=1e-9)
    assert found.approximations == ()
    assert found.missing == {}
    assert found.report() == ""


def test_table_of_the_proxylessnas_supernet_is_that_of_its_rebuilt_networks(predictors: PredictorSet) -> None:
    model, x = proxylessnas(), torch.zeros(1, 3, 224, 224)
    found = nn_meter_latency(model, (x,), predictors)
    assert {label: len(row) for label, row in found.cost.table.items()} == {
        f"block{i}": 6 if i in (1, 5, 9, 13, 17, 21) else 7 for i in range(1, 22)
    }
    assert found.cost.products == []  # nothing is fused from block to block
    for shift in (0, 3):
        choices = {f"block{i}": (i + shift) % n for i, (_, n) in enumerate(found.cost.sizes.items(), start=1)}
        arch = {label: list(model.blocks[int(label[5:])].options)[k] for label, k in choices.items()}
        plain = fixed(model, arch)
        rebuilt = nn_meter_latency(plain, (x,), predictors)
        assert found.cost.of(choices) == pytest.approx(rebuilt.cost.of({}), rel=1e-9)
        assert pooling_at_height_1(rebuilt, predictors) == pytest.approx(own(plain, x, predictors), rel=1e-9)


# ---- what nn-Meter ignores --------------------------------------------------------------------------------------


def conv_row(h: float, cin: int, cout: int, k: float, s: float, each: int) -> tuple[float, ...]:
    params = cout * (k * k * each + 1)
    return (h, cin, cout, k, s, 2 * (h / s) ** 2 * params / 2e6, params / 1e6)


@pytest.mark.parametrize(
    ("layer", "shape", "row", "note"),
    [
        (nn.Conv2d(1, 8, 3, padding=1), (1, 1, 28, 28), conv_row(28, 1, 8, 3, 1, 1), None),  # not a depthwise one
        (nn.Conv2d(8, 8, 3, groups=4), (1, 8, 9, 9), conv_row(9, 2, 8, 3, 1, 2), "4 groups priced as"),
        (nn.Conv2d(8, 8, 3, dilation=2), (1, 8, 9, 9), conv_row(9, 8, 8, 3, 1, 8), "dilation 2x2 priced as 1"),
        (nn.Conv2d(8, 8, (7, 1)), (1, 8, 9, 9), conv_row(9, 8, 8, math.sqrt(7), 1, 8), "kernel 7x1 priced as"),
        (nn.Conv2d(8, 8, (1, 7)), (1, 8, 9, 9), conv_row(9, 8, 8, math.sqrt(7), 1, 8), "kernel 1x7 priced as"),
        (nn.Conv2d(8, 8, 1), (1, 8, 4, 9), conv_row(6, 8, 8, 1, 1, 8), "image of 4x9 priced as"),
        (nn.Conv2d(8, 8, 1, stride=(1, 4)), (1, 8, 9, 9), conv_row(9, 8, 8, 1, 2, 8), "stride 1x4 priced as"),
    ],
)
def test_convolutions_that_nn_meter_misjudges(
    layer: nn.Module, shape: tuple[int, ...], row: tuple[float, ...], note: str | None, predictors: PredictorSet
) -> None:
    found = latency(layer, shape, predictors)
    ((kernel, features, times),) = asked(found)
    assert (kernel, times) == ("conv-bn-relu", 1)
    assert features == pytest.approx(row)
    assert [note in a for a in found.approximations] == ([] if note is None else [True])  # type: ignore[operator]
    assert found.cost.of({}) == pytest.approx(predictors.forests["conv-bn-relu"].predict([row])[0])
    assert found.cost.of({}) > 0


def test_depthwise_convolution_with_two_outputs_a_channel(predictors: PredictorSet) -> None:
    """16 outputs of one 3x3 channel each: 16 * (9 + 1) parameters."""
    found = latency(nn.Conv2d(8, 16, 3, groups=8, padding=1), (1, 8, 6, 6), predictors)
    assert asked(found) == [("dwconv-bn-relu", (6, 8, 16, 3, 1, 2 * 36 * 160 / 2e6, 160 / 1e6), 1)]
    assert "2 outputs per channel" in found.approximations[0]


def test_a_batch_is_as_many_images(predictors: PredictorSet) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    one, four = latency(net, (1, 3, 4, 4), predictors), latency(net, (4, 3, 4, 4), predictors)
    assert four.cost.of({}) == pytest.approx(4 * one.cost.of({}))
    assert one.approximations == ()
    assert any("batch of 4 priced as 4 times one" in a for a in four.approximations)


def test_global_pooling_is_asked_at_its_size(predictors: PredictorSet) -> None:
    for pool in (nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(7)):
        assert asked(latency(nn.Sequential(nn.ReLU(), pool), (1, 16, 7, 7), predictors))[1:] == [
            ("global-avgpool", (7, 16), 1)
        ]


def test_a_graph_of_one_node_has_a_price(predictors: PredictorSet) -> None:
    assert asked(latency(nn.Hardswish(), (1, 16, 8, 8), predictors)) == [("hswish", (8, 16), 1)]
    assert latency(nn.Hardswish(), (1, 16, 8, 8), predictors).cost.of({}) > 0


class SpelledOut(nn.Module):
    """Hard-swish by its parts, four ways."""

    def __init__(self, way: int) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        clipped = nn.functional.relu6(x + 3)
        if self.way < 2:
            return x * clipped / 6 if self.way else x * (clipped / 6)
        return x * clipped * (1 / 6) if self.way == 2 else (clipped * (1 / 6)) * x


@pytest.mark.parametrize("way", range(4))
def test_hard_swish_is_found_by_its_parts(way: int, predictors: PredictorSet) -> None:
    assert asked(latency(SpelledOut(way), (1, 16, 8, 8), predictors)) == [("hswish", (8, 16), 1)]


class Excite(nn.Module):
    def __init__(self, gate: nn.Module, linear: bool) -> None:
        super().__init__()
        self.gate, self.linear = gate, linear
        self.one, self.two = (nn.Linear(8, 2), nn.Linear(2, 8)) if linear else (nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        s = x.mean((2, 3), keepdim=not self.linear)
        s = self.gate(self.two(torch.relu(self.one(s))))
        return x * (s[:, :, None, None] if self.linear else s)


@pytest.mark.parametrize(
    ("gate", "linear", "exact"),
    [(nn.Hardsigmoid(), False, True), (nn.Sigmoid(), False, False), (nn.Sigmoid(), True, False)],
)
def test_squeeze_excite_in_its_spellings(gate: nn.Module, linear: bool, exact: bool, predictors: PredictorSet) -> None:
    found = latency(nn.Sequential(nn.Conv2d(8, 8, 1), Excite(gate, linear)), (1, 8, 8, 8), predictors)
    assert [kernel for kernel, _, _ in asked(found)] == ["conv-bn-relu", "se"]
    assert (found.approximations == ()) == exact


class Shuffle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


@pytest.mark.parametrize("shuffle", [Shuffle(), nn.ChannelShuffle(2)])
def test_channel_shuffle(shuffle: nn.Module, predictors: PredictorSet) -> None:
    assert asked(latency(shuffle, (1, 8, 6, 6), predictors)) == [("channelshuffle", (6, 8), 1)]


class Concat(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self.n, 1)


@pytest.mark.parametrize(
    ("n", "rows"),
    [
        (2, [(6, 2, 3, 3, 0, 0)]),
        (4, [(6, 4, 3, 3, 3, 3)]),
        # six of 3 channels: four of them, then their 12 with the two others; nn-Meter says 6 and forgets two
        (6, [(6, 4, 3, 3, 3, 3), (6, 3, 12, 3, 3, 0)]),
    ],
)
def test_concatenation(n: int, rows: list[tuple[int, ...]], predictors: PredictorSet) -> None:
    found = latency(Concat(n), (1, 3, 6, 6), predictors)
    assert asked(found) == [("concat", row, 1) for row in rows]
    assert len(found.approximations) == (n > 4)
    # A set that nn-Meter's own builder made has no count among its features.
    five = replace(predictors, forests={**predictors.forests, "concat": predictors.forests["avgpool"]})
    assert [features for _, features, _ in asked(latency(Concat(n), (1, 3, 6, 6), five))] == [
        (r[0], *r[2:]) for r in rows
    ]


def test_a_fused_kernel_without_a_predictor_is_priced_by_its_parts(predictors: PredictorSet) -> None:
    """The rules fuse relu with relu, and nn-Meter then finds no predictor "relu-relu" and says 0 ms."""
    net, x = nn.Sequential(nn.ReLU(), nn.ReLU()), torch.zeros(1, 8, 6, 6)
    found = nn_meter_latency(net, (x,), predictors)
    assert [kernel.types for kernel in found.kernels] == [("relu", "relu")]
    assert asked(found) == [("relu", (6, 8), 1)] * 2
    assert own(net, x, predictors) == 0
    assert found.cost.of({}) > 0
    assert "relu-relu priced as relu + relu" in found.approximations[0]


# ---- what nobody knows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape", "kernel"),
    [
        (nn.Conv1d(3, 4, 3), (1, 3, 9), "conv1d"),
        (nn.ConvTranspose2d(3, 4, 3), (1, 3, 9, 9), "convtranspose2d"),
        (nn.SiLU(), (1, 3, 9, 9), "swish"),
        (nn.GELU(), (1, 3, 9, 9), "gelu"),
        (nn.Upsample(scale_factor=2), (1, 3, 9, 9), "upsample_nearest2d"),
        (nn.ZeroPad2d(1), (1, 3, 9, 9), "constant_pad_nd"),
        (nn.LayerNorm(9), (1, 3, 9, 9), "native_layer_norm"),
        (nn.ReLU(), (1, 3, 9), "relu on 3-D tensors"),
        (nn.Conv3d(3, 4, 1), (1, 3, 4, 4, 4), "conv3d"),
    ],
)
def test_an_unknown_kernel_is_an_error_and_not_free(
    layer: nn.Module, shape: tuple[int, ...], kernel: str, predictors: PredictorSet
) -> None:
    net = nn.Sequential(nn.Identity(), layer)
    with pytest.raises(UnknownCostError) as caught:
        latency(net, shape, predictors)
    text = str(caught.value)
    assert "tiny_torchcpu" in text
    assert f"1: kernel {kernel!r}" in text
    assert f"missing={{{kernel!r}: ...}}" in text
    found = nn_meter_latency(net, (torch.zeros(shape),), predictors, missing={kernel: 0.25, "never": 1.0})
    assert found.cost.of({}) == 0.25
    assert found.missing == {kernel: 0.25}
    assert repr(kernel) in found.report()
    assert "0.25 ms" in found.report()


def test_a_predictor_that_the_set_does_not_ship(predictors: PredictorSet) -> None:
    """The sets of the two Adreno GPUs have no fc and no add."""
    adreno = replace(predictors, forests={k: f for k, f in predictors.forests.items() if k not in ("fc", "add")})
    with pytest.raises(UnknownCostError, match=r"missing=\{'add': ..., 'fc': ...\}"):
        latency(mobilenet_v2(), (1, 3, 64, 64), adreno)
    full = latency(mobilenet_v2(), (1, 3, 64, 64), predictors)
    spent = sum(part.ms for kernel in full.kernels for part in kernel.parts if part.kernel in ("fc", "add"))
    found = latency(mobilenet_v2(), (1, 3, 64, 64), adreno, fc=1.0, add=0.5)
    # one linear layer, ten sums
    assert found.cost.of({}) == pytest.approx(full.cost.of({}) - spent + 1.0 + 10 * 0.5)
    assert found.missing == {"fc": 1.0, "add": 0.5}


def test_a_predictor_of_another_width_is_refused(predictors: PredictorSet) -> None:
    wrong = replace(predictors, forests={**predictors.forests, "relu": predictors.forests["add"]})
    with pytest.raises(
        ConfigurationError, match=r"'relu' takes 3 features, nn-Meter's kernels of that name have \[2\]"
    ):
        latency(nn.ReLU(), (1, 3, 4, 4), wrong)


@pytest.mark.parametrize("ms", [-1.0, math.nan, math.inf, True, "0"])
def test_missing_is_milliseconds(ms: object, predictors: PredictorSet) -> None:
    with pytest.raises(ConfigurationError, match="milliseconds"):
        nn_meter_latency(nn.ReLU(), (torch.zeros(1, 3, 4, 4),), predictors, missing={"fc": ms})  # type: ignore[dict-item]


def test_constants_are_free(predictors: PredictorSet) -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            w = self.weight
            return nn.functional.conv2d(x, (w - w.mean()) / w.std(), self.bias)

    found = latency(Standardised(3, 4, 3), (1, 3, 9, 9), predictors)
    assert [kernel.types for kernel in found.kernels] == [("conv",)]


def test_a_choice_of_what_is_fused_with_a_shared_layer(predictors: PredictorSet) -> None:
    """conv -> relu or nothing: the rules fuse the relu, whose price is then none."""
    act = LayerChoice({"relu": nn.ReLU(), "hswish": nn.Hardswish(), "none": nn.Identity()}, label="act")
    found = latency(nn.Sequential(nn.Conv2d(3, 4, 1), act, nn.Conv2d(4, 4, 1)), (1, 3, 8, 8), predictors)
    costs = [found.cost.of({"act": k}) for k in range(3)]
    rules = json.loads(predictors.fusion_rules.read_text())
    assert rules["BF_conv_relu"]["obey"]
    assert rules["BF_conv_hswish"]["obey"]
    assert costs == pytest.approx([costs[0]] * 3)
    unfused = replace(predictors, fusion_rules=TINY / "no_rules.json")
    found = latency(nn.Sequential(nn.Conv2d(3, 4, 1), act, nn.Conv2d(4, 4, 1)), (1, 3, 8, 8), unfused)
    relu, hswish, none = (found.cost.of({"act": k}) for k in range(3))
    assert relu - none == pytest.approx(predictors.forests["relu"].predict([(8, 4)])[0])
    assert hswish - none == pytest.approx(predictors.forests["hswish"].predict([(8, 4)])[0])


def test_too_many_combinations_are_an_error(predictors: PredictorSet, tmp_path: Path) -> None:
    """Everything is fused with everything, through 8 choices of 3: 6,561 combinations."""
    path = tmp_path / "rules.json"
    kinds = ("conv", "relu", "hswish")
    path.write_text(json.dumps({f"BF_{a}_{b}": {"obey": True} for a in kinds for b in kinds}))
    greedy = replace(predictors, fusion_rules=path)
    layers = [LayerChoice([nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Hardswish()]) for _ in range(8)]
    with pytest.raises(UnsupportedModelError, match="6561 combinations"):
        latency(nn.Sequential(*layers), (1, 4, 6, 6), greedy)


def test_expected_latency_is_a_differentiable_sum(predictors: PredictorSet) -> None:
    model = proxylessnas()
    cost = nn_meter_latency(model, (torch.zeros(1, 3, 32, 32),), predictors).cost
    p = {k: torch.full((n,), 1 / n, dtype=torch.float64, requires_grad=True) for k, n in cost.sizes.items()}
    expected = cost.expected(p)
    want = cost.fixed + sum(float(np.mean(row)) for row in cost.table.values())
    assert float(expected.detach()) == pytest.approx(want, rel=1e-12)
    (gradient,) = torch.autograd.grad(expected, [p["block2"]])
    assert gradient.tolist() == pytest.approx(cost.table["block2"])


def test_a_choice_is_undecided_in_a_graph_for_nn_meter() -> None:
    with pytest.raises(ConfigurationError, match="act"):
        nn_meter_graph(nn.Sequential(LayerChoice([nn.ReLU(), nn.Tanh()], label="act")), (torch.zeros(1, 2),))


# ---- what must not be lost, or taken for something else -----------------------------------------------------------


class Written(nn.Module):
    """A buffer of zeros that is filled in place, or through a view of it, before a convolution reads it."""

    def __init__(self, way: int) -> None:
        super().__init__()
        self.conv, self.way = nn.Conv2d(8, 4, 1), way

    def forward(self, x: Tensor) -> Tensor:
        buffer = torch.zeros(x.shape[0], 8, *x.shape[2:])
        if self.way == 0:
            torch.add(x, x, out=buffer[:, :4])
        else:
            buffer[:, :4] = x
        return self.conv(buffer)


@pytest.mark.parametrize("way", [0, 1])
def test_what_is_written_into_a_constant_is_none_any_more(way: int, predictors: PredictorSet) -> None:
    found = latency(Written(way), (1, 4, 6, 6), predictors, copy=0.0)
    assert ("conv-bn-relu", conv_row(6, 8, 4, 1, 1, 8), 1) in asked(found)


def test_normalisation_by_batch_statistics_is_not_folded(predictors: PredictorSet) -> None:
    for norm in (nn.BatchNorm2d(4, track_running_stats=False), nn.InstanceNorm2d(4)):
        with pytest.raises(UnknownCostError, match="batch-statistics-norm"):
            latency(nn.Sequential(nn.Conv2d(4, 4, 1), norm), (1, 4, 6, 6), predictors)


class WeightFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight @ x


def test_a_weight_from_the_left_is_no_linear_layer(predictors: PredictorSet) -> None:
    with pytest.raises(UnknownCostError, match="'matmul'"):
        latency(WeightFirst(), (8, 64), predictors)


class Coordinates(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.ones(1, 1, 6, 6)], 1)


def test_a_constant_is_concatenated_too(predictors: PredictorSet) -> None:
    assert asked(latency(Coordinates(), (1, 8, 6, 6), predictors)) == [("concat", (6, 2, 8, 1, 0, 0), 1)]


def test_missing_stands_for_one_part_of_a_fused_kernel(predictors: PredictorSet, tmp_path: Path) -> None:
    path = tmp_path / "rules.json"
    path.write_text('{"BF_mul_relu": {"obey": true}}')
    ruled = replace(predictors, fusion_rules=path)

    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x * x)

    found = latency(Square(), (1, 8, 6, 6), ruled, mul=0.5)
    assert found.cost.of({}) == pytest.approx(0.5 + predictors.forests["relu"].predict([(6, 8)])[0])


class Foreach(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x + x
        torch._foreach_mul_([y], 2.0)
        return y


class AlmostHardSwish(nn.Module):
    def __init__(self, way: int) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == 0:
            return x * torch.relu(x + 3) / 6
        return (
            x * torch.clamp(x + 3, 0, 3) / 6 if self.way == 1 else x * torch.clamp(torch.add(x, 3, alpha=2), 0, 6) / 6
        )


class AlmostShuffle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(1, 2, 4, 6, 6).transpose(2, 4).reshape(1, 8, 6, 6)


@pytest.mark.parametrize("layer", [Foreach(), *map(AlmostHardSwish, range(3)), AlmostShuffle()])
def test_what_only_looks_like_something_known_is_unknown(layer: nn.Module, predictors: PredictorSet) -> None:
    with pytest.raises(UnknownCostError, match=r"_foreach_mul|constant|with-options|transpose"):
        latency(layer, (1, 8, 6, 6), predictors)


class Residual(nn.Module):
    """x + relu(bn(one of five convolutions)): the sum is read by the next block's choice and by its sum."""

    def __init__(self) -> None:
        super().__init__()
        self.choice = LayerChoice([nn.Conv2d(4, 4, k, padding=k // 2) for k in (1, 3, 5, 7, 9)])
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.choice(x)))


def test_blocks_that_are_not_fused_with_each_other_are_priced_apart(predictors: PredictorSet) -> None:
    """12 blocks: 5 convolutions and a sum each, 2.4e8 networks."""
    model = nn.Sequential(*(Residual() for _ in range(12)))
    found = latency(model, (1, 4, 6, 6), predictors)
    assert (len(found.kernels), found.cost.products) == (12 * 6, [])
    choices = {label: i % 5 for i, label in enumerate(found.cost.sizes)}
    assert found.cost.of(choices) == pytest.approx(latency(fixed(model, choices), (1, 4, 6, 6), predictors).cost.of({}))


def test_what_a_hook_of_the_user_does_belongs_to_its_candidate(predictors: PredictorSet) -> None:
    candidate = nn.Conv2d(4, 4, 3, padding=1)
    candidate.register_forward_pre_hook(lambda module, args: (args[0] + args[0],))
    model = nn.Sequential(nn.Conv2d(4, 4, 1), LayerChoice([candidate, nn.Identity()], label="a"))
    found = latency(model, (1, 4, 6, 6), predictors)
    assert [kernel for kernel, _, _ in asked(found)] == ["conv-bn-relu", "add", "conv-bn-relu"]
    plain = fixed(model, {"a": 0})
    assert found.cost.of({"a": 0}) == pytest.approx(latency(plain, (1, 4, 6, 6), predictors).cost.of({}))
