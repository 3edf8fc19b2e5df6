"""The ProxylessNAS space against the authors' published latency table and network, and against hand counts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from oneshot import (
    BinaryGates,
    EveryPath,
    LayerChoice,
    Softmax,
    arch_parameters,
    count_macs,
    count_params,
    decisions,
    draw,
    set_sampler,
    weight_parameters,
)
from oneshot.errors import ConfigurationError
from search_spaces.mobilenet import (
    Classifier,
    FeatureMix,
    InvertedResidual,
    MobileNet,
    Sizes,
    Stem,
    make_divisible,
    mobilenet_small,
    mobilenet_space,
    proxylessnas,
    searchable_block,
)

DATA = Path(__file__).parent / "data"
KERNELS, EXPANSIONS = (3, 5, 7), (3, 6)


def count(parameters: Iterator[nn.Parameter] | list[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


# --- latency ----------------------------------------------------------------------------------------------------


def latency_table() -> dict[str, float]:
    rows = yaml.safe_load((DATA / "proxyless_mobile_trim.yaml").read_text(encoding="utf-8"))
    return {key: row["mean"] for key, row in rows.items()}


@pytest.fixture(scope="module")
def milliseconds() -> dict[str, float]:
    return latency_table()


@pytest.fixture(scope="module")
def key_of() -> dict[str, str]:
    """Module path -> key of every module that is priced whole, seen by hooks while all of the space runs."""
    net = proxylessnas().eval()
    set_sampler(net, EveryPath())
    seen: dict[str, str] = {}

    def hook_of(path: str) -> Callable[[Any, tuple[Tensor], Tensor], None]:
        def hook(module: Any, args: tuple[Tensor], output: Tensor) -> None:
            seen[path] = module.latency_key(tuple(args[0].shape), tuple(output.shape))

        return hook

    for path, module in net.named_modules():
        if hasattr(module, "latency_key"):
            module.register_forward_hook(hook_of(path))
    with torch.no_grad():
        net(torch.zeros(1, 3, 224, 224))
    return seen


@pytest.fixture(scope="module")
def blocks(key_of: dict[str, str], milliseconds: dict[str, float]) -> list[dict[str, float]]:
    """For each of the 21 blocks, name of the candidate -> ms. A skip costs nothing."""
    by_label: list[dict[str, float]] = []
    for label, decision in decisions(proxylessnas()).items():
        index = label.removeprefix("block")
        priced = {
            name: milliseconds[key_of[f"blocks.{index}.candidates.{name}"]]
            for name in decision.options
            if name != "skip"
        }
        by_label.append(priced | ({"skip": 0.0} if "skip" in decision.options else {}))
    return by_label


def keys_of_the_paper() -> set[str]:
    """Written from the tables of the paper: (height in, width in, height out, width out, stride)."""
    places = [
        (112, 16, 56, 24, 2),
        (56, 24, 56, 24, 1),
        (56, 24, 28, 40, 2),
        (28, 40, 28, 40, 1),
        (28, 40, 14, 80, 2),
        (14, 80, 14, 80, 1),
        (14, 80, 14, 96, 1),
        (14, 96, 14, 96, 1),
        (14, 96, 7, 192, 2),
        (7, 192, 7, 192, 1),
        (7, 192, 7, 320, 1),
    ]
    searched = {
        f"expanded_conv-input:{i}x{i}x{a}-output:{o}x{o}x{b}-expand:{e}-kernel:{k}-stride:{s}-idskip:{int(a == b)}"
        for i, a, o, b, s in places
        for k in KERNELS
        for e in EXPANSIONS
    }
    return searched | {
        "Conv-input:224x224x3-output:112x112x32",
        "expanded_conv-input:112x112x32-output:112x112x16-expand:1-kernel:3-stride:1-idskip:0",
        "Conv_1-input:7x7x320-output:7x7x1280",
        "Logits-input:7x7x1280-output:1000",
    }


def test_the_space_uses_70_of_the_72_published_rows(key_of: dict[str, str], milliseconds: dict[str, float]) -> None:
    assert len(milliseconds) == 72
    assert len(key_of) == 4 + 21 * 6  # stem, first block, mix, classifier; every MBConv of every block
    assert set(key_of.values()) == keys_of_the_paper()
    assert len(set(key_of.values())) == 70
    first = "expanded_conv-input:112x112x32-output:112x112x16-expand:1-kernel:{}-stride:1-idskip:0"
    assert set(milliseconds) - set(key_of.values()) == {first.format(5), first.format(7)}


def test_latencies_of_the_space(
    key_of: dict[str, str], milliseconds: dict[str, float], blocks: list[dict[str, float]]
) -> None:
    # The sums that the authors' own estimator gives for these architectures.
    fixed = sum(milliseconds[key_of[path]] for path in ("stem", "blocks.0", "mix", "classifier"))
    expected = fixed + sum(sum(block.values()) / len(block) for block in blocks)
    assert fixed == pytest.approx(11.364156, abs=1e-6)
    assert expected == pytest.approx(113.988129, abs=1e-6)
    assert fixed + sum(block["k3e3"] for block in blocks) == pytest.approx(76.048099, abs=1e-6)
    assert fixed + sum(block["k3e6"] for block in blocks) == pytest.approx(136.466266, abs=1e-6)
    assert fixed + sum(block["k5e3"] for block in blocks) == pytest.approx(87.720278, abs=1e-6)
    assert fixed + sum(block["k7e6"] for block in blocks) == pytest.approx(191.029871, abs=1e-6)
    assert fixed + sum(max(block.values()) for block in blocks) == pytest.approx(191.029871, abs=1e-6)
    assert fixed + sum(min(block.values()) for block in blocks) == pytest.approx(29.608776, abs=1e-6)


def test_a_block_that_was_cut_is_not_priced_as_the_whole_one() -> None:
    block = InvertedResidual(24, 24, 3, 6, 1)
    block.depthwise.conv = nn.Conv2d(100, 100, 3, groups=100)
    key = block.latency_key((1, 24, 56, 56), (1, 24, 56, 56))
    assert "-expand:4.16667-" in key
    assert key not in latency_table()


# --- the space --------------------------------------------------------------------------------------------------


def test_size_of_the_space() -> None:
    net = proxylessnas()
    choices = decisions(net)
    assert list(choices) == [f"block{i}" for i in range(1, 22)]
    assert math.prod(len(choice.options) for choice in choices.values()) == 6**6 * 7**15
    assert 6**6 * 7**15 == 221_502_229_807_900_608
    assert count(weight_parameters(net)) == 16_034_168
    assert count(arch_parameters(net)) == 6 * 6 + 15 * 7
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.1, 1e-3)}


def test_skip_is_offered_exactly_where_the_shape_is_kept() -> None:
    mbconvs = ("k3e3", "k3e6", "k5e3", "k5e6", "k7e3", "k7e6")
    changing = {1, 5, 9, 13, 17, 21}  # the first block of each stage
    for i, choice in enumerate(decisions(proxylessnas()).values(), start=1):
        assert choice.options == (mbconvs if i in changing else (*mbconvs, "skip"))


def test_arguments_of_the_imagenet_space() -> None:
    net = proxylessnas(10, 1.4, in_channels=1, dropout=0.25)
    # 1.4 * (32, 16, 24, 40, 80, 96, 192, 320, 1280) = (44.8, 22.4, 33.6, 56, 112, 134.4, 268.8, 448, 1792)
    assert net.stem.layer.conv.weight.shape == (48, 1, 3, 3)
    outs = [24] + [w for w, n in zip((32, 56, 112, 136, 272, 448), (4, 4, 4, 4, 4, 1), strict=True) for _ in range(n)]
    firsts = [block if isinstance(block, InvertedResidual) else block["k3e3"] for block in net.blocks]
    assert [block.project[0].out_channels for block in firsts] == outs
    assert net.classifier.linear.weight.shape == (10, 1792)
    assert net.classifier.dropout.p == 0.25
    assert proxylessnas(10, 0.35).classifier.linear.weight.shape == (10, 1280)


@pytest.mark.parametrize("width_mult", [0.0, -1.0, math.nan, math.inf])
def test_a_width_multiplier_that_cannot_work(width_mult: float) -> None:
    with pytest.raises(ConfigurationError, match="width_mult"):
        proxylessnas(10, width_mult)


def test_even_kernels_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"\[4\] are even"):
        mobilenet_small(kernels=(3, 4))


@pytest.mark.parametrize("divisor", [1, 4, 8, 16])
def test_make_divisible_by_enumeration(divisor: int) -> None:
    for width in torch.arange(0.5, 150, 0.25).tolist():
        allowed = [m for m in range(divisor, 200, divisor) if m >= 0.9 * width]
        assert make_divisible(width, divisor) == min(allowed, key=lambda m, w=width: (abs(m - w), -m)), width


# --- the blocks -------------------------------------------------------------------------------------------------


def test_parameters_of_a_block() -> None:
    # Hidden 6 * 24 = 144. Expand: 24 * 144 = 3,456, BN 2 * 144 = 288; depthwise: 5 * 5 * 144 = 3,600, BN 288;
    # project: 144 * 40 = 5,760, BN 80. Sum 13,472.
    assert count(InvertedResidual(24, 40, 5, 6, 2).parameters()) == 13_472
    # Expansion 1 has no expansion. Depthwise: 9 * 32 = 288, BN 64; project: 32 * 16 = 512, BN 32. Sum 896.
    assert count(InvertedResidual(32, 16, 3, 1, 1).parameters()) == 896


@pytest.mark.parametrize(
    ("in_width", "out_width", "stride", "shortcut"), [(8, 8, 1, 1.0), (8, 8, 2, 0.0), (8, 16, 1, 0.0)]
)
def test_shortcut_of_a_block(in_width: int, out_width: int, stride: int, shortcut: float) -> None:
    block = InvertedResidual(in_width, out_width, 5, 3, stride).eval()
    nn.init.zeros_(block.project[0].weight)  # m(x) = 0: what is left is the shortcut
    x = torch.randn(2, in_width, 6, 6)
    size = 6 // stride
    expected = shortcut * x if shortcut else torch.zeros(2, out_width, size, size)
    assert torch.equal(block(x), expected)


def test_a_block_is_the_formula() -> None:
    block = InvertedResidual(4, 4, 3, 2, 1).double().eval()
    for p in block.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)

    def normed(y: Tensor, norm: nn.BatchNorm2d) -> Tensor:  # running mean 0 and variance 1
        scale = norm.weight / math.sqrt(1 + norm.eps)
        return y * scale[:, None, None] + norm.bias[:, None, None]

    expand, depthwise, (project, last) = block.expand, block.depthwise, block.project
    y = torch.einsum("oc,nchw->nohw", expand.conv.weight[:, :, 0, 0], x)
    y = normed(y, expand.norm).clamp(0, 6)
    windows = nn.functional.pad(y, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    y = torch.einsum("nchwij,cij->nchw", windows, depthwise.conv.weight[:, 0])
    y = normed(y, depthwise.norm).clamp(0, 6)
    y = normed(torch.einsum("oc,nchw->nohw", project.weight[:, :, 0, 0], y), last)
    torch.testing.assert_close(block(x), x + y, rtol=1e-12, atol=1e-12)


def test_candidates_of_a_choice_agree_on_shape_and_leave_their_input_alone() -> None:
    sizes = Sizes(kernels=(1, 3, 5, 7), expansions=(1, 2))
    for in_width, out_width, stride, shape in [
        (8, 8, 1, (2, 8, 7, 7)),
        (8, 8, 2, (2, 8, 4, 4)),
        (8, 16, 1, (2, 16, 7, 7)),
        (8, 16, 2, (2, 16, 4, 4)),
    ]:
        choice = searchable_block(sizes, in_width, out_width, stride, label="block")
        assert len(choice) == 8 + (shape == (2, 8, 7, 7))
        x = torch.randn(2, 8, 7, 7)
        before = x.clone()
        assert {tuple(candidate(x).shape) for candidate in choice} == {shape}
        assert torch.equal(x, before)


# --- the skip ---------------------------------------------------------------------------------------------------


def paper_gradient(choice: LayerChoice, x: Tensor, to: Tensor, active: int | None) -> tuple[Tensor, Tensor]:
    """(dL/dalpha, output) with the shortcut around the choice and a Zero, at uniform alpha; L = |y - to|^2 / 2.

    ``active``: the one candidate whose output is used, None for the mean of all.
    """
    m = [candidate(x) - x for candidate in choice]  # of the identity: the Zero
    y = x + (sum(m) / len(m) if active is None else m[active])
    c = torch.stack([((y - to) * m_k).sum() for m_k in m])
    return (c - c.mean()) / len(m), y


@pytest.mark.parametrize("active", [None, 0, 2])
def test_skip_has_the_gradients_of_a_zero_beside_a_shortcut(active: int | None) -> None:
    choice = searchable_block(Sizes(kernels=(3,)), 4, 4, 1, label="block").double().eval()
    assert choice.options == ("k3e3", "k3e6", "skip")
    x, to = torch.randn(2, 2, 4, 5, 5, dtype=torch.float64)
    alpha = choice.alpha
    assert alpha is not None
    set_sampler(choice, Softmax() if active is None else BinaryGates("all"))
    generator = torch.Generator().manual_seed(0)
    draw(choice, generator)
    while active is not None and choice.drawn.active != active:
        draw(choice, generator)
    output = choice(x)
    ((output - to) ** 2 / 2).sum().backward()
    expected, y = paper_gradient(choice, x, to, active)
    torch.testing.assert_close(output, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(alpha.grad, expected.to(alpha.dtype), rtol=1e-5, atol=1e-6)


# --- the small space --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("stem_stride", [1, 2])
def test_small_space_runs_and_learns(shape: tuple[int, int, int], stem_stride: int) -> None:
    net = mobilenet_small(7, shape[0], stem_stride=stem_stride)
    logits = net(torch.randn(4, *shape))
    assert logits.shape == (4, 7)
    logits.logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_small_space_is_small_and_scales() -> None:
    assert math.prod(len(choice.options) for choice in decisions(mobilenet_small()).values()) == 4**2 * 5**3
    larger = mobilenet_small(stages=((24, 3, 2), (48, 3, 2), (64, 2, 1)), kernels=(3,), expansions=(2, 4), dropout=0.1)
    assert [len(choice.options) for choice in decisions(larger).values()] == [2, 3, 3, 2, 3, 3, 2, 3]
    assert larger.classifier.dropout.p == 0.1


def test_sizes_are_all_followed() -> None:
    sizes = Sizes(
        stem=8, stem_stride=1, first=4, stages=((6, 1, 2),), last=10, n_classes=3, bn_momentum=0.2, bn_eps=1e-4
    )
    net = mobilenet_space(sizes)
    assert net.stem.layer.conv.weight.shape == (8, 3, 3, 3)
    assert net.blocks[0].project[0].weight.shape == (4, 8, 1, 1)
    assert net.blocks[1]["k7e6"].project[0].weight.shape == (6, 24, 1, 1)
    assert net.mix.layer.conv.weight.shape == (10, 6, 1, 1)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.2, 1e-4)}


# --- the published network --------------------------------------------------------------------------------------


def published_network() -> tuple[MobileNet, dict[str, Any]]:
    facts = json.loads((DATA / "proxyless_mobile.json").read_text(encoding="utf-8"))
    stem, last = facts["stem"], facts["blocks"][-1]["out"]
    blocks = [
        nn.Identity()
        if block is None
        else InvertedResidual(block["in"], block["out"], block["kernel"], block["expand"], block["stride"])
        for block in facts["blocks"]
    ]
    net = MobileNet(
        Stem(facts["input"][0], stem["out"], stem["stride"]),
        blocks,
        FeatureMix(last, facts["head"]["out"]),
        Classifier(facts["head"]["out"], facts["classes"]),
    )
    return net.eval(), facts


def test_published_network_has_its_parameters_and_macs() -> None:
    net, facts = published_network()
    macs = 0

    def add(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        # One multiplication per output value and input value it sees: a row of the weight.
        nonlocal macs
        macs += output.numel() * module.weight[0].numel()

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(add)
    with torch.no_grad():
        net(torch.zeros(1, *facts["input"]))
    assert count(net.parameters()) == facts["parameters"] == 4_080_512
    assert macs == facts["macs"] == 320_427_584
    assert count_params(net).of({}) == 4_080_512
    assert count_macs(net, (torch.zeros(1, *facts["input"]),)).of({}) == 320_427_584


def test_published_network_has_shortcuts_where_the_facts_say() -> None:
    net, facts = published_network()
    pairs = [(b, f) for b, f in zip(net.blocks, facts["blocks"], strict=True) if f is not None]
    assert len(pairs) == 20
    assert [block.shortcut for block, _ in pairs] == [fact["shortcut"] for _, fact in pairs]
