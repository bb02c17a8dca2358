"""One parent run for a sweep, one child run for each trial: how they are found, and how what is left of them is sent.

A sweep talks to a `SweepTracker`, which appends to a local `Spool`; a `Sender` turns that into runs.
``python -m tracking.runs replay SPOOL`` sends what a sweep could not, and tries again what the server refused.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mlflow import MlflowClient
from mlflow.entities import Run

from qafe import console
from qafe.errors import TrackingError

from .connection import masked, resolve_uri
from .sender import Sender
from .spool import Spool
from .tags import STATE_TAG, SWEEP_ID_TAG, SWEEP_ITSELF, SWEEP_TAG, TRIAL_TAG, TrialState
from .tracker import SPOOL_FILE, SweepTracker

__all__ = [
    "SPOOL_FILE",
    "STATE_TAG",
    "SWEEP_ID_TAG",
    "SWEEP_TAG",
    "TRIAL_TAG",
    "SweepTracker",
    "TrialState",
    "replay",
    "search_sweep",
    "sweep_exists",
    "sweep_runs",
]
LARGEST_SWEEP = 50_000


def sweep_exists(client: MlflowClient, sweep: str) -> bool:
    """Whether a sweep of this name is in the store, in any experiment.

    Raises:
        TrackingError: it is no name of a sweep.
    """
    return any(run.data.tags.get(TRIAL_TAG) == SWEEP_ITSELF for run in search_sweep(client, SWEEP_TAG, sweep))


def search_sweep(client: MlflowClient, tag: str, value: str) -> list[Run]:
    """The runs of the sweeps that have this value of `SWEEP_TAG` or `SWEEP_ID_TAG`, in any experiment.

    Raises:
        TrackingError: the value has characters that names of sweeps do not have.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]+", value):
        raise TrackingError(f"a sweep's name has only letters, digits and . _ -, got {value!r}. Name another sweep.")
    experiments = [found.experiment_id for found in client.search_experiments()]
    return list(client.search_runs(experiments, f"tags.`{tag}` = '{value}'", max_results=LARGEST_SWEEP))


def sweep_runs(client: MlflowClient, sweep: str) -> list[Run]:
    """All runs of one sweep, by its name where no other has it, or by its id.

    Raises:
        TrackingError: there is no such sweep, or several.
    """
    runs = search_sweep(client, SWEEP_TAG, sweep) or search_sweep(client, SWEEP_ID_TAG, sweep)
    if not runs:
        raise TrackingError(
            f"a sweep must be in the tracking store {masked(client.tracking_uri)}, got {sweep!r}. "
            "See the qafe.sweep tags in the MLflow UI."
        )
    ids = sorted({run.data.tags.get(SWEEP_ID_TAG, "") for run in runs})
    if len(ids) > 1:
        raise TrackingError(
            f"a sweep is named where no other has its name, {len(ids)} have the name {sweep}. "
            f"Give the {SWEEP_ID_TAG} tag of yours instead: {', '.join(ids)}."
        )
    return runs


class Replayed(NamedTuple):
    """What a replay came to."""

    sent: int
    """Entries that had not been sent."""
    refused: int
    """Entries that the server will not take, or whose files cannot be made: they stay set aside."""


def replay(spool_path: Path, uri: str | None = None) -> Replayed:
    """Sends what a spool still holds to its own store, and what was set aside before.

    Args:
        uri: where that store is now, if it has moved.
    Raises:
        TrackingError: there is no such spool, another process sends it, or the server does not answer.
    """
    if not spool_path.is_file():
        raise TrackingError(f"a spool is a file that a sweep left, got {spool_path}. Name a sweep's {SPOOL_FILE}.")
    spool = Spool(spool_path)
    try:
        sender = Sender(spool, None if uri is None else resolve_uri(uri))
        sender.send_refused()
        sent = sender.send_all()
        return Replayed(sent, len(spool.refused()))
    finally:
        spool.close()


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m tracking.runs replay SPOOL``."""
    parser = console.parser("python -m tracking.runs", "Send what a sweep could not send to its tracking server.")
    parser.add_argument("command", choices=["replay"])
    parser.add_argument("spool", type=Path, help=f"{SPOOL_FILE} in a sweep's folder")
    parser.add_argument("--tracking-uri", help="where the sweep's MLflow store is now (default: where it was)")
    return console.run(_main, parser, argv)


def _main(options: argparse.Namespace) -> int:
    print(json.dumps(replay(options.spool, options.tracking_uri)._asdict()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
