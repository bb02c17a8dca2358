"""Stopping, pausing and going on, from another terminal."""

import fcntl
import importlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from qafe import dotted
from qafe.data.cohort import load_cohort
from qafe.train import fit
from sweeps import driver, pause, stop
from sweeps.callbacks import StopWhenAsked
from sweeps.control import PAUSE, STOP, Control
from sweeps.folder import LOCK_FILE
from sweeps.interruption import INTERRUPTION
from sweeps.plan import Plan
from sweeps.results import OBJECTIVE
from sweeps.searcher import Pause, StudyScheduler, StudySearcher
from sweeps.storage import Storage
from sweeps.studies import STUDIES
from sweeps.study import own_trials, read_study
from tests.sweeps.test_status import half_done, make_sweep, result
from tests.sweeps.test_sweep import Sweep, workers_of

go_on = importlib.import_module("sweeps.continue")  # a keyword
Command = Callable[[list[str]], int]


@pytest.fixture
def driven(tmp_path: Path) -> Iterator[Control]:
    """A sweep that has a driver."""
    half_done(tmp_path)
    with open(tmp_path / "s-1" / LOCK_FILE, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Control(tmp_path / "s-1")


def fresh(control: Control) -> Control:
    """The wishes as somebody sees them who has not looked before."""
    return Control(control.folder.parent)


def test_commands_leave_wishes(driven: Control, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["s-1", "--storage", str(driven.folder.parents[1])]
    assert pause.main(place) == 0
    assert fresh(driven).paused
    assert f"python -m sweeps.continue s-1 --storage {place[2]}" in capsys.readouterr().err
    assert go_on.main(place) == 0
    assert not fresh(driven).paused
    assert stop.main([*place, "--trial", "3"]) == 0
    assert fresh(driven).trial_stopped(3)
    assert not fresh(driven).stopped
    assert stop.main(place) == 0
    assert fresh(driven).stopped
    assert "--resume --name s-1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "line", "words"),
    [
        (stop.main, ["s-2"], "Did you mean s-1?"),
        (pause.main, ["other-7"], "there is no sweep 'other-7'"),
        (stop.main, ["idle"], "only a running sweep can be steered, idle is interrupted"),
        (go_on.main, ["idle"], "python -m sweeps.run fusion_search --resume --name idle"),
        (go_on.main, ["s-1"], "only a paused sweep can go on, s-1 is running"),
        (stop.main, ["s-1", "--trial", "0"], "trial 0 of s-1 is finished (--trial). Running: 3."),
        (stop.main, ["s-1", "--trial", "1"], "trial 1 of s-1 is pruned"),
        (stop.main, ["s-1", "--trial", "9"], "trial 9 of s-1 is not begun"),
    ],
)
def test_mistakes_get_one_line(
    driven: Control, command: Command, line: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = driven.folder.parents[1]
    make_sweep(storage, "idle")
    assert command([*line, "--storage", str(storage)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert not driven.folder.exists()


def test_a_driver_forgets_wishes_when_it_takes_the_sweep_and_hears_all_after(tmp_path: Path) -> None:
    make_sweep(tmp_path)
    control = Control(tmp_path / "s-1")
    control.wish(PAUSE)
    outcome = driver.Outcome()
    with driver._only_driver(tmp_path / "s-1", outcome):
        assert outcome.begun
        assert not fresh(control).paused
        control.wish(STOP)
        assert fresh(control).stopped


class Steered:
    """A sweep's driver without Ray."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.searcher = StudySearcher(plan, STUDIES["fusion_search"])
        self.control = Control(Path(plan.folder))
        self.pause = Pause(self.searcher, self.control)
        self.scheduler = StudyScheduler(self.searcher, self.control, self.pause)
        self.stopper = StopWhenAsked(self.searcher, self.control, self.pause)
        self.trials: list[Any] = []

    def begin(self) -> Any:
        name = f"t{len(self.trials)}"
        trial = SimpleNamespace(trial_id=name, config=self.searcher.suggest(name), status=Trial.RUNNING)
        self.trials.append(trial)
        return trial

    def step(self) -> None:
        self.control._read = -1e9  # the poll is due
        self.pause.on_step_begin(0, self.trials)

    def epoch(self, trial: Any, epoch: int) -> str:
        return self.scheduler.on_trial_result(None, trial, result(epoch, 0.1))


@pytest.fixture
def steered(tmp_path: Path) -> Steered:
    return Steered(make_sweep(tmp_path))


def test_a_pause_waits_for_every_epoch_that_runs_and_for_no_other(steered: Steered) -> None:
    first, second = steered.begin(), steered.begin()
    waiting = SimpleNamespace(trial_id="late", config={"number": 2}, status=Trial.PENDING)
    steered.trials.append(waiting)
    steered.step()
    assert steered.epoch(first, 1) == TrialScheduler.CONTINUE
    steered.control.wish(PAUSE)
    steered.step()
    assert steered.searcher.suggest("new") == StudySearcher.FINISHED
    assert not steered.stopper.stop_all()
    assert steered.epoch(first, 2) == TrialScheduler.NOOP
    assert not steered.stopper.stop_all()
    steered.control.withdraw(PAUSE)  # too late: it is carried through
    waiting.status = Trial.RUNNING  # one that began meanwhile is not waited for
    steered.step()
    second.status = Trial.TERMINATED  # nor one that is gone
    steered.step()
    assert steered.stopper.stop_all()

    steered.searcher.rest()
    steered.searcher.begin()
    assert not steered.stopper.stop_all()
    again = [steered.searcher.suggest(f"again{number}") for number in range(3)]
    assert [(trial["number"], trial["epochs"], trial["attempt"]) for trial in again] == [
        (0, 2, 1),
        (1, 0, 1),
        (2, 0, 0),
    ]
    study = read_study(Path(steered.plan.folder), "s-1")
    assert study is not None
    assert own_trials(study)[0].user_attrs["seconds"] == 180


def test_a_trial_that_is_stopped_by_hand_says_so(steered: Steered) -> None:
    trial = steered.begin()
    steered.control.wish("stop-0")
    steered.step()
    assert steered.epoch(trial, 1) == TrialScheduler.STOP
    steered.searcher.on_trial_complete("t0", result(1, 0.1))
    stopped = steered.searcher.study.trials[0]
    assert (stopped.state.name, stopped.user_attrs["reason"]) == ("PRUNED", "stopped by hand")


@pytest.mark.parametrize("ending", ["stop", "continue", "ctrl-c", "budget"])
def test_a_paused_driver_notices_within_two_seconds_and_sleeps_meanwhile(
    ending: str, steered: Steered, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds: list[float] = []
    ended: list[str] = []
    tracker: Any = SimpleNamespace(trial_ended=lambda trial, state, **how: ended.append(f"{trial} {state}"))
    control = steered.control

    def tune(plan: Plan, searcher: StudySearcher, pause: Pause, *_: Any) -> bool:
        rounds.append(time.monotonic())
        if len(rounds) == 1:
            steered.begin()
            control.wish(PAUSE)
            control._read = -1e9
            pause.on_step_begin(0, [])
            return False
        return True

    monkeypatch.setattr(driver, "_tune", tune)
    wish = {
        "stop": lambda: control.wish(STOP),
        "continue": lambda: control.withdraw(PAUSE),
        "ctrl-c": lambda: os.kill(os.getpid(), signal.SIGINT),
        "budget": lambda: None,
    }[ending]
    used, began = time.process_time(), time.monotonic()
    threading.Timer(2.0, lambda: control.wish("stop-0")).start()
    threading.Timer(4.0, wish).start()
    deadline = began + (4.0 if ending == "budget" else 99)
    cohort: Any = None  # only trials that start are asked for their split
    with INTERRUPTION.heard(), INTERRUPTION.deferred():
        driver._run_and_pause(
            steered.plan, cohort, steered.searcher, tracker, control, Storage(Path(steered.plan.folder)), deadline
        )
    waited = (rounds[1] if ending == "continue" else time.monotonic()) - began
    assert 4.0 <= waited < 6.0
    assert time.process_time() - used < 1.0
    assert len(rounds) == (2 if ending == "continue" else 1)
    assert ended == ["0 pruned"]  # a resting trial can be stopped, too
    assert steered.searcher.study.trials[0].user_attrs["reason"] == "stopped by hand"
    assert "paused; go on with:  python -m sweeps.continue s-1 --storage" in capsys.readouterr().err


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Drivers that are ended with the test, whatever becomes of it."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


@pytest.mark.slow
def test_a_real_sweep_rests_and_goes_on_as_if_nothing_had_been(
    sample_root: Path, tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    sweep = Sweep(
        tmp_path,
        sample_root,
        "--trials",
        "3",
        "--scheduler",
        "none",
        "--set",
        "train.epochs=25",
        "--expression",
        "smile",
    )
    process = sweep.start()
    started.append(process)
    sweep.wait_for_epoch(2)
    sweep.steer("pause")
    sweep.wait_for("paused; go on with")
    deadline = time.monotonic() + 30  # Ray ends them a moment later
    while workers_of(process):  # nothing is kept, no GPU either
        assert time.monotonic() < deadline
        time.sleep(0.2)
    rested = [entry for entry in sweep.spooled() if entry["kind"] == "epoch"]
    driving, before = psutil.Process(process.pid), psutil.Process(process.pid).cpu_times()
    time.sleep(3)
    after = driving.cpu_times()
    assert after.user + after.system - before.user - before.system < 1.0
    assert [entry for entry in sweep.spooled() if entry["kind"] == "epoch"] == rested
    sweep.steer("continue")
    sweep.wait_for("going on")
    deadline = time.monotonic() + 200
    while not (late := {e["trial"] for e in sweep.spooled() if e["kind"] == "epoch" and e not in rested} - {"0"}):
        assert time.monotonic() < deadline, sweep.text
        time.sleep(0.1)
    stopped = int(str(min(late)))
    sweep.steer("stop", "--trial", str(stopped))
    assert process.wait(timeout=300) == 0, sweep.text

    study = read_study(tmp_path / "s-1", "s-1")
    assert study is not None
    trials = own_trials(study)
    runs = sweep.runs()
    assert len(trials) == 3
    assert len(runs) == 4
    for trial in trials:
        run = runs[f"s-1-{trial.number:03d}"]
        steps = sorted(trial.intermediate_values)
        assert sweep.steps(run) == steps == list(range(1, len(steps) + 1))  # nothing twice, nothing left out
        state = "pruned" if trial.number == stopped else "finished"
        assert run.data.tags["qafe.state"] == state
        assert trial.user_attrs["seconds"] > 0
    assert trials[stopped].user_attrs["reason"] == "stopped by hand"
    assert trials[stopped].state.name == "PRUNED"
    assert runs[f"s-1-{stopped:03d}"].data.tags["qafe.reason"] == "stopped by hand"
    assert trials[0].user_attrs["attempts"] == 2

    # The same training without Ray, a pause or a checkpoint.
    config = dotted.override(dotted.from_json(Plan.load(tmp_path / "s-1").config_json), trials[0].params)
    part = load_cohort(str(sample_root), config.data).only("smile")
    unpaused = fit(config, part.store, part.train, part.validation, device=torch.device("cpu"))
    assert [epoch.best_spearman for epoch in unpaused] == list(trials[0].intermediate_values.values())
    assert trials[0].value == sweep.summary["best"][OBJECTIVE] or sweep.summary["best"]["trial"] != 0


@pytest.mark.slow
def test_stop_ends_a_real_sweep_as_ctrl_c_does(
    sample_root: Path, tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    sweep = Sweep(tmp_path, sample_root, "--trials", "3", "--set", "train.epochs=40", "--expression", "smile")
    process = sweep.start()
    started.append(process)
    sweep.wait_for_epoch(1)
    sweep.steer("stop")
    assert process.wait(timeout=100) == 130
    assert f"interrupted; go on with:  python -m sweeps.run fusion_search --resume --name s-1 --storage {tmp_path}" in (
        sweep.text
    )
    assert {run.info.status for run in sweep.runs().values()} == {"KILLED"}
