"""A tracking server that is stopped for a minute and killed once, in the middle of a sweep."""

import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from tests.sweeps.running import Sweep
from tests.tracking.stores import free_port, server

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
