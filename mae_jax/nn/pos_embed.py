"""Position tables."""

from __future__ import annotations

import math

import numpy as np

from mae_jax.errors import ConfigError


def sincos_2d(embed_dim: int, grid_size: tuple[int, int]) -> np.ndarray:
    """Return the fixed table float32 [h * w, D] of a grid of h rows and w columns, raster order.

    The four quarters of a row are sin(column w), cos(column w), sin(row w), cos(row w) with
    frequencies w_k = 10000^(-k / (D/4)): the *column* comes first, positions are integers from 0,
    and the denominator is D/4 (not D/4 - 1). Computed in float64.

    Raises:
      ConfigError: if `embed_dim` is not a multiple of 4.

    Source: facebookresearch/mae `util/pos_embed.py`.
    """
    if embed_dim % 4:
        raise ConfigError(f"embed_dim {embed_dim} is not a multiple of 4 (sine-cosine positions)")
    frequencies = 10000.0 ** (-np.arange(embed_dim // 4, dtype=np.float64) / (embed_dim / 4))
    row, column = np.divmod(np.arange(grid_size[0] * grid_size[1]), grid_size[1])

    def half(position: np.ndarray) -> np.ndarray:
        angle = position[:, None] * frequencies[None, :]
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    return np.concatenate([half(column), half(row)], axis=1).astype(np.float32)


def sincos_1d(embed_dim: int, count: int, *, interleaved: bool) -> np.ndarray:
    """Return the fixed table float32 [T, D] of the places 0 ... T - 1 of a sequence.

    With frequencies w_k = 10000^(-2 k / D), values 2 k and 2 k + 1 of a row are the sine and the
    cosine of the angle w_k x place if they are interleaved; else the sines are the first half of
    the row, the cosines the second. Computed in float64.

    Args:
      embed_dim: D, an even number.
      count: T.
      interleaved: the order of VideoMAE; not: that of M3AE.

    Raises:
      ConfigError: if `embed_dim` is odd.

    Source: arXiv 1706.03762, section 3.5; MCG-NJU/VideoMAE `modeling_finetune.py`; for halves,
    young-geng/m3ae_public.
    """
    if embed_dim % 2:
        raise ConfigError(f"embed_dim {embed_dim} is odd (sine-cosine positions)")
    frequencies = 10000.0 ** (-np.arange(embed_dim // 2, dtype=np.float64) / (embed_dim / 2))
    angle = np.arange(count, dtype=np.float64)[:, None] * frequencies
    waves = np.stack([np.sin(angle), np.cos(angle)], axis=2 if interleaved else 1)
    return waves.reshape(count, embed_dim).astype(np.float32)


def resize_table(
    table: np.ndarray, old_grid: tuple[int, ...], new_grid: tuple[int, ...], prefix: int
) -> np.ndarray:
    """Return a position table for another grid, resized bicubically as PyTorch does.

    Of clips each time slot is resized by itself.

    Args:
      table: float32 [1, c + h w, D] or [1, c + t h w, D], raster order.
      old_grid: (h, w) or (t, h, w).
      new_grid: (h', w') or (t, h', w').
      prefix: c, rows in front that stay as they are.

    Returns:
      float32 [1, c + h' w', D] or [1, c + t h' w', D]; the table itself if the grids are the same.

    Raises:
      ConfigError: if the table is not one of the old grid, or the time slots are not as many.
    """
    count = math.prod(old_grid)
    if table.ndim != 3 or table.shape[:2] != (1, prefix + count):
        raise ConfigError(
            f"pos_embed: expected [1, {prefix} + {count}, D] for the grid"
            f" {' x '.join(map(str, old_grid))}, got {list(table.shape)}"
        )
    if old_grid == new_grid:
        return table
    if old_grid[:-2] != new_grid[:-2]:
        raise ConfigError(
            f"pos_embed: expected {' x '.join(map(str, old_grid[:-2])) or 'no'} time slots, for"
            f" which positions are learned, got {' x '.join(map(str, new_grid[:-2])) or 'none'};"
            " take model.positions fixed"
        )
    (rows, columns), width = new_grid[-2:], table.shape[2]
    slots = table[0, prefix:].reshape(-1, *old_grid[-2:], width)
    resized = [_resize(slot, (rows, columns)).reshape(1, -1, width) for slot in slots]
    return np.concatenate([table[:, :prefix], *resized], axis=1)


def resize_relative_table(table: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a table of relative positions for another window, resized as `resize_table` does.

    Args:
      table: float32 [2 h - 1, 2 w - 1, heads].
      size: (2 h' - 1, 2 w' - 1).

    Returns:
      float32 [2 h' - 1, 2 w' - 1, heads].

    Raises:
      ConfigError: if the table has another rank.
    """
    if table.ndim != 3:
        raise ConfigError(f"table: expected [2 h - 1, 2 w - 1, heads], got {list(table.shape)}")
    return _resize(table, size)


def _resize(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return [h, w, D] as float32 [h', w', D]."""
    down, across = (bicubic_matrix(*sides) for sides in zip(grid.shape[:2], size, strict=True))
    resized = np.einsum("ih,jw,hwd->ijd", down, across, grid.astype(np.float64), optimize=True)
    return resized.astype(np.float32)


def bicubic_matrix(old: int, new: int) -> np.ndarray:
    """Return float64 [new, old]: cubic interpolation of `old` samples at `new` places.

    Cubic convolution with a = -0.75, pixel centres at halves, the border repeated, no antialiasing,
    as `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)` has it; jax.image has
    a = -0.5.

    Source: R. Keys, "Cubic convolution interpolation for digital image processing", 1981.
    """
    a = -0.75
    place = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(place).astype(int) - 1
    matrix = np.zeros((new, old))
    for tap in range(4):
        x = np.abs(place - (first + tap))
        near = ((a + 2) * x - (a + 3)) * x**2 + 1
        far = ((x - 5) * x + 8) * a * x - 4 * a
        weight = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
        np.add.at(matrix, (np.arange(new), np.clip(first + tap, 0, old - 1)), weight)
    return matrix
