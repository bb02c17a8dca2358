"""Videos side by side, in processes that may die without taking the others along."""

from __future__ import annotations

import functools
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
)
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from ..errors import QafeError
from ..machine_errors import in_true_words
from .labels import Problem, Recording

_log = logging.getLogger(__name__)


class Workers(Executor):
    """Processes of this machine, each with its own pool, so that one that dies takes only its own video along.

    A video whose process dies is tried once more; then its future has the error.
    """

    def __init__(self, count: int) -> None:
        self._threads = ThreadPoolExecutor(count)
        self._own = threading.local()
        self._pools: list[ProcessPoolExecutor] = []
        self._lock = threading.Lock()
        self._cancelled = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As of any executor."""
        return self._threads.submit(self._run, functools.partial(fn, *args, **kwargs))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As of any executor; with ``cancel_futures``, also ends what is running."""
        self._threads.shutdown(wait=False, cancel_futures=cancel_futures)
        if cancel_futures:
            with self._lock:
                self._cancelled = True
                for process in [one for pool in self._pools for one in (pool._processes or {}).values()]:
                    process.kill()
        self._threads.shutdown(wait)
        for pool in self._pools:
            pool.shutdown(wait)

    def _run(self, task: Callable[[], Any]) -> Any:
        for last in (False, True):
            with self._lock:
                if self._cancelled:
                    raise CancelledError
                future = self._pool().submit(task)
            try:
                return future.result()
            except BrokenExecutor:
                self._own.pool = None
                if last:
                    raise
        raise AssertionError("the loop returns or raises")

    def _pool(self) -> ProcessPoolExecutor:
        """This thread's own."""
        pool: ProcessPoolExecutor | None = getattr(self._own, "pool", None)
        if pool is None:
            self._own.pool = pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_die_with_parent)
            self._pools.append(pool)
            # Inherited by the process: Ctrl-C is for the parent, who ends it.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        return pool


def _die_with_parent() -> None:
    """Leaves nobody behind who would go on writing after the parent was killed."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def each(
    task: Callable[..., Any], jobs: Sequence[Any], executor: Executor | None, workers: int, folders: Sequence[Path]
) -> Iterator[tuple[Any, Any]]:
    """(job, result or problem) as the jobs finish; problems tell paths as below the folders."""
    owned = None if executor else Workers(max(min(workers, len(jobs)), 1))
    running = executor or owned
    assert running is not None
    try:
        futures = {running.submit(task, job): job for job in jobs}
        for future in as_completed(futures):
            job = futures.pop(future)
            try:
                yield job, future.result()
            except Exception as err:  # one video must not end the others
                yield job, _problem(job, err, folders)
    finally:
        if owned:
            owned.shutdown(cancel_futures=True)


def _problem(job: Any, err: Exception, folders: Sequence[Path]) -> Problem:
    err = in_true_words(err) or err
    video, patient = (job.source, job.patient) if isinstance(job, Recording) else ("/".join(job), job[0])
    if isinstance(err, QafeError):
        reason = str(err)
    elif isinstance(err, OSError):  # of no number that says what is wrong
        reason = f"it could not be read or written ({err.strerror or err}). Check the disks and start again."
    elif isinstance(err, BrokenExecutor):
        reason = (
            "its process died twice: the file may be damaged in a way that ends the decoder, or memory ran out. Try "
            "it alone with --workers 1 and less --memory-mb."
        )
    else:
        _log.debug("%s", video, exc_info=err)
        reason = f"an unexpected {type(err).__name__} ({err}). Run again with --debug and report it."
    # The report is to hold no path of a machine.
    for folder in folders:
        for path in (folder.expanduser().absolute(), folder.expanduser().resolve()):
            reason = reason.replace(f"{path}/", "")
    return Problem(video, patient, reason)
