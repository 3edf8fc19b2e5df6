"""One architecture of a trained supernet -> its loss and metrics on held-out data, after recalibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from ..errors import ConfigurationError
from ..export import choices_of
from ..graph import evaluated
from ..mutables import OnePath, decisions
from .batches import even_batches
from .meters import Meters
from .recalibration import recalibrated
from .rng import seed_global_state, user_state_kept
from .selection import larger_is_better

__all__ = ["PathEvaluator", "pinned"]

_MOST_BYTES = 2**30  # of held-out data that are kept in memory between two architectures


@contextmanager
def pinned(model: nn.Module, choices: Mapping[str, int]) -> Iterator[None]:
    """Inside, the model is the path of label -> option, in eval mode without grad; afterwards it is as it was."""
    with evaluated(model):
        for label, decision in decisions(model).items():
            decision.set_sampler(OnePath(choices[label]))
        yield


@final
class PathEvaluator:
    """Scores architectures with the weights of a supernet; ``evaluator(arch)`` is a number, the larger the better.

    The path of the architecture runs in eval mode on ``dataset``, with BatchNorm statistics that were recomputed for
    it. Afterwards the supernet is what it was, bit for bit. Every architecture sees the same data, random
    augmentation included, and the caller's random numbers stay where they were.

    Args:
        model: the trained search model.
        loss, metrics: as of a trainer; their averages over the samples are the values of an architecture.
        dataset: (input, target) pairs that trained no weight.
        recalibrate_on: inputs of several batches, better of those that trained the weights; None leaves the running
            statistics of the supernet, which mix all its paths: only to see how bad that is.
        monitor: what the score is: ``'loss'`` (then score = -loss) or one of the metrics; ``monitor_mode``: ``'min'``
            if less of it is better, and the score is its negative.
        batch_size: the dataset is cut into batches of about that many.
        autocast: a function that returns a context manager for the forward.

    >>> from oneshot import LayerChoice, accuracy
    >>> net = nn.Sequential(LayerChoice({"keep": nn.Identity(), "zero": nn.Threshold(9.0, 0.0)}, label="a"))
    >>> data = torch.utils.data.TensorDataset(torch.eye(4), torch.arange(4))
    >>> top1 = lambda output, target: accuracy(output, target, topk=(1,))
    >>> evaluator = PathEvaluator(net, loss=nn.CrossEntropyLoss(), metrics=top1, dataset=data, monitor="acc1")
    >>> evaluator({"a": "keep"}), evaluator({"a": "zero"})  # without any signal the first of 4 classes is said
    (1.0, 0.25)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Callable[[Any, Any], Tensor],
        metrics: Callable[[Any, Any], Mapping[str, Tensor | float] | Tensor | float] | None,
        dataset: Dataset[Any],
        recalibrate_on: Sequence[Any] | None = None,
        monitor: str = "loss",
        monitor_mode: Literal["min", "max"] | None = None,
        batch_size: int = 64,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model, self.loss, self.metrics = model, loss, metrics
        self.dataset, self.batch_size, self.autocast = dataset, batch_size, autocast
        self.recalibrate_on = recalibrate_on
        self.monitor, self.sign = monitor, 1.0 if larger_is_better(monitor, monitor_mode) else -1.0
        self._kept: list[tuple[Any, Any]] | None = None

    def __call__(self, arch: Mapping[str, Any]) -> float:
        return self.score(self.values(choices_of(self.model, arch)))

    def score(self, values: Mapping[str, float]) -> float:
        """The monitored one of the values, or its negative: the larger the better."""
        if self.monitor not in values:
            raise ConfigurationError(f"monitor={self.monitor!r}: allowed are {list(values)}")
        return self.sign * values[self.monitor]

    def values(self, choices: Mapping[str, int]) -> dict[str, float]:
        """Loss and metrics of an architecture given as label -> option."""
        meters = Meters()
        device = next((p.device for p in self.model.parameters()), None)
        with user_state_kept(), pinned(self.model, choices), self.autocast(), ExitStack() as stack:
            seed_global_state(0)
            if self.recalibrate_on is not None:
                stack.enter_context(recalibrated(self.model, (_to(inputs, device) for inputs in self.recalibrate_on)))
            for batch in self._batches():
                # A copy: the batch is kept, and a network may write into its input.
                inputs, target = _to(pytree.tree_map_only(Tensor, torch.clone, batch), device)
                output = self.model(inputs)
                meters.add({"loss": self.loss(output, target), **self._measured(output, target)}, weight=len(target))
        return meters.averages()

    def _batches(self) -> Iterator[tuple[Any, Any]]:
        """The dataset in order; read only once if it is small."""
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[tuple[Any, Any]] = []
        size = 0
        for batch in even_batches(self.dataset, self.batch_size):
            size += sum(t.nbytes for t in pytree.tree_leaves(batch) if isinstance(t, Tensor))
            if size <= _MOST_BYTES:
                kept.append(batch)
            yield batch
        self._kept = kept if size <= _MOST_BYTES else None

    def _measured(self, output: Any, target: Any) -> dict[str, Tensor | float]:
        if self.metrics is None:
            return {}
        found = self.metrics(output, target)
        return dict(found) if isinstance(found, Mapping) else {"metric": found}


def _to(data: Any, device: torch.device | None) -> Any:
    return data if device is None else pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), data)
