"""A running sweep in the terminal: its trials as they learn, the best so far, and the time left."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from ray.tune.experiment import Trial
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .callbacks import MeasurePace, TellPeople, say
from .control import Control
from .plan import Plan
from .progress import Progress, duration
from .results import OBJECTIVE

REDRAWN_S = 0.5
BAR_WIDTH = 24
ROWS_OF_ITS_OWN = 8
"""Lines of the view that are no trials, with some room above."""


def headline(now: Progress) -> str:
    """The sweep in one line, e.g. ``5 of 16 trials: 3 finished, 2 pruned; best 0.712 (trial 4); about 12 min left``."""
    counts = ", ".join(f"{count} {state}" for state, count in now.counts.items() if count and state != "running")
    parts = [f"{now.ended} of {now.planned} trials" + (f": {counts}" if counts else "")]
    if now.best is not None:
        parts.append(f"best {now.best[1]:.3f} (trial {now.best[0]})")
    if now.left_s is not None and now.ended < now.planned:
        parts.append(f"about {duration(now.left_s)} left")
    return "; ".join(parts)


class LiveView(TellPeople):
    """Redraws the sweep in place on stderr; only what is unusual scrolls by above it.

    Args:
        plan: the sweep.
        pace: which trials are at work, and how far the sweep is.
        control: what people have asked for.
        console: where to draw; for tests.
    """

    def __init__(self, plan: Plan, pace: MeasurePace, control: Control, console: Console | None = None) -> None:
        super().__init__(pace)
        self.plan = plan
        self.control = control
        self.started = time.monotonic()
        self.console = console or Console(stderr=True)
        # Drawn by the driver's own thread, between two events: the study and Ray's trials are not read by two at once.
        self.live = Live(console=self.console, auto_refresh=False, vertical_overflow="ellipsis")
        self._drawn = 0.0

    @staticmethod
    def possible() -> bool:
        """Whether stderr is a terminal that can be drawn on."""
        console = Console(stderr=True)
        return console.is_terminal and sys.stderr.isatty() and not console.is_dumb_terminal

    def __enter__(self) -> LiveView:
        before = sys.stderr
        self.live.start()
        self._lead_logs(before, sys.stderr)
        self.look()
        return self

    def __exit__(self, *_: object) -> None:
        drawn_through = sys.stderr
        try:
            self.pace.at_work.clear()
            self._draw()
        finally:
            self.live.stop()  # shows the cursor again
            self._lead_logs(drawn_through, sys.stderr)

    def look(self) -> None:
        """Redraws, unless that was a moment ago."""
        if time.monotonic() - self._drawn >= REDRAWN_S:
            self._draw()

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """A moment later."""
        self.look()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self.live.update(self.view(), refresh=True)

    def view(self) -> Group:
        """What is drawn."""
        now = self.pace.progress()
        title = Text(f"{self.plan.name}  ", style="bold")
        title.append(f"{self.plan.study} on {', '.join(self.plan.expressions)}", style="not bold")
        title.append(f"  {duration(time.monotonic() - self.started)}", style="not bold dim")
        if self.control.paused:
            title.append("  paused" if not self.pace.at_work else "  pausing after these epochs", style="yellow")
        return Group(title, self._table(), Text(headline(now)))

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE, padding=(0, 1))
        for name in ("trial", "epoch", "", "Spearman", "best"):
            drawn = not name  # narrower in a narrow terminal
            table.add_column(
                name, justify="left" if drawn else "right", no_wrap=not drawn, max_width=BAR_WIDTH if drawn else None
            )
        whole = self.pace.whole_epochs
        room = max(self.console.height - ROWS_OF_ITS_OWN, 1)
        rows = sorted(self.pace.at_work.items())
        for number, trial in rows[:room]:
            result = trial.last_result or {}
            epoch = min(result.get("epoch") or trial.config["epochs"], whole)
            bar = ProgressBar(total=whole, completed=epoch)
            scores = (f"{result[name]:.3f}" if name in result else "" for name in ("spearman", OBJECTIVE))
            table.add_row(str(number), f"{epoch}/{whole}", bar, *scores)
        if len(rows) > room:
            table.add_row("…", "", Text(f"and {len(rows) - room} more"), "", "")
        return table

    def _say(self, trial: Trial, what: str) -> None:
        if what.startswith("failed") or "(" in what:  # the table tells the rest
            say(f"trial {trial.config['number']} {what}")

    @staticmethod
    def _lead_logs(old: Any, new: Any) -> None:
        """Handlers that write to the old stderr write to the new one, which goes around the view."""
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.setStream(new)
