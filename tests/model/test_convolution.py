"""qafe/model/convolution.py: what torch's own convolution gives, and its gradients."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from qafe.model.convolution import Conv1x1


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [(8, 8), (7, 5), (2, 3), (1, 1)])
def test_values_and_gradients_are_those_of_torch(stride: int, side: tuple[int, int]) -> None:
    torch.manual_seed(0)
    convolve = Conv1x1(3, 4, stride=stride).double()
    ours, theirs = (torch.randn(5, 3, *side).double() for _ in range(2))
    theirs.copy_(ours)
    weight = convolve.weight.detach().clone().requires_grad_()
    y = convolve(ours.requires_grad_())
    expected = F.conv2d(theirs.requires_grad_(), weight, stride=stride)
    torch.testing.assert_close(y, expected)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(convolve.weight.grad, weight.grad)


@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize("encoder", ["rgb", "heatmap"])
def test_nothing_is_written_beyond_its_memory(encoder: str, width: int) -> None:
    """glibc puts a byte behind each block and looks at it when the block is freed."""
    try:
        ctypes.CDLL("libc_malloc_debug.so.0")
    except OSError:
        pytest.skip("glibc's libc_malloc_debug.so.0 is not installed")
    watched = {"LD_PRELOAD": "libc_malloc_debug.so.0", "GLIBC_TUNABLES": "glibc.malloc.check=3"}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN_ENCODER, encoder, str(width)],
        env=os.environ | watched,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


TRAIN_ENCODER = """
import sys, torch
from qafe.config import HeatmapEncoderConfig, RGBEncoderConfig
from qafe.model.heatmap3d import SlowOnly
from qafe.model.spatial import SpatialFormer

torch.set_num_threads(1)
encoder, width = sys.argv[1], int(sys.argv[2])
if encoder == "rgb":
    net = SpatialFormer(RGBEncoderConfig(size_px=32, width=width, spatial_heads=2, spatial_mlp=32))
    shape = 40, 3, 32, 32
else:
    net = SlowOnly(HeatmapEncoderConfig(size_px=16, width=width, blocks=(1, 2, 1)), in_channels=1)
    shape = 10, 1, 4, 16, 16
for _ in range(3):
    net.train()(torch.randn(shape)).sum().backward()
"""
