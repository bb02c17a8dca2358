"""A face and its landmarks, cut out of the frame together.

Source: the QAFE-Net authors' preparation crops each frame to its own detected box, resizes it to 256x256 px whatever
its shape, and clips landmarks to the crop (arXiv:2312.00856; ``per_frame`` here gives their landmarks to the last
digit). That removes head motion and adds the box's jitter to every point. ``per_video`` keeps one square for the
whole video instead: what moves in the crop moved in the room.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from .subject import Floats, Frame

CropKind = Literal["per_video", "per_frame"]
SIZE_PX = 256
_MARGIN = 1.1

Boxes = npt.NDArray[np.int64]


class Cropped(NamedTuple):
    """A chunk of cropped frames."""

    frames: npt.NDArray[np.uint8]
    """[T,256,256,3] RGB."""
    landmarks: Floats
    """[T,106,2], (x, y) px in the crop, clipped to it."""
    clipped: int
    """How many landmarks lay outside their crop."""


def crop_boxes(kind: CropKind, boxes: Floats, height: int, width: int) -> Boxes:
    """What to cut out of each frame: whole px [T,4] (left, top, right, bottom).

    Args:
        kind: ``per_frame`` rounds each box and keeps it within the frame, as published. ``per_video`` is one square
            around all boxes with a margin of a tenth; it may reach beyond the frame.
        boxes: [T,4] px, the tracked face.
        height: of the frame, px.
        width: of the frame, px.
    """
    if kind == "per_frame":
        limit = np.array([width, height, width, height])
        whole = np.clip(np.rint(boxes).astype(np.int64), 0, limit)
        whole[:, 2:] = np.maximum(whole[:, 2:], whole[:, :2] + 1)
        return whole
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    side = round(float((high - low).max()) * _MARGIN)
    corner = np.rint((low + high) / 2 - side / 2).astype(np.int64)
    # A square that fits into the frame is moved into it; black borders only where it does not fit.
    room = np.array([width, height]) - side
    corner = np.where(room >= 0, np.clip(corner, 0, np.maximum(room, 0)), corner)
    return np.tile(np.concatenate([corner, corner + side]), (len(boxes), 1))


def crop(frames: Sequence[Frame], landmarks: Floats, boxes: Boxes, size_px: int = SIZE_PX) -> Cropped:
    """Cuts frames [H,W,3] and their landmarks [T,106,2] out along boxes [T,4] and resizes both together.

    Frames with the same box are resized in one draw of one Albumentations pipeline.
    """
    out = np.empty((len(frames), size_px, size_px, 3), np.uint8)
    points = np.empty_like(landmarks)
    first = 0
    while first < len(frames):
        last = first + 1
        while last < len(frames) and np.array_equal(boxes[last], boxes[first]):
            last += 1
        box = boxes[first]
        pieces = np.stack([_cut(frame, box) for frame in frames[first:last]])
        shifted = landmarks[first:last] - box[:2].astype(np.float32)
        drawn = _pipeline(size_px)(images=pieces, keypoints=shifted.reshape(-1, 2))
        out[first:last] = drawn["images"]
        points[first:last] = np.asarray(drawn["keypoints"], np.float32).reshape(shifted.shape)
        first = last
    inside = np.clip(points, 0, size_px - 1)
    return Cropped(out, inside, int((inside != points).any(axis=-1).sum()))


def _cut(frame: Frame, box: npt.NDArray[np.int64]) -> Frame:
    left, top, right, bottom = (int(value) for value in box)
    height, width = frame.shape[:2]
    inside = frame[max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)]
    if inside.shape[:2] == (bottom - top, right - left):
        return inside
    piece = np.zeros((bottom - top, right - left, 3), np.uint8)
    y, x = max(-top, 0), max(-left, 0)
    piece[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return piece


_PIPELINES: dict[int, object] = {}


def _pipeline(size_px: int):  # type: ignore[no-untyped-def]
    if size_px not in _PIPELINES:
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
        import albumentations

        _PIPELINES[size_px] = albumentations.Compose(
            [albumentations.Resize(size_px, size_px)],
            keypoint_params=albumentations.KeypointParams(format="xy", remove_invisible=False),
        )
    return _PIPELINES[size_px]
