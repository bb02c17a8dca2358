"""How good predicted scores are, and whether that could be luck. NumPy only; nothing here ever returns NaN.

Shapes: N samples, K candidate predictions. A prediction that is not finite shows no skill: rank correlation,
correlation and kappa are 0.0, and in the error measures it counts as the end of the label range that lies
farther from its target.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import ConfigError

MINIMUM_SAMPLES = 3
"""Correlations and kappa of fewer samples are 0.0: two points are always perfectly ordered."""

FloatArray = NDArray[np.float64]


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class LuckBand(NamedTuple):
    """What the best of many candidates would score by luck alone."""

    max_observed: float
    """The best candidate's rank correlation."""
    threshold: float
    """The level quantile of the best candidate's rank correlation when there is nothing to find."""
    expected_max: float
    """Its mean when there is nothing to find."""
    p_value: float
    """Share of permutations, the observed order included, whose best is at least as good."""
    growth: tuple[tuple[float, float], ...] = ()
    """``expected_max`` and ``threshold`` of the first candidate alone, of the first two, and so on to all of them."""


def spearman(prediction: ArrayLike, target: ArrayLike) -> float:
    """Spearman's rank correlation, ties at their mean rank.

    0.0 for constant predictions or targets, fewer than 3 samples, or a prediction that is not finite.

    Raises:
        ConfigError: lengths differ, nothing to compare, or a target that is not finite.
    """
    x, y = _pair(prediction, target)
    return float((_unit_ranks(x[None]) @ _unit_ranks(y[None]).T).item())


def pearson(prediction: ArrayLike, target: ArrayLike) -> float:
    """Pearson's correlation; 0.0 where `spearman` is.

    Raises:
        ConfigError: lengths differ, nothing to compare, or a target that is not finite.
    """
    x, y = _pair(prediction, target)
    if not np.isfinite(x).all():
        return 0.0
    return float((_unit(x[None]) @ _unit(y[None]).T).item())


def mae(prediction: ArrayLike, target: ArrayLike) -> float:
    """Mean absolute error, in units of the score.

    Raises:
        ConfigError: lengths differ, nothing to compare, or a target that is not finite.
    """
    x, y = _finite_pair(prediction, target)
    return float(np.abs(x - y).mean())


def rmse(prediction: ArrayLike, target: ArrayLike) -> float:
    """Root of the mean squared error, in units of the score.

    Raises:
        ConfigError: lengths differ, nothing to compare, or a target that is not finite.
    """
    x, y = _finite_pair(prediction, target)
    return float(np.sqrt(((x - y) ** 2).mean()))


def relative_l2(prediction: ArrayLike, target: ArrayLike, *, score_range: tuple[float, float] | None = None) -> float:
    """R-l2 of the action-quality field: mean squared error relative to the range of scores, times 100.

    Source: CoRe, arXiv:2108.07797.

    Args:
        score_range: lowest and highest score; the targets' own by default, and 1 wide where they are constant.
    Raises:
        ConfigError: lengths differ, nothing to compare, or a target that is not finite.
    """
    x, y = _finite_pair(prediction, target)
    low, high = score_range if score_range is not None else (float(y.min()), float(y.max()))
    width = high - low if high > low else 1.0
    return float((((x - y) / width) ** 2).mean() * 100)


def quadratic_weighted_kappa(
    prediction: ArrayLike, target: ArrayLike, *, score_range: tuple[int, int] | None = None
) -> float:
    """Cohen's kappa with quadratic weights, of predictions rounded and clipped to whole scores.

    Source: Cohen, Psychological Bulletin 70 (1968). 0.0 for constant predictions or targets, fewer than 3 samples,
    or a prediction that is not finite.

    Args:
        score_range: lowest and highest whole score; the rounded targets' own by default.
    Raises:
        ConfigError: lengths differ, nothing to compare, or a target that is not finite.
    """
    x, y = _pair(prediction, target)
    if len(x) < MINIMUM_SAMPLES or not np.isfinite(x).all():
        return 0.0
    y = _round(y)
    low, high = score_range if score_range is not None else (y.min(), y.max())
    x = np.clip(_round(x), low, high)
    observed = ((x - y) ** 2).mean()
    # By chance: every prediction against every target, which is E[x^2] + E[y^2] - 2 E[x] E[y].
    expected = x.var() + y.var() + (x.mean() - y.mean()) ** 2
    if x.var() == 0 or y.var() == 0:
        return 0.0
    return float(1 - observed / expected)


def evaluate(prediction: ArrayLike, target: ArrayLike) -> dict[str, float]:
    """Every metric by name: spearman, pearson, mae, rmse, relative_l2, kappa.

    Raises:
        ConfigError: lengths differ, nothing to compare, or a target that is not finite.
    """
    return {
        "spearman": spearman(prediction, target),
        "pearson": pearson(prediction, target),
        "mae": mae(prediction, target),
        "rmse": rmse(prediction, target),
        "relative_l2": relative_l2(prediction, target),
        "kappa": quadratic_weighted_kappa(prediction, target),
    }


def spearman_interval(
    prediction: ArrayLike,
    target: ArrayLike,
    groups: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """A bootstrap interval of Spearman's rank correlation that resamples whole patients.

    Videos of one patient resemble each other; resampling single videos would make the interval too narrow.
    Source: the cluster bootstrap of Davison and Hinkley, Bootstrap Methods and their Application (1997), section
    3.8, with percentiles. Fewer than three patients say nothing: (-1.0, 1.0).

    Args:
        groups: the patient of each sample.
        level: share of resamples inside the interval.
        resamples: how often patients are drawn.
        seed: of the draws.
    Raises:
        ConfigError: lengths differ, nothing to compare, a target that is not finite, or a level outside (0, 1).
    """
    parts = {"": (prediction, target, groups)}
    return spearman_intervals(parts, level=level, resamples=resamples, seed=seed)[0]


def spearman_intervals(
    parts: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[Interval, dict[str, Interval]]:
    """`spearman_interval` of the mean over expressions, and of each of them.

    A patient who performs several expressions is drawn, or not, with all of them.

    Args:
        parts: expression -> (predictions, target, groups), the patient of each sample.
        level: share of resamples inside the interval.
        resamples: how often patients are drawn.
        seed: of the draws.
    Raises:
        ConfigError: lengths differ, nothing to compare, a target that is not finite, or a level outside (0, 1).
    """
    _check_level(level, resamples, "resamples")
    pairs = [_pair(prediction, target) for prediction, target, _ in parts.values()]
    for (x, _), (_, _, groups) in zip(pairs, parts.values(), strict=True):
        _members(groups, len(x))
    every = np.concatenate([np.asarray(groups) for _, _, groups in parts.values()])
    member, patients = _members(every, len(every))
    if patients < 3:
        return Interval(-1.0, 1.0), dict.fromkeys(parts, Interval(-1.0, 1.0))
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(patients, np.full(patients, 1 / patients), size=resamples)  # resamples patients
    values = np.zeros((len(pairs), resamples))
    start = 0
    for row, (x, y) in zip(values, pairs, strict=True):
        weight = drawn[:, member[start : start + len(x)]].astype(np.float64)  # how often each sample is in the resample
        start += len(x)
        if np.isfinite(x).all():
            row[:] = _weighted_spearman(x, y, weight)
    tails = [(1 - level) / 2, 1 - (1 - level) / 2]
    low, high = np.quantile(values, tails, axis=1)
    mean = np.quantile(values.mean(axis=0), tails)
    each = {name: Interval(float(low[place]), float(high[place])) for place, name in enumerate(parts)}
    return Interval(float(mean[0]), float(mean[1])), each


def luck_band(
    predictions: ArrayLike | Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]],
    target: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    *,
    level: float = 0.95,
    permutations: int = 2000,
    seed: int = 0,
) -> LuckBand:
    """How well the best of K candidates would rank if scores had nothing to do with videos.

    Every permutation reorders the targets, scores all K candidates and keeps the best: so the band grows with the
    number of trials and epochs that were looked at, and accounts for how alike they are. Targets move by whole
    patients: the patients' runs of targets are joined in random order and rotated by a random number of samples.
    Source: the maximum statistic of Westfall and Young, Resampling-Based Multiple Testing (1993).

    Args:
        predictions: K x N candidate predictions, or K x E x N of K trials with E epochs, of which each trial keeps
            its best; or expression -> (predictions, target, groups) with the same K in the same order, whose rank
            correlations are averaged over expressions (each with its own best epoch, each permuted by itself).
        target: N scores; not with a dict.
        groups: the patient of each sample; not with a dict.
        level: quantile of the best candidate's value that becomes the threshold.
        permutations: how often targets are reordered.
        seed: of the permutations.
    Raises:
        ConfigError: shapes do not agree, no candidate, or a level outside (0, 1).
    """
    _check_level(level, permutations, "permutations")
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
    rng = np.random.default_rng(seed)
    candidates, observed, permuted = [], [], []
    for given, given_target, given_groups in parts:
        table = np.asarray(given, dtype=np.float64)
        if table.ndim not in (2, 3) or 0 in table.shape:
            raise ConfigError(
                "candidate predictions must be a table of K candidates x N samples or K trials x E epochs x N "
                f"samples, got shape {table.shape}. Give a single candidate as predictions[None]."
            )
        table = table.reshape(len(table), -1, table.shape[-1])  # K E N
        _, y = _pair(table[0, 0], given_target)
        member, patients = _members(given_groups, len(y))
        order = np.argsort(member, kind="stable")  # each patient's samples side by side
        ranks = _unit_ranks(y[order][None])[0]
        blocks = np.split(np.arange(len(y)), np.flatnonzero(np.diff(member[order])) + 1)
        index = np.empty((permutations, len(y)), dtype=np.intp)
        for row in index:
            joined = np.concatenate([blocks[block] for block in rng.permutation(patients)])
            row[:] = np.roll(joined, rng.integers(len(y)))
        unit = _unit_ranks(table[..., order].reshape(-1, len(y)))  # K*E N
        candidates.append(unit.reshape(table.shape))  # K E N
        observed.append((candidates[-1] @ ranks).max(axis=1))  # K
        permuted.append(ranks[index])  # permutations N
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
    max_observed = float(np.max(np.sum(observed, axis=0)) / len(parts))
    # Sums in another order may differ in the last bits: equal arrangements must count as equal.
    beaten = int((best[:, -1] >= max_observed - 1e-12).sum())
    expected, threshold = best.mean(axis=0), np.quantile(best, level, axis=0)
    return LuckBand(
        max_observed=max_observed,
        threshold=float(threshold[-1]),
        expected_max=float(expected[-1]),
        p_value=(1 + beaten) / (1 + permutations),
        growth=tuple(zip(expected.tolist(), threshold.tolist(), strict=True)),
    )


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


def confusion(prediction: ArrayLike, target: ArrayLike) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """How often each whole score was predicted for each true one.

    Both are rounded, halves up, and predictions clipped to the scores there are: 0 to 4 where the targets lie in it,
    else the targets' own range.

    Returns:
        (scores [C], counts [C, C]): a row for each true score, a column for each predicted one.

    Raises:
        ConfigError: lengths differ, nothing to compare, or a target that is not finite.
    """
    x, y = _finite_pair(prediction, target)
    y = _round(y)
    low, high = int(y.min()), int(y.max())
    if low >= 0 and high <= 4:
        low, high = 0, 4
    x = np.clip(_round(x), low, high)
    counts = np.zeros((high - low + 1, high - low + 1), dtype=np.intp)
    np.add.at(counts, ((y - low).astype(np.intp), (x - low).astype(np.intp)), 1)
    return np.arange(low, high + 1), counts


def _pair(prediction: ArrayLike, target: ArrayLike) -> tuple[FloatArray, FloatArray]:
    x = np.asarray(prediction, dtype=np.float64)
    y = np.asarray(target, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or len(x) == 0:
        raise ConfigError(
            "predictions and targets must be two lists of the same length, not empty, got shapes "
            f"{x.shape} and {y.shape}. Give one prediction for each target."
        )
    if not np.isfinite(y).all():
        raise ConfigError(
            f"targets must be finite, got {y[~np.isfinite(y)][0]} at sample {int(np.argmax(~np.isfinite(y)))}. "
            "Leave samples without a score out."
        )
    return x, y


def _finite_pair(prediction: ArrayLike, target: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Predictions and targets; one that is not finite becomes the farther end of the targets' range."""
    x, y = _pair(prediction, target)
    low, high = y.min(), y.max()
    farthest = np.where(y - low > high - y, low, high)
    return np.where(np.isfinite(x), x, farthest), y


def _members(groups: ArrayLike, samples: int) -> tuple[NDArray[np.intp], int]:
    names: NDArray[Any] = np.asarray(groups)
    if names.shape != (samples,):
        raise ConfigError(
            f"groups must name the patient of each of the {samples} samples, got shape {names.shape}. "
            "Give one patient for each target."
        )
    unique, member = np.unique(names, return_inverse=True)
    return member.astype(np.intp), len(unique)


def _check_level(level: float, draws: int, name: str) -> None:
    if not 0 < level < 1:
        raise ConfigError(f"level must lie between 0 and 1, got {level:g}. Set level=0.95.")
    if draws < 1:
        raise ConfigError(f"{name} must be at least 1, got {draws}. Set {name}=2000.")


def _round(values: FloatArray) -> FloatArray:
    """Halves go up, so that 0.5 and 1.5 are treated alike."""
    return np.floor(values + 0.5)


def _unit(rows: FloatArray) -> FloatArray:
    """Rows with mean 0 and length 1; zero for a constant row or fewer than 3 columns."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    flat = np.ptp(rows, axis=1, keepdims=True) == 0
    if rows.shape[1] < MINIMUM_SAMPLES:
        flat[:] = True
    unit: FloatArray = np.where(flat, 0.0, centred / np.where(length > 0, length, 1.0))
    return unit


def _unit_ranks(rows: FloatArray) -> FloatArray:
    """`_unit` of each row's ranks; zero for a row with a value that is not finite."""
    from scipy.stats import rankdata  # takes a second to import: not when the module is

    finite = np.isfinite(rows).all(axis=1, keepdims=True)
    ranks: FloatArray = rankdata(np.where(finite, rows, 0.0), axis=1)
    return _unit(ranks)


def _weighted_spearman(x: FloatArray, y: FloatArray, weight: FloatArray) -> FloatArray:
    """Spearman's correlation of each resample in which sample n appears weight[r, n] times."""
    a, b = _weighted_ranks(x, weight), _weighted_ranks(y, weight)
    total = np.maximum(weight.sum(axis=1, keepdims=True), 1)  # none of an expression's patients may be drawn
    a = a - (weight * a).sum(axis=1, keepdims=True) / total
    b = b - (weight * b).sum(axis=1, keepdims=True) / total
    spread = np.sqrt((weight * a**2).sum(axis=1) * (weight * b**2).sum(axis=1))
    product = (weight * a * b).sum(axis=1)
    value: FloatArray = np.where(spread > 1e-9, product / np.where(spread > 1e-9, spread, 1.0), 0.0)
    return np.clip(value, -1, 1)


def _weighted_ranks(values: FloatArray, weight: FloatArray) -> FloatArray:
    """Mean rank of each value when sample n appears weight[r, n] times."""
    unique, place = np.unique(values, return_inverse=True)
    mass = weight @ np.eye(len(unique))[place]  # resamples distinct values
    ranks: FloatArray = (np.cumsum(mass, axis=1) - mass / 2)[:, place]
    return ranks
