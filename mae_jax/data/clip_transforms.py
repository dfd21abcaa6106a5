"""Clips on the host, uint8 [F, H, W, C] in: what is drawn for a clip holds for all its frames.

The transforms of images (`mae_jax.data.transforms`, `mae_jax.data.augment`) serve for frames, each
of which gets a generator in the same state. Interpolation is bilinear, antialiased.

Source: MCG-NJU/VideoMAE, whose augmentations are those of TSN (multi-scale crop) in pre-training
and of SlowFast in fine-tuning and testing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from PIL import Image

from mae_jax.data.transforms import Transform, resize, resize_to_cover

# uint8 [F, H, W, C] -> views, uint8 [V, F, h, w, C].
ClipTransform = Callable[[np.ndarray, np.random.Generator], np.ndarray]

BILINEAR = Image.Resampling.BILINEAR

SCALES = (1.0, 0.875, 0.75, 0.66)  # sides of `MultiScaleCrop`, in shorter sides of the frame
# Its places: down and right in quarters of what is free. Corners, centre, middles of the sides, and
# the centres of the quarters.
PLACES = (
    *((0, 0), (0, 4), (4, 0), (4, 4), (2, 2)),
    *((2, 0), (2, 4), (4, 2), (0, 2)),
    *((1, 1), (1, 3), (3, 1), (3, 3)),
)


@dataclasses.dataclass(frozen=True)
class MultiScaleCrop:
    """Cut a box of one of a few sizes at one of 13 places of an image, and resize it to `size`.

    Height and width of the box are of `SCALES`, the same one or neighbours: ten shapes, equally
    likely. A side that differs from that of `size` by less than three pixels becomes it.

    Attributes:
      size: (height, width) of the result.
    """

    size: tuple[int, int]

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Crop and resize one image [H, W, C]."""
        top, left, height, width = self.box(image.shape[0], image.shape[1], rng)
        return resize(image[top : top + height, left : left + width], self.size, BILINEAR)

    def box(
        self, image_height: int, image_width: int, rng: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """Draw (top, left, height, width) of a box that lies within the image."""
        shorter = min(image_height, image_width)
        sides = [max(1, int(shorter * scale)) for scale in SCALES]
        heights, widths = (
            [wanted if abs(side - wanted) < 3 and wanted <= shorter else side for side in sides]
            for wanted in self.size
        )
        shapes = [
            (height, width)
            for i, height in enumerate(heights)
            for j, width in enumerate(widths)
            if abs(i - j) <= 1
        ]
        height, width = shapes[rng.integers(len(shapes))]
        down, right = PLACES[rng.integers(len(PLACES))]
        top, left = (image_height - height) // 4 * down, (image_width - width) // 4 * right
        return top, left, height, width


@dataclasses.dataclass(frozen=True)
class EachFrame:
    """Transform a clip `views` times, each time all its frames with the same draws.

    Attributes:
      transform: of an image; what it draws must depend on the image's shape alone.
      views: how often; above 1, repeated augmentation (arXiv 1901.09335).
    """

    transform: Transform
    views: int = 1

    def __call__(self, clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the views [V, F, h, w, C] of a clip [F, H, W, C]."""
        seeds = rng.integers(2**63, size=self.views)
        return np.stack(
            [
                np.stack([self.transform(frame, np.random.default_rng(seed)) for frame in clip])
                for seed in seeds
            ]
        )


@dataclasses.dataclass(frozen=True)
class SpacedCrops:
    """Resize a clip to just cover `size`, and cut boxes at even distances along the longer side.

    Attributes:
      size: (height, width) of the result.
      crops: number of boxes, from end to end; 1: the centre.
    """

    size: tuple[int, int]
    crops: int = 1

    def __call__(self, clip: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Return the boxes [crops, F, h, w, C] of a clip [F, H, W, C]; nothing is drawn.

        Raises:
          BadExample: if the frames are so long that they would have to be enlarged beyond
            `MAX_PIXELS`.
        """
        del rng
        height, width = self.size
        clip = np.stack([resize_to_cover(frame, self.size, resample=BILINEAR) for frame in clip])
        free = np.array(clip.shape[1:3]) - self.size
        if self.crops == 1:
            places = [np.round(free / 2).astype(int)]  # as `CenterCrop`
        else:
            places = [k * free // (self.crops - 1) for k in range(self.crops)]
        return np.stack([clip[:, top : top + height, left : left + width] for top, left in places])
