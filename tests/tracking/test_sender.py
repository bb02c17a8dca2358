"""What is sent arrives once, whatever dies in between; what the server refuses does not hold up the rest."""

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST, PERMISSION_DENIED, TEMPORARILY_UNAVAILABLE

from qafe.errors import TrackingError
from tests.sweeps.running import ROOT
from tracking.batches import batches, refusal
from tracking.connection import connect
from tracking.runs import main, replay
from tracking.sender import Sender
from tracking.spool import Spool

from .stores import embedded
from .test_runs import checkpoint, open_tracker, runs_of, steps_of  # noqa: F401 (a fixture)

DYING = """
import os, signal, sys
from pathlib import Path
from tracking.sender import Sender
from tracking.spool import Spool

class Dying(Spool):
    left = int(sys.argv[2])
    def mark_sent(self, place):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        super().mark_sent(place)

Sender(Dying(Path(sys.argv[1]))).send_all()
"""


def spooled(folder: Path, uri: str, trials: int = 2, epochs: int = 5) -> Path:
    """A spool of a sweep of which nothing was sent."""
    spool = Spool(folder / "tracking.jsonl")
    base = {"sweep": "s-1", "sweep_id": "0b" * 16, "tags": {}, "params": {}}
    data = {"name": "d", "digest": "0", "clips": {}}
    spool.append({"kind": "open", "uri": uri, "experiment": "study", "dataset": data, "time": 1000} | base)
    for trial in range(trials):
        spool.append({"kind": "trial", "trial": str(trial), "number": trial, "params": {"lr": "0.1"}, "time": 2000})
    for step in range(1, epochs + 1):
        for trial in range(trials):
            metrics = {"spearman": step / 10, "mae": 1 / step}
            spool.append({"kind": "epoch", "trial": str(trial), "step": step, "metrics": metrics, "time": 3000 + step})
    for trial in range(trials):
        end = {"state": "finished", "folder": "", "reason": "", "trace": ""}
        spool.append({"kind": "trial_end", "trial": str(trial), "time": 9000} | end)
    spool.append({"kind": "sweep_end", "state": "finished", "time": 9999})
    spool.close()
    return spool.path


def test_kill_9_between_sending_and_moving_the_cursor(tmp_path: Path) -> None:
    uri = embedded(tmp_path)
    path = spooled(tmp_path, uri)
    for left in (3, 1):  # after the second trial's run was made; after its epochs were sent
        line = [sys.executable, "-c", DYING, str(path), str(left)]
        died = subprocess.run(line, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=120)
        assert died.returncode == -signal.SIGKILL, died.stderr
    assert replay(path).refused == 0
    runs = runs_of(uri)
    assert sorted(runs) == ["s-1", "s-1-000", "s-1-001"]
    assert len(MlflowClient(uri).search_runs(["1"])) == 3
    for name in ("s-1-000", "s-1-001"):
        assert steps_of(uri, runs[name]) == [(step, step / 10) for step in range(1, 6)]
        assert runs[name].info.status == "FINISHED"


class Counting:
    """A client that counts its requests and may fail some."""

    def __init__(self, uri: str) -> None:
        self.client = connect(uri)
        self.calls: Counter[str] = Counter()
        self.refused: set[str] = set()
        """Names of metrics, params and tags that it refuses."""
        self.sick: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            self.calls[name] += 1
            if self.sick:
                raise self.sick
            if name == "log_batch":
                items = [item for part in named.values() for item in part]
                if self.refused & {item.key for item in items}:
                    raise MlflowException("not this one", error_code=BAD_REQUEST)
            return getattr(self.client, name)(*arguments, **named)

        return call


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counting:
    client = Counting(embedded(tmp_path))
    monkeypatch.setattr("tracking.sender.connect", lambda _: client)
    return client


def test_what_waits_together_shares_a_request(tmp_path: Path, counting: Counting) -> None:
    path = spooled(tmp_path, embedded(tmp_path), trials=3, epochs=400)
    assert Sender(Spool(path)).send_all() == 1 + 3 + 1200 + 3 + 1
    # 2,400 metrics of 3 runs: three rounds of a thousand and three runs; and params and state of each run
    assert counting.calls["log_batch"] <= 3 * 3 + 3 + 4
    for name in ("s-1-000", "s-1-001", "s-1-002"):
        assert len(steps_of(embedded(tmp_path), runs_of(embedded(tmp_path))[name])) == 400


def test_requests_keep_to_mlflows_limits() -> None:
    items = [Metric(f"m{number}", 0.0, 0, 0) for number in range(1500)]
    items += [Param(f"p{number}", "") for number in range(250)]
    items += [RunTag("again", str(number)) for number in range(5)]
    found = list(batches(items))
    assert sum(len(batch) for batch in found) == 1500 + 250 + 1
    for batch in found:
        assert len(batch) <= 1000
        assert sum(not isinstance(item, Metric) for item in batch) <= 100
    assert [item.value for batch in found for item in batch if item.key == "again"] == ["4"]


def test_what_the_server_refuses_is_set_aside_and_tried_again(
    tmp_path: Path, counting: Counting, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    counting.refused = {"mae", "lr"}
    tracker = open_tracker(tmp_path, embedded(tmp_path))
    tracker.trial_started("a", 0, {"lr": 0.1, "layers": 2})
    for step in range(1, 21):
        tracker.epoch("a", step, {"spearman": step / 10, "mae": 1 / step})
    tracker.trial_ended("a", "finished", folder=None)
    tracker.sweep_ended("finished")
    assert tracker.close() == 0
    assert tracker.refused == 21
    assert sum("refuses something" in line for line in caplog.messages) == 1
    run = runs_of(embedded(tmp_path))["s-1-000"]
    assert run.info.status == "FINISHED"
    assert run.data.params == {"layers": "2"}
    assert steps_of(embedded(tmp_path), run) == [(step, step / 10) for step in range(1, 21)]
    spool = Spool(tmp_path / "tracking.jsonl")
    assert all("not this one" in entry["refused"] for entry in spool.refused())
    assert spool.refused_path.stat().st_mode & 0o777 == 0o600
    spool.close()

    counting.refused = {"lr"}  # somebody has seen to the other
    assert main(["replay", str(spool.path)]) == 0
    assert capsys.readouterr().out == '{"sent": 0, "refused": 1}\n'
    assert steps_of(embedded(tmp_path), run, "mae") == [(step, 1 / step) for step in range(1, 21)]
    counting.refused = set()
    assert replay(spool.path) == (0, 0)
    assert not spool.refused_path.exists()
    assert runs_of(embedded(tmp_path))["s-1-000"].data.params == {"layers": "2", "lr": "0.1"}


def test_entries_of_a_deleted_run_do_not_hold_up_the_others(tmp_path: Path) -> None:
    uri = embedded(tmp_path)
    tracker = open_tracker(tmp_path, uri)
    for trial in ("a", "b"):
        tracker.trial_started(trial, int(trial == "b"), {})
    assert tracker.wait_until_sent(60)
    MlflowClient(uri).delete_run(tracker.run_id("a"))
    for trial in ("a", "b"):
        tracker.epoch(trial, 1, {"spearman": 0.5, "mae": 1.0})
        tracker.trial_ended(trial, "finished", folder=None)
    tracker.sweep_ended("finished")
    assert tracker.close() == 0
    assert tracker.refused >= 1
    assert runs_of(uri)["s-1-001"].info.status == "FINISHED"
    assert steps_of(uri, runs_of(uri)["s-1-001"]) == [(1, 0.5)]


def all_runs(uri: str) -> dict[str, str]:
    """Every run's id and name, deleted ones too."""
    found = MlflowClient(uri).search_runs(["1"], run_view_type=ViewType.ALL)
    return {run.info.run_id: run.info.run_name for run in found}


@pytest.mark.parametrize("again", [False, True])
def test_a_run_that_somebody_deleted_stays_deleted(again: bool, tmp_path: Path) -> None:
    """By a replay of what was refused, and of all that has been sent."""
    uri = embedded(tmp_path)
    tracker = open_tracker(tmp_path, uri)
    for number, trial in enumerate("ab"):
        tracker.trial_started(trial, number, {"lr": 0.1 + number})
    assert tracker.wait_until_sent(60)
    deleted = tracker.run_id("a")
    MlflowClient(uri).delete_run(deleted)
    for trial in ("a", "b"):
        tracker.epoch(trial, 1, {"spearman": 0.5})
        tracker.trial_ended(trial, "finished", folder=None)
    tracker.sweep_ended("finished")
    assert tracker.close() == 0
    refused = tracker.refused
    before = all_runs(uri)
    for _ in range(2):
        if again:
            (tmp_path / "tracking.jsonl.sent").unlink()
        sent, left = replay(tmp_path / "tracking.jsonl")
        assert sent == (8 if again else 0)
        assert left >= refused >= 1
        assert all_runs(uri) == before
    assert runs_of(uri)["s-1-001"].info.status == "FINISHED"
    assert steps_of(uri, runs_of(uri)["s-1-001"]) == [(1, 0.5)]
    reasons = [entry["refused"] for entry in Spool(tmp_path / "tracking.jsonl").refused()]
    assert any(f"that of trial a was deleted ({deleted})" in reason for reason in reasons)

    MlflowClient(uri).restore_run(deleted)
    assert replay(tmp_path / "tracking.jsonl") == (0, 0)
    assert all_runs(uri) == before
    run = runs_of(uri)["s-1-000"]
    assert (run.info.run_id, run.info.status, run.data.tags["qafe.state"]) == (deleted, "FINISHED", "finished")
    assert steps_of(uri, run) == [(1, 0.5)]


def test_after_a_power_cut_all_is_sent_again_and_nothing_doubled(tmp_path: Path, checkpoint: Path) -> None:  # noqa: F811
    """The cursor may be on the disk before the lines that it has passed."""
    uri, path = embedded(tmp_path), tmp_path / "tracking.jsonl"
    tracker = open_tracker(tmp_path, uri)
    for number, trial in enumerate("abc"):
        tracker.trial_started(trial, number, {"lr": 0.1})
        for step in (1, 2):
            tracker.epoch(trial, step, {"spearman": step / 10, "mae": 1 / step, "train_loss": float("nan")})
        tracker.trial_metrics(trial, {"test_spearman": 0.5})
    tracker.trial_ended("a", "finished", folder=checkpoint)
    assert tracker.wait_until_sent(60)
    MlflowClient(uri).delete_run(tracker.run_id("c"))
    before = all_runs(uri)
    whole = path.stat().st_size
    tracker.trial_tags("b", {"qafe.note": "x" * 3000})
    tracker.close()
    with open(path, "rb+") as content:
        content.truncate(whole)

    tracker = open_tracker(tmp_path, uri)
    tracker.trial_started("b", 1, {"lr": 0.1})
    tracker.epoch("b", 3, {"spearman": 0.3})
    tracker.trial_ended("b", "finished", folder=checkpoint)
    tracker.sweep_ended("finished")
    assert tracker.close() == 0
    assert all_runs(uri) == before
    runs, client = runs_of(uri), MlflowClient(uri)
    assert sorted(runs) == ["s-1", "s-1-000", "s-1-001"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert steps_of(uri, runs["s-1-000"]) == [(1, 0.1), (2, 0.2)]
    assert steps_of(uri, runs["s-1-001"]) == [(1, 0.1), (2, 0.2), (3, 0.3)]
    for run in (runs["s-1-000"], runs["s-1-001"]):
        assert len(client.get_metric_history(run.info.run_id, "train_loss")) == 2
        assert len(client.get_metric_history(run.info.run_id, "test_spearman")) == 1
        assert len(run.inputs.dataset_inputs) == 1
    assert len(client.search_logged_models([runs["s-1"].info.experiment_id])) == 2


def test_trials_of_a_sweep_whose_run_was_deleted_arrive(tmp_path: Path) -> None:
    uri = embedded(tmp_path)
    tracker = open_tracker(tmp_path, uri)
    assert tracker.wait_until_sent(60)
    sweep = tracker.run_ids()[""]
    assert tracker.close() == 0
    MlflowClient(uri).delete_run(sweep)
    tracker = open_tracker(tmp_path, uri)
    tracker.trial_started("a", 0, {})
    tracker.trial_ended("a", "finished", folder=None)
    tracker.sweep_ended("finished")
    assert tracker.close() == 0
    assert tracker.refused >= 1
    assert sorted(all_runs(uri).values()) == ["s-1", "s-1-000"]
    assert runs_of(uri)["s-1-000"].data.tags["mlflow.parentRunId"] == sweep
    MlflowClient(uri).restore_run(sweep)
    assert replay(tmp_path / "tracking.jsonl") == (0, 0)
    assert {run.info.status for run in runs_of(uri).values()} == {"FINISHED"}


def test_a_run_that_is_made_late_is_that_of_its_trial(tmp_path: Path) -> None:
    """As where the making of it was refused, and only its numbers are left."""
    uri = embedded(tmp_path)
    path = spooled(tmp_path, uri)
    lines = path.read_text().splitlines(keepends=True)
    path.with_name("tracking.jsonl.sent").write_text(str(len("".join(lines[:3]))))
    assert replay(path) == (13, 0)
    runs = runs_of(uri)
    assert sorted(runs) == ["s-1", "s-1-000", "s-1-001"]
    for name in ("s-1-000", "s-1-001"):
        assert runs[name].data.params == {"lr": "0.1"}
        assert (runs[name].info.start_time, runs[name].info.end_time) == (2000, 9000)
        assert runs[name].inputs.dataset_inputs
    assert runs["s-1"].info.start_time == 1000


@pytest.mark.parametrize("code", [PERMISSION_DENIED, TEMPORARILY_UNAVAILABLE])
def test_what_the_server_cannot_take_now_waits(tmp_path: Path, counting: Counting, code: int) -> None:
    path = spooled(tmp_path, embedded(tmp_path))
    counting.sick = MlflowException("later", error_code=code)
    sender = Sender(Spool(path))
    for _ in range(2):
        with pytest.raises(TrackingError, match="later"):
            sender.send_all()
    assert sender.spool.sent == 0
    assert sender.spool.refused() == []
    counting.sick = None
    assert sender.send_all() == 16
    assert len(steps_of(embedded(tmp_path), runs_of(embedded(tmp_path))["s-1-001"])) == 5


def test_what_two_sweeps_make_at_once_is_tried_again_and_not_set_aside(
    tmp_path: Path, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server answers the slower of two that log one new dataset with 400."""
    log_inputs = counting.client.log_inputs
    failures = [MlflowException("UNIQUE constraint failed: datasets", error_code=BAD_REQUEST)]

    def slower(*arguments: Any, **named: Any) -> Any:
        if failures:
            raise failures.pop()
        return log_inputs(*arguments, **named)

    monkeypatch.setattr(counting.client, "log_inputs", slower)
    sender = Sender(Spool(spooled(tmp_path, embedded(tmp_path))))
    sender.send_all()
    assert sender.spool.refused() == []
    runs = runs_of(embedded(tmp_path))
    assert all(run.inputs.dataset_inputs for run in runs.values())
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_a_run_that_was_made_twice_is_kept_once(
    tmp_path: Path, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when an answer is lost and the HTTP client asks again."""
    make = counting.client.create_run

    def twice(*arguments: Any, **named: Any) -> Any:
        make(*arguments, **named)
        return make(*arguments, **named)

    monkeypatch.setattr(counting.client, "create_run", twice)
    Sender(Spool(spooled(tmp_path, embedded(tmp_path)))).send_all()
    found = MlflowClient(embedded(tmp_path)).search_runs(["1"])
    assert sorted(run.info.run_name for run in found) == ["s-1", "s-1-000", "s-1-001"]


def test_a_spool_has_one_sender(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = open_tracker(tmp_path, embedded(tmp_path))
    assert main(["replay", str(tmp_path / "tracking.jsonl")]) == 2
    assert "is held by another. Its sweep still runs" in capsys.readouterr().err
    tracker.close()
    assert main(["replay", str(tmp_path / "tracking.jsonl")]) == 0


def test_a_trials_run_is_there_before_it_begins(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path, embedded(tmp_path))
    assert tracker.wait_until_sent(60)
    tracker.trial_started("a", 0, {})
    run_id = tracker.run_id("a", patience_s=30)
    assert run_id
    assert MlflowClient(embedded(tmp_path)).get_run(run_id).data.tags["qafe.trial"] == "a"
    tracker.close()


def test_a_finished_trial_has_a_model_with_its_best_epochs_numbers(tmp_path: Path, checkpoint: Path) -> None:  # noqa: F811
    uri = embedded(tmp_path)
    tracker = open_tracker(tmp_path, uri)
    tracker.trial_started("a", 0, {})
    for step in (1, 2, 3):
        tracker.epoch("a", step, {"spearman": step / 10, "mae": 1 / step, "train_loss": 1.0})
    tracker.trial_ended("a", "finished", folder=checkpoint)
    tracker.sweep_ended("finished")
    assert tracker.close() == 0
    (tmp_path / "tracking.jsonl.sent").unlink()
    replay(tmp_path / "tracking.jsonl")
    run, client = runs_of(uri)["s-1-000"], MlflowClient(uri)
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert model.status == "READY"
    assert model.source_run_id == run.info.run_id
    assert model.tags["qafe.checkpoint"] == f"runs:/{run.info.run_id}/checkpoint"
    (output,) = run.outputs.model_outputs
    assert output.model_id == model.model_id
    best = output.step
    assert {row.key: (row.step, row.value) for row in model.metrics} == {
        "spearman": (best, best / 10),
        "mae": (best, 1 / best),
    }
    assert steps_of(uri, run) == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_refusals_are_the_clients_errors_that_no_waiting_ends() -> None:
    assert refusal(MlflowException("", error_code=BAD_REQUEST))
    for error in (MlflowException("", error_code=PERMISSION_DENIED), MlflowException(""), OSError(), None):
        assert not refusal(error)
