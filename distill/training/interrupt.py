"""Ctrl-C, SIGTERM and SIGHUP between two steps of training, not within one."""

import _thread
import signal
import threading
from types import TracebackType

from featcache.stop import SIGNALS, Stop, Stopped

PATIENCE = 10.0
"""Seconds that they wait for."""
SHARED_PATIENCE = 25.0
"""The same where processes stop together; `torchrun` kills them after 30."""


class PutOffInterrupt:
    """Within it, Ctrl-C, SIGTERM or SIGHUP only set `asked`; a second Ctrl-C, or ten seconds, raise KeyboardInterrupt (of
    SIGTERM and SIGHUP: `featcache.stop.Stopped`) wherever the program is.

    Where it was asked for and nothing was raised, it is raised at the end. Outside the main thread, and where somebody else
    handles a signal or it is ignored, that signal stays as it is.

    Args:
        shared: by several processes, which stop together: more patience, and none is lost with a second Ctrl-C, for the
            terminal's and the launcher's arrive both.

    Attributes:
        asked: whether one of them came.
    """

    def __init__(self, shared: bool = False):
        self.asked, self._shared, self._number = False, shared, int(signal.SIGINT)
        main = threading.main_thread()
        usual = {number: signal.getsignal(number) for number in (signal.SIGINT, *SIGNALS)}
        self._usual = {
            number: handler
            for number, handler in usual.items()
            if handler in (signal.default_int_handler, signal.SIG_DFL) or isinstance(handler, Stop)
            if threading.current_thread() is main
        }
        self._expired = False
        self._again = threading.Timer(SHARED_PATIENCE if shared else PATIENCE, self._expire, (main.ident,))
        self._again.daemon = True

    def __enter__(self) -> "PutOffInterrupt":
        for number in self._usual:
            signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._again.cancel()
        for number, handler in self._usual.items():
            signal.signal(number, handler)
        if kind is None:
            self.stop_if_asked()

    def ask(self, number: int = signal.SIGTERM) -> None:
        """As if that signal had come: another process got it."""
        if not self.asked:
            self.asked, self._number = True, number
            self._again.start()

    def stop_if_asked(self) -> None:
        """Raises where one of them came; there is no hurry from then on."""
        if self.asked:
            self._again.cancel()
            raise KeyboardInterrupt if self._number == signal.SIGINT else Stopped(self._number)

    def _handle(self, number: int, _: object) -> None:
        if self._expired or (self.asked and number == signal.SIGINT and not self._shared):
            self.stop_if_asked()
        self.ask(number)

    def _expire(self, main: int) -> None:
        self._expired = True
        if hasattr(signal, "pthread_kill"):
            signal.pthread_kill(main, self._number)  # wakes the main thread, if it waits in the system
        else:
            _thread.interrupt_main(signal.Signals(self._number))
