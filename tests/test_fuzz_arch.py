"""Damaged architecture files: an architecture of the space, or an error that names the file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fuzzing import JSON_VALUES, damaged_bytes, damaged_json, dumped, examples, judged, randoms
from hypothesis import given
from torch import nn

from oneshot import PIT, InputChoice, LayerChoice, Repeat, decisions, fixed_arch
from oneshot.errors import ArchMismatchError
from oneshot.export import arch_of, argmax_choices, choices_of, write_arch


def space() -> nn.ModuleDict:
    """One decision of every kind; the list has a label too, so that it can be built under ``fixed_arch``."""
    return nn.ModuleDict(
        {
            "named": LayerChoice({"größer": nn.ReLU(), "k3": nn.Tanh()}, label="Schicht/名"),
            "listed": LayerChoice([nn.ReLU(), nn.Tanh(), nn.Identity()], label="listed"),
            "three": InputChoice(4, n_chosen=3, label="three"),
            "any": InputChoice(choose_from=["a", "b"], n_chosen=None, label="any"),
            "depth": Repeat([nn.ReLU(), nn.Tanh()], (0, 2), label="depth"),
        }
    )


def masked() -> PIT:
    net = nn.Sequential(nn.Conv1d(2, 4, 5, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6, 2))
    return PIT(net, input_shape=(2, 6))


SPACE, MASKED = space(), masked()
ALLOWED = {"0": {0, 1, 2, 3}, "0.kernel_size": {1, 2, 3, 4, 5}, "0.dilation": {1, 2, 4}}


def written(model: nn.Module, path: Path) -> dict[str, Any]:
    created_by = {"trainer": "Büro", "seed": 7, "budget": {"macs": 1e4}}
    write_arch(path, model, argmax_choices(model), costs={"params": 12, "ms": 0.1}, created_by=created_by)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sound")
    sound = [written(model, folder / "arch.json") for model in (SPACE, MASKED)]
    return [*sound, *(one["arch"] for one in sound)]


@examples(1000)
@given(random=randoms)
def test_a_damaged_arch_of_choices(files: list[dict[str, Any]], tmp_path: Path, random: Random) -> None:
    path = tmp_path / "arch.json"
    path.write_bytes(damaged_json(files[random.choice((0, 0, 2))], [dumped(files[1]).encode()], random))
    choices = judged(path, lambda: choices_of(SPACE, path))
    if choices is not None:
        assert all(0 <= choices[label] < len(d.options) for label, d in decisions(SPACE).items())
        assert choices_of(SPACE, arch_of(SPACE, choices)) == choices


@examples(300)
@given(random=randoms)
def test_a_space_built_under_a_damaged_arch(files: list[dict[str, Any]], tmp_path: Path, random: Random) -> None:
    path = tmp_path / "arch.json"
    path.write_bytes(damaged_json(files[random.choice((0, 0, 2))], [dumped(files[1]).encode()], random))

    def built() -> nn.ModuleDict:
        with fixed_arch(path):
            return space()

    model = judged(path, built)
    if model is not None:
        assert all(d.members[0].decided is not None for d in decisions(model).values())


@examples(400)
@given(random=randoms)
def test_a_damaged_arch_of_masks(files: list[dict[str, Any]], tmp_path: Path, random: Random) -> None:
    path = tmp_path / "arch.json"
    path.write_bytes(damaged_json(files[random.choice((1, 1, 3))], [dumped(files[0]).encode()], random))
    before = MASKED.arch()
    arch = judged(path, lambda: choices_of(MASKED, path))
    assert MASKED.arch() == before
    if arch is not None:
        MASKED.decide(arch)
        decided = MASKED.arch()
        assert all(set(decided[x] if isinstance(decided[x], list) else [decided[x]]) <= ALLOWED[x] for x in before)
        MASKED.decide(before)


# ---- what was found, by hand ---------------------------------------------------------------------------------------


def test_a_million_labels_are_refused_at_once(tmp_path: Path) -> None:
    """And the last one stands twice: to count each of them would take 10**12 comparisons."""
    labels = ", ".join(f'"{k}": 0' for k in range(10**5))
    path = tmp_path / "arch.json"
    before = time.process_time()
    for end, words in ((', "99999": 1', "key '99999' stands twice"), (', "listed": 0', "and 99980 more")):
        path.write_text("{" + labels + end + "}")
        with pytest.raises(ArchMismatchError, match=words) as caught:
            choices_of(SPACE, path)
        assert len(str(caught.value)) < 5000
    assert time.process_time() - before < 10


@pytest.mark.parametrize("depth", [9, 300, 900])
def test_lists_in_lists_are_no_decision(depth: int, tmp_path: Path) -> None:
    """As deep as JSON can be read, they are too deep to be shown."""
    path = tmp_path / "arch.json"
    path.write_text('{"Schicht/名": ' + "[" * depth + "]" * depth + "}", encoding="utf-8")
    with pytest.raises(ArchMismatchError, match="a decision is a name, a number or a list"):
        choices_of(SPACE, path)


def test_an_error_of_masks_names_the_file(tmp_path: Path) -> None:
    arch = dict.fromkeys(MASKED.arch(), -1)
    path = tmp_path / "arch.json"
    path.write_text(json.dumps(arch))
    with pytest.raises(ArchMismatchError) as caught:
        choices_of(MASKED, path)
    assert str(caught.value).startswith(f"{path}: ")


def test_damage_is_damage() -> None:
    """Nearly all of the mutated files differ from the sound one, and each kind of value is met."""
    data = json.dumps({"a": 1}).encode()
    assert sum(damaged_bytes(data, [b"x"], Random(k)) != data for k in range(200)) > 180
    met = b"".join(damaged_json({"a": 1}, [b"x"], Random(k)) for k in range(1500))
    assert all(dumped(value).encode("utf-8", "replace") in met for value in JSON_VALUES)
