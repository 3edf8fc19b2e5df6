"""Peak memory of the activations: the largest sum of what is alive while an operator runs.

It is a maximum over the run, so it does not add up over layers and its expectation is not that of a table. The hard
value is exact; the soft one is a surrogate that says, for each option, what the peak would be with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor, nn

from ..graph import Condition, Junction, Operator, Program, Run, trace_operators
from ..mutables import decisions
from ..mutables.samplers import first_argmax
from .model import CostModel

__all__ = ["Cost", "PeakMemory", "count_peak_memory"]


def count_peak_memory(model: nn.Module, args: Sequence[Any], *, dtype: torch.dtype = torch.float32) -> PeakMemory:
    """Peak bytes of the activations for ``args`` as it is, batch included, if floating ones are stored as ``dtype``.

    The run is followed operator by operator, in the order of eval mode. A tensor is alive from the operator that
    makes it to the last one that reads it, the inputs from the beginning, the outputs to the end. Views and what is
    computed in place take no memory of their own; weights, and buffers that an operator may use inside, do not count.
    Attention counts as its separate operators, and not as the fused one of eval mode, which hides what it holds.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))  # 4 -> 8 -> 8 -> 2 numbers
    >>> count_peak_memory(net, (torch.zeros(1, 4),)).of({})  # at the ReLU: (8 + 8) * 4 bytes
    64.0
    """
    sizes = {label: len(d.options) for label, d in decisions(model).items() if d.members[0].decided is None}
    return PeakMemory(trace_operators(model, args), sizes, dtype)


_MOST_KNOWN = 10_000  # architectures whose peak is kept


class _Moment(NamedTuple):
    """A step of a run, with the values that own the memory in use there."""

    bytes: float
    step: int
    alive: tuple[int, ...]


@final
class PeakMemory:
    """The peak memory of every architecture of a search model, in bytes.

    ``of(choices)``: exact. ``soft(probabilities)``: with the most probable architecture a,
        soft(p) = peak(a) + sum_l sum_o p_l(o) (peak(a with option o for label l) - peak(a)),
    over the options of a probability above 0. It is the exact peak where every decision is certain, and the gradient
    by p_l(o) is what the peak would change by with that option; it is a surrogate, and not an expectation.
    """

    def __init__(self, program: Program, sizes: Mapping[str, int], dtype: torch.dtype) -> None:
        self.name, self.unit = "peak_memory", "bytes"
        self.program, self.sizes, self.dtype = program, dict(sizes), dtype
        self._bytes = [
            math.prod(v.shape) * (dtype if v.dtype.is_floating_point else v.dtype).itemsize for v in program.values
        ]
        self._junctions = {step.output: step for step in program.steps if isinstance(step, Junction)}
        operators = [step for step in program.steps if isinstance(step, Operator)]
        self._maker = {value.number: operator for operator in operators for value in operator.outputs}
        self._position = {id(operator): i for i, operator in enumerate(operators)}
        self._arrays = _Arrays(program, self.sizes, self._bytes)
        self._known: dict[tuple[int, ...], float] = {}

    def of(self, choices: Mapping[str, int]) -> float:
        """The peak of the fixed model of ``choices``."""
        key = tuple(choices[label] for label in self.sizes)
        if key not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[key] = self._arrays.peak(choices)
        return self._known[key]

    def soft(self, probabilities: Mapping[str, Tensor]) -> Tensor:
        """The surrogate above, a differentiable scalar; ``probabilities[label]``: shape (n,)."""
        if not self.sizes:
            return torch.tensor(self.of({}))
        flat = torch.cat([probabilities[label] for label in self.sizes])
        # Which architectures are asked for depends on the probabilities: all of them are fetched from a GPU at once.
        numbers = iter(flat.detach().tolist())
        rows = {label: [next(numbers) for _ in range(n)] for label, n in self.sizes.items()}
        likeliest = {label: first_argmax(row) for label, row in rows.items()}
        here = self.of(likeliest)
        more = [
            self.of({**likeliest, label: option}) - here if p else 0.0
            for label, row in rows.items()
            for option, p in enumerate(row)
        ]
        return flat @ torch.tensor(more, dtype=flat.dtype).to(flat.device, non_blocking=True) + here

    def covers(self, limit: float, choices: Mapping[str, int]) -> list[dict[str, list[int]]]:
        """Why ``choices`` are above ``limit``: labels and options such that whoever takes them all is above it too.

        One for each step of the run that is above. A tensor is alive there because the operator that makes it and
        one that reads it run, and because the mutables in between hand it on; the labels of these are enough.
        """
        run = self.program.of(choices)
        readers = self._last_readers(run)
        found: list[dict[str, list[int]]] = []
        for moment in self._moments(run):
            if moment.bytes > limit:
                cover = self._cover(run, moment, limit, readers, choices)
                if cover not in found:
                    found.append(cover)
        return found

    def _moments(self, run: Run) -> Iterator[_Moment]:
        """The steps at which memory is taken, with all that is alive there."""
        begins: dict[int, list[int]] = {}
        ends: dict[int, list[int]] = {}
        for root, (first, last) in self._lives(run).items():
            begins.setdefault(first, []).append(root)
            ends.setdefault(last, []).append(root)
        alive: set[int] = set()
        for step in sorted({*begins, *ends}):
            alive.update(begins.get(step, ()))
            if step in begins:
                yield _Moment(float(sum(self._bytes[root] for root in alive)), step, tuple(sorted(alive)))
            alive.difference_update(ends.get(step, ()))

    def _lives(self, run: Run) -> dict[int, tuple[int, int]]:
        """First and last step of each value that owns memory."""
        lives = {v.number: (0, 0) for v in self.program.values if v.maker == "input" and v.alias_of is None}
        for step, operator in enumerate(run.operators):
            for value in (*operator.inputs, *operator.outputs):
                root = self._root(run, value.number)
                if self.program.values[root].maker != "constant":
                    lives[root] = (lives.get(root, (step, step))[0], step)
        for number in run.outputs:
            root = self._root(run, number)
            if root in lives:
                lives[root] = (lives[root][0], max(0, len(run.operators) - 1))
        return lives

    def _root(self, run: Run, number: int) -> int:
        """The value in whose memory a value lies."""
        while True:
            number = run.source(number)
            alias = self.program.values[number].alias_of
            if alias is None:
                return number
            number = alias

    # ---- why something is alive --------------------------------------------------------------------------------

    def _last_readers(self, run: Run) -> dict[int, tuple[int, int]]:
        """For each value that owns memory, the step that touches it last, and the value through which it does."""
        found: dict[int, tuple[int, int]] = {}
        for step, operator in enumerate(run.operators):
            for value in (*operator.inputs, *operator.outputs):
                found[self._root(run, value.number)] = (step, value.number)
        for number in self.program.outputs:
            found[self._root(run, number)] = (len(run.operators), number)
        return found

    def _cover(
        self,
        run: Run,
        moment: _Moment,
        limit: float,
        readers: Mapping[int, tuple[int, int]],
        choices: Mapping[str, int],
    ) -> dict[str, list[int]]:
        """Labels and options under which at least so much is alive at this moment that it is above the limit."""
        makers = {value.number: o for o in run.operators for value in o.outputs}
        # Why each of the largest values is there: the labels of its maker and reader, and of what hands it on.
        reasons: list[tuple[int, set[str]]] = []
        total = 0.0
        for root in sorted(moment.alive, key=lambda root: -self._bytes[root]):
            if total > limit:
                break
            total += self._bytes[root]
            labels = set(makers[root].when) if root in makers else set()
            if root in readers:
                step, number = readers[root]
                labels |= set(run.operators[step].when) if step < len(run.operators) else set()
                labels |= self._handed_on(run, number)
            reasons.append((root, labels))
        here = set(run.operators[moment.step].when) if run.operators else set()
        every = here.union(*(labels for _, labels in reasons))
        cover = {label: [choices[label]] for label in self.sizes if label in every}
        for root, labels in reasons:
            for label in labels - here:
                if not any(label in other for r, other in reasons if r != root):
                    cover[label] = self._alike(run, root, label, choices[label], readers, moment)
        return cover

    def _alike(
        self,
        run: Run,
        root: int,
        label: str,
        option: int,
        readers: Mapping[int, tuple[int, int]],
        moment: _Moment,
    ) -> list[int]:
        """The options of a label that hand on a value of their own, no smaller than ``root``, in its place.

        Only where the label is there for nothing else: its mutable made the value, and hands it on to a reader that
        does not depend on it.
        """
        mine = self._maker.get(root)
        if mine is None or root not in readers or set(mine.when.get(label, ())) != {option}:
            return [option]
        reader, number = readers[root]
        passed: list[Junction] = []
        while number != root:
            if number in run.sources:
                passed.append(self._junctions[number])
                number = run.sources[number]
            else:
                alias = self.program.values[number].alias_of
                assert alias is not None  # it lies in the memory of root
                number = alias
        at = [junction for junction in passed if junction.label == label]
        if len(at) != 1 or any(label in junction.when for junction in passed):
            return [option]
        if reader < len(run.operators) and label in run.operators[reader].when:
            return [option]
        now = self._position[id(run.operators[moment.step])]
        found = []
        for other, number in at[0].options.items():
            while (alias := self.program.values[number].alias_of) is not None:
                number = alias
            maker = self._maker.get(number)
            if other == option or (
                maker is not None
                and dict(maker.when) == {**mine.when, label: frozenset({other})}
                and self._bytes[number] >= self._bytes[root]
                and self._position[id(maker)] <= now
            ):
                found.append(other)
        return found

    def _handed_on(self, run: Run, number: int) -> set[str]:
        """The labels on whose decisions it depends in whose memory a value lies."""
        labels: set[str] = set()
        while True:
            while number in run.sources:
                junction = self._junctions[number]
                labels |= {junction.label, *junction.when}
                number = run.sources[number]
            alias = self.program.values[number].alias_of
            if alias is None:
                return labels
            number = alias


class _Arrays:
    """A program as arrays, for its peak under many choices: some hundred microseconds for a thousand operators."""

    def __init__(self, program: Program, sizes: Mapping[str, int], sizes_in_bytes: Sequence[int]) -> None:
        conditions: dict[tuple[tuple[str, tuple[int, ...]], ...], int] = {}

        def number_of(when: Condition) -> int:
            key = tuple((label, tuple(sorted(options))) for label, options in when.items())
            return conditions.setdefault(key, len(conditions))

        operators = [step for step in program.steps if isinstance(step, Operator)]
        self.holds_for = np.array([number_of(operator.when) for operator in operators], dtype=np.intp)
        # A view lies where its base does; what leaves a mutable is known once choices are.
        base = list(range(len(program.values)))
        for value in program.values:
            if value.alias_of is not None:
                base[value.number] = base[value.alias_of]
        self.junctions = [
            (step.output, number_of(step.when), step.label, {k: base[n] for k, n in step.options.items()})
            for step in program.steps
            if isinstance(step, Junction)
        ]
        touched = [
            (i, base[value.number])
            for i, operator in enumerate(operators)
            for value in (*operator.inputs, *operator.outputs)
        ]
        self.touching, self.touched = np.array(touched, dtype=np.intp).reshape(-1, 2).T
        self.outputs = np.array([base[number] for number in program.outputs], dtype=np.intp)
        self.inputs = np.array(
            [v.number for v in program.values if v.maker == "input" and v.alias_of is None], dtype=np.intp
        )
        self.bytes = np.array([0 if v.maker == "constant" else sizes_in_bytes[v.number] for v in program.values], float)
        self.allowed = {
            label: [np.array([option in dict(key).get(label, (option,)) for key in conditions]) for option in range(n)]
            for label, n in sizes.items()
        }
        self.n_conditions, self.n_operators = len(conditions), len(operators)

    def peak(self, choices: Mapping[str, int]) -> float:
        holds = np.ones(self.n_conditions, dtype=bool)
        for label, by_option in self.allowed.items():
            holds &= by_option[choices[label]]
        root = np.arange(len(self.bytes))
        for output, condition, label, options in self.junctions:
            if holds[condition]:
                root[output] = root[options[choices[label]]]
        running = holds[self.holds_for[self.touching]]
        steps, owners = self.touching[running], root[self.touched[running]]
        first = np.full(len(root), self.n_operators + 1)
        last = np.full(len(root), -1)
        np.minimum.at(first, owners, steps)
        np.maximum.at(last, owners, steps)
        first[self.inputs] = 0
        last[self.inputs] = np.maximum(last[self.inputs], 0)
        leaving = root[self.outputs]
        last[leaving] = np.where(last[leaving] >= 0, self.n_operators, -1)
        alive = np.flatnonzero(last >= 0)
        change = np.zeros(self.n_operators + 2)
        np.add.at(change, first[alive], self.bytes[alive])
        np.subtract.at(change, last[alive] + 1, self.bytes[alive])
        return float(change.cumsum().max())


Cost = CostModel | PeakMemory
"""What a search can be steered by: ``name``, ``unit``, ``sizes``, ``of(choices)`` and ``soft(probabilities)``."""
