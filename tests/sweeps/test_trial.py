"""sweeps/trial.py: what goes wrong in a trial gets its class and one line."""

from typing import Any

import pytest
import torch

from qafe import dotted
from qafe.config import Config
from qafe.errors import CheckpointError, ConfigError, ManifestError
from sweeps import trial
from sweeps.results import FAILED_AS
from sweeps.study import REASON
from sweeps.trial import DATA, ERROR, MEMORY, REFUSED, TrialPlan, train_trial


@pytest.mark.parametrize(
    ("err", "kind"),
    [
        (CheckpointError("a run resumes in the precision that it was started in"), REFUSED),
        (ConfigError("no"), REFUSED),
        (ManifestError("no"), DATA),
        (RuntimeError("no"), ERROR),
        (torch.OutOfMemoryError("CUDA out of memory"), MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), MEMORY),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_failure_has_a_class(quick: Config, monkeypatch: pytest.MonkeyPatch, err: Exception, kind: str) -> None:
    def fail(*_: object) -> None:
        raise err

    told: list[dict[str, Any]] = []
    monkeypatch.setattr(trial, "_as_fits", lambda config, plan: config)
    monkeypatch.setattr(trial, "_train", fail)
    monkeypatch.setattr(trial.tune, "report", told.append)
    plan = TrialPlan(
        base_json=dotted.to_json(quick),
        data_root="",
        expressions=("smile",),
        threads=1,
        gpus=0,
        folder="",
        trials=1,
        cpus=1,
        baseline_bytes=0,
    )
    settings = {"train.loss": "mse", "train.batch_size": 4}
    train_trial({"settings": settings}, plan)
    (report,) = told
    assert report[FAILED_AS] == kind
    assert "\n" not in report[REASON]
    if kind != MEMORY:  # Which halves the batch until there is one clip.
        assert report[REASON] == f"{type(err).__name__}: {err}"
