"""SPOSTrainer: which paths train and with which gradients, what is searched, exported, and taken up again."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import MACS_LIMIT as LIMIT
from tiny import digit_data, spos, tiny
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from oneshot import Argmax, LabelSmoothingLoss, LayerChoice, count_macs, count_params, fixed, set_sampler
from oneshot.errors import CheckpointError, ConfigurationError, InfeasibleTargetError, TrainingDivergedError
from oneshot.export import choices_of, read_arch
from oneshot.loggers import read_json_lines
from oneshot.trainers.recalibration import recalibrate_
from oneshot.trainers.spos import SPOSTrainer, fair_paths

X = torch.zeros(1, 1, 8, 8)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[SPOSTrainer, Path]:
    """A run of the trainer above, which no test changes, and its folder."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = spos(tiny(), checkpoint_dir=folder)
    trainer.train()
    return trainer, folder


def states_equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == other_name and torch.equal(a, b) for (name, a), (other_name, b) in pairs)


# ---- which paths train -----------------------------------------------------------------------------------------


def test_a_uniform_step_moves_what_was_drawn_and_nothing_else() -> None:
    """Weights, statistics and momentum of candidates that were not drawn stay bit for bit."""
    model = tiny()
    trainer = spos(model)
    trainer._prepare()
    batch = next(iter(torch.utils.data.DataLoader(digit_data(), batch_size=32)))
    drawn_options = set()
    for _ in range(12):
        before, momenta = copy.deepcopy(model.state_dict()), copy.deepcopy(trainer.optimizer.state_dict()["state"])
        trainer._search_step(batch)
        one, two, depth = model.one.drawn, model.two.drawn, 1 + model.deep.drawn
        drawn_options.add(one)
        blocks = tuple(f"deep.blocks.{i}." for i in range(depth))
        names = ("stem.", "head.", f"one.candidates.{model.one.options[one]}.", f"two.candidates.{two}.", *blocks)
        moved = {n for n, value in model.state_dict().items() if not torch.equal(before[n], value)}
        assert moved == {n for n in before if n.startswith(names)}
        after = trainer.optimizer.state_dict()["state"]
        for i, name in enumerate(n for n, _ in model.named_parameters() if not n.endswith("alpha")):
            if not name.startswith(names):
                assert (i in momenta) == (i in after)
                assert i not in after or torch.equal(after[i]["momentum_buffer"], momenta[i]["momentum_buffer"])
    assert drawn_options == {0, 1, 2, 3}


class Still(nn.Module):
    """Decisions of 3, 3 and 2 options in float64, without anything random."""

    def __init__(self) -> None:
        super().__init__()
        self.one = LayerChoice([nn.Linear(4, 4) for _ in range(3)], "one")
        self.two = LayerChoice([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)], "two")
        self.three = LayerChoice([nn.Linear(4, 3) for _ in range(2)], "three")

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.one(x)))


def still(seed: int, **changes: Any) -> tuple[Still, SPOSTrainer, tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    model = Still().double()
    data = TensorDataset(torch.randn(12, 4).double(), torch.arange(12) % 3)
    settings: dict[str, Any] = {
        "cost": None,
        "limits": None,
        "metrics": None,
        "loss": nn.CrossEntropyLoss(),
        "dataset": data,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "seed": seed,
        "dummy_input": (1, 4),
        "batch_size": 6,
        "arch_fraction": 0.5,
    }
    return model, spos(model, **{**settings, **changes}), data.tensors


@pytest.mark.parametrize("seed", range(4))
def test_a_strict_step_runs_every_option_once_and_adds_up_their_gradients(seed: int) -> None:
    """Against plain networks of the three paths that ran, whose gradients are added by hand; m = 3."""
    model, trainer, batch = still(seed, fairness="strict")
    ran: dict[str, list[int]] = {"one": [], "two": [], "three": []}
    counts: Counter[str] = Counter()
    for label, rows in ran.items():
        for k, candidate in enumerate(getattr(model, label)):
            candidate.register_forward_hook(lambda *_, rows=rows, k=k: rows.append(k))
    for name, p in model.named_parameters():
        if not name.endswith("alpha"):
            p.register_hook(lambda gradient, name=name: counts.update([name]))
    trainer._prepare()
    for rows in ran.values():
        rows.clear()  # of the checks before the run
    before = copy.deepcopy(model.state_dict())
    trainer._fair_step(batch)

    assert sorted(ran["one"]) == sorted(ran["two"]) == [0, 1, 2]
    assert sorted(ran["three"]) in ([0, 0, 1], [0, 1, 1])
    for name, n in counts.items():
        label, _, k, *_ = name.split(".")
        assert n == (1 if label != "three" else ran["three"].count(int(k)))
    assert len(counts) == 2 * (3 + 3 + 2)

    gradients = {name: torch.zeros_like(value) for name, value in before.items()}
    for path in zip(*ran.values(), strict=True):
        fresh = Still().double()
        fresh.load_state_dict(before)
        plain = fixed(fresh, dict(zip(ran, path, strict=True)))
        nn.functional.cross_entropy(plain(batch[0]), batch[1]).backward()
        for name, p in plain.named_parameters():
            label, rest = name.split(".", 1)
            gradients[f"{label}.candidates.{path[list(ran).index(label)]}.{rest}"] += p.grad
    for name, value in model.state_dict().items():
        assert torch.allclose(value, before[name] - 0.1 * gradients[name], rtol=0, atol=1e-14), name


def test_strict_training_gives_each_option_as_many_steps() -> None:
    """18 steps on batches of the trainer: 18 runs of every option of the decisions with m = 4 options."""
    model = tiny()
    counts: Counter[str] = Counter()
    for name in ("k1", "k3", "k5"):
        model.one[name].conv.weight.register_hook(lambda gradient, name=name: counts.update([name]))
    spos(model, fairness="strict").train()
    assert counts == {"k1": 18, "k3": 18, "k5": 18}


@settings(max_examples=40, deadline=None)
@given(sizes=st.dictionaries(st.text(max_size=2), st.integers(1, 7), min_size=1, max_size=5), seed=st.integers(0, 999))
def test_fair_paths_have_every_option_as_often_as_possible(sizes: dict[str, int], seed: int) -> None:
    paths = fair_paths(sizes, torch.Generator().manual_seed(seed))
    m = max(sizes.values())
    assert len(paths) == m
    for label, n in sizes.items():
        counts = Counter(path[label] for path in paths)
        assert set(counts) == set(range(n))
        assert set(counts.values()) <= {m // n, -(-m // n)}


def test_fair_paths_repeat_each_option_of_a_smaller_decision_alike() -> None:
    """4 paths, 3 options: each stands twice in a third of the steps, and in any of the 4 paths alike."""
    source = torch.Generator().manual_seed(0)
    twice: Counter[int] = Counter()
    places: Counter[tuple[int, int]] = Counter()
    for _ in range(1200):
        row = [path["b"] for path in fair_paths({"a": 4, "b": 3}, source)]
        twice[Counter(row).most_common(1)[0][0]] += 1
        places.update(enumerate(row))
    assert all(abs(twice[k] - 400) < 85 for k in range(3))  # five standard deviations of 16.3
    assert all(abs(places[i, k] - 400) < 85 for i in range(4) for k in range(3))


# ---- the search ------------------------------------------------------------------------------------------------


def everything() -> list[dict[str, int]]:
    return [{"one": a, "two": b, "depth": c} for a in range(4) for b in range(3) for c in range(2)]


def test_finds_the_best_within_the_limit_and_writes_all_that_it_scored(
    finished: tuple[SPOSTrainer, Path], tmp_path: Path
) -> None:
    """With room for 20, exactly the 17 feasible ones are scored; the best is exported, reported and in the file."""
    trainer, folder = finished
    model = trainer.model
    macs = count_macs(model, (X,))
    feasible = [c for c in everything() if macs.of(c) <= LIMIT]
    assert len(feasible) == 17
    assert sorted(map(str, feasible)) == sorted(str(c.choices) for c in trainer.candidates)
    best = max(trainer.candidates, key=lambda c: c.score)
    assert choices_of(model, trainer.export(tmp_path / "arch.json")) == best.choices
    for label, decision in trainer.decisions.items():
        assert decision.alpha.tolist() == [float(k == best.choices[label]) for k in range(len(decision.options))]
    (row,) = (row for row in trainer.report().rows if row.name == "macs")
    assert (row.target, row.predicted) == (LIMIT, macs.of(best.choices))

    rows = json.loads((folder / "candidates.json").read_text())
    assert [row["score"] for row in rows] == sorted((c.score for c in trainer.candidates), reverse=True)
    assert rows[0]["arch"] == read_arch(tmp_path / "arch.json").arch
    assert all(row["score"] == -row["loss"] and row["macs"] <= LIMIT and 0 <= row["acc1"] <= 1 for row in rows)
    # Scores are repeatable, and those of the evaluator that random search uses.
    assert trainer.evaluator(rows[1]["arch"]) == rows[1]["score"]
    assert trainer.random_search(evaluations=100).best == best


def test_the_supernet_is_searched_as_it_was_trained(finished: tuple[SPOSTrainer, Path]) -> None:
    """The warm-up alone trains the same steps without a search: weights equal, and statistics off the found path."""
    trainer, _ = finished
    trained = tiny()
    spos(trained, warmup_epochs=3, num_epochs=0).train()
    one, two = trainer.model.state_dict(), trained.state_dict()
    different = {name for name in one if not torch.equal(one[name], two[name])}
    arch = trainer.export()
    on_path = {f"one.candidates.{arch['one']}.norm", f"two.candidates.{arch['two']}", "deep.blocks.0", "deep.blocks.1"}
    for name in different:
        assert name.endswith("alpha") or (name.startswith(tuple(on_path)) and ".norm." in name), name


def test_the_exported_network_has_its_own_statistics(finished: tuple[SPOSTrainer, Path]) -> None:
    """By hand: the plain network with the trained weights, recalibrated on the batches of the evaluator."""
    trainer, _ = finished
    model = trainer.model
    batches = trainer.evaluator.recalibrate_on
    assert [len(x) for x in batches] == [32, 32]
    lowest = min(count_params(model).of(c.choices) for c in trainer.candidates)
    before = copy.deepcopy(model)
    for budget in (None, {"params": lowest}):
        plain = trainer.export_model(budget=budget)
        by_hand = fixed(model, trainer.export(budget=budget))
        recalibrate_(by_hand, batches)
        x = digit_data(16).tensors[0]
        assert torch.allclose(plain.eval()(x), by_hand.eval()(x), rtol=1e-5, atol=1e-6)
        assert states_equal(model, before)
    # What is in the model is the found path's, so that it computes what the export does.
    set_sampler(before, Argmax())
    assert torch.equal(before.eval()(x), trainer.export_model().eval()(x))


def test_a_budget_chooses_the_best_scored_architecture_that_keeps_it(finished: tuple[SPOSTrainer, Path]) -> None:
    trainer, _ = finished
    model = trainer.model
    params = count_params(model)
    costs = sorted({params.of(c.choices) for c in trainer.candidates})
    for limit in costs:
        within = [c for c in trainer.candidates if params.of(c.choices) <= limit]
        found = choices_of(model, trainer.export(budget={"params": limit}))
        assert found == max(within, key=lambda c: c.score).choices
    message = rf"none of the 17 evaluated .*\n.*lowest evaluated {costs[0]:g}, reachable {costs[0]:g} to"
    with pytest.raises(InfeasibleTargetError, match=message):
        trainer.export(budget={"params": costs[0] - 1})
    with pytest.raises(ConfigurationError, match="budget: params nan"):
        trainer.export(budget={"params": math.nan})


def test_an_infeasible_limit_stops_before_the_first_step() -> None:
    model = tiny()
    before = copy.deepcopy(model)
    trainer = spos(model, limits={"macs": 10})
    with pytest.raises(InfeasibleTargetError, match=r"macs: budget 10, reachable \d+ to \d+ MAC"):
        trainer.train()
    assert trainer.step == 0
    assert states_equal(model, before)


@pytest.mark.parametrize(("mode", "sign"), [(None, 1), ("max", 1), ("min", -1)])
def test_scores_by_a_metric_of_either_direction(mode: Any, sign: int, tmp_path: Path) -> None:
    settings_of = {"warmup_epochs": 0, "num_epochs": 1, "generations": 1, "checkpoint_dir": tmp_path}
    trainer = spos(tiny(), monitor="acc5", monitor_mode=mode, **settings_of)
    trainer.train()
    rows = json.loads((tmp_path / "candidates.json").read_text())
    assert len({row["acc5"] for row in rows}) > 1
    assert [row["score"] for row in rows] == sorted((sign * row["acc5"] for row in rows), reverse=True)


def test_held_out_data_score_and_the_others_train_and_recalibrate(finished: tuple[SPOSTrainer, Path]) -> None:
    trainer, _ = finished
    split = trainer.split
    assert split is not None
    assert set(trainer.evaluator.dataset.indices) == set(split.arch)
    assert not set(split.arch) & set(split.weight)
    images = digit_data().tensors[0]
    training = {image.numpy().tobytes() for image in images[list(split.weight)]}
    used = [x.numpy().tobytes() for batch in trainer.evaluator.recalibrate_on for x in batch]
    assert len(used) == 64
    assert set(used) <= training


def test_a_generation_is_a_line_of_the_log(finished: tuple[SPOSTrainer, Path]) -> None:
    trainer, folder = finished
    lines = [r for r in read_json_lines(folder / "log.jsonl") if r["kind"] == "generation"]
    assert [(r["epoch"], r["evaluated"]) for r in lines] == [(0, 4), (1, 8), (2, 12), (3, 16), (4, 17)]
    assert lines[-1]["best"] == max(c.score for c in trainer.candidates)
    files = ["candidates.json", "last.ckpt", "log.jsonl", "previous.ckpt", "tensorboard"]
    assert sorted(p.name for p in folder.iterdir()) == files


def test_no_score_that_is_a_number_is_a_diverged_supernet() -> None:
    def metrics(output: Tensor, target: Tensor) -> float:
        return math.nan

    with pytest.raises(TrainingDivergedError, match=r"no score of \d+ architectures is a number"):
        spos(tiny(), metrics=metrics, monitor="metric", num_epochs=1, warmup_epochs=0, generations=1).train()


# ---- taken up again --------------------------------------------------------------------------------------------


def files(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("log.jsonl", "candidates.json")]


@pytest.mark.parametrize("at", [10, 21, 29, 52])
def test_killed_anywhere_and_resumed_is_the_undisturbed_run(
    at: int, finished: tuple[SPOSTrainer, Path], tmp_path: Path
) -> None:
    """The loss is called once before the run, 18 times in it, and 2 times (51 samples) per architecture."""
    whole, folder_of_whole = finished
    model = tiny()
    calls = 0

    def loss(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return LabelSmoothingLoss()(output, target)

    folder = tmp_path / "killed"
    killed = spos(model, checkpoint_dir=folder, checkpoint_every=1, loss=loss)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed_model = tiny(seed=99)
    resumed = spos(resumed_model, checkpoint_dir=folder, checkpoint_every=1)
    resumed.resume(folder)
    assert resumed.train() == whole.history
    assert states_equal(resumed_model, whole.model)
    assert resumed.candidates == whole.candidates
    assert files(folder) == files(folder_of_whole)


def test_a_stop_signal_in_the_evolution_writes_where_it_is(finished: tuple[SPOSTrainer, Path], tmp_path: Path) -> None:
    whole, _ = finished
    model = tiny()
    stopped = spos(model, checkpoint_dir=tmp_path)
    values = stopped.evaluator.values
    calls = 0

    def values_and_signal(choices: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 6:
            stopped._request_stop(15)
        return values(choices)

    stopped.evaluator.values = values_and_signal  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        stopped.train()
    resumed = spos(tiny(seed=5), checkpoint_dir=tmp_path)
    resumed.resume(tmp_path)
    assert len(resumed.candidates) == 6
    resumed.train()
    assert resumed.candidates == whole.candidates
    assert resumed.export() == whole.export()


def test_a_finished_run_resumes_to_what_it_found(finished: tuple[SPOSTrainer, Path]) -> None:
    trainer, folder = finished
    model, other = trainer.model, tiny(seed=7)
    again = spos(other)
    again.resume(folder)
    assert again.candidates == trainer.candidates
    assert again.export() == trainer.export()
    lowest = min(count_params(model).of(c.choices) for c in trainer.candidates)
    budget = {"params": lowest}
    assert again.export(budget=budget) == trainer.export(budget=budget)
    one, two = again.export_model(budget=budget), trainer.export_model(budget=budget)
    assert states_equal(one, two)
    assert again.train() == trainer.history
    assert states_equal(model, other)


def test_more_epochs_after_a_finished_run_are_searched_anew(finished: tuple[SPOSTrainer, Path]) -> None:
    """What the search left behind, statistics of one path and alphas, plays no part in what follows."""
    _, folder = finished
    longer, whole = spos(tiny(seed=7), num_epochs=3), spos(tiny(), num_epochs=3)
    longer.resume(folder)
    longer.train()
    whole.train()
    assert longer.candidates == whole.candidates
    assert longer.export() == whole.export()


def test_other_limits_or_settings_are_refused_on_resume(tmp_path: Path) -> None:
    spos(tiny(), num_epochs=0, checkpoint_dir=tmp_path).train()
    for changes, message in (
        ({"limits": {"macs": 31_000}}, r"limits {'macs': 70000} there and {'macs': 31000} here"),
        ({"fairness": "strict"}, "fairness 'uniform' there and 'strict' here"),
        ({"population": 5}, "evolution"),
        ({"monitor": "acc1"}, "monitor"),
        ({"recalibration_samples": 32}, "recalibration_samples 64 there and 32 here"),
    ):
        with pytest.raises(CheckpointError, match=message):
            spos(tiny(), num_epochs=0, **changes).resume(tmp_path)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"fairness": "fair"}, ConfigurationError, "fairness='fair': allowed are 'uniform' and 'strict'"),
    ({"population": 0}, ConfigurationError, "population=0"),
    ({"generations": 1.5}, ConfigurationError, "generations=1.5"),
    ({"parents": -1}, ConfigurationError, "parents=-1"),
    ({"mutation": 2}, ConfigurationError, "mutation=2"),
    ({"arch_fraction": None}, ConfigurationError, "arch_fraction=None"),
    ({"limits": {"macs": math.inf}}, ConfigurationError, "limits: macs inf"),
    ({"limits": {"macs": "few"}}, ConfigurationError, "limits: macs 'few'"),
    ({"limits": {"watts": 3.0}}, ConfigurationError, r"limits: unknown costs \['watts'\]"),
    ({"limits": 5}, ConfigurationError, "limits=5"),
    ({"recalibration_samples": 0}, ConfigurationError, "recalibration_samples=0"),
    ({"monitor_mode": "best"}, ConfigurationError, "monitor_mode='best'"),
    ({"cost": "watts"}, ConfigurationError, "'watts'"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG, ids=lambda v: str(v)[:30])
def test_wrong_arguments_at_construction(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        spos(tiny(), **changes)


def test_an_unknown_metric_stops_before_the_first_step() -> None:
    trainer = spos(tiny(), monitor="f1")
    with pytest.raises(ConfigurationError, match=r"monitor='f1': allowed are \['loss', 'acc1', 'acc5'\]"):
        trainer.train()
    assert trainer.step == 0


def test_evaluator_without_data_says_what_is_missing() -> None:
    with pytest.raises(ConfigurationError, match="dataset=None"):
        _ = spos(tiny(), dataset=None).evaluator
