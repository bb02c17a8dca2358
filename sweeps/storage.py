"""Where a sweep's checkpoints are: in its own folder, which all workers see, or in a bucket."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from . import checkpoints
from .bucket import Bucket, left_after, of_the_store, patiently

LOOK_S = 30.0


class Storage:
    """A sweep's checkpoints, for its driver and its workers.

    Where they are in a bucket, the driver's own folder gets of each trial that ends what people and MLflow want of it.
    A bucket that is away is waited for; what cannot be deleted just now is no reason to wait.

    Args:
        folder: the sweep's; its last part is the sweep's name.
        url: of the bucket where sweeps have their checkpoints; empty if that is the folder.

    Attributes:
        given_up: whether nobody wants to wait for the bucket any more.
    """

    def __init__(self, folder: Path, url: str = "") -> None:
        self.folder = folder
        self.bucket = Bucket(url, folder.name) if url else None
        self.given_up: Callable[[], bool] = lambda: False

    @contextlib.contextmanager
    def watched(self, tell: Callable[[str], None]) -> Iterator[None]:
        """Within the block, people are told when the bucket goes away, and when it is back.

        Its driver asks it for something only when a trial ends, and the workers that wait for it have no voice.
        """
        ended = threading.Event()

        def look(bucket: Bucket) -> None:
            away = False
            while not ended.wait(LOOK_S):
                try:
                    bucket.begun_epoch(0)
                except OSError as err:
                    if not away:
                        reason = " ".join(str(err).split())
                        tell(f"--storage does not answer; trials wait for it, nothing is lost ({reason})")
                    away = True
                else:
                    if away:
                        tell("--storage answers again.")
                    away = False

        if self.bucket:
            threading.Thread(target=look, args=(self.bucket,), daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def wait_until_it_answers(self) -> None:
        """Asks the bucket, if there is one, until it answers.

        Raises:
            OSError: it refuses, or nobody waits any more.
        """
        if bucket := self.bucket:
            patiently(lambda: bucket.begun_epoch(0), self.given_up)

    def last(self, number: int) -> Path | None:
        """A trial's newest checkpoint that has a seal, in the sweep's folder.

        Raises:
            OSError: the bucket refuses; nobody waits for it any more; or the disk is full.
        """
        if bucket := self.bucket:
            patiently(lambda: bucket.fetch_last(number, self.folder), self.given_up)
        return checkpoints.last(self.folder, number)

    @contextlib.contextmanager
    def at_hand(
        self, number: int, *, epochs: int, whole: int, known: Path | None
    ) -> Iterator[tuple[Path | None, Path | None]]:
        """Folders with what a trial goes on from: its checkpoint, and the beginning of the next epoch.

        Where the trial has been told of before, a bucket that refuses is waited for, too: the trial is not lost while
        it waits.

        Args:
            epochs, whole, known: as of `checkpoints.newest`.
        Raises:
            OSError: the bucket refuses a new trial.
        """
        new = epochs == 0 and known is None
        with contextlib.ExitStack() as stack:
            folder, found = self.folder, checkpoints.folders(self.folder, number)
            if bucket := self.bucket:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                patiently(lambda: bucket.fetch_begun_epoch(number, folder), refusals=not new)

            def newest() -> Path | None:
                each = self.bucket.folders(number, folder) if self.bucket else found
                return checkpoints.newest(each, epochs=epochs, whole=whole, known=known)

            checkpoint = patiently(newest, refusals=not new)
            after = checkpoints.epoch_of(checkpoint) if checkpoint else 0
            yield checkpoint, checkpoints.begun_epoch(folder, number, after=after)

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

    def left(self, number: int, *, after: int) -> str:
        """The seal of the beginning of the epoch that follows so many; empty if no worker has left one."""
        if self.bucket:
            with contextlib.suppress(OSError):
                seal = self.bucket.begun_epoch(number)
                return seal if left_after(seal) == after else ""
            return ""
        begun = checkpoints.begun_epoch(self.folder, number, after=after)
        return (begun / checkpoints.SEAL_FILE).read_text() if begun else ""

    def drop_begun(self, number: int) -> None:
        """Forgets the beginning of an epoch; there may be none."""
        checkpoints.drop_begun_epoch(self.folder, number)
        if self.bucket:
            with contextlib.suppress(OSError):
                self.bucket.drop_begun_epoch(number)

    def drop_old(self, number: int, keep: int) -> None:
        """Deletes what is older than a trial's newest whole checkpoints."""
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

    def waits(self, err: OSError) -> bool:
        """Whether an error is of the bucket. A trial that runs waits for it, come what may: it would be lost else."""
        return self.bucket is not None and of_the_store(err)
