"""What tests/test_distributed.py has torchrun start: trains every case and writes down what each process got."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qafe.config import Config, tiny
from qafe.data.cohort import load_cohort
from qafe.distributed import launched
from qafe.dotted import override
from qafe.train import EpochResult, fit

from .conftest import QUICK

# Steps that are proportional to gradients: AdamW's first ones are not, and would show rounding at full size.
BASE = QUICK | {"train.epochs": 1, "train.batch_size": 5, "train.optimizer": "sgd", "train.lr": 0.003}
FROZEN = {"model.rgb.frozen": True, "model.heatmap.frozen": True}
CASES: dict[str, dict[str, Any]] = {
    "bmc": {"train.epochs": 2},
    "bmc-accumulate": {
        "train.accumulate": 2,
        "train.checkpoint": True,
        "train.clip_norm": 1.0,
        "train.train_noise_sigma": True,
    },
    "bmc-batches-of-one": {"train.batch_size": 1, "train.accumulate": 4},
    "mse": {"train.loss": "mse"},
    "mse-accumulate": {"train.loss": "mse", "train.accumulate": 2},
    # 12 steps instead of 3: with longer ones one and two threads of one process already differ by 1e-3.
    "mse-batches-of-one": {"train.loss": "mse", "train.batch_size": 1, "train.lr": 0.0001},
    "gai-sigma": {"train.loss": "gai", "train.train_noise_sigma": True, "train.accumulate": 2},
    "bf16": {"train.precision": "bf16"},
    "rgb-frozen": {"model.rgb.frozen": True},
    "no-norm-to-synchronise": FROZEN | {"train.sync_batchnorm": False, "train.accumulate": 2},
    "own-statistics": {"train.sync_batchnorm": False},
    "dropout": {"model.fusion.dropout": 0.5},
}
QUICK_CASES = ("bmc", "bmc-accumulate", "bmc-batches-of-one", "mse-accumulate", "own-statistics")


def config_of(case: str) -> Config:
    """The config of a case: clips in batches of 5, 5 and 2."""
    return override(tiny(), BASE | CASES[case])


def epochs(case: str, root: Path, resume_from: Path | None = None) -> Iterator[EpochResult]:
    """The training of a case, in this process or with those that it has joined."""
    config = config_of(case)
    smile = load_cohort(root, config.data).only("smile")
    device = torch.device("cpu")
    return fit(config, smile.store, smile.train, smile.validation, device=device, resume_from=resume_from)


def noted(results: Iterator[EpochResult], folder: Path) -> dict[str, Any]:
    """Losses, predictions and the last epoch's state (where this process writes it) of a training."""
    losses, predictions, result = [], [], None
    for result in results:
        losses.append(result.train_loss)
        predictions.append(torch.from_numpy(result.predictions))
        result.save(folder / str(result.epoch))
    assert result is not None
    state = result.save.__self__  # type: ignore[attr-defined]
    return {
        "losses": losses,
        "predictions": predictions,
        "best_epoch": result.best_epoch,
        "model": {name: value.clone() for name, value in state.model.state_dict().items()},
        "loss": {name: value.clone() for name, value in state.loss.state_dict().items()},
    }


def main() -> None:
    """Arguments: the dataset, a folder with a checkpoint of case bmc in ``one/1`` and to write to, and the cases."""
    torch.set_num_threads(1)
    root, out, cases = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    with launched() as join:
        ranks = join(torch.device("cpu"))
        assert ranks.world == 2
        got = {case: noted(epochs(case, root), out / case) for case in cases}
        got["resumed"] = noted(epochs("bmc", root, out / "one" / "1"), out / "resumed")
        torch.save(got, out / f"{ranks.rank}.pt")


if __name__ == "__main__":
    main()
