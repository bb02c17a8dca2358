"""A new sweep's plan out of a command's options, checked before anything starts."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import re
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path

from qafe import allocation, console, dotted
from qafe.config import PRESETS, PRETRAINED, Config
from qafe.data.cohort import Cohort, choose_expressions, load_cohort, split_cohort
from qafe.data.sample import VERSION, make_sample
from qafe.device import amp_dtype
from qafe.errors import ConfigError
from qafe.train import check_model, check_samples
from tracking.connection import connect, masked, resolve_uri
from tracking.guard import check_patients
from tracking.pseudonyms import load_key
from tracking.runs import sweep_exists

from .bucket import Bucket
from .folder import PLAN_FILE, free_name, is_url, name_taken
from .plan import KEPT_CHECKPOINTS, Plan
from .resuming import sha256_of
from .room import fitting, room_bytes, side_by_side, trial_bytes
from .study import (
    DIRECTIONS,
    GRID,
    LEARNERS,
    Objective,
    Sampler,
    Scheduler,
    check_study_storage,
    make_sampler,
    whole_url,
)
from .sweep import Sweep, trial_device
from .warm_start import find_sweeps

DEFAULTS = {"cpus_per_trial": 1.0, "objectives": "spearman", "keep_checkpoints": KEPT_CHECKPOINTS, "seed": 0}
"""Of flags that have none on the command line, where a flag that was typed must be known from one that was not."""


def make_plan(options: argparse.Namespace, sweep: Sweep, storage: Path) -> Plan:
    """A new sweep's plan from the command line's options, written to its folder.

    Whatever cannot work is found here, before Ray starts; nothing is written until all of it can.

    Raises:
        QafeError: a setting, the data, the tracking store, the resources or a name that is taken.
    """
    plan = draft_plan(options, sweep, storage)
    client = connect(plan.tracking_uri)
    if plan.study_storage:
        check_study_storage(plan.study_storage)
    load_key()  # a damaged key is found now, not after the first trial
    if options.name and sweep_exists(client, options.name):
        raise name_taken(options.name, masked(plan.tracking_uri))
    if options.name and plan.bucket and Bucket(plan.bucket, plan.name).check():
        raise name_taken(options.name, plan.bucket)
    storage.mkdir(parents=True, exist_ok=True)
    if not options.name:

        def taken(name: str) -> bool:
            return sweep_exists(client, name) or (bool(plan.bucket) and Bucket(plan.bucket, name).check())

        name = free_name(storage, sweep.name, taken)
        plan = dataclasses.replace(plan, name=name, folder=str(storage / name))
    plan.make_folder(sweep.source)
    return plan


def draft_plan(options: argparse.Namespace, sweep: Sweep, storage: Path) -> Plan:
    """A new sweep's plan that is written nowhere: the tracking store is not asked, and no name is taken.

    Raises:
        QafeError: a setting, the data, the resources, a model too large for this machine, or a name that is taken.
    """
    options = _with_defaults(options)
    gpus = allocation.gpus()
    if options.address and (options.preset is None or options.gpus_per_trial is None):
        raise ConfigError(
            "this machine does not know a cluster's GPUs: with --address, say --preset and --gpus-per-trial, too."
        )
    preset = options.preset or ("paper" if gpus and options.data_root else "tiny")
    gpus_per_trial = float(gpus > 0) if options.gpus_per_trial is None else options.gpus_per_trial
    trials = sweep.trials if options.trials is None else options.trials
    check_resources(vars(options) | {"trials": trials, "gpus_per_trial": gpus_per_trial}, options.address)
    name = options.name or ""
    if not re.fullmatch(r"[A-Za-z0-9._-]*", name):
        raise ConfigError(f"a sweep's name is made of letters, digits, '.', '_' and '-', got {name!r} (--name).")
    if (storage / name / PLAN_FILE).exists():
        raise name_taken(name, str(storage))
    bucket = options.storage if options.storage and is_url(options.storage) else ""
    if bucket:
        Bucket(bucket, name)  # the URL is one
    objectives, scheduler = _objectives(options, sweep)
    sampler = _sampler(options, sweep, objectives)
    make_sampler(sampler, options.seed)
    warm_start = find_sweeps(options.warm_start, storage)
    settings = dotted.parse_settings(options.set) | ({"data.cache_gb": "0"} if options.no_cache else {})
    config = _with_whole_paths(dotted.override(PRESETS[preset](), settings))
    data_root = (options.data_root or sample_root()).resolve()
    cohort = load_cohort(data_root, config.data)
    expressions = choose_expressions(cohort.manifest, options.expression or sweep.expressions)
    if not options.allow_identifiable:
        check_patients(cohort)
    pinned = sweep.names(config) & (frozenset(settings) | _without_landmarks(cohort, expressions))
    sweep.check(config, pinned)
    trials = planned_trials(sweep, options.trials, config, pinned)
    amp_dtype(config.train, trial_device(gpus_per_trial))
    splits = {dotted.override(config, point).data.split_seed for point in sweep.points(config, pinned)}
    for split, expression in itertools.product(sorted(splits), expressions):
        settings_of = dotted.override(config, {"data.split_seed": split})
        part = split_cohort(cohort.store, cohort.manifest, settings_of.data).only(expression)
        check_samples(settings_of, part.store, part.train, part.validation)
    check_model(config)
    baseline_bytes = 0
    if not options.address:  # a cluster's memory is seen by its trials
        baseline_bytes = _check_memory(config, options.cpus_per_trial, gpus_per_trial, trials, len(expressions))
    name = name or free_name(storage, sweep.name, lambda _: False)
    return Plan(
        id=uuid.uuid4().hex,
        name=name,
        study=sweep.name,
        folder=str(storage / name),
        config_json=dotted.to_json(config),
        pinned=tuple(sorted(pinned)),
        data_root=str(data_root),
        data_digest=cohort.manifest.digest,
        expressions=expressions,
        trials=trials,
        seed=options.seed,
        cpus_per_trial=options.cpus_per_trial,
        gpus_per_trial=gpus_per_trial,
        time_budget_s=options.time_budget,
        tracking_uri=resolve_uri(options.tracking_uri),
        grace_epochs=sweep.grace_epochs,
        scheduler=scheduler,
        sampler=sampler,
        objectives=objectives,
        study_storage=whole_url(options.study_storage or ""),
        bucket=bucket,
        keep_checkpoints=options.keep_checkpoints,
        warm_start=warm_start,
        budget_hours=options.budget_gpu_hours,
        baseline_bytes=baseline_bytes,
        identifiable=options.allow_identifiable,
        weights_sha256={name: sha256_of(Path(place)) for name in PRETRAINED if (place := dotted.flatten(config)[name])},
    )


def _with_defaults(options: argparse.Namespace) -> argparse.Namespace:
    """A new sweep's options: what was not typed has its usual value."""
    return argparse.Namespace(
        **{name: DEFAULTS.get(name) if value is None else value for name, value in vars(options).items()}
    )


def planned_trials(sweep: Sweep, wanted: int | None, base: Config, pinned: frozenset[str]) -> int:
    """How many trials a sweep has; a grid has all of its points, or the first of them.

    Raises:
        ConfigError: a grid has fewer points.
    """
    if not sweep.is_grid:
        return sweep.trials if wanted is None else wanted
    points = len(sweep.points(base, pinned))
    if wanted is not None and wanted > points:
        raise ConfigError(
            f"{sweep.name} is a grid of {points} points, each is run once, got {wanted} trials. Name at most {points}."
        )
    return points if wanted is None else wanted


def sample_root() -> Path:
    """The generated sample dataset under the user's cache folder; made on first use."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qafe"
    root = cache / f"sample-{VERSION}"
    if root.exists():
        return make_sample(root)  # returned as it is, once it is known to be this sample
    with console.progress(f"making the sample dataset in {root} (once)") as progress:
        return make_sample(root, progress=progress)


def _check_memory(config: Config, cpus: float, gpus: float, trials: int, models: int) -> int:
    """What the baseline takes at its fullest, in bytes.

    Raises:
        ConfigError: not even a batch of one clip fits into a trial's share of this machine.
    """
    device = trial_device(gpus)
    places = side_by_side(allocation.cores(), allocation.gpus(), cpus, gpus)
    room = room_bytes(device, gpus, min(places, trials))
    try:
        fitting(config, device, room, models)
    except MemoryError as err:
        raise ConfigError(f"the baseline must fit in memory: {err}") from err
    return trial_bytes(config, device, models)


def check_resources(numbers: Mapping[str, float | None], address: str | None) -> None:
    """Refuses numbers that make no sense, or do not fit this machine where no cluster is named.

    Args:
        numbers: by flag; None is one that nobody has given.
    Raises:
        ConfigError: one of them.
    """
    for flag in ("trials", "keep_checkpoints", "cpus_per_trial", "time_budget", "budget_gpu_hours"):
        value = numbers[flag]
        if value is not None and value <= 0:
            name = "--" + flag.replace("_", "-")
            raise ConfigError(f"{name} must be greater than 0, got {value:g}. Name a larger number.")
    for flag, here in (("cpus_per_trial", allocation.cores()), ("gpus_per_trial", allocation.gpus())):
        value = numbers[flag]
        assert value is not None
        if value < 0 or (not address and value > here):
            name = "--" + flag.replace("_", "-")
            raise ConfigError(f"{name} must lie between 0 and the {here} of this machine, got {value:g}. Name fewer.")
    if (seed := numbers["seed"]) is not None and seed < 0:
        raise ConfigError(f"--seed must not be negative, got {seed}. Name another.")


def _sampler(options: argparse.Namespace, sweep: Sweep, objectives: tuple[Objective, ...]) -> Sampler:
    """Who chooses the settings, where that can be."""
    sampler: Sampler = options.sampler or (GRID if sweep.is_grid else "tpe")
    if sweep.is_grid != (sampler == GRID):
        what = f"runs all points of a grid, got --sampler {sampler}. Leave it out."
        if not sweep.is_grid:
            what = f"is a space that is searched, got --sampler {sampler}, which is for grids. Use --sampler tpe."
        raise ConfigError(f"{sweep.name} {what}")
    if sampler == "cmaes" and len(objectives) > 1:
        raise ConfigError(
            f"cmaes searches for one objective, got --objectives {options.objectives}. Use --sampler tpe or gp."
        )
    if options.warm_start and sampler not in LEARNERS:
        raise ConfigError(
            f"--warm-start needs a sampler that learns from trials that it did not choose ({', '.join(LEARNERS)}), "
            f"{sampler} does not. Use --sampler tpe, or leave --warm-start out."
        )
    return sampler


def _objectives(options: argparse.Namespace, sweep: Sweep) -> tuple[tuple[Objective, ...], Scheduler]:
    """What is searched for, and how trials are stopped early, where that can be."""
    names = [name.strip() for name in options.objectives.split(",")]
    unknown = [name for name in names if name not in DIRECTIONS]
    if unknown or len(set(names)) < len(names) or names[0] != "spearman":
        raise ConfigError(
            f"objectives begin with spearman and name each of {', '.join(DIRECTIONS)} at most once, got "
            f"{options.objectives} (--objectives). Correct it."
        )
    scheduler = options.scheduler or ("asha" if len(names) == 1 and not sweep.is_grid else "none")
    if sweep.is_grid and scheduler != "none":
        raise ConfigError(
            f"{sweep.name} runs every point of its grid to the end, got --scheduler {scheduler}. Leave it out."
        )
    if len(names) > 1 and scheduler != "none":
        raise ConfigError(
            f"several objectives cannot be compared half-way, got --scheduler {scheduler} with --objectives "
            f"{options.objectives}. Use --scheduler none."
        )
    return tuple(names), scheduler  # type: ignore[return-value]


def _with_whole_paths(config: Config) -> Config:
    """Paths of weights as every worker can read them: a trial runs in a folder of its own."""
    flat = dotted.flatten(config)
    return dotted.override(config, {name: str(Path(flat[name]).resolve()) for name in PRETRAINED if flat[name]})


def _without_landmarks(cohort: Cohort, expressions: tuple[str, ...]) -> frozenset[str]:
    """The settings that only landmarks can follow, where a dataset has the authors' rendered heatmaps instead."""
    samples = (*cohort.train, *cohort.validation, *cohort.test)
    if all(cohort.store.has_landmarks(s.patient, s.video) for s in samples if s.expression in expressions):
        return frozenset()
    print("there are no landmarks: how heatmaps are drawn is not searched", file=sys.stderr)
    return frozenset(name for name in dotted.flatten(Config()) if name.startswith("data.heatmap."))
