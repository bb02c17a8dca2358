"""Patient-grouped splits, and the label shuffle that shows what nothing to learn looks like. Pure functions.

Source: scikit-learn's GroupShuffleSplit for the idea (a group is on one side only); the strata are ours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..errors import ManifestError
from ..strata import draw_patients
from .manifest import Sample


def split_validation(
    samples: Sequence[Sample], fraction: float, seed: int
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """(training, validation) samples with whole patients on either side.

    Patients are drawn by `qafe.strata.draw_patients`. Give all expressions at once and filter afterwards, and every
    expression has the same validation patients.

    Args:
        samples: all training samples, of every expression.
        fraction: share of the patients for validation, in (0, 1).
        seed: of the draw.
    Raises:
        ManifestError: there are fewer than two patients.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        scores[sample.patient].append(sample.score)
    if len(scores) < 2:
        raise ManifestError(
            "a validation split needs at least 2 patients in the training CSV (whole patients are held out), "
            f"got {len(scores)}. Add videos of other patients."
        )
    held = draw_patients(scores, fraction, seed)
    training = tuple(sample for sample in samples if sample.patient not in held)
    validation = tuple(sample for sample in samples if sample.patient in held)
    return training, validation


def shuffle_scores(samples: Sequence[Sample], seed: int) -> tuple[Sample, ...]:
    """The same samples with their scores permuted within each expression, for ``data.shuffle_labels``."""
    rng = np.random.default_rng(seed)
    places: dict[str, list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        places[sample.expression].append(place)
    shuffled = list(samples)
    for expression in sorted(places):
        here = places[expression]
        for place, source in zip(here, rng.permutation(here), strict=True):
            shuffled[place] = replace(samples[place], score=samples[int(source)].score)
    return tuple(shuffled)
