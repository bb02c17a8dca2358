"""InsightFace's models: frames -> boxes, five key points and 106 landmarks.

Detection is SCRFD (arXiv:2105.04714) and landmarks are ``2d106det``, both from a model pack of InsightFace, loaded
through its own ``FaceAnalysis``. The whole frame is searched at 640 px as in the published script. The window search
cuts a piece out of that same 640 px picture, on the network's own grid: what it finds there differs from what the
whole frame gives only by what lies beyond the window, at a fraction of the cost. Only where the face is so large that
the piece would be, too, the picture is smaller.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..errors import FaceError
from ..markup import ALL_COUNT
from .subject import Faces, Floats, Frame

DEFAULT_MODELS = "buffalo_l"
DEFAULT_ROOT = Path("~/.insightface")
WHOLE_PX = 640
"""The side of the picture in which whole frames are searched, as published."""

_TASKS = ["detection", "landmark_2d_106"]
_GRID_PX = 32
"""The coarsest stride of SCRFD."""
_CONTEXT = 1.25
_WINDOW_MOST_PX = 320
"""Larger faces are searched in a smaller picture."""
_MIN_SCORE = 0.3


class FaceModels:
    """A detector and a landmark network of one InsightFace model pack.

    Args:
        name: of the pack, e.g. ``buffalo_l``.
        root: the folder that holds ``models/<name>/*.onnx``.
        threads: of onnxruntime, on the CPU.
    Raises:
        FaceError: the extra ``faces`` is not installed, or the pack is missing, incomplete or damaged.
    """

    def __init__(self, name: str = DEFAULT_MODELS, root: Path = DEFAULT_ROOT, *, threads: int = 1) -> None:
        app, self._session = _load(name, root.expanduser(), threads)
        self._detector = app.det_model
        self._landmarks = app.models["landmark_2d_106"]
        self._windows: dict[int, Any] = {}

    def find(self, frame: Frame) -> Faces:
        """All faces of a frame [H,W,3] uint8 RGB, px in the frame."""
        boxes, points = self._detector.detect(_bgr(frame), input_size=(WHOLE_PX, WHOLE_PX))
        return _faces(boxes, points, np.zeros(2, np.float32), 1.0)

    def find_near(self, frame: Frame, box: Floats) -> Faces:
        """The faces in a window around a box [4], px in the frame."""
        height, width = frame.shape[:2]
        side = float(max(box[2] - box[0], box[3] - box[1])) * WHOLE_PX / max(height, width) * _CONTEXT
        whole_px = int(WHOLE_PX * min(1.0, _WINDOW_MOST_PX / side))
        size = max(-(-int(min(side, _WINDOW_MOST_PX)) // _GRID_PX), 4) * _GRID_PX
        small = cv2.resize(frame, _fitted(height, width, whole_px))
        scale = small.shape[0] / height  # as InsightFace counts it
        centre = (box[:2] + box[2:]) / 2 * scale
        corner = np.round((centre - size / 2) / _GRID_PX).astype(int) * _GRID_PX
        limit = -(-(np.array([small.shape[1], small.shape[0]]) - size) // _GRID_PX) * _GRID_PX
        left, top = np.maximum(np.minimum(corner, limit), 0)
        window = np.zeros((size, size, 3), np.uint8)
        piece = small[top : top + size, left : left + size]
        window[: piece.shape[0], : piece.shape[1]] = piece[..., ::-1]
        boxes, points = self._detector_of(size).detect(window, input_size=(size, size))
        return _faces(boxes, points, np.array([left, top], np.float32), scale)

    def landmarks(self, frame: Frame, box: Floats) -> Floats:
        """The 106 landmarks [106,2] of the face in a box [4], (x, y) px in the frame."""
        from insightface.app.common import Face

        return np.asarray(self._landmarks.get(_bgr(frame), Face(bbox=box)), np.float32)

    def _detector_of(self, size: int) -> Any:
        """A detector for windows of one size: the pack's own, or a copy of it where its input size is fixed."""
        if self._detector.static_input_size is None:
            return self._detector
        if size not in self._windows:
            from insightface.model_zoo.scrfd import SCRFD

            copy = SCRFD(session=self._session(_resized(self._detector.model_file, size)))
            copy.prepare(0, det_thresh=_MIN_SCORE)
            self._windows[size] = copy
        return self._windows[size]


def providers() -> list[str]:
    """What onnxruntime computes with: CUDA where it is there, else the CPU."""
    import onnxruntime

    available = onnxruntime.get_available_providers()
    return [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]


def pack_files(name: str, root: Path) -> list[Path]:
    """The ONNX files of a pack, by name; empty if there is none."""
    return sorted((root.expanduser() / "models" / name).glob("*.onnx"))


def _load(name: str, root: Path, threads: int) -> tuple[Any, Any]:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    try:
        import onnxruntime
        from insightface.app import FaceAnalysis
    except ImportError as err:
        raise FaceError(
            f"preparing videos needs the extra packages of faces, and {err.name} is missing. "
            'Install them: pip install -c constraints.txt -e ".[faces]".'
        ) from err
    folder = root / "models" / name
    belongs = (
        f"Put a detector (det_10g.onnx) and 2d106det.onnx of InsightFace's pack into {folder}, or name another place "
        "(--models, --model-root)."
    )
    there = folder.is_dir()
    if there and not pack_files(name, root):
        raise FaceError(f"a model pack must hold ONNX files, found none in {folder}. {belongs}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    available = providers()

    def session(model: bytes) -> Any:
        return onnxruntime.InferenceSession(model, options, providers=available)

    made = [place for place in (root / "models", root) if not place.exists()]
    # A path, where there is one: InsightFace takes a folder of that name in the current directory first.
    wanted = str(folder) if there else name
    try:
        with redirect_stdout(sys.stderr):  # InsightFace prints that it downloads
            app = FaceAnalysis(
                name=wanted, root=str(root), allowed_modules=_TASKS, providers=available, sess_options=options
            )
        app.prepare(
            ctx_id=0 if available[0].startswith("CUDA") else -1, det_thresh=_MIN_SCORE, det_size=(WHOLE_PX, WHOLE_PX)
        )
    except Exception as err:  # whatever onnxruntime, requests or a bare assert of theirs raises
        if not there:
            shutil.rmtree(folder, ignore_errors=True)
            folder.with_name(f"{folder.name}.zip").unlink(missing_ok=True)
            for place in made:
                with suppress(OSError):
                    place.rmdir()
            raise FaceError(
                f"the model pack {name!r} is not at {folder}, and InsightFace could not download it "
                f"({type(err).__name__}). {belongs}"
            ) from err
        raise FaceError(
            f"the model pack at {folder} cannot be loaded ({err or type(err).__name__}). {belongs}"
        ) from err
    if not app.det_model.use_kps:
        raise FaceError(f"the detector must give five key points, the one in {folder} gives boxes only. {belongs}")
    missing = [task for task in _TASKS if task not in app.models]
    if missing:
        raise FaceError(f"a model pack must hold {' and '.join(_TASKS)}, no {missing[0]} in {folder}. {belongs}")
    if app.models["landmark_2d_106"].lmk_num != ALL_COUNT:
        raise FaceError(f"the landmark network must give {ALL_COUNT} points, another is in {folder}. {belongs}")
    return app, session


def _resized(model_file: str, size: int) -> bytes:
    """A fixed-size SCRFD for square windows: the same weights, with input and upsampling sizes scaled."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(model_file)
    shape = model.graph.input[0].type.tensor_type.shape.dim
    native = shape[2].dim_value
    shape[2].dim_value = shape[3].dim_value = size
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Resize" and len(node.input) > 3 and node.input[3] in constants:
            sizes = numpy_helper.to_array(constants[node.input[3]]).copy()
            sizes[2:] = sizes[2:] * size // native
            constants[node.input[3]].CopyFrom(numpy_helper.from_array(sizes, node.input[3]))
    for output in model.graph.output:
        rows = output.type.tensor_type.shape.dim[-2]
        rows.dim_value = rows.dim_value * size * size // native**2
    del model.graph.value_info[:]
    return bytes(model.SerializeToString())


def _bgr(frame: Frame) -> Frame:
    return np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), np.uint8)


def _fitted(height: int, width: int, longer_px: int) -> tuple[int, int]:
    """(width, height) of a frame resized to a longer side, rounded as InsightFace rounds."""
    if height > width:
        return int(longer_px / (height / width)), longer_px
    return longer_px, int(longer_px * (height / width))


def _faces(boxes: Any, points: Any, corner: Floats, scale: float) -> Faces:
    if not len(boxes):
        return Faces(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros((0, 5, 2), np.float32))
    places = (boxes[:, :4] + np.tile(corner, 2)) / scale
    return Faces(
        np.asarray(places, np.float32),
        np.asarray(boxes[:, 4], np.float32),
        np.asarray((points + corner) / scale, np.float32),
    )
