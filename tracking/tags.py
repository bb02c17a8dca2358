"""How a sweep's runs are marked in MLflow: they are found again, grouped and compared by these."""

from __future__ import annotations

from typing import Literal

TrialState = Literal["finished", "pruned", "failed", "killed"]
SWEEP_TAG = "qafe.sweep"
SWEEP_ID_TAG = "qafe.sweep_id"
TRIAL_TAG = "qafe.trial"
"""A trial's number, or `SWEEP_ITSELF`. With the sweep's id it is the name of a run before MLflow has given it one."""
SWEEP_ITSELF = "none"
STATE_TAG = "qafe.state"
REASON_TAG = "qafe.reason"
PRUNED_TAG = "pruned"
"""The epoch after which a trial was stopped early."""
SPLIT_TAG = "qafe.split_digest"
IDENTIFIABLE_TAG = "qafe.identifiable"
CHECKPOINT_TAG = "qafe.checkpoint"
MLFLOW_STATUS: dict[str, str] = {
    "finished": "FINISHED",
    "pruned": "FINISHED",
    "failed": "FAILED",
    "killed": "KILLED",
}
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Makes the MLflow UI open the model training views, not those for language models."""
MODEL_TYPE = "qafe-net"
"""Of the models that MLflow lists."""
