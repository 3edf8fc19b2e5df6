"""The fixed model in a Python process that cannot import the library: what a user hands on needs torch alone."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from oneshot import as_graph, decisions, fixed, load_fixed
from oneshot.errors import UnsupportedModelError
from oneshot.export import argmax_choices, verified_fixed, write_arch
from search_spaces.mobilenet import mobilenet_small

USER_NETWORK = '''
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(4, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.back = nn.Conv2d(width, 4, 1)

    def forward(self, x):
        return x + self.back(torch.relu(self.norm(self.conv(x))))


class Network(nn.Module):
    def __init__(self, first, merge, rest):
        super().__init__()
        self.first, self.merge, self.rest = first, merge, rest
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        inputs = {"image": x, "features": self.first(x), "square": x * x}
        return self.head(self.rest(self.merge(inputs)).mean((2, 3)))


def search_model():
    from oneshot import InputChoice, LayerChoice, Repeat

    first = LayerChoice({"narrow": Block(2), "wide": Block(6), "skip": nn.Identity()}, label="first")
    merge = InputChoice(choose_from=["image", "features", "square"], n_chosen=2, reduction="mean", label="merge")
    return Network(first, merge, Repeat(lambda i: LayerChoice([Block(3), nn.Identity()]), (1, 3), label="depth"))


class Mean(nn.Module):
    def forward(self, inputs):
        return (inputs["image"] + inputs["features"]) / 2


def plain_model():
    """What the architecture says, written by hand."""
    return Network(Block(6), Mean(), nn.Sequential(Block(3), nn.Identity()))


class Forks(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def own_function(x):
    return x + 1


torch.fx.wrap("own_function")


class Calls(nn.Module):
    def forward(self, x):
        return own_function(x)
'''

ARCH = {
    "first": "wide",
    "merge": ["image", "features"],
    "depth": 2,
    "rest.blocks.0": 0,
    "rest.blocks.1": 1,
    "rest.blocks.2": 0,
}

CLEAN_PROCESS = """
import sys

sys.modules["oneshot"] = sys.modules["search_spaces"] = None  # importing them is an error from here on
import torch

torch.set_num_threads(1)
path = sys.argv[1] + "/"
for name in ("oneshot", "search_spaces"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(name + " could be imported")

for name in ("mobile", "user"):
    graph = torch.load(path + name + "_graph.pt", weights_only=False)
    x, expected = torch.load(path + name + "_output.pt")
    assert torch.allclose(graph(x), expected, atol=1e-6), name + " graph"
assert "user_network" not in sys.modules

sys.path.insert(0, sys.argv[1])
pickled = torch.load(path + "user_fixed.pt", weights_only=False)
assert type(pickled).__module__ == "user_network"
assert torch.equal(pickled(x), expected), "pickled"

from user_network import plain_model

plain = plain_model().eval()
plain.load_state_dict(torch.load(path + "user_state.pt"))
assert torch.equal(plain(x), expected), "state"

assert not [name for name in sys.modules if name.startswith(("oneshot.", "search_spaces."))]
print("the same outputs")
"""


@pytest.fixture
def user_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "user_network.py").write_text(USER_NETWORK, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "user_network", raising=False)
    return importlib.import_module("user_network")


def test_fixed_models_need_torch_alone(tmp_path: Path, user_network: ModuleType) -> None:
    """Graphs next to nothing; a pickle, and a state_dict, next to the source of the user."""
    search, x = user_network.search_model(), torch.randn(3, 4, 5, 5)
    search(x)  # moves the statistics of the BatchNorms
    plain = fixed(search, ARCH).eval()
    torch.save(plain, tmp_path / "user_fixed.pt")
    torch.save(plain.state_dict(), tmp_path / "user_state.pt")
    torch.save(as_graph(plain, (x,)), tmp_path / "user_graph.pt")
    torch.save((x, plain(x).detach()), tmp_path / "user_output.pt")

    mobile, image = mobilenet_small(), torch.randn(2, 1, 28, 28)
    mobile(image)
    choices = {label: k % len(d.options) for k, (label, d) in enumerate(decisions(mobile).items())}
    plain = verified_fixed(mobile, choices, [(image,)]).eval()
    torch.save(as_graph(plain, (image,)), tmp_path / "mobile_graph.pt")
    torch.save((image, plain(image).detach()), tmp_path / "mobile_output.pt")

    for path in tmp_path.glob("*.pt"):
        assert b"oneshot" not in path.read_bytes()
        assert b"search_spaces" not in path.read_bytes()
        assert b"user_network" not in path.read_bytes() or path.name == "user_fixed.pt"

    # -I: neither the working folder nor PYTHONPATH are on the path, only what the script puts there.
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-I", "-c", CLEAN_PROCESS, str(tmp_path)],
        cwd=tmp_path / "elsewhere",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the same outputs\n"


def test_the_source_of_the_user_is_enough_to_build_it_again(tmp_path: Path, user_network: ModuleType) -> None:
    search = user_network.search_model()
    choices = argmax_choices(search)
    write_arch(tmp_path / "arch.json", search, choices, costs={}, created_by={})
    again = load_fixed(user_network.search_model, tmp_path / "arch.json")
    again.load_state_dict(fixed(search, tmp_path / "arch.json").state_dict())
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(again.eval()(x), fixed(search, tmp_path / "arch.json").eval()(x))


def test_a_network_that_looks_at_values_is_no_graph(user_network: ModuleType) -> None:
    with pytest.raises(UnsupportedModelError, match=r"Forks cannot be written as a graph: .*depends on the values"):
        as_graph(user_network.Forks(), (torch.ones(2),))


def test_a_network_that_calls_a_function_of_its_own_file_is_no_graph(user_network: ModuleType) -> None:
    with pytest.raises(UnsupportedModelError, match=r"\['user_network.own_function'\], without which"):
        as_graph(user_network.Calls(), (torch.ones(2),))
