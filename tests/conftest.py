"""What all tests share: nothing of the user's is read or written, and a small generated dataset."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qafe.config import Config, tiny
from qafe.data.sample import SampleConfig, make_sample
from qafe.dotted import override

torch.set_num_threads(1)

QUICK = {
    "model.segments": 2,
    "model.segment_frames": 4,
    "train.epochs": 3,
    "train.batch_size": 4,
    "train.optimizer": "adamw",
    "train.lr": 0.002,
    "train.schedule": "cosine",
    "train.warmup_epochs": 0,
    "train.loss": "bmc",
    "data.repeats": 1,
}
"""Settings under which a training of the tiny preset takes about a second, and which the tests may count on."""
QUICK_FLAGS = [flag for name, value in QUICK.items() for flag in ("--set", f"{name}={value}")]


@pytest.fixture(scope="session", autouse=True)
def _own_signals() -> None:
    """Ctrl-C is heard here and in all that the tests start, also where a script or cron has started them without."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Cache, configuration, tracking store and current folder of the test session lie in its temporary folder."""
    base = tmp_path_factory.mktemp("home")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(base / "cache"))
    patch.setenv("XDG_CONFIG_HOME", str(base / "config"))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        patch.delenv(name, raising=False)
    patch.chdir(base)
    yield
    patch.undo()


@pytest.fixture(scope="module", autouse=True)
def _own_tracking_uri() -> Iterator[None]:
    """The tracking URI that a module's tests, or commands in them, tell MLflow is gone after it: MLflow keeps it in the
    environment, and in the process, where it looks first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "")  # even if it is not there now
        patch.delenv("MLFLOW_TRACKING_URI")
        yield
    if (mlflow := sys.modules.get("mlflow")) is not None:
        mlflow.set_tracking_uri(None)


@pytest.fixture(scope="session")
def sample_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sample dataset of 8 training and 3 test patients with 2 short clips of each expression."""
    config = SampleConfig(train_patients=8, test_patients=3, clips=2, frames=(12, 16))
    return make_sample(tmp_path_factory.mktemp("data") / "sample", config)


@pytest.fixture(scope="session")
def quick() -> Config:
    """The tiny preset with clips of 8 frames and 3 epochs."""
    return override(tiny(), QUICK)


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """What a test's commands set for their process (`sweeps.run` sets how Ray starts) is gone after it."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
