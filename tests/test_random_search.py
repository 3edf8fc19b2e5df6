"""Random search, and the evaluator it shares with the evolution, against enumeration and networks on their own."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from tiny import digit_data, tiny
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from oneshot import Argmax, InputChoice, LayerChoice, Repeat, accuracy, count_params, draw, fixed, set_sampler
from oneshot.errors import ArchMismatchError, ConfigurationError, InfeasibleTargetError, UnsupportedModelError
from oneshot.trainers.evaluator import PathEvaluator, pinned
from oneshot.trainers.random_search import RandomSearch
from oneshot.trainers.recalibration import recalibrate_


class Net(nn.Module):
    """3 * 3 * 3 = 27 architectures, with decisions of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = LayerChoice({"a": nn.Linear(2, 2), "b": nn.Identity(), "c": nn.Linear(2, 2, bias=False)}, "layer")
        self.deep = Repeat(lambda i: nn.Linear(2, 2), depth=(0, 2), label="deep")
        self.inputs = InputChoice(n_candidates=2, n_chosen=None, label="inputs")

    def forward(self, x: Tensor) -> Tensor:
        return self.inputs([x, self.deep(self.layer(x))])


def test_scores_every_architecture_once_if_it_may_and_knows_the_best() -> None:
    """The user's function gets decisions as an export has them, and may build the network alone."""
    seen = []
    net = Net()

    def score(arch: dict[str, Any]) -> float:
        seen.append((arch["layer"], arch["deep"], tuple(arch["inputs"])))
        return float(sum(p.numel() for p in fixed(net, arch).parameters()))

    search = RandomSearch(net, score, evaluations=100)
    best = search.run()
    assert len(seen) == len(set(seen)) == 27
    assert {layer for layer, _, _ in seen} == {"a", "b", "c"}
    assert {deep for _, deep, _ in seen} == {0, 1, 2}
    # A Linear(2, 2) has 6; with the inputs (0,) alone the branch still stands in the network and counts.
    assert best.score == 18.0
    assert (search.arch["layer"], search.arch["deep"]) == ("a", 2)
    assert search.run() == best
    assert len(seen) == 27


def test_every_one_of_the_feasible_ones_is_drawn_alike() -> None:
    """Limit 6 parameters: one Linear of 6, or one of 4, or none; times the depths that leave it so, and 3 inputs."""
    net = Net()
    cost = count_params(net)
    first = Counter()
    for seed in range(600):
        search = RandomSearch(
            net, lambda arch: 0.0, evaluations=1, costs={"params": cost}, limits={"params": 6}, seed=seed
        )
        choices = search.run().choices
        assert cost.of(choices) <= 6
        first[tuple(choices.values())] += 1
    feasible = {(0, 0), (1, 0), (1, 1), (2, 0)}  # (layer, depth): 6, 0, 6 and 4 parameters
    assert {key[:2] for key in first} == feasible
    assert len(first) == 12
    # 50 each expected; the standard deviation is sqrt(600 / 12 * 11 / 12) = 6.8.
    assert all(20 < count < 85 for count in first.values())


def test_the_same_seed_draws_the_same_and_another_one_another() -> None:
    def drawn(seed: int) -> list[Any]:
        search = RandomSearch(Net(), lambda arch: 0.0, evaluations=5, seed=seed)
        search.run()
        return search.candidates

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_nan_is_never_the_best() -> None:
    net = nn.Sequential(LayerChoice([nn.Identity(), nn.ReLU(), nn.Tanh()], label="a"))
    search = RandomSearch(net, lambda arch: [math.nan, -3.0, math.nan][arch["a"]], evaluations=3)
    assert search.run().score == -3.0
    hopeless = RandomSearch(net, lambda arch: math.nan, evaluations=3)
    with pytest.raises(ConfigurationError, match="no best architecture among 3, 0 of them"):
        hopeless.run()


def test_what_cannot_work_is_told_before_anything_is_scored() -> None:
    def never(arch: dict[str, Any]) -> float:
        raise AssertionError("scored")

    net = Net()
    cost = count_params(net)
    with pytest.raises(ConfigurationError, match="evaluations=0"):
        RandomSearch(net, never, evaluations=0)
    with pytest.raises(UnsupportedModelError, match="nothing to search"):
        RandomSearch(nn.Linear(2, 2), never, evaluations=1)
    with pytest.raises(InfeasibleTargetError, match="params: budget -1, reachable 0 to 18"):
        RandomSearch(net, never, evaluations=1, costs={"params": cost}, limits={"params": -1})
    with pytest.raises(ConfigurationError, match="budget for 'macs'"):
        RandomSearch(net, never, evaluations=1, costs={"params": cost}, limits={"macs": 1})


# ---- the evaluator ---------------------------------------------------------------------------------------------


def trained() -> nn.Module:
    """A supernet whose running statistics are a mixture."""
    model = tiny()
    images, _ = digit_data().tensors
    model.train()
    for i in range(4):
        draw(model, torch.Generator().manual_seed(i))
        model(images[32 * i : 32 * (i + 1)])
    return model


def evaluator(model: nn.Module, **changes: Any) -> PathEvaluator:
    images, _ = digit_data().tensors
    settings_of: dict[str, Any] = {
        "loss": nn.CrossEntropyLoss(),
        "metrics": lambda output, target: accuracy(output, target, topk=(1, 5)),
        "dataset": Subset(digit_data(), range(100, 170)),
        "recalibrate_on": [images[:32], images[32:64], images[64:80]],
        "batch_size": 32,
    }
    return PathEvaluator(model, **{**settings_of, **changes})


ARCHS = [{"one": "k3", "two": 1, "depth": 2}, {"one": "skip", "two": 2, "depth": 1}]


@pytest.mark.parametrize("arch", ARCHS)
def test_the_score_is_that_of_the_network_alone_with_its_own_statistics(arch: dict[str, Any]) -> None:
    """The plain network of the path is recalibrated on the same batches and evaluated by hand."""
    model = trained()
    found = evaluator(model)
    plain = fixed(model, arch)
    recalibrate_(plain, found.recalibrate_on or ())
    images, labels = (t[100:170] for t in digit_data().tensors)
    with torch.no_grad():
        output = plain.eval()(images)
    loss = float(nn.functional.cross_entropy(output.double(), labels))
    assert found(arch) == pytest.approx(-loss, rel=1e-5)
    with pinned(model, {"one": 0, "two": 0, "depth": 0}):
        values = found.values({"one": 1 if arch["one"] == "k3" else 3, "two": arch["two"], "depth": arch["depth"] - 1})
    assert values["acc1"] == pytest.approx(float((output.argmax(1) == labels).float().mean()))
    assert evaluator(model, monitor="acc1")(arch) == pytest.approx(values["acc1"])
    assert evaluator(model, monitor="acc1", monitor_mode="min")(arch) == pytest.approx(-values["acc1"])


def test_without_recalibration_the_running_statistics_are_used() -> None:
    model = trained()
    plain = fixed(model, ARCHS[0])
    images, labels = (t[100:170] for t in digit_data().tensors)
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(plain.eval()(images).double(), labels))
    assert evaluator(model, recalibrate_on=None)(ARCHS[0]) == pytest.approx(-loss, rel=1e-5)
    assert abs(evaluator(model)(ARCHS[0]) + loss) > 1e-3


def test_evaluation_leaves_model_samplers_and_random_numbers_as_they_were() -> None:
    model = trained()
    set_sampler(model, Argmax())
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = (torch.rand(1), random.random(), np.random.rand())
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    found = evaluator(model, dataset=Augmented())
    scores = [found(arch) for arch in (*ARCHS, *ARCHS)]
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert isinstance(model.one.sampler, Argmax)
    assert scores[:2] == scores[2:]
    assert scores[0] != scores[1]


class Augmented(Dataset[Any]):
    """Noise from torch's global generator; counts how often it is read."""

    reads = 0
    data = digit_data(40)

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        Augmented.reads += 1
        image, label = self.data[i]
        return image + 0.1 * torch.randn(image.shape), int(label)


def test_every_architecture_sees_the_same_augmented_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept in memory where they fit, and otherwise read again with the same random numbers."""
    model = trained()
    scores = {}
    for most, reads in ((2**30, 40), (100, 120)):
        monkeypatch.setattr("oneshot.trainers.evaluator._MOST_BYTES", most)
        monkeypatch.setattr(Augmented, "reads", 0)
        found = evaluator(model, dataset=Augmented())
        scores[most] = [found(ARCHS[0]) for _ in range(3)]
        assert Augmented.reads == reads
    assert len(set(scores[100] + scores[2**30])) == 1


def test_random_search_with_the_evaluator_of_a_supernet() -> None:
    """Of all 4 * 3 * 2 architectures the best is that of a loop over all of them."""
    model = trained()
    found = evaluator(model)
    search = RandomSearch(model, found, evaluations=24)
    best = search.run()
    archs = [{"one": a, "two": b, "depth": d} for a in ("k1", "k3", "k5", "skip") for b in range(3) for d in (1, 2)]
    assert best.score == max(found(arch) for arch in archs)
    assert found(search.arch) == best.score


def test_wrong_architectures_and_monitors() -> None:
    model = trained()
    with pytest.raises(ArchMismatchError, match="k9"):
        evaluator(model)({**ARCHS[0], "one": "k9"})
    with pytest.raises(ConfigurationError, match=r"monitor='f1': allowed are \['loss', 'acc1', 'acc5'\]"):
        evaluator(model, monitor="f1")(ARCHS[0])
    with pytest.raises(ConfigurationError, match="monitor_mode='best'"):
        evaluator(model, monitor_mode="best")
    with pytest.raises(ConfigurationError, match="the dataset is empty"):
        evaluator(model, dataset=TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0)))(ARCHS[0])


def test_one_number_as_metric_and_a_path_that_runs_in_half_precision() -> None:
    model = trained()
    seen = set()
    model.one.register_forward_hook(lambda m, a, output: seen.add(output.dtype))
    found = evaluator(
        model,
        metrics=lambda output, target: (output.argmax(1) == target).float().mean(),
        monitor="metric",
        autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    )
    assert 0 <= found(ARCHS[0]) <= 1
    assert seen == {torch.bfloat16}
