"""The generated sample dataset: drawn faces in PFED5's layout, so that everything runs without patient data.

From seed to disk, in the order of this file: a cohort gets its severities, a clip its movement, the movement its
landmarks, the landmarks their picture, and `make_sample` writes them as a prepared dataset that nothing
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
from ..markup import ALL_COUNT
from ..store import CsvRow, Store

VERSION = 1
"""Raised when the same settings would give another dataset."""

FRAME_HZ = 12.5
SIZE_PX = 256
JPEG_QUALITY = 88
SETTINGS_FILE = "sample.json"
VIDEO_NAMES = ("rest0", "smile", "frown", "eyes0", "teeth")
"""Five letters an expression: with its patient and number a video has the 11 characters that PFED5 counts on."""

SMILE, FROWN, SQUEEZE, CLENCH = range(4)
"""The directions a face moves in; each is also one that faces differ in at rest."""

Array = npt.NDArray[np.float64]
Frames = npt.NDArray[np.uint8]


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
    points = _affine(rng, frames, _curves(rng, person, move, blink))
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
        wave = np.repeat(_wander(rng, frames, rng.uniform(0.5, 1.0))[:, None], 4, axis=1)
        amplitude[:] = 0.62 * vigour * sides
        count = int(np.clip(np.rint(3.2 - 0.75 * severity + rng.normal(0, 0.4)), 0, 3))
        blink = _blinks(rng, frames, count)[:, None] * np.clip(1.1 - 0.15 * severity, 0.4, 1) * sides
    else:
        wave[:, expression - 1] = _repeats(rng, frames, severity)
        amplitude[expression - 1] = vigour * sides * rng.uniform(0.96, 1.04)
        # A second direction follows a little, by its own measure, so that expressions are never pure.
        other = (expression - 1 + int(rng.integers(1, 4))) % 4
        wave[:, other] = _wander(rng, frames, 0.7)
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


def _wander(rng: np.random.Generator, frames: int, rate_hz: float) -> Array:
    """A slow aimless wave, [T], about 0-1."""
    time = np.arange(frames) / FRAME_HZ
    rates = rate_hz * np.array([0.7, 1.3, 2.1])
    waves = np.sin(2 * np.pi * (np.outer(time, rates) + rng.uniform(0, 1, 3)))
    return np.asarray(0.5 + waves @ np.array([0.3, 0.25, 0.12]))


def _blinks(rng: np.random.Generator, frames: int, count: int) -> Array:
    """Lids closing and opening ``count`` times, [T] in 0-1."""
    closed = np.zeros(frames)
    if count:
        slot = frames / count
        for centre in (np.arange(count) + rng.uniform(0.2, 0.8, count)) * slot:
            closed = np.maximum(closed, np.exp(-(((np.arange(frames) - centre) / 1.4) ** 4)))
    return closed


# --- the face --------------------------------------------------------------------------------------------------

_LID = np.linspace(-1, 1, 9)
_BROW = np.linspace(0, 1, 5)
_LIP = np.linspace(-1, 1, 17)
_INNER = np.linspace(-1, 1, 9)
_JAW = np.linspace(0, np.pi, 33)
_SIDES = ((0, -1.0), (1, 1.0))
_COUNTS = {
    "jaw": 33, "crown": 15, "brow0": 10, "brow1": 10, "lid0": 18, "lid1": 18, "cover0": 8, "cover1": 8,
    "iris": 2, "bridge": 4, "nostrils": 11, "lips": 34, "inner": 18, "folds": 6, "hair": 30, "fringe": 12,
}  # fmt: skip
_STARTS = dict(zip(_COUNTS, np.cumsum([0, *_COUNTS.values()]).tolist(), strict=False))


def _span(name: str) -> slice:
    return slice(_STARTS[name], _STARTS[name] + _COUNTS[name])


def _landmark_columns() -> npt.NDArray[np.int64]:
    """Which point of the curves each of the 106 landmarks is, in the order of InsightFace's 2d106det."""
    columns = np.full(ALL_COUNT, -1)

    def put(name: str, landmarks: list[int], places: list[int]) -> None:
        columns[landmarks] = [_STARTS[name] + place for place in places]

    put("jaw", [1, *range(9, 17), *range(2, 9), 0, *range(24, 17, -1), *range(32, 24, -1), 17], list(range(33)))
    put("brow0", [43, 48, 49, 51, 50, 44, 45, 47, 46], [0, 1, 2, 3, 4, 6, 7, 8, 9])
    put("brow1", [101, 105, 104, 103, 102, 100, 99, 98, 97], [0, 1, 2, 3, 4, 6, 7, 8, 9])
    put("lid0", [35, 41, 40, 42, 39, 36, 33, 37], [0, 2, 4, 6, 8, 11, 13, 15])
    put("lid1", [93, 96, 94, 95, 89, 91, 87, 90], [0, 2, 4, 6, 8, 11, 13, 15])
    put("iris", [34, 38, 88, 92], [0, 0, 1, 1])
    put("bridge", [72, 73, 74, 86], [0, 1, 2, 3])
    put("nostrils", [75, 76, 77, 78, 79, 80, 85, 84, 83, 82, 81], list(range(11)))
    put("lips", [52, 64, 63, 71, 67, 68, 61], [0, 3, 6, 8, 10, 13, 16])
    put("lips", [55, 56, 53, 59, 58], [20, 23, 25, 27, 30])
    put("inner", [65, 66, 62, 70, 69], [0, 2, 4, 6, 8])
    put("inner", [54, 60, 57], [11, 13, 15])
    assert columns.min() >= 0
    return columns


LANDMARK_COLUMNS = _landmark_columns()
"""Where the 106 landmarks stand among a clip's points."""


def _soft(value: Array) -> Array:
    """The value, bent so that it never falls below zero (px)."""
    return np.logaddexp(0, value)


def _curves(rng: np.random.Generator, person: dict[str, Any], move: Array, blink: Array) -> Array:
    """Every curve of the face in its own frame, [T,N,2] px about the point between the eyes and the nose."""
    frames = len(move)
    out = np.zeros((frames, sum(_COUNTS.values()), 2))
    gaze = np.stack([_wander(rng, frames, 0.5), _wander(rng, frames, 0.4)], axis=1) * 6 - 3
    gaze += rng.normal(0, 1.2, 2)
    # Eyes that blink often stand wider open between, so that where the lids are on average gives little away.
    aperture = person["lid"] + rng.normal(0, 3.5) + 14 * blink.mean()

    def put(name: str, x: Any, y: Any) -> None:
        shape = (frames, _COUNTS[name])
        out[:, _span(name), 0] = np.broadcast_to(x, shape)
        out[:, _span(name), 1] = np.broadcast_to(y, shape)

    def pull(smile: float, frown: float, squeeze: float, clench: float) -> Array:
        """What the four directions together move on each side, [T,2 sides]; every direction moves the whole face."""
        return np.asarray(np.tensordot([smile, frown, squeeze, clench], move, (0, 1)))

    def pull_both(*shares: float) -> Array:
        """What they move in the middle of the face, [T,1]."""
        return np.asarray(pull(*shares).mean(axis=1, keepdims=True))

    width = 74 * person["face_width"]
    bulge = np.exp(-(((np.cos(_JAW) ** 2 - 0.5) / 0.3) ** 2)) * np.sign(np.cos(_JAW))
    side = (np.cos(_JAW) < 0).astype(int)
    jaw_x = -width * np.sign(np.cos(_JAW)) * np.abs(np.cos(_JAW)) ** 0.8 - 6 * move[:, CLENCH][:, side] * bulge
    jaw_y = -14 + (108 + person["chin"]) * np.sin(_JAW) ** 0.85 + pull_both(0, 0, 0, 2.5) * np.sin(_JAW) ** 4
    put("jaw", jaw_x, jaw_y)
    crown = np.linspace(0, np.pi, 15)
    put("crown", width * np.cos(crown), -14 - 86 * np.sin(crown))
    around = np.linspace(-0.22 * np.pi, 1.22 * np.pi, 30)
    put("hair", (width + 11) * np.cos(around), -22 - 92 * np.sin(around))
    fringe = np.linspace(-1, 1, 6)
    put(
        "fringe",
        np.concatenate([(width + 4) * fringe, (width + 4) * fringe[::-1]]),
        np.concatenate([-30 - 84 * np.sqrt(1.02 - fringe**2), person["fringe"] + 34 * fringe[::-1] ** 4]),
    )

    for index, sign in _SIDES:
        smile, frown, squeeze, clench = move[:, :, index].T[:, :, None]
        brow_x = sign * (60 - 42 * _BROW - 10 * frown * _BROW**1.5 - 7 * squeeze)
        brow_y = -46 + person["brow_y"] - 7 * np.sin(np.pi * (0.15 + 0.7 * _BROW)) + 18 * squeeze
        brow_y = brow_y - 10 * smile + frown * (8 + 14 * _BROW**1.5) + 6 * clench
        thick = person["brow_thick"] * (0.35 + 0.65 * _BROW)
        put(f"brow{index}", np.concatenate([brow_x, brow_x], axis=1), np.concatenate([brow_y, brow_y + thick], axis=1))

        shape = 1 - _LID**2
        above = _soft(10 + aperture - 10 * squeeze - 5 * smile - 8 * frown - 5 * clench)
        below = _soft(5 - 4 * squeeze - 1.5 * smile - 2 * frown - 2 * clench)
        closed = blink[:, index, None]
        eye_x = sign * (person["eye_gap"] - person["eye_width"] * _LID)
        upper = -16 - (above * (1 - closed) - below * closed) * shape
        put(f"lid{index}", np.concatenate([eye_x, eye_x]), np.concatenate([upper, -16 + below * shape], axis=1))
        reach = np.array([-1.25, -0.4, 0.4, 1.25])
        cover_x = sign * (person["eye_gap"] - person["eye_width"] * reach)
        put(
            f"cover{index}",
            np.concatenate([cover_x, cover_x]),
            np.concatenate([np.array([-17, -31, -31, -17.0]), np.array([-15, -3, -3, -15.0])]),
        )
        out[:, _STARTS["iris"] + index, 0] = sign * person["eye_gap"] + gaze[:, 0]
        out[:, _STARTS["iris"] + index, 1] = -17 + gaze[:, 1] * 0.5

    lift = pull_both(-9, 9, -12, -5)
    flare = 1 + pull_both(0.08, -0.12, 0.12, 0.12)
    put("bridge", 0.0, np.array([-14, -3, 8, 19.0]) + lift * np.array([0.3, 0.4, 0.6, 0.8]))
    wing = np.array([-6, -9, -16, -14, -7, 0, 7, 14, 16, 9, 6]) * person["nose"]
    put("nostrils", wing * flare, np.array([-12, 6, 18, 25, 28, 30, 28, 25, 18, 6, -12]) + lift)

    corner_x = 31 + pull(22, -21, -22, 17)
    corner_y = 55 + pull(-27, 24, -26, 14)
    gap = _soft(3 + rng.normal(0, 1.5) + pull_both(7, 1, 1, 15))
    middle = 55 + pull_both(-2, 2, -9, 1)
    red = 8 * person["lips"]

    def lip(places: Array, offset: Array, narrow: float) -> tuple[Array, Array]:
        which = np.where(places < 0, 0, 1)
        weight = np.abs(places) ** 1.8
        x = narrow * places * np.where(places < 0, corner_x[:, [0]], corner_x[:, [1]])
        return x, corner_y[:, which] * weight + (middle + offset) * (1 - weight)

    for name, places, extra, narrow in (("lips", _LIP, red, 1.0), ("inner", _INNER, 0.0, 0.88)):
        top_x, top_y = lip(places, -0.5 * gap - 0.8 * extra, narrow)
        bottom_x, bottom_y = lip(places, 0.5 * gap + extra, narrow)
        put(name, np.concatenate([top_x, bottom_x], axis=1), np.concatenate([top_y, bottom_y], axis=1))

    wing_y = 20 + lift
    fold_x = np.concatenate([-18 + 0 * lift, -corner_x[:, :1] * 0.6 - 18, -corner_x[:, :1] - 9], axis=1)
    fold_r = np.concatenate([18 + 0 * lift, corner_x[:, 1:] * 0.6 + 18, corner_x[:, 1:] + 9], axis=1)
    fold_y = [np.concatenate([wing_y, 0.4 * wing_y + 0.6 * y - 4, y + 1], axis=1) for y in np.split(corner_y, 2, 1)]
    put("folds", np.concatenate([fold_x, fold_r], axis=1), np.concatenate(fold_y, axis=1))
    return out


def _affine(rng: np.random.Generator, frames: int, points: Array) -> Array:
    """The face's own frame to image px: place, tilt and size of the head, slowly swaying."""
    sway = np.stack([_wander(rng, frames, 0.35) for _ in range(4)], axis=1) - 0.5
    angle = np.deg2rad(rng.uniform(-1.5, 1.5) + 2.0 * sway[:, 0])
    scale = rng.uniform(0.98, 1.03) * (1 + 0.015 * sway[:, 1])
    place = np.array([128.0, 126.0]) + rng.uniform(-2, 2, 2) + 2.5 * sway[:, 2:]
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    turn = np.stack([np.stack([cos, sin], axis=1), np.stack([-sin, cos], axis=1)], axis=1)
    return np.asarray(points @ turn + place[:, None])


# --- the picture -----------------------------------------------------------------------------------------------

_SHIFT = 4


def render(clip: Clip) -> Frames:
    """Draws a clip, [T,256,256,3] uint8 RGB; the landmarks lie exactly on what is drawn."""
    looks = clip.looks
    rng = np.random.default_rng(clip.noise_seed)
    points = np.rint(clip.points * (1 << _SHIFT)).astype(np.int32)

    def tone(colour: Any, factor: float = 1.0) -> tuple[float, ...]:
        return tuple(np.clip(np.asarray(colour, float) * factor, 0, 255).tolist())

    skin, hair = looks["skin"], looks["hair"]
    lips = 0.55 * skin + 0.45 * np.array([176, 62, 66])
    colours = {
        "skin": tone(skin), "hair": tone(hair), "brow": tone(hair, 0.75), "lid": tone(skin, 0.9),
        "line": tone(skin, 0.42), "fold": tone(skin, 0.76), "nose": tone(skin, 0.86), "lips": tone(lips, 0.92),
        "mouth": tone([70, 24, 28]), "teeth": tone([238, 234, 222]), "white": tone([242, 242, 238]),
        "iris": tone(looks["iris"]), "pupil": tone([16, 14, 14]),
    }  # fmt: skip
    wall = np.empty((SIZE_PX, SIZE_PX, 3), np.uint8)
    wall[:] = np.clip(looks["wall"], 0, 255)
    cv2.ellipse(wall, (128, 275), (112, 62), 0, 0, 360, tone(looks["shirt"]), -1, cv2.LINE_AA)
    cv2.rectangle(wall, (98, 190), (158, 236), colours["fold"], -1)
    across, down = np.meshgrid(np.linspace(-1, 1, SIZE_PX), np.linspace(-1, 1, SIZE_PX))
    light = looks["gain"] * (0.86 + looks["light"][0] * across + looks["light"][1] * 0.6 * down)
    light_u8 = np.repeat(np.clip(255 * light, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
    grain = np.clip(rng.normal(3, looks["noise"], (SIZE_PX + 64, SIZE_PX + 64, 1)), 0, 16)
    grain_u8 = np.repeat(np.rint(grain).astype(np.uint8), 3, axis=2)
    shifts = rng.integers(0, 64, (len(points), 2))

    frames = np.empty((len(points), SIZE_PX, SIZE_PX, 3), np.uint8)
    for image, face, (row, column) in zip(frames, points, shifts, strict=True):
        image[:] = wall
        _draw(image, face, colours, looks)
        cv2.multiply(image, light_u8, dst=image, scale=1 / 255)
        cv2.add(image, grain_u8[row : row + SIZE_PX, column : column + SIZE_PX], dst=image)
    return frames


def _draw(
    image: Frames, face: npt.NDArray[np.int32], colours: dict[str, tuple[float, ...]], looks: dict[str, Any]
) -> None:
    part = {name: face[_span(name)] for name in _COUNTS}

    def fill(points: npt.NDArray[np.int32], colour: str) -> None:
        cv2.fillPoly(image, [points], colours[colour], cv2.LINE_AA, _SHIFT)

    def line(points: npt.NDArray[np.int32], colour: str, thickness: int, closed: bool = False) -> None:
        cv2.polylines(image, [points], closed, colours[colour], thickness, cv2.LINE_AA, _SHIFT)

    def dot(centre: npt.NDArray[np.int32], radius_px: float, colour: str) -> None:
        where = (int(centre[0]), int(centre[1]))
        cv2.circle(image, where, int(radius_px * (1 << _SHIFT)), colours[colour], -1, cv2.LINE_AA, _SHIFT)

    fill(part["hair"], "hair")
    fill(np.concatenate([part["jaw"], part["crown"]]), "skin")
    fill(part["fringe"], "hair")
    for index in (0, 1):
        lid, cover, brow = part[f"lid{index}"], part[f"cover{index}"], part[f"brow{index}"]
        upper, lower = lid[:9], lid[9:]
        fill(np.concatenate([upper, lower[::-1]]), "white")
        dot(part["iris"][index], 7.5, "iris")
        dot(part["iris"][index], 3.5, "pupil")
        # What of the iris lies outside the lids is covered by them.
        fill(np.concatenate([upper, cover[3::-1]]), "lid")
        fill(np.concatenate([lower, cover[:3:-1]]), "skin")
        line(upper, "line", 2)
        line(lower, "fold", 1)
        fill(np.concatenate([brow[:5], brow[:4:-1]]), "brow")
    nose = part["nostrils"]
    fill(np.concatenate([nose[2:9], part["bridge"][3:]]), "nose")
    line(nose[1:10], "fold", 1)
    dot(nose[4], 2.5, "line")
    dot(nose[6], 2.5, "line")
    line(part["folds"][:3], "fold", 2)
    line(part["folds"][3:], "fold", 2)
    lips, inner = part["lips"], part["inner"]
    fill(np.concatenate([lips[:17], lips[:16:-1]]), "lips")
    fill(np.concatenate([inner[:9], inner[:8:-1]]), "mouth")
    teeth = inner.astype(np.float32)
    teeth = 0.82 * teeth + 0.18 * teeth[[0, 8]].mean(axis=0)
    teeth[:9] += 0.14 * (inner[9:] - inner[:9])
    fill(np.rint(np.concatenate([teeth[:9], teeth[:8:-1]])).astype(np.int32), "teeth")


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
    Store(root).write_video(clip.patient, clip.video, render(clip), clip.landmarks, quality=JPEG_QUALITY)
    return CsvRow(f"{clip.video}_{clip.patient}", clip.label, len(clip.points), EXPRESSIONS[expression])
