"""Searches that are disturbed on purpose, each in a process of its own, and what has to be left of them.

A run is a folder: ``run`` is the trainer's ``checkpoint_dir``, ``cache`` the user's cache, ``out`` what his script
writes at the end. A ``Fault`` says at which passing of which place what happens. The places are in the user's own
objects (loss, dataset, metrics, schedulers, a layer) and, for files, in the functions of the system.
"""

from __future__ import annotations

import errno
import functools
import io
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
import torch.distributed as dist
import torch.utils.tensorboard
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from tqdm import tqdm

import oneshot.trainers.base
from oneshot import LayerChoice, Trainer, measure_table
from oneshot.loggers import read_json_lines
from oneshot.pit import PIT
from oneshot.trainers import PITSuperNetTrainer, PITTrainer
from oneshot.trainers.checkpoint import read_checkpoint

HERE = Path(__file__).parent
RESULTS = ("out/arch.json", "out/history.json", "run/log.jsonl")
SECONDS = 60  # after which a run hangs
FULL = errno.ENOSPC


class UsersError(Exception):
    """What the user's own code raises."""


@dataclass(frozen=True)
class Fault:
    """At passing number ``at`` of ``place``: ``action``, in the process of that rank.

    ``again``: if that is an exception, the same process then calls ``train()`` again.
    """

    place: str
    at: int
    action: str
    rank: int = 0
    again: bool = False


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status (negative: by a signal), and the error that came out of it."""

    status: int
    kind: str = ""
    text: str = ""
    number: int | None = None
    file: str | None = None


def rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


class Places:
    """Counts the passings of each place, and lets the fault happen."""

    def __init__(self, root: Path, fault: Fault | None) -> None:
        self.root, self.fault, self.owner = root, fault, os.getpid()
        self.counts: Counter[str] = Counter()
        self.is_full = False

    def passed(self, place: str) -> bool:
        """Whether something other than a value has to be returned there: NaN, or half of what was to be written."""
        self.counts[place] += 1
        fault = self.fault
        if fault is None or (fault.place, fault.at) != (place, self.counts[place]) or fault.rank != rank():
            return False
        return self.act(fault)

    def act(self, fault: Fault) -> bool:
        if fault.action == "error":
            raise UsersError(f"of the user, in {fault.place} {fault.at}")
        if fault.action == "exit":
            os._exit(3)
        if fault.action == "full":
            self.is_full = True
            if not fault.place.endswith("write"):
                raise OSError(FULL, os.strerror(FULL))
        if fault.action == "group":
            os.killpg(os.getpgid(self.owner), signal.SIGTERM)
        numbers = {"kill": [signal.SIGKILL], "term": [signal.SIGTERM], "int": [signal.SIGINT]}
        for number in {**numbers, "twice": [signal.SIGTERM] * 2}.get(fault.action, []):
            os.kill(os.getpid(), number)
        return fault.action in ("nan", "full")

    def of_file(self, path: object, call: str) -> str:
        """``'run/fsync'``: the folder of this run that a file is in, and what is done to it."""
        with suppress(ValueError):
            return f"{Path(os.fsdecode(path)).relative_to(self.root).parts[0]}/{call}"  # type: ignore[arg-type]
        return f"elsewhere/{call}"


# ---- the user's objects ----------------------------------------------------------------------------------------


class Noisy(Dataset[Any]):
    """Augmentation that draws from all three global generators."""

    def __init__(self, data: TensorDataset, places: Places, place: str) -> None:
        self.data, self.targets = data, data.tensors[1]
        self.places, self.place = places, place

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, target = self.data[index]
        in_worker = os.getpid() != self.places.owner
        is_nan = self.places.passed("worker" if in_worker else self.place)
        noise = 0.1 * torch.rand_like(x) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return x + noise * (float("nan") if is_nan else 1.0), target


class Loss(nn.Module):
    """Cross-entropy, with a place in it and one in its backward pass."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places = places

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        if self.places.passed("loss"):
            output = output * float("nan")
        if output.requires_grad:
            output.register_hook(self._backward)
        return nn.functional.cross_entropy(output, target)

    def _backward(self, gradient: Tensor) -> None:
        self.places.passed("backward")


def sgd(places: Places) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)
        made.register_step_pre_hook(lambda *_: void(places.passed("optimizer")))
        made.register_step_post_hook(lambda *_: void(places.passed("optimizer")))
        return made

    return optimizer


def void(_: object) -> None:
    """A hook of an optimizer must return nothing."""


def schedule(places: Places, gamma: float) -> Callable[[torch.optim.Optimizer, int], Any]:
    """Its factory is called between two phases, and the scheduler itself in every step."""

    def factor(step: int) -> float:
        places.passed("scheduler")
        return gamma**step

    def factory(optimizer: torch.optim.Optimizer, steps: int) -> Any:
        places.passed("phase")
        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    return factory


def metric(places: Places) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    def accuracy(output: Tensor, target: Tensor) -> dict[str, Tensor]:
        places.passed("metric")
        return {"accuracy": (output.argmax(1) == target).float().mean()}

    return accuracy


tqdm.get_lock()  # likewise
DIGITS = tiny.digit_data(256)  # read once, before the processes of the runs are forked


def images(n: int = 256, first: int = 0) -> TensorDataset:
    x, y = DIGITS.tensors
    return TensorDataset(x[first : first + n], y[first : first + n])


def rows(n: int) -> TensorDataset:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(n))
    return TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())


def dense() -> PIT:
    torch.manual_seed(0)
    layers = (nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))
    return PIT(nn.Sequential(*layers), input_shape=(4,))


def mixed() -> PIT:
    torch.manual_seed(0)
    deep = nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 2))
    choice = LayerChoice({"plain": nn.Linear(8, 2), "deep": deep}, label="choice")
    return PIT(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), choice), input_shape=(4,))


def masks(network: PIT, **settings: Any) -> PITTrainer:
    return PITTrainer(network, **{"strength": 0.01, "mask_learning_rate": 0.05, **settings})


def masks_and_choices(network: PIT, **settings: Any) -> PITSuperNetTrainer:
    own = {"strength": 0.01, "mask_learning_rate": 0.05, "arch_learning_rate": 0.02}
    return PITSuperNetTrainer(network, **{**own, **settings})  # type: ignore[arg-type]


THIRD = {"finetune_epochs": 1}  # phase
# name -> network, trainer, its own settings
TRAINERS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Trainer], dict[str, Any]]] = {
    "proxyless": (tiny.tiny, tiny.proxyless, {}),
    "reinforce": (tiny.tiny, tiny.reinforce, {"rl_batch_size": 2}),
    "darts": (tiny.tiny, tiny.darts, {}),
    "supernet": (tiny.tiny, tiny.supernet, THIRD),
    "gumbel": (tiny.tiny, tiny.gumbel, THIRD),
    "pit": (dense, masks, {"targets": {"params": 40}, **THIRD}),
    "pit_supernet": (mixed, masks_and_choices, {"arch_fraction": 0.2, **THIRD}),
    "spos": (tiny.tiny, tiny.spos, {"generations": 2, "recalibration_samples": 16}),
    "latency": (tiny.tiny, tiny.proxyless, {"cost": None, "applied_hardware": "this-machine", "ref_latency": 0.1}),
}


def trainer_of(name: str, places: Places, model: nn.Module, **changes: Any) -> Trainer:
    """12 or 16 steps: 4 in an epoch, 1 of warm-up, 2 of search and perhaps 1 of fine-tuning."""
    network, build, own = TRAINERS[name]
    train, valid = (images(80), images(24, 80)) if network is tiny.tiny else (rows(80), rows(24))
    settings: dict[str, Any] = {
        "loss": Loss(places),
        "metrics": metric(places),
        "optimizer": sgd(places),
        "dataset": Noisy(train, places, "dataset"),
        "valid_dataset": Noisy(valid, places, "evaluate"),
        "scheduler": schedule(places, 0.9),
        "warmup_scheduler": schedule(places, 0.8),
        "checkpoint_dir": places.root / "run",
        "checkpoint_every": 2,
        "num_epochs": 2,
        "warmup_epochs": 1,
        "batch_size": 16,
        "workers": 0,
        "device": "cpu",
        "log_frequency": 1,
        "progress": False,
    }
    if dist.is_torchelastic_launched():
        settings["batch_size"] = 8  # of each of two processes
    if "finetune_epochs" in own:
        settings["finetune_scheduler"] = schedule(places, 0.7)
    return build(model, **{**settings, **own, **changes})


# ---- one run ---------------------------------------------------------------------------------------------------


def run(root: Path, name: str, fault: Fault | None = None, changes: Mapping[str, Any] | None = None) -> None:
    """The user's script: resume if there is a checkpoint, train, evaluate, export."""
    places = Places(root, fault)
    for folder in ("run", "cache", "out"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    os.environ["ONESHOT_CACHE"] = str(root / "cache")
    watch_files(places)
    watch_layers(places)
    if name == "latency":  # rough times are as good here
        oneshot.trainers.base.measure_table = functools.partial(measure_table, rounds=2, min_run_time=1e-4)
    model = TRAINERS[name][0]()
    trainer = trainer_of(name, places, model, **(changes or {}))
    if (root / "run" / "last.ckpt").exists():
        trainer.resume(root / "run")
    try:
        trainer.train()
    except (Exception, KeyboardInterrupt):
        if fault is None or not fault.again:
            raise
        places.is_full = False
        trainer.train()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)  # of the user's own script
    evaluated = trainer.evaluate()
    trainer.export(root / "out" / "arch.json")
    if trainer.is_first_process:
        torch.save(model.state_dict(), root / "out" / "final.pt")
        (root / "out" / "history.json").write_text(json.dumps([*trainer.history, evaluated]))
        (root / "counts.json").write_text(json.dumps(places.counts))


def watch_layers(places: Places) -> None:
    forward = tiny.Block.forward

    def counted(block: tiny.Block, x: Tensor) -> Tensor:
        places.passed("layer")
        return forward(block, x)

    tiny.Block.forward = counted  # type: ignore[method-assign]


def watch_files(places: Places) -> None:
    """Places in fsync, rename and link, and in every write to a file of bytes."""
    fsync, replace, link, plain_open = os.fsync, os.replace, os.link, io.open

    def counted_fsync(descriptor: int) -> None:
        places.passed(places.of_file(os.readlink(f"/proc/self/fd/{descriptor}"), "fsync"))
        fsync(descriptor)

    def counted_replace(source: Any, target: Any) -> None:
        places.passed(places.of_file(target, "replace"))
        replace(source, target)

    def counted_link(source: Any, target: Any) -> None:
        places.passed(places.of_file(target, "link"))
        link(source, target)

    class Counted(io.FileIO):
        def write(self, data: Any) -> int:
            place = places.of_file(self.name, "write")
            if "elsewhere" in place:
                return super().write(data)
            if places.is_full:
                raise OSError(FULL, os.strerror(FULL))
            is_half = places.passed(place)
            return super().write(memoryview(data).cast("B")[: len(data) // 2] if is_half else data)

    def counted_open(file: Any, mode: str = "r", buffering: int = -1, *others: Any, **named: Any) -> Any:
        if "b" not in mode or not set(mode) & set("wax+"):
            return plain_open(file, mode, buffering, *others, **named)
        raw = Counted(file, mode.replace("b", ""))
        if buffering == 0:
            return raw
        return io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)

    os.fsync, os.replace, os.link = counted_fsync, counted_replace, counted_link
    io.FileIO, io.open = Counted, counted_open  # type: ignore[misc,assignment]


# ---- what is done to it ----------------------------------------------------------------------------------------

STEP = ("loss", "backward", "optimizer", "layer", "dataset", "scheduler", "metric")
BETWEEN = ("phase", "evaluate")
WRITING = ("run/write", "run/fsync", "run/replace", "run/link")
EXPORT = ("out/write", "out/fsync", "out/replace")
# kind -> places, actions
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "killed in a step": (STEP, ("kill",)),
    "killed while writing": (WRITING, ("kill",)),
    "killed between steps": (BETWEEN, ("kill",)),
    "killed in the export": (EXPORT, ("kill",)),
    "told to end": ((*STEP, *WRITING, *BETWEEN), ("term", "twice")),
    "told to end, all processes": ((*STEP, *WRITING, *BETWEEN), ("group",)),
    "interrupted": ((*STEP, *WRITING, *BETWEEN), ("int",)),
    "disk full": ((*WRITING, *EXPORT), ("full",)),
    "the user's error": (("loss", "dataset", "metric", "scheduler", *BETWEEN), ("error",)),
    "an error in a worker": (("worker",), ("error",)),
    "a worker dies": (("worker",), ("kill", "exit")),
    "not a number": (("dataset",), ("nan",)),
}
IN_WORKERS = ("told to end, all processes", "an error in a worker", "a worker dies")
PER_WORKER = 64  # samples that each of two workers reads at least: 12 steps of 16, and some


def drawn(kind: str, counts: Mapping[str, int], rng: random.Random) -> Fault:
    """A fault of this kind, somewhere in a run with these passings."""
    places, actions = KINDS[kind]
    known = [place for place in places if place in counts or place == "worker"]
    place, action = rng.choice(known), rng.choice(actions)
    # Of the samples, those of the steps: some are read before the first one, and some after the last.
    low, high = {"nan": (20, 190)}.get(action, (1, PER_WORKER if place == "worker" else counts[place]))
    return Fault(place, rng.randint(low, high), action)


def workers_of(kind: str) -> int:
    return 2 if kind in IN_WORKERS else 0


# ---- processes -------------------------------------------------------------------------------------------------


def child(root: Path, name: str, fault: Fault | None, changes: Mapping[str, Any], environment: dict[str, str]) -> None:
    """The body of a process: what comes out of the run goes to ``error.json``."""
    with suppress(PermissionError):  # torchrun has done it
        os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of loader processes
    os.environ.update(environment)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    root.mkdir(parents=True, exist_ok=True)
    noise = os.open(root / "stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(noise, 2)
    warnings.simplefilter("error")
    tiny.digit_data = images
    try:
        run(root, name, fault, changes)
    except (Exception, KeyboardInterrupt) as error:
        traceback.print_exc()
        told = [type(error).__name__, str(error), getattr(error, "errno", None), getattr(error, "filename", None)]
        (root / f"error{rank()}.json").write_text(json.dumps(told))
        raise SystemExit(1) from error


@functools.cache
def server() -> Any:
    """A process that has imported everything and computed nothing; those of the runs are forked from it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), *([before] if before else [])])
    try:
        context.Process(target=void, args=(None,)).start()
    finally:
        os.environ.pop("PYTHONPATH")
        os.environ.update({} if before is None else {"PYTHONPATH": before})
    return context


def started(
    root: Path, name: str, fault: Fault | None, changes: Mapping[str, Any], environment: Mapping[str, str]
) -> Any:
    process = server().Process(target=child, args=(root, name, fault, dict(changes), dict(environment)))
    process.start()
    return process


def ended(process: Any, root: Path, of_rank: int = 0) -> Ended:
    """Wait for a process; one that hangs is killed, and an error here."""
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"hangs: {(root / 'stderr.txt').read_text()[-2000:]}")
    told = root / f"error{of_rank}.json"
    if not told.exists():
        return Ended(process.exitcode)
    kind, text, number, file = json.loads(told.read_text())
    told.unlink()
    return Ended(process.exitcode, kind, text, number, file)


def in_process(root: Path, name: str, fault: Fault | None = None, **changes: Any) -> Ended:
    """One run in a process of its own."""
    return ended(started(root, name, fault, changes, {}), root)


def in_two_processes(root: Path, name: str, fault: Fault | None = None) -> list[Ended]:
    """Two processes of one run, as torchrun starts them, but nobody who ends one when the other has failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "False", "GROUP_RANK": "0"}
    environments = [{**common, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(2)]
    processes = [started(root, name, fault, {}, environment) for environment in environments]
    return [ended(process, root, i) for i, process in enumerate(processes)]


def launched(root: Path, name: str, how: str, fault: Fault | None = None) -> int:
    """Two processes of one run, started by ``'torchrun'`` or by the trainer itself (``'ddp'``); the exit status."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if how == "torchrun" else []
    of_fault = json.dumps(None if fault is None else asdict(fault))
    command = [sys.executable, *launcher, str(HERE / "faults.py"), str(root), name, of_fault, how]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, check=False, timeout=2 * SECONDS, capture_output=True).returncode


# ---- what has to be left ---------------------------------------------------------------------------------------


def leftovers(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob(".*"))


def check_readable(root: Path) -> None:
    """Whatever has happened: a checkpoint, if there is one, is whole, and so is every line of the log."""
    for name in ("last.ckpt", "previous.ckpt", "best.ckpt"):
        if (root / "run" / name).exists():
            read_checkpoint(root / "run" / name)
    if (root / "run" / "log.jsonl").exists():
        read_json_lines(root / "run" / "log.jsonl")


def check_equal(root: Path, reference: Path) -> None:
    """The architecture, the loss curve and the weights are those of the undisturbed run, bit for bit."""
    for name in RESULTS:
        assert (root / name).read_bytes() == (reference / name).read_bytes(), f"{name} of {root}"
    one, other = (torch.load(folder / "out" / "final.pt", weights_only=True) for folder in (root, reference))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one), root
    assert leftovers(root) == []


def check_ended(fault: Fault, end: Ended, root: Path) -> None:
    """How a fault shows: by its own status, or as a clear error."""
    if fault.action in ("error", "full"):
        assert leftovers(root) == [], (fault, end)
    if fault.place == "worker" and fault.action in ("kill", "exit"):
        assert (end.status, end.kind) == (1, "WorkerDiedError"), (fault, end)
    elif fault.action == "kill":
        assert end.status == -signal.SIGKILL, (fault, end)
    elif fault.action in ("term", "twice", "group"):
        assert end.status in (-signal.SIGTERM, 128 + signal.SIGTERM), (fault, end)
    elif fault.action == "int":
        assert (end.status, end.kind) == (1, "KeyboardInterrupt"), (fault, end)
    elif fault.action == "full":
        assert (end.kind, end.number) == ("OSError", FULL), (fault, end)
        assert str(end.file).startswith(str(root)), (fault, end)
    elif fault.action == "nan":
        assert end.kind == "TrainingDivergedError", (fault, end)
        assert "step " in end.text, (fault, end)
    else:
        assert f"of the user, in {fault.place} {fault.at}" in end.text, (fault, end)


def disturbed(root: Path, name: str, faults: Sequence[Fault], **changes: Any) -> list[Ended]:
    """A run with these faults, one after the other, that is taken up again until it is done; how its parts ended."""
    ends = []
    for fault in faults:
        end = in_process(root, name, fault, **changes)
        if end.status != 0:  # a part of a run may be over before it comes to the place
            check_ended(fault, end, root)
            check_readable(root)
        ends.append(end)
    last = in_process(root, name, **changes)
    assert last.status == 0, (faults, last)
    return ends


def main() -> None:
    """One process of a run that ``launched`` starts."""
    root, name, of_fault, how = sys.argv[1:]
    fault = json.loads(of_fault)
    changes = {"devices": 2, "strategy": "ddp", "batch_size": 8} if how == "ddp" else {}
    child(Path(root), name, None if fault is None else Fault(**fault), changes, {})


if __name__ == "__main__":
    main()
