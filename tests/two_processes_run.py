"""A search in two processes on the CPU, started by a test: python two_processes_run.py FOLDER."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import Tiny, proxyless

if __name__ == "__main__":
    torch.set_num_threads(1)
    # Each process begins with weights of its own; the first one's count.
    torch.manual_seed(int(os.environ.get("LOCAL_RANK", "0")))
    model = Tiny()
    trainer = proxyless(
        model,
        devices=2,
        strategy="ddp",
        batch_size=16,
        cost=None,
        applied_hardware="this-machine",
        ref_latency=0.1,
        checkpoint_dir=sys.argv[1],
    )
    trainer.train()
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    everywhere = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(everywhere, flat)
    if trainer.fabric.global_rank == 0:
        same = torch.equal(*everywhere)
        Path(sys.argv[1], "result.txt").write_text(f"{trainer.fabric.world_size} {same} {trainer.step}")
