"""ProxylessNAS (arXiv 1812.00332): path-binarised search, by the gradient of the gates or by REINFORCE."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Subset

from ..cost import Cost, CostModel, CostSpec, cost_range
from ..cost.hardware import Hardware
from ..errors import ConfigurationError, UnsupportedModelError
from ..graph import evaluated
from ..mutables import Argmax, BinaryGates, Decision, arch_parameters, decisions
from ..pit.network import SearchedNetwork
from ..regularizers import Regularizer
from .arguments import SharedArguments, known_arguments
from .base import Trainer
from .batches import even_batches
from .checkpoint_kinds import number, optional, record
from .choices import Choices
from .cost_loss import DEFAULT_REFERENCE, CostLoss
from .costs import CostSources
from .masks import Masks
from .modes import batch_statistics, frozen_statistics, frozen_weights
from .payment import Payment, payment
from .reinforce import (
    DEFAULT_EXPONENT,
    Reward,
    RewardLike,
    check_estimator,
    check_method,
    check_reference,
    moved_baseline,
    policy_gradient,
)
from .searched import Searched
from .targets import Pull

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ProxylessTrainer"]


@final
class ProxylessTrainer(Trainer):
    """Searches the mutables of a network with binary gates and an expected latency, or with REINFORCE.

    Each weight step draws one path from p = softmax(alpha) and trains its weights. Every ``arch_every`` such steps
    an arch step takes a batch of the held-out split and moves alpha only: no weight and no BatchNorm buffer changes.

    ``arch_method='gradient'``: the arch step draws two paths per decision (or the gates of all, ``paths``). Its loss L
    combines the task loss CE with the expected cost E, which is differentiable,
    dE/dalpha_i = p_i (t_i - sum_k p_k t_k):

    * ``'add#linear'``: L = CE + lambda (E - ref) / ref, needs ``grad_reg_loss_params={'lambda': ...}``;
    * ``'mul#log'``: L = CE alpha (ln E / ln ref)^beta, needs ``'alpha'`` and ``'beta'``, and E, ref > 1.

    With several costs there is such a term, or such a factor, for each; lambda and beta may be mappings by cost.

    ``arch_method='reinforce'``: the arch step draws ``rl_batch_size`` = m networks and evaluates them without gradient
    on its batch, in eval mode, BatchNorm with the statistics of the batch. With R = task prod_j (ref_j / C_j)^w_j of
    each, C_j its own cost and not an expected one, alpha moves along

        (1/m) sum_i (R_i - b) grad log p(network i),

    whatever the task and the costs are: neither needs a gradient. The baseline is b <- b + ``baseline_decay``
    (mean R - b), the first mean at the start, and is moved before it is used, as in the authors' code: that all of
    these networks saw an easy batch then changes nothing. Because the mean holds R_i itself, what is expected of the
    estimate is (1 - ``baseline_decay`` / m) times the gradient of E[R] (1 - 1/m times in the first step), a factor
    that Adam does not see.

    Neither method keeps a constraint by itself. ``targets`` are kept: their costs pull as hard as they have to
    (``trainers.budget``), by gradient or, with REINFORCE, as a second reward; and what is evaluated, exported and
    reported are the most probable options within all of them, exactly. Of what held the search back, 95 % of the most
    that any architecture can use is used. Or give ``export`` a ``budget`` afterwards.

    Args:
        model: the network, with LayerChoice, InputChoice, Repeat in it; or ``PIT(model, ...)`` of such a network, whose
            masks then learn in arch steps too, those of the active path, in the memory of two paths. It has its own
            costs, and the optimizer is built from its parameters.
        loss: ``(output, target) -> scalar``. ``arch_loss`` is used in arch steps instead, if given.
        metrics: ``(output, target) -> mapping of numbers`` (or one number), averaged over an epoch.
        optimizer: an optimizer built from ``model.parameters()``, or a function from a list of parameters to one.
            Its class, groups and settings are taken over for the weights; alphas in it are left out.
        num_epochs: search epochs; ``warmup_epochs`` epochs of weights alone come before them.
        dataset: training set of (input, target) pairs. ``arch_fraction`` of it, stratified and seeded, is held out
            for the alphas. ``arch_dataset``: the same samples in the same order with other transforms, for them.
        valid_dataset: evaluated on the argmax path after each epoch; nothing is trained on it.
        batch_size: per process. ``workers``: processes that load data; they change nothing in what is found.
        device, accelerator, devices, num_nodes, strategy: handed to Lightning Fabric. Without ``device`` a GPU is taken
            if there is one; without ``devices`` one, or what ``torchrun`` has started. With several, gradients,
            statistics and metrics are means over all of them; ``'auto'`` is ``'ddp'`` then.
        precision: ``'32-true'``, ``'bf16-mixed'`` or ``'16-mixed'``, which scales the loss and leaves a step out, as
            ``overflows`` in the log, where gradients are too large. Weights, alphas and masks stay in float32.
        compile: True, the name of a backend, or arguments of ``torch.compile``: the steps are compiled, candidate by
            candidate; evaluation is not.
        checkpoint_blocks: names of modules, or patterns as in ``'layers.*'``, that keep no activations: these are
            computed again in the backward pass.
        accumulate: every batch goes through the network in so many parts, in the memory of one; gradients are those of
            the mean over the batch. BatchNorm sees a part.
        grad_clip: largest norm of the gradient of the weights, or ``{'weights': ..., 'arch': ...}``; each parameter
            group of an optimizer for itself.
        ema_decay: of a moving average of the weights, 0.999 say, which is what is evaluated and exported; alphas and
            masks have none.
        log_frequency: steps between two lines of ``log.jsonl``; epochs are always logged.
        arc_learning_rate: of Adam with betas (0, 0.999) and no weight decay for the alphas.
            ``mask_learning_rate``: for masks.
        applied_hardware: what ``'latency_ms'`` is: ``'this-machine'`` or ``'this-machine-onnxruntime'`` (every
            candidate is timed on the CPU, by PyTorch or ONNX Runtime); a latency table as a mapping or
            ``LatencyTable``, or the path of one as YAML or JSON; predictors of nn-Meter, by name
            (``'cortexA76cpu_tflite21'``) or folder. ``'flops'``: MACs instead.
        missing: kernel -> ms, for what nn-Meter's predictors lack; without it such a kernel is an error.
        cost: ``'params'``, ``'macs'``, ``'peak_memory'`` and what else ``counted_cost`` knows, a ``CostSpec``, a
            ``CostModel``, or several: names, or name -> one of these (``'latency_ms'``: what applied_hardware takes).
        dummy_input: shape that costs are counted or timed for, with its batch dimension.
        ref_latency: the reference ref, in ms, or in the unit of the cost; for several costs a mapping by name.
            ``normalize=True``: what each costs in expectation before the search, all options being equally probable.
        arch_every, skip_first_epoch: an arch step after every so many weight steps; none in the first search epoch.
        arch_method: ``'gradient'`` or ``'reinforce'``.
        paths: 2, or 'all'. ``rescale``: keep the probability of what was not drawn (two paths only). Both are for
            ``'gradient'``, as ``grad_reg_loss_params`` are; ``grad_reg_loss_type=None`` keeps costs out of either.
        rl_batch_size, baseline_decay: m, at least 2, and the share of the new mean in the baseline, above 0 to 1.
        targets: cost -> largest value of the exported network, for costs of ``cost`` or ``applied_hardware``.
            InfeasibleTargetError before the first step if no network meets all of them. With targets or a regularizer
            the cost term above, which needs ``grad_reg_loss_params`` or ``ref_latency``, may be left out.
        regularizer: ``BaseRegularizer``, ``DUCCIO``, ``GroupLasso``, ..., or a sum of some. Of costs: added to the loss
            of arch steps, or, with REINFORCE, taken off the reward of each network; its epochs are those of the search.
            Of weights: in every weight step; its epochs are those of the whole run.
        reward: the task's part of R: the name of a metric, the larger the better, ``'loss'`` for exp(-loss), or a
            function of all that is measured, ``{'loss': ..., metrics}``. None: the first metric, or exp(-loss) if
            ``metrics=None``. ``cost_exponent``: w_j, one number or a mapping by cost.
        scheduler, warmup_scheduler: ``(optimizer, total_steps) -> scheduler``, stepped after every weight step.
        seed: of the split, the order of the data, augmentation, dropout and paths. On the CPU, the same seed and the
            same versions give the same architecture file.
        checkpoint_dir: where checkpoints, ``log.jsonl``, TensorBoard files and the measured table go;
            ``checkpoint_every``: steps between checkpoints besides those at the end of an epoch.
        progress: show a progress line; None: on a terminal.

    >>> from oneshot import LayerChoice
    >>> net = nn.Sequential(LayerChoice([nn.Linear(4, 4), nn.Identity()]), nn.Linear(4, 2))
    >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.arange(64) % 2)
    >>> trainer = ProxylessTrainer(
    ...     net, loss=nn.CrossEntropyLoss(), metrics=None, dataset=data, num_epochs=2, batch_size=8, workers=0,
    ...     optimizer=torch.optim.SGD(net.parameters(), lr=0.1), device="cpu",
    ...     cost="params", grad_reg_loss_params={"lambda": 1.0}, ref_latency=20,
    ... )
    >>> history = trainer.train()
    >>> trainer.export(budget={"params": 10})  # Linear(4, 2) has 10, Linear(4, 4) 20 more
    {'0': 1}
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_epochs: int = 120,
        arc_learning_rate: float = 1e-3,
        mask_learning_rate: float = 1e-3,
        grad_reg_loss_type: Literal["mul#log", "add#linear"] | None = "add#linear",
        grad_reg_loss_params: Mapping[str, float | Mapping[str, float]] | None = None,
        applied_hardware: Hardware | None = None,
        dummy_input: Sequence[int] = (1, 3, 224, 224),
        ref_latency: float | Mapping[str, float] = DEFAULT_REFERENCE,
        normalize: bool = False,
        cost: str | Sequence[str] | Cost | CostSpec | Mapping[str, Any] | None = None,
        missing: Mapping[str, float] | None = None,
        targets: Mapping[str, float] | None = None,
        regularizer: Regularizer | None = None,
        arch_loss: Callable[[Any, Any], Tensor] | None = None,
        arch_fraction: float = 0.2,
        arch_every: int = 5,
        skip_first_epoch: bool = True,
        arch_method: Literal["gradient", "reinforce"] = "gradient",
        paths: Literal[2, "all"] = 2,
        rescale: bool = True,
        rl_batch_size: int = 10,
        baseline_decay: float = 0.99,
        reward: RewardLike | None = None,
        cost_exponent: float | Mapping[str, float] = DEFAULT_EXPONENT,
        **others: Unpack[SharedArguments],
    ) -> None:
        if paths not in (2, "all"):
            raise ConfigurationError(f"paths={paths!r}: allowed are 2 and 'all'")
        if not isinstance(arch_every, int) or arch_every < 1:
            raise ConfigurationError(f"arch_every={arch_every!r}: an integer of at least 1 is needed")
        priced = grad_reg_loss_params is not None or normalize or ref_latency != DEFAULT_REFERENCE
        unasked = bool(targets or regularizer) and not priced
        if unasked:
            grad_reg_loss_type = None
        check_method(arch_method, grad_reg_loss_type, grad_reg_loss_params, reward, cost_exponent)
        check_estimator(rl_batch_size, baseline_decay)
        sources = CostSources(cost, applied_hardware, missing)
        searched: Searched
        if isinstance(model, SearchedNetwork):
            _check_network(model, sources.names, arch_method)
            searched = Masks(model)
        else:
            searched = Choices(model, sources, dummy_input, self._measured_once)
        super().__init__(
            searched,
            arch_optimizer=_arch_adam(arc_learning_rate, mask_learning_rate, decisions(model)),
            num_epochs=num_epochs,
            arch_fraction=arch_fraction,
            targets=targets,
            regularizer=regularizer,
            **known_arguments("ProxylessTrainer", others),
        )
        self.arch_loss = self.loss if arch_loss is None else arch_loss
        if self.arch_fraction is None:
            raise ConfigurationError(
                "arch_fraction=None: a part of the data is for the architecture, above 0 and below 1"
            )
        self.arch_every, self.skip_first_epoch = arch_every, skip_first_epoch
        self.gates, self.rescale = BinaryGates(paths), rescale
        if normalize and ref_latency != DEFAULT_REFERENCE:
            raise ConfigurationError(f"normalize=True and ref_latency={ref_latency}: give one of them")
        if ref_latency is None and searched.names:
            raise ConfigurationError("ref_latency=None: a finite number is needed, or normalize=True")
        self.normalize = normalize
        units = {name: searched.unit(name) for name in searched.names}
        references = None if normalize or unasked else ref_latency
        self.reward: Reward | None = None
        if arch_method == "reinforce":
            rewarded = {} if grad_reg_loss_type is None else units
            check_reference(references, rewarded)
            self.reward = Reward(reward, cost_exponent if rewarded else {}, list(rewarded))
            grad_reg_loss_type = None  # the costs are in the reward
        self.cost_loss = CostLoss(grad_reg_loss_type, grad_reg_loss_params, references, units)
        self.rl_batch_size, self.baseline_decay = rl_batch_size, baseline_decay
        self.baseline: float | None = None
        self.arch_parameters = arch_parameters(model)

    # ---- the algorithm -----------------------------------------------------------------------------------------

    def _weight_step(self, batch: Any) -> None:
        with frozen_weights(self.arch_parameters):
            self._update_weights(batch, BinaryGates(1))

    def _search_step(self, batch: Any) -> None:
        self._weight_step(batch)
        if self._arch_step_due():
            step_of = self._arch_step if self.reward is None else self._reinforce_step
            step_of(self._next_arch_batch())

    def _arch_step_due(self) -> bool:
        done = self.search_step + 1 - (self.steps_per_epoch if self.skip_first_epoch else 0)
        return done > 0 and done % self.arch_every == 0

    def _arch_step(self, batch: Any) -> None:
        """One step of alphas and masks; the weights and the BatchNorm statistics stay."""
        self._set(self.gates)
        self.arch_optimizer.zero_grad(set_to_none=True)
        # Without a cost the task alone would switch units off as well, and buy nothing with it.
        pulls = self.cost_loss.pulls or self.targets.pulls or any(part.pulls for part in self._of_costs)
        learning = self.searched.learning(pulls)
        learns = {id(p) for p in learning}
        still = [p for p in self.arch_parameters if id(p) not in learns]
        found: list[tuple[Payment, dict[str, Tensor]]] = []
        with frozen_weights([*self.weights, *still]), frozen_statistics(self.norms):
            task, _ = self._backward(
                batch,
                self.arch_loss,
                before_last=lambda task: found.append(self._payment(task, learning)),
            )
        if not self._ready([self.arch_optimizer], {"task_loss": task}, moves_statistics=False):
            return
        [(paid, noted)] = found
        shares = paid.add_to(learning, lambda: self._add_targets(paid.pull, learning))
        for parameter in self.searched.idle():
            parameter.grad = None
        self._settle()
        self._move_architecture()
        self.searched.clip_()
        if self.rescale:
            self._after_arch_step()
        self._keep_targets(every=self.arch_every)
        self._note({"arch_loss": paid.total, **shares, **noted})

    def _payment(self, task: Tensor, learning: Sequence[nn.Parameter]) -> tuple[Payment, dict[str, Tensor]]:
        """What this step pays, while its masks are in the graph; what to note of that."""
        # Under the distribution that this step's gates have: in two-path mode the pair's own softmax.
        expected = self.searched.step_costs()
        self._finite.add(self.step, _named(expected))
        noted = _named(expected)

        def loss(task: Tensor, costs: Mapping[str, Tensor]) -> Tensor:
            terms = self._terms_of(costs)
            noted.update({name: term.detach() for name, term in terms.items()})
            return torch.stack([self.cost_loss(task, costs), *terms.values()]).sum()

        pull = self.targets.pull(expected, learning, self._progress)
        return payment(self.processes.mean(task), expected, learning, loss, pull), noted

    def _reinforce_step(self, batch: Any) -> None:
        """One step of the alphas by the rewards of sampled networks; the weights and the BatchNorm statistics stay."""
        assert self.reward is not None
        paths, measured = self._sampled_networks(batch)
        costs = [{name: self.searched.cost_model(name).of(path) for name in self.searched.names} for path in paths]
        tasks = torch.tensor([self.reward.task(m) for m in measured], dtype=torch.float64)
        rewards = torch.tensor(
            [self.reward(m, c, self.cost_loss.references) for m, c in zip(measured, costs, strict=True)],
            dtype=torch.float64,
        )
        losses = torch.tensor([m["loss"] for m in measured])
        rewards = rewards - torch.tensor([self._paid(c) for c in costs], dtype=torch.float64)
        self._finite.add(self.step, {"arch_loss": losses.sum(), "reward": rewards.mean()})
        self.baseline = moved_baseline(self.baseline, float(rewards.mean()), self.baseline_decay)
        of_task, of_cost = [], []
        for label, decision in self.decisions.items():
            if not decision.alpha.requires_grad:
                continue
            p = decision.alpha.detach().double().softmax(0)
            chosen = [path[label] for path in paths]
            decision.alpha.grad = policy_gradient(p, chosen, rewards - self.baseline).to(decision.alpha)
            of_task.append(policy_gradient(p, chosen, tasks - tasks.mean()).abs().sum())
            of_cost.append(policy_gradient(p, chosen, rewards - tasks - (rewards - tasks).mean()).abs().sum())
        self._pull_by_rewards(paths, costs)
        self._move_architecture()
        self._keep_targets(every=self.arch_every)
        norms = torch.stack(of_task).sum(), torch.stack(of_cost).sum()
        share = norms[1] / (norms[0] + norms[1]).clamp_min(1e-30)
        means = {f"{name}_sampled": sum(c[name] for c in costs) / len(costs) for name in self.searched.names}
        noted = {"baseline": self.baseline, **means}
        in_full = {name: torch.tensor(value, dtype=torch.float64) for name, value in noted.items()}
        self._note({"reward": rewards.mean(), "cost_share": share, **in_full})

    def _paid(self, costs: Mapping[str, float]) -> float:
        """What regularizers take off the reward of a network with these costs."""
        as_tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in costs.items()}
        return sum(float(term) for term in self._terms_of(as_tensors).values())

    def _pull_by_rewards(self, paths: Sequence[Mapping[str, int]], costs: Sequence[Mapping[str, float]]) -> None:
        """Add the gradient of the reward -sum_k p_k C_k / T_k that targets give, in proportion to that of the task."""
        learning = [d for d in self.decisions.values() if d.alpha.requires_grad]
        prices = self.targets.prices(self._progress)
        if not prices or not learning:
            return
        slopes = self.targets.budget.slopes(prices)
        reward = -torch.tensor([sum(s * c[name] for name, s in slopes.items()) for c in costs], dtype=torch.float64)
        gradients: list[Tensor | None] = []
        for decision in learning:
            chosen = [path[decision.label] for path in paths]
            p = decision.alpha.detach().double().softmax(0)
            gradients.append(policy_gradient(p, chosen, reward - reward.mean()).to(decision.alpha))
        pull = Pull(sum(prices.values()), gradients)
        share = self._add_targets(pull, [decision.alpha for decision in learning])
        if share is not None:
            self._note({"target_share": share})

    def _sampled_networks(self, batch: Any) -> tuple[list[dict[str, int]], list[dict[str, float]]]:
        """The options of each drawn network and what is measured of it on the batch, by all processes together."""
        paths: list[dict[str, int]] = []
        known: dict[tuple[int, ...], dict[str, float]] = {}
        with torch.no_grad(), batch_statistics(self.model):
            for _ in range(self.rl_batch_size):
                self._set(BinaryGates(1))
                path = {label: decision.drawn.active for label, decision in self.decisions.items()}
                paths.append(path)
                if tuple(path.values()) not in known:  # nothing is random in it: the same network, the same numbers
                    known[tuple(path.values())] = self._measured_together(batch)
        return paths, [known[tuple(path.values())] for path in paths]

    def _measured_together(self, batch: Any) -> dict[str, float]:
        loss, output, target = self._forward(batch, self.arch_loss, again=True)
        found = {**self._measured(output, target), "loss": loss}
        numbers = torch.stack([torch.as_tensor(value, device=loss.device).double() for value in found.values()])
        return dict(zip(found, self.processes.mean(numbers).tolist(), strict=True))

    def _cost_references(self) -> Mapping[str, float]:
        return {**self.cost_loss.references, **self.targets.by_cost}

    def _check_run(self) -> None:
        searched = self.num_epochs - (1 if self.skip_first_epoch else 0)
        if searched * self.steps_per_epoch < self.arch_every and self.num_epochs:
            raise ConfigurationError(
                f"no arch step would be made: {self.num_epochs} search epochs of {self.steps_per_epoch} steps"
                f"{', the first one without' if self.skip_first_epoch else ''}, and one every {self.arch_every} steps"
            )
        at_start = self.searched.uniform_costs()
        if self.normalize:
            self.cost_loss.refer_to({name: float(cost) for name, cost in at_start.items()})
        measured = self.costs.measures and self.processes.is_first
        if measured and self.checkpoint_dir is not None and self.latency_table is not None:
            self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
            self.latency_table.write(self.checkpoint_dir / "latency_table.yaml")
        self.cost_loss(torch.tensor(1.0), at_start)
        if self.cost_loss.kind == "mul#log":
            # What the search may come to, not only where it begins: the logarithm of a cost below 1 has no power.
            least = self.searched.reachable(self.searched.names)
            self.cost_loss(torch.tensor(1.0), {k: torch.tensor(least[k][0]) for k in self.searched.names})
        if self.reward is not None:
            self._check_reward(self.reward)

    def _check_reward(self, reward: Reward) -> None:
        for name, exponent in reward.exponents.items():
            cost = self.searched.cost_model(name)
            if exponent and isinstance(cost, CostModel) and not cost_range(cost)[0] > 0:
                raise ConfigurationError(
                    f"cost {name!r}: the smallest network costs {cost_range(cost)[0]:g} {cost.unit}, and "
                    "(ref / cost)^w needs it above 0; price what every network has as well, or set its "
                    "cost_exponent to 0"
                )
        assert self.dataset is not None
        inputs, target = next(iter(even_batches(Subset(self.dataset, [0, 1]), 2)))
        device = next(self.model.parameters()).device
        with evaluated(self.model, Argmax()):
            output = self.model(inputs.to(device))
            loss = self.arch_loss(output, target.to(device))
            found = {**self._measured(output, target.to(device)), "loss": loss}
        reward.task({name: float(value) for name, value in found.items()})

    def _own_settings(self) -> dict[str, Any]:
        if self.reward is None:
            return {"arch_method": "gradient"}
        return {
            "arch_method": "reinforce",
            "rl_batch_size": self.rl_batch_size,
            "baseline_decay": self.baseline_decay,
            "reward": self.reward.name,
            "cost_exponent": self.reward.exponents,
        }

    def _own_state(self) -> dict[str, Any]:
        return {"baseline": self.baseline}

    def _check_own_state(self, state: Mapping[str, Any], model: nn.Module, where: str) -> None:
        record(baseline=optional(number))(state, where)

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        self.baseline = state["baseline"]


def _arch_adam(
    lr: float, of_masks: float, choices: Mapping[str, Decision]
) -> Callable[[list[nn.Parameter]], Optimizer]:
    # The first beta is 0, as in the paper's code: with momentum a pair would drift on in steps it is not drawn in.
    def adam(parameters: list[nn.Parameter]) -> Optimizer:
        ids = {id(d.alpha) for d in choices.values() if d.members[0].decided is None}
        alphas = [p for p in parameters if id(p) in ids]
        masks = [p for p in parameters if id(p) not in ids]
        groups = [{"params": alphas, "lr": lr}, *([{"params": masks, "lr": of_masks}] if masks else [])]
        return torch.optim.Adam(groups, betas=(0.0, 0.999), weight_decay=0.0)

    return adam


def _check_network(network: SearchedNetwork, costs: Sequence[str], method: str) -> None:
    if not network.choices:
        raise UnsupportedModelError("ProxylessTrainer: the network has no choices; search its masks with PITTrainer")
    if costs:
        raise ConfigurationError(f"costs {costs}: the network has its own; PIT(model, ..., cost=...) sets them")
    if method == "reinforce":
        raise ConfigurationError(
            f"arch_method='reinforce': a {type(network).__name__} has masks, which only a gradient trains; hand over "
            "the network with its choices, or search with arch_method='gradient'"
        )


def _named(costs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}_expected": cost.detach() for name, cost in costs.items()}
