"""Pictures in a page: scales, marks and colours of inline SVG.

They are drawn by hand, and not by a plotting library, because a report is drawn again and again while its sweep runs,
is read in light and dark and on a phone, and must hold a tip for every trial: each in a few milliseconds and kilobytes.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

SHADES = 6
"""Steps from the lowest to the highest score: the lowest fades into the page, in light and dark."""
ABSENT = "n/a"
STYLE = (
    """
:root{color-scheme:light dark;--page:#fff;--ink:#1c2126;--soft:#5f6973;--line:#dde1e5;--fill:#f4f6f8;
--done:#0072b2;--early:#7b8690;--bad:#c4450c;--luck:rgba(230,159,0,.25);--lucky:#a06a00;--random:#5f6973;
--s0:#d3e0ee;--s1:#a9c6e2;--s2:#76a6d1;--s3:#4584bb;--s4:#20619d;--s5:#08386f}
@media(prefers-color-scheme:dark){:root{--page:#15181c;--ink:#e4e7ea;--soft:#98a2ac;--line:#32383f;--fill:#1e2328;
--done:#56b4e9;--early:#98a2ac;--bad:#ff8a5c;--luck:rgba(230,159,0,.25);--lucky:#f0b840;--random:#98a2ac;
--s0:#24364a;--s1:#2d4f74;--s2:#3c70a3;--s3:#5a95cd;--s4:#8cbbe8;--s5:#d2e7fc}}
svg{display:block;height:auto;max-width:100%}.across svg{max-width:none}
svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
svg .mid{text-anchor:middle}svg .end{text-anchor:end}svg .name{fill:var(--ink)}
svg .halo{paint-order:stroke;stroke:var(--page);stroke-width:3px;stroke-linejoin:round}
svg .bar{fill:var(--page);font-size:10px}
svg .axis{stroke:var(--line);fill:none}svg .grid{stroke:var(--line);stroke-opacity:.6}
.finished{fill:var(--done);stroke:var(--done)}.pruned{fill:none;stroke:var(--early);stroke-width:1.5}
.failed{stroke:var(--bad);fill:none;stroke-width:1.8}.running{fill:none;stroke:var(--done);stroke-dasharray:2 2}
rect.pruned{fill:var(--early)}rect.failed{fill:var(--bad)}rect.finished{stroke:none}
.best{fill:none;stroke:var(--done);stroke-width:2}
.random{fill:none;stroke:var(--random);stroke-width:1.6;stroke-dasharray:6 4}
.luck{fill:var(--luck)}.lucky{fill:none;stroke:var(--lucky);stroke-width:1.4}.sum{fill:var(--done)}
.dot{fill:var(--page);stroke:var(--ink)}
.cut{stroke:var(--soft);stroke-dasharray:2 3}.mean{stroke:var(--ink);stroke-width:2}
"""
    + "".join(
        f".f{step}{{fill:var(--s{step})}}.l{step}{{fill:none;stroke:var(--s{step});stroke-width:1.5}}"
        for step in range(SHADES)
    )
    + ".top{stroke-width:3.5}"
)


class Scale:
    """Where values lie along one side of a picture: numbers by size, texts side by side, what is absent before both.

    Args:
        values: all that are to be shown; None is absent.
        start, stop: pixels.
        log: numbers by their logarithm.
        margin: what is left free beyond the lowest and the highest number, as a share of what lies between.
    """

    def __init__(
        self, values: Sequence[Any], start: float, stop: float, *, log: bool = False, margin: float = 0.0
    ) -> None:
        given = [value for value in values if value is not None]
        self.absent = len(given) < len(values)
        self.numeric = bool(given) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in given)
        self.log = log and self.numeric and min(given) > 0
        self.start, self.stop = start, stop
        self.levels: list[str] = [] if self.numeric else sorted({str(value) for value in given})
        if self.numeric:
            self.low, self.high = float(min(given)), float(max(given))
            self.only = self.low == self.high
            if self.only:
                self.low, self.high = (self.low / 2, self.high * 2) if self.log else (self.low - 0.5, self.high + 0.5)
            if self.log:
                beyond = (self.high / self.low) ** margin
                self.low, self.high = self.low / beyond, self.high * beyond
            else:
                beyond = margin * (self.high - self.low)
                self.low, self.high = self.low - beyond, self.high + beyond

    def share(self, value: Any) -> float:
        """A number's place between the lowest and the highest, 0 to 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return float((value - self.low) / (self.high - self.low))

    def place(self, value: Any) -> float:
        """Pixels."""
        if self.numeric:
            reserved = 0.15 if self.absent else 0.0
            at = 0.03 if value is None else reserved + (1 - reserved) * self.share(value)
        else:
            slots = len(self.levels) + self.absent
            at = ((0 if value is None else self.levels.index(str(value)) + self.absent) + 0.5) / max(slots, 1)
        return self.start + (self.stop - self.start) * at

    def ticks(self, most: int = 6) -> list[tuple[float, str]]:
        """Where something is written beside the scale, and what."""
        found = [(self.place(None), ABSENT)] if self.absent else []
        if not self.numeric:
            return found + [(self.place(level), level) for level in self.levels]
        if self.only:
            at = [math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2]
        elif self.log:
            decades = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            at = [10.0**decade for decade in decades]
            if len(at) < 2:
                at = [self.low, math.sqrt(self.low * self.high), self.high]
        else:
            step = round_step((self.high - self.low) / max(most - 1, 1))
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            at = [step * number for number in range(first, last + 1)]
        return found + [(self.place(value), f"{value:.3g}") for value in at]


class Picture:
    """One SVG as it grows.

    Args:
        name: what it shows, in one sentence, for those who do not see it.
    """

    def __init__(self, width: int, height: int, name: str) -> None:
        self.width, self.height, self.name = width, height, name
        self.parts: list[str] = []

    def add(self, tag: str, kind: str, tip: str = "", /, **at: float | str) -> None:
        """Any element of a class, with a tip."""
        names = "".join(f' {name.replace("_", "-")}="{_plain(value)}"' for name, value in at.items())
        inside = f"><title>{html.escape(tip)}</title></{tag}>" if tip else "/>"
        self.parts.append(f'<{tag} class="{kind}"{names}{inside}')

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        """Words; kind may say mid, end or name."""
        self.parts.append(f'<text class="{kind}" x="{_plain(x)}" y="{_plain(y)}">{html.escape(words)}</text>')

    def line(self, points: Sequence[tuple[float, float]], kind: str, tip: str = "") -> None:
        """A line through points."""
        self.add("polyline", kind, tip, points=" ".join(f"{_plain(x)},{_plain(y)}" for x, y in points))

    def mark(self, x: float, y: float, state: str, tip: str, size: float = 3.6) -> None:
        """A trial: a disc if it finished, a ring if it was stopped early, a cross if it failed."""
        if state == "failed":
            cross = f"M{x - size:.1f} {y - size:.1f}l{2 * size} {2 * size}m0 {-2 * size}l{-2 * size} {2 * size}"
            self.add("path", state, tip, d=cross)
        else:
            self.add("circle", state, tip, cx=x, cy=y, r=size)

    def axes(self, x: Scale, y: Scale, x_name: str = "", y_name: str = "") -> None:
        """Both axes with their ticks, and what they are."""
        for at, words in x.ticks():
            self.add("line", "axis", x1=at, x2=at, y1=y.start, y2=y.start + 4)
            self.text(at, y.start + 16, words, "mid")
        for at, words in y.ticks():
            self.add("line", "grid", x1=x.start, x2=x.stop, y1=at, y2=at)
            self.text(x.start - 6, at + 4, words, "end")
        self.add("line", "axis", x1=x.start, x2=x.stop, y1=y.start, y2=y.start)
        if x_name:
            self.text((x.start + x.stop) / 2, y.start + 33, x_name, "mid name")
        if y_name:
            self.text(4, y.stop - 9, y_name, "name")

    @property
    def svg(self) -> str:
        """The element; never wider than its place, and never so small that it cannot be read."""
        return (
            f'<svg role="img" aria-label="{html.escape(self.name)}" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" style="min-width:{min(self.width, 560)}px">{"".join(self.parts)}</svg>'
        )


def shade(value: float, low: float, high: float) -> int:
    """The step of `SHADES` that a value between the lowest and the highest has."""
    return min(SHADES - 1, int(SHADES * (value - low) / (high - low))) if high > low else SHADES - 1


def round_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, ... times a power of ten that is not below least."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10, 20) if power * factor >= least * (1 - 1e-9))


def _plain(value: float | str) -> str:
    return html.escape(value) if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
