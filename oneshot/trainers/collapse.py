"""Whether a search by mixtures is collapsing into skips, and when to stop it: numbers of an epoch, and rules on them.

Two signs, both of the alphas: how many decisions the skips win, and how sharp the validation loss is, as the largest
eigenvalue of its Hessian by all alphas. That of a mixture is never below 0: one number added to all logits of a
decision changes nothing. Sources: R-DARTS, arXiv 1909.09656 (its DARTS-ES); DARTS+, arXiv 1909.06035.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..mutables import Decision, LayerChoice
from ..mutables.samplers import first_argmax
from .selection import Record
from .unrolled import differentiable_gradients_of, second_gradients_of

__all__ = [
    "CollapseMonitor",
    "EarlyStop",
    "Stopped",
    "cell_of",
    "epoch_before_collapse",
    "hessian",
    "largest_eigenvalue",
    "skip_options",
    "skip_share",
    "skips_per_cell",
]

_MOST_PRODUCTS = 64


def cell_of(label: str) -> str:
    """The cell that a label belongs to: what is before its first ``/``, or, in the path of a module, its last dot.

    >>> cell_of("normal/node2/op0"), cell_of("cells.0.edge3"), cell_of("edge3")
    ('normal', 'cells.0', '')
    """
    return label[: label.find("/")] if "/" in label else label[: max(label.rfind("."), 0)]


@final
@dataclass(frozen=True)
class EarlyStop:
    """When a search ends before its planned epochs; settings only, each rule on its own.

    * ``ratio``: the largest eigenvalue, as the mean of ``window`` epochs, has grown so much that the value of
      ``window`` epochs ago is below ``ratio`` of that of now. The search goes back to the alphas of that epoch (the
      weights stay). None: the eigenvalue is not even computed, which takes up to 64 backward passes on one batch in
      each epoch.
    * ``most_skips``: so many decisions of one cell, or more, choose a skip, wherever they are in it. The alphas stay.
      None: no such rule.
    * ``skip``: names of the candidates that count as skips; None: every candidate without parameters, ``nn.Identity``
      or pooling, say. A decision counts if it offers a skip and something else. ``cell``: from a label to its cell.

    >>> EarlyStop().epoch_to_keep([1.0] * 5 + [1.2, 1.3, 1.4, 1.5, 1.6])  # the means are 1 and 1.4, and 1 / 1.4 < 0.75
    4
    """

    ratio: float | None = 0.75
    window: int = 5
    most_skips: int | None = None
    skip: Sequence[str] | None = None
    cell: Callable[[str], str] = field(default=cell_of, repr=False)

    def __post_init__(self) -> None:
        if self.ratio is not None and not (isinstance(self.ratio, int | float) and 0 < self.ratio <= 1):
            raise ConfigurationError(f"EarlyStop(ratio={self.ratio!r}): a number above 0, at most 1, or None is needed")
        for name, value in (("window", self.window), ("most_skips", self.most_skips)):
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole and (name, value) != ("most_skips", None):
                raise ConfigurationError(f"EarlyStop({name}={value!r}): an integer of at least 1 is needed")
        if self.skip is not None and (isinstance(self.skip, str) or not all(isinstance(n, str) for n in self.skip)):
            raise ConfigurationError(
                f"EarlyStop(skip={self.skip!r}): a list of names of candidates, or None, is needed"
            )

    def epoch_to_keep(self, eigenvalues: Sequence[float]) -> int | None:
        """The epoch to go back to, among those so far, if the eigenvalues say that this one is to be the last."""
        return None if self.ratio is None else epoch_before_collapse(eigenvalues, self.window, self.ratio)


class Stopped(NamedTuple):
    """After which search epoch a search was stopped, of which one the alphas are, counted from 0, and why."""

    epoch: int
    kept: int
    reason: str


@final
class CollapseMonitor:
    """Measures the epochs of a search and says when it is over; remembers the alphas of the last epochs.

    A trainer calls ``measure`` with the last step of an epoch, notes what it returns, and calls ``judge`` when the
    epoch is in the history. ConfigurationError for skips that the model does not offer.
    """

    def __init__(self, early_stop: EarlyStop, decisions: Mapping[str, Decision]) -> None:
        self.early_stop, self.decisions = early_stop, decisions
        self.skips = skip_options(decisions, early_stop.skip)
        if not self.skips and (early_stop.skip is not None or early_stop.most_skips is not None):
            names = sorted({str(option) for d in decisions.values() for option in d.options})
            raise ConfigurationError(
                f"EarlyStop(skip={early_stop.skip}, most_skips={early_stop.most_skips}): no decision offers a skip and "
                f"something else; the candidates are {names}. Name the skips among them"
            )
        self._past: list[dict[str, Tensor]] = []

    def measure(self, loss: Callable[[], Tensor]) -> dict[str, float]:
        """``skip_share`` and ``eigenvalue`` of now; ``loss``: on held-out data, with a graph to the alphas."""
        found = {"skip_share": skip_share(_argmax(self.decisions), self.skips)} if self.skips else {}
        if self.early_stop.ratio is not None:
            learning = [d.alpha for d in self.decisions.values() if d.alpha.requires_grad]
            found["eigenvalue"] = largest_eigenvalue(loss(), learning)
        return found

    def judge(self, records: Sequence[Record]) -> Stopped | None:
        """Called once at the end of each search epoch with the records of all of them; the alphas may be put back."""
        self._past.append({label: d.alpha.detach().cpu().clone() for label, d in self.decisions.items()})
        del self._past[: -self.early_stop.window - 1]
        now = len(records) - 1
        cells = skips_per_cell(_argmax(self.decisions), self.skips, self.early_stop.cell)
        most = self.early_stop.most_skips
        if most is not None and max(cells.values(), default=0) >= most:
            return Stopped(now, now, f"skips per cell: {dict(cells)}, most_skips={most}")
        if self.early_stop.ratio is None:
            return None
        kept = self.early_stop.epoch_to_keep([record["eigenvalue"] for record in records])
        if kept is None:
            return None
        with torch.no_grad():
            for label, alpha in self._past[kept - now - 1].items():
                self.decisions[label].alpha.copy_(alpha)
        return Stopped(now, kept, f"the eigenvalue grew: ratio under {self.early_stop.ratio} over {now - kept} epochs")

    def state(self) -> list[dict[str, Tensor]]:
        """What a checkpoint holds of it."""
        return list(self._past)

    def load_state(self, state: Sequence[Mapping[str, Tensor]]) -> None:
        self._past = [dict(alphas) for alphas in state]

    def settings(self) -> dict[str, Any]:
        """What must be the same when a run is taken up again."""
        rule = self.early_stop
        names = None if rule.skip is None else list(rule.skip)
        return {"ratio": rule.ratio, "window": rule.window, "most_skips": rule.most_skips, "skip": names}


def skip_options(decisions: Mapping[str, Decision], names: Sequence[str] | None) -> dict[str, frozenset[int]]:
    """Label -> the options that are skips, for each LayerChoice that offers a skip and something else.

    ``names``: of the candidates; None: those without parameters.

    >>> from oneshot import decisions
    >>> net = nn.Sequential(LayerChoice({"conv": nn.Conv1d(2, 2, 1), "skip": nn.Identity()}, label="a"))
    >>> skip_options(decisions(net), None)
    {'a': frozenset({1})}
    """
    found = {}
    for label, decision in decisions.items():
        choice = decision.members[0]
        if isinstance(choice, LayerChoice) and choice.decided is None:
            pairs = enumerate(zip(choice.options, choice, strict=True))
            skips = frozenset(i for i, (name, candidate) in pairs if _is_skip(str(name), candidate, names))
            if skips and len(skips) < len(choice.options):
                found[label] = skips
    return found


def _is_skip(name: str, candidate: nn.Module, names: Sequence[str] | None) -> bool:
    return next(candidate.parameters(), None) is None if names is None else name in names


def skip_share(chosen: Mapping[str, int], skips: Mapping[str, frozenset[int]]) -> float:
    """The share of the decisions of ``skips`` that are decided for a skip.

    >>> skip_share({"a": 1, "b": 0, "c": 2}, {"a": frozenset({1}), "b": frozenset({1})})
    0.5
    """
    return sum(chosen[label] in options for label, options in skips.items()) / len(skips)


def skips_per_cell(
    chosen: Mapping[str, int], skips: Mapping[str, frozenset[int]], cell: Callable[[str], str] = cell_of
) -> dict[str, int]:
    """Cell -> how many of its decisions are decided for a skip, for cells with any.

    >>> skips_per_cell({"x/a": 1, "x/b": 1, "y/a": 0}, dict.fromkeys(["x/a", "x/b", "y/a"], frozenset({1})))
    {'x': 2}
    """
    return dict(Counter(cell(label) for label, options in skips.items() if chosen[label] in options))


def epoch_before_collapse(eigenvalues: Sequence[float], window: int = 5, ratio: float = 0.75) -> int | None:
    """The epoch to go back to, i - window, if mean(i - window) < ratio mean(i) at the last epoch i; else None.

    ``mean(i)``: of the ``window`` values up to epoch i, so that nothing is said before epoch 2 window - 1.

    >>> epoch_before_collapse([1.0, 1.0, 1.0, 2.0], window=2)  # 1 < 0.75 * 1.5
    1
    """
    last = len(eigenvalues) - 1
    if last < 2 * window - 1:
        return None
    before, now = math.fsum(eigenvalues[-2 * window : -window]), math.fsum(eigenvalues[-window:])
    return last - window if before < ratio * now else None


def hessian(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Shape (n, n) for n numbers in all parameters together: d2 loss, by differentiating twice.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hessian(x[0] ** 2 * x[1], [x])
    tensor([[4., 2.],
            [2., 0.]], dtype=torch.float64)
    """
    product = _hessian_product(loss, parameters)
    n = sum(p.numel() for p in parameters)
    return torch.stack([product(row) for row in torch.eye(n, dtype=torch.float64)])


def largest_eigenvalue(loss: Tensor, parameters: Sequence[Tensor], *, products: int = _MOST_PRODUCTS) -> float:
    """The largest eigenvalue of the Hessian of ``loss`` by ``parameters``.

    Exact for up to ``products`` numbers; for more of them by so many steps of Lanczos' method, from below, in which an
    eigenvalue apart from the others is found within some 20.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> round(largest_eigenvalue(2 * x[0] ** 2 + x[0] * x[1], [x]), 4)  # [[4, 1], [1, 0]]: 2 + sqrt(5)
    4.2361
    """
    n = sum(p.numel() for p in parameters)
    if n <= products:
        dense = hessian(loss, parameters)
        return float(torch.linalg.eigvalsh((dense + dense.T) / 2)[-1])
    product = _hessian_product(loss, parameters)
    start = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return float(torch.linalg.eigvalsh(_lanczos(product, start / start.norm(), products))[-1])


def _hessian_product(loss: Tensor, parameters: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """From a vector of shape (n,) to the Hessian times it, in float64 on the CPU."""
    first = differentiable_gradients_of(loss, parameters)
    flat = torch.cat([(p * 0 if g is None else g).flatten() for g, p in zip(first, parameters, strict=True)])

    def product(vector: Tensor) -> Tensor:
        rows = second_gradients_of(flat @ vector.to(flat), parameters, keep=True)
        full = [torch.zeros_like(p) if row is None else row for row, p in zip(rows, parameters, strict=True)]
        return torch.cat([row.flatten() for row in full]).double().cpu()

    return product


def _lanczos(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:
    """The matrix, tridiagonal, that a symmetric operator is in the space of ``start`` and its ``steps`` - 1 images."""
    basis, diagonal, beside = [start], [], []
    for _ in range(steps):
        image = product(basis[-1])
        diagonal.append(image @ basis[-1])
        for vector in (*basis, *basis):  # twice: once is not enough for a basis that is orthogonal to rounding
            image = image - (image @ vector) * vector
        length = image.norm()
        if len(diagonal) == steps or length <= 1e-6 * torch.stack(diagonal).abs().max():
            break
        beside.append(length)
        basis.append(image / length)
    off = torch.stack(beside) if beside else torch.zeros(0, dtype=torch.float64)
    return torch.diag(torch.stack(diagonal)) + torch.diag(off, 1) + torch.diag(off, -1)


def _argmax(decisions: Mapping[str, Decision]) -> dict[str, int]:
    return {label: first_argmax(d.alpha.tolist()) for label, d in decisions.items()}
