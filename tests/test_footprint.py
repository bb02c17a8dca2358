"""A training step's memory, found without computing it, is what the step takes."""

import json
import subprocess
import sys

import pytest
import torch

from qafe.config import Config, small
from qafe.dotted import override
from qafe.footprint import _LiveStorages, training_memory
from qafe.losses import build_loss
from qafe.model.qafenet import build
from qafe.optim import build_optimizer

MEASURE = """
import json, resource, sys, torch
from qafe.config import PRESETS
from qafe.dotted import override
from qafe.footprint import resident_bytes
from qafe.losses import build_loss
from qafe.memory import freed_memory_kept, freed_memory_returned
from qafe.model.qafenet import build
from qafe.optim import build_optimizer
import copy
torch.set_num_threads(1)
config = override(PRESETS[sys.argv[1]](), json.loads(sys.argv[2]))
model = build(config).train(); model.spatial.recompute = config.train.checkpoint; best = copy.deepcopy(model)
loss = build_loss(config.train, torch.arange(5.0))
optimizer = build_optimizer(config.train, list(model.parameters()))
B, T = config.train.batch_size, config.model.clip_frames
S, s, C = config.model.rgb.size_px, config.model.heatmap.size_px, config.data.heatmap.channels
with freed_memory_kept(not config.train.checkpoint), freed_memory_returned(config.train.checkpoint):
    for _ in range(2):
        loss(model(torch.rand(B, 3, T, S, S), torch.rand(B, C, T, s, s)), torch.rand(B)).backward()
        optimizer.step(); optimizer.zero_grad()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def step(config: Config) -> tuple[int, dict[str, int]]:
    """Most bytes that live at once in a real step, beside weights and optimiser; and what is exact."""
    model = build(config).train()
    model.spatial.recompute = config.train.checkpoint
    loss = build_loss(config.train, torch.arange(5.0))
    trained = [p for module in (model, loss) for p in module.parameters() if p.requires_grad]
    optimizer = build_optimizer(config.train, trained)
    clips, frames = config.train.batch_size, config.model.clip_frames
    side, heatmap_side = config.model.rgb.size_px, config.model.heatmap.size_px
    with _LiveStorages() as live:
        pictures = torch.zeros(clips, 3, frames, side, side, dtype=torch.uint8)
        rgb = torch.rand(pictures.shape)
        heatmap = torch.rand(clips, config.data.heatmap.channels, frames, heatmap_side, heatmap_side)
        loss(model(rgb, heatmap), torch.rand(clips)).backward()
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    both = [tensor for module in (model, loss) for tensor in (*module.parameters(), *module.buffers())]
    return live.most_bytes, {
        "weights": 2 * sum(tensor.nbytes for tensor in both),
        "gradients": gradients,
        "optimizer": sum(state.nbytes for state in states if isinstance(state, torch.Tensor)),
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train.optimizer": "sgd", "train.loss": "gai", "train.train_noise_sigma": True},
        {"train.checkpoint": True, "data.heatmap.colour": "jet"},
        {"model.rgb.frozen": True, "model.fusion.kind": "concat"},
    ],
)
def test_the_estimate_is_what_a_real_step_holds(quick: Config, settings: dict[str, object]) -> None:
    config = override(quick, settings)
    found = training_memory(config)
    most, exact = step(config)
    assert {name: getattr(found, name) for name in exact} == exact
    assert found.activations + found.gradients == pytest.approx(most, rel=0.05)
    assert found.total == found.weights + found.gradients + found.optimizer + found.activations


def test_what_saves_memory_is_seen(quick: Config) -> None:
    plain = training_memory(quick).activations
    for settings in ({"train.checkpoint": True}, {"train.precision": "bf16"}, {"model.rgb.frozen": True}):
        assert training_memory(override(quick, settings)).activations < 0.9 * plain, settings
    twice = training_memory(override(quick, {"train.batch_size": 8})).activations
    assert twice == pytest.approx(2 * plain, rel=0.1)
    several = training_memory(override(quick, {"train.accumulate": 4})).activations
    assert several == pytest.approx(plain, rel=0.01), "one batch at a time"
    single = training_memory(override(quick, {"train.batch_size": 1, "train.accumulate": 4})).activations
    assert single < plain / 2


def test_nothing_is_computed_or_drawn(quick: Config) -> None:
    state = torch.get_rng_state()
    training_memory(override(quick, {"model.fusion.dropout": 0.2}))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_process_holds_what_is_foreseen(checkpoint: bool) -> None:
    from sweeps.room import trial_bytes

    settings = {"train.batch_size": 2, "train.checkpoint": checkpoint}
    line = [sys.executable, "-c", MEASURE, "small", json.dumps(settings)]
    measured = int(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    foreseen = trial_bytes(override(small(), settings), torch.device("cpu"))
    assert 0.85 * measured < foreseen < 1.4 * measured
