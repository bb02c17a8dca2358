"""A cohort of recordings -> a prepared dataset: faces followed, cropped, measured and filed.

Every video is prepared by itself and filed whole or not at all; its record in
``quality/`` is written last and says that it is done. So a run can be killed at any moment and taken up again, and
ends with the same bytes as one that was never disturbed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..config import ModelConfig
from ..errors import ConfigError, ManifestError
from ..store import CsvRow, Store
from ..strata import draw_patients
from .crop import SIZE_PX, crop, crop_boxes
from .detect import FaceModels
from .labels import Problem, Recording, read_labels, scores_by_patient
from .quality import Meter
from .report import Report, contact_sheet, write_report
from .settings import PrepareSettings, check_flag, claimed
from .subject import Floats, Frame
from .track import Track, follow, one_euro
from .video import Video
from .workers import each

CSV_NAME = "cohort"
_CHUNK_FRAMES = 16
_SHEET_FRAMES = 12
DEFAULT_HZ = 25.0
"""Of frames whose rate nobody knows."""

Progress = Callable[[int, int], None]
Say = Callable[[str], None]


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
    with claimed(out, settings.identity(), resume) as store:
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
    track = follow(video, face_models(settings.models, settings.model_root), settings.track)
    looked = len(video)
    video = video.part(track.cut_start_frames, looked - 1 - track.cut_end_frames)
    sizes = np.sqrt((track.boxes[:, 2:] - track.boxes[:, :2]).prod(axis=1))
    landmarks = track.landmarks
    if settings.smooth:
        landmarks = one_euro(landmarks, video.hz or DEFAULT_HZ, float(np.median(sizes)))
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
        **_seen(video, track, looked),
        "face_size_px": float(np.median(sizes)),
        "face_size_range_px": np.percentile(sizes, [5, 95]).tolist(),
        "clipped_points": clipped / landmarks[..., 0].size,
        **meter.summary(),
    }
    record = {key: _plain(value) for key, value in record.items()}
    store.write_quality(recording.patient, recording.video, record)
    return record


@functools.lru_cache(maxsize=1)
def face_models(name: str, root: Path) -> FaceModels:
    """The models, read once in each process."""
    return FaceModels(name, root)


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


def _seen(video: Video, track: Track, looked: int) -> dict[str, Any]:
    """What was seen in the frames that are kept, out of all that were looked at."""
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
        "cut_start_frames": track.cut_start_frames,
        "cut_end_frames": track.cut_end_frames,
        "full_frame_detections": track.whole_frames / looked,
        "window_detections": track.windows / looked,
        "faces_most": track.faces_most,
        "notes": [*video.notes, *track.notes, *_cut_note(video, track)],
    }


def _cut_note(video: Video, track: Track) -> Iterator[str]:
    def told(frames: int) -> str:
        return f"{frames} frames" + (f" ({frames / video.hz:.2f} s)" if video.hz else "")

    ends = {"start": track.cut_start_frames, "end": track.cut_end_frames}
    parts = [f"{told(frames)} at its {end}" for end, frames in ends.items() if frames]
    if parts:
        clip, short = ModelConfig().clip_frames, ""
        if len(video) < clip <= len(video) + sum(ends.values()):
            short = f" A published clip's {clip} frames repeat the {len(video)} that are left."
        yield f"cut {' and '.join(parts)} that do not surely show the face; --keep-ends keeps them.{short}"


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
        check_flag("test-fraction", 0 < fraction < 1, "between 0 and 1", fraction)
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
