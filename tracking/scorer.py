"""The pyfunc model that the registry holds: prepared clips in, scores out.

MLflow runs this file when it loads the model (models from code): weights are safetensors and nothing is unpickled.
"""

from __future__ import annotations

from typing import Any

import mlflow
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from mlflow.types import ColSpec, Schema

from qafe.score import Scorer

WEIGHTS = "weights"

SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string", "clip"), ColSpec("string", "expression", required=False)]),
    outputs=Schema([ColSpec("double", "score")]),
)


class ClipScorer(PythonModel):
    """Scores prepared clips.

    Input: a DataFrame with ``clip``, the folder ``frames/<patient>/<video>`` of a prepared dataset, and, where the
    model knows several, ``expression``. Output: a DataFrame with ``score``, the MDS-UPDRS severity (0-4, unbounded).
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the weights of every expression."""
        self.scorer = Scorer(context.artifacts[WEIGHTS])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One score for each row."""
        expressions = model_input.get("expression", pd.Series([None] * len(model_input), index=model_input.index))
        scores = [
            self.scorer.score_clip(clip, expression if isinstance(expression, str) and expression else None)
            for clip, expression in zip(model_input["clip"], expressions, strict=True)
        ]
        return pd.DataFrame({"score": scores})


mlflow.models.set_model(ClipScorer())
