"""python -m tests.bench: how fast, against whom, in one table.

python -m tests.bench                              all that needs no files: heatmaps, clips, step
python -m tests.bench --published PATH             the same, and a step of the authors' own code
python -m tests.bench clips
python -m tests.bench jpeg                         one frame's decoding, library against library
python -m tests.bench step [--preset small] [--batch4]
python -m tests.bench memory [--preset small]      a step whose memory is kept, against one that gives it back
python -m tests.bench --device cuda                heatmaps and steps on a GPU
python -m tests.bench growth [--plot FILE.png]
python -m tests.bench search                       epochs that a search needs, on a synthetic objective
python -m tests.bench sweeps [--plot FILE.png]     what a sweep costs beside its training
python -m tests.bench tracking                     what tracking costs a training, and metrics a second
python -m tests.bench faces --models testpack --model-root DIR VIDEO [VIDEO ...]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console
from rich.table import Table

from qafe import allocation, console
from qafe.errors import ConfigError

from . import recorded
from .growth import AXES, Series
from .growth import bench as growth
from .growth import figure as plot
from .published import check
from .rounds import Found, Row

WITHOUT_FILES = ("heatmaps", "clips", "step")
ON_A_DEVICE = ("heatmaps", "step")
OWN_RIVALS = ("jpeg", "memory", "search", "sweeps", "tracking")
"""Subjects whose rivals are not the published computation."""
PUBLISHED = ("published", "rewritten", "authors' code")
"""Rivals that need no name in the table."""
ROUNDS = {"step": 3}
"""Where it is not 5: a round of steps takes minutes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subject, or all that need no files, and prints one table."""
    return console.run(_run, _parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = console.parser("python -m tests.bench", "Benchmarks, as ratios in one run.")
    # Before and after the subject alike.
    for place, default in ((parser, None), (common := argparse.ArgumentParser(add_help=False), argparse.SUPPRESS)):
        place.add_argument("--json", type=Path, default=default, help="also write the numbers here")
        place.add_argument("--rounds", type=int, default=default, help="(default: 5, of steps 3)")
        place.add_argument("--threads", type=int, default=default, help="(default: 1; the training of clips: 2)")
        place.add_argument(
            "--preset",
            choices=("paper", "small", "tiny"),
            default=default,
            help="of steps (default: paper; growth: small)",
        )
        place.add_argument(
            "--batch4", action="store_true", default=default or False, help="steps of 4 clips, too: 15 GB for paper"
        )
        place.add_argument(
            "--published",
            type=Path,
            default=default,
            metavar="PATH",
            help="the authors' repository, to time their network",
        )
        place.add_argument("--inner", action="store_true", default=default or False, help=argparse.SUPPRESS)
        place.add_argument("--device", default=default, help="heatmaps and steps on this device (cuda, cpu)")
    subjects = parser.add_subparsers(dest="subject", metavar="SUBJECT")
    subjects.add_parser("heatmaps", parents=[common], help="landmarks -> heatmap frames")
    subjects.add_parser("clips", parents=[common], help="prepared dataset -> what the model reads")
    subjects.add_parser("step", parents=[common], help="a training step, inference, peak memory")
    subjects.add_parser("jpeg", parents=[common], help="a frame's JPEG -> pixels: our decoder against others")
    subjects.add_parser("memory", parents=[common], help="a step whose memory is kept, against one that gives it back")
    sub = subjects.add_parser("growth", parents=[common], help="cost against clip length, batch, clips and workers")
    sub.add_argument("--plot", type=Path, metavar="FILE", help="also draw it, e.g. growth.png")
    subjects.add_parser("search", parents=[common], help="epochs that TPE with ASHA needs, against random search")
    sub = subjects.add_parser("sweeps", parents=[common], help="a sweep's time and memory beside its training")
    sub.add_argument("--plot", type=Path, metavar="FILE", help="also draw memory and time over trials")
    sub.add_argument("--trials", type=int, default=200, help="short ones (default: %(default)s; 0: none)")
    sub.add_argument("--workers", type=int, default=2, help="trials side by side (default: %(default)s)")
    sub.add_argument("--long-trials", type=int, default=32, help="of a minute (default: %(default)s; 0: none)")
    subjects.add_parser("tracking", parents=[common], help="what tracking costs, and metrics a second")
    sub = subjects.add_parser("faces", parents=[common], help="raw video -> crops and landmarks")
    sub.add_argument("videos", type=Path, nargs="+")
    sub.add_argument("--models", default="buffalo_l")
    sub.add_argument("--model-root", type=Path, default=Path("~/.insightface"))
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.rounds is not None and options.rounds < 1:
        raise ConfigError(f"--rounds must be at least 1, got {options.rounds}. Set --rounds 3.")
    if options.published is not None:
        check(options.published)
    if options.device is not None and options.subject not in (None, *ON_A_DEVICE):
        raise ConfigError(f"--device is for {' and '.join(ON_A_DEVICE)}, got {options.subject}. Leave it away.")
    machine: dict[str, object] = {"processor": _processor(), "cores": allocation.cores()}
    wide = Console(width=max(Console().width, 140))
    if options.subject == "growth":
        series = growth(preset=options.preset or "small")
        wide.print(_growth_table(series))
        if options.plot:
            plot(series, options.plot)
        _write(options.json, {"machine": machine, "series": [one.as_json() for one in series]})
        return 0
    found = _each_in_own_process(options) if options.subject is None else _found(options)
    content: dict[str, object] = {
        "machine": machine,
        "rows": [row.as_json() for row in found.rows],
        "left_out": found.left_out,
    }
    if options.inner:
        _write(options.json, content)
        return 0
    said = []
    if not options.published and not options.device and options.subject in (None, *WITHOUT_FILES):
        recorded.attach(found.rows)
        kernel_s = recorded.kernel_cpu_s()
        content["rows"] = [row.as_json() for row in found.rows]
        content["recorded"] = {"source": recorded.SOURCE, "scaled": False, "kernel_cpu_s_here": kernel_s}
        said.append(recorded.sentence(kernel_s))
    wide.print(_table(found.rows))
    about = [_rivals(found.rows, options.published)] if options.subject not in OWN_RIVALS else []
    for sentence in (*about, *said, *(f"left out: {why}" for why in found.left_out)):
        wide.print(sentence, highlight=False)
    _write(options.json, content)
    return 0


def _found(options: argparse.Namespace) -> Found:
    """One subject, in this process."""
    subject, device = options.subject, options.device
    rounds = options.rounds or ROUNDS.get(subject, 5)
    preset, threads = options.preset or "paper", options.threads or 1
    if subject == "heatmaps" and device:
        from . import device as on_device

        return on_device.heatmaps(device, rounds)
    if subject == "step" and device:
        from . import device as on_device

        return on_device.step(device, preset, rounds, threads, published=options.published)
    if subject == "heatmaps":
        from . import heatmaps

        return Found(heatmaps.bench(rounds))
    if subject == "clips":
        from . import clips

        return Found(clips.bench(rounds, options.threads or 2))
    if subject == "jpeg":
        from . import jpeg

        return jpeg.bench(rounds)
    if subject == "step":
        from . import step

        return step.bench(preset, rounds, threads, options.batch4, options.published)
    if subject == "memory":
        from . import memory

        return Found(memory.bench(preset, rounds, threads))
    if subject == "search":
        from . import search

        return search.bench(rounds)
    if subject == "sweeps":
        from . import sweeps

        return sweeps.bench(options.trials, options.long_trials, options.workers, figure=options.plot)
    if subject == "tracking":
        from . import tracking

        return tracking.bench(options.rounds or 3)
    from . import faces

    return Found(faces.bench(options.videos, options.models, options.model_root, rounds))


def _each_in_own_process(options: argparse.Namespace) -> Found:
    """All subjects that need no files: each sets threads and an allocator, which must not disturb the next."""
    found = Found([])
    if options.device:
        found.left_out.append("clips: they are read on the CPU; run without --device")
    for subject in ON_A_DEVICE if options.device else WITHOUT_FILES:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "found.json"
            command = [sys.executable, "-m", "tests.bench", subject, "--json", str(file), "--inner"]
            for name in ("rounds", "threads", "preset", "device"):
                value = getattr(options, name)
                command += [] if value is None else [f"--{name}", str(value)]
            command += ["--batch4"] if options.batch4 else []
            command += ["--published", str(options.published.resolve())] if options.published else []
            print(f"{subject} ...", file=sys.stderr, flush=True)
            done = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=sys.stderr)
            if done.returncode:  # It has said why.
                raise SystemExit(done.returncode)
            content = json.loads(file.read_text())
        found.rows += [Row.from_json(row) for row in content["rows"]]
        found.left_out += content["left_out"]
    return found


def _write(file: Path | None, content: dict[str, object]) -> None:
    if file is not None:
        file.write_text(json.dumps(content, indent=1) + "\n")


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _shown(value: float | None, quantity: str) -> str:
    if value is None:
        return ""
    if quantity != "s":
        return f"{value:.0f} {quantity}" if quantity == "epochs" else f"{value:.2f} {quantity}"
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def _table(rows: list[Row]) -> Table:
    names = ("what", "per", "ours", "published", "ratio", "spread", "recorded", "notes")
    table = Table(*names)
    for row in rows:
        ratios = row.ratios
        rival = _shown(statistics.median(row.rival), row.quantity) if row.rival else ""
        table.add_row(
            row.what,
            row.unit,
            _shown(statistics.median(row.ours), row.quantity),
            rival if row.rival_name in PUBLISHED or not rival else f"{rival} ({row.rival_name})",
            f"{statistics.median(ratios):.1f}x" if ratios else "",
            f"{min(ratios):.1f}-{max(ratios):.1f}x" if ratios else "",
            _shown(row.recorded, row.quantity),
            "\n".join(row.notes),
        )
    return table


def _rivals(rows: list[Row], published: Path | None) -> str:
    """Who stands in the column ``published``."""
    text = "published: the published computation, rewritten here, timed in turns with ours in this run"
    if published and any(row.rival_name == "authors' code" for row in rows):
        text += f"; of steps and inference the authors' own code at {published}"
    return f"{text}. ratio: published / ours, the median of the rounds."


def _growth_table(series: list[Series]) -> Table:
    table = Table("what", "against", "per", "seconds (CPU; workers: wall)", "growth")
    for one in series:
        seconds = ", ".join(f"{at}: {_shown(value, 's')}" for at, value in zip(one.at, one.seconds, strict=True))
        slope = f"{1e3 * one.slope:+.0f} ms a worker" if one.axis == "workers" else f"n^{one.slope:.2f}"
        table.add_row(one.what, AXES[one.axis], one.unit, seconds, slope)
    return table


if __name__ == "__main__":
    sys.exit(main())
