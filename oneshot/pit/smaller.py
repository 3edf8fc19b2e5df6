"""What a search that gets smaller has left behind, as plain data, and a network of the full size brought there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from ..errors import ArchMismatchError
from .drop import dropped_options, remove_options_
from .network import SearchedNetwork
from .shrink import remove_units_, removed_units

__all__ = ["remove_", "removed"]


def removed(network: SearchedNetwork) -> dict[str, Any]:
    """What the network at first had and has no more, JSON-ready: ``{}`` for nothing.

    ``units``: label of a mask -> its units that are gone. ``candidates``: label of a choice -> its candidates.
    ``decided``: label of a mask that went with its candidate -> what it had decided.

    >>> from torch import nn
    >>> from oneshot.pit import PIT
    >>> from oneshot.pit.shrink import shrink_
    >>> make = lambda: PIT(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), (3,), cost="params")
    >>> pit, fresh = make(), make()
    >>> pit.masks["0"].keep([1, 3])
    >>> _ = shrink_(pit)
    >>> removed(pit)
    {'units': {'0': [0, 2]}}
    >>> remove_(fresh, removed(pit))
    >>> fresh.load_state_dict(pit.state_dict()), fresh.arch()
    (<All keys matched successfully>, {'0': [1, 3]})
    """
    decided = {label: gone.decision for label, gone in network._gone.items()}
    found = {"units": removed_units(network), "candidates": dropped_options(network), "decided": decided}
    return {kind: of_kind for kind, of_kind in found.items() if of_kind}


def remove_(network: SearchedNetwork, removed: Mapping[str, Any], optimizers: Sequence[Optimizer] = ()) -> None:
    """Bring a network of the full size to the shape of the one that told ``removed``, whatever its alphas say.

    The ``state_dict`` of that one then loads into it, and those of its optimizers into ``optimizers``, which hold the
    parameters of the full network until now. ArchMismatchError, with nothing changed, for what this network does not
    have.
    """
    strange = [kind for kind in removed if kind not in ("units", "candidates", "decided")]
    if strange:
        raise ArchMismatchError(f"removed: {strange}; what removed(network) returned is needed")
    remove_options_(network, removed.get("candidates", {}), removed.get("decided", {}), optimizers)
    remove_units_(network, removed.get("units", {}), optimizers)
