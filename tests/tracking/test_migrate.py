"""Migrations of real stores: an older schema, made by MLflow's own scripts."""

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy
from alembic import command
from mlflow.store.db import utils as mlflow_database
from mlflow.store.tracking.dbmodels.initial_models import Base as FirstTables

from qafe.errors import TrackingError
from tracking import migrate
from tracking.connection import connect
from tracking.database import Database
from tracking.migrate import ACCOUNTS, TRACKING, prepare, revisions

from .stores import embedded

STEPS_BACK = 12


def older_store(uri: str) -> str:
    """Makes a store of some months ago with an experiment and runs; returns its revision."""
    revision = revisions(TRACKING)[STEPS_BACK]
    engine = sqlalchemy.create_engine(uri)
    FirstTables.metadata.create_all(engine)
    config = mlflow_database._get_alembic_config(uri)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("INSERT INTO experiments (experiment_id, name, lifecycle_stage) VALUES (7, 'old', 'active')"))  # fmt: skip  # noqa: E501
        for number in range(3):
            connection.execute(sqlalchemy.text("INSERT INTO runs (run_uuid, name, status, lifecycle_stage, experiment_id, artifact_uri, user_id, source_type, start_time) VALUES (:run, :run, 'FINISHED', 'active', 7, '/tmp', 'ana', 'LOCAL', 1)"), {"run": f"{number:032x}"})  # fmt: skip  # noqa: E501
    engine.dispose()
    return revision


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    older_store(embedded(folder))
    return folder / "mlflow.db"


@pytest.fixture
def old(first: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(first, tmp_path / "mlflow.db"))


def test_an_older_store_is_migrated_and_the_old_one_kept(old: Path) -> None:
    before = old.read_bytes()
    client = connect(embedded(old.parent))
    assert "old" in {experiment.name for experiment in client.search_experiments()}
    assert {run.info.run_name for run in client.search_runs(["7"])} == {f"{number:032x}" for number in range(3)}
    assert Database(embedded(old.parent)).revision("alembic_version") == revisions(TRACKING)[0]
    kept = old.with_name(f"mlflow.db.{revisions(TRACKING)[STEPS_BACK]}.old")
    assert kept.read_bytes() == before
    assert set(old.parent.iterdir()) == {old, kept}


def test_a_migration_that_fails_leaves_the_store_as_it_was(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = old.read_bytes()
    original = mlflow_database._upgrade_db

    def breaks_at_the_end(engine: sqlalchemy.Engine) -> None:
        original(engine)
        raise RuntimeError("the disk is full, says http://ana:geheim@host")

    monkeypatch.setattr(mlflow_database, "_upgrade_db", breaks_at_the_end)
    with pytest.raises(TrackingError, match="got RuntimeError: the disk is full, says http://ana:\\*\\*\\*@host"):
        prepare(Database(embedded(old.parent)))
    assert old.read_bytes() == before
    assert list(old.parent.iterdir()) == [old]


def test_a_migration_that_loses_rows_is_not_taken(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = old.read_bytes()
    original = mlflow_database._upgrade_db

    def loses_a_run(engine: sqlalchemy.Engine) -> None:
        original(engine)
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("DELETE FROM runs WHERE run_uuid LIKE '%2'"))

    monkeypatch.setattr(mlflow_database, "_upgrade_db", loses_a_run)
    with pytest.raises(TrackingError, match=r"lost some \(rows before, after: {'runs': \(3, 2\)}\)"):
        prepare(Database(embedded(old.parent)))
    assert old.read_bytes() == before


def test_killed_in_the_middle_it_is_the_old_store_and_then_migrates(old: Path) -> None:
    before = old.read_bytes()
    code = (
        "import os, sys; from mlflow.store.db import utils; from tracking import migrate; "
        "from tracking.database import Database\n"
        "original = utils._upgrade_db\n"
        "def dies(engine): original(engine); os._exit(9)\n"
        "utils._upgrade_db = dies\n"
        "migrate.prepare(Database(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, embedded(old.parent)], check=False, capture_output=True)
    assert done.returncode == 9, done.stderr
    assert old.read_bytes() == before
    assert (old.parent / ".mlflow.db.unfinished").exists()
    assert prepare(Database(embedded(old.parent))) is not None
    assert not (old.parent / ".mlflow.db.unfinished").exists()


def test_a_store_in_use_is_not_migrated(old: Path) -> None:
    holds = "import sqlite3, sys; held = sqlite3.connect(sys.argv[1]); held.execute('SELECT 1 FROM runs'); print(1, flush=True); input()"  # noqa: E501
    user = subprocess.Popen(
        [sys.executable, "-c", holds, str(old)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert user.stdout is not None
        user.stdout.readline()
        with pytest.raises(TrackingError, match=f"is open in process {user.pid}"):
            prepare(Database(embedded(old.parent)))
    finally:
        user.communicate("\n", timeout=30)
    prepare(Database(embedded(old.parent)))


def test_a_newer_store_and_a_foreign_one_are_refused(tmp_path: Path) -> None:
    connect(embedded(tmp_path))
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    with pytest.raises(TrackingError, match=r"has revision ffffffffffff, which MLflow .* does not know"):
        connect(embedded(tmp_path))
    other = tmp_path / "other"
    other.mkdir()
    with closing(sqlite3.connect(other / "mlflow.db")) as database, database:
        database.execute("CREATE TABLE patients (name TEXT)")
    with pytest.raises(TrackingError, match=r"has other tables \(patients\)"):
        connect(embedded(other))
    (other / "mlflow.db").write_bytes(b"not a database at all, but long enough to be looked at" * 40)
    with pytest.raises(TrackingError, match="file is not a database"):
        connect(embedded(other))


def test_a_new_store_is_made_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(engine: sqlalchemy.Engine) -> None:
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(mlflow_database, "_upgrade_db", breaks)
        with pytest.raises(TrackingError):
            prepare(Database(embedded(tmp_path)))
    assert list(tmp_path.iterdir()) == []
    assert prepare(Database(embedded(tmp_path))) is None
    assert prepare(Database(f"sqlite:///{tmp_path}/accounts.db"), ACCOUNTS) is None
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "accounts.db"}


@pytest.mark.slow
def test_two_that_start_at_once_make_one_store(tmp_path: Path) -> None:
    code = "import sys; from tracking.connection import connect; print(len(connect(sys.argv[1]).search_experiments()))"
    line = [sys.executable, "-c", code, embedded(tmp_path)]
    both = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0] for process in both] == ["1\n", "1\n"]
    assert migrate.revisions(TRACKING)[0] == Database(embedded(tmp_path)).revision("alembic_version")
