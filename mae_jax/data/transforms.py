"""Images on the host, uint8 [H, W, C] in and out: decode, crop, resize, flip.

Each transform is a small frozen dataclass called with the image and a `numpy.random.Generator`;
none keeps state. Pixels stay uint8: the network's input is normalised on the device.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mae_jax.errors import ConfigError

Transform = Callable[[np.ndarray, np.random.Generator], np.ndarray]
# Interpolation: one of Pillow's, or (image [H, W, C], (height, width)) -> image.
Resample = Image.Resampling | Callable[[np.ndarray, tuple[int, int]], np.ndarray]

MAX_PIXELS = 89_478_485  # Pillow's limit; Pillow itself only warns up to twice as many
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of Pillow, by number of channels


class BadExample(ValueError):
    """An example that cannot be used; the message is the reason. The loader replaces it."""


@dataclasses.dataclass(frozen=True)
class Decode:
    """Turn an encoded image, or an array, into uint8 [H, W, channels].

    Modes are converted as Pillow's `convert` does, so that RGB is what torchvision's image folder
    gives: alpha is dropped (the hidden colour shows), CMYK and palettes become RGB, grey is
    repeated; colour becomes grey by the ITU-R 601 weights. 16-bit grey is divided by 256, where
    `convert` would clip it. An array whose channels are not 1, 3 or 4 must have `channels` of them.

    Attributes:
      channels: 1 (grey), 3 (RGB), 4 (RGBA), or for arrays any number.
      exif: apply the rotation that the EXIF data of an encoded image ask for.
    """

    channels: int
    exif: bool = False

    def __call__(self, data: bytes | np.ndarray) -> np.ndarray:
        """Decode one image; see `read`."""
        return self.read(data)[0]

    def read(self, data: bytes | np.ndarray) -> tuple[np.ndarray, bool]:
        """Decode one image.

        Returns:
          The pixels, and whether it is a JPEG that `mae_jax.data.fast` had to leave to Pillow.

        Raises:
          BadExample: if the image is damaged, cut off, of another kind, or above `MAX_PIXELS`.
          ConfigError: if encoded images cannot have `channels` channels.
        """
        if isinstance(data, np.ndarray):
            return self._from_array(data), False
        if self.channels not in MODES:
            raise ConfigError(
                f"model.channels: expected 1, 3 or 4 with encoded images, got {self.channels}"
            )
        try:
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadExample(
                        f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}"
                    )
                return self._pixels(image, data)
        except BadExample:
            raise
        except UnidentifiedImageError as error:  # its message is the address of an object
            raise BadExample("not an image of a kind that Pillow knows") from error
        except Exception as error:  # a damaged file raises nearly anything, SyntaxError included
            raise BadExample(f"{type(error).__name__}: {error}") from error

    def _pixels(self, image: Image.Image, data: bytes) -> tuple[np.ndarray, bool]:
        """Return what `read` does; `image` is `data` opened."""
        del data
        return self._to_mode(ImageOps.exif_transpose(image) if self.exif else image), False

    def _to_mode(self, image: Image.Image) -> np.ndarray:
        mode = MODES[self.channels]
        if image.mode.startswith("I"):  # 16 bits, or 32 that hold 16
            grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) // 256
            image = Image.fromarray(grey.astype(np.uint8))
        elif image.mode == "F":
            raise BadExample("an image of floats has no known range")
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # the same colours, without Pillow's warning
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
        return pixels.reshape(image.height, image.width, self.channels)

    def _from_array(self, array: np.ndarray) -> np.ndarray:
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
            raise BadExample(f"expected uint8 [H, W, C], got {array.dtype} {list(array.shape)}")
        array = array.reshape(*array.shape[:2], -1)
        channels = array.shape[2]
        if channels == self.channels:
            return array
        if channels not in MODES or self.channels not in MODES:
            raise BadExample(f"expected {self.channels} channels, got {channels}")
        return self._to_mode(Image.fromarray(array[:, :, 0] if channels == 1 else array))


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """Cut a random box and resize it to `size`, as torchvision's transform of this name does.

    Ten boxes are tried: area uniform in `scale` x the image's, log of the aspect ratio uniform;
    then the largest central box with a ratio in `ratio` is taken. The box is cut first and resized
    by antialiased interpolation, so that pixels outside it do not count.

    Attributes:
      size: (height, width) of the result.
      scale: smallest and largest share of the image's area.
      ratio: smallest and largest width / height of the box.
      resample: interpolation.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    resample: Resample = Image.Resampling.BICUBIC

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Crop and resize one image [H, W, C]."""
        top, left, height, width = self.box(image.shape[0], image.shape[1], rng)
        box = image[top : top + height, left : left + width]
        return resize(box, self.size, self.resample)

    def box(
        self, image_height: int, image_width: int, rng: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """Draw (top, left, height, width) of a box that lies within the image."""
        for _ in range(10):
            height, width = self._sides(image_height * image_width, rng)
            if 0 < width <= image_width and 0 < height <= image_height:
                return _place(image_height, image_width, height, width, rng)
        width, height = image_width, image_height
        if width / height < self.ratio[0]:
            height = max(1, round(width / self.ratio[0]))
        elif width / height > self.ratio[1]:
            width = max(1, round(height * self.ratio[1]))
        return (image_height - height) // 2, (image_width - width) // 2, height, width

    def _sides(self, image_area: int, rng: np.random.Generator) -> tuple[int, int]:
        area = image_area * rng.uniform(*self.scale)
        ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
        return round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))


@dataclasses.dataclass(frozen=True)
class RandomResizedCropClamped(RandomResizedCrop):
    """Draw one box, whose sides are cut down to the image's, as MAE's linear probe does.

    Boxes that do not fit are not drawn again, so that large ones are as likely as `scale` says;
    those that are cut down have another area and ratio. A side is at least one pixel.

    Source: the released code of MAE's linear probe (main_linprobe.py).
    """

    def box(
        self, image_height: int, image_width: int, rng: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """Draw (top, left, height, width) of a box that lies within the image."""
        height, width = self._sides(image_height * image_width, rng)
        height, width = min(max(height, 1), image_height), min(max(width, 1), image_width)
        return _place(image_height, image_width, height, width, rng)


@dataclasses.dataclass(frozen=True)
class HorizontalFlip:
    """Mirror left and right with `probability`.

    Attributes:
      probability: in [0, 1].
      mirror: does it; None: a view is made, which is copied slowly when a batch is.
    """

    probability: float = 0.5
    mirror: Callable[[np.ndarray], np.ndarray] | None = None

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Flip one image [H, W, C], or not."""
        if rng.random() >= self.probability:
            return image
        return image[:, ::-1] if self.mirror is None else self.mirror(image)


@dataclasses.dataclass(frozen=True)
class CenterCrop:
    """Resize so that `size` is `fraction` of the image's shorter side, and cut the centre.

    For 224 and 0.875 the shorter side becomes 256, as in the evaluation of the MAE code
    (torchvision's Resize(256), bicubic, and CenterCrop(224), with the same rounding). Sizes that
    are not square cover `size` / `fraction` in both directions. An image that has the right size
    already is returned as it is if `fraction` is 1.

    Attributes:
      size: (height, width) of the result.
      fraction: in (0, 1].
      resample: interpolation.
    """

    size: tuple[int, int]
    fraction: float = 0.875
    resample: Resample = Image.Resampling.BICUBIC

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Resize and crop one image [H, W, C]; nothing is drawn from `rng`.

        Raises:
          BadExample: if the image is so long that it would have to be enlarged beyond `MAX_PIXELS`.
        """
        del rng
        image = resize_to_cover(image, self.size, self.fraction, self.resample)
        top = round((image.shape[0] - self.size[0]) / 2)
        left = round((image.shape[1] - self.size[1]) / 2)
        return image[top : top + self.size[0], left : left + self.size[1]]


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """Resize as `CenterCrop` does, and cut a box of `size` at a random place.

    All places within the resized image are equally likely. This is "crop, fixed size" of MAE's
    ablation (arXiv 2111.06377, table 1e).

    Attributes:
      size: (height, width) of the result.
      fraction: in (0, 1]; with 1, a square crop of a square image is the whole.
      resample: interpolation.
    """

    size: tuple[int, int]
    fraction: float = 0.875
    resample: Resample = Image.Resampling.BICUBIC

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Resize and crop one image [H, W, C].

        Raises:
          BadExample: as `CenterCrop`.
        """
        image = resize_to_cover(image, self.size, self.fraction, self.resample)
        top = int(rng.integers(image.shape[0] - self.size[0] + 1))
        left = int(rng.integers(image.shape[1] - self.size[1] + 1))
        return image[top : top + self.size[0], left : left + self.size[1]]


@dataclasses.dataclass(frozen=True)
class Compose:
    """Apply `steps` one after the other."""

    steps: tuple[Transform, ...]

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Transform one image [H, W, C]."""
        for step in self.steps:
            image = step(image, rng)
        return image


def train_transform(
    image_size: tuple[int, int],
    *,
    augment: str,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
    crop_fraction: float = 0.875,
    resample: Resample = Image.Resampling.BICUBIC,
    mirror: Callable[[np.ndarray], np.ndarray] | None = None,
    after: Transform | None = None,
) -> Compose:
    """Return the transform of training images.

    Args:
      image_size: (height, width).
      augment: "random_resized_crop"; "random_crop" for `RandomCrop`; "none" for the centre crop of
        `eval_transform`. They are the rows of table 1e (arXiv 2111.06377), where "none" has no flip
        either. "random_resized_crop_clamped" for `RandomResizedCropClamped`.
      crop_scale: see `RandomResizedCrop.scale`. The default is MAE's in pre-training (arXiv
        2111.06377, appendix A.1; main_pretrain.py), as is the flip.
      crop_ratio: see `RandomResizedCrop.ratio`.
      flip: mirror half of the images, whatever `augment` is; "none" mirrors too unless it is False.
      crop_fraction: see `CenterCrop.fraction`; only with "random_crop" and "none".
      resample: interpolation of the crop.
      mirror: see `HorizontalFlip.mirror`.
      after: what follows the flip, `RandAugment` for example.

    Raises:
      ConfigError: if `augment` is unknown, or a range empty or out of bounds.
    """
    check_boxes(crop_scale, crop_ratio)
    _check_fraction(crop_fraction)
    if augment == "random_resized_crop":
        crop: Transform = RandomResizedCrop(image_size, crop_scale, crop_ratio, resample)
    elif augment == "random_resized_crop_clamped":
        crop = RandomResizedCropClamped(image_size, crop_scale, crop_ratio, resample)
    elif augment == "random_crop":
        crop = RandomCrop(image_size, crop_fraction, resample)
    elif augment == "none":
        crop = CenterCrop(image_size, crop_fraction, resample)
    else:
        raise ConfigError(
            "data.augment: expected random_resized_crop, random_resized_crop_clamped, random_crop"
            f" or none, got {augment!r}"
        )
    steps = (crop, HorizontalFlip(mirror=mirror) if flip else None, after)
    return Compose(tuple(step for step in steps if step is not None))


def check_boxes(scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    """Refuse the ranges of `RandomResizedCrop` that are empty or out of bounds.

    Raises:
      ConfigError: naming `data.crop_scale` or `data.crop_ratio`.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ConfigError(f"data.crop_scale: expected 0 < least <= most <= 1, got {scale}")
    if not 0 < ratio[0] <= ratio[1]:
        raise ConfigError(f"data.crop_ratio: expected 0 < least <= most, got {ratio}")


def eval_transform(image_size: tuple[int, int], *, crop_fraction: float = 0.875) -> Compose:
    """Return the transform of evaluation images: `CenterCrop`, nothing random.

    Raises:
      ConfigError: if `crop_fraction` is out of bounds.
    """
    _check_fraction(crop_fraction)
    return Compose((CenterCrop(image_size, crop_fraction),))


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ConfigError(f"data.crop_fraction: expected in (0, 1], got {fraction}")


def _place(
    image_height: int, image_width: int, height: int, width: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw the place of a box: (top, left, height, width), all places equally likely."""
    top = int(rng.integers(image_height - height + 1))
    left = int(rng.integers(image_width - width + 1))
    return top, left, height, width


def resize_to_cover(
    image: np.ndarray,
    size: tuple[int, int],
    fraction: float = 1.0,
    resample: Resample = Image.Resampling.BICUBIC,
) -> np.ndarray:
    """Resize [H, W, C], keeping its proportions, to just cover `size` / `fraction`."""
    height, width = image.shape[:2]
    cover_height, cover_width = (int(side / fraction) for side in size)
    if cover_height * width >= cover_width * height:
        resized = cover_height, int(cover_height * width / height)
    else:
        resized = int(cover_width * height / width), cover_width
    if resized[0] * resized[1] > MAX_PIXELS:
        raise BadExample(f"{height} x {width} is too long and thin to crop a box")
    return resize(image, resized, resample)


def resize(
    image: np.ndarray,
    size: tuple[int, int],
    resample: Resample = Image.Resampling.BICUBIC,
) -> np.ndarray:
    """Resize [H, W, C] to (height, width), antialiased. Channels are independent.

    Pillow weights colours by alpha where the mode is RGBA; four channels here need not be that.
    """
    if not isinstance(resample, Image.Resampling):
        return resample(image, size)
    planes = [image] if image.shape[2] == 3 else image.transpose(2, 0, 1)
    resized = [
        np.asarray(Image.fromarray(plane).resize((size[1], size[0]), resample)) for plane in planes
    ]
    return resized[0] if image.shape[2] == 3 else np.stack(resized, axis=-1)
