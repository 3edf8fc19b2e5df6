"""Modules as ONNX Runtime runs them: the same outputs, for the same arguments, or an error."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from oneshot import measure_table
from oneshot.cost import runtimes
from oneshot.cost.runtimes import difference, onnx_bytes, onnx_session, prepared, runtime_facts
from oneshot.errors import ConfigurationError, ExportError, UnsupportedModelError
from oneshot.mutables import LayerChoice


def convolutions() -> nn.Module:
    """With BatchNorm statistics and affine parameters that are not the initial ones."""
    norm = nn.BatchNorm2d(6)
    for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        values.data.uniform_(0.5, 2.0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), norm, nn.ReLU6(), nn.Conv2d(6, 6, 5, groups=6), nn.Hardswish())


class Mixed(nn.Module):
    """Tensors and others, by position and by name, in and out of containers."""

    def forward(self, pair: list[Tensor], *, scale: float, more: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"sum": pair[0] + scale * pair[1], "rest": (more["a"] @ pair[0], "no tensor")}


class Second(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return b, -b


class Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        return self.table(words), words + 1


A, B, C = torch.rand(4, 4), torch.rand(4, 4), torch.rand(2, 4)
CASES: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {
    "convolutions": (convolutions(), (torch.rand(2, 3, 8, 8),), {}),
    "channels last": (convolutions(), (torch.rand(2, 3, 8, 8).to(memory_format=torch.channels_last),), {}),
    "containers": (Mixed(), ([A, B],), {"scale": 2.5, "more": {"a": C}}),
    "integers": (Embedded(), (torch.tensor([[0, 4, 2]]),), {}),
    "nothing": (nn.Identity(), (A,), {}),
    "one tensor twice": (Product(), (A, A), {}),
    "an input that is not needed": (Second(), (A, B), {}),
}


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", CASES)
def test_onnx_runtime_returns_what_torch_returns(name: str) -> None:
    module, args, kwargs = CASES[name]
    expected = tensors(module.eval()(*args, **kwargs))
    session = onnx_session(onnx_bytes(module, args, kwargs), threads=1)
    given = {f"input{i}": tensor.numpy() for i, tensor in enumerate(tensors((args, kwargs)))}
    inputs = {put.name: given[put.name] for put in session.get_inputs()}
    for ours, theirs in zip(expected, session.run(None, inputs), strict=True):
        np.testing.assert_allclose(theirs, ours.detach().numpy(), rtol=1e-4, atol=1e-5)
    # What is timed computes just this.
    run = prepared(module, args, kwargs, runtime="onnxruntime", threads=1)
    run()
    (binding,) = run.args
    for ours, theirs in zip(expected, binding.copy_outputs_to_cpu(), strict=True):
        np.testing.assert_allclose(theirs, ours.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_batchnorm_is_folded_and_the_module_stays_as_it_was() -> None:
    import onnx

    module = convolutions().train()
    module[1].eval()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    images = torch.rand(1, 3, 8, 8)
    chance = torch.get_rng_state()
    graph = onnx.load_from_string(onnx_bytes(module, (images,))).graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    assert [m.training for m in module] == [True, False, True, True, True]
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), chance)


def test_torch_runs_the_module_itself() -> None:
    seen: list[Any] = []
    prepared(lambda *args, **kwargs: seen.append((args, kwargs)), (1,), {"b": 2}, runtime="torch", threads=1)()
    assert seen == [((1,), {"b": 2})]


# --- what is not timed ------------------------------------------------------------------------------------------


def test_a_session_with_other_outputs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    other = onnx_bytes(convolutions(), (torch.rand(2, 3, 8, 8),))
    monkeypatch.setattr(runtimes, "flat_onnx_bytes", lambda flat: other)
    module, args, kwargs = CASES["convolutions"]
    with pytest.raises(ExportError, match=r"something else than torch for Sequential: .* allowed is 0\.0001"):
        prepared(module, args, kwargs, runtime="onnxruntime", threads=1)


def test_a_candidate_that_is_random_in_eval_mode_is_an_error() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x, 0.5, training=True)

    model = nn.Sequential(LayerChoice({"noisy": Noisy(), "skip": nn.Identity()}))
    with pytest.raises(ExportError, match=r"random in eval mode"):
        measure_table(model, torch.rand(8, 64), runtime="onnxruntime", cache=False, min_run_time=1e-4)


def test_differences_by_hand() -> None:
    a = torch.tensor([2.0, -4.0])
    assert difference([a], [a.clone()]) == 0
    assert difference([a, a], [a, torch.tensor([2.0, -3.0])]) == 0.25
    assert difference([a], [a.double()]) == float("inf")
    assert difference([a], [a[:1]]) == float("inf")
    assert difference([a], []) == float("inf")
    nan, inf = torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("inf")])
    assert difference([inf], [inf.clone()]) == 0
    assert difference([inf], [-inf]) == difference([nan], [a]) == difference([a], [inf]) == float("inf")
    assert difference([torch.zeros(0)], [torch.zeros(0)]) == 0
    assert difference([torch.tensor([3, 4])], [torch.tensor([3, 2])]) == 0.5


def test_the_newer_exporter_writes_what_the_other_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Bilinear(4, 4, 2)
    session = onnx_session(onnx_bytes(module, (A, B)), threads=1)
    (got,) = session.run(None, {"input0": A.numpy(), "input1": B.numpy()})
    np.testing.assert_allclose(got, module(A, B).detach().numpy(), rtol=1e-4, atol=1e-6)

    def neither(flat: Any, *, dynamo: bool) -> bytes:
        raise RuntimeError("newer\nsecond line" if dynamo else "older")

    monkeypatch.setattr(runtimes, "_written", neither)
    message = (
        "Bilinear cannot be written as an ONNX graph: RuntimeError: older; nor by .*: RuntimeError: newer; runtime="
    )
    with pytest.raises(UnsupportedModelError, match=message):
        onnx_bytes(module, (A, B))


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_without_the_extra_the_pip_line_is_shown(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    expected = rf"needs {missing}, which is not installed: pip install 'oneshot-nas\[onnx\]'"
    with pytest.raises(ConfigurationError, match=expected):
        measure_table(nn.Sequential(LayerChoice([nn.Identity()])), torch.rand(1, 1), runtime="onnxruntime")
    with pytest.raises(ConfigurationError, match=expected):
        onnx_bytes(nn.Identity(), (torch.rand(1),))


def test_only_modules_and_numpy_types_run_on_onnx_runtime() -> None:
    with pytest.raises(ConfigurationError, match="a builtin_function_or_method cannot be timed on 'onnxruntime'"):
        prepared(len, ([],), {}, runtime="onnxruntime", threads=1)
    with pytest.raises(UnsupportedModelError, match="ONNX Runtime is given NumPy arrays"):
        prepared(nn.Identity(), (torch.rand(2).bfloat16(),), {}, runtime="onnxruntime", threads=1)
    with pytest.raises(UnsupportedModelError, match=r"does not run this graph: NotImplemented: .*Relu"):
        prepared(nn.ReLU(), (torch.rand(2).bfloat16(),), {}, runtime="onnxruntime", threads=1)


# --- what a time depends on -------------------------------------------------------------------------------------


def test_facts_name_versions_processor_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    facts = runtime_facts("torch", 3)
    assert set(facts) == {"runtime", "machine", "processor", "threads"}
    assert (facts["runtime"], facts["threads"]) == (f"torch {torch.__version__}", "3")
    assert facts["processor"]
    both = f"onnxruntime {onnxruntime.__version__}, exported by torch {torch.__version__}"
    assert runtime_facts("onnxruntime", 1)["runtime"] == both


def test_a_table_on_onnx_runtime() -> None:
    block = {"conv": nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)), "skip": nn.Identity()}
    model = nn.Sequential(nn.Conv2d(1, 3, 1), LayerChoice(block), nn.ReLU())
    table = measure_table(
        model, torch.rand(1, 1, 6, 6), runtime="onnxruntime", rounds=1, min_run_time=1e-4, cache=False
    )
    assert {place: list(rows) for place, rows in table.by_place.items()} == {"1": ["conv", "skip"]}
    assert table.by_place["1"]["skip"] == 0
    assert table.runtime["runtime"].startswith("onnxruntime ")
