"""Whether a checkpoint, sound in itself, fits the model, its optimizers and what else learns: nothing is applied.

What passes here can be loaded without an error, and the next step be made; so a run is either taken up whole or not
touched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import CheckpointError
from .checkpoint_kinds import (
    Check,
    any_number,
    anything,
    at_least_0,
    boolean,
    check_tensor,
    list_of,
    mapping_of,
    number,
    optional,
    plain,
    record,
    refuse,
    tensor,
    text,
    whole,
)

__all__ = [
    "check_argmax",
    "check_fits",
    "check_history",
    "check_like",
    "check_optimizer",
    "check_regularizer",
    "check_scheduler",
    "check_targets_state",
]


def check_fits(state: Any, model: nn.Module, where: str) -> None:
    """CheckpointError unless the state has exactly the model's tensors, with their shapes, kinds and finite numbers.

    A number that is not finite is only right where the model's own is not: a mask of minus infinity, say.
    """
    mapping_of(anything)(state, where)
    ours = model.state_dict()
    missing, extra = [k for k in ours if k not in state], [k for k in state if k not in ours]
    tensors = [k for k, mine in ours.items() if isinstance(mine, Tensor) and k in state]
    shapes = [k for k in tensors if not isinstance(state[k], Tensor) or ours[k].shape != state[k].shape]
    if missing or extra or shapes:
        raise CheckpointError(
            f"{where}: made for another model: {len(missing)} tensors missing {missing[:3]}, {len(extra)} too many "
            f"{[k[:80] for k in extra[:3]]}, {len(shapes)} of another shape {shapes[:3]}. Build the model with the "
            "arguments it had"
        )
    for key in tensors:
        check_tensor(state[key], ours[key], f"{where}: {key}")


def check_optimizer(state: Mapping[str, Any], optimizer: Optimizer, where: str) -> None:
    """CheckpointError unless ``optimizer.load_state_dict(state)`` works, and its next step too.

    The settings of a group are of the kinds that they are here; what is remembered of a parameter has the names,
    shapes and types that this optimizer makes for it.
    """
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    groups = state["param_groups"]
    indices = [index for group in groups for index in group["params"]]
    if [len(group["params"]) for group in groups] != sizes or indices != list(range(sum(sizes))):
        raise CheckpointError(
            f"{where}: groups of {[len(g['params']) for g in groups][:5]} parameters, here {sizes[:5]}"
        )
    for k, (there, here) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        settings = {name: value for name, value in here.items() if name not in ("params", "initial_lr")}
        check_like(there, settings, f"{where}: group {k}", extra=True)
        if isinstance(there["lr"], Tensor) or there["lr"] < 0:
            refuse(there["lr"], f"{where}: group {k}: lr", "a number of at least 0")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    made = _first_states(optimizer)
    for index, of_one in state["state"].items():
        if index >= len(parameters):
            raise CheckpointError(f"{where}: a state of parameter {index}, of {len(parameters)}")
        at = f"{where}: state of parameter {index}"
        if made is None:
            mapping_of(_number_or_tensor)(of_one, at)
        elif of_one:
            _check_parameter_state(of_one, made[index], parameters[index], at)


def _check_parameter_state(there: Mapping[str, Any], made: Mapping[str, Any], p: Tensor, where: str) -> None:
    if there.keys() != made.keys():
        raise CheckpointError(f"{where}: {[k[:80] for k in there][:5]}, the optimizer has {list(made)} there")
    for name, value in there.items():
        at, like = f"{where}: {name}", made[name]
        if like is None:
            _number_or_tensor(value, at)
            like = torch.zeros((2,) * p.dim(), dtype=p.dtype) if isinstance(value, Tensor) else None
        if isinstance(like, Tensor):
            is_spread = like.dim() == p.dim()  # then a 2 stands for the size of the parameter there
            sizes = zip(p.shape, like.shape, strict=True) if is_spread else zip(like.shape, like.shape, strict=True)
            wanted = [size if stand_in == 2 else stand_in for size, stand_in in sizes]
            check_tensor(value, torch.zeros((), dtype=like.dtype).expand(wanted), at)
        elif like is not None:
            _check_kind(value, like, at)


def _number_or_tensor(value: Any, where: str) -> None:
    if isinstance(value, Tensor):
        tensor(value, where)
    elif value is not None and type(value) is not bool:
        number(value, where)


def _first_states(optimizer: Optimizer) -> list[Mapping[str, Any]] | None:
    """What an optimizer of torch remembers of each parameter, tried on parameters of two numbers per dimension.

    None for an optimizer that is not torch's own, or does not make a step so.
    """
    if not type(optimizer).__module__.startswith("torch.optim"):
        return None
    groups, stand_ins = [], []
    for group in optimizer.param_groups:
        own = [nn.Parameter(torch.zeros((2,) * p.dim(), dtype=p.dtype)) for p in group["params"]]
        plainly = {"capturable": False, "foreach": False, "fused": False, "differentiable": False}
        groups.append({**group, **{k: v for k, v in plainly.items() if k in group}, "params": own})
        stand_ins += own
    for one in stand_ins:
        one.grad = torch.zeros_like(one)
    try:
        # The settings are all in the groups.
        other = type(optimizer)(groups)  # type: ignore[call-arg]
        other.step()
    except (TypeError, ValueError, RuntimeError, KeyError):
        return None
    return [other.state[one] for one in stand_ins]


def check_like(there: Mapping[str, Any], here: Mapping[str, Any], where: str, *, extra: bool = False) -> None:
    """CheckpointError unless both have the same keys and kinds of values; ``extra``: there may be more there.

    A number is a finite number, and where a whole one here is above 0, above 0. Where here is None, anything plain may
    have been found out.
    """
    mapping_of(anything)(there, where)
    missing, more = [k for k in here if k not in there], [k for k in there if k not in here]
    if missing or (more and not extra):
        raise CheckpointError(
            f"{where}: without {missing[:5]}, and with {[k[:80] for k in more][:5]}; it has {list(here)}"
        )
    for key in more:
        plain(there[key], f"{where}: {key[:80]}")
    for key, mine in here.items():
        _check_kind(there[key], mine, f"{where}: {key}")


def _check_kind(value: Any, mine: Any, where: str) -> None:
    if isinstance(mine, Tensor):
        check_tensor(value, mine, where)
    elif isinstance(mine, Counter):
        if type(value) is not Counter:
            refuse(value, where, "a Counter")
        list_of(whole)([*value, *value.values()], where)
    elif isinstance(mine, Mapping):
        check_like(value, mine, where)
    elif isinstance(mine, list | tuple):
        if type(value) is not type(mine) or len(value) != len(mine):
            refuse(value, where, f"a {type(mine).__name__} of {len(mine)}")
        for k, (one, other) in enumerate(zip(value, mine, strict=True)):
            _check_kind(one, other, f"{where}[{k}]")
    else:
        _check_leaf(value, mine, where)


def _check_leaf(value: Any, mine: Any, where: str) -> None:
    if type(mine) is bool:
        boolean(value, where)
    elif isinstance(mine, int | float):
        number(value, where)
        if type(mine) is int and mine > 0 and value <= 0:
            refuse(value, where, "a number above 0")
    elif isinstance(mine, str):
        if value != mine or type(value) is not str:
            refuse(value, where, repr(mine))
    else:
        plain(value, where)


def check_scheduler(there: Mapping[str, Any], here: Mapping[str, Any], step: int, where: str) -> None:
    """Whether the state of a scheduler is one of this kind, ``here``, after at most so many steps."""
    check_like(there, here, where)
    for name in ("last_epoch", "_step_count"):
        if there.get(name, 0) > step + 1:
            refuse(there[name], f"{where}: {name}", f"at most {step + 1}")


def check_history(history: Sequence[Mapping[str, Any]], names: Sequence[str], where: str) -> None:
    """Whether every record has these numbers, by which epochs are compared."""
    for k, of_epoch in enumerate(history):
        for name in names:
            any_number(of_epoch.get(name), f"{where}[{k}]: {name}")


_LEARNT: Mapping[str, Check] = {
    "factor": at_least_0,
    "initial": optional(at_least_0),
    "lambda_max": mapping_of(at_least_0),
    "final_strengths": mapping_of(at_least_0),
}


def check_regularizer(there: Mapping[str, Any], here: Mapping[str, Any], where: str) -> None:
    """Whether the state of a regularizer is one of this kind, ``here``."""
    record(**{key: _LEARNT.get(key, plain) for key in here})(there, where)


def check_argmax(there: Mapping[str, Any], here: Mapping[str, Any], where: str) -> None:
    """Whether an architecture has the labels of this one, and decisions of its kinds."""
    if there.keys() != here.keys():
        raise CheckpointError(f"{where}: other labels than {list(here)[:5]}")
    for label, mine in here.items():
        if type(there[label]) is not type(mine):
            refuse(there[label], f"{where}: {label}", f"a {type(mine).__name__}")


def check_targets_state(state: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    """Whether the state of ``Targets`` is one of these costs."""
    of_costs = mapping_of(at_least_0, names)
    record(
        multipliers=of_costs, first=of_costs, task_gradient=optional(at_least_0), bound=list_of(text), before=of_costs
    )(state, where)
    if set(state["multipliers"]) != set(names):
        raise CheckpointError(f"{where}: multipliers of {list(state['multipliers'])}, the targets are {list(names)}")
    for part in ("first", "before"):
        if state[part] and set(state[part]) != set(names):
            raise CheckpointError(f"{where}: {part} of {list(state[part])}, the targets are {list(names)}")
    if not set(state["bound"]) <= set(names):
        raise CheckpointError(f"{where}: bound has other names than the targets, {list(names)}")
