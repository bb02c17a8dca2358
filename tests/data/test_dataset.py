"""qafe/data/dataset.py: the two streams agree, and nothing but seed, epoch and index decides a clip."""

import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from qafe.config import PRESETS, Config, HeatmapConfig, tiny
from qafe.data.dataset import Clip, ClipBatch, ClipDataset, collate, load_clip, model_inputs
from qafe.data.frames import RGB_MEAN, RGB_STD, Crop, pixels
from qafe.data.manifest import Sample, read_manifest
from qafe.dotted import flatten, override
from qafe.errors import ManifestError
from qafe.store import Store
from tests import reference
from tests.data.cohort import real_faces, write_cohort

TINY = override(tiny(), {"data.repeats": 1, "data.heatmap.points": "all", "data.heatmap.skip_first": False})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write_cohort(tmp_path)


def dataset(store: Store, config: Config, train: bool = True) -> ClipDataset:
    return ClipDataset(store, read_manifest(store).train, config, train=train)


def equal(left: Clip, right: Clip) -> bool:
    assert left.points is not None
    assert right.points is not None
    return torch.equal(left.rgb, right.rgb) and torch.equal(left.points, right.points) and left.offset == right.offset


@pytest.mark.parametrize("preset", PRESETS)
def test_shapes(store: Store, preset: str) -> None:
    config = PRESETS[preset]()
    clips = dataset(store, config)
    assert len(clips) == 8 * config.data.repeats
    batch = collate([clips[0], clips[len(clips) - 1]])
    assert len(batch) == 2
    frames, side, small = config.model.clip_frames, config.model.rgb.size_px, config.model.heatmap.size_px
    assert batch.rgb.shape == (2, frames, side, side, 3)
    assert batch.rgb.dtype == torch.uint8
    rgb, maps = model_inputs(batch, config)
    assert rgb.shape == (2, 3, frames, side, side)
    assert maps.shape == (2, config.data.heatmap.channels, frames, small, small)
    assert rgb.dtype == maps.dtype == torch.float32
    assert maps.min() >= 0
    assert maps.max() <= 1
    with pytest.raises(IndexError, match="must lie in"):
        clips[len(clips)]


def test_published_test_transform() -> None:
    u = reference.rule().u
    coarse = u("loader.frames.coarse", (2, 16, 16, 3)).repeat(16, axis=1).repeat(16, axis=2)
    fine = u("loader.frames.fine", (2, 256, 256, 3))
    frames = np.floor(np.float32(255) * (np.float32(0.7) * coarse + np.float32(0.3) * fine)).astype(np.uint8)
    golden = reference.arrays("golden_loader")
    crop = Crop(frames, range(2), (16, 16), 224, flip=False)
    batch = ClipBatch([crop], torch.zeros(1, 2, 72, 2), None, torch.tensor([[4, 4]]), torch.zeros(1), [])
    rgb, _ = model_inputs(batch, Config())
    np.testing.assert_allclose(rgb[0, :, :, ::8, ::8].numpy(), golden["rgb_test"], atol=1e-6)
    np.testing.assert_allclose(rgb[0].double().sum((2, 3)).numpy(), golden["rgb_test_full_sum"], rtol=1e-5, atol=0.05)


def test_published_rendered_heatmaps(tmp_path: Path) -> None:
    """The authors' JPEGs through `Store` and the centre crop, against the golden of the published loader."""
    u = reference.rule().u
    coarse = u("loader.frames.coarse", (2, 16, 16, 3)).repeat(16, axis=1).repeat(16, axis=2)
    fine = u("loader.frames.fine", (2, 256, 256, 3))
    frames = np.floor(np.float32(255) * (np.float32(0.7) * coarse + np.float32(0.3) * fine)).astype(np.uint8)
    folder = tmp_path / "landmarks_heatmap" / "P" / "v"
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        # PNG content under the layout's name keeps the golden's exact pixels; Pillow goes by content.
        data = cv2.imencode(".png", frame[..., ::-1])[1].tobytes()
        (folder / f"img_{number + 1:05d}.jpg").write_bytes(data)
    maps = Store(tmp_path).read_rendered_heatmaps("P", "v", [0, 1], 64)
    crop = pixels([Crop(maps, range(2), (4, 4), 56, flip=False)])
    batch = ClipBatch(
        torch.zeros(1, 2, 224, 224, 3, dtype=torch.uint8), None, crop, torch.tensor([[4, 4]]), torch.zeros(1), []
    )
    _, got = model_inputs(batch, Config())
    np.testing.assert_allclose(got[0].numpy(), reference.arrays("golden_loader")["heatmap_test"], atol=1e-6)


def _dot_cohort(root: Path) -> tuple[Store, Sample]:
    """A bright dot in every frame where all landmarks are."""
    rng = np.random.default_rng(0)
    places = rng.integers(60, 196, (40, 2))
    frames = np.zeros((40, 256, 256, 3), np.uint8)
    for frame, (x, y) in zip(frames, places, strict=True):
        cv2.circle(frame, (int(x), int(y)), 5, (255, 255, 255), -1)
    store = Store(root)
    store.write_video("P", "v", frames, np.repeat(places[:, None], 106, axis=1).astype(np.float32))
    return store, Sample("v_P", "P", "v", "smile", 1.0, 40)


def _centres(frames: torch.Tensor) -> torch.Tensor:
    """[T,H,W] -> centres of mass [T,2], (x, y) in shares of the side."""
    side = frames.shape[-1]
    axis = (torch.arange(side) + 0.5) / side
    mass = frames.sum((1, 2))
    return torch.stack(((frames.sum(1) * axis).sum(1) / mass, (frames.sum(2) * axis).sum(1) / mass), dim=1)


@pytest.mark.parametrize("preset", PRESETS)
def test_both_streams_are_mirrored_and_cropped_together(tmp_path: Path, preset: str) -> None:
    store, sample = _dot_cohort(tmp_path)
    config = override(PRESETS[preset](), {"data.heatmap.colour": "grey", "data.repeats": 12, "model.segments": 1})
    clips = ClipDataset(store, [sample], config, train=True)
    gaps, seen = [], set()
    for index in range(len(clips)):
        batch = collate([clips[index]])
        seen.add(tuple(batch.offsets[0].tolist()))
        _, maps = model_inputs(batch, config)
        rgb = batch.rgb[0].float().mean(-1)
        gaps.append((_centres(rgb) - _centres(maps[0, 0])).abs().max().item())
    assert len(seen) > 3, "the draws must differ"
    # Shares of the side: a third of a heatmap pixel; the crops of the smallest sizes differ by 1 % in scale.
    assert max(gaps) < 0.35 / config.model.heatmap.size_px


def test_separate_draws_are_mirrored_against_each_other_in_half_of_the_clips(tmp_path: Path) -> None:
    store, sample = _dot_cohort(tmp_path)
    config = override(TINY, {"data.heatmap.colour": "grey", "data.repeats": 60, "data.augment.joint": False})
    clips = ClipDataset(store, [sample], config, train=True)
    apart = 0
    for index in range(len(clips)):
        batch = collate([clips[index]])
        _, maps = model_inputs(batch, config)
        apart += int((_centres(batch.rgb[0].float().mean(-1)) - _centres(maps[0, 0])).abs().max() > 0.15)
    assert 15 < apart < 45


def test_flips_are_there_and_are_left_right(tmp_path: Path) -> None:
    store, sample = _dot_cohort(tmp_path)
    still = override(TINY, {"data.augment.flip": 0.0, "data.augment.crop": 1.0})
    turned = override(still, {"data.augment.flip": 1.0})
    plain, mirrored = (ClipDataset(store, [sample], config, train=True)[0] for config in (still, turned))
    assert torch.equal(plain.rgb.flip(2), mirrored.rgb)
    assert plain.points is not None
    assert mirrored.points is not None
    torch.testing.assert_close(still.data.heatmap.canvas_px - 1 - plain.points[..., 0], mirrored.points[..., 0])
    torch.testing.assert_close(plain.points[..., 1], mirrored.points[..., 1])


def test_frames_in_their_videos_and_copied_ones_are_normalised_alike(store: Store) -> None:
    clips = dataset(store, override(TINY, {"data.augment.flip": 0.5}))
    batch = collate([clips[index] for index in range(len(clips))])
    assert isinstance(batch.frames, list)
    assert {crop.flip for crop in batch.frames} == {True, False}
    copied = replace(batch, frames=batch.rgb)
    inside, outside = (model_inputs(one, TINY)[0] for one in (batch, copied))
    assert torch.equal(inside, outside)
    mean, deviation = (torch.tensor(values).view(3, 1, 1, 1) for values in (RGB_MEAN, RGB_STD))
    expected = (batch.rgb.permute(0, 4, 1, 2, 3) / 255 - mean) / deviation
    torch.testing.assert_close(inside, expected, atol=1e-6, rtol=0)


def test_seed_epoch_and_index_decide(store: Store) -> None:
    config = TINY
    first, again = dataset(store, config), dataset(store, config)
    again[3], again[0]  # What was read before changes nothing.
    assert equal(first[5], again[5])
    again.set_epoch(1)
    assert not all(equal(first[i], again[i]) for i in range(len(first)))
    first.set_epoch(1)
    assert all(equal(first[i], again[i]) for i in range(len(first)))
    other = dataset(store, override(config, {"train.seed": 1}))
    other.set_epoch(1)
    assert not all(equal(first[i], other[i]) for i in range(len(first)))


def test_workers_change_nothing_and_see_the_epoch(store: Store) -> None:
    config = TINY
    alone, shared = dataset(store, config), dataset(store, config)
    loader = DataLoader(
        shared, batch_size=4, collate_fn=collate, num_workers=2, persistent_workers=True, multiprocessing_context="fork"
    )
    for epoch in range(2):
        alone.set_epoch(epoch)
        shared.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == 2
        for number, batch in enumerate(batches):
            expected = collate([alone[4 * number + i] for i in range(4)])
            assert torch.equal(batch.rgb, expected.rgb)
            assert batch.points is not None
            assert expected.points is not None
            assert torch.equal(batch.points, expected.points)
            assert [s.id for s in batch.samples] == [s.id for s in expected.samples]


def test_evaluation_is_one_fixed_centre_clip(store: Store) -> None:
    config = TINY
    clips = dataset(store, config, train=False)
    assert len(clips) == 8
    once = clips[2]
    clips.set_epoch(5)
    assert equal(once, clips[2])
    batch = load_clip(store, once.sample.patient, once.sample.video, config)
    assert torch.equal(batch.rgb[0], once.rgb)
    assert batch.score.isnan().all()
    assert batch.points is not None
    assert once.points is not None
    assert torch.equal(batch.points[0], once.points)


def test_rewritten_video_is_read_again(store: Store) -> None:
    config = TINY
    before = dataset(store, config, train=False)[0]
    patient, video = before.sample.patient, before.sample.video
    landmarks = store.read_landmarks(patient, video)
    assert landmarks is not None
    store.write_video(patient, video, np.full((12, 64, 64, 3), 77, np.uint8), landmarks + 1)
    after = dataset(store, config, train=False)[0]
    assert after.rgb.float().mean() == 77
    assert before.points is not None
    assert after.points is not None
    assert not torch.equal(before.points, after.points)


@pytest.mark.parametrize("choice", ["all", "eyes_brows", "mouth", "nose"])
def test_73_and_106_points_give_the_same_clip(store: Store, choice: str) -> None:
    config = override(TINY, {"data.heatmap.points": choice})
    whole = dataset(store, config, train=False)[0]
    landmarks = store.read_landmarks(whole.sample.patient, whole.sample.video)
    assert landmarks is not None
    store.write_landmarks(whole.sample.patient, whole.sample.video, landmarks[:, 33:])
    assert equal(whole, dataset(store, config, train=False)[0])


def test_skip_first_leaves_point_33_out(store: Store) -> None:
    clips = [dataset(store, override(TINY, {"data.heatmap.skip_first": skip}), train=False)[0] for skip in (0, 1)]
    every, without = (clip.points for clip in clips)
    assert every is not None
    assert without is not None
    assert every.shape[1] == 73
    assert torch.equal(every[:, 1:], without)
    mouth = override(TINY, {"data.heatmap.skip_first": True, "data.heatmap.points": "mouth"})
    points = dataset(store, mouth, train=False)[0].points
    assert points is not None
    assert points.shape[1] == 20


def _render(store: Store) -> None:
    for landmarks in sorted((store.root / "landmarks").glob("*/*.npy")):
        folder = store.root / "landmarks_heatmap" / landmarks.parent.name / landmarks.stem
        folder.mkdir(parents=True)
        for number in range(12):
            picture = np.full((256, 256, 3), (9 * number, 0, 200), np.uint8)
            cv2.imwrite(str(folder / f"img_{number + 1:05d}.jpg"), picture)
    shutil.rmtree(store.root / "landmarks")


def test_rendered_heatmaps_serve_the_published_settings_only(store: Store) -> None:
    _render(store)
    config = override(TINY, flatten(HeatmapConfig(), "data.heatmap."))
    frames, side = config.model.clip_frames, config.model.heatmap.size_px
    batch = collate([dataset(store, config)[0], dataset(store, config)[1]])
    assert batch.points is None
    _, maps = model_inputs(batch, config)
    assert maps.shape == (2, 3, frames, side, side)
    torch.testing.assert_close(maps[:, 0], torch.full((2, frames, side, side), 200 / 255), atol=0.02, rtol=0)
    for name, value in (("colour", "grey"), ("sigma_px", 2.0), ("points", "mouth")):
        changed = override(config, {f"data.heatmap.{name}": value})
        with pytest.raises(ManifestError, match=rf"data\.heatmap\.{name}={value}.*--landmarks-only"):
            dataset(store, changed)
        with pytest.raises(ManifestError, match="--landmarks-only"):
            load_clip(store, "P1", "clip01smile", changed)


def test_neither_landmarks_nor_heatmaps_everywhere(store: Store) -> None:
    samples = read_manifest(store).train
    (store.root / "landmarks" / "P1" / "clip01smile.npy").unlink()
    with pytest.raises(ManifestError, match="P1/clip01smile has no landmarks"):
        ClipDataset(store, samples, Config(), train=True)


def test_batch_moves_to_a_device(store: Store) -> None:
    batch = collate([dataset(store, TINY)[0]]).to("meta")
    assert batch.rgb.is_meta
    assert batch.points is not None
    assert batch.points.is_meta
    assert batch.score.is_meta


def test_real_faces() -> None:
    store = Store(real_faces() / "prepared")
    config = TINY
    clips = ClipDataset(store, read_manifest(store).test, config, train=False)
    assert len(clips) == 11
    rgb, maps = model_inputs(collate([clips[0], clips[5]]), config)
    assert rgb.isfinite().all()
    assert maps.amax((1, 3, 4)).min() > 0.4, "no frame may be blank"
