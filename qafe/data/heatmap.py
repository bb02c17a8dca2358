"""Landmarks -> heatmap frames: batched, on the device of the landmarks. Pure functions.

Source: the heatmaps that the QAFE-Net authors render to disk (arXiv:2312.00856); uint8-equal to theirs for faces
inside the frame. Differs: drawn when needed instead of stored as JPEG (which costs up to 180 levels at single
pixels), a point that cannot be seen is left out instead of blanking the frame, and points are drawn as products of
two profiles, so that no image a point is ever made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import cv2
import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from ..config import HeatmapConfig

_CPU_CHUNK_PIXELS = 2**21
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
    flat, side = _flat(landmarks), config.canvas_px
    drawn = torch.zeros(len(flat), side, side, device=flat.device)
    for where, grey in _drawn(flat, config):
        drawn[where] = grey
    return drawn.view(*landmarks.shape[:-2], side, side)


@torch.no_grad()
def colourise(grey: Float[Tensor, "*batch H W"]) -> Float[Tensor, "*batch 3 H W"]:
    """Grey heatmaps in [0, 1] through OpenCV's JET map: red, green and blue in [0, 1].

    The grey value is truncated to uint8 first, as published.
    """
    planes = torch.empty(3, *grey.shape, device=grey.device)
    _colour(grey, planes)
    return planes.movedim(0, -3)


@torch.no_grad()
def pictures(landmarks: Float[Tensor, "*batch P 2"], config: HeatmapConfig) -> UInt8[Tensor, "*batch H W 3"]:
    """The published frames: `draw` through OpenCV's JET map; red, green and blue in 0..255.

    A view of pixels of four bytes, of which the last is 0: whole words are looked up three times as fast.

    Args:
        landmarks: (x, y) in canvas pixels, the points to draw only.
        config: canvas, sigma, window and blur; colour is not used here.
    """
    words = _jet_frames(_flat(landmarks), config)
    return words.view(torch.uint8).view(*landmarks.shape[:-2], *words.shape[1:], 4)[..., :3]


@torch.no_grad()
def render(
    landmarks: Float[Tensor, "*batch P 2"], config: HeatmapConfig, *, resize_px: int
) -> Float[Tensor, "*batch C h w"]:
    """Heatmap frames in [0, 1] as the encoder sees them before the crop: drawn, coloured, resized.

    Resized with an antialiased bilinear filter; JET as the published loader does, with Pillow's rounding
    to whole levels (the same to the bit where the sizes divide); not at all if the canvas has that size.

    Args:
        landmarks: (x, y) in canvas pixels, the points to draw only.
        config: all heatmap settings.
        resize_px: h = w.
    """
    flat = _flat(landmarks)
    # Planes lie apart in memory, as the encoder reads them.
    planes = torch.empty(config.channels, len(flat), resize_px, resize_px, device=flat.device)
    for frames in _chunks(flat, config.canvas_px):
        if config.colour == "grey":
            planes[0, frames] = _resized(draw(flat[frames], config).unsqueeze(1), resize_px, resize_px)[:, 0]
        elif config.canvas_px == resize_px:
            _colour(draw(flat[frames], config), planes[:, frames])
        else:
            _resize_jet(_jet_frames(flat[frames], config), planes[:, frames])
    return planes.view(config.channels, *landmarks.shape[:-2], resize_px, resize_px).movedim(0, -3)


def _flat(landmarks: Tensor) -> Tensor:
    return landmarks.reshape(math.prod(landmarks.shape[:-2]), *landmarks.shape[-2:]).float()


def _chunks(flat: Tensor, side: int) -> Iterator[slice]:
    """Frames to draw at a time: on a CPU what its caches hold, else what stays below some 500 MB."""
    pixels = _CPU_CHUNK_PIXELS if flat.device.type == "cpu" else _GPU_CHUNK_PIXELS
    step = max(1, pixels // side**2)
    return (slice(start, start + step) for start in range(0, len(flat), step))


def _drawn(flat: Tensor, config: HeatmapConfig) -> Iterator[tuple[tuple[slice, slice, slice], Tensor]]:
    """[n,P,2] canvas pixels -> frames, rows and columns, and the grey values there; all others are zero."""
    if not flat.shape[1]:
        return
    for frames in _chunks(flat, config.canvas_px):
        (columns, across), (rows, down) = _profiles(flat[frames], config)
        with torch.autocast(flat.device.type, enabled=False):
            grey = torch.bmm(down.transpose(1, 2), across)
        peak = grey.amax(dim=(1, 2), keepdim=True)
        # An empty frame has peak 0 and stays zero; a smallest normal number keeps 0/0 away without changing others.
        yield (frames, rows, columns), grey.div_(peak.clamp_min_(torch.finfo(grey.dtype).tiny))


def _profiles(points: Tensor, config: HeatmapConfig) -> list[tuple[slice, Tensor]]:
    """[n,P,2] -> along x and along y: the pixels that are not zero for all points, and each point's values there.

    A profile has peak 1 inside the frame and is then blurred; it is zero if no pixel of it is inside.
    """
    side, window, half = config.canvas_px, config.window_px, config.blur_px // 2
    # No coordinate is NaN or far out: a point outside these bounds has no pixel inside the frame.
    centre = points.permute(2, 0, 1).contiguous().nan_to_num(-torch.inf).clamp_(-window - 2, side + window + 1)
    first = torch.trunc(centre - window).clamp_(0, side)
    end = torch.trunc(centre + (window + 1)).clamp_(0, side)
    nearest = torch.minimum(torch.maximum(centre.round(), first), end - 1)
    # All windows have the same width, and what the frame's edge cuts off is masked. The blur reads `half` pixels more
    # to either side of the pixels that it changes, mirrored where the frame ends (BORDER_REFLECT_101).
    width = 2 * window + 2 + 2 * half
    place = (first - 2 * half).unsqueeze(-1) + torch.arange(width + 2 * half, device=points.device)
    pixel = (side - 1) - place.abs_().sub_(side - 1).abs_()
    far = (pixel - centre.unsqueeze(-1)).square_() - (nearest - centre).square_().unsqueeze(-1)
    value = far.mul_(-0.5 / config.sigma_px**2).clamp_(max=0).exp_()
    # Several times as fast as a mask of booleans.
    seen = pixel.sub_((first + end - 1).unsqueeze(-1) / 2).abs_().lt_((end - first).unsqueeze(-1) / 2)
    value = _blurred(value.mul_(seen), config.blur_px)
    # On a CPU only the pixels near a point are drawn. On a GPU all are: to ask where points lie would wait for it.
    lowest, spans = first.new_zeros(2), [(0, side), (0, side)]
    if points.device.type == "cpu":
        lowest = first.amin((1, 2)).clamp_(max=side - 1)  # One pixel at least.
        spans = [(int(low), int(high)) for low, high in zip(lowest, first.amax((1, 2)), strict=True)]
    index = (first - lowest.view(2, 1, 1)).long().unsqueeze(-1) + torch.arange(width, device=points.device)
    profiles = value.new_zeros(*first.shape, max(high - low for low, high in spans) + width)
    profiles.scatter_(-1, index, value)
    found = []
    for (low, high), profile in zip(spans, profiles, strict=True):
        start, stop = max(low - half, 0), min(high - half + width, side)
        found.append((slice(start, stop), profile[..., start - low + half : stop - low + half]))
    return found


def _blurred(values: Tensor, blur_px: int) -> Tensor:
    """[...,W] -> [...,W - blur_px + 1]: through OpenCV's Gaussian kernel."""
    if blur_px <= 1:
        return values
    kernel, width = _blur_kernel(blur_px), values.shape[-1] - blur_px + 1
    total = values[..., :width] * kernel[0]
    for tap in range(1, blur_px):
        total.add_(values[..., tap : tap + width], alpha=kernel[tap])
    return total


@cache
def _blur_kernel(blur_px: int) -> tuple[float, ...]:
    """OpenCV's kernel for a Gaussian of unstated sigma: a fixed table for the published 7 and other small sizes,
    else sigma = 0.3 * ((size - 1) / 2 - 1) + 0.8."""
    return tuple(float(weight) for weight in cv2.getGaussianKernel(blur_px, 0).ravel())


def _level(grey: Tensor) -> Tensor:
    """[...] in [0, 1] -> a level of 0 to 255 each, truncated, in one row: what index_select is fastest with."""
    return (grey * 255).int().reshape(-1)


def _colour(grey: Tensor, out: Tensor) -> None:
    """[...] in [0, 1] -> [3,...]: through the JET map."""
    level = _level(grey)
    for channel, plane in zip(_jet_table(grey.device), out, strict=True):
        # More than twice as fast here as indexing with a tensor, and than stacking afterwards.
        torch.index_select(channel, 0, level, out=plane.view(-1))


def _jet_frames(flat: Tensor, config: HeatmapConfig) -> Tensor:
    """[n,P,2] canvas pixels -> int32 [n,H,W]: the bytes of a pixel are red, green, blue and 0."""
    side, (dark, table) = config.canvas_px, _jet_words(flat.device)
    words = torch.full((len(flat), side, side), dark, dtype=torch.int32, device=flat.device)
    for where, grey in _drawn(flat, config):
        words[where] = table.index_select(0, _level(grey)).view(grey.shape)
    return words


@cache
def _jet() -> npt.NDArray[np.uint8]:
    """[256,3]: red, green and blue of each grey level."""
    levels = np.arange(256, dtype=np.uint8)[:, None]
    return np.ascontiguousarray(cv2.applyColorMap(levels, cv2.COLORMAP_JET)[:, 0, ::-1])


@cache
def _jet_words(device: torch.device) -> tuple[int, Tensor]:
    """The word of grey level 0, and those of all levels, int32 [256]."""
    words = np.pad(_jet(), ((0, 0), (0, 1))).view(np.int32)[:, 0]
    return int(words[0]), torch.from_numpy(words).to(device)


@cache
def _jet_table(device: torch.device) -> Tensor:
    """[3,256]: red, green and blue of each grey level in [0, 1]."""
    return torch.from_numpy(_jet().astype(np.float32) / 255).T.contiguous().to(device)


def _resized(frames: Tensor, height_px: int, width_px: int) -> Tensor:
    if frames.shape[-2:] == (height_px, width_px):
        return frames
    return functional.interpolate(
        frames, size=(height_px, width_px), mode="bilinear", antialias=True, align_corners=False
    )


def _resize_jet(words: Tensor, out: Tensor) -> None:
    """int32 [n,H,W] -> [3,n,h,w] in [0, 1]: resized across, rounded to levels, then down, and rounded, like Pillow."""
    side_px = out.shape[-1]
    frames = words.view(torch.uint8).view(*words.shape, 4).permute(0, 3, 1, 2)
    if frames.device.type == "cpu":  # Torch resizes bytes as Pillow does, but not on a GPU.
        small = _resized(frames, side_px, side_px).permute(0, 2, 3, 1).contiguous().view(torch.int32)[..., 0]
        for channel, plane in enumerate(out):  # Arithmetic on words is several times as fast as picking bytes.
            torch.div(small.bitwise_right_shift(8 * channel).bitwise_and_(255), 255, out=plane)
    else:
        wide = _resized(frames[:, :3].float(), words.shape[1], side_px).add_(0.5).floor_()
        out.copy_(_resized(wide, side_px, side_px).add_(0.5).floor_().div_(255).movedim(1, 0))
