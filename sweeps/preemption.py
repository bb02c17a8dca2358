"""SIGTERM to a trial's worker: its machine is wanted back.

A worker that trains hears of it between two steps, keeps what it has of the epoch, and ends; Ray Tune starts the trial
again, here or elsewhere. One that waits until it can tell an epoch keeps that. One that does neither ends at once.

Only a worker that lives can save: Ray's workers end a tenth of a second after their node's raylet. Whoever takes a
machine back signals the workers first (``pkill -TERM -f ray::QafeTrial``), and gives them time for a step.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from ray.tune import Trainable
from ray.tune.trainable import wrap_function

EXIT_STATUS = 128 + signal.SIGTERM


class Preemption:
    """Whether this process is asked to leave.

    Attributes:
        asked: it is, and has a training to keep first.
    """

    def __init__(self) -> None:
        self.asked = False
        self._trains = False

    def listen(self) -> None:
        """Hears SIGTERM from now on. In the main thread, for Python sets handlers nowhere else."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # see `cluster`
        leave = signal.getsignal(signal.SIGTERM)  # Ray's own, which ends the process in order

        def hear(number: int, frame: Any) -> None:
            if self._trains:
                self.asked = True
            elif callable(leave):
                leave(number, frame)
            else:
                self.leave()

        signal.signal(signal.SIGTERM, hear)

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """The block trains, and tells what it has trained: it looks at ``asked`` and leaves by itself. What it raises
        once it is asked is of no account."""
        self._trains = True
        ended = False
        try:
            yield
        except SystemExit:  # Tune ends the trial here, and makes this process ready for another: that one leaves
            ended = True
            raise
        finally:
            self._trains = False
            if self.asked and not ended:  # SIGTERM to all of a machine's processes ends those that read clips, too
                self.leave()

    @staticmethod
    def leave() -> NoReturn:
        """Ends the process from any thread."""
        os._exit(EXIT_STATUS)


PREEMPTION = Preemption()
"""Of this process, as signals are."""


def preemptible(train: Callable[[dict[str, Any]], None]) -> type[Trainable]:
    """A function that Ray Tune can run, whose worker heeds SIGTERM."""

    class QafeTrial(wrap_function(train)):  # type: ignore[misc]
        """Ray makes it in the worker's main thread, and calls the function in another."""

        def setup(self, config: dict[str, Any]) -> None:
            # By name: the class is copied to the worker, and a copy of its `PREEMPTION` would be another one.
            from sweeps.preemption import PREEMPTION

            PREEMPTION.listen()
            super().setup(config)

    return QafeTrial
