"""SuperNet and PITSuperNet in a loop of one's own: the page their users start from, and PLiNIO's conformance cases."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from oneshot import PIT, InputChoice, LayerChoice, PITSuperNet, PITSuperNetModule, Softmax, SuperNet, set_sampler
from oneshot.errors import ConfigurationError, UnsupportedModelError
from oneshot.graph import evaluated
from search_spaces.mlperf_tiny import dscnn_supernet, mobilenet_v1_supernet, resnet8_supernet


class SimpleSuperNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = PITSuperNetModule([
            nn.Conv2d(32, 32, 3, padding='same'),
            nn.Sequential(
                nn.Conv2d(32, 32, 3, padding='same'),
                nn.Conv2d(32, 32, 3, padding='same'),
            ),
            nn.Conv2d(32, 32, 5, padding='same'),
            nn.Identity()
        ])  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_the_page_word_for_word() -> None:
    torch.manual_seed(0)
    input_shape = (32, 8, 8)
    data = [(torch.rand(2, 32, 8, 8), torch.rand(2, 32, 8, 8)) for _ in range(2)]
    criterion = nn.MSELoss()
    N_EPOCHS = 2

    net = SimpleSuperNet()
    pitsn_net = PITSuperNet(net, input_shape=input_shape, regularizer='macs')  # fmt: skip
    optimizer = torch.optim.SGD(pitsn_net.parameters(), lr=0.1)
    before = [p.detach().clone() for p in pitsn_net.parameters()]
    strength = 1e-6  # depends on user specific requirements
    for _epoch in range(N_EPOCHS):
        for sample, target in data:
            output = pitsn_net(sample)
            task_loss = criterion(output, target)
            reg_loss = strength * pitsn_net.get_regularization_loss()
            loss = task_loss + reg_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    exported_model = pitsn_net.arch_export()

    moved = [not torch.equal(a, b) for a, b in zip(before, pitsn_net.parameters(), strict=True)]
    assert all(moved)
    best = pitsn_net.arch()["conv"]
    with evaluated(pitsn_net), torch.no_grad():
        pitsn_net.decide(pitsn_net.arch())
        assert torch.allclose(pitsn_net(data[0][0]), exported_model(data[0][0]), rtol=1e-4, atol=1e-5)
    assert type(exported_model.conv) is type(net.conv[best])


def test_without_autoconversion_the_alternatives_alone_are_searched() -> None:
    net = PITSuperNet(SimpleSuperNet(), input_shape=(32, 8, 8), regularizer="size", autoconvert_layers=False)
    assert net.arch() == {"conv": 0}
    # (9,216 + 2 * 9,216 + 25,600 + 0) / 4 weights
    assert net.get_regularization_loss().item() == 13_312


def test_costs_and_variation_of_the_standard_module() -> None:
    """C34. params (9,248 + 18,496 + 25,632 + 0) / 4; ops 64 * 64 of each of these per image; ICV (1/16) / 1e-3."""
    net = SuperNet(SimpleSuperNet(), (32, 64, 64), cost={"params": "params", "ops": "ops"})
    assert net.get_cost("params").item() == 13_344
    assert net.get_cost("ops").item() == 54_657_024 == 13_344 * 64 * 64
    assert net.get_total_icv().item() == pytest.approx(62.5, rel=1e-6)
    assert net(torch.rand(1, 32, 64, 64)).shape == (1, 32, 64, 64)


def test_another_sampling_another_cost() -> None:
    """C36: with noise every forward has another gate, and so another expected cost; eval mode has none."""
    torch.manual_seed(0)
    net = SuperNet(SimpleSuperNet(), (32, 4, 4), cost=["params", "macs"], gumbel_softmax=True)
    x = torch.rand(1, 32, 4, 4)
    net(x)
    soft = net.choices["conv"].members[0].gate().weights.tolist()
    first = {name: cost.item() for name, cost in net.costs().items()}
    assert first == {name: cost.item() for name, cost in net.costs().items()}
    net.update_softmax_options(hard=True)
    net(x)
    second = {name: cost.item() for name, cost in net.costs().items()}
    hard = net.choices["conv"].members[0].gate().weights.tolist()
    assert all(second[name] != first[name] for name in first)
    assert sorted(hard) == [0, 0, 0, 1]
    assert hard != soft
    net.eval()
    with torch.no_grad():
        assert torch.equal(net(x), net(x))
    assert net.get_cost("params").item() == 13_344


def test_temperature_sharpens() -> None:
    net = SuperNet(SimpleSuperNet(), (32, 4, 4), temperature=1.0)
    with torch.no_grad():
        net.choices["conv"].alpha[1] = 1.0
    warm = net.choices["conv"].probabilities()[1].item()
    net.update_softmax_options(temperature=0.1)
    assert warm == pytest.approx(2.718281828 / 5.718281828)
    assert net.choices["conv"].probabilities()[1].item() == pytest.approx(1 / (1 + 3 * 4.5399929762e-05))


def test_hard_softmax_trains_its_alphas() -> None:
    """alpha has the gradient of the soft weights, p_i (c_i - sum_j p_j c_j) with c_k = <dL/dy, o_k(x)>."""
    torch.manual_seed(0)
    net = SuperNet(SimpleSuperNet().double(), (32, 4, 4), hard_softmax=True)
    x = torch.rand(1, 32, 4, 4, dtype=torch.float64)
    net(x).sum().backward()
    with torch.no_grad():
        c = torch.stack([candidate(x).sum() for candidate in net.network.conv])
    p = torch.full((4,), 0.25, dtype=torch.float64)
    assert torch.allclose(net.choices["conv"].alpha.grad.double(), p * (c - (p * c).sum()), rtol=1e-5)
    ran = [all(q.grad is not None for q in candidate.parameters()) for candidate in list(net.network.conv)[:3]]
    assert ran == [True, False, False]


@pytest.mark.parametrize("index", range(4))
def test_export_of_a_decided_network(index: int) -> None:
    """C37: a logit of 50 decides; the export computes the same and holds that branch only."""
    plain = SimpleSuperNet()
    net = SuperNet(plain, (32, 8, 8))
    with torch.no_grad():
        net.choices["conv"].alpha[index] = 50.0
    exported = net.export().eval()
    x = torch.rand(2, 32, 8, 8)
    with torch.no_grad():
        assert torch.allclose(net.eval()(x), exported(x), atol=1e-5)
    assert sum(p.numel() for p in exported.parameters()) == sum(p.numel() for p in plain.conv[index].parameters())


def test_who_learns() -> None:
    """C38."""
    net = SuperNet(SimpleSuperNet(), (32, 4, 4))

    def learning() -> tuple[set[bool], set[bool]]:
        return {p.requires_grad for p in net.nas_parameters()}, {p.requires_grad for p in net.net_parameters()}

    assert learning() == ({True}, {True})
    net.train_nas_only()
    assert learning() == ({True}, {False})
    net.train_net_only()
    assert learning() == ({False}, {True})
    net.train_net_and_nas()
    net.train_selection = False
    assert learning() == ({False}, {True})


def test_task_and_cost_backward_one_after_the_other() -> None:
    """In one graph or two, in any order, and without a forward: all of these give the sum of both gradients."""
    x = torch.rand(2, 32, 4, 4)

    def gradient(order: str) -> Tensor:
        torch.manual_seed(0)
        net = SuperNet(SimpleSuperNet(), (32, 4, 4))
        if order == "cost first":
            (1e-3 * net.cost).backward()
            net(x).sum().backward()
        elif order == "task first":
            loss = net(x).sum()
            cost = 1e-3 * net.cost
            loss.backward()
            cost.backward()
        else:
            (net(x).sum() + 1e-3 * net.cost).backward()
        return net.choices["conv"].alpha.grad

    assert torch.allclose(gradient("cost first"), gradient("together"), rtol=1e-4)
    assert torch.allclose(gradient("task first"), gradient("together"), rtol=1e-4)


def test_the_users_network_stays_as_it_is() -> None:
    plain = SimpleSuperNet().eval()
    plain.conv[0].train()
    modes = [m.training for m in plain.modules()]
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    net = SuperNet(plain, (32, 4, 4))
    net.train()(torch.rand(1, 32, 4, 4)).sum().backward()
    assert modes == [m.training for m in plain.modules()]
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    assert all(p.grad is None for p in plain.parameters())
    assert plain.conv.padding is None


def test_trainers_samplers_are_not_replaced() -> None:
    net = SuperNet(SimpleSuperNet(), (32, 4, 4), gumbel_softmax=True)
    set_sampler(net.choices, Softmax(0.5))
    net.train()(torch.rand(1, 32, 4, 4))
    assert net.choices["conv"].sampler == Softmax(0.5)


def test_wrong_networks() -> None:
    with pytest.raises(UnsupportedModelError, match="holds no LayerChoice"):
        SuperNet(nn.Sequential(nn.Linear(4, 4)), (4,))
    with pytest.raises(UnsupportedModelError, match="does not run on an input"):
        SuperNet(SimpleSuperNet(), (3, 8, 8))
    with pytest.raises(ConfigurationError, match="is one already"):
        SuperNet(SuperNet(SimpleSuperNet(), (32, 4, 4)), (32, 4, 4))
    with pytest.raises(ConfigurationError, match="regularizer='latency'"):
        SuperNet(SimpleSuperNet(), (32, 4, 4), regularizer="latency")
    with pytest.raises(ConfigurationError, match="temperature=0"):
        SuperNet(SimpleSuperNet(), (32, 4, 4), temperature=0.0)


def test_branches_that_are_functions_and_inputs_that_are_chosen() -> None:
    def half_of(x: Tensor) -> Tensor:
        return x / 2

    class Zero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = LayerChoice({"halved": half_of, "zeros": Zero(), "relu": torch.relu, "linear": nn.Linear(4, 4)})
            self.inputs = InputChoice(n_candidates=2, n_chosen=1)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inputs([x, self.pool(x)]))

    net = SuperNet(Net(), (4,))
    assert net.cost.item() == pytest.approx(20 / 4 + 10)
    for name in ("halved", "zeros", "relu", "linear"):
        net.decide({"pool": name, "inputs": [1]})
        x = torch.rand(3, 4)
        with torch.no_grad():
            assert torch.allclose(net.export()(x), net.eval()(x), atol=1e-6)


def test_masks_need_no_choices_and_choices_no_masks() -> None:
    assert PITSuperNet is PIT
    assert PITSuperNetModule is LayerChoice
    plain = PITSuperNet(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), (4,))
    assert plain.choices == {}
    assert plain.get_total_icv().item() == 0


def test_costs_before_the_first_forward_and_a_trainer_with_the_same_settings() -> None:
    net = SuperNet(SimpleSuperNet(), (32, 4, 4), gumbel_softmax=True)
    assert net.cost.item() > 0
    mine = Softmax(1.0)
    set_sampler(net.choices, mine)
    net.train()(torch.rand(1, 32, 4, 4))
    assert net.choices["conv"].sampler is mine


@pytest.mark.parametrize(
    ("build", "shape", "params", "choices"),
    [
        (resnet8_supernet, (3, 32, 32), 84_474 + 2 / 3, 7),
        (dscnn_supernet, (1, 49, 10), 164_236, 4),
        (mobilenet_v1_supernet, (3, 96, 96), 1_847_972 + 2 / 3, 13),
    ],
)
def test_costs_of_the_published_branch_spaces(
    build: Callable[[], nn.Module], shape: tuple[int, ...], params: float, choices: int
) -> None:
    """C35, the whole network: PLiNIO prints .66, .00 and .75, the last of float32 sums."""
    net = SuperNet(build(), shape, cost="params_no_norm")
    assert net.cost.item() == pytest.approx(params, rel=1e-7)
    assert len(net.choices) == choices
