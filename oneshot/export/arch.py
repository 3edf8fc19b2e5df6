"""The architecture JSON: written atomically, read strictly, applied whole or not at all.

``{"format": "oneshot-arch", "version": 1, "space": fingerprint, "arch": {label: decision}, "costs": {...},
"created_by": {...}}``. A decision is a candidate's name (or its index in an unnamed list), a list of input
indices, or a depth. A bare ``{label: index}`` mapping, as NNI writes, is read too.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ArchMismatchError
from ..files import atomic_write
from ..mutables import Mutable, decisions
from ..mutables.base import FixedContext, SearchModel, current_fixed_arch
from ..mutables.samplers import first_argmax

__all__ = [
    "ArchFile",
    "arch_of",
    "argmax_choices",
    "choices_of",
    "fingerprint",
    "fixed_arch",
    "read_arch",
    "write_arch",
]

_FORMAT = "oneshot-arch"
_VERSION = 1
_SHOWN_LABELS, _SHOWN_LETTERS = 20, 80  # in an error: a file may have a million labels
_DEEPEST = 8  # lists in lists; a decision is one list at most


@dataclass(frozen=True)
class ArchFile:
    """What was read: the decisions by label, the fingerprint of their space if it was given, and the source."""

    arch: Mapping[str, Any]
    space: str | None
    source: str


ArchSource = Mapping[str, Any] | str | os.PathLike[str] | ArchFile


def fingerprint(model: nn.Module) -> str:
    """16 hex digits of the labels of a space and of what each of them offers, in any order of labels.

    Names and operations count, widths and strides do not: an arch may be used with a wider network.
    """
    return _digest(_offered(model))


def _digest(offered: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(offered, sort_keys=True).encode()).hexdigest()[:16]


def _offered(model: nn.Module) -> dict[str, Any]:
    """Label -> what it offers; in a model built under ``fixed_arch`` also where an outer decision left it out."""
    if isinstance(model, SearchModel):
        return model.offered()
    offered: dict[str, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, Mutable):
            offered.update({} if module.context is None else module.context.built)
            offered.update({f"{path}.{below}".lstrip("."): s for below, s in module.left_out.items()})
    offered.update({label: d.members[0].signature() for label, d in decisions(model).items()})
    return offered


def argmax_choices(model: nn.Module) -> dict[str, Any]:
    """Label -> option with the largest alpha, the first one of equals; never a sample. Of a SearchModel, its arch."""
    if isinstance(model, SearchModel):
        return model.arch()
    return {label: first_argmax(d.alpha.detach().tolist()) for label, d in decisions(model).items()}


def arch_of(model: nn.Module, choices: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON-ready decisions of options given by index; those of a SearchModel are its choices."""
    if isinstance(model, SearchModel):
        return dict(choices)
    return {label: _json(d.options[choices[label]]) for label, d in decisions(model).items()}


def choices_of(model: nn.Module, arch: ArchSource) -> dict[str, Any]:
    """Label -> option index of an arch, checked against ``model`` as a whole before anything is returned.

    Of a SearchModel: label -> decision.

    ArchMismatchError: a label too few or too many, an unknown candidate, another space.
    """
    file = read_arch(arch)
    offered = _offered(model)
    known = offered if isinstance(model, SearchModel) else decisions(model)
    missing, extra = [x for x in known if x not in file.arch], [x for x in file.arch if x not in offered]
    if missing or extra:
        parts = []
        if missing:
            parts.append(f"missing labels {_shown(missing)}")
        if extra:
            parts.append(f"labels {_shown(extra)} that the model does not have")
        raise ArchMismatchError(
            f"{file.source}: {' and '.join(parts)}; the model's labels are {_shown(known)}. "
            "Build the model with the arguments it was searched with"
        )
    if isinstance(model, SearchModel):
        _check_space(file, offered)
        try:
            model.check_arch(file.arch)
        except ArchMismatchError as error:
            raise ArchMismatchError(f"{file.source}: {error}") from error
        return dict(file.arch)
    known = decisions(model)
    choices = {x: d.members[0].index_of(file.arch[x], f"{file.source}: {x}") for x, d in known.items()}
    _check_space(file, offered)
    for label, decision in known.items():
        decided = decision.members[0].decided
        if decided is not None and decided != choices[label]:
            raise ArchMismatchError(
                f"{file.source}: {label} is {file.arch[label]!r}, but the model was built under fixed_arch, where it "
                f"is {_json(decision.options[decided])!r}. Build the model outside of fixed_arch, or with this arch"
            )
    return choices


def _check_space(file: ArchFile, offered: Mapping[str, Any]) -> None:
    if file.space is None:
        return
    found = _digest({label: offered[label] for label in file.arch})
    if file.space != found:
        raise ArchMismatchError(
            f"{file.source}: made for search space {file.space}, this model is {found}: the labels "
            "agree, what they offer does not. Build the model with the arguments it was searched with"
        )


def write_arch(
    path: str | os.PathLike[str],
    model: nn.Module,
    choices: Mapping[str, Any],
    *,
    costs: Mapping[str, float],
    created_by: Mapping[str, Any],
) -> None:
    """Write the JSON of the given choices; the old file stays until the new one is complete."""
    data = {
        "format": _FORMAT,
        "version": _VERSION,
        "space": fingerprint(model),
        "arch": arch_of(model, choices),
        "costs": dict(costs),
        "created_by": dict(created_by),
    }
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    atomic_write(Path(path), lambda file: file.write(text.encode("utf-8")))


def read_arch(source: ArchSource) -> ArchFile:
    """The decisions of a file or mapping; ArchMismatchError says what is wrong with it."""
    if isinstance(source, ArchFile):
        return source
    if isinstance(source, Mapping):
        return _parse(source, "the arch mapping")
    path = Path(source)
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise ArchMismatchError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ArchMismatchError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(data, Mapping):
        raise ArchMismatchError(f"{path}: a JSON object is needed, got {type(data).__name__}")
    return _parse(data, str(path))


def _parse(data: Mapping[str, Any], source: str) -> ArchFile:
    # Labels may be called "format" and "arch" too, but no decision is a mapping, and no sane one this format's name.
    if data.get("format") != _FORMAT and not isinstance(data.get("arch"), Mapping):
        return _file(data, None, source)
    if data.get("format") != _FORMAT:
        raise ArchMismatchError(f"{source}: format {reprlib.repr(data.get('format'))}, needed is {_FORMAT!r}")
    version = data.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ArchMismatchError(f"{source}: version {reprlib.repr(version)} is not a number this format has")
    if version > _VERSION:
        raise ArchMismatchError(
            f"{source}: version {version}, this library reads up to {_VERSION}; install a newer oneshot-nas"
        )
    arch, space = data.get("arch"), data.get("space")
    if not isinstance(arch, Mapping):
        raise ArchMismatchError(f"{source}: 'arch' is a {type(arch).__name__}, an object is needed")
    if not isinstance(space, str):
        raise ArchMismatchError(f"{source}: 'space' is {reprlib.repr(space)}, the fingerprint of the space is needed")
    return _file(arch, space, source)


def _file(arch: Mapping[str, Any], space: str | None, source: str) -> ArchFile:
    for label, decision in arch.items():
        if not isinstance(label, str) or _is_deep(decision, _DEEPEST):
            raise ArchMismatchError(
                f"{source}: label {reprlib.repr(label)}: no label with a decision: labels are text, and a decision is "
                "a name, a number or a list"
            )
    return ArchFile(dict(arch), space, source)


def _is_deep(value: Any, left: int) -> bool:
    inner: Iterable[Any] = value.values() if isinstance(value, Mapping) else value
    nested = isinstance(value, Mapping | list | tuple)
    return nested and (left == 0 or any(_is_deep(one, left - 1) for one in inner))


def _shown(labels: Iterable[str]) -> str:
    listed = [label if len(label) <= _SHOWN_LETTERS else f"{label[:_SHOWN_LETTERS]}..." for label in labels]
    more = f" and {len(listed) - _SHOWN_LABELS} more" if len(listed) > _SHOWN_LABELS else ""
    return f"{listed[:_SHOWN_LABELS]}{more}"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        (twice, _) = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {twice[:_SHOWN_LETTERS]!r} stands twice in one object")
    return found


def _json(option: Any) -> Any:
    return list(option) if isinstance(option, tuple) else option


@contextmanager
def fixed_arch(source: ArchSource) -> Iterator[None]:
    """Inside, a network is built with its choices already made: ``with fixed_arch(path): model = Space()``.

    A mutable with a label keeps its chosen candidate only. One without a label cannot know its path in a network
    that is still being built: it stays whole until ``fixed(model)``, which also strips the others.

    >>> from oneshot import LayerChoice
    >>> with fixed_arch({"act": "relu"}):
    ...     choice = LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()}, label="act")
    >>> list(choice), list(choice.parameters())
    ([ReLU()], [])
    """
    file = read_arch(source)
    context = FixedContext(file.arch, file.space, file.source)
    token = current_fixed_arch.set(context)
    try:
        yield
    finally:
        current_fixed_arch.reset(token)
    if context.unlabelled:
        return  # their labels are their paths, which only the finished network has: fixed(model) checks them
    unused = [label for label in file.arch if label not in context.built]
    if unused:
        raise ArchMismatchError(
            f"{file.source}: labels {_shown(unused)} that no mutable built here has; they have "
            f"{_shown(sorted(context.built))}. "
            "Build the model with the arguments it was searched with"
        )
    _check_space(file, context.built)
