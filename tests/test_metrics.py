"""Metrics by hand and against SciPy; intervals by simulation."""

import numpy as np
import pytest
from scipy import stats

from qafe import metrics
from qafe.errors import ConfigError

NAMES = ("spearman", "pearson", "mae", "rmse", "relative_l2", "kappa")


def test_by_hand() -> None:
    prediction, target = [1.0, 2.0, 3.0, 5.0], [1.0, 3.0, 2.0, 4.0]
    assert metrics.spearman(prediction, target) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert metrics.mae(prediction, target) == pytest.approx(0.75)
    assert metrics.rmse(prediction, target) == pytest.approx(np.sqrt(3 / 4))
    assert metrics.relative_l2(prediction, target) == pytest.approx(3 / 4 / 9 * 100)
    assert metrics.relative_l2(prediction, target, score_range=(0, 4)) == pytest.approx(3 / 4 / 16 * 100)


def test_correlations_agree_with_scipy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(0, 5, 30).astype(float), rng.integers(0, 5, 30)
        assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
        assert metrics.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)


def test_kappa_by_its_definition() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(2, 2, 50), rng.integers(0, 5, 50)
    rounded = np.clip(np.floor(x + 0.5), 0, 4).astype(int)
    table = np.zeros((5, 5))
    np.add.at(table, (rounded, y), 1)
    weight = (np.arange(5)[:, None] - np.arange(5)) ** 2
    chance = np.outer(table.sum(1), table.sum(0)) / 50
    assert metrics.quadratic_weighted_kappa(x, y) == pytest.approx(1 - (weight * table).sum() / (weight * chance).sum())
    assert metrics.quadratic_weighted_kappa(y, y) == 1


def test_kappa_clips_to_the_range_of_scores() -> None:
    assert metrics.quadratic_weighted_kappa([-9.0, 1.2, 99.0], [0, 1, 4]) == 1


@pytest.mark.parametrize(
    ("prediction", "target"),
    [
        ([1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 2.0, 3.0]),
        ([0.0, 1.0, 2.0, 3.0], [2.0, 2.0, 2.0, 2.0]),
        ([2.0, 2.0, 2.0], [2.0, 2.0, 2.0]),
        ([0.1, 0.1, 0.1], [0.3, 0.1, 0.2]),
        ([1.0, 2.0], [1.0, 2.0]),
        ([1.0], [1.0]),
        ([float("nan"), 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]),
        ([float("inf"), 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]),
        ([float("nan")] * 4, [1.0, 2.0, 3.0, 4.0]),
    ],
)
def test_no_skill_is_zero_and_never_nan(prediction: list[float], target: list[float]) -> None:
    values = metrics.evaluate(prediction, target)
    assert tuple(values) == NAMES
    assert all(np.isfinite(list(values.values())))
    assert values["spearman"] == values["pearson"] == values["kappa"] == 0


def test_prediction_that_is_not_finite_counts_as_the_far_end() -> None:
    assert metrics.mae([float("nan"), 1.0, 3.0], [0.0, 1.0, 4.0]) == pytest.approx((4 + 0 + 1) / 3)


@pytest.mark.parametrize("name", ["spearman", "pearson", "mae", "rmse", "relative_l2", "quadratic_weighted_kappa"])
@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        ([], [], "not empty"),
        ([1.0, 2.0], [1.0], "same length"),
        ([1.0, 2.0, 3.0], [1.0, float("nan"), 2.0], "targets must be finite.*sample 1"),
    ],
)
def test_refusals(name: str, prediction: list[float], target: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        getattr(metrics, name)(prediction, target)


def test_weighted_ranks_are_the_ranks_of_the_resample() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 4, 12).astype(float), rng.normal(size=12)
    weight = rng.integers(0, 3, (30, 12)).astype(float)
    ours = metrics._weighted_spearman(x, y, weight)
    for row, value in zip(weight, ours, strict=True):
        index = np.repeat(np.arange(12), row.astype(int))
        assert value == pytest.approx(stats.spearmanr(x[index], y[index]).statistic)


def test_interval_holds_the_value_and_widens_with_clusters() -> None:
    rng = np.random.default_rng(3)
    patient = np.repeat(np.arange(20), 5)
    trait = rng.normal(size=20)[patient]
    x, y = trait + rng.normal(size=100) * 0.1, trait + rng.normal(size=100) * 0.1 + rng.normal(size=20)[patient]
    clustered = metrics.spearman_interval(x, y, patient)
    single = metrics.spearman_interval(x, y, np.arange(100))
    assert clustered.low < metrics.spearman(x, y) < clustered.high
    assert clustered.high - clustered.low > 1.3 * (single.high - single.low)
    assert clustered == metrics.spearman_interval(x, y, patient)
    assert clustered != metrics.spearman_interval(x, y, patient, seed=1)


def test_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(4)
    truth = 6 / np.pi * np.arcsin(0.6 / 2)
    covered = 0
    for _ in range(100):
        x, y = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 60).T
        low, high = metrics.spearman_interval(x, y, np.arange(60), resamples=400)
        covered += low <= truth <= high
    assert covered >= 87


def test_interval_at_the_edges() -> None:
    x = [1.0, 2.0, 3.0, 4.0]
    assert metrics.spearman_interval(x, x, ["a", "a", "b", "b"]) == (-1, 1)
    assert metrics.spearman_interval([1.0] * 4, x, ["a", "b", "c", "d"]) == (0, 0)
    assert metrics.spearman_interval([float("nan")] * 4, x, ["a", "b", "c", "d"]) == (0, 0)
    with pytest.raises(ConfigError, match="level"):
        metrics.spearman_interval(x, x, ["a", "b", "c", "d"], level=1)
    with pytest.raises(ConfigError, match="groups must name the patient"):
        metrics.spearman_interval(x, x, ["a"])


def test_confusion_by_hand() -> None:
    scores, counts = metrics.confusion([0.4, 0.5, 2.6, 9.0, -3.0, 1.2], [0, 0, 3, 3, 1.4, 1.5])
    assert scores.tolist() == [0, 1, 2, 3, 4]
    assert counts.tolist() == [
        [1, 1, 0, 0, 0],  # true 0: 0.4 is 0, a half goes up
        [1, 0, 0, 0, 0],  # true 1.4 is 1: -3 is the lowest score there is
        [0, 1, 0, 0, 0],  # true 1.5 is 2
        [0, 0, 0, 1, 1],  # true 3: 9 is the highest
        [0, 0, 0, 0, 0],
    ]
    scores, counts = metrics.confusion([float("nan"), 12.0, 10.0], [10, 12, 11])
    assert scores.tolist() == [10, 11, 12]
    assert counts.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 1]]  # no number counts as the farther end


def test_intervals_of_several_expressions_share_their_patients() -> None:
    rng = np.random.default_rng(3)
    patients = [f"P{place // 3}" for place in range(36)]
    target = rng.integers(0, 5, 36).astype(float)
    good, poor = target + rng.normal(size=36), rng.normal(size=36)
    mean, each = metrics.spearman_intervals({"smile": (good, target, patients), "frown": (poor, target, patients)})
    assert each["smile"] == metrics.spearman_interval(good, target, patients)
    assert each["frown"] == metrics.spearman_interval(poor, target, patients)
    middle = (metrics.spearman(good, target) + metrics.spearman(poor, target)) / 2
    assert each["frown"].low < mean.low < middle < mean.high < each["smile"].high
    same, _ = metrics.spearman_intervals({"a": (good, target, patients), "b": (good, target, patients)})
    assert same == pytest.approx(each["smile"])
    # Whoever performs only one of them counts there alone; a resample may have nobody who performs the other.
    few = slice(0, 9)
    mean, each = metrics.spearman_intervals(
        {"smile": (good, target, patients), "frown": (poor[few], target[few], patients[few])}
    )
    assert -1 <= each["frown"].low <= each["frown"].high <= 1
    assert np.isfinite([*mean, *each["smile"]]).all()
