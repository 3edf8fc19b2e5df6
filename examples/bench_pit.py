"""What a PIT step with two costs takes against the plain step of the same network, in time and in saved bytes.

    python examples/bench_pit.py [--pairs N] [--json PATH] [--device cpu|cuda]

A step is forward, cross-entropy, backward and SGD with momentum; PIT's adds the costs 'params' and 'macs' to the loss
and moves the masks too, as in a loop of one's own: for the steps of ``PITTrainer`` see ``bench_step.py``. The two steps
of a pair run one after the other in one process, in random order; a ratio is of one pair, and the table gives their
median and quartiles. The time is CPU time of the process with one thread, so that other work on the machine counts
little (wall time on cuda). Bytes are those of the distinct storages that autograd keeps for the backward pass. PLiNIO's
figures are those of its own networks of these names, measured on another machine.

Exits with 1 if a median is above its limit: the goal, and for times some room for noise. About 10 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from bench_common import NOISE, in_turns, plain_step, saved_bytes, sgd
from torch import Tensor, nn
from torch.nn import functional as F

from oneshot import PIT
from search_spaces.dscnn import dscnn, mobilenet_v1
from search_spaces.resnet import resnet8
from search_spaces.tcn import tc_resnet14


class FramesTCN(nn.Module):
    """Three frames of 8x8 pixels through one small CNN, and a convolution over them: 4 layers, 8 calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.time, self.head = nn.Conv1d(8, 16, 3, padding=1), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        frames = [self.frame(x[:, i : i + 1]) for i in range(3)]
        return self.head(F.relu(self.time(torch.stack(frames, 2))).flatten(1))

    def frame(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        return F.relu(self.norm(self.second(x))).mean((2, 3))


@dataclass(frozen=True)
class Case:
    """A network, the shape of one sample, the batch, the ratio wanted and that of PLiNIO."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    goal: float
    plinio: float


CASES = (
    Case("ResNet-8", resnet8, (3, 32, 32), 64, 1.05, 1.17),
    Case("DS-CNN", dscnn, (1, 49, 10), 64, 1.05, 1.19),
    Case("TC-ResNet14", tc_resnet14, (40, 98), 64, 1.05, 1.34),
    Case("MobileNetV1-0.25", mobilenet_v1, (3, 96, 96), 64, 1.05, 1.52),
    Case("tiny TCN", FramesTCN, (3, 8, 8), 96, 1.05, 1.91),
)
BYTES_GOAL = 1.05


@dataclass(frozen=True)
class Result:
    name: str
    plain_ms: float
    ratio: float
    low: float
    high: float
    bytes_ratio: float
    conversion_s: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=60, help="pairs of steps for each network")
    parser.add_argument("--only", help="networks, separated by commas")
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}")
    print(f"{'network':18}{'plain ms':>9}{'ratio':>8}  {'quartiles':14}{'goal':>6}{'PLiNIO':>8}{'bytes':>8}{'goal':>6}")
    failed, results = [], []
    for case in CASES:
        if options.only and case.name not in options.only.split(","):
            continue
        result = compare(case, options.pairs, torch.device(options.device))
        results.append(result)
        print(
            f"{case.name:18}{result.plain_ms:9.1f}{result.ratio:8.3f}  {result.low:.3f}-{result.high:.3f}   "
            f"{case.goal:6.2f}{case.plinio:8.2f}{result.bytes_ratio:8.3f}{BYTES_GOAL:6.2f}",
            flush=True,
        )
        if result.ratio > case.goal + NOISE or result.bytes_ratio > BYTES_GOAL:
            failed.append(case.name)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    if failed:
        print(f"above the limit: {', '.join(failed)}")
    return 1 if failed else 0


def compare(case: Case, pairs: int, device: torch.device) -> Result:
    """Pairs of steps of one network."""
    torch.manual_seed(0)
    net = case.build().to(device).train()
    began = time.perf_counter()
    pit = PIT(net, case.shape, cost=("params", "macs"))
    conversion = time.perf_counter() - began
    x = torch.randn(case.batch, *case.shape, device=device)
    y = torch.randint(2, (case.batch,), device=device)
    steps = {"plain": plain_step(net, x, y), "pit": pit_step(pit, x, y)}
    times = in_turns(steps, pairs, device, random.Random(0), warm_up=3)
    plain, masked = times["plain"], times["pit"]
    ratios = [m / p for m, p in zip(masked, plain, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    saved = saved_bytes(lambda: pit_loss(pit, x, y)) / saved_bytes(lambda: F.cross_entropy(net(x), y))
    return Result(case.name, 1e3 * median(plain), median(ratios), low, high, saved, conversion)


def pit_step(pit: PIT, x: Tensor, y: Tensor) -> Callable[[], None]:
    groups: list[dict[str, Any]] = [{"params": list(pit.net_parameters())}, {"params": list(pit.nas_parameters())}]
    optimizer = sgd(groups)

    def step() -> None:
        optimizer.zero_grad()
        pit_loss(pit, x, y).backward()
        optimizer.step()

    return step


def pit_loss(pit: PIT, x: Tensor, y: Tensor) -> Tensor:
    task = F.cross_entropy(pit(x), y)
    costs = pit.costs()
    return task + 1e-9 * costs["params"] + 1e-11 * costs["macs"]


if __name__ == "__main__":
    sys.exit(main())
