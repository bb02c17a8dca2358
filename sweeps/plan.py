"""What a sweep does, kept in its folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qafe import dotted
from qafe.config import PRETRAINED
from qafe.errors import ConfigError
from tracking.privacy import without_paths

from .folder import PLAN_FILE, name_taken
from .study import Objective, Sampler, Scheduler

KEPT_CHECKPOINTS = 5
STUDY_FOLDER = "study"
STUDY_FILE = "study.py"
"""The user's own study as it was when the sweep began, in the sweep's folder and among the parent run's artifacts."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that decides what a sweep does; kept in its folder, so that a resumed sweep does the same.

    Attributes:
        id: unique, whatever other sweeps are called.
        folder: the sweep's folder, where it lies now: Ray's experiment state, trials, study, spool and report.
        pinned: settings of the study that are not searched, because ``--set`` or the data fixes them.
        data_root: the prepared dataset, where it was last found; ``data_digest`` says which one it is.
        weights_sha256: of the files that encoders start from, by the name of their setting.
        tracking_uri: the MLflow store, absolute.
        trials: how many are planned, all extensions included.
        grace_epochs: epochs that every trial gets before it may be stopped early.
        objectives: what the study is told of a finished trial; early stopping needs a single one.
        study_storage: URL of the database that holds the study; empty for a file in the sweep's folder.
        bucket: URL of where sweeps have their checkpoints that workers cannot keep in the folder; else empty.
        keep_checkpoints: how many ended trials keep their best weights on disk.
        warm_start: folders of the earlier sweeps whose trials the study is given; see `sweeps.warm_start`.
        budget_hours: of training: GPU-hours, or worker-hours where trials have no GPU; None is without limit.
        baseline_bytes: memory that the baseline's training takes at its fullest, as estimated; 0 if it is not known.
        identifiable: whether names of patients, paths and pictures may reach MLflow.
    """

    id: str
    name: str
    study: str
    folder: str
    config_json: str
    pinned: tuple[str, ...]
    data_root: str
    data_digest: str
    expressions: tuple[str, ...]
    trials: int
    seed: int
    cpus_per_trial: float
    gpus_per_trial: float
    time_budget_s: float | None
    tracking_uri: str
    grace_epochs: int
    scheduler: Scheduler = "asha"
    sampler: Sampler = "tpe"
    objectives: tuple[Objective, ...] = ("spearman",)
    study_storage: str = ""
    bucket: str = ""
    keep_checkpoints: int = KEPT_CHECKPOINTS
    warm_start: tuple[str, ...] = ()
    budget_hours: float | None = None
    baseline_bytes: int = 0
    identifiable: bool = False
    weights_sha256: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def device_share(self) -> float:
        """Device-hours that an hour of one trial's training costs: its share of a GPU, or 1 for a CPU worker."""
        return self.gpus_per_trial or 1.0

    @property
    def cost_unit(self) -> str:
        """What `device_share` counts."""
        return "GPU-hours" if self.gpus_per_trial > 0 else "worker-hours"

    def make_folder(self, source: str = "") -> None:
        """Makes the sweep's folder with the plan in it.

        Args:
            source: text of the user's file that the study came from.
        Raises:
            ConfigError: another sweep has taken the folder meanwhile.
        """
        try:
            Path(self.folder).mkdir()
        except FileExistsError as err:
            raise name_taken(self.name, str(Path(self.folder).parent)) from err
        if source:
            (Path(self.folder) / STUDY_FOLDER).mkdir()
            (Path(self.folder) / STUDY_FOLDER / STUDY_FILE).write_text(source)
        self.save()

    def save(self) -> None:
        """Writes the plan, readable by its owner alone (a URI may hold a password)."""
        folder = Path(self.folder)
        unfinished = folder / (PLAN_FILE + ".unfinished")
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT, 0o600), "w") as out:
            json.dump(dataclasses.asdict(self), out, indent=2)
        unfinished.replace(folder / PLAN_FILE)

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """The plan that `save` wrote, of a sweep that lies here now, wherever it was made.

        Raises:
            ConfigError: there is none, or it is damaged.
        """
        try:
            tree = json.loads((folder / PLAN_FILE).read_text())
            lists = ("expressions", "pinned", "objectives", "warm_start")
            plan = cls(**tree | {name: tuple(tree[name]) for name in lists if name in tree})
            return _moved(plan, folder.resolve())
        except (OSError, ValueError, TypeError, KeyError) as err:
            raise ConfigError(
                f"only a sweep that was started can be resumed, there is no plan in {folder} ({type(err).__name__}). "
                "Name it with --name and --storage, or start it without --resume."
            ) from err


def _moved(plan: Plan, folder: Path) -> Plan:
    """The plan of a sweep whose folder lies there now, with all that has moved along with it."""
    before = Path(plan.folder)
    if folder == before:
        return plan

    def found(place: str) -> str:
        """Where something lies that is no longer where it was, but there from the two folders' common end."""
        old = Path(place)
        if not place or old.exists():
            return place
        for was, now in zip((before, *before.parents), (folder, *folder.parents), strict=False):
            if old.is_relative_to(was) and (now / old.relative_to(was)).exists():
                return str(now / old.relative_to(was))
            if was.name != now.name and was != before:
                break
        return place

    def found_file(url: str) -> str:
        file = re.fullmatch(r"(sqlite(?:\+\w+)?:///)(/[^?]+)(.*)", url)
        return f"{file[1]}{found(file[2])}{file[3]}" if file else url

    config = dotted.from_json(plan.config_json)
    flat = dotted.flatten(config)
    return dataclasses.replace(
        plan,
        folder=str(folder),
        data_root=found(plan.data_root),
        config_json=dotted.to_json(dotted.override(config, {name: found(flat[name]) for name in PRETRAINED})),
        tracking_uri=found_file(plan.tracking_uri),
        study_storage=found_file(plan.study_storage),
        warm_start=tuple(map(found, plan.warm_start)),
    )


def sweep_params(plan: Plan) -> dict[str, Any]:
    """The parent run's params: the plan without this machine's paths, and the config that all trials start from."""
    shown = ("study", "seed", "sampler", "scheduler", "cpus_per_trial", "gpus_per_trial", "data_digest")
    params = {name: getattr(plan, name) for name in shown}
    params |= {name: ",".join(getattr(plan, name)) for name in ("expressions", "objectives")}
    if plan.warm_start:
        params["warm_start"] = ",".join(Path(folder).name for folder in plan.warm_start)
    return params | dotted.flatten(without_paths(dotted.from_json(plan.config_json)))


def study_tags(plan: Plan) -> dict[str, str]:
    """Of a user's own study: its file among the parent run's artifacts, and the digest of that."""
    copy = Path(plan.folder) / STUDY_FOLDER / STUDY_FILE
    if not copy.is_file():
        return {}
    return {"qafe.study_file": STUDY_FILE, "qafe.study_sha256": hashlib.sha256(copy.read_bytes()).hexdigest()}
