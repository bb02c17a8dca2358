"""Drawn people with textures for faces, and a finder that knows where they are: tracking without face models."""

from collections.abc import Callable
from dataclasses import dataclass, field

import cv2
import numpy as np

from qafe.faces.subject import _ALIGNED, Faces, Floats, Frame, overlap
from tests.faces.scenes import Scene

SIZE = (120, 200)
Place = tuple[float, float, float]
"""Centre x, centre y and side of a face, px."""


def texture(seed: int, change: float = 0.0, into: int | None = None) -> np.ndarray:
    """A face of smooth random colours, or one that has changed into another to some part."""
    image = cv2.resize(
        np.random.default_rng(seed).integers(60, 200, (6, 6, 3)).astype(np.float32),
        (48, 48),
        interpolation=cv2.INTER_CUBIC,
    )
    return image if into is None else (1 - change) * image + change * texture(into)


@dataclass
class Person:
    """Where a person is in each frame, how they look and how sure the finder is of them."""

    at: Callable[[int], Place | None]
    face: Callable[[int], np.ndarray]
    score: Callable[[int], float] = lambda _: 0.9
    shown: dict[int, Floats] = field(default_factory=dict)
    """The true boxes [4] of the frames drawn."""


def box_of(place: Place) -> Floats:
    x, y, side = place
    return np.array([x - side / 2, y - side / 2, x + side / 2, y + side / 2], np.float32)


class Stage:
    """Draws people, the last in front; then it is the `Finder` of its own frames.

    A face of which others hide more than a third is not found.
    """

    def __init__(self, count: int, *people: Person) -> None:
        self.found: dict[int, tuple[Floats, Floats]] = {}
        self.whole: list[int] = []
        """Frames in which `find` was asked."""
        self.near: list[int] = []
        wall = cv2.resize(np.random.default_rng(99).integers(90, 110, (12, 20, 3), np.uint8), SIZE[::-1])
        frames = []
        for index in range(count):
            frame = wall.copy()
            drawn: list[tuple[Floats, float]] = []
            for person in people:
                place = person.at(index)
                if place is None:
                    continue
                box = box_of(place)
                person.shown[index] = box
                side = place[2]
                matrix = np.array([[side / 48, 0, box[0]], [0, side / 48, box[1]]])
                face = np.clip(person.face(index), 0, 255).astype(np.uint8)
                cv2.warpAffine(face, matrix, SIZE[::-1], dst=frame, borderMode=cv2.BORDER_TRANSPARENT)
                drawn = [(other, score) for other, score in drawn if overlap(other, box) < 0.2]
                drawn.append((box, person.score(index)))
            boxes = np.array([box for box, _ in drawn], np.float32).reshape(-1, 4)
            self.found[index] = boxes, np.array([score for _, score in drawn], np.float32)
            frame[0, 0] = index % 256, index // 256, 0
            frames.append(frame)
        self.scene = Scene(frames)

    def find(self, frame: Frame) -> Faces:
        index = self._index(frame)
        self.whole.append(index)
        return self._faces(*self.found[index])

    def find_near(self, frame: Frame, box: Floats) -> Faces:
        index = self._index(frame)
        self.near.append(index)
        boxes, scores = self.found[index]
        middle, reach = (box[:2] + box[2:]) / 2, 0.625 * (box[2:] - box[:2])
        inside = (np.abs((boxes[:, :2] + boxes[:, 2:]) / 2 - middle) < reach).all(axis=1)
        return self._faces(boxes[inside], scores[inside])

    def landmarks(self, frame: Frame, box: Floats) -> Floats:
        """A grid in the box: linear in it, so that filling in can be computed by hand."""
        part = np.column_stack([np.linspace(0.1, 0.9, 106), np.linspace(0.9, 0.2, 106)]).astype(np.float32)
        return box[:2] + part * (box[2:] - box[:2])

    @staticmethod
    def _index(frame: Frame) -> int:
        return int(frame[0, 0, 0]) + 256 * int(frame[0, 0, 1])

    @staticmethod
    def _faces(boxes: Floats, scores: Floats) -> Faces:
        sides = (boxes[:, 2:] - boxes[:, :2])[:, None]
        return Faces(boxes, scores, boxes[:, None, :2] + _ALIGNED * sides)
