"""ProxylessTrainer(arch_method='reinforce'): the estimator against enumeration, and what a run of it keeps."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Tiny, digit_data, equal_states, proxyless, reinforce, tiny
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from oneshot import CostModel, LayerChoice, ProxylessTrainer, arch_parameters, weight_parameters
from oneshot.cost import Term
from oneshot.errors import CheckpointError, ConfigurationError, TrainingDivergedError
from oneshot.trainers.reinforce import Reward, moved_baseline, policy_gradient

# ---- the estimator -----------------------------------------------------------------------------------------------

ALPHAS = [torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64), torch.tensor([0.5, 0.1], dtype=torch.float64)]
REWARDS = torch.tensor([[0.2, 0.9], [0.4, 0.1], [0.7, 0.3]], dtype=torch.float64)  # by the options of both decisions
EVERY = list(itertools.product(range(3), range(2)))


def gradient_of_expected_reward() -> list[Tensor]:
    """By autograd on J = sum over all networks of p(network) R(network)."""
    alphas = [alpha.clone().requires_grad_() for alpha in ALPHAS]
    p, q = (alpha.softmax(0) for alpha in alphas)
    return list(torch.autograd.grad((p[:, None] * q[None, :] * REWARDS).sum(), alphas))


def expectation(samples: int, baseline: Any) -> list[Tensor]:
    """Of the estimate from so many networks, over all of their combinations with the probability of each."""
    probabilities = [alpha.softmax(0) for alpha in ALPHAS]
    total = [torch.zeros_like(alpha) for alpha in ALPHAS]
    for drawn in itertools.product(EVERY, repeat=samples):
        weight = math.prod(float(probabilities[0][a] * probabilities[1][b]) for a, b in drawn)
        rewards = torch.stack([REWARDS[network] for network in drawn])
        advantages = rewards - baseline(float(rewards.mean()))
        for l in range(2):
            total[l] += weight * policy_gradient(probabilities[l], [network[l] for network in drawn], advantages)
    return total


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("constant", [0.0, 0.55])
def test_expected_estimate_is_the_gradient_of_the_expected_reward(samples: int, constant: float) -> None:
    for found, exact in zip(expectation(samples, lambda _: constant), gradient_of_expected_reward(), strict=True):
        assert torch.allclose(-found, exact, atol=1e-14)


@pytest.mark.parametrize("samples", [2, 3])
def test_a_baseline_that_has_seen_the_rewards_scales_the_gradient(samples: int) -> None:
    """Of m samples and b = 0.01 b_before + 0.99 mean: (1 - 0.99 / m) of it is expected, first 1 - 1 / m."""
    exact = gradient_of_expected_reward()
    for before, share in ((0.4, 0.99), (None, 1.0)):
        for found, gradient in zip(
            expectation(samples, lambda mean, b=before: moved_baseline(b, mean, 0.99)), exact, strict=True
        ):
            assert torch.allclose(-found, (1 - share / samples) * gradient, atol=1e-14)


def test_baseline_is_nearly_the_last_mean() -> None:
    """By hand: 0.5; 0.5 + 0.99 * 0.2 = 0.698; 0.698 + 0.99 * (0.1 - 0.698) = 0.10598."""
    b = moved_baseline(None, 0.5, 0.99)
    b = moved_baseline(b, 0.7, 0.99)
    assert b == pytest.approx(0.698)
    assert moved_baseline(b, 0.1, 0.99) == pytest.approx(0.10598)


def test_reward_by_hand() -> None:
    """Two costs multiply: 0.8 * (50 / 100)^0.1 * (9 / 4)^0.5 = 0.8 * 0.933033 * 1.5."""
    measured = {"acc1": 0.8, "acc5": 0.9, "loss": math.log(4.0)}
    costs, references = {"macs": 100.0, "params": 4.0}, {"macs": 50.0, "params": 9.0}
    both = Reward(None, {"macs": 0.1, "params": 0.5}, ["macs", "params"])
    assert both(measured, costs, references) == pytest.approx(0.8 * 0.9330329915 * 1.5)
    assert Reward(None, {}, [])(measured, costs, references) == 0.8
    assert Reward("acc5", {}, [])(measured, costs, references) == 0.9
    assert Reward("loss", {}, [])(measured, {}, {}) == pytest.approx(0.25)
    assert Reward(None, {}, [])({"loss": math.log(4.0)}, {}, {}) == pytest.approx(0.25)
    assert Reward(lambda m: 1 - m["acc1"], {}, [])(measured, {}, {}) == pytest.approx(0.2)
    # a reward alone may be negative, times a cost it may not
    assert Reward(lambda m: -1.0, {}, [])(measured, {}, {}) == -1.0
    with pytest.raises(ConfigurationError, match=r"is -1.0; with costs it is multiplied"):
        Reward(lambda m: -1.0, 0.1, ["macs"])(measured, costs, references)
    with pytest.raises(ConfigurationError, match=r"reward='f1': measured are \['acc1', 'acc5', 'loss'\]"):
        Reward("f1", {}, [])(measured, {}, {})


# ---- one update of the trainer ------------------------------------------------------------------------------------


class Two(nn.Module):
    """One decision in two places, and one of its own; the output is what was chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = LayerChoice([nn.Linear(2, 2), nn.Identity(), nn.Tanh()], label="shared")
        self.second = LayerChoice([nn.Linear(2, 2), nn.Identity(), nn.Tanh()], label="shared")
        self.last = LayerChoice([nn.Linear(2, 3), nn.Linear(2, 3, bias=False)], label="last")

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)))


LATENCY = {"shared": [2.0, 1.0, 4.0], "last": [1.0, 0.5]}


def two(**changes: Any) -> tuple[Two, ProxylessTrainer, Any]:
    torch.manual_seed(3)
    model = Two()
    with torch.no_grad():
        model.first.alpha.copy_(torch.tensor([0.3, -0.2, 0.5]))
    data = TensorDataset(torch.randn(60, 2), torch.arange(60) % 3)
    terms = [Term(t, {k: frozenset({i})}) for k, row in LATENCY.items() for i, t in enumerate(row)]
    settings: dict[str, Any] = {
        "loss": nn.CrossEntropyLoss(),
        "metrics": lambda output, target: {"acc": (output.argmax(1) == target).float().mean()},
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "dataset": data,
        "cost": CostModel("latency_ms", "ms", terms, model),
        "ref_latency": 3.0,
        "arch_method": "reinforce",
        "rl_batch_size": 5,
        "device": "cpu",
        "workers": 0,
        "batch_size": 8,
    }
    trainer = ProxylessTrainer(model, **{**settings, **changes})
    trainer._prepare()
    return model, trainer, (data.tensors[0][:8], data.tensors[1][:8])


def test_one_update_by_hand() -> None:
    """The sum over samples and labels written out, the second time with the moved baseline."""
    model, trainer, batch = two()
    alphas = {"shared": model.first.alpha, "last": model.last.alpha}
    assert model.second.alpha is model.first.alpha
    b = None
    for _ in range(2):
        drawn: list[dict[str, int]] = []
        set_sampler = trainer._set

        def recorded(sampler: Any, set_sampler: Any = set_sampler, drawn: Any = drawn) -> None:
            set_sampler(sampler)
            drawn.append({label: int(d.drawn.active) for label, d in trainer.decisions.items()})

        trainer._set = recorded  # type: ignore[method-assign]
        before = {name: alpha.detach().clone() for name, alpha in alphas.items()}
        trainer._reinforce_step(batch)
        trainer._set = set_sampler  # type: ignore[method-assign]
        assert len(drawn) == 5
        rewards = []
        for path in drawn:
            with torch.no_grad():
                x = list(model.second)[path["shared"]](list(model.first)[path["shared"]](batch[0]))
                output = list(model.last)[path["last"]](x)
            accuracy = float((output.argmax(1) == batch[1]).float().mean())
            latency = LATENCY["shared"][path["shared"]] + LATENCY["last"][path["last"]]
            rewards.append(accuracy * (3.0 / latency) ** 0.1)
        mean = sum(rewards) / 5
        b = mean if b is None else 0.01 * b + 0.99 * mean
        assert trainer.baseline == pytest.approx(b)
        for name, alpha in alphas.items():
            p = torch.exp(before[name].double()) / torch.exp(before[name].double()).sum()
            expected = torch.zeros(len(p), dtype=torch.float64)
            for path, reward in zip(drawn, rewards, strict=True):
                for k in range(len(p)):
                    of_log_p = (1.0 if path[name] == k else 0.0) - float(p[k])
                    expected[k] -= (reward - b) * of_log_p / 5
            assert torch.allclose(alpha.grad.double(), expected, atol=1e-7)
            assert not torch.equal(before[name], alpha)


def test_an_update_moves_alphas_only_and_evaluates_without_gradient() -> None:
    """No weight, gradient, BatchNorm statistic, momentum or mode changes; dropout is off, BatchNorm sees the batch."""
    model = tiny()
    trainer = reinforce(model)
    trainer._prepare()
    model.train()
    seen: set[tuple[bool, bool]] = set()
    model.one.candidates["k3"].norm.register_forward_hook(
        lambda m, _, out: seen.add((out.requires_grad, m.track_running_stats))
    )
    model.one.candidates["k3"].drop.register_forward_hook(lambda m, x, out: seen.add((m.training, False)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = next(iter(DataLoader(digit_data(), batch_size=32)))
    for _ in range(4):
        trainer._reinforce_step(batch)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed == {"one.alpha", "two.alpha", "deep.alpha"}
    assert seen == {(False, False)}
    assert all(p.grad is None and p.requires_grad for p in weight_parameters(model))
    assert not trainer.optimizer.state
    assert all(m.training for m in model.modules())
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_equal_networks_are_evaluated_once() -> None:
    model, trainer, batch = two(rl_batch_size=40)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.register_forward_hook(count)
    trainer._reinforce_step(batch)
    assert 1 < calls <= 6  # 3 * 2 networks


def test_steps_come_as_those_of_the_gradient_method() -> None:
    for skip, every, expected in ((True, 2, 3), (False, 2, 6), (False, 5, 2)):
        trainer = reinforce(tiny(), skip_first_epoch=skip, arch_every=every)
        trainer.train()
        assert trainer.arch_batches == expected


# ---- whole runs ----------------------------------------------------------------------------------------------------


class Bandit(nn.Module):
    """Every option scores what is planted for it; the best network takes option 2 and option 0."""

    def __init__(self) -> None:
        super().__init__()
        self.one = LayerChoice([Adds(0.1), Adds(0.2), Adds(0.5)], label="one")
        self.two = LayerChoice([Adds(0.4), Adds(0.1)], label="two")

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x * 0))


class Adds(nn.Module):
    def __init__(self, score: float) -> None:
        super().__init__()
        self.score = score
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.score + 0 * self.weight


def bandit(**changes: Any) -> ProxylessTrainer:
    model = Bandit()
    settings: dict[str, Any] = {
        "loss": lambda output, target: output.mean(),
        "metrics": lambda output, target: {"score": output.mean()},  # constant per network, no gradient used
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.0),
        "dataset": TensorDataset(torch.rand(40, 1), torch.zeros(40)),
        "num_epochs": 10,
        "batch_size": 2,
        "workers": 0,
        "device": "cpu",
        "arch_method": "reinforce",
        "rl_batch_size": 4,
        "arch_every": 1,
        "arc_learning_rate": 0.05,
        "progress": False,
    }
    return ProxylessTrainer(model, **{**settings, **changes})


@pytest.mark.parametrize("seed", range(3))
def test_the_best_network_of_a_bandit_is_found(seed: int) -> None:
    trainer = bandit(seed=seed)
    history = trainer.train()
    assert trainer.export() == {"one": 2, "two": 0}
    p = {label: decision.alpha.detach().softmax(0).max() for label, decision in trainer.decisions.items()}
    assert all(value > 0.8 for value in p.values()), p
    assert history[-1]["reward"] > history[1]["reward"]
    assert history[-1]["reward"] == pytest.approx(0.9, abs=0.05)


def test_a_cost_turns_the_choice_around() -> None:
    """Option 2 costs 100 MACs and the others 1: (0.5 + 0.4) * 0.01^0.5 = 0.09 is less than 0.2 + 0.4."""
    terms = [Term(100.0, {"one": frozenset({2})}), Term(1.0, {"one": frozenset({0, 1})})]
    model_cost = CostModel("work", "MAC", terms, Bandit())
    trainer = bandit(cost=model_cost, ref_latency=1.0, cost_exponent=0.5)
    history = trainer.train()
    assert trainer.export() == {"one": 1, "two": 0}
    assert history[-1]["work_sampled"] < 20
    assert history[1]["cost_share"] > 0.3
    followed = bandit(cost=model_cost, ref_latency=1.0, grad_reg_loss_type=None)
    assert followed.train()[-1]["cost_share"] == 0
    assert followed.export() == {"one": 2, "two": 0}
    assert followed.history[-1]["work_soft"] > 20


def test_resume_is_bit_for_bit_and_keeps_the_baseline(tmp_path: Path) -> None:
    model = tiny()
    trainer = reinforce(model, checkpoint_dir=tmp_path, checkpoint_every=1)
    saved: dict[int, Path] = {}
    baselines: dict[int, float | None] = {}
    save = trainer.save

    def keep(path: Any) -> None:
        save(path)
        saved[trainer.step] = Path(shutil.copy(path, tmp_path / f"at{trainer.step}.ckpt"))
        baselines[trainer.step] = trainer.baseline

    trainer.save = keep  # type: ignore[method-assign]
    history = trainer.train()
    for step in (3, 9, 12, 15):
        other = tiny(seed=99)
        again = reinforce(other)
        again.resume(saved[step])
        assert again.baseline == baselines[step]
        assert again.train() == history
        assert again.baseline == trainer.baseline is not None
        assert equal_states(model.state_dict(), other.state_dict())
    assert baselines[3] is None
    assert baselines[9] is not None
    with pytest.raises(CheckpointError, match="arch_method 'reinforce' there and 'gradient' here"):
        proxyless(tiny()).resume(saved[9])
    with pytest.raises(CheckpointError, match="rl_batch_size 6 there and 7 here"):
        reinforce(tiny(), rl_batch_size=7).resume(saved[9])


def test_without_metrics_the_reward_is_the_likelihood() -> None:
    trainer = reinforce(tiny(), metrics=None, num_epochs=1)
    history = trainer.train()
    assert 0 < history[-1]["reward"] < 1


def test_peak_memory_and_several_costs_are_rewarded() -> None:
    history = reinforce(tiny(), cost=["macs", "peak_memory"], normalize=True, ref_latency=65.0).train()
    assert {"macs_sampled", "peak_memory_sampled"} <= set(history[-1])


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"arch_method": "rl"}, "arch_method='rl': allowed are 'gradient' and 'reinforce'"),
    ({"rl_batch_size": 1}, "rl_batch_size=1: an integer of at least 2"),
    ({"rl_batch_size": 2.0}, "rl_batch_size=2.0"),
    ({"baseline_decay": 0}, "baseline_decay=0: a number above 0, at most 1"),
    ({"baseline_decay": float("nan")}, "baseline_decay=nan"),
    ({"reward": 3}, "reward=3: the name of a metric"),
    ({"cost_exponent": -1.0}, "cost_exponent of 'macs'=-1.0: a finite number >= 0"),
    ({"cost_exponent": {"params": 0.1}}, r"the costs of this run are \['macs'\]"),
    ({"grad_reg_loss_params": {"lambda": 0.1}}, "arch_method='reinforce' has costs in its reward"),
    ({"grad_reg_loss_type": "mul#log"}, "arch_method='reinforce' has costs in its reward"),
    ({"ref_latency": 0}, "needs it above 0"),
    ({"ref_latency": 65.0}, "is the default in ms; the cost is 'macs'"),
    ({"arch_method": "gradient", "reward": "acc1"}, "arch_method='gradient' has no reward"),
    ({"arch_method": "gradient"}, "arch_method='gradient' has no reward"),  # of the exponent in ``reinforce``
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[m[:24] for _, m in WRONG])
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        reinforce(tiny(), **changes)


def test_wrong_before_the_first_step() -> None:
    free = CostModel("work", "MAC", [Term(5.0, {"one": frozenset({1})})], Tiny())
    for changes, message in (
        ({"reward": "f1"}, r"reward='f1': measured are \['acc1', 'acc5', 'loss'\]"),
        ({"reward": lambda m: -m["loss"]}, "must not be negative"),
        ({"cost": free}, "cost 'work': the smallest network costs 0 MAC"),
    ):
        trainer = reinforce(tiny(), **changes)
        with pytest.raises(ConfigurationError, match=message):
            trainer.train()
        assert trainer.step == 0


def test_a_reward_that_is_not_finite_stops_the_run() -> None:
    trainer = bandit(reward=lambda m: float("inf") if trainer.step else 1.0)
    with pytest.raises(TrainingDivergedError, match="reward = inf"):
        trainer.train()
    assert not any(alpha.isnan().any() for alpha in arch_parameters(trainer.model))
