"""A search that is disturbed anywhere, and taken up again, is the undisturbed one, bit for bit.

A few faults of each kind; ``examples/fault_campaign.py`` makes as many as one likes.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults import (
    KINDS,
    TRAINERS,
    Ended,
    Fault,
    check_equal,
    check_readable,
    disturbed,
    drawn,
    in_process,
    in_two_processes,
    leftovers,
    workers_of,
)
from tiny import digit_data, proxyless, tiny
from torch.utils.data import TensorDataset

from oneshot import arch_parameters
from oneshot.errors import TrainingDivergedError
from oneshot.loggers import read_json_lines
from oneshot.trainers.checkpoint import read_checkpoint

NAMES = [name for name in TRAINERS if name != "latency"]
Reference = Callable[[str], Path]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The folder of the undisturbed run of a trainer."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def of(name: str) -> Path:
        root = folder / name
        if not root.exists():
            assert in_process(root, name) == Ended(0)
            assert leftovers(root) == []
        return root

    return of


def counts(root: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((root / "counts.json").read_text())
    return found


# Every kind and every trainer: 12 kinds, 8 trainers, 16 runs.
PLAN = [(kind, NAMES[i % len(NAMES)]) for i, kind in enumerate([*KINDS, *list(KINDS)[:4]])]


@pytest.mark.parametrize(("kind", "name"), PLAN)
def test_disturbed_twice_and_resumed(kind: str, name: str, reference: Reference, tmp_path: Path) -> None:
    rng = random.Random(f"{kind} {name}")
    faults = [drawn(kind, counts(reference(name)), rng) for _ in range(2)]
    ends = disturbed(tmp_path, name, faults, workers=workers_of(kind))
    assert ends[0].status != 0
    check_equal(tmp_path, reference(name))


def test_killed_before_there_is_a_checkpoint(reference: Reference, tmp_path: Path) -> None:
    """The first step is complete, and in the log; the first checkpoint comes after the second."""
    end = in_process(tmp_path, "supernet", Fault("optimizer", 3, "kill"))
    assert end == Ended(-signal.SIGKILL)
    assert not (tmp_path / "run" / "last.ckpt").exists()
    assert [line["step"] for line in read_json_lines(tmp_path / "run" / "log.jsonl")] == [1]
    assert disturbed(tmp_path, "supernet", []) == []
    check_equal(tmp_path, reference("supernet"))


def test_killed_between_any_two_calls_of_a_checkpoint(reference: Reference, tmp_path: Path) -> None:
    """The second checkpoint of a run; the first one has made the calls of fsync 1 to 3, and of rename 1."""
    calls = (
        ("fsync", 4),  # of the log
        ("fsync", 5),  # of the file
        ("link", 1),  # of the previous one
        ("replace", 2),  # of that link
        ("fsync", 6),  # of the folder
        ("replace", 3),  # of the file
        ("fsync", 7),  # of the folder
    )
    for i, (call, at) in enumerate(calls):
        root = tmp_path / str(i)
        assert in_process(root, "pit_supernet", Fault(f"run/{call}", at, "kill")) == Ended(-signal.SIGKILL)
        check_readable(root)
        assert read_checkpoint(root / "run" / "last.ckpt")["step"] == (4 if (call, at) == calls[-1] else 2)
    assert disturbed(root, "pit_supernet", []) == []
    check_equal(root, reference("pit_supernet"))


def test_sigterm_writes_a_checkpoint_and_another_worker_count_resumes(reference: Reference, tmp_path: Path) -> None:
    # Every step of the first two epochs has one call of the scheduler, and the factory makes one per phase.
    end = in_process(tmp_path, "proxyless", Fault("scheduler", 9, "term"), workers=2)
    assert end == Ended(128 + signal.SIGTERM)
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["last.ckpt", "log.jsonl", "previous.ckpt", "tensorboard"]
    assert read_checkpoint(tmp_path / "run")["step"] == 7
    assert read_json_lines(tmp_path / "run" / "log.jsonl")[-1]["step"] == 7
    assert disturbed(tmp_path, "proxyless", []) == []
    check_equal(tmp_path, reference("proxyless"))


@pytest.mark.parametrize(
    "fault",
    [Fault("layer", 30, "kill"), Fault("cache/replace", 5, "kill"), Fault("cache/fsync", 9, "term")],
    ids=lambda fault: fault.place,
)
def test_while_latencies_are_measured(fault: Fault, tmp_path: Path) -> None:
    """What was measured is kept, and with it an undisturbed run is the same one."""
    root, other = tmp_path / "disturbed", tmp_path / "undisturbed"
    (end,) = disturbed(root, "latency", [fault])
    assert end.status == -(signal.SIGTERM if fault.action == "term" else signal.SIGKILL)
    shutil.copytree(root / "cache", other / "cache")
    assert in_process(other, "latency") == Ended(0)
    check_equal(root, other)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("loss", 9, "error", again=True),
        Fault("evaluate", 30, "int", again=True),
        Fault("metric", 8, "error", again=True),
        Fault("run/replace", 3, "full", again=True),
    ],
    ids=lambda fault: fault.place,
)
def test_the_same_process_goes_on(fault: Fault, tmp_path: Path) -> None:
    name = {"loss": "darts", "evaluate": "reinforce", "metric": "gumbel"}.get(fault.place, "spos")
    assert in_process(tmp_path, name, Fault("run/fsync", 1, "kill")).status == -signal.SIGKILL
    assert in_process(tmp_path, name, fault) == Ended(0)
    records = [record["step"] for record in json.loads((tmp_path / "out" / "history.json").read_text())[:-1]]
    assert records == ([4, 8, 12, 16] if name == "gumbel" else [4, 8, 12])
    log = [line["step"] for line in read_json_lines(tmp_path / "run" / "log.jsonl") if line["kind"] == "step"]
    assert log == list(range(1, records[-1] + 1))
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(("sample", "what"), [(5, "weights"), (100, "alphas")])
def test_a_bad_sample_stops_every_run_at_its_step(sample: int, what: str, tmp_path: Path) -> None:
    """Its batch moves nothing; the error says which step it was, and where to go on. Sample 100 is for the alphas."""
    images, targets = digit_data().tensors
    images = images.clone()
    images[sample] = float("nan")
    data = TensorDataset(images, targets)
    texts = []
    for attempt in range(2):
        model = tiny()
        trainer = proxyless(model, dataset=data, checkpoint_dir=tmp_path, checkpoint_every=1)
        if attempt:
            trainer.resume(tmp_path)
        with pytest.raises(TrainingDivergedError) as error:
            trainer.train()
        texts.append(str(error.value))
        state = read_checkpoint(tmp_path)
        assert texts[-1].startswith(f"step {state['step']} ({trainer.phase}, ")
        assert f"Last good checkpoint: resume({str(tmp_path / 'last.ckpt')!r})" in texts[-1]
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, state["model"][name])}
        alphas = {name for name, p in model.named_parameters() if any(p is a for a in arch_parameters(model))}
        assert not (moved if what == "weights" else moved & alphas)
    assert texts[0] == texts[1]


def test_two_processes_of_which_one_dies(tmp_path: Path) -> None:
    """Nobody ends the other one: it has to notice by itself. Then both are told to end by one that is."""
    root, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    assert in_two_processes(undisturbed, "proxyless") == [Ended(0)] * 2
    for rank, at in ((1, 7), (0, 9)):
        ends = in_two_processes(root, "proxyless", Fault("backward", at, "kill", rank=rank))
        assert ends[rank] == Ended(-signal.SIGKILL)
        assert ends[1 - rank].status == 1
        check_readable(root)
    ends = in_two_processes(root, "proxyless", Fault("backward", 2, "term", rank=1))
    assert [end.status for end in ends] == [128 + signal.SIGTERM, 0]
    assert in_two_processes(root, "proxyless") == [Ended(0)] * 2
    check_equal(root, undisturbed)
