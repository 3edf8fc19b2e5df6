"""What a checkpoint holds, key by key: one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from .checkpoint_kinds import (
    Check,
    any_number,
    anything,
    at_least_0,
    boolean,
    generator_state,
    list_of,
    mapping_of,
    measured,
    number,
    optional,
    plain,
    positive,
    record,
    refuse,
    share,
    shown,
    text,
    whole,
)

__all__ = ["CHECKS", "check_state"]

PHASES = ("warmup", "search", "finetune")


def _meters(value: Any, where: str) -> None:
    record(sums=mapping_of(any_number), counts=mapping_of(positive))(value, where)
    if value["sums"].keys() != value["counts"].keys():
        raise CheckpointError(f"{where}: sums and counts are of different names")


def _history(value: Any, where: str) -> None:
    """One record per epoch, the phases one after the other."""
    list_of(mapping_of(measured))(value, where)
    last = (0, 0)
    for k, of_epoch in enumerate(value):
        at = f"{where}[{k}]"
        if of_epoch.get("phase") not in PHASES:
            refuse(of_epoch.get("phase"), f"{at}: phase", f"one of {list(PHASES)}")
        whole(of_epoch.get("epoch"), f"{at}: epoch")
        whole(of_epoch.get("step"), f"{at}: step")
        now = (PHASES.index(of_epoch["phase"]), of_epoch["step"])
        if of_epoch["epoch"] != k or now[0] < last[0] or now[1] <= last[1]:
            raise CheckpointError(f"{at}: the epochs {k - 1} and {of_epoch['epoch']} do not follow each other")
        last = now


def _optimizer(value: Any, where: str) -> None:
    """As ``Optimizer.state_dict`` has it; ``check_optimizer`` says whether it fits one."""
    record(state=anything, param_groups=list_of(_group))(value, where)
    if not isinstance(value["state"], Mapping):
        refuse(value["state"], f"{where}: state", "a mapping")
    for index, of_one in value["state"].items():
        whole(index, f"{where}: state: a key")
        mapping_of(anything)(of_one, f"{where}: state of parameter {index}")


def _group(value: Any, where: str) -> None:
    mapping_of(anything)(value, where)
    list_of(whole)(value.get("params"), f"{where}: params")


def _table(value: Any, where: str) -> None:
    """A ``LatencyTable`` as a mapping."""
    record(
        anywhere=mapping_of(at_least_0),
        by_place=mapping_of(mapping_of(at_least_0)),
        fixed=optional(at_least_0),
        by_key=boolean,
        runtime=mapping_of(text),
        source=text,
        spread=mapping_of(mapping_of(record(iqr=at_least_0, n=whole))),
    )(value, where)


CHECKS: Mapping[str, Check] = {
    "trainer": text,
    "space": text,
    "settings": mapping_of(plain),
    "step": whole,
    "arch_batches": whole,
    "model": mapping_of(anything),  # see ``check_fits``
    "optimizer": _optimizer,
    "arch_optimizer": _optimizer,
    "finetune_optimizer": _optimizer,
    "scheduler": optional(mapping_of(anything)),  # see ``check_scheduler``
    "generator": generator_state,
    "processes": list_of(record(meters=_meters)),
    "history": _history,
    "argmax": mapping_of(plain),  # see ``check_argmax``
    "log_size": whole,
    "latency_table": optional(_table),
    "ended": mapping_of(whole, PHASES),
    "targets": mapping_of(anything),  # see ``check_targets_state``
    "progress": share,
    "holds_kept": boolean,
    "regularizers": list_of(mapping_of(plain)),
    "average": optional(mapping_of(anything)),  # as what the trainer has itself, by ``check_like``
    "scaler": optional(mapping_of(number)),
    "removed": mapping_of(anything),
    "own": mapping_of(anything),  # of the class of the trainer
}
"""Key -> what stands there. A key that is saved gets its line here."""


def check_state(state: Mapping[str, Any], where: str) -> None:
    """CheckpointError unless every key of ``CHECKS`` is there and holds what its line says."""
    missing = [key for key in CHECKS if key not in state]
    if missing:
        raise CheckpointError(f"{where}: incomplete, without {missing}")
    for key, check in CHECKS.items():
        check(state[key], f"{where}: {key}")
    _check_metadata(state["model"], f"{where}: model")
    epochs = [of_epoch["phase"] for of_epoch in state["history"]]
    for phase, n in state["ended"].items():
        if n != epochs.count(phase):
            raise CheckpointError(f"{where}: ended: {phase} after {n} epochs, the history has {epochs.count(phase)}")
    if state["history"] and state["step"] < state["history"][-1]["step"]:
        raise CheckpointError(f"{where}: step {state['step']} is before the last one of the history")


def _check_metadata(model: Mapping[str, Any], where: str) -> None:
    """The versions of modules that ``nn.Module.state_dict`` notes and ``load_state_dict`` compares."""
    for prefix, of_module in getattr(model, "_metadata", {}).items():
        known = isinstance(of_module, Mapping) and of_module.keys() <= {"version", "assign_to_params_buffers"}
        if type(prefix) is not str or not known or type(of_module.get("version", 1)) is not int:
            raise CheckpointError(f"{where}: a version of {shown(prefix)} that is none")
