"""Migration, backup, restore and gc over a real PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import sqlalchemy
from mlflow.store.db import utils as mlflow_database

from qafe.errors import TrackingError
from tracking.connection import connect, resolve_uri
from tracking.database import Database
from tracking.migrate import TRACKING, prepare, revisions
from tracking.server import main

from . import postgres
from .test_migrate import STEPS_BACK, older_store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    if not postgres.installed():
        pytest.skip("PostgreSQL is not installed (initdb, postgres)")
    with postgres.postgres() as uri:
        yield uri
        with psycopg.connect(uri, autocommit=True) as connection:  # clients of tests: it waits for them otherwise
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
                               "AND backend_type = 'client backend'")  # fmt: skip


@pytest.fixture
def empty(cluster: str, request: pytest.FixtureRequest) -> str:
    """The URI of a new empty database."""
    name = f"t{abs(hash(request.node.name)) % 10**8}"
    with psycopg.connect(cluster, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return cluster.rpartition("/")[0] + f"/{name}"


def databases(uri: str) -> set[str]:
    with psycopg.connect(uri) as connection:
        return {row[0] for row in connection.execute("SELECT datname FROM pg_database")}


def test_a_migration_is_tried_on_a_copy(empty: str) -> None:
    older_store(empty)
    before = databases(empty)
    prepare(Database(empty))
    assert Database(empty).revision("alembic_version") == revisions(TRACKING)[0]
    assert Database(empty).counts(("runs",)) == {"runs": 3}
    assert databases(empty) == before
    assert "old" in {experiment.name for experiment in connect(empty).search_experiments()}


def test_one_that_fails_on_the_copy_never_reaches_the_store(empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    older_store(empty)
    original, tried = mlflow_database._upgrade_db, []

    def breaks_at_the_end(engine: sqlalchemy.Engine) -> None:
        tried.append(str(engine.url.database))
        original(engine)
        raise RuntimeError

    monkeypatch.setattr(mlflow_database, "_upgrade_db", breaks_at_the_end)
    before = databases(empty)
    with pytest.raises(TrackingError, match="got RuntimeError"):
        prepare(Database(empty))
    assert tried == [empty.rpartition("/")[2] + "_migration_test"]
    assert Database(empty).revision("alembic_version") == revisions(TRACKING)[STEPS_BACK]
    assert databases(empty) == before


def test_one_that_fails_in_the_store_itself_is_undone(empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts run in one transaction: cut short, as by a full disk, none of them has happened."""
    older_store(empty)
    tables = Database(empty).tables()
    original = mlflow_database._upgrade_db

    def breaks_in_the_middle(engine: sqlalchemy.Engine) -> None:
        statements = []

        def count(*event: object) -> None:
            statements.append(event)
            if len(statements) > 60:
                raise RuntimeError("the disk is full")

        if str(engine.url.database).endswith("_migration_test"):
            original(engine)
            return
        sqlalchemy.event.listen(engine, "before_cursor_execute", count)
        original(engine)

    monkeypatch.setattr(mlflow_database, "_upgrade_db", breaks_in_the_middle)
    with pytest.raises(TrackingError, match="the disk is full"):
        prepare(Database(empty))
    assert Database(empty).revision("alembic_version") == revisions(TRACKING)[STEPS_BACK]
    assert Database(empty).tables() == tables
    monkeypatch.undo()
    prepare(Database(empty))
    assert Database(empty).revision("alembic_version") == revisions(TRACKING)[0]


def test_a_store_in_use_is_not_migrated(empty: str) -> None:
    older_store(empty)
    with psycopg.connect(empty), pytest.raises(TrackingError, match="being accessed by other users"):
        prepare(Database(empty))


def test_a_backup_returns_into_an_empty_database(
    empty: str, cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = connect(empty)
    experiment = client.create_experiment("fusion", artifact_location=(tmp_path / "elsewhere" / "fusion").as_uri())
    run = client.create_run(experiment).info
    client.log_text(run.run_id, "weights", "model/weights.txt")
    client.create_registered_model("qafe-net")
    client.create_model_version("qafe-net", f"{run.artifact_uri}/model", run.run_id)
    client.set_registered_model_alias("qafe-net", "champion", "1")
    flags = ["--backend", empty, "--home", str(tmp_path / "home"), "--artifacts", str(tmp_path / "artifacts")]
    assert main(["backup", *flags, str(tmp_path / "backup")]) == 0

    assert main(["restore", str(tmp_path / "backup"), str(tmp_path / "new"), "--backend", empty]) == 2
    assert "has tables" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    with psycopg.connect(cluster, autocommit=True) as connection:
        connection.execute("CREATE DATABASE restored")
    other = cluster.rpartition("/")[0] + "/restored"
    assert main(["restore", str(tmp_path / "backup"), str(tmp_path / "new"), "--backend", other]) == 0
    restored = connect(other)
    assert int(restored.get_model_version_by_alias("qafe-net", "champion").version) == 1
    (tmp_path / "elsewhere").rename(tmp_path / "gone")
    got = restored.download_artifacts(run.run_id, "model/weights.txt", str(tmp_path))
    assert Path(got).read_text() == "weights"
    assert str(tmp_path / "new") in restored.get_run(run.run_id).info.artifact_uri

    restored.delete_run(run.run_id)
    other_run = restored.create_run(experiment).info.run_id
    restored.log_text(other_run, "x", "x.txt")
    restored.delete_run(other_run)
    flags = ["--backend", other, "--home", str(tmp_path / "home"), "--artifacts", str(tmp_path / "artifacts")]
    assert main(["gc", *flags, "--older-than", "0", "--delete"]) == 0
    said = capsys.readouterr().out
    assert "stays: qafe-net 1 needs it" in said
    assert "1 of 2" in said
    assert restored.get_run(run.run_id).info.lifecycle_stage == "deleted"


def test_a_password_in_the_uri_reaches_the_server_by_the_environment(
    empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", "")  # set by what is tested: undone after the test
    uri = resolve_uri(empty.replace("qafe@", "qafe:a%40secret@"))
    assert uri == empty
    connect(uri)
