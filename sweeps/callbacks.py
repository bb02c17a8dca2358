"""What the driver does at each step of a sweep: track it, and tell people."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial

from qafe import config as configs
from qafe.config import Config
from tracking.privacy import without_paths
from tracking.runs import SweepTracker, TrialState

from .searcher import FINISHED, OBJECTIVE, REFUSED

TRACKED = ("spearman", "pearson", "mae", "train_loss", "lr", "epoch_s", "clips_per_s", "peak_memory_mb", OBJECTIVE)


class TrackTrials(Callback):
    """Hands every trial's start, epochs and end to the tracker, which never makes the sweep wait."""

    def __init__(self, tracker: SweepTracker, base: Config) -> None:
        self.tracker = tracker
        self.base = base

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial was placed on a worker, for the first time or again."""
        config = configs.override(self.base, trial.config["settings"])
        self.tracker.trial_started(trial.trial_id, trial.config["number"], configs.flatten(without_paths(config)))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """An epoch ended."""
        if "spearman" not in result:  # the last words of a trial that diverged or was refused
            return
        metrics = {name: value for name, value in result.items() if name in TRACKED or name.startswith("spearman_")}
        self.tracker.epoch(trial.trial_id, result["epoch"], metrics)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial finished, or was stopped early."""
        result = trial.last_result
        state: TrialState = "finished" if result.get(FINISHED) else "failed" if result.get(REFUSED) else "pruned"
        reason = {
            "finished": "",
            "failed": _class_of(result.get(REFUSED, "")),
            "pruned": result.get("diverged") or f"stopped early after epoch {result.get('epoch', 0)}",
        }[state]
        self.tracker.trial_ended(trial.trial_id, state, folder=checkpoint_folder(trial), reason=reason)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial failed for good."""
        error = trial.get_error()
        reason = _class_of(type(getattr(error, "cause", error)).__name__)
        self.tracker.trial_ended(trial.trial_id, "failed", folder=checkpoint_folder(trial), reason=reason)


class TellPeople(Callback):
    """One line on stderr for each trial that ends."""

    def __init__(self, planned: int) -> None:
        self.planned = planned
        self.ended = 0  # of the trials of this driver; a resumed sweep has ended some before
        self.best: float | None = None
        self.started = time.monotonic()

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Says how the trial did, what the best is and how long the rest may take."""
        result = trial.last_result
        if result.get(FINISHED):
            self.best = max(self.best if self.best is not None else -1.0, result[OBJECTIVE])
        if result.get(REFUSED):
            self._say(trials, trial, f"failed: {result[REFUSED]}")
            return
        how = "finished" if result.get(FINISHED) else f"pruned after epoch {result.get('epoch', 0)}"
        self._say(trials, trial, f"{how}, validation Spearman {result.get(OBJECTIVE, float('nan')):.3f}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Says what went wrong."""
        self._say(trials, trial, f"failed: {str(trial.get_error()).strip().splitlines()[-1]}")

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Says that a trial lost its worker and goes on."""
        epoch = trial.last_result.get("epoch", 0) if trial.last_result else 0
        print(f"trial {trial.config['number']} lost its worker; it goes on after epoch {epoch}", file=sys.stderr)

    def _say(self, trials: list[Trial], trial: Trial, what: str) -> None:
        self.ended += 1
        everything = 1 + sum(o is not trial and o.status in (Trial.TERMINATED, Trial.ERROR) for o in trials)
        left_s = (time.monotonic() - self.started) / self.ended * max(self.planned - everything, 0)
        best = "" if self.best is None else f"; best {self.best:.3f}"
        print(
            f"[{everything}/{self.planned}] trial {trial.config['number']} {what}{best}; about {left_s:.0f} s left",
            file=sys.stderr,
            flush=True,
        )


def _class_of(error: str) -> str:
    """What a failed run says of its error: the class, since a message may name a patient's file."""
    return f"{error.partition(':')[0]} (the message is in the sweep's own output)"


def checkpoint_folder(trial: Trial) -> Path | None:
    """The folder of a trial's last checkpoint, or None before the first."""
    checkpoint = trial.checkpoint
    return Path(checkpoint.path) if checkpoint is not None else None
