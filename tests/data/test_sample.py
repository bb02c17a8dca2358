"""The generated sample dataset: what it holds, that it is exact and repeatable, and that it takes motion to rank it."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from qafe import metrics
from qafe.config import EXPRESSIONS
from qafe.data.drawn_face import LANDMARK_COLUMNS, SIZE_PX
from qafe.data.manifest import read_manifest
from qafe.data.sample import Clip, SampleConfig, make_clip, make_sample, severities
from qafe.data.splits import split_validation
from qafe.errors import ConfigError, ManifestError
from qafe.store import Store

SMALL = SampleConfig(train_patients=2, test_patients=1, clips=1, frames=(8, 10))
Array = npt.NDArray[np.float64]


def _bytes(root: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert found
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sample(tmp_path_factory.mktemp("sample") / "small", SMALL, workers=1)


def test_layout_is_that_of_a_prepared_dataset(small: Path) -> None:
    store = Store(small)
    manifest = read_manifest(store)
    assert len(manifest.train) == 2 * len(EXPRESSIONS)
    assert len(manifest.test) == len(EXPRESSIONS)
    assert set(manifest.expressions) == set(EXPRESSIONS)
    for video in (*manifest.train, *manifest.test):
        assert len(video.video) == 11
        assert video.id == f"{video.video}_{video.patient}"
        assert len(store.frame_paths(video.patient, video.video)) == video.frames
        points = store.read_landmarks(video.patient, video.video)
        assert points is not None
        assert points.shape == (video.frames, 106, 2)
        assert points.min() > 0
        assert points.max() < SIZE_PX
        assert store.frame_shape(video.patient, video.video) == (SIZE_PX, SIZE_PX)


def test_same_seed_same_bytes_whatever_the_workers(small: Path, tmp_path: Path) -> None:
    assert _bytes(make_sample(tmp_path / "again", SMALL, workers=2)) == _bytes(small)


def test_another_seed_is_another_dataset(small: Path, tmp_path: Path) -> None:
    other = make_sample(tmp_path / "other", SMALL, seed=1, workers=1)
    assert json.loads((other / "sample.json").read_text())["seed"] == 1
    assert (other / "sample_train.csv").read_bytes() != (small / "sample_train.csv").read_bytes()


def test_a_whole_sample_is_returned_and_anything_else_refused(small: Path, tmp_path: Path) -> None:
    before = _bytes(small)
    assert make_sample(small, SMALL, workers=1) == small
    assert _bytes(small) == before
    with pytest.raises(ManifestError, match="new or empty folder"):
        make_sample(small, SMALL, seed=5)
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ManifestError, match="new or empty folder"):
        make_sample(tmp_path, SMALL)
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        assert total == 15
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_sample(tmp_path / "data", SMALL, workers=1, progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong", [{"clips": 0}, {"train_patients": 90}, {"seed": -1}, {"frames": (4, 3)}, {"test_patients": 0}]
)
def test_settings_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="sample"):
        SampleConfig(**wrong)  # type: ignore[arg-type]


def test_every_landmark_has_its_own_place_on_the_face() -> None:
    # Only the two pupils are given twice (34 and 38, 88 and 92).
    assert len(set(LANDMARK_COLUMNS.tolist())) == 104


def test_landmarks_lie_on_the_picture() -> None:
    """The pupils are the darkest spots of open eyes; the lips' corners lie between lip red and skin."""
    config = SampleConfig()
    checked = 0
    for patient in range(6):
        clip = make_clip(config, patient, 1, 0, 3.0)
        frames = clip.render()
        for image, points in zip(frames[::10], clip.landmarks[::10], strict=True):
            grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(float)
            for pupil, top, bottom in ((34, 40, 33), (88, 94, 87)):
                if points[bottom, 1] - points[top, 1] < 12:
                    continue
                x, y = np.rint(points[pupil]).astype(int)
                if not points[top, 1] + 3 < y < points[bottom, 1] - 3:
                    continue
                assert grey[y, x] < 45
                assert grey[y - 1 : y + 2, x - 1 : x + 2].mean() < grey[y - 9 : y + 10, x - 9 : x + 10].mean() - 20
                checked += 1
    assert checked >= 10


@pytest.mark.parametrize("seed", [0, 1])
def test_labels_use_the_whole_scale_in_every_split(seed: int) -> None:
    config = SampleConfig(seed=seed)
    level = severities(config)
    label = np.clip(np.rint(level), 0, 4)
    assert level.shape == (40, 5, 7)
    for part in (label[:30], label[30:]):
        for expression in range(5):
            assert set(part[:, expression].ravel()) == {0, 1, 2, 3, 4}


# --- it takes motion -------------------------------------------------------------------------------------------


def _geometry(seed: int, expression: int) -> tuple[list[Clip], npt.NDArray[np.bool_]]:
    config = SampleConfig(seed=seed)
    level = severities(config)
    clips = [
        make_clip(config, patient, expression, number, level[patient, expression, number])
        for patient in range(config.patients)
        for number in range(config.clips)
    ]
    return clips, np.arange(len(clips)) < config.train_patients * config.clips


def _upright(points: npt.NDArray[np.float32]) -> Array:
    """Landmarks [T,106,2] without the head's place, tilt and size, by the outer corners of the eyes."""
    left, right = points[:, 35].astype(float), points[:, 93].astype(float)
    across = right - left
    unit = across / (across**2).sum(axis=1, keepdims=True)
    centred = points - 0.5 * (left + right)[:, None]
    x = (centred * unit[:, None]).sum(axis=2)
    y = centred[:, :, 1] * unit[:, None, 0] - centred[:, :, 0] * unit[:, None, 1]
    return np.stack([x, y], axis=2)


def _ridge_spearman(features: Array, target: Array, train: npt.NDArray[np.bool_]) -> float:
    scaled = (features - features[train].mean(axis=0)) / (features[train].std(axis=0) + 1e-9)
    kernel = scaled @ scaled[train].T
    weights = np.linalg.solve(kernel[train] + 100 * np.eye(int(train.sum())), target[train] - target[train].mean())
    return metrics.spearman((kernel @ weights)[~train], target[~train])


@pytest.mark.parametrize("expression", range(5))
def test_motion_ranks_the_clips_and_a_still_frame_does_not(expression: int) -> None:
    moving, still = [], []
    for seed in range(2):
        clips, train = _geometry(seed, expression)
        target = np.array([clip.label for clip in clips], dtype=float)
        faces = [_upright(clip.landmarks) for clip in clips]
        motion = [np.stack([np.ptp(face, axis=0), np.abs(np.diff(face, axis=0)).mean(axis=0)]) for face in faces]
        moving.append(_ridge_spearman(np.stack([m.ravel() for m in motion]), target, train))
        rng = np.random.default_rng(seed)
        for pick in (
            [face[rng.integers(len(face))] for face in faces],
            [face[len(face) // 2] for face in faces],
            [face.mean(axis=0) for face in faces],
        ):
            still.append(_ridge_spearman(np.stack([face.ravel() for face in pick]), target, train))
    assert min(moving) >= (0.85 if EXPRESSIONS[expression] == "smile" else 0.7)
    assert np.mean(still) <= 0.3


def test_validation_patients_cover_the_scale() -> None:
    from qafe.data.manifest import Sample

    config = SampleConfig()
    level = severities(config)
    samples = [
        Sample(f"{p:02d}{e}{k}_S{p:02d}", f"S{p:02d}", f"{p:02d}{e}{k}", EXPRESSIONS[e], float(score), 40)
        for (p, e, k), score in np.ndenumerate(np.clip(np.rint(level[: config.train_patients]), 0, 4))
    ]
    _, validation = split_validation(samples, 0.25, 0)
    for expression in EXPRESSIONS:
        scores = [part.score for part in validation if part.expression == expression]
        assert len(scores) >= 20
        assert set(scores) == {0, 1, 2, 3, 4}
