"""What a sweep's trials look like side by side: one function for each chart of the report."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from qafe.selection import expected_best

from .progress import duration
from .report import TrialSummary
from .svg import SHADES, Picture, Scale, shade
from .timeline import lanes, without_gaps

SCORE = "validation Spearman"
FAILURES = {
    "diverged": "the loss was not finite; counted as pruned",
    "memory": "not even a batch of one clip fits",
    "refused": "settings or weights that cannot work",
    "data": "a clip or table that cannot be read; ends the sweep",
    "error": "anything else that was raised",
    "lost": "the worker or its node died too often",
}
REACH = 0.15
"""How far, as a share of a numeric axis, a trial speaks for the settings around its own."""
CELLS = 36
MOST_SLICES = 18


class Chart(NamedTuple):
    """A part of the page."""

    title: str
    body: str
    caption: str


@dataclass(frozen=True)
class Sweep:
    """What the charts are drawn from.

    Attributes:
        trials: all of them, best first.
        importances: of settings, the most important one first.
        summary: as `report.overview` gives it.
        log: settings that were searched on a logarithmic scale.
    """

    trials: Sequence[TrialSummary]
    importances: Mapping[str, float]
    summary: Mapping[str, Any]
    log: frozenset[str] = frozenset()

    @property
    def scored(self) -> list[TrialSummary]:
        """Trials with a score, the lowest first: what is drawn last lies on top."""
        return [row for row in self.trials if row.objective is not None][::-1]

    @property
    def settings(self) -> list[str]:
        """Names of the settings that differ among trials, the most important first."""
        names = dict.fromkeys([*self.importances, *(name for row in self.trials for name in row.settings)])
        return [name for name in names if len({str(row.settings.get(name)) for row in self.trials}) > 1]


def charts(sweep: Sweep) -> Iterator[Chart]:
    """All charts for which there are trials, in the page's order."""
    drawn: tuple[Callable[[Sweep], Chart | None], ...] = (
        best_so_far,
        importances,
        parallel_coordinates,
        contour,
        slices,
        seed_noise,
        timeline,
        failures,
    )
    for draw in drawn:
        if (chart := draw(sweep)) is not None:
            yield chart
    for other in dict.fromkeys(name for row in sweep.trials for name in list(row.values)[1:]):
        yield pareto(sweep, other)


def tip(row: TrialSummary) -> str:
    """A trial in a few words."""
    score = "" if row.objective is None else f", {row.objective:.3f}"
    return f"trial {row.number}{score}, {row.state} after {row.epochs} epochs"


def best_so_far(sweep: Sweep) -> Chart | None:
    """The best score against what it has cost, with what the same trials give in random order, and luck's band."""
    rows = sorted((row for row in sweep.scored if row.ended is not None), key=lambda row: row.ended or 0.0)
    if not rows:
        return None
    cost, scores = sweep.summary["cost"], [row.objective or 0.0 for row in rows]
    hours = list(itertools.accumulate(row.seconds * cost["share"] / 3600 for row in rows))
    unit = cost["unit"]
    if not hours[-1]:
        hours, unit = list(range(1, len(rows) + 1)), "trials"
    random = expected_best(scores)
    even = [hours[-1] * (k + 1) / len(rows) for k in range(len(rows))]
    luck = sweep.summary["luck"]
    place_of = {row.number: at for row, at in zip(rows, hours, strict=True)}
    band = [
        (place_of[number], expected, threshold)
        for number, (expected, threshold) in zip(luck["trials"], luck["growth"], strict=True)
        if number in place_of
    ] if luck else []  # fmt: skip
    best = list(itertools.accumulate(scores, max))
    picture = Picture(
        760, 330, f"Best {SCORE} so far: {best[-1]:.3f} after {hours[-1]:.3g} {unit} and {len(rows)} trials"
    )
    x = Scale([0, *hours], 50, 745, margin=0.02)
    y = Scale([*scores, *random, *(value for row in band for value in row[1:])], 285, 28, margin=0.03)
    picture.axes(x, y, f"{unit} of the trials that have ended", SCORE)
    if band:
        upper = [(x.place(at), y.place(threshold)) for at, _, threshold in band]
        lower = [(x.place(at), y.place(expected)) for at, expected, _ in band]
        picture.add("polygon", "luck", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in upper + lower[::-1]))
        picture.line(upper, "lucky")
    picture.line([(x.place(at), y.place(value)) for at, value in zip(even, random, strict=True)], "random")
    corners = [(x.place(hours[0]), y.place(best[0]))]
    for at, value in zip(hours[1:], best[1:], strict=True):
        corners += [(x.place(at), corners[-1][1]), (x.place(at), y.place(value))]
    picture.line(corners, "best")
    for row, at in zip(rows, hours, strict=True):
        picture.mark(x.place(at), y.place(row.objective), row.state, tip(row))
    key = _key(("best", "best so far"), ("random", "the same trials in random order"))
    key += (
        '<svg class="key" width="14" height="10"><rect class="luck" width="14" height="10"/></svg>luck ' if band else ""
    )
    said = (
        f"{len(rows)} trials; filled: finished, hollow: stopped early, with what they had reached. Dashed: the best of "
        "as many of these trials taken in random order, on average. Random search lies on it, but for chance; a search "
        "that learns lies below it at first, for its best trials come late."
    )
    if band:
        said += (
            " Luck: what the best of the trials so far reaches when there is nothing to learn, from its average up to "
            "what 1 sweep in 20 exceeds. A best inside the band says nothing."
        )
    return Chart(f"Best so far against {unit}", f"<p class='soft'>{key}</p>{picture.svg}", said)


def importances(sweep: Sweep) -> Chart | None:
    """A bar for each setting."""
    if not sweep.importances:
        return None
    done = sum(row.state == "finished" for row in sweep.trials)
    most = max(sweep.importances.values()) or 1.0
    first = next(iter(sweep.importances))
    picture = Picture(760, 24 * len(sweep.importances) + 8, f"Importance of each setting; the largest is {first}'s")
    for number, (name, value) in enumerate(sweep.importances.items()):
        middle = 24 * number + 16
        picture.text(236, middle + 4, short(name), "end name")
        picture.add("rect", "sum", f"{name}: {value:.3f}", x=244, y=middle - 8, width=440 * value / most, height=16)
        picture.text(250 + 440 * value / most, middle + 4, f"{value:.2f}")
    few = " So few trials say little: read the order as a hint." if done < 30 else ""
    said = f"PED-ANOVA of the {done} finished trials: how differently the best ones chose. They sum to 1.{few}"
    return Chart("Importance of each setting", picture.svg, said)


def parallel_coordinates(sweep: Sweep) -> Chart | None:
    """Each trial as a line through its score and its settings."""
    rows, names = sweep.scored, sweep.settings
    if len(rows) < 2 or not names:
        return None
    step, top, bottom = 104, 56, 300
    picture = Picture(step * (len(names) + 1) - 10, 320, f"{len(rows)} trials as lines through their settings")
    low, high = rows[0].objective or 0.0, rows[-1].objective or 0.0
    scales = [Scale([row.objective for row in rows], bottom, top)]
    scales += [Scale([row.settings.get(name) for row in rows], bottom, top, log=name in sweep.log) for name in names]
    places = [40 + step * number for number in range(len(scales))]
    for row in rows:
        values = [row.objective, *(row.settings.get(name) for name in names)]
        points = [(at, scale.place(value)) for at, scale, value in zip(places, scales, values, strict=True)]
        picture.line(points, f"l{shade(row.objective or 0.0, low, high)}{' top' * (row is rows[-1])}", tip(row))
    for number, (at, scale, name) in enumerate(zip(places, scales, [SCORE, *names], strict=True)):
        picture.add("line", "axis", x1=at, x2=at, y1=top, y2=bottom)
        picture.text(at - 34, 16 if number % 2 else 36, short(name), "name")
        for tick, words in scale.ticks(5):
            picture.add("line", "axis", x1=at - 3, x2=at + 3, y1=tick, y2=tick)
            picture.text(at + 5, tick + 4, words)
    said = (
        f"All {len(rows)} scored trials, also those that were stopped early; dark (in dark mode: bright) is a high "
        "score, the best is the wide line. n/a: a setting that this kind of trial does not have. Settings stand in the "
        "order of their importance."
    )
    return Chart("Parallel coordinates", f'<div class="across">{picture.svg}</div>', said)


def contour(sweep: Sweep) -> Chart | None:
    """The score over the two most important settings."""
    names = [name for name in sweep.importances if name in sweep.settings][:2]
    if len(names) < 2:
        return None
    rows = [row for row in sweep.scored if all(row.settings.get(name) is not None for name in names)]
    if len(rows) < 3:
        return None
    picture = Picture(620, 400, f"{SCORE} over {names[0]} and {names[1]}")
    x, y = (
        Scale([row.settings[name] for row in rows], *ends, log=name in sweep.log, margin=0.06)
        for name, ends in zip(names, ((84, 600), (350, 28)), strict=True)
    )
    columns, across = _cells(x)
    lines, down = _cells(y)
    surface = smoothed(
        np.array([[_unit(x, row.settings[names[0]]), _unit(y, row.settings[names[1]])] for row in rows]),
        np.array([row.objective for row in rows]),
        np.array([[(a, b) for a in across] for b in down]),
        (x.numeric, y.numeric),
    )
    low, high = rows[0].objective or 0.0, rows[-1].objective or 0.0
    for (bottom, top), values in zip(lines, surface, strict=True):
        steps = [None if math.isnan(value) else shade(value, low, high) for value in values]
        at = 0
        for step, run in itertools.groupby(steps):
            length = len(list(run))
            if step is not None:
                left, right = columns[at][0], columns[at + length - 1][1]
                picture.add("rect", f"f{step}", x=left, y=top, width=right - left + 0.5, height=bottom - top + 0.5)
            at += length
    picture.axes(x, y, names[0], names[1])
    for row in rows:
        across_px, down_px = x.place(row.settings[names[0]]), y.place(row.settings[names[1]])
        picture.add("circle", "dot", tip(row), cx=across_px, cy=down_px, r=5.5)
        picture.text(across_px + 8, down_px + 4, f"{row.objective:.2f}", "name halo")
    said = (
        f"A dot for each of the {len(rows)} trials that have both settings; the shade is the mean of the trials "
        f"around, from {low:.2f} to {high:.2f} in {SHADES} steps. Blank: no trial is near enough to say. All other "
        "settings differ, too."
    )
    return Chart(
        f"Contour of the two most important settings: {short(names[0])} and {short(names[1])}", picture.svg, said
    )


def smoothed(places: np.ndarray, values: np.ndarray, grid: np.ndarray, numeric: tuple[bool, bool]) -> np.ndarray:
    """Scores [N] at places [N, 2] as a surface over a grid [Y, X, 2]: the mean of trials, weighted by a Gaussian of
    width `REACH` along numeric axes; along others only the same level counts. NaN where the weights sum to less than
    one trial's at one width.

    Source: the kernel regression of Nadaraya and Watson (1964).
    """
    weight = np.ones((*grid.shape[:2], len(values)))
    for axis, by_size in enumerate(numeric):
        apart = grid[..., axis, None] - places[:, axis]
        weight = weight * (np.exp(-0.5 * (apart / REACH) ** 2) if by_size else np.abs(apart) < 1e-6)
    total = weight.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        surface: np.ndarray = np.where(total >= math.exp(-0.5), weight @ values / total, np.nan)
    return surface


def slices(sweep: Sweep) -> Chart | None:
    """The score over each setting by itself."""
    rows = sweep.scored
    names = sweep.settings[:MOST_SLICES]
    if len(rows) < 2 or not names:
        return None
    pictures = []
    y = Scale([row.objective for row in rows], 128, 24, margin=0.05)
    for name in names:
        picture = Picture(226, 168, f"{SCORE} over {name}")
        x = Scale([row.settings.get(name) for row in rows], 40, 218, log=name in sweep.log, margin=0.04)
        many = len(x.levels) + x.absent > 2
        for at, words in x.ticks(4):
            picture.text(at, 143, words[:9] if many else words, "mid")
        for at, words in y.ticks(6):
            picture.add("line", "grid", x1=40, x2=218, y1=at, y2=at)
            picture.text(35, at + 4, words, "end")
        groups: dict[float, list[float]] = {}
        for row in rows:
            at = x.place(row.settings.get(name))
            groups.setdefault(at, []).append(row.objective or 0.0)
            spread = 0.0 if x.numeric else 5.0 * (row.number % 3 - 1)
            picture.mark(at + spread, y.place(row.objective), row.state, tip(row), 3)
        if not x.numeric:
            for at, found in groups.items():
                mean = sum(found) / len(found)
                picture.add("line", "mean", f"mean of {len(found)}: {mean:.3f}",
                            x1=at - 11, x2=at + 11, y1=y.place(mean), y2=y.place(mean))  # fmt: skip
        picture.text(40, 12, short(name), "name")
        pictures.append(picture.svg)
    said = f"Each setting by itself, {len(rows)} trials; a bar is the mean of a level. All other settings differ, too."
    return Chart("Slices", f'<div class="charts">{"".join(pictures)}</div>', said)


def seed_noise(sweep: Sweep) -> Chart | None:
    """The scores of one configuration, split by split."""
    found = sweep.summary["noise"]
    if not found:
        return None
    rows = [row for row in sweep.scored if row.state == "finished"]
    splits = [row.settings.get("data.split_seed", 0) for row in rows]
    picture = Picture(620, 260, f"{SCORE} of one configuration, mean {found['mean']:.3f}, on {found['splits']} splits")
    x, y = (
        Scale([str(split) for split in splits], 50, 605),
        Scale([row.objective for row in rows], 215, 28, margin=0.05),
    )
    picture.axes(x, y, "split of the patients (data.split_seed)", SCORE)
    for row, split in zip(rows, splits, strict=True):
        picture.mark(x.place(str(split)), y.place(row.objective), row.state, tip(row), 4)
    for split in x.levels:
        own = [row.objective or 0.0 for row, other in zip(rows, splits, strict=True) if str(other) == split]
        mean, at = sum(own) / len(own), x.place(split)
        picture.add("line", "mean", f"mean of {len(own)}: {mean:.3f}",
                    x1=at - 16, x2=at + 16, y1=y.place(mean), y2=y.place(mean))  # fmt: skip
    return Chart(
        "Noise of seed and split", picture.svg, f"One configuration, {len(rows)} trainings; a bar is a split's mean."
    )


def timeline(sweep: Sweep) -> Chart | None:
    """Which trial was on which worker, and when."""
    rows = {row.number: row for row in sweep.trials}
    found = lanes([(row.number, row.state, row.stretches) for row in sweep.trials])
    bars = [bar for lane in found.values() for bar in lane]
    if not bars:
        return None
    clock, cuts = without_gaps([(bar.start, bar.end) for bar in bars])
    whole = max(clock(bar.end) for bar in bars)
    picture = Picture(760, 26 * len(found) + 48, f"{len(rows)} trials on {len(found)} workers over {duration(whole)}")
    bottom = 26 * len(found) + 8
    unit, length = next((found for found in (("h", 3600), ("min", 60)) if whole > 2 * found[1]), ("s", 1))
    x = Scale([0, whole / length or 1], 122, 750)
    for at, words in x.ticks(8):
        picture.add("line", "grid", x1=at, x2=at, y1=4, y2=bottom)
        picture.text(at, bottom + 16, words, "mid")
    for number, (name, lane) in enumerate(found.items()):
        top = 26 * number + 8
        picture.text(112, top + 14, name, "end")
        for bar in lane:
            left, right = x.place(clock(bar.start) / length), x.place(clock(bar.end) / length)
            words = f"{tip(rows[bar.trial])}, {duration(bar.end - bar.start)}"
            picture.add("rect", bar.state, words, x=left, y=top, width=max(right - left - 1, 1), height=18, rx=2)
            if right - left > 9 * len(str(bar.trial)):
                kind = "mid" if bar.state == "running" else "mid bar"
                picture.text((left + right) / 2, top + 13, str(bar.trial), kind)
    for at, left_out in cuts:
        place = x.place(at / length)
        picture.add("line", "cut", f"{duration(left_out)} without a trial", x1=place, x2=place, y1=2, y2=bottom)
    picture.text((122 + 750) / 2, bottom + 34, f"{unit} since the first trial began", "mid name")
    key = '<svg class="key" width="14" height="10"><rect class="{0}" width="14" height="10"/></svg>{0} '
    states = dict.fromkeys(bar.state for bar in sorted(bars, key=lambda bar: bar.state))
    said = (
        f"Numbers are trials. {len(cuts)} times without any trial are cut short (dotted)."
        if cuts
        else "Numbers are trials."
    )
    return Chart(
        "Timeline of trials on workers", f"<p class='soft'>{''.join(map(key.format, states))}</p>{picture.svg}", said
    )


def failures(sweep: Sweep) -> Chart | None:
    """How many trials ended in which class of failure."""
    classes: dict[str, list[TrialSummary]] = {}
    for row in sorted(sweep.trials, key=lambda row: row.number):
        if row.failure:
            classes.setdefault(row.failure, []).append(row)
    if not classes:
        return None
    lines = []
    for failure, rows in sorted(classes.items(), key=lambda found: -len(found[1])):
        numbers = ", ".join(str(row.number) for row in rows[:20]) + (", ..." if len(rows) > 20 else "")
        cells = (failure, len(rows), FAILURES.get(failure.partition(":")[0], ""), numbers)
        lines.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
    head = "<tr><th>class</th><th>trials</th><th>what it means</th><th>which</th></tr>"
    count = sum(map(len, classes.values()))
    return Chart(
        "Failures by class",
        f"<table><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table>",
        f"{count} of {len(sweep.trials)} trials. Tracebacks are in the trials' own runs (failure.txt).",
    )


def pareto(sweep: Sweep, other: str) -> Chart:
    """Two objectives, and the trials that none is better than in both."""
    rows = [row for row in sweep.scored if other in row.values]
    picture = Picture(620, 340, f"{SCORE} and {other}; {sum(row.pareto for row in rows)} trials in the Pareto set")
    x = Scale([row.values[other] for row in rows] or [0, 1], 50, 600, margin=0.05)
    y = Scale([row.objective for row in rows] or [0, 1], 295, 28, margin=0.05)
    picture.axes(x, y, other, SCORE)
    for row in rows:
        at, high = x.place(row.values[other]), y.place(row.objective)
        picture.mark(at, high, "finished" if row.pareto else "pruned", tip(row), 4.5)
        picture.text(at + 7, high + 4, str(row.number), "name" if row.pareto else "")
    return Chart(f"Pareto set: {SCORE} and {other}", picture.svg, "Filled: in the Pareto set. Numbers are trials.")


def short(name: str) -> str:
    """A setting's name without what all have in common."""
    return name.removeprefix("model.").removeprefix("data.").removeprefix("train.")


def _cells(scale: Scale) -> tuple[list[tuple[float, float]], list[float]]:
    """The ends of each cell along a scale in pixels, and its middle as `_unit` counts it."""
    count = CELLS if scale.numeric else len(scale.levels)
    size = (scale.stop - scale.start) / count
    ends = [(scale.start + size * number, scale.start + size * (number + 1)) for number in range(count)]
    return ends, [(number + 0.5) / count for number in range(count)]


def _unit(scale: Scale, value: Any) -> float:
    """A value's place, 0 to 1."""
    return (scale.place(value) - scale.start) / (scale.stop - scale.start)


def _key(*lines: tuple[str, str]) -> str:
    return "".join(
        f'<svg class="key" width="26" height="10"><line class="{kind}" x1="0" x2="26" y1="5" y2="5"/></svg>{words} '
        for kind, words in lines
    )
