"""Landmarks -> heatmap frames: batched, on the device of the landmarks. Pure functions.

Source: the heatmaps that the QAFE-Net authors render to disk (arXiv:2312.00856); uint8-equal to theirs for faces
inside the frame. Differs: drawn when needed instead of stored as JPEG (which costs up to 180 levels at single
pixels), a point that cannot be seen is left out instead of blanking the frame, and a point is the product of two
profiles, so that no image a point is ever made: loops add it where it lies (`qafe.data.compiled`), and on a GPU rows
are sums of the profiles that reach them.
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
from . import compiled

_CPU_CHUNK_PIXELS = 2**20
"""Which its caches hold."""
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

    A Gaussian is the product of a profile along x and one along y, and so is the blur, so a frame is the sum of the
    points' products of two blurred profiles. Runs in float32 under autocast, too.

    Args:
        landmarks: (x, y) in canvas pixels, the points to draw only.
        config: canvas, sigma, window and blur; colour is not used here.
    """
    flat, side = _flat(landmarks), config.canvas_px
    drawn = torch.zeros(len(flat), side, side, device=flat.device)
    if _in_loops(flat):
        rows, columns = _region(flat, config)
        part = torch.empty_like(drawn[:, rows, columns], memory_format=torch.contiguous_format)
        compiled.draw_grey(*_arguments(flat, config, rows, columns), part.numpy())
        drawn[:, rows, columns] = part
    else:
        for frames, grey in _drawn(flat, config):
            drawn[frames] = grey
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
    if config.colour == "jet" and (_in_loops(flat) or config.canvas_px != resize_px):
        _render_jet(flat, config, planes)
    else:
        for frames in _chunks(flat, config.canvas_px):
            grey = draw(flat[frames], config)
            if config.colour == "jet":
                _colour(grey, planes[:, frames])
            else:
                planes[0, frames] = _resized(grey.unsqueeze(1), resize_px, resize_px)[:, 0]
    return planes.view(config.channels, *landmarks.shape[:-2], resize_px, resize_px).movedim(0, -3)


def _flat(landmarks: Tensor) -> Tensor:
    return landmarks.detach().reshape(math.prod(landmarks.shape[:-2]), *landmarks.shape[-2:]).float().contiguous()


def _chunks(flat: Tensor, side: int) -> Iterator[slice]:
    """Frames to draw at a time: few calls, and memory that stays below some 500 MB, on a CPU 10 MB."""
    pixels = _CPU_CHUNK_PIXELS if _in_loops(flat) else _GPU_CHUNK_PIXELS
    step = max(1, pixels // side**2)
    return (slice(start, start + step) for start in range(0, len(flat), step))


def _in_loops(flat: Tensor) -> bool:
    """Whether points are drawn one by one, or all of them by a few operations of torch."""
    return flat.device.type == "cpu"


def _arguments(
    flat: Tensor, config: HeatmapConfig, rows: slice, columns: slice
) -> tuple[compiled.Float32, int, float, int, compiled.Float32, int, int]:
    """What all loops that draw begin with."""
    kernel = np.array(_blur_kernel(config.blur_px), np.float32)
    return flat.numpy(), config.canvas_px, config.sigma_px, config.window_px, kernel, rows.start, columns.start


def _region(flat: Tensor, config: HeatmapConfig, block_px: int = 1, margin: int = 0) -> tuple[slice, slice]:
    """Rows and columns of the canvas that points reach: the blocks that hold them, and a margin of so many more."""
    side = config.canvas_px
    top, bottom, left, right = compiled.reach(flat.numpy(), side, config.window_px, config.blur_px // 2)

    def blocks(first: int, end: int) -> slice:
        return slice(
            max(first // block_px - margin, 0) * block_px, min((-(-end // block_px) + margin) * block_px, side)
        )

    return blocks(top, bottom), blocks(left, right)


def _drawn(flat: Tensor, config: HeatmapConfig) -> Iterator[tuple[slice, Tensor]]:
    """[n,P,2] canvas pixels -> frames and their grey values; asks nothing of the GPU, which would wait."""
    if not flat.shape[1]:
        return
    side, edge = config.canvas_px, config.blur_px // 2
    for frames in _chunks(flat, side):
        first, profiles = _profiles(flat[frames], config)
        # What lies outside the canvas is summed, too, and then cut off.
        reached = slice(-edge, side - edge + len(profiles))
        grey = _sum_of_products(first, profiles, reached, reached)[:, edge : edge + side, edge : edge + side]
        peak = grey.amax(dim=(1, 2), keepdim=True)
        # An empty frame has peak 0 and stays zero; a smallest normal number keeps 0/0 away without changing others.
        yield frames, grey.div_(peak.clamp_min_(torch.finfo(grey.dtype).tiny))


def _profiles(points: Tensor, config: HeatmapConfig) -> tuple[Tensor, Tensor]:
    """[n,P,2] -> int64 [2,n,P] and [L,2,n,P]: along x and along y, each point's first pixel and its values from there.

    A profile has peak 1 inside the frame and is then blurred; it is zero if no pixel of it is inside. Points of a
    frame are sorted by their rows. Pixels come first, so that in memory values of points lie side by side: short rows
    would be slow.
    """
    side, window, half = config.canvas_px, config.window_px, config.blur_px // 2
    # No coordinate is NaN or far out: a point outside these bounds has no pixel inside the frame.
    centre = points.permute(2, 0, 1).contiguous().nan_to_num(-torch.inf).clamp_(-window - 2, side + window + 1)
    centre = centre.gather(2, centre[1].argsort().expand_as(centre))
    first = torch.trunc(centre - window).clamp_(0, side)
    end = torch.trunc(centre + (window + 1)).clamp_(0, side)
    nearest = torch.minimum(torch.maximum(centre.round(), first), end - 1)
    # The blur reads `half` pixels more to either side of the pixels that it changes. Windows are a pixel wider, what
    # the frame's edge cuts off is masked, and it is a mirror to the blur.
    step = torch.arange(2 * window + 2 + 4 * half, device=points.device).view(-1, 1, 1, 1)
    pixel = (side - 1) - ((first - 2 * half) + step).abs_().sub_(side - 1).abs_()  # BORDER_REFLECT_101
    values = _exponent(pixel, centre, nearest, config).exp_()
    # Several times as fast as a mask of booleans.
    values.mul_(pixel.sub_((first + end - 1) / 2).abs_().lt_((end - first) / 2))
    return first.long() - half, _blurred(values, config.blur_px)


def _exponent(pixel: Tensor, centre: Tensor, nearest: Tensor, config: HeatmapConfig) -> Tensor:
    """Of a Gaussian around the centre that is 1 at the nearest pixel."""
    far = (pixel - centre).square_() - (nearest - centre).square_()
    return far.mul_(-0.5 / config.sigma_px**2).clamp_(max=0)


def _sum_of_products(first: Tensor, profiles: Tensor, x: slice, y: slice) -> Tensor:
    """First pixels and profiles -> the grey values at columns x and rows y, [n,H,W]; no profile reaches beyond them.

    A row is the weighted sum of the profiles along x of the few points that reach it: a "bag" of an embedding. With
    all frames in one column of rows, points begin, and so end, in ascending rows: a bag's points follow each other.
    """
    (length, _, frames, points), width, height = profiles.shape, x.stop - x.start, y.stop - y.start
    point = torch.arange(frames * points, device=first.device)
    step = torch.arange(length, device=first.device).view(-1, 1)

    across = profiles.new_zeros(len(point), width)
    place = (first[0].reshape(-1) - x.start + width * point) + step
    across.view(-1).scatter_(0, place.view(-1), profiles[:, 0].reshape(-1))

    row = (first[1] - y.start).view(-1) + height * point.div(points, rounding_mode="floor")
    begun = row.new_zeros(frames * height).scatter_add_(0, row, torch.ones_like(row)).cumsum(0)
    ended = functional.pad(begun[:-length], (length, 0))
    size = begun - ended
    bags = size.cumsum(0) - size
    place = ((bags - ended).index_select(0, (row + step).view(-1)).view(length, -1) + point).view(-1)
    weights = across.new_empty(len(place)).scatter_(0, place, profiles[:, 1].reshape(-1))
    chosen = torch.empty_like(place).scatter_(0, place, point.repeat(length))
    drawn = functional.embedding_bag(chosen, across, bags, mode="sum", per_sample_weights=weights)
    return drawn.view(frames, height, width)


def _blurred(values: Tensor, blur_px: int) -> Tensor:
    """[W,...] -> [W - blur_px + 1,...]: through OpenCV's Gaussian kernel."""
    if blur_px <= 1:
        return values
    kernel, width = _blur_kernel(blur_px), len(values) - blur_px + 1
    total = values[:width] * kernel[0]
    for tap in range(1, blur_px):
        total.add_(values[tap : tap + width], alpha=kernel[tap])
    return total


@cache
def _blur_kernel(blur_px: int) -> tuple[float, ...]:
    """OpenCV's kernel for a Gaussian of unstated sigma: a fixed table for the published 7 and other small sizes,
    else sigma = 0.3 * ((size - 1) / 2 - 1) + 0.8. A one for 0 and 1."""
    return tuple(float(weight) for weight in cv2.getGaussianKernel(max(blur_px, 1), 0).ravel())


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
    if _in_loops(flat):
        rows, columns = _region(flat, config)
        part = torch.empty_like(words[:, rows, columns], memory_format=torch.contiguous_format)
        compiled.draw_words(*_arguments(flat, config, rows, columns), part.numpy(), table.numpy())
        words[:, rows, columns] = part
    else:
        for frames, grey in _drawn(flat, config):
            torch.index_select(table, 0, _level(grey), out=words[frames].view(-1))
    return words


def _render_jet(flat: Tensor, config: HeatmapConfig, out: Tensor) -> None:
    """[n,P,2] canvas pixels -> [3,n,h,w] in [0, 1]: coloured and resized."""
    side, resized = config.canvas_px, out.shape[-1]
    if not _in_loops(flat):
        for frames in _chunks(flat, side):
            small = _resize_jet(_jet_frames(flat[frames], config), resized, resized)
            out[:, frames] = small[:, :3].float().div_(255).movedim(1, 0)
        return
    dark, table = _jet_words(flat.device)
    # The filter reaches half a resized pixel further, and rounds otherwise where a picture ends: that must be in the
    # dark. All of the canvas is resized where a resized pixel is no whole number of its pixels.
    ratio, rest = divmod(side, resized)
    block, margin = (side, 0) if rest else (ratio, 2)
    for frames in _chunks(flat, side):
        canvas = _region(flat[frames], config, block, margin)
        rows, columns = (slice(span.start * resized // side, span.stop * resized // side) for span in canvas)
        words = torch.empty(out[0, frames].shape[0], *(span.stop - span.start for span in canvas), dtype=torch.int32)
        if words.numel():
            compiled.draw_words(*_arguments(flat[frames], config, *canvas), words.numpy(), table.numpy())
            small = _resize_jet(words, rows.stop - rows.start, columns.stop - columns.start)
            words = small.permute(0, 2, 3, 1).contiguous().view(torch.int32)[..., 0]
        compiled.split_words(words.numpy(), dark, out.numpy(), frames.start, rows.start, columns.start)


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


def _resize_jet(words: Tensor, height_px: int, width_px: int) -> Tensor:
    """int32 [n,H,W] -> [n,4,h,w], whole levels: resized across, rounded, then down, and rounded, like Pillow."""
    frames = words.view(torch.uint8).view(*words.shape, 4).permute(0, 3, 1, 2)
    if frames.device.type == "cpu":  # Torch resizes bytes so, but not on a GPU.
        return _resized(frames, height_px, width_px)
    wide = _resized(frames.float(), words.shape[1], width_px).add_(0.5).floor_()
    return _resized(wide, height_px, width_px).add_(0.5).floor_()
