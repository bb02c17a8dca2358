"""A sweep's folder as other processes see it: what is in it, and whether a driver is at work there.

Light on purpose: commands that only look at a sweep or ask something of it start without Ray, torch and MLflow.
"""

from __future__ import annotations

import difflib
import fcntl
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qafe.errors import ConfigError

PLAN_FILE = "sweep.json"
LOCK_FILE = "sweep.lock"
REPORT_FOLDER = "report"
SUMMARY_FILE = "summary.json"
STORAGE = Path("~/ray_results")
"""Where sweeps lie unless ``--storage`` says otherwise."""

SweepState = Literal["running", "paused", "complete", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class SweepFolder:
    """A sweep on disk.

    Attributes:
        path: its folder.
        plan: the tree that `plan.Plan.save` wrote; of an older version it may lack fields.
    """

    path: Path
    plan: dict[str, Any]

    @property
    def name(self) -> str:
        """The sweep's name."""
        return str(self.plan["name"])

    @property
    def driven(self) -> bool:
        """Whether a driver holds the sweep now."""
        try:
            with open(self.path / LOCK_FILE) as lock:
                # Shared: those who look do not meet each other; a driver that meets one tries again.
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    @property
    def complete(self) -> bool:
        """Whether it has its final report on all of its trials: one that a budget ended has not."""
        try:
            summary = json.loads((self.path / REPORT_FOLDER / SUMMARY_FILE).read_text())
        except (OSError, ValueError):
            return False
        planned = self.plan["trials"]
        ended = sum(summary["counts"].values()) if "counts" in summary else summary.get("planned", planned)
        # An extension is planned before it is run, and a report that is refreshed may know of all trials.
        return bool(ended >= planned and summary.get("complete", True))


def is_url(storage: str | Path) -> bool:
    """Whether a storage is no folder; as a path, a URL has lost a slash."""
    return bool(re.match(r"[A-Za-z0-9+.-]+:/", str(storage)))


def local_storage(storage: Path) -> Path:
    """Where commands look for sweeps.

    Raises:
        ConfigError: a URL.
    """
    if is_url(storage):
        raise ConfigError(
            "a sweep's folder is on the machine that drives it, got --storage "
            f"{str(storage).replace(':/', '://', 1)}. Leave it out for a sweep whose checkpoints are in a bucket."
        )
    return storage.expanduser()


def storage_flag(folder: Path) -> str:
    """What the next command about a sweep needs behind its name, where it is not found without."""
    return "" if folder.parent == STORAGE.expanduser().resolve() else f" --storage {folder.parent}"


def sweep_folders(storage: Path) -> Iterator[SweepFolder]:
    """All sweeps of a storage folder, by name; what cannot be read is passed over."""
    if storage.is_dir():
        for path in sorted(storage.iterdir()):
            if (found := _read(path)) is not None:
                yield found


def find_sweep(storage: Path, name: str) -> SweepFolder:
    """The sweep of this name.

    Raises:
        ConfigError: there is none; the nearest name is offered.
    """
    plain = Path(name).name == name and name not in ("", ".", "..")
    found = _read(storage / name) if plain else None
    if found is None:
        names = [sweep.name for sweep in sweep_folders(storage)]
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
        hint = f"Did you mean {near[0]}?" if near else "Name another place with --storage."
        raise ConfigError(f"there is no sweep {name!r} in {storage}. {hint}")
    return found


def driven_sweep(storage: Path, name: str) -> SweepFolder:
    """The sweep of this name, which has a driver.

    Raises:
        ConfigError: there is no such sweep, or it does not run.
    """
    sweep = find_sweep(storage, name)
    if not sweep.driven:
        study = sweep.plan["study"]
        state, then = ("complete", "--extend 16") if sweep.complete else ("interrupted", "--resume")
        raise ConfigError(
            f"only a running sweep can be steered, {name} is {state}. "
            f"Go on with it:  python -m sweeps.run {study} {then} --name {name}"
        )
    return sweep


def name_taken(name: str, place: str) -> ConfigError:
    """The error of a new sweep that is called as another."""
    return ConfigError(
        f"a sweep's name must be new, {name} is in {place}. "
        f"Go on with it (--resume --name {name}), add trials (--extend 16 --name {name}) or choose another --name."
    )


def free_name(storage: Path, study: str, taken: Callable[[str], bool]) -> str:
    """The study's name with the next number that is free here and in the tracking store."""
    number = max(_numbered(storage, study), default=0) + 1
    while taken(f"{study}-{number}"):
        number += 1
    return f"{study}-{number}"


def last_name(storage: Path, study: str) -> str:
    """The study's sweep with the highest number.

    Raises:
        ConfigError: there is none.
    """
    names = _numbered(storage, study)
    if not names:
        raise ConfigError(f"there is no {study} sweep to resume in {storage}. Name it with --name or --storage.")
    return names[max(names)]


def _numbered(storage: Path, study: str) -> dict[int, str]:
    found = storage.glob(f"{study}-*") if storage.is_dir() else []
    numbers = {path.name: re.fullmatch(r"[0-9]+", path.name.removeprefix(f"{study}-")) for path in found}
    return {int(number[0]): name for name, number in numbers.items() if number}


def _read(path: Path) -> SweepFolder | None:
    try:
        plan = json.loads((path / PLAN_FILE).read_text())
        return SweepFolder(path=path, plan=plan) if {"name", "study", "trials"} <= plan.keys() else None
    except (OSError, ValueError, AttributeError):
        return None
