"""One trial on a worker: settings in, an epoch's numbers and a checkpoint out, again and again.

It knows nothing of MLflow: the driver tracks what is reported here. What goes wrong has a class:

diverged  the loss is not finite: the sweep counts the trial as pruned.
memory    not even a batch of one clip fits, as was foreseen before the first step or found in it.
refused   settings or weights that cannot work: this trial fails, others may not.
data      a clip or table that cannot be read: it will happen to every trial, so the sweep stops.
machine   the machine is in the way (open files, rights) and time will not help: this trial fails, others may not.
error     anything else that is raised.
lost      the worker or its node died more often than the driver is willing to start it again.

A batch that will not fit is halved before the first step, and so is one that runs out of memory: half the batch and
twice the accumulation, so that the setting under test stays what it is. Where time may help, a trial waits: for room
on a full disk, for a network folder that is away (`qafe.machine_errors`). Input/output errors end its worker, and Ray
begins it again, perhaps on another machine.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import os
import platform
import shutil
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from ray import tune

from qafe import dotted, metrics
from qafe.config import Config
from qafe.data.cohort import split_cohort
from qafe.data.manifest import Manifest, read_manifest
from qafe.device import lost_device, out_of_memory
from qafe.errors import ManifestError, MediaError, PrecisionError, QafeError
from qafe.history import ExpressionHistory, History, read_history, write_history
from qafe.machine_errors import GONE, Trouble, in_true_words, trouble_of
from qafe.store import Store
from qafe.train import EpochResult, Save, fit

from .checkpoints import seal
from .control import AWAY, FULL, Control
from .monitor import monitor
from .placement import places_here
from .plan import Plan
from .preemption import PREEMPTION
from .results import DIVERGED, FAILED_AS, FINISHED, NO_SKILL, OBJECTIVE
from .room import fitting, room_bytes, surely_fits, with_half_the_batch
from .storage import Storage
from .study import REASON
from .sweep import trial_device

CONFIG_FILE = "config.json"
TRACEBACK = "traceback"
DATA = "data"
MACHINE = "machine"
MEMORY = "memory"
DONE = "done"
REFUSED = "refused"
ERROR = "error"
RESERVE_BYTES = 64 * 2**20
RESERVE_SHARE = 0.05
"""Room that trials leave for the sweep's own records: this much, or this share of a small disk."""
ROOM_POLL_S = 1.0
LONGEST_PAUSE_S = 30.0
"""Between two tries of a trial whose data is away: begun with `ROOM_POLL_S`, and twice as long each time."""
RUNNING_CHECKPOINTS = 2
"""Of a running trial: the last, and the one before it should the last be damaged."""
EPOCH_RESAMPLES = 250
"""Of the interval of each epoch, which a training waits for; the report draws more."""


@dataclass(frozen=True, kw_only=True)
class TrialPlan:
    """What all trials of a sweep share."""

    base_json: str
    data_root: str
    expressions: tuple[str, ...]
    threads: int
    gpus: float
    folder: str
    """The sweep's."""
    trials: int
    cpus: float
    baseline_bytes: int
    """What the baseline takes at its fullest, found when the sweep was planned; 0 if it is not known."""
    bucket: str = ""
    """Where workers keep checkpoints that do not see the folder."""

    @classmethod
    def of(cls, plan: Plan) -> TrialPlan:
        """What the trials of a planned sweep share."""
        return cls(
            base_json=plan.config_json,
            data_root=plan.data_root,
            expressions=plan.expressions,
            threads=max(1, int(plan.cpus_per_trial)),
            gpus=plan.gpus_per_trial,
            folder=plan.folder,
            trials=plan.trials,
            cpus=plan.cpus_per_trial,
            baseline_bytes=plan.baseline_bytes,
            bucket=plan.bucket,
        )


def train_trial(parameters: dict[str, Any], plan: TrialPlan) -> None:
    """Trains one model for each expression, epoch by epoch side by side, and reports after each epoch.

    A trial that was interrupted goes on from its last intact checkpoint, or from the middle of the epoch behind it if
    its worker was asked to leave there; where ``train.precision=auto`` means another one than before, it begins anew.
    """
    torch.set_num_threads(plan.threads)
    planned = dotted.override(dotted.from_json(plan.base_json), parameters["settings"])
    # The expressions train side by side: they share what one training would have. Numbers do not depend on it.
    config = dotted.override(planned, {"data.workers": planned.data.workers // len(plan.expressions)})
    away = Away(plan, parameters["number"])
    try:
        config = _as_fits(config, plan)
        while (why := _trained(parameters, plan, config, away)) != DONE:
            if why == AWAY:
                continue
            smaller = with_half_the_batch(config)
            if smaller is None:
                raise MemoryError("a batch of one clip does not fit")
            config = smaller
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    except FloatingPointError as err:
        _fail(DIVERGED, err)
    except MemoryError as err:
        _fail(MEMORY, err)
    except Exception as err:
        trouble = trouble_of(err)
        if lost_device(err) or (trouble is not None and trouble.cure == "retry"):
            raise  # this process has lost its GPU, or its machine a disk: Ray starts another
        if told := in_true_words(err):
            _fail(MACHINE, told)
        elif isinstance(err, (MediaError, ManifestError)):
            _fail(DATA, err)
        else:
            _fail(REFUSED if isinstance(err, QafeError) else ERROR, err)


def _as_fits(config: Config, plan: TrialPlan) -> Config:
    """The config with the batch that this machine has memory for.

    Raises:
        MemoryError: it has none for a single clip.
    """
    device, base = trial_device(plan.gpus), dotted.from_json(plan.base_json)
    room = room_bytes(device, plan.gpus, min(places_here(plan.cpus, plan.gpus), plan.trials))
    if surely_fits(config, base, plan.baseline_bytes, room):
        return config
    return fitting(config, device, room, len(plan.expressions))


def _fail(kind: str, err: Exception) -> None:
    frames = "".join(traceback.format_exception(err))
    reason = " ".join(f"{type(err).__name__}: {err}".split())
    # No epoch of its own: the study keeps what it has heard.
    tune.report({"epoch": 0, OBJECTIVE: NO_SKILL, FAILED_AS: kind, REASON: reason, TRACEBACK: frames, FINISHED: False})


def _trained(parameters: dict[str, Any], plan: TrialPlan, config: Config, away: Away) -> str:
    """Trains to the end, or says why it is to be tried again: memory ran out, or the data was away."""
    try:
        _train(parameters, plan, config, away)
    except Exception as err:
        trouble = trouble_of(err)
        if out_of_memory(err) or (trouble is not None and trouble.cure == "memory"):
            return MEMORY
        if not away.waited(err, trouble):
            raise
        return AWAY
    return DONE


class Away:
    """Waits while a trial's data is away, and says so to the driver.

    Args:
        plan: where the data and the sweep's folder lie.
        number: the trial's.
    """

    def __init__(self, plan: TrialPlan, number: int) -> None:
        self.data_root = Path(plan.data_root)
        self.control = Control(Path(plan.folder))
        self.name = f"{AWAY}-{number}"
        self.pause_s = ROOM_POLL_S

    def waited(self, err: Exception, trouble: Trouble | None) -> bool:
        """Waits a while, if time may help: an error that time cures, or data that has been read before and is gone."""
        if not isinstance(err, (MediaError, ManifestError, OSError)):
            return False
        if trouble is None and not self.data_root.is_dir():
            trouble = GONE
        if trouble is None or trouble.cure != "wait":
            return False
        with contextlib.suppress(OSError):
            self.control.wish(self.name, trouble.words)
        _dataset.cache_clear()
        end = time.monotonic() + self.pause_s
        while time.monotonic() < end:
            if PREEMPTION.asked:
                PREEMPTION.leave()
            time.sleep(min(ROOM_POLL_S, self.pause_s))
        self.pause_s = min(2 * self.pause_s, LONGEST_PAUSE_S)
        return True

    def over(self) -> None:
        """It has been read again."""
        if self.pause_s > ROOM_POLL_S:
            self.pause_s = ROOM_POLL_S
            with contextlib.suppress(OSError):
                self.control.withdraw(self.name)


def _train(parameters: dict[str, Any], plan: TrialPlan, config: Config, away: Away) -> None:
    monitor()  # looks from now on
    cohort = split_cohort(*_dataset(plan.data_root), config.data)
    device = trial_device(plan.gpus)
    history: History = {}
    number, storage = parameters["number"], Storage(Path(plan.folder), plan.bucket)
    parts = {expression: cohort.only(expression) for expression in plan.expressions}
    saves: dict[str, Save] = {}
    done = 0  # epochs that have been told

    def heed(expression: str = "", save: Save | None = None) -> None:
        """Between two steps, and while an epoch cannot be told."""
        if save is not None:
            saves[expression] = save
        if PREEMPTION.asked:
            _leave(config, saves, storage, number, done)

    def started(left: list[Path]) -> dict[str, Iterator[EpochResult]]:
        return {
            expression: fit(
                config,
                part.store,
                part.train,
                part.validation,
                device=device,
                # One that had not begun the epoch is where the epoch before left it.
                resume_from=next((folder / expression for folder in left if (folder / expression).is_dir()), None),
                heard=done,
                between_steps=functools.partial(heed, expression),
            )
            for expression, part in parts.items()
        }

    known = tune.get_checkpoint()
    known_as = known and Path(known.path)
    with storage.at_hand(number, epochs=parameters["epochs"], whole=config.train.epochs, known=known_as) as (
        whole,
        begun,
    ):
        if whole is not None:
            history = read_history(whole)
            done = len(history[plan.expressions[0]].epochs)
        left = [each for each in (begun, whole) if each is not None]
        if left:
            held = dotted.from_json((left[0] / CONFIG_FILE).read_text())
            if held.train.batch_size < config.train.batch_size:  # memory ran out before
                config = dotted.override(
                    config, {"train.batch_size": held.train.batch_size, "train.accumulate": held.train.accumulate}
                )
        try:
            runs = started(left)
        except PrecisionError:  # another kind of GPU: half of each would be neither's result
            history, done = {}, 0
            storage.drop_begun(number)
            runs = started([])
    for expression, part in parts.items():
        history.setdefault(expression, ExpressionHistory.start(part.validation))
    while done < config.train.epochs:
        results: dict[str, EpochResult] = {}
        try:
            with PREEMPTION.heeded():
                for expression, run in runs.items():
                    results[expression] = next(run)
                    saves[expression] = results[expression].save
                heed()
                away.over()
                for expression, result in results.items():
                    history[expression].add(result)
                _keep(config, history, results, storage, number, heed)
        finally:
            saves.clear()  # they hold the models
        done += 1
        if begun is not None:
            storage.drop_begun(number)
            begun = None


@functools.cache
def _dataset(root: str) -> tuple[Store, Manifest]:
    """Read once by each worker: a sweep keeps to the data that it began with, and to check a thousand videos takes a
    second."""
    store = Store(root)
    return store, read_manifest(store)


def _leave(config: Config, saves: dict[str, Save], storage: Storage, number: int, done: int) -> NoReturn:
    """Keeps an epoch's beginning, and ends this process. Where that fails, the epoch is trained again."""
    with contextlib.suppress(OSError, QafeError), storage.leaving(number) as folder:
        (folder / CONFIG_FILE).write_text(dotted.to_json(config))
        for expression, save in saves.items():
            save(folder / expression)
        seal(folder, done, left=uuid.uuid4().hex)
        if not has_room(folder):
            raise OSError(errno.ENOSPC, "the sweep's own records need the room")
    PREEMPTION.leave()


def _keep(
    config: Config,
    history: History,
    results: dict[str, EpochResult],
    storage: Storage,
    number: int,
    heed: Callable[[], None],
) -> None:
    """Writes an epoch's checkpoint and reports both; waits where the disk is full, or the bucket away."""
    epoch = next(iter(results.values())).epoch
    # Workers that have a bucket may not see the folder, or not be allowed to write there.
    control = Control(storage.folder) if not storage.bucket or os.access(storage.folder, os.W_OK) else None
    full, lost = f"{FULL}-{number}", f"{AWAY}-{number}"
    while True:
        away, why = False, ""
        try:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                (folder / CONFIG_FILE).write_text(dotted.to_json(config))
                write_history(folder, history)
                for expression, result in results.items():
                    result.save(folder / expression, synced=False)  # Ray's copy of it is what stays
                seal(folder, epoch)
                size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                if storage.bucket or has_room(storage.folder, size):
                    tune.report(
                        summary(results, history, config) | monitor().take() | {FINISHED: epoch == config.train.epochs},
                        checkpoint=tune.Checkpoint.from_directory(folder),
                    )
                    break
        except OSError as err:
            away, trouble = storage.waits(err), trouble_of(err)
            if not away and (control is None or trouble is None or trouble.cure != "wait"):
                raise
            if trouble is not None and err.errno not in (errno.ENOSPC, errno.EDQUOT):
                why = trouble.words
        if control is not None and not away:
            with contextlib.suppress(OSError):
                control.wish(lost if why else full, why)
        heed()
        time.sleep(ROOM_POLL_S)
    if control is not None:
        control.withdraw(full)
        control.withdraw(lost)
    if storage.bucket:  # the driver would wait for each answer
        storage.drop_old(number, RUNNING_CHECKPOINTS)


def has_room(folder: Path, size: int = 0) -> bool:
    """Whether so many bytes fit beside what is kept free for the sweep's own records."""
    usage = shutil.disk_usage(folder)
    return usage.free >= size + min(RESERVE_BYTES, int(RESERVE_SHARE * usage.total))


def summary(results: dict[str, EpochResult], history: History, config: Config) -> dict[str, Any]:
    """An epoch's numbers: means over the expressions, and Spearman for each, with its interval over patients."""
    every = list(results.values())

    def mean(name: str) -> float:
        return float(np.mean([result.metrics[name] for result in every]))

    values: dict[str, Any] = {
        "epoch": every[0].epoch,
        OBJECTIVE: float(np.mean([result.best_spearman for result in every])),
        "best_mae": float(np.mean([entry.best.metrics["mae"] for entry in history.values()])),
        "spearman": mean("spearman"),
        "pearson": mean("pearson"),
        "mae": mean("mae"),
        "train_loss": float(np.mean([result.train_loss for result in every])),
        "lr": every[0].lr,
        "epoch_s": sum(result.seconds for result in every),
        "clips_per_s": float(np.mean([result.clips_per_s for result in every])),
        "peak_memory_mb": max(result.peak_memory_mb for result in every),
        "params": every[0].parameters,
        "batch_size": config.train.batch_size,
        "worker": f"{platform.node()}:{os.getpid()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }
    values |= {f"spearman_{expression}": result.metrics["spearman"] for expression, result in results.items()}
    parts = {name: (results[name].predictions, entry.target, entry.patients) for name, entry in history.items()}
    of_mean, of_each = metrics.spearman_intervals(parts, resamples=EPOCH_RESAMPLES)
    intervals = {"": of_mean} | ({} if len(parts) == 1 else {f"_{name}": found for name, found in of_each.items()})
    for name, found in intervals.items():
        values |= {f"spearman{name}_low": found.low, f"spearman{name}_high": found.high}
    return values
