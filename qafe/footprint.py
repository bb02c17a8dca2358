"""How much memory a training step takes, found without computing it, and how much a process holds."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .config import Config
from .device import amp_dtype
from .losses import BATCH_LOSSES, build_loss
from .model.qafenet import build
from .optim import build_optimizer


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes of one training step.

    Attributes:
        weights: parameters and buffers of model and loss; on a CPU those of the best epoch's copy, too.
        gradients: of what is trained.
        optimizer: its states.
        activations: all else at the fullest moment of forward and backward pass, the batch itself included.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """At the fullest moment; without the libraries and the GPU's context."""
        return self.weights + self.gradients + self.optimizer + self.activations


def training_memory(config: Config, device: torch.device | None = None) -> Estimate:
    """The memory of a training step of one batch, found without computing it; takes a second or two.

    Runs forward, loss, backward and optimiser on tensors without values (torch's FakeTensorMode), and counts the
    storages that live at once. So it sees what autocast, ``train.checkpoint`` and frozen encoders save. It does not
    see the scratch space of convolutions, the holes of an allocator, and ``train.compile``, which saves more.
    With ``train.accumulate`` a batch is all that is in memory at once.

    Args:
        device: where it would be trained (default: a CPU); decides what ``train.precision=auto`` means.
    Raises:
        ConfigError: the precision does not exist on the device.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # seconds of imports that a plain training does without

    device = device or torch.device("cpu")
    dtype = amp_dtype(config.train, device)
    with torch.device("meta"):  # where initialising weights is no work
        model = build(config)
    model.spatial.recompute = config.train.checkpoint
    clips, side, heatmap_side = config.train.batch_size, config.model.rgb.size_px, config.model.heatmap.size_px
    frames, channels = config.model.clip_frames, config.data.heatmap.channels
    loss = build_loss(config.train, torch.arange(5.0))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").train()
        trained = [p for module in (model, loss) for p in module.parameters() if p.requires_grad]
        optimizer = build_optimizer(config.train, trained)
        with _LiveStorages() as live:
            pictures = torch.empty(clips, 3, frames, side, side, dtype=torch.uint8)
            rgb = torch.empty(pictures.shape)
            heatmap = torch.empty(clips, channels, frames, heatmap_side, heatmap_side)
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                prediction = model(rgb, heatmap)
            # A loss that compares the clips of a step sees them all, though they go through the model batch by batch.
            passes = config.train.accumulate if config.train.loss in BATCH_LOSSES else 1
            loss(prediction.float().repeat(passes), torch.empty(clips * passes)).backward()
        gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
        optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    copies = 2 if device.type == "cpu" else 1
    return Estimate(
        weights=sum(tensor.nbytes for m in (model, loss) for tensor in (*m.parameters(), *m.buffers())) * copies,
        gradients=gradients,
        optimizer=sum(state.nbytes for state in states if isinstance(state, torch.Tensor)),
        activations=live.most_bytes - gradients,
    )


class _LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations within the block make, from first sight to release."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most_bytes = 0
        self._bytes = 0
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._see(value.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._live:
            size = storage.nbytes()
            self._live[key] = (weakref.ref(storage, lambda _: self._forget(key)), size)
            self._bytes += size
            self.most_bytes = max(self.most_bytes, self._bytes)

    def _forget(self, key: int) -> None:
        self._bytes -= self._live.pop(key)[1]


def resident_bytes(pid: int | None = None) -> int:
    """Memory that a process holds, in bytes; 0 if it is gone."""
    try:
        pages = int(Path(f"/proc/{pid or os.getpid()}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
