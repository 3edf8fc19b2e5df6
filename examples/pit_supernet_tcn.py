"""Searches layers and their sizes at once: a temporal convolutional network for spoken digits, in one run.

    git clone https://github.com/Jakobovski/free-spoken-digit-dataset
    python examples/pit_supernet_tcn.py --data free-spoken-digit-dataset     (2 minutes on one CPU core)
    python examples/pit_supernet_tcn.py                                      (digits of scikit-learn, pixel by pixel)

Every layer is a plain convolution of 9 taps, a depthwise separable one, or, where the width stays, nothing at all: the
choices. How many channels it has, how many taps and with which dilation: the masks, of every candidate its own.
``PITSuperNetTrainer`` looks for both within a fifth of the parameters that the network of plain convolutions has. It is
checked that

- the exported network keeps the budget, and has as many parameters and MACs (counted by torch) as reported;
- the network that is rebuilt from the written JSON computes what the exported and the searched one do;
- in the full run it recognises at least 90 % of the test recordings (80 % of the digits of scikit-learn).

``--data`` is the folder of the dataset (recordings/*.wav: 6 speakers, 50 recordings of each digit by each) or a file
fsdd_8khz.npz with the arrays audio (all samples one after the other), offsets (where each recording begins, and the
end), digit and index. Recordings 0 to 4 are the test, as its authors say, 5 to 9 choose the epoch.
"""

from __future__ import annotations

import argparse
import time
import wave
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from common import cosine
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from oneshot import PIT, LabelSmoothingLoss, LayerChoice, PITSuperNetTrainer, Temperature, accuracy, decisions, fixed
from oneshot.data import digits, stratified_split
from oneshot.errors import ConfigurationError
from search_spaces.tcn import causal_conv

SHARE = 0.2  # of the parameters of the network of plain convolutions
SEED, BATCH, LR = 0, 64, 3e-3
RATE, LENGTH, WINDOW, HOP, BANDS = 8000, 8192, 256, 128, 24  # Hz, then samples: 1.02 s, 32 ms, 16 ms
CHUNK = 500  # recordings at a time


class Plan(NamedTuple):
    """Epochs of the three phases, and the rates of masks and alphas."""

    warmup: int
    search: int
    finetune: int
    mask_lr: float
    alpha_lr: float


FULL, QUICK = Plan(3, 12, 8, 1e-2, 5e-2), Plan(1, 4, 1, 4e-2, 2e-1)


class Datasets(NamedTuple):
    """Samples are (signal (C, T) float32, class int64)."""

    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset

    @property
    def shape(self) -> tuple[int, int]:
        channels, steps = self.train.tensors[0].shape[1:]
        return channels, steps


# ---- the space -------------------------------------------------------------------------------------------------


class SearchableTCN(nn.Module):
    """A stem, four layers to choose, the mean over time, a linear layer; 3^2 * 2^2 networks before any mask.

    ``widths``: of the stem and of the second half; the length is halved twice.
    """

    def __init__(self, in_channels: int, widths: tuple[int, int] = (24, 32), n_classes: int = 10) -> None:
        super().__init__()
        narrow, wide = widths
        self.stem = plain(in_channels, narrow)  # 24x65 -> 24x65
        self.layers = nn.Sequential(
            layer(narrow, narrow, "layer1"),
            nn.AvgPool1d(2),
            layer(narrow, wide, "layer2"),  # -> 32x32
            layer(wide, wide, "layer3"),
            nn.AvgPool1d(2),
            layer(wide, wide, "layer4"),  # -> 32x16
        )
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(wide, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.stem(x))  # (N, 24, 65) -> (N, 32, 16)
        return self.classifier(self.flatten(self.pool(x)))  # (N, 10)


def layer(in_width: int, out_width: int, label: str) -> LayerChoice:
    candidates = {"plain": plain(in_width, out_width), "separable": separable(in_width, out_width)}
    return LayerChoice({**candidates, "skip": nn.Identity()} if in_width == out_width else candidates, label)


def plain(in_width: int, out_width: int) -> nn.Sequential:
    return nn.Sequential(causal_conv(in_width, out_width, 9), nn.BatchNorm1d(out_width), nn.ReLU())


def separable(in_width: int, out_width: int) -> nn.Sequential:
    depthwise = nn.Conv1d(in_width, in_width, 9, groups=in_width, bias=False)
    return nn.Sequential(
        nn.ConstantPad1d((8, 0), 0.0),
        *(depthwise, nn.BatchNorm1d(in_width), nn.ReLU()),
        *(nn.Conv1d(in_width, out_width, 1, bias=False), nn.BatchNorm1d(out_width), nn.ReLU()),
    )


def all_plain(space: nn.Module) -> dict[str, str]:
    """The plain convolution in every place."""
    return dict.fromkeys(decisions(space), "plain")


# ---- data ------------------------------------------------------------------------------------------------------


def spoken_digits(place: Path) -> Datasets:
    """Logarithmic mel spectra of the recordings, (24, 65) each; mean 0 and deviation 1 over the training set."""
    recordings, labels, numbers = read_recordings(place)
    cut = torch.zeros(len(recordings), LENGTH)
    for row, samples in zip(cut, recordings, strict=True):
        row[: len(samples)] = torch.from_numpy(samples[:LENGTH].astype(np.float32) / 2**15)
    x = torch.cat([spectra(part) for part in cut.split(CHUNK)])
    std, mean = torch.std_mean(x[numbers >= 10])
    of = [numbers >= 10, (numbers >= 5) & (numbers < 10), numbers < 5]
    train, validation, test = (TensorDataset((x[part] - mean) / std, labels[part]) for part in of)
    return Datasets(train, mixed(validation), test)


def mixed(data: TensorDataset) -> TensorDataset:
    """In random order: along a choice, BatchNorm is evaluated with the statistics of each batch.

    Files are sorted by class, and of a batch of one class the statistics tell nothing about the network.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(SEED))
    return TensorDataset(*(tensor[order] for tensor in data.tensors))


def read_recordings(place: Path) -> tuple[list[np.ndarray], Tensor, Tensor]:
    """int16 samples at 8 kHz of every recording, its digit, and its number among those of one speaker and digit."""
    packed = place / "fsdd_8khz.npz" if place.is_dir() else place
    if packed.is_file():
        with np.load(packed, allow_pickle=False) as file:
            audio, offsets = file["audio"], file["offsets"]
            of_file = [torch.from_numpy(file[name].astype(np.int64)) for name in ("digit", "index")]
        return [audio[a:b] for a, b in pairwise(offsets)], of_file[0], of_file[1]
    paths = sorted(place.glob("recordings/*.wav"))
    if not paths:
        raise ConfigurationError(
            f"--data {place}: neither {packed} nor a recording in {place / 'recordings'}; give the folder of "
            "https://github.com/Jakobovski/free-spoken-digit-dataset"
        )
    named = torch.tensor([[int(part) for part in path.stem.split("_")[::2]] for path in paths])  # 7_jackson_32.wav
    return [read_wav(path) for path in paths], named[:, 0], named[:, 1]


def read_wav(path: Path) -> np.ndarray:
    with wave.open(str(path), "rb") as file:
        if (file.getnchannels(), file.getsampwidth(), file.getframerate()) != (1, 2, RATE):
            raise ConfigurationError(f"{path}: {file.getparams()}; one channel of 16 bits at {RATE} Hz is needed")
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


def spectra(samples: Tensor) -> Tensor:
    """(N, 8192) samples -> (N, 24, 65): the logarithm of the power in bands of equal width on the mel scale."""
    found = torch.stft(samples, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True)  # (N, 129, 65)
    return torch.log(mel_bands() @ found.abs().square() + 1e-5)


def mel_bands() -> Tensor:
    """(24, 129): triangles with corners at equal steps of 2595 log10(1 + f / 700), from 0 to 4 kHz."""
    top = 2595 * np.log10(1 + RATE / 2 / 700)
    corners = torch.from_numpy(700 * (10 ** (np.linspace(0, top, BANDS + 2) / 2595) - 1)).float()[:, None]  # Hz
    f = torch.linspace(0, RATE / 2, WINDOW // 2 + 1)
    rising = (f - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - f) / (corners[2:] - corners[1:-1])
    return torch.minimum(rising, falling).clamp_min(0)


def pixel_by_pixel(seed: int = SEED) -> Datasets:
    """The 1,797 digits of scikit-learn as signals (1, 64): 1,078 for training, 360 to choose the epoch, 359 to test."""
    data = digits()
    x = data.images.flatten(2).float() / 255 - 0.3  # (N, 1, 64); 0.3 is about the mean
    rest, test = parts(list(range(len(data))), data.targets, 0.2, seed)
    train, validation = parts(rest, data.targets, 0.25, seed)
    return Datasets(*(TensorDataset(x[part], data.targets[part]) for part in (train, validation, test)))


def parts(indices: list[int], targets: Tensor, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Cut in two, the second of this share, every class in the same proportion."""
    split = stratified_split(targets[indices].tolist(), share, seed)
    return [indices[i] for i in split.weight], [indices[i] for i in split.arch]


# ---- the job ---------------------------------------------------------------------------------------------------


def search(pit: PIT, data: Datasets, budget: float, plan: Plan) -> PITSuperNetTrainer:
    trainer = PITSuperNetTrainer(
        pit,
        loss=LabelSmoothingLoss(),
        metrics=partial(accuracy, topk=(1,)),
        optimizer=torch.optim.AdamW(pit.net_parameters(), LR),
        warmup_epochs=plan.warmup,
        num_epochs=plan.search,
        finetune_epochs=plan.finetune,
        finetune_scheduler=cosine,
        targets={"params": budget},
        mask_learning_rate=plan.mask_lr,
        arch_learning_rate=plan.alpha_lr,
        # A softmax that is undecided at the end would promise a mixture, and one candidate is exported.
        temperature=Temperature(1.0, 0.2, "exponential"),
        dataset=data.train,
        valid_dataset=data.validation,
        batch_size=BATCH,
        workers=0,
        device="cpu",
        seed=SEED,
    )
    trainer.train()
    return trainer


@torch.no_grad()
def check(pit: PIT, written: Path, budget: float, signals: Tensor) -> nn.Module:
    """Size and operations of the exported network and of that of the JSON, and what they compute for (N, C, T)."""
    nets = {"exported": pit.export(), "rebuilt from JSON": fixed(pit, written)}
    expected = nets["exported"].eval()(signals)
    for name, net in nets.items():
        parameters, output = sum(p.numel() for p in net.parameters()), net.eval()(signals)
        assert parameters == pit.hard_cost("params") <= budget, f"{name}: {parameters} parameters, at most {budget:.0f}"
        assert macs_by_torch(net, signals[:1]) == pit.hard_cost("macs"), f"{name}: other MACs"
        assert float((output - expected).abs().max()) <= 1e-4 * float(expected.abs().max()), f"{name}: other outputs"
    return nets["rebuilt from JSON"]


def macs_by_torch(net: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        net(x)
    return counter.get_total_flops() // 2  # a multiplication and an addition each


@torch.no_grad()
def share_correct(net: nn.Module, data: TensorDataset) -> float:
    x, y = data.tensors
    return float((net.eval()(x).argmax(1) == y).float().mean())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="the spoken digits; without it, the digits of scikit-learn")
    parser.add_argument("--out", type=Path, default=Path("runs/pit_supernet_tcn"))
    parser.add_argument("--quick", action="store_true", help="few epochs; nothing is claimed of the accuracy")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    start, plan = time.perf_counter(), QUICK if args.quick else FULL
    data = pixel_by_pixel() if args.data is None else spoken_digits(args.data)
    print(f"{len(data.train)} signals for training, {len(data.validation)} and {len(data.test)} to choose and test")

    torch.manual_seed(SEED)
    space = SearchableTCN(data.shape[0])
    seed_size = sum(p.numel() for p in fixed(space, all_plain(space)).parameters())
    pit, budget = PIT(space, data.shape, cost=("params", "macs")), SHARE * seed_size
    trainer = search(pit, data, budget, plan)
    written = args.out / "arch.json"
    trainer.export(written)  # raises if the exported network computes something else than the searched one
    net = check(pit, written, budget, data.test.tensors[0][:200])
    correct = share_correct(net, data.test)

    arch = pit.arch()
    print(f"chosen: {', '.join(f'{label}: {arch[label]}' for label in pit.choices)}\n\n{pit.report()}\n")
    print(
        f"{pit.hard_cost('params'):,.0f} parameters of {seed_size:,} (at most {budget:,.0f}), "
        f"{pit.hard_cost('macs'):,.0f} MACs; test accuracy {correct:.3f}"
    )
    print(f"written: {written}; {time.perf_counter() - start:.0f} s")
    least = 0.8 if args.data is None else 0.9
    assert args.quick or correct >= least, f"test accuracy {correct:.3f} is below {least}"


if __name__ == "__main__":
    main()
