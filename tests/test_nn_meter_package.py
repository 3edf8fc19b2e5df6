"""nn-Meter is imported on demand and leaves no trace; its command line runs, and reads no pickle its own way."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from oneshot.cost.nn_meter.command import main
from oneshot.cost.nn_meter.forest import Forest
from oneshot.cost.nn_meter.package import nn_meter_package, pkg_resources_at_hand, replaced
from oneshot.errors import ConfigurationError

ROOT = Path(__file__).parent.parent
TINY = Path(__file__).parent / "data" / "nn_meter_tiny"


# The modules under test without the rest of the library, whose import takes 5 s.
ALONE = """
import sys, types
for name in ("oneshot", "oneshot.cost"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [{root!r} + "/" + name.replace(".", "/")]
"""


def run(script: str, home: Path, *args: object, alone: bool = False) -> subprocess.CompletedProcess[str]:
    """A script with a home of its own, where every warning is an error."""
    text = ALONE.format(root=str(ROOT)) * alone + textwrap.dedent(script)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ONESHOT_", "PYTHON"))}
    home.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", text, *map(str, args)],
        env={**kept, "HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- the import -------------------------------------------------------------------------------------------------

IMPORTS = """
    import logging, os, sys, threading, warnings

    def state():
        named = logging.getLogger("nn-Meter")
        loggers = [(l.handlers[:], l.level, l.propagate, l.disabled) for l in (logging.root, named)]
        return loggers, warnings.filters[:], sys.meta_path[:], os.listdir()

    before = state()
    import oneshot, oneshot.cost.nn_meter.package
    assert "nn_meter" not in sys.modules
    assert state()[0] == before[0] and state()[3] == []

    sys.modules["pkg_resources"] = None  # as with setuptools 82 or none, also where an older one is installed
    before, found = state(), []
    ask = lambda: found.append(oneshot.cost.nn_meter.package.nn_meter_package())
    threads = [threading.Thread(target=ask) for _ in range(4)]
    [t.start() for t in threads], [t.join() for t in threads], ask()
    assert len(found) == 5 and len({id(package) for package in found}) == 1
    assert sys.modules["pkg_resources"] is None
    assert state() == before, (state(), before)

    nn_meter = found[0]
    from nn_meter.predictor.prediction.predict_by_kernel import nn_predict
    conv = {"type": "conv", "attr": {"ks": [3, 3], "strides": [1, 1]}}
    shapes = {"input_shape": [[1, 8, 8, 3]], "output_shape": [[1, 8, 8, 4]]}
    graph = {
        "x": {"attr": {"type": "Placeholder", "attr": {}}, "inbounds": [], "outbounds": ["c"]},
        "c": {"attr": {**conv, **shapes}, "inbounds": ["x"], "outbounds": []},
    }
    class Rows:
        predict = staticmethod(lambda rows: [float(row[1] * row[2]) for row in rows])  # input x output channels
    assert nn_meter.nnMeterPredictor({"conv-bn-relu": Rows}, None).predict(graph, "nnmeter-ir") == 12.0
    assert state() == before, (state(), before)
"""


def test_neither_import_nor_prediction_leaves_a_trace(tmp_path: Path) -> None:
    done = run(IMPORTS, tmp_path / "home")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert files_in(tmp_path / "home") == []


def test_settings_of_the_user_count_and_stay(tmp_path: Path) -> None:
    config = tmp_path / "home" / ".nn_meter" / "config"
    config.mkdir(parents=True)
    (config / "settings.yaml").write_text("data_folder: /elsewhere\n")
    script = """
        import os, sys
        from oneshot.cost.nn_meter.package import nn_meter_package
        nn_meter = nn_meter_package()
        dataset = sys.modules["nn_meter.dataset.bench_dataset"]
        print(dataset.__user_dataset_folder__, nn_meter.utils.get_user_data_folder(), os.listdir(sys.argv[1]))
        # What the package does when it is asked to is as ever: this makes the configuration.
        print(len(nn_meter.list_latency_predictors()), sorted(os.listdir(sys.argv[1])))
    """
    done = run(script, tmp_path / "home", config, alone=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "/elsewhere/dataset /elsewhere ['settings.yaml']\n4 ['predictors.yaml', 'settings.yaml']\n"


def test_the_second_call_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    package = nn_meter_package()
    assert package.__version__ == importlib.metadata.version("nn-meter")
    loaded = set(sys.modules)
    monkeypatch.setattr("oneshot.cost.nn_meter.package._import", None)
    assert nn_meter_package() is package
    assert set(sys.modules) == loaded


def test_a_package_that_the_program_imported_itself_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = ModuleType("nn_meter")
    before = dict(mine.__dict__)
    monkeypatch.setitem(sys.modules, "nn_meter", mine)
    assert nn_meter_package() is mine
    assert mine.__dict__ == before


def test_a_missing_package_is_named_with_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nn_meter", None)  # how Python marks a module that cannot be imported
    meta_path = sys.meta_path[:]
    for ask in (nn_meter_package, lambda: main(["--list-predictors"])):
        with pytest.raises(ConfigurationError, match=r"cannot be imported: .* python -m pip install nn-meter"):
            ask()
    assert sys.meta_path == meta_path
    assert not logging.getLogger("nn-Meter").disabled


# --- pkg_resources ----------------------------------------------------------------------------------------------


def test_a_stand_in_for_pkg_resources_only_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oneshot.cost.nn_meter.package._real_pkg_resources", lambda: False)
    monkeypatch.delitem(sys.modules, "pkg_resources", raising=False)
    configs = Path(nn_meter_package().__file__ or "").parent / "configs"
    with pkg_resources_at_hand():
        pkg_resources = importlib.import_module("pkg_resources")
        (distribution,) = pkg_resources.require("nn-meter")
        assert distribution.version == importlib.metadata.version("nn-meter")
        assert pkg_resources.resource_filename("nn_meter", "configs/a.yaml") == str(configs / "a.yaml")
        assert sorted(pkg_resources.resource_listdir("nn_meter", "configs")) == sorted(os.listdir(configs))
        with pytest.raises(ModuleNotFoundError):  # what nn-Meter catches
            pkg_resources.require("no-such-distribution-anywhere")
        with pytest.raises(ModuleNotFoundError):
            pkg_resources.resource_filename("no_such_package_anywhere", "a")
    assert "pkg_resources" not in sys.modules


@pytest.mark.parametrize("imported", [False, True])
def test_a_real_pkg_resources_is_used_in_silence_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, imported: bool
) -> None:
    text = 'import warnings\nwarnings.warn("pkg_resources is deprecated as an API", UserWarning)\nmine = 1\n'
    (tmp_path / "pkg_resources.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "pkg_resources", None)  # so that it is put back at the end
    if imported:
        sys.modules["pkg_resources"] = ModuleType("pkg_resources")
        sys.modules["pkg_resources"].__dict__["mine"] = 2
    else:
        del sys.modules["pkg_resources"]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with pkg_resources_at_hand():
            assert sys.modules["pkg_resources"].mine == 1 + imported
        assert sys.modules["pkg_resources"].mine == 1 + imported
    assert heard == []


@pytest.mark.parametrize("error", ["ImportError", "AttributeError"])
def test_a_pkg_resources_that_does_not_work_here_is_stood_in_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    (tmp_path / "pkg_resources.py").write_text(f"raise {error}('no ImpImporter')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "pkg_resources", None)
    del sys.modules["pkg_resources"]
    with pkg_resources_at_hand():
        assert callable(sys.modules["pkg_resources"].require)
    assert "pkg_resources" not in sys.modules


def test_names_are_put_back_after_an_error() -> None:
    module = ModuleType("one")
    module.__dict__["name"] = "old"

    def fails() -> None:
        with replaced(module, name="new"):
            raise KeyError(module.name)

    with pytest.raises(KeyError, match="new"):
        fails()
    assert module.name == "old"


# --- the command line -------------------------------------------------------------------------------------------

COMMANDS = """
    import json, logging, sys
    from oneshot.cost.nn_meter.command import main
    from oneshot.errors import UnsafePickleError
    tiny, evil, graph = sys.argv[1:]

    def state():
        named = logging.getLogger("nn-Meter")
        loggers = [(l.handlers[:], l.level, l.propagate) for l in (logging.root, named)]
        return loggers, sys.argv, sys.modules["pkg_resources"]

    sys.modules["pkg_resources"] = None  # as with setuptools 82 or none
    before = state()
    codes = [main(["register", "--predictor", tiny]), main(["register", "--predictor", evil])]
    codes += [main(["--list-predictors"]), main(["predict", "--predictor", "tiny", "--nn-meter-ir", graph])]
    codes += [main(["--help"]), main(["predict", "--no-such-option"])]
    assert codes == [0, 0, 0, 0, 0, 2], codes
    try:
        main(["predict", "--predictor", "evil", "--nn-meter-ir", graph])
    except UnsafePickleError as error:
        print("refused:", error)
    import nn_meter.predictor.utils, pickle
    assert nn_meter.predictor.utils.pickle is pickle
    assert state() == before
"""

GRAPH = {
    "x": {"attr": {"type": "Placeholder", "attr": {}}, "inbounds": [], "outbounds": ["c", "h"]},
    "c": {
        "attr": {
            "type": "conv",
            "attr": {"ks": [3, 3], "strides": [2, 2]},
            "input_shape": [[1, 32, 32, 3]],
            "output_shape": [[1, 16, 16, 16]],
        },
        "inbounds": ["x"],
        "outbounds": ["r"],
    },
    "r": {
        "attr": {"type": "relu", "attr": {}, "input_shape": [[1, 16, 16, 16]], "output_shape": [[1, 16, 16, 16]]},
        "inbounds": ["c"],
        "outbounds": [],
    },
    "h": {
        "attr": {"type": "hswish", "attr": {}, "input_shape": [[1, 32, 32, 3]], "output_shape": [[1, 32, 32, 3]]},
        "inbounds": ["x"],
        "outbounds": [],
    },
}


class Touch:
    """As a pickle: makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.marker, "w")


def registrable(folder: Path, name: str, kernels: list[str]) -> Path:
    """A predictor folder as nn-Meter registers it; the path of its meta file."""
    folder.mkdir()
    for file in (*(f"{kernel}.pkl" for kernel in kernels), "fusion_rules.json"):
        shutil.copy(TINY / file, folder / file)
    meta = {"name": name, "version": 1.0, "package_location": str(folder), "kernel_predictors": kernels}
    (folder / "meta.yaml").write_text(yaml.safe_dump(meta))
    return folder / "meta.yaml"


def test_the_command_line_predicts_and_refuses(tmp_path: Path) -> None:
    kernels = ["conv-bn-relu", "hswish"]
    tiny = registrable(tmp_path / "tiny", "tiny", kernels)
    evil = registrable(tmp_path / "evil", "evil", kernels)
    marker = tmp_path / "marker"
    (tmp_path / "evil" / "unlisted.pkl").write_bytes(pickle.dumps(Touch(marker)))  # nn-Meter reads every .pkl
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))

    done = run(COMMANDS, tmp_path / "home", tiny, evil, tmp_path / "graph.json", alone=True)
    assert done.returncode == 0, done.stderr
    assert not marker.exists()

    # conv-relu is one kernel by the rules and priced as conv-bn-relu: [H, cin, cout, k, stride, flops / 2e6,
    # parameters / 1e6] with 16 (3 * 3 * 3 + 1) = 448 parameters and 2 * 16 * 16 * 448 flops; hswish: [H, c].
    conv = [32, 3, 16, 3, 2, 2 * 16 * 16 * 448 / 2e6, 448 / 1e6]
    forests = [Forest.from_pickle(TINY / f"{kernel}.pkl") for kernel in kernels]
    latency = float(forests[0].predict([conv])[0]) + float(forests[1].predict([[32, 3]])[0])
    (line,) = [line for line in done.stdout.splitlines() if "[RESULT]" in line]
    text, _, number = line.removesuffix(" ms").rpartition(" ")
    assert text == "(nn-Meter) [RESULT] predict latency for graph.json:"
    assert float(number) == pytest.approx(latency, rel=1e-12)

    listed = [line for line in done.stdout.splitlines() if "[Predictor]" in line]
    assert len(listed) == 4 + 2
    assert "(nn-Meter) [Predictor] tiny: version=1.0" in listed
    assert "usage: nn-meter " in done.stdout
    assert "nn-meter: error: unrecognized arguments: --no-such-option" in done.stderr
    (refused,) = [line for line in done.stdout.splitlines() if line.startswith("refused:")]
    assert "unlisted.pkl" in refused
    assert files_in(tmp_path / "home") == [
        ".nn_meter",
        ".nn_meter/config",
        ".nn_meter/config/predictors.yaml",
        ".nn_meter/config/settings.yaml",
    ]
