"""A trial's figures. They hold no picture of anybody, and no name: patients are pseudonyms, and the example heatmap is
of a drawn face."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from qafe import metrics
from qafe.config import Config
from qafe.data.drawn_face import SIZE_PX
from qafe.data.heatmap import draw
from qafe.data.sample import SampleConfig, make_clip
from qafe.history import ExpressionHistory, History
from qafe.markup import ALL_COUNT, columns

from .pseudonyms import pseudonym

PANEL = 3.6
"""Inches of a panel's side."""
MARGINS = (0.66, 0.12, 0.48, 0.48)
"""Inches left, right, below and above what a panel shows."""
MOST_WRITTEN = 12
"""Scores in a confusion matrix whose counts are written into it."""
EXAMPLE_PATIENT, EXAMPLE_SMILE, EXAMPLE_FRAMES = 0, 1, (0, 6, 12)


def draw_figures(history: History, config: Config, key: bytes) -> dict[str, Figure]:
    """All figures of a trial, by name.

    Args:
        history: of the trial's last checkpoint.
        config: the trial's.
        key: of the pseudonyms.
    """
    entries = {expression: entry for expression, entry in history.items() if entry.epochs}
    if not entries:
        return {}
    figures = {
        "predicted_against_true": draw_predictions(entries),
        "spearman_over_epochs": draw_epochs(entries),
        "confusion": draw_confusion(entries),
        "residuals_per_patient": draw_residuals(entries, key),
        "example_heatmap": draw_heatmap(config),
    }
    if any(entry.attention for entry in entries.values()):
        figures["fusion_attention"] = draw_attention(entries, config)
    return figures


def draw_predictions(history: History) -> Figure:
    """Predicted against true score of the validation clips, one panel for each expression."""
    figure, row = _panels(1, len(history))
    for axes, (expression, entry) in zip(row[0], history.items(), strict=True):
        scatter_scores(axes, np.array(entry.target), np.array(entry.best.predictions))
        low, high = _interval(entry)
        _title(
            axes,
            f"{expression}, validation, epoch {entry.best_epoch}\n"
            f"Spearman {entry.best.metrics['spearman']:.2f} [{low:.2f}, {high:.2f}], {len(entry.target)} clips",
        )
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
    """Validation Spearman over epochs, with the best epoch's interval as a band, and the training loss below it."""
    figure, rows = _panels(2, len(history), height=2.4)
    for upper, lower, (expression, entry) in zip(*rows, history.items(), strict=True):
        epochs = [epoch.epoch for epoch in entry.epochs]
        spearman = [epoch.metrics["spearman"] for epoch in entry.epochs]
        low, high = _interval(entry)
        upper.axhspan(low, high, color="C0", alpha=0.15, linewidth=0)
        upper.axhline(0, color="grey", linewidth=0.8)
        upper.plot(epochs, spearman, marker=".")
        upper.plot(
            [entry.best_epoch], [spearman[entry.best_epoch - 1]], "o", color="C0", fillstyle="none", markersize=9
        )
        _title(upper, f"{expression}, band: 95 % at the best epoch\n(patients resampled)")
        upper.set_ylabel("validation Spearman")
        lower.plot(epochs, [epoch.train_loss for epoch in entry.epochs], marker=".", color="C1")
        lower.set(xlabel="epoch", ylabel="training loss")
    return figure


def draw_confusion(history: History) -> Figure:
    """The best epoch's scores, rounded, against the true ones; shaded by each true score's share."""
    figure, row = _panels(1, len(history))
    for axes, (expression, entry) in zip(row[0], history.items(), strict=True):
        scores, counts = metrics.confusion(entry.best.predictions, entry.target)
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1, origin="lower")
        if len(scores) <= MOST_WRITTEN:
            axes.set_xticks(range(len(scores)), [str(score) for score in scores])
            axes.set_yticks(range(len(scores)), [str(score) for score in scores])
            for (true, predicted), count in np.ndenumerate(counts):
                if count:
                    colour = "white" if share[true, predicted] > 0.55 else "black"
                    axes.text(predicted, true, str(count), ha="center", va="center", color=colour)
        exact = np.trace(counts) / counts.sum()
        axes.set(xlabel="predicted severity, rounded", ylabel="true severity")
        _title(axes, f"{expression}, {counts.sum()} clips\n{exact:.0%} exact")
    return figure


def draw_residuals(history: History, key: bytes) -> Figure:
    """Predicted minus true score of every validation clip, patient by patient, sorted by the patients' medians."""
    rows = max(len(set(entry.patients)) for entry in history.values())
    figure, panels = _panels(1, len(history), height=max(PANEL, 0.9 + 0.16 * rows))
    for axes, (expression, entry) in zip(panels[0], history.items(), strict=True):
        found = residuals_by_patient(entry, key)
        for place, (_, residuals) in enumerate(found):
            axes.plot(residuals, [place] * len(residuals), "o", color="C0", markersize=3.5, alpha=0.6)
            axes.plot([np.median(residuals)] * 2, [place - 0.35, place + 0.35], color="black", linewidth=1.4)
        axes.set_yticks(range(len(found)), [patient for patient, _ in found], fontsize=5, family="monospace")
        axes.margins(y=0.02)
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set_xlabel("predicted minus true severity")
        _title(axes, f"{expression}, a row for each validation patient\na dot for each clip, a line at the median")
    return figure


def residuals_by_patient(entry: ExpressionHistory, key: bytes) -> list[tuple[str, list[float]]]:
    """The best epoch's errors by pseudonym, from the patient with the lowest median to the one with the highest."""
    found: dict[str, list[float]] = {}
    for patient, target, prediction in zip(entry.patients, entry.target, entry.best.predictions, strict=True):
        error = prediction - target
        if np.isfinite(error):
            found.setdefault(pseudonym(patient, key), []).append(error)
    return sorted(found.items(), key=lambda row: float(np.median(row[1])))


def draw_attention(history: History, config: Config) -> Figure:
    """What the fusion attended to in the best epoch: the mean over validation clips and heads.

    A row of panels for each expression that has attention; a row of a panel sums to 1.
    """
    entries = {expression: entry for expression, entry in history.items() if entry.attention}
    figure, rows = _panels(len(entries), max(len(entry.attention) for entry in entries.values()), height=2.6, width=2.9)
    for row, (expression, entry) in zip(rows, entries.items(), strict=True):
        for axes in row[len(entry.attention) :]:
            axes.set_visible(False)
        for axes, (name, weights) in zip(row, entry.attention.items(), strict=False):
            shown = np.array(weights)
            axes.imshow(shown, cmap="cividis", vmin=0, aspect="auto" if len(shown) == 1 else "equal")
            if shown.size <= MOST_WRITTEN**2 / 4:
                for (reader, other), weight in np.ndenumerate(shown):
                    colour = "black" if weight > 0.6 * shown.max() else "white"
                    axes.text(other, reader, f"{weight:.2f}", ha="center", va="center", color=colour, fontsize=6.5)
            axes.set_xticks(range(shown.shape[1]), [str(place + 1) for place in range(shown.shape[1])])
            axes.set_yticks(range(len(shown)), [str(place + 1) for place in range(len(shown))])
            if name == "pool":
                both, half = config.model.fusion.kind != "sum", shown.shape[1] // 2
                names = [
                    f"{'hr'[place // half]}{place % half + 1}" if both else str(place + 1)
                    for place in range(shown.shape[1])
                ]
                axes.set_xticks(range(len(names)), names)
                axes.set(xlabel="segment; h: heatmap, r: RGB", yticks=[])
            else:
                reader, _, other = name.partition(": ")[2].partition(" reads ")
                axes.set(xlabel=f"{other} segment", ylabel=f"{reader} segment")
            _title(axes, f"{expression}, {name}")
    return figure


def draw_heatmap(config: Config) -> Figure:
    """What the trial's heatmap settings do to landmarks: three frames of a drawn face that smiles.

    A patient's own landmarks could be recognised, and so could the mean of a few; nobody has this face.
    """
    settings = config.data.heatmap
    clip = make_clip(SampleConfig(frames=(16, 16)), EXAMPLE_PATIENT, EXAMPLE_SMILE, 0, 0.0)
    points = clip.landmarks[list(EXAMPLE_FRAMES)][:, columns(settings.points, ALL_COUNT)]
    if settings.skip_first and settings.points == "all":
        points = points[:, 1:]
    frames = draw(torch.from_numpy(points * (settings.canvas_px / SIZE_PX)), settings).numpy()  # T H W
    figure, row = _panels(1, len(frames), height=2.9, width=2.6)
    jet = ListedColormap(
        cv2.applyColorMap(np.arange(256, dtype=np.uint8), cv2.COLORMAP_JET).reshape(256, 3)[:, ::-1] / 255
    )
    for axes, frame in zip(row[0], frames, strict=True):
        axes.imshow(frame, cmap=jet if settings.colour == "jet" else "gray", vmin=0, vmax=1)
        axes.set_axis_off()
    figure.suptitle(
        f"a drawn face, no patient's: {settings.points} points, {settings.colour}, sigma {settings.sigma_px:.3g} px, "
        f"window {settings.window_px} px, blur {settings.blur_px} px\n"
        f"canvas of {settings.canvas_px} px, which the encoder gets at {config.model.heatmap.size_px} px",
        fontsize=8,
    )
    return figure


def _interval(entry: ExpressionHistory) -> metrics.Interval:
    return metrics.spearman_interval(entry.best.predictions, entry.target, entry.patients)


def _panels(rows: int, columns: int, *, height: float = PANEL, width: float = PANEL) -> tuple[Figure, Any]:
    """A figure and its axes [rows, columns], of so many inches each with all that is written around them."""
    figure = Figure(figsize=(width * columns, height * rows))
    grid = figure.subplots(rows, columns, squeeze=False)
    left, right, bottom, top = MARGINS  # matplotlib's own layouts would draw everything twice to find them
    figure.subplots_adjust(
        left=left / (width * columns),
        right=1 - right / (width * columns),
        bottom=bottom / (height * rows),
        top=1 - top / (height * rows),
        wspace=(left + right) / (width - left - right),
        hspace=(bottom + top) / (height - bottom - top),
    )
    for axes in grid.flat:
        axes.tick_params(labelsize=7)
        axes.locator_params(nbins=5)  # ticks are a third of the time that a figure takes
        axes.xaxis.label.set_size(8)
        axes.yaxis.label.set_size(8)
    return figure, grid


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=8)
