import pickle
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from qafe.config import PRESETS, flatten, override, tiny
from qafe.errors import ConfigError
from sweeps.searcher import OBJECTIVE, RAY_TRIAL, StudySearcher, open_study
from sweeps.studies import STUDIES, find_study

STUDY = STUDIES["fusion_search"]


@pytest.fixture
def searcher(tmp_path: Path) -> StudySearcher:
    return StudySearcher(STUDY, tiny(), tmp_path / "study.journal", "s-1", seed=0)


def result(epoch: int, objective: float, finished: bool = False) -> dict[str, object]:
    return {"epoch": epoch, OBJECTIVE: objective, "finished": finished}


def test_the_presets_own_settings_come_first(searcher: StudySearcher) -> None:
    first = searcher.suggest("a")
    flat = flatten(tiny())
    assert first["number"] == 0
    assert first["settings"] == {name: flat[name] for name in first["settings"]}
    assert {"model.fusion.layers", "data.heatmap.sigma_px"} <= set(first["settings"])
    second = searcher.suggest("b")
    assert second["settings"] != first["settings"]


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_point_of_every_study_is_a_config(name: str, preset: str) -> None:
    base = PRESETS[preset]()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    known = set(flatten(base))
    seen = set()
    for _ in range(100):
        trial = study.ask()
        STUDIES[name].space(trial, base)
        assert set(trial.params) <= known
        override(base, trial.params)
        seen |= set(trial.params)
    assert seen == STUDIES[name].names(base)
    study.enqueue_trial(STUDIES[name].baseline(base))
    trial = study.ask()
    STUDIES[name].space(trial, base)
    assert override(base, trial.params) == base


def test_heads_exist_only_where_something_attends() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=2))
    for kind, has_heads in (("cross", True), ("gated", True), ("concat", False), ("sum", False)):
        study.enqueue_trial({"model.fusion.kind": kind})
        trial = study.ask()
        STUDY.space(trial, tiny())
        assert ("model.fusion.heads" in trial.params) is has_heads


def test_optuna_hears_how_each_trial_really_ended(searcher: StudySearcher) -> None:
    for name in "abcd":
        searcher.suggest(name)
    for name in "abc":
        searcher.on_trial_result(name, result(1, 0.1))
    searcher.on_trial_complete("a", result(2, 0.4, finished=True))
    searcher.on_trial_complete("b", result(2, 0.2))
    searcher.on_trial_complete("c", result(1, 0.1), error=True)
    searcher.on_trial_complete("d", None, error=True)
    searcher.on_trial_complete("a", result(2, 0.4, finished=True))  # said twice: no harm
    trials = open_study(searcher.journal, "s-1").trials
    assert [trial.state for trial in trials] == [
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.FAIL,
        TrialState.FAIL,
    ]
    assert trials[0].value == 0.4
    assert trials[1].intermediate_values == {1: 0.1, 2: 0.2}
    assert [trial.user_attrs[RAY_TRIAL] for trial in trials] == ["a", "b", "c", "d"]


def test_a_restored_searcher_goes_on_with_its_open_trials(searcher: StudySearcher, tmp_path: Path) -> None:
    searcher.suggest("a")
    searcher.on_trial_result("a", result(1, 0.1))
    searcher.save(str(tmp_path / "saved"))
    searcher.suggest("late")  # after the snapshot: Ray does not know it after a crash
    again = pickle.loads(pickle.dumps(searcher))
    again.restore(str(tmp_path / "saved"))
    again.on_trial_result("a", result(1, 0.1))  # repeated from the checkpoint
    again.on_trial_result("a", result(2, 0.3))
    again.on_trial_complete("a", result(3, 0.5, finished=True))
    first, late = open_study(searcher.journal, "s-1").trials
    assert first.state == TrialState.COMPLETE
    assert first.intermediate_values == {1: 0.1, 2: 0.3, 3: 0.5}
    assert late.state == TrialState.FAIL
    assert again.suggest("next")["number"] == 2


def test_an_unknown_study_offers_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean fusion_search"):
        find_study("fusion_serch")
