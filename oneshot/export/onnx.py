"""A network as an ONNX file that is proven to compute what torch does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..cost.runtimes import Flat, flat_onnx_bytes, onnx_session, verify_session
from ..errors import UnsupportedModelError
from ..files import atomic_write
from ..mutables import Mutable

__all__ = ["export_onnx"]


def export_onnx(model: nn.Module, args: Sequence[Any], path: str | os.PathLike[str]) -> None:
    """Write ``model(*args)`` in eval mode as an ONNX graph, for the shapes of ``args``.

    The inputs are named input0, input1, ... in their order. Before anything is written, ONNX Runtime has computed the
    outputs for ``args``: ExportError if they differ from torch's by more than 1e-4 of the largest value. The file is
    complete or not there. UnsupportedModelError for a model with undecided choices, or that has no graph;
    ConfigurationError without the extra: ``pip install 'oneshot-nas[onnx]'``.
    """
    inside = [name for name, inner in model.named_modules() if isinstance(inner, Mutable)]
    if inside:
        raise UnsupportedModelError(f"export_onnx: {inside} are undecided choices; give it fixed(model, arch)")
    flat = Flat(model, args, {})
    graph = flat_onnx_bytes(flat)
    verify_session(onnx_session(graph, threads=1), flat)
    atomic_write(Path(path), lambda file: file.write(graph))
