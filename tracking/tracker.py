"""What a sweep talks to: it only appends to a local spool, and a background thread sends that to MLflow."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .guard import Secrets
from .sender import Sender, now_ms
from .spool import Spool
from .tags import TrialState

logger = logging.getLogger(__name__)

SPOOL_FILE = "tracking.jsonl"
LONGEST_VALUE = 500
ROUND_S = 0.2
"""Between two rounds of sending: what comes meanwhile shares its requests."""


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
        clips: how many of them each part of the data has.
        secrets: what must not leave; see `guard.Guard`.
        identifiable: let it leave all the same, and note that in every run.
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
        clips: Mapping[str, int] | None = None,
        secrets: Secrets | None = None,
        identifiable: bool = False,
    ) -> None:
        self.spool = Spool(spool_path)
        past = list(self.spool.entries())
        self._started = {entry["trial"] for entry in past if entry["kind"] == "trial"}
        self._running: set[str] = set()
        self._ended: dict[str, TrialState] = {}
        for entry in past:
            if entry["kind"] == "trial":
                self._running.add(entry["trial"])
                self._ended.pop(entry["trial"], None)
            elif entry["kind"] == "trial_end":
                self._running.discard(entry["trial"])
                if not entry.get("presumed"):
                    self._ended[entry["trial"]] = entry["state"]
        self._seen = {(entry["trial"], entry["step"]) for entry in past if entry["kind"] == "epoch"}
        self._sender = Sender(self.spool)
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._soon = threading.Event()
        secrets = secrets or Secrets.of_machine()
        self._append(
            kind="open",
            uri=uri,
            experiment=experiment,
            sweep=sweep,
            sweep_id=sweep_id,
            params=_texts(params),
            tags=dict(tags),
            dataset={"name": dataset[0], "digest": dataset[1], "clips": dict(clips or {})},
            names=list(secrets.names),
            folders=list(secrets.folders),
            own=list(secrets.own),
            identifiable=identifiable,
        )
        self._thread = threading.Thread(target=self._send_forever, name="mlflow-sender", daemon=True)
        self._thread.start()

    @classmethod
    def again(cls, spool_path: Path) -> SweepTracker | None:
        """The tracker of a sweep whose process has died, as that process opened it; None if it had not yet."""
        if not spool_path.exists():
            return None
        spool = Spool(spool_path)
        opened = [entry for entry in spool.entries() if entry["kind"] == "open"]
        spool.close()
        if not opened:
            return None
        last = opened[-1]
        return cls(
            spool_path,
            **{
                name: last[name]
                for name in ("uri", "experiment", "sweep", "sweep_id", "params", "tags", "identifiable")
            },
            dataset=(last["dataset"]["name"], last["dataset"]["digest"]),
            clips=last["dataset"]["clips"],
            secrets=Secrets(names=tuple(last["names"]), folders=tuple(last["folders"]), own=tuple(last["own"])),
        )

    def trial_started(
        self, trial: str, number: int, params: Mapping[str, Any], tags: Mapping[str, str] | None = None
    ) -> None:
        """A trial begins, or goes on after a crash."""
        self._started.add(trial)
        self._running.add(trial)
        self._ended.pop(trial, None)
        self._append(kind="trial", trial=trial, number=number, params=_texts(params), tags=dict(tags or {}))
        self._soon.set()  # somebody may wait for its run

    def run_id(self, trial: str, patience_s: float = 0.0) -> str:
        """MLflow's id of a trial's run; empty where the server has not given one while patience lasted.

        A server that is known to be away is not waited for: the run is made later, and found by its tags.
        """
        deadline = time.monotonic() + patience_s
        while not (found := self._sender.runs.get(trial, "")) and self._sender.well and time.monotonic() < deadline:
            time.sleep(0.01)
        return found

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
        presumed: bool = False,
    ) -> None:
        """A trial's final state; folder is its last checkpoint, from which artifacts and figures are made, and trace
        the traceback of what ended it (``failure.txt``).

        A trial that was planned and never started has no run to end. An end that is ``presumed`` nobody has seen.
        """
        if trial not in self._started:
            return
        self._running.discard(trial)
        if not presumed:
            self._ended[trial] = state
        self._append(
            kind="trial_end",
            trial=trial,
            state=state,
            folder=self._beside(folder) if folder else "",
            reason=reason,
            trace=trace,
            presumed=presumed,
            epochs=max((step for number, step in self._seen if number == trial), default=0),
        )

    def ended_as(self, trial: str) -> TrialState | None:
        """How a trial ended; None if that was never said, or it has begun again since."""
        return self._ended.get(trial)

    def trial_tags(self, trial: str, tags: Mapping[str, str]) -> None:
        """Notes about a trial that runs."""
        self._append(kind="trial_tags", trial=trial, tags=dict(tags))

    def trial_metrics(self, trial: str, metrics: Mapping[str, float]) -> None:
        """Numbers about a trial that are known after its end, such as its test Spearman."""
        self._append(kind="trial_metrics", trial=trial, metrics=dict(metrics))

    def sweep_files(self, folder: Path, metrics: Mapping[str, float]) -> None:
        """The sweep's report: every file of a folder, and the numbers that sum the sweep up."""
        self._append(kind="sweep_files", folder=self._beside(folder), metrics=dict(metrics))

    def sweep_ended(self, state: TrialState) -> None:
        """The sweep's final state; trials that nobody has ended, as after a crash, end with it."""
        for trial in sorted(self._running):
            left: TrialState = "killed" if state == "killed" else "failed"
            self.trial_ended(trial, left, folder=None, reason="its sweep ended without it", presumed=True)
        self._append(kind="sweep_end", state=state)

    def close(self, patience_s: float = 60.0) -> int:
        """Sends what is left, for as long as patience lasts, and returns how many entries could not be sent."""
        self._stop.set()
        self._wake.set()
        self._soon.set()
        self._thread.join(timeout=patience_s)
        self._sender.given_up.set()
        self.spool.close()
        return sum(1 for _ in self.spool.unsent())

    @property
    def refused(self) -> int:
        """How many entries the server would not take; a replay tries them again."""
        return len(self.spool.refused())

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
        while time.monotonic() < deadline:
            if next(self.spool.unsent(), None) is None:
                return True
            self._wake.set()
            self._soon.set()
            time.sleep(0.05)
        return False

    def _beside(self, folder: Path) -> str:
        """A folder as the spool names it: from its own, so that a sweep may be moved before a replay."""
        here, folder = self.spool.path.parent.absolute(), folder.absolute()
        return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)

    def _append(self, **entry: Any) -> None:
        self.spool.append(entry | {"time": now_ms()})
        self._wake.set()

    def _send_forever(self) -> None:
        delay_s = 1.0
        while True:
            self._wake.clear()
            self._soon.clear()
            try:
                sent = self._sender.send_all()
                self._sender.well = True
                delay_s = 1.0
                if sent == 0 and self._stop.is_set():
                    return
                if sent == 0:
                    self._wake.wait()
                else:
                    self._soon.wait(ROUND_S)
            except Exception as err:  # a full disk, a damaged line: the thread must outlive what it cannot foresee
                self._sender.well = False
                logger.warning("tracking waits: %s", err)
                time.sleep(1.0) if self._stop.is_set() else self._stop.wait(delay_s)
                delay_s = min(2 * delay_s, 30.0)


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value)[:LONGEST_VALUE] for name, value in values.items()}
