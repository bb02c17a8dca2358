"""Backups of a whole store, taken while it is used, and their return to an empty place.

A backup is a folder: ``backup.json`` (what it is of, with a SHA-256 digest of every file), the database, the accounts
and the artifacts. The database comes first, as it is at one moment; artifacts are only ever added (`gc` waits), so that
those of every row of that moment are found afterwards.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import mlflow
from sqlalchemy import text

from qafe import console
from qafe.errors import TrackingError

from . import accounts
from .connection import EMBEDDED_FILE, masked
from .database import ARTIFACTS_FOLDER, HOME_FOLDER, Database, copy_sqlite, named
from .digest import DIGEST_TAG, changed, digest_of
from .migrate import TRACKING, revisions

MANIFEST = "backup.json"
FORMAT = 1
DATABASE = "store"
ACCOUNTS = "accounts.db"
ARTIFACTS = "artifacts"
FOLDERS = "folders"
LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Columns that say where artifacts lie; an embedded store has absolute folders there."""
COUNTED = ("experiments", "runs", "logged_models", "registered_models", "model_versions", "registered_model_aliases")
CHUNK_BYTES = 1 << 20
COPY_TRIES = 5


@dataclass(frozen=True)
class Copied:
    """A file of a backup: its size in bytes and its SHA-256 digest."""

    size: int
    sha256: str


def run_backup(folder: Path, database: Database, artifacts: str, home: Path) -> int:
    """Writes a backup beside its place and renames it once it is whole.

    Raises:
        TrackingError: the place is taken, there is no store, or its schema is not that of the installed MLflow.
    """
    if folder.exists():
        raise TrackingError(f"a backup goes to a new folder, {folder} exists. Name another one.")
    if database.revision(TRACKING.version_table) != revisions(TRACKING)[0]:
        raise TrackingError(
            f"a backup is of a store of MLflow {mlflow.__version__}, {masked(database.uri)} is none (--backend). "
            "Name the store, or start the server once: it migrates an older one."
        )
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    accounts.own_folder(unfinished)
    try:
        with no_gc(home):
            manifest = _write(unfinished, database, artifacts, home)
        os.sync()
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    size = sum(entry["size"] for entry in manifest["files"].values())
    print(f"{folder}: {len(manifest['files'])} files, {readable(size)}; {_said(manifest['rows'])}")
    if manifest["elsewhere"]:
        print(f"not in it: {', '.join(manifest['elsewhere'])} (keep versions of the bucket)", file=sys.stderr)
    return 0


def run_restore(folder: Path, target: Path, backend: str | None = None) -> int:
    """Restores a backup into a folder that is not there yet, and for PostgreSQL into an empty database.

    Raises:
        TrackingError: the place is not empty, or the backup is damaged; nothing has been written then. Or a version's
            files are not those that were registered, which is said after all is restored.
    """
    manifest = read_manifest(folder)
    target = target.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise TrackingError(f"a backup is restored into an empty place, {target} is not empty. Name a new folder.")
    database = named(backend if manifest["kind"] == "postgresql" else f"sqlite:///{target / EMBEDDED_FILE}")
    if manifest["kind"] == "postgresql":
        if database.file:
            raise TrackingError("a backup of PostgreSQL is restored into PostgreSQL, --backend does not name one. Name an empty database.")  # fmt: skip  # noqa: E501
        if database.tables():
            raise TrackingError(
                f"a backup is restored into an empty database, {masked(database.uri)} has tables (--backend). "
                "Make a new one (createdb)."
            )
    elif backend:
        raise TrackingError(f"a backup of SQLite is restored as {target / EMBEDDED_FILE}, leave --backend out.")
    check(folder, manifest)
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        (unfinished / ARTIFACTS_FOLDER).mkdir()
        _copy_tree(folder / ARTIFACTS, unfinished / ARTIFACTS_FOLDER)
        moved = {old: _new_place(target, number, old) for number, old in enumerate(manifest["folders"])}
        for number, place in enumerate(moved.values()):
            _copy_tree(folder / FOLDERS / str(number), unfinished / place.relative_to(target))
        if (folder / ACCOUNTS).exists():
            accounts.own_folder(unfinished / HOME_FOLDER)
            _copy(folder / ACCOUNTS, unfinished / HOME_FOLDER / accounts.DATABASE_FILE)
            (unfinished / HOME_FOLDER / accounts.DATABASE_FILE).chmod(0o600)
        here = Database(f"sqlite:///{unfinished / EMBEDDED_FILE}") if database.file else database
        here.load(folder / DATABASE)
        _move_locations(here, moved)
        with contextlib.suppress(FileNotFoundError):
            target.rmdir()
        os.replace(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{target}: {_said(manifest['rows'])}")
    if others := list(_changed_versions(database, target / ARTIFACTS_FOLDER)):
        raise TrackingError("; ".join(changed(name, version) for name, version in others))
    flags = "" if database.file else f" --home {target / HOME_FOLDER}"
    if manifest["elsewhere"] or not database.file:
        flags += f" --artifacts {(*manifest['elsewhere'], target / ARTIFACTS_FOLDER)[0]}"
    print(f"start it:  python -m tracking.server start --backend {masked(database.uri)}{flags}", file=sys.stderr)
    return 0


def _changed_versions(database: Database, artifacts: Path) -> Iterator[tuple[str, str]]:
    """Names and versions of registered models whose files are not those that were registered."""
    with database.engine() as engine, engine.connect() as connection:
        rows = connection.execute(
            text(
                "SELECT v.name, v.version, v.storage_location, t.value FROM model_versions v "
                "JOIN model_version_tags t ON t.name = v.name AND t.version = v.version AND t.key = :tag "
                "ORDER BY v.name, v.version"
            ),
            {"tag": DIGEST_TAG},
        ).all()
    for name, version, location, digest in rows:
        way = str(location).removeprefix("mlflow-artifacts:/")
        folder = local_folder(location) if way == location else artifacts / way.lstrip("/")
        if folder is not None and digest_of(folder) != digest:
            yield str(name), str(version)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a backup says of itself.

    Raises:
        TrackingError: the folder holds no backup, or one of a later version of this project or of MLflow.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        known = manifest["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise TrackingError(f"a backup is a folder with a {MANIFEST}, {folder} has none that can be read. Name what backup wrote.") from err  # fmt: skip  # noqa: E501
    if not known or manifest["revision"] not in revisions(TRACKING):
        raise TrackingError(
            f"a backup is restored by the MLflow that it is of or a newer one, {folder} is of MLflow "
            f"{manifest.get('mlflow')}, this is {mlflow.__version__}. Install that one."
        )
    return manifest


def check(folder: Path, manifest: dict[str, Any]) -> None:
    """Compares every file with its digest.

    Raises:
        TrackingError: a file is missing or is not what was written.
    """
    for number, (name, entry) in enumerate(manifest["files"].items()):
        path = folder / name
        if not path.is_file() or _digest(path) != entry["sha256"]:
            state = "damaged" if path.is_file() else "missing"
            raise TrackingError(
                f"every file of a backup must be as it was written, {name} is {state} (file {number + 1} of "
                f"{len(manifest['files'])} in {folder}). Restore another backup."
            )


@contextlib.contextmanager
def no_gc(home: Path) -> Iterator[None]:
    """Backup and gc of one store wait for each other."""
    accounts.own_folder(home)
    with open(home / ".artifacts.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def local_folder(location: str) -> Path | None:
    """The folder that an artifact location names; None for a proxied or remote one."""
    parts = urlsplit(location)
    if parts.scheme in ("", "file"):
        path = unquote(parts.path) if parts.scheme else location
        return Path(path) if path.startswith("/") else None
    return None


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def readable(size: int) -> str:
    """A number of bytes, for people."""
    power = min(max(0, (len(str(size)) - 1) // 3), 4)
    return f"{size / 1000**power:.{min(power, 1)}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def _said(rows: dict[str, int]) -> str:
    return ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in rows.items())


def _write(folder: Path, database: Database, artifacts: str, home: Path) -> dict[str, Any]:
    files: dict[str, Copied] = {}

    def note(path: Path) -> None:
        files[path.relative_to(folder).as_posix()] = Copied(path.stat().st_size, _digest(path))

    if (home / accounts.DATABASE_FILE).exists():
        copy_sqlite(home / accounts.DATABASE_FILE, folder / ACCOUNTS)
        note(folder / ACCOUNTS)
    database.dump(folder / DATABASE)
    note(folder / DATABASE)
    taken = int(time.time())
    rows = database.counts(COUNTED)
    folders = _local_folders(database)
    elsewhere = []
    sources = [(place, folder / FOLDERS / str(number)) for number, place in enumerate(folders)]
    if "://" in artifacts:
        elsewhere.append(artifacts)
    else:
        sources.append((Path(artifacts), folder / ARTIFACTS))
    with console.progress("copying artifacts") as show:
        for number, (source, target) in enumerate(sources):
            target.mkdir(parents=True)
            for path, copied in _copy_tree(source, target):
                files[path.relative_to(folder).as_posix()] = copied
            show(number + 1, len(sources))
    manifest = {
        "format": FORMAT,
        "taken": taken,
        "mlflow": mlflow.__version__,
        "kind": database.url.get_backend_name(),
        "revision": database.revision(TRACKING.version_table),
        "rows": rows,
        "folders": [str(place) for place in folders],
        "elsewhere": elsewhere,
        "files": {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in sorted(files.items())},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _local_folders(database: Database) -> list[Path]:
    """The folders that experiments of an embedded store have, none of which lies in another."""
    with database.engine() as engine, engine.connect() as connection:
        found = connection.execute(text("SELECT artifact_location FROM experiments ORDER BY experiment_id")).scalars()
        places = sorted({place for location in found if (place := local_folder(str(location)))})
    return [place for place in places if not any(other in place.parents for other in places)]


def _new_place(target: Path, number: int, old: str) -> Path:
    return target / "mlruns" / f"{number}-{Path(old).name}"


def _move_locations(database: Database, moved: dict[str, Path]) -> None:
    """Writes new folders in the place of old ones, in each form that MLflow gives them."""
    with database.engine() as engine, engine.begin() as connection:
        for old, new in moved.items():
            for before, after in ((Path(old).as_uri(), new.as_uri()), (old, str(new)), (f"file://{old}", f"file://{new}")):  # fmt: skip  # noqa: E501
                for table, column in LOCATIONS:
                    connection.execute(
                        text(
                            f"UPDATE {table} SET {column} = :after || substr({column}, :rest) "
                            f"WHERE {column} = :before OR substr({column}, 1, :rest) = :below"
                        ),
                        {"after": after, "before": before, "below": f"{before}/", "rest": len(before) + 1},
                    )


def _copy_tree(source: Path, target: Path) -> list[tuple[Path, Copied]]:
    """Copies a folder's files, without following links out of it; a file that goes away meanwhile is left out."""
    done = []
    for path in sorted(source.rglob("*")) if source.is_dir() else []:
        place = target / path.relative_to(source)
        if path.is_symlink():
            continue
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        elif path.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                done.append((place, _copy(path, place)))
    return done


def _copy(source: Path, target: Path) -> Copied:
    """Copies a file; one that is written to meanwhile is copied again, unless that never ends."""
    for left in reversed(range(COPY_TRIES)):
        before = source.stat()
        digest = hashlib.sha256()
        with open(source, "rb") as read, open(target, "wb") as written:
            while chunk := read.read(CHUNK_BYTES):
                digest.update(chunk)
                written.write(chunk)
        after = source.stat()
        if not left or (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns):
            break
    return Copied(target.stat().st_size, digest.hexdigest())


def _digest(path: Path) -> str:
    with open(path, "rb") as read:
        return hashlib.file_digest(read, "sha256").hexdigest()
