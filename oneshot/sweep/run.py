"""A sweep: one search per target or strength, all from one warm-up, in a folder where it can be taken up again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from ..errors import ConfigurationError, InfeasibleTargetError, OneshotError
from ..trainers import Trainer
from ..trainers.checkpoint import LAST
from ..trainers.selection import larger_is_better
from .checks import check_compared, check_identity, check_trainer
from .front import Front, FrontRow
from .parallel import check_backend, check_travels, run_all
from .point_run import PointRun, TrainerFactory, build_trainer, read_result, run_point
from .points import Point, folder_name, points_of, swept_costs

__all__ = ["sweep"]

WARMUP = "warmup.ckpt"


def sweep(
    trainer_factory: TrainerFactory,
    *,
    directory: str | os.PathLike[str],
    targets: Iterable[float | Mapping[str, float]] | None = None,
    strengths: Iterable[float | Mapping[str, float]] | None = None,
    cost: str | None = None,
    monitor: str = "loss",
    monitor_mode: Literal["min", "max"] | None = None,
    evaluate_on: Dataset[Any] | None = None,
    workers: int = 1,
    backend: Literal["process", "ray"] = "process",
    warmup_from: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Front:
    """Search once per target or strength, and compare the networks found: accuracy against cost.

    The warm-up is the same for all points, so it is trained once and every search begins with it. Each point has a
    folder of its own in ``directory``: checkpoints and log of the trainer, ``arch.json``, ``result.json``. After every
    point ``front.csv`` and ``front.json`` are written anew, complete at every instant.

    Called again with the same arguments, it goes on where it was: points that are done are read, one that was
    interrupted goes on from its last checkpoint, one that failed is tried again, and points may be added.
    CheckpointError if the directory is of another trainer, search space, cost, number of epochs or samples, batch size,
    seed or warm-up. What is not compared: the data themselves, learning rates, metrics, and of a network with choices
    its widths; if one of them changes, give another directory. The folder of a point may be removed, to search it anew.

    A point that fails with an error of this library (InfeasibleTargetError, TrainingDivergedError, ...) becomes a row
    with its message, and the others go on; if all fail, the error of the first is raised. Other errors come out.

    Args:
        trainer_factory: ``(checkpoint_dir, **point) -> trainer``, with a new network each time; ``point`` is
            ``targets={cost: number}``, or ``strength=number`` or ``strength={cost: number}``, for the trainer:

                def make(checkpoint_dir, **point):
                    pit = PIT(Net(), input_shape=(1, 8, 8))
                    return PITTrainer(pit, ..., checkpoint_dir=checkpoint_dir, **point)

            The global random generators are seeded before each call, so that all begin with the same weights. It is
            called a few times before the first step, for checks.
        directory: where everything is written; made if it is not there.
        targets, strengths: one of both: an entry per search, a number or cost -> number.
        cost: what numbers are for. Without it a strength is for all costs of the trainer.
        monitor: ``'loss'`` or one of the trainer's metrics; ``monitor_mode``: ``'min'`` or ``'max'`` is better, by
            default ``'min'`` for the loss and ``'max'`` for a metric. A network is dominated if another one is no worse
            in it and in the costs that the points name (all costs of the trainer if they name none), and better in one.
        evaluate_on: data for the metrics of the found networks, by default the trainer's ``valid_dataset``. That one
            has also chosen the epoch, so numbers to report need other data.
        workers: so many searches at a time, each in a process with one thread of torch. The results are those of
            ``workers=1`` with one thread. Factory and data are copied to the processes; a function inside of
            another one, or a lambda, may be the factory.
        backend: ``'process'`` (joblib) on this machine, or ``'ray'`` (``pip install 'oneshot-nas[ray]'``), where every
            machine has to see ``directory`` under the same path.
        warmup_from: a file of ``trainer.warm_up(path)``, or ``warmup.ckpt`` of another sweep, to begin with.
        seed: of the random state that the factory meets.

    A found network with its weights: ``trainer = make(row.folder, **row.point); trainer.resume(row.folder);
    trainer.export_model()``.

    >>> import tempfile, torch
    >>> from oneshot import PIT, PITTrainer
    >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.arange(64) % 2)
    >>> def make(checkpoint_dir, **point):
    ...     net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    ...     pit = PIT(net, input_shape=(4,))  # 4 * 8 + 8 + 8 * 2 + 2 = 58 parameters
    ...     return PITTrainer(
    ...         pit, loss=torch.nn.CrossEntropyLoss(), metrics=None, dataset=data, valid_dataset=data, num_epochs=4,
    ...         warmup_epochs=1, optimizer=torch.optim.SGD(pit.parameters(), lr=0.1), mask_learning_rate=0.05,
    ...         batch_size=8, workers=0, device="cpu", checkpoint_dir=checkpoint_dir, **point,
    ...     )
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     front = sweep(make, strengths=[0, 1.0], directory=folder)
    >>> [row.costs["params"] for row in front.rows]  # nothing pulls; one of the 8 units is left: 4 + 1 + 2 + 2
    [58.0, 9.0]
    """
    points = points_of(targets, strengths, cost)
    larger = larger_is_better(monitor, monitor_mode)
    place = _checked_directory(directory)
    check_backend(backend, workers)
    is_parallel = workers > 1 or backend == "ray"
    if is_parallel:
        check_travels("trainer_factory", trainer_factory)
        check_travels("evaluate_on", evaluate_on)
    trainer = _checked_trainer(trainer_factory, points, place, monitor, evaluate_on, seed, is_parallel)
    given = _checked_warmup(warmup_from, trainer)
    check_identity(place, trainer, evaluate_on, given, seed)
    costs = swept_costs(points) or trainer.searched.names
    warmup = _warmed_up(trainer_factory, points, place, given, seed) if trainer.warmup_epochs else None
    del trainer  # its network is not needed any more
    runs = [PointRun(trainer_factory, p, place / folder_name(p), warmup, evaluate_on, seed) for p in points]
    found = [read_result(run.folder, run.point, costs_of=costs, metrics_of=(monitor,)) for run in runs]
    rows = {row.folder: row for row in found if row is not None}
    left = [run for run in runs if run.folder not in rows]

    def written() -> Front:
        known = [rows[run.folder] for run in runs if run.folder in rows]
        front = Front(known, monitor=monitor, larger_is_better=larger, costs=costs)
        front.write_csv(place / "front.csv")
        front.write_json(place / "front.json")
        return front

    front = written()
    with closing(run_all(run_point, left, backend=backend, workers=workers)) as results:
        for row in results:
            rows[row.folder] = row
            front = written()
    _check_any(front.rows)
    return front


def _checked_directory(directory: str | os.PathLike[str]) -> Path:
    place = Path(directory).resolve()
    if place.exists() and not place.is_dir():
        raise ConfigurationError(
            f"sweep: directory={str(directory)!r} is a file; give a folder, or a path that is free"
        )
    return place


def _checked_warmup(warmup_from: str | os.PathLike[str] | None, trainer: Trainer) -> Path | None:
    if warmup_from is None:
        return None
    if not trainer.warmup_epochs:
        raise ConfigurationError(
            f"sweep: warmup_from={str(warmup_from)!r}, and the trainers have warmup_epochs=0; give them the epochs "
            "that it was made with"
        )
    given = Path(warmup_from).resolve()
    if not given.is_file():
        raise ConfigurationError(
            f"sweep: warmup_from={str(warmup_from)!r} is no file; trainer.warm_up(path) writes one"
        )
    trainer.start_from(given)
    return given


def _checked_trainer(
    factory: TrainerFactory,
    points: list[Point],
    place: Path,
    monitor: str,
    evaluate_on: Dataset[Any] | None,
    seed: int,
    is_parallel: bool,
) -> Trainer:
    """A trainer of the first point that can be built, looked at; the first error if none can."""
    failures: list[OneshotError] = []
    for point in points:
        folder = place / folder_name(point)
        try:
            trainer = build_trainer(factory, folder, point, seed)
        except OneshotError as error:
            failures.append(error)
            continue
        check_trainer(trainer, build_trainer(factory, folder, point, seed), folder, is_parallel=is_parallel)
        check_compared(trainer, monitor, swept_costs(points), evaluate_on)
        return trainer
    raise failures[0]


def _warmed_up(factory: TrainerFactory, points: list[Point], place: Path, given: Path | None, seed: int) -> Path:
    """The file that every search begins with: the given one, that of an earlier call, or one that is trained now."""
    path = place / WARMUP if given is None else given
    failures: list[OneshotError] = []
    for point in points:
        folder = place / "warmup" / folder_name(point)
        try:
            trainer = build_trainer(factory, folder, point, seed)
            if path.exists():
                trainer.start_from(path)
                return path
            if (folder / LAST).exists():
                trainer.resume(folder)
            trainer.warm_up(path)
            return path
        except (ConfigurationError, InfeasibleTargetError) as error:
            failures.append(error)  # of this point: it cannot be searched, but another one can
    raise failures[0]


def _check_any(rows: Sequence[FrontRow]) -> None:
    failures = [row.failure for row in rows if row.failure is not None]
    if len(failures) < len(rows):
        return
    raise type(failures[0])(f"sweep: none of the {len(rows)} searches gave a network. The first: {failures[0]}")
