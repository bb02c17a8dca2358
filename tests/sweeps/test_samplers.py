"""Every sampler on spaces with branches: trials of every end, and a study that is opened again."""

import warnings
from pathlib import Path

import pytest

from qafe.config import tiny
from qafe.dotted import override
from sweeps.results import DIVERGED, FAILED_AS
from sweeps.searcher import StudySearcher
from sweeps.studies import STUDIES
from sweeps.study import SAMPLERS
from sweeps.sweep import Suggester, Sweep
from tests.sweeps.plans import finish, plan_in, result


def small_space(trial: Suggester) -> None:
    """One branch and three settings: what a Gaussian process fits in a second."""
    if trial.suggest_categorical("train.schedule", ["cosine", "step"]) == "step":
        trial.suggest_float("train.step_factor", 0.05, 0.5)
    trial.suggest_float("train.lr", 1e-5, 1e-1, log=True)


SMALL = Sweep(name="small", about="", space=small_space)
SEVERAL = ("spearman", "params")


def asked_for(folder: Path, sampler: str, sweep: Sweep, trials: int, restarts: frozenset[int]) -> dict[int, object]:
    """The settings of all trials, run one after the other while the next one waits already; before some of them the
    driver dies, in the middle of a trial and with one that waits."""
    plan = plan_in(folder, sampler=sampler, trials=trials, scheduler="none")
    searcher, found, running = StudySearcher(plan, sweep, places=1), {}, []
    for step in range(trials):
        if step in restarts:
            searcher, running = StudySearcher(plan, sweep, places=1), []
        while len(running) < 2 and isinstance(suggested := searcher.suggest(f"{step}-{len(running)}"), dict):
            assert found.setdefault(suggested["number"], suggested["settings"]) == suggested["settings"]
            searcher.placed(f"{step}-{len(running)}") if not running else None
            running.append((f"{step}-{len(running)}", suggested))
        name, suggested = running.pop(0)
        finish(searcher, name, suggested["settings"]["train.lr"] + suggested["number"] / 1000)
        for other, _ in running:
            searcher.placed(other)
    assert len(found) == trials
    return found


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "grid"])
def test_what_is_drawn_does_not_depend_on_how_often_the_driver_was_started(sampler: str, tmp_path: Path) -> None:
    sweep, trials = (SMALL, 14) if sampler == "gp" else (STUDIES["optimiser_search"], 24)
    undisturbed = asked_for(tmp_path / "once", sampler, sweep, trials, frozenset())
    restarted = asked_for(tmp_path / "often", sampler, sweep, trials, frozenset({1, 2, 5, 6, 11, 13, 20}))
    assert restarted == undisturbed
    assert len({str(settings) for settings in undisturbed.values()}) == trials


@pytest.mark.parametrize("objectives", [("spearman",), SEVERAL], ids=["one", "two"])
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "grid"])
def test_a_sampler_asks_for_new_points_all_the_time(sampler: str, objectives: tuple[str, ...], tmp_path: Path) -> None:
    if sampler == "cmaes" and len(objectives) > 1:
        pytest.skip("refused when the sweep is planned")
    sweep, trials = (SMALL, 14) if sampler == "gp" else (STUDIES["optimiser_search"], 30)
    plan = plan_in(tmp_path, sampler=sampler, objectives=objectives, scheduler="none")
    asked = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(trials):
            if number in (0, trials // 2):  # a new driver; the sixth trial ran when the first died
                searcher = StudySearcher(plan, sweep)
            name = str(number)
            suggested = searcher.suggest(name)
            assert isinstance(suggested, dict)
            override(tiny(), suggested["settings"])
            asked.append(tuple(sorted(suggested["settings"].items())))
            score, params = suggested["settings"]["train.lr"], 1000 * suggested["settings"]["train.lr"]
            if number == 5:
                continue
            if number % 5 == 4:  # stopped early, or by hand
                searcher.report(name, result(1, score))
                searcher.on_trial_complete(name, result(1, score))
            elif number % 11 == 10:
                searcher.on_trial_complete(name, {"epoch": 0, FAILED_AS: DIVERGED, "reason": "x"})
            else:
                finish(searcher, name, score, params=params)
    assert len(set(asked)) == trials - 1  # the trial that ran goes on with its own settings
    assert len(searcher.study.trials) == trials - 1
