"""python -m sweeps.run STUDY: many trainings, spread by Ray Tune, chosen by Optuna, tracked in MLflow."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .supervisor import NOTES, supervise


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sweep and returns its exit status; as a command, in a process below this one."""
    if argv is None and not NOTES.supervised:
        return supervise("sweeps.run", sys.argv[1:])
    from .command import main as drive  # with torch and Optuna, which the process above does not need

    return drive(argv)


if __name__ == "__main__":
    sys.exit(main())
