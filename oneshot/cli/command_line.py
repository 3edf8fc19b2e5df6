"""The program: its arguments, and where its report goes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import ConfigurationError, OneshotError
from ..files import atomic_write
from .arguments import COSTS, cost_names, made, missing_kernels, sizes_of
from .report import report_of
from .text import as_json, as_text

__all__ = ["main"]

_PROGRAM = "python -m oneshot"

_EXAMPLE = f"""\
example:
  {_PROGRAM} cost search_spaces.mobilenet:proxylessnas --input 1,3,224,224 \\
      --cost params,macs,latency --hardware cortexA76cpu_tflite21 --no-layers

a file of your own, net.py, with a function 'space' that returns the network:
  {_PROGRAM} cost net.py:space --input 1,16:int64 --format json --output cost.json
"""
_HARDWARE = """\
where latency comes from: 'this-machine' (measured with torch), 'this-machine-onnxruntime', the path of a latency
table (.yaml, .yml, .json), else a name that nn-Meter knows, or a folder of its predictors"""


def main(argv: Sequence[str]) -> int:
    """Run the command line with these arguments; returns the exit code, 2 for what cannot work.

    Raises:
        SystemExit: by argparse, for --help, --version and arguments that it does not know.
        Exception: what the modules of the user, or nn-Meter, raise themselves; unchanged.
    """
    try:
        # Not by argparse: --help and the like behind it are nn-Meter's.
        if list(argv[:1]) == ["nn-meter"]:
            from ..cost.nn_meter.command import main as nn_meter

            return nn_meter(list(argv[1:]))
        _cost(_parser().parse_args(argv))
    except OneshotError as error:
        sys.stderr.write(f"{_PROGRAM}: error: {error}\n")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    form: Any = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        _PROGRAM, description="What a network costs.", epilog=_EXAMPLE, formatter_class=form
    )
    parser.add_argument("--version", action="version", version=f"oneshot {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{cost,nn-meter}")
    text = "the cost of a network or search space: by layer, by choice, and what its architectures reach"
    cost = commands.add_parser("cost", help=text, description=text, epilog=_EXAMPLE, formatter_class=form)
    cost.add_argument(
        "model", metavar="MODULE:FACTORY", help="a module or .py file, and what in it returns the network"
    )
    cost.add_argument(
        "--input",
        required=True,
        action="append",
        metavar="SIZES",
        help="the sizes of an input, such as 1,3,224,224; '1,16:int64' makes whole numbers (all 0, for embeddings). "
        "Several inputs: separated by ';', or --input again",
    )
    cost.add_argument(
        "--cost",
        metavar="NAMES",
        help=f"some of {','.join(COSTS)} (default: params,macs; with --hardware latency too)",
    )
    cost.add_argument("--hardware", metavar="NAME-OR-PATH", help=_HARDWARE)
    cost.add_argument("--missing", metavar="KERNEL=MS,...", help="ms of kernels that nn-Meter has no predictor for")
    cost.add_argument("--format", choices=("text", "json"), default="text", help="of the report (default: text)")
    cost.add_argument("--output", metavar="FILE", help="where the report goes (default: the standard output)")
    cost.add_argument(
        "--layers", action=argparse.BooleanOptionalAction, default=True, help="a row per layer (default: yes)"
    )
    commands.add_parser("nn-meter", help="nn-Meter's own command line: all that follows is handed on to it")
    return parser


def _cost(arguments: argparse.Namespace) -> None:
    names = cost_names(arguments.cost, arguments.hardware)
    inputs = [sizes_of(part) for text in arguments.input for part in text.split(";")]
    missing = missing_kernels(arguments.missing)
    # Before anything is counted or measured, and before the user's modules may change the folder.
    output = None if arguments.output is None else _checked_output(Path(arguments.output).absolute())
    if missing and "latency" not in names:
        raise ConfigurationError("--missing is for nn-Meter's predictors: say which, --hardware NAME-OR-FOLDER")
    # What the user's modules print is not part of the report.
    with redirect_stdout(sys.stderr), made(arguments.model) as model:
        report = report_of(model, arguments, names, inputs, missing)
    text = json.dumps(as_json(report), indent=2, allow_nan=False) if arguments.format == "json" else as_text(report)
    _write(f"{text}\n", output)


def _checked_output(path: Path) -> Path:
    if not path.parent.is_dir():
        raise ConfigurationError(f"--output {path}: there is no folder {path.parent}")
    if path.exists() and not path.is_file():
        raise ConfigurationError(f"--output {path}: it is no file; a report replaces what stands there")
    return path


def _write(text: str, output: Path | None) -> None:
    if output is not None:
        try:
            atomic_write(output, lambda file: file.write(text.encode()))
        except OSError as error:
            raise ConfigurationError(f"--output {output}: cannot be written: {error.strerror or error}") from error
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as head, has seen enough; else Python would complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
