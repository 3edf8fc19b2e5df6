"""What a step of a supernet takes against the plain network that does the same work, in time and in saved bytes.

    python examples/bench_supernet.py [--pairs N] [--json PATH] [--device cpu|cuda]

Three spaces of MLPerf Tiny (``search_spaces/mlperf_tiny.py``), three rows each:

* SuperNet: all branches run, weighted by softmax(alpha), with the expected costs 'params' and 'macs' in the loss, and
  weights and alphas move; against the plain sum of the same branches, whose weights move.
* GDAS: the weight step of a search with hard Gumbel gates, which draws a path and runs it alone; against a fixed plain
  network of one path. Paths differ, so each step is compared with the plain network of the path that it drew.
* SPOS: the same with uniform paths.

A step is forward, cross-entropy, backward and SGD with momentum, as in a loop of one's own: for the steps of trainers
see ``bench_step.py``. The two steps of a pair run one after the other in one
process, in changing order; a ratio is of one pair, and the table gives their median and quartiles. The time is CPU time
of the process with one thread (wall time on cuda). Bytes are those of the distinct storages that autograd keeps for the
backward pass. PLiNIO's figures are those of its own networks of these names, measured on another machine.

Exits with 1 if a median is above its limit: the goal and, for times, some room for noise. About 10 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
from bench_common import NOISE, batch_of, clock, plain_step, saved_bytes, sgd, without_choices
from torch import Tensor, nn
from torch.nn import functional as F

from oneshot import GumbelSoftmax, SuperNet, UniformPath, draw, fixed, set_sampler
from oneshot.mutables import Sampler
from oneshot.trainers.modes import frozen_weights
from search_spaces.mlperf_tiny import dscnn_supernet, mobilenet_v1_supernet, resnet8_supernet


@dataclass(frozen=True)
class Case:
    """A space, the shape of one sample, the batch, and PLiNIO's ratio for its first row."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    plinio: float


CASES = (
    Case("ResNet-8", resnet8_supernet, (3, 32, 32), 64, 1.13),
    Case("DS-CNN", dscnn_supernet, (1, 49, 10), 64, 1.07),
    Case("MobileNetV1-0.25", mobilenet_v1_supernet, (3, 96, 96), 8, 1.02),
)
GOALS = {"SuperNet": 1.03, "GDAS": 1.05, "SPOS": 1.05}
N_PATHS = 4  # that the single-path rows go round


@dataclass(frozen=True)
class Result:
    name: str
    row: str
    plain_ms: float
    ratio: float
    low: float
    high: float
    bytes_ratio: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=60, help="pairs of steps for each row")
    parser.add_argument("--only", help="spaces, separated by commas")
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}")
    print(f"{'space':18}{'step':10}{'plain ms':>9}{'ratio':>8}  {'quartiles':14}{'goal':>6}{'PLiNIO':>8}{'bytes':>8}")
    failed, results = [], []
    for case in CASES:
        if options.only and case.name not in options.only.split(","):
            continue
        for row, compare in (("SuperNet", mixture), ("GDAS", single_paths), ("SPOS", single_paths)):
            result = compare(case, row, options.pairs, torch.device(options.device))
            results.append(result)
            plinio = f"{case.plinio:.2f}" if row == "SuperNet" else "-"
            print(
                f"{case.name:18}{row:10}{result.plain_ms:9.1f}{result.ratio:8.3f}  {result.low:.3f}-{result.high:.3f} "
                f"  {GOALS[row]:6.2f}{plinio:>8}{result.bytes_ratio:8.3f}",
                flush=True,
            )
            if result.ratio > GOALS[row] + NOISE:
                failed.append(f"{case.name}/{row}")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    if failed:
        print(f"above the limit: {', '.join(failed)}")
    return 1 if failed else 0


def mixture(case: Case, row: str, pairs: int, device: torch.device) -> Result:
    """All branches, with two costs, against their plain sum."""
    torch.manual_seed(0)
    space = case.build().to(device).train()
    plain = without_choices(space)
    net = SuperNet(space, case.shape, cost=("params", "macs"))
    x, y = batch_of(case.shape, case.batch, device)
    optimizer = sgd(net.parameters())

    def loss() -> Tensor:
        task = F.cross_entropy(net(x), y)
        costs = net.costs()
        return task + 1e-9 * costs["params"] + 1e-11 * costs["macs"]

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    saved = saved_bytes(loss) / saved_bytes(lambda: F.cross_entropy(plain(x), y))
    return timed(case, row, [(plain_step(plain, x, y), step)], pairs, device, saved)


def single_paths(case: Case, row: str, pairs: int, device: torch.device) -> Result:
    """The weight step along a drawn path against the plain network of that path, which draws nothing."""
    torch.manual_seed(0)
    space = case.build().to(device).train()
    net = SuperNet(space, case.shape)
    sampler: Sampler = GumbelSoftmax(hard=True) if row == "GDAS" else UniformPath()
    alphas = [decision.alpha for decision in net.choices.values()]
    x, y = batch_of(case.shape, case.batch, device)
    optimizer = sgd(net.net_parameters())
    set_sampler(net.choices, sampler)
    steps = []
    for seed in range(N_PATHS):

        def step(seed: int = seed) -> None:
            draw(net.choices, torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            with frozen_weights(alphas):
                F.cross_entropy(net(x), y).backward()
                optimizer.step()

        draw(net.choices, torch.Generator().manual_seed(seed))
        path = {label: decision.members[0].gate().graph[0] for label, decision in net.choices.items()}
        plain = fixed(space, {label: net.choices[label].options[index] for label, index in path.items()})
        steps.append((plain_step(plain, x, y), step))
    with frozen_weights(alphas):
        saved = saved_bytes(lambda: F.cross_entropy(net(x), y)) / saved_bytes(lambda: F.cross_entropy(plain(x), y))
    return timed(case, row, steps, pairs, device, saved)


def timed(
    case: Case,
    row: str,
    steps: Sequence[tuple[Callable[[], None], Callable[[], None]]],
    pairs: int,
    device: torch.device,
    saved: float,
) -> Result:
    """Pairs of a plain step and a searched one, in changing order, going round ``steps``."""
    times: list[list[float]] = [[], []]
    for pair in range(pairs + len(steps)):
        for which in (0, 1) if pair % 2 else (1, 0):
            start = clock(device)
            steps[pair % len(steps)][which]()
            times[which].append(clock(device) - start)
    plain, searched = times[0][len(steps) :], times[1][len(steps) :]
    ratios = [s / p for s, p in zip(searched, plain, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return Result(case.name, row, 1e3 * median(plain), median(ratios), low, high, saved)


if __name__ == "__main__":
    sys.exit(main())
