"""qafe/store.py: what is written comes back, and damage is named."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from qafe.errors import ManifestError, MediaError
from qafe.store import Store
from tests.data.cohort import real_faces, video_frames, video_landmarks


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path)
    store.write_video("P1", "v", video_frames(0, 5, 256), video_landmarks(0, 5, 256))
    return store


def test_round_trip(store: Store) -> None:
    frames = store.read_frames("P1", "v", range(5), 256)
    assert frames.shape == (5, 256, 256, 3)
    assert np.abs(frames.astype(int) - video_frames(0, 5, 256)).mean() < 6
    landmarks = store.read_landmarks("P1", "v")
    assert landmarks is not None
    np.testing.assert_array_equal(landmarks, video_landmarks(0, 5, 256))
    assert store.landmark_count("P1", "v") == 5
    assert store.frame_shape("P1", "v") == (256, 256)


def test_frames_keep_their_channel_order(tmp_path: Path) -> None:
    red = np.zeros((1, 64, 64, 3), np.uint8)
    red[..., 0] = 250
    store = Store(tmp_path)
    store.write_video("P", "red", red, video_landmarks(0, 1))
    np.testing.assert_allclose(store.read_frames("P", "red", [0], 64)[0, 32, 32], [250, 0, 0], atol=3)


def test_native_size_is_exact(store: Store) -> None:
    path = store.frame_paths("P1", "v")[2]
    expected = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    np.testing.assert_array_equal(store.read_frames("P1", "v", [2], 256)[0], expected)


@pytest.mark.parametrize("side", [224, 128, 100, 64, 37, 32, 16, 300])
def test_resized_frames_stay_close_to_the_area_average(store: Store, side: int) -> None:
    frames = store.read_frames("P1", "v", [0, 1], side)
    assert frames.shape == (2, side, side, 3)
    whole = cv2.resize(store.read_frames("P1", "v", [0], 256)[0], (side, side), interpolation=cv2.INTER_AREA)
    assert np.abs(frames[0].astype(int) - whole).mean() < 6


def test_repeated_indices(store: Store) -> None:
    frames = store.read_frames("P1", "v", [3, 0, 3], 64)
    np.testing.assert_array_equal(frames[0], frames[2])
    np.testing.assert_array_equal(frames[1], store.read_frames("P1", "v", [0], 64)[0])


def test_natural_order(tmp_path: Path) -> None:
    folder = tmp_path / "frames" / "P" / "v"
    folder.mkdir(parents=True)
    for name in ("img_10.jpg", "img_2.jpg", "img_1.JPG", ".hidden.jpg", "note.txt"):
        Image.new("RGB", (8, 8)).save(folder / name, format="JPEG")
    assert [path.name for path in Store(tmp_path).frame_paths("P", "v")] == ["img_1.JPG", "img_2.jpg", "img_10.jpg"]


def test_rewriting_replaces_and_leaves_nothing_beside(store: Store) -> None:
    stamp = store.stamp("P1", "v")
    store.write_video("P1", "v", video_frames(1, 3, 256), video_landmarks(1, 3, 256))
    assert len(store.frame_paths("P1", "v")) == 3
    assert store.landmark_count("P1", "v") == 3
    assert os.listdir(store.root / "frames" / "P1") == ["v"]
    assert os.listdir(store.root / "landmarks" / "P1") == ["v.npy"]
    assert store.stamp("P1", "v") != stamp


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"must be a folder.*nowhere.*qafe prepare"):
        Store(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 10, 0.5])
def test_truncated_jpeg_names_the_file(store: Store, keep: float) -> None:
    path = store.frame_paths("P1", "v")[1]
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if keep < 1 else int(keep)])
    with pytest.raises(MediaError, match=r"img_00002\.jpg is damaged or truncated"):
        store.read_frames("P1", "v", [0, 1], 256)


def test_a_jpeg_damaged_in_its_middle_is_refused(store: Store) -> None:
    path = store.frame_paths("P1", "v")[1]
    data = bytearray(path.read_bytes())
    end_of_image = b"\xff\xd9"
    data[len(data) // 2 : len(data) // 2 + 2] = end_of_image  # a whole file to who looks at its end
    path.write_bytes(data)
    assert data.endswith(end_of_image)
    with pytest.raises(MediaError, match=r"img_00002\.jpg is damaged or truncated"):
        store.read_frames("P1", "v", [0, 1], 256)


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("RGB", {"progressive": True, "subsampling": "4:2:2"}),
        ("RGB", {"subsampling": "4:4:4"}),
        ("L", {}),
        ("CMYK", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("side", [256, 120, 64, 32])
def test_other_jpegs_are_read_as_opencv_does(store: Store, side: int, mode: str, settings: dict[str, object]) -> None:
    path = store.frame_paths("P1", "v")[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: lying. Frames are taken as they are stored.
    Image.fromarray(video_frames(0, 1, 256)[0]).convert(mode).save(path, exif=exif, **settings)
    reduced = {256: 1, 120: 2, 64: 4, 32: 8}[side]
    flags = {2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 8: cv2.IMREAD_REDUCED_GRAYSCALE_8}
    expected = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION | flags.get(reduced, 0))
    assert expected.shape == (256 // reduced, 256 // reduced, 3)
    expected = cv2.resize(expected, (side, side), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(store.read_frames("P1", "v", [0], side)[0], expected)


def test_frame_of_another_size(store: Store) -> None:
    Image.new("RGB", (128, 256)).save(store.frame_paths("P1", "v")[1])
    with pytest.raises(MediaError, match=r"size of its first, 256x256 px.*img_00002"):
        store.read_frames("P1", "v", [0, 1], 64)


def test_index_beyond_the_video(store: Store) -> None:
    with pytest.raises(MediaError, match=r"must lie in 0\.\.4, got 0\.\.5"):
        store.read_frames("P1", "v", [0, 5], 64)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 68, 2), np.float32), r"got float32 \[5, 68, 2\]"),
        (np.zeros((5, 106, 3), np.float32), r"got float32 \[5, 106, 3\]"),
        (np.full((5, 106, 2), np.nan, np.float32), "NaN or infinity in frame 0"),
        (np.array([[["a", "b"]]]), "must be numbers"),
    ],
)
def test_bad_landmarks(store: Store, array: np.ndarray, message: str) -> None:
    np.save(store.landmarks_path("P1", "v"), array)
    with pytest.raises(ManifestError, match=message):
        store.read_landmarks("P1", "v")


def test_damaged_landmark_file(store: Store) -> None:
    path = store.landmarks_path("P1", "v")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ManifestError, match=r"cannot read .*v\.npy"):
        store.read_landmarks("P1", "v")
    with pytest.raises(ManifestError, match=r"cannot read .*v\.npy"):
        store.landmark_count("P1", "v")


def test_rendered_heatmaps_are_read_as_published(store: Store) -> None:
    assert not store.has_rendered_heatmaps("P1", "v")
    folder = store.root / "landmarks_heatmap" / "P1" / "v"
    folder.mkdir(parents=True)
    for number in range(3):
        image = np.random.default_rng(number).integers(0, 255, (256, 256, 3), np.uint8)
        cv2.imwrite(str(folder / f"img_{number + 1:05d}.jpg"), image)
    assert store.rendered_count("P1", "v") == 3
    maps = store.read_rendered_heatmaps("P1", "v", [2, 0, 2], 64)
    whole = Image.open(folder / "img_00003.jpg").resize((64, 64), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(maps[0], np.asarray(whole))
    np.testing.assert_array_equal(maps[0], maps[2])
    with pytest.raises(MediaError, match="a rendered heatmap for every frame, got 3"):
        store.read_rendered_heatmaps("P1", "v", [3], 64)


def test_csv_path(store: Store) -> None:
    with pytest.raises(ManifestError, match=r"exactly one \*_train\.csv, got none"):
        store.csv_path("train")
    path = store.write_csv("train", [("v_P1", 2.5, 5, "smile"), ("w_P1", 1.0, 5, "speech")], "own")
    assert path.read_text() == "id,label,frames,class\nv_P1,2.5,5,1\nw_P1,1,5,speech\n"
    assert store.csv_path("train") == path
    store.write_csv("train", [("v_P1", 2.5, 5, "smile")], "other")
    with pytest.raises(ManifestError, match=r"got other_train\.csv, own_train\.csv"):
        store.csv_path("train")


def test_video_of_an_id(store: Store) -> None:
    assert store.resolve_video("v_P1") == ("P1", "v")
    assert store.resolve_video("clip0000001extra_P9") == ("P9", "clip0000001")
    store.write_landmarks("P9", "clip0000001extra", video_landmarks(0, 5))
    assert store.resolve_video("clip0000001extra_P9") == ("P9", "clip0000001extra")
    (store.root / "landmarks_heatmap" / "P8" / "clip0000001extra").mkdir(parents=True)
    assert store.resolve_video("clip0000001extra_P8") == ("P8", "clip0000001extra")
    for bad in ("nounderscore", "_P1", "v_", "a/b_P1", "v_.."):
        with pytest.raises(ManifestError, match="must be <video>_<patient>"):
            store.resolve_video(bad)


def test_of_clip(store: Store, tmp_path: Path) -> None:
    found, patient, video = Store.of_clip(tmp_path / "frames" / "P1" / "v")
    assert (found.root, patient, video) == (tmp_path.resolve(), "P1", "v")
    with pytest.raises(MediaError, match="must hold JPEG frames"):
        Store.of_clip(tmp_path / "landmarks" / "P1")
    stray = tmp_path / "stray"
    stray.mkdir()
    Image.new("RGB", (8, 8)).save(stray / "a.jpg")
    with pytest.raises(MediaError, match="frames/<patient>/<video>"):
        Store.of_clip(stray)


@pytest.mark.parametrize(
    ("frames", "landmarks", "message"),
    [
        (np.zeros((0, 8, 8, 3), np.uint8), np.zeros((0, 106, 2)), "frames must be uint8"),
        (np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 106, 2)), "frames must be uint8"),
        (np.zeros((2, 8, 8, 3), np.uint8), np.zeros((3, 106, 2)), "got 3 for 2 frames"),
        (np.zeros((2, 8, 8, 3), np.uint8), np.full((2, 106, 2), np.inf), "finite"),
    ],
)
def test_writing_refuses_what_does_not_fit(
    tmp_path: Path, frames: np.ndarray, landmarks: np.ndarray, message: str
) -> None:
    with pytest.raises(ManifestError, match=message):
        Store(tmp_path).write_video("P", "v", frames, landmarks)
    assert not list(tmp_path.iterdir())


def test_real_faces() -> None:
    store = Store(real_faces() / "prepared")
    videos = sorted(path for path in (store.root / "frames").glob("*/*"))
    assert len(videos) > 30, "the real clips must be there"
    for folder in videos[:3]:
        patient, video = folder.parent.name, folder.name
        landmarks = store.read_landmarks(patient, video)
        assert landmarks is not None
        assert landmarks.shape == (len(store.frame_paths(patient, video)), 106, 2)
        assert store.read_frames(patient, video, [0], 256).std() > 10
