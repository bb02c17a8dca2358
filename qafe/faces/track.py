"""One person's face through a whole video, whoever else is in view.

A survey detects faces in every n-th whole frame and links them into people; the person who is largest, longest in
view and alive is the subject. The subject is then followed frame by frame in a small window, held to three things
at once: where the face was, how large it was, and what it looks like. What fails them is a missed frame, never
another person. Missed frames are filled in up to a limit; beyond it the video is refused.

Source: tracking by detection with Hungarian linking (as in SORT, arXiv:1602.00763); the likeness test is ours, from
an aligned patch, because no recognition network is loaded. The published script takes the first face of each frame.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import cv2
import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from ..errors import FaceError
from ..markup import ALL_COUNT

Floats = npt.NDArray[np.float32]
Frame = npt.NDArray[np.uint8]

_PATCH_PX = 32
# Eyes, nose and corners of the mouth in an aligned face, as shares of its side (ArcFace's usual template).
_ALIGNED = np.array([[0.342, 0.461], [0.657, 0.460], [0.5, 0.641], [0.371, 0.825], [0.631, 0.824]], np.float32)
_COLOURS = np.array([[0, 96, 96], [255, 159, 175]], np.uint8)
_CERTAIN = 0.5
_STILL = 0.004
_STILL_WEIGHT = 0.25
_RIVAL = 0.6
_LINK_LIKENESS = 0.3
_PATIENCE = 3
_LOOKS = 5
_OFTEN = 3
_NEAR_OVERLAP = 0.3
_NEAR_LIKENESS = 0.45
_AGAIN_LIKENESS = 0.55
_MEMORY = 0.2


class Faces(NamedTuple):
    """The faces found in one frame, N of them."""

    boxes: Floats
    """[N,4]: left, top, right, bottom, px in the frame."""
    scores: Floats
    """[N], 0-1; below 0.5 a face counts only where a person is known to be (as in ByteTrack, arXiv:2110.06864)."""
    key_points: Floats
    """[N,5,2]: eyes, nose, corners of the mouth, (x, y) px."""


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
    """The least share of frames in which the face must be seen."""


@dataclass(frozen=True, slots=True)
class Track:
    """The subject's face in every frame of a video, T frames."""

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

    def missed(self) -> list[tuple[int, int]]:
        """(first, last) of each run of missed frames."""
        edges = np.flatnonzero(np.diff(np.concatenate([[0], ~self.found, [0]]).astype(np.int8)))
        return [(int(first), int(last) - 1) for first, last in zip(edges[::2], edges[1::2], strict=True)]


def follow(video: Frames, finder: Finder, settings: TrackSettings) -> Track:
    """Follows the subject of a video through all its frames.

    Raises:
        FaceError: no face is there, or it is missed for too long or too often.
    """
    survey = {index: _Seen.of(frame, finder.find(frame)) for index, frame in video.frames(settings.every_frames)}
    subject = choose_subject(survey)
    track = _Following(finder, survey, subject).through(video)
    return fill(track, settings, subject.notes)


@dataclass(frozen=True, slots=True)
class _Seen:
    """The faces of a frame and what each looks like."""

    faces: Faces
    looks: list[_Look]

    @classmethod
    def of(cls, frame: Frame, faces: Faces) -> _Seen:
        return cls(faces, [_look(frame, points) for points in faces.key_points])


# ---------------------------------------------------------------- what a face looks like


class _Look(NamedTuple):
    light: Floats
    """The aligned patch's lightness, zero mean, unit length."""
    colour: Floats
    """Square roots of the patch's colour histogram, unit length."""


def likeness(first: _Look, second: _Look) -> float:
    """How alike two aligned faces are, at most 1.

    The product of the correlation of lightness and the overlap of colours. On 37 real clips it was above 0.58 in 95 %
    of pairs of one person 12 frames apart, and below 0.43 in 99 % of pairs of two people.
    """
    return float(first.light @ second.light) * float(first.colour @ second.colour)


def _look(frame: Frame, key_points: Floats) -> _Look:
    patch = cv2.warpAffine(frame, _similarity(key_points), (_PATCH_PX, _PATCH_PX), flags=cv2.INTER_LINEAR)
    lab = cv2.cvtColor(cv2.GaussianBlur(patch, (3, 3), 0), cv2.COLOR_RGB2LAB)
    # Stronger colours count as the strongest: a face in coloured light would have none otherwise.
    histogram = cv2.calcHist([np.clip(lab, *_COLOURS)], [1, 2], None, [16, 16], [96, 160, 96, 176])
    return _Look(_unit(lab[..., 0].astype(np.float32)), np.sqrt(histogram / histogram.sum()).ravel())


def _unit(light: Floats) -> Floats:
    centred = light.ravel() - light.mean()
    return np.asarray(centred / max(float(np.linalg.norm(centred)), 1e-6), np.float32)


def _similarity(key_points: Floats) -> npt.NDArray[np.float64]:
    """The least-squares shift, scale and turn that bring key points onto the aligned face, as a 2x3 matrix."""
    source, target = key_points.astype(np.float64), _ALIGNED.astype(np.float64) * _PATCH_PX
    middle, aim = source.mean(0), target.mean(0)
    a, b = source - middle, target - aim
    size = max(float((a**2).sum()), 1e-9)
    cos, sin = float((a * b).sum()) / size, float((a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum()) / size
    turn = np.array([[cos, -sin], [sin, cos]])
    return np.column_stack([turn, aim - turn @ middle])


def _mix(old: _Look, new: _Look) -> _Look:
    """A memory that follows slow change: turning heads, drifting light."""
    light = (1 - _MEMORY) * old.light + _MEMORY * new.light
    colour = (1 - _MEMORY) * old.colour + _MEMORY * new.colour
    return _Look(light / np.maximum(np.linalg.norm(light), 1e-6), colour / np.linalg.norm(colour))


# ---------------------------------------------------------------- who the subject is


@dataclass(slots=True)
class _Person:
    """One person's sightings in the survey."""

    steps: list[int] = field(default_factory=list)
    faces: list[int] = field(default_factory=list)
    boxes: list[Floats] = field(default_factory=list)
    looks: list[_Look] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    """Sightings of one kind look alike."""

    def add(self, step: int, face: int, box: Floats, look: _Look) -> None:
        recent = zip(self.looks[-_LOOKS:], self.kinds[-_LOOKS:], strict=True)
        alike, kind = max(((likeness(known, look), kind) for known, kind in recent), default=(0.0, 0))
        self.kinds.append(kind if alike >= _AGAIN_LIKENESS else len(self.kinds))
        self.steps.append(step)
        self.faces.append(face)
        self.boxes.append(box)
        self.looks.append(look)

    def affinity(self, step: int, box: Floats, look: _Look) -> float:
        """0 if the sighting cannot be this person, else more for a nearer and more similar one.

        A face nearby that looks different may be the same person with the head turned: it is taken if nothing else
        claims it. It may as well be someone who hides the person: `follow` trusts it only if it comes to it frame by
        frame, unless it is seen as often as the person's other looks.
        """
        last = self.boxes[-1]
        if not 0.5 < _size(box) / _size(last) < 2:
            return 0.0
        alike = self._alike(look)
        if alike >= _LINK_LIKENESS:
            pace = 2 * _size(last) * (step - self.steps[-1])
            return alike * float(np.exp(-_distance(box, last) / pace))
        return max(0.05 * (1 - _distance(box, last) / _size(last)), 0.0)

    def _alike(self, look: _Look) -> float:
        known = [look for look, sure in zip(self.looks, self.sure(), strict=True) if sure]
        return max(likeness(one, look) for one in known[-_LOOKS:])

    def sure(self) -> list[bool]:
        """Which sightings are surely this person: of the kind seen most, and of kinds seen more than half as often."""
        seen = Counter(self.kinds)
        enough = min(max(seen.values()) // 2 + 1, _OFTEN)
        return [seen[kind] >= enough for kind in self.kinds]

    def weight(self) -> float:
        """Seen for long, large and in one place; a face that never moves at all is a picture on the wall."""
        steps = list(zip(self.boxes, self.boxes[1:], strict=False))
        travels = [_distance(new, old) / _size(old) for old, new in steps]
        still = bool(steps) and all(
            travel + abs(_size(new) / _size(old) - 1) < _STILL
            for travel, (old, new) in zip(travels, steps, strict=True)
        )
        total = sum(_size(box) for box in self.boxes)
        return total * (_STILL_WEIGHT if still else 1.0) / (1 + (sum(travels) / len(travels) if travels else 0.0))


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom to follow."""

    anchors: dict[int, int]
    """Which face of a surveyed frame is surely the subject."""
    start: tuple[int, int]
    """The first frame and face that may be the subject: the first anchor, or a sighting before it that is not sure."""
    others: list[_Look]
    """What people look like who were in view together with the subject."""
    notes: list[str]
    """What a reader should know of the choice."""


def choose_subject(survey: Mapping[int, _Seen]) -> Subject:
    """Links the faces of a survey into people and chooses one.

    Raises:
        FaceError: no frame shows a face.
    """
    people: list[_Person] = []
    for step, seen in enumerate(survey.values()):
        active = [person for person in people if step - person.steps[-1] <= _PATIENCE]
        boxes, looks = seen.faces.boxes, seen.looks
        affinity = np.zeros((len(active), len(boxes)))
        new = set(range(len(boxes)))
        for row, person in enumerate(active):
            affinity[row] = [person.affinity(step, box, look) for box, look in zip(boxes, looks, strict=True)]
        for row, face in zip(*linear_sum_assignment(-affinity), strict=True):
            if affinity[row, face] > 0:
                active[row].add(step, int(face), boxes[face], looks[face])
                new.remove(int(face))
        for face in sorted(face for face in new if seen.faces.scores[face] >= _CERTAIN):
            people.append(_Person())
            people[-1].add(step, face, boxes[face], looks[face])
    if not people:
        raise FaceError(
            f"a video must show a face, found none in {len(survey)} frames spread over it. "
            "Check that the face is upright, in view and at least 20 px wide."
        )
    ranked = sorted(people, key=lambda person: -person.weight())
    subject = ranked[0]
    notes = [
        f"another face was seen almost as large and long ({len(rival.steps)} of {len(survey)} looks): "
        "check that the right person was followed"
        for rival in ranked[1:2]
        if rival.weight() > _RIVAL * subject.weight()
    ]
    indices = list(survey)
    sightings = zip(subject.steps, subject.faces, subject.sure(), strict=True)
    anchors = {indices[step]: face for step, face, sure in sightings if sure}
    beside = [person for person in ranked[1:] if set(person.steps) & set(subject.steps)]
    start = indices[subject.steps[0]], subject.faces[0]
    return Subject(anchors, start, [look for person in beside for look in person.looks[-_LOOKS:]], notes)


# ---------------------------------------------------------------- frame by frame


class _Following:
    """Walks through a video once, with the subject's place and look in mind."""

    def __init__(self, finder: Finder, survey: Mapping[int, _Seen], subject: Subject) -> None:
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

    def _search(self, index: int, frame: Frame) -> tuple[_Seen, int | None]:
        if index in self.survey:
            seen = self.survey[index]
            if self.start is not None and index == self.start[0]:
                return seen, self.start[1]
            return seen, self.anchors[index] if index in self.anchors else self._pick(seen)
        if self.box is not None:
            self.windows += 1
            seen = _Seen.of(frame, self.finder.find_near(frame, self._expected()))
            face = self._pick(seen)
            if face is not None:
                return seen, face
        self.whole_frames += 1
        seen = _Seen.of(frame, self.finder.find(frame))
        return seen, self._pick(seen)

    def _expected(self) -> Floats:
        assert self.box is not None
        shift = self.velocity * min(self.missed + 1, 3)
        return self.box + np.tile(shift, 2)

    def _pick(self, seen: _Seen) -> int | None:
        """The face that is the subject, if any is."""
        best, place = 0.0, None
        for face, (box, look) in enumerate(zip(seen.faces.boxes, seen.looks, strict=True)):
            alike = self._alike(look)
            if any(likeness(other, look) > alike for other in self.others):
                continue
            if self.box is not None and self.missed == 0:
                expected = self._expected()
                near = overlap(box, expected)
                passes = near > _NEAR_OVERLAP and 0.67 < _size(box) / _size(expected) < 1.5 and alike > _NEAR_LIKENESS
            else:
                last = self.first_box if self.box is None else self.box
                reach = 3.0 if self.box is None else 0.5 + 0.25 * self.missed
                near = 1 - _distance(box, last) / (reach * _size(last))
                passes = near > 0 and 0.5 < _size(box) / _size(last) < 2 and alike > _AGAIN_LIKENESS
            if passes and near + alike > best:
                best, place = near + alike, face
        return place

    def _alike(self, look: _Look) -> float:
        """To the memory of the face; once it is lost, also to how it looked at any time it was sure."""
        known = [self.look] if self.missed == 0 else [self.look, *self.sure_looks]
        return max(likeness(memory, look) for memory in known)

    def _accept(self, box: Floats, look: _Look) -> None:
        if self.box is not None and self.missed == 0:
            self.velocity = 0.5 * self.velocity + 0.5 * (_centre(box) - _centre(self.box))
        else:
            self.velocity = np.zeros(2, np.float32)
        self.look = _mix(self.look, look)
        self.box, self.missed = box, 0


def overlap(first: Floats, second: Floats) -> float:
    """Intersection over union of two boxes."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = float(width * height)
    return both / (_size(first) ** 2 + _size(second) ** 2 - both)


def _size(box: Floats) -> float:
    """Root of the area, px."""
    return float(np.sqrt(max(float((box[2] - box[0]) * (box[3] - box[1])), 1e-6)))


def _centre(box: Floats) -> Floats:
    return np.asarray((box[:2] + box[2:]) / 2, np.float32)


def _distance(first: Floats, second: Floats) -> float:
    return float(np.linalg.norm(_centre(first) - _centre(second)))


# ---------------------------------------------------------------- gaps and jitter


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
                f"{last - first + 1} (frames {first}-{last} of {count}). Trim the recording (start and end columns of "
                f"the labels) or set --max-gap {last - first + 1}."
            )
    share = found.size / count
    if share < settings.min_detected:
        lower = int(100 * share)  # never rounded up to what was asked for
        raise FaceError(
            f"the face must be seen in at least {settings.min_detected:.0%} of the frames, got {lower}% "
            f"({found.size} of {count}). Trim the recording or set --min-detected {max(lower, 1) / 100:.2f}."
        )
    if share == 1:
        return _with(track, track.boxes, track.landmarks, notes)
    below = np.searchsorted(found, np.arange(count), side="right") - 1
    before = found[np.clip(below, 0, None)]
    after = found[np.clip(np.searchsorted(found, np.arange(count)), None, found.size - 1)]
    span = np.maximum(after - before, 1)
    part = np.clip((np.arange(count) - before) / span, 0, 1).astype(np.float32)

    def between(values: Floats) -> Floats:
        weight = part.reshape(-1, *[1] * (values.ndim - 1))
        return np.asarray((1 - weight) * values[before] + weight * values[after], np.float32)

    return _with(track, between(track.boxes), between(track.landmarks), notes)


def _with(track: Track, boxes: Floats, landmarks: Floats, notes: Sequence[str]) -> Track:
    return Track(
        boxes,
        landmarks,
        track.key_points,
        track.found,
        track.whole_frames,
        track.windows,
        track.faces_most,
        (*track.notes, *notes),
    )


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
