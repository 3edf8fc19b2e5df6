"""Searches layers with ``SuperNetTrainer`` for a number of operations, and compares with random networks of the budget.

    python examples/supernet_digits.py        (two minutes on one CPU core)

Each of four layers of a small network for the digits of scikit-learn (1x8x8) is a convolution of 3x3 or 5x5, a
depthwise separable one or, where the shape stays, nothing: 4^2 * 3^2 = 144 networks. In the search all candidates run,
weighed by the softmax of their alphas, and the loss pays for every MAC that is expected above the target, 30 % of
what the network of plain 3x3 convolutions takes. A falling temperature makes it decide.

Beside the found network stand the network of 3x3 convolutions and four random ones, drawn among those that keep the
target and use at least half of it. All are trained alike from fresh weights, twice, and tested on 360 images that the
search has not seen. It is checked that the found network keeps the target, has the parameters and MACs of the table
(counted by torch), and is at most one point less accurate than the random ones are on average.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from common import random_feasible, retrain, test_accuracy
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from oneshot import (
    CostModel,
    LabelSmoothingLoss,
    LayerChoice,
    SuperNetTrainer,
    Temperature,
    accuracy,
    count_macs,
    count_params,
    fixed,
    load_fixed,
)
from oneshot.data import ArrayDataset, digits, holdout
from oneshot.export import arch_of, choices_of
from oneshot.loggers import markdown_table

SEED, BATCH = 0, 64
SHARE = 0.3  # of the MACs of the network of 3x3 convolutions
MARGIN = 0.01  # of test accuracy
WARMUP_EPOCHS, SEARCH_EPOCHS, RETRAIN_EPOCHS, REPEATS = 3, 15, 15, 2
IMAGE = (1, 1, 8, 8)


# ---- the space -------------------------------------------------------------------------------------------------


class SmallCNN(nn.Module):
    """A stem, four layers to choose, the mean over the image, a linear layer. Shapes for 1x8x8 and stride 1.

    ``stride``: of the stem and of the last layer. ``widths``: of the stem and of the second half.
    """

    def __init__(self, in_channels: int, stride: int, widths: tuple[int, int] = (16, 32)) -> None:
        super().__init__()
        narrow, wide = widths
        self.stem = conv(in_channels, narrow, 3, stride)  # 1x8x8 -> 16x8x8
        self.layers = nn.Sequential(
            layer(narrow, narrow, 1, "layer1"),
            layer(narrow, wide, 2, "layer2"),  # -> 32x4x4
            layer(wide, wide, 1, "layer3"),
            layer(wide, wide, stride, "layer4"),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(wide, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.stem(x))  # (N, 1, 8, 8) -> (N, 32, 4, 4)
        return self.classifier(self.flatten(self.pool(x)))  # (N, 10)


def layer(in_width: int, out_width: int, stride: int, label: str) -> LayerChoice:
    separable = [*conv(in_width, in_width, 3, stride, groups=in_width), *conv(in_width, out_width, 1, 1)]
    candidates: dict[str, nn.Module] = {
        "plain": conv(in_width, out_width, 3, stride),
        "conv5": conv(in_width, out_width, 5, stride),
        "separable": nn.Sequential(*separable),
    }
    keeps = in_width == out_width and stride == 1
    return LayerChoice({**candidates, "identity": nn.Identity()} if keeps else candidates, label)


def conv(in_width: int, out_width: int, kernel: int, stride: int, groups: int = 1) -> nn.Sequential:
    made = nn.Conv2d(in_width, out_width, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(made, nn.BatchNorm2d(out_width), nn.ReLU())


def space() -> SmallCNN:
    return SmallCNN(1, 1)


# ---- the job ---------------------------------------------------------------------------------------------------


def search(train: ArrayDataset, target: float) -> SuperNetTrainer:
    torch.manual_seed(SEED)
    model = space()
    trainer = SuperNetTrainer(
        model,
        loss=LabelSmoothingLoss(),
        metrics=partial(accuracy, topk=(1,)),
        optimizer=torch.optim.AdamW(model.parameters(), 3e-3),
        warmup_epochs=WARMUP_EPOCHS,
        num_epochs=SEARCH_EPOCHS,
        cost="macs",
        dummy_input=IMAGE,
        targets={"macs": target},
        arch_learning_rate=5e-2,
        temperature=Temperature(1.0, 0.1, "exponential"),
        dataset=train,
        batch_size=BATCH,
        workers=0,
        device="cpu",
        seed=SEED,
    )
    trainer.train()
    return trainer


def to_compare(found: dict[str, int], macs: CostModel, target: float) -> dict[str, dict[str, int]]:
    """Name -> index of each choice: the found network, the plain one, and four random ones within the target."""
    rng = random.Random(SEED)
    drawn: list[dict[str, int]] = []
    while len(drawn) < 4:
        choices = random_feasible(macs, target, rng)
        if macs.of(choices) >= target / 2 and choices not in (found, *drawn):
            drawn.append(choices)
    named = {f"random {i}": choices for i, choices in enumerate(drawn, 1)}
    return {"searched": found, "plain 3x3": dict.fromkeys(found, 0), **named}


def retrained_accuracy(arch: Mapping[str, str | int], train: ArrayDataset, test: ArrayDataset) -> float:
    """The mean over the repetitions, each from fresh weights."""
    correct = []
    for seed in range(REPEATS):
        torch.manual_seed(seed)
        net = fixed(space(), arch)
        retrain(net, train, RETRAIN_EPOCHS, 0.1, BATCH, seed)
        correct.append(test_accuracy(net, test))
    return mean(correct)


def macs_by_torch(net: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        net.eval()(torch.zeros(IMAGE))
    return counter.get_total_flops() // 2  # a multiplication and an addition each


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/supernet_digits"))
    out: Path = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()

    train, test = holdout(digits(), 360, seed=SEED)
    macs, params = count_macs(space(), (torch.zeros(IMAGE),)), count_params(space())
    target = SHARE * macs.of(dict.fromkeys(macs.sizes, 0))
    trainer = search(train, target)
    trainer.export(out / "arch.json")
    curve = ("epoch", "phase", "loss", "acc1", "macs_hard")
    print(markdown_table([{key: record.get(key) for key in curve} for record in trainer.history]))
    print(f"\n{trainer.report()}\n", flush=True)

    if not trainer.is_first_process:
        return  # torchrun: for the rest, one is enough
    model = space()
    choices = to_compare(choices_of(model, out / "arch.json"), macs, target)
    archs = {name: arch_of(model, chosen) for name, chosen in choices.items()}
    correct = {name: retrained_accuracy(arch, train, test) for name, arch in archs.items()}
    rows = [
        {
            "network": name,
            "layers": ", ".join(map(str, archs[name].values())),
            "test accuracy": f"{correct[name]:.4f}",
            "parameters": int(params.of(chosen)),
            "MACs": int(macs.of(chosen)),
        }
        for name, chosen in choices.items()
    ]
    print(f"{markdown_table(rows)}\n\ntarget: {target:,.0f} MACs; {time.perf_counter() - start:.0f} s; written: {out}")

    net, found = load_fixed(space, out / "arch.json"), choices["searched"]
    drawn = mean(value for name, value in correct.items() if name.startswith("random"))
    assert macs_by_torch(net) == macs.of(found) <= target, "the found network is above its target"
    assert sum(p.numel() for p in net.parameters()) == params.of(found), "the found network has other parameters"
    assert correct["searched"] >= drawn - MARGIN, f"test accuracy {correct['searched']:.4f}, random {drawn:.4f}"


if __name__ == "__main__":
    main()
