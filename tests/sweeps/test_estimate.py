"""What a sweep would cost and whether it fits: dry run, memory, budget."""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import torch

import sweeps.draft
import sweeps.room
from qafe.config import Config, tiny
from qafe.dotted import flatten, from_json, override
from qafe.footprint import training_memory
from sweeps.calibration import Machine, Timing
from sweeps.command import _parser, main
from sweeps.draft import draft_plan
from sweeps.estimate import Calibration, Cost, describe_space, draw_configs, simulate
from sweeps.plan import Plan
from sweeps.progress import SECONDS
from sweeps.results import OBJECTIVE
from sweeps.room import fitting, side_by_side, surely_fits, with_half_the_batch
from sweeps.searcher import StudySearcher, budget_used
from sweeps.studies import STUDIES
from sweeps.study import BASELINE, PRUNERS
from sweeps.trial import TrialPlan, _as_fits
from tests.conftest import QUICK_FLAGS
from tests.sweeps.running import ROOT
from tests.sweeps.test_sweep import Sweep
from tests.tracking.stores import embedded

STUDY = STUDIES["fusion_search"]
CPU = torch.device("cpu")


def options(sample_root: Path, *flags: str) -> argparse.Namespace:
    line = ["fusion_search", "--data-root", str(sample_root), "--preset", "tiny", *QUICK_FLAGS, *flags]
    return _parser().parse_args(line)


@pytest.fixture
def plan(sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(sweeps.draft, "_check_memory", lambda *_: 10**6)
    return draft_plan(options(sample_root, "--trials", "8", "--set", "train.epochs=9"), STUDY, tmp_path / "storage")


def timing(epoch_s: float = 2.0) -> Timing:
    return Timing(
        number=0, epoch_s=epoch_s, warm_up_s=0.5, start_s=0.1, save_s=0.05, peak_memory_mb=400.0, clips_share=1.0
    )


def cost(plan: Plan, scheduler: str, workers: int = 2) -> Cost:
    config = from_json(plan.config_json)
    return simulate(plan, config, [timing(), timing(), timing()], workers, 12.0, PRUNERS[scheduler])


def test_without_early_stopping_every_trial_has_all_epochs(plan: Plan) -> None:
    found = cost(plan, "none")
    assert found.epochs == 8 * 9
    assert found.hours == pytest.approx(8 * (9 * 2.0 + 0.5) / 3600)
    assert found.low_hours == pytest.approx(found.high_hours) == pytest.approx(found.hours)
    assert found.wall_s == pytest.approx(12 + found.hours * 3600 / 2, rel=0.1)
    assert cost(plan, "none", workers=1).wall_s == pytest.approx(12 + found.hours * 3600, rel=0.1)


@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "median"])
def test_early_stopping_saves_but_gives_each_trial_its_first_epochs(plan: Plan, scheduler: str) -> None:
    found = cost(plan, scheduler)
    assert 9 + 7 * plan.grace_epochs <= found.epochs < 8 * 9, "the baseline is never stopped"
    assert found.low_hours <= found.hours <= found.high_hours


def test_the_space_is_described_without_what_is_pinned() -> None:
    found = describe_space(STUDY, tiny(), frozenset({"data.heatmap.colour"}))
    assert set(found) == STUDY.names(tiny()) - {"data.heatmap.colour"}
    assert found["model.fusion.layers"] == "1 to 4"
    assert found["data.heatmap.points"] == "all, eyes_brows, mouth, nose"


def test_draws_begin_with_the_baseline(plan: Plan) -> None:
    drawn = draw_configs(plan, STUDY, 6)
    assert drawn[0] == from_json(plan.config_json)
    assert len({str(flatten(config)) for config in drawn}) == 6


@pytest.mark.parametrize(
    ("machine", "per_trial", "expected"),
    [
        ((8, 0), (1, 0), 8),
        ((8, 0), (3, 0), 2),
        ((1, 0), (2, 0), 0),
        ((8, 2), (1, 1), 2),
        ((1, 2), (1, 1), 1),
        ((8, 0), (1, 1), 0),
        ((8, 2), (1, 0.4), 4),  # two on each GPU: none has parts of both
        ((8, 3), (1, 2), 1),
        ((64, 8), (0.1, 0.1), 80),  # 1 / 0.1 is a little less than 10 for some tenths
        ((3, 0), (0.3, 0), 10),
    ],
)
def test_trials_have_their_place_on_one_machine(
    machine: tuple[float, float], per_trial: tuple[float, float], expected: int
) -> None:
    assert side_by_side(*machine, *per_trial) == expected


def test_a_dry_run_says_it_all_and_writes_nothing(
    sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = override(tiny(), {"train.batch_size": 4})
    machine = Machine(device="cpu", load=0.5, step=training_memory(config), process_mb=500.0, room_mb=900.0)
    found = Calibration([timing(), timing(3.0)], [machine, machine], 4.0)
    monkeypatch.setattr("sweeps.estimate.calibrate", lambda *_: found)
    monkeypatch.setattr("sweeps.estimate.joined", lambda _: contextlib.nullcontext())
    monkeypatch.chdir(tmp_path)
    flags = ["--dry-run", "--trials", "5", "--budget-gpu-hours", "0.001", "--storage", str(tmp_path / "storage")]
    line = ["fusion_search", "--data-root", str(sample_root), "--preset", "tiny", *QUICK_FLAGS]
    assert main([*line, *flags, "--tracking-uri", embedded(tmp_path), "--json", str(tmp_path / "dry.json")]) == 0
    text = capsys.readouterr().out
    for words in ("model.fusion.kind", "cross, cross_split", "1 CPU", "seconds per epoch", "400 MB measured",
                  "worker-hours", "without early stopping", "ends it early", "Nothing was written"):  # fmt: skip
        assert words in text
    assert [path.name for path in tmp_path.iterdir()] == ["dry.json"]
    found = json.loads((tmp_path / "dry.json").read_text())
    assert found["without_early_stopping"]["epochs"] == 15
    assert found["baseline"]["model.fusion.layers"] == 1
    assert found["memory"]["estimated_step_mb"]["total"] > 1


def test_a_batch_that_does_not_fit_is_halved_before_it_runs(quick: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps.room, "trial_bytes", lambda config, *_: 1000 * config.train.batch_size)
    config = override(quick, {"train.batch_size": 8})
    assert fitting(config, CPU, 8000) == config
    smaller = fitting(config, CPU, 2500).train
    assert (smaller.batch_size, smaller.accumulate) == (2, 4)
    with pytest.raises(MemoryError, match="a batch of 1 would need"):
        fitting(config, CPU, 999)
    assert with_half_the_batch(fitting(config, CPU, 1000)) is None


def test_a_trial_is_looked_at_closely_only_where_memory_is_short(quick: Config) -> None:
    assert surely_fits(quick, quick, 100, 400)
    assert not surely_fits(quick, quick, 100, 399)
    assert not surely_fits(override(quick, {"train.batch_size": 8}), quick, 100, 799)
    assert not surely_fits(quick, quick, 0, 10**12), "nothing is known of the baseline"


def test_a_trial_starts_with_the_batch_that_fits(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = TrialPlan(
        base_json=plan.config_json,
        data_root=plan.data_root,
        expressions=plan.expressions,
        threads=1,
        gpus=0.0,
        folder=plan.folder,
        trials=8,
        cpus=1.0,
        baseline_bytes=10**6,
    )
    config = from_json(plan.config_json)
    assert _as_fits(config, shared) == config
    monkeypatch.setattr("sweeps.trial.room_bytes", lambda *_: 3000)
    monkeypatch.setattr(sweeps.room, "trial_bytes", lambda config, *_: 1000 * config.train.batch_size)
    smaller = _as_fits(config, shared).train
    assert (smaller.batch_size, smaller.accumulate) == (2, 2)


def test_a_baseline_that_fits_nowhere_is_refused_in_one_line(
    sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweeps.draft, "room_bytes", lambda *_: 10**6)
    line = ["fusion_search", "--data-root", str(sample_root), "--preset", "tiny", *QUICK_FLAGS]
    assert main([*line, "--storage", str(tmp_path / "storage"), "--tracking-uri", embedded(tmp_path)]) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert "the baseline must fit in memory: a batch of 1 would need" in errors[0]
    assert not list(tmp_path.iterdir())


@pytest.fixture
def searcher(sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudySearcher:
    monkeypatch.setattr(sweeps.draft, "_check_memory", lambda *_: 0)
    flags = ("--trials", "50", "--budget-gpu-hours", "1", "--set", "train.epochs=10")
    plan = draft_plan(options(sample_root, *flags), STUDY, tmp_path)
    Path(plan.folder).mkdir()
    return StudySearcher(plan, STUDY)


def train(searcher: StudySearcher, name: str, epochs: int, epoch_s: float, of: int = 10) -> None:
    for epoch in range(1, epochs + 1):
        result = {"epoch": epoch, OBJECTIVE: 0.1, "finished": epoch == of, "epoch_s": epoch_s}
        searcher.report(name, result)
    if epochs == of:
        searcher.on_trial_complete(name, result)


def test_the_budget_lets_no_trial_begin_that_would_not_fit(searcher: StudySearcher) -> None:
    for name in "ab":
        assert isinstance(searcher.suggest(name), dict), "what a trial needs is not known yet"
    train(searcher, "a", 10, epoch_s=100)
    train(searcher, "b", 4, epoch_s=100)
    # 1400 s used, 600 s left in b, 1000 s for one more: 3000 of 3600
    assert isinstance(searcher.suggest("c"), dict)
    assert searcher.suggest("d") is None, "c may be stopped early, or b"
    searcher.on_trial_complete("b", {"epoch": 4, OBJECTIVE: 0.1})  # stopped early
    assert isinstance(searcher.suggest("d"), dict)
    train(searcher, "c", 10, epoch_s=100)
    train(searcher, "d", 10, epoch_s=100)
    assert searcher.suggest("e") == "FINISHED"
    assert searcher.closed is not None
    assert searcher.closed.kind == "budget"
    assert "the budget of 1 worker-hours ended the sweep" in searcher.closed.reason
    assert budget_used(searcher.study, searcher.plan) == pytest.approx(3400 / 3600)


def test_hours_of_an_earlier_driver_count(searcher: StudySearcher) -> None:
    searcher.suggest("a")
    train(searcher, "a", 10, epoch_s=340)
    resumed = StudySearcher(searcher.plan, STUDY)
    assert resumed.study.trials[0].user_attrs[SECONDS] == 3400
    assert resumed.study.trials[0].user_attrs[BASELINE]
    assert resumed.suggest("b") == "FINISHED"
    assert optuna.trial.TrialState.RUNNING not in {trial.state for trial in resumed.study.trials}


@pytest.mark.slow
def test_a_spent_budget_ends_the_sweep_with_its_report(sample_root: Path, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, sample_root, "--trials", "50", "--budget-gpu-hours", "0.0003", "--preset", "tiny")
    sweep.run()
    assert "Ended early:      the budget of 0.0003 worker-hours ended the sweep" in sweep.text
    summary = sweep.summary
    assert 1 <= len(summary["trials"]) < 50
    assert "budget" in summary["ended_by"]
    assert summary["training_hours"] > 0


@pytest.mark.slow
def test_a_sweep_of_the_sample_dataset_costs_what_was_estimated(tmp_path: Path) -> None:
    """Early stopping included, whose luck alone makes it cheaper or dearer by some 15 %."""
    flags = ["fusion_search", "--preset", "tiny", "--storage", str(tmp_path), "--tracking-uri", embedded(tmp_path)]
    for more in (["--dry-run"], ["--name", "s-1"]):
        line = [sys.executable, "-m", "sweeps.run", *flags, *more, "--json", str(tmp_path / f"{more[0]}.json")]
        subprocess.run(line, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=900)
    estimated, real = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("--dry-run", "--name"))
    assert real["training_hours"] == pytest.approx(estimated["with_early_stopping"]["hours"], rel=0.25)
