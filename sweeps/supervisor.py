"""The process that people start: it starts the driver of a sweep, passes signals on, and outlives it.

A driver may die without a last word: Ray ends it where its raylet or its GCS has gone (in C++, past all of Python), the
kernel where memory runs out. This process loads no Ray and no torch as long as that does not happen; if it does, it
closes the driver's runs and says how the sweep goes on.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from .interruption import SIGNALS

NOTES_VARIABLE = "QAFE_DRIVER_NOTES"
"""Environment variable of a driver: the file descriptor on which it tells this process of itself."""
PR_SET_PDEATHSIG = 1


def supervise(module: str, argv: Sequence[str]) -> int:
    """Runs a module as the driver, to its end, and returns its exit status."""
    heard, told = os.pipe()
    parent_dies = ctypes.CDLL(None).prctl  # looked up before the fork
    driver = subprocess.Popen(
        [sys.executable, "-m", module, *argv],
        env=os.environ | {NOTES_VARIABLE: str(told)},
        pass_fds=[told],
        preexec_fn=lambda: parent_dies(PR_SET_PDEATHSIG, signal.SIGKILL),
    )
    os.close(told)

    def pass_on(number: int, frame: FrameType | None) -> None:
        driver.send_signal(number)

    for number in SIGNALS:
        if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    status = driver.wait()
    found: dict[str, Any] = {}
    os.set_blocking(heard, False)
    with open(heard, "rb", buffering=0) as pipe:
        for line in (pipe.read(2**16) or b"").splitlines():
            found |= json.loads(line)
    if scratch := found.get("scratch"):  # of Ray, which dies with its driver
        shutil.rmtree(scratch, ignore_errors=True)
    if found.get("folder") and not found.get("closed"):
        from .driver import close_for  # now it may take its time

        name = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return close_for(found, found.get("gone") or f"its driver {name}")
    return 128 - status if status < 0 else status


class Notes:
    """What a driver tells the process that has started it, if that is one of these."""

    def __init__(self) -> None:
        self._told = os.environ.pop(NOTES_VARIABLE, "")
        if self._told:
            os.set_inheritable(int(self._told), False)

    @property
    def supervised(self) -> bool:
        """Whether there is one."""
        return bool(self._told)

    def tell(self, **notes: Any) -> None:
        """``folder``: the sweep that is driven; ``address`` of its cluster; ``notify``: who wants to hear of its end;
        ``closed``: whether its runs are; ``gone``: what of Ray has; ``scratch``: what is to be deleted."""
        if self._told:
            os.write(int(self._told), json.dumps(notes).encode() + b"\n")


NOTES = Notes()
"""Of this process."""
