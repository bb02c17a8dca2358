"""What ``python -m qafe import`` does: the authors' own trained files become a model folder of ours."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from . import dotted
from .config import Config, paper
from .errors import ConfigError
from .model import weights
from .model.qafenet import build
from .score import SUFFIX
from .tables import EXPRESSION_RULE, is_expression_name
from .training import CONFIG_FILE, output_folder

SOURCE_KEY = "qafe.imported_sha256"
"""The entry of a model file's metadata that holds the digest of the authors' file."""


def published_config() -> Config:
    """The settings under which the authors' trained weights make sense: the `paper` preset, with the colour and time
    that their code scrambles, and heatmaps without the first point, as it draws them."""
    return dotted.override(paper(), {"model.rgb_axis_order": "reference", "data.heatmap.skip_first": True})


def import_models(files: Sequence[Path], expressions: Sequence[str], out: Path) -> None:
    """Writes a model folder, as ``train --out`` does, from one file of the authors for each expression.

    Raises:
        ConfigError: not one expression for each file, a name that no expression can have, or a folder that is not new.
        CheckpointError: a file is missing, damaged or not of their layout; nothing is written.
    """
    if len(files) != len(expressions):
        raise ConfigError(
            f"each file holds the model of one expression, got {len(files)} files and {len(expressions)} expressions "
            f"({','.join(expressions)}). Name as many with --expression."
        )
    for name in expressions:
        if not is_expression_name(name) or expressions.count(name) > 1:
            raise ConfigError(f"{EXPRESSION_RULE}, and once, got {name!r} (--expression). Correct it.")
    config = published_config()
    with output_folder(out, "OUT") as (beside, folder):
        for path, expression in zip(files, expressions, strict=True):
            model = build(config)
            weights.load_reference_checkpoint(model, path)
            with open(path, "rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            weights.save(beside / (expression + SUFFIX), model, config, {SOURCE_KEY: digest})
        (beside / CONFIG_FILE).write_text(dotted.to_json(config))
        folder.mkdir(exist_ok=True)
        for path in sorted(beside.iterdir()):
            path.rename(folder / path.name)
