"""A sweep's checkpoints in an object store: ``--storage s3://bucket/prefix``.

Workers and driver share no folder then. Ray Tune uploads each checkpoint; what somebody needs is fetched into a folder
that looks as the sweep's own does (`checkpoints`), and read there. Credentials and endpoint come from the environment,
as for every AWS tool (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_ENDPOINT_URL``).
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from pyarrow import fs

from qafe.errors import ConfigError
from qafe.train import BEST_FILE, STATE_FILE

from .checkpoints import PREEMPTED, SEAL_FILE, trial_name

T = TypeVar("T")

SCHEME = "s3://"
RETRY_S = 5.0
FOR_GOOD = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|SIGNATURE|UNRECOGNIZED_CLIENT|NO_CREDENTIALS", re.I
)


class Bucket:
    """A sweep's checkpoints.

    Args:
        url: ``s3://bucket/prefix``, where sweeps lie.
        name: the sweep's.
    Raises:
        ConfigError: the URL is none of an object store, or holds a password.
    """

    def __init__(self, url: str, name: str) -> None:
        if not url.startswith(SCHEME):
            raise ConfigError(f"--storage must be a folder that all workers see or {SCHEME}BUCKET/PREFIX, got {url}.")
        if "@" in urlsplit(url).netloc:
            raise ConfigError(
                "--storage must hold no password, for it is written down. Put AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY into the environment."
            )
        self.url = url
        try:
            self.store, place = fs.FileSystem.from_uri(url)
        except (OSError, ValueError) as err:
            raise ConfigError(f"--storage must be {SCHEME}BUCKET/PREFIX, got {url} ({err}).") from err
        self.root = f"{place.rstrip('/')}/{name}"

    def check(self) -> bool:
        """Whether something is there already; also that this process may write.

        Raises:
            ConfigError: the store does not answer, or refuses.
        """
        probe = f"{self.root}.probe"
        try:
            taken = bool(self._names(""))
            with self.store.open_output_stream(probe) as out:
                out.write(b"?")
            self.store.delete_file(probe)
        except OSError as err:
            reason = " ".join(str(err).split())
            raise ConfigError(
                f"the workers must be able to write to --storage, {self.url} gives: {reason}. Look at the bucket's "
                "name, AWS_ENDPOINT_URL and the credentials."
            ) from err
        return taken

    def folders(self, number: int, into: Path) -> Iterator[Path]:
        """A trial's checkpoints, newest first, each fetched when it is asked for."""
        for place in self._places(number):
            yield self._fetch(place, into)

    def fetch_last(self, number: int, into: Path) -> None:
        """Fetches a trial's newest checkpoint that has a seal, but for the training's state."""
        for place in self._places(number):
            names = self._names(place)
            if SEAL_FILE in names:
                if not (into / place / SEAL_FILE).is_file():
                    self._fetch(place, into, without=STATE_FILE)
                return

    def fetch_begun_epoch(self, number: int, into: Path) -> None:
        """Fetches the beginning of an epoch that a worker has left; there may be none."""
        place = f"{PREEMPTED}/{trial_name(number, 0)}"
        if SEAL_FILE in self._names(place):
            self._fetch(place, into)

    def leave_begun_epoch(self, number: int, folder: Path) -> None:
        """Stores the beginning of an epoch; its seal comes last."""
        place = f"{PREEMPTED}/{trial_name(number, 0)}"
        self._drop(place)
        for path in sorted(folder.rglob("*"), key=lambda path: path.name == SEAL_FILE):
            if path.is_file():
                fs.copy_files(
                    str(path),
                    f"{self.root}/{place}/{path.relative_to(folder)}",
                    destination_filesystem=self.store,
                    use_threads=False,  # apache/arrow#32372
                )

    def has_begun_epoch(self, number: int) -> bool:
        """Whether a worker has left the beginning of an epoch."""
        return SEAL_FILE in self._names(f"{PREEMPTED}/{trial_name(number, 0)}")

    def drop_begun_epoch(self, number: int) -> None:
        """Forgets the beginning of an epoch; there may be none."""
        self._drop(f"{PREEMPTED}/{trial_name(number, 0)}")

    def drop_old(self, number: int, keep: int) -> None:
        """Deletes all but a trial's newest checkpoints."""
        for place in list(self._places(number))[keep:]:
            self._drop(place)

    def thin(self, number: int, *, keep_best: bool) -> None:
        """As `checkpoints.thin`."""
        self.drop_begun_epoch(number)
        kept, *old = list(self._places(number)) or [""]
        for place in old:
            self._drop(place)
        for file in self._files(kept) if kept else []:
            if file.endswith((f"/{STATE_FILE}",) if keep_best else (f"/{STATE_FILE}", f"/{BEST_FILE}")):
                self.store.delete_file(f"{self.root}/{kept}/{file}")

    def _places(self, number: int) -> Iterator[str]:
        """A trial's checkpoints, newest first, as paths below the root."""
        name = trial_name(number, 0)
        attempts = [found for found in self._names("") if found == name or found.startswith(f"{name}.")]
        for attempt in sorted(attempts, key=lambda found: int(found[len(name) + 1 :] or 0), reverse=True):
            for checkpoint in sorted(self._names(attempt), reverse=True):
                if checkpoint.startswith("checkpoint_"):
                    yield f"{attempt}/{checkpoint}"

    def _names(self, place: str) -> set[str]:
        """What lies in a folder below the root, which may not exist."""
        found = self.store.get_file_info(fs.FileSelector(f"{self.root}/{place}".rstrip("/"), allow_not_found=True))
        return {info.base_name for info in found}

    def _files(self, place: str) -> list[str]:
        """All files below a folder, as paths below it."""
        top = f"{self.root}/{place}"
        found = self.store.get_file_info(fs.FileSelector(top, allow_not_found=True, recursive=True))
        return [info.path[len(top) + 1 :] for info in found if info.type == fs.FileType.File]

    def _fetch(self, place: str, into: Path, *, without: str = "") -> Path:
        """Copies a folder; its seal comes last, so that it is whole where there is one."""
        folder = into / place
        shutil.rmtree(folder, ignore_errors=True)
        for file in sorted(self._files(place), key=lambda file: file == SEAL_FILE):
            if not without or Path(file).name != without:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                fs.copy_files(f"{self.root}/{place}/{file}", str(folder / file), source_filesystem=self.store)
        return folder

    def _drop(self, place: str) -> None:
        if self._names(place):
            self.store.delete_dir(f"{self.root}/{place}")


def may_pass(err: OSError) -> bool:
    """Whether what a store complains of may be over in a while."""
    return not isinstance(err, PermissionError | FileNotFoundError) and not FOR_GOOD.search(str(err))


def patiently(ask: Callable[[], T], tell: Callable[[str], None]) -> T:
    """What a store answers, however long it is away.

    Args:
        tell: hears once that it is away, and once that it is back.
    Raises:
        OSError: it refuses.
    """
    told = False
    while True:
        try:
            found = ask()
        except OSError as err:
            if not may_pass(err):
                raise
            if not told:
                tell(f"--storage does not answer: the sweep waits, nothing is lost ({' '.join(str(err).split())})")
            told = True
            time.sleep(RETRY_S)
        else:
            if told:
                tell("--storage answers again: the sweep goes on.")
            return found
