"""SuperNet search: candidates weighed by a softmax of their alphas, which are trained with the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import nn
from torch.optim import Optimizer

from ..cost import Cost, CostSpec
from ..cost.hardware import Hardware
from ..errors import ConfigurationError
from ..mutables.temperature import Temperature
from ..pit import SuperNet
from .arguments import known_arguments
from .choices import Choices
from .cost_loss import CostLoss
from .costs import CostSources
from .decidedness import Decidedness
from .masks import Masks
from .penalized import PenalizedArguments, PenalizedTrainer
from .sampling import Sampling, as_temperature
from .searched import Searched

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SuperNetTrainer"]


@final
class SuperNetTrainer(PenalizedTrainer):
    """Searches the mutables of a network by gradient: warm-up, search, fine-tuning.

    * Warm-up: the weights alone, of all candidates mixed by the alphas as they are: y = sum_k softmax(alpha / T)_k o_k.
    * Search: weights and alphas, with the gates of ``sampling`` and ``hard``. The loss of the alphas is
      L = CE + sum_k s_k E_k, where E_k is the expected cost under the probabilities of the step, in its unit.
      Targets need no strength: see below.
    * Fine-tuning: the weights of the argmax path alone, from the epoch that is kept and with a fresh optimizer. No
      other candidate is touched.

    =============  ==========================================  =======================================================
    gates          ``hard=False``                              ``hard=True``
    =============  ==========================================  =======================================================
    ``'softmax'``  all candidates, by softmax(alpha / T)       the argmax one, alphas straight through the softmax
    ``'gumbel'``   all, by softmax((alpha + g) / T) (FBNet)    the argmax of alpha + g (GDAS), likewise
    =============  ==========================================  =======================================================

    g is drawn once per step. With ``hard`` the other candidates are evaluated for the gradients of the alphas only, in
    the memory of one path: their weights and BatchNorm statistics stay. Without any cost, accuracy alone decides.

    By default the same batches train weights and alphas, in one step, one forward and one backward. With
    ``arch_fraction`` that part of the training set, stratified and seeded, is held out for the alphas, and every step
    of the weights is followed by one of the alphas, in which no weight and no BatchNorm statistic moves.

    A softmax that is still undecided at the end promises a mixture, and one candidate is exported. What helps is a
    falling ``temperature``, hard gates, ``icv_strength``, which adds s sum_decisions mean(p)^2 / (var(p) + 1e-3), or
    ``entropy_strength``, which adds s times the mean entropy, both with p = softmax(alpha). ``entropy`` in ``history``
    tells how far it is.

    ``targets`` are met by what is exported. Their costs pull with prices that dual ascent finds (``trainers.budget``),
    judged on the argmax network. What is evaluated after an epoch, kept, fine-tuned and exported are the most probable
    options within all targets, exactly; and, of what held the search back, 95 % of the most that any can use is used.

    Which epoch is kept, ``patience``, the files and all arguments that are not named here: as in ``PITTrainer``.
    ``evaluate`` uses the statistics of each batch.

    Args:
        model: the network, with LayerChoice, InputChoice, Repeat in it; or a ``SuperNet``, which has its own costs, and
            whose candidates may differ in their widths: build the optimizer from its parameters.
        cost, applied_hardware, missing, dummy_input: as in ``ProxylessTrainer``.
        strength: s_k, per unit of its cost: one number for all costs, or cost -> number. ``normalize``: these costs are
            divided by that of the largest network.
        targets: cost -> largest value of the exported network. InfeasibleTargetError if no network meets all of them.
        grad_reg_loss_type, grad_reg_loss_params, ref_latency: besides that, or instead, a loss of ProxylessNAS's form,
            as in ``ProxylessTrainer``: ``'mul#log'``, ``'add#linear'`` or None. It is the loss of the alphas; the
            weights learn from CE.
        sampling, hard: see above. ``temperature``: T, or a ``Temperature`` that changes from the first search epoch to
            the last one.
        shrink_every: after so many search epochs, candidates of a LayerChoice leave it whose probability is below
            0.01 / n, of n at first; otherwise as in ``PITTrainer``.
        train_selection: False: the alphas stay as they are, and only the weights are trained.
        arch_learning_rate: of Adam for the alphas, without weight decay. ``arch_optimizer``: a function from a list of
            parameters to another optimizer.

    Sources: DARTS, arXiv 1806.09055 (mixture); PLiNIO, arXiv 2307.09488 (SuperNet, icv); presets ``fbnet``, ``gdas``.

    >>> from oneshot import LayerChoice
    >>> net = nn.Sequential(LayerChoice([nn.Linear(4, 4), nn.Identity()]), nn.Linear(4, 2))
    >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.arange(64) % 2)
    >>> trainer = SuperNetTrainer(
    ...     net, loss=nn.CrossEntropyLoss(), metrics=None, dataset=data, num_epochs=2, batch_size=8, workers=0,
    ...     optimizer=torch.optim.SGD(net.parameters(), lr=0.1), device="cpu", dummy_input=(1, 4),
    ...     cost="params", targets={"params": 10}, arch_learning_rate=0.1,
    ... )
    >>> history = trainer.train()
    >>> trainer.export()  # Linear(4, 2) has 10 parameters, Linear(4, 4) 20 more
    {'0': 1}
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        cost: str | Sequence[str] | Cost | CostSpec | Mapping[str, Any] | None = None,
        applied_hardware: Hardware | None = None,
        missing: Mapping[str, float] | None = None,
        dummy_input: Sequence[int] = (1, 3, 224, 224),
        grad_reg_loss_type: Literal["mul#log", "add#linear"] | None = None,
        grad_reg_loss_params: Mapping[str, float | Mapping[str, float]] | None = None,
        ref_latency: float | Mapping[str, float] | None = None,
        sampling: Literal["softmax", "gumbel"] = "softmax",
        hard: bool = False,
        temperature: float | Temperature = 1.0,
        icv_strength: float = 0.0,
        entropy_strength: float = 0.0,
        train_selection: bool = True,
        arch_learning_rate: float = 1e-3,
        arch_optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        **others: Unpack[PenalizedArguments],
    ) -> None:
        costs = CostSources(cost, applied_hardware, missing)
        searched: Searched
        if isinstance(model, SuperNet):
            if costs.names:
                raise ConfigurationError(
                    f"costs {costs.names}: a SuperNet has its own, give them to SuperNet(cost=...)"
                )
            searched = Masks(model, train_selection=train_selection)
        else:
            searched = Choices(model, costs, dummy_input, self._measured_once, train_selection=train_selection)
        if others.get("strength") and not searched.names:
            raise ConfigurationError(
                f"strength={others['strength']!r}: there is no cost; give cost= or applied_hardware="
            )
        super().__init__(
            searched,
            arch_optimizer=arch_optimizer or (lambda alphas: torch.optim.Adam(alphas, arch_learning_rate)),
            sampling=Sampling(sampling, hard, as_temperature(temperature)),
            decidedness=Decidedness(icv_strength, entropy_strength),
            cost_loss=_cost_loss(grad_reg_loss_type, grad_reg_loss_params, ref_latency, searched),
            **known_arguments("SuperNetTrainer", others, PenalizedArguments),
        )


def _cost_loss(
    kind: str | None,
    params: Mapping[str, float | Mapping[str, float]] | None,
    reference: float | Mapping[str, float] | None,
    searched: Searched,
) -> CostLoss | None:
    if kind is None:
        if params is not None or reference is not None:
            raise ConfigurationError(
                f"grad_reg_loss_params={params}, ref_latency={reference}: they need a grad_reg_loss_type"
            )
        return None
    if not searched.names:
        raise ConfigurationError(f"grad_reg_loss_type={kind!r}: there is no cost; give cost= or applied_hardware=")
    if reference is None:
        raise ConfigurationError(f"grad_reg_loss_type={kind!r}: it needs ref_latency, in the unit of the cost")
    return CostLoss(kind, params, reference, {name: searched.unit(name) for name in searched.names})
