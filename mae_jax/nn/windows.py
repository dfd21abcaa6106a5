"""Grids cut into windows, without parameters."""

from __future__ import annotations

import jax


def partition(x: jax.Array, window: tuple[int, int]) -> jax.Array:
    """Cut a grid into windows side by side; `unpartition` is the inverse.

    Args:
      x: [B, H, W, D].
      window: (h, w), which divide H and W.

    Returns:
      [B, n, h w, D], n = (H / h) (W / w): windows in raster order, their tokens in raster order.

    Source: Swin Transformer, arXiv 2103.14030, section 3.2.
    """
    *_, rows, columns, d = x.shape
    h, w = window
    x = x.reshape(-1, rows // h, h, columns // w, w, d)
    return x.swapaxes(2, 3).reshape(-1, (rows // h) * (columns // w), h * w, d)


def unpartition(x: jax.Array, grid: tuple[int, int], window: tuple[int, int]) -> jax.Array:
    """Put windows [B, n, h w, D] together to a grid [B, H, W, D], the inverse of `partition`.

    Args:
      x: windows and their tokens in raster order.
      grid: (H, W).
      window: (h, w), which divide H and W.
    """
    (rows, columns), (h, w) = grid, window
    x = x.reshape(-1, rows // h, columns // w, h, w, x.shape[-1])
    return x.swapaxes(2, 3).reshape(-1, rows, columns, x.shape[-1])
