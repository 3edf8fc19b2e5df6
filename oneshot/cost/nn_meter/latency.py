"""The latency of every architecture of a search space by nn-Meter's kernel predictors, in one batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

from torch import nn

from ...errors import ConfigurationError, UnknownCostError
from ...graph import Condition, trace_operators
from ...mutables import decisions
from ..model import CostModel, Term
from .features import Row, rows_of
from .kernels import Detector, Kernel, folded, ir_of, merged
from .nodes import FREE
from .predictors import PredictorSet, load_predictor_set
from .regions import Piece, graph_of, pieces

__all__ = [
    "NNMeterLatency",
    "PricedKernel",
    "PricedPart",
    "check_missing",
    "nn_meter_graph",
    "nn_meter_latency",
]


class PricedPart(NamedTuple):
    """What a kernel predictor was asked, and its answer in ms, ``times`` times.

    ``features`` is empty where the caller's ``missing`` says the price. ``notes``: in what it is an approximation.
    """

    kernel: str
    features: tuple[float, ...]
    times: int
    ms: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class PricedKernel:
    """A kernel of the space: the module its first operator is in, its operators, and its ms while ``when`` holds."""

    path: str
    types: tuple[str, ...]
    ms: float
    when: Condition
    parts: tuple[PricedPart, ...]


@final
@dataclass(frozen=True)
class NNMeterLatency:
    """What nn-Meter predicts for a search space: the cost, kernel by kernel, and what is not exact about it.

    ``approximations``: one line for everything that nn-Meter's predictors cannot tell, each with a layer it concerns.
    ``missing``: what the caller said about kernels without a predictor, as far as it was used.
    """

    cost: CostModel
    hardware: str
    kernels: tuple[PricedKernel, ...]
    approximations: tuple[str, ...]
    missing: Mapping[str, float]

    def report(self) -> str:
        """The approximations and the missing kernels, as text; empty if there are none."""
        lines = [f"latency_ms by nn-Meter, {self.hardware}: {note}" for note in self.approximations]
        said = [f"kernel {name!r}, which has no predictor, priced {ms:g} ms" for name, ms in self.missing.items()]
        return "\n".join([*lines, *(f"latency_ms by nn-Meter, {self.hardware}: {line}" for line in said)])


def nn_meter_latency(
    model: nn.Module,
    args: Sequence[Any],
    hardware: str | Path | PredictorSet,
    *,
    missing: Mapping[str, float] | None = None,
) -> NNMeterLatency:
    """Price a network, or a search space, with the kernel predictors of a device.

    The kernels are those that nn-Meter detects in each architecture, also across the borders of its choices; the
    cost is linear in them, so its expectation is exact. Only squeeze-excite, hard-swish and channel shuffle are found
    inside of one candidate alone, where networks spell them out.

    ``hardware``: see ``load_predictor_set``. ``missing``: kernel or predictor -> ms, for what the set cannot price;
    without it such a kernel is an UnknownCostError that names the layer, the kernel and the set. Unknown is never 0 ms.
    """
    predictors = hardware if isinstance(hardware, PredictorSet) else load_predictor_set(hardware)
    stated = check_missing(missing or {})
    sizes = {label: len(d.options) for label, d in decisions(model).items()}
    detector = Detector(predictors.fusion_rules)
    found = merged(
        kernel
        for piece in pieces(graph_of(trace_operators(model, args)), detector.fusible, sizes)
        for kernel in detector.kernels(piece)
        if set(kernel.types) != {FREE}
    )
    answers = _asked(found, predictors, stated)
    kernels = [
        PricedKernel(kernel.nodes[0].path, kernel.types, sum(part.ms for part in parts), kernel.when, tuple(parts))
        for kernel, parts in zip(found, answers, strict=True)
    ]
    terms = [
        Term(kernel.ms, {k: o for k, o in kernel.when.items() if len(o) < sizes[k]}, kernel.path) for kernel in kernels
    ]
    return NNMeterLatency(
        CostModel("latency_ms", "ms", terms, model),
        predictors.name,
        tuple(kernels),
        _approximations(kernels),
        {part.kernel: stated[part.kernel] for kernel in kernels for part in kernel.parts if not part.features},
    )


def nn_meter_graph(model: nn.Module, args: Sequence[Any]) -> dict[str, Any]:
    """A network without open choices as nn-Meter's own graph, for ``nnMeterPredictor.predict(graph, "nnmeter-ir")``.

    >>> import torch
    >>> graph = nn_meter_graph(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), (torch.zeros(1, 3, 9, 9),))
    >>> [(node["attr"]["type"], node["attr"]["output_shape"]) for node in graph.values()]
    [('Placeholder', [[1, 9, 9, 3]]), ('conv', [[1, 7, 7, 8]]), ('relu', [[1, 7, 7, 8]])]
    """
    open_choices = [label for label, d in decisions(model).items() if d.members[0].decided is None]
    if open_choices:
        raise ConfigurationError(f"nn_meter_graph: {open_choices} are undecided; give it fixed(model, arch)")
    whole = list(pieces(graph_of(trace_operators(model, args)), lambda root, consumer: True, {}))
    merged = Piece([], [], [], {})
    for piece in whole:  # parts that share nothing but inputs
        shift = len(merged.nodes)
        reads = [[(None if i is None else i + shift, number) for i, number in row] for row in piece.reads]
        merged = Piece([*merged.nodes, *piece.nodes], [*merged.reads, *reads], [*merged.others, *piece.others], {})
    return ir_of(folded(merged))


def _asked(kernels: Sequence[Kernel], predictors: PredictorSet, stated: Mapping[str, float]) -> list[list[PricedPart]]:
    """The parts of every kernel with their prices; all questions to one predictor are asked at once."""
    known = {name: forest.n_features for name, forest in predictors.forests.items()}
    rows = [rows_of(kernel, known) for kernel in kernels]
    problems = {
        f"{kernel.nodes[0].path or 'the network'}: kernel {row.predictor!r}": row.predictor
        for kernel, asked in zip(kernels, rows, strict=True)
        for row in asked
        if (row.predictor not in known or not row.features) and row.predictor not in stated
    }
    if problems:
        shown, gaps = list(problems)[:8], sorted(set(problems.values()))
        raise UnknownCostError(
            f"latency: {predictors.name} has no predictor for {len(problems)} kernels:\n  "
            + "\n  ".join(shown + ["..."] * (len(problems) > len(shown)))
            + f"\nits predictors are {sorted(known)}. Use another set, or say what they take in ms: missing="
            + "{"
            + ", ".join(f"{gap!r}: ..." for gap in gaps)
            + "} (it is repeated in the report)"
        )
    ms: dict[tuple[str, tuple[float, ...]], float] = {}
    for name, forest in predictors.forests.items():
        questions = sorted({row.features for asked in rows for row in asked if row.predictor == name and row.features})
        _check_width(predictors, name, questions)
        if questions:
            answers = forest.predict(questions)
            ms.update({(name, question): float(a) for question, a in zip(questions, answers, strict=True)})

    def priced(row: Row) -> PricedPart:
        each = ms.get((row.predictor, row.features), stated.get(row.predictor, 0.0))
        features = row.features if row.predictor in known else ()
        return PricedPart(row.predictor, features, row.times, each * row.times, row.notes)

    return [[priced(row) for row in asked] for asked in rows]


def _check_width(predictors: PredictorSet, name: str, questions: Sequence[tuple[float, ...]]) -> None:
    wrong = {len(question) for question in questions} - {predictors.forests[name].n_features}
    if wrong:
        raise ConfigurationError(
            f"{predictors.name}: predictor {name!r} takes {predictors.forests[name].n_features} features, nn-Meter's "
            f"kernels of that name have {sorted(wrong)}; it was trained for something else"
        )


def check_missing(missing: Mapping[str, float]) -> dict[str, float]:
    """ConfigurationError for what is not kernel -> milliseconds."""
    for name, ms in missing.items():
        if isinstance(ms, bool) or not isinstance(ms, int | float) or not 0 <= ms < math.inf:
            raise ConfigurationError(f"missing={{{name!r}: {ms!r}}}: a finite number of milliseconds >= 0 is needed")
    return {name: float(ms) for name, ms in missing.items()}


def _approximations(kernels: Sequence[PricedKernel]) -> tuple[str, ...]:
    where: dict[str, list[str]] = {}
    for kernel in kernels:
        for part in kernel.parts:
            for note in part.notes:
                paths = where.setdefault(note, [])
                if kernel.path not in paths:
                    paths.append(kernel.path)
    more = {note: f" and {len(paths) - 1} more" if len(paths) > 1 else "" for note, paths in where.items()}
    return tuple(f"{note} ({paths[0] or 'the network'}{more[note]})" for note, paths in where.items())
