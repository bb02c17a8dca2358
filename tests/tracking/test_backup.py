"""A backup of a real server while it is logged to, and its return."""

import json
import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from tracking import backup
from tracking.connection import connect
from tracking.registry import add_version
from tracking.server import main

from .conftest import PASSWORDS, Live
from .stores import embedded, free_port


class Logger(threading.Thread):
    """Logs runs with metrics and artifacts, registers each and moves the alias on, until it is told to end."""

    def __init__(self, client: MlflowClient, name: str, folder: Path) -> None:
        super().__init__(name=name)
        self.folder = folder
        self.client = client
        self.experiment = client.create_experiment(name)
        self.finished: list[str] = []
        self.begun: list[str] = []
        self.failed: BaseException | None = None
        self.told = threading.Event()
        self.progress = threading.Condition()

    def run(self) -> None:
        try:
            while not self.told.is_set():
                self.one()
        except BaseException as err:
            self.failed = err
        with self.progress:
            self.progress.notify_all()

    def one(self) -> None:
        run = self.client.create_run(self.experiment).info
        self.begun.append(run.run_id)
        self.client.log_batch(run.run_id, [Metric("spearman", step / 10, 0, step) for step in range(5)])
        self.client.log_text(run.run_id, f"weights of {run.run_id} " * 1000, "checkpoint/model.txt")
        files = self.folder / run.run_id
        files.mkdir(parents=True)
        (files / "model.txt").write_text(f"weights of {run.run_id} " * 1000)
        version = add_version(self.client, self.name, run.run_id, files, {})
        self.client.set_registered_model_alias(self.name, "champion", version.version)
        self.client.set_terminated(run.run_id)
        with self.progress:
            self.finished.append(run.run_id)
            self.progress.notify_all()

    def wait_for(self, runs: int) -> list[str]:
        with self.progress:
            assert self.progress.wait_for(lambda: len(self.finished) >= runs or self.failed, timeout=60)
        assert self.failed is None, self.failed
        return list(self.finished)


def test_a_backup_while_it_is_logged_to_has_all_that_was_there(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = live.become("cora", monkeypatch)
    logger = Logger(client, "logged to", tmp_path / "files")
    logger.start()
    try:
        before = logger.wait_for(3)
        assert main(["backup", *live.flags, str(tmp_path / "backup")]) == 0
        logger.wait_for(len(logger.finished) + 1)
    finally:
        logger.told.set()
        logger.join(timeout=60)
    assert logger.failed is None
    assert len(logger.finished) > len(before)  # it went on meanwhile

    new = tmp_path / "new"
    assert main(["restore", str(tmp_path / "backup"), str(new)]) == 0
    assert f"start --backend sqlite:////{str(new / 'mlflow.db').lstrip('/')}" in capsys.readouterr().err
    port = free_port()
    flags = ["--backend", embedded(new)]
    assert main(["start", *flags, "--port", str(port), "--auth", "--background"]) == 0
    try:
        restored = MlflowClient(f"http://127.0.0.1:{port}")  # with the accounts of the first server
        experiment = restored.get_experiment_by_name("logged to")
        assert experiment is not None
        there = {run.info.run_id: run for run in restored.search_runs([experiment.experiment_id])}
        assert set(before) <= set(there) <= set(logger.begun)
        for run_id in before:
            run = there[run_id]
            assert run.info.status == "FINISHED"
            assert [row.value for row in restored.get_metric_history(run_id, "spearman")] == [0.0, 0.1, 0.2, 0.3, 0.4]
            got = restored.download_artifacts(run_id, "checkpoint/model.txt", str(tmp_path))
            assert Path(got).read_text() == f"weights of {run_id} " * 1000
        champion = restored.get_model_version_by_alias("logged to", "champion")
        assert int(champion.version) >= len(before)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        mlflow.set_tracking_uri(f"http://127.0.0.1:{port}")
        folder = mlflow.artifacts.download_artifacts("models:/logged to@champion", dst_path=str(tmp_path / "champion"))
        assert f"weights of {champion.run_id} " in (Path(folder) / "model.txt").read_text()
    finally:
        assert main(["stop", *flags]) == 0
    assert not any(PASSWORDS["cora"].encode() in path.read_bytes() for path in new.rglob("*") if path.is_file())


@pytest.fixture
def store(place: Path, tmp_path: Path) -> Path:
    """An embedded store as a sweep makes it: its experiment's artifacts lie in an absolute folder."""
    folder = place
    client = connect(embedded(folder))
    experiment = client.create_experiment("fusion", artifact_location=(folder / "mlruns" / "fusion").as_uri())
    run = client.create_run(experiment, run_name="trial").info
    client.log_text(run.run_id, "figure", "figures/a b.txt")
    model = client.create_logged_model(experiment, name="qafe-net", source_run_id=run.run_id)
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "model.txt").write_text("weights")
    client.log_model_artifacts(model.model_id, str(tmp_path / "w"))
    client.finalize_logged_model(model.model_id, "READY")
    client.create_registered_model("qafe-net")
    client.create_model_version("qafe-net", f"models:/{model.model_id}", run.run_id, model_id=model.model_id)
    client.set_registered_model_alias("qafe-net", "champion", "1")
    return folder


def test_an_embedded_store_moves_with_its_folders(store: Path, tmp_path: Path) -> None:
    assert main(["backup", "--backend", embedded(store), str(tmp_path / "backup")]) == 0
    shutil.rmtree(store)  # nothing may be read from the old place
    new = tmp_path / "new place"
    assert main(["restore", str(tmp_path / "backup"), str(new)]) == 0
    mlflow.set_tracking_uri(embedded(new))
    client = connect(embedded(new), create=False)
    experiment = client.get_experiment_by_name("fusion")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    got = client.download_artifacts(run.info.run_id, "figures/a b.txt", str(tmp_path))
    assert Path(got).read_text() == "figure"
    folder = mlflow.artifacts.download_artifacts("models:/qafe-net@champion", dst_path=str(tmp_path / "got"))
    assert (Path(folder) / "model.txt").read_text() == "weights"
    with closing(sqlite3.connect(new / "mlflow.db")) as database:
        assert not [line for line in database.iterdump() if str(store) in line or store.as_uri() in line]
    client.log_text(client.create_run(experiment.experiment_id).info.run_id, "more", "more.txt")
    assert [path.relative_to(new).parts[0] for path in new.rglob("more.txt")] == ["mlruns"]
    assert not store.exists()


def test_a_restore_takes_an_empty_place_and_a_whole_backup(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "backup"
    flags = ["--backend", embedded(store)]
    assert main(["backup", *flags, str(place)]) == 0
    manifest = json.loads((place / "backup.json").read_text())
    assert manifest["rows"]["runs"] == 1
    assert len(manifest["files"]) == 3

    def refused(*words: str) -> str:
        capsys.readouterr()
        assert main([*words]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        return said

    assert "a backup goes to a new folder" in refused("backup", *flags, str(place))
    assert "is none" in refused("backup", "--backend", embedded(tmp_path / "nowhere"), str(tmp_path / "b2"))
    assert "has none that can be read" in refused("restore", str(store), str(tmp_path / "new"))
    assert "is not empty" in refused("restore", str(place), str(store))
    assert "leave --backend out" in refused("restore", str(place), str(tmp_path / "new"), *flags)
    damaged = next(place / name for name in manifest["files"] if name.endswith("a b.txt"))
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + b"E")
    assert "is damaged" in refused("restore", str(place), str(tmp_path / "new"))
    damaged.unlink()
    assert "is missing" in refused("restore", str(place), str(tmp_path / "new"))
    damaged.write_bytes(content)
    (place / "backup.json").write_text(json.dumps(manifest | {"revision": "ffffffffffff", "mlflow": "9.9"}))
    assert "is of MLflow 9.9" in refused("restore", str(place), str(tmp_path / "new"))
    (place / "backup.json").write_text(json.dumps(manifest))
    assert not (tmp_path / "new").exists()
    (tmp_path / "new").mkdir()
    assert main(["restore", str(place), str(tmp_path / "new")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_backup_cut_short_leaves_nothing(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backup, "_copy", full)
    assert main(["backup", "--backend", embedded(store), str(tmp_path / "backup")]) == 2
    assert "the disk is full, got ENOSPC" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {store.name, "w"}


@pytest.mark.parametrize(("size", "words"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (3 * 10**15, "3000.0 TB")])  # fmt: skip  # noqa: E501
def test_sizes_for_people(size: int, words: str) -> None:
    assert backup.readable(size) == words
