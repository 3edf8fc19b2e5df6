"""A candidate's weight in a mixture, moved into its last layer: compared with the multiplied outputs, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oneshot import PIT, GumbelSoftmax, LayerChoice, Softmax, draw, set_sampler
from oneshot.mutables import Sampler
from oneshot.mutables.folding import last_affine, scaled
from oneshot.pit import SuperNet
from oneshot.trainers.recompute import recomputed


def conv_bn(*behind: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), *behind)


class Residual(nn.Module):
    """Not a chain: a factor of its last layer is none of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.shortcut = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


def candidates() -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        conv_bn(nn.ReLU()),
        conv_bn(nn.LeakyReLU(0.1), nn.Identity()),
        conv_bn(nn.Sigmoid()),
        nn.Conv2d(3, 4, 1),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)),
        Residual(),
    ]


def by_hand(options: list[nn.Module], weights: Tensor, x: Tensor) -> Tensor:
    """sum_k w_k o_k(x), as it is written."""
    return torch.stack([w * option(x) for w, option in zip(weights, options, strict=True)]).sum(0)


@pytest.mark.parametrize("sampler", [Softmax(), Softmax(0.5), GumbelSoftmax()])
@pytest.mark.parametrize("training", [True, False])
def test_values_and_gradients_are_those_of_the_sum_by_hand(sampler: Sampler, training: bool) -> None:
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    target = torch.randn(5, 4, 6, 6, dtype=torch.float64)
    choice = LayerChoice(candidates()).double().train(training)
    with torch.no_grad():
        choice.alpha.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0, 0.5, -1.0]))
    set_sampler(choice, sampler)
    draw(choice, torch.Generator().manual_seed(0))
    found, wanted = [], []
    for values, output in (
        (found, lambda given: choice(given)),
        (wanted, lambda given: by_hand(list(choice), sampler.probabilities(choice.alpha, choice.drawn), given)),
    ):
        given = x.clone().requires_grad_()
        result = output(given)
        loss = (result * target).sum() + result.pow(2).mean()
        gradients = torch.autograd.grad(loss, [given, *choice.parameters()])
        values += [result.detach(), *gradients]
    assert len(found) == len(wanted) == 2 + len(list(choice.parameters()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_the_second_derivative_is_that_of_the_sum_by_hand() -> None:
    choice = LayerChoice([nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2)]).double()
    x = torch.randn(64, 2, dtype=torch.float64)

    def curvature(output: Callable[[], Tensor]) -> Tensor:
        (first,) = torch.autograd.grad(output().pow(2).sum(), [choice.alpha], create_graph=True)
        return torch.stack([torch.autograd.grad(g, [choice.alpha], retain_graph=True)[0] for g in first])

    found = curvature(lambda: choice(x))
    torch.testing.assert_close(found, curvature(lambda: by_hand(list(choice), choice.alpha.softmax(0), x)))


@pytest.mark.parametrize(
    ("module", "place"),
    [
        (conv_bn(), "1"),
        (conv_bn(nn.ReLU(), nn.Dropout(0.5)), "1"),
        (nn.Sequential(conv_bn(), nn.ReLU()), "0.1"),
        (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "1"),
        (nn.Conv2d(1, 1, 3), ""),
        (conv_bn(nn.ReLU6()), None),  # min(w x, 6) is not w min(x, 6)
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)), None),
        (nn.Identity(), None),
        (nn.Sequential(nn.ReLU()), None),
        (nn.Sequential(), None),
        (Residual(), None),
        (nn.Linear(5, 5), None),  # 25 weights are more than 20
    ],
)
def test_where_a_factor_goes(module: nn.Module, place: str | None) -> None:
    assert last_affine(module, 20) is (None if place is None else module.get_submodule(place))


def test_no_factor_goes_where_somebody_else_would_see_it() -> None:
    norm = nn.BatchNorm2d(4)
    assert last_affine(nn.Sequential(norm, nn.Conv2d(4, 4, 1), norm), 0) is None  # it stands there twice
    for hook in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        watched = conv_bn(nn.ReLU())
        getattr(watched[1], hook)(lambda *_: None)
        assert last_affine(watched, 0) is None
        around = conv_bn(nn.ReLU())
        getattr(around, hook)(lambda *_: None)
        assert last_affine(around, 0) is None


def test_no_factor_goes_into_what_somebody_has_patched() -> None:
    """Their forward may compute it again in the backward pass, say, when the weights are as before."""
    patched = conv_bn(nn.ReLU())
    patched[1].forward = lambda x: x
    assert last_affine(patched, 0) is None
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert last_affine(conv_bn(), 0) is None
    finally:
        everywhere.remove()


def test_recomputed_candidates_have_the_same_gradients_to_the_bit() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 3, 1), LayerChoice([conv_bn(nn.ReLU()), conv_bn(), nn.Conv2d(3, 4, 1)]))
    x, target = torch.randn(2, 3, 6, 6), torch.randn(2, 4, 6, 6)

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad((net(x) * target).sum(), list(net.parameters())))

    plain = gradients()
    for blocks in (["1"], ["1.candidates.*"], ["1.candidates.0.1"]):
        with recomputed(net, blocks):
            assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


def test_parameters_are_put_back_after_an_error() -> None:
    layer = nn.Linear(2, 2)
    before = dict(layer._parameters)
    with pytest.raises(RuntimeError, match="shapes"), scaled(layer, torch.tensor(0.5)):
        layer(torch.ones(1, 3))
    assert layer.weight is before["weight"]
    assert layer.bias is before["bias"]


def test_a_mixture_keeps_no_outputs() -> None:
    """Bytes that autograd keeps: those of the plain sum, but for the normalisations' scaled weights."""
    choice, x = LayerChoice([conv_bn(), conv_bn()]), torch.randn(8, 3, 16, 16)

    def kept(output: Callable[[], Tensor]) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            held = output()
        assert held.requires_grad
        return sum(storages.values())

    plain = kept(lambda: choice["0"](x) + choice["1"](x))
    # An output has 8 * 4 * 16 * 16 * 4 = 32768 bytes; a scaled gamma 16, and a weight of the mixture 4 or 8.
    assert plain <= kept(lambda: choice(x)) <= plain + 200


def test_masks_and_weights_of_a_mixture_meet_in_one_layer() -> None:
    """A PIT network with choices, all masks on, is the network without masks: values and gradients of the weights."""
    torch.manual_seed(0)
    space = nn.Sequential(
        nn.Conv2d(3, 3, 1), LayerChoice([conv_bn(nn.ReLU()), conv_bn()], label="a"), nn.Flatten(), nn.Linear(144, 2)
    ).double()
    both, choices = PIT(space, (3, 6, 6)), SuperNet(space, (3, 6, 6))
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    gradients = []
    for network in (both, choices):
        network.train()
        loss = F.cross_entropy(network(x), torch.tensor([0, 1, 1, 0]))
        gradients.append(torch.autograd.grad(loss, [*network.net_parameters(), network.choices["a"].alpha]))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
