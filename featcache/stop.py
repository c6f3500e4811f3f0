"""SIGTERM and SIGHUP, which clusters and closed terminals send, stop a run as Ctrl-C does: what is in hand is saved."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
AGAIN = 5.0
"""Seconds after the first in which another one is the same request, and does not disturb the saving."""


class Stopped(KeyboardInterrupt):
    """Raised where SIGTERM or SIGHUP came; whatever handles Ctrl-C handles it.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


class Stop:
    """A signal handler that raises `Stopped`."""

    _last = -AGAIN

    def __call__(self, number: int, frame: object) -> None:
        if time.monotonic() - self._last >= AGAIN:
            self._last = time.monotonic()
            raise Stopped(number)


@contextmanager
def stoppable() -> Iterator[None]:
    """Within it, SIGTERM and SIGHUP raise `Stopped` in the main thread, which then does what it does on Ctrl-C.

    One that is ignored (`nohup`) or that somebody else handles stays so; outside the main thread nothing changes.
    """
    handler, main = Stop(), threading.current_thread() is threading.main_thread()
    mine = [number for number in SIGNALS if main and signal.getsignal(number) is signal.SIG_DFL]
    for number in mine:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)
