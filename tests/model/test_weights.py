"""Saving, loading and refusing weights: ours and the authors' three layouts."""

import logging
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qafe.config import Config, ModelConfig, RGBEncoderConfig, tiny
from qafe.dotted import override
from qafe.errors import CheckpointError
from qafe.model import weights
from qafe.model.qafenet import QAFENet, build

from .. import reference


@pytest.fixture
def config() -> Config:
    return override(tiny(), {"model.fusion.kind": "gated", "data.heatmap.colour": "grey"})


@pytest.fixture
def saved(tmp_path: Path, config: Config) -> Path:
    path = tmp_path / "smile.safetensors"
    weights.save(path, build(config), config, {"expression": "smile"})
    return path


def test_round_trip(tmp_path: Path, config: Config) -> None:
    net = build(config).train()
    path = tmp_path / "smile.safetensors"
    weights.save(path, net, config, {"expression": "smile"})
    again, its_config, metadata = weights.load(path)
    assert its_config == config
    assert metadata == {"expression": "smile"}
    assert not again.training
    assert again.state_dict().keys() == net.state_dict().keys()
    for name, value in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert [file.name for file in tmp_path.iterdir()] == ["smile.safetensors"]


def test_a_failed_write_leaves_the_old_file(saved: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        weights.save(saved, build(config), config)
    assert saved.read_bytes() == before
    assert len(list(saved.parent.iterdir())) == 1


def test_saving_to_a_folder_that_is_not_there(tmp_path: Path, config: Config) -> None:
    with pytest.raises(FileNotFoundError):
        weights.save(tmp_path / "no" / "x.safetensors", build(config), config)


def test_load_state_fills_a_model(saved: Path, config: Config) -> None:
    net = build(config)
    weights.load_state(net, saved)
    again, _, _ = weights.load(saved)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("size", [0, 3, 8, 100, 5000, -10])
def test_a_file_cut_short(saved: Path, size: int) -> None:
    saved.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"smile\.safetensors, which cannot be read"):
        weights.load(saved)


def test_a_file_of_noise(saved: Path) -> None:
    saved.write_bytes(np.random.default_rng(0).bytes(4096))
    with pytest.raises(CheckpointError, match="cannot be read"):
        weights.load(saved)


def test_a_file_that_is_not_there(tmp_path: Path, config: Config) -> None:
    for call in (weights.load, lambda path: weights.load_reference_checkpoint(build(config), path)):
        with pytest.raises(CheckpointError, match="a file that exists"):
            call(tmp_path / "nothing.safetensors")


def test_a_file_without_a_config(saved: Path) -> None:
    save_file(load_file(saved), saved)
    with pytest.raises(CheckpointError, match=r"qafe\.config in its metadata"):
        weights.load(saved)


def test_a_config_of_another_version(saved: Path) -> None:
    save_file(load_file(saved), saved, {"qafe.config": '{"model": {"colour": 1}}'})
    with pytest.raises(CheckpointError, match=r"model\.colour"):
        weights.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("head.layers.0.weight"), r"must hold head\.layers\.0\.weight, which is missing"),
        (lambda state: state.update(tail=torch.zeros(1)), r"nothing but the model's, got tail"),
        (
            lambda state: state.update({"head.layers.0.bias": torch.zeros(3)}),
            r"head\.layers\.0\.bias must have the shape \[32\], got \[3\]",
        ),
    ],
)
def test_a_key_that_does_not_fit(saved: Path, config: Config, change: object, message: str) -> None:
    state = load_file(saved)
    change(state)  # type: ignore[operator]
    save_file(state, saved)
    net = build(config)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        weights.load_state(net, saved)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items()), "nothing half-loaded"


def test_pretrained_encoders_from_one_of_ours(saved: Path, config: Config) -> None:
    source, _, _ = weights.load(saved)
    settings = override(
        config,
        {"model.rgb.weights": str(saved), "model.heatmap.weights": str(saved), "model.fusion.kind": "sum"},
    )
    net = build(settings)
    weights.load_pretrained(net, settings.model)
    for part in ("spatial", "temporal", "heatmap"):
        for name, value in source.get_submodule(part).state_dict().items():
            assert torch.equal(net.get_submodule(part).state_dict()[name], value), name


def test_no_pretrained_weights_change_nothing(config: Config) -> None:
    net = build(config)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    weights.load_pretrained(net, config.model)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


# The authors' layouts. Only key lists are at hand, so the files are made here in the layout that they describe.


class RecorderMeter:
    """Stands for the class that the authors' scripts pickle into their checkpoints."""

    def __init__(self) -> None:
        self.epoch_losses = np.zeros((3, 2), dtype=np.float32)
        self.best = np.float64(1.5)


def pretrained(name: str) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict(
        (entry["file_key"], torch.from_numpy(np.array(reference.rule().fill(name, entry["file_key"], entry["shape"]))))
        for entry in reference.keys(f"pretrained_{name}")
    )


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> object:
    """An object whose class exists while the file is written, and is gone when it is read."""
    module = types.ModuleType("their_script")
    module.RecorderMeter = RecorderMeter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "their_script", module)
    monkeypatch.setattr(RecorderMeter, "__module__", "their_script")
    return RecorderMeter()


@pytest.mark.parametrize("legacy", [False, True])
def test_former_dfer_file(
    tmp_path: Path, recorder: object, caplog: pytest.LogCaptureFixture, legacy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = pretrained("formerdfer")
    path = tmp_path / "former.pth"
    content: dict[str, object] = {"epoch": 3, "state_dict": state, "best_acc": torch.tensor(0.6)}
    if not legacy:
        content["recorder"] = recorder
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    monkeypatch.delitem(sys.modules, "their_script")
    config = ModelConfig(rgb=RGBEncoderConfig(weights=str(path)))
    net = QAFENet(config)
    with caplog.at_level(logging.INFO):
        weights.load_pretrained(net, config)
    assert "7 x 7 grid are interpolated to 14 x 14" in caplog.text
    assert "their_script" not in sys.modules
    names = weights.reference_keys(net)
    ours = {names[name].removeprefix("model."): value for name, value in net.state_dict().items()}
    compared = 0
    for entry in reference.keys("pretrained_formerdfer"):
        if entry["maps_to"] and entry["ok"]:
            assert torch.equal(ours[entry["maps_to"]], state[entry["file_key"]]), entry["file_key"]
            compared += 1
    assert compared == 166
    # The middle of the bicubic grid has the mean of the coarse one, and its corners its corners' signs.
    assert net.spatial.position.shape == (1, 196, 256)
    assert net.spatial.position.mean().item() == pytest.approx(
        state["module.s_former.pos_embedding"].mean().item(), abs=5e-3
    )


def test_positions_of_the_same_grid_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "former.pth"
    state = pretrained("formerdfer")
    torch.save({"state_dict": state}, path)
    config = ModelConfig(rgb=RGBEncoderConfig(weights=str(path), size_px=112))
    net = QAFENet(config)
    weights.load_pretrained(net, config)
    assert torch.equal(net.spatial.position, state["module.s_former.pos_embedding"])


@pytest.mark.parametrize("how", ["random", "mean", "sum"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pose_only_file(tmp_path: Path, how: str, channels: int) -> None:
    state = pretrained("pose_only")
    path = tmp_path / "pose_only.pth"
    torch.save({"meta": {"epoch": 24, "time": "now"}, "state_dict": state}, path)
    config = override(Config(), {"model.heatmap.weights": str(path), "model.heatmap.stem_adaptation": how}).model
    net = QAFENet(config, heatmap_channels=channels)
    start = net.heatmap.stem.conv.weight.detach().clone()
    weights.load_pretrained(net, config)
    names = weights.reference_keys(net)
    ours = {names[name].removeprefix("SlowOnly."): value for name, value in net.state_dict().items()}
    compared = 0
    for entry in reference.keys("pretrained_pose_only"):
        if entry["maps_to"]:
            assert torch.equal(ours[entry["maps_to"]], state[entry["file_key"]]), entry["file_key"]
            compared += 1
    assert compared > 200
    theirs, stem = state["backbone.conv1.conv.weight"], net.heatmap.stem.conv.weight.detach()
    if how == "random":
        assert torch.equal(stem, start)
    elif how == "mean":
        assert torch.allclose(stem, theirs.mean(dim=1, keepdim=True).expand_as(stem))
    else:
        assert torch.allclose(stem.sum(dim=1), theirs.sum(dim=1), atol=1e-6)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_their_training_checkpoint(
    tmp_path: Path, prefix: str, recorder: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "checkpoint.pth"
    content: dict[str, object] = {
        module: {prefix + key: value for key, value in state.items()}
        for module, state in reference.state_dicts().items()
    }
    torch.save({**content, "epoch": 9, "recorder": recorder}, path)
    monkeypatch.delitem(sys.modules, "their_script")
    net = QAFENet(ModelConfig())
    weights.load_reference_checkpoint(net, path)
    assert "rgb_axis_order=reference" in caplog.text
    names = weights.reference_keys(net)
    for name, value in net.state_dict().items():
        module, _, key = names[name].partition(".")
        assert torch.equal(value, reference.state_dicts()[module][key]), name


def test_their_checkpoint_lacks_a_part(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {}, "SlowOnly": {}, "evaluator": {}}, path)
    with pytest.raises(CheckpointError, match=r"without decoder \(it holds model, SlowOnly, evaluator\)"):
        weights.load_reference_checkpoint(QAFENet(ModelConfig()), path)


def test_their_keys_are_named_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    states = {module: dict(state) for module, state in reference.state_dicts().items()}
    del states["decoder"]["pos_embed"]
    torch.save(states, path)
    with pytest.raises(CheckpointError, match=r"must hold decoder\.pos_embed, which is missing"):
        weights.load_reference_checkpoint(QAFENet(ModelConfig()), path)


def test_their_weights_need_their_layout(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({module: {} for module in weights.REFERENCE_MODULES}, path)
    net = build(override(Config(), {"model.fusion.kind": "cross_split"}))
    with pytest.raises(CheckpointError, match=r"which has no fusion\.layers.*model\.fusion\.kind=cross"):
        weights.load_reference_checkpoint(net, path)


class Trap:
    """Would create a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_in_a_file_runs(tmp_path: Path, zipped: bool) -> None:
    path, trap = tmp_path / "trap.pth", tmp_path / "sprung"
    torch.save({"state_dict": Trap(trap)}, path, _use_new_zipfile_serialization=zipped)
    config = ModelConfig(rgb=RGBEncoderConfig(weights=str(path)))
    with pytest.raises(CheckpointError):
        weights.load_pretrained(QAFENet(config), config)
    assert not trap.exists()


def test_a_whole_pickled_model_is_refused(tmp_path: Path, config: Config) -> None:
    path = tmp_path / "whole.pth"
    torch.save(build(config), path)
    with pytest.raises(CheckpointError, match=r"dict of weights|state dict"):
        weights.load_reference_checkpoint(build(config), path)


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x03\x04garbage", pickle.dumps([1, 2]), b"hello world, hello"])
def test_damaged_pytorch_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "former.pth"
    path.write_bytes(content)
    config = ModelConfig(rgb=RGBEncoderConfig(weights=str(path)))
    with pytest.raises(CheckpointError, match=r"former\.pth"):
        weights.load_pretrained(QAFENet(config), config)
