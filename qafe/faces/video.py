"""Recordings: a video file or a folder of frames -> uint8 RGB frames, with their times.

Frames stream: memory depends on the size of a frame, not on the length of the video, unless all frames fit
into a stated number of megabytes and are kept for the next pass.
"""

from __future__ import annotations

import copy
import math
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

import cv2
import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, MediaError
from ..natural_order import natural_order
from ..store import Frames

SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".m4v", ".webm", ".mpg", ".mpeg", ".wmv", ".mts", ".m2ts")
"""Video files that are read, in either case."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")
"""Frames of a folder that are read, in either case."""

Times = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_ROUNDING_S = 0.001
"""Matroska rounds a time to milliseconds, QuickTime often to 1/600 s."""
_UNEVEN = 0.2
_UNEVEN_SHARE = 0.01
_RATES_HZ = (1.0, 1000.0)
_DECODER_DELAY_FRAMES = 16
"""The most frames that a decoder holds back for reordering (H.264 and H.265)."""
_COUNTED = (".mp4", ".mov", ".m4v")
"""Containers whose header counts frames; for the others OpenCV multiplies duration and frame rate."""
_GIVE_FPS = "Give its frame rate in the column fps of the labels file."
_CONVERT = "Play it in a video player; if it plays, convert it with ffmpeg -i IN -c:v libx264 -crf 18 OUT.mp4."

# FFmpeg reports every damaged packet on stderr. OpenCV reads this once, when the process opens its first video.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")


class _Index(NamedTuple):
    """What one pass over a source finds out."""

    frames: int
    shape: tuple[int, int]
    times_s: Times | None
    """As the file says them, zero where it says none; None for a folder."""
    rotation_deg: int
    said: int
    """Frames that the source announces."""
    notes: list[str]


class Video:
    """One recording: a video file or a folder of frames, read as often as wanted.

    Making one decodes the source once, to learn the time of each frame and that all of them can be read. Times
    count from the first frame that can be decoded. With ``resample_hz``, output frame k shows what a player would
    show at ``start_s + k / resample_hz``: the last source frame whose time is not later (to the millisecond to
    which containers round). Without it, all source frames with start_s <= time < end_s are given.

    Source: timestamps as FFmpeg gives them to OpenCV (``CAP_PROP_POS_MSEC`` after ``grab()``). Differs: times start
    at 0 for every container, and the frames that AVI and MPEG files leave without a time at their end go on at the
    frame rate. Unlike FFmpeg's ``fps`` filter, which takes the nearest frame, no frame is shown before its time.

    Args:
        path: a file with one of SUFFIXES, or a folder of images with IMAGE_SUFFIXES, taken in natural order.
        resample_hz: frame rate of the output; None gives each source frame once.
        start_s: where the used part starts, in seconds; None for the recording's start.
        end_s: where the used part ends, in seconds, exclusive; None for the recording's end.
        source_hz: frame rate of the source; replaces the file's own times, and gives a folder its times.
        memory_mb: frames are kept in memory after the first complete pass if all of them need no more than this
            (in MiB, decoded); 0 keeps none.
    Attributes:
        path: as given.
        height_px, width_px: size of a frame, upright.
        rotation_deg: 0, 90, 180 or 270, how far the metadata say to turn (clockwise); already applied.
        source_hz: as given, or the mean of the intervals that lie near the median one; None for a folder without.
        hz: frame rate of ``frames()``: resample_hz or else source_hz.
        variable_rate: more than 1 % of the intervals between source frames differ from the median one by more
            than 20 %.
        duration_s: length of the used part; the last frame lasts one interval. None without a frame rate.
        times_s: float64 [T], seconds from the recording's start to each output frame; None without a frame rate.
        notes: what is worth telling about the source, one short text each.
    Raises:
        MediaError: the source is missing, empty, damaged or not a video, holds fewer than two frames, has no
            usable timestamps, or holds images of different sizes; or a setting is not a positive number, needs a
            frame rate that is not known, or leaves fewer than two frames.
    """

    def __init__(
        self,
        path: Path,
        *,
        resample_hz: float | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
        source_hz: float | None = None,
        memory_mb: int = 512,
    ) -> None:
        self.path = Path(path)
        _check_settings(self.path, resample_hz, start_s, end_s, source_hz)
        self._images = _list_images(self.path) if self.path.is_dir() else None
        if self._images is None:
            index = _index_file(self.path)
        elif source_hz is None and (resample_hz, start_s, end_s) != (None, None, None):
            raise MediaError(
                f"resample_hz, start_s and end_s need a frame rate, and a folder of frames has none ({self.path}). "
                f"{_GIVE_FPS}"
            )
        else:
            index = _index_folder(self._images)
        if index.frames < 2:
            raise MediaError(f"a video must have at least 2 frames, got {index.frames} in {self.path}. {_CONVERT}")

        self._count = index.frames
        self.height_px, self.width_px = index.shape
        self.rotation_deg = index.rotation_deg
        notes = index.notes
        times_s, self.source_hz, self.variable_rate = _timed(index, source_hz, self.path, notes)
        self.hz = resample_hz or self.source_hz

        self.times_s: Times | None = None
        self.duration_s: float | None = None
        self._sources: Indices = np.arange(index.frames)
        """Which source frame each output frame shows."""
        if times_s is not None and self.source_hz is not None:
            whole_s = float(times_s[-1]) + 1 / self.source_hz
            begin_s, finish_s = start_s or 0.0, min(whole_s, math.inf if end_s is None else end_s)
            if begin_s >= whole_s:
                raise MediaError(
                    f"start_s must lie before the recording's end at {whole_s:.3f} s, got {begin_s:g} ({self.path}). "
                    "Correct start_s."
                )
            self._sources, self.times_s = _select(times_s, self.source_hz, begin_s, finish_s, resample_hz)
            self.duration_s = finish_s - begin_s
            if len(self._sources) < 2:
                raise MediaError(
                    f"at least 2 frames must lie from start_s to end_s, got {len(self._sources)} from {begin_s:.3f} to "
                    f"{finish_s:.3f} s ({self.path}). Widen them{', or raise resample_hz' if resample_hz else ''}."
                )
            if end_s is not None and end_s > whole_s + 1 / self.source_hz:
                notes.append(f"end_s is {end_s:g} s, and the recording ends at {whole_s:.3f} s")
        lost = _lost_note(index, self.path, self.variable_rate)
        if lost:
            notes.append(lost)
        self.notes: tuple[str, ...] = tuple(notes)

        kept_bytes = len(np.unique(self._sources)) * self.height_px * self.width_px * 3
        self._keeps = kept_bytes <= memory_mb * 2**20
        self._kept: dict[int, Frames] | None = None

    def __len__(self) -> int:
        """The number of output frames, T."""
        return len(self._sources)

    def part(self, first: int, last: int) -> Video:
        """The output frames from first to last alone, counted from 0; their times and the frame rate stay."""
        part = copy.copy(self)
        part._sources = self._sources[first : last + 1]
        if self.times_s is not None and self.duration_s is not None:
            part.times_s = self.times_s[first : last + 1]
            before_s, after_s = self.times_s[first] - self.times_s[0], self.times_s[-1] - self.times_s[last]
            part.duration_s = self.duration_s - float(before_s + after_s)
        return part

    def frames(self, every: int = 1) -> Iterator[tuple[int, Frames]]:
        """Output index and frame, uint8 RGB [H,W,3] and read-only; each call starts anew.

        Args:
            every: gives the frames 0, every, 2 * every, ... and always the last one too.
        Raises:
            ConfigError: every is below 1.
            MediaError: the source changed since this object was made, changes its size, or a frame cannot be
                converted.
        """
        if every < 1:
            raise ConfigError(f"every must be at least 1, got {every} ({self.path}). Set every=1.")
        return self._frames(every)

    def _frames(self, every: int) -> Iterator[tuple[int, Frames]]:
        outputs = np.arange(0, len(self), every)
        if outputs[-1] != len(self) - 1:
            outputs = np.append(outputs, len(self) - 1)
        sources = self._sources[outputs]
        if self._kept is not None:
            for output, source in zip(outputs, sources, strict=True):
                yield int(output), self._kept[int(source)]
            return
        keeping: dict[int, Frames] | None = {} if every == 1 and self._keeps else None
        distinct, repeats = np.unique(sources, return_counts=True)
        place = 0
        for source, repeat, frame in zip(distinct, repeats, self._decode(distinct), strict=True):
            frame.setflags(write=False)
            if keeping is not None:
                keeping[int(source)] = frame
            for output in outputs[place : place + repeat]:
                yield int(output), frame
            place += repeat
        if keeping is not None:
            self._kept = keeping

    def _decode(self, sources: Indices) -> Iterator[Frames]:
        shape = (self.height_px, self.width_px)
        if self._images is not None:
            for source in sources:
                yield _read_image(self._images[source], shape)
            return
        capture = _open(self.path)
        try:
            at = -1
            for source in sources:
                while at < source:
                    if not capture.grab():
                        self._fail_changed(f"{at + 1}")
                    at += 1
                converted, bgr = capture.retrieve()
                if not converted or bgr.shape != (*shape, 3):
                    got = f"{bgr.shape[0]}x{bgr.shape[1]} px" if converted else "nothing"
                    raise MediaError(
                        f"all frames of a video must be {shape[0]}x{shape[1]} px RGB, got {got} for frame {source} of "
                        f"{self.path}. {_CONVERT}"
                    )
                yield np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), dtype=np.uint8)
            if at == self._count - 1 and capture.grab():
                self._fail_changed(f"more than {self._count}")
        finally:
            capture.release()

    def _fail_changed(self, got: str) -> NoReturn:
        raise MediaError(
            f"a video must give the same frames each time it is read, first {self._count} and now {got} in "
            f"{self.path}. Wait until nothing writes to it any more, then start again."
        )


# ------------------------------------------------------------------------ settings and times


def _check_settings(
    path: Path, resample_hz: float | None, start_s: float | None, end_s: float | None, source_hz: float | None
) -> None:
    for name, value in (("resample_hz", resample_hz), ("source_hz", source_hz)):
        if value is not None and not 0 < value <= _RATES_HZ[1]:
            step = "Set resample_hz=25." if name == "resample_hz" else _GIVE_FPS
            raise MediaError(f"{name} must be above 0 and at most {_RATES_HZ[1]:g}, got {value} ({path}). {step}")
    for name, value in (("start_s", start_s), ("end_s", end_s)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise MediaError(f"{name} must be a number of seconds from 0 up, got {value} ({path}). Correct {name}.")
    if end_s is not None and end_s <= (start_s or 0):
        raise MediaError(
            f"end_s must be greater than start_s, got start_s={start_s or 0:g} and end_s={end_s:g} ({path}). "
            "Correct one of them."
        )


def _timed(
    index: _Index, source_hz: float | None, path: Path, notes: list[str]
) -> tuple[Times | None, float | None, bool]:
    """Time of each source frame, frame rate, whether it varies; adds to notes what is worth telling."""
    if index.times_s is None:
        return (None if source_hz is None else np.arange(index.frames) / source_hz), source_hz, False
    times_s, continued = _continued(index.times_s)
    if source_hz is not None:
        own_hz = 1 / _interval_s(times_s) if np.all(np.diff(times_s) > 0) else source_hz
        if abs(own_hz - source_hz) > 0.02 * source_hz:
            notes.append(f"the file's own timestamps say {own_hz:.2f} Hz, read at {source_hz:g} Hz as given")
        return np.arange(index.frames) / source_hz, source_hz, False
    rate_hz = _rate_hz(times_s, path)
    if continued:
        notes.append(f"the last frames have no timestamps ({continued} of them), gone on at {rate_hz:.2f} Hz")
    intervals_s = np.diff(times_s)
    varies = bool(_uneven(intervals_s).mean() > _UNEVEN_SHARE)
    if varies:
        low, middle, high = np.percentile(intervals_s, [0, 50, 100]) * 1000
        notes.append(f"variable frame rate ({low:.0f} to {high:.0f} ms between frames, {middle:.0f} ms in the median)")
    return times_s, rate_hz, varies


def _continued(times_s: Times) -> tuple[Times, int]:
    """Times from 0 on, and how many were missing at the end: a flushed decoder has no packet that tells them."""
    missing = len(times_s) - 1 - int(np.flatnonzero(np.append(True, times_s[1:] > 0))[-1])
    known = times_s[: len(times_s) - missing] - times_s[0]
    if missing > _DECODER_DELAY_FRAMES or len(known) < 2 or np.any(np.diff(known) <= 0):
        return times_s, 0
    more = known[-1] + _interval_s(known) * np.arange(1, missing + 1)
    return np.concatenate([known, more]), missing


def _interval_s(times_s: Times) -> float:
    """Mean of the usual intervals: the median itself carries the rounding of the times."""
    intervals = np.diff(times_s)
    return float(intervals[~_uneven(intervals)].mean())


def _uneven(intervals: Times) -> npt.NDArray[np.bool_]:
    median = np.percentile(intervals, 50, method="lower")
    return np.asarray(np.abs(intervals - median) > max(_UNEVEN * median, 1.01 * _ROUNDING_S))


def _rate_hz(times_s: Times, path: Path) -> float:
    wrong = np.flatnonzero(np.diff(times_s) <= 0) + 1
    if wrong.size:
        raise MediaError(
            f"the timestamps of a video must increase, and {wrong.size} of {len(times_s)} do not, first frame "
            f"{wrong[0]} with {times_s[wrong[0]]:.3f} s after {times_s[wrong[0] - 1]:.3f} s, in {path}. {_GIVE_FPS}"
        )
    rate_hz = 1 / _interval_s(times_s)
    low, high = _RATES_HZ
    if not low <= rate_hz <= high * 1.001:
        raise MediaError(
            f"a frame rate must lie within {low:g} to {high:g} Hz, got {rate_hz:.4g} Hz from the timestamps of {path}. "
            f"{_GIVE_FPS}"
        )
    return rate_hz


def _select(
    times_s: Times, source_hz: float, begin_s: float, finish_s: float, resample_hz: float | None
) -> tuple[Indices, Times]:
    """Source frame and time of each output frame."""
    slack_s = min(_ROUNDING_S, 0.25 / source_hz)
    if resample_hz is None:
        sources = np.flatnonzero((times_s >= begin_s - slack_s) & (times_s < finish_s - slack_s))
        return sources, times_s[sources]
    count = max(0, math.ceil((finish_s - begin_s - slack_s) * resample_hz))
    shown_s = begin_s + np.arange(count) / resample_hz
    return np.searchsorted(times_s, shown_s + slack_s, side="right") - 1, shown_s


# ------------------------------------------------------------------------ video files


@contextmanager
def _quiet() -> Iterator[None]:
    """OpenCV's own messages off: each failure is told by one of our errors."""
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)


def _open(path: Path) -> cv2.VideoCapture:
    # An absolute path cannot be taken for a protocol ("visit1:smile.mp4").
    with _quiet():
        capture = cv2.VideoCapture(str(path.absolute()), cv2.CAP_FFMPEG)
    if not capture.isOpened():
        raise MediaError(
            f"a video file must hold pictures that FFmpeg can decode, found none in {path} (damaged, cut off, sound "
            f"only, or not a video). {_CONVERT}"
        )
    return capture


def _index_file(path: Path) -> _Index:
    if not path.exists():
        raise MediaError(f"a video must be a file or a folder of frames, and there is none at {path}. Check the path.")
    if path.suffix.lower() not in SUFFIXES:
        raise MediaError(
            f"a video file must end in one of {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'} ({path}). "
            "Convert it to .mp4, or give a folder of frames."
        )
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as err:
        raise MediaError(f"a video file must be readable, got {err.strerror} ({path}). Check its permissions.") from err
    if empty:
        raise MediaError(f"a video file must not be empty, got 0 bytes in {path}. Copy it again from its source.")
    capture = _open(path)
    times_ms = array("d")
    shape = (0, 0)
    try:
        with _quiet():
            while capture.grab():
                times_ms.append(capture.get(cv2.CAP_PROP_POS_MSEC))
                if len(times_ms) == 1:
                    converted, first = capture.retrieve()
                    shape = first.shape[:2] if converted else shape
        turn_deg = round(capture.get(cv2.CAP_PROP_ORIENTATION_META)) % 360
        across, down = (int(capture.get(name)) for name in (cv2.CAP_PROP_SAR_NUM, cv2.CAP_PROP_SAR_DEN))
        said = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    finally:
        capture.release()
    if shape == (0, 0):
        raise MediaError(f"a video must have frames that can be decoded, none of {said} can be in {path}. {_CONVERT}")
    notes = []
    if turn_deg % 90:
        notes.append(f"its metadata ask for a turn by {turn_deg} degrees, only quarter turns are done")
        turn_deg = 0
    elif turn_deg:
        notes.append(f"rotated by {turn_deg} degrees as its metadata say, shown upright")
    if across > 0 and down > 0 and across != down:
        notes.append(f"its pixels are not square ({across}:{down}), frames are given as stored")
    return _Index(len(times_ms), shape, np.array(times_ms) / 1000, turn_deg, said, notes)


def _lost_note(index: _Index, path: Path, variable_rate: bool) -> str | None:
    """What to tell if far fewer frames came than the header announces; a guess at a variable rate means nothing."""
    exact = path.suffix.lower() in _COUNTED
    if index.said - index.frames <= max(2, 0.01 * index.said) or (variable_rate and not exact):
        return None
    return f"the file says {index.said} frames, {index.frames} could be decoded"


# ------------------------------------------------------------------------ folders of frames


def _list_images(folder: Path) -> list[Path]:
    """Images in natural order (``img_2`` before ``img_10``), hidden ones left out."""
    try:
        found = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."]
    except OSError as err:
        raise MediaError(f"a folder of frames must be readable, got {err} ({folder}). Check its permissions.") from err
    if not found:
        raise MediaError(
            f"a folder of frames must hold images ({', '.join(IMAGE_SUFFIXES)}), found none in {folder}. "
            "Give a video file or the folder that the frames lie in."
        )
    return sorted(found, key=lambda path: natural_order(path.name))


def _index_folder(images: list[Path]) -> _Index:
    shape: tuple[int, int] | None = None
    for path in images:
        shape = _read_image(path, shape).shape[:2]
    assert shape is not None
    return _Index(len(images), shape, None, 0, len(images), [])


def _read_image(path: Path, shape: tuple[int, int] | None) -> Frames:
    """A frame turned upright by its EXIF data; shape is what it must have, if that is known."""
    try:
        data = path.read_bytes()
    except OSError as err:
        raise _unreadable(path) from err
    # libpng tells of a cut file on stderr, where nothing can silence it, so its end marker is looked for here.
    if not data or (data.startswith(b"\x89PNG") and b"IEND" not in data[-1024:]):
        raise _unreadable(path)
    with _quiet():
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise _unreadable(path)
    if shape is not None and image.shape[:2] != shape:
        raise MediaError(
            f"all frames of a folder must have the size of the first, {shape[0]}x{shape[1]} px, got "
            f"{image.shape[0]}x{image.shape[1]} px in {path}. Give each recording a folder of its own."
        )
    return np.asarray(image, dtype=np.uint8)


def _unreadable(path: Path) -> MediaError:
    return MediaError(
        f"a frame must be a whole image, and {path} is damaged, cut off or of another kind. Replace or remove it."
    )
