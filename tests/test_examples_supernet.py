"""The examples that search choices, on data small enough for a test: their spaces, their data, their tables, their end.

``test_examples.py`` has what holds for all examples.
"""

from __future__ import annotations

import importlib
import json
import math
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from oneshot import count_macs, count_params
from oneshot.errors import ConfigurationError

ROOT = Path(__file__).parent.parent


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of examples/, imported as ``python examples/NAME.py`` does: with its folder on the path."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module(name)


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> Any:
    return example("supernet_digits", monkeypatch)


@pytest.fixture
def tcn(monkeypatch: pytest.MonkeyPatch) -> Any:
    return example("pit_supernet_tcn", monkeypatch)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    return example("bench_joint", monkeypatch)


def signals(n: int, steps: int = 32) -> TensorDataset:
    """A slow or a fast wave, and some noise."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 2
    wave_of = torch.sin(torch.arange(steps) * (0.2 + y[:, None]))  # (n, steps)
    return TensorDataset(wave_of[:, None] + 0.1 * torch.randn(n, 1, steps, generator=generator), y)


# ---- choices of layers -----------------------------------------------------------------------------------------


def test_the_layers_of_the_small_cnn(layers: Any) -> None:
    space, image = layers.space(), (torch.zeros(layers.IMAGE),)
    params, macs = count_params(space), count_macs(space, image)
    plain = dict.fromkeys(macs.sizes, 0)
    # Stem 16 * 9 + 2 * 16, layers 16 * 16 * 9 + 32, 16 * 32 * 9 + 64, 2 * (32 * 32 * 9 + 64), classifier 32 * 10 + 10.
    assert params.of(plain) == 176 + 2336 + 4672 + 2 * 9280 + 330
    # 64 pixels at first, 16 from the second layer on.
    assert macs.of(plain) == 64 * 144 + 64 * 2304 + 16 * 4608 + 2 * 16 * 9216 + 320
    assert dict(macs.sizes) == {"layer1": 4, "layer2": 3, "layer3": 4, "layer4": 4}


def test_who_stands_beside_the_found_layers(layers: Any) -> None:
    macs = count_macs(layers.space(), (torch.zeros(layers.IMAGE),))
    found, target = {"layer1": 3, "layer2": 2, "layer3": 2, "layer4": 2}, 150_000.0
    named = layers.to_compare(found, macs, target)
    assert list(named) == ["searched", "plain 3x3", "random 1", "random 2", "random 3", "random 4"]
    assert named["plain 3x3"] == dict.fromkeys(found, 0)
    drawn = [named[f"random {i}"] for i in (1, 2, 3, 4)]
    assert len({tuple(choices.values()) for choices in [found, *drawn]}) == 5
    assert all(75_000 <= macs.of(choices) <= target for choices in drawn)


def test_the_example_of_layers_runs_to_its_end(
    layers: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest, _ = layers.holdout(layers.digits(), 1500, 0)  # 297 images: 3 steps per epoch
    monkeypatch.setattr(layers, "digits", lambda: rest)
    monkeypatch.setattr(
        layers, "holdout", lambda data, n, seed: (data.subset(range(200)), data.subset(range(200, 297)))
    )
    for name, value in (("WARMUP_EPOCHS", 0), ("SEARCH_EPOCHS", 12), ("RETRAIN_EPOCHS", 1), ("REPEATS", 1)):
        monkeypatch.setattr(layers, name, value)
    monkeypatch.setattr(layers, "MARGIN", 1.0)
    layers.main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(f"| {name} " in printed for name in ("searched", "plain 3x3", "random 4"))
    written = json.loads((tmp_path / "arch.json").read_text())
    assert list(written["arch"]) == ["layer1", "layer2", "layer3", "layer4"]
    assert written["costs"]["macs"] <= 0.3 * 525_632


# ---- choices and masks -----------------------------------------------------------------------------------------


def write_recordings(folder: Path, rate: int = 8000) -> None:
    """recordings/DIGIT_SPEAKER_NUMBER.wav: tones of 500 and 1,500 Hz, 0.25 s and 2 s long."""
    (folder / "recordings").mkdir()
    for digit, hertz in enumerate((500, 1500)):
        for number in range(12):
            t = np.arange(2000 if number % 2 else 16000) / 8000
            with wave.open(str(folder / "recordings" / f"{digit}_anna_{number}.wav"), "wb") as file:
                file.setparams((1, 2, rate, 0, "NONE", ""))
                file.writeframes((8000 * np.sin(2 * math.pi * hertz * t)).astype("<i2").tobytes())


def test_spoken_digits_are_read_from_wav_and_packed_files(tcn: Any, tmp_path: Path) -> None:
    write_recordings(tmp_path)
    data = tcn.spoken_digits(tmp_path)
    # Numbers 10 and 11 train, 5 to 9 choose, 0 to 4 test, of two digits each.
    assert [len(part) for part in data] == [4, 10, 10]
    assert data.shape == (24, 65)  # 1 + 8192 / 128 frames
    std, mean = torch.std_mean(data.train.tensors[0])
    assert (float(mean), float(std)) == pytest.approx((0, 1), abs=1e-4)
    x, y = data.test.tensors
    # 500 Hz is at 607 mel, 1,500 Hz at 1291, in steps of 2146 / 25 = 85.8: in the bands 7 and 15, from 1 on.
    for digit, band in ((0, 6), (1, 14)):
        assert set(x[y == digit][:, :, 3].argmax(1).tolist()) == {band}

    recordings, labels, numbers = tcn.read_recordings(tmp_path)
    packed = tmp_path / "fsdd_8khz.npz"
    offsets = np.cumsum([0, *map(len, recordings)])
    np.savez(packed, audio=np.concatenate(recordings), offsets=offsets, digit=labels.numpy(), index=numbers.numpy())
    for place in (packed, tmp_path):
        again = tcn.spoken_digits(place)
        assert all(
            torch.equal(a, b)
            for p, q in zip(data, again, strict=True)
            for a, b in zip(p.tensors, q.tensors, strict=True)
        )


def test_a_validation_set_in_the_order_of_its_classes_is_mixed(tcn: Any) -> None:
    y = torch.arange(600) // 60
    mixed = tcn.mixed(TensorDataset(y[:, None].float(), y))
    x, labels = mixed.tensors
    assert torch.equal(x[:, 0].long(), labels)
    assert torch.equal(labels.sort()[0], y)
    assert min(len(part.unique()) for part in labels.split(64)) >= 8  # of ten classes


def test_places_without_spoken_digits_are_errors(tcn: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="free-spoken-digit-dataset"):
        tcn.spoken_digits(tmp_path)
    write_recordings(tmp_path, rate=16000)
    with pytest.raises(ConfigurationError, match="8000 Hz is needed"):
        tcn.spoken_digits(tmp_path)


def test_digits_pixel_by_pixel_are_cut_into_three(tcn: Any) -> None:
    data = tcn.pixel_by_pixel(seed=3)
    assert [len(part) for part in data] == [1078, 360, 359]
    every = torch.cat([part.tensors[0] for part in data])
    assert every.shape == (1797, 1, 64)
    # The same images, whatever the order: 0 and 16 of 16 became -0.3 and 0.7.
    wanted = tcn.digits().images.flatten(2) / 255 - 0.3
    assert torch.allclose(every.sum((1, 2)).sort()[0], wanted.sum((1, 2)).sort()[0], atol=1e-4)
    assert (float(every.min()), float(every.max())) == pytest.approx((-0.3, 0.7))


def test_the_example_of_layers_and_sizes_runs_to_its_end(
    tcn: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = tcn.SearchableTCN
    monkeypatch.setattr(tcn, "SearchableTCN", lambda channels: space(channels, (4, 6), n_classes=2))
    monkeypatch.setattr(tcn, "pixel_by_pixel", lambda: tcn.Datasets(signals(256), signals(32), signals(32)))
    monkeypatch.setattr(tcn, "QUICK", tcn.Plan(1, 8, 1, 5e-2, 2e-1))
    monkeypatch.setattr(tcn, "BATCH", 16)
    tcn.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "256 signals for training, 32 and 32 to choose and test" in printed
    # Stem 4 * 9 + 8, layers 4 * 4 * 9 + 8, 4 * 6 * 9 + 12, 2 * (6 * 6 * 9 + 12), classifier 6 * 2 + 2.
    assert f"parameters of {44 + 152 + 228 + 672 + 14:,} (at most 222)" in printed
    written = json.loads((tmp_path / "arch.json").read_text())
    assert written["arch"]["layer2"] in ("plain", "separable")
    assert written["costs"]["params"] <= 222


# ---- the comparison --------------------------------------------------------------------------------------------


def test_the_comparison_runs_once_and_is_taken_up_again(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bench.Data(signals(128), signals(32), signals(48))
    space = bench.SearchableTCN
    task = bench.Task(
        "waves", (1, 32), lambda: space(1, (4, 6), n_classes=2), lambda seed: data, bench.Plan(1, 12, 1), 0.5
    )
    monkeypatch.setattr(bench, "quick_task", lambda: task)
    monkeypatch.setattr(bench, "BATCH", 16)
    arguments = ["--quick", "--out", str(tmp_path / "runs.json")]
    bench.main(arguments)
    written = json.loads((tmp_path / "runs.json").read_text())
    assert [run["method"] for run in written["runs"]] == ["joint", "sequential", "masks alone"]
    for run in written["runs"]:
        assert (run["seed"], run["epochs"], run["budget"]) == (0, 14, 555)  # half of 1,110 parameters
        assert run["error"] or run["params"] <= 555
        assert run["error"] or 0 <= run["accuracy"] <= 1
    first = capsys.readouterr().out

    # Nothing is left to run.
    monkeypatch.setattr(bench, "run", None)
    bench.main(arguments)
    again = capsys.readouterr().out
    assert first.split("\n\n")[1:] == again.split("\n\n")[1:]
    monkeypatch.setattr(bench, "LR", 5.0)
    with pytest.raises(ConfigurationError, match=r"its runs of waves have the settings .* give another"):
        bench.main(arguments)


def test_a_search_without_a_network_within_the_budget_says_so(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BATCH", 16)
    data = bench.Data(signals(32), signals(8), signals(8))
    # The biases of the classifier alone are ten parameters.
    task = bench.Task("waves", (1, 32), lambda: bench.SearchableTCN(1), lambda seed: data, bench.Plan(0, 1, 0), 1e-3)
    run = bench.run(task, "masks alone", 0)
    assert (run.params, run.accuracy) == (None, None)
    assert "the smallest masks leave 35" in run.error


def test_the_table_and_the_paired_differences(bench: Any) -> None:
    correct = {
        "joint": (0.90, 0.94, 0.98),
        "sequential": (0.90, 0.90, 0.95),
        "masks alone": (0.80, None, 0.90),
    }
    runs = [
        bench.Run("waves", method, seed, 100, 14, 2.0, value, value, 90 + seed, 1000, error="" if value else "no epoch")
        for method, values in correct.items()
        for seed, value in enumerate(values)
    ]
    rows = bench.summary(runs)
    # Of 0.90, 0.94 and 0.98 the mean is 0.94 and the deviation 0.04; of 0.8 and 0.9 they are 0.85 and 0.1 / sqrt(2).
    assert [(row["search"], row["met"], row["test accuracy"]) for row in rows] == [
        ("joint", "3 of 3", "0.940 ± 0.040"),
        ("sequential", "3 of 3", "0.917 ± 0.029"),
        ("masks alone", "2 of 3", "0.850 ± 0.071"),
    ]
    assert (rows[0]["parameters"], rows[0]["at most"]) == ("91 ± 1", "100")
    # 0, 4 and 3 points: 7 / 3 ± 2.08 / sqrt(3); 10 and 8 points: 9 ± sqrt(2) / sqrt(2); 10 and 5: 7.5 ± 3.54 / sqrt(2).
    assert [(row["points"], row["pairs"]) for row in bench.differences(runs)] == [
        ("+2.33 ± 1.20", "3"),
        ("+9.00 ± 1.00", "2"),
        ("+7.50 ± 2.50", "2"),
    ]
