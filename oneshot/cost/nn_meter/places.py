"""Where the predictors of a hardware are: in a folder, or as nn-Meter's configuration, read only, says."""

from __future__ import annotations

import importlib
import importlib.util
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, parse

from ...errors import ConfigurationError
from ..plain_yaml import ERRORS, load_yaml
from .package import INSTALL

__all__ = ["RULES", "Place", "data_folder", "is_plain", "place_of", "read_mapping"]

RULES = "fusion_rules.json"
_LONGEST = 200  # characters of a name or version


@dataclass(frozen=True)
class Place:
    name: str
    version: str
    folder: Path
    kernels: tuple[str, ...]
    source: str
    url: str | None = None

    def files(self) -> list[str]:
        return [*(f"{kernel}.pkl" for kernel in self.kernels), RULES]

    def missing(self) -> list[str]:
        return [name for name in self.files() if not os.path.isfile(self.folder / name)]

    def incomplete(self) -> str:
        """The error text; the folder is never completed here, because half of a download may be damaged as well."""
        lost = self.missing()
        text = f"predictor {self.name!r}: {self.folder} lacks {len(lost)} of {len(self.files())} files: {lost}"
        if self.url is not None:
            return (
                f"{text}. Move that folder away to have all of it downloaded again, or take the files from {self.url}"
            )
        return f"{text}. Put them there, or list in 'kernel_predictors' only what it has"


def place_of(hardware: str | Path) -> Place:
    known = _known() if isinstance(hardware, str) else {}
    if isinstance(hardware, str) and hardware in known:
        return _of_entry(hardware, _newest(hardware, known[hardware]))
    folder = Path(os.path.expanduser(hardware))
    if os.path.isdir(folder):
        return _of_folder(folder)
    names = f", and none of the names known to nn-Meter here: {sorted(known)}" if isinstance(hardware, str) else ""
    raise ConfigurationError(
        f"predictor {str(hardware)!r}: there is no such folder{names}. A folder holds {RULES} and a file "
        "<kernel>.pkl per kernel, and may hold a meta.yaml"
    )


def _of_folder(folder: Path) -> Place:
    meta = read_mapping(folder / "meta.yaml", load_yaml) if (folder / "meta.yaml").is_file() else {}
    if meta.get("kernel_predictors") is None:
        kernels = tuple(sorted(path.stem for path in folder.glob("*.pkl") if not path.name.startswith(".")))
    else:
        kernels = _kernels(meta["kernel_predictors"], str(folder / "meta.yaml"))
    if not kernels:
        raise ConfigurationError(
            f"predictor {str(folder)!r}: no <kernel>.pkl file in this folder; at least 1 is needed"
        )
    name = _text(meta.get("name", folder.resolve().name), "name", folder / "meta.yaml")
    return Place(name, _version(meta, folder / "meta.yaml"), folder, kernels, f"folder {folder.resolve()}")


def _of_entry(name: str, entry: Mapping[str, Any]) -> Place:
    where = f"nn-Meter's entry {name!r}"
    kernels, version = _kernels(entry.get("kernel_predictors"), where), _version(entry, where)
    url, location = entry.get("download"), entry.get("package_location")
    if isinstance(url, str):  # nn-Meter looks for this one first
        if not is_plain(name):
            raise ConfigurationError(f"{where}: its files lie in a folder of that name, so it cannot hold '/'")
        folder = data_folder() / "predictor" / name
        return Place(name, version, folder, kernels, f"{url}, in {folder}", url)
    if isinstance(location, str):
        return Place(name, version, Path(location), kernels, f"registered with nn-Meter, in {location}")
    raise ConfigurationError(
        f"{where} has neither 'package_location' nor 'download', so where its files are is unknown"
    )


def _kernels(listed: Any, where: str) -> tuple[str, ...]:
    if not isinstance(listed, list) or not listed or not all(isinstance(k, str) and is_plain(k) for k in listed):
        raise ConfigurationError(
            f"{where}: 'kernel_predictors' is {reprlib.repr(listed)}; a list of file names is needed"
        )
    return tuple(dict.fromkeys(listed))


def is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def _version(entry: Mapping[str, Any], where: str | Path) -> str:
    return _text(entry.get("version", "unknown"), "version", where)


def _text(value: Any, key: str, where: str | Path) -> str:
    if value is not None and (not isinstance(value, str | int | float) or len(str(value)) > _LONGEST):
        raise ConfigurationError(f"{where}: {key!r} is {reprlib.repr(value)}; a text is needed")
    return str(value)


def _known() -> dict[str, list[dict[str, Any]]]:
    """Name -> its entries: those of the user's file where it exists, and official ones that it does not name."""
    mine = _configuration() / "predictors.yaml"
    known = _entries(mine) if mine.is_file() else {}
    for name, entries in _entries(_official()).items():
        known.setdefault(name, entries)
    return known


def _entries(path: Path) -> dict[str, list[dict[str, Any]]]:
    listed = _read(path, load_yaml)
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
        where = f"nn-Meter's entries {name!r}"
        newest = max(parse(_version(entry, where)) for entry in different)
        found = [entry for entry in different if parse(_version(entry, where)) == newest]
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


def data_folder() -> Path:
    settings = _configuration() / "settings.yaml"
    if not settings.is_file():
        return Path(os.path.expanduser("~/.nn_meter/data"))
    folder = read_mapping(settings, load_yaml).get("data_folder")
    if not isinstance(folder, str):
        raise ConfigurationError(f"{settings}: 'data_folder' is {reprlib.repr(folder)}; the path of a folder is needed")
    return Path(folder)


def read_mapping(path: Path, reader: Callable[[str], Any]) -> dict[str, Any]:
    data = _read(path, reader)
    if not isinstance(data, dict):
        raise ConfigurationError(f"{path}: a mapping is needed, got a {type(data).__name__}")
    return data


def _read(path: Path, reader: Callable[[str], Any]) -> Any:
    try:
        return reader(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror or error}") from error
    except ERRORS as error:
        raise ConfigurationError(f"{path}: cannot be read: {error}") from error
