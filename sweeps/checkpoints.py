"""A trial's checkpoints on disk: sealed with digests, the newest intact one found again, the rest deleted.

```
<sweep>/trial_007/checkpoint_000004/     the fifth that the trial's first driver saw
<sweep>/trial_007.1/checkpoint_000000/   the first after a resume
    checkpoint.json                      its epoch, and the digest of every other file
<sweep>/preempted/trial_007/             what its worker had of the epoch behind that, when it was asked to leave
```
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qafe.train import BEST_FILE, STATE_FILE

SEAL_FILE = "checkpoint.json"
PREEMPTED = "preempted"


def trial_name(number: int, attempt: int) -> str:
    """The folder of one attempt at a trial."""
    return f"trial_{number:03d}" + (f".{attempt}" if attempt else "")


def seal(folder: Path, epoch: int, **notes: Any) -> None:
    """Writes the digests of all files of a checkpoint, its epoch, and what else there is to know of it."""
    digests = {str(path.relative_to(folder)): _digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / SEAL_FILE).write_text(json.dumps({"epoch": epoch, "sha256": digests} | notes))


def read_seal(folder: Path) -> dict[str, Any] | None:
    """What `seal` wrote, or None if the checkpoint is not whole."""
    try:
        found: dict[str, Any] = json.loads((folder / SEAL_FILE).read_text())
        whole = all(_digest(folder / name) == digest for name, digest in found["sha256"].items())
    except (OSError, ValueError, KeyError):
        return None
    return found if whole else None


def epoch_of(folder: Path) -> int:
    """How many epochs a sealed checkpoint holds."""
    return int(json.loads((folder / SEAL_FILE).read_text())["epoch"])


def newest(found: Iterable[Path], *, epochs: int, whole: int, known: Path | None = None) -> Path | None:
    """A trial's newest intact checkpoint that the driver knows of; a damaged one is passed over.

    What the driver has not heard of is computed again, and told this time. So is the last epoch: a trial with nothing
    left to tell could not end.

    Args:
        found: all of them, newest first.
        epochs: how many the study has heard of.
        whole: how many a whole trial has.
        known: the last checkpoint that a living driver has.
    """
    for folder in found:
        heard = known is not None and folder.parent.name == known.parent.name and folder.name <= known.name
        seal = read_seal(folder)
        if seal is not None and seal["epoch"] < whole and (heard or seal["epoch"] <= epochs):
            return folder
    return None


def folders(sweep_folder: Path, number: int) -> Iterator[Path]:
    """All checkpoints of a trial, newest first, whole or not."""
    name = trial_name(number, 0)
    attempts = {path for path in sweep_folder.glob(f"{name}*") if path.name == name or path.name[len(name)] == "."}
    for attempt in sorted(attempts, key=lambda path: int(path.suffix[1:] or 0), reverse=True):
        yield from sorted(attempt.glob("checkpoint_*"), reverse=True)


def last(sweep_folder: Path, number: int) -> Path | None:
    """A trial's newest checkpoint that has a seal; its digests are not compared."""
    return next((folder for folder in folders(sweep_folder, number) if (folder / SEAL_FILE).is_file()), None)


def preempted(sweep_folder: Path, number: int) -> Path:
    """Where a trial keeps the beginning of an epoch."""
    return sweep_folder / PREEMPTED / trial_name(number, 0)


def begun_epoch(sweep_folder: Path, number: int, *, after: int) -> Path | None:
    """The beginning of the epoch that follows so many, if a worker has left one and it is whole."""
    folder = preempted(sweep_folder, number)
    found = read_seal(folder)
    return folder if found is not None and found["epoch"] == after else None


@contextlib.contextmanager
def leaving(sweep_folder: Path, number: int) -> Iterator[Path]:
    """A folder for the beginning of an epoch, which takes the place of an earlier one when the block ends well."""
    place = preempted(sweep_folder, number)
    unfinished = place.with_name(place.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        shutil.rmtree(place, ignore_errors=True)
        unfinished.rename(place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def drop_begun_epoch(sweep_folder: Path, number: int) -> None:
    """Forgets the beginning of an epoch; there may be none."""
    place = preempted(sweep_folder, number)
    for folder in (place, place.with_name(place.name + ".unfinished")):
        shutil.rmtree(folder, ignore_errors=True)


def drop_old(sweep_folder: Path, number: int, keep: int) -> None:
    """Deletes what is older than a trial's newest whole checkpoints."""
    whole = 0
    for folder in list(folders(sweep_folder, number)):
        if whole == keep:
            shutil.rmtree(folder, ignore_errors=True)
        whole += (folder / SEAL_FILE).is_file()


def thin(sweep_folder: Path, number: int, *, keep_best: bool) -> None:
    """Deletes what an ended trial does not need: all but its last checkpoint, and of that all but the best weights;
    without ``keep_best`` those, too. Its history stays."""
    drop_begun_epoch(sweep_folder, number)
    kept = last(sweep_folder, number)
    for folder in list(folders(sweep_folder, number)):
        if folder != kept:
            shutil.rmtree(folder, ignore_errors=True)
    if kept is not None:
        for name in (STATE_FILE,) if keep_best else (STATE_FILE, BEST_FILE):
            for path in kept.glob(f"*/{name}"):
                path.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
