"""ProxylessTrainer on networks whose candidates have masks: path sampling and masks in one run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import digit_data
from torch import Tensor, nn
from torch.nn import functional as F

from oneshot import PIT, BinaryGates, LayerChoice, ProxylessTrainer, accuracy, draw, set_sampler
from oneshot.errors import ConfigurationError, UnsupportedModelError


def block(kernel: int, width: int = 6) -> nn.Sequential:
    conv = nn.Conv2d(6, width, kernel, padding=kernel // 2)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 6, 1))


class Net(nn.Module):
    def __init__(self, n_candidates: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.one = LayerChoice([block(1 + 2 * (k % 3), 8) for k in range(n_candidates)], label="one")
        self.two = LayerChoice({"wide": block(3, 10), "skip": nn.Identity()}, label="two")
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(torch.relu(self.stem(x)))).mean((2, 3)))


def network(seed: int = 0) -> PIT:
    torch.manual_seed(seed)
    return PIT(Net(), (1, 8, 8), cost=["params", "macs"])


def trainer(pit: PIT, **changes: Any) -> ProxylessTrainer:
    settings: dict[str, Any] = {
        "loss": nn.CrossEntropyLoss(),
        "metrics": accuracy,
        "optimizer": torch.optim.SGD(pit.parameters(), lr=0.05, momentum=0.9),
        "num_epochs": 2,
        "warmup_epochs": 1,
        "dataset": digit_data(),
        "batch_size": 32,
        "workers": 0,
        "device": "cpu",
        "arch_every": 2,
        "skip_first_epoch": False,
        "arc_learning_rate": 0.05,
        "mask_learning_rate": 0.1,
        "ref_latency": {"params": 300, "macs": 20_000},
        "grad_reg_loss_params": {"lambda": 0.5},
        "progress": False,
    }
    return ProxylessTrainer(pit, **{**settings, **changes})


def test_masks_and_alphas_move_in_arch_steps_and_weights_do_not() -> None:
    pit = network()
    run = trainer(pit)
    seen: list[tuple[str, set[str]]] = []
    for name in ("_weight_step", "_arch_step"):
        done = getattr(run, name)

        def watched(batch: Any, done: Any = done, name: str = name) -> None:
            before = {k: v.clone() for k, v in pit.state_dict().items()}
            done(batch)
            seen.append((name, {k for k, v in pit.state_dict().items() if not torch.equal(v, before[k])}))

        setattr(run, name, watched)
    run.train()
    nas = {name for name, _ in pit.named_nas_parameters()}
    assert [name for name, _ in seen].count("_arch_step") == 6
    for name, moved in seen:
        assert moved
        assert (moved <= nas) if name == "_arch_step" else not (moved & nas)
    of_masks = set().union(*(moved for name, moved in seen if name == "_arch_step")) - {"network.one.alpha"}
    assert any(name.startswith("masks.") for name in of_masks)
    alphas = torch.cat([mask.alpha.detach() for _, mask in pit.masks.items()])
    assert 0 <= alphas.min() < alphas.max() <= 1


def test_an_arch_step_moves_the_masks_of_the_active_path_only() -> None:
    pit = network()
    run = trainer(pit, num_epochs=1, warmup_epochs=0, arch_every=1)
    done, checked = run._arch_step, []

    def watched(batch: Any) -> None:
        before = {label: mask.alpha.detach().clone() for label, mask in pit.masks.items()}
        done(batch)
        active = {label: d.drawn.active for label, d in run.decisions.items()}
        for label, mask in pit.masks.items():
            if label.startswith("one.candidates") and not label.endswith(".3"):  # .3: what all of them return
                ran = int(label.split(".")[2]) == active["one"]
                assert ran or torch.equal(before[label], mask.alpha), label
                checked.append(ran)

    run._arch_step = watched  # type: ignore[method-assign]
    run.train()
    assert set(checked) == {True, False}


def test_costs_of_an_arch_step_are_expected_over_the_pair_at_the_sizes_that_masks_leave() -> None:
    """Candidates of 6 n k^2 + n + 2 n + 6 n + 6 weights; n = 8 inner channels, of which 3 stay in the first one."""
    pit = network()
    pit.masks["one.candidates.0.0"].keep([0, 2, 5])
    pit.masks["two.candidates.wide.0"].keep([1])
    set_sampler(pit.choices, BinaryGates(2))
    draw(pit.choices, torch.Generator().manual_seed(1))
    with torch.no_grad():
        pit.choices["one"].alpha.copy_(torch.tensor([0.5, -0.3, 0.1]))

    def of_block(kernel: int, width: int) -> int:
        return 6 * width * kernel**2 + width + 2 * width + width * 6 + 6

    costs = [of_block(1, 3), of_block(3, 8), of_block(5, 8)]
    pair = pit.choices["one"].drawn.involved
    q = pit.choices["one"].alpha[list(pair)].softmax(0).tolist()
    outside = 9 * 6 + 6 + 6 * 10 + 10
    two = of_block(3, 1) / 2
    expected = outside + two + sum(share * costs[k] for share, k in zip(q, pair, strict=True))
    assert pit.get_cost("params").item() == pytest.approx(expected, rel=1e-6)


def test_two_paths_need_the_memory_of_one_however_many_candidates() -> None:
    """Bytes that autograd keeps for an arch step, with 3 and with 9 candidates: the same activations."""

    def saved(n_candidates: int) -> int:
        torch.manual_seed(0)
        pit = PIT(Net(n_candidates), (1, 8, 8))
        set_sampler(pit.choices, BinaryGates(2))
        draw(pit.choices, torch.Generator().manual_seed(0))
        for label, active in (("one", 0), ("two", "wide")):
            decision = pit.choices[label]
            index = decision.options.index(active)
            for member in decision.members:
                member.drawn = member.drawn._replace(active=index, involved=tuple(sorted({index, 1 - index})))
        for parameter in pit.net_parameters():
            parameter.requires_grad_(False)
        storages: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in pit.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.dim() == 4 and tensor.shape[0] == 16:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = F.cross_entropy(pit(torch.rand(16, 1, 8, 8)), torch.zeros(16, dtype=torch.int64))
        del loss
        assert weights
        return sum(storages.values())

    assert saved(9) == saved(3) > 0


def test_export_report_and_resume(tmp_path: Path) -> None:
    whole = network()
    run = trainer(whole)
    history = run.train()
    arch = run.export(tmp_path / "arch.json")
    assert set(arch) == {"one", "two", *whole.masks}
    assert sum(p.numel() for p in run.export_model().parameters()) == whole.hard_cost("params")
    assert run.report(best=False).rows[0].predicted == whole.hard_cost("params")
    assert {"params_soft", "params_hard", "entropy", "live"} <= set(history[-1])

    first = trainer(network(), checkpoint_dir=tmp_path / "a", checkpoint_every=1)
    done = first._maybe_checkpoint

    def stop(*, at_epoch_end: bool) -> None:
        done(at_epoch_end=at_epoch_end)
        if first.step == 9:
            raise KeyboardInterrupt

    first._maybe_checkpoint = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.train()
    pit = network(seed=7)
    second = trainer(pit)
    second.resume(tmp_path / "a")
    assert second.train() == history
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in pit.state_dict().items())


def test_what_is_refused() -> None:
    pit = network()
    with pytest.raises(ConfigurationError, match="the network has its own"):
        trainer(pit, cost="macs", ref_latency=10_000)
    with pytest.raises(ConfigurationError, match="which only a gradient trains"):
        trainer(pit, arch_method="reinforce", grad_reg_loss_params=None)
    plain = PIT(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), (4,))
    with pytest.raises(UnsupportedModelError, match="no choices"):
        trainer(plain, ref_latency=10)


def test_a_copy_of_the_user_is_not_needed() -> None:
    pit = network()
    before = copy.deepcopy(pit.arch())
    trainer(pit, num_epochs=0, warmup_epochs=1).train()
    assert pit.arch() == before
