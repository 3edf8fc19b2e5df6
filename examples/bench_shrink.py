"""A PIT search that gets smaller while it runs, against training the network that it begins with.

    python examples/bench_shrink.py [--epochs N] [--json PATH] [--quick]

ResNet-8 on the digits of scikit-learn, enlarged to 32x32 pixels: trained as it is, searched towards a quarter of its
MACs, and searched with ``shrink_every=1``, which takes the channels that the masks have switched off out of the network
after every epoch. All three see the same 1,024 images in as many epochs; the plain training runs before and after the
searches. The table has the CPU time of each epoch (of the process, so that other work on the machine counts little),
with all that a search does besides steps: verified removals, costs, targets.

What is asserted: the search that gets smaller takes less time in total than the plain training; it meets its target;
and the exported network has as many MACs as it says.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from oneshot import PIT, PITTrainer
from oneshot.data import BatchStream, digits
from oneshot.loggers import markdown_table
from search_spaces.resnet import resnet8

IMAGES, PIXELS, BATCH, SHARE, SEED = 1024, 32, 64, 0.25, 0


def data() -> TensorDataset:
    found = digits()
    images = F.interpolate(found.images[:IMAGES].float() / 16, size=(PIXELS, PIXELS)).expand(-1, 3, -1, -1)
    return TensorDataset(images.contiguous(), found.targets[:IMAGES])


def network() -> nn.Module:
    torch.manual_seed(SEED)
    return resnet8()


def sgd(weights: Sequence[nn.Parameter]) -> torch.optim.SGD:
    return torch.optim.SGD(weights, lr=0.05, momentum=0.9, weight_decay=1e-4)


def trained(epochs: int) -> list[float]:
    """Seconds of each epoch of the training loop that anyone would write."""
    model = network().train()
    optimizer, stream = sgd(list(model.parameters())), BatchStream(data(), range(IMAGES), batch_size=BATCH, seed=SEED)
    seconds = []
    with closing(stream.iterate(0)) as batches:
        for _ in range(epochs):
            start = time.process_time()
            for images, targets in islice(batches, stream.batches_per_pass):
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(model(images), targets).backward()
                optimizer.step()
            seconds.append(time.process_time() - start)
    return seconds


def searched(epochs: int, shrink_every: int | None) -> tuple[list[float], PITTrainer]:
    """Seconds of each epoch of a search towards a quarter of the MACs."""
    # Channels alone: the taps that a kernel loses stay in the network, as zeros, until the export.
    pit = PIT(network(), (3, PIXELS, PIXELS), cost=("params", "macs"), train_rf=False, train_dilation=False)
    clock: list[float] = []
    steps = IMAGES // BATCH

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            clock.append(time.process_time())  # one call in each step
        return F.cross_entropy(output, target)

    trainer = PITTrainer(
        pit,
        loss=loss,
        metrics=None,
        optimizer=sgd,
        num_epochs=epochs,
        dataset=data(),
        batch_size=BATCH,
        workers=0,
        device="cpu",
        targets={"macs": SHARE * pit.hard_cost("macs")},
        mask_learning_rate=0.02,
        shrink_every=shrink_every,
        seed=SEED,
        progress=False,
    )
    trainer.train()
    clock.append(time.process_time())
    return [clock[min((epoch + 1) * steps, len(clock) - 1)] - clock[epoch * steps] for epoch in range(epochs)], trainer


def macs_by_torch(net: nn.Module) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.zeros(1, 3, PIXELS, PIXELS))
    return counter.get_total_flops() / 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="4 epochs; the total time is not judged")
    args = parser.parse_args(argv)
    epochs = 4 if args.quick else args.epochs
    torch.set_num_threads(1)

    first = trained(epochs)
    smaller, trainer = searched(epochs, 1)
    same, _ = searched(epochs, None)
    plain = [(a + b) / 2 for a, b in zip(first, trained(epochs), strict=True)]
    rows: list[dict[str, Any]] = [
        {
            "epoch": epoch,
            "training s": plain[epoch],
            "search s": same[epoch],
            "search, smaller s": smaller[epoch],
            "MACs": int(record["macs_hard"]),
            "units taken out": int(record["removed"]),
        }
        for epoch, record in enumerate(trainer.history)
    ]
    target, net = trainer.targets.by_cost["macs"], trainer.export_model()
    totals = {"training": sum(plain), "search": sum(same), "search, smaller": sum(smaller)}
    ratio = totals["search, smaller"] / totals["training"]
    print(f"{datetime.now(timezone.utc):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, one thread,", end=" ")
    print(f"torch {torch.__version__}, Python {platform.python_version()}\n\n{markdown_table(rows)}\n")
    print("; ".join(f"{name} {seconds:.1f} s" for name, seconds in totals.items()), f"; {ratio:.3f} of the training")
    print(f"{macs_by_torch(net):,.0f} MACs of at most {target:,.0f}; left in the search: ", end="")
    print(f"{sum(p.numel() for p in trainer.model.network.parameters()):,} weights")
    if args.json is not None:
        args.json.write_text(json.dumps({"rows": rows, "totals": totals, "ratio": ratio}, indent=2) + "\n")
    assert macs_by_torch(net) == trainer.cost_model("macs").of(trainer.export()) <= target, "the target is missed"
    assert sum(record["removed"] for record in trainer.history) > 0, "nothing was taken out"
    if not args.quick and ratio >= 1:
        print("the search that gets smaller takes no less time than the plain training")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
