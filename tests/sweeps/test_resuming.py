"""Each flag beside --resume: obeyed, the same as planned, or refused; and places that have moved."""

import dataclasses
import shutil
from pathlib import Path

import pytest

import sweeps.driver
from sweeps import resuming
from sweeps.command import _parser, main
from sweeps.plan import Plan
from sweeps.resuming import COMMAND, COMPARED, OBEYED, OF_THIS_DRIVER
from tests.conftest import QUICK_FLAGS
from tests.tracking.stores import embedded

PLACES = frozenset({"data_root", "set", "study_storage", "tracking_uri"})
SAME = {
    "expression": "frown,smile",
    "preset": "tiny",
    "trials": "3",
    "scheduler": "median",
    "sampler": "gp",
    "objectives": "spearman",
    "seed": "4",
    "no_cache": "",
    "allow_identifiable": "",
}
OTHER = {
    "expression": "smile",
    "preset": "small",
    "trials": "4",
    "scheduler": "asha",
    "sampler": "tpe",
    "objectives": "spearman,mae",
    "seed": "5",
}
CHANGED = {
    "cpus_per_trial": ("2", 2.0),
    "gpus_per_trial": ("0", 0.0),
    "time_budget": ("50", 50.0),
    "budget_gpu_hours": ("0.5", 0.5),
    "keep_checkpoints": ("7", 7),
}


class Planned:
    """A sweep that was planned and never driven; what goes on with it is caught."""

    def __init__(self, folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
        self.plans: list[Plan] = []
        monkeypatch.setattr(sweeps.driver, "run_sweep", lambda plan, study, **_: self.plans.append(plan) or 0)
        self.line = ["fusion_search", "--storage", str(folder / "storage"), "--name", "s"]
        self.flags = ["--data-root", str(data), "--tracking-uri", embedded(folder), *QUICK_FLAGS, *flags]
        assert main([*self.line, *self.flags]) == 0

    def resume(self, *flags: str) -> int:
        return main([*self.line, "--resume", *flags])


@pytest.fixture
def planned(sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planned:
    flags = [text for name, value in SAME.items() for text in (f"--{name.replace('_', '-')}", value) if text]
    return Planned(tmp_path, sample_root, monkeypatch, *flags)


def test_no_flag_is_forgotten() -> None:
    flags = {action.dest for action in _parser()._actions} - {"==SUPPRESS=="}  # --version sets nothing
    known = [COMMAND, OF_THIS_DRIVER, frozenset(OBEYED), frozenset(COMPARED), PLACES]
    assert flags <= frozenset().union(*known)
    assert sum(map(len, known)) == len(frozenset().union(*known))
    assert set(SAME) | {"warm_start"} == set(COMPARED)
    assert set(CHANGED) == set(OBEYED)
    for action in _parser()._actions:
        assert action.default in (None, False, [], "==SUPPRESS=="), f"whether {action.dest} is typed must be known"


@pytest.mark.parametrize("flag", SAME)
def test_what_was_planned_may_be_said_again(flag: str, planned: Planned) -> None:
    assert planned.resume(*(text for text in (f"--{flag.replace('_', '-')}", SAME[flag]) if text)) == 0
    assert planned.plans[1] == planned.plans[0]


@pytest.mark.parametrize("flag", OTHER)
def test_what_was_not_planned_is_refused(flag: str, planned: Planned, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    name = f"--{flag.replace('_', '-')}"
    assert planned.resume(name, OTHER[flag]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: a sweep goes on as it was planned: s with {name} ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("flag", ["no_cache", "allow_identifiable"])
def test_a_switch_that_was_not_planned_is_refused(
    flag: str, sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = Planned(tmp_path, sample_root, monkeypatch, "--preset", "tiny")
    assert planned.resume(f"--{flag.replace('_', '-')}") == 2
    assert f"s without --{flag.replace('_', '-')}" in capsys.readouterr().err


@pytest.mark.parametrize("flag", CHANGED)
def test_what_changes_no_trial_is_obeyed(flag: str, planned: Planned) -> None:
    text, value = CHANGED[flag]
    assert planned.resume(f"--{flag.replace('_', '-')}", text) == 0
    assert planned.plans[1] == dataclasses.replace(planned.plans[0], **{OBEYED[flag]: value})


def test_bad_numbers_are_refused_here_too(planned: Planned, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--cpus-per-trial", "--keep-checkpoints", "--time-budget", "--budget-gpu-hours"):
        assert planned.resume(flag, "0") == 2
        assert f"{flag} must" in capsys.readouterr().err
    assert planned.resume("--cpus-per-trial", "999") == 2


def test_settings_are_compared_one_by_one(planned: Planned, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned.resume(*QUICK_FLAGS) == 0
    assert planned.resume("--set", "train.epochs=3", "--set", "train.lr=0.5") == 2
    assert "s with train.lr=0.002, not 0.5 (--set)" in capsys.readouterr().err
    assert planned.resume("--set", "train.epoch=3") == 2
    assert "Did you mean train.epochs" in capsys.readouterr().err


def test_one_line_is_right_for_the_start_and_for_every_restart(
    planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["fusion_search", "--storage", str(tmp_path / "other")]
    for _ in range(2):
        assert main([*line, *planned.flags, "--name", "t", "--auto-resume"]) == 0
    assert planned.plans[1].name == "t"
    assert planned.plans[2] == planned.plans[1]
    report = tmp_path / "other" / "t" / "report"
    report.mkdir()
    (report / "summary.json").write_text('{"counts": {"finished": 3}, "complete": true}')
    assert main([*line, *planned.flags, "--name", "t", "--auto-resume"]) == 0
    assert "t is complete, there is nothing to do" in capsys.readouterr().out
    assert len(planned.plans) == 3
    assert main(["fusion_search", "--auto-resume"]) == 2
    assert "Add --name NAME" in capsys.readouterr().err
    assert main([*line, "--auto-resume", "--extend", "3"]) == 2


def test_a_sweep_is_where_it_is_found(
    planned: Planned, sample_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "storage").rename(tmp_path / "moved")
    planned.line[2] = str(tmp_path / "moved")
    assert planned.resume() == 0
    assert planned.plans[1] == dataclasses.replace(planned.plans[0], folder=str(tmp_path / "moved" / "s"))
    (tmp_path / "moved" / "s").rename(tmp_path / "moved" / "t")
    assert planned.resume("--name", "t") == 0
    assert planned.plans[2].folder == str(tmp_path / "moved" / "t")


def test_what_moves_along_is_found(sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    shutil.copytree(sample_root, tmp_path / "disk" / "data")
    flags = ["--preset", "tiny", "--study-storage", f"sqlite:///{tmp_path}/disk/study.db"]
    planned = Planned(tmp_path / "disk", tmp_path / "disk" / "data", monkeypatch, *flags)
    (tmp_path / "disk" / "study.db").touch()
    (tmp_path / "disk").rename(tmp_path / "mount")
    planned.line[2] = str(tmp_path / "mount" / "storage")
    assert planned.resume() == 0
    found = planned.plans[1]
    assert found.data_root == str(tmp_path / "mount" / "data")
    assert found.tracking_uri == planned.plans[0].tracking_uri.replace("/disk/", "/mount/")
    assert found.study_storage == planned.plans[0].study_storage.replace("/disk/", "/mount/")


def test_places_are_asked_for_and_checked(
    sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sample_root, tmp_path / "data")
    planned = Planned(tmp_path, tmp_path / "data", monkeypatch, "--preset", "tiny")
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    assert planned.resume() == 2
    assert "--data-root FOLDER" in capsys.readouterr().err
    assert planned.resume("--data-root", str(tmp_path / "elsewhere")) == 0
    assert planned.plans[1].data_root == str(tmp_path / "elsewhere")
    (tmp_path / "mlflow.db").rename(tmp_path / "other.db")
    again = ["--data-root", str(tmp_path / "elsewhere")]
    assert planned.resume(*again) == 2
    assert "--tracking-uri" in capsys.readouterr().err
    assert not (tmp_path / "mlflow.db").exists()


def test_weights_are_known_by_what_is_in_them(tmp_path: Path) -> None:
    for name, content in (("a.pth", b"a"), ("moved.pth", b"a"), ("b.pth", b"b")):
        (tmp_path / name).write_bytes(content)
    from tests.sweeps.plans import plan_in

    setting = "model.rgb.weights"
    plan = plan_in(tmp_path, weights_sha256={setting: resuming.sha256_of(tmp_path / "a.pth")})
    resuming._check_weights(plan, setting, tmp_path / "moved.pth")
    with pytest.raises(resuming.ConfigError, match="holds others"):
        resuming._check_weights(plan, setting, tmp_path / "b.pth")
    with pytest.raises(resuming.ConfigError, match="Say where they lie"):
        resuming._check_weights(plan, setting, tmp_path / "gone.pth")
