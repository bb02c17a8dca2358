"""How well a recording shows the face: sharpness, light and head pose, measured frame by frame."""

from __future__ import annotations

import math

import cv2
import numpy as np
import numpy.typing as npt

SIDE_PX = 256
"""The side of the crops that sharpness is measured on; others are resized to it, so that values compare."""
BLACK, WHITE = 5, 250
"""Luma up to the first, or from the second on, holds no detail any more."""

GENERIC_FACE = np.array(
    [[-31.5, 0.0, 0.0], [31.5, 0.0, 0.0], [0.0, 37.0, -32.0], [-25.0, 71.0, -4.0], [25.0, 71.0, -4.0]]
)
"""Eye centres, nose tip, mouth corners of a frontal face in mm, in the camera's axes: x right in the image,
y down, z away from the camera. The numbers are plain averages of adults, rounded (pupils 63 mm apart, mouth
50 mm wide and 71 mm below the eyes, nose tip 37 mm below and 32 mm before them), and nobody's own."""

_POSE_RESIDUAL_MOST = 0.4
"""Root mean square distance between the points and their fit, as a share of the points' spread."""
_NO_POSE = (math.nan, math.nan, math.nan)


def sharpness(crop: npt.NDArray[np.uint8]) -> float:
    """Variance of the Laplacian of the grey crop at 256 px: low means blurred, or enlarged from a small face.

    Source: Pech-Pacheco et al., ICPR 2000 (LAPV). It grows with contrast too, so compare it within a cohort only.

    Args:
        crop: uint8 RGB [H,W,3].
    """
    grey = _luma(crop)
    if grey.shape != (SIDE_PX, SIDE_PX):
        shrinks = min(grey.shape) >= SIDE_PX
        way = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        grey = np.asarray(cv2.resize(grey, (SIDE_PX, SIDE_PX), interpolation=way), np.uint8)
    return float(np.asarray(cv2.Laplacian(grey, cv2.CV_32F)).var(dtype=np.float64))


def brightness(crop: npt.NDArray[np.uint8]) -> float:
    """Mean luma (Rec. 601) of a uint8 RGB crop [H,W,3], 0-255."""
    return float(_luma(crop).mean())


def clipped_pixels(crop: npt.NDArray[np.uint8]) -> float:
    """Share of the pixels of a uint8 RGB crop [H,W,3] that are black (luma <= 5) or white (luma >= 250), 0-1."""
    grey = _luma(crop)
    return float(((grey <= BLACK) | (grey >= WHITE)).mean())


def head_pose(key_points: npt.NDArray[np.floating], size_px: tuple[int, int]) -> tuple[float, float, float]:
    """Pitch, yaw and roll of a head in degrees; all zero for a face that looks along the camera's axis.

    Pitch is positive when the face looks up, yaw when it turns to the right of the image (the person's own
    left), roll when the head tilts clockwise in the image. Roll is applied last: R = Rz(roll) Ry(-yaw) Rx(-pitch)
    in the axes of `GENERIC_FACE`.

    Both the face and the camera (focal length = the frame's longer side, no distortion) are generic, so a single
    angle may be several degrees off for one person: use the range over a video, not the angle as a measurement.

    Source: perspective-n-point by SQPnP (Terzakis and Lourakis, ECCV 2020), refined by Levenberg-Marquardt.

    Args:
        key_points: [5,2], (x, y) px in the frame: left eye in the image, right eye, nose tip, left mouth corner,
            right mouth corner (SCRFD's order).
        size_px: (height, width) of the frame.
    Returns:
        (pitch, yaw, roll); three NaN where the points are not those of a face, or not finite.
    """
    points = np.asarray(key_points, dtype=np.float64)
    if points.shape != (5, 2) or not np.isfinite(points).all() or min(size_px) < 1:
        return _NO_POSE
    spread_px = float(np.sqrt(((points - points.mean(axis=0)) ** 2).sum(axis=1).mean()))
    if spread_px < 1:
        return _NO_POSE
    height, width = size_px
    camera = np.array([[max(size_px), 0, (width - 1) / 2], [0, max(size_px), (height - 1) / 2], [0, 0, 1]], np.float64)
    best: tuple[float, npt.NDArray[np.float64]] | None = None
    for rotation, shift in _poses(points, camera):
        turned = cv2.Rodrigues(rotation)[0]
        if (GENERIC_FACE @ turned[2] + shift[2] <= 0).any():
            continue
        drawn = cv2.projectPoints(GENERIC_FACE, rotation, shift, camera, None)[0].reshape(5, 2)
        residual = float(np.sqrt(((drawn - points) ** 2).sum(axis=1).mean())) / spread_px
        if np.isfinite(residual) and (best is None or residual < best[0]):
            best = residual, np.asarray(turned, np.float64)
    if best is None or best[0] > _POSE_RESIDUAL_MOST:
        return _NO_POSE
    matrix = best[1]
    pitch = -math.atan2(matrix[2, 1], matrix[2, 2])
    yaw = math.asin(min(1.0, max(-1.0, matrix[2, 0])))
    roll = math.atan2(matrix[1, 0], matrix[0, 0])
    return math.degrees(pitch), math.degrees(yaw), math.degrees(roll)


class Meter:
    """Measures one video frame by frame; keeps a few numbers of each frame and no picture.

    Args:
        size_px: (height, width) of the video's frames, which the key points are in.
    """

    def __init__(self, size_px: tuple[int, int]) -> None:
        self._size_px = size_px
        self._sharpness: list[float] = []
        self._brightness: list[float] = []
        self._clipped: list[float] = []
        self._poses: list[tuple[float, float, float]] = []

    def add(self, crop: npt.NDArray[np.uint8], key_points: npt.NDArray[np.floating] | None) -> None:
        """Measures the next frame.

        Args:
            crop: uint8 RGB [H,W,3].
            key_points: [5,2], (x, y) px in the frame; None where no face was detected.
        """
        self._sharpness.append(sharpness(crop))
        self._brightness.append(brightness(crop))
        self._clipped.append(clipped_pixels(crop))
        if key_points is not None:
            pose = head_pose(key_points, self._size_px)
            if not math.isnan(pose[0]):
                self._poses.append(pose)

    def summary(self) -> dict[str, float]:
        """What a report's row says of a video; NaN where no frame could be measured.

        ``sharpness`` and ``brightness`` are medians, ``sharpness_low`` is the 5th percentile, ``clipped_pixels`` a
        mean share; each ``range`` goes from the 5th to the 95th percentile, so that single frames do not make it.
        """
        poses = np.array(self._poses, np.float64).reshape(-1, 3)
        return {
            "sharpness": _percentile(self._sharpness, 50),
            "sharpness_low": _percentile(self._sharpness, 5),
            "brightness": _percentile(self._brightness, 50),
            "brightness_range": _percentile(self._brightness, 95) - _percentile(self._brightness, 5),
            "clipped_pixels": float(np.mean(self._clipped)) if self._clipped else math.nan,
            "pitch_range_deg": _angle_range(poses[:, 0]),
            "yaw_range_deg": _angle_range(poses[:, 1]),
            "roll_range_deg": _angle_range(poses[:, 2]),
        }


def _luma(crop: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.asarray(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), np.uint8)


def _poses(
    points: npt.NDArray[np.float64], camera: npt.NDArray[np.float64]
) -> list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """Candidates as (rotation vector, shift in mm): SQPnP's and one that starts frontal, all refined."""
    eyes_px = float(np.linalg.norm(points[1] - points[0]))
    depth_mm = camera[0, 0] * 63 / max(eyes_px, 1.0)
    centre = np.append((points.mean(axis=0) - camera[:2, 2]) / camera[0, 0] * depth_mm, depth_mm)
    tilt = math.atan2(points[1, 1] - points[0, 1], points[1, 0] - points[0, 0])
    starts = [(np.array([0.0, 0.0, tilt]), centre)]
    found = []
    try:
        solved, rotations, shifts, _ = cv2.solvePnPGeneric(GENERIC_FACE, points, camera, None, flags=cv2.SOLVEPNP_SQPNP)
        starts += list(zip(rotations, shifts, strict=True)) if solved else []
    except cv2.error:
        pass
    for rotation, shift in starts:
        try:
            refined = cv2.solvePnPRefineLM(
                GENERIC_FACE, points, camera, None, rotation.reshape(3, 1).copy(), shift.reshape(3, 1).copy()
            )
        except cv2.error:
            continue
        found.append((np.asarray(refined[0], np.float64).ravel(), np.asarray(refined[1], np.float64).ravel()))
    return found


def _percentile(values: list[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if values else math.nan


def _angle_range(degrees: npt.NDArray[np.float64]) -> float:
    """From the 5th to the 95th percentile, about the mean direction: -179 and 179 are 2 degrees apart."""
    if not len(degrees):
        return math.nan
    radians = np.radians(degrees)
    middle = math.atan2(np.sin(radians).mean(), np.cos(radians).mean())
    apart = (np.degrees(radians - middle) + 180) % 360 - 180
    low, high = np.percentile(apart, [5, 95])
    return float(high - low)
