"""The prepared dataset's folder: the one file that knows its layout.

```
ROOT/frames/<patient>/<video>/img_00001.jpg ...     square face crops (256 px as published)
ROOT/landmarks/<patient>/<video>.npy                [T,106,2] or [T,73,2] float32, (x, y) pixels in the crop
ROOT/landmarks_heatmap/<patient>/<video>/*.jpg      heatmaps rendered by the authors (instead of landmarks)
ROOT/<name>_train.csv, ROOT/<name>_test.csv         id, label, frames, class
ROOT/quality/<patient>/<video>.json                 how the video was prepared, and how well it shows the face
```
Source: the layout that the QAFE-Net authors give PFED5 (arXiv:2312.00856); ``landmarks/`` and
``quality/`` are ours; with landmarks, heatmaps can be drawn anew with other settings.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from .config import EXPRESSIONS
from .errors import ManifestError, MediaError
from .markup import ALL_COUNT, INNER
from .natural_order import natural_order

Split = Literal["train", "test"]
Frames = npt.NDArray[np.uint8]
Points = npt.NDArray[np.float32]

CSV_COLUMNS = ("id", "label", "frames", "class")
_PUBLISHED_VIDEO_LENGTH = 11
_REDUCED = (8, 4, 2, 1)
"""By what a JPEG decoder can divide a frame's sides in place of some of its work."""


class CsvRow(NamedTuple):
    """One video of a dataset's CSV; a plain tuple in the same order serves as well."""

    id: str
    """``<video>_<patient>``."""
    label: float
    frames: int
    expression: str
    """One of PFED5's five (written as its class index) or any name."""


class Store:
    """A prepared dataset on disk.

    Args:
        root: the folder that holds ``frames/`` and the CSV files.
    Raises:
        ManifestError: there is no such folder.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise ManifestError(
                f"a prepared dataset must be a folder, and there is none at {self.root}. "
                "Make one with python -m qafe prepare or python -m qafe sample."
            )

    @classmethod
    def create(cls, root: Path | str) -> Store:
        """A store at a folder that is made if it is not there yet."""
        Path(root).mkdir(parents=True, exist_ok=True)
        return cls(root)

    @classmethod
    def of_clip(cls, folder: Path | str) -> tuple[Store, str, str]:
        """The store, patient and video of one clip's folder ``frames/<patient>/<video>``.

        Raises:
            MediaError: the folder holds no JPEG, or does not lie in a prepared dataset.
        """
        folder = Path(folder).resolve()
        if not folder.is_dir() or not _jpegs(folder):
            raise MediaError(
                f"a clip's folder must hold JPEG frames, found none in {folder}. "
                "Give frames/<patient>/<video> of a prepared dataset."
            )
        if folder.parent.parent.name != "frames":
            raise MediaError(
                f"a clip's folder must lie at frames/<patient>/<video> of a prepared dataset, got {folder}. "
                "Run python -m qafe prepare on the video first."
            )
        return cls(folder.parents[2]), folder.parent.name, folder.name

    # ---------------------------------------------------------------- reading

    def csv_path(self, split: Split) -> Path:
        """The single ``*_train.csv`` or ``*_test.csv``.

        Raises:
            ManifestError: there is none, or more than one.
        """
        found = sorted(self.root.glob(f"*_{split}.csv"))
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            step = "Keep one of them." if found else f"Add <name>_{split}.csv with id,label,frames,class."
            raise ManifestError(
                f"a prepared dataset must hold exactly one *_{split}.csv, got {names} in {self.root}. {step}"
            )
        return found[0]

    def resolve_video(self, video_id: str) -> tuple[str, str]:
        """Patient and video folder that an id of a CSV names.

        The patient is what follows the last ``_``. The video is what stands before it if frames, landmarks or
        heatmaps are filed under that name, else the id's first 11 characters (the published rule for PFED5).

        Raises:
            ManifestError: the id has no ``_``, an empty half, or a path separator.
        """
        stem, _, patient = video_id.rpartition("_")
        if not stem or not patient or any(mark in video_id for mark in ("/", "\\", "\0")) or patient == "..":
            raise ManifestError(
                f"an id must be <video>_<patient>, got {video_id!r} (id). Rename it, e.g. clip00001a_P01."
            )
        filed = (
            self._frames_folder(patient, stem).is_dir()
            or self.has_landmarks(patient, stem)
            or self._heatmaps_folder(patient, stem).is_dir()
        )
        return patient, stem if filed else video_id[:_PUBLISHED_VIDEO_LENGTH]

    def frame_paths(self, patient: str, video: str) -> list[Path]:
        """The JPEG frames of a video in natural order (``img_2`` before ``img_10``).

        Raises:
            MediaError: there are none.
        """
        folder = self._frames_folder(patient, video)
        names = _jpegs(folder)
        if not names:
            raise MediaError(
                f"a video must have JPEG frames, found none in {folder}. Run python -m qafe prepare again."
            )
        return [folder / name for name in names]

    def frame_sizes(self, patient: str, video: str) -> list[tuple[str, int]]:
        """(name, bytes) of each JPEG frame in natural order; empty if there are none. Opens no file."""
        return [(name, size) for name, size, _, _ in self.frame_states(patient, video)]

    def frame_states(self, patient: str, video: str) -> list[tuple[str, int, int, int]]:
        """(name, bytes, and the nanosecond in which content and file were last changed) of each JPEG frame in
        natural order; a frame that has changed has another state. Opens no file."""
        return _listed(self._frames_folder(patient, video))

    def frame_shape(self, patient: str, video: str) -> tuple[int, int]:
        """(height, width) of a video's frames in pixels, read from the first one's header.

        Raises:
            MediaError: there is no frame, or its header cannot be read.
        """
        return _header_shape(self.frame_paths(patient, video)[0])

    def read_frames(
        self, patient: str, video: str, indices: Sequence[int] | npt.NDArray[np.int64], size_px: int
    ) -> Frames:
        """Frames as uint8 RGB [T,H,W,3], H = W = size_px, one for each index (0-based).

        An index given twice is decoded once. A frame that has the size already is returned as decoded.
        Otherwise it is resized by area (``cv2.INTER_AREA``), after the JPEG decoder itself has halved it as
        often as that leaves enough pixels.

        Raises:
            MediaError: a frame is unreadable or truncated, has another size than the video's first one, or
                the video has too few frames.
        """
        paths = self.frame_paths(patient, video)
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(paths)):
            raise MediaError(
                f"frame indices must lie in 0..{len(paths) - 1}, got {wanted.min()}..{wanted.max()} "
                f"({self._frames_folder(patient, video)}). Check the frames column of the CSV."
            )
        shape = _header_shape(paths[0])
        distinct, place = np.unique(wanted, return_inverse=True)
        decoded = np.empty((len(distinct), size_px, size_px, 3), np.uint8)
        for row, index in zip(decoded, distinct, strict=True):
            _read_jpeg(paths[index], shape, row)
        return decoded if np.array_equal(distinct, wanted) else decoded[place]

    def stamp(self, patient: str, video: str) -> tuple[int, int]:
        """When the video's frames and landmarks were last replaced; a memory of them must compare it."""
        times = []
        for path in (self._frames_folder(patient, video), self.landmarks_path(patient, video)):
            try:
                times.append(path.stat().st_mtime_ns)
            except OSError:
                times.append(0)
        return times[0], times[1]

    def has_landmarks(self, patient: str, video: str) -> bool:
        """Whether the video has a landmark file."""
        return self.landmarks_path(patient, video).is_file()

    def landmarks_path(self, patient: str, video: str) -> Path:
        """Where the video's landmarks are, or would be."""
        return self.root / "landmarks" / patient / f"{video}.npy"

    def read_landmarks(self, patient: str, video: str) -> Points | None:
        """Landmarks as float32 [T,P,2], (x, y) pixels in the crop, P 106 or 73; None if there is no file.

        Raises:
            ManifestError: the file is damaged, has another shape, or holds a value that is not finite.
        """
        path = self.landmarks_path(patient, video)
        if not path.is_file():
            return None
        again = "Run python -m qafe prepare --landmarks-only again."
        try:
            points = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as err:
            raise ManifestError(f"landmarks must be a .npy array, cannot read {path} ({err}). {again}") from err
        _check_landmarks(points, str(path), again)
        return np.ascontiguousarray(points, dtype=np.float32)

    def landmark_count(self, patient: str, video: str) -> int | None:
        """How many frames the landmark file covers, read from its header; None if there is no file.

        Raises:
            ManifestError: the file is damaged or has another shape than [T,106,2] or [T,73,2].
        """
        path = self.landmarks_path(patient, video)
        if not path.is_file():
            return None
        again = "Run python -m qafe prepare --landmarks-only again."
        try:
            points = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as err:
            raise ManifestError(f"landmarks must be a .npy array, cannot read {path} ({err}). {again}") from err
        _check_landmarks(points, str(path), again, values=False)
        return int(points.shape[0])

    def has_rendered_heatmaps(self, patient: str, video: str) -> bool:
        """Whether the authors' rendered heatmaps of the video are there."""
        return bool(_jpegs(self._heatmaps_folder(patient, video)))

    def rendered_count(self, patient: str, video: str) -> int:
        """How many rendered heatmaps the video has; 0 if none."""
        return len(_jpegs(self._heatmaps_folder(patient, video)))

    def read_rendered_heatmaps(
        self, patient: str, video: str, indices: Sequence[int] | npt.NDArray[np.int64], size_px: int
    ) -> Frames:
        """Rendered heatmaps as uint8 RGB [T,h,w,3], h = w = size_px, one for each index (0-based).

        Resized with Pillow's antialiased bilinear filter, as published; channels as Pillow reads them.

        Raises:
            MediaError: there are too few, or one cannot be read.
        """
        folder = self._heatmaps_folder(patient, video)
        names = _jpegs(folder)
        wanted = np.asarray(indices, dtype=np.int64)
        if not names or (wanted.size and wanted.max() >= len(names)):
            raise MediaError(
                f"there must be a rendered heatmap for every frame, got {len(names)} in {folder}. "
                "Copy them again, or make landmarks with python -m qafe prepare --landmarks-only DIR."
            )
        distinct, place = np.unique(wanted, return_inverse=True)
        read = np.empty((len(distinct), size_px, size_px, 3), np.uint8)
        for row, index in enumerate(distinct):
            read[row] = _read_rendered(folder / names[index], size_px)
        return read[place]

    # ---------------------------------------------------------------- writing

    def write_video(
        self,
        patient: str,
        video: str,
        frames: Frames,
        landmarks: npt.NDArray[np.floating],
        *,
        quality: int = 95,
    ) -> None:
        """Writes a video's frames and landmarks, replacing what was there; see `write_chunks`.

        Args:
            frames: uint8 RGB [T,H,W,3], H = W.
            landmarks: [T,P,2], (x, y) pixels in the frame, P 106 or 73.
            quality: of the JPEGs, 1-100.
        Raises:
            ManifestError: the arrays do not fit each other or this layout.
        """
        _check_chunk(frames, landmarks, f"{patient}/{video}")
        self.write_chunks(patient, video, [(frames, landmarks)], quality=quality)

    def write_chunks(
        self,
        patient: str,
        video: str,
        chunks: Iterable[tuple[Frames, npt.NDArray[np.floating]]],
        *,
        quality: int = 95,
    ) -> int:
        """Writes a video chunk by chunk, so that a long one need not fit into memory; returns its frames.

        Everything is written beside and renamed, the frames last: an interrupted run leaves no half video.
        Single JPEGs are not fsynced (thousands of them would take minutes): one that a power cut left short
        is refused by `read_frames`.

        Args:
            chunks: (frames, landmarks) as `write_video` takes them, in order.
            quality: of the JPEGs, 1-100.
        Raises:
            ManifestError: the arrays do not fit each other or this layout.
        """
        place = f"{patient}/{video}"
        folder = self._frames_folder(patient, video)
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{video}.", dir=folder.parent))
        number, points = 0, []
        try:
            for frames, landmarks in chunks:
                _check_chunk(frames, landmarks, place)
                for frame in frames:
                    number += 1
                    bgr = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
                    done, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
                    assert done, "OpenCV encodes any uint8 RGB frame"
                    (beside / f"img_{number:05d}.jpg").write_bytes(data.tobytes())
                points.append(landmarks)
            beside.chmod(0o755)
            self.write_landmarks(patient, video, np.concatenate(points))
            _replace_folder(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.parent.rmdir()  # if nothing came to stand in it
        return number

    def write_landmarks(self, patient: str, video: str, landmarks: npt.NDArray[np.floating]) -> None:
        """Writes a video's landmarks [T,P,2] alone (what ``prepare --landmarks-only`` needs).

        Raises:
            ManifestError: the array has another shape, or holds a value that is not finite.
        """
        _check_landmarks(landmarks, f"{patient}/{video}", "Give one row of points for each frame.")
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(landmarks, dtype=np.float32), allow_pickle=False)
        write_file(self.landmarks_path(patient, video), buffer.getvalue())

    def write_csv(self, split: Split, rows: Sequence[CsvRow | tuple[str, float, int, str]], name: str) -> Path:
        """Writes ``<name>_<split>.csv``, one row a video, and returns its path."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for video_id, label, frames, expression in rows:
            known = EXPRESSIONS.index(expression) if expression in EXPRESSIONS else expression
            writer.writerow([video_id, f"{label:.10g}", frames, known])
        path = self.root / f"{name}_{split}.csv"
        write_file(path, text.getvalue().encode())
        return path

    def read_quality(self, patient: str, video: str) -> dict[str, Any] | None:
        """What `write_quality` kept of a video; None if it is not there or damaged."""
        try:
            found = json.loads(self._quality_path(patient, video).read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def write_quality(self, patient: str, video: str, record: Mapping[str, Any]) -> None:
        """Keeps how a video was prepared; written last, it says that the video is whole."""
        text = json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        write_file(self._quality_path(patient, video), text.encode("utf-8", "backslashreplace"))

    def videos(self) -> list[tuple[str, str]]:
        """(patient, video) of every folder of frames, in natural order."""
        found = [path for path in (self.root / "frames").glob("*/*") if path.is_dir() and path.name[0] != "."]
        return sorted(
            ((path.parent.name, path.name) for path in found), key=lambda item: list(map(natural_order, item))
        )

    def clear_leftovers(self) -> None:
        """Removes what a killed process left half-written. Nobody else may be writing here."""
        for pattern in (".*.csv.*", ".*.json.*", ".*.html.*", "frames/*/.*.*", "landmarks/*/.*.*", "quality/*/.*.*"):
            for path in self.root.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    # ---------------------------------------------------------------- folders

    def _frames_folder(self, patient: str, video: str) -> Path:
        return self.root / "frames" / patient / video

    def _quality_path(self, patient: str, video: str) -> Path:
        return self.root / "quality" / patient / f"{video}.json"

    def _heatmaps_folder(self, patient: str, video: str) -> Path:
        return self.root / "landmarks_heatmap" / patient / video


def _check_chunk(frames: Frames, landmarks: npt.NDArray[np.floating], place: str) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise ManifestError(
            f"frames must be uint8 [T,H,W,3] with T at least 1, got {frames.dtype} {list(frames.shape)} "
            f"({place}). Decode the video to RGB first."
        )
    _check_landmarks(landmarks, place, "Give one row of points for each frame.")
    if len(landmarks) != len(frames):
        raise ManifestError(
            f"there must be landmarks for every frame, got {len(landmarks)} for {len(frames)} frames "
            f"({place}). Give one row of points for each frame."
        )


def _check_landmarks(points: npt.NDArray[np.generic], place: str, step: str, *, values: bool = True) -> None:
    counts = (len(INNER), ALL_COUNT)
    numbers = np.issubdtype(points.dtype, np.floating) or np.issubdtype(points.dtype, np.integer)
    if not numbers or points.ndim != 3 or points.shape[1] not in counts or points.shape[2] != 2:
        raise ManifestError(
            f"landmarks must be numbers of shape [T,106,2] or [T,73,2], got {points.dtype} "
            f"{list(points.shape)} ({place}). {step}"
        )
    if values and not np.isfinite(points).all():
        frame = int(np.argwhere(~np.isfinite(points))[0, 0])
        raise ManifestError(f"landmarks must be finite, got NaN or infinity in frame {frame} ({place}). {step}")


def _listed(folder: Path) -> list[tuple[str, int, int, int]]:
    try:
        with os.scandir(folder) as entries:
            found = [
                (entry.name, (state := entry.stat()).st_size, state.st_mtime_ns, state.st_ctime_ns)
                for entry in entries
                if entry.name.lower().endswith((".jpg", ".jpeg")) and not entry.name.startswith(".")
            ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found, key=lambda item: natural_order(item[0]))


def _jpegs(folder: Path) -> list[str]:
    try:
        names = [
            name for name in os.listdir(folder) if name.lower().endswith((".jpg", ".jpeg")) and not name.startswith(".")
        ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(names, key=natural_order)


def _header_shape(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, UnidentifiedImageError) as err:
        raise _unreadable(path) from err


def _unreadable(path: Path) -> MediaError:
    return MediaError(
        f"a frame must be a whole JPEG, and {path} is damaged or truncated. Run python -m qafe prepare again."
    )


def _read_jpeg(path: Path, shape: tuple[int, int], out: Frames) -> None:
    """One frame into [H,W,3] with H = W; shape is what the video's first frame has."""
    size_px = len(out)
    factor = next(factor for factor in _REDUCED if factor == 1 or min(shape) // factor >= size_px)
    height, width = (-(-side // factor) for side in shape)
    fits = (height, width) == (size_px, size_px)
    try:
        data = path.read_bytes()
        same = simplejpeg.decode_jpeg_header(data)[:2] == shape
        if same:  # Strict: libjpeg itself fills what it cannot read with grey, and only warns.
            image = simplejpeg.decode_jpeg(data, min_height=height, min_width=width, buffer=out if fits else None)
    except (OSError, ValueError) as err:
        raise _unreadable(path) from err
    if not same:
        raise MediaError(
            f"all frames of a video must have the size of its first, {shape[0]}x{shape[1]} px, and {path} "
            "has another. Run python -m qafe prepare again."
        )
    if not fits:
        cv2.resize(image, (size_px, size_px), dst=out, interpolation=cv2.INTER_AREA)


def _read_rendered(path: Path, size_px: int) -> Frames:
    try:
        with Image.open(path) as image:
            whole = image.convert("RGB")
    except OSError as err:
        raise _unreadable(path) from err
    if whole.size != (size_px, size_px):
        whole = whole.resize((size_px, size_px), Image.Resampling.BILINEAR)
    return np.asarray(whole, dtype=np.uint8)


def write_file(path: Path, data: bytes) -> None:
    """Beside, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    finally:
        Path(beside).unlink(missing_ok=True)


def _replace_folder(new: Path, place: Path) -> None:
    """Renames new to place; what was at place goes away only after the new folder stands there."""
    if not place.exists():
        new.rename(place)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{place.name}.old.", dir=place.parent))
    place.rename(old / "old")
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)
