"""The architecture file: every decision there and back, its exact bytes, and every way in which it can be wrong."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from oneshot import Argmax, InputChoice, LayerChoice, Repeat, decisions, fixed
from oneshot.errors import ArchMismatchError
from oneshot.export import arch_of, argmax_choices, choices_of, fingerprint, read_arch, write_arch


def conv(size: int) -> nn.Module:
    return nn.Conv2d(1, 1, size, padding=size // 2)


def space() -> nn.ModuleDict:
    """One decision of every kind. Options: 2 names, 3 indices, 3 of 4 inputs, any of 2 named inputs, 3 depths."""
    return nn.ModuleDict(
        {
            "named": LayerChoice({"größer": nn.ReLU(), "k3": conv(3)}, label="Schicht/名"),
            "listed": LayerChoice([conv(3), conv(5), nn.Identity()]),
            "three": InputChoice(4, n_chosen=3, label="three"),
            "any": InputChoice(choose_from=["a", "b"], n_chosen=None, label="any"),
            "depth": Repeat([nn.ReLU(), nn.Tanh()], (0, 2), label="depth"),
        }
    )


ARCH = {"Schicht/名": "k3", "listed": 2, "three": [0, 2, 3], "any": [1], "depth": 0}
CHOICES = {"Schicht/名": 1, "listed": 2, "three": 2, "any": 1, "depth": 0}

# The space's fingerprint is in every file: where this text changes, no file written before can be read again.
FILE = """{
  "format": "oneshot-arch",
  "version": 1,
  "space": "7dac53fe29db3c7b",
  "arch": {
    "Schicht/名": "k3",
    "listed": 2,
    "three": [
      0,
      2,
      3
    ],
    "any": [
      1
    ],
    "depth": 0
  },
  "costs": {
    "params": 12,
    "latency_ms": 0.1
  },
  "created_by": {
    "trainer": "Büro",
    "seed": 7
  }
}
"""


def write(path: Path, choices: dict[str, int] = CHOICES) -> bytes:
    costs = {"params": 12, "latency_ms": 0.1}
    write_arch(path, space(), choices, costs=costs, created_by={"trainer": "Büro", "seed": 7})
    return path.read_bytes()


def document(**changes: Any) -> dict[str, Any]:
    return {**json.loads(FILE), **changes}


def changed(**decisions_of: Any) -> dict[str, Any]:
    return document(arch={**ARCH, **decisions_of})


# ---- there and back ------------------------------------------------------------------------------------------------


def test_the_bytes_of_a_file(tmp_path: Path) -> None:
    data = write(tmp_path / "arch.json")
    assert data == FILE.encode("utf-8")
    assert b"\r" not in data
    assert write(tmp_path / "again.json") == data
    assert sorted(os.listdir(tmp_path)) == ["again.json", "arch.json"]


def test_every_architecture_there_and_back(tmp_path: Path) -> None:
    """All 2 * 3 * 4 * 3 * 3 = 216, as a mapping; one of each option as a file."""
    model = space()
    sizes = {label: len(d.options) for label, d in decisions(model).items()}
    assert list(sizes.values()) == [2, 3, 4, 3, 3]
    seen = set()
    for options in product(*map(range, sizes.values())):
        choices = dict(zip(sizes, options, strict=True))
        arch = json.loads(json.dumps(arch_of(model, choices)))
        assert choices_of(model, arch) == choices
        seen.add(json.dumps(arch))
    assert len(seen) == 216
    for k in range(4):
        choices = {label: min(k, n - 1) for label, n in sizes.items()}
        write(tmp_path / "arch.json", choices)
        assert choices_of(model, tmp_path / "arch.json") == choices
        assert choices_of(model, str(tmp_path / "arch.json")) == choices


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    write(tmp_path / "arch.json")
    file = read_arch(tmp_path / "arch.json")
    assert file.arch == ARCH
    assert file.space == fingerprint(space())
    assert file.source == str(tmp_path / "arch.json")
    assert choices_of(space(), document()) == CHOICES


def test_the_arch_is_the_argmax_the_first_of_equals() -> None:
    model = space()
    with torch.no_grad():
        model["listed"].alpha.copy_(torch.tensor([0.0, 2.0, 2.0]))
        model["three"].alpha.copy_(torch.tensor([-3.0, -2.0, -1.0, -1.5]))
    choices = argmax_choices(model)
    assert list(choices.values()) == [0, 1, 2, 0, 0]
    assert arch_of(model, choices) == {
        "Schicht/名": "größer",
        "listed": 1,
        "three": [0, 2, 3],
        "any": [0],
        "depth": 0,
    }


@pytest.mark.parametrize(
    "arch",
    [
        {"Schicht/名": 1, "listed": 2, "three": [3, 0, 2], "any": 1, "depth": 0},
        {"Schicht/名": "k3", "listed": "2", "three": (0, 2, 3), "any": "b", "depth": 0},
        {"depth": 0, "any": ["b"], "three": [2, 3, 0], "listed": 2, "Schicht/名": 1},
    ],
)
def test_a_bare_mapping_as_nni_writes_it(arch: dict[str, Any], tmp_path: Path) -> None:
    """Indices for names, the digits of an index, one input without a list, inputs by name, in any order."""
    assert choices_of(space(), arch) == CHOICES
    (tmp_path / "nni.json").write_text(json.dumps(arch), encoding="utf-8")
    assert choices_of(space(), tmp_path / "nni.json") == CHOICES


def test_labels_may_be_words_of_the_format() -> None:
    model = nn.Sequential(*(LayerChoice([nn.ReLU(), nn.Tanh()], label=x) for x in ("arch", "format", "version")))
    assert choices_of(model, {"arch": 1, "format": 0, "version": 1}) == {"arch": 1, "format": 0, "version": 1}


# ---- the fingerprint -----------------------------------------------------------------------------------------------


def of(*modules: nn.Module) -> str:
    return fingerprint(nn.Sequential(*modules))


def test_the_fingerprint_is_of_labels_and_what_they_offer() -> None:
    one = LayerChoice([conv(3), conv(5)], label="a")
    named = {"k3": conv(3), "k5": conv(5)}
    prints = [
        of(one),
        of(LayerChoice([conv(3), conv(5)], label="b")),
        of(LayerChoice([conv(5), conv(3)], label="a")),
        of(LayerChoice([conv(3), conv(5), conv(7)], label="a")),
        of(LayerChoice(named, label="a")),
        of(LayerChoice({"k5": conv(5), "k3": conv(3)}, label="a")),
        of(InputChoice(2, label="a")),
        of(InputChoice(2, n_chosen=2, label="a")),
        of(InputChoice(2, n_chosen=2, reduction="mean", label="a")),
        of(InputChoice(choose_from=["x", "y"], label="a")),
        of(Repeat([nn.ReLU(), nn.ReLU()], (0, 2), label="a")),
        of(Repeat([nn.ReLU(), nn.ReLU()], (1, 2), label="a")),
        of(one, LayerChoice([conv(3), conv(5)], label="b")),
    ]
    assert len(set(prints)) == len(prints)
    assert all(len(p) == 16 and int(p, 16) >= 0 for p in prints)


def test_the_fingerprint_is_not_of_widths_weights_or_order() -> None:
    two = LayerChoice({"k3": conv(3)}, label="b")
    wide = LayerChoice([nn.Conv2d(4, 8, 3, stride=2), nn.Conv2d(4, 8, 5, stride=2)], label="a")
    assert of(LayerChoice([conv(3), conv(5)], label="a"), two) == of(two, wide)
    assert fingerprint(space()) == fingerprint(space())
    model = space()
    before = fingerprint(model)
    assert fingerprint(model.double().eval()) == before
    assert fingerprint(copy.deepcopy(model)) == before


# ---- what can be wrong ---------------------------------------------------------------------------------------------


def without(label: str) -> dict[str, Any]:
    return document(arch={k: v for k, v in ARCH.items() if k != label})


WRONG: dict[str, tuple[Any, str]] = {
    "missing label": (without("three"), r"missing labels \['three'\]; the model's labels are"),
    "missing label, bare": ({"listed": 2}, r"missing labels \['Schicht/名', 'three', 'any', 'depth'\]"),
    "extra label": (changed(other=1), r"labels \['other'\] that the model does not have"),
    "extra label, bare": ({**ARCH, "other": 1}, r"labels \['other'\] that the model does not have"),
    "both": (document(arch={"other": 1}), r"missing labels .* and labels \['other'\]"),
    "empty": ({}, "missing labels"),
    "no label of a list": (changed(listed=3), r"listed: the arch says 3, the candidates are \[0, 1, 2\]"),
    "negative": (changed(listed=-1), "listed: the arch says -1"),
    "digits": (changed(listed="3"), "listed: the arch says '3'"),
    "many digits": (changed(listed="1" * 5000), "listed: the arch says '1111"),
    "other digits": (changed(listed="١"), "listed: the arch says '١'"),
    "leading zero": (changed(listed="01"), "listed: the arch says '01'"),
    "unknown name": (changed(**{"Schicht/名": "k5"}), r"'k5', the candidates are \['größer', 'k3'\]"),
    "name of another case": (changed(**{"Schicht/名": "K3"}), "the arch says 'K3'"),
    "inputs too few": (changed(three=[0, 1]), r"three: the arch says \[0, 1\]; needed is a list of 3 different"),
    "inputs too many": (changed(three=[0, 1, 2, 3]), "needed is a list of 3 different indices from 0 to 3"),
    "inputs twice": (changed(three=[0, 0, 1]), "needed is a list of 3 different"),
    "inputs unknown": (changed(three=[0, 1, 4]), "needed is a list of 3 different"),
    "one input of three": (changed(three=1), "three: the arch says 1"),
    "no input": (changed(any=[]), "any: .* one or more different"),
    "unknown input": (changed(any=["c"]), "any: the arch says"),
    "inputs in a list": (changed(any=[[0]]), "any: the arch says"),
    "input is true": (changed(any=[True]), "any: the arch says"),
    "too deep": (changed(depth=3), r"depth: the arch says depth 3, the depths are \[0, 1, 2\]"),
    "depth as text": (changed(depth="1"), "depth: the arch says depth '1'"),
    "fingerprint": (
        document(space="0123456789abcdef"),
        "search space 0123456789abcdef, this model is 7dac53fe29db3c7b",
    ),
    "no fingerprint": ({k: v for k, v in document().items() if k != "space"}, "'space' is None"),
    "fingerprint is a number": (document(space=3), "'space' is 3"),
    "newer": (document(version=2), "version 2, this library reads up to 1; install a newer oneshot-nas"),
    "version 0": (document(version=0), "version 0 is not"),
    "version is true": (document(version=True), "version True is not"),
    "version is a text": (document(version="1"), "version '1' is not"),
    "no version": ({k: v for k, v in document().items() if k != "version"}, "version None is not"),
    "format": (document(format="nni"), "format 'nni', needed is 'oneshot-arch'"),
    "no format": ({k: v for k, v in document().items() if k != "format"}, "format None, needed is 'oneshot-arch'"),
    "arch is a list": (document(arch=[1, 2]), "'arch' is a list, an object is needed"),
    "no arch": ({k: v for k, v in document().items() if k != "arch"}, "'arch' is a NoneType"),
}
for _label, _kind in product(ARCH, (True, False, 1.0, None, {"a": 1}, {}, [None], [1.0], ["k3", "k3"])):
    WRONG[f"{_label} is {_kind!r}"] = (changed(**{_label: _kind}), f"{_label}: the arch says ")


def state_of(model: nn.Module) -> list[Any]:
    return [(d.alpha.tolist(), d.sampler, d.drawn) for d in decisions(model).values()]


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_arch_says_what_is_wrong_and_applies_nothing(case: str, tmp_path: Path) -> None:
    source, words = WRONG[case]
    model = space()
    before = state_of(model)
    path = tmp_path / "arch.json"
    path.write_text(json.dumps(source), encoding="utf-8")
    with pytest.raises(ArchMismatchError, match=words):
        choices_of(model, source)
    with pytest.raises(ArchMismatchError, match=words) as found:
        choices_of(model, path)
    assert str(found.value).startswith(f"{path}: ")
    with pytest.raises(ArchMismatchError):
        fixed(model, path)
    assert state_of(model) == before
    assert model["named"].sampler != Argmax()


BROKEN: dict[str, tuple[bytes, str]] = {
    "truncated": (FILE.encode()[:150], "not a JSON file"),
    "empty": (b"", "not a JSON file"),
    "twice": (FILE.encode() * 2, "not a JSON file: Extra data"),
    "not UTF-8": (FILE.encode("utf-16"), "not a JSON file"),
    "latin": (FILE.replace("名", "").encode("latin-1"), "not a JSON file"),
    "byte order mark": (FILE.encode("utf-8-sig"), "not a JSON file"),
    "zeros": (b"\0" * 100, "not a JSON file"),
    "a list": (b"[1, 2]", "a JSON object is needed, got list"),
    "a number": (b"3", "a JSON object is needed, got int"),
    "null": (b"null", "a JSON object is needed, got NoneType"),
    "a text": (b'"k3"', "a JSON object is needed, got str"),
    "one label twice": (FILE.replace('"depth": 0', '"depth": 0, "depth": 1').encode(), "key 'depth' stands twice"),
    "one key twice": (
        FILE.replace('"version": 1', '"version": 1, "version": 1').encode(),
        "key 'version' stands twice",
    ),
    "deep": (b"[" * 100_000, "not a JSON file"),
    "deep in a label": (FILE.replace('"depth": 0', '"depth": ' + "[" * 100_000).encode(), "not a JSON file"),
    "a number of 5000 digits": (FILE.replace('"depth": 0', '"depth": ' + "1" * 5000).encode(), "arch.json: not a JSON"),
    "not a number": (FILE.replace('"depth": 0', '"depth": NaN').encode(), "depth: the arch says depth nan"),
    "half a character": (FILE.replace('"k3"', '"\\ud800"').encode(), r"the arch says '\\ud800'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_says_what_is_wrong(case: str, tmp_path: Path) -> None:
    data, words = BROKEN[case]
    path = tmp_path / "arch.json"
    path.write_bytes(data)
    with pytest.raises(ArchMismatchError, match=words):
        choices_of(space(), path)


@pytest.mark.parametrize("name", ["missing.json", "missing/arch.json", ".", "a\0b"])
def test_a_file_that_cannot_be_opened(name: str, tmp_path: Path) -> None:
    with pytest.raises(ArchMismatchError, match=r"No such file|directory|null"):
        choices_of(space(), f"{tmp_path}/{name}")


# ---- writing -------------------------------------------------------------------------------------------------------


def full_disk(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "arch.json"
    old = write(path)
    fail: Callable[..., None] = full_disk if where == "fsync" else lambda *_: full_disk(0)
    with monkeypatch.context() as patch:
        patch.setattr(os, where, fail)
        with pytest.raises(OSError, match="No space left"):
            write(path, {**CHOICES, "depth": 2})
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["arch.json"]
    assert write(path, {**CHOICES, "depth": 2}) != old


def test_what_is_not_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "arch.json"
    old = write(path)
    with pytest.raises(TypeError):
        write_arch(path, space(), CHOICES, costs={}, created_by={"trainer": object()})
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["arch.json"]


# ---- fuzz ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def only_choices_or_mismatch(source: Any) -> bool:
    """Whether the source was read; any other exception than ArchMismatchError is a failure of the test."""
    model = space()
    try:
        choices = choices_of(model, source)
    except ArchMismatchError:
        return False
    assert list(choices) == list(ARCH)
    for k, decision in zip(choices.values(), decisions(model).values(), strict=True):
        assert type(k) is int
        assert 0 <= k < len(decision.options)
    return True


edits = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 400), st.binary(max_size=4)),
    st.tuples(st.just("cut"), st.integers(0, 400), st.integers(1, 60)),
    st.tuples(st.just("copy"), st.integers(0, 400), st.integers(1, 60)),
    st.tuples(st.just("flip"), st.integers(0, 400), st.integers(0, 7)),
)


def edited(data: bytes, edit: tuple[str, int, Any]) -> bytes:
    kind, at, what = edit
    at = min(at, len(data) - 1) if data else 0
    if kind == "put":
        return data[:at] + what + data[at:]
    if kind == "cut":
        return data[:at] + data[at + what :]
    if kind == "copy":
        return data[: at + what] + data[at:]
    return data[:at] + bytes(b ^ (1 << what) for b in data[at : at + 1]) + data[at + 1 :]


@settings(deadline=None, max_examples=150)
@given(st.lists(edits, max_size=3))
def test_changed_bytes_are_choices_or_a_mismatch(folder: Path, changes: list[tuple[str, int, Any]]) -> None:
    data = FILE.encode()
    for change in changes:
        data = edited(data, change)
    path = folder / "bytes.json"
    path.write_bytes(data)
    was_read = only_choices_or_mismatch(path)
    assert was_read or data != FILE.encode()


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 4), st.floats(), st.sampled_from(["k3", "0", "a", "b", ""])),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150)
@given(
    st.dictionaries(st.sampled_from([*ARCH, "x"]), values, max_size=3),
    st.dictionaries(
        st.sampled_from(["format", "version", "space", "arch", "costs", "created_by", "y"]), values, max_size=2
    ),
    st.booleans(),
)
def test_changed_values_are_choices_or_a_mismatch(
    folder: Path, in_arch: dict[str, Any], at_top: dict[str, Any], bare: bool
) -> None:
    arch = {**ARCH, **in_arch}
    source = {**arch, **at_top} if bare else {**document(arch=arch), **at_top}
    path = folder / "values.json"
    path.write_text(json.dumps(source), encoding="utf-8")
    assert only_choices_or_mismatch(source) == only_choices_or_mismatch(path)
