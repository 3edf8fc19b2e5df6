"""A run that is killed and resumed is the uninterrupted run, bit for bit; and what happens to bad checkpoints."""

from __future__ import annotations

import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import digit_data, proxyless, tiny

from oneshot import measure_table
from oneshot.errors import CheckpointError


def test_resume_in_the_middle_of_every_phase(tmp_path: Path) -> None:
    """Saved in one process after each of all 18 steps, and taken up again from every fifth of these files."""
    model = tiny()
    trainer = proxyless(model, checkpoint_dir=tmp_path, checkpoint_every=1)
    saved = {}
    step_of = trainer.save

    def keep(path: Path) -> None:
        step_of(path)
        saved[trainer.step] = shutil.copy(path, tmp_path / f"at{trainer.step}.ckpt")

    trainer.save = keep
    history = trainer.train()
    assert sorted(saved) == list(range(1, 19))
    for step in (1, 6, 9, 12, 17, 18):
        other = tiny(seed=99)
        again = proxyless(other)
        again.resume(saved[step])
        assert again.train() == history
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
        )


def test_an_interrupted_train_goes_on(tmp_path: Path) -> None:
    expected = proxyless(tiny()).train()
    calls = 0

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return trainer_loss(output, target)

    trainer = proxyless(tiny(), checkpoint_dir=tmp_path, checkpoint_every=1)
    trainer_loss, trainer.loss = trainer.loss, loss
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = proxyless(tiny(), checkpoint_dir=tmp_path)
    resumed.resume(tmp_path)
    assert resumed.train() == expected


def test_latency_table_is_resumed_and_not_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings_of = {"cost": None, "applied_hardware": "this-machine", "ref_latency": 0.1}
    # Rough times are as good here.
    rough = partial(measure_table, rounds=1, min_run_time=1e-4)
    monkeypatch.setattr("oneshot.trainers.base.measure_table", rough)
    trainer = proxyless(tiny(), checkpoint_dir=tmp_path, **settings_of)
    expected = trainer.train()
    table = trainer.latency_table
    assert (tmp_path / "latency_table.yaml").exists()
    monkeypatch.setattr("oneshot.trainers.base.measure_table", lambda *_, **__: pytest.fail("measured anew"))
    again = proxyless(tiny(), **settings_of)
    again.resume(tmp_path / "previous.ckpt")
    assert again.train() == expected
    assert again.latency_table == table


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    proxyless(tiny(), checkpoint_dir=folder).train()
    return folder


def test_bad_checkpoints_are_clear_errors_that_offer_the_previous_one(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    last = tmp_path / "last.ckpt"
    whole = last.read_bytes()
    trainer = proxyless(tiny())
    last.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"truncated.*previous checkpoint is there: resume\('.*previous\.ckpt'\)"):
        trainer.resume(tmp_path)
    last.write_bytes(b"hello")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        trainer.resume(tmp_path)
    torch.save({"a": 1}, last)
    with pytest.raises(CheckpointError, match="not a checkpoint of this library"):
        trainer.resume(tmp_path)
    torch.save({**torch.load(tmp_path / "previous.ckpt", weights_only=True), "version": 99}, last)
    with pytest.raises(CheckpointError, match="version 99"):
        trainer.resume(tmp_path)
    last.unlink()
    with pytest.raises(CheckpointError, match=r"no such checkpoint.*previous\.ckpt"):
        trainer.resume(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere.*no previous"):
        trainer.resume(tmp_path / "empty" / "nowhere")
    trainer.resume(tmp_path / "previous.ckpt")
    assert trainer.step == 12


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("evil-was-here",))


def test_a_pickle_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "oneshot-checkpoint", "version": 1, "model": Evil()}, "torch.ckpt")
    Path("plain.ckpt").write_bytes(pickle.dumps(Evil()))
    for name in ("torch.ckpt", "plain.ckpt"):
        with pytest.raises(CheckpointError):
            proxyless(tiny()).resume(name)
    assert not Path("evil-was-here").exists()


def test_another_model_or_setting_is_refused_and_nothing_is_applied(finished: Path) -> None:
    model = tiny()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(CheckpointError, match=r"batch_size 32 there and 16 here"):
        proxyless(model, batch_size=16).resume(finished)
    with pytest.raises(CheckpointError, match=r"seed 0 there and 4 here"):
        proxyless(model, seed=4).resume(finished)
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(CheckpointError, match=r"optimizer 'SGD' there and 'Adam' here"):
        proxyless(model, optimizer=adam).resume(finished)
    model.head = torch.nn.Linear(6, 11)
    with pytest.raises(CheckpointError, match=r"2 of another shape \['head.weight', 'head.bias'\]"):
        proxyless(model).resume(finished)
    model.two = torch.nn.Identity()
    with pytest.raises(CheckpointError, match="search space"):
        proxyless(model).resume(finished)
    kept = [p for n, p in model.named_parameters() if not n.startswith("head")]
    assert all(any(torch.equal(p, b) for b in before if b.shape == p.shape) for p in kept)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_checkpoints_are_refused_or_read(finished: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray((finished / "last.ckpt").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "mutated.ckpt"
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]) if data.draw(st.booleans()) else content)
    trainer = proxyless(tiny(), dataset=digit_data(64))
    try:
        trainer.resume(path)
    except CheckpointError:
        assert trainer.step == 0
    else:
        assert trainer.step == 18
