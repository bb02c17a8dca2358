"""qafe/data/manifest.py: good files give samples, every fault its own message."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qafe.data.manifest import read_manifest
from qafe.errors import ManifestError
from qafe.store import Store
from tests.data.cohort import real_faces, write_cohort

HEADER = "id,label,frames,class\n"


def test_reads_samples(tmp_path: Path) -> None:
    manifest = read_manifest(write_cohort(tmp_path))
    assert manifest.name == "own"
    assert (len(manifest.train), len(manifest.test)) == (8, 4)
    first = manifest.train[0]
    assert (first.id, first.patient, first.video) == ("clip01smile_P1", "P1", "clip01smile")
    assert (first.expression, first.score, first.frames) == ("smile", 1.0, 12)
    assert manifest.expressions == ("smile", "frown")


def test_other_expressions_and_labels(tmp_path: Path) -> None:
    store = write_cohort(tmp_path)
    (tmp_path / "own_train.csv").write_text(
        "\ufeffclass, ID ,label,frames\nspeech,clip01smile_P1,-2.5,12\n\n"
        "7,clip02smile_P2,10,12\n0,clip03frown_P3,1e1,12\n"
    )
    manifest = read_manifest(store)
    assert [(s.expression, s.score) for s in manifest.train] == [("speech", -2.5), ("7", 10), ("sit_at_rest", 10)]
    assert manifest.expressions == ("sit_at_rest", "smile", "frown", "7", "speech")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_tables_from_a_spreadsheet(tmp_path: Path, encoding: str) -> None:
    store = write_cohort(tmp_path)
    plain = read_manifest(store)
    for split in ("train", "test"):
        path = tmp_path / f"own_{split}.csv"
        header, *rows = path.read_text().splitlines()
        lines = [header.replace(",", ";") + ";Größe"]
        for identity, label, frames, kind in (row.split(",") for row in rows):
            lines.append(";".join([identity, f"{float(label):.1f}".replace(".", ","), frames, kind, ""]))
        path.write_bytes("\r\n".join(lines).encode(encoding))
    manifest = read_manifest(store)
    assert (manifest.train, manifest.test) == (plain.train, plain.test)


def test_published_video_rule(tmp_path: Path) -> None:
    store = write_cohort(tmp_path)
    csv = tmp_path / "own_train.csv"
    csv.write_text(HEADER + "clip01smile-again_P1,1,12,1\n")
    assert read_manifest(store).train[0].video == "clip01smile"


def _edit(old: str, new: str) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        path = root / "own_train.csv"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return edit


def _only(text: str) -> Callable[[Path], None]:
    return lambda root: [(root / "own_train.csv").write_text(text), None][1]


def _drop(*parts: str) -> Callable[[Path], None]:
    def drop(root: Path) -> None:
        path = root.joinpath(*parts)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return drop


def _short_landmarks(root: Path) -> None:
    np.save(root / "landmarks" / "P1" / "clip01frown.npy", np.zeros((11, 106, 2), np.float32))


def _odd_landmarks(root: Path) -> None:
    np.save(root / "landmarks" / "P1" / "clip01frown.npy", np.zeros((12, 68, 2), np.float32))


ROW = "clip01frown_P1,1,12,2"  # line 3

FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no file": (_drop("own_train.csv"), r"exactly one \*_train\.csv, got none"),
    "empty file": (_only(""), r"own_train\.csv must start with a header, and is empty"),
    "no rows": (_only(HEADER), r"own_train\.csv must have at least one row"),
    "not text": (lambda root: [(root / "own_train.csv").write_bytes(b"\xff\xfe\x00"), None][1], "must be text"),
    "columns": (_edit("frames,class", "frames"), r"own_train\.csv line 1: .*missing class"),
    "cells": (_edit(ROW, "clip01frown_P1,1,12"), r"own_train\.csv line 3: a row must have 4 values.*got 3"),
    "id": (_edit("clip01frown_P1", "clip01frown"), r"own_train\.csv line 3: an id must be <video>_<patient>"),
    "id twice": (_edit("clip01frown_P1", "clip01smile_P1"), r"line 3: an id must occur once.*own_train\.csv line 2"),
    "label": (_edit(ROW, "clip01frown_P1,mild,12,2"), r"line 3: a label must be a finite number, got 'mild'"),
    "label nan": (_edit(ROW, "clip01frown_P1,nan,12,2"), r"line 3: a label must be a finite number, got 'nan'"),
    "label inf": (_edit(ROW, "clip01frown_P1,inf,12,2"), r"line 3: a label must be a finite number, got 'inf'"),
    "label with _": (_edit(ROW, "clip01frown_P1,1_5,12,2"), r"line 3: a label must be a finite number, got '1_5'"),
    "frames text": (_edit(ROW, "clip01frown_P1,1,many,2"), r"line 3: frames must be a whole number.*'many'"),
    "frames zero": (_edit(ROW, "clip01frown_P1,1,0,2"), r"line 3: frames must be a whole number.*'0'"),
    "frames count": (_edit(ROW, "clip01frown_P1,1,13,2"), r"line 3: frames must be the number.*is 12, got 13"),
    "class": (_edit(ROW, "clip01frown_P1,1,12,"), r"line 3: class must be"),
    "class with a slash": (
        _edit(ROW, "clip01frown_P1,1,12,a/b"),
        r"line 3: an expression's name .*, got 'a/b' \(class\)",
    ),
    "class all": (_edit(ROW, "clip01frown_P1,1,12,all"), r"line 3: an expression's name .*, got 'all' \(class\)"),
    "both sides": (
        _edit("clip01frown_P1", "clip05frown_P5"),
        r"own_test\.csv line 2: a patient must be in the training or the test CSV.*'P5'.*own_train\.csv line 3",
    ),
    "no frames": (_drop("frames", "P1", "clip01frown"), r"line 3: every video must have its frames.*P1/clip01frown"),
    "nothing to draw": (_drop("landmarks", "P1", "clip01frown.npy"), r"line 3: .*landmarks or rendered heatmaps"),
    "landmark count": (_short_landmarks, r"line 3: there must be landmarks for each of the 12 frames.*got 11"),
    "landmark shape": (_odd_landmarks, r"line 3: landmarks must be numbers of shape"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_a_message(tmp_path: Path, fault: str) -> None:
    store = write_cohort(tmp_path)
    spoil, message = FAULTS[fault]
    spoil(tmp_path)
    with pytest.raises(ManifestError, match=message) as caught:
        read_manifest(store)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")


def test_digest_follows_content_not_place(tmp_path: Path) -> None:
    digest = read_manifest(write_cohort(tmp_path / "a")).digest
    moved = shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert read_manifest(Store(moved)).digest == digest
    path = moved / "landmarks" / "P1" / "clip01smile.npy"
    points = np.load(path)
    points[0, 0, 0] += 1
    np.save(path, points)
    assert read_manifest(Store(moved)).digest != digest


def test_real_faces() -> None:
    manifest = read_manifest(Store(real_faces() / "prepared"))
    assert manifest.name == "real"
    assert len(manifest.train) + len(manifest.test) == 37
    assert {s.patient for s in manifest.train}.isdisjoint(s.patient for s in manifest.test)
