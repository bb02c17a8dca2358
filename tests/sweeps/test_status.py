"""What ``python -m sweeps.status`` and the live view say of a sweep, and that looking changes nothing."""

import argparse
import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from qafe import dotted
from qafe.config import tiny
from qafe.dotted import override
from sweeps import status
from sweeps.control import PAUSE, Control
from sweeps.folder import LOCK_FILE, REPORT_FOLDER, SUMMARY_FILE, find_sweep
from sweeps.plan import Plan
from sweeps.progress import Pace, changed_settings, duration, time_left_s
from sweeps.results import OBJECTIVE
from sweeps.searcher import StudySearcher
from sweeps.studies import STUDIES
from sweeps.study import read_study

ROOT = Path(__file__).parents[2]


def make_sweep(storage: Path, name: str = "s-1", *, trials: int = 5, gpus: float = 0.0) -> Plan:
    """A sweep's folder with its plan in it."""
    plan = Plan(
        id=name, name=name, study="fusion_search", folder=str(storage / name),
        config_json=dotted.to_json(override(tiny(), {"train.epochs": 4})), pinned=(), data_root="/secret/patients",
        data_digest="d", expressions=("smile",), trials=trials, seed=0, cpus_per_trial=1.0, gpus_per_trial=gpus,
        time_budget_s=None, tracking_uri="sqlite:////nowhere.db", grace_epochs=4, scheduler="none",
    )  # fmt: skip
    plan.make_folder()
    return plan


def result(epoch: int, spearman: float, **more: object) -> dict[str, object]:
    return {"epoch": epoch, OBJECTIVE: spearman, "epoch_s": 90.0, "finished": False} | more


def half_done(storage: Path, **plan: object) -> Plan:
    """A sweep with one trial finished, one pruned, one failed and one running."""
    made = make_sweep(storage, **plan)  # type: ignore[arg-type]
    searcher = StudySearcher(made, STUDIES["fusion_search"])
    for name in "abcd":
        searcher.suggest(name)
    for epoch in range(1, 5):
        searcher.report("a", result(epoch, 0.1 * epoch, finished=epoch == 4))
    searcher.on_trial_complete("a", result(4, 0.4, finished=True))
    searcher.report("b", result(1, 0.7))
    searcher.stopped_by_hand.add(1)
    searcher.on_trial_complete("b", result(1, 0.7))
    searcher.on_trial_complete("c", {"epoch": 0, "failed_as": "refused", "reason": "ConfigError: no"})
    searcher.report("d", result(1, 0.2))
    searcher.report("d", result(2, 0.3))
    return made


def seen(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}


def test_the_table_has_every_trial_and_the_totals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half_done(tmp_path)
    before = seen(tmp_path)
    assert status.main(["s-1", "--storage", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    rows = {line.split()[0]: line for line in text.splitlines() if re.match(r"\s+\d+ ", line)}
    assert re.search(r"finished +4/4 +0\.400 +the baseline", rows["0"])
    assert re.search(r"pruned +1/4 +0\.700 .*stopped by hand", rows["1"])
    assert re.search(r"failed +0/4 .*refused: ConfigError: no", rows["2"])
    assert re.search(r"interrupted +2/4 +0\.300", rows["3"])
    assert "3 of 5 trials have ended (1 finished, 1 pruned, 1 failed, 1 interrupted); best 0.400 (trial 0)" in text
    assert "0.17 worker-hours" in text  # 7 epochs of 90 s
    assert "left" not in text
    assert seen(tmp_path) == before


def test_gpu_hours_and_states_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half_done(tmp_path, gpus=0.5)
    make_sweep(tmp_path, "s-2")
    with open(tmp_path / "s-1" / LOCK_FILE, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert status.main(["--storage", str(tmp_path), "--json"]) == 0
        first, second = json.loads(capsys.readouterr().out)
        assert (first["state"], first["counts"]["running"], second["state"]) == ("running", 1, "interrupted")
        assert first["gpu_hours"] == pytest.approx(0.5 * 7 * 90 / 3600, abs=1e-3)
        assert second["best"] is None
        Control(tmp_path / "s-1").wish(PAUSE)
        assert status.main(["s-1", "--storage", str(tmp_path), "--json"]) == 0
        tree = json.loads(capsys.readouterr().out)
        assert tree["state"] == "paused"
        assert [row["state"] for row in tree["trials"]] == ["finished", "pruned", "failed", "paused"]
        assert tree["trials"][1]["reason"] == "stopped by hand"
        assert tree["trials"][0]["seconds"] == 360
    assert status.main(["s-1", "--storage", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "interrupted"


def test_an_extension_makes_a_complete_sweep_incomplete(tmp_path: Path) -> None:
    plan = make_sweep(tmp_path)
    report = tmp_path / "s-1" / REPORT_FOLDER
    report.mkdir()
    (report / SUMMARY_FILE).write_text(json.dumps({"planned": 5}))
    assert find_sweep(tmp_path, "s-1").complete
    (report / SUMMARY_FILE).write_text(json.dumps({"planned": 4}))
    assert not find_sweep(tmp_path, "s-1").complete
    (report / SUMMARY_FILE).write_text(json.dumps({"planned": 5, "counts": {"finished": 2, "pruned": 1}}))
    assert not find_sweep(tmp_path, "s-1").complete, "a budget has ended it"
    (report / SUMMARY_FILE).write_text(json.dumps({"planned": 5, "counts": {"finished": 2, "pruned": 3}}))
    assert find_sweep(tmp_path, "s-1").complete
    (report / SUMMARY_FILE).write_text("{}")  # of an older version
    assert find_sweep(tmp_path, "s-1").complete
    assert plan.trials == 5


def test_looking_never_writes_and_a_study_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    make_sweep(tmp_path)
    before = seen(tmp_path)
    assert read_study(tmp_path / "s-1", "s-1") is None
    assert read_study(tmp_path / "s-1", "s-1", f"sqlite:///{tmp_path}/none.db") is None
    assert not find_sweep(tmp_path, "s-1").driven
    assert seen(tmp_path) == before
    half_done(tmp_path, name="s-2")
    study = read_study(tmp_path / "s-2", "s-2")
    assert study is not None
    with pytest.raises(PermissionError):
        study.set_user_attr("a", 1)


def test_a_driver_can_begin_while_others_look(tmp_path: Path) -> None:
    make_sweep(tmp_path)
    (tmp_path / "s-1" / LOCK_FILE).touch()
    with open(tmp_path / "s-1" / LOCK_FILE) as looker:
        fcntl.flock(looker, fcntl.LOCK_SH)
        assert not find_sweep(tmp_path, "s-1").driven  # two may look
    assert not find_sweep(tmp_path, "s-1").driven
    with open(tmp_path / "s-1" / LOCK_FILE, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nothing was kept


@pytest.mark.parametrize("arguments", [["s-2"], ["../s-1"], [""]])
def test_no_such_sweep(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_sweep(tmp_path)
    assert status.main([*arguments, "--storage", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: there is no sweep")


def trials(*told: tuple[TrialState, int]) -> list[optuna.trial.FrozenTrial]:
    return [
        create_trial(
            state=state,
            value=0.5 if state == TrialState.COMPLETE else None,
            intermediate_values=dict.fromkeys(range(1, epochs + 1), 0.1),
        )
        for state, epochs in told
    ]


DONE, PRUNED, RUNNING = TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING


@pytest.mark.parametrize(
    ("told", "planned", "workers", "expected"),
    [
        ([], 8, 2, None),
        ([(RUNNING, 3), (RUNNING, 3)], 8, 2, None),
        ([(DONE, 10), (DONE, 10)], 4, 2, 10),  # two more, side by side
        ([(DONE, 10), (DONE, 10)], 4, 1, 20),
        ([(DONE, 10), (RUNNING, 4)], 2, 2, 6),  # one is left: the second worker cannot help
        ([(DONE, 10), (DONE, 10), (RUNNING, 5), (RUNNING, 5)], 4, 2, 5),
        # Half of the trials end after 2 of 10 epochs: one has 6 before it, on average.
        ([(DONE, 10), (PRUNED, 2)], 12, 2, 30),
        # One that still runs tells as much as it has lived.
        ([(PRUNED, 2), (RUNNING, 8)], 2, 1, 2),
        ([(DONE, 10)], 1, 1, 0),
    ],
)
def test_the_time_left(
    told: list[tuple[TrialState, int]], planned: int, workers: float, expected: float | None
) -> None:
    pace = Pace(workers=workers, epoch_s=1.0)
    assert time_left_s(trials(*told), planned=planned, epochs=10, pace=pace) == (
        None if expected is None else pytest.approx(expected)
    )
    assert time_left_s(trials(*told), planned=planned, epochs=10, pace=None) is None


def test_words_for_people() -> None:
    assert [duration(s) for s in (3.4, 99, 100, 5900, 12000, 187200)] == [
        "3 s", "99 s", "2 min", "98 min", "3 h 20 min", "2 d 4 h",
    ]  # fmt: skip
    changed = changed_settings({"a.kind": "sum", "a.rate": 0.12345, "a.same": 1}, {"a.same": 1, "a.kind": "cross"})
    assert changed == "kind=sum rate=0.123"


LIVE = """
import logging, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from sweeps.callbacks import MeasurePace, say
from sweeps.control import Control
from sweeps.live import LiveView
from sweeps.plan import Plan
from sweeps.study import read_study
logging.basicConfig(stream=sys.stderr)
plan = Plan.load(Path(sys.argv[1]))
pace = MeasurePace(plan, read_study(Path(plan.folder), plan.name))
assert LiveView.possible()
trial = SimpleNamespace(config={"number": 3, "epochs": 0}, status="RUNNING",
                        last_result={"epoch": 2, "spearman": 0.25, "best_spearman": 0.3})
try:
    with LiveView(plan, pace, Control(Path(plan.folder))) as view:
        pace.on_trial_start(0, [trial], trial)
        while True:
            pace.on_step_end(0, [trial])
            view.on_step_end(0, [trial])
            logging.getLogger("x").warning("a-log-line") if "said" not in globals() else None
            said = True
            time.sleep(0.05)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_the_live_view_is_drawn_and_ctrl_c_gives_the_terminal_back(tmp_path: Path) -> None:
    half_done(tmp_path)
    control, terminal = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    line = [sys.executable, "-c", LIVE, str(tmp_path / "s-1")]
    process = subprocess.Popen(line, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    text, deadline, pressed = "", time.monotonic() + 200, False
    while time.monotonic() < deadline:
        if select.select([control], [], [], 0.2)[0]:
            try:
                text += os.read(control, 65536).decode(errors="replace")
            except OSError:  # the other side is closed
                break
        if "2/4" in text and "a-log-line" in text and not pressed:
            process.send_signal(signal.SIGINT)
            pressed = True
    assert process.wait(timeout=30) == 0, text
    os.close(control)
    for words in ("s-1", "0.250", "0.300", "3 of 5 trials: 1 finished, 1 pruned, 1 failed; best 0.400 (trial 0)"):
        assert words in text
    assert "Traceback" not in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") >= 1  # the cursor is shown again
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert text.rstrip().endswith("interrupted")


def test_without_a_terminal_watching_says_a_line_for_each_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    half_done(tmp_path)
    monkeypatch.setattr(status, "WATCHED_S", 0.05)
    status._main(argparse.Namespace(name="s-1", storage=tmp_path, watch=True, json=False))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("s-1 interrupted: 3 of 5 trials have ended")
