"""Samples -> clips -> what the model reads.

Decoding happens in `ClipDataset`, in whichever process loads; heatmaps are drawn in `model_inputs`, on the device
that trains. There, too, frames are cropped where that is this process's CPU, and else before they are sent. All
randomness of a clip comes from (seed, epoch, index), so that neither a resumed run nor another number of workers
changes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ..config import AugmentConfig, Config, HeatmapConfig
from ..errors import ManifestError
from ..markup import ALL_COUNT, INNER, columns
from ..store import Store
from . import heatmap
from .augment import CENTRE, ClipDraw, aligned_offset, crop_offset, draw_pair
from .cache import FrameCache
from .clips import test_indices, train_indices
from .frames import Crop, normalised, pixels
from .manifest import Sample


@dataclass
class Clip:
    """One clip, not yet normalised or drawn."""

    frames: Crop
    points: Float32[Tensor, "T P 2"] | None
    """(x, y) in canvas pixels, the drawn points only, scaled and flipped; None if heatmaps are rendered."""
    rendered: UInt8[Tensor, "T h w 3"] | None
    """The authors' heatmaps, cropped and flipped; None if there are landmarks."""
    offset: tuple[int, int]
    """(top, left) of the heatmap crop."""
    score: float
    sample: Sample

    @property
    def rgb(self) -> UInt8[Tensor, "T H W 3"]:
        """A copy of its frames, cropped and flipped."""
        return pixels([self.frames])[0]


@dataclass
class ClipBatch:
    """B clips; see `Clip` for what each field is."""

    frames: UInt8[Tensor, "B T H W 3"] | list[Crop]
    """Cropped and flipped; or still in their videos, in the process that reads those and for its CPU."""
    points: Float32[Tensor, "B T P 2"] | None
    rendered: UInt8[Tensor, "B T h w 3"] | None
    offsets: Tensor
    """int64 [B,2], (top, left) of each heatmap crop; stays on the CPU, where the crop is made from."""
    score: Float32[Tensor, " B"]
    samples: list[Sample]
    whole: int | None = None
    """Clips of the batch that these are one process's share of (`qafe.distributed`); None if these are all."""

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def size(self) -> int:
        """Clips of the whole batch."""
        return len(self) if self.whole is None else self.whole

    @property
    def rgb(self) -> UInt8[Tensor, "B T H W 3"]:
        """The frames, cropped and flipped; a copy if they are still in their videos."""
        return self.frames if isinstance(self.frames, Tensor) else pixels(self.frames)

    def to(self, device: torch.device | str) -> ClipBatch:
        """The batch with its large tensors and scores on a device."""
        stays = torch.device(device).type == "cpu"
        return replace(
            self,
            frames=self.frames if stays else self.rgb.to(device, non_blocking=True),
            points=None if self.points is None else self.points.to(device, non_blocking=True),
            rendered=None if self.rendered is None else self.rendered.to(device, non_blocking=True),
            score=self.score.to(device, non_blocking=True),
        )

    def pin_memory(self) -> ClipBatch:
        """The batch in page-locked memory; a DataLoader with ``pin_memory`` calls this."""
        return replace(
            self,
            frames=self.rgb.pin_memory(),
            points=None if self.points is None else self.points.pin_memory(),
            rendered=None if self.rendered is None else self.rendered.pin_memory(),
            score=self.score.pin_memory(),
        )


def resized_px(crop_px: int, config: AugmentConfig) -> int:
    """Side of a frame before the crop (published: 256 for 224, 64 for 56)."""
    return round(crop_px / config.crop)


class ClipDataset(Dataset[Clip]):
    """The clips of some samples.

    In training every sample gives ``data.repeats`` random clips an epoch; otherwise one fixed clip.

    Args:
        store: the prepared dataset.
        samples: what to read; already filtered, split and shuffled.
        config: model sizes, augmentation, heatmaps and the seed.
        train: random clips with augmentation, or the evaluation clip.
    Raises:
        ManifestError: neither all landmarks nor all rendered heatmaps are there, or the heatmap settings need
            landmarks.
    """

    def __init__(self, store: Store, samples: Sequence[Sample], config: Config, *, train: bool) -> None:
        self.store = store
        self.samples = tuple(samples)
        self.config = config
        self.train = train
        self._rendered = _uses_rendered(store, [(sample.patient, sample.video) for sample in samples], config)
        self._cache = FrameCache(config.data.cache_gb) if config.data.cache_gb else None
        # Shared memory, so that loader workers that outlive an epoch see the next one's number.
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def epoch(self) -> int:
        """The epoch whose random clips are drawn."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose random clips are drawn; call it before each pass over the data."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.samples) * (self.config.data.repeats if self.train else 1)

    def __getitem__(self, index: int) -> Clip:
        """Clip number `index` of the epoch; index modulo the number of samples is the sample.

        Raises:
            IndexError: there is no such clip.
            MediaError: a frame cannot be read.
            ManifestError: the landmarks cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"clip index must lie in 0..{len(self) - 1}, got {index}")
        sample = self.samples[index % len(self.samples)]
        clip_frames = self.config.model.clip_frames
        if not self.train:
            indices = test_indices(sample.frames, clip_frames)
            return _read_clip(self.store, sample, indices, (CENTRE, CENTRE), self.config, self._rendered, self._cache)
        rng = np.random.default_rng((self.config.train.seed, self.epoch, index))
        indices = train_indices(sample.frames, clip_frames, rng)
        draws = draw_pair(rng, self.config.data.augment)
        return _read_clip(self.store, sample, indices, draws, self.config, self._rendered, self._cache)


def collate(clips: list[Clip]) -> ClipBatch:
    """Clips of one dataset as a batch; the ``collate_fn`` of a DataLoader.

    Its workers copy the frames out of their videos, for another process cannot read those.
    """
    frames = [clip.frames for clip in clips]
    points = [clip.points for clip in clips if clip.points is not None]
    rendered = [clip.rendered for clip in clips if clip.rendered is not None]
    return ClipBatch(
        frames=pixels(frames) if get_worker_info() else frames,
        points=torch.stack(points) if points else None,
        rendered=torch.stack(rendered) if rendered else None,
        offsets=torch.tensor([clip.offset for clip in clips], dtype=torch.int64),
        score=torch.tensor([clip.score for clip in clips], dtype=torch.float32),
        samples=[clip.sample for clip in clips],
    )


def model_inputs(batch: ClipBatch, config: Config) -> tuple[Float[Tensor, "B 3 T H W"], Float[Tensor, "B C T h w"]]:
    """What the two encoders read, on the batch's device: RGB frames and heatmap frames.

    RGB is divided by 255 and normalised by ImageNet's mean and deviation; heatmaps lie in [0, 1], as published.
    RGB lies in memory as it is stored, frame by frame and pixel by pixel (``channels_last`` to a 2-D convolution).
    """
    rgb = normalised(batch.frames)
    if batch.points is None:
        assert batch.rendered is not None, "a batch has points or rendered heatmaps"
        return rgb, batch.rendered.permute(0, 4, 1, 2, 3).float().div_(255).contiguous()
    side = config.model.heatmap.size_px
    whole = heatmap.render(batch.points, config.data.heatmap, resize_px=resized_px(side, config.data.augment))
    crops = [
        clip[..., top : top + side, left : left + side].transpose(0, 1)
        for clip, (top, left) in zip(whole, batch.offsets.tolist(), strict=True)
    ]
    return rgb, torch.stack(crops)


def load_clip(store: Store, patient: str, video: str, config: Config) -> ClipBatch:
    """The evaluation clip of one video as a batch of one; its score is NaN.

    Raises:
        MediaError: there are no frames, or one cannot be read.
        ManifestError: there are neither landmarks nor rendered heatmaps, or not one for each frame, or the
            heatmap settings need landmarks.
    """
    frames = len(store.frame_paths(patient, video))
    rendered = _uses_rendered(store, [(patient, video)], config)
    sample = Sample(f"{video}_{patient}", patient, video, "", float("nan"), frames)
    indices = test_indices(frames, config.model.clip_frames)
    return collate([_read_clip(store, sample, indices, (CENTRE, CENTRE), config, rendered)])


def _uses_rendered(store: Store, videos: list[tuple[str, str]], config: Config) -> bool:
    """Whether the authors' rendered heatmaps must be used, because landmarks are missing."""
    bare = [video for video in videos if not store.has_landmarks(*video)]
    if not bare:
        return False
    step = f"Run python -m qafe prepare --landmarks-only {store.root}."
    without = next((video for video in videos if not store.has_rendered_heatmaps(*video)), None)
    if without is not None:
        raise ManifestError(
            f"all videos must have landmarks, or all rendered heatmaps; {'/'.join(bare[0])} has no landmarks and "
            f"{'/'.join(without)} no rendered heatmaps. {step}"
        )
    chosen = config.data.heatmap
    # The published heatmaps leave the first point out, and there is no telling from the picture.
    published = HeatmapConfig(skip_first=chosen.skip_first)
    if chosen != published:
        changed = [
            f"data.heatmap.{name}={getattr(chosen, name)}"
            for name in HeatmapConfig.__dataclass_fields__
            if getattr(chosen, name) != getattr(published, name)
        ]
        raise ManifestError(
            f"rendered heatmaps only exist in the published form, got {', '.join(changed)}, and "
            f"{'/'.join(bare[0])} has no landmarks to draw others from. {step}"
        )
    return True


def _read_clip(
    store: Store,
    sample: Sample,
    indices: npt.NDArray[np.int64],
    draws: tuple[ClipDraw, ClipDraw],
    config: Config,
    rendered: bool,
    cache: FrameCache | None = None,
) -> Clip:
    rgb_draw, heatmap_draw = draws
    augment = config.data.augment
    rgb_side, map_side = config.model.rgb.size_px, config.model.heatmap.size_px
    rgb_resized, map_resized = resized_px(rgb_side, augment), resized_px(map_side, augment)
    rgb_offset = crop_offset(rgb_draw, rgb_resized, rgb_side)
    every = range(len(indices))
    whole = cache.frames(store, sample.patient, sample.video, rgb_resized) if cache else None
    if whole is not None and len(whole) == sample.frames:
        video, chosen = whole, indices.tolist()
    else:
        video, chosen = store.read_frames(sample.patient, sample.video, indices, rgb_resized), every
    rest = (0.0, 0.0)
    if heatmap_draw == rgb_draw:
        offset, rest = aligned_offset(rgb_offset, (rgb_resized, rgb_side), (map_resized, map_side))
    else:
        offset = crop_offset(heatmap_draw, map_resized, map_side)
    points = maps = None
    if rendered:
        pictures = store.read_rendered_heatmaps(sample.patient, sample.video, indices, map_resized)
        maps = pixels([Crop(pictures, every, offset, map_side, heatmap_draw.flip)])[0]
    else:
        points = _canvas_points(store, sample, indices, heatmap_draw.flip, rest, map_resized, config)
    return Clip(
        frames=Crop(video, chosen, rgb_offset, rgb_side, rgb_draw.flip),
        points=points,
        rendered=maps,
        offset=offset,
        score=sample.score,
        sample=sample,
    )


def _canvas_points(
    store: Store,
    sample: Sample,
    indices: npt.NDArray[np.int64],
    flip: bool,
    rest: tuple[float, float],
    map_resized: int,
    config: Config,
) -> Tensor:
    """Landmarks of the clip in canvas pixels: selected, scaled, flipped, moved by the part of the heatmap crop
    that whole pixels cannot express."""
    chosen = config.data.heatmap
    landmarks, shape = _LANDMARKS.read(store, sample)
    if len(landmarks) != sample.frames:
        raise ManifestError(
            f"there must be landmarks for each of the {sample.frames} frames of {sample.patient}/{sample.video}, "
            f"got {len(landmarks)}. Run python -m qafe prepare --landmarks-only {store.root}."
        )
    selected = torch.from_numpy(landmarks[indices][:, _drawn(chosen, landmarks.shape[1])])
    points = heatmap.to_canvas(selected, shape, chosen.canvas_px)
    if flip:
        points = heatmap.mirror(points, chosen.canvas_px)
    if rest != (0.0, 0.0):
        top, left = rest
        points = points - points.new_tensor([left, top]) * (chosen.canvas_px / map_resized)
    return points.contiguous()


def _drawn(config: HeatmapConfig, count: int) -> list[int]:
    """Columns of the landmark array that are drawn."""
    first = INNER[0] if count == ALL_COUNT else 0
    return [column for column in columns(config.points, count) if not (config.skip_first and column == first)]


class _LandmarkMemory:
    """Landmarks and frame sizes of the videos read so far: some 100 kB each, so all are kept up to a count."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Path, str, str, tuple[int, int]], tuple[npt.NDArray[np.float32], tuple[int, int]]] = {}

    def read(self, store: Store, sample: Sample) -> tuple[npt.NDArray[np.float32], tuple[int, int]]:
        """Landmarks [T,P,2] and the (height, width) of the frames that they belong to."""
        stamp = store.stamp(sample.patient, sample.video)
        key = (store.root.absolute(), sample.patient, sample.video, stamp)
        found = self._kept.get(key)
        if found is None:
            landmarks = store.read_landmarks(sample.patient, sample.video)
            if landmarks is None:
                raise ManifestError(
                    f"the video {sample.patient}/{sample.video} must have landmarks, and they are gone. "
                    f"Run python -m qafe prepare --landmarks-only {store.root}."
                )
            found = landmarks, store.frame_shape(sample.patient, sample.video)
            if len(self._kept) >= 1024:
                self._kept.clear()
            self._kept[key] = found
        return found


_LANDMARKS = _LandmarkMemory()
