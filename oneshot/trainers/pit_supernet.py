"""Masks and choices of one network, searched in one run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, final

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import InputTypeError, UnsupportedModelError
from ..mutables.temperature import Temperature
from ..pit.network import SearchedNetwork
from .arguments import known_arguments
from .decidedness import Decidedness
from .masks import ArchOptimizer, Masks, masks_without_decay
from .penalized import PenalizedArguments, PenalizedTrainer
from .sampling import Sampling, as_temperature

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["PITSuperNetTrainer"]


@final
class PITSuperNetTrainer(PenalizedTrainer):
    """Searches masks and choices of a network together: warm-up, search, fine-tuning.

    It is ``PITTrainer`` for the masks and ``SuperNetTrainer`` for the alphas, in one loss, L = CE + sum_k s_k C_k, and
    one step: C_k is the cost expected under the probabilities of the step, of candidates of the sizes that their masks
    leave. ``targets`` are met as in ``PITTrainer`` and ``SuperNetTrainer``.

    Args:
        network: ``PIT(model, ...)`` of a model with choices; or ``SuperNet(model, ...)``, which has choices alone, also
            between outputs of different widths. The optimizer is built from its parameters.
        mask_learning_rate, arch_learning_rate: of Adam, without weight decay, for masks and for alphas.
            ``arch_optimizer``: a function from the list of both to another optimizer, without weight decay of masks.
        sampling, hard, temperature, icv_strength, entropy_strength, train_selection: as in ``SuperNetTrainer``.

    All others as in ``PITTrainer``. If no cost can pull, the masks stay where they are and the alphas learn.
    """

    model: SearchedNetwork

    def __init__(
        self,
        network: SearchedNetwork,
        *,
        mask_learning_rate: float = 1e-3,
        arch_learning_rate: float = 1e-3,
        arch_optimizer: ArchOptimizer | None = None,
        sampling: Literal["softmax", "gumbel"] = "softmax",
        hard: bool = False,
        temperature: float | Temperature = 1.0,
        icv_strength: float = 0.0,
        entropy_strength: float = 0.0,
        train_selection: bool = True,
        **others: Unpack[PenalizedArguments],
    ) -> None:
        if not isinstance(network, SearchedNetwork):
            raise InputTypeError(
                f"PITSuperNetTrainer: a {type(network).__name__} is no PIT or SuperNet network; wrap it, "
                "PITSuperNetTrainer(PIT(model, input_shape=...), ...), or search its choices alone with SuperNetTrainer"
            )
        if not network.choices:
            raise UnsupportedModelError("PITSuperNetTrainer: the network has no choices; search it with PITTrainer")
        adam = _two_groups(network, mask_learning_rate, arch_learning_rate)
        super().__init__(
            Masks(network, train_selection=train_selection),
            arch_optimizer=masks_without_decay(network, arch_optimizer or adam),
            sampling=Sampling(sampling, hard, as_temperature(temperature)),
            decidedness=Decidedness(icv_strength, entropy_strength),
            **known_arguments("PITSuperNetTrainer", others, PenalizedArguments),
        )


def _two_groups(network: SearchedNetwork, of_masks: float, of_alphas: float) -> ArchOptimizer:
    ids = {id(parameter) for parameter in network.masks.parameters()}

    def adam(parameters: list[nn.Parameter]) -> Optimizer:
        masks = [p for p in parameters if id(p) in ids]
        alphas = [p for p in parameters if id(p) not in ids]
        return torch.optim.Adam([{"params": masks, "lr": of_masks}, {"params": alphas, "lr": of_alphas}])

    return adam
