"""qafe/data/splits.py: whole patients, both ends of the scale, the same every time."""

from collections import Counter

import pytest

from qafe.data.manifest import Sample
from qafe.data.splits import shuffle_scores, split_validation
from qafe.errors import ManifestError


def cohort(patients: int) -> list[Sample]:
    return [
        Sample(f"v{p}{e}_P{p:02d}", f"P{p:02d}", f"v{p}{e}", e, float(p % 5), 80)
        for p in range(patients)
        for e in ("smile", "frown")
    ]


@pytest.mark.parametrize("patients", [2, 3, 4, 5, 11, 41])
@pytest.mark.parametrize("fraction", [0.05, 0.25, 0.5, 0.95])
def test_whole_patients_on_either_side(patients: int, fraction: float) -> None:
    samples = cohort(patients)
    train, validation = split_validation(samples, fraction, 0)
    left, right = {s.patient for s in train}, {s.patient for s in validation}
    assert not left & right
    assert sorted([*train, *validation], key=lambda s: s.id) == sorted(samples, key=lambda s: s.id)
    assert min(len(left), len(right)) >= (2 if patients >= 4 else 1)


def test_deterministic_and_independent_of_the_order() -> None:
    samples = cohort(20)
    held = [{s.patient for s in split_validation(order, 0.25, 3)[1]} for order in (samples, samples[::-1])]
    assert held[0] == held[1]
    assert len(held[0]) == 5
    assert any({s.patient for s in split_validation(samples, 0.25, seed)[1]} != held[0] for seed in range(5))


def test_strata_cover_the_scale() -> None:
    for seed in range(10):
        _, validation = split_validation(cohort(20), 0.25, seed)
        assert {s.score for s in validation} == {0.0, 1.0, 2.0, 3.0, 4.0}


def test_one_patient_cannot_be_split() -> None:
    with pytest.raises(ManifestError, match=r"at least 2 patients.*got 1"):
        split_validation(cohort(1), 0.25, 0)


def test_shuffling_keeps_each_expressions_scores() -> None:
    samples = [Sample(s.id, s.patient, s.video, s.expression, i, 80) for i, s in enumerate(cohort(20))]
    shuffled = shuffle_scores(samples, 1)
    assert shuffled == shuffle_scores(samples, 1)
    assert [s.id for s in shuffled] == [s.id for s in samples]
    assert sum(a.score != b.score for a, b in zip(samples, shuffled, strict=True)) > 30
    for expression in ("smile", "frown"):
        before, after = (Counter(s.score for s in x if s.expression == expression) for x in (samples, shuffled))
        assert before == after
