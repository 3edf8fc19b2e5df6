"""Disturbs searches at random points, and checks that each, taken up again, is the run that nothing had disturbed.

Processes are killed in a step, while a checkpoint is written, between phases, in an evaluation, while latencies are
measured and while the architecture is exported; they are told to end (SIGTERM, Ctrl-C); disks are full; the user's
loss, data, metrics or schedulers raise; loader processes die; batches are NaN; one process of two dies. After each of
these the run is resumed, perhaps disturbed once more, and must give the same architecture JSON, the same loss curve
and the same weights, bit for bit on the CPU, with no temporary file left. Everything is drawn from one seed.

    python examples/fault_campaign.py --runs 200 --seed 1
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oneshot.loggers import markdown_table

# The runs, and what is done to them, are those of the tests.
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
faults: Any = importlib.import_module("faults")

MEASURING = "killed while measuring"
TWO = {"two processes": "", "two processes of torchrun": "torchrun", "two processes of one script": "ddp"}
TRAINERS = [name for name in faults.TRAINERS if name != "latency"]
KINDS = [*faults.KINDS, MEASURING, *TWO]


class Undisturbed:
    """The undisturbed run of each trainer, made when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, processes: int = 1) -> Path:
        root = self.folder / f"{name} {processes}"
        if not root.exists():
            ends = faults.in_two_processes(root, name) if processes == 2 else [faults.in_process(root, name)]
            assert all(end.status == 0 for end in ends), (name, ends)
            assert faults.leftovers(root) == [], name
        return root

    def counts(self, name: str) -> dict[str, int]:
        """How often this run passes each place."""
        found: dict[str, int] = json.loads((self(name) / "counts.json").read_text())
        return found


def in_one_process(root: Path, kind: str, name: str, undisturbed: Undisturbed, rng: random.Random) -> list[Any]:
    """One to three faults of a kind, one after the other; then the same run."""
    drawn = [faults.drawn(kind, undisturbed.counts(name), rng) for _ in range(rng.randint(1, 3))]
    faults.disturbed(root, name, drawn, workers=faults.workers_of(kind))
    faults.check_equal(root, undisturbed(name))
    return drawn


def while_measuring(root: Path, rng: random.Random) -> list[Any]:
    """The undisturbed run is one with the times that the disturbed one has measured."""
    place, at = rng.choice([("layer", 150), ("cache/write", 14), ("cache/fsync", 28), ("cache/replace", 14)])
    drawn = [faults.Fault(place, rng.randint(1, at), rng.choice(["kill", "term"]))]
    faults.disturbed(root, "latency", drawn)
    other = root.with_name(f"{root.name} undisturbed")
    shutil.copytree(root / "cache", other / "cache")
    assert faults.in_process(other, "latency").status == 0
    faults.check_equal(root, other)
    shutil.rmtree(other)
    return drawn


def in_two_processes(root: Path, kind: str, name: str, undisturbed: Undisturbed, rng: random.Random) -> list[Any]:
    """One of them is killed, or told to end; the other one ends too, and both are resumed."""
    place, at = rng.choice([("loss", 20), ("backward", 10), ("optimizer", 20), ("dataset", 90)])
    fault = faults.Fault(place, rng.randint(2, at), rng.choice(["kill", "term"]), rank=rng.randint(0, 1))
    how = TWO[kind]
    if how:
        assert faults.launched(root, name, how, fault) != 0, fault
        assert faults.launched(root, name, how) == 0, fault
    else:
        ends = faults.in_two_processes(root, name, fault)
        assert any(end.status != 0 for end in ends), (fault, ends)
        faults.check_readable(root)
        assert [end.status for end in faults.in_two_processes(root, name)] == [0, 0], fault
    faults.check_equal(root, undisturbed(name, processes=2))
    return [fault]


def one(root: Path, kind: str, name: str, undisturbed: Undisturbed, rng: random.Random) -> list[Any]:
    """One disturbed run; what was done to it. AssertionError unless it is the undisturbed one in the end."""
    if kind == MEASURING:
        return while_measuring(root, rng)
    run: Callable[..., list[Any]] = in_two_processes if kind in TWO else in_one_process
    return run(root, kind, name, undisturbed, rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, metavar="KIND", help=f"one of {KINDS}")
    parser.add_argument("--trainer", choices=TRAINERS, help="instead of all of them")
    args = parser.parse_args()

    runs: Counter[tuple[str, str]] = Counter()
    equal: Counter[tuple[str, str]] = Counter()
    wrong = []
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        undisturbed = Undisturbed(folder / "undisturbed")
        for i in range(args.runs):
            rng = random.Random(f"{args.seed} {i}")
            kind, name = args.only or rng.choice(KINDS), args.trainer or rng.choice(TRAINERS)
            if kind == MEASURING:
                name = "proxyless"
            root = folder / f"run {i}"
            runs[kind, name] += 1
            try:
                drawn = one(root, kind, name, undisturbed, rng)
            except AssertionError as error:
                wrong.append(f"run {i}, {kind}, {name}: {error}")
                print(wrong[-1], flush=True)
            else:
                equal[kind, name] += 1
                text = ", ".join(f"{fault.action} at {fault.place} {fault.at}" for fault in drawn)
                print(f"run {i}, {kind}, {name}: {text}: equal", flush=True)
            shutil.rmtree(root, ignore_errors=True)
    rows = [
        {"fault": kind, "trainer": name, "runs": n, "resumed equal": equal[kind, name]}
        for (kind, name), n in sorted(runs.items())
    ]
    print(markdown_table(rows))
    assert not wrong, f"{len(wrong)} of {args.runs} runs: {wrong}"
    assert sum(equal.values()) == args.runs


if __name__ == "__main__":
    main()
