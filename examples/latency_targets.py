"""A lower target gives a faster network: three searches on digits, for three latencies of ONNX Runtime here.

    python examples/latency_targets.py [--out runs/latency_targets]          (needs the extra [onnx])

The table of latencies is measured once, on one thread, for 16 of the 8x8 images inside scikit-learn. The targets lie
at 20 %, 40 % and 60 % of the way from the fastest to the slowest network of the space. Each search is derived under
its target, which its prediction keeps exactly; the three rebuilt networks are then timed in turns.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import torch
from common import cosine
from torch import nn

from oneshot import (
    LabelSmoothingLoss,
    LatencyTable,
    ProxylessTrainer,
    accuracy,
    fixed,
    load_fixed,
    measure_table,
    price,
)
from oneshot.cost import cost_range, time_modules
from oneshot.data import digits
from oneshot.export import choices_of
from oneshot.loggers import markdown_table
from search_spaces.mobilenet import MobileNet, mobilenet_small

SEED = 0
SHARES = (0.2, 0.4, 0.6)
WARMUP_EPOCHS, SEARCH_EPOCHS = 3, 5
IMAGES = (16, 1, 8, 8)


def space() -> MobileNet:
    """6 blocks at 8x8, 4x4 and 2x2 pixels: 4^2 * 5^4 = 10,000 architectures."""
    return mobilenet_small(stem_stride=1, stages=((24, 3, 2), (32, 3, 2)))


def search(table: LatencyTable, target: float, out: Path) -> ProxylessTrainer:
    torch.manual_seed(SEED)
    model = space()
    trainer = ProxylessTrainer(
        model,
        loss=LabelSmoothingLoss(),
        metrics=lambda output, target: accuracy(output, target, topk=(1,)),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=4e-5),
        scheduler=cosine,
        num_epochs=SEARCH_EPOCHS,
        warmup_epochs=WARMUP_EPOCHS,
        dataset=digits(),
        batch_size=64,
        workers=0,
        device="cpu",
        arc_learning_rate=5e-2,
        arch_every=1,
        skip_first_epoch=False,
        grad_reg_loss_params={"lambda": 0.02},
        applied_hardware=table,
        dummy_input=IMAGES,
        ref_latency=target,
        seed=SEED,
        checkpoint_dir=out,
        progress=False,
    )
    trainer.train()
    trainer.export(out / "arch.json", budget={"latency_ms": target})
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/latency_targets"))
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)

    model, images = space(), (torch.rand(IMAGES),)
    table = measure_table(model, images, runtime="onnxruntime")
    latency = price(model, images, table)
    fastest, slowest = cost_range(latency)
    targets = [fastest + share * (slowest - fastest) for share in SHARES]
    nets: list[nn.Module] = []
    predicted: list[float] = []
    for target in targets:
        folder = out / f"{target:.3f}ms"
        trainer = search(table, target, folder)
        print(f"\ntarget {target:.4f} ms\n{trainer.report(budget={'latency_ms': target})}", flush=True)
        nets.append(fixed(space(), folder / "arch.json"))
        predicted.append(latency.of(choices_of(model, folder / "arch.json")))
        assert load_fixed(space, folder / "arch.json")(images[0]).shape == (16, 10)

    timings = time_modules(nets, images, runtime="onnxruntime", rounds=15)
    rows = [
        {
            "target ms": target,
            "predicted ms": ms,
            "measured ms": timing.median_ms,
            "p95 ms": timing.p95_ms,
            "parameters": sum(p.numel() for p in net.parameters()),
        }
        for target, ms, timing, net in zip(targets, predicted, timings, nets, strict=True)
    ]
    print(f"\nreachable: {fastest:.4f} to {slowest:.4f} ms; {IMAGES[0]} images, ONNX Runtime, one thread\n")
    print(markdown_table(rows))
    assert len(set(predicted)) == len(targets), "two targets gave the same network"
    for target, ms in zip(targets, predicted, strict=True):
        assert ms <= target, f"predicted {ms:.4f} ms is above the target {target:.4f} ms"
    for faster, slower in pairwise(timings):
        assert faster.median_ms < slower.median_ms, "measured latencies do not stand in the order of the targets"


if __name__ == "__main__":
    main()
