"""python -m tests.bench: how fast, against whom, in one table.

python -m tests.bench clips
python -m tests.bench heatmaps
python -m tests.bench step [--preset small] [--batch4]
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
    subjects.add_parser("heatmaps", help="landmarks -> heatmap frames")
    faces = subjects.add_parser("faces", help="raw video -> crops and landmarks")
    faces.add_argument("videos", type=Path, nargs="+")
    faces.add_argument("--models", default="buffalo_l")
    faces.add_argument("--model-root", type=Path, default=Path("~/.insightface"))
    clips = subjects.add_parser("clips", help="prepared dataset -> what the model reads")
    clips.add_argument("--threads", type=int, default=2, help="of the training (default: %(default)s)")
    step = subjects.add_parser("step", help="a training step, inference, peak memory")
    step.add_argument("--preset", default="paper", choices=("paper", "small", "tiny"))
    step.add_argument("--threads", type=int, default=1, help="of ours and the rival (default: %(default)s)")
    step.add_argument("--batch4", action="store_true", help="also with 4 clips: 20 GB for the paper preset")
    options = parser.parse_args(argv)
    rows = {"faces": _faces, "clips": _clips, "heatmaps": _heatmaps, "step": _step}[options.subject](options)
    Console(width=max(Console().width, 110)).print(_table(rows))
    if options.json:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        content = {"machine": machine, "rows": [row.as_json() for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def _faces(options: argparse.Namespace) -> list[Row]:
    from .faces import bench

    return bench(options.videos, options.models, options.model_root, options.rounds)


def _clips(options: argparse.Namespace) -> list[Row]:
    from .clips import bench

    return bench(options.rounds, options.threads)


def _heatmaps(options: argparse.Namespace) -> list[Row]:
    from .heatmaps import bench

    return bench(options.rounds)


def _step(options: argparse.Namespace) -> list[Row]:
    from .step import bench

    return bench(options.preset, options.rounds, options.threads, [1, 4] if options.batch4 else [1])


def _shown(value: float, quantity: str) -> str:
    return f"{1e3 * value:.1f} ms" if quantity == "s" else f"{value:.2f} {quantity}"


def _table(rows: list[Row]) -> Table:
    table = Table("what", "per", "ours", "rival", "ratio", "spread", "notes")
    for row in rows:
        shown = row.as_json()
        low, high = min(row.ratios), max(row.ratios)
        table.add_row(
            row.what,
            row.unit,
            _shown(float(str(shown[f"ours_{row.quantity}"])), row.quantity),
            _shown(float(str(shown[f"rival_{row.quantity}"])), row.quantity),
            f"{float(str(shown['ratio'])):.1f}x",
            f"{low:.1f}-{high:.1f}x",
            "\n".join(row.notes),
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
