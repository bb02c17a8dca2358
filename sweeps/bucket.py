"""A sweep's checkpoints in an object store: ``--storage s3://bucket/prefix``.

Workers and driver share no folder then. Ray Tune uploads each checkpoint; what somebody needs is fetched into a folder
that looks as the sweep's own does (`checkpoints`), and read there. Credentials and endpoint come from the environment,
as for every AWS tool (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_ENDPOINT_URL``).
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from pyarrow import fs

from qafe.errors import ConfigError
from qafe.train import BEST_FILE, STATE_FILE

from .checkpoints import PREEMPTED, SEAL_FILE, trial_name

T = TypeVar("T")

OWNER_FILE = "owner"
RETRY_S = 5.0
FOR_GOOD = re.compile(
    r"AWS Error (\w*(ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|SIGNATURE|UNRECOGNIZED|CREDENTIALS|TOKEN)"
    r"|UNKNOWN \(HTTP status 4)"  # an expired token among them
)
PLACE = re.compile(r"s3://[A-Za-z0-9._-]+(/[^/?]+)*/?(\?.*)?")


class Bucket:
    """A sweep's checkpoints. All but the making of it raises OSError where the store does not answer or refuses.

    Args:
        url: ``s3://bucket/prefix``, where sweeps lie.
        name: the sweep's.
    Raises:
        ConfigError: the URL is none of a bucket, or holds a password.
    """

    def __init__(self, url: str, name: str) -> None:
        if "@" in url:
            raise ConfigError(
                "--storage must hold no password, for it is written down. Put AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY into the environment."
            )
        if not PLACE.fullmatch(url) or {".", ".."} & set(url.partition("?")[0].split("/")):
            raise ConfigError(
                f"--storage must be a folder that all workers see or s3://BUCKET/PREFIX, got {url}. Name one of them."
            )
        self.url = url
        self.name = name

    @functools.cached_property
    def _connected(self) -> tuple[fs.FileSystem, str]:
        """The store and the sweep's place there. For AWS itself this asks where the bucket is."""
        try:
            store, place = fs.FileSystem.from_uri(self.url)
        except ValueError as err:
            raise ConfigError(f"--storage must be s3://BUCKET/PREFIX, got {self.url}: {err}. Mend it.") from err
        return store, f"{place.rstrip('/')}/{self.name}"

    @property
    def store(self) -> fs.FileSystem:
        """The object store."""
        return self._connected[0]

    @property
    def root(self) -> str:
        """The sweep's place in it."""
        return self._connected[1]

    def check(self) -> bool:
        """Whether something is there already; also that this process may write.

        Raises:
            ConfigError: the store does not answer, or refuses.
        """
        try:
            taken = bool(self._names(""))
            self._write(f"{self.root}.probe", "?")
            self.store.delete_file(f"{self.root}.probe")
        except OSError as err:
            raise self.refusal(err) from err
        return taken

    def claim(self, sweep_id: str) -> None:
        """Takes the place for one sweep, and for its later drivers.

        Raises:
            ConfigError: another sweep has it, or the store does not answer, or refuses.
        """
        place = f"{self.root}/{OWNER_FILE}"
        try:
            if self.store.get_file_info(place).type == fs.FileType.File:
                with self.store.open_input_stream(place) as content:
                    owner = content.read().decode()
                if owner != sweep_id:
                    raise ConfigError(
                        f"a sweep's checkpoints must have a place of their own, another {self.name} is in {self.url}. "
                        "Choose another --name or prefix."
                    )
            self._write(place, sweep_id)
        except OSError as err:
            raise self.refusal(err) from err

    def release(self) -> None:
        """Gives the place back, as far as the store answers."""
        with contextlib.suppress(OSError):
            self.store.delete_file(f"{self.root}/{OWNER_FILE}")

    def refusal(self, err: OSError) -> ConfigError:
        """What to tell people of an error."""
        return ConfigError(
            f"the sweep must be able to use --storage, {self.url} gives: {' '.join(str(err).split())}. Look at the "
            "bucket's name, AWS_ENDPOINT_URL and the credentials."
        )

    def folders(self, number: int, into: Path) -> Iterator[Path]:
        """A trial's checkpoints, newest first, each fetched when it is asked for."""
        for place in self._places(number):
            yield self._fetch(place, into)

    def fetch_last(self, number: int, into: Path) -> None:
        """Fetches a trial's newest whole checkpoint, but for the training's state."""
        place = self._last(number)
        if place is not None and not (into / place / SEAL_FILE).is_file():
            self._fetch(place, into, without=STATE_FILE)

    def fetch_begun_epoch(self, number: int, into: Path) -> None:
        """Fetches the beginning of an epoch that a worker has left; there may be none."""
        place = _begun(number)
        if SEAL_FILE in self._names(place):
            self._fetch(place, into)

    def leave_begun_epoch(self, number: int, folder: Path) -> None:
        """Stores the beginning of an epoch; its seal comes last."""
        place = _begun(number)
        self._drop(place)
        for path in sorted(folder.rglob("*"), key=lambda path: path.name == SEAL_FILE):
            if path.is_file():
                fs.copy_files(
                    str(path),
                    f"{self.root}/{place}/{path.relative_to(folder)}",
                    destination_filesystem=self.store,
                    use_threads=False,  # apache/arrow#32372
                )

    def begun_epoch(self, number: int) -> str:
        """The seal of the beginning of an epoch that a worker has left; empty if there is none."""
        place = f"{self.root}/{_begun(number)}/{SEAL_FILE}"
        if self.store.get_file_info(place).type != fs.FileType.File:
            return ""
        with self.store.open_input_stream(place) as content:
            found: str = content.read().decode()
        return found

    def drop_begun_epoch(self, number: int) -> None:
        """Forgets the beginning of an epoch; there may be none."""
        self._drop(_begun(number))

    def drop_old(self, number: int, keep: int) -> None:
        """Deletes what is older than a trial's newest whole checkpoints."""
        whole = [place for place in self._places(number) if self._whole(place)][:keep]
        places = list(self._places(number))
        for place in places[places.index(whole[-1]) + 1 :] if len(whole) == keep else []:
            self._drop(place)

    def thin(self, number: int, *, keep_best: bool) -> None:
        """As `checkpoints.thin`."""
        self.drop_begun_epoch(number)
        kept = self._last(number)
        for place in list(self._places(number)):
            if place != kept:
                self._drop(place)
        unwanted = (f"/{STATE_FILE}",) if keep_best else (f"/{STATE_FILE}", f"/{BEST_FILE}")
        for file in self._files(kept) if kept else []:
            if file.endswith(unwanted):
                self.store.delete_file(f"{self.root}/{kept}/{file}")

    def _places(self, number: int) -> Iterator[str]:
        """A trial's checkpoints, newest first, as paths below the root."""
        name = trial_name(number, 0)
        attempts = [found for found in self._names("") if found == name or found.startswith(f"{name}.")]
        for attempt in sorted(attempts, key=lambda found: int(found[len(name) + 1 :] or 0), reverse=True):
            for checkpoint in sorted(self._names(attempt), reverse=True):
                if checkpoint.startswith("checkpoint_"):
                    yield f"{attempt}/{checkpoint}"

    def _last(self, number: int) -> str | None:
        """A trial's newest whole checkpoint; of a trial that has been thinned what is left of it."""
        sealed = [place for place in self._places(number) if SEAL_FILE in self._names(place)]
        return next((place for place in sealed if self._whole(place)), sealed[0] if len(sealed) == 1 else None)

    def _whole(self, place: str) -> bool:
        """Whether all files are there that the seal names: Tune uploads it before some of them."""
        files = self._files(place)
        if SEAL_FILE not in files:
            return False
        with self.store.open_input_stream(f"{self.root}/{place}/{SEAL_FILE}") as content:
            named: dict[str, str] = json.loads(content.read())["sha256"]
        return set(named) <= set(files)

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

    def _write(self, place: str, text: str) -> None:
        with self.store.open_output_stream(place) as out:
            out.write(text.encode())

    def _drop(self, place: str) -> None:
        if self._names(place):
            self.store.delete_dir(f"{self.root}/{place}")


def left_after(seal: str) -> int:
    """How many epochs were complete when the worker left; -1 if the seal is none."""
    try:
        return int(json.loads(seal)["epoch"])
    except (ValueError, KeyError, TypeError):
        return -1


def of_the_store(err: OSError) -> bool:
    """Whether an error is the store's own, and not the disk's."""
    return err.errno is None and not isinstance(err, FileNotFoundError)


def may_pass(err: OSError) -> bool:
    """Whether what a store complains of may be over in a while."""
    return of_the_store(err) and not FOR_GOOD.search(str(err))


def patiently(ask: Callable[[], T], given_up: Callable[[], bool] = lambda: False, *, refusals: bool = False) -> T:
    """What a store answers, however long it is away.

    Args:
        given_up: whether nobody wants to wait any more.
        refusals: wait for the end of these, too.
    Raises:
        OSError: it refuses, or is away and waiting was given up.
    """
    while True:
        try:
            return ask()
        except OSError as err:
            if not (of_the_store(err) if refusals else may_pass(err)) or given_up():
                raise
            time.sleep(RETRY_S)


def _begun(number: int) -> str:
    return f"{PREEMPTED}/{trial_name(number, 0)}"
