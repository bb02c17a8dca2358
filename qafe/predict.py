"""Clips -> scores, without training."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .config import Config
from .data.dataset import Clip, ClipBatch, ClipDataset, model_inputs
from .data.loader import evaluation_loader, read_batches
from .memory import freed_memory_kept
from .model.qafenet import QAFENet


def predict(model: QAFENet, dataset: ClipDataset, config: Config, device: torch.device) -> np.ndarray:
    """Scores [N] of a dataset's evaluation clips, in its order, batch by batch."""
    with freed_memory_kept(device.type == "cpu"):
        return as_array(scores_of(model, evaluation_loader(dataset, config, device), config, device))


def score_batch(model: QAFENet, batch: ClipBatch, config: Config, device: torch.device) -> np.ndarray:
    """Scores [B] of a batch in full float32 on every device: cuDNN's TF32 has three decimals."""
    with freed_memory_kept(device.type == "cpu"):
        return as_array(_score(model, batch, config, device))


@torch.inference_mode()
def _score(model: QAFENet, batch: ClipBatch, config: Config, device: torch.device) -> Tensor:
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        scores: Tensor = model(*model_inputs(batch.to(device), config))
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    return scores


def scores_of(model: QAFENet, loader: DataLoader[Clip], config: Config, device: torch.device) -> Tensor:
    """Scores [N] of a loader's clips, in its order, on the device."""
    model.eval()
    # Left on the device: a GPU need not wait for each batch to be copied back.
    scores = [_score(model, batch, config, device) for batch in read_batches(loader)]
    return torch.cat(scores) if scores else torch.empty(0, device=device)


def as_array(scores: Tensor) -> np.ndarray:
    """Scores [N] as float64 in the processor's memory; waits for the device."""
    array: np.ndarray = scores.double().cpu().numpy()
    return array
