"""One durable Optuna study for each sweep: where it lies, who samples, who prunes, what a trial's attributes mean.

The study is all that a sweep has to remember. Whatever dies, the next driver reads here which trials ended and how,
which were running, and what each rung of early stopping has seen; Ray only runs what the study says.
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import optuna
import sqlalchemy
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from qafe import dotted
from qafe.errors import ConfigError

if TYPE_CHECKING:
    from .plan import Plan

optuna.logging.set_verbosity(optuna.logging.WARNING)  # it announces every study

JOURNAL_FILE = "study.journal"
REDUCTION_FACTOR = 3
MEDIAN_STARTUP_TRIALS = 4

BASELINE = "baseline"
SWEEP_ID = "sweep_id"
"""Of the study: its sweep's, for other sweeps may have the same name."""
RUN_ID = "mlflow_run_id"
ATTEMPTS = "attempts"
"""How often a driver has started the trial."""
FAILURE = "failure"
"""The class of what ended a trial that did not finish, e.g. ``diverged``; see `sweeps.trial`."""
REASON = "reason"
BY_HAND = "stopped by hand"
"""The reason of a trial that ``python -m sweeps.stop NAME --trial N`` ended."""
NUMBER = "number"
"""A trial's own number, where it has been copied."""
WARM_START = "warm_start"
"""``sweep#number`` of the earlier sweep's trial that this one repeats; it was not run here."""


class _PlacedQMC(QMCSampler):
    """A trial's place in the quasi-random sequence is its number, so that one that is begun again keeps it."""

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        """As of any sampler."""
        self._number = trial.number
        return super().sample_relative(study, trial, search_space)

    def _find_sample_id(self, *_: Any) -> int:
        return self._number


Sampler = Literal["tpe", "gp", "cmaes", "random", "qmc", "grid"]
Scheduler = Literal["asha", "hyperband", "median", "none"]
Objective = Literal["spearman", "params", "seconds", "mae"]
DIRECTIONS: dict[str, Literal["maximize", "minimize"]] = {
    "spearman": "maximize",
    "params": "minimize",
    "seconds": "minimize",
    "mae": "minimize",
}
"""What can be searched for. ``params``: of the model; ``seconds``: of an epoch; ``spearman`` and ``mae``: of the best
epoch, validation, mean over the expressions."""
GRID: Sampler = "grid"
SAMPLERS: dict[str, Callable[[int, int], BaseSampler]] = {
    "tpe": lambda _, own: TPESampler(multivariate=True, group=True, constant_liar=True, seed=own),
    "gp": lambda _, own: GPSampler(seed=own, warn_independent_sampling=False),
    "cmaes": lambda _, own: CmaEsSampler(seed=own, warn_independent_sampling=False),
    "random": lambda _, own: RandomSampler(seed=own),
    "qmc": lambda seed, own: _PlacedQMC(
        seed=seed,
        scramble=True,
        independent_sampler=RandomSampler(seed=own),
        warn_asynchronous_seeding=False,
        warn_independent_sampling=False,
    ),
    GRID: lambda _, own: RandomSampler(seed=own),
}
"""From the seed of the sweep, and a trial's own. ``grid`` is for studies that have all of their points from the start:
it is never asked for one."""
LEARNERS: tuple[Sampler, ...] = ("tpe", "gp")
"""The samplers that learn from trials that they did not choose."""
PRUNERS: dict[str, Callable[[int, int], BasePruner]] = {
    "asha": lambda grace, _: SuccessiveHalvingPruner(
        min_resource=grace, reduction_factor=REDUCTION_FACTOR, min_early_stopping_rate=0
    ),
    "hyperband": lambda grace, epochs: HyperbandPruner(
        min_resource=grace, max_resource=epochs, reduction_factor=REDUCTION_FACTOR
    ),
    "median": lambda grace, _: MedianPruner(
        n_startup_trials=MEDIAN_STARTUP_TRIALS, n_warmup_steps=grace, n_min_trials=MEDIAN_STARTUP_TRIALS
    ),
    "none": lambda *_: NopPruner(),
}
"""From the epochs that every trial gets, and those that a whole trial has. The rungs lie in the study itself."""
assert set(SAMPLERS) == set(get_args(Sampler))
assert set(PRUNERS) == set(get_args(Scheduler))


def open_study(plan: Plan) -> optuna.Study:
    """The sweep's study; made if it is not there.

    Raises:
        ConfigError: its storage does not answer, or its driver is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # names of objectives, Hyperband
        try:
            study = optuna.create_study(
                storage=_storage(plan),
                study_name=plan.name,
                directions=[DIRECTIONS[name] for name in plan.objectives],
                load_if_exists=True,
            )
        except Exception as err:  # SQLAlchemy and the database's driver raise almost anything
            if not plan.study_storage:
                raise
            raise _no_storage(err) from err
        if study.user_attrs.get(SWEEP_ID, plan.id) != plan.id:
            raise ConfigError(
                f"a study belongs to one sweep, another sweep's {plan.name} is in that database (--study-storage). "
                "Choose another --name, or another database."
            )
        if SWEEP_ID not in study.user_attrs:
            study.set_user_attr(SWEEP_ID, plan.id)
        if study.metric_names is None:
            study.set_metric_names(list(plan.objectives))
        epochs = dotted.from_json(plan.config_json).train.epochs
        study.pruner = PRUNERS[plan.scheduler](min(plan.grace_epochs, epochs), epochs)
    return study


def check_study_storage(url: str) -> None:
    """Refuses a database that a study cannot be kept in; writes nothing to it.

    Raises:
        ConfigError: its kind is not known, its driver is not installed, or it does not answer.
    """
    try:
        engine = sqlalchemy.create_engine(url)
        if engine.dialect.name != "sqlite":  # which would make the file
            engine.connect().close()
    except Exception as err:  # SQLAlchemy and the database's driver raise almost anything
        raise _no_storage(err) from err


def _no_storage(err: Exception) -> ConfigError:
    """The error of a database, by what it really lacks; its own message may hold a password."""
    leave = "or leave it out for a file in the sweep's folder."
    # Optuna raises ImportError where SQLAlchemy finds no driver, and ValueError where it cannot read the URL.
    causes = [cause for cause in (err, err.__cause__, err.__context__) if cause is not None]
    if missing := next((cause.name for cause in causes if isinstance(cause, ImportError) and cause.name), ""):
        return ConfigError(
            f"the study's database needs a Python module that is not installed: {missing} (--study-storage). Install "
            f"the package that has it, {leave}"
        )
    bad = (ImportError, sqlalchemy.exc.NoSuchModuleError, sqlalchemy.exc.ArgumentError)
    if any(isinstance(cause, bad) for cause in causes):
        return ConfigError(
            f"the study's storage must be a URL that SQLAlchemy knows, got {type(err).__name__} (--study-storage). "
            f"Write postgresql://USER@HOST/NAME, {leave}"
        )
    return ConfigError(
        f"the study's database must answer, got {type(err).__name__} (--study-storage). Start it, look at its address "
        f"and account, {leave}"
    )


def read_study(folder: Path, name: str, study_storage: str = "") -> optuna.Study | None:
    """A sweep's study, only to look at: nothing is made or written, and its driver is not disturbed.

    Returns:
        None if there is none yet.

    Raises:
        ConfigError: its storage does not answer, or its file is damaged.
    """
    try:
        storage: BaseStorage
        if study_storage:
            file = study_storage.partition("///")[2].partition("?")[0]
            if study_storage.startswith("sqlite") and not Path(file).exists():
                return None  # connecting would make the file
            storage = RDBStorage(study_storage, skip_compatibility_check=True, skip_table_creation=True)
        elif (folder / JOURNAL_FILE).exists():
            storage = JournalStorage(_ReadOnlyJournal(str(folder / JOURNAL_FILE)))
        else:
            return None
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:  # the driver is about to make it
        return None
    except Exception as err:  # SQLAlchemy, the database's driver and the journal raise almost anything
        place = "its database (--study-storage)" if study_storage else str(folder / JOURNAL_FILE)
        raise ConfigError(
            f"the study of {name} must be readable, got {type(err).__name__} from {place}. Look at that place."
        ) from err


class _ReadOnlyJournal(JournalFileBackend):
    """A journal of somebody else."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        raise PermissionError("this study is only looked at")


class _WholeLines(JournalFileBackend):
    """The driver's own journal, which no half line may stay in: Optuna would write the next one right behind it, and
    could never read the file again."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._path = Path(path)
        self._cut(self._path.read_bytes().rfind(b"\n") + 1)  # what a dying machine has left

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """All of the lines, or none: a disk may be full."""
        size = self._path.stat().st_size
        try:
            super().append_logs(logs)
        except OSError:
            self._cut(size)
            raise

    def _cut(self, size: int) -> None:
        if self._path.stat().st_size > size:
            os.truncate(self._path, size)


def _storage(plan: Plan) -> BaseStorage:
    if plan.study_storage:
        return RDBStorage(plan.study_storage, engine_kwargs={"pool_pre_ping": True})  # it may have been restarted
    return JournalStorage(_WholeLines(str(Path(plan.folder) / JOURNAL_FILE)))


def make_sampler(name: str, seed: int, number: int = 0) -> BaseSampler:
    """The sampler of one trial: what it draws depends on the seed, the trial's number and what the study has been told,
    and not on how often a driver was started.

    A quasi-random sequence is one for the whole sweep, so it keeps the sweep's seed.
    """
    mixed = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # group=True: needed for branches
        return SAMPLERS[name](seed, mixed)


def next_number(study: optuna.Study) -> int:
    """The number of the trial that ``study.ask`` gives next."""
    trials = study.get_trials(deepcopy=False)
    return next((trial.number for trial in trials if trial.state == TrialState.WAITING), len(trials))


def whole_url(url: str) -> str:
    """A database's URL that means the same in every folder."""
    file = re.fullmatch(r"(sqlite(?:\+\w+)?:///)(?!/|:memory:|file:)([^?]+)(.*)", url)
    return f"{file[1]}{Path(file[2]).resolve()}{file[3]}" if file else url


def own_trials(study: optuna.Study, states: Sequence[TrialState] | None = None) -> list[FrozenTrial]:
    """The trials that this sweep has begun: not those of earlier sweeps, nor one that only waits."""
    found = study.get_trials(deepcopy=False, states=tuple(states) if states is not None else None)
    return [trial for trial in found if trial.state != TrialState.WAITING and WARM_START not in trial.user_attrs]


def study_of_own(study: optuna.Study) -> optuna.Study:
    """A study in memory with the ended trials that the sweep itself ran, each with its `NUMBER`."""
    own = optuna.create_study(directions=study.directions)
    for trial in own_trials(study):
        if trial.state.is_finished():
            copied = copy.deepcopy(trial)
            copied.set_user_attr(NUMBER, trial.number)
            own.add_trial(copied)
    return own


def pareto_set(study: optuna.Study) -> frozenset[int]:
    """Numbers of the sweep's own trials that no other is as good as in all objectives and better than in one; none
    with a single objective. Trials of earlier sweeps may be better, but are not this sweep's to show."""
    if len(study.directions) == 1:
        return frozenset()
    return frozenset(trial.user_attrs[NUMBER] for trial in study_of_own(study).best_trials)


def running_trials(study: optuna.Study) -> list[int]:
    """Numbers of the trials that have begun and not ended."""
    return [trial.number for trial in own_trials(study, (TrialState.RUNNING,))]


def give_up(study: optuna.Study, reason: str, only: int | None = None) -> None:
    """Tells running trials, or one of them, as pruned, or as failed where they gave nothing to learn from."""
    for frozen in own_trials(study, (TrialState.RUNNING,)):
        if only not in (None, frozen.number):
            continue
        optuna.Trial(study, frozen._trial_id).set_user_attr(REASON, reason)
        study.tell(frozen.number, state=stopped_state(study) if frozen.intermediate_values else TrialState.FAIL)


def stopped_state(study: optuna.Study) -> TrialState:
    """What the study is told of a trial that was stopped early: with several objectives Optuna has no pruned trials,
    and TPE fails on the first that it meets."""
    return TrialState.PRUNED if len(study.directions) == 1 else TrialState.FAIL


def link_runs(study: optuna.Study, runs: Mapping[int, str]) -> None:
    """Notes the MLflow run of every trial, by number: a trial that ended while the server slept has no attribute."""
    study.set_user_attr(RUN_ID, {str(number): run for number, run in runs.items()})


def epochs_of(trial: FrozenTrial) -> int:
    """Epochs that the study has heard of."""
    return max(trial.intermediate_values, default=0)
