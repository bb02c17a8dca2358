"""What a sweep found, and how much of it may be luck.

With 41 patients the highest of many noisy scores is mostly luck. So the report sets beside the best trial's
validation Spearman what the best would be if there were nothing to learn (a permutation test over every trial and
epoch that was looked at), and its Spearman on test patients that took no part in the choice, with an interval.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from qafe import dotted, metrics
from qafe.config import PRETRAINED
from qafe.data.cohort import Cohort, load_cohort
from qafe.data.dataset import ClipDataset
from qafe.device import use_own_cores
from qafe.errors import CheckpointError, QafeError
from qafe.history import History, read_history
from qafe.model import weights
from qafe.predict import predict
from qafe.selection import LuckBand, luck_band
from qafe.train import BEST_FILE

from . import checkpoints
from .noise import NOISE_SETTINGS, SPLIT, Noise, noise
from .plan import Plan
from .progress import SECONDS, STATES
from .results import DIVERGED, OBJECTIVE
from .study import BASELINE, FAILURE, REASON, own_trials, pareto_set, study_of_own
from .sweep import trial_device
from .timeline import Stretch, stretches_of
from .trial import CONFIG_FILE

MINIMUM_FOR_IMPORTANCES = 4


@dataclass(frozen=True, kw_only=True)
class TrialSummary:
    """One trial as the report shows it."""

    number: int
    state: str
    objective: float | None
    """Mean over expressions of the best validation Spearman; None before the first epoch."""
    epochs: int
    settings: dict[str, Any]
    baseline: bool
    checkpoint: Path | None = None
    run_id: str = ""
    pareto: bool = False
    """With several objectives: whether no other trial is as good in all of them and better in one."""
    values: dict[str, float] = field(default_factory=dict)
    """Of a finished trial, by objective, where there are several."""
    seconds: float = 0.0
    """Of training on workers."""
    ended: float | None = None
    """Seconds since 1970; None while it runs."""
    stretches: tuple[Stretch, ...] = ()
    failure: str = ""
    """Its class, and that of the error: the error's message may name a patient's file."""


@dataclass(frozen=True, kw_only=True)
class TestResult:
    """The best trial on the test patients, measured once."""

    spearman: dict[str, float]
    interval: dict[str, metrics.Interval]

    @property
    def mean(self) -> float:
        """Mean Spearman over the expressions."""
        return float(np.mean(list(self.spearman.values())))


def summarise(study: optuna.Study, folder: Path, runs: Mapping[int, str]) -> list[TrialSummary]:
    """Every trial that a sweep ran, best first; those without an objective last.

    Args:
        folder: the sweep's, with the trials' checkpoints.
        runs: MLflow run id by the trial's number.
    """
    rows = []
    several, pareto = len(study.directions) > 1, pareto_set(study)
    for trial in own_trials(study):
        values = trial.intermediate_values
        objective = trial.values[0] if trial.state == TrialState.COMPLETE else max(values.values(), default=None)
        rows.append(
            TrialSummary(
                number=trial.number,
                state=state_of(trial),
                objective=objective,
                epochs=max(values, default=0),
                settings=_shown(trial.params),
                baseline=bool(trial.user_attrs.get(BASELINE)),
                checkpoint=checkpoints.last(folder, trial.number),
                run_id=runs.get(trial.number, ""),
                pareto=trial.number in pareto,
                values=dict(zip(study.metric_names or (), trial.values or (), strict=False)) if several else {},
                seconds=float(trial.user_attrs.get(SECONDS, 0.0)),
                ended=trial.datetime_complete.timestamp() if trial.datetime_complete else None,
                stretches=stretches_of(trial),
                failure=failure_of(trial),
            )
        )
    return sorted(rows, key=lambda row: (row.objective is None, -(row.objective or 0.0), not row.pareto, row.number))


def _shown(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without this machine's folders: weights may lie in a patient's."""
    return {name: Path(value).name if name in PRETRAINED and value else value for name, value in settings.items()}


def state_of(trial: FrozenTrial) -> str:
    """How people call what became of a trial."""
    if trial.state == TrialState.FAIL and trial.user_attrs.get(FAILURE, DIVERGED) == DIVERGED:
        return "pruned"  # the study heard of a failure because it could not take it as pruned
    return STATES[trial.state]


def failure_of(trial: FrozenTrial) -> str:
    """A failure's class and that of the error; empty if there was none."""
    kind = trial.user_attrs.get(FAILURE, "")
    error = str(trial.user_attrs.get(REASON, "")).partition(":")[0]
    return f"{kind}: {error}" if kind and re.fullmatch(r"\w+", error) else str(kind)


def log_settings(study: optuna.Study) -> frozenset[str]:
    """The settings that are searched on a logarithmic scale."""
    return frozenset(
        name
        for trial in own_trials(study)
        for name, distribution in trial.distributions.items()
        if getattr(distribution, "log", False)
    )


def best_trial(trials: Sequence[TrialSummary]) -> TrialSummary | None:
    """The finished trial with the highest objective; it alone can be registered."""
    return next((row for row in trials if row.state == "finished" and row.checkpoint is not None), None)


def luck(trials: Sequence[TrialSummary]) -> tuple[LuckBand, list[int]] | None:
    """What the best of these trials and epochs would score by luck alone, how likely it would be as good as the best
    finished one, and the numbers of the trials that left their predictions, in the order in which they ended; None if
    there is none, or if they are of different validation patients."""
    histories: dict[int, History] = {}
    for row in sorted(trials, key=lambda row: (row.ended is None, row.ended, row.number)):
        if row.checkpoint is not None:
            try:
                history = read_history(row.checkpoint)
            except CheckpointError:
                continue
            if all(entry.epochs for entry in history.values()):
                histories[row.number] = history
    clips = {tuple((name, *entry.ids) for name, entry in history.items()) for history in histories.values()}
    if len(clips) != 1:  # none, or trials on different patients: no permutation reorders the scores of all of them
        return None
    tables = {}
    for expression, first in next(iter(histories.values())).items():
        candidates = [history[expression].prediction_matrix() for history in histories.values()]
        length = max(len(table) for table in candidates)
        # A trial that was stopped early looked at fewer epochs: its last one again adds nothing to its best.
        padded = [np.concatenate([table, table[-1:].repeat(length - len(table), axis=0)]) for table in candidates]
        tables[expression] = (np.stack(padded), first.target, first.patients)
    best = best_trial(trials)  # a higher score of a trial that failed later is nobody's to trust
    return luck_band(tables, observed=best.objective if best else None), list(histories)


def test_best(checkpoint: Path, data_root: str, expressions: Sequence[str], gpus: float) -> TestResult | None:
    """The best trial's models on the test patients, on a worker that has a GPU if the trials had; None without test
    clips."""
    if gpus == 0:
        return _score_test(checkpoint, data_root, expressions, gpus)
    import ray

    task = ray.remote(num_cpus=1, num_gpus=gpus)(_score_test)
    found: TestResult | None = ray.get(task.remote(checkpoint, data_root, tuple(expressions), gpus))
    return found


def _score_test(checkpoint: Path, data_root: str, expressions: Sequence[str], gpus: float) -> TestResult | None:
    config = dotted.from_json((checkpoint / CONFIG_FILE).read_text())
    cohort = load_cohort(data_root, config.data)
    device = trial_device(gpus)
    use_own_cores()
    spearman, interval = {}, {}
    for expression in expressions:
        part = cohort.only(expression)
        if not part.test:
            continue
        model, _, _ = weights.load(checkpoint / expression / BEST_FILE)
        scores = predict(model.to(device), ClipDataset(part.store, part.test, config, train=False), config, device)
        target = [sample.score for sample in part.test]
        spearman[expression] = metrics.spearman(scores, target)
        interval[expression] = metrics.spearman_interval(scores, target, [sample.patient for sample in part.test])
    if not spearman:
        return None
    return TestResult(spearman=spearman, interval=interval)


def validation_interval(checkpoint: Path) -> dict[str, metrics.Interval]:
    """For each expression, the interval of the kept epoch's validation Spearman, patients resampled."""
    return {
        expression: metrics.spearman_interval(entry.best.predictions, entry.target, entry.patients)
        for expression, entry in read_history(checkpoint).items()
    }


def importances(study: optuna.Study) -> dict[str, float]:
    """PED-ANOVA importance of each setting that every finished trial has; empty with too few trials.

    Seeds are no settings: what they do is noise. With several objectives it is what matters for the Pareto set.
    """
    study = study_of_own(study)
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(done) < MINIMUM_FOR_IMPORTANCES:
        return {}
    shared = set.intersection(*(set(trial.params) for trial in done))
    varied = sorted(name for name in shared if len({trial.params[name] for trial in done}) > 1)
    varied = [name for name in varied if name not in NOISE_SETTINGS]
    if not varied:
        return {}
    from optuna.importance import PedAnovaImportanceEvaluator  # and scikit-learn: a second that no start needs

    found = optuna.importance.get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(), params=varied)
    return {name: float(value) for name, value in found.items()}


def seed_noise(trials: Sequence[TrialSummary]) -> Noise | None:
    """The variance components of a sweep whose trials differ in their seeds alone; None for any other."""
    done = [row for row in trials if row.state == "finished" and row.objective is not None]
    if not all(row.settings and set(row.settings) <= NOISE_SETTINGS for row in done):
        return None
    return noise([(row.settings.get(SPLIT, 0), row.objective or 0.0) for row in done])


def overview(plan: Plan, cohort: Cohort, trials: Sequence[TrialSummary], seconds: float) -> dict[str, Any]:
    """A sweep so far as one JSON object, without a look at the test patients."""
    best, found, spread = best_trial(trials), luck(trials), seed_noise(trials)
    return {
        "sweep": plan.name,
        "study": plan.study,
        "expressions": list(plan.expressions),
        "preset": dotted.from_json(plan.config_json).preset,
        "data": {
            "name": cohort.manifest.name,
            "digest": plan.data_digest,
            "clips": cohort.clip_counts(plan.expressions),
        },
        "planned": plan.trials,
        "seconds": round(seconds, 1),
        "cost": {"unit": plan.cost_unit, "share": plan.device_share},
        "counts": {state: sum(row.state == state for row in trials) for state in ("finished", "pruned", "failed")},
        "best": {
            "trial": best.number,
            "run_id": best.run_id,
            OBJECTIVE: best.objective,
            "validation_interval": validation_interval(best.checkpoint),
            "test_spearman": None,
            "test_spearman_by_expression": {},
            "test_interval": {},
            "settings": best.settings,
        }
        if best and best.checkpoint
        else None,
        "luck": found[0]._asdict() | {"trials": found[1]} if found else None,
        "noise": spread._asdict() if spread else None,
        "splits": len({row.settings.get(SPLIT) for row in trials if row.epochs}),
        "objectives": list(plan.objectives),
        "complete": False,
        "trials": [
            {
                "trial": row.number,
                "state": row.state,
                OBJECTIVE: row.objective,
                "epochs": row.epochs,
                "baseline": row.baseline,
                "pareto": row.pareto,
                "values": row.values,
                "seconds": row.seconds,
                "failure": row.failure,
                "run_id": row.run_id,
                "settings": row.settings,
            }
            for row in trials
        ],
    }


def sum_up(
    plan: Plan, cohort: Cohort, trials: Sequence[TrialSummary], best: TrialSummary, seconds: float
) -> dict[str, Any]:
    """The sweep as one JSON object: for ``--json``, the report and the tracker. Tests its best trial."""
    assert best.checkpoint is not None
    summary = overview(plan, cohort, trials, seconds) | {"complete": True}
    test: TestResult | None = None
    try:
        test = test_best(best.checkpoint, plan.data_root, plan.expressions, plan.gpus_per_trial)
    except QafeError as err:  # all the training is done: the report must not be lost for a clip that cannot be read
        cause = getattr(err, "cause", err)
        summary["test_failed"] = type(cause).__name__  # its message may name a patient's file
        print(f"the test patients were not scored: {cause}", file=sys.stderr, flush=True)
    if test:
        summary["best"] |= {
            "test_spearman": test.mean,
            "test_spearman_by_expression": test.spearman,
            "test_interval": test.interval,
        }
    return summary
