"""How much of a score is luck of the seed, and how much is which patients it was measured on.

One configuration is trained with several seeds on several validation splits. Source: the one-way random-effects
analysis of variance with trainings nested in splits (Searle, Casella and McCulloch, Variance Components, 1992, chapters
3 and 4), where a seed is only another draw: seed 3 means nothing that carries over from one split to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

SEED, SPLIT = "train.seed", "data.split_seed"
NOISE_SETTINGS = frozenset({SEED, SPLIT})
LEVEL = 0.95


class Noise(NamedTuple):
    """The spread of one configuration's scores; standard deviations, None where there are too few trials to say."""

    trials: int
    splits: int
    mean: float
    sd: float
    seed_sd: float | None
    """Of trainings on the same split."""
    seed_sd_interval: tuple[float, float] | None
    split_sd: float | None
    """Of the splits' own means, were there endless seeds."""
    split_share: float | None
    """The splits' part of the variance of a score."""
    split_share_interval: tuple[float, float] | None
    same_split: float | None
    """Two trainings of one configuration on one split differ by more than this in 1 case of 20."""
    other_split: float | None
    """The same for trainings on two splits."""


def noise(scores: Sequence[tuple[int, float]]) -> Noise | None:
    """The variance components of one configuration's scores; None for fewer than two.

    Intervals assume normal scores, and those of an unbalanced table are approximate.

    Args:
        scores: (split, score) of each training.
    """
    from scipy import stats  # takes a second to import: not when the module is

    if len(scores) < 2:
        return None
    values = np.array([score for _, score in scores])
    groups = [values[[split == own for split, _ in scores]] for own in sorted({split for split, _ in scores})]
    total, splits = len(values), len(groups)
    within = total - splits
    found: dict[str, Any] = dict.fromkeys(Noise._fields) | {
        "trials": total,
        "splits": splits,
        "mean": float(values.mean()),
        "sd": float(values.std(ddof=1)),
    }
    if within < 1:
        return Noise(**found)
    tail = (1 - LEVEL) / 2
    seed_ms = float(sum(((group - group.mean()) ** 2).sum() for group in groups) / within)
    low, high = stats.chi2.ppf([tail, 1 - tail], within)
    found["seed_sd"] = seed_ms**0.5
    found["seed_sd_interval"] = ((within * seed_ms / high) ** 0.5, (within * seed_ms / low) ** 0.5)
    found["same_split"] = float(stats.t.ppf(1 - tail, within) * (2 * seed_ms) ** 0.5)
    if splits < 2:
        return Noise(**found)
    between = splits - 1
    size = float((total - sum(len(group) ** 2 for group in groups) / total) / between)
    split_ms = float(sum(len(group) * (group.mean() - values.mean()) ** 2 for group in groups) / between)
    split_variance = max(0.0, (split_ms - seed_ms) / size)
    variance = split_variance + seed_ms
    found["split_sd"] = split_variance**0.5
    if variance > 0:
        found["split_share"] = split_variance / variance
    if seed_ms > 0:
        ratio = split_ms / seed_ms
        ends = [(ratio / stats.f.ppf(part, between, within) - 1) / size for part in (1 - tail, tail)]
        low, high = (max(0.0, end) / (1 + max(0.0, end)) for end in ends)
        found["split_share_interval"] = (float(low), float(high))
    # The variance of one score is a sum of two mean squares; Satterthwaite's degrees of freedom.
    parts = [(split_ms / size, between), (seed_ms * (1 - 1 / size), within)]
    if split_variance == 0:
        parts = [(seed_ms, within)]
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts) if variance > 0 else 1.0
    # The estimate may have more degrees of freedom than the seed's own, but not less spread.
    found["other_split"] = max(found["same_split"], float(stats.t.ppf(1 - tail, freedom) * (2 * variance) ** 0.5))
    return Noise(**found)


def sentences(found: Mapping[str, Any]) -> list[str]:
    """The components as people read them.

    Args:
        found: `Noise` as a dict.
    """
    trials, splits = found["trials"], found["splits"]
    where = "one split of the patients" if splits == 1 else f"{splits} splits of the patients"
    lines = [
        f"Noise:            one configuration, {trials} trainings on {where}: validation Spearman "
        f"{found['mean']:.3f} on average, standard deviation {found['sd']:.3f}"
    ]
    if found["seed_sd"] is None:
        return [*lines, "                  one seed for each split: seed and split cannot be told apart"]
    low, high = found["seed_sd_interval"]
    lines.append(
        f"  of the seed:    standard deviation {found['seed_sd']:.3f} (95 %: {low:.3f} to {high:.3f}, from "
        f"{trials - splits} degrees of freedom)"
    )
    if found["split_sd"] is not None:
        share = "" if found["split_share"] is None else f", {found['split_share']:.0%} of the variance of a score"
        if found["split_share_interval"]:
            low, high = found["split_share_interval"]
            share += f" (95 %: {low:.0%} to {high:.0%}: these are only {splits} splits, and they share patients)"
        lines.append(f"  of the split:   standard deviation {found['split_sd']:.3f}{share}")
    lines.append(
        f"  a difference:   two configurations, each trained once on the same split, differ by up to "
        f"{found['same_split']:.3f} by the seed alone in 19 cases of 20"
        + ("" if found["other_split"] is None else f"; on two splits by up to {found['other_split']:.3f}")
        + ". The mean of n seeds divides the first by the root of n"
    )
    return lines
