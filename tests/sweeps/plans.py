"""Plans of sweeps that are not started."""

from pathlib import Path
from typing import Any

import optuna

from qafe.config import Config, tiny
from qafe.dotted import to_json
from sweeps.plan import Plan
from sweeps.results import OBJECTIVE
from sweeps.searcher import StudySearcher
from sweeps.sweep import Suggester, Sweep


def plan_in(storage: Path, name: str = "s-1", base: Config | None = None, **changes: Any) -> Plan:
    """A plan of 30 trials of the tiny preset with a study in a folder of its own."""
    values: dict[str, Any] = {
        "id": name,
        "name": name,
        "study": "fusion_search",
        "folder": str(storage / name),
        "config_json": to_json(base or tiny()),
        "pinned": (),
        "data_root": "",
        "data_digest": "d",
        "expressions": ("smile",),
        "trials": 30,
        "seed": 0,
        "cpus_per_trial": 1.0,
        "gpus_per_trial": 0.0,
        "time_budget_s": None,
        "tracking_uri": "",
        "grace_epochs": 1,
    }
    plan = Plan(**values | changes)
    if not Path(plan.folder).exists():
        storage.mkdir(parents=True, exist_ok=True)
        plan.make_folder()
    return plan


def result(epoch: int, objective: float, finished: bool = False, **more: Any) -> dict[str, Any]:
    """What a trial reports after an epoch."""
    return {"epoch": epoch, OBJECTIVE: objective, "finished": finished} | more


def finish(searcher: StudySearcher, trial_id: str, objective: float, **more: Any) -> None:
    """One epoch, which was the last."""
    last = result(1, objective, finished=True, **more)
    searcher.report(trial_id, last)
    searcher.on_trial_complete(trial_id, last)


def ask(study: optuna.Study, sweep: Sweep, base: Config) -> optuna.Trial:
    """A study's next trial, with the settings that a sweep's space asks for."""
    trial = study.ask()
    sweep.space(Suggester(trial, base))
    return trial
