"""What tracking costs a training, and how many metrics a second arrive, against the usual ways, on real servers.

The training waits for what `sweeps.trial` and the driver do with an epoch: intervals over patients, system metrics, a
line in the spool. The rest happens beside it. The rivals are Ray's own MLflowLoggerCallback (one call a key, as it is
called by Ray Tune) and ``mlflow.log_metric``.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

import mlflow
from ray.air.integrations.mlflow import MLflowLoggerCallback

from qafe.config import tiny
from qafe.history import Epoch, ExpressionHistory, History
from qafe.metrics import evaluate
from qafe.train import EpochResult
from sweeps.monitor import Monitor
from sweeps.trial import summary
from tests.tracking import postgres
from tests.tracking.stores import embedded, free_port, server
from tracking.runs import SweepTracker

from .rounds import Found, Row

PATIENTS, CLIPS = 14, 42
"""On the validation side of a cohort of 41 patients, and theirs of one expression."""
EXPRESSIONS = ("sit_at_rest", "smile", "frown", "squeeze_eyes", "clench_teeth")
EPOCHS_OF_A_MINUTE = 30
OUR_EPOCHS, RIVAL_EPOCHS = 400, 8
METRICS = 12


def bench(rounds: int = 3) -> Found:
    """Both questions, on SQLite and, where it is installed, on PostgreSQL."""
    found = Found([])
    for name in ("SQLite", "PostgreSQL"):
        if name == "PostgreSQL" and not postgres.installed():
            found.left_out.append("PostgreSQL: initdb and postgres are not installed")
            continue
        with _store(name) as (folder, uri):
            if name == "SQLite":
                found.rows += _cost(folder, uri)
            found.rows += _speed(folder, uri, name, rounds)
    return found


@contextlib.contextmanager
def _store(name: str) -> Iterator[tuple[Path, str]]:
    with tempfile.TemporaryDirectory() as text, contextlib.ExitStack() as stack:
        folder = Path(text)
        backend = stack.enter_context(postgres.postgres()) if name == "PostgreSQL" else embedded(folder)
        yield folder, stack.enter_context(server(folder, free_port(), backend))


def _tracker(folder: Path, uri: str, name: str) -> SweepTracker:
    return SweepTracker(
        folder / name / "tracking.jsonl",
        uri=uri,
        experiment="bench",
        sweep=name,
        sweep_id=name,
        params={},
        tags={},
        dataset=("cohort", "0" * 64),
    )


def _cost(folder: Path, uri: str) -> list[Row]:
    """Seconds that a training waits: of an epoch, and of a whole trial of a minute.

    As in a sweep, intervals and system metrics are taken where nothing is sent (a worker), and lines are written
    beside the thread that sends (the driver).
    """
    config = tiny()
    rows = []
    worker: dict[int, list[tuple[float, dict[str, float]]]] = {}
    for count in (1, len(EXPRESSIONS)):
        monitor, history = Monitor(), dict[str, ExpressionHistory]()
        worker[count] = []
        for epoch in range(1, EPOCHS_OF_A_MINUTE + 1):
            results = _epoch(epoch, EXPRESSIONS[:count], history)
            time.sleep(0.1)
            begun = time.perf_counter()
            result = summary(results, history, config) | monitor.take()
            seconds = time.perf_counter() - begun
            worker[count].append((seconds, {name: value for name, value in result.items() if isinstance(value, float)}))
    tracker = _tracker(folder, uri, "cost")
    tracker.wait_until_sent(60)
    for count, reports in worker.items():
        begun = time.perf_counter()
        tracker.trial_started(str(count), count, {f"setting.{place}": place for place in range(60)})
        assert tracker.run_id(str(count), patience_s=5)
        start_s = time.perf_counter() - begun
        epochs = []
        for epoch, (seconds, metrics) in enumerate(reports, start=1):
            time.sleep(0.1)
            begun = time.perf_counter()
            tracker.epoch(str(count), epoch, metrics)
            epochs.append(seconds + time.perf_counter() - begun)
        begun = time.perf_counter()
        tracker.trial_ended(str(count), "finished", folder=None)
        share = (start_s + sum(epochs) + time.perf_counter() - begun) / 60
        several = f"{count} expression{'s' if count > 1 else ''}"
        notes = [
            f"longest {1e3 * max(epochs):.1f} ms; the trial's run is there after {1e3 * start_s:.0f} ms",
            f"{100 * share:.2f} % of a trial of 60 s and {EPOCHS_OF_A_MINUTE} epochs",
        ]
        rows.append(Row(f"tracking, {several} of {CLIPS} clips", "epoch", [statistics.median(epochs)], [], notes=notes))
    tracker.close()
    return rows


def _epoch(number: int, expressions: tuple[str, ...], history: History) -> dict[str, EpochResult]:
    rng = np.random.default_rng(number)
    results = {}
    for name in expressions:
        target = np.arange(CLIPS) % 5
        patients = [f"P{place % PATIENTS}" for place in range(CLIPS)]
        entry = history.setdefault(name, ExpressionHistory(ids=patients, patients=patients, target=target.tolist()))
        predictions = target + rng.normal(size=CLIPS)
        values = evaluate(predictions, target)
        entry.epochs.append(Epoch(epoch=number, train_loss=1.0, metrics=values, predictions=predictions.tolist()))
        entry.best_epoch = number
        results[name] = EpochResult(
            epoch=number, train_loss=1.0, lr=0.1, metrics=values, predictions=predictions, attention={},
            best_epoch=number, best_spearman=values["spearman"], seconds=1.0, evaluation_s=0.1, clips_per_s=1.0,
            peak_memory_mb=1.0, parameters=1, save=lambda _: None,
        )  # fmt: skip
    return results


def _speed(folder: Path, uri: str, store: str, rounds: int) -> list[Row]:
    """Seconds a metric, from the call until the server has it, in turns."""
    ours: list[float] = []
    rivals: dict[str, list[float]] = {"Ray's callback": [], "mlflow.log_metric": []}
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("rivals")
    tracker = _tracker(folder, uri, "speed")
    tracker.trial_started("0", 0, {})
    tracker.wait_until_sent(60)
    callback = MLflowLoggerCallback(tracking_uri=uri, experiment_name="rivals")
    callback.setup()
    trial = _Trial(folder)
    callback.log_trial_start(trial)
    for number in range(rounds):
        begun = time.perf_counter()
        for epoch in range(OUR_EPOCHS):
            tracker.epoch("0", number * OUR_EPOCHS + epoch, _numbers(epoch))
        assert tracker.wait_until_sent(300)
        ours.append((time.perf_counter() - begun) / (OUR_EPOCHS * METRICS))

        begun = time.perf_counter()
        for epoch in range(RIVAL_EPOCHS):
            step = number * RIVAL_EPOCHS + epoch
            callback.log_trial_result(
                epoch, trial, _numbers(epoch) | {"training_iteration": step, "timesteps_total": step}
            )
        rivals["Ray's callback"].append((time.perf_counter() - begun) / (RIVAL_EPOCHS * METRICS))

        with mlflow.start_run():
            begun = time.perf_counter()
            for epoch in range(RIVAL_EPOCHS):
                for name, value in _numbers(epoch).items():
                    mlflow.log_metric(name, value, step=epoch)
            rivals["mlflow.log_metric"].append((time.perf_counter() - begun) / (RIVAL_EPOCHS * METRICS))
    tracker.close()
    callback.log_trial_end(trial)
    return [
        Row(
            f"metrics to a server on {store}",
            "metric",
            ours,
            theirs,
            rival_name=name,
            notes=[f"{1 / statistics.median(ours):.0f} metrics a second, {name} {1 / statistics.median(theirs):.0f}"],
        )
        for name, theirs in rivals.items()
    ]


class _Trial:
    """What the callback asks of a trial of Ray Tune."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = {}
        self.local_path = str(folder)


def _numbers(epoch: int) -> dict[str, float]:
    return {f"metric_{number}": epoch + number / 100 for number in range(METRICS)}
