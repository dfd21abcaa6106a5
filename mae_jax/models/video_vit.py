"""The vision transformer of clips: joint attention of cubes over space and time."""

from __future__ import annotations

import math

import flax.linen as nn
import numpy as np

from mae_jax.models.vit import ViTEncoder
from mae_jax.nn.layers import TORCH_DEFAULT, Initializer
from mae_jax.nn.pos_embed import sincos_1d


def cube_table(embed_dim: int, grid_size: tuple[int, ...]) -> np.ndarray:
    """Return the fixed positions float32 [N, D] of a grid of cubes (time, down, across).

    One-dimensional: a cube's position is its number in raster order, and nothing tells time from
    space. So the table of another number of frames begins as this one, and that of another width or
    height has the places of a slot elsewhere.

    Source: MCG-NJU/VideoMAE `get_sinusoid_encoding_table`.
    """
    return sincos_1d(embed_dim, math.prod(grid_size), interleaved=True)


class VideoViTEncoder(ViTEncoder):
    """A ViT of cubes, without a class token and without biases of keys.

    Fixed positions are made anew for other frames and sizes; the official fine-tuning keeps them
    fixed. Learned ones, which start as those, can be resized in space alone.

    Source: VideoMAE, arXiv 2203.12602, section 3.2; MCG-NJU/VideoMAE `modeling_finetune.py`.
    """

    use_cls_token: bool = False
    qkv_bias: str = "query_value"
    embed_init: Initializer = TORCH_DEFAULT

    classifier_positions = "fixed"

    @nn.nowrap
    def fixed_table(self) -> np.ndarray:
        """Return float32 [1, c + N, D], with zeros for a class token."""
        table = cube_table(self.embed_dim, self.grid_size)
        return np.pad(table, ((int(self.use_cls_token), 0), (0, 0)))[None]
