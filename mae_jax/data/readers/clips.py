"""Clips of films: frames chosen, decoded, cropped, augmented, as often as a film becomes rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data import frames
from mae_jax.data.augment import parse_rand_augment
from mae_jax.data.clip_transforms import (
    BILINEAR,
    ClipTransform,
    EachFrame,
    MultiScaleCrop,
    SpacedCrops,
)
from mae_jax.data.readers import check_counts
from mae_jax.data.transforms import (
    CenterCrop,
    Compose,
    HorizontalFlip,
    RandomResizedCrop,
    Transform,
    check_boxes,
)
from mae_jax.data.video import FORMATS, read_frames
from mae_jax.errors import ConfigError

GREY = (128 / 255,) * 3  # what RandAugment fills with, as SlowFast's, which the authors use, does


@dataclasses.dataclass(frozen=True)
class ClipReader:
    """Choose frames of `video` of an example and transform them: `image` uint8 [F, H, W, C].

    With several views `image` is [V, F, H, W, C]: all crops of the first clip, of the second, ...

    Attributes:
      channels: see `read_frames`.
      choose: (number of frames, generator) -> numbers of frames [clips, F].
      transform: of a clip to crops of one shape.
      views: clips times crops.
    """

    channels: int
    choose: Callable[[int, np.random.Generator], np.ndarray]
    transform: ClipTransform
    views: int = 1
    field = "video"

    def __call__(
        self, example: Mapping[str, Any], rng: np.random.Generator, *, exif: bool = False
    ) -> dict[str, np.ndarray]:
        """Return `image`; see `Reader`. A rotation that a film asks for is always applied."""
        del exif
        clips = read_frames(example["video"], lambda count: self.choose(count, rng), self.channels)
        views = np.concatenate([self.transform(clip, rng) for clip in clips])
        return {"image": views if self.views > 1 else views[0]}


def training(config: ConfigDict) -> ClipReader:
    """Return what reads clips to train on.

    Raises:
      ConfigError: naming the field, if one is out of range.
    """
    data = config.data
    _check(data, "crops_per_image")
    steps: list[Transform] = []
    if config.task == "finetune" and data.rand_augment:
        if data.channels != 3:
            raise ConfigError(
                f"model.channels: expected 3 with data.rand_augment, got {data.channels}"
            )
        steps.append(parse_rand_augment(data.rand_augment, GREY))
    steps.append(_crop(data))
    if data.flip:
        steps.append(HorizontalFlip())
    draw = (
        functools.partial(frames.draw_dense, frames=data.frames, stride=data.stride)
        if data.sampling == "dense"
        else functools.partial(frames.draw_uniform, frames=data.frames)
    )
    transform = EachFrame(Compose(tuple(steps)), data.crops_per_image)
    return ClipReader(data.channels, draw, transform, data.crops_per_image)


def evaluation(data: ConfigDict, given: float | None = None) -> ClipReader:
    """Return what reads clips to evaluate on: `data.test_clips` x `data.test_crops` of each film.

    Args:
      data: of the configuration that the model was trained with.
      given: None; of clips, the whole shorter side is seen.

    Raises:
      ConfigError: naming the field, if one is out of range.
    """
    if given is not None:
        raise ConfigError(f"data.crop_fraction: expected none with clips, got {given}")
    _check(data, "test_clips", "test_crops")
    clips, crops = data.test_clips, data.test_crops
    choose = (
        functools.partial(frames.spaced_dense, frames=data.frames, stride=data.stride, clips=clips)
        if data.sampling == "dense"
        else functools.partial(frames.spaced_uniform, frames=data.frames, clips=clips)
    )
    return ClipReader(data.channels, choose, SpacedCrops(data.image_size, crops), clips * crops)


def _crop(data: ConfigDict) -> Transform:
    if data.augment == "multi_scale_crop":
        return MultiScaleCrop(data.image_size)
    if data.augment == "random_resized_crop":
        check_boxes(data.crop_scale, data.crop_ratio)
        return RandomResizedCrop(data.image_size, data.crop_scale, data.crop_ratio, BILINEAR)
    if data.augment == "none":
        return CenterCrop(data.image_size, 1.0, BILINEAR)
    raise ConfigError(
        "data.augment: expected multi_scale_crop, random_resized_crop or none with clips, got"
        f" {data.augment!r}"
    )


def _check(data: ConfigDict, *counts: str) -> None:
    """Refuse fields that training and evaluation share, and `counts`, if out of range."""
    if data.sampling not in ("dense", "uniform"):
        raise ConfigError(f"data.sampling: expected dense or uniform, got {data.sampling!r}")
    check_counts(data, "frames", "stride", *counts)
    if data.channels not in FORMATS:
        raise ConfigError(f"model.channels: expected 1 or 3 with clips, got {data.channels}")
