"""One sweep from its plan to its report: Ray Tune runs the trials, Optuna chooses them, MLflow sees all of it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import optuna
from optuna.trial import TrialState as StudyState
from ray import tune

from qafe import console, dotted
from qafe.data.cohort import Cohort, load_cohort
from qafe.errors import ConfigError, QafeError
from qafe.filesystem import check_folder
from tracking.connection import check_place, embedded_path, masked
from tracking.guard import Secrets
from tracking.runs import SPOOL_FILE, SweepTracker, TrialState

from . import checkpoints, cluster, page, report
from .callbacks import KeepCheckpoints, MeasurePace, StopWhenAsked, TellPeople, TrackTrials, WaitForRoom, say
from .control import Control
from .folder import LOCK_FILE, REPORT_FOLDER, find_sweep, storage_flag
from .interruption import INTERRUPTION
from .live import LiveView
from .notify import Outcome, notified
from .placement import places
from .plan import STUDY_FOLDER, Plan, study_tags, sweep_params
from .preemption import preemptible
from .provenance import source_tags, sweep_tags, write_diff
from .refresh import RefreshReport
from .results import OBJECTIVE
from .searcher import Pause, StudyScheduler, StudySearcher, budget_used
from .storage import Storage
from .study import BY_HAND, give_up, link_runs, own_trials, running_trials
from .supervisor import NOTES
from .sweep import Sweep
from .timeline import NoteWorkers
from .trial import TrialPlan, train_trial

WORKER_RESTARTS = 3
"""How often a trial may lose its worker between two epochs; see `callbacks.TrackTrials`."""
PAUSED_POLL_S = 0.25
INTERRUPTED = "sweep interrupted"
"""The reason of a trial that its sweep's end has left unfinished."""
LOCK_TRIES = 10
SENT_WITHIN_S = 60.0
"""How long the end of a sweep waits for what the tracking server has not taken yet."""
HURRIED_S = 8.0
"""The same, where somebody ends the sweep: what is not sent by then is for a replay."""
SOURCE_FOLDER = "source"
"""Of the sweep's folder: what differs from the commit that its runs name."""


def run_sweep(
    plan: Plan, sweep: Sweep, *, address: str | None = None, json_file: Path | None = None, notify: str | None = None
) -> int:
    """Runs a planned sweep, or what is left of it, to its report, and returns the exit status.

    Args:
        address: of a Ray cluster.
        json_file: where the summary is written, too.
        notify: URL that hears how the sweep ended.

    Raises:
        KeyboardInterrupt: the sweep was ended early, and its runs are closed.
        ConfigError: the Ray cluster cannot be reached or has no room for a trial, the sweep is running already, its
            data has changed, or a place will not do for it.
        ManifestError: the dataset is gone.
        QafeError: a trial found data that cannot be read, or none finished.
    """
    config = dotted.from_json(plan.config_json)
    folder = Path(plan.folder)
    cohort = load_cohort(plan.data_root, config.data)
    if cohort.manifest.digest != plan.data_digest:
        raise ConfigError(
            f"a sweep must go on with the data that it began with, {plan.data_root} is not that, or has changed since. "
            "Name the place of that data (--data-root), or start a new sweep."
        )
    _check_places(plan)
    clips = cohort.clip_counts(plan.expressions)
    say(
        f"sweep {plan.name}: {plan.trials} trials of {config.preset} on {', '.join(plan.expressions)} "
        f"({', '.join(f'{count} {part}' for part, count in clips.items())} clips of {plan.data_root})"
    )
    with notified(notify, plan) as outcome:
        with _only_driver(folder, outcome), cluster.joined(address) as gone:
            at_once = places(plan)
            with _tracked(plan, cohort) as tracker:
                NOTES.tell(folder=plan.folder, address=address, notify=notify)
                plan.save()  # what has been extended: from here on nothing refuses it
                summary = outcome.summary = _search(plan, sweep, cohort, tracker, gone, at_once)
        _print_summary(summary, plan)
        if json_file:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = json_file.with_name(json_file.name + ".unfinished")
            unfinished.write_text(json.dumps(summary, indent=2) + "\n")
            unfinished.replace(json_file)
    return 0


def end_early(plan: Plan, address: str | None, reason: str = "") -> int:
    """Says how a sweep that was ended early goes on, and returns the exit status.

    Args:
        reason: what has ended it, where it was not somebody's wish.
    """
    folder = Path(plan.folder)
    line = f"python -m sweeps.run {plan.study} --resume --name {folder.name}"
    line += (f" --address {address}" if address else "") + storage_flag(folder)
    how = "interrupted" + (f", for {reason}" if reason else "")
    if find_sweep(folder.parent, folder.name).complete:
        say(f"{how}; {plan.name} is complete, its report is in {folder / REPORT_FOLDER}")
    else:
        say(f"{how}; go on with:  {line}")
    return console.USER_ERROR if reason else console.INTERRUPTED


def close_for(notes: Mapping[str, Any], reason: str) -> int:
    """Closes the runs of a driver that has died, says how its sweep goes on, and returns the exit status.

    Args:
        notes: what it told `supervisor`.
        reason: what has ended it.
    """
    plan = Plan.load(Path(notes["folder"]))
    try:
        with notified(notes["notify"], plan) as outcome, _only_driver(Path(plan.folder), outcome):
            if (tracker := SweepTracker.again(Path(plan.folder) / SPOOL_FILE)) is not None:
                _close(tracker, "killed")
            raise KeyboardInterrupt  # so is it told
    except ConfigError:  # somebody has gone on with it already
        return console.USER_ERROR
    except KeyboardInterrupt:
        pass
    return end_early(plan, notes["address"], reason)


def _check_places(plan: Plan) -> None:
    """Refuses places that would lose what a sweep writes there; says what is to be known of them."""
    for uri, flag in ((plan.tracking_uri, "--tracking-uri"), (plan.study_storage, "--study-storage")):
        check_place(uri, flag)
    if note := check_folder(Path(plan.folder), "--storage"):
        say(note)


@contextlib.contextmanager
def _tracked(plan: Plan, cohort: Cohort) -> Iterator[SweepTracker]:
    """The sweep's tracker; its runs are closed with the block, whatever ends it."""
    spool = Path(plan.folder) / SPOOL_FILE
    tracker = SweepTracker(
        spool,
        uri=plan.tracking_uri,
        experiment=plan.study,
        sweep=plan.name,
        sweep_id=plan.id,
        params=sweep_params(plan),
        tags=source_tags() | sweep_tags(plan, cohort) | study_tags(plan),
        dataset=(cohort.manifest.name, cohort.manifest.digest),
        clips=cohort.clip_counts(plan.expressions),
        secrets=Secrets.of_cohort(cohort, plan.folder, Path(plan.folder).parent),
        identifiable=plan.identifiable,
    )
    if (Path(plan.folder) / STUDY_FOLDER).is_dir():
        tracker.sweep_files(Path(plan.folder) / STUDY_FOLDER, {})
    if write_diff(Path(plan.folder) / SOURCE_FOLDER):
        tracker.sweep_files(Path(plan.folder) / SOURCE_FOLDER, {})
    state: TrialState = "failed"
    try:
        yield tracker
        state = "finished"
    except KeyboardInterrupt:
        state = "killed"
        raise
    finally:
        _close(tracker, state)
        NOTES.tell(closed=True)


def _close(tracker: SweepTracker, state: TrialState) -> None:
    tracker.sweep_ended(state)
    if unsent := tracker.close(HURRIED_S if state == "killed" else SENT_WITHIN_S):
        say(
            f"{unsent} entries did not reach the tracking server; send them later with:  "
            f"python -m tracking.runs replay {tracker.spool.path}"
        )
    if refused := tracker.refused:
        say(f"{refused} entries were set aside; they and the reasons are in {tracker.spool.path}.refused")


def _search(
    plan: Plan, sweep: Sweep, cohort: Cohort, tracker: SweepTracker, gone: cluster.Gone, at_once: int
) -> dict[str, Any]:
    """All trials, then the report; KeyboardInterrupt if people ended the trials early."""
    started = time.monotonic()
    control, storage = Control(Path(plan.folder)), Storage(Path(plan.folder), plan.bucket)
    storage.given_up = lambda: control.stopped
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(at_once)  # else Ray starts one worker after the other
    searcher = StudySearcher(plan, sweep, at_once)
    deadline = math.inf if plan.time_budget_s is None else started + plan.time_budget_s
    refresh = RefreshReport(plan, cohort, tracker)
    with INTERRUPTION.deferred(), storage.watched(say):
        _settle(plan, searcher.study, tracker, storage)
        with cluster.watched(gone):
            _run_and_pause(plan, cohort, searcher, tracker, control, storage, deadline, refresh)
        refresh.close(wait=not INTERRUPTION.asked)
        if searcher.closed and searcher.closed.kind == "storage":
            raise _storage_error(plan, searcher.closed.reason)
        budget_spent = time.monotonic() >= deadline
        running = running_trials(searcher.study)
        for number in running:
            state: TrialState = "pruned" if budget_spent else "killed"
            reason = "the sweep's time budget was spent" if budget_spent else INTERRUPTED
            folder = None
            with contextlib.suppress(OSError):
                storage.given_up = lambda: True
                folder = storage.last(number)
            tracker.trial_ended(str(number), state, folder=folder, reason=reason)
    storage.given_up = lambda: control.stopped
    if budget_spent:
        give_up(searcher.study, "the sweep's time budget was spent")
    elif searcher.closed and searcher.closed.kind == "data":
        raise QafeError(f"{searcher.closed.reason} The sweep has stopped, for every trial would find it.")
    elif INTERRUPTION.asked or running or (not searcher.closed and len(own_trials(searcher.study)) < plan.trials):
        raise KeyboardInterrupt
    ended_by = searcher.closed.reason if searcher.closed else ""
    _settle(plan, searcher.study, tracker, storage)
    return _report(plan, cohort, searcher.study, tracker, time.monotonic() - started, ended_by)


def _settle(plan: Plan, study: optuna.Study, tracker: SweepTracker, storage: Storage) -> None:
    """Fetches what is not here yet of ended trials, and tells the tracker what it has not heard of their ends.

    A driver may have died between the study and the tracker, or while the bucket was away.
    """
    for trial in own_trials(study, (StudyState.COMPLETE, StudyState.PRUNED, StudyState.FAIL)):
        name, state = str(trial.number), cast(TrialState, report.state_of(trial))
        heard = tracker.ended_as(name) == state
        try:
            here = checkpoints.last(storage.folder, trial.number) if heard else None  # it may be of an earlier driver
            folder = here or storage.last(trial.number)
        except OSError as err:
            raise _storage_error(plan, f"--storage gives: {' '.join(str(err).split())}.") from err
        if not heard:
            tracker.trial_ended(name, state, folder=folder, reason=report.failure_of(trial))


def _storage_error(plan: Plan, reason: str) -> QafeError:
    return QafeError(f"{reason} Nothing is lost: mend that, then go on with --resume --name {plan.name}.")


def _run_and_pause(
    plan: Plan,
    cohort: Cohort,
    searcher: StudySearcher,
    tracker: SweepTracker,
    control: Control,
    storage: Storage,
    deadline: float,
    *more: tune.Callback,
) -> None:
    """Runs trials, with all the pauses that people ask for, until none is left or the sweep has to end."""
    pause, pace = Pause(searcher, control), MeasurePace(plan, searcher.study)
    people = LiveView(plan, pace, control) if LiveView.possible() else TellPeople(pace)
    callbacks = [
        NoteWorkers(searcher),
        TrackTrials(tracker, plan, cohort, searcher, control, storage),
        KeepCheckpoints(tracker, plan, searcher.study, storage),
        WaitForRoom(control),
        pause,
        pace,
        people,
        *more,
    ]
    with people:
        while True:
            interrupted = _tune(plan, searcher, pause, control, storage, callbacks, deadline - time.monotonic())
            searcher.rest()
            pace.begin()
            if interrupted or control.stopped or searcher.closed or not (pause.complete and searcher.left):
                return
            say(f"paused; go on with:  python -m sweeps.continue {plan.name}{storage_flag(Path(plan.folder))}")
            while control.paused and not control.stopped and time.monotonic() < deadline:
                _stop_resting(plan, searcher, tracker, control, storage)
                people.look()
                time.sleep(PAUSED_POLL_S)
            if control.stopped or time.monotonic() >= deadline:
                return
            say("going on")
            searcher.begin()


def _stop_resting(
    plan: Plan, searcher: StudySearcher, tracker: SweepTracker, control: Control, storage: Storage
) -> None:
    """Ends the trials of a paused sweep that people stop."""
    for number in running_trials(searcher.study):
        if control.trial_stopped(number):
            try:
                folder = storage.last(number)
            except OSError as err:
                raise _storage_error(plan, f"--storage gives: {' '.join(str(err).split())}.") from err
            tracker.trial_ended(str(number), "pruned", folder=folder, reason=BY_HAND)
            give_up(searcher.study, BY_HAND, only=number)


def _tune(
    plan: Plan,
    searcher: StudySearcher,
    pause: Pause,
    control: Control,
    storage: Storage,
    callbacks: list[tune.Callback],
    budget_s: float,
) -> bool:
    """Runs trials until the study has all that are planned, or people or the time budget stop it.

    Returns:
        Whether somebody ended the sweep.
    """
    try:
        storage.wait_until_it_answers()
        tune.run(
            preemptible(tune.with_parameters(train_trial, plan=TrialPlan.of(plan))),
            name=Path(plan.folder).name,
            storage_path=plan.bucket or str(Path(plan.folder).parent),
            num_samples=-1,  # the searcher knows when there are enough
            search_alg=searcher,
            scheduler=StudyScheduler(searcher, control, pause),
            resources_per_trial={"cpu": plan.cpus_per_trial, "gpu": plan.gpus_per_trial},
            time_budget_s=None if math.isinf(budget_s) else max(budget_s, 0.1),
            stop=StopWhenAsked(searcher, control, pause),
            max_failures=WORKER_RESTARTS,
            raise_on_failed_trial=False,
            reuse_actors=True,
            callbacks=callbacks,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
            verbose=0,
        )
    except KeyboardInterrupt:  # of `callbacks.StopWhenAsked`
        return True
    except tune.TuneError as err:
        if "StorageInternalError" not in str(err):
            raise
        raise QafeError(
            f"the study's database must answer, it stopped in the middle of {plan.name} (--study-storage). Start it "
            f"again, then go on with --resume --name {plan.name}."
        ) from err
    except (OSError, ValueError) as err:  # Tune lists the bucket when it ends
        if storage.bucket is None or (isinstance(err, ValueError) and "snapshot" not in str(err)):
            raise
        raise _storage_error(plan, f"--storage gives: {' '.join(str(err).split())}.") from err
    return False


def _trial_name(trial: Any) -> str:
    return checkpoints.trial_name(trial.config["number"], trial.config["attempt"])


def _report(
    plan: Plan, cohort: Cohort, study: optuna.Study, tracker: SweepTracker, seconds: float, ended_by: str
) -> dict[str, Any]:
    """Tests the best trial once, writes the report and hands it to the tracker."""
    folder = Path(plan.folder)
    tracker.wait_until_sent(patience_s=60)
    runs = {int(trial): run for trial, run in tracker.run_ids().items() if trial}
    link_runs(study, runs)
    trials = report.summarise(study, folder, runs)
    best = report.best_trial(trials)
    if best is None:
        raise QafeError(
            f"a sweep needs one finished trial to report, {plan.name} has none of {len(trials)}. "
            f"See the failures in {plan.folder} and in the MLflow UI."
        )
    summary = report.sum_up(plan, cohort, trials, best, seconds)
    summary["ended_by"] = ended_by
    summary["training_hours"] = budget_used(study, plan)
    summary["mlflow"] = {"experiment_id": tracker.experiment_id, "run_id": tracker.run_ids().get("", "")}
    place = folder / REPORT_FOLDER
    page.write_report(place, trials, report.importances(study), summary, report.log_settings(study))
    numbers = {OBJECTIVE: summary["best"][OBJECTIVE], "trials": float(len(trials))}
    if luck := summary["luck"]:
        numbers |= {"luck_threshold": luck["threshold"], "luck_p_value": luck["p_value"]}
    if (test := summary["best"]["test_spearman"]) is not None:
        numbers["test_spearman"] = test
        tracker.trial_metrics(str(best.number), {"test_spearman": test})
    tracker.sweep_files(place, numbers)
    return summary


def _print_summary(summary: dict[str, Any], plan: Plan) -> None:
    page.print_table(summary)
    uri = plan.tracking_uri
    if uri.startswith("http"):
        print(f"Open the UI:      {masked(uri)}/#/experiments/{summary['mlflow']['experiment_id']}/runs")
    else:
        beside = embedded_path(uri)
        same = beside is not None and beside.parent == Path.cwd()
        command = "python -m tracking.server" + ("" if same else f" --backend {masked(uri)}")
        print(f"Open the UI:      {command}    then http://127.0.0.1:5000")
    print(f"Register it:      python -m tracking.registry register --sweep {plan.name}")


@contextlib.contextmanager
def _only_driver(folder: Path, outcome: Outcome) -> Iterator[None]:
    """Holds the sweep for this process: two drivers would write to one study."""
    with open(folder / LOCK_FILE, "w") as lock:
        for left in reversed(range(LOCK_TRIES)):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as err:
                if not left:
                    raise ConfigError(
                        f"a sweep has one driver, {folder.name} is running already. Wait for it."
                    ) from err
                time.sleep(0.1)  # somebody may only be looking whether it runs
        outcome.begun = True
        Control(folder).clear()  # from here on people may ask for something
        yield
