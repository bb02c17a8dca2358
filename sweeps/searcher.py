"""Optuna under Ray Tune: which trial comes next, whether one goes on, and what became of it.

Ray's own OptunaSearch tells early-stopped trials as COMPLETE with an early value, leaves trials with NaN running for
ever, and keeps its map of trials in a pickle; Ray's schedulers lose their rungs with the driver. Here both sides ask
the study: the searcher first gives out the trials that a dead driver left running, under their own numbers, and then
new ones; the scheduler stops a trial when the study's pruner says so.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Literal, NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from qafe import config as configs

from .control import Control
from .plan import Plan
from .study import ATTEMPTS, BASELINE, FAILURE, REASON, RUN_ID, SECONDS, epochs_of, open_study, own_trials
from .sweep import Suggester, Sweep

OBJECTIVE = "best_spearman"
"""What a sweep maximises: the mean over expressions of the best epoch's validation Spearman."""
FINISHED = "finished"
FAILED_AS = "failed_as"
"""What a trial reports as the class of its failure; see `sweeps.trial`."""
DIVERGED = "diverged"
NO_SKILL = -1.0
"""What the study hears of the epoch in which a loss was not finite: the lowest Spearman there is."""
VALUES = {"spearman": OBJECTIVE, "params": "params", "seconds": "epoch_s", "mae": "best_mae"}
"""The result that each of the study's objectives is read from."""


class Closing(NamedTuple):
    """Why no trial is begun any more, though some are planned.

    ``data``: a trial found what every trial would find. ``budget``: the hours of ``--budget-gpu-hours`` are used.
    """

    kind: Literal["data", "budget"]
    reason: str


class StudySearcher(Searcher):
    """Asks Optuna for each trial's settings and tells it what came of them.

    Args:
        plan: the sweep; its base config's own values are the first trial.
        sweep: what is searched.
    """

    def __init__(self, plan: Plan, sweep: Sweep) -> None:
        super().__init__(metric=OBJECTIVE, mode="max")
        self.plan = plan
        self.space = sweep.space
        self.base = configs.from_json(plan.config_json)
        self.study = open_study(plan)
        self.pinned = frozenset(plan.pinned)
        if not self.study.get_trials(deepcopy=False):
            self.study.enqueue_trial(sweep.baseline(self.base, self.pinned), user_attrs={BASELINE: True})
        self._interrupted = deque(own_trials(self.study, (TrialState.RUNNING,)))
        self._begun = len(own_trials(self.study))
        self._open: dict[str, optuna.Trial] = {}
        self._epochs: dict[int, int] = {}
        self.closed: Closing | None = None

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # FINISHED is a str
        """A trial to run: its number, its settings by dotted name, and the epochs that the study knows of it."""
        if self._interrupted:
            frozen = self._interrupted.popleft()
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
            trial, epochs = self.study.ask(), 0
            self._begun += 1
        attempt = trial.user_attrs.get(ATTEMPTS, 0)
        trial.set_user_attr(ATTEMPTS, attempt + 1)
        self.space(Suggester(trial, self.base, self.pinned))  # what was suggested before is what it gets again
        self._open[trial_id] = trial
        self._epochs[trial.number] = epochs
        return {"settings": dict(trial.params), "number": trial.number, "epochs": epochs, "attempt": attempt}

    def report(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Tells the study of an epoch; True if the trial should be stopped early.

        The baseline never is: it is what the others are compared with.
        """
        trial = self._open[trial_id]
        trial.set_user_attr(SECONDS, trial.user_attrs.get(SECONDS, 0.0) + result.get("epoch_s", 0.0))
        if result["epoch"] > self._epochs[trial.number]:  # a trial that lost its worker repeats
            self._epochs[trial.number] = result["epoch"]
            self.study._storage.set_trial_intermediate_value(trial._trial_id, result["epoch"], result[OBJECTIVE])
        if BASELINE in trial.user_attrs or result.get(FINISHED) or len(self.plan.objectives) > 1:
            return False
        return self.study.pruner.prune(self.study, self._frozen(trial))

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: the scheduler has reported it already."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tells the study how a trial ended."""
        trial = self._open.pop(trial_id, None)
        if trial is None or self._frozen(trial).state.is_finished():
            return
        failure = result.get(FAILED_AS) if result else None
        if failure == DIVERGED:
            self._epochs[trial.number] += 1
            self.study._storage.set_trial_intermediate_value(trial._trial_id, self._epochs[trial.number], NO_SKILL)
        if failure or error or not result:
            trial.set_user_attr(FAILURE, failure or "lost")
        if result and result.get(REASON):
            trial.set_user_attr(REASON, result[REASON])
        if result and result.get(FINISHED):
            values = [float(result[VALUES[name]]) for name in self.plan.objectives]
            self.study.tell(trial, values)
        elif result and not error and failure in (None, DIVERGED):
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            self.study.tell(trial, state=TrialState.FAIL)

    def _within_budget(self) -> bool:
        """Whether another trial fits into the budget, beside what is used and what running trials may still need.

        Running trials count as if none of them were stopped early, and the new one as much as ended ones took on
        average; so all of the budget that early stopping saves goes to further trials. What a trial needs is not
        known before the first epochs: as many as there are workers always begin.
        """
        if self.plan.budget_hours is None:
            return True
        trials = own_trials(self.study)
        trained = [(t, t.user_attrs[SECONDS], epochs_of(t)) for t in trials if t.user_attrs.get(SECONDS)]
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


class StudyScheduler(FIFOScheduler):
    """Runs trials in the order in which they were suggested; stops, pauses and starts them as study and people say."""

    def __init__(self, searcher: StudySearcher, control: Control) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.searcher = searcher
        self.control = control

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """An epoch ended: whether its trial goes on."""
        if result.get(FAILED_AS) or result.get(FINISHED):
            if result.get(FINISHED):
                self.searcher.report(trial.trial_id, result)
            return str(TrialScheduler.CONTINUE)  # it ends by itself
        if self.searcher.report(trial.trial_id, result):
            return str(TrialScheduler.STOP)
        if self.control.trial_stopped(trial.config["number"]):
            return str(TrialScheduler.STOP)
        return str(TrialScheduler.PAUSE if self.control.paused else TrialScheduler.CONTINUE)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The next trial, or none while the sweep is paused."""
        return None if self.control.paused else super().choose_trial_to_run(tune_controller)
