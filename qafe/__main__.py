"""python -m qafe prepare | sample | train | score | cache"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from . import allocation, console, dotted
from .config import PRESETS, PRETRAINED
from .data.cache import cache_folder, cache_size, clear_cache
from .data.manifest import read_manifest
from .data.sample import SampleConfig, make_sample
from .errors import CheckpointError, ConfigError
from .faces.detect import DEFAULT_MODELS, DEFAULT_ROOT
from .faces.landmarks_only import add_landmarks
from .faces.prepare import Outcome, prepare_cohort
from .faces.settings import PrepareSettings
from .faces.track import TrackSettings
from .installation import entry_point
from .store import Store


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    parser = console.parser("python -m qafe", "Train and use QAFE-Net on prepared face clips.")
    names = "prepare | sample | train | import | score | cache"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)
    _add_prepare(commands)
    _add_sample(commands)
    _add_train(commands)
    _add_import(commands)
    _add_score(commands)
    _add_cache(commands)
    return console.run(lambda options: int(options.run(options)), parser, argv)


def _add_prepare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sub = commands.add_parser(
        "prepare",
        help="make a prepared dataset out of recordings, or landmarks for one",
        description="Follows one face through each recording, crops it, finds 106 landmarks, and files all of it as a "
        "prepared dataset with a quality report. With --landmarks-only: adds landmarks to a dataset of face crops.",
    )
    sub.add_argument("folders", type=Path, nargs="+", metavar="VIDEOS OUT", help="OUT alone with --landmarks-only")
    sub.add_argument("--labels", type=Path, help="CSV: video, expression, score; also patient, fps, start, end")
    sub.add_argument("--landmarks-only", action="store_true", help="add landmarks to the crops in OUT")
    sub.add_argument("--models", default=DEFAULT_MODELS, help="InsightFace's model pack (default: %(default)s)")
    sub.add_argument("--model-root", type=Path, default=DEFAULT_ROOT, help="holds models/<pack> (default: %(default)s)")
    sub.add_argument(
        "--crop",
        choices=("per_video", "per_frame"),
        default="per_video",
        help="per_video: one square for the whole recording, so that what moves in the crop moved in the room. "
        "per_frame: the box of each frame, as the authors of QAFE-Net do; it takes head motion away and adds the "
        "jitter of the box to every landmark (default: %(default)s)",
    )
    sub.add_argument("--fps", type=float, help="resample to this rate by timestamps (default: as recorded)")
    sub.add_argument("--trim", default="start,end", help="labels' columns with the first and last second (%(default)s)")
    sub.add_argument("--smooth", action="store_true", help="smooth landmarks with a 1 Euro filter (default: do not)")
    usual = TrackSettings()
    sub.add_argument(
        "--detect-every", type=int, default=usual.every_frames, help="search whole frames this often (%(default)s)"
    )
    sub.add_argument(
        "--max-gap", type=int, default=usual.gap_frames, help="missed frames in a row to fill in (%(default)s)"
    )
    sub.add_argument(
        "--min-detected", type=float, default=usual.min_detected, help="least share of frames with the face %(default)s"
    )
    sub.add_argument(
        "--keep-ends", action="store_true", help="cut no frames before the face is first seen and after it is last seen"
    )
    who = sub.add_mutually_exclusive_group()
    who.add_argument("--test-patients", help="who is tested on, with commas between them")
    who.add_argument("--test-fraction", type=float, default=0.25, help="share of patients to draw (%(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="of the draw (%(default)s)")
    sub.add_argument("--resume", action="store_true", help="keep what an earlier run finished, and do the rest")
    sub.add_argument("--with-images", action="store_true", help="draw faces into report.html")
    sub.add_argument("--workers", type=int, default=allocation.cores(), help="processes (%(default)s)")
    sub.add_argument("--memory-mb", type=int, default=512, help="decoded frames that a worker may hold (%(default)s)")
    sub.add_argument("--address", help="run on this Ray cluster (e.g. auto); it must see the same folders")
    sub.set_defaults(run=_prepare)


def _prepare(options: argparse.Namespace) -> int:
    expected = 1 if options.landmarks_only else 2
    if len(options.folders) != expected:
        usage = "prepare --landmarks-only OUT" if options.landmarks_only else "prepare VIDEOS OUT --labels labels.csv"
        raise ConfigError(f"{expected} folder(s) must be given, got {len(options.folders)}. Use: {usage}.")
    if options.workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {options.workers}. Correct it.")
    settings = PrepareSettings(
        models=options.models,
        model_root=options.model_root,
        crop=options.crop,
        fps=options.fps,
        smooth=options.smooth,
        track=TrackSettings(
            every_frames=options.detect_every,
            gap_frames=options.max_gap,
            min_detected=options.min_detected,
            keep_ends=options.keep_ends,
        ),
        memory_mb=options.memory_mb,
    )
    out = options.folders[-1]
    with contextlib.ExitStack() as stack:
        executor = _ray_executor(stack, options.address) if options.address else None
        progress = stack.enter_context(console.progress(f"preparing {out}"))
        shared = {
            "resume": options.resume,
            "executor": executor,
            "workers": options.workers,
            "progress": progress,
            "say": lambda text: print(f"refused: {' '.join(text.splitlines())}", file=sys.stderr, flush=True),
        }
        try:
            if options.landmarks_only:
                outcome = add_landmarks(out, settings, **shared)
            else:
                outcome = _prepare_cohort(options, settings, shared)
        except OSError as err:
            raise console.unwritable(out, err) from err
        except KeyboardInterrupt:
            print("What is finished is kept: the same command with --resume goes on.", file=sys.stderr)
            raise
    for warning in outcome.warnings:
        print(f"note: {' '.join(warning.splitlines())}", file=sys.stderr)
    kept = f" ({outcome.kept} of them by an earlier run)" if outcome.kept else ""
    print(
        f"{outcome.prepared} videos prepared{kept}, {len(outcome.problems)} refused; the face was detected in "
        f"{100 * outcome.detected:.1f} % of the frames"
    )
    if not options.landmarks_only:
        print(f"Look at:    {out / 'report.html'}")
        print(f"Search:     python -m sweeps.run fusion_search --data-root {shlex.quote(str(out))}")
    return console.USER_ERROR if outcome.problems else 0


def _prepare_cohort(options: argparse.Namespace, settings: PrepareSettings, shared: dict[str, Any]) -> Outcome:
    if options.labels is None:
        raise ConfigError("prepare needs the labels of the videos, got none. Add --labels labels.csv.")
    trim = [name.strip() for name in options.trim.split(",")]
    if len(trim) != 2 or not all(trim):
        raise ConfigError(f"--trim must name two columns of the labels, got {options.trim!r}. Use --trim start,end.")
    wanted = options.test_patients
    outcome = prepare_cohort(
        options.folders[0],
        options.folders[1],
        options.labels,
        settings,
        trim=(trim[0], trim[1]),
        test_patients=[name.strip() for name in wanted.split(",") if name.strip()] if wanted is not None else None,
        test_fraction=options.test_fraction,
        seed=options.seed,
        with_images=options.with_images,
        **shared,
    )
    read_manifest(Store(options.folders[-1]))
    return outcome


def _ray_executor(stack: contextlib.ExitStack, address: str) -> Executor:
    found = entry_point("qafe.executors", "ray")
    if found is None:
        raise ConfigError("--address needs Ray, which comes with the whole project. Install it: pip install -e .")
    executor: Executor = found.load()(address)
    return stack.enter_context(executor)


def _add_sample(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sub = commands.add_parser("sample", help="make the generated sample dataset")
    sub.add_argument("folder", type=Path, help="where to make it; must not exist or be empty")
    usual = SampleConfig()
    sub.add_argument("--seed", type=int, default=usual.seed, help="(default: %(default)s)")
    sub.add_argument("--train-patients", type=int, default=usual.train_patients, help="(default: %(default)s)")
    sub.add_argument("--test-patients", type=int, default=usual.test_patients, help="(default: %(default)s)")
    sub.add_argument(
        "--clips", type=int, default=usual.clips, help="of each expression and patient (default: %(default)s)"
    )
    sub.set_defaults(run=_sample)


def _sample(options: argparse.Namespace) -> int:
    config = SampleConfig(
        seed=options.seed,
        train_patients=options.train_patients,
        test_patients=options.test_patients,
        clips=options.clips,
    )
    try:
        with console.progress(f"making the sample dataset in {options.folder}") as progress:
            folder = make_sample(options.folder, config, progress=progress)
    except OSError as err:
        raise console.unwritable(options.folder, err) from err
    print(folder)
    return 0


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sub = commands.add_parser(
        "train",
        help="train one model for each expression, without Ray or MLflow",
        description="Trains one model for each expression. On several GPUs: torchrun --nproc-per-node 2 -m qafe train "
        "...; train.batch_size then counts the clips of all GPUs together, and the numbers stay those of one "
        "(train.sync_batchnorm).",
    )
    sub.add_argument("--data-root", type=Path, required=True, help="a prepared dataset")
    sub.add_argument("--expression", help="one, several with commas, or all (default: smile, or the only one)")
    sub.add_argument("--preset", choices=sorted(PRESETS), help="default: paper, or the settings of --init")
    sub.add_argument(
        "--init",
        type=Path,
        help="start with the weights and settings of a folder that train or import wrote",
    )
    sub.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="e.g. model.fusion.layers=2")
    sub.add_argument("--no-cache", action="store_true", help="keep no decoded frames on disk (data.cache_gb=0)")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    sub.add_argument("--out", type=Path, help="folder for the weights, config and history (default: not kept)")
    sub.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    from .training import read_config, train_expressions

    settings = dotted.parse_settings(options.set) | ({"data.cache_gb": "0"} if options.no_cache else {})
    if options.init is not None and options.preset is not None:
        raise ConfigError(f"--init has settings of its own, got --preset {options.preset}, too. Leave one of them out.")
    base = PRESETS[options.preset or "paper"]() if options.init is None else read_config(options.init)
    config = dotted.override(base, settings)
    named = [name for name in PRETRAINED if dotted.flatten(config)[name]]
    if options.init is not None and named:
        raise ConfigError(f"--init gives the encoders' weights too, got {named[0]} beside it. Leave one of them out.")
    train_expressions(config, options.data_root, options.expression, options.device, options.out, options.init)
    return 0


def _add_import(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sub = commands.add_parser(
        "import",
        help="make a model folder out of the authors' own trained files",
        description="The files of the authors' training script, one for each expression, become a model folder that "
        "score, train --init and the registry (register --weights) take. Nothing that a file names is executed.",
    )
    sub.add_argument("files", type=Path, nargs="+", metavar="FILE", help="e.g. smile.pth")
    sub.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    sub.add_argument("--expression", required=True, help="what the files were trained on, with commas between them")
    sub.set_defaults(run=_import)


def _import(options: argparse.Namespace) -> int:
    from .importing import import_models

    names = [name.strip() for name in options.expression.split(",")]
    try:
        import_models(options.files, names, options.out)
    except OSError as err:
        raise console.unwritable(options.out, err) from err
    print(f"{options.out}: {', '.join(names)}")
    return 0


def _add_score(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sub = commands.add_parser("score", help="score prepared clips with a trained model")
    sub.add_argument("clips", type=Path, nargs="+", metavar="CLIP_FOLDER", help="frames/<patient>/<video>")
    sub.add_argument("--model", required=True, help="a folder that train wrote, or models:/qafe-net@champion")
    sub.add_argument("--expression", help="which expression the clip shows; needed if the model knows several")
    sub.add_argument("--json", action="store_true", help="print one JSON object for each clip")
    sub.set_defaults(run=_score)


def _score(options: argparse.Namespace) -> int:
    from .device import use_own_cores
    from .score import Scorer

    use_own_cores()
    scorer = Scorer(fetch_model(options.model))
    for clip in options.clips:
        score = scorer.score_clip(clip, options.expression)
        if options.json:
            print(json.dumps({"clip": str(clip), "expression": options.expression, "score": score}))
        else:
            print(f"{score:.6f}  {clip}")
    return 0


def _add_cache(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sub = commands.add_parser("cache", help="show how much space decoded frames take, or free it")
    sub.add_argument("--clear", action="store_true", help="delete all of them; they are made again when needed")
    sub.set_defaults(run=_cache)


def _cache(options: argparse.Namespace) -> int:
    folder = cache_folder()
    try:
        if options.clear:
            clear_cache()
        videos, size = cache_size()
    except OSError as err:
        raise console.unwritable(folder, err) from err
    print(f"{folder}: {videos} videos, {size / 2**30:.2f} GiB")
    return 0


def fetch_model(source: str) -> Path:
    """A model's folder on this disk: a path as it is, ``<scheme>:/...`` through what is installed for the scheme.

    Packages offer schemes as entry points in the group ``qafe.model_sources``; the MLflow registry's ``models``
    comes with the ``tracking`` package.

    Raises:
        CheckpointError: nothing is installed for the scheme.
    """
    scheme, separator, _ = source.partition(":/")
    if not separator or len(scheme) == 1:
        return Path(source)
    found = entry_point("qafe.model_sources", scheme)
    if found is None:
        raise CheckpointError(
            f"a model is a folder or a URI that an installed package can fetch, got {source!r} (--model). "
            "Install the project (pip install -e .) for models:/ URIs."
        )
    fetch = found.load()
    return Path(fetch(source))


if __name__ == "__main__":
    sys.exit(main())
