"""One picture of images under several masks: read the images, read the masks, lay them out."""

from __future__ import annotations

import argparse
import dataclasses
import glob
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from mae_jax import api
from mae_jax.data.sources.clips import Films
from mae_jax.data.sources.folder import Files, scan
from mae_jax.data.transforms import BadExample, Decode
from mae_jax.errors import ConfigError
from mae_jax.files import encode_picture, words_of
from mae_jax.tasks import pictures

WHITE = 128  # of 255: a pixel of a mask that is at least as bright hides


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way of hiding patches.

    Attributes:
      caption: says which.
      fields: of `api.Pretrained.plan`.
    """

    caption: str
    fields: dict[str, Any]


def write(flags: argparse.Namespace) -> None:
    """Draw what the flags of `mae_jax.tools.visualize` ask for and say where it is.

    Raises:
      ConfigError: if the checkpoint, the masks or all images are no good.
    """
    model = api.load(flags.checkpoint)
    chosen = variants(model, flags.mask, flags.mask_ratio, flags.seed)
    is_of_clips = len(model.module.unit.grid_size) == 3
    paths = image_paths(flags.images, Films if is_of_clips else Files)
    images = read_images(model, paths, flags.limit)
    if next(paths, None) is not None:
        print(f"the first {len(images)} images; --limit=N takes more")
    out = epath.Path(flags.out).expanduser()
    written = []
    for picture in compare(model, images, chosen):
        encoded, suffix = encode_picture(picture)
        written.append(out.with_suffix(suffix) if suffix == ".gif" else out)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            written[-1].write_bytes(encoded)
        except OSError as error:
            raise ConfigError(f"--out={flags.out}: {words_of(error)}") from error
    names = " and ".join(map(str, written))
    weights = ", averaged weights" if model.averaged else ""
    print(f"{names}: {len(images)} image(s), {len(chosen)} mask(s), step {model.step}{weights}")


def image_paths(words: Sequence[str], kind: type[Files] = Files) -> Iterator[str]:
    """Yield the files that words of a command line stand for, in order; looks no further ahead.

    A word is a file, a folder (its images at any depth, by name), a pattern with `*`, `?` or `[]`,
    or several of them with commas between.

    Args:
      words: of the command line.
      kind: of the files of a folder that count.

    Raises:
      ConfigError: if a folder cannot be read.
    """
    for word in words:
        for part in [word] if os.path.exists(os.path.expanduser(word)) else word.split(","):
            path = os.path.expanduser(part)
            if os.path.isdir(path):
                yield from _images_below(path, kind)
            elif not os.path.exists(path) and glob.has_magic(path):
                yield from sorted(glob.glob(path)) or [path]
            else:
                yield path


def _images_below(folder: str, kind: type[Files]) -> Iterator[str]:
    """Yield images one by one: a folder may hold a million."""
    try:
        for name in scan(folder, kind):
            yield os.path.join(folder, name)
    except ConfigError as error:
        raise ConfigError(str(error).replace("data.path", "--images", 1)) from error


def read_images(model: api.Pretrained, paths: Iterator[str], limit: int) -> np.ndarray:
    """Return the first `limit` images that can be read, uint8 [B, H, W, C]; name the others.

    Raises:
      ConfigError: if there is none.
    """
    images: list[np.ndarray] = []
    tried = 0
    for path in paths:
        tried += 1
        try:
            images.append(model.prepare([path])[0])
        except BadExample as error:
            print(f"left out: {error}", file=sys.stderr)
        if len(images) == limit:
            break
    if not images:
        raise ConfigError(f"--images: expected images, got {tried} file(s) and none can be read")
    return np.stack(images)


def variants(
    model: api.Pretrained,
    masks: Sequence[str] | None,
    ratios: Sequence[float] | None,
    seeds: Sequence[int],
) -> list[Variant]:
    """Return every combination of samplings, ratios and seeds, and each mask of a file once.

    Args:
      model: what is not asked for is as in its training, if it has such a choice at all.
      masks: names of samplings and files; a file's name has a dot or a slash.
      ratios: shares to hide.
      seeds: of the draws.

    Raises:
      ConfigError: if a file is no mask.
    """
    chosen: dict[str, Variant] = {}
    trained = model.config.model
    basenames = [os.path.basename(mask) for mask in masks or ()]
    asked_masks: Sequence[str | None] = masks or [None]
    asked_ratios: Sequence[float | None] = ratios or [None]
    for mask in asked_masks:
        if mask is not None and ("." in mask or "/" in mask):
            basename = os.path.basename(mask)
            array = read_mask(mask, model.module.unit.grid_size)
            name = basename if basenames.count(basename) == 1 else mask
            chosen[mask] = Variant(f"{name} {100 * array.mean():.3g}%", {"mask": array})
            continue
        for ratio, seed in itertools.product(asked_ratios, seeds):
            name = mask or trained.get("mask_sampling", "random")
            share = trained.get("mask_ratio") if ratio is None else ratio
            percent = "" if share is None else f" {100 * share:g}%"
            caption = f"{name}{percent} seed {seed}"
            fields = {"sampling": mask, "mask_ratio": ratio, "seed": seed}
            chosen[caption] = Variant(caption, fields)
    return list(chosen.values())


def read_mask(path: str, grid_size: tuple[int, ...]) -> np.ndarray:
    """Return the mask that a file holds, 1 = hidden.

    An image is stretched over the picture as the model sees it, cropped and resized; white hides: a
    patch is hidden if at least half of it is, of a clip in all time slots. An array of 0 and 1 is
    taken as it is.

    Raises:
      ConfigError: if it cannot be read.
    """
    path = os.path.expanduser(path)
    try:
        if path.endswith(".npy"):
            array = np.load(path, allow_pickle=False)
            if array.dtype.kind not in "biuf":
                raise ValueError(f"got an array of {array.dtype}")
            return array
        with open(path, "rb") as file:
            grey = Decode(1, exif=True)(file.read())[..., 0]
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0]
        raise ConfigError(f"--mask={path}: expected an image or a .npy array, {reason}") from error
    white = Image.fromarray((grey >= WHITE).astype(np.float32))
    share = white.resize((grid_size[-1], grid_size[-2]), Image.Resampling.BOX)
    hidden = (np.asarray(share) > 0.5 - 1e-6).astype(np.uint8)  # half, but for rounding
    return np.broadcast_to(hidden, grid_size)


def compare(
    model: api.Pretrained, images: np.ndarray, chosen: Sequence[Variant]
) -> list[np.ndarray]:
    """Lay out images under masks, uint8 [height, width, 3]; clips as `pictures.draw` does.

    One mask gives the columns of `pictures/step_N.png`. Several give the original, and for each
    mask what is seen and what comes of it.

    Raises:
      ConfigError: if a mask does not fit the model.
    """
    captions = model.module.panel_captions()
    columns: dict[str, np.ndarray] = {}
    for variant in chosen:
        try:
            plan = model.plan(len(images), **variant.fields)
        except ConfigError as error:
            raise ConfigError(f"--mask: {variant.caption}: {error}") from error
        panels = model.panels(images, plan)
        if len(chosen) == 1:
            captions["masked"] = f"masked: {variant.caption}"
            return pictures.draw({caption: panels[name] for name, caption in captions.items()})
        columns[captions["original"]] = panels["original"]
        columns[variant.caption] = panels["masked"]
        columns[f"{captions['reconstruction']} + visible, {variant.caption}"] = panels["pasted"]
    return pictures.draw(columns)
