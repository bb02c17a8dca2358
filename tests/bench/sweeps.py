"""What a sweep costs beside its training: real sweeps through the command line, against the same trainings without it.

Trials of about a minute show the share of wall time that is not training; many short ones show what a trial costs by
itself, and whether the driver grows with their number.

"Training alone" is `qafe.train.fit` on as many processes side by side as the sweep has workers, one thread each, with
no Ray, Optuna, MLflow or checkpoint: trainings share caches and memory, and that is not the sweep's doing.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qafe.config import Config, tiny
from qafe.data.cohort import load_cohort
from qafe.data.sample import SampleConfig, make_sample
from qafe.dotted import override
from qafe.train import fit
from sweeps.draft import sample_root
from sweeps.plan import Plan
from sweeps.progress import SECONDS
from sweeps.study import open_study, own_trials

from .rounds import Found, Row

LONG_TRIAL_S = 60
EXPRESSION = "smile"
LONG = {"data.repeats": 8}
"""Epochs of seconds: those of the paper's settings take minutes, and those of ``tiny`` a third of a second."""
STUDY = """from sweeps.sweep import Grid, Sweep

SWEEP = Sweep(name="seeds", about="one configuration", space=Grid({{"train.seed": tuple(range({trials}))}}))
"""
QUICK = {
    "model.segments": 2,
    "model.segment_frames": 4,
    "train.batch_size": 4,
    "train.epochs": 1,
    "train.warmup_epochs": 0,
    "data.repeats": 1,
}


class _Sweep:
    """One sweep and what was seen of it.

    Attributes:
        wall_s: the whole command.
        trials_s: from the first trial on a worker to the end of the last trial.
        report_s: from there to the end of the command.
        cpu_s: of all processes of the command, Ray's included.
        seconds: of training, as each trial counted it.
        ended: when the trials ended, in order (time.time).
    """

    def __init__(self, folder: Path, data: Path, study: str, *flags: str, workers: int) -> None:
        folder.mkdir()
        line = [sys.executable, "-m", "sweeps.run", study, "--storage", str(folder), "--name", "s", *flags]
        line += ["--data-root", str(data), "--expression", EXPRESSION]
        environment = os.environ | {
            "MLFLOW_TRACKING_URI": f"sqlite:////{str(folder / 'mlflow.db').lstrip('/')}",
            "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": workers}),
        }
        self.memory_mb: list[tuple[float, float]] = []
        used: dict[int, float] = {}
        with open(folder / "log", "wb") as log:
            started = time.time()
            process = subprocess.Popen(line, stdout=log, stderr=log, env=environment)
            while process.poll() is None:
                try:
                    [driver] = psutil.Process(process.pid).children()
                    self.memory_mb.append((time.time() - started, driver.memory_info().rss / 2**20))
                    for each in (driver, *driver.children(recursive=True)):
                        with contextlib.suppress(psutil.Error):
                            used[each.pid] = sum(each.cpu_times()[:2])
                except (psutil.Error, ValueError):  # it has not begun, or has ended
                    pass
                time.sleep(1)
        if process.wait():
            raise RuntimeError((folder / "log").read_text()[-2000:])
        over = time.time()
        entries = [json.loads(entry) for entry in (folder / "s" / "tracking.jsonl").read_text().splitlines()]
        begun = min(entry["time"] for entry in entries if entry["kind"] == "trial") / 1000
        self.ended = sorted(entry["time"] / 1000 for entry in entries if entry["kind"] == "trial_end")
        self.cpu_s = sum(used.values())
        self.wall_s, self.start_s = over - started, begun - started
        self.trials_s, self.report_s = self.ended[-1] - begun, over - self.ended[-1]
        self.seconds = [float(trial.user_attrs[SECONDS]) for trial in own_trials(open_study(Plan.load(folder / "s")))]


def bench(short_trials: int, long_trials: int, workers: int, figure: Path | None = None) -> Found:
    """Wall time of sweeps against the training in them; and the driver's memory over many trials.

    Args:
        short_trials, long_trials: how many; 0 leaves that part out.
        workers: trials side by side, of one thread each. Where there are as many as cores, the driver, Ray and MLflow
            take their time from the trials.
    """
    found = Found([])
    with tempfile.TemporaryDirectory() as name:
        if long_trials:
            found.rows.append(_long(Path(name), long_trials, workers))
        else:
            found.left_out.append("trials of a minute (--long-trials)")
        if short_trials:
            found.rows.append(_short(Path(name), short_trials, workers, figure))
        else:
            found.left_out.append("short trials (--trials)")
    return found


def _long(folder: Path, trials: int, workers: int) -> Row:
    """Trials that differ in their seeds alone, so that all take as long; alone before and after the sweep."""
    data = sample_root()
    with ProcessPoolExecutor(workers, get_context("spawn")) as alone:
        _alone(alone, [override(tiny(), LONG | {"train.epochs": 1})] * workers, data)  # starts them
        probe = _alone(alone, [override(tiny(), LONG | {"train.epochs": 3})] * workers, data)
        three = statistics.mean(wall for wall, _ in probe)
        settings = LONG | {"train.epochs": max(3, round(3 * LONG_TRIAL_S / three))}
        config = override(tiny(), settings)
        found = _alone(alone, [config] * workers, data)
        study = folder / "seeds.py"
        study.write_text(STUDY.format(trials=trials))
        sweep = _Sweep(
            folder / "long",
            data,
            str(study),
            *("--preset", "tiny"),
            *(flag for name, value in settings.items() for flag in ("--set", f"{name}={value}")),
            workers=workers,
        )
        found += _alone(alone, [config] * workers, data)
    each, cpu = [wall for wall, _ in found], statistics.mean(cpu for _, cpu in found)
    trained, counted = statistics.mean(each) * trials / workers, sum(sweep.seconds) / workers
    return Row(
        f"sweep of {trials} trials of {statistics.mean(each):.0f} s ({config.train.epochs} epochs), workers: {workers}",
        "sweep",
        [sweep.wall_s],
        [trained],
        rival_name="its training alone",
        notes=[
            f"wall over training alone: {sweep.wall_s / trained:.3f} of the whole command, "
            f"{sweep.trials_s / trained:.3f} from the first trial's start to the last trial's end",
            f"wall over the training in the trials: {sweep.wall_s / counted:.3f}, {sweep.trials_s / counted:.3f}",
            f"once a sweep: {sweep.start_s:.1f} s until a worker trains, {sweep.report_s:.1f} s for test and report",
            f"beside its training a trial takes {(sweep.trials_s - trained) * workers / trials:.2f} s, its "
            f"{config.train.epochs} checkpoints included",
            f"CPU time: {sweep.cpu_s:.0f} s of the whole command, {cpu * trials:.0f} s of the trainings alone",
            f"training alone: {min(each):.1f} to {max(each):.1f} s a trial, before and after the sweep",
        ],
    )


def _alone(pool: ProcessPoolExecutor, settings: Sequence[Config], data: Path) -> list[tuple[float, float]]:
    """Seconds of each of these trainings, side by side: on the clock, and of the processor."""
    return list(pool.map(_train, settings, [data] * len(settings)))


def _train(config: Config, data: Path) -> tuple[float, float]:
    torch.set_num_threads(1)
    started, cpu = time.perf_counter(), time.process_time()
    part = load_cohort(data, config.data).only(EXPRESSION)
    for _ in fit(config, part.store, part.train, part.validation, device=torch.device("cpu")):
        pass
    return time.perf_counter() - started, time.process_time() - cpu


def _short(folder: Path, trials: int, workers: int, figure: Path | None) -> Row:
    data = make_sample(folder / "data", SampleConfig(train_patients=8, test_patients=2, clips=2))
    settings = [flag for name, value in QUICK.items() for flag in ("--set", f"{name}={value}")]
    sweep = _Sweep(
        folder / "short",
        data,
        "fusion_search",
        *("--trials", str(trials), "--preset", "tiny", "--scheduler", "none", "--sampler", "random", *settings),
        workers=workers,
    )
    each = [(b - a) * workers for a, b in zip(sweep.ended, sweep.ended[1:], strict=False)]
    fixed = [seconds - statistics.mean(sweep.seconds) for seconds in each]
    third = len(each) // 3
    trained_mb = [held for at, held in sweep.memory_mb if sweep.start_s < at < sweep.start_s + sweep.trials_s]
    begun = len(trained_mb) // 10
    if figure is not None:
        _draw(sweep, each, workers, figure)
    return Row(
        f"{trials} trials of {statistics.mean(sweep.seconds):.1f} s",
        "trial",
        [statistics.mean(each)],
        [statistics.mean(sweep.seconds)],
        rival_name="its training in the sweep",
        notes=[
            f"beside its training a trial takes {statistics.mean(fixed[:third]):.2f} s in the first third of the "
            f"sweep, {statistics.mean(fixed[-third:]):.2f} s in the last",
            f"driver's memory: {trained_mb[begun]:.0f} MB after a tenth of the trials, {trained_mb[-1]:.0f} MB at "
            "their end",
        ],
    )


def _draw(sweep: _Sweep, each: list[float], workers: int, file: Path) -> None:
    picture = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = picture.subplots(1, 2)
    left.plot(*zip(*sweep.memory_mb, strict=True))
    for at in (sweep.start_s, sweep.start_s + sweep.trials_s):
        left.axvline(at, color="grey", linestyle=":")
    left.set(xlabel="seconds (between the lines: trials)", ylabel="driver's memory (MB)", ylim=(0, None))
    right.plot(range(2, len(each) + 2), each, ".")
    right.set(xlabel="trial", ylabel=f"seconds a trial ({workers} workers)", ylim=(0, None))
    FigureCanvasAgg(picture)
    picture.savefig(file)
