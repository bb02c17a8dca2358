import errno
import os
import pickle
from pathlib import Path

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray.tune.search import Searcher

from qafe.config import PRESETS, tiny
from qafe.dotted import flatten, override
from qafe.errors import ConfigError
from sweeps.plan import Plan
from sweeps.results import OBJECTIVE
from sweeps.searcher import StudySearcher
from sweeps.studies import STUDIES, find_study
from sweeps.study import FAILURE, JOURNAL_FILE, open_study, read_study, running_trials
from tests.sweeps.plans import ask, plan_in, result

STUDY = STUDIES["fusion_search"]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return plan_in(tmp_path)


@pytest.fixture
def searcher(plan: Plan) -> StudySearcher:
    return StudySearcher(plan, STUDY)


def test_the_presets_own_settings_come_first(searcher: StudySearcher) -> None:
    first = searcher.suggest("a")
    flat = flatten(tiny())
    assert first["number"] == 0
    assert first["settings"] == {name: flat[name] for name in first["settings"]}
    assert {"model.fusion.layers", "data.heatmap.sigma_px"} <= set(first["settings"])
    second = searcher.suggest("b")
    assert second["settings"] != first["settings"]


def test_workers_start_side_by_side_and_then_one_trial_waits(plan: Plan) -> None:
    searcher = StudySearcher(plan, STUDY, places=3)
    assert [searcher.suggest(name)["number"] for name in "abc"] == [0, 1, 2]
    assert searcher.suggest("d") is None, "three are on their way to three places"
    for name in "abc":
        searcher.placed(name)
    assert searcher.suggest("d")["number"] == 3
    assert searcher.suggest("e") is None, "d is not placed yet"
    searcher.on_trial_complete("a", result(1, 0.5, finished=True))
    assert searcher.suggest("e") is None, "a's place is for d"
    searcher.placed("d")
    assert searcher.suggest("e")["number"] == 4


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_point_of_every_study_is_a_config(name: str, preset: str) -> None:
    base = PRESETS[preset]()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    known = set(flatten(base))
    seen = set()
    for _ in range(100):
        trial = ask(study, STUDIES[name], base)
        assert set(trial.params) <= known
        override(base, trial.params)
        seen |= set(trial.params)
    assert seen == STUDIES[name].names(base)
    STUDIES[name].check(base)
    study.enqueue_trial(STUDIES[name].baseline(base))
    assert override(base, ask(study, STUDIES[name], base).params) == base


def test_heads_exist_only_where_something_attends() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=2))
    for kind, has_heads in (("cross", True), ("gated", True), ("concat", False), ("sum", False)):
        study.enqueue_trial({"model.fusion.kind": kind})
        assert ("model.fusion.heads" in ask(study, STUDY, tiny()).params) is has_heads


def test_optuna_hears_how_each_trial_really_ended(searcher: StudySearcher, plan: Plan) -> None:
    for name in "abcd":
        searcher.suggest(name)
    for name in "abc":
        searcher.report(name, result(1, 0.1))
    searcher.report("a", result(2, 0.4, finished=True))
    searcher.on_trial_complete("a", result(2, 0.4, finished=True))
    searcher.report("b", result(2, 0.2))
    searcher.on_trial_complete("b", result(2, 0.2))
    searcher.on_trial_complete("c", result(1, 0.1), error=True)
    searcher.on_trial_complete("d", None, error=True)
    searcher.on_trial_complete("a", result(2, 0.4, finished=True))  # said twice: no harm
    trials = open_study(plan).trials
    assert [trial.state for trial in trials] == [
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.FAIL,
        TrialState.FAIL,
    ]
    assert trials[0].value == 0.4
    assert trials[1].intermediate_values == {1: 0.1, 2: 0.2}
    assert [trial.user_attrs.get(FAILURE) for trial in trials] == [None, None, "lost", "lost"]


def test_a_new_driver_goes_on_with_the_trials_that_were_running(searcher: StudySearcher, plan: Plan) -> None:
    first = searcher.suggest("a")
    searcher.report("a", result(1, 0.1))
    late = searcher.suggest("late")  # no epoch of it was heard
    again = StudySearcher(plan, STUDY)  # the first driver is dead
    assert again.suggest("b") == first | {"epochs": 1, "attempt": 1}
    assert again.suggest("c") == late | {"attempt": 1}
    again.report("b", result(1, 0.1))  # repeated from the checkpoint
    again.report("b", result(2, 0.3))
    again.report("b", result(3, 0.5, finished=True))
    again.on_trial_complete("b", result(3, 0.5, finished=True))
    done, open_trial = open_study(plan).trials
    assert done.state == TrialState.COMPLETE
    assert done.intermediate_values == {1: 0.1, 2: 0.3, 3: 0.5}
    assert open_trial.state == TrialState.RUNNING
    assert again.suggest("next")["number"] == 2


@pytest.mark.parametrize("cut", [1, 10])
def test_half_a_line_at_the_journals_end_costs_one_entry(searcher: StudySearcher, plan: Plan, cut: int) -> None:
    for name in "ab":
        searcher.suggest(name)
        searcher.report(name, result(1, 0.5, finished=True))
    journal = Path(plan.folder) / JOURNAL_FILE
    os.truncate(journal, journal.stat().st_size - cut)  # as a machine leaves it that loses its power
    again = StudySearcher(plan, STUDY)
    first, second = again.suggest("a"), again.suggest("b")
    assert (first["epochs"], second["epochs"]) == (1, 0)
    again.report("b", result(1, 0.25))
    study = read_study(Path(plan.folder), plan.name)
    assert study is not None
    assert [trial.intermediate_values for trial in study.trials] == [{1: 0.5}, {1: 0.25}]


def test_a_line_that_does_not_fit_on_the_disk_leaves_no_half(
    searcher: StudySearcher, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Path(plan.folder) / JOURNAL_FILE
    before = journal.read_bytes()

    def full(self: JournalFileBackend, logs: list[object]) -> None:
        with open(journal, "ab") as out:
            out.write(b'{"op_code"')
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(JournalFileBackend, "append_logs", full)
        with pytest.raises(OSError, match="No space"):
            searcher.study.set_user_attr("a", 1)
    assert journal.read_bytes() == before
    searcher.suggest("a")
    assert read_study(Path(plan.folder), plan.name) is not None


def test_a_database_may_hold_another_sweep_of_this_name(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    mine, theirs = (plan_in(tmp_path / who, id=who, study_storage=url) for who in ("mine", "theirs"))
    StudySearcher(mine, STUDY).suggest("a")
    with pytest.raises(ConfigError, match="another sweep's s-1 is in that database"):
        StudySearcher(theirs, STUDY)
    assert StudySearcher(mine, STUDY).suggest("a")["number"] == 0


def test_an_unknown_study_offers_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean fusion_search"):
        find_study("fusion_serch")


def test_a_fixed_setting_is_not_searched(tmp_path: Path) -> None:
    base = override(tiny(), {"model.fusion.kind": "concat", "data.heatmap.blur_px": 9})
    pinned = {"model.fusion.kind", "data.heatmap.blur_px"}
    searcher = StudySearcher(plan_in(tmp_path, base=base, pinned=tuple(pinned)), STUDY)
    for name in "abcdef":
        settings = searcher.suggest(name)["settings"]
        assert not pinned & set(settings)
        assert "model.fusion.heads" not in settings  # there is nothing that attends
        assert override(base, settings).data.heatmap.blur_px == 9


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing left to search"):
        STUDIES["heatmap_search"].baseline(tiny(), STUDIES["heatmap_search"].names(tiny()))
    for value in (9, 31):  # of a choice, and of a range
        name = "data.heatmap.blur_px" if value == 9 else "data.heatmap.window_px"
        with pytest.raises(ConfigError, match="must lie in the space of fusion_search"):
            STUDY.baseline(override(tiny(), {name: value}))
    narrow = override(tiny(), {"model.fusion.width": 36})
    assert STUDY.baseline(narrow)["model.fusion.heads"] == 4
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    for _ in range(30):
        override(narrow, ask(study, STUDY, narrow).params)


def test_a_reopened_study_does_not_repeat_itself(searcher: StudySearcher, plan: Plan) -> None:
    first = [searcher.suggest(f"a{number}")["settings"] for number in range(5)]
    again = pickle.loads(pickle.dumps(searcher))
    reopened = StudySearcher(plan, STUDY)
    for name in "abcde":
        assert reopened.suggest(name)["settings"] in first
    second = [other.suggest(f"b{number}")["settings"] for number in range(4) for other in (again, reopened)]
    assert not [settings for settings in second if settings in first]


def test_a_refused_trial_is_a_failure(searcher: StudySearcher, plan: Plan) -> None:
    searcher.suggest("a")
    refusal = {"epoch": 0, OBJECTIVE: -1.0, "failed_as": "refused", "reason": "MediaError: x", "finished": False}
    searcher.on_trial_complete("a", refusal)
    (trial,) = open_study(plan).trials
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs[FAILURE] == "refused"
    assert trial.user_attrs["reason"] == "MediaError: x"
    assert trial.intermediate_values == {}


def test_as_many_trials_are_begun_as_are_planned(tmp_path: Path) -> None:
    searcher = StudySearcher(plan_in(tmp_path, trials=2), STUDY)
    assert [searcher.suggest(name) for name in "abc"][2] == Searcher.FINISHED
    assert running_trials(searcher.study) == [0, 1]
