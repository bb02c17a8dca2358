"""What gc would remove, removes, and keeps for the registry: an embedded store with artifacts in its own folder."""

import json
import sqlite3
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from tracking.connection import connect
from tracking.gc import Leftover, remove
from tracking.server import main

from .stores import embedded

DAY_MS = 24 * 3600 * 1000


@pytest.fixture
def store(place: Path, tmp_path: Path) -> tuple[MlflowClient, dict[str, str]]:
    """Two sweeps of one trial each with a model; the first one's is registered. All of it was deleted."""
    client = connect(embedded(place))
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "MLmodel").write_text("weights")
    ids = {}
    for name in ("kept", "gone"):
        experiment = client.create_experiment(name, artifact_location=(place / "mlruns" / name).as_uri())
        sweep = client.create_run(experiment, run_name=f"{name}-sweep").info.run_id
        trial = client.create_run(experiment, run_name=name, tags={"mlflow.parentRunId": sweep}).info.run_id
        for run in (sweep, trial):
            client.log_text(run, "x" * 1000, "report.txt")
        model = client.create_logged_model(experiment, name="qafe-net", source_run_id=trial)
        client.log_model_artifacts(model.model_id, str(weights))
        client.finalize_logged_model(model.model_id, "READY")
        ids |= {f"{name} experiment": experiment, f"{name} sweep": sweep, f"{name} trial": trial,
                f"{name} model": model.model_id}  # fmt: skip
        if name == "kept":
            client.create_registered_model("qafe-net")
            client.create_model_version("qafe-net", f"models:/{model.model_id}", trial, model_id=model.model_id)
    for name in ("kept", "gone"):
        client.delete_experiment(ids[f"{name} experiment"])
    return client, ids


def gc(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Leftover]:
    capsys.readouterr()
    assert main(["gc", "--backend", embedded(folder), "--json", *flags]) == 0
    return {row["key"]: Leftover(**row) for row in json.loads(capsys.readouterr().out)["leftovers"]}


def test_only_what_no_version_needs_goes(
    store: tuple[MlflowClient, dict[str, str]], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client, ids = store
    files = sorted(path for path in place.rglob("*") if path.is_file() and path.suffix == ".txt")
    assert len(files) == 4

    found = gc(place, capsys, "--older-than", "0")
    assert {key for key, one in found.items() if one.needed_by == "qafe-net 1"} == {
        ids[f"kept {kind}"] for kind in ("experiment", "sweep", "trial", "model")
    }
    assert {key for key, one in found.items() if not one.needed_by} == {
        ids[f"gone {kind}"] for kind in ("experiment", "sweep", "trial", "model")
    }
    assert found[ids["gone sweep"]].size == 1000
    assert sorted(path for path in place.rglob("*") if path.is_file() and path.suffix == ".txt") == files
    assert client.get_run(ids["gone trial"]).info.lifecycle_stage == "deleted"

    assert gc(place, capsys, "--older-than", "0", "--delete").keys() == found.keys()
    for kind in ("sweep", "trial"):
        assert client.get_run(ids[f"kept {kind}"]).info.lifecycle_stage == "deleted"
        with pytest.raises(MlflowException, match="not found"):
            client.get_run(ids[f"gone {kind}"])
    assert not (place / "mlruns" / "gone").exists()
    local = mlflow.artifacts.download_artifacts(artifact_uri="models:/qafe-net/1", dst_path=str(tmp_path / "got"))
    assert (Path(local) / "MLmodel").is_file()
    assert set(gc(place, capsys, "--older-than", "0")) == {
        ids[f"kept {kind}"] for kind in ("experiment", "sweep", "trial", "model")
    }
    client.delete_model_version("qafe-net", "1")
    assert all(not one.needed_by for one in gc(place, capsys, "--older-than", "0", "--delete").values())
    assert gc(place, capsys, "--older-than", "0") == {}
    assert not (place / "mlruns" / "kept").exists()


def test_what_was_deleted_lately_stays(
    store: tuple[MlflowClient, dict[str, str]], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, ids = store
    assert gc(place, capsys, "--delete") == {}
    with sqlite3.connect(place / "mlflow.db") as database:  # the trial alone was deleted 31 days ago
        database.execute("UPDATE runs SET deleted_time = deleted_time - ? WHERE run_uuid = ?", (31 * DAY_MS, ids["gone trial"]))  # fmt: skip  # noqa: E501
    assert set(gc(place, capsys, "--delete")) == {ids["gone trial"], ids["gone model"]}
    assert (place / "mlruns" / "gone" / ids["gone sweep"]).is_dir()


def test_runs_that_nobody_deleted_are_not_its_business(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client = connect(embedded(place))
    run = client.create_run("0").info.run_id
    assert gc(place, capsys, "--older-than", "0", "--delete") == {}
    assert client.get_run(run).info.run_id == run
    assert main(["gc", "--backend", embedded(place / "nowhere")]) == 2
    assert "gc cleans a store, there is none" in capsys.readouterr().err


def test_a_folder_that_is_not_the_runs_own_is_left_alone(place: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    from qafe.errors import TrackingError

    (place / "mine.txt").write_text("mine")
    strange = Leftover(kind="run", key="0a" * 16, name="x", location=str(place), size=0)
    with pytest.raises(TrackingError, match="a folder with the id"):
        remove(SqlAlchemyStore(embedded(place), "mlflow-artifacts:"), strange)
    assert (place / "mine.txt").exists()
