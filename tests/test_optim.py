"""qafe/optim.py: the optimiser that a gradient scaler drives."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from qafe.config import Config, TrainConfig
from qafe.data.cohort import load_cohort
from qafe.dotted import override
from qafe.optim import build_optimizer
from qafe.train import _Run


@pytest.fixture
def _empty_is_nan() -> Iterator[None]:
    """Tensors that are made without values hold NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def steps(settings: TrainConfig, gradients: list[float]) -> torch.Tensor:
    """A weight after steps with these gradients through a scaler, which skips those that are not finite."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = build_optimizer(settings, [weight], scaled=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4)
    for gradient in gradients:
        scaler.scale(weight.sum() * gradient).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return weight.detach()


@pytest.mark.usefixtures("_empty_is_nan")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_an_overflow_in_the_first_step_changes_nothing(optimizer: str, momentum: float) -> None:
    settings = TrainConfig(optimizer=optimizer, momentum=momentum)  # type: ignore[arg-type]
    assert torch.equal(steps(settings, [float("inf"), 1.0, 2.0]), steps(settings, [1.0, 2.0]))


def test_an_fp16_run_says_that_it_is_scaled(quick: Config, sample_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smile = load_cohort(sample_root, quick.data).only("smile")
    fused = {}
    for dtype in (torch.float16, torch.bfloat16):
        monkeypatch.setattr("qafe.train.amp_dtype", lambda *_, dtype=dtype: dtype)
        config = override(quick, {"train.optimizer": "sgd"})
        run = _Run(config, smile.store, smile.train, smile.validation, torch.device("cpu"))
        assert run.scaler.is_enabled() == (dtype == torch.float16)
        fused[dtype] = run.optimizer.defaults["fused"]
    assert fused == {torch.float16: None, torch.bfloat16: True}
