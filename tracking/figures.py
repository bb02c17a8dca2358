"""What a trial's run shows beside its numbers: figures, tables and weights, without a name or a path in them."""

from __future__ import annotations

import contextlib
import csv
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qafe import dotted
from qafe.history import History, read_history
from qafe.model import weights
from qafe.score import SUFFIX
from qafe.train import BEST_FILE

from . import pictures
from .plots import draw_figures
from .privacy import without_paths
from .pseudonyms import pseudonym

CHECKPOINT_FOLDER = "checkpoint"


@contextlib.contextmanager
def trial_files(checkpoint: Path, key: bytes) -> Iterator[Path]:
    """A temporary folder with a trial's artifacts, made from its last checkpoint.

    Raises:
        CheckpointError: the checkpoint's history or weights are missing or damaged, or there is no room for a copy.
        ConfigError: its config is damaged.
        OSError: its config is missing, or there is no room for the artifacts.
    """
    history = read_history(checkpoint)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = without_paths(dotted.from_json((checkpoint / "config.json").read_text()))
        (folder / "config.json").write_text(dotted.to_json(config))
        (folder / CHECKPOINT_FOLDER).mkdir()
        for expression in history:
            best = checkpoint / expression / BEST_FILE
            if best.is_file():
                model, own, extra = weights.load(best)
                weights.save(folder / CHECKPOINT_FOLDER / (expression + SUFFIX), model, without_paths(own), extra)
        write_predictions(folder / "predictions.csv", history, key)
        (folder / "figures").mkdir()
        for title, figure in draw_figures(history, config, key).items():
            pictures.save(figure, folder / "figures" / f"{title}.png")
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
