"""One sweep from its plan to its report: Ray Tune runs the trials, Optuna chooses them, MLflow sees all of it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import CheckpointConfig, ResumeConfig
from ray.tune.schedulers import AsyncHyperBandScheduler

from qafe import config as configs
from qafe import console
from qafe.data.cohort import Cohort, load_cohort
from qafe.errors import ConfigError, QafeError
from tracking.connection import embedded_path, masked
from tracking.runs import SPOOL_FILE, SweepTracker, TrialState

from . import page, report
from .callbacks import TellPeople, TrackTrials, checkpoint_folder
from .plan import REPORT_FOLDER, Plan, clip_counts, source_tags, sweep_params
from .searcher import OBJECTIVE, StudySearcher, give_up, open_study, running_trials
from .sweep import Study
from .trial import TrialPlan, train_trial

JOURNAL_FILE = "study.journal"
LOCK_FILE = "sweep.lock"
REDUCTION_FACTOR = 3
WORKER_RESTARTS = 3
CHECKPOINTS_KEPT = 3


def run_sweep(
    plan: Plan, study: Study, *, address: str | None = None, resume: bool = False, json_file: Path | None = None
) -> int:
    """Runs or resumes a planned sweep to its report, and returns the exit status.

    Raises:
        ConfigError: the Ray cluster cannot be reached, the sweep is running already, or its data has changed.
        ManifestError: the dataset is gone.
    """
    config = configs.from_json(plan.config_json)
    folder = Path(plan.folder)
    cohort = load_cohort(plan.data_root, config.data)
    if cohort.manifest.digest != plan.data_digest:
        raise ConfigError(
            f"a sweep must go on with the data that it began with, {plan.data_root} has changed since. "
            "Start a new sweep."
        )
    clips = clip_counts(cohort, plan.expressions)
    _say(
        f"sweep {plan.name}: {plan.trials} trials of {config.preset} on {', '.join(plan.expressions)} "
        f"({', '.join(f'{count} {part}' for part, count in clips.items())} clips of {plan.data_root})"
    )
    try:
        with _only_driver(folder), _ray(address), _tracked(plan, cohort) as tracker:
            summary = _search(plan, study, cohort, tracker, resume)
    except KeyboardInterrupt:
        hint = f"python -m sweeps.run {plan.study} --resume --name {plan.name}"
        hint += f" --address {address}" if address else ""
        hint += "" if folder.parent == Path.home() / "ray_results" else f" --storage {folder.parent}"
        _say(f"interrupted; go on with:  {hint}")
        return console.INTERRUPTED
    _print_summary(summary, plan)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = json_file.with_name(json_file.name + ".unfinished")
        unfinished.write_text(json.dumps(summary, indent=2) + "\n")
        unfinished.replace(json_file)
    return 0


@contextlib.contextmanager
def _tracked(plan: Plan, cohort: Cohort) -> Iterator[SweepTracker]:
    """The sweep's tracker; its runs are closed with the block, whatever ends it."""
    spool = Path(plan.folder) / SPOOL_FILE
    tracker = SweepTracker(
        spool,
        uri=plan.tracking_uri,
        experiment=plan.study,
        sweep=plan.name,
        sweep_id=plan.id,
        params=sweep_params(plan),
        tags=source_tags(),
        dataset=(cohort.manifest.name, cohort.manifest.digest),
    )
    state: TrialState = "failed"
    try:
        yield tracker
        state = "finished"
    except KeyboardInterrupt:
        state = "killed"
        raise
    finally:
        tracker.sweep_ended(state)
        if unsent := tracker.close():
            _say(
                f"{unsent} entries did not reach the tracking server; send them later with:  "
                f"python -m tracking.runs replay {spool}"
            )


def _search(plan: Plan, study: Study, cohort: Cohort, tracker: SweepTracker, resume: bool) -> dict[str, Any]:
    """All trials, then the report; KeyboardInterrupt if Ctrl-C ended the trials early."""
    started = time.monotonic()
    checkpoints, begun = _tune(plan, study, tracker, resume)
    optuna_study = open_study(Path(plan.folder) / JOURNAL_FILE, plan.name)
    running = running_trials(optuna_study)
    budget_spent = plan.time_budget_s is not None and time.monotonic() - started >= plan.time_budget_s
    for trial in running:
        state: TrialState = "pruned" if budget_spent else "killed"
        reason = "the sweep's time budget was spent" if budget_spent else "sweep interrupted"
        tracker.trial_ended(trial, state, folder=checkpoints.get(trial), reason=reason)
    if budget_spent:
        give_up(optuna_study)
    elif running or begun < plan.trials:  # Ray Tune returns from Ctrl-C as if nothing had happened
        raise KeyboardInterrupt
    return _report(plan, cohort, checkpoints, tracker, time.monotonic() - started)


def _tune(plan: Plan, study: Study, tracker: SweepTracker, resume: bool) -> tuple[dict[str, Path], int]:
    """Runs the trials; gives each trial's last checkpoint and the number of trials that were begun."""
    config = configs.from_json(plan.config_json)
    folder = Path(plan.folder)
    trial_plan = TrialPlan(
        base_json=plan.config_json,
        data_root=plan.data_root,
        expressions=plan.expressions,
        threads=max(1, int(plan.cpus_per_trial)),
        gpus=plan.gpus_per_trial,
    )
    searcher = StudySearcher(study, config, frozenset(plan.pinned), folder / JOURNAL_FILE, plan.name, plan.seed)
    # A sweep that died before Ray's first snapshot has nothing to restore: its open trials are lost.
    snapshot = resume and any(folder.glob("experiment_state-*.json"))
    if resume and not snapshot:
        give_up(open_study(folder / JOURNAL_FILE, plan.name))
    scheduler = AsyncHyperBandScheduler(
        time_attr="epoch",
        metric=OBJECTIVE,
        mode="max",
        max_t=config.train.epochs,
        grace_period=min(study.grace_epochs, config.train.epochs),
        reduction_factor=REDUCTION_FACTOR,
    )
    analysis = tune.run(
        tune.with_parameters(train_trial, plan=trial_plan),
        name=plan.name,
        storage_path=str(folder.parent),
        num_samples=plan.trials,
        search_alg=searcher,
        scheduler=scheduler,
        resources_per_trial={"cpu": plan.cpus_per_trial, "gpu": plan.gpus_per_trial},
        time_budget_s=plan.time_budget_s,
        checkpoint_config=CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
        max_failures=WORKER_RESTARTS,
        raise_on_failed_trial=False,
        reuse_actors=True,
        resume_config=ResumeConfig(errored=ResumeConfig.ResumeType.RESUME) if snapshot else None,  # type: ignore[arg-type]
        callbacks=[TrackTrials(tracker, config), TellPeople(plan.trials)],
        trial_name_creator=_trial_name,
        trial_dirname_creator=_trial_name,
        verbose=0,
    )
    checkpoints = {trial.trial_id: place for trial in analysis.trials if (place := checkpoint_folder(trial))}
    return checkpoints, len(analysis.trials)


def _trial_name(trial: Any) -> str:
    return f"trial_{trial.config['number']:03d}_{trial.trial_id}"


def _report(
    plan: Plan, cohort: Cohort, checkpoints: dict[str, Path], tracker: SweepTracker, seconds: float
) -> dict[str, Any]:
    """Tests the best trial once, writes the report and hands it to the tracker."""
    optuna_study = open_study(Path(plan.folder) / JOURNAL_FILE, plan.name)
    tracker.wait_until_sent(patience_s=60)
    trials = report.summarise(optuna_study, checkpoints, tracker.run_ids())
    best = report.best_trial(trials)
    if best is None:
        raise QafeError(
            f"a sweep needs one finished trial to report, {plan.name} has none of {len(trials)}. "
            f"See the failures in {plan.folder} and in the MLflow UI."
        )
    summary = report.sum_up(plan, cohort, trials, best, seconds)
    summary["mlflow"] = {"experiment_id": tracker.experiment_id, "run_id": tracker.run_ids().get("", "")}
    folder = Path(plan.folder) / REPORT_FOLDER
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    page.write_report(unfinished, trials, report.importances(optuna_study), summary)
    unfinished.replace(folder)
    numbers = {OBJECTIVE: summary["best"][OBJECTIVE], "trials": float(len(trials))}
    if luck := summary["luck"]:
        numbers |= {"luck_threshold": luck["threshold"], "luck_p_value": luck["p_value"]}
    if (test := summary["best"]["test_spearman"]) is not None:
        numbers["test_spearman"] = test
        tracker.trial_metrics(best.ray_trial, {"test_spearman": test})
    tracker.sweep_files(folder, numbers)
    return summary


def _print_summary(summary: dict[str, Any], plan: Plan) -> None:
    page.print_table(summary)
    uri = plan.tracking_uri
    if uri.startswith("http"):
        print(f"Open the UI:      {masked(uri)}/#/experiments/{summary['mlflow']['experiment_id']}/runs")
    else:
        beside = embedded_path(uri)
        same = beside is not None and beside.parent == Path.cwd()
        command = "python -m tracking.server" + ("" if same else f" --backend {masked(uri)}")
        print(f"Open the UI:      {command}    then http://127.0.0.1:5000")
    print(f"Register it:      python -m tracking.registry register --sweep {plan.name}")


@contextlib.contextmanager
def _only_driver(folder: Path) -> Iterator[None]:
    """Holds the sweep for this process: two drivers would write to one study."""
    with open(folder / LOCK_FILE, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise ConfigError(f"a sweep has one driver, {folder.name} is running already. Wait for it.") from err
        yield


@contextlib.contextmanager
def _ray(address: str | None) -> Iterator[None]:
    """A Ray to run on: the cluster at an address, or one of our own on this machine that listens to nobody else."""
    try:
        ray.init(address=address or "local", log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as err:
        raise ConfigError(
            f"Ray must start, or answer at --address, got {type(err).__name__} from {address or 'this machine'}. "
            "Start a cluster with ray start --head, or leave --address out."
        ) from err
    try:
        yield
    finally:
        ray.shutdown()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
