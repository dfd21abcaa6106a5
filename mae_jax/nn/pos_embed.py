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
