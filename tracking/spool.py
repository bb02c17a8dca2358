"""A local, append-only file of what is to be tracked, and how far it has been sent.

Writing a line costs microseconds and never waits for a server. Each entry carries the time at which it happened,
and MLflow keeps one row for equal (metric, step, time, value): sending an entry twice changes nothing.

```
tracking.jsonl           every entry, one JSON object a line
tracking.jsonl.sent      how many bytes of it have been sent
tracking.jsonl.refused   what the server will not take, or what could not be made for it, each with the reason
```
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qafe.errors import TrackingError

logger = logging.getLogger(__name__)

Entry = dict[str, Any]


def _for_owner(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)


class Spool:
    """One sweep's entries, in order, held by one process at a time.

    Args:
        path: the file, for its owner alone (a store's URI may hold a password).
    Raises:
        TrackingError: another process holds it, and sends it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cursor_path = path.with_name(path.name + ".sent")
        self.refused_path = path.with_name(path.name + ".refused")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._out = open(path, "a", encoding="utf-8", opener=_for_owner)  # noqa: SIM115 (open for the spool's life)
        try:
            fcntl.flock(self._out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            if err.errno in (errno.EWOULDBLOCK, errno.EACCES):  # others: a disk without locks
                self._out.close()
                raise TrackingError(
                    f"a spool is sent by one process, {path} is held by another. Its sweep still runs: wait for it."
                ) from err
        self._drop_torn_line()
        self._drop_lost_cursor()

    def append(self, entry: Entry) -> None:
        """Writes one entry; it survives the death of this process."""
        with self._lock:
            self._out.write(json.dumps(entry) + "\n")
            self._out.flush()

    def entries(self) -> Iterator[Entry]:
        """All entries from the first."""
        with open(self.path, encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)

    @property
    def sent(self) -> int:
        """Bytes of the file that have been sent."""
        try:
            return int(self.cursor_path.read_text())
        except (OSError, ValueError):
            return 0

    def unsent(self, after: int = 0) -> Iterator[tuple[Entry, int]]:
        """Entries after the cursor, and after this place, each with the cursor's place after it."""
        with open(self.path, "rb") as lines:
            lines.seek(max(self.sent, after))
            while (line := lines.readline()).endswith(b"\n"):
                yield json.loads(line), lines.tell()

    def mark_sent(self, place: int) -> None:
        """Moves the cursor; what lies before it is on the disk then."""
        with contextlib.suppress(ValueError, OSError):  # closed before; a disk that cannot say
            os.fsync(self._out.fileno())
        unfinished = self.cursor_path.with_name(self.cursor_path.name + ".unfinished")
        unfinished.write_text(str(place))
        unfinished.replace(self.cursor_path)

    def set_aside(self, entry: Entry) -> None:
        """Keeps an entry that the server will not take; one that was set aside before is kept once."""
        found = self.refused()
        if entry | {"refused": ""} not in [kept | {"refused": ""} for kept in found]:
            self.keep_refused([*found, entry])

    def refused(self) -> list[Entry]:
        """The entries that were set aside."""
        try:
            return [json.loads(line) for line in self.refused_path.read_text().splitlines()]
        except FileNotFoundError:
            return []

    def keep_refused(self, entries: Sequence[Entry]) -> None:
        """Replaces the entries that were set aside by those that are left of them."""
        unfinished = self.refused_path.with_name(self.refused_path.name + ".unfinished")
        with open(unfinished, "w", encoding="utf-8", opener=_for_owner) as out:
            out.writelines(json.dumps(entry) + "\n" for entry in entries)
            out.flush()
            os.fsync(out.fileno())
        unfinished.replace(self.refused_path)
        if not entries:
            self.refused_path.unlink()

    def close(self) -> None:
        """Closes the file for writing, and lets another process hold it."""
        with self._lock, contextlib.suppress(ValueError):  # closed before
            self._out.flush()
            os.fsync(self._out.fileno())
            self._out.close()

    def _drop_torn_line(self) -> None:
        """Cuts off a last line that a dying process did not finish."""
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)

    def _drop_lost_cursor(self) -> None:
        """Begins again where the cursor is at no line's end: a power cut has taken lines that it had passed."""
        if not (sent := self.sent):
            return
        with open(self.path, "rb") as content:
            content.seek(sent - 1)
            if content.read(1) == b"\n":
                return
        self.cursor_path.unlink()
        logger.warning("%s has lost entries that had been sent: all that it has is sent again", self.path)
