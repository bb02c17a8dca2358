"""How many epochs a search needs: TPE with ASHA as `sweeps.run` uses them, against random search of whole trials.

The objective is synthetic, so that its optimum is known: over the space of `fusion_search`, a trial's score falls with
the distance of its settings from one point, is learnt along a curve over epochs, and carries a training's noise. The
rival spends its whole budget; ours stops when it has a whole trial whose true score is as good as the rival's best.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna

from qafe.config import Config, paper
from sweeps.searcher import BASELINE
from sweeps.studies import STUDIES
from sweeps.study import PRUNERS, make_sampler
from sweeps.sweep import Suggester

from .rounds import Found, Row

EPOCHS = 27
TRIALS = 50
LEARNT_BY = 6.0
"""Epochs in which a trial comes within 1/e of its score."""
NOISE = 0.02
"""Standard deviation of an epoch's Spearman."""
LONGEST = 4
"""Ours is given up after this many times the rival's epochs."""
OPTIMUM: dict[str, Any] = {
    "model.fusion.kind": "cross_split",
    "model.fusion.layers": 2,
    "model.fusion.query": "both",
    "model.fusion.position": "none",
    "model.fusion.mixer": "attention_pool",
    "model.fusion.dropout": 0.1,
    "data.heatmap.sigma_px": 1.4,
    "data.heatmap.window_px": 6,
    "data.heatmap.points": "mouth",
    "data.heatmap.colour": "grey",
}
WEIGHT = {"model.fusion.kind": 0.15, "data.heatmap.points": 0.15, "data.heatmap.sigma_px": 0.15}
REACH = {
    "model.fusion.layers": 3.0,
    "model.fusion.dropout": 0.4,
    "data.heatmap.sigma_px": 2.5,
    "data.heatmap.window_px": 5.0,
}


def true_score(settings: dict[str, Any]) -> float:
    """What whole trainings with these settings reach on average: 0.9 at the optimum."""
    lost = 0.0
    for name, best in OPTIMUM.items():
        weight = WEIGHT.get(name, 0.05)
        if name not in settings:
            lost += weight
        elif isinstance(best, str):
            lost += weight * (settings[name] != best)
        else:
            lost += weight * min(1.0, abs(settings[name] - best) / REACH[name]) ** 0.7
    return 0.9 - lost


def curve(settings: dict[str, Any], rng: np.random.Generator) -> list[float]:
    """The best validation Spearman after each epoch."""
    score = true_score(settings)
    epochs = np.arange(1, EPOCHS + 1)
    seen = score * (1 - np.exp(-epochs / LEARNT_BY)) / (1 - math.exp(-EPOCHS / LEARNT_BY))
    return list(np.maximum.accumulate(seen + rng.normal(0, NOISE, EPOCHS)))


def search(
    sampler: str, scheduler: str, seed: int, enough: Callable[[int, float], bool], base: Config
) -> tuple[int, float]:
    """Runs trials one after the other until there is enough; (epochs, best true score of a whole trial)."""
    sweep, rng = STUDIES["fusion_search"], np.random.default_rng(seed)
    study = optuna.create_study(direction="maximize", pruner=PRUNERS[scheduler](sweep.grace_epochs, EPOCHS))
    study.enqueue_trial(sweep.baseline(base), user_attrs={BASELINE: True})
    spent, best = 0, -math.inf
    while not enough(spent, best):
        study.sampler = make_sampler(sampler, seed, len(study.get_trials(deepcopy=False)))
        trial = study.ask()
        sweep.space(Suggester(trial, base))
        for epoch, value in enumerate(curve(trial.params, rng), start=1):
            spent += 1
            trial.report(value, epoch)
            if epoch < EPOCHS and BASELINE not in trial.user_attrs and trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, value)
            best = max(best, true_score(trial.params))
    return spent, best


def bench(rounds: int) -> Found:
    """Epochs of both for as many seeds as rounds."""
    row = Row(
        f"search to the best of {TRIALS} random trials of {EPOCHS} epochs",
        "sweep",
        [],
        [],
        rival_name="random search, no early stopping",
        quantity="epochs",
    )
    base, scores = paper(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        for seed in range(rounds):
            budget = TRIALS * EPOCHS
            _, target = search("random", "none", seed, lambda spent, _: spent >= TRIALS * EPOCHS, base)
            ours, _ = search(
                "tpe",
                "asha",
                seed,
                lambda spent, best, target=target, budget=budget: best >= target or spent >= LONGEST * budget,
                base,
            )
            row.ours.append(float(ours))
            row.rival.append(float(budget))
            scores.append(target)
    row.notes.append(f"rival's best: {', '.join(f'{score:.3f}' for score in scores)} (optimum: 0.900)")
    return Found([row])
