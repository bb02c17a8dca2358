"""Where a sweep's checkpoints are: in its own folder, which all workers see, or in a bucket."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from qafe.errors import QafeError

from . import checkpoints
from .bucket import Bucket, patiently


class Storage:
    """A sweep's checkpoints, for its driver and its workers.

    Where they are in a bucket, the driver's own folder gets of each trial that ends what people and MLflow want of it.
    What cannot be deleted just now is no reason to stop.

    Args:
        folder: the sweep's; its last part is the sweep's name.
        url: of the bucket where sweeps have their checkpoints; empty if that is the folder.
        tell: hears when the bucket is away.
    """

    def __init__(self, folder: Path, url: str = "", tell: Callable[[str], None] = lambda _: None) -> None:
        self.folder = folder
        self.bucket = Bucket(url, folder.name) if url else None
        self.tell = tell

    def last(self, number: int) -> Path | None:
        """A trial's newest checkpoint that has a seal, in the sweep's folder."""
        if bucket := self.bucket:
            try:
                patiently(lambda: bucket.fetch_last(number, self.folder), self.tell)
            except OSError as err:
                reason = " ".join(str(err).split())
                raise QafeError(f"checkpoints must be read from --storage, {bucket.url} gives: {reason}.") from err
        return checkpoints.last(self.folder, number)

    @contextlib.contextmanager
    def at_hand(self, number: int) -> Iterator[tuple[Iterator[Path], Path]]:
        """A trial's checkpoints, newest first, and a folder with the beginning of its next epoch, if there is one."""
        if bucket := self.bucket:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                patiently(lambda: bucket.fetch_begun_epoch(number, folder), self.tell)
                yield bucket.folders(number, folder), folder
        else:
            yield checkpoints.folders(self.folder, number), self.folder

    @contextlib.contextmanager
    def leaving(self, number: int) -> Iterator[Path]:
        """A folder for the beginning of an epoch, which is kept when the block ends well."""
        if self.bucket:
            with tempfile.TemporaryDirectory() as name:
                yield Path(name)
                self.bucket.leave_begun_epoch(number, Path(name))
        else:
            with checkpoints.leaving(self.folder, number) as folder:
                yield folder

    def has_begun(self, number: int, *, after: int) -> bool:
        """Whether a worker has left the beginning of the epoch that follows so many."""
        if self.bucket:
            with contextlib.suppress(OSError):
                return self.bucket.has_begun_epoch(number)
            return False
        return checkpoints.begun_epoch(self.folder, number, after=after) is not None

    def drop_begun(self, number: int) -> None:
        """Forgets the beginning of an epoch; there may be none."""
        if self.bucket:
            with contextlib.suppress(OSError):
                self.bucket.drop_begun_epoch(number)
        else:
            checkpoints.drop_begun_epoch(self.folder, number)

    def drop_old(self, number: int, keep: int) -> None:
        """Deletes all but a trial's newest checkpoints."""
        if self.bucket:
            with contextlib.suppress(OSError):
                self.bucket.drop_old(number, keep)
        else:
            checkpoints.drop_old(self.folder, number, keep)

    def thin(self, number: int, *, keep_best: bool) -> bool:
        """Deletes what an ended trial does not need, as `checkpoints.thin`; returns whether all of it is gone."""
        checkpoints.thin(self.folder, number, keep_best=keep_best)
        if self.bucket:
            try:
                self.bucket.thin(number, keep_best=keep_best)
            except OSError:
                return False
        return True
