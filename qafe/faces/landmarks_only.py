"""Landmarks for a dataset that has face crops only, as the authors ship PFED5."""

from __future__ import annotations

import functools
from concurrent.futures import Executor
from pathlib import Path

import cv2
import numpy as np

from ..errors import FaceError, ManifestError
from ..markup import ALL_COUNT
from ..store import Store
from .detect import FaceModels
from .labels import Problem
from .prepare import DEFAULT_HZ, Outcome, Progress, Say, face_models
from .settings import PrepareSettings, locked
from .subject import overlap
from .track import one_euro
from .workers import each

_BOX_SHAPE = 0.72
"""Width by height of the detector's box around an upright face."""
_FILLED = 0.5
"""Overlap of a face with its published crop."""


def add_landmarks(
    root: Path,
    settings: PrepareSettings,
    *,
    resume: bool = False,
    executor: Executor | None = None,
    workers: int = 1,
    progress: Progress = lambda done, total: None,
    say: Say = lambda text: None,
) -> Outcome:
    """Adds landmarks to a dataset that has face crops only, as the authors ship PFED5.

    Raises:
        QafeError: the dataset has no frames, or has landmarks already and ``resume`` is not set.
    """
    store = Store(root)
    videos = store.videos()
    if not videos:
        raise ManifestError(f"a dataset must have frames/<patient>/<video>, found none in {root}. Name its folder.")
    missing = [video for video in videos if not store.has_landmarks(*video)]
    if len(missing) < len(videos) and not resume:
        raise ManifestError(
            f"the dataset must have no landmarks yet, and {len(videos) - len(missing)} of {len(videos)} videos have "
            f"some ({root}/landmarks). Add --resume to keep them and make the others."
        )
    FaceModels(settings.models, settings.model_root)
    problems, frames, found = [], 0, 0
    with locked(store):
        store.clear_leftovers()
        task = functools.partial(_add_landmarks_to, root=root.resolve(), settings=settings)
        folders = (root, settings.model_root)
        for count, (_, result) in enumerate(each(task, missing, executor, workers, folders), start=1):
            if isinstance(result, Problem):
                problems.append(result)
                say(str(result))
            else:
                frames += result[0]
                found += result[1]
            progress(count, len(missing))
    kept = len(videos) - len(missing)
    return Outcome(len(videos) - len(problems), kept, problems, [], found / frames if frames else 1.0)


def _add_landmarks_to(video: tuple[str, str], *, root: Path, settings: PrepareSettings) -> tuple[int, int]:
    """Finds landmarks in published crops; (frames looked at for a face, how many of them show one).

    Such a crop is the detector's own box, stretched to a square. So its shape is given back, and the landmark network
    is shown the box; the detector only confirms, now and then, that a face fills it.
    """
    cv2.setNumThreads(1)
    store, models = Store(root), face_models(settings.models, settings.model_root)
    count, height = len(store.frame_paths(*video)), store.frame_shape(*video)[0]
    width, border = round(height * _BOX_SHAPE), height // 2
    box = np.array([border, border, border + width, border + height], np.float32)
    landmarks = np.empty((count, ALL_COUNT, 2), np.float32)
    looks, filled = 0, 0
    for index in range(count):
        crop = store.read_frames(*video, [index], height)[0]
        face = cv2.resize(crop, (width, height), interpolation=cv2.INTER_AREA)
        frame = np.pad(face, ((border, border), (border, border), (0, 0)), mode="edge")
        if index % settings.track.every_frames == 0:
            looks += 1
            filled += any(overlap(found, box) > _FILLED for found in models.find(frame).boxes)
        landmarks[index] = (models.landmarks(frame, box) - border) * [height / width, 1]
    if filled < settings.track.min_detected * looks:
        raise FaceError(
            f"a face must fill the crops, and does in {filled} of {looks} that were looked at. "
            "Prepare the recordings instead: python -m qafe prepare VIDEOS OUT --labels labels.csv."
        )
    if settings.smooth:
        landmarks = one_euro(landmarks, settings.fps or DEFAULT_HZ, float(height))
    store.write_landmarks(*video, np.clip(landmarks, 0, height - 1))
    return looks, filled
