"""How well a measured latency table predicts whole networks on ONNX Runtime.

    python examples/bench_latency_table.py [--networks N] [--runtime onnxruntime|torch] [--threads 1] [--out PATH]

The small MobileNet space for images of 3x32x32 (5 blocks to choose, 2000 architectures), one image, one thread. Every
distinct candidate is timed alone; then 40 networks, drawn evenly over the range of predicted latencies, are timed as
a whole. A scale and an offset are fitted on 20 of them and judged on the other 20. Beside it stands how much one
network differs from itself when it is measured ten times: no table can be better than that.

At the end, the grid of widths: a convolution at 32x32 pixels between 8 and 96 channels, measured at 5 x 5 widths for
two kernels, and how far the interpolation is off at 50 widths between them: at multiples of 8, and at any.

Exits with 1 if on the held out networks the mean absolute error is above 10 % or Spearman's rank correlation below
0.95. Nothing is read from the cache of earlier measurements. Four to six minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import nn

from oneshot import WidthGrid, fixed, layer_latency, measure_table
from oneshot.cost import GridError, time_modules
from oneshot.export import TableError, table_error
from oneshot.loggers import markdown_table
from search_spaces.mobilenet import mobilenet_small

IMAGES = (1, 3, 32, 32)
MOST_ERROR, LEAST_RANK = 0.10, 0.95
REPEATS = 10
WIDTHS = (8, 16, 32, 64, 96)


def spread_of_one(times: list[float]) -> dict[str, float]:
    """How far repeated measurements of one network are from each other, relative to their median."""
    middle = median(times)
    return {
        "mean_deviation": fmean(abs(ms / middle - 1) for ms in times),
        "range": (max(times) - min(times)) / middle,
    }


def run(networks: int, runtime: str, threads: int) -> tuple[TableError, dict[str, float], dict[str, Any]]:
    """Measure the table, judge it, and measure one network ten times."""
    torch.manual_seed(0)
    model, images = mobilenet_small(10, 3, stem_stride=1), torch.rand(IMAGES)
    start = time.perf_counter()
    table = measure_table(model, images, runtime=runtime, threads=threads, cache=False)
    table_s = time.perf_counter() - start
    found = table_error(model, images, table, n=networks)
    middle = fixed(model, found.networks[len(found.networks) // 2].choices)
    repeated = time_modules([middle] * REPEATS, (images,), runtime=runtime, threads=threads)
    about = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        **table.runtime,
        "networks": len(found.networks),
        "rows": sum(len(rows) for rows in table.by_place.values()),
        "table_seconds": round(table_s, 1),
        "seconds": round(time.perf_counter() - start, 1),
    }
    return found, spread_of_one([timing.median_ms for timing in repeated]), about


def grid_of_widths(runtime: str) -> tuple[WidthGrid, dict[str, GridError]]:
    """A padded convolution with its bias on (1, channels, 32, 32), measured on a grid and between its points."""
    cost = layer_latency(
        {"onnxruntime": "this-machine-onnxruntime", "torch": "this-machine"}[runtime],
        lambda cin, cout, kernel: nn.Conv2d(cin, cout, kernel, padding=kernel // 2),
        lambda cin: (1, cin, 32, 32),
    )
    grid = WidthGrid.fill(cost, WIDTHS, WIDTHS, (1, 3), progress=False)
    return grid, {"multiples of 8": grid.error(cost, n=50, multiple_of=8), "any": grid.error(cost, n=50)}


def summary(found: TableError) -> str:
    rows = [
        {
            "table": name,
            "MAPE": f"{a.mape:.1%}",
            "within 10 %": f"{a.within_10_percent:.0%}",
            "Spearman": f"{a.spearman:.3f}",
            "networks": a.n,
        }
        for name, a in (("as measured", found.uncalibrated), ("calibrated", found.calibrated))
    ]
    return markdown_table(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--networks", type=int, default=40)
    parser.add_argument("--runtime", choices=("onnxruntime", "torch"), default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args(argv)
    found, spread, about = run(args.networks, args.runtime, args.threads)
    print(", ".join(f"{name} {value}" for name, value in about.items()), str(found), sep="\n\n")
    print(f"\non the held out networks:\n\n{summary(found)}")
    print(
        f"\none network measured {REPEATS} times: {spread['mean_deviation']:.1%} from its median on average, "
        f"{spread['range']:.1%} from the fastest to the slowest"
    )
    grid, off_grid = grid_of_widths(args.runtime)
    print(f"\na convolution at {' x '.join(map(str, grid.shape))} widths and kernels")
    print("\n".join(f"{name}: {error}" for name, error in off_grid.items()), flush=True)
    if args.out:
        figures = {
            **about,
            "repeated": spread,
            "grid": {k: asdict(e) for k, e in off_grid.items()},
            **{k: v for k, v in asdict(found).items() if k != "table"},
        }
        args.out.write_text(json.dumps({**figures, "table": found.table.as_dict()}, indent=2) + "\n", encoding="utf-8")
    error, rank = found.calibrated.mape, found.calibrated.spearman
    if error > MOST_ERROR or not rank >= LEAST_RANK:
        print(
            f"MAPE {error:.1%} (at most {MOST_ERROR:.0%} wanted), Spearman {rank:.3f} (at least {LEAST_RANK} wanted)",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
