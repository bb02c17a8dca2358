"""What a sweep says about its trials, from studies and histories made by hand."""

import json
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from qafe.config import tiny
from qafe.data.cohort import load_cohort
from qafe.errors import MediaError
from qafe.history import Epoch, ExpressionHistory, write_history
from sweeps import page, report
from sweeps.checkpoints import SEAL_FILE, trial_name
from sweeps.results import OBJECTIVE
from sweeps.study import study_of_own
from tests.sweeps.plans import plan_in

SPACE = {"x": FloatDistribution(0, 1), "kind": CategoricalDistribution(["a", "b"])}


def study_of(values: list[tuple[TrialState, float]]) -> optuna.Study:
    """A study whose objective is x."""
    study = optuna.create_study(direction="maximize")
    for number, (state, value) in enumerate(values):
        study.add_trial(
            create_trial(
                state=state,
                value=value if state == TrialState.COMPLETE else None,
                params={"x": value, "kind": "ab"[number % 2]},
                distributions=SPACE,
                intermediate_values={1: value / 2, 2: value},
                user_attrs={"baseline": number == 0},
            )
        )
    return study


def checkpoint_of(sweep: Path, number: int) -> Path:
    folder = sweep / trial_name(number, 0) / "checkpoint_000000"
    folder.mkdir(parents=True)
    (folder / SEAL_FILE).touch()
    return folder


def history_in(
    folder: Path, predictions: list[list[float]], target: list[float], patients: list[str], clips: str = "c"
) -> Path:
    entry = ExpressionHistory(ids=[f"{clips}{i}" for i in range(len(target))], patients=patients, target=target)
    for number, row in enumerate(predictions, start=1):
        entry.epochs.append(Epoch(epoch=number, train_loss=1.0, metrics={"spearman": 0.0}, predictions=row))
    entry.best_epoch = 1
    write_history(folder, {"smile": entry})
    return folder


def test_trials_are_ordered_and_only_finished_ones_win(tmp_path: Path) -> None:
    study = study_of([(TrialState.COMPLETE, 0.3), (TrialState.PRUNED, 0.9), (TrialState.COMPLETE, 0.5)])
    for number in range(3):
        checkpoint_of(tmp_path, number)
    trials = report.summarise(study, tmp_path, {2: "run"})
    assert [(row.number, row.state, row.objective) for row in trials] == [
        (1, "pruned", 0.9),
        (2, "finished", 0.5),
        (0, "finished", 0.3),
    ]
    assert [row.baseline for row in trials] == [False, False, True]
    best = report.best_trial(trials)
    assert best is not None
    assert (best.number, best.run_id, best.epochs) == (2, "run", 2)
    assert best.checkpoint == tmp_path / "trial_002" / "checkpoint_000000"
    assert report.best_trial(report.summarise(study, tmp_path / "none", {})) is None


def test_importances_find_what_matters() -> None:
    values = [(TrialState.COMPLETE, number / 20) for number in range(20)]
    found = report.importances(study_of(values))
    assert set(found) == {"x", "kind"}
    assert found["x"] > found["kind"]
    assert report.importances(study_of(values[:3])) == {}


def test_luck_counts_every_epoch_of_every_trial(tmp_path: Path) -> None:
    target = [0.0, 1, 2, 3, 4, 0, 1, 2]
    patients = ["p1", "p1", "p2", "p2", "p3", "p3", "p4", "p4"]
    right, wrong = target, [-value for value in target]
    study = study_of([(TrialState.COMPLETE, 0.3), (TrialState.PRUNED, 0.2)])
    history_in(checkpoint_of(tmp_path / "s", 0), [wrong, wrong, right], target, patients)
    history_in(checkpoint_of(tmp_path / "s", 1), [wrong], target, patients)
    found = report.luck(report.summarise(study, tmp_path / "s", {}))
    assert found is not None
    band, numbers = found
    assert band.max_observed == pytest.approx(1)
    assert numbers == [0, 1]
    assert len(band.growth) == 2
    checkpoint_of(tmp_path / "lost", 0)  # its history is not there
    assert report.luck(report.summarise(study, tmp_path / "lost", {})) is None
    history_in(tmp_path / "s" / "trial_001" / "checkpoint_000000", [wrong], target, patients, clips="other")
    assert report.luck(report.summarise(study, tmp_path / "s", {})) is None


def test_luck_is_asked_about_the_trial_that_was_chosen(tmp_path: Path) -> None:
    target = [0.0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    patients = [f"p{number}" for number in range(10)]
    noise = [0.3, 0.9, 0.1, 0.5, 0.2, 0.8, 0.4, 0.7, 0.6, 0.0]
    study = study_of([(TrialState.COMPLETE, 0.1), (TrialState.PRUNED, 1.0)])
    history_in(checkpoint_of(tmp_path, 0), [noise], target, patients)
    history_in(checkpoint_of(tmp_path, 1), [target], target, patients)
    found = report.luck(report.summarise(study, tmp_path, {}))
    assert found is not None
    assert found[0].max_observed == pytest.approx(1)
    assert found[0].p_value > 0.2, "the best trial is not the one that was stopped"


def test_a_test_clip_that_cannot_be_read_costs_its_score_alone(
    sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreadable(*_: object) -> None:
        raise MediaError("a frame must be a JPEG, frames/Anna/7.jpg is not. Replace it.")

    monkeypatch.setattr(report, "test_best", unreadable)
    cohort = load_cohort(sample_root, tiny().data)
    history_in(checkpoint_of(tmp_path, 0), [[0.1, 0.2, 0.3]], [0.0, 1.0, 2.0], ["a", "b", "c"])
    trials = report.summarise(study_of([(TrialState.COMPLETE, 0.3)]), tmp_path, {})
    summary = report.sum_up(plan_in(tmp_path), cohort, trials, trials[0], 5.0)
    assert "Anna/7.jpg" in capsys.readouterr().err
    assert "Anna" not in json.dumps(summary)
    text = "\n".join(page.verdict(summary))
    assert "Test patients:    not scored (MediaError); the validation figure is optimistic" in text
    page.write_report(tmp_path / "report", trials, {}, summary)
    assert json.loads((tmp_path / "report" / "summary.json").read_text())["best"]["test_spearman"] is None


def test_the_best_trial_of_equal_ones_is_of_the_pareto_set(tmp_path: Path) -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    for number, (x, params) in enumerate([(0.8, 100.0), (0.8, 60.0), (0.5, 10.0)]):
        study.add_trial(create_trial(values=[x, params], params={"x": x, "kind": "a"}, distributions=SPACE))
        checkpoint_of(tmp_path, number)
    best = report.best_trial(report.summarise(study, tmp_path, {}))
    assert best is not None
    assert (best.number, best.pareto) == (1, True), "its weights are the last to be deleted"


def test_a_setting_that_is_a_path_shows_its_files_name(tmp_path: Path) -> None:
    space = {"model.rgb.weights": CategoricalDistribution(["", "/mnt/anna/a.pth"])}
    study = optuna.create_study()
    for value in ("", "/mnt/anna/a.pth"):
        study.add_trial(create_trial(value=0.0, params={"model.rgb.weights": value}, distributions=space))
    shown = [row.settings["model.rgb.weights"] for row in report.summarise(study, tmp_path, {})]
    assert shown == ["", "a.pth"]


def summary_with(observed: float, threshold: float, test: float | None) -> dict[str, object]:
    return {
        "sweep": "s-1",
        "expressions": ["smile"],
        "seconds": 12.0,
        "counts": {"finished": 2, "pruned": 0, "failed": 0},
        "best": {
            "trial": 1,
            OBJECTIVE: observed,
            "validation_interval": {"smile": (0.1, 0.7)},
            "test_spearman": test,
            "test_interval": {"smile": (-1.0, 1.0)} if test is not None else {},
        },
        "luck": {"max_observed": observed, "threshold": threshold, "expected_max": 0.2, "p_value": 0.5}
        | {"growth": [], "trials": []},
        "noise": None,
        "cost": {"unit": "worker-hours", "share": 1.0},
        "complete": True,
        "planned": 4,
        "splits": 1,
        "objectives": ["spearman"],
        "trials": [],
    }


def test_the_verdict_trusts_only_what_is_beyond_luck() -> None:
    beyond = "\n".join(page.verdict(summary_with(0.6, 0.5, 0.4)))
    assert "the best is beyond that" in beyond
    assert "Spearman 0.400 (95 % over patients: smile: too few patients to say)" in beyond
    assert "smile 0.10 to 0.70" in beyond
    within = "\n".join(page.verdict(summary_with(0.5, 0.5, None)))
    assert "NOT beyond" in within
    assert "no test clips" in within
    running = "\n".join(page.verdict(summary_with(0.6, 0.5, None) | {"complete": False}))
    assert "2 of 4 planned trials have ended" in running
    assert "not looked at before the end" in running
    none = page.verdict(summary_with(0.6, 0.5, None) | {"complete": False, "best": None})
    assert not [line for line in none if "Luck" in line or "Best" in line]


def test_an_unfinished_report_has_no_summary(tmp_path: Path) -> None:
    trials = report.summarise(study_of([(TrialState.COMPLETE, 0.3)]), tmp_path, {})
    for complete in (True, False):  # an extension is drawn over the report before it
        page.write_report(tmp_path / "report", trials, {}, summary_with(0.3, 0.5, None) | {"complete": complete})
        assert (tmp_path / "report" / "summary.json").exists() is complete
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report"]


def test_the_report_is_one_page_and_files_for_programs(tmp_path: Path) -> None:
    study = study_of([(TrialState.COMPLETE, 0.3), (TrialState.PRUNED, 0.1)])
    trials = report.summarise(study, tmp_path, {})
    page.write_report(tmp_path / "report", trials, {"x": 0.75}, summary_with(0.6, 0.5, 0.4))
    text = (tmp_path / "report" / "report.html").read_text()
    for title in ("Importance of each setting", "Parallel coordinates", "All trials", "Luck:"):
        assert title in text
    assert json.loads((tmp_path / "report" / "importances.json").read_text()) == {"x": 0.75}
    rows = (tmp_path / "report" / "best_trials.csv").read_text().splitlines()
    assert rows[0] == f"trial,state,{OBJECTIVE},epochs,baseline,x,kind"
    assert rows[1] == "0,finished,0.3000,2,True,0.3,a"


def test_several_objectives_have_a_pareto_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        study.set_metric_names(["spearman", "params"])
    rows = [(0.5, 900.0, {}), (0.4, 200.0, {}), (0.3, 300.0, {}), (0.9, 100.0, {"warm_start": "s-0#1"})]
    for x, params, attrs in rows:
        study.add_trial(
            create_trial(values=[x, params], params={"x": x, "kind": "a"}, distributions=SPACE, user_attrs=attrs)
        )
    failed = {"failure": "diverged"}
    study.add_trial(
        create_trial(state=TrialState.FAIL, params={"x": 0.1, "kind": "a"}, distributions=SPACE, user_attrs=failed)
    )
    trials = report.summarise(study, tmp_path, {})
    assert [(row.number, row.state, row.pareto) for row in trials] == [
        (0, "finished", True),
        (1, "finished", True),
        (2, "finished", False),
        (4, "pruned", False),
    ]  # what an earlier sweep found is not this sweep's
    assert trials[1].values == {"spearman": 0.4, "params": 200.0}
    shown = [
        {"trial": row.number, "state": row.state, OBJECTIVE: row.objective, "epochs": 1, "baseline": False}
        | {"pareto": row.pareto, "values": row.values, "settings": row.settings}
        for row in trials
    ]
    summary = summary_with(0.5, 0.4, None) | {"objectives": ["spearman", "params"], "trials": shown}
    page.print_table(summary, shown=1)
    printed = capsys.readouterr().out
    assert "Pareto set:       0, 1: no other trial is as good in all of spearman, params" in printed
    assert [line.split()[:6] for line in printed.splitlines() if "finished" in line and "*" in line] == [
        ["0", "finished", "0.500", "900", "*", "1"],
        ["1", "finished", "0.400", "200", "*", "1"],
    ]
    page.write_report(tmp_path / "report", trials, report.importances(study), summary)
    assert "2 trials in the Pareto set" in (tmp_path / "report" / "report.html").read_text()
    lines = (tmp_path / "report" / "best_trials.csv").read_text().splitlines()
    assert lines[0] == f"trial,state,{OBJECTIVE},params,pareto,epochs,baseline,x,kind"
    assert lines[1] == "0,finished,0.5000,900,True,0,False,0.5,a"


def test_trials_of_earlier_sweeps_are_not_in_the_report(tmp_path: Path) -> None:
    study = study_of([(TrialState.COMPLETE, number / 20) for number in range(4)])
    study.add_trial(
        create_trial(value=0.9, params={"x": 0.9, "kind": "a"}, distributions=SPACE, user_attrs={"warm_start": "s-0#1"})
    )
    assert [row.number for row in report.summarise(study, tmp_path, {})] == [3, 2, 1, 0]
    assert {trial.value for trial in study_of_own(study).trials} == {0.0, 0.05, 0.1, 0.15}
