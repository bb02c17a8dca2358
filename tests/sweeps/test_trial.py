"""sweeps/trial.py: what goes wrong in a trial gets its class and one line."""

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from qafe import dotted
from qafe.config import Config
from qafe.errors import CheckpointError, ConfigError, ManifestError
from qafe.machine_errors import TROUBLES, Cure
from qafe.train import BEST_FILE, STATE_FILE
from sweeps import trial
from sweeps.checkpoints import preempted, seal
from sweeps.control import Control
from sweeps.results import FAILED_AS
from sweeps.study import REASON
from sweeps.trial import DATA, ERROR, MACHINE, MEMORY, REFUSED, Away, TrialPlan, train_trial


@pytest.mark.parametrize(
    ("err", "kind"),
    [
        (CheckpointError("a run resumes in the precision that it was started in"), REFUSED),
        (ConfigError("no"), REFUSED),
        (ManifestError("no"), DATA),
        (RuntimeError("no"), ERROR),
        (torch.OutOfMemoryError("CUDA out of memory"), MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), MEMORY),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_failure_has_a_class(quick: Config, monkeypatch: pytest.MonkeyPatch, err: Exception, kind: str) -> None:
    def fail(*_: object) -> None:
        raise err

    (report,) = told_of(quick, monkeypatch, fail)
    assert report[FAILED_AS] == kind
    assert "\n" not in report[REASON]
    if kind != MEMORY:  # Which halves the batch until there is one clip.
        assert report[REASON] == f"{type(err).__name__}: {err}"


def told_of(quick: Config, monkeypatch: pytest.MonkeyPatch, train: Any, folder: str = "") -> list[dict[str, Any]]:
    """What a trial reports whose training is this."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(trial, "_as_fits", lambda config, plan: config)
    monkeypatch.setattr(trial, "_train", train)
    monkeypatch.setattr(trial.tune, "report", told.append)
    plan = TrialPlan(
        base_json=dotted.to_json(quick), data_root=folder, expressions=("smile",), threads=1, gpus=0, folder=folder,
        trials=1, cpus=1, baseline_bytes=0,
    )  # fmt: skip
    train_trial({"settings": {"train.loss": "mse", "train.batch_size": 4}, "number": 0}, plan)
    return told


def blamed(number: int) -> ManifestError:
    """An error of the machine as the readers of data raise it."""
    found = ManifestError("landmarks must be a .npy array. Run prepare --landmarks-only again.")
    found.__cause__ = OSError(number, os.strerror(number), "a.npy")
    return found


CURES = {cure: [number for number in TROUBLES if TROUBLES[number].cure == cure] for cure in get_args(Cure)}


@pytest.mark.parametrize("raw", [False, True], ids=["blamed", "raw"])
@pytest.mark.parametrize("number", CURES["wait"], ids=errno.errorcode.get)
def test_what_time_can_cure_is_waited_for(
    number: int, raw: bool, quick: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    tries: list[Path] = []

    def wait(seconds: float) -> None:
        assert TROUBLES[number].words == Control(tmp_path).waiting_for_a_folder
        waited.append(seconds)

    def train(parameters: object, plan: object, config: object, away: Away) -> None:
        tries.append(tmp_path)
        if len(tries) <= 2:
            raise OSError(number, os.strerror(number)) if raw else blamed(number)
        away.over()

    monkeypatch.setattr(trial, "ROOM_POLL_S", 0.01)
    monkeypatch.setattr(trial.time, "sleep", wait)
    assert told_of(quick, monkeypatch, train, str(tmp_path)) == []
    assert len(tries) == 3
    assert waited
    assert Control(tmp_path).waiting_for_a_folder == ""


def test_data_that_was_there_is_waited_for(quick: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "control").mkdir()
    plan_root = tmp_path / "mount"
    tries: list[int] = []

    def train(parameters: object, plan: object, config: object, away: Away) -> None:
        away.data_root, tries[:] = plan_root, [*tries, 1]
        if not plan_root.is_dir():
            raise ManifestError("there is no dataset")
        raise ManifestError("a row is not what it was")

    monkeypatch.setattr(trial, "ROOM_POLL_S", 0.01)
    monkeypatch.setattr(trial.time, "sleep", lambda _: plan_root.mkdir(exist_ok=True))
    (report,) = told_of(quick, monkeypatch, train, str(tmp_path))
    assert len(tries) == 2
    assert report[FAILED_AS] == DATA


@pytest.mark.parametrize("number", CURES["none"], ids=errno.errorcode.get)
def test_the_machine_is_blamed_for_its_own(number: int, quick: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise blamed(number)

    (report,) = told_of(quick, monkeypatch, fail)
    assert report[FAILED_AS] == MACHINE
    assert report[REASON].startswith("MachineError: ")
    assert TROUBLES[number].words in report[REASON]
    assert "prepare" not in report[REASON]


@pytest.mark.parametrize("number", CURES["retry"], ids=errno.errorcode.get)
def test_another_worker_tries_what_this_one_cannot_read(
    number: int, quick: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise blamed(number)

    with pytest.raises(ManifestError):
        told_of(quick, monkeypatch, fail)


@pytest.mark.parametrize(
    "err",
    [
        blamed(errno.ENOMEM),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'"),
        RuntimeError("NCCL error: unhandled system error. Call to mmap failed: Cannot allocate memory"),
        MemoryError(),
    ],
    ids=str,
)
def test_memory_that_is_spent_halves_the_batch(quick: Config, monkeypatch: pytest.MonkeyPatch, err: Exception) -> None:
    sizes: list[int] = []

    def train(parameters: object, plan: object, config: Config, away: object) -> None:
        sizes.append(config.train.batch_size)
        if len(sizes) == 1:
            raise err

    assert told_of(quick, monkeypatch, train) == []
    assert sizes == [4, 2]


@pytest.mark.parametrize("words", ["CUDA error: an illegal memory access was encountered", "CUDA error: unspecified"])
def test_a_lost_gpu_is_another_workers(words: str, quick: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(words)

    with pytest.raises(RuntimeError, match=words):
        told_of(quick, monkeypatch, fail)


def test_a_trial_begins_anew_on_another_kind_of_gpu(
    quick: Config, sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []

    def report(result: dict[str, Any], checkpoint: Any) -> None:
        told.append(result)
        shutil.copytree(checkpoint.path, tmp_path / "trial_000" / f"checkpoint_{len(told):06d}")

    monkeypatch.setattr(trial.tune, "report", report)
    monkeypatch.setattr(trial.tune, "get_checkpoint", lambda: None)
    config = dotted.override(quick, {"train.epochs": 2})
    plan = TrialPlan(
        base_json=dotted.to_json(config), data_root=str(sample_root), expressions=("smile",), threads=1, gpus=0,
        folder=str(tmp_path), trials=1, cpus=1, baseline_bytes=0,
    )  # fmt: skip
    train_trial({"settings": {}, "number": 0, "epochs": 0}, plan)
    shutil.rmtree(tmp_path / "trial_000" / "checkpoint_000002")
    first = tmp_path / "trial_000" / "checkpoint_000001"
    train_trial({"settings": {}, "number": 0, "epochs": 1}, plan)
    assert [row["epoch"] for row in told] == [1, 2, 2], "goes on"
    shutil.rmtree(tmp_path / "trial_000" / "checkpoint_000003")
    state = torch.load(first / "smile" / STATE_FILE, weights_only=False)
    torch.save(state | {"precision": "bf16"}, first / "smile" / STATE_FILE)
    seal(first, 1)
    train_trial({"settings": {}, "number": 0, "epochs": 1}, plan)
    assert [row["epoch"] for row in told] == [1, 2, 2, 1, 2], "begins anew"
    assert told[4]["best_spearman"] == told[2]["best_spearman"] == told[1]["best_spearman"]


def test_a_trial_waits_for_room_on_its_workers_disk(
    quick: Config, sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the state fits beside the trial and the best weights do not."""
    waited: list[float] = []
    reported: list[int] = []
    replace = Path.replace

    def full(path: Path, target: Path) -> Path:
        if target.name == BEST_FILE and not waited:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(path, target)

    def wait(seconds: float) -> None:
        assert (tmp_path / "control" / "full-0").exists()
        waited.append(seconds)

    monkeypatch.setattr(Path, "replace", full)
    monkeypatch.setattr(trial.time, "sleep", wait)
    monkeypatch.setattr(trial.tune, "report", lambda result, checkpoint: reported.append(result["epoch"]))
    monkeypatch.setattr(trial.tune, "get_checkpoint", lambda: None)
    plan = TrialPlan(
        base_json=dotted.to_json(dotted.override(quick, {"train.epochs": 1})), data_root=str(sample_root),
        expressions=("smile",), threads=1, gpus=0, folder=str(tmp_path), trials=1, cpus=1, baseline_bytes=0,
    )  # fmt: skip
    train_trial({"settings": {}, "number": 0, "epochs": 0}, plan)
    assert (reported, len(waited)) == ([1], 1)
    assert not (tmp_path / "control" / "full-0").exists()


class Left(BaseException):
    """The worker's process is gone."""


class Asking:
    """A `Preemption` that asks at its nth look."""

    def __init__(self, nth: int = 0) -> None:
        self.nth, self.looks = nth, 0
        self.heeded = contextlib.nullcontext

    @property
    def asked(self) -> bool:
        self.looks += 1
        return self.looks == self.nth

    def leave(self) -> None:
        raise Left


def test_a_preempted_trial_goes_on_in_the_middle_of_its_epoch(
    quick: Config, sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    folder = tmp_path

    def report(result: dict[str, Any], checkpoint: Any) -> None:
        told.append({name: result[name] for name in ("epoch", "best_spearman", "mae", "train_loss", "lr", "best_mae")})
        shutil.copytree(checkpoint.path, folder / "trial_000" / f"checkpoint_{len(told):06d}")

    def train(asking: Asking) -> None:
        monkeypatch.setattr(trial, "PREEMPTION", asking)
        folder.mkdir(exist_ok=True)
        plan = TrialPlan(
            base_json=dotted.to_json(config), data_root=str(sample_root), expressions=("smile", "frown"), threads=1,
            gpus=0, folder=str(folder), trials=1, cpus=1, baseline_bytes=0,
        )  # fmt: skip
        train_trial({"settings": {}, "number": 0, "epochs": len(told)}, plan)

    monkeypatch.setattr(trial.tune, "report", report)
    monkeypatch.setattr(trial.tune, "get_checkpoint", lambda: None)
    config = dotted.override(quick, {"train.epochs": 2, "model.fusion.dropout": 0.2})
    folder = tmp_path / "undisturbed"
    through = Asking()
    train(through)
    undisturbed = list(told)
    steps = (through.looks - 2) // 4  # two expressions in two epochs: before each step, and once behind both
    assert steps > 1
    epoch = 2 * steps + 1
    for number, nth in enumerate((1, 2, steps, steps + 1, steps + 2, epoch - 1, epoch, epoch + 1, 2 * epoch)):
        told.clear()
        folder = tmp_path / str(number)
        with pytest.raises(Left):
            train(Asking(nth))
        assert len(told) == (nth - 1) // epoch
        again = Asking()
        train(again)
        assert told == undisturbed
        assert again.looks == 2 * epoch - (nth - 1), "only the rest is trained"
        assert not preempted(folder, 0).exists()


def test_a_trial_waits_for_a_sweeps_folder_that_is_away(
    quick: Config, sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    reported: list[int] = []

    def report(result: dict[str, Any], checkpoint: Any) -> None:
        if not waited:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        reported.append(result["epoch"])

    def wait(seconds: float) -> None:
        assert Control(tmp_path).waiting_for_a_folder == TROUBLES[errno.ESTALE].words
        assert not Control(tmp_path).waiting_for_room
        waited.append(seconds)

    monkeypatch.setattr(trial.time, "sleep", wait)
    monkeypatch.setattr(trial.tune, "report", report)
    monkeypatch.setattr(trial.tune, "get_checkpoint", lambda: None)
    plan = TrialPlan(
        base_json=dotted.to_json(dotted.override(quick, {"train.epochs": 1})), data_root=str(sample_root),
        expressions=("smile",), threads=1, gpus=0, folder=str(tmp_path), trials=1, cpus=1, baseline_bytes=0,
    )  # fmt: skip
    train_trial({"settings": {}, "number": 0, "epochs": 0}, plan)
    assert (reported, len(waited)) == ([1], 1)
    assert Control(tmp_path).waiting_for_a_folder == ""
