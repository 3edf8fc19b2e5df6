"""What the processes of one run say to each other: mean gradients, common numbers, and when to stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, final

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from torch import Tensor, nn

from ..errors import ConfigurationError, TrainingDivergedError
from .meters import Meters

__all__ = ["Processes"]

_T = TypeVar("_T")


@final
class Processes:
    """The processes of a Fabric. With one of them, nothing is sent and nothing is waited for.

    Numbers and objects go over the CPU (gloo), which notices a process that died within seconds and waits for no GPU;
    gradients go the way of the devices.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self._is_launched = False
        self._talk: Any = None

    def launch(self) -> None:
        """Start the others, or meet them; once."""
        if self._is_launched:
            return
        self.fabric.launch()
        self._is_launched = True
        if self.count > 1 and dist.get_backend() != "gloo":
            self._talk = dist.new_group(backend="gloo")

    @property
    def count(self) -> int:
        """How many there are; 1 before ``launch``, when each is on its own."""
        return self.fabric.world_size if self._is_launched else 1

    @property
    def rank(self) -> int:
        """Which of them this is; 0 before ``launch``."""
        return int(self.fabric.global_rank) if self._is_launched else 0

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files."""
        return bool(self.fabric.is_global_zero)

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier(group=self._talk)

    def from_first(self, make: Callable[[], _T]) -> _T:
        """What the first process makes, for all of them."""
        if self.count == 1:
            return make()
        held = [make() if self.is_first else None]
        dist.broadcast_object_list(held, src=0, group=self._talk)
        return held[0]  # type: ignore[return-value]

    def gathered(self, one: _T) -> list[_T]:
        """What each of them gives, in the order of their ranks."""
        if self.count == 1:
            return [one]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, one, group=self._talk)
        return found

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes its mean over all processes: one message, and the same bits in each of them."""
        if self.count == 1 or not tensors:
            return
        # Not Fabric's all_reduce, which lets the CPU wait for the GPU first.
        flat = torch.cat([t.detach().flatten().to(self.fabric.device) for t in tensors])
        dist.all_reduce(flat)
        flat /= self.count
        with torch.no_grad():
            for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def fill_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """A gradient of zeros for each parameter that has one in another process, as in a layer left out by chance."""
        if self.count == 1:
            return
        there = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
        dist.all_reduce(there, op=dist.ReduceOp.MAX, group=self._talk)
        for parameter, somewhere in zip(parameters, there.tolist(), strict=True):
            if somewhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        if self.count == 1:
            return value
        held = value.detach().clone()
        self.mean_([held])
        return held

    def averages(self, meters: Meters) -> dict[str, float]:
        """The averages over what all processes have seen."""
        names = self.from_first(lambda: list(meters.sums))  # another one may have seen nothing
        if self.count == 1:
            return meters.averages()
        found = torch.zeros(2, len(names), dtype=torch.float64)
        for i, name in enumerate(names):
            found[0, i], found[1, i] = float(meters.sums.get(name, 0.0)), meters.counts.get(name, 0)
        dist.all_reduce(found, group=self._talk)
        return dict(zip(names, (found[0] / found[1]).tolist(), strict=True))

    def largest(self, number: int) -> int:
        """The largest of the numbers that they have."""
        if self.count == 1:
            return number
        held = torch.tensor(number)
        dist.all_reduce(held, op=dist.ReduceOp.MAX, group=self._talk)
        return int(held)

    @torch.no_grad()
    def share(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the values of the first one."""
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors if self.count > 1 else ():
            by_type.setdefault(tensor.dtype, []).append(tensor)
        for alike in by_type.values():
            flat = torch.cat([t.detach().flatten() for t in alike]).cpu()
            dist.broadcast(flat, src=0, group=self._talk)
            for tensor, value in zip(alike, flat.split([t.numel() for t in alike]), strict=True):
                tensor.copy_(value.view_as(tensor))

    def check_alike(self, settings: Mapping[str, Any]) -> None:
        """ConfigurationError unless all processes were started with these settings."""
        if self.count == 1:
            return
        mine = {name: str(value) for name, value in settings.items()}
        for rank, theirs in enumerate(self.gathered(mine)):
            other = [name for name in mine if theirs.get(name) != mine[name]]
            if other:
                text = ", ".join(f"{name} {theirs.get(name)} there and {mine[name]} here" for name in other)
                raise ConfigurationError(
                    f"process {rank} of {self.count} was started with other settings than process "
                    f"{self.fabric.global_rank}: {text}. What a script computes before the search, a measured latency "
                    "say, has to be the same in all of them: read it from a file"
                )

    def check_same(self, tensors: Sequence[Tensor]) -> None:
        """TrainingDivergedError unless these tensors of all processes add up to the same numbers."""
        if self.count == 1 or not tensors:
            return
        found = self.gathered([float(t.detach().double().sum()) for t in tensors])
        # As text, in which two numbers that are none are alike.
        wrong = [rank for rank, theirs in enumerate(found) if str(theirs) != str(found[0])]
        if wrong:
            raise TrainingDivergedError(
                f"processes {wrong} of {self.count} have other weights than process 0, so that each of them searches "
                "a network of its own. The model, its loss or the data use numbers of the process (its rank, its own "
                "random generator) for what has to be common; or the devices compute differently: use equal ones"
            )
