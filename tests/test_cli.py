"""The command line against hand counts, fixed models and enumeration; and what it says when it cannot work."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from random_spaces import architectures, random_space
from torch import nn

import oneshot
from oneshot import LatencyTable, count_macs, decisions, fixed
from oneshot.cli import main
from oneshot.cost import count_peak_memory, decode
from oneshot.cost.nn_meter import nn_meter_latency
from oneshot.errors import ConfigurationError
from oneshot.export.arch import arch_of

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
TINY, PUBLISHED = DATA / "nn_meter_tiny", DATA / "proxyless_mobile_trim.yaml"

# stem: 4 * 3 weights + 3 biases, 12 MACs. In 'op', 'small' is 3 * 3 + 3 and 9 MACs. head: 3 * 2 + 2 and 6 MACs.
SMALL = """
import torch
from torch import nn
from oneshot import LayerChoice


def space():
    print("made")
    op = LayerChoice({"small": nn.Linear(3, 3), "skip": nn.Identity()}, label="op")
    return nn.Sequential(nn.Linear(4, 3), op, nn.Linear(3, 2))


class Nested(nn.Module):
    '''Registered the other way round than it runs.'''

    def __init__(self):
        super().__init__()
        inner = LayerChoice({"two": nn.Linear(3, 3), "none": nn.Identity()}, label="inner")
        outer = {"deep": nn.Sequential(nn.Linear(3, 3), inner), "none": nn.Identity()}
        self.head = nn.Linear(3, 2)
        self.outer = LayerChoice(outer, label="outer")
        self.stem = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.outer(self.stem(x)))


def plain():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 2)

    def forward(self, words, scale):
        assert words.dtype is torch.int64 and words.max() == 0
        return self.head(self.table(words) * scale)


def tanh():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh())


def width(n):
    return nn.Linear(n, n)


def number():
    return 3


twelve = 12
layer = nn.Linear(4, 4)
"""


@pytest.fixture
def net(tmp_path: Path) -> str:
    path = tmp_path / "net.py"
    path.write_text(SMALL)
    return str(path)


def report(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    assert main(["cost", *map(str, argv), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["version"]) == ("oneshot-cost", 1)
    return found


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main(["cost", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


def holds(when: Mapping[str, list[str]], arch: Mapping[str, str]) -> bool:
    return all(arch[label] in names for label, names in when.items())


def by_parts(cost: Mapping[str, Any], arch: Mapping[str, str]) -> float:
    joint = sum(term["value"] for term in cost["joint"] if holds(term["when"], arch))
    return cost["fixed"] + sum(row[arch[label]] for label, row in cost["choices"].items()) + joint


def by_layers(cost: Mapping[str, Any], arch: Mapping[str, str]) -> float:
    return sum(row["value"] for row in cost["layers"] if holds(row["when"], arch))


# --- a small space by hand --------------------------------------------------------------------------------------


def test_text_of_a_small_space(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", net + ":space", "--input", "1,4"]) == 0
    out, err = capsys.readouterr()
    assert out == textwrap.dedent(f"""\
        {net}:space on 1x4 float32

        layer               when      params  macs
        0                   always        15    12
        1.candidates.small  op=small      12     9
        2                   always         8     6

        choice  option  params  macs
        op      small       12     9
        op      skip         0     0

        cost    unit        fixed  minimum  maximum
        params  parameters     23       23       35
        macs    MAC            18       18       27
        choices: 1, architectures: 2
        """)
    assert err == "made\n"  # what the factory printed


def test_json_of_a_small_space(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(capsys, net + ":space", "--input", "1,4", "--cost", "macs") == {
        "format": "oneshot-cost",
        "version": 1,
        "model": net + ":space",
        "hardware": None,
        "input": [{"shape": [1, 4], "dtype": "float32"}],
        "architectures": 2,
        "costs": {
            "macs": {
                "unit": "MAC",
                "fixed": 18.0,
                "minimum": 18.0,
                "maximum": 27.0,
                "largest_is_found": False,
                "choices": {"op": {"small": 9.0, "skip": 0.0}},
                "joint": [],
                "layers": [
                    {"path": "0", "when": {}, "value": 12.0},
                    {"path": "1.candidates.small", "when": {"op": ["small"]}, "value": 9.0},
                    {"path": "2", "when": {}, "value": 6.0},
                ],
            }
        },
        "notes": [],
    }


def test_nested_choices_in_the_order_of_the_run(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", net + ":Nested", "--input", "1,4", "--cost", "params"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[3:7]]
    assert rows == [
        ["stem", "always", "15"],
        ["outer.candidates.deep.0", "outer=deep", "12"],
        ["outer.candidates.deep.1.candidates.two", "outer=deep,", "inner=two", "12"],
        ["head", "always", "8"],
    ]
    joint = "+ joint terms: params has 1 that depend on several choices at once, such as 12 parameters while "
    assert f"{joint}outer=deep, inner=two" in lines
    assert lines[-2:] == ["params  parameters     23       23       47", "choices: 2, architectures: 4"]


def test_network_without_choices(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", net + ":plain", "--input", "2,4", "--cost", "ops,peak_memory"]) == 0
    # 12 + 3 and 6 + 2 operations of one sample; at the ReLU and before, 2 * (4 + 3) numbers of 4 bytes are alive
    assert capsys.readouterr().out == textwrap.dedent(f"""\
        {net}:plain on 2x4 float32

        layer  when    ops
        0      always   15
        2      always    8

        cost         unit   total
        ops          op        23
        peak_memory  bytes     56
        no choices: one architecture
        """)
    found = report(capsys, net + ":plain", "--input", "2,4", "--cost", "ops,peak_memory")
    assert found["costs"]["ops"]["choices"] == {}
    nothing = {"fixed": None, "choices": None, "joint": None, "layers": None, "largest_is_found": False}
    assert found["costs"]["peak_memory"] == {"unit": "bytes", "minimum": 56.0, "maximum": 56.0, **nothing}


@pytest.mark.parametrize("inputs", [["1,5:int64;1,5,4"], ["1,5:int64", "1,5,4:float32"]])
def test_several_inputs_and_embeddings(net: str, inputs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    given = [word for text in inputs for word in ("--input", text)]
    found = report(capsys, net + ":Words", *given)
    assert found["input"] == [{"shape": [1, 5], "dtype": "int64"}, {"shape": [1, 5, 4], "dtype": "float32"}]
    assert {name: cost["fixed"] for name, cost in found["costs"].items()} == {"params": 38.0, "macs": 40.0}


def test_without_layers(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, net + ":space", "--input", "1,4", "--no-layers")
    assert found["costs"]["macs"]["layers"] is None
    assert main(["cost", net + ":space", "--input", "1,4", "--no-layers"]) == 0
    assert "candidates" not in capsys.readouterr().out


# --- enumeration ------------------------------------------------------------------------------------------------

RANDOM = """
import random
import torch
from torch import nn
from random_spaces import random_space


def space():
    torch.manual_seed({seed})
    return random_space({seed}, lambda rng: nn.Conv2d(3, 3, rng.choice([1, 3]), padding="same"))
"""


def leaf(rng: Any) -> nn.Module:
    return nn.Conv2d(3, 3, rng.choice([1, 3]), padding="same")


@pytest.mark.parametrize("seed", range(8))
def test_every_architecture_is_the_sum_of_its_parts(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``params`` by the parameters of the fixed model, ``macs`` by counting the fixed model."""
    (tmp_path / "spaces.py").write_text(RANDOM.format(seed=seed))
    found = report(capsys, f"{tmp_path / 'spaces.py'}:space", "--input", "1,3,4,4", "--cost", "params,macs,peak_memory")
    model, x = random_space(seed, leaf), (torch.zeros(1, 3, 4, 4),)
    known, peaks = decisions(model), count_peak_memory(model, x)
    every = list(architectures(model))
    assert found["architectures"] == len(every)
    values: dict[str, list[float]] = {"params": [], "macs": [], "peak_memory": []}
    for choices in every:
        small = fixed(model, arch_of(model, choices))
        values["params"].append(sum(p.numel() for p in small.parameters()))
        values["macs"].append(count_macs(small, x).of({}))
        values["peak_memory"].append(peaks.of(choices))
        arch = {label: str(known[label].options[k]) for label, k in choices.items()}
        for name in ("params", "macs"):
            cost = found["costs"][name]
            assert by_parts(cost, arch) == by_layers(cost, arch) == values[name][-1]
    for name, row in values.items():
        assert (found["costs"][name]["minimum"], found["costs"][name]["maximum"]) == (min(row), max(row))


def test_largest_peak_of_a_large_space_is_said_to_be_the_largest_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spaces.py").write_text(
        textwrap.dedent("""
            from torch import nn
            from oneshot import LayerChoice

            def space(n=13):
                return nn.Sequential(*(LayerChoice([nn.Linear(2, 2), nn.Identity()]) for _ in range(n)))

            def smaller():
                return space(12)
            """)
    )
    assert decode.MOST_ENUMERATED == 2**12
    for name, n, is_found in [("space", "8,192", True), ("smaller", "4,096", False)]:
        argv = [f"{tmp_path / 'spaces.py'}:{name}", "--input", "1,2", "--cost", "peak_memory"]
        assert report(capsys, *argv)["costs"]["peak_memory"]["largest_is_found"] is is_found
        assert main(["cost", *argv]) == 0
        out = capsys.readouterr().out
        assert ("peak_memory: the maximum is the largest found among more than 4,096 architectures" in out) is is_found
        assert f"architectures: {n}\n" in out


# --- latency ----------------------------------------------------------------------------------------------------


def test_published_table(capsys: pytest.CaptureFixture[str]) -> None:
    target = "search_spaces.mobilenet:proxylessnas"
    argv = [target, "--input", "1,3,224,224", "--cost", "latency", "--hardware", PUBLISHED]
    found = report(capsys, *argv)
    cost = found["costs"]["latency_ms"]
    ms = {key: row["mean"] for key, row in yaml.safe_load(PUBLISHED.read_text()).items()}
    first = "expanded_conv-input:112x112x32-output:112x112x16-expand:1-kernel:3-stride:1-idskip:0"
    always = [
        "Conv-input:224x224x3-output:112x112x32",
        first,
        "Conv_1-input:7x7x320-output:7x7x1280",
        "Logits-input:7x7x1280-output:1000",
    ]
    assert cost["fixed"] == pytest.approx(sum(ms[key] for key in always), rel=1e-12)
    shape = "expanded_conv-input:112x112x16-output:56x56x24"
    blocks = {
        f"k{kernel}e{expand}": ms[f"{shape}-expand:{expand}-kernel:{kernel}-stride:2-idskip:0"]
        for kernel in (3, 5, 7)
        for expand in (3, 6)
    }
    assert cost["choices"]["block1"] == blocks
    assert cost["choices"]["block2"]["skip"] == 0.0
    rows = [row.values() for row in cost["choices"].values()]
    assert cost["minimum"] == pytest.approx(cost["fixed"] + sum(map(min, rows)), rel=1e-12)
    assert cost["maximum"] == pytest.approx(cost["fixed"] + sum(map(max, rows)), rel=1e-12)
    assert found["architectures"] == 6**6 * 7**15
    assert found["notes"] == [f"latency_ms by {PUBLISHED}"]
    arch = {label: next(iter(row)) for label, row in cost["choices"].items()}
    assert by_layers(cost, arch) == pytest.approx(by_parts(cost, arch), rel=1e-12)


def test_table_by_candidate(net: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "table.json").write_text('{"small": 0.012345, "skip": 0}')
    argv = [net + ":space", "--input", "1,4", "--hardware", tmp_path / "table.json"]
    found = report(capsys, *argv)
    assert list(found["costs"]) == ["params", "macs", "latency_ms"]
    assert found["costs"]["latency_ms"]["choices"] == {"op": {"small": 0.012345, "skip": 0.0}}
    # A warning of the library is a note of the report.
    assert [note for note in found["notes"] if "has no row 'fixed'" in note]
    assert main(["cost", *map(str, argv)]) == 0
    out = capsys.readouterr().out
    assert "op      small       12     9     0.01235\n" in out
    assert "latency_ms  ms              0        0  0.01235\n" in out
    assert "has no row 'fixed'" in out


def test_predictors_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spaces.py").write_text(RANDOM.format(seed=5))
    found = report(capsys, f"{tmp_path / 'spaces.py'}:space", "--input", "1,3,4,4", "--hardware", TINY)
    model = random_space(5, leaf)
    known, cost = decisions(model), nn_meter_latency(model, (torch.zeros(1, 3, 4, 4),), TINY).cost
    written = found["costs"]["latency_ms"]
    every = list(architectures(model))
    for choices in every:
        arch = {label: str(known[label].options[k]) for label, k in choices.items()}
        assert by_parts(written, arch) == pytest.approx(cost.of(choices), rel=1e-12)
        assert by_layers(written, arch) == pytest.approx(cost.of(choices), rel=1e-12)
    reached = [cost.of(choices) for choices in every]
    assert (written["minimum"], written["maximum"]) == pytest.approx((min(reached), max(reached)), rel=1e-12)
    assert found["notes"][0] == "latency_ms by nn-Meter, tiny_torchcpu"


def test_missing_predictors(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [net + ":tanh", "--input", "1,3,8,8", "--cost", "latency", "--hardware", TINY]
    err = refusal(capsys, *argv)
    assert "tiny_torchcpu has no predictor for 1 kernels" in err
    assert "'tanh'" in err
    assert "--missing KERNEL=MS" in err
    first, second = (report(capsys, *argv, "--missing", text) for text in ("tanh=0.25", "fc=1, tanh=1.25"))
    assert second["costs"]["latency_ms"]["fixed"] - first["costs"]["latency_ms"]["fixed"] == pytest.approx(1.0)
    assert any("kernel 'tanh', which has no predictor, priced 0.25 ms" in note for note in first["notes"])


@pytest.mark.parametrize(
    ("hardware", "runtime"), [("this-machine", "torch"), ("this-machine-onnxruntime", "onnxruntime")]
)
def test_this_machine_is_measured(
    hardware: str, runtime: str, net: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def measured(model: nn.Module, args: tuple[Any, ...], *, runtime: str) -> LatencyTable:
        asked.append(([tuple(a.shape) for a in args], runtime))
        facts = {"runtime": runtime, "threads": "1"}
        rows = {"1": {"small": 2.0, "skip": 0.0}}
        return LatencyTable(by_place=rows, fixed=0.5, runtime=facts, source="this machine")

    monkeypatch.setattr("oneshot.cost.hardware.measure_table", measured)
    found = report(capsys, net + ":space", "--input", "1,4", "--cost", "latency_ms", "--hardware", hardware)
    assert asked == [([(1, 4)], runtime)]
    cost = found["costs"]["latency_ms"]
    assert (cost["fixed"], cost["minimum"], cost["maximum"]) == (0.5, 0.5, 2.5)
    assert found["notes"] == [f"latency_ms by this machine: runtime {runtime}, threads 1"]


# --- where the report goes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["text", "json"])
def test_output_is_the_report(form: str, net: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["cost", net + ":space", "--input", "1,4", "--format", form]
    assert main(argv) == 0
    expected = capsys.readouterr().out
    path = tmp_path / "report"
    path.write_text("before")
    assert main([*argv, "--output", str(path)]) == 0
    assert (capsys.readouterr().out, path.read_text()) == ("", expected)
    assert "no folder" in refusal(capsys, *argv[1:], "--output", tmp_path / "none" / "report")
    assert "it is no file" in refusal(capsys, *argv[1:], "--output", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith((".", "r"))) == ["report"]


def test_reader_that_has_seen_enough(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with io.open(writer, "w") as closed:  # noqa: UP020
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["cost", net + ":space", "--input", "1,4"]) == 0


# --- what cannot work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("{net}", r"is not MODULE:FACTORY, such as search_spaces\.mobilenet:proxylessnas"),
        ("no_such_module:space", "there is no module 'no_such_module' here"),
        ("search_spaces.nowhere:space", "there is no module 'search_spaces.nowhere' here"),
        ("a-b:space", "'a-b' is neither the name of a module nor the path of a .py file"),
        ("nowhere.py:space", "there is no file 'nowhere.py'"),
        ("{net}:spaces", r"net\.py has no 'spaces'; what can be called there: .*'space'"),
        ("{net}:Nested.no", "has no 'Nested.no'"),
        ("{net}:twelve", "twelve is a int; a function or class is needed"),
        ("{net}:layer", "layer is a Linear; a function or class is needed"),
        ("{net}:width", r"cannot be called without arguments: missing a required argument: 'n'.*width\(\.\.\.\)"),
        ("{net}:number", r"number\(\) returned a int; a torch\.nn\.Module is needed"),
        ("{net}:Words", "does not run on an input of shape"),
    ],
)
def test_models_that_cannot_be_made(target: str, words: str, net: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = list(sys.path)
    err = refusal(capsys, target.format(net=net), "--input", "1,4")
    with pytest.raises(ConfigurationError, match=words):
        raise ConfigurationError(err)
    assert err.startswith("python -m oneshot: error: ")
    assert sys.path == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--input", "1,x"], "--input '1,x': whole numbers above 0 are needed, such as 1,3,224,224"),
        (["--input", "1,0"], "--input '1,0': whole numbers above 0"),
        (["--input", "1,4;"], "--input '': whole numbers above 0"),
        (["--input", "9" * 5000], "whole numbers above 0"),
        (["--input", "999999999,999999999"], "[(999999999, 999999999)] cannot be made"),
        (["--input", "1,4:int8"], "--input '1,4:int8': 'int8' is not one of ('float32', 'int64')"),
        (["--input", "1,5"], "does not run on an input of shape [(1, 5)]"),
        (["--input", "1,4", "--cost", "flops"], "--cost flops: ['flops'] are not known; some of ['params', 'macs'"),
        (["--input", "1,4", "--cost", "macs,"], "[''] are not known"),
        (["--input", "1,4", "--cost", "macs,latency"], "latency is that of a hardware; say which, --hardware"),
        (["--input", "1,4", "--cost", "macs", "--hardware", "x.yaml"], "--cost macs asks for no latency"),
        (["--input", "1,4", "--hardware", "no.yaml"], "latency table 'no.yaml': No such file"),
        (
            ["--input", "1,4", "--hardware", "this-machin"],
            "'this-machin': allowed are ['this-machine', 'this-machine-onnxruntime'],",
        ),
        (["--input", "1,4", "--missing", "fc=1"], "--missing is for nn-Meter's predictors: say which"),
        (["--input", "1,4", "--hardware", "t.yaml", "--missing", "fc=1"], "--missing is for nn-Meter's predictors"),
        (["--input", "1,4", "--hardware", str(TINY), "--missing", "fc"], "'fc' is not KERNEL=MS"),
        (["--input", "1,4", "--hardware", str(TINY), "--missing", "fc=x"], "'fc=x' is not KERNEL=MS"),
        (["--input", "1,4", "--hardware", str(TINY), "--missing", "fc=-1"], "milliseconds >= 0 is needed"),
    ],
)
def test_arguments_that_cannot_work(
    arguments: list[str], words: str, net: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(capsys, net + ":space", *arguments)


def test_what_a_module_of_the_user_raises_is_shown_whole(tmp_path: Path) -> None:
    (tmp_path / "needy.py").write_text("import no_such_package_anywhere")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_anywhere"):
        main(["cost", f"{tmp_path / 'needy.py'}:space", "--input", "1,4"])


@pytest.mark.parametrize("argv", [[], ["cost"], ["cost", "net:space"], ["cost", "net:space", "--input"], ["what"]])
def test_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: python -m oneshot" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["cost", "--help"]])
def test_help_has_an_example(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 0
    assert "python -m oneshot cost search_spaces.mobilenet:proxylessnas" in capsys.readouterr().out


# --- nn-Meter's own command line, and processes -----------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["predict", "--predictor", "x", "--missing", "y"], []])
def test_arguments_of_nn_meter_are_handed_on(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def command(argv: list[str]) -> int:
        asked.append(argv)
        return 7

    monkeypatch.setattr("oneshot.cost.nn_meter.command.main", command)
    assert main(["nn-meter", *arguments]) == 7
    assert asked == [arguments]


def test_errors_of_nn_meter_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def command(argv: list[str]) -> int:
        raise ConfigurationError("nn-Meter is not installed")

    monkeypatch.setattr("oneshot.cost.nn_meter.command.main", command)
    assert main(["nn-meter", "--help"]) == 2
    assert capsys.readouterr().err == "python -m oneshot: error: nn-Meter is not installed\n"


def run(tmp_path: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    return subprocess.run(
        [sys.executable, "-m", "oneshot", *argv], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )


def test_a_process_finds_modules_in_the_current_folder(net: str, tmp_path: Path) -> None:
    done = run(tmp_path, "cost", "net:space", "--input", "1,4", "--cost", "macs", "--no-layers", "--format", "json")
    assert (done.returncode, done.stderr) == (0, "made\n")
    assert json.loads(done.stdout)["costs"]["macs"]["maximum"] == 27.0


def test_a_process_of_nn_meter_registers_what_cost_then_knows(
    net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = yaml.safe_load((TINY / "meta.yaml").read_text())
    meta |= {"name": "mine", "package_location": str(TINY)}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(meta))
    done = run(tmp_path, "nn-meter", "register", "--predictor", "mine.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = report(capsys, net + ":plain", "--input", "1,4", "--cost", "latency", "--hardware", "mine")
    by_folder = report(capsys, net + ":plain", "--input", "1,4", "--cost", "latency", "--hardware", TINY)
    assert found["costs"] == by_folder["costs"]
    assert found["notes"][0] == "latency_ms by nn-Meter, mine"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"oneshot {oneshot.__version__}\n"
