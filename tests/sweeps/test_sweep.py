"""Whole sweeps through the command line, with real Ray processes and a real MLflow store."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient

from qafe.history import read_history
from qafe.store import Store
from sweeps.checkpoints import last
from sweeps.command import main
from sweeps.plan import Plan
from sweeps.study import open_study
from tests.conftest import QUICK_FLAGS
from tests.sweeps.running import ROOT, Sweep, workers_of
from tests.tracking.stores import embedded, free_port


@pytest.fixture(scope="module")
def done(sample_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    sweep = Sweep(tmp_path_factory.mktemp("sweep"), sample_root, "--trials", "4", "--expression", "smile,frown")
    sweep.run()
    return sweep


def test_a_sweep_ends_with_a_table_and_the_next_commands(done: Sweep) -> None:
    text = done.text
    assert "best trials of s-1 (smile, frown)" in text
    assert "the baseline" in text
    assert "python -m tracking.server" in text
    assert "python -m tracking.registry register --sweep s-1" in text
    for title in ("Best trial:", "Luck:", "Test patients:"):
        assert title in text
    assert "Traceback" not in text


def test_the_summary_agrees_with_the_study_and_with_mlflow(done: Sweep) -> None:
    summary = done.summary
    study = open_study(Plan.load(done.folder / "s-1"))
    runs = done.runs()
    assert len(summary["trials"]) == len(study.trials) == 4
    assert len(runs) == 5
    parent = runs["s-1"]
    for row in summary["trials"]:
        run = runs[f"s-1-{row['trial']:03d}"]
        trial = study.trials[row["trial"]]
        assert run.info.run_id == row["run_id"]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == "FINISHED"
        assert run.data.tags["qafe.state"] == row["state"] in ("finished", "pruned")
        assert done.steps(run) == list(range(1, row["epochs"] + 1)) == sorted(trial.intermediate_values)
        assert run.data.metrics["best_spearman"] == pytest.approx(row["best_spearman"])
        mean = (run.data.metrics["spearman_smile"] + run.data.metrics["spearman_frown"]) / 2
        assert run.data.metrics["spearman"] == pytest.approx(mean)
        for name, value in row["settings"].items():
            assert run.data.params[name] == str(value)
        assert run.inputs.dataset_inputs[0].dataset.name == "sample"
        assert "version.torch" in run.data.tags
        for name in ("spearman", "spearman_smile", "spearman_frown"):
            assert run.data.metrics[f"{name}_low"] <= run.data.metrics[f"{name}_high"]
        assert run.data.metrics["system/system_memory_usage_percentage"] > 0
        assert run.data.tags["qafe.expression"] == "smile,frown"
        assert run.data.tags["qafe.stage"] == ("baseline" if row["trial"] == 0 else "search")
        assert run.data.tags.get("pruned") == (str(row["epochs"]) if row["state"] == "pruned" else None)
        assert platform.node() not in run.data.tags["qafe.host"]
        assert trial.user_attrs["mlflow_run_id"] == run.info.run_id
    best = max((row for row in summary["trials"] if row["state"] == "finished"), key=lambda row: row["best_spearman"])
    assert summary["best"]["trial"] == best["trial"]
    assert summary["luck"]["max_observed"] == pytest.approx(max(row["best_spearman"] for row in summary["trials"]))
    assert parent.data.metrics["test_spearman"] == pytest.approx(summary["best"]["test_spearman"])
    names = {item.path for item in MlflowClient(done.uri).list_artifacts(parent.info.run_id)}
    # of a checkout with changes, these are there, too
    assert names - {"source.diff"} == {"best_trials.csv", "importances.json", "report.html", "summary.json"}


def test_no_name_or_path_of_the_data_reaches_mlflow(done: Sweep, sample_root: Path) -> None:
    names = {path.name for path in (sample_root / "frames").glob("*/*")}
    names |= {str(sample_root), str(done.folder)}
    assert len(names) > 100
    client = MlflowClient(done.uri)
    texts = []
    for run in done.runs().values():
        texts += [json.dumps(run.data.params), json.dumps(run.data.tags)]
        folder = Path(client.download_artifacts(run.info.run_id, ""))
        texts += [path.read_text() for path in folder.rglob("*") if path.suffix in (".csv", ".json", ".html")]
    assert len(texts) > 20
    everything = "\n".join(texts)
    assert [name for name in names if name in everything] == []


def command(done: Sweep, *line: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": done.uri}
    return subprocess.run([sys.executable, "-m", *line], env=environment, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def champion(done: Sweep) -> Sweep:
    registered = command(done, "tracking.registry", "register", "--sweep", "s-1")
    assert registered.returncode == 0, registered.stderr
    assert registered.stdout.strip() == "registered qafe-net version 1"
    assert command(done, "tracking.registry", "promote", "qafe-net", "1").returncode == 0
    return done


def test_the_registry_lists_the_champion(champion: Sweep) -> None:
    rows = json.loads(command(champion, "tracking.registry", "list", "--json").stdout)
    assert [(row["model"], row["version"], row["alias"], row["sweep"]) for row in rows] == [
        ("qafe-net", 1, "champion", "s-1")
    ]
    version = MlflowClient(champion.uri).get_model_version_by_alias("qafe-net", "champion")
    assert version.tags["trial_run"] == champion.summary["best"]["run_id"]


def test_the_champion_scores_as_its_training_run_did(
    champion: Sweep, sample_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = champion.summary["best"]
    checkpoint = last(champion.folder / "s-1", best["trial"])
    assert checkpoint is not None
    history = read_history(checkpoint)
    rows = []
    for expression, entry in history.items():
        for name, expected in zip(entry.ids, entry.best.predictions, strict=True):
            patient, video = Store(sample_root).resolve_video(name)
            rows.append((str(sample_root / "frames" / patient / video), expression, expected))
    assert len(rows) == 8
    clip, expression, expected = rows[0]
    printed = command(
        champion, "qafe", "score", clip, "--model", "models:/qafe-net@champion", "--expression", expression
    )
    assert printed.returncode == 0, printed.stderr
    assert float(printed.stdout.split()[0]) == pytest.approx(expected, abs=1e-5)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", champion.uri)
    model = mlflow.pyfunc.load_model("models:/qafe-net@champion")
    frame = pd.DataFrame({"clip": [row[0] for row in rows], "expression": [row[1] for row in rows]})
    assert model.predict(frame)["score"].tolist() == pytest.approx([row[2] for row in rows], abs=1e-5)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["register", "--sweep", "none-1"], "got 'none-1'"),
        (["register", "--sweep", "s-1", "--trial", "77"], "no finished trial 77"),
        (["promote", "qafe-net", "99"], "no version 99"),
    ],
)
def test_registry_mistakes_get_one_line(champion: Sweep, line: list[str], words: str) -> None:
    refused = command(champion, "tracking.registry", *line)
    assert refused.returncode == 2
    assert refused.stderr.strip().startswith("error: ")
    assert len(refused.stderr.strip().splitlines()) == 1
    assert words in refused.stderr


@pytest.mark.slow
def test_a_killed_worker_costs_nothing(sample_root: Path, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, sample_root, "--trials", "2", "--set", "train.epochs=30", "--cpus-per-trial", "1")
    process = sweep.start()
    sweep.wait_for_epoch(5)
    workers = workers_of(process)
    assert workers, sweep.text
    os.kill(workers[0].pid, signal.SIGKILL)
    assert process.wait(timeout=400) == 0, sweep.text
    assert "lost its worker" in sweep.text
    summary = sweep.summary
    assert [row["state"] for row in summary["trials"]].count("failed") == 0
    assert any(row["state"] == "finished" and row["epochs"] == 30 for row in summary["trials"])
    for row in summary["trials"]:
        run = sweep.runs()[f"s-1-{row['trial']:03d}"]
        assert run.info.status == "FINISHED"
        assert sweep.steps(run) == list(range(1, row["epochs"] + 1))


@pytest.fixture
def interrupted(sample_root: Path, tmp_path: Path) -> Sweep:
    sweep = Sweep(tmp_path, sample_root, "--trials", "3", "--set", "train.epochs=12")
    process = sweep.start()
    sweep.wait_for_epoch(3)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=200) == 130, sweep.text
    return sweep


def test_ctrl_c_closes_the_runs_and_resume_finishes_them(interrupted: Sweep) -> None:
    sweep = interrupted
    assert "--resume --name s-1" in sweep.text
    assert "Traceback" not in sweep.text
    before = sweep.runs()
    assert before["s-1"].info.status == "KILLED"
    assert {run.info.status for run in before.values()} <= {"KILLED", "FINISHED"}
    assert not (sweep.folder / "summary.json").exists()

    refused = sweep.start("--resume", "--trials", "9")
    assert refused.wait(timeout=100) == 2
    assert "a sweep goes on as it was planned: s-1 with --trials 3, not 9" in sweep.text
    sweep.run("--resume", "--json", str(sweep.folder / "summary.json"))
    summary, after = sweep.summary, sweep.runs()
    assert [row["trial"] for row in sorted(summary["trials"], key=lambda row: row["trial"])] == [0, 1, 2]
    assert sorted(after) == ["s-1", "s-1-000", "s-1-001", "s-1-002"]
    assert {name: after[name].info.run_id for name in before} == {n: r.info.run_id for n, r in before.items()}
    assert {run.info.status for run in after.values()} == {"FINISHED"}
    for row in summary["trials"]:
        assert sweep.steps(after[f"s-1-{row['trial']:03d}"]) == list(range(1, row["epochs"] + 1))
    again = sweep.start("--resume")
    assert again.wait(timeout=100) == 2
    assert "s-1 is complete" in sweep.text


@pytest.mark.slow
def test_a_spent_time_budget_ends_the_sweep_with_its_report(sample_root: Path, tmp_path: Path) -> None:
    flags = ("--trials", "500", "--time-budget", "60", "--set", "train.epochs=1")
    sweep = Sweep(tmp_path, sample_root, *flags)
    sweep.run()
    summary = sweep.summary
    assert 1 <= summary["counts"]["finished"] < 500
    assert {run.info.status for run in sweep.runs().values()} == {"FINISHED"}
    study = open_study(Plan.load(tmp_path / "s-1"))
    assert all(trial.state.is_finished() for trial in study.trials)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["fusion_serch"], "Did you mean fusion_search"),
        ([], "a sweep needs a study"),
        (["fusion_search", "--set", "model.fusion.layer=2"], "Did you mean model.fusion.layers"),
        (["fusion_search", "--data-root", "nowhere"], "nowhere"),
        (["fusion_search", "--trials", "0"], "--trials must be greater than 0"),
        (["fusion_search", "--scheduler", "asha", "--objectives", "spearman,mae"], "Use --scheduler none"),
        (["fusion_search", "--objectives", "speed"], "objectives begin with spearman"),
        (["fusion_search", "--cpus-per-trial", "999"], "--cpus-per-trial must lie between 0 and"),
        (["fusion_search", "--seed", "-1"], "--seed must not be negative"),
        (["fusion_search", "--name", "it's"], "a sweep's name is made of letters"),
        (["fusion_search", "--address", "auto"], "say --preset and --gpus-per-trial"),
        (["fusion_search", "--json", "FILE/out.json"], "is a file"),
        (["fusion_search", "--set", "train.precision=fp16", "--data-root", "SAMPLE"], "fp16 needs a GPU"),
        (["fusion_search", "--set", "model.rgb.weights=none.pth", "--data-root", "SAMPLE"], "none.pth"),
        (["fusion_search", "--resume", "--name", "never"], "can be resumed"),
        (["fusion_search", "--data-root", "SAMPLE", "--tracking-uri", "SERVER"], "the tracking server must answer"),
    ],
)
def test_mistakes_are_found_before_anything_starts(
    flags: list[str],
    words: str,
    sample_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    places = {"SERVER": f"http://127.0.0.1:{free_port()}", "SAMPLE": str(sample_root), "FILE": str(tmp_path / "file")}
    for name, place in places.items():
        flags = [flag.replace(name, place) for flag in flags]
    assert main([*flags, "--storage", str(tmp_path / "storage")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [line for line in printed.err.splitlines() if line.startswith("error: ") and words in line]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_cluster_that_does_not_answer_leaves_no_sweep(
    sample_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data-root", str(sample_root), "--storage", str(tmp_path), "--tracking-uri", embedded(tmp_path)]
    flags += ["--address", f"127.0.0.1:{free_port()}", "--preset", "tiny", "--gpus-per-trial", "0"]
    assert main(["fusion_search", *flags]) == 2
    assert "Start a cluster with ray start --head" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_used_name_is_refused(
    done: Sweep, sample_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for storage in (done.folder, tmp_path / "elsewhere"):
        flags = ["--name", "s-1", "--storage", str(storage), "--tracking-uri", done.uri, *QUICK_FLAGS]
        assert main(["fusion_search", "--data-root", str(sample_root), *flags]) == 2
        assert "--resume --name s-1" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists()


def test_a_damaged_clip_stops_the_sweep_at_once_and_names_nobody(sample_root: Path, tmp_path: Path) -> None:
    shutil.copytree(sample_root, tmp_path / "data")
    frames = sorted((tmp_path / "data" / "frames").glob("*/*smile*/*.jpg"))
    for frame in frames:
        frame.write_bytes(frame.read_bytes()[:400])
    sweep = Sweep(tmp_path, tmp_path / "data", "--trials", "2")
    assert sweep.start().wait(timeout=300) == 2
    assert "failed (data): MediaError" in sweep.text
    assert "The sweep has stopped, for every trial would find it." in sweep.text
    runs = sweep.runs()
    assert runs["s-1"].info.status == "FAILED"
    assert "FAILED" in {run.info.status for name, run in runs.items() if name != "s-1"} <= {"FAILED", "KILLED"}
    everything = json.dumps([[run.data.params, run.data.tags] for run in runs.values()])
    assert "MediaError" in everything
    patients = [path.name for path in (sample_root / "frames").iterdir()]
    assert not [name for name in patients if f"{name}/" in everything or f"/{name}" in everything]


@pytest.mark.slow
def test_luck_is_found_out_on_shuffled_labels(sample_root: Path, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, sample_root, "--trials", "3", "--set", "data.shuffle_labels=true")
    sweep.run()
    luck = sweep.summary["luck"]
    assert luck["max_observed"] <= luck["threshold"]
    assert "NOT beyond" in sweep.text
