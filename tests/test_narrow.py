"""Tables and bars in terminals of 60 and 80 columns: names and numbers are whole."""

import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from qafe.config import tiny
from sweeps import page, status
from sweeps.callbacks import MeasurePace
from sweeps.control import Control
from sweeps.estimate import describe_space, print_summary
from sweeps.folder import find_sweep
from sweeps.live import LiveView
from sweeps.results import OBJECTIVE
from sweeps.studies import STUDIES
from sweeps.study import read_study
from tests.sweeps.test_report import summary_with
from tests.sweeps.test_status import half_done, make_sweep

ROOT = Path(__file__).parents[1]
WIDTHS = pytest.mark.parametrize("width", [60, 80])


def in_a_terminal(width: int, line: Sequence[str], folder: Path) -> list[str]:
    """What a command shows in a terminal of so many columns, without its colours."""
    control, terminal = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": str(width)}
    process = subprocess.Popen(
        [sys.executable, *line], stdin=terminal, stdout=terminal, stderr=terminal, env=environment, cwd=folder
    )
    os.close(terminal)
    text, deadline = "", time.monotonic() + 200
    while time.monotonic() < deadline:
        if select.select([control], [], [], 0.2)[0]:
            try:
                text += os.read(control, 65536).decode(errors="replace")
            except OSError:  # the other side is closed
                break
    os.close(control)
    assert process.wait(timeout=30) == 0, text
    return [row.rstrip() for row in re.split(r"[\r\n]+", plain(text))]


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def shown(width: int, view: Any) -> list[str]:
    terminal = Console(width=width, highlight=False)
    with terminal.capture() as found:
        terminal.print(view)
    rows = found.get().splitlines()
    assert max(map(len, rows)) <= width
    return rows


@WIDTHS
def test_sweeps_have_their_names(width: int, tmp_path: Path) -> None:
    half_done(tmp_path, name="fusion_search-12", trials=200, gpus=1.0)
    make_sweep(tmp_path, "optimiser_search-3")
    rows = in_a_terminal(width, ["-m", "sweeps.status", "--storage", str(tmp_path)], tmp_path)
    assert max(map(len, rows)) <= width
    text = "\n".join(rows)
    assert re.search(r"fusion_search-12 +interrupted +3/200 .*0\.400", text)
    assert re.search(r"optimiser_search-3 +interrupted +0/5", text)
    assert "…" not in text
    rows = in_a_terminal(width, ["-m", "sweeps.status", "fusion_search-12", "--storage", str(tmp_path)], tmp_path)
    assert max(map(len, rows)) <= width
    text = "\n".join(rows)
    assert re.search(r"0 +finished +4/4 +0\.400 +the baseline", text)
    assert re.search(r"3 +interrupted +2/4 +0\.300 +kind=", text)
    assert "…" not in text


def test_a_wide_terminal_has_all_columns_and_a_long_name_is_folded(tmp_path: Path) -> None:
    half_done(tmp_path, name="fusion_search-12")
    make_sweep(tmp_path, name := "heatmap_search-of-the-second-cohort-with-a-long-name-3")
    view = status.ListView(status._look(tmp_path, None))
    head = shown(200, view)[1].split()
    assert head == list(status.LIST_COLUMNS)
    rows = shown(60, view)
    folded = [row.split()[0] for row in rows if row.strip()]
    assert name in "".join(folded)


@WIDTHS
def test_watched_trials_keep_to_one_line_each(width: int, tmp_path: Path) -> None:
    half_done(tmp_path, name="fusion_search-12")
    rows = shown(width, status.sweep_view(status.status_of(find_sweep(tmp_path, "fusion_search-12")), 20))
    trials = [row for row in rows if re.match(r" +\d ", row)]
    assert [re.match(r" +\d +(\w+) +(\d/4)", row).groups() for row in trials] == [  # type: ignore[union-attr]
        ("finished", "4/4"), ("pruned", "1/4"), ("failed", "0/4"), ("interrupted", "2/4"),
    ]  # fmt: skip


@WIDTHS
def test_the_live_view_has_its_numbers_and_bars(width: int, tmp_path: Path) -> None:
    plan = half_done(tmp_path)
    study = read_study(tmp_path / "s-1", "s-1")
    assert study is not None
    pace = MeasurePace(plan, study)
    trial = SimpleNamespace(
        config={"number": 123, "epochs": 0}, last_result={"epoch": 2, "spearman": 0.25, "best_spearman": 0.3}
    )
    pace.at_work[123] = trial  # type: ignore[assignment]
    view = LiveView(plan, pace, Control(Path(plan.folder)), Console(width=width))
    (row,) = [row for row in shown(width, view.view()) if "123" in row]
    assert re.search(r"123 +2/4 +[━╸╺ ]{8,} +0\.250 +0\.300", row)


@WIDTHS
def test_a_bar_has_its_room_below_a_long_title(width: int, tmp_path: Path) -> None:
    code = (
        "from qafe.console import progress\n"
        "with progress('making the sample dataset in /home/somebody/.cache/qafe/sample-1 (once)') as show:\n"
        "    show(21, 84)\n"
        "    import time; time.sleep(0.5)"
    )
    rows = in_a_terminal(width, ["-c", code], tmp_path)
    assert "making the sample dataset in /home/somebody/.cache/qafe/sample-1 (once)" in rows
    bar = next(row for row in rows if "21/84" in row)
    assert len(bar) <= width
    assert "25%" in bar
    assert bar.count("━") >= 10


class Terminal(io.StringIO):
    """stdout as a terminal, whose width rich reads from COLUMNS."""

    def isatty(self) -> bool:
        return True


def printed(width: int, show: Callable[[Any], None], what: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a function prints to a terminal of so many columns; its tables keep to them."""
    found = Terminal()
    monkeypatch.setattr("sys.stdout", found)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm-256color")
    show(what)
    text = plain(found.getvalue())
    assert max(len(row) for row in text.splitlines() if row.startswith("  ")) <= width
    return text


@WIDTHS
def test_the_best_trials_have_their_numbers(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"model.fusion.kind": "cross_split", "data.heatmap.points": "eyes_brows", "model.fusion.dropout": 0.25}
    best = {"trial": 1234, "state": "finished", OBJECTIVE: 0.8625, "epochs": 100, "pareto": True, "values": {}}
    summary = summary_with(0.5, 0.4, None) | {"trials": [best | {"baseline": False, "settings": settings}]}
    text = printed(width, page.print_table, summary, monkeypatch)
    assert re.search(r"1234 +finished +0\.86[23] +100 +kind=", text)
    for words in ("points=eyes_brows", "kind=cross_split", "dropout=0.25"):
        assert words in re.sub(r"\s", "", text), "folded, but whole"


@WIDTHS
def test_a_dry_run_has_its_settings(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = {"hours": 1.0, "low_hours": 0.5, "high_hours": 2.0, "wall_s": 7200.0, "epochs": 100.0}
    space = describe_space(STUDIES["fusion_search"], tiny(), frozenset())
    found = {
        "study": "fusion_search", "preset": "tiny", "expressions": ["smile"], "clips": {"training": 154},
        "space": space, "baseline": dict.fromkeys(space, "attention_pool"), "scheduler": "asha",
        "budget_hours": 3.0, "load": 0.5,
        "resources": {"trials": 16, "epochs": 10, "cpus_per_trial": 1, "gpus_per_trial": 1.0, "side_by_side": 2},
        "epoch_s": {"baseline": 1.0, "low": 1.0, "high": 2.0, "mean": 1.5, "configs": 20},
        "memory": {"measured_mb": 769.0, "estimated_mb": 520.0, "room_mb": 10391.0},
        "unit": "GPU-hours", "with_early_stopping": cost, "without_early_stopping": cost,
    }  # fmt: skip
    text = printed(width, print_summary, found, monkeypatch)
    for name in (*space, "seconds per epoch", "expected, without early stopping"):
        assert name in text
