"""Kernel predictors by the name of their hardware, or from a folder: found, fetched, checked, and read as arrays."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import reprlib
import tempfile
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, final
from zipfile import BadZipFile, ZipFile

import yaml
from packaging.version import InvalidVersion, parse

from ...errors import ConfigurationError, OneshotError
from ...files import atomic_write
from .forest import Forest
from .package import INSTALL, nn_meter_package, replaced

__all__ = ["PredictorSet", "check_hardware", "load_predictor_set"]

_RULES = "fusion_rules.json"
_INDEX = "sha256.json"
_SECONDS_WITHOUT_A_BYTE = 60.0
_NS_OF_A_CLOCK = 2_000_000_000  # the coarsest time stamps of a file system, FAT's
_DOWNLOADING = threading.Lock()


@final
@dataclass(frozen=True)
class PredictorSet:
    """The forests of one hardware and its fusion rules; made by ``load_predictor_set``.

    ``forests``: kernel -> Forest, by the file names without ".pkl" ("conv-bn-relu"). ``fusion_rules``: the file that
    says which operators the hardware's runtime fuses. ``source``: where the files came from, free text.
    """

    name: str
    forests: Mapping[str, Forest]
    fusion_rules: Path
    source: str
    version: str


def load_predictor_set(
    hardware: str | Path, *, cache: Path | None = None, progress: bool | None = None
) -> PredictorSet:
    """The predictors of a hardware.

    Args:
        hardware: one of nn-Meter's own ("cortexA76cpu_tflite21", "adreno640gpu_tflite21", "adreno630gpu_tflite21",
            "myriadvpu_openvino2019r2"), which are downloaded by this call where they are absent; or a name that was
            registered by ``nn-meter register --predictor meta.yaml`` (of several versions the newest); or a folder
            with fusion_rules.json and <kernel>.pkl files. If the folder has a meta.yaml with kernel_predictors,
            those are read and all of them must be there, else every .pkl file is. A name comes before a folder of
            that name; a Path is always a folder.
        cache: where forests are kept as arrays, so that a pickle is read once; default $ONESHOT_CACHE, else
            $XDG_CACHE_HOME/oneshot, else ~/.cache/oneshot. Its sub-folder nn_meter is used.
        progress: a bar while downloading; None: on a terminal only.

    Raises:
        ConfigurationError: no such hardware, files missing or changed since their download, or no network; the
            message then says which file to put where.
        UnsafePickleError: a file holds anything but a random forest. Nothing of it was run.

    >>> import pickle
    >>> from sklearn.ensemble import RandomForestRegressor
    >>> relu = RandomForestRegressor(2, bootstrap=False).fit([[8, 3], [4, 3]], [0.5, 0.2])  # [H, channels] -> ms
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "relu.pkl").write_bytes(pickle.dumps(relu))
    ...     _ = Path(folder, "fusion_rules.json").write_text('{"BF_conv_relu": {"obey": true}}')
    ...     mine = load_predictor_set(Path(folder), cache=Path(folder, "cache"))
    >>> mine.forests["relu"].predict([[8, 3], [4, 3]])
    array([0.5, 0.2])
    """
    place = _place(hardware)
    if place.missing():
        if place.url is None or (place.folder.is_dir() and any(place.folder.iterdir())):
            raise ConfigurationError(place.incomplete())
        _download(place, progress)
    kept = _ForestCache(_cache_folder() if cache is None else Path(cache))
    hashes = {name: kept.sha256(place.folder / name) for name in place.files()}
    _check_hashes(place, hashes)
    _read_mapping(place.folder / _RULES, json.loads)
    forests = {k: kept.forest(place.folder / f"{k}.pkl", hashes[f"{k}.pkl"]) for k in place.kernels}
    kept.write_index()
    if kept.problem is not None:
        warnings.warn(kept.problem, stacklevel=2)
    rules = (place.folder / _RULES).absolute()
    return PredictorSet(place.name, MappingProxyType(forests), rules, place.source, place.version)


def check_hardware(hardware: str | Path) -> None:
    """ConfigurationError for a hardware that ``load_predictor_set`` does not know. Reads and downloads no predictor."""
    _place(hardware)


# --- where the files of a hardware are --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    name: str
    version: str
    folder: Path
    kernels: tuple[str, ...]
    source: str
    url: str | None = None

    def files(self) -> list[str]:
        return [*(f"{kernel}.pkl" for kernel in self.kernels), _RULES]

    def missing(self) -> list[str]:
        return [name for name in self.files() if not (self.folder / name).is_file()]

    def incomplete(self) -> str:
        """The error text; the folder is never completed here, because half of a download may be damaged as well."""
        lost = self.missing()
        text = f"predictor {self.name!r}: {self.folder} lacks {len(lost)} of {len(self.files())} files: {lost}"
        if self.url is not None:
            return (
                f"{text}. Move that folder away to have all of it downloaded again, or take the files from {self.url}"
            )
        return f"{text}. Put them there, or list in 'kernel_predictors' only what it has"


def _place(hardware: str | Path) -> _Place:
    known = _known() if isinstance(hardware, str) else {}
    if isinstance(hardware, str) and hardware in known:
        return _of_entry(hardware, _newest(hardware, known[hardware]))
    folder = Path(os.path.expanduser(hardware))
    if folder.is_dir():
        return _of_folder(folder)
    names = f", and none of the names known to nn-Meter here: {sorted(known)}" if isinstance(hardware, str) else ""
    raise ConfigurationError(
        f"predictor {str(hardware)!r}: there is no such folder{names}. A folder holds {_RULES} and a file "
        "<kernel>.pkl per kernel, and may hold a meta.yaml"
    )


def _of_folder(folder: Path) -> _Place:
    meta = _read_mapping(folder / "meta.yaml", yaml.safe_load) if (folder / "meta.yaml").is_file() else {}
    if meta.get("kernel_predictors") is None:
        kernels = tuple(sorted(path.stem for path in folder.glob("*.pkl")))
    else:
        kernels = _kernels(meta["kernel_predictors"], str(folder / "meta.yaml"))
    if not kernels:
        raise ConfigurationError(
            f"predictor {str(folder)!r}: no <kernel>.pkl file in this folder; at least 1 is needed"
        )
    name = str(meta.get("name", folder.resolve().name))
    return _Place(name, _version(meta), folder, kernels, f"folder {folder.resolve()}")


def _of_entry(name: str, entry: Mapping[str, Any]) -> _Place:
    where = f"nn-Meter's entry {name!r}"
    kernels, version = _kernels(entry.get("kernel_predictors"), where), _version(entry)
    url, location = entry.get("download"), entry.get("package_location")
    if isinstance(url, str):  # nn-Meter looks for this one first
        if not _is_plain(name):
            raise ConfigurationError(f"{where}: its files lie in a folder of that name, so it cannot hold '/'")
        folder = _data_folder() / "predictor" / name
        return _Place(name, version, folder, kernels, f"{url}, in {folder}", url)
    if isinstance(location, str):
        return _Place(name, version, Path(location), kernels, f"registered with nn-Meter, in {location}")
    raise ConfigurationError(
        f"{where} has neither 'package_location' nor 'download', so where its files are is unknown"
    )


def _kernels(listed: Any, where: str) -> tuple[str, ...]:
    if not isinstance(listed, list) or not listed or not all(isinstance(k, str) and _is_plain(k) for k in listed):
        raise ConfigurationError(
            f"{where}: 'kernel_predictors' is {reprlib.repr(listed)}; a list of file names is needed"
        )
    return tuple(dict.fromkeys(listed))


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def _version(entry: Mapping[str, Any]) -> str:
    return str(entry.get("version", "unknown"))


# --- nn-Meter's configuration, read only ------------------------------------------------------------------------


def _known() -> dict[str, list[dict[str, Any]]]:
    """Name -> its entries: those of the user's file where it exists, and official ones that it does not name."""
    mine = _configuration() / "predictors.yaml"
    known = _entries(mine) if mine.is_file() else {}
    for name, entries in _entries(_official()).items():
        known.setdefault(name, entries)
    return known


def _entries(path: Path) -> dict[str, list[dict[str, Any]]]:
    listed = _read(path, yaml.safe_load)
    if not isinstance(listed, list):
        raise ConfigurationError(f"{path}: a list of predictors is needed, got a {type(listed).__name__}")
    entries: dict[str, list[dict[str, Any]]] = {}
    for entry in listed:
        if isinstance(entry, dict) and isinstance(entry.get("name"), str):
            entries.setdefault(entry["name"], []).append(entry)
    return entries


def _newest(name: str, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    different = [entry for k, entry in enumerate(entries) if entry not in entries[:k]]
    if len(different) == 1:
        return different[0]
    try:
        newest = max(parse(_version(entry)) for entry in different)
        found = [entry for entry in different if parse(_version(entry)) == newest]
    except InvalidVersion as error:
        raise ConfigurationError(f"nn-Meter's entries {name!r}: which is the newest is not clear: {error}") from error
    if len(found) > 1:
        places = [entry.get("package_location", entry.get("download")) for entry in found]
        raise ConfigurationError(
            f"nn-Meter has {len(found)} different entries {name!r} of version {newest}: {places}. Give the folder in "
            f"place of the name, or take one out of {_configuration() / 'predictors.yaml'}"
        )
    return found[0]


def _official() -> Path:
    spec = importlib.util.find_spec("nn_meter")  # finds it without importing it
    if spec is None or spec.origin is None:
        raise ConfigurationError(f"the names of predictors come from nn-Meter, which is not installed. {INSTALL}")
    return Path(spec.origin).parent / "configs" / "predictors.yaml"


def _configuration() -> Path:
    return Path(os.path.expanduser("~/.nn_meter/config"))


def _data_folder() -> Path:
    settings = _configuration() / "settings.yaml"
    if not settings.is_file():
        return Path(os.path.expanduser("~/.nn_meter/data"))
    folder = _read_mapping(settings, yaml.safe_load).get("data_folder")
    if not isinstance(folder, str):
        raise ConfigurationError(f"{settings}: 'data_folder' is {reprlib.repr(folder)}; the path of a folder is needed")
    return Path(folder)


def _read_mapping(path: Path, reader: Callable[[str], Any]) -> dict[str, Any]:
    data = _read(path, reader)
    if not isinstance(data, dict):
        raise ConfigurationError(f"{path}: a mapping is needed, got a {type(data).__name__}")
    return data


def _read(path: Path, reader: Callable[[str], Any]) -> Any:
    try:
        return reader(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror or error}") from error
    # PyYAML lets the others through from the values of damaged scalars.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ConfigurationError(f"{path}: cannot be read: {error}") from error


# --- nn-Meter's download, contained -----------------------------------------------------------------------------


def _download(place: _Place, progress: bool | None) -> None:
    """Fetch into a temporary folder beside the place, check, note the hashes, and move all of it there at once."""
    url, parent = str(place.url), place.folder.parent
    by_hand = (
        f"To put the files there by hand: fetch {url} on a machine that can, and unpack it in {parent}, so that "
        f"{place.folder} holds {', '.join(place.files())}"
    )
    if not url.startswith("https://"):
        raise ConfigurationError(f"predictor {place.name!r}: {url!r} is not downloaded, only https is. {by_hand}")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".oneshot-", dir=parent) as temporary:
            _fetch(url, Path(temporary), progress)
            fetched = replace(place, folder=Path(temporary, place.name))
            if fetched.missing():
                raise ConfigurationError(
                    f"predictor {place.name!r}: the files of {url} lack {place.name}/ with {fetched.missing()}, so it "
                    "is not what nn-Meter's configuration says; nothing was kept"
                )
            hashes = {path.name: _sha256(path) for path in sorted(fetched.folder.iterdir()) if path.is_file()}
            text = json.dumps({"url": url, "sha256": hashes}, indent=2) + "\n"
            (fetched.folder / f"{place.name}.sha256.json").write_text(text, encoding="utf-8")
            _move(fetched.folder, place)
    except OneshotError:
        raise
    except (OSError, BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise ConfigurationError(f"predictor {place.name!r}: {url} cannot be downloaded: {error}. {by_hand}") from error


def _move(fetched: Path, place: _Place) -> None:
    try:
        os.replace(fetched, place.folder)
    except OSError:
        if place.missing():  # else another process was faster
            raise


def _fetch(url: str, folder: Path, progress: bool | None) -> None:
    nn_meter = nn_meter_package()
    utils = importlib.import_module("nn_meter.utils.utils")
    bar = partial(utils.tqdm, disable=None if progress is None else not progress)
    with _DOWNLOADING, replaced(utils, requests=_Requests(utils.requests), tqdm=bar, ZipFile=_ZipFile):
        nn_meter.download_from_url(url, str(folder))


class _Requests:
    """What nn-Meter calls of ``requests``, with a time limit and a look at the answer."""

    def __init__(self, requests: Any) -> None:
        self._requests = requests

    def get(self, url: str, stream: bool) -> Any:
        response = self._requests.get(url, stream=stream, timeout=_SECONDS_WITHOUT_A_BYTE)
        response.raise_for_status()
        for step in (*response.history, response):
            if not step.url.startswith("https://"):
                raise ConfigurationError(f"{url} leads to {step.url}, which is not https; nothing was downloaded")
        return response


class _ZipFile(ZipFile):
    def extractall(self, path: Any = None, members: Any = None, pwd: bytes | None = None) -> None:
        for name in self.namelist():
            if not all(_is_plain(part) for part in PurePosixPath(name).parts):
                raise ConfigurationError(f"the archive's member {name!r} lies outside its folder; nothing was unpacked")
        super().extractall(path, members, pwd)


def _check_hashes(place: _Place, files: Mapping[str, str]) -> None:
    """Every file is the one that was downloaded; files that were put there by other means have no hash to compare."""
    path = place.folder / f"{place.name}.sha256.json"
    if not path.is_file():
        return
    remembered = _read_mapping(path, json.loads).get("sha256")
    if not isinstance(remembered, dict):
        raise ConfigurationError(f"{path}: 'sha256' is {reprlib.repr(remembered)}; a mapping of files is needed")
    for name, sha256 in files.items():
        if name in remembered and remembered[name] != sha256:
            raise ConfigurationError(
                f"predictor {place.name!r}: {place.folder / name} has changed since its download: sha256 then "
                f"{remembered[name]}, now {sha256}. Move the folder away to download it again, or, if the change is "
                f"yours, remove {path}"
            )


# --- forests as arrays ------------------------------------------------------------------------------------------


def _cache_folder() -> Path:
    for variable, inside in (("ONESHOT_CACHE", "."), ("XDG_CACHE_HOME", "oneshot")):
        if os.environ.get(variable):
            return Path(os.environ[variable], inside)
    return Path(os.path.expanduser("~/.cache/oneshot"))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class _ForestCache:
    """Forests by the sha256 of the pickle they were read from, and the sha256 of files by their size and time.

    ``problem``: why nothing is kept, if so; the forests are the same then.
    """

    def __init__(self, folder: Path) -> None:
        self.problem: str | None = None
        self._folder = folder / "nn_meter"
        self._index = self._read_index()
        self._new: dict[str, list[Any]] = {}
        self._states: dict[Path, list[int]] = {}

    def sha256(self, path: Path) -> str:
        """Of a file's content, which is not read again while its size and time of change are what they were."""
        key = str(path.resolve())
        self._states[path] = state = _state(path)
        known = self._index.get(key)
        if known is not None and known[:2] == state:
            return str(known[2])
        try:
            sha256 = _sha256(path)
        except OSError as error:
            raise ConfigurationError(f"{path}: {error.strerror or error}") from error
        # A file of this very moment may change once more without a change of its time.
        if time.time_ns() - state[1] > _NS_OF_A_CLOCK:
            self._new[key] = [*state, sha256]
        return sha256

    def forest(self, path: Path, sha256: str) -> Forest:
        """The forest of the pickle ``path``, whose content has this sha256 by the method above."""
        stored = self._folder / f"{sha256}.npz"
        if stored.is_file():
            try:
                forest = Forest.load(stored)
            except (OneshotError, OSError):
                forest = None  # damaged: it is made again
            if forest is not None and forest.source_sha256 == sha256:
                return forest
        forest = Forest.from_pickle(path)
        if _state(path) != self._states[path]:
            raise ConfigurationError(f"{path}: changed while it was read. Read it again when it is complete")
        self._write(lambda: forest.save(stored, source_sha256=sha256))
        return forest

    def write_index(self) -> None:
        """Remember the sha256 of the files that were read; those of files that are gone are forgotten."""
        if self._new:
            there = {key: entry for key, entry in self._read_index().items() if Path(key).is_file()}
            text = json.dumps({**there, **self._new}).encode()
            self._write(lambda: atomic_write(self._folder / _INDEX, lambda file: file.write(text)))

    def _read_index(self) -> dict[str, list[Any]]:
        try:
            index = json.loads((self._folder / _INDEX).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}  # it is made again
        entries = index.items() if isinstance(index, dict) else ()
        return {key: entry for key, entry in entries if isinstance(entry, list) and len(entry) == 3}

    def _write(self, write: Callable[[], object]) -> None:
        if self.problem is not None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write()
        except OSError as error:
            self.problem = (
                f"the cache {self._folder} cannot be written: {error}. Predictors are read from their pickles each "
                "time, which takes longer. Set ONESHOT_CACHE to a folder that can be written"
            )


def _state(path: Path) -> list[int]:
    """Size in bytes and time of the last change in ns."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
