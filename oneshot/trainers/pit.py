"""PIT (arXiv 2203.14768): masks over the channels, kernels and dilations of a network, trained with its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch

from ..errors import InputTypeError, UnsupportedModelError
from ..pit import PIT
from .arguments import known_arguments
from .masks import ArchOptimizer, Masks, masks_without_decay
from .penalized import PenalizedArguments, PenalizedTrainer

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["PITTrainer"]


@final
class PITTrainer(PenalizedTrainer):
    """Searches the masks of a ``PIT`` network: warm-up, search, fine-tuning.

    * Warm-up: the weights alone; masks stay at 1.
    * Search: weights and masks. The loss of the masks is L = CE + sum_k s_k C_k, where C_k is the cost of the network
      that would be exported now, in its unit, with the gradient of the relaxed cost. Targets need no strength: see
      below.
    * Fine-tuning: the weights alone, with masks as they were found, from the epoch that is kept and with a fresh
      optimizer. It is what training the exported network would be, in the size of the whole one.

    ``targets`` are met by what is exported. Their costs pull with prices that dual ascent finds (``trainers.budget``),
    towards limits that come down to the targets in the first half of the search; masks, which Adam moves at one speed,
    are raised together where they have gone below a limit. From 60 % of the search on they are projected onto the
    targets after each step, with a learning rate that falls from a fifth to 0: the units of the smallest |alpha|, in
    which the gradients of task and costs have been gathered, are switched off, others on where there is room, so that
    weights are trained in the network that will be exported.

    Masks have an optimizer of their own without weight decay, and are clipped to [0, 1] after each step. If no cost can
    pull (every strength is 0, or the whole network meets the targets), they stay where they are: the task alone would
    also switch units off, and buy nothing with it. Adam moves a mask by about its learning rate whatever the strength:
    what counts is which of the two gradients, of task and cost, is larger. SGD (``arch_optimizer``) keeps their scale.

    By default the same batches train weights and masks, in one step. What the weights have learnt by heart then looks
    like a network too large for its task. With ``arch_fraction`` that part of the training set, stratified and seeded,
    is held out for the masks, and every step of the weights is followed by one of the masks, on a batch of it, in which
    no weight and no BatchNorm statistic moves.

    Which epoch is kept: with ``targets``, of the search epochs whose network meets all of them, the best on
    ``valid_dataset``, or without one the last; without targets the last one, because validation alone would choose the
    network of before anything was cut. Of the fine-tuning the best on ``valid_dataset``, or the last one. After
    ``train`` the PIT network is that of the kept epoch; ``last.ckpt`` has the last one.

    Args:
        pit: the network, ``PIT(model, ...)``. The optimizer is built from its parameters, not from the model's.
        loss: ``(output, target) -> scalar``.
        metrics: ``(output, target) -> mapping of numbers`` (or one number), averaged over an epoch.
        optimizer: of the weights: one built from ``pit.parameters()``, or a function from a list of parameters to one.
            Its class, groups and settings are taken over; masks in it are left out. ``finetune_optimizer``: instead
            of it in the fine-tuning.
        num_epochs, warmup_epochs, finetune_epochs: of the three phases.
        strength: s_k, per unit of its cost (1e-6 per parameter, 1e-9 per MAC): one number for all costs, or cost ->
            number. ``normalize``: these costs are divided by that of the whole network.
        targets: cost -> largest value of the exported network. InfeasibleTargetError if no masks get there.
        regularizer: ``BaseRegularizer``, ``DUCCIO``, ``GroupLasso``, ..., or a sum of some. Of costs: added to the loss
            of the masks, with the epochs of the search; of weights: in every weight step, with those of the whole run.
        mask_learning_rate: of Adam for the masks. ``arch_optimizer``: a function from a list of parameters to another
            optimizer, without weight decay.
        dataset: training set of (input, target) pairs; ``arch_fraction`` of it for the masks. ``arch_dataset``: the
            same samples in the same order with other transforms, for them.
        valid_dataset: evaluated after each epoch and used to choose one: report the accuracy on other data.
        monitor: ``'loss'``, or one of the metrics; ``monitor_mode``: ``'min'`` or ``'max'`` is better, by default
            ``'min'`` for the loss and ``'max'`` for a metric.
        patience: a phase ends after so many epochs without a better one on ``valid_dataset``. In the search only epochs
            that meet the targets count, so it needs these; the warm-up is never cut short.
        shrink_every: after so many search epochs, and before the fine-tuning, the channels that are switched off leave
            the network, with their weights and what optimizers keep of them, so that steps get cheaper. Outputs are
            compared each time (ExportError); what a kept epoch has stays. What has left cannot come back; kernels keep
            their taps until the export. Architectures speak of the whole network before and after. Not with
            regularizers of weights, whose groups are those of the whole network.
        scheduler, warmup_scheduler, finetune_scheduler: ``(optimizer, total_steps) -> scheduler``, stepped after every
            weight step.
        All others as in ``ProxylessTrainer``. ``best.ckpt`` in ``checkpoint_dir``: the epoch that targets or validation
            chose.

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))  # 4 * 8 + 8 + 8 * 2 + 2 = 58 parameters
    >>> pit = PIT(net, input_shape=(4,))
    >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.arange(64) % 2)
    >>> trainer = PITTrainer(
    ...     pit, loss=nn.CrossEntropyLoss(), metrics=None, dataset=data, num_epochs=4, batch_size=8, workers=0,
    ...     optimizer=torch.optim.SGD(pit.parameters(), lr=0.1), device="cpu",
    ...     targets={"params": 30}, mask_learning_rate=0.05,
    ... )
    >>> history = trainer.train()
    >>> small = trainer.export_model()
    >>> sum(p.numel() for p in small.parameters()) <= 30
    True
    """

    model: PIT

    def __init__(
        self,
        pit: PIT,
        *,
        mask_learning_rate: float = 1e-3,
        arch_optimizer: ArchOptimizer | None = None,
        **others: Unpack[PenalizedArguments],
    ) -> None:
        if not isinstance(pit, PIT):
            raise InputTypeError(
                f"PITTrainer: a {type(pit).__name__} is no PIT network; wrap it, PITTrainer(PIT(model, "
                "input_shape=...), ...), and build the optimizer from the parameters of the result"
            )
        masks = Masks(pit)
        if pit.choices:
            raise UnsupportedModelError(
                f"PITTrainer: the network has the choices {list(pit.choices)} besides its masks; search both with "
                "PITSuperNetTrainer"
            )
        adam: ArchOptimizer = lambda parameters: torch.optim.Adam(parameters, mask_learning_rate)  # noqa: E731
        super().__init__(
            masks,
            arch_optimizer=masks_without_decay(pit, arch_optimizer or adam),
            **known_arguments("PITTrainer", others, PenalizedArguments),
        )
