"""The exponential moving average of weights, and of the running statistics that fit them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigurationError
from ..mutables import arch_parameters
from .modes import normalisations

__all__ = ["WeightAverage", "decay_of"]


def decay_of(update: int, decay: float) -> float:
    """d_t = min(decay, (1 + t) / (10 + t)) of the t-th update, the first one being 1.

    The average of few steps would else be that of the start: with 0.999 it still has 90 % of it after 100 steps.
    Source: ``num_updates`` of TensorFlow's ``tf.train.ExponentialMovingAverage``.

    >>> decay_of(1, 0.999), round(decay_of(100, 0.999), 4), decay_of(10**6, 0.999)  # 2 / 11, 101 / 110
    (0.18181818181818182, 0.9182, 0.999)
    """
    return min(decay, (1 + update) / (10 + update))


@final
class WeightAverage:
    """a_t = d_t a_(t-1) + (1 - d_t) w_t of weights and of running means and variances, a_0 what they are at first.

    Alphas and masks have no average: what is searched is where it is. Nor has a count of batches. A weight whose
    candidate did not run in a step has no gradient and does not move; its average comes closer to it meanwhile, and
    needs no care. Averages are kept in at least float32, where the weights are; a weight that has another shape than
    its average, in a search that makes the network smaller, begins again at what it is.

    Args:
        model: the network; its normalisations are averaged as well, because batches of the weights of now have other
            statistics than those of the averages.
        weights: parameters of it, no alphas.
        decay: the largest d_t, from 0 to below 1; d_t is ``decay_of(t, decay)``.

    Raises ConfigurationError for another decay, an alpha, or a weight that the model does not have.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(layer.weight, 0.0)
    >>> average = WeightAverage(layer, [layer.weight], decay=0.5)
    >>> _ = nn.init.constant_(layer.weight, 11.0)
    >>> average.update()  # d_1 = 2 / 11: 0 + 9 / 11 * 11
    >>> with average.swapped():
    ...     round(layer.weight.item(), 5)
    9.0
    >>> layer.weight.item()
    11.0
    """

    def __init__(self, model: nn.Module, weights: Sequence[nn.Parameter], decay: float) -> None:
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
            raise ConfigurationError(f"decay={decay!r}: a number from 0 to below 1 is needed, 0.999 say")
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        strange = [i for i, weight in enumerate(weights) if id(weight) not in names]
        if strange:
            raise ConfigurationError(f"weights {strange[:3]} of {len(weights)} are no parameters of the model")
        alphas = {id(alpha) for alpha in arch_parameters(model)}
        searched = [names[id(weight)] for weight in weights if id(weight) in alphas]
        if searched:
            raise ConfigurationError(f"{searched[:3]}: alphas have no average; give the weights alone")
        self.decay, self.updates = decay, 0
        self._weights = {names[id(weight)]: weight for weight in weights}
        paths = {id(module): path for path, module in model.named_modules()}
        # By their places: a model that moves to another device puts other tensors there.
        self._statistics = [
            (f"{paths[id(layer)]}.{name}".lstrip("."), layer, name)
            for layer in normalisations(model)
            for name in ("running_mean", "running_var")
        ]
        self._averages: dict[str, Tensor] = {}
        self._swaps = 0
        self.restart()

    def restart(self) -> None:
        """Begin anew, with what the weights are now."""
        self.updates = 0
        self._averages = {name: _start(tensor) for name, tensor in self._tensors().items()}

    @property
    def averages(self) -> dict[str, Tensor]:
        """The averages by the names of the weights."""
        return dict(self._averages)

    @torch.no_grad()
    def update(self) -> None:
        """Take in what the weights are now, after a step; nothing is read by the CPU."""
        if self._swaps:
            raise RuntimeError("update(): the model holds its averages at the moment; call it outside of swapped()")
        self.updates += 1
        tensors = self._followed()
        averages = list(self._averages.values())
        values = [tensor.to(average.dtype) for tensor, average in zip(tensors.values(), averages, strict=True)]
        if averages:
            torch._foreach_lerp_(averages, values, 1 - decay_of(self.updates, self.decay))

    def follow(self, model: nn.Module, averages: Mapping[str, Tensor]) -> None:
        """Go on with a model that has lost some of its weights, and with these averages of what is left."""
        left = {id(parameter) for parameter in model.parameters()}
        layers = {id(module) for module in model.modules()}
        self._weights = {name: weight for name, weight in self._weights.items() if id(weight) in left}
        self._statistics = [row for row in self._statistics if id(row[1]) in layers]
        self._averages = {name: averages.get(name, self._averages[name]) for name in self._tensors()}

    def adopt(self) -> None:
        """Let the model have the averages from now on."""
        _copy(self._averages, self._followed())

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the model holds the averages; afterwards exactly what it held before, whatever happened inside.

        Its ``state_dict`` has the averages then, this one's is the same as ever. Inside of another one, nothing.
        """
        self._swaps += 1
        try:
            if self._swaps > 1:
                yield
                return
            tensors = self._followed()
            before = {name: tensor.clone() for name, tensor in tensors.items()}
            try:
                _copy(self._averages, tensors)
                yield
            finally:
                _copy(before, self._tensors())
        finally:
            self._swaps -= 1

    def state_dict(self) -> dict[str, Any]:
        """Copies of the averages by the names of the weights, and the number of updates."""
        self._followed()
        return {"updates": self.updates, "averages": {name: a.clone() for name, a in self._averages.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned; CheckpointError, with nothing changed, if it does not fit."""
        found, tensors = state.get("averages"), self._tensors()
        if not isinstance(found, Mapping) or not isinstance(state.get("updates"), int):
            raise CheckpointError(f"state of a WeightAverage: 'averages' and 'updates' are needed, got {list(state)}")
        missing, extra = [k for k in tensors if k not in found], [k for k in found if k not in tensors]
        shapes = [k for k in tensors if k in found and tensors[k].shape != found[k].shape]
        if missing or extra or shapes:
            raise CheckpointError(
                f"averages of other weights: {len(missing)} missing {missing[:3]}, {len(extra)} too many {extra[:3]}, "
                f"{len(shapes)} of another shape {shapes[:3]}. Build the trainer as the one that was saved"
            )
        self.updates = state["updates"]
        averages = {name: _start(tensor) for name, tensor in tensors.items()}
        _copy({name: found[name] for name in averages}, averages)
        self._averages = averages

    def _tensors(self) -> dict[str, Tensor]:
        """What is averaged, as it is now."""
        weights = {name: weight.detach() for name, weight in self._weights.items()}
        return {**weights, **{name: getattr(layer, leaf).detach() for name, layer, leaf in self._statistics}}

    def _followed(self) -> dict[str, Tensor]:
        """``_tensors``, with the averages of their shapes and precision, and where they are."""
        tensors = self._tensors()
        for name, tensor in tensors.items():
            average = self._averages[name]
            if average.shape != tensor.shape:
                self._averages[name] = _start(tensor)
            else:
                self._averages[name] = average.to(tensor.device, _precision(tensor))
        return tensors


def _precision(tensor: Tensor) -> torch.dtype:
    # In half precision a step of (1 - d) (w - a) would be rounded away.
    return torch.promote_types(tensor.dtype, torch.float32)


def _start(tensor: Tensor) -> Tensor:
    return tensor.detach().to(_precision(tensor), copy=True)


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(values[name])
