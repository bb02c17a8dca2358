"""What a sweep costs beside its training: real sweeps of the sample dataset through the command line.

`long` trials of about a minute show the share of wall time that is not training; many short ones show what a trial
costs by itself, and whether the driver grows with their number.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qafe.data.sample import SampleConfig, make_sample
from sweeps.plan import Plan
from sweeps.progress import SECONDS
from sweeps.study import open_study, own_trials

from .rounds import Found, Row

WORKERS = 2
LONG_TRIALS, LONG_TRIAL_S = 4, 60
SHORT_TRIALS = 200
QUICK = {
    "model.segments": 2,
    "model.segment_frames": 4,
    "train.batch_size": 4,
    "train.warmup_epochs": 0,
    "data.repeats": 1,
}


class _Sweep:
    """One sweep and what was seen of it."""

    def __init__(self, folder: Path, data: Path, trials: int, epochs: int) -> None:
        self.folder, self.trials = folder, trials
        folder.mkdir()
        line = [sys.executable, "-m", "sweeps.run", "fusion_search", "--storage", str(folder), "--name", "s"]
        line += ["--data-root", str(data), "--trials", str(trials), "--scheduler", "none", "--sampler", "random"]
        line += ["--json", str(folder / "summary.json")]
        for name, value in (QUICK | {"train.epochs": epochs}).items():
            line += ["--set", f"{name}={value}"]
        environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:////{str(folder / 'mlflow.db').lstrip('/')}"}
        self.memory_mb: list[tuple[float, float]] = []
        with open(folder / "log", "wb") as log:
            started = time.monotonic()
            process = subprocess.Popen(line, stdout=log, stderr=log, env=environment)
            while process.poll() is None:
                try:
                    held = psutil.Process(process.pid).memory_info().rss / 2**20
                except psutil.Error:
                    break
                self.memory_mb.append((time.monotonic() - started, held))
                time.sleep(1)
        if process.wait():
            raise RuntimeError((folder / "log").read_text()[-2000:])
        self.wall_s = float(json.loads((folder / "summary.json").read_text())["seconds"])
        study = open_study(Plan.load(folder / "s"))
        ended = own_trials(study)
        self.seconds = [float(trial.user_attrs[SECONDS]) for trial in ended]
        self.ended = sorted(trial.datetime_complete.timestamp() for trial in ended if trial.datetime_complete)


def bench(short_trials: int = SHORT_TRIALS, long_trials: int = LONG_TRIALS, figure: Path | None = None) -> Found:
    """Wall time of sweeps against the training in them; and the driver's memory over many trials."""
    with tempfile.TemporaryDirectory() as name:
        data = make_sample(Path(name) / "data", SampleConfig(train_patients=8, test_patients=2, clips=2))
        one = _Sweep(Path(name) / "probe", data, 2, 12)
        epochs = max(1, round(LONG_TRIAL_S / (statistics.mean(one.seconds) / 12)))
        long = _Sweep(Path(name) / "long", data, long_trials, epochs)
        short = _Sweep(Path(name) / "short", data, short_trials, 1)
    trained = sum(long.seconds) / WORKERS
    rows = [
        Row(
            f"sweep of {long_trials} trials of {statistics.mean(long.seconds):.0f} s, {WORKERS} workers",
            "sweep",
            [long.wall_s],
            [trained],
            rival_name="its training alone",
            notes=[f"wall over training: {long.wall_s / trained:.3f}, start and report included"],
        )
    ]
    each = [(b - a) * WORKERS for a, b in zip(short.ended, short.ended[1:], strict=False)]
    fixed = [seconds - statistics.mean(short.seconds) for seconds in each]
    third = len(each) // 3
    memory = [held for _, held in short.memory_mb]
    begun = len(memory) // 10
    rows.append(
        Row(
            f"{short_trials} trials of {statistics.mean(short.seconds):.1f} s",
            "trial",
            [statistics.mean(each)],
            [statistics.mean(short.seconds)],
            rival_name="its training alone",
            notes=[
                f"beside its training a trial takes {statistics.mean(fixed[:third]):.2f} s in the first third of the "
                f"sweep, {statistics.mean(fixed[-third:]):.2f} s in the last",
                f"driver's memory: {memory[begun]:.0f} MB after a tenth, {memory[-begun - 1]:.0f} MB before the report",
            ],
        )
    )
    if figure is not None:
        _draw(short, each, figure)
    return Found(rows)


def _draw(sweep: _Sweep, each: list[float], file: Path) -> None:
    picture = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = picture.subplots(1, 2)
    left.plot(*zip(*sweep.memory_mb, strict=True))
    left.set(xlabel="seconds", ylabel="driver's memory (MB)", ylim=(0, None))
    right.plot(range(2, len(each) + 2), each, ".")
    right.set(xlabel="trial", ylabel=f"seconds a trial ({WORKERS} workers)", ylim=(0, None))
    FigureCanvasAgg(picture)
    picture.savefig(file)
