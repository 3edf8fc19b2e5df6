"""nn-Meter's download of its official predictors, contained and checked."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import reprlib
import tempfile
import threading
import zlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import BadZipFile, ZipFile

from ...errors import ConfigurationError, OneshotError
from .forest_cache import sha256_of
from .package import nn_meter_package, replaced
from .places import Place, is_plain, read_mapping

__all__ = ["check_hashes", "download"]

_SECONDS_WITHOUT_A_BYTE = 60.0
_DOWNLOADING = threading.Lock()


def download(place: Place, progress: bool | None) -> None:
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
            hashes = {path.name: sha256_of(path) for path in sorted(fetched.folder.iterdir()) if path.is_file()}
            text = json.dumps({"url": url, "sha256": hashes}, indent=2) + "\n"
            (fetched.folder / f"{place.name}.sha256.json").write_text(text, encoding="utf-8")
            _move(fetched.folder, place)
    except OneshotError:
        raise
    except (OSError, BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise ConfigurationError(f"predictor {place.name!r}: {url} cannot be downloaded: {error}. {by_hand}") from error


def _move(fetched: Path, place: Place) -> None:
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
            if not all(is_plain(part) for part in PurePosixPath(name).parts):
                raise ConfigurationError(f"the archive's member {name!r} lies outside its folder; nothing was unpacked")
        super().extractall(path, members, pwd)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and len(value) <= 64 else reprlib.repr(value)


def check_hashes(place: Place, files: Mapping[str, str]) -> None:
    """Every file is the one that was downloaded; files that were put there by other means have no hash to compare."""
    path = place.folder / f"{place.name}.sha256.json"
    if not path.is_file():
        return
    remembered = read_mapping(path, json.loads).get("sha256")
    if not isinstance(remembered, dict):
        raise ConfigurationError(f"{path}: 'sha256' is {reprlib.repr(remembered)}; a mapping of files is needed")
    for name, sha256 in files.items():
        if name in remembered and remembered[name] != sha256:
            raise ConfigurationError(
                f"predictor {place.name!r}: {place.folder / name} has changed since its download: sha256 then "
                f"{_shown(remembered[name])}, now {sha256}. Move the folder away to download it again, or, "
                f"if the change is yours, remove {path}"
            )
