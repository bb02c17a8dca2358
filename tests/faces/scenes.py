"""Moving scenes made of real faces: the people of ``insightface/data/images/t1.jpg``, cut out and set in motion."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from qafe.faces.subject import Frame

# Where six people's faces are in t1.jpg: left, top, right, bottom.
PEOPLE = (
    (746, 339, 846, 481),
    (465, 265, 573, 416),
    (59, 263, 169, 396),
    (1131, 271, 1226, 399),
    (905, 54, 1013, 204),
    (269, 147, 371, 265),
)
SIZE = (360, 640)


def group_photo() -> Frame:
    """The picture as RGB."""
    import insightface

    image = cv2.imread(str(Path(insightface.__file__).parent / "data" / "images" / "t1.jpg"))
    assert image is not None
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)


class Actor:
    """A head cut out of the group photo, with soft edges."""

    def __init__(self, photo: Frame, person: int) -> None:
        left, top, right, bottom = PEOPLE[person]
        wide, high = right - left, bottom - top
        self.face_px = np.array([wide, high], np.float32)
        x0, x1 = max(left - wide // 2, 0), min(right + wide // 2, photo.shape[1])
        y0, y1 = max(top - high // 2, 0), min(bottom + high // 3, photo.shape[0])
        self.image = photo[y0:y1, x0:x1]
        self.offset = np.array([(left + right) / 2 - x0, (top + bottom) / 2 - y0], np.float32)
        mask = np.zeros(self.image.shape[:2], np.float32)
        centre = tuple(int(value) for value in self.offset)
        cv2.ellipse(mask, centre, (int(wide * 0.72), int(high * 0.72)), 0, 0, 360, 1.0, -1)
        self.mask = cv2.GaussianBlur(mask, (0, 0), 3)[..., None]

    def draw(self, frame: Frame, centre: tuple[float, float], scale: float = 1.0) -> npt.NDArray[np.float32]:
        """Pastes the head with its face around a point; returns the face's box [4]."""
        shift = np.array(centre) - self.offset * scale
        matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
        size = frame.shape[1::-1]
        image = cv2.warpAffine(self.image, matrix, size, flags=cv2.INTER_LINEAR)
        mask = cv2.warpAffine(self.mask, matrix, size, flags=cv2.INTER_LINEAR)[..., None]
        frame[:] = (frame * (1 - mask) + image * mask).astype(np.uint8)
        half = self.face_px * scale / 2
        return np.concatenate([np.array(centre) - half, np.array(centre) + half]).astype(np.float32)


class Scene:
    """Frames that a function of the frame number draws; stands where a `qafe.faces.video.Video` would."""

    def __init__(self, frames: list[Frame]) -> None:
        self.drawn = frames

    def __len__(self) -> int:
        return len(self.drawn)

    def frames(self, every: int = 1) -> Iterator[tuple[int, Frame]]:
        for index, frame in enumerate(self.drawn):
            if index % every == 0 or index == len(self.drawn) - 1:
                yield index, frame


def passing_by(
    subject: int, passer: int, frames: int = 90, *, in_front: bool, passer_scale: float = 1.0, crosses_face: bool = True
) -> tuple[Scene, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """One person sways in the middle, another walks through the picture from edge to edge.

    Returns the scene and the true boxes [T,4] of both.
    """
    photo = group_photo()
    sitting, walking = Actor(photo, subject), Actor(photo, passer)
    wall = cv2.GaussianBlur(np.random.default_rng(0).integers(60, 120, (*SIZE, 3), dtype=np.uint8), (0, 0), 5)
    drawn, true, other = [], [], []
    for index in range(frames):
        frame = wall.copy()
        seat = (320 + 12 * np.sin(index / 7), 185 + 6 * np.cos(index / 11))
        walk = (-100 + 840 * index / (frames - 1), (190 if crosses_face else 80) + 10 * np.sin(index / 3))
        order = [(sitting, seat, 1.0, true), (walking, walk, passer_scale, other)]
        for actor, place, scale, boxes in order if in_front else order[::-1]:
            boxes.append(actor.draw(frame, place, scale))
        drawn.append(frame)
    return Scene(drawn), np.array(true), np.array(other)
