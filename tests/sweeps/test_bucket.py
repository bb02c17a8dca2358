"""sweeps/bucket.py and sweeps/storage.py against a real S3 server."""

import errno
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qafe.errors import ConfigError
from qafe.train import BEST_FILE, STATE_FILE
from sweeps import bucket as bucket_module
from sweeps import command
from sweeps import storage as storage_module
from sweeps.bucket import Bucket, may_pass
from sweeps.callbacks import TrackTrials
from sweeps.checkpoints import SEAL_FILE, newest, seal
from sweeps.command import main
from sweeps.control import Control
from sweeps.driver import _settle
from sweeps.preemption import Preemption
from sweeps.searcher import StudySearcher
from sweeps.status import main as status
from sweeps.stop import main as stop
from sweeps.storage import Storage
from sweeps.studies import STUDIES
from tests.sweeps.object_store import object_store
from tests.sweeps.plans import finish, plan_in
from tests.tracking.stores import embedded


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    folder = tmp_path_factory.mktemp("store")
    with object_store(folder) as (process, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield process


@pytest.fixture
def bucket(store: object) -> Bucket:
    """A new sweep's."""
    return Bucket(f"s3://sweeps/{uuid.uuid4().hex}/", "s-1")


def checkpoint(folder: Path, epoch: int, sealed: bool = True) -> Path:
    (folder / "smile").mkdir(parents=True)
    for name in (STATE_FILE, BEST_FILE):
        (folder / "smile" / name).write_bytes(f"{name} {epoch}".encode())
    (folder / "history.json").write_text(str(epoch))
    if sealed:
        seal(folder, epoch)
    return folder


def upload(bucket: Bucket, folder: Path, place: str) -> None:
    """As Ray Tune does."""
    from pyarrow import fs

    bucket.store.create_dir(f"{bucket.root}/{place}")
    fs.copy_files(str(folder), f"{bucket.root}/{place}", destination_filesystem=bucket.store, use_threads=False)


@pytest.fixture
def filled(bucket: Bucket, tmp_path: Path) -> Bucket:
    """Trial 7 in two attempts, the newest checkpoint half uploaded; trials 70 and 8 beside it."""
    places = {"trial_007/checkpoint_000000": 1, "trial_007/checkpoint_000001": 2, "trial_007.1/checkpoint_000000": 3}
    places |= {"trial_007.10/checkpoint_000000": 4, "trial_070/checkpoint_000005": 6, "trial_008/checkpoint_000000": 1}
    for number, (place, epoch) in enumerate(places.items()):
        upload(bucket, checkpoint(tmp_path / "made" / str(number), epoch), place)
    upload(bucket, checkpoint(tmp_path / "made" / "half", 5, sealed=False), "trial_007.10/checkpoint_000001")
    return bucket


def test_checkpoints_come_newest_first_and_only_those_that_are_asked_for(filled: Bucket, tmp_path: Path) -> None:
    into = tmp_path / "into"
    found = newest(filled.folders(7, into), epochs=9, whole=9)
    assert found == into / "trial_007.10" / "checkpoint_000000"
    assert (found / "smile" / STATE_FILE).read_text() == f"{STATE_FILE} 4"
    assert not (into / "trial_007.1").exists()
    places = [str(path.relative_to(into)) for path in filled.folders(7, into)]
    assert places == [
        "trial_007.10/checkpoint_000001",
        "trial_007.10/checkpoint_000000",
        "trial_007.1/checkpoint_000000",
        "trial_007/checkpoint_000001",
        "trial_007/checkpoint_000000",
    ]
    assert list(filled.folders(3, into)) == []


def test_a_damaged_checkpoint_is_passed_over(filled: Bucket, tmp_path: Path) -> None:
    with filled.store.open_output_stream(f"{filled.root}/trial_007.10/checkpoint_000000/smile/{STATE_FILE}") as out:
        out.write(b"half")
    found = newest(filled.folders(7, tmp_path / "into"), epochs=9, whole=9)
    assert found == tmp_path / "into" / "trial_007.1" / "checkpoint_000000"


def test_the_driver_gets_the_last_whole_checkpoint_without_its_state(filled: Bucket, tmp_path: Path) -> None:
    storage = Storage(tmp_path / "s-1", filled.url)
    last = storage.last(7)
    assert last == tmp_path / "s-1" / "trial_007.10" / "checkpoint_000000"
    assert {path.name for path in last.rglob("*") if path.is_file()} == {BEST_FILE, "history.json", SEAL_FILE}
    assert storage.last(3) is None


def test_an_upload_that_broke_off_is_no_checkpoint(filled: Bucket, tmp_path: Path) -> None:
    torn = checkpoint(tmp_path / "torn", 5)
    (torn / "smile" / BEST_FILE).unlink()
    upload(filled, torn, "trial_007.10/checkpoint_000002")
    storage = Storage(tmp_path / "s-1", filled.url)
    last = storage.last(7)
    assert last == tmp_path / "s-1" / "trial_007.10" / "checkpoint_000000"
    storage.drop_old(7, 1)
    assert storage.thin(7, keep_best=True)
    assert list(filled._places(7)) == ["trial_007.10/checkpoint_000000"]
    assert storage.thin(7, keep_best=False)
    assert set(filled._files("trial_007.10/checkpoint_000000")) == {"history.json", SEAL_FILE}


def test_old_and_superfluous_files_go(filled: Bucket, tmp_path: Path) -> None:
    storage = Storage(tmp_path / "s-1", filled.url)
    storage.drop_old(7, 2)
    half = "trial_007.10/checkpoint_000001"
    assert sorted(filled._places(7)) == ["trial_007.1/checkpoint_000000", "trial_007.10/checkpoint_000000", half]
    storage.drop_old(8, 2)
    assert storage.thin(7, keep_best=True)
    assert list(filled._places(7)) == ["trial_007.10/checkpoint_000000"], "the last whole one"
    storage.last(70)
    assert storage.thin(70, keep_best=True)
    kept = {"history.json", SEAL_FILE, f"smile/{BEST_FILE}"}
    assert set(filled._files("trial_070/checkpoint_000005")) == kept
    assert (tmp_path / "s-1" / "trial_070" / "checkpoint_000005" / "smile" / BEST_FILE).exists()
    assert storage.thin(70, keep_best=False)
    assert set(filled._files("trial_070/checkpoint_000005")) == kept - {f"smile/{BEST_FILE}"}
    assert storage.thin(3, keep_best=True)
    assert set(filled._files("trial_008/checkpoint_000000")) == kept | {f"smile/{STATE_FILE}"}


def test_the_beginning_of_an_epoch_is_left_and_found(bucket: Bucket, tmp_path: Path) -> None:
    storage = Storage(tmp_path / "s-1", bucket.url)
    upload(bucket, checkpoint(tmp_path / "made", 3), "trial_007/checkpoint_000002")
    for after in (2, 3):
        with storage.leaving(7) as folder:
            checkpoint(folder / "x", after, sealed=False).rename(folder / "y")
            seal(folder, after)

    def found(epochs: int) -> tuple[str, str]:
        with storage.at_hand(7, epochs=epochs, whole=9, known=None) as (whole, begun):
            text = (begun / "y" / "smile" / STATE_FILE).read_text() if begun else ""
            return (whole / "history.json").read_text() if whole else "", text

    assert found(3) == ("3", f"{STATE_FILE} 3")
    assert found(2) == ("", ""), "it follows another epoch"
    assert storage.left(7, after=3) == bucket.begun_epoch(7)
    assert storage.left(7, after=2) == storage.left(8, after=3) == ""
    storage.drop_begun(7)
    assert storage.left(7, after=3) == ""
    assert found(3) == ("3", "")


def test_a_store_that_sleeps_is_waited_for(filled: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_module, "RETRY_S", 0.05)
    monkeypatch.setattr(storage_module, "LOOK_S", 0.05)
    storage = Storage(tmp_path / "s-1", filled.url)
    assert storage.bucket is not None
    connected, awake = storage.bucket._connected, threading.Event()

    def connect(_: Bucket) -> object:
        if not awake.is_set():
            raise OSError("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7")
        return connected

    monkeypatch.setattr(Bucket, "_connected", property(connect))
    assert storage.left(7, after=1) == ""
    assert not storage.thin(7, keep_best=True)
    storage.drop_old(7, 1)
    storage.drop_begun(7)
    storage.given_up = lambda: True
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        storage.last(7)
    storage.given_up = lambda: False
    told: list[str] = []

    def hear(text: str) -> None:
        told.append(text)
        awake.set()

    with storage.watched(hear):
        assert storage.last(7) is not None
        for _ in range(100):
            if len(told) == 2:
                break
            time.sleep(0.05)
    assert ["does not answer" in told[0], "answers again" in told[1]] == [True, True]
    assert len(list(filled._places(7))) == 5


def test_a_store_that_refuses_is_not_waited_for(store: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="NO_SUCH_BUCKET") as caught:
        Bucket("s3://nobodys/x", "s-1").leave_begun_epoch(7, checkpoint(tmp_path / "made", 1))
    assert not may_pass(caught.value)
    for kind in (
        "ACCESS_DENIED",
        "INVALID_ACCESS_KEY_ID",
        "SIGNATURE_DOES_NOT_MATCH",
        "UNKNOWN (HTTP status 400)",
    ):
        assert not may_pass(OSError(f"When reading in bucket 'a': AWS Error {kind} during PutObject operation")), kind
    assert may_pass(OSError("When reading in bucket 'ACCESS_DENIED': AWS Error NETWORK_CONNECTION during PutObject"))
    assert not may_pass(OSError(errno.ENOSPC, "No space left on device"))


def test_a_place_has_one_sweep(bucket: Bucket, tmp_path: Path) -> None:
    assert not bucket.check()
    bucket.claim("one")
    bucket.claim("one")
    assert bucket.check()
    with pytest.raises(ConfigError, match="another s-1 is in"):
        bucket.claim("two")
    bucket.release()
    bucket.claim("two")


def test_bad_places_are_refused_in_one_line(
    store: object,
    bucket: Bucket,
    sample_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["fusion_search", "--data-root", str(sample_root), "--preset", "tiny", "--name", "s-1"]
    flags += ["--tracking-uri", embedded(tmp_path)]
    upload(bucket, checkpoint(tmp_path / "made", 1), "trial_000/checkpoint_000000")
    refused = {
        "s3://nobodys/x": "the sweep must be able to use --storage, s3://nobodys/x gives: ",
        "gs://somewhere/x": "--storage must be a folder that all workers see or s3://BUCKET/PREFIX, got gs://somewhere/x",
        "s3://key:secret@sweeps/x": "--storage must hold no password",
        "S3://key:secret@sweeps/x": "--storage must hold no password",
        "s3://key:sec/ret@sweeps/x": "--storage must hold no password",
        "s3://": "s3://BUCKET/PREFIX, got s3://. ",
        "s3://sweeps/a//b": "s3://BUCKET/PREFIX, got s3://sweeps/a//b. ",
        "s3://sweeps/./b": "s3://BUCKET/PREFIX, got s3://sweeps/./b. ",
        "s3://[sweeps/b": "s3://BUCKET/PREFIX, got s3://[sweeps/b. ",
        bucket.url: f"a sweep's name must be new, s-1 is in {bucket.url}",
    }
    for url, line in refused.items():
        assert main([*flags, "--storage", url]) == 2
        said = capsys.readouterr().err
        assert line in said
        assert len(said.strip().splitlines()) == 1
        assert "key:sec" not in said
    monkeypatch.setattr(command, "STORAGE", tmp_path)
    plan_in(tmp_path, "s-1", bucket=bucket.url)
    refused = {"s3://key:secret@sweeps/x": "must hold no password", "s3://sweeps/other": f"are in {bucket.url}, got"}
    for url, line in refused.items():
        assert main(["fusion_search", "--resume", "--name", "s-1", "--storage", url]) == 2
        said = capsys.readouterr().err
        assert line in said
        assert "key:sec" not in said
    assert stop(["s-1", "--storage", "s3://sweeps/x"]) == status(["--storage", "s3://sweeps/x"]) == 2
    assert capsys.readouterr().err.count("a sweep's folder is on the machine that drives it") == 2


def test_who_is_asked_while_tune_ends_a_trial_stays_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[str] = []
    preemption = Preemption()
    monkeypatch.setattr(preemption, "leave", lambda: left.append("left"))

    def trial(error: BaseException | None) -> None:
        with preemption.heeded():
            preemption.asked = True
            if error:
                raise error

    with pytest.raises(SystemExit):
        trial(SystemExit(0))
    assert not left
    with pytest.raises(RuntimeError):
        trial(RuntimeError("the loader's processes are gone"))
    trial(None)
    assert left == ["left", "left"]


def test_each_left_epoch_excuses_one_lost_worker(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    track = TrackTrials.__new__(TrackTrials)
    track.storage, track.control, track._left = storage, Control(tmp_path), {}
    trial: Any = SimpleNamespace(
        config={"number": 7, "epochs": 2}, last_result=None, run_metadata=SimpleNamespace(num_failures=1)
    )

    def leave(after: int) -> None:
        with storage.leaving(7) as folder:
            seal(folder, after, left=uuid.uuid4().hex)

    def failures() -> int:
        trial.run_metadata.num_failures += 1
        track.on_trial_recover(0, [trial], trial)
        return int(trial.run_metadata.num_failures)

    assert failures() == 2
    leave(after=2)
    assert [failures(), failures(), failures()] == [0, 1, 2], "the others had another cause"
    leave(after=2)
    assert failures() == 0
    leave(after=1)
    assert failures() == 1, "it is of an earlier epoch"


def test_what_a_dead_driver_has_not_told_is_told(filled: Bucket, tmp_path: Path) -> None:
    plan = plan_in(tmp_path, bucket=filled.url)
    searcher = StudySearcher(plan, STUDIES["fusion_search"])
    for number in range(9):
        searcher.suggest(str(number))
    for number in (7, 8):
        finish(searcher, str(number), 0.5)
    told: list[tuple[str, str, Path | None]] = []
    tracker: Any = SimpleNamespace(
        ended_as=lambda trial: "finished" if trial == "8" else None,
        trial_ended=lambda trial, state, *, folder, reason: told.append((trial, state, folder)),
    )
    checkpoint(Path(plan.folder) / "trial_007" / "checkpoint_000001", 2)  # fetched when it was interrupted
    _settle(plan, searcher.study, tracker, Storage(Path(plan.folder), plan.bucket))
    fetched = Path(plan.folder) / "trial_007.10" / "checkpoint_000000"
    assert told == [("7", "finished", fetched)]
    assert (fetched / "smile" / BEST_FILE).exists()
    assert (Path(plan.folder) / "trial_008" / "checkpoint_000000" / "history.json").exists()
