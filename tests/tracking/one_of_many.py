"""``python -m tests.tracking.one_of_many FOLDER URI NAME``: one process that tracks a sweep when FOLDER/go is there."""

import sys
import time
from pathlib import Path

from tracking.runs import SweepTracker

TRIALS, EPOCHS = 2, 60
METRICS = 12


def value(trial: int, epoch: int, metric: int) -> float:
    """A number that no other place has."""
    return 1e4 * trial + epoch + metric / 100


def main(folder: Path, uri: str, name: str) -> None:
    tracker = SweepTracker(
        folder / name / "tracking.jsonl",
        uri=uri,
        experiment="many",
        sweep=name,
        sweep_id=name,
        params={"train.lr": 0.1},
        tags={"version.torch": "2"},
        dataset=("cohort", "0" * 64),
    )
    (folder / f"{name}.ready").touch()
    while not (folder / "go").exists():
        time.sleep(0.05)
    for trial in range(TRIALS):
        tracker.trial_started(str(trial), trial, {"train.lr": 0.1 * trial, "model.fusion.layers": trial})
    for epoch in range(1, EPOCHS + 1):
        for trial in range(TRIALS):
            metrics = {f"metric_{number}": value(trial, epoch, number) for number in range(METRICS)}
            tracker.epoch(str(trial), epoch, metrics)
        time.sleep(0.02)
    for trial in range(TRIALS):
        tracker.trial_ended(str(trial), "finished", folder=None)
    tracker.sweep_ended("finished")
    left = tracker.close(patience_s=240)
    if left or tracker.refused:
        sys.exit(f"{left} entries unsent, {tracker.refused} refused")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
