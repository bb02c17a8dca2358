"""qafe/faces/detect.py: real models find real faces, in the whole frame and in a window, and a bad pack is named."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from qafe.errors import FaceError
from qafe.faces.detect import FaceModels, pack_files, providers
from qafe.faces.subject import Faces, Floats, Frame
from qafe.faces.video import Video
from tests.data.cohort import real_faces
from tests.faces.models import PACK, face_models, model_root
from tests.faces.scenes import PEOPLE, group_photo


@pytest.fixture(scope="module")
def photo() -> Frame:
    pytest.importorskip("insightface", reason="the extra faces is not installed")
    return group_photo()


def nearest(faces: Faces, box: Floats) -> int:
    return int(np.abs(faces.boxes - box).max(axis=1).argmin())


# ---------------------------------------------------------------- what is found


def test_finds_all_six_people(photo: Frame) -> None:
    faces = face_models().find(photo)
    assert faces.boxes.shape == (6, 4)
    assert faces.key_points.shape == (6, 5, 2)
    for person in PEOPLE:
        place = nearest(faces, np.array(person, np.float32))
        np.testing.assert_allclose(faces.boxes[place], person, atol=3)
        left, top, right, bottom = person
        x, y = faces.key_points[place].T
        assert left < x.min() < x.max() < right
        assert top < y.min() < y.max() < bottom
        assert max(y[:2]) < y[2] < min(y[3:]), "eyes over nose over mouth"
        assert x[0] < x[1], "the eye on the left of the picture first"
    assert (faces.scores > 0.5).all()


def test_landmarks_lie_where_the_key_points_do(photo: Frame) -> None:
    models = face_models()
    faces = models.find(photo)
    for box, points in zip(faces.boxes, faces.key_points, strict=True):
        landmarks = models.landmarks(photo, box)
        assert landmarks.shape == (106, 2)
        assert landmarks.dtype == np.float32
        width = box[2] - box[0]
        for key, group in ((0, slice(33, 43)), (1, slice(87, 97)), (2, slice(72, 87))):
            assert np.linalg.norm(landmarks[group].mean(0) - points[key]) < 0.2 * width


def test_no_face(photo: Frame) -> None:
    models = face_models()
    empty = np.full((200, 300, 3), 90, np.uint8)
    for faces in (models.find(empty), models.find_near(empty, np.array([50, 50, 90, 90], np.float32))):
        assert faces.boxes.shape == (0, 4)
        assert faces.scores.shape == (0,)
        assert faces.key_points.shape == (0, 5, 2)


def test_a_window_finds_what_the_whole_frame_does(photo: Frame) -> None:
    models = face_models()
    whole = models.find(photo)
    for box, points in zip(whole.boxes, whole.key_points, strict=True):
        near = models.find_near(photo, box)
        place = nearest(near, box)
        # The photo is twice as large as the picture that is searched.
        assert np.abs(near.boxes[place] - box).max() < 3
        assert np.abs(near.key_points[place] - points).max() < 3
        landmarks = models.landmarks(photo, near.boxes[place]) - models.landmarks(photo, box)
        assert np.median(np.abs(landmarks)) < 1


@pytest.mark.parametrize("size", [(360, 640), (640, 360), (480, 480), (1080, 1920), (200, 301)])
def test_a_window_at_the_edges(photo: Frame, size: tuple[int, int]) -> None:
    """A face in each corner of frames of any shape; its box may come from a frame before."""
    models = face_models()
    left, top, right, bottom = PEOPLE[4]
    head = photo[top - 40 : bottom + 40, left - 40 : right + 40]
    height, width = size
    scale = min(height, width) / 500
    head = cv2.resize(head, None, fx=scale, fy=scale)
    high, wide = head.shape[:2]
    for y, x in ((0, 0), (0, width - wide), (height - high, 0), (height - high, width - wide)):
        frame = np.full((height, width, 3), 90, np.uint8)
        frame[y : y + high, x : x + wide] = head
        whole = models.find(frame)
        assert len(whole.boxes) == 1
        near = models.find_near(frame, whole.boxes[0] + 5 * scale)
        assert len(near.boxes) == 1
        assert np.abs(near.boxes[0] - whole.boxes[0]).max() < 0.02 * max(size)


@pytest.mark.parametrize(("clip", "atol_px"), [("P09/real0041s00", 2), ("P05/real0023s00", 6)])
def test_a_window_in_a_real_clip(clip: str, atol_px: float) -> None:
    """The window lies where the face was a frame before; the second face is 165 px high, 3 % of that is the detector's
    own wobble."""
    models = face_models()
    boxes, landmarks = [], []
    before: Floats | None = None
    for index, frame in Video(real_faces() / "raw" / f"{clip}.mp4").frames():
        if index == 20:
            break
        whole = models.find(frame)
        box = whole.boxes[0]
        near = models.find_near(frame, box if before is None else before)
        place = nearest(near, box)
        boxes.append(np.abs(near.boxes[place] - box).max())
        landmarks.append(np.abs(models.landmarks(frame, near.boxes[place]) - models.landmarks(frame, box)))
        before = box
    assert len(boxes) == 20
    assert max(boxes) < atol_px
    assert np.median(landmarks) < 1


def test_a_window_is_small_however_large_the_face_is(photo: Frame, monkeypatch: pytest.MonkeyPatch) -> None:
    models = face_models()
    left, top, right, bottom = PEOPLE[4]
    high = bottom - top
    head = photo[top - high // 4 : bottom + high // 4, left - high // 2 : right + high // 2]
    frame = np.asarray(cv2.resize(head, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC), np.uint8)
    whole = models.find(frame)
    box = whole.boxes[0]
    assert (box[3] - box[1]) > 0.6 * frame.shape[0]
    detector_of, sizes = models._detector_of, list[int]()

    def noted(size: int) -> Any:
        sizes.append(size)
        return detector_of(size)

    monkeypatch.setattr(models, "_detector_of", noted)
    near = models.find_near(frame, box)
    assert sizes == [320]
    assert len(near.boxes) == 1
    assert np.abs(near.boxes[0] - box).max() < 0.04 * (box[3] - box[1])
    assert np.linalg.norm(near.key_points[0] - whole.key_points[0], axis=1).max() < 0.04 * (box[3] - box[1])


def dynamic(source: Path, target: Path) -> None:
    """Writes a detector with a free input size: what upsamples to a size upsamples by a factor instead."""
    onnx = pytest.importorskip("onnx", reason="the extra faces is not installed")
    model = onnx.load(str(source))
    for place, name in ((2, "height"), (3, "width")):
        model.graph.input[0].type.tensor_type.shape.dim[place].dim_param = name
    for output in model.graph.output:
        output.type.tensor_type.shape.dim[-2].dim_param = f"rows_{output.name}"
    scales = onnx.numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "twice")
    model.graph.initializer.append(scales)
    resized = [node for node in model.graph.node if node.op_type == "Resize"]
    assert resized, "this detector upsamples"
    for node in resized:
        node.input[2] = "twice"
        del node.input[3:]
    del model.graph.value_info[:]
    onnx.save(model, str(target))


def test_a_detector_of_free_input_size(photo: Frame, tmp_path: Path) -> None:
    pack = tmp_path / "models" / "free"
    pack.mkdir(parents=True)
    fixed = {path.name: path for path in pack_files(PACK, model_root())}
    shutil.copy(fixed["2d106det.onnx"], pack)
    dynamic(fixed["det_2.5g.onnx"], pack / "det_2.5g.onnx")
    free, usual = FaceModels("free", tmp_path), face_models()
    assert free._detector.static_input_size is None
    whole = usual.find(photo)
    np.testing.assert_allclose(free.find(photo).boxes, whole.boxes, atol=0.01)
    for box in whole.boxes[:3]:
        ours, theirs = free.find_near(photo, box), usual.find_near(photo, box)
        np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=0.01)
        np.testing.assert_allclose(ours.key_points, theirs.key_points, atol=0.01)
    assert not free._windows


def test_providers() -> None:
    pytest.importorskip("onnxruntime", reason="the extra faces is not installed")
    assert providers()[-1] == "CPUExecutionProvider"
    assert set(providers()) <= {"CUDAExecutionProvider", "CPUExecutionProvider"}


# ---------------------------------------------------------------- packs that cannot be used


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = pytest.importorskip("requests")
    pytest.importorskip("insightface", reason="the extra faces is not installed")

    def refuse(*_: object, **__: object) -> None:
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(requests, "get", refuse)


def failure(name: str, root: Path) -> str:
    with pytest.raises(FaceError) as caught:
        FaceModels(name, root)
    told = str(caught.value)
    assert "\n" not in told
    assert str(root / "models" / name) in told
    assert "det_10g.onnx" in told
    assert "2d106det.onnx" in told
    return told


@pytest.mark.usefixtures("no_network")
def test_missing_pack_without_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = failure("buffalo_l", tmp_path / "new" / "root")
    assert "the model pack 'buffalo_l' is not at" in told
    assert "could not download it (ConnectionError)" in told
    assert not (tmp_path / "new" / "root").exists()
    assert capsys.readouterr().out == ""
    (tmp_path / "models" / "other").mkdir(parents=True)
    failure("buffalo_l", tmp_path)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["other"]


def test_a_download_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = pytest.importorskip("requests")
    pytest.importorskip("insightface", reason="the extra faces is not installed")

    class Broken:
        status_code = 200
        headers: dict[str, str] = {}  # noqa: RUF012

        def iter_content(self, chunk_size: int) -> Iterator[bytes]:
            yield b"PK"
            raise requests.exceptions.ChunkedEncodingError("broken off")

    monkeypatch.setattr(requests, "get", lambda *_, **__: Broken())
    failure("buffalo_l", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_network")
def test_empty_pack(tmp_path: Path) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert "a model pack must hold ONNX files, found none in" in failure("mine", tmp_path)
    assert (tmp_path / "models" / "mine").is_dir(), "what the user made stays"


@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_damaged_model(tmp_path: Path, damage: str) -> None:
    source = next(path for path in pack_files(PACK, model_root()) if path.name.startswith("det"))
    pack = tmp_path / "models" / "mine"
    pack.mkdir(parents=True)
    data = {"empty": b"", "text": b"<html>404</html>\n", "cut": source.read_bytes()[:100_000]}[damage]
    (pack / "det.onnx").write_bytes(data)
    assert "cannot be loaded" in failure("mine", tmp_path)
    assert (pack / "det.onnx").exists()


@pytest.mark.parametrize(
    ("kept", "told"), [("det_2.5g.onnx", "no landmark_2d_106"), ("2d106det.onnx", "cannot be loaded")]
)
def test_half_a_pack(tmp_path: Path, kept: str, told: str) -> None:
    pack = tmp_path / "models" / "mine"
    pack.mkdir(parents=True)
    shutil.copy(model_root() / "models" / PACK / kept, pack)
    assert told in failure("mine", tmp_path)


def test_a_folder_of_that_name_nearby_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = model_root().resolve()
    (tmp_path / PACK).mkdir()
    monkeypatch.chdir(tmp_path)
    FaceModels(PACK, root)


def test_the_extra_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "insightface.app", None)
    with pytest.raises(FaceError, match=r"insightface.* is missing\. Install them: pip install"):
        FaceModels(PACK, tmp_path)
