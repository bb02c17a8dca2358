"""Weights on disk: our files, and the three layouts that the authors of QAFE-Net publish or read.

Ours is one safetensors file with the config in its metadata: it runs no code when it is read. The authors' files
are PyTorch pickles: they are read with ``weights_only=True``, and every class that they name and PyTorch does not
know is replaced by an inert one, so that nothing foreign is imported or executed.

The authors' names are mapped by rules (`REFERENCE_NAMES`), one line for each kind of layer.
"""

import itertools
import logging
import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ..config import Config, HeatmapEncoderConfig, ModelConfig
from ..dotted import from_json, to_json
from ..errors import CheckpointError, ConfigError
from .qafenet import QAFENet, build

logger = logging.getLogger(__name__)

CONFIG_KEY = "qafe.config"
"""The entry of a file's metadata that holds its config as JSON."""

REFERENCE_NAMES: tuple[tuple[str, str], ...] = (
    # RGB encoder
    (r"^spatial\.position$", "model.s_former.pos_embedding"),
    (r"^spatial\.transformer\.", "model.s_former.spatial_transformer.layers."),
    (r"^spatial\.", "model.s_former."),
    (r"^temporal\.class_token$", "model.t_former.cls_token"),
    (r"^temporal\.position$", "model.t_former.pos_embedding"),
    (r"^temporal\.transformer\.", "model.t_former.temporal_transformer.layers."),
    (r"(\.layers\.\d+)\.attention_norm\.", r"\1.0.fn.norm."),
    (r"(\.layers\.\d+)\.qkv\.", r"\1.0.fn.fn.to_qkv."),
    (r"(_transformer\.layers\.\d+)\.out\.", r"\1.0.fn.fn.to_out.0."),
    (r"(\.layers\.\d+)\.mlp_norm\.", r"\1.1.fn.norm."),
    (r"(_transformer\.layers\.\d+)\.expand\.", r"\1.1.fn.fn.net.0."),
    (r"(_transformer\.layers\.\d+)\.contract\.", r"\1.1.fn.fn.net.3."),
    # heatmap encoder
    (r"^heatmap\.stem\.", "SlowOnly.restnet3d.conv1."),
    (r"^heatmap\.stages\.0\.", "SlowOnly.restnet3d.layer1."),
    (r"^heatmap\.stages\.1\.", "SlowOnly.restnet3d.layer2."),
    (r"^heatmap\.stages\.2\.", "SlowOnly.restnet3d.layer3."),
    (r"^heatmap\.stages\.3\.", "SlowOnly.restnet3d.layer4."),
    (r"^(SlowOnly\..*)\.reduce\.", r"\1.conv1."),
    (r"^(SlowOnly\..*)\.spatial\.", r"\1.conv2."),
    (r"^(SlowOnly\..*)\.expand\.", r"\1.conv3."),
    (r"^(SlowOnly\..*)\.shortcut\.", r"\1.downsample."),
    # fusion and head
    (r"^fusion\.position_heatmap$", "decoder.pos_embed"),
    (r"^fusion\.unused_norm\.", "decoder.norm."),
    (r"^fusion\.mixer\.conv\.", "decoder.conv."),
    (r"^fusion\.layers\.(\d+)\.blocks\.shared\.", r"decoder.model.\1."),
    (r"^(decoder\.model\.\d+)\.norm_query\.", r"\1.norm_q."),
    (r"^(decoder\.model\.\d+)\.norm_value\.", r"\1.norm_v."),
    (r"^(decoder\.model\.\d+)\.norm_mlp\.", r"\1.norm2."),
    (r"^(decoder\.model\.\d+)\.query\.", r"\1.attn.q_map."),
    (r"^(decoder\.model\.\d+)\.key\.", r"\1.attn.k_map."),
    (r"^(decoder\.model\.\d+)\.value\.", r"\1.attn.v_map."),
    (r"^(decoder\.model\.\d+)\.out\.", r"\1.attn.proj."),
    (r"^(decoder\.model\.\d+)\.expand\.", r"\1.mlp.fc1."),
    (r"^(decoder\.model\.\d+)\.contract\.", r"\1.mlp.fc2."),
    (r"^head\.layers\.0\.", "evaluator.evaluator.layer1."),
    (r"^head\.layers\.1\.", "evaluator.evaluator.layer2."),
    (r"^head\.layers\.2\.", "evaluator.evaluator.layer3."),
)
"""Our name -> the authors' ``module.key``: every rule that matches is applied, top to bottom."""

REFERENCE_MODULES = ("model", "SlowOnly", "decoder", "evaluator")
"""The four state dicts in the authors' own checkpoint."""


def save(
    path: Path | str,
    model: nn.Module,
    config: Config,
    extra: Mapping[str, str] | None = None,
    *,
    synced: bool = True,
) -> None:
    """Writes weights and config to one safetensors file, whole or not at all.

    Args:
        extra: further metadata, text to text.
        synced: wait until the disk has it.
    Raises:
        OSError: the folder is missing or not writable, or its disk is full.
    """
    path = Path(path)
    # Contiguous copies on the CPU: safetensors refuses views that share memory.
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    data = to_bytes(state, metadata={**(extra or {}), CONFIG_KEY: to_json(config)})
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            if synced:
                os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def load(path: Path | str) -> tuple[QAFENet, Config, dict[str, str]]:
    """The model in eval mode, its config, and the extra metadata of a file that `save` wrote.

    Raises:
        CheckpointError: the file is missing, damaged or not one of ours, or its weights do not fit its config.
    """
    state, metadata = _read_safetensors(Path(path))
    if CONFIG_KEY not in metadata:
        raise CheckpointError(
            f"a model file must hold its config ({CONFIG_KEY} in its metadata), got {path} without one. Use a file "
            "that qafe train wrote, or name this one in model.rgb.weights or model.heatmap.weights."
        )
    try:
        config = from_json(metadata.pop(CONFIG_KEY))
    except ConfigError as err:
        raise CheckpointError(
            f"the config inside {path} does not fit this version of qafe: {err} Use the version that wrote it."
        ) from err
    model = build(config)
    _fill(model, state, str(path))
    return model.eval(), config, metadata


def load_state(model: nn.Module, path: Path | str) -> None:
    """Fills a model from a file that `save` wrote; every name and shape must agree.

    Raises:
        CheckpointError: the file is missing or damaged, or a name is missing, extra or of another shape.
    """
    state, _ = _read_safetensors(Path(path))
    _fill(model, state, str(path))


def load_pretrained(model: QAFENet, config: ModelConfig) -> None:
    """Fills the encoders from ``model.rgb.weights`` and ``model.heatmap.weights``; an empty name changes nothing.

    Each may be the authors' file (Former-DFER for RGB, pose_only for heatmaps) or one of ours, of which the
    encoder's part is taken.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit the encoder.
    """
    if config.rgb.weights:
        _load_rgb(model, Path(config.rgb.weights))
    if config.heatmap.weights:
        _load_heatmap(model, Path(config.heatmap.weights), config.heatmap)


def load_reference_checkpoint(model: QAFENet, path: Path | str) -> None:
    """Fills the whole model from a checkpoint of the authors' training script.

    The model must have the published layout (the `paper` preset); its weights only make sense with
    ``model.rgb_axis_order=reference``, and a warning says so otherwise.

    Raises:
        CheckpointError: the file is missing or damaged, lacks one of the four state dicts, or does not fit.
    """
    top = _read_pickle(Path(path))
    missing = [name for name in REFERENCE_MODULES if not isinstance(top.get(name), Mapping)]
    if missing:
        raise CheckpointError(
            f"the authors' checkpoint must hold the state dicts {', '.join(REFERENCE_MODULES)}, got {path} without "
            f"{', '.join(missing)} (it holds {_listed(top)}). Save the state dicts under those names."
        )
    given = {f"{module}.{key}": value for module in REFERENCE_MODULES for key, value in _plain(top[module]).items()}
    if model.config.rgb_axis_order != "reference":
        logger.warning(
            "the published code scrambled colour and time; its weights need model.rgb_axis_order=reference, "
            "this model has %s",
            model.config.rgb_axis_order,
        )
    _fill_renamed(model, given, reference_keys(model), str(path))


def reference_keys(model: nn.Module) -> dict[str, str]:
    """Our name -> the authors' ``module.key``, for every tensor of a model of the published layout.

    Raises:
        CheckpointError: the model has a tensor that the published layout does not have.
    """
    names = {}
    for ours in model.state_dict():
        theirs = ours
        for pattern, replacement in REFERENCE_NAMES:
            theirs = re.sub(pattern, replacement, theirs)
        if theirs.split(".")[0] not in REFERENCE_MODULES:
            raise CheckpointError(
                f"the authors' weights fit only their layout, which has no {ours}. Set model.fusion.kind=cross, "
                "query=both, position=heatmap, mixer=conv1d, width=512 and three head layers (the paper preset)."
            )
        names[ours] = theirs
    return names


def _load_rgb(model: QAFENet, path: Path) -> None:
    """Former-DFER's file: DataParallel names, a classifier to leave out, and a position grid for 112 px."""
    parts = nn.ModuleDict({"spatial": model.spatial, "temporal": model.temporal})
    if _is_safetensors(path):
        _fill(parts, _part(_read_safetensors(path)[0], ("spatial.", "temporal.")), str(path))
        return
    top = _read_pickle(path)
    given = {}
    for key, value in _plain(top.get("state_dict", top)).items():
        if key not in ("fc.weight", "fc.bias"):
            # Former-DFER calls both of its transformers "spatial".
            given["model." + key.replace("t_former.spatial_transformer", "t_former.temporal_transformer")] = value
    position = given.get("model.s_former.pos_embedding")
    if position is not None and position.dim() == 3 and position.shape[1] != model.spatial.grid**2:
        given["model.s_former.pos_embedding"] = _resize_grid(position, model.spatial.grid, path)
    _fill_renamed(parts, given, reference_keys(parts), str(path))


def _load_heatmap(model: QAFENet, path: Path, config: HeatmapEncoderConfig) -> None:
    """The pose file: backbone names, a classifier to leave out, and a stem for 17 joints."""
    parts = nn.ModuleDict({"heatmap": model.heatmap})
    if _is_safetensors(path):
        _fill(parts, _part(_read_safetensors(path)[0], ("heatmap.",)), str(path))
        return
    top = _read_pickle(path)
    given = {
        "SlowOnly.restnet3d." + key.removeprefix("backbone."): value
        for key, value in _plain(top.get("state_dict", top)).items()
        if not key.startswith("cls_head.")
    }
    stem = "SlowOnly.restnet3d.conv1.conv.weight"
    if stem in given and given[stem].dim() == 5:
        given[stem] = _adapt_stem(given[stem], model.heatmap.stem.conv.weight.detach(), config.stem_adaptation)
        logger.info("%s: the first convolution is adapted to heatmaps (%s)", path, config.stem_adaptation)
    _fill_renamed(parts, given, reference_keys(parts), str(path))


def _adapt_stem(
    theirs: Float[Tensor, "O I T H W"], ours: Float[Tensor, "O2 C T2 H2 W2"], how: Literal["random", "mean", "sum"]
) -> Tensor:
    """Their stem for our number of input channels.

    random keeps ours, as published; mean gives each channel the mean kernel; sum shares the summed kernel out, so
    that a map that is equal in all channels gets the same response as before.
    """
    if how == "random":
        return ours
    if how == "mean":
        return theirs.mean(dim=1, keepdim=True).repeat(1, ours.shape[1], 1, 1, 1)
    return theirs.sum(dim=1, keepdim=True).repeat(1, ours.shape[1], 1, 1, 1) / ours.shape[1]


def _resize_grid(position: Float[Tensor, "1 N D"], grid: int, path: Path) -> Float[Tensor, "1 M D"]:
    """Learned positions of a square grid, for another square grid (bicubic, as in arXiv:2010.11929, section 3.2)."""
    old = math.isqrt(position.shape[1])
    if old**2 != position.shape[1]:
        raise CheckpointError(
            f"the learned positions must form a square grid, got {position.shape[1]} of them (s_former.pos_embedding "
            f"in {path}). Use the published Former-DFER file."
        )
    logger.info("%s: positions of the %d x %d grid are interpolated to %d x %d", path, old, old, grid, grid)
    image = position.float().transpose(1, 2).reshape(1, -1, old, old)
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    return image.flatten(2).transpose(1, 2)


def _fill_renamed(model: nn.Module, given: Mapping[str, Tensor], names: Mapping[str, str], place: str) -> None:
    """`_fill` from the authors' names; errors speak of the authors' names too."""
    ours = {theirs: name for name, theirs in names.items()}
    _fill(model, {ours.get(key, key): value for key, value in given.items()}, place, names)


def _fill(model: nn.Module, given: Mapping[str, Tensor], place: str, names: Mapping[str, str] | None = None) -> None:
    """Copies every tensor, or raises before the first is changed."""
    names = names or {}
    expected = model.state_dict()
    for key, value in expected.items():
        if key not in given:
            # Files older than PyTorch 0.4.1 do not count batches, and nothing here reads the count.
            if key.endswith("num_batches_tracked"):
                continue
            raise CheckpointError(
                f"the weights must hold {names.get(key, key)}, which is missing in {place}. Use a file of the same "
                "model, or change the model settings to those it was trained with."
            )
        if given[key].is_floating_point() != value.is_floating_point():
            raise CheckpointError(
                f"{names.get(key, key)} must be of a kind with {value.dtype}, got {given[key].dtype} in {place}. "
                "Use a file of the same model."
            )
        if given[key].shape != value.shape:
            raise CheckpointError(
                f"{names.get(key, key)} must have the shape {list(value.shape)}, got {list(given[key].shape)} in "
                f"{place}. Use a file of the same model, or change the model settings to those it was trained with."
            )
    extra = sorted(set(given) - set(expected))
    if extra:
        raise CheckpointError(
            f"the weights must hold nothing but the model's, got {extra[0]} in {place} ({len(extra)} in all). Use a "
            "file of the same model, or change the model settings to those it was trained with."
        )
    model.load_state_dict(dict(given), strict=False)


def _part(state: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.startswith(prefixes)}


def _plain(state: object) -> dict[str, Tensor]:
    """A state dict without DataParallel's prefix."""
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"the file must hold a state dict, got {type(state).__name__}. Save model.state_dict(), not the model."
        )
    plain = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"a state dict must hold tensors, got {type(value).__name__} under {key!r}. Save model.state_dict(), "
                "not the model."
            )
        if fault := _fault(value):
            raise CheckpointError(
                f"a state dict must hold dense tensors of finite real numbers, got {fault} under {key!r}. Use a "
                "file of a training that went well."
            )
        plain[str(key).removeprefix("module.")] = value
    return plain


def _fault(tensor: Tensor) -> str:
    """What makes a tensor no weights at all; empty where nothing does."""
    if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided:
        return "one without plain values"
    if tensor.is_complex():
        return str(tensor.dtype)
    return "" if tensor.float().isfinite().all() else "a number that is not finite"


def _listed(names: Collection[object]) -> str:
    """The first few of some names, and how many more there are."""
    first = ", ".join(str(name)[:60] for name in itertools.islice(names, 5))
    return (first or "nothing") + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _is_safetensors(path: Path) -> bool:
    """Whether a file is safetensors, by its first bytes: the header's length, then its JSON."""
    try:
        with path.open("rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError as err:
        raise _unreadable(path, err) from err


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError) as err:
        raise _unreadable(path, err) from err


class _Inert:
    """Takes the place of every class that a pickle names and PyTorch does not know; keeps nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __new__(cls, *args: object, **kwargs: object) -> "_Inert":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None: ...


def _read_pickle(path: Path) -> dict[str, Any]:
    """The dict in a PyTorch file, read without running any code that the file names."""
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError as err:
        raise _unreadable(path, err) from err
    try:
        # A list of names only: the pickle is scanned, not executed. Files older than PyTorch 1.6 cannot be scanned.
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if start == b"PK" else []
        with torch.serialization.safe_globals([(_Inert, name) for name in foreign]):
            top = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # a damaged pickle raises almost anything
        message = str(err)
        if "weights_only" in message.lower() or "Unsupported" in message:
            raise CheckpointError(
                f"a PyTorch file must hold tensors and plain values only, got {path} with more ("
                f"{message.splitlines()[0][:120]}). Where you trust it, convert it once: torch.save(torch.load(path, "
                "weights_only=False)['state_dict'], new_path)."
            ) from err
        raise _unreadable(path, err) from err
    if not isinstance(top, dict):
        raise CheckpointError(
            f"a PyTorch file must hold a dict of weights, got {type(top).__name__} in {path}. Save model.state_dict()."
        )
    return top


def _unreadable(path: Path, err: Exception) -> CheckpointError:
    if isinstance(err, FileNotFoundError):
        return CheckpointError(f"weights must be a file that exists, got {path}. Check the path.")
    reason = (str(err).splitlines() or [type(err).__name__])[0][:120]
    return CheckpointError(
        f"weights must be a whole safetensors or PyTorch file, got {path}, which cannot be read ({reason}). Copy it "
        "again; it may be cut short."
    )
