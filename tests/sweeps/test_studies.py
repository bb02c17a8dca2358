"""The studies that are grids, the noise that they measure, and studies in users' own files."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from ray import cloudpickle
from ray.tune.search import Searcher

import sweeps.driver
from qafe.config import tiny
from qafe.dotted import override
from qafe.errors import ConfigError
from sweeps.command import main
from sweeps.draft import planned_trials
from sweeps.noise import noise, sentences
from sweeps.plan import STUDY_FILE, STUDY_FOLDER, Plan, study_tags
from sweeps.report import TrialSummary, seed_noise
from sweeps.searcher import StudySearcher
from sweeps.studies import STUDIES, find_study, planned_sweep
from sweeps.study import open_study
from sweeps.sweep import Grid, Sweep
from sweeps.user_file import load_sweep
from tests.conftest import QUICK_FLAGS
from tests.sweeps.plans import finish, plan_in
from tests.tracking.stores import embedded

HEAD = "from sweeps.sweep import Grid, Suggester, Sweep\n\n\n"
SPACE = """def space(trial: Suggester) -> None:
    trial.suggest_float("data.heatmap.sigma_px", 0.5, 3.0)
    trial.suggest_int("model.fusion.layers", 1, 4)


"""
SWEEP = 'SWEEP = Sweep(name="mine", about="a study", space=space, trials=3)\n'


def grid(*names: str) -> Sweep:
    return Sweep(name="g", about="", space=Grid(dict.fromkeys(names, (0, 1))))


def test_a_grid_runs_its_points_in_order_and_each_once(tmp_path: Path) -> None:
    study, plan = grid("train.seed", "data.split_seed"), plan_in(tmp_path, trials=4, scheduler="none", sampler="grid")
    first = StudySearcher(plan, study)
    asked = [first.suggest("a"), first.suggest("b")]
    finish(first, "a", 0.5)
    again = StudySearcher(plan, study)  # the driver died
    assert again.suggest("c")["number"] == 1
    asked += [again.suggest("d"), again.suggest("e")]
    assert again.suggest("f") == Searcher.FINISHED
    points = [(each["settings"]["train.seed"], each["settings"]["data.split_seed"]) for each in asked]
    assert points == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [trial.user_attrs.get("baseline") for trial in open_study(plan).trials] == [True, None, None, None]


def test_a_grid_that_was_half_written_is_written_to_its_end(tmp_path: Path) -> None:
    plan, study = plan_in(tmp_path, trials=4, sampler="grid"), grid("train.seed", "data.split_seed")
    open_study(plan).enqueue_trial(study.points(tiny())[0], user_attrs={"baseline": True})
    searcher = StudySearcher(plan, study)
    assert [searcher.suggest(name)["number"] for name in "abcd"] == [0, 1, 2, 3]  # type: ignore[index]
    assert len(searcher.study.trials) == 4


def test_the_presets_own_point_is_the_first_and_fixed_settings_leave_the_grid() -> None:
    study, base = grid("train.seed", "data.split_seed"), override(tiny(), {"train.seed": 1})
    assert study.points(base)[0] == {"train.seed": 1, "data.split_seed": 0}
    assert len(study.points(base)) == 4
    assert study.points(base, frozenset({"train.seed"})) == [{"data.split_seed": 0}, {"data.split_seed": 1}]
    with pytest.raises(ConfigError, match=r"must lie in the space of g: train.seed"):
        study.points(override(tiny(), {"train.seed": 9}))


def test_a_grid_has_its_points_and_no_more() -> None:
    study = STUDIES["seed_noise"]
    assert planned_trials(study, None, tiny(), frozenset()) == 16
    assert planned_trials(study, 3, tiny(), frozenset()) == 3
    assert planned_trials(study, None, tiny(), frozenset({"train.seed"})) == 4
    with pytest.raises(ConfigError, match=r"a grid of 16 points, each is run once, got 17"):
        planned_trials(study, 17, tiny(), frozenset())
    assert planned_trials(STUDIES["paper_baseline"], None, tiny(), frozenset()) == 5


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["seed_noise", "--scheduler", "asha"], "every point of its grid to the end, got --scheduler asha"),
        (["paper_baseline", "--sampler", "tpe"], "runs all points of a grid, got --sampler tpe"),
        (["fusion_search", "--sampler", "grid"], "a space that is searched, got --sampler grid"),
        (["fusion_search", "--sampler", "cmaes", "--objectives", "spearman,params"], "cmaes searches for one"),
        (["fusion_search", "--warm-start", "none-1"], "there is no none-1 in"),
        (["fusion_search", "--warm-start", "x", "--sampler", "random"], "a sampler that learns"),
        (["paper_baseline", "--warm-start", "x"], "a sampler that learns"),
        (["no/such.py"], "no/such.py cannot be read (FileNotFoundError)"),
    ],
)
def test_what_does_not_go_together_is_refused_at_once(
    line: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*line, "--data-root", str(tmp_path), "--preset", "tiny", "--storage", str(tmp_path / "s")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert words in said[0]
    assert not (tmp_path / "s").exists()


def test_noise_is_what_an_analysis_of_variance_finds() -> None:
    found = noise([(0, 0.1), (0, 0.3), (1, 0.5), (1, 0.7)])
    assert found is not None
    # Mean squares 0.02 within and 0.16 between; two trainings a split.
    assert found.seed_sd == pytest.approx(0.02**0.5)
    assert found.split_sd == pytest.approx(0.07**0.5)
    assert found.split_share == pytest.approx(7 / 9)
    assert found.same_split == pytest.approx(4.3027 * 0.04**0.5, rel=1e-4)  # t of two degrees of freedom
    assert found.other_split is not None
    assert found.other_split > found.same_split
    text = "\n".join(sentences(found._asdict()))
    assert "78% of the variance" in text
    assert "only 2 splits" in text


def test_noise_says_only_what_it_can() -> None:
    assert noise([(0, 0.1)]) is None
    seeds = noise([(0, 0.1), (0, 0.2), (0, 0.4)])
    assert seeds is not None
    assert seeds.split_sd is None
    assert seeds.other_split is None
    assert "on two splits" not in "\n".join(sentences(seeds._asdict()))
    splits = noise([(0, 0.1), (1, 0.2), (2, 0.4)])
    assert splits is not None
    assert splits.seed_sd is None
    assert "cannot be told apart" in "\n".join(sentences(splits._asdict()))
    alike = noise([(0, 0.5), (0, 0.5), (1, 0.5), (1, 0.5)])
    assert alike is not None
    assert alike.other_split == 0
    assert sentences(alike._asdict())


def test_noise_intervals_hold_what_they_promise() -> None:
    rng = np.random.default_rng(0)
    hits = np.zeros(3)
    for _ in range(300):
        splits = 0.1 * rng.standard_normal(4)
        found = noise([(split, splits[split] + 0.05 * rng.standard_normal()) for split in range(4) for _ in range(4)])
        assert found is not None
        assert found.seed_sd_interval is not None
        assert found.split_share_interval is not None
        assert found.same_split is not None
        hits += [
            found.seed_sd_interval[0] <= 0.05 <= found.seed_sd_interval[1],
            found.split_share_interval[0] <= 0.8 <= found.split_share_interval[1],
            abs(0.05 * np.diff(rng.standard_normal(2)).item()) <= found.same_split,
        ]
    assert (np.abs(hits / 300 - 0.95) < 0.035).all()


def test_only_seeds_are_noise() -> None:
    def row(number: int, **settings: float) -> TrialSummary:
        named = {name.replace("_", ".", 1): value for name, value in settings.items()}
        return TrialSummary(
            number=number, state="finished", objective=0.1 * number, epochs=1, settings=named, baseline=False
        )

    assert seed_noise([row(number, train_seed=number) for number in range(3)]) is not None
    assert seed_noise([row(number, train_seed=number, train_lr=0.1) for number in range(3)]) is None
    assert seed_noise([]) is None


def write(folder: Path, text: str) -> Path:
    path = folder / "my_sweep.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def space(:\n", r"my_sweep.py, line 1 cannot be run: SyntaxError"),
        (HEAD + "x = 1\nraise ValueError('no')\n", r"my_sweep.py, line 5 cannot be run: ValueError: no"),
        (HEAD + "import sys\nsys.exit('bye')\n", r"line 5 cannot be run: SystemExit: bye"),
        (HEAD + SPACE, r"must define one Sweep, my_sweep.py has 0 \(none\)"),
        (HEAD + SPACE + SWEEP + SWEEP.replace("mine", "other").replace("SWEEP", "B"), r"has 2 \(mine, other\)"),
        (HEAD + SPACE + SWEEP.replace("mine", "my search"), r"line 9 cannot be run: a study's name is made of letters"),
        (HEAD + SPACE + SWEEP.replace("trials=3", "trials=0"), r"trials must be at least 1, got 0"),
        (HEAD + SPACE.replace("layers", "layer") + SWEEP, r"'model.fusion.layer'.*Did you mean model.fusion.layers"),
        (HEAD + SPACE.replace("0.5, 3", "0.0, 3") + SWEEP, r"no config: data.heatmap.sigma_px must be greater than 0"),
        (HEAD + SPACE.replace("0.5, 3.0", "2.0, 3.0") + SWEEP, r"must lie in the space of mine: data.heatmap.sigma_px"),
        (HEAD + SPACE.replace("1, 4", "1") + SWEEP, r"my_sweep.py, line 6 cannot be run: TypeError"),
        (HEAD + SPACE.replace("trial.suggest_int", "trial.ask") + SWEEP, r"line 6 cannot be run: AttributeError"),
        (
            HEAD + 'S = Sweep(name="s", about="", space=Grid({"train.optimizer": ("adamw", "adam")}))\n',
            "must be one of",
        ),
        (HEAD + 'S = Sweep(name="s", about="", space=Grid({"model.heatmap.blocks": ((1, 1), (2,))}))\n', "a choice of"),
    ],
)
def test_mistakes_in_a_users_file_are_one_line(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        load_sweep(write(tmp_path, text)).check(tiny())


def test_a_users_study_does_not_take_the_name_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fusion_search is a study of the project"):
        find_study(str(write(tmp_path, HEAD + SPACE + SWEEP.replace("mine", "fusion_search"))))


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Plan, Sweep]]:
    """What main would have run."""
    found: list[tuple[Plan, Sweep]] = []

    def keep(plan: Plan, sweep: Sweep, **_: object) -> int:
        found.append((plan, sweep))
        return 0

    monkeypatch.setattr(sweeps.driver, "run_sweep", keep)
    return found


@pytest.fixture(scope="module")
def flags(sample_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    uri = embedded(tmp_path_factory.mktemp("store"))
    return ["--data-root", str(sample_root), "--preset", "tiny", "--tracking-uri", uri, *QUICK_FLAGS]


def test_a_sweep_keeps_its_users_file(
    planned: list[tuple[Plan, Sweep]], flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, HEAD + SPACE + SWEEP)
    storage = ["--storage", str(tmp_path / "s")]
    assert main([str(path), *storage, *flags]) == 0
    plan, sweep = planned[0]
    assert (plan.name, plan.study, plan.trials) == ("mine-1", "mine", 3)
    assert str(tmp_path) not in sweep.source
    assert (Path(plan.folder) / STUDY_FOLDER / STUDY_FILE).read_text() == path.read_text()
    assert set(study_tags(plan)) == {"qafe.study_file", "qafe.study_sha256"}

    path.write_text("broken(")
    for given in (str(path), "mine"):
        assert main([given, "--resume", "--name", "mine-1", *storage]) == 0
    path.unlink()
    assert main([str(path), "--extend", "2", "--name", "mine-1", *storage]) == 0
    assert [plan.trials for plan, _ in planned] == [3, 3, 3, 5]
    assert main(["fusion_search", "--resume", "--name", "mine-1", *storage]) == 2
    assert "mine-1 is a sweep of mine, not of fusion_search" in capsys.readouterr().err

    searcher = StudySearcher(*planned[-1])
    for copied in (pickle.loads(pickle.dumps(searcher)), pickle.loads(cloudpickle.dumps(searcher))):
        assert set(copied.suggest("a")["settings"]) == {"data.heatmap.sigma_px", "model.fusion.layers"}
    assert planned_sweep(plan).names(tiny()) == sweep.names(tiny())


def test_the_paper_is_repeated_on_all_expressions(
    planned: list[tuple[Plan, Sweep]], flags: list[str], tmp_path: Path
) -> None:
    assert main(["paper_baseline", "--storage", str(tmp_path / "s"), *flags]) == 0
    plan = planned[0][0]
    assert (len(plan.expressions), plan.trials, plan.scheduler, plan.sampler) == (5, 5, "none", "grid")
