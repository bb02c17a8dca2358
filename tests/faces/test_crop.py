"""qafe/faces/crop.py: what is cut out, and that landmarks stay on the pixels that they mark."""

import numpy as np
import pytest

from qafe.faces.crop import SIZE_PX, crop, crop_boxes
from qafe.faces.subject import Floats
from qafe.faces.video import Video
from tests.data.cohort import real_faces
from tests.faces.models import face_models

pytest.importorskip("albumentations", reason="the extra faces is not installed")

HEIGHT, WIDTH = 120, 200


def boxes(*rows: tuple[float, float, float, float]) -> Floats:
    return np.array(rows, np.float32)


# ---------------------------------------------------------------- what is cut out


def test_per_frame_rounds_and_stays_in_the_frame() -> None:
    given = boxes((10.4, 20.6, 50.5, 60.49), (-7, -0.6, 30.2, 40), (150, 90, 230.7, 121), (-30, 5, -10, 25))
    cut = crop_boxes("per_frame", given, HEIGHT, WIDTH)
    assert cut.dtype == np.int64
    assert cut.tolist() == [[10, 21, 50, 60], [0, 0, 30, 40], [150, 90, 200, 120], [0, 5, 1, 25]]


def test_per_video_is_one_square_around_all_boxes() -> None:
    given = boxes((80, 30, 110, 70), (86, 40, 120, 78))
    cut = crop_boxes("per_video", given, HEIGHT, WIDTH)
    assert (cut == cut[0]).all()
    left, top, right, bottom = cut[0]
    assert right - left == bottom - top == round(48 * 1.1)
    assert (cut[:, :2] <= given[:, :2]).all()
    assert (cut[:, 2:] >= given[:, 2:]).all()
    assert abs((left + right) / 2 - 100) <= 1
    assert abs((top + bottom) / 2 - 54) <= 1


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 0, 40, 40), (0, 0, 44, 44)),
        ((160, 80, 200, 120), (156, 76, 200, 120)),
        ((-10, 50, 30, 90), (0, 48, 44, 92)),
    ],
)
def test_per_video_moves_into_the_frame(
    box: tuple[float, float, float, float], expected: tuple[int, int, int, int]
) -> None:
    cut = crop_boxes("per_video", boxes(box), HEIGHT, WIDTH)
    assert tuple(cut[0]) == expected


def test_borders_are_black_only_where_a_square_cannot_fit() -> None:
    cut = crop_boxes("per_video", boxes((0, 0, 130, 118)), HEIGHT, WIDTH)
    left, top, right, bottom = (int(value) for value in cut[0])
    assert right - left == bottom - top == 143
    assert (left, top, bottom) == (0, -12, 131), "moved in along the width, centred along the height"
    white = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    frame = crop([white], np.zeros((1, 106, 2), np.float32), cut).frames[0]
    shown = np.flatnonzero(frame[:, 128, 0] > 128)
    scale = SIZE_PX / 143
    assert abs(shown[0] - 12 * scale) <= 1
    assert abs(shown[-1] + 1 - (SIZE_PX - 11 * scale)) <= 1
    assert (frame[128, :, 0] == 255).all()


def test_per_video_contains_every_box_of_a_long_walk() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        corner = rng.uniform([0, 0], [WIDTH - 60, HEIGHT - 60], (20, 2))
        given = np.concatenate([corner, corner + rng.uniform(12, 60, (20, 2))], axis=1).astype(np.float32)
        cut = crop_boxes("per_video", given, HEIGHT, WIDTH)[0]
        assert (cut[:2] <= given[:, :2].min(0)).all()
        assert (cut[2:] >= given[:, 2:].max(0)).all()
        if cut[2] - cut[0] <= HEIGHT:
            assert (cut >= 0).all()
            assert cut[2] <= WIDTH
            assert cut[3] <= HEIGHT


# ---------------------------------------------------------------- pixels and landmarks


def dotted(points: Floats) -> np.ndarray:
    """Frames with a bright spot of 3x3 px at the first landmark of each."""
    frames = np.zeros((len(points), HEIGHT, WIDTH, 3), np.uint8)
    for frame, (x, y) in zip(frames, points[:, 0].astype(int), strict=True):
        frame[y - 1 : y + 2, x - 1 : x + 2] = (250, 120, 30)
    return frames


def spot(frame: np.ndarray) -> tuple[float, float]:
    y, x = np.mgrid[: frame.shape[0], : frame.shape[1]]
    weight = frame[..., 0].astype(float)
    return float((x * weight).sum() / weight.sum()), float((y * weight).sum() / weight.sum())


@pytest.mark.parametrize("kind", ["per_frame", "per_video"])
def test_landmarks_and_pixels_move_together(kind: str) -> None:
    rng = np.random.default_rng(1)
    centres = np.column_stack([np.linspace(60, 140, 6), np.linspace(50, 80, 6)]).astype(np.float32)
    half = np.array([30, 40])
    given = np.concatenate([centres - half, centres + half], axis=1).astype(np.float32)
    points = np.rint(centres[:, None] + rng.uniform(-25, 25, (6, 106, 2))).astype(np.float32)
    cut = crop_boxes("per_frame" if kind == "per_frame" else "per_video", given, HEIGHT, WIDTH)
    result = crop(list(dotted(points)), points, cut)
    assert result.frames.shape == (6, SIZE_PX, SIZE_PX, 3)
    assert result.landmarks.shape == (6, 106, 2)
    assert result.landmarks.dtype == np.float32
    assert result.clipped == 0
    for frame, (x, y), (left, top, right, bottom) in zip(result.frames, result.landmarks[:, 0], cut, strict=True):
        scale = SIZE_PX / np.array([right - left, bottom - top])
        # A resize keeps the corners of pixels in place, a landmark marks the middle of one.
        assert np.abs(np.array(spot(frame)) - (x, y)).max() < 0.5 * scale.max() + 0.3
        assert frame[round(float(y)), round(float(x)), 0] > frame[round(float(y)), round(float(x)), 2], "RGB"


def test_hand_computed_landmarks() -> None:
    points = np.zeros((1, 106, 2), np.float32)
    points[0, 0], points[0, 1], points[0, 2] = (20, 30), (36, 46), (28.5, 94)
    cut = np.array([[20, 30, 52, 94]])
    result = crop([np.zeros((HEIGHT, WIDTH, 3), np.uint8)], points, cut)
    np.testing.assert_allclose(result.landmarks[0, :3], [[0, 0], [128, 64], [68, 255]], atol=1e-4)


def test_clipped_points_are_counted() -> None:
    points = np.full((2, 106, 2), 60, np.float32)
    points[0, :3] = [(10, 60), (10, 10), (200, 60)]
    points[1, 7] = (60, 81)
    result = crop(list(np.zeros((2, HEIGHT, WIDTH, 3), np.uint8)), points, np.tile([40, 40, 80, 80], (2, 1)))
    assert result.clipped == 4
    np.testing.assert_array_equal(result.landmarks[0, :3], [(0, 128), (0, 0), (255, 128)])
    np.testing.assert_array_equal(result.landmarks[1, 7], (128, 255))


def test_frames_of_mixed_boxes_are_cut_one_by_one_alike() -> None:
    rng = np.random.default_rng(2)
    frames = list(rng.integers(0, 255, (7, HEIGHT, WIDTH, 3), np.uint8))
    points = rng.uniform(40, 90, (7, 106, 2)).astype(np.float32)
    first, second = [20, 10, 100, 90], [-10, -5, 110, 125]
    cut = np.array([first, first, second, first, second, second, second])
    whole = crop(frames, points, cut, 64)
    assert whole.frames.shape == (7, 64, 64, 3)
    for index in range(7):
        one = crop(frames[index : index + 1], points[index : index + 1], cut[index : index + 1], 64)
        np.testing.assert_array_equal(one.frames[0], whole.frames[index])
        np.testing.assert_array_equal(one.landmarks[0], whole.landmarks[index])


def test_given_arrays_are_not_changed() -> None:
    frames, points = np.full((1, HEIGHT, WIDTH, 3), 9, np.uint8), np.full((1, 106, 2), 300, np.float32)
    frames.setflags(write=False)
    points.setflags(write=False)
    crop(list(frames), points, np.array([[0, 0, 50, 50]]))


# ---------------------------------------------------------------- the published crops


@pytest.mark.parametrize("clip", ["P01/real0000s00", "P05/real0023s00", "P09/real0041s00"])
def test_published_landmarks_are_met(clip: str) -> None:
    """A box each frame, the largest face, no tracking: what made the prepared clips."""
    folder, models = real_faces(), face_models()
    published = np.load(folder / "prepared" / "landmarks" / f"{clip}.npy")
    checked = 0
    for index, frame in Video(folder / "raw" / f"{clip}.mp4").frames(every=27):
        found = models.find(frame).boxes
        box = found[np.prod(found[:, 2:] - found[:, :2], axis=1).argmax()][None]
        cut = crop_boxes("per_frame", box, *frame.shape[:2])
        result = crop([frame], models.landmarks(frame, box[0])[None], cut)
        assert np.abs(result.landmarks[0] - published[index]).max() < 0.01
        checked += 1
    assert checked == 6
