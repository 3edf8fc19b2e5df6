"""One search of a sweep, from the warm-up or from where it was left, in whatever process."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch.utils.data import Dataset

from ..errors import CheckpointError, OneshotError
from ..files import atomic_write
from ..trainers import Trainer
from ..trainers.checkpoint import LAST
from ..trainers.rng import seed_global_state, user_state_kept
from .front import FrontRow, json_number
from .points import Point

__all__ = ["ARCH", "RESULT", "PointRun", "build_trainer", "read_result", "run_point"]

ARCH, RESULT = "arch.json", "result.json"
_FORMAT = "oneshot-sweep-point"
_VERSION = 1
TrainerFactory = Callable[..., Trainer]


@final
@dataclass(frozen=True)
class PointRun:
    """All that one search needs, as it travels to another process; ``warmup``: the file it begins with, if any."""

    trainer_factory: TrainerFactory
    point: Point
    folder: Path
    warmup: Path | None
    evaluate_on: Dataset[Any] | None
    seed: int


def build_trainer(factory: TrainerFactory, folder: Path, point: Point, seed: int) -> Trainer:
    """What the factory makes, from the same random state for every point; the user's own stays as it is."""
    with user_state_kept():
        seed_global_state(seed)
        return factory(folder, **point)


def run_point(run: PointRun) -> FrontRow:
    """Train, export, evaluate, and write what was found; an error of the library is the row's failure.

    CheckpointError comes out: then the folder is of something else, and nothing in it may be overwritten.
    """
    try:
        trainer = build_trainer(run.trainer_factory, run.folder, run.point, run.seed)
        if (run.folder / LAST).exists():
            trainer.resume(run.folder)
        elif run.warmup is not None:
            trainer.start_from(run.warmup)
        trainer.train()
        run.folder.mkdir(exist_ok=True)
        trainer.export(run.folder / ARCH)
        metrics = trainer.evaluate(run.evaluate_on)
    except CheckpointError:
        raise
    except OneshotError as failure:
        return FrontRow(run.point, run.folder, {}, {}, failure=failure)
    costs = json.loads((run.folder / ARCH).read_text(encoding="utf-8"))["costs"]
    row = FrontRow(run.point, run.folder, costs, metrics)
    _write_result(row)
    return row


def _write_result(row: FrontRow) -> None:
    data = {
        "format": _FORMAT,
        "version": _VERSION,
        "point": row.point,
        "costs": {name: json_number(value) for name, value in row.costs.items()},
        "metrics": {name: json_number(value) for name, value in row.metrics.items()},
    }
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    atomic_write(row.folder / RESULT, lambda file: file.write(text.encode("utf-8")))


def read_result(
    folder: Path, point: Point, *, costs_of: Collection[str] = (), metrics_of: Collection[str] = ()
) -> FrontRow | None:
    """The row of a search that is done, or None; CheckpointError for a file that is damaged or of another point.

    ``costs_of``, ``metrics_of``: the numbers that rows are compared by, which have to be there.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    what_to_do = f"; remove {os.fspath(folder)!r} to search this point again"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        known = [data[key] for key in ("format", "version", "point")]
        costs, metrics = ({k: float(v) for k, v in data[key].items()} for key in ("costs", "metrics"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{path}: not the result of a search ({error}){what_to_do}") from error
    if known != [_FORMAT, _VERSION, point]:
        raise CheckpointError(f"{path}: {reprlib.repr(known)}, needed is {[_FORMAT, _VERSION, point]}{what_to_do}")
    missing = [name for name in costs_of if name not in costs] + [name for name in metrics_of if name not in metrics]
    if missing:
        raise CheckpointError(f"{path}: the result of a search without {missing}{what_to_do}")
    return FrontRow(point, folder, costs, metrics)
