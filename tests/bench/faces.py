"""Raw video -> crops and landmarks: ours against the published loop, on the same decoded frames and one thread.

The rival does for each frame what the authors' script does: find faces in the whole frame at 640 px, landmarks of the
first face, cut out its box, resize picture and points together, draw the points, write a JPEG.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import cv2
import numpy as np

from qafe.faces.crop import SIZE_PX, crop, crop_boxes
from qafe.faces.detect import FaceModels
from qafe.faces.subject import Floats, Frame
from qafe.faces.track import TrackSettings, follow
from qafe.faces.video import Video
from qafe.store import Store

from ..faces.scenes import Scene
from .rounds import Row, compare


def bench(videos: list[Path], models: str, model_root: Path, rounds: int) -> list[Row]:
    """One row for each video."""
    cv2.setNumThreads(1)
    finder = FaceModels(models, model_root)
    rows = []
    for path in videos:
        frames = [frame.copy() for _, frame in Video(path).frames()]
        with tempfile.TemporaryDirectory() as folder:
            store = Store(folder)
            points: dict[str, Floats] = {}

            def ours(frames: list[Frame] = frames, store: Store = store, points: dict[str, Floats] = points) -> None:
                track = follow(Scene(frames), finder, TrackSettings(keep_ends=True))
                height, width = frames[0].shape[:2]
                boxes = crop_boxes("per_frame", track.boxes, height, width)
                cut = crop(frames, track.landmarks, boxes)
                store.write_video("ours", "video", cut.frames, cut.landmarks)
                points["ours"] = track.landmarks
                points["share"] = np.float32([track.whole_frames / len(frames)])

            def published(
                frames: list[Frame] = frames, folder: Path = Path(folder), points: dict[str, Floats] = points
            ) -> None:
                points["published"] = _published(frames, finder, folder)

            row = compare(
                f"prepare {path.parent.name}/{path.stem}", "frame", ours, published, per=len(frames), rounds=rounds
            )
            apart = np.linalg.norm(points["ours"] - points["published"], axis=2)
            row.notes = [
                f"landmarks {np.nanmedian(apart):.2f} px apart (median), {np.nanpercentile(apart, 95):.2f} px (95 %)",
                f"whole frames searched: {float(points['share'][0]):.1%}",
            ]
            rows.append(row)
    return rows


def _published(frames: list[Frame], finder: FaceModels, folder: Path) -> Floats:
    import albumentations

    resize = albumentations.Compose(
        [albumentations.Resize(SIZE_PX, SIZE_PX)],
        keypoint_params=albumentations.KeypointParams(format="xy", remove_invisible=False),
    )
    found = np.full((len(frames), 106, 2), np.nan, np.float32)
    for index, frame in enumerate(frames):
        faces = finder.find(frame)
        faces = type(faces)(*(part[faces.scores >= 0.5] for part in faces))
        if not len(faces.boxes):
            continue
        largest = int(np.argmax((faces.boxes[:, 2:] - faces.boxes[:, :2]).prod(axis=1)))
        found[index] = finder.landmarks(frame, faces.boxes[largest])
        left, top, right, bottom = np.maximum(np.rint(faces.boxes[largest]).astype(int), 0)
        piece = resize(image=frame[top:bottom, left:right], keypoints=found[index] - [left, top])
        image = cv2.cvtColor(piece["image"], cv2.COLOR_RGB2BGR)
        drawn = image.copy()
        for x, y in np.clip(piece["keypoints"], 0, SIZE_PX - 1).astype(int):
            cv2.circle(drawn, (int(x), int(y)), 1, (0, 255, 0), -1)
        cv2.imwrite(str(folder / f"img_{index:05d}.jpg"), image)
    return found
