"""Where numbers of a run go: a JSON-lines file, TensorBoard, a progress line, a table."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .errors import ConfigurationError
from .files import errors_about

__all__ = ["JsonLines", "Progress", "TensorBoard", "markdown_table", "read_json_lines"]

_SECONDS_BETWEEN_VALUES = 0.5


class JsonLines:
    """An append-only log with one JSON object per line, each line on its way to the disk when ``write`` returns.

    Args:
        path: the log; made when missing, its folder must exist. A last line without line end (a process
            was killed while writing it) is cut off, so that the next line stays readable.
        size: cut the log back to this many bytes before appending. To resume a run, give the ``size`` that
            was stored with the checkpoint; the lines that came after the checkpoint are then written again
            and do not stand twice.

    Raises:
        ConfigurationError: the log is shorter than ``size``, or no line ends there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "log.jsonl")
    ...     with JsonLines(path) as log:
    ...         log.write({"step": 0, "loss": torch.tensor(0.5)})
    ...         at_checkpoint = log.size
    ...         log.write({"step": 1, "loss": float("nan")})
    ...     lost = read_json_lines(path)[1]
    ...     with JsonLines(path, size=at_checkpoint) as log:
    ...         log.write({"step": 1, "loss": 0.25})
    ...     at_checkpoint, lost, read_json_lines(path)
    (25, {'step': 1, 'loss': 'nan'}, [{'step': 0, 'loss': 0.5}, {'step': 1, 'loss': 0.25}])
    """

    def __init__(self, path: str | os.PathLike[str], size: int | None = None) -> None:
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise ConfigurationError(
                f"JsonLines: cannot open {str(self.path)!r}, there is no folder {str(self.path.parent)!r}. "
                "Make it first."
            )
        keep = _end_of_last_line(self.path) if size is None else _checked_size(self.path, size)
        # Without a buffer: one would keep what a full disk refuses, and try it again at the next line.
        self._file = self.path.open("ab", buffering=0)
        self._file.truncate(keep)
        self._size = keep

    @property
    def size(self) -> int:
        """Bytes of the log, always at the end of a line."""
        return self._size

    def write(self, record: Mapping[str, object]) -> None:
        """Append one line, keys in the given order.

        Floats are written exactly (the shortest text that reads back as the same float), NaN and infinities
        as the strings "nan", "inf", "-inf" because JSON has no such numbers, 0-dim tensors and NumPy scalars
        as their number. Lists, tuples and mappings may be nested.

        Raises:
            ConfigurationError: a key is no string, or a value is none of these; nothing is written.
            OSError: the disk is full, or the like; no half of the line stays.
        """
        content = _to_json(record, f"{self.path.name}: record")
        line = json.dumps(content, allow_nan=False).encode("ascii") + b"\n"
        with errors_about(self.path):
            self._append(line)
        self._size += len(line)

    def _append(self, line: bytes) -> None:
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(self._size)
            raise

    def sync(self) -> None:
        """Wait until the lines are on the disk (fsync).

        Called before a checkpoint stores ``size``, so that the log is not the shorter one after a power cut.
        """
        with errors_about(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_json_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; a last line without line end is ignored.

    The strings "nan", "inf" and "-inf" stay strings; ``float(value)`` reads them.

    Raises:
        ConfigurationError: a line is no JSON object.
    """
    records = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(
                f"{path}, line {number}: not JSON ({error}); got {line[:60]!r}. Remove or repair this line."
            ) from error
        if not isinstance(record, dict):
            raise ConfigurationError(
                f"{path}, line {number}: a JSON {type(record).__name__}, allowed is an object; got {line[:60]!r}. "
                "Remove or repair this line."
            )
        records.append(record)
    return records


def _end_of_last_line(path: Path) -> int:
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def _checked_size(path: Path, size: int) -> int:
    content = path.read_bytes() if path.exists() else b""
    if not 0 <= size <= len(content):
        raise ConfigurationError(
            f"JsonLines: {str(path)!r} has {len(content)} bytes and is to be cut back to {size}; allowed is 0 to "
            f"{len(content)}. The log was shortened or does not belong to this checkpoint: restore it, or "
            "give another path."
        )
    if content[:size].rfind(b"\n") + 1 != size:
        raise ConfigurationError(
            f"JsonLines: {str(path)!r} is to be cut back to {size} of its {len(content)} bytes, but no line ends "
            "there. The log does not belong to this checkpoint: restore it, or give another path."
        )
    return size


def _to_json(value: object, where: str) -> object:
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else repr(float(value))
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_to_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {_key(key, where): _to_json(item, f"{where}[{key!r}]") for key, item in value.items()}
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, (torch.Tensor, np.ndarray)) else ""
    raise ConfigurationError(
        f"{where} is a {type(value).__name__}{shape}; allowed are numbers, strings, bools, None, 0-dim tensors, "
        "and lists and mappings of them. Convert it first, for example with .tolist() or str()."
    )


def _key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise ConfigurationError(
            f"{where} has the key {key!r} of type {type(key).__name__}; allowed are strings. Use str(key)."
        )
    return key


class TensorBoard:
    """Event files for TensorBoard.

    Args:
        folder: where the event files go; made when missing. One folder is one run.
        purge_step: to resume a run, the first step that will be written again: TensorBoard then hides what
            an earlier event file of the folder holds from this step on.

    Values are stored as float32, so a scalar reads back to about 7 digits; ``JsonLines`` is exact. They are written by
    a thread, so that an OSError (the disk is full, or the like) comes out of a later call.
    """

    def __init__(self, folder: str | os.PathLike[str], purge_step: int | None = None) -> None:
        # Imported here: it takes a noticeable time, and only those who log to TensorBoard should wait for it.
        from torch.utils.tensorboard import SummaryWriter

        self._folder = Path(folder)
        with errors_about(self._folder):
            self._writer = SummaryWriter(os.fspath(folder), purge_step=purge_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point per value, in the chart of its key."""
        with errors_about(self._folder):
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, global_step=step)

    def probabilities(self, step: int, probabilities: Mapping[str, Sequence[float]]) -> None:
        """The probabilities of every label as a histogram ``probabilities/<label>``: bar i is option i.

        Bar i has the height p_i and reaches from i − ½ to i + ½, so the axis reads as the option's index. The
        sums stored beside it are those of the random index: Σ p_i, Σ i·p_i and Σ i²·p_i.
        """
        with errors_about(self._folder):
            for label, p in probabilities.items():
                self._bars(step, f"probabilities/{label}", p)

    def _bars(self, step: int, tag: str, p: Sequence[float]) -> None:
        # TensorBoard drops empty bars at both ends and stretches the outermost others to min and max;
        # with these at the edges of the used bars, every bar keeps its place.
        used = [i for i, p_i in enumerate(p) if p_i > 0] or [0, len(p) - 1]
        self._writer.add_histogram_raw(
            tag,
            min=used[0] - 0.5,
            max=used[-1] + 0.5,
            num=sum(p),
            sum=sum(i * p_i for i, p_i in enumerate(p)),
            sum_squares=sum(i * i * p_i for i, p_i in enumerate(p)),
            bucket_limits=[i + 0.5 for i in range(len(p))],
            bucket_counts=list(p),
            global_step=step,
        )

    def text(self, tag: str, markdown: str, step: int) -> None:
        """A text that TensorBoard shows as Markdown."""
        with errors_about(self._folder):
            self._writer.add_text(tag, markdown, global_step=step)

    def flush(self) -> None:
        """Write what is still queued; it is otherwise written every two minutes and by ``close``."""
        with errors_about(self._folder):
            self._writer.flush()

    def close(self) -> None:
        with errors_about(self._folder):
            self._writer.close()


class Progress:
    """A progress line on stderr with the time that is left and the newest values.

    Args:
        total: number of steps of the whole run.
        description: what stands before the bar.
        initial: steps done before, when a run is resumed; they do not count for the speed.
        enabled: None shows the line only when stderr is a terminal, so that a log file stays readable.
    """

    def __init__(self, total: int, description: str, initial: int = 0, enabled: bool | None = None) -> None:
        self._silent = enabled is False
        self._due = 0.0
        self._bar = tqdm(
            total=total,
            desc=description,
            initial=initial,
            disable=None if enabled is None else not enabled,
            dynamic_ncols=True,
        )

    def update(self, values: Mapping[str, float | str] | Callable[[], Mapping[str, float | str]]) -> None:
        """One step is done. Numbers are shown with three digits, strings as they are.

        A function from nothing to the values is called a few times a second, and never if nobody sees the line.

        ``{"loss": 0.41234, "acc": 0.97, "latency": "3.21/2.50 ms"}`` is shown as
        ``loss 0.412 acc 0.97 latency 3.21/2.50 ms``.
        """
        now = time.monotonic()
        if callable(values):
            values = values() if self.shown and now >= self._due else {}
        if values:
            self._due = now + _SECONDS_BETWEEN_VALUES
            shown = (f"{name} {_compact(value, 3)}" for name, value in values.items())
            self._bar.set_postfix_str(" ".join(shown), refresh=False)
        self._bar.update()

    @property
    def shown(self) -> bool:
        """Whether anybody sees the line; values need not be computed for it otherwise."""
        return not self._bar.disable

    def message(self, text: str) -> None:
        """A line of text above the bar; also without a terminal, but not when ``enabled`` is False."""
        if not self._silent:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """The rows as a Markdown table that is also aligned as plain text.

    Columns are the keys in order of first appearance; a missing or None cell is empty. Floats get four
    digits, everything else is ``str()``; columns with nothing but numbers are aligned right. No rows, no text.

    >>> print(markdown_table([{"name": "searched", "ms": 3.14159}, {"name": "largest", "ms": 12, "note": "a|b"}]))
    | name     |    ms | note |
    | -------- | ----: | ---- |
    | searched | 3.142 |      |
    | largest  |    12 | a\\|b |
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if not columns:
        return ""
    rendered = []
    for name in columns:
        values = [row.get(name) for row in rows]
        cells = [_cell(name), *(_cell(value) for value in values)]
        numeric = all(_is_number(value) for value in values if value is not None) and any(
            value is not None for value in values
        )
        rendered.append(_aligned(cells, numeric))
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*rendered, strict=True))


def _aligned(cells: list[str], right: bool) -> list[str]:
    """The cells of one column at one width, with the rule under the first."""
    width = max(3, *(len(cell) for cell in cells))
    head, *body = [cell.rjust(width) if right else cell.ljust(width) for cell in cells]
    return [head, "-" * (width - 1) + ":" if right else "-" * width, *body]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: object) -> str:
    if value is None:
        return ""
    text = _compact(value, 4) if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split("\n"))


def _compact(value: float | str, digits: int) -> str:
    """A number with so many significant digits, but without an exponent from 1000 to a million."""
    if isinstance(value, str):
        return value
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text and abs(value) < 1e6 else text
