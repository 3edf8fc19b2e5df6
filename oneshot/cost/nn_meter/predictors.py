"""Kernel predictors by the name of their hardware, or from a folder: found, fetched, checked, and read as arrays."""

from __future__ import annotations

import json
import reprlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import final

from ...errors import ConfigurationError
from ...files import user_cache
from .download import check_hashes, download
from .forest import Forest
from .forest_cache import ForestCache
from .places import RULES, place_of, read_mapping

_MOST_RULES, _MOST_OPERATORS = 10_000, 20  # 200 and 4 in nn-Meter's own files

__all__ = ["PredictorSet", "check_hardware", "load_predictor_set"]


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

    >>> import pickle, tempfile
    >>> from sklearn.ensemble import RandomForestRegressor
    >>> relu = RandomForestRegressor(2, bootstrap=False).fit([[8, 3], [4, 3]], [0.5, 0.2])  # [H, channels] -> ms
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "relu.pkl").write_bytes(pickle.dumps(relu))
    ...     _ = Path(folder, "fusion_rules.json").write_text('{"BF_conv_relu": {"obey": true}}')
    ...     mine = load_predictor_set(Path(folder), cache=Path(folder, "cache"))
    >>> mine.forests["relu"].predict([[8, 3], [4, 3]])
    array([0.5, 0.2])
    """
    place = place_of(hardware)
    if place.missing():
        if place.url is None or (place.folder.is_dir() and any(place.folder.iterdir())):
            raise ConfigurationError(place.incomplete())
        download(place, progress)
    kept = ForestCache(user_cache() if cache is None else Path(cache))
    hashes = {name: kept.sha256(place.folder / name) for name in place.files()}
    check_hashes(place, hashes)
    _check_rules(place.folder / RULES)
    forests = {k: kept.forest(place.folder / f"{k}.pkl", hashes[f"{k}.pkl"]) for k in place.kernels}
    kept.write_index()
    if kept.problem is not None:
        warnings.warn(kept.problem, stacklevel=2)
    rules = (place.folder / RULES).absolute()
    return PredictorSet(place.name, MappingProxyType(forests), rules, place.source, place.version)


def _check_rules(path: Path) -> None:
    """Fusion rules as nn-Meter reads them: "BF_conv_bn_relu" -> {"obey": true, false, a number or null}."""
    rules = read_mapping(path, json.loads)
    if len(rules) > _MOST_RULES:
        raise ConfigurationError(f"{path}: {len(rules):,} fusion rules; at most {_MOST_RULES:,} are read")
    for name, rule in rules.items():
        obey = rule.get("obey", "nothing") if isinstance(rule, Mapping) else "nothing"
        if (obey is not None and not isinstance(obey, int)) or name.count("_") > _MOST_OPERATORS:
            raise ConfigurationError(
                f"{path}: fusion rule {reprlib.repr(name)}: {reprlib.repr(rule)}; needed is a name such as "
                f"'BF_conv_bn_relu', of at most {_MOST_OPERATORS} operators, with {{'obey': true}}, false or null"
            )


def check_hardware(hardware: str | Path) -> None:
    """ConfigurationError for a hardware that ``load_predictor_set`` does not know. Reads and downloads no predictor."""
    place_of(hardware)
