"""The studies that come with the project."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import get_args

from qafe.config import ATTENTION_FUSIONS, Loss
from qafe.errors import ConfigError

from .plan import STUDY_FILE, STUDY_FOLDER, Plan
from .sweep import Grid, Suggester, Sweep
from .user_file import is_file_name, load_sweep

NOISE_LOSSES = ("bmc", "gai")
"""The losses that assume a standard deviation of the label noise."""


def fusion_space(trial: Suggester) -> None:
    """How the two streams meet, and how landmarks are drawn.

    Layers, heads, MLP, direction and drop path exist only in the fusions that attend.
    """
    kind = trial.suggest_categorical("model.fusion.kind", ["cross", "cross_split", "gated", "concat", "sum"])
    if kind in ATTENTION_FUSIONS:
        trial.suggest_int("model.fusion.layers", 1, 4)
        width = trial.base.model.fusion.width
        trial.suggest_categorical("model.fusion.heads", [heads for heads in (1, 2, 4, 8) if width % heads == 0])
        trial.suggest_categorical("model.fusion.mlp_ratio", [1.0, 2.0, 4.0])
        trial.suggest_categorical("model.fusion.query", ["both", "rgb", "heatmap"])
        trial.suggest_float("model.fusion.drop_path", 0.0, 0.3)
    trial.suggest_categorical("model.fusion.position", ["heatmap", "rgb", "both", "none"])
    trial.suggest_categorical("model.fusion.mixer", ["conv1d", "none", "attention_pool"])
    trial.suggest_float("model.fusion.dropout", 0.0, 0.4)
    drawing_space(trial)


def heatmap_space(trial: Suggester) -> None:
    """How landmarks are drawn, and how large the encoder sees them."""
    drawing_space(trial)
    size = trial.base.model.heatmap.size_px
    trial.suggest_categorical("model.heatmap.size_px", sorted({max(8, 3 * size // 4), size, 3 * size // 2}))


def drawing_space(trial: Suggester) -> None:
    """How landmarks are drawn: width of a point, blur, which points, colour."""
    trial.suggest_float("data.heatmap.sigma_px", 0.5, 3.0)
    trial.suggest_int("data.heatmap.window_px", 2, 7)
    trial.suggest_categorical("data.heatmap.blur_px", [0, 3, 5, 7])
    trial.suggest_categorical("data.heatmap.points", ["all", "eyes_brows", "mouth", "nose"])
    trial.suggest_categorical("data.heatmap.colour", ["jet", "grey"])


def optimiser_space(trial: Suggester) -> None:
    """How the model is trained: an order of magnitude or two around the published SGD at 1e-3 with BMC.

    One range of learning rates serves both optimisers, so that a sampler learns from one what it can for the other.
    """
    base = trial.base.train
    trial.suggest_categorical("train.optimizer", ["sgd", "adamw"])
    trial.suggest_float("train.lr", 1e-5, 1e-1, log=True)
    trial.suggest_float("train.weight_decay", 1e-6, 1e-1, log=True)
    trial.suggest_float("train.momentum", 0.5, 0.99)
    if trial.suggest_categorical("train.schedule", ["step", "cosine", "constant"]) == "step":
        trial.suggest_int("train.step_epochs", max(1, base.epochs // 10), max(base.epochs, base.step_epochs))
        trial.suggest_float("train.step_factor", 0.05, 0.5, log=True)
    trial.suggest_int("train.warmup_epochs", 0, max(1, base.epochs // 10, base.warmup_epochs))
    trial.suggest_categorical("train.clip_norm", [0.0, 0.5, 1.0, 5.0])
    # A batch of one clip has zero BMC loss, and accumulate may be 1.
    losses = [name for name in get_args(Loss) if name != "bmc" or base.batch_size > 1]
    loss = trial.suggest_categorical("train.loss", losses)
    if loss in NOISE_LOSSES:
        trial.suggest_float("train.noise_sigma", 0.1, 3.0, log=True)
        trial.suggest_categorical("train.train_noise_sigma", [False, True])
    if loss == "huber":
        trial.suggest_float("train.huber_delta", 0.25, 2.0, log=True)
    trial.suggest_categorical("train.accumulate", [1, 2, 4])


STUDIES: dict[str, Sweep] = {
    "fusion_search": Sweep(
        name="fusion_search",
        about="how the RGB and heatmap streams are fused, and how heatmaps are drawn",
        space=fusion_space,
    ),
    "heatmap_search": Sweep(
        name="heatmap_search",
        about="how heatmaps are drawn and how large, with the preset's fusion",
        space=heatmap_space,
    ),
    "optimiser_search": Sweep(
        name="optimiser_search",
        about="optimiser, learning rate and its schedule, loss and clipping, with the preset's model",
        space=optimiser_space,
        trials=32,
    ),
    "paper_baseline": Sweep(
        name="paper_baseline",
        about="the preset's own settings on every expression, with 5 seeds: nothing is searched",
        space=Grid({"train.seed": (0, 1, 2, 3, 4)}),
        expressions="all",
    ),
    "seed_noise": Sweep(
        name="seed_noise",
        about="one configuration over 4 seeds and 4 splits of the patients: how much of a score is noise",
        space=Grid({"train.seed": (0, 1, 2, 3), "data.split_seed": (0, 1, 2, 3)}),
    ),
}


def find_study(name: str) -> Sweep:
    """The study with this name, or in this Python file.

    Raises:
        ConfigError: there is none (the nearest name is offered), or the file is not one study.
    """
    if is_file_name(name):
        sweep = load_sweep(Path(name))
        if sweep.name in STUDIES:
            raise ConfigError(f"{sweep.name} is a study of the project, got it as the name of {name}. Rename yours.")
        return sweep
    if name not in STUDIES:
        near = difflib.get_close_matches(name, STUDIES, n=1, cutoff=0.3)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"a study must be one of {', '.join(STUDIES)}, or a Python file, got {name!r}.{hint}")
    return STUDIES[name]


def planned_sweep(plan: Plan) -> Sweep:
    """The study of a sweep that has begun; a user's own as it was then.

    Raises:
        ConfigError: this version of the project does not have it.
    """
    copy = Path(plan.folder) / STUDY_FOLDER / STUDY_FILE
    return load_sweep(copy) if copy.is_file() else find_study(plan.study)
