"""What updates the weights: the optimiser and its learning rate."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from .config import TrainConfig


def build_optimizer(
    settings: TrainConfig, parameters: list[nn.Parameter], *, scaled: bool = False
) -> torch.optim.Optimizer:
    """SGD with momentum, as published, or AdamW; in one kernel for all parameters (``fused``).

    Args:
        scaled: a GradScaler takes its steps. Fused SGD is then called on an overflow too, where it makes its momentum
            and leaves it without values (torch 2.13), which the next step reads.
    """
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            fused=None if scaled and settings.momentum > 0 else fused,  # None: over all tensors at once, on a GPU.
        )
    return torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=(settings.momentum, 0.999),
        weight_decay=settings.weight_decay,
        fused=fused,
    )


def lr_factor(settings: TrainConfig) -> Callable[[int], float]:
    """The learning rate of each epoch (from 0) as a share of ``train.lr``."""

    def factor(epoch: int) -> float:
        if epoch < settings.warmup_epochs:
            return (epoch + 1) / (settings.warmup_epochs + 1)
        if settings.schedule == "step":
            return float(settings.step_factor ** (epoch // settings.step_epochs))
        if settings.schedule == "cosine":
            length = max(settings.epochs - settings.warmup_epochs, 1)
            return float(0.5 * (1 + np.cos(np.pi * (epoch - settings.warmup_epochs) / length)))
        return 1.0

    return factor
