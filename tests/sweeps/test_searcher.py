import pickle
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from qafe.config import PRESETS, flatten, override, tiny
from qafe.errors import ConfigError
from sweeps.searcher import OBJECTIVE, RAY_TRIAL, StudySearcher, open_study
from sweeps.studies import STUDIES, find_study
from sweeps.sweep import Suggester

STUDY = STUDIES["fusion_search"]


@pytest.fixture
def searcher(tmp_path: Path) -> StudySearcher:
    return StudySearcher(STUDY, tiny(), frozenset(), tmp_path / "study.journal", "s-1", seed=0)


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
        STUDIES[name].space(Suggester(trial, base))
        assert set(trial.params) <= known
        override(base, trial.params)
        seen |= set(trial.params)
    assert seen == STUDIES[name].names(base)
    study.enqueue_trial(STUDIES[name].baseline(base))
    trial = study.ask()
    STUDIES[name].space(Suggester(trial, base))
    assert override(base, trial.params) == base


def test_heads_exist_only_where_something_attends() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=2))
    for kind, has_heads in (("cross", True), ("gated", True), ("concat", False), ("sum", False)):
        study.enqueue_trial({"model.fusion.kind": kind})
        trial = study.ask()
        STUDY.space(Suggester(trial, tiny()))
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


def test_a_fixed_setting_is_not_searched(tmp_path: Path) -> None:
    base = override(tiny(), {"model.fusion.kind": "concat", "data.heatmap.blur_px": 9})
    pinned = frozenset({"model.fusion.kind", "data.heatmap.blur_px"})
    searcher = StudySearcher(STUDY, base, pinned, tmp_path / "study.journal", "s-1", seed=0)
    for name in "abcdef":
        settings = searcher.suggest(name)["settings"]
        assert not pinned & set(settings)
        assert "model.fusion.heads" not in settings  # there is nothing that attends
        assert override(base, settings).data.heatmap.blur_px == 9


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing left to search"):
        STUDIES["heatmap_search"].baseline(tiny(), STUDIES["heatmap_search"].names(tiny()))
    with pytest.raises(ConfigError, match="must lie in the space of fusion_search"):
        STUDY.baseline(override(tiny(), {"data.heatmap.blur_px": 9}))
    narrow = override(tiny(), {"model.fusion.width": 36})
    assert STUDY.baseline(narrow)["model.fusion.heads"] == 4
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    for _ in range(30):
        trial = study.ask()
        STUDY.space(Suggester(trial, narrow))
        override(narrow, trial.params)


def test_a_reopened_study_does_not_repeat_itself(searcher: StudySearcher) -> None:
    first = [searcher.suggest(f"a{number}")["settings"] for number in range(5)]
    again = pickle.loads(pickle.dumps(searcher))
    second = [again.suggest(f"b{number}")["settings"] for number in range(4)]
    assert not [settings for settings in second if settings in first]


def test_a_refused_trial_is_a_failure(searcher: StudySearcher) -> None:
    searcher.suggest("a")
    searcher.on_trial_complete("a", {"epoch": 0, OBJECTIVE: -1.0, "refused": "MediaError: x", "finished": False})
    (trial,) = open_study(searcher.journal, "s-1").trials
    assert trial.state == TrialState.FAIL
    assert trial.intermediate_values == {}
