"""What may be said beside ``--resume``, ``--extend`` and ``--auto-resume``: every flag that is typed is obeyed, is what
the sweep was planned with, or is refused."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qafe import dotted
from qafe.config import PRETRAINED, Config
from qafe.data.cohort import choose_expressions
from qafe.data.manifest import read_manifest
from qafe.errors import ConfigError
from qafe.store import Store
from tracking.connection import connect, embedded_path, masked, resolve_uri
from tracking.runs import SWEEP_ID_TAG, search_sweep

from .plan import Plan
from .studies import STUDIES
from .study import SWEEP_ID, read_study, whole_url
from .user_file import is_file_name
from .warm_start import find_sweeps

COMMAND = frozenset({"study", "list", "name", "storage", "resume", "auto_resume", "extend", "dry_run", "debug", "help",
                     "version"})  # fmt: skip
"""What says which sweep is meant, and what is done with it: `command` looks at these."""
OF_THIS_DRIVER = frozenset({"address", "json", "notify"})
"""What each driver may be told anew."""
OBEYED: dict[str, str] = {
    "cpus_per_trial": "cpus_per_trial",
    "gpus_per_trial": "gpus_per_trial",
    "time_budget": "time_budget_s",
    "budget_gpu_hours": "budget_hours",
    "keep_checkpoints": "keep_checkpoints",
}
"""What changes no trial: the plan's field that takes the value."""


def resumed_plan(plan: Plan, options: argparse.Namespace) -> Plan:
    """The plan with what a command that goes on with it may change.

    Raises:
        ConfigError: a flag says what the sweep was not planned with, or a place does not hold what it should.
    """
    # A user's file may have changed or gone since: the sweep has its own copy.
    named = plan.study if is_file_name(options.study) and plan.study not in STUDIES else options.study
    if named != plan.study:
        raise ConfigError(f"{plan.name} is a sweep of {plan.study}, not of {named}. Name that study.")
    new = {field: getattr(options, flag) for flag, field in OBEYED.items() if typed(options, flag)}
    plan = _placed(dataclasses.replace(plan, **new), options)
    for flag, (said, planned) in COMPARED.items():
        if typed(options, flag) and (wanted := said(options, plan)) != planned(plan):
            has = f"without {_flag(flag)}"
            if wanted is not True:
                has = f"with {_flag(flag)} {_shown(planned(plan))}, not {_shown(wanted)}"
            raise ConfigError(
                f"a sweep goes on as it was planned: {plan.name} {has}. Leave it out, or start a new one."
            )
    return plan


def typed(options: argparse.Namespace, flag: str) -> bool:
    """Whether a flag was given: those of `command` have no default but None, False or an empty list."""
    value = getattr(options, flag)
    return value is not None and value is not False and value != []


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


# ------------------------------------------------------------------------ what must be as it was planned


def _expressions(options: argparse.Namespace, plan: Plan) -> tuple[str, ...]:
    return tuple(sorted(choose_expressions(read_manifest(Store(plan.data_root)), options.expression)))


def _differing(options: argparse.Namespace, plan: Plan) -> list[str]:
    """The settings that ``--set`` gives another value than the plan's."""
    settings = {name: text for name, text in dotted.parse_settings(options.set).items() if name not in PRETRAINED}
    before, after = dotted.flatten(_config(plan)), dotted.flatten(dotted.override(_config(plan), settings))
    return [f"{name}={before[name]}, not {after[name]}" for name in settings if before[name] != after[name]]


def _config(plan: Plan) -> Config:
    return dotted.from_json(plan.config_json)


def _same(flag: str, field: str = "") -> tuple[Callable[[argparse.Namespace, Plan], Any], Callable[[Plan], Any]]:
    return (lambda options, _: getattr(options, flag)), (lambda plan: getattr(plan, field or flag))


COMPARED: dict[str, tuple[Callable[[argparse.Namespace, Plan], Any], Callable[[Plan], Any]]] = {
    "expression": (_expressions, lambda plan: tuple(sorted(plan.expressions))),
    "preset": (lambda options, _: options.preset, lambda plan: _config(plan).preset),
    "no_cache": (lambda *_: True, lambda plan: _config(plan).data.cache_gb == 0),
    "trials": _same("trials"),
    "allow_identifiable": _same("allow_identifiable", "identifiable"),
    "scheduler": _same("scheduler"),
    "sampler": _same("sampler"),
    "objectives": (
        lambda options, _: tuple(name.strip() for name in options.objectives.split(",")),
        lambda plan: plan.objectives,
    ),
    "warm_start": (
        lambda options, plan: find_sweeps(options.warm_start, Path(plan.folder).parent),
        lambda plan: plan.warm_start,
    ),
    "seed": _same("seed"),
}
"""Flag: what it says, and what the plan has."""

# ------------------------------------------------------------------------ what may lie elsewhere now


def _placed(plan: Plan, options: argparse.Namespace) -> Plan:
    """The plan with the places that a command names, each of which must hold what the sweep began with."""
    if typed(options, "data_root"):
        plan = dataclasses.replace(plan, data_root=str(options.data_root.resolve()))
    if not Path(plan.data_root).is_dir():
        raise ConfigError(
            f"a sweep goes on with its data, {plan.data_root} of {plan.name} is not there. Say where the data lies "
            "now: --data-root FOLDER."
        )
    settings = dotted.parse_settings(options.set)
    flat = dotted.flatten(_config(plan))
    places = {name: str(Path(settings[name]).resolve()) if settings.get(name) else flat[name] for name in PRETRAINED}
    for name, place in places.items():
        if bool(place) != bool(flat[name]):
            raise ConfigError(f"a sweep goes on as it was planned: {plan.name} without {name} (--set). Leave it out.")
        if place:
            _check_weights(plan, name, Path(place))
    config = dotted.override(_config(plan), places)
    if differing := _differing(options, plan):
        raise ConfigError(
            f"a sweep goes on as it was planned: {plan.name} with {'; '.join(differing)} (--set). Leave it out, or "
            "start a new one."
        )
    plan = dataclasses.replace(plan, config_json=dotted.to_json(config))
    if typed(options, "study_storage"):
        plan = dataclasses.replace(plan, study_storage=_study_place(plan, options.study_storage))
    uri = resolve_uri(options.tracking_uri) if typed(options, "tracking_uri") else plan.tracking_uri
    return dataclasses.replace(plan, tracking_uri=_tracking_place(plan, uri))


def sha256_of(path: Path) -> str:
    """Digest of a file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with open(path, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as err:
        raise ConfigError(
            f"weights that encoders start from must be readable, {path} is not ({err.strerror}). Say where they lie: "
            "--set model.rgb.weights=FILE or model.heatmap.weights=FILE."
        ) from err


def _check_weights(plan: Plan, name: str, place: Path) -> None:
    found, planned = sha256_of(place), plan.weights_sha256.get(name)
    if planned and found != planned:  # plans of before have none
        raise ConfigError(
            f"a sweep goes on with the weights that it began with, {place} ({name}) holds others (sha256 {found[:12]}, "
            f"not {planned[:12]}). Name their file: --set {name}=FILE."
        )


def _study_place(plan: Plan, url: str) -> str:
    place = whole_url(url)
    study = read_study(Path(plan.folder), plan.name, place) if place != plan.study_storage else True
    if not study or (study is not True and study.user_attrs.get(SWEEP_ID, plan.id) != plan.id):
        raise ConfigError(
            f"the study of {plan.name} must be in its storage, {masked(place)} has none of it (--study-storage). Name "
            "the database that it lies in, or leave that out."
        )
    return place


def _tracking_place(plan: Plan, uri: str) -> str:
    """A tracking store that is the sweep's own, or could be: a file that is made anew would have none of its past."""
    file = embedded_path(uri)
    if file and not file.exists():
        raise ConfigError(
            f"a sweep goes on in its tracking store, {file} of {plan.name} is not there. Say where it lies now: "
            f"--tracking-uri sqlite:///{file.name}."
        )
    if uri != plan.tracking_uri and not search_sweep(connect(uri, create=False), SWEEP_ID_TAG, plan.id):
        raise ConfigError(
            f"a sweep goes on in its tracking store, {masked(uri)} has no run of {plan.name} (--tracking-uri). Name "
            "the store that it began in, or leave that out."
        )
    return uri
