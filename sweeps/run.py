"""python -m sweeps.run STUDY: many trainings, spread by Ray Tune, chosen by Optuna, tracked in MLflow."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from qafe import console, dotted
from qafe.config import PRESETS
from qafe.errors import ConfigError

from .bucket import Bucket
from .draft import draft_plan, make_plan, planned_trials
from .folder import STORAGE, find_sweep, is_url, last_name
from .notify import check_url
from .plan import KEPT_CHECKPOINTS, Plan
from .studies import STUDIES, find_study, planned_sweep
from .study import DIRECTIONS, PRUNERS, SAMPLERS
from .user_file import is_file_name

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
}
"""No usage reports, none of Ray's own tables and log files, and no snapshots of its state: the study has it all."""
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""A Ray of our own listens to this machine alone."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sweep and returns its exit status."""
    return console.run(_main, _parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = console.parser("python -m sweeps.run", "Search QAFE-Net settings: Ray Tune, Optuna and MLflow together.")
    parser.add_argument("study", nargs="?", help=f"{', '.join(STUDIES)}, or a Python file with a Sweep of your own")
    parser.add_argument("--list", action="store_true", help="list the studies and stop")
    parser.add_argument("--data-root", type=Path, help="a prepared dataset (default: the generated sample)")
    parser.add_argument("--expression", help="one, several with commas, or all (default: smile, or the only one)")
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), help="default: paper where there are a GPU and --data-root, else tiny"
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="e.g. train.epochs=20")
    parser.add_argument("--no-cache", action="store_true", help="keep no decoded frames on disk (data.cache_gb=0)")
    parser.add_argument("--trials", type=int, help="trials to run (default: the study's own)")
    parser.add_argument("--time-budget", type=float, metavar="SECONDS", help="start no trial and stop all after this")
    parser.add_argument(
        "--budget-gpu-hours",
        type=float,
        metavar="HOURS",
        help="start no trial that would not fit into this (hours of workers where trials have no GPU)",
    )
    parser.add_argument("--dry-run", action="store_true", help="measure briefly what the sweep would cost, and stop")
    parser.add_argument("--cpus-per-trial", type=float, default=1.0)
    parser.add_argument("--gpus-per-trial", type=float, help="may be a fraction (default: 1 where a GPU is, else 0)")
    parser.add_argument("--address", help="Ray cluster to join, e.g. auto (default: a local Ray)")
    parser.add_argument("--tracking-uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else mlflow.db here)")
    parser.add_argument(
        "--allow-identifiable",
        action="store_true",
        help="let names, paths and pictures reach MLflow; noted in each run",
    )
    parser.add_argument(
        "--storage",
        metavar="FOLDER|s3://BUCKET/PREFIX",
        help="folder for sweeps, which all workers see, or a bucket for their checkpoints (default: ~/ray_results)",
    )
    parser.add_argument("--name", help="the sweep's name (default: the study's with the next free number)")
    parser.add_argument(
        "--scheduler", choices=list(PRUNERS), help="how hopeless trials are stopped early (default: asha)"
    )
    parser.add_argument("--sampler", choices=list(SAMPLERS), help="(default: tpe; for a grid of points, grid)")
    parser.add_argument(
        "--objectives",
        default="spearman",
        help=f"spearman, and what else counts, with commas: {', '.join(DIRECTIONS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--study-storage", metavar="URL", help="database of the study, e.g. postgresql:// (default: a file)"
    )
    parser.add_argument(
        "--keep-checkpoints", type=int, default=KEPT_CHECKPOINTS, metavar="K", help="of the best trials (%(default)s)"
    )
    parser.add_argument(
        "--warm-start", metavar="SWEEP[,...]", help="let the sampler learn from earlier sweeps: names, or folders"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the search; train.seed is a setting")
    parser.add_argument("--resume", action="store_true", help="go on with a sweep that was interrupted")
    parser.add_argument("--extend", type=int, metavar="TRIALS", help="add trials to a sweep, and go on with it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary there for programs")
    parser.add_argument("--notify", metavar="URL", help="POST one JSON object there when the sweep ends, however")
    return parser


def _main(options: argparse.Namespace) -> int:
    if options.list:
        for study in STUDIES.values():
            print(f"{study.name:16}  {study.about}")
        return 0
    if options.study is None:
        raise ConfigError(f"a sweep needs a study: {', '.join(STUDIES)}. Write python -m sweeps.run fusion_search.")
    if options.notify is not None:
        check_url(options.notify)
    in_bucket = bool(options.storage and is_url(options.storage))
    storage = (STORAGE.expanduser() if in_bucket or not options.storage else Path(options.storage)).resolve()
    for name, folder in (("--storage", storage), ("--json", options.json and options.json.resolve().parent)):
        existing = next((path for path in (folder, *folder.parents) if path.exists()), None) if folder else None
        if existing and not existing.is_dir():
            raise ConfigError(f"{name} must lie in a folder, {existing} is a file. Name another place.")
    if options.dry_run and (options.resume or options.extend is not None):
        raise ConfigError("--dry-run is for a new sweep, got it with --resume or --extend. Leave one of them out.")
    for name, value in QUIET.items() if options.address else (QUIET | ALONE).items():
        os.environ.setdefault(name, value)
    # Ray reads its environment when it is imported, and figures take a second that an error's line need not wait for.
    if options.dry_run:
        sweep = find_study(options.study)
        plan = draft_plan(options, sweep, storage)
        from .estimate import dry_run

        return dry_run(plan, sweep, address=options.address, json_file=options.json)
    if options.resume or options.extend is not None:
        plan = Plan.load(storage / (options.name or last_name(storage, find_study(options.study).name)))
        sweep = planned_sweep(plan)
        if in_bucket:
            Bucket(options.storage, plan.name)  # before it is shown: it may hold a password
        if in_bucket and options.storage != plan.bucket:
            raise ConfigError(
                f"the checkpoints of {plan.name} are in {plan.bucket or plan.folder}, got --storage {options.storage}. "
                "Leave it out."
            )
        _check_resumable(plan, options)
        if options.extend is not None:
            base, pinned = dotted.from_json(plan.config_json), frozenset(plan.pinned)
            plan = dataclasses.replace(plan, trials=planned_trials(sweep, plan.trials + options.extend, base, pinned))
        if options.budget_gpu_hours is not None:
            plan = dataclasses.replace(plan, budget_hours=options.budget_gpu_hours)
    else:
        sweep = find_study(options.study)
        plan = make_plan(options, sweep, storage)
    from tracking.runs import SPOOL_FILE

    from .driver import run_sweep

    new, claimed = not options.resume and options.extend is None, False
    try:
        if plan.bucket:
            Bucket(plan.bucket, plan.name).claim(plan.id)
            claimed = True
        return run_sweep(plan, sweep, address=options.address, json_file=options.json, notify=options.notify)
    except ConfigError:
        if new and not (Path(plan.folder) / SPOOL_FILE).exists():  # Nothing has begun: the name is free again.
            shutil.rmtree(plan.folder)
            if claimed:
                Bucket(plan.bucket, plan.name).release()
        raise


def _check_resumable(plan: Plan, options: argparse.Namespace) -> None:
    """A sweep goes on as it was planned, or not at all."""
    # A user's file may have changed or gone since: the sweep has its own copy.
    named = plan.study if is_file_name(options.study) and plan.study not in STUDIES else options.study
    if named != plan.study:
        raise ConfigError(f"{plan.name} is a sweep of {plan.study}, not of {named}. Name that study.")
    if options.extend is not None and options.extend < 1:
        raise ConfigError(f"--extend must be at least 1, got {options.extend}. Name more trials.")
    if options.budget_gpu_hours is not None and options.budget_gpu_hours <= 0:
        raise ConfigError(f"--budget-gpu-hours must be greater than 0, got {options.budget_gpu_hours:g}. Name more.")
    usual = vars(_parser().parse_args([]))
    kept = ("study", "name", "storage", "address", "cpus_per_trial")
    free = (*kept, "resume", "extend", "json", "notify", "debug", "budget_gpu_hours")
    given = [name for name, value in vars(options).items() if name not in free and value != usual.get(name)]
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"a resumed sweep keeps its plan, got {flags} with --resume or --extend. Leave them out.")
    if options.extend is None and find_sweep(Path(plan.folder).parent, plan.name).complete:
        raise ConfigError(
            f"only an interrupted sweep can be resumed, {plan.name} is complete. "
            f"Add trials (--extend 16 --name {plan.name}) or start a new one."
        )


if __name__ == "__main__":
    sys.exit(main())
