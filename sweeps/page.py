"""The report as people read it: a table in the terminal, one page with the plots, files for programs."""

from __future__ import annotations

import csv
import html
import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from rich import box
from rich.console import Console
from rich.table import Table

from . import noise
from .progress import changed_settings
from .report import TrialSummary
from .results import OBJECTIVE


def write_report(
    folder: Path,
    trials: Sequence[TrialSummary],
    importances: Mapping[str, float],
    summary: Mapping[str, Any],
) -> None:
    """Writes the parent run's artifacts: tables, summary and interactive plots. No name of a patient is in them."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "best_trials.csv", "w", newline="") as out:
        csv.writer(out).writerows(_table(trials))
    (folder / "importances.json").write_text(json.dumps(importances, indent=2))
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    _write_page(folder / "report.html", trials, importances, summary)


def _table(trials: Sequence[TrialSummary]) -> list[list[Any]]:
    names = list(dict.fromkeys(name for row in trials for name in row.settings))
    others = _other_objectives(row.values for row in trials)
    extra = [*others, "pareto"] if others else []
    table: list[list[Any]] = [["trial", "state", OBJECTIVE, *extra, "epochs", "baseline", *names]]
    for row in trials:
        objective = "" if row.objective is None else f"{row.objective:.4f}"
        cells = [row.settings.get(name, "") for name in names]
        rounded = [f"{cell:.4g}" if isinstance(cell, float) else cell for cell in cells]
        more = [*(f"{row.values[name]:.6g}" if name in row.values else "" for name in others), row.pareto]
        table.append([row.number, row.state, objective, *(more if others else ()), row.epochs, row.baseline, *rounded])
    return table


def _other_objectives(values: Iterable[Mapping[str, float]]) -> list[str]:
    """The objectives of a sweep beside the first; none if it has only one."""
    return list(dict.fromkeys(name for row in values for name in row))[1:]


def _write_page(
    path: Path, trials: Sequence[TrialSummary], importances: Mapping[str, float], summary: Mapping[str, Any]
) -> None:
    """One page for people, with everything inside it: verdict, plots, table."""
    plots = {"Trials": _history_figure(trials)}
    for other in _other_objectives(row.values for row in trials):
        plots[f"Pareto set: {OBJECTIVE} and {other}"] = _pareto_figure(trials, other)
    if importances:
        bars = go.Bar(x=list(importances.values())[::-1], y=list(importances)[::-1], orientation="h")
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


def _pareto_figure(trials: Sequence[TrialSummary], other: str) -> Any:
    figure = go.Figure(layout={"xaxis_title": other, "yaxis_title": OBJECTIVE})
    for name, pareto in (("in the Pareto set", True), ("others", False)):
        rows = [row for row in trials if other in row.values and row.pareto is pareto]
        x, y = [row.values[other] for row in rows], [row.objective for row in rows]
        text = [str(row.number) for row in rows]
        figure.add_trace(go.Scatter(x=x, y=y, text=text, mode="markers+text", textposition="top center", name=name))
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


def print_table(summary: Mapping[str, Any], shown: int = 10) -> None:
    """The best trials, and what to think of them, on stdout."""
    table = Table(title=f"best trials of {summary['sweep']} ({', '.join(summary['expressions'])})", box=box.SIMPLE)
    others = _other_objectives(row["values"] for row in summary["trials"])
    numbers = ("trial", "validation Spearman", *others, "epochs")
    columns = ("trial", "state", "validation Spearman", *others, *(["Pareto"] if others else []), "epochs")
    for name in (*columns, "settings that differ from the baseline"):
        table.add_column(name, justify="right" if name in numbers else "left")
    baseline: dict[str, Any] = next((row["settings"] for row in summary["trials"] if row["baseline"]), {})
    # The whole Pareto set is shown: its members are worth the same.
    ordered = sorted(summary["trials"], key=lambda row: not row["pareto"]) if others else summary["trials"]
    for row in ordered[: max(shown, sum(row["pareto"] for row in ordered) if others else 0)]:
        objective = row[OBJECTIVE]
        table.add_row(
            str(row["trial"]),
            row["state"],
            "-" if objective is None else f"{objective:.3f}",
            *(f"{row['values'][name]:.6g}" if name in row["values"] else "-" for name in others),
            *(["*" if row["pareto"] else ""] if others else []),
            str(row["epochs"]),
            "the baseline" if row["baseline"] else changed_settings(row["settings"], baseline),
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
    if ended_by := summary.get("ended_by"):
        lines.insert(1, f"Ended early:      {ended_by}")
    if band := summary["luck"]:
        beyond = best[OBJECTIVE] > band["threshold"]
        lines.append(
            f"Luck:             with nothing to learn the best of these trials and epochs would reach "
            f"{band['expected_max']:.3f} on average, {band['threshold']:.3f} in 1 sweep of 20 "
            f"(p = {band['p_value']:.4f}): "
            + ("the best is beyond that" if beyond else "the best is NOT beyond that; do not trust it")
        )
    elif summary["splits"] > 1:
        lines.append(
            "Luck:             not said: the trials were measured on different patients. The best one may only have "
            "the easiest of them; it is no better configuration"
        )
    if summary["noise"]:
        lines += noise.sentences(summary["noise"])
    pareto = sorted(row["trial"] for row in summary["trials"] if row["pareto"])
    if pareto:
        lines.append(
            f"Pareto set:       {', '.join(map(str, pareto))}: no other trial is as good in all of "
            f"{', '.join(summary['objectives'])} and better in one"
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
