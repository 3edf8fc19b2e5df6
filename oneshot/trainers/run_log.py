"""The files of a run that grow: JSON lines and TensorBoard, cut back to the checkpoint on resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, final

from ..loggers import JsonLines, TensorBoard, markdown_table

__all__ = ["RunLog"]


@final
class RunLog:
    """``log.jsonl`` (no clock in it, so that equal runs have equal logs) and ``tensorboard/`` in one folder.

    ``size``: bytes of the log that belong to the run so far, 0 for a new one. ``step``: the steps done.
    """

    def __init__(self, folder: Path, *, size: int, step: int) -> None:
        with ExitStack() as stack:
            self._lines = stack.enter_context(JsonLines(folder / "log.jsonl", size))
            self._board = TensorBoard(folder / "tensorboard", purge_step=step or None)
            stack.pop_all()

    @property
    def size(self) -> int:
        return self._lines.size

    def values(self, kind: str, phase: str, epoch: int, step: int, values: Mapping[str, Any]) -> None:
        """One line, and one point per value in the charts."""
        self._lines.write({"kind": kind, "phase": phase, "epoch": epoch, "step": step, **values})
        self._board.scalars(step, {f"{kind}/{name}": float(value) for name, value in values.items()})

    def probabilities(self, step: int, probabilities: Mapping[str, Sequence[float]]) -> None:
        """One histogram per label, whose bars are its options."""
        self._board.probabilities(step, probabilities)

    def table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The final table as text."""
        self._board.text("result", markdown_table(rows), step)

    def sync(self) -> None:
        """Put everything on the disk: a checkpoint is about to say how long the log is."""
        self._lines.sync()
        self._board.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._lines.close()
        finally:
            self._board.close()
