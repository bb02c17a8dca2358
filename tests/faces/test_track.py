"""qafe/faces/track.py: one person through a whole video, whoever else is in view."""

import re
from dataclasses import replace

import numpy as np
import pytest

from qafe.errors import FaceError
from qafe.faces.subject import Seen, choose_subject, likeness, look_at, overlap
from qafe.faces.track import Track, TrackSettings, cut, fill, follow, one_euro
from tests.faces.models import face_models
from tests.faces.scenes import passing_by
from tests.faces.stage import Person, Place, Stage, box_of, texture

LENIENT = TrackSettings(gap_frames=40, min_detected=0.5)


def swaying(index: int) -> Place:
    return 100 + 8 * float(np.sin(index / 7)), 60 + 4 * float(np.cos(index / 11)), 40.0


def subject(seed: int = 1) -> Person:
    return Person(swaying, lambda _: texture(seed))


def walker(seed: int = 2, side: float = 40, start: int = 0, frames: int = 90, y: float = 60) -> Person:
    """Walks from edge to edge, out of the picture before and after."""

    def at(index: int) -> Place | None:
        x = -side + (200 + 2 * side) * (index - start) / frames
        return (x, y, side) if 0 < x < 200 else None

    return Person(at, lambda _: texture(seed))


def off_px(track: Track, person: Person) -> np.ndarray:
    """How far the boxes' corners are from the person's true ones, in each found frame."""
    found = np.flatnonzero(track.found)
    assert found.size, "something must be found"
    true = np.array([person.shown[track.cut_start_frames + int(index)] for index in found])
    return np.asarray(np.abs(track.boxes[found] - true).max(axis=1))


# ---------------------------------------------------------------- whom to follow


def test_one_person() -> None:
    person = subject()
    stage = Stage(120, person)
    track = follow(stage.scene, stage, TrackSettings())
    assert track.found.all()
    assert track.missed() == []
    assert off_px(track, person).max() == 0
    assert track.landmarks.shape == (120, 106, 2)
    assert track.key_points.shape == (120, 5, 2)
    assert track.landmarks.dtype == track.boxes.dtype == track.key_points.dtype == np.float32
    assert track.faces_most == 1
    assert track.notes == ()


def test_how_often_frames_are_searched() -> None:
    stage = Stage(120, subject())
    track = follow(stage.scene, stage, TrackSettings(every_frames=25))
    assert stage.whole == [0, 25, 50, 75, 100, 119]
    assert stage.near == [index for index in range(120) if index not in stage.whole]
    assert (track.whole_frames, track.windows) == (6, 114)
    dense = Stage(30, subject())
    track = follow(dense.scene, dense, TrackSettings(every_frames=1))
    assert (track.whole_frames, track.windows) == (30, 0)


def test_a_missed_frame_is_searched_in_a_window_and_as_a_whole() -> None:
    person = subject()
    hidden = Person(lambda index: None if index in (7, 8) else person.at(index), person.face)
    stage = Stage(20, hidden)
    track = follow(stage.scene, stage, TrackSettings(every_frames=10))
    assert track.missed() == [(7, 8)]
    assert stage.whole == [0, 10, 19, 7, 8]
    assert (track.whole_frames, track.windows) == (5, 17)


@pytest.mark.parametrize("count", [2, 3, 26, 27])
def test_short_videos(count: int) -> None:
    person = subject()
    stage = Stage(count, person)
    track = follow(stage.scene, stage, TrackSettings())
    assert track.found.all()
    assert off_px(track, person).max() == 0


def test_the_subject_appears_late_and_is_followed_from_there() -> None:
    person = Person(lambda index: swaying(index) if 8 <= index < 90 else None, lambda _: texture(1))
    stage = Stage(100, person)
    track = follow(stage.scene, stage, TrackSettings())
    assert (track.cut_start_frames, len(track.found), track.cut_end_frames) == (8, 82, 10)
    assert track.missed() == []
    assert off_px(track, person).max() == 0
    whole = follow(stage.scene, stage, TrackSettings(keep_ends=True))
    assert whole.missed() == [(0, 7), (90, 99)]
    assert (whole.cut_start_frames, whole.cut_end_frames) == (0, 0)
    for values, part in ((whole.boxes, track.boxes), (whole.landmarks, track.landmarks)):
        np.testing.assert_array_equal(values[8:90], part)


@pytest.mark.parametrize("seed", [2, 3, 5])
@pytest.mark.parametrize("side", [30, 40, 52])
def test_a_passer_behind_is_never_taken(seed: int, side: float) -> None:
    person = subject()
    stage = Stage(120, walker(seed, side, 10), person)
    track = follow(stage.scene, stage, TrackSettings())
    assert track.found.all()
    assert off_px(track, person).max() == 0
    assert track.faces_most == 2


@pytest.mark.parametrize("seed", [2, 3, 5])
@pytest.mark.parametrize("side", [30, 40, 52])
def test_a_passer_in_front_makes_a_gap(seed: int, side: float) -> None:
    person = subject()
    stage = Stage(120, person, walker(seed, side, 10))
    track = follow(stage.scene, stage, LENIENT)
    hidden = [index for index, (boxes, _) in stage.found.items() if not (boxes == person.shown[index]).all(1).any()]
    missed = np.flatnonzero(~track.found).tolist()
    assert 5 < len(hidden) < 40
    assert set(missed) >= set(hidden)
    assert len(missed) <= len(hidden) + 2, "a face that comes back half hidden may be left out"
    assert off_px(track, person).max() == 0


def test_a_passer_who_looks_alike_is_told_by_place() -> None:
    person = subject()
    twin = replace(walker(start=10, y=95, side=44), face=lambda _: texture(1, 0.3, 2))
    stage = Stage(120, twin, person)
    track = follow(stage.scene, stage, TrackSettings())
    assert off_px(track, person).max() == 0
    assert track.found.mean() > 0.9


def test_a_still_poster_is_not_chosen() -> None:
    person = Person(lambda index: (140 + 5 * float(np.sin(index / 5)), 60.0, 36.0), lambda _: texture(1))
    poster = Person(lambda _: (50.0, 60.0, 60.0), lambda _: texture(2))
    stage = Stage(100, poster, person)
    track = follow(stage.scene, stage, TrackSettings())
    assert track.found.all()
    assert off_px(track, person).max() == 0


def test_a_still_face_alone_is_followed() -> None:
    poster = Person(lambda _: (50.0, 60.0, 60.0), lambda _: texture(2))
    stage = Stage(60, poster)
    assert follow(stage.scene, stage, TrackSettings()).found.all()


def test_a_large_passer_seen_briefly_is_not_chosen() -> None:
    person = subject()
    stage = Stage(150, person, walker(2, 70, 30, 45, y=30))
    track = follow(stage.scene, stage, LENIENT)
    assert off_px(track, person).max() == 0
    assert track.notes == ()


def test_two_alike_in_size_and_time_are_noted() -> None:
    left = Person(lambda index: (60 + 3 * float(np.sin(index / 5)), 60.0, 40.0), lambda _: texture(1))
    right = Person(lambda index: (140 + 3 * float(np.cos(index / 5)), 60.0, 37.0), lambda _: texture(2))
    stage = Stage(100, left, right)
    track = follow(stage.scene, stage, TrackSettings())
    assert off_px(track, left).max() == 0
    assert len(track.notes) == 1
    assert "another face was seen almost as large and long (5 of 5 looks)" in track.notes[0]


def test_a_small_bystander_is_not_noted() -> None:
    stage = Stage(100, subject(), Person(lambda index: (30.0, 30 + index / 20, 16.0), lambda _: texture(2)))
    track = follow(stage.scene, stage, TrackSettings())
    assert track.notes == ()
    assert track.faces_most == 2


@pytest.mark.parametrize("part", [0.5, 0.8])
def test_a_head_turns_between_looks(part: float) -> None:
    """At the next look the face is unlike the one known; frame by frame it changes little."""

    def face(index: int) -> np.ndarray:
        return texture(1, part * float(np.clip((index - 30) / 40, 0, 1)), 4)

    person = Person(swaying, face)
    stage = Stage(150, person)
    track = follow(stage.scene, stage, TrackSettings(every_frames=50))
    assert off_px(track, person).max() == 0
    assert track.found.all()


def test_a_head_turns_away_and_back_beside_another() -> None:
    def face(index: int) -> np.ndarray:
        return texture(1, 0.7 * float(np.sin(np.pi * np.clip((index - 20) / 100, 0, 1))), 4)

    person = Person(swaying, face)
    other = Person(lambda index: (30 + 2 * float(np.sin(index / 9)), 60.0, 32.0), lambda _: texture(2))
    stage = Stage(150, other, person)
    track = follow(stage.scene, stage, TrackSettings())
    assert track.found.all()
    assert off_px(track, person).max() == 0


@pytest.mark.parametrize("light", [(1.2, 0.1, 0.1), (0.1, 0.1, 1.2), (0.1, 1.1, 0.1), (1.2, 1.0, 0.1)])
def test_faces_under_coloured_light(light: tuple[float, float, float]) -> None:
    """Most of their colours lie outside the histogram."""

    def lit(seed: int) -> np.ndarray:
        return np.asarray(texture(seed) * np.array(light))

    person = replace(subject(), face=lambda _: lit(1))
    stage = Stage(80, replace(walker(start=5), face=lambda _: lit(2)), person)
    track = follow(stage.scene, stage, TrackSettings())
    assert track.found.all()
    assert off_px(track, person).max() == 0


def test_a_turned_head_at_the_start_is_followed() -> None:
    """Its look is like none of the later ones; it leads to them frame by frame."""
    person = Person(swaying, lambda index: texture(4, min(index / 22, 1.0), 1))
    stage = Stage(120, person)
    track = follow(stage.scene, stage, TrackSettings())
    assert track.found.all()
    assert off_px(track, person).max() == 0


def test_another_in_the_subjects_place_at_the_start() -> None:
    """Someone stands before the subject when the recording starts, and walks away."""
    person = subject()
    other = Person(
        lambda index: (100.0 + max(index - 5, 0) * 6, 62.0, 42.0) if index < 20 else None, lambda _: texture(2)
    )
    stage = Stage(120, person, other)
    track = follow(stage.scene, stage, LENIENT)
    assert off_px(track, person).max() == 0
    assert track.cut_start_frames <= 25
    assert track.found[25 - track.cut_start_frames :].all()


def test_another_in_the_subjects_place_at_the_end() -> None:
    person = subject()
    other = Person(lambda index: (100.0 + index % 3, 60.0, 42.0) if index > 95 else None, lambda _: texture(2))
    stage = Stage(120, person, other)
    track = follow(stage.scene, stage, LENIENT)
    assert (len(track.found), track.cut_end_frames) == (96, 24)
    assert off_px(track, person).max() == 0


@pytest.mark.parametrize("seed", [*range(6), 28, 65, 76])
def test_a_crowd_passes(seed: int) -> None:
    """Up to three people cross, before and behind a face that sways, turns and changes; none is ever taken."""
    rng = np.random.default_rng(seed)
    sway, pace, size = rng.uniform(2, 15), rng.uniform(4, 12), rng.uniform(30, 44)
    person = Person(
        lambda index: (100 + sway * float(np.sin(index / pace)), 60 + 4 * float(np.cos(index / 11)), size),
        lambda index: texture(seed + 1000, 0.4 * abs(float(np.sin(index / 17))), seed + 1500),
    )
    crowd = []
    for number in range(rng.integers(1, 4)):
        start, frames = int(rng.integers(-20, 80)), int(rng.integers(25, 120))
        crowd.append(walker(seed * 10 + number + 20000, rng.uniform(25, 65), start, frames, rng.uniform(40, 80)))
    behind = int(rng.integers(0, len(crowd) + 1))
    stage = Stage(130, *crowd[:behind], person, *crowd[behind:])
    track = follow(stage.scene, stage, TrackSettings(gap_frames=60, min_detected=0.3))
    assert off_px(track, person).max() == 0


def test_a_wrong_person_is_taken_back_at_the_next_look() -> None:
    """A double slips into the subject's place between two looks, and the subject has moved."""

    def at(index: int) -> Place:
        return 60.0 if index < 10 else 150.0, 60.0 + index % 3, 40.0

    def double(index: int) -> Place | None:
        return (60.0, 60.0 + index % 3, 40.0) if 10 <= index < 20 else None

    person = Person(at, lambda _: texture(1))
    stage = Stage(61, person, Person(double, lambda _: texture(1, 0.1, 3)))
    track = follow(stage.scene, stage, replace(LENIENT, every_frames=20))
    assert off_px(track, person).max() == 0
    assert track.missed() == [(1, 19)], "nothing since the look before is trusted; from frame 20 on all is right"


def test_weak_detections_continue_but_never_start() -> None:
    person = replace(subject(), score=lambda index: 0.9 if index < 60 else 0.35)
    ghost = replace(walker(start=-40, frames=200, side=60), score=lambda _: 0.45)
    stage = Stage(120, ghost, person)
    track = follow(stage.scene, stage, TrackSettings())
    assert track.found.all()
    assert off_px(track, person).max() == 0
    weak = Stage(120, replace(subject(), score=lambda _: 0.49))
    with pytest.raises(FaceError, match="a video must show a face"):
        follow(weak.scene, weak, TrackSettings())


def test_no_face() -> None:
    stage = Stage(60)
    with pytest.raises(FaceError) as caught:
        follow(stage.scene, stage, TrackSettings(every_frames=25))
    assert str(caught.value) == (
        "a video must show a face, found none in 5 frames spread over it. "
        "Check that the face is upright, in view and at least 20 px wide."
    )


@pytest.mark.parametrize("first", range(26, 34))
def test_a_face_between_the_looks_of_the_survey_is_found(first: int) -> None:
    person = Person(lambda index: swaying(index) if first <= index < first + 16 else None, lambda _: texture(1))
    stage = Stage(75, person)
    track = follow(stage.scene, stage, TrackSettings())
    assert (track.cut_start_frames, len(track.found), track.cut_end_frames) == (first, 16, 59 - first)
    assert off_px(track, person).max() == 0


def test_choosing_alone() -> None:
    """The survey links people whatever the order of the faces in each frame."""
    person, other = subject(), Person(lambda index: (30.0, 60 + index % 5, 30.0), lambda _: texture(2))
    stage = Stage(60, other, person)
    survey = {}
    for index, frame in stage.scene.frames(10):
        faces = stage.find(frame)
        order = [1, 0] if index % 20 else [0, 1]
        turned = faces._replace(
            boxes=faces.boxes[order], scores=faces.scores[order], key_points=faces.key_points[order]
        )
        survey[index] = seen_of(frame, turned)
    chosen = choose_subject(survey)
    assert chosen.anchors == {0: 1, 10: 0, 20: 1, 30: 0, 40: 1, 50: 0, 59: 0}
    assert len(chosen.others) == 5


def seen_of(frame, faces):  # type: ignore[no-untyped-def]
    return Seen.of(frame, faces)


def test_likeness() -> None:
    def look(seed: int, place: Place):  # type: ignore[no-untyped-def]
        stage = Stage(1, Person(lambda _: place, lambda _: texture(seed)))
        frame = stage.scene.drawn[0]
        return look_at(frame, stage.find(frame).key_points[0])

    one = look(1, (100, 60, 40))
    assert likeness(one, one) == pytest.approx(1, abs=1e-5)
    assert likeness(one, look(1, (50, 70, 56))) > 0.85
    assert abs(likeness(one, look(2, (100, 60, 40)))) < 0.4
    black = look_at(
        np.zeros((40, 40, 3), np.uint8), (box_of((20, 20, 30))[:2] + 30 * np.random.rand(5, 2)).astype("f4")
    )
    assert likeness(one, black) == 0


def test_overlap() -> None:
    box = np.array([0, 0, 10, 10], np.float32)
    assert overlap(box, box) == pytest.approx(1)
    assert overlap(box, box + 5) == pytest.approx(25 / 175)
    assert overlap(box, box + 10) == 0


# ---------------------------------------------------------------- gaps


def track_of(found: list[bool], speed_px: float = 2.0) -> Track:
    """A face that moves evenly, with what was measured where it was found."""
    count = len(found)
    there = np.array(found)
    boxes = np.arange(count, dtype=np.float32)[:, None] * speed_px + np.array([10, 20, 50, 60], np.float32)
    landmarks = np.broadcast_to(boxes[:, None, :2], (count, 106, 2)) + np.arange(106, dtype=np.float32)[:, None]
    points = np.zeros((count, 5, 2), np.float32)
    for values in (boxes, landmarks, points):
        values[~there] = np.nan
    return Track(boxes, landmarks.astype(np.float32), points, there, 1, 2, 1, ("before",))


def test_gaps_lie_on_a_straight_line() -> None:
    found = [True, True, False, False, False, True, False, True]
    filled = fill(track_of(found), LENIENT, ["after"])
    whole = track_of([True] * 8)
    np.testing.assert_allclose(filled.boxes, whole.boxes, atol=1e-4)
    np.testing.assert_allclose(filled.landmarks, whole.landmarks, atol=1e-4)
    assert np.isnan(filled.key_points[2:5]).all()
    assert filled.missed() == [(2, 4), (6, 6)]
    assert filled.notes == ("before", "after")
    assert filled.found.tolist() == found


def test_gaps_at_the_ends_are_the_nearest_frame() -> None:
    filled = fill(track_of([False, False, True, True, False]), replace(LENIENT, min_detected=0.4))
    assert filled.missed() == [(0, 1), (4, 4)]
    np.testing.assert_array_equal(filled.boxes[:2], filled.boxes[[2, 2]])
    np.testing.assert_array_equal(filled.landmarks[:2], filled.landmarks[[2, 2]])
    np.testing.assert_array_equal(filled.boxes[4], filled.boxes[3])


@pytest.mark.parametrize(("start", "end"), [(40, 0), (0, 40), (40, 1), (1, 70)])
def test_ends_without_the_face_are_cut(start: int, end: int) -> None:
    given = track_of([False] * start + [True] * 30 + [False] * 2 + [True] * 10 + [False] * end)
    part = fill(cut(given, TrackSettings()), TrackSettings())
    assert (part.cut_start_frames, len(part.found), part.cut_end_frames) == (start, 42, end)
    assert part.missed() == [(30, 31)], "counted from the first frame that is kept"
    np.testing.assert_allclose(part.boxes, track_of([True] * len(given.found)).boxes[start : start + 42], atol=1e-4)
    assert len(part.landmarks) == len(part.key_points) == 42
    assert np.isfinite(part.landmarks).all()


def test_a_gap_between_the_ends_is_told_by_the_recordings_numbers() -> None:
    given = track_of([False] * 50 + [True] * 20 + [False] * 13 + [True] * 20 + [False] * 7)
    with pytest.raises(FaceError, match=r"got 13 \(frames 70-82 of 110\)"):
        fill(cut(given, TrackSettings()), TrackSettings())


def test_too_little_between_the_ends() -> None:
    assert len(cut(track_of([False] * 50 + [True] * 16), TrackSettings()).found) == 16
    with pytest.raises(FaceError) as caught:
        cut(track_of([False] * 50 + [True] * 15 + [False]), TrackSettings())
    assert str(caught.value) == (
        "from the first to the last frame with the face there must be at least 16 frames, got 15 (frames 50-64 of 66). "
        "Look at the recording; --keep-ends cuts nothing."
    )
    for found in ([False] * 12 + [True] * 15 + [False] * 3, [True] * 3, [False] * 12 + [True]):
        given = track_of(found)
        assert cut(given, TrackSettings()) is given, "a short recording is filled in as ever"


def test_found_frames_are_not_touched() -> None:
    given = track_of([True, False, True, True, False])
    given.landmarks[2] += 0.123
    filled = fill(given, LENIENT)
    np.testing.assert_array_equal(filled.landmarks[given.found], given.landmarks[given.found])
    assert fill(track_of([True] * 3), LENIENT).missed() == []


def test_a_gap_over_the_limit() -> None:
    found = [True] * 5 + [False] * 4 + [True] * 20
    assert fill(track_of(found), TrackSettings(gap_frames=4)).missed() == [(5, 8)]
    with pytest.raises(FaceError) as caught:
        fill(track_of(found), TrackSettings(gap_frames=3))
    assert str(caught.value) == (
        "the face may be out of sight for at most 3 frames in a row, got 4 (frames 5-8 of 29). Trim the recording "
        "(start and end columns of the labels) or set --max-gap 4."
    )


def test_too_few_frames_with_the_face() -> None:
    found = [True, False, False] * 20
    with pytest.raises(FaceError, match=r"at least 80% of the frames, got 33% \(20 of 60\).*--min-detected 0\.33\."):
        fill(track_of(found), TrackSettings())
    fill(track_of(found), TrackSettings(min_detected=0.33))


@pytest.mark.parametrize("missing", [41, 67, 86])
def test_the_advice_on_too_few_frames_helps(missing: int) -> None:
    """A share is told rounded down: 79.9 % is not 80 %."""
    found = [index % 2 == 0 or index > 2 * missing for index in range(203)]
    with pytest.raises(FaceError) as caught:
        fill(track_of(found), TrackSettings(min_detected=0.8))
    told = re.search(r"got (\d+)%.*--min-detected ([\d.]+)\.$", str(caught.value))
    assert told is not None
    assert int(told[1]) < 80
    fill(track_of(found), TrackSettings(min_detected=float(told[2])))


def test_nothing_found() -> None:
    with pytest.raises(FaceError, match="must show a face that can be followed, and none could"):
        fill(track_of([False, False]), LENIENT)


def test_a_filled_gap_of_a_whole_run() -> None:
    person = Person(lambda index: None if 40 <= index < 46 else (60.0 + index, 60.0, 40.0), lambda _: texture(1))
    stage = Stage(100, person)
    track = follow(stage.scene, stage, TrackSettings())
    assert track.missed() == [(40, 45)]
    true = np.array([box_of((60.0 + index, 60.0, 40.0)) for index in range(100)])
    np.testing.assert_allclose(track.boxes, true, atol=1e-3)
    np.testing.assert_allclose(track.landmarks, [stage.landmarks(stage.scene.drawn[0], box) for box in true], atol=1e-3)


# ---------------------------------------------------------------- jitter


def test_one_euro_by_hand() -> None:
    """One point, 10 frames a second, a face of 100 px; it jumps by 5 px along x."""
    given = np.zeros((3, 1, 2), np.float32)
    given[1:, 0, 0] = 5
    smooth = one_euro(given, 10, 100, min_cutoff_hz=1, beta=8, speed_hz=1)
    keep_speed = 1 / (1 + 10 / (2 * np.pi))
    speed = keep_speed * 0.5  # 5 px are half a face size a second
    keep = 1 / (1 + 10 / (2 * np.pi * (1 + 8 * speed)))
    first = keep * 5
    assert first == pytest.approx(3.0755, abs=1e-4)
    np.testing.assert_allclose(smooth[1, 0], [first, 0], atol=1e-4)
    speed *= 1 - keep_speed
    keep = 1 / (1 + 10 / (2 * np.pi * (1 + 8 * speed)))
    np.testing.assert_allclose(smooth[2, 0], [first + keep * (5 - first), 0], atol=1e-4)


def test_one_euro_leaves_rest_alone() -> None:
    given = np.tile(np.random.default_rng(0).uniform(0, 500, (1, 106, 2)).astype(np.float32), (50, 1, 1))
    np.testing.assert_array_equal(one_euro(given, 30, 120), given)
    np.testing.assert_array_equal(one_euro(given[:1], 30, 120), given[:1])


def test_one_euro_calms_a_still_face() -> None:
    rng = np.random.default_rng(0)
    given = rng.uniform(0, 100, (1, 106, 2)) + rng.normal(0, 0.4, (300, 106, 2))
    smooth = one_euro(given.astype(np.float32), 30, 120)
    assert smooth[60:].var(axis=0).mean() < 0.25 * given[60:].var(axis=0).mean()


@pytest.mark.parametrize("hz", [25.0, 60.0])
def test_one_euro_follows_a_fast_move(hz: float) -> None:
    """Half a face size in 0.2 s, as a jaw that drops: never more than 15 % of the way behind, and soon there."""
    time_s = np.arange(round(2 * hz)) / hz
    place = 60 * np.clip((time_s - 1) / 0.2, 0, 1)
    given = np.zeros((len(place), 1, 2), np.float32)
    given[:, 0, 1] = place
    behind = place - one_euro(given, hz, 120)[:, 0, 1]
    assert behind.max() < 9
    assert np.abs(behind[time_s > 1.5]).max() < 1
    assert behind.min() > -0.01, "no overshoot"


def test_one_euro_knows_no_distance() -> None:
    rng = np.random.default_rng(3)
    given = np.cumsum(rng.normal(0, 1, (80, 5, 2)), axis=0).astype(np.float32)
    np.testing.assert_allclose(one_euro(2 * given, 30, 240), 2 * one_euro(given, 30, 120), atol=1e-3)


def test_one_euro_changes_nothing_given() -> None:
    given = np.random.default_rng(0).normal(0, 1, (5, 2, 2)).astype(np.float32)
    before = given.copy()
    one_euro(given, 30, 100)
    np.testing.assert_array_equal(given, before)


# ---------------------------------------------------------------- real faces, real models


@pytest.mark.parametrize("in_front", [False, True], ids=["behind", "in_front"])
@pytest.mark.parametrize(("subject", "passer", "scale"), [(0, 3, 1.0), (4, 1, 1.3), (2, 5, 1.0), (5, 0, 1.3)])
def test_real_people_pass(subject: int, passer: int, scale: float, in_front: bool) -> None:
    models = face_models()
    scene, true, _ = passing_by(subject, passer, 50, in_front=in_front, passer_scale=scale)
    track = follow(scene, models, LENIENT)
    off = np.linalg.norm((track.boxes - true).reshape(-1, 2, 2).mean(axis=1), axis=1)
    assert off[track.found].max() < 25
    if in_front:
        assert track.found.mean() > 0.6
    else:
        assert track.found.all()
