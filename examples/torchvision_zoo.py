"""torchvision's 80 classification networks, with random weights that are quick to make and say something.

    python examples/torchvision_zoo.py [NAME ...]

builds each network (all of them without names), runs it on a batch of 2, and prints its size, its seconds and the
standard deviation of its outputs.

As published, a fresh network is slow to build, as most of the time goes into initial weights that are then thrown
away, and a poor witness: layer scales of 1e-6, zero biases and BatchNorm statistics of mean 0 and variance 1 hide
most mistakes. Here every weight, bias and statistic is random and no activation explodes or vanishes.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

BATCH, CALIBRATION = 2, 16
SMALLEST_SIDE = 64  # most networks end at 1/32 of the image: 2x2 pixels
SIDES = {"alexnet": 96, "inception_v3": 299, "maxvit_t": 224}  # maxvit_t: the least that gives windows of 7 at 1/32
OPERATORS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def import_torchvision() -> ModuleType:
    """torchvision, also where its compiled operators cannot be loaded, as beside a torch without CUDA.

    torchvision describes its operators to torch while it is imported and stops if there are none. Then the two that
    it asks for are declared first, without code behind them: no classification network calls them.
    """
    if "torchvision" not in sys.modules and not _compiled_operators_load():
        for name, schema in OPERATORS.items():
            if not hasattr(torch.ops.torchvision, name):
                torch.library.define(f"torchvision::{name}", schema)
    return importlib.import_module("torchvision")


def classification_networks() -> list[str]:
    """The names of torchvision's classification networks, sorted; 80 in torchvision 0.28."""
    models = import_torchvision().models
    return sorted(models.list_models(module=models))


def input_size(name: str) -> int:
    """The side in pixels of the smallest square image on which the network runs as it was meant to.

    That is: at least one pixel at the end, whole attention windows at the beginning, 4x4 patches for a ViT.

    >>> input_size("resnet18"), input_size("vit_b_32"), input_size("swin_t"), input_size("inception_v3")
    (64, 128, 56, 299)
    """
    if name.startswith("vit_"):
        return 4 * int(name.rpartition("_")[2])
    if name.startswith("swin_") and "v2" not in name:
        return 56  # windows of 7x7 pixels of 4x4
    return SIDES.get(name, SMALLEST_SIDE)


def build(name: str, seed: int = 0) -> nn.Module:
    """The network ``name`` for images of ``input_size(name)``, in training mode, every number in it random.

    Weights are normal with variance 2/fan-in (linear layers: 1/fan-in), norms scale by 0.5 to 1.5, every other
    parameter is normal with standard deviation 0.3. BatchNorm's running statistics are those of a random batch, the
    variance times 0.5 to 2 and the mean 0.3 standard deviations off.
    """
    builders = import_torchvision().models
    options: dict[str, Any] = {}
    if name.startswith("vit_"):
        options["image_size"] = input_size(name)
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    with _no_initialisation():
        model: nn.Module = builders.get_model(name, weights=None, **options)
    generator = torch.Generator().manual_seed(seed)
    fill(model, generator)
    calibrate(model, torch.randn(CALIBRATION, 3, input_size(name), input_size(name), generator=generator), generator)
    return model


@torch.no_grad()
def fill(model: nn.Module, generator: torch.Generator) -> None:
    """Random parameters and BatchNorm statistics, in place."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not name.endswith("weight"):
                parameter.normal_(0.0, 0.3, generator=generator)
            elif parameter.ndim == 1:  # of a norm
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                gain = 2.0 if parameter.ndim > 2 else 1.0
                parameter.normal_(0.0, math.sqrt(gain / parameter[0].numel()), generator=generator)
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0.0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor, generator: torch.Generator) -> None:
    """Set the running statistics of every BatchNorm near those of its input, so that a deep network keeps its scale.

    Without it the sum of 50 residual blocks, each of which doubles the variance, would be 1e7 times the input.
    """

    def near(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].transpose(0, 1).flatten(1)  # (C, B*H*W)
        variance = x.var(1, correction=0).mean().clamp_min(1e-6)  # one for all channels: some are constant
        mean, var = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
        mean.normal_(0.0, 0.3, generator=generator).mul_(variance.sqrt()).add_(x.mean(1))
        var.uniform_(0.5, 2.0, generator=generator).mul_(variance)

    hooks = [m.register_forward_pre_hook(near) for m in model.modules() if isinstance(m, _BatchNorm)]
    if not hooks:
        return
    training = model.training
    model.eval()(images)
    model.train(training)
    for hook in hooks:
        hook.remove()


@contextmanager
def _no_initialisation() -> Iterator[None]:
    """While open, ``torch.nn.init`` leaves tensors as they are."""

    def keep(tensor: Tensor, *_: object, **__: object) -> Tensor:
        return tensor

    with ExitStack() as patches:
        for module in (nn.init, nn.modules.activation):  # the latter imports some by name
            for name, function in list(vars(module).items()):
                if name.endswith("_") and not name.startswith("_") and function.__module__ == nn.init.__name__:
                    patches.enter_context(mock.patch.object(module, name, keep))
        yield


def _compiled_operators_load() -> bool:
    spec = find_spec("torchvision")
    folders = [] if spec is None else spec.submodule_search_locations or []
    for library in (file for folder in folders for file in Path(folder).glob("_C.*")):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return False
        return True
    return False


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks, by default all of them")
    for name in parser.parse_args(arguments).names or classification_networks():
        started = time.perf_counter()
        model = build(name)
        built = time.perf_counter()
        images = torch.randn(BATCH, 3, input_size(name), input_size(name))
        with torch.no_grad():
            output: Tensor = model.eval()(images)
            run = time.perf_counter()
            trained = model.train()(images)
        logits: Tensor = trained if isinstance(trained, Tensor) else trained[0]
        print(
            f"{name:20s} {input_size(name):4d} px {sum(p.numel() for p in model.parameters()) / 1e6:7.1f} M parameters"
            f"  build {built - started:5.1f} s  eval {run - built:5.2f} s  train {time.perf_counter() - run:5.2f} s"
            f"  std {float(output.std()):.2g} / {float(logits.std()):.2g}"
            f"  over the images {float(output.std(0).mean()):.2g}",
            flush=True,
        )
        del model


if __name__ == "__main__":
    main()
