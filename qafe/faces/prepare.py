"""A cohort of recordings -> a prepared dataset: faces followed, cropped, measured and filed.

Every video is prepared by itself and filed whole or not at all; its record in
``quality/`` is written last and says that it is done. So a run can be killed at any moment and taken up again, and
ends with the same bytes as one that was never disturbed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..errors import ConfigError, FaceError, ManifestError
from ..markup import ALL_COUNT
from ..store import CsvRow, Store, write_file
from ..strata import draw_patients
from .crop import SIZE_PX, CropKind, crop, crop_boxes
from .detect import DEFAULT_MODELS, DEFAULT_ROOT, FaceModels, pack_files
from .labels import Problem, Recording, read_labels, scores_by_patient
from .quality import Meter
from .report import Report, contact_sheet, write_report
from .subject import Floats, Frame, overlap
from .track import Track, TrackSettings, follow, one_euro
from .video import Video
from .workers import each

SETTINGS_FILE = "prepare.json"
CSV_NAME = "cohort"
VERSION = 1
"""Raised when the same settings would give other crops or landmarks."""

_CHUNK_FRAMES = 16
_SHEET_FRAMES = 12
_DEFAULT_HZ = 25.0
_BOX_SHAPE = 0.72
"""Width by height of the detector's box around an upright face."""
_FILLED = 0.5
"""Overlap of a face with its published crop."""

_FLAGS = {"models": "--models", "crop": "--crop", "fps": "--fps", "smooth": "--smooth"} | {
    "every_frames": "--detect-every",
    "gap_frames": "--max-gap",
    "min_detected": "--min-detected",
}

Progress = Callable[[int, int], None]
Say = Callable[[str], None]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareSettings:
    """How recordings are prepared."""

    models: str = DEFAULT_MODELS
    model_root: Path = DEFAULT_ROOT
    crop: CropKind = "per_video"
    fps: float | None = None
    """Frames a second of what is written; None keeps the recording's own."""
    smooth: bool = False
    """Smooths landmarks with a 1 € filter."""
    track: TrackSettings = dataclasses.field(default_factory=TrackSettings)
    jpeg_quality: int = 95
    memory_mb: int = 512
    """The decoded frames that a worker may hold."""

    def __post_init__(self) -> None:
        _check("fps", self.fps is None or 0 < self.fps <= 1000, "above 0 and at most 1000", self.fps)
        _check("detect-every", self.track.every_frames >= 1, "at least 1", self.track.every_frames)
        _check("max-gap", self.track.gap_frames >= 0, "at least 0", self.track.gap_frames)
        _check("min-detected", 0 < self.track.min_detected <= 1, "above 0 and at most 1", self.track.min_detected)
        _check("memory-mb", self.memory_mb >= 0, "at least 0", self.memory_mb)

    def identity(self) -> dict[str, Any]:
        """What decides about the bytes that are written, the models' content included."""
        shown = dataclasses.asdict(self)
        del shown["model_root"], shown["memory_mb"]
        files = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in pack_files(self.models, self.model_root)
        }
        return {"version": VERSION, **shown, "model_files": files}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a cohort."""

    prepared: int
    kept: int
    """How many of the prepared ones an earlier run had finished."""
    problems: list[Problem]
    warnings: list[str]
    detected: float
    """Share of all frames in which the face was seen."""


def prepare_cohort(
    videos: Path,
    out: Path,
    labels: Path,
    settings: PrepareSettings,
    *,
    trim: tuple[str, str] = ("start", "end"),
    test_patients: Sequence[str] | None = None,
    test_fraction: float = 0.25,
    seed: int = 0,
    resume: bool = False,
    with_images: bool = False,
    executor: Executor | None = None,
    workers: int = 1,
    progress: Progress = lambda done, total: None,
    say: Say = lambda text: None,
) -> Outcome:
    """Prepares all labelled recordings of a folder and writes the dataset, its CSV files and its report.

    Args:
        videos: folder of recordings.
        out: the prepared dataset; new or empty unless ``resume``.
        labels: see `qafe.faces.labels.read_labels`.
        trim: the columns of the labels that hold the first and the last second.
        test_patients: who is tested on; None draws them by their mean scores.
        test_fraction: the share of patients that is drawn.
        seed: of the draw.
        resume: keeps what an earlier run with the same settings finished.
        with_images: draws faces into the report.
        executor: runs the videos; None uses processes of this machine.
        workers: how many processes.
        progress: told (videos done, in all), of those that an earlier run had not finished.
        say: told one line for each problem, as it comes up.
    Raises:
        QafeError: nothing could be prepared; what concerns one video only is in the outcome instead.
        OSError: the output folder cannot be written.
    """
    if out.resolve().is_relative_to(videos.resolve()):
        raise ConfigError(f"the output must not lie in the folder of videos, got {out} in {videos}. Name another.")
    recordings, problems = read_labels(labels, videos, trim)
    for problem in problems:
        say(str(problem))
    test = _test_patients(recordings, test_patients, test_fraction, seed)
    FaceModels(settings.models, settings.model_root)
    with _claimed(out, settings.identity(), resume) as store:
        done: dict[str, Mapping[str, Any]] = {}
        jobs = []
        for recording in recordings:
            record = store.read_quality(recording.patient, recording.video)
            if record is not None and _is_finished(store, recording, record, videos):
                done[recording.id] = record
            else:
                jobs.append(recording)
        kept = len(done)
        task = functools.partial(prepare_video, videos=videos.resolve(), out=out.resolve(), settings=settings)
        failed: dict[str, Problem] = {}
        folders = (videos, out, settings.model_root)
        for count, (recording, result) in enumerate(each(task, jobs, executor, workers, folders), start=1):
            if isinstance(result, Problem):
                failed[recording.id] = result
                say(str(result))
            else:
                done[recording.id] = result
            progress(count, len(jobs))
        # In the labels' order, whichever came first.
        problems += [failed[recording.id] for recording in jobs if recording.id in failed]
        prepared = [recording for recording in recordings if recording.id in done]
        rows = [_row(recording, done[recording.id], recording.patient in test) for recording in prepared]
        warnings = [f"{row['source']}: {note}" for row in rows for note in row["notes"]]
        warnings += _changes(store, recordings, test)
        pictures = None
        if with_images:
            pictures = {f"{one.patient}/{one.video}": _sheet(store, one, done[one.id]) for one in prepared}
        refused = [dataclasses.asdict(problem) for problem in problems]
        shown = settings.identity() | {"test_patients": sorted(test)}
        write_report(out, Report(videos=rows, refused=refused, settings=shown), pictures)
        _write_tables(store, prepared, done, test)
    frames = sum(row["frames"] for row in rows)
    seen = sum(row["detected"] * row["frames"] for row in rows)
    return Outcome(len(rows), kept, problems, warnings, seen / frames if frames else 0.0)


def prepare_video(recording: Recording, *, videos: Path, out: Path, settings: PrepareSettings) -> dict[str, Any]:
    """Prepares one recording and files it; returns its record.

    Raises:
        MediaError: the recording cannot be read.
        FaceError: its face cannot be followed.
    """
    cv2.setNumThreads(1)
    job = _job(videos, recording)
    video = Video(
        videos / recording.source,
        resample_hz=settings.fps,
        start_s=recording.start_s,
        end_s=recording.end_s,
        source_hz=recording.source_hz,
        memory_mb=settings.memory_mb,
    )
    track = follow(video, _models(settings.models, settings.model_root), settings.track)
    sizes = np.sqrt((track.boxes[:, 2:] - track.boxes[:, :2]).prod(axis=1))
    landmarks = track.landmarks
    if settings.smooth:
        landmarks = one_euro(landmarks, video.hz or _DEFAULT_HZ, float(np.median(sizes)))
    boxes = crop_boxes(settings.crop, track.boxes, video.height_px, video.width_px)
    meter = Meter((video.height_px, video.width_px))
    clipped = 0

    def chunks() -> Iterator[tuple[Frame, Floats]]:
        nonlocal clipped
        for indices, frames in _chunked(video.frames()):
            part = crop(frames, landmarks[indices], boxes[indices])
            clipped += part.clipped
            for index, face in zip(indices, part.frames, strict=True):
                meter.add(face, track.key_points[index] if track.found[index] else None)
            yield part.frames, part.landmarks

    store = Store(out)
    store.write_chunks(recording.patient, recording.video, chunks(), quality=settings.jpeg_quality)
    record = {
        "job": job,
        "frame_bytes": sum(size for _, size in store.frame_sizes(recording.patient, recording.video)),
        **_seen(video, track),
        "face_size_px": float(np.median(sizes)),
        "face_size_range_px": np.percentile(sizes, [5, 95]).tolist(),
        "clipped_points": clipped / landmarks[..., 0].size,
        **meter.summary(),
    }
    record = {key: _plain(value) for key, value in record.items()}
    store.write_quality(recording.patient, recording.video, record)
    return record


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
    with _locked(store):
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


@functools.lru_cache(maxsize=1)
def _models(name: str, root: Path) -> FaceModels:
    return FaceModels(name, root)


def _add_landmarks_to(video: tuple[str, str], *, root: Path, settings: PrepareSettings) -> tuple[int, int]:
    """Finds landmarks in published crops; (frames looked at for a face, how many of them show one).

    Such a crop is the detector's own box, stretched to a square. So its shape is given back, and the landmark network
    is shown the box; the detector only confirms, now and then, that a face fills it.
    """
    cv2.setNumThreads(1)
    store, models = Store(root), _models(settings.models, settings.model_root)
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
        landmarks = one_euro(landmarks, settings.fps or _DEFAULT_HZ, float(height))
    store.write_landmarks(*video, np.clip(landmarks, 0, height - 1))
    return looks, filled


def _job(videos: Path, recording: Recording) -> dict[str, Any]:
    """What a record was made from: a recording with another content or trim is prepared anew."""
    path = videos / recording.source
    shown = {
        "source": recording.source,
        "start_s": recording.start_s,
        "end_s": recording.end_s,
        "source_hz": recording.source_hz,
    }
    if path.is_dir():
        listing = sorted((entry.name, entry.stat().st_size) for entry in path.iterdir())
        return shown | {"bytes": sum(size for _, size in listing), "digest": _digest(repr(listing).encode())}
    size = path.stat().st_size
    with path.open("rb") as file:
        ends = file.read(1 << 20)
        file.seek(max(size - (1 << 20), 0))
        ends += file.read()
    return shown | {"bytes": size, "digest": _digest(ends)}


def _is_finished(store: Store, recording: Recording, record: Mapping[str, Any], videos: Path) -> bool:
    """Whether a record was made from this very recording, and what it tells of is still there."""
    sizes = [size for _, size in store.frame_sizes(recording.patient, recording.video)]
    # Frames are not fsynced, so a power cut may have left short ones.
    if len(sizes) != record.get("frames") or sum(sizes) != record.get("frame_bytes"):
        return False
    try:
        landmarks = store.landmark_count(recording.patient, recording.video)
        return landmarks == len(sizes) and record.get("job") == _job(videos, recording)
    except (OSError, ManifestError):
        return False


def _changes(store: Store, recordings: Sequence[Recording], test: set[str]) -> list[str]:
    """What a resumed folder holds that the labels no longer say; called before the report is written anew."""
    known = {(recording.patient, recording.video) for recording in recordings}
    notes = [
        f"frames/{patient}/{video}: an earlier run prepared it, and no usable label names it now. It is left out of "
        "the CSV files; delete it here, in landmarks/ and in quality/ if it must go"
        for patient, video in store.videos()
        if (patient, video) not in known
    ]
    try:
        before = json.loads((store.root / "report.json").read_bytes())["settings"]["test_patients"]
    except (OSError, ValueError, LookupError, TypeError):
        return notes
    if before != sorted(test):
        notes.append(
            f"the test patients are now {', '.join(sorted(test))}, and were {', '.join(before)}. To keep those, add "
            f"--test-patients {','.join(before)}"
        )
    return notes


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _seen(video: Video, track: Track) -> dict[str, Any]:
    missed = track.missed()
    return {
        "frames": len(video),
        "hz": video.hz,
        "source_hz": video.source_hz,
        "variable_rate": video.variable_rate,
        "duration_s": video.duration_s,
        "width_px": video.width_px,
        "height_px": video.height_px,
        "rotation_deg": video.rotation_deg,
        "detected": float(track.found.mean()),
        "missed_frames": missed,
        "longest_gap_frames": max((last - first + 1 for first, last in missed), default=0),
        "full_frame_detections": track.whole_frames / len(video),
        "window_detections": track.windows / len(video),
        "faces_most": track.faces_most,
        "notes": [*video.notes, *track.notes],
    }


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


def _row(recording: Recording, record: Mapping[str, Any], test: bool) -> dict[str, Any]:
    """A video's line in the report."""
    return {
        **{key: value for key, value in record.items() if key not in ("job", "frame_bytes")},
        "patient": recording.patient,
        "video": recording.video,
        "source": recording.source,
        "expression": recording.expression,
        "score": recording.score,
        "split": "test" if test else "train",
    }


def _test_patients(recordings: list[Recording], wanted: Sequence[str] | None, fraction: float, seed: int) -> set[str]:
    scores = scores_by_patient(recordings)
    if len(scores) < 2:
        raise ManifestError(
            f"a cohort must have at least 2 patients with usable labels (whole patients are kept for the test), got "
            f"{len(scores)}. Add rows to the labels."
        )
    if wanted is None:
        _check("test-fraction", 0 < fraction < 1, "between 0 and 1", fraction)
        return draw_patients(scores, fraction, seed)
    test = {name.replace("_", "-") for name in wanted}
    unknown = sorted(test - scores.keys())
    if unknown:
        raise ConfigError(
            f"test patients must be in the labels, got {', '.join(unknown)} (--test-patients). "
            f"Name some of {', '.join(sorted(scores))}."
        )
    if not test or len(test) == len(scores):
        raise ConfigError("there must be patients to test on and others to train on (--test-patients). Name some.")
    return test


def _write_tables(
    store: Store, prepared: list[Recording], done: Mapping[str, Mapping[str, Any]], test: set[str]
) -> None:
    rows = {
        split: [
            CsvRow(one.id, one.score, done[one.id]["frames"], one.expression)
            for one in prepared
            if (one.patient in test) == (split == "test")
        ]
        for split in ("train", "test")
    }
    for split, missing in rows.items():
        if not missing:
            raise ManifestError(
                f"a prepared dataset needs videos on both sides, and no {split} patient's could be prepared. "
                "Mend what report.html names, or choose other patients (--test-patients), and add --resume."
            )
    store.write_csv("train", rows["train"], CSV_NAME)
    store.write_csv("test", rows["test"], CSV_NAME)


def _sheet(store: Store, recording: Recording, record: Mapping[str, Any]) -> bytes:
    count = record["frames"]
    chosen = np.unique(np.linspace(0, count - 1, _SHEET_FRAMES).round().astype(int))
    landmarks = store.read_landmarks(recording.patient, recording.video)
    assert landmarks is not None
    crops = store.read_frames(recording.patient, recording.video, chosen, SIZE_PX)
    missed = [any(first <= index <= last for first, last in record["missed_frames"]) for index in chosen]
    return contact_sheet(list(crops), list(landmarks[chosen]), missed=missed, numbers=chosen.tolist())


def _chunked(frames: Iterable[tuple[int, Frame]]) -> Iterator[tuple[list[int], list[Frame]]]:
    indices: list[int] = []
    held: list[Frame] = []
    for index, frame in frames:
        indices.append(index)
        held.append(frame)
        if len(held) == _CHUNK_FRAMES:
            yield indices, held
            indices, held = [], []
    if held:
        yield indices, held


@contextlib.contextmanager
def _claimed(out: Path, identity: dict[str, Any], resume: bool) -> Iterator[Store]:
    """The output folder, for this run alone, made with these settings."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"the output must be a folder, got the file {out}. Name another.")
    store = Store.create(out)
    with _locked(store):
        kept = out / SETTINGS_FILE
        # A run that was killed right at its start may have left no more than the beginning of its settings.
        used = any(not entry.name.startswith(f".{SETTINGS_FILE}.") for entry in out.iterdir())
        if used and not resume:
            step = "Add --resume to go on with it" if kept.is_file() else "Name another"
            raise ConfigError(f"the output folder must be new or empty, got {out}. {step}.")
        text = json.dumps(identity, indent=1, sort_keys=True) + "\n"
        if used:
            _check_same(kept, json.loads(text), out)
        else:
            write_file(kept, text.encode())
        store.clear_leftovers()
        yield store


@contextlib.contextmanager
def _locked(store: Store) -> Iterator[None]:
    descriptor = os.open(store.root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        os.close(descriptor)
        raise ConfigError(f"one run at a time may write to {store.root}, and another is. Wait for it.") from err
    except OSError:
        _log.warning("%s: this disk knows no locks, see to it that no other run writes there", store.root)
    try:
        yield
    finally:
        os.close(descriptor)


def _check_same(kept: Path, now: dict[str, Any], out: Path) -> None:
    try:
        before = json.loads(kept.read_bytes())
        then = before | before["track"]
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigError(
            f"--resume goes on with a folder that prepare has begun, and {out} is none. Name another."
        ) from None
    for key, flag in _FLAGS.items():
        value = (now | now["track"])[key]
        if then.get(key) != value:
            raise ConfigError(
                f"--resume needs the settings that {out} was begun with: {then.get(key)} there, {value} now ({flag}). "
                "Give the same, or name another folder."
            )
    if before.get("model_files") != now["model_files"]:
        raise ConfigError(
            f"--resume needs the model files that {out} was begun with, and some of {now['models']!r} have changed "
            "since (--models, --model-root). Put the old ones back, or name another folder."
        )
    if before != now:
        raise ConfigError(f"--resume needs the version of prepare that {out} was begun with. Name another folder.")


def _check(name: str, holds: bool, rule: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"--{name} must be {rule}, got {value!r}. Correct it.")
