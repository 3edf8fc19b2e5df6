"""Damaged checkpoints: a run that goes on, or a CheckpointError that names the file, and then nothing has changed."""

from __future__ import annotations

import copy
import io
import pickle
import pickletools
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from fuzzing import (
    archive_of,
    boundaries,
    damaged_archive,
    damaged_bytes,
    damaged_pickle,
    examples,
    judged,
    laughing_pickle,
    members_of,
    randoms,
)
from hypothesis import given
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from oneshot import DARTSTrainer, GroupLasso, LayerChoice, ProxylessTrainer, SPOSTrainer, SuperNetTrainer
from oneshot.errors import CheckpointError, OneshotError
from oneshot.trainers import Trainer
from oneshot.trainers.checkpoint import read_checkpoint

X = torch.linspace(-1, 1, 48).reshape(12, 4)
DATA = TensorDataset(X, (X.sum(1) > 0).long())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = LayerChoice({"wide": nn.Linear(4, 4), "skip": nn.Identity()}, label="one")
        self.norm = nn.BatchNorm1d(4)
        self.two = LayerChoice([nn.ReLU(), nn.Tanh()], label="two")
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.norm(self.one(x))))


def common(model: nn.Module, folder: Path | None) -> dict[str, Any]:
    """An epoch of warm-up and two of search, of two steps each."""
    return {
        "loss": nn.CrossEntropyLoss(),
        "metrics": lambda output, target: (output.argmax(1) == target).float().mean(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        "scheduler": lambda optimizer, n: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n),
        "num_epochs": 2,
        "warmup_epochs": 1,
        "dataset": DATA,
        "arch_fraction": 0.4,
        "batch_size": 3,
        "workers": 0,
        "device": "cpu",
        "dummy_input": (1, 4),
        "progress": False,
        "checkpoint_dir": folder,
        "checkpoint_every": 1,
    }


def proxyless(folder: Path | None = None) -> Trainer:
    model = torch.manual_seed(0) and Net()
    regularizer = GroupLasso("rows", 1e-3, relative=True)
    settings = {"ref_latency": 10, "arch_every": 2, "cost": "params", "grad_reg_loss_params": {"lambda": 0.5}}
    return ProxylessTrainer(model, **{**common(model, folder), **settings, "regularizer": regularizer})


def supernet(folder: Path | None = None) -> Trainer:
    model = torch.manual_seed(0) and Net()
    adam = torch.optim.AdamW(model.parameters(), lr=0.01)
    milestones = partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[2])
    settings = {"targets": {"params": 24}, "optimizer": adam, "ema_decay": 0.9, "scheduler": lambda o, n: milestones(o)}
    # 24 parameters: the norm and the head have 8 + 10, so the wide layer with its 20 is too much
    return SuperNetTrainer(model, **{**common(model, folder), "cost": "params", "valid_dataset": DATA, **settings})


def darts(folder: Path | None = None) -> Trainer:
    model = torch.manual_seed(0) and Net()
    return DARTSTrainer(
        model, **{**common(model, folder), "cost": "params", "ref_latency": 10, "grad_reg_loss_params": {"lambda": 0.5}}
    )


def spos(folder: Path | None = None) -> Trainer:
    model = torch.manual_seed(0) and Net()
    settings = {"population": 2, "generations": 1, "parents": 1, "valid_dataset": DATA, "recalibration_samples": 4}
    return SPOSTrainer(model, **{**common(model, folder), "cost": "params", **settings})


MAKERS: tuple[Callable[..., Trainer], ...] = (proxyless, supernet, darts, spos)


class Sound:
    """A checkpoint of a run one step before its end, and a trainer that has not begun."""

    def __init__(self, make: Callable[..., Trainer], folder: Path) -> None:
        self.make, self.trainer = make, make()
        at_work = make(folder)
        at_work.train()
        # spos writes more after its last step: the last but one file is of the middle of its evolution
        self.data = (folder / "previous.ckpt").read_bytes()
        self.members = members_of(self.data)
        (self.pickled,) = (name for name in self.members if name.endswith("data.pkl"))
        self.starts = boundaries(self.members[self.pickled])
        self.state = torch.load(io.BytesIO(self.data), weights_only=True)
        self.before = _state_of(self.trainer)

    def check(self, path: Path, random: Random) -> None:
        resumed = judged(path, lambda: self.trainer.resume(path) or True)
        if resumed is None:
            assert equal(_state_of(self.trainer), self.before), "a refused checkpoint was applied"
            return
        if random.randrange(12) == 0:
            with suppress(OneshotError):
                self.trainer.train()
        self.trainer = self.make()


def _state_of(trainer: Trainer) -> list[Any]:
    optimizers = (trainer.optimizer, trainer.arch_optimizer, trainer.finetune_optimizer)
    return copy.deepcopy(
        [
            trainer.model.state_dict(),
            *(optimizer.state_dict() for optimizer in optimizers),
            [part.state_dict() for part in trainer.regularizer.parts] if trainer.regularizer else [],
            trainer.targets.state_dict(),
            trainer.generator.get_state(),
            [trainer.step, trainer.arch_batches, trainer.history, trainer._ended, trainer._argmax],
        ]
    )


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[Sound]:
    return [Sound(make, tmp_path_factory.mktemp(make.__name__)) for make in MAKERS]


# ---- damaged states ------------------------------------------------------------------------------------------------


def _deep(n: int) -> Any:
    value: Any = []
    for _ in range(n):
        value = [value]
    return value


VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 7, 10**6, 2**31, 2**53, 2**63, -(2**63), 2**70, 10**300, 0.5, -0.5, 1e300),
    *(
        float("nan"),
        float("inf"),
        -float("inf"),
        "",
        "x",
        "warmup",
        "search",
        "nan",
        "x" * 10**5,
        b"x",
        [],
        {},
        (),
        [[]],
    ),
    *({"a": 1}, {1: 2}, {None: 1}, {1.5: 2}, {(1, 2): 3}, OrderedDict(a=1), Counter({3: 1}), {1, 2}, 1j, _deep(60)),
    *(_deep(100), torch.Size([2]), torch.float32, torch.device("cpu"), torch.device("meta"), bytearray(b"x")),
    *(
        torch.zeros(0),
        torch.zeros(()),
        torch.zeros(3),
        torch.zeros(4, 4),
        torch.full((4,), float("nan")),
        torch.ones(2) > 0,
    ),
    *(torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.complex64), torch.zeros(4, dtype=torch.bfloat16)),
    *(
        torch.zeros(5056, dtype=torch.uint8),
        torch.full((5056,), 255, dtype=torch.uint8),
        torch.zeros(16, dtype=torch.uint8),
    ),
    *(
        torch.zeros(1).expand(10**9),
        torch.zeros(1).expand(4, 4),
        torch.zeros(4, 4).to_sparse(),
        torch.zeros(4, device="meta"),
    ),
    *(nn.Parameter(torch.zeros(4)), torch.zeros(4, requires_grad=True), torch.zeros(4, dtype=torch.uint16)),
]


def _damaged_tensor(tensor: Tensor, random: Random) -> Any:
    changed = tensor.clone()
    if changed.numel() and random.randrange(2):
        place = random.randrange(changed.numel())
        values = (float("nan"), float("inf"), 1e30, -1, 0) if changed.is_floating_point() else (0, 1, 255, 77)
        changed.view(-1)[place] = random.choice(values)
        return changed
    longer = changed.repeat(2, *[1] * (changed.dim() - 1)) if changed.dim() else changed
    shorter = changed[:0] if changed.dim() else changed
    others = (changed[..., None], longer, shorter, changed.double(), changed.long(), changed.to("meta"))
    return random.choice([*others, changed.tolist(), None])


def _containers(tree: Any) -> list[Any]:
    inner = list(tree.values()) if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else []
    own = [tree] if isinstance(tree, dict | list) and len(tree) else []
    return own + [found for one in inner for found in _containers(one)]


def damaged_state(state: dict[str, Any], random: Random) -> dict[str, Any]:
    """One to three of: a value of another kind, another number, a key less, more or of another name, two exchanged."""
    state = copy.deepcopy(state)
    own = [c for key, part in state.items() for c in _containers(part)]
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        container = random.choice([state, state, *own]) if random.randrange(3) else random.choice([state, *own[-40:]])
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        if not keys:
            continue
        key, kind = random.choice(keys), random.randrange(12)
        value = container[key]
        if kind < 3 and isinstance(value, Tensor):
            container[key] = _damaged_tensor(value, random)
        elif kind < 3 and type(value) in (int, float):
            container[key] = random.choice(
                [-value, value + 1, value - 1, value * 10**9, float(value), str(value), bool(value)]
            )
        elif kind < 8:
            container[key] = random.choice(VALUES)
        elif kind == 8:
            del container[key]
        elif kind == 9 and isinstance(container, dict):
            container[random.choice(["", "x", 0, 10**6, -1, None, *keys])] = container.pop(key)
        elif kind == 10:
            container[key], other = container[random.choice(keys)], value
            container[random.choice(keys)] = other
        elif isinstance(container, dict):
            container[random.choice(["x", "", 5, None, "y" * 10**4])] = random.choice([*VALUES, value])
        else:
            container.append(copy.deepcopy(value))
    return state


@examples(500)
@given(random=randoms)
def test_a_damaged_state(sound: list[Sound], tmp_path: Path, random: Random) -> None:
    one, path = random.choice(sound), tmp_path / "damaged.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that sparse tensors are in beta
        torch.save(damaged_state(one.state, random), path)
    one.check(path, random)


@examples(350)
@given(random=randoms)
def test_a_damaged_pickle_in_a_sound_archive(
    sound: list[Sound], tmp_path: Path, random: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, path = random.choice(sound), tmp_path / "damaged.ckpt"
    whole = one.members[one.pickled]
    data = damaged_pickle(whole, one.starts, [other.members[other.pickled] for other in sound], random)
    path.write_bytes(archive_of({**one.members, one.pickled: data}))
    one.check(path, random)


@examples(200)
@given(random=randoms)
def test_a_damaged_archive(sound: list[Sound], tmp_path: Path, random: Random) -> None:
    one, path = random.choice(sound), tmp_path / "damaged.ckpt"
    data = damaged_archive(one.members, random) if random.randrange(2) else one.data
    path.write_bytes(data if data != one.data else damaged_bytes(data, [other.data for other in sound], random))
    one.check(path, random)


def test_the_sound_ones_are_taken_up(sound: list[Sound], tmp_path: Path) -> None:
    for one in sound:
        path = tmp_path / "sound.ckpt"
        path.write_bytes(one.data)
        trainer = one.make()
        trainer.resume(path)
        assert 0 < trainer.step <= 6
        assert len(trainer.train()) == 3
        torch.save(one.state, path)
        one.make().resume(path)


# ---- what was found, by hand ---------------------------------------------------------------------------------------


def refused(path: Path, words: str, one: Sound) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        one.trainer.resume(path)
    assert str(caught.value).startswith(str(path))
    assert equal(_state_of(one.trainer), one.before)


def changed(state: dict[str, Any], where: tuple[Any, ...], value: Any) -> dict[str, Any]:
    state = copy.deepcopy(state)
    at: Any = state
    for key in where[:-1]:
        at = at[key]
    if value is KeyError:
        del at[where[-1]]
    else:
        at[where[-1]] = value
    return state


NAN = float("nan")
CHANGES: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "no targets": (("targets",), KeyError, r"incomplete, without \['targets'\]"),
    "no regularizers": (("regularizers",), KeyError, "incomplete, without"),
    "a step before the first": (("step",), -1, "step is -1; a whole number of at least 0"),
    "a step of text": (("step",), "5", "step is '5'; a whole number"),
    "no number in the model": (
        ("model", "head.bias"),
        torch.tensor([0.0, NAN]),
        "head.bias has a number that is not fin",
    ),
    "half precision": (("model", "head.bias"), torch.zeros(2).half(), "head.bias is a tensor of torch.float16"),
    "a number for a tensor": (("model", "head.bias"), 1.0, r"1 of another shape \['head.bias'\]"),
    "momentum of another shape": (("optimizer", "state", 0, "momentum_buffer"), torch.zeros(7), "state of parameter 0"),
    "momentum that is none": (("optimizer", "state", 0, "momentum_buffer"), "x", "momentum_buffer is 'x'"),
    "other memory": (("optimizer", "state", 0), {"sum": 1.0}, "the optimizer has .'momentum_buffer'. there"),
    "a parameter too many": (("optimizer", "state", 99), {"momentum_buffer": torch.zeros(1)}, "state of parameter 99"),
    "a rate that is none": (("optimizer", "param_groups", 0, "lr"), "0.1", "lr is '0.1'; a finite number"),
    "a rate below 0": (("optimizer", "param_groups", 0, "lr"), -1.0, "lr is -1.0; a number of at least 0"),
    "no rate": (("optimizer", "param_groups", 0, "lr"), KeyError, r"group 0: without \['lr'\]"),
    "a parameter twice": (("optimizer", "param_groups", 0, "params", 0), 1, "groups of"),
    "a generator of 16 bytes": (
        ("generator",),
        torch.zeros(16, dtype=torch.uint8),
        "not the state of a random generator",
    ),
    "a history of numbers": (("history",), [1, 2], r"history\[0\] is 1; a mapping"),
    "an epoch twice": (("history", 0, "epoch"), 1, "do not follow each other"),
    "an unknown phase": (("history", 0, "phase"), "rest", "phase is 'rest'; one of"),
    "an end of an unknown phase": (("ended",), {"rest": 1}, "ended: a key is 'rest'"),
    "an end too late": (("ended", "warmup"), 10**9, "warmup after 1000000000 epochs, the history has 1"),
    "a log before its start": (("log_size",), -5, "log_size is -5"),
    "no averages": (
        ("processes", 0, "meters"),
        {"sums": {"loss": 1.0}, "counts": {"loss": 0}},
        "loss is 0; a whole number of at least 1",
    ),
    "regularizers too many": (("regularizers",), [{}, {}, {}], "states of 3, here are 1"),
    "a regularizer of text": (("regularizers", 0, "factor"), "x", "factor is 'x'"),
    "labels of another model": (("argmax",), {"three": 0}, "argmax: other labels"),
    "a table of numbers": (("latency_table",), {"anywhere": 3}, "latency_table: without"),
    "a baseline of text": (("own", "baseline"), "x", "baseline is 'x'"),
    "a version of text": (("version",), "1", "version '1', this library reads 1"),
    "a huge version": (("version",), 2**60, "version 1152921504606846976"),
    "tensors in the settings": (("settings", "seed"), torch.zeros(3), "seed is a tensor"),
    "a share above 1": (("progress",), 1.5, "progress is 1.5; a number from 0 to 1"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_state_of_wrong_kinds(case: str, sound: list[Sound], tmp_path: Path) -> None:
    where, value, words = CHANGES[case]
    path = tmp_path / "wrong.ckpt"
    torch.save(changed(sound[0].state, where, value), path)
    refused(path, words, sound[0])


def test_a_scheduler_of_wrong_kinds_is_found_before_the_first_step(sound: list[Sound], tmp_path: Path) -> None:
    for name, value in (("T_max", 0), ("base_lrs", []), ("last_epoch", 10**9), ("eta_min", "x")):
        path = tmp_path / "wrong.ckpt"
        torch.save(changed(sound[0].state, ("scheduler", name), value), path)
        trainer = proxyless()
        trainer.resume(path)
        before = copy.deepcopy(trainer.model.state_dict())
        with pytest.raises(CheckpointError, match=f"scheduler: {name}"):
            trainer.train()
        assert equal(dict(trainer.model.state_dict()), dict(before))


def resaved(one: Sound, data: bytes, path: Path, **members: bytes) -> None:
    path.write_bytes(archive_of({**one.members, one.pickled: data, **members}))


class Claims:
    """Pickled as a call of torch's function for tensors, over a storage of four bytes."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes

    def __reduce__(self) -> tuple[Any, ...]:
        storage = torch.zeros(1).untyped_storage()
        return torch._utils._rebuild_tensor_v2, (
            storage,
            0,
            self.sizes,
            tuple(1 for _ in self.sizes),
            False,
            OrderedDict(),
        )


def test_a_tensor_that_claims_more_than_the_file_has(sound: list[Sound], tmp_path: Path) -> None:
    """10**12 numbers are 4 TB: torch would ask for the memory."""
    one = sound[0]
    program = one.members[one.pickled]
    ops = [(op.name, arg, at) for op, arg, at in pickletools.genops(program)]
    k = next(k for k, (name, _, _) in enumerate(ops) if name == "BINPERSID")
    # after the storage: its offset, its size as a tuple
    at = ops[k + 1][2]
    offset_end = ops[k + 2][2]
    path = tmp_path / "claims.ckpt"
    resaved(one, program[:at] + b"\x8a\x06\x00\x00\x00\x00\x00\x10" + program[offset_end:], path)
    refused(path, "not a checkpoint .a tensor of", one)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (b"cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R", "names 'builtins.bytearray'"),
        (b"ctorch\nTensor\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R", "names 'torch.Tensor'"),
        (b"}" + b")" + b"\x85" * 100_000 + b"Ns", "a dict with a tuple as key"),
        (laughing_pickle(60), "lists in lists, deeper than 50 or without an end"),
        (b"]q\xf0h\xf0a", "lists in lists, deeper than 50 or without an end"),
        (b"\x8a\xff" + b"\x7f" * 255, "an integer of 2039 bits"),
        (b"ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb", "other attributes than _metadata"),
        (b"X\xff\xff\xff\x7f", "2,147,483,647 bytes are claimed"),
        (b"cposix\nsystem\nX\x01\x00\x00\x00a\x85R", "names 'posix.system'"),
    ],
)
def test_a_hostile_pickle(part: bytes, words: str, sound: list[Sound], tmp_path: Path) -> None:
    """Put in as the value of a key "x" of the state: each is refused before torch reads it."""
    one, path = sound[0], tmp_path / "hostile.ckpt"
    program = one.members[one.pickled]
    assert program[:3] == b"\x80\x02}"
    resaved(one, program[:3] + b"X\x01\x00\x00\x00x" + part + b"s" + program[3:], path)
    refused(path, words, one)


def test_archives_that_torch_does_not_write(sound: list[Sound], tmp_path: Path) -> None:
    one, path = sound[0], tmp_path / "odd.ckpt"
    name = next(name for name in one.members if "/data/" in name)
    cases: list[tuple[bytes, str]] = [
        (archive_of(one.members, packed=name), "compressed or encrypted"),
        (archive_of({**one.members, one.pickled.upper(): b""}), "two members of the archive have one name"),
        (archive_of({**one.members, "other/data.pkl": b""}), "not one of torch"),
        (archive_of({k: v for k, v in one.members.items() if k != name}), "bytes, the archive has None"),
        (archive_of({**one.members, name: one.members[name] + b"x"}), "bytes, the archive has"),
        (archive_of({**one.members, one.pickled: pickle.dumps({}, 4)}), "torch.save writes protocol 2"),
        (archive_of({}), "not one of torch"),
    ]
    for data, words in cases:
        path.write_bytes(data)
        refused(path, words, one)


def test_members_that_lie_on_one_another(sound: list[Sound], tmp_path: Path) -> None:
    """A thousand entries of the directory for one member: all of it together is more than the file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(100_000))
        info = archive.infolist()[0]
        for k in range(1000):
            again = copy.copy(info)
            again.filename = f"archive/data/{k}"
            archive.filelist.append(again)
    path = tmp_path / "overlapping.ckpt"
    path.write_bytes(file.getvalue())
    refused(path, "claim more than", sound[0])


def test_a_checkpoint_that_is_written_is_read(sound: list[Sound], tmp_path: Path) -> None:
    for optimizer in (
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.RMSprop,
        torch.optim.Adafactor,
        torch.optim.Adagrad,
    ):

        def made(optimizer: Any = optimizer) -> Trainer:
            model = torch.manual_seed(0) and Net()
            own = {"optimizer": optimizer(model.parameters(), lr=0.01), "warmup_epochs": 0, "cost": "params"}
            return SuperNetTrainer(model, **{**common(model, None), **own})

        trainer, path = made(), tmp_path / "own.ckpt"
        trainer.train()
        trainer.save(path)
        again = made()
        again.resume(path)
        assert equal(again.optimizer.state_dict(), trainer.optimizer.state_dict())
        assert read_checkpoint(path)["step"] == 4
