"""Accuracy against size in one call: five networks for handwritten digits, each within its own number of parameters.

    python examples/pareto_front.py                  (1 to 2 minutes on one CPU core)
    python examples/pareto_front.py --workers 4      (four searches at a time)

A convolutional network learns the 1,797 digits of scikit-learn for some epochs, once; from there five searches by
``PITTrainer`` begin, for a half down to a twentieth of its parameters. Interrupted and started again, it goes on where
it was. It is checked, without the library's counts, that

- each exported network has as many parameters as its row says, and no more than it was asked for;
- the row's accuracy is that of the exported network;
- exactly the rows that no other one beats are marked as the front.

Written to ``--out``: front.csv, front.json, front.png (with matplotlib), and a folder per search.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import cosine
from torch import nn
from torch.utils.data import TensorDataset

from oneshot import PIT, LabelSmoothingLoss, PITTrainer, accuracy
from oneshot.data import digits, stratified_split
from oneshot.errors import ConfigurationError
from oneshot.sweep import Front, sweep

SHARES = (0.5, 0.3, 0.2, 0.1, 0.05)  # of the parameters of the whole network
SEED, BATCH, LR, MASK_LR = 0, 64, 3e-3, 1e-2


class Plan(NamedTuple):
    """Epochs of the three phases."""

    warmup: int
    search: int
    finetune: int


FULL, QUICK = Plan(6, 15, 10), Plan(1, 3, 1)


def network() -> nn.Sequential:
    """16,850 parameters: 216 + 48, 6912 + 64, 9216 + 64, and 330 of the last layer."""
    return nn.Sequential(
        *(nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU()),  # 1x8x8 -> 24x8x8
        *(nn.Conv2d(24, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),  # -> 32x4x4
        *(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


class Datasets(NamedTuple):
    """Samples are (image 1x8x8 float32, class int64)."""

    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset


def load(seed: int = SEED) -> Datasets:
    """1,078 digits to learn from, 360 to choose the epoch, 359 to test."""
    data = digits()
    images = data.images.float() / 255 - 0.3  # 0.3 is about the mean
    rest, test = parts(list(range(len(data))), data.targets, 0.2, seed)
    train, validation = parts(rest, data.targets, 0.25, seed)
    return Datasets(*(TensorDataset(images[part], data.targets[part]) for part in (train, validation, test)))


def parts(indices: list[int], targets: torch.Tensor, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Cut in two, the second of this share, every class in the same proportion."""
    split = stratified_split(targets[indices].tolist(), share, seed)
    return [indices[i] for i in split.weight], [indices[i] for i in split.arch]


def make(checkpoint_dir: Path, *, plan: Plan, data: Datasets, **point: Any) -> PITTrainer:
    """A search of the network; ``point``: what the sweep asks of this one, ``targets={"params": ...}``."""
    pit = PIT(network(), input_shape=(1, 8, 8), train_rf=False)  # channels; all kernels stay 3 x 3
    return PITTrainer(
        pit,
        loss=LabelSmoothingLoss(),
        metrics=partial(accuracy, topk=(1,)),
        optimizer=torch.optim.AdamW(pit.net_parameters(), LR),
        warmup_epochs=plan.warmup,
        num_epochs=plan.search,
        finetune_epochs=plan.finetune,
        finetune_scheduler=cosine,
        mask_learning_rate=MASK_LR,
        dataset=data.train,
        valid_dataset=data.validation,
        monitor="acc1",
        batch_size=BATCH,
        workers=0,
        seed=SEED,
        device="cpu",
        progress=False,
        checkpoint_dir=checkpoint_dir,
        **point,
    )


def check(front: Front, factory: partial[PITTrainer], test: TensorDataset) -> None:
    """The rows against the networks themselves."""
    found = []
    images, classes = test.tensors
    for row in front.rows:
        trainer = factory(row.folder, **row.point)
        trainer.resume(row.folder)
        net = trainer.export_model().eval()
        params = sum(p.numel() for p in net.parameters())
        assert params == row.costs["params"] <= row.point["targets"]["params"], f"{row.folder}: {params} parameters"
        with torch.no_grad():
            correct = float((net(images).argmax(1) == classes).float().mean())
        assert abs(correct - row.metrics["acc1"]) < 1e-6, f"{row.folder}: accuracy {correct}"
        found.append((params, correct))
    for row, (params, correct) in zip(front.rows, found, strict=True):
        beaten = any(p <= params and c >= correct and (p, c) != (params, correct) for p, c in found)
        assert row.dominated == beaten, f"{row.folder}: dominated is {row.dominated}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/pareto_front"))
    parser.add_argument("--workers", type=int, default=1, help="searches at a time, each in a process of its own")
    parser.add_argument("--quick", action="store_true", help="few epochs; nothing is claimed of the accuracy")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    start, data = time.perf_counter(), load()
    size = sum(p.numel() for p in network().parameters())
    factory = partial(make, plan=QUICK if args.quick else FULL, data=data)
    front = sweep(
        factory,
        targets=[round(share * size) for share in SHARES],
        cost="params",
        directory=args.out,
        monitor="acc1",
        evaluate_on=data.test,
        workers=args.workers,
    )
    print(front)
    check(front, factory, data.test)
    try:
        front.plot(args.out / "front.png", cost="params")
    except ConfigurationError as error:
        print(error)  # no matplotlib
    half = front.best({"params": size / 2})
    print(
        f"within {size // 2:,} of {size:,} parameters: {half.costs['params']:,.0f}, accuracy {half.metrics['acc1']:.3f}"
    )
    print(f"written: {args.out}/front.csv, front.json; {time.perf_counter() - start:.0f} s")
    assert args.quick or half.metrics["acc1"] >= 0.95, f"test accuracy {half.metrics['acc1']:.3f} is below 0.95"


if __name__ == "__main__":
    main()
