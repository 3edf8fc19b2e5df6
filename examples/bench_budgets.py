"""Do searches with targets keep all of them, on every seed, and at what price in accuracy?

    python examples/bench_budgets.py --digits FOLDER --jobs 2     (45 minutes on two CPU cores)
    python examples/bench_budgets.py --quick                      (two minutes: one seed, few epochs)

Each run is a search for one pair of targets, shares of the parameters and MACs of the whole network, with one seed:

* pit: ``PITTrainer`` on ResNet-8 (digits of scikit-learn), DS-CNN and a TCN (spoken digits), three pairs each;
* supernet, proxyless: ``SuperNetTrainer`` and ``ProxylessTrainer`` on a space of 3,072 networks, three targets each;
* sweep: the same networks and epochs with fixed strengths and no targets, five strengths each. A target's part of the
  sweep are its runs whose networks meet the target; of these the best on the validation set counts, seed by seed. It
  had five searches for what the targets have to find in one;
* duccio: the masks with ``DUCCIO`` as published: strengths from the first excess, a ramp to half of the search, and
  the network of the last search epoch, whatever it costs.

All have the same epochs, batches, optimizer and rates. ``ProxylessTrainer`` has no fine-tuning: what it exports is
trained by a loop of this file instead, for as many epochs. Epochs are chosen on the validation set and the network is
tested once. FOLDER is that of ``pit_supernet_tcn.py``; without one the digits of scikit-learn stand in for the spoken.

A network is judged by what is rebuilt from the written JSON: the sum of its parameters' sizes and the MACs that torch
counts. Checked are:

- every run with targets meets every target, and the library's costs are those counted;
- masks use at least 95 % of the target that binds; choices at least 95 % of the best use that any of the 3,072 networks
  within the targets makes of one (found by enumeration);
- for each trainer, over all its targets and seeds, the accuracy is not more than one standard error of the paired
  differences below that of the sweep.

Every run is written to ``--out`` with its settings and not repeated. The exit code is 1 if a claim does not hold.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, BinaryIO, NamedTuple

import torch
from budget_networks import COSTS, Data, Task, tasks_of
from common import cosine
from pit_supernet_tcn import macs_by_torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from oneshot import (
    PIT,
    CostModel,
    PITTrainer,
    ProxylessTrainer,
    SuperNetTrainer,
    Temperature,
    accuracy,
    count_macs,
    count_params,
    fixed,
)
from oneshot.errors import InfeasibleTargetError
from oneshot.export import choices_of
from oneshot.files import atomic_write
from oneshot.loggers import markdown_table
from oneshot.regularizers import DUCCIO

GROUPS = ("pit", "supernet", "proxyless", "duccio", "sweep")
SEEDS = 5
LEAST_USE = 0.95
LR, BATCH = 3e-3, 64
MASK_LR, ALPHA_LR = 1e-2, 5e-2


class Plan(NamedTuple):
    """Epochs of the three phases."""

    warmup: int
    search: int
    finetune: int


# A path of choices has seen a part of the search's steps: it is trained longer afterwards.
FULL = {"pit": Plan(6, 14, 6), "supernet": Plan(3, 12, 14), "proxyless": Plan(3, 12, 14)}
QUICK = dict.fromkeys(FULL, Plan(1, 4, 1))


@dataclass(frozen=True)
class Job:
    """One run. ``goal``: cost -> share of the whole network; or, in the sweep, the strength."""

    group: str
    task: str
    goal: Mapping[str, float] | float
    seed: int
    plan: Plan
    spoken: bool

    def key(self) -> str:
        """All that its result depends on."""
        rates = {"lr": LR, "batch": BATCH, "mask_lr": MASK_LR, "alpha_lr": ALPHA_LR}
        return json.dumps({**asdict(self), "plan": list(self.plan), **rates}, sort_keys=True)


@dataclass(frozen=True)
class Run:
    """``cost``: what the exported network has, ``whole``: the largest one; ``before``: what the search had at its end
    before anything was projected or decoded; ``is_as_reported``: the library's costs are those counted. ``best_use``:
    of any network within the targets. ``error``: the message of InfeasibleTargetError, and then there is no network.
    """

    seconds: float
    whole: Mapping[str, float]
    best_use: float = 1.0
    cost: Mapping[str, float] | None = None
    before: Mapping[str, float] | None = None
    is_as_reported: bool = True
    epochs: int = 0
    accuracy: float = math.nan
    validation_accuracy: float = math.nan
    validation_loss: float = math.nan
    error: str = ""


# ---- one run ---------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """An exported network with its weights, the one rebuilt from the file, and what the library says of both."""

    net: nn.Module
    rebuilt: nn.Module
    reported: Mapping[str, float]
    history: Sequence[Mapping[str, Any]]


def run(job: Job, place: Path | None) -> Run:
    """Search, export, count, and test once."""
    torch.set_num_threads(1)
    start, task = time.perf_counter(), tasks_of(place)[job.task]
    data, whole = task.data(job.seed), whole_costs(task)
    targets = {} if isinstance(job.goal, float) else targets_of(job.goal, whole)
    done = partial(Run, whole=whole, best_use=best_use(task, targets))
    search = with_duccio if job.group == "duccio" else SEARCHES[task.method]
    try:
        found = search(task, data, job, targets)
    except InfeasibleTargetError as error:
        return done(seconds=time.perf_counter() - start, error=str(error))
    cost = counted(found.rebuilt, task.shape)
    last = [record for record in found.history if record["phase"] == "search"][-1]
    loss, correct = judged(found.net, data.validation)
    return done(
        cost=cost,
        before={name: float(last.get(f"{name}_unprojected", last[f"{name}_hard"])) for name in COSTS},
        is_as_reported=cost == counted(found.net, task.shape) == dict(found.reported),
        epochs=len(found.history) + (job.plan.finetune if task.method == "proxyless" else 0),
        accuracy=judged(found.net, data.test)[1],
        validation_accuracy=correct,
        validation_loss=loss,
        seconds=time.perf_counter() - start,
    )


def with_masks(task: Task, data: Data, job: Job, targets: Mapping[str, float]) -> Found:
    pit = seeded_pit(task, job.seed)
    trainer = PITTrainer(pit, **of_masks(pit, data, job), **paid(job, targets))
    return trained_masks(trainer, task)


def with_duccio(task: Task, data: Data, job: Job, targets: Mapping[str, float]) -> Found:
    """The published regularizer: its strengths are made from the training loss at the end of the warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        warm = Path(folder) / "warm.ckpt"
        pit = seeded_pit(task, job.seed)
        first = PITTrainer(pit, **of_masks(pit, data, job))
        first.warm_up(warm)
        pit = seeded_pit(task, job.seed)
        regularizer = DUCCIO(dict(targets), task_loss=first.history[-1]["loss"], ramp="half")
        trainer = PITTrainer(pit, **of_masks(pit, data, job), regularizer=regularizer)
        trainer.start_from(warm)
        return trained_masks(trainer, task)


def seeded_pit(task: Task, seed: int) -> PIT:
    torch.manual_seed(seed)
    return PIT(task.build(), task.shape, cost=COSTS)


def of_masks(pit: PIT, data: Data, job: Job) -> dict[str, Any]:
    shared = of_all(pit.net_parameters(), data, job)
    return {**shared, "mask_learning_rate": MASK_LR, **of_finetuning(job)}


def trained_masks(trainer: PITTrainer, task: Task) -> Found:
    history = trainer.train()
    pit = trainer.model
    net, rebuilt = trainer.export_model(), rebuilt_from_file(trainer, PIT(task.build(), task.shape, cost=COSTS))
    return Found(net, rebuilt, {name: pit.hard_cost(name) for name in COSTS}, history)


def with_mixtures(task: Task, data: Data, job: Job, targets: Mapping[str, float]) -> Found:
    torch.manual_seed(job.seed)
    space = task.build()
    trainer = SuperNetTrainer(
        space,
        **of_all(space.parameters(), data, job),
        **of_finetuning(job),
        **paid(job, targets),
        cost=COSTS,
        dummy_input=(1, *task.shape),
        arch_learning_rate=ALPHA_LR,
        # A softmax that is undecided at the end would promise a mixture, and one candidate is exported.
        temperature=Temperature(1.0, 0.2, "exponential"),
    )
    history = trainer.train()
    return found_choices(trainer, task, trainer.export_model(), history)


def with_paths(task: Task, data: Data, job: Job, targets: Mapping[str, float]) -> Found:
    torch.manual_seed(job.seed)
    space = task.build()
    priced: dict[str, Any] = {"grad_reg_loss_params": {"lambda": job.goal}, "normalize": True}
    trainer = ProxylessTrainer(
        space,
        **of_all(space.parameters(), data, job),
        **({"targets": targets} if targets else priced),
        cost=COSTS,
        dummy_input=(1, *task.shape),
        arc_learning_rate=ALPHA_LR,
        arch_every=1,
    )
    history = trainer.train()
    net = finetuned(trainer.export_model(), data, job)
    return found_choices(trainer, task, net, history)


SEARCHES: Mapping[str, Callable[[Task, Data, Job, Mapping[str, float]], Found]]
SEARCHES = {"pit": with_masks, "supernet": with_mixtures, "proxyless": with_paths}


def found_choices(
    trainer: SuperNetTrainer | ProxylessTrainer, task: Task, net: nn.Module, history: Sequence[Mapping[str, Any]]
) -> Found:
    chosen = choices_of(trainer.model, trainer.export())
    reported = {name: trainer.cost_model(name).of(chosen) for name in COSTS}
    return Found(net, rebuilt_from_file(trainer, task.build()), reported, history)


def rebuilt_from_file(trainer: PITTrainer | SuperNetTrainer | ProxylessTrainer, space: nn.Module) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        trainer.export(Path(folder) / "arch.json")
        return fixed(space, Path(folder) / "arch.json")


def paid(job: Job, targets: Mapping[str, float]) -> dict[str, Any]:
    """What the architecture pays: above its targets, or always."""
    return {"targets": targets} if targets else {"strength": job.goal, "normalize": True}


def of_all(parameters: Iterator[nn.Parameter], data: Data, job: Job) -> dict[str, Any]:
    """The arguments that all trainers share."""
    return {
        "loss": F.cross_entropy,
        "metrics": partial(accuracy, topk=(1,)),
        "optimizer": torch.optim.AdamW(parameters, LR),
        "warmup_epochs": job.plan.warmup,
        "num_epochs": job.plan.search,
        "dataset": data.train,
        "valid_dataset": data.validation,
        "batch_size": BATCH,
        "workers": 0,
        "device": "cpu",
        "progress": False,
        "seed": job.seed,
    }


def of_finetuning(job: Job) -> dict[str, Any]:
    return {"finetune_epochs": job.plan.finetune, "finetune_scheduler": cosine}


def finetuned(net: nn.Module, data: Data, job: Job) -> nn.Module:
    """What the fine-tuning of the other trainers is, for a network: the best epoch on the validation set is kept."""
    torch.manual_seed(job.seed)
    loader = DataLoader(data.train, BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(net.parameters(), LR)
    schedule = cosine(optimizer, job.plan.finetune * len(loader))
    kept, least = deepcopy(net), math.inf
    for _ in range(job.plan.finetune):
        net.train()
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            schedule.step()
        loss, _ = judged(net, data.validation)
        if loss < least:
            kept, least = deepcopy(net), loss
    return kept


@torch.no_grad()
def judged(net: nn.Module, data: Dataset[Any]) -> tuple[float, float]:
    """Cross-entropy, and the share whose class is the largest output."""
    net.eval()
    outputs: list[Tensor] = []
    targets: list[Tensor] = []
    for x, y in DataLoader(data, 500):
        outputs.append(net(x))
        targets.append(y)
    output, target = torch.cat(outputs), torch.cat(targets)
    return float(F.cross_entropy(output, target)), float((output.argmax(1) == target).float().mean())


# ---- costs -----------------------------------------------------------------------------------------------------


def counted(net: nn.Module, shape: tuple[int, ...]) -> dict[str, float]:
    """Without the library: the sizes of all parameters, and half of what torch counts as operations."""
    macs = macs_by_torch(deepcopy(net).eval(), torch.zeros(1, *shape))
    return {"params": float(sum(p.numel() for p in net.parameters())), "macs": float(macs)}


def whole_costs(task: Task) -> dict[str, float]:
    if task.method == "pit":
        return counted(task.build(), task.shape)
    return {name: max(values) for name, values in zip(COSTS, zip(*every_cost(task), strict=True), strict=True)}


def every_cost(task: Task) -> list[tuple[float, ...]]:
    """(params, macs) of every network of the space."""
    space = task.build()
    models: list[CostModel] = [count_params(space), count_macs(space, (torch.zeros(1, *task.shape),))]
    labels, options = models[0].sizes.keys(), [range(n) for n in models[0].sizes.values()]
    every = (dict(zip(labels, chosen, strict=True)) for chosen in product(*options))
    return [tuple(model.of(chosen) for model in models) for chosen in every]


def targets_of(shares: Mapping[str, float], whole: Mapping[str, float]) -> dict[str, float]:
    return {name: float(math.floor(share * whole[name])) for name, share in shares.items()}


def use_of(cost: Mapping[str, float], targets: Mapping[str, float]) -> float:
    """What is used of the target that binds: above 1, and it is not met."""
    return max(cost[name] / target for name, target in targets.items())


def best_use(task: Task, targets: Mapping[str, float]) -> float:
    """The largest use within the targets: of masks about 1, of choices that of the best of all networks."""
    if task.method == "pit" or not targets:
        return 1.0
    uses = [use_of(dict(zip(COSTS, costs, strict=True)), targets) for costs in every_cost(task)]
    return max(use for use in uses if use <= 1)


# ---- all runs --------------------------------------------------------------------------------------------------


def jobs_of(
    tasks: Mapping[str, Task], groups: Sequence[str], seeds: Sequence[int], plans: Mapping[str, Plan], spoken: bool
) -> list[Job]:
    found = []
    for task in tasks.values():
        goals: dict[str, Sequence[Mapping[str, float] | float]] = {task.method: task.shares, "sweep": task.strengths}
        if task.method == "pit":
            goals["duccio"] = task.shares
        for group in (group for group in groups if group in goals):
            found += [
                Job(group, task.name, goal, seed, plans[task.method], spoken) for goal in goals[group] for seed in seeds
            ]
    return found


def campaign(jobs: Sequence[Job], place: Path | None, out: Path, processes: int) -> dict[str, Run]:
    """The runs by key; those that are not in the file ``out`` yet are written there as soon as they are done."""
    lines = out.read_text().splitlines() if out.is_file() else []
    runs = {one["key"]: Run(**one["run"]) for one in map(json.loads, lines)}
    missing = [job for job in jobs if job.key() not in runs]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        waiting = {pool.submit(run, job, place): job for job in missing}
        for n, future in enumerate(as_completed(waiting), 1):
            job, one = waiting[future], future.result()
            runs[job.key()] = one
            text = "".join(json.dumps({"key": key, "run": asdict(r)}) + "\n" for key, r in runs.items())
            atomic_write(out, partial(_write, text))
            print(
                f"{n}/{len(missing)} {job.group}, {job.task}, {goal_text(job.goal)}, seed {job.seed}: {line(one)}",
                flush=True,
            )
    return runs


def _write(text: str, file: BinaryIO) -> None:
    file.write(text.encode())


def line(one: Run) -> str:
    if one.cost is None:
        return f"{one.error}; {one.seconds:.0f} s"
    shares = ", ".join(f"{one.cost[name] / one.whole[name]:.3f} {name}" for name in COSTS)
    return f"{shares}, accuracy {one.accuracy:.3f}; {one.seconds:.0f} s"


def goal_text(goal: Mapping[str, float] | float) -> str:
    return f"strength {goal:g}" if isinstance(goal, float) else ", ".join(f"{s:g} {name}" for name, s in goal.items())


# ---- what was found --------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """The runs of one goal of one task, all seeds."""

    group: str
    task: str
    goal: Mapping[str, float] | float
    runs: dict[int, Run]

    @property
    def title(self) -> str:
        return f"{self.group}, {self.task}, {goal_text(self.goal)}"

    def uses(self, of: str = "cost") -> list[float]:
        """Of each run with a network: what it uses of its targets."""
        assert not isinstance(self.goal, float)
        found = [(getattr(one, of), one) for one in self.runs.values() if one.cost is not None]
        return [use_of(cost, targets_of(self.goal, one.whole)) for cost, one in found]


def rows_of(jobs: Sequence[Job], runs: Mapping[str, Run]) -> list[Row]:
    found: dict[str, Row] = {}
    for job in jobs:
        row = Row(job.group, job.task, job.goal, {})
        found.setdefault(row.title, row).runs[job.seed] = runs[job.key()]
    return list(found.values())


def budget_table(rows: Sequence[Row]) -> list[dict[str, str]]:
    table = []
    for row in rows:
        before, after, n = row.uses("before"), row.uses(), len(row.runs)
        of_best = [use / one.best_use for use, one in zip(after, [r for r in row.runs.values() if r.cost], strict=True)]
        table.append(
            {
                "trainer": row.group,
                "network": row.task,
                "targets": goal_text(row.goal),
                "met before": f"{sum(use <= 1 for use in before)} of {n}",
                "use before": ranged(before),
                "met": f"{sum(use <= 1 for use in after)} of {n}",
                "of the best use": ranged(of_best),
                "test accuracy": spread([one.accuracy for one in row.runs.values()]),
                "seconds": f"{mean(one.seconds for one in row.runs.values()):.0f}",
            }
        )
    return table


def sweep_table(rows: Sequence[Row]) -> list[dict[str, str]]:
    table = []
    for row in rows:
        made = [one for one in row.runs.values() if one.cost is not None]
        shares = {name: ranged([one.cost[name] / one.whole[name] for one in made if one.cost]) for name in COSTS}
        accuracy_of = spread([one.accuracy for one in made])
        seconds = f"{mean(one.seconds for one in made):.0f}"
        strength = {"network": row.task, "strength": goal_text(row.goal).split()[-1]}
        table.append({**strength, **shares, "test accuracy": accuracy_of, "seconds": seconds})
    return table


def duccio_table(rows: Sequence[Row]) -> list[dict[str, str]]:
    table = []
    for row in rows:
        uses = row.uses()
        over = [100 * (use - 1) for use in uses if use > 1]
        table.append(
            {
                "network": row.task,
                "targets": goal_text(row.goal),
                "met": f"{len(uses) - len(over)} of {len(row.runs)}",
                "above, % (median, largest)": f"{median(over):.1f}, {max(over):.1f}" if over else "-",
                "use": ranged(uses),
                "test accuracy": spread([one.accuracy for one in row.runs.values()]),
                "seconds": f"{mean(one.seconds for one in row.runs.values()):.0f}",
            }
        )
    return table


def best_of_sweep(row: Row, sweep: Sequence[Row], seed: int) -> Run | None:
    """The best on the validation set among the networks of the sweep that meet the targets."""
    assert not isinstance(row.goal, float)
    runs = [other.runs[seed] for other in sweep if other.task == row.task and seed in other.runs]
    met = [one for one in runs if one.cost and use_of(one.cost, targets_of(row.goal, one.whole)) <= 1]
    return max(met, key=lambda one: (one.validation_accuracy, -one.validation_loss), default=None)


def differences(row: Row, sweep: Sequence[Row]) -> list[float]:
    """Accuracy with targets minus that of the sweep, in points, for every seed in which both have a network."""
    pairs = [(one, best_of_sweep(row, sweep, seed)) for seed, one in row.runs.items()]
    return [100 * (one.accuracy - other.accuracy) for one, other in pairs if other is not None and one.cost]


def comparison_table(rows: Sequence[Row], sweep: Sequence[Row]) -> list[dict[str, str]]:
    table = []
    for row in rows:
        found = differences(row, sweep)
        best = [best_of_sweep(row, sweep, seed) for seed in row.runs]
        table.append(
            {
                "trainer": row.group,
                "network": row.task,
                "targets": goal_text(row.goal),
                "with targets": spread([one.accuracy for one in row.runs.values()]),
                "best of the sweep": spread([one.accuracy for one in best if one is not None]),
                "difference, points": with_error(found),
                "pairs": str(len(found)),
            }
        )
    for group in dict.fromkeys(row.group for row in rows):
        found = [value for row in rows if row.group == group for value in differences(row, sweep)]
        table.append(
            {"trainer": group, "network": "all", "difference, points": with_error(found), "pairs": str(len(found))}
        )
    return table


def spread(values: Sequence[float]) -> str:
    numbers = [value for value in values if not math.isnan(value)]
    if not numbers:
        return "-"
    return f"{mean(numbers):.3f}" + (f" ± {stdev(numbers):.3f}" if len(numbers) > 1 else "")


def ranged(values: Sequence[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}" if values else "-"


def with_error(points: Sequence[float]) -> str:
    if not points:
        return "-"
    return f"{mean(points):+.2f}" + (f" ± {standard_error(points):.2f}" if len(points) > 1 else "")


def standard_error(points: Sequence[float]) -> float:
    return stdev(points) / math.sqrt(len(points))


# ---- claims ----------------------------------------------------------------------------------------------------


def broken_claims(rows: Sequence[Row], sweep: Sequence[Row], *, quick: bool) -> list[str]:
    """What does not hold, a line each."""
    found = []
    for row in rows:
        for seed, one in row.runs.items():
            assert not isinstance(row.goal, float)
            found += [f"{row.title}, seed {seed}: {text}" for text in broken_by(one, row.goal, quick=quick)]
    for row in sweep:
        wrong = [seed for seed, one in row.runs.items() if not one.is_as_reported]
        found += [f"{row.title}, seed {seed}: other costs than reported" for seed in wrong]
    for group in () if quick else dict.fromkeys(row.group for row in rows):
        points = [value for row in rows if row.group == group for value in differences(row, sweep)]
        if len(points) > 1 and mean(points) < -standard_error(points):
            found.append(f"{group}: {with_error(points)} points against the best of the sweep")
    return found


def broken_by(one: Run, shares: Mapping[str, float], *, quick: bool) -> list[str]:
    if one.cost is None:
        return [one.error]
    targets = targets_of(shares, one.whole)
    use = use_of(one.cost, targets)
    found = [] if one.is_as_reported else ["other costs than reported"]
    if use > 1:
        found.append(f"{dict(one.cost)}, targets {targets}")
    if not quick and use < LEAST_USE * one.best_use:
        found.append(f"uses {use:.3f} of its targets, the best possible is {one.best_use:.3f}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--digits", type=Path, help="folder of the spoken digits")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_budgets.jsonl"), help="all runs, one in a line")
    parser.add_argument("--only", help=f"of {', '.join(GROUPS)}, separated by commas")
    parser.add_argument("--tasks", help="networks, separated by commas")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs, nothing claimed of accuracies")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tasks = {n: t for n, t in tasks_of(args.digits).items() if args.tasks is None or n in args.tasks.split(",")}
    groups = GROUPS if args.only is None else args.only.split(",")
    seeds = range(args.first_seed, args.first_seed + (1 if args.quick else args.seeds))
    jobs = jobs_of(tasks, groups, seeds, QUICK if args.quick else FULL, args.digits is not None)
    print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}, {len(jobs)} runs", flush=True)
    rows = rows_of(jobs, campaign(jobs, args.digits, args.out, args.jobs))
    sweep = [row for row in rows if row.group == "sweep"]
    duccio = [row for row in rows if row.group == "duccio"]
    aimed = [row for row in rows if row not in sweep and row not in duccio]
    tables = [budget_table(aimed), sweep_table(sweep), duccio_table(duccio), comparison_table(aimed, sweep)]
    print("\n" + "\n\n".join(markdown_table(table) for table in tables if table) + f"\n\nwritten: {args.out}")
    broken = broken_claims(aimed, sweep, quick=args.quick)
    print("\n".join(["does not hold:", *broken]) if broken else "all claims hold")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
