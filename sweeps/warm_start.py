"""Trials of earlier sweeps, for a new sweep's sampler to learn from.

A trial is taken if running it here would be the same training: same data and expressions, same settings down to the
last one, and a point of the new space. It is told to the study as it ended there, behind the enqueued baseline.

It takes part in what the sampler learns and in nothing else. It is not planned, tracked or reported, and it does not
count for early stopping: neither its rungs nor the epochs of a finished one are copied. A sweep's verdict compares the
trials of that sweep, so a competitor that its tables do not show must not be what ended them; and the rungs of a sweep
with other ``grace_epochs`` or another scheduler hold only its survivors, against which every new trial would look
hopeless. The price is that the first trials of a new sweep are promoted as freely as those of any other.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from qafe import dotted
from qafe.errors import ConfigError

from .folder import PLAN_FILE
from .plan import Plan
from .study import WARM_START, own_trials, read_study
from .sweep import Sweep

SAME_NUMBERS = frozenset({"preset", "data.cache_gb", "data.workers", "train.checkpoint"})
"""Settings that change no score, so that an earlier sweep may have had others."""
DONE = "warm_started"


def find_sweeps(names: str | None, storage: Path) -> tuple[str, ...]:
    """The folders of the sweeps that ``--warm-start`` names: by name in the storage, or by path.

    Raises:
        ConfigError: one of them is not there, or cannot be read.
    """
    folders = []
    for name in (part.strip() for part in (names or "").split(",")):
        if not name:
            continue
        folder = next((path for path in (storage / name, Path(name)) if (path / PLAN_FILE).is_file()), None)
        if folder is None:
            there = sorted(path.parent.name for path in storage.glob(f"*/{PLAN_FILE}")) if storage.is_dir() else []
            near = difflib.get_close_matches(name, there, n=1, cutoff=0.3)
            hint = f"Did you mean {near[0]}?" if near else "Name a sweep's folder, or its --storage."
            raise ConfigError(f"--warm-start needs an earlier sweep, there is no {name} in {storage}. {hint}")
        read_earlier(folder)
        folders.append(str(folder.resolve()))
    return tuple(dict.fromkeys(folders))


def read_earlier(folder: Path) -> tuple[Plan, optuna.Study | None]:
    """An earlier sweep's plan and its study, wherever its folder lies now; None if it has not begun.

    Raises:
        ConfigError: one of them cannot be read.
    """
    plan = dataclasses.replace(Plan.load(folder), folder=str(folder))
    return plan, read_study(Path(plan.folder), plan.name, plan.study_storage)


def add_earlier_trials(study: optuna.Study, plan: Plan, sweep: Sweep) -> None:
    """Gives the study what fits of the sweeps that the plan names, once, and says what did."""
    if not plan.warm_start or study.user_attrs.get(DONE):
        return
    known = {trial.user_attrs.get(WARM_START) for trial in study.get_trials(deepcopy=False)}
    for folder in plan.warm_start:
        try:
            earlier, past = read_earlier(Path(folder))
        except ConfigError as err:  # it was there when the sweep was planned
            _say(f"warm start: nothing of {folder}: {err}")
            continue
        taken, refused = fitting_trials(plan, sweep, earlier, past)
        for label, trial in taken.items():
            if label not in known:
                study.add_trial(trial)
        reasons = "".join(f"; {count} refused: {reason}" for reason, count in refused.most_common())
        _say(f"warm start: {len(taken)} trials of {earlier.name}{reasons}")
    study.set_user_attr(DONE, True)


def fitting_trials(
    plan: Plan, sweep: Sweep, earlier: Plan, past: optuna.Study | None
) -> tuple[dict[str, FrozenTrial], Counter[str]]:
    """An earlier sweep's trials that are points of this one, by label, and how many were refused for which reason."""
    trials = own_trials(past) if past is not None else []
    if reason := _other_sweep(plan, earlier):
        return {}, Counter({reason: len(trials)}) if trials else Counter({f"{reason}, and it has no trials": 0})
    taken: dict[str, FrozenTrial] = {}
    refused: Counter[str] = Counter()
    for trial in trials:
        label = f"{earlier.name}#{trial.number}"
        found = _as_here(trial, plan, sweep, earlier, label)
        if isinstance(found, str):
            refused[found] += 1
        else:
            taken[label] = found
    return taken, refused


def _other_sweep(plan: Plan, earlier: Plan) -> str:
    """Why none of a sweep's trials can be compared with those here."""
    if earlier.data_digest != plan.data_digest:
        return "it had other data"
    if earlier.expressions != plan.expressions:
        return f"it was of {', '.join(earlier.expressions)}"
    if earlier.objectives != plan.objectives:
        return f"its objectives were {', '.join(earlier.objectives)}"
    resources = ("cpus_per_trial", "gpus_per_trial")
    if "seconds" in plan.objectives and any(getattr(earlier, name) != getattr(plan, name) for name in resources):
        return "its trials had other resources, so its seconds are others"
    return ""


def _as_here(trial: FrozenTrial, plan: Plan, sweep: Sweep, earlier: Plan, label: str) -> FrozenTrial | str:
    """The trial as this study may hold it, or why it may not."""
    values = trial.values if trial.state == TrialState.COMPLETE else None
    if trial.state == TrialState.PRUNED:
        if not trial.intermediate_values:
            return "stopped before their first epoch"
    elif trial.state != TrialState.COMPLETE:
        return "failed" if trial.state == TrialState.FAIL else "not ended"
    if not np.isfinite([*(values or ()), *trial.intermediate_values.values()]).all():
        return "a score that is no number"
    base, pinned = dotted.from_json(plan.config_json), frozenset(plan.pinned)
    try:
        wanted = dotted.flatten(dotted.override(dotted.from_json(earlier.config_json), trial.params))
    except ConfigError:
        return "settings that are no longer a config"
    distributions, outside = sweep.place(base, pinned, wanted)
    if outside:
        return f"{outside[0]} is outside of the space"
    params = {name: wanted[name] for name in distributions}
    here = dotted.flatten(dotted.override(base, params))
    ignored = SAME_NUMBERS if "seconds" not in plan.objectives else frozenset({"preset"})
    other = [name for name in here if here[name] != wanted[name] and name not in ignored]
    if other:
        return f"{other[0]} is another" + (" and not searched here" if other[0] not in trial.params else "")
    return create_trial(
        state=trial.state,
        values=values,
        params=params,
        distributions=distributions,
        # Of a finished trial the value says it all, and MedianPruner would compare with its epochs.
        intermediate_values=trial.intermediate_values if values is None else {},
        user_attrs={WARM_START: label},
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
