"""How a module is run when it is timed: by torch itself, or as an ONNX graph by ONNX Runtime, on the CPU.

ONNX and ONNX Runtime are the extra ``[onnx]``. The graph is written by torch's TorchScript exporter, which takes 0.2 s
for a network where the newer one takes 4 s or more (torch 2.13); both become the same operators in ONNX Runtime, and
the newer one is used for what the other cannot write.
"""

from __future__ import annotations

import importlib
import io
import math
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ConfigurationError, ExportError, UnsupportedModelError
from ..graph import evaluated

__all__ = ["RUNTIMES", "Run", "check_runtime", "onnx_bytes", "onnx_session", "prepared", "runtime_facts"]

RUNTIMES = ("torch", "onnxruntime")
_TOLERANCE = 1e-4
_NAME = "input{}"

Run = Callable[[], object]


def check_runtime(runtime: str, threads: int) -> None:
    """ConfigurationError for a runtime that is not known or not installed, or a number of threads that is none."""
    if runtime not in RUNTIMES:
        raise ConfigurationError(f"runtime={runtime!r}: allowed are {list(RUNTIMES)}")
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ConfigurationError(f"threads={threads!r}: a whole number >= 1 is needed")
    if runtime == "onnxruntime":
        _onnxruntime()


def runtime_facts(runtime: str, threads: int) -> dict[str, str]:
    """What a time depends on besides the network: runtime with its version, machine, processor, threads."""
    version = f"torch {torch.__version__}"
    if runtime == "onnxruntime":
        version = f"onnxruntime {_onnxruntime().__version__}, exported by {version}"
    return {
        "runtime": version,
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": str(threads),
    }


def prepared(
    module: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], *, runtime: str, threads: int
) -> Run:
    """A function without arguments that runs ``module(*args, **kwargs)`` once on a runtime.

    For ONNX Runtime, its outputs have been compared with torch's: ExportError if they differ by more than 1e-4 of the
    largest value; UnsupportedModelError for what cannot be written as a graph.
    """
    if runtime == "torch":
        return partial(module, *args, **kwargs)
    if not isinstance(module, nn.Module):
        raise ConfigurationError(
            f"a {type(module).__name__} cannot be timed on {runtime!r}: a module is needed; plain functions run on "
            "'torch'"
        )
    flat = Flat(module, args, kwargs)
    session = onnx_session(flat_onnx_bytes(flat), threads)
    verify_session(session, flat)
    binding = session.io_binding()
    for name, array in _arrays(session, flat.tensors).items():
        binding.bind_cpu_input(name, array)
    for output in session.get_outputs():
        binding.bind_output(output.name)
    return partial(session.run_with_iobinding, binding)


class Flat(nn.Module):
    """A module as a graph sees it: tensors in, a tuple of tensors out; whatever else it is called with is kept."""

    def __init__(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.module = module
        self.leaves, self.tree = pytree.tree_flatten((tuple(args), dict(kwargs)))
        self.places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        self.training = module.training

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors it is called with."""
        return tuple(self.leaves[i] for i in self.places)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.tree)
        outputs = pytree.tree_leaves(self.module(*args, **kwargs))
        return tuple(output for output in outputs if isinstance(output, Tensor))


def onnx_bytes(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> bytes:
    """The ONNX graph of ``module(*args, **kwargs)`` in eval mode, for these shapes.

    UnsupportedModelError for what cannot be written, ConfigurationError without the extra ``[onnx]``.
    """
    return flat_onnx_bytes(Flat(module, args, kwargs or {}))


def flat_onnx_bytes(flat: Flat) -> bytes:
    _onnxruntime()
    with evaluated(flat), torch.random.fork_rng(devices=[]):
        try:
            return _written(flat, dynamo=False)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as first:
            return _written_by_dynamo(flat, first)


def _written_by_dynamo(flat: Flat, first: Exception) -> bytes:
    try:
        return _written(flat, dynamo=True)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(flat.module).__name__} cannot be written as an ONNX graph: {_first_line(first)}; nor by torch's "
            f"newer exporter: {_first_line(error)}; runtime='torch' needs no graph"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _written(flat: Flat, *, dynamo: bool) -> bytes:
    names = [_NAME.format(i) for i in range(len(flat.tensors))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one exporter is old, and the other uses what is deprecated
        if dynamo:
            program = torch.onnx.export(flat, flat.tensors, dynamo=True, input_names=names, verbose=False)
            assert program is not None  # nothing was said of a file
            written: bytes = program.model_proto.SerializeToString()
            return written
        file = io.BytesIO()
        torch.onnx.export(flat, flat.tensors, file, dynamo=False, input_names=names, verbose=False)  # type: ignore[arg-type]
        return file.getvalue()


def onnx_session(graph: bytes, threads: int) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU, operators one after the other on so many threads.

    UnsupportedModelError for a graph that ONNX Runtime cannot run.
    """
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UnsupportedModelError(f"ONNX Runtime does not run this graph: {_first_line(error)}") from error


def verify_session(session: Any, flat: Flat) -> None:
    """ExportError unless a session computes what the module does, to 1e-4 of the largest value of each output."""
    inputs = tuple(tensor.clone() for tensor in flat.tensors)
    got = [torch.from_numpy(array) for array in session.run(None, _arrays(session, inputs))]
    with evaluated(flat), torch.random.fork_rng(devices=[]):
        expected = flat(*inputs)
    off = difference(expected, got)
    if not off <= _TOLERANCE:
        raise ExportError(
            f"ONNX Runtime computes something else than torch for {type(flat.module).__name__}: the outputs differ by "
            f"{off:.3g} of the largest value, allowed is {_TOLERANCE:g}. Is its forward random in eval mode, or does "
            "it depend on the values of tensors?"
        )


def difference(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The largest |difference| of two rows of tensors, over the largest |value| of each; inf where shapes differ.

    >>> difference([torch.tensor([2.0, -4.0])], [torch.tensor([2.0, -3.0])])
    0.25
    """
    if [(t.shape, t.dtype) for t in expected] != [(t.shape, t.dtype) for t in got]:
        return math.inf
    worst = 0.0
    for a, b in zip(expected, got, strict=True):
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
            return math.inf
        a, b = a[finite].double(), b[finite].double()
        if a.numel():
            worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)))
    return worst


def _arrays(session: Any, tensors: Sequence[Tensor]) -> dict[str, Any]:
    """The inputs of a session by name; a graph may have left out those that it does not need."""
    wanted = {put.name for put in session.get_inputs()}
    named = {_NAME.format(i): tensor for i, tensor in enumerate(tensors)}
    return {name: _numpy(tensor) for name, tensor in named.items() if name in wanted}


def _numpy(tensor: Tensor) -> Any:
    try:
        return tensor.detach().contiguous().numpy()
    except TypeError as error:
        raise UnsupportedModelError(
            f"ONNX Runtime is given NumPy arrays: {error}. Time it with runtime='torch'"
        ) from error


def _onnxruntime() -> Any:
    try:
        importlib.import_module("onnx")  # torch's exporters need it
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ConfigurationError(
            f"runtime='onnxruntime' needs {error.name or 'onnx'}, which is not installed: "
            "pip install 'oneshot-nas[onnx]'"
        ) from error


def _processor() -> str:
    """The processor by its model's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.node()
