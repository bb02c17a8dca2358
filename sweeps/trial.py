"""One trial on a worker: settings in, an epoch's numbers and a checkpoint out, again and again.

It knows nothing of MLflow: the driver tracks what is reported here.
"""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import tune

from qafe import config as configs
from qafe.data.cohort import load_cohort
from qafe.errors import QafeError
from qafe.history import ExpressionHistory, History, read_history, write_history
from qafe.train import EpochResult, fit

from .searcher import FINISHED, OBJECTIVE, REFUSED
from .sweep import trial_device

CONFIG_FILE = "config.json"
NO_SKILL = -1.0
"""What a trial reports whose loss is not finite: the lowest Spearman there is."""


@dataclass(frozen=True, kw_only=True)
class TrialPlan:
    """What all trials of a sweep share."""

    base_json: str
    data_root: str
    expressions: tuple[str, ...]
    threads: int
    gpus: float


def train_trial(parameters: dict[str, Any], plan: TrialPlan) -> None:
    """Trains one model for each expression, epoch by epoch side by side, and reports after each epoch.

    A trial that was interrupted goes on from its last checkpoint. A loss that is not finite ends the trial: the
    sweep counts it as pruned and says why. Settings or data that cannot work end it as failed, at once.
    """
    try:
        _train(parameters, plan)
    except QafeError as err:
        tune.report({"epoch": 0, OBJECTIVE: NO_SKILL, REFUSED: f"{type(err).__name__}: {err}", FINISHED: False})


def _train(parameters: dict[str, Any], plan: TrialPlan) -> None:
    torch.set_num_threads(plan.threads)
    config = configs.override(configs.from_json(plan.base_json), parameters["settings"])
    # The expressions train side by side: they share what one training would have. Numbers do not depend on it.
    config = configs.override(config, {"data.workers": config.data.workers // len(plan.expressions)})
    cohort = load_cohort(plan.data_root, config.data)
    device = trial_device(plan.gpus)
    history: History = {}
    with contextlib.ExitStack() as stack:
        resume_from = None
        if (checkpoint := tune.get_checkpoint()) is not None:
            resume_from = Path(stack.enter_context(checkpoint.as_directory()))
            history = read_history(resume_from)
        runs = {}
        for expression in plan.expressions:
            part = cohort.only(expression)
            history.setdefault(expression, ExpressionHistory.start(part.validation))
            runs[expression] = fit(
                config,
                part.store,
                part.train,
                part.validation,
                device=device,
                resume_from=resume_from / expression if resume_from else None,
            )
    done = len(history[plan.expressions[0]].epochs)
    for epoch in range(done + 1, config.train.epochs + 1):
        try:
            results = {expression: next(run) for expression, run in runs.items()}
        except FloatingPointError as err:
            tune.report({"epoch": epoch, OBJECTIVE: NO_SKILL, "diverged": str(err), FINISHED: False})
            return
        for expression, result in results.items():
            history[expression].add(result)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / CONFIG_FILE).write_text(configs.to_json(config))
            write_history(folder, history)
            for expression, result in results.items():
                result.save(folder / expression)
            tune.report(
                summary(results) | {FINISHED: epoch == config.train.epochs},
                checkpoint=tune.Checkpoint.from_directory(folder),
            )


def summary(results: dict[str, EpochResult]) -> dict[str, Any]:
    """An epoch's numbers: means over the expressions, and Spearman for each."""
    every = list(results.values())

    def mean(name: str) -> float:
        return float(np.mean([result.metrics[name] for result in every]))

    values: dict[str, Any] = {
        "epoch": every[0].epoch,
        OBJECTIVE: float(np.mean([result.best_spearman for result in every])),
        "spearman": mean("spearman"),
        "pearson": mean("pearson"),
        "mae": mean("mae"),
        "train_loss": float(np.mean([result.train_loss for result in every])),
        "lr": every[0].lr,
        "epoch_s": sum(result.seconds for result in every),
        "clips_per_s": float(np.mean([result.clips_per_s for result in every])),
        "peak_memory_mb": max(result.peak_memory_mb for result in every),
        "worker": f"{platform.node()}:{os.getpid()}",
    }
    return values | {f"spearman_{expression}": result.metrics["spearman"] for expression, result in results.items()}
