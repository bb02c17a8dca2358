"""python -m sweeps.pause NAME: let a running sweep's trials rest after their epochs, and free what they use."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from qafe import console

from .control import PAUSE, Control, asked_sweep, parser, place_flag


def main(argv: Sequence[str] | None = None) -> int:
    """Asks the sweep's driver, and returns the exit status."""
    about = "Pause a running sweep: its trials end their epoch, keep their checkpoint and free their GPUs."
    return console.run(_main, parser("python -m sweeps.pause", about), argv)


def _main(options: argparse.Namespace) -> int:
    sweep = asked_sweep(options)
    Control(sweep.path).wish(PAUSE)
    print(f"{sweep.name} rests after the epochs that run; go on:  python -m sweeps.continue {sweep.name}"
          f"{place_flag(options)}",
          file=sys.stderr)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
