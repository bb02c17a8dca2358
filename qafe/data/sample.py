"""The generated sample dataset: drawn faces in PFED5's layout, so that everything runs without patient data.

From seed to disk, in the order of this file: a cohort gets its severities, a clip its movement, the movement its
landmarks and picture (`qafe.data.drawn_face`), and `make_sample` writes them as a prepared dataset that nothing
downstream can tell from another one.

A clip's score shows in how its face moves and not in how it looks. Higher severity means smaller, slower and more
uneven movement; where the movement happens (a mouth already wide, an eye half closed, one brow low) is drawn from
a range of the movement's own size, whatever the severity, so one still frame says next to nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from ..config import EXPRESSIONS
from ..errors import ConfigError, ManifestError
from ..store import CsvRow, Store
from .drawn_face import LANDMARK_COLUMNS, SQUEEZE, Array, Frames, curves, draw, placed, wander

VERSION = 1
"""Raised when the same settings would give another dataset."""

JPEG_QUALITY = 88
SETTINGS_FILE = "sample.json"
VIDEO_NAMES = ("rest0", "smile", "frown", "eyes0", "teeth")
"""Five letters an expression: with its patient and number a video has the 11 characters that PFED5 counts on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """What the sample dataset holds. The defaults make about 35,000 frames."""

    seed: int = 0
    train_patients: int = 30
    test_patients: int = 10
    clips: int = 7
    """Clips of each expression and patient."""
    frames: tuple[int, int] = (21, 29)
    """Fewest and most frames of a clip; one clip in ten is shorter, down to three quarters of the fewest."""

    def __post_init__(self) -> None:
        for name in ("train_patients", "test_patients", "clips"):
            value = getattr(self, name)
            if not 1 <= value <= 99:
                raise ConfigError(f"sample {name} must lie in 1-99, got {value}. Set e.g. {name}=10.")
        if self.train_patients + self.test_patients > 99:
            count = self.train_patients + self.test_patients
            raise ConfigError(f"a sample has at most 99 patients, got {count}. Set train_patients=30.")
        if self.seed < 0:
            raise ConfigError(f"sample seed must not be negative, got {self.seed}. Set seed=0.")
        if not 8 <= self.frames[0] <= self.frames[1]:
            raise ConfigError(f"sample frames must be (fewest, most), at least 8, got {self.frames}. Set (21, 29).")

    @property
    def patients(self) -> int:
        """Patients in both splits."""
        return self.train_patients + self.test_patients


@dataclass(frozen=True, slots=True)
class Clip:
    """One clip before it is drawn.

    Attributes:
        patient, video, expression: its names, and the class index of its expression.
        label: the rated severity, 0-4.
        severity: what the movement was made from, before rounding and rater noise.
        points: every curve of the face, [T,N,2] px; `landmarks` picks the 106 of the markup from them.
        looks: colours and light of this patient and clip.
        noise_seed: seed of the camera noise.
    """

    patient: str
    video: str
    expression: int
    label: int
    severity: float
    points: npt.NDArray[np.float32]
    looks: dict[str, Any] = field(repr=False)
    noise_seed: int

    @property
    def landmarks(self) -> npt.NDArray[np.float32]:
        """The 106 landmarks, [T,106,2] px."""
        return self.points[:, LANDMARK_COLUMNS]

    def render(self) -> Frames:
        """Its pictures, [T,256,256,3] uint8 RGB; the landmarks lie exactly on what is drawn."""
        return draw(self.points, self.looks, self.noise_seed)


# --- the cohort ------------------------------------------------------------------------------------------------


def severities(config: SampleConfig) -> Array:
    """The severity behind every clip, [patients, expressions, clips], 0-4.

    A patient's level is spread evenly over the scale in each split; expressions deviate from it, and so do a
    patient's clips (good and bad days), so that every handful of patients covers the whole scale.
    """
    rng = np.random.default_rng((config.seed, config.patients, 1_000_003))
    levels = np.concatenate(
        [
            rng.permutation((np.arange(count) + rng.uniform(0, 1, count)) / count)
            for count in (config.train_patients, config.test_patients)
        ]
    )
    patient = 0.5 + 3.0 * levels[:, None, None]
    shape = (config.patients, len(EXPRESSIONS), config.clips)
    days = np.linspace(-1.9, 1.9, config.clips) if config.clips > 1 else np.zeros(1)
    clips = rng.permuted(np.broadcast_to(days, shape), axis=2) + rng.normal(0, 0.25, shape)
    return np.clip(patient + rng.normal(0, 0.5, (*shape[:2], 1)) + clips, -0.4, 4.4)


def make_clip(config: SampleConfig, patient: int, expression: int, clip: int, severity: float) -> Clip:
    """One clip's label, movement and looks, from its own random stream; nothing is drawn yet.

    Args:
        patient: 0 .. patients-1; the training patients come first.
        expression: class index, 0-4.
        clip: 0 .. clips-1.
        severity: from `severities`.
    """
    person = _person(np.random.default_rng((config.seed, patient, 0)))
    rng = np.random.default_rng((config.seed, patient, expression + 1, clip))
    fewest, most = config.frames
    frames = int(rng.integers(fewest, most + 1))
    if rng.random() < 0.1:
        frames = int(rng.integers(fewest * 3 // 4, fewest))
    label = int(np.clip(np.rint(severity + rng.normal(0, 0.15)), 0, 4))
    move, blink = _movement(rng, person, expression, severity, frames)
    points = placed(rng, frames, curves(rng, person, move, blink))
    light = {"light": rng.uniform(-0.22, 0.22, 2), "gain": person["gain"] * rng.uniform(0.92, 1.08)}
    return Clip(
        patient=f"S{patient + 1:02d}",
        video=f"s{patient + 1:02d}{VIDEO_NAMES[expression]}{clip + 1:03d}",
        expression=expression,
        label=label,
        severity=float(severity),
        points=points.astype(np.float32),
        looks=person | light,
        noise_seed=int(rng.integers(2**31)),
    )


# --- the movement ----------------------------------------------------------------------------------------------


def _person(rng: np.random.Generator) -> dict[str, Any]:
    """What stays the same in all clips of one patient."""
    skins = np.array([[236, 200, 176], [224, 178, 148], [198, 148, 116], [150, 104, 78], [104, 72, 56]])
    hairs = np.array([[40, 32, 30], [92, 62, 42], [150, 110, 70], [186, 182, 178], [120, 60, 36]])
    place = rng.uniform(0, 4)
    low = int(place)
    skin = skins[low] + (place - low) * (skins[min(low + 1, 4)] - skins[low])
    return {
        "skin": skin,
        "hair": hairs[rng.integers(5)] + rng.uniform(-12, 12),
        "iris": np.array([[70, 100, 140], [90, 60, 40], [70, 105, 75]])[rng.integers(3)],
        "wall": rng.uniform(150, 180) + rng.uniform(-6, 6, 3),
        "shirt": rng.uniform(80, 120) + rng.uniform(-12, 12, 3),
        "gain": rng.uniform(0.8, 1.05),
        "noise": rng.uniform(0.4, 1.0),
        "face_width": rng.uniform(0.93, 1.07),
        "chin": rng.uniform(-5, 5),
        "eye_gap": rng.uniform(32, 36),
        "eye_width": rng.uniform(16, 19),
        "brow_y": rng.uniform(-2, 2),
        "brow_thick": rng.uniform(5, 8),
        "nose": rng.uniform(0.9, 1.12),
        "lips": rng.uniform(0.85, 1.2),
        "fringe": rng.uniform(-88, -72),
        # Where this person's face tends to stand in each direction, for each side.
        "stance": rng.normal(size=4)[:, None] + 0.2 * rng.normal(size=(4, 2)),
        "lid": rng.uniform(-2.5, 2.5),
    }


def _movement(
    rng: np.random.Generator, person: dict[str, Any], expression: int, severity: float, frames: int
) -> tuple[Array, Array]:
    """How far the face is in each direction, [T,4,2 sides], and its lids closed by a blink, [T,2 sides]."""
    vigour = np.clip(1 - 0.215 * severity, 0.1, 1.1)
    uneven = rng.choice((-1, 1)) * np.clip(0.03 + 0.08 * severity + rng.normal(0, 0.03), 0, 0.4)
    sides = 1 + uneven * np.array([-1.0, 1.0])
    sides = sides / sides.max()

    wave = np.zeros((frames, 4))
    amplitude = np.zeros((4, 2))
    if expression == 0:
        # A face at rest stirs as a whole: apart, the directions would cancel where they meet.
        wave = np.repeat(wander(rng, frames, rng.uniform(0.5, 1.0))[:, None], 4, axis=1)
        amplitude[:] = 0.62 * vigour * sides
        count = int(np.clip(np.rint(3.2 - 0.75 * severity + rng.normal(0, 0.4)), 0, 3))
        blink = _blinks(rng, frames, count)[:, None] * np.clip(1.1 - 0.15 * severity, 0.4, 1) * sides
    else:
        wave[:, expression - 1] = _repeats(rng, frames, severity)
        amplitude[expression - 1] = vigour * sides * rng.uniform(0.96, 1.04)
        # A second direction follows a little, by its own measure, so that expressions are never pure.
        other = (expression - 1 + int(rng.integers(1, 4))) % 4
        wave[:, other] = wander(rng, frames, 0.7)
        amplitude[other] = rng.uniform(0.01, 0.06)
        blink = np.zeros((frames, 2))
        if expression - 1 != SQUEEZE and rng.random() < 0.35:
            blink += _blinks(rng, frames, 1)[:, None]

    # The middle of the movement lies anywhere on the scale, the same for the mild and the severe.
    drawn = 0.5 * person["stance"] + rng.normal(0, 0.85, (4, 1)) + rng.normal(0, 0.16, (4, 2))
    middle = 0.38 * np.tanh(1.2 * drawn) * (1.0 - MIDDLE_MARGIN * amplitude)
    if expression:
        middle[np.arange(4) != expression - 1] *= 0.15
    return middle + amplitude * (wave[:, :, None] - 0.5), blink


MIDDLE_MARGIN = 0.25
"""Narrows the places a large movement may have, so that its extremes are no giveaway either."""


def _repeats(rng: np.random.Generator, frames: int, severity: float) -> Array:
    """An expression made and released one to four times, [T] in 0-1, from a random moment on."""
    ramp = (1.6 + 1.2 * np.clip(severity, 0, 4)) * rng.uniform(0.85, 1.15)
    most = int(np.clip(frames / (3.2 * ramp), 1, 4))
    period = frames / rng.integers(max(most - 1, 1), most + 1) * rng.uniform(0.92, 1.08)
    ramp = min(ramp, 0.42 * period)
    high = rng.uniform(0.35, 0.65) * period
    time = (np.arange(frames) + rng.uniform(0, period)) % period
    level = np.clip(np.minimum(time, high + ramp - time) / ramp, 0, 1)
    return np.asarray(level * level * (3 - 2 * level))


def _blinks(rng: np.random.Generator, frames: int, count: int) -> Array:
    """Lids closing and opening ``count`` times, [T] in 0-1."""
    closed = np.zeros(frames)
    if count:
        slot = frames / count
        for centre in (np.arange(count) + rng.uniform(0.2, 0.8, count)) * slot:
            closed = np.maximum(closed, np.exp(-(((np.arange(frames) - centre) / 1.4) ** 4)))
    return closed


# --- the dataset on disk ---------------------------------------------------------------------------------------


def make_sample(
    root: Path | str,
    config: SampleConfig | None = None,
    *,
    seed: int | None = None,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Makes the sample dataset at a folder that is not there yet or empty, and returns the folder.

    The same config gives the same dataset, byte for byte, whatever the number of workers. It is made beside and
    renamed, so an interrupted run leaves nothing that could be taken for a dataset. A folder that already holds
    this very sample is returned as it is.

    Args:
        config: sizes and seed; the defaults where there is none.
        seed: replaces the config's.
        workers: processes that draw; 1 draws in this one.
        progress: called with (clips done, clips in all).
    Raises:
        ManifestError: the folder holds something else.
    """
    root = Path(root)
    config = config or SampleConfig()
    if seed is not None:
        config = dataclasses.replace(config, seed=seed)
    settings = json.dumps({"version": VERSION, **dataclasses.asdict(config)}, indent=2) + "\n"
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        if (root / SETTINGS_FILE).is_file() and (root / SETTINGS_FILE).read_text() == settings:
            return root
        raise ManifestError(
            f"the sample dataset needs a new or empty folder, and {root} holds something else "
            "(or a sample of other settings). Name another folder, or remove this one."
        )
    root.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    try:
        _write_sample(Store.create(beside), config, workers, progress or (lambda done, total: None))
        (beside / SETTINGS_FILE).write_text(settings)
        beside.chmod(0o755)
        os.replace(beside, root)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return root


def _write_sample(store: Store, config: SampleConfig, workers: int, progress: Callable[[int, int], None]) -> None:
    severity = severities(config)
    jobs = [(str(store.root), config, *place, float(value)) for place, value in np.ndenumerate(severity)]
    rows: list[CsvRow] = []
    if workers > 1:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for row in pool.map(_write_clip, jobs, chunksize=4):
                rows.append(row)
                progress(len(rows), len(jobs))
    else:
        threads = cv2.getNumThreads()
        try:
            for job in jobs:
                rows.append(_write_clip(job))
                progress(len(rows), len(jobs))
        finally:
            cv2.setNumThreads(threads)
    first = config.train_patients * len(EXPRESSIONS) * config.clips
    store.write_csv("train", rows[:first], "sample")
    store.write_csv("test", rows[first:], "sample")


def _write_clip(job: tuple[str, SampleConfig, int, int, int, float]) -> CsvRow:
    root, config, patient, expression, number, severity = job
    cv2.setNumThreads(1)
    clip = make_clip(config, patient, expression, number, severity)
    Store(root).write_video(clip.patient, clip.video, clip.render(), clip.landmarks, quality=JPEG_QUALITY)
    return CsvRow(f"{clip.video}_{clip.patient}", clip.label, len(clip.points), EXPRESSIONS[expression])
