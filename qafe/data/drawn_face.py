"""A drawn face: its curves, moved; the 106 landmarks among them; its picture.

`qafe.data.sample` makes its clips of these.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from ..markup import ALL_COUNT

FRAME_HZ = 12.5
SIZE_PX = 256
SMILE, FROWN, SQUEEZE, CLENCH = range(4)
"""The directions a face moves in; each is also one that faces differ in at rest."""

Array = npt.NDArray[np.float64]
Frames = npt.NDArray[np.uint8]

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


def wander(rng: np.random.Generator, frames: int, rate_hz: float) -> Array:
    """A slow aimless wave, [T], about 0-1."""
    time = np.arange(frames) / FRAME_HZ
    rates = rate_hz * np.array([0.7, 1.3, 2.1])
    waves = np.sin(2 * np.pi * (np.outer(time, rates) + rng.uniform(0, 1, 3)))
    return np.asarray(0.5 + waves @ np.array([0.3, 0.25, 0.12]))


def curves(rng: np.random.Generator, person: dict[str, Any], move: Array, blink: Array) -> Array:
    """Every curve of the face in its own frame, [T,N,2] px about the point between the eyes and the nose."""
    frames = len(move)
    out = np.zeros((frames, sum(_COUNTS.values()), 2))
    gaze = np.stack([wander(rng, frames, 0.5), wander(rng, frames, 0.4)], axis=1) * 6 - 3
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


def placed(rng: np.random.Generator, frames: int, points: Array) -> Array:
    """The face's own frame to image px: place, tilt and size of the head, slowly swaying."""
    sway = np.stack([wander(rng, frames, 0.35) for _ in range(4)], axis=1) - 0.5
    angle = np.deg2rad(rng.uniform(-1.5, 1.5) + 2.0 * sway[:, 0])
    scale = rng.uniform(0.98, 1.03) * (1 + 0.015 * sway[:, 1])
    place = np.array([128.0, 126.0]) + rng.uniform(-2, 2, 2) + 2.5 * sway[:, 2:]
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    turn = np.stack([np.stack([cos, sin], axis=1), np.stack([-sin, cos], axis=1)], axis=1)
    return np.asarray(points @ turn + place[:, None])


_SHIFT = 4


def draw(curves_px: npt.NDArray[np.float32], looks: dict[str, Any], noise_seed: int) -> Frames:
    """Curves of every frame, [T,N,2] px -> pictures, [T,256,256,3] uint8 RGB."""
    rng = np.random.default_rng(noise_seed)
    points = np.rint(curves_px * (1 << _SHIFT)).astype(np.int32)

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
