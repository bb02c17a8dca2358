"""python -m tracking.registry register | promote | list: from a sweep's best trial to ``models:/qafe-net@champion``."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Metric, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.models.model import MLMODEL_FILE_NAME, MODEL_CODE_PATH
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from qafe import console
from qafe.config import PRETRAINED
from qafe.dotted import flatten, override
from qafe.errors import ConfigError, TrackingError
from qafe.importing import SOURCE_KEY
from qafe.model.weights import load as load_weights
from qafe.model.weights import save as save_weights
from qafe.score import SUFFIX, Scorer

from . import scorer
from .connection import connect, masked, refused, resolve_uri
from .digest import DIGEST_TAG, check_version, digest_of
from .figures import CHECKPOINT_FOLDER
from .guard import Guard, Secrets
from .privacy import without_paths
from .runs import STATE_TAG, SWEEP_TAG, TRIAL_TAG, sweep_runs
from .sender import experiment_id
from .tags import MODEL_TYPE, SWEEP_ITSELF

MODEL = "qafe-net"
CHAMPION = "champion"
IMPORTED = "imported"
"""The experiment of models that no sweep made."""
UNSEEN = (
    "train.",
    "data.repeats",
    "data.validation_fraction",
    "data.split_seed",
    "data.shuffle_labels",
    "data.augment.",
)
"""Settings of a training; those of an imported model are the preset's, and not what the authors trained with."""
OBJECTIVE = "best_spearman"
SCORES = (OBJECTIVE, "test_spearman")
"""What a version says about itself."""
REQUIREMENTS = ("torch", "einops", "jaxtyping", "numba", "numpy", "opencv-python-headless", "pandas", "pillow",
                "safetensors", "scipy", "simplejpeg")  # fmt: skip
UV_FILES = ("uv.lock", "pyproject.toml", ".python-version")
"""What MLflow takes along from the folder that a command is run in."""


def register(client: MlflowClient, sweep: str, *, model: str = MODEL, trial: int | None = None) -> ModelVersion:
    """Registers a sweep's best trial (or the one with a number) as a new version of a model.

    Raises:
        TrackingError: there is no such sweep, or it has no finished trial with a checkpoint.
    """
    best = _best_run(client, sweep, trial)
    run_id = str(best.info.run_id)
    tags = {"sweep": best.data.tags[SWEEP_TAG], "trial_run": run_id}
    tags |= {name: f"{best.data.metrics[name]:.4f}" for name in SCORES if name in best.data.metrics}
    with tempfile.TemporaryDirectory() as folder:
        try:
            weights = client.download_artifacts(run_id, CHECKPOINT_FOLDER, folder)
        except (MlflowException, OSError) as err:
            raise TrackingError(
                f"a trial needs its checkpoint to be registered, run {run_id} has none ({err}). "
                "Wait until the sweep has sent it (python -m tracking.runs replay)."
            ) from err
        files = Path(folder) / "model"
        _save(files, weights, run_id)
        return add_version(client, model, run_id, files, tags)


def register_weights(client: MlflowClient, folder: Path, *, model: str = MODEL) -> ModelVersion:
    """Registers a model folder that no sweep made, such as an imported one, as a new version of a model.

    Its run holds settings and weights, and no scores: here nobody has measured any. Of the authors' models it holds the
    digest of their file, and no settings of a training that nobody here has seen. Files are written anew from what is
    in them, so that no path, name or note of this machine goes along.

    Raises:
        CheckpointError: the folder holds no weights, or damaged ones.
        ConfigError: a file is called like the user or the machine.
    """
    scorer_of = Scorer(folder)
    secrets = Secrets.of_machine()
    guard = Guard(secrets.names, secrets.folders, own=secrets.own)
    sources: dict[str, str] = {}
    params: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as place:
        kept, digest = Path(place) / CHECKPOINT_FOLDER, hashlib.sha256()
        kept.mkdir()
        for expression, (network, config) in scorer_of.models.items():
            if guard.finds(expression):
                raise ConfigError(
                    f"a model must not be called like the user or the machine, got {expression}{SUFFIX} in {folder}. "
                    "Rename it."
                )
            settings = flatten(without_paths(config))
            config = override(config, {name: guard.text(settings[name]) for name in PRETRAINED})
            content = (folder / (expression + SUFFIX)).read_bytes()
            source = load_weights(folder / (expression + SUFFIX))[2].get(SOURCE_KEY, "")
            if re.fullmatch("[0-9a-f]{64}", source):
                sources[expression] = source
            elsewhere = UNSEEN if expression in sources else ()
            params |= {name: value for name, value in flatten(config).items() if not name.startswith(elsewhere)}
            notes = {SOURCE_KEY: source} if expression in sources else None
            save_weights(kept / (expression + SUFFIX), network, config, notes)
            digest.update(f"{expression} {hashlib.sha256(content).hexdigest()}\n".encode())
        tags = {"weights_sha256": digest.hexdigest(), "expressions": ",".join(scorer_of.expressions)}
        if sources:
            tags["source_sha256"] = ",".join(f"{expression}:{found}" for expression, found in sources.items())
        experiment = experiment_id(client, IMPORTED, client.tracking_uri)
        run_id = str(
            client.create_run(experiment, run_name=f"{IMPORTED}-{digest.hexdigest()[:8]}", tags=tags).info.run_id
        )
        try:
            for name, value in params.items():
                client.log_param(run_id, name, value)
            client.log_artifacts(run_id, str(kept), CHECKPOINT_FOLDER)
            files = Path(place) / "model"
            _save(files, str(kept), run_id)
            version = add_version(client, model, run_id, files, tags | {"trial_run": run_id})
        except BaseException:
            client.set_terminated(run_id, "FAILED")
            raise
        client.set_terminated(run_id)
        return version


def _save(files: Path, weights: str, run_id: str) -> None:
    """Writes the pyfunc model into a new folder, without the paths that MLflow notes in it."""
    with warnings.catch_warnings():
        # MLflow asks for an input example; ours would be the path of a patient's clip.
        warnings.filterwarnings("ignore", message=".*input example.*")
        mlflow.pyfunc.save_model(
            path=str(files),
            python_model=scorer.__file__,
            artifacts={scorer.WEIGHTS: weights},
            code_paths=[str(_package_folder("qafe"))],
            signature=scorer.SIGNATURE,
            pip_requirements=[f"{name}=={_version(name)}" for name in REQUIREMENTS],
            mlflow_model=Model(run_id=run_id),
        )
    for folder in list(files.rglob("__pycache__")):
        shutil.rmtree(folder)
    for name in UV_FILES:
        (files / name).unlink(missing_ok=True)
    about = Model.load(str(files))
    flavor = about.flavors[mlflow.pyfunc.FLAVOR_NAME]
    flavor[MODEL_CODE_PATH] = Path(flavor[MODEL_CODE_PATH]).name  # all that MLflow reads of it
    flavor["artifacts"][scorer.WEIGHTS]["uri"] = f"runs:/{run_id}/{CHECKPOINT_FOLDER}"
    about.save(str(files / MLMODEL_FILE_NAME))


def add_version(client: MlflowClient, model: str, run_id: str, files: Path, tags: Mapping[str, str]) -> ModelVersion:
    """A new version of a registered model: a folder's files, as a LoggedModel of a run with its params and scores.

    MLflow's own ``log_model`` and ``register_model`` would add the user's name and the command's path as tags.
    """
    mlflow.set_tracking_uri(client.tracking_uri)  # an embedded registry asks it for models
    run = client.get_run(run_id)
    logged = client.create_logged_model(
        run.info.experiment_id, name=MODEL, source_run_id=run_id, params=run.data.params, model_type=MODEL_TYPE
    ).model_id
    try:
        client.log_model_artifacts(logged, str(files))
    except Exception:
        client.finalize_logged_model(logged, "FAILED")
        raise
    client.finalize_logged_model(logged, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged, 0)])
    histories = [client.get_metric_history(run_id, name) for name in SCORES if name in run.data.metrics]
    last = [max(rows, key=lambda row: (row.step, row.timestamp)) for rows in histories]
    linked = [Metric(row.key, row.value, row.timestamp, row.step, model_id=logged) for row in last]
    if linked:
        client.log_batch(run_id, metrics=linked)
    try:
        client.create_registered_model(model)
    except MlflowException as err:
        if err.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    digest = {DIGEST_TAG: digest_of(files)}
    version = client.create_model_version(model, f"models:/{logged}", run_id, dict(tags) | digest, model_id=logged)
    if MLFLOW_MODEL_VERSIONS not in client.get_logged_model(logged).tags:  # a server has set it
        known = [{"name": version.name, "version": version.version}]
        client.set_logged_model_tags(logged, {MLFLOW_MODEL_VERSIONS: json.dumps(known)})
    return version


def promote(client: MlflowClient, model: str, version: str) -> None:
    """Sets the champion alias to a version.

    Raises:
        TrackingError: there is no such version.
    """
    try:
        client.get_model_version(model, version)
    except MlflowException as err:
        raise TrackingError(
            f"a version must be in the registry to be promoted, {model} has no version {version}. "
            "See python -m tracking.registry list."
        ) from err
    client.set_registered_model_alias(model, CHAMPION, version)


def fetch(uri: str) -> Path:
    """The weights folder of a registered model, downloaded; for ``python -m qafe score --model models:/...``.

    Raises:
        TrackingError: nothing in the registry has that name, version or alias, its files are not there or not those
            that were registered, or the cache folder cannot be written.
    """
    client = connect(create=False)
    mlflow.set_tracking_uri(client.tracking_uri)
    try:
        # An alias may move at any moment: from here on it is one version.
        name, version = _name_and_version(client, uri)
        source = client.get_model_version_download_uri(name, version)
        tags = client.get_model_version(name, version).tags
    except MlflowException as err:
        known = ", ".join(found.name for found in client.search_registered_models()) or "none"
        raise TrackingError(
            f"the model must be in the registry of {masked(resolve_uri())}, {uri} is not (models there: {known}). "
            "Register and promote one with python -m tracking.registry."
        ) from err
    folder = _model_cache() / hashlib.sha256(source.encode()).hexdigest()[:16]
    if not folder.exists():
        _download(f"models:/{name}/{version}", folder)
    check_version(folder, name, version, tags)
    weights = folder / "artifacts" / CHECKPOINT_FOLDER
    if not weights.is_dir():
        raise TrackingError(
            f"{uri} must be a model that this project registered, it has no artifacts/{CHECKPOINT_FOLDER}. "
            "Register one with python -m tracking.registry."
        )
    return weights


def _download(uri: str, folder: Path) -> None:
    """A version's files as a new folder, whole; several processes may do it at once."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            try:
                downloaded = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=unfinished)
            except MlflowException as err:
                raise _not_downloaded(uri, err) from err
            except OSError as err:  # MLflow's own have no number
                if err.errno is None:
                    raise _not_downloaded(uri, err) from err
                raise
            try:
                os.replace(downloaded, folder)
            except OSError:
                if not folder.is_dir():  # no other process has been faster
                    raise
    except OSError as err:
        raise TrackingError(
            f"the cache of fetched models must be writable, {folder.parent} is not ({err.strerror or err}). "
            "Free some space there, or name another place with XDG_CACHE_HOME."
        ) from err


def _not_downloaded(uri: str, err: Exception) -> TrackingError:
    return TrackingError(
        f"a registered model's files must be in its store, those of {uri} cannot be downloaded from "
        f"{masked(resolve_uri())} ({masked(str(err))[:200]}). Look for them in its UI, or register the trial again."
    )


def _name_and_version(client: MlflowClient, uri: str) -> tuple[str, str]:
    """``models:/name/3`` and ``models:/name@alias`` as (name, version)."""
    path = uri.removeprefix("models:/").strip("/")
    name, _, version = path.partition("/")
    if "@" in name:
        name, _, alias = name.partition("@")
        return name, str(client.get_model_version_by_alias(name, alias).version)
    return name, version


def _model_cache() -> Path:
    """Where fetched models are kept; a registered version never changes, so one download is enough."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qafe" / "models"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    parser = console.parser("python -m tracking.registry", "Register, promote and list QAFE-Net models.")
    parser.add_argument("--tracking-uri", help="the MLflow store (default: MLFLOW_TRACKING_URI or the embedded one)")
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("register", help="register a sweep's best trial, or a model folder")
    which = sub.add_mutually_exclusive_group(required=True)
    which.add_argument("--sweep", help="name of the sweep")
    which.add_argument("--weights", type=Path, metavar="FOLDER", help="a folder that qafe import or qafe train wrote")
    sub.add_argument("--trial", type=int, help="number of the trial (default: the best)")
    sub.add_argument("--model", default=MODEL)
    sub.set_defaults(run=_register)
    sub = commands.add_parser("promote", help=f"make a version the @{CHAMPION}")
    sub.add_argument("model", help=f"e.g. {MODEL}")
    sub.add_argument("version", help="e.g. 1")
    sub.set_defaults(run=_promote)
    sub = commands.add_parser("list", help="list the registered versions")
    sub.add_argument("--json", action="store_true")
    sub.set_defaults(run=_list)
    return console.run(_run, parser, argv)


def _run(options: argparse.Namespace) -> int:
    try:
        return int(options.run(options))
    except MlflowException as err:
        if refusal := refused(err, options.tracking_uri):
            raise refusal from err
        raise


def _register(options: argparse.Namespace) -> int:
    client = connect(options.tracking_uri, create=options.weights is not None)
    if options.weights is None:
        version = register(client, options.sweep, model=options.model, trial=options.trial)
    elif options.trial is not None:
        raise ConfigError(f"--trial is of a sweep, got {options.trial} with --weights. Leave one of them out.")
    else:
        version = register_weights(client, options.weights, model=options.model)
    print(f"registered {version.name} version {version.version}")
    print(f"promote it:  python -m tracking.registry promote {version.name} {version.version}", file=sys.stderr)
    return 0


def _promote(options: argparse.Namespace) -> int:
    promote(connect(options.tracking_uri, create=False), options.model, options.version)
    print(f"models:/{options.model}@{CHAMPION} is version {options.version}")
    return 0


def _list(options: argparse.Namespace) -> int:
    client = connect(options.tracking_uri, create=False)
    rows = []
    for model in client.search_registered_models():
        for version in client.search_model_versions(f"name = '{model.name}'"):
            rows.append(
                {
                    "model": model.name,
                    "version": int(version.version),
                    "alias": ",".join(sorted(client.get_model_version(model.name, version.version).aliases)),
                    "sweep": version.tags.get("sweep", ""),
                    "validation_spearman": version.tags.get(OBJECTIVE, ""),
                    "test_spearman": version.tags.get("test_spearman", ""),
                }
            )
    rows.sort(key=lambda row: (row["model"], row["version"]))
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    # Spearman of both kinds; the names are short, so that a row fits into 80 columns.
    names = ("model", "version", "alias", "sweep", "validation_spearman", "test_spearman")
    titles = {name: name.removesuffix("_spearman") for name in names}
    widths = {name: max(len(str(row[name])) for row in [titles, *rows]) for name in titles}
    for row in [titles, *rows]:
        print("  ".join(str(row[name]).ljust(widths[name]) for name in titles).rstrip())
    return 0


def _best_run(client: MlflowClient, sweep: str, trial: int | None) -> Run:
    """A sweep's best trial, the first of equally good ones, or its trial of a number."""
    runs = sweep_runs(client, sweep)
    sweep = runs[0].data.tags[SWEEP_TAG]
    trials = [run for run in runs if run.data.tags.get(TRIAL_TAG) != SWEEP_ITSELF]
    if trial is not None:
        trials = [run for run in trials if run.info.run_name == f"{sweep}-{trial:03d}"]
    ended = [run for run in trials if OBJECTIVE in run.data.metrics and run.data.tags.get(STATE_TAG) == "finished"]
    if not ended:
        wanted = "no finished trial" if trial is None else f"no finished trial {trial}"
        raise TrackingError(f"only a finished trial can be registered, sweep {sweep} has {wanted}. Let it finish.")
    # Names end in the trial's number, with leading zeros up to 999.
    return min(ended, key=lambda run: (-run.data.metrics[OBJECTIVE], len(run.info.run_name), run.info.run_name))


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _version(name: str) -> str:
    """The installed version without its build label: ``+cpu`` is on no package index."""
    return importlib.metadata.version(name).partition("+")[0]


if __name__ == "__main__":
    sys.exit(main())
