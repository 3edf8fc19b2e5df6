"""A signal as a request that the run answers at its next step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["signal_handled"]


@contextmanager
def signal_handled(number: signal.Signals, handle: Callable[[int], None]) -> Iterator[None]:
    """Call ``handle`` on a signal in the main thread of this process; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def handler(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            handle(number)
        else:  # a loader process inherits the handler, and must still end when it is told to
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
