"""python -m sweeps.stop NAME: end a running sweep as Ctrl-C would, or one of its trials after its epoch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from qafe import console
from qafe.errors import ConfigError

from .control import STOP, Control, asked_sweep, parser, place_flag
from .folder import SweepFolder


def main(argv: Sequence[str] | None = None) -> int:
    """Asks the sweep's driver, and returns the exit status."""
    arguments = parser("python -m sweeps.stop", "End a running sweep; it can be resumed. Or end one trial of it.")
    arguments.add_argument("--trial", type=int, metavar="N", help="only this trial: it counts as pruned")
    return console.run(_main, arguments, argv)


def _main(options: argparse.Namespace) -> int:
    sweep = asked_sweep(options)
    if options.trial is None:
        Control(sweep.path).wish(STOP)
        print(f"{sweep.name} ends now; go on later:  python -m sweeps.run {sweep.plan['study']} --resume --name "
              f"{sweep.name}{place_flag(options)}", file=sys.stderr)  # fmt: skip
        return 0
    _check_runs(sweep, options.trial)
    Control(sweep.path).wish(f"{STOP}-{options.trial}")
    print(f"trial {options.trial} of {sweep.name} ends after its epoch", file=sys.stderr)
    return 0


def _check_runs(sweep: SweepFolder, number: int) -> None:
    from .progress import STATES  # Optuna takes a second to import
    from .study import own_trials, read_study

    study = read_study(sweep.path, sweep.name, sweep.plan.get("study_storage", ""))
    states = {trial.number: STATES[trial.state] for trial in own_trials(study)} if study else {}
    if states.get(number) != "running":
        running = [str(other) for other, state in states.items() if state == "running"]
        raise ConfigError(
            f"only a running trial can be stopped, trial {number} of {sweep.name} is "
            f"{states.get(number, 'not begun')} (--trial). "
            + (f"Running: {', '.join(running)}." if running else "None is running.")
        )


if __name__ == "__main__":
    sys.exit(main())
