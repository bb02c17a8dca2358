"""``python -m qafe`` as a user runs it: results on stdout, one line for a mistake, nothing half-written."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qafe import training
from qafe.__main__ import main
from qafe.config import Config, tiny
from qafe.data.cohort import Cohort, load_cohort
from qafe.data.sample import SampleConfig
from qafe.history import read_history
from qafe.score import Scorer
from qafe.store import Store
from qafe.train import EpochResult, _Run

from .conftest import QUICK_FLAGS


@pytest.fixture(scope="module")
def trained(sample_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "out"
    flags = ["--data-root", str(sample_root), "--preset", "tiny", "--expression", "smile,frown", "--out", str(out)]
    assert main(["train", *flags, *QUICK_FLAGS]) == 0
    return out


def test_train_prints_the_published_row(sample_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data-root", str(sample_root), "--preset", "tiny", "--expression", "frown"]
    assert main(["train", *flags, *QUICK_FLAGS]) == 0
    validation, test = capsys.readouterr().out.strip().splitlines()
    for row, split in ((validation, "validation"), (test, "test")):
        title, frown, mean = row.split(" | ")
        assert title == f"QAFE-Net ({split}, Spearman x 100)"
        assert frown.removeprefix("frown ") == mean.removeprefix("mean ")
        assert -100 <= float(mean.removeprefix("mean ")) <= 100


def test_train_keeps_weights_config_and_history(trained: Path) -> None:
    assert sorted(path.name for path in trained.iterdir()) == [
        "config.json",
        "frown.safetensors",
        "history.json",
        "smile.safetensors",
    ]


def test_score_gives_the_number_of_the_runs_own_evaluation(
    trained: Path, sample_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for expression, entry in read_history(trained).items():
        assert len(entry.ids) == 4
        for name, expected in zip(entry.ids, entry.best.predictions, strict=True):
            patient, video = Store(sample_root).resolve_video(name)
            clip = sample_root / "frames" / patient / video
            assert main(["score", str(clip), "--model", str(trained), "--expression", expression, "--json"]) == 0
            printed = json.loads(capsys.readouterr().out)
            assert printed["score"] == pytest.approx(expected, abs=1e-5)


def test_a_model_of_several_expressions_must_be_told_which(trained: Path, sample_root: Path) -> None:
    scorer = Scorer(trained)
    assert scorer.expressions == ("frown", "smile")
    clip = next((sample_root / "frames").glob("*/*"))
    for_smile, for_frown = scorer.score_clip(clip, "smile"), scorer.score_clip(clip, "frown")
    assert np.isfinite([for_smile, for_frown]).all()
    assert for_smile != for_frown


def test_train_writes_to_an_empty_folder_too(sample_root: Path, tmp_path: Path) -> None:
    flags = ["--data-root", str(sample_root), "--preset", "tiny", "--out", str(tmp_path), *QUICK_FLAGS]
    assert main(["train", *flags, "--set", "train.epochs=1"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "history.json", "smile.safetensors"]


def without_frown(sample_root: Path, target: Path, change: str) -> Path:
    """A copy with no frown of a training patient that is left for validation, or with one whose frames are damaged."""
    shutil.copytree(sample_root, target)
    if change == "few":
        table = target / "sample_train.csv"
        lines = table.read_text().splitlines()
        kept = [line for line in lines if "frown" not in line]
        table.write_text("\n".join([*kept, *[line for line in lines if "frown" in line][:1]]) + "\n")
        return target
    cohort = load_cohort(target, tiny().data).only("frown" if change == "training" else "smile")
    sample = (cohort.train if change == "training" else cohort.test)[0]
    for frame in cohort.store.frame_paths(sample.patient, sample.video):
        frame.write_bytes(frame.read_bytes()[:-100])
    return target


def test_every_expression_is_checked_before_the_first_is_trained(
    sample_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = without_frown(sample_root, tmp_path / "copy", "few")
    flags = ["--preset", "tiny", "--expression", "smile,frown", "--out", str(tmp_path / "out"), *QUICK_FLAGS]
    assert main(["train", "--data-root", str(root), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: frown: training needs at least 2 training and 3 validation clips")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(("failing", "into"), [("training", "new"), ("training", "empty"), ("test", "new")])
def test_a_finished_model_outlives_what_fails_after_it(
    failing: str, into: str, sample_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = without_frown(sample_root, tmp_path / "copy", failing), tmp_path / "out"
    if into == "empty":
        out.mkdir()
    flags = ["--preset", "tiny", "--expression", "smile,frown", "--out", str(out), *QUICK_FLAGS]
    assert main(["train", "--data-root", str(root), *flags, "--set", "train.epochs=1"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = [line for line in printed.err.splitlines() if not line.startswith("smile epoch ")]
    assert line.startswith("error: a frame must be a whole JPEG")
    assert line.endswith(f" Finished, and kept in {out}: smile.")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "history.json", "smile.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "out"]
    assert list(read_history(out)) == ["smile"]
    clip = next((sample_root / "frames").glob("*/*smile*"))
    assert np.isfinite(Scorer(out).score_clip(clip))


def test_an_interrupt_says_what_is_finished(
    sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    epochs, out = training._epochs, tmp_path / "out"

    def interrupted(config: Config, part: Cohort, expression: str, *rest: Any) -> Iterator[EpochResult]:
        if expression == "frown":
            raise KeyboardInterrupt
        return epochs(config, part, expression, *rest)

    monkeypatch.setattr(training, "_epochs", interrupted)
    flags = ["--preset", "tiny", "--expression", "smile,frown", *QUICK_FLAGS, "--set", "train.epochs=1"]
    assert main(["train", "--data-root", str(sample_root), *flags, "--out", str(out)]) == 130
    assert capsys.readouterr().err.splitlines()[-2:] == [f"Finished, and kept in {out}: smile.", "interrupted"]
    assert (out / "smile.safetensors").is_file()
    assert main(["train", "--data-root", str(sample_root), *flags]) == 130
    assert "kept" not in capsys.readouterr().err


@pytest.mark.parametrize("err", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), None], ids=str)
@pytest.mark.parametrize(
    ("settings", "step"),
    [
        ({}, "Set train.batch_size=2 and train.accumulate=2, or train.checkpoint=true."),
        (
            {"train.batch_size": 6, "train.accumulate": 2, "train.checkpoint": True},
            "Set train.batch_size=3 and train.accumulate=4.",
        ),
        ({"train.batch_size": 5}, "Set train.batch_size=1 and train.accumulate=5, or train.checkpoint=true."),
        ({"train.batch_size": 1, "train.loss": "mse"}, "Set train.checkpoint=true."),
        ({"train.batch_size": 1, "train.loss": "mse", "train.checkpoint": True}, "Set a smaller --preset."),
    ],
    ids=["4", "6", "5", "1", "nothing"],
)
def test_too_little_memory_gets_one_line(
    settings: dict[str, object],
    step: str,
    err: Exception | None,
    sample_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        if err is not None:
            raise err
        torch.empty(2**46)

    monkeypatch.setattr(_Run, "_step", fail)
    flags = [flag for name, value in settings.items() for flag in ("--set", f"{name}={value}")]
    line = ["train", "--data-root", str(sample_root), "--preset", "tiny", *QUICK_FLAGS, *flags]
    assert main(line) == 2
    (told,) = capsys.readouterr().err.splitlines()
    batch = settings.get("train.batch_size", 4)
    assert told.startswith(f"error: a batch must fit into memory, and {batch} clip")
    assert told.endswith(f"(train.batch_size). {step}")


def test_a_full_disk_gets_one_line(sample_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    line = ["train", "--data-root", str(sample_root), "--preset", "tiny", "--no-cache", "--out", str(out)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert main([*line, *QUICK_FLAGS, "--set", "train.epochs=1"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("smile epoch ")]
    assert told == [
        "error: training must be able to read its data and to write its results, got "
        f"{os.strerror(errno.EFBIG)} ({out}). Make room there, or correct its permissions."
    ]
    assert list(tmp_path.iterdir()) == []


def broken_copy(sample_root: Path, target: Path, change: str) -> Path:
    shutil.copytree(sample_root, target)
    table = target / "sample_train.csv"
    lines = table.read_text().splitlines()
    identity, label, frames, kind = lines[3].split(",")
    if change == "label":
        lines[3] = f"{identity},severe,{frames},{kind}"
    elif change == "count":
        lines[3] = f"{identity},{label},{int(frames) + 1},{kind}"
    table.write_text("\n".join(lines) + "\n")
    return target


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no root", ["nowhere"]),
        ("bad row", ["sample_train.csv", "line 4", "severe"]),
        ("frame count", ["sample_train.csv", "line 4", "frames"]),
        ("unknown setting", ["model.fusion.layer", "Did you mean model.fusion.layers?"]),
        ("bad value", ["train.epochs", "whole number"]),
        ("expression", ["grin", "smile"]),
        ("used folder", ["must be new or empty"]),
        ("truncated weights", ["smile.safetensors"]),
        ("no weights", ["found none"]),
        ("no frames", ["must hold JPEG frames"]),
        ("which expression", ["frown, smile", "--expression"]),
        ("no such scheme", ["s3://"]),
        ("sample over files", ["new or empty folder"]),
        ("sample below a file", ["config.json/made", "can be written"]),
        ("out is a file", ["config.json", "must be new or empty"]),
        ("out below a file", ["config.json/out", "can be written"]),
        ("out does not fit", ["train.precision"]),
        ("out without weights", ["bad.pth"]),
        ("loss explodes", ["train.lr=1e+30", "epoch 1 of smile", "Set train.lr=1e+29"]),
    ],
)
def test_a_mistake_gets_one_line_and_status_2(
    case: str, words: list[str], trained: Path, sample_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    train = ["train", "--preset", "tiny", "--out", str(out), *QUICK_FLAGS, "--data-root"]
    clip = str(next((sample_root / "frames").glob("*/*smile*")))
    if case == "truncated weights":
        shutil.copytree(trained, tmp_path / "model")
        weights = tmp_path / "model" / "smile.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "empty").mkdir()
    exploding = ["--set", "train.loss=mse", "--set", "train.optimizer=sgd", "--set", "train.lr=1e30"]
    arguments = {
        "no root": [*train, str(tmp_path / "nowhere")],
        "bad row": [*train, str(broken_copy(sample_root, tmp_path / "copy", "label"))] if case == "bad row" else [],
        "frame count": [*train, str(broken_copy(sample_root, tmp_path / "copy", "count"))]
        if case == "frame count"
        else [],
        "unknown setting": [*train, str(sample_root), "--set", "model.fusion.layer=2"],
        "bad value": [*train, str(sample_root), "--set", "train.epochs=some"],
        "expression": [*train, str(sample_root), "--expression", "grin"],
        "used folder": ["train", "--data-root", str(sample_root), "--out", str(trained)],
        "truncated weights": ["score", clip, "--model", str(tmp_path / "model"), "--expression", "smile"],
        "no weights": ["score", clip, "--model", str(tmp_path)],
        "no frames": ["score", str(tmp_path / "empty"), "--model", str(trained), "--expression", "smile"],
        "which expression": ["score", clip, "--model", str(trained)],
        "no such scheme": ["score", clip, "--model", "s3://bucket/model"],
        "sample over files": ["sample", str(trained)],
        "sample below a file": ["sample", str(trained / "config.json" / "made")],
        "out is a file": [*train, str(sample_root), "--out", str(trained / "config.json")],
        "out below a file": [*train, str(sample_root), "--out", str(trained / "config.json" / "out")],
        "out does not fit": [*train, str(sample_root), "--set", "train.precision=fp16", "--device", "cpu"],
        "out without weights": [*train, str(sample_root), "--set", "model.rgb.weights=bad.pth"],
        "loss explodes": [*train, str(sample_root), *exploding],
    }[case]
    before = sorted(path.name for path in trained.iterdir())
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]
    assert "Traceback" not in printed.err
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))
    assert sorted(path.name for path in trained.iterdir()) == before


def test_the_sample_command_makes_what_the_library_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr("qafe.__main__.make_sample", lambda folder, config, progress: made.append(config))
    assert main(["sample", "anywhere"]) == 0
    assert made == [SampleConfig()]


def test_the_sample_command_prints_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--train-patients", "4", "--test-patients", "2", "--clips", "1"]
    assert main(["sample", str(tmp_path / "made"), *flags]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "made")
    assert len(list((tmp_path / "made" / "frames").glob("*/*"))) == 6 * 5
