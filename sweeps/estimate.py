"""What a sweep would cost, before it starts: ``--dry-run`` trains for a minute and simulates the rest.

Assumptions, all stated in its output: trials cost what the measured draws of the space cost on average (a sampler may
come to prefer dearer ones); early stopping sees learning curves whose ranks persist from rung to rung, in an order
that says nothing beforehand; the machine is as busy during the sweep as it was during the calibration.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import ray
from optuna.pruners import BasePruner
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from rich import box
from rich.console import Console
from rich.table import Table

from qafe import console, dotted
from qafe.config import Config
from qafe.data.cohort import load_cohort
from qafe.errors import QafeError

from .calibration import Machine, Task, Timing, Worker
from .cluster import joined
from .placement import reserved
from .plan import Plan
from .study import PRUNERS
from .sweep import Suggester, Sweep
from .trial import TrialPlan

CALIBRATION_S = 60.0
CONFIG_S = 10.0
DRAWS = 200
"""Sweeps that are simulated; fewer where one asks the pruner so often that it would take long."""
PRUNER_CALLS = 30_000
STARTUP_S = 43.0
"""Until a worker trains (planning, a new MLflow store, Ray and the worker: 33 s), and at the end the test of the best
trial and the report (10 s), by ``python -m tests.bench sweeps`` on an idle machine of two cores; times the
calibration's own start over its idle one, below."""
IDLE_START_S = 4.0
TRIAL_START_S = 0.4
"""Ray's part of starting a trial on a worker that is there."""
TRIAL_REPORT_S = 0.05
"""Ray's and the study's part of an epoch."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Mean over simulated sweeps; hours are in the unit of ``plan.cost_unit``, low and high the middle 80 %."""

    hours: float
    low_hours: float
    high_hours: float
    wall_s: float
    epochs: float
    """Of all trials together."""


def dry_run(plan: Plan, sweep: Sweep, *, address: str | None = None, json_file: Path | None = None) -> int:
    """Prints what a planned sweep searches and would cost, and writes nothing but the ``--json`` file.

    Args:
        address: of a Ray cluster.
        json_file: where the summary is written, too.

    Raises:
        ConfigError: the cluster does not answer, or has no room for a trial.
        QafeError: a calibrating worker failed.
    """
    with joined(address):
        calibration = calibrate(plan, sweep)
    found = summary(plan, sweep, calibration)
    print_summary(found)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = json_file.with_name(json_file.name + ".unfinished")
        unfinished.write_text(json.dumps(found, indent=2) + "\n")
        unfinished.replace(json_file)
    return 0


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        timings: the baseline's first.
        machines: of each worker; as many as there were places for trials.
        start_s: until all workers had started.
    """

    timings: list[Timing]
    machines: list[Machine]
    start_s: float


def draw_configs(plan: Plan, sweep: Sweep, count: int) -> list[Config]:
    """The baseline, and random draws of the space."""
    base = dotted.from_json(plan.config_json)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=plan.seed))
    drawn = [base]
    while len(drawn) < count:
        trial = study.ask()
        sweep.space(Suggester(trial, base, frozenset(plan.pinned)))
        drawn.append(dotted.override(base, trial.params))
    return drawn


def calibrate(
    plan: Plan, sweep: Sweep, seconds: float = CALIBRATION_S, config_seconds: float = CONFIG_S
) -> Calibration:
    """Trains draws of the space on the connected Ray, on as many places as it has for the sweep's trials now.

    Raises:
        ConfigError: it has none.
        QafeError: a worker failed.
    """
    with reserved(plan) as places:
        started = time.monotonic()
        workers = [_worker(plan, place) for place in places]
        shared = TrialPlan.of(plan)
        machines: list[Machine] = _answers([worker.look.remote(shared) for worker in workers])
        start_s = time.monotonic() - started
        drawn = draw_configs(plan, sweep, len(workers) * max(1, int(2 * seconds / config_seconds)))
        with console.progress(f"calibrating: {len(workers)} trials side by side for about {seconds:.0f} s"):
            found: list[list[Timing]] = _answers(
                [
                    worker.measure.remote(
                        Task(
                            plan=shared,
                            configs_json=tuple(dotted.to_json(config) for config in drawn[number :: len(workers)]),
                            seconds=seconds,
                            config_seconds=config_seconds,
                        )
                    )
                    for number, worker in enumerate(workers)
                ]
            )
    return Calibration([timing for timings in found for timing in timings], machines, start_s)


def _worker(plan: Plan, place: PlacementGroup) -> Any:
    options = {"num_cpus": plan.cpus_per_trial, "num_gpus": plan.gpus_per_trial}
    return ray.remote(Worker).options(**options, scheduling_strategy=PlacementGroupSchedulingStrategy(place)).remote()


def _answers(calls: list[Any]) -> Any:
    try:
        return ray.get(calls)
    except RayTaskError as err:
        if isinstance(err.cause, QafeError):
            raise err.cause from err
        said = f"{type(err.cause).__name__}: {err.cause}"
        raise QafeError(f"the calibration must train a few epochs, it ended with {said}. See --debug.") from err
    except RayError as err:
        raise QafeError(
            f"the calibration must train a few epochs, Ray lost one of its workers ({type(err).__name__}), as when "
            "memory runs out. Name a smaller preset, or more CPUs for each trial."
        ) from err


def summary(plan: Plan, sweep: Sweep, calibration: Calibration) -> dict[str, Any]:
    """The dry run as one JSON object."""
    config, timings, machines = dotted.from_json(plan.config_json), calibration.timings, calibration.machines
    workers, first = len(machines), machines[0]
    fixed_s = STARTUP_S * max(1.0, calibration.start_s / IDLE_START_S)
    with_stopping = simulate(plan, config, timings, workers, fixed_s, PRUNERS[plan.scheduler])
    without = simulate(plan, config, timings, workers, fixed_s, PRUNERS["none"])
    cohort = load_cohort(plan.data_root, config.data)
    epochs = [timing.epoch_s for timing in timings]
    return {
        "study": plan.study,
        "preset": config.preset,
        "expressions": list(plan.expressions),
        "clips": cohort.clip_counts(plan.expressions),
        "space": describe_space(sweep, config, frozenset(plan.pinned)),
        "baseline": sweep.baseline(config, frozenset(plan.pinned)),
        "resources": {
            "trials": plan.trials,
            "epochs": config.train.epochs,
            "cpus_per_trial": plan.cpus_per_trial,
            "gpus_per_trial": plan.gpus_per_trial,
            "side_by_side": workers,
            "device": first.device,
        },
        "epoch_s": {
            "baseline": epochs[0],
            "mean": float(np.mean(epochs)),
            "low": min(epochs),
            "high": max(epochs),
            "configs": len(epochs),
        },
        "memory": {
            "measured_mb": max(timing.peak_memory_mb for timing in timings),
            "estimated_mb": first.process_mb,
            "estimated_step_mb": {
                name: value / 2**20
                for name, value in (dataclasses.asdict(first.step) | {"total": first.step.total}).items()
            },
            "room_mb": min(machine.room_mb for machine in machines),
        },
        "unit": plan.cost_unit,
        "with_early_stopping": dataclasses.asdict(with_stopping),
        "without_early_stopping": dataclasses.asdict(without),
        "scheduler": plan.scheduler if len(plan.objectives) == 1 else "none",
        "budget_hours": plan.budget_hours,
        "process_start_s": calibration.start_s,
        "load": max(machine.load for machine in machines),
    }


def simulate(
    plan: Plan,
    config: Config,
    timings: Sequence[Timing],
    workers: int,
    fixed_s: float,
    pruner: Callable[[int, int], BasePruner],
) -> Cost:
    """The expected cost of a sweep under a pruner of `PRUNERS`: means over random sweeps.

    A trial takes the time of a random draw that was measured (the first: of the baseline), and all its epochs have
    one random rank among the trials.
    """
    epochs = config.train.epochs
    draws = max(20, min(DRAWS, PRUNER_CALLS // (plan.trials * epochs)))
    rng = random.Random(plan.seed)
    sweeps: list[tuple[float, float, int]] = []
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        for _ in range(draws):
            stops = pruner(min(plan.grace_epochs, epochs), epochs)
            sweeps.append(_simulate_once(plan.trials, epochs, timings, workers, stops, rng))
    finally:
        optuna.logging.set_verbosity(verbosity)
    training_s, wall_s, counts = np.array(sweeps).T
    hours = training_s * plan.device_share / 3600
    return Cost(
        hours=float(hours.mean()),
        low_hours=float(np.quantile(hours, 0.1)),
        high_hours=float(np.quantile(hours, 0.9)),
        wall_s=fixed_s + float(np.mean(wall_s)),
        epochs=float(np.mean(counts)),
    )


def _simulate_once(
    trials: int, epochs: int, timings: Sequence[Timing], workers: int, pruner: BasePruner, rng: random.Random
) -> tuple[float, float, int]:
    """Training seconds, seconds on the clock and epochs of one random sweep: each worker takes trial after trial."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), pruner=pruner)
    prunes = not isinstance(pruner, optuna.pruners.NopPruner)
    free = [(0.0, place) for place in range(workers)]
    heapq.heapify(free)
    running: dict[int, tuple[optuna.Trial, Timing, float, int]] = {}
    begun, training_s, end_s, count = 0, 0.0, 0.0, 0
    while free:
        now, place = heapq.heappop(free)
        if place not in running:
            if begun == trials:
                continue
            timing = timings[0] if begun == 0 else rng.choice(timings[1:] or timings)
            running[place] = (study.ask(), timing, rng.random(), 0)
            begun += 1
            heapq.heappush(free, (now + TRIAL_START_S + timing.start_s, place))
            continue
        trial, timing, rank, epoch = running[place]
        epoch += 1
        took_s = timing.epoch_s + (timing.warm_up_s if epoch == 1 else 0.0)
        training_s, count = training_s + took_s, count + 1
        now += took_s + timing.save_s + TRIAL_REPORT_S
        if prunes:
            trial.report(rank, epoch)
        if epoch == epochs:
            study.tell(trial, rank)
        elif prunes and trial.number > 0 and trial.should_prune():
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            running[place] = (trial, timing, rank, epoch)
            heapq.heappush(free, (now, place))
            continue
        del running[place]
        end_s = max(end_s, now)
        heapq.heappush(free, (now, place))
    return training_s, end_s, count


class _Recorder(Suggester):
    """Notes what a space asks for."""

    def __init__(self, trial: optuna.Trial, base: Config, pinned: frozenset[str], found: dict[str, str]) -> None:
        super().__init__(trial, base, pinned)
        self.found = found

    def _note(self, name: str, text: str) -> None:
        if name not in self._fixed:
            self.found[name] = text

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self._note(name, ", ".join(map(str, choices)))
        return super().suggest_categorical(name, choices)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        self._note(name, f"{low} to {high}")
        return super().suggest_int(name, low, high)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        self._note(name, f"{low:g} to {high:g}" + (", logarithmic" if log else ""))
        return super().suggest_float(name, low, high, log=log)


def describe_space(sweep: Sweep, base: Config, pinned: frozenset[str]) -> dict[str, str]:
    """Range or choices of every setting that is searched, on any branch (probed with random draws)."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found: dict[str, str] = {}
    for _ in range(200):
        sweep.space(_Recorder(study.ask(), base, pinned, found))
    return found


def print_summary(found: dict[str, Any]) -> None:
    """The dry run for people, on stdout."""
    stdout = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140)
    space = Table(title=f"space of {found['study']}", box=box.SIMPLE)
    for name in ("setting", "range or choices", "baseline"):
        space.add_column(name, overflow="fold", no_wrap=name == "setting")
    for name, text in found["space"].items():
        space.add_row(name, text, f"{found['baseline'][name]}")
    stdout.print(space)
    rows, memory, epoch = found["resources"], found["memory"], found["epoch_s"]
    table = Table(title="cost of the sweep", box=box.SIMPLE, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("sweep", f"{rows['trials']} trials of up to {rows['epochs']} epochs, {found['preset']} preset, "
                  f"{', '.join(found['expressions'])} "
                  f"({', '.join(f'{count} {part}' for part, count in found['clips'].items())} clips)")  # fmt: skip
    gpus = f" and {rows['gpus_per_trial']:g} GPU" if rows["gpus_per_trial"] else ""
    table.add_row("resources per trial", f"{rows['cpus_per_trial']:g} CPU{gpus}; {rows['side_by_side']} side by side")
    table.add_row(
        "seconds per epoch",
        f"{epoch['baseline']:.2f} the baseline; {epoch['low']:.2f} to {epoch['high']:.2f}, mean {epoch['mean']:.2f}, "
        f"over {epoch['configs']} measured configs",
    )
    table.add_row(
        "peak memory",
        f"{memory['measured_mb']:.0f} MB measured; {memory['estimated_mb']:.0f} MB estimated for the baseline; "
        f"a trial may have {memory['room_mb']:.0f} MB",
    )
    for key, title in (("with_early_stopping", f"with {found['scheduler']}"), ("without_early_stopping", "without")):
        cost = found[key]
        table.add_row(
            f"expected, {title}" + (" early stopping" if key.startswith("without") else ""),
            f"{cost['hours']:.3g} {found['unit']} ({cost['low_hours']:.3g} to {cost['high_hours']:.3g}), "
            f"{_duration(cost['wall_s'])} in all, {cost['epochs']:.0f} epochs",
        )
    if found["budget_hours"] is not None:
        over = found["with_early_stopping"]["hours"] > found["budget_hours"]
        table.add_row("budget", f"{found['budget_hours']:g} {found['unit']}: {'ends it early' if over else 'enough'}")
    stdout.print(table)
    stdout.print(
        "Assumed: ranks of trials persist from rung to rung; trials cost what random draws cost; the machine is as "
        f"busy as now (load {found['load']:.1f}). Nothing was written or tracked.",
        highlight=False,
        soft_wrap=True,
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
