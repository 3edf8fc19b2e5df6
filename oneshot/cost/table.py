"""Latency tables: what each candidate takes, in milliseconds.

Three forms are read, from a mapping or from a YAML or JSON file:

* candidates: ``{"conv3": 0.8, "conv5": 1.4}``, for every choice alike, and more specific rows
  ``{"block1": {"conv3": 0.5, "conv5": 1.1}}`` by label or path of a choice. ``fixed``: everything outside choices;
* operators: the published tables of ProxylessNAS, ``key -> {"mean": ms, ...}`` (or ``key -> ms``), where the key
  is what a module's own ``latency_key(input_shape, output_shape)`` returns;
* measured: what ``measure_latency`` wrote, ``{"format": "oneshot-latency", ...}``.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import yaml
from torch import nn

from ..errors import ConfigurationError, UnknownCostError
from ..files import atomic_write
from ..graph import Call, intersect, trace_calls
from ..mutables import InputChoice, Mutable, decisions
from .model import CostModel, Term

__all__ = ["LatencyTable", "price"]

_FORMAT = "oneshot-latency"
_VERSION = 1


@final
@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds per row. ``by_key``: rows are operators; else candidates, by choice in ``by_place``.

    ``fixed``: milliseconds of everything outside the choices, None if the table does not say.
    ``runtime``: where the numbers come from, free text by name.

    >>> LatencyTable.read({"a": 1.0, "block": {"a": 2.0}, "fixed": 0.5}).row("block", "block", "a")
    2.0
    """

    anywhere: Mapping[str, float] = field(default_factory=dict)
    by_place: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    fixed: float | None = None
    by_key: bool = False
    runtime: Mapping[str, str] = field(default_factory=dict)
    source: str = "a mapping"

    @classmethod
    def read(cls, source: Mapping[str, Any] | str | Path) -> LatencyTable:
        """From a mapping or a file; ConfigurationError names what is not a number of milliseconds."""
        if isinstance(source, Mapping):
            return cls._from(source, "a mapping")
        path = Path(source)
        return cls._from(_load(path), str(path))

    @classmethod
    def _from(cls, rows: Mapping[str, Any], source: str) -> LatencyTable:
        runtime: dict[str, str] = {}
        if rows.get("format") == _FORMAT:
            if rows.get("version") != _VERSION or rows.get("unit") != "ms":
                raise ConfigurationError(
                    f"{source}: version {rows.get('version')!r} in unit {rows.get('unit')!r}; this library reads "
                    f"version {_VERSION} in unit 'ms'"
                )
            runtime = {str(k): str(v) for k, v in dict(rows.get("runtime") or {}).items()}
            rows = {"fixed": rows.get("fixed"), **_mapping(rows.get("places"), source)}
        fixed = rows.get("fixed")
        rest = {str(key): value for key, value in rows.items() if key != "fixed"}
        if not rest:
            raise ConfigurationError(f"{source}: the latency table has no rows")
        by_key = any("-input:" in key for key in rest)
        anywhere: dict[str, float] = {}
        by_place: dict[str, dict[str, float]] = {}
        for key, value in rest.items():
            if by_key and isinstance(value, Mapping):
                anywhere[key] = _milliseconds(value.get("mean"), key, source)
            elif isinstance(value, Mapping):
                by_place[key] = {str(name): _milliseconds(ms, f"{key}/{name}", source) for name, ms in value.items()}
            else:
                anywhere[key] = _milliseconds(value, key, source)
        of_fixed = None if fixed is None else _milliseconds(fixed, "fixed", source)
        return cls(anywhere, by_place, of_fixed, by_key, runtime, source)

    def row(self, path: str, label: str, option: str) -> float:
        """Milliseconds of a candidate: the row of its choice by path, by label, else the row for any choice."""
        for place in (path, label):
            if option in self.by_place.get(place, {}):
                return self.by_place[place][option]
        if option in self.anywhere:
            return self.anywhere[option]
        known = sorted({*self.anywhere, *self.by_place.get(path, {}), *self.by_place.get(label, {})})
        raise UnknownCostError(
            f"latency: {self.source} has no row for candidate {option!r} of choice {label!r}; rows that could "
            f"apply: {known[:12]}. Add a row {option!r}, or {{{label!r}: {{{option!r}: milliseconds}}}}"
        )

    def operator(self, key: str, path: str) -> float:
        """Milliseconds of an operator by its key."""
        if key not in self.anywhere:
            near = [other for other in self.anywhere if other.split("-")[0] == key.split("-")[0]][:3]
            raise UnknownCostError(
                f"latency: {self.source} has no row {key!r}, which {path!r} needs; rows of that kind look like "
                f"{near}. Use a width that the table holds, or add the row"
            )
        return self.anywhere[key]

    def as_dict(self) -> dict[str, Any]:
        """The measured form, JSON-ready; only for tables of candidates."""
        if self.by_key or self.anywhere:
            raise ConfigurationError(f"{self.source}: only a table by choice is written, this one has other rows")
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "unit": "ms",
            "runtime": dict(self.runtime),
            "fixed": self.fixed,
            "places": {place: dict(rows) for place, rows in self.by_place.items()},
        }

    def write(self, path: str | Path) -> None:
        """Write the measured form, as JSON or YAML by the file's ending, atomically."""
        path = Path(path)
        data = self.as_dict()
        text = json.dumps(data, indent=2) + "\n" if path.suffix == ".json" else yaml.safe_dump(data, sort_keys=False)
        atomic_write(path, lambda file: file.write(text.encode()))


def price(model: nn.Module, args: Sequence[Any], table: LatencyTable) -> CostModel:
    """The latency, in ms, of every architecture of ``model`` by a table. Unknown is an error, never 0."""
    terms = _by_operator(model, args, table) if table.by_key else _by_candidate(model, args, table)
    if table.fixed is not None:
        terms.append(Term(table.fixed, {}))
    elif not table.by_key:
        warnings.warn(
            f"latency: {table.source} has no row 'fixed', so the layers outside the choices are priced 0 ms",
            stacklevel=2,
        )
    return CostModel("latency_ms", "ms", terms, model)


def _by_operator(model: nn.Module, args: Sequence[Any], table: LatencyTable) -> list[Term]:
    def is_unit(module: nn.Module) -> bool:
        own = any(p is not None for p in module._parameters.values())
        return hasattr(module, "latency_key") or (own and not isinstance(module, Mutable))

    terms = []
    for call in trace_calls(model, args, is_unit):
        if not hasattr(call.module, "latency_key"):
            raise UnknownCostError(
                f"latency: {call.path!r} is a {type(call.module).__name__} that no module with a latency_key "
                f"method contains, so {table.source} cannot price it. Give the module around it a method "
                "latency_key(input_shape, output_shape) that returns the key of its row"
            )
        key = call.module.latency_key(call.input_shape, call.output_shape)  # type: ignore[operator]
        terms.append(Term(table.operator(key, call.path), call.when))
    return terms


def _by_candidate(model: nn.Module, args: Sequence[Any], table: LatencyTable) -> list[Term]:
    labels = {id(m): label for label, d in decisions(model).items() for m in d.members}
    terms = []
    for call in mutable_calls(model, args):
        label = labels[id(call.module)]
        for k, option in enumerate(call.module.options):  # type: ignore[arg-type]
            when = intersect(call.when, {label: frozenset({k})})
            if when is not None:
                terms.append(Term(table.row(call.path, label, option_name(option)), when))
    return terms


def mutable_calls(model: nn.Module, args: Sequence[Any], *, keep: bool = False) -> list[Call]:
    """The calls of the mutables that are priced by candidate: all but InputChoice, which only passes tensors on."""
    calls = trace_calls(model, args, lambda m: isinstance(m, Mutable) and m.decided is None, keep=keep)
    return [call for call in calls if not isinstance(call.module, InputChoice)]


def option_name(option: Any) -> str:
    """An option as a row names it."""
    return str(option)


def _load(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigurationError(
            f"latency table {str(path)!r}: {error.strerror or error}. applied_hardware takes 'this-machine', "
            "'flops', a mapping, or the path of a YAML or JSON table"
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigurationError(f"{path}: neither YAML nor JSON: {error}") from error
    return _mapping(data, str(path))


def _mapping(data: Any, source: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise ConfigurationError(f"{source}: a mapping of rows is needed, got a {type(data).__name__}")
    return data


def _milliseconds(value: Any, key: str, source: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number) and number >= 0:
            return number
    raise ConfigurationError(f"{source}: row {key!r} is {value!r}; a finite number of milliseconds >= 0 is needed")
