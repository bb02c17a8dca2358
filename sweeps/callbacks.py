"""What the driver does at each step of a sweep: track it, keep its disk in order, and tell people."""

from __future__ import annotations

import dataclasses
import os
import pickle
import sys
import time
import traceback
from typing import Any

import optuna
from optuna.trial import TrialState as StudyState
from ray import cloudpickle
from ray.tune import Callback, Stopper
from ray.tune.experiment import Trial

from qafe import dotted
from qafe.data.cohort import Cohort
from tracking.privacy import without_messages, without_paths
from tracking.pseudonyms import load_key, pseudonym
from tracking.runs import SweepTracker, TrialState

from .control import AWAY, FULL, Control
from .plan import Plan
from .progress import PACE, Pace, Progress, duration, progress_of
from .provenance import trial_tags
from .results import DIVERGED, FAILED_AS, FINISHED, OBJECTIVE
from .searcher import Closing, Pause, StudySearcher
from .storage import Storage
from .study import BY_HAND, REASON, own_trials, pareto_set
from .trial import DATA, ROOM_POLL_S, RUNNING_CHECKPOINTS, TRACEBACK, has_room

TRACKED = ("spearman", "pearson", "mae", "train_loss", "lr", "epoch_s", "clips_per_s", "peak_memory_mb", OBJECTIVE)
TRACKED_GROUPS = ("spearman_", "system/")
RUN_PATIENCE_S = 1.0
"""How long a trial's start waits for its run: as a rule it is there in a tenth of that."""


def say(text: str) -> None:
    """One line for people."""
    print(text, file=sys.stderr, flush=True)


def epochs_of(trial: Trial) -> int:
    """How many epochs the driver has heard of."""
    told = trial.last_result.get("epoch", 0) if trial.last_result else 0
    return int(max(told, trial.config["epochs"]))


def error_of(trial: Trial) -> Exception | None:
    """What a trial was lost of, from the driver's own disk: ``Trial.get_error`` reads the checkpoints' storage."""
    path = trial.pickled_error_file
    try:
        with open(path or os.devnull, "rb") as content:
            found = cloudpickle.load(content)
    except (OSError, EOFError, AttributeError, ImportError, TypeError, pickle.UnpicklingError):
        return None
    return found if isinstance(found, Exception) else None


class TrackTrials(Callback):
    """Hands every trial's start, epochs and end to the tracker, which never makes the sweep wait."""

    def __init__(
        self,
        tracker: SweepTracker,
        plan: Plan,
        cohort: Cohort,
        searcher: StudySearcher,
        control: Control,
        storage: Storage,
    ) -> None:
        self.tracker = tracker
        self.plan = plan
        self.cohort = cohort
        self.base = dotted.from_json(plan.config_json)
        self.searcher = searcher
        self.control = control
        self.storage = storage
        self._batch: dict[int, int] = {}
        self._workers: dict[int, str] = {}
        self._left: dict[int, str] = {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial was placed on a worker, for the first time or again."""
        self.searcher.placed(trial.trial_id)
        config = dotted.override(self.base, trial.config["settings"])
        number = trial.config["number"]
        self._batch.setdefault(number, config.train.batch_size)
        tags = trial_tags(config, self.cohort, number, self.plan.sampler)
        self.tracker.trial_started(str(number), number, dotted.flatten(without_paths(config)), tags)
        if run_id := self.tracker.run_id(str(number), RUN_PATIENCE_S):  # before its first step
            self.searcher.link(trial.trial_id, run_id)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """An epoch ended."""
        if result.get(FAILED_AS):
            return
        number = trial.config["number"]
        metrics = {name: value for name, value in result.items() if name in TRACKED or name.startswith(TRACKED_GROUPS)}
        self.tracker.epoch(str(number), result["epoch"], metrics)
        if run_id := self.tracker.run_id(str(number)):  # the server was away when the trial began
            self.searcher.link(trial.trial_id, run_id)
        if self._workers.get(number) != result["worker"]:
            self._workers[number] = result["worker"]
            self.tracker.trial_tags(str(number), self._machine(result))
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
            kind = result[REASON].partition(":")[0]  # the error's class: its message may name a patient's file
            self._end(trial, "failed", f"{failure}: {kind}", result.get(TRACEBACK, ""))
            if failure == DATA:
                self.searcher.closed = Closing("data", result[REASON])
        elif failure:
            self._end(trial, "pruned", f"{failure}: {result[REASON]}", result.get(TRACEBACK, ""))
        else:
            by_hand = number in self.searcher.stopped_by_hand
            self._end(trial, "pruned", BY_HAND if by_hand else f"stopped early after epoch {result.get('epoch', 0)}")

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial lost its worker; that it was asked to leave is no failure."""
        number, epoch = trial.config["number"], epochs_of(trial)
        self.control.withdraw(f"{FULL}-{number}")
        self.control.withdraw(f"{AWAY}-{number}")
        left = self.storage.left(number, after=epoch)
        if left and left != self._left.get(number):  # each counts once
            self._left[number] = left
            trial.run_metadata.num_failures = 0
            say(f"trial {number}: its worker was asked to leave; it goes on in the middle of epoch {epoch + 1}")
        else:
            say(f"trial {number} lost its worker; it goes on after epoch {epoch}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial failed for good."""
        error = error_of(trial)
        cause = getattr(error, "cause", error)
        frames = "".join(traceback.format_exception(error)) if error else ""
        self._end(trial, "failed", f"lost ({type(cause).__name__})", frames)

    def _machine(self, result: dict[str, Any]) -> dict[str, str]:
        """Where a trial runs; a machine's name may be a person's."""
        host = result["worker"].partition(":")[0]
        tags = {"qafe.host": host if self.plan.identifiable else pseudonym(host, load_key())}
        return tags | ({"qafe.gpu": result["gpu"]} if result.get("gpu") else {})

    def _end(self, trial: Trial, state: TrialState, reason: str, trace: str = "") -> None:
        number = trial.config["number"]
        try:
            folder = self.storage.last(number)
        except OSError as err:  # raised, Tune would take it for the trial's own, and begin the trial again
            if not self.storage.given_up():
                self.searcher.closed = Closing("storage", f"--storage gives: {' '.join(str(err).split())}.")
            return  # the next driver tells the tracker
        self.tracker.trial_ended(
            str(number),
            state,
            folder=folder,
            reason=reason,
            trace=trace if self.plan.identifiable else without_messages(trace),
        )


class KeepCheckpoints(Callback):
    """Deletes checkpoints as the sweep goes: old ones of running trials, and the weights of all but the best ended
    ones, once the tracker has sent what it makes of them."""

    def __init__(self, tracker: SweepTracker, plan: Plan, study: optuna.Study, storage: Storage) -> None:
        self.tracker = tracker
        self.storage = storage
        self.kept = plan.keep_checkpoints
        self.study = study
        self._thinned: dict[int, bool] = {}
        self._grown: set[int] = set()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """A running trial has a new checkpoint; its worker waits, so nothing is deleted yet."""
        if not self.storage.bucket:  # there the worker does it
            self._grown.add(trial.config["number"])

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """The worker has been told to go on."""
        while self._grown:
            self.storage.drop_old(self._grown.pop(), RUNNING_CHECKPOINTS)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial has ended: there may be a new best."""
        self.tidy()

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """The last trials have ended."""
        self.tracker.wait_until_sent(patience_s=20)
        self.tidy()

    def tidy(self) -> None:
        """Thins the ended trials whose files the tracker has sent; finished ones come before pruned ones, and those of
        the Pareto set before all."""
        pareto = pareto_set(self.study)
        ended = own_trials(self.study, (StudyState.COMPLETE, StudyState.PRUNED, StudyState.FAIL))
        best = sorted(
            ended,
            key=lambda t: (
                t.number in pareto,
                t.state == StudyState.COMPLETE,
                max(t.intermediate_values.values(), default=-2.0),
            ),
            reverse=True,
        )
        sent = self.tracker.ended_trials()
        for rank, trial in enumerate(best):
            keep_best = rank < self.kept
            if str(trial.number) in sent and self._thinned.get(trial.number) != keep_best:
                if not self.storage.thin(trial.number, keep_best=keep_best):
                    return  # another time
                self._thinned[trial.number] = keep_best


class WaitForRoom(Callback):
    """Waits while the disk is full, before the study or the spool is written to; says so once, and when it is over.
    Says the same of a folder that trials wait for."""

    def __init__(self, control: Control) -> None:
        self.control = control
        self._said = False
        self._data = ""

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Between two events of the sweep."""
        folder = self.control.folder.parent
        while not has_room(folder) and not self.control.stopped:
            self._tell(True)
            time.sleep(ROOM_POLL_S)
        self._tell(self.control.waiting_for_room)
        if (why := self.control.waiting_for_a_folder) != self._data:
            self._data = why
            say(f"trials wait, nothing is lost: {why}." if why else "what trials waited for is there again.")

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
    """Ends the trials when somebody ends the sweep, when a trial has found what every trial will find, or when all of
    them rest for a pause."""

    def __init__(self, searcher: StudySearcher, control: Control, pause: Pause) -> None:
        self.searcher = searcher
        self.control = control
        self.pause = pause

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No single trial is stopped here."""
        return False

    def stop_all(self) -> bool:
        """Whether all trials should stop.

        Raises:
            KeyboardInterrupt: somebody ends the sweep. Tune would give each worker ten seconds to end its epoch.
        """
        if self.control.stopped:
            raise KeyboardInterrupt
        closed = self.searcher.closed
        ends = closed is not None and closed.kind in ("data", "storage")
        return ends or self.pause.complete


class MeasurePace(Callback):
    """Measures how fast trials get on, for the driver's view and, through the study, for ``python -m sweeps.status``.

    Args:
        plan: the sweep.
        study: with the trials of earlier drivers, too.
    """

    def __init__(self, plan: Plan, study: optuna.Study) -> None:
        self.plan = plan
        self.whole_epochs = dotted.from_json(plan.config_json).train.epochs
        self.study = study
        self.at_work: dict[int, Trial] = {}
        """Trials on a worker, by number."""
        self._busy_s = 0.0
        self._epochs = 0
        self._queued_s = 0.0
        self._queued_busy_s = 0.0
        self._looked: float | None = None

    @property
    def pace(self) -> Pace | None:
        """What was measured; None before the first epoch has ended."""
        if not self._epochs or not self._busy_s:
            return None
        # While trials wait for their turn all places are taken; at the end of a sweep some are empty.
        workers = self._queued_busy_s / self._queued_s if self._queued_busy_s else float(len(self.at_work))
        return Pace(workers=round(workers, 3), epoch_s=round(self._busy_s / self._epochs, 3))

    def progress(self) -> Progress:
        """Where the sweep stands."""
        trials = own_trials(self.study)
        return progress_of(trials, planned=self.plan.trials, epochs=self.whole_epochs, pace=self.pace)

    def begin(self) -> None:
        """Ray begins, or begins again after a pause, which is not counted."""
        self.at_work.clear()
        self._looked = None

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """A moment later."""
        now = time.monotonic()
        passed = now - self._looked if self._looked is not None else 0.0
        self._looked = now
        self._busy_s += passed * len(self.at_work)
        if self.at_work and trials[-1].status == Trial.PENDING:
            self._queued_s += passed
            self._queued_busy_s += passed * len(self.at_work)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial was placed on a worker."""
        self.at_work[trial.config["number"]] = trial

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """An epoch ended."""
        self._epochs += not result.get(FAILED_AS)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial lost its worker."""
        self.at_work.pop(trial.config["number"], None)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial ended: others may want to know how fast that goes."""
        self.at_work.pop(trial.config["number"], None)
        if pace := self.pace:
            self.study.set_user_attr(PACE, dataclasses.asdict(pace))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial failed for good."""
        self.at_work.pop(trial.config["number"], None)


class TellPeople(Callback):
    """One line on stderr for each trial that ends."""

    def __init__(self, pace: MeasurePace) -> None:
        self.pace = pace

    def __enter__(self) -> TellPeople:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def look(self) -> None:
        """Called again and again while the sweep is paused."""

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Says how the trial did, what the best is and how long the rest may take."""
        result = trial.last_result
        failure = result.get(FAILED_AS)
        if failure:
            how = "pruned" if failure == DIVERGED else "failed"
            self._say(trial, f"{how} ({failure}): {result[REASON]}")
            return
        how = "finished" if result.get(FINISHED) else f"pruned after epoch {result.get('epoch', 0)}"
        self._say(trial, f"{how}, validation Spearman {result.get(OBJECTIVE, float('nan')):.3f}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Says what went wrong."""
        self._say(trial, f"failed (lost): {(str(error_of(trial)).strip().splitlines() or [''])[-1]}")

    def _say(self, trial: Trial, what: str) -> None:
        now = self.pace.progress()
        best = f"; best {now.best[1]:.3f}" if now.best else ""
        left = "" if not now.left_s else f"; about {duration(now.left_s)} left"
        say(f"[{now.ended}/{now.planned}] trial {trial.config['number']} {what}{best}{left}")
