"""What a trial's run shows beside its numbers: figures, tables and weights, without a name or a path in them."""

from __future__ import annotations

import contextlib
import csv
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qafe import config as configs
from qafe import metrics
from qafe.history import ExpressionHistory, History, read_history
from qafe.model import weights
from qafe.score import SUFFIX
from qafe.train import BEST_FILE

from . import pictures
from .privacy import without_paths
from .pseudonyms import pseudonym

CHECKPOINT_FOLDER = "checkpoint"


@contextlib.contextmanager
def trial_files(checkpoint: Path, key: bytes) -> Iterator[Path]:
    """A temporary folder with a trial's artifacts, made from its last checkpoint.

    Raises:
        CheckpointError: the checkpoint's history or weights are missing or damaged.
        ConfigError: its config is damaged.
        OSError: its config is missing.
    """
    history = read_history(checkpoint)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = without_paths(configs.from_json((checkpoint / "config.json").read_text()))
        (folder / "config.json").write_text(configs.to_json(config))
        (folder / CHECKPOINT_FOLDER).mkdir()
        for expression in history:
            best = checkpoint / expression / BEST_FILE
            if best.is_file():
                model, config, extra = weights.load(best)
                weights.save(folder / CHECKPOINT_FOLDER / (expression + SUFFIX), model, without_paths(config), extra)
        write_predictions(folder / "predictions.csv", history, key)
        (folder / "figures").mkdir()
        _save(draw_predictions(history), folder / "figures" / "predicted_against_true.png")
        _save(draw_epochs(history), folder / "figures" / "spearman_over_epochs.png")
        yield folder


def write_predictions(path: Path, history: History, key: bytes) -> None:
    """The best epoch's score of every validation clip, under pseudonyms."""
    with open(path, "w", newline="") as out:
        table = csv.writer(out)
        table.writerow(["expression", "clip", "patient", "target", "prediction"])
        for expression, entry in history.items():
            rows = zip(entry.ids, entry.patients, entry.target, entry.best.predictions, strict=True)
            for clip, patient, target, prediction in rows:
                table.writerow([expression, pseudonym(clip, key), pseudonym(patient, key), target, f"{prediction:.6f}"])


def draw_predictions(history: History) -> Figure:
    """Predicted against true score of the validation clips, one panel for each expression."""
    figure = Figure(figsize=(4.2 * len(history), 4.2), layout="constrained")
    for number, (expression, entry) in enumerate(history.items(), start=1):
        axes = figure.add_subplot(1, len(history), number)
        scatter_scores(axes, np.array(entry.target), np.array(entry.best.predictions))
        axes.set_title(f"{expression}, validation, epoch {entry.best_epoch}\n{_caption(entry)}", fontsize=9)
    return figure


def scatter_scores(axes: Axes, target: np.ndarray, prediction: np.ndarray) -> None:
    """Predicted against true score; equal scores are spread sideways so that each clip is seen."""
    spread = np.random.default_rng(0).uniform(-0.12, 0.12, len(target))
    axes.scatter(target + spread, prediction, s=22, alpha=0.7, edgecolors="none")
    low, high = float(target.min()), float(target.max())
    axes.plot([low, high], [low, high], color="grey", linewidth=0.8, linestyle="--")
    axes.set_xlabel("true severity")
    axes.set_ylabel("predicted severity")


def draw_epochs(history: History) -> Figure:
    """Validation Spearman and training loss over epochs."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for expression, entry in history.items():
        epochs = [epoch.epoch for epoch in entry.epochs]
        left.plot(epochs, [epoch.metrics["spearman"] for epoch in entry.epochs], marker=".", label=expression)
        right.plot(epochs, [epoch.train_loss for epoch in entry.epochs], marker=".", label=expression)
    left.axhline(0, color="grey", linewidth=0.8)
    left.set(xlabel="epoch", ylabel="validation Spearman")
    right.set(xlabel="epoch", ylabel="training loss")
    left.legend(fontsize=8)
    return figure


def _caption(entry: ExpressionHistory) -> str:
    interval = metrics.spearman_interval(
        np.array(entry.best.predictions), np.array(entry.target), np.array(entry.patients)
    )
    low, high = interval
    return f"Spearman {entry.best.metrics['spearman']:.2f} [{low:.2f}, {high:.2f}], {len(entry.target)} clips"


def _save(figure: Figure, path: Path) -> None:
    pictures.save(figure, path)
