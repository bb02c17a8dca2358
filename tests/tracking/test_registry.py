from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from qafe.errors import TrackingError
from tracking.registry import OBJECTIVE, fetch, main, register

from .stores import embedded
from .test_runs import open_tracker


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    """Two sweeps named "twice" and one named "once"; trials 1 and 2 of each are equally good."""
    folder = tmp_path_factory.mktemp("registry")
    client = MlflowClient(embedded(folder))
    (folder / "model.safetensors").write_text("weights")
    for sweep, sweep_id in (("twice", "anna"), ("twice", "ben"), ("once", "carl")):
        tracker = open_tracker(folder / sweep_id, client.tracking_uri, sweep=sweep, sweep_id=sweep_id)
        for number, objective in ((2, 0.5), (1, 0.5), (0, 0.25)):
            tracker.trial_started(f"{sweep_id}-{number}", number, {})
            tracker.trial_metrics(f"{sweep_id}-{number}", {OBJECTIVE: objective})
            tracker.trial_ended(f"{sweep_id}-{number}", "finished", folder=None)
        tracker.sweep_ended("finished")
        assert tracker.close() == 0
        for run_id in tracker.run_ids().values():
            client.log_artifact(run_id, str(folder / "model.safetensors"), "checkpoint")
    return client


class Stopped(Exception):
    """Raised in place of logging a model."""


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that a model was about to be logged to, when logging failed."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # mlflow.set_tracking_uri sets it: undone after the test
    runs: list[Run] = []

    def log_model(**_: Any) -> None:
        run = mlflow.active_run()
        assert run is not None
        runs.append(run)
        raise Stopped

    monkeypatch.setattr(mlflow.pyfunc, "log_model", log_model)
    return runs


def test_the_first_of_equally_good_trials_is_registered(store: MlflowClient, logged: list[Run]) -> None:
    with pytest.raises(Stopped):
        register(store, "once")
    with pytest.raises(Stopped):
        register(store, "once", trial=0)
    assert [run.info.run_name for run in logged] == ["once-001", "once-000"]


def test_a_failure_to_log_the_model_leaves_the_trial_as_it_ended(store: MlflowClient, logged: list[Run]) -> None:
    experiment = store.get_experiment_by_name("study")
    assert experiment is not None

    def ending() -> tuple[str, int]:
        (run,) = store.search_runs([experiment.experiment_id], "attributes.run_name = 'once-002'")
        return run.info.status, run.info.end_time

    before = ending()
    with pytest.raises(Stopped):
        register(store, "once", trial=2)
    assert len(logged) == 1
    assert ending() == before
    assert before[0] == "FINISHED"


def test_a_name_that_two_sweeps_have_is_refused(store: MlflowClient, logged: list[Run]) -> None:
    with pytest.raises(TrackingError, match=r"2 have the name twice\. .*: anna, ben"):
        register(store, "twice")
    with pytest.raises(Stopped):
        register(store, "ben")
    assert [(run.info.run_name, run.data.tags["qafe.sweep_id"]) for run in logged] == [("twice-001", "ben")]


def test_a_name_with_a_quote_gets_one_line(store: MlflowClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tracking-uri", store.tracking_uri, "register", "--sweep", "it's"]) == 2
    assert capsys.readouterr().err.startswith("error: a sweep's name has only letters, digits and . _ -, got \"it's\"")


@pytest.mark.parametrize("line", [["list"], ["register", "--sweep", "s-1"], ["promote", "qafe-net", "1"]])
def test_no_store_is_made_by_mistake(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(line) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: there is no tracking store at {tmp_path / 'mlflow.db'}")
    assert said.out == ""
    with pytest.raises(TrackingError, match="there is no tracking store"):
        fetch("models:/qafe-net@champion")
    assert list(tmp_path.iterdir()) == []
