"""Errors of the machine, told from errors of the data: one table from errno to what it means and what to do."""

from __future__ import annotations

import contextlib
import errno
import resource
from collections.abc import Iterator
from typing import Literal, NamedTuple

from .errors import CheckpointError, FaceError, MachineError, ManifestError, MediaError, QafeError

Cure = Literal["wait", "retry", "memory", "none"]
"""What may help: time alone; a new process, perhaps on another machine; less memory; or only somebody who mends it."""
BLAMED_ON_DATA = (ManifestError, MediaError, FaceError, CheckpointError)


class Trouble(NamedTuple):
    """What an errno means."""

    words: str
    step: str
    cure: Cure


_DISK = "Make room, then start again."
_AWAY = "Look at the mount and the network, then start again."
_RIGHTS = "Give this account the right, or name another place."
TROUBLES: dict[int, Trouble] = {
    errno.EMFILE: Trouble("this process may open no more files", "Raise its limit: ulimit -n 65536.", "none"),
    errno.ENFILE: Trouble("this machine may open no more files", "End other processes, or raise fs.file-max.", "wait"),
    errno.ENOMEM: Trouble("this machine has no memory left", "End other processes, or take smaller batches.", "memory"),
    errno.ENOSPC: Trouble("the disk is full", _DISK, "wait"),
    errno.EDQUOT: Trouble("this account's quota is used up", _DISK, "wait"),
    errno.EIO: Trouble("the disk or its network gives input/output errors", "Look at the system's log.", "retry"),
    errno.ENXIO: Trouble("the disk is gone", "Look at the system's log.", "retry"),
    errno.ENODEV: Trouble("the disk is gone", "Look at the system's log.", "retry"),
    errno.ESTALE: Trouble("the network folder has changed under it (stale file handle)", _AWAY, "wait"),
    errno.ETIMEDOUT: Trouble("the network folder does not answer", _AWAY, "wait"),
    errno.ENOTCONN: Trouble("the network folder is not connected", _AWAY, "wait"),
    errno.EHOSTDOWN: Trouble("the network folder's server is down", _AWAY, "wait"),
    errno.EHOSTUNREACH: Trouble("the network folder's server cannot be reached", _AWAY, "wait"),
    errno.ENETDOWN: Trouble("the network is down", _AWAY, "wait"),
    errno.ENETUNREACH: Trouble("the network folder's server cannot be reached", _AWAY, "wait"),
    errno.EACCES: Trouble("this account may not open it", _RIGHTS, "none"),
    errno.EPERM: Trouble("this account may not do that", _RIGHTS, "none"),
    errno.EROFS: Trouble("the disk can only be read", "Name another place, or mount it for writing.", "none"),
}
GONE = Trouble("it was there and is not: a mount may have gone away", _AWAY, "wait")
"""What ENOENT means below a folder that a sweep has read before."""


def machine_cause(err: BaseException) -> OSError | None:
    """The first error of the machine in what has led to an error."""
    seen: set[int] = set()
    found: BaseException | None = err
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        if isinstance(found, OSError) and found.errno in TROUBLES:
            return found
        found = found.__cause__ or found.__context__
    return None


def trouble_of(err: BaseException) -> Trouble | None:
    """What of the machine has led to an error; None if nothing has."""
    cause = machine_cause(err)
    return TROUBLES[cause.errno] if cause is not None and cause.errno is not None else None


def in_true_words(err: BaseException) -> QafeError | None:
    """An error of the machine as such, where it was raised as itself or blamed on the data; None for any other."""
    if isinstance(err, QafeError) and not isinstance(err, BLAMED_ON_DATA):
        return None
    cause, trouble = machine_cause(err), trouble_of(err)
    if cause is None or trouble is None:
        return None
    name = errno.errorcode[cause.errno or 0]
    place = f" ({cause.filename})" if cause.filename else ""
    return MachineError(f"the machine must let files be read and written: {trouble.words}, got {name}{place}. "
                        f"{trouble.step}")  # fmt: skip


@contextlib.contextmanager
def machine_errors_told() -> Iterator[None]:
    """Within the block, an error of the machine that was blamed on the data is raised as what it is."""
    try:
        yield
    except Exception as err:
        if told := in_true_words(err):
            raise told from err
        raise


def raise_open_files() -> int:
    """Lets this process, and those that it starts, open as many files as the system allows it; returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 2**31 if allowed == resource.RLIM_INFINITY else allowed
