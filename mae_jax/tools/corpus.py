"""JPEGs of ImageNet's kind to measure with, made of the photographs that packages carry."""

from __future__ import annotations

import tempfile

import numpy as np
from etils import epath
from PIL import Image

from mae_jax.data.sources import photos
from mae_jax.files import completed

# Of scenes and things; microscope and telescope have another grain.
PHOTOGRAPHS = (
    "china.jpg",
    "flower.jpg",
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
)
SIDES = (500, 375)
UPRIGHT = 0.2  # share of the images
SHARE = (0.45, 1.0)  # of the area of the largest box that fits into the photograph
BRIGHTNESS = (0.8, 1.2)
NOISE = 4.0  # standard deviation, of 255: a sensor's, which resizing takes away
QUALITY = 94


def make(folder: str | None, images: int) -> str:
    """Return a folder of JPEGs, which is made if it is not there: 500 x 375, chroma halved (4:2:0).

    They are random boxes of photographs, some upright, some mirrored, brighter or darker, with
    noise. The first ones are the same for any number.

    Args:
      folder: below which it is; None: that of temporary files.
      images: how many.

    Raises:
      ConfigError: if it cannot be written, or the packages with the photographs are not there.
    """
    name = f"mae_jax-corpus-{images}"
    path = epath.Path(folder or tempfile.gettempdir()).expanduser() / name
    if not path.exists():
        known = photos.make("train").photographs | photos.make("val").photographs
        originals = [Image.fromarray(known[one]) for one in PHOTOGRAPHS]
        with completed(path, field="--corpus") as temporary:
            temporary.mkdir()
            for number in range(images):
                image = _view(originals[number % len(originals)], np.random.default_rng(number))
                file = temporary / f"{number:06d}.jpg"
                with file.open("wb") as stream:
                    image.save(stream, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return str(path)


def _view(photograph: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return a random view of a photograph."""
    width, height = SIDES[::-1] if rng.random() < UPRIGHT else SIDES
    scale = min(photograph.width / width, photograph.height / height)
    scale *= np.sqrt(rng.uniform(*SHARE))
    left = rng.uniform(0, photograph.width - width * scale)
    top = rng.uniform(0, photograph.height - height * scale)
    box = (left, top, left + width * scale, top + height * scale)
    image = photograph.resize((width, height), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(image, np.float32) * rng.uniform(*BRIGHTNESS)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    pixels = pixels + rng.normal(0, NOISE, (height, width, 1))
    return Image.fromarray(np.clip(pixels.round(), 0, 255).astype(np.uint8))
