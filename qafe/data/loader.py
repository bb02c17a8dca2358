"""Clips -> batches: which process reads which, and in what order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.utils.data import BatchSampler, DataLoader

from ..config import Config
from ..distributed import ALONE, Ranks, Shares
from ..errors import QafeError
from .dataset import Clip, ClipBatch, ClipDataset, collate


def clip_loader(
    dataset: ClipDataset,
    batches: Iterable[list[int]],
    config: Config,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> DataLoader[Clip]:
    """Reads this process's share of the batches of clips, the same workers in every pass; they end with the loader.

    Draws nothing from torch's global generator, or a resumed run would differ: a loader with workers draws once,
    in its first pass, and one without in every pass.
    """
    return DataLoader(
        dataset,
        batch_sampler=Shares(batches, ranks),
        collate_fn=collate,
        num_workers=config.data.workers,
        persistent_workers=config.data.workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )


def evaluation_loader(
    dataset: ClipDataset, config: Config, device: torch.device, ranks: Ranks = ALONE
) -> DataLoader[Clip]:
    """Reads this process's share of the clips, in whole batches."""
    mine = range(len(dataset))[ranks.share(len(dataset))]
    batches = BatchSampler(mine, config.train.batch_size, drop_last=False)
    return clip_loader(dataset, batches, config, device)


def read_batches(loader: DataLoader[Clip]) -> Iterator[ClipBatch]:
    """The loader's batches; an error in a worker comes with its own message, without torch's account of it."""
    try:
        yield from loader
    except QafeError as err:
        kind = type(err)
        message = str(err).rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip()
        raise kind(message) from err
