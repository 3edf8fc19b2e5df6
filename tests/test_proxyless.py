"""ProxylessTrainer against the paper's formulas: what moves, by how much, and what is refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Tiny, digit_data, proxyless, tiny
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from oneshot import (
    BinaryGates,
    CostModel,
    LabelSmoothingLoss,
    LatencyTable,
    LayerChoice,
    ProxylessTrainer,
    accuracy,
    arch_parameters,
    count_params,
    fixed,
    weight_parameters,
)
from oneshot.cost import MACS, Term
from oneshot.errors import ConfigurationError, InfeasibleTargetError, UnknownCostError

MS = {"k1": 1.0, "k3": 3.0, "k5": 5.0, "skip": 0.0, "0": 3.0, "1": 5.0, "2": 2.0, "fixed": 0.5}
TABLE = {**MS, "depth": {"1": 1.0, "2": 2.0}}


def ready(model: nn.Module, **changes: Any) -> tuple[ProxylessTrainer, Any]:
    """A trainer whose run is prepared, and a batch."""
    trainer = proxyless(model, **changes)
    trainer._prepare()
    return trainer, next(iter(DataLoader(digit_data(), batch_size=32)))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}


def test_a_weight_step_moves_what_was_drawn_and_nothing_else() -> None:
    """Weights, BatchNorm statistics and momentum of candidates that were not drawn stay bit for bit."""
    model = tiny()
    trainer, batch = ready(model)
    forwards: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: forwards.append(name))
    for _ in range(12):
        before, momenta = state(model), copy.deepcopy(trainer.optimizer.state_dict()["state"])
        names = [n for n, p in model.named_parameters() if not n.endswith("alpha")]
        forwards.clear()
        trainer._update_weights(batch, BinaryGates(1))
        one, two, depth = model.one.drawn.active, model.two.drawn.active, 1 + model.deep.drawn.active
        drawn = (
            "stem.",
            "head.",
            f"one.candidates.{model.one.options[one]}.",
            f"two.candidates.{two}.",
            *(f"deep.blocks.{i}." for i in range(depth)),
        )
        assert moved(before, model) == {n for n in before if n.startswith(drawn)}
        after = trainer.optimizer.state_dict()["state"]
        for i, name in enumerate(names):
            if not name.startswith(drawn):
                assert (i in momenta) == (i in after)
                assert i not in after or torch.equal(after[i]["momentum_buffer"], momenta[i]["momentum_buffer"])
        # one candidate of each choice, once
        assert sum(f.startswith("one.candidates.") and f.count(".") == 2 for f in forwards) == 1
        assert sum(f.startswith("two.candidates.") and f.count(".") == 2 for f in forwards) == 1
        assert sum(f in ("deep.blocks.0", "deep.blocks.1") for f in forwards) == depth


@pytest.mark.parametrize(("paths", "candidates"), [(2, 2), ("all", 4)])
def test_an_arch_step_moves_alphas_only_and_counts_its_forwards(paths: Any, candidates: int) -> None:
    model = tiny()
    trainer, batch = ready(model, paths=paths)
    forwards: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: forwards.append(name))
    before = state(model)
    for _ in range(4):
        forwards.clear()
        trainer._arch_step(batch)
        assert sum(f.startswith("one.candidates.") and f.count(".") == 2 for f in forwards) == candidates
        assert sum(f.startswith("two.candidates.") and f.count(".") == 2 for f in forwards) == min(candidates, 3)
    assert moved(before, model) == {"one.alpha", "two.alpha", "deep.alpha"}
    assert all(p.grad is None for p in weight_parameters(model))
    assert not trainer.optimizer.state
    assert model.training


class Still(nn.Module):
    """Two choices in float64, without anything random."""

    def __init__(self) -> None:
        super().__init__()
        self.one = LayerChoice([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Identity()], "one")
        self.two = LayerChoice([nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 3), nn.Tanh())], "two")

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


T = {"one": [0.7, 2.0, 0.1], "two": [1.5, 0.4]}


def still(paths: Any, seed: int, **changes: Any) -> tuple[Still, ProxylessTrainer, tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    model = Still().double()
    with torch.no_grad():
        for alpha in arch_parameters(model):
            alpha.copy_(torch.randn_like(alpha))
    data = TensorDataset(torch.randn(8, 4).double(), torch.arange(8) % 3)
    settings: dict[str, Any] = {
        "loss": nn.CrossEntropyLoss(),
        "metrics": None,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "dataset": data,
        "cost": CostModel(
            "latency_ms",
            "ms",
            [Term(t, {k: frozenset({i})}) for k, row in T.items() for i, t in enumerate(row)] + [Term(1.5, {})],
            model,
        ),
        "ref_latency": 2.0,
        "paths": paths,
        "seed": seed,
        "device": "cpu",
    }
    trainer = ProxylessTrainer(model, **{**settings, **changes})
    trainer.arch_optimizer.step = lambda: None  # the gradients are looked at, not used
    return model, trainer, data.tensors


@pytest.mark.parametrize("paths", [2, "all"])
@pytest.mark.parametrize("kind", ["add#linear", "mul#log"])
@pytest.mark.parametrize("seed", range(4))
def test_arch_gradient_is_the_derivative_of_the_regularized_loss(paths: Any, kind: str, seed: int) -> None:
    """Finite differences of L(g1, g2, alpha) with the gates g as free variables, plus the closed latency part."""
    params = {"lambda": 0.3, "alpha": 0.7, "beta": 0.4}
    model, trainer, batch = still(paths, seed, grad_reg_loss_type=kind, grad_reg_loss_params=params)
    trainer._arch_step(batch)
    x, target = batch

    def task(g1: Tensor, g2: Tensor) -> Tensor:
        with torch.no_grad():
            middle = sum(g * op(x) for g, op in zip(g1, model.one, strict=True))
            return nn.functional.cross_entropy(sum(g * op(middle) for g, op in zip(g2, model.two, strict=True)), target)

    soft, hard = {}, {}
    for name, choice in (("one", model.one), ("two", model.two)):
        logits = choice.alpha.detach()
        mask = torch.zeros_like(logits)
        mask[list(choice.drawn.involved)] = 1
        soft[name] = mask * logits.exp() / (mask * logits.exp()).sum()
        hard[name] = torch.eye(len(logits), dtype=torch.float64)[choice.drawn.active]
    expected = 1.5 + sum(float(soft[k] @ torch.tensor(T[k], dtype=torch.float64)) for k in T)
    ce = float(task(hard["one"], hard["two"]))
    if kind == "add#linear":
        of_task, of_cost = 1.0, 0.3 / 2.0
    else:
        ratio = math.log(expected) / math.log(2.0)
        of_task = 0.7 * ratio**0.4
        of_cost = ce * 0.7 * 0.4 * ratio**-0.6 / (expected * math.log(2.0))
    eps = 1e-6
    for name, choice in (("one", model.one), ("two", model.two)):
        c = torch.zeros_like(hard[name])
        for k in range(len(c)):
            up, down = {**hard}, {**hard}
            step = eps * torch.eye(len(c), dtype=torch.float64)[k]
            up[name], down[name] = hard[name] + step, hard[name] - step
            c[k] = (task(up["one"], up["two"]) - task(down["one"], down["two"])) / (2 * eps)
        t, p = torch.tensor(T[name], dtype=torch.float64), soft[name]
        closed = of_task * p * (c - (p * c).sum()) + of_cost * p * (t - (p * t).sum())
        assert torch.allclose(choice.alpha.grad, closed, atol=1e-8), (name, choice.alpha.grad, closed)


def test_latency_gradient_stays_while_a_skip_is_active() -> None:
    """In the authors' code a block whose active candidate is Zero learns nothing in that step."""
    seen = 0
    for seed in range(12):
        model, trainer, batch = still(2, seed, grad_reg_loss_params={"lambda": 0.3})
        trainer._arch_step(batch)
        if model.one.drawn.active == 2:
            seen += 1
            pair = list(model.one.drawn.involved)
            assert bool((model.one.alpha.grad[pair] != 0).all())
    assert seen


def test_without_rescale_unsampled_probabilities_move_and_with_it_they_do_not() -> None:
    changes = {}
    for rescale in (True, False):
        model = tiny()
        trainer, batch = ready(model, rescale=rescale)
        before = model.one.alpha.detach().double().softmax(0)
        trainer._arch_step(batch)
        outside = [k for k in range(4) if k not in model.one.drawn.involved]
        changes[rescale] = float((model.one.alpha.detach().double().softmax(0) - before)[outside].abs().max())
    assert changes[True] < 1e-7  # alphas are float32 here; the contract test has 1e-12 in float64
    assert changes[False] > 1e-4


def expected_cost(trainer: ProxylessTrainer) -> float:
    return trainer.history[-1]["latency_ms_soft"]


def test_latency_steers_the_search() -> None:
    """The stronger lambda, the faster: in NNI 2.6 the term has no gradient and all of these are equal."""
    soft = []
    for weight in (0.0, 1.0, 20.0):
        trainer = proxyless(
            tiny(), cost=None, applied_hardware=TABLE, ref_latency=5.0, grad_reg_loss_params={"lambda": weight}
        )
        trainer.train()
        soft.append(expected_cost(trainer))
    assert soft[0] > soft[1] > soft[2]


def test_arch_steps_come_when_the_paper_says() -> None:
    """Every arch_every-th step, not in the warm-up, and not in the first search epoch: 6 steps per epoch."""
    for skip, every, expected in ((True, 2, 3), (False, 2, 6), (False, 5, 2), (True, 6, 1)):
        trainer = proxyless(tiny(), skip_first_epoch=skip, arch_every=every)
        trainer.train()
        assert trainer.arch_batches == expected


def test_class_sorted_data_give_both_splits_all_classes() -> None:
    order = digit_data().tensors[1].argsort(stable=True)
    images, labels = digit_data().tensors
    data = TensorDataset(images[order], labels[order])
    trainer, _ = ready(tiny(), dataset=data)
    assert trainer.split is not None
    weight, arch = set(trainer.split.weight), set(trainer.split.arch)
    assert not weight & arch
    assert len(weight | arch) == 256
    assert len(arch) == 51  # round(256 * 0.2)
    for part in (weight, arch):
        assert set(labels[order][sorted(part)].tolist()) == set(range(10))


def test_the_call_of_the_seed_page(tmp_path: Any) -> None:
    """Word for word, with what its surrounding script provides."""
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    class args:
        grad_reg_loss_type = "mul#log"
        applied_hardware = TABLE
        reference_latency = 5.0
        arch_path = tmp_path / "arch.json"

    grad_reg_loss_params = {"alpha": 0.2, "beta": 0.3}
    # fmt: off
    trainer = ProxylessTrainer(model,
                               loss=LabelSmoothingLoss(),
                               dataset=None,
                               optimizer=optimizer,
                               metrics=lambda output, target: accuracy(output, target, topk=(1, 5,)),
                               num_epochs=120,
                               log_frequency=10,
                               grad_reg_loss_type=args.grad_reg_loss_type,
                               grad_reg_loss_params=grad_reg_loss_params,
                               applied_hardware=args.applied_hardware, dummy_input=(1, 3, 224, 224),
                               ref_latency=args.reference_latency)
    # fmt: on
    with pytest.raises(ConfigurationError, match="dataset=None"):
        trainer.train()
    trainer = ProxylessTrainer(
        model,
        loss=LabelSmoothingLoss(),
        dataset=digit_data(),
        optimizer=optimizer,
        metrics=lambda output, target: accuracy(output, target, topk=(1, 5)),
        num_epochs=2,
        log_frequency=10,
        batch_size=16,
        grad_reg_loss_type=args.grad_reg_loss_type,
        grad_reg_loss_params=grad_reg_loss_params,
        applied_hardware=args.applied_hardware,
        dummy_input=(1, 1, 8, 8),
        ref_latency=args.reference_latency,
    )
    trainer.train()
    assert set(trainer.export(args.arch_path)) == {"one", "two", "depth"}


BASE: dict[str, Any] = {"cost": None}
PREDICTORS = Path(__file__).parent / "data" / "nn_meter_tiny"
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"grad_reg_loss_params": None}, r"'add#linear' needs \['lambda'\]"),
    ({"grad_reg_loss_params": {"alpha": 1}}, r"missing \['lambda'\]"),
    ({"grad_reg_loss_type": "mul#log", "grad_reg_loss_params": {"alpha": 1}}, r"missing \['beta'\]"),
    ({"grad_reg_loss_type": "mul"}, "allowed are"),
    ({"ref_latency": 65.0}, "ref_latency=65.0 is the default in ms"),
    ({"ref_latency": 0}, "above 0"),
    (
        {"grad_reg_loss_type": "mul#log", "grad_reg_loss_params": {"alpha": 1, "beta": 1}, "ref_latency": 0.9},
        "above 1, because of its logarithm",
    ),
    ({"cost": "watts"}, "'watts'.* allowed are the names .*'macs', .*'peak_memory'"),
    ({"cost": {"macs": MACS}, "applied_hardware": "flops"}, "cost= already says what 'macs' is"),
    ({"applied_hardware": "this-machine"}, "give a mapping with a reference each, or normalize=True"),
    ({"cost": ["macs", "params"], "ref_latency": {"macs": 1e4}}, r"the costs of this run are \['macs', 'params'\]"),
    ({"cost": {"macs": "params"}}, "cost 'macs': 'params'; allowed are"),
    ({"cost": {"latency_ms": 3.0}, "ref_latency": 1}, r"hardware 3.0: allowed are \['this-machine',"),
    ({"ref_latency": float("inf")}, "ref_latency=inf: a finite number is needed"),
    ({"ref_latency": None}, "ref_latency=None: a finite number is needed"),
    ({"grad_reg_loss_params": {"lambda": float("nan")}}, r"grad_reg_loss_params\['lambda'\]=nan: a finite number"),
    ({"grad_reg_loss_params": {"lambda": 0.1, "gamma": 1}}, r"\['gamma'\] are not among"),
    ({"grad_reg_loss_params": 0.1}, "grad_reg_loss_params=0.1: a mapping is needed"),
    ({"cost": 5}, "cost=5: a name, a CostSpec"),
    ({"cost": "latency_ms"}, "say of what hardware, applied_hardware="),
    ({"cost": {"params": MACS}}, "cost 'params': it is given as 'macs'; call it by another name"),
    ({"cost": count_params(nn.Linear(2, 2))}, "cost 'params' has decisions {}"),
    ({**BASE, "applied_hardware": str(PREDICTORS), "missing": {"fc": -1}}, "milliseconds >= 0 is needed"),
    ({"normalize": True}, "normalize=True and ref_latency=10000: give one"),
    ({"missing": {"fc": 0.0}}, "this run has none; give their name or folder as applied_hardware"),
    ({"grad_reg_loss_params": {"lambda": {"params": 1.0}}}, r"or, for lambda and beta, one for each of \['macs'\]"),
    ({**BASE, "applied_hardware": "cortexA77"}, r"allowed are \['this-machine', .*cortexA76cpu_tflite21"),
    ({**BASE, "applied_hardware": "no/such/table.yaml"}, r"no/such/table\.yaml"),
    ({**BASE, "applied_hardware": {"k1": "fast"}}, "row 'k1' is 'fast'"),
    ({"paths": 3}, "paths=3"),
    ({"arch_every": 0}, "arch_every=0"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[m[:24] for _, m in WRONG])
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        proxyless(tiny(), **changes)


def test_regularization_is_checked_only_when_there_is_a_cost() -> None:
    history = proxyless(tiny(), cost=None, grad_reg_loss_params=None, ref_latency=65.0).train()
    assert "macs_soft" not in history[-1]
    assert history[-1]["cost_share"] == 0


def test_wrong_before_the_first_step() -> None:
    with pytest.raises(UnknownCostError, match="'k5'"):
        proxyless(tiny(), cost=None, applied_hardware={k: v for k, v in TABLE.items() if k != "k5"}).train()
    with pytest.raises(ConfigurationError, match="no arch step"):
        proxyless(tiny(), num_epochs=1, skip_first_epoch=True).train()
    small = {k: v / 100 if isinstance(v, float) else v for k, v in TABLE.items()} | {"depth": {"1": 0.0, "2": 0.0}}
    with pytest.raises(ConfigurationError, match=r"logarithm|above 1|> 1"):
        proxyless(
            tiny(),
            cost=None,
            applied_hardware=small,
            grad_reg_loss_type="mul#log",
            grad_reg_loss_params={"alpha": 1, "beta": 1},
            ref_latency=2.0,
        ).train()


def test_budgets_are_met_by_the_rebuilt_network() -> None:
    model = tiny()
    trainer = proxyless(model)
    trainer.train()
    params = count_params(model)
    everything = {label: range(n) for label, n in params.sizes.items()}
    costs = sorted(
        params.of({"one": a, "two": b, "depth": c})
        for a in everything["one"]
        for b in everything["two"]
        for c in everything["depth"]
    )
    for limit in (costs[0], costs[7], costs[-1]):
        arch = trainer.export(budget={"params": limit})
        plain = trainer.export_model(budget={"params": limit})
        assert sum(p.numel() for p in plain.parameters()) <= limit
        assert sum(p.numel() for p in fixed(Tiny(), arch).parameters()) <= limit
    with pytest.raises(InfeasibleTargetError, match=f"{costs[0]:.6g}"):
        trainer.export(budget={"params": costs[0] - 1})
    with pytest.raises(ConfigurationError, match=r"'latency_ms': this run has \['macs', .*'params'"):
        trainer.export(budget={"latency_ms": 3})


def test_flops_is_another_name_for_macs() -> None:
    trainer = proxyless(tiny(), cost=None, applied_hardware="flops")
    trainer.train()
    assert trainer.history[-1]["macs_hard"] == trainer.cost_model("macs").of(
        {label: int(d.alpha.argmax()) for label, d in trainer.decisions.items()}
    )


def test_a_table_can_be_handed_over_in_every_form(tmp_path: Any) -> None:
    path = tmp_path / "table.json"
    by_place = {
        "one": {k: MS[k] for k in ("k1", "k3", "k5", "skip")},
        "two": {k: MS[k] for k in "012"},
        "deep": TABLE["depth"],
    }
    LatencyTable(by_place=by_place, fixed=0.5).write(path)
    models = [
        proxyless(tiny(), cost=None, applied_hardware=table).cost_model("latency_ms")
        for table in (TABLE, path, str(path), LatencyTable.read(path))
    ]
    choices = {"one": 2, "two": 0, "depth": 1}
    assert [m.of(choices) for m in models] == [0.5 + 5 + 3 + 2] * 4
