"""qafe/strata.py: whole strata of patients are covered, the same every time."""

import pytest

from qafe.strata import draw_patients


def scores(patients: int) -> dict[str, list[float]]:
    return {f"P{patient:02d}": [patient % 5, patient % 5 + 0.5] for patient in range(patients)}


@pytest.mark.parametrize("patients", [2, 3, 4, 5, 11, 41])
@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
def test_how_many(patients: int, fraction: float) -> None:
    drawn = draw_patients(scores(patients), fraction, 0)
    least = 2 if patients >= 4 else 1
    assert drawn < scores(patients).keys()
    assert len(drawn) == min(max(round(fraction * patients), least), patients - least)


def test_one_of_each_stratum() -> None:
    graded = {f"P{grade}{number}": [float(grade)] for grade in range(5) for number in range(8)}
    for seed in range(20):
        drawn = draw_patients(graded, 0.125, seed)
        assert sorted(name[1] for name in drawn) == list("01234")


def test_depends_on_means_and_seed_only() -> None:
    one = scores(20)
    other = {patient: one[patient][::-1] for patient in reversed(one)}
    assert draw_patients(one, 0.25, 3) == draw_patients(other, 0.25, 3)
    assert len({frozenset(draw_patients(one, 0.25, seed)) for seed in range(10)}) > 5
