"""Whether the driver of a sweep is asked to end it: by Ctrl-C, SIGTERM or SIGHUP.

All of them end the sweep in the same way: its runs are closed, and it can go on later. Where the driver runs Ray Tune,
it leaves between two events; anywhere else KeyboardInterrupt is raised at once, as Python does on Ctrl-C.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_S = 1.0
"""Signals so near to each other are one: ``timeout`` signals its child and then the whole process group."""


class Interruption:
    """Whether this process is asked to leave its sweep.

    Attributes:
        asked: it is.
    """

    def __init__(self) -> None:
        self.asked = False
        self._asked_at = 0.0
        self._deferred = False

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Within the block, signals are heard; one that was ignored before (``nohup``, ``&`` in a script) still is."""
        self.asked = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.asked = False

    def listen(self) -> None:
        """Sets the handlers, again where Ray has set its own. SIGTERM is never ignored: it comes from somebody who
        ends the sweep."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._hear)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block, whoever runs there looks at ``asked`` and leaves where nothing is half done."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now, first = time.monotonic(), not self.asked
        if first:
            self.asked, self._asked_at = True, now
        if first and not self._deferred:
            raise KeyboardInterrupt
        # Whoever presses Ctrl-C again does not want to wait for what is still to be closed.
        if not first and number == signal.SIGINT and now - self._asked_at > SAME_S:
            raise KeyboardInterrupt


INTERRUPTION = Interruption()
"""Of this process, as signals are."""
