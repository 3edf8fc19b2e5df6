"""A run that a test starts as a process of its own: python killable_run.py FOLDER WORKERS [SIGNAL AT [WHERE]].

It resumes from FOLDER if there is a checkpoint, sends itself SIGNAL at call number AT of the loss (or of fsync, while
a checkpoint is being written), and writes arch.json, final.pt and history.json when it gets to the end.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
from tiny import digit_data, proxyless, tiny
from torch import Tensor
from torch.utils.data import Dataset


class Noisy(Dataset):
    """Augmentation that draws from all three global generators."""

    def __init__(self) -> None:
        self.data = digit_data(200)
        self.targets = self.data.tensors[1]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, target = self.data[index]
        return image + 0.1 * torch.rand_like(image) + 0.1 * random.random() + 0.1 * float(np.random.rand()), target


def main(folder: Path, workers: int, number: int = 0, at: int = 0, where: str = "loss") -> None:
    torch.set_num_threads(1)
    calls = 0

    def count(place: str) -> None:
        nonlocal calls
        calls += place == where
        if number and calls == at and place == where:
            os.kill(os.getpid(), number)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        count("loss")
        return torch.nn.functional.cross_entropy(output, target)

    fsync = os.fsync

    def counted_fsync(descriptor: int) -> None:
        count("fsync")
        fsync(descriptor)

    os.fsync = counted_fsync
    model = tiny()
    trainer = proxyless(
        model,
        loss=loss,
        dataset=Noisy(),
        workers=workers,
        scheduler=lambda optimizer, steps: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        warmup_scheduler=lambda optimizer, steps: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
        checkpoint_dir=folder,
        checkpoint_every=2,
    )
    if (folder / "last.ckpt").exists():
        trainer.resume(folder)
    history = trainer.train()
    trainer.export(folder / "arch.json")
    torch.save(model.state_dict(), folder / "final.pt")
    (folder / "history.json").write_text(json.dumps(history))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(a) if a.isdigit() else a for a in sys.argv[2:]))
