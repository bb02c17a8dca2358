"""Training one QAFE-Net, one epoch at a time.

`fit` is a generator: the caller logs each `EpochResult`, keeps its checkpoint, and stops early by not asking for
the next one. Nothing here knows of Ray, Optuna or MLflow.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from . import dotted, metrics
from .config import PRETRAINED, Config
from .data.dataset import Clip, ClipBatch, ClipDataset, model_inputs
from .data.loader import clip_loader, evaluation_loader, read_batches
from .data.manifest import Sample
from .device import amp_dtype, peak_memory_mb, pick_device, precision_name
from .distributed import Ranks, gradients_summed, take_compile_cache
from .errors import CheckpointError, ManifestError, PrecisionError
from .losses import BATCH_LOSSES, build_loss
from .memory import freed_memory_kept, freed_memory_returned
from .model import weights
from .model.attention import Maps, attention_read, mean_maps
from .model.batchnorm import set_counted, statistics_kept, synchronise
from .model.qafenet import build
from .optim import build_optimizer, lr_factor
from .predict import as_array, scores_of
from .store import Store

STATE_FILE = "last.pt"
BEST_FILE = "best.safetensors"


class Save(Protocol):
    """See `EpochResult.save`."""

    def __call__(self, folder: Path, *, synced: bool = True) -> None:
        """Writes to a folder; ``synced``: waits until the disk has it, which a copy in between need not."""


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """What one epoch of one model gave.

    Attributes:
        epoch: from 1.
        train_loss: mean loss over the epoch's steps.
        metrics: of the validation samples, by the names of `metrics.evaluate`.
        predictions: [N] scores of the validation samples, in their order.
        attention: what the fusion attended to in the validation samples, on average; empty without attention.
        best_epoch: the epoch with the highest validation Spearman so far; of equals the lower MAE, then the
            earlier one.
        best_spearman: its Spearman.
        seconds: of the epoch, evaluation included; evaluation_s: of that part alone; clips_per_s: of its training part.
        peak_memory_mb: on the device where it is a GPU, else of the process.
        parameters: of the model.

    All but the times and the memory is the same in each of the processes that train together.
    """

    epoch: int
    train_loss: float
    lr: float
    metrics: dict[str, float]
    predictions: np.ndarray
    attention: Maps
    best_epoch: int
    best_spearman: float
    seconds: float
    evaluation_s: float
    clips_per_s: float
    peak_memory_mb: float
    parameters: int
    save: Save = dataclasses.field(repr=False)
    """Writes all that `fit` needs to go on (``last.pt``) and the best weights (``best.safetensors``) to a folder.

    Of processes that train together the first one writes; in the others this does nothing."""

    def numbers(self) -> dict[str, Any]:
        """All but `save`, as ``torch.load`` may read it without trusting the file."""
        found = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name != "save"}
        found["predictions"] = torch.from_numpy(self.predictions)
        found["attention"] = {name: torch.from_numpy(read) for name, read in self.attention.items()}
        return found

    @classmethod
    def of(cls, numbers: dict[str, Any], save: Save) -> EpochResult:
        """The result whose `numbers` these are."""
        read = {name: found.numpy() for name, found in numbers["attention"].items()}
        return cls(**numbers | {"predictions": numbers["predictions"].numpy(), "attention": read}, save=save)


def fit(
    config: Config,
    store: Store,
    train: Sequence[Sample],
    validation: Sequence[Sample],
    *,
    device: torch.device | None = None,
    resume_from: Path | None = None,
    heard: int | None = None,
    between_steps: Callable[[Save], None] | None = None,
    init: Path | None = None,
) -> Iterator[EpochResult]:
    """Trains one model for one expression: a generator that yields after each epoch.

    Input is checked, and a checkpoint read, before the first epoch is asked for.

    Loader processes (``data.workers``) start with the first epoch and end with the generator.

    Every random draw of an epoch comes from ``(train.seed, epoch)``, so a run that resumes from the folder that
    `EpochResult.save` wrote gives the same numbers as one that never stopped. So does one that resumes from the middle
    of an epoch (``between_steps``).

    Where torch's default process group is initialised, its processes train one model, and each must call this with
    the same arguments but for its device, and ask for the same epochs. ``train.batch_size`` counts the clips of all
    of them together: each takes its share of every batch, and of the validation clips. With ``train.sync_batchnorm``
    the numbers are those of one process within rounding, if there is no dropout: its draws come from
    ``(train.seed, epoch, rank)`` in all but the first process. A checkpoint does not depend on their number.

    Args:
        train, validation: samples of one expression; whole patients on one side each.
        resume_from: a folder that `EpochResult.save` wrote with the same config; a step's clips may lie in other
            batches (``train.batch_size`` x ``train.accumulate``).
        heard: how many epochs' results the caller has; if the folder holds one more, it is given again first.
        init: a file of the whole model's weights to start from, as `model.weights.save` writes it.
        between_steps: called before each optimiser step with what saves this moment, as `EpochResult.save` does; it
            ends the training by raising. For a process that trains alone.
    Raises:
        ManifestError: too few samples to train or to validate on.
        CheckpointError: the folder holds another run's state, or a damaged one.
        ConfigError: a setting does not fit the data.
        MediaError: (from the generator) a frame cannot be read.
        FloatingPointError: (from the generator) the training loss is not finite.
    """
    _check_counts(train, validation)
    run = _Run(config, store, train, validation, device or pick_device(), between_steps)
    if init is not None:
        weights.load_state(run.model, init)
    if resume_from is not None:
        run.restore(resume_from)
    return run.epochs(heard)


def check_samples(config: Config, store: Store, train: Sequence[Sample], validation: Sequence[Sample]) -> None:
    """Refuses the samples that `fit` would refuse, without a model.

    Raises:
        ManifestError: too few samples to train or to validate on, or their heatmaps do not fit the settings.
        ConfigError: the loss does not fit the scores.
    """
    _check_counts(train, validation)
    for samples in (train, validation):
        ClipDataset(store, samples, config, train=False)
    build_loss(config.train, _scores(train))


def check_model(config: Config) -> None:
    """Refuses the settings and weights of a model that `fit` would refuse; without weights to read, no model is made.

    Raises:
        ConfigError: settings that do not fit together.
        CheckpointError: weights cannot be read, or are another model's.
    """
    with torch.device("meta"):  # where initialising weights is no work
        model = build(config)
    if any(dotted.flatten(config)[name] for name in PRETRAINED):
        weights.load_pretrained(model.to_empty(device="cpu"), config.model)


def _check_counts(train: Sequence[Sample], validation: Sequence[Sample]) -> None:
    if len(train) < 2 or len(validation) < 3:
        raise ManifestError(
            "training needs at least 2 training and 3 validation clips of the expression, got "
            f"{len(train)} and {len(validation)}. Add patients or choose another --expression."
        )


def _scores(samples: Sequence[Sample]) -> Tensor:
    return torch.tensor([sample.score for sample in samples], dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """How far the training of an epoch has come.

    Attributes:
        steps: of the optimiser; loss: the sum of theirs.
        random: the state of torch's generators.
        seconds: that it has taken.
    """

    steps: int
    loss: Tensor
    random: tuple[Tensor, Tensor | None]
    seconds: float


class _Run:
    """The state of one training: what a checkpoint holds, and how an epoch changes it."""

    def __init__(
        self,
        config: Config,
        store: Store,
        train: Sequence[Sample],
        validation: Sequence[Sample],
        device: torch.device,
        between_steps: Callable[[Save], None] | None = None,
    ) -> None:
        self.config = config
        self.device = device
        self.between_steps = between_steps
        self.ranks = Ranks.current()
        assert self.ranks.world == 1 or between_steps is None  # the others' generators would be lost
        self.train_set = ClipDataset(store, train, config, train=True)
        self.validation_set = ClipDataset(store, validation, config, train=False)
        self.target = np.array([sample.score for sample in validation], dtype=np.float64)
        with _seeded(config.train.seed, 0, device):
            self.model = build(config)
        weights.load_pretrained(self.model, config.model)
        self.model.to(device)
        if device.type == "cuda":
            self.model.spatial.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model.spatial.recompute = config.train.checkpoint
        if config.train.sync_batchnorm and self.ranks.world > 1:
            synchronise(self.model)
        # What a training pass calls: the same modules and weights, compiled or not, in one process or several.
        forward: Any = self.model
        if config.train.compile:
            take_compile_cache()
            # Batches have few sizes, and Inductor fails on some graphs with symbolic ones (torch 2.13).
            forward = torch.compile(self.model, dynamic=False)
        self.forward = self.ranks.parallel(forward)
        self.loss = build_loss(config.train, _scores(train)).to(device)
        parameters = [p for m in (self.model, self.loss) for p in m.parameters() if p.requires_grad]
        self.amp_dtype = amp_dtype(config.train, device)
        scaled = self.amp_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self.optimizer = build_optimizer(config.train, parameters, scaled=scaled)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lr_factor(config.train))
        self.epoch = 0
        self.best_epoch = 0
        self.best_key = (-np.inf, -np.inf)
        self.best = self.model
        self.told: dict[str, Any] = {}  # the last result's numbers; the result itself would hold this run
        self.part: _Part | None = None  # of the epoch that has begun, if one has

    def epochs(self, heard: int | None = None) -> Iterator[EpochResult]:
        if heard is not None and self.told and self.told["epoch"] > heard:
            yield EpochResult.of(self.told, self.save)
        # The loaders belong to this generator alone: an `EpochResult` that is kept must not keep their workers.
        batches: list[list[int]] = []
        training = clip_loader(self.train_set, batches, self.config, self.device, self.ranks)
        validation = evaluation_loader(self.validation_set, self.config, self.device, self.ranks)
        # Recomputing activations is the choice of who lacks memory, and keeping what is freed costs some.
        on_cpu, lean = self.device.type == "cpu", self.config.train.checkpoint
        with freed_memory_kept(on_cpu and not lean), freed_memory_returned(on_cpu and lean):
            while self.epoch < self.config.train.epochs:
                yield self._next_epoch(batches, training, validation)

    def _next_epoch(
        self, batches: list[list[int]], training: DataLoader[Clip], validation: DataLoader[Clip]
    ) -> EpochResult:
        began = time.perf_counter()
        since = began - (self.part.seconds if self.part is not None else 0.0)
        self.epoch += 1
        lr = self.optimizer.param_groups[0]["lr"]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with _seeded(self.config.train.seed, self.epoch, self.device):
            batches[:] = epoch_batches(len(self.train_set), self.config.train.batch_size)
            if not self.ranks.first:
                torch.manual_seed(_seed(self.config.train.seed, self.epoch, self.ranks.rank))
            train_loss = self._train_epoch(training, batches, since)
        trained = time.perf_counter()
        self.ranks.spread_buffers(self.model)
        with attention_read(self.model.fusion) as read:
            scores = scores_of(self.model, validation, self.config, self.device)
        predictions = as_array(self.ranks.gather(scores, len(self.validation_set)))
        attention = mean_maps(self.ranks.collect((read.clips, read.sums)))
        evaluated = time.perf_counter()
        values = metrics.evaluate(predictions, self.target)
        key = (values["spearman"], -values["mae"])
        if key > self.best_key:
            self.best_key, self.best_epoch = key, self.epoch
            self.best = copy.deepcopy(self.model).cpu()
        result = EpochResult(
            epoch=self.epoch,
            train_loss=train_loss,
            lr=lr,
            metrics=values,
            predictions=predictions,
            attention=attention,
            best_epoch=self.best_epoch,
            best_spearman=self.best_key[0],
            seconds=time.perf_counter() - since,
            evaluation_s=evaluated - trained,
            clips_per_s=sum(len(batch) for batch in batches) / (trained - began),
            peak_memory_mb=peak_memory_mb(self.device),
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            save=self.save,
        )
        self.told = result.numbers()
        return result

    def _train_epoch(self, loader: DataLoader[Clip], drawn: list[list[int]], since: float = 0.0) -> float:
        """Trains on the batches that were drawn, which the loader reads; of a resumed epoch on those that are left.

        Args:
            since: when the epoch began, by the performance counter, times in which it rested left out.
        """
        self.model.train()
        self.train_set.set_epoch(self.epoch)
        steps = step_sizes([len(batch) for batch in drawn], self.config.train.accumulate)
        total, done = torch.zeros((), device=self.device), 0
        if self.part is not None:
            total, done = total + self.part.loss.to(self.device), self.part.steps
            _set_random_state(self.part.random, self.device)
            del drawn[: sum(steps[:done])]
        shares = zip(read_batches(loader), drawn, strict=True)
        batches = (dataclasses.replace(share, whole=len(batch)) for share, batch in shares)
        for step, count in enumerate(steps[done:], start=done):
            if self.between_steps is not None:
                self.part = _Part(
                    steps=step, loss=total, random=_random_state(self.device), seconds=time.perf_counter() - since
                )
                self.between_steps(self.save)
            several = count > 1 and self.config.train.loss in BATCH_LOSSES
            backward = self._backward_as_one if several else self._backward_each
            try:
                read = list(itertools.islice(batches, count))
            except RuntimeError:  # who ends this process may have ended the loader's first
                if self.between_steps is not None:
                    self.between_steps(self.save)
                raise
            total += backward(read)
            self._step()
        rest = list(batches)  # A loader ends its pass only when it is asked for more.
        assert not rest
        self.part = None
        self.schedule.step()
        mean_loss = float(total) / len(steps)
        if not np.isfinite(mean_loss):
            raise FloatingPointError(f"the training loss is {mean_loss} in epoch {self.epoch}")
        return mean_loss

    def _backward_each(self, batches: list[ClipBatch]) -> Tensor:
        """Gradients of a loss that is a mean over clips, batch by batch; returns the loss."""
        clips = sum(batch.size for batch in batches)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            with gradients_summed(self.forward, now=batch is batches[-1]):
                prediction, target = self._predict(batch)
                loss = self.loss(prediction, target)
                share = batch.size / clips
                self.scaler.scale(loss * share if share < 1 else loss).backward()
            total += loss.detach() * share
        return total

    def _backward_as_one(self, batches: list[ClipBatch]) -> Tensor:
        """Gradients of a loss that compares clips, over several batches; returns the loss.

        Source: GradCache (arXiv:2101.06983). Predicts every batch without keeping its activations, takes the loss
        of them all and its gradient by each prediction, then goes through the model again, batch by batch, with
        that gradient. Dropout draws the same in both passes, and batch norms count one of them.
        """
        states, parts = [], []
        with torch.no_grad(), statistics_kept(self.model):
            for batch in batches:
                states.append(_random_state(self.device))
                parts.append(self._predict(batch))
        predictions = torch.cat([prediction for prediction, _ in parts]).requires_grad_()
        loss: Tensor = self.loss(predictions, torch.cat([target for _, target in parts]))
        torch.autograd.backward(self.scaler.scale(loss))
        assert predictions.grad is not None
        gradients = torch.split(predictions.grad, [batch.size for batch in batches])
        for batch, state, gradient in zip(batches, states, gradients, strict=True):
            _set_random_state(state, self.device)
            with gradients_summed(self.forward, now=batch is batches[-1]):
                torch.autograd.backward(self._predict(batch)[0], gradient)
        return loss.detach()

    def _predict(self, batch: ClipBatch) -> tuple[Tensor, Tensor]:
        """Predictions in float32, and targets: of the whole batch, with the gradient of this process's share."""
        mine = self.ranks.share(batch.size)
        set_counted(self.model, mine.stop > mine.start)
        batch = batch.to(self.device)
        rgb, heatmap = model_inputs(batch, self.config)
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            prediction = self.forward(rgb, heatmap)
        return self.ranks.gather(prediction.float(), batch.size), self.ranks.gather(batch.score, batch.size)

    def _step(self) -> None:
        if self.config.train.clip_norm > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def save(self, folder: Path, *, synced: bool = True) -> None:
        if not self.ranks.first:
            return
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "config": dotted.to_json(self.config),
            "epoch": self.epoch if self.part is None else self.epoch - 1,
            "part": self.part and dataclasses.asdict(self.part),
            "result": self.told,
            "best_epoch": self.best_epoch,
            "best_key": [float(value) for value in self.best_key],
            "model": self.model.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "precision": precision_name(self.amp_dtype),
        }
        unfinished = folder / (STATE_FILE + ".unfinished")
        with open(unfinished, "wb") as out:
            try:
                torch.save(state, out)
            except RuntimeError as err:
                if isinstance(err.__context__, OSError):  # On a full disk torch (2.13) complains of its own file.
                    raise err.__context__ from None
                raise
            out.flush()
            if synced:
                os.fsync(out.fileno())
        extra = {"epoch": str(self.best_epoch), "validation_spearman": repr(float(self.best_key[0]))}
        weights.save(folder / BEST_FILE, self.best, self.config, extra, synced=synced)
        unfinished.replace(folder / STATE_FILE)

    def restore(self, folder: Path) -> None:
        state = _read_state(folder / STATE_FILE)
        ours, theirs = _same_steps(self.config), _same_steps(dotted.from_json(state["config"]))
        held = state.get("precision")  # Older states lack it.
        if held is not None:
            self._keep_precision(held, folder / STATE_FILE)
            theirs["train.precision"] = ours["train.precision"]  # However it is written.
        if ours != theirs:
            changed = [f"{name}={theirs[name]}" for name in ours if ours[name] != theirs[name]]
            raise CheckpointError(
                f"a run resumes with the config it was started with; {folder / STATE_FILE} has "
                f"{', '.join(changed[:3])}. Start anew or use that config."
            )
        self.best, _, _ = weights.load(folder / BEST_FILE)
        self.epoch, self.best_epoch = state["epoch"], state["best_epoch"]
        self.best_key = tuple(state["best_key"])
        if part := state.get("part"):  # Older states have none, nor a result.
            self.part = _Part(**part)
        self.told = state.get("result", {})
        self.model.load_state_dict(state["model"])
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"]:  # Empty where the precision was another, in an older state.
            self.scaler.load_state_dict(state["scaler"])

    def _keep_precision(self, held: str, path: Path) -> None:
        """What ``train.precision=auto`` means depends on the device, and the numbers on what it means."""
        ours, wanted = precision_name(self.amp_dtype), self.config.train.precision
        if held != ours:
            raise PrecisionError(
                f"a run resumes in the precision that it was started in; {path} has {held}, and here "
                f"train.precision={wanted} is {ours} (on {self.device}). Set train.precision={held}, take a device "
                "like the earlier one, or start anew."
            )


def epoch_batches(clips: int, batch_size: int) -> list[list[int]]:
    """A random order of the clips in batches; a last batch of one joins the batch before it.

    Batch norm and the balanced losses cannot learn from one clip. Draws from torch's global generator.
    """
    order = torch.randperm(clips).tolist()
    batches = [order[start : start + batch_size] for start in range(0, clips, batch_size)]
    if len(batches) > 1 and len(batches[-1]) == 1 and batch_size > 1:
        single = batches.pop()
        batches[-1] += single
    return batches


def step_sizes(clips: Sequence[int], accumulate: int) -> list[int]:
    """How many batches each optimiser step takes, from the clips in each batch.

    A last step of a single clip joins the one before it, for the balanced losses cannot learn from one clip.
    """
    steps = [len(clips[start : start + accumulate]) for start in range(0, len(clips), accumulate)]
    if len(steps) > 1 and accumulate > 1 and sum(clips[-steps[-1] :]) == 1:
        steps[-2:] = [steps[-2] + 1]
    return steps


@contextlib.contextmanager
def _seeded(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's generators for a block, and puts them back after it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_seed(seed, epoch))
        yield


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _same_steps(config: Config) -> dict[str, Any]:
    """A config's settings, but for those that a run may change when it resumes: how a step's clips are computed, and
    where the weights lie that it has started from."""
    flat = dotted.flatten(config)
    flat["train.batch_size"] *= flat.pop("train.accumulate")
    free = ("train.checkpoint", "train.compile", "data.workers", "data.cache_gb", *PRETRAINED)
    return {name: value for name, value in flat.items() if name not in free}


def _read_state(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}. Name a folder that a run has saved to.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        dotted.from_json(state["config"])
    except Exception as err:
        raise CheckpointError(
            f"the checkpoint {path} is damaged ({type(err).__name__}). Resume from an earlier one or start anew."
        ) from err
    return dict(state)
