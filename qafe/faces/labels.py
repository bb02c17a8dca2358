"""The labels of a cohort's recordings: a CSV file and a folder of videos -> what is to be prepared.

A row that cannot be used is a problem of its own, told in one line; the other rows are prepared all the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import ManifestError
from ..tables import EXPRESSION_RULE, finite, is_expression_name, read_rows
from .video import IMAGE_SUFFIXES, SUFFIXES

COLUMNS = ("video", "expression", "score")
"""What labels.csv must have; ``patient``, ``fps`` and the columns of the trim are taken where they are."""


@dataclass(frozen=True, slots=True)
class Recording:
    """One row of the labels: a part of a recording that shows one expression of one patient."""

    patient: str
    """Names the folder; without underscores, since ids are ``<video>_<patient>``."""
    video: str
    """Names the folder below it: the file's name, with the trim where there is one."""
    source: str
    """The file or folder, relative to the folder of videos."""
    expression: str
    score: float
    start_s: float | None
    end_s: float | None
    source_hz: float | None
    """The frame rate that the labels give, stronger than the file's."""
    code: str = ""
    """The patient as the labels or the folders write it."""

    @property
    def id(self) -> str:
        """As in a prepared dataset's CSV."""
        return f"{self.video}_{self.patient}"


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a video is not, or not fully, in the prepared dataset."""

    video: str
    """The file, as the labels or the folder name it."""
    patient: str
    reason: str

    def __str__(self) -> str:
        return f"{self.video}: {self.reason}"


def read_labels(
    path: Path, videos: Path, trim: tuple[str, str] = ("start", "end")
) -> tuple[list[Recording], list[Problem]]:
    """Reads the labels and finds their videos.

    Args:
        path: CSV with the columns video, expression, score and, unless videos lie at ``<patient>/...``, patient;
            optionally ``fps`` (Hz) and the columns of the trim (seconds from the start of the recording).
        videos: the folder that holds the recordings.
        trim: names of the columns of the first and the last second.
    Raises:
        ManifestError: the file or the folder cannot be read, or the file has not the shape of such a table.
    """
    if not videos.is_dir():
        raise ManifestError(f"the videos must be in a folder, and there is none at {videos}. Name another.")
    rows = read_rows(path, COLUMNS, "a row for each video", ("score", "fps", *trim))
    for name in trim:
        if name not in ("start", "end") and name.lower() not in rows[0][1]:
            raise ManifestError(
                f"the columns of the trim must be in {path.name}, missing {name!r} in {','.join(rows[0][1])!r}. "
                "Correct --trim or the header."
            )
    there = sorted(_inventory(videos))
    recordings: list[Recording] = []
    problems: list[Problem] = []
    named: set[str] = set()
    lines: dict[str, list[int]] = {}
    for line, row in rows:
        place = f"{path.name} line {line}"
        source = _find(videos, row["video"], row.get("patient", ""))
        if source is not None:
            named.add(source)
        try:
            recording = _recording(row, source, place, trim)
        except ManifestError as err:
            problems.append(Problem(source or row["video"] or place, row.get("patient", ""), str(err)))
            continue
        recordings.append(recording)
        lines.setdefault(recording.id.casefold(), []).append(line)
    codes = {recording.patient.casefold(): recording.code for recording in reversed(recordings)}
    good = []
    for recording in recordings:
        same = lines[recording.id.casefold()]
        first = codes[recording.patient.casefold()]
        if len(same) > 1:
            reason = (
                f"a patient's videos must have different names, got {recording.video!r} again ({path.name} lines "
                f"{', '.join(map(str, same))}). Rename one, or delete the row that is wrong."
            )
        elif first != recording.code:
            reason = (
                f"patients must differ in more than case, - and _, got {recording.code!r} and {first!r} ({path.name} "
                f"line {same[0]}). Write both the same way if they are one person, else another code."
            )
        else:
            good.append(recording)
            continue
        problems.append(Problem(recording.source, recording.patient, reason))
    step = f"Add a row to {path.name}, or move the file away."
    for source in there:
        if source not in named:
            problems.append(Problem(source, "", f"a video must have a label, and {path.name} names none. {step}"))
    return good, problems


def scores_by_patient(recordings: list[Recording]) -> dict[str, list[float]]:
    """All scores of each patient, for the draw of the test patients."""
    scores: dict[str, list[float]] = {}
    for recording in recordings:
        scores.setdefault(recording.patient, []).append(recording.score)
    return scores


def _recording(row: dict[str, str], source: str | None, place: str, trim: tuple[str, str]) -> Recording:
    if not row["video"]:
        raise ManifestError(f"a row must name its video, got nothing ({place}, column video). Write its path.")
    if source is None:
        raise ManifestError(
            f"a label must have its video, and there is none of that name ({place}). "
            "Write its path below the folder of videos."
        )
    parts = PurePosixPath(source).parts
    code = row.get("patient") or (parts[0] if len(parts) > 1 else "")
    patient = code.replace("_", "-").strip(". ")
    if not patient or any(mark in patient for mark in "/\\\0"):
        raise ManifestError(
            f"a video must have a patient, got {row.get('patient', '')!r} ({place}, column patient). "
            "Write the patient's code, or file the video at <patient>/<video>."
        )
    if not row["expression"]:
        raise ManifestError(f"a video must show an expression, got nothing ({place}, column expression). Name it.")
    if not is_expression_name(row["expression"]):
        raise ManifestError(
            f"{EXPRESSION_RULE}, got {row['expression']!r} ({place}, column expression). "
            "Write another name, e.g. smile."
        )
    score = finite(row["score"])
    if score is None:
        raise ManifestError(
            f"a score must be a finite number, got {row['score']!r} ({place}, column score). Write e.g. 2.5, with a "
            "point where commas stand between the cells."
        )
    start_s, end_s, source_hz = (_cell(row, name, place) for name in (*trim, "fps"))
    name = parts[-1]
    if PurePosixPath(name).suffix.lower() in SUFFIXES:
        name = PurePosixPath(name).stem
    if start_s is not None or end_s is not None:
        name += f"-{start_s or 0:g}-{'end' if end_s is None else format(end_s, 'g')}"
    return Recording(patient, name.strip(". "), source, row["expression"], score, start_s, end_s, source_hz, code)


def _cell(row: dict[str, str], name: str, place: str) -> float | None:
    text = row.get(name.lower(), "")
    if not text:
        return None
    value = finite(text)
    if value is None or value < 0:
        raise ManifestError(
            f"{name} must be a number of at least 0 or empty, got {text!r} ({place}, column {name}). Correct it."
        )
    return value


def _inventory(videos: Path) -> Iterator[str]:
    """Every video file, and every folder that holds images, as paths below the folder of videos."""
    for folder, folders, files in os.walk(videos):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        place = Path(folder).relative_to(videos)
        shown = [name for name in files if not name.startswith(".")]
        if place.parts and any(name.lower().endswith(IMAGE_SUFFIXES) for name in shown):
            yield place.as_posix()
        for name in shown:
            if name.lower().endswith(SUFFIXES):
                yield (place / name).as_posix()


def _find(videos: Path, cell: str, patient: str) -> str | None:
    """The path below ``videos`` that a cell means: as it stands, below the patient, or without its suffix."""
    root = videos.resolve()
    for candidate in (PurePosixPath(cell), PurePosixPath(patient) / cell):
        if not cell or not candidate.parts or candidate.is_absolute() or ".." in candidate.parts:
            continue
        exact = root / candidate
        if os.path.exists(exact):  # unlike Path.exists, also False for a name that is too long
            return candidate.as_posix()
        if not os.path.isdir(exact.parent):
            continue
        found = [path for path in exact.parent.iterdir() if path.stem == exact.name and path.suffix.lower() in SUFFIXES]
        if len(found) == 1:
            return candidate.with_name(found[0].name).as_posix()
    return None
