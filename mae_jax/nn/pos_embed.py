"""Position tables."""

from __future__ import annotations

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


def resize_table(
    table: np.ndarray, old_grid: tuple[int, int], new_grid: tuple[int, int], prefix: int
) -> np.ndarray:
    """Return a position table for another grid, resized bicubically as PyTorch does.

    Args:
      table: float32 [1, c + h w, D], raster order.
      old_grid: (h, w).
      new_grid: (h', w').
      prefix: c, rows in front that stay as they are.

    Returns:
      float32 [1, c + h' w', D]; the table itself if the grids are the same.

    Raises:
      ConfigError: if the table is not one of the old grid.
    """
    count = old_grid[0] * old_grid[1]
    if table.ndim != 3 or table.shape[:2] != (1, prefix + count):
        raise ConfigError(
            f"pos_embed: expected [1, {prefix} + {count}, D] for the grid {old_grid[0]} x"
            f" {old_grid[1]}, got {list(table.shape)}"
        )
    if old_grid == new_grid:
        return table
    down, across = (bicubic_matrix(old, new) for old, new in zip(old_grid, new_grid, strict=True))
    grid = table[0, prefix:].astype(np.float64).reshape(*old_grid, -1)
    resized = np.einsum("ih,jw,hwd->ijd", down, across, grid, optimize=True)
    resized = resized.reshape(1, -1, table.shape[2]).astype(np.float32)
    return np.concatenate([table[:, :prefix], resized], axis=1)


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
