"""Parts of a batch, clipping per group, float16, moving averages, recomputed blocks: the steps of every trainer."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes_run
import pytest
import torch
from processes_run import SEARCHES, Simple
from tiny import darts, equal_states, gumbel, proxyless, reinforce, spos, supernet, tiny
from torch import Tensor, nn

from oneshot import PIT, PITTrainer, Trainer, arch_parameters, weight_parameters
from oneshot.errors import ConfigurationError, TrainingDivergedError
from oneshot.trainers.clipping import GradientClip
from oneshot.trainers.finiteness import Finiteness
from oneshot.trainers.loss_scale import LossScale
from oneshot.trainers.moving import parts_of_batch
from oneshot.trainers.setup import to_device_of_weights

TRAINERS = {"proxyless": proxyless, "supernet": supernet, "gumbel": gumbel, "darts": darts, "spos": spos}


@pytest.fixture(params=TRAINERS)
def build(request: pytest.FixtureRequest) -> Callable[..., Trainer]:
    return TRAINERS[request.param]


# ---- parts of a batch ------------------------------------------------------------------------------------------------


def test_parts_are_the_batch_with_the_shares_of_their_samples() -> None:
    batch = {"a": torch.arange(7), "b": [torch.zeros(7, 2), "text"], "c": list("abcdefg")}
    parts = parts_of_batch(batch, 3)
    assert [share for share, _ in parts] == [3 / 7, 2 / 7, 2 / 7]
    assert torch.cat([part["a"] for _, part in parts]).tolist() == list(range(7))
    assert all(part["b"][1] == "text" and len(part["b"][0]) == len(part["a"]) for _, part in parts)
    assert [part["c"] for _, part in parts] == [["a", "b", "c"], ["d", "e"], ["f", "g"]]
    assert len(parts_of_batch((torch.zeros(2), torch.zeros(2)), 5)) == 2


@pytest.mark.parametrize("name", [name for name in SEARCHES if name != "darts, second order"])
def test_a_batch_in_three_parts_is_the_batch(name: str) -> None:
    """Parts of 22, 21 and 21 samples of a network without BatchNorm: gradients, loss and metrics are the same means."""
    changes = {"dataset": processes_run.digit_data(400)}
    whole = processes_run.search(name, 64, **changes)
    parts = processes_run.search(name, 64, **changes, accumulate=3)
    torch.testing.assert_close(parts["weights"], whole["weights"], rtol=0, atol=1e-5)
    assert parts["arch"] == whole["arch"]
    for key, value in whole["history"][0].items():
        assert parts["history"][0][key] == (
            pytest.approx(value, rel=1e-4, abs=1e-4) if isinstance(value, float) else value
        ), key


def test_the_memory_of_a_step_is_that_of_a_part() -> None:
    """Elements saved for the backward pass, when the last loss has been made: of 32 samples, or of 8."""
    most = {}
    for accumulate in (1, 4):
        trainer = supernet(Simple(), accumulate=accumulate, warmup_epochs=0, num_epochs=1)
        held = [0, 0]

        def pack(tensor: Tensor, held: list[int] = held) -> Tensor:
            held[0] += tensor.numel()
            held[1] = max(held)
            return tensor

        step_of = trainer._forward

        def forward(*args: Any, held: list[int] = held, step_of: Any = step_of, **others: Any) -> Any:
            held[0] = 0
            return step_of(*args, **others)

        trainer._forward = forward  # type: ignore[method-assign]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trainer.train()
        most[accumulate] = held[1]
    assert most[4] < 0.4 * most[1]


def test_an_unrolled_step_is_one_of_a_whole_batch() -> None:
    with pytest.raises(ConfigurationError, match=r"accumulate=2.*whole batch"):
        darts(tiny(), order=2, accumulate=2)


# ---- clipping --------------------------------------------------------------------------------------------------------


def test_each_group_is_clipped_by_its_own_norm() -> None:
    """Gradients of norm 5 (3, 4), 2 and 13 (5, 12): limits 1 for the weights' two groups, 6.5 for the architecture."""
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(3))]
    alphas = [nn.Parameter(torch.zeros(2))]
    of_weights = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:]}], lr=1.0)
    of_alphas = torch.optim.SGD(alphas, lr=1.0)
    weights[0].grad, weights[1].grad, alphas[0].grad = map(torch.tensor, ([3.0, 4.0], [2.0], [5.0, 12.0]))
    clip = GradientClip({"weights": 1.0, "arch": 6.5})
    clip(of_weights, "weights")
    clip(of_alphas, "arch")
    torch.testing.assert_close(weights[0].grad, torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(weights[1].grad, torch.tensor([1.0]))
    torch.testing.assert_close(alphas[0].grad, torch.tensor([2.5, 6.0]))
    assert weights[2].grad is None
    weights[0].grad = torch.tensor([3.0, 4.0])
    GradientClip(None)(of_weights, "weights")
    assert weights[0].grad.tolist() == [3.0, 4.0]


def test_a_step_moves_no_further_than_the_clipped_gradient(build: Callable[..., Trainer]) -> None:
    """SGD without momentum and decay: the whole of the weights moves by at most lr * limit, and so do the alphas."""
    model = tiny()
    settings: dict[str, Any] = {
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.5),
        "grad_clip": {"weights": 0.01, "arch": 0.02},
        "warmup_epochs": 0,
        "num_epochs": 1,
    }
    trainer = build(model, **settings)
    places: list[list[Tensor]] = []
    forward = trainer.loss

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            places.append([torch.cat([p.detach().flatten() for p in weight_parameters(model)])])
        return forward(output, target)

    trainer.loss = loss
    if hasattr(trainer, "arch_loss"):
        trainer.arch_loss = loss
    trainer.train()
    steps = [float((b - a).norm()) for (a,), (b,) in itertools.pairwise(places)]
    assert 0 < max(steps) <= 0.5 * 0.01 * 1.001


# ---- float16 ---------------------------------------------------------------------------------------------------------


def test_float16_scales_the_loss_and_keeps_float32(build: Callable[..., Trainer]) -> None:
    model = tiny()
    trainer = build(model, precision="16-mixed")
    seen: set[torch.dtype] = set()
    model.one.register_forward_hook(lambda m, a, output: seen.add(output.dtype))
    history = trainer.train()
    assert torch.float16 in seen
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(p.detach().any() for p in arch_parameters(model))
    assert history[-1]["loss"] < 3
    state = trainer.scale.state_dict()
    assert state is not None
    assert state["scale"] >= 1.0


def test_scaled_gradients_are_the_gradients() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scale = LossScale(torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert scale.scaler is not None
    scale.scaler.scale((weight * torch.tensor([3.0, 5.0])).sum()).backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [3 * 1024, 5 * 1024]
    assert scale.unscale_([optimizer])
    assert weight.grad.tolist() == [3.0, 5.0]


def test_an_overflow_leaves_the_step_out_and_halves_the_scale() -> None:
    """Of two optimizers of one step, both stand still if the gradients of one of them overflow."""
    one, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizers = [torch.optim.SGD([one], lr=1.0), torch.optim.SGD([other], lr=1.0)]
    scale = LossScale(torch.amp.GradScaler("cpu", init_scale=8.0))
    assert scale.scaler is not None
    one.grad, other.grad = torch.tensor([float("inf")]), torch.tensor([8.0])
    scale.scaler.scale(torch.ones(1))
    assert not scale.unscale_(optimizers)
    assert one.grad is None
    assert other.grad is None
    assert scale.scaler.get_scale() == 4.0


def test_steps_that_overflow_are_counted_and_a_run_goes_on(tmp_path: Path) -> None:
    """A loss of 2 * 65,536 is no number of float16: the first steps are left out until the scale has come down."""
    model = tiny()
    trainer = supernet(model, precision="16-mixed", checkpoint_dir=tmp_path)
    assert trainer.scale.scaler is not None
    trainer.scale.scaler._init_scale = 2.0**40
    history = trainer.train()
    assert history[0]["overflows"] == 1.0  # the share of the steps
    assert 0 < history[-1]["overflows"] < 1
    again = supernet(tiny(), precision="16-mixed")
    again.resume(tmp_path)
    assert again.scale.state_dict() == trainer.scale.state_dict()


# ---- moving averages -------------------------------------------------------------------------------------------------


def test_the_average_is_what_is_evaluated_and_exported(build: Callable[..., Trainer]) -> None:
    """Against an average computed beside the run, d_t = min(0.9, (1 + t) / (10 + t)); alphas are left as they are."""
    model = tiny()
    trainer = build(model, ema_decay=0.9)
    averages = {name: p.detach().double() for name, p in model.named_parameters()}
    count = 0
    optimizer_step = trainer.optimizer.step

    def step(*args: Any) -> Any:
        nonlocal count
        found = optimizer_step(*args)
        count += 1
        decay = min(0.9, (1 + count) / (10 + count))
        for name, p in model.named_parameters():
            averages[name] = decay * averages[name] + (1 - decay) * p.detach().double()
        return found

    trainer.optimizer.step = step  # type: ignore[method-assign]
    trainer.train()
    assert count == 18
    raw = copy.deepcopy(model.state_dict())
    with trainer._averaged():
        found = {name: p.detach().clone() for name, p in model.named_parameters()}
    alphas = {id(p) for p in arch_parameters(model)}
    for name, p in model.named_parameters():
        if id(p) in alphas:
            assert torch.equal(found[name], p)
        else:
            torch.testing.assert_close(found[name].double(), averages[name], rtol=1e-4, atol=1e-6)
    exported = trainer.export_model()
    assert equal_states(model.state_dict(), raw)
    stem = dict(exported.named_parameters())["stem.weight"]
    torch.testing.assert_close(stem, found["stem.weight"])


def test_the_average_survives_a_resume(build: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = build(tiny(), ema_decay=0.9, checkpoint_dir=tmp_path, checkpoint_every=4)
    history = trainer.train()
    again = build(tiny(seed=5), ema_decay=0.9)
    again.resume(tmp_path / "previous.ckpt")
    assert again.train() == history
    assert trainer.average is not None
    assert again.average is not None
    one, other = trainer.average.state_dict(), again.average.state_dict()
    assert one["updates"] == other["updates"]
    assert equal_states(one["averages"], other["averages"])


def test_an_interrupted_epoch_is_averaged_as_a_whole(tmp_path: Path) -> None:
    """Resumed and saved again before it goes on, in the middle of an epoch."""
    trainer = supernet(tiny(), checkpoint_dir=tmp_path, checkpoint_every=4)
    history = trainer.train()
    once = supernet(tiny())
    once.resume(tmp_path / "previous.ckpt")
    once.save(tmp_path / "again.ckpt")
    twice = supernet(tiny())
    twice.resume(tmp_path / "again.ckpt")
    assert twice.train() == history


def test_an_average_begins_with_the_weights_of_the_first_step() -> None:
    model = tiny()
    trainer = supernet(model, ema_decay=0.9, num_epochs=0, warmup_epochs=1)
    torch.nn.init.constant_(model.head.weight, 7.0)  # loaded after the trainer was made
    trainer.optimizer.param_groups[0]["lr"] = 0.0
    trainer._first_lrs[id(trainer.optimizer)] = [0.0]
    trainer.train()
    with trainer._averaged():
        assert torch.allclose(model.head.weight, torch.tensor(7.0))


# ---- recomputed blocks -----------------------------------------------------------------------------------------------


def test_recomputed_blocks_change_no_bit(build: Callable[..., Trainer]) -> None:
    """A whole choice, a candidate of another one, and repeated blocks."""
    model, other = tiny(), tiny()
    blocks = ["one", "two.candidates.1", "deep"]
    assert build(model, checkpoint_blocks=blocks).train() == build(other).train()
    assert equal_states(model.state_dict(), other.state_dict())


# ---- compiled steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [proxyless, supernet])
def test_compiled_steps_are_the_steps(build: Callable[..., Trainer]) -> None:
    """Each piece at most 4 times, though 18 weight steps draw many of the 4 * 3 * 2 paths; evaluation is not."""
    model, other = tiny(), tiny()
    trainer = build(model, compile="aot_eager")
    history = trainer.train()
    expected = build(other).train()
    assert 0 < trainer.compilations.most <= 4
    assert list(trainer.compilations.by_piece)[:2] == ["one.candidates.k1", "one.candidates.k3"]
    for record, plain in zip(history, expected, strict=True):
        assert record["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    for value, plain in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, plain, rtol=1e-3, atol=1e-4)


def test_masks_are_compiled_once_per_phase() -> None:
    network = PIT(processes_run.plain(), (1, 8, 8))
    settings = processes_run.of_masks(network, warmup_epochs=1, finetune_epochs=1, compile="aot_eager")
    trainer = PITTrainer(network, **settings)
    trainer.train()
    assert trainer.compilations.by_piece.keys() == {"PIT"}
    assert trainer.compilations.total <= 3


# ---- numbers that are none -------------------------------------------------------------------------------------------


def test_the_first_step_with_a_loss_that_is_no_number_is_reported_later_on_a_device_that_is_not_waited_for() -> None:
    told: list[tuple[int, dict[str, float]]] = []
    finite = Finiteness(lambda step, values: told.append((step, dict(values))))
    finite.add(1, {"loss": torch.tensor(1.0)})
    finite.add(2, {})
    assert told == []
    finite.add(3, {"loss": torch.tensor(float("inf")), "cost": torch.tensor(2.0)})
    assert told == [(3, {"loss": float("inf"), "cost": 2.0})]
    meta = [(4, ["loss"], torch.tensor([1.0])), (5, ["loss"], torch.tensor([float("nan")]))]
    finite._waiting.extend(meta)
    finite.look()
    assert told[-1][0] == 5
    finite.look()
    assert len(told) == 2


def test_no_checkpoint_holds_weights_that_are_no_numbers(build: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = build(tiny())
    trainer._finite._waiting.append((3, ["loss"], torch.tensor([float("nan")])))  # as a GPU leaves it
    trainer.split = trainer._split(trainer.dataset, 256)
    with pytest.raises(TrainingDivergedError, match=r"step 3 .*loss = nan"):
        trainer.save(tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_all_of_it_at_once() -> None:
    history = reinforce(tiny(), accumulate=2, grad_clip=1.0, ema_decay=0.5, checkpoint_blocks=["one"]).train()
    assert [record["phase"] for record in history] == ["warmup", "search", "search"]


# ---- devices ---------------------------------------------------------------------------------------------------------


def test_what_an_optimizer_remembers_follows_the_weights() -> None:
    """The count of steps only where the optimizer keeps it there."""
    weight = nn.Parameter(torch.empty(2, device="meta"))  # as after the model moved
    for capturable in (False, True):
        optimizer = torch.optim.Adam([weight], lr=0.1)
        optimizer.param_groups[0]["capturable"] = capturable
        optimizer.state[weight] = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}
        to_device_of_weights(optimizer)
        kinds = {name: value.device.type for name, value in optimizer.state[weight].items()}
        assert kinds == {"step": "meta" if capturable else "cpu", "exp_avg": "meta"}
