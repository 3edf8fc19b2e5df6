"""What every mutable shares: a label, alpha, a sampler and its draw; and the decisions of a whole model.

A *decision* is what one label stands for. Mutables with the same label share one decision and one alpha;
a mutable without a label is labelled by its path in the model, so labels need no global counter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArchMismatchError, LabelError
from .samplers import Gate, Sampler, Softmax

__all__ = [
    "AlphaModule",
    "Decision",
    "Entering",
    "FixedContext",
    "Mutable",
    "SearchModel",
    "after_step",
    "arch_parameters",
    "current_fixed_arch",
    "decisions",
    "draw",
    "set_sampler",
    "unlabelled",
    "weight_parameters",
]


Entering = Callable[[nn.Module], AbstractContextManager[None]]


def _nothing(module: nn.Module) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass
class FixedContext:
    """An arch under which mutables are being constructed, and what they offer.

    ``built``: label -> signature of what was constructed so far. ``unlabelled``: whether some of it has no label.
    """

    arch: Mapping[str, Any]
    space: str | None
    source: str
    built: dict[str, tuple[Hashable, ...]] = field(default_factory=dict)
    unlabelled: bool = False


current_fixed_arch: ContextVar[FixedContext | None] = ContextVar("current_fixed_arch", default=None)


class AlphaModule(nn.Module):
    """A module with architecture parameters of its own, ``alpha``, kept in at least fp32."""

    alpha: nn.Parameter | None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AlphaModule:
        # model.half() and model.bfloat16() would round alpha away: it keeps its precision, and follows devices.
        if recurse:
            for child in self.children():
                child._apply(fn)
        super()._apply(partial(keeping_precision, fn), recurse=False)
        return self


class SearchModel(nn.Module, ABC):
    """A network that is searched as a whole, and rebuilt as a whole; masks of a ``PIT`` network, say.

    Its architectures are mappings of labels to decisions, JSON-ready.
    """

    @abstractmethod
    def arch(self) -> dict[str, Any]:
        """The architecture that it stands for now."""

    @abstractmethod
    def offered(self) -> dict[str, tuple[Hashable, ...]]:
        """Label -> what can be decided there, JSON-ready."""

    @abstractmethod
    def check_arch(self, arch: Mapping[str, Any]) -> None:
        """ArchMismatchError for a decision that its label does not offer; labels have been checked."""

    @abstractmethod
    def rebuilt(self, arch: Mapping[str, Any], examples: Sequence[Sequence[Any]] | None) -> nn.Module:
        """The plain network of an architecture; compared on ``examples`` if these are given, ExportError."""


class Mutable(AlphaModule, ABC):
    """A module that holds an undecided choice between ``options``.

    ``alpha``: shape (n,), one logit per option, zero (so uniform) at the start and kept in at least fp32.
    ``sampler`` and ``drawn`` are transient: set by a trainer or by ``set_sampler`` and ``draw``, never saved
    in the ``state_dict``. So is ``entering``: what a network around it wants done around every call of one of its
    options, given its module; also of a call in the backward pass. A mutable that was built under ``fixed_arch`` is
    ``decided``: it has no alpha and holds its chosen option only. ``left_out``: path below it -> signature of the
    mutables without a label that it dropped with the other options.
    """

    def __init__(self, options: Sequence[Hashable], label: str | None) -> None:
        super().__init__()
        if label is not None and (not isinstance(label, str) or not label):
            raise LabelError(f"{type(self).__name__}(label={label!r}): a label is a non-empty string or None")
        self.label = label
        self.options: tuple[Any, ...] = tuple(options)
        self.sampler: Sampler = Softmax()
        self.drawn: Any = None
        self.alpha_at_draw: Tensor | None = None
        self.entering: Entering = _nothing
        self.context = current_fixed_arch.get()
        self.decided: int | None = None
        self.left_out: dict[str, tuple[Hashable, ...]] = {}
        precision = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.alpha = nn.Parameter(torch.zeros(len(self.options), dtype=precision))

    def _decide(self) -> None:
        """Follow the ``fixed_arch`` around; called by a subclass as soon as it knows what it offers."""
        context = self.context
        if context is None:
            return
        if self.label is None:
            context.unlabelled = True
            return
        if self.label not in context.arch:
            raise ArchMismatchError(
                f"{context.source}: no decision for label {self.label!r}; it has {list(context.arch)}. "
                "Build the model with the arguments it was searched with"
            )
        self.decided = self.index_of(context.arch[self.label], f"{context.source}: {self.label}")
        self.alpha = None
        context.built[self.label] = self.signature()

    @abstractmethod
    def index_of(self, decision: Any, where: str) -> int:
        """The option that a decision of an arch names; ArchMismatchError when there is none. ``where`` it stands."""

    @abstractmethod
    def describe(self) -> str:
        """The mutable as errors name it."""

    @abstractmethod
    def signature(self) -> tuple[Hashable, ...]:
        """What is offered under which name, JSON-ready; the same for all mutables of one label."""

    def gate(self) -> Gate:
        """The gate of this forward."""
        return self.sampler.gate(self.alpha, self.drawn)  # type: ignore[arg-type]


_LEAD = 1e-3  # of an alpha: more than it is rounded by


def keeping_precision(fn: Callable[[Tensor], Tensor], alpha: Tensor) -> Tensor:
    """What ``nn.Module._apply`` does, but for casts to half precision: these only move to the device."""
    result = fn(alpha)
    return alpha.to(result.device) if result.dtype in (torch.float16, torch.bfloat16) else result


def unlabelled(module: nn.Module, prefix: str) -> dict[str, tuple[Hashable, ...]]:
    """Path -> signature of the mutables without a label in ``module``, also of those left out of it."""
    found: dict[str, tuple[Hashable, ...]] = {}
    for path, mutable in module.named_modules(prefix=prefix):
        if isinstance(mutable, Mutable):
            if mutable.label is None:
                found[path] = mutable.signature()
            found.update({f"{path}.{below}": signature for below, signature in mutable.left_out.items()})
    return found


@dataclass(frozen=True)
class Decision:
    """One label of a model and the mutables that follow it."""

    label: str
    members: tuple[Mutable, ...]

    @property
    def alpha(self) -> nn.Parameter:
        """Shape (n,): the logits all members share."""
        alpha = self.members[0].alpha
        if alpha is None:
            raise LabelError(f"{self.label}: already decided under fixed_arch, it has no alpha")
        return alpha

    @property
    def options(self) -> tuple[Any, ...]:
        return self.members[0].options

    @property
    def sampler(self) -> Sampler:
        return self.members[0].sampler

    @property
    def drawn(self) -> Any:
        return self.members[0].drawn

    def probabilities(self) -> Tensor:
        """Shape (n,), differentiable: the distribution of this step under the current sampler and draw."""
        return self.sampler.probabilities(self.alpha, self.drawn)

    def index_of(self, decision: Any) -> int:
        return self.members[0].index_of(decision, self.label)

    def set_sampler(self, sampler: Sampler) -> None:
        for member in self.members:
            member.sampler, member.drawn, member.alpha_at_draw = sampler, None, None


def decisions(model: nn.Module) -> dict[str, Decision]:
    """The decisions of a model by label, in the order of ``named_modules``; ties the alphas of equal labels.

    >>> from oneshot import LayerChoice
    >>> choice = lambda: LayerChoice([nn.Identity(), nn.ReLU()], label="act")
    >>> net = nn.Sequential(choice(), choice())
    >>> list(decisions(net)), net[0].alpha is net[1].alpha
    (['act'], True)
    """
    groups: dict[str, list[Mutable]] = {}
    for path, module in model.named_modules():
        if isinstance(module, Mutable):
            groups.setdefault(module.label or path or "root", []).append(module)
    return {label: _tied(label, members) for label, members in groups.items()}


def _tied(label: str, members: list[Mutable]) -> Decision:
    first = members[0]
    for other in members[1:]:
        if first.label is None or other.label is None:
            raise LabelError(
                f"label {label!r} is given to one mutable and is the path of another one, which has no label: "
                "rename the label"
            )
        if other.signature() != first.signature():
            raise LabelError(
                f"label {label!r} is used twice with different candidates:\n"
                f"  {first.describe()}: {first.signature()}\n  {other.describe()}: {other.signature()}\n"
                "mutables share a label only if they offer the same candidates in the same order; give one of them "
                "another label"
            )
        if other.decided != first.decided:
            raise LabelError(
                f"label {label!r}: one mutable is {_state(first)}, another one is {_state(other)}; build the whole "
                "model under one fixed_arch"
            )
        if other.alpha is not first.alpha:
            other.alpha = first.alpha
    return Decision(label, tuple(members))


def _state(mutable: Mutable) -> str:
    if mutable.decided is None:
        return "undecided"
    return f"decided for {mutable.options[mutable.decided]!r} under fixed_arch"


Searchable = nn.Module | Mapping[str, Decision]


def _of(model: Searchable) -> Mapping[str, Decision]:
    return decisions(model) if isinstance(model, nn.Module) else model


def set_sampler(model: Searchable, sampler: Sampler) -> None:
    """Give every decision of ``model`` (a module, or what ``decisions`` returned) this sampler; no draw yet."""
    for decision in _of(model).values():
        decision.set_sampler(sampler)


@torch.no_grad()
def draw(model: Searchable, generator: torch.Generator | None = None) -> None:
    """Draw once per decision for the coming step. ``generator``: on the CPU, whatever the model's device.

    The draws are made in the order of the labels' first appearance, from one transfer to the CPU of all alphas that
    they depend on: where there is a GPU, the only time that a step waits for it.
    """
    undecided = [d for d in _of(model).values() if d.members[0].alpha is not None]
    read = [d for d in undecided if d.sampler.reads_alpha()]
    known: dict[str, Tensor] = {}
    if read:
        flat = torch.cat([d.alpha for d in read]).to("cpu", torch.float64)
        pieces = flat.split([len(d.options) for d in read])
        known = {d.label: alpha for d, alpha in zip(read, pieces, strict=True)}
    for decision in undecided:
        alpha = known.get(decision.label)
        of_any = torch.zeros(len(decision.options), dtype=torch.float64) if alpha is None else alpha
        drawn = decision.sampler.draw(of_any, generator)
        for member in decision.members:
            member.drawn, member.alpha_at_draw = drawn, alpha


@torch.no_grad()
def after_step(model: Searchable) -> None:
    """Let each sampler correct its alpha after the optimizer has moved it (two-path binary gates rescale)."""
    for decision in _of(model).values():
        member = decision.members[0]
        if member.alpha is not None and member.alpha_at_draw is not None:
            member.sampler.after_step(member.alpha, member.alpha_at_draw, member.drawn)


@torch.no_grad()
def lead_(model: Searchable, options: Mapping[str, int]) -> None:
    """Let these options have the largest alpha of their decisions: each changes places with what has it, and ties end.

    >>> from oneshot import LayerChoice
    >>> choice = LayerChoice([nn.Identity(), nn.ReLU(), nn.Tanh()], label="act")
    >>> with torch.no_grad():
    ...     _ = choice.alpha.copy_(torch.tensor([0.5, 0.0, 0.25]))
    >>> lead_(nn.Sequential(choice), {"act": 2})
    >>> choice.alpha.tolist()
    [0.25, 0.0, 0.5]
    """
    for label, decision in _of(model).items():
        alpha, option = decision.alpha, options[label]
        most, own = alpha.max().clone(), alpha[option].clone()
        if own < most:
            alpha[alpha.argmax()], alpha[option] = own, most
        if int((alpha == most).sum()) > 1:
            alpha[option] = most + _LEAD * most.abs().clamp(min=1)


def arch_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The alphas of a model, each once: by owner (a mutable), not by name.

    >>> from oneshot import LayerChoice
    >>> net = nn.Sequential(LayerChoice([nn.Linear(2, 2), nn.Identity()]), nn.Linear(2, 2))
    >>> len(arch_parameters(net)), len(weight_parameters(net))
    (1, 4)
    """
    decisions(model)  # ties the alphas of equal labels
    alphas = [m.alpha for m in model.modules() if isinstance(m, AlphaModule) and m.alpha is not None]
    return list({id(alpha): alpha for alpha in alphas}.values())


def weight_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters of a model but the alphas: with ``arch_parameters`` disjoint and complete."""
    arch = {id(p) for p in arch_parameters(model)}
    return [p for p in model.parameters() if id(p) not in arch]
