"""ProxylessNAS's two ways to put expected costs into the loss, for one cost or several."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

from torch import Tensor

from ..errors import ConfigurationError
from ..losses import add_linear, mul_log

__all__ = ["DEFAULT_REFERENCE", "CostLoss"]

DEFAULT_REFERENCE = 65.0  # ms, of NNI's trainer
_REQUIRED = {"mul#log": ("alpha", "beta"), "add#linear": ("lambda",)}


@final
class CostLoss:
    """The task loss CE with expected costs E_j and their references ref_j.

    * ``'add#linear'``: CE + sum_j lambda_j (E_j - ref_j) / ref_j;
    * ``'mul#log'``: CE alpha prod_j (ln E_j / ln ref_j)^beta_j, needs E_j, ref_j > 1;
    * None: CE.

    ``params``: lambda, or alpha and beta; lambda and beta may be mappings by cost. ``references``: one number, or a
    mapping by cost; None if they come later, by ``refer_to``. ConfigurationError for anything else.

    >>> import torch
    >>> loss = CostLoss("add#linear", {"lambda": 0.1}, {"macs": 100.0, "params": 10.0}, {"macs": "MAC", "params": "1"})
    >>> loss(torch.tensor(2.0), {"macs": torch.tensor(150.0), "params": torch.tensor(5.0)})  # + 0.05 - 0.05
    tensor(2.)
    """

    def __init__(
        self,
        kind: str | None,
        params: Mapping[str, float | Mapping[str, float]] | None,
        references: float | Mapping[str, float] | None,
        units: Mapping[str, str],
    ) -> None:
        if kind is not None and kind not in _REQUIRED:
            raise ConfigurationError(f"grad_reg_loss_type={kind!r}: allowed are {[*_REQUIRED, None]}")
        if params is not None and not isinstance(params, Mapping):
            raise ConfigurationError(f"grad_reg_loss_params={params!r}: a mapping is needed, such as {{'lambda': 0.1}}")
        self.kind, self.params, self.units = kind, dict(params or {}), dict(units)
        self.references: dict[str, float] = {}
        if not units:
            return
        self._check_params()
        if references is not None:
            given = references if isinstance(references, Mapping) else self._one(references)
            self.refer_to(given)

    def refer_to(self, references: Mapping[str, float]) -> None:
        if set(references) != set(self.units):
            raise ConfigurationError(
                f"ref_latency={dict(references)}: the costs of this run are {list(self.units)}, one reference each"
            )
        for name, reference in references.items():
            _check_number(f"ref_latency of {name!r}", reference)
            # Without a regularizer, it is shown and judges nothing.
            low = {"mul#log": 1, "add#linear": 0}.get(self.kind or "")
            if low is not None and not reference > low:
                why = "above 1, because of its logarithm" if low else "above 0"
                raise ConfigurationError(
                    f"ref_latency={reference} {self.units[name]} of {name!r}: {self.kind!r} needs it {why}"
                )
        self.references = {name: float(references[name]) for name in self.units}

    def __call__(self, task: Tensor, expected: Mapping[str, Tensor]) -> Tensor:
        """The loss of a step; ``expected``: cost -> E_j, 0-dim."""
        if self.kind is None:
            return task
        total = task
        for i, (name, cost) in enumerate(expected.items()):
            reference = self.references[name]
            if self.kind == "add#linear":
                total = add_linear(total, cost, reference, weight=self._of("lambda", name))
            elif self.kind == "mul#log":
                scale = self._of("alpha", name) if i == 0 else 1.0
                total = mul_log(total, cost, reference, alpha=scale, beta=self._of("beta", name))
        return total

    @property
    def pulls(self) -> bool:
        """Whether a cost changes anything: not with weights that are all 0."""
        key = {"mul#log": "beta", "add#linear": "lambda"}.get(self.kind or "")
        return key is not None and any(self._of(key, name) for name in self.units)

    def _of(self, key: str, name: str) -> float:
        value = self.params[key]
        return float(value[name] if isinstance(value, Mapping) else value)

    def _one(self, reference: float) -> dict[str, float]:
        _check_number("ref_latency", reference)
        if len(self.units) > 1:
            raise ConfigurationError(
                f"ref_latency={reference}: this run has the costs {list(self.units)}; give a mapping with a reference "
                "each, or normalize=True"
            )
        ((name, unit),) = self.units.items()
        if self.kind is not None and unit != "ms" and reference == DEFAULT_REFERENCE:
            raise ConfigurationError(
                f"ref_latency={DEFAULT_REFERENCE} is the default in ms; the cost is {name!r}, so give the "
                f"reference in {unit}"
            )
        return {name: reference}

    def _check_params(self) -> None:
        if self.kind is None:
            return
        known = [key for keys in _REQUIRED.values() for key in keys]  # those of the other kind are left alone
        unknown = [key for key in self.params if key not in known]
        if unknown:
            raise ConfigurationError(f"grad_reg_loss_params={self.params}: {unknown} are not among {known}")
        missing = [key for key in _REQUIRED[self.kind] if key not in self.params]
        if missing:
            raise ConfigurationError(
                f"grad_reg_loss_params={self.params or None}: {self.kind!r} needs {list(_REQUIRED[self.kind])}, "
                f"missing {missing}"
            )
        for key, value in self.params.items():
            if isinstance(value, Mapping) and (key == "alpha" or set(value) != set(self.units)):
                raise ConfigurationError(
                    f"grad_reg_loss_params[{key!r}]={dict(value)}: a number is needed, or, for lambda and beta, one "
                    f"for each of {list(self.units)}"
                )
            for number in value.values() if isinstance(value, Mapping) else [value]:
                _check_number(f"grad_reg_loss_params[{key!r}]", number)


def _check_number(what: str, number: object) -> None:
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ConfigurationError(f"{what}={number!r}: a finite number is needed")
