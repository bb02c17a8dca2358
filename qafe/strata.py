"""A draw of whole patients that covers mild and severe cases alike. A pure function.

Source: scikit-learn's GroupShuffleSplit for the idea (a group is on one side only); the strata are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def draw_patients(scores: Mapping[str, Sequence[float]], fraction: float, seed: int) -> set[str]:
    """Draws about a fraction of the patients.

    Patients are sorted by their mean score and cut into as many strata as patients are wanted; one is drawn from
    each. With four patients or more each side gets at least two, else at least one. The draw depends on the
    patients, their mean scores, the fraction and the seed only.

    Args:
        scores: all scores of each of at least two patients.
        fraction: in (0, 1).
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    least = 2 if len(scores) >= 4 else 1
    count = min(max(round(fraction * len(scores)), least), len(scores) - least)
    ranked = sorted(scores, key=lambda patient: (float(np.mean(sorted(scores[patient]))), patient))
    return {ranked[int(rng.choice(stratum))] for stratum in np.array_split(np.arange(len(ranked)), count)}
