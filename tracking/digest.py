"""A registered version is what was registered: a digest of all its files, checked before anything of it is used.

`CheckedModels` is how MLflow itself downloads ``models:/`` where this project is installed (setup.cfg), so that
``mlflow.pyfunc.load_model`` runs no line of a version whose files are others.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.store.artifact.models_artifact_repo import REGISTERED_MODEL_META_FILE_NAME, ModelsArtifactRepository

from qafe.errors import TrackingError

logger = logging.getLogger(__name__)
DIGEST_TAG = "files_sha256"
"""Of a version: what `digest_of` its folder has given."""
DESCRIPTION = "MLmodel"
"""MLflow reads it by itself, and again with the rest before it runs anything."""


def digest_of(folder: Path) -> str:
    """The SHA-256 digest of a model's files and their names, in order.

    Without the note that MLflow's client adds to a download. A link counts as what it points at, which is no file.
    """
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not _is_plain_folder(path)}
    files.pop(REGISTERED_MODEL_META_FILE_NAME, None)
    lines = (f"{_digest(path)} {name}\n" for name, path in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_version(folder: Path, name: str, version: str, tags: Mapping[str, str]) -> None:
    """Compares a downloaded version with its digest; compiled Python files, which loading leaves behind, are removed.

    Raises:
        TrackingError: a file of it is not the one that was registered, or is missing, or there is one more.
    """
    if DIGEST_TAG not in tags:
        logger.warning(
            "version %s of %s has no digest of its files: it was registered by an earlier qafe-net", version, name
        )
        return
    for compiled in list(folder.rglob("__pycache__")):
        shutil.rmtree(compiled)
    if digest_of(folder) != tags[DIGEST_TAG]:
        raise TrackingError(changed(name, version))


def changed(name: str, version: str) -> str:
    """What is said of a version whose files are others."""
    return (
        f"a registered version's files must be those that were registered, those of version {version} of {name} are "
        "not: somebody has changed the store. Do not use it; register its trial again and promote that."
    )


class CheckedModels(ModelsArtifactRepository):
    """MLflow's own downloads of ``models:/``, each a copy, and compared with the version's digest.

    Raises:
        TrackingError: the files are not those that were registered.
    """

    def __init__(self, artifact_uri: str, *more: Any, **named: Any) -> None:
        super().__init__(artifact_uri, *more, **named)
        self._found = self._version(artifact_uri)

    def download_artifacts(self, artifact_path: str, dst_path: str | None = None, *more: Any, **named: Any) -> str:
        """Downloads the whole version, checks it, and returns where the asked-for part of it lies."""
        download: Any = super().download_artifacts
        if self._found is None or artifact_path == DESCRIPTION:
            return str(download(artifact_path, dst_path, *more, **named))
        name, version, tags = self._found
        place = tempfile.mkdtemp() if dst_path is None or artifact_path else dst_path
        whole = Path(download("", place, *more, **named))
        check_version(whole, name, version, tags)
        part = whole / artifact_path
        if dst_path is None or not artifact_path:
            return str(part)
        target = Path(dst_path) / artifact_path
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if part.is_dir() else shutil.copy2)(part, target)
        shutil.rmtree(place)
        return str(target)

    def _version(self, uri: str) -> tuple[str, str, Mapping[str, str]] | None:
        from mlflow import MlflowClient  # late: MLflow is not whole yet when it finds this class

        client = MlflowClient(registry_uri=self.registry_uri)
        if self.model_name is not None:
            found = client.get_model_version(self.model_name, str(self.model_version))
        else:
            versions = client.search_model_versions(f"source_path = '{uri.rstrip('/')}'", max_results=1)
            if not versions:
                return None
            found = versions[0]
        return found.name, str(found.version), found.tags


def _is_plain_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _digest(path: Path) -> str:
    if path.is_symlink():
        return "link"
    with open(path, "rb") as read:
        return hashlib.file_digest(read, "sha256").hexdigest()
