"""Ours against a rival on the same work, taking turns in one run, so that a noisy machine disturbs both alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Row:
    """One line of the table: seconds of each round."""

    what: str
    unit: str
    """What the seconds are for, e.g. ``frame``."""
    ours: list[float]
    rival: list[float]
    rival_name: str = "published"
    notes: list[str] = field(default_factory=list)
    quantity: str = "s"
    """What ``ours`` and ``rival`` are in: ``s`` or ``GB``; less is better in both."""

    @property
    def ratios(self) -> list[float]:
        """How many times faster ours was in each round."""
        return [theirs / mine for mine, theirs in zip(self.ours, self.rival, strict=True)]

    def as_json(self) -> dict[str, object]:
        """Seconds, ratio and spread, as plain values."""
        return {
            "what": self.what,
            "unit": self.unit,
            f"ours_{self.quantity}": statistics.median(self.ours),
            "rival": self.rival_name,
            f"rival_{self.quantity}": statistics.median(self.rival),
            "ratio": statistics.median(self.ratios),
            "ratio_range": [min(self.ratios), max(self.ratios)],
            "rounds": len(self.ours),
            "notes": self.notes,
        }


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
