"""The design's rules about the code itself: who may import whom, and what an import may do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

import oneshot

ROOT = Path(__file__).parent.parent
# Lower layers first; a layer imports from itself and from those before it.
LAYERS = (
    {"errors"},
    {"files"},
    {"losses", "loggers", "data"},
    {"mutables"},
    {"graph"},
    {"cost", "export"},
    {"pit"},
    {"regularizers"},
    {"trainers"},
    {"sweep"},
    {"cli"},
    {"__main__"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules(package: str) -> dict[str, Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def imports(name: str, path: Path) -> set[str]:
    """Absolute names of the modules that a module imports."""
    found = set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
            assert all(alias.name != "*" for alias in node.names), f"{path}: import *"
    return found


def test_every_part_of_the_library_has_a_layer() -> None:
    parts = {p.stem for p in (ROOT / "oneshot").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert parts - {"__init__"} == set(RANK)


def test_imports_go_downwards_and_have_no_cycle() -> None:
    known = modules("oneshot")
    graph = nx.DiGraph()
    for name, path in known.items():
        for target in imports(name, path) & set(known):
            parts, others = name.split("."), target.split(".")
            if len(parts) == 1 or len(others) == 1:
                continue
            # A package's __init__ re-exports its modules; what matters is which of these needs which.
            if path.name != "__init__.py" and target != name and known[target].name != "__init__.py":
                graph.add_edge(name, target)
            assert RANK[others[1]] <= RANK[parts[1]], f"{name} imports {target}, which is above it"
            same_rank = RANK[others[1]] == RANK[parts[1]] and others[1] != parts[1]
            assert not same_rank or (parts[1], others[1]) == ("export", "cost"), (
                f"{name} imports its neighbour {target}"
            )
    assert graph.number_of_edges() > 20
    assert list(nx.simple_cycles(graph)) == []


def test_the_library_does_not_know_its_spaces_and_examples() -> None:
    for name, path in modules("oneshot").items():
        assert not {i.split(".")[0] for i in imports(name, path)} & {"search_spaces", "examples"}, name


def test_spaces_use_public_names_only() -> None:
    spaces = modules("search_spaces")
    assert spaces
    for name, path in spaces.items():
        used = {i for i in imports(name, path) if i.split(".")[0] == "oneshot"}
        public = {"oneshot", "oneshot.errors"} | {f"oneshot.{n}" for n in vars(oneshot)}
        assert used <= public | {i for i in used if i.startswith("oneshot.errors.")}, name


def test_public_names_are_documented() -> None:
    names = [n for n, value in vars(oneshot).items() if callable(value) and not n.startswith("_")]
    assert len(names) > 20
    undocumented = [n for n in names if not (getattr(oneshot, n).__doc__ or "").strip()]
    assert undocumented == []


@pytest.mark.parametrize("blocked", [("tensorboard", "mlxtend", "torchvision", "PIL", "matplotlib", "pandas")])
def test_import_needs_no_extra_and_does_nothing_else(blocked: tuple[str, ...], tmp_path: Path) -> None:
    """In a process of its own: the extras cannot be imported, nothing is printed, written or logged."""
    code = f"""
import sys
for name in {blocked!r}: sys.modules[name] = None
import logging, random, torch
before = (list(logging.root.handlers), random.getstate(), torch.get_rng_state().tolist())
import oneshot, search_spaces.mobilenet
assert before == (list(logging.root.handlers), random.getstate(), torch.get_rng_state().tolist())
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
