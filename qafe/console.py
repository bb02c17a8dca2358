"""What every command of the project does the same way: logging, errors in one line, exit statuses."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import installation
from .errors import ConfigError, QafeError
from .machine_errors import machine_errors_told

USER_ERROR = 2
INTERRUPTED = 130
PATIENCE_S = 5.0
"""How long a process that fails like another waits for torchrun to end it."""


def speaks() -> bool:
    """Whether this process is the one that prints: of those that torchrun starts, the first."""
    return os.environ.get("RANK", "0") == "0"


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """An argument parser with the flags that all commands share."""
    result = argparse.ArgumentParser(prog=prog, description=description)
    result.add_argument("--debug", action="store_true", help="show the trace of an error, and more of what happens")
    result.add_argument("--version", action=_Version, nargs=0, help="print the project's version, and stop")
    return result


class _Version(argparse.Action):
    """Looks the version up when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **more: Any) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, **more)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"{installation.NAME} {installation.version()}")
        parser.exit()


def let_others_speak() -> None:
    """Waits before this process ends in silence: torchrun stops the others at once, also one about to print."""
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(PATIENCE_S)


@contextlib.contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Shows long work on stderr, with the time left: gives a function to call with (done, in all).

    Plain lines without a terminal.
    """
    print(
        title, file=sys.stderr, flush=True
    )  # on a line of its own: it would leave a narrow terminal no room for a bar
    if not sys.stderr.isatty():
        start, said = time.monotonic(), 0

        def say(done: int, total: int) -> None:
            nonlocal said
            if 4 * done // total > said:
                said = 4 * done // total
                left = (time.monotonic() - start) * (total - done) / done
                rest = f", about {left:.0f} s left" if done < total else ""
                print(f"  {100 * done // total} %{rest}", file=sys.stderr, flush=True)

        yield say
        return
    # Late: a registered model that only scores needs no rich.
    import rich.console
    import rich.progress

    with rich.progress.Progress(
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        console=rich.console.Console(stderr=True),
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def run(
    command: Callable[[argparse.Namespace], int],
    arguments: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> int:
    """Parses, runs and turns errors into one line on stderr and exit status 2 (130 for Ctrl-C)."""
    options = _parse(arguments, argv)
    logging.basicConfig(
        level=logging.INFO if options.debug else logging.WARNING,
        format="%(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("qafe").setLevel(logging.DEBUG if options.debug else logging.INFO)
    if not options.debug:  # libraries warn of each other; nothing of ours does, and what Python was told comes first
        warnings.filterwarnings("ignore", append=True)
    if not (speaks() or options.debug):
        logging.disable(logging.WARNING)
    try:
        with machine_errors_told():
            return command(options)
    except QafeError as err:
        if options.debug:
            raise
        print(f"error: {' '.join(str(err).split())}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        if options.debug:
            raise
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _parse(arguments: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    if speaks():
        return arguments.parse_args(argv)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return arguments.parse_args(argv)
        except SystemExit as err:
            if err.code:
                let_others_speak()
            raise


def unwritable(folder: Path, err: OSError) -> ConfigError:
    """The error of an output folder that cannot be written."""
    return ConfigError(f"the folder must be one that can be written, got {folder} ({err.strerror}). Name another.")
