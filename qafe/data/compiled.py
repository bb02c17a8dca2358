"""The loops that a CPU spends its time in between stored clips and the model: compiled by Numba, some seconds at a
process's first use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

Function = TypeVar("Function", bound=Callable[..., Any])
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

_TINY = np.finfo(np.float32).tiny


def _compiled(function: Function) -> Function:
    """Numba's decorator: without Python's lock, and divisions as NumPy's.

    Nothing is kept on disk: where two processes keep the code of different types at once, both may take one name for it
    (Numba 0.68), and a third process then runs the wrong one.
    """
    return cast(Function, numba.njit(nogil=True, error_model="numpy")(function))


@_compiled
def scale_and_shift(
    video: npt.NDArray[np.uint8],
    indices: Int64,
    top: int,
    left: int,
    flip: bool,
    scale: Float32,
    shift: Float32,
    out: Float32,
) -> None:
    """``level * scale + shift`` for crops of frames, in one pass over memory.

    Args:
        video: [N,H,W,3], contiguous.
        indices: of T frames.
        top: first row of the crop.
        left: its first column in the stored frame.
        flip: mirror the crop.
        scale: of each colour, [3].
        shift: of the same.
        out: [T,h,w,3], contiguous.
    """
    # Rows by themselves would be arrays, each made at some cost.
    levels, numbers = video.reshape(video.size), out.reshape(out.size)
    length, place = 3 * out.shape[2], 0
    scales, shifts = np.empty(length, np.float32), np.empty(length, np.float32)
    for x in range(length):
        scales[x], shifts[x] = scale[x % 3], shift[x % 3]
    for index in indices:
        for y in range(out.shape[1]):
            first = 3 * ((index * video.shape[1] + top + y) * video.shape[2] + left)
            stored, row = levels[first : first + length], numbers[place : place + length]
            for x in range(length):
                row[x] = stored[x] * scales[x] + shifts[x]
            if flip:
                for x in range(0, length // 2, 3):
                    for colour in range(3):
                        here, there = x + colour, length - 3 - x + colour
                        row[here], row[there] = row[there], row[here]
            place += length


@_compiled
def reach(points: Float32, side: int, window: int, half: int) -> tuple[int, int, int, int]:
    """Rows (first, end) and columns (first, end) of the canvas that any point's blurred window has; all 0 if none.

    Args:
        points: (x, y), [N,P,2].
        side: of the canvas.
        window: pixels on either side of a point.
        half: pixels that the blur adds on either side of a window.
    """
    top, bottom, left, right = side, 0, side, 0
    for frame in range(points.shape[0]):
        for point in range(points.shape[1]):
            x, x_end = _window(points[frame, point, 0], side, window)
            y, y_end = _window(points[frame, point, 1], side, window)
            if x < x_end and y < y_end:
                top, bottom, left, right = min(top, y), max(bottom, y_end), min(left, x), max(right, x_end)
    if bottom == 0:
        return 0, 0, 0, 0
    return max(top - half, 0), min(bottom + half, side), max(left - half, 0), min(right + half, side)


@_compiled
def draw_grey(
    points: Float32, side: int, sigma: float, window: int, kernel: Float32, top: int, left: int, out: Float32
) -> None:
    """Draws heatmaps; `qafe.data.heatmap.draw` says what one is.

    Args:
        points: (x, y) on the canvas, [N,P,2].
        side: of the canvas.
        sigma: standard deviation of a point's Gaussian.
        window: pixels on either side of a point.
        kernel: of the blur, odd; one 1 does not blur.
        top: first row of `out` on the canvas.
        left: first column.
        out: [N,H,W]; must hold all that is in `reach`.
    """
    for frame in range(len(points)):
        grey = out[frame]
        peak = _sum(points[frame], side, sigma, window, kernel, top, left, grey)
        for y in range(len(grey)):
            row = grey[y]
            for x in range(len(row)):
                row[x] /= peak


@_compiled
def draw_words(
    points: Float32,
    side: int,
    sigma: float,
    window: int,
    kernel: Float32,
    top: int,
    left: int,
    out: npt.NDArray[np.int32],
    table: npt.NDArray[np.int32],
) -> None:
    """As `draw_grey`; a pixel is the table's word of its level, which is the grey value's, truncated to 0..255."""
    grey = np.empty(out.shape[1:], np.float32)
    levels = np.empty(out.shape[2], np.uint8)
    for frame in range(len(points)):
        peak = _sum(points[frame], side, sigma, window, kernel, top, left, grey)
        for y in range(len(grey)):
            row, words = grey[y], out[frame, y]
            for x in range(len(row)):
                levels[x] = np.int32(row[x] / peak * np.float32(255))
            for x in range(len(row)):
                words[x] = table[levels[x]]


@_compiled
def split_words(words: npt.NDArray[np.int32], around: int, out: Float32, first: int, top: int, left: int) -> None:
    """A word's bytes, the lowest first, as numbers in [0, 1]; each number is written once.

    Args:
        words: [n,h,w], the middle of n frames.
        around: the word of all pixels around it.
        out: [C,N,H,W]; n frames of it, from this one on, are written.
        top: first row of the middle.
        left: its first column.
    """
    bottom, right = top + words.shape[1], left + words.shape[2]
    for channel in range(len(out)):
        outside = np.float32((around >> (8 * channel)) & 255) / np.float32(255)
        for frame in range(len(words)):
            plane = out[channel, first + frame]
            plane[:top] = outside
            for y in range(top, bottom):
                row, place = words[frame, y - top], plane[y, left:right]
                plane[y, :left] = outside
                for x in range(len(row)):
                    place[x] = np.float32((row[x] >> (8 * channel)) & 255) / np.float32(255)
                plane[y, right:] = outside
            plane[bottom:] = outside


@_compiled
def _sum(
    points: Float32, side: int, sigma: float, window: int, kernel: Float32, top: int, left: int, grey: Float32
) -> np.float32:
    """All points of a frame, and the greatest sum: a smallest normal number at least, which keeps 0/0 away."""
    grey[:] = 0
    first, size, begin, values = _profiles(points.T.copy().reshape(points.size), side, sigma, window, kernel)
    across = np.empty(len(values), np.float32)
    for x in range(len(points)):
        y, start, width = len(points) + x, first[x] - left, size[x]
        if not width:
            continue
        for place in range(width):
            across[place] = values[begin[x] + place, x]
        for step in range(size[y]):
            row, weight = grey[first[y] - top + step, start : start + width], values[begin[y] + step, y]
            for place in range(width):
                row[place] += weight * across[place]
    # Of each column first: several at a time. One maximum of all would be taken value by value.
    peaks = np.full(grey.shape[1], _TINY, np.float32)
    for y in range(len(grey)):
        row = grey[y]
        for place in range(len(row)):
            if row[place] > peaks[place]:
                peaks[place] = row[place]
    peak = _TINY
    for of_column in peaks:
        peak = max(peak, of_column)
    return peak


@_compiled
def _window(centre: float, side: int, window: int) -> tuple[int, int]:
    """First and end of the canvas's pixels within a coordinate's window; equal if there is none."""
    if not -window - 2 < centre < side + window + 1:  # NaN is not, either.
        return 0, 0
    width = np.float32(window)
    first, end = int(centre - width), int(centre + (width + np.float32(1)))
    return min(max(first, 0), side), min(max(end, 0), side)


@_compiled
def _profiles(
    centres: Float32, side: int, sigma: float, window: int, kernel: Float32
) -> tuple[Int64, Int64, Int64, Float32]:
    """Gaussians along an axis of the canvas: 1 at the nearest pixel inside it, then blurred.

    Values of all profiles lie side by side, so that a step is taken for many of them at a time.

    Args:
        centres: coordinates, [C].
        side, sigma, window, kernel: as for `draw_grey`.

    Returns:
        Of each profile the first pixel, how many there are (0 if none is inside), and which of its values is that of
        the first pixel: [C] each. And the values, [L,C].
    """
    count, half, variance = len(centres), len(kernel) // 2, sigma * sigma
    middle = window + 1  # The nearest pixel may be so far from the window's first.
    length = 2 * middle + 1 + 2 * half
    centre = middle + 2 * half  # The blur reads `half` values more on either side than it changes.
    values, blurred = np.zeros((length + 2 * half, count), np.float32), np.zeros((length, count), np.float32)
    first, size, begin = np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count, np.int64)
    nearest, reached = np.zeros(count, np.int64), np.zeros((2, count), np.int64)
    for c in range(count):
        start, end = _window(centres[c], side, window)
        if start < end:
            nearest[c] = min(max(int(np.rint(centres[c])), start), end - 1)
            reached[0, c], reached[1, c] = nearest[c] - start, end - 1 - nearest[c]
            first[c] = max(start - half, 0)
            size[c] = min(end + half, side) - first[c]
            begin[c] = first[c] - (nearest[c] - middle - half)

    # A value is its neighbour's, times a factor that falls by one and the same factor from pixel to pixel.
    value, factor, falls = np.empty(count), np.empty(count), math.exp(-1 / variance)
    values[centre] = 1
    for way in range(2):
        for c in range(count):
            apart = nearest[c] - float(centres[c])
            value[c], factor[c] = 1, math.exp(-(0.5 + (apart if way else -apart)) / variance)
        for step in range(1, middle + 1):
            row = values[centre + step if way else centre - step]
            for c in range(count):
                value[c] *= factor[c]
                factor[c] *= falls
                row[c] = value[c] if step <= reached[way, c] else 0

    # The frame's edge is a mirror to the blur: BORDER_REFLECT_101.
    for c in range(count):
        origin = nearest[c] - centre
        for beyond in range(1, half + 1):
            for seen, mirrored in ((beyond, -beyond), (side - 1 - beyond, side - 1 + beyond)):
                if 0 <= mirrored - origin < len(values) and 0 <= seen - origin < len(values):
                    values[mirrored - origin, c] = values[seen - origin, c]

    for step in range(length):
        total = blurred[step]
        for tap in range(len(kernel)):
            row, weight = values[step + tap], kernel[tap]
            for c in range(count):
                total[c] += weight * row[c]
    return first, size, begin, blurred
