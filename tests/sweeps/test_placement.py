"""Where trials find a place: on a cluster of two nodes, and where none has what they ask for."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from sweeps.run import main
from tests.conftest import QUICK_FLAGS
from tests.sweeps.running import ROOT
from tests.tracking.stores import embedded, free_port


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster: a node with two CPUs and a GPU, and one with a CPU."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1})
        try:
            made.add_node(num_cpus=1, num_gpus=0)
            made.wait_for_nodes()
            yield made.address
        finally:
            made.shutdown()


def line(data_root: Path, folder: Path, *flags: str) -> list[str]:
    return [
        "fusion_search",
        "--data-root",
        str(data_root),
        "--preset",
        "tiny",
        *QUICK_FLAGS,
        *("--storage", str(folder / "storage"), "--tracking-uri", embedded(folder)),
        *flags,
    ]


DRY_RUN = """
import os, sys
from sweeps import command
if "--address" not in sys.argv:  # Ray reads its environment when it is imported
    os.environ.update(command.QUIET | command.ALONE | {"RAY_AUTH_TOKEN": "0" * 64})
from sweeps import estimate

def briefly(plan, sweep, measured=estimate.calibrate):
    print("Ray has", estimate.ray.cluster_resources()["CPU"], "CPU", file=sys.stderr)
    return measured(plan, sweep, seconds=1.0, config_seconds=1.0)

estimate.calibrate = briefly
sys.exit(command.main(sys.argv[1:]))
"""


def dry_run(data_root: Path, folder: Path, *flags: str, status: int = 0, prefix: Sequence[str] = ()) -> str:
    """Of a process of its own, which measures for a few seconds; what it says on stderr."""
    command = [*prefix, sys.executable, "-c", DRY_RUN, *line(data_root, folder, "--dry-run", *flags)]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == status, done.stderr
    return done.stderr


@contextlib.contextmanager
def occupied(address: str, cpus: int) -> Iterator[None]:
    """Within the block, somebody else's tasks hold so many CPUs of the cluster."""
    code = (
        "import sys, time, ray; ray.init(sys.argv[1], log_to_driver=False);"
        "from ray.util.placement_group import placement_group;"
        "groups = [placement_group([{'CPU': 1}]) for _ in range(int(sys.argv[2]))];"
        "assert all(group.wait(60) for group in groups); print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, address, str(cpus)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
    finally:
        process.kill()
        process.wait()


def test_a_dry_run_measures_on_the_nodes_of_a_cluster(cluster: str, sample_root: Path, tmp_path: Path) -> None:
    flags = ["--address", cluster, "--json", str(tmp_path / "dry.json")]
    text = dry_run(sample_root, tmp_path, *flags, "--gpus-per-trial", "0", "--trials", "8")
    assert "calibrating: 3 trials side by side" in text
    found = json.loads((tmp_path / "dry.json").read_text())
    assert found["resources"]["side_by_side"] == 3
    assert found["epoch_s"]["configs"] >= 3
    assert found["process_start_s"] > 0
    assert 100 < found["memory"]["measured_mb"] < 4000
    dry_run(sample_root, tmp_path, *flags, "--gpus-per-trial", "1", "--trials", "8")
    found = json.loads((tmp_path / "dry.json").read_text())
    assert found["resources"]["side_by_side"] == 1, "three CPUs, but one GPU"
    assert found["unit"] == "GPU-hours"
    assert not (tmp_path / "storage").exists()
    assert not (tmp_path / "mlflow.db").exists()


def test_places_that_others_hold_are_none(cluster: str, sample_root: Path, tmp_path: Path) -> None:
    flags = ["--address", cluster, "--gpus-per-trial", "0", "--trials", "8", "--json", str(tmp_path / "dry.json")]
    with occupied(cluster, 2):
        dry_run(sample_root, tmp_path, *flags)
        assert json.loads((tmp_path / "dry.json").read_text())["resources"]["side_by_side"] == 1
        with occupied(cluster, 1):
            text = dry_run(sample_root, tmp_path, *flags, status=2)
    assert "error: all 3 places for trials are taken by others' work on this Ray." in text


def test_one_core_is_one_trial_at_a_time_and_one_cpu_of_ray(sample_root: Path, tmp_path: Path) -> None:
    core = str(min(os.sched_getaffinity(0)))
    flags = ["--gpus-per-trial", "0", "--trials", "8", "--json", str(tmp_path / "dry.json")]
    text = dry_run(sample_root, tmp_path, *flags, prefix=["taskset", "-c", core])
    assert "Ray has 1.0 CPU" in text
    assert "calibrating: 1 trials side by side" in text
    assert json.loads((tmp_path / "dry.json").read_text())["resources"]["side_by_side"] == 1
    text = dry_run(sample_root, tmp_path, *flags, "--cpus-per-trial", "2", prefix=["taskset", "-c", core], status=2)
    assert "error: --cpus-per-trial must lie between 0 and the 1 of this machine, got 2." in text


@pytest.mark.parametrize("more", [["--dry-run"], []], ids=["dry-run", "sweep"])
@pytest.mark.parametrize(
    ("asked", "words"), [(["--gpus-per-trial", "2"], "1 CPU and 2 GPU"), (["--cpus-per-trial", "3"], "3 CPU and 0 GPU")]
)
def test_what_no_node_has_is_refused_in_one_line(
    asked: list[str], words: str, more: list[str], cluster: str, sample_root: Path, tmp_path: Path
) -> None:
    flags = ["--address", cluster, "--gpus-per-trial", "0", *asked, *more]
    command = [sys.executable, "-m", "sweeps.run", *line(sample_root, tmp_path, *flags)]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 2
    (error,) = [row for row in done.stderr.splitlines() if row.startswith("error: ")]
    assert f"a trial must have {words} on one node of Ray, and the nodes have 1 CPU, 0 GPU; 2 CPU, 1 GPU" in error
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "storage").glob("*")), "the name is free again"


@pytest.mark.parametrize("gpus", ["0", "1"])
def test_a_dry_run_where_nobody_answers_is_one_line(
    gpus: str, sample_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dry-run", "--address", f"127.0.0.1:{free_port()}", "--gpus-per-trial", gpus]
    assert main(line(sample_root, tmp_path, *flags)) == 2
    said = capsys.readouterr()
    (error,) = [row for row in said.err.splitlines() if row.startswith("error: ")]
    assert "answer at --address, got ConnectionRefusedError from 127.0.0.1:" in error
    assert said.out == "", "no estimate"
