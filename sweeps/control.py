"""What people ask of a running sweep, from any terminal or machine that sees its folder: one file for each wish."""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path

from qafe import console

from .folder import STORAGE, SweepFolder, driven_sweep, local_storage
from .interruption import INTERRUPTION

FOLDER = "control"
STOP = "stop"
"""End the sweep; ``stop-<trial>``: end one trial."""
PAUSE = "pause"
FULL = "full"
"""``full-<trial>``: what a trial says that waits for room on the disk."""
AWAY = "away"
"""``away-<n>``: what a trial says whose data cannot be read just now; the file holds the reason."""
POLL_S = 1.0


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The arguments of a command that asks something of a running sweep."""
    result = console.parser(prog, description)
    result.add_argument("name", help="the sweep's name, as python -m sweeps.status lists it")
    result.add_argument("--storage", type=Path, default=STORAGE, help="folder of the sweeps (default: %(default)s)")
    return result


def asked_sweep(options: argparse.Namespace) -> SweepFolder:
    """The running sweep that a command names.

    Raises:
        ConfigError: there is no such sweep, or it does not run.
    """
    return driven_sweep(local_storage(options.storage), options.name)


def place_flag(options: argparse.Namespace) -> str:
    """What the next command of the same sweep needs behind its name."""
    return "" if options.storage == STORAGE else f" --storage {options.storage}"


class Control:
    """The wishes about one sweep: written by commands, read by its driver.

    Args:
        folder: the sweep's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER
        self._read = -POLL_S
        self._wishes: frozenset[str] = frozenset()

    def wish(self, name: str, why: str = "") -> None:
        """Asks for something: ``stop``, ``pause`` or ``stop-<trial>``."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / name).write_text(why)

    def withdraw(self, name: str) -> None:
        """Takes a wish back; it may not be there."""
        (self.folder / name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Forgets all wishes, as a driver does when it takes the sweep."""
        for wish in self._all():
            self.withdraw(wish)
        self._read = -POLL_S

    @property
    def stopped(self) -> bool:
        """Whether the sweep should end: somebody wished for it, or sent this process a signal."""
        return INTERRUPTION.asked or STOP in self._now()

    @property
    def paused(self) -> bool:
        """Whether people have asked that no trial runs until they say so."""
        return PAUSE in self._now()

    @property
    def waiting_for_room(self) -> bool:
        """Whether a trial cannot write its checkpoint."""
        return any(wish.startswith(FULL + "-") for wish in self._now())

    @property
    def waiting_for_a_folder(self) -> str:
        """Why trials cannot read their data, or write to the sweep's folder, just now; empty if they can."""
        for wish in sorted(self._now()):
            if wish.startswith(AWAY + "-"):
                with contextlib.suppress(OSError):
                    return (self.folder / wish).read_text()
        return ""

    def trial_stopped(self, number: int) -> bool:
        """Whether this trial should end."""
        return f"{STOP}-{number}" in self._now()

    def _now(self) -> frozenset[str]:
        if time.monotonic() - self._read >= POLL_S:
            self._wishes, self._read = self._all(), time.monotonic()
        return self._wishes

    def _all(self) -> frozenset[str]:
        return frozenset(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else frozenset()
