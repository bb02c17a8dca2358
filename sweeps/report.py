"""What a sweep found, and how much of it may be luck.

With 41 patients the highest of many noisy scores is mostly luck. So the report sets beside the best trial's
validation Spearman what the best would be if there were nothing to learn (a permutation test over every trial and
epoch that was looked at), and its Spearman on test patients that took no part in the choice, with an interval.
"""

from __future__ import annotations

import csv
import dataclasses
import html
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import plotly.graph_objects as go
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import TrialState
from rich import box
from rich.console import Console
from rich.table import Table

from qafe import config as configs
from qafe import metrics
from qafe.data.cohort import load_cohort
from qafe.data.dataset import ClipDataset
from qafe.errors import CheckpointError
from qafe.history import History, read_history
from qafe.model import weights
from qafe.train import BEST_FILE, pick_device, predict

from .searcher import OBJECTIVE, RAY_TRIAL
from .trial import CONFIG_FILE

MINIMUM_FOR_IMPORTANCES = 4
STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclass(frozen=True, kw_only=True)
class TrialSummary:
    """One trial as the report shows it."""

    number: int
    ray_trial: str
    state: str
    objective: float | None
    """Mean over expressions of the best validation Spearman; None before the first epoch."""
    epochs: int
    settings: dict[str, Any]
    baseline: bool
    checkpoint: Path | None = None
    run_id: str = ""


@dataclass(frozen=True, kw_only=True)
class TestResult:
    """The best trial on the test patients, measured once."""

    spearman: dict[str, float]
    interval: dict[str, metrics.Interval]
    ids: dict[str, list[str]] = dataclasses.field(repr=False)
    predictions: dict[str, list[float]] = dataclasses.field(repr=False)

    @property
    def mean(self) -> float:
        """Mean Spearman over the expressions."""
        return float(np.mean(list(self.spearman.values())))


def summarise(study: optuna.Study, checkpoints: Mapping[str, Path], runs: Mapping[str, str]) -> list[TrialSummary]:
    """Every trial of a study, best first; those without an objective last.

    Args:
        checkpoints: last checkpoint folder by Ray trial.
        runs: MLflow run id by Ray trial.
    """
    rows = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.WAITING:
            continue
        ray_trial = trial.user_attrs.get(RAY_TRIAL, "")
        values = trial.intermediate_values
        objective = trial.value if trial.state == TrialState.COMPLETE else max(values.values(), default=None)
        rows.append(
            TrialSummary(
                number=trial.number,
                ray_trial=ray_trial,
                state=STATES[trial.state],
                objective=objective,
                epochs=max(values, default=0),
                settings=dict(trial.params),
                baseline=bool(trial.user_attrs.get("baseline")),
                checkpoint=checkpoints.get(ray_trial),
                run_id=runs.get(ray_trial, ""),
            )
        )
    return sorted(rows, key=lambda row: (row.objective is None, -(row.objective or 0.0), row.number))


def best_trial(trials: Sequence[TrialSummary]) -> TrialSummary | None:
    """The finished trial with the highest objective; it alone can be registered."""
    return next((row for row in trials if row.state == "finished" and row.checkpoint is not None), None)


def luck(trials: Sequence[TrialSummary]) -> metrics.LuckBand | None:
    """What the best of these trials and epochs would score by luck alone; None if no trial left its predictions."""
    histories: list[History] = []
    for row in trials:
        if row.checkpoint is not None:
            try:
                histories.append(read_history(row.checkpoint))
            except CheckpointError:
                continue
    histories = [history for history in histories if all(entry.epochs for entry in history.values())]
    if not histories:
        return None
    tables = {}
    for expression, first in histories[0].items():
        candidates = [history[expression].prediction_matrix() for history in histories]
        length = max(len(table) for table in candidates)
        # A trial that was stopped early looked at fewer epochs: its last one again adds nothing to its best.
        padded = [np.concatenate([table, table[-1:].repeat(length - len(table), axis=0)]) for table in candidates]
        tables[expression] = (np.stack(padded), first.target, first.patients)
    return metrics.luck_band(tables)


def test_best(checkpoint: Path, data_root: str, expressions: Sequence[str], gpus: float) -> TestResult | None:
    """The best trial's models on the test patients, on one of the sweep's workers; None without test clips."""
    import ray

    task = ray.remote(num_cpus=1, num_gpus=gpus)(_score_test)
    found: TestResult | None = ray.get(task.remote(checkpoint, data_root, tuple(expressions)))
    return found


def _score_test(checkpoint: Path, data_root: str, expressions: tuple[str, ...]) -> TestResult | None:
    config = configs.from_json((checkpoint / CONFIG_FILE).read_text())
    cohort = load_cohort(data_root, config.data)
    spearman, interval, ids, predictions = {}, {}, {}, {}
    for expression in expressions:
        part = cohort.only(expression)
        if not part.test:
            continue
        model, _, _ = weights.load(checkpoint / expression / BEST_FILE)
        device = pick_device()
        scores = predict(model.to(device), ClipDataset(part.store, part.test, config, train=False), config, device)
        target = [sample.score for sample in part.test]
        spearman[expression] = metrics.spearman(scores, target)
        interval[expression] = metrics.spearman_interval(scores, target, [sample.patient for sample in part.test])
        ids[expression] = [sample.id for sample in part.test]
        predictions[expression] = scores.tolist()
    if not spearman:
        return None
    return TestResult(spearman=spearman, interval=interval, ids=ids, predictions=predictions)


def validation_interval(checkpoint: Path) -> dict[str, metrics.Interval]:
    """For each expression, the interval of the kept epoch's validation Spearman, patients resampled."""
    return {
        expression: metrics.spearman_interval(entry.best.predictions, entry.target, entry.patients)
        for expression, entry in read_history(checkpoint).items()
    }


def print_table(summary: Mapping[str, Any], shown: int = 10) -> None:
    """The best trials, and what to think of them, on stdout."""
    table = Table(title=f"best trials of {summary['sweep']} ({', '.join(summary['expressions'])})", box=box.SIMPLE)
    for name in ("trial", "state", "validation Spearman", "epochs", "settings that differ from the baseline"):
        table.add_column(name, justify="right" if name in ("trial", "validation Spearman", "epochs") else "left")
    baseline: dict[str, Any] = next((row["settings"] for row in summary["trials"] if row["baseline"]), {})
    for row in summary["trials"][:shown]:
        changed = [
            f"{name.rpartition('.')[2]}={value:.3g}"
            if isinstance(value, float)
            else f"{name.rpartition('.')[2]}={value}"
            for name, value in row["settings"].items()
            if baseline.get(name) != value
        ]
        objective = row[OBJECTIVE]
        table.add_row(
            str(row["trial"]),
            row["state"],
            "-" if objective is None else f"{objective:.3f}",
            str(row["epochs"]),
            "the baseline" if row["baseline"] else " ".join(changed),
        )
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for line in verdict(summary):
        console.print(line, highlight=False, soft_wrap=True)


def verdict(summary: Mapping[str, Any]) -> list[str]:
    """What the numbers allow one to say, in plain sentences."""
    best, counts = summary["best"], summary["counts"]
    lines = [
        f"{sum(counts.values())} trials in {summary['seconds']:.0f} s: "
        + ", ".join(f"{count} {state}" for state, count in counts.items() if count),
        f"Best trial:       {best['trial']}, validation Spearman {best[OBJECTIVE]:.3f}"
        + _intervals(best["validation_interval"]),
    ]
    if band := summary["luck"]:
        beyond = band["max_observed"] > band["threshold"]
        lines.append(
            f"Luck:             with nothing to learn the best of these trials and epochs would reach "
            f"{band['expected_max']:.3f} on average, {band['threshold']:.3f} in 1 sweep of 20 "
            f"(p = {band['p_value']:.4f}): "
            + ("the best is beyond that" if beyond else "the best is NOT beyond that; do not trust it")
        )
    if best["test_spearman"] is None:
        lines.append("Test:             no test clips; the validation figure is optimistic")
    else:
        lines.append(
            f"Test patients:    Spearman {best['test_spearman']:.3f}{_intervals(best['test_interval'])}, "
            "measured once, on patients that took no part in the choice"
        )
    return lines


def _intervals(found: Mapping[str, Sequence[float]]) -> str:
    parts = [
        f"{name} {low:.2f} to {high:.2f}" if high - low < 2 else f"{name}: too few patients to say"
        for name, (low, high) in found.items()
    ]
    return f" (95 % over patients: {', '.join(parts)})" if parts else ""


def importances(study: optuna.Study) -> dict[str, float]:
    """PED-ANOVA importance of each setting that every finished trial has; empty with too few trials."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(done) < MINIMUM_FOR_IMPORTANCES:
        return {}
    shared = set.intersection(*(set(trial.params) for trial in done))
    varied = sorted(name for name in shared if len({trial.params[name] for trial in done}) > 1)
    if not varied:
        return {}
    found = optuna.importance.get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(), params=varied)
    return {name: float(value) for name, value in found.items()}


def write_report(
    folder: Path,
    study: optuna.Study,
    trials: Sequence[TrialSummary],
    summary: Mapping[str, Any],
) -> None:
    """Writes the parent run's artifacts: tables, summary and interactive plots. No name of a patient is in them."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "best_trials.csv", "w", newline="") as out:
        csv.writer(out).writerows(_table(trials))
    (folder / "importances.json").write_text(json.dumps(importances(study), indent=2))
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    _write_page(folder / "report.html", study, trials, summary)


def _table(trials: Sequence[TrialSummary]) -> list[list[Any]]:
    names = list(dict.fromkeys(name for row in trials for name in row.settings))
    table: list[list[Any]] = [["trial", "state", OBJECTIVE, "epochs", "baseline", *names]]
    for row in trials:
        objective = "" if row.objective is None else f"{row.objective:.4f}"
        cells = [row.settings.get(name, "") for name in names]
        rounded = [f"{cell:.4g}" if isinstance(cell, float) else cell for cell in cells]
        table.append([row.number, row.state, objective, row.epochs, row.baseline, *rounded])
    return table


def _write_page(path: Path, study: optuna.Study, trials: Sequence[TrialSummary], summary: Mapping[str, Any]) -> None:
    """One page for people, with everything inside it: verdict, plots, table."""
    plots = {"Trials": _history_figure(trials)}
    if found := importances(study):
        bars = go.Bar(x=list(found.values())[::-1], y=list(found)[::-1], orientation="h")
        plots["Importance of each setting (PED-ANOVA)"] = go.Figure(bars, layout={"margin": {"l": 220, "t": 20}})
    scored = [row for row in trials if row.objective is not None]
    if len(scored) >= 2:
        plots["Parallel coordinates"] = _parallel_coordinates(scored)
    sections = []
    for number, (title, figure) in enumerate(plots.items()):
        body = figure.to_html(full_html=False, include_plotlyjs=number == 0, config={"displaylogo": False})
        sections.append(f"<h2>{html.escape(title)}</h2>{body}")
    sentences = "".join(f"<p>{html.escape(line)}</p>" for line in verdict(summary))
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in _table(trials)
    )
    path.write_text(
        "<!doctype html><meta charset='utf-8'><title>" + html.escape(summary["sweep"]) + "</title><style>"
        "body{font:14px system-ui,sans-serif;margin:2em;max-width:1200px}"
        "td{padding:.2em .6em;border-top:1px solid #ddd}"
        "tr:first-child{font-weight:bold}table{border-collapse:collapse;font-size:12px}</style>"
        f"<h1>{html.escape(summary['sweep'])}</h1>{sentences}{''.join(sections)}"
        f"<h2>All trials</h2><table>{rows}</table>"
    )


def _history_figure(trials: Sequence[TrialSummary]) -> Any:
    figure = go.Figure(layout={"title": "trials in the order they were asked for", "xaxis_title": "trial",
                               "yaxis_title": OBJECTIVE})  # fmt: skip
    ordered = sorted((row for row in trials if row.objective is not None), key=lambda row: row.number)
    for state in ("finished", "pruned", "failed"):
        rows = [row for row in ordered if row.state == state]
        if rows:
            x, y = [row.number for row in rows], [row.objective for row in rows]
            figure.add_trace(go.Scatter(x=x, y=y, mode="markers", name=state))
    finished = [row for row in ordered if row.state == "finished"]
    best = list(itertools.accumulate((row.objective or 0.0 for row in finished), max))
    figure.add_trace(go.Scatter(x=[row.number for row in finished], y=best, mode="lines", name="best so far"))
    return figure


def _parallel_coordinates(trials: Sequence[TrialSummary]) -> Any:
    """All trials in one picture, pruned ones too; a setting that a branch does not have is shown as n/a."""
    objective = [row.objective for row in trials]
    axes: list[dict[str, Any]] = [{"label": OBJECTIVE, "values": objective}]
    for name in dict.fromkeys(name for row in trials for name in row.settings):
        values = [row.settings.get(name) for row in trials]
        axes.append({"label": name.removeprefix("model.").removeprefix("data.")} | _axis(values))
    line = {"color": objective, "colorscale": "Viridis", "showscale": True}
    layout = {"height": 560, "margin": {"l": 90, "r": 60, "t": 130, "b": 40}}
    return go.Figure(go.Parcoords(line=line, dimensions=axes, labelangle=-25, labelside="top"), layout=layout)


def _axis(values: Sequence[Any]) -> dict[str, Any]:
    """Places on a parallel-coordinates axis: numbers as they are with n/a below them, else one level for each text."""
    given = [value for value in values if value is not None]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in given):
        if len(given) == len(values):
            return {"values": values}
        low, high = min(given), max(given)
        absent = low - 0.15 * ((high - low) or 1)
        ticks = [absent, *sorted({low, (low + high) / 2, high})]
        return {
            "values": [absent if value is None else value for value in values],
            "tickvals": ticks,
            "ticktext": ["n/a", *(f"{tick:.3g}" for tick in ticks[1:])],
        }
    texts = ["n/a" if value is None else str(value) for value in values]
    levels = sorted(set(texts))
    return {
        "values": [levels.index(text) for text in texts],
        "tickvals": list(range(len(levels))),
        "ticktext": levels,
    }
