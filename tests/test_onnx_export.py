"""ONNX files: verified before they are written, complete or not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from oneshot import LayerChoice, fixed
from oneshot.errors import ConfigurationError, ExportError, UnsupportedModelError
from oneshot.export import export_onnx
from search_spaces.mobilenet import mobilenet_small


def test_a_found_network_as_a_file(tmp_path: Path) -> None:
    space = mobilenet_small(10, 3)
    net, images = fixed(space, {f"block{i}": "k3e3" for i in range(1, 6)}), torch.rand(2, 3, 32, 32)
    path = tmp_path / "net.onnx"
    export_onnx(net, (images,), path)
    session = onnxruntime.InferenceSession(path)
    assert [(put.name, put.shape) for put in session.get_inputs()] == [("input0", [2, 3, 32, 32])]
    with torch.no_grad():
        expected = net.eval()(images)
    np.testing.assert_allclose(session.run(None, {"input0": images.numpy()})[0], expected, rtol=1e-4, atol=1e-5)
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]


def test_the_network_stays_as_it_was(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    export_onnx(net, (torch.rand(4, 3),), str(tmp_path / "net.onnx"))
    assert net.training
    assert net[1].training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


class Changing(nn.Module):
    """Something else at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * float(self.calls)


def test_a_graph_that_computes_something_else_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"the one before")
    with pytest.raises(ExportError, match="something else than torch for Changing"):
        export_onnx(Changing(), (torch.rand(2, 3),), path)
    assert path.read_bytes() == b"the one before"
    assert len(list(tmp_path.iterdir())) == 1


def test_undecided_choices_are_an_error(tmp_path: Path) -> None:
    model = nn.Sequential(LayerChoice([nn.ReLU(), nn.Tanh()]))
    with pytest.raises(UnsupportedModelError, match=r"\['0'\] are undecided choices; give it fixed\(model, arch\)"):
        export_onnx(model, (torch.rand(1),), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no folder"):
        export_onnx(nn.ReLU(), (torch.rand(1),), tmp_path / "missing" / "net.onnx")
