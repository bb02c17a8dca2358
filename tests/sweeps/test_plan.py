"""What the command line plans, without starting it."""

import fcntl
import subprocess
from pathlib import Path

import pytest

import sweeps.driver
from qafe.config import tiny
from qafe.data.cohort import load_cohort
from qafe.dotted import from_json, override
from sweeps import provenance
from sweeps.command import main
from sweeps.folder import LOCK_FILE
from sweeps.plan import Plan
from sweeps.provenance import trial_tags
from tests.conftest import QUICK_FLAGS
from tests.tracking.stores import embedded, free_port


@pytest.mark.parametrize(("flags", "cached"), [([], True), (["--no-cache"], False)])
def test_no_cache_reaches_every_trial(
    flags: list[str], cached: bool, sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []
    monkeypatch.setattr(sweeps.driver, "run_sweep", lambda plan, study, **_: plans.append(plan) or 0)
    line = ["fusion_search", "--data-root", str(sample_root), "--storage", str(tmp_path), "--preset", "tiny"]
    assert main([*line, "--tracking-uri", embedded(tmp_path), *QUICK_FLAGS, *flags]) == 0
    assert (from_json(plans[0].config_json).data.cache_gb > 0) == cached


def test_a_resumed_sweep_keeps_its_cache(
    sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweeps.driver, "run_sweep", lambda *_, **__: 0)
    line = ["fusion_search", "--storage", str(tmp_path)]
    flags = ["--data-root", str(sample_root), "--preset", "tiny", "--tracking-uri", embedded(tmp_path), *QUICK_FLAGS]
    assert main([*line, *flags]) == 0
    assert main([*line, "--resume", "--no-cache"]) == 2
    assert "as it was planned: fusion_search-1 without --no-cache" in capsys.readouterr().err


def test_an_extension_that_is_refused_is_none(
    sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["fusion_search", "--storage", str(tmp_path), "--name", "s"]
    flags = ["--data-root", str(sample_root), "--preset", "tiny", "--tracking-uri", embedded(tmp_path), *QUICK_FLAGS]
    with monkeypatch.context() as planning:
        planning.setattr(sweeps.driver, "run_sweep", lambda *_, **__: 0)
        assert main([*line, *flags, "--trials", "3"]) == 0
    with open(tmp_path / "s" / LOCK_FILE, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main([*line, "--extend", "16", "--budget-gpu-hours", "9"]) == 2
    assert "is running already" in capsys.readouterr().err
    assert main([*line, "--extend", "16", "--address", f"127.0.0.1:{free_port()}"]) == 2
    plan = Plan.load(tmp_path / "s")
    assert (plan.trials, plan.budget_hours) == (3, None)


def test_the_studys_database_is_the_same_in_every_folder(
    sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps.driver, "run_sweep", lambda *_, **__: 0)
    monkeypatch.chdir(tmp_path)
    line = [
        "fusion_search",
        "--storage",
        str(tmp_path),
        "--name",
        "s",
        "--study-storage",
        "sqlite:///here.db?timeout=9",
    ]
    flags = ["--data-root", str(sample_root), "--preset", "tiny", "--tracking-uri", embedded(tmp_path), *QUICK_FLAGS]
    assert main([*line, *flags]) == 0
    assert Plan.load(tmp_path / "s").study_storage == f"sqlite:///{tmp_path}/here.db?timeout=9"


@pytest.mark.parametrize("allowed", [False, True])
def test_names_leave_only_where_that_is_allowed(
    allowed: bool, sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []
    monkeypatch.setattr(sweeps.driver, "run_sweep", lambda plan, study, **_: plans.append(plan) or 0)
    line = ["fusion_search", "--data-root", str(sample_root), "--storage", str(tmp_path), "--preset", "tiny"]
    line += ["--tracking-uri", embedded(tmp_path), *QUICK_FLAGS, *(["--allow-identifiable"] if allowed else [])]
    assert main(line) == 0
    assert plans[0].identifiable is allowed
    assert Plan.load(Path(plans[0].folder)).identifiable is allowed


def test_a_trials_tags_say_which_split_it_had(sample_root: Path) -> None:
    cohort = load_cohort(sample_root, tiny().data)
    tags = [
        trial_tags(override(tiny(), {"data.split_seed": seed, "train.seed": 3}), cohort, number, "tpe")
        for number, seed in enumerate((0, 1, 0))
    ]
    assert [each["qafe.stage"] for each in tags] == ["baseline", "search", "search"]
    assert [each["qafe.fold"] for each in tags] == ["0", "1", "0"]
    assert {each["qafe.seed"] for each in tags} == {"3"}
    digests = [each["qafe.split_digest"] for each in tags]
    assert digests[0] == digests[2] != digests[1]
    assert digests[0] == cohort.split_digest
    shuffled = load_cohort(sample_root, override(tiny(), {"data.shuffle_labels": True}).data)
    assert shuffled.split_digest != cohort.split_digest


def test_a_diff_of_the_source_has_the_products_own_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        line = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        subprocess.run(line, check=True, capture_output=True)

    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.delenv("QAFE_SOURCE_COMMIT", raising=False)
    (tmp_path / "sweeps").mkdir()
    for name in ("sweeps/provenance.py", "labels.csv"):
        (tmp_path / name).write_text("before\n")
    assert "mlflow.source.git.commit" not in provenance.source_tags()
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    assert provenance.source_tags()["mlflow.source.git.dirty"] == "false"
    assert not provenance.write_diff(tmp_path / "source")
    for name in ("sweeps/provenance.py", "labels.csv"):
        (tmp_path / name).write_text("after\n")
    assert provenance.source_tags()["mlflow.source.git.dirty"] == "true"
    assert len(provenance.source_tags()["mlflow.source.git.commit"]) == 40
    assert provenance.write_diff(tmp_path / "source")
    diff = (tmp_path / "source" / "source.diff").read_text()
    assert "sweeps/provenance.py" in diff
    assert "labels" not in diff


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://x/y", "needs a Python module that is not installed: MySQLdb"),
        ("nonsense://x/y", "must be a URL that SQLAlchemy knows, got NoSuchModuleError"),
        ("words", "must be a URL that SQLAlchemy knows, got ArgumentError"),
        ("postgresql://me:secret@127.0.0.1:PORT/y", "must answer, got OperationalError"),
    ],
)
def test_a_studys_database_is_refused_for_what_it_lacks(
    url: str, words: str, sample_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["fusion_search", "--data-root", str(sample_root), "--storage", str(tmp_path / "storage"), "--name", "s"]
    line += ["--preset", "tiny", "--tracking-uri", embedded(tmp_path), "--study-storage"]
    assert main([*line, url.replace("PORT", str(free_port()))]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "secret" not in said
    assert not (tmp_path / "storage").exists()
