"""Faults for the processes of a sweep under test: Python imports this at the start, wherever it lies on the path.

Each file in the folder ``$FAULTS`` is one fault. ``clock`` holds seconds by which the wall clock is wrong. ``nan`` is
taken by the first training that ends its second epoch: its weights are spoilt. ``memory`` holds the largest batch that
fits. ``slow`` holds how many seconds each optimiser step takes more.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["FAULTS"])
_true_time = time.time


def _wrong_time() -> float:
    try:
        return _true_time() + float((FOLDER / "clock").read_text())
    except (OSError, ValueError):
        return _true_time()


time.time = _wrong_time


def _spoil(train) -> None:
    train_epoch = train._Run._train_epoch

    def faulty(run, *batches):
        import torch

        limit = FOLDER / "memory"
        if limit.exists() and run.config.train.batch_size > int(limit.read_text()):
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        if run.epoch == 3:
            try:
                (FOLDER / "nan").rename(FOLDER / "nan.taken")
            except FileNotFoundError:
                pass
            else:
                with torch.no_grad():
                    next(run.model.parameters()).fill_(float("nan"))
        return train_epoch(run, *batches)

    train._Run._train_epoch = faulty
    take_step = train._Run._step

    def slow(run):
        take_step(run)
        wait = FOLDER / "slow"
        time.sleep(float(wait.read_text()) if wait.exists() else 0)

    train._Run._step = slow


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "qafe.train":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def run_and_spoil(module) -> None:
            run(module)
            _spoil(module)

        spec.loader.exec_module = run_and_spoil
        return spec


sys.meta_path.insert(0, _Finder())
