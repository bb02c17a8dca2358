"""Names in the order in which people count: ``img_2`` before ``img_10``."""

from __future__ import annotations

import re

Key = list[tuple[int, str]]


def natural_order(name: str) -> Key:
    """What to sort a name by. Only the digits 0 to 9 count: of others (``²``) not even Python's own tests agree."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if place % 2 else (-1, part) for place, part in enumerate(parts)]
