"""qafe/data/cache.py: made once, shared, never stale, and never in the way."""

import contextlib
import errno
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from qafe.__main__ import main
from qafe.config import Config, tiny
from qafe.data import cache as module
from qafe.data.cache import FrameCache, cache_folder, cache_size, clear_cache, identity
from qafe.data.cohort import load_cohort
from qafe.data.dataset import ClipDataset, collate
from qafe.data.manifest import read_manifest
from qafe.dotted import override
from qafe.store import Store
from qafe.train import EpochResult, fit
from tests.conftest import QUICK_FLAGS
from tests.data.cohort import video_frames, video_landmarks, write_cohort

ROOT = Path(__file__).parents[2]
SIZE = 32
VIDEO = ("P1", "clip01smile")
BYTES = 12 * SIZE**2 * 3


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own, with nothing said or mapped before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    module._said[0] = 0
    module._mapped.cache_clear()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write_cohort(tmp_path / "data")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every call of `Store.read_frames`, as (patient, video)."""
    seen = []
    read = Store.read_frames
    monkeypatch.setattr(Store, "read_frames", lambda *args: [seen.append(args[1:3]), read(*args)][1])
    return seen


def decoded(store: Store, video: tuple[str, str] = VIDEO) -> np.ndarray:
    return store.read_frames(*video, range(12), SIZE)


def config(cache_gb: float = 1.0, **settings: object) -> Config:
    return override(tiny(), {"data.cache_gb": cache_gb, "data.repeats": 3, **settings})


def clips(store: Store, settings: Config) -> ClipDataset:
    return ClipDataset(store, read_manifest(store).train, settings, train=True)


def files() -> list[str]:
    return sorted(os.listdir(cache_folder()))


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_a_video_is_decoded_once_and_mapped_after(store: Store, reads: list[tuple[str, str]]) -> None:
    first = FrameCache(1).frames(store, *VIDEO, SIZE)
    again = FrameCache(1).frames(store, *VIDEO, SIZE)
    assert len(reads) == 1
    np.testing.assert_array_equal(first, decoded(store))
    np.testing.assert_array_equal(again, first)
    assert not first.flags.writeable
    assert files() == [f"{identity(store, *VIDEO, SIZE)}.rgb"]
    assert cache_size() == (1, BYTES)


def test_only_the_user_can_look_into_it(store: Store) -> None:
    FrameCache(1).frames(store, *VIDEO, SIZE)
    assert cache_folder().stat().st_mode & 0o077 == 0
    assert (cache_folder() / files()[0]).stat().st_mode & 0o077 == 0


def test_long_videos_are_written_in_parts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BUILD_FRAMES", 5)
    np.testing.assert_array_equal(FrameCache(1).frames(store, *VIDEO, SIZE), decoded(store))


@pytest.mark.parametrize("augment", [True, False])
def test_cached_and_uncached_clips_are_equal_bit_for_bit(store: Store, augment: bool) -> None:
    flip = {"data.augment.flip": 1.0} if augment else {}
    cached, uncached = clips(store, config(**flip)), clips(store, config(0, **flip))
    for epoch in range(2):
        cached.set_epoch(epoch)
        uncached.set_epoch(epoch)
        for index in range(len(cached)):
            ours, theirs = collate([cached[index]]), collate([uncached[index]])
            assert torch.equal(ours.rgb, theirs.rgb)
            assert ours.points is not None
            assert theirs.points is not None
            assert torch.equal(ours.points, theirs.points)
    assert len(files()) == 8


def test_runs_give_the_same_numbers_cached_or_not_and_resumed_in_the_middle(
    sample_root: Path, quick: Config, tmp_path: Path
) -> None:
    def run(settings: dict[str, object], resume_from: Path | None = None) -> list[EpochResult]:
        chosen = override(quick, settings)
        part = load_cohort(sample_root, chosen.data).only("smile")
        results = []
        for result in fit(
            chosen, part.store, part.train, part.validation, device=torch.device("cpu"), resume_from=resume_from
        ):
            result.save(tmp_path / f"{len(settings)}{result.epoch}")
            results.append(result)
        return results

    plain = run({"data.cache_gb": 0})
    assert not cache_folder().exists()
    building = run({})
    clear_cache()
    workers = run({"data.cache_gb": 1, "data.workers": 2})
    resumed = run({}, resume_from=tmp_path / "01")
    for other in (building, workers, [plain[0], *resumed]):
        assert [result.train_loss for result in other] == [result.train_loss for result in plain]
        for ours, theirs in zip(other, plain, strict=True):
            np.testing.assert_array_equal(ours.predictions, theirs.predictions)
    assert cache_size()[0] > 0


def test_the_command_shows_and_clears_it(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache"]) == 0
    assert capsys.readouterr().out == f"{cache_folder()}: 0 videos, 0.00 GiB\n"
    FrameCache(1).frames(store, *VIDEO, 1024)
    assert main(["cache"]) == 0
    assert capsys.readouterr().out == f"{cache_folder()}: 1 videos, 0.04 GiB\n"
    assert main(["cache", "--clear"]) == 0
    assert files() == []


def test_train_goes_without_it(sample_root: Path) -> None:
    line = ["train", "--data-root", str(sample_root), "--preset", "tiny", *QUICK_FLAGS, "--set", "train.epochs=1"]
    assert main([*line, "--no-cache"]) == 0
    assert not cache_folder().exists()
    assert main(line) == 0
    assert cache_size()[0] > 0


def test_no_cache_leaves_nothing_on_disk(store: Store) -> None:
    clips(store, config(0))[0]
    assert not cache_folder().exists()


def test_loader_workers_share_it(store: Store) -> None:
    expected = [collate([clip]).rgb for clip in map(clips(store, config(0)).__getitem__, range(24))]
    for _ in range(2):
        loader = DataLoader(clips(store, config()), batch_size=1, collate_fn=collate, num_workers=2)
        assert all(torch.equal(batch.rgb, rgb) for batch, rgb in zip(loader, expected, strict=True))
    assert len(files()) == 8
    assert all(name.endswith(".rgb") for name in files())


def _read_all(root: Path, start: object) -> list[int]:
    start.wait()  # type: ignore[attr-defined]
    store, cache = Store(root), FrameCache(1)
    sums = []
    for patient, video in store.videos():
        frames = cache.frames(store, patient, video, SIZE)
        whole = decoded(store, (patient, video)) if frames is None else frames
        sums.append(int(whole.astype(np.int64).sum()))
    return sums


def test_several_processes_build_it_at_once(store: Store) -> None:
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager, context.Pool(6) as pool:
        start = manager.Barrier(6)
        answers = pool.starmap(_read_all, [(store.root, start)] * 6, chunksize=1)
    expected = [int(decoded(store, video).astype(np.int64).sum()) for video in store.videos()]
    assert answers == [expected] * 6
    # Who was refused a video has read its JPEGs; who came first has left it whole.
    assert len(files()) == len(expected)
    for patient, video in store.videos():
        np.testing.assert_array_equal(
            FrameCache(1).frames(store, patient, video, SIZE), decoded(store, (patient, video))
        )


def test_one_builds_while_others_read_jpegs(store: Store, reads: list[tuple[str, str]]) -> None:
    path = cache_folder() / f".{identity(store, *VIDEO, SIZE)}.building"
    path.parent.mkdir(parents=True)
    with module._only_builder(path) as descriptor:
        assert descriptor is not None
        assert FrameCache(1).frames(store, *VIDEO, SIZE) is None
        assert reads == []
    assert FrameCache(1).frames(store, *VIDEO, SIZE) is not None
    assert files() == [f"{identity(store, *VIDEO, SIZE)}.rgb"]


def test_a_builder_that_comes_late_does_not_touch_the_finished_video(store: Store, tmp_path: Path) -> None:
    beside, done = tmp_path / ".a.building", tmp_path / "a.rgb"
    late = os.open(beside, os.O_RDWR | os.O_CREAT)
    beside.rename(done)
    original = os.open
    try:
        os.open = lambda *_args, **_keywords: os.dup(late)  # type: ignore[assignment]
        with module._only_builder(beside) as descriptor:
            assert descriptor is None
    finally:
        os.open = original
        os.close(late)


def test_a_builder_that_is_done_leaves_the_next_ones_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename
    with contextlib.ExitStack() as other:

        def renamed(beside: Path, path: Path) -> Path:
            done = rename(beside, path)
            assert other.enter_context(module._only_builder(beside)) is not None
            return done

        monkeypatch.setattr(Path, "rename", renamed)
        assert FrameCache(1).frames(store, *VIDEO, SIZE) is not None
        name = identity(store, *VIDEO, SIZE)
        assert files() == [f".{name}.building", f"{name}.rgb"]


def test_a_builder_whose_file_was_deleted_publishes_no_other_ones(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, half = Store.read_frames, cache_folder() / f".{identity(store, *VIDEO, SIZE)}.building"
    with contextlib.ExitStack() as other:

        def replaced(*args: object) -> np.ndarray:
            half.unlink()
            assert other.enter_context(module._only_builder(half)) is not None
            half.write_bytes(bytes(BYTES // 2))
            return read(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(Store, "read_frames", replaced)
        assert FrameCache(1).frames(store, *VIDEO, SIZE) is None
        assert files() == [half.name]
        assert half.stat().st_size == BYTES // 2


@pytest.mark.parametrize("how", ["clear", "room"])
def test_what_is_being_built_is_not_deleted(how: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    FrameCache(1).frames(store, *store.videos()[2], SIZE)
    (other,) = cache_folder().iterdir()
    read = Store.read_frames
    whole = decoded(store)
    monkeypatch.setattr(module, "_BUILD_FRAMES", 5)

    def cleared(*args: object) -> np.ndarray:
        frames = read(*args)  # type: ignore[arg-type]
        for path in cache_folder().iterdir():
            age(path, 2 * module.IN_USE_S)
        if how == "clear":
            clear_cache()
        else:
            FrameCache(1)._make_room(2**30 - 1)
        return frames

    monkeypatch.setattr(Store, "read_frames", cleared)
    found = FrameCache(1).frames(store, *VIDEO, SIZE)
    assert not other.exists()
    np.testing.assert_array_equal(found, whole)


def test_kill_9_in_the_middle_leaves_nothing_that_is_read(store: Store) -> None:
    script = (
        "import sys, time; from qafe.store import Store; from qafe.data import cache\n"
        "cache._BUILD_FRAMES = 5; read = Store.read_frames\n"
        "def slow(self, patient, video, indices, size_px):\n"
        "    if indices[0]: print('half', flush=True); time.sleep(60)\n"
        "    return read(self, patient, video, indices, size_px)\n"
        "Store.read_frames = slow\n"
        f"cache.FrameCache(1).frames(Store(sys.argv[1]), *{VIDEO}, {SIZE})\n"
    )
    line = [sys.executable, "-c", script, str(store.root)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        assert FrameCache(1).frames(store, *VIDEO, SIZE) is None, "it is being built"
        process.send_signal(signal.SIGKILL)
    name = identity(store, *VIDEO, SIZE)
    assert files() == [f".{name}.building"]
    np.testing.assert_array_equal(FrameCache(1).frames(store, *VIDEO, SIZE), decoded(store))
    assert files() == [f"{name}.rgb"]


def test_rewritten_frames_are_read_anew(store: Store) -> None:
    running = FrameCache(1)
    before = running.frames(store, *VIDEO, SIZE)
    store.write_video(*VIDEO, video_frames(99, 12), video_landmarks(99, 12))
    for cache in (running, FrameCache(1)):
        after = cache.frames(store, *VIDEO, SIZE)
        np.testing.assert_array_equal(after, decoded(store))
        assert not np.array_equal(after, before)


def test_a_frame_changed_in_place_is_read_anew_by_the_next_run(store: Store) -> None:
    FrameCache(1).frames(store, *VIDEO, SIZE)
    first, last = store.frame_paths(*VIDEO)[0], store.frame_paths(*VIDEO)[-1]
    kept = first.stat()
    first.write_bytes(last.read_bytes().ljust(kept.st_size, b"\0"))
    assert first.stat().st_size == kept.st_size
    os.utime(first, ns=(kept.st_atime_ns, kept.st_mtime_ns))  # as rsync would: the time of change tells all the same
    np.testing.assert_array_equal(FrameCache(1).frames(store, *VIDEO, SIZE), decoded(store))


def test_frames_that_change_while_they_are_read_are_not_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Store.read_frames

    def rewritten(self: Store, *args: object) -> np.ndarray:
        frames = read(self, *args)  # type: ignore[arg-type]
        self.write_video(*VIDEO, video_frames(98, 12), video_landmarks(98, 12))
        return frames

    monkeypatch.setattr(Store, "read_frames", rewritten)
    assert FrameCache(1).frames(store, *VIDEO, SIZE) is None
    assert files() == []


def test_the_longest_unused_make_room_and_those_in_use_stay(
    store: Store, reads: list[tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    limit_gb = 2.5 * BYTES / 2**30
    videos = store.videos()[:4]
    for video in videos[:2]:
        FrameCache(limit_gb).frames(store, *video, SIZE)
    oldest, other = (cache_folder() / f"{identity(store, *video, SIZE)}.rgb" for video in videos[:2])
    age(oldest, 2 * module.IN_USE_S)
    age(other, module.IN_USE_S / 2)
    mapped = FrameCache(0).frames(store, *videos[1], SIZE)
    with caplog.at_level(logging.WARNING):
        assert FrameCache(limit_gb).frames(store, *videos[2], SIZE) is not None
        assert not oldest.exists()
        assert caplog.text == ""
        late = FrameCache(limit_gb)
        reads.clear()
        for _ in range(3):
            assert late.frames(store, *videos[3], SIZE) is None
        assert FrameCache(limit_gb).frames(store, *videos[0], SIZE) is None
    assert reads == []
    assert len(caplog.records) == 1, "it is said once"
    assert "has reached its limit" in caplog.text
    assert "data.cache_gb" in caplog.text
    assert cache_size() == (2, 2 * BYTES)
    clear_cache()
    assert cache_size() == (0, 0)
    np.testing.assert_array_equal(mapped, decoded(store, videos[1]))  # What is mapped outlives its file.


def test_reading_counts_as_use(store: Store) -> None:
    FrameCache(1).frames(store, *VIDEO, SIZE)
    (path,) = cache_folder().iterdir()
    age(path, 2 * module.IN_USE_S)
    FrameCache(1).frames(store, *VIDEO, SIZE)
    assert path.stat().st_mtime > time.time() - 60


def test_what_killed_builders_left_is_counted_and_makes_room(store: Store) -> None:
    cache_folder().mkdir(parents=True)
    left = cache_folder() / ".0123.building"
    left.write_bytes(bytes(BYTES))
    age(left, 2 * module.IN_USE_S)
    assert cache_size() == (0, BYTES)
    assert FrameCache(1.5 * BYTES / 2**30).frames(store, *VIDEO, SIZE) is not None
    assert not left.exists()


@pytest.mark.parametrize("case", ["write", "fsync", "folder", "reserve"])
def test_a_full_disk_costs_one_line_and_no_clip(
    case: str, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if case == "write":
        monkeypatch.setattr(module.os, "ftruncate", full)
    elif case == "fsync":
        monkeypatch.setattr(module.os, "fsync", full)
    elif case == "folder":
        cache_folder().parent.mkdir(parents=True)
        cache_folder().write_text("a file where the folder should be")
    else:
        monkeypatch.setattr(module, "FREE_SHARE", 1.0)
    with caplog.at_level(logging.WARNING):
        ours, plain = clips(store, config()), clips(store, config(0))
        for index in range(len(ours)):
            assert torch.equal(ours[index].rgb, plain[index].rgb)
    assert len(caplog.records) == 1
    words = {"reserve": "of the disk free", "folder": "cannot be"}.get(case, "No space left on device")
    assert words in caplog.text
    assert case == "folder" or files() == []


@pytest.mark.parametrize("content", [b"not whole frames", bytes(BYTES // 2), bytes(2 * BYTES), b""])
def test_a_damaged_file_is_made_again(store: Store, content: bytes) -> None:
    FrameCache(1).frames(store, *VIDEO, SIZE)
    module._mapped.cache_clear()
    (path,) = cache_folder().iterdir()
    path.write_bytes(content)
    np.testing.assert_array_equal(FrameCache(1).frames(store, *VIDEO, SIZE), decoded(store))
