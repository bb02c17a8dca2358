"""python -m qafe prepare | sample | train | score | cache"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import console, dotted, metrics
from .config import EXPRESSIONS, PRESETS, Config
from .data.cache import cache_folder, cache_size, clear_cache
from .data.cohort import Cohort, choose_expressions, load_cohort
from .data.manifest import read_manifest
from .data.sample import SampleConfig, make_sample
from .errors import CheckpointError, ConfigError, QafeError
from .faces.detect import DEFAULT_MODELS, DEFAULT_ROOT
from .faces.landmarks_only import add_landmarks
from .faces.prepare import Outcome, prepare_cohort
from .faces.settings import PrepareSettings
from .faces.track import TrackSettings
from .history import HISTORY_FILE, ExpressionHistory, History, write_history
from .store import Store

if TYPE_CHECKING:
    import torch

    from .train import EpochResult


CONFIG_FILE = "config.json"
_UNFINISHED = "unfinished"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    parser = console.parser("python -m qafe", "Train and use QAFE-Net on prepared face clips.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="prepare | sample | train | score | cache")
    _add_prepare(commands)
    _add_sample(commands)
    _add_train(commands)
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
    who = sub.add_mutually_exclusive_group()
    who.add_argument("--test-patients", help="who is tested on, with commas between them")
    who.add_argument("--test-fraction", type=float, default=0.25, help="share of patients to draw (%(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="of the draw (%(default)s)")
    sub.add_argument("--resume", action="store_true", help="keep what an earlier run finished, and do the rest")
    sub.add_argument("--with-images", action="store_true", help="draw faces into report.html")
    sub.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (%(default)s)")
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
            every_frames=options.detect_every, gap_frames=options.max_gap, min_detected=options.min_detected
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
            raise _unwritable(out, err) from err
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
    found = list(entry_points(group="qafe.executors", name="ray"))
    if not found:
        raise ConfigError("--address needs Ray, which comes with the whole project. Install it: pip install -e .")
    executor: Executor = found[0].load()(address)
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
        raise _unwritable(options.folder, err) from err
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
    sub.add_argument("--preset", choices=sorted(PRESETS), default="paper")
    sub.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="e.g. model.fusion.layers=2")
    sub.add_argument("--no-cache", action="store_true", help="keep no decoded frames on disk (data.cache_gb=0)")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    sub.add_argument("--out", type=Path, help="folder for the weights, config and history (default: not kept)")
    sub.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    from .device import pick_device
    from .distributed import launched

    finished: list[str] = []
    with launched() as join, _finished_said(options.out, finished), contextlib.ExitStack() as stack:
        settings = dotted.parse_settings(options.set) | ({"data.cache_gb": "0"} if options.no_cache else {})
        config = dotted.override(PRESETS[options.preset](), settings)
        stack.enter_context(_shortage_said(config, options.out))
        device = pick_device(options.device)
        cohort = load_cohort(options.data_root, config.data)
        parts = {name: cohort.only(name) for name in choose_expressions(cohort.manifest, options.expression)}
        for expression, part in parts.items():
            _check(config, part, expression)
        if join(device).first:
            _train_and_keep(options.out, config, parts, device, finished)
        else:
            for expression, part in parts.items():
                for _ in _epochs(config, part, expression, device):
                    pass
                finished.append(expression)
    return 0


def _check(config: Config, part: Cohort, expression: str) -> None:
    """Refuses an expression that cannot be trained or tested, and names it."""
    from .data.dataset import ClipDataset
    from .train import check_samples

    try:
        check_samples(config, part.store, part.train, part.validation)
        ClipDataset(part.store, part.test, config, train=False)
    except QafeError as err:
        raise type(err)(f"{expression}: {err}") from err


def _train_and_keep(
    out: Path | None, config: Config, parts: Mapping[str, Cohort], device: torch.device, finished: list[str]
) -> None:
    """Trains and tests each expression; its model is kept from when it is trained, whatever comes after it."""
    from .score import SUFFIX, Scorer
    from .train import BEST_FILE

    test: dict[str, float] = {}
    history: History = {}
    with _output_folder(out) as (beside, folder):
        (beside / CONFIG_FILE).write_text(dotted.to_json(config))
        for expression, part in parts.items():
            entry = ExpressionHistory.start(part.validation)
            result = None
            for result in _epochs(config, part, expression, device):
                entry.add(result)
                print(
                    f"{expression} epoch {result.epoch}/{config.train.epochs}: loss {result.train_loss:.4f}, "
                    f"validation Spearman {result.metrics['spearman']:.3f} (best {result.best_spearman:.3f} in "
                    f"epoch {result.best_epoch}), MAE {result.metrics['mae']:.3f}, {result.seconds:.1f} s",
                    file=sys.stderr,
                )
            assert result is not None
            history[expression] = entry
            result.save(beside / _UNFINISHED)
            write_history(beside, history)
            folder.mkdir(exist_ok=True)
            (beside / _UNFINISHED / BEST_FILE).rename(folder / (expression + SUFFIX))
            (beside / HISTORY_FILE).rename(folder / HISTORY_FILE)
            if not finished:
                (beside / CONFIG_FILE).rename(folder / CONFIG_FILE)
            finished.append(expression)
            shutil.rmtree(beside / _UNFINISHED)
            if part.test:
                scores = Scorer(folder, device).score_samples(part.store, part.test)
                test[expression] = metrics.spearman(scores, np.array([sample.score for sample in part.test]))
    print(
        _published_row(history, "validation", {name: entry.best.metrics["spearman"] for name, entry in history.items()})
    )
    print(_published_row(history, "test", test))


@contextlib.contextmanager
def _finished_said(out: Path | None, finished: Sequence[str]) -> Iterator[None]:
    """What ends the block early says which expressions have been finished, and where their models are."""
    from .score import SUFFIX

    try:
        yield
    except BaseException as err:
        # Of processes that train together the first one writes, and another one may be ahead of it.
        kept = [name for name in finished if out is not None and (out / (name + SUFFIX)).is_file()]
        if not kept:
            raise
        said = f"Finished, and kept in {out}: {', '.join(kept)}."
        if isinstance(err, QafeError):
            raise type(err)(f"{err} {said}") from err
        if console.speaks():
            print(said, file=sys.stderr)
        raise


@contextlib.contextmanager
def _shortage_said(config: Config, out: Path | None) -> Iterator[None]:
    """Says in one line what the block lacks: memory, room on the disk, or leave to read or write a file."""
    from .device import out_of_memory

    try:
        yield
    except OSError as err:
        place = err.filename or out or tempfile.gettempdir()
        raise ConfigError(
            f"training must be able to read its data and to write its results, got {err.strerror or err} ({place}). "
            "Make room there, or correct its permissions."
        ) from err
    except (RuntimeError, MemoryError) as err:
        if not out_of_memory(err):
            raise
        batch, step = config.train.batch_size, config.train.batch_size * config.train.accumulate
        ways = []
        if batch > 1:
            half = max(size for size in range(1, batch // 2 + 1) if step % size == 0)
            ways.append(f"train.batch_size={half} and train.accumulate={step // half}")
        if not config.train.checkpoint and not config.train.compile:
            ways.append("train.checkpoint=true")
        raise ConfigError(
            f"a batch must fit into memory, and {batch} clip{'s' * (batch > 1)} at once do not (train.batch_size). "
            f"Set {', or '.join(ways) or 'a smaller --preset'}."
        ) from err


def _epochs(config: Config, part: Cohort, expression: str, device: torch.device) -> Iterator[EpochResult]:
    from .train import fit

    try:
        yield from fit(config, part.store, part.train, part.validation, device=device)
    except FloatingPointError as err:
        raise ConfigError(
            f"the training loss must stay finite: {err} of {expression}, with train.lr={config.train.lr:g}. "
            f"Set train.lr={config.train.lr / 10:g} or train.clip_norm=1."
        ) from err


def _published_row(history: History, split: str, spearman: dict[str, float]) -> str:
    """A row of the paper's table: Spearman x 100 for each expression, then the mean."""
    columns = [name for name in EXPRESSIONS if name in history] + [n for n in history if n not in EXPRESSIONS]
    values = [f"{name} {100 * spearman[name]:.2f}" if name in spearman else f"{name} -" for name in columns]
    mean = f"mean {100 * sum(spearman.values()) / len(spearman):.2f}" if spearman else "mean -"
    return " | ".join([f"QAFE-Net ({split}, Spearman x 100)", *values, mean])


@contextlib.contextmanager
def _output_folder(wanted: Path | None) -> Iterator[tuple[Path, Path]]:
    """A folder to write in, and on the same disk the wanted one, where what is whole is moved to.

    The first goes away at the end. The second is not made before there is something to move; None: it is the first.
    """
    if wanted is None:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name), Path(name)
        return
    wanted = wanted.absolute()
    if wanted.exists() and (not wanted.is_dir() or any(wanted.iterdir())):
        raise ConfigError(f"the output folder must be new or empty, got {wanted} (--out). Name another.")
    # A folder that is there may be a mounted volume, and then nothing beside it is on the same disk.
    place = wanted if wanted.is_dir() else wanted.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(prefix=f".{wanted.name}.", dir=place)
    except OSError as err:
        raise _unwritable(wanted, err) from err
    with beside as name:
        yield Path(name), wanted


def _unwritable(folder: Path, err: OSError) -> ConfigError:
    return ConfigError(f"the folder must be one that can be written, got {folder} ({err.strerror}). Name another.")


def _add_score(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sub = commands.add_parser("score", help="score prepared clips with a trained model")
    sub.add_argument("clips", type=Path, nargs="+", metavar="CLIP_FOLDER", help="frames/<patient>/<video>")
    sub.add_argument("--model", required=True, help="a folder that train wrote, or models:/qafe-net@champion")
    sub.add_argument("--expression", help="which expression the clip shows; needed if the model knows several")
    sub.add_argument("--json", action="store_true", help="print one JSON object for each clip")
    sub.set_defaults(run=_score)


def _score(options: argparse.Namespace) -> int:
    from .score import Scorer

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
        raise _unwritable(folder, err) from err
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
    found = list(entry_points(group="qafe.model_sources", name=scheme))
    if not found:
        raise CheckpointError(
            f"a model is a folder or a URI that an installed package can fetch, got {source!r} (--model). "
            "Install the project (pip install -e .) for models:/ URIs."
        )
    fetch = found[0].load()
    return Path(fetch(source))


if __name__ == "__main__":
    sys.exit(main())
