"""Metrics by hand and against SciPy; intervals and the luck band by simulation."""

import itertools
import time

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


def cohort(rng: np.random.Generator, patients: int = 30, videos: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Scores of patients whose videos resemble each other, and their patients."""
    group = np.repeat(np.arange(patients), videos)
    severity = rng.integers(0, 5, patients)[group]
    return np.clip(severity + rng.integers(-1, 2, len(group)), 0, 4).astype(float), group


def test_luck_band_is_right_about_luck() -> None:
    rng = np.random.default_rng(5)
    p_values = []
    for seed in range(60):
        target, group = cohort(rng)
        # Candidates that know nothing, but say nearly the same of one patient's videos.
        candidates = rng.normal(size=(20, 30))[:, group] + rng.normal(size=(20, len(group))) * 0.3
        p_values.append(metrics.luck_band(candidates, target, group, permutations=199, seed=seed).p_value)
    assert np.mean(np.array(p_values) <= 0.2) == pytest.approx(0.2, abs=0.14)
    assert np.mean(np.array(p_values) <= 0.05) <= 0.15


def test_luck_band_finds_skill() -> None:
    rng = np.random.default_rng(6)
    target, group = cohort(rng)
    candidates = rng.normal(size=(50, len(target)))
    candidates[17] += target
    band = metrics.luck_band(candidates, target, group)
    assert band.max_observed == pytest.approx(metrics.spearman(candidates[17], target))
    assert band.p_value < 0.01
    assert 0 < band.expected_max < band.threshold < band.max_observed


def test_luck_band_grows_with_the_number_looked_at() -> None:
    rng = np.random.default_rng(7)
    target, group = cohort(rng)
    candidates = rng.normal(size=(500, len(target)))
    thresholds = [metrics.luck_band(candidates[:k], target, group, permutations=500).threshold for k in (1, 20, 500)]
    assert thresholds[0] < thresholds[1] < thresholds[2]


def test_luck_band_of_the_first_candidates_is_their_own() -> None:
    rng = np.random.default_rng(3)
    target, group = rng.integers(0, 5, 24).astype(float), np.repeat(np.arange(8), 3)
    candidates = rng.normal(size=(6, 24))
    growth = metrics.luck_band(candidates, target, group, permutations=200).growth
    assert len(growth) == 6
    for k in (1, 4, 6):
        own = metrics.luck_band(candidates[:k], target, group, permutations=200)
        assert growth[k - 1] == pytest.approx((own.expected_max, own.threshold))


def test_expected_best_is_the_mean_over_all_draws() -> None:
    values = [0.3, -0.2, 0.9, 0.3, 0.5]
    every = [np.mean([max(draw) for draw in itertools.combinations(values, k)]) for k in range(1, 6)]
    np.testing.assert_allclose(metrics.expected_best(values), every, rtol=1e-12)
    assert metrics.expected_best([0.1, 0.4])[0] == pytest.approx(0.25)
    many = metrics.expected_best(np.linspace(0, 1, 2000))
    assert many[[0, -1]] == pytest.approx([0.5, 1.0])
    assert (np.diff(many) >= 0).all()
    for wrong in ([], [float("nan")], [[1.0]]):
        with pytest.raises(ConfigError, match="finite values"):
            metrics.expected_best(wrong)


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


def test_luck_band_does_not_depend_on_the_order_of_samples() -> None:
    rng = np.random.default_rng(8)
    target, group = cohort(rng)
    candidates = rng.normal(size=(5, len(target)))
    order = np.argsort(rng.permutation(30)[group], kind="stable")
    first = metrics.luck_band(candidates, target, group)
    second = metrics.luck_band(candidates[:, order], target[order], group[order])
    assert first[:4] == pytest.approx(second[:4])


def test_luck_band_over_expressions_averages() -> None:
    rng = np.random.default_rng(9)
    parts = {}
    for name in ("smile", "frown"):
        target, group = cohort(rng)
        candidates = rng.normal(size=(8, len(target)))
        candidates[3] += 0.7 * target
        parts[name] = (candidates, target, group)
    band = metrics.luck_band(parts)
    expected = max(
        np.mean([metrics.spearman(table[k], target) for table, target, _ in parts.values()]) for k in range(8)
    )
    assert band.max_observed == pytest.approx(expected)
    alone = metrics.luck_band(*parts["smile"])
    assert band.threshold < alone.threshold  # two expressions average luck out
    same = metrics.luck_band({"smile": parts["smile"]})
    assert same == alone


def test_luck_band_counts_broken_candidates_as_no_skill() -> None:
    target, group = cohort(np.random.default_rng(10))
    candidates = np.full((3, len(target)), np.nan)
    candidates[1] = 2.0
    band = metrics.luck_band(candidates, target, group, permutations=50)
    assert band[:4] == (0.0, 0.0, 0.0, 1.0)


def test_luck_band_refusals() -> None:
    target, group = [0.0, 1.0, 2.0], ["a", "b", "c"]
    with pytest.raises(ConfigError, match="K candidates x N samples"):
        metrics.luck_band(target, target, group)
    with pytest.raises(ConfigError, match="same candidates, got 1, 2"):
        metrics.luck_band({"a": ([target], target, group), "b": ([target, target], target, group)})
    with pytest.raises(ConfigError, match="needs a target"):
        metrics.luck_band([target])
    with pytest.raises(ConfigError, match="must not be empty"):
        metrics.luck_band({})
    with pytest.raises(ConfigError, match="permutations must be at least 1"):
        metrics.luck_band([target], target, group, permutations=0)


def test_luck_band_of_a_large_sweep_is_quick() -> None:
    rng = np.random.default_rng(11)
    target, group = cohort(rng)
    start = time.perf_counter()
    metrics.luck_band(rng.normal(size=(4000, len(target))), target, group)
    assert time.perf_counter() - start < 20


def test_each_trial_keeps_its_best_epoch() -> None:
    rng = np.random.default_rng(4)
    target, groups = rng.integers(0, 5, 24).astype(float), np.repeat(np.arange(6), 4)
    table = rng.normal(size=(3, 5, 24))  # 3 trials of 5 epochs
    by_epoch = metrics.luck_band(table, target, groups, permutations=300)
    flat = metrics.luck_band(table.reshape(15, 24), target, groups, permutations=300)
    assert by_epoch[:4] == pytest.approx(flat[:4])  # with one expression, the best of the bests is the best of all
    both = metrics.luck_band({"smile": (table, target, groups), "frown": (-table, target, groups)}, permutations=300)
    best = [
        np.mean([max(metrics.spearman(row, target) for row in sign * trial) for sign in (1, -1)]) for trial in table
    ]  # every expression has its own best epoch
    assert both.max_observed == pytest.approx(max(best))
    assert both.threshold >= both.expected_max > 0


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
