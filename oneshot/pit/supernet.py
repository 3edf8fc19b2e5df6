"""SuperNet: a network with choices for a loop of one's own, with exact expected costs (DARTS, arXiv 1806.09055)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from torch import nn

from .arguments import CostArgument, cost_argument
from .conversion import Plan
from .network import SearchedNetwork

__all__ = ["SuperNet"]


@final
class SuperNet(SearchedNetwork):
    """A copy of ``model``, which has choices in it; called as the model itself is.

    Every choice returns sum_k p_k o_k(x) with p = softmax(alpha / temperature), and a cost is its expectation under the
    same p, exactly: sum over all architectures of their probability times their cost, also where choices are nested or
    share a label. Training takes three lines: ``loss = task(net(x), y) + strength * net.get_cost("macs")``,
    ``loss.backward()``, ``optimizer.step()``; ``net.nas_parameters()`` and ``net.net_parameters()`` for optimizers.

    Candidates may have outputs of different widths where a convolution or a linear layer follows (perhaps after
    functions that keep zeros): in the search the narrower ones are padded with zeros, in the expected input channels of
    what follows each counts with its own, and the exported network has the width of the one that was chosen.

    Args:
        model: the network, which is copied and stays as it is, with its train and eval flags.
        input_shape, example_input, cost, regularizer, ignore: as in ``PIT``.
        temperature, gumbel_softmax, hard_softmax: see ``update_softmax_options``, which changes them.

    Raises UnsupportedModelError for a model without choices, or where different widths cannot be cut.

    >>> from oneshot import LayerChoice
    >>> pool = LayerChoice([nn.Linear(4, 4), nn.Identity()], label="pool")
    >>> net = SuperNet(nn.Sequential(pool, nn.Linear(4, 2)), (4,), cost="params")
    >>> net.cost.item(), net.arch()  # half of 4 * 4 + 4, and 4 * 2 + 2
    (20.0, {'pool': 0})
    >>> net.decide({"pool": 1})
    >>> net.export()
    Sequential(
      (0): Identity()
      (1): Linear(in_features=4, out_features=2, bias=True)
    )
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[Any, ...] | None = None,
        *,
        example_input: Any = None,
        cost: CostArgument | None = None,
        regularizer: str | None = None,
        temperature: float = 1.0,
        gumbel_softmax: bool = False,
        hard_softmax: bool = False,
        ignore: Sequence[str | type[nn.Module]] = (),
    ) -> None:
        cost = cost_argument("SuperNet", cost, regularizer)
        self._build(model, input_shape, example_input, Plan((), 1, False), cost, ignore)
        self.update_softmax_options(temperature, gumbel=gumbel_softmax, hard=hard_softmax)
