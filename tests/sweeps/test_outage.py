"""A tracking server in the middle of a sweep: stopped for a minute and killed; backed up and restored elsewhere."""

import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

import tracking.server
from tests.sweeps.running import Sweep
from tests.tracking.stores import embedded, free_port, server
from tracking import registry

pytestmark = pytest.mark.slow

AWAY_S = 60
FLAGS = ["--trials", "3", "--scheduler", "none", "--cpus-per-trial", "1"]


def kill_server(port: int) -> None:
    """kill -9 of a server of this process, with its workers."""
    ours = [child for child in psutil.Process().children() if str(port) in child.cmdline()]
    assert ours
    for process in [each for parent in ours for each in [*parent.children(recursive=True), parent]]:
        process.kill()


def epochs_of(sweep: Sweep) -> list[dict[str, object]]:
    return [entry for entry in sweep.spooled() if entry["kind"] == "epoch"]


def test_no_step_is_lost_or_doubled_and_no_epoch_is_slower(
    sample_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    with server(tmp_path, port) as uri:
        sweep = Sweep(tmp_path, sample_root, *FLAGS, "--set", "train.epochs=150", uri=uri)
        process = sweep.start()
        sweep.wait_for_epoch(10)
    stopped = 1000 * time.time()
    time.sleep(AWAY_S)
    back = 1000 * time.time()
    assert process.poll() is None, "the sweep must last longer than the outage"
    with server(tmp_path, port):
        before = len(epochs_of(sweep))
        while len(epochs_of(sweep)) < before + 10 and process.poll() is None:
            time.sleep(0.2)
        time.sleep(3)  # in the middle of sending
        assert process.poll() is None, "the sweep must last longer than the outage"
        kill_server(port)
        time.sleep(5)
    with server(tmp_path, port):
        assert process.wait(timeout=500) == 0, sweep.text
        assert "did not reach the tracking server" not in sweep.text
        client, runs = MlflowClient(uri), sweep.runs()
        assert sorted(runs) == ["s-1", "s-1-000", "s-1-001", "s-1-002"]
        assert {run.info.status for run in runs.values()} == {"FINISHED"}
        spooled: dict[tuple[str, str], list[tuple[int, int, float]]] = defaultdict(list)
        for entry in sweep.spooled():
            if entry["kind"] in ("epoch", "trial_metrics"):
                for name, value in entry["metrics"].items():
                    row = (entry.get("step", 0), entry["time"], value)
                    spooled[f"s-1-{int(entry['trial']):03d}", name].append(row)
        assert len(spooled) > 3 * 15
        for (run, name), rows in spooled.items():
            found = client.get_metric_history(runs[run].info.run_id, name)
            assert sorted((row.step, row.timestamp, row.value) for row in found) == sorted(rows), (run, name)
        for run in ("s-1-000", "s-1-001", "s-1-002"):
            assert [row[0] for row in sorted(spooled[run, "spearman"])] == list(range(1, 151))
    times: dict[bool, list[float]] = {True: [], False: []}
    for entry in epochs_of(sweep):
        times[stopped < entry["time"] < back].append(entry["metrics"]["epoch_s"])
    away, there = (statistics.median(times[key]) for key in (True, False))
    with capsys.disabled():
        counts = {"rows": sum(map(len, spooled.values())), "epochs_away": len(times[True])}
        print(json.dumps(counts | {"epoch_s_away": round(away, 4), "epoch_s_there": round(there, 4)}))
    assert len(times[True]) >= 10
    assert away < 1.3 * there


def content(client: MlflowClient, run: Run, folder: Path) -> dict[str, Any]:
    """All that a run holds: metrics with their steps and times, params, tags, and its artifacts byte by byte."""
    steps = {
        name: [(row.step, row.timestamp, row.value) for row in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    files = files_of(f"runs:/{run.info.run_id}/", client.tracking_uri, folder)
    return {"metrics": steps, "params": run.data.params, "tags": run.data.tags, "files": files}


def files_of(address: str, uri: str, folder: Path) -> dict[str, bytes]:
    """What a tracking server has there."""
    folder.mkdir(parents=True)
    mlflow.set_tracking_uri(uri)  # models:/ are looked up there
    place = Path(mlflow.artifacts.download_artifacts(address, dst_path=str(folder)))
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_a_backup_in_the_middle_of_a_sweep_is_all_there_elsewhere(sample_root: Path, tmp_path: Path) -> None:
    port, flags = free_port(), ["--backend", embedded(tmp_path)]
    with server(tmp_path, port) as uri:
        sweep = Sweep(tmp_path, sample_root, *FLAGS, "--set", "train.epochs=100", uri=uri)
        process, client = sweep.start(), MlflowClient(uri)
        sweep.wait_for_epoch(100)
        first = sweep.runs()["s-1-000"].info
        while first.run_id not in {model.source_run_id for model in client.search_logged_models([first.experiment_id])}:
            assert process.poll() is None, sweep.text  # what is sent last of a trial is not there yet
            time.sleep(0.2)
        assert registry.main(["--tracking-uri", uri, "register", "--sweep", "s-1", "--trial", "0"]) == 0
        assert registry.main(["--tracking-uri", uri, "promote", "qafe-net", "1"]) == 0
        champion = files_of("models:/qafe-net@champion", uri, tmp_path / "champion")
        before = sweep.runs()
        assert tracking.server.main(["backup", *flags, str(tmp_path / "backup")]) == 0
        assert process.poll() is None, "the sweep must last longer than the backup"
        assert process.wait(timeout=300) == 0, sweep.text
        ended = {name: content(client, run, tmp_path / "here" / name) for name, run in sweep.runs().items()}
    new = tmp_path / "new"
    assert tracking.server.main(["restore", str(tmp_path / "backup"), str(new)]) == 0
    with server(new, free_port()) as uri:
        client = MlflowClient(uri)
        runs = {run.info.run_name: run for run in client.search_runs([first.experiment_id])}
        assert set(before) <= set(runs)
        assert runs["s-1-000"].info.status == "FINISHED"
        there = {name: content(client, run, tmp_path / "there" / name) for name, run in runs.items()}
        ended["s-1-000"]["metrics"].pop("test_spearman", None)  # measured at the very end, if this is the best trial
        assert there["s-1-000"] == ended["s-1-000"]
        for name, found in there.items():
            for metric, rows in found["metrics"].items():  # of a trial that went on: what it had by then
                assert set(rows) <= set(ended[name]["metrics"][metric]), (name, metric)
        assert client.get_model_version_by_alias("qafe-net", "champion").run_id == first.run_id
        assert first.run_id in {model.source_run_id for model in client.search_logged_models([first.experiment_id])}
        assert files_of("models:/qafe-net@champion", uri, tmp_path / "champion there") == champion
