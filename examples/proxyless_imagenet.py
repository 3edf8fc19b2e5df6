"""ProxylessNAS on ImageNet with the settings of the paper (arXiv 1812.00332) and its code: search, then retrain.

    python examples/proxyless_imagenet.py --data DIR --table mobile_trim.yaml --out runs/imagenet
    python examples/proxyless_imagenet.py --data DIR --retrain runs/imagenet/arch.json --out runs/imagenet

DIR has the folders train/ and val/, each with one folder of images per class. The table is the published one of
ProxylessNAS for the Pixel 1, 224 pixels and width 1, with the target 80 ms; without a table the MACs are counted
instead. A run that was stopped goes on with the same command and --resume. One search takes days on one GPU.

Search: 40 epochs of warm-up (learning rate 0.05 to 0, cosine), 120 of search (0.025 to 0), batches of 256, weight decay
4e-5, labels smoothed by 0.1 for the weights only; 50,000 training images, never augmented, are for the alphas, which
take an Adam step of 1e-3 after every fifth weight step from the second search epoch on. val/ is not looked at.
Retraining: 300 epochs (0.05 to 0) from fresh weights, stronger colours, no weight decay of BatchNorm. The initial
weights are torch's, unlike the paper's. Written to --out: arch.json, and network.pt, the state_dict of the network.
"""

from __future__ import annotations

import argparse
import math
import os
import random
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import cosine
from PIL import Image, ImageEnhance
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from oneshot import LabelSmoothingLoss, ProxylessTrainer, accuracy, load_fixed
from oneshot.data import BatchStream
from oneshot.errors import ConfigurationError
from oneshot.files import atomic_write
from oneshot.loggers import markdown_table
from search_spaces.mobilenet import MobileNet, proxylessnas

SEED = 0
WARMUP_LR, SEARCH_LR, RETRAIN_LR = 0.05, 0.025, 0.05
MOMENTUM, WEIGHT_DECAY = 0.9, 4e-5
REFERENCE_MS, REFERENCE_MACS = 80.0, 300e6  # of the authors, for width 1 at 224 pixels
SEARCH_COLOURS = {"brightness": 32 / 255, "saturation": 0.5}
RETRAIN_COLOURS = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of red, green and blue over ImageNet
ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


# ---- images ----------------------------------------------------------------------------------------------------


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """(image, class) of every file FOLDER/<class>/<file>; classes are numbered in alphabetical order."""

    def __init__(self, folder: Path, transform: TrainTransform | EvalTransform) -> None:
        if not folder.is_dir():
            raise ConfigurationError(f"{folder}: no such folder; it needs one folder of images per class")
        self.classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
        self.transform = transform
        files = [(path, k) for k, name in enumerate(self.classes) for path in sorted((folder / name).iterdir())]
        if not files:
            raise ConfigurationError(f"{folder}: {len(self.classes)} folders of classes and no image in them")
        self.files, self.targets = [path for path, _ in files], [k for _, k in files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("RGB")), self.targets[index]


@dataclass(frozen=True)
class TrainTransform:
    """A random part of the image at ``size`` x ``size`` pixels, mirrored or not, its colours changed."""

    size: int
    colours: Mapping[str, float]

    def __call__(self, image: Image.Image) -> Tensor:
        box = random_box(*image.size)
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(jittered(image, self.colours))


@dataclass(frozen=True)
class EvalTransform:
    """The middle of the image: its shorter side becomes 8/7 ``size`` (256 for 224), and ``size`` is kept."""

    size: int

    def __call__(self, image: Image.Image) -> Tensor:
        scale = round(self.size * 8 / 7) / min(image.size)
        width, height = (round(side * scale) for side in image.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        return to_tensor(image.crop((left, top, left + self.size, top + self.size)))


def random_box(width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of 8 to 100 % of the image's area, 3:4 to 4:3; the middle if ten draws do not fit."""
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def jittered(image: Image.Image, colours: Mapping[str, float]) -> Image.Image:
    """In random order: a factor of 1 - s to 1 + s for each strength s, and the hue turned by up to that share."""
    for name in random.sample(sorted(colours), len(colours)):
        if name == "hue":
            hue, saturation, value = image.convert("HSV").split()
            turn = round(255 * random.uniform(-colours[name], colours[name]))
            hue = hue.point([(level + turn) % 256 for level in range(256)])
            image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
        else:
            image = ENHANCERS[name](image).enhance(random.uniform(1 - colours[name], 1 + colours[name]))
    return image


def to_tensor(image: Image.Image) -> Tensor:
    """RGB -> float (3, H, W), normalised per channel."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


# ---- search ----------------------------------------------------------------------------------------------------


def search(args: argparse.Namespace) -> Path:
    """Search, and write the architecture: the most probable candidates, or those that keep ``--budget``."""
    train = ImageFolder(args.data / "train", TrainTransform(args.size, SEARCH_COLOURS))
    n_classes = len(train.classes)
    torch.manual_seed(SEED)
    model = proxylessnas(n_classes, args.width_mult)
    reference = args.ref if args.ref is not None else REFERENCE_MS if args.table else REFERENCE_MACS
    trainer = ProxylessTrainer(
        model,
        loss=LabelSmoothingLoss(0.1),
        arch_loss=F.cross_entropy,
        metrics=partial(accuracy, topk=(1, min(5, n_classes))),
        optimizer=torch.optim.SGD(
            model.parameters(), lr=SEARCH_LR, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
        ),
        scheduler=cosine,
        warmup_scheduler=warmup_cosine,
        num_epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        dataset=train,
        arch_dataset=ImageFolder(args.data / "train", EvalTransform(args.size)),
        arch_fraction=args.held_out / len(train),
        batch_size=args.batch_size,
        workers=args.workers,
        device=args.device,
        log_frequency=10,
        arc_learning_rate=1e-3,
        arch_every=5,
        skip_first_epoch=True,
        grad_reg_loss_type="mul#log",
        grad_reg_loss_params={"alpha": 0.2, "beta": 0.3},
        applied_hardware=args.table or "flops",
        dummy_input=(1, 3, args.size, args.size),
        ref_latency=reference,
        seed=SEED,
        checkpoint_dir=args.out,
        checkpoint_every=1000,
    )
    if args.resume and (args.out / "last.ckpt").exists():
        trainer.resume(args.out)
    trainer.train()
    cost = "latency_ms" if args.table else "macs"
    found = trainer.export(args.out / "arch.json", budget=None if args.budget is None else {cost: args.budget})
    print(markdown_table([{key: value for key, value in trainer.history[-1].items() if key != "step"}]))
    print(f"found: {found}\nwritten: {args.out / 'arch.json'}")
    return args.out / "arch.json"


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    for group in optimizer.param_groups:
        group["lr"] = WARMUP_LR  # the trainer comes with the search's rate, and puts it back after the warm-up
    return cosine(optimizer, steps)


# ---- retrain ---------------------------------------------------------------------------------------------------


def retrain(arch: Path, train: ImageFolder, val: ImageFolder, args: argparse.Namespace) -> dict[str, float]:
    """Train the network of an architecture file from fresh weights; returns its accuracy on ``val``."""
    torch.manual_seed(SEED)
    net = network(arch, len(train.classes), args).to(args.device)
    optimizer = torch.optim.SGD(decayed_groups(net), lr=RETRAIN_LR, momentum=MOMENTUM, nesterov=True)
    stream = BatchStream(train, range(len(train)), batch_size=args.batch_size, seed=SEED, workers=args.workers)
    per_epoch = stream.batches_per_pass
    total = args.retrain_epochs * per_epoch
    parts: dict[str, Any] = {"net": net, "optimizer": optimizer, "schedule": cosine(optimizer, total)}
    step = resumed(args.out / "retrain.ckpt", parts) if args.resume else 0
    loss_of = LabelSmoothingLoss(0.1)
    found: dict[str, float] = {}
    with closing(stream.iterate(step)) as batches:
        while step < total:
            torch.manual_seed(SEED + step)  # of the dropout: so it does not matter where a run was stopped
            images, labels = next(batches)
            net.train()
            optimizer.zero_grad()
            loss_of(net(images.to(args.device)), labels.to(args.device)).backward()
            optimizer.step()
            parts["schedule"].step()
            step += 1
            if step % per_epoch == 0:
                save(args.out / "retrain.ckpt", {"step": step, **{k: part.state_dict() for k, part in parts.items()}})
                found = score(net, val, args)
                print(f"retrain, epoch {step // per_epoch} of {args.retrain_epochs}: {found}", flush=True)
    save(args.out / "network.pt", net.state_dict())
    return found or score(net, val, args)


def retraining_data(args: argparse.Namespace) -> tuple[ImageFolder, ImageFolder]:
    train = ImageFolder(args.data / "train", TrainTransform(args.size, RETRAIN_COLOURS))
    val = ImageFolder(args.data / "val", EvalTransform(args.size))
    if train.classes != val.classes:
        different = sorted(set(train.classes) ^ set(val.classes))
        raise ConfigurationError(f"{args.data}: the classes {different[:5]} are only in one of train/ and val/")
    return train, val


def network(arch: Path, n_classes: int, args: argparse.Namespace) -> nn.Module:
    """The network of an architecture file; ``load_state_dict`` takes what a retraining wrote."""

    def space() -> MobileNet:
        return proxylessnas(n_classes, args.width_mult, dropout=args.dropout)

    return load_fixed(space, arch)


def decayed_groups(net: nn.Module) -> list[dict[str, Any]]:
    """Parameters for an optimizer: weight decay for all but those of BatchNorm."""
    norms = [p for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    known = {id(p) for p in norms}
    others = [p for p in net.parameters() if id(p) not in known]
    return [{"params": others, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]


def save(path: Path, state: Mapping[str, Any]) -> None:
    atomic_write(path, lambda file: torch.save(state, file))


def resumed(path: Path, parts: Mapping[str, Any]) -> int:
    """Put a checkpoint into the parts, if there is one; returns the steps done."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["step"])


@torch.no_grad()
def score(net: nn.Module, dataset: ImageFolder, args: argparse.Namespace) -> dict[str, float]:
    """Top-1 and top-5 accuracy."""
    net.eval()
    right: dict[str, float] = {}
    for images, labels in DataLoader(dataset, args.batch_size, num_workers=args.workers):
        output = net(images.to(args.device))
        for name, share in accuracy(output, labels.to(args.device), topk=(1, min(5, output.shape[1]))).items():
            right[name] = right.get(name, 0.0) + float(share) * len(labels)
    return {name: n / len(dataset) for name, n in right.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder with train/ and val/")
    parser.add_argument("--out", type=Path, default=Path("runs/proxyless_imagenet"))
    parser.add_argument("--table", type=Path, help="latency table, YAML or JSON; without one, MACs are counted")
    parser.add_argument("--ref", type=float, help=f"reference: {REFERENCE_MS} ms, or {REFERENCE_MACS:g} MACs")
    parser.add_argument("--budget", type=float, help="keep this many ms or MACs exactly; the paper does not")
    parser.add_argument("--retrain", type=Path, metavar="ARCH", help="only retrain this architecture")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    parser.add_argument("--warmup-epochs", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=120, help="of the search")
    parser.add_argument("--retrain-epochs", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--held-out", type=int, default=50_000, help="training images for the alphas")
    parser.add_argument("--size", type=int, default=224, help="pixels of a side")
    parser.add_argument("--width-mult", type=float, default=1.0)
    parser.add_argument("--dropout", type=float, default=0.1, help="while retraining; the authors used 0.1 to 0.3")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    data = retraining_data(args)  # before the search, so that a wrong folder does not show days later
    arch = search(args) if args.retrain is None else args.retrain
    found = retrain(arch, *data, args)
    print(f"{arch} on {args.data / 'val'}: {found}\nwritten: {args.out / 'network.pt'}")


if __name__ == "__main__":
    main()
