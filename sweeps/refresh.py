"""The report while a sweep runs: drawn again every minute at most, in the background, for a hundredth of the time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial

from qafe.data.cohort import Cohort
from tracking.runs import SweepTracker

from . import page, report
from .folder import REPORT_FOLDER
from .plan import Plan
from .results import OBJECTIVE
from .study import read_study

logger = logging.getLogger(__name__)

EVERY_S = 60.0
MOST_OF_TIME = 0.01
"""The share of the driver's time that may go into it: what takes a second is done every hundred."""
SENT_PATIENCE_S = 5.0
"""A refresh waits so long for the one before it, and all else, to be sent: it never piles up for a server that is
away."""


class RefreshReport(Callback):
    """Draws the report of the trials so far, and hands it to the tracker like the final one.

    Args:
        clock, cpu_clock: seconds, and seconds that the calling thread has computed.
    """

    def __init__(
        self,
        plan: Plan,
        cohort: Cohort,
        tracker: SweepTracker,
        *,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self.plan, self.cohort, self.tracker = plan, cohort, tracker
        self.clock, self.cpu_clock = clock, cpu_clock
        self.count = 0
        self.cpu_s = 0.0
        self._started = self._last = clock()
        self._cost_s = 0.0
        self._news = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial ended: there is something new to draw."""
        self._news = True

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial failed for good."""
        self._news = True

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """A moment later: draws if there is something new, and it is time."""
        if not self._news or self.clock() - self._last < max(EVERY_S, self._cost_s / MOST_OF_TIME):
            return
        if self._thread is None or not self._thread.is_alive():
            self._news, self._last = False, self.clock()
            self._thread = threading.Thread(target=self._refresh, name="report", daemon=True)
            self._thread.start()

    def close(self, *, wait: bool = True) -> None:
        """Waits for the one that is being drawn, or drops it: the final report takes its place."""
        self._closed = True
        if wait and self._thread is not None:
            self._thread.join()
        passed = self.clock() - self._started
        logger.info("report refreshed %d times: %.2f s of %.0f s (%.2f %%)", self.count, self.cpu_s, passed,
                    100 * self.cpu_s / max(passed, 1e-9))  # fmt: skip

    def _refresh(self) -> None:
        if not self.tracker.wait_until_sent(SENT_PATIENCE_S):
            self._news = True
            return
        began = self.cpu_clock()
        try:
            self._draw()
        except Exception as err:  # a chart that fails must not end a sweep
            if not self._closed:
                logger.warning("the report is not refreshed: %s: %s", type(err).__name__, err)
        self._cost_s = self.cpu_clock() - began
        self.cpu_s += self._cost_s
        self.count += 1

    def _draw(self) -> None:
        # A study of its own to read from: the driver goes on with its one meanwhile.
        study = read_study(Path(self.plan.folder), self.plan.name, self.plan.study_storage)
        if study is None:
            return
        folder = Path(self.plan.folder)
        runs = {int(trial): run for trial, run in self.tracker.run_ids().items() if trial}
        trials = report.summarise(study, folder, runs)
        summary = report.overview(self.plan, self.cohort, trials, self.clock() - self._started)
        place = folder / REPORT_FOLDER
        page.write_report(place, trials, report.importances(study), summary, report.log_settings(study))
        best = summary["best"]
        numbers = {"trials": float(sum(summary["counts"].values()))} | ({OBJECTIVE: best[OBJECTIVE]} if best else {})
        self.tracker.sweep_files(place, numbers)
