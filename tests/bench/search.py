"""How many epochs a search needs: TPE with ASHA as `sweeps.run` uses them, against random search of whole trials.

The rival spends its whole budget; ours stops at the epoch that gives it a model as good as the rival's best. Two
objectives, both over the space of `fusion_search`:

- synthetic, so that its optimum is known: a trial's score falls with the distance of its settings from one point, is
  learnt along a curve over epochs, and carries a training's noise. Searches see the noise; they are judged without it.
- real trainings of ``tiny`` on a sample dataset, judged by what a sweep sees: validation Spearman. It takes most of an
  hour on two cores; what each seed found is said as it ends. Half of the patients are for validation, so that
  settings decide and not luck. An epoch takes each clip four times: with once, none of six trainings that were looked
  at had learnt much by the rung at epoch 4; with four times, one of four had.
"""

from __future__ import annotations

import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch

from qafe.config import Config, paper, tiny
from qafe.data.cohort import load_cohort
from qafe.data.sample import SampleConfig, make_sample
from qafe.dotted import override
from qafe.train import fit
from sweeps.studies import STUDIES
from sweeps.study import BASELINE, PRUNERS, make_sampler
from sweeps.sweep import Suggester

from .rounds import Found, Row

Learn = Callable[[dict[str, Any]], Iterator[tuple[float, float]]]
"""Settings -> after each epoch, the best validation Spearman that was seen so far, and what the model is worth."""
EPOCHS = 27
TRIALS = 50
SAMPLE = SampleConfig(train_patients=24, test_patients=1, clips=3)
SAMPLE_TRIALS = 15
SAMPLE_REPEATS = 4
EXPRESSION = "smile"
LEARNT_BY = 6.0
"""Epochs in which a trial comes within 1/e of its score."""
NOISE = 0.02
"""Standard deviation of an epoch's Spearman."""
LONGEST = 2
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


def curve(settings: dict[str, Any], rng: np.random.Generator) -> Iterator[tuple[float, float]]:
    """A training that the synthetic objective makes up."""
    epochs = np.arange(1, EPOCHS + 1)
    worth = true_score(settings) * (1 - np.exp(-epochs / LEARNT_BY)) / (1 - math.exp(-EPOCHS / LEARNT_BY))
    seen = np.maximum.accumulate(worth + rng.normal(0, NOISE, EPOCHS))
    return zip(seen.tolist(), worth.tolist(), strict=True)


def train(settings: dict[str, Any], data: Path, base: Config) -> Iterator[tuple[float, float]]:
    """A real one, as the trials of a sweep train."""
    config = override(base, settings)
    part = load_cohort(data, config.data).only(EXPRESSION)
    for result in fit(config, part.store, part.train, part.validation, device=torch.device("cpu")):
        yield (result.best_spearman,) * 2


def once(learn: Learn) -> Learn:
    """Trains each settings once: both searches begin with the same random trials, and a training repeats itself."""
    begun: dict[tuple[tuple[str, Any], ...], tuple[list[tuple[float, float]], Iterator[tuple[float, float]]]] = {}

    def remembered(settings: dict[str, Any]) -> Iterator[tuple[float, float]]:
        seen, rest = begun.setdefault(tuple(sorted(settings.items())), ([], learn(settings)))
        yield from seen
        for result in rest:
            seen.append(result)
            yield result

    return remembered


def search(
    sampler: str,
    scheduler: str,
    seed: int,
    base: Config,
    learn: Learn,
    *,
    budget: int,
    target: float = math.inf,
) -> tuple[int, float]:
    """Runs trials one after the other until the budget of epochs is spent or a model reaches the target.

    Returns:
        Epochs that it took, and what the best model is worth.
    """
    sweep = STUDIES["fusion_search"]
    study = optuna.create_study(direction="maximize", pruner=PRUNERS[scheduler](sweep.grace_epochs, EPOCHS))
    study.enqueue_trial(sweep.baseline(base), user_attrs={BASELINE: True})
    spent, best = 0, -math.inf
    while spent < budget:
        study.sampler = make_sampler(sampler, seed, len(study.get_trials(deepcopy=False)))
        trial = study.ask()
        sweep.space(Suggester(trial, base))
        for epoch, (value, worth) in enumerate(learn(trial.params), start=1):
            spent, best = spent + 1, max(best, worth)
            if best >= target:
                return spent, best
            trial.report(value, epoch)
            if epoch < EPOCHS and BASELINE not in trial.user_attrs and trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, value)
    return spent, best


def compare(seed: int, base: Config, learn: Learn, trials: int) -> tuple[int, float]:
    """Epochs that TPE with ASHA needs to reach the best of so many whole random trials, and that best."""
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    budget = trials * EPOCHS
    _, target = search("random", "none", seed, base, learn, budget=budget)
    ours, _ = search("tpe", "asha", seed, base, learn, budget=LONGEST * budget, target=target)
    return ours, target


def bench(rounds: int) -> Found:
    """Epochs of both, for as many seeds as rounds, and both objectives."""
    made_up = [
        compare(seed, paper(), partial(curve, rng=np.random.default_rng(seed)), TRIALS) for seed in range(rounds)
    ]
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(mp_context=get_context("spawn")) as processes:
        data = make_sample(Path(name) / "sample", SAMPLE)
        real = []
        for seed, found in enumerate(processes.map(_on_sample, range(rounds), [data] * rounds)):
            real.append(found)
            print(f"sample dataset, seed {seed}: {found[0]} epochs to {found[1]:.3f}", file=sys.stderr, flush=True)
    return Found([
        _row("synthetic", TRIALS, made_up, "optimum: 0.900"),
        _row("sample dataset", SAMPLE_TRIALS, real, f"validation Spearman of {EXPRESSION}"),
    ])  # fmt: skip


def _on_sample(seed: int, data: Path) -> tuple[int, float]:
    torch.set_num_threads(1)
    settings = {"train.epochs": EPOCHS, "train.seed": seed, "data.validation_fraction": 0.5}
    base = override(tiny(), settings | {"data.repeats": SAMPLE_REPEATS})
    return compare(seed, base, once(partial(train, data=data, base=base)), SAMPLE_TRIALS)


def _row(objective: str, trials: int, found: list[tuple[int, float]], about: str) -> Row:
    return Row(
        f"{objective}: search to the best of {trials} random trials of {EPOCHS} epochs",
        "sweep",
        [float(ours) for ours, _ in found],
        [float(trials * EPOCHS)] * len(found),
        rival_name="random search, no early stopping",
        quantity="epochs",
        notes=[f"rival's best: {', '.join(f'{target:.3f}' for _, target in found)} ({about})"],
    )
