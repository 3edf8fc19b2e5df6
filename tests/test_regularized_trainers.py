"""Regularizers in trainers: strength 0 changes nothing, and a run is the loop written by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import pytest
import torch
from test_targets import NAMES, SEARCHED, build, equal, network, rows
from torch import Tensor, nn

from oneshot import (
    DUCCIO,
    L1,
    L2,
    PIT,
    BaseRegularizer,
    BinaryGates,
    GroupLasso,
    Regularizer,
    Schedule,
    draw,
    set_sampler,
)
from oneshot.data import BatchStream, mix_seed
from oneshot.errors import CheckpointError, ConfigurationError, InfeasibleTargetError, InputTypeError
from oneshot.regularizers.proximal import block_soft_threshold, soft_threshold
from oneshot.trainers import PITTrainer

# What some trainers want to know when there is no target: that costs are not priced by ProxylessNAS's loss.
UNPRICED: dict[str, dict[str, Any]] = {
    name: {"grad_reg_loss_type": None, "ref_latency": {"params": 100.0, "macs": 100.0}}
    for name in ("proxyless", "proxyless masks", "darts")
} | {"reinforce": {"ref_latency": {"params": 100.0, "macs": 100.0}}}


def trainer_of(name: str, model: nn.Module | None = None, **changes: Any) -> Any:
    return build(name, model, **{"num_epochs": 2, **UNPRICED.get(name, {}), **changes})


OF_WEIGHTS: dict[str, tuple[Any, str]] = {
    "l1": (lambda strength: L1("*weight", strength), "l1_value"),
    "l1 subgradient": (lambda strength: L1("*weight", strength, method="subgradient"), "l1_value"),
    "l2": (lambda strength: L2("*", strength), "l2_value"),
    "group lasso": (lambda strength: GroupLasso("rows", strength), "group_lasso_value"),
    "subgradient": (lambda strength: GroupLasso("rows", strength, method="subgradient"), "group_lasso_value"),
    "columns": (lambda strength: GroupLasso("columns", strength, least=1), "group_lasso_value"),
}
OF_COSTS: dict[str, Any] = {
    "in proportion": lambda strength: BaseRegularizer("params", strength),
    "normalized": lambda strength: BaseRegularizer("params", strength, normalize=True),
    "duccio": lambda strength: DUCCIO({"params": 60.0, "macs": 50.0}, final_strengths=(strength, strength)),
    "duccio of a loss": lambda strength: DUCCIO({"params": 60.0}, task_loss=strength),
}


# --- strength 0 -----------------------------------------------------------------------------------------------------


def pairs(names: Sequence[str], kinds: Iterable[str], always: Sequence[str]) -> list[tuple[str, str]]:
    """Every kind with one trainer, and every trainer with these kinds."""
    found = {(names[0], kind): None for kind in kinds} | {(name, kind): None for name in names for kind in always}
    return list(found)


@pytest.mark.parametrize(("name", "kind"), pairs(NAMES, [*OF_COSTS, *OF_WEIGHTS], ["all"]))
def test_strength_0_changes_nothing(name: str, kind: str) -> None:
    """Bit for bit, with weight decay and momentum of the weights."""
    makers: dict[str, Any] = {**OF_COSTS, **{k: make for k, (make, _) in OF_WEIGHTS.items()}}
    kinds = [kind]
    if kind == "all":
        of_costs = [] if name == "spos" else list(OF_COSTS)
        kinds = [*of_costs, "l1", "l2", "group lasso", "subgradient", "l1 subgradient"]
    made = makers[kinds[0]](0.0)
    for other in kinds[1:]:
        made = made + makers[other](0.0)
    plain, regularized = trainer_of(name), trainer_of(name, regularizer=made)
    plain.train()
    regularized.train()
    assert equal(plain.model, regularized.model)
    if isinstance(plain.model, PIT):
        assert all(bool((mask.alpha == 1).all()) for _, mask in regularized.model.masks.items())


@pytest.mark.parametrize("kind", OF_WEIGHTS)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_masks_stay_at_1_where_only_weights_are_paid_for(kind: str, optimizer: Any) -> None:
    """Also with weight decay over all parameters of the network, masks included."""
    pit = network("pit")
    before = copy.deepcopy(pit)
    made = optimizer(pit.parameters(), lr=0.05, weight_decay=0.5)
    trainer_of("pit", pit, optimizer=made, regularizer=OF_WEIGHTS[kind][0](0.01), finetune_epochs=1).train()
    assert isinstance(pit, PIT)
    assert all(bool((mask.alpha == 1).all()) for _, mask in pit.masks.items())
    assert not equal(before, pit)


@pytest.mark.parametrize("kind", OF_COSTS)
def test_costs_have_nothing_to_pull_at_in_single_path_training(kind: str) -> None:
    with pytest.raises(ConfigurationError, match="of costs have nothing to pull at: no alpha is trained here"):
        trainer_of("spos", regularizer=OF_COSTS[kind](0.1) + L2("*", 0.1))


# --- every trainer takes them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), pairs(NAMES, OF_WEIGHTS, ["group lasso"]))
def test_weights_are_paid_for_and_logged(name: str, kind: str) -> None:
    make, value = OF_WEIGHTS[kind]
    free, paying = trainer_of(name), trainer_of(name, regularizer=make(3e-3))
    free.train()
    history = paying.train()
    assert not equal(free.model, paying.model)
    for record in history:  # also of the warm-up
        assert record[value] > 0
        assert 0 < record["weight_penalty_share"] < 1
    subgradient = kind not in ("l1", "group lasso", "columns")
    shares = [key for key in history[0] if key.endswith("_gradient_share")]
    assert len(shares) == int(subgradient)
    assert all(0 < record[key] < 1 for key in shares for record in history)
    norms = [sum(float(p.detach().abs().sum()) for p in t.weights) for t in (free, paying)]
    assert norms[1] < norms[0]


@pytest.mark.parametrize(("name", "kind"), pairs(SEARCHED, OF_COSTS, ["duccio"]))
def test_costs_are_paid_for_and_logged(name: str, kind: str) -> None:
    regularizer = OF_COSTS[kind](0.05)
    free, paying = trainer_of(name), trainer_of(name, regularizer=regularizer)
    free.train()
    history = paying.train()
    assert not equal(free.model, paying.model)
    assert history[-1]["params_soft"] < free.history[-1]["params_soft"]
    if name != "reinforce":  # which takes them off a reward
        assert all(record["params_term"] >= 0 for record in history[1:])
        assert max(record["params_term"] for record in history[1:]) > 0


def test_two_of_a_kind_are_both_logged() -> None:
    together = L2("0.*", 1e-3) + L2("3.*", 2e-3)
    history = trainer_of("pit", regularizer=together).train()
    assert len([key for key in history[0] if key.startswith("l2") and key.endswith("_value")]) == 2


def test_a_sum_is_its_parts() -> None:
    """Of costs and of weights, in whatever order, and as deep as it was added up."""
    runs = []
    for order in (0, 1):
        weights, costs = GroupLasso("rows", 1e-3), BaseRegularizer("params", 1e-3)
        together = (costs + weights) if order else (weights + (costs + L2("*", 0.0)))
        trainer = trainer_of("pit", regularizer=together)
        trainer.train()
        runs.append(trainer.model)
    assert equal(*runs)


@pytest.mark.parametrize("name", ["pit", "masks and choices", "supernet", "gumbel"])
def test_in_proportion_it_is_the_strength_of_the_trainer(name: str) -> None:
    one = trainer_of(name, strength=0.01)
    other = trainer_of(name, regularizer=BaseRegularizer("params", 0.01) + BaseRegularizer("macs", 0.01))
    assert [record["loss"] for record in one.train()] == [record["loss"] for record in other.train()]
    assert equal(one.model, other.model)
    free = trainer_of(name)
    free.train()
    assert not equal(free.model, one.model)


def test_epochs_of_costs_are_those_of_the_search_and_of_weights_those_of_the_run() -> None:
    """1 + 3 epochs: DUCCIO has 0.01 + 0.99 e / 2 of its strength, and L2 acts in the second epoch of all."""
    pit = network("pit")
    trainer = trainer_of(
        "pit",
        pit,
        num_epochs=3,
        mask_learning_rate=0.0,
        optimizer=torch.optim.SGD(pit.parameters(), lr=0.0),
        regularizer=DUCCIO({"params": 82.0}, final_strengths=(0.1,)) + L2("*", 1.0, schedule=Schedule(start=1, end=2)),
    )
    history = trainer.train()
    full = 0.1 * (182 + 16 - 82)  # with the 16 of BatchNorm
    assert [record["params_term"] for record in history[1:]] == pytest.approx([full * s for s in (0.01, 0.505, 1)])
    squares = sum(float(p.detach().square().sum()) for p in trainer.weights)
    assert [record["l2_value"] for record in history] == pytest.approx([0, squares, 0, 0], rel=1e-5)


# --- loops by hand --------------------------------------------------------------------------------------------------


def batches(n: int, steps: int) -> Iterator[Any]:
    stream = BatchStream(rows(), range(n), seed=mix_seed(0, 5), batch_size=16)
    return islice(stream.iterate(0), steps)


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def of_pit(pit: PIT, **changes: Any) -> PITTrainer:
    settings: dict[str, Any] = {
        "loss": nn.CrossEntropyLoss(),
        "metrics": None,
        "optimizer": torch.optim.SGD(pit.parameters(), lr=0.1, momentum=0.5),
        "num_epochs": 2,
        "warmup_epochs": 1,
        "dataset": rows(),
        "batch_size": 16,
        "workers": 0,
        "device": "cpu",
        "mask_learning_rate": 0.05,
        "progress": False,
    }
    return PITTrainer(pit, **{**settings, **changes})


def groups_of_rows(weight: Tensor, step: float) -> Tensor:
    """sqrt(n) per row."""
    return block_soft_threshold(weight, step * math.sqrt(weight.shape[1]))


def test_group_lasso_in_a_search_is_the_loop_by_hand() -> None:
    """18 steps of SGD, momentum 0.5: the step of the penalty is 0.1 / 0.5; rows of weights of 4 and 8 columns."""
    pit, strength = PIT(dense(), (4,)), 0.01
    by_hand = copy.deepcopy(pit)
    of_pit(pit, regularizer=GroupLasso("rows", strength) + BaseRegularizer("params", 0.02), finetune_epochs=1).train()
    of_weights = torch.optim.SGD(by_hand.net_parameters(), lr=0.1, momentum=0.5)
    of_masks = torch.optim.Adam(by_hand.nas_parameters(), lr=0.05)
    by_hand.train()
    for i, (x, y) in enumerate(batches(96, 24)):
        searches = 6 <= i < 18
        if i == 18:
            of_weights.state.clear()
        by_hand.zero_grad()
        loss = nn.functional.cross_entropy(by_hand(x), y)
        if searches:
            loss = loss + 0.02 * by_hand.get_cost("params")
        loss.backward()
        of_weights.step()
        with torch.no_grad():
            for layer in (by_hand.network[0], by_hand.network[2]):  # type: ignore[index]
                layer.weight.copy_(groups_of_rows(layer.weight, 0.2 * strength))
        if searches:
            of_masks.step()
            by_hand.masks.clip_()
    for (key, one), other in zip(pit.state_dict().items(), by_hand.state_dict().values(), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6), key
    weights = [pit.network[i].weight.detach() for i in (0, 2)]  # type: ignore[index]
    assert any(bool((w.norm(dim=1) == 0).any()) for w in weights) or pit.hard_cost("params") < 58


@pytest.mark.parametrize("method", ["proximal", "subgradient"])
def test_l1_in_all_phases_is_the_loop_by_hand(method: Any) -> None:
    """6 steps each of warm-up, search (no cost pulls) and fine-tuning with another optimizer: its rate counts."""
    pit, strength = PIT(dense(), (4,)), 0.02
    by_hand: Any = dense()
    of_pit(
        pit,
        num_epochs=1,
        optimizer=torch.optim.SGD(pit.parameters(), lr=0.1),
        finetune_epochs=1,
        finetune_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.3),
        regularizer=L1("*weight", strength, method=method),
    ).train()
    for i, (x, y) in enumerate(batches(96, 18)):
        lr = 0.1 if i < 12 else 0.3
        loss = nn.functional.cross_entropy(by_hand(x), y)
        chosen = [by_hand[0].weight, by_hand[2].weight]
        if method == "subgradient":
            loss = loss + strength * torch.stack([w.abs().sum() for w in chosen]).sum()
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        with torch.no_grad():
            for p, g in zip(by_hand.parameters(), gradients, strict=True):
                p.sub_(lr * g)
            for w in chosen if method == "proximal" else ():
                w.copy_(soft_threshold(w, lr * strength))
    for one, other in zip(pit.export().parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    zeros = int(sum((pit.network.get_parameter(name) == 0).sum() for name in ("0.weight", "2.weight")))
    assert (zeros > 0) == (method == "proximal")


def test_a_candidate_that_did_not_run_is_not_shrunk() -> None:
    """Single paths, drawn as the trainer draws them: weights without a gradient stay, bit for bit."""
    model, strength = network("proxyless"), 0.05
    trainer = trainer_of(
        "proxyless",
        model,
        num_epochs=0,
        warmup_epochs=2,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        regularizer=GroupLasso("rows", strength),
    )
    step, seen = trainer._weight_step, []

    def watched(batch: Any) -> None:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        step(batch)
        for name, p in model.named_parameters():
            if p.grad is None:
                assert torch.equal(before[name], p), name
                seen.append(name)
            elif name.endswith("weight"):
                moved = before[name] - 0.1 * p.grad
                assert torch.allclose(p.detach(), groups_of_rows(moved, 0.1 * strength), rtol=1e-4, atol=1e-6), name

    trainer._weight_step = watched
    trainer.train()
    assert any("wide" in name for name in seen)
    assert any("thin" in name for name in seen)


def test_nor_is_one_under_masks() -> None:
    model = network("proxyless masks")
    assert isinstance(model, PIT)
    trainer = trainer_of("proxyless masks", model, num_epochs=0, warmup_epochs=2, regularizer=L1("*weight", 0.05))
    step, still = trainer._weight_step, []

    def watched(batch: Any) -> None:
        before = {name: p.detach().clone() for name, p in model.network.named_parameters()}
        step(batch)
        active = trainer.decisions["one"].drawn.active
        for name, p in model.network.named_parameters():
            if name.startswith("2.candidates.") and name.endswith("weight"):
                ran = name.split(".")[2] == ("wide", "thin", "skip")[active]
                assert ran != torch.equal(before[name], p), name
                still.append(ran)

    trainer._weight_step = watched
    trainer.train()
    assert set(still) == {True, False}


# --- errors before the first step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_pattern_that_fits_nothing_is_refused_before_the_first_step(name: str) -> None:
    model = network(name)
    before = copy.deepcopy(model)
    for wrong in (L1("nowhere*", 0.1), L2("nowhere*", 0.1), GroupLasso("rows", 0.1, patterns="nowhere*")):
        trainer = trainer_of(name, model, regularizer=L2("*", 1.0) + wrong)
        with pytest.raises(ConfigurationError, match="nowhere"):
            trainer.train()
        assert trainer.step == 0
    assert equal(before, model)
    for group in (trainer.optimizer, trainer.finetune_optimizer):
        assert not group._optimizer_step_post_hooks


@pytest.mark.parametrize("name", SEARCHED)
def test_costs_out_of_reach_are_refused_before_the_first_step(name: str) -> None:
    model = network(name)
    before = copy.deepcopy(model)
    for wrong, error in (
        (DUCCIO({"params": 1.0}, task_loss=1.0), InfeasibleTargetError),
        (DUCCIO({"latency": 1.0}, task_loss=1.0), ConfigurationError),
        (BaseRegularizer("latency", 1.0), ConfigurationError),
    ):
        with pytest.raises(error):
            trainer_of(name, model, regularizer=wrong).train()
    assert equal(before, model)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_regularizer(name: str) -> None:
    wrong: list[Any] = [1e-3, nn.ReLU(), lambda model: 0.0, [L2("*", 1.0)]]
    for regularizer in wrong:
        with pytest.raises(InputTypeError, match="a Regularizer is needed"):
            trainer_of(name, regularizer=regularizer)


def test_a_run_is_taken_up_with_the_same_regularizers_only(tmp_path: Any) -> None:
    first = trainer_of("pit", regularizer=L2("*", 1.0), checkpoint_dir=tmp_path)
    first.train()
    others: list[Regularizer | None] = [None, L2("*", 2.0), L2("*weight", 1.0), L1("*", 1.0)]
    others += [L2("*", 1.0) + BaseRegularizer("params", 1.0), L2("*", 1.0, schedule=Schedule(start=1))]
    for other in others:
        with pytest.raises(CheckpointError, match="regularizers"):
            trainer_of("pit", regularizer=other).resume(tmp_path)
    trainer_of("pit", regularizer=L2("*", 1.0)).resume(tmp_path)


def test_after_a_run_the_optimizers_are_followed_by_nobody() -> None:
    """One regularizer for two runs, one after the other, and one in which a step fails."""
    regularizer = GroupLasso("rows", 1e-2)
    runs = []
    for _ in range(2):
        trainer = trainer_of("pit", regularizer=regularizer, finetune_epochs=1)
        trainer.train()
        assert not trainer.optimizer._optimizer_step_post_hooks
        runs.append(trainer.model)
    assert equal(*runs)
    failing = trainer_of("pit", regularizer=regularizer)

    def fails(batch: Any) -> None:
        raise KeyboardInterrupt

    failing._search_step = fails
    with pytest.raises(KeyboardInterrupt):
        failing.train()
    assert not failing.optimizer._optimizer_step_post_hooks


def test_paths_are_drawn_alike_with_and_without_a_regularizer() -> None:
    """Nothing that a regularizer does asks for random numbers."""
    model = network("proxyless")
    set_sampler(model, BinaryGates(1))
    draw(model, torch.Generator().manual_seed(0))
    seen = []
    for regularizer in (None, GroupLasso("rows", 1e-3, relative=True)):
        trainer = trainer_of("proxyless", regularizer=regularizer, num_epochs=0)
        step = trainer._weight_step
        drawn: list[dict[str, int]] = []

        def watched(batch: Any, step: Any = step, drawn: Any = drawn, trainer: Any = trainer) -> None:
            step(batch)
            drawn.append({label: d.drawn.active for label, d in trainer.decisions.items()})

        trainer._weight_step = watched
        trainer.train()
        seen.append(drawn)
    assert seen[0] == seen[1]
    assert len(seen[0]) > 3
