"""qafe/faces/quality.py: known light, known blur, known head poses."""

import math

import cv2
import numpy as np
import pytest

from qafe.faces.quality import GENERIC_FACE, Meter, brightness, clipped_pixels, head_pose, sharpness

SIZE_PX = (720, 1280)


def rotation(pitch: float, yaw: float, roll: float) -> np.ndarray:
    """The documented convention, written out."""
    p, y, r = np.radians([-pitch, -yaw, roll])
    around_x = np.array([[1, 0, 0], [0, np.cos(p), -np.sin(p)], [0, np.sin(p), np.cos(p)]])
    around_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    around_z = np.array([[np.cos(r), -np.sin(r), 0], [np.sin(r), np.cos(r), 0], [0, 0, 1]])
    return around_z @ around_y @ around_x


def project(
    pitch: float = 0,
    yaw: float = 0,
    roll: float = 0,
    *,
    shift_mm: tuple[float, float, float] = (0, 0, 700),
    size_px: tuple[int, int] = SIZE_PX,
) -> np.ndarray:
    seen = GENERIC_FACE @ rotation(pitch, yaw, roll).T + shift_mm
    centre = (np.array(size_px[::-1]) - 1) / 2
    return seen[:, :2] / seen[:, 2:] * max(size_px) + centre


def checkers(side: int = 256, cell: int = 8) -> np.ndarray:
    rows, columns = np.indices((side, side)) // cell
    return np.repeat((((rows + columns) % 2) * 160 + 40).astype(np.uint8)[..., None], 3, axis=2)


def test_blur_lowers_sharpness() -> None:
    sharp = checkers()
    values = [sharpness(cv2.GaussianBlur(sharp, (0, 0), sigma)) for sigma in (0.5, 1, 2, 4)]
    assert sharpness(sharp) > values[0]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.05 * values[0]
    assert sharpness(np.full((256, 256, 3), 90, np.uint8)) == 0


def test_sharpness_of_a_known_picture() -> None:
    line = np.zeros((256, 256, 3), np.uint8)
    line[:, 128] = 100
    columns = np.zeros(256)
    columns[127:130] = [100, -200, 100]
    assert sharpness(line) == pytest.approx(columns.var(), rel=1e-6)


def test_an_enlarged_small_face_is_less_sharp() -> None:
    small = cv2.resize(checkers(), (64, 64), interpolation=cv2.INTER_AREA)
    assert sharpness(small) < 0.5 * sharpness(checkers())
    assert np.isfinite(sharpness(np.zeros((31, 47, 3), np.uint8)))


def test_brightness_is_luma_of_rgb() -> None:
    crop = np.zeros((64, 64, 3), np.uint8)
    crop[..., 0] = 200
    assert brightness(crop) == pytest.approx(0.299 * 200, abs=1)
    assert brightness(np.full((64, 64, 3), 137, np.uint8)) == 137


def test_clipped_pixels() -> None:
    crop = np.full((10, 10, 3), 100, np.uint8)
    crop[:2], crop[2:5] = 3, 255
    assert clipped_pixels(crop) == pytest.approx(0.5)
    assert clipped_pixels(np.full((10, 10, 3), 6, np.uint8)) == 0


def test_a_frontal_face_is_zero() -> None:
    np.testing.assert_allclose(head_pose(project(), SIZE_PX), 0, atol=0.01)


def test_the_mean_face_of_arcface_is_nearly_frontal() -> None:
    """InsightFace's alignment template, a mean of many detected faces, was not used to make the generic face."""
    template = np.array(
        [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
    )
    face = template * 3 + [472, 192]
    assert np.abs(head_pose(face, SIZE_PX)).max() < 8


@pytest.mark.parametrize("pitch", [-25, 0, 30])
@pytest.mark.parametrize("yaw", [-50, -15, 0, 35])
@pytest.mark.parametrize("roll", [-40, 0, 20])
def test_known_poses_are_recovered(pitch: float, yaw: float, roll: float) -> None:
    for shift_mm, size_px in (((0, 0, 600), SIZE_PX), ((150, -60, 900), SIZE_PX), ((-40, 90, 500), (1920, 1080))):
        points = project(pitch, yaw, roll, shift_mm=shift_mm, size_px=size_px)
        np.testing.assert_allclose(head_pose(points, size_px), (pitch, yaw, roll), atol=1)


def test_directions_as_a_person_sees_them() -> None:
    straight = project()
    nose, eyes = straight[2], straight[:2]
    _, yaw, _ = head_pose(np.vstack([eyes, nose + np.array([12, 0]), straight[3:]]), SIZE_PX)
    assert yaw > 5, "the nose is right of the middle: turned to the image's right"
    pitch, _, _ = head_pose(np.vstack([eyes, nose - [0, 8], straight[3:]]), SIZE_PX)
    assert pitch > 5, "the nose is nearer to the eyes: looking up"
    _, _, roll = head_pose(straight @ np.array([[0.98, 0.199], [-0.199, 0.98]]) + [120, -60], SIZE_PX)
    assert roll > 5, "turned clockwise in the image (y points down)"


def test_one_pixel_of_noise() -> None:
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(100):
        pose = rng.uniform([-20, -35, -20], [20, 35, 20])
        noisy = project(*pose, shift_mm=(30, 20, 700)) + rng.normal(0, 1, (5, 2))
        errors.append(np.abs(np.subtract(head_pose(noisy, SIZE_PX), pose)))
    assert np.isfinite(errors).all()
    assert np.percentile(errors, 95) < 5
    assert np.max(errors) < 12


@pytest.mark.parametrize(
    "points",
    [
        np.full((5, 2), np.nan),
        np.full((5, 2), 300.0),
        np.array([[0, 0], [np.inf, 0], [1, 1], [0, 2], [2, 2]]),
        np.zeros((4, 2)),
        np.array([[600.0, 300], [620, 300], [900, 700], [100, 20], [640, 90]]),
        np.array([[600.0, 300], [700, 300], [650, 300], [610, 300], [690, 300]]) * [1, 0] + [0, 300],
    ],
)
def test_what_is_no_face_has_no_pose_or_a_finite_one(points: np.ndarray) -> None:
    pose = head_pose(points, SIZE_PX)
    assert len(pose) == 3
    assert all(map(math.isnan, pose)) or np.isfinite(pose).all()
    if points.shape != (5, 2) or not np.isfinite(points).all() or np.ptp(points) == 0 or np.ptp(points) > 700:
        assert all(map(math.isnan, pose))


def test_meter_takes_medians_and_ranges() -> None:
    meter = Meter(SIZE_PX)
    for number in range(101):
        crop = np.full((256, 256, 3), 50 + number, np.uint8)
        meter.add(crop, project(yaw=number / 101 * 40 - 20, roll=5) if number % 2 else None)
    summary = meter.summary()
    assert summary["brightness"] == 100
    assert summary["brightness_range"] == pytest.approx(90)
    assert summary["sharpness"] == summary["sharpness_low"] == 0
    assert summary["clipped_pixels"] == 0
    assert summary["yaw_range_deg"] == pytest.approx(35, abs=2)
    assert summary["pitch_range_deg"] == pytest.approx(0, abs=0.5)
    assert summary["roll_range_deg"] == pytest.approx(0, abs=0.5)


def test_one_bad_frame_does_not_make_the_range() -> None:
    meter = Meter(SIZE_PX)
    for number in range(60):
        meter.add(np.full((256, 256, 3), 255 if number == 30 else 120, np.uint8), project(yaw=40 * (number == 30)))
    summary = meter.summary()
    assert summary["brightness_range"] == 0
    assert summary["yaw_range_deg"] < 1


def test_roll_about_upside_down_is_a_small_range() -> None:
    meter = Meter(SIZE_PX)
    for roll in np.linspace(176, 184, 21):
        meter.add(np.zeros((256, 256, 3), np.uint8), project(roll=roll))
    assert meter.summary()["roll_range_deg"] == pytest.approx(7.2, abs=0.2)


def test_nothing_measured_is_nan() -> None:
    assert all(math.isnan(value) for value in Meter(SIZE_PX).summary().values())
    meter = Meter(SIZE_PX)
    meter.add(np.full((256, 256, 3), 9, np.uint8), np.full((5, 2), np.nan))
    assert meter.summary()["brightness"] == 9
    assert math.isnan(meter.summary()["yaw_range_deg"])
