"""How recordings are prepared, and the output folder that keeps to it: one run at a time, one way of preparing."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..store import Store, write_file
from .crop import CropKind
from .detect import DEFAULT_MODELS, DEFAULT_ROOT, pack_files
from .track import TrackSettings

SETTINGS_FILE = "prepare.json"
VERSION = 2
"""Raised when the same settings would give other crops or landmarks."""

_FLAGS = {"models": "--models", "crop": "--crop", "fps": "--fps", "smooth": "--smooth"} | {
    "every_frames": "--detect-every",
    "gap_frames": "--max-gap",
    "min_detected": "--min-detected",
    "keep_ends": "--keep-ends",
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareSettings:
    """How recordings are prepared."""

    models: str = DEFAULT_MODELS
    model_root: Path = DEFAULT_ROOT
    crop: CropKind = "per_video"
    fps: float | None = None
    """Frames a second of what is written; None keeps the recording's own."""
    smooth: bool = False
    """Smooths landmarks with a 1 € filter."""
    track: TrackSettings = dataclasses.field(default_factory=TrackSettings)
    jpeg_quality: int = 95
    memory_mb: int = 512
    """The decoded frames that a worker may hold."""

    def __post_init__(self) -> None:
        check_flag("fps", self.fps is None or 0 < self.fps <= 1000, "above 0 and at most 1000", self.fps)
        check_flag("detect-every", self.track.every_frames >= 1, "at least 1", self.track.every_frames)
        check_flag("max-gap", self.track.gap_frames >= 0, "at least 0", self.track.gap_frames)
        check_flag("min-detected", 0 < self.track.min_detected <= 1, "above 0 and at most 1", self.track.min_detected)
        check_flag("memory-mb", self.memory_mb >= 0, "at least 0", self.memory_mb)

    def identity(self) -> dict[str, Any]:
        """What decides about the bytes that are written, the models' content included."""
        shown = dataclasses.asdict(self)
        del shown["model_root"], shown["memory_mb"]
        files = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in pack_files(self.models, self.model_root)
        }
        return {"version": VERSION, **shown, "model_files": files}


@contextlib.contextmanager
def claimed(out: Path, identity: dict[str, Any], resume: bool) -> Iterator[Store]:
    """The output folder, for this run alone, made with these settings.

    Raises:
        ConfigError: it holds something else, or another run writes there.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"the output must be a folder, got the file {out}. Name another.")
    store = Store.create(out)
    with locked(store):
        kept = out / SETTINGS_FILE
        # A run that was killed right at its start may have left no more than the beginning of its settings.
        used = any(not entry.name.startswith(f".{SETTINGS_FILE}.") for entry in out.iterdir())
        if used and not resume:
            step = "Add --resume to go on with it" if kept.is_file() else "Name another"
            raise ConfigError(f"the output folder must be new or empty, got {out}. {step}.")
        text = json.dumps(identity, indent=1, sort_keys=True) + "\n"
        if used:
            _check_same(kept, json.loads(text), out)
        else:
            write_file(kept, text.encode())
        store.clear_leftovers()
        yield store


@contextlib.contextmanager
def locked(store: Store) -> Iterator[None]:
    """For a block, this process alone writes to the dataset.

    Raises:
        ConfigError: another does.
    """
    descriptor = os.open(store.root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        os.close(descriptor)
        raise ConfigError(f"one run at a time may write to {store.root}, and another is. Wait for it.") from err
    except OSError:
        _log.warning("%s: this disk knows no locks, see to it that no other run writes there", store.root)
    try:
        yield
    finally:
        os.close(descriptor)


def _check_same(kept: Path, now: dict[str, Any], out: Path) -> None:
    try:
        before = json.loads(kept.read_bytes())
        then = before | before["track"]
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigError(
            f"--resume goes on with a folder that prepare has begun, and {out} is none. Name another."
        ) from None
    other = f"--resume needs the version of prepare that {out} was begun with. Name another folder."
    if before.get("version") != now["version"]:
        raise ConfigError(other)
    for key, flag in _FLAGS.items():
        value = (now | now["track"])[key]
        if then.get(key) != value:
            raise ConfigError(
                f"--resume needs the settings that {out} was begun with: {then.get(key)} there, {value} now ({flag}). "
                "Give the same, or name another folder."
            )
    if before.get("model_files") != now["model_files"]:
        raise ConfigError(
            f"--resume needs the model files that {out} was begun with, and some of {now['models']!r} have changed "
            "since (--models, --model-root). Put the old ones back, or name another folder."
        )
    if before != now:
        raise ConfigError(other)


def check_flag(name: str, holds: bool, rule: str, value: object) -> None:
    """One line for a flag that breaks its rule.

    Raises:
        ConfigError: the rule does not hold.
    """
    if not holds:
        raise ConfigError(f"--{name} must be {rule}, got {value!r}. Correct it.")
