"""The authors' own network, for who has their repository; nothing of it is in ours.

What is known of it here are the names in ../shared/reference/keys_*.json, and the shapes in GOLDENS.md beside them.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qafe.errors import ConfigError

MODULES: tuple[tuple[str, str, str, tuple[Any, ...], int], ...] = (
    ("rgb", "models/ST_Former.py", "GenerateModel", (5,), 18_065_984),
    ("heatmap", "models/slowonly.py", "ResNet3dSlowOnly", (), 1_972_128),
    ("decoder", "models/vit_decoder_two.py", "decoder_fuser", (512, 8, 3, 0.0), 9_459_310),
    ("evaluator", "models/evaluator.py", "Evaluator", (1, "MLP"), 164_353),
)
"""Our name, their file, class and arguments, and how many parameters it has at the commit that was recorded."""
SEGMENTS = 5


def check(root: Path) -> None:
    """That the files are there; imports nothing.

    Raises:
        ConfigError: they are not.
    """
    missing = [file for _, file, *_ in MODULES if not (root / file).is_file()]
    if missing:
        raise ConfigError(
            f"--published must be the authors' repository (github.com/shuchaoduan/QAFE-Net), got {root} without "
            f"{', '.join(missing)}. Clone it, or leave --published away: the rival is then our rewriting."
        )


class Published(nn.Module):
    """Their four modules, called as their main script calls them: what `QAFENet.forward` takes and gives.

    Raises:
        ConfigError: a module cannot be imported or built, or is not the one that is known here.
    """

    def __init__(self, root: Path) -> None:
        super().__init__()
        check(root)
        sys.path.insert(0, str(root.resolve()))
        for name, file, kind, arguments, parameters in MODULES:
            try:
                module = getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), kind)(*arguments)
            except Exception as err:  # Foreign code: whatever it raises.
                raise ConfigError(
                    f"the authors' {kind} must be importable from {root / file}, got {type(err).__name__}: {err}. "
                    "Install what their README asks for (mmcv 1.x and timm) beside torch."
                ) from err
            found = sum(parameter.numel() for parameter in module.parameters())
            if found != parameters:
                raise ConfigError(
                    f"the authors' {kind} must have {parameters:,} parameters, got {found:,} from {root / file}. "
                    "Check out commit 9afdd314."
                )
            self.add_module(name, module)

    def forward(self, rgb: Tensor, heatmap: Tensor) -> Tensor:
        """[B,3,80,224,224] and [B,3,80,56,56] -> [B]."""
        # Segment-major rows; RGB goes in without a permutation, as published.
        frames = [torch.cat(clip.chunk(SEGMENTS, dim=2)) for clip in (rgb, heatmap)]
        tokens = []
        for encoder, x in zip((self.rgb, self.heatmap), frames, strict=True):
            row = encoder(x)
            row = row.flatten(2).mean(2) if row.ndim > 2 else row
            tokens.append(row.view(SEGMENTS, len(rgb), -1).transpose(0, 1).contiguous())
        score: Tensor = self.evaluator(self.decoder(tokens[1], tokens[0]))
        return score.flatten(1).mean(1)
