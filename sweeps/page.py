"""The report as people read it: a table in the terminal, one page with the plots, files for programs."""

from __future__ import annotations

import csv
import html
import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from . import noise
from .charts import Sweep, charts
from .folder import SUMMARY_FILE
from .progress import changed_settings
from .report import TrialSummary
from .results import OBJECTIVE
from .svg import STYLE

PAGE_FILE = "report.html"
_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:1.5em auto;padding:0 1.2em;max-width:1100px;color:var(--ink);
background:var(--page)}
h1{font-size:22px;margin:0 0 .4em}h2{font-size:16px;margin:2em 0 .4em}p{margin:.3em 0;max-width:60em}
.soft{color:var(--soft);font-size:13px}.wide{overflow-x:auto}.charts{display:flex;flex-wrap:wrap;gap:.8em 1em}
svg.key{display:inline-block;vertical-align:-1px;margin:0 .35em 0 .9em}
table{border-collapse:collapse;font-size:12px;font-variant-numeric:tabular-nums}
td,th{padding:.25em .6em;border-top:1px solid var(--line);text-align:left;white-space:nowrap}
th{font-weight:600;border-top:0}tbody tr:hover td{background:var(--fill)}
"""


def write_report(
    folder: Path,
    trials: Sequence[TrialSummary],
    importances: Mapping[str, float],
    summary: Mapping[str, Any],
    log: frozenset[str] = frozenset(),
) -> None:
    """Writes the parent run's artifacts into a new folder, which then takes the place of an old one: tables, the page
    and, of a complete sweep, its summary. No name of a patient or of a machine is in them.

    Args:
        log: settings that were searched on a logarithmic scale.
    """
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with open(unfinished / "best_trials.csv", "w", newline="") as out:
        csv.writer(out).writerows(_table(trials))
    (unfinished / "importances.json").write_text(json.dumps(importances, indent=2))
    if summary["complete"]:
        (unfinished / SUMMARY_FILE).write_text(json.dumps(summary, indent=2))
    (unfinished / PAGE_FILE).write_text(draw_page(Sweep(trials, importances, summary, log)))
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)


def draw_page(sweep: Sweep) -> str:
    """One page for people, with everything inside it: verdict, charts, table."""
    summary, trials = sweep.summary, sweep.trials
    name = html.escape(summary["sweep"])
    lead = "".join(f"<p>{html.escape(line)}</p>" for line in verdict(summary))
    sections = "".join(
        f"<h2>{html.escape(chart.title)}</h2><div class='wide'>{chart.body}</div>"
        f"<p class='soft'>{html.escape(chart.caption)}</p>\n"
        for chart in charts(sweep)
    )
    head, *rows = _table(trials)
    cells = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>\n" for row in rows)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        '<meta name="viewport" content="width=device-width">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{STYLE}{_STYLE}</style></head>\n<body><h1>{name}</h1>{lead}\n{sections}"
        f"<h2>All trials</h2><div class='wide'><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>"
        "</div></body></html>\n"
    )


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


def print_table(summary: Mapping[str, Any], shown: int = 10) -> None:
    """The best trials, and what to think of them, on stdout."""
    table = Table(title=f"best trials of {summary['sweep']} ({', '.join(summary['expressions'])})", box=box.SIMPLE)
    others = _other_objectives(row["values"] for row in summary["trials"])
    words = ("state", "Pareto")
    for name in ("trial", "state", "validation\nSpearman", *others, *(["Pareto"] if others else []), "epochs"):
        table.add_column(name, justify="left" if name in words else "right", no_wrap=True)
    table.add_column("settings that differ from the baseline", overflow="fold")
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
        + ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    ]
    if not summary["complete"]:
        lines.append(f"So far:           {sum(counts.values())} of {summary['planned']} planned trials have ended")
    if best:
        lines.append(
            f"Best trial:       {best['trial']}, validation Spearman {best[OBJECTIVE]:.3f}"
            + _intervals(best["validation_interval"])
        )
    if ended_by := summary.get("ended_by"):
        lines.insert(1, f"Ended early:      {ended_by}")
    if best and (band := summary["luck"]):
        beyond = best[OBJECTIVE] > band["threshold"]
        lines.append(
            f"Luck:             with nothing to learn the best of these trials and epochs would reach "
            f"{band['expected_max']:.3f} on average, {band['threshold']:.3f} in 1 sweep of 20 "
            f"(p = {band['p_value']:.4f}): "
            + ("the best is beyond that" if beyond else "the best is NOT beyond that; do not trust it")
        )
    elif best and summary["splits"] > 1:
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
    if not summary["complete"]:
        lines.append("Test patients:    not looked at before the end")
    elif summary.get("test_failed"):
        lines.append(f"Test patients:    not scored ({summary['test_failed']}); the validation figure is optimistic")
    elif best["test_spearman"] is None:
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
