"""Where the MLflow store is, and a client that has been seen to answer."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# A client that meets a sleeping server must come back soon: the spool keeps what it could not send.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

from mlflow import MlflowClient

from qafe.errors import TrackingError

EMBEDDED_FILE = "mlflow.db"
for name in ("mlflow", "alembic"):  # they announce every step of a first migration
    logging.getLogger(name).setLevel(logging.WARNING)


def resolve_uri(uri: str | None = None) -> str:
    """The tracking URI to use, absolute so that it means the same in every process.

    In this order: the argument, ``MLFLOW_TRACKING_URI``, MLflow's own default (``mlflow.db`` in this folder).
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{EMBEDDED_FILE}"
    match = re.fullmatch(r"sqlite:///(?!/)(.+)", uri)
    return f"sqlite:////{str(Path(match[1]).resolve()).lstrip('/')}" if match else uri


def masked(uri: str) -> str:
    """The URI without a password."""
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", uri)


def connect(uri: str | None = None, *, create: bool = True) -> MlflowClient:
    """A client of a store that answers.

    Args:
        create: make an embedded store that does not exist; without it that is an error.
    Raises:
        TrackingError: nothing answers at the URI, or it is not one that MLflow knows.
    """
    resolved = resolve_uri(uri)
    file = embedded_path(resolved)
    if file and not create and not file.exists():
        raise TrackingError(
            f"there is no tracking store at {file}; go to the sweep's folder or name --tracking-uri / "
            "MLFLOW_TRACKING_URI."
        )
    try:
        client = MlflowClient(tracking_uri=resolved)
        client.search_experiments(max_results=1)
    except Exception as err:  # MLflow and its database drivers raise almost anything
        raise TrackingError(
            f"the tracking server must answer, got no answer from {masked(resolved)} (--tracking-uri or "
            f"MLFLOW_TRACKING_URI; {type(err).__name__}). Start it with python -m tracking.server, or unset the URI "
            "for an embedded store."
        ) from err
    return client


def embedded_path(uri: str) -> Path | None:
    """The file of an embedded SQLite store, or None for a server."""
    match = re.fullmatch(r"sqlite:///(/.+)", uri)
    return Path(match[1]) if match else None
