"""Decoded frames on this machine's disk: made once, mapped by every process that reads them.

```
$XDG_CACHE_HOME/qafe/frames/<identity>.rgb          a whole video: uint8 RGB [T,H,W,3], nothing else
$XDG_CACHE_HOME/qafe/frames/.<identity>.building    one that a process is writing, or was when it was killed
```
A file's name is the digest of all that its content depends on, so that it is right or not there: frames that change
get another name. Processes read it through the kernel's page cache, which holds one copy for all of them. It is local
by intention: on a network file system another machine may delete what this one has mapped.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import mmap
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..store import Frames, Store

VERSION = 1
"""Of the frames: raise it when decoding or resizing gives other values."""
IN_USE_S = 3600
"""A video that was read in the last hour is never deleted to make room: going round more videos than fit would
delete each just before it is wanted again."""
FREE_SHARE = 0.05
"""Of the disk, left to others."""
_MAPS = 256
"""Videos that a process keeps mapped; each holds a file descriptor."""
_BUILD_FRAMES = 128
_TOUCH_S = 300
_RETRY_S = 60

_log = logging.getLogger(__name__)
_said = mmap.mmap(-1, 1)  # Shared with forked loader workers: what is said, is said once.


def cache_folder() -> Path:
    """Where this user's frames are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qafe" / "frames"


class FrameCache:
    """The cache as one dataset uses it.

    Whoever needs a video first builds it; whoever needs it meanwhile reads the JPEGs. What stands in the way (a full
    disk, the limit, a folder that cannot be written) is said in one line, and the JPEGs are read.

    Args:
        limit_gb: most GiB that all videos of the cache may take together.
        folder: default: `cache_folder`.
    """

    def __init__(self, limit_gb: float, folder: Path | None = None) -> None:
        self.folder = folder or cache_folder()
        self.limit_bytes = int(limit_gb * 2**30)
        self._known: dict[tuple[Store, str, str, int], _Known] = {}
        self._no_room_until = 0.0

    def frames(self, store: Store, patient: str, video: str, size_px: int) -> Frames | None:
        """All frames of a video, uint8 RGB [T,H,W,3] with H = W = size_px, mapped read-only; None if not there.

        Builds it if it can. The JPEGs are compared with what was cached at the first read of each `FrameCache`, and
        again when their folder changes.

        Raises:
            MediaError: a frame cannot be read.
        """
        key = (store, patient, video, size_px)
        stamp = store.stamp(patient, video)
        known = self._known.get(key)
        if known is None or known.stamp != stamp:
            path = self.folder / f"{identity(store, patient, video, size_px)}.rgb"
            known = self._known[key] = _Known(path, stamp, len(store.frame_paths(patient, video)))
        try:
            if time.monotonic() > known.touched + _TOUCH_S:
                os.utime(known.path)  # The time of the last use; FileNotFoundError if it is not there.
                known.touched = time.monotonic()
            return _mapped(known.path, known.count, size_px)
        except (FileNotFoundError, ValueError):  # ValueError: not all frames; not by us.
            pass
        except OSError as err:
            self._give_up(f"cannot be read ({err.strerror})")
            return None
        if time.monotonic() < self._no_room_until:
            return None
        try:
            return _mapped(known.path, known.count, size_px) if self._build(known.path, known.count, *key) else None
        except OSError as err:
            self._give_up(f"cannot be written ({err.strerror})")
            return None

    def _build(self, path: Path, count: int, store: Store, patient: str, video: str, size_px: int) -> bool:
        """Writes a video beside and renames it; False if there is no room or another process is at it."""
        need = count * size_px**2 * 3
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # These are patients' faces.
        if not self._make_room(need):
            return False
        beside = path.with_name(f".{path.stem}.building")
        with _only_builder(beside) as descriptor:
            if descriptor is None:
                return False
            try:
                os.ftruncate(descriptor, 0)
                with open(descriptor, "wb", closefd=False) as out:
                    for first in range(0, count, _BUILD_FRAMES):
                        wanted = range(first, min(first + _BUILD_FRAMES, count))
                        out.write(store.read_frames(patient, video, wanted, size_px).data)
                os.fsync(descriptor)
                if identity(store, patient, video, size_px) != path.stem:  # They were changed meanwhile.
                    return False
                if not _is_file(beside, descriptor):  # It was deleted, and may be another process's by now.
                    return False
                beside.rename(path)
            finally:
                if _is_file(beside, descriptor):
                    beside.unlink(missing_ok=True)
        return True

    def _make_room(self, need: int) -> bool:
        """Deletes what was not used for longest until this many bytes fit; False if that is not enough."""
        files = sorted(_files(self.folder), key=lambda file: file.used)
        held = sum(file.size for file in files)
        usage = shutil.disk_usage(self.folder)
        free = usage.free - int(usage.total * FREE_SHARE)
        for file in files:
            if held + need <= self.limit_bytes and need <= free:
                break
            if file.used > time.time() - IN_USE_S:
                break
            with contextlib.suppress(OSError):
                if _delete(file.path):
                    held, free = held - file.size, free + file.size
        if held + need > self.limit_bytes:
            self._give_up(f"has reached its limit of {self.limit_bytes / 2**30:g} GiB (data.cache_gb)")
        elif need > free:
            self._give_up(f"leaves {FREE_SHARE:.0%} of the disk free")
        return held + need <= self.limit_bytes and need <= free

    def _give_up(self, reason: str) -> None:
        self._no_room_until = time.monotonic() + _RETRY_S
        if not _said[0]:
            _said[0] = 1
            _log.warning("the frame cache %s: frames that it lacks are decoded each time; %s", reason, self.folder)


@dataclass(slots=True)
class _Known:
    path: Path
    stamp: tuple[int, int]
    count: int
    touched: float = -_TOUCH_S


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    size: int
    used: float


def identity(store: Store, patient: str, video: str, size_px: int) -> str:
    """The digest of all that a video's decoded frames depend on: its JPEGs' names, sizes and times of change, where
    they lie, and the side that they are resized to. Opens no file."""
    state = (VERSION, size_px, str(store.root.resolve()), patient, video, store.frame_states(patient, video))
    return hashlib.sha256(repr(state).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def cache_size(folder: Path | None = None) -> tuple[int, int]:
    """(videos, bytes) of the cache."""
    files = list(_files(folder or cache_folder()))
    return sum(file.path.suffix == ".rgb" for file in files), sum(file.size for file in files)


def clear_cache(folder: Path | None = None) -> None:
    """Deletes all videos of the cache but those that a process is building; who has one mapped keeps its content."""
    for file in _files(folder or cache_folder()):
        _delete(file.path)


def _files(folder: Path) -> Iterator[_File]:
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith((".rgb", ".building")):
                with contextlib.suppress(FileNotFoundError):  # Deleted or renamed since.
                    found = entry.stat()
                    yield _File(Path(entry.path), found.st_size, found.st_mtime)


def _delete(path: Path) -> bool:
    """Deletes a file of the cache, and returns whether that is done; what is being built stays."""
    if path.suffix == ".rgb":
        path.unlink(missing_ok=True)  # Who has it mapped keeps its content.
        return True
    with contextlib.suppress(FileNotFoundError), _only_builder(path, os.O_RDWR) as descriptor:
        if descriptor is None:
            return False
        path.unlink()
    return True


@contextlib.contextmanager
def _only_builder(beside: Path, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[int | None]:
    """The file to build in, locked for as long as the process lives; None if another process has it.

    Only who has the lock may rename or delete the file, so that its name means the same file until then.
    """
    descriptor = os.open(beside, flags, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = _is_file(beside, descriptor)  # Who had it may have renamed or deleted it before we had the lock.
        except BlockingIOError:
            ours = False
        yield descriptor if ours else None
    finally:
        os.close(descriptor)


def _is_file(path: Path, descriptor: int) -> bool:
    """Whether a path names the file that is open."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


@functools.lru_cache(maxsize=_MAPS)
def _mapped(path: Path, count: int, size_px: int) -> Frames:
    """Raises: FileNotFoundError, or ValueError: the file does not hold so many frames."""
    whole: Frames = np.memmap(path, np.uint8, mode="r").reshape(count, size_px, size_px, 3).view(np.ndarray)
    return whole
