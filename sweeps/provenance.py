"""Where a sweep's numbers come from: which code, which versions, which data, which settings; as tags and a diff."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from qafe import installation
from qafe.config import Config
from qafe.data.cohort import Cohort, split_cohort
from tracking.tags import SPLIT_TAG

from .plan import Plan

ROOT = Path(__file__).parents[1]
OWN_FILES = ("qafe", "sweeps", "tracking", "setup.cfg", "pyproject.toml", "constraints.txt")
"""What of a changed tree goes to MLflow: the product's own source, nothing that lies beside it."""
DIFF_FILE = "source.diff"
LIBRARIES = ("torch", "numpy", "ray", "optuna", "mlflow")


def source_tags() -> dict[str, str]:
    """Git commit (or ``QAFE_SOURCE_COMMIT``, for images without a repository), whether the tree differs from it, and
    versions of the libraries."""
    tags = {f"version.{installation.NAME}": installation.version()}
    tags |= {f"version.{name}": version(name) for name in LIBRARIES}
    tags["version.python"] = ".".join(map(str, sys.version_info[:3]))
    if commit := os.environ.get("QAFE_SOURCE_COMMIT"):
        return tags | {"mlflow.source.git.commit": commit}
    if commit := _git("rev-parse", "HEAD"):
        dirty = bool(_git("status", "--porcelain", "--untracked-files=no"))
        tags |= {"mlflow.source.git.commit": commit, "mlflow.source.git.dirty": str(dirty).lower()}
    return tags


def sweep_tags(plan: Plan, cohort: Cohort) -> dict[str, str]:
    """What all runs of a sweep have in common."""
    return {
        "qafe.study": plan.study,
        "qafe.expression": ",".join(plan.expressions),
        "qafe.data_digest": cohort.manifest.digest,
    }


def trial_tags(config: Config, cohort: Cohort, number: int, sampler: str) -> dict[str, str]:
    """What sets a trial apart: its stage, its fold (the seed of the split, and a digest of it) and its seed."""
    stage = "baseline" if number == 0 else "grid" if sampler == "grid" else "search"
    return {
        "qafe.stage": stage,
        "qafe.fold": str(config.data.split_seed),
        "qafe.seed": str(config.train.seed),
        SPLIT_TAG: split_cohort(cohort.store, cohort.manifest, config.data).split_digest,
    }


def write_diff(folder: Path) -> bool:
    """Writes what differs from the commit in the product's own files, and says whether something does."""
    diff = "" if os.environ.get("QAFE_SOURCE_COMMIT") else _git("diff", "HEAD", "--no-color", "--", *OWN_FILES)
    if diff:
        folder.mkdir(exist_ok=True)
        (folder / DIFF_FILE).write_text(diff + "\n")
    return bool(diff)


def _git(*arguments: str) -> str:
    """What git says of the repository that this file belongs to; nothing outside of one."""
    try:
        inside = ["git", "-C", str(ROOT), "ls-files", "--error-unmatch", "sweeps/provenance.py"]
        subprocess.run(inside, capture_output=True, check=True)
        line = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
