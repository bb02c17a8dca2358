"""What ``python -m qafe train`` does: a model for each expression, tested, and kept from when it is trained."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from . import console, dotted, metrics
from .config import EXPRESSIONS, PRETRAINED, Config
from .data.cohort import Cohort, choose_expressions, load_cohort
from .data.dataset import ClipDataset
from .device import out_of_memory, pick_device, use_own_cores
from .distributed import launched
from .errors import CheckpointError, ConfigError, QafeError
from .history import HISTORY_FILE, ExpressionHistory, History, write_history
from .model import weights
from .model.qafenet import build
from .score import SUFFIX, Scorer
from .train import BEST_FILE, EpochResult, check_samples, fit

CONFIG_FILE = "config.json"
_UNFINISHED = "unfinished"


def train_expressions(
    config: Config,
    data_root: Path,
    wanted: str | None,
    device_name: str,
    out: Path | None,
    init: Path | None = None,
) -> None:
    """Trains a model for each expression, alone or as one of the processes that torchrun started, and tests it.

    Args:
        wanted: as `choose_expressions` takes it.
        device_name: as `pick_device` takes it.
        out: where the models, their history and the config are kept; None keeps nothing.
        init: a model folder, whose weights each expression's training starts from.
    Raises:
        QafeError: settings, data, memory or disk will not do; models that are finished by then are kept.
    """
    finished: list[str] = []
    with launched() as join, _finished_said(out, finished), _shortage_said(config, out):
        device = pick_device(device_name)
        use_own_cores()
        cohort = load_cohort(data_root, config.data)
        parts = {name: cohort.only(name) for name in choose_expressions(cohort.manifest, wanted)}
        for expression, part in parts.items():
            _check(config, part, expression, init)
        if join(device).first:
            _train_and_keep(out, config, parts, device, finished, init)
        else:
            for expression, part in parts.items():
                for _ in _epochs(config, part, expression, device, init):
                    pass
                finished.append(expression)


def read_config(folder: Path) -> Config:
    """The settings of a model folder, without the files that its own training once started from.

    Raises:
        CheckpointError: it is none.
    """
    try:
        config = dotted.from_json((folder / CONFIG_FILE).read_text())
        return dotted.override(config, dict.fromkeys(PRETRAINED, ""))
    except (OSError, ConfigError) as err:
        reason = " ".join(str(err).split())
        raise CheckpointError(
            f"a model folder must hold its settings ({CONFIG_FILE}), {folder} does not ({reason}). Name a folder that "
            "qafe train --out or qafe import wrote."
        ) from err


def model_file(folder: Path, expression: str) -> Path:
    """Where a model folder has the model of an expression.

    Raises:
        CheckpointError: it has none.
    """
    path = folder / (expression + SUFFIX)
    if not path.is_file():
        there = ", ".join(sorted(found.stem for found in folder.glob("*" + SUFFIX))) or "no model"
        raise CheckpointError(
            f"a training starts from a model of the same expression, {folder} has {there} and not {expression} "
            "(--init). Name another folder, or another --expression."
        )
    return path


def _check(config: Config, part: Cohort, expression: str, init: Path | None) -> None:
    """Refuses an expression that cannot be trained or tested, and names it."""
    try:
        if init is not None:
            weights.load_state(build(config), model_file(init, expression))
        check_samples(config, part.store, part.train, part.validation)
        ClipDataset(part.store, part.test, config, train=False)
    except QafeError as err:
        raise type(err)(f"{expression}: {err}") from err


def _train_and_keep(
    out: Path | None,
    config: Config,
    parts: Mapping[str, Cohort],
    device: torch.device,
    finished: list[str],
    init: Path | None,
) -> None:
    """Trains and tests each expression; its model is kept from when it is trained, whatever comes after it."""
    test: dict[str, float] = {}
    history: History = {}
    with output_folder(out) as (beside, folder):
        (beside / CONFIG_FILE).write_text(dotted.to_json(config))
        for expression, part in parts.items():
            entry = ExpressionHistory.start(part.validation)
            result = None
            for result in _epochs(config, part, expression, device, init):
                entry.add(result)
                print(
                    f"{expression} epoch {result.epoch}/{config.train.epochs}: loss {result.train_loss:.4f}, "
                    f"validation Spearman {result.metrics['spearman']:.3f} (best {result.best_spearman:.3f} in "
                    f"epoch {result.best_epoch}), MAE {result.metrics['mae']:.3f}, {result.seconds:.1f} s",
                    file=sys.stderr,
                )
            assert result is not None
            history[expression] = entry
            result.save(beside / _UNFINISHED)
            write_history(beside, history)
            folder.mkdir(exist_ok=True)
            (beside / _UNFINISHED / BEST_FILE).rename(folder / (expression + SUFFIX))
            (beside / HISTORY_FILE).rename(folder / HISTORY_FILE)
            if not finished:
                (beside / CONFIG_FILE).rename(folder / CONFIG_FILE)
            finished.append(expression)
            shutil.rmtree(beside / _UNFINISHED)
            if part.test:
                scores = Scorer(folder, device).score_samples(part.store, part.test)
                test[expression] = metrics.spearman(scores, np.array([sample.score for sample in part.test]))
    print(
        _published_row(history, "validation", {name: entry.best.metrics["spearman"] for name, entry in history.items()})
    )
    print(_published_row(history, "test", test))


@contextlib.contextmanager
def _finished_said(out: Path | None, finished: Sequence[str]) -> Iterator[None]:
    """What ends the block early says which expressions have been finished, and where their models are."""
    try:
        yield
    except BaseException as err:
        # Of processes that train together the first one writes, and another one may be ahead of it.
        kept = [name for name in finished if out is not None and (out / (name + SUFFIX)).is_file()]
        if not kept:
            raise
        said = f"Finished, and kept in {out}: {', '.join(kept)}."
        if isinstance(err, QafeError):
            raise type(err)(f"{err} {said}") from err
        if console.speaks():
            print(said, file=sys.stderr)
        raise


@contextlib.contextmanager
def _shortage_said(config: Config, out: Path | None) -> Iterator[None]:
    """Says in one line what the block lacks: memory, room on the disk, or leave to read or write a file."""
    try:
        yield
    except OSError as err:
        place = err.filename or out or tempfile.gettempdir()
        raise ConfigError(
            f"training must be able to read its data and to write its results, got {err.strerror or err} ({place}). "
            "Make room there, or correct its permissions."
        ) from err
    except (RuntimeError, MemoryError) as err:
        if not out_of_memory(err):
            raise
        batch, step = config.train.batch_size, config.train.batch_size * config.train.accumulate
        ways = []
        if batch > 1:
            half = max(size for size in range(1, batch // 2 + 1) if step % size == 0)
            ways.append(f"train.batch_size={half} and train.accumulate={step // half}")
        if not config.train.checkpoint and not config.train.compile:
            ways.append("train.checkpoint=true")
        raise ConfigError(
            f"a batch must fit into memory, and {batch} clip{'s' * (batch > 1)} at once do not (train.batch_size). "
            f"Set {', or '.join(ways) or 'a smaller --preset'}."
        ) from err


def _epochs(
    config: Config, part: Cohort, expression: str, device: torch.device, init: Path | None
) -> Iterator[EpochResult]:
    try:
        start = None if init is None else model_file(init, expression)
        yield from fit(config, part.store, part.train, part.validation, device=device, init=start)
    except FloatingPointError as err:
        raise ConfigError(
            f"the training loss must stay finite: {err} of {expression}, with train.lr={config.train.lr:g}. "
            f"Set train.lr={config.train.lr / 10:g} or train.clip_norm=1."
        ) from err


def _published_row(history: History, split: str, spearman: dict[str, float]) -> str:
    """A row of the paper's table: Spearman x 100 for each expression, then the mean."""
    columns = [name for name in EXPRESSIONS if name in history] + [n for n in history if n not in EXPRESSIONS]
    values = [f"{name} {100 * spearman[name]:.2f}" if name in spearman else f"{name} -" for name in columns]
    mean = f"mean {100 * sum(spearman.values()) / len(spearman):.2f}" if spearman else "mean -"
    return " | ".join([f"QAFE-Net ({split}, Spearman x 100)", *values, mean])


@contextlib.contextmanager
def output_folder(wanted: Path | None, flag: str = "--out") -> Iterator[tuple[Path, Path]]:
    """A folder to write in, and on the same disk the wanted one, where what is whole is moved to.

    The first goes away at the end. The second is not made before there is something to move; None: it is the first.
    """
    if wanted is None:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name), Path(name)
        return
    wanted = wanted.absolute()
    if wanted.exists() and (not wanted.is_dir() or any(wanted.iterdir())):
        raise ConfigError(f"the output folder must be new or empty, got {wanted} ({flag}). Name another.")
    # A folder that is there may be a mounted volume, and then nothing beside it is on the same disk.
    place = wanted if wanted.is_dir() else wanted.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(prefix=f".{wanted.name}.", dir=place)
    except OSError as err:
        raise console.unwritable(wanted, err) from err
    with beside as name:
        yield Path(name), wanted
