"""The CSV files of a prepared dataset, read and checked: PFED5, UNBC or a cohort of one's own.

Source: the columns and the naming rule of PFED5 (arXiv:2312.00856). Differs: everything is checked before any
training starts, any expression name and any finite label are taken, and the dataset gets a digest.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from ..config import EXPRESSIONS
from ..errors import ManifestError
from ..store import CSV_COLUMNS, Split, Store
from ..tables import EXPRESSION_RULE, finite, is_expression_name, read_rows

SPLITS: tuple[Split, ...] = ("train", "test")


@dataclass(frozen=True, slots=True)
class Sample:
    """One video with its score."""

    id: str
    """``<video>_<patient>``, as in the CSV."""
    patient: str
    video: str
    expression: str
    """One of `qafe.config.EXPRESSIONS`, or a cohort's own name."""
    score: float
    frames: int


@dataclass(frozen=True)
class Manifest:
    """All samples of a prepared dataset."""

    name: str
    """What stands before ``_train.csv``."""
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    digest: str
    """sha256 over the content, the same wherever the folder lies; see `read_manifest`."""

    @property
    def expressions(self) -> tuple[str, ...]:
        """The expressions that occur: PFED5's in their order, then others by name."""
        found = {sample.expression for sample in (*self.train, *self.test)}
        known = [name for name in EXPRESSIONS if name in found]
        return (*known, *sorted(found - set(known)))


def read_manifest(store: Store) -> Manifest:
    """Reads both CSV files and checks every row against the files on disk.

    No frame is opened: frames are counted, landmark files are read for their header and their hash. The digest
    covers both CSV files, and for every video the names and byte sizes of its frames and the content of its
    landmark file (or the number of its rendered heatmaps); a frame that is replaced by another of the same size
    to the byte goes unnoticed.

    Raises:
        ManifestError: a file, column, row or video is not as it must be; the message names file and line.
    """
    digest = hashlib.sha256()
    samples: dict[Split, tuple[Sample, ...]] = {}
    lines: dict[str, str] = {}
    patients: dict[str, tuple[Split, str]] = {}
    for split in SPLITS:
        path = store.csv_path(split)
        found = []
        for line, row in read_rows(path, CSV_COLUMNS, "a row for each video", ("label",)):
            place = f"{path.name} line {line}"
            sample = _read_sample(store, row, place)
            if sample.id in lines:
                raise ManifestError(
                    f"{place}: an id must occur once, got {sample.id!r} again (first in {lines[sample.id]}). "
                    "Delete one of the two rows."
                )
            lines[sample.id] = place
            side, first = patients.setdefault(sample.patient, (split, place))
            if side != split:
                raise ManifestError(
                    f"{place}: a patient must be in the training or the test CSV, not in both, got patient "
                    f"{sample.patient!r} (first in {first}). Move all videos of the patient to one side."
                )
            _check_video(store, sample, place, digest)
            found.append(sample)
        digest.update(path.read_bytes())
        samples[split] = tuple(found)
    name = store.csv_path("train").name.removesuffix("_train.csv")
    return Manifest(name=name, train=samples["train"], test=samples["test"], digest=digest.hexdigest())


def _read_sample(store: Store, row: dict[str, str], place: str) -> Sample:
    try:
        patient, video = store.resolve_video(row["id"])
    except ManifestError as err:
        raise ManifestError(f"{place}: {err}") from err
    score = finite(row["label"])
    if score is None:
        raise ManifestError(
            f"{place}: a label must be a finite number, got {row['label']!r} (label). "
            "Write the clinician's score, e.g. 2.5, with a point where commas stand between the cells."
        )
    try:
        frames = int(row["frames"])
    except ValueError:
        frames = 0
    if frames < 1:
        raise ManifestError(
            f"{place}: frames must be a whole number of at least 1, got {row['frames']!r} (frames). "
            "Write the number of JPEGs of the video."
        )
    if not row["class"]:
        raise ManifestError(
            f"{place}: class must be PFED5's index 0-4 or an expression's name, got nothing (class). "
            "Write e.g. 1 or smile."
        )
    return Sample(row["id"], patient, video, _expression(row["class"], place), score, frames)


def _expression(text: str, place: str) -> str:
    if text in map(str, range(len(EXPRESSIONS))):
        return EXPRESSIONS[int(text)]
    if not is_expression_name(text):
        raise ManifestError(f"{place}: {EXPRESSION_RULE}, got {text!r} (class). Write another name, e.g. smile.")
    return text


def _check_video(store: Store, sample: Sample, place: str, digest: hashlib._Hash) -> None:
    where = f"{sample.patient}/{sample.video}"
    sizes = store.frame_sizes(sample.patient, sample.video)
    if not sizes:
        raise ManifestError(
            f"{place}: every video must have its frames, found no JPEG in frames/{where}. "
            "Run python -m qafe prepare, or delete the row."
        )
    if len(sizes) != sample.frames:
        raise ManifestError(
            f"{place}: frames must be the number of JPEGs in frames/{where}, which is {len(sizes)}, "
            f"got {sample.frames} (frames). Correct the row or prepare the video again."
        )
    digest.update(f"{where} {sizes}\n".encode())
    try:
        points = store.landmark_count(sample.patient, sample.video)
    except ManifestError as err:
        raise ManifestError(f"{place}: {err}") from err
    if points is None:
        points = store.rendered_count(sample.patient, sample.video)
        if not points:
            raise ManifestError(
                f"{place}: a video must have landmarks or rendered heatmaps, found neither "
                f"landmarks/{where}.npy nor landmarks_heatmap/{where}. "
                "Run python -m qafe prepare --landmarks-only DIR."
            )
        kind = "rendered heatmaps"
        digest.update(f"rendered {points}\n".encode())
    else:
        kind = "landmarks"
        digest.update(hashlib.sha256(store.landmarks_path(sample.patient, sample.video).read_bytes()).digest())
    if points != sample.frames:
        raise ManifestError(
            f"{place}: there must be {kind} for each of the {sample.frames} frames of {where}, got {points}. "
            "Run python -m qafe prepare --landmarks-only DIR."
        )
