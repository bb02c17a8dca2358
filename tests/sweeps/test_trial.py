"""sweeps/trial.py: what goes wrong in a trial gets its class and one line."""

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qafe import dotted
from qafe.config import Config
from qafe.errors import CheckpointError, ConfigError, ManifestError
from qafe.train import BEST_FILE, STATE_FILE
from sweeps import trial
from sweeps.checkpoints import preempted, seal
from sweeps.results import FAILED_AS
from sweeps.study import REASON
from sweeps.trial import DATA, ERROR, MEMORY, REFUSED, TrialPlan, train_trial


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

    told: list[dict[str, Any]] = []
    monkeypatch.setattr(trial, "_as_fits", lambda config, plan: config)
    monkeypatch.setattr(trial, "_train", fail)
    monkeypatch.setattr(trial.tune, "report", told.append)
    plan = TrialPlan(
        base_json=dotted.to_json(quick),
        data_root="",
        expressions=("smile",),
        threads=1,
        gpus=0,
        folder="",
        trials=1,
        cpus=1,
        baseline_bytes=0,
    )
    settings = {"train.loss": "mse", "train.batch_size": 4}
    train_trial({"settings": settings}, plan)
    (report,) = told
    assert report[FAILED_AS] == kind
    assert "\n" not in report[REASON]
    if kind != MEMORY:  # Which halves the batch until there is one clip.
        assert report[REASON] == f"{type(err).__name__}: {err}"


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
