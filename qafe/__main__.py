"""python -m qafe sample | train | score"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np

from . import config as configs
from . import console, metrics
from .config import EXPRESSIONS, PRESETS
from .data.cohort import choose_expressions, load_cohort
from .data.sample import SampleConfig, make_sample
from .errors import CheckpointError, ConfigError
from .history import ExpressionHistory, History, write_history


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    parser = console.parser("python -m qafe", "Train and use QAFE-Net on prepared face clips.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="sample | train | score")
    _add_sample(commands)
    _add_train(commands)
    _add_score(commands)
    return console.run(lambda options: int(options.run(options)), parser, argv)


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
    sub = commands.add_parser("train", help="train one model for each expression, without Ray or MLflow")
    sub.add_argument("--data-root", type=Path, required=True, help="a prepared dataset")
    sub.add_argument("--expression", default="smile", help="one, several with commas, or all (default: smile)")
    sub.add_argument("--preset", choices=sorted(PRESETS), default="paper")
    sub.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="e.g. model.fusion.layers=2")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    sub.add_argument("--out", type=Path, help="folder for the weights, config and history (default: not kept)")
    sub.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    from .score import SUFFIX, Scorer
    from .train import BEST_FILE, fit, pick_device

    config = configs.override(PRESETS[options.preset](), configs.parse_settings(options.set))
    device = pick_device(options.device)
    cohort = load_cohort(options.data_root, config.data)
    expressions = choose_expressions(cohort.manifest, options.expression)
    test: dict[str, float] = {}
    history: History = {}
    with _output_folder(options.out) as folder:
        (folder / "config.json").write_text(configs.to_json(config))
        for expression in expressions:
            part = cohort.only(expression)
            entry = history[expression] = ExpressionHistory.start(part.validation)
            result = None
            try:
                for result in fit(config, part.store, part.train, part.validation, device=device):
                    entry.add(result)
                    print(
                        f"{expression} epoch {result.epoch}/{config.train.epochs}: loss {result.train_loss:.4f}, "
                        f"validation Spearman {result.metrics['spearman']:.3f} (best {result.best_spearman:.3f} in "
                        f"epoch {result.best_epoch}), MAE {result.metrics['mae']:.3f}, {result.seconds:.1f} s",
                        file=sys.stderr,
                    )
            except FloatingPointError as err:
                raise ConfigError(
                    f"the training loss must stay finite: {err} of {expression}, with train.lr={config.train.lr:g}. "
                    f"Set train.lr={config.train.lr / 10:g} or train.clip_norm=1."
                ) from err
            assert result is not None
            result.save(folder / expression)
            (folder / expression / BEST_FILE).rename(folder / (expression + SUFFIX))
            shutil.rmtree(folder / expression)
            write_history(folder, history)
            if part.test:
                scores = Scorer(folder, device).score_samples(part.store, part.test)
                test[expression] = metrics.spearman(scores, np.array([sample.score for sample in part.test]))
    print(
        _published_row(history, "validation", {name: entry.best.metrics["spearman"] for name, entry in history.items()})
    )
    print(_published_row(history, "test", test))
    return 0


def _published_row(history: History, split: str, spearman: dict[str, float]) -> str:
    """A row of the paper's table: Spearman x 100 for each expression, then the mean."""
    columns = [name for name in EXPRESSIONS if name in history] + [n for n in history if n not in EXPRESSIONS]
    values = [f"{name} {100 * spearman[name]:.2f}" if name in spearman else f"{name} -" for name in columns]
    mean = f"mean {100 * sum(spearman.values()) / len(spearman):.2f}" if spearman else "mean -"
    return " | ".join([f"QAFE-Net ({split}, Spearman x 100)", *values, mean])


@contextlib.contextmanager
def _output_folder(wanted: Path | None) -> Iterator[Path]:
    """A folder to write to, whose content is moved to the wanted one when all went well; else nothing is kept."""
    if wanted is None:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
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
        yield Path(name)
        wanted.mkdir(exist_ok=True)
        for path in Path(name).iterdir():
            path.rename(wanted / path.name)


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
