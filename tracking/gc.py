"""Removes for good what was deleted in MLflow, but nothing that a registered version needs.

``mlflow gc`` asks neither the registry nor what else belongs to a run, and leaves a removed run's models behind. Here a
deleted run is kept while a version comes from it, from one of its models or from a trial of its sweep; with a run go
the models that it logged, which no version is of.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import LifecycleStage
from mlflow.entities.model_registry.model_version_stages import STAGE_DELETED_INTERNAL
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from sqlalchemy import Connection, text

from qafe.errors import TrackingError

from .backup import folder_bytes, local_folder, no_gc, readable
from .database import Database
from .migrate import prepare

PROXIED = "mlflow-artifacts:"
GRACE_DAYS = 30.0
DAY_MS = 24 * 3600 * 1000


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """Something deleted: a run, a model that a run logged, or an experiment.

    Args:
        kind: which of them.
        key: its id.
        name: its name.
        location: where its artifacts lie, as an address of this machine or of S3.
        size: bytes of them, where they lie in a folder.
        needed_by: the registered version that needs it; it stays then.
    """

    kind: str
    key: str
    name: str
    location: str
    size: int
    needed_by: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``python -m tracking.server gc``."""
    parser.add_argument("--older-than", type=float, default=GRACE_DAYS, metavar="DAYS",
                        help="keep what was deleted more recently (default: %(default)g)")  # fmt: skip
    parser.add_argument("--delete", action="store_true", help="do it; without it the command only says what would go")
    parser.add_argument("--json", action="store_true")


def run_command(options: argparse.Namespace, database: Database, artifacts: str, home: Path) -> int:
    """Says what would go, or removes it.

    Raises:
        TrackingError: there is no store, or it is of another MLflow.
    """
    if not database.tables():
        raise TrackingError(f"gc cleans a store, there is none at {database.uri} (--backend). Name it.")
    prepare(database)
    with no_gc(home):
        found = list(leftovers(database, artifacts, options.older_than))
        going = [one for one in found if not one.needed_by]
        if options.delete:
            store = SqlAlchemyStore(database.uri, PROXIED)
            for one in going:
                remove(store, one)
    if options.json:
        print(json.dumps({"deleted": options.delete, "leftovers": [asdict(one) for one in found]}, indent=2))
        return 0
    for one in found:
        end = f"stays: {one.needed_by} needs it" if one.needed_by else readable(one.size)
        print(f"{one.kind:10}  {one.key:34}  {one.name:30}  {end}")
    word = "removed" if options.delete else "would go (--delete removes it)"
    print(f"{len(going)} of {len(found)}, {readable(sum(one.size for one in going))}: {word}")
    return 0


def leftovers(database: Database, artifacts: str, older_than_days: float = 0.0) -> Iterator[Leftover]:
    """What was deleted that long ago: runs, then models, then experiments of which nothing stays.

    Args:
        artifacts: the folder or S3 address behind the server's ``mlflow-artifacts:``.
    """
    limit = int(time.time() * 1000 - older_than_days * DAY_MS)
    with database.engine() as engine, engine.connect() as connection:
        runs, models = _needed(connection)
        gone = _rows(connection, "SELECT experiment_id, name, artifact_location FROM experiments WHERE lifecycle_stage "
                     "= 'deleted' AND last_update_time <= :limit", limit=limit)  # fmt: skip
        whole = {row["experiment_id"] for row in gone}
        going: set[str] = set()
        stays: dict[int, str] = {}
        for row in _rows(connection, "SELECT run_uuid, name, artifact_uri, experiment_id, lifecycle_stage, "
                         "deleted_time FROM runs ORDER BY start_time"):  # fmt: skip
            deleted = row["lifecycle_stage"] == LifecycleStage.DELETED and (row["deleted_time"] or 0) <= limit
            if not deleted and row["experiment_id"] not in whole:
                continue
            needed = runs.get(row["run_uuid"], "")
            if needed or not deleted:  # a run of a deleted experiment that was deleted later waits for its own time
                stays.setdefault(row["experiment_id"], needed)
            else:
                going.add(row["run_uuid"])
            if deleted:
                yield _leftover("run", row["run_uuid"], row["name"], row["artifact_uri"], artifacts, needed)
        for row in _rows(connection, "SELECT model_id, name, artifact_location, experiment_id, source_run_id, "
                         "lifecycle_stage, last_updated_timestamp_ms AS changed FROM logged_models"):  # fmt: skip
            deleted = row["lifecycle_stage"] == LifecycleStage.DELETED and row["changed"] <= limit
            if not (deleted or row["source_run_id"] in going or row["experiment_id"] in whole):
                continue
            needed = models.get(row["model_id"], "")
            if needed:
                stays.setdefault(row["experiment_id"], needed)
            yield _leftover("model", row["model_id"], row["name"], row["artifact_location"], artifacts, needed)
        for row in gone:
            key = row["experiment_id"]
            if key not in stays:
                yield _leftover("experiment", str(key), row["name"], row["artifact_location"], artifacts, "")
            elif stays[key]:
                yield _leftover("experiment", str(key), row["name"], row["artifact_location"], artifacts, stays[key])


def remove(store: SqlAlchemyStore, one: Leftover) -> None:
    """Removes its artifacts, then its rows: cut short, it is found again.

    Raises:
        TrackingError: its artifacts do not lie in a folder of its own.
    """
    if one.kind != "experiment" and one.key not in re.split(r"[/\\]", one.location):
        raise TrackingError(
            f"artifacts lie in a folder with the id of their {one.kind}, those of {one.key} lie at {one.location}. "
            "Look at it: nothing of it was removed."
        )
    folder = local_folder(one.location)
    if one.kind == "experiment":
        if folder and folder.is_dir() and not any(path.is_file() for path in folder.rglob("*")):
            shutil.rmtree(folder)
        store._hard_delete_experiment(one.key)
        return
    if folder is None:
        get_artifact_repository(one.location).delete_artifacts()
    elif (own := next((place for place in (folder, *folder.parents) if place.name == one.key), folder)).exists():
        shutil.rmtree(own)
    if one.kind == "run":
        store._hard_delete_run(one.key)
    else:
        store._hard_delete_logged_model(one.key)


def _needed(connection: Connection) -> tuple[dict[str, str], dict[str, str]]:
    """Runs and models that registered versions come from, each with the name of one version."""
    versions = [row for row in _rows(
        connection, "SELECT name, version, run_id, source, storage_location, current_stage FROM model_versions")
        if row["current_stage"] != STAGE_DELETED_INTERNAL]  # fmt: skip
    tags = _rows(connection, "SELECT name, version, value FROM model_version_tags WHERE key = 'trial_run'")
    models = _rows(connection, "SELECT model_id, artifact_location, source_run_id FROM logged_models")
    runs = _rows(connection, "SELECT run_uuid, artifact_uri FROM runs")
    parents = {row["run_uuid"]: row["value"] for row in _rows(
        connection, "SELECT run_uuid, value FROM tags WHERE key = 'mlflow.parentRunId'")}  # fmt: skip
    needed_models: dict[str, str] = {}
    labels = {(version["name"], version["version"]): f"{version['name']} {version['version']}" for version in versions}
    needed_runs = {str(row["value"]): labels[key] for row in tags if (key := (row["name"], row["version"])) in labels}
    for version in versions:
        label = labels[version["name"], version["version"]]
        places = [str(place) for place in (version["source"], version["storage_location"]) if place]
        if version["run_id"]:
            needed_runs.setdefault(version["run_id"], label)
        for model in models:
            inside = any(_within(place, model["artifact_location"]) for place in places)
            if inside or any(model["model_id"] in re.split(r"[:/]", place) for place in places):
                needed_models.setdefault(model["model_id"], label)
                if model["source_run_id"]:
                    needed_runs.setdefault(model["source_run_id"], label)
        for run in runs:
            if any(_within(place, run["artifact_uri"]) or run["run_uuid"] in re.split(r"[:/]", place) for place in places):  # fmt: skip  # noqa: E501
                needed_runs.setdefault(run["run_uuid"], label)
    for run, label in list(needed_runs.items()):
        while run := parents.get(run, ""):
            if run in needed_runs:
                break
            needed_runs[run] = label
    return needed_runs, needed_models


def _within(place: str, location: str) -> bool:
    return place == location or place.startswith(f"{location.rstrip('/')}/")


def _leftover(kind: str, key: str, name: Any, location: Any, artifacts: str, needed_by: str) -> Leftover:
    place = str(location or "")
    if place.startswith(PROXIED):
        inside = re.sub(r"^mlflow-artifacts:(//[^/]*)?/*", "", place)
        place = f"{artifacts.rstrip('/')}/{inside}"
    folder = local_folder(place)
    return Leftover(
        kind=kind,
        key=key,
        name=str(name or ""),
        location=place,
        size=folder_bytes(folder) if folder and kind != "experiment" else 0,
        needed_by=needed_by,
    )


def _rows(connection: Connection, query: str, **values: Any) -> list[Any]:
    return list(connection.execute(text(query), values).mappings().all())
