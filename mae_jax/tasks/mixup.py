"""Mixup and CutMix on the device, with the soft targets that go with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from mae_jax.errors import ConfigError
from mae_jax.tasks.erasing import inside_box


class Mixture(flax.struct.PyTreeNode):
    """How each image is mixed with its partner; equal for all of a group.

    Attributes:
      share: float32 [B], 0 ... 1, of the image itself in the mixture and in its target (lambda).
      box: int32 [B, 4], first and end row, first and end column, which come from the partner
        (CutMix); empty where all pixels are averages (mixup).
    """

    share: jax.Array
    box: jax.Array


@dataclasses.dataclass(frozen=True)
class Mixup:
    """Mix each image with its partner: the image at the mirrored place of its group.

    All images of a group are mixed in one way, drawn for the group. `group_size` is thereby what
    the batch of a device is in the official code, and results do not depend on the devices. A group
    depends on its own key, images and labels alone.

    Attributes:
      num_classes: K.
      group_size: images of a group, an even number that divides the batch.
      mixup_alpha: parameter of the Beta distribution of mixup's share; 0: always CutMix.
      cutmix_alpha: that of CutMix, before the box is cut off at the image's edge; 0: always mixup.
      mixup_switch_probability: of CutMix, where both are possible.
      mixup_probability: that a group is mixed at all.
      label_smoothing: share of the target that is spread evenly over all classes.

    Source: mixup, arXiv 1710.09412; CutMix, arXiv 1905.04899; as timm 0.3.2 does them
    (timm/data/mixup.py, mode "batch") with the values of the official fine-tuning of MAE.
    """

    num_classes: int
    group_size: int
    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0
    mixup_switch_probability: float = 0.5
    mixup_probability: float = 1.0
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
          ConfigError: if one is out of range, or neither kind of mixing is wanted.
        """
        if self.group_size < 2 or self.group_size % 2:
            raise ConfigError(f"data.mixup_group {self.group_size}: expected an even number")
        if min(self.mixup_alpha, self.cutmix_alpha) < 0 or not self.mixup_alpha + self.cutmix_alpha:
            raise ConfigError(
                f"data.mixup_alpha {self.mixup_alpha}, data.cutmix_alpha {self.cutmix_alpha}:"
                " expected at least 0, and one of them above"
            )
        for name in ("mixup_switch_probability", "mixup_probability", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"data.{name} {getattr(self, name)}: expected 0 ... 1")

    def draw(self, rng: jax.Array, batch_size: int, image_size: tuple[int, int]) -> Mixture:
        """Draw how B images of (height, width) are mixed.

        Raises:
          ConfigError: if the groups do not fill the batch.
        """
        self.check(batch_size)
        rngs = jax.random.split(rng, batch_size // self.group_size)
        drawn = jax.vmap(lambda rng: self._draw_group(rng, image_size))(rngs)
        return jax.tree.map(lambda group: jnp.repeat(group, self.group_size, axis=0), drawn)

    def partners(self, rows: jax.Array) -> jax.Array:
        """Return an array [B, ...] with each row replaced by its partner's.

        Raises:
          ConfigError: if the groups do not fill the batch.
        """
        self.check(len(rows))
        groups = rows.reshape(-1, self.group_size, *rows.shape[1:])
        return groups[:, ::-1].reshape(rows.shape)

    def mix(
        self,
        images: jax.Array,
        labels: jax.Array,
        partner_images: jax.Array,
        partner_labels: jax.Array,
        mixture: Mixture,
    ) -> tuple[jax.Array, jax.Array]:
        """Mix images with their partners, row for row: a batch, or any rows of one.

        Args:
          images: float32 [B, H, W, C], or [B, F, H, W, C], normalised.
          labels: int32 [B], 0 ... K - 1.
          partner_images: like `images`.
          partner_labels: like `labels`.
          mixture: rows of what `draw` returned.

        Returns:
          The images, mixed, and targets float32 [B, K] whose rows sum to 1.
        """
        inside = inside_box(mixture.box, images.shape)
        # A box that is not empty is CutMix: outside of it, the image stays as it is.
        axes = tuple(range(1, images.ndim))
        share = jnp.expand_dims(mixture.share, axes)
        outside_share = jnp.where(inside.any(axis=axes, keepdims=True), 1.0, share)
        weight = jnp.where(inside, 0.0, outside_share)  # [B, ..., H, W, 1]
        mixed = weight * images + (1 - weight) * partner_images
        targets, partner_targets = (
            smooth_targets(x, self.num_classes, self.label_smoothing)
            for x in (labels, partner_labels)
        )
        share = mixture.share[:, None]
        return mixed, share * targets + (1 - share) * partner_targets

    def check(self, batch_size: int) -> None:
        """Refuse batches that groups do not fill.

        Raises:
          ConfigError: names both numbers.
        """
        if batch_size % self.group_size:
            raise ConfigError(
                f"data.mixup_group {self.group_size}: expected a number that divides batch_size,"
                f" which is {batch_size}"
            )

    def _draw_group(self, rng: jax.Array, image_size: tuple[int, int]) -> Mixture:
        uniform_rng, share_rng = jax.random.split(rng)
        # One draw for all, and one share: what takes time here is compiling the generators.
        mix_draw, switch_draw, *middle = jax.random.uniform(uniform_rng, (4,))
        switch = self.mixup_switch_probability if self.mixup_alpha and self.cutmix_alpha else 1.0
        cut = (switch_draw < switch) & (self.cutmix_alpha > 0)
        alpha = jnp.where(cut, self.cutmix_alpha, self.mixup_alpha)
        share = jax.random.beta(share_rng, alpha, alpha)
        mixed = mix_draw < self.mixup_probability
        share = jnp.where(mixed, share, 1.0)
        box = jnp.where(mixed & cut, _box(share, middle, image_size), 0)
        return Mixture(share=jnp.where(cut, share_outside(box, image_size), share), box=box)


def smooth_targets(labels: jax.Array, num_classes: int, label_smoothing: float) -> jax.Array:
    """Return targets float32 [B, K]: 1 - s + s / K at the label, s / K elsewhere.

    Args:
      labels: int32 [B], 0 ... K - 1.
      num_classes: K.
      label_smoothing: s.
    """
    off = label_smoothing / num_classes
    return jax.nn.one_hot(labels, num_classes, dtype=jnp.float32) * (1 - label_smoothing) + off


def share_outside(box: jax.Array, image_size: tuple[int, int]) -> jax.Array:
    """Return float32, the share of the image's pixels that lie outside of the box int32 [4]."""
    top, bottom, left, right = box
    pixels = image_size[0] * image_size[1]
    return (pixels - (bottom - top) * (right - left)) / jnp.float32(pixels)


def _box(share: jax.Array, middle: Sequence[jax.Array], image_size: tuple[int, int]) -> jax.Array:
    """Return a box int32 [4] of sqrt(1 - share) x each side, cut off at the image's edge.

    Args:
      share: float32, what the box would leave if it were not cut off.
      middle: where the box's middle is, down and across, in [0, 1) of the image.
      image_size: (height, width).
    """
    edges = []
    for size, place in zip(image_size, middle, strict=True):
        half = jnp.floor(size * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
        pixel = jnp.floor(size * place).astype(jnp.int32)
        edges += [jnp.maximum(pixel - half, 0), jnp.minimum(pixel + half, size)]
    return jnp.stack(edges)
