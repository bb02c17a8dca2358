"""The workers that stand for a sweep's in ``--dry-run``: on the same Ray, each in the place of a trial.

Each trains a few configs of the plan for a short time, beside as many others as Ray will run trials at once, and says
what an epoch took.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qafe import dotted
from qafe.config import Config
from qafe.data.cohort import Cohort, load_cohort
from qafe.data.manifest import Sample
from qafe.footprint import Estimate, training_memory
from qafe.train import EpochResult, fit

from .checkpoints import seal
from .placement import places_here
from .room import process_bytes, room_bytes
from .sweep import trial_device
from .trial import TrialPlan

LEAST_EPOCHS = 2
"""Of each config: the first is the warm-up, which is told apart."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one worker measures.

    Attributes:
        configs_json: configs to train, one after the other until the time is over; the first at any rate.
        seconds: for all of them.
        config_seconds: for each of them.
    """

    plan: TrialPlan
    configs_json: tuple[str, ...]
    seconds: float
    config_seconds: float


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a worker says of where it is.

    Attributes:
        device: ``cuda`` or ``cpu``.
        load: of the machine, processes that want to run.
        step: of the plan's own config, as `qafe.footprint` estimates it.
        process_mb: what that makes of a trial.
        room_mb: what a trial may have.
    """

    device: str
    load: float
    step: Estimate
    process_mb: float
    room_mb: float


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What one config took.

    Attributes:
        number: place of the config in the task.
        epoch_s: training and evaluation of all clips and expressions, after the warm-up.
        warm_up_s: what the first epoch took beyond that.
        start_s: reading the cohort and building the models.
        save_s: writing an epoch's checkpoint.
        peak_memory_mb: on a GPU of this config, on a CPU of the process so far.
        clips_share: share of the clips of an epoch that was trained on.
    """

    number: int
    epoch_s: float
    warm_up_s: float
    start_s: float
    save_s: float
    peak_memory_mb: float
    clips_share: float


class Worker:
    """One of a dry run's workers, as an actor of Ray."""

    def look(self, plan: TrialPlan) -> Machine:
        """What there is; also that the worker has started."""
        config, device = dotted.from_json(plan.base_json), trial_device(plan.gpus)
        step = training_memory(config, device)
        neighbours = min(places_here(plan.cpus, plan.gpus), plan.trials)
        return Machine(
            device=device.type,
            load=os.getloadavg()[0],
            step=step,
            process_mb=process_bytes(step, config, device, len(plan.expressions)) / 2**20,
            room_mb=room_bytes(device, plan.gpus, neighbours) / 2**20,
        )

    def measure(self, task: Task) -> list[Timing]:
        """As `measure`."""
        return measure(task)


def measure(task: Task) -> list[Timing]:
    """Timings of the task's configs, as many as there is time for."""
    torch.set_num_threads(task.plan.threads)
    device = trial_device(task.plan.gpus)
    deadline = time.perf_counter() + task.seconds
    found: list[Timing] = []
    longest = 0.0
    for number, text in enumerate(task.configs_json):
        began = time.perf_counter()
        if found and began + longest > deadline:
            break
        found.append(_time_config(number, dotted.from_json(text), task, device))
        longest = max(longest, time.perf_counter() - began)
    return found


def _time_config(number: int, config: Config, task: Task, device: torch.device) -> Timing:
    started = time.perf_counter()
    cohort = load_cohort(task.plan.data_root, config.data)
    parts = [cohort.only(expression) for expression in task.plan.expressions]
    config = dotted.override(config, {"train.epochs": 10_000, "data.workers": config.data.workers // len(parts)})
    start_s = time.perf_counter() - started
    probe = _epochs(config, parts, 0.0, device, task.config_seconds / 4)
    whole_s = _scaled(probe.results[-1], parts, config)
    share = min(1.0, task.config_seconds / 3 / whole_s)
    run = _epochs(config, parts, share, device, task.config_seconds * 3 / 4)
    paces = [_scaled(result, parts, config) for result in run.results]
    epoch_s = sum(paces[1:]) / len(paces[1:])
    return Timing(
        number=number,
        epoch_s=epoch_s,
        warm_up_s=max(0.0, probe.results[0].seconds - probe.results[-1].seconds) * len(parts),
        start_s=start_s + run.start_s * len(parts),
        save_s=run.save_s * len(parts),
        peak_memory_mb=max(result.peak_memory_mb for result in run.results),
        clips_share=share,
    )


@dataclass(frozen=True)
class _Epochs:
    results: list[EpochResult]
    start_s: float
    save_s: float


def _epochs(config: Config, parts: Sequence[Cohort], share: float, device: torch.device, seconds: float) -> _Epochs:
    """Epochs on a share of the first expression's clips, each with its checkpoint, until the time is over."""
    part = _part(config, parts, share)
    if share < 1:
        config = dotted.override(config, {"data.repeats": 1})
    started = time.perf_counter()
    run = fit(config, part.store, part.train, part.validation, device=device)
    start_s, save_s = time.perf_counter() - started, 0.0
    results: list[EpochResult] = []
    while len(results) < LEAST_EPOCHS or time.perf_counter() - started < seconds:
        results.append(next(run))
        before = time.perf_counter()
        with tempfile.TemporaryDirectory() as name:
            results[-1].save(Path(name), synced=False)
            seal(Path(name), results[-1].epoch)
        save_s += time.perf_counter() - before
    run.close()  # type: ignore[attr-defined]
    return _Epochs(results, start_s, save_s / len(results))


def _part(config: Config, parts: Sequence[Cohort], share: float) -> Cohort:
    """The first expression with a share of its samples, at least two batches."""
    part = parts[0]
    if share >= 1:
        return part
    batch = config.train.batch_size
    train = _whole_batches(part.train, share, batch, least=2 * batch)
    validation = _whole_batches(part.validation, share, batch, least=max(3, batch))
    return dataclasses.replace(part, train=train, validation=validation)


def _whole_batches(samples: Sequence[Sample], share: float, batch: int, least: int) -> tuple[Sample, ...]:
    return tuple(samples[: max(least, math.ceil(share * len(samples) / batch) * batch)])


def _scaled(result: EpochResult, parts: Sequence[Cohort], config: Config) -> float:
    """Seconds of a whole epoch of all expressions, from an epoch on some of the clips: a clip costs what it costs."""
    clips = config.data.repeats * sum(len(part.train) for part in parts)
    evaluated = sum(len(part.validation) for part in parts)
    return clips / result.clips_per_s + result.evaluation_s / len(result.predictions) * evaluated
