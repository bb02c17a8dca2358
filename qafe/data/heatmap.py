"""Landmarks -> heatmap frames: batched, on the device of the landmarks. Pure functions.

Source: the heatmaps that the QAFE-Net authors render to disk (arXiv:2312.00856); uint8-equal to theirs for faces
inside the frame. Differs: drawn when needed instead of stored as JPEG (which costs up to 180 levels at single
pixels), a point that cannot be seen is left out instead of blanking the frame, and points are drawn as products of
two profiles, so that no image a point is ever made.
"""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ..config import HeatmapConfig

_CPU_CHUNK_PIXELS = 2**19
_GPU_CHUNK_PIXELS = 2**24


def to_canvas(
    points: Float[Tensor, "*batch P 2"], frame_px: tuple[int, int], canvas_px: int
) -> Float[Tensor, "*batch P 2"]:
    """Landmarks from pixels of the stored frame to pixels of the canvas.

    Pixel centres lie on whole numbers, so x becomes (x + 0.5) * canvas / width - 0.5; a canvas of the frame's
    size changes nothing.

    Args:
        points: (x, y) in pixels.
        frame_px: (height, width) of the stored frame.
        canvas_px: side of the canvas.
    """
    if frame_px == (canvas_px, canvas_px):
        return points
    ratio = points.new_tensor([canvas_px / frame_px[1], canvas_px / frame_px[0]])
    return (points + 0.5) * ratio - 0.5


def mirror(points: Float[Tensor, "*batch P 2"], side_px: int) -> Float[Tensor, "*batch P 2"]:
    """Landmarks of the left-right mirrored frame: x becomes side - 1 - x."""
    return torch.stack((side_px - 1 - points[..., 0], points[..., 1]), dim=-1)


@torch.no_grad()
def draw(landmarks: Float[Tensor, "*batch P 2"], config: HeatmapConfig) -> Float[Tensor, "*batch H W"]:
    """One grey heatmap in [0, 1] for each set of landmarks.

    Each point is a Gaussian around its exact place, cut to the pixels int(x - w) .. int(x + w) (w =
    ``window_px``; truncated, as published), and scaled so that its brightest pixel inside the frame is 1. The sum
    over points is blurred with OpenCV's kernel of ``blur_px`` (borders reflected) and divided by its maximum. A
    point with no pixel inside the frame, or with a NaN coordinate, is not drawn; a frame with no point is zero.

    A Gaussian is the product of a profile along x and one along y, and so is the blur, so a frame is one matrix
    product [H,P] x [P,W] of blurred profiles. Runs in float32 under autocast, too.

    Args:
        landmarks: (x, y) in canvas pixels, the points to draw only.
        config: canvas, sigma, window and blur; colour is not used here.
    """
    batch = landmarks.shape[:-2]
    flat = landmarks.reshape(-1, *landmarks.shape[-2:]).float()
    side = config.canvas_px
    drawn = torch.empty(len(flat), side, side, device=flat.device)
    step = _chunk_frames(flat.device, side)
    for start in range(0, len(flat), step):
        _draw_into(drawn[start : start + step], flat[start : start + step], config)
    return drawn.reshape(*batch, side, side)


@torch.no_grad()
def colourise(grey: Float[Tensor, "*batch H W"]) -> Float[Tensor, "*batch 3 H W"]:
    """Grey heatmaps in [0, 1] through OpenCV's JET map: red, green and blue in [0, 1].

    The grey value is truncated to uint8 first, as published.
    """
    table = _jet_table(grey.device)
    level = (grey * 255).to(torch.uint8).int().reshape(-1)
    # index_select is more than twice as fast as indexing with a tensor here.
    channels = [table[channel].index_select(0, level).view(grey.shape) for channel in range(3)]
    return torch.stack(channels, dim=-3)


@torch.no_grad()
def render(
    landmarks: Float[Tensor, "*batch P 2"], config: HeatmapConfig, *, resize_px: int
) -> Float[Tensor, "*batch C h w"]:
    """Heatmap frames in [0, 1] as the encoder sees them before the crop: drawn, coloured, resized.

    Resized with an antialiased bilinear filter, like Pillow's, which the published loader uses (it rounds to
    uint8 twice on the way, so values agree to one level); not at all if the canvas has that size.

    Args:
        landmarks: (x, y) in canvas pixels, the points to draw only.
        config: all heatmap settings.
        resize_px: h = w.
    """
    batch = landmarks.shape[:-2]
    flat = landmarks.reshape(-1, *landmarks.shape[-2:]).float()
    rendered = torch.empty(len(flat), config.channels, resize_px, resize_px, device=flat.device)
    step = _chunk_frames(flat.device, config.canvas_px)
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        grey = torch.empty(len(part), config.canvas_px, config.canvas_px, device=flat.device)
        _draw_into(grey, part, config)
        frames = colourise(grey) if config.colour == "jet" else grey.unsqueeze(1)
        rendered[start : start + step] = _resize(frames, resize_px)
    return rendered.reshape(*batch, config.channels, resize_px, resize_px)


def _chunk_frames(device: torch.device, side: int) -> int:
    """Frames drawn at a time: on a CPU what its caches hold, else what stays below some 500 MB."""
    pixels = _CPU_CHUNK_PIXELS if device.type == "cpu" else _GPU_CHUNK_PIXELS
    return max(1, pixels // side**2)


def _draw_into(out: Tensor, points: Tensor, config: HeatmapConfig) -> None:
    """[n,P,2] canvas pixels -> [n,H,W], written to out."""
    across = _profiles(points[..., 0], config)
    down = _profiles(points[..., 1], config)
    with torch.autocast(points.device.type, enabled=False):
        torch.bmm(down.transpose(1, 2), across, out=out)
    peak = out.amax(dim=(1, 2), keepdim=True)
    # An empty frame has peak 0 and stays zero; a smallest normal number keeps 0/0 away without changing others.
    out.div_(peak.clamp_min_(torch.finfo(out.dtype).tiny))


def _profiles(centre: Tensor, config: HeatmapConfig) -> Tensor:
    """[n,P] -> [n,P,side]: each point along one axis, peak 1 inside the frame, then blurred; zero if unseen."""
    side, window = config.canvas_px, config.window_px
    first = torch.trunc(centre - window).clamp_(0, side)
    # Only the pixels of a window are worked out; all windows have the same width, cut where the frame ends.
    place = first.nan_to_num(side).long().unsqueeze(-1) + torch.arange(2 * window + 2, device=centre.device)
    end = torch.trunc(centre + (window + 1)).clamp_(0, side).unsqueeze(-1)
    seen = place < end
    far = (place - centre.unsqueeze(-1)).square_()
    nearest = far.masked_fill(~seen, torch.inf).amin(-1, keepdim=True)
    value = torch.exp_((far - nearest).mul_(-0.5 / config.sigma_px**2)).masked_fill_(~seen, 0)
    profiles = torch.zeros(*centre.shape, side + 2 * window + 2, device=centre.device)
    profiles.scatter_(-1, place, value)
    return _blurred(profiles[..., :side], config.blur_px)


def _blurred(profiles: Tensor, blur_px: int) -> Tensor:
    """The profiles through OpenCV's Gaussian kernel, reflected at the border (BORDER_REFLECT_101)."""
    if blur_px <= 1:
        return profiles.contiguous()
    half, side = blur_px // 2, profiles.shape[-1]
    padded = functional.pad(profiles, (half, half), mode="reflect")
    kernel = _blur_kernel(blur_px)
    total = padded[..., :side] * kernel[0]
    for tap in range(1, blur_px):
        total.add_(padded[..., tap : tap + side], alpha=kernel[tap])
    return total


@cache
def _blur_kernel(blur_px: int) -> tuple[float, ...]:
    """OpenCV's kernel for a Gaussian of unstated sigma: a fixed table for the published 7 and other small sizes,
    else sigma = 0.3 * ((size - 1) / 2 - 1) + 0.8."""
    return tuple(float(weight) for weight in cv2.getGaussianKernel(blur_px, 0).ravel())


@cache
def _jet_table(device: torch.device) -> Tensor:
    """[3,256]: red, green and blue of each grey level in [0, 1]."""
    levels = np.arange(256, dtype=np.uint8)[:, None]
    rgb = cv2.applyColorMap(levels, cv2.COLORMAP_JET)[:, 0, ::-1].astype(np.float32)
    return torch.from_numpy(rgb / 255).T.contiguous().to(device)


def _resize(frames: Tensor, side_px: int) -> Tensor:
    if frames.shape[-1] == side_px:
        return frames
    return functional.interpolate(frames, size=(side_px, side_px), mode="bilinear", antialias=True, align_corners=False)
