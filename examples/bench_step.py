"""What a step of each trainer costs against the plain training step of the same work, in time and in memory.

    python examples/bench_step.py [--pairs N] [--only ROWS] [--json PATH] [--threads 1] [--device cpu|cuda] [--compile]
    python examples/bench_step.py --quick

The steps are the trainers' own, as ``train()`` calls them batch by batch: draws, costs, shares of gradients, optimizers
of weights and architecture, checks and running averages are in them. The plain step is forward, cross-entropy,
backward and SGD with momentum of a network that knows nothing of a search: the same network for masks, the plain sum
of all branches for mixtures, the fixed network of the path that was drawn for single paths. All steps of a network
take turns in one process. A ratio is that of the medians; the quartiles are those of the ratios within one round. The
time is CPU time of the process, so that other work on the machine counts little; with ``--device cuda`` wall time in
bf16 autocast, ``--compile`` with both sides compiled. The memory is the highest sum of what was allocated since the
step began; what a search model holds between steps, the weights of all candidates, is in neither. Where there are
several paths, the ratio is the median of theirs, for memory the largest.

Networks: for PIT those of ``bench_pit.py``, for supernets and paths those of ``bench_supernet.py``; for ProxylessNAS
ten searchable MobileNetV2 blocks of 7 candidates (kernel 3, 5, 7 x expansion 3, 6, and a skip) or 14, 32x32, batch 64.

Exits with 1 if a ratio is above its goal by more than the noise of a shared machine, 0.05 (0.02 for a memory).
``--quick`` makes a few steps of small networks, to see that all rows run; it judges nothing. About 15 minutes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from bench_common import (
    NOISE,
    Step,
    about_machine,
    batch_of,
    in_turns,
    peak_bytes,
    plain_step,
    ratio_of,
    sgd,
    verdict,
    without_choices,
)
from bench_pit import CASES as PIT_CASES
from bench_pit import Case as PITCase
from bench_supernet import CASES as SUPERNET_CASES
from bench_supernet import Case as SuperNetCase
from torch import Tensor, nn

from oneshot import (
    PIT,
    DARTSTrainer,
    LayerChoice,
    PITSuperNetTrainer,
    PITTrainer,
    ProxylessTrainer,
    SPOSTrainer,
    SuperNet,
    SuperNetTrainer,
    decisions,
    fixed,
)
from oneshot.cost import PeakMemory
from oneshot.data import Split
from oneshot.loggers import markdown_table
from oneshot.trainers import Trainer
from oneshot.trainers.compilation import compiled
from search_spaces.mobilenet import Classifier, ConvBNReLU6, FeatureMix, InvertedResidual, MobileNet, Stem

COSTS = ("params", "macs")
STRENGTH = {"params": 1e-9, "macs": 1e-11}
MEMORY_GOAL, MEMORY_NOISE = 1.05, 0.02
CONVERSION_GOAL = 10.0  # seconds

STAGES = ((16, 1), (24, 5), (48, 4))  # (width, searchable blocks), at 32x32, 16x16 and 8x8 pixels
OPERATIONS = tuple((kernel, expand) for kernel in (3, 5, 7) for expand in (3, 6))
MORE_OPERATIONS = (*((kernel, expand) for kernel in (3, 5, 7) for expand in (2, 4)), (9, 3))

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Settings:
    """How it is measured."""

    device: torch.device
    pairs: int = 20
    paths: int = 4
    compiles: bool = False
    quick: bool = False
    stack: ExitStack = field(default_factory=ExitStack)  # of what is compiled until the end

    @property
    def precision(self) -> str:
        return "bf16-mixed" if self.device.type == "cuda" else "32-true"

    def compiled(self, plain: nn.Module) -> nn.Module:
        if self.compiles:
            plain.compile()
        return plain


class Comparison(NamedTuple):
    """A step of a trainer against another one; goals are the largest ratios wanted, None: for information."""

    trainer: str
    step: str
    against: str
    time_goal: float | None = None
    memory_goal: float | None = MEMORY_GOAL


class Work(NamedTuple):
    """Steps that take turns on one network, or on one path through it."""

    network: str
    steps: dict[str, Step]
    comparisons: tuple[Comparison, ...]


# ---- trainers whose steps are called one by one --------------------------------------------------------------------


def arguments(settings: Settings, batch: int) -> dict[str, Any]:
    """What all trainers are given."""
    return {
        "loss": nn.CrossEntropyLoss(),
        "metrics": None,
        "optimizer": sgd,
        "device": str(settings.device),
        "precision": settings.precision,
        "batch_size": batch,
        "workers": 0,
        "seed": 0,
    }


def ready(trainer: Trainer, settings: Settings) -> Any:
    """As at the first step of a long search: data split, network on its device and in train mode."""
    trainer.split = Split(tuple(range(1000 * trainer.batch_size)), (), 0, 0)
    trainer.fabric.to_device(trainer.model)
    settings.stack.enter_context(compiled(trainer.model, settings.compiles))
    trainer.model.train()
    return trainer


def drawn_by(trainer: Any, seed: int, batch: Batch) -> dict[str, Any]:
    """The path of a weight step that begins with this seed."""
    trainer.generator.manual_seed(seed)
    trainer._weight_step((batch[0][:2], batch[1][:2]))
    gates = {label: decision.members[0].gate() for label, decision in trainer.decisions.items()}
    return {label: trainer.decisions[label].options[gate.graph[0]] for label, gate in gates.items()}


def seeded(trainer: Any, seed: int, batch: Batch) -> Step:
    def step() -> None:
        trainer.generator.manual_seed(seed)
        trainer._weight_step(batch)

    return step


# ---- masks, mixtures and paths -------------------------------------------------------------------------------------


def masks(case: PITCase, settings: Settings) -> Iterator[Work]:
    """PIT with two costs, against the network that it was made from."""
    net = case.build().to(settings.device).train()
    batch = batch_of(case.shape, case.batch, settings.device)
    pit = PIT(net, case.shape, cost=COSTS)
    trainer = ready(PITTrainer(pit, strength=STRENGTH, **arguments(settings, case.batch)), settings)
    steps: dict[str, Step] = {
        "plain": plain_step(settings.compiled(net), *batch, precision=settings.precision),
        "search": partial(trainer._search_step, batch),
    }
    yield Work(case.name, steps, (Comparison("PITTrainer", "search", "plain", 1.05),))


def mixtures(case: SuperNetCase, settings: Settings) -> Iterator[Work]:
    """All branches of all choices, against their plain sum."""
    space = case.build().to(settings.device).train()
    batch, given = batch_of(case.shape, case.batch, settings.device), arguments(settings, case.batch)
    plain = without_choices(space)
    supernet, both = SuperNet(space, case.shape, cost=COSTS), PIT(space, case.shape, cost=COSTS)
    of_choices = ready(SuperNetTrainer(supernet, strength=STRENGTH, **given), settings)
    of_both = ready(PITSuperNetTrainer(both, strength=STRENGTH, **given), settings)
    darts = ready(DARTSTrainer(space, order=1, dummy_input=(1, *case.shape), **given), settings)
    darts._arch_iterator = itertools.repeat(batch)
    one = plain_step(settings.compiled(plain), *batch, precision=settings.precision)

    def two() -> None:
        one()
        one()

    steps: dict[str, Step] = {
        "plain sum": one,
        "two plain sums": two,
        "search": partial(of_choices._search_step, batch),
        "search, masks too": partial(of_both._search_step, batch),
        "alphas, then weights": partial(darts._search_step, batch),
    }
    yield Work(
        case.name,
        steps,
        (
            Comparison("SuperNetTrainer", "search", "plain sum", 1.03),
            Comparison("PITSuperNetTrainer", "search, masks too", "plain sum", None, None),
            Comparison("DARTSTrainer", "alphas, then weights", "two plain sums", None, None),
        ),
    )


def single_paths(case: SuperNetCase, settings: Settings) -> Iterator[Work]:
    """Weight steps along drawn paths, each against the plain network of its path."""
    space = case.build().to(settings.device).train()
    batch, given = batch_of(case.shape, case.batch, settings.device), arguments(settings, case.batch)
    size = (1, *case.shape)
    gdas = SuperNetTrainer(space, sampling="gumbel", hard=True, arch_fraction=0.5, dummy_input=size, **given)
    for name, trainer in (("GDAS", gdas), ("SPOSTrainer", SPOSTrainer(space, dummy_input=size, **given))):
        ready(trainer, settings)
        for seed in range(settings.paths):
            plain = fixed(space, drawn_by(trainer, seed, batch)).train()
            steps = {
                "plain path": plain_step(settings.compiled(plain), *batch, precision=settings.precision),
                "weights": seeded(trainer, seed, batch),
            }
            yield Work(case.name, steps, (Comparison(name, "weights", "plain path", 1.05),))


# ---- ProxylessNAS --------------------------------------------------------------------------------------------------


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
    return MobileNet(Stem(3, STAGES[0][0], 1), blocks, FeatureMix(width, 128), Classifier(128, 10))


def choice(width: int, label: str, more: bool) -> LayerChoice:
    candidates: dict[str, nn.Module] = {f"k{k}e{e}": InvertedResidual(width, width, k, e, 1) for k, e in OPERATIONS}
    candidates["skip"] = nn.Identity()
    if more:
        candidates.update({f"k{k}e{e}": InvertedResidual(width, width, k, e, 1) for k, e in MORE_OPERATIONS})
    return LayerChoice(candidates, label)


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


def proxyless_trainers(settings: Settings, batch: int) -> dict[str, Any]:
    """By name, on a space of 7 candidates or, the second one, of 14."""
    space, larger = (search_space(more).to(settings.device).train() for more in (False, True))
    rng = random.Random(0)
    table = {name: rng.uniform(0.1, 2.0) for name in (*decisions(space)["block1"].options, "fixed")}
    priced: dict[str, Any] = {"applied_hardware": table, "grad_reg_loss_params": {"lambda": 0.1}}
    references = {"params": 1e5, "macs": 1e7, "peak_memory": 1e6, "latency_ms": 10.0}
    extra: dict[str, tuple[nn.Module, dict[str, Any]]] = {
        "": (space, {}),
        ", 14": (larger, {}),
        ", all gates": (space, {"paths": "all"}),
        ", latency": (space, {**priced, "ref_latency": 10.0}),
        ", four costs": (space, {**priced, "cost": ["params", "macs", "peak_memory"], "ref_latency": references}),
    }
    given = {**arguments(settings, batch), "dummy_input": (1, 3, 32, 32)}
    return {name: ready(ProxylessTrainer(net, **given, **own), settings) for name, (net, own) in extra.items()}


def proxyless(settings: Settings) -> Iterator[Work]:
    """Both kinds of steps along random paths, each against the plain network of its path."""
    batch = batch_of((3, 32, 32), 4 if settings.quick else 64, settings.device, classes=10)
    little = batch[0][:4], batch[1][:4]
    trainers = proxyless_trainers(settings, len(batch[0]))
    space, rng = trainers[""].model, random.Random(0)
    peak = trainers[", four costs"].cost_model("peak_memory")
    assert isinstance(peak, PeakMemory)

    def with_four_costs() -> None:
        peak._known.clear()  # in a search, no two steps draw the same pairs
        trainers[", four costs"]._arch_step(little)

    for _ in range(settings.paths):
        paths = random_paths(list(trainers[""].decisions), rng)
        for trainer in trainers.values():
            prefer(trainer.model, paths)
        plain = fixed(space, {label: active for label, (active, _) in paths.items()}).train()
        steps: dict[str, Step] = {
            "plain path": plain_step(settings.compiled(plain), *batch, precision=settings.precision),
            "weights": partial(trainers[""]._weight_step, batch),
            "weights, 14": partial(trainers[", 14"]._weight_step, batch),
            "arch": partial(trainers[""]._arch_step, batch),
            "arch, 14": partial(trainers[", 14"]._arch_step, batch),
            "arch, all gates": partial(trainers[", all gates"]._arch_step, batch),
            # A cost never sees the images: on 4 of them its own time, a millisecond or two, stands out of the noise.
            "arch on 4 images": partial(trainers[""]._arch_step, little),
            "arch, latency": partial(trainers[", latency"]._arch_step, little),
            "arch, four costs": with_four_costs,
        }
        yield Work("10 MobileNetV2 blocks", steps, PROXYLESS)
        drawn = {label: decision.drawn.active for label, decision in trainers[""].decisions.items()}
        assert drawn == {label: active for label, (active, _) in paths.items()}, f"another path was drawn: {drawn}"


PROXYLESS = (
    Comparison("ProxylessTrainer", "weights", "plain path", 1.05),
    Comparison("ProxylessTrainer", "weights, 14", "plain path", 1.05),
    Comparison("ProxylessTrainer", "weights, 14", "weights", 1.05),
    Comparison("ProxylessTrainer", "arch", "plain path", 0.70),
    Comparison("ProxylessTrainer", "arch, 14", "plain path", 0.70),
    Comparison("ProxylessTrainer", "arch, all gates", "plain path"),
)
COSTS_OF_ARCH = ("arch, latency", "arch, four costs")  # against "arch"
COSTS_GOAL, COSTS_NOISE = 1.01, 0.01


# ---- one row for each comparison -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    trainer: str
    network: str
    step: str
    against: str
    plain_ms: float
    time: float
    q25: float
    q75: float
    time_goal: float | None
    time_verdict: str
    memory: float | None = None
    memory_goal: float | None = None
    memory_verdict: str = ""

    @property
    def is_missed(self) -> bool:
        return "MISSED" in (self.time_verdict, self.memory_verdict)


class Measured(NamedTuple):
    """Of one Work: step -> seconds of each round, step -> peak bytes."""

    times: dict[str, list[float]]
    peaks: dict[str, int]


def measure(works: Iterator[Work], settings: Settings) -> list[Row]:
    """The rows of works that have the same comparisons, by network."""
    rng = random.Random(1)
    found: dict[tuple[str, Comparison], list[Measured]] = {}
    networks: dict[str, list[Measured]] = {}
    for work in works:
        for step in work.steps.values():
            step()  # an optimizer's first step allocates its momentum
        peaks = {name: peak_bytes(step, settings.device) for name, step in work.steps.items()}
        measured = Measured(in_turns(work.steps, settings.pairs, settings.device, rng), peaks)
        networks.setdefault(work.network, []).append(measured)
        for comparison in work.comparisons:
            found.setdefault((work.network, comparison), []).append(measured)
        print(f"{work.network}: {', '.join(c.trainer for c in work.comparisons)}", file=sys.stderr, flush=True)
    rows = [row_of(network, comparison, of_one) for (network, comparison), of_one in found.items()]
    for network, of_one in networks.items():
        rows += [row_of_costs(network, name, of_one) for name in COSTS_OF_ARCH if name in of_one[0].times]
    return rows


def row_of(network: str, c: Comparison, found: Sequence[Measured]) -> Row:
    ratios = [ratio_of(one.times[c.step], one.times[c.against]) for one in found]
    plain_ms = 1e3 * median(median(one.times[c.against]) for one in found)
    middle, q25, q75 = (median(column) for column in zip(*ratios, strict=True))
    memory = max(one.peaks[c.step] / max(one.peaks[c.against], 1) for one in found)
    return Row(
        trainer=c.trainer,
        network=network,
        step=c.step,
        against=c.against,
        plain_ms=plain_ms,
        time=middle,
        q25=q25,
        q75=q75,
        time_goal=c.time_goal,
        time_verdict=verdict(middle, c.time_goal, NOISE),
        memory=memory,
        memory_goal=c.memory_goal,
        memory_verdict=verdict(memory, c.memory_goal, MEMORY_NOISE),
    )


def row_of_costs(network: str, name: str, found: Sequence[Measured]) -> Row:
    """What costs add to an arch step: the time they take on few images, against a step on all of them."""
    ratios = []
    for one in found:
        few, arch = one.times["arch on 4 images"], median(one.times["arch"])
        ratios.append([1 + (a - b) / arch for a, b in zip(one.times[name], few, strict=True)])
    of_paths = [median(column) for column in ratios]
    plain_ms = 1e3 * median(median(one.times["arch"]) for one in found)
    times = (median(of_paths), min(of_paths), max(of_paths))
    judged = verdict(times[0], COSTS_GOAL, COSTS_NOISE)
    return Row("ProxylessTrainer", network, name, "arch", plain_ms, *times, COSTS_GOAL, judged)


def conversion(settings: Settings) -> Row:
    """How long PIT takes to convert ResNet-50, in seconds (ResNet-8 in a quick run)."""
    torch.manual_seed(0)
    name, net, shape = ("ResNet-8", PIT_CASES[0].build(), (3, 32, 32)) if settings.quick else resnet50()
    start = time.process_time()
    PIT(net.to(settings.device), shape, cost=COSTS)
    took = time.process_time() - start
    judged = verdict(took, CONVERSION_GOAL, 1.0)
    return Row("PIT", name, "conversion, s", "-", 0.0, took, took, took, CONVERSION_GOAL, judged)


def resnet50() -> tuple[str, nn.Module, tuple[int, ...]]:
    try:
        from torchvision.models import resnet50 as build
    except ImportError:
        return "ResNet-50 (own)", own_resnet50(), (3, 224, 224)
    return "ResNet-50", build(), (3, 224, 224)


class Bottleneck(nn.Module):
    """y = relu(1x1, 3x3, 1x1 + shortcut); the output is 4 times as wide as the middle."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, o, kernel, s in ((in_width, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)):
            layers += [nn.Conv2d(i, o, kernel, s, kernel // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        self.body, self.relu = nn.Sequential(*layers[:-1]), nn.ReLU()
        conv = nn.Conv2d(in_width, 4 * width, 1, stride, bias=False)
        is_same = stride == 1 and in_width == 4 * width
        self.shortcut = nn.Identity() if is_same else nn.Sequential(conv, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def own_resnet50() -> nn.Module:
    """The layers of ResNet-50, where torchvision is not installed: 25,557,032 parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    width = 64
    for middle, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(blocks):
            layers.append(Bottleneck(width, middle, stride if i == 0 else 1))
            width = 4 * middle
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))


# ---- the table -----------------------------------------------------------------------------------------------------


def groups(settings: Settings) -> dict[str, Callable[[], list[Row]]]:
    """Name of some rows -> what measures them."""
    of_masks: Sequence[PITCase] = PIT_CASES
    of_choices: Sequence[SuperNetCase] = SUPERNET_CASES
    if settings.quick:
        of_masks = [case for case in PIT_CASES if case.name == "tiny TCN"]
        of_choices = [small(case) for case in SUPERNET_CASES if case.name == "DS-CNN"]

    def rows(works: Callable[..., Iterator[Work]], cases: Sequence[Any]) -> list[Row]:
        torch.manual_seed(0)
        return measure(itertools.chain.from_iterable(works(case, settings) for case in cases), settings)

    return {
        "pit": lambda: rows(masks, of_masks),
        "supernet": lambda: rows(mixtures, of_choices),
        "paths": lambda: rows(single_paths, of_choices),
        "proxyless": lambda: measure(proxyless(settings), settings),
        "conversion": lambda: [conversion(settings)],
    }


def small(case: SuperNetCase) -> SuperNetCase:
    return SuperNetCase(case.name, case.build, case.shape, 4, case.plinio)


def shown(row: Row) -> dict[str, Any]:
    """A row as the table has it."""
    goals = ["–" if goal is None else f"{goal:.2f}" for goal in (row.time_goal, row.memory_goal)]
    memory = "–" if row.memory is None else f"{row.memory:.3f}"
    return {
        "trainer": row.trainer,
        "network": row.network,
        "step": row.step,
        "against": f"{row.against}, {row.plain_ms:.1f} ms" if row.plain_ms else row.against,
        "time": f"{row.time:.3f}",
        "q25 – q75": f"{row.q25:.3f} – {row.q75:.3f}",
        "goal": goals[0],
        "": row.time_verdict,
        "peak memory": memory,
        "goal ": goals[1],
        " ": row.memory_verdict,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20, help="rounds for each network or path (default 20)")
    parser.add_argument("--paths", type=int, default=4, help="paths for each network (default 4)")
    parser.add_argument("--only", help="pit, supernet, paths, proxyless, conversion; several with commas")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile both sides (torch.compile)")
    parser.add_argument("--quick", action="store_true", help="a few steps of small networks, nothing is judged")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    few = {"pairs": 2, "paths": 1} if args.quick else {"pairs": args.pairs, "paths": args.paths}
    settings = Settings(torch.device(args.device), compiles=args.compile, quick=args.quick, **few)
    known = groups(settings)
    names = list(known) if args.only is None else args.only.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--only {args.only}: {unknown} are not among {list(known)}")
    with settings.stack:
        rows = [row for name in names for row in known[name]()]
    if args.quick:
        rows = [replace(row, time_verdict="not judged", memory_verdict="not judged") for row in rows]
    about = about_machine(settings.device, precision=settings.precision, compiled=args.compile, **few)
    print(", ".join(f"{name} {value}" for name, value in about.items()), end="\n\n")
    print(markdown_table([shown(row) for row in rows]))
    if args.json is not None:
        figures = {**about, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    missed = [f"{row.trainer}, {row.network}, {row.step}" for row in rows if row.is_missed]
    if missed:
        print(f"above the goal by more than the noise: {'; '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
