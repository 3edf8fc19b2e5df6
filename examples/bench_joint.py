"""Choices and masks in one run, or one after the other, or masks alone: which small network is more accurate?

    python examples/bench_joint.py --digits FOLDER --cifar FOLDER    (25 minutes on one CPU core)
    python examples/bench_joint.py --quick                           (one minute: one seed of one task)

At equal epochs and one budget of parameters, a share of what the seed network has (the plain convolution in every
place):

* joint: ``PITSuperNetTrainer``, choices and masks together;
* sequential: ``SuperNetTrainer`` for half of the search, whose target is the geometric mean of the seed's parameters
  and the budget; what it exports goes with its weights to ``PITTrainer`` for the other half;
* masks alone: ``PITTrainer`` on the seed network.

Warm-up, search and fine-tuning have the same epochs, batches, optimizer and target in all three; the second trainer of
the sequential search begins with a fresh optimizer. (An epoch with choices takes longer: the seconds are in the table.)
Of the search the best epoch within the budget is kept, of the fine-tuning the best one, both on the validation set. The
exported network is tested once.

Tasks: the digits of scikit-learn (1x8x8; cut anew for every seed), spoken digits (24 bands x 65 frames; FOLDER as in
pit_supernet_tcn.py; without one the digits of scikit-learn pixel by pixel) and 2,000 images of CIFAR-10 (FOLDER as in
proxyless_cifar10.py; without one the task is left out).

The sampler of the choices and the rates were chosen on the first task with the seeds 100 and 101, and are
the same for all; the seeds 0 to 4 are reported. All runs are written to ``--out``, and one that is in it is not
repeated. Nothing is claimed of the accuracies. It is checked that all have the same number of epochs, and that every
exported network keeps its budget and costs what its search said; a search that ends without a network within the budget
(InfeasibleTargetError) counts as one that did not meet it.

Found with torch 2.13, when targets were met by a hinge alone (test accuracy, differences paired by seed, ± standard
error, in points): joint minus masks alone is -1.4 ± 0.5 on the digits, 0.0 ± 0.2 on the spoken ones and -1.1 ± 0.9 on
CIFAR-10, with 24 % fewer, 10 % more and 45 % fewer MACs; joint minus sequential is +0.6 ± 0.5, -0.3 ± 0.3 and -0.1 ±
0.2. So at one budget of parameters the choices buy no accuracy here. Of 45 runs two missed the budget, one sequential
and one of masks alone, on the digits.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, BinaryIO, NamedTuple

import torch
from common import cosine
from pit_supernet_tcn import SearchableTCN, all_plain, macs_by_torch, mixed, parts, pixel_by_pixel, spoken_digits
from proxyless_cifar10 import load, normalised
from supernet_digits import SmallCNN
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from oneshot import (
    PIT,
    LabelSmoothingLoss,
    PITSuperNetTrainer,
    PITTrainer,
    SuperNet,
    SuperNetTrainer,
    Temperature,
    accuracy,
    fixed,
)
from oneshot.data import digits, holdout
from oneshot.errors import ConfigurationError, InfeasibleTargetError
from oneshot.files import atomic_write
from oneshot.loggers import markdown_table

METHODS = ("joint", "sequential", "masks alone")
COSTS = ("params", "macs")
LR, BATCH = 3e-3, 64
MASK_LR, ALPHA_LR = 1e-2, 5e-2


class Plan(NamedTuple):
    """Epochs of the three phases."""

    warmup: int
    search: int
    finetune: int

    @property
    def epochs(self) -> int:
        return self.warmup + self.search + self.finetune


class Data(NamedTuple):
    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]


@dataclass(frozen=True)
class Task:
    """``data``: seed -> the three sets. ``share``: the budget, of the parameters of the seed network."""

    name: str
    shape: tuple[int, ...]
    space: Callable[[], nn.Module]
    data: Callable[[int], Data]
    plan: Plan
    share: float = 0.25


@dataclass(frozen=True)
class Run:
    """``error``: the message of InfeasibleTargetError, and then there is no network."""

    task: str
    method: str
    seed: int
    budget: float
    epochs: int
    seconds: float
    accuracy: float | None = None
    validation_accuracy: float | None = None
    params: int | None = None
    macs: int | None = None
    chosen: str = ""
    error: str = ""


# ---- the tasks -------------------------------------------------------------------------------------------------


def digit_images(seed: int) -> Data:
    """1,078 images for training, 360 to choose the epoch, 359 to test; cut anew for every seed."""
    data = digits()
    x = data.images.float() / 255 - 0.3  # 0.3 is about the mean
    rest, test = parts(list(range(len(data))), data.targets, 0.2, seed)
    train, validation = parts(rest, data.targets, 0.25, seed)
    return Data(*(TensorDataset(x[part], data.targets[part]) for part in (train, validation, test)))


def cifar_images(folder: Path) -> Data:
    """2,000 images for training, 500 to choose the epoch, 2,000 of the test part; the same for every seed."""
    train, validation = holdout(load(folder, True, 2_500), 500, seed=0)
    read = (train, validation, load(folder, False, 2_000))
    parts_of = [TensorDataset(normalised(part.images.float() / 255), part.targets) for part in read]
    return Data(parts_of[0], mixed(parts_of[1]), parts_of[2])


def tasks_of(spoken: Path | None, cifar: Path | None) -> list[Task]:
    found = [Task("digits", (1, 8, 8), lambda: SmallCNN(1, 1), digit_images, Plan(3, 14, 8), 0.15)]
    if spoken is None:
        print("spoken digits: no --digits, the digits of scikit-learn pixel by pixel instead")
        plan = Plan(3, 14, 8)
        found.append(
            Task("pixel by pixel", (1, 64), lambda: SearchableTCN(1), lambda seed: Data(*pixel_by_pixel(seed)), plan)
        )
    else:
        data = Data(*spoken_digits(spoken))
        plan = Plan(2, 8, 5)
        found.append(Task("spoken digits", (24, 65), lambda: SearchableTCN(24), lambda seed: data, plan))
    if cifar is None:
        print("CIFAR-10: no --cifar, left out")
    else:
        images, plan = cifar_images(cifar), Plan(2, 8, 4)
        found.append(Task("CIFAR-10", (3, 32, 32), lambda: SmallCNN(3, 2), lambda seed: images, plan))
    return found


# ---- one run ---------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """An exported network, its costs as the search says, what was chosen, and the epochs that were run."""

    net: nn.Module
    costs: Mapping[str, float]
    chosen: str
    epochs: int


def run(task: Task, method: str, seed: int) -> Run:
    """Search, export, check, and test once."""
    start, data = time.perf_counter(), task.data(seed)
    torch.manual_seed(seed)
    space = task.space()
    size = sum(p.numel() for p in seed_network(space).parameters())
    budget = math.floor(task.share * size)
    search = {"joint": joint, "sequential": sequential, "masks alone": masks_alone}[method]
    done = partial(Run, task.name, method, seed, budget)
    try:
        net, costs, chosen, epochs = search(task, space, size, budget, data, seed)
    except InfeasibleTargetError as error:
        return done(task.plan.epochs, time.perf_counter() - start, error=str(error))
    params, macs = sum(p.numel() for p in net.parameters()), macs_by_torch(net.eval(), torch.zeros(1, *task.shape))
    assert params <= budget, f"{task.name}, {method}, seed {seed}: {params} parameters, at most {budget}"
    assert (params, macs) == (costs["params"], costs["macs"]), f"{task.name}, {method}, seed {seed}: other costs"
    assert epochs == task.plan.epochs, f"{task.name}, {method}, seed {seed}: {epochs} epochs"
    seconds = time.perf_counter() - start
    return done(
        epochs, seconds, share_correct(net, data.test), share_correct(net, data.validation), params, macs, chosen
    )


def seed_network(space: nn.Module) -> nn.Module:
    return fixed(space, all_plain(space))


def joint(task: Task, space: nn.Module, size: int, budget: float, data: Data, seed: int) -> Found:
    pit, plan = PIT(space, task.shape, cost=COSTS), task.plan
    trainer = PITSuperNetTrainer(
        pit,
        mask_learning_rate=MASK_LR,
        **of_choices(),
        **of_all(pit.net_parameters(), budget, data, seed),
        warmup_epochs=plan.warmup,
        num_epochs=plan.search,
        finetune_epochs=plan.finetune,
        finetune_scheduler=cosine,
    )
    trainer.train()
    net = trainer.export_model()
    return Found(net, {name: pit.hard_cost(name) for name in COSTS}, choices_text(pit.arch()), len(trainer.history))


def sequential(task: Task, space: nn.Module, size: int, budget: float, data: Data, seed: int) -> Found:
    supernet, plan = SuperNet(space, task.shape, cost=COSTS), task.plan
    first = SuperNetTrainer(
        supernet,
        **of_choices(),
        **of_all(supernet.net_parameters(), math.sqrt(size * budget), data, seed),
        warmup_epochs=plan.warmup,
        num_epochs=plan.search // 2,
    )
    first.train()
    rest = Plan(0, plan.search - plan.search // 2, plan.finetune)
    found = masks(task, first.export_model(), rest, budget, data, seed)
    return Found(found.net, found.costs, choices_text(supernet.arch()), found.epochs + len(first.history))


def masks_alone(task: Task, space: nn.Module, size: int, budget: float, data: Data, seed: int) -> Found:
    return masks(task, seed_network(space), task.plan, budget, data, seed)


def masks(task: Task, net: nn.Module, plan: Plan, budget: float, data: Data, seed: int) -> Found:
    pit = PIT(net, task.shape, cost=COSTS)
    trainer = PITTrainer(
        pit,
        mask_learning_rate=MASK_LR,
        **of_all(pit.net_parameters(), budget, data, seed),
        warmup_epochs=plan.warmup,
        num_epochs=plan.search,
        finetune_epochs=plan.finetune,
        finetune_scheduler=cosine,
    )
    trainer.train()
    return Found(trainer.export_model(), {name: pit.hard_cost(name) for name in COSTS}, "", len(trainer.history))


def of_choices() -> dict[str, Any]:
    """Hard gates: masks and alphas pay for the path that was drawn.

    What a soft mixture is expected to cost contains its most expensive candidates. Masks that have brought it to the
    budget leave a network far below it as soon as a cheap candidate is chosen.
    """
    falling = Temperature(1.0, 0.2, "exponential")
    return {"arch_learning_rate": ALPHA_LR, "sampling": "gumbel", "hard": True, "temperature": falling}


def of_all(parameters: Any, budget: float, data: Data, seed: int) -> dict[str, Any]:
    """The arguments that all trainers share."""
    return {
        "loss": LabelSmoothingLoss(),
        "metrics": partial(accuracy, topk=(1,)),
        "optimizer": torch.optim.AdamW(parameters, LR),
        "targets": {"params": budget},
        "dataset": data.train,
        "valid_dataset": data.validation,
        "batch_size": BATCH,
        "workers": 0,
        "device": "cpu",
        "progress": False,
        "seed": seed,
    }


def choices_text(arch: Mapping[str, Any]) -> str:
    return ", ".join(str(option) for label, option in arch.items() if label.startswith("layer") and "." not in label)


@torch.no_grad()
def share_correct(net: nn.Module, data: Dataset[Any]) -> float:
    net.eval()
    right = [net(x).argmax(1) == y for x, y in DataLoader(data, 500)]
    return float(torch.cat(right).float().mean())


# ---- all runs --------------------------------------------------------------------------------------------------


def campaign(tasks: Sequence[Task], seeds: Sequence[int], out: Path) -> list[Run]:
    """The runs that are not in the file ``out`` yet; each is written there as soon as it is done."""
    settings = {task.name: [*task.plan, task.share, MASK_LR, ALPHA_LR, LR, BATCH] for task in tasks}
    known: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {"settings": {}, "runs": []}
    for name, now in settings.items():
        before = known["settings"].get(name, now)
        if before != now:
            raise ConfigurationError(f"{out}: its runs of {name} have the settings {before}, now {now}; give another")
    known["settings"].update(settings)
    runs = {(one["task"], one["method"], one["seed"]): Run(**one) for one in known["runs"]}
    wanted = [(task, method, seed) for task in tasks for seed in seeds for method in METHODS]
    for task, method, seed in wanted:
        if (task.name, method, seed) in runs:
            continue
        one = runs[task.name, method, seed] = run(task, method, seed)
        known["runs"] = [asdict(done) for done in runs.values()]
        atomic_write(out, partial(write_text, json.dumps(known, indent=1)))
        what = one.error or f"accuracy {one.accuracy:.3f}, {one.params} parameters, {one.macs} MACs, {one.chosen}"
        print(f"{task.name}, {method}, seed {seed}: {what}; {one.seconds:.0f} s", flush=True)
    return [runs[task.name, method, seed] for task, method, seed in wanted]


def write_text(text: str, file: BinaryIO) -> None:
    file.write(text.encode())


def summary(runs: Sequence[Run]) -> list[dict[str, str]]:
    """One row per task and method: mean ± standard deviation over the seeds whose network met the budget."""
    rows = []
    for task, method in dict.fromkeys((run.task, run.method) for run in runs):
        group = [run for run in runs if (run.task, run.method) == (task, method)]
        met = [run for run in group if not run.error]
        rows.append(
            {
                "task": task,
                "search": method,
                "met": f"{len(met)} of {len(group)}",
                "test accuracy": spread([run.accuracy for run in met], ".3f"),
                "parameters": spread([run.params for run in met], ",.0f"),
                "at most": f"{group[0].budget:,.0f}",
                "MACs": spread([run.macs for run in met], ",.0f"),
                "seconds": spread([run.seconds for run in met], ",.0f"),
            }
        )
    return rows


def spread(values: Sequence[float | None], form: str) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "-"
    return f"{mean(numbers):{form}}" + (f" ± {stdev(numbers):{form}}" if len(numbers) > 1 else "")


def differences(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Paired by seed: the mean of the differences in test accuracy, in points, and its standard error s / sqrt(n)."""
    rows = []
    for task in dict.fromkeys(run.task for run in runs):
        of = {(run.method, run.seed): run.accuracy for run in runs if run.task == task}
        for a, b in (("joint", "sequential"), ("joint", "masks alone"), ("sequential", "masks alone")):
            pairs = [(of[a, seed], of[b, seed]) for seed in sorted({seed for _, seed in of})]
            points = [100 * (x - y) for x, y in pairs if x is not None and y is not None]
            error = f" ± {stdev(points) / math.sqrt(len(points)):.2f}" if len(points) > 1 else ""
            found = f"{mean(points):+.2f}{error}" if points else "-"
            rows.append({"task": task, "difference": f"{a} - {b}", "points": found, "pairs": str(len(points))})
    return rows


def quick_task() -> Task:
    return Task("digits", (1, 8, 8), lambda: SmallCNN(1, 1), digit_images, Plan(2, 12, 2), 0.15)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--digits", type=Path, help="folder of the spoken digits")
    parser.add_argument("--cifar", type=Path, help="folder of CIFAR-10")
    parser.add_argument("--out", type=Path, help="JSON of all runs, by default runs/bench_joint.json")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", help="tasks, separated by commas")
    parser.add_argument("--quick", action="store_true", help="one seed of the digits, few epochs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    out = args.out or Path("runs") / ("bench_joint_quick.json" if args.quick else "bench_joint.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    tasks = [quick_task()] if args.quick else tasks_of(args.digits, args.cifar)
    tasks = [task for task in tasks if args.only is None or task.name in args.only.split(",")]
    print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}", flush=True)
    first, n = args.first_seed, 1 if args.quick else args.seeds
    runs = campaign(tasks, range(first, first + n), out)
    print(f"\n{markdown_table(summary(runs))}\n\n{markdown_table(differences(runs))}\n\nwritten: {out}")


if __name__ == "__main__":
    main()
