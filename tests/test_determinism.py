"""The same seed gives the same architecture file, whatever loads the data, and whatever ran before."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import digit_data, gumbel, proxyless, spos, supernet, tiny
from torch import Tensor
from torch.utils.data import Dataset

from oneshot import Trainer

TRAINERS = {
    "proxyless": proxyless,
    "supernet": supernet,
    "gumbel": gumbel,
    "spos": spos,
}


class Augmented(Dataset[Any]):
    """Digits with noise from each of the three generators that augmentation draws from."""

    def __init__(self) -> None:
        self.data = digit_data()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, target = self.data[index]
        noise = torch.rand(1) + float(np.random.rand()) + random.random()
        return image + 0.1 * noise, target

    @property
    def targets(self) -> Tensor:
        return self.data.tensors[1]


@pytest.mark.parametrize("build", TRAINERS.values(), ids=TRAINERS)
def test_the_number_of_loading_workers_does_not_count(build: Callable[..., Trainer], tmp_path: Path) -> None:
    files, runs = [], []
    for workers in (0, 1, 2):
        random.seed(workers), np.random.seed(workers), torch.manual_seed(workers)
        trainer = build(tiny(), dataset=Augmented(), workers=workers, warmup_epochs=0)
        runs.append(trainer.train())
        trainer.export(tmp_path / f"{workers}.json")
        files.append((tmp_path / f"{workers}.json").read_bytes())
    assert files[0] == files[1] == files[2]
    assert runs[0] == runs[1] == runs[2]
