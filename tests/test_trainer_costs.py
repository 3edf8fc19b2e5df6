"""What steers a run: several costs at once, predictors of phones, peak memory, and the report at the end."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Tiny, digit_data, proxyless, tiny
from torch import Tensor, nn

from oneshot import LatencyTable, LayerChoice, ProxylessTrainer, fixed
from oneshot.cost import (
    CostSpec,
    Timing,
    best_under_budget,
    count,
    count_macs,
    count_params,
    count_peak_memory,
    latency_on,
)
from oneshot.cost.nn_meter import load_predictor_set, nn_meter_latency
from oneshot.cost.runtimes import runtime_facts
from oneshot.errors import CheckpointError, ConfigurationError, UnknownCostError
from oneshot.trainers import base
from oneshot.trainers.cost_loss import CostLoss
from oneshot.trainers.costs import CostSources
from oneshot.trainers.report import ReportRow, SearchReport

TINY = Path(__file__).parent / "data" / "nn_meter_tiny"
TABLE = {
    "one": {"k1": 1.0, "k3": 2.0, "k5": 3.0, "skip": 0.0},
    "two": {"0": 1.0, "1": 2.0, "2": 1.5},
    "depth": {"1": 0.5, "2": 1.0},
    "fixed": 0.25,
}
X = torch.zeros(1, 1, 8, 8)


def alpha_gradients(trainer: ProxylessTrainer, **changes: Any) -> list[Tensor]:
    """The gradient of every alpha after one arch step on a fixed batch, all gates at once."""
    data = digit_data(32)
    trainer.fabric.to_device(trainer.model)
    torch.manual_seed(0)
    trainer.generator.manual_seed(0)
    trainer._arch_step(data[:32])
    return [d.alpha.grad.clone() for d in trainer.decisions.values() if d.alpha.grad is not None]


def test_several_costs_add_up_in_the_gradient() -> None:
    """d/dalpha of CE + sum_j lambda_j E_j / ref_j is that of CE, plus that of each cost alone."""
    each = {"macs": 0.3, "params": 0.7, "latency_ms": 0.2}
    references = {"macs": 20_000.0, "params": 400.0, "latency_ms": 2.0}
    common = {"paths": "all", "rescale": False}

    def gradients(names: list[str]) -> list[Tensor]:
        trainer = proxyless(
            tiny().double().float(),
            cost=[name for name in names if name != "latency_ms"] or None,
            applied_hardware=TABLE if "latency_ms" in names else None,
            ref_latency={name: references[name] for name in names} if names else 65.0,
            grad_reg_loss_params={"lambda": {name: each[name] for name in names}} if names else None,
            **common,
        )
        return alpha_gradients(trainer)

    none = gradients([])
    together = gradients(list(each))
    apart = [gradients([name]) for name in each]
    for i, whole in enumerate(together):
        want = none[i] + sum(one[i] - none[i] for one in apart)
        assert torch.allclose(whole, want, atol=1e-6)
        assert not torch.allclose(whole, none[i], atol=1e-4)


def test_formulas_for_several_costs() -> None:
    """CE = 2; macs 150 of 100 at 0.1, params 5 of 10 at 0.4: 2 + 0.05 - 0.2.

    mul#log: CE = 2, alpha = 0.5 once, (ln 100 / ln 10)^2 = 4, (ln 7 / ln 7)^2 = 1: 2 * 0.5 * 4 * 1 = 4.
    """
    units = {"macs": "MAC", "params": "parameters"}
    linear = CostLoss("add#linear", {"lambda": {"macs": 0.1, "params": 0.4}}, {"macs": 100.0, "params": 10.0}, units)
    expected = {"macs": torch.tensor(150.0), "params": torch.tensor(5.0)}
    assert float(linear(torch.tensor(2.0), expected)) == pytest.approx(1.85)
    product = CostLoss("mul#log", {"alpha": 0.5, "beta": 2.0}, {"macs": 10.0, "params": 7.0}, units)
    expected = {"macs": torch.tensor(100.0), "params": torch.tensor(7.0)}
    assert float(product(torch.tensor(2.0), expected)) == pytest.approx(4.0)
    assert CostLoss(None, None, 65.0, units={})(torch.tensor(2.0), {}) == 2


def test_normalized_costs_refer_to_the_space_before_the_search() -> None:
    trainer = proxyless(
        tiny(), cost=["macs", "params"], ref_latency=65.0, normalize=True, grad_reg_loss_params={"lambda": 1.0}
    )
    trainer.train()
    for name, cost in (("macs", count_macs(tiny(), (X,))), ("params", count_params(tiny()))):
        uniform = {k: torch.full((n,), 1 / n) for k, n in cost.sizes.items()}
        assert trainer.cost_loss.references[name] == pytest.approx(float(cost.expected(uniform)))
    assert {"macs_soft", "macs_hard", "params_soft", "params_hard"} <= set(trainer.history[-1])


def test_export_meets_several_budgets_and_writes_every_cost(tmp_path: Path) -> None:
    trainer = proxyless(
        tiny(),
        cost=["macs", "peak_memory"],
        applied_hardware=TABLE,
        ref_latency={"macs": 20_000, "peak_memory": 5_000, "latency_ms": 2.0},
    )
    trainer.train()
    peak = count_peak_memory(tiny(), (X,))
    budget = {"macs": 25_000, "latency_ms": 3.0, "peak_memory": 4_700, "weight_bytes": 700}
    arch = trainer.export(tmp_path / "arch.json", budget=budget)
    written = json.loads((tmp_path / "arch.json").read_text())
    plain = fixed(Tiny(), arch)
    assert written["costs"]["macs"] == count_macs(plain, (X,)).of({}) <= 25_000
    assert written["costs"]["peak_memory"] == count_peak_memory(plain, (X,)).of({}) <= 4_700
    assert written["costs"]["latency_ms"] <= 3.0
    assert written["costs"]["params"] == sum(p.numel() for p in plain.parameters())
    assert written["created_by"]["latency"] == {"table": "a mapping"}
    assert peak.of(dict.fromkeys(peak.sizes, 0)) > 0


def test_peak_memory_steers_the_search() -> None:
    """Lambda large and no task: every decision goes to what needs least memory."""
    model = nn.Sequential(
        LayerChoice({"wide": nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 4)), "thin": nn.Linear(4, 4)}, label="a"),
        nn.Linear(4, 2),
    )
    data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.arange(64) % 2)
    trainer = proxyless(
        model,
        dataset=data,
        cost="peak_memory",
        dummy_input=(1, 4),
        ref_latency=100,
        grad_reg_loss_params={"lambda": 10.0},
        num_epochs=4,
        batch_size=8,
        metrics=None,
    )
    trainer.train()
    assert trainer.export() == {"a": "thin"}
    assert trainer.history[-1]["peak_memory_hard"] == (4 + 4) * 4


def test_predictors_of_a_device_steer_the_search_and_say_what_they_guess(tmp_path: Path) -> None:
    missing = {"mean": 0.1, "sum": 0.1}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = proxyless(
            tiny(), cost=None, applied_hardware=str(TINY), ref_latency=0.5, missing=missing, dummy_input=(2, 1, 8, 8)
        )
        trainer.train()
    said = [str(w.message) for w in caught if "nn-Meter" in str(w.message)]
    assert len(said) == 1
    assert "batch of 2 priced as 2 times one" in said[0]
    arch = trainer.export(tmp_path / "arch.json")
    want = nn_meter_latency(fixed(Tiny(), arch), (torch.zeros(2, 1, 8, 8),), TINY, missing=missing).cost.of({})
    written = json.loads((tmp_path / "arch.json").read_text())
    assert written["costs"]["latency_ms"] == pytest.approx(want)
    assert written["created_by"]["latency"]["nn_meter"] == "tiny_torchcpu"
    assert any("batch of 2" in note for note in written["created_by"]["latency"]["approximations"])
    report = trainer.report()
    assert report.notes == said[0]
    assert report.rows[1][:4] == ("latency_ms", "ms", 0.5, pytest.approx(want))
    assert report.rows[1].measured is None


def test_an_unknown_kernel_stops_the_run_before_it_begins() -> None:
    model = tiny()
    model.one = LayerChoice({"silu": nn.SiLU(), "skip": nn.Identity()}, label="one")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = proxyless(model, cost=None, applied_hardware=str(TINY), ref_latency=0.5)
    with pytest.raises(UnknownCostError, match=r"one.candidates.silu: kernel 'swish'"):
        trainer.train()
    assert trainer.history == []
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_spec_and_a_name_of_ones_own() -> None:
    spec = CostSpec("outputs", "numbers", functional=lambda layer: 0)
    for layer in (nn.Conv2d, nn.Linear, nn.BatchNorm2d):
        spec = spec.with_rule(layer, lambda layer: layer.positions * layer.out_channels)
    trainer = proxyless(tiny(), cost={"outputs": spec, "params": None}, normalize=True, ref_latency=65.0)
    trainer.train()
    cost = count(tiny(), (X,), spec)
    assert trainer.history[-1]["outputs_hard"] == cost.of(
        best_under_budget({k: d.alpha.tolist() for k, d in trainer.decisions.items()}, {}, {})
    )


def test_report_prints_target_prediction_and_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def timed(module: nn.Module, args: tuple[Tensor, ...], *, runtime: str, threads: int) -> Timing:
        asked.append((sum(p.numel() for p in module.parameters()), tuple(args[0].shape), runtime, threads))
        return Timing.of([1.0, 2.0, 3.0])

    def measured(model: nn.Module, example_input: Any, *, runtime: str) -> LatencyTable:
        places = {"one": TABLE["one"], "two": TABLE["two"], "deep": TABLE["depth"]}
        facts = runtime_facts(runtime, 1)
        return LatencyTable(by_place=places, fixed=0.25, source=runtime, runtime=facts)  # type: ignore[arg-type]

    monkeypatch.setattr(base, "time_module", timed)
    monkeypatch.setattr(base, "measure_table", measured)
    trainer = proxyless(tiny(), cost=None, applied_hardware="this-machine-onnxruntime", ref_latency=2.5)
    trainer.train()
    report = trainer.report(budget={"latency_ms": 2.5})
    row = next(row for row in report.rows if row.name == "latency_ms")
    assert trainer.latency_table is not None
    assert trainer.latency_table.source == "onnxruntime"
    assert row.predicted <= row.target == 2.5  # type: ignore[operator]
    assert row.error == pytest.approx(row.predicted / 2.0 - 1)
    plain = trainer.export_model(budget={"latency_ms": 2.5})
    assert asked == [(sum(p.numel() for p in plain.parameters()), (1, 1, 8, 8), "onnxruntime", 1)]
    lines = str(report).splitlines()
    assert lines[0].split() == ["cost", "unit", "target", "predicted", "measured", "p95", "error"]
    assert lines[2].split()[:4] == ["latency_ms", "ms", "2.5", f"{row.predicted:.4g}".removesuffix(".0")]


def test_a_report_without_targets_and_measurements() -> None:
    report = SearchReport({}, (ReportRow("macs", "MAC", None, 12.0, None),), notes="a guess")
    assert str(report).splitlines() == [
        "cost  unit  target  predicted  measured  p95  error",
        "macs  MAC                  12",
        "a guess",
    ]


def test_sources_of_every_kind_and_their_units() -> None:
    predictors = load_predictor_set(TINY)
    sources = CostSources(["params", "ops", "peak_memory"], predictors, {"fc": 0.0})
    assert [(name, sources.unit(name)) for name in sources.names] == [
        ("params", "parameters"),
        ("ops", "op"),
        ("peak_memory", "bytes"),
        ("latency_ms", "ms"),
    ]
    assert CostSources(None, "flops").names == CostSources("macs", "flops").names == ("macs",)
    assert CostSources("latency_ms", TABLE).names == ("latency_ms",)
    with pytest.raises(ConfigurationError, match="applied_hardware: cost= already says what 'latency_ms' is"):
        CostSources({"latency_ms": predictors}, TABLE)
    assert latency_on(TABLE, tiny(), (X,))[0].of({"one": 0, "two": 1, "depth": 0}) == 0.25 + 1 + 2 + 0.5


def test_a_run_goes_on_with_the_same_costs_only(tmp_path: Path) -> None:
    def trainer(**changes: Any) -> ProxylessTrainer:
        return proxyless(tiny(), **{"cost": None, "ref_latency": 2.0, "applied_hardware": TABLE, **changes})

    first = trainer()
    first.train()
    first.save(tmp_path / "run.ckpt")
    dearer = {k: ({n: 10 * ms for n, ms in v.items()} if isinstance(v, dict) else v) for k, v in TABLE.items()}
    others: list[dict[str, Any]] = [
        {"applied_hardware": dearer},
        {"applied_hardware": str(TINY)},
        {"applied_hardware": "this-machine"},
        {"applied_hardware": None, "cost": "macs"},
        {"cost": "macs", "ref_latency": {"macs": 1e4, "latency_ms": 2.0}},
    ]
    for other in others:
        with pytest.raises(CheckpointError, match="made with other settings: costs"):
            trainer(**other).resume(tmp_path / "run.ckpt")
    path = tmp_path / "table.json"
    path.write_text(json.dumps(TABLE))
    trainer(applied_hardware=path).resume(tmp_path / "run.ckpt")  # the same table, from a file


@pytest.mark.parametrize("hardware", [None, TABLE, str(TINY)])
def test_every_kind_of_cost_is_named_for_a_checkpoint(hardware: Any) -> None:
    spec = CostSpec("mine", "numbers").with_rule(nn.Linear, lambda layer: 1)
    given = {
        "params": None,
        "mine": spec,
        "macs": count_macs(tiny(), (X,)),
        "peak_memory": count_peak_memory(tiny(), (X,)),
    }
    found = CostSources(given, hardware).fingerprint()
    assert list(found) == [*given, *(["latency_ms"] if hardware is not None else [])]
    assert found == CostSources(given, hardware).fingerprint()
    assert json.loads(json.dumps(found)) == found
