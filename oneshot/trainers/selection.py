"""Which epoch of a phase is kept, and when a phase has got stuck: functions of the history."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ConfigurationError

__all__ = ["Record", "epochs_since", "kept_record", "larger_is_better"]

Record = Mapping[str, Any]


def kept_record(
    records: Sequence[Record], *, admits: Callable[[Record], bool], judged_by: str | None, larger: bool = False
) -> Record | None:
    """The best of the admitted records, the first of equals; without ``judged_by`` the last one; None of none.

    ``judged_by``: the number that counts, the smaller the better, or with ``larger`` the larger; NaN is never kept.

    >>> records = [{"loss": 1.0, "size": 9}, {"loss": 3.0, "size": 4}, {"loss": 2.0, "size": 4}]
    >>> kept_record(records, admits=lambda r: r["size"] <= 5, judged_by="loss")
    {'loss': 2.0, 'size': 4}
    """
    fitting = [record for record in records if admits(record)]
    if judged_by is None:
        return fitting[-1] if fitting else None
    judged = [record for record in fitting if not math.isnan(record[judged_by])]
    return min(judged, key=lambda record: -record[judged_by] if larger else record[judged_by], default=None)


def epochs_since(records: Sequence[Record], kept: Record | None) -> int:
    """How many records come after the kept one; 0 if none is.

    >>> epochs_since([{"epoch": 3}, {"epoch": 4}, {"epoch": 5}], {"epoch": 3})
    2
    """
    return 0 if kept is None else int(records[-1]["epoch"]) - int(kept["epoch"])


def larger_is_better(monitor: str, mode: str | None) -> bool:
    """Whether more of ``monitor`` is better: of the loss less is, of a metric more, if ``mode`` does not say.

    >>> larger_is_better("loss", None), larger_is_better("acc1", None), larger_is_better("error", "min")
    (False, True, False)
    """
    if mode not in (None, "min", "max"):
        raise ConfigurationError(f"monitor_mode={mode!r}: allowed are 'min', 'max' and None")
    return monitor != "loss" if mode is None else mode == "max"
