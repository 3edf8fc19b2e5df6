"""One supernet of NAS-Bench-Macro, evolution under a limit of MACs, and the true ranks of what was found.

    python examples/spos_cifar10.py --data FOLDER --table FILE     (8 minutes on one CPU core)
    python examples/spos_cifar10.py --quick                        (MNIST digits instead, a smoke test)

FOLDER holds CIFAR-10 as for proxyless_cifar10.py; FILE is nas-bench-macro_cifar10.json of
https://github.com/xiusu/NAS-Bench-Macro: the accuracies of all 6,561 networks of the space, trained alone three times.
The supernet here is a quarter as wide, sees images of half the size and is trained for minutes, but what a network
costs is counted at full size: the limit is that of the real networks. Evolution and random search look at equally
many architectures, with the same scores; beside them stand random networks that keep the limit. The table then says
what each is worth, and what the best network within the limit would have been: the regret is the difference.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import cosine
from proxyless_cifar10 import load, normalised, of_one
from torch import Tensor
from torch.nn import functional as F

from oneshot import CostModel, accuracy, count_macs
from oneshot.data import ArrayDataset, mnist5k
from oneshot.export import arch_of, choices_of
from oneshot.loggers import markdown_table
from oneshot.trainers.feasible import FeasibleSpace
from oneshot.trainers.random_search import RandomSearch
from oneshot.trainers.spos import SPOSTrainer
from search_spaces.nasbench_macro import code_of_choices, nasbench_macro

SEED = 0
WIDTH, FULL_WIDTH = 8, 32
BATCH, LR = 64, 0.05
IMAGE = (1, 3, 32, 32)  # of the table
N_RANDOM = 100  # networks that say what a random pick within the limit is worth


class Truth(NamedTuple):
    """Mean test accuracy in percent of every network within the limit, by code."""

    accuracy: Mapping[str, float]

    def rank(self, code: str) -> int:
        """1 for the best."""
        return 1 + sum(other > self.accuracy[code] for other in self.accuracy.values())


# ---- data ------------------------------------------------------------------------------------------------------


def images(args: argparse.Namespace) -> ArrayDataset:
    """Training images of 3x32x32; without CIFAR-10, MNIST's of 1x28x28 with a margin."""
    if args.data is not None:
        return load(args.data, True, args.train)
    data = mnist5k()
    wide = F.pad(data.images, (2, 2, 2, 2)).expand(-1, 3, -1, -1).contiguous()
    return ArrayDataset(wide, data.targets).subset(range(0, len(data), max(1, len(data) // args.train)))


def plain(image: Tensor) -> Tensor:
    """(3, 32, 32) in [0, 1] -> (3, 16, 16): a quarter of the work."""
    return F.avg_pool2d(normalised(image), 2)


def augmented(image: Tensor) -> Tensor:
    return F.avg_pool2d(of_one(image), 2)


# ---- the job ---------------------------------------------------------------------------------------------------


def limit_of(macs: CostModel, share: float) -> float:
    """MACs that about this share of the networks of the space keep."""
    generator = torch.Generator().manual_seed(SEED)
    space = FeasibleSpace(macs.sizes)
    costs = sorted(macs.of(space.draw(generator) or {}) for _ in range(1000))
    return costs[round(share * (len(costs) - 1))]


def search(train: ArrayDataset, macs: CostModel, limit: float, args: argparse.Namespace) -> SPOSTrainer:
    torch.manual_seed(SEED)
    model = nasbench_macro(width=WIDTH).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trainer = SPOSTrainer(
        model,
        loss=F.cross_entropy,
        metrics=lambda output, target: accuracy(output, target, topk=(1,)),
        monitor="acc1",
        optimizer=torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=4e-5),
        scheduler=cosine,
        num_epochs=args.epochs,
        fairness=args.fairness,
        dataset=ArrayDataset(train.images, train.targets, plain if args.data is None else augmented),
        arch_dataset=ArrayDataset(train.images, train.targets, plain),
        arch_fraction=args.held_out / len(train),
        batch_size=BATCH,
        workers=0,
        cost=macs,
        limits={"macs": limit},
        dummy_input=(1, 3, 16, 16),
        population=args.population,
        generations=args.generations,
        recalibration_samples=args.recalibration_samples,
        device=args.device,
        seed=SEED,
        checkpoint_dir=args.out,
    )
    trainer.train()
    trainer.export(args.out / "arch.json")
    return trainer


def read_truth(path: Path, macs: CostModel, limit: float) -> Truth:
    """The networks of the table that keep the limit; its MACs must be those that are counted here."""
    table: dict[str, dict[str, Any]] = json.loads(path.read_text())
    codes = {}
    for code, row in table.items():
        cost = macs.of({f"layer{i}": int(digit) for i, digit in enumerate(code, start=1)})
        assert cost == row["flops"], f"{code}: {cost} MACs counted, {row['flops']} in the table"
        if cost <= limit:
            codes[code] = float(row["mean_acc"])
    return Truth(codes)


def row(name: str, choices: Mapping[str, int], score: float, macs: CostModel, truth: Truth | None) -> dict[str, Any]:
    code = code_of_choices(choices)
    found: dict[str, Any] = {"search": name, "code": code, "score": score, "MACs": int(macs.of(choices))}
    if truth is not None:
        best = max(truth.accuracy.values())
        true = truth.accuracy[code]
        found |= {"true accuracy": true, "true rank": truth.rank(code), "regret": best - true}
    return found


def compare(
    trainer: SPOSTrainer,
    baseline: RandomSearch,
    picks: Sequence[Mapping[str, int]],
    macs: CostModel,
    truth: Truth | None,
) -> None:
    """Print the table, and check what is claimed."""
    codes = [{code_of_choices(c.choices) for c in s.candidates} for s in (trainer, baseline)]
    assert len(codes[0]) == len(codes[1]) == len(trainer.candidates), "not equally many architectures"
    for candidate in (*trainer.candidates, *baseline.candidates):
        assert macs.of(candidate.choices) <= trainer.limits["macs"], "one above the limit was scored"
    found = choices_of(trainer.model, trainer.export())
    (score,) = [c.score for c in trainer.candidates if c.choices == found]
    assert score == max(c.score for c in trainer.candidates), "not the best one was exported"
    best = baseline.best
    rows = [
        row("evolution", found, score, macs, truth),
        row("random search", best.choices, best.score, macs, truth),
    ]
    print(markdown_table(rows))
    if truth is None:
        return
    values = [truth.accuracy[code_of_choices(choices)] for choices in picks]
    print(f"\n{len(truth.accuracy)} networks keep the limit, the best has {max(truth.accuracy.values()):.2f} %")
    print(f"{len(values)} random ones: {sum(values) / len(values):.2f} % on average, the best {max(values):.2f} %")
    for which in rows:
        assert which["true accuracy"] > sum(values) / len(values), f"{which['search']} found less than a random pick"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10; without it, MNIST's digits")
    parser.add_argument("--table", type=Path, help="accuracies of NAS-Bench-Macro")
    parser.add_argument("--out", type=Path, default=Path("runs/spos_cifar10"))
    parser.add_argument("--quick", action="store_true", help="few images, one epoch, few architectures")
    parser.add_argument("--train", type=int, default=10_000, help="images, with those held out")
    parser.add_argument("--held-out", type=int, default=1_000, help="images that score the architectures")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--fairness", choices=("uniform", "strict"), default="uniform")
    parser.add_argument("--population", type=int, default=20)
    parser.add_argument("--generations", type=int, default=5)
    parser.add_argument("--recalibration-samples", type=int, default=512)
    parser.add_argument("--share", type=float, default=0.5, help="of the networks that keep the limit")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    if parser.parse_args(argv).quick:
        quick = {"train": 500, "held_out": 100, "epochs": 1, "population": 4, "generations": 2}
        parser.set_defaults(**quick, recalibration_samples=64)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    macs = count_macs(nasbench_macro(width=FULL_WIDTH), (torch.zeros(IMAGE),))
    limit = limit_of(macs, args.share)
    truth = None
    if args.table is not None and args.data is not None:
        truth = read_truth(args.table, macs, limit)
    trainer = search(images(args), macs, limit, args)
    if not trainer.is_first_process:
        return  # torchrun: for the rest, one is enough
    searched = time.perf_counter()
    baseline = trainer.random_search(seed=SEED)
    space, generator = FeasibleSpace(macs.sizes, {"macs": macs}, {"macs": limit}), torch.Generator().manual_seed(SEED)
    picks = [space.draw(generator) or {} for _ in range(N_RANDOM)]
    print(f"limit: {limit / 1e6:.1f} million MACs; {len(trainer.candidates)} architectures each\n")
    compare(trainer, baseline, picks, macs, truth)
    print(f"\nfound: {arch_of(trainer.model, choices_of(trainer.model, trainer.export()))}, in {args.out}")
    print(f"training and evolution {searched - start:.0f} s, the rest {time.perf_counter() - searched:.0f} s")


if __name__ == "__main__":
    main()
