"""Eight processes log to one server at once, and every row is there. ``pytest -m slow``"""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from . import postgres
from .one_of_many import EPOCHS, METRICS, TRIALS, value
from .stores import embedded, free_port, server

pytestmark = pytest.mark.slow

PROCESSES = 8


@pytest.fixture(params=["sqlite", "postgresql"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield embedded(tmp_path)
        return
    if not postgres.installed():
        pytest.skip("PostgreSQL is not installed (initdb, postgres)")
    with postgres.postgres() as uri:
        yield uri


def test_eight_processes_at_once_lose_no_row(tmp_path: Path, backend: str) -> None:
    names = [f"s-{number}" for number in range(PROCESSES)]
    with server(tmp_path, free_port(), backend) as uri:
        line = [sys.executable, "-m", "tests.tracking.one_of_many", str(tmp_path), uri]
        logs = [open(tmp_path / f"{name}.log", "wb") for name in names]  # noqa: SIM115
        several = [
            subprocess.Popen([*line, name], stdout=log, stderr=log) for name, log in zip(names, logs, strict=True)
        ]
        deadline = time.monotonic() + 240
        while not all((tmp_path / f"{name}.ready").exists() for name in names) and time.monotonic() < deadline:
            time.sleep(0.1)
        (tmp_path / "go").touch()
        statuses = [process.wait(timeout=300) for process in several]
        for log in logs:
            log.close()
    said = "".join((tmp_path / f"{name}.log").read_text() for name in names)
    assert statuses == [0] * PROCESSES, said
    assert "tracking waits" not in said, said

    with create_engine(backend).connect() as database:
        rows = database.execute(text("SELECT run_uuid, key, step, value FROM metrics")).fetchall()
        runs = database.execute(text("SELECT run_uuid, name, status FROM runs")).fetchall()
        params = database.execute(text("SELECT count(*) FROM params")).scalar_one()
    assert len(rows) == PROCESSES * TRIALS * EPOCHS * METRICS
    assert len(runs) == PROCESSES * (TRIALS + 1)
    assert {status for *_, status in runs} == {"FINISHED"}
    assert params == PROCESSES * (1 + 2 * TRIALS)
    trial_of = {run: (name, int(name[-3:])) for run, name, _ in runs if len(name) > 5}
    found = {(trial_of[run][0], key, step): number for run, key, step, number in rows}
    assert found == {
        (f"{name}-{trial:03d}", f"metric_{number}", epoch): value(trial, epoch, number)
        for name in names
        for trial in range(TRIALS)
        for epoch in range(1, EPOCHS + 1)
        for number in range(METRICS)
    }
