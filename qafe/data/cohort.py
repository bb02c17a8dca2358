"""A prepared dataset, split for an experiment: training, validation and test patients."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ..config import EXPRESSIONS, DataConfig
from ..errors import ManifestError
from ..store import Store
from .manifest import Manifest, Sample, read_manifest
from .splits import shuffle_scores, split_validation


@dataclass(frozen=True)
class Cohort:
    """Who is trained on, chosen on and tested on; no patient is in two of them.

    The test samples are those of the test CSV. Validation patients come out of the training CSV.
    """

    store: Store
    manifest: Manifest
    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    test: tuple[Sample, ...]

    def only(self, expression: str) -> Cohort:
        """The part of the cohort that performs one expression."""

        def pick(samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
            return tuple(sample for sample in samples if sample.expression == expression)

        return Cohort(self.store, self.manifest, pick(self.train), pick(self.validation), pick(self.test))

    def clip_counts(self, expressions: tuple[str, ...]) -> dict[str, int]:
        """How many clips of these expressions each part has."""
        parts = {"training": self.train, "validation": self.validation, "test": self.test}
        return {name: sum(sample.expression in expressions for sample in part) for name, part in parts.items()}

    @property
    def split_digest(self) -> str:
        """sha256 over the data's digest and who is on which side with which score: equal for equal splits alone."""
        digest = hashlib.sha256(self.manifest.digest.encode())
        for part, samples in (("train", self.train), ("validation", self.validation), ("test", self.test)):
            digest.update("".join(f"{part} {sample.id} {sample.score}\n" for sample in samples).encode())
        return digest.hexdigest()


def load_cohort(root: Path | str, settings: DataConfig) -> Cohort:
    """Reads, checks and splits a prepared dataset.

    Raises:
        ManifestError: the dataset is missing or not what its CSV files say.
    """
    store = Store(root)
    return split_cohort(store, read_manifest(store), settings)


def split_cohort(store: Store, manifest: Manifest, settings: DataConfig) -> Cohort:
    """A manifest's samples, split as the settings say.

    Raises:
        ManifestError: there are too few patients for a split.
    """
    train, validation = split_validation(manifest.train, settings.validation_fraction, settings.split_seed)
    test = manifest.test
    if settings.shuffle_labels:
        train, validation, test = (
            shuffle_scores(samples, seed=settings.split_seed + number)
            for number, samples in enumerate((train, validation, test))
        )
    return Cohort(store, manifest, train, validation, test)


def choose_expressions(manifest: Manifest, wanted: str | None) -> tuple[str, ...]:
    """The expressions that ``--expression`` names: one, several with commas between them, or ``all``.

    Without a name it is the only one of the dataset, or smile.

    Raises:
        ManifestError: one of them is not in the dataset.
    """
    if wanted is None:
        wanted = manifest.expressions[0] if len(manifest.expressions) == 1 else "smile"
    known = sorted(
        manifest.expressions, key=lambda name: (EXPRESSIONS.index(name) if name in EXPRESSIONS else 99, name)
    )
    if wanted == "all":
        return tuple(known)
    names = tuple(dict.fromkeys(name.strip() for name in wanted.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise ManifestError(
                f"the expression must be one of the dataset's ({', '.join(known)}) or all, got {name!r} "
                "(--expression). Name one of them."
            )
    if not names:
        raise ManifestError(f"--expression names none of {', '.join(known)}. Name one of them, or all.")
    return names
