"""Ctrl-C between two steps of training, not within one."""

import signal
import threading
from types import TracebackType

PATIENCE = 10.0
"""Seconds that Ctrl-C waits for."""


class PutOffInterrupt:
    """Within it, Ctrl-C only sets `asked`; a second one, or ten seconds, raise KeyboardInterrupt wherever the program is.

    Where it was asked for and nothing was raised, KeyboardInterrupt is raised at the end. Outside the main thread, and
    where somebody else handles SIGINT, Ctrl-C stays as it is.

    Args:
        active: Ctrl-C stays as it is without.

    Attributes:
        asked: whether Ctrl-C was pressed.
    """

    def __init__(self, active: bool = True):
        self.asked, main = False, threading.main_thread()
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        self._active = active and usual and threading.current_thread() is main
        self._again = threading.Timer(PATIENCE, signal.pthread_kill, (main.ident, signal.SIGINT))
        self._again.daemon = True

    def __enter__(self) -> "PutOffInterrupt":
        if self._active:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._again.cancel()
        if self._active:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if kind is None:
            self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Raises KeyboardInterrupt where Ctrl-C was pressed; there is no hurry from then on."""
        if self.asked:
            self._again.cancel()
            raise KeyboardInterrupt

    def _handle(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._again.start()
