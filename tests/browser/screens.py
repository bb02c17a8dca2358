"""The pages of the MLflow UI that people look at after a sweep, opened in a real browser.

``python -m tests.browser.screens URL FOLDER`` takes the README's screenshots from a server that holds a sweep and a
champion.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from playwright.sync_api import Page, expect, sync_playwright

PATIENCE_MS = 60_000
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PREFERENCES = """
localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
"""
HIDE_PATHS = """
for (const part of document.querySelectorAll('main *, [class*=artifact] *, section *, div'))
    if (part.children.length < 3 && part.textContent.startsWith('Path:')) part.style.visibility = 'hidden';
"""
"""A picture for others shows no folder of this machine."""


def chromium() -> str | None:
    """Path of an installed Chromium, or None."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def browser_page() -> Iterator[Page]:
    """A page of a fresh browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        page = browser.new_page(viewport={"width": 1440, "height": 860})
        page.add_init_script(PREFERENCES)
        yield page
        browser.close()


class Screens:
    """Opens each page, waits until it shows what it should, and takes its picture."""

    def __init__(self, page: Page, uri: str, folder: Path, experiment: str = "fusion_search") -> None:
        self.page, self.uri, self.folder = page, uri, folder
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(experiment)
        assert found is not None
        self.experiment_id = found.experiment_id
        trial = "tags.`qafe.trial` != 'none'"
        order = ["metrics.best_spearman DESC"]
        parents = client.search_runs([self.experiment_id], "tags.`qafe.trial` = 'none'", max_results=1)
        self.parent = parents[0]
        self.trials = client.search_runs([self.experiment_id], trial, order_by=order)
        assert self.trials

    def _open(self, path: str, *shown: str) -> None:
        self.page.goto(f"{self.uri}/#/{path}", wait_until="domcontentloaded")
        for text in shown:
            expect(self.page.get_by_text(text).first).to_be_visible(timeout=PATIENCE_MS)

    def _run(self, run: Run, view: str) -> str:
        return f"experiments/{self.experiment_id}/runs/{run.info.run_id}/{view}?workflowType=machine_learning"

    def _take(self, name: str) -> Path:
        self.page.wait_for_timeout(2500)  # charts are drawn after their text is there
        self.page.evaluate(HIDE_PATHS)
        path = self.folder / f"{name}.png"
        self.page.screenshot(path=path)
        return path

    def experiment(self) -> Path:
        """The experiment, with the sweep's run unfolded to its trials."""
        name = self.parent.info.run_name
        self._open(f"experiments/{self.experiment_id}/runs?workflowType=machine_learning", name)
        self.page.locator("button[data-component-id*='runnamecellrenderer']").first.click(timeout=PATIENCE_MS)
        for trial in self.trials[:3]:
            expect(self.page.get_by_text(trial.info.run_name).first).to_be_visible(timeout=PATIENCE_MS)
        return self._take("experiment")

    def report(self) -> Path:
        """The sweep's own run: its report with verdict and plots."""
        self.page.set_viewport_size({"width": 1440, "height": 1000})
        self._open(self._run(self.parent, "artifacts/report.html"), "best_trials.csv")
        frame = self.page.frame_locator("iframe")
        expect(frame.get_by_text("Luck:")).to_be_visible(timeout=PATIENCE_MS)
        expect(frame.get_by_text("best so far").first).to_be_visible(timeout=PATIENCE_MS)
        frame.locator("h2", has_text="Parallel coordinates").evaluate("title => title.scrollIntoView()")
        return self._take("report")

    def trial(self) -> Path:
        """The best trial's predictions against the truth."""
        self._open(self._run(self.trials[0], "artifacts"), "predictions.csv")
        self.page.get_by_text("figures").first.click()
        self.page.get_by_text("predicted_against_true.png").first.click(timeout=PATIENCE_MS)
        expect(self.page.locator("img[src^='blob:'], img[src*='get-artifact']").first).to_be_visible(
            timeout=PATIENCE_MS
        )
        return self._take("trial")

    def compare(self) -> Path:
        """MLflow's own comparison of the best five trials."""
        ids = json.dumps([run.info.run_id for run in self.trials[:5]], separators=(",", ":"))
        path = f'compare-runs?runs={ids}&experiments=["{self.experiment_id}"]'
        self._open(path, f"Comparing {min(len(self.trials), 5)} Runs", "Parallel Coordinates Plot")
        return self._take("compare")

    def registry(self, model: str = "qafe-net") -> Path:
        """The registered model and its champion."""
        self._open(f"models/{model}", "Version 1", "champion")
        return self._take("registry")


def take_all(uri: str, folder: Path) -> list[Path]:
    """Every page's picture."""
    folder.mkdir(parents=True, exist_ok=True)
    with browser_page() as page:
        screens = Screens(page, uri, folder)
        return [screens.experiment(), screens.report(), screens.trial(), screens.compare(), screens.registry()]


if __name__ == "__main__":
    for taken in take_all(sys.argv[1], Path(sys.argv[2])):
        print(taken)
