"""PIT: any network, with masks over its channels, kernels and dilations (arXiv 2203.14768)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from torch import nn

from .arguments import CostArgument, cost_argument
from .conversion import Excluded, Granularity, Plan
from .network import SearchedNetwork

__all__ = ["PIT"]


@final
class PIT(SearchedNetwork):
    """A copy of ``model`` whose channels, kernels and dilations are under masks; called as the model itself is.

    Every searched weight is multiplied by 0 or 1 along the dimensions that a product sums over: a convolution that
    reads channels x_c, of which the masks m_c say which are kept, computes sum_c W_oc m_c x_c. A zero there is the same
    as an absent column, whatever lies between the layer that makes a channel and the one that reads it (BatchNorm,
    sigmoid, padding with ones), so the exported network computes what this one does. Kernels lose their
    oldest taps (in space: their outermost ring) and every second, fourth, ... tap; see ``KernelMask`` and
    ``DilationMask``.

    What is cut together is found by following the operators that run, and confirmed by a trial cut; ``report()`` says
    for every dimension whether it is searched, with which others, or why not.

    ``model`` may hold LayerChoice, InputChoice and Repeat: their alphas are searched with the masks, and costs are
    expected over them. What several candidates return has one mask, what lies inside a candidate masks of its own; how
    wide outputs of candidates may differ is said in ``SuperNet``. A candidate that does not run is not touched.

    Training takes three lines of a loop of one's own: ``loss = task(pit(x), y) + strength * pit.get_cost("params")``,
    ``loss.backward()``, ``optimizer.step()``. Give the masks an optimizer group of their own without weight decay,
    ``pit.nas_parameters()``. At its next forward in train mode the network clips them to [0, 1].

    Args:
        model: the network, which is copied and stays as it is, with its train and eval flags.
        input_shape: of one sample, without the batch; a tuple of such tuples for several inputs. Or
            ``example_input``: a tensor, or a tuple of all positional arguments.
        cost: a name (``'params'``, ``'macs'``, ``'ops'``, ``'params_no_norm'``, ``'params_no_bias'``,
            ``'weight_bytes'``), a ``CostSpec``, several of these, or name -> one of them.
        regularizer: ``'size'`` (weights without biases) or ``'macs'``, for ``get_regularization_loss()``.
        train_features, train_rf, train_dilation: whether masks of channels, kernel sizes and dilations learn.
        exclude: layers whose outputs stay as they are, with all that is coupled to them: paths, patterns, types.
        granularity: channel counts are a multiple of this; or pattern of layers -> multiple. Of a layer whose channels
            fall into several masks (concatenated, or of candidates of different widths), each of them for itself.
        discrete_cost: the gradient of a cost is taken at the network that would be exported, instead of at the relaxed
            sizes. The value is that of the former in both cases. With relaxed sizes, a channel whose alpha has sunk to
            0.6 makes its neighbours cheaper already; with discrete ones, only once it is gone.
        ignore: as in ``oneshot.count``: modules whose own parameters cost no operation.
        autoconvert_layers: search every layer; False: only the masks and choices that the network was written with.

    Raises ConfigurationError without a shape, or for a cost or an entry of ``exclude`` that does not exist;
    UnsupportedModelError for a model that does not run on the input, or in which nothing can be searched.

    >>> net = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(80, 2))
    >>> pit = PIT(net, (3, 10), cost="params")
    >>> list(pit.masks), pit.cost.item()  # 8 * 9 + 8, 2 * 80 + 2
    (['0', '0.kernel_size', '0.dilation'], 242.0)
    >>> pit.masks["0"].keep([1, 5])
    >>> pit.masks["0.kernel_size"].decide(2)
    >>> pit.cost.item(), sum(p.numel() for p in pit.export().parameters())  # 2 * 6 + 2, 2 * 20 + 2
    (56.0, 56)
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[Any, ...] | None = None,
        *,
        example_input: Any = None,
        cost: CostArgument | None = None,
        regularizer: str | None = None,
        train_features: bool = True,
        train_rf: bool = True,
        train_dilation: bool = True,
        exclude: Excluded = (),
        granularity: Granularity = 1,
        discrete_cost: bool = False,
        ignore: Sequence[str | type[nn.Module]] = (),
        autoconvert_layers: bool = True,
    ) -> None:
        plan = Plan(exclude, granularity, autoconvert_layers)
        cost = cost_argument("PIT", cost, regularizer)
        self._build(model, input_shape, example_input, plan, cost, ignore)
        self.discrete_cost = discrete_cost
        self.train_features, self.train_rf, self.train_dilation = train_features, train_rf, train_dilation
