"""Grids of images with a caption over each column, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HIDDEN_GREY = 128
MIN_SIDE = 112
GAP = 4
FONT_SIZE = 12


def to_uint8(
    images: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    hidden: np.ndarray | None = None,
) -> np.ndarray:
    """Return normalised images as colours that can be shown.

    Args:
      images: float32 [B, H, W, C], normalised with `mean` and `std`.
      mean: of each channel, in [0, 1].
      std: of each channel.
      hidden: [B, H, W, 1], 1 where a pixel is painted grey; None: nowhere.

    Returns:
      uint8 [B, H, W, 3]; one channel becomes grey, of more than three the first three are shown.
    """
    pixels = np.asarray(images, np.float32) * np.asarray(std) + np.asarray(mean)
    # A model that has diverged draws NaN: black, and no warning.
    pixels = np.clip(np.rint(np.nan_to_num(pixels) * 255.0), 0, 255).astype(np.uint8)
    if pixels.shape[-1] < 3:
        pixels = np.repeat(pixels[..., :1], 3, axis=-1)
    pixels = pixels[..., :3]
    if hidden is not None:
        pixels = np.where(np.asarray(hidden) == 1, np.uint8(HIDDEN_GREY), pixels)
    return pixels


def grid(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Lay out columns of images under their captions.

    Args:
      columns: caption -> uint8 [B, H, W, 3], the same B, H, W for all. Small images are enlarged
        by a whole factor, without smoothing.

    Returns:
      uint8 [height, width, 3].
    """
    first = next(iter(columns.values()))
    count, height, width = first.shape[:3]
    factor = max(1, -(-MIN_SIDE // min(height, width)))
    height, width = height * factor, width * factor
    font = ImageFont.load_default(FONT_SIZE)
    captions = [_wrap(caption, font, width) for caption in columns]
    top = GAP + max(len(lines) for lines in captions) * (FONT_SIZE + 3)
    size = (GAP + len(columns) * (width + GAP), top + count * (height + GAP))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, (lines, images) in enumerate(zip(captions, columns.values(), strict=True)):
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
