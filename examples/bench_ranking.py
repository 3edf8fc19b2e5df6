"""Does a supernet rank architectures as training them alone does? 27 networks on the 8x8 digits, all of them.

    python examples/bench_ranking.py            (a minute or two on one CPU core)
    python examples/bench_ranking.py --quick    (seconds; too short a training for a good ranking)

Three blocks of a 1x1, 3x3 or 5x5 convolution, with one BatchNorm per block that all its candidates share. Each of the
27 networks is trained alone with two seeds; two supernets are trained on uniform single paths, and rank the 27 by their
loss, with BatchNorm statistics recomputed for each architecture and with the running ones of the supernet. Of 1,319
digits each seed draws the 600 that all its networks train on; its supernet ranks on the other 719. The truth, what the
networks reach alone, is measured on the remaining 478. Kendall's tau between two seeds of the truth, whose networks saw
other digits too, is the ceiling: no ranking can be told to be better.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from common import cosine
from scipy.stats import kendalltau
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from oneshot import LayerChoice, accuracy, fixed
from oneshot.data import Split, digits, stratified_split
from oneshot.export import choices_of
from oneshot.loggers import markdown_table
from oneshot.trainers.evaluator import PathEvaluator
from oneshot.trainers.spos import SPOSTrainer

N_TRAIN, N_RANK = 600, 719
BATCH, LR, MOMENTUM, DECAY = 50, 0.05, 0.9, 1e-4
WIDTH = 16
SEEDS = (0, 1)
LEAST_TAU = 0.7  # that a supernet with recomputed statistics must reach


class Plan(NamedTuple):
    """Training steps: of each network alone, and of each supernet."""

    alone: int
    supernet: int


FULL, QUICK = Plan(150, 900), Plan(12, 24)


class Block(nn.Module):
    """One of three convolutions, and what follows all of them."""

    def __init__(self, in_width: int, label: str) -> None:
        super().__init__()
        self.conv = LayerChoice({f"k{k}": nn.Conv2d(in_width, WIDTH, k, padding=k // 2) for k in (1, 3, 5)}, label)
        self.norm = nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class DigitNet(nn.Module):
    """1x8x8 -> three blocks -> mean over the image -> ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(1, "one"), Block(WIDTH, "two"), Block(WIDTH, "three"))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))  # (N, 16, 8, 8) -> (N, 10)


ARCHS = [dict(zip(("one", "two", "three"), k, strict=True)) for k in itertools.product(("k1", "k3", "k5"), repeat=3)]


# ---- data: three parts, none of which is used for two things ------------------------------------------------------


def parts() -> tuple[TensorDataset, TensorDataset]:
    """Digits for the supernet, which holds out ``N_RANK`` of them itself, and those for the truth."""
    data = digits()
    split = stratified_split(data.targets.tolist(), (N_TRAIN + N_RANK) / len(data), seed=0)
    images = data.images.float() / 255
    used, truth = (torch.tensor(part) for part in (split.arch, split.weight))
    return TensorDataset(images[used], data.targets[used]), TensorDataset(images[truth], data.targets[truth])


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY)


# ---- training --------------------------------------------------------------------------------------------------


def train_supernet(
    data: TensorDataset, seed: int, steps: int, fairness: Literal["uniform", "strict"]
) -> tuple[SPOSTrainer, PathEvaluator]:
    """A trained supernet with its evaluator, and one that leaves its running statistics."""
    torch.manual_seed(seed)
    model = DigitNet()
    trainer = SPOSTrainer(
        model,
        loss=F.cross_entropy,
        metrics=lambda output, target: accuracy(output, target, topk=(1,)),
        optimizer=optimizer,
        # All 27 are scored here, so there is nothing to search; a search would leave the statistics of what it finds.
        warmup_epochs=-(-steps // (N_TRAIN // BATCH)),
        warmup_scheduler=cosine,
        num_epochs=0,
        fairness=fairness,
        dataset=data,
        arch_fraction=N_RANK / (N_TRAIN + N_RANK),
        batch_size=BATCH,
        workers=0,
        recalibration_samples=N_TRAIN,
        dummy_input=(1, 1, 8, 8),
        device="cpu",
        seed=seed,
        progress=False,
    )
    trainer.train()
    evaluator = trainer.evaluator
    stale = PathEvaluator(model, loss=trainer.loss, metrics=trainer.metrics, dataset=evaluator.dataset)
    return trainer, stale


def train_alone(arch: dict[str, str], data: TensorDataset, split: Split, seed: int, steps: int) -> nn.Module:
    """One of the 27 from fresh weights, by the recipe of the supernet, on the part that trains its weights."""
    torch.manual_seed(seed)
    net = fixed(DigitNet(), arch)
    own = optimizer(list(net.parameters()))
    schedule = cosine(own, steps)
    images, labels = (tensor[torch.tensor(split.weight)] for tensor in data.tensors)
    net.train()
    done = 0
    while done < steps:
        for rows in torch.randperm(len(images)).split(BATCH)[: steps - done]:
            own.zero_grad()
            F.cross_entropy(net(images[rows]), labels[rows]).backward()
            own.step()
            schedule.step()
            done += 1
    return net.eval()


@torch.no_grad()
def truth_of(net: nn.Module, data: TensorDataset) -> tuple[float, float]:
    """Loss and accuracy of a network in eval mode."""
    images, labels = data.tensors
    output = net(images)
    return float(F.cross_entropy(output, labels)), float((output.argmax(1) == labels).float().mean())


# ---- the job ---------------------------------------------------------------------------------------------------


class Truth(NamedTuple):
    """Of each of the 27, trained alone: means over the seeds."""

    losses: list[float]
    accuracies: list[float]


class Judged(NamedTuple):
    """How a supernet ranks: mean accuracy of its paths, agreement with the truth, what its best one reaches alone."""

    accuracy: float
    tau: float
    best_alone: float


def judge(trainer: SPOSTrainer, evaluator: PathEvaluator, truth: Truth) -> Judged:
    values = [evaluator.values(choices_of(trainer.model, arch)) for arch in ARCHS]
    losses = [v["loss"] for v in values]
    best = min(range(len(ARCHS)), key=losses.__getitem__)
    mean = sum(v["acc1"] for v in values) / len(values)
    return Judged(mean, tau(losses, truth.losses), truth.accuracies[best])


def averages(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def tau(one: Sequence[float], other: Sequence[float]) -> float:
    return float(kendalltau(one, other).statistic)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test: the ranking is not checked")
    parser.add_argument("--fairness", choices=("uniform", "strict"), default="uniform")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    plan = QUICK if args.quick else FULL
    start = time.perf_counter()
    used, truth_data = parts()

    # A strict step trains three paths: a third of the steps is as much training.
    steps = plan.supernet if args.fairness == "uniform" else plan.supernet // 3
    supernets = [train_supernet(used, seed, steps, args.fairness) for seed in SEEDS]
    found = []
    for seed, (trainer, _) in zip(SEEDS, supernets, strict=True):
        assert trainer.split is not None
        assert len(trainer.split.weight) == N_TRAIN
        alone = [train_alone(arch, used, trainer.split, seed, plan.alone) for arch in ARCHS]
        found.append([truth_of(net, truth_data) for net in alone])
    losses, correct = ([[pair[i] for pair in row] for row in found] for i in (0, 1))
    truth = Truth(averages(losses), averages(correct))
    print(f"alone: accuracy {min(truth.accuracies):.3f} to {max(truth.accuracies):.3f}, ", end="")
    print(f"mean {sum(truth.accuracies) / len(ARCHS):.3f}, which is what a random pick gets")
    print(f"Kendall tau between the two seeds of the truth, the ceiling: {tau(*losses):.3f}\n")

    judged = [
        (f"seed {seed}", kind, judge(trainer, evaluator, truth))
        for seed, (trainer, stale) in zip(SEEDS, supernets, strict=True)
        for kind, evaluator in (("recomputed", trainer.evaluator), ("running", stale))
    ]
    print(markdown_table([{"supernet": name, "statistics": kind, **found._asdict()} for name, kind, found in judged]))
    print(f"\n{time.perf_counter() - start:.0f} s")
    taus = [found.tau for _, kind, found in judged if kind == "recomputed"]
    if not args.quick:
        assert min(taus) >= LEAST_TAU, f"Kendall tau {taus}, at least {LEAST_TAU} was expected of each supernet"


if __name__ == "__main__":
    main()
