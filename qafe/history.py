"""What a training has given so far, epoch by epoch, as one JSON file beside its weights.

It holds the names of clips and patients, so it stays on the group's own disks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from .data.manifest import Sample
from .errors import CheckpointError
from .train import EpochResult

HISTORY_FILE = "history.json"


@dataclass(kw_only=True)
class Epoch:
    """One epoch's numbers and its scores of the validation clips."""

    epoch: int
    train_loss: float
    metrics: dict[str, float]
    predictions: list[float]


@dataclass(kw_only=True)
class ExpressionHistory:
    """All epochs of one expression, and the validation clips that they were measured on."""

    ids: list[str]
    patients: list[str]
    target: list[float]
    epochs: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0
    attention: dict[str, list[list[float]]] = field(default_factory=dict)
    """What the fusion attended to in the best epoch, as `qafe.model.attention.Maps`."""

    @classmethod
    def start(cls, validation: Sequence[Sample]) -> ExpressionHistory:
        """An empty history over these validation samples."""
        return cls(
            ids=[sample.id for sample in validation],
            patients=[sample.patient for sample in validation],
            target=[sample.score for sample in validation],
        )

    def add(self, result: EpochResult) -> None:
        """Appends one epoch."""
        self.best_epoch = result.best_epoch
        if result.best_epoch == result.epoch:
            self.attention = {name: weights.tolist() for name, weights in result.attention.items()}
        self.epochs.append(
            Epoch(
                epoch=result.epoch,
                train_loss=result.train_loss,
                metrics=result.metrics,
                predictions=result.predictions.tolist(),
            )
        )

    @property
    def best(self) -> Epoch:
        """The epoch whose weights are kept."""
        return self.epochs[self.best_epoch - 1]

    def prediction_matrix(self) -> np.ndarray:
        """[E, N] scores of E epochs for N validation clips."""
        return np.array([epoch.predictions for epoch in self.epochs])


History = dict[str, ExpressionHistory]
"""One `ExpressionHistory` for each expression."""


def write_history(folder: Path, history: History) -> None:
    """Writes ``history.json``, beside and renamed."""
    unfinished = folder / (HISTORY_FILE + ".unfinished")
    unfinished.write_text(json.dumps({name: asdict(entry) for name, entry in history.items()}))
    unfinished.replace(folder / HISTORY_FILE)


def read_history(folder: Path) -> History:
    """The history that `write_history` wrote.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = folder / HISTORY_FILE
    try:
        tree = json.loads(path.read_text())
        return {
            name: ExpressionHistory(**entry | {"epochs": [Epoch(**epoch) for epoch in entry["epochs"]]})
            for name, entry in tree.items()
        }
    except (OSError, ValueError, TypeError, KeyError) as err:
        raise CheckpointError(f"{path} is missing or damaged ({err}). Resume from an earlier checkpoint.") from err
