"""A search that gets cheaper while it runs: candidates that have become improbable leave their choices, in place.

The choices, their alphas and the other candidates stay the objects they were. An architecture names what is left as
before, so that it belongs to the network with all candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ArchMismatchError, ConfigurationError, ExportError
from ..graph import Condition
from ..mutables import Argmax, Decision, LayerChoice, Mutable, OnePath, decisions
from ..mutables.base import SearchModel
from ..mutables.in_place import Changes, check_states, cut_tensor, forget_parameters, take_slice
from ..mutables.samplers import first_argmax
from .unchanged import Unchanged

__all__ = [
    "drop_candidates_",
    "drop_options_",
    "dropped_candidates",
    "left_options",
    "narrowed",
    "narrowing",
    "remove_candidates_",
    "unlikely_options",
]

BELOW = 0.01


def drop_candidates_(
    model: nn.Module,
    examples: Sequence[Sequence[Any]],
    *,
    below: float = BELOW,
    optimizers: Sequence[Optimizer] = (),
    archs: Sequence[Mapping[str, Any]] = (),
) -> dict[str, list[Any]]:
    """Take the improbable candidates out of every LayerChoice; label -> the candidates that went, by name or index.

    Of n candidates at first, one goes if its probability softmax(alpha) is less than ``below`` / n, that is so many
    times less than where the search began, unless it has the largest alpha of its choice, is that of one of ``archs``
    (as ``arch_of`` returns them), is pinned by an ``OnePath``, or holds choices itself. Choices of one label lose the
    same ones. Alpha loses its entries in place, and the ``optimizers`` lose those of their state and the parameters
    that no candidate has any more. InputChoice and Repeat stay as they are. Afterwards a draw is due, and costs that
    were counted on the choices as they were have to be counted again, or narrowed.

    What the model computes in eval mode with its likeliest options is compared before and after, on ``examples``, each
    of them all positional arguments: else ExportError, and everything is as it was.

    Raises ConfigurationError for ``below`` outside of [0, 1], an optimizer whose state cannot be cut, and a PIT or
    SuperNet, for which there is ``oneshot.pit.drop``.

    >>> choice = LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh(), "skip": nn.Identity()}, label="act")
    >>> with torch.no_grad():
    ...     _ = choice.alpha.copy_(torch.tensor([0.0, 9.0, 8.0]))  # p = 0.0001, 0.73, 0.27
    >>> drop_candidates_(choice, [(torch.ones(2),)]), choice.options, len(choice.alpha)
    ({'act': ['relu']}, ('tanh', 'skip'), 2)
    """
    _check(model, below)
    known = decisions(model)
    return _dropped(model, known, unlikely_options(known, below, archs), examples, optimizers)


def dropped_candidates(model: nn.Module) -> dict[str, list[Any]]:
    """Label -> the candidates that its choices had at first and have no more; only labels that have lost some."""
    found = {}
    for label, decision in decisions(model).items():
        choice = decision.members[0]
        if isinstance(choice, LayerChoice):
            found[label] = [option for option in choice.offered if option not in choice.options]
    return {label: gone for label, gone in found.items() if gone}


def remove_candidates_(
    model: nn.Module,
    dropped: Mapping[str, Collection[Any]],
    examples: Sequence[Sequence[Any]],
    *,
    optimizers: Sequence[Optimizer] = (),
) -> dict[str, list[Any]]:
    """Bring a model with all its candidates to where ``dropped_candidates`` said this, whatever its alphas say.

    A ``state_dict`` of the smaller model then loads. ArchMismatchError, with nothing changed, for candidates that it
    does not have or cannot lack.
    """
    _check(model, 0.0)
    known = decisions(model)
    gone = positions_of(known, dropped)
    before = led_by_others_(known, gone)
    left = {label: set(range(len(known[label].options))) - set(positions) for label, positions in gone.items()}
    try:
        found = _dropped(model, known, gone, examples, optimizers)
        before = {label: take_slice(alpha, {0: _index(left[label])}) for label, alpha in before.items()}
    finally:
        put_back_(known, before)
    return found


def _check(model: nn.Module, below: float) -> None:
    if isinstance(model, SearchModel):
        raise ConfigurationError(f"{type(model).__name__}: its costs and masks lose candidates too; take oneshot.pit")
    check_below(below)


def check_below(below: float) -> None:
    """ConfigurationError for a threshold that is none."""
    if isinstance(below, bool) or not isinstance(below, int | float) or not 0 <= below <= 1:
        raise ConfigurationError(f"below={below!r}: a number from 0 (none goes) to 1 is needed, 0.01 say")


def _dropped(
    model: nn.Module,
    known: Mapping[str, Decision],
    gone: Mapping[str, Sequence[int]],
    examples: Sequence[Sequence[Any]],
    optimizers: Sequence[Optimizer],
) -> dict[str, list[Any]]:
    if not any(gone.values()):
        return {}
    check_states(optimizers, [known[label].alpha for label in gone])
    changes, unchanged = Changes(), Unchanged(model, examples, [Argmax()])
    try:
        found = drop_options_(model, known, gone, optimizers, changes)
        unchanged("the model without the candidates that were dropped")
    except ExportError as error:
        changes.undo()
        raise ExportError(f"{error}. Nothing was dropped: the model is as it was") from error
    except BaseException:
        changes.undo()
        raise
    return found


# --- which ----------------------------------------------------------------------------------------------------------


def unlikely_options(
    known: Mapping[str, Decision], below: float, archs: Sequence[Mapping[str, Any]] = ()
) -> dict[str, list[int]]:
    """Label -> the positions of the candidates that may go; only labels that have some. Those of ``archs`` stay."""
    found = {}
    for label, decision in known.items():
        choices = [member for member in decision.members if isinstance(member, LayerChoice)]
        if len(choices) < len(decision.members) or choices[0].decided is not None:
            continue
        alpha = decision.alpha.detach().to("cpu", torch.float64)
        limit = below / len(choices[0].offered)
        staying = {first_argmax(alpha.tolist()), *_with_choices(choices)}
        staying.update(decision.index_of(arch[label]) for arch in archs if label in arch)
        if isinstance(decision.sampler, OnePath):
            staying.add(decision.sampler.index)
        small = (alpha.softmax(0) < limit).nonzero().flatten().tolist()
        found[label] = [k for k in small if k not in staying]
    return {label: gone for label, gone in found.items() if gone}


def _with_choices(choices: Sequence[LayerChoice]) -> set[int]:
    """The positions of candidates that hold choices: their labels are part of every architecture."""
    return {
        k
        for choice in choices
        for k, candidate in enumerate(choice)
        if any(isinstance(module, Mutable) for module in candidate.modules())
    }


def positions_of(known: Mapping[str, Decision], dropped: Mapping[str, Collection[Any]]) -> dict[str, list[int]]:
    """Label -> the positions that are still to go; ArchMismatchError for what cannot go, or has to come back."""
    found = {}
    strange = [label for label in dropped if label not in known]
    if strange:
        raise ArchMismatchError(f"dropped: labels {strange} that the model does not have; it has {list(known)}")
    for label, decision in known.items():
        choice, gone = decision.members[0], list(dropped.get(label, ()))
        if not isinstance(choice, LayerChoice):
            if gone:
                raise ArchMismatchError(f"dropped: {label!r} is no LayerChoice; nothing of it can go")
            continue
        unknown = [option for option in gone if option not in choice.offered]
        back = [option for option in choice.offered if option not in choice.options and option not in gone]
        choices = [member for member in decision.members if isinstance(member, LayerChoice)]
        nested = [choice.options[k] for k in _with_choices(choices) if choice.options[k] in gone]
        if unknown or back or nested or len(set(gone)) == len(choice.offered):
            raise ArchMismatchError(
                f"dropped: candidates {gone} of {label!r}, which had {list(choice.offered)} and has "
                f"{list(choice.options)}. One at least stays, and all that hold choices ({nested}). Begin with a model "
                "that has all candidates"
            )
        found[label] = [k for k, option in enumerate(choice.options) if option in gone]
    return {label: gone for label, gone in found.items() if gone}


@torch.no_grad()
def led_by_others_(known: Mapping[str, Decision], gone: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Let what stays have the larger alphas; those of before."""
    before = {}
    for label, positions in gone.items():
        alpha = known[label].alpha
        before[label] = alpha.detach().clone()
        alpha.fill_(1.0)
        alpha[list(positions)] = 0.0
    return before


@torch.no_grad()
def put_back_(known: Mapping[str, Decision], before: Mapping[str, Tensor]) -> None:
    for label, alpha in before.items():
        known[label].alpha.copy_(alpha)


# --- how ------------------------------------------------------------------------------------------------------------


def drop_options_(
    model: nn.Module,
    known: Mapping[str, Decision],
    gone: Mapping[str, Sequence[int]],
    optimizers: Sequence[Optimizer],
    changes: Changes,
) -> dict[str, list[Any]]:
    """Take the options at these positions out of all members of their decisions; label -> what went."""
    before = {id(parameter): parameter for parameter in model.parameters()}
    found = {}
    for label, positions in gone.items():
        decision = known[label]
        found[label] = [decision.options[k] for k in positions]
        staying = [k for k in range(len(decision.options)) if k not in set(positions)]
        cut_tensor(changes, decision.alpha, {0: _index(staying)}, optimizers)
        for member in decision.members:
            assert isinstance(member, LayerChoice)
            _drop(member, staying, changes)
    left = {id(parameter) for parameter in model.parameters()}
    forget_parameters(changes, [p for key, p in before.items() if key not in left], optimizers)
    return found


def _drop(choice: LayerChoice, staying: Sequence[int], changes: Changes) -> None:
    modules = choice.candidates._modules
    names = list(modules)
    changes.replace_items(modules, {names[k]: modules[names[k]] for k in staying})
    changes.set(choice, "options", tuple(choice.options[k] for k in staying))
    changes.set(choice, "drawn", None)
    changes.set(choice, "alpha_at_draw", None)
    if isinstance(choice.sampler, OnePath):
        changes.set(choice, "sampler", OnePath(list(staying).index(choice.sampler.index)))
    if choice.padding is not None:
        changes.set(choice.padding, "width", -1)  # learnt anew: the widest may be gone


def _index(positions: Collection[int]) -> Tensor:
    return torch.tensor(sorted(positions), dtype=torch.int64)


def left_options(known: Mapping[str, Decision], gone: Mapping[str, Sequence[int]]) -> dict[str, dict[int, int]]:
    """Label -> position of an option before -> after; only labels that lose some."""
    return {
        label: {k: i for i, k in enumerate(k for k in range(len(known[label].options)) if k not in set(positions))}
        for label, positions in gone.items()
    }


def narrowing(model: nn.Module, dropped: Mapping[str, Collection[Any]]) -> Callable[[Condition], Condition | None]:
    """``narrowed`` for what ``drop_candidates_(model, ...)`` just returned, as ``CostModel.narrowed`` asks for it.

    >>> choice = LayerChoice([nn.ReLU(), nn.Tanh(), nn.Identity()], label="act")
    >>> narrow = narrowing(choice, remove_candidates_(choice, {"act": [1]}, [(torch.ones(2),)]))
    >>> narrow({"act": frozenset({1, 2})}) == {"act": {1}}, narrow({"act": frozenset({1})}) is None
    (True, True)
    """
    left: dict[str, dict[int, int]] = {}
    for label, decision in decisions(model).items():
        choice = decision.members[0]
        if dropped.get(label) and isinstance(choice, LayerChoice):
            before = [option for option in choice.offered if option in choice.options or option in dropped[label]]
            left[label] = {before.index(option): i for i, option in enumerate(choice.options)}
    return partial(narrowed, left=left)


def narrowed(when: Condition, left: Mapping[str, Mapping[int, int]]) -> Condition | None:
    """A condition in the positions of the options that are left; None if it can no longer hold.

    >>> narrowed({"a": frozenset({0, 2}), "b": frozenset({1})}, {"a": {1: 0, 2: 1}}) == {"a": {1}, "b": {1}}
    True
    >>> narrowed({"a": frozenset({0})}, {"a": {1: 0, 2: 1}}) is None
    True
    """
    found = dict(when)
    for label, places in left.items():
        if label in found:
            found[label] = frozenset(places[option] for option in found[label] if option in places)
    return None if any(not options for options in found.values()) else found
