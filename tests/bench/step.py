"""A training step and one clip's inference of QAFE-Net: ours against the published computation, on random clips.

The rival is the published computation in plain PyTorch: the same network and weights with 3-D convolutions as they
are, nothing in place, attention written out, the optimiser's plain loop, the allocator left alone; with ``--published``
it is the authors' own code. Every measurement has a process of its own, for the peak memory is a process's; they take
turns. Seconds are CPU-seconds of all threads, which other processes disturb least; wall-clock seconds are in the notes.
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
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qafe import allocation
from qafe.errors import ConfigError, QafeError

from .rounds import Found, Row

if TYPE_CHECKING:
    from torch import Tensor
    from torch import device as Device
    from torch import dtype as Dtype

    from qafe.config import Config
    from qafe.model.qafenet import QAFENet

BATCH4_GB = {"paper": 15, "small": 4, "tiny": 1}
"""What a training step of four clips takes at its peak."""
NO_BF16 = (
    "bf16: this processor has neither avx512_bf16 nor amx_bf16 (/proc/cpuinfo); a step would take ten times as long"
)


def bench(preset: str, rounds: int, threads: int, batch4: bool, published: Path | None = None) -> Found:
    """Rows for training steps, inference and peak memory.

    Raises:
        ConfigError: the authors' code cannot be run.
    """
    if published is not None and preset != "paper":
        raise ConfigError(f"the authors' network has the sizes of --preset paper, got {preset}. Leave one away.")
    left_out = [] if _has_bf16() else [NO_BF16]
    modes = ["fp32", *(["bf16"] if _has_bf16() else []), "checkpoint"]
    refusal = _no_batch4(preset, batch4)
    batches = [1] if refusal else [1, 4]
    left_out += [refusal] if refusal else []
    wanted = [Measurement(preset, "train", how, clips, threads) for clips in batches for how in ("published", *modes)]
    wanted += [Measurement(preset, "infer", how, 1, threads) for how in ("published", "fp32")]
    seen: dict[Measurement, list[dict[str, float]]] = {key: [] for key in wanted}
    for _ in range(rounds):
        for key in wanted:
            seen[key].append(key.in_own_process(published))
    rival_name = "authors' code" if published else "rewritten"

    def row(what: str, ours: Measurement, rival: Measurement) -> Row:
        return _row(what, seen[ours], seen[rival], rival_name)

    rows = []
    for clips in batches:
        rival = Measurement(preset, "train", "published", clips, threads)
        for how in modes:
            ours = Measurement(preset, "train", how, clips, threads)
            rows.append(row(f"training step {how}, batch {clips}, {preset}", ours, rival))
            if how == "bf16":
                rows[-1].notes.append(_bf16_products(threads))
        for how, name in (("fp32", "plain"), ("checkpoint", "checkpointed")):
            ours = Measurement(preset, "train", how, clips, threads)
            peaks = [one["peak_gb"] for one in seen[ours]], [one["peak_gb"] for one in seen[rival]]
            rows.append(
                Row(f"peak memory {name}, batch {clips}, {preset}", "process", *peaks, rival_name, quantity="GB")
            )
    ours, rival = wanted[-1], wanted[-2]
    rows.append(row(f"inference, one clip, {preset}", ours, rival))
    return Found(rows, left_out)


def _has_bf16() -> bool:
    """Whether this processor computes bf16; where it does not, a step in bf16 takes ten times as long."""
    path = Path("/proc/cpuinfo")
    return path.is_file() and any(name in path.read_text() for name in ("avx512_bf16", "amx_bf16"))


def _bf16_products(threads: int) -> str:
    """How fast this processor multiplies matrices in bf16: what a step can gain from it."""
    import torch

    bf16, fp32 = (matmul_tflops(torch.device("cpu"), dtype, threads) for dtype in (torch.bfloat16, torch.float32))
    return f"products of matrices: {1e3 * bf16:.0f} GFLOP/s in bf16, {1e3 * fp32:.0f} in float32"


def matmul_tflops(device: Device, dtype: Dtype, threads: int | None = None) -> float:
    """What the device reaches in products of square matrices; float32 on a GPU as TF32, as its convolutions are."""
    import torch
    from torch.utils import benchmark

    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        timer = benchmark.Timer("a @ b", globals={"a": a, "b": b}, num_threads=threads or torch.get_num_threads())
        seconds = timer.blocked_autorange(min_run_time=1).median
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    del a, b
    if device.type == "cuda":
        torch.cuda.empty_cache()  # The measurements are other processes.
    return float(2 * side**3 / seconds / 1e12)


def _no_batch4(preset: str, wanted: bool) -> str | None:
    """Why batch 4 is left out; None if it is not."""
    need, free = BATCH4_GB[preset], available_gb()
    if not wanted:
        return f"batch 4: give --batch4 (it takes about {need} GB; {free:.0f} GB are available here)"
    return None if free >= need else f"batch 4: it takes about {need} GB, and {free:.0f} GB are available"


def available_gb() -> float:
    """Memory that processes can still get here."""
    return allocation.memory().free / 2**30


def _row(what: str, ours: list[dict[str, float]], rival: list[dict[str, float]], rival_name: str) -> Row:
    walls = [[one["wall_s"] for one in side] for side in (ours, rival)]
    ratios = [theirs / mine for mine, theirs in zip(*walls, strict=True)]
    note = f"wall {statistics.median(walls[0]):.1f} s against {statistics.median(walls[1]):.1f} s"
    spread = f"{statistics.median(ratios):.1f}x ({min(ratios):.1f}-{max(ratios):.1f}x)"
    cpu = [one["cpu_s"] for one in ours], [one["cpu_s"] for one in rival]
    return Row(what, "step, CPU", *cpu, rival_name, notes=[f"{note}: {spread}"])


@dataclass(frozen=True)
class Measurement:
    """What one process measures.

    Attributes:
        kind: train or infer.
        how: published (the rival), fp32, bf16, checkpoint, compile (fp32) or bf16-compile.
    """

    preset: str
    kind: str
    how: str
    clips: int
    threads: int
    device: str = "cpu"

    def in_own_process(self, published: Path | None = None) -> dict[str, float]:
        """Seconds (``cpu_s``, ``wall_s``) of a step and ``peak_gb``; empty if the device's memory does not suffice.

        Raises:
            ConfigError: the process said in one line why it could not.
        """
        fields = [self.preset, self.kind, self.how, str(self.clips), str(self.threads), self.device]
        command = [sys.executable, "-m", __spec__.name, *fields]
        if published is not None and self.how == "published":
            command.append(str(published.resolve()))
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        root = Path(__file__).parents[2]
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
        if done.returncode == 2:
            raise ConfigError(done.stderr.strip().splitlines()[-1])
        if done.returncode:
            raise RuntimeError(f"{' '.join(fields)} ended with status {done.returncode}:\n{done.stderr}")
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        print(f"{' '.join(fields)}: {found}", file=sys.stderr)
        return found


def measure(wanted: Measurement, published: Path | None = None) -> dict[str, float]:
    """Seconds of one step after those that do not count, and the peak memory: this process's, or a GPU's."""
    import torch
    from torch.utils import benchmark

    from qafe.config import PRESETS
    from qafe.memory import freed_memory_kept, freed_memory_returned

    torch.set_num_threads(wanted.threads)
    torch.manual_seed(0)
    device = torch.device(wanted.device)
    kept = device.type == "cpu" and wanted.how in ("fp32", "bf16")  # As in training and scoring.
    try:
        step = make_step(PRESETS[wanted.preset](), wanted, published)
        with ExitStack() as stack:
            stack.enter_context(freed_memory_kept(kept))
            stack.enter_context(freed_memory_returned(device.type == "cpu" and wanted.how == "checkpoint"))
            # Memory that is kept has its final extent after two steps; a GPU's first ones choose kernels, or compile.
            for _ in range(3 if device.type == "cuda" else 1 + kept):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
                # It synchronises before it reads the clock.
                timer = benchmark.Timer("step()", globals={"step": step}, num_threads=wanted.threads)
                cpu = wall = timer.blocked_autorange(min_run_time=2).median
                return {"cpu_s": cpu, "wall_s": wall, "peak_gb": torch.cuda.max_memory_allocated(device) / 2**30}
            cpu, wall = time.process_time(), time.perf_counter()
            step()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    except torch.OutOfMemoryError:
        return {}
    return {"cpu_s": cpu, "wall_s": wall, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def make_step(config: Config, wanted: Measurement, published: Path | None = None) -> Callable[[], None]:
    """One step on random clips, as a function without arguments; does not wait for a GPU."""
    import torch

    from qafe.model.qafenet import build
    from qafe.optim import build_optimizer

    device, how = torch.device(wanted.device), wanted.how
    if published is not None and how == "published":
        from .published import Published

        model: torch.nn.Module = Published(published).to(device)
    else:
        ours = build(config).to(device)
        if how == "published":
            make_plain(ours)
        elif device.type == "cuda":
            ours.spatial.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # As in training.
        ours.spatial.recompute = how == "checkpoint"
        model = ours
    model.train(wanted.kind == "train")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = (
        torch.optim.SGD(
            # On a GPU the plain default is the loop over all tensors at once.
            parameters,
            lr=1e-6,
            momentum=0.9,
            weight_decay=1e-4,
            foreach=None if device.type == "cuda" else False,
        )
        if how == "published"
        else build_optimizer(config.train, parameters)
    )
    forward = torch.compile(model) if how.endswith("compile") else model
    clips, frames, channels = wanted.clips, config.model.clip_frames, config.data.heatmap.channels
    rgb_px, heatmap_px = config.model.rgb.size_px, config.model.heatmap.size_px
    rgb = torch.randn(clips, 3, frames, rgb_px, rgb_px, device=device)
    if device.type == "cuda" and how != "published":  # As `model_inputs` gives it.
        rgb = rgb.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    heatmap = torch.rand(clips, channels, frames, heatmap_px, heatmap_px, device=device)
    target = torch.arange(clips, dtype=torch.float32, device=device)

    def step() -> None:
        if wanted.kind == "infer":
            with torch.inference_mode():
                forward(rgb, heatmap)
            return
        with torch.autocast(device.type, torch.bfloat16, enabled=how.startswith("bf16")):
            prediction = forward(rgb, heatmap)
        torch.nn.functional.mse_loss(prediction.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=how != "published")

    return step


def make_plain(model: QAFENet) -> None:
    """The model without any of our fast paths, and with the same results."""
    import torch.nn.functional as F
    from einops import rearrange

    from qafe.model.heatmap3d import Bottleneck3d, ConvNorm, SlowOnly
    from qafe.model.spatial import BasicBlock, SpatialFormer
    from qafe.model.transformer import TransformerBlock

    def conv_norm(self: Any, x: Tensor) -> Tensor:
        return plain_norm(self.conv(x), self.bn)

    def plain_norm(x: Tensor, bn: Any) -> Tensor:
        training, momentum = bn.training, bn.momentum
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, training, momentum, bn.eps)

    def bottleneck(self: Any, x: Tensor) -> Tensor:
        y = F.relu(self.spatial(F.relu(self.reduce(x))))
        return F.relu(self.expand(y) + (x if self.shortcut is None else self.shortcut(x)))

    def slow_only(self: Any, x: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.stem(x)), (1, 3, 3), stride=1, padding=(0, 1, 1))
        for stage in self.stages:
            for block in stage:
                x = block(x)
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


def main() -> int:
    """One measurement, as JSON; `Measurement.in_own_process` calls this."""
    parser = argparse.ArgumentParser()
    for name in ("preset", "kind", "how"):
        parser.add_argument(name)
    parser.add_argument("clips", type=int)
    parser.add_argument("threads", type=int)
    parser.add_argument("device")
    parser.add_argument("published", type=Path, nargs="?")
    given = vars(parser.parse_args())
    published = given.pop("published")
    try:
        print(json.dumps(measure(Measurement(**given), published)))
    except QafeError as err:
        print(" ".join(str(err).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
