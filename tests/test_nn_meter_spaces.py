"""nn-Meter's price of a search space against the price of every one of its rebuilt networks.

What is fused across the border of a choice depends on both sides, so layers here end and begin with whatever rules
may fuse: convolutions, BatchNorm, ReLU, sums.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_spaces import architectures, random_space
from torch import Tensor, nn

from oneshot import fixed
from oneshot.cost.nn_meter import PredictorSet, load_predictor_set, nn_meter_latency
from oneshot.export.arch import arch_of

TINY = Path(__file__).parent / "data" / "nn_meter_tiny"
WIDTH = 4
# What three kinds of devices fuse, and two that fuse more than any, one of them through several consumers.
RULES: Mapping[str, Mapping[str, object]] = {
    "cpu": json.loads((TINY / "fusion_rules.json").read_text()),
    "sums": {
        f"BF_{a}_{b}": {"obey": True} for a, b in [("conv", "add"), ("add", "relu"), ("add", "add"), ("bn", "relu")]
    },
    "everything": {
        "MON": {"obey": 1},
        **{f"BF_{a}_{b}": {"obey": True} for a in ("conv", "add", "bn", "relu") for b in ("conv", "add", "bn", "relu")},
        "BF_conv_bn_relu": {"obey": True},
    },
}


@pytest.fixture(scope="module")
def predictors() -> PredictorSet:
    return load_predictor_set(TINY)


def with_rules(predictors: PredictorSet, name: str, folder: Path) -> PredictorSet:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(RULES[name]))
    return replace(predictors, fusion_rules=path)


class Leaf(nn.Module):
    def __init__(self, kind: int) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(WIDTH, WIDTH, 1 + 2 * (kind % 2), padding=kind % 2)
        self.norm = nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind < 2:
            return self.conv(x)
        if self.kind < 4:
            return torch.relu(self.norm(self.conv(x)))
        if self.kind == 4:
            return self.norm(x)
        if self.kind == 5:
            return torch.relu(x)
        return x + self.conv(x) if self.kind == 6 else self.norm(self.conv(x))


def leaf(rng: random.Random) -> nn.Module:
    return Leaf(rng.randrange(8))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("seed", range(14))
def test_price_of_a_space_is_that_of_its_rebuilt_networks(
    seed: int, rules: str, predictors: PredictorSet, tmp_path: Path
) -> None:
    torch.manual_seed(seed)
    model = random_space(seed, leaf)
    x = torch.randn(1, WIDTH, 6, 6)
    ruled = with_rules(predictors, rules, tmp_path)
    missing = {"div-constant": 0.01, "matmul": 0.0}
    cost = nn_meter_latency(model, (x,), ruled, missing=missing).cost
    for choices in itertools.islice(architectures(model), 0, 48, 5):
        plain = fixed(model, arch_of(model, choices))
        want = nn_meter_latency(plain, (x,), ruled, missing=missing).cost.of({})
        assert cost.of(choices) == pytest.approx(want, rel=1e-9), (seed, rules, choices)
