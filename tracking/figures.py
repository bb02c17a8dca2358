"""What a trial's run shows beside its numbers: figures, tables and weights, without a name or a path in them."""

from __future__ import annotations

import contextlib
import csv
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Metric

from qafe import dotted
from qafe.errors import CheckpointError, ConfigError
from qafe.history import History, read_history
from qafe.model import weights
from qafe.score import SUFFIX
from qafe.train import BEST_FILE

from . import pictures
from .plots import draw_figures
from .privacy import without_paths
from .pseudonyms import pseudonym
from .tags import CHECKPOINT_TAG, MODEL_TYPE

CHECKPOINT_FOLDER = "checkpoint"
MODEL_METRICS = ("spearman", "spearman_low", "spearman_high", "mae", "pearson")


class FilesLater(Exception):
    """Files could not be made now, as where the disk is full; another time they may be."""


@contextlib.contextmanager
def trial_files(checkpoint: Path, key: bytes) -> Iterator[Path]:
    """A temporary folder with a trial's artifacts, made from its last checkpoint.

    Raises:
        CheckpointError: the checkpoint's history or weights are missing or damaged.
        ConfigError: its config is damaged.
        OSError: its config is missing, or there is no room for the copies.
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


def log_model(client: MlflowClient, experiment_id: str, run_id: str, checkpoint: Path) -> None:
    """The run's best weights as a model that MLflow's UI lists, with the run's own numbers of their epoch."""
    step = max(entry.best_epoch for entry in read_history(checkpoint).values())
    found = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
    model = next((each for each in found if each.model_type == MODEL_TYPE), None)
    if model is None:
        tags = {CHECKPOINT_TAG: f"runs:/{run_id}/{CHECKPOINT_FOLDER}"}
        model = client.create_logged_model(
            experiment_id, name=MODEL_TYPE, source_run_id=run_id, tags=tags, model_type=MODEL_TYPE
        )
    # The very rows that the run has: a row of another time would be one more step there.
    rows = [row for name in MODEL_METRICS for row in client.get_metric_history(run_id, name) if row.step == step]
    linked = [Metric(row.key, row.value, row.timestamp, row.step, model_id=model.model_id) for row in rows]
    if linked:
        client.log_batch(run_id, metrics=linked)
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
    client.finalize_logged_model(model.model_id, "READY")


def later(err: Exception, of: str) -> FilesLater:
    """Of what kept files from being made, and for whom."""
    return FilesLater(
        f"files must be copied before they are sent, got {type(err).__name__} ({' '.join(str(err).split())}) for {of}. "
        "Make room, then replay the spool."
    )


def damaged(checkpoint: Path, err: Exception) -> bool:
    """Whether an error proves that a checkpoint is damaged or missing: no other time would give more of it."""
    causes: list[BaseException] = [err]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    of_disk = [cause for cause in causes if isinstance(cause, OSError)]
    if not of_disk:
        return isinstance(err, CheckpointError | ConfigError)
    missing = (FileNotFoundError, NotADirectoryError)
    return all(
        isinstance(cause, missing) and cause.filename and Path(cause.filename).is_relative_to(checkpoint)
        for cause in of_disk
    )
