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
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import Run
from playwright.sync_api import Page, Request, expect, sync_playwright

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


REPORT_CHARTS = ("Best so far", "Parallel coordinates", "Slices", "Timeline of trials on workers", "All trials")
FIGURES = (
    "predicted_against_true",
    "spearman_over_epochs",
    "confusion",
    "residuals_per_patient",
    "example_heatmap",
)
"""Those that every trial has."""


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
    """Opens each page, makes sure that it shows what it should, and takes its picture.

    Attributes:
        elsewhere: hosts beyond the server's own that the browser was sent to.
    """

    def __init__(self, page: Page, uri: str, folder: Path, experiment: str = "fusion_search") -> None:
        self.page, self.uri, self.folder = page, uri, folder
        self.elsewhere: set[str] = set()
        page.on("request", self._note)
        self.client = MlflowClient(uri)
        found = self.client.get_experiment_by_name(experiment)
        assert found is not None
        self.experiment_id = found.experiment_id
        trial = "tags.`qafe.trial` != 'none'"
        order = ["metrics.best_spearman DESC"]
        parents = self.client.search_runs([self.experiment_id], "tags.`qafe.trial` = 'none'", max_results=1)
        self.parent = parents[0]
        self.trials = self.client.search_runs([self.experiment_id], trial, order_by=order)
        assert len(self.trials) >= 5

    def _note(self, request: Request) -> None:
        host = urlsplit(request.url).hostname
        if host and host != urlsplit(self.uri).hostname:
            self.elsewhere.add(host)

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
        first = self.page.get_by_text(self.trials[0].info.run_name, exact=True)
        assert first.count() == 0, "trials are folded into their sweep"
        self.page.locator("button[data-component-id*='runnamecellrenderer']").first.click(timeout=PATIENCE_MS)
        for trial in self.trials:
            expect(self.page.get_by_text(trial.info.run_name, exact=True).first).to_be_visible(timeout=PATIENCE_MS)
        above = self.page.get_by_text(name, exact=True).first.bounding_box()
        below = first.first.bounding_box()
        assert above is not None
        assert below is not None
        assert below["y"] > above["y"], "they stand below it"
        return self._take("experiment")

    def report(self) -> Path:
        """The sweep's own run: its report with verdict and charts."""
        self.page.set_viewport_size({"width": 1440, "height": 1000})
        self._open(self._run(self.parent, "artifacts/report.html"), "best_trials.csv")
        frame = self.page.frame_locator("iframe")
        expect(frame.get_by_text("Luck:").first).to_be_visible(timeout=PATIENCE_MS)
        titles = frame.locator("h2").all_text_contents()
        for title in REPORT_CHARTS:
            assert any(found.startswith(title) for found in titles), (title, titles)
        # One mark for each scored trial, with its number in the tip.
        numbers = {trial.data.tags["qafe.trial"] for trial in self.trials if "best_spearman" in trial.data.metrics}
        marks = frame.locator("h2:has-text('Best so far') + div svg[role=img] > :is(circle, path) title")
        assert {tip.split()[1].strip(",") for tip in marks.all_text_contents()} == numbers
        assert frame.locator("h2:has-text('All trials') + div tbody tr").count() == len(self.trials)
        frame.locator("h2", has_text="Best so far").evaluate("title => title.scrollIntoView()")
        return self._take("report")

    def parallel(self) -> Path:
        """Further down the report: the trials as lines through their settings."""
        frame = self.page.frame_locator("iframe")
        lines = frame.locator("h2:has-text('Parallel coordinates') + div svg polyline")
        assert lines.count() == sum("best_spearman" in trial.data.metrics for trial in self.trials)
        frame.locator("h2", has_text="Parallel coordinates").evaluate("title => title.scrollIntoView()")
        return self._take("parallel")

    def trial(self) -> Path:
        """The best trial's figures, each of them opened; the picture is the one of its predictions."""
        run = self.trials[0]
        names = [Path(found.path).stem for found in self.client.list_artifacts(run.info.run_id, "figures")]
        assert set(FIGURES) <= set(names), names
        self._open(self._run(run, "artifacts"), "predictions.csv")
        self.page.get_by_text("figures").first.click()
        for name in sorted(names, key=lambda name: name == "predicted_against_true"):
            self.page.get_by_text(f"{name}.png").first.click(timeout=PATIENCE_MS)
            expect(self.page.get_by_text(f"figures/{name}.png").first).to_be_visible(timeout=PATIENCE_MS)
            image = self.page.locator("img[src^='blob:'], img[src*='get-artifact']").first
            expect(image).to_be_visible(timeout=PATIENCE_MS)
            assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 300, name
        return self._take("trial")

    def compare(self) -> Path:
        """MLflow's own comparison of the best five trials."""
        ids = json.dumps([run.info.run_id for run in self.trials[:5]], separators=(",", ":"))
        path = f'compare-runs?runs={ids}&experiments=["{self.experiment_id}"]&workflowType=machine_learning'
        self._open(path, "Comparing 5 Runs", "Parallel Coordinates Plot")
        plot = self.page.locator(".js-plotly-plot .parcoords, .js-plotly-plot svg").first
        expect(plot).to_be_attached(timeout=PATIENCE_MS)
        text = self.page.inner_text("body")
        for run in self.trials[:5]:
            assert run.info.run_name in text
        return self._take("compare")

    def registry(self, model: str = "qafe-net") -> Path:
        """The registered model, whose first version is the champion."""
        self._open(f"models/{model}", "Version 1", "champion")
        row = self.page.locator("tr, [role=row]", has_text="Version 1").first
        expect(row).to_contain_text("champion", timeout=PATIENCE_MS)
        return self._take("registry")


def take_all(uri: str, folder: Path) -> list[Path]:
    """Every page's picture."""
    folder.mkdir(parents=True, exist_ok=True)
    with browser_page() as page:
        screens = Screens(page, uri, folder)
        taken = [screens.experiment(), screens.report(), screens.parallel(), screens.trial()]
        taken += [screens.compare(), screens.registry()]
        assert not screens.elsewhere, f"the browser was sent to {screens.elsewhere}"
        return taken


if __name__ == "__main__":
    for taken in take_all(sys.argv[1], Path(sys.argv[2])):
        print(taken)
