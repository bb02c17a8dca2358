"""python -m tracking.export SWEEP DIR: a sweep as plain files; ``import DIR`` brings it into another server.

```
DIR/sweep.json            its runs: ids, names, parents, states, times, tags, params, data, models
    trials.csv            a row for each trial: number, state, params, last values of the metrics
    params.csv            trial, name, value
    metrics.csv           trial, metric, step, time, value: every row that MLflow has
    *.parquet             the same tables, where pyarrow is installed
    artifacts/<run name>/ config, predictions, figures, weights; of the sweep its report
    models/<name>-<version>/   what is registered of it
```

A sweep is known by its own id, not by MLflow's: importing it again, or where it came from, doubles nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag

from qafe import console
from qafe.errors import TrackingError

from .batches import batches
from .connection import connect, masked
from .registry import add_version
from .runs import sweep_runs
from .sender import experiment_id
from .tags import STATE_TAG, SWEEP_ID_TAG, SWEEP_ITSELF, SWEEP_TAG, TRIAL_TAG

SWEEP_FILE = "sweep.json"
PARENT_TAG = "mlflow.parentRunId"
IMPORTED_TAG = "qafe.imported"
"""Of a model's version: the sweep and the version that it was elsewhere."""
FORMAT = 1


def export(client: MlflowClient, sweep: str, folder: Path) -> int:
    """Writes a sweep into a new folder and returns the number of its runs.

    Raises:
        TrackingError: there is no such sweep, or something lies in the folder already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TrackingError(f"a sweep is exported into a new or empty folder, {folder} is neither. Name another.")
    runs = sorted(sweep_runs(client, sweep), key=_place)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    metrics: list[list[Any]] = []
    with console.progress(f"exporting {len(runs)} runs") as done:
        for number, run in enumerate(runs, start=1):
            for name in sorted(run.data.metrics):
                history = client.get_metric_history(run.info.run_id, name)
                metrics += [[_trial(run), name, row.step, row.timestamp, row.value] for row in history]
            target = unfinished / "artifacts" / _file_name(run)
            target.mkdir(parents=True)
            if client.list_artifacts(run.info.run_id):
                client.download_artifacts(run.info.run_id, "", str(target))
            done(number, len(runs))
    _write_tables(unfinished, runs, metrics)
    experiment = client.get_experiment(runs[0].info.experiment_id)
    tree = {
        "format": FORMAT,
        "experiment": experiment.name,
        "sweep": runs[0].data.tags[SWEEP_TAG],
        "sweep_id": runs[0].data.tags[SWEEP_ID_TAG],
        "runs": [_run_tree(run) for run in runs],
        "models": _export_models(client, runs, unfinished / "models"),
    }
    (unfinished / SWEEP_FILE).write_text(json.dumps(tree, indent=2))
    if folder.exists():
        folder.rmdir()
    unfinished.replace(folder)
    return len(runs)


def bring(client: MlflowClient, folder: Path) -> int:
    """Brings an exported sweep into a store and returns the number of its runs; what is there already is completed.

    Raises:
        TrackingError: the folder is no exported sweep.
    """
    tree = _read(folder)
    rows: dict[str, list[Metric]] = {}
    with open(folder / "metrics.csv", newline="") as table:
        for row in csv.DictReader(table):
            metric = Metric(row["metric"], float(row["value"]), int(row["time"]), int(row["step"]))
            rows.setdefault(row["trial"], []).append(metric)
    experiment = experiment_id(client, tree["experiment"], client.tracking_uri)
    ids: dict[str, str] = {}
    with console.progress(f"importing {len(tree['runs'])} runs") as done:
        for number, run in enumerate(tree["runs"], start=1):  # the sweep's own comes first
            run_id = _bring_run(client, experiment, run, ids)
            items: list[Metric | Param | RunTag] = [*rows.get(run["tags"][TRIAL_TAG], ())]
            known = client.get_run(run_id).data.params
            items += [Param(name, value) for name, value in run["params"].items() if name not in known]
            for batch in batches(items):
                client.log_batch(
                    run_id,
                    metrics=[item for item in batch if isinstance(item, Metric)],
                    params=[item for item in batch if isinstance(item, Param)],
                )
            client.log_artifacts(run_id, str(folder / "artifacts" / run["name"]))
            client.update_run(run_id, status=run["status"])
            if run["end"]:
                client.set_terminated(run_id, status=run["status"], end_time=run["end"])
            done(number, len(tree["runs"]))
    for model in tree["models"]:
        _bring_model(client, tree["sweep_id"], model, ids, folder / "models")
    return len(ids)


def _bring_run(client: MlflowClient, experiment: str, run: dict[str, Any], ids: dict[str, str]) -> str:
    """The run in this store: found by the sweep's id and the trial's number, or made."""
    tags = dict(run["tags"])
    query = f"tags.`{SWEEP_ID_TAG}` = '{tags[SWEEP_ID_TAG]}' AND tags.`{TRIAL_TAG}` = '{tags[TRIAL_TAG]}'"
    found = client.search_runs([experiment], query, max_results=1)
    if PARENT_TAG in tags:
        tags[PARENT_TAG] = ids[tags[PARENT_TAG]]
    made = (
        found[0] if found else client.create_run(experiment, start_time=run["start"], tags=tags, run_name=run["name"])
    )
    run_id = str(made.info.run_id)
    ids[run["id"]] = run_id
    if run["data"] and not (made.inputs and made.inputs.dataset_inputs):
        inputs = [
            DatasetInput(Dataset(**each["dataset"]), [InputTag(name, value) for name, value in each["tags"].items()])
            for each in run["data"]
        ]
        client.log_inputs(run_id, inputs)
    return run_id


def _bring_model(client: MlflowClient, sweep_id: str, model: dict[str, Any], ids: dict[str, str], folder: Path) -> None:
    """A registered version, with its files and tags; an alias only where nobody has it yet."""
    name, mark = model["name"], f"{sweep_id}/{model['version']}"
    versions = client.search_model_versions(f"name = '{name}'")
    version = next((each for each in versions if each.tags.get(IMPORTED_TAG) == mark), None)
    if version is None:
        if any(each.tags.get("trial_run") == model["tags"].get("trial_run") for each in versions):
            return  # this is where it came from
        tags = model["tags"] | {IMPORTED_TAG: mark, "trial_run": ids[model["run"]]}
        files = folder / f"{name}-{model['version']}"
        version = add_version(client, name, ids[model["run"]], files, tags)
    taken = client.get_registered_model(name).aliases
    for alias in model["aliases"]:
        if alias not in taken:
            client.set_registered_model_alias(name, alias, version.version)


def _export_models(client: MlflowClient, runs: Sequence[Run], folder: Path) -> list[dict[str, Any]]:
    """The registered versions that were made of these runs."""
    ids = {run.info.run_id for run in runs}
    mlflow.set_tracking_uri(client.tracking_uri)
    found = []
    for version in client.search_model_versions():
        run = version.tags.get("trial_run") or version.run_id
        if run in ids:
            target = folder / f"{version.name}-{version.version}"
            target.mkdir(parents=True)
            uri = f"models:/{version.name}/{version.version}"
            mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(target))
            aliases = client.get_model_version(version.name, version.version).aliases
            about = {"name": version.name, "version": int(version.version), "run": run}
            found.append(about | {"tags": dict(version.tags), "aliases": list(aliases)})
    return sorted(found, key=lambda model: (model["name"], model["version"]))


def _run_tree(run: Run) -> dict[str, Any]:
    inputs = run.inputs.dataset_inputs if run.inputs else []
    return {
        "id": run.info.run_id,
        "name": _file_name(run),
        "status": run.info.status,
        "start": run.info.start_time,
        "end": run.info.end_time,
        "params": run.data.params,
        "tags": {name: value for name, value in run.data.tags.items() if name != "mlflow.runName"},
        "data": [
            {"dataset": each.dataset.to_dictionary(), "tags": {tag.key: tag.value for tag in each.tags}}
            for each in inputs
        ],
    }


def _write_tables(folder: Path, runs: Sequence[Run], metrics: list[list[Any]]) -> None:
    trials = [run for run in runs if _trial(run) != SWEEP_ITSELF]
    params = sorted({name for run in trials for name in run.data.params})
    last = sorted({name for run in trials for name in run.data.metrics})
    wide = [
        [_trial(run), run.data.tags.get(STATE_TAG, ""), run.info.status, run.info.run_id]
        + [run.data.params.get(name, "") for name in params]
        + [run.data.metrics.get(name, "") for name in last]
        for run in trials
    ]
    long = [[_trial(run), name, value] for run in runs for name, value in sorted(run.data.params.items())]
    _write_table(folder / "trials.csv", ["trial", "state", "status", "run_id", *params, *last], wide)
    _write_table(folder / "params.csv", ["trial", "param", "value"], long)
    _write_table(folder / "metrics.csv", ["trial", "metric", "step", "time", "value"], metrics)


def _write_table(path: Path, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    rows = list(rows)
    with open(path, "w", newline="") as out:
        csv.writer(out).writerows([names, *rows])
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return
    columns = [[None if value == "" else value for value in column] for column in zip(*rows, strict=True)]
    pq.write_table(
        pa.table(dict(zip(names, columns or [[] for _ in names], strict=True))), path.with_suffix(".parquet")
    )


def _place(run: Run) -> tuple[bool, str, str]:
    """The sweep's own run first, then its trials in their order."""
    return _trial(run) != SWEEP_ITSELF, _trial(run).zfill(9), run.info.run_id


def _trial(run: Run) -> str:
    return str(run.data.tags[TRIAL_TAG])


def _file_name(run: Run) -> str:
    return str(run.info.run_name)


def _read(folder: Path) -> dict[str, Any]:
    try:
        tree: dict[str, Any] = json.loads((folder / SWEEP_FILE).read_text())
        if tree["format"] != FORMAT:
            raise ValueError(f"format {tree['format']}")
    except (OSError, ValueError, KeyError) as err:
        raise TrackingError(
            f"only a folder that python -m tracking.export wrote can be imported, {folder} is none "
            f"({type(err).__name__}: {err}). Name another."
        ) from err
    return tree


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m tracking.export SWEEP DIR`` and ``python -m tracking.export import DIR``."""
    parser = console.parser("python -m tracking.export", "Write a sweep as plain files, or bring one into a store.")
    parser.add_argument("sweep", help="name (or id) of a sweep, or the word import")
    parser.add_argument("folder", type=Path, help="a new folder; with import one that this command wrote")
    parser.add_argument("--tracking-uri", help="the MLflow store (default: MLFLOW_TRACKING_URI or the embedded one)")
    return console.run(_main, parser, argv)


def _main(options: argparse.Namespace) -> int:
    if options.sweep == "import":
        _read(options.folder)
        client = connect(options.tracking_uri)
        count = bring(client, options.folder)
        print(f"imported {count} runs into {masked(client.tracking_uri)}")
        return 0
    count = export(connect(options.tracking_uri, create=False), options.sweep, options.folder)
    print(f"exported {count} runs to {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
