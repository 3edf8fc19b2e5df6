"""Search on CIFAR-10 for a latency, export, rebuild, retrain with augmentation, and compare.

    python examples/proxyless_cifar10.py --data FOLDER          (10,000 images, some minutes on one CPU core)
    python examples/proxyless_cifar10.py --data FOLDER --full --device cuda

FOLDER holds the binary version of CIFAR-10 (https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz, unpacked), or
a file cifar10_jpeg.npz with the arrays blob (the bytes of all JPEG files), offsets (where each of them begins, and the
end), labels and is_test. The target is the latency halfway between the fastest and the slowest network of the space,
predicted from a table that is measured on this machine: CPU, one thread, 16 images. Beside the found network stand
the largest one and three random networks that keep the same target, all trained alike from fresh weights.
"""

from __future__ import annotations

import argparse
import io
import random
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import cosine, largest, measured_ms, random_feasible, retrain, smallest, table, test_accuracy
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

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
from oneshot.data import ArrayDataset, cifar10, stratified_split
from oneshot.export import arch_of, choices_of
from oneshot.loggers import markdown_table
from search_spaces.mobilenet import MobileNet, mobilenet_small

SEED = 0
SHARE = 0.5  # of the way from the latency of the fastest network of the space to that of the largest
BATCH, LR = 64, 0.1
IMAGES = (16, 3, 32, 32)  # whose latency is searched: of one image, the calls would take longer than the sums
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of red, green and blue over the training images
FULL = {"train": 50_000, "test": 10_000, "warmup_epochs": 10, "epochs": 40, "retrain_epochs": 100, "stem_stride": 1}


def space(stem_stride: int) -> MobileNet:
    """6 searchable blocks, 4^2 * 5^4 = 10,000 architectures; at 16x16, 8x8 and 4x4, or twice that for stride 1."""
    stages = ((16, 2, 1), (32, 2, 2), (64, 2, 2))
    # With the channels last, depthwise convolutions of this size take two thirds of the time on a CPU.
    model = mobilenet_small(in_channels=3, stem_stride=stem_stride, stages=stages)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


# ---- data ------------------------------------------------------------------------------------------------------


def load(folder: Path, train: bool, n: int) -> ArrayDataset:
    """``n`` images of the training or the test part, every class in the same proportion; all if it has no more."""
    packed = folder / "cifar10_jpeg.npz"
    if packed.is_file():
        return from_jpeg(packed, train, n)
    dataset = cifar10(folder, train)
    return dataset.subset(sample(dataset.targets.tolist(), n))


def from_jpeg(path: Path, train: bool, n: int) -> ArrayDataset:
    with np.load(path, allow_pickle=False) as file:
        blob, offsets, labels = file["blob"], file["offsets"], file["labels"].astype(np.int64)
        part = np.flatnonzero(file["is_test"] == (not train))
    chosen = part[sample(labels[part].tolist(), n)]
    images = np.stack([decoded(blob[offsets[i] : offsets[i + 1]].tobytes()) for i in chosen])
    return ArrayDataset(torch.from_numpy(images), torch.from_numpy(labels[chosen]))


def sample(labels: list[int], n: int) -> list[int]:
    """Indices of ``n`` of the labels, ascending, or of all if there are no more."""
    if n >= len(labels):
        return list(range(len(labels)))
    return list(stratified_split(labels, n / len(labels), SEED).arch)


def decoded(data: bytes) -> np.ndarray:
    """The bytes of an image file -> uint8 (3, H, W)."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def normalised(images: Tensor) -> Tensor:
    """(..., 3, H, W) in [0, 1] -> mean 0 and deviation 1 per channel, over the training images."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def random_crop(images: Tensor, padding: int = 4) -> Tensor:
    """(N, C, H, W) -> the same size: every image moved by up to ``padding`` pixels each way, black coming in."""
    n, _, height, width = images.shape
    device = images.device
    top, left = torch.randint(2 * padding + 1, (2, n, 1), device=device)
    rows, columns = top + torch.arange(height, device=device), left + torch.arange(width, device=device)
    padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)  # (N, H + 2 padding, W + 2 padding, C)
    which = torch.arange(n, device=device)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_flip(images: Tensor) -> Tensor:
    """(N, C, H, W): every image mirrored left to right with probability 1/2."""
    mirror = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirror, images.flip(3), images)


def augmented(images: Tensor) -> Tensor:
    return random_flip(random_crop(images))


def of_one(image: Tensor) -> Tensor:
    """What a sample of the search's training set goes through: (3, H, W) in [0, 1] -> augmented and normalised."""
    return normalised(augmented(image[None])[0])


# ---- the job ---------------------------------------------------------------------------------------------------


def search(train: ArrayDataset, args: argparse.Namespace) -> tuple[ProxylessTrainer, float]:
    """Measure, search, write the architecture JSON; returns the trainer and the latency target in ms."""
    torch.manual_seed(SEED)
    model = space(args.stem_stride)
    images = (torch.rand(IMAGES),)
    latencies = measure_table(model, images)
    latencies.write(args.out / "latency_table.yaml")
    latency = price(model, images, latencies)
    fastest, slowest = latency.of(smallest(latency)), latency.of(largest(latency))
    target = fastest + SHARE * (slowest - fastest)
    trainer = ProxylessTrainer(
        model,
        loss=LabelSmoothingLoss(),
        metrics=lambda output, target: accuracy(output, target, topk=(1,)),
        optimizer=torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=4e-5),
        scheduler=cosine,
        warmup_scheduler=cosine,
        num_epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        dataset=ArrayDataset(train.images, train.targets, of_one),
        arch_dataset=train,  # the same images, not augmented
        batch_size=BATCH,
        workers=0,
        device=args.device,
        arc_learning_rate=3e-2,
        arch_every=2,
        arch_loss=F.cross_entropy,
        grad_reg_loss_type="add#linear",
        grad_reg_loss_params={"lambda": 0.3},
        applied_hardware=latencies,
        dummy_input=IMAGES,
        ref_latency=target,
        log_frequency=10,
        seed=SEED,
        checkpoint_dir=args.out,
    )
    trainer.train()
    trainer.export(args.out / "arch.json", budget={"latency_ms": target})
    return trainer, target


def compare(target: float, train: ArrayDataset, test: ArrayDataset, args: argparse.Namespace) -> None:
    """Rebuild from the JSON, retrain, print the table, and check what is claimed."""
    factory = partial(space, args.stem_stride)
    model, written = factory(), args.out / "arch.json"
    images = (torch.rand(IMAGES),)
    latency = price(model, images, LatencyTable.read(args.out / "latency_table.yaml"))
    params, macs = count_params(model), count_macs(model, images)
    rng = random.Random(SEED)
    choices = {"searched": choices_of(model, written), "largest": largest(latency)}
    choices |= {f"random {i}": random_feasible(latency, target, rng) for i in (1, 2, 3)}
    nets: dict[str, nn.Module] = {"searched": load_fixed(factory, written)}
    nets |= {name: fixed(factory(), arch_of(model, choices[name])) for name in choices if name != "searched"}
    for net in nets.values():
        retrain(net.to(args.device), train, args.retrain_epochs, LR, BATCH, SEED, augmented)
    correct = {name: test_accuracy(net, test) for name, net in nets.items()}
    took = measured_ms({name: net.to("cpu") for name, net in nets.items()}, IMAGES)
    low, high = latency.of(smallest(latency)), latency.of(choices["largest"])
    print(f"\ntarget: {target:.3f} ms, the space has {low:.3f} to {high:.3f}; {IMAGES[0]} images, one thread\n")
    print(markdown_table(table(choices, correct, took, params=params, macs=macs, latency=latency)))
    print(f"\nsearched: {arch_of(model, choices['searched'])}\nwritten: {written}")
    assert written.is_file(), f"{written} was not written"
    assert latency.of(choices["searched"]) <= target, "the found network is above its latency target"
    assert sum(p.numel() for p in nets["searched"].parameters()) == params.of(choices["searched"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/proxyless_cifar10"))
    parser.add_argument("--train", type=int, default=10_000, help="images to search and train on")
    parser.add_argument("--test", type=int, default=2_000, help="images of the table")
    parser.add_argument("--warmup-epochs", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=5, help="of the search")
    parser.add_argument("--retrain-epochs", type=int, default=5)
    parser.add_argument("--stem-stride", type=int, default=2, choices=(1, 2), help="1: four times as many pixels")
    parser.add_argument("--full", action="store_true", help=f"{FULL}, where not given otherwise")
    parser.add_argument("--device", default="cpu", help="for training; latency is the CPU's in any case")
    # Two threads on a small machine with other work wait for one another and are slower than one.
    parser.add_argument("--threads", type=int, default=1)
    if parser.parse_args(argv).full:
        parser.set_defaults(**FULL)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    train, test = load(args.data, True, args.train), load(args.data, False, args.test)
    train.transform = test.transform = normalised
    trainer, target = search(train, args)
    searched = time.perf_counter()
    curve = ("epoch", "phase", "loss", "acc1", "entropy", "changed", "latency_ms_soft", "latency_ms_hard", "cost_share")
    print(markdown_table([{key: record.get(key) for key in curve} for record in trainer.history]))
    print(f"\n{trainer.report(budget={'latency_ms': target})}", flush=True)
    if not trainer.is_first_process:
        return  # torchrun: for the rest, one is enough
    compare(target, train, test, args)
    print(f"search {searched - start:.0f} s, the rest {time.perf_counter() - searched:.0f} s")


if __name__ == "__main__":
    main()
