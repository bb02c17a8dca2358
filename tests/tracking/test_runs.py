import csv
import errno
import json
import shutil
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from qafe import dotted
from qafe.config import Config
from qafe.data.cohort import load_cohort
from qafe.errors import CheckpointError, TrackingError
from qafe.history import ExpressionHistory, write_history
from qafe.train import fit
from tracking.connection import connect, masked, resolve_uri
from tracking.figures import trial_files
from tracking.pseudonyms import key_path, load_key, pseudonym
from tracking.runs import SweepTracker, main, replay, sweep_exists
from tracking.spool import Spool

from .stores import embedded, free_port, server


@pytest.fixture(scope="module")
def checkpoint(sample_root: Path, quick: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trial's last checkpoint, as the sweep leaves it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    part = load_cohort(sample_root, quick.data).only("smile")
    entry = ExpressionHistory.start(part.validation)
    for result in fit(quick, part.store, part.train, part.validation):
        entry.add(result)
        result.save(folder / "smile")
    write_history(folder, {"smile": entry})
    (folder / "config.json").write_text(dotted.to_json(quick))
    return folder


def open_tracker(folder: Path, uri: str, sweep: str = "s-1", sweep_id: str = "0a" * 16) -> SweepTracker:
    return SweepTracker(
        folder / "tracking.jsonl",
        uri=uri,
        experiment="study",
        sweep=sweep,
        sweep_id=sweep_id,
        params={"trials": 2, "long": "x" * 2000},
        tags={"mlflow.source.git.commit": "abc"},
        dataset=("sample", "d" * 64),
    )


def runs_of(uri: str) -> dict[str, Run]:
    client = MlflowClient(uri)
    experiments = [found.experiment_id for found in client.search_experiments()]
    return {run.info.run_name: run for run in client.search_runs(experiments)}


def steps_of(uri: str, run: Run, metric: str = "spearman") -> list[tuple[int, float]]:
    return [(row.step, row.value) for row in MlflowClient(uri).get_metric_history(run.info.run_id, metric)]


def test_a_sweep_becomes_a_parent_and_its_children(
    tmp_path: Path, checkpoint: Path, sample_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "a store"
    store.mkdir()
    uri = embedded(store)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    tracker = open_tracker(tmp_path, uri)
    tracker.trial_started("a", 0, {"train.lr": 0.1})
    tracker.trial_started("b", 1, {"train.lr": 0.2})
    for step in (1, 2, 3):
        tracker.epoch("a", step, {"spearman": step / 10, "lr": 0.1})
    tracker.epoch("b", 1, {"spearman": -0.5})
    tracker.trial_ended("a", "finished", folder=checkpoint)
    tracker.trial_ended("b", "pruned", folder=None, reason="stopped early after epoch 1")
    tracker.trial_metrics("a", {"test_spearman": 0.25})
    report = tmp_path / "report"
    report.mkdir()
    (report / "best_trials.csv").write_text("trial\n0\n")
    tracker.sweep_files(report, {"best_spearman": 0.3})
    tracker.sweep_ended("finished")
    assert tracker.close() == 0

    runs = runs_of(uri)
    assert sorted(runs) == ["s-1", "s-1-000", "s-1-001"]
    parent, first, second = runs["s-1"], runs["s-1-000"], runs["s-1-001"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert first.data.tags["mlflow.parentRunId"] == second.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert second.data.tags["qafe.state"] == "pruned"
    assert second.data.tags["qafe.reason"] == "stopped early after epoch 1"
    assert first.data.tags["mlflow.source.git.commit"] == "abc"
    assert first.data.params == {"train.lr": "0.1"}
    assert first.inputs.dataset_inputs[0].dataset.name == "sample"
    assert steps_of(uri, first) == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert first.data.metrics["test_spearman"] == 0.25
    assert parent.data.metrics == {"best_spearman": 0.3}

    assert (store / "mlruns" / "study" / first.info.run_id / "artifacts" / "config.json").is_file()
    assert not list((tmp_path / "elsewhere").iterdir())
    client = MlflowClient(uri)
    folder = Path(client.download_artifacts(first.info.run_id, "", str(tmp_path)))
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {
        "config.json",
        "predictions.csv",
        "checkpoint/smile.safetensors",
        "figures/predicted_against_true.png",
        "figures/spearman_over_epochs.png",
        "figures/confusion.png",
        "figures/residuals_per_patient.png",
        "figures/example_heatmap.png",
        "figures/fusion_attention.png",
    } <= names
    assert dotted.from_json((folder / "config.json").read_text())
    with open(folder / "predictions.csv") as table:
        rows = list(csv.DictReader(table))
    history = json.loads((checkpoint / "history.json").read_text())["smile"]
    key = load_key()
    assert [row["clip"] for row in rows] == [pseudonym(name, key) for name in history["ids"]]
    best = history["epochs"][history["best_epoch"] - 1]
    np.testing.assert_allclose([float(row["prediction"]) for row in rows], best["predictions"], atol=1e-6)
    text = "".join(path.read_text() for path in folder.rglob("*") if path.suffix in (".csv", ".json"))
    assert not [name for name in (*history["ids"], *history["patients"]) if name in text]


def test_a_sweep_that_goes_on_finds_its_runs_and_repeats_nothing(tmp_path: Path) -> None:
    uri = embedded(tmp_path)
    tracker = open_tracker(tmp_path, uri)
    tracker.trial_started("a", 0, {"train.lr": 0.1})
    tracker.epoch("a", 1, {"spearman": 0.1})
    tracker.epoch("a", 2, {"spearman": 0.2})
    tracker.sweep_ended("killed")
    assert tracker.close() == 0
    assert runs_of(uri)["s-1-000"].data.tags["qafe.reason"] == "its sweep ended without it"
    assert {run.info.status for run in runs_of(uri).values()} == {"KILLED"}

    tracker = open_tracker(tmp_path, uri)
    tracker.trial_started("a", 0, {"train.lr": 0.1})
    tracker.epoch("a", 2, {"spearman": 0.2})  # the checkpoint was older than the last report
    tracker.epoch("a", 3, {"spearman": 0.3})
    assert tracker.wait_until_sent(60)
    assert {run.info.status for run in runs_of(uri).values()} == {"RUNNING"}
    tracker.trial_ended("a", "finished", folder=None)
    tracker.sweep_ended("finished")
    assert tracker.close() == 0
    runs = runs_of(uri)
    assert sorted(runs) == ["s-1", "s-1-000"]
    assert steps_of(uri, runs["s-1-000"]) == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["s-1-000"].data.tags["qafe.state"] == "finished"
    assert "qafe.reason" not in runs["s-1-000"].data.tags


def test_trials_that_a_crash_left_open_end_with_their_sweep(tmp_path: Path) -> None:
    uri = embedded(tmp_path)
    tracker = open_tracker(tmp_path, uri)
    tracker.trial_started("a", 0, {})
    tracker.trial_started("b", 1, {})
    tracker.trial_ended("a", "finished", folder=None)
    assert tracker.close() == 0
    assert runs_of(uri)["s-1-001"].info.status == "RUNNING"

    tracker = open_tracker(tmp_path, uri)
    tracker.trial_started("c", 2, {})
    tracker.sweep_ended("finished")
    assert tracker.close() == 0
    runs = runs_of(uri)
    states = {name: (run.info.status, run.data.tags["qafe.state"]) for name, run in runs.items()}
    assert states == {
        "s-1": ("FINISHED", "finished"),
        "s-1-000": ("FINISHED", "finished"),
        "s-1-001": ("FAILED", "failed"),
        "s-1-002": ("FAILED", "failed"),
    }
    assert runs["s-1-001"].data.tags["qafe.reason"] == "its sweep ended without it"


def test_two_sweeps_of_one_name_stay_apart(tmp_path: Path) -> None:
    uri = embedded(tmp_path)
    for person, rate in (("anna", 0.1), ("ben", 0.2)):
        tracker = open_tracker(tmp_path / person, uri, sweep_id=person)
        tracker.trial_started(f"of-{person}", 0, {"train.lr": rate})
        tracker.sweep_ended("finished")
        assert tracker.close() == 0
    client = connect(uri)
    experiment = client.get_experiment_by_name("study")
    assert experiment is not None
    for person, kept in (("anna", "0.1"), ("ben", "0.2")):
        runs = client.search_runs([experiment.experiment_id], f"tags.`qafe.sweep_id` = '{person}'")
        assert sorted(run.info.run_name for run in runs) == ["s-1", "s-1-000"]
        assert [run.data.params["train.lr"] for run in runs if run.info.run_name == "s-1-000"] == [kept]
    assert sweep_exists(client, "s-1")
    assert not sweep_exists(client, "s-2")
    with pytest.raises(TrackingError, match="only letters"):
        sweep_exists(client, "it's")


def test_a_damaged_checkpoint_does_not_hold_the_others_up(
    tmp_path: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = embedded(tmp_path)
    damaged = {}
    for name in ("config.json", "history.json", "smile/best.safetensors"):
        damaged[name] = tmp_path / name.replace("/", "-")
        shutil.copytree(checkpoint, damaged[name])
        (damaged[name] / name).write_bytes(b"{")
    damaged["gone"] = tmp_path / "gone"
    tracker = open_tracker(tmp_path, uri)
    for number, (name, folder) in enumerate(damaged.items()):
        tracker.trial_started(name, number, {})
        tracker.trial_ended(name, "finished", folder=folder)
    tracker.sweep_ended("finished")
    assert tracker.close() == 0
    assert sum("gets no files" in line for line in caplog.messages) == 4
    assert [run.info.status for run in runs_of(uri).values()] == ["FINISHED"] * 5


def artifacts_of(uri: str, name: str) -> set[str]:
    return {item.path for item in MlflowClient(uri).list_artifacts(runs_of(uri)[name].info.run_id)}


@pytest.mark.parametrize("place", ["tempfile.TemporaryDirectory", "weights.save", "read_history"])
def test_files_that_cannot_be_made_now_are_made_by_a_replay(
    place: str, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        err = OSError(errno.EIO if place == "read_history" else errno.ENOSPC, "as a disk says it", "/tmp/x")
        if place != "read_history":
            raise err
        raise CheckpointError("what our own code makes of it") from err

    uri = embedded(tmp_path)
    tracker = open_tracker(tmp_path, uri)
    for number, trial in enumerate("ab"):
        tracker.trial_started(trial, number, {})
        tracker.epoch(trial, 1, {"spearman": 0.5})
    with monkeypatch.context() as patch:
        patch.setattr(f"tracking.figures.{place}", fails)
        tracker.trial_ended("a", "finished", folder=checkpoint)
        assert tracker.wait_until_sent(60)
    tracker.trial_ended("b", "finished", folder=checkpoint)
    tracker.sweep_ended("finished")
    assert tracker.close() == 0
    assert tracker.ended_trials() == {"b"}  # the files of the other are still needed
    assert tracker.refused == 1
    assert sum("files are left to a replay" in line for line in caplog.messages) == 1
    assert not [line for line in caplog.messages if "gets no files" in line or "refuses" in line]
    assert {run.info.status for run in runs_of(uri).values()} == {"FINISHED"}
    assert artifacts_of(uri, "s-1-000") == set()
    (entry,) = Spool(tmp_path / "tracking.jsonl").refused()
    assert "files must be copied before they are sent, got " in entry["refused"]

    assert replay(tmp_path / "tracking.jsonl") == (0, 0)
    assert artifacts_of(uri, "s-1-000") == artifacts_of(uri, "s-1-001") == {"figures", "checkpoint", "config.json",
                                                                            "predictions.csv"}  # fmt: skip
    assert len(MlflowClient(uri).search_logged_models([runs_of(uri)["s-1"].info.experiment_id])) == 2


def test_files_of_a_trial_that_went_on_are_left_to_its_later_end(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = embedded(tmp_path)
    tracker = open_tracker(tmp_path, uri)
    tracker.trial_started("a", 0, {})
    with monkeypatch.context() as patch:
        patch.setattr("tracking.figures.read_history", lambda _: 1 / 0)
        tracker.trial_ended("a", "killed", folder=checkpoint)
        assert tracker.wait_until_sent(60)
    assert tracker.refused == 1
    time.sleep(0.01)
    tracker.trial_started("a", 0, {})
    tracker.trial_ended("a", "finished", folder=checkpoint)
    tracker.sweep_ended("finished")
    assert tracker.close() == 0
    assert replay(tmp_path / "tracking.jsonl") == (0, 0)
    run = runs_of(uri)["s-1-000"]
    assert (run.info.status, run.data.tags["qafe.state"]) == ("FINISHED", "finished")


@pytest.mark.parametrize("older", [False, True])
def test_a_sweep_that_was_moved_sends_its_files(
    older: bool, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With folders as the spool names them, or as it did once: absolute."""
    uri = embedded(tmp_path)
    sweep = tmp_path / "sweeps" / "s-1"
    last = sweep / "trial_000" / "checkpoint_000002"
    shutil.copytree(checkpoint, last)
    (sweep / "report").mkdir()
    (sweep / "report" / "best_trials.csv").write_text("trial\n0\n")
    with monkeypatch.context() as patch:
        patch.setattr("tracking.sender.connect", lambda _: 1 / 0)
        tracker = open_tracker(sweep, uri)
        tracker.trial_started("0", 0, {})
        tracker.trial_ended("0", "finished", folder=last)
        tracker.sweep_files(sweep / "report", {"best_spearman": 0.5})
        tracker.sweep_ended("finished")
        assert tracker.close(patience_s=0.1) == 5
    text = (sweep / "tracking.jsonl").read_text()
    assert str(sweep) not in text
    if older:
        entries = [json.loads(line) for line in text.splitlines()]
        entries[0]["folders"] = [str(tmp_path), str(sweep), str(sweep.parent)]
        entries[2]["folder"], entries[3]["folder"] = str(last), str(sweep / "report")
        (sweep / "tracking.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    moved = tmp_path / "archive" / "fusion"
    shutil.copytree(sweep, moved)
    for path in last.iterdir():  # another sweep of this name may lie in the old place
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert replay(moved / "tracking.jsonl") == (5, 0)
    assert artifacts_of(uri, "s-1") == {"best_trials.csv"}
    assert artifacts_of(uri, "s-1-000") == {"figures", "checkpoint", "config.json", "predictions.csv"}
    assert {run.info.status for run in runs_of(uri).values()} == {"FINISHED"}


def test_a_replay_finds_a_store_that_has_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = embedded(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tracking.sender.connect", lambda _: 1 / 0)
        tracker = open_tracker(tmp_path / "sweep", uri)
        tracker.trial_started("0", 0, {})
        tracker.epoch("0", 1, {"spearman": 0.5})
        tracker.sweep_ended("finished")
        assert tracker.close(patience_s=0.1) == 5
    MlflowClient(uri).search_experiments()  # makes the store
    (tmp_path / "mlflow.db").rename(tmp_path / "moved.db")
    spool = str(tmp_path / "sweep" / "tracking.jsonl")
    assert main(["replay", spool, "--tracking-uri", f"sqlite:///{tmp_path}/gone.db"]) == 2
    assert "there is no tracking store" in capsys.readouterr().err
    assert main(["replay", spool, "--tracking-uri", f"sqlite:///{tmp_path}/moved.db"]) == 0
    assert set(runs_of(f"sqlite:///{tmp_path}/moved.db")) == {"s-1", "s-1-000"}
    assert not (tmp_path / "mlflow.db").exists()


def test_files_of_the_sweep_that_are_gone_do_not_hold_its_end_up(tmp_path: Path) -> None:
    uri = embedded(tmp_path)
    tracker = open_tracker(tmp_path, uri)
    tracker.sweep_files(tmp_path / "report", {"best_spearman": 0.5})
    tracker.sweep_ended("finished")
    assert tracker.close() == 0
    run = runs_of(uri)["s-1"]
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"best_spearman": 0.5})
    assert replay(tmp_path / "tracking.jsonl") == (0, 1)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "best_trials.csv").write_text("trial\n0\n")
    assert replay(tmp_path / "tracking.jsonl") == (0, 0)
    assert artifacts_of(uri, "s-1") == {"best_trials.csv"}


def test_a_trial_has_its_run_while_anothers_figures_are_drawn(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing, begun = threading.Event(), threading.Event()

    def drawn_at_leisure(*arguments: object) -> AbstractContextManager[Path]:
        drawing.set()
        assert begun.wait(60)
        return trial_files(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("tracking.figures.trial_files", drawn_at_leisure)
    uri = embedded(tmp_path)
    tracker = open_tracker(tmp_path, uri)
    tracker.trial_started("a", 0, {"train.lr": 0.1})
    assert tracker.wait_until_sent(60)
    tracker.trial_ended("a", "finished", folder=checkpoint)
    assert drawing.wait(60)
    tracker.trial_started("b", 1, {"train.lr": 0.2})
    run_id = tracker.run_id("b", 60)
    begun.set()
    tracker.trial_ended("b", "finished", folder=None)
    tracker.sweep_ended("finished")
    assert tracker.close() == 0
    runs = runs_of(uri)
    assert runs["s-1-001"].info.run_id == run_id
    assert runs["s-1-001"].data.params == {"train.lr": "0.2"}
    names = {item.path for item in MlflowClient(uri).list_artifacts(runs["s-1-000"].info.run_id)}
    assert {"figures", "checkpoint", "config.json", "predictions.csv"} <= names


def test_the_sender_outlives_what_it_cannot_foresee(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uri = embedded(tmp_path)
    failures = [RuntimeError("a driver's own"), KeyError("another")]

    def connect_at_last(uri: str) -> MlflowClient:
        if failures:
            raise failures.pop()
        return connect(uri)

    monkeypatch.setattr("tracking.sender.connect", connect_at_last)
    tracker = open_tracker(tmp_path, uri)
    tracker.sweep_ended("finished")
    assert tracker.close() == 0
    assert [run.info.status for run in runs_of(uri).values()] == ["FINISHED"]
    assert sum("the tracking server must take a sweep's open entry" in line for line in caplog.messages) == 2


def test_sending_a_spool_twice_changes_nothing(tmp_path: Path) -> None:
    uri = embedded(tmp_path)
    tracker = open_tracker(tmp_path, uri)
    tracker.trial_started("a", 0, {"train.lr": 0.1})
    for step in (1, 2):
        tracker.epoch("a", step, {"spearman": step / 10})
    tracker.trial_ended("a", "finished", folder=None)
    tracker.sweep_ended("finished")
    assert tracker.close() == 0
    (tmp_path / "tracking.jsonl.sent").unlink()
    assert replay(tmp_path / "tracking.jsonl") == (6, 0)
    runs = runs_of(uri)
    assert sorted(runs) == ["s-1", "s-1-000"]
    assert steps_of(uri, runs["s-1-000"]) == [(1, 0.1), (2, 0.2)]


def test_a_server_that_is_away_costs_no_time_and_no_metric(tmp_path: Path) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    tracker = open_tracker(tmp_path, uri)
    started = time.perf_counter()
    tracker.trial_started("a", 0, {"train.lr": 0.1})
    for step in range(1, 101):
        tracker.epoch("a", step, {"spearman": step / 1000})
    assert time.perf_counter() - started < 1.0
    tracker.trial_ended("a", "finished", folder=None)
    tracker.sweep_ended("finished")
    assert tracker.close(patience_s=0.5) == 104
    with server(tmp_path, port):
        assert main(["replay", str(tmp_path / "tracking.jsonl")]) == 0
        run = runs_of(uri)["s-1-000"]
        assert steps_of(uri, run) == [(step, step / 1000) for step in range(1, 101)]
        assert run.info.status == "FINISHED"


def test_the_store_must_answer(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="no answer from http://127"):
        connect(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(TrackingError):
        connect("gopher://somewhere")
    (tmp_path / "mlflow.db").write_text("no database at all, but a file of that name")
    with pytest.raises(TrackingError, match="DatabaseError"):
        connect(embedded(tmp_path))


def test_a_spool_must_be_there_to_be_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path / "none.jsonl")]) == 2
    assert capsys.readouterr().err.startswith("error: a spool is a file")


def test_uris_are_absolute_and_passwords_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri() == embedded(tmp_path)
    assert resolve_uri("sqlite:///other.db") == embedded(tmp_path).replace("mlflow.db", "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert resolve_uri() == "http://127.0.0.1:5000"
    assert masked("postgresql://user:secret@host/db") == "postgresql://user:***@host/db"


def test_the_pseudonym_key_stays_the_same_and_private() -> None:
    key = load_key()
    assert load_key() == key
    assert len(key) == 32
    assert key_path().stat().st_mode & 0o077 == 0
    assert pseudonym("P01", key) == pseudonym("P01", key) != pseudonym("P02", key)
    assert pseudonym("P01", key) != pseudonym("P01", b"another key")


@pytest.mark.parametrize("content", ["", "not hexadecimal", "ab12"])
def test_a_damaged_key_gets_one_line(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAFE_PSEUDONYM_KEY_FILE", str(tmp_path / "my.key"))
    (tmp_path / "my.key").write_text(content)
    with pytest.raises(TrackingError, match=r"the pseudonym key must be .*my\.key is not") as raised:
        load_key()
    assert "\n" not in str(raised.value)
    assert (tmp_path / "my.key").read_text() == content
