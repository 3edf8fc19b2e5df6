"""What the benches of steps share: plain steps, clocks, peak memory, steps in turns, and what is said of a ratio."""

from __future__ import annotations

import copy
import os
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timezone
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from oneshot import LayerChoice

Step = Callable[[], None]

NOISE = 0.05  # of a ratio of times on a shared machine; memory is exact, but for what the allocator rounds


class PlainSum(nn.Module):
    """The sum of all branches, as somebody would write it who searches nothing."""

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return total


def without_choices(space: nn.Module) -> nn.Module:
    """A copy with plain sums in the places of choices."""
    plain = copy.deepcopy(space)
    for module in list(plain.modules()):
        for name, child in module.named_children():
            if isinstance(child, LayerChoice):
                setattr(module, name, PlainSum(list(child)))
    return plain


def sgd(parameters: Any, lr: float = 1e-3) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def plain_step(net: nn.Module, x: Tensor, y: Tensor, *, precision: str = "32-true") -> Step:
    """The training step that anyone would write for a network."""
    optimizer = sgd(net.parameters())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(x.device, precision):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()

    return step


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    if precision == "32-true":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def batch_of(shape: Sequence[int], batch: int, device: torch.device, classes: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, *shape, device=device), torch.randint(classes, (batch,), device=device)


# ---- measuring -----------------------------------------------------------------------------------------------------


def clock(device: torch.device) -> float:
    """CPU time of the process in seconds, on which other work counts little; with a GPU wall time, when it is done."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(step: Step, device: torch.device) -> float:
    start = clock(device)
    step()
    return clock(device) - start


def in_turns(
    steps: Mapping[str, Step], rounds: int, device: torch.device, rng: random.Random, warm_up: int = 2
) -> dict[str, list[float]]:
    """Step -> seconds in each round; in a round every step runs once, in changing order."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + warm_up):
        for name in rng.sample(list(steps), len(steps)):
            took = seconds(steps[name], device)
            if i >= warm_up:
                times[name].append(took)
    return times


class Ratio(NamedTuple):
    """Of two steps: the ratio of their medians, and the quartiles of the ratios within a round."""

    of_medians: float
    q25: float
    q75: float


def ratio_of(times: Sequence[float], plain: Sequence[float]) -> Ratio:
    """
    >>> ratio_of([1.0, 2.0, 3.0], [1.0, 1.0, 2.0])  # 2 / 1; of 1, 2 and 1.5 the quartiles
    Ratio(of_medians=2.0, q25=1.25, q75=1.75)
    """
    pairs = [a / b for a, b in zip(times, plain, strict=True)]
    q25, _, q75 = quantiles(pairs, n=4, method="inclusive")
    return Ratio(median(times) / median(plain), q25, q75)


def peak_bytes(step: Step, device: torch.device) -> int:
    """The highest sum, within one step, of what was allocated since it began less what was freed of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    assert record.profiler is not None
    assert record.profiler.kineto_results is not None
    found, waiting = [], list(record.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.name == "[memory]":
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    live: dict[int, int] = {}
    total = peak = 0
    for _, place, size in sorted(found, key=lambda one: one[0]):
        if size > 0:
            live[place] = size
            total += size
            peak = max(peak, total)
        else:  # what was there before the step is not counted
            total -= live.pop(place, 0)
    return peak


def saved_bytes(loss: Callable[[], Tensor]) -> int:
    """Of the distinct storages that autograd keeps for the backward pass of a loss."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = loss()
    del held
    return sum(storages.values())


# ---- what is said of it --------------------------------------------------------------------------------------------


def verdict(value: float, goal: float | None, noise: float) -> str:
    """
    >>> [verdict(value, 1.05, 0.05) for value in (1.04, 1.09, 1.11)]
    ['met', 'within noise', 'MISSED']
    """
    if goal is None:
        return "for information"
    return "met" if value <= goal else "within noise" if value <= goal + noise else "MISSED"


def about_machine(device: torch.device, **more: Any) -> dict[str, Any]:
    machine = f"{platform.platform()}, {os.cpu_count()} cores"
    if device.type == "cuda":
        machine += f", {torch.cuda.get_device_name(device)}"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **more,
    }
