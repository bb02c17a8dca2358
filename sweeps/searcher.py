"""Optuna under Ray Tune, with one durable study that knows what really became of each trial.

Ray's own OptunaSearch tells early-stopped trials as COMPLETE with an early value, leaves trials with NaN running for
ever, and keeps its map of trials in a pickle. Here the study lies in a journal file under the sweep's own name;
early-stopped and diverged trials are told PRUNED with their intermediate values; and the map from Ray's trials to
Optuna's is kept in the study itself, so that a restored sweep finds it there.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray.tune.search import Searcher

from qafe import config as configs
from qafe.config import Config

from .sweep import Study, Suggester

OBJECTIVE = "best_spearman"
"""What a sweep maximises: the mean over expressions of the best epoch's validation Spearman."""
RAY_TRIAL = "ray_trial"
FINISHED = "finished"
REFUSED = "refused"
"""What a trial reports whose settings or data cannot work: trying again would not help."""


class StudySearcher(Searcher):
    """Asks Optuna for each trial's settings and tells it what came of them.

    Args:
        study: what is searched.
        base: the config that the settings are changes of; its own values are the first trial.
        pinned: settings of the study that keep the base's value.
        journal: file of the Optuna study.
        sweep: the Optuna study's name.
        seed: of the sampler.
    """

    def __init__(
        self, study: Study, base: Config, pinned: frozenset[str], journal: Path, sweep: str, seed: int
    ) -> None:
        super().__init__(metric=OBJECTIVE, mode="max")
        self.space = study.space
        self.base = base
        self.pinned = pinned
        self.journal = journal
        self.sweep = sweep
        self.seed = seed
        self._study = open_study(journal, sweep, seed)
        self._trials: dict[str, optuna.Trial] = {}
        if not self._study.get_trials(deepcopy=False):
            self._study.enqueue_trial(study.baseline(base, pinned), user_attrs={"baseline": True})

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """The settings of a new trial, flat, by dotted name."""
        trial = self._study.ask()
        trial.set_user_attr(RAY_TRIAL, trial_id)
        self.space(Suggester(trial, self.base, self.pinned))
        self._trials[trial_id] = trial
        return {"settings": dict(trial.params), "number": trial.number}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Reports an epoch's objective."""
        if not result.get(REFUSED):
            self._report(self._trials[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tells the study how a trial ended."""
        trial = self._trials.pop(trial_id, None)
        if trial is None or self._study.trials[trial.number].state.is_finished():
            return
        if result and not result.get(REFUSED):  # Ray gives a trial's last result here alone
            self._report(trial, result)
        if error or not result or result.get(REFUSED):
            self._study.tell(trial, state=TrialState.FAIL)
        elif result.get(FINISHED):
            self._study.tell(trial, result[OBJECTIVE])
        else:
            self._study.tell(trial, state=TrialState.PRUNED)

    def _report(self, trial: optuna.Trial, result: dict[str, Any]) -> None:
        if result["epoch"] not in self._study.trials[trial.number].intermediate_values:  # a resumed trial repeats
            trial.report(result[OBJECTIVE], result["epoch"])

    def save(self, checkpoint_path: str) -> None:
        """Saves where the study is; all else is in it."""
        Path(checkpoint_path).write_text(json.dumps({"open": {ray: t.number for ray, t in self._trials.items()}}))

    def restore(self, checkpoint_path: str) -> None:
        """Finds the trials again that were running, by the ids that the study holds.

        Trials that were asked for after Ray's last snapshot are unknown to it: they are told FAIL.
        """
        saved = json.loads(Path(checkpoint_path).read_text())["open"]
        self._trials = {}
        for frozen in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            ray_trial = frozen.user_attrs.get(RAY_TRIAL, "")
            if ray_trial in saved:
                self._trials[ray_trial] = optuna.Trial(self._study, frozen._trial_id)
            else:
                self._study.tell(frozen.number, state=TrialState.FAIL)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_study"], state["_trials"]
        return state | {"base": configs.to_json(self.base)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"base": configs.from_json(state["base"])})
        self._study = open_study(self.journal, self.sweep, self.seed)
        self._trials = {}


def running_trials(study: optuna.Study) -> list[str]:
    """Ray's ids of the trials that have begun and not ended."""
    return [
        frozen.user_attrs[RAY_TRIAL]
        for frozen in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if RAY_TRIAL in frozen.user_attrs
    ]


def give_up(study: optuna.Study) -> None:
    """Tells running trials as pruned, or as failed where they gave nothing that the sampler could learn from."""
    for frozen in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(frozen.number, state=TrialState.PRUNED if frozen.intermediate_values else TrialState.FAIL)


def open_study(journal: Path, sweep: str, seed: int = 0) -> optuna.Study:
    """The sweep's Optuna study; made if it is not there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # group=True: needed for branches
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            study_name=sweep,
            direction="maximize",
            load_if_exists=True,
        )
        # A sampler that starts again from the same seed would repeat the trials that the study has.
        asked = len(study.get_trials(deepcopy=False))
        study.sampler = optuna.samplers.TPESampler(
            multivariate=True,
            group=True,
            constant_liar=True,
            seed=int(np.random.SeedSequence((seed, asked)).generate_state(1)[0]),
        )
    return study
