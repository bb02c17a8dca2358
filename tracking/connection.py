"""Where the MLflow store is, and a client that has been seen to answer."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# A client that meets a sleeping server must come back soon: the spool keeps what it could not send.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from qafe.errors import TrackingError
from qafe.filesystem import check_database

EMBEDDED_FILE = "mlflow.db"
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")
"""What MLflow takes as a tracking store, and this project with it."""
for name in ("mlflow", "alembic"):  # they announce every step of a first migration
    logging.getLogger(name).setLevel(logging.WARNING)


def resolve_uri(uri: str | None = None) -> str:
    """The tracking URI to use, absolute so that it means the same in every process, and without a password.

    In this order: the argument, ``MLFLOW_TRACKING_URI``, MLflow's own default (``mlflow.db`` in this folder).
    An account in the URI goes into this process's environment, where MLflow (``MLFLOW_TRACKING_USERNAME``,
    ``MLFLOW_TRACKING_PASSWORD``) and PostgreSQL (``PGPASSWORD``) look for it: what later quotes the URI, in a log, a
    file or a list of processes, cannot show it.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{EMBEDDED_FILE}"
    if uri.startswith(("http://", "https://")):
        return _without_account(uri)
    if uri.startswith("postgresql"):
        return _without_password(uri)
    match = re.fullmatch(r"sqlite:///(?!/)(.+)", uri)
    return f"sqlite:////{str(Path(match[1]).resolve()).lstrip('/')}" if match else uri


def _without_account(uri: str) -> str:
    account, _, rest = uri.partition("://")[2].rpartition("@") if "@" in urlsplit(uri).netloc else ("", "", "")
    if not rest:
        return uri
    name, _, password = account.partition(":")
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(name)
    if password:
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(password)
    return f"{uri.partition('://')[0]}://{rest}"


def _without_password(uri: str) -> str:
    try:
        url = make_url(uri)
    except (ArgumentError, ValueError):
        return uri
    password = url.query.get("password", url.password)
    if password:
        os.environ["PGPASSWORD"] = str(password)
    return url._replace(password=None).difference_update_query(["password"]).render_as_string(hide_password=False)


def masked(words: str) -> str:
    """A URI, or what somebody said about one, without passwords."""
    words = re.sub(r"(://[^:/@\s]*):[^/\s]*@", r"\1:***@", words)
    return re.sub(r"(?i)([?&\s](?:ssl)?password=)[^&\s]+", r"\1***", words)


def connect(uri: str | None = None, *, create: bool = True) -> MlflowClient:
    """A client of a store that answers.

    Args:
        create: make an embedded store that does not exist; without it that is an error.
    Raises:
        TrackingError: nothing answers at the URI, it is not one that MLflow knows, the account is not one that the
            server knows, or the store is of another MLflow and cannot be migrated now.
        ConfigError: a SQLite file to write to is on a network file system.
    """
    from . import database, migrate  # late: they need what stands above

    resolved = resolve_uri(uri)
    file = embedded_path(resolved)
    if file and not create and not file.exists():
        raise TrackingError(
            f"there is no tracking store at {file}; go to the sweep's folder or name --tracking-uri / "
            "MLFLOW_TRACKING_URI."
        )
    if create:  # who only reads may take what is there to another place
        check_place(resolved, "--tracking-uri or MLFLOW_TRACKING_URI")
    if resolved.startswith(("sqlite:", "postgresql")):
        migrate.prepare(database.Database(resolved))
    try:
        client = MlflowClient(tracking_uri=resolved)
        client.search_experiments(max_results=1)
    except Exception as err:  # MLflow and its database drivers raise almost anything
        if isinstance(err, MlflowException) and (refusal := refused(err, resolved)):
            raise refusal from err
        if missing := _missing_module(err):
            raise TrackingError(
                f"the tracking store {masked(resolved)} needs a Python module that is not installed: {missing} "
                "(--tracking-uri or MLFLOW_TRACKING_URI). Install the package that has it, or unset the URI for an "
                "embedded store."
            ) from err
        if resolved.partition(":")[0].partition("+")[0] not in SCHEMES:
            raise TrackingError(
                f"a tracking store is {', '.join(SCHEMES)}, got {masked(resolved)} (--tracking-uri or "
                "MLFLOW_TRACKING_URI). Correct it, or unset it for an embedded store."
            ) from err
        raise TrackingError(
            f"the tracking server must answer, got no answer from {masked(resolved)} (--tracking-uri or "
            f"MLFLOW_TRACKING_URI; {type(err).__name__}). Start it with python -m tracking.server, or unset the URI "
            "for an embedded store."
        ) from err
    return client


def _missing_module(err: BaseException | None) -> str:
    """The module whose absence has led to an error; empty if none has."""
    while err is not None:
        if isinstance(err, ImportError) and err.name:
            return err.name
        err = err.__cause__ or err.__context__
    return ""


def refused(err: MlflowException, uri: str | None = None) -> TrackingError | None:
    """What a server's 401, 403 or 429 means, in one line; None for any other error."""
    status = err.get_http_status_code()
    if "too many 429 error responses" in str(err):
        return TrackingError(
            f"the tracking server must get the right password, {masked(resolve_uri(uri))} got too many wrong ones from "
            "this machine (429). Correct MLFLOW_TRACKING_PASSWORD and wait a minute."
        )
    if status not in (401, 403):
        return None
    account = os.environ.get("MLFLOW_TRACKING_USERNAME") or "no account or that of ~/.mlflow/credentials"
    place = masked(resolve_uri(uri))
    if status == 401:
        return TrackingError(
            f"the tracking server must know name and password, {place} refused {account} (401). Set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or write ~/.mlflow/credentials."
        )
    if "Invalid Host header" in str(err):
        return TrackingError(
            f"the tracking server answers only to names that it was told, {place} is none of them (403). "
            "Add the name to its --allowed-hosts."
        )
    return TrackingError(
        f"this needs a permission that {account} does not have on {place} (403). Ask its administrator for it "
        "(python -m tracking.server user grant)."
    )


def check_place(uri: str, flag: str) -> None:
    """Refuses a SQLite database that is not on a disk of this machine; any other URI is fine.

    Raises:
        ConfigError: it is on a network file system.
    """
    if match := re.fullmatch(r"sqlite(?:\+\w+)?:///(?!:memory:|file:)([^?]+).*", uri):
        check_database(Path(match[1]), flag)


def embedded_path(uri: str) -> Path | None:
    """The file of an embedded SQLite store, or None for a server."""
    match = re.fullmatch(r"sqlite:///(/.+)", uri)
    return Path(match[1]) if match else None
