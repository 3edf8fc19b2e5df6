"""Random small search spaces for property tests: every mutable, nested, shared and tied, on tensors of one shape.

They are drawn by seed, and not by hypothesis itself, which would mostly draw the simplest ones.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from oneshot import InputChoice, LayerChoice, Repeat, decisions

MOST_ARCHS = 48

Leaf = Callable[[random.Random], nn.Module]


class Block(nn.Module):
    """A candidate of any content: candidates of one label must be of one type."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Twice(Block):
    """One module called two times."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))


class Branches(nn.Module):
    """Some of several branches, summed; all of them run and stay in the network."""

    def __init__(self, branches: list[nn.Module], n_chosen: int | None, label: str | None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.choice = InputChoice(len(branches), n_chosen=n_chosen, label=label)

    def forward(self, x: Tensor) -> Tensor:
        return self.choice([branch(x) for branch in self.branches])


def random_space(seed: int, leaf: Leaf) -> nn.Module:
    """A network of 2 to ``MOST_ARCHS`` architectures; ``leaf`` makes its layers, which keep the shape."""
    rng = random.Random(seed)
    while True:
        model = _Maker(rng, leaf).model()
        if 2 <= n_architectures(model) <= MOST_ARCHS:
            return model


def n_architectures(model: nn.Module) -> int:
    return math.prod(len(d.options) for d in decisions(model).values())


def architectures(model: nn.Module) -> Iterator[dict[str, int]]:
    """Every architecture, as label -> option."""
    known = decisions(model)
    for options in itertools.product(*(range(len(d.options)) for d in known.values())):
        yield dict(zip(known, options, strict=True))


class _Maker:
    def __init__(self, rng: random.Random, leaf: Leaf) -> None:
        self.rng, self.leaf = rng, leaf
        self.left = rng.randint(2, 6)  # mutables to place
        self.made: list[nn.Module] = []

    def model(self) -> nn.Module:
        model = nn.Sequential(self.leaf(self.rng), *self.nodes(2, 3, 0), self.leaf(self.rng))
        if self.rng.random() < 0.3:
            tie_weights(model)
        return model

    def nodes(self, low: int, high: int, depth: int) -> list[nn.Module]:
        return [self.node(depth + 1) for _ in range(self.rng.randint(low, high))]

    def node(self, depth: int) -> nn.Module:
        if self.made and self.rng.random() < 0.12:
            return self.rng.choice(self.made)  # the very same object
        kinds: list[Callable[[int], nn.Module]] = [lambda _: self.leaf(self.rng)]
        if depth < 5:
            kinds += [self.sequence, self.twice]
            if self.left > 0:
                kinds += [self.listed, self.named, self.named, self.repeated, self.branches]
        module = self.rng.choice(kinds)(depth)
        self.made.append(module)
        return module

    def sequence(self, depth: int) -> nn.Module:
        return nn.Sequential(*self.nodes(1, 3, depth))

    def twice(self, depth: int) -> nn.Module:
        return Twice(self.node(depth + 1))

    def listed(self, depth: int) -> nn.Module:
        self.left -= 1
        return LayerChoice(self.nodes(1, 3, depth))

    def named(self, depth: int) -> nn.Module:
        self.left -= 1
        label = self.rng.choice([None, "a", "a", "b"])
        n = 2 if label is not None else self.rng.randint(1, 3)
        return LayerChoice({f"op{i}": Block(self.node(depth + 1)) for i in range(n)}, label=label)

    def repeated(self, depth: int) -> nn.Module:
        self.left -= 1
        label = self.rng.choice([None, "r"])
        low, high = (0, 2) if label is not None else self.rng.choice([(0, 1), (1, 1), (1, 3), (2, 2)])
        row = self.nodes(high, high, depth)
        return Repeat(self.rng.choice([row, row.__getitem__]), depth=(low, high), label=label)

    def branches(self, depth: int) -> nn.Module:
        self.left -= 1
        label = self.rng.choice([None, "i"])
        n_chosen = 1 if label is not None else self.rng.choice([None, 1, 2])
        return Branches(self.nodes(2, 2, depth), n_chosen, label)


def tie_weights(model: nn.Module) -> None:
    """Give the last layer the weight of the first one of its shape, as embeddings and heads are tied."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for first in layers[:-1]:
        if first.weight.shape == layers[-1].weight.shape:
            layers[-1].weight = first.weight
            return
