"""The long examples, on data small enough for a test: what they read, and that they run to their end."""

from __future__ import annotations

import importlib
import io
import json
import math
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from oneshot import CostModel, LayerChoice, fixed, load_fixed, measure_table
from oneshot.cost import Term, time_modules
from oneshot.data import ArrayDataset
from oneshot.errors import ConfigurationError
from oneshot.export import read_arch
from search_spaces.mobilenet import proxylessnas
from search_spaces.tcn import SmallTCNSizes, small_tcn

ROOT = Path(__file__).parent.parent
CIFAR = ROOT.parent / "shared" / "data" / "cifar10"
SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if "def main(" in path.read_text())
COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200))
TINY = [
    *("--size", "32", "--width-mult", "0.1", "--batch-size", "4", "--held-out", "9", "--ref", "1e5"),
    *("--warmup-epochs", "1", "--epochs", "2", "--retrain-epochs", "2", "--workers", "0", "--device", "cpu"),
]


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of examples/, imported as ``python examples/NAME.py`` does: with its folder on the path."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module(name)


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> Any:
    return example("common", monkeypatch)


@pytest.fixture
def cifar(monkeypatch: pytest.MonkeyPatch) -> Any:
    return example("proxyless_cifar10", monkeypatch)


@pytest.fixture
def imagenet(monkeypatch: pytest.MonkeyPatch) -> Any:
    return example("proxyless_imagenet", monkeypatch)


# ---- all of them -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_example_says_what_it_does(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example(name, monkeypatch)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as left:
        module.main()
    assert left.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith(f"usage: {name}.py ")
    assert module.__doc__.splitlines()[0] in printed


# ---- common ----------------------------------------------------------------------------------------------------


def two_choices() -> tuple[nn.Module, CostModel]:
    """4 architectures of 10 + {1, 5} + {2, 3} ms."""
    model = nn.Sequential(*(LayerChoice([nn.Identity(), nn.ReLU()], label) for label in ("a", "b")))
    rows = {"a": (1.0, 5.0), "b": (3.0, 2.0)}
    terms = [Term(ms, {label: frozenset({k})}) for label, row in rows.items() for k, ms in enumerate(row)]
    return model, CostModel("latency_ms", "ms", [*terms, Term(10.0, {})], model)


def test_the_networks_to_compare_with(common: Any) -> None:
    _, cost = two_choices()
    assert common.largest(cost) == {"a": 1, "b": 0}  # 18 ms
    assert common.smallest(cost) == {"a": 0, "b": 1}  # 13 ms
    drawn = [common.random_feasible(cost, 14.0, random.Random(seed)) for seed in range(20)]
    # 13 and 14 ms keep the target, 17 and 18 do not.
    assert {(choices["a"], choices["b"]) for choices in drawn} == {(0, 0), (0, 1)}


def test_retraining_learns_black_from_white(common: Any) -> None:
    labels = torch.arange(40) % 2
    images = (labels * 255).to(torch.uint8).view(40, 1, 1, 1).expand(40, 1, 4, 4).clone()
    seen = []

    def augment(batch: torch.Tensor) -> torch.Tensor:
        seen.append((tuple(batch.shape), float(batch.max())))
        return batch

    # The transform makes black -1 and white 1; without it two of four classes could not be told apart by a sign.
    data = ArrayDataset(images, labels, lambda batch: batch * 2 - 1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    common.retrain(net, data, 3, 0.1, 8, 0, augment)
    assert seen == [((8, 1, 4, 4), 1.0)] * 15  # 40 / 8 batches in each of 3 epochs
    assert common.test_accuracy(net, data) == 1.0


def test_the_table_has_the_costs_of_each_network(common: Any) -> None:
    model, cost = two_choices()
    nets = {"x": fixed(model, {"a": 0, "b": 0}), "y": fixed(model, {"a": 1, "b": 1})}
    took = common.measured_ms(nets, (1, 2))
    choices = {"x": {"a": 0, "b": 0}, "y": {"a": 1, "b": 1}}
    rows = common.table(choices, {"x": 0.5, "y": 0.25}, took, params=cost, macs=cost, latency=cost)
    assert [(row["network"], row["test accuracy"], row["predicted ms"]) for row in rows] == [
        ("x", 0.5, 14.0),
        ("y", 0.25, 17.0),
    ]
    assert all(row["measured ms"] > 0 for row in rows)


# ---- CIFAR-10 --------------------------------------------------------------------------------------------------


def write_packed(folder: Path, per_class: int) -> None:
    """A cifar10_jpeg.npz of images of one colour each: per class so many for training and one to test."""
    files, labels, is_test = [], [], []
    for label in range(10):
        for number in range(per_class + 1):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), (20 * label, 100, 10 * number)).save(buffer, "JPEG")
            files.append(buffer.getvalue())
            labels.append(label)
            is_test.append(number == per_class)
    np.savez(
        folder / "cifar10_jpeg.npz",
        blob=np.frombuffer(b"".join(files), np.uint8),
        offsets=np.cumsum([0, *map(len, files)]),
        labels=np.array(labels, np.uint8),
        is_test=np.array(is_test, np.uint8),
        classes=np.array([f"class {k}" for k in range(10)]),
    )


def test_packed_jpeg_files_are_read(cifar: Any, tmp_path: Path) -> None:
    write_packed(tmp_path, per_class=3)
    train, test = cifar.load(tmp_path, True, 100), cifar.load(tmp_path, False, 100)
    assert train.images.shape == (30, 3, 32, 32)
    assert train.targets.tolist() == [k for k in range(10) for _ in range(3)]
    assert test.targets.tolist() == list(range(10))
    for data, numbers in ((train, [0, 1, 2] * 10), (test, [3] * 10)):
        for image, label, number in zip(data.images.int(), data.targets.tolist(), numbers, strict=True):
            wanted = torch.tensor([20 * label, 100, 10 * number]).view(3, 1, 1)
            assert (image - wanted).abs().max() <= 3  # JPEG keeps one colour nearly, but not exactly


def test_fewer_images_keep_the_proportion_of_the_classes(cifar: Any, tmp_path: Path) -> None:
    write_packed(tmp_path, per_class=4)
    assert cifar.load(tmp_path, True, 20).targets.bincount().tolist() == [2] * 10


def test_a_folder_without_cifar_says_what_is_needed(cifar: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"data_batch_1\.bin"):
        cifar.load(tmp_path, True, 10)


@pytest.mark.skipif(not CIFAR.is_dir(), reason="the packed CIFAR-10 is only on our machines")
def test_the_packed_cifar10_is_complete(cifar: Any) -> None:
    with np.load(CIFAR / "cifar10_jpeg.npz", allow_pickle=False) as file:
        labels, is_test = file["labels"], file["is_test"].astype(bool)
    assert np.bincount(labels[~is_test]).tolist() == [5_000] * 10
    assert np.bincount(labels[is_test]).tolist() == [1_000] * 10
    train, test = cifar.load(CIFAR, True, 1_000), cifar.load(CIFAR, False, 100)
    assert (train.images.shape, test.images.shape) == ((1_000, 3, 32, 32), (100, 3, 32, 32))
    assert train.targets.bincount().tolist() == [100] * 10
    images = train.images.double() / 255
    mean, std = images.mean((0, 2, 3)), images.std((0, 2, 3))
    # What the example normalises with is of all 50,000; a sample of 1,000 scatters by 0.005 around it.
    assert torch.allclose(mean, torch.tensor(cifar.MEAN, dtype=torch.float64), atol=0.03)
    assert torch.allclose(std, torch.tensor(cifar.STD, dtype=torch.float64), atol=0.03)


def test_normalised_is_per_channel(cifar: Any) -> None:
    image = torch.tensor([0.4914, 0.4822 + 0.2435, 0.4465 - 0.2616]).view(3, 1, 1).expand(3, 2, 2)
    expected = torch.tensor([0.0, 1.0, -1.0]).view(3, 1, 1).expand(3, 2, 2)
    assert torch.allclose(cifar.normalised(image), expected, atol=1e-5)
    assert torch.allclose(cifar.normalised(image[None])[0], expected, atol=1e-5)


def test_a_random_crop_is_one_of_the_crops(cifar: Any) -> None:
    image = 1 + torch.arange(2 * 5 * 6.0).view(2, 5, 6)
    padded = np.pad(image.numpy(), ((0, 0), (1, 1), (1, 1)))
    crops = {padded[:, y : y + 5, x : x + 6].tobytes(): (y, x) for y in range(3) for x in range(3)}
    got = cifar.random_crop(image.expand(200, 2, 5, 6), padding=1)
    assert got.shape == (200, 2, 5, 6)
    found = {crops[part.contiguous().numpy().tobytes()] for part in got}
    assert found == set(crops.values())  # all 9, each missed by 200 draws with probability 6e-11


def test_a_random_flip_mirrors_about_half(cifar: Any) -> None:
    image = torch.arange(6.0).view(1, 2, 3)
    got = cifar.random_flip(image.expand(200, 1, 2, 3))
    mirrored = [part.tolist() == [[[2.0, 1.0, 0.0], [5.0, 4.0, 3.0]]] for part in got]
    assert all(flip or torch.equal(part, image) for flip, part in zip(mirrored, got, strict=True))
    assert 60 < sum(mirrored) < 140  # 100 and more than five standard deviations of 7.1


def test_the_cifar_example_runs_to_its_end(
    cifar: Any, common: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Rough times are as good here, and the many rounds of measuring would take longer than all the rest.
    monkeypatch.setattr(cifar, "measure_table", partial(measure_table, min_run_time=1e-4, cache=False))
    monkeypatch.setattr(common, "time_modules", lambda nets, args, **_: time_modules(nets, args, min_run_time=1e-4))
    monkeypatch.setattr(cifar, "BATCH", 16)
    write_packed(tmp_path, per_class=8)  # 80 images: 4 batches for the weights, 1 for the alphas
    short = ["--warmup-epochs", "0", "--epochs", "2", "--retrain-epochs", "1"]
    cifar.main(["--data", str(tmp_path), "--out", str(tmp_path / "run"), *short])
    printed = capsys.readouterr().out
    assert all(f"| {name} " in printed for name in ("searched", "largest", "random 3"))
    assert len(read_arch(tmp_path / "run" / "arch.json").arch) == 6


# ---- PIT -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pit_tcn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example on a network of 6 -> 4 -> 4 channels and 7 steps per epoch, with every run of a few seconds."""
    module = example("pit_tcn", monkeypatch)
    monkeypatch.setattr(module, "small_tcn", lambda: small_tcn(SmallTCNSizes(blocks=((4, 5), (4, 5)))))
    monkeypatch.setattr(module, "BATCH", 16)
    monkeypatch.setattr(module, "QUICK", module.Plan(1, 3, 1, 0.1, 64))
    monkeypatch.setattr(module, "BUDGETS", (200,))
    return module


def test_the_pit_example_runs_to_its_end(
    pit_tcn: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = example("smartwatch", monkeypatch).Recording
    generator = torch.Generator().manual_seed(0)
    recordings = [
        # Three windows each, of exercises that differ in their frequency.
        recording(torch.sin(torch.arange(256) * (1 + k) / 20) + torch.randn(6, 256, generator=generator), k, person)
        for person in range(1, 11)
        for k in range(7)
    ]
    monkeypatch.setattr(pit_tcn, "load_recordings", lambda path: recordings)
    pit_tcn.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    # 6 persons, 1 and 3, times 7 exercises and floor((256 - 128) / 64) + 1 = 3 windows.
    assert "126 windows for training, 21 and 63 to choose and test" in printed
    control, small = json.loads((tmp_path / "results.json").read_text())
    # Convolutions (6 + 4 + 4 + 4) * 4 * 5, shortcut 6 * 4, five BatchNorms of 2 * 4, classifier 4 * 7 + 7.
    assert (control["budget"], control["parameters"]) == (None, 360 + 24 + 40 + 35)
    assert small["parameters"] <= small["budget"] == 200
    assert "| at most 200 |" in printed
    assert {path.name for path in tmp_path.iterdir()} == {
        *("200_seed0.json", "control_seed0.json", "results.json", "smallest.onnx"),
    }


def test_the_accuracies_of_the_pit_example_are_compared_with_the_control(
    pit_tcn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pit_tcn, "BUDGETS", (200, 100))
    monkeypatch.setattr(pit_tcn, "MARGIN", 0.04)

    def check(*accuracies: float) -> None:
        """Two runs of the control, of 200 and of 100."""
        budgets = (None, None, 200, 200, 100, 100)
        pairs = zip(budgets, accuracies, strict=True)
        pit_tcn.check_accuracies([pit_tcn.Run(budget, 0, found, 0.0, 1, 1, "", 0.0) for budget, found in pairs])

    check(0.7, 0.9, 0.70, 0.83, 0.77, 0.76)  # 0.765 twice, allowed are means of 0.76 and more
    with pytest.raises(AssertionError, match=r"at most 200: 0\.755, the control has 0\.800"):
        check(0.7, 0.9, 0.68, 0.83, 0.77, 0.76)
    with pytest.raises(AssertionError, match=r"at most 100: 0\.755, the control has 0\.800"):
        check(0.7, 0.9, 0.70, 0.83, 0.77, 0.74)


def test_shaken_windows_depend_on_torchs_generator_alone(pit_tcn: Any) -> None:
    windows = torch.utils.data.TensorDataset(torch.ones(2, 6, 4000), torch.tensor([3, 5]))
    shaken = pit_tcn.Shaken(windows)
    torch.manual_seed(0)
    x, y = shaken[1]
    torch.manual_seed(0)
    assert torch.equal(shaken[1][0], x)
    assert (len(shaken), int(y), x.shape) == (2, 5, (6, 4000))
    # Along an axis one scale and one shift; around them noise of 0.1, to within 4 / sqrt(2 * 4000) of it.
    assert torch.allclose(x.std(1), torch.full((6,), 0.1), rtol=0.045)
    assert x.mean(1).std() > 0.05


# ---- ImageNet --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ with 3 classes of 12 and 2 noisy images of one colour, in several formats and modes."""
    root = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for part, n in (("train", 12), ("val", 2)):
        for name, colour in zip("abc", COLOURS, strict=True):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = np.clip(np.array(colour) + noise.integers(-30, 30, (40, 40, 3)), 0, 255).astype(np.uint8)
                image = Image.fromarray(pixels)
                if i == 0:
                    image.convert("RGBA").save(root / part / name / "0.png")
                else:
                    image.save(root / part / name / f"{i}.jpg")
    Image.new("L", (40, 30), 90).save(root / "train" / "a" / "grey.png")
    return root


def test_images_of_a_folder(imagenet: Any, folder: Path) -> None:
    data = imagenet.ImageFolder(folder / "train", imagenet.EvalTransform(16))
    assert data.classes == ["a", "b", "c"]
    assert data.targets == [0] * 13 + [1] * 12 + [2] * 12
    for index in (0, 12, 20, 36):  # RGBA, grey, JPEG
        image, label = data[index]
        assert image.shape == (3, 16, 16)
        assert label == data.targets[index]
    red = data[1][0].mean((1, 2)) * torch.tensor(imagenet.STD) + torch.tensor(imagenet.MEAN)
    assert torch.allclose(red * 255, torch.tensor([200.0, 30.0, 30.0]), atol=8)


def test_a_missing_folder_is_named(imagenet: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no such folder"):
        imagenet.ImageFolder(tmp_path / "train", imagenet.EvalTransform(16))
    (tmp_path / "a").mkdir()
    with pytest.raises(ConfigurationError, match="no image"):
        imagenet.ImageFolder(tmp_path, imagenet.EvalTransform(16))


def test_evaluation_sees_the_middle(imagenet: Any) -> None:
    # 512 x 256 at size 224: nothing is resized, columns 144 to 367 and rows 16 to 239 are kept.
    pixels = np.zeros((256, 512, 3), np.uint8)
    pixels[..., 0] = np.arange(512) // 2
    pixels[..., 1] = np.arange(256)[:, None]
    image = imagenet.EvalTransform(224)(Image.fromarray(pixels))
    back = image * torch.tensor(imagenet.STD).view(3, 1, 1) + torch.tensor(imagenet.MEAN).view(3, 1, 1)
    kept = (back * 255).round().int()
    assert kept.shape == (3, 224, 224)
    assert kept[0, 0].tolist() == [column // 2 for column in range(144, 368)]
    assert kept[1, :, 0].tolist() == list(range(16, 240))
    assert imagenet.EvalTransform(224)(Image.new("RGB", (100, 37))).shape == (3, 224, 224)


@given(width=st.integers(1, 3000), height=st.integers(1, 3000), seed=st.integers(0, 2**32))
def test_a_random_box_is_inside_the_image(width: int, height: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        random_box = example("proxyless_imagenet", monkeypatch).random_box
    random.seed(seed)
    left, top, right, bottom = random_box(width, height)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    # 8 % of the area and 3:4 to 4:3, but for the rounding of the sides and for images that are thinner than that.
    if min(width, height) > 50 and 0.5 < width / height < 2:
        assert (right - left) * (bottom - top) >= 0.06 * width * height
        assert 0.7 < (right - left) / (bottom - top) < 1.42


def test_colours_change_within_their_strengths(imagenet: Any) -> None:
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    assert imagenet.jittered(grey, {}) == grey
    levels = {imagenet.jittered(grey, {"brightness": 0.4}).getpixel((0, 0))[0] for _ in range(50)}
    assert 60 <= min(levels) < 90 < 110 < max(levels) <= 140  # 100 * 0.6 to 100 * 1.4
    red = Image.new("RGB", (4, 4), (200, 0, 0))
    turned = [imagenet.jittered(red, {"hue": 0.1}).getpixel((0, 0)) for _ in range(50)]
    # A tenth of the circle is 36 degrees, where green or blue stands at 36 / 60 of red.
    assert all(r == 200 and min(g, b) == 0 and max(g, b) <= 125 for r, g, b in turned)
    assert max(g for _, g, _ in turned) > 40 < max(b for _, _, b in turned)


def test_weight_decay_spares_batchnorm(imagenet: Any) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    decayed, spared = imagenet.decayed_groups(net)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (4e-5, 0.0)
    assert [p.numel() for p in spared["params"]] == [4, 4]
    assert [p.numel() for p in decayed["params"]] == [3 * 4 * 9, 4, 8, 2]


def test_the_warmup_starts_at_twice_the_rate_of_the_search(imagenet: Any) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.025)
    schedule = imagenet.warmup_cosine(optimizer, 10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.025 * (1 + math.cos(math.pi * t / 10)) for t in range(10)])


def test_search_and_retrain_on_a_tiny_folder(
    imagenet: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["--data", str(folder), *TINY]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    imagenet.main([*args, "--out", str(whole)])
    found = (whole / "arch.json").read_bytes()
    net = load_fixed(lambda: proxylessnas(3, 0.1), whole / "arch.json")
    trained = torch.load(whole / "network.pt", weights_only=True)
    net.load_state_dict(trained)
    assert len(read_arch(whole / "arch.json").arch) == 21

    # Stopped after the first of two epochs and taken up again, retraining ends with the same network.
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    again = [*args, "--retrain", str(whole / "arch.json"), "--out", str(stopped)]
    score = imagenet.score
    monkeypatch.setattr(imagenet, "score", stop)
    with pytest.raises(KeyboardInterrupt):
        imagenet.main(again)
    monkeypatch.setattr(imagenet, "score", score)
    assert not (stopped / "network.pt").exists()
    imagenet.main([*again, "--resume"])
    resumed = torch.load(stopped / "network.pt", weights_only=True)
    assert all(torch.equal(trained[key], resumed[key]) for key in trained)
    assert torch.load(stopped / "retrain.ckpt", weights_only=True)["step"] == 2 * (37 // 4)

    # A finished run, taken up again, writes its results again.
    (whole / "arch.json").unlink()
    (whole / "network.pt").unlink()
    imagenet.main([*args, "--out", str(whole), "--resume"])
    assert (whole / "arch.json").read_bytes() == found
    rewritten = torch.load(whole / "network.pt", weights_only=True)
    assert all(torch.equal(trained[key], rewritten[key]) for key in trained)


def test_other_classes_in_val_are_an_error(imagenet: Any, tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "val/a", "val/c"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / name / "0.png")
    with pytest.raises(ConfigurationError, match=r"\['b', 'c'\] are only in one"):
        imagenet.main(["--data", str(tmp_path), "--retrain", "arch.json", "--out", str(tmp_path / "run")])
