"""Prunes torchvision's 80 classification networks with PIT: every one converts, exports, and computes the same.

    python examples/bench_zoo.py [--only NAME,NAME] [--json PATH] [--seed 0]

Each network gets random weights and BatchNorm statistics, is put under masks (``PIT``, with the parameters as cost),
loses 30 % of the units of every searchable dimension and a random part of every searchable kernel, and is exported.
Masked and exported network then run in eval mode on random images that neither has seen. One line for each of them:

- channels, kernels: masks of channels and of kernels that are searched;
- share: of the parameters of convolutions, linear layers and attention projections, those of tensors of which rows,
  columns or taps are searched; elements: those that a mask can remove themselves. Of a classifier, say, the columns
  are searched and the rows stay;
- parameters: of the whole network before and after, in millions;
- difference: max |masked - exported| / max |masked|, float32;
- convert, export: CPU seconds of ``PIT(...)`` and ``export()``, which on one thread are those of a quiet machine;
- GiB: the most memory that the process held at once, building included.

Every network has a process of its own, one at a time, on one thread. The run fails (exit 1) unless all networks
convert and export with a difference of at most 1e-4 and the masks' count of parameters is exactly that of the export;
over all 80, at least 70 must have a share of 60 % and ResNet-50 on 224x224 pixels must convert within 10 s. PLiNIO,
another implementation of PIT, reports 19 of these 80 converted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision_zoo import build, classification_networks, input_size
from tqdm import tqdm

from oneshot.mutables.masks import ChannelMask
from oneshot.pit import PIT

PRUNED = 0.3
LARGEST_DIFFERENCE = 1e-4
SHARE, WITH_SHARE = 0.6, 70
TIMED, TIMED_SIDE, TIMED_LIMIT = "resnet50", 224, 10.0
WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)


@dataclass(frozen=True)
class Row:
    """What happened to one network; ``failure`` is empty if nothing went wrong."""

    name: str
    side: int
    failure: str = ""
    channels: int = 0
    kernels: int = 0
    share: float = 0.0
    elements: float = 0.0
    before: int = 0
    after: int = 0
    reported: int = 0
    difference: float = float("inf")
    convert_s: float = 0.0
    export_s: float = 0.0
    peak_gib: float = 0.0

    def problem(self) -> str:
        if self.failure:
            return self.failure
        if not self.difference <= LARGEST_DIFFERENCE:
            return f"the outputs differ by {self.difference:.1g}"
        if self.reported != self.after:
            return f"{self.reported} parameters reported, {self.after} exported"
        return "" if self.after < self.before else "nothing was removed"

    def __str__(self) -> str:
        return (
            f"{self.name:20s} {self.side:4d} {self.channels:8d} {self.kernels:7d} {self.share:7.1%} "
            f"{self.elements:8.1%} {self.before / 1e6:8.2f} -> {self.after / 1e6:7.2f} {self.difference:10.1e} "
            f"{self.convert_s:7.1f}s {self.export_s:6.1f}s {self.peak_gib:6.2f}  {self.problem() or 'ok'}"
        )


HEADER = (
    f"{'network':20s} {'side':>4s} {'channels':>8s} {'kernels':>7s} {'share':>7s} {'elements':>8s} "
    f"{'parameters, millions':>19s} {'difference':>10s} {'convert':>8s} {'export':>7s} {'GiB':>6s}"
)


def pruned(name: str, side: int, seed: int) -> Row:
    """Build, convert, prune, export and compare one network on images of ``side`` pixels."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    network = build(name, seed).eval()
    before = sum(p.numel() for p in network.parameters())
    started = time.process_time()
    pit = PIT(network, (3, side, side), cost="params")
    converted = time.process_time()
    del network
    share, elements = searched(pit)
    prune(pit, torch.Generator().manual_seed(seed))
    begun = time.process_time()
    small = pit.export()
    exported = time.process_time()
    return Row(
        *(name, side, "", len(pit.space.channels), len(pit.space.kernels), share, elements, before),
        after=sum(p.numel() for p in small.parameters()),
        reported=int(pit.get_cost("params")),
        difference=difference(pit, small, side),
        convert_s=converted - started,
        export_s=exported - begun,
        peak_gib=peak_gib(),
    )


def searched(pit: PIT) -> tuple[float, float]:
    """Of the parameters of layers that multiply: those of tensors with a mask over them, and those under one."""
    covered: dict[tuple[str, int], set[int]] = {}
    for axis in pit.space.channels:
        for (name, dim), indices in axis.dimensions.items():
            covered.setdefault((name, dim), set()).update(indices.flatten().tolist())
    for kernel in pit.space.kernels:
        for (name, dim), positions in kernel.positions.items():
            newest = int(positions.max())  # the tap that always stays
            covered[name, dim] = {tap for tap, place in enumerate(positions.tolist()) if place < newest}
    total, of_tensors, of_elements = 0, 0, 0.0
    for path, module in pit.network.named_modules():
        for leaf, parameter in module.named_parameters(path, recurse=False) if isinstance(module, WEIGHTED) else ():
            shares = [len(covered.get((leaf, d), ())) / n for d, n in enumerate(parameter.shape)]
            stays = 1.0
            for one in shares:
                stays *= 1 - one
            total += parameter.numel()
            of_tensors += parameter.numel() if any(shares) else 0
            of_elements += parameter.numel() * (1 - stays)
    return of_tensors / total, of_elements / total


@torch.no_grad()
def prune(pit: PIT, generator: torch.Generator) -> None:
    """30 % of the units of each mask of channels go, any number of taps of each kernel."""
    for _, mask in pit.masks.items():
        if isinstance(mask, ChannelMask):
            units = len(mask.alpha)
            kept = max(1, round((1 - PRUNED) * units))
            mask.keep(sorted(torch.randperm(units, generator=generator)[:kept].tolist()))
        else:
            mask.alpha.uniform_(0, 1, generator=generator)


@torch.no_grad()
def difference(pit: PIT, small: nn.Module, side: int) -> float:
    """max |masked - exported| / max |masked| in eval mode, on two random images."""
    images = torch.randn(2, 3, side, side)
    masked: Tensor = pit.eval()(images)
    exported: Tensor = small.eval()(images)
    return float((masked - exported).abs().max() / masked.abs().max())


def converted_in(name: str, side: int, seed: int) -> float:
    """CPU seconds of the conversion alone."""
    torch.set_num_threads(1)
    network = build(name, seed).eval()
    started = time.process_time()
    PIT(network, (3, side, side), cost="params")
    return time.process_time() - started


def peak_gib() -> float:
    """The largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Apart:
    """Runs each call in a fresh process: what one network leaves behind is not in the time and memory of the next."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["oneshot.pit", "torchvision_zoo"])

    def row(self, name: str, seed: int) -> Row:
        side = input_size(name)
        with ProcessPoolExecutor(1, self.context) as pool:
            job = pool.submit(pruned, name, side, seed)
            error = job.exception()  # also that its process was killed, as happens when memory runs out
        if error is None:
            return job.result()
        return Row(name, side, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}")

    def seconds(self, seed: int) -> float:
        with ProcessPoolExecutor(1, self.context) as pool:
            return pool.submit(converted_in, TIMED, TIMED_SIDE, seed).result()


def problems(rows: Sequence[Row], seconds: float, complete: bool) -> list[str]:
    """What of the claims does not hold; those about the whole zoo only of a ``complete`` run."""
    found = [f"{row.name}: {row.problem()}" for row in rows if row.problem()]
    with_share = sum(row.share >= SHARE for row in rows)
    if complete and with_share < WITH_SHARE:
        found.append(f"{with_share} networks have a share of {SHARE:.0%}, claimed are {WITH_SHARE}")
    if seconds > TIMED_LIMIT:
        found.append(
            f"{TIMED} at {TIMED_SIDE}x{TIMED_SIDE} converted in {seconds:.1f} s, claimed are {TIMED_LIMIT:.0f} s"
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME,NAME", help="these networks, by default all of torchvision's")
    parser.add_argument("--json", metavar="PATH", type=Path, help="write the rows to this file as well")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the statistics and the masks")
    options = parser.parse_args(arguments)
    known = classification_networks()
    names = options.only.split(",") if options.only else known
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"--only: {unknown} are none of {known}")

    apart, rows = Apart(), []
    tqdm.write(HEADER)
    for name in tqdm(names, file=sys.stderr, unit="network"):
        rows.append(apart.row(name, options.seed))
        tqdm.write(str(rows[-1]))
        sys.stdout.flush()
    seconds = apart.seconds(options.seed)
    fine = [row for row in rows if not row.problem()]
    print(f"\n{len(fine)} of {len(rows)} convert, export and compute the same")
    print(f"{sum(row.share >= SHARE for row in rows)} of {len(rows)} have {SHARE:.0%} of those parameters searchable")
    print(f"largest difference {max((row.difference for row in fine), default=0.0):.1e}")
    print(f"{TIMED} at {TIMED_SIDE}x{TIMED_SIDE} converts in {seconds:.1f} s of CPU time")
    found = problems(rows, seconds, complete=set(names) == set(known))
    if options.json:
        report = {"rows": [asdict(row) for row in rows], f"{TIMED}_{TIMED_SIDE}_s": seconds, "problems": found}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    for problem in found:
        print(f"FAILED: {problem}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
