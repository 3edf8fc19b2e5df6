"""The proof that a network which is changed in place goes on to compute what it did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..graph import evaluated
from ..mutables import Sampler
from .fixed import check_equal

__all__ = ["Unchanged"]


class _Seen(nn.Module):
    """Returns what a network once did."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = (output,)

    def forward(self, *args: Any) -> Any:
        return self.output[0]


@final
class Unchanged:
    """Outputs of ``model`` as it is now, in eval mode under each of ``samplers``, on each of ``examples``.

    Called later on: ExportError unless the outputs are still these, at most 1e-4 apart in float32 and 1e-9 in float64
    (max |difference| / max |output|); ``name``: what the error calls the model of then.

    >>> from oneshot.mutables import Argmax
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> unchanged = Unchanged(net, [(torch.ones(1, 2),)], [Argmax()])
    >>> unchanged("the network")
    """

    def __init__(self, model: nn.Module, examples: Sequence[Sequence[Any]], samplers: Sequence[Sampler]) -> None:
        self.model = model
        self.seen = [(sampler, args, _Seen(_output(model, sampler, args))) for sampler in samplers for args in examples]

    def __call__(self, name: str) -> None:
        for sampler, args, seen in self.seen:
            with evaluated(self.model, sampler):
                check_equal(seen, self.model, args, name, seed=0)


def _output(model: nn.Module, sampler: Sampler, args: Sequence[Any]) -> Any:
    with evaluated(model, sampler), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(*pytree.tree_map_only(Tensor, torch.clone, list(args)))
