"""python -m tests.bench: how fast, against whom, in one table.

python -m tests.bench faces --models testpack --model-root DIR VIDEO [VIDEO ...]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console
from rich.table import Table

from .rounds import Row


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subject and prints its table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Benchmarks, as ratios in one run.")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    subjects = parser.add_subparsers(dest="subject", required=True)
    faces = subjects.add_parser("faces", help="raw video -> crops and landmarks")
    faces.add_argument("videos", type=Path, nargs="+")
    faces.add_argument("--models", default="buffalo_l")
    faces.add_argument("--model-root", type=Path, default=Path("~/.insightface"))
    options = parser.parse_args(argv)
    rows = _faces(options)
    Console(width=max(Console().width, 110)).print(_table(rows))
    if options.json:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        content = {"machine": machine, "rows": [row.as_json() for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def _faces(options: argparse.Namespace) -> list[Row]:
    from .faces import bench

    return bench(options.videos, options.models, options.model_root, options.rounds)


def _table(rows: list[Row]) -> Table:
    table = Table("what", "per", "ours", "rival", "ratio", "spread", "notes")
    for row in rows:
        shown = row.as_json()
        low, high = min(row.ratios), max(row.ratios)
        table.add_row(
            row.what,
            row.unit,
            f"{1e3 * float(str(shown['ours_s'])):.1f} ms",
            f"{1e3 * float(str(shown['rival_s'])):.1f} ms",
            f"{float(str(shown['ratio'])):.1f}x",
            f"{low:.1f}-{high:.1f}x",
            "\n".join(row.notes),
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
