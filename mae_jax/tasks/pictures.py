"""Grids of images with a caption over each column, and strips of clips, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HIDDEN_GREY, HIDDEN_DARK = 128, 48
MIN_SIDE = 112
GAP = 4
FONT_SIZE = 12
STRIP_FRAMES = 8  # of a clip that a strip shows


def to_uint8(
    images: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    hidden: np.ndarray | None = None,
) -> np.ndarray:
    """Return normalised images as colours that can be shown.

    Args:
      images: float32 [..., H, W, C], normalised with `mean` and `std`.
      mean: of each channel, in [0, 1].
      std: of each channel.
      hidden: [..., H, W, 1], 1 where a pixel is painted grey, 2 where dark; None: nowhere.

    Returns:
      uint8 [..., H, W, 3]; one channel becomes grey, of more than three the first three are shown.
    """
    pixels = np.asarray(images, np.float32) * np.asarray(std) + np.asarray(mean)
    # A model that has diverged draws NaN: black, and no warning.
    pixels = np.clip(np.rint(np.nan_to_num(pixels) * 255.0), 0, 255).astype(np.uint8)
    if pixels.shape[-1] < 3:
        pixels = np.repeat(pixels[..., :1], 3, axis=-1)
    pixels = pixels[..., :3]
    if hidden is not None:
        pixels = np.where(np.asarray(hidden) == 1, np.uint8(HIDDEN_GREY), pixels)
        pixels = np.where(np.asarray(hidden) == 2, np.uint8(HIDDEN_DARK), pixels)
    return pixels


def draw(columns: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Return the pictures of panels under their captions: a grid of images, or strip and film.

    Args:
      columns: caption -> uint8 [B, H, W, 3], or [B, F, H, W, 3] where they are of clips.

    Returns:
      uint8 [height, width, 3]; of clips a second one as well, a film uint8 [F, height, width, 3].
    """
    first = next(iter(columns.values()))
    if first.ndim == 4:
        return [grid(columns)]
    frames = range(first.shape[1])
    film = [grid({caption: clips[:, f] for caption, clips in columns.items()}) for f in frames]
    return [strip(columns), np.stack(film)]


def strip(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """Lay out clips: for each one a row of frames under each caption.

    Args:
      rows: caption -> uint8 [B, F, H, W, 3]. Of more than `STRIP_FRAMES` frames, evenly spaced ones
        are shown.

    Returns:
      uint8 [height, width, 3].
    """
    count = next(iter(rows.values())).shape[1]
    shown = np.arange(min(count, STRIP_FRAMES)) * count // min(count, STRIP_FRAMES)
    line = FONT_SIZE + 3
    bands = []
    for clips in zip(*rows.values(), strict=True):
        for caption, clip in zip(rows, clips, strict=True):
            # Each frame as a column of its own, without a caption: the band has one over all.
            band = grid({str(f): clip[f][None] for f in shown}, captions=False)
            label = Image.new("RGB", (band.shape[1], line), "white")
            ImageDraw.Draw(label).text(
                (GAP, 0), caption, fill="black", font=ImageFont.load_default(FONT_SIZE)
            )
            bands += [np.asarray(label), band]
    return np.concatenate(bands)


def grid(columns: Mapping[str, np.ndarray], *, captions: bool = True) -> np.ndarray:
    """Lay out columns of images under their captions.

    Args:
      columns: caption -> uint8 [B, H, W, 3], the same B, H, W for all. Small images are enlarged
        by a whole factor, without smoothing.
      captions: draw them.

    Returns:
      uint8 [height, width, 3].
    """
    first = next(iter(columns.values()))
    count, height, width = first.shape[:3]
    factor = max(1, -(-MIN_SIDE // min(height, width)))
    height, width = height * factor, width * factor
    font = ImageFont.load_default(FONT_SIZE)
    texts = [_wrap(caption, font, width) if captions else [] for caption in columns]
    top = GAP + max(len(lines) for lines in texts) * (FONT_SIZE + 3)
    size = (GAP + len(columns) * (width + GAP), top + count * (height + GAP))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, (lines, images) in enumerate(zip(texts, columns.values(), strict=True)):
        left = GAP + column * (width + GAP)
        for number, line in enumerate(lines):
            draw.text((left, GAP // 2 + number * (FONT_SIZE + 3)), line, fill="black", font=font)
        for row, image in enumerate(images):
            enlarged = image.repeat(factor, axis=0).repeat(factor, axis=1)
            canvas.paste(Image.fromarray(enlarged), (left, top + row * (height + GAP)))
    return np.asarray(canvas)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break a caption at spaces so that each line fits, as far as its words do."""
    lines: list[str] = []
    for word in text.split(" "):
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
