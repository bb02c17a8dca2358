"""Optuna under Ray Tune: which trial comes next, whether one goes on, and what became of it.

Ray's own OptunaSearch tells early-stopped trials as COMPLETE with an early value, leaves trials with NaN running for
ever, and keeps its map of trials in a pickle; Ray's schedulers lose their rungs with the driver. Here both sides ask
the study: the searcher first gives out the trials that a dead driver left running, under their own numbers, and then
new ones; the scheduler stops a trial when the study's pruner says so.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any, Literal, NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from qafe import dotted

from .control import Control
from .plan import Plan
from .progress import SECONDS
from .results import DIVERGED, FAILED_AS, FINISHED, NO_SKILL, OBJECTIVE
from .study import (
    ATTEMPTS,
    BASELINE,
    BY_HAND,
    FAILURE,
    REASON,
    RUN_ID,
    epochs_of,
    make_sampler,
    next_number,
    open_study,
    own_trials,
    stopped_state,
)
from .sweep import Suggester, Sweep
from .warm_start import add_earlier_trials

SECONDS_NOTED_S = 10.0
"""How much of a running trial's time may be missing from the study: each note is a write to a disk."""
VALUES = {"spearman": OBJECTIVE, "params": "params", "seconds": "epoch_s", "mae": "best_mae"}
"""The result that each of the study's objectives is read from."""


class Closing(NamedTuple):
    """Why no trial is begun any more, though some are planned.

    ``data``: a trial found what every trial would find. ``budget``: the hours of ``--budget-gpu-hours`` are used.
    ``storage``: checkpoints cannot be read any more.
    """

    kind: Literal["data", "budget", "storage"]
    reason: str


class StudySearcher(Searcher):
    """Asks Optuna for each trial's settings and tells it what came of them.

    Args:
        plan: the sweep; its base config's own values are the first trial.
        sweep: what is searched.
        places: how many trials the cluster runs at once. So many workers start side by side; beyond them one trial at
            a time waits for its turn, so that each is chosen from all that is known by then.
    """

    def __init__(self, plan: Plan, sweep: Sweep, places: float = math.inf) -> None:
        super().__init__(metric=OBJECTIVE, mode="max")
        self.plan = plan
        self.places = places
        self.space = sweep.space
        self.base = dotted.from_json(plan.config_json)
        self.study = open_study(plan)
        self.pinned = frozenset(plan.pinned)
        points = sweep.points(self.base, self.pinned)
        for number in range(len(self.study.get_trials(deepcopy=False)), len(points)):
            self.study.enqueue_trial(points[number], user_attrs={BASELINE: True} if number == 0 else None)
        add_earlier_trials(self.study, plan, sweep)
        self._begun = len(own_trials(self.study))
        self._open: dict[str, optuna.Trial] = {}
        self._placed: set[str] = set()
        self._epochs: dict[int, int] = {}
        self._seconds: dict[int, float] = {}
        self._noted: dict[int, float] = {}
        self.closed: Closing | None = None
        self.stopped_by_hand: set[int] = set()
        self.begin()

    def begin(self) -> None:
        """Gives out the trials that the study has as running, before any new ones: Ray begins, or begins again."""
        self._open.clear()
        self._placed.clear()
        self._interrupted = deque(own_trials(self.study, (TrialState.RUNNING,)))
        self.pausing = False
        """Whether Ray is to come to rest: no trial is given out."""

    @property
    def left(self) -> bool:
        """Whether trials run, or are still to be begun."""
        return self._begun < self.plan.trials or bool(own_trials(self.study, (TrialState.RUNNING,)))

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # FINISHED is a str
        """A trial to run: its number, its settings by dotted name, and the epochs that the study knows of it."""
        if self.pausing:
            return str(Searcher.FINISHED)
        if len(self._open) - len(self._placed) >= max(1, self.places - len(self._placed)):
            return None  # asked again later
        if self._interrupted:
            frozen = self._interrupted.popleft()
            self.study.sampler = make_sampler(self.plan.sampler, self.plan.seed, frozen.number)
            trial, epochs = optuna.Trial(self.study, frozen._trial_id), epochs_of(frozen)
        elif self.closed or self._begun >= self.plan.trials:
            return str(Searcher.FINISHED)
        elif not self._within_budget():
            if self._open:
                return None  # asked again later: one of them may be stopped early
            used, unit = budget_used(self.study, self.plan), self.plan.cost_unit
            self.closed = Closing(
                "budget",
                f"the budget of {self.plan.budget_hours:g} {unit} ended the sweep: {used:.3g} are used, and another "
                f"trial would not fit ({self._begun} of {self.plan.trials} trials were begun).",
            )
            return str(Searcher.FINISHED)
        else:
            self.study.sampler = make_sampler(self.plan.sampler, self.plan.seed, next_number(self.study))
            trial, epochs = self.study.ask(), 0
            self._begun += 1
        attempt = trial.user_attrs.get(ATTEMPTS, 0)
        trial.set_user_attr(ATTEMPTS, attempt + 1)
        self.space(Suggester(trial, self.base, self.pinned))  # what was suggested before is what it gets again
        self._open[trial_id] = trial
        self._epochs[trial.number] = epochs
        self._seconds[trial.number] = self._noted[trial.number] = trial.user_attrs.get(SECONDS, 0.0)
        return {"settings": dict(trial.params), "number": trial.number, "epochs": epochs, "attempt": attempt}

    def placed(self, trial_id: str) -> None:
        """A trial has a worker."""
        self._placed.add(trial_id)

    def report(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Tells the study of an epoch; True if the trial should be stopped early.

        The baseline never is: it is what the others are compared with.
        """
        trial = self._open[trial_id]
        self._seconds[trial.number] += result.get("epoch_s", 0.0)
        if self._seconds[trial.number] - self._noted[trial.number] >= SECONDS_NOTED_S:
            self._note_seconds(trial)
        if result["epoch"] > self._epochs[trial.number]:  # a trial that lost its worker repeats
            self._epochs[trial.number] = result["epoch"]
            self.study._storage.set_trial_intermediate_value(trial._trial_id, result["epoch"], result[OBJECTIVE])
        if trial.user_attrs.get(BASELINE) or result.get(FINISHED) or len(self.plan.objectives) > 1:
            return False
        return self.study.pruner.prune(self.study, self._frozen(trial))

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: the scheduler has reported it already."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tells the study how a trial ended."""
        trial = self._open.pop(trial_id, None)
        self._placed.discard(trial_id)
        if trial is None or self._frozen(trial).state.is_finished():
            return
        self._note_seconds(trial)
        failure = result.get(FAILED_AS) if result else None
        if failure == DIVERGED:
            self._epochs[trial.number] += 1
            self.study._storage.set_trial_intermediate_value(trial._trial_id, self._epochs[trial.number], NO_SKILL)
        if failure or error or not result:
            trial.set_user_attr(FAILURE, failure or "lost")
        if result and result.get(REASON):
            trial.set_user_attr(REASON, result[REASON])
        elif trial.number in self.stopped_by_hand:
            trial.set_user_attr(REASON, BY_HAND)
        if result and result.get(FINISHED):
            values = [float(result[VALUES[name]]) for name in self.plan.objectives]
            self.study.tell(trial, values)
        elif result and not error and failure in (None, DIVERGED):
            self.study.tell(trial, state=stopped_state(self.study))
        else:
            self.study.tell(trial, state=TrialState.FAIL)

    def rest(self) -> None:
        """Notes how long the trials have run that Ray has left unfinished."""
        for trial in self._open.values():
            self._note_seconds(trial)

    def _note_seconds(self, trial: optuna.Trial) -> None:
        seconds = self._seconds[trial.number]
        if seconds > self._noted[trial.number]:
            trial.set_user_attr(SECONDS, round(seconds, 3))
            self._noted[trial.number] = seconds

    def _within_budget(self) -> bool:
        """Whether another trial fits into the budget, beside what is used and what running trials may still need.

        Running trials count as if none of them were stopped early, and the new one as much as ended ones took on
        average; so all of the budget that early stopping saves goes to further trials. What a trial needs is not
        known before the first epochs: as many as there are workers always begin.
        """
        if self.plan.budget_hours is None:
            return True
        trials = own_trials(self.study)
        seconds_of = {t.number: self._seconds.get(t.number, t.user_attrs.get(SECONDS, 0.0)) for t in trials}
        trained = [(t, seconds_of[t.number], epochs_of(t)) for t in trials if seconds_of[t.number]]
        epochs = sum(heard for *_, heard in trained)
        if not epochs:
            return True
        used_s = sum(seconds for _, seconds, _ in trained)
        whole_s = self.base.train.epochs * used_s / epochs
        pace_s = {trial.number: seconds / heard for trial, seconds, heard in trained if heard}
        running_s = sum(
            (self.base.train.epochs - epochs_of(trial)) * pace_s.get(trial.number, used_s / epochs)
            for trial in trials
            if trial.state == TrialState.RUNNING
        )
        ended = [seconds for trial, seconds, _ in trained if trial.state.is_finished()]
        next_s = sum(ended) / len(ended) if ended else whole_s
        needed_s: float = used_s + running_s + next_s
        return needed_s * self.plan.device_share / 3600 <= self.plan.budget_hours

    def link(self, trial_id: str, run_id: str) -> None:
        """Notes the MLflow run of a running trial."""
        trial = self._open.get(trial_id)
        if trial is not None and trial.user_attrs.get(RUN_ID) != run_id:
            trial.set_user_attr(RUN_ID, run_id)

    def note(self, trial_id: str, name: str, value: Any) -> None:
        """Gives a running trial a user attribute."""
        if (trial := self._open.get(trial_id)) is not None:
            trial.set_user_attr(name, value)

    def _frozen(self, trial: optuna.Trial) -> FrozenTrial:
        return self.study._storage.get_trial(trial._trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is on disk already."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study is on disk already."""


def budget_used(study: optuna.Study, plan: Plan) -> float:
    """Hours of training so far, in the unit of ``plan.cost_unit``: over all trials and drivers of the sweep."""
    seconds: float = sum(trial.user_attrs.get(SECONDS, 0.0) for trial in own_trials(study))
    return seconds * plan.device_share / 3600


class Pause(Callback):
    """Brings all trials to rest, each at the end of its epoch, when people ask for a pause; then Ray may end.

    Ray Tune's own PAUSE will not do: it hands a paused trial's worker to the next trial in line, which trains for an
    epoch, is paused, and so on through all that are planned; and it keeps workers, with their GPU memory, for reuse.
    Here a trial that rests is just not asked for another epoch. When all do, Ray ends as on Ctrl-C, and after the
    pause it begins again with the trials that the study has as running.
    """

    def __init__(self, searcher: StudySearcher, control: Control) -> None:
        self.searcher = searcher
        self.control = control
        self._awaited: set[str] = set()

    @property
    def begun(self) -> bool:
        """Whether trials are being brought to rest: this is carried through, even if people change their minds."""
        return self.searcher.pausing

    @property
    def complete(self) -> bool:
        """Whether every trial rests that was in the middle of an epoch when the pause began."""
        return self.begun and not self._awaited

    def rests(self, trial_id: str) -> None:
        """A trial has come to the end of an epoch."""
        self._awaited.discard(trial_id)

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Looks whether a pause is wished for, and which trials it still waits for."""
        if not self.begun:
            if not self.control.paused:
                return
            self.searcher.pausing = True
            self._awaited = {trial.trial_id for trial in trials if trial.status == Trial.RUNNING}
        # One that ended, or lost its worker, is not waited for; nor is one that began after the pause.
        self._awaited &= {trial.trial_id for trial in trials if trial.status == Trial.RUNNING}


class StudyScheduler(FIFOScheduler):
    """Runs trials in the order in which they were suggested; stops and rests them as study and people say."""

    def __init__(self, searcher: StudySearcher, control: Control, pause: Pause) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.searcher = searcher
        self.control = control
        self.pause = pause

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """An epoch ended: whether its trial goes on."""
        if result.get(FAILED_AS) or result.get(FINISHED):
            if result.get(FINISHED):
                self.searcher.report(trial.trial_id, result)
            return str(TrialScheduler.CONTINUE)  # it ends by itself
        stop, number = self.searcher.report(trial.trial_id, result), trial.config["number"]
        if self.control.trial_stopped(number):
            self.searcher.stopped_by_hand.add(number)
            stop = True
        if not stop and self.pause.begun:
            self.pause.rests(trial.trial_id)
            return str(TrialScheduler.NOOP)
        return str(TrialScheduler.STOP if stop else TrialScheduler.CONTINUE)
