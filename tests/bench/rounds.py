"""Ours against a rival on the same work, taking turns in one run, so that a noisy machine disturbs both alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Row:
    """One line of the table: seconds of each round."""

    what: str
    unit: str
    """What the seconds are for, e.g. ``frame``."""
    ours: list[float]
    rival: list[float]
    """Empty where there is none."""
    rival_name: str = "published"
    notes: list[str] = field(default_factory=list)
    quantity: str = "s"
    """What ``ours`` and ``rival`` are in: ``s`` or ``GB``; less is better in both."""
    recorded: float | None = None
    """What the authors' own code took elsewhere; see `tests.bench.recorded`."""

    @property
    def ratios(self) -> list[float]:
        """How many times faster ours was in each round."""
        return [theirs / mine for mine, theirs in zip(self.ours, self.rival, strict=bool(self.rival))]

    def as_json(self) -> dict[str, object]:
        """Medians, ratio and spread, as plain values, and under ``each`` all that `from_json` needs."""
        ratios = self.ratios
        return {
            "what": self.what,
            "unit": self.unit,
            f"ours_{self.quantity}": statistics.median(self.ours),
            "rival": self.rival_name if self.rival else None,
            f"rival_{self.quantity}": statistics.median(self.rival) if self.rival else None,
            "ratio": statistics.median(ratios) if ratios else None,
            "ratio_range": [min(ratios), max(ratios)] if ratios else None,
            f"recorded_{self.quantity}": self.recorded,
            "rounds": len(self.ours),
            "notes": self.notes,
            "each": asdict(self),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Row:
        """The row that `as_json` made this from."""
        return cls(**content["each"])


@dataclass
class Found:
    """What a subject found, and in a sentence each what it left out and why."""

    rows: list[Row]
    left_out: list[str] = field(default_factory=list)


def compare(
    what: str, unit: str, ours: Callable[[], object], rival: Callable[[], object], *, per: int = 1, rounds: int = 5
) -> Row:
    """Times both in turns, after one round that does not count.

    Args:
        per: how many units one call does.
    """
    row = Row(what, unit, [], [])
    for number in range(rounds + 1):
        for call, times in ((ours, row.ours), (rival, row.rival)):
            gc.collect()
            start = time.perf_counter()
            call()
            if number:
                times.append((time.perf_counter() - start) / per)
    return row
