"""From a spool to MLflow: in order, in batches, each entry any number of times with the same result.

Metrics and tags of one run that wait together become one request. What the server will not take is set aside with
the reason, so that it does not hold up what comes after it; what it cannot take now is tried again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

from qafe.errors import TrackingError

from . import figures
from .batches import BATCH, Item, as_entry, batches, refusal
from .connection import connect, embedded_path, masked
from .guard import Guard
from .pseudonyms import load_key
from .spool import Entry, Spool
from .tags import (
    EXPERIMENT_TAGS,
    IDENTIFIABLE_TAG,
    MLFLOW_STATUS,
    PRUNED_TAG,
    REASON_TAG,
    SPLIT_TAG,
    STATE_TAG,
    SWEEP_ID_TAG,
    SWEEP_ITSELF,
    SWEEP_TAG,
    TRIAL_TAG,
)

logger = logging.getLogger(__name__)

FAILURE_FILE = "failure.txt"
BEGINNINGS = ("open", "trial")
"""Kinds of entries with which a run begins, or goes on."""
LOOK_AHEAD_S = 0.02
"""While a trial's figures are drawn, how often the sender looks whether another trial waits for its run."""


class RunDeleted(MlflowException):
    """Somebody deleted a trial's run: what comes for it is refused, as long as it is not restored."""

    def __init__(self, trial: str, run_id: str) -> None:
        which = f"trial {trial}" if trial else "the sweep"
        super().__init__(
            f"a run must be there to be logged to, that of {which} was deleted ({run_id}). Restore it in MLflow, then "
            "replay the spool.",
            error_code=RESOURCE_DOES_NOT_EXIST,
        )
        self.run_id = run_id


class Sender:
    """Turns a spool's entries into MLflow runs.

    Args:
        spool: what is to be sent.
        uri: where its store is now, if that has moved.

    Attributes:
        runs: MLflow's run ids by trial; the sweep's own under ``""``.
        ended: trials whose end, with all files, has been sent.
        well: whether the server took what it was last given.
        given_up: set when the rest is left to a replay, which must be the only one to send it.
    """

    def __init__(self, spool: Spool, uri: str | None = None) -> None:
        self.spool = spool
        self._uri = uri
        self.runs: dict[str, str] = {}
        self.ended: set[str] = set()
        self.experiment_id = ""
        self.well = False
        self.given_up = threading.Event()
        self._client: MlflowClient | None = None
        self._opened: Entry | None = None
        self._guard: Guard | None = None
        self._said = set[str]()
        self._other = ThreadPoolExecutor(1, thread_name_prefix="trial-files")  # one: each has a heap of its own
        self._looked = 0
        self._handlers: dict[str, Callable[[MlflowClient, Entry], None]] = {
            "open": self._open,
            "trial": self._trial,
            "trial_end": self._trial_end,
            "sweep_files": self._sweep_files,
            "sweep_end": self._sweep_end,
        }

    def send_all(self) -> int:
        """Sends every unsent entry and returns how many there were.

        Raises:
            TrackingError: the server did not take one; it and the rest stay unsent.
        """
        count, place = 0, None
        waiting: dict[str, list[Item]] = {}
        for entry, after in self.spool.unsent():
            if self.given_up.is_set():
                break
            if entry["kind"] in self._handlers:
                self._flush(waiting, place)
                self._send(entry)
                self.spool.mark_sent(after)
                place = None
            else:
                waiting.setdefault(entry["trial"], []).extend(self._items(entry))
                place = after
                if sum(map(len, waiting.values())) >= BATCH:
                    self._flush(waiting, place)
                    place = None
            count += 1
        self._flush(waiting, place)
        return count

    def send_refused(self) -> int:
        """Tries again what was set aside before, and returns how many entries still are.

        Raises:
            TrackingError: the server does not answer.
        """
        entries, left = self.spool.refused(), []
        for entry in entries:
            tried = {name: value for name, value in entry.items() if name != "refused"}
            if self._outlived(tried):
                continue
            with self._translated(tried["kind"]):
                client = self._connected()
                try:
                    if tried["kind"] == "items":
                        self._request(client, self._run_id(client, tried["trial"]), self._items(tried))
                    elif tried["kind"] in BEGINNINGS:  # it may have ended since
                        self._describe(client, tried.get("trial", ""), self._guard_of_sweep().entry(tried))
                    else:
                        self._handle(client, tried)
                except Exception as err:
                    if not _is_final(err):
                        raise
                    left.append(tried | {"refused": str(err)})
        if entries:
            self.spool.keep_refused(left)
        return len(left)

    def _send(self, entry: Entry) -> None:
        """One entry that is more than metrics and tags."""
        if entry["kind"] == "open":
            self._opened, self._client, self._guard, self.runs = entry, None, None, {}
        with self._translated(entry["kind"]):
            client = self._connected()
            try:
                self._handle(client, entry)
            except Exception as err:
                if not _is_final(err):
                    raise
                client.search_experiments(max_results=1)  # a sick database refuses all: then this raises, too
                try:  # two sweeps that make the same thing at once: one of them is refused, once
                    self._handle(client, entry)
                except Exception as again:
                    if not _is_final(again):
                        raise
                    self._set_aside(entry, again)

    def _handle(self, client: MlflowClient, entry: Entry) -> None:
        self._handlers[entry["kind"]](client, self._guard_of_sweep().entry(entry))

    def _flush(self, waiting: dict[str, list[Item]], place: int | None) -> None:
        """Sends the metrics and tags that wait, one run after the other, and moves the cursor."""
        if place is None:
            return
        with self._translated("epoch"):
            client = self._connected()
            for trial, items in waiting.items():
                for batch in batches(items):
                    self._log(client, trial, batch)
        waiting.clear()
        self.spool.mark_sent(place)

    def _log(self, client: MlflowClient, trial: str, batch: Sequence[Item]) -> None:
        """Logs a batch; what the server refuses of it is set aside, the rest is logged."""
        try:
            self._request(client, self._run_id(client, trial), batch)
        except MlflowException as err:
            if not refusal(err):
                raise
            # A sick database refuses all: then this raises, too. Nor is a run that people have deleted to be halved.
            if run_id := self.runs.get(trial):
                gone = client.get_run(run_id).info.lifecycle_stage != "active"
            else:
                gone = bool(client.search_experiments(max_results=1))
            if len(batch) == 1 or gone:
                self._set_aside({"kind": "items", "trial": trial} | as_entry(batch), err)
                return
            for part in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                self._log(client, trial, part)

    def _request(self, client: MlflowClient, run_id: str, batch: Sequence[Item]) -> None:
        client.log_batch(
            run_id,
            metrics=[item for item in batch if isinstance(item, Metric)],
            params=[item for item in batch if isinstance(item, Param)],
            tags=[item for item in batch if isinstance(item, RunTag)],
        )

    def _set_aside(self, entry: Entry, err: Exception) -> None:
        self.spool.set_aside(entry | {"refused": str(err)})
        what = (
            "files are left to a replay"
            if isinstance(err, figures.FilesLater)
            else "the tracking server refuses something"
        )
        if what not in self._said:
            self._said.add(what)
            logger.warning("%s (%s): %s", what, self.spool.refused_path, masked(str(err))[:200])

    def _outlived(self, entry: Entry) -> bool:
        """Whether a trial, or the sweep, went on after this end of it: its later end is the one that counts."""
        kinds = {"trial_end": ("trial", "trial_end"), "sweep_end": ("open", "sweep_end")}.get(entry["kind"], ())
        return bool(kinds) and any(
            past["kind"] in kinds and past.get("trial") == entry.get("trial") and past["time"] > entry["time"]
            for past in self.spool.entries()
        )

    def _items(self, entry: Entry) -> list[Item]:
        """What an entry of metrics, params or tags holds, guarded."""
        entry = self._guard_of_sweep().entry(entry)
        moment, step = entry.get("time", 0), entry.get("step", 0)
        items: list[Item] = [Metric(name, value, moment, step) for name, value in entry.get("metrics", {}).items()]
        items += [Metric(name, value, *when) for name, value, *when in entry.get("rows", [])]
        items += [Param(name, value) for name, value in entry.get("params", {}).items()]
        return items + [RunTag(name, value) for name, value in entry.get("tags", {}).items()]

    def _opening(self) -> Entry:
        if self._opened is None:  # the spool goes on after an opening that has been sent
            self._opened = [past for past in self.spool.entries() if past["kind"] == "open"][-1]
        return self._opened

    def _guard_of_sweep(self) -> Guard:
        if self._guard is None:
            opened = self._opening()
            names, folders, own = (opened.get(field, ()) for field in ("names", "folders", "own"))
            self._guard = Guard(names, folders, own=own, on=not opened.get("identifiable"))
        return self._guard

    def _connected(self) -> MlflowClient:
        if self._client is None:
            opened = self._opening()
            uri = self._uri or opened["uri"]
            client = connect(uri, create=False) if self._uri else connect(uri)
            name = self._guard_of_sweep().text(opened["experiment"])
            self.experiment_id = experiment_id(client, name, uri)
            self._client = client
        return self._client

    @contextlib.contextmanager
    def _translated(self, kind: str) -> Iterator[None]:
        """Errors of MLflow and its database drivers, which raise almost anything, in one line."""
        try:
            yield
        except TrackingError:
            raise
        except Exception as err:
            raise TrackingError(
                f"the tracking server must take a sweep's {kind} entry, got {type(err).__name__} from "
                f"{masked(self._opening()['uri'])}: {masked(str(err))[:200]}. The entry is kept in {self.spool.path}."
            ) from err

    def _run_id(self, client: MlflowClient, trial: str, entry: Entry | None = None) -> str:
        """The run of a trial (or, for ``""``, of the sweep): known, found by its tags, or made.

        Args:
            entry: with which it begins; without one the spool's own is sent, should there be no run.
        Raises:
            RunDeleted: there was one.
        """
        if trial not in self.runs:
            found, deleted = self._find(client, trial)
            if deleted and not found:
                raise RunDeleted(trial, deleted[0])
            begun = entry or (None if found else self._beginning(trial))
            self.runs[trial] = found[0] if found else self._create(client, trial, begun)
            # A request whose answer was lost may have been made twice: one of the runs is the trial's.
            for twin in found or self._find(client, trial)[0]:
                if twin != self.runs[trial]:
                    client.delete_run(twin)
            if begun and not entry:
                self._describe(client, trial, begun)
        return self.runs[trial]

    def _find(self, client: MlflowClient, trial: str) -> tuple[list[str], list[str]]:
        """Ids of a trial's runs: of those that are there, and of those that were deleted."""
        sweep_id, own = self._opening()["sweep_id"], trial or SWEEP_ITSELF
        query = f"tags.`{SWEEP_ID_TAG}` = '{sweep_id}' AND tags.`{TRIAL_TAG}` = '{own}'"
        found = client.search_runs([self.experiment_id], query, run_view_type=ViewType.ALL)
        active = {run.info.run_id for run in found if run.info.lifecycle_stage == "active"}
        return sorted(active), sorted({run.info.run_id for run in found} - active)

    def _beginning(self, trial: str) -> Entry | None:
        """The spool's entry with which a trial (or the sweep) began, guarded."""
        began = (past for past in self.spool.entries() if past["kind"] == "trial" and past["trial"] == trial)
        entry = next(began, None) if trial else self._opening()
        return entry and self._guard_of_sweep().entry(entry)

    def _create(self, client: MlflowClient, trial: str, entry: Entry | None) -> str:
        opened = self._opening()
        sweep = self._guard_of_sweep().text(opened["sweep"])
        tags = self._common_tags()
        tags |= {SWEEP_TAG: sweep, SWEEP_ID_TAG: opened["sweep_id"], TRIAL_TAG: trial or SWEEP_ITSELF}
        tags["mlflow.source.name"] = "sweeps.run"
        if trial:
            try:
                tags["mlflow.parentRunId"] = self._run_id(client, "")
            except RunDeleted as err:  # as when it is deleted while the sweep runs: its trials go on
                tags["mlflow.parentRunId"] = err.run_id
        name = f"{sweep}-{entry['number']:03d}" if entry and trial else sweep
        started = entry["time"] if entry else now_ms()
        made = client.create_run(self.experiment_id, start_time=started, tags=tags, run_name=name)
        return str(made.info.run_id)

    def _common_tags(self) -> dict[str, str]:
        """What all runs of the sweep are tagged with."""
        guard = self._guard_of_sweep()
        tags: dict[str, str] = guard.tree(self._opening()["tags"])
        return tags if guard.on else tags | {IDENTIFIABLE_TAG: "allowed"}

    def _open(self, client: MlflowClient, entry: Entry) -> None:
        self._begin(client, "", entry)

    def _trial(self, client: MlflowClient, entry: Entry) -> None:
        self._begin(client, entry["trial"], entry)

    def _begin(self, client: MlflowClient, trial: str, entry: Entry) -> None:
        """A run begins or goes on."""
        before = self._describe(client, trial, entry)
        for ending in {STATE_TAG, REASON_TAG, PRUNED_TAG} & before.data.tags.keys():
            client.delete_tag(self.runs[trial], ending)
        client.update_run(self.runs[trial], status="RUNNING")

    def _describe(self, client: MlflowClient, trial: str, entry: Entry) -> Run:
        """Params, tags and dataset of a run, which is returned as it was before."""
        run_id = self._run_id(client, trial, entry)
        known = client.get_run(run_id)
        # MLflow refuses to change a param: a run that goes on gets only what it does not have.
        items: list[Item] = [Param(k, v) for k, v in entry["params"].items() if k not in known.data.params]
        tags = self._common_tags() | entry.get("tags", {})
        items += [RunTag(name, value) for name, value in tags.items() if known.data.tags.get(name) != value]
        for batch in batches(items):
            self._log(client, trial, batch)
        if not (known.inputs and known.inputs.dataset_inputs):
            data = self._guard_of_sweep().tree(self._opening()["dataset"])
            client.log_inputs(run_id, [_dataset_input(data, tags.get(SPLIT_TAG, ""))])
        return known

    def _trial_end(self, client: MlflowClient, entry: Entry) -> None:
        trial, run_id = entry["trial"], self._run_id(client, entry["trial"])
        tags = {STATE_TAG: entry["state"]}
        if entry["reason"]:
            tags[REASON_TAG] = entry["reason"]
        if entry["state"] == "pruned":
            tags[PRUNED_TAG] = str(entry.get("epochs", 0))
        self._log(client, trial, [RunTag(name, value) for name, value in tags.items()])
        for name in {REASON_TAG, PRUNED_TAG} & client.get_run(run_id).data.tags.keys() - tags.keys():
            client.delete_tag(run_id, name)  # of an end that was presumed
        # Before its files: should the server refuse one of them, the run has ended all the same.
        client.set_terminated(run_id, status=MLFLOW_STATUS[entry["state"]], end_time=entry["time"])
        if entry.get("trace"):
            client.log_text(run_id, entry["trace"], FAILURE_FILE)
        if entry["folder"]:
            with contextlib.ExitStack() as stack:
                checkpoint = self._folder(entry)
                try:
                    folder = self._trial_files(client, checkpoint, stack)
                except Exception as err:  # whatever is wrong, the others have to be sent
                    if not figures.damaged(checkpoint, err):
                        raise figures.later(err, f"trial {trial}") from err
                    logger.warning("run %s gets no files: %s", run_id, err)
                else:
                    client.log_artifacts(run_id, str(folder))
                    if entry["state"] == "finished":
                        figures.log_model(client, self.experiment_id, run_id, checkpoint)
        self.ended.add(trial)

    def _folder(self, entry: Entry) -> Path:
        """The folder that an entry names, seen from the spool's."""
        here, folder = self.spool.path.parent, Path(entry["folder"])
        # Older spools name it as it was called then; its sweep may have been moved with the spool, and another have
        # taken the old place.
        roots = sorted(self._opening().get("folders", ()), key=len, reverse=True) if folder.is_absolute() else ()
        inside = (here / folder.relative_to(root) for root in roots if folder.is_relative_to(root))
        return next((moved for moved in inside if moved.exists()), here / folder)

    def _trial_files(self, client: MlflowClient, checkpoint: Path, stack: contextlib.ExitStack) -> Path:
        """A trial's artifacts, in a folder that lasts as long as the stack; they take a second to make."""

        def make() -> Path:
            folder = stack.enter_context(figures.trial_files(checkpoint, load_key()))
            self._guard_of_sweep().clean(folder)
            return folder

        made = self._other.submit(make)
        while wait([made], LOOK_AHEAD_S).not_done:
            self._make_runs_ahead(client)
        return made.result()

    def _make_runs_ahead(self, client: MlflowClient) -> None:
        """Makes the runs of trials that have begun meanwhile: the driver waits for them. The rest has its turn."""
        for entry, after in self.spool.unsent(self._looked):
            if entry["kind"] == "open":  # what follows belongs to it
                return
            self._looked = after
            if entry["kind"] == "trial" and entry["trial"] not in self.runs:
                with contextlib.suppress(Exception):  # is raised again in its turn
                    self._run_id(client, entry["trial"], self._guard_of_sweep().entry(entry))

    def _sweep_files(self, client: MlflowClient, entry: Entry) -> None:
        for batch in batches([Metric(name, value, entry["time"], 0) for name, value in entry["metrics"].items()]):
            self._log(client, "", batch)
        with contextlib.ExitStack() as stack:
            try:
                folder = stack.enter_context(self._guard_of_sweep().cleaned(self._folder(entry)))
            except Exception as err:
                raise figures.later(err, "the sweep") from err
            client.log_artifacts(self._run_id(client, ""), str(folder))

    def _sweep_end(self, client: MlflowClient, entry: Entry) -> None:
        self._log(client, "", [RunTag(STATE_TAG, entry["state"])])
        status = MLFLOW_STATUS[entry["state"]]
        client.set_terminated(self._run_id(client, ""), status=status, end_time=entry["time"])


def now_ms() -> int:
    """The time, as MLflow counts it."""
    return int(time.time() * 1000)


def _is_final(err: Exception) -> bool:
    """Whether to send the same again at once would be in vain."""
    return isinstance(err, figures.FilesLater) or refusal(err)


def _dataset_input(data: Mapping[str, Any], split: str) -> DatasetInput:
    """The data that a run read: its digest, how many clips each part has, and which split it was."""
    profile = json.dumps(data.get("clips", {}))
    entity = Dataset(name=data["name"], digest=data["digest"][:36], source_type="local", source="{}", profile=profile)
    tags = {"mlflow.data.context": "training"} | ({SPLIT_TAG: split} if split else {})
    return DatasetInput(dataset=entity, tags=[InputTag(name, value) for name, value in tags.items()])


def experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    """The experiment of this name; made where it is not there, brought back where it was deleted."""
    found = client.get_experiment_by_name(name)
    if found is None:
        store = embedded_path(uri)
        # MLflow's own default is mlruns in the current folder, which is another one in the next process.
        beside = (store.parent / "mlruns" / name).as_uri() if store else None
        try:
            return str(client.create_experiment(name, artifact_location=beside, tags=EXPERIMENT_TAGS))
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
            # another sweep has just made it
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)
