"""How a sweep ends early: by a signal in each of its phases, to its driver or to its group; or without its Ray."""

import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from sweeps.plan import Plan
from sweeps.study import open_study
from tests.sweeps.running import Sweep, driver_of, end, family

ENDS_WITHIN_S = 15
"""What people who end a sweep may have to wait, of the time that SLURM and systemd give before they kill."""
FLAGS = ["--trials", "3", "--scheduler", "none", "--expression", "smile", "--set", "train.epochs=40"]


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A folder whose name is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def sweep(sample_root: Path, tmp_path: Path, short_tmp: Path) -> Iterator[Sweep]:
    found = Sweep(tmp_path, sample_root, *FLAGS, RAY_TMPDIR=str(short_tmp))
    yield found
    end(found)


def unheard() -> None:
    """As a script leaves what it starts with ``&``, and ``nohup`` what it starts."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def starting(sweep: Sweep, process: subprocess.Popen[bytes]) -> None:
    sweep.wait_for("sweep s-1: 3 trials")


def training(sweep: Sweep, process: subprocess.Popen[bytes]) -> None:
    sweep.wait_for_epoch(2)


def paused(sweep: Sweep, process: subprocess.Popen[bytes]) -> None:
    sweep.wait_for_epoch(2)
    sweep.steer("pause")
    sweep.wait_for("paused; go on with")


def reporting(sweep: Sweep, process: subprocess.Popen[bytes]) -> None:
    sweep.wait_for(r"\[3/3\]")
    time.sleep(1)  # the trials have ended
    assert process.poll() is None, sweep.text


PHASES = [starting, training, paused, reporting]


def closed(sweep: Sweep, began: float) -> None:
    """The driver and its Ray have ended in time, no run is left open, and it is said how to go on."""
    took = time.monotonic() - began
    assert took < ENDS_WITHIN_S, (took, sweep.text)
    line = f"go on with:  python -m sweeps.run fusion_search --resume --name s-1 --storage {sweep.storage}"
    assert line in sweep.text.splitlines()[-1], sweep.text
    assert "Traceback" not in sweep.text
    assert not family(sweep)
    assert not list(Path(sweep.environment["RAY_TMPDIR"]).iterdir())
    states = {name: run.info.status for name, run in sweep.runs().items()} if sweep.spooled() else {}
    assert "RUNNING" not in states.values(), states
    assert not sweep.spooled() or states["s-1"] == "KILLED"


CASES = [(phase, group) for phase in PHASES for group in (False, True)]
AT_ONCE = (training, True)
"""The case that every run of the tests looks at."""


@pytest.mark.parametrize(
    ("phase", "group"),
    [
        pytest.param(
            *case,
            id=f"{case[0].__name__}-{'group' if case[1] else 'driver'}",
            marks=() if case == AT_ONCE else pytest.mark.faults,
        )
        for case in CASES
    ],
)
def test_sigterm_with_sigint_ignored(
    phase: Callable[[Sweep, subprocess.Popen[bytes]], None], group: bool, sweep: Sweep
) -> None:
    if phase is reporting:
        sweep.flags += ["--set", "train.epochs=2"]
    process = sweep.start(start_new_session=True, preexec_fn=unheard)
    phase(sweep, process)
    began = time.monotonic()
    if group:
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.terminate()
    assert process.wait(timeout=60) == 130, sweep.text
    closed(sweep, began)
    goes_on(sweep)


def goes_on(sweep: Sweep) -> None:
    sweep.run("--resume")
    study = open_study(Plan.load(sweep.storage / "s-1"))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
    assert {run.info.status for run in sweep.runs().values()} == {"FINISHED"}


PARTS = {"gcs": "gcs/gcs_server", "raylet": "raylet/raylet", "agent": "ray::RuntimeEnvAgent"}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.faults
def test_kill_9_of_a_part_of_ray(part: str, sweep: Sweep) -> None:
    process = sweep.start()
    sweep.wait_for_epoch(2)
    [victim] = [each for each in family(sweep) if (each.cmdline() or [""])[0].strip().endswith(PARTS[part])]
    began = time.monotonic()
    victim.kill()
    assert process.wait(timeout=60) == 2, sweep.text
    assert re.search("interrupted, for its (Ray has ended|driver ended with status 1); go on with", sweep.text)
    closed(sweep, began)
    goes_on(sweep)


@pytest.mark.faults
def test_kill_9_of_the_driver_alone(sweep: Sweep) -> None:
    process = sweep.start()
    sweep.wait_for_epoch(2)
    driver = driver_of(process)
    began = time.monotonic()
    driver.kill()
    assert process.wait(timeout=60) == 2, sweep.text
    assert "interrupted, for its driver was ended by SIGKILL; go on with" in sweep.text
    closed(sweep, began)
    goes_on(sweep)


@pytest.mark.parametrize("part", ["gcs", "raylet"])
@pytest.mark.faults
def test_kill_9_of_a_part_of_a_cluster(part: str, sweep: Sweep) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0})
    try:
        flags = ["--address", cluster.address, "--preset", "tiny", "--gpus-per-trial", "0"]
        process = sweep.start(*sweep.flags, *flags)
        sweep.wait_for_epoch(2)
        name = {"gcs": "gcs_server", "raylet": "raylet"}[part]
        [victim] = cluster.head_node.all_processes[name]
        os.kill(victim.process.pid, signal.SIGKILL)
        assert process.wait(timeout=100) == 2, sweep.text
        gone = {"gcs": f"the GCS of its Ray cluster ({cluster.address})", "raylet": "the Ray node of this machine"}
        reason = f"interrupted, for ({re.escape(gone[part])} has gone|its driver ended with status 1); go on with"
        assert re.search(reason, sweep.text), sweep.text
        assert f"--resume --name s-1 --address {cluster.address} --storage {sweep.storage}" in sweep.text
        assert {run.info.status for run in sweep.runs().values()} == {"KILLED"}
    finally:
        cluster.shutdown()
    goes_on(sweep)
