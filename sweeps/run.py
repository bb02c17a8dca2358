"""python -m sweeps.run STUDY: many trainings, spread by Ray Tune, chosen by Optuna, tracked in MLflow."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qafe import config as configs
from qafe import console
from qafe.config import PRESETS
from qafe.data.cohort import Cohort, load_cohort
from qafe.errors import ConfigError, QafeError

from .plan import Plan, clip_counts, last_name, make_plan, source_tags, sweep_params
from .studies import STUDIES, find_study
from .sweep import Study

JOURNAL_FILE = "study.journal"
REPORT_FOLDER = "report"
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}
"""Ray's own tables and log files; the sweep says what matters itself."""
REDUCTION_FACTOR = 3
WORKER_RESTARTS = 3
CHECKPOINTS_KEPT = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sweep and returns its exit status."""
    parser = console.parser("python -m sweeps.run", "Search QAFE-Net settings: Ray Tune, Optuna and MLflow together.")
    parser.add_argument("study", nargs="?", help=f"what to search: {', '.join(STUDIES)}")
    parser.add_argument("--list", action="store_true", help="list the studies and stop")
    parser.add_argument("--data-root", type=Path, help="a prepared dataset (default: the generated sample)")
    parser.add_argument("--expression", help="one, several with commas, or all (default: smile)")
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), help="default: paper where there are a GPU and --data-root, else tiny"
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="e.g. train.epochs=20")
    parser.add_argument("--trials", type=int, help="trials to run (default: the study's own)")
    parser.add_argument("--time-budget", type=float, metavar="SECONDS", help="start no trial and stop all after this")
    parser.add_argument("--cpus-per-trial", type=float, default=1.0)
    parser.add_argument("--gpus-per-trial", type=float, help="may be a fraction (default: 1 where a GPU is, else 0)")
    parser.add_argument("--address", help="Ray cluster to join, e.g. auto (default: a local Ray)")
    parser.add_argument("--tracking-uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else mlflow.db here)")
    parser.add_argument("--storage", type=Path, help="folder for sweeps; shared on a cluster (default: ~/ray_results)")
    parser.add_argument("--name", help="the sweep's name (default: the study's with the next free number)")
    parser.add_argument("--seed", type=int, default=0, help="of the search; train.seed is a setting")
    parser.add_argument("--resume", action="store_true", help="go on with a sweep that was interrupted")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary there for programs")
    return console.run(_main, parser, argv)


def _main(options: argparse.Namespace) -> int:
    if options.list:
        for study in STUDIES.values():
            print(f"{study.name:16}  {study.about}")
        return 0
    if options.study is None:
        raise ConfigError(f"a sweep needs a study: {', '.join(STUDIES)}. Write python -m sweeps.run fusion_search.")
    study = find_study(options.study)
    storage = (options.storage or Path.home() / "ray_results").resolve()
    if options.resume:
        plan = Plan.load(storage / (options.name or last_name(storage, study)))
        if (Path(plan.folder) / REPORT_FOLDER).exists():
            raise ConfigError(f"only an interrupted sweep can be resumed, {plan.name} is complete. Start a new one.")
    else:
        plan = make_plan(options, study, storage)
    return run_sweep(plan, study, address=options.address, resume=options.resume, json_file=options.json)


def run_sweep(
    plan: Plan, study: Study, *, address: str | None = None, resume: bool = False, json_file: Path | None = None
) -> int:
    """Runs or resumes a planned sweep to its report, and returns the exit status.

    Raises:
        ConfigError: the Ray cluster cannot be reached.
        ManifestError: the dataset is gone or has changed since the sweep was planned.
    """
    from tracking.runs import SPOOL_FILE, SweepTracker

    config = configs.from_json(plan.config_json)
    folder = Path(plan.folder)
    cohort = load_cohort(plan.data_root, config.data)
    if cohort.manifest.digest != plan.data_digest:
        raise ConfigError(
            f"a sweep must go on with the data that it began with, {plan.data_root} has changed since. "
            "Start a new sweep."
        )
    started = time.monotonic()
    clips = clip_counts(cohort, plan.expressions)
    _say(
        f"sweep {plan.name}: {plan.trials} trials of {config.preset} on {', '.join(plan.expressions)} "
        f"({', '.join(f'{count} {part}' for part, count in clips.items())} clips of {plan.data_root})"
    )
    with _ray(address):
        tracker = SweepTracker(
            folder / SPOOL_FILE,
            uri=plan.tracking_uri,
            experiment=plan.study,
            sweep=plan.name,
            params=sweep_params(plan),
            tags=source_tags(),
            dataset=(cohort.manifest.name, cohort.manifest.digest),
        )
        ended = False
        try:
            checkpoints = _tune(plan, study, tracker, resume)
            budget_spent = plan.time_budget_s is not None and time.monotonic() - started >= plan.time_budget_s
            if _end_running(plan, tracker, checkpoints, budget_spent) and not budget_spent:
                raise KeyboardInterrupt
            summary = _report(plan, cohort, checkpoints, tracker, time.monotonic() - started)
            tracker.sweep_ended("finished")
            ended = True
        except KeyboardInterrupt:
            _say(
                f"interrupted; go on with:  python -m sweeps.run {plan.study} --resume --name {plan.name}"
                + ("" if folder.parent == Path.home() / "ray_results" else f" --storage {folder.parent}")
            )
            tracker.sweep_ended("killed")
            ended = True
            return console.INTERRUPTED
        finally:
            if not ended:
                tracker.sweep_ended("failed")
            unsent = tracker.close()
            if unsent:
                _say(
                    f"{unsent} entries did not reach the tracking server; send them later with:  "
                    f"python -m tracking.runs replay {folder / SPOOL_FILE}"
                )
    if json_file:
        json_file.write_text(json.dumps(summary, indent=2) + "\n")
    _print_summary(summary, plan)
    return 0


def _tune(plan: Plan, study: Study, tracker: Any, resume: bool) -> dict[str, Path]:
    """Runs the trials and gives each trial's last checkpoint."""
    from ray import tune
    from ray.tune import CheckpointConfig, ResumeConfig
    from ray.tune.schedulers import AsyncHyperBandScheduler

    from .callbacks import TellPeople, TrackTrials, checkpoint_folder
    from .searcher import OBJECTIVE, StudySearcher
    from .trial import TrialPlan, train_trial

    config = configs.from_json(plan.config_json)
    folder = Path(plan.folder)
    trial_plan = TrialPlan(
        base_json=plan.config_json,
        data_root=plan.data_root,
        expressions=plan.expressions,
        threads=max(1, int(plan.cpus_per_trial)),
    )
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
        search_alg=StudySearcher(study, config, folder / JOURNAL_FILE, plan.name, plan.seed),
        scheduler=scheduler,
        resources_per_trial={"cpu": plan.cpus_per_trial, "gpu": plan.gpus_per_trial},
        time_budget_s=plan.time_budget_s,
        checkpoint_config=CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
        max_failures=WORKER_RESTARTS,
        raise_on_failed_trial=False,
        reuse_actors=True,
        resume_config=ResumeConfig(errored=ResumeConfig.ResumeType.RESUME) if resume else None,  # type: ignore[arg-type]
        callbacks=[TrackTrials(tracker, config), TellPeople(plan.trials)],
        trial_name_creator=_trial_name,
        trial_dirname_creator=_trial_name,
        verbose=0,
    )
    return {trial.trial_id: place for trial in analysis.trials if (place := checkpoint_folder(trial))}


def _end_running(plan: Plan, tracker: Any, checkpoints: dict[str, Path], budget_spent: bool) -> int:
    """Closes the trials that Ray Tune left in the middle, and gives their number.

    Ctrl-C leaves them open in the study, for a resumed sweep; a spent time budget ends them.
    """
    from .searcher import give_up, open_study, running_trials

    optuna_study = open_study(Path(plan.folder) / JOURNAL_FILE, plan.name)
    running = running_trials(optuna_study)
    for trial in running:
        folder = checkpoints.get(trial)
        if budget_spent:
            give_up(optuna_study, trial)
            tracker.trial_ended(trial, "pruned", folder=folder, reason="the sweep's time budget was spent")
        else:
            tracker.trial_ended(trial, "killed", folder=folder, reason="sweep interrupted")
    return len(running)


def _trial_name(trial: Any) -> str:
    return f"trial_{trial.config['number']:03d}_{trial.trial_id}"


def _report(plan: Plan, cohort: Cohort, checkpoints: dict[str, Path], tracker: Any, seconds: float) -> dict[str, Any]:
    """Tests the best trial once, writes the report and hands it to the tracker."""
    from . import page, report
    from .searcher import OBJECTIVE, open_study

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
    from tracking.connection import embedded_path, masked

    from . import page

    page.print_table(summary)
    uri = plan.tracking_uri
    if beside := embedded_path(uri):
        same = beside.parent == Path.cwd()
        command = "python -m tracking.server" + ("" if same else f" --backend {uri}")
        print(f"Open the UI:      {command}    then http://127.0.0.1:5000")
    else:
        print(f"Open the UI:      {masked(uri)}/#/experiments/{summary['mlflow']['experiment_id']}/runs")
    print(f"Register it:      python -m tracking.registry register --sweep {plan.name}")


@contextlib.contextmanager
def _ray(address: str | None) -> Iterator[None]:
    """A Ray to run on: the cluster at an address, or one of our own on this machine that listens to nobody else."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if address is None:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    try:
        ray.init(address=address or "local", log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as err:
        raise ConfigError(
            f"the Ray cluster must answer, got no answer from {address} (--address; {type(err).__name__}). "
            "Start it with ray start --head, or leave --address out for a local Ray."
        ) from err
    try:
        yield
    finally:
        ray.shutdown()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
