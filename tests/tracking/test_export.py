"""A sweep leaves as plain files and comes into another store, whole and once."""

import csv
import json
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tracking.export import main

from .stores import embedded
from .test_runs import checkpoint, open_tracker, runs_of  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def store(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:  # noqa: F811
    """A sweep of three trials, one of them registered and champion, beside another sweep."""
    folder = tmp_path_factory.mktemp("store")
    uri = embedded(folder)
    for sweep, sweep_id in (("s-1", "0c" * 16), ("s-2", "0d" * 16)):
        tracker = open_tracker(folder / sweep, uri, sweep=sweep, sweep_id=sweep_id)
        for number, state in enumerate(("finished", "pruned", "failed")):
            tracker.trial_started(str(number), number, {"train.lr": 0.1 * number, "model.fusion.kind": 'a,"b"\nc'})
            for step in range(1, 4):
                tracker.epoch(
                    str(number), step, {"spearman": step / 7 + number, "mae": float("nan") if number else 1e-9}
                )
            path = checkpoint if state == "finished" else None
            tracker.trial_ended(str(number), state, folder=path, reason="x", trace="MediaError\n")  # type: ignore[arg-type]
        report = folder / f"report-{sweep}"
        report.mkdir()
        (report / "summary.json").write_text("{}")
        tracker.sweep_files(report, {"best_spearman": 0.5})
        tracker.sweep_ended("finished")
        assert tracker.close() == 0
    client = MlflowClient(uri)
    run = runs_of(uri)["s-1-000"]
    (folder / "weights").mkdir()
    (folder / "weights" / "MLmodel").write_text("a model")
    logged = client.create_logged_model(run.info.experiment_id, name="qafe-net", source_run_id=run.info.run_id)
    client.log_model_artifacts(logged.model_id, str(folder / "weights"))
    client.finalize_logged_model(logged.model_id, "READY")
    client.create_registered_model("qafe-net")
    mlflow.set_tracking_uri(uri)
    tags = {"sweep": "s-1", "trial_run": run.info.run_id}
    version = client.create_model_version("qafe-net", f"models:/{logged.model_id}", run.info.run_id, tags)
    client.set_registered_model_alias("qafe-net", "champion", version.version)
    return uri


@pytest.fixture(scope="module")
def exported(store: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "s-1"
    assert main(["s-1", str(folder), "--tracking-uri", store]) == 0
    return folder


def content(uri: str, run: Run, by_id: dict[str, str]) -> dict[str, Any]:
    """All that a store has of a run, without ids of its own."""
    client = MlflowClient(uri)
    tags = {name: value for name, value in run.data.tags.items() if name != "mlflow.parentRunId"}
    rows = {
        name: sorted(
            (row.step, row.timestamp, repr(row.value)) for row in client.get_metric_history(run.info.run_id, name)
        )
        for name in run.data.metrics
    }
    folder = Path(client.download_artifacts(run.info.run_id, ""))
    return {
        "tags": tags,
        "params": run.data.params,
        "metrics": rows,
        "times": (run.info.start_time, run.info.end_time, run.info.status),
        "parent": by_id.get(run.data.tags.get("mlflow.parentRunId", "")),
        "data": [(each.dataset.name, each.dataset.digest) for each in run.inputs.dataset_inputs],
        "files": {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()},
    }


def everything(uri: str, sweep: str) -> dict[str, dict[str, Any]]:
    runs = {name: run for name, run in runs_of(uri).items() if name.startswith(sweep)}
    by_id = {run.info.run_id: name for name, run in runs.items()}
    return {name: content(uri, run, by_id) for name, run in runs.items()}


def test_an_export_holds_the_sweep_in_plain_tables(exported: Path) -> None:
    with open(exported / "metrics.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == 3 * 3 * 2 + 1
    found = {(row["trial"], row["metric"], row["step"]): row["value"] for row in rows}
    assert float(found["2", "spearman", "3"]) == 3 / 7 + 2
    assert found["none", "best_spearman", "0"] == "0.5"
    assert found["1", "mae", "1"] == "nan"
    with open(exported / "params.csv", newline="") as table:
        params = {(row["trial"], row["param"]): row["value"] for row in csv.DictReader(table)}
    assert params["0", "model.fusion.kind"] == 'a,"b"\nc'
    trials = pd.read_csv(exported / "trials.csv")
    assert list(trials["state"]) == ["finished", "pruned", "failed"]
    for name in ("metrics", "params", "trials"):
        assert len(pd.read_parquet(exported / f"{name}.parquet")) == len(pd.read_csv(exported / f"{name}.csv"))
    files = {str(path.relative_to(exported / "artifacts")) for path in (exported / "artifacts").rglob("*.*")}
    assert {"s-1/summary.json", "s-1-000/config.json", "s-1-002/failure.txt"} <= files
    assert "s-1-000/figures/predicted_against_true.png" in files
    assert not (exported / "artifacts" / "s-2").exists()
    assert (exported / "models" / "qafe-net-1" / "MLmodel").read_text() == "a model"


def test_an_import_brings_all_of_it_once(exported: Path, store: str, tmp_path: Path) -> None:
    other = embedded(tmp_path)
    for _ in range(2):
        assert main(["import", str(exported), "--tracking-uri", other]) == 0
        assert everything(other, "s-") == everything(store, "s-1")
    client = MlflowClient(other)
    assert len(client.search_model_versions()) == 1
    champion = client.get_model_version_by_alias("qafe-net", "champion")
    assert champion.tags["trial_run"] == runs_of(other)["s-1-000"].info.run_id
    assert champion.tags["sweep"] == "s-1"
    again = tmp_path / "again"
    assert main(["s-1", str(again), "--tracking-uri", other]) == 0
    assert (again / "metrics.csv").read_text() == (exported / "metrics.csv").read_text()
    assert (again / "models" / "qafe-net-1" / "MLmodel").read_text() == "a model"


def test_where_it_came_from_nothing_changes(exported: Path, store: str) -> None:
    before = everything(store, "s-")
    assert main(["import", str(exported), "--tracking-uri", store]) == 0
    assert everything(store, "s-") == before
    assert len(MlflowClient(store).search_model_versions()) == 1


def test_what_cannot_be_done_is_said_in_one_line(
    exported: Path, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"format": 99}))
    for line, words in (
        (["s-1", str(exported)], "into a new or empty folder"),
        (["s-9", str(tmp_path / "new")], "got 's-9'"),
        (["import", str(tmp_path)], "format 99"),
        (["import", str(tmp_path / "nowhere")], "can be imported"),
    ):
        assert main([*line, "--tracking-uri", store]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert words in said
    assert not (tmp_path / "new").exists()
