"""What can be found wrong with a model, its loss and its data before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from ..errors import ConfigurationError, OneshotError, UnsupportedModelError
from ..export import verified_fixed
from ..graph import evaluated
from ..mutables import EveryPath, decisions
from .batches import even_batches

__all__ = ["check_export", "check_one_batch"]


def check_one_batch(model: nn.Module, loss: Callable[[Any, Any], Any], dataset: Dataset[Any]) -> None:
    """Run two samples along every path: candidates of unequal shape, or a loss that fails, show here."""
    inputs, target = next(iter(even_batches(Subset(dataset, [0, 1]), 2)))
    device = next(model.parameters()).device
    with evaluated(model, EveryPath()):
        try:
            value = loss(model(inputs.to(device)), target.to(device))
        except OneshotError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise UnsupportedModelError(
                f"{type(model).__name__} or its loss does not run on a batch of the dataset, inputs of shape "
                f"{tuple(inputs.shape)}: {type(error).__name__}: {error}"
            ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ConfigurationError(f"loss(output, target) must return one number as a tensor, got {got}")


def check_export(model: nn.Module, examples: Sequence[Sequence[Any]]) -> None:
    """An export that would be refused after the search is refused before it: first and last options are tried."""
    for end in (0, -1):
        choices = {label: range(len(d.options))[end] for label, d in decisions(model).items()}
        verified_fixed(model, choices, examples)
