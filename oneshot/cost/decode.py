"""The best architecture under budgets, exactly: an integer linear program.

maximise sum_l log p_l(o_l)  subject to  C_j(o) <= budget_j for every budgeted cost j,

with one binary variable per label and option, and one auxiliary variable per product of nested decisions.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from numbers import Real
from typing import final

import numpy as np
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import coo_array

from ..errors import ConfigurationError, InfeasibleTargetError, UnsupportedModelError
from ..mutables.samplers import first_argmax
from .memory import Cost, PeakMemory
from .model import CostModel

__all__ = ["MOST_ENUMERATED", "best_under_budget", "best_use", "cost_range"]

_SOLVED, _NOTHING_FITS = 0, 2  # status of scipy's milp
_MOST_CUTS = 200
_MOST_ROUNDS = 2000  # of cuts, for a cost that is known by its cuts alone
MOST_ENUMERATED = 4096  # architectures up to which the largest peak memory is exact
_LEAST_LOG = -1e5  # below the best option of its decision: as good as impossible
_SCORE_SCALE = 1e3  # the solver stops within 1e-6 of the optimum, here 1e-9 of a log probability
_LARGEST = 1e4  # coefficient of a cost; the solver's tolerance is 1e-6
_LARGEST_WHOLE = 1e8  # of one that is made of whole numbers
_SLACK = 1e-2  # given to a budget: what lies on it must not fall to a rounding error


def best_under_budget(
    log_probabilities: Mapping[str, Sequence[float]],
    costs: Mapping[str, Cost],
    budget: Mapping[str, float],
    *,
    least: Mapping[str, float] | None = None,
    fixed: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """The most probable choices whose costs are at most their budgets, as label -> option.

    Without a budget it is the argmax of every decision. Never above a budget; the best one as long as what options
    cost differs less than a millionfold (the solver's tolerance). InfeasibleTargetError with the reachable minimum
    when no architecture fits; ConfigurationError for a budget, a cost or a probability that cannot be used.

    ``least``: cost -> at least so much of it, up to the solver's tolerance, if some architecture within the budget has
    it; else it is left out of account. ``fixed``: label -> option of the decisions that are made already.

    >>> from torch import nn
    >>> from oneshot import LayerChoice, count_params
    >>> net = nn.Sequential(LayerChoice([nn.Linear(2, 2), nn.Identity()], label="a"))
    >>> best_under_budget({"a": [-0.1, -2.3]}, {"params": count_params(net)}, {"params": 5})  # the Linear has 6
    {'a': 1}
    """
    _check(log_probabilities, costs, budget)
    fixed = fixed or {}
    used = [(cost, low) for name, low in (least or {}).items() if isinstance(cost := costs[name], CostModel)]
    argmax = {label: first_argmax(row) for label, row in log_probabilities.items()} | dict(fixed)
    keeps = all(costs[name].of(argmax) <= limit for name, limit in budget.items())
    if keeps and all(cost.of(argmax) >= low for cost, low in used):
        return argmax
    # Only differences within a decision count, and they leave the solver small numbers.
    score = {k: [-max(value - max(row), _LEAST_LOG) for value in row] for k, row in log_probabilities.items()}
    program = _Program({label: len(row) for label, row in log_probabilities.items()}, fixed)
    additive = {name: cost for name in budget if isinstance(cost := costs[name], CostModel)}
    for name, cost in additive.items():
        program.at_most(cost, budget[name])
    for cost, low in used:
        program.at_least(cost, low)
    # The solver accepts what is above a budget by its tolerance. The budget is a promise: such choices are cut off,
    # with all that cost as much. None is the proof that nothing fits: a tolerance lets in, it never keeps out.
    only_additive = len(additive) == len(budget)
    for _ in range(_MOST_CUTS if only_additive else _MOST_ROUNDS):
        choices = program.minimum(score)
        if choices is None:
            if used:
                return best_under_budget(log_probabilities, costs, budget, fixed=fixed)
            return _drawn_in(score, costs, budget, fixed)
        above = [name for name, limit in budget.items() if costs[name].of(choices) > limit]
        if not above:
            return choices
        program.cut_off(costs[above[0]], budget[above[0]], choices)
    if only_additive:
        return _drawn_in(score, costs, budget, fixed)
    raise UnsupportedModelError(
        f"budget {dict(budget)}: neither the best architecture nor a proof that there is none was found in "
        f"{_MOST_ROUNDS} rounds; this happens where very many are just above it. Change the budget a little"
    )


def best_use(
    costs: Mapping[str, Cost], budget: Mapping[str, float], fixed: Mapping[str, int] | None = None
) -> tuple[str, float] | None:
    """The cost that can come nearest to its budget while all are kept, and the most that it then is.

    ``fixed``: label -> option of the decisions that are made already. None if no cost is a ``CostModel`` with a budget
    above 0, or nothing fits.

    >>> from torch import nn
    >>> from oneshot import LayerChoice, count_params
    >>> net = nn.Sequential(LayerChoice([nn.Linear(2, 2), nn.Identity()], label="a"), nn.Linear(2, 1))
    >>> best_use({"params": count_params(net)}, {"params": 8})  # 3, or with the Linear 9
    ('params', 3.0)
    """
    found = []
    for name, limit in budget.items():
        cost = costs[name]
        if not isinstance(cost, CostModel) or not limit > 0:
            continue
        most = _most(cost, costs, budget, fixed or {})
        if most is not None:
            found.append((most / limit, name, most))
    if not found:
        return None
    _, name, most = max(found)
    return name, most


def _most(
    cost: CostModel, costs: Mapping[str, Cost], budget: Mapping[str, float], fixed: Mapping[str, int]
) -> float | None:
    """The largest value of one cost within all budgets."""
    sizes = {label: n for other in budget for label, n in costs[other].sizes.items()}
    program = _Program(sizes, {label: option for label, option in fixed.items() if label in sizes})
    for other, limit in budget.items():
        of_other = costs[other]
        if isinstance(of_other, CostModel):
            program.at_most(of_other, limit)
    objective = program.linear(cost, -1.0).coefficients
    for _ in range(_MOST_CUTS):
        choices = program.solve(objective)
        if choices is None:
            return None
        above = [other for other, limit in budget.items() if costs[other].of(choices) > limit]
        if not above:
            return cost.of(choices)
        program.cut_off(costs[above[0]], budget[above[0]], choices)
    return None


def cost_range(cost: Cost) -> tuple[float, float]:
    """The smallest and largest cost any architecture reaches.

    The largest peak memory is the largest one found by improving one decision after the other, if there are more
    than 4,096 architectures; all others are exact.

    >>> from torch import nn
    >>> from oneshot import LayerChoice, count_params
    >>> cost_range(count_params(nn.Sequential(LayerChoice([nn.Linear(2, 2), nn.Identity()]), nn.Linear(2, 1))))
    (3.0, 9.0)
    """
    if isinstance(cost, PeakMemory):
        return _smallest_peak(cost), _largest_peak(cost)
    return cost.of(_extreme(cost, 1.0)), cost.of(_extreme(cost, -1.0))


def _smallest_peak(cost: PeakMemory) -> float:
    program = _Program(cost.sizes)
    best, choices = math.inf, program.solve({})
    for _ in range(_MOST_ROUNDS):
        if choices is None:
            return best
        best = min(best, cost.of(choices))
        program.cut_off(cost, math.nextafter(best, -math.inf), choices)
        choices = program.solve({})
    raise UnsupportedModelError(
        f"{cost.name}: its smallest value was not found in {_MOST_ROUNDS} rounds, the best so far is {best} {cost.unit}"
    )


def _largest_peak(cost: PeakMemory) -> float:
    if math.prod(cost.sizes.values()) <= MOST_ENUMERATED:
        every = product(*(range(n) for n in cost.sizes.values()))
        return max(cost.of(dict(zip(cost.sizes, options, strict=True))) for options in every)
    choices, best = dict.fromkeys(cost.sizes, 0), -math.inf
    while cost.of(choices) > best:
        best = cost.of(choices)
        for label, n in cost.sizes.items():
            choices[label] = first_argmax([cost.of({**choices, label: option}) for option in range(n)])
    return best


def _check(
    log_probabilities: Mapping[str, Sequence[float]], costs: Mapping[str, Cost], budget: Mapping[str, float]
) -> None:
    sizes = {label: len(row) for label, row in log_probabilities.items()}
    for label, row in log_probabilities.items():
        if any(math.isnan(value) for value in row) or max(row) == -math.inf:
            raise ConfigurationError(f"log probabilities of {label!r} are {list(row)}: numbers are needed")
    for name, limit in budget.items():
        if name not in costs:
            raise ConfigurationError(f"budget for {name!r}: the costs of this run are {sorted(costs)}")
        if isinstance(limit, bool) or not isinstance(limit, Real) or not abs(limit) <= sys.float_info.max:
            raise ConfigurationError(f"budget {name}={limit!r}: a finite number is needed")
        other = {label: n for label, n in costs[name].sizes.items() if sizes.get(label) != n}
        if other:
            raise ConfigurationError(
                f"budget for {name!r}: its cost has decisions {other} (label: number of options), the model {sizes}. "
                "Count the cost of this model"
            )


def _extreme(cost: CostModel, sign: float) -> dict[str, int]:
    """The choices of the smallest sign * cost. Decisions that are in no product are independent of all others."""
    joined = {label for term in cost.products for label in term.when}
    choices = {label: first_argmax([-sign * value for value in row]) for label, row in cost.table.items()}
    program = _Program({label: cost.sizes[label] for label in cost.sizes if label in joined})
    found = program.solve(program.linear(cost, sign).coefficients)
    assert found is not None  # nothing is forbidden
    return choices | found


def _drawn_in(
    score: Mapping[str, Sequence[float]],
    costs: Mapping[str, Cost],
    budget: Mapping[str, float],
    fixed: Mapping[str, int],
) -> dict[str, int]:
    """For crowds within the tolerance: the best by a slightly smaller budget, or the cheapest by one of the costs."""
    program = _Program({label: len(row) for label, row in score.items()}, fixed)
    additive = {name: cost for name in budget if isinstance(cost := costs[name], CostModel)}
    for name, cost in additive.items():
        program.at_most(cost, budget[name], margin=1e-5)
    cheapest = (dict.fromkeys(score, 0) | _extreme(cost, 1.0) | dict(fixed) for cost in additive.values())
    for choices in (program.minimum(score), *cheapest):
        if choices is not None and all(costs[name].of(choices) <= limit for name, limit in budget.items()):
            return choices
    raise InfeasibleTargetError(_infeasible(costs, budget, fixed))


def _infeasible(costs: Mapping[str, Cost], budget: Mapping[str, float], fixed: Mapping[str, int]) -> str:
    given = f" with the options {dict(fixed)}, which do not learn" if fixed else ""
    lines = [f"no architecture meets {dict(budget)}{given}:"]
    for name, limit in budget.items():
        low, high = cost_range(costs[name])
        lines.append(f"  {name}: budget {limit:.15g}, reachable {low:.15g} to {high:.15g} {costs[name].unit}")
    if len(budget) > 1:
        lines.append("  (each range by itself; the budgets must be met together)")
    return "\n".join([*lines, "raise the budget, or give the space smaller candidates"])


class _Linear:
    """A cost in the variables of a program: ``sum coefficients * variables * unit + constant``.

    The unit brings the coefficients to a size at which the solver's absolute tolerance is small; to whole numbers
    (``whole``), if they are multiples of one.
    """

    def __init__(self, coefficients: Mapping[int, float], constant: float) -> None:
        values = [value for value in coefficients.values() if value] or [1.0]
        largest, self.whole = max(map(abs, values)), all(value.is_integer() for value in values)
        if self.whole:
            divisor = math.gcd(*(int(value) for value in values))
            self.whole = constant.is_integer() and largest / divisor <= _LARGEST_WHOLE
        self.unit = float(divisor) if self.whole else largest / _LARGEST
        self.coefficients = {i: value / self.unit for i, value in coefficients.items() if value}
        self.constant = constant


@final
class _Program:
    """Variables: x[label, option] in {0, 1}, then one continuous z in [0, 1] per product of decisions."""

    def __init__(self, sizes: Mapping[str, int], fixed: Mapping[str, int] | None = None) -> None:
        self.first: dict[str, int] = {}
        self.n = 0
        for label, size in sizes.items():
            self.first[label] = self.n
            self.n += size
        self.sizes = dict(sizes)
        self.n_binary = self.n
        self.rows: list[tuple[dict[int, float], float, float]] = [
            ({start + o: 1.0 for o in range(sizes[label])}, 1.0, 1.0) for label, start in self.first.items()
        ]
        self.rows += [({self.first[label] + option: 1.0}, 1.0, 1.0) for label, option in (fixed or {}).items()]

    def linear(self, cost: CostModel, sign: float = 1.0) -> _Linear:
        """sign * cost of the labels of this program; adds the variables of its products."""
        coefficients: dict[int, float] = {}
        constant = sign * cost.fixed
        for label, row in cost.table.items():
            if label in self.first:
                # What every option costs says nothing, and would hide the differences in the tolerance.
                least = min(sign * value for value in row)
                constant += least
                for option, value in enumerate(row):
                    coefficients[self.first[label] + option] = sign * value - least
        for term in cost.products:
            z, self.n = self.n, self.n + 1
            coefficients[z] = sign * term.value
            below: dict[int, float] = {z: 1.0}
            for label, options in term.when.items():
                indicator = {self.first[label] + o: -1.0 for o in options}
                below.update(indicator)
                self.rows.append(({z: 1.0, **indicator}, -np.inf, 0.0))
            self.rows.append((below, 1.0 - len(term.when), np.inf))
        return _Linear(coefficients, constant)

    def at_least(self, cost: CostModel, low: float) -> None:
        self.at_most(cost, -low, sign=-1.0)

    def at_most(self, cost: CostModel, limit: float, margin: float = 0.0, sign: float = 1.0) -> None:
        """sign * cost <= limit."""
        linear = self.linear(cost, sign)
        room = (limit - linear.constant) / linear.unit
        # Between two whole numbers there is nothing: a budget in the middle is the same one, far from both.
        room = math.floor(room) + 0.5 if linear.whole else room + _SLACK
        largest = max(map(abs, linear.coefficients.values()), default=1.0)
        self.rows.append((linear.coefficients, -np.inf, room - margin * max(largest, abs(room))))

    def cut_off(self, cost: Cost, limit: float, choices: Mapping[str, int]) -> None:
        """Forbid choices that are above a limit, and all that cost at least as much for the same reason."""
        covers = [_cover(cost, limit, choices)] if isinstance(cost, CostModel) else cost.covers(limit, choices)
        for cover in covers:
            row = {self.first[label] + o: 1.0 for label, options in cover.items() for o in options}
            self.rows.append((row, -np.inf, len(cover) - 1.0))

    def minimum(self, score: Mapping[str, Sequence[float]]) -> dict[str, int] | None:
        return self.solve(
            {self.first[k] + o: _SCORE_SCALE * value for k, row in score.items() for o, value in enumerate(row)}
        )

    def solve(self, objective: Mapping[int, float]) -> dict[str, int] | None:
        """The choices that minimise the objective, None when there are none."""
        if self.n == 0:
            return {} if all(low <= 0 <= up for _, low, up in self.rows) else None
        c = np.zeros(self.n)
        for variable, value in objective.items():
            c[variable] = value
        entries = [(r, i, v) for r, (row, _, _) in enumerate(self.rows) for i, v in row.items()]
        at, variables, values = (np.array(part) for part in zip(*entries, strict=True))
        matrix = coo_array((values, (at, variables)), shape=(len(self.rows), self.n)).tocsr()
        lower, upper = np.array([low for _, low, _ in self.rows]), np.array([up for _, _, up in self.rows])
        # Rarely the presolve of HiGHS ends in an error of its own, on a program that has a solution without it.
        for presolve in (True, False):
            result = milp(
                c,
                integrality=np.arange(self.n) < self.n_binary,
                bounds=(0, 1),
                constraints=LinearConstraint(matrix, lower, upper),
                options={"mip_rel_gap": 0.0, "presolve": presolve},
            )
            if result.status in (_SOLVED, _NOTHING_FITS):
                break
        else:
            raise UnsupportedModelError(
                f"the integer program of {self.n} variables and {len(self.rows)} rows was not solved: {result.message}"
            )
        if result.status == _NOTHING_FITS:
            return None
        return {
            label: first_argmax(result.x[start : start + self.sizes[label]].tolist())
            for label, start in self.first.items()
        }


def _cover(cost: CostModel, limit: float, choices: Mapping[str, int]) -> dict[str, list[int]]:
    """Labels and options such that whoever takes one of these options of every label is above the limit.

    They are those of ``choices`` and what costs no less; labels that are not needed for the excess are left out, so
    that there are none when nothing can meet the limit. Only ``choices`` themselves if their excess is of the size of
    a rounding error.
    """
    every = (cost.fixed, limit, *(v for row in cost.table.values() for v in row), *(t.value for t in cost.products))
    above = limit + 1e-12 * max(map(abs, every))
    taken: dict[str, int | None] = {label: choices[label] for label in cost.sizes}
    if not _at_least(cost, taken) > above:
        return {label: [option] for label, option in choices.items()}
    for label in cost.sizes:
        if _at_least(cost, {**taken, label: None}) > above:
            taken[label] = None
    return {
        label: [other for other in range(cost.sizes[label]) if _no_less(cost, label, other, option)]
        for label, option in taken.items()
        if option is not None
    }


def _at_least(cost: CostModel, taken: Mapping[str, int | None]) -> float:
    """A lower bound of the cost when the options of some labels are taken, and others (None) are open."""
    total = cost.fixed
    for label, row in cost.table.items():
        option = taken[label]
        total += min(row) if option is None else row[option]
    for term in cost.products:
        holds = all(taken[label] in options for label, options in term.when.items())
        may_hold = all(taken[label] is None or taken[label] in options for label, options in term.when.items())
        total += term.value * (holds if term.value > 0 else may_hold)
    return total


def _no_less(cost: CostModel, label: str, one: int, other: int) -> bool:
    """Whether option ``one`` of a label costs no less than ``other``, whatever the other labels are."""
    if cost.table[label][one] < cost.table[label][other]:
        return False
    parts = [(term.value, term.when[label]) for term in cost.products if label in term.when]
    return all(
        (other not in options or one in options) if v > 0 else (one not in options or other in options)
        for v, options in parts
    )
