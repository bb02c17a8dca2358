"""The luck band and the expected best, by simulation and by hand."""

import itertools
import time

import numpy as np
import pytest

from qafe.errors import ConfigError
from qafe.metrics import spearman
from qafe.selection import _moved, expected_best, luck_band


def cohort(rng: np.random.Generator, patients: int = 30, videos: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Scores of patients whose videos resemble each other, and their patients."""
    group = np.repeat(np.arange(patients), videos)
    severity = rng.integers(0, 5, patients)[group]
    return np.clip(severity + rng.integers(-1, 2, len(group)), 0, 4).astype(float), group


@pytest.mark.parametrize("most", [7, 12])  # clips of a patient: 7, or 2 to 12
@pytest.mark.parametrize(("expressions", "alike"), [(1, True), (5, True), (5, False)])
def test_luck_band_is_right_about_luck(expressions: int, alike: bool, most: int) -> None:
    """Nine patients who are as ill in all expressions, or not; candidates that know nothing, and take a patient's clips
    for nearly the same, in all expressions or not."""
    rng = np.random.default_rng(5)
    p_values = []
    for seed in range(250):
        group = np.repeat(np.arange(9), 7 if most == 7 else rng.integers(2, most + 1, 9))
        looks, severity = rng.normal(size=(20, 9)), rng.normal(size=9)
        parts = {}
        for number in range(expressions):
            if not alike:
                looks, severity = rng.normal(size=(20, 9)), rng.normal(size=9)
            target = np.clip(np.round(2 + 1.2 * severity[group] + 0.5 * rng.normal(size=len(group))), 0, 4)
            parts[str(number)] = (looks[:, group] + 0.3 * rng.normal(size=(20, len(group))), target, group)
        p_values.append(luck_band(parts, permutations=99, seed=seed).p_value)
    assert np.mean(np.array(p_values) <= 0.05) <= 0.09
    assert 0.1 <= np.mean(np.array(p_values) <= 0.2) <= 0.28


def test_a_patient_without_an_expression_moves_in_the_others() -> None:
    member = np.array([0, 0, 2, 2, 2, 3])  # patient 1 has no sample here
    givers = np.array([[0, 1, 2, 3], [1, 2, 0, 3], [3, 0, 1, 2], [2, 1, 3, 0]])
    assert _moved(member, givers).tolist() == [
        [0, 1, 2, 3, 4, 5],
        [2, 3, 0, 1, 0, 5],  # 0 gets what 1 would get: those of 2
        [5, 5, 0, 1, 0, 2],  # 2 gets what 1 would get: those of 0
        [2, 3, 5, 5, 5, 0],
    ]


def test_luck_band_finds_skill() -> None:
    rng = np.random.default_rng(6)
    target, group = cohort(rng)
    candidates = rng.normal(size=(50, len(target)))
    candidates[17] += target
    band = luck_band(candidates, target, group)
    assert band.max_observed == pytest.approx(spearman(candidates[17], target))
    assert band.p_value < 0.01
    assert 0 < band.expected_max < band.threshold < band.max_observed


def test_the_p_value_may_be_of_another_score() -> None:
    rng = np.random.default_rng(6)
    target, group = cohort(rng)
    candidates = rng.normal(size=(10, len(target)))
    candidates[3] += target
    band = luck_band(candidates, target, group, observed=0.0)
    assert band.max_observed == pytest.approx(spearman(candidates[3], target))
    assert band.p_value > 0.9
    assert luck_band(candidates, target, group, observed=band.max_observed).p_value < 0.01


def test_luck_band_grows_with_the_number_looked_at() -> None:
    rng = np.random.default_rng(7)
    target, group = cohort(rng)
    candidates = rng.normal(size=(500, len(target)))
    thresholds = [luck_band(candidates[:k], target, group, permutations=500).threshold for k in (1, 20, 500)]
    assert thresholds[0] < thresholds[1] < thresholds[2]


def test_luck_band_of_the_first_candidates_is_their_own() -> None:
    rng = np.random.default_rng(3)
    target, group = rng.integers(0, 5, 24).astype(float), np.repeat(np.arange(8), 3)
    candidates = rng.normal(size=(6, 24))
    growth = luck_band(candidates, target, group, permutations=200).growth
    assert len(growth) == 6
    for k in (1, 4, 6):
        own = luck_band(candidates[:k], target, group, permutations=200)
        assert growth[k - 1] == pytest.approx((own.expected_max, own.threshold))


def test_expected_best_is_the_mean_over_all_draws() -> None:
    values = [0.3, -0.2, 0.9, 0.3, 0.5]
    every = [np.mean([max(draw) for draw in itertools.combinations(values, k)]) for k in range(1, 6)]
    np.testing.assert_allclose(expected_best(values), every, rtol=1e-12)
    assert expected_best([0.1, 0.4])[0] == pytest.approx(0.25)
    many = expected_best(np.linspace(0, 1, 2000))
    assert many[[0, -1]] == pytest.approx([0.5, 1.0])
    assert (np.diff(many) >= 0).all()
    for wrong in ([], [float("nan")], [[1.0]]):
        with pytest.raises(ConfigError, match="finite values"):
            expected_best(wrong)


def test_luck_band_does_not_depend_on_the_order_of_samples() -> None:
    rng = np.random.default_rng(8)
    target, group = cohort(rng)
    candidates = rng.normal(size=(5, len(target)))
    order = np.argsort(rng.permutation(30)[group], kind="stable")
    first = luck_band(candidates, target, group)
    second = luck_band(candidates[:, order], target[order], group[order])
    assert first[:4] == pytest.approx(second[:4])


def test_luck_band_over_expressions_averages() -> None:
    rng = np.random.default_rng(9)
    parts = {}
    for name in ("smile", "frown"):
        target, group = cohort(rng)
        candidates = rng.normal(size=(8, len(target)))
        candidates[3] += 0.7 * target
        parts[name] = (candidates, target, group)
    band = luck_band(parts)
    expected = max(np.mean([spearman(table[k], target) for table, target, _ in parts.values()]) for k in range(8))
    assert band.max_observed == pytest.approx(expected)
    alone = luck_band(*parts["smile"])
    assert band.threshold < alone.threshold  # two expressions average luck out
    same = luck_band({"smile": parts["smile"]})
    assert same == alone


def test_luck_band_counts_broken_candidates_as_no_skill() -> None:
    target, group = cohort(np.random.default_rng(10))
    candidates = np.full((3, len(target)), np.nan)
    candidates[1] = 2.0
    band = luck_band(candidates, target, group, permutations=50)
    assert band[:4] == (0.0, 0.0, 0.0, 1.0)


def test_luck_band_refusals() -> None:
    target, group = [0.0, 1.0, 2.0], ["a", "b", "c"]
    with pytest.raises(ConfigError, match="K candidates x N samples"):
        luck_band(target, target, group)
    with pytest.raises(ConfigError, match="same candidates, got 1, 2"):
        luck_band({"a": ([target], target, group), "b": ([target, target], target, group)})
    with pytest.raises(ConfigError, match="needs a target"):
        luck_band([target])
    with pytest.raises(ConfigError, match="must not be empty"):
        luck_band({})
    with pytest.raises(ConfigError, match="permutations must be at least 1"):
        luck_band([target], target, group, permutations=0)


def test_luck_band_of_a_large_sweep_is_quick() -> None:
    rng = np.random.default_rng(11)
    target, group = cohort(rng)
    start = time.perf_counter()
    luck_band(rng.normal(size=(4000, len(target))), target, group)
    assert time.perf_counter() - start < 20


def test_each_trial_keeps_its_best_epoch() -> None:
    rng = np.random.default_rng(4)
    target, groups = rng.integers(0, 5, 24).astype(float), np.repeat(np.arange(6), 4)
    table = rng.normal(size=(3, 5, 24))  # 3 trials of 5 epochs
    by_epoch = luck_band(table, target, groups, permutations=300)
    flat = luck_band(table.reshape(15, 24), target, groups, permutations=300)
    assert by_epoch[:4] == pytest.approx(flat[:4])  # with one expression, the best of the bests is the best of all
    both = luck_band({"smile": (table, target, groups), "frown": (-table, target, groups)}, permutations=300)
    best = [
        np.mean([max(spearman(row, target) for row in sign * trial) for sign in (1, -1)]) for trial in table
    ]  # every expression has its own best epoch
    assert both.max_observed == pytest.approx(max(best))
    assert both.threshold >= both.expected_max > 0
