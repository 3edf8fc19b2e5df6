"""What a run is steered by: from the arguments ``cost``, ``applied_hardware`` and ``missing`` to cost models."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, final

from torch import nn

from ..cost import (
    COUNTED,
    Cost,
    CostModel,
    CostSpec,
    LatencyTable,
    PeakMemory,
    count,
    count_peak_memory,
    counted_cost,
    latency_on,
)
from ..cost.hardware import RUNTIMES, Hardware, check_latency_source, is_predicted
from ..cost.nn_meter import NNMeterLatency, PredictorSet, check_missing
from ..cost.runtimes import runtime_facts
from ..errors import ConfigurationError
from ..mutables import decisions

__all__ = ["CostSources"]

_LATENCY = "latency_ms"


@final
class CostSources:
    """The costs of a run by name, in their order, each with what it is made from.

    ``table``: the latency table, once there is one; ``predicted``: what nn-Meter said, likewise.
    """

    def __init__(
        self,
        cost: str | Sequence[str] | Cost | CostSpec | Mapping[str, Any] | None,
        hardware: Hardware | None,
        missing: Mapping[str, float] | None = None,
    ) -> None:
        self.missing = None if missing is None else check_missing(missing)
        self.table: LatencyTable | None = None
        self.predicted: NNMeterLatency | None = None
        self.sources = _sources(cost)
        if hardware is not None and self.sources.get(_LATENCY, ...) is None:
            del self.sources[_LATENCY]  # by name only: what it is, applied_hardware says
        if hardware == "flops":
            if self.sources.get("macs", ...) is not None:  # None: by name only, which is the same
                self._add("macs", "macs", "applied_hardware='flops'")
        elif hardware is not None:
            self._add(_LATENCY, hardware, "applied_hardware")
        for name, source in self.sources.items():
            self.sources[name] = self._checked(name, source)
        # Now, and of the table that was read: the file may be gone or another one later.
        self._fingerprint = {
            name: _fingerprint(self.table if name == _LATENCY and self.table is not None else source)
            for name, source in self.sources.items()
        }
        if missing is not None and not is_predicted(self.sources.get(_LATENCY, {})):
            raise ConfigurationError(
                f"missing={dict(missing)}: it is for kernels that predictors of nn-Meter lack, and this run has none; "
                "give their name or folder as applied_hardware"
            )

    def check_for(self, model: nn.Module) -> None:
        """ConfigurationError for a cost that was counted for another network."""
        sizes = {label: len(d.options) for label, d in decisions(model).items() if d.members[0].decided is None}
        for name, source in self.sources.items():
            if isinstance(source, CostModel | PeakMemory) and source.sizes != sizes:
                raise ConfigurationError(
                    f"cost {name!r} has decisions {source.sizes} (label: number of options), the model {sizes}. Count "
                    "the cost of this model"
                )

    def fingerprint(self) -> dict[str, str]:
        """What each cost is, as text: a run is taken up again with the same costs only."""
        return dict(self._fingerprint)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.sources)

    @property
    def measures(self) -> bool:
        """Whether this run measures its latency itself."""
        source = self.sources.get(_LATENCY)
        return isinstance(source, str) and source in RUNTIMES

    @property
    def runtime(self) -> tuple[str, int] | None:
        """The runtime of this machine, with its threads, that the latency is for, if it is."""
        source = self.sources.get(_LATENCY)
        if self.table is None and isinstance(source, str) and source in RUNTIMES:
            return RUNTIMES[source], 1
        if self.table is None or not self.table.runtime.get("threads", "").isdecimal():
            return None
        threads = int(self.table.runtime["threads"])
        kind = self.table.runtime.get("runtime", "").split(" ")[0]
        if kind not in RUNTIMES.values():
            return None
        try:
            here = runtime_facts(kind, threads) == dict(self.table.runtime)
        except ConfigurationError:  # that runtime is not installed
            return None
        return (kind, threads) if here else None

    def facts(self) -> dict[str, Any]:
        """Where a latency comes from, JSON-ready, for the exported file."""
        if self.predicted is not None:
            found = self.predicted
            said = {"approximations": list(found.approximations), "missing": dict(found.missing)}
            return {"latency": {"nn_meter": found.hardware, **said}}
        return {} if self.table is None else {"latency": {"table": self.table.source, **self.table.runtime}}

    def notes(self) -> str:
        """What is not exact about a prediction, as text."""
        return "" if self.predicted is None else self.predicted.report()

    def unit(self, name: str) -> str:
        source = self.sources[name]
        if isinstance(source, CostModel | PeakMemory | CostSpec):
            return source.unit
        return "ms" if name == _LATENCY else "bytes" if name == "peak_memory" else COUNTED[name]

    def build(self, name: str, model: nn.Module, args: Sequence[Any], measure: Callable[[str], LatencyTable]) -> Cost:
        """The cost of that name, counted, priced or measured now."""
        known = sorted({*COUNTED, "peak_memory", *self.sources})
        if name not in known:
            raise ConfigurationError(f"cost {name!r}: this run has {known}")
        source = self.sources.get(name, name)
        if isinstance(source, CostModel | PeakMemory):
            return source
        if isinstance(source, CostSpec):
            return count(model, args, source)
        if name == "peak_memory":
            return count_peak_memory(model, args)
        if name != _LATENCY:
            return counted_cost(name, model, args)
        hardware = source if self.table is None else self.table  # of an earlier part of this run
        cost, found = latency_on(hardware, model, args, missing=self.missing, measure=measure)
        if isinstance(found, NNMeterLatency):
            self.predicted = found
            if found.report():
                warnings.warn(found.report(), stacklevel=2)
        else:
            self.table = found
        return cost

    def _add(self, name: str, source: Any, argument: str) -> None:
        if name in self.sources:
            said = self.sources[name]
            raise ConfigurationError(f"{argument}: cost= already says what {name!r} is, {said!r}; give one of them")
        self.sources[name] = source

    def _checked(self, name: str, source: Any) -> Any:
        """A source that can be used; what is wrong with another one is said now, and not after hours."""
        if isinstance(source, CostModel | PeakMemory | CostSpec):
            if name in (*COUNTED, "peak_memory", _LATENCY) and source.name != name:
                raise ConfigurationError(f"cost {name!r}: it is given as {source.name!r}; call it by another name")
            return source
        if name == _LATENCY and source is None:
            raise ConfigurationError(f"cost {_LATENCY!r}: say of what hardware, applied_hardware=...")
        if name == _LATENCY:
            self.table = check_latency_source(source)
            return source
        known = sorted([*COUNTED, "peak_memory"])
        if name not in known or source not in (None, name):
            raise ConfigurationError(
                f"cost {name!r}: {source!r}; allowed are the names {known}, a CostSpec, CostModel or PeakMemory under "
                f"any name, and {{{_LATENCY!r}: what applied_hardware takes}}"
            )
        return name


def _sources(cost: str | Sequence[str] | Cost | CostSpec | Mapping[str, Any] | None) -> dict[str, Any]:
    if cost is None:
        return {}
    if isinstance(cost, CostModel | PeakMemory | CostSpec):
        return {cost.name: cost}
    if isinstance(cost, Mapping):
        return dict(cost)
    if not isinstance(cost, str | Sequence):
        raise ConfigurationError(
            f"cost={cost!r}: a name, a CostSpec, CostModel or PeakMemory, several of them, or name -> one of them"
        )
    several = [cost] if isinstance(cost, str) else list(cost)
    names = [c.name if isinstance(c, CostModel | PeakMemory | CostSpec) else c for c in several]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"cost: {names} has a name twice")
    return {c.name if isinstance(c, CostModel | PeakMemory | CostSpec) else c: _named_source(c) for c in several}


def _named_source(cost: Any) -> Any:
    return cost if isinstance(cost, CostModel | PeakMemory | CostSpec) else None


def _fingerprint(source: Any) -> str:
    if isinstance(source, CostModel):
        return _digest([source.name, source.fixed, source.table, [(t.value, _plain(t.when)) for t in source.products]])
    if isinstance(source, CostSpec):
        return f"{source.name}: {', '.join(sorted(map(str, source.rules)))}"
    if isinstance(source, PredictorSet):
        return f"predictors {source.name} {source.version}, {source.source}"
    if isinstance(source, str | os.PathLike) and (source in RUNTIMES or is_predicted(source)):
        return str(source)
    if isinstance(source, str) and source in (*COUNTED, "peak_memory"):
        return source
    if isinstance(source, PeakMemory):
        return _digest([source.name, str(source.dtype), source.sizes])
    table = asdict(source if isinstance(source, LatencyTable) else LatencyTable.read(source))
    return _digest({key: value for key, value in table.items() if key != "source"})


def _plain(when: Mapping[str, frozenset[int]]) -> dict[str, list[int]]:
    return {label: sorted(options) for label, options in when.items()}


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
