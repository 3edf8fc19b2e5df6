"""Kinds of values in a checkpoint: checks that say what is wrong, and where."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import CheckpointError

__all__ = [
    "Check",
    "any_number",
    "anything",
    "at_least_0",
    "boolean",
    "check_tensor",
    "generator_state",
    "index_below",
    "list_of",
    "mapping_of",
    "measured",
    "number",
    "optional",
    "plain",
    "positive",
    "record",
    "refuse",
    "row_of",
    "share",
    "shown",
    "tensor",
    "tensor_like",
    "text",
    "whole",
]

Check = Callable[[Any, str], None]
"""A check of a value: CheckpointError that says ``where`` it stands."""

_MOST = 2**53  # the whole numbers that a float can tell apart
_LONGEST = 100_000  # characters of a text


def refuse(value: Any, where: str, needed: str) -> NoReturn:
    raise CheckpointError(f"{where} is {shown(value)}; {needed} is needed")


def shown(value: Any) -> str:
    """A value of a damaged file, short."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {list(value.shape)}"
    if value is None or isinstance(value, bool | float | str):
        return reprlib.repr(value)
    if isinstance(value, int):
        return repr(value) if abs(value) < 2**64 else f"an integer of {value.bit_length()} bits"
    return f"a {type(value).__name__}"


def text(value: Any, where: str) -> None:
    if type(value) is not str or len(value) > _LONGEST:
        refuse(value, where, "a text")


def boolean(value: Any, where: str) -> None:
    if type(value) is not bool:
        refuse(value, where, "True or False")


def whole(value: Any, where: str) -> None:
    if type(value) is not int or not 0 <= value < _MOST:
        refuse(value, where, "a whole number of at least 0")


def number(value: Any, where: str) -> None:
    """Finite, of any sign."""
    if type(value) not in (int, float) or not abs(value) < math.inf:
        refuse(value, where, "a finite number")


def measured(value: Any, where: str) -> None:
    """What a log holds: a number, which may be NaN or infinite, a text, or nothing."""
    if not (value is None or type(value) in (int, float, bool, str)):
        refuse(value, where, "a number or a text")


def plain(value: Any, where: str) -> None:
    """Texts, numbers, None, and lists and mappings of them."""
    if isinstance(value, Mapping):
        mapping_of(plain)(value, where)
    elif isinstance(value, list | tuple):
        for k, one in enumerate(value):
            plain(one, f"{where}[{k}]")
    else:
        measured(value, where)


def tensor(value: Any, where: str) -> None:
    if type(value) is not Tensor or value.layout != torch.strided or value.device.type != "cpu":
        refuse(value, where, "a tensor")


def generator_state(value: Any, where: str) -> None:
    """The state of a ``torch.Generator`` of the CPU."""
    tensor(value, where)
    try:
        torch.Generator().set_state(value)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{where}: not the state of a random generator: {error}") from error


def optional(check: Check) -> Check:
    """None, or what ``check`` admits."""
    return lambda value, where: None if value is None else check(value, where)


def list_of(check: Check) -> Check:
    def checked(value: Any, where: str) -> None:
        if type(value) is not list:
            refuse(value, where, "a list")
        for k, one in enumerate(value):
            check(one, f"{where}[{k}]")

    return checked


def mapping_of(check: Check, keys: Sequence[str] | None = None) -> Check:
    """Text -> what ``check`` admits; ``keys``: those that are allowed."""

    def checked(value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            refuse(value, where, "a mapping")
        for key, one in value.items():
            if type(key) is not str or (keys is not None and key not in keys):
                refuse(key, f"{where}: a key", "a text" if keys is None else f"one of {list(keys)}")
            check(one, f"{where}: {key[:80]}")

    return checked


def row_of(*checks: Check) -> Check:
    """A list with one entry for each of them."""

    def checked(value: Any, where: str) -> None:
        if type(value) not in (list, tuple) or len(value) != len(checks):
            refuse(value, where, f"a list of {len(checks)}")
        for k, (check, one) in enumerate(zip(checks, value, strict=True)):
            check(one, f"{where}[{k}]")

    return checked


def index_below(n: int) -> Check:
    """0 to n - 1."""

    def checked(value: Any, where: str) -> None:
        whole(value, where)
        if value >= n:
            refuse(value, where, f"a whole number below {n}")

    return checked


def tensor_like(here: Tensor) -> Check:
    """A tensor of this shape and type, with finite numbers."""
    return lambda value, where: check_tensor(value, here, where)


def record(**checks: Check) -> Check:
    """A mapping with these keys and no others."""

    def checked(value: Any, where: str) -> None:
        mapping_of(lambda one, at: None)(value, where)
        missing, extra = [k for k in checks if k not in value], [k[:80] for k in value if k not in checks]
        if missing or extra:
            raise CheckpointError(f"{where}: without {missing[:5]}, and with {extra[:5]}; it has {list(checks)}")
        for key, check in checks.items():
            check(value[key], f"{where}: {key}")

    return checked


def at_least_0(value: Any, where: str) -> None:
    number(value, where)
    if value < 0:
        refuse(value, where, "a number of at least 0")


def share(value: Any, where: str) -> None:
    number(value, where)
    if not 0 <= value <= 1:
        refuse(value, where, "a number from 0 to 1")


def any_number(value: Any, where: str) -> None:
    if type(value) not in (int, float):
        refuse(value, where, "a number")


def positive(value: Any, where: str) -> None:
    whole(value, where)
    if value == 0:
        refuse(value, where, "a whole number of at least 1")


def anything(value: Any, where: str) -> None:
    """Looked at by another check."""


def check_tensor(there: Any, here: Tensor, where: str) -> None:
    """CheckpointError unless both are of one shape and type; numbers are finite, but where those here are not either.

    >>> check_tensor(torch.tensor([0.0, math.nan]), torch.zeros(2), "a.ckpt: weight")
    Traceback (most recent call last):
    oneshot.errors.CheckpointError: a.ckpt: weight has a number that is not finite, at 1: nan
    """
    tensor(there, where)
    if there.shape != here.shape or there.dtype != here.dtype:
        refuse(there, where, shown(here))
    if there.is_floating_point() or there.is_complex():
        bad = ~torch.isfinite(there)
        if bool(bad.any()):
            bad &= torch.isfinite(here.detach()).cpu()
        if bool(bad.any()):
            at = int(bad.flatten().nonzero()[0])
            raise CheckpointError(f"{where} has a number that is not finite, at {at}: {there.flatten()[at].item()}")
