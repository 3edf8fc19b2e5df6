"""Parameters of a model by pattern: of their own names, or of the modules they are in."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..errors import ConfigurationError, InputTypeError
from ..mutables import arch_parameters
from ..pit.network import SearchedNetwork

__all__ = ["as_patterns", "matching", "spellings", "weights_of"]


def weights_of(model: object) -> dict[str, nn.Parameter]:
    """``model.named_parameters()`` without alphas: a shared parameter once, under its first name.

    Of a ``PIT`` or ``SuperNet`` those of the network in it, under the names that they have in the user's own.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"model: {type(model).__name__}, a torch.nn.Module is needed")
    model = model.network if isinstance(model, SearchedNetwork) else model
    alphas = {id(alpha) for alpha in arch_parameters(model)}
    found = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in alphas}
    for name, parameter in found.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ConfigurationError(f"model: {name} has no shape yet; run the model once before")
    return found


def spellings(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Parameter name -> all that a pattern may call it: its names (a shared one has several) and its modules'."""
    model = model.network if isinstance(model, SearchedNetwork) else model
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, list[str]] = {name: [] for name in first.values()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parts = name.split(".")
        found[first[id(parameter)]] += [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
    return {name: tuple(dict.fromkeys(names)) for name, names in found.items()}


def as_patterns(what: str, patterns: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """The patterns as a tuple; ConfigurationError for none at all or something else than strings."""
    if patterns is None:
        return None
    found = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not found or not all(isinstance(pattern, str) and pattern for pattern in found):
        raise ConfigurationError(f"{what}: patterns={patterns!r}; a pattern such as 'conv*', or several, are needed")
    return found


def matching(what: str, patterns: Sequence[str] | None, names: Mapping[str, Iterable[str]]) -> list[str]:
    """The keys of ``names`` that a pattern fits under one of their spellings; all of them without patterns.

    As the shell's: ``*`` (also across dots), ``?``, ``[ab]``. A pattern that fits nothing is a ConfigurationError which
    lists near names.

    >>> matching("L1", ["head"], {"conv.weight": ["conv.weight", "conv"], "head.weight": ["head.weight", "head"]})
    ['head.weight']
    """
    if patterns is None:
        return list(names)
    found = set()
    for pattern in patterns:
        fits = {key for key, spelt in names.items() if any(fnmatchcase(name, pattern) for name in spelt)}
        if not fits:
            every = list(dict.fromkeys(name for spelt in names.values() for name in spelt))
            near = difflib.get_close_matches(pattern, every, n=5, cutoff=0.4) or every[:5]
            raise ConfigurationError(f"{what}: the pattern {pattern!r} fits nothing; near names are {', '.join(near)}")
        found |= fits
    return [key for key in names if key in found]
