import errno
import importlib.metadata
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from packaging.requirements import Requirement

from qafe.errors import TrackingError
from qafe.score import Scorer
from tracking.registry import OBJECTIVE, add_version, fetch, main, promote, register

from .stores import embedded
from .test_runs import checkpoint, open_tracker, runs_of  # noqa: F401 (a fixture)

ROOT = Path(__file__).parents[2]


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


@pytest.fixture(autouse=True)
def _own_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # mlflow.set_tracking_uri sets it: undone after the test


@pytest.fixture
def logged(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that a model was about to be logged to, when logging failed."""
    runs: list[Run] = []

    def save_model(*, mlflow_model: Any, **_: Any) -> None:
        runs.append(store.get_run(mlflow_model.run_id))
        raise Stopped

    monkeypatch.setattr(mlflow.pyfunc, "save_model", save_model)
    return runs


def test_the_first_of_equally_good_trials_is_registered(store: MlflowClient, logged: list[Run]) -> None:
    with pytest.raises(Stopped):
        register(store, "once")
    with pytest.raises(Stopped):
        register(store, "once", trial=0)
    assert [run.info.run_name for run in logged] == ["once-001", "once-000"]


def test_a_failure_to_log_the_model_leaves_the_trial_as_it_ended(
    store: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def log_model_artifacts(*_: Any) -> None:
        raise Stopped

    before = runs_of(store.tracking_uri)["once-002"]
    monkeypatch.setattr(store, "log_model_artifacts", log_model_artifacts)
    with pytest.raises(Stopped):
        register(store, "once", trial=2)
    after = runs_of(store.tracking_uri)["once-002"]
    assert (after.info.status, after.info.end_time) == (before.info.status, before.info.end_time)
    assert before.info.status == "FINISHED"
    models = store.search_logged_models([before.info.experiment_id], f"source_run_id = '{before.info.run_id}'")
    assert [model.status for model in models] == ["FAILED"]
    assert store.search_registered_models() == []


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


USER = "annagruenwald"


@pytest.fixture(scope="module")
def registered(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelVersion]:  # noqa: F811
    """A store and its only version, registered by somebody with a name, a home, a folder and a temporary one."""
    folder = tmp_path_factory.mktemp("registered")
    client = MlflowClient(embedded(folder))
    tracker = open_tracker(tmp_path_factory.mktemp("spool"), client.tracking_uri)
    tracker.trial_started("0", 0, {"train.lr": 0.1})
    tracker.trial_metrics("0", {OBJECTIVE: 0.5})
    tracker.trial_ended("0", "finished", folder=checkpoint)
    tracker.sweep_ended("finished")
    assert tracker.close() == 0
    own = tmp_path_factory.mktemp(USER)
    for name in ("uv.lock", "pyproject.toml"):
        (own / name).write_text(f'# {own}\n[project]\nname = "mine"\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "")
        for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
            patch.setenv(variable, USER)
        for variable in ("HOME", "TMPDIR"):
            patch.setenv(variable, str(own))
        patch.setattr(tempfile, "tempdir", str(own))
        patch.chdir(own)
        return folder, register(client, "s-1")


def test_no_name_and_no_path_of_the_machine_is_registered(registered: tuple[Path, ModelVersion]) -> None:
    folder, version = registered
    with sqlite3.connect(folder / "mlflow.db") as database:
        found = {"dump": "\n".join(database.iterdump())}
    files = [path for path in (folder / "mlruns").rglob("*") if path.is_file()]
    assert {"MLmodel", "scorer.py", "requirements.txt", "smile.safetensors"} <= {path.name for path in files}
    found |= {str(path.relative_to(folder)): path.read_bytes().decode(errors="ignore") for path in files}
    signs = (USER, str(ROOT))
    assert [name for name, text in found.items() if any(sign in name + text for sign in signs)] == []
    about = next(path for path in files if path.name == "MLmodel").read_text()
    assert tempfile.gettempdir() not in about
    assert "file:" not in about
    client = MlflowClient(embedded(folder))
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert model.tags.keys() == {"mlflow.modelVersions"}
    assert model.params == {"train.lr": "0.1"}
    assert {row.key: row.value for row in model.metrics} == {OBJECTIVE: 0.5}
    run = client.get_run(version.run_id)
    assert model.model_id in {output.model_id for output in run.outputs.model_outputs}
    assert (run.info.status, version.tags["trial_run"]) == ("FINISHED", run.info.run_id)


def needed(lines: Iterable[str]) -> set[str]:
    """Names of the installed distributions that requirements bring, with what those require."""
    waiting, found = [Requirement(line) for line in lines], set[tuple[str, str]]()
    while waiting:
        wanted = waiting.pop()
        for extra in ("", *wanted.extras):
            name = wanted.name.lower().replace("_", "-")
            if (name, extra) in found:
                continue
            found.add((name, extra))
            try:
                lines = importlib.metadata.requires(wanted.name) or ()
            except importlib.metadata.PackageNotFoundError:
                continue
            more = [Requirement(line) for line in lines]
            waiting += [each for each in more if each.marker is None or each.marker.evaluate({"extra": extra})]
    return {name for name, _ in found}


SCORE = """
import json, sys
hidden, uri, clip = set(json.loads(sys.argv[1])), sys.argv[2], sys.argv[3]

class Hidden:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden)
import mlflow, pandas
print(mlflow.pyfunc.load_model(uri).predict(pandas.DataFrame({"clip": [clip]}))["score"][0])
"""


def test_a_registered_model_scores_with_no_more_than_it_declares(
    registered: tuple[Path, ModelVersion],
    checkpoint: Path,  # noqa: F811
    sample_root: Path,
    tmp_path: Path,
) -> None:
    folder, version = registered
    uri = f"models:/{version.name}/{version.version}"
    mlflow.set_tracking_uri(embedded(folder))
    model = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(tmp_path / "model")))
    allowed = needed((model / "requirements.txt").read_text().splitlines())
    hidden = {
        name
        for name, owners in importlib.metadata.packages_distributions().items()
        if name not in ("qafe", "sweeps", "tracking")
        and allowed.isdisjoint(owner.lower().replace("_", "-") for owner in owners)
    }
    assert {"torch", "mlflow"} <= allowed
    assert {"ray", "pytest"} <= hidden
    clip = next((sample_root / "frames").glob("*/*"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", SCORE, json.dumps(sorted(hidden)), uri, str(clip)],
        cwd=tmp_path,
        env=environment | {"MLFLOW_TRACKING_URI": embedded(folder)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    expected = Scorer(model / "artifacts" / "checkpoint").score_clip(clip)
    assert float(done.stdout.split()[-1]) == pytest.approx(expected, abs=1e-5)


@pytest.fixture
def two_versions(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> tuple[MlflowClient, str]:
    """A model of its own with two versions, the first champion, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.tracking_uri)
    name, run = request.node.name, runs_of(store.tracking_uri)["once-001"]
    for content in ("one", "two"):
        weights = tmp_path / content / "artifacts" / "checkpoint"
        weights.mkdir(parents=True)
        (weights / "smile.safetensors").write_text(content)
        add_version(store, name, run.info.run_id, tmp_path / content, {})
    promote(store, name, "1")
    return store, name


def test_a_promotion_meanwhile_changes_nothing_that_is_fetched(
    two_versions: tuple[MlflowClient, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, name = two_versions
    download = mlflow.artifacts.download_artifacts

    def promoted(**given: Any) -> str:
        promote(client, name, "2")
        return str(download(**given))

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", promoted)
    weights = fetch(f"models:/{name}@champion")
    assert (weights / "smile.safetensors").read_text() == "one"
    assert fetch(f"models:/{name}/1") == weights
    assert (fetch(f"models:/{name}@champion") / "smile.safetensors").read_text() == "two"


def test_two_that_fetch_at_once_get_the_same(
    two_versions: tuple[MlflowClient, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, name = two_versions
    download, both = mlflow.artifacts.download_artifacts, threading.Barrier(2, timeout=60)

    def together(**given: Any) -> str:
        downloaded = str(download(**given))
        both.wait()
        return downloaded

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", together)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(fetch, [f"models:/{name}@champion"] * 2)
    assert first == second
    assert (first / "smile.safetensors").read_text() == "one"
    assert len(list(first.parents[2].iterdir())) == 1  # nothing unfinished stays


def test_what_keeps_a_model_from_being_fetched_is_said(
    two_versions: tuple[MlflowClient, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, name = two_versions
    for uri in (f"models:/{name}/3", f"models:/{name}@nobody", f"models:/{name}"):
        with pytest.raises(TrackingError, match="the model must be in the registry"):
            fetch(uri)
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with pytest.raises(TrackingError, match=r"cache of fetched models must be writable, .*file/qafe/models is not"):
            fetch(f"models:/{name}/1")
    for err, words in (
        (OSError(errno.ENOSPC, "No space left on device"), r"is not \(No space left on device\)\. Free some space"),
        (OSError("No such file or directory: 'x'"), r"files must be in its store, those of models:/.*/1 cannot be"),
        (MlflowException("no such artifact"), r"files must be in its store, .* \(no such artifact\)"),
    ):

        def download(err: Exception = err, **_: Any) -> str:
            raise err

        monkeypatch.setattr(mlflow.artifacts, "download_artifacts", download)
        with pytest.raises(TrackingError, match=words):
            fetch(f"models:/{name}@champion")
    assert list((tmp_path / "cache" / "qafe" / "models").iterdir()) == []
