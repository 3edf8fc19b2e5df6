"""SuperNetTrainer against finite differences, formulas and loops written out by hand, and enumerations."""

from __future__ import annotations

import copy
import math
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import digit_data, proxyless, supernet, tiny
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from oneshot import DUCCIO, CostModel, LayerChoice, SuperNet, arch_parameters, decisions, fixed, weight_parameters
from oneshot.cost import Term
from oneshot.data import BatchStream, mix_seed
from oneshot.errors import CheckpointError, ConfigurationError, InfeasibleTargetError, OneshotError
from oneshot.mutables.temperature import Temperature
from oneshot.trainers.decidedness import mean_entropy_of, total_inverse_variation
from oneshot.trainers.presets import fbnet, gdas
from oneshot.trainers.supernet import SuperNetTrainer

KINDS = [("softmax", False), ("softmax", True), ("gumbel", False), ("gumbel", True)]
kinds = pytest.mark.parametrize(("sampling", "hard"), KINDS)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}


# --- one step -------------------------------------------------------------------------------------------------------

MS = {"one": [0.7, 2.0, 0.1], "two": [1.5, 0.4]}
FIXED, T, S, ICV, ENTROPY = 1.5, 0.7, 0.3, 0.02, 0.05


class Still(nn.Module):
    """Two choices in float64, without anything random."""

    def __init__(self) -> None:
        super().__init__()
        self.one = LayerChoice([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Identity()], "one")
        self.two = LayerChoice([nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 3), nn.Tanh())], "two")

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def latency(model: nn.Module) -> CostModel:
    terms = [Term(t, {k: frozenset({i})}) for k, row in MS.items() for i, t in enumerate(row)] + [Term(FIXED, {})]
    return CostModel("latency_ms", "ms", terms, model)


def still(seed: int, **changes: Any) -> tuple[Still, SuperNetTrainer, Any]:
    """A trainer whose optimizers do not move, in the search phase, and a batch."""
    torch.manual_seed(seed)
    model = Still().double()
    with torch.no_grad():
        for alpha in arch_parameters(model):
            alpha.copy_(torch.randn_like(alpha))
    data = TensorDataset(torch.randn(24, 4).double(), torch.arange(24) % 3)
    settings: dict[str, Any] = {
        "loss": nn.CrossEntropyLoss(),
        "metrics": None,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "dataset": data,
        "cost": {"latency_ms": latency(model)},
        "dummy_input": (1, 4),
        "strength": S,
        "temperature": T,
        "icv_strength": ICV,
        "entropy_strength": ENTROPY,
        "seed": seed,
        "batch_size": 4,
        "workers": 0,
        "device": "cpu",
    }
    trainer = SuperNetTrainer(model, **{**settings, **changes})
    trainer.optimizer.step = trainer.arch_optimizer.step = lambda: None  # type: ignore[assignment]
    trainer._prepare()
    return model, trainer, data[:8]


def by_hand(model: Still, batch: Any, gates: dict[str, Tensor]) -> Tensor:
    x, target = batch
    middle = sum(g * op(x) for g, op in zip(gates["one"], model.one, strict=True))
    return nn.functional.cross_entropy(
        sum(g * op(middle) for g, op in zip(gates["two"], model.two, strict=True)), target
    )


def soft_gates(alphas: dict[str, Tensor], noise: dict[str, Tensor]) -> dict[str, Tensor]:
    """exp / sum exp, written out."""
    scores = {name: ((alpha + noise[name]) / T).exp() for name, alpha in alphas.items()}
    return {name: score / score.sum() for name, score in scores.items()}


def expected(gates: dict[str, Tensor]) -> float:
    """By enumeration of the six architectures."""
    every = product(enumerate(gates["one"].tolist()), enumerate(gates["two"].tolist()))
    return sum(p * q * (FIXED + MS["one"][i] + MS["two"][j]) for (i, p), (j, q) in every)


def undecided(alphas: dict[str, Tensor]) -> float:
    """icv and entropy with python numbers."""
    icv, entropies = 0.0, []
    for alpha in alphas.values():
        odds = [math.exp(a) for a in alpha.tolist()]
        p = [o / sum(odds) for o in odds]
        mean = 1 / len(p)
        icv += mean**2 / (sum((q - mean) ** 2 for q in p) / len(p) + 1e-3)
        entropies.append(-sum(q * math.log(q) for q in p))
    return ICV * icv + ENTROPY * sum(entropies) / len(entropies)


def slope(function: Any, at: dict[str, Tensor]) -> dict[str, Tensor]:
    """Central differences of a function of the two vectors."""
    found = {}
    for name, vector in at.items():
        rows = 1e-6 * torch.eye(len(vector), dtype=torch.float64)
        ends = [(function({**at, name: vector + row}), function({**at, name: vector - row})) for row in rows]
        found[name] = torch.tensor([float(up - down) / 2e-6 for up, down in ends], dtype=torch.float64)
    return found


def hinge(target: float) -> DUCCIO:
    """S max(0, E - target) in the first epoch, where a hundredth of the strength is due."""
    return DUCCIO({"latency_ms": target}, final_strengths=(100 * S,))


@kinds
@pytest.mark.parametrize("fraction", [0.0, 0.5])
@pytest.mark.parametrize("pays", ["cost", "above", "below", "log", "nothing"])
def test_gradient_of_the_alphas(sampling: Any, hard: bool, fraction: float, pays: str) -> None:
    """dL/dalpha is a finite difference of the whole loss; with hard gates that of the gates, through the softmax."""
    changes: dict[str, dict[str, Any]] = {
        "cost": {},
        "above": {"strength": 0.0, "regularizer": hinge(2.0)},  # the cheapest has 1.5 + 0.1 + 0.4
        "below": {"strength": 0.0, "regularizer": hinge(4.99)},  # the dearest has 1.5 + 2.0 + 1.5 = 5
        "log": {
            "grad_reg_loss_type": "mul#log",
            "grad_reg_loss_params": {"alpha": 0.7, "beta": 0.4},
            "ref_latency": 2.0,
            "strength": 0.0,
        },
        "nothing": {"strength": 0.0},
    }
    model, trainer, batch = still(3, sampling=sampling, hard=hard, arch_fraction=fraction, **changes[pays])
    (trainer._arch_step if fraction else trainer._joint_step)(batch)
    choices = {"one": model.one, "two": model.two}
    alphas = {name: choice.alpha.detach().clone() for name, choice in choices.items()}
    noise = {k: c.drawn.noise if sampling == "gumbel" else torch.zeros_like(alphas[k]) for k, c in choices.items()}
    active = {k: int((alphas[k] + noise[k]).argmax()) for k in alphas}
    soft = soft_gates(alphas, noise)

    def task(gates: dict[str, Tensor]) -> float:
        with torch.no_grad():
            return float(by_hand(model, batch, gates))

    def whole(ce: float, cost: float) -> float:
        if pays == "log":
            return ce * 0.7 * (math.log(cost) / math.log(2.0)) ** 0.4
        above = {"cost": cost, "above": max(0.0, cost - 2.0), "below": max(0.0, cost - 4.99), "nothing": 0.0}
        return ce + S * above[pays]

    if not hard:
        wanted = slope(lambda a: whole(task(soft_gates(a, noise)), expected(soft_gates(a, noise))), alphas)
    else:
        one_hot = {k: torch.eye(len(a), dtype=torch.float64)[active[k]] for k, a in alphas.items()}
        of_gates, at = slope(task, one_hot), task(one_hot)
        of_task = whole(2.0, expected(soft)) - whole(1.0, expected(soft))  # the loss is linear in CE
        of_cost = slope(lambda a: whole(at, expected(soft_gates(a, noise))), alphas)
        wanted = {k: of_task * soft[k] * (of_gates[k] - (soft[k] * of_gates[k]).sum()) / T + of_cost[k] for k in alphas}
    terms = slope(undecided, alphas)
    for name, choice in choices.items():
        got = choice.alpha.grad
        assert got is not None
        assert torch.allclose(got, wanted[name] + terms[name], atol=1e-8), name
        assert bool((got.abs() > 1e-4).all()), name  # also those of gates that are 0
    # The weights learn from CE, on the paths of the gates alone; in a step of the alphas not at all.
    if fraction:
        assert all(p.grad is None for p in weight_parameters(model))
        return
    gates = soft if not hard else one_hot
    on_path = [[*c[k].parameters()] for name, c in choices.items() for k in range(len(c)) if float(gates[name][k]) > 0]
    live = [p for parameters in on_path for p in parameters]
    oracle = torch.autograd.grad(by_hand(model, batch, gates), live)
    assert all(torch.allclose(p.grad, g, atol=1e-10) for p, g in zip(live, oracle, strict=True) if p.grad is not None)
    assert {id(p) for p in weight_parameters(model) if p.grad is not None} == {id(p) for p in live}


def test_the_share_of_the_cost_in_the_gradient() -> None:
    """|cost| / (|task| + |cost|) of the alphas: the two gradients from two other runs."""
    gradients = {}
    for name, changes in {
        "task": {"strength": 0.0},
        "both": {},
    }.items():
        model, trainer, batch = still(1, icv_strength=0.0, entropy_strength=0.0, **changes)
        trainer._joint_step(batch)
        gradients[name] = torch.cat([alpha.grad for alpha in arch_parameters(model)])
        share = trainer._meters.averages()["cost_share"]
    of_cost = float((gradients["both"] - gradients["task"]).abs().sum())
    assert share == pytest.approx(of_cost / (of_cost + float(gradients["task"].abs().sum())))
    assert 0 < share < 1


@kinds
def test_costs_of_a_step_are_the_expectation_over_the_networks(sampling: Any, hard: bool) -> None:
    """24 rebuilt networks, their parameters counted by PyTorch, weighted with the gates of this step."""
    model = tiny()
    with torch.no_grad():
        for i, alpha in enumerate(arch_parameters(model)):
            alpha.copy_(torch.linspace(-1, 1, len(alpha)) * (i + 1))
    trainer = supernet(model, cost="params", sampling=sampling, hard=hard, temperature=0.7)
    trainer._prepare()
    trainer.step = 6  # the first one of the search
    trainer._draw()
    found = decisions(model)
    rows = {}
    for name, decision in found.items():
        noise = decision.drawn.noise if sampling == "gumbel" else 0
        rows[name] = ((decision.alpha.detach().double() + noise) / 0.7).softmax(0).tolist()
    total = 0.0
    for options in product(*(range(len(d.options)) for d in found.values())):
        arch = {name: d.options[k] for (name, d), k in zip(found.items(), options, strict=True)}
        p = math.prod(rows[name][k] for name, k in zip(found, options, strict=True))
        total += p * sum(w.numel() for w in fixed(model, arch).parameters())
    (cost,) = trainer.searched.step_costs().values()
    assert float(cost.detach()) == pytest.approx(total, rel=1e-6)


def test_undecided_choices_by_hand() -> None:
    """Four equal branches: (1/4)^2 / (0 + 1e-3) = 62.5; three of them 1000 / 9; the sum over both."""
    four = LayerChoice([nn.Identity() for _ in range(4)])
    assert float(total_inverse_variation([four.alpha.detach()])) == pytest.approx(62.5)
    assert float(total_inverse_variation([torch.zeros(4), torch.zeros(3)])) == pytest.approx(62.5 + 1000 / 9)
    p = torch.tensor([0.5, 0.25, 0.25, 0.0])
    # variance (0.25^2 + 0 + 0 + 0.25^2) / 4 = 1 / 32
    assert float(total_inverse_variation([p.log()])) == pytest.approx((1 / 16) / (1 / 32 + 1e-3))
    assert float(mean_entropy_of([torch.zeros(4), torch.zeros(2)])) == pytest.approx(1.5 * math.log(2))


@pytest.mark.parametrize("term", ["icv_strength", "entropy_strength"])
def test_terms_that_decide_choices(term: str) -> None:
    """From nearly equal alphas, with a loss without a gradient, the leading option wins; else nothing moves."""
    entropies = {}
    for strength in (0.0, 1.0):
        model = tiny()
        with torch.no_grad():
            for alpha in arch_parameters(model):
                alpha[0] = 0.1
        loss = lambda output, target: 0 * output.sum()  # noqa: E731
        changes = {"loss": loss, "strength": 0.0, "cost": None, "arch_fraction": 0.0, term: strength}
        trainer = supernet(model, warmup_epochs=0, arch_learning_rate=0.3, **changes)
        entropies[strength] = trainer.train()[-1]["entropy"]
        assert trainer.export() == {"one": "k1", "two": 0, "depth": 1}
    assert entropies[0.0] == pytest.approx((math.log(4) + math.log(3) + math.log(2)) / 3, abs=0.01)
    assert entropies[1.0] < 0.5


# --- what moves -----------------------------------------------------------------------------------------------------


def watch(trainer: SuperNetTrainer, name: str) -> list[set[str]]:
    """What each step of that name moves, and that it leaves no gradient where it moves nothing."""
    done, seen = getattr(trainer, name), []

    def watched(batch: Any) -> None:
        before = state(trainer.model)
        done(batch)
        seen.append(moved(before, trainer.model))

    setattr(trainer, name, watched)
    return seen


def alphas_of(model: nn.Module) -> set[str]:
    ids = {id(p) for p in arch_parameters(model)}
    return {name for name, p in model.named_parameters() if id(p) in ids}


@kinds
def test_in_turns_a_step_of_the_weights_leaves_alphas_and_one_of_the_alphas_all_else(sampling: Any, hard: bool) -> None:
    model = tiny()
    trainer = supernet(model, sampling=sampling, hard=hard)
    of_weights, of_alphas = watch(trainer, "_weight_step"), watch(trainer, "_arch_step")
    trainer.train()
    assert (len(of_weights), len(of_alphas)) == (18, 12)  # 3 epochs of 6 steps, 2 of them of the search
    assert all(not names & alphas_of(model) and "head.weight" in names for names in of_weights)
    assert all(names == alphas_of(model) for names in of_alphas)


@kinds
def test_together_all_that_takes_part_moves_and_nothing_else(sampling: Any, hard: bool) -> None:
    """With hard gates: no weight, no statistic and no momentum of a candidate that is evaluated for its gate alone."""
    model = tiny()
    trainer = supernet(model, sampling=sampling, hard=hard, arch_fraction=0.0, warmup_epochs=0)
    trainer._prepare()
    with torch.no_grad():
        model.one.alpha[1], model.two.alpha[2] = 0.5, 0.5
    names = [n for n, p in model.named_parameters() if not n.endswith("alpha")]
    for step in range(4):
        before, momenta = state(model), copy.deepcopy(trainer.optimizer.state_dict()["state"])
        alphas = [c.alpha.detach().clone() for c in (model.one, model.two, model.deep)]
        batch = tuple(t[32 * step : 32 * step + 32] for t in digit_data().tensors)
        trainer._joint_step(batch)
        if not hard:
            assert moved(before, model) == set(before)
            continue
        noise = [c.drawn.noise if sampling == "gumbel" else 0 for c in (model.one, model.two, model.deep)]
        one, two, deep = (int((a + g).argmax()) for a, g in zip(alphas, noise, strict=True))
        drawn = (
            *("stem.", "head.", f"one.candidates.{model.one.options[one]}.", f"two.candidates.{two}."),
            *(f"deep.blocks.{i}." for i in range(deep + 1)),
        )
        assert moved(before, model) == {n for n in before if n.startswith(drawn)} | alphas_of(model)
        after = trainer.optimizer.state_dict()["state"]
        for i, name in enumerate(names):
            if not name.startswith(drawn):
                assert (i in momenta) == (i in after)
                assert i not in after or torch.equal(after[i]["momentum_buffer"], momenta[i]["momentum_buffer"])


@kinds
def test_the_warm_up_trains_every_candidate_and_no_alpha(sampling: Any, hard: bool) -> None:
    """Deterministic and mixed, whatever the search does later: the same 6 steps for all four of them."""
    model = tiny()
    trainer = supernet(model, sampling=sampling, hard=hard, num_epochs=0, temperature=0.5)
    with torch.no_grad():
        model.one.alpha.copy_(torch.tensor([1.0, 2.0, 0.0, -1.0]))
    before = state(model)
    trainer.train()
    assert moved(before, model) == set(before) - alphas_of(model)
    assert all(alpha.grad is None and alpha.requires_grad for alpha in arch_parameters(model))
    other = tiny()
    with torch.no_grad():
        other.one.alpha.copy_(torch.tensor([1.0, 2.0, 0.0, -1.0]))
    supernet(other, num_epochs=0, temperature=0.5).train()
    assert moved(state(other), model) == set()


@kinds
def test_the_fine_tuning_touches_the_argmax_path_alone(sampling: Any, hard: bool) -> None:
    model = tiny()
    trainer = supernet(model, sampling=sampling, hard=hard, num_epochs=1, finetune_epochs=2)
    begun: list[dict[str, Tensor]] = []
    forwards: list[str] = []
    enter = trainer._enter_phase

    def entered(phase: str) -> None:
        enter(phase)
        if phase == "finetune":
            begun.append(state(model))
            for name, module in model.named_modules():
                module.register_forward_hook(lambda *_, name=name: forwards.append(name))

    trainer._enter_phase = entered  # type: ignore[method-assign]
    trainer.train()
    arch = trainer.export()
    path = (
        *("stem.", "head.", f"one.candidates.{arch['one']}.", f"two.candidates.{arch['two']}."),
        *(f"deep.blocks.{i}." for i in range(arch["depth"])),
    )
    inside = {n for n in begun[0] if n.startswith(path)}
    assert moved(begun[0], model) == inside
    names = [n for n, p in model.named_parameters() if not n.endswith("alpha")]
    assert {names[i] for i in trainer.finetune_optimizer.state_dict()["state"]} == inside & set(names)
    places = {n for n in forwards if n.count(".") == 2 and n.startswith(("one.", "two."))}
    assert places == {f"one.candidates.{arch['one']}", f"two.candidates.{arch['two']}"}


@kinds
@pytest.mark.parametrize("fraction", [0.0, 0.2])
def test_alphas_that_are_not_trained_stay_bit_for_bit(sampling: Any, hard: bool, fraction: float) -> None:
    model = tiny()
    with torch.no_grad():
        model.two.alpha.copy_(torch.tensor([0.3, 0.1, -0.2]))
    before = state(model)
    changes = {"train_selection": False, "strength": 0.0, "icv_strength": 1.0, "arch_fraction": fraction}
    trainer = supernet(model, sampling=sampling, hard=hard, finetune_epochs=1, **changes)
    trainer.train()
    assert not moved(before, model) & alphas_of(model)
    assert {"stem.weight", "head.weight"} <= moved(before, model)
    assert all(alpha.grad is None and alpha.requires_grad for alpha in arch_parameters(model))
    assert not trainer.arch_optimizer.state


def test_one_alpha_can_be_kept_by_the_user() -> None:
    model = tiny()
    model.two.alpha.requires_grad_(False)
    supernet(model).train()
    assert not model.two.alpha.any()
    assert model.one.alpha.detach().any()
    assert not model.two.alpha.requires_grad


def test_without_a_cost_accuracy_decides() -> None:
    model = tiny()
    history = supernet(model, cost=None, strength=0.0).train()
    assert all(alpha.detach().any() for alpha in arch_parameters(model))
    assert history[-1]["cost_share"] == 0
    assert "macs_soft" not in history[-1]


# --- whole runs -----------------------------------------------------------------------------------------------------


def test_a_search_is_the_loop_by_hand() -> None:
    """Warm-up, three epochs with falling temperature, and their penalty; float64, all candidates written out."""
    torch.manual_seed(0)
    model = Still().double()
    other = copy.deepcopy(model)
    data = TensorDataset(torch.randn(24, 4).double(), torch.arange(24) % 3)
    trainer = SuperNetTrainer(
        model,
        loss=nn.CrossEntropyLoss(),
        metrics=None,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        dataset=data,
        cost={"latency_ms": latency(model)},
        dummy_input=(1, 4),
        strength=0.2,
        temperature=Temperature(4.0, 0.25, "exponential"),
        arch_learning_rate=0.05,
        warmup_epochs=1,
        num_epochs=3,
        batch_size=6,
        workers=0,
        device="cpu",
    )
    trainer.train()
    weights = [p for name, p in other.named_parameters() if not name.endswith("alpha")]
    of_weights = torch.optim.SGD(weights, lr=0.1, momentum=0.9)
    of_alphas = torch.optim.Adam([other.one.alpha, other.two.alpha], lr=0.05)
    prices = {name: torch.tensor(row, dtype=torch.float64) for name, row in MS.items()}
    stream = BatchStream(data, range(24), seed=mix_seed(0, 5), batch_size=6)
    for i, batch in enumerate(islice(stream.iterate(0), 16)):
        t = 4.0 if i < 8 else (1.0 if i < 12 else 0.25)
        gates = {name: (choice.alpha / t).softmax(0) for name, choice in (("one", other.one), ("two", other.two))}
        other.zero_grad()
        total = by_hand(other, batch, gates)
        if i >= 4:
            total = total + 0.2 * sum(gates[name] @ prices[name] for name in gates)
        total.backward()
        of_weights.step()
        if i >= 4:
            of_alphas.step()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, other.state_dict()[name], rtol=1e-9, atol=1e-12), name
    assert model.one.alpha.detach().any()


def sampled(trainer: SuperNetTrainer) -> list[Any]:
    """The sampler of each step of the run."""
    seen, put = [], trainer._set

    def watched(sampler: Any) -> None:
        seen.append(sampler)
        put(sampler)

    trainer._set = watched  # type: ignore[method-assign]
    trainer.train()
    return seen


def test_temperatures_from_epoch_to_epoch() -> None:
    falling = Temperature(8.0, 2.0, "linear")
    settings = {"arch_fraction": 0.0, "temperature": falling, "num_epochs": 4, "batch_size": 128}
    seen = sampled(supernet(tiny(), hard=True, finetune_epochs=1, **settings))  # 2 steps in an epoch
    # warm-up, search, and the argmax path, which has none
    wanted = [8.0, 8.0, *(8.0, 8.0, 6.0, 6.0, 4.0, 4.0, 2.0, 2.0), 0.0, 0.0]
    assert [getattr(s, "temperature", 0.0) for s in seen] == pytest.approx(wanted)
    assert [type(s).__name__ for s in seen] == ["Softmax"] * 10 + ["Argmax"] * 2
    assert [getattr(s, "hard", None) for s in seen] == [False] * 2 + [True] * 8 + [None] * 2
    (only,) = {s.temperature for s in sampled(supernet(tiny(), warmup_epochs=0, **{**settings, "num_epochs": 1}))}
    assert only == 8.0


def test_targets_are_met_and_the_best_epoch_is_kept(tmp_path: Path) -> None:
    """One of the depths is decided by the cost alone; the accuracy of the epochs that meet the target says which."""
    model = tiny()
    with torch.no_grad():
        model.one.alpha[2] = 2.5  # k5, 6 * 6 * 25 + 6 + 12 = 918 parameters
    settings: dict[str, Any] = {
        "cost": "params",
        "strength": 0.01,
        "targets": {"params": 500},
        "num_epochs": 5,
        "arch_learning_rate": 0.1,
        "valid_dataset": digit_data(64),
        "monitor": "acc1",
    }
    trainer = supernet(model, checkpoint_dir=tmp_path, **settings)
    history = trainer.train()
    feasible = [r for r in history if r["phase"] == "search" and r["params_hard"] <= 500]
    best = max(feasible, key=lambda r: r["valid_acc1"])
    assert history[0]["params_unprojected"] > 918
    assert len(feasible) == 5
    assert trainer.evaluate()["acc1"] == best["valid_acc1"]
    small = trainer.export_model()
    assert sum(p.numel() for p in small.parameters()) == best["params_hard"] <= 500
    assert [(row.name, row.target, row.predicted) for row in trainer.report().rows] == [
        ("params", 500.0, best["params_hard"])
    ]
    again = supernet(tiny(), **settings)
    again.resume(tmp_path / "best.ckpt")
    assert again.history[-1] == best
    assert again.export(best=False) == trainer.export()


@pytest.mark.parametrize(
    ("sampling", "hard", "fraction"),
    [("softmax", False, 0.0), ("softmax", True, 0.2), ("gumbel", False, 0.2), ("gumbel", True, 0.0)],
)
def test_resume_in_mid_epoch(tmp_path: Path, sampling: Any, hard: bool, fraction: float) -> None:
    settings: dict[str, Any] = {
        "sampling": sampling,
        "hard": hard,
        "arch_fraction": fraction,
        "icv_strength": 0.01,
        "temperature": Temperature(2.0, 0.5, "linear"),
        "finetune_epochs": 1,
        "batch_size": 48,
        "targets": {"macs": 100_000},
        "strength": 1e-4,
        "valid_dataset": digit_data(40),
    }
    model = tiny()
    trainer = supernet(model, **settings)
    per_epoch = 4 if fraction else 5
    wanted = (1, 2 * per_epoch + 2, 3 * per_epoch + 1)  # in the warm-up, the search and the fine-tuning

    def keep(*, at_epoch_end: bool) -> None:
        if trainer.step in wanted:
            trainer.save(tmp_path / f"at{trainer.step}.ckpt")

    trainer._maybe_checkpoint = keep  # type: ignore[method-assign]
    history = trainer.train()
    for step in wanted:
        other = tiny(seed=9)
        again = supernet(other, **settings)
        again.resume(tmp_path / f"at{step}.ckpt")
        assert again.train() == history, step
        assert moved(state(model), other) == set(), step
    for changes in ({"temperature": 1.0}, {"icv_strength": 0.0}, {"hard": not hard}, {"targets": {"macs": 9e4}}):
        with pytest.raises(CheckpointError, match="other settings"):
            supernet(tiny(), **{**settings, **changes}).resume(tmp_path / "at1.ckpt")


class Planted(nn.Module):
    """Digits through one of four layers, of which only ``conv`` keeps where the ink is and learns."""

    def __init__(self) -> None:
        super().__init__()

        class Mean(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.mean((2, 3), keepdim=True).expand_as(x)

        class Zero(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return 0 * x

        conv = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.choice = LayerChoice({"zero": Zero(), "mean": Mean(), "conv": conv, "column": nn.AvgPool2d(7, 1, 3)}, "c")
        self.head = nn.Linear(4 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.max_pool2d(self.choice(self.stem(x)), 2).flatten(1))


@kinds
def test_a_planted_candidate_is_found_on_three_seeds(sampling: Any, hard: bool) -> None:
    """Also by hard gates that begin at another candidate: their alphas have a gradient."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = Planted()
        trainer = supernet(
            model,
            dataset=digit_data(384),
            sampling=sampling,
            hard=hard,
            seed=seed,
            cost=None,
            strength=0.0,
            num_epochs=3,
            arch_fraction=0.25,
            arch_learning_rate=0.15,
        )
        assert trainer.export() == {"c": "zero"}
        trainer.train()
        assert trainer.export() == {"c": "conv"}


# --- presets --------------------------------------------------------------------------------------------------------


def test_gdas() -> None:
    """tau = 10 - 9.9 e / (E - 1) in epoch e of E; one path; half of the data; the optimizer of the alphas."""
    trainer = supernet(tiny(), **{**gdas(4), "batch_size": 128, "warmup_epochs": 0})
    assert [(g["lr"], g["betas"], g["weight_decay"]) for g in trainer.arch_optimizer.param_groups] == [
        (3e-4, (0.5, 0.999), 1e-3)
    ]
    seen = sampled(trainer)
    assert trainer.split is not None
    assert len(trainer.split.arch) == len(trainer.split.weight) == 128
    assert len(seen) == 8  # an arch step after the one weight step of each epoch
    assert all(s.hard for s in seen)
    assert [s.temperature for s in seen[::2]] == pytest.approx([10.0, 6.7, 3.4, 0.1])


def test_fbnet() -> None:
    """L = CE 0.2 (ln E)^0.6, tau = 5, 4.78, 4.57, ...; a fifth of the data."""
    model, trainer, batch = still(2, **{**fbnet(3, 0), "strength": 0.0, "icv_strength": 0.0, "entropy_strength": 0.0})
    trainer._arch_step(batch)
    choices = {"one": model.one, "two": model.two}
    alphas = {k: c.alpha.detach().clone().requires_grad_() for k, c in choices.items()}
    gates = {k: ((a + choices[k].drawn.noise) / 5.0).softmax(0) for k, a in alphas.items()}
    cost = FIXED + sum(gates[k] @ torch.tensor(MS[k], dtype=torch.float64) for k in gates)
    total = by_hand(model, batch, gates) * 0.2 * cost.log() ** 0.6
    for k, gradient in zip(alphas, torch.autograd.grad(total, list(alphas.values())), strict=True):
        assert torch.allclose(choices[k].alpha.grad, gradient, atol=1e-12)
    settings = {**fbnet(3, 1), "strength": 0.0, "batch_size": 48}
    trainer = supernet(tiny(), **settings)
    assert trainer.arch_optimizer.param_groups[0]["lr"] == 0.01
    seen = sampled(trainer)
    assert [type(s).__name__ for s in seen] == ["Softmax"] * 4 + ["GumbelSoftmax"] * 24
    assert [s.temperature for s in seen[4::8]] == pytest.approx([5.0, 5 * 0.956, 5 * 0.956**2])
    assert not any(s.hard for s in seen[4:])
    assert trainer.split is not None
    assert len(trainer.split.arch) == 51  # round(256 * 0.2)
    assert fbnet(200)["temperature"].at(1.0) == 0.05
    with pytest.raises(ConfigurationError, match=r"fbnet\(num_epochs=0\)"):
        fbnet(0)


# --- what is refused ------------------------------------------------------------------------------------------------

LOG = {"grad_reg_loss_type": "mul#log", "grad_reg_loss_params": {"alpha": 1, "beta": 1}}
WRONG: list[tuple[dict[str, Any], type[OneshotError], str]] = [
    ({"sampling": "uniform"}, ConfigurationError, "sampling='uniform': allowed are 'softmax' and 'gumbel'"),
    ({"hard": 1}, ConfigurationError, "hard=1"),
    ({"temperature": 0}, ConfigurationError, "start=0"),
    ({"temperature": "cold"}, ConfigurationError, "start='cold'"),
    ({"icv_strength": -1.0}, ConfigurationError, "icv_strength=-1.0"),
    ({"entropy_strength": math.nan}, ConfigurationError, "entropy_strength=nan"),
    ({"strength": -1.0}, ConfigurationError, "strength: macs -1.0"),
    ({"strength": {"params": 1.0}}, ConfigurationError, r"unknown costs \['params'\]; the network has \['macs'\]"),
    ({"cost": None}, ConfigurationError, "there is no cost; give cost= or applied_hardware="),
    ({"cost": None, "strength": 0.0, **LOG}, ConfigurationError, "'mul#log': there is no cost"),
    (LOG, ConfigurationError, "needs ref_latency"),
    ({"ref_latency": 5.0}, ConfigurationError, "they need a grad_reg_loss_type"),
    ({**LOG, "grad_reg_loss_params": {"alpha": 1}, "ref_latency": 9.0}, ConfigurationError, r"missing \['beta'\]"),
    ({"targets": {"params": 1}}, ConfigurationError, r"targets: unknown costs \['params'\]"),
    ({"targets": {"macs": 100}}, InfeasibleTargetError, "macs: budget 100, reachable"),
    ({"patience": 2}, ConfigurationError, "patience=2: it needs valid_dataset"),
    ({"arch_dataset": digit_data(), "arch_fraction": 0.0}, ConfigurationError, "arch_dataset: without arch_fraction"),
    ({"monitor_mode": "best"}, ConfigurationError, "monitor_mode='best'"),
    ({"cost": "watts"}, ConfigurationError, "'watts'"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG, ids=[m[:24] for *_, m in WRONG])
def test_wrong_arguments(changes: dict[str, Any], error: type[OneshotError], message: str) -> None:
    with pytest.raises(error, match=message):
        supernet(tiny(), **changes)


def test_wrong_before_the_first_step() -> None:
    model = tiny()
    before = state(model)
    for changes, error, message in (
        ({"monitor": "f1", "valid_dataset": digit_data(16)}, ConfigurationError, "monitor='f1'"),
        ({"arch_fraction": 1.5}, ConfigurationError, "fraction"),
    ):
        with pytest.raises(error, match=message):
            supernet(model, **changes).train()
    names = ("k1", "k3", "k5", "skip", "0", "1", "2")
    table = {**dict.fromkeys(names, 2.0), "skip": 0.1, "depth": {"1": 0.1, "2": 0.2}, "fixed": 0.1}
    # 0.1 + 2 + 0.1 + 0.1 at least is enough; without the 2 it is not, though the mean is
    cheap = {**table, "1": 0.1}
    settings = {"cost": None, "strength": 0.0, **LOG, "ref_latency": 3.0, "num_epochs": 1}
    with pytest.raises(ConfigurationError, match=r"expected cost is 0\.4 .*both > 1"):
        supernet(model, applied_hardware=cheap, **settings).train()
    assert moved(before, model) == set()
    assert "latency_ms_soft" in supernet(model, applied_hardware=table, **settings).train()[-1]


def test_targets_that_only_exclude_each_other() -> None:
    """Each can be met alone: (1, 9) or (9, 1), and both are to be at most 5."""
    model = nn.Sequential(LayerChoice([nn.Linear(4, 4), nn.Identity()], label="a"), nn.Linear(4, 2))
    rows = {"early": (1.0, 9.0), "late": (9.0, 1.0)}
    costs = {
        name: CostModel(name, "ms", [Term(t, {"a": frozenset({i})}) for i, t in enumerate(row)], model)
        for name, row in rows.items()
    }
    with pytest.raises(InfeasibleTargetError, match="the budgets must be met together"):
        supernet(model, cost=costs, strength=1.0, targets={"early": 5, "late": 5})


def test_choices_that_hardly_move_are_decided_within_the_targets() -> None:
    """k5 leads from the start to the end, and is never what is evaluated, fine-tuned or exported."""
    model = tiny()
    with torch.no_grad():
        model.one.alpha[2] = 1.0
    trainer = supernet(model, cost="params", targets={"params": 300}, arch_learning_rate=1e-6, finetune_epochs=1)
    history = trainer.train()
    searched = [record for record in history if record["phase"] == "search"]
    assert all(record["params_unprojected"] > 300 >= record["params_hard"] for record in searched)
    assert all(record["params_multiplier"] > 0 and record["params_target"] == 300 for record in searched)
    small = trainer.export_model()
    assert sum(p.numel() for p in small.parameters()) == history[-1]["params_hard"] <= 300


def test_a_latency_of_this_machine_is_measured_in_the_run_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from oneshot import LatencyTable
    from oneshot.trainers import base

    calls = []
    by_place = {
        "one": {"k1": 1.0, "k3": 3.0, "k5": 5.0, "skip": 0.0},
        "two": {"0": 3.0, "1": 5.0, "2": 2.0},
        "deep": {"1": 1.0, "2": 2.0},
    }

    def measured(*_: Any, **__: Any) -> LatencyTable:
        calls.append(1)
        return LatencyTable(by_place=by_place, fixed=0.5)

    monkeypatch.setattr(base, "measure_table", measured)
    settings = {"cost": None, "applied_hardware": "this-machine", "strength": 0.1}
    trainer = supernet(tiny(), targets={"latency_ms": 3.0}, **settings)
    assert calls == []
    with pytest.raises(InfeasibleTargetError, match=r"latency_ms: budget 3, reachable 3\.5 to 12\.5 ms"):
        trainer.train()
    assert (trainer.step, calls) == (0, [1])
    history = supernet(tiny(), targets={"latency_ms": 12.5}, normalize=True, **settings).train()
    assert history[-1]["latency_ms_hard"] <= 12.5


def test_only_a_joint_search_needs_no_held_out_part() -> None:
    with pytest.raises(ConfigurationError, match="fraction"):
        proxyless(tiny(), arch_fraction=0.0).train()
    trainer = supernet(tiny(), arch_fraction=0.0)
    trainer.train()
    assert trainer.arch_batches == 0


def test_a_supernet_with_different_widths_is_searched_with_its_own_costs() -> None:
    """narrow: 4 * 3 + 3 and 3 * 2 + 2 = 23 parameters; wide: 4 * 8 + 8 and 8 * 2 + 2 = 58."""
    torch.manual_seed(0)
    pool = LayerChoice({"narrow": nn.Linear(4, 3), "wide": nn.Linear(4, 8)}, label="pool")
    net = SuperNet(nn.Sequential(pool, nn.ReLU(), nn.Linear(8, 2)), (4,), cost="params")
    x = torch.randn(64, 4)
    settings: dict[str, Any] = {
        "loss": nn.CrossEntropyLoss(),
        "metrics": None,
        "dataset": TensorDataset(x, (x[:, 0] > 0).long()),
        "num_epochs": 3,
        "batch_size": 8,
        "workers": 0,
        "device": "cpu",
        "optimizer": torch.optim.SGD(net.parameters(), lr=0.1),
    }
    trainer = SuperNetTrainer(net, strength=1.0, targets={"params": 30}, arch_learning_rate=0.1, **settings)
    trainer.train()
    assert trainer.export() == {"pool": "narrow"}
    assert sum(p.numel() for p in trainer.export_model().parameters()) == 23
    with pytest.raises(ConfigurationError, match="has its own"):
        SuperNetTrainer(net, cost="macs", **settings)
