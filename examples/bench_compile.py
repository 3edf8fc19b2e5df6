"""What ``torch.compile`` makes of a search: how often it compiles, and how long a step takes, eager and compiled.

    python examples/bench_compile.py [--steps 30] [--pairs 15] [--backend inductor] [--device cpu|cuda] [--kinds ...]

Kinds of search, each with its own kind of steps: masks alone (``PIT``), mixtures of all candidates, one path of uniform
chance (SPOS), one and two paths of binary gates (ProxylessNAS), and masks with choices. The networks have a few blocks
of convolution, BatchNorm and ReLU on images of 8x16x16 in batches of 32, float32. Two copies of a network make the same
steps: one is compiled, by ``oneshot.trainers.compilation``, the other is not. After ``--steps`` steps, in which all is
compiled, steps of the two are timed in turns; a time is the median, and the ratio that of the pairs.

Exits with 1 if a piece has been compiled more often than it may be: once for each phase of a network with masks, four
times for each candidate, whatever the number of paths. Most of the run is spent in the compiler: some minutes with
inductor on a CPU, less with ``--backend aot_eager``.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from statistics import median

import torch
from torch import Tensor, nn

from oneshot import (
    PIT,
    BinaryGates,
    LayerChoice,
    Softmax,
    UniformPath,
    arch_parameters,
    decisions,
    draw,
    set_sampler,
    weight_parameters,
)
from oneshot.mutables import Sampler
from oneshot.trainers.compilation import Compilations, compiled
from oneshot.trainers.modes import frozen_statistics, frozen_weights, normalisations

WIDTH, CLASSES = 8, 10
INPUT = (WIDTH, 16, 16)
KERNELS = (1, 3, 5)


@dataclass(frozen=True)
class Kind:
    """A search: its network, the samplers of its two steps (None: there is none), and the most graphs of a piece."""

    name: str
    build: Callable[[], nn.Module]
    weights: Sampler
    alphas: Sampler | None
    most: int


def block(kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(WIDTH, WIDTH, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH))


def plain() -> nn.Sequential:
    return nn.Sequential(
        *(block(3) for _ in range(2)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, CLASSES)
    )


def supernet() -> nn.Sequential:
    choices = [LayerChoice([block(kernel) for kernel in KERNELS], label=f"block{i}") for i in range(3)]
    return nn.Sequential(*choices, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, CLASSES))


KINDS = (
    Kind("masks", lambda: PIT(plain(), INPUT, cost="params"), Softmax(), None, 2),
    Kind("mixture", supernet, Softmax(), Softmax(), 4),
    Kind("one path", supernet, UniformPath(), None, 4),
    Kind("binary gates", supernet, BinaryGates(1), BinaryGates(2), 4),
    Kind("masks and choices", lambda: PIT(supernet(), INPUT, cost="params"), BinaryGates(1), BinaryGates(2), 4),
)


class Run:
    """The steps of one network: of the weights, or of weights and alphas in turns."""

    def __init__(self, kind: Kind, model: nn.Module, device: str) -> None:
        self.kind, self.model, self.device = kind, model.to(device).train(), device
        self.optimizer = torch.optim.SGD(weight_parameters(model), lr=0.01)
        self.decisions, self.norms = decisions(model), normalisations(model)
        self.weights, self.alphas = weight_parameters(model), arch_parameters(model)
        self.paths: set[tuple[str, ...]] = set()

    def step(self, seed: int) -> None:
        self._step(self.kind.weights, seed, learns_alphas=isinstance(self.model, PIT))
        if self.kind.alphas is not None:
            with frozen_weights(self.weights), frozen_statistics(self.norms):
                self._step(self.kind.alphas, seed, learns_alphas=True)

    def _step(self, sampler: Sampler, seed: int, *, learns_alphas: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        x, target = torch.randn(32, *INPUT, generator=generator), torch.randint(CLASSES, (32,), generator=generator)
        x, target = x.to(self.device), target.to(self.device)
        set_sampler(self.decisions, sampler)
        draw(self.decisions, generator)
        self.paths.add(tuple(str(decision.drawn) for decision in self.decisions.values()))
        self.optimizer.zero_grad()
        with frozen_weights([] if learns_alphas else self.alphas):
            loss: Tensor = nn.functional.cross_entropy(self.model(x), target)
            loss.backward()
        self.optimizer.step()

    def timed(self, seed: int) -> float:
        """Milliseconds of a step."""
        self._wait()
        begin = time.perf_counter()
        self.step(seed)
        self._wait()
        return (time.perf_counter() - begin) * 1e3

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def compare(kind: Kind, options: argparse.Namespace) -> tuple[Compilations, int, float, float, float]:
    """Compilations, paths that ran, milliseconds of an eager and of a compiled step, median ratio of the two."""
    torch.manual_seed(0)
    model = kind.build()
    eager, fast = Run(kind, copy.deepcopy(model), options.device), Run(kind, model, options.device)
    with compiled(fast.model, options.backend) as compilations:
        for seed in range(options.steps):
            fast.step(seed)
            eager.step(seed)
        pairs = [(eager.timed(seed), fast.timed(seed)) for seed in range(options.steps, options.steps + options.pairs)]
    return (
        compilations,
        len(fast.paths),
        median(one for one, _ in pairs),
        median(other for _, other in pairs),
        median(other / one for one, other in pairs),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="steps before the timed ones")
    parser.add_argument("--pairs", type=int, default=15, help="timed steps of each network")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", default=[kind.name for kind in KINDS], metavar="KIND")
    options = parser.parse_args(arguments)
    known = {kind.name: kind for kind in KINDS}
    unknown = [name for name in options.kinds if name not in known]
    if unknown:
        parser.error(f"--kinds: {unknown} are none; there are {list(known)}")
    torch.set_num_threads(options.threads)
    print(f"{'':18}  pieces  compiled  most of one  architectures  drawn  eager ms  compiled ms  ratio")
    failed = []
    for name in options.kinds:
        kind = known[name]
        found, paths, eager_ms, compiled_ms, ratio = compare(kind, options)
        choices = decisions(kind.build())
        architectures = prod(len(decision.options) for decision in choices.values())
        print(
            f"{name:18}  {len(found.by_piece):6}  {found.total:8}  {found.most:11}  {architectures:13}  {paths:5}  "
            f"{eager_ms:8.2f}  {compiled_ms:11.2f}  {ratio:5.2f}",
            flush=True,
        )
        if found.most > kind.most:
            failed.append(f"{name}: a piece was compiled {found.most} times, at most {kind.most} are allowed")
    for line in failed:
        print(line)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
