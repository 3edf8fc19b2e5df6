"""Sets of kernel predictors: which files a name or a folder means, what is fetched, checked, kept and refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import socket
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from oneshot.cost.nn_meter.forest import Forest
from oneshot.cost.nn_meter.package import nn_meter_package
from oneshot.cost.nn_meter.predictors import PredictorSet, load_predictor_set
from oneshot.errors import ConfigurationError, UnsafePickleError

TINY = Path(__file__).parent / "data" / "nn_meter_tiny"
KERNELS = ["hswish", "split"]  # the smallest two
ROWS = [[14.0, 32.0], [56.0, 8.0], [7.0, 960.0]]
OFFICIAL = ["adreno630gpu_tflite21", "adreno640gpu_tflite21", "cortexA76cpu_tflite21", "myriadvpu_openvino2019r2"]
A_WHILE_AGO = 1_700_000_000


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, and nothing of the machine's."""
    for variable in ("ONESHOT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def tiny(folder: Path, kernels: list[str] | None = None, **meta: Any) -> Path:
    """A folder of predictors, some time old."""
    folder.mkdir(parents=True)
    for name in (*(f"{kernel}.pkl" for kernel in (KERNELS if kernels is None else kernels)), "fusion_rules.json"):
        shutil.copy(TINY / name, folder / name)
        os.utime(folder / name, (A_WHILE_AGO, A_WHILE_AGO))
    if meta:
        (folder / "meta.yaml").write_text(yaml.safe_dump(meta))
    return folder


def predictions(predictors: PredictorSet) -> dict[str, list[float]]:
    return {kernel: forest.predict(ROWS).tolist() for kernel, forest in predictors.forests.items()}


@pytest.fixture(scope="module")
def expected() -> dict[str, list[float]]:
    return {kernel: Forest.from_pickle(TINY / f"{kernel}.pkl").predict(ROWS).tolist() for kernel in KERNELS}


@pytest.fixture
def pickles_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the pickles that were read from now on."""
    read: list[str] = []
    original = Forest.from_pickle

    def counted(path: str | Path) -> Forest:
        read.append(Path(path).name)
        return original(path)

    monkeypatch.setattr(Forest, "from_pickle", counted)
    return read


# --- folders ----------------------------------------------------------------------------------------------------


def test_a_folder_by_path_and_by_text(tmp_path: Path, expected: Mapping[str, list[float]]) -> None:
    folder = tiny(tmp_path / "device")
    for hardware in (folder, str(folder)):
        found = load_predictor_set(hardware)
        assert (found.name, found.version, found.fusion_rules) == ("device", "unknown", folder / "fusion_rules.json")
        assert found.source == f"folder {folder}"
        assert predictions(found) == expected
    with pytest.raises(TypeError):
        found.forests["hswish"] = found.forests["split"]  # type: ignore[index]


def test_the_whole_tiny_predictor_as_its_writer_predicted() -> None:
    """The oracle is scikit-learn 0.23.1, whose predictions were stored beside the pickles."""
    found = load_predictor_set(TINY)
    assert len(found.forests) == 16
    assert (found.name, found.version) == ("tiny_torchcpu", "1.0")
    for kernel, forest in found.forests.items():
        with np.load(TINY / f"{kernel}.expected.npz") as stored:
            assert np.array_equal(forest.predict(stored["X"]), stored["y"]), kernel


def test_meta_says_what_is_read(tmp_path: Path, pickles_read: list[str]) -> None:
    meta = {"name": "mine", "version": 1.5, "kernel_predictors": ["split"], "package_location": "/nowhere"}
    folder = tiny(tmp_path / "device", KERNELS, **meta)
    found = load_predictor_set(folder)
    assert (found.name, found.version, list(found.forests), pickles_read) == ("mine", "1.5", ["split"], ["split.pkl"])


def test_meta_without_kernels_reads_all(tmp_path: Path) -> None:
    found = load_predictor_set(tiny(tmp_path / "device", name="mine"))
    assert (found.name, list(found.forests)) == ("mine", KERNELS)


def test_what_meta_lists_must_be_there(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "device", kernel_predictors=["hswish", "add", "fc"])
    with pytest.raises(
        ConfigurationError, match=r"device lacks 2 of 4 files: \['add.pkl', 'fc.pkl'\]\. Put them there"
    ):
        load_predictor_set(folder)


def test_a_folder_without_rules_or_without_pickles(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "device")
    (folder / "fusion_rules.json").unlink()
    with pytest.raises(ConfigurationError, match=r"lacks 1 of 3 files: \['fusion_rules.json'\]"):
        load_predictor_set(folder)
    with pytest.raises(ConfigurationError, match=r"empty': no <kernel>.pkl file in this folder; at least 1"):
        load_predictor_set(tiny(tmp_path / "empty", []))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("fusion_rules.json", "[]", "a mapping is needed, got a list"),
        ("fusion_rules.json", "{", "cannot be read: Expecting property name"),
        ("meta.yaml", "- a", "a mapping is needed, got a list"),
        ("meta.yaml", "a: [", "cannot be read"),
        ("meta.yaml", "a: 2001-99-99", "cannot be read: month must be in 1..12"),
        ("meta.yaml", "kernel_predictors: []", "'kernel_predictors' is []; a list of file names is needed"),
        ("meta.yaml", "kernel_predictors: hswish", "'kernel_predictors' is 'hswish'"),
        ("meta.yaml", "kernel_predictors: [../device/hswish]", "'kernel_predictors' is ['../device/hswish']"),
        ("meta.yaml", "kernel_predictors: [3]", "'kernel_predictors' is [3]"),
        ("meta.yaml", "!!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, text: str, message: str) -> None:
    folder = tiny(tmp_path / "device")
    (folder / file).write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load_predictor_set(folder)
    assert message in str(caught.value)
    assert file in str(caught.value)


class Touch:
    """As a pickle: makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.marker, "w")


def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path: Path, home: Path) -> None:
    folder, marker = tiny(tmp_path / "device"), tmp_path / "marker"
    evil = pickle.dumps(Touch(marker))
    pickle.loads(evil).close()  # noqa: S301 - it works
    assert marker.exists()
    marker.unlink()
    (folder / "add.pkl").write_bytes(evil)
    for _ in range(2):
        with pytest.raises(UnsafePickleError, match=r"add\.pkl"):
            load_predictor_set(folder)
    assert not marker.exists()
    assert not list((home / ".cache").rglob("*.npz"))


# --- names ------------------------------------------------------------------------------------------------------


def register(home: Path, entries: list[Any], data_folder: Path | None = None) -> None:
    config = home / ".nn_meter" / "config"
    config.mkdir(parents=True, exist_ok=True)
    (config / "predictors.yaml").write_text(yaml.safe_dump(entries))
    if data_folder is not None:
        (config / "settings.yaml").write_text(yaml.safe_dump({"data_folder": str(data_folder)}))


def entry(name: str, version: Any, **more: Any) -> dict[str, Any]:
    return {"name": name, "version": version, "category": "cpu", "kernel_predictors": KERNELS, **more}


def test_an_unknown_name_lists_the_known_ones(home: Path) -> None:
    register(home, [entry("mine", 1.0, package_location="/nowhere"), "no mapping", {"version": 1.0}])
    with pytest.raises(ConfigurationError) as caught:
        load_predictor_set("cortexA77")
    assert str(caught.value) == (
        "predictor 'cortexA77': there is no such folder, and none of the names known to nn-Meter here: "
        f"{sorted([*OFFICIAL, 'mine'])}. A folder holds fusion_rules.json and a file <kernel>.pkl per kernel, and may "
        "hold a meta.yaml"
    )
    with pytest.raises(ConfigurationError, match=r"cortexA77': there is no such folder\. A folder holds"):
        load_predictor_set(Path("cortexA77"))


def test_names_need_nn_meter_and_folders_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny(tmp_path / "device")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert list(load_predictor_set(folder).forests) == KERNELS
    with pytest.raises(ConfigurationError, match=r"not installed\. Install it: python -m pip install nn-meter"):
        load_predictor_set("cortexA76cpu_tflite21")


def test_the_newest_version_counts_and_doubles_are_one(
    tmp_path: Path, home: Path, expected: Mapping[str, list[float]]
) -> None:
    old, new = (
        entry("mine", 9.0, package_location="/old"),
        entry("mine", "10.0", package_location=str(tmp_path / "new")),
    )
    tiny(tmp_path / "new")
    register(home, [old, new, old, new, dict(new)])  # as text, "9.0" would be the greater one
    found = load_predictor_set("mine")
    assert (found.name, found.version) == ("mine", "10.0")
    assert found.source == f"registered with nn-Meter, in {tmp_path / 'new'}"
    assert predictions(found) == expected


def test_two_different_entries_of_one_version_are_not_chosen_between(home: Path) -> None:
    register(home, [entry("mine", 1.0, package_location="/a"), entry("mine", 1.0, package_location="/b")])
    with pytest.raises(ConfigurationError, match=r"2 different entries 'mine' of version 1\.0: \['/a', '/b'\]"):
        load_predictor_set("mine")
    register(home, [entry("mine", "new", package_location="/a"), entry("mine", 1.0, package_location="/b")])
    with pytest.raises(ConfigurationError, match="which is the newest is not clear: Invalid version: 'new'"):
        load_predictor_set("mine")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (entry("mine", 1.0), "neither 'package_location' nor 'download'"),
        (entry("mine", 1.0, package_location="/no/where"), "/no/where lacks 3 of 3 files"),
        (entry("a/b", 1.0, download="https://x/a.zip"), "cannot hold '/'"),
        ({"name": "mine", "package_location": "/a"}, "'kernel_predictors' is None"),
    ],
)
def test_an_entry_that_cannot_be_used(home: Path, bad: dict[str, Any], message: str) -> None:
    register(home, [bad])
    with pytest.raises(ConfigurationError) as caught:
        load_predictor_set(bad["name"])
    assert message in str(caught.value)


def test_a_damaged_configuration_is_named(home: Path) -> None:
    config = home / ".nn_meter" / "config"
    register(home, [])
    (config / "predictors.yaml").write_text("a: 1")
    with pytest.raises(ConfigurationError, match=r"predictors\.yaml: a list of predictors is needed, got a dict"):
        load_predictor_set("mine")
    register(home, [])
    (config / "settings.yaml").write_text("data_folder: 3")
    with pytest.raises(ConfigurationError, match=r"settings\.yaml: 'data_folder' is 3"):
        load_predictor_set(OFFICIAL[0])


def test_official_files_are_looked_for_where_nn_meter_keeps_them(tmp_path: Path, home: Path) -> None:
    name = "adreno640gpu_tflite21"
    kernels = ["conv-bn-relu", "dwconv-bn-relu", "hswish", "relu", "se", "maxpool", "avgpool", "bn", "bnrelu", "concat"]
    folder = tiny(home / ".nn_meter" / "data" / "predictor" / name, [*kernels, "add"])
    found = load_predictor_set(name)
    assert (found.name, found.version, list(found.forests)) == (name, "1.0", kernels)
    url = f"https://github.com/microsoft/nn-Meter/releases/download/v1.0-data/{name}.zip"
    assert found.source == f"{url}, in {folder}"

    folder.rename(tiny(tmp_path / "data" / "predictor" / "other").parent / name)  # the user's data folder
    register(home, [], tmp_path / "data")
    assert load_predictor_set(name).fusion_rules == tmp_path / "data" / "predictor" / name / "fusion_rules.json"
    # A name that the user's own configuration holds means what it says there, as for nn-Meter.
    register(home, [entry(name, 0.5, package_location=str(tmp_path / "data" / "predictor" / "other"))])
    assert load_predictor_set(name).version == "0.5"


# --- the download -----------------------------------------------------------------------------------------------

URL = "https://example.org/files/mine.zip"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


class Answer:
    """What a server sends, as ``requests`` gives it."""

    def __init__(self, content: bytes, url: str = URL, error: Exception | None = None, *history: Answer) -> None:
        self.content, self.url, self.error, self.history = content, url, error, history
        self.headers = {"content-length": str(len(content))}

    def raise_for_status(self) -> None:
        if self.error is not None:
            raise self.error

    def iter_content(self, size: int) -> Iterator[bytes]:
        for start in range(0, len(self.content), size):
            yield self.content[start : start + size]


@pytest.fixture
def serve(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Registers "mine" with a download, and has ``requests`` give this answer; returns what is asked for."""
    nn_meter_package()
    requests = sys.modules["requests"]
    register(home, [entry("mine", 1.0, download=URL)])

    def answered_by(answer: Answer) -> list[str]:
        asked: list[str] = []

        def get(url: str, *, stream: bool, timeout: float) -> Answer:
            assert stream
            assert 0 < timeout < 600
            asked.append(url)
            return answer

        monkeypatch.setattr(requests, "get", get)
        return asked

    return answered_by


def archive(members: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return file.getvalue()


def members(kernels: list[str] | None = None) -> dict[str, bytes]:
    names = [*(f"{kernel}.pkl" for kernel in (KERNELS if kernels is None else kernels)), "fusion_rules.json"]
    return {f"mine/{name}": (TINY / name).read_bytes() for name in names}


def test_what_is_absent_is_fetched_once_and_checked_from_then_on(
    home: Path,
    serve: Callable[..., list[str]],
    expected: Mapping[str, list[float]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    asked = serve(Answer(archive({**members(), "mine/readme.txt": b"read me"})))
    folder = home / ".nn_meter" / "data" / "predictor" / "mine"
    for _ in range(2):
        found = load_predictor_set("mine", progress=False)
        assert predictions(found) == expected
    assert asked == [URL]
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["mine"]
    assert found.source == f"{URL}, in {folder}"
    remembered = json.loads((folder / "mine.sha256.json").read_text())
    assert remembered["url"] == URL
    assert remembered["sha256"] == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("fusion_rules.json", "hswish.pkl", "readme.txt", "split.pkl")
    }

    then, now = hashlib.sha256((folder / "split.pkl").read_bytes()).hexdigest(), hashlib.sha256(b"other").hexdigest()
    (folder / "split.pkl").write_bytes(b"other")
    with pytest.raises(ConfigurationError) as caught:
        load_predictor_set("mine")
    assert f"{folder / 'split.pkl'} has changed since its download: sha256 then {then}, now {now}." in str(caught.value)
    assert asked == [URL]


def test_progress_is_shown_when_asked_for(serve: Callable[..., list[str]], capfd: pytest.CaptureFixture[str]) -> None:
    serve(Answer(archive(members())))
    load_predictor_set("mine", progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "100%" in err


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer(archive(members(["hswish"]))), "lack mine/ with ['split.pkl']"),
        (Answer(archive({"other/a": b""})), "lack mine/ with ['hswish.pkl', 'split.pkl', 'fusion_rules.json']"),
        (Answer(archive({**members(), "../outside": b""})), "member '../outside' lies outside its folder"),
        (Answer(archive({**members(), "/outside": b""})), "member '/outside' lies outside its folder"),
        (Answer(archive({**members(), "mine/../../outside": b""})), "member 'mine/../../outside' lies outside"),
        (Answer(archive({**members(), "C:\\outside": b""})), "outside' lies outside its folder"),
        (
            Answer(archive(members()), "http://example.org/mine.zip"),
            "leads to http://example.org/mine.zip, which is not",
        ),
        (Answer(archive(members()), URL, None, Answer(b"", "http://a.org/b")), "leads to http://a.org/b, which is not"),
        (Answer(b"<html>not found</html>"), "cannot be downloaded: File is not a zip file"),
        (Answer(archive(members())[:-30]), "cannot be downloaded: File is not a zip file"),
        (
            Answer(b"", error=OSError("404 Client Error: Not Found")),
            "cannot be downloaded: 404 Client Error: Not Found",
        ),
    ],
)
def test_a_bad_download_leaves_nothing(
    home: Path, tmp_path: Path, serve: Callable[..., list[str]], answer: Answer, message: str
) -> None:
    serve(answer)
    with pytest.raises(ConfigurationError) as caught:
        load_predictor_set("mine", progress=False)
    assert message in str(caught.value)
    assert URL in str(caught.value) or "archive's member" in str(caught.value)
    assert list((home / ".nn_meter" / "data" / "predictor").iterdir()) == []
    assert not list(tmp_path.rglob("outside"))


def test_without_network_the_error_says_which_file_goes_where(home: Path) -> None:
    name = "cortexA76cpu_tflite21"
    with pytest.raises(ConfigurationError) as caught:
        load_predictor_set(name, progress=False)
    text, folder = str(caught.value), home / ".nn_meter" / "data" / "predictor" / name
    url = f"https://github.com/microsoft/nn-Meter/releases/download/v1.0-data/{name}.zip"
    assert (
        f"fetch {url} on a machine that can, and unpack it in {folder.parent}, so that {folder} holds conv-bn" in text
    )
    assert all(f"{kernel}.pkl, " in text for kernel in ("conv-bn-relu", "fc", "channelshuffle", "concat"))
    assert text.endswith("fusion_rules.json")
    assert list(folder.parent.iterdir()) == []


@pytest.mark.parametrize("url", ["http://example.org/mine.zip", "file:///etc/passwd", "ftp://example.org/mine.zip"])
def test_only_https_is_fetched(home: Path, serve: Callable[..., list[str]], url: str) -> None:
    asked = serve(Answer(archive(members())))
    register(home, [entry("mine", 1.0, download=url)])
    with pytest.raises(ConfigurationError, match=r"is not downloaded, only https is\. To put the files there by hand"):
        load_predictor_set("mine")
    assert asked == []


def test_half_a_folder_is_not_completed(home: Path, serve: Callable[..., list[str]]) -> None:
    asked = serve(Answer(archive(members())))
    folder = tiny(home / ".nn_meter" / "data" / "predictor" / "mine", ["hswish"])
    with pytest.raises(ConfigurationError, match=r"lacks 1 of 3 files: \['split.pkl'\]. Move that folder away to have"):
        load_predictor_set("mine")
    assert asked == []
    shutil.rmtree(folder)
    folder.mkdir()  # empty: as good as absent
    assert list(load_predictor_set("mine", progress=False).forests) == KERNELS
    assert asked == [URL]


def test_files_put_there_by_hand_are_not_compared_with_a_download(home: Path) -> None:
    register(home, [entry("mine", 1.0, download=URL)])
    folder = tiny(home / ".nn_meter" / "data" / "predictor" / "mine")
    assert list(load_predictor_set("mine").forests) == KERNELS
    (folder / "mine.sha256.json").write_text('{"sha256": []}')
    with pytest.raises(ConfigurationError, match=r"mine\.sha256\.json: 'sha256' is \[\]; a mapping of files is needed"):
        load_predictor_set("mine")


# --- the cache --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "cache", "expected_at"),
    [
        ({}, None, "home/.cache/oneshot"),
        ({"XDG_CACHE_HOME": "xdg"}, None, "xdg/oneshot"),
        ({"XDG_CACHE_HOME": "xdg", "ONESHOT_CACHE": "own"}, None, "own"),
        ({"XDG_CACHE_HOME": "", "ONESHOT_CACHE": ""}, None, "home/.cache/oneshot"),
        ({"ONESHOT_CACHE": "own"}, "argument", "argument"),
    ],
)
def test_where_arrays_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str], cache: str | None, expected_at: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value) if value else "")
    folder = tiny(tmp_path / "device")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    load_predictor_set(folder, cache=None if cache is None else tmp_path / cache)
    hashes = [hashlib.sha256((folder / f"{kernel}.pkl").read_bytes()).hexdigest() for kernel in KERNELS]
    made = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert made == {
        tmp_path / expected_at / "nn_meter" / name for name in [*(f"{h}.npz" for h in hashes), "sha256.json"]
    }


def test_a_pickle_is_read_once(
    tmp_path: Path, expected: Mapping[str, list[float]], pickles_read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = tiny(tmp_path / "device"), tmp_path / "cache"
    load_predictor_set(folder, cache=cache)
    assert pickles_read == ["hswish.pkl", "split.pkl"]
    # Neither the pickle nor a hash of it: content that is no pickle, of the same size and time, is not noticed.
    for kernel in KERNELS:
        path = folder / f"{kernel}.pkl"
        path.write_bytes(b"x" * path.stat().st_size)
        os.utime(path, (A_WHILE_AGO, A_WHILE_AGO))
    assert predictions(load_predictor_set(folder, cache=cache)) == expected
    assert pickles_read == ["hswish.pkl", "split.pkl"]


def test_the_same_content_elsewhere_is_known(tmp_path: Path, pickles_read: list[str]) -> None:
    load_predictor_set(tiny(tmp_path / "a"), cache=tmp_path / "cache")
    shutil.rmtree(tmp_path / "a")
    load_predictor_set(tiny(tmp_path / "b"), cache=tmp_path / "cache")
    assert pickles_read == ["hswish.pkl", "split.pkl"]
    index = json.loads((tmp_path / "cache" / "nn_meter" / "sha256.json").read_text())
    assert {Path(name).parent for name in index} == {tmp_path / "b"}


def test_a_pickle_that_changes_is_read_again(tmp_path: Path, pickles_read: list[str]) -> None:
    folder, cache = tiny(tmp_path / "device"), tmp_path / "cache"
    first = predictions(load_predictor_set(folder, cache=cache))
    shutil.copy(TINY / "relu.pkl", folder / "split.pkl")  # another size, another time
    second = predictions(load_predictor_set(folder, cache=cache))
    assert pickles_read == ["hswish.pkl", "split.pkl", "split.pkl"]
    assert second["hswish"] == first["hswish"]
    assert second["split"] == Forest.from_pickle(TINY / "relu.pkl").predict(ROWS).tolist() != first["split"]


def test_a_file_of_this_moment_is_hashed_again(tmp_path: Path, pickles_read: list[str]) -> None:
    """It may change once more within the same time stamp."""
    folder, cache = tiny(tmp_path / "device"), tmp_path / "cache"
    os.utime(folder / "split.pkl", (4_000_000_000, 4_000_000_000))  # later than now: always of this moment
    load_predictor_set(folder, cache=cache)
    (folder / "split.pkl").write_bytes((TINY / "relu.pkl").read_bytes())
    os.utime(folder / "split.pkl", (4_000_000_000, 4_000_000_000))
    load_predictor_set(folder, cache=cache)
    assert pickles_read == ["hswish.pkl", "split.pkl", "split.pkl"]
    index = json.loads((cache / "nn_meter" / "sha256.json").read_text())
    assert sorted(Path(name).name for name in index) == ["fusion_rules.json", "hswish.pkl"]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"no archive", "half", "other"])
def test_damaged_arrays_are_made_again(
    tmp_path: Path, expected: Mapping[str, list[float]], pickles_read: list[str], damage: bytes | str
) -> None:
    folder, cache = tiny(tmp_path / "device"), tmp_path / "cache"
    load_predictor_set(folder, cache=cache)
    split, hswish = (
        cache / "nn_meter" / f"{hashlib.sha256((TINY / f'{kernel}.pkl').read_bytes()).hexdigest()}.npz"
        for kernel in ("split", "hswish")
    )
    if damage == "half":
        split.write_bytes(split.read_bytes()[: split.stat().st_size // 2])
    elif damage == "other":  # sound arrays of another pickle
        shutil.copy(hswish, split)
    else:
        assert isinstance(damage, bytes)
        split.write_bytes(damage)
    for _ in range(2):
        assert predictions(load_predictor_set(folder, cache=cache)) == expected
    assert pickles_read == ["hswish.pkl", "split.pkl", "split.pkl"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"%s": [1, 2]}', '{"%s": [1, 2, 3, 4]}', "[" * 100_000])
def test_a_damaged_index_is_made_again(tmp_path: Path, expected: Mapping[str, list[float]], text: str) -> None:
    folder, index = tiny(tmp_path / "device"), tmp_path / "cache" / "nn_meter" / "sha256.json"
    index.parent.mkdir(parents=True)
    index.write_text(text.replace("%s", str(folder / "split.pkl")))
    assert predictions(load_predictor_set(folder, cache=tmp_path / "cache")) == expected
    assert len(json.loads(index.read_text())) == 3


def test_a_cache_that_cannot_be_written_is_one_warning(tmp_path: Path, expected: Mapping[str, list[float]]) -> None:
    folder = tiny(tmp_path / "device")
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="cannot be written: .* Set ONESHOT_CACHE to a folder") as caught:
        found = load_predictor_set(folder, cache=tmp_path / "file")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert predictions(found) == expected
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_pickle_that_changes_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, original = tiny(tmp_path / "device", ["split"]), Forest.from_pickle

    def changing(path: Path) -> Forest:
        forest = original(path)
        shutil.copy(TINY / "relu.pkl", path)
        return forest

    monkeypatch.setattr(Forest, "from_pickle", changing)
    with pytest.raises(ConfigurationError, match=r"split\.pkl: changed while it was read"):
        load_predictor_set(folder, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_predictions_are_arrays_of_one_number_per_row(tmp_path: Path) -> None:
    for forest in load_predictor_set(tiny(tmp_path / "device")).forests.values():
        predicted = forest.predict(ROWS)
        assert predicted.shape == (3,)
        assert np.isfinite(predicted).all()
