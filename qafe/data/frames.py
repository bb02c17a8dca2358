"""Frames of a clip on their way from a video to what the RGB encoder reads: flipped, cropped, normalised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..store import Frames
from .compiled import scale_and_shift

RGB_MEAN = (0.485, 0.456, 0.406)
RGB_STD = (0.229, 0.224, 0.225)
"""ImageNet's, as published."""


@dataclass(frozen=True, slots=True, eq=False)
class Crop:
    """The frames of a clip, still inside their video: what is flipped and cropped is copied when it is read."""

    video: Frames
    """[N,H,W,3]; may be mapped from the frame cache."""
    indices: Sequence[int]
    """T frames of the video."""
    offset: tuple[int, int]
    """(top, left) of the crop in the flipped frame, in pixels."""
    side: int
    flip: bool

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def corner(self) -> tuple[int, int]:
        """(top, left) of the crop in the stored frame."""
        top, left = self.offset  # A crop of the mirrored frame is the mirror of a crop from the other side.
        return top, self.video.shape[2] - left - self.side if self.flip else left

    def frames(self) -> Iterator[Frames]:
        """Each frame of the clip, flipped and then cropped, [side,side,3]; good until the next is asked for."""
        top, left = self.corner
        crops = self.video[:, top : top + self.side, left : left + self.side]
        mirrored = np.empty(crops.shape[1:], np.uint8)
        for index in self.indices:
            yield cv2.flip(crops[index], 1, dst=mirrored) if self.flip else crops[index]  # type: ignore[misc]


def pixels(crops: Sequence[Crop]) -> UInt8[Tensor, "B T side side 3"]:
    """All frames of some clips of one size, copied out of their videos."""
    first = crops[0]
    copied = np.empty((len(crops), len(first), first.side, first.side, 3), np.uint8)
    for crop, clip in zip(crops, copied, strict=True):
        for frame, place in zip(crop.frames(), clip, strict=True):
            place[:] = frame
    return torch.from_numpy(copied)


def normalised(clips: UInt8[Tensor, "B T H W 3"] | Sequence[Crop]) -> Float[Tensor, "B 3 T H W"]:
    """(rgb / 255 - mean) / deviation as one multiply-add, on the frames' device.

    On a CPU in one pass over memory, straight from the video where the frames are still there. In memory colours lie
    side by side, as they are stored.
    """
    if isinstance(clips, Tensor):
        shape, device = clips.shape, clips.device
    else:
        side = clips[0].side
        shape, device = torch.Size((len(clips), len(clips[0]), side, side, 3)), torch.device("cpu")
    mean, deviation = np.array(RGB_MEAN), np.array(RGB_STD)
    scale, shift = (
        torch.tensor(values, dtype=torch.float32, device=device)
        for values in (1 / (255 * deviation), -mean / deviation)
    )
    out = torch.empty(shape, device=device)
    if device.type == "cpu":
        for clip, place in zip(clips, out.numpy(), strict=True):
            if isinstance(clip, Tensor):
                clip = Crop(clip.numpy(), range(len(clip)), offset=(0, 0), side=shape[3], flip=False)
            (top, left), video, indices = clip.corner, np.ascontiguousarray(clip.video), np.array(clip.indices)
            scale_and_shift(video, indices, top, left, clip.flip, scale.numpy(), shift.numpy(), place)
    else:
        assert isinstance(clips, Tensor)
        rows = out.flatten(3)  # Colours by themselves would be short rows, and slow.
        torch.addcmul(shift.repeat(shape[3]), rows.copy_(clips.flatten(3)), scale.repeat(shape[3]), out=rows)
    return out.permute(0, 4, 1, 2, 3)
