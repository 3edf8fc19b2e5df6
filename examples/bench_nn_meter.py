"""How long it takes to price a whole search space by nn-Meter's predictors.

    python examples/bench_nn_meter.py [--predictors FOLDER-OR-NAME] [--repeats 5] [--threads 1]

The space of the ProxylessNAS paper at 1x3x224x224: 21 blocks of 6 or 7 candidates, 2.2e17 networks. The predictors
are loaded before the clock starts; then the supernet is run along all its paths, its kernels are found, and all of
them are predicted in one batch. Without ``--predictors`` it takes the forests of tests/data, which are small ones.
A few random architectures are rebuilt and priced by themselves: the table must say the same of them.

Exits with 1 if the median is above 2 s, or a rebuilt network has another price than the table says.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import random
import sys
import time
from pathlib import Path
from statistics import median

import torch

from oneshot import fixed
from oneshot.cost import load_predictor_set, nn_meter_latency
from oneshot.cost.nn_meter import nn_meter_package
from oneshot.export import arch_of
from search_spaces.mobilenet import proxylessnas

TINY = Path(__file__).parent.parent / "tests" / "data" / "nn_meter_tiny"
MOST_SECONDS = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--predictors", default=str(TINY))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, image = proxylessnas(), torch.zeros(1, 3, 224, 224)

    start = time.perf_counter()
    nn_meter_package()
    predictors = load_predictor_set(args.predictors)
    loading = time.perf_counter() - start
    took = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        found = nn_meter_latency(model, (image,), predictors)
        took.append(time.perf_counter() - start)

    rng = random.Random(0)
    differences = []
    for _ in range(3):
        choices = {label: rng.randrange(n) for label, n in found.cost.sizes.items()}
        rebuilt = nn_meter_latency(fixed(model, arch_of(model, choices)), (image,), predictors)
        differences.append(abs(found.cost.of(choices) - rebuilt.cost.of({})))
    rows = sum(len(row) for row in found.cost.table.values())
    print(
        f"{platform.platform()}, {os.cpu_count()} cores, {args.threads} threads, torch {torch.__version__}\n"
        f"{predictors.name}: nn-Meter and predictors loaded in {loading:.2f} s\n"
        f"table of {rows} candidates, {len(found.kernels)} kernels: {median(took):.2f} s "
        f"({min(took):.2f} to {max(took):.2f}, {args.repeats} times)\n"
        f"3 rebuilt networks, largest difference: {max(differences):.1e} ms\n{found.report()}"
    )
    return 0 if median(took) <= MOST_SECONDS and math.isclose(max(differences), 0, abs_tol=1e-9) else 1


if __name__ == "__main__":
    sys.exit(main())
