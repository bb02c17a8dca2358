"""The database of a store: what SQLite and PostgreSQL do differently, and a server needs of both."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import sqlalchemy
from sqlalchemy import Connection, Engine, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from qafe.errors import TrackingError

from .connection import EMBEDDED_FILE, embedded_path, masked, resolve_uri

HOME_FOLDER = "mlflow-server"
ARTIFACTS_FOLDER = "mlartifacts"
"""Beside a SQLite file, or in the current folder: the server's own folder, and that of proxied artifacts."""
PATIENCE_S = 20
"""How long SQLite waits for another writer; as MLflow does."""


@dataclass(frozen=True)
class Database:
    """A SQLite file or a PostgreSQL database.

    Args:
        uri: ``sqlite:////FILE`` or ``postgresql://...``, without a password (`connection.resolve_uri`).
    """

    uri: str

    @property
    def file(self) -> Path | None:
        """The file of a SQLite database."""
        return embedded_path(self.uri)

    @property
    def url(self) -> URL:
        """The URI in its parts."""
        return make_url(self.uri)

    @contextlib.contextmanager
    def engine(self, name: str | None = None) -> Iterator[Engine]:
        """An engine, or one of another database of the same server; its connections end with the block.

        Raises:
            TrackingError: the database does not answer, or refuses a statement.
        """
        try:
            engine = sqlalchemy.create_engine(self.url.set(database=name) if name else self.url, poolclass=NullPool)
        except ImportError as err:
            raise TrackingError(
                f"PostgreSQL needs psycopg, which is not installed ({masked(self.uri)}). "
                "pip install 'qafe-net[postgres]'."
            ) from err
        try:
            yield engine
        except SQLAlchemyError as err:
            cause = getattr(err, "orig", None) or err
            said = (str(cause).strip().splitlines() or [""])[0]
            raise TrackingError(
                f"the database must answer and allow this, {masked(self.uri)} says: {type(cause).__name__}: "
                f"{masked(said)} (--backend). Check that it runs, its name, the account and its rights."
            ) from err
        finally:
            engine.dispose()

    def tables(self) -> set[str]:
        """Names of the tables there are; a SQLite file that does not exist has none."""
        if self.file and not self.file.exists():
            return set()
        with self.engine() as engine:
            return set(sqlalchemy.inspect(engine).get_table_names())

    def revision(self, version_table: str) -> str | None:
        """The schema's revision, as alembic noted it; None where it has not."""
        if version_table not in self.tables():
            return None
        with self.engine() as engine, engine.connect() as connection:
            row = connection.execute(text(f"SELECT version_num FROM {version_table}")).first()
        return str(row[0]) if row else None

    def counts(self, tables: tuple[str, ...]) -> dict[str, int]:
        """Rows of those tables that there are."""
        known = self.tables()
        if not known:  # a connection would make the file
            return {}
        with self.engine() as engine, engine.connect() as connection:
            return {name: _count(connection, name) for name in tables if name in known}

    def size_bytes(self) -> int:
        """What it takes on disk."""
        if self.file:
            return self.file.stat().st_size if self.file.exists() else 0
        with self.engine() as engine, engine.connect() as connection:
            return int(connection.execute(text("SELECT pg_database_size(current_database())")).scalar_one())

    def dump(self, target: Path) -> None:
        """Writes the state of one moment, while others go on writing, to a file: SQLite's backup or pg_dump's.

        Raises:
            TrackingError: the copy is damaged, or pg_dump fails.
        """
        if self.file:
            copy_sqlite(self.file, target)
        else:
            self._run_tool("pg_dump", "--format=custom", "--no-owner", "--no-privileges", f"--file={target}")

    def load(self, source: Path) -> None:
        """Fills an empty database with what `dump` wrote; all of it or nothing."""
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, self.file)
            self.file.chmod(0o600)
        else:
            options = ("--single-transaction", "--exit-on-error", "--no-owner", "--no-privileges")
            self._run_tool("pg_restore", *options, str(source))

    def _run_tool(self, tool: str, *arguments: str) -> None:
        """Runs one of PostgreSQL's programs; the password goes by PGPASSWORD or ~/.pgpass, which it reads itself."""
        if shutil.which(tool) is None:
            raise TrackingError(f"a PostgreSQL store is copied by {tool}, which is not installed. Install PostgreSQL's client programs.")  # fmt: skip  # noqa: E501
        address = self.url.set(drivername="postgresql").render_as_string()
        done = subprocess.run([tool, f"--dbname={address}", *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
            raise TrackingError(
                f"{tool} must succeed, for {masked(self.uri)} it says: {masked(said)} (--backend). "
                "Its version must be the server's or newer."
            )


def named(backend: str | None) -> Database:
    """The database that ``--backend`` names; without it ``MLFLOW_BACKEND_STORE_URI`` or the sweeps' own file here.

    Raises:
        TrackingError: it is neither SQLite nor PostgreSQL.
    """
    uri = resolve_uri(backend or os.environ.get("MLFLOW_BACKEND_STORE_URI") or f"sqlite:///{EMBEDDED_FILE}")
    try:
        kind = make_url(uri).get_backend_name()
    except ArgumentError:
        kind = ""
    if not (kind == "postgresql" or (kind == "sqlite" and embedded_path(uri))):
        raise TrackingError(
            f"the server keeps its data in a database, got {masked(uri)} (--backend). "
            "Name sqlite:///FILE or postgresql://..."
        )
    return Database(uri)


def copy_sqlite(source: Path, target: Path) -> None:
    """Copies a SQLite database as it is at one moment; others may go on writing to it.

    Raises:
        TrackingError: the copy does not pass SQLite's own check.
    """
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        with (
            contextlib.closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True, timeout=PATIENCE_S)) as old,
            contextlib.closing(sqlite3.connect(target)) as new,
        ):
            old.backup(new)  # in one step: in many, a busy writer would start it again and again
            verdict = new.execute("PRAGMA integrity_check").fetchone()[0]
    except sqlite3.Error as err:
        verdict = str(err)
    if verdict != "ok":
        raise TrackingError(f"a database must be whole to be copied, {source} is not ({verdict}). Restore its backup.")


def users_of(file: Path) -> list[int]:
    """Processes, other than this one, that have a file open; those of other accounts cannot be seen."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and any(opened.path == str(file) for opened in process.open_files()):
                found.append(process.pid)
    return found


def _count(connection: Connection, table: str) -> int:
    return int(connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one())
