"""Which worker trained which trial, and when: noted in the study while a sweep runs, read for its report."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from optuna.trial import FrozenTrial
from ray.tune import Callback
from ray.tune.experiment import Trial

from .searcher import StudySearcher
from .study import own_trials

STRETCHES = "stretches"
"""User attribute of a trial: ``[worker, start, last heard of]`` of each time that it was placed on a worker; seconds
since 1970."""
NOTED_S = 30.0
"""How much of the end of a stretch a driver's death may cost: each note is a write to a disk."""
GAP_SHARE = 0.05
"""A time without any trial that is longer than this share of the time with trials is cut short to it."""


class Stretch(NamedTuple):
    """A trial's time on one worker, ``host:pid``; seconds since 1970."""

    worker: str
    start: float
    end: float


class Bar(NamedTuple):
    """A stretch in its lane."""

    trial: int
    state: str
    start: float
    end: float


class NoteWorkers(Callback):
    """Notes in the study where each trial runs."""

    def __init__(self, searcher: StudySearcher) -> None:
        self.searcher = searcher
        self._stretches = {
            trial.number: [list(row) for row in trial.user_attrs.get(STRETCHES, ())]
            for trial in own_trials(searcher.study)
        }
        self._placed: dict[int, float] = {}
        self._noted: dict[int, float] = {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial was placed on a worker, for the first time or again."""
        self._placed[trial.config["number"]] = time.time()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """An epoch ended, or all did: now the worker is known."""
        number, now = trial.config["number"], time.time()
        rows = self._stretches.setdefault(number, [])
        placed = self._placed.pop(number, None)
        if placed is not None:
            worker = result.get("worker") or f"{result.get('hostname', '')}:{result.get('pid', '')}"
            rows.append([worker, round(placed, 1), round(now, 1)])
        elif rows:
            rows[-1][2] = round(now, 1)
        if placed is not None or now - self._noted.get(number, 0.0) >= NOTED_S:
            self.searcher.note(trial.trial_id, STRETCHES, rows)
            self._noted[number] = now


def stretches_of(trial: FrozenTrial) -> tuple[Stretch, ...]:
    """A trial's stretches. The last one ends with the trial; of one without notes all of its time counts as one."""
    ended = trial.datetime_complete.timestamp() if trial.datetime_complete else None
    rows = [Stretch(*row) for row in trial.user_attrs.get(STRETCHES, ())]
    if not rows and ended is not None and trial.datetime_start is not None:
        rows = [Stretch("", trial.datetime_start.timestamp(), ended)]
    if rows and ended is not None:
        rows[-1] = rows[-1]._replace(end=max(ended, rows[-1].start))
    return tuple(rows)


def lanes(trials: Sequence[tuple[int, str, Sequence[Stretch]]]) -> dict[str, list[Bar]]:
    """The bars of each worker by its name, e.g. ``node 1, worker 2``: hosts may be called after people.

    A process that took the place of one that ended, as after a resume, goes on in its lane.

    Args:
        trials: number, state and stretches of each.
    """
    nodes: dict[str, list[list[Bar]]] = {}
    process_of: dict[tuple[str, int], str] = {}
    rows = sorted((stretch.start, number, state, stretch) for number, state, found in trials for stretch in found)
    for _, number, state, stretch in rows:
        node = stretch.worker.rpartition(":")[0]
        places = nodes.setdefault(node, [])
        free = [at for at, bars in enumerate(places) if bars[-1].end <= stretch.start + 1.0]
        own = [at for at in free if process_of[node, at] == stretch.worker]
        at = (own or free or [len(places)])[0]
        if at == len(places):
            places.append([])
        places[at].append(Bar(number, state, stretch.start, stretch.end))
        process_of[node, at] = stretch.worker
    return {
        f"node {node}, worker {at}": bars
        for node, places in enumerate(nodes.values(), start=1)
        for at, bars in enumerate(places, start=1)
    }


def without_gaps(spans: Sequence[tuple[float, float]]) -> tuple[Callable[[float], float], list[tuple[float, float]]]:
    """A clock that starts with the first span and passes quickly where there is none for long, as after a Ctrl-C.

    Returns:
        (moment -> seconds on that clock, [(seconds on that clock, seconds left out)] of each cut).
    """
    busy: list[list[float]] = []
    for start, end in sorted(spans):
        if busy and start <= busy[-1][1]:
            busy[-1][1] = max(busy[-1][1], end)
        else:
            busy.append([start, end])
    longest = GAP_SHARE * sum(end - start for start, end in busy)
    cuts: list[tuple[float, float]] = []  # (moment, seconds left out)
    for (_, end), (start, _) in itertools.pairwise(busy):
        if start - end > longest:
            cuts.append((end + longest, start - end - longest))

    def clock(moment: float) -> float:
        passed = moment - busy[0][0]
        for cut, left_out in cuts:
            passed -= min(max(moment - cut, 0.0), left_out)
        return passed

    return clock, [(clock(cut), left_out) for cut, left_out in cuts]
