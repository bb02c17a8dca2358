"""How good the best of many candidates would look by luck alone. NumPy only; see `metrics` for what is never NaN.

Shapes: K candidate predictions of N samples each.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import ConfigError
from .metrics import FloatArray, check_level, members, pair, unit_ranks


class LuckBand(NamedTuple):
    """What the best of many candidates would score by luck alone."""

    max_observed: float
    """The best candidate's rank correlation."""
    threshold: float
    """The level quantile of the best candidate's rank correlation when there is nothing to find."""
    expected_max: float
    """Its mean when there is nothing to find."""
    p_value: float
    """Share of permutations, the observed order included, whose best is at least as good as the observed one."""
    growth: tuple[tuple[float, float], ...] = ()
    """``expected_max`` and ``threshold`` of the first candidate alone, of the first two, and so on to all of them."""


def luck_band(
    predictions: ArrayLike | Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]],
    target: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    *,
    observed: float | None = None,
    level: float = 0.95,
    permutations: int = 2000,
    seed: int = 0,
) -> LuckBand:
    """How well the best of K candidates would rank if scores had nothing to do with videos.

    Every permutation reorders the targets, scores all K candidates and keeps the best: so the band grows with the
    number of trials and epochs that were looked at, and accounts for how alike they are. Targets move by whole
    patients, and a patient who performs several expressions moves in all of them together: models that err on
    somebody's looks err in every expression. Each patient gets another's targets, from the first again where there
    are too few of them. P patients have P! orders, so a few patients cannot show much.
    Source: the maximum statistic of Westfall and Young, Resampling-Based Multiple Testing (1993).

    Args:
        predictions: K x N candidate predictions, or K x E x N of K trials with E epochs, of which each trial keeps
            its best; or expression -> (predictions, target, groups) with the same K in the same order, whose rank
            correlations are averaged over expressions (each with its own best epoch).
        target: N scores; not with a dict.
        groups: the patient of each sample; not with a dict.
        observed: the score that the p-value is for, where the best candidate is not the one that was chosen.
        level: quantile of the best candidate's value that becomes the threshold.
        permutations: how often targets are reordered.
        seed: of the permutations.
    Raises:
        ConfigError: shapes do not agree, no candidate, or a level outside (0, 1).
    """
    check_level(level, permutations, "permutations")
    if isinstance(predictions, Mapping):
        parts = list(predictions.values())
        if not parts or target is not None or groups is not None:
            raise ConfigError(
                "a dict of expressions holds its own targets and groups and must not be empty, got "
                f"{len(parts)} expressions. Call luck_band({{name: (predictions, target, groups)}})."
            )
    else:
        if target is None or groups is None:
            raise ConfigError("luck_band needs a target and a group for each sample, got none. Give all three.")
        parts = [(predictions, target, groups)]
    tables, targets = [], []
    for given, given_target, given_groups in parts:
        table = np.asarray(given, dtype=np.float64)
        if table.ndim not in (2, 3) or 0 in table.shape:
            raise ConfigError(
                "candidate predictions must be a table of K candidates x N samples or K trials x E epochs x N "
                f"samples, got shape {table.shape}. Give a single candidate as predictions[None]."
            )
        tables.append(table.reshape(len(table), -1, table.shape[-1]))  # K E N
        targets.append(pair(tables[-1][0, 0], given_target)[1])
        members(given_groups, len(targets[-1]))
    everybody = np.concatenate([np.asarray(names) for _, _, names in parts])
    everybody, patients = members(everybody, len(everybody))
    givers = np.tile(np.arange(patients), (permutations, 1))  # whose targets each patient gets
    np.random.default_rng(seed).permuted(givers, axis=1, out=givers)
    candidates, scores, permuted = [], [], []
    for table, y in zip(tables, targets, strict=True):
        member, everybody = np.split(everybody, [len(y)])
        candidates.append(unit_ranks(table.reshape(-1, len(y))).reshape(table.shape))  # K E N
        scores.append((candidates[-1] @ unit_ranks(y[None])[0]).max(axis=1))  # K
        permuted.append(unit_ranks(y[_moved(member, givers)]))  # permutations N
    if len({len(table) for table in candidates}) != 1:
        raise ConfigError(
            "every expression must have the same candidates, got "
            f"{', '.join(str(len(table)) for table in candidates)} of them. Leave unfinished candidates out."
        )
    trials = len(candidates[0])
    best = np.empty((permutations, trials))  # of the first candidate, of the first two, ...
    step = max(1, 4_000_000 // max(table[..., 0].size for table in candidates))  # a block of at most 32 MB
    for start in range(0, permutations, step):
        rows = slice(start, start + step)
        values = sum((table @ ranks[rows].T).max(axis=1) for table, ranks in zip(candidates, permuted, strict=True))
        best[rows] = np.maximum.accumulate(np.asarray(values) / len(parts), axis=0).T
    max_observed = float(np.max(np.sum(scores, axis=0)) / len(parts))
    # Sums in another order may differ in the last bits: equal arrangements must count as equal.
    beaten = int((best[:, -1] >= (max_observed if observed is None else observed) - 1e-12).sum())
    expected, threshold = best.mean(axis=0), np.quantile(best, level, axis=0)
    return LuckBand(
        max_observed=max_observed,
        threshold=float(threshold[-1]),
        expected_max=float(expected[-1]),
        p_value=(1 + beaten) / (1 + permutations),
        growth=tuple(zip(expected.tolist(), threshold.tolist(), strict=True)),
    )


def _moved(member: NDArray[np.intp], givers: NDArray[np.intp]) -> NDArray[np.intp]:
    """Which sample's target each sample gets, [R, N], when patient p gets those of ``givers[:, p]``, [R, P]."""
    count = np.bincount(member, minlength=givers.shape[1])
    order = np.argsort(member, kind="stable")  # each patient's samples side by side
    first = np.cumsum(count) - count
    nth = np.empty(len(member), dtype=np.intp)  # of its patient's samples
    nth[order] = np.arange(len(member)) - first[member[order]]
    source = givers[:, member]
    while (absent := count[source] == 0).any():  # whoever has no sample here passes on what he would get
        source = np.where(absent, np.take_along_axis(givers, source, axis=1), source)
    return order[first[source] + nth % count[source]]


def expected_best(values: ArrayLike) -> FloatArray:
    """The best of k of some values, drawn in random order without replacement, on average: for k = 1 .. N.

    What random search reaches with k trials, estimated without bias from its own N trials. The i-th lowest value is
    the best of k in C(i - 1, k - 1) of all C(N, k) draws.
    Source: Dodge et al., Show Your Work (arXiv:1909.03004), section 3. Differs: draws without replacement, whose
    estimate is unbiased (Tang et al., arXiv:2004.13705).

    Raises:
        ConfigError: no value, or one that is not finite.
    """
    from scipy.special import gammaln  # takes a second to import: not when the module is

    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if ordered.ndim != 1 or len(ordered) == 0 or not np.isfinite(ordered).all():
        raise ConfigError("expected_best needs a list of finite values, not empty. Leave trials without a score out.")
    count = len(ordered)
    i, k = np.arange(1, count + 1)[None, :], np.arange(1, count + 1)[:, None]
    ways = gammaln(i) - gammaln(k) - gammaln(np.maximum(i - k + 1, 1))
    draws = gammaln(count + 1) - gammaln(k + 1) - gammaln(count - k + 1)
    share: FloatArray = np.where(i >= k, np.exp(ways - draws), 0.0)
    best: FloatArray = (share / share.sum(axis=1, keepdims=True)) @ ordered
    return best
