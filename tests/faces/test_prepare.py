"""``python -m qafe prepare``: what comes out, what is refused, and that nothing is lost when it is killed."""

import contextlib
import csv
import fcntl
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest

from qafe.__main__ import main
from qafe.data.manifest import read_manifest
from qafe.errors import FaceError
from qafe.faces import landmarks_only, prepare
from qafe.faces.prepare import prepare_cohort
from qafe.faces.settings import PrepareSettings
from qafe.faces.video import Video
from qafe.faces.workers import Workers
from qafe.store import Store
from tests.conftest import QUICK_FLAGS
from tests.data.cohort import real_faces, video_frames, video_landmarks

from . import fakes
from .fakes import wait_for, write_clip
from .models import PACK, model_root
from .test_video import ROTATIONS, patch, remuxed

ROOT = Path(__file__).parents[2]
LABELS = "labels.csv"


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, and every folder."""
    found = {
        path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else b"" for path in root.rglob("*")
    }
    assert len(found) > 10
    return found


def times(root: Path) -> dict[str, int]:
    """When each file of the prepared videos was written."""
    return {
        path.relative_to(root).as_posix(): path.stat().st_mtime_ns
        for room in ("frames", "landmarks", "quality")
        for path in (root / room).rglob("*")
        if path.is_file()
    }


def write_labels(folder: Path, *rows: str, header: str = "video,expression,score") -> Path:
    path = folder / LABELS
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


# ---------------------------------------------------------------- without models


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command runs in threads of this process and finds a face in every frame that is not black."""
    pytest.importorskip("albumentations", reason="the extra faces is not installed")
    models = fakes.FakeModels()
    for module in (prepare, landmarks_only):
        monkeypatch.setattr(module, "FaceModels", lambda *_: models)
        monkeypatch.setattr(module, "face_models", lambda *_: models)
    monkeypatch.setattr("qafe.faces.workers.Workers", ThreadPoolExecutor)


@pytest.fixture
def cohort(tmp_path: Path, faked: None) -> Path:
    """A folder with videos/ of four patients and labels.csv."""
    for patient in range(1, 5):
        write_clip(tmp_path / "videos" / f"P{patient}" / "visit.mp4", 20 + patient)
    write_labels(tmp_path, *(f"P{patient}/visit.mp4,smile,{patient}.5" for patient in range(1, 5)))
    return tmp_path


def run(folder: Path, *flags: str, out: str = "out") -> int:
    return main(["prepare", str(folder / "videos"), str(folder / out), "--labels", str(folder / LABELS), *flags])


def refusals(err: str) -> list[str]:
    assert "Traceback" not in err
    return [line.removeprefix("refused: ") for line in err.splitlines() if line.startswith("refused: ")]


def error(err: str) -> str:
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


def test_a_cohort_is_prepared(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cohort) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].startswith("4 videos prepared, 0 refused; the face was detected in 100.0 %")
    manifest = read_manifest(Store(cohort / "out"))
    samples = {sample.patient: sample for sample in (*manifest.train, *manifest.test)}
    assert {name: (one.score, one.frames, one.expression) for name, one in samples.items()} == {
        f"P{patient}": (patient + 0.5, 20 + patient, "smile") for patient in range(1, 5)
    }
    train, test = ({sample.patient for sample in side} for side in (manifest.train, manifest.test))
    assert len(train) == len(test) == 2
    assert not train & test


def test_train_runs_on_it(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"P{patient}/visit.mp4,nod,{patient % 5}.25,0,0.3" for patient in range(1, 11)]
    rows += [f"P{patient}/visit.mp4,nod,{patient % 3}.5,0.3," for patient in range(1, 11)]
    write_labels(cohort, *rows, header="video,expression,score,start,end")
    for patient in range(1, 11):
        write_clip(cohort / "videos" / f"P{patient}" / "visit.mp4", 20)
    assert run(cohort) == 0
    assert main(["train", "--data-root", str(cohort / "out"), "--preset", "tiny", *QUICK_FLAGS]) == 0
    assert "QAFE-Net (test, Spearman x 100) | nod " in capsys.readouterr().out


def test_every_bad_input_gets_one_line_and_the_others_are_prepared(
    cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    av = pytest.importorskip("av")
    videos = cohort / "videos"
    (videos / "zero.mp4").touch()
    data = write_clip(videos / "empty.mp4", 20).read_bytes()
    size = struct.unpack(">I", data[data.index(b"mdat") - 4 : data.index(b"mdat")])[0]
    patch(videos / "empty.mp4", b"mdat", 0, bytes(size - 8))
    with av.open(str(videos / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        sound.sample_rate, sound.pts = 16000, 0
        file.mux(stream.encode(sound))
        file.mux(stream.encode())
    write_clip(videos / "dark.mp4", 20, light=0)
    write_clip(videos / "one.mp4", 1)
    (cohort / "still").mkdir()
    remuxed(cohort / "still", "still.mkv", lambda number: (0, 0)).rename(videos / "still.mkv")
    write_clip(videos / "turned.mp4", 20)
    patch(videos / "turned.mp4", b"tkhd", 40, struct.pack(">9i", *ROTATIONS[90]))
    write_clip(videos / "P1" / "unlabelled.avi", 20)
    for name in ("same.mp4", "same.avi", "words.mp4", "Pä tient é/lä  cheln.mp4"):
        write_clip(videos / name, 20)
    (videos / "P5" / "images").mkdir(parents=True)
    for index, frame in Video(videos / "same.mp4").frames():
        cv2.imwrite(str(videos / "P5" / "images" / f"{index}.png"), frame)
    rows = [f"P{patient}/visit.mp4,,smile,{patient}" for patient in range(1, 5)]
    singles = ("zero.mp4", "empty.mp4", "sound.mp4", "dark.mp4", "one.mp4", "still.mkv", "turned.mp4", "none.mp4")
    rows += [f"{name},Q{number},smile,1" for number, name in enumerate(singles)]
    rows += ["same.mp4,Q8,smile,1", "same.avi,Q8,smile,2", "words.mp4,Q9,smile,severe"]
    rows += ["Pä tient é/lä  cheln.mp4,,Lächeln,1.25", "P5/images,,smile,2"]
    write_labels(cohort, *rows, header="video,patient,expression,score")

    assert run(cohort) == 2
    printed = capsys.readouterr()
    lines = dict(line.split(": ", 1) for line in refusals(printed.err))
    assert {name: words in lines.get(name, "") for name, words in BAD.items()} == dict.fromkeys(BAD, True), lines
    assert sorted(lines) == sorted(BAD)
    assert len(refusals(printed.err)) == len(BAD)
    assert [line for line in printed.err.splitlines() if line.startswith("note: ")] == [
        "note: turned.mp4: rotated by 90 degrees as its metadata say, shown upright"
    ]
    assert printed.out.splitlines()[0].startswith(f"7 videos prepared, {len(BAD)} refused")
    manifest = read_manifest(Store(cohort / "out"))
    samples = {sample.id: sample for sample in (*manifest.train, *manifest.test)}
    assert samples["lä  cheln_Pä tient é"].expression == "Lächeln"
    assert samples["lä  cheln_Pä tient é"].score == 1.25
    assert {"images_P5", "turned_Q6"} < samples.keys()
    report = json.loads((cohort / "out" / "report.json").read_text())
    assert {row["video"] for row in report["refused"]} == set(BAD)
    assert_no_path(cohort / "out", cohort)


BAD = {
    "zero.mp4": "must not be empty, got 0 bytes",
    "empty.mp4": "must have frames that can be decoded",
    "sound.mp4": "sound only",
    "dark.mp4": "must show a face",
    "one.mp4": "at least 2 frames, got 1",
    "still.mkv": "timestamps of a video must increase",
    "none.mp4": "a label must have its video",
    "P1/unlabelled.avi": "a video must have a label",
    "same.mp4": "must have different names",
    "same.avi": "must have different names",
    "words.mp4": "must be a finite number, got 'severe'",
}


def assert_no_path(out: Path, place: Path) -> None:
    found = [path for path in out.rglob("*") if path.suffix in (".json", ".csv", ".html")]
    assert len(found) > 5
    for path in found:
        for name in (str(place), str(place.resolve()), str(ROOT), str(Path.home())):
            assert name.encode() not in path.read_bytes(), path


def test_fps_and_trims_give_the_right_number_of_frames(cohort: Path) -> None:
    write_clip(cohort / "videos" / "P5" / "long.mp4", 90)
    rows = ["P5/long.mp4,smile,1,,", "P5/long.mp4,smile,2,1,2", "P5/long.mp4,frown,3,2.5,"]
    rows += [f"P{patient}/visit.mp4,smile,{patient},," for patient in range(1, 5)]
    write_labels(cohort, *rows, header="video,expression,score,From,until")
    assert run(cohort, "--fps", "25", "--trim", "From,until", "--test-patients", "P1") == 0
    manifest = read_manifest(Store(cohort / "out"))
    frames = {sample.id: sample.frames for sample in manifest.train}
    assert frames["long_P5"] == 75
    assert frames["long-1-2_P5"] == 25
    assert frames["long-2.5-end_P5"] == 13
    record = Store(cohort / "out").read_quality("P5", "long-1-2")
    assert record is not None
    assert (record["hz"], record["source_hz"]) == (25, pytest.approx(30))
    assert run(cohort, "--trim", "From,until", out="as recorded") == 0
    record = Store(cohort / "as recorded").read_quality("P5", "long-1-2")
    assert record is not None
    assert record["frames"] == 30


@pytest.mark.parametrize(
    ("encoding", "delimiter"),
    [("utf-8", ";"), ("utf-8-sig", ";"), ("utf-8", "\t"), ("latin-1", ";"), ("cp1252", "\t"), ("utf-16", "\t")],
)
def test_what_a_spreadsheet_writes_gives_the_same_dataset(
    cohort: Path, encoding: str, delimiter: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [f"P{patient}/visit.mp4,Lächeln,{patient / 4},0.1,0.55,29.5" for patient in range(1, 5)]
    labels = write_labels(cohort, *rows, header="video,expression,score,from,until,fps")
    flags = ["--trim", "from,until", "--test-patients", "P1"]
    assert run(cohort, *flags, out="plain") == 0
    assert not caplog.records
    assert b"visit-0.1-0.55_P3,0.75,14," in (cohort / "plain" / "cohort_train.csv").read_bytes()
    lines = labels.read_text(encoding="utf-8").replace(",", delimiter).replace(".", ",").replace(",mp4", ".mp4")
    labels.write_bytes("\r\n".join(lines.splitlines()).encode(encoding))
    assert run(cohort, *flags) == 0
    assert tree(cohort / "out") == tree(cohort / "plain")
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{labels}: read with {'tabs' if delimiter != ';' else 'semicolons'} between")


ENDS = {
    "black": (range(30), (), 30, 0),
    "empty": ((), range(60, 75), 0, 15),
    "both": (range(30), range(60, 75), 30, 15),
}
"""Black and white frames out of 75, and how many are cut at both ends."""


@pytest.mark.parametrize("case", ENDS)
def test_a_recording_starts_before_the_patient_sits(
    cohort: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    black, white, start, end = ENDS[case]
    count = 75 - start - end
    videos = cohort / "videos"
    # Both begin with the same picture of three.
    write_clip(videos / "P1" / "ends.mkv", 75, black=black, white=white)
    write_clip(videos / "P1" / "plain.mkv", count)
    rows = ["P1/ends.mkv,smile,1", "P1/plain.mkv,smile,1"]
    write_labels(cohort, *rows, *(f"P{patient}/visit.mp4,smile,{patient}" for patient in range(1, 5)))
    flags = ["--with-images", "--smooth", "--test-patients", "P2"]
    assert run(cohort, *flags) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    parts = [
        f"{frames} frames ({frames / 30:.2f} s) at its {where}" for frames, where in ((start, "start"), (end, "end"))
    ]
    told = " and ".join(part for part in parts if not part.startswith("0 "))
    assert notes == [f"note: P1/ends.mkv: cut {told} that do not surely show the face; --keep-ends keeps them."]
    out, store = cohort / "out", Store(cohort / "out")
    ends, plain = (
        [path.read_bytes() for path in (*store.frame_paths("P1", name), store.landmarks_path("P1", name))]
        for name in ("ends", "plain")
    )
    assert len(ends) == count + 1
    assert ends == plain
    rows = {
        row["video"]: row for row in json.loads((out / "report.json").read_text())["videos"] if row["patient"] == "P1"
    }
    assert (rows["ends"]["cut_start_frames"], rows["ends"]["cut_end_frames"]) == (start, end)
    assert (rows["plain"]["cut_start_frames"], rows["plain"]["cut_end_frames"]) == (0, 0)
    for key in ("frames", "detected", "missed_frames", "longest_gap_frames", "brightness"):
        assert rows["ends"][key] == rows["plain"][key], key
    assert rows["ends"]["hz"] == rows["ends"]["source_hz"] == pytest.approx(30, abs=0.02)
    assert rows["ends"]["frames"] == count
    assert rows["ends"]["duration_s"] == pytest.approx(count / 30, abs=2e-3)
    assert max(rows["ends"]["full_frame_detections"], rows["ends"]["window_detections"]) <= 1
    assert {one.frames for one in read_manifest(store).train if one.video == "ends"} == {count}
    page = (out / "report.html").read_text()
    assert notes[0].partition("ends.mkv: ")[2] in page
    before, stamps = tree(out), times(out)
    assert run(cohort, *flags, "--resume") == 0
    assert (tree(out), times(out)) == (before, stamps)
    (out / "quality" / "P1" / "ends.json").unlink()
    assert run(cohort, *flags, "--resume") == 0
    assert tree(out) == before


def test_ends_are_cut_within_start_and_end_and_at_the_rate_asked_for(cohort: Path) -> None:
    write_clip(cohort / "videos" / "P1" / "ends.mkv", 150, black=range(30), white=range(120, 150))
    rows = ["P1/ends.mkv,smile,1,0.5,4.5,", "P1/ends.mkv,smile,1,2,3,", "P1/ends.mkv,smile,1,2,,15"]
    write_labels(
        cohort,
        *rows,
        *(f"P{n}/visit.mp4,smile,1,,," for n in range(1, 5)),
        header="video,expression,score,start,end,fps",
    )
    assert run(cohort, "--fps", "10") == 0
    store = Store(cohort / "out")
    found = {}
    for video in ("ends-0.5-4.5", "ends-2-3", "ends-2-end"):
        record = store.read_quality("P1", video)
        assert record is not None
        assert record["hz"] == 10
        assert len(store.frame_paths("P1", video)) == store.landmark_count("P1", video) == record["frames"]
        found[video] = (record["cut_start_frames"], record["frames"], record["cut_end_frames"], record["duration_s"])
    assert found == {
        "ends-0.5-4.5": (5, 30, 5, pytest.approx(3)),
        "ends-2-3": (0, 10, 0, pytest.approx(1)),
        # Read at 15 Hz the face comes and goes at twice the time: from 2 s, where it comes, to 8 s of 10.
        "ends-2-end": (0, 60, 20, pytest.approx(6)),
    }


def test_ends_are_kept_when_asked(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_clip(cohort / "videos" / "P1" / "visit.mp4", 100, black=range(10))
    write_clip(cohort / "videos" / "P2" / "visit.mp4", 100, black=range(30))
    assert run(cohort, "--keep-ends") == 2
    (line,) = refusals(capsys.readouterr().err)
    assert line.startswith(
        "P2/visit.mp4: the face may be out of sight for at most 12 frames in a row, got 30 (frames 0-29"
    )
    record = Store(cohort / "out").read_quality("P1", "visit")
    assert record is not None
    assert (record["frames"], record["missed_frames"], record["cut_start_frames"]) == (100, [[0, 9]], 0)
    assert run(cohort, "--resume") == 2
    assert "True there, False now (--keep-ends)" in error(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("black", "words"),
    [
        (range(40, 60), "got 20 (frames 40-59 of 100)"),
        ([*range(30), *range(60, 80)], "got 20 (frames 60-79 of 100)"),
        ([*range(20), *range(30, 100)], "there must be at least 16 frames, got 10 (frames 20-29 of 100)"),
        (range(100), "must show a face, found none in 8 frames spread over it"),
    ],
)
def test_what_cutting_does_not_mend(
    cohort: Path, black: Sequence[int], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_clip(cohort / "videos" / "P1" / "visit.mp4", 100, black=black)
    assert run(cohort) == 2
    (line,) = refusals(capsys.readouterr().err)
    assert line.startswith("P1/visit.mp4: ")
    assert words in line
    assert Store(cohort / "out").read_quality("P1", "visit") is None


def test_a_cut_below_a_published_clip_is_told(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_clip(cohort / "videos" / "P1" / "visit.mp4", 100, black=range(40))
    assert run(cohort) == 0
    assert "keeps them. A published clip's 80 frames repeat the 60 that are left." in capsys.readouterr().err


def test_the_split_honours_what_is_asked(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cohort, "--test-patients", "P2, P4", out="chosen") == 0
    assert {sample.patient for sample in read_manifest(Store(cohort / "chosen")).test} == {"P2", "P4"}
    for case, flags, words in (
        ("a", ["--test-patients", "P2,P9"], ["got P9", "P1, P2, P3, P4"]),
        ("b", ["--test-patients", ""], ["patients to test on"]),
        ("c", ["--test-patients", "P1,P2,P3,P4"], ["others to train on"]),
        ("d", ["--test-fraction", "1"], ["--test-fraction must be between 0 and 1"]),
    ):
        capsys.readouterr()
        assert run(cohort, *flags, out=case) == 2
        line = error(capsys.readouterr().err)
        assert all(word in line for word in words)
        assert not (cohort / case).exists()


def test_the_draw_does_not_depend_on_which_videos_failed(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_labels(cohort, *(f"P{patient}/visit.mp4,smile,{patient}" for patient in range(1, 9)))
    for patient in range(5, 9):
        write_clip(cohort / "videos" / f"P{patient}" / "visit.mp4", 20)
    sides = []
    for seed in ("0", "0", "1", "2"):
        assert run(cohort, "--seed", seed, out=f"whole{len(sides)}") == 0
        sides.append({sample.patient for sample in read_manifest(Store(cohort / f"whole{len(sides)}")).test})
    assert sides[0] == sides[1]
    assert len({frozenset(side) for side in sides}) > 1
    lost = min({f"P{patient}" for patient in range(1, 9)} - sides[0])
    (cohort / "videos" / lost / "visit.mp4").write_bytes(b"")
    assert run(cohort, out="less") == 2
    assert {sample.patient for sample in read_manifest(Store(cohort / "less")).test} == sides[0]


def test_nothing_left_to_test_on_is_told_and_reported(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cohort / "videos" / "P2" / "visit.mp4").write_bytes(b"")
    assert run(cohort, "--test-patients", "P2") == 2
    assert "no test patient's could be prepared" in error(capsys.readouterr().err)
    report = json.loads((cohort / "out" / "report.json").read_text())
    assert report["totals"]["prepared"] == 3
    assert [row["video"] for row in report["refused"]] == ["P2/visit.mp4"]
    assert not list((cohort / "out").glob("*.csv"))
    assert run(cohort, "--test-patients", "P1", "--resume") == 2
    assert capsys.readouterr().out.startswith("3 videos prepared (3 of them by an earlier run), 1 refused")


def test_all_bad_is_one_line_each_and_a_report(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (cohort / "videos").rglob("*.mp4"):
        path.write_bytes(b"")
    assert run(cohort) == 2
    printed = capsys.readouterr()
    assert len(refusals(printed.err)) == 4
    assert "no train patient's could be prepared" in error(printed.err)
    assert (cohort / "out" / "report.html").is_file()


# ---------------------------------------------------------------- going on


def test_resume_keeps_what_is_finished(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cohort) == 0
    before, stamps = tree(cohort / "out"), times(cohort / "out")
    assert run(cohort, "--resume", "--memory-mb", "1") == 0
    assert tree(cohort / "out") == before
    assert times(cohort / "out") == stamps
    assert "4 videos prepared (4 of them by an earlier run)" in capsys.readouterr().out


def test_a_changed_score_changes_tables_and_report_only(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--test-patients", "P1"]
    assert run(cohort, *flags) == 0
    before, stamps = tree(cohort / "out"), times(cohort / "out")
    labels = (cohort / LABELS).read_text()
    (cohort / LABELS).write_text(labels.replace("P3/visit.mp4,smile,3.5", "P3/visit.mp4,frown,0.25"))
    assert run(cohort, *flags, "--resume") == 0
    assert times(cohort / "out") == stamps
    after = tree(cohort / "out")
    assert {name for name in after if after[name] != before[name]} == {
        "cohort_train.csv",
        "report.html",
        "report.json",
    }
    assert b"visit_P3,0.25,23,2\n" in after["cohort_train.csv"]
    assert "note:" not in capsys.readouterr().err


@pytest.mark.parametrize("change", ["source", "fps", "landmarks", "short frame", "lost frame", "record"])
def test_what_changed_or_broke_is_prepared_anew(cohort: Path, change: str) -> None:
    flags = ["--test-patients", "P1"]
    header = "video,expression,score,fps"
    write_labels(cohort, *(f"P{patient}/visit.mp4,smile,1," for patient in range(1, 5)), header=header)
    out = cohort / "out"
    assert run(cohort, *flags) == 0
    before, stamps = tree(out), times(out)
    frame = out / "frames/P2/visit/img_00003.jpg"
    if change == "source":
        write_clip(cohort / "videos" / "P2" / "visit.mp4", 25)
    elif change == "fps":
        labels = (cohort / LABELS).read_text()
        (cohort / LABELS).write_text(labels.replace("P2/visit.mp4,smile,1,", "P2/visit.mp4,smile,1,50"))
    elif change == "landmarks":
        (out / "landmarks/P2/visit.npy").write_bytes(b"damaged")
    elif change == "short frame":
        frame.write_bytes(frame.read_bytes()[:100])
    elif change == "lost frame":
        frame.unlink()
    else:
        (out / "quality/P2/visit.json").write_text("{")
    assert run(cohort, *flags, "--resume") == 0
    after = times(out)
    assert {name.split("/")[1] for name in after if after[name] != stamps.get(name)} == {"P2"}
    count = 25 if change == "source" else 22
    assert len(Store(out).frame_paths("P2", "visit")) == Store(out).landmark_count("P2", "visit") == count
    if change not in ("source", "fps"):
        assert tree(out) == before


def test_a_changed_trim_makes_a_new_video_and_tells_of_the_old(
    cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header, flags = "video,expression,score,start,end", ["--test-patients", "P1"]
    rows = [f"P{patient}/visit.mp4,smile,1,0.1,0.5" for patient in range(1, 5)]
    write_labels(cohort, *rows, header=header)
    assert run(cohort, *flags) == 0
    stamps = times(cohort / "out")
    write_labels(cohort, *rows[:3], "P4/visit.mp4,smile,1,0.2,0.5", header=header)
    capsys.readouterr()
    assert run(cohort, *flags, "--resume") == 0
    assert "note: frames/P4/visit-0.1-0.5: an earlier run prepared it" in capsys.readouterr().err
    assert {
        name.split("/")[2].split(".json")[0].split(".npy")[0] for name in times(cohort / "out").keys() - stamps
    } == {"visit-0.2-0.5"}
    manifest = read_manifest(Store(cohort / "out"))
    assert [sample.id for sample in manifest.train] == ["visit-0.1-0.5_P2", "visit-0.1-0.5_P3", "visit-0.2-0.5_P4"]


def test_other_test_patients_than_before_are_told(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cohort, "--test-patients", "P1") == 0
    assert run(cohort, "--test-patients", "P2,P3", "--resume") == 0
    assert "note: the test patients are now P2, P3, and were P1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--fps", "25"], "None there, 25.0 now (--fps)"),
        (["--crop", "per_frame"], "per_video there, per_frame now (--crop)"),
        (["--smooth"], "(--smooth)"),
        (["--detect-every", "10"], "25 there, 10 now (--detect-every)"),
        (["--max-gap", "3"], "12 there, 3 now (--max-gap)"),
        (["--keep-ends"], "False there, True now (--keep-ends)"),
        (["--models", "other"], "buffalo_l there, other now (--models)"),
        (["--model-root", "elsewhere"], "model files"),
    ],
)
def test_resume_with_other_settings_is_refused(
    cohort: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cohort)
    (cohort / "elsewhere" / "models" / "buffalo_l").mkdir(parents=True)
    (cohort / "elsewhere" / "models" / "buffalo_l" / "det.onnx").write_bytes(b"another")
    root = [] if "--model-root" in flags else ["--model-root", "nowhere"]
    assert run(cohort, "--model-root", "nowhere") == 0
    before = tree(cohort / "out")
    capsys.readouterr()
    assert run(cohort, "--resume", *flags, *root) == 2
    assert words in error(capsys.readouterr().err)
    assert tree(cohort / "out") == before


def test_a_folder_of_an_older_version_is_not_gone_on_with(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cohort) == 0
    kept = cohort / "out" / "prepare.json"
    settings = json.loads(kept.read_text())
    del settings["track"]["keep_ends"]
    kept.write_text(json.dumps(settings | {"version": settings["version"] - 1}))
    assert run(cohort, "--resume") == 2
    assert "needs the version of prepare that" in error(capsys.readouterr().err)


def test_an_output_in_use_is_refused(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cohort) == 0
    before = tree(cohort / "out")

    def refused(out: str, *flags: str) -> str:
        capsys.readouterr()
        assert run(cohort, *flags, out=out) == 2
        return error(capsys.readouterr().err)

    assert "must be new or empty" in (line := refused("out"))
    assert "Add --resume" in line
    descriptor = os.open(cohort / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    for flags in ([], ["--resume"]):
        assert "one run at a time" in refused("out", *flags)
    os.close(descriptor)
    (cohort / "foreign").mkdir()
    (cohort / "foreign" / "thesis.txt").write_text("mine")
    assert "Name another." in refused("foreign")
    assert "a folder that prepare has begun" in refused("foreign", "--resume")
    for content in ("{", "[]", "{}", '{"track": 1}'):
        (cohort / "foreign" / "prepare.json").write_text(content)
        assert "a folder that prepare has begun" in refused("foreign", "--resume")
    assert sorted(path.name for path in (cohort / "foreign").iterdir()) == ["prepare.json", "thesis.txt"]
    assert "got the file" in refused(LABELS)
    assert "can be written" in refused(f"{LABELS}/out")
    assert "must not lie in the folder of videos" in refused("videos/out")
    assert "must not lie in the folder of videos" in refused("videos")
    assert tree(cohort / "out") == before


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_a_run_killed_at_its_very_start_can_be_repeated(cohort: Path, flags: list[str]) -> None:
    (cohort / "out").mkdir()
    (cohort / "out" / ".prepare.json.half").write_text("{")
    assert run(cohort, *flags) == 0
    assert run(cohort, out="undisturbed") == 0
    assert tree(cohort / "out") == tree(cohort / "undisturbed")


def test_a_disk_without_locks_is_told(
    cohort: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert run(cohort) == 0
    assert "knows no locks" in caplog.text


def test_a_full_disk_is_one_line(
    cohort: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "write_report", full)
    assert run(cohort) == 2
    assert "No space left on device" in error(capsys.readouterr().err)


class Backwards(Executor):
    """Runs the last call first."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self._waiting: list[tuple[Future[Any], Callable[[], Any], str]] = []
        self._count = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._waiting.append((future, lambda: fn(*args, **kwargs), args[0].source))
        if len(self._waiting) == 4:
            for one, call, name in reversed(self._waiting):
                self.order.append(name)
                try:
                    one.set_result(call())
                except Exception as err:
                    one.set_exception(err)
        return future


def test_problems_come_in_the_labels_order(cohort: Path) -> None:
    write_labels(cohort, *(f"P{patient}/visit.mp4,smile,1" for patient in (3, 1, 4, 2)), "P1/none.mp4,smile,1")
    for patient in (1, 3):
        (cohort / "videos" / f"P{patient}" / "visit.mp4").write_bytes(b"")
    outcomes, trees = [], []
    for executor in (Backwards(), ThreadPoolExecutor(1)):
        out, said = cohort / type(executor).__name__, []
        settings = PrepareSettings(model_root=cohort)
        outcomes.append(
            prepare_cohort(
                cohort / "videos",
                out,
                cohort / LABELS,
                settings,
                test_patients=["P2"],
                executor=executor,
                say=said.append,
            )
        )
        assert len(said) == 3
        trees.append(tree(out))
    assert [problem.video for problem in outcomes[0].problems] == ["P1/none.mp4", "P3/visit.mp4", "P1/visit.mp4"]
    assert outcomes[0] == outcomes[1]
    assert trees[0] == trees[1]


class Failing(ThreadPoolExecutor):
    """Fails at the first patient's video in a given way."""

    error: Exception

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if args[0].patient == "P1":
            future: Future[Any] = Future()
            future.set_exception(self.error)
            return future
        return super().submit(fn, *args, **kwargs)


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (BrokenProcessPool("gone"), "its process died twice"),
        (BrokenExecutor("gone"), "its process died twice"),
        (OSError(28, "No space left on device"), "the disk is full, got ENOSPC. Make room"),
        (ZeroDivisionError("three\nlines\nlong"), "an unexpected ZeroDivisionError"),
        (FaceError("models at {root}/models/x are gone. Mend it."), "models at models/x are gone."),
    ],
)
def test_what_befalls_one_video_ends_no_other(
    cohort: Path,
    failure: Exception,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if isinstance(failure, FaceError):
        failure = FaceError(str(failure).format(root=cohort / "packs"))
    monkeypatch.setattr("qafe.faces.workers.Workers", Failing)
    monkeypatch.setattr(Failing, "error", failure, raising=False)
    assert run(cohort, "--model-root", str(cohort / "packs")) == 2
    (line,) = refusals(capsys.readouterr().err)
    assert line.startswith("P1/visit.mp4: ")
    assert words in line
    manifest = read_manifest(Store(cohort / "out"))
    assert {sample.patient for sample in (*manifest.train, *manifest.test)} == {"P2", "P3", "P4"}
    assert_no_path(cohort / "out", cohort)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--workers", "0"], "--workers must be at least 1"),
        (["--fps", "0"], "--fps must be above 0"),
        (["--detect-every", "0"], "--detect-every must be at least 1"),
        (["--max-gap", "-1"], "--max-gap must be at least 0"),
        (["--min-detected", "nan"], "--min-detected must be above 0"),
        (["--memory-mb", "-1"], "--memory-mb must be at least 0"),
        (["--trim", "start"], "--trim must name two columns"),
        (["--labels", "nowhere.csv"], "nowhere.csv cannot be read"),
        (["--landmarks-only"], "1 folder(s) must be given, got 2"),
    ],
)
def test_a_wrong_flag_is_one_line(
    cohort: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cohort, *flags) == 2
    assert words in error(capsys.readouterr().err)
    assert not (cohort / "out").exists()


def test_missing_labels_and_videos(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(cohort / "videos"), str(cohort / "out")]) == 2
    assert "Add --labels labels.csv" in error(capsys.readouterr().err)
    (cohort / "videos").rename(cohort / "moved")
    assert run(cohort) == 2
    assert "the videos must be in a folder" in error(capsys.readouterr().err)
    assert not (cohort / "out").exists()


def test_missing_models_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("insightface", reason="the extra faces is not installed")
    for patient in ("P1", "P2"):
        write_clip(tmp_path / "videos" / patient / "a.mp4", 5)
    write_labels(tmp_path, "P1/a.mp4,smile,1", "P2/a.mp4,smile,2")
    (tmp_path / "models" / "pack").mkdir(parents=True)
    assert run(tmp_path, "--models", "pack", "--model-root", str(tmp_path)) == 2
    assert "must hold ONNX files" in error(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- processes


@pytest.fixture
def workers() -> Iterator[Callable[[int], Workers]]:
    made: list[Workers] = []

    def make(count: int) -> Workers:
        made.append(Workers(count))
        return made[-1]

    yield make
    for one in made:
        one.shutdown(cancel_futures=True)


def test_a_process_that_dies_costs_a_retry(tmp_path: Path, workers: Callable[[int], Workers]) -> None:
    running = workers(2)
    once = running.submit(fakes.die_once, tmp_path / "mark")
    other = running.submit(fakes.pid_after, 0.1)
    assert once.result(timeout=60) == "done"
    assert other.result(timeout=60) != os.getpid()
    (tmp_path / "dead").mkdir()
    always = running.submit(fakes.die, tmp_path / "dead")
    with pytest.raises(BrokenProcessPool):
        always.result(timeout=60)
    assert len(list((tmp_path / "dead").iterdir())) == 2
    with pytest.raises(ValueError, match="only mine"):
        running.submit(fakes.fail, "only mine").result(timeout=60)
    assert running.submit(fakes.pid_after, 0).result(timeout=60) != os.getpid()


def test_cancelling_ends_what_runs_at_once(tmp_path: Path) -> None:
    running = Workers(1)
    mark = tmp_path / "pid"
    first, second = running.submit(fakes.pid_after, 600, mark), running.submit(fakes.pid_after, 600)
    wait_for(lambda: mark.exists() and mark.read_text() != "")
    start = time.monotonic()
    running.shutdown(cancel_futures=True)
    assert time.monotonic() - start < 10
    assert second.cancelled()
    assert first.done()
    wait_for(lambda: not psutil.pid_exists(int(mark.read_text())))


def test_memory_does_not_grow_with_the_video(tmp_path: Path) -> None:
    pytest.importorskip("albumentations", reason="the extra faces is not installed")
    peaks = []
    for count in (20, 200):
        path = write_clip(tmp_path / f"{count}.mp4", count, size=(640, 480))
        line = [sys.executable, "-m", "tests.faces.fakes", str(tmp_path), path.name, str(tmp_path / "out")]
        (tmp_path / "out").mkdir(exist_ok=True)
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert len(Store(tmp_path / "out").frame_paths("P1", str(count))) == count
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    # All frames of the long one would take 176 MiB.
    assert peaks[1] < peaks[0] + 60, peaks


# ---------------------------------------------------------------- with real models and real faces

PEOPLE = {"P01": ("real0000s00", 18, 1.5), "P05": ("real0023s00", 16, 0.25), "P09": ("real0041s00", 17, 4.0)}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with videos/ of three people, less than a second each, one of them lying on the side; and labels.csv."""
    model_root()
    folder = tmp_path_factory.mktemp("Aufnahmen é 1")
    raw = real_faces() / "raw"
    for patient, (name, count, _) in PEOPLE.items():
        capture = cv2.VideoCapture(str(raw / patient / f"{name}.mp4"))
        frames = [capture.read()[1] for _ in range(count)]
        capture.release()
        if patient == "P09":
            frames = [np.ascontiguousarray(np.rot90(frame)) for frame in frames]
        path = folder / "videos" / patient / "visit 1.mp4"
        path.parent.mkdir(parents=True)
        height, width = frames[0].shape[:2]
        writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"mp4v"), 25, (width, height))
        for frame in frames:
            writer.write(frame)
        writer.release()
    patch(folder / "videos" / "P09" / "visit 1.mp4", b"tkhd", 40, struct.pack(">9i", *ROTATIONS[90]))
    write_labels(folder, *(f"{patient}/visit 1.mp4,speech,{score}" for patient, (_, _, score) in PEOPLE.items()))
    return folder


def line(clips: Path, out: Path, *flags: str) -> list[str]:
    places = [str(clips / "videos"), str(out), "--labels", str(clips / LABELS)]
    return ["prepare", *places, "--models", PACK, "--model-root", str(model_root()), *flags]


@contextlib.contextmanager
def started(arguments: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``python -m qafe`` in a session of its own, which is killed in the end."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "qafe", *arguments],
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def prepared(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clips' dataset, made without disturbance."""
    out = tmp_path_factory.mktemp("made") / "out"
    log = out.with_suffix(".log")
    with started(line(clips, out, "--workers", "2"), log) as process:
        assert process.wait(timeout=120) == 0, log.read_text()
    assert "note: P09/visit 1.mp4: rotated by 90 degrees" in log.read_text()
    return out


def test_real_clips_become_a_dataset(clips: Path, prepared: Path) -> None:
    store = Store(prepared)
    manifest = read_manifest(store)
    assert {(one.patient, one.score, one.frames, one.expression) for one in (*manifest.train, *manifest.test)} == {
        (patient, score, count, "speech") for patient, (_, count, score) in PEOPLE.items()
    }
    assert len({sample.patient for sample in manifest.test}) == 1
    for patient in PEOPLE:
        landmarks = store.read_landmarks(patient, "visit 1")
        assert landmarks is not None
        assert 60 < np.median(np.ptp(landmarks, axis=1)) < 256
    record = store.read_quality("P09", "visit 1")
    assert record is not None
    assert (record["width_px"], record["height_px"], record["rotation_deg"]) == (400, 246, 90)
    assert record["detected"] == 1
    for place in (clips, prepared, model_root()):
        assert_no_path(prepared, place)
    assert b"data:image/jpeg" not in (prepared / "report.html").read_bytes()
    with (prepared / "cohort_train.csv").open() as file:
        assert {row["class"] for row in csv.DictReader(file)} == {"speech"}


def test_real_recordings_that_begin_and_end_without_the_patient(clips: Path, prepared: Path, tmp_path: Path) -> None:
    videos, out = shutil.copytree(clips / "videos", tmp_path / "videos"), tmp_path / "out"
    shutil.copy(clips / LABELS, tmp_path)
    ends = {"P01": (26, 0), "P05": (0, 27), "P09": (26, 27)}
    for patient, (start, end) in ends.items():
        frames = [
            cv2.cvtColor(frame, cv2.COLOR_RGB2BGR) for _, frame in Video(videos / patient / "visit 1.mp4").frames()
        ]
        if patient == "P01":
            frames += [*frames[::-1], *frames, *frames[::-1]]  # a middle to take out below
        # An empty chair: the room's colours without a person.
        chair = cv2.GaussianBlur(frames[-1], (0, 0), 60)
        frames = [np.zeros_like(chair)] * start + frames + [chair] * end
        (videos / patient / "visit 1.mp4").unlink()
        folder = videos / patient / "visit 1"
        folder.mkdir()
        for number, frame in enumerate(frames):
            cv2.imwrite(str(folder / f"{number}.png"), frame)
    shutil.copytree(videos / "P01" / "visit 1", videos / "P02" / "gap")
    for number in range(26 + 28, 26 + 46):
        shutil.copy(videos / "P01" / "visit 1" / "0.png", videos / "P02" / "gap" / f"{number}.png")
    rows = [f"{patient}/visit 1,speech,{score},25" for patient, (_, _, score) in PEOPLE.items()]
    write_labels(tmp_path, *rows, "P02/gap,speech,1,25", header="video,expression,score,fps")
    log = tmp_path / "log"
    with started(line(tmp_path, out, "--workers", "2"), log) as process:
        assert process.wait(timeout=240) == 2, log.read_text()
    (refused,) = refusals(log.read_text())
    assert refused.startswith(
        "P02/gap: the face may be out of sight for at most 12 frames in a row, got 18 (frames 54-71"
    )
    for patient, (start, end) in ends.items():
        store, plain = Store(out), Store(prepared)
        record = store.read_quality(patient, "visit 1")
        assert record is not None
        count = PEOPLE[patient][1] * (4 if patient == "P01" else 1)
        assert (record["cut_start_frames"], record["frames"], record["cut_end_frames"]) == (start, count, end)
        assert record["hz"] == 25
        assert record["duration_s"] == pytest.approx(count / 25)
        given, true = store.read_landmarks(patient, "visit 1"), plain.read_landmarks(patient, "visit 1")
        assert given is not None
        assert true is not None
        assert len(given) == count == len(store.frame_paths(patient, "visit 1"))
        off_px = np.linalg.norm(given[: len(true)] - true, axis=2)
        shifted_px = np.linalg.norm(given[1 : len(true)] - true[:-1], axis=2)
        assert np.median(off_px) < min(2, np.median(shifted_px)), (patient, np.median(off_px), np.median(shifted_px))


def test_the_report_shows_faces_only_when_asked(clips: Path, prepared: Path, tmp_path: Path) -> None:
    out = shutil.copytree(prepared, tmp_path / "out")
    before = tree(out)
    assert main(line(clips, out, "--resume", "--with-images")) == 0
    after = tree(out)
    assert {name for name in after if after[name] != before[name]} == {"report.html"}
    assert after["report.html"].count(b"data:image/jpeg") == len(PEOPLE)
    assert_no_path(out, clips)
    assert main(line(clips, out, "--resume")) == 0
    assert tree(out) == before


def test_killed_three_times_and_resumed_it_is_the_same_to_the_byte(clips: Path, prepared: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    rng = random.Random(7)
    finished = []
    for flags in (["--workers", "2"], ["--workers", "1", "--resume"], ["--workers", "1", "--resume"]):
        with started(line(clips, out, *flags), log) as process:
            wait_for(lambda: (out / "prepare.json").exists())
            time.sleep(rng.uniform(1.5, 4.5))
            children = psutil.Process(process.pid).children(recursive=True)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            _, alive = psutil.wait_procs(children, timeout=20)
            assert not alive
        finished.append(len(list((out / "quality").rglob("*.json"))))
    with started(line(clips, out, "--workers", "2", "--resume"), log) as process:
        assert process.wait(timeout=120) == 0, log.read_text()
    assert finished[0] < len(PEOPLE)
    assert tree(out) == tree(prepared)


def test_a_killed_worker_costs_nothing_but_a_retry(clips: Path, prepared: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    with started(line(clips, out, "--workers", "1"), log) as process:
        wait_for(lambda: bool(list((out / "quality").rglob("*.json"))))
        (worker,) = spawned(process.pid)
        worker.kill()
        assert process.wait(timeout=120) == 0, log.read_text()
    assert "refused" not in log.read_text().replace("0 refused", "")
    assert tree(out) == tree(prepared)


def spawned(pid: int) -> list[psutil.Process]:
    """The worker processes of a run."""
    return [child for child in psutil.Process(pid).children() if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.parametrize("when", ["starting", "working"])
def test_ctrl_c_ends_everything_in_two_lines(clips: Path, tmp_path: Path, when: str) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    with started(line(clips, out, "--workers", "2"), log) as process:
        if when == "starting":
            wait_for(lambda: len(spawned(process.pid)) == 2)
        else:
            wait_for(lambda: bool(list(out.glob("frames/*"))))
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(timeout=20) == 130
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive
    text = log.read_text()
    assert text.endswith("What is finished is kept: the same command with --resume goes on.\ninterrupted\n"), text
    assert "Traceback" not in text


# ---------------------------------------------------------------- landmarks alone


def test_landmarks_alone_agree_with_published_crops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shipped = Store(real_faces() / "prepared")
    names = shipped.videos()[::6]
    assert len(names) > 5
    for patient, video in names:
        folder = tmp_path / "frames" / patient / video
        folder.mkdir(parents=True)
        for path in shipped.frame_paths(patient, video)[:6]:
            shutil.copy(path, folder)
    flags = ["--models", PACK, "--model-root", str(model_root()), "--workers", "1"]
    assert main(["prepare", "--landmarks-only", str(tmp_path), *flags]) == 0
    assert capsys.readouterr().out.startswith(f"{len(names)} videos prepared, 0 refused")
    store, off_px = Store(tmp_path), []
    for name in names:
        made, true = store.read_landmarks(*name), shipped.read_landmarks(*name)
        assert made is not None
        assert true is not None
        assert made.shape == (6, 106, 2)
        off_px.append(np.linalg.norm(made - true[:6], axis=2))
    assert np.median(off_px) < 3


@pytest.fixture
def crops(tmp_path: Path, faked: None) -> Path:
    """A dataset of crops; one of three videos has landmarks."""
    store = Store.create(tmp_path / "crops")
    for patient in ("P1", "P2", "P3"):
        store.write_video(patient, "clip", video_frames(1, 6), video_landmarks(1, 6))
    for patient in ("P2", "P3"):
        store.landmarks_path(patient, "clip").unlink()
    return store.root


def test_landmarks_that_are_there_are_kept(crops: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(crops)
    assert main(["prepare", "--landmarks-only", str(crops)]) == 2
    assert "1 of 3 videos have" in error(capsys.readouterr().err)
    assert tree(crops) == before
    assert main(["prepare", "--landmarks-only", str(crops), "--resume"]) == 0
    assert "3 videos prepared (1 of them by an earlier run)" in capsys.readouterr().out
    after = tree(crops)
    assert after.keys() - before.keys() == {"landmarks/P2/clip.npy", "landmarks/P3/clip.npy"}
    assert {name: after[name] for name in before} == before
    assert main(["prepare", "--landmarks-only", str(crops), "--resume"]) == 0
    assert tree(crops) == after


def test_crops_without_a_face_are_refused_in_one_line(crops: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (crops / "frames" / "P3" / "clip").iterdir():
        cv2.imwrite(str(path), np.zeros((64, 64, 3), np.uint8))
    damaged = crops / "frames" / "P2" / "clip" / "img_00002.jpg"
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert main(["prepare", "--landmarks-only", str(crops), "--resume"]) == 2
    lines = sorted(refusals(capsys.readouterr().err))
    assert [line.split(": ")[0] for line in lines] == ["P2/clip", "P3/clip"]
    assert "img_00002.jpg is damaged" in lines[0]
    assert str(crops) not in lines[0]


def test_a_folder_without_crops(tmp_path: Path, faked: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--landmarks-only", str(tmp_path)]) == 2
    assert "found none" in error(capsys.readouterr().err)
    assert main(["prepare", "--landmarks-only", str(tmp_path / "none")]) == 2
    assert "there is none at" in error(capsys.readouterr().err)
