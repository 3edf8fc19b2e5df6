"""nn-Meter, imported when it is asked for, and without what its import does to a program.

A plain ``import nn_meter`` (2.0) needs the module pkg_resources, which setuptools 82 removed; it writes files into
the user's home; and it sets up logging to stdout. Here it does none of that, and the package itself stays as pip
installed it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import IO, Any

import yaml

from ...errors import ConfigurationError

__all__ = ["INSTALL", "nn_meter_package", "pkg_resources_at_hand", "replaced"]

INSTALL = "Install it: python -m pip install nn-meter"
_CONFIG_MANAGER = "nn_meter.utils.config_manager"
_LOCK = threading.Lock()


def nn_meter_package() -> ModuleType:
    """The package nn_meter, imported now if nobody has yet (about 2 s); a later call returns it at once.

    After this import: no file was written, nothing was printed, no log handler was added, and the logger "nn-Meter"
    is as it was. A package that the program had already imported itself comes back untouched.

    Raises:
        ConfigurationError: nn-Meter, or a package it needs, is not installed; the message has the pip line.

    >>> nn_meter_package().kernel_detector.KernelDetector.__name__, nn_meter_package() is nn_meter_package()
    ('KernelDetector', True)
    """
    with _LOCK:
        if sys.modules.get("nn_meter") is None:
            with pkg_resources_at_hand(), _logger_as_it_was(), _settings_not_written(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # those of its import concern its authors
                _import()
        # The import system waits here for another thread that has not finished importing it.
        return importlib.import_module("nn_meter")


def _import() -> None:
    try:
        importlib.import_module("nn_meter")
    except ImportError as error:
        raise ConfigurationError(f"nn-Meter cannot be imported: {error}. {INSTALL}") from error
    # A prediction writes one line per kernel by logging.info, and that function gives a root logger without handlers
    # one to stderr. A logger of its own says the same to the same handlers and sets nothing up.
    features = importlib.import_module("nn_meter.predictor.prediction.extract_feature")
    features.__dict__["logging"] = logging.getLogger(features.__name__)


@contextmanager
def pkg_resources_at_hand() -> Iterator[None]:
    """``import pkg_resources`` works inside: the real one where there is one, else a stand-in, removed on leaving.

    The stand-in has the three functions that nn-Meter calls: require, resource_filename and resource_listdir.
    """
    if _real_pkg_resources():
        yield
        return
    blocked = {name: module for name, module in sys.modules.items() if name == "pkg_resources"}  # None, if anything
    sys.modules["pkg_resources"] = _pkg_resources()
    try:
        yield
    finally:
        sys.modules.pop("pkg_resources", None)
        sys.modules.update(blocked)


def _real_pkg_resources() -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it announces its own end
            importlib.import_module("pkg_resources")
    except (ImportError, AttributeError):  # AttributeError: an old one on Python 3.12, which has no pkgutil.ImpImporter
        return False
    return True


def _pkg_resources() -> ModuleType:
    def require(distribution: str) -> list[importlib.metadata.Distribution]:
        return [importlib.metadata.distribution(distribution)]

    def resource_filename(package: str, resource: str) -> str:
        return os.path.join(_folder_of(package), *resource.split("/"))

    def resource_listdir(package: str, resource: str) -> list[str]:
        return os.listdir(resource_filename(package, resource))

    module = ModuleType("pkg_resources", "What nn-Meter needs of setuptools' former pkg_resources.")
    module.__spec__ = ModuleSpec("pkg_resources", None)
    module.__dict__.update(require=require, resource_filename=resource_filename, resource_listdir=resource_listdir)
    return module


def _folder_of(package: str) -> str:
    spec = importlib.util.find_spec(package)  # of a top-level package: finds it without importing it
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return os.path.dirname(spec.origin)


@contextmanager
def _logger_as_it_was() -> Iterator[None]:
    """The logger "nn-Meter" says nothing inside, and gets its handlers, level and propagation back.

    What stays: the levels KEYINFO (22) and RESULT (25) by name and number, and the functions and methods ``keyinfo``
    and ``result`` of module logging and of its Logger. nn-Meter's own code calls them, whoever imported it.
    """
    logger = logging.getLogger("nn-Meter")
    handlers, level, propagate, disabled = list(logger.handlers), logger.level, logger.propagate, logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        for handler in list(logger.handlers):
            if handler not in handlers:
                logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate, logger.disabled = propagate, disabled


@contextmanager
def _settings_not_written() -> Iterator[None]:
    """The user's settings are read if they are there, and not made if they are not.

    nn-Meter's import asks for the data folder of ~/.nn_meter/config/settings.yaml, and writes that file and others
    when it cannot be opened. So the module that does it opens files, until its package is imported, by a function
    that has the default settings where there are none.
    """
    finder = _ConfigManagerFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        if _CONFIG_MANAGER in sys.modules:
            sys.modules[_CONFIG_MANAGER].__dict__.pop("open", None)


class _ConfigManagerFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _CONFIG_MANAGER:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _ConfigManagerLoader(spec.loader.name, spec.loader.path)
        return spec


class _ConfigManagerLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)

        def open_or_default(path: str) -> IO[str]:
            try:
                return open(path, encoding="utf-8")
            except OSError:
                return io.StringIO(yaml.safe_dump({"data_folder": module.__default_user_data_folder__}))

        module.__dict__["open"] = open_or_default


@contextmanager
def replaced(module: ModuleType, **names: Any) -> Iterator[None]:
    """Names of a module mean something else inside, for that module alone.

    >>> import posixpath
    >>> with replaced(posixpath, curdir="here"):
    ...     posixpath.curdir
    'here'
    >>> posixpath.curdir
    '.'
    """
    before = {name: getattr(module, name) for name in names}
    module.__dict__.update(names)
    try:
        yield
    finally:
        module.__dict__.update(before)
