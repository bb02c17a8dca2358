"""python -m sweeps.run STUDY: many trainings, spread by Ray Tune, chosen by Optuna, tracked in MLflow."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qafe import config as configs
from qafe import console
from qafe.config import PRESETS
from qafe.data.cohort import Cohort, choose_expressions, load_cohort
from qafe.errors import ConfigError, QafeError

from .studies import STUDIES, find_study
from .sweep import Study

PLAN_FILE = "sweep.json"
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


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that decides what a sweep does; kept in its folder, so that a resumed sweep does the same.

    Attributes:
        folder: the sweep's folder: Ray's experiment state, trials, study, spool and report.
        data_root: the prepared dataset.
        tracking_uri: the MLflow store, absolute.
    """

    name: str
    study: str
    folder: str
    config_json: str
    data_root: str
    data_digest: str
    expressions: tuple[str, ...]
    trials: int
    seed: int
    cpus_per_trial: float
    gpus_per_trial: float
    time_budget_s: float | None
    tracking_uri: str

    def save(self) -> None:
        """Writes the plan beside and renames it."""
        path = Path(self.folder) / PLAN_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(dataclasses.asdict(self), indent=2))
        unfinished.replace(path)

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """The plan that `save` wrote.

        Raises:
            ConfigError: there is none, or it is damaged.
        """
        try:
            tree = json.loads((folder / PLAN_FILE).read_text())
            return cls(**tree | {"expressions": tuple(tree["expressions"])})
        except (OSError, ValueError, TypeError, KeyError) as err:
            raise ConfigError(
                f"only a sweep that was started can be resumed, there is no plan in {folder} ({type(err).__name__}). "
                "Name it with --name and --storage, or start it without --resume."
            ) from err


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sweep and returns its exit status."""
    parser = console.parser("python -m sweeps.run", "Search QAFE-Net settings: Ray Tune, Optuna and MLflow together.")
    parser.add_argument("study", nargs="?", help=f"what to search: {', '.join(STUDIES)}")
    parser.add_argument("--list", action="store_true", help="list the studies and stop")
    parser.add_argument("--data-root", type=Path, help="a prepared dataset (default: the generated sample)")
    parser.add_argument("--expression", help="one, several with commas, or all (default: smile)")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="default: paper where a GPU is, else tiny")
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
        plan = Plan.load(storage / (options.name or _last_name(storage, study)))
        if (Path(plan.folder) / REPORT_FOLDER).exists():
            raise ConfigError(f"only an interrupted sweep can be resumed, {plan.name} is complete. Start a new one.")
    else:
        plan = _make_plan(options, study, storage)
    return run_sweep(plan, study, address=options.address, resume=options.resume, json_file=options.json)


def _make_plan(options: argparse.Namespace, study: Study, storage: Path) -> Plan:
    from tracking.connection import connect, resolve_uri

    gpu = _gpu_here()
    preset = options.preset or ("paper" if gpu and options.data_root else "tiny")
    config = configs.override(PRESETS[preset](), configs.parse_settings(options.set))
    trials = study.trials if options.trials is None else options.trials
    for name, value in (("--trials", trials), ("--cpus-per-trial", options.cpus_per_trial)):
        if value <= 0:
            raise ConfigError(f"{name} must be greater than 0, got {value}. Name a larger number.")
    uri = resolve_uri(options.tracking_uri)
    connect(uri)
    name = options.name or _free_name(storage, study)
    if (storage / name).exists():
        raise ConfigError(
            f"a sweep's name must be new, {name} is in {storage}. "
            f"Go on with it (--resume --name {name}) or choose another --name."
        )
    data_root = (options.data_root or _sample_root()).resolve()
    cohort = load_cohort(data_root, config.data)
    expressions = choose_expressions(cohort.manifest, options.expression or "smile")
    plan = Plan(
        name=name,
        study=study.name,
        folder=str(storage / name),
        config_json=configs.to_json(config),
        data_root=str(data_root),
        data_digest=cohort.manifest.digest,
        expressions=expressions,
        trials=trials,
        seed=options.seed,
        cpus_per_trial=options.cpus_per_trial,
        gpus_per_trial=float(gpu) if options.gpus_per_trial is None else options.gpus_per_trial,
        time_budget_s=options.time_budget,
        tracking_uri=uri,
    )
    plan.save()
    return plan


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
    clips = _clip_counts(cohort, plan.expressions)
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
            params=_sweep_params(plan),
            tags=_source_tags(),
            dataset=(cohort.manifest.name, cohort.manifest.digest),
        )
        ended = False
        try:
            checkpoints = _tune(plan, study, tracker, resume)
            budget_spent = plan.time_budget_s is not None and time.monotonic() - started >= plan.time_budget_s
            if _end_running(plan, tracker, checkpoints, budget_spent) and not budget_spent:
                raise KeyboardInterrupt
            summary = _report(plan, study, cohort, checkpoints, tracker, time.monotonic() - started)
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


def _report(
    plan: Plan, study: Study, cohort: Cohort, checkpoints: dict[str, Path], tracker: Any, seconds: float
) -> dict[str, Any]:
    """Tests the best trial once, writes the report and hands it to the tracker."""
    from . import report
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
    assert best.checkpoint is not None
    test = report.test_best(best.checkpoint, plan.data_root, plan.expressions, plan.gpus_per_trial)
    band = report.luck(trials)
    summary = {
        "sweep": plan.name,
        "study": plan.study,
        "expressions": list(plan.expressions),
        "preset": configs.from_json(plan.config_json).preset,
        "data": {
            "name": cohort.manifest.name,
            "digest": plan.data_digest,
            "clips": _clip_counts(cohort, plan.expressions),
        },
        "seconds": round(seconds, 1),
        "counts": {state: sum(row.state == state for row in trials) for state in ("finished", "pruned", "failed")},
        "best": {
            "trial": best.number,
            "run_id": best.run_id,
            OBJECTIVE: best.objective,
            "validation_interval": report.validation_interval(best.checkpoint),
            "test_spearman": test.mean if test else None,
            "test_spearman_by_expression": test.spearman if test else {},
            "test_interval": test.interval if test else {},
            "settings": best.settings,
        },
        "luck": band._asdict() if band else None,
        "trials": [
            {
                "trial": row.number,
                "state": row.state,
                OBJECTIVE: row.objective,
                "epochs": row.epochs,
                "baseline": row.baseline,
                "run_id": row.run_id,
                "settings": row.settings,
            }
            for row in trials
        ],
        "mlflow": {
            "experiment_id": tracker.experiment_id,
            "run_id": tracker.run_ids().get("", ""),
        },
    }
    folder = Path(plan.folder) / REPORT_FOLDER
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    report.write_report(unfinished, optuna_study, trials, summary)
    unfinished.replace(folder)
    numbers = {OBJECTIVE: float(best.objective or 0.0), "trials": float(len(trials))}
    if band:
        numbers |= {"luck_threshold": band.threshold, "luck_p_value": band.p_value}
    if test:
        numbers["test_spearman"] = test.mean
        tracker.trial_metrics(best.ray_trial, {"test_spearman": test.mean})
    tracker.sweep_files(folder, numbers)
    return summary


def _print_summary(summary: dict[str, Any], plan: Plan) -> None:
    from tracking.connection import embedded_path, masked

    from . import report

    report.print_table(summary)
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
        ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as err:
        raise ConfigError(
            f"the Ray cluster must answer, got no answer from {address} (--address; {type(err).__name__}). "
            "Start it with ray start --head, or leave --address out for a local Ray."
        ) from err
    try:
        yield
    finally:
        ray.shutdown()


def _clip_counts(cohort: Cohort, expressions: tuple[str, ...]) -> dict[str, int]:
    parts = {"training": cohort.train, "validation": cohort.validation, "test": cohort.test}
    return {name: sum(sample.expression in expressions for sample in part) for name, part in parts.items()}


def _sample_root() -> Path:
    """The generated sample dataset under the user's cache folder; made on first use."""
    from qafe.data.sample import VERSION, make_sample

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qafe"
    root = cache / f"sample-{VERSION}"
    if root.exists():
        return root
    with console.progress(f"making the sample dataset in {root} (once)") as progress:
        return make_sample(root, progress=progress)


def _names(storage: Path, study: Study) -> dict[int, str]:
    found = storage.glob(f"{study.name}-*") if storage.is_dir() else []
    return {int(tail): path.name for path in found if (tail := path.name.removeprefix(f"{study.name}-")).isdigit()}


def _free_name(storage: Path, study: Study) -> str:
    return f"{study.name}-{max(_names(storage, study), default=0) + 1}"


def _last_name(storage: Path, study: Study) -> str:
    names = _names(storage, study)
    if not names:
        raise ConfigError(f"there is no {study.name} sweep to resume in {storage}. Name it with --name or --storage.")
    return names[max(names)]


def _gpu_here() -> bool:
    import torch

    return torch.cuda.is_available()


def _sweep_params(plan: Plan) -> dict[str, Any]:
    """The parent run's params: the plan without this machine's paths, and the config that all trials start from."""
    shown = ("study", "trials", "seed", "cpus_per_trial", "gpus_per_trial", "data_digest")
    params = {name: getattr(plan, name) for name in shown} | {"expressions": ",".join(plan.expressions)}
    return params | configs.flatten(configs.from_json(plan.config_json))


def _source_tags() -> dict[str, str]:
    """Git commit (or ``QAFE_SOURCE_COMMIT``, for images without a repository) and versions of the libraries."""
    tags = {f"version.{name}": version(name) for name in ("qafe-net", "torch", "ray", "optuna", "mlflow")}
    commit = os.environ.get("QAFE_SOURCE_COMMIT", "")
    with contextlib.suppress(OSError):
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = commit or subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
