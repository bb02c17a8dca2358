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
    indices: npt.NDArray[np.int64],
    top: int,
    left: int,
    flip: bool,
    scale: Float32,
    shift: Float32,
    out: Float32,
) -> None:
    """``level * scale + shift`` for crops of frames, in one pass over memory.

    Args:
        video: [N,H,W,3].
        indices: of T frames.
        top: first row of the crop.
        left: its first column in the stored frame.
        flip: mirror the crop.
        scale: of each colour in a row of the crop, [3w].
        shift: of the same.
        out: [T,h,3w].
    """
    length = len(scale)
    width = length // 3
    row = np.empty(length, np.float32)
    for number in range(len(indices)):
        for y in range(out.shape[1]):
            levels = video[indices[number], top + y, left : left + width].reshape(length)
            place = out[number, y]
            if flip:
                for x in range(length):
                    row[x] = levels[x] * scale[x] + shift[x]
                for pixel in range(width):
                    opposite = 3 * (width - 1 - pixel)
                    place[3 * pixel] = row[opposite]
                    place[3 * pixel + 1] = row[opposite + 1]
                    place[3 * pixel + 2] = row[opposite + 2]
            else:
                for x in range(length):
                    place[x] = levels[x] * scale[x] + shift[x]


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
def split_words(words: npt.NDArray[np.int32], out: Float32) -> None:
    """int32 [N,H,W] -> [C,N,H,W]: a word's bytes, the lowest first, as numbers in [0, 1]."""
    for channel in range(len(out)):
        for frame in range(words.shape[0]):
            for y in range(words.shape[1]):
                row, place = words[frame, y], out[channel, frame, y]
                for x in range(len(row)):
                    place[x] = np.float32((row[x] >> (8 * channel)) & 255) / np.float32(255)


@_compiled
def _sum(
    points: Float32, side: int, sigma: float, window: int, kernel: Float32, top: int, left: int, grey: Float32
) -> np.float32:
    """All points of a frame, and the greatest sum: a smallest normal number at least, which keeps 0/0 away."""
    grey[:] = 0
    values = np.empty(2 * (window + len(kernel)), np.float32)
    across, down = np.empty_like(values), np.empty_like(values)
    for point in range(len(points)):
        x, width = _profile(points[point, 0], side, sigma, window, kernel, values, across)
        if not width:
            continue
        y, height = _profile(points[point, 1], side, sigma, window, kernel, values, down)
        for step in range(height):
            row, weight = grey[y - top + step, x - left : x - left + width], down[step]
            for place in range(width):
                row[place] += weight * across[place]
    # Of each column first: several at a time. One maximum of all would be taken value by value.
    peaks = np.full(grey.shape[1], _TINY, np.float32)
    for y in range(len(grey)):
        row = grey[y]
        for x in range(len(row)):
            if row[x] > peaks[x]:
                peaks[x] = row[x]
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
def _profile(
    centre: float, side: int, sigma: float, window: int, kernel: Float32, values: Float32, out: Float32
) -> tuple[int, int]:
    """First pixel and length of a blurred Gaussian, and its values in `out`; length 0 if no pixel is inside.

    It is 1 at its nearest pixel inside the frame before it is blurred.
    """
    first, end = _window(centre, side, window)
    if first == end:
        return 0, 0
    half = len(kernel) // 2
    border = 2 * half  # The blur reads so many more pixels than there are values.
    nearest = min(max(int(np.rint(centre)), first), end - 1)
    # A value is its neighbour's, times a factor that falls by one and the same factor from pixel to pixel.
    apart, variance = nearest - float(centre), sigma * sigma
    up, down = math.exp(-(0.5 + apart) / variance), math.exp(-(0.5 - apart) / variance)
    falls = math.exp(-1 / variance)
    values[:] = 0
    values[border + nearest - first] = value = 1.0
    for place in range(border + nearest - first + 1, border + end - first):
        value *= up
        up *= falls
        values[place] = value
    value = 1.0
    for place in range(border + nearest - first - 1, border - 1, -1):
        value *= down
        down *= falls
        values[place] = value
    start, stop = max(first - half, 0), min(end + half, side)
    if first >= border and end + border < side:
        for pixel in range(stop - start):
            total = np.float32(0)
            for tap in range(len(kernel)):
                total += kernel[tap] * values[pixel + tap]
            out[pixel] = total
    else:  # The frame's edge is a mirror to the blur: BORDER_REFLECT_101.
        for pixel in range(start, stop):
            total = np.float32(0)
            for tap in range(len(kernel)):
                seen = abs(pixel + tap - half)
                if seen >= side:
                    seen = 2 * (side - 1) - seen
                if first <= seen < end:
                    total += kernel[tap] * values[border + seen - first]
            out[pixel - start] = total
    return start, stop - start
