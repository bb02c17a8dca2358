"""What the driver does at each step of a sweep: track it, keep its disk in order, and tell people."""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState as StudyState
from ray.tune import Callback, Stopper
from ray.tune.experiment import Trial

from qafe import config as configs
from tracking.privacy import without_messages, without_paths
from tracking.runs import SweepTracker, TrialState

from . import checkpoints
from .control import Control
from .plan import Plan
from .searcher import DIVERGED, FAILED_AS, FINISHED, OBJECTIVE, Closing, StudySearcher
from .study import REASON, own_trials
from .trial import DATA, ROOM_POLL_S, TRACEBACK, has_room

TRACKED = ("spearman", "pearson", "mae", "train_loss", "lr", "epoch_s", "clips_per_s", "peak_memory_mb", OBJECTIVE)
RUNNING_CHECKPOINTS = 2
"""Of a running trial: the last, and the one before it should the last be damaged."""


def say(text: str) -> None:
    """One line for people."""
    print(text, file=sys.stderr, flush=True)


class TrackTrials(Callback):
    """Hands every trial's start, epochs and end to the tracker, which never makes the sweep wait."""

    def __init__(self, tracker: SweepTracker, plan: Plan, searcher: StudySearcher, control: Control) -> None:
        self.tracker = tracker
        self.base = configs.from_json(plan.config_json)
        self.folder = Path(plan.folder)
        self.searcher = searcher
        self.control = control
        self._batch: dict[int, int] = {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial was placed on a worker, for the first time or again."""
        config = configs.override(self.base, trial.config["settings"])
        number = trial.config["number"]
        self._batch.setdefault(number, config.train.batch_size)
        self.tracker.trial_started(str(number), number, configs.flatten(without_paths(config)))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """An epoch ended."""
        if result.get(FAILED_AS):
            return
        number = trial.config["number"]
        metrics = {name: value for name, value in result.items() if name in TRACKED or name.startswith("spearman_")}
        self.tracker.epoch(str(number), result["epoch"], metrics)
        if run_id := self.tracker.run_ids().get(str(number)):
            self.searcher.link(trial.trial_id, run_id)
        if result["batch_size"] < self._batch[number]:
            self._batch[number] = result["batch_size"]
            note = f"out of memory: goes on with batches of {result['batch_size']}, the clips of a step unchanged"
            self.tracker.trial_tags(str(number), {"qafe.note": note})
            say(f"trial {number} ran {note}")
        trial.run_metadata.num_failures = 0  # its worker was lost, and it has got on since: it has all chances again

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial finished, or was stopped early."""
        result, number = trial.last_result, trial.config["number"]
        failure = result.get(FAILED_AS)
        if result.get(FINISHED):
            self._end(trial, "finished", "")
        elif failure and failure != DIVERGED:
            self._end(trial, "failed", failure, result.get(TRACEBACK, ""))
            if failure == DATA:
                self.searcher.closed = Closing("data", result[REASON])
        elif failure:
            self._end(trial, "pruned", f"{failure}: {result[REASON]}", result.get(TRACEBACK, ""))
        else:
            by_hand = self.control.trial_stopped(number)
            how = "stopped by hand" if by_hand else "stopped early"
            self._end(trial, "pruned", f"{how} after epoch {result.get('epoch', 0)}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial failed for good."""
        error = trial.get_error()
        cause = getattr(error, "cause", error)
        frames = "".join(traceback.format_exception(error)) if error else ""
        self._end(trial, "failed", f"lost ({type(cause).__name__})", frames)

    def _end(self, trial: Trial, state: TrialState, reason: str, trace: str = "") -> None:
        number = trial.config["number"]
        folder = checkpoints.last(self.folder, number)
        self.tracker.trial_ended(
            str(number), state, folder=folder, reason=reason, trace=without_messages(trace) if trace else ""
        )


class KeepCheckpoints(Callback):
    """Deletes checkpoints as the sweep goes: old ones of running trials, and the weights of all but the best ended
    ones, once the tracker has sent what it makes of them."""

    def __init__(self, tracker: SweepTracker, plan: Plan, study: optuna.Study) -> None:
        self.tracker = tracker
        self.folder = Path(plan.folder)
        self.kept = plan.keep_checkpoints
        self.study = study
        self._thinned: dict[int, bool] = {}

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """A running trial has a new checkpoint."""
        checkpoints.drop_old(self.folder, trial.config["number"], RUNNING_CHECKPOINTS)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial has ended: there may be a new best."""
        self.tidy()

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """The last trials have ended."""
        self.tracker.wait_until_sent(patience_s=20)
        self.tidy()

    def tidy(self) -> None:
        """Thins the ended trials whose files the tracker has sent; finished ones come before pruned ones."""
        ended = own_trials(self.study, (StudyState.COMPLETE, StudyState.PRUNED, StudyState.FAIL))
        best = sorted(
            ended,
            key=lambda t: (t.state == StudyState.COMPLETE, max(t.intermediate_values.values(), default=-2.0)),
            reverse=True,
        )
        sent = self.tracker.ended_trials()
        for rank, trial in enumerate(best):
            keep_best = rank < self.kept
            if str(trial.number) in sent and self._thinned.get(trial.number) != keep_best:
                checkpoints.thin(self.folder, trial.number, keep_best=keep_best)
                self._thinned[trial.number] = keep_best


class WaitForRoom(Callback):
    """Waits while the disk is full, before the study or the spool is written to; says so once, and when it is over."""

    def __init__(self, control: Control) -> None:
        self.control = control
        self._said = False

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Between two events of the sweep."""
        folder = self.control.folder.parent
        while not has_room(folder):
            self._tell(True)
            time.sleep(ROOM_POLL_S)
        self._tell(self.control.waiting_for_room)

    def _tell(self, full: bool) -> None:
        if full != self._said:
            self._said = full
            place = self.control.folder.parent
            say(
                f"the disk of {place} is full: the sweep waits, nothing is lost. Make room."
                if full
                else "there is room again: the sweep goes on."
            )


class StopWhenAsked(Stopper):
    """Ends the sweep on ``python -m sweeps.stop``, or when a trial has found what every trial will find."""

    def __init__(self, searcher: StudySearcher, control: Control) -> None:
        self.searcher = searcher
        self.control = control

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No single trial is stopped here."""
        return False

    def stop_all(self) -> bool:
        """Whether all trials should stop."""
        closed = self.searcher.closed
        return self.control.stopped or (closed is not None and closed.kind == "data")


class TellPeople(Callback):
    """One line on stderr for each trial that ends.

    Args:
        planned: trials of the sweep.
        study: with the trials that earlier drivers have ended.
    """

    def __init__(self, planned: int, study: optuna.Study) -> None:
        self.planned = planned
        own = [trial for trial in own_trials(study) if trial.state.is_finished()]
        self.before = self.ended = len(own)
        finished = [max(t.intermediate_values.values()) for t in own if t.state == StudyState.COMPLETE]
        self.best: float | None = max(finished, default=None)
        self.started = time.monotonic()

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Says how the trial did, what the best is and how long the rest may take."""
        result = trial.last_result
        if result.get(FINISHED):
            self.best = max(self.best if self.best is not None else -1.0, result[OBJECTIVE])
        failure = result.get(FAILED_AS)
        if failure:
            how = "pruned" if failure == DIVERGED else "failed"
            self._say(trial, f"{how} ({failure}): {result[REASON]}")
            return
        how = "finished" if result.get(FINISHED) else f"pruned after epoch {result.get('epoch', 0)}"
        self._say(trial, f"{how}, validation Spearman {result.get(OBJECTIVE, float('nan')):.3f}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Says what went wrong."""
        self._say(trial, f"failed (lost): {str(trial.get_error()).strip().splitlines()[-1]}")

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Says that a trial lost its worker and goes on."""
        epoch = trial.last_result.get("epoch", 0) if trial.last_result else 0
        say(f"trial {trial.config['number']} lost its worker; it goes on after epoch {epoch}")

    def _say(self, trial: Trial, what: str) -> None:
        self.ended += 1
        left_s = (time.monotonic() - self.started) / (self.ended - self.before) * max(self.planned - self.ended, 0)
        best = "" if self.best is None else f"; best {self.best:.3f}"
        say(f"[{self.ended}/{self.planned}] trial {trial.config['number']} {what}{best}; about {left_s:.0f} s left")
