"""python -m sweeps.status [NAME]: how sweeps stand, from any terminal or machine that sees their folder.

It only looks: it writes nothing, and no driver notices it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from qafe import console
from qafe.errors import ConfigError

from .control import Control
from .folder import STORAGE, SweepFolder, SweepState, find_sweep, local_storage, sweep_folders
from .progress import SECONDS, STATES, Pace, Progress, changed_settings, duration, progress_of, score_of
from .study import BASELINE, FAILURE, REASON, epochs_of, own_trials, read_study

WATCHED_S = 2.0
PLAIN_WIDTH = 160
"""Of tables that go to a file or a pipe."""
LIST_COLUMNS = ("sweep", "study", "state", "trials", "finished", "pruned", "failed", "best", "hours", "age", "left")
LEFT_OUT = ("study", "age", "hours", "pruned", "finished", "failed")
"""Which of them a narrow terminal goes without, one after the other; the names of sweeps are whole in any."""
COLOURS = {
    "running": "green",
    "starting": "green",
    "finished": "bold",
    "complete": "bold",
    "paused": "yellow",
    "pruned": "dim",
    "failed": "red",
    "interrupted": "red",
}


@dataclass(frozen=True, kw_only=True)
class TrialStatus:
    """One trial as people see it.

    Attributes:
        state: finished, pruned, failed, running, starting (no epoch yet), paused or interrupted.
        epochs: that it has behind it; of ``whole``.
        spearman: its best validation Spearman so far, the mean over expressions.
        seconds: of training.
        changed: the settings that differ from the baseline's.
        why: what ended it, where that is not its last epoch or early stopping.
    """

    number: int
    state: str
    epochs: int
    whole: int
    spearman: float | None
    seconds: float
    baseline: bool
    settings: dict[str, Any]
    changed: str
    failure: str
    why: str


@dataclass(frozen=True, kw_only=True)
class SweepStatus:
    """A sweep at one moment.

    Attributes:
        worker_hours: of training, summed over trials; ``gpu_hours``: times GPUs of a trial, 0 without GPUs.
        begun: when its first trial began, or None.
    """

    name: str
    study: str
    state: SweepState
    progress: Progress
    worker_hours: float
    gpu_hours: float
    begun: datetime.datetime | None
    trials: list[TrialStatus]

    @property
    def ended(self) -> bool:
        """Whether no driver works on it."""
        return self.state in ("complete", "interrupted")

    def as_json(self, *, trials: bool) -> dict[str, Any]:
        """For programs; without its trials in a list of sweeps."""
        now = self.progress
        tree: dict[str, Any] = {
            "sweep": self.name,
            "study": self.study,
            "state": self.state,
            "planned": now.planned,
            "counts": dict(now.counts),
            "best": {"trial": now.best[0], "spearman": now.best[1]} if now.best else None,
            "worker_hours": round(self.worker_hours, 4),
            "gpu_hours": round(self.gpu_hours, 4),
            "left_s": None if now.left_s is None else round(now.left_s, 1),
            "begun": self.begun.astimezone().isoformat(timespec="seconds") if self.begun else None,
        }
        if trials:
            tree["trials"] = [
                {
                    "trial": row.number,
                    "state": row.state,
                    "epochs": row.epochs,
                    "of": row.whole,
                    "spearman": row.spearman,
                    "seconds": round(row.seconds, 1),
                    "baseline": row.baseline,
                    "settings": row.settings,
                    "failure": row.failure or None,
                    "reason": row.why or None,
                }
                for row in self.trials
            ]
        return tree


def status_of(sweep: SweepFolder) -> SweepStatus:
    """Looks at a sweep.

    Raises:
        ConfigError: its study cannot be read.
    """
    plan = sweep.plan
    state: SweepState
    if sweep.driven:
        state = "paused" if Control(sweep.path).paused else "running"
    else:
        state = "complete" if sweep.complete else "interrupted"
    study = read_study(sweep.path, sweep.name, plan.get("study_storage", ""))
    found = own_trials(study) if study else []
    whole = _whole_epochs(plan)
    progress = progress_of(found, planned=plan["trials"], epochs=whole, pace=Pace.of(study) if study else None)
    if state in ("complete", "interrupted"):
        progress = dataclasses.replace(progress, left_s=None)
    baseline = next((trial.params for trial in found if trial.user_attrs.get(BASELINE)), {})
    begun = [trial.datetime_start for trial in found if trial.datetime_start is not None]
    hours = progress.seconds / 3600
    return SweepStatus(
        name=sweep.name,
        study=plan["study"],
        state=state,
        progress=progress,
        worker_hours=hours,
        gpu_hours=hours * plan.get("gpus_per_trial", 0.0),
        begun=min(begun, default=None),
        trials=[_trial_status(trial, state, whole, baseline) for trial in found],
    )


def _trial_status(trial: FrozenTrial, state: SweepState, whole: int, baseline: dict[str, Any]) -> TrialStatus:
    attributes, epochs = trial.user_attrs, epochs_of(trial)
    shown = STATES[trial.state]
    if trial.state == TrialState.RUNNING:
        shown = state if state in ("paused", "interrupted") else "running" if epochs else "starting"
        shown = "interrupted" if state == "complete" else shown
    first = BASELINE in attributes
    return TrialStatus(
        number=trial.number,
        state=shown,
        epochs=epochs,
        whole=whole,
        spearman=score_of(trial),
        seconds=attributes.get(SECONDS, 0.0),
        baseline=first,
        settings=dict(trial.params),
        changed="the baseline" if first else changed_settings(trial.params, baseline),
        failure=attributes.get(FAILURE, ""),
        why=attributes.get(REASON, ""),
    )


def _whole_epochs(plan: dict[str, Any]) -> int:
    return int(json.loads(plan["config_json"])["train"]["epochs"])


def totals(sweep: SweepStatus) -> str:
    """A sweep in one line: counts, the best, what it has cost, and how long it may take yet."""
    now = sweep.progress
    open_ones = "running" if sweep.state == "running" else "paused" if sweep.state == "paused" else "interrupted"
    named = {open_ones if state == "running" else state: count for state, count in now.counts.items()}
    counts = ", ".join(f"{count} {state}" for state, count in named.items() if count)
    parts = [f"{now.ended} of {now.planned} trials have ended" + (f" ({counts})" if counts else "")]
    if now.best is not None:
        parts.append(f"best {now.best[1]:.3f} (trial {now.best[0]})")
    if hours := _hours(sweep):
        parts.append(hours)
    if now.left_s is not None and not sweep.ended:
        parts.append(f"about {duration(now.left_s)} left" + (" once it goes on" if sweep.state == "paused" else ""))
    return "; ".join(parts)


def _hours(sweep: SweepStatus) -> str:
    if not sweep.progress.seconds:
        return ""  # of a version that did not measure it
    return f"{sweep.gpu_hours:.2f} GPU-hours" if sweep.gpu_hours else f"{sweep.worker_hours:.2f} worker-hours"


def sweep_view(sweep: SweepStatus, height: int | None = None) -> RenderableType:
    """One sweep's trials and totals; those that fit a screen, the latest, where it has a height."""
    table = Table(box=box.SIMPLE, padding=(0, 1))
    for name in ("trial", "state", "epochs", "Spearman"):
        table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    table.add_column("why it ended; settings that differ from the baseline", overflow="fold")
    rows = sweep.trials
    if height is not None and len(rows) > height:
        active = [row for row in rows if row.state in ("running", "starting", "paused")][-height:]
        others = [row for row in rows if row not in active]
        rows = sorted(others[len(others) - (height - len(active)) :] + active, key=lambda row: row.number)
        table.title = f"the latest {len(rows)} of {len(sweep.trials)} trials"
    for row in rows:
        why = f"{row.failure}: {row.why}" if row.failure and row.why else row.failure or row.why
        score = "" if row.spearman is None else f"{row.spearman:.3f}"
        epochs = f"{row.epochs}/{row.whole}"
        more = Text(
            "; ".join(filter(None, (why, row.changed))),
            no_wrap=height is not None,
            overflow="fold" if height is None else "ellipsis",
        )
        table.add_row(str(row.number), _coloured(row.state), epochs, score, more)
    title = Text.assemble((f"{sweep.name}  ", "bold"), f"{sweep.study}  ", _coloured(sweep.state))
    return Group(title, table, Text(totals(sweep)))


class ListView:
    """Many sweeps, a line each, with as many columns as the terminal has room for.

    Args:
        sweeps: a text stands for one that cannot be read.
    """

    def __init__(self, sweeps: Sequence[SweepStatus | str]) -> None:
        self.sweeps = sweeps

    def __rich_console__(self, terminal: Console, options: ConsoleOptions) -> RenderResult:
        shown = list(LIST_COLUMNS)
        for name in (*LEFT_OUT, None):
            table = self._table(shown)
            if (
                name is None
                or table.__rich_measure__(terminal, options.update(width=10_000)).maximum <= options.max_width
            ):
                break
            shown.remove(name)
        yield table

    def _table(self, shown: Sequence[str]) -> Table:
        table = Table(box=box.SIMPLE, padding=(0, 1))
        for name in shown:
            right = name in ("trials", "finished", "pruned", "failed", "best", "left", "age")
            table.add_column(name, justify="right" if right else "left", no_wrap=name != "sweep", overflow="fold")
        for sweep in self.sweeps:
            row = self._row(sweep)
            table.add_row(*(row.get(name, "") for name in shown))
        return table

    @staticmethod
    def _row(sweep: SweepStatus | str) -> dict[str, RenderableType]:
        if isinstance(sweep, str):
            return {"sweep": sweep, "state": Text("unreadable", style="red")}
        now = sweep.progress
        return {
            "sweep": sweep.name,
            "study": sweep.study,
            "state": _coloured(sweep.state),
            "trials": f"{now.ended}/{now.planned}",
            **{state: str(now.counts[state]) for state in ("finished", "pruned", "failed")},
            "best": f"{now.best[1]:.3f}" if now.best else "",
            "hours": _hours(sweep),
            "age": "" if sweep.begun is None else duration((datetime.datetime.now() - sweep.begun).total_seconds()),
            "left": "" if now.left_s is None else duration(now.left_s),
        }


def _coloured(state: str) -> Text:
    return Text(state, style=COLOURS.get(state, ""))


def main(argv: Sequence[str] | None = None) -> int:
    """Shows sweeps, and returns the exit status."""
    parser = console.parser("python -m sweeps.status", "How sweeps stand, or the trials of one. It only looks.")
    parser.add_argument("name", nargs="?", help="a sweep (default: all of them)")
    parser.add_argument("--storage", type=Path, default=STORAGE, help="folder of the sweeps (default: %(default)s)")
    parser.add_argument("--watch", action="store_true", help="look again and again until it has ended, or Ctrl-C")
    parser.add_argument("--json", action="store_true", help="for programs, on stdout")
    return console.run(_main, parser, argv)


def _main(options: argparse.Namespace) -> int:
    storage = local_storage(options.storage)
    if options.json and options.watch:
        raise ConfigError("--json is one answer, --watch is many. Leave one of them out.")
    if options.watch:
        _watch(storage, options.name)
        return 0
    found = _look(storage, options.name)
    if options.json:
        trees = [sweep.as_json(trials=options.name is not None) for sweep in found if isinstance(sweep, SweepStatus)]
        print(json.dumps(trees[0] if options.name is not None else trees, indent=2))
        return 0
    if not found:
        print(f"there are no sweeps in {storage}", file=sys.stderr)
        return 0
    _terminal().print(_view(found, options.name))
    return 0


def _look(storage: Path, name: str | None) -> list[SweepStatus | str]:
    if name is not None:
        return [status_of(find_sweep(storage, name))]
    found: list[SweepStatus | str] = []
    for sweep in sweep_folders(storage):
        try:
            found.append(status_of(sweep))
        except ConfigError:
            found.append(sweep.name)
    return found


def _view(found: Sequence[SweepStatus | str], name: str | None, height: int | None = None) -> RenderableType:
    return sweep_view(found[0], height) if name is not None and isinstance(found[0], SweepStatus) else ListView(found)


def _terminal() -> Console:
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


def _watch(storage: Path, name: str | None) -> None:
    """Shows the sweeps anew until no driver works on them; without a terminal one line whenever something changed."""
    terminal = _terminal()
    live = Live(console=terminal, auto_refresh=False, vertical_overflow="ellipsis") if terminal.is_terminal else None
    said: dict[str, str] = {}
    try:
        if live:
            live.start()
        while True:
            found = _look(storage, name)
            read = [sweep for sweep in found if isinstance(sweep, SweepStatus)]
            if live:
                live.update(_view(found, name, max(terminal.height - 8, 3)), refresh=True)
            for sweep in [] if live else read:
                line = f"{sweep.name} {sweep.state}: {totals(sweep)}"
                if said.get(sweep.name) != line:
                    said[sweep.name] = line
                    print(line, flush=True)
            if all(sweep.ended for sweep in read):
                return
            time.sleep(WATCHED_S)
    except KeyboardInterrupt:
        return  # it is how one stops to look
    finally:
        if live:
            live.stop()


if __name__ == "__main__":
    sys.exit(main())
