"""What can be wrong with a sweep, looked at before anything is trained."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, Subset

from ..errors import CheckpointError, ConfigurationError, InputTypeError
from ..export import fingerprint
from ..files import atomic_write
from ..trainers import Trainer
from ..trainers.batches import even_batches

__all__ = ["check_compared", "check_identity", "check_trainer"]

IDENTITY = "sweep.json"
_FORMAT = "oneshot-sweep"
_VERSION = 1


def check_trainer(made: Any, again: Any, folder: Path, *, is_parallel: bool) -> None:
    """Whether the two things that a factory made for one folder are trainers, each with its own network.

    ``is_parallel``: several searches run at a time.
    """
    for trainer in (made, again):
        if not isinstance(trainer, Trainer):
            raise InputTypeError(
                f"sweep: trainer_factory returned a {type(trainer).__name__}; it has to return a trainer"
            )
    if made.checkpoint_dir != folder:
        raise ConfigurationError(
            f"sweep: trainer_factory({str(folder)!r}, ...) returned a trainer with checkpoint_dir="
            f"{None if made.checkpoint_dir is None else str(made.checkpoint_dir)!r}; hand the first argument on as "
            "checkpoint_dir=, so that every point has its own folder"
        )
    if made.fabric.world_size > 1 and is_parallel:
        raise ConfigurationError(
            f"sweep: the trainer has {made.fabric.world_size} processes; give it one, devices=1, for several searches "
            "at a time, or workers=1 for one search after the other by all processes"
        )
    shared = {id(p) for p in made.model.parameters()} & {id(p) for p in again.model.parameters()}
    if made.model is again.model or shared:
        raise ConfigurationError(
            f"sweep: trainer_factory returned the same network twice ({len(shared)} common parameters); every search "
            "needs one of its own: build it inside of the factory"
        )


def check_compared(trainer: Trainer, monitor: str, costs: Sequence[str], evaluate_on: Dataset[Any] | None) -> None:
    """Whether the numbers by which the networks are compared will be there."""
    priced = dict.fromkeys(("params", *trainer.searched.names))
    unknown = [name for name in costs if name not in priced]
    if unknown:
        raise ConfigurationError(f"sweep: unknown costs {unknown}; the trainer has {list(priced)}")
    data = trainer.valid_dataset if evaluate_on is None else evaluate_on
    if data is None or not len(data):  # type: ignore[arg-type]
        raise ConfigurationError(
            "sweep: no data to evaluate the networks on; give evaluate_on=, or valid_dataset= to the trainer"
        )
    if trainer.metrics is None:
        found: Any = {}
    else:
        batch = next(iter(even_batches(Subset(data, [0]), 1)))
        device = next(trainer.model.parameters()).device
        inputs, target = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
        # With running statistics: those of a batch of one sample do not exist.
        with trainer.searched.as_found(settled=True), torch.no_grad():
            found = trainer.metrics(trainer.model(inputs), target)
    known = ["loss", *(found if isinstance(found, Mapping) else ["metric"])]
    if monitor not in known:
        raise ConfigurationError(f"sweep: monitor={monitor!r}; allowed are {known}")
    twice = [name for name in known if name in priced]
    if twice:
        raise ConfigurationError(f"sweep: {twice} are metrics and costs; give the metrics other names")


def check_identity(
    place: Path, trainer: Trainer, evaluate_on: Dataset[Any] | None, warmup: Path | None, seed: int
) -> None:
    """Write what the sweep of a directory is, or compare it with what is written there."""
    data = trainer.valid_dataset if evaluate_on is None else evaluate_on
    identity = {
        "format": _FORMAT,
        "version": _VERSION,
        "trainer": type(trainer).__name__,
        "space": fingerprint(trainer.model),
        "costs": trainer.searched.fingerprint(),
        "epochs": [trainer.warmup_epochs, trainer.num_epochs, trainer.finetune_epochs],
        "batch_size": trainer.batch_size,
        "arch_fraction": trainer.arch_fraction,
        "seeds": [seed, trainer.seed],
        "samples": [_size(trainer.dataset), _size(trainer.valid_dataset), _size(data)],
        "warmup": "own" if warmup is None else hashlib.sha256(warmup.read_bytes()).hexdigest()[:16],
    }
    text = json.dumps(identity, indent=2, ensure_ascii=False) + "\n"
    path = place / IDENTITY
    if path.exists():
        _compare(path, json.loads(text))
        return
    place.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: file.write(text.encode("utf-8")))


def _compare(path: Path, here: dict[str, Any]) -> None:
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not the description of a sweep ({error}); give another directory") from error
    if not isinstance(there, dict):
        raise CheckpointError(
            f"{path}: a {type(there).__name__}, not the description of a sweep; give another directory"
        )
    different = {key: (there.get(key), value) for key, value in here.items() if there.get(key) != value}
    if different:
        text = ", ".join(f"{k} {reprlib.repr(was)} there and {now!r} here" for k, (was, now) in different.items())
        raise CheckpointError(f"{path}: the directory is of another sweep: {text}. Give another directory")


def _size(dataset: Dataset[Any] | None) -> int | None:
    return None if dataset is None else len(dataset)  # type: ignore[arg-type]
