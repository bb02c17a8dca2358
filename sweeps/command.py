"""The command line of a sweep: what it is asked for, checked, planned and begun."""

from __future__ import annotations

import argparse
import dataclasses
import os
import secrets
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from qafe import console, dotted
from qafe.config import PRESETS
from qafe.errors import ConfigError, QafeError
from qafe.machine_errors import machine_cause, raise_open_files, trouble_of

from .bucket import Bucket
from .draft import DEFAULTS, check_resources, draft_plan, make_plan, planned_trials
from .folder import PLAN_FILE, REPORT_FOLDER, STORAGE, find_sweep, is_url, last_name
from .interruption import INTERRUPTION
from .notify import check_url
from .plan import Plan
from .resuming import OBEYED, resumed_plan, typed
from .studies import STUDIES, find_study, planned_sweep
from .study import DIRECTIONS, PRUNERS, SAMPLERS
from .sweep import Sweep

FEW_OPEN_FILES = 1024
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}
"""No usage reports, none of Ray's own tables and log files, no snapshots of its state (the study has it all), and no
handler of its own for Ctrl-C: see `interruption`."""
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
"""A Ray of our own listens to this machine alone, and to who knows its token (``RAY_AUTH_TOKEN``)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sweep in this process and returns its exit status."""
    with INTERRUPTION.heard():
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
    parser.add_argument(
        "--cpus-per-trial",
        type=float,
        help=f"also the threads of its training (default: {DEFAULTS['cpus_per_trial']:g})",
    )
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
        help=f"what counts, with commas: {', '.join(DIRECTIONS)} (default: {DEFAULTS['objectives']})",
    )
    parser.add_argument(
        "--study-storage", metavar="URL", help="database of the study, e.g. postgresql:// (default: a file)"
    )
    parser.add_argument(
        "--keep-checkpoints",
        type=int,
        metavar="K",
        help=f"of the best trials (default: {DEFAULTS['keep_checkpoints']})",
    )
    parser.add_argument(
        "--warm-start", metavar="SWEEP[,...]", help="let the sampler learn from earlier sweeps: names, or folders"
    )
    parser.add_argument(
        "--seed", type=int, help=f"of the search (default: {DEFAULTS['seed']}); train.seed is a setting"
    )
    parser.add_argument("--resume", action="store_true", help="go on with a sweep that was interrupted")
    parser.add_argument(
        "--auto-resume",
        action="store_true",
        help="start the sweep that --name names, or go on with it if it has begun: one line for a job and its restarts",
    )
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
    if (files := raise_open_files()) < FEW_OPEN_FILES:
        print(
            f"a process may open {files} files here (ulimit -Hn): a sweep with many workers or data.workers will need "
            "more. Raise it to 65536 before it fails.",
            file=sys.stderr,
        )
    in_bucket = bool(options.storage and is_url(options.storage))
    storage = (STORAGE.expanduser() if in_bucket or not options.storage else Path(options.storage)).resolve()
    for name, folder in (("--storage", storage), ("--json", options.json and options.json.resolve().parent)):
        existing = next((path for path in (folder, *folder.parents) if path.exists()), None) if folder else None
        if existing and not existing.is_dir():
            raise ConfigError(f"{name} must lie in a folder, {existing} is a file. Name another place.")
    asked = [flag for flag in ("dry_run", "resume", "auto_resume", "extend") if typed(options, flag)]
    if len(asked) > 1 and asked != ["resume", "extend"]:
        one, other = ("--" + flag.replace("_", "-") for flag in asked[:2])
        raise ConfigError(
            f"a sweep is measured, started or gone on with, got {one} with {other}. Leave one of them out."
        )
    # Ray reads its environment when it is imported, and figures take a second that an error's line need not wait for.
    alone = {} if options.address else ALONE | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for name, value in (QUIET | alone).items():
        os.environ.setdefault(name, value)
    if options.dry_run:
        sweep = find_study(options.study)
        plan = draft_plan(options, sweep, storage)
        from .estimate import dry_run

        return dry_run(plan, sweep, address=options.address, json_file=options.json)
    if options.auto_resume and options.name is None:
        raise ConfigError("--auto-resume must know the sweep that it starts or goes on with. Add --name NAME.")
    new = not asked or (options.auto_resume and not (storage / options.name / PLAN_FILE).exists())
    if new:
        sweep = find_study(options.study)
        plan = make_plan(options, sweep, storage)
    else:
        plan = Plan.load(storage / (options.name or last_name(storage, find_study(options.study).name)))
        sweep = planned_sweep(plan)
        if options.auto_resume and find_sweep(storage, Path(plan.folder).name).complete:
            print(f"{plan.name} is complete, there is nothing to do: its report is in {plan.folder}/{REPORT_FOLDER}")
            return 0
        plan = _gone_on_with(plan, sweep, options)
    with INTERRUPTION.deferred():
        from tracking.runs import SPOOL_FILE

        from .driver import end_early, run_sweep

    claimed = False
    try:
        if INTERRUPTION.asked:
            raise KeyboardInterrupt
        if plan.bucket:
            Bucket(plan.bucket, plan.name).claim(plan.id)
            claimed = True
        return run_sweep(plan, sweep, address=options.address, json_file=options.json, notify=options.notify)
    except KeyboardInterrupt:
        return end_early(plan, options.address)
    except ConfigError:
        if new and not (Path(plan.folder) / SPOOL_FILE).exists():  # Nothing has begun: the name is free again.
            shutil.rmtree(plan.folder)
            if claimed:
                Bucket(plan.bucket, plan.name).release()
        raise
    except Exception as err:  # the machine's, and not the sweep's
        if (trouble := trouble_of(err)) is None or isinstance(err, QafeError):
            raise
        return end_early(plan, options.address, f"{trouble.words} ({machine_cause(err)})")


def _gone_on_with(plan: Plan, sweep: Sweep, options: argparse.Namespace) -> Plan:
    """The plan of a sweep that has begun, with what a command that goes on with it may change."""
    if options.storage and is_url(options.storage):
        Bucket(options.storage, plan.name)  # before it is shown: it may hold a password
        if options.storage != plan.bucket:
            raise ConfigError(
                f"the checkpoints of {plan.name} are in {plan.bucket or plan.folder}, got --storage {options.storage}. "
                "Leave it out."
            )
    plan = resumed_plan(plan, options)
    numbers = {flag: getattr(plan, field) for flag, field in OBEYED.items()}
    check_resources(numbers | {"trials": plan.trials, "seed": plan.seed}, options.address)
    if options.extend is not None:
        if options.extend < 1:
            raise ConfigError(f"--extend must be at least 1, got {options.extend}. Name more trials.")
        base, pinned = dotted.from_json(plan.config_json), frozenset(plan.pinned)
        return dataclasses.replace(plan, trials=planned_trials(sweep, plan.trials + options.extend, base, pinned))
    if find_sweep(Path(plan.folder).parent, Path(plan.folder).name).complete:
        raise ConfigError(
            f"only an interrupted sweep can be resumed, {plan.name} is complete. "
            f"Add trials (--extend 16 --name {plan.name}) or start a new one."
        )
    return plan
