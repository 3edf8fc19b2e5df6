"""The signs of a collapse against dense Hessians and counts by hand, the rules on them, and searches that they end."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_trainer_contract as contract
import torch
from tiny import digit_data, tiny
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from oneshot import InputChoice, LayerChoice, arch_parameters, decisions
from oneshot.errors import CheckpointError, ConfigurationError
from oneshot.trainers.collapse import (
    CollapseMonitor,
    EarlyStop,
    Stopped,
    cell_of,
    epoch_before_collapse,
    hessian,
    largest_eigenvalue,
    skip_options,
    skip_share,
    skips_per_cell,
)
from oneshot.trainers.darts import DARTSTrainer

# ---- the Hessian -----------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Three decisions, 3 + 2 + 4 logits, with BatchNorm; in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.one = LayerChoice([nn.Linear(4, 4), nn.Tanh(), nn.Identity()], label="one")
        self.norm = nn.BatchNorm1d(4)
        self.two = LayerChoice([nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()), nn.Identity()], label="two")
        self.join = InputChoice(n_candidates=4, label="join")
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.one(x))
        z = self.two(y)
        return self.head(self.join([x, y, z, y * z]))


def mixed(seed: int) -> tuple[list[nn.Parameter], Any]:
    torch.manual_seed(seed)
    model = Mixed().double()
    for alpha in arch_parameters(model):
        nn.init.normal_(alpha)
    x, y = torch.randn(20, 4).double(), torch.arange(20) % 3
    return arch_parameters(model), lambda: 5 * nn.functional.cross_entropy(model(x), y)


def dense_by_differences(alphas: list[nn.Parameter], loss: Any) -> np.ndarray:
    """d2 L / da_i da_j from four values of the loss each."""
    places = [(alpha, i) for alpha in alphas for i in range(alpha.numel())]
    h, n = 1e-4, len(places)
    found = np.zeros((n, n))

    def shifted(*moves: tuple[tuple[nn.Parameter, int], float]) -> float:
        with torch.no_grad():
            for (alpha, i), by in moves:
                alpha[i] += by
            value = float(loss())
            for (alpha, i), by in moves:
                alpha[i] -= by
        return value

    for i in range(n):
        for j in range(n):
            signs = [(a, b) for a in (1, -1) for b in (1, -1)]
            found[i, j] = sum(a * b * shifted((places[i], a * h), (places[j], b * h)) for a, b in signs) / (4 * h * h)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_hessian_and_its_eigenvalue_against_finite_differences(seed: int) -> None:
    alphas, loss = mixed(seed)
    expected = dense_by_differences(alphas, loss)
    assert np.allclose(hessian(loss(), alphas).numpy(), expected, atol=1e-5)
    largest = np.linalg.eigvalsh(expected)[-1]
    assert largest_eigenvalue(loss(), alphas) == pytest.approx(largest, abs=1e-4)
    assert largest >= -1e-6  # a number added to all logits of one decision changes nothing
    # by Lanczos' method, which has the whole space after 9 steps and a good part of it after 7
    assert largest_eigenvalue(loss(), alphas, products=8) == pytest.approx(largest, rel=0.02, abs=1e-3)


def test_lanczos_finds_the_largest_and_not_the_most_negative() -> None:
    """A quadratic form of 300 numbers, eigenvalues -50 and 3 to 3.2, with one at 7: 40 of 300 products are enough."""
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64))
    values = torch.cat([torch.tensor([-50.0, 7.0]), torch.linspace(3, 3.2, 298)]).double()
    matrix = basis @ torch.diag(values) @ basis.T
    x = torch.randn(300, dtype=torch.float64, requires_grad=True)
    assert largest_eigenvalue(x @ matrix @ x / 2, [x], products=40) == pytest.approx(7.0, abs=1e-6)
    assert largest_eigenvalue(x @ matrix @ x / 2, [x], products=300) == pytest.approx(7.0, abs=1e-9)
    y = torch.zeros(70, requires_grad=True)
    assert largest_eigenvalue(y.sum() * 2, [y]) == 0


# ---- skips -----------------------------------------------------------------------------------------------------------


class Cells(nn.Module):
    """Two cells of three decisions each, the first two with a skip, and what never counts."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList(
            nn.ModuleList(
                LayerChoice({"conv": nn.Linear(3, 3), "pool": nn.ReLU(), "skip": nn.Identity()}, label=f"{c}/{e}")
                for e in range(2)
            )
            for c in ("normal", "reduce")
        )
        self.plain = LayerChoice([nn.ReLU(), nn.Tanh()], label="normal/none")  # no candidate has parameters
        self.dense = LayerChoice([nn.Linear(3, 3), nn.Linear(3, 3, bias=False)], label="normal/all")

    def forward(self, x: Tensor) -> Tensor:
        for cell in self.cells:
            for edge in cell:  # type: ignore[union-attr]
                x = edge(x)
        return self.dense(self.plain(x))


def test_which_candidates_are_skips() -> None:
    found = decisions(Cells())
    edges = ["normal/0", "normal/1", "reduce/0", "reduce/1"]
    assert skip_options(found, None) == dict.fromkeys(edges, frozenset({1, 2}))
    assert skip_options(found, ["skip", "id"]) == dict.fromkeys(edges, frozenset({2}))
    assert skip_options(found, ["other"]) == {}
    inner = LayerChoice({"deep": nn.Sequential(LayerChoice([nn.ReLU(), nn.Tanh()])), "skip": nn.Identity()}, label="x")
    assert skip_options(decisions(inner), None) == {"x": frozenset({1})}  # alpha is a parameter


def test_skips_are_counted_by_hand() -> None:
    skips = dict.fromkeys(["normal/0", "normal/1", "reduce/0", "reduce/1"], frozenset({2}))
    chosen = {"normal/0": 2, "normal/1": 2, "reduce/0": 2, "reduce/1": 0, "normal/none": 1}
    assert skip_share(chosen, skips) == 3 / 4
    assert skips_per_cell(chosen, skips) == {"normal": 2, "reduce": 1}
    assert skips_per_cell(chosen, skips, lambda label: "all") == {"all": 3}
    assert cell_of("") == ""
    assert cell_of("/x") == ""


# ---- rules -----------------------------------------------------------------------------------------------------------


def test_the_rule_of_the_eigenvalue_by_hand() -> None:
    """window 2: means of epochs (0,1), (1,2) ... ; with 1, 1, 1, 1.4, 1.4 it is 1 / 1.2 and then 1 / 1.4 < 0.75."""
    values = [1.0, 1.0, 1.0, 1.4, 1.4]
    assert [epoch_before_collapse(values[: n + 1], window=2) for n in range(5)] == [None] * 4 + [2]
    assert epoch_before_collapse([1.0, 2.0], window=1) == 0
    assert epoch_before_collapse([1.0, 2.0], window=1, ratio=0.5) is None  # 1 is not below 0.5 * 2
    assert epoch_before_collapse([2.0, 1.0], window=1) is None
    assert epoch_before_collapse([0.0, 0.0], window=1) is None
    assert epoch_before_collapse([1.0] * 8 + [float("nan")] * 2) is None
    assert EarlyStop(ratio=None).epoch_to_keep([1.0] * 5 + [100.0] * 5) is None


def test_the_monitor_goes_back_to_the_alphas_of_the_epoch() -> None:
    """A planned row of eigenvalues; alphas are 0, 1, 2, ... in the epochs, and epoch 3 is what comes back."""
    model = nn.Sequential(LayerChoice([nn.Linear(1, 1), nn.Identity()], label="a"))
    monitor = CollapseMonitor(EarlyStop(window=2), decisions(model))
    values = [1.0, 1.0, 1.0, 1.0, 1.1, 2.0]  # (1.0 + 1.0) / (1.1 + 2.0) < 0.75 at epoch 5
    for epoch in range(6):
        with torch.no_grad():
            model[0].alpha.fill_(epoch)
        stopped = monitor.judge([{"eigenvalue": value} for value in values[: epoch + 1]])
        assert (stopped is not None) == (epoch == 5)
    assert stopped is not None
    assert (stopped.epoch, stopped.kept) == (5, 3)
    assert model[0].alpha.tolist() == [3.0, 3.0]


def test_the_monitor_counts_skips_of_each_cell() -> None:
    model = Cells()
    monitor = CollapseMonitor(EarlyStop(ratio=None, most_skips=2, skip=("skip",)), decisions(model))
    assert monitor.measure(lambda: pytest.fail("no eigenvalue is needed")) == {"skip_share": 0.0}
    for edge in (model.cells[0][0], model.cells[1][0]):
        with torch.no_grad():
            edge.alpha[2] = 1.0
    assert monitor.measure(lambda: torch.zeros(())) == {"skip_share": 0.5}
    assert monitor.judge([{}]) is None
    with torch.no_grad():
        model.cells[1][1].alpha[2] = 1.0
    stopped = monitor.judge([{}, {}])
    assert stopped == Stopped(1, 1, "skips per cell: {'normal': 1, 'reduce': 2}, most_skips=2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0}, "ratio=0"),
        ({"ratio": 1.5}, "ratio=1.5"),
        ({"window": 0}, "window=0"),
        ({"window": None}, "window=None"),
        ({"most_skips": 0}, "most_skips=0"),
        ({"most_skips": True}, "most_skips=True"),
        ({"skip": "skip"}, "skip='skip'.: a list of names"),
    ],
    ids=str,
)
def test_wrong_rules(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        EarlyStop(**settings)


def test_skips_that_the_model_does_not_offer() -> None:
    with pytest.raises(ConfigurationError, match=r"no decision offers a skip.*'conv', 'pool', 'skip'"):
        CollapseMonitor(EarlyStop(skip=["identity"]), decisions(Cells()))
    dense = decisions(nn.Sequential(LayerChoice([nn.Linear(1, 1), nn.Linear(1, 1)], label="a")))
    with pytest.raises(ConfigurationError, match="most_skips=2"):
        CollapseMonitor(EarlyStop(most_skips=2), dense)
    assert CollapseMonitor(EarlyStop(ratio=None), dense).measure(lambda: torch.zeros(())) == {}


# ---- searches that are ended ----------------------------------------------------------------------------------------


def darts(model: nn.Module, **changes: Any) -> DARTSTrainer:
    settings: dict[str, Any] = {
        "loss": nn.CrossEntropyLoss(),
        "metrics": None,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        "num_epochs": 3,
        "warmup_epochs": 1,
        "dataset": digit_data(128),
        "batch_size": 32,
        "workers": 0,
        "device": "cpu",
        "dummy_input": (1, 1, 8, 8),
        "arc_learning_rate": 0.05,
        "progress": False,
    }
    return DARTSTrainer(model, **{**settings, **changes})


def test_the_numbers_are_in_the_history_and_change_nothing_else() -> None:
    """Monitored or not, the run is the same; the eigenvalue is that of the loss on 32 held-out samples."""
    plain, watched = tiny(), tiny()
    history = darts(plain).train()
    trainer = darts(watched, early_stop=EarlyStop(ratio=0.01))
    records = trainer.train()
    assert contract.equal_states(plain.state_dict(), watched.state_dict())
    assert [record.keys() - before.keys() for record, before in zip(records, history, strict=True)] == [
        set(),
        *[{"skip_share", "eigenvalue"}] * 3,
    ]
    assert all(record["skip_share"] in (0.0, 1.0) for record in records[1:])  # only 'one' offers a skip
    assert trainer.stopped is None
    loss = trainer._monitored_loss()
    assert float(loss.detach()) == float(trainer._monitored_loss().detach())
    assert records[-1]["eigenvalue"] == pytest.approx(largest_eigenvalue(loss, trainer.alphas), rel=1e-4)
    assert records[-1]["eigenvalue"] > 0
    assert contract.equal_states(plain.state_dict(), watched.state_dict())
    assert watched.training


class Leaning(nn.Module):
    """Two choices between a layer that can only do harm and a skip: skips win, sooner or later."""

    def __init__(self) -> None:
        super().__init__()
        self.one = LayerChoice({"noise": Noise(), "skip": nn.Identity()}, label="cell/one")
        self.two = LayerChoice({"noise": Noise(), "skip": nn.Identity()}, label="cell/two")
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x)))


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return 0 * self.scale * x


def leaning(model: nn.Module, **changes: Any) -> DARTSTrainer:
    x = torch.randn(128, 2, generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {
        "dataset": TensorDataset(x, (x[:, 0] > 0).long()),
        "num_epochs": 20,
        "dummy_input": (1, 2),
    }
    return darts(model, **{**settings, **changes})


def test_a_search_ends_when_skips_win() -> None:
    model = Leaning()
    for choice in (model.one, model.two):
        with torch.no_grad():
            choice.alpha[0] = 0.2
    trainer = leaning(model, early_stop=EarlyStop(ratio=None, most_skips=2), batch_size=16)
    history = trainer.train()
    assert trainer.stopped is not None
    assert 2 <= len(history) < 21
    assert history[-1]["skip_share"] == 1
    assert all(record["skip_share"] < 1 for record in history[1:-1])
    assert trainer.stopped.epoch == trainer.stopped.kept == len(history) - 2
    assert trainer.export() == {"cell/one": "skip", "cell/two": "skip"}
    assert trainer.train() is history
    assert trainer.step == len(history) * trainer.steps_per_epoch


def test_a_search_goes_back_to_before_the_eigenvalue_grew_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Ratio 1 stops at the first growth at all, here of means of 2 epochs."""
    settings: dict[str, Any] = {"early_stop": EarlyStop(ratio=1.0, window=2), "num_epochs": 12}
    torch.manual_seed(1)
    model = Leaning()
    trainer = leaning(model, checkpoint_dir=tmp_path, checkpoint_every=1, **settings)
    saved: dict[int, Path] = {}
    alphas: dict[int, list[Tensor]] = {}
    save = trainer.save

    def keep(path: Any) -> None:
        save(path)
        saved[trainer.step] = Path(shutil.copy(path, tmp_path / f"at{trainer.step}.ckpt"))
        alphas[trainer.step] = [alpha.detach().clone() for alpha in trainer.alphas]

    trainer.save = keep  # type: ignore[method-assign]
    history = trainer.train()
    stopped = trainer.stopped
    assert stopped is not None
    values = [record["eigenvalue"] for record in history[1:]]
    assert stopped.epoch == len(values) - 1
    assert stopped.kept == stopped.epoch - 2
    assert sum(values[-4:-2]) < sum(values[-2:])
    assert all(sum(values[i - 3 : i - 1]) >= sum(values[i - 1 : i + 1]) for i in range(3, len(values) - 1))
    at_kept = alphas[(1 + stopped.kept + 1) * trainer.steps_per_epoch]
    assert all(torch.equal(a, b) for a, b in zip(trainer.alphas, at_kept, strict=True))
    last = len(history) * trainer.steps_per_epoch
    for step in (3, last - 3, last - 2, last):
        torch.manual_seed(5)
        other = Leaning()
        again = leaning(other, **settings)
        again.resume(saved[step])
        assert again.train() == history
        assert again.stopped == stopped
        assert contract.equal_states(model.state_dict(), other.state_dict())
    with pytest.raises(CheckpointError, match="early_stop"):
        leaning(Leaning(), num_epochs=12).resume(saved[3])
