"""The global random generators (torch, CUDA, Python, NumPy) as plain data, and a scope that gives them back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..data import mix_seed

__all__ = ["global_state", "restore_global_state", "seed_global_state", "user_state_kept"]


def global_state() -> dict[str, Any]:
    """Tensors, numbers and lists only, so that a checkpoint loads with ``weights_only=True``."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002  the user's state
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
    }


def restore_global_state(state: Mapping[str, Any]) -> None:
    """Put back what ``global_state`` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002


def seed_global_state(seed: int, step: int = 0, process: int = 0) -> None:
    """What is random in a step (dropout, say) depends on these three numbers alone, not on what was drawn before.

    So a run that is taken up again goes on as it would have, also with another number of GPUs in the machine.
    """
    of_torch = mix_seed(seed, 1, step, process)
    # Not torch.manual_seed: where no GPU has been used yet, it keeps a stack trace for each call.
    torch.default_generator.manual_seed(of_torch)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(of_torch)
    random.seed(mix_seed(seed, 2, step, process))
    np.random.seed(mix_seed(seed, 3, step, process) % 2**32)  # noqa: NPY002


@contextmanager
def user_state_kept() -> Iterator[None]:
    """Whatever is drawn inside, the user's generators are afterwards where they were."""
    state = global_state()
    try:
        yield
    finally:
        restore_global_state(state)
