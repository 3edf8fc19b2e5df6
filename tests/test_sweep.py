"""Sweeps against single runs, brute force, and counts by hand."""

from __future__ import annotations

import csv
import json
import math
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import digit_data, supernet, tiny
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from oneshot import fixed
from oneshot.errors import (
    CheckpointError,
    ConfigurationError,
    InfeasibleTargetError,
    InputTypeError,
    OneshotError,
    TrainingDivergedError,
)
from oneshot.loggers import read_json_lines
from oneshot.pit import PIT
from oneshot.sweep import Front, FrontRow, dominated, sweep
from oneshot.sweep.parallel import run_all
from oneshot.sweep.points import folder_name
from oneshot.trainers import PITTrainer

STRENGTHS = (0.0, 1e-3, 0.1)
Factory = Callable[..., PITTrainer]


def rows(n: int, seed: int) -> TensorDataset:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())


def correct(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    return {"acc": (output.argmax(1) == target).float().mean()}


class Loss(nn.Module):
    """Counts the training batches (16 samples; validation has 20 each) and does something in one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.at, self.error = 0, -1, KeyboardInterrupt

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        if len(target) == 16 and torch.is_grad_enabled():
            self.calls += 1
            if self.calls == self.at:
                raise self.error
        return nn.functional.cross_entropy(output, target)


def factory(loss: nn.Module | None = None, **changes: Any) -> Factory:
    """8 hidden units of 4 + 1 + 2 = 7 parameters, and 2 biases: 7 n + 2, from 9 to 58; 2 + 2 epochs of 6 steps."""

    def make(checkpoint_dir: Path, **point: Any) -> PITTrainer:
        pit = PIT(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), input_shape=(4,))
        settings: dict[str, Any] = {
            "loss": loss or nn.CrossEntropyLoss(),
            "metrics": correct,
            "optimizer": torch.optim.SGD(pit.parameters(), lr=0.1, momentum=0.9),
            "num_epochs": 2,
            "warmup_epochs": 2,
            "dataset": rows(96, 1),
            "valid_dataset": rows(60, 2),
            "batch_size": 16,
            "workers": 0,
            "device": "cpu",
            "mask_learning_rate": 0.05,
            "progress": False,
            "checkpoint_dir": checkpoint_dir,
        }
        return PITTrainer(pit, **{**settings, **changes, **point})

    return make


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("the factory must not be called")


def content(front: Front) -> list[tuple[Any, ...]]:
    return [(r.point, r.costs, r.metrics, r.dominated, r.error, r.folder.name) for r in front.rows]


# ---- which rows are dominated --------------------------------------------------------------------------------------

numbers = st.one_of(st.integers(0, 3).map(float), st.just(math.nan), st.just(math.inf), st.just(-math.inf))


@given(st.integers(1, 3).flatmap(lambda n: st.lists(st.tuples(*[numbers] * n), max_size=7)))
def test_dominated_is_what_the_definition_says(values: list[tuple[float, ...]]) -> None:
    order = [-math.inf, 0.0, 1.0, 2.0, 3.0, math.inf]  # and then NaN
    ranks = [[order.index(v) if v == v else len(order) for v in row] for row in values]
    expected = []
    for mine in ranks:
        beaten = False
        for other in ranks:
            differences = [b - a for a, b in zip(mine, other, strict=True)]
            beaten |= max(differences) <= 0 and min(differences) < 0
        expected.append(beaten)
    assert dominated(values) == expected
    assert not values or not all(expected)


def test_rows_of_different_length() -> None:
    with pytest.raises(ConfigurationError, match=r"\[1, 2\] columns"):
        dominated([(1.0,), (1.0, 2.0)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Front]:
    """A sweep that nobody disturbs; its directory is only read."""
    place = tmp_path_factory.mktemp("sweep") / "deep" / "er"
    return place, sweep(factory(), directory=place, strengths=STRENGTHS, monitor="acc")


# ---- a sweep -------------------------------------------------------------------------------------------------------


def test_every_point_is_what_a_run_of_its_own_finds(tmp_path: Path) -> None:
    def make(checkpoint_dir: Path, **point: Any) -> PITTrainer:
        torch.manual_seed(7)
        return factory()(checkpoint_dir, **point)

    test = rows(50, 3)
    front = sweep(make, directory=tmp_path, strengths=STRENGTHS, monitor="acc", evaluate_on=test)
    assert [row.point for row in front.rows] == [{"strength": s} for s in STRENGTHS]
    for row in front.rows:
        alone = make(tmp_path / "alone" / row.folder.name, **row.point)
        alone.train()
        net = alone.export_model().eval()
        assert row.costs == {"params": sum(p.numel() for p in net.parameters())}
        with torch.no_grad():
            right = int((net(test.tensors[0]).argmax(1) == test.tensors[1]).sum())
        assert row.metrics["acc"] == pytest.approx(right / 50)
        rebuilt = fixed(make(tmp_path / "x", **row.point).model, row.folder / "arch.json")
        assert [p.shape for p in rebuilt.parameters()] == [p.shape for p in net.parameters()]
        epochs = [r for r in read_json_lines(row.folder / "log.jsonl") if r["kind"] == "epoch"]
        assert [r["phase"] for r in epochs] == ["search", "search"]  # the warm-up was another's
        assert [{"kind": "epoch", **r} for r in alone.history[2:]] == epochs
        again = make(row.folder, **row.point)  # as the documentation says
        again.resume(row.folder)
        assert all(torch.equal(a, b) for a, b in zip(again.export_model().parameters(), net.parameters(), strict=True))
    sizes = [row.costs["params"] for row in front.rows]
    assert sizes[0] == 58 > sizes[2]


def test_files_hold_the_rows(whole: tuple[Path, Front]) -> None:
    place, front = whole
    with (place / "front.csv").open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    for line, row in zip(read, front.rows, strict=True):
        assert float(line["strength"]) == row.point["strength"]
        assert float(line["params"]) == row.costs["params"]
        assert (float(line["loss"]), float(line["acc"])) == (row.metrics["loss"], row.metrics["acc"])
        assert (line["dominated"], line["folder"]) == (str(row.dominated), row.folder.name)
    data = json.loads((place / "front.json").read_text(encoding="utf-8"))
    assert (data["monitor"], data["larger_is_better"], data["costs"]) == ("acc", True, ["params"])
    assert [(r["point"], r["costs"], r["metrics"], r["dominated"], r["error"], r["folder"]) for r in data["rows"]] == (
        content(front)
    )
    names = {"front.csv", "front.json", "sweep.json", "warmup.ckpt", "warmup", *(r.folder.name for r in front.rows)}
    assert {p.name for p in place.iterdir()} == names
    assert str(front).count("\n") == 1 + len(STRENGTHS)


def test_one_warmup_for_all_points_and_nothing_is_done_twice(tmp_path: Path) -> None:
    loss = Loss()
    run: dict[str, Any] = {"directory": tmp_path, "monitor": "acc"}
    first = sweep(factory(loss), strengths=STRENGTHS, **run)
    assert loss.calls == 12 + 3 * 12  # 2 epochs of 6 steps each
    loss.calls = 0
    assert content(sweep(factory(loss), strengths=STRENGTHS, **run)) == content(first)
    assert loss.calls == 0
    more = sweep(factory(loss), strengths=(0.01, *STRENGTHS), **run)
    assert [row.point["strength"] for row in more.rows] == [0.01, *STRENGTHS]
    assert loss.calls == 12  # only the new point, and no warm-up
    assert [r.metrics for r in more.rows[1:]] == [r.metrics for r in first.rows]


@pytest.mark.parametrize("at", [9, 33, 45])  # in the second epoch of the warm-up, of the second and the third point
def test_an_interrupted_sweep_goes_on_and_finds_the_same(tmp_path: Path, whole: tuple[Path, Front], at: int) -> None:
    loss = Loss()
    loss.at = at
    run: dict[str, Any] = {"directory": tmp_path / "parts", "strengths": STRENGTHS, "monitor": "acc"}
    with pytest.raises(KeyboardInterrupt):
        sweep(factory(loss), **run)
    done = list((tmp_path / "parts").glob("*/result.json"))
    assert len(done) == {9: 0, 33: 1, 45: 2}[at]
    if done:
        written = json.loads((tmp_path / "parts" / "front.json").read_text(encoding="utf-8"))
        assert len(written["rows"]) == len(done)
    before, loss.calls, loss.at = loss.calls, 0, -1
    assert content(sweep(factory(loss), **run)) == content(whole[1])
    # 48 in all; of the interrupted epoch two batches were trained, and the third stopped it
    assert before + loss.calls == 48 + 3


def test_processes_find_the_same_and_failures_are_rows(tmp_path: Path) -> None:
    make = lambda folder, **point: factory(strength=0.05)(folder, **point)  # noqa: E731  closures travel too
    targets = [58, 5, 9]  # all; fewer than the smallest network has; the smallest
    run: dict[str, Any] = {"targets": targets, "cost": "params", "monitor": "acc"}
    one = sweep(make, directory=tmp_path / "one", **run)
    two = sweep(make, directory=tmp_path / "two", workers=2, **run)
    assert content(one) == content(two)
    assert [p.read_text() for p in sorted((tmp_path / "one").glob("*.json"))] == [
        p.read_text() for p in sorted((tmp_path / "two").glob("*.json"))
    ]
    impossible = one.rows[1]
    assert isinstance(impossible.failure, InfeasibleTargetError)
    assert impossible.dominated is None
    assert not impossible.costs
    assert impossible not in (*one.found, *one.front)
    (error,) = (
        row["error"] for row in json.loads((tmp_path / "two" / "front.json").read_text())["rows"] if row["error"]
    )
    assert "InfeasibleTargetError" in error
    assert "params 5" in error
    assert error in (tmp_path / "two" / "front.csv").read_text()
    assert "params 5" in str(two)


def test_a_search_that_diverges_does_not_stop_the_others(tmp_path: Path) -> None:
    def make(checkpoint_dir: Path, strength: float) -> PITTrainer:
        def loss(output: Tensor, target: Tensor) -> Tensor:
            return nn.functional.cross_entropy(output, target) * (math.nan if strength == 1e-3 else 1.0)

        return factory(loss, warmup_epochs=0)(checkpoint_dir, strength=strength)

    front = sweep(make, directory=tmp_path, strengths=STRENGTHS)
    assert [type(row.failure) for row in front.rows] == [type(None), TrainingDivergedError, type(None)]
    assert not (tmp_path / "warmup.ckpt").exists()
    calm = sweep(factory(warmup_epochs=0), directory=tmp_path, strengths=STRENGTHS)  # tried again
    assert [row.failure for row in calm.rows] == [None] * 3
    assert calm.rows[0].metrics == front.rows[0].metrics


def test_all_fail(tmp_path: Path) -> None:
    with pytest.raises(InfeasibleTargetError, match="params 5"):
        sweep(factory(strength=0.05), directory=tmp_path / "a", targets=[5, 6], cost="params")

    def make(checkpoint_dir: Path, **point: Any) -> PITTrainer:
        return factory(lambda o, t: o.sum() * math.nan, warmup_epochs=0)(checkpoint_dir, **point)

    with pytest.raises(TrainingDivergedError, match="none of the 2 searches gave a network"):
        sweep(make, directory=tmp_path / "b", strengths=[0.1, 0.2])
    assert json.loads((tmp_path / "b" / "front.json").read_text())["rows"][1]["error"].startswith("TrainingDiverged")


def test_a_warmup_from_elsewhere(tmp_path: Path, whole: tuple[Path, Front]) -> None:
    loss = Loss()
    given = whole[0] / "warmup.ckpt"
    other = sweep(factory(loss), directory=tmp_path / "other", strengths=[0.1], warmup_from=given)
    assert content(other)[0][:3] == content(whole[1])[-1][:3]
    assert loss.calls == 12
    assert not (tmp_path / "other" / "warmup.ckpt").exists()
    with pytest.raises(CheckpointError, match="warmup"):
        sweep(factory(), directory=tmp_path / "other", strengths=[0.1])
    with pytest.raises(ConfigurationError, match="no file"):
        sweep(factory(), directory=tmp_path / "c", strengths=[0.1], warmup_from=tmp_path / "none")
    with pytest.raises(ConfigurationError, match="warmup_epochs=0"):
        sweep(factory(warmup_epochs=0), directory=tmp_path / "d", strengths=[0.1], warmup_from=given)
    with pytest.raises(CheckpointError, match="seed"):
        sweep(factory(seed=3), directory=tmp_path / "e", strengths=[0.1], warmup_from=given)
    assert not (tmp_path / "e").exists()


def test_a_network_of_choices(tmp_path: Path) -> None:
    def make(checkpoint_dir: Path, **point: Any) -> Any:
        changes = {"num_epochs": 1, "valid_dataset": digit_data(70), "checkpoint_dir": checkpoint_dir}
        return supernet(tiny(), **{**changes, **point})

    front = sweep(make, directory=tmp_path, strengths=[1e-6, {"macs": 1e-3}], monitor="acc1")
    assert front.costs == ("macs",)  # what the trainer has, since a number names none
    for row in front.rows:
        trainer = make(tmp_path / row.folder.name, **row.point)
        trainer.resume(row.folder)
        assert row.costs["macs"] == trainer.cost_model("macs").of(
            {label: int(d.alpha.argmax()) for label, d in trainer.decisions.items()}
        )
        assert row.metrics == trainer.evaluate()
        assert json.loads((row.folder / "arch.json").read_text())["arch"] == trainer.export()


def test_the_users_random_numbers_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sweep(factory(), directory=tmp_path, strengths=[0.1])
    assert torch.equal(torch.rand(3), expected)


# ---- wrong use -----------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "targets=.*or strengths"),
    ({"targets": [1], "strengths": [1]}, "not both"),
    ({"strengths": []}, "strengths is empty"),
    ({"strengths": 0.1}, "strengths=0.1; a list"),
    ({"targets": {"params": 30}}, "a list is needed"),
    ({"strengths": [0.1, 0.2, 1e-1]}, r"strengths\[2\] is strengths\[0\] again"),
    ({"targets": [{"a": 1, "b": 2}, {"b": 2.0, "a": 1.0}]}, r"targets\[1\] is targets\[0\] again"),
    ({"targets": [{"params": 30}, 30], "cost": "params"}, "again"),
    ({"strengths": [0.1, math.inf]}, r"strengths\[1\] is inf"),
    ({"strengths": [math.nan]}, "nan"),
    ({"strengths": [-1.0]}, "at least 0"),
    ({"strengths": [True]}, "True"),
    ({"strengths": ["0.1"]}, "'0.1'"),
    ({"targets": [{"params": None}]}, r"targets\[0\], params is None"),
    ({"targets": [{}]}, r"targets\[0\] is empty"),
    ({"targets": [30]}, "of which cost"),
    ({"strengths": [0.1], "workers": 0}, "workers=0"),
    ({"strengths": [0.1], "workers": 2.0}, r"workers=2\.0"),
    ({"strengths": [0.1], "backend": "threads"}, r"backend='threads'; allowed are \['process', 'ray'\]"),
    ({"strengths": [0.1], "monitor_mode": "best"}, "monitor_mode='best'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        sweep(never, directory=tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_a_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigurationError, match="is a file"):
        sweep(never, directory=tmp_path / "file", strengths=[0.1])
    assert (tmp_path / "file").read_text() == "mine"


NETWORK = PIT(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), input_shape=(4,))


def same_network(checkpoint_dir: Path, **point: Any) -> PITTrainer:
    return PITTrainer(
        NETWORK,
        loss=nn.CrossEntropyLoss(),
        metrics=None,
        optimizer=torch.optim.SGD(NETWORK.parameters(), lr=0.1),
        checkpoint_dir=checkpoint_dir,
        **point,
    )


WRONG_FACTORIES: list[tuple[Any, dict[str, Any], type[OneshotError], str]] = [
    (lambda folder, **point: NETWORK, {}, InputTypeError, "returned a PIT"),
    (lambda folder, **point: factory()("elsewhere", **point), {}, ConfigurationError, "checkpoint_dir='elsewhere'"),
    (lambda folder, **point: factory(checkpoint_dir=None)(folder, **point), {}, ConfigurationError, "checkpoint_dir="),
    (same_network, {}, ConfigurationError, "the same network twice"),
    (factory(valid_dataset=None), {}, ConfigurationError, "no data to evaluate"),
    (factory(), {"monitor": "valid_acc"}, ConfigurationError, r"monitor='valid_acc'; allowed are \['loss', 'acc'\]"),
    (factory(metrics=None), {"monitor": "acc"}, ConfigurationError, r"allowed are \['loss'\]"),
    (factory(metrics=lambda o, t: 0.5), {"monitor": "acc"}, ConfigurationError, r"\['loss', 'metric'\]"),
    (factory(metrics=lambda o, t: {"params": 0.5}), {}, ConfigurationError, "metrics and costs"),
    (
        factory(),
        {"strengths": [{"params": 0.1}, {"macs": 0.1}]},
        ConfigurationError,
        r"\['macs'\]; the trainer has \['par",
    ),
    (factory(num_epochs=-1), {}, ConfigurationError, "num_epochs=-1"),
]


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"), WRONG_FACTORIES, ids=[message[:30] for *_, message in WRONG_FACTORIES]
)
def test_wrong_factories(
    tmp_path: Path, make: Any, arguments: dict[str, Any], error: type[OneshotError], message: str
) -> None:
    with pytest.raises(error, match=message):
        sweep(make, directory=tmp_path / "new", **{"strengths": [0.1, 0.2], **arguments})
    assert not (tmp_path / "new").exists()


def test_a_factory_that_cannot_travel(tmp_path: Path) -> None:
    lock = threading.Lock()

    def make(checkpoint_dir: Path, **point: Any) -> Any:
        with lock:
            return factory()(checkpoint_dir, **point)

    with pytest.raises(ConfigurationError, match="trainer_factory cannot be sent to other processes"):
        sweep(make, directory=tmp_path / "new", strengths=[0.1, 0.2], workers=2)
    assert not (tmp_path / "new").exists()
    assert len(sweep(make, directory=tmp_path / "new", strengths=[0.1]).rows) == 1


def test_a_directory_of_another_sweep(tmp_path: Path) -> None:
    sweep(factory(), directory=tmp_path, strengths=[0.1])
    for changes, message in (
        ({"num_epochs": 3}, r"epochs \[2, 2, 0\] there and \[2, 3, 0\] here"),
        ({"batch_size": 8}, "batch_size 16 there and 8 here"),
        ({"valid_dataset": rows(10, 3)}, "samples"),
    ):
        with pytest.raises(CheckpointError, match=message):
            sweep(factory(**changes), directory=tmp_path, strengths=[0.1])
    result = tmp_path / folder_name({"strength": 0.1}) / "result.json"
    for text in ("{", "[]", "{}", result.read_text().replace("0.1", "0.2")):
        result.write_text(text)
        with pytest.raises(CheckpointError, match=r"result\.json.*remove"):
            sweep(factory(), directory=tmp_path, strengths=[0.1])
    for text in ("{", "[]"):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"sweep\.json"):
            sweep(factory(), directory=tmp_path, strengths=[0.1])


def test_other_settings_of_a_half_done_point_are_refused(tmp_path: Path) -> None:
    loss = Loss()
    loss.at = 21  # in the second epoch of the first point
    with pytest.raises(KeyboardInterrupt):
        sweep(factory(loss), directory=tmp_path, strengths=[0.1])
    with pytest.raises(CheckpointError, match="normalize False there and True here"):
        sweep(factory(normalize=True), directory=tmp_path, strengths=[0.1])


# ---- Ray -----------------------------------------------------------------------------------------------------------


class FakeRay(types.ModuleType):
    """As much of Ray as a sweep uses; a task runs when it is waited for, the last one first."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.most = 0

    def remote(self, function: Callable[..., Any]) -> Any:
        return types.SimpleNamespace(remote=lambda *args: (function, args))

    def wait(self, running: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        self.most = max(self.most, len(running))
        assert num_returns == 1
        return running[-1:], running[:-1]

    def get(self, done: list[Any]) -> list[Any]:
        return [function(*args) for function, args in done]


def test_a_task_alone_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert list(run_all(abs, [-3], backend="process", workers=2)) == [3]
    assert threads == [1, 5]  # as in a process of its own, and then as it was
    assert list(run_all(abs, [-3, -4], backend="process", workers=1)) == [3, 4]
    assert threads == [1, 5]
    assert list(run_all(abs, [], backend="process", workers=2)) == []


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


def test_under_ray(tmp_path: Path, ray: FakeRay) -> None:
    short = factory(warmup_epochs=0, num_epochs=1)
    here = sweep(short, directory=tmp_path / "here", strengths=STRENGTHS)
    there = sweep(short, directory=tmp_path / "there", strengths=STRENGTHS, backend="ray", workers=2)
    assert content(there) == content(here)  # in the order of the points, whichever was ready first
    assert ray.most == 2


def test_ray_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'oneshot-nas\[ray\]'"):
        sweep(never, directory=tmp_path, strengths=[0.1], backend="ray")


# ---- the front -----------------------------------------------------------------------------------------------------


def front_of(*values: tuple[float, float, float], larger: bool = True) -> Front:
    """Rows of (params, macs, acc)."""
    found = [
        FrontRow({"targets": {"params": p}}, Path(f"f{i}"), {"params": p, "macs": m}, {"acc": a})
        for i, (p, m, a) in enumerate(values)
    ]
    failed = FrontRow({"targets": {"params": 1.0}}, Path("no"), {}, {}, failure=InfeasibleTargetError("too small"))
    return Front([failed, *found], monitor="acc", larger_is_better=larger, costs=("params", "macs"))


def test_domination_sees_all_costs_and_the_direction() -> None:
    values = ((10.0, 5.0, 0.5), (20.0, 4.0, 0.5), (20.0, 5.0, 0.6), (30.0, 6.0, 0.55), (5.0, 1.0, math.nan))
    # the fourth is larger than the third and worse; the second has fewer MACs than the first
    assert [row.dominated for row in front_of(*values).rows] == [None, False, False, False, True, False]
    # less is better: the first has fewer parameters, and no more of anything, than the third and the fourth
    assert [row.dominated for row in front_of(*values, larger=False).rows] == [None, False, False, True, True, False]


def test_best_within_limits() -> None:
    front = front_of((10.0, 5.0, 0.5), (20.0, 4.0, 0.5), (20.0, 5.0, 0.6), (5.0, 1.0, math.nan))
    assert front.best().folder == Path("f2")
    assert front.best({"params": 20, "macs": 4.5}).folder == Path("f1")
    assert front.best({"params": 19}).folder == Path("f0")
    assert front_of((30.0, 1.0, 0.5), (20.0, 9.0, 0.5)).best().folder == Path("f1")  # of equals the smaller one
    with pytest.raises(InfeasibleTargetError, match=r"smallest values are \{'params': 10\.0\}"):
        front.best({"params": 7})
    with pytest.raises(ConfigurationError, match=r"unknown costs \['flops'\]; the rows have \['params', 'macs'\]"):
        front.best({"flops": 7})
    with pytest.raises(InfeasibleTargetError, match="none of 1 rows"):
        front_of().best()


def test_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    front = front_of((10.0, 5.0, math.nan))
    front.write_json(tmp_path / "front.json")
    front.write_csv(tmp_path / "front.csv")

    def refuse(text: str) -> None:
        raise AssertionError(text)

    data = json.loads((tmp_path / "front.json").read_text(), parse_constant=refuse)
    assert data["rows"][1]["metrics"] == {"acc": "nan"}
    assert (tmp_path / "front.csv").read_bytes() == (
        b"targets params,params,macs,acc,dominated,folder,error\n"
        b"1.0,,,,,no,InfeasibleTargetError: too small\n"
        b"10.0,10.0,5.0,nan,False,f0,\n"
    )


def test_a_plot(tmp_path: Path) -> None:
    front = front_of((10.0, 5.0, 0.5), (20.0, 4.0, 0.4), (30.0, 6.0, 0.6))
    front.plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    front.plot(tmp_path / "front.svg", cost="macs")
    text = (tmp_path / "front.svg").read_text()
    assert "<!-- macs -->" in text
    assert "<!-- acc -->" in text
    with pytest.raises(ConfigurationError, match=r"cost='flops'; the rows have \['params', 'macs'\]"):
        front.plot(tmp_path / "x.png", cost="flops")
    with pytest.raises(ConfigurationError, match="ends in 'doc'; allowed are"):
        front.plot(tmp_path / "x.doc")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["front.png", "front.svg"]


def test_matplotlib_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'oneshot-nas\[plot\]'"):
        front_of((10.0, 5.0, 0.5)).plot(tmp_path / "front.png")


def test_folder_names_differ_and_are_names() -> None:
    points: list[dict[str, Any]] = [
        {"strength": 0.1},
        {"strength": 0.1 + 1e-12},
        {"targets": {"a/b ..": 1.0}},
        {"targets": {"a": 1.0, "b": 2.0}},
    ]
    names = {folder_name(point) for point in points}
    assert len(names) == 4
    assert all(Path(name).name == name and len(name) < 60 for name in names)
    assert folder_name({"targets": {"b": 2.0, "a": 1.0}}) == folder_name(points[3])
