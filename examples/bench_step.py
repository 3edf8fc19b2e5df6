"""What a search step costs against a plain training step of the same path, in time and in memory.

    python examples/bench_step.py [--pairs N] [--json PATH] [--threads 1] [--device cpu|cuda]

Ten searchable MobileNetV2 blocks of 7 candidates (kernel 3, 5, 7 x expansion 3, 6, and a skip), images of 3x32x32,
batches of 64, float32. For each random architecture, all steps run interleaved in one process on the same active
path, beside the plain network of that path, which knows nothing of a search. A ratio pairs two steps of one
architecture and round; the table gives the median and the quartiles. The time is CPU time of the process, so that
other work on the machine counts little (wall time on cuda); the memory is the highest sum of what was allocated
since the step began. What a search model holds between steps, the weights of all candidates, is in neither.

Exits with 1 if a median is above its limit: the goal, and for times some room for noise. About 5 minutes of CPU time;
beside other work, single ratios of times scatter by 10 % or more and their medians by up to 5 %.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from oneshot import BinaryGates, LayerChoice, ProxylessTrainer, decisions, fixed
from oneshot.cost import PeakMemory
from search_spaces.mobilenet import Classifier, ConvBNReLU6, FeatureMix, InvertedResidual, MobileNet, Stem

ARCHITECTURES = 6
BATCH, CLASSES = 64, 10
STAGES = ((16, 1), (24, 5), (48, 4))  # (width, searchable blocks), at 32x32, 16x16 and 8x8 pixels
OPERATIONS = tuple((kernel, expand) for kernel in (3, 5, 7) for expand in (3, 6))
MORE_OPERATIONS = (*((kernel, expand) for kernel in (3, 5, 7) for expand in (2, 4)), (9, 3))

Step = Callable[[tuple[Tensor, Tensor]], None]


@dataclass(frozen=True)
class Comparison:
    """A step against another one. Goals are the largest ratios wanted; limits are what fails the run."""

    name: str
    step: str
    against: str = "plain"
    time_goal: float | None = None
    time_limit: float | None = None
    memory_goal: float | None = None


COMPARISONS = (
    Comparison("weight step", "weight", time_goal=1.05, time_limit=1.10, memory_goal=1.02),
    Comparison("arch step, two paths", "arch", time_goal=0.70, time_limit=0.77, memory_goal=1.00),
    Comparison("arch step, all gates", "arch, all gates"),
    Comparison("arch step, with a latency", "arch, latency", "arch", 1.01, 1.02, 1.01),
    Comparison("arch step, with four costs", "arch, four costs", "arch", 1.01, 1.02, 1.01),
    Comparison("weight step, 14 candidates", "weight, 14", "weight", 1.05, 1.10, 1.05),
    Comparison("arch step, 14 candidates", "arch, 14", "arch", 1.05, 1.10, 1.05),
)


# ---- the networks ------------------------------------------------------------------------------------------------


def search_space(more: bool = False) -> MobileNet:
    """stem, 10 choices in 3 stages, head. The layers between two stages are fixed, so every choice has a skip.

    ``more``: 7 further operations behind the first ones.
    """
    blocks: list[nn.Module] = []
    n_choices, width = 0, STAGES[0][0]
    for stage_width, n_blocks in STAGES:
        if stage_width != width:
            blocks.append(ConvBNReLU6(width, stage_width, 3, stride=2))
            width = stage_width
        for _ in range(n_blocks):
            n_choices += 1
            blocks.append(choice(width, f"block{n_choices}", more))
    return MobileNet(Stem(3, STAGES[0][0], 1), blocks, FeatureMix(width, 128), Classifier(128, CLASSES))


def choice(width: int, label: str, more: bool) -> LayerChoice:
    candidates: dict[str, nn.Module] = {f"k{k}e{e}": InvertedResidual(width, width, k, e, 1) for k, e in OPERATIONS}
    candidates["skip"] = nn.Identity()
    if more:
        candidates.update({f"k{k}e{e}": InvertedResidual(width, width, k, e, 1) for k, e in MORE_OPERATIONS})
    return LayerChoice(candidates, label)


def trainer_of(model: nn.Module, device: str, **settings: Any) -> ProxylessTrainer:
    """A trainer whose steps are called one by one here; so it has no data."""
    return ProxylessTrainer(
        model, loss=nn.CrossEntropyLoss(), metrics=None, optimizer=sgd, device=device, seed=0, **settings
    )


def sgd(parameters: Sequence[nn.Parameter]) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=4e-5)


def random_paths(labels: Sequence[str], rng: random.Random) -> dict[str, tuple[int, int]]:
    """Label -> (active, other), both of the first 7 candidates. The active one is no skip: it would cost nothing."""
    pairs = {}
    for label in labels:
        active = rng.randrange(len(OPERATIONS))
        pairs[label] = active, rng.choice([k for k in range(len(OPERATIONS) + 1) if k != active])
    return pairs


@torch.no_grad()
def prefer(model: nn.Module, paths: Mapping[str, tuple[int, int]]) -> None:
    """Decide the coming draws by alpha alone, so that the steps are the trainer's own from end to end.

    With the active path 20 logits above the other one, and that one 20 above the rest, one path in 10^8 differs.
    """
    for label, decision in decisions(model).items():
        active, other = paths[label]
        decision.alpha.zero_()
        decision.alpha[active], decision.alpha[other] = 40.0, 20.0


# ---- the steps ---------------------------------------------------------------------------------------------------


def plain_step(net: nn.Module) -> Step:
    """The training step that anyone would write for the network of one path."""
    optimizer, loss = sgd(list(net.parameters())), nn.CrossEntropyLoss()

    def step(batch: tuple[Tensor, Tensor]) -> None:
        inputs, target = batch
        optimizer.zero_grad(set_to_none=True)
        loss(net(inputs), target).backward()
        optimizer.step()

    return step


def search_steps(device: str) -> dict[str, tuple[ProxylessTrainer, Step]]:
    """The steps of a search, each with the trainer it belongs to: what ``train()`` calls, batch by batch."""
    space, larger = search_space().to(device).train(), search_space(more=True).to(device).train()
    few, many, every = trainer_of(space, device), trainer_of(larger, device), trainer_of(space, device, paths="all")
    rng = random.Random(0)
    table = {name: rng.uniform(0.1, 2.0) for name in (*decisions(space)["block1"].options, "fixed")}
    common: dict[str, Any] = {
        "applied_hardware": table,
        "grad_reg_loss_params": {"lambda": 0.1},
        "dummy_input": (1, 3, 32, 32),
    }
    priced = trainer_of(space, device, **common, ref_latency=10.0)
    references = {"params": 1e5, "macs": 1e7, "peak_memory": 1e6, "latency_ms": 10.0}
    weighed = trainer_of(space, device, **common, cost=["params", "macs", "peak_memory"], ref_latency=references)
    peak = weighed.cost_model("peak_memory")
    assert isinstance(peak, PeakMemory)

    def with_four_costs(batch: tuple[Tensor, Tensor]) -> None:
        peak._known.clear()  # in a search, no two steps draw the same pairs
        weighed._arch_step(batch)

    return {
        "weight": (few, lambda batch: few._update_weights(batch, BinaryGates(1))),
        "weight, 14": (many, lambda batch: many._update_weights(batch, BinaryGates(1))),
        "arch": (few, few._arch_step),
        "arch, 14": (many, many._arch_step),
        "arch, all gates": (every, every._arch_step),
        "arch, latency": (priced, priced._arch_step),
        "arch, four costs": (weighed, with_four_costs),
    }


# ---- measuring ---------------------------------------------------------------------------------------------------


def seconds(step: Step, batch: tuple[Tensor, Tensor]) -> float:
    """Of one step: CPU time of the process; with a GPU wall time until it is done."""
    start = clock(batch[0].is_cuda)
    step(batch)
    return clock(batch[0].is_cuda) - start


def clock(is_cuda: bool) -> float:
    if not is_cuda:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(step: Step, batch: tuple[Tensor, Tensor]) -> int:
    """Highest sum, within one step, of the allocations since it began less what was freed of them."""
    if batch[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(batch)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step(batch)
    recorded = record.profiler.kineto_results.events() if record.profiler and record.profiler.kineto_results else []
    events = [event for event in recorded if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def measure(pairs: int, device: str) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Step -> seconds of every architecture and round; step -> peak bytes of every architecture."""
    torch.manual_seed(0)
    rng = random.Random(0)
    searching = search_steps(device)
    trainers, searched = [trainer for trainer, _ in searching.values()], searching["weight"][0]
    batch = torch.randn(BATCH, 3, 32, 32, device=device), torch.randint(CLASSES, (BATCH,), device=device)
    little = batch[0][:4], batch[1][:4]
    times: dict[str, list[float]] = {name: [] for name in ("plain", *searching)}
    peaks: dict[str, list[float]] = {name: [] for name in times}
    for n in range(ARCHITECTURES):
        paths = random_paths(list(searched.decisions), rng)
        active = {label: pair[0] for label, pair in paths.items()}
        for trainer in trainers:
            prefer(trainer.model, paths)
        steps = {name: step for name, (_, step) in searching.items()}
        steps["plain"] = plain_step(fixed(searched.model, active).train())
        for name, step in steps.items():
            step(little)  # an optimizer's first step allocates its momentum
            peaks[name].append(peak_bytes(step, batch))
        with_costs = {name: steps.pop(name) for name in ("arch, latency", "arch, four costs")}
        for _ in range(pairs):
            for name in rng.sample(list(steps), len(steps)):
                times[name].append(seconds(steps[name], batch))
            # A cost never sees the images: on 4 of them its own time, a millisecond or two, stands out of the noise.
            for name, step in with_costs.items():
                more = median(seconds(step, little) - seconds(steps["arch"], little) for _ in range(7))
                times[name].append(times["arch"][-1] + more)
        for trainer in trainers:
            drawn = {label: decision.drawn.active for label, decision in trainer.decisions.items()}
            assert drawn == active, f"another path was drawn, {drawn} instead of {active}"
        print(f"architecture {n + 1} of {ARCHITECTURES}", file=sys.stderr, flush=True)
    return times, peaks


# ---- the table ---------------------------------------------------------------------------------------------------


def compare(times: Mapping[str, Sequence[float]], peaks: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """The rows of the table: of every comparison one for the time and one for the memory."""
    rows: list[dict[str, Any]] = []
    for c in COMPARISONS:
        in_time = ("time", times, c.time_goal, c.time_limit)
        in_memory = ("peak memory", peaks, c.memory_goal, c.memory_goal)
        for figure, figures, goal, limit in (in_time, in_memory):
            ratios = [a / b for a, b in zip(figures[c.step], figures[c.against], strict=True)]
            q25, middle, q75 = quantiles(ratios, n=4, method="inclusive")
            row = {"step": c.name, "against": c.against, "figure": figure, "median": middle, "q25": q25, "q75": q75}
            rows.append({**row, "goal": goal, "limit": limit, "verdict": verdict(middle, goal, limit)})
    return rows


def verdict(ratio: float, goal: float | None, limit: float | None) -> str:
    if goal is None or limit is None:
        return "for information"
    return "met" if ratio <= goal else "within noise" if ratio <= limit else "MISSED"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| step | against | | median | q25 – q75 | goal | limit | |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        goal, limit = ("–" if row[key] is None else f"{row[key]:.2f}" for key in ("goal", "limit"))
        ratio = f"{row['median']:.3f} | {row['q25']:.3f} – {row['q75']:.3f}"
        names = f"{row['step']} | {row['against']} | {row['figure']}"
        lines.append(f"| {names} | {ratio} | {goal} | {limit} | {row['verdict']} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=5, help="rounds per architecture (default 5)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    times, peaks = measure(args.pairs, args.device)
    rows = compare(times, peaks)
    machine = f"{platform.platform()}, {os.cpu_count()} cores"
    if args.device == "cuda":
        machine += f", {torch.cuda.get_device_name()}"
    about = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
        "threads": args.threads,
        "torch": torch.__version__,
        "architectures": ARCHITECTURES,
        "rounds": args.pairs,
        "plain_seconds": median(times["plain"]),
        "plain_peak_megabytes": median(peaks["plain"]) / 1e6,
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()), markdown(rows), sep="\n\n")
    if args.json:
        figures = {"seconds": times, "peak_bytes": peaks}
        args.json.write_text(json.dumps({**about, "rows": rows, **figures}, indent=2) + "\n", encoding="utf-8")
    missed = [f"{row['step']}, {row['figure']}" for row in rows if row["verdict"] == "MISSED"]
    if missed:
        print(f"above the limit: {'; '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
