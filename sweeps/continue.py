"""python -m sweeps.continue NAME: go on with a paused sweep where its trials came to rest."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from qafe import console
from qafe.errors import ConfigError

from .control import PAUSE, Control, asked_sweep, parser


def main(argv: Sequence[str] | None = None) -> int:
    """Tells the sweep's driver, and returns the exit status."""
    about = "Go on with a paused sweep: nothing is repeated. (After Ctrl-C or a crash: sweeps.run --resume.)"
    return console.run(_main, parser("python -m sweeps.continue", about), argv)


def _main(options: argparse.Namespace) -> int:
    sweep = asked_sweep(options)
    control = Control(sweep.path)
    if not control.paused:
        raise ConfigError(f"only a paused sweep can go on, {sweep.name} is running. There is nothing to do.")
    control.withdraw(PAUSE)
    print(f"{sweep.name} goes on", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
