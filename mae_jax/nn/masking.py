"""Choosing, gathering and putting back units. 1 = removed, 0 = seen, everywhere."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.errors import ConfigError
from mae_jax.types import MaskPlan

# Rectangles drawn for a block-wise mask. Enough for all of 2,000 masks at 95 % on grids of 8 x 8,
# 14 x 14, 16 x 16 and 6 x 16; if they do run out, units are hidden in raster order.
MAX_BLOCKS = 64


def keep_count(count: int, mask_ratio: float, name: str = "mask_ratio") -> int:
    """Return K = int(N (1 - r)), the floor of the floating-point product, as the official code.

    Args:
      count: N, the number of units.
      mask_ratio: r, the share to hide.
      name: of the ratio, for the message.

    Raises:
      ConfigError: if nothing would be kept or nothing hidden.
    """
    keep = int(count * (1 - mask_ratio))
    if not 0 < keep < count:
        raise ConfigError(
            f"{name} {mask_ratio} keeps {keep} of {count} units; at least one must be kept and"
            " one hidden"
        )
    return keep


def random_plan(
    rng: jax.Array, batch_size: int, count: int, keep: int, noise: jax.Array | None = None
) -> MaskPlan:
    """Hide units uniformly at random, one mask per image.

    Args:
      rng: key of the noise; not used when `noise` is given.
      batch_size: B.
      count: N, the units of an image.
      keep: K, how many units stay: those with the smallest noise, in the order of it.
      noise: float [B, N] to use in place of `rng`, so that a caller can fix the masks.

    Raises:
      ValueError: if `noise` has another shape.

    Source: MAE, arXiv 2111.06377, section 3; facebookresearch/mae `random_masking`.
    """
    if noise is None:
        noise = jax.random.uniform(rng, (batch_size, count))
    if noise.shape != (batch_size, count):
        raise ValueError(f"expected noise [{batch_size}, {count}], got {list(noise.shape)}")
    ids = jnp.argsort(noise, axis=1).astype(jnp.int32)
    return MaskPlan(ids_keep=ids[:, :keep], ids_mask=ids[:, keep:])


def hidden_count(count: int, mask_ratio: float, what: str = "units") -> int:
    """Return int(N r), the floor of the floating-point product, as VideoMAE's code has it.

    `keep_count` rounds the other way: of 196, at a ratio of 0.9, 176 are hidden here, 177 there.

    Args:
      count: N.
      mask_ratio: r, the share to hide.
      what: is counted, for the message.

    Raises:
      ConfigError: if nothing would be kept or nothing hidden.
    """
    hidden = int(count * mask_ratio)
    if not 0 < hidden < count:
        raise ConfigError(
            f"mask_ratio {mask_ratio} hides {hidden} of {count} {what}; at least one must be kept"
            " and one hidden"
        )
    return hidden


def check_plan(plan: MaskPlan, batch_size: int, count: int) -> None:
    """Refuse a plan of another grid or batch: gathers clip, so that it would not be noticed.

    Raises:
      ValueError: if `plan` is not of `count` units, in 1 or `batch_size` rows.
    """
    keep, hide = plan.ids_keep.shape, plan.ids_mask.shape
    if keep[0] != hide[0] or keep[0] not in (1, batch_size) or keep[1] + hide[1] != count:
        raise ValueError(
            f"expected a plan of {count} units in 1 or {batch_size} rows, got {keep[1]} kept and"
            f" {hide[1]} hidden ones in {keep[0]} and {hide[0]} rows"
        )


def take(units: jax.Array, ids: jax.Array) -> jax.Array:
    """Gather units [B, N, U] at `ids` [R, K], R = B or 1; returns [B, K, U]."""
    if ids.shape[0] == 1:
        return jnp.take(units, ids[0], axis=1, mode="clip")
    return jnp.take_along_axis(units, ids[..., None], axis=1, mode="clip")


def ids_restore(plan: MaskPlan) -> jax.Array:
    """Return int32 [R, N]: where each unit, in image order, stands in kept-then-hidden order."""
    return jnp.argsort(jnp.concatenate([plan.ids_keep, plan.ids_mask], axis=1), axis=1)


def restore(ordered: jax.Array, plan: MaskPlan) -> jax.Array:
    """Bring [B, N, U] from kept-then-hidden order back to image order."""
    return take(ordered, ids_restore(plan))


def mask_of(plan: MaskPlan) -> jax.Array:
    """Return the 0/1 mask float32 [R, N] in image order; 1 = removed."""
    removed = jnp.concatenate(
        [jnp.zeros(plan.ids_keep.shape), jnp.ones(plan.ids_mask.shape)], axis=1
    )
    return jnp.take_along_axis(removed, ids_restore(plan), axis=1)


def block_plan(rng: jax.Array, batch_size: int, grid_size: tuple[int, int], keep: int) -> MaskPlan:
    """Hide rectangles of units until exactly N - K are hidden, another set for each image.

    Rectangles have an area between 16 units (or less where less is to be hidden) and the number to
    hide, an aspect ratio between 0.3 and 1 / 0.3, both log-uniform for the ratio and uniform for
    the area as in BEiT, and lie anywhere in the grid. They are laid down one after the other; of
    the last one only as many rows are hidden as are needed. BEiT stops short of the number instead;
    ours is exact, so that all images have one shape.

    Args:
      rng: key.
      batch_size: B.
      grid_size: units (down, across).
      keep: K.

    Source: MAE, arXiv 2111.06377, section 4.1 and figure 6 (no official code); BEiT, arXiv
    2106.08254, algorithm 1.
    """
    rows, columns = grid_size
    hide = rows * columns - keep
    area_rng, aspect_rng, top_rng, left_rng = jax.random.split(rng, 4)
    shape = (batch_size, MAX_BLOCKS)
    area = jax.random.uniform(area_rng, shape, minval=min(16, hide), maxval=hide + 1)
    limit = math.log(0.3)
    aspect = jnp.exp(jax.random.uniform(aspect_rng, shape, minval=limit, maxval=-limit))
    height = jnp.clip(jnp.rint(jnp.sqrt(area * aspect)), 1, rows)
    width = jnp.clip(jnp.rint(jnp.sqrt(area / aspect)), 1, columns)
    top = jnp.floor(jax.random.uniform(top_rng, shape) * (rows - height + 1))
    left = jnp.floor(jax.random.uniform(left_rng, shape) * (columns - width + 1))

    def within(start: jax.Array, size: jax.Array, count: int) -> jax.Array:
        place = jnp.arange(count)[None, None]  # [1, 1, count]
        return (place >= start[..., None]) & (place < (start + size)[..., None])

    inside = within(top, height, rows)[..., :, None] & within(left, width, columns)[..., None, :]
    inside = inside.reshape(*shape, rows * columns)  # [B, T, N]
    # The first rectangle that covers a unit says when it is hidden; raster order within one.
    first = jnp.where(inside.any(axis=1), inside.argmax(axis=1), MAX_BLOCKS)
    ids = jnp.argsort(first, axis=1, stable=True).astype(jnp.int32)
    return MaskPlan(ids_keep=ids[:, hide:], ids_mask=ids[:, :hide])


def grid_plan(rng: jax.Array, batch_size: int, grid_size: tuple[int, int], keep: int) -> MaskPlan:
    """Keep units as regularly spread as the ratio allows: at 3/4 hidden, one of every 2 x 2.

    Units are kept in the order of an ordered-dither (Bayer) matrix, moved by a random offset for
    each image: 1/4 kept is a regular grid, 1/2 a checkerboard; others fill up evenly.

    Args:
      rng: key of the offset.
      batch_size: B.
      grid_size: units (down, across).
      keep: K.

    Source: MAE, arXiv 2111.06377, section 4.1 and figure 6 (no official code); the order is ours.
    """
    rows, columns = grid_size
    order = _bayer(max(rows, columns))
    side = len(order)
    offset = jax.random.randint(rng, (batch_size, 2), 0, side)
    row = (jnp.arange(rows)[None] + offset[:, :1]) % side  # [B, rows]
    column = (jnp.arange(columns)[None] + offset[:, 1:]) % side
    rank = jnp.asarray(order)[row[:, :, None], column[:, None, :]].reshape(batch_size, -1)
    ids = jnp.argsort(rank, axis=1).astype(jnp.int32)
    return MaskPlan(ids_keep=ids[:, :keep], ids_mask=ids[:, keep:])


def _bayer(least: int) -> np.ndarray:
    """Return the ordered-dither matrix whose side is the power of two at or above `least`."""
    order = np.zeros((1, 1), np.int32)
    while len(order) < least:
        order = np.block([[4 * order, 4 * order + 2], [4 * order + 3, 4 * order + 1]])
    return order


def tube_plan(
    rng: jax.Array,
    batch_size: int,
    grid_size: tuple[int, int, int],
    keep: int,
    noise: jax.Array | None = None,
) -> MaskPlan:
    """Hide the same places in all time slots of a clip, another set for each clip.

    Kept and hidden units are both in raster order.

    Args:
      rng: key of the noise; not used when `noise` is given.
      batch_size: B.
      grid_size: units (time, down, across).
      keep: places that stay, of each slot.
      noise: float [B, h w] to use in place of `rng`: the places with the smallest stay.

    Source: VideoMAE, arXiv 2203.12602, section 3.2; MCG-NJU/VideoMAE `masking_generator.py`.
    """
    slots, rows, columns = grid_size
    cells = rows * columns
    places = random_plan(rng, batch_size, cells, keep, noise)

    def everywhere(ids: jax.Array) -> jax.Array:
        starts = cells * jnp.arange(slots)[None, :, None]
        tubes = starts + jnp.sort(ids, axis=1)[:, None, :]  # [B, t, K / t]
        return tubes.reshape(len(ids), -1).astype(jnp.int32)

    return MaskPlan(everywhere(places.ids_keep), everywhere(places.ids_mask))


def frame_plan(
    rng: jax.Array,
    batch_size: int,
    grid_size: tuple[int, int, int],
    keep: int,
    noise: jax.Array | None = None,
) -> MaskPlan:
    """Hide whole time slots of a clip, another set for each clip.

    Kept and hidden units are both in raster order.

    Args:
      rng: key of the noise; not used when `noise` is given.
      batch_size: B.
      grid_size: units (time, down, across).
      keep: slots that stay.
      noise: float [B, t] to use in place of `rng`: the slots with the smallest stay.

    Source: VideoMAE, arXiv 2203.12602, section 4.2 (no official code).
    """
    slots, rows, columns = grid_size
    cells = rows * columns
    chosen = random_plan(rng, batch_size, slots, keep, noise)

    def whole(ids: jax.Array) -> jax.Array:
        starts = cells * jnp.sort(ids, axis=1)[:, :, None]
        frames = starts + jnp.arange(cells)[None, None]  # [B, K / (h w), h w]
        return frames.reshape(len(ids), -1).astype(jnp.int32)

    return MaskPlan(whole(chosen.ids_keep), whole(chosen.ids_mask))


def plan_of_mask(mask: np.ndarray) -> MaskPlan:
    """Return the plan of a caller's own mask.

    Args:
      mask: bool or 0/1 [R, N], in image order, 1 = removed; the same number of ones in each row.

    Raises:
      ConfigError: if a value is neither 0 nor 1, rows differ in their number of ones, or keep or
        hide nothing.
    """
    mask = np.asarray(mask)
    others = mask[(mask != 0) & (mask != 1)]
    if mask.ndim != 2 or others.size:
        raise ConfigError(
            f"mask: expected [R, N] of 0 and 1, got shape {list(mask.shape)}"
            + (f" with {others[0]}" if others.size else "")
        )
    mask = mask.astype(bool)
    hidden = mask.sum(axis=1)
    if len(set(hidden.tolist())) != 1:
        raise ConfigError(
            f"mask: expected [R, N] with equally many removed units in each row, got shape"
            f" {list(mask.shape)} with {sorted(set(hidden.tolist()))}"
        )
    keep = mask.shape[1] - int(hidden[0])
    if not 0 < keep < mask.shape[1]:
        raise ConfigError(f"mask: keeps {keep} of {mask.shape[1]} units")
    ids = jnp.asarray(np.argsort(mask, axis=1, kind="stable").astype(np.int32))
    return MaskPlan(ids_keep=ids[:, :keep], ids_mask=ids[:, keep:])


def uniform_plan(
    rng: jax.Array,
    batch_size: int,
    grid_size: tuple[int, int],
    secondary_ratio: float = 0.0,
    noise: jax.Array | None = None,
) -> MaskPlan:
    """Keep one unit of each 2 x 2 block, and of those replace a share by a learned token.

    The kept units are in the raster order of their blocks, the hidden ones in that of the image.

    Args:
      rng: key of the noise; not used when `noise` is given.
      batch_size: B.
      grid_size: units (down, across), both even.
      secondary_ratio: share s of the K kept units to replace; int(K (1 - s)) stay.
      noise: float [B, N] that decides instead of `rng`: the unit with the smallest noise of a block
        is kept, and of those the ones with the smallest stay. (The smallest value of four says
        nothing about which of the four has it, so one draw serves for both.)

    Raises:
      ConfigError: if the grid has no such blocks, or nothing would stay.
      ValueError: if `noise` has another shape.

    Source: UM-MAE, arXiv 2205.10063, section 3.2. The released sampler deals the four choices out
    of a shuffled pool, so that they are a little evener than independent.
    """
    keep, real = uniform_counts(grid_size, secondary_ratio)
    places, count = _block_places(grid_size), 4 * keep
    if noise is None:
        noise = jax.random.uniform(rng, (batch_size, count))
    if noise.shape != (batch_size, count):
        raise ValueError(f"expected noise [{batch_size}, {count}], got {list(noise.shape)}")
    of_block = noise[:, places]  # [B, K, 4]
    choice = of_block.argmin(axis=2)[..., None]
    ids_keep = jnp.take_along_axis(jnp.asarray(places)[None], choice, axis=2)[..., 0]
    kept = (choice == jnp.arange(4)[None, None]).reshape(batch_size, -1)
    # From block to image order: `places` is a permutation, and this its inverse.
    kept = kept[:, np.argsort(places.reshape(-1))]
    ids_mask = jnp.argsort(kept, axis=1, stable=True)[:, : count - keep]
    replaced = None
    if secondary_ratio:
        rank = jnp.argsort(jnp.argsort(of_block.min(axis=2), axis=1), axis=1)
        replaced = rank >= real
    return MaskPlan(ids_keep.astype(jnp.int32), ids_mask.astype(jnp.int32), replaced)


def uniform_counts(grid_size: tuple[int, int], secondary_ratio: float) -> tuple[int, int]:
    """Return how many units `uniform_plan` keeps, and how many of those are not replaced.

    Raises:
      ConfigError: if the grid has no 2 x 2 blocks, or nothing would stay.
    """
    keep = len(_block_places(grid_size))
    real = int(keep * (1 - secondary_ratio))
    if secondary_ratio < 0 or real < 1:
        raise ConfigError(
            f"secondary_ratio {secondary_ratio} leaves {real} of {keep} kept units; expected at"
            " least 0, and at least one unit left"
        )
    return keep, real


def uniform_plan_of_mask(mask: np.ndarray, grid_size: tuple[int, int]) -> MaskPlan:
    """Return the plan of a caller's own mask that keeps one unit of each 2 x 2 block.

    Args:
      mask: bool or 0/1 [R, N], in image order, 1 = removed.
      grid_size: units (down, across), both even.

    Raises:
      ConfigError: if it is no such mask.
    """
    plan_of_mask(mask)
    places = _block_places(grid_size)
    mask = np.asarray(mask).astype(bool)
    if mask.shape[1] != places.size:
        raise ConfigError(f"mask: expected [R, {places.size}], got shape {list(mask.shape)}")
    kept = 4 - mask[:, places].sum(axis=2)  # [R, K]
    if (kept != 1).any():
        row, block = np.argwhere(kept != 1)[0]
        down, across = divmod(int(block), grid_size[1] // 2)
        raise ConfigError(
            f"mask: expected one unit kept of each 2 x 2 block, got {kept[row, block]} in block"
            f" ({down}, {across}) of row {row}"
        )
    return uniform_plan(
        jax.random.key(0), len(mask), grid_size, noise=jnp.asarray(mask, jnp.float32)
    )


def replaced_of(plan: MaskPlan) -> jax.Array:
    """Return float32 [R, N] in image order, 1 where a unit is kept and a token stands for it."""
    kept = jnp.zeros(plan.ids_keep.shape) if plan.replaced is None else plan.replaced
    hidden = jnp.zeros(plan.ids_mask.shape)
    ordered = jnp.concatenate([kept.astype(jnp.float32), hidden], axis=1)
    return jnp.take_along_axis(ordered, ids_restore(plan), axis=1)


def _block_places(grid_size: tuple[int, int]) -> np.ndarray:
    """Return int [N / 4, 4], the units of each 2 x 2 block, blocks and units in raster order."""
    rows, columns = grid_size
    if rows % 2 or columns % 2:
        raise ConfigError(
            f"image_size: expected an even number of units down and across, to keep one of each"
            f" 2 x 2, got {rows} x {columns}"
        )
    ids = np.arange(rows * columns).reshape(rows // 2, 2, columns // 2, 2)
    return ids.swapaxes(1, 2).reshape(-1, 4)
