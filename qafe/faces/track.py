"""One person's face through a whole video, whoever else is in view.

The subject of a survey (see `qafe.faces.subject`) is followed frame by frame in a small window, held to three things
at once: where the face was, how large it was, and what it looks like. What fails them is a missed frame, never
another person. Missed frames at both ends are cut off; those between are filled in up to a limit, and beyond it the
video is refused.

Source: tracking by detection, as in SORT (arXiv:1602.00763). The published script takes the first face of each frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..config import ModelConfig
from ..errors import FaceError
from ..markup import ALL_COUNT
from .subject import (
    ALIKE,
    Faces,
    Floats,
    Frame,
    Look,
    Seen,
    Subject,
    centre,
    choose_subject,
    distance_px,
    likeness,
    mix,
    overlap,
    size_px,
)

_NEAR_OVERLAP = 0.3
_NEAR_LIKENESS = 0.45

LEAST_FRAMES = ModelConfig().segment_frames
"""How many frames must be left where ends are cut: a segment of a clip. Clips repeat a video that is shorter than they
are, see `qafe.data.clips`."""


class Finder(Protocol):
    """What the tracker needs of the face models."""

    def find(self, frame: Frame) -> Faces:
        """All faces of the whole frame."""

    def find_near(self, frame: Frame, box: Floats) -> Faces:
        """The faces in a window around a box."""

    def landmarks(self, frame: Frame, box: Floats) -> Floats:
        """The 106 points [106,2] of the face in a box."""


class Frames(Protocol):
    """What the tracker needs of a video."""

    def __len__(self) -> int: ...

    def frames(self, every: int = 1) -> Iterator[tuple[int, Frame]]:
        """(index, RGB frame) from the start; with ``every``, each n-th and the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackSettings:
    """How a face is followed."""

    every_frames: int = 25
    """A whole frame is searched this often."""
    gap_frames: int = 12
    """The longest run of missed frames that is filled in."""
    min_detected: float = 0.8
    """The least share of frames in which the face must be seen, of those that are not cut."""
    keep_ends: bool = False
    """Frames before the face is first seen, and after it is last seen, are filled in like all others and not cut."""


@dataclass(frozen=True, slots=True)
class Track:
    """The subject's face in every frame of a video, or of the part that is not cut: T frames."""

    boxes: Floats
    """[T,4] px; filled in where the face was missed."""
    landmarks: Floats
    """[T,106,2] px; filled in where the face was missed."""
    key_points: Floats
    """[T,5,2] px; NaN where the face was missed."""
    found: npt.NDArray[np.bool_]
    """[T]: False where the face was missed."""
    whole_frames: int
    """How many whole frames were searched."""
    windows: int
    """How many windows were searched."""
    faces_most: int
    """The largest number of faces in one whole frame."""
    notes: tuple[str, ...]
    cut_start_frames: int = 0
    """How many frames of the video lie before the first one here."""
    cut_end_frames: int = 0
    """How many frames of the video lie behind the last one here."""

    def missed(self) -> list[tuple[int, int]]:
        """(first, last) of each run of missed frames."""
        edges = np.flatnonzero(np.diff(np.concatenate([[0], ~self.found, [0]]).astype(np.int8)))
        return [(int(first), int(last) - 1) for first, last in zip(edges[::2], edges[1::2], strict=True)]


def follow(video: Frames, finder: Finder, settings: TrackSettings) -> Track:
    """Follows the subject of a video through all its frames.

    Raises:
        FaceError: no face is there, it is missed for too long or too often, or too little is left between the ends.
    """
    survey = _survey(video, finder, settings.every_frames)
    if settings.every_frames > LEAST_FRAMES and not any(seen.looks for seen in survey.values()):
        # Between ends without the face, what may be left is shorter than the steps of the survey.
        survey = _survey(video, finder, LEAST_FRAMES)
    subject = choose_subject(survey)
    track = _Following(finder, survey, subject).through(video)
    return fill(track if settings.keep_ends else cut(track, settings), settings, subject.notes)


def _survey(video: Frames, finder: Finder, every: int) -> dict[int, Seen]:
    return {index: Seen.of(frame, finder.find(frame)) for index, frame in video.frames(every)}


# ---------------------------------------------------------------- frame by frame


class _Following:
    """Walks through a video once, with the subject's place and look in mind."""

    def __init__(self, finder: Finder, survey: Mapping[int, Seen], subject: Subject) -> None:
        self.finder, self.survey, self.anchors, self.others = finder, survey, subject.anchors, subject.others
        self.whole_frames, self.windows = len(survey), 0
        self.sure_looks = [survey[index].looks[face] for index, face in self.anchors.items()]
        self.start: tuple[int, int] | None = subject.start
        self._begin(*subject.start)
        self.velocity = np.zeros(2, np.float32)
        self.missed = 0

    def _begin(self, index: int, face: int) -> None:
        """Knows no place yet, and looks out for a sighting."""
        self.look = self.survey[index].looks[face]
        self.first_box = self.survey[index].faces.boxes[face]
        self.box: Floats | None = None

    def through(self, video: Frames) -> Track:
        count = len(video)
        boxes = np.full((count, 4), np.nan, np.float32)
        landmarks = np.full((count, ALL_COUNT, 2), np.nan, np.float32)
        key_points = np.full((count, 5, 2), np.nan, np.float32)
        last_anchor = -1
        for index, frame in video.frames():
            seen, face = self._search(index, frame)
            if index in self.anchors:
                self.start = None
            if face is None:
                self.missed += 1
                if self.start is not None and self.box is not None:
                    # A start that does not lead to a sure sighting was another person's.
                    boxes[:index] = np.nan
                    self.start = None
                    self._begin(*min(self.anchors.items()))
                continue
            box = seen.faces.boxes[face]
            if index in self.anchors:
                if self.box is not None and self.missed == 0 and overlap(box, self.box) < _NEAR_OVERLAP / 2:
                    # What was followed since the last look was not the subject.
                    boxes[last_anchor + 1 : index] = np.nan
                    self.missed = 1  # the way from there to here is no velocity
                last_anchor = index
            self._accept(box, seen.looks[face])
            boxes[index], key_points[index] = box, seen.faces.key_points[face]
            landmarks[index] = self.finder.landmarks(frame, box)
        found = np.isfinite(boxes[:, 0])
        key_points[~found] = np.nan
        most = max(len(seen.looks) for seen in self.survey.values())
        return Track(boxes, landmarks, key_points, found, self.whole_frames, self.windows, most, ())

    def _search(self, index: int, frame: Frame) -> tuple[Seen, int | None]:
        if index in self.survey:
            seen = self.survey[index]
            if self.start is not None and index == self.start[0]:
                return seen, self.start[1]
            return seen, self.anchors[index] if index in self.anchors else self._pick(seen)
        if self.box is not None:
            self.windows += 1
            seen = Seen.of(frame, self.finder.find_near(frame, self._expected()))
            face = self._pick(seen)
            if face is not None:
                return seen, face
        self.whole_frames += 1
        seen = Seen.of(frame, self.finder.find(frame))
        return seen, self._pick(seen)

    def _expected(self) -> Floats:
        assert self.box is not None
        shift = self.velocity * min(self.missed + 1, 3)
        return self.box + np.tile(shift, 2)

    def _pick(self, seen: Seen) -> int | None:
        """The face that is the subject, if any is."""
        best, place = 0.0, None
        for face, (box, look) in enumerate(zip(seen.faces.boxes, seen.looks, strict=True)):
            alike = self._alike(look)
            if any(likeness(other, look) > alike for other in self.others):
                continue
            if self.box is not None and self.missed == 0:
                expected = self._expected()
                near = overlap(box, expected)
                passes = (
                    near > _NEAR_OVERLAP and 0.67 < size_px(box) / size_px(expected) < 1.5 and alike > _NEAR_LIKENESS
                )
            else:
                last = self.first_box if self.box is None else self.box
                reach = 3.0 if self.box is None else 0.5 + 0.25 * self.missed
                near = 1 - distance_px(box, last) / (reach * size_px(last))
                passes = near > 0 and 0.5 < size_px(box) / size_px(last) < 2 and alike > ALIKE
            if passes and near + alike > best:
                best, place = near + alike, face
        return place

    def _alike(self, look: Look) -> float:
        """To the memory of the face; once it is lost, also to how it looked at any time it was sure."""
        known = [self.look] if self.missed == 0 else [self.look, *self.sure_looks]
        return max(likeness(memory, look) for memory in known)

    def _accept(self, box: Floats, look: Look) -> None:
        if self.box is not None and self.missed == 0:
            self.velocity = 0.5 * self.velocity + 0.5 * (centre(box) - centre(self.box))
        else:
            self.velocity = np.zeros(2, np.float32)
        self.look = mix(self.look, look)
        self.box, self.missed = box, 0


# ---------------------------------------------------------------- ends, gaps and jitter


def cut(track: Track, settings: TrackSettings) -> Track:
    """Leaves out the frames before the face is first seen and after it is last seen.

    Where fewer than `LEAST_FRAMES` would be left, ends that can be filled in stay: a video that is short as it is loses
    nothing.

    Raises:
        FaceError: fewer would be left, and an end is too long to be filled in.
    """
    count, found = len(track.found), np.flatnonzero(track.found)
    if not found.size:
        return track
    first, last = int(found[0]), int(found[-1])
    left = last + 1 - first
    if left < LEAST_FRAMES:
        if max(first, count - 1 - last) <= settings.gap_frames:
            return track
        raise FaceError(
            f"from the first to the last frame with the face there must be at least {LEAST_FRAMES} frames, got {left} "
            f"(frames {first}-{last} of {count}). Look at the recording; --keep-ends cuts nothing."
        )
    part = slice(first, last + 1)
    return replace(
        track,
        boxes=track.boxes[part],
        landmarks=track.landmarks[part],
        key_points=track.key_points[part],
        found=track.found[part],
        cut_start_frames=first,
        cut_end_frames=count - 1 - last,
    )


def fill(track: Track, settings: TrackSettings, notes: Sequence[str] = ()) -> Track:
    """Fills missed frames in: on a straight line between neighbours, at the ends as the nearest frame.

    Raises:
        FaceError: a gap is too long, or too few frames show the face.
    """
    count, found = len(track.found), np.flatnonzero(track.found)
    if not found.size:
        raise FaceError("a video must show a face that can be followed, and none could. Look at the recording.")
    for first, last in track.missed():
        if last - first + 1 > settings.gap_frames:
            raise FaceError(
                f"the face may be out of sight for at most {settings.gap_frames} frames in a row, got "
                f"{last - first + 1} (frames {track.cut_start_frames + first}-{track.cut_start_frames + last} of "
                f"{track.cut_start_frames + count + track.cut_end_frames}). Trim the recording (start and end columns "
                f"of the labels) or set --max-gap {last - first + 1}."
            )
    share = found.size / count
    if share < settings.min_detected:
        lower = int(100 * share)  # never rounded up to what was asked for
        raise FaceError(
            f"the face must be seen in at least {settings.min_detected:.0%} of the frames, got {lower}% "
            f"({found.size} of {count}). Trim the recording or set --min-detected {max(lower, 1) / 100:.2f}."
        )
    if share == 1:
        return replace(track, notes=(*track.notes, *notes))
    below = np.searchsorted(found, np.arange(count), side="right") - 1
    before = found[np.clip(below, 0, None)]
    after = found[np.clip(np.searchsorted(found, np.arange(count)), None, found.size - 1)]
    span = np.maximum(after - before, 1)
    part = np.clip((np.arange(count) - before) / span, 0, 1).astype(np.float32)

    def between(values: Floats) -> Floats:
        weight = part.reshape(-1, *[1] * (values.ndim - 1))
        return np.asarray((1 - weight) * values[before] + weight * values[after], np.float32)

    return replace(track, boxes=between(track.boxes), landmarks=between(track.landmarks), notes=(*track.notes, *notes))


def one_euro(
    landmarks: Floats, hz: float, size_px: float, min_cutoff_hz: float = 1.0, beta: float = 8.0, speed_hz: float = 1.0
) -> Floats:
    """Smooths landmarks [T,P,2]: strongly where they rest, hardly where they move.

    Source: the 1 € filter (Casiez, Roussel, Vogel, CHI 2012). Differs: speed is counted in face sizes a second, so
    that one setting fits near and far faces; every point has one speed for both of its coordinates.

    Args:
        landmarks: px.
        hz: frames a second.
        size_px: of the face.
        min_cutoff_hz: the cut-off at rest.
        beta: how much of a face size a second raises the cut-off, Hz.
        speed_hz: the cut-off of the speed itself.
    """

    def keep(cutoff_hz: Floats) -> Floats:
        return np.asarray(1 / (1 + hz / (2 * np.pi * cutoff_hz)), np.float32)

    smooth = np.empty_like(landmarks)
    smooth[0] = landmarks[0]
    speed = np.zeros((landmarks.shape[1], 2), np.float32)
    for index in range(1, len(landmarks)):
        step = (landmarks[index] - landmarks[index - 1]) * (hz / size_px)
        speed += keep(np.array([speed_hz], np.float32)) * (step - speed)
        cutoff = min_cutoff_hz + beta * np.linalg.norm(speed, axis=1, keepdims=True)
        smooth[index] = smooth[index - 1] + keep(cutoff) * (landmarks[index] - smooth[index - 1])
    return smooth
