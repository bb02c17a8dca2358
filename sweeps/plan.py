"""What a sweep is going to do, checked before anything starts, and kept in its folder."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qafe import config as configs
from qafe import console
from qafe.config import PRESETS
from qafe.data.cohort import Cohort, choose_expressions, load_cohort
from qafe.data.sample import VERSION, make_sample
from qafe.errors import ConfigError
from tracking.connection import connect, resolve_uri

from .sweep import Study

PLAN_FILE = "sweep.json"


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


def make_plan(options: argparse.Namespace, study: Study, storage: Path) -> Plan:
    """A new sweep's plan from the command line's options, written to its folder.

    Raises:
        QafeError: whatever of it cannot work: a setting, the data, the tracking store, a name that is taken.
    """
    gpu = torch.cuda.is_available()
    preset = options.preset or ("paper" if gpu and options.data_root else "tiny")
    config = configs.override(PRESETS[preset](), configs.parse_settings(options.set))
    trials = study.trials if options.trials is None else options.trials
    for name, value in (("--trials", trials), ("--cpus-per-trial", options.cpus_per_trial)):
        if value <= 0:
            raise ConfigError(f"{name} must be greater than 0, got {value}. Name a larger number.")
    uri = resolve_uri(options.tracking_uri)
    connect(uri)
    name = options.name or free_name(storage, study)
    if (storage / name).exists():
        raise ConfigError(
            f"a sweep's name must be new, {name} is in {storage}. "
            f"Go on with it (--resume --name {name}) or choose another --name."
        )
    data_root = (options.data_root or sample_root()).resolve()
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


def clip_counts(cohort: Cohort, expressions: tuple[str, ...]) -> dict[str, int]:
    """How many clips of these expressions each part of the cohort has."""
    parts = {"training": cohort.train, "validation": cohort.validation, "test": cohort.test}
    return {name: sum(sample.expression in expressions for sample in part) for name, part in parts.items()}


def sample_root() -> Path:
    """The generated sample dataset under the user's cache folder; made on first use."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qafe"
    root = cache / f"sample-{VERSION}"
    if root.exists():
        return root
    with console.progress(f"making the sample dataset in {root} (once)") as progress:
        return make_sample(root, progress=progress)


def _names(storage: Path, study: Study) -> dict[int, str]:
    found = storage.glob(f"{study.name}-*") if storage.is_dir() else []
    return {int(tail): path.name for path in found if (tail := path.name.removeprefix(f"{study.name}-")).isdigit()}


def free_name(storage: Path, study: Study) -> str:
    """The study's name with the next free number."""
    return f"{study.name}-{max(_names(storage, study), default=0) + 1}"


def last_name(storage: Path, study: Study) -> str:
    """The study's sweep with the highest number.

    Raises:
        ConfigError: there is none.
    """
    names = _names(storage, study)
    if not names:
        raise ConfigError(f"there is no {study.name} sweep to resume in {storage}. Name it with --name or --storage.")
    return names[max(names)]


def sweep_params(plan: Plan) -> dict[str, Any]:
    """The parent run's params: the plan without this machine's paths, and the config that all trials start from."""
    shown = ("study", "trials", "seed", "cpus_per_trial", "gpus_per_trial", "data_digest")
    params = {name: getattr(plan, name) for name in shown} | {"expressions": ",".join(plan.expressions)}
    return params | configs.flatten(configs.from_json(plan.config_json))


def source_tags() -> dict[str, str]:
    """Git commit (or ``QAFE_SOURCE_COMMIT``, for images without a repository) and versions of the libraries."""
    tags = {f"version.{name}": version(name) for name in ("qafe-net", "torch", "ray", "optuna", "mlflow")}
    commit = os.environ.get("QAFE_SOURCE_COMMIT", "")
    with contextlib.suppress(OSError):
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = commit or subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})
