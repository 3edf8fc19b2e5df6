"""What is done to weights right after each step of an optimizer: proximal steps, and zeros that stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, final
from weakref import ref

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..errors import ConfigurationError, InputTypeError
from .groups import Family, inside

__all__ = [
    "Followed",
    "Method",
    "ProximalStep",
    "check_families",
    "check_learning",
    "check_method",
    "check_order",
    "held",
    "was_skipped",
]

Method: TypeAlias = Literal["proximal", "subgradient"]


def was_skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer was told by a ``GradScaler`` to leave this step out: a gradient was infinite.

    For others the scaler does not call ``step``, and no hook runs.
    """
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(torch.as_tensor(found).any())


def held(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Names of the parameters that the optimizer holds."""
    every = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [name for name, parameter in parameters.items() if id(parameter) in every]


@final
class ProximalStep:
    """A proximal step as a hook of an optimizer: ``act(optimizer)`` after each of its steps that was not left out.

    ``families`` is asked for only where two proximal steps touch the same parameters.
    """

    def __init__(
        self,
        owner: str,
        parameters: Mapping[str, nn.Parameter],
        families: Callable[[], list[Family]],
        act: Callable[[Optimizer], None],
    ) -> None:
        self.owner = owner
        self.parameters = dict(parameters)
        self.families = families
        self.follower: Followed | None = None
        self._act = act

    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not was_skipped(optimizer):
            self._act(optimizer)


@final
class Followed:
    """The optimizers that a regularizer follows, each with its hook, and how much of it is due: the schedule's factor
    at its last call. A copy follows nobody."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self._handles: list[tuple[ref[Optimizer], RemovableHandle]] = []

    def __reduce__(self) -> tuple[type[Followed], tuple[float]]:
        return Followed, (self.factor,)

    def called(self, owner: str, model: Any, factor: float, method: Method) -> None:
        """A call in a step of training: its factor holds for the proximal steps that follow."""
        if not torch.is_grad_enabled():
            return
        self.factor = factor
        if method == "proximal" and getattr(model, "training", False) and not self._handles:
            raise ConfigurationError(
                f"{owner}(method='proximal') was never attached, and its value has no gradient: it would do nothing. "
                f"Call attach(model, optimizer) before training, or give method='subgradient' (no exact zeros); the "
                f"number alone is value(model)"
            )

    def add(self, optimizer: Optimizer, step: ProximalStep) -> None:
        """Run it after every step of the optimizer, behind those of other regularizers."""
        if not isinstance(optimizer, Optimizer):
            raise InputTypeError(
                f"{step.owner}.attach(model, {type(optimizer).__name__}): a torch.optim.Optimizer is needed"
            )
        steps = [hook for hook in optimizer._optimizer_step_post_hooks.values() if isinstance(hook, ProximalStep)]
        if any(before.follower is self for before in steps):
            raise ConfigurationError(
                f"{step.owner}: it follows this {type(optimizer).__name__} already, and would act twice; detach() first"
            )
        if any(group.get("maximize") for group in optimizer.param_groups):
            raise ConfigurationError(
                f"{step.owner}: {type(optimizer).__name__}(maximize=True); a penalty is minimised, so minimise the "
                f"negative of the objective"
            )
        if not held(optimizer, step.parameters):
            raise ConfigurationError(
                f"{step.owner}: the {type(optimizer).__name__} holds none of its parameters ({_few(step.parameters)}); "
                f"attach it to the one that does"
            )
        for before in steps:
            check_order(before, step)
        step.follower = self
        self._handles.append((ref(optimizer), optimizer.register_step_post_hook(step)))

    def clear(self, optimizer: Optimizer | None = None) -> None:
        """Follow this optimizer no more; None: none."""
        gone = [(of, handle) for of, handle in self._handles if optimizer is None or of() in (optimizer, None)]
        for entry in gone:
            entry[1].remove()
            self._handles.remove(entry)


def check_order(first: ProximalStep, second: ProximalStep) -> None:
    """ConfigurationError unless doing the second step after the first is the proximal step of the sum of both.

    It is if each group of the first lies in one of the second, or meets none (Jenatton, Mairal, Obozinski, Bach 2011,
    theorem 1; with different learning rates inside of a group of the first it is an approximation).
    """
    ids = {id(p) for p in first.parameters.values()} & {id(p) for p in second.parameters.values()}
    if not ids:
        return
    parameters = {str(id(p)): p for p in (*first.parameters.values(), *second.parameters.values())}
    for fine in first.families():
        for coarse in second.families():
            _check_pair(
                (first.owner, _by_id(fine, first.parameters)),
                (second.owner, _by_id(coarse, second.parameters)),
                parameters,
            )


def check_families(owner: str, families: list[Family], parameters: Mapping[str, nn.Parameter]) -> None:
    """The same for the families of one regularizer, done in their order."""
    for i, coarse in enumerate(families):
        for fine in families[:i]:
            _check_pair((owner, fine), (owner, coarse), parameters)


def check_learning(owner: str, parameters: Mapping[str, nn.Parameter]) -> None:
    """ConfigurationError if none of the parameters learns."""
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigurationError(f"{owner}: all of its parameters are frozen (requires_grad=False): {_few(parameters)}")


def check_method(owner: str, method: Method) -> Method:
    """The method; ConfigurationError for an unknown one."""
    if method not in ("proximal", "subgradient"):
        raise ConfigurationError(f"{owner}(method={method!r}): allowed are 'proximal' and 'subgradient'")
    return method


def _check_pair(first: tuple[str, Family], second: tuple[str, Family], parameters: Mapping[str, nn.Parameter]) -> None:
    (owner, fine), (next_owner, coarse) = first, second
    if inside(fine, coarse, parameters) is not False:
        return
    pair = f"the groups {fine.name!r} of {owner} and {coarse.name!r} of {next_owner}"
    if inside(coarse, fine, parameters):
        raise ConfigurationError(
            f"{pair}: the second are parts of the first, and finer groups must shrink before coarser ones; swap the two"
        )
    raise ConfigurationError(
        f"{pair} overlap without one lying in the other, so no sequence of their proximal steps is that of the sum; "
        f"give one of them method='subgradient'"
    )


def _by_id(family: Family, parameters: Mapping[str, nn.Parameter]) -> Family:
    """With parameters called by their identity: two regularizers may know a model under different names."""
    return Family(family.name, {str(id(parameters[name])): i for name, i in family.index.items()}, family.n)


def _few(names: Mapping[str, object]) -> str:
    return ", ".join([*list(names)[:3], *(["..."] if len(names) > 3 else [])])
