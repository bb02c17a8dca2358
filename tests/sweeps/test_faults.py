"""What a sweep survives: each fault once, in a real sweep, and afterwards everything has to agree.

``pytest -m faults``
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import FrozenTrial, TrialState

from qafe import dotted
from qafe.data.cohort import load_cohort
from qafe.train import STATE_FILE, fit
from sweeps import checkpoints
from sweeps.folder import REPORT_FOLDER
from sweeps.plan import Plan
from sweeps.results import OBJECTIVE
from sweeps.study import FAILURE, JOURNAL_FILE, open_study, own_trials
from sweeps.trial import CONFIG_FILE
from tests.sweeps.object_store import object_store
from tests.sweeps.running import ROOT, Sweep, end, workers_of
from tests.tracking.stores import free_port, server

pytestmark = pytest.mark.faults

EPOCHS = 12
TRIALS = 2
FLAGS = ["--trials", str(TRIALS), "--set", f"train.epochs={EPOCHS}", "--scheduler", "none"]
TRIAL_ENDS = JournalOperation.SET_TRIAL_STATE_VALUES
STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}


@pytest.fixture
def faults(tmp_path: Path) -> Path:
    """The folder of `faults_in_workers`; every process of the sweep obeys it."""
    folder = tmp_path / "faults"
    folder.mkdir()
    return folder


@pytest.fixture
def sweep(sample_root: Path, tmp_path: Path, faults: Path) -> Iterator[Sweep]:
    found = Sweep(tmp_path, sample_root, *FLAGS, **obeying(faults))
    yield found
    end(found)


def obeying(faults: Path) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "tests" / "sweeps" / "faults_in_workers"), str(ROOT)])
    return {"FAULTS": str(faults), "PYTHONPATH": path}


def finish(process: subprocess.Popen[bytes], sweep: Sweep) -> None:
    assert process.wait(timeout=400) == 0, sweep.text


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """kill -9 of the driver; the trials' workers notice and end by themselves."""
    workers = workers_of(process)
    rest = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    for each in rest:  # Ray's own agents may take minutes
        with contextlib.suppress(psutil.Error):
            each.kill()


def everything_agrees(sweep: Sweep, planned: int = TRIALS) -> list[FrozenTrial]:
    """All trials ended; study and MLflow say the same, trial by trial, step by step; nothing twice, nothing open."""
    plan = Plan.load(sweep.storage / "s-1")
    study = open_study(plan)
    trials = own_trials(study)
    assert len(trials) == planned
    assert all(trial.state.is_finished() for trial in study.trials)
    client = MlflowClient(sweep.uri)
    experiment = client.get_experiment_by_name("fusion_search")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    runs: dict[str, Run] = {run.info.run_name: run for run in found}
    assert len(found) == len(runs) == planned + 1
    assert runs["s-1"].info.status == "FINISHED"
    for trial in trials:
        run = runs[f"s-1-{trial.number:03d}"]
        assert run.info.status == ("FAILED" if trial.state == TrialState.FAIL else "FINISHED")
        assert run.data.tags["qafe.state"] == STATES[trial.state]
        tracked = client.get_metric_history(run.info.run_id, OBJECTIVE)
        heard = {step: value for step, value in trial.intermediate_values.items() if value > -1}
        assert {row.step: row.value for row in tracked} == pytest.approx(heard)
        assert len(tracked) == len(heard)
        if trial.state == TrialState.COMPLETE:
            assert sorted(heard) == list(range(1, EPOCHS + 1))
            assert trial.values == [heard[EPOCHS]]
    return trials


def as_if_undisturbed(sweep: Sweep, trial: FrozenTrial) -> None:
    """A trial's metrics are those of a training in one go, from the same seed."""
    plan = Plan.load(sweep.storage / "s-1")
    folder = checkpoints.last(sweep.storage / "s-1", trial.number)
    assert folder is not None
    config = dotted.from_json((folder / CONFIG_FILE).read_text())
    part = load_cohort(plan.data_root, config.data).only(plan.expressions[0])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run = fit(config, part.store, part.train, part.validation, device=torch.device("cpu"))
        expected = {result.epoch: result.best_spearman for result in run}
    finally:
        torch.set_num_threads(threads)
    assert trial.intermediate_values == expected


def test_kill_9_of_a_trial_worker(sweep: Sweep) -> None:
    process = sweep.start()
    sweep.wait_for_epoch(4)
    workers_of(process)[0].kill()
    finish(process, sweep)
    assert "lost its worker" in sweep.text
    for trial in everything_agrees(sweep):
        as_if_undisturbed(sweep, trial)


def test_sigterm_to_a_trial_worker(sweep: Sweep, faults: Path) -> None:
    process = sweep.start()
    sweep.wait_for_epoch(4)
    (faults / "slow").write_text("3")  # so that it comes between two steps
    time.sleep(3)
    for worker in workers_of(process):
        worker.terminate()
    sweep.wait_for("asked to leave.*\n(.*\n)*.*asked to leave")
    (faults / "slow").unlink()
    finish(process, sweep)
    assert "it goes on in the middle of epoch" in sweep.text
    assert not list((sweep.storage / "s-1" / checkpoints.PREEMPTED).iterdir())
    for trial in everything_agrees(sweep):
        as_if_undisturbed(sweep, trial)


def test_kill_9_of_the_driver_twice(sweep: Sweep) -> None:
    for epoch, flags in ((3, ()), (9, ("--resume",))):
        process = sweep.start(*flags)
        sweep.wait_for_epoch(epoch)
        kill_all(process)
    sweep.run("--resume", "--json", str(sweep.folder / "summary.json"))
    trials = everything_agrees(sweep)
    assert any(trial.user_attrs["attempts"] > 1 for trial in trials)
    for trial in trials:
        as_if_undisturbed(sweep, trial)


def test_a_driver_that_is_killed_seven_times_finds_what_one_finds_that_is_not(
    sample_root: Path, tmp_path: Path
) -> None:
    cores = str(psutil.cpu_count())
    flags = ["--trials", "13", "--cpus-per-trial", cores, "--set", "train.epochs=4", "--scheduler", "none"]
    found = []
    for name, kills in (("undisturbed", 0), ("killed", 7)):
        (tmp_path / name).mkdir()
        sweep = Sweep(tmp_path / name, sample_root, *flags)
        try:
            draw = random.Random(0)
            for number in range(kills):
                process = sweep.start(*(("--resume",) if number else ()))
                wanted = sum(entry["kind"] == "epoch" for entry in sweep.spooled()) + draw.randint(2, 7)
                deadline = time.monotonic() + 200
                while sum(entry["kind"] == "epoch" for entry in sweep.spooled()) < wanted:
                    assert process.poll() is None, sweep.text
                    assert time.monotonic() < deadline, sweep.text
                    time.sleep(0.05)
                kill_all(process)
            sweep.run(*(("--resume",) if kills else ()))
            trials = own_trials(open_study(Plan.load(sweep.storage / "s-1")))
            found.append([(trial.number, trial.params, trial.intermediate_values, trial.values) for trial in trials])
            if kills:
                assert sum(trial.user_attrs["attempts"] > 1 for trial in trials) >= 3
        finally:
            end(sweep)
    assert len(found[0]) == 13
    assert found[0] == found[1]


def test_storage_and_data_move_between_a_kill_and_a_resume(sample_root: Path, tmp_path: Path) -> None:
    cores = str(psutil.cpu_count())
    flags = ["--trials", "3", "--cpus-per-trial", cores, "--set", "train.epochs=6", "--scheduler", "none"]
    found = []
    for name in ("undisturbed", "moved"):
        (tmp_path / name).mkdir()
        shutil.copytree(sample_root, tmp_path / name / "data")
        (tmp_path / name / "a").mkdir()
        sweep = Sweep(tmp_path / name, tmp_path / name / "data", *flags, storage=tmp_path / name / "a")
        try:
            process = sweep.start()
            if name == "moved":
                sweep.wait_for_epoch(3)
                kill_all(process)
                sweep.move_to(tmp_path / name / "b")
                (tmp_path / name / "data").rename(tmp_path / name / "elsewhere")
                process = sweep.start("--resume", "--data-root", str(tmp_path / name / "elsewhere"))
            finish(process, sweep)
            if name == "moved":
                sweep.move_to(tmp_path / name / "c")
            sweep.run("--extend", "1")
            trials = own_trials(open_study(Plan.load(sweep.storage / "s-1")))
            found.append([(trial.number, trial.params, trial.intermediate_values, trial.values) for trial in trials])
            assert {run.info.status for run in sweep.runs().values()} == {"FINISHED"}
            assert len(sweep.runs()) == 5
        finally:
            end(sweep)
    assert len(found[0]) == 4
    assert found[0] == found[1]


def test_the_driver_dies_between_a_trials_last_epoch_and_its_end(sweep: Sweep) -> None:
    sweep.run()
    folder = sweep.storage / "s-1"
    undisturbed = own_trials(open_study(Plan.load(folder)))[1]
    journal = (folder / JOURNAL_FILE).read_text().splitlines(keepends=True)
    ends = [place for place, line in enumerate(journal) if json.loads(line)["op_code"] == TRIAL_ENDS]
    (folder / JOURNAL_FILE).write_text("".join(journal[: ends[-1]]))  # the study has not heard the second trial's end
    shutil.rmtree(folder / REPORT_FOLDER)
    sweep.run("--resume")
    again = everything_agrees(sweep)[undisturbed.number]
    assert again.intermediate_values == undisturbed.intermediate_values


def test_sigterm_to_the_driver(sweep: Sweep) -> None:
    process = sweep.start()
    sweep.wait_for_epoch(4)
    process.terminate()
    assert process.wait(timeout=100) == 130, sweep.text
    assert {run.info.status for run in sweep.runs().values()} <= {"KILLED", "FINISHED"}
    sweep.run("--resume")
    for trial in everything_agrees(sweep):
        as_if_undisturbed(sweep, trial)


def test_a_truncated_last_checkpoint(sweep: Sweep) -> None:
    process = sweep.start()
    sweep.wait_for_epoch(5)
    kill_all(process)
    broken = 0
    for trial in own_trials(open_study(Plan.load(sweep.folder / "s-1")), (TrialState.RUNNING,)):
        newest = next(checkpoints.folders(sweep.folder / "s-1", trial.number), None)
        if newest is not None:
            for path in newest.glob(f"*/{STATE_FILE}"):
                os.truncate(path, path.stat().st_size // 2)
                broken += 1
    assert broken
    sweep.run("--resume")
    for trial in everything_agrees(sweep):
        as_if_undisturbed(sweep, trial)


def test_a_loss_that_is_not_finite(sweep: Sweep, faults: Path) -> None:
    (faults / "nan").touch()
    sweep.run()
    trials = everything_agrees(sweep)
    diverged = [trial for trial in trials if trial.state == TrialState.PRUNED]
    assert len(diverged) == 1
    assert diverged[0].user_attrs[FAILURE] == "diverged"
    assert diverged[0].intermediate_values[3] == -1
    run = sweep.runs()[f"s-1-{diverged[0].number:03d}"]
    assert run.data.tags["qafe.reason"].startswith("diverged: ")
    text = MlflowClient(sweep.uri).download_artifacts(run.info.run_id, "failure.txt")
    assert "FloatingPointError" in Path(text).read_text()
    for trial in trials:
        if trial.state == TrialState.COMPLETE:
            as_if_undisturbed(sweep, trial)


def test_memory_runs_out(sweep: Sweep, faults: Path) -> None:
    (faults / "memory").write_text("2")
    sweep.run()
    for trial in everything_agrees(sweep):
        assert trial.state == TrialState.COMPLETE
        run = sweep.runs()[f"s-1-{trial.number:03d}"]
        assert "batches of 2" in run.data.tags["qafe.note"]
        as_if_undisturbed(sweep, trial)  # with batches of two


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip(f"a small disk needs the right to mount one: {made.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk(sample_root: Path, tmp_path: Path, faults: Path, small_disk: Path) -> None:
    sweep = Sweep(tmp_path, sample_root, *FLAGS, storage=small_disk, **obeying(faults))
    try:
        process = sweep.start()
        sweep.wait_for_epoch(3)
        ballast = small_disk / "ballast"
        with open(ballast, "wb", buffering=0) as out:
            out.write(bytes(max(0, shutil.disk_usage(small_disk).free - 2**20)))
        sweep.wait_for("is full: the sweep waits")
        before = len(sweep.spooled())
        time.sleep(8)
        assert process.poll() is None
        assert len(sweep.spooled()) - before <= 2
        ballast.unlink()
        sweep.wait_for("there is room again")
        finish(process, sweep)
        for trial in everything_agrees(sweep):
            as_if_undisturbed(sweep, trial)
    finally:
        end(sweep)


def test_checkpoints_in_a_bucket_that_sleeps(sample_root: Path, tmp_path: Path, faults: Path) -> None:
    home = {"HOME": str(tmp_path), **obeying(faults)}
    with object_store(tmp_path) as (store, environment):
        place = tmp_path / "ray_results"
        sweep = Sweep(tmp_path, sample_root, *FLAGS, storage=place, bucket="s3://sweeps/a", **home, **environment)
        try:
            process = sweep.start()
            sweep.wait_for_epoch(3)
            store.send_signal(signal.SIGSTOP)
            time.sleep(40)
            epochs = len(sweep.spooled())
            time.sleep(5)
            assert process.poll() is None, sweep.text
            assert len(sweep.spooled()) == epochs, "nobody goes on without a checkpoint"
            store.send_signal(signal.SIGCONT)
            sweep.wait_for_epoch(6)
            kill_all(process)
            process = sweep.start("--resume")
            sweep.wait_for_epoch(8)
            (faults / "slow").write_text("3")
            time.sleep(3)
            workers_of(process)[0].terminate()
            sweep.wait_for("it goes on in the middle of epoch")
            (faults / "slow").unlink()
            finish(process, sweep)
            for trial in everything_agrees(sweep):
                as_if_undisturbed(sweep, trial)
        finally:
            store.send_signal(signal.SIGCONT)
            end(sweep)


def test_the_tracking_server_is_away_for_a_minute(sample_root: Path, tmp_path: Path, faults: Path) -> None:
    port = free_port()
    with server(tmp_path, port) as uri:
        sweep = Sweep(tmp_path, sample_root, *FLAGS, uri=uri, **obeying(faults))
        process = sweep.start()
        sweep.wait_for_epoch(2)
    try:
        time.sleep(60)
        assert process.poll() is None, sweep.text
        with server(tmp_path, port):
            finish(process, sweep)
            for trial in everything_agrees(sweep):
                as_if_undisturbed(sweep, trial)
    finally:
        end(sweep)


def test_the_clock_jumps(sweep: Sweep, faults: Path) -> None:
    process = sweep.start()
    sweep.wait_for_epoch(3)
    (faults / "clock").write_text("-7200")
    sweep.wait_for_epoch(7)
    (faults / "clock").write_text("86400")
    finish(process, sweep)
    for trial in everything_agrees(sweep):
        as_if_undisturbed(sweep, trial)


@pytest.fixture
def cluster_environment(faults: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in obeying(faults).items():
        monkeypatch.setenv(name, value)
    for name, value in {"period_ms": "1000", "failure_threshold": "3", "timeout_ms": "2000"}.items():
        monkeypatch.setenv(f"RAY_health_check_{name}", value)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")


@pytest.mark.usefixtures("cluster_environment")
def test_halves_of_gpus_on_two_nodes(sample_root: Path, tmp_path: Path, faults: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1}, connect=True)
    flags = ["--trials", "4", "--set", "train.epochs=200", "--scheduler", "none"]
    flags += ["--address", cluster.address, "--preset", "tiny", "--gpus-per-trial", "0.5"]
    sweep = Sweep(tmp_path, sample_root, *flags, **obeying(faults))
    try:
        cluster.add_node(num_cpus=2, num_gpus=1)
        cluster.wait_for_nodes()
        process = sweep.start()
        full = False
        while process.poll() is None and not full:
            free = ray._private.state.available_resources_per_node().values()
            full = len(free) == 2 and all(node.get("GPU", 0) == 0 for node in free)
            time.sleep(0.5)
        assert full, sweep.text  # four trials, two on each node
        sweep.wait_for_epoch(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=100) == 130, sweep.text
    finally:
        end(sweep)
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.usefixtures("cluster_environment")
def test_a_whole_node_is_lost(sample_root: Path, tmp_path: Path, faults: Path) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
    try:
        node = cluster.add_node(num_cpus=1, num_gpus=0)
        cluster.wait_for_nodes()
        flags = [*FLAGS, "--address", cluster.address, "--preset", "tiny", "--gpus-per-trial", "0"]
        sweep = Sweep(tmp_path, sample_root, *flags, **obeying(faults))
        process = sweep.start()
        sweep.wait_for_epoch(4)
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1, num_gpus=0)
        finish(process, sweep)
        assert "lost its worker" in sweep.text
        for trial in everything_agrees(sweep):
            as_if_undisturbed(sweep, trial)
    finally:
        cluster.shutdown()


def test_ctrl_c_in_the_middle_of_everything(sweep: Sweep) -> None:
    process = sweep.start()
    sweep.wait_for_epoch(2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=100) == 130
    sweep.run("--extend", "1", "--json", str(sweep.folder / "summary.json"))
    for trial in everything_agrees(sweep, TRIALS + 1):
        as_if_undisturbed(sweep, trial)
