"""Brings a store's schema to that of the installed MLflow, on a copy first: never half-migrated.

MLflow itself migrates in place when a table is missing, and asks for a backup first. Here a SQLite file is copied, the
copy migrated and checked, and then put in the place of the old one, which stays beside it. A PostgreSQL database is
migrated as a scratch copy, then in one transaction.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
from alembic.config import Config
from alembic.script import ScriptDirectory
from mlflow.store.db import utils as mlflow_database
from mlflow.store.tracking.dbmodels.initial_models import Base as FirstTables
from sqlalchemy import Engine, text

from qafe.errors import TrackingError

from .connection import masked
from .database import PATIENCE_S, Database, copy_sqlite, users_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schema:
    """One of the two schemas that a server has.

    Args:
        name: what it holds.
        scripts: folder of alembic's scripts, in MLflow's package.
        version_table: where alembic notes the revision.
        kept_tables: tables whose rows a migration must leave in number.
        first_tables: tables that an unfinished creation may have left.
        upgrade: migrates an engine's database to the newest revision; also an empty one.
    """

    name: str
    scripts: str
    version_table: str
    kept_tables: tuple[str, ...]
    first_tables: frozenset[str]
    upgrade: Callable[[Engine], None]


def _upgrade_tracking(engine: Engine) -> None:
    if mlflow_database._get_schema_version(engine) is None:
        mlflow_database._initialize_tables(engine)
    else:
        mlflow_database._upgrade_db(engine)


def _upgrade_accounts(engine: Engine) -> None:
    from mlflow.server.auth.db.utils import migrate  # takes seconds to import, and only servers with accounts need it

    migrate(engine, "head")


TRACKING = Schema(
    name="tracking store",
    scripts="store/db_migrations",
    version_table="alembic_version",
    kept_tables=("experiments", "runs", "params", "metrics", "tags", "registered_models", "model_versions"),
    first_tables=frozenset(FirstTables.metadata.tables),
    upgrade=_upgrade_tracking,
)
ACCOUNTS = Schema(
    name="accounts",
    scripts="server/auth/db/migrations",
    version_table="alembic_version_auth",
    kept_tables=("users",),
    first_tables=frozenset({"users", "experiment_permissions", "registered_model_permissions"}),
    upgrade=_upgrade_accounts,
)


@functools.cache
def revisions(schema: Schema) -> tuple[str, ...]:
    """The revisions that the installed MLflow knows, the newest first."""
    config = Config()
    config.set_main_option("script_location", str(Path(mlflow.__file__).parent / schema.scripts))
    return tuple(script.revision for script in ScriptDirectory.from_config(config).walk_revisions())


def prepare(database: Database, schema: Schema = TRACKING) -> Path | None:
    """Makes or migrates a schema where that is needed; returns the file that keeps the old one, if one does.

    Raises:
        TrackingError: a newer MLflow wrote it, it is something else, it is in use, or the migration failed; it is then
            as it was.
    """
    if _is_current(database, schema):
        return None
    if database.file is None:
        _prepare_postgresql(database, schema)
        return None
    try:
        database.file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise TrackingError(
            f"the folder of a store must be there or be made, {database.file.parent} cannot be ({err.strerror}) "
            "(--backend, --tracking-uri or MLFLOW_TRACKING_URI). Name another one."
        ) from err
    with _locked(database.file.parent):
        if _is_current(database, schema):  # another process was first
            return None
        return _prepare_sqlite(database.file, schema)


def _is_current(database: Database, schema: Schema) -> bool:
    revision = database.revision(schema.version_table)
    known = revisions(schema)
    if revision is None:
        foreign = database.tables() - schema.first_tables - {schema.version_table}
        if foreign:
            raise TrackingError(
                f"a database must be MLflow's or empty, {masked(database.uri)} has other tables "
                f"({', '.join(sorted(foreign)[:3])}) (--backend). Name another one."
            )
    elif revision not in known:
        raise TrackingError(
            f"a store is read by the MLflow that wrote it or a newer one, the {schema.name} {masked(database.uri)} has "
            f"revision {revision}, which MLflow {mlflow.__version__} does not know. Install the newer MLflow again."
        )
    return revision == known[0]


def _prepare_sqlite(file: Path, schema: Schema) -> Path | None:
    database = Database(f"sqlite:///{file}")
    copy = Database(f"sqlite:///{file.with_name(f'.{file.name}.unfinished')}")
    assert copy.file is not None
    copy.file.unlink(missing_ok=True)
    old = database.revision(schema.version_table)
    kept = None
    if users := users_of(file):
        raise TrackingError(
            f"a store is migrated while nobody uses it, {file} is open in process {', '.join(map(str, users))}. "
            "End it (python -m tracking.server stop), then start again."
        )
    try:
        with _write_locked(file):
            if database.tables():
                copy_sqlite(file, copy.file)
                kept = file.with_name(f"{file.name}.{old or 'first'}.old")
                logger.warning("migrating a copy of the %s %s; the old one stays as %s", schema.name, file, kept.name)
            _upgrade(copy, schema, database.counts(schema.kept_tables))
            copy.file.chmod(0o600 if schema is ACCOUNTS else 0o644)
            with open(copy.file, "rb") as written:
                os.fsync(written.fileno())
            if kept:
                kept.unlink(missing_ok=True)
                os.link(file, kept)
            os.replace(copy.file, file)
    finally:
        copy.file.unlink(missing_ok=True)
    return kept


def _prepare_postgresql(database: Database, schema: Schema) -> None:
    name = database.url.database
    if database.revision(schema.version_table) is not None:
        scratch = f"{name}_migration_test"
        with database.engine("postgres") as engine, engine.connect() as connection:
            connection = connection.execution_options(isolation_level="AUTOCOMMIT")
            quoted = engine.dialect.identifier_preparer.quote
            # PostgreSQL refuses while anybody is connected to the original: then nobody may write to it either.
            connection.execute(text(f"CREATE DATABASE {quoted(scratch)} TEMPLATE {quoted(str(name))}"))
            logger.warning("migrating a copy of %s first", masked(database.uri))
            try:
                copy = Database(database.url.set(database=scratch).render_as_string(hide_password=False))
                _upgrade(copy, schema, database.counts(schema.kept_tables))
            finally:
                connection.execute(text(f"DROP DATABASE {quoted(scratch)} WITH (FORCE)"))
    _upgrade(database, schema, database.counts(schema.kept_tables))


def _upgrade(database: Database, schema: Schema, before: dict[str, int]) -> None:
    """Migrates and checks: the newest revision, and the rows that there were.

    A creation may add a row, such as the experiment Default; nothing may lose one.
    """
    try:
        with database.engine() as engine, _quiet():
            schema.upgrade(engine)
    except TrackingError:
        raise
    except Exception as err:  # alembic's scripts raise almost anything
        raise TrackingError(
            f"the migration of the {schema.name} must succeed on a copy first, got {type(err).__name__}: "
            f"{masked(str(err))[:200]} (--backend). The store is as it was; install the MLflow that wrote it."
        ) from err
    lost = {
        table: (rows, now) for table, rows in before.items() if (now := database.counts((table,)).get(table, 0)) < rows
    }
    if lost or database.revision(schema.version_table) != revisions(schema)[0]:
        raise TrackingError(
            f"a migration keeps every row, of the {schema.name} {masked(database.uri)} it lost some (rows before, "
            f"after: {lost}). The store is as it was; install the MLflow that wrote it."
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """alembic tells every step; and the configuration file of its scripts may switch other loggers off."""
    alembic = logging.getLogger("alembic")
    level = alembic.level
    alembic.setLevel(logging.WARNING)
    try:
        yield
    finally:
        alembic.setLevel(level)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One migration at a time below a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _write_locked(file: Path) -> Iterator[None]:
    """Keeps writers of a SQLite file away; one that does not exist has none."""
    if not file.exists():
        yield
        return
    with contextlib.closing(sqlite3.connect(file, timeout=PATIENCE_S, isolation_level=None)) as lock:
        lock.execute("BEGIN IMMEDIATE")
        yield
