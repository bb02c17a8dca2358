"""How good predicted scores are, and how surely. NumPy only; nothing here ever returns NaN.

Shapes: N samples. A prediction that is not finite shows no skill: rank correlation,
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


def spearman(prediction: ArrayLike, target: ArrayLike) -> float:
    """Spearman's rank correlation, ties at their mean rank.

    0.0 for constant predictions or targets, fewer than 3 samples, or a prediction that is not finite.

    Raises:
        ConfigError: lengths differ, nothing to compare, or a target that is not finite.
    """
    x, y = pair(prediction, target)
    return float((unit_ranks(x[None]) @ unit_ranks(y[None]).T).item())


def pearson(prediction: ArrayLike, target: ArrayLike) -> float:
    """Pearson's correlation; 0.0 where `spearman` is.

    Raises:
        ConfigError: lengths differ, nothing to compare, or a target that is not finite.
    """
    x, y = pair(prediction, target)
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
    x, y = pair(prediction, target)
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
    check_level(level, resamples, "resamples")
    pairs = [pair(prediction, target) for prediction, target, _ in parts.values()]
    for (x, _), (_, _, groups) in zip(pairs, parts.values(), strict=True):
        members(groups, len(x))
    every = np.concatenate([np.asarray(groups) for _, _, groups in parts.values()])
    member, patients = members(every, len(every))
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


def pair(prediction: ArrayLike, target: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Predictions and targets [N].

    Raises:
        ConfigError: lengths differ, nothing to compare, or a target that is not finite.
    """
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
    x, y = pair(prediction, target)
    low, high = y.min(), y.max()
    farthest = np.where(y - low > high - y, low, high)
    return np.where(np.isfinite(x), x, farthest), y


def members(groups: ArrayLike, samples: int) -> tuple[NDArray[np.intp], int]:
    """Each sample's patient as a number from 0, and how many patients there are.

    Raises:
        ConfigError: not one name for each sample.
    """
    names: NDArray[Any] = np.asarray(groups)
    if names.shape != (samples,):
        raise ConfigError(
            f"groups must name the patient of each of the {samples} samples, got shape {names.shape}. "
            "Give one patient for each target."
        )
    unique, member = np.unique(names, return_inverse=True)
    return member.astype(np.intp), len(unique)


def check_level(level: float, draws: int, name: str) -> None:
    """Of a confidence level, and of the number of draws that the caller names so.

    Raises:
        ConfigError: a level outside (0, 1), or no draws.
    """
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


def unit_ranks(rows: FloatArray) -> FloatArray:
    """Each row's ranks with mean 0 and length 1: products of such rows are rank correlations.

    Zero for a row with a value that is not finite.
    """
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
