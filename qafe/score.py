"""One clip of one face to one score, with a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .config import Config
from .data.dataset import ClipDataset, load_clip
from .data.manifest import Sample
from .errors import CheckpointError, ConfigError
from .model import weights
from .model.qafenet import QAFENet
from .predict import predict, score_batch
from .store import Store

SUFFIX = ".safetensors"


class Scorer:
    """The models of one or several expressions, ready to score prepared clips.

    Args:
        folder: holds one ``<expression>.safetensors`` for each expression, with its config inside.
        device: where to run.
    Raises:
        CheckpointError: the folder holds no weights, or damaged ones.
    """

    def __init__(self, folder: Path | str, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.models: dict[str, tuple[QAFENet, Config]] = {}
        for path in sorted(Path(folder).glob("*" + SUFFIX)):
            model, config, _ = weights.load(path)
            self.models[path.stem] = (model.to(self.device).eval(), config)
        if not self.models:
            raise CheckpointError(
                f"a model is a folder with one <expression>{SUFFIX} for each expression, found none in {folder}. "
                "Name the folder that qafe train or the registry wrote."
            )

    @property
    def expressions(self) -> tuple[str, ...]:
        """The expressions that can be scored."""
        return tuple(self.models)

    def _model_for(self, expression: str | None) -> tuple[QAFENet, Config]:
        if expression is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if expression not in self.models:
            raise ConfigError(
                f"the expression must be one that the model was trained on ({', '.join(self.models)}), "
                f"got {expression or 'none'} (--expression). Name one of them."
            )
        return self.models[expression]

    def score_clip(self, folder: Path | str, expression: str | None = None) -> float:
        """The score of one prepared clip, ``frames/<patient>/<video>`` of a prepared dataset.

        Raises:
            MediaError: the folder holds no frames, or unreadable ones.
            ConfigError: the expression is not one of the model's.
        """
        model, config = self._model_for(expression)
        store, patient, video = Store.of_clip(Path(folder))
        batch = load_clip(store, patient, video, config)
        return float(score_batch(model, batch, config, self.device).item())

    def score_samples(self, store: Store, samples: Sequence[Sample]) -> np.ndarray:
        """Scores [N] of samples of one expression, batch by batch."""
        model, config = self._model_for(samples[0].expression)
        return predict(model, ClipDataset(store, samples, config, train=False), config, self.device)
