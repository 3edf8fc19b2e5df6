"""nn-Meter's own command line on today's Python, without its way of reading pickles."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .forest import Forest
from .package import nn_meter_package, pkg_resources_at_hand, replaced

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Run ``nn-meter`` with these arguments; returns its exit code.

    It reads and writes what it always does: its configuration in ~/.nn_meter, which is made when missing, and stdout.
    Predictors are read as random forests and nothing else; its log handlers are removed at the end.

    Raises:
        ConfigurationError: nn-Meter is not installed.
        UnsafePickleError: a predictor file holds anything but a random forest. Nothing of it was run.
        Exception: what nn-Meter itself raises, unchanged: it answers an unknown predictor by NotImplementedError.
    """
    nn_meter = nn_meter_package()
    nn_meter.utils.get_user_data_folder()  # makes the configuration, as its plain import would have
    loaders = importlib.import_module("nn_meter.predictor.utils")
    with pkg_resources_at_hand(), _logging_as_nn_meter_does(), replaced(loaders, pickle=_Forests):
        interface = importlib.import_module("nn_meter.utils.nn_meter_cli.interface")
        with replaced(sys, argv=["nn-meter", *argv]):
            try:
                interface.nn_meter_cli()
            except SystemExit as stop:
                if stop.code is None or isinstance(stop.code, int):
                    return stop.code or 0
                raise
    return 0


class _Forests:
    """What nn-Meter calls of ``pickle``."""

    @staticmethod
    def load(file: BinaryIO) -> Forest:
        return Forest.from_pickle(Path(file.name))


@contextmanager
def _logging_as_nn_meter_does() -> Iterator[None]:
    """Its messages reach stdout inside; handlers, levels and propagation are put back."""
    loggers = [logging.getLogger(), logging.getLogger("nn-Meter")]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("(nn-Meter) %(message)s"))
    loggers[1].addHandler(handler)
    loggers[1].setLevel(logging.INFO)
    loggers[1].propagate = False
    try:
        yield
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            for added in [h for h in logger.handlers if h not in handlers]:
                logger.removeHandler(added)
            logger.setLevel(level)
            logger.propagate = propagate
