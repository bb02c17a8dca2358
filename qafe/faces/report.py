"""What became of a cohort's videos: ``report.json`` for programs, ``report.html`` for people.

The page is drawn from what the JSON file holds and carries everything inside it. It shows faces only if it is given
pictures of them.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from ..errors import FaceError
from ..markup import ALL_COUNT, GROUPS
from ..natural_order import natural_order
from ..store import write_file
from .page import Row, draw_page, percent, real

VERSION = 1

DETECTED_LEAST = 0.95
SHARPNESS_LEAST = 0.4
"""As a share of the cohort's median."""
FACE_SIZE_LEAST_PX = 96
YAW_RANGE_MOST_DEG = 40
BRIGHTNESS_LEAST, BRIGHTNESS_MOST = 60, 200
CLIPPED_PIXELS_MOST = 0.2
CLIPPED_POINTS_MOST = 0.01
GAP_MOST_S = 0.5
FRAME_RATE_HZ = 30.0
"""Assumed for the gap where a video's own rate is not known."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "contour": (235, 235, 235),
    "left_eye": (64, 190, 255),
    "left_brow": (60, 220, 120),
    "mouth": (255, 90, 170),
    "nose": (255, 210, 60),
    "right_eye": (120, 130, 255),
    "right_brow": (170, 235, 70),
    "pupils": (255, 140, 40),
}
"""RGB of each group of `qafe.markup.GROUPS` on a contact sheet."""
MISSED_COLOUR = (235, 30, 30)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What `write_report` writes. Plain values only; a row may lack any key, or hold None or NaN for unknown."""

    videos: Sequence[Row]
    """One row for each prepared video, by the keys of `qafe.faces.page.COLUMNS`."""
    refused: Sequence[Row] = ()
    """``video``, ``patient`` and ``reason`` of each video that was not prepared."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    totals: Mapping[str, Any] = field(default_factory=dict)
    """Added to what `totals` counts, and stronger than it."""
    notes: Sequence[str] = ()
    """Sentences about the whole cohort."""


class Finding(NamedTuple):
    """One reason to look at a video."""

    patient: str
    video: str
    reason: str
    weight: float
    """At least 1 for what is measured to be wrong, less for what is merely worth knowing."""


def write_report(folder: Path, report: Report, pictures: Mapping[str, bytes] | None) -> None:
    """Writes ``report.json`` and ``report.html`` into a folder; the same report gives the same bytes.

    A text that is an absolute path as a whole is written as its last part alone.

    Args:
        folder: made if it is not there.
        pictures: JPEG bytes of a contact sheet by ``<patient>/<video>``; None leaves all pictures of faces out.
    """
    content = _content(report)
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    shown = None if pictures is None else {name: pictures[name] for name in sorted(pictures, key=natural_order)}
    marks = {group.replace("_", " "): colour for group, colour in COLOURS.items()}
    page = draw_page(content, shown, marks | {"frame: landmarks guessed": MISSED_COLOUR})
    # File names need not be UTF-8: what is not becomes \udcXX, which JSON reads back as it was.
    write_file(folder / "report.json", text.encode("utf-8", "backslashreplace"))
    write_file(folder / "report.html", page.encode("utf-8", "backslashreplace"))


def totals(report: Report) -> dict[str, Any]:
    """Counts over a report: videos, patients, frames, the detected share of all frames, and warnings."""
    videos = _plain(report.videos)
    counted = [
        (frames, share)
        for row in videos
        if (frames := real(row, "frames")) is not None and (share := real(row, "detected")) is not None
    ]
    frames = sum(count for count, _ in counted)
    found = [finding for finding in findings(report) if finding.weight >= 1]
    return {
        "prepared": len(videos),
        "refused": len(report.refused),
        "patients": len({_name(row, "patient") for row in videos} - {"-"}),
        "frames": int(sum(real(row, "frames") or 0 for row in videos)),
        "detected": sum(count * share for count, share in counted) / frames if frames else None,
        "warnings": len(found),
        "videos_with_warnings": len({(finding.patient, finding.video) for finding in found}),
    } | dict(report.totals)


def findings(report: Report) -> list[Finding]:
    """Every reason to look at a prepared video, the most suspicious video first."""
    rows = _plain(report.videos)
    limits = _limits(rows)
    found = [
        Finding(_name(row, "patient"), _name(row, "video"), reason, weight)
        for row in rows
        for weight, reason in _reasons(row, limits)
    ]
    weights: dict[tuple[str, str], float] = {}
    for finding in found:
        weights[finding[:2]] = weights.get(finding[:2], 0.0) + finding.weight
    found.sort(key=lambda f: (-weights[f[:2]], natural_order(f.patient), natural_order(f.video), -f.weight, f.reason))
    return found


def _limits(rows: Sequence[Row]) -> dict[str, tuple[float | None, float | None]]:
    """From where to where a measure is not suspicious."""
    sharpness = [value for row in rows if (value := real(row, "sharpness")) is not None]
    # Tight crops (per_frame) clip landmarks in every video: what stands out is more than the others have.
    clipped = [value for row in rows if (value := real(row, "clipped_points")) is not None]
    return {
        "detected": (DETECTED_LEAST, None),
        "sharpness": (SHARPNESS_LEAST * statistics.median(sharpness) if sharpness else None, None),
        "brightness": (BRIGHTNESS_LEAST, BRIGHTNESS_MOST),
        "face_size_px": (FACE_SIZE_LEAST_PX, None),
        "yaw_range_deg": (None, YAW_RANGE_MOST_DEG),
        "clipped_points": (None, CLIPPED_POINTS_MOST + 1.5 * (statistics.median(clipped) if clipped else 0.0)),
    }


def _reasons(row: Row, limits: Mapping[str, tuple[float | None, float | None]]) -> Iterator[tuple[float, str]]:
    sharpness_least, clipped_most = limits["sharpness"][0], limits["clipped_points"][1]
    assert clipped_most is not None
    detected, sharpness, size = real(row, "detected"), real(row, "sharpness"), real(row, "face_size_px")
    if detected is not None and detected < DETECTED_LEAST:
        yield 1 + 5 * (1 - detected), f"no face was found in {percent(1 - detected)} of the frames; they are guessed"
    if (gap := real(row, "longest_gap_frames")) is not None:
        rate = real(row, "hz") or real(row, "source_hz")
        if gap > GAP_MOST_S * (rate or FRAME_RATE_HZ):
            lasts = f" ({gap / rate:.1f} s)" if rate else ""
            yield 1 + min(gap / 200, 1), f"{gap:.0f} frames in a row{lasts} without a face; they are guessed"
    if sharpness is not None and sharpness_least is not None and sharpness < sharpness_least:
        median = sharpness_least / SHARPNESS_LEAST
        yield 2 - sharpness / median, f"blurred: sharpness {sharpness:.3g}, the cohort's median is {median:.3g}"
    if size is not None and size < FACE_SIZE_LEAST_PX:
        yield 2 - size / FACE_SIZE_LEAST_PX, f"the face is small: {size:.0f} px, at least {FACE_SIZE_LEAST_PX} advised"
    if (yaw := real(row, "yaw_range_deg")) is not None and yaw > YAW_RANGE_MOST_DEG:
        yield yaw / YAW_RANGE_MOST_DEG, f"the head turns over {yaw:.0f}°, more than {YAW_RANGE_MOST_DEG}°"
    if (light := real(row, "brightness")) is not None and not BRIGHTNESS_LEAST <= light <= BRIGHTNESS_MOST:
        kind = "dark" if light < BRIGHTNESS_LEAST else "bright"
        yield 1, f"the face is {kind}: brightness {light:.0f} of 255"
    if (clipped := real(row, "clipped_pixels")) is not None and clipped > CLIPPED_PIXELS_MOST:
        yield 1, f"{percent(clipped)} of the pixels are plain black or white"
    if (faces := real(row, "faces_most")) is not None and faces > 1:
        yield 1, f"up to {faces:.0f} faces in view: check that the patient was followed"
    if (outside := real(row, "clipped_points")) is not None and outside > clipped_most:
        yield 1, f"{percent(outside)} of the landmarks lay outside the crop and were moved to its border"
    if row.get("variable_rate") is True:
        yield 1, "the frame rate varies: frames are not evenly spaced in time"
    for note in row.get("notes") or ():
        yield 0.25, str(note)


# ---------------------------------------------------------------- contact sheets


def contact_sheet(
    crops: Sequence[npt.NDArray[np.uint8]],
    landmarks: Sequence[npt.NDArray[np.floating]],
    *,
    missed: Sequence[bool] | None = None,
    numbers: Sequence[int] | None = None,
    side_px: int = 160,
    columns: int = 4,
    most: int = 12,
) -> bytes:
    """A JPEG grid of crops with their landmarks drawn, a colour for each group of points (`COLOURS`).

    Args:
        crops: uint8 RGB [H,W,3] each, H = W; of more than ``most``, evenly spaced ones are drawn.
        landmarks: [106,2] each, (x, y) px in the crop.
        missed: whether a frame's landmarks were interpolated; it is framed in red.
        numbers: of the frames, written into their corners.
        side_px: of one crop in the grid.
        columns: of the grid; fewer where there are fewer crops.
        most: crops drawn.
    Raises:
        FaceError: there is no crop, or the lists do not fit each other.
    """
    count = len(crops)
    lengths = [len(given) for given in (landmarks, missed, numbers) if given is not None]
    if not count or any(length != count for length in lengths):
        raise FaceError(
            f"a contact sheet needs at least one crop, and landmarks for each, got {count} crops and lists of "
            f"{lengths} (crops). Give one entry a frame."
        )
    chosen = np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))
    columns = min(columns, len(chosen))
    sheet = np.full((-(-len(chosen) // columns) * side_px, columns * side_px, 3), 24, np.uint8)
    for place, index in enumerate(chosen):
        tile = _tile(crops[index], landmarks[index], side_px)
        if numbers is not None:
            for colour, width in (((0, 0, 0), 3), ((255, 255, 255), 1)):
                font, corner = cv2.FONT_HERSHEY_SIMPLEX, (6, side_px - 7)
                cv2.putText(tile, str(numbers[index]), corner, font, 0.4, colour, width, cv2.LINE_AA)
        if missed is not None and missed[index]:
            cv2.rectangle(tile, (1, 1), (side_px - 2, side_px - 2), MISSED_COLOUR, 3)
        top, left = place // columns * side_px, place % columns * side_px
        sheet[top : top + side_px, left : left + side_px] = tile
    full_colour = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    done, data = cv2.imencode(
        ".jpg", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85, *full_colour]
    )
    assert done, "OpenCV encodes any uint8 RGB picture"
    return data.tobytes()


def _tile(crop: npt.NDArray[np.uint8], points: npt.NDArray[np.floating], side_px: int) -> npt.NDArray[np.uint8]:
    height, width = crop.shape[:2]
    tile = cv2.resize(crop, (side_px, side_px), interpolation=cv2.INTER_AREA)
    assert points.shape == (ALL_COUNT, 2), points.shape
    scaled = (points + 0.5) * [side_px / width, side_px / height] - 0.5
    radius, shift = side_px / 110, 4
    for group, members in GROUPS.items():
        for x, y in scaled[list(members)]:
            if math.isfinite(x + y):
                centre = (round(x * 2**shift), round(y * 2**shift))
                cv2.circle(tile, centre, round(radius * 2**shift), COLOURS[group], -1, cv2.LINE_AA, shift)
    return np.asarray(tile, np.uint8)


# ---------------------------------------------------------------- plain values


def _content(report: Report) -> dict[str, Any]:
    def place(row: Row) -> tuple[Any, ...]:
        return natural_order(_name(row, "patient")), natural_order(_name(row, "video"))

    plain: dict[str, Any] = _plain(
        {
            "version": VERSION,
            "settings": report.settings,
            "totals": totals(report),
            "notes": report.notes,
            "findings": [finding._asdict() for finding in findings(report)],
            "limits": _limits(_plain(report.videos)),
            "videos": sorted(report.videos, key=place),
            "refused": sorted(report.refused, key=place),
        }
    )
    return plain


def _plain(value: Any, *, prose: bool = False) -> Any:
    """Only what JSON knows: numpy's values as Python's, what is not finite as None, no absolute path but in prose."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, prose=key in ("reason", "notes")) for key, item in value.items()}
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist(), prose=prose)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [_plain(item, prose=prose) for item in value]
    text = value.as_posix() if isinstance(value, PurePath) else str(value)
    for kind in (PurePosixPath, PureWindowsPath):
        if not prose and kind(text).is_absolute():
            return kind(text).name
    return text


def _name(row: Row, key: str) -> str:
    return "-" if row.get(key) is None else str(row[key])
