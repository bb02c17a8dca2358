"""How far a sweep is: counts, the best so far, what it has cost, and how long it may take yet.

Everything is read from the Optuna study, by the driver and by ``python -m sweeps.status`` alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from .study import epochs_of

SECONDS = "seconds"
"""User attribute of a trial: how long its epochs took on workers, those of all drivers and repeated ones included."""
PACE = "pace"
"""User attribute of the study: the `Pace` that its driver measured last."""
STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast a driver gets on.

    Attributes:
        workers: trials at work at a time, on average.
        epoch_s: seconds that one of them takes for an epoch, with all that it waits for.
    """

    workers: float
    epoch_s: float

    @classmethod
    def of(cls, study: optuna.Study) -> Pace | None:
        """What a driver has noted in the study."""
        found = study.user_attrs.get(PACE)
        return cls(**found) if found else None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A sweep at one moment.

    Attributes:
        counts: trials that are finished, pruned, failed and running.
        best: number and validation Spearman of the best finished trial, or of the best one so far.
        seconds: of training on workers.
        left_s: seconds until all planned trials have ended; None while nothing is known to reckon with.
    """

    planned: int
    counts: Mapping[str, int]
    best: tuple[int, float] | None
    seconds: float
    left_s: float | None

    @property
    def ended(self) -> int:
        """Trials that have ended, however."""
        return sum(count for state, count in self.counts.items() if state != "running")


def progress_of(trials: Sequence[FrozenTrial], *, planned: int, epochs: int, pace: Pace | None) -> Progress:
    """Sums trials up.

    Args:
        trials: those that the sweep has begun (`study.own_trials`).
        planned: how many there will be.
        epochs: of a whole trial.
        pace: of the sweep's driver.
    """
    states = Counter(STATES[trial.state] for trial in trials)
    return Progress(
        planned=planned,
        counts={state: states[state] for state in ("finished", "pruned", "failed", "running")},
        best=_best(trials),
        seconds=sum(trial.user_attrs.get(SECONDS, 0.0) for trial in trials),
        left_s=time_left_s(trials, planned=planned, epochs=epochs, pace=pace),
    )


def score_of(trial: FrozenTrial) -> float | None:
    """A trial's best validation Spearman so far."""
    if trial.state == TrialState.COMPLETE and trial.values:
        return float(trial.values[0])
    seen = [value for value in trial.intermediate_values.values() if not math.isnan(value)]
    return max(seen, default=None)


def _best(trials: Sequence[FrozenTrial]) -> tuple[int, float] | None:
    """Of the finished trials, for they alone can be registered; of all while none has finished."""
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    scored = [(score, -trial.number) for trial in finished or trials if (score := score_of(trial)) is not None]
    if not scored:
        return None
    score, number = max(scored)
    return -number, score


def time_left_s(trials: Sequence[FrozenTrial], *, planned: int, epochs: int, pace: Pace | None) -> float | None:
    """Seconds until the last planned trial ends; None before the first has ended, or while the pace is not known.

    How many epochs a trial goes on for is estimated from all trials, with those that still run as censored
    (Kaplan-Meier), so that early stopping counts and a long trial that has not ended yet does, too. The work that is
    left is then shared among the trials that run at a time; the longest of them sets the least that it can take.
    """
    ended = [trial for trial in trials if trial.state.is_finished()]
    if pace is None or not ended or pace.workers <= 0:
        return None
    stopped = Counter(min(epochs_of(t), epochs) for t in ended if t.state != TrialState.COMPLETE)
    running = [min(epochs_of(trial), epochs) for trial in trials if not trial.state.is_finished()]
    censored = Counter(running)
    reached = [1.0]  # [k]: the share of trials that gets through k epochs
    at_risk = len(trials)
    for epoch in range(epochs):
        at_risk -= censored[epoch]
        reached.append(reached[-1] * (1 - stopped[epoch] / at_risk) if at_risk else reached[-1])
        at_risk -= stopped[epoch]
    to_come = [0.0] * (epochs + 1)  # [k]: epochs that a trial of k epochs still has before it
    for epoch in range(epochs - 1, -1, -1):
        share = reached[epoch + 1] / reached[epoch] if reached[epoch] else 0.0
        to_come[epoch] = share * (1 + to_come[epoch + 1])
    rest = [to_come[epoch] for epoch in running] + [to_come[0]] * max(planned - len(trials), 0)
    return max(sum(rest) / pace.workers, max(rest, default=0.0)) * pace.epoch_s


def changed_settings(settings: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    """The settings that differ from the baseline's, with short names, in one line."""
    changed = []
    for name, value in settings.items():
        if baseline.get(name) != value:
            text = f"{value:.3g}" if isinstance(value, float) else str(value)
            changed.append(f"{name.rpartition('.')[2]}={text}")
    return " ".join(changed)


def duration(seconds: float) -> str:
    """A length of time for people, e.g. ``40 s``, ``12 min``, ``3 h 20 min``, ``2 d 4 h``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
