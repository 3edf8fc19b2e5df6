"""The gradient of the alphas through one step of the weights: the second order of DARTS.

The weights that fit alpha are not known, and one step towards them stands for them,
    w'(alpha) = w - xi u(grad_w L_train(w, alpha)),
where u is the update of SGD, with weight decay, momentum and the buffer. The gradient of L_valid(w'(alpha), alpha) is
    grad_alpha L_valid(w', alpha) - grad_alpha <v, grad_w L_train(w, alpha)>,   v = xi u' grad_w L_valid(w', alpha),
with v held fixed and u' the derivative of u by the gradient, one number per weight. The second term by a difference,
    (grad_alpha L_train(w + e v, alpha) - grad_alpha L_train(w - e v, alpha)) / (2 e),   e = epsilon / |v|,
or exactly, by differentiating twice. Source: DARTS, arXiv 1806.09055, section 2.3, eq. 5 to 8 (u = the gradient there).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, Optimizer

from ..errors import ConfigurationError, UnsupportedModelError
from .modes import frozen_weights
from .rng import global_state, restore_global_state

__all__ = [
    "Update",
    "check_unrolls",
    "difference_gradient",
    "differentiable_gradients_of",
    "exact_gradient",
    "gradients_of",
    "second_gradients_of",
    "sgd_step",
    "updates_of",
    "with_weights",
]

_T = TypeVar("_T")
_EPSILON = 0.01  # of the paper, section 2.3: the length of the difference in the space of the weights
_NOT_TWICE = (
    "the network cannot be differentiated twice: {}. Hard gates cannot (binary gates, a hard Gumbel softmax), nor can "
    "functions with a backward of their own. Use order=2, which takes a difference, or order=1; and no eigenvalue in "
    "early_stop"
)
_Mean = Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]]


class Update(NamedTuple):
    """What SGD does with the gradient of one weight: xi and what is in u."""

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    buffer: Tensor | None = None

    @property
    def derivative(self) -> float:
        """xi u': by how much a gradient larger by 1 lowers the new weight."""
        if not self.momentum:
            return self.lr
        into_buffer = 1.0 if self.buffer is None else 1.0 - self.dampening
        return self.lr * (1.0 + self.momentum if self.nesterov else into_buffer)  # nesterov has no dampening


def check_unrolls(optimizer: Optimizer) -> None:
    """ConfigurationError for an optimizer whose step is not the one that is differentiated."""
    if type(optimizer) is not SGD:
        raise ConfigurationError(
            f"optimizer: {type(optimizer).__name__}; the second order goes through a step of torch.optim.SGD, with or "
            "without momentum, nesterov and weight decay. Use SGD for the weights, or order=1"
        )
    if any(group["maximize"] for group in optimizer.param_groups):
        raise ConfigurationError(
            "optimizer: maximize=True raises the loss of the weights; the second order needs it False"
        )


def updates_of(optimizer: Optimizer) -> tuple[list[nn.Parameter], list[Update]]:
    """The weights of an SGD that learn, each with what its next step does."""
    weights, updates = [], []
    for group in optimizer.param_groups:
        lr, momentum, dampening, decay = (float(group[k]) for k in ("lr", "momentum", "dampening", "weight_decay"))
        for weight in group["params"]:
            if weight.requires_grad:
                weights.append(weight)
                buffer = optimizer.state.get(weight, {}).get("momentum_buffer")
                updates.append(Update(lr, momentum, dampening, decay, group["nesterov"], buffer))
    return weights, updates


def sgd_step(weight: Tensor, gradient: Tensor, update: Update) -> Tensor:
    """w' = w - xi u(gradient), differentiable in the gradient.

    >>> w, g = torch.tensor([1.0]), torch.tensor([2.0])
    >>> sgd_step(w, g, Update(0.1, momentum=0.5, buffer=torch.tensor([4.0])))  # 1 - 0.1 (2 + 0.5 * 4)
    tensor([0.6000])
    """
    step = gradient + update.weight_decay * weight
    if update.momentum:
        buffer = step if update.buffer is None else update.momentum * update.buffer + (1 - update.dampening) * step
        step = step + update.momentum * buffer if update.nesterov else buffer
    return weight - update.lr * step


def gradients_of(loss: Tensor, of: Sequence[Tensor]) -> list[Tensor | None]:
    """dloss / dx for each x, None where it takes no part."""
    return list(torch.autograd.grad(loss, list(of), allow_unused=True)) if loss.requires_grad else [None] * len(of)


def differentiable_gradients_of(loss: Tensor, of: Sequence[Tensor]) -> list[Tensor | None]:
    """As ``gradients_of``, to be differentiated again; UnsupportedModelError if a part of them cannot be.

    Autograd itself would leave such a part out in silence where only the gradients by some tensors are asked for.
    """
    if not loss.requires_grad:
        return [None] * len(of)
    found: list[Tensor | None] = [*torch.autograd.grad(loss, list(of), create_graph=True, allow_unused=True)]
    nodes = [gradient.grad_fn for gradient in found if gradient is not None and gradient.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node.name().endswith("::Error"):  # what a once_differentiable backward leaves behind
            raise UnsupportedModelError(_NOT_TWICE.format("it has a function whose backward is for once"))
        later = {other for other, _ in node.next_functions if other is not None} - seen
        seen |= later
        nodes.extend(later)
    return found


def second_gradients_of(value: Tensor, of: Sequence[Tensor], *, keep: bool = False) -> list[Tensor | None]:
    """As ``gradients_of``, for a value made of ``differentiable_gradients_of``. ``keep``: the graph is used again.

    UnsupportedModelError for a network with an operation that has no second derivative.
    """
    if not value.requires_grad:
        return [None] * len(of)
    try:
        return list(torch.autograd.grad(value, list(of), allow_unused=True, retain_graph=keep))
    except RuntimeError as error:
        raise UnsupportedModelError(_NOT_TWICE.format(error)) from error


def difference_gradient(
    train: Callable[[], Tensor],
    valid: Callable[[], Tensor],
    weights: Sequence[nn.Parameter],
    updates: Sequence[Update],
    alphas: Sequence[nn.Parameter],
    *,
    epsilon: float = _EPSILON,
    mean: _Mean = list,
) -> list[Tensor]:
    """The gradient of L_valid(w'(alpha), alpha) by alpha, the second term by a difference.

    ``train``, ``valid``: the losses with the weights and alphas as they are when called; what is random in ``train`` is
    the same in its three calls. ``mean``: from gradients to their mean over all processes. The weights are moved
    meanwhile, and put back bit for bit.
    """
    before = global_state()
    steps = mean(gradients_of(train(), weights))
    with torch.no_grad():
        moved = _moved(weights, steps, updates)
    with _placed(weights, moved):
        found = gradients_of(valid(), [*alphas, *weights])
    after = global_state()
    direct, upstream = _filled(found[: len(alphas)], alphas), mean(found[len(alphas) :])
    rows = zip(steps, upstream, updates, strict=True)
    v = [None if g is None or d is None else update.derivative * d for g, d, update in rows]
    length = math.sqrt(sum(float(x.double().square().sum()) for x in v if x is not None))
    if length == 0:
        return direct
    e = epsilon / length
    sides = []
    for sign in (1.0, -1.0):
        aside = [None if x is None else (w + sign * e * x).detach() for w, x in zip(weights, v, strict=True)]
        restore_global_state(before)
        with _placed(weights, aside), frozen_weights(weights):
            sides.append(_filled(gradients_of(train(), alphas), alphas))
    restore_global_state(after)
    return [g - (up - down) / (2 * e) for g, up, down in zip(direct, *sides, strict=True)]


def exact_gradient(
    model: nn.Module,
    train: Callable[[], Tensor],
    valid: Callable[[], Tensor],
    weights: Sequence[nn.Parameter],
    updates: Sequence[Update],
    alphas: Sequence[nn.Parameter],
) -> list[Tensor]:
    """The gradient of L_valid(w'(alpha), alpha) by alpha, exactly, in the memory of a graph of gradients.

    ``train``, ``valid`` as in ``difference_gradient``; ``weights`` are parameters of ``model``. UnsupportedModelError
    for a network that cannot be differentiated twice.
    """
    moved = _moved(weights, differentiable_gradients_of(train(), weights), updates)
    found = with_weights(model, weights, moved, lambda: second_gradients_of(valid(), alphas))
    return _filled(found, alphas)


def with_weights(
    model: nn.Module, weights: Sequence[nn.Parameter], values: Sequence[Tensor | None], function: Callable[[], _T]
) -> _T:
    """``function()`` while ``model`` computes with ``values`` in the place of its ``weights``, differentiably.

    None: that weight as it is. The parameters of the model are not touched.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> with_weights(net, [net.weight], [torch.tensor([[3.0]])], lambda: net(torch.tensor([2.0])))
    tensor([6.])
    """
    names: dict[int, dict[tuple[int, str], str]] = {}
    for path, module in model.named_modules():  # each module once, at one of its paths
        for leaf, parameter in module.named_parameters(recurse=False):
            names.setdefault(id(parameter), {})[id(module), leaf] = ".".join(filter(None, ("model", path, leaf)))
    given = zip(weights, values, strict=True)
    replaced = {name: value for weight, value in given if value is not None for name in names[id(weight)].values()}
    result: _T = functional_call(_Calling(model), replaced, (function,), tie_weights=False)
    return result


class _Calling(nn.Module):
    """A module to call a function in: its backward passes, too, are then made while the weights are replaced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], _T]) -> _T:
        return function()


@contextmanager
def _placed(weights: Sequence[nn.Parameter], values: Sequence[Tensor | None]) -> Iterator[None]:
    """The values are in the weights inside, in place, so that nothing that holds a weight can miss them."""
    kept = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight, value in zip(weights, values, strict=True):
                if value is not None:
                    weight.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)


def _moved(
    weights: Sequence[Tensor], gradients: Sequence[Tensor | None], updates: Sequence[Update]
) -> list[Tensor | None]:
    """w' of each weight; None for one without a gradient, which SGD leaves as it is."""
    rows = zip(weights, gradients, updates, strict=True)
    return [None if gradient is None else sgd_step(weight, gradient, update) for weight, gradient, update in rows]


def _filled(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor]:
    rows = zip(gradients, parameters, strict=True)
    return [torch.zeros_like(parameter) if gradient is None else gradient for gradient, parameter in rows]
