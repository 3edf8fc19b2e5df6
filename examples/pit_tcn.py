"""Prunes a temporal convolutional network in time: 36,679 parameters, and then three budgets of fewer.

    python -m pip install --no-deps seglearn
    python examples/pit_tcn.py            (20 minutes on one CPU core)
    python examples/pit_tcn.py --quick    (one minute: one seed, few epochs; nothing is claimed of its accuracies)

Windows of 128 samples of a smartwatch (smartwatch.py) are one of seven exercises. The seed network ``small_tcn`` has
kernels of 9 taps and no dilation; ``PITTrainer`` looks for channels, kernel sizes and dilations within a number of
parameters, which all of them share. The control is the seed itself, trained by the same trainer with every mask left
at 1, for as many epochs: the same batches, augmentation, optimizer and choice of the epoch.

Person 7 chooses the epoch, persons 8 to 10 are tested once by each finished network. Of every run, ``--out`` gets the
architecture as JSON, of the last one, of the smallest budget, also ``smallest.onnx``, and of all ``results.json``. It
is checked that

- every exported network keeps its budget, has as many parameters and MACs as reported (counted by torch), and computes
  what the masked one did, as does the one that is rebuilt from the JSON, and ONNX Runtime;
- in the full run, for every budget, the mean accuracy over the seeds is at most 4 points below the control's: at least
  3, 6 and 12 times fewer parameters. (The seeds of one budget differ by more than the means of the budgets.)
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from common import cosine
from smartwatch import Datasets, datasets, load_recordings
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from oneshot import PIT, LabelSmoothingLoss, PITTrainer, accuracy, export_onnx, fixed
from oneshot.files import atomic_write
from oneshot.loggers import markdown_table
from search_spaces.tcn import small_tcn

SHAPE = (6, 128)
BUDGETS = (12_000, 6_000, 3_000)  # parameters: a third, a sixth and a twelfth of the seed's
MARGIN = 0.04  # of test accuracy, that their means may be below the control's
BATCH, LR = 64, 3e-3


class Plan(NamedTuple):
    """Epochs of the three phases, the rate of the masks, and how many samples apart the windows are."""

    warmup: int
    search: int
    finetune: int
    mask_lr: float
    stride: int


FULL, QUICK = Plan(2, 10, 8, 4e-3, 32), Plan(1, 4, 1, 2e-2, 64)


@dataclass(frozen=True)
class Run:
    """One trained network: its budget of parameters (None: the control), and what became of it."""

    budget: int | None
    seed: int
    accuracy: float
    validation_accuracy: float
    parameters: int
    macs: int
    kernels: str
    seconds: float

    @property
    def name(self) -> str:
        return "control" if self.budget is None else f"at most {self.budget:,}"


class Shaken(Dataset[tuple[Tensor, Tensor]]):
    """Windows as a watch worn a little differently would give them: every axis scaled and moved, and some noise.

    The trainer seeds torch's generator before it reads a sample, from seed, pass and index.
    """

    def __init__(self, windows: TensorDataset) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.windows[index]  # (6, 128), ()
        scale, shift = 0.2 * torch.randn(2, len(x), 1)  # (6, 1) each
        return x * (1 + scale) + shift + 0.1 * torch.randn_like(x), y


# ---- the job ---------------------------------------------------------------------------------------------------


def trainer_of(pit: PIT, data: Datasets, budget: int | None, plan: Plan, seed: int) -> PITTrainer:
    """Masks that look for at most ``budget`` parameters; or, without one, that stay at 1 for as many epochs."""
    warmup, search, finetune = plan[:3] if budget is not None else (0, 0, sum(plan[:3]))
    return PITTrainer(
        pit,
        loss=LabelSmoothingLoss(),
        metrics=partial(accuracy, topk=(1,)),
        optimizer=torch.optim.AdamW(pit.net_parameters(), LR),
        warmup_epochs=warmup,
        num_epochs=search,
        finetune_epochs=finetune,
        finetune_scheduler=cosine,
        targets=None if budget is None else {"params": budget},
        mask_learning_rate=plan.mask_lr,
        dataset=Shaken(data.train),
        valid_dataset=data.validation,
        batch_size=BATCH,
        workers=0,
        device="cpu",
        seed=seed,
    )


def run(data: Datasets, budget: int | None, plan: Plan, seed: int, out: Path) -> tuple[Run, PIT]:
    """Train, export, check, and test once."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    pit = PIT(small_tcn(), SHAPE, cost=("params", "macs"))
    trainer = trainer_of(pit, data, budget, plan, seed)
    trainer.train()
    written = out / f"{'control' if budget is None else budget}_seed{seed}.json"
    trainer.export(written)  # raises if the exported network computes something else than the masked one
    result = Run(
        budget,
        seed,
        accuracy=trainer.evaluate(data.test)["acc1"],
        validation_accuracy=trainer.evaluate()["acc1"],
        parameters=int(pit.get_cost("params")),
        macs=int(pit.get_cost("macs")),
        kernels=kernels_of(pit),
        seconds=time.perf_counter() - start,
    )
    check(pit.eval(), result, written, data.test.tensors[0][:200])
    return result, pit


def kernels_of(pit: PIT) -> str:
    """The kernels that were searched, as taps x dilation, from the first to the last."""
    arch = pit.arch()
    rows = [row for path, row in pit.summary().items() if f"{path}.kernel_size" in arch]
    return ", ".join(f"{row['kernel_size'][0]}x{row['dilation'][0]}" for row in rows)


# ---- what is claimed -------------------------------------------------------------------------------------------


@torch.no_grad()
def check(pit: PIT, result: Run, written: Path, windows: Tensor) -> None:
    """The exported network and the one of the JSON: size, operations, and outputs for windows (N, 6, 128)."""
    nets = {"exported": pit.export(), "rebuilt from JSON": fixed(pit, written)}
    expected = pit(windows)
    for name, net in nets.items():
        assert sum(p.numel() for p in net.parameters()) == result.parameters, f"{name}: other parameters"
        assert macs_by_torch(net) == result.macs, f"{name}: other MACs"
        assert close(net.eval()(windows), expected), f"{name}: computes something else"
    assert result.budget is None or result.parameters <= result.budget, f"{result.name}: {result.parameters}"


def macs_by_torch(net: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        net.eval()(torch.zeros(1, *SHAPE))
    return counter.get_total_flops() // 2  # a multiplication and an addition each


def close(a: Tensor, b: Tensor) -> bool:
    """Whether max |a - b| <= 1e-4 max |b|."""
    return float((a - b).abs().max()) <= 1e-4 * float(b.abs().max())


@torch.no_grad()
def check_onnx(net: nn.Module, windows: Tensor, path: Path) -> None:
    """Write the network as an ONNX file and compare what ONNX Runtime makes of it for windows (N, 6, 128)."""
    import onnxruntime

    export_onnx(net, (windows,), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"input0": windows.numpy()})
    assert close(torch.from_numpy(output), net.eval()(windows)), f"{path}: ONNX Runtime computes something else"


def check_accuracies(runs: Sequence[Run]) -> None:
    """The margin of the docstring, over the seeds."""
    control = mean(run.accuracy for run in runs if run.budget is None)
    for budget in BUDGETS:
        found = mean(run.accuracy for run in runs if run.budget == budget)
        assert found >= control - MARGIN, f"at most {budget}: {found:.3f}, the control has {control:.3f}"


# ---- the table -------------------------------------------------------------------------------------------------


def rows_of(runs: Sequence[Run]) -> list[dict[str, str]]:
    """One row per budget, means over the seeds, ± half the range of the accuracies."""
    control = [run for run in runs if run.budget is None]
    rows = []
    for budget in dict.fromkeys(run.budget for run in runs):
        group = [run for run in runs if run.budget == budget]
        correct = [run.accuracy for run in group]
        parameters, macs = mean(run.parameters for run in group), mean(run.macs for run in group)
        rows.append(
            {
                "network": group[0].name,
                "test accuracy": f"{mean(correct):.3f}",
                "lowest to highest": f"{min(correct):.3f} to {max(correct):.3f}",
                "parameters": f"{parameters:,.0f}",
                "fewer": f"{mean(run.parameters for run in control) / parameters:.1f}x",
                "MACs": f"{macs:,.0f}",
                "fewer MACs": f"{mean(run.macs for run in control) / macs:.1f}x",
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recordings", type=Path, help="watch_dataset.npy, by default that of the package seglearn")
    parser.add_argument("--out", type=Path, default=Path("runs/pit_tcn"))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each network")
    parser.add_argument("--quick", action="store_true", help="one seed and few epochs")
    # Two threads on a small machine with other work wait for one another and are slower than one.
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    seeds, plan = (1, QUICK) if args.quick else (args.seeds, FULL)
    start = time.perf_counter()

    data = datasets(load_recordings(args.recordings), stride=plan.stride)
    print(f"{len(data.train)} windows for training, {len(data.validation)} and {len(data.test)} to choose and test")
    runs = []
    for budget in (None, *BUDGETS):
        for seed in range(seeds):
            result, pit = run(data, budget, plan, seed, args.out)
            runs.append(result)
            print(
                f"{result.name}, seed {seed}: accuracy {result.accuracy:.3f} (person 7: "
                f"{result.validation_accuracy:.3f}), {result.parameters} parameters, {result.macs} MACs, kernels "
                f"{result.kernels}; {result.seconds:.0f} s",
                flush=True,
            )
    found = json.dumps([asdict(run) for run in runs], indent=1).encode()
    atomic_write(args.out / "results.json", lambda file: file.write(found))
    if find_spec("onnx") and find_spec("onnxruntime"):
        check_onnx(pit.export(), data.test.tensors[0][:1], args.out / "smallest.onnx")  # of the last run
    print(f"\n{pit.report()}\n\n{markdown_table(rows_of(runs))}\n")
    print(f"written: {args.out}; {time.perf_counter() - start:.0f} s")
    if not args.quick:
        check_accuracies(runs)


if __name__ == "__main__":
    main()
