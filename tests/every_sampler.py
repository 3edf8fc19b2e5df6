"""One sampler of every kind and setting, for tests that hold for all of them."""

from __future__ import annotations

from oneshot import Argmax, BinaryGates, EveryPath, GumbelSoftmax, OnePath, Softmax, UniformPath
from oneshot.mutables import Sampler

SAMPLERS: list[Sampler] = [
    Softmax(),
    GumbelSoftmax(0.8),
    GumbelSoftmax(0.8, hard=True),
    BinaryGates(1),
    BinaryGates(2),
    BinaryGates("all"),
    UniformPath(),
    Argmax(),
    OnePath(1),
    EveryPath(),
]
