"""A training step and one clip's inference of QAFE-Net: ours against the published computation, on random clips.

The rival is the published computation in plain PyTorch: the same network and weights with 3-D convolutions as they
are, nothing in place, attention written out, the optimiser's plain loop, the allocator left alone. Every measurement
has a process of its own, for the peak memory is a process's; they take turns. Seconds are CPU-seconds of all threads,
which other processes disturb least; wall-clock seconds are in the notes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .rounds import Row

if TYPE_CHECKING:
    from torch import Tensor

    from qafe.model.qafenet import QAFENet

RECORDED_CPU_S = {"train": 18.5, "infer": 7.4}
"""What the authors' own code took for one clip of the paper preset, on another machine (2 threads, AVX512)."""


def bench(preset: str, rounds: int, threads: int, batches: list[int]) -> list[Row]:
    """Rows for training steps, inference and peak memory; ``batches`` are the training steps' clips."""
    modes = ["fp32", *(["bf16"] if _has_bf16() else []), "checkpoint"]
    wanted = [(f"train {mode}", clips) for clips in batches for mode in ["published", *modes]]
    wanted += [("infer published", 1), ("infer ours", 1)]
    seen: dict[tuple[str, int], list[dict[str, float]]] = {key: [] for key in wanted}
    for _ in range(rounds):
        for key in wanted:
            seen[key].append(_in_own_process(preset, key[0], key[1], threads))
    rows = []
    for clips in batches:
        rival = seen["train published", clips]
        for mode in modes:
            rows.append(_row(f"training step {mode}, batch {clips}, {preset}", seen[f"train {mode}", clips], rival))
        for mode in ("fp32", "checkpoint"):
            ours = seen[f"train {mode}", clips]
            name = f"peak memory {'plain' if mode == 'fp32' else 'checkpointed'}, batch {clips}, {preset}"
            peaks = [one["peak_gb"] for one in ours], [one["peak_gb"] for one in rival]
            rows.append(Row(name, "process", *peaks, quantity="GB"))
    rows.append(_row(f"inference, one clip, {preset}", seen["infer ours", 1], seen["infer published", 1]))
    if preset == "paper":
        for row in rows:
            kind = "infer" if row.what.startswith("inference") else "train"
            if row.quantity == "s" and "batch 4" not in row.what:
                row.notes.append(f"authors' code, elsewhere: {RECORDED_CPU_S[kind]} CPU-s")
    return rows


def _has_bf16() -> bool:
    """Whether this processor computes bf16; where it does not, a step in bf16 takes ten times as long."""
    path = Path("/proc/cpuinfo")
    return path.is_file() and any(name in path.read_text() for name in ("avx512_bf16", "amx_bf16"))


def _row(what: str, ours: list[dict[str, float]], rival: list[dict[str, float]]) -> Row:
    walls = [[one["wall_s"] for one in side] for side in (ours, rival)]
    ratios = [theirs / mine for mine, theirs in zip(*walls, strict=True)]
    note = f"wall {statistics.median(walls[0]):.1f} s against {statistics.median(walls[1]):.1f} s"
    spread = f"{statistics.median(ratios):.1f}x ({min(ratios):.1f}-{max(ratios):.1f}x)"
    cpu = [one["cpu_s"] for one in ours], [one["cpu_s"] for one in rival]
    return Row(what, "step", *cpu, notes=[f"{note}: {spread}"])


def _in_own_process(preset: str, mode: str, clips: int, threads: int) -> dict[str, float]:
    command = [sys.executable, "-m", __spec__.name, preset, mode, str(clips), str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{preset} {mode} {clips}: {found}", file=sys.stderr)
    return found


def measure(preset: str, mode: str, clips: int, threads: int) -> dict[str, float]:
    """CPU and wall-clock seconds of one step after those that do not count, and this process's peak memory."""
    import torch

    from qafe.config import PRESETS
    from qafe.memory import freed_memory_kept
    from qafe.model.qafenet import build
    from qafe.train import build_optimizer

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = PRESETS[preset]()
    model = build(config)
    kind, how = mode.split()
    if how == "published":
        make_plain(model)
    model.spatial.recompute = how == "checkpoint"
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = (
        torch.optim.SGD(parameters, lr=1e-6, momentum=0.9, weight_decay=1e-4, foreach=False)
        if how == "published"
        else build_optimizer(config.train, parameters)
    )
    frames = config.model.clip_frames
    rgb = torch.randn(clips, 3, frames, config.model.rgb.size_px, config.model.rgb.size_px)
    heatmap = torch.rand(clips, 3, frames, config.model.heatmap.size_px, config.model.heatmap.size_px)
    target = torch.arange(clips, dtype=torch.float32)
    model.train(kind == "train")

    def step() -> None:
        if kind == "infer":
            with torch.inference_mode():
                model(rgb, heatmap)
            return
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "bf16"):
            prediction = model(rgb, heatmap)
        torch.nn.functional.mse_loss(prediction.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=how != "published")

    with ExitStack() as stack:
        stack.enter_context(freed_memory_kept(kind == "train" and how in ("fp32", "bf16")))
        # Memory that is kept has its final extent after two steps.
        for _ in range(2 if how in ("fp32", "bf16") else 1):
            step()
        cpu, wall = time.process_time(), time.perf_counter()
        step()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"cpu_s": cpu, "wall_s": wall, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def make_plain(model: QAFENet) -> None:
    """The model without any of our fast paths, and with the same results."""
    import torch.nn.functional as F
    from einops import rearrange

    from qafe.model.heatmap3d import Bottleneck3d, ConvNorm, SlowOnly
    from qafe.model.spatial import BasicBlock, SpatialFormer
    from qafe.model.transformer import TransformerBlock

    def conv_norm(self: Any, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))  # type: ignore[no-any-return]

    def bottleneck(self: Any, x: Tensor) -> Tensor:
        y = F.relu(self.spatial(F.relu(self.reduce(x))))
        return F.relu(self.expand(y) + self.shortcut(x))

    def slow_only(self: Any, x: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.stem(x)), (1, 3, 3), stride=1, padding=(0, 1, 1))
        for stage in self.stages:
            x = stage(x)
        return x.mean(dim=(2, 3, 4))

    def basic(self: Any, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))

    def former(self: Any, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        x = self.layer3(self.layer2(self.layer1(x)))
        x = rearrange(x, "n c h w -> n (h w) c") + self.position
        for block in self.transformer:
            x = block(x)
        x = self.layer4(rearrange(x, "n (h w) c -> n c h w", h=self.grid))
        return x.mean(dim=(2, 3))

    def attend(self: Any, x: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x))
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        read = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
        x = x + self.out(rearrange(read, "b h n d -> b n (h d)"))
        return x + self.contract(F.gelu(self.expand(self.mlp_norm(x)), approximate="tanh"))  # type: ignore[no-any-return]

    plain = {
        ConvNorm: conv_norm,
        Bottleneck3d: bottleneck,
        SlowOnly: slow_only,
        BasicBlock: basic,
        SpatialFormer: former,
        TransformerBlock: attend,
    }
    for module in model.modules():
        if type(module) in plain:
            module.forward = plain[type(module)].__get__(module)  # type: ignore[index]


def main() -> None:
    """One measurement, as JSON; `bench` calls this in a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("preset")
    parser.add_argument("mode")
    parser.add_argument("clips", type=int)
    parser.add_argument("threads", type=int)
    given = parser.parse_args()
    print(json.dumps(measure(given.preset, given.mode, given.clips, given.threads)))


if __name__ == "__main__":
    main()
