"""What every command of the project does the same way: logging, errors in one line, exit statuses."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import rich.console
import rich.progress

from .errors import QafeError

USER_ERROR = 2
INTERRUPTED = 130


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """An argument parser with the flags that all commands share."""
    result = argparse.ArgumentParser(prog=prog, description=description)
    result.add_argument("--debug", action="store_true", help="show the trace of an error, and more of what happens")
    return result


@contextlib.contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Shows long work on stderr, with the time left: gives a function to call with (done, in all).

    Plain lines without a terminal.
    """
    if not sys.stderr.isatty():
        print(title, file=sys.stderr, flush=True)
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
    columns = (*rich.progress.Progress.get_default_columns()[:-1], rich.progress.MofNCompleteColumn())
    with rich.progress.Progress(
        *columns, rich.progress.TimeRemainingColumn(), console=rich.console.Console(stderr=True)
    ) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def run(
    command: Callable[[argparse.Namespace], int],
    arguments: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> int:
    """Parses, runs and turns errors into one line on stderr and exit status 2 (130 for Ctrl-C)."""
    options = arguments.parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if options.debug else logging.WARNING,
        format="%(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("qafe").setLevel(logging.DEBUG if options.debug else logging.INFO)
    try:
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
