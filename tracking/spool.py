"""A local, append-only file of what is to be tracked, and how far it has been sent.

Writing a line costs microseconds and never waits for a server. Each entry carries the time at which it happened,
and MLflow keeps one row for equal (metric, step, time, value): sending an entry twice changes nothing.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


class Spool:
    """One sweep's entries, in order, with a cursor beside them.

    Args:
        path: the file, for its owner alone (a store's URI may hold a password); its cursor is ``<path>.sent``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cursor_path = path.with_name(path.name + ".sent")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_torn_line()
        self._lock = threading.Lock()
        self._out = open(  # noqa: SIM115 (open for the spool's life)
            path, "a", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)
        )

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

    def unsent(self) -> Iterator[tuple[Entry, int]]:
        """Entries after the cursor, each with the cursor's place after it."""
        with open(self.path, "rb") as lines:
            lines.seek(self.sent)
            while (line := lines.readline()).endswith(b"\n"):
                yield json.loads(line), lines.tell()

    def mark_sent(self, place: int) -> None:
        """Moves the cursor."""
        unfinished = self.cursor_path.with_name(self.cursor_path.name + ".unfinished")
        unfinished.write_text(str(place))
        unfinished.replace(self.cursor_path)

    def close(self) -> None:
        """Closes the file for writing."""
        with self._lock:
            self._out.flush()
            os.fsync(self._out.fileno())
            self._out.close()

    def _drop_torn_line(self) -> None:
        """Cuts off a last line that a dying process did not finish."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with open(self.path, "r+b") as out:
                out.truncate(whole)
