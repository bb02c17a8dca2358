"""What a new sweep takes over from earlier ones, and what it does not."""

from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from qafe.config import tiny
from qafe.dotted import override
from sweeps.plan import Plan
from sweeps.report import summarise
from sweeps.searcher import StudySearcher
from sweeps.studies import STUDIES
from sweeps.study import WARM_START, own_trials
from tests.sweeps.plans import finish, plan_in, result

FUSION, HEATMAP = STUDIES["fusion_search"], STUDIES["heatmap_search"]


@pytest.fixture
def earlier(tmp_path: Path) -> Plan:
    """Four finished trials of the fusion search, a pruned one, one that failed and one that runs."""
    plan = plan_in(tmp_path, "old-1")
    searcher = StudySearcher(plan, FUSION)
    for name in "abcdefg":
        searcher.suggest(name)
    for place, name in enumerate("abcd"):
        finish(searcher, name, 0.2 * place)
    searcher.study._storage.set_trial_intermediate_value(searcher._open["e"]._trial_id, 1, 0.1)
    searcher.on_trial_complete("e", result(1, 0.1))
    searcher.on_trial_complete("f", None, error=True)
    return plan


def new_sweep(storage: Path, *earlier: Plan, **changes: object) -> Plan:
    return plan_in(storage, "new-1", warm_start=tuple(plan.folder for plan in earlier), trials=3, **changes)


def test_trials_that_fit_are_taken_behind_the_baseline(
    earlier: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = new_sweep(tmp_path, earlier)
    searcher = StudySearcher(plan, FUSION)
    assert capsys.readouterr().err.strip() == "warm start: 5 trials of old-1; 1 refused: failed; 1 refused: not ended"
    trials = searcher.study.trials
    assert [trial.state for trial in trials] == [TrialState.WAITING, *[TrialState.COMPLETE] * 4, TrialState.PRUNED]
    assert [trial.user_attrs.get(WARM_START) for trial in trials] == [None, *(f"old-1#{n}" for n in range(5))]
    old = optuna.load_study(study_name="old-1", storage=StudySearcher(earlier, FUSION).study._storage).trials
    assert [trial.params for trial in trials[1:]] == [trial.params for trial in old[:5]]
    assert [trial.values for trial in trials[1:5]] == [trial.values for trial in old[:4]]
    assert trials[5].intermediate_values == {1: 0.1}
    assert own_trials(searcher.study) == []

    first = searcher.suggest("a")
    assert first["number"] == 0  # the baseline
    assert [searcher.suggest(name)["number"] for name in "bc"] == [6, 7]
    assert isinstance(searcher.suggest("d"), str)  # all three that were planned
    assert [row.number for row in summarise(searcher.study, tmp_path, {})] == [0, 6, 7]

    again = StudySearcher(plan, FUSION)  # resumed: nothing is added again
    assert capsys.readouterr().err == ""
    assert len(again.study.trials) == 8


def test_a_driver_that_died_while_adding_adds_the_rest(earlier: Plan, tmp_path: Path) -> None:
    plan = new_sweep(tmp_path, earlier)
    study = StudySearcher(plan, FUSION).study
    study.set_user_attr("warm_started", False)
    assert len(StudySearcher(plan, FUSION).study.trials) == len(study.trials) == 6


@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "median"])
def test_they_stop_no_trial_of_the_new_sweep(scheduler: str, earlier: Plan, tmp_path: Path) -> None:
    with_them = StudySearcher(new_sweep(tmp_path, earlier, scheduler=scheduler), FUSION)
    without = StudySearcher(plan_in(tmp_path, "alone-1", trials=3, scheduler=scheduler), FUSION)
    for searcher in (with_them, without):
        for name in "abc":
            searcher.suggest(name)
    for name, scores in (("a", (0.0, 0.0)), ("b", (-0.5, -0.5)), ("c", (-0.9, -0.9))):
        for epoch, score in enumerate(scores, start=1):
            assert with_them.report(name, result(epoch, score)) == without.report(name, result(epoch, score))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data_digest": "other"}, "it had other data"),
        ({"expressions": ("frown",)}, "it was of smile"),
        ({"objectives": ("spearman", "params")}, "its objectives were spearman"),
    ],
)
def test_another_sweeps_scores_are_refused_together(
    changes: dict[str, object], reason: str, earlier: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    StudySearcher(new_sweep(tmp_path, earlier, **changes), FUSION)
    assert capsys.readouterr().err.strip() == f"warm start: 0 trials of old-1; 7 refused: {reason}"


def test_another_base_is_refused_unless_it_changes_no_number(
    earlier: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    StudySearcher(new_sweep(tmp_path, earlier, base=override(tiny(), {"train.epochs": 5})), FUSION)
    assert "0 trials of old-1; 5 refused: train.epochs is another and not searched here" in capsys.readouterr().err
    plan = plan_in(tmp_path, "new-2", base=override(tiny(), {"data.workers": 3}), warm_start=(earlier.folder,))
    StudySearcher(plan, FUSION)
    assert "5 trials of old-1" in capsys.readouterr().err


def test_settings_may_be_searched_in_one_sweep_and_fixed_in_the_other(
    earlier: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    StudySearcher(new_sweep(tmp_path, earlier), HEATMAP)
    said = capsys.readouterr().err
    assert "1 trials of old-1" in said  # the baseline alone has the preset's fusion
    assert "is another" in said
    heatmaps = plan_in(tmp_path, "heat-1", study="heatmap_search")
    searcher = StudySearcher(heatmaps, HEATMAP)
    sizes = []
    for name in "abcdefgh":
        sizes.append(searcher.suggest(name)["settings"]["model.heatmap.size_px"])  # type: ignore[index]
        finish(searcher, name, 0.1)
    same = sizes.count(tiny().model.heatmap.size_px)
    taken = StudySearcher(plan_in(tmp_path, "new-3", warm_start=(heatmaps.folder,)), FUSION).study.trials[1:]
    assert len(taken) == same
    assert all("model.fusion.kind" in trial.params for trial in taken)  # the preset's, which was fixed there
    assert f"{8 - same} refused: model.heatmap.size_px is another" in capsys.readouterr().err


def test_values_outside_of_the_new_space_are_refused(
    earlier: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = plan_in(tmp_path, "new-2", pinned=("data.heatmap.points",), warm_start=(earlier.folder,))
    StudySearcher(narrow, FUSION)
    assert "refused: data.heatmap.points is another" in capsys.readouterr().err
    wide = plan_in(tmp_path, "old-2", base=override(tiny(), {"data.heatmap.sigma_px": 9.0}))
    searcher = StudySearcher(wide, STUDIES["seed_noise"])
    searcher.suggest("a")
    finish(searcher, "a", 0.1)
    StudySearcher(plan_in(tmp_path, "new-3", warm_start=(wide.folder,)), FUSION)
    assert "1 refused: data.heatmap.sigma_px is outside of the space" in capsys.readouterr().err


def test_the_sampler_learns_from_them(earlier: Plan, tmp_path: Path) -> None:
    """Thirty earlier trials say that a small sigma is good: TPE asks for small ones at once."""
    plan = plan_in(tmp_path, "many-1", trials=40)
    searcher = StudySearcher(plan, HEATMAP)
    for number in range(30):
        settings = searcher.suggest(str(number))["settings"]  # type: ignore[index]
        finish(searcher, str(number), -settings["data.heatmap.sigma_px"])
    warm = StudySearcher(plan_in(tmp_path, "warm-1", warm_start=(plan.folder,), seed=1), HEATMAP)
    cold = StudySearcher(plan_in(tmp_path, "cold-1", seed=1), HEATMAP)
    means = []
    for each in (warm, cold):
        asked = [each.suggest(str(number))["settings"]["data.heatmap.sigma_px"] for number in range(9)]  # type: ignore[index]
        means.append(sum(asked[1:]) / 8)
    assert means[0] < 1.0 < means[1]
