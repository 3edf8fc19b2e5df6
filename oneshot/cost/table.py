"""Latency tables: what each candidate takes, in milliseconds.

Three forms are read, from a mapping or from a YAML or JSON file:

* candidates: ``{"conv3": 0.8, "conv5": 1.4}``, for every choice alike, and more specific rows
  ``{"block1": {"conv3": 0.5, "conv5": 1.1}}`` by label or path of a choice. ``fixed``: everything outside choices;
* operators: the published tables of ProxylessNAS and of Once-for-All, ``key -> {"mean": ms, ...}`` (or
  ``key -> ms``), where the key is what a module's own ``latency_key(input_shape, output_shape)`` returns; whatever
  else a row holds ("count", "var", "std") is not used;
* measured: what ``measure_table`` wrote, with a place (path of a choice) and the name of a candidate per row:

      {"format": "oneshot-latency", "version": 2, "unit": "ms",
       "runtime": {"runtime": "torch 2.13.0", "machine": "x86_64", "processor": "...", "threads": "1"},
       "fixed": 0.21,
       "places": {"blocks.1": {"k3e3": {"median": 0.093, "iqr": 0.002, "n": 180}, "skip": {"median": 0.0, ...}}}}

  ``runtime`` is free text by name; ``fixed`` may be null. A row may also be a number, its median; so are all rows
  of version 1, which is read as well.
"""

from __future__ import annotations

import json
import math
import reprlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import yaml
from torch import nn

from ..errors import ConfigurationError, UnknownCostError
from ..files import atomic_write
from ..graph import Call, intersect, trace_calls, undecided_inside
from ..mutables import InputChoice, Mutable, decisions
from .model import CostModel, Term
from .plain_yaml import ERRORS, load_yaml, no_duplicates

__all__ = ["LatencyTable", "price"]

_FORMAT = "oneshot-latency"
_VERSION = 2
_VERSIONS = (1, 2)


@final
@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds per row. ``by_key``: rows are operators; else candidates, by choice in ``by_place``.

    ``fixed``: milliseconds of everything outside the choices, None if the table does not say.
    ``runtime``: where the numbers come from, free text by name. ``spread``: of rows that were measured, by place and
    candidate, ``{"iqr": interquartile range in ms, "n": number of repetitions}``; ``by_place`` has their medians.

    >>> LatencyTable.read({"a": 1.0, "block": {"a": 2.0}, "fixed": 0.5}).row("block", "block", "a")
    2.0
    """

    anywhere: Mapping[str, float] = field(default_factory=dict)
    by_place: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    fixed: float | None = None
    by_key: bool = False
    runtime: Mapping[str, str] = field(default_factory=dict)
    source: str = "a mapping"
    spread: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)

    @classmethod
    def read(cls, source: Mapping[str, Any] | str | Path) -> LatencyTable:
        """From a mapping or a file; ConfigurationError names what is not a number of milliseconds."""
        if isinstance(source, Mapping):
            return cls._from(source, "a mapping")
        path = Path(source)
        return cls._from(_load(path), str(path))

    @classmethod
    def _from(cls, data: Mapping[Any, Any], source: str) -> LatencyTable:
        rows = _named(data, source)
        if rows.get("format") == _FORMAT:
            return cls._measured(rows, source)
        fixed = _fixed(rows.pop("fixed", None), source)
        if not rows:
            raise ConfigurationError(f"{source}: the latency table has no rows")
        if any("-input:" in key for key in rows):
            by_key = {key: _operator_row(value, key, source) for key, value in rows.items()}
            return cls(by_key, fixed=fixed, by_key=True, source=source)
        anywhere = {k: _milliseconds(v, k, source) for k, v in rows.items() if not isinstance(v, Mapping)}
        by_place = {k: _candidate_rows(v, k, source) for k, v in rows.items() if isinstance(v, Mapping)}
        return cls(anywhere, by_place, fixed, source=source)

    @classmethod
    def _measured(cls, data: Mapping[str, Any], source: str) -> LatencyTable:
        version, unit = data.get("version"), data.get("unit")
        if isinstance(version, bool) or version not in _VERSIONS or unit != "ms":
            raise ConfigurationError(
                f"{source}: version {_shown(version)} in unit {_shown(unit)}; this library reads versions 1 and 2 "
                "in unit 'ms'"
            )
        places = _named(data.get("places"), f"{source}, 'places'")
        by_place: dict[str, dict[str, float]] = {}
        spread: dict[str, dict[str, dict[str, float]]] = {}
        for place, rows in places.items():
            named = _named(rows, f"{source}, {place!r}")
            measured = {name: row for name, row in named.items() if version == 2 and isinstance(row, Mapping)}
            medians = {name: row.get("median") for name, row in measured.items()}
            by_place[place] = _candidate_rows({**named, **medians}, place, source)
            if measured:
                spread[place] = {name: _spread(row, f"{place}/{name}", source) for name, row in measured.items()}
        runtime = _named(data.get("runtime") or {}, f"{source}, 'runtime'")
        texts = {name: value if isinstance(value, str) else _shown(value) for name, value in runtime.items()}
        fixed = _fixed(data.get("fixed"), source)
        return cls({}, by_place, fixed, runtime=texts, source=source, spread=spread)

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
            near = [other for other in self.anywhere if other.split("-")[0] == str(key).split("-")[0]][:3]
            raise UnknownCostError(
                f"latency: {self.source} has no row {key!r}, which {path or 'the network'} needs; rows of that kind "
                f"look like {near}. Use a width that the table holds, or add the row"
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
            "places": {
                place: {name: self._written(place, name) for name in rows} for place, rows in self.by_place.items()
            },
        }

    def _written(self, place: str, name: str) -> float | dict[str, float]:
        median, spread = self.by_place[place][name], self.spread.get(place, {}).get(name)
        return median if spread is None else {"median": median, **spread}

    def calibrated(self, scale: float, offset: float) -> LatencyTable:
        """The table for which every network takes ``scale`` * (what it took by this one) + ``offset`` ms.

        Rows and their spread are multiplied, the offset is added to ``fixed``. ConfigurationError for a scale that is
        not above 0, or an offset that would bring ``fixed`` below 0.

        >>> LatencyTable(by_place={"block": {"a": 2.0}}, fixed=1.0).calibrated(1.5, -0.5).as_dict()["fixed"]
        1.0
        """
        before = scale * (self.fixed or 0.0)
        fixed = before + offset
        if abs(fixed) <= 1e-12 * abs(before):  # 0, but for rounding
            fixed = 0.0
        if not (0 < scale < math.inf and 0 <= fixed < math.inf):
            raise ConfigurationError(
                f"calibrated(scale={scale!r}, offset={offset!r}) of a table with fixed={self.fixed}: fixed would be "
                f"{fixed:.6g} ms; a scale above 0 and a fixed >= 0 are needed"
            )
        return replace(
            self,
            anywhere={name: scale * ms for name, ms in self.anywhere.items()},
            by_place={place: {name: scale * ms for name, ms in rows.items()} for place, rows in self.by_place.items()},
            fixed=fixed,
            spread={
                place: {name: {**row, "iqr": scale * row["iqr"]} for name, row in rows.items()}
                for place, rows in self.spread.items()
            },
        )

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
        name = f"latency: {call.path or 'the network'} is a {type(call.module).__name__}"
        if not hasattr(call.module, "latency_key"):
            raise UnknownCostError(
                f"{name} that no module with a latency_key method contains, so {table.source} cannot price it. Give "
                "the module around it a method latency_key(input_shape, output_shape) that returns the key of its row"
            )
        inner = undecided_inside(call.module)
        if inner is not None:
            raise UnknownCostError(
                f"{name} with one latency_key for all, and holds {inner}, whose candidates one row cannot tell apart. "
                "Give the candidates a latency_key method, and not the module around them"
            )
        key = call.module.latency_key(call.input_shape, call.output_shape)  # type: ignore[operator]
        terms.append(Term(table.operator(key, call.path), call.when, call.path))
    return terms


def _by_candidate(model: nn.Module, args: Sequence[Any], table: LatencyTable) -> list[Term]:
    labels = {id(m): label for label, d in decisions(model).items() for m in d.members}
    terms = []
    for call in mutable_calls(model, args):
        label = labels[id(call.module)]
        for k, option in enumerate(call.module.options):  # type: ignore[arg-type]
            when = intersect(call.when, {label: frozenset({k})})
            if when is not None:
                terms.append(Term(table.row(call.path, label, option_name(option)), when, call.path))
    return terms


def mutable_calls(model: nn.Module, args: Sequence[Any], *, keep: bool = False) -> list[Call]:
    """The calls of the mutables that are priced by candidate: all but InputChoice, which only passes tensors on."""
    calls = trace_calls(model, args, lambda m: isinstance(m, Mutable) and m.decided is None, keep=keep)
    return [call for call in calls if not isinstance(call.module, InputChoice)]


def option_name(option: Any) -> str:
    """An option as a row names it."""
    return str(option)


def _load(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=no_duplicates)
        return load_yaml(text)
    except OSError as error:
        raise ConfigurationError(
            f"latency table {str(path)!r}: {error.strerror or error}. applied_hardware takes 'this-machine', "
            "'flops', a mapping, or the path of a YAML or JSON table"
        ) from error
    except ERRORS as error:
        raise ConfigurationError(f"{path}: neither YAML nor JSON: {error}") from error


def _named(data: Any, source: str) -> dict[str, Any]:
    """A mapping with its names as text: a depth may be a whole number."""
    if not isinstance(data, Mapping):
        got = "nothing" if data is None else f"a {type(data).__name__}"
        raise ConfigurationError(f"{source}: a mapping of rows is needed, got {got}")
    named: dict[str, Any] = {}
    for key, value in data.items():
        whole = isinstance(key, int) and not isinstance(key, bool) and abs(key) < 10**15
        if not isinstance(key, str) and not whole:
            raise ConfigurationError(
                f"{source}: row {_shown(key)} is named by a {type(key).__name__}; a name is text (YAML reads on, off, "
                "yes, no, null and dates as something else: put quotes around them)"
            )
        if str(key) in named:
            raise ConfigurationError(f"{source}: row {str(key)!r} stands twice, as text and as a number")
        named[str(key)] = value
    return named


def _candidate_rows(value: Any, place: str, source: str) -> dict[str, float]:
    rows = _named(value, f"{source}, {place!r}")
    return {name: _milliseconds(ms, f"{place}/{name}", source) for name, ms in rows.items()}


def _spread(row: Mapping[Any, Any], key: str, source: str) -> dict[str, float]:
    n = row.get("n")
    if isinstance(n, bool) or not isinstance(n, int) or not 0 < n < 10**15:
        raise ConfigurationError(f"{source}: row '{key}/n' is {_shown(n)}; a number of repetitions >= 1 is needed")
    return {"iqr": _milliseconds(row.get("iqr"), f"{key}/iqr", source), "n": n}


def _operator_row(value: Any, key: str, source: str) -> float:
    if isinstance(value, Mapping):
        return _milliseconds(value.get("mean"), f"{key}/mean", source)
    return _milliseconds(value, key, source)


def _fixed(value: Any, source: str) -> float | None:
    return None if value is None else _milliseconds(value, "fixed", source)


def _milliseconds(value: Any, key: str, source: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max:
        return float(value)
    raise ConfigurationError(
        f"{source}: row {key!r} is {_shown(value)}; a finite number of milliseconds >= 0 is needed"
    )


def _shown(value: Any) -> str:
    """A value of a damaged file, short: a list may be endless, and a number too long to be written."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, int | float):
        return repr(value)
    return reprlib.repr(value) if isinstance(value, str) else f"a {type(value).__name__}"
