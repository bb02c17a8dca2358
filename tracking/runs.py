"""One parent run for a sweep, one child run for each trial, fed from a local spool.

`SweepTracker` is what a sweep talks to: it only appends to the spool. A background thread sends the spool's
entries to MLflow in order, waits out a server that is away, and finds runs again by their tags after a crash.
``python -m tracking.runs replay SPOOL`` sends what a sweep could not.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag

from qafe import console
from qafe.errors import TrackingError

from . import figures
from .connection import connect, embedded_path, masked
from .pseudonyms import load_key
from .spool import Entry, Spool

logger = logging.getLogger(__name__)

TrialState = Literal["finished", "pruned", "failed", "killed"]
SPOOL_FILE = "tracking.jsonl"
SWEEP_TAG = "qafe.sweep"
SWEEP_ID_TAG = "qafe.sweep_id"
TRIAL_TAG = "qafe.trial"
STATE_TAG = "qafe.state"
REASON_TAG = "qafe.reason"
MLFLOW_STATUS: dict[str, str] = {
    "finished": "FINISHED",
    "pruned": "FINISHED",
    "failed": "FAILED",
    "killed": "KILLED",
}
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Makes the MLflow UI open the model training views, not those for language models."""
FAILURE_FILE = "failure.txt"
LONGEST_VALUE = 500
EPOCHS_EVERY_S = 1.0
"""Epochs that end within this time are sent together: a request costs the driver's machine the same for many."""
LARGEST_BATCH = 1000
"""Metrics in one request, as MLflow allows."""


def now_ms() -> int:
    """The time, as MLflow counts it."""
    return int(time.time() * 1000)


class SweepTracker:
    """Tracks a sweep; every call returns at once.

    Args:
        spool_path: where the spool lies; an existing one is continued.
        uri: the tracking store, as `connection.resolve_uri` gave it.
        experiment: MLflow experiment, one for each study.
        sweep: name of the sweep, for people.
        sweep_id: of the sweep alone, in any store: its runs are found again by it.
        params: the sweep's own params; its trials have theirs.
        tags: of the sweep and of every trial (versions, commit).
        dataset: name and digest of the data.
    """

    def __init__(
        self,
        spool_path: Path,
        *,
        uri: str,
        experiment: str,
        sweep: str,
        sweep_id: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        dataset: tuple[str, str],
    ) -> None:
        self.spool = Spool(spool_path)
        past = list(self.spool.entries())
        self._started = {entry["trial"] for entry in past if entry["kind"] == "trial"}
        self._running: set[str] = set()
        for entry in past:
            if entry["kind"] == "trial":
                self._running.add(entry["trial"])
            elif entry["kind"] == "trial_end":
                self._running.discard(entry["trial"])
        self._seen = {(entry["trial"], entry["step"]) for entry in past if entry["kind"] == "epoch"}
        self._sender = Sender(self.spool)
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._append(
            kind="open",
            uri=uri,
            experiment=experiment,
            sweep=sweep,
            sweep_id=sweep_id,
            params=_texts(params),
            tags=dict(tags),
            dataset=list(dataset),
        )
        self._thread = threading.Thread(target=self._send_forever, name="mlflow-sender", daemon=True)
        self._thread.start()

    def trial_started(self, trial: str, number: int, params: Mapping[str, Any]) -> None:
        """A trial begins, or goes on after a crash."""
        self._started.add(trial)
        self._running.add(trial)
        self._append(kind="trial", trial=trial, number=number, params=_texts(params))

    def epoch(self, trial: str, step: int, metrics: Mapping[str, float]) -> None:
        """One epoch's metrics; an epoch that was tracked already is left as it is."""
        if (trial, step) not in self._seen:
            self._seen.add((trial, step))
            self._append(kind="epoch", trial=trial, step=step, metrics=dict(metrics))

    def trial_ended(
        self,
        trial: str,
        state: TrialState,
        *,
        folder: Path | None,
        reason: str = "",
        trace: str = "",
    ) -> None:
        """A trial's final state; folder is its last checkpoint, from which artifacts and figures are made, and trace
        the traceback of what ended it (``failure.txt``).

        A trial that was planned and never started has no run to end.
        """
        if trial not in self._started:
            return
        self._running.discard(trial)
        self._append(
            kind="trial_end",
            trial=trial,
            state=state,
            folder=str(folder) if folder else "",
            reason=reason,
            trace=trace,
        )

    def trial_tags(self, trial: str, tags: Mapping[str, str]) -> None:
        """Notes about a trial that runs."""
        self._append(kind="trial_tags", trial=trial, tags=dict(tags))

    def trial_metrics(self, trial: str, metrics: Mapping[str, float]) -> None:
        """Numbers about a trial that are known after its end, such as its test Spearman."""
        self._append(kind="trial_metrics", trial=trial, metrics=dict(metrics))

    def sweep_files(self, folder: Path, metrics: Mapping[str, float]) -> None:
        """The sweep's report: every file of a folder, and the numbers that sum the sweep up."""
        self._append(kind="sweep_files", folder=str(folder), metrics=dict(metrics))

    def sweep_ended(self, state: TrialState) -> None:
        """The sweep's final state; trials that nobody has ended, as after a crash, end with it."""
        for trial in sorted(self._running):
            left: TrialState = "killed" if state == "killed" else "failed"
            self.trial_ended(trial, left, folder=None, reason="its sweep ended without it")
        self._append(kind="sweep_end", state=state)

    def close(self, patience_s: float = 60.0) -> int:
        """Sends what is left, for as long as patience lasts, and returns how many entries could not be sent."""
        self._stop.set()
        self._hurry.set()
        self._wake.set()
        self._thread.join(timeout=patience_s)
        self._sender.given_up.set()
        self.spool.close()
        return sum(1 for _ in self.spool.unsent())

    def run_ids(self) -> dict[str, str]:
        """MLflow run ids of what has been sent so far: by trial, and the sweep's own under ``""``."""
        return dict(self._sender.runs)

    def ended_trials(self) -> frozenset[str]:
        """Trials whose end, with all files, has been sent."""
        return frozenset(self._sender.ended)

    @property
    def experiment_id(self) -> str:
        """MLflow's id of the experiment, once the first entry has been sent."""
        return self._sender.experiment_id

    def wait_until_sent(self, patience_s: float) -> bool:
        """Waits until the spool is empty; False when patience ran out."""
        deadline = time.monotonic() + patience_s
        self._hurry.set()
        try:
            while time.monotonic() < deadline:
                if next(self.spool.unsent(), None) is None:
                    return True
                self._wake.set()
                time.sleep(0.05)
            return False
        finally:
            if not self._stop.is_set():
                self._hurry.clear()

    def _append(self, **entry: Any) -> None:
        self.spool.append(entry | {"time": now_ms()})
        self._wake.set()

    def _send_forever(self) -> None:
        delay_s = 1.0
        while True:
            self._wake.clear()
            try:
                sent = self._sender.send_all()
                delay_s = 1.0
                if sent == 0 and self._stop.is_set():
                    return
                if sent == 0:
                    self._wake.wait()
                    self._hurry.wait(EPOCHS_EVERY_S)
            except Exception as err:  # a full disk, a damaged line: the thread must outlive what it cannot foresee
                logger.warning("tracking waits: %s", err)
                time.sleep(1.0) if self._stop.is_set() else self._stop.wait(delay_s)
                delay_s = min(2 * delay_s, 30.0)


class Sender:
    """Turns a spool's entries into MLflow runs, in order, each any number of times with the same result."""

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.runs: dict[str, str] = {}
        self.ended: set[str] = set()
        self.experiment_id = ""
        self.given_up = threading.Event()
        """Set when the rest is left to a replay, which must be the only one to send it."""
        self._client: MlflowClient | None = None
        self._opened: Entry | None = None
        self._handlers: dict[str, Callable[[MlflowClient, Entry], None]] = {
            "open": self._open,
            "trial": self._trial,
            "epoch": self._epoch,
            "trial_end": self._trial_end,
            "trial_tags": self._trial_tags,
            "trial_metrics": self._trial_metrics,
            "sweep_files": self._sweep_files,
            "sweep_end": self._sweep_end,
        }

    def send_all(self) -> int:
        """Sends every unsent entry and returns how many there were.

        Raises:
            TrackingError: the server did not take one; it and the rest stay unsent.
        """
        count = 0
        for entries, size, place in _together(self.spool.unsent()):
            if self.given_up.is_set():
                break
            for entry in entries:
                self._send(entry)
            self.spool.mark_sent(place)
            count += size
        return count

    def _send(self, entry: Entry) -> None:
        if entry["kind"] == "open":
            self._opened, self._client, self.runs = entry, None, {}
        if self._opened is None:  # the spool goes on after an opening that has been sent
            self._opened = [past for past in self.spool.entries() if past["kind"] == "open"][-1]
        try:
            if self._client is None:
                client = connect(self._opened["uri"])
                self.experiment_id = _experiment(client, self._opened["experiment"], self._opened["uri"])
                self._client = client
            self._handlers[entry["kind"]](self._client, entry)
        except TrackingError:
            raise
        except Exception as err:  # MLflow and its database drivers raise almost anything
            raise TrackingError(
                f"the tracking server must take a sweep's {entry['kind']} entry, got {type(err).__name__} from "
                f"{masked(self._opened['uri'])}: {str(err)[:200]}. The entry is kept in {self.spool.path}."
            ) from err

    def _run_id(self, client: MlflowClient, trial: str, entry: Entry | None = None) -> str:
        """The run of a trial (or, for ``""``, of the sweep): known, found by its tags, or made."""
        if trial in self.runs:
            return self.runs[trial]
        assert self._opened is not None
        sweep, sweep_id = self._opened["sweep"], self._opened["sweep_id"]
        found = client.search_runs(
            [self.experiment_id],
            filter_string=f"tags.`{SWEEP_ID_TAG}` = '{sweep_id}' AND tags.`{TRIAL_TAG}` = '{trial or 'none'}'",
            max_results=1,
        )
        if found:
            run_id: str = found[0].info.run_id
        else:
            tags = {SWEEP_TAG: sweep, SWEEP_ID_TAG: sweep_id, TRIAL_TAG: trial or "none"}
            tags["mlflow.source.name"] = "sweeps.run"
            if trial:
                tags["mlflow.parentRunId"] = self._run_id(client, "")
            name = f"{sweep}-{entry['number']:03d}" if entry and trial else sweep
            started = entry["time"] if entry else now_ms()
            run_id = client.create_run(self.experiment_id, start_time=started, tags=tags, run_name=name).info.run_id
        self.runs[trial] = run_id
        return run_id

    def _open(self, client: MlflowClient, entry: Entry) -> None:
        self._begin(client, self._run_id(client, "", entry), entry["params"])

    def _trial(self, client: MlflowClient, entry: Entry) -> None:
        self._begin(client, self._run_id(client, entry["trial"], entry), entry["params"])

    def _begin(self, client: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
        """Params, tags and dataset of a run that begins or goes on."""
        assert self._opened is not None
        known = client.get_run(run_id)
        # MLflow refuses to log a param twice: a run that goes on gets only what it does not have.
        new = [Param(name, value) for name, value in params.items() if name not in known.data.params]
        for start in range(0, len(new), 100):
            client.log_batch(run_id, params=new[start : start + 100])
        for ending in {STATE_TAG, REASON_TAG} & known.data.tags.keys():
            client.delete_tag(run_id, ending)
        client.log_batch(run_id, tags=[RunTag(name, value) for name, value in self._opened["tags"].items()])
        if not (known.inputs and known.inputs.dataset_inputs):
            name, digest = self._opened["dataset"]
            dataset = Dataset(name=name, digest=digest[:36], source_type="local", source="{}")
            context = [InputTag("mlflow.data.context", "training")]
            client.log_inputs(run_id, [DatasetInput(dataset=dataset, tags=context)])
        client.update_run(run_id, status="RUNNING")

    def _epoch(self, client: MlflowClient, entry: Entry) -> None:
        run_id = self._run_id(client, entry["trial"])
        epochs = entry.get("epochs", [entry])
        rows = [
            Metric(name, value, epoch["time"], epoch["step"])
            for epoch in epochs
            for name, value in epoch["metrics"].items()
        ]
        for start in range(0, len(rows), LARGEST_BATCH):
            client.log_batch(run_id, metrics=rows[start : start + LARGEST_BATCH])

    def _trial_end(self, client: MlflowClient, entry: Entry) -> None:
        run_id = self._run_id(client, entry["trial"])
        if entry["folder"]:
            key = load_key()
            with contextlib.ExitStack() as stack:
                try:
                    folder = stack.enter_context(figures.trial_files(Path(entry["folder"]), key))
                except Exception as err:  # whatever is wrong with the checkpoint, the run has to end
                    logger.warning("run %s gets no files: %s", run_id, err)
                else:
                    client.log_artifacts(run_id, str(folder))
        if entry.get("trace"):
            client.log_text(run_id, entry["trace"], FAILURE_FILE)
        client.set_tag(run_id, STATE_TAG, entry["state"])
        if entry["reason"]:
            client.set_tag(run_id, REASON_TAG, entry["reason"])
        client.set_terminated(run_id, status=MLFLOW_STATUS[entry["state"]], end_time=entry["time"])
        self.ended.add(entry["trial"])

    def _trial_tags(self, client: MlflowClient, entry: Entry) -> None:
        run_id = self._run_id(client, entry["trial"])
        client.log_batch(run_id, tags=[RunTag(name, value) for name, value in entry["tags"].items()])

    def _trial_metrics(self, client: MlflowClient, entry: Entry) -> None:
        _log_metrics(client, self._run_id(client, entry["trial"]), entry["metrics"], entry["time"], 0)

    def _sweep_files(self, client: MlflowClient, entry: Entry) -> None:
        run_id = self._run_id(client, "")
        client.log_artifacts(run_id, entry["folder"])
        _log_metrics(client, run_id, entry["metrics"], entry["time"], 0)

    def _sweep_end(self, client: MlflowClient, entry: Entry) -> None:
        run_id = self._run_id(client, "")
        client.set_tag(run_id, STATE_TAG, entry["state"])
        client.set_terminated(run_id, status=MLFLOW_STATUS[entry["state"]], end_time=entry["time"])


def _together(unsent: Iterator[tuple[Entry, int]]) -> Iterator[tuple[list[Entry], int, int]]:
    """What is sent before the cursor moves, how many entries of the spool it is, and the cursor's place then.

    Epochs in a row become one entry a trial, which holds them as ``epochs``.
    """
    for epochs, group in itertools.groupby(unsent, key=lambda found: found[0]["kind"] == "epoch"):
        if not epochs:
            yield from (([entry], 1, place) for entry, place in group)
            continue
        found = list(group)
        of_trial: dict[str, list[Entry]] = {}
        for entry, _ in found:
            of_trial.setdefault(entry["trial"], []).append(entry)
        together: list[Entry] = [{"kind": "epoch", "trial": name, "epochs": each} for name, each in of_trial.items()]
        yield together, len(found), found[-1][1]


def sweep_exists(client: MlflowClient, sweep: str) -> bool:
    """Whether a sweep of this name is in the store, in any experiment.

    Raises:
        TrackingError: it is no name of a sweep.
    """
    return any(run.data.tags.get(TRIAL_TAG) == "none" for run in search_sweep(client, SWEEP_TAG, sweep))


def search_sweep(client: MlflowClient, tag: str, value: str) -> list[Run]:
    """The runs of the sweeps that have this value of `SWEEP_TAG` or `SWEEP_ID_TAG`, in any experiment.

    Raises:
        TrackingError: the value has characters that names of sweeps do not have.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]+", value):
        raise TrackingError(f"a sweep's name has only letters, digits and . _ -, got {value!r}. Name another sweep.")
    experiments = [found.experiment_id for found in client.search_experiments()]
    return list(client.search_runs(experiments, f"tags.`{tag}` = '{value}'", max_results=5000))


def _experiment(client: MlflowClient, name: str, uri: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        store = embedded_path(uri)
        # MLflow's own default is mlruns in the current folder, which is another one in the next process.
        beside = (store.parent / "mlruns" / name).as_uri() if store else None
        return str(client.create_experiment(name, artifact_location=beside, tags=EXPERIMENT_TAGS))
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _log_metrics(client: MlflowClient, run_id: str, metrics: Mapping[str, float], time_ms: int, step: int) -> None:
    client.log_batch(run_id, metrics=[Metric(name, value, time_ms, step) for name, value in metrics.items()])


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value)[:LONGEST_VALUE] for name, value in values.items()}


def replay(spool_path: Path) -> int:
    """Sends what a spool still holds to its own store and returns how many entries that was.

    Raises:
        TrackingError: there is no such spool, or the server does not answer.
    """
    if not spool_path.is_file():
        raise TrackingError(f"a spool is a file that a sweep left, got {spool_path}. Name a sweep's {SPOOL_FILE}.")
    return Sender(Spool(spool_path)).send_all()


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m tracking.runs replay SPOOL``."""
    parser = console.parser("python -m tracking.runs", "Send what a sweep could not send to its tracking server.")
    parser.add_argument("command", choices=["replay"])
    parser.add_argument("spool", type=Path, help=f"{SPOOL_FILE} in a sweep's folder")
    return console.run(_main, parser, argv)


def _main(options: argparse.Namespace) -> int:
    print(json.dumps({"sent": replay(options.spool)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
