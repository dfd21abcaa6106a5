"""Pyramids of four stages over the units that are seen: what Swin and PVT have in common."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.errors import ConfigError
from mae_jax.models.encoder import Encoder
from mae_jax.nn.attention import AttentionFn
from mae_jax.nn.blocks import TransformerBlock
from mae_jax.nn.layers import NORMAL_002, Dtype, layer_norm, linear
from mae_jax.nn.merging import ConvDownsample
from mae_jax.nn.patches import subdivide, to_grid

# Stem patches down and across in a unit.
UNIT_SIDE = 4
# Of the blocks and what is in them; stem, downsampling and final norm have the usual one.
BLOCK_EPSILON = 1e-5


class PyramidEncoder(Encoder):
    """Embed the units' stem patches as a grid of tokens and run the stages, each at half the side.

    All units make the full grid. One unit of each 2 x 2 block, given in the order of the blocks,
    make a compact grid of half the height and width, where the unit of block (i, j) is at (i, j);
    there `reach` halves what attention spans, so that it spans as many units' worth of picture.

    Parameters: `patch_embed`, `patch_norm` with a normed stem, `block_00` ..., `downsample_1` ...,
    `norm`, and where used `mask_token` [1, 1, D].

    Attributes:
      grid_size: units (down, across); indices count in raster order.
      channels: of the image.
      embed_dim: width of the first stage; see `growth`.
      stage_depths: blocks of each stage.
      num_heads: attention heads of the first stage.
      drop_path_rate: of the last block; grows linearly from 0 at the first.
      final_norm: norm the tokens at the end.

    Source: UM-MAE, arXiv 2205.10063, section 3; implus/UM-MAE.
    """

    grid_size: tuple[int, int]
    channels: int
    embed_dim: int
    stage_depths: tuple[int, ...]
    num_heads: int
    positions: str = "none"
    drop_path_rate: float = 0.0
    final_norm: bool = True
    dtype: Dtype = jnp.float32
    attention: AttentionFn = jax.nn.dot_product_attention
    remat: str = "none"

    # Width and heads of each stage, over those of the first.
    growth = (1, 2, 4, 8)
    # Whether the stem and the downsampling have a norm.
    stem_norm = False

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each stage."""
        return self.stage_depths

    @property
    def output_dim(self) -> int:
        """D, the width of the tokens that come out."""
        return self.width(-1)

    @property
    def token_grid(self) -> tuple[int, int]:
        """Stem patches (down, across) of all units."""
        return self.grid_size[0] * UNIT_SIDE, self.grid_size[1] * UNIT_SIDE

    @nn.nowrap
    def width(self, stage: int) -> int:
        """Return the width of a stage's tokens."""
        return self.embed_dim * self.growth[stage]

    @nn.nowrap
    def heads(self, stage: int) -> int:
        """Return the attention heads of a stage."""
        return self.num_heads * self.growth[stage]

    @nn.nowrap
    def is_full(self, units: int) -> bool:
        """Return whether `units` are all units, and not one of each 2 x 2.

        Raises:
          ConfigError: if they are neither.
        """
        rows, columns = self.grid_size
        if units == rows * columns:
            return True
        if rows % 2 or columns % 2 or 4 * units != rows * columns:
            raise ConfigError(
                f"expected all of {rows} x {columns} units, or one of each 2 x 2, got {units}"
            )
        return False

    @nn.nowrap
    def reach(self, span: int, full: bool) -> int:
        """Return how many tokens attention spans in a grid, of `span` in the full one."""
        return span if full else max(1, span // 2)

    @nn.nowrap
    def stage_grids(self, units: int) -> list[tuple[int, int]]:
        """Return the grid of tokens (down, across) of each stage.

        Raises:
          ConfigError: if a grid cannot be halved.
        """
        part = 1 if self.is_full(units) else 2
        rows, columns = self.token_grid[0] // part, self.token_grid[1] // part
        steps = 2 ** (len(self.stage_depths) - 1)
        if rows % steps or columns % steps:
            raise ConfigError(
                f"image_size: a grid of {rows} x {columns} stem patches cannot be halved"
                f" {len(self.stage_depths) - 1} times; expected a multiple of"
                f" {part * steps // math.gcd(part * steps, UNIT_SIDE)} units down and across"
            )
        return [(rows // 2**i, columns // 2**i) for i in range(len(self.stage_depths))]

    @nn.nowrap
    def check(self, units: int) -> None:
        """Refuse what could not be run with `units` units.

        Raises:
          ConfigError: says why.
        """
        self.stage_grids(units)

    @nn.compact
    def __call__(
        self,
        units: jax.Array,
        ids: jax.Array,
        *,
        replaced: jax.Array | None = None,
        drop_path_rng: jax.Array | None = None,
    ) -> jax.Array:
        """Encode the units that are to be seen.

        Args:
          units: [B, K, U], all in raster order, or one of each 2 x 2 in the order of the blocks.
          ids: int [R, K] their places in the grid, R = B or 1.
          replaced: bool [R, K], where the embedding of a unit gives way to a learned token, its
            place staying; None: nowhere, and there is no such token.
          drop_path_rng: key of drop path; None: none (evaluation).

        Returns:
          [B, T, D] in `dtype`, the last stage's grid in raster order.

        Raises:
          ConfigError: if the grid of units does not suit the stages.
        """
        self.check(units.shape[1])
        full = self.is_full(units.shape[1])
        grid = self.grid_size if full else (self.grid_size[0] // 2, self.grid_size[1] // 2)
        x = to_grid(self._embed(units, replaced), grid)
        places = self._places(ids, grid)
        x = self._add_positions(x, places)
        i = 0
        for stage, depth in enumerate(self.stage_depths):
            if stage:
                x = ConvDownsample(
                    self.width(stage),
                    use_norm=self.stem_norm,
                    dtype=self.dtype,
                    name=f"downsample_{stage}",
                )(x)
                places = places[:, ::2, ::2] / 2
            fields = self._block_fields(stage, full)
            for j in range(depth):
                rate, rng = self.drop_path(i, drop_path_rng)
                block = self.block(i, rate, self.heads(stage), epsilon=BLOCK_EPSILON, **fields)
                x = self._run(block, x, places, full, shifted=j % 2 == 1, rng=rng)
                i += 1
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        return layer_norm(self.dtype, "norm")(x) if self.final_norm else x

    def _embed(self, units: jax.Array, replaced: jax.Array | None) -> jax.Array:
        """Embed units [B, K, U] as tokens [B, K, 4, 4, E]."""
        x = subdivide(units, UNIT_SIDE, self.channels)
        x = linear(self.embed_dim, self.dtype, "patch_embed")(x)
        norm = layer_norm(self.dtype, "patch_norm") if self.stem_norm else None
        x = x if norm is None else norm(x)
        if replaced is None:
            return x
        token = self.param("mask_token", NORMAL_002, (1, 1, self.embed_dim))
        token = (token if norm is None else norm(token)).astype(self.dtype)
        return jnp.where(replaced[..., None, None, None], token[:, :, None, None], x)

    def _places(self, ids: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Return float32 [R, H, W, 2], (row, column) of each token in the full grid of tokens."""
        columns = self.grid_size[1]
        corner = jnp.stack([ids // columns, ids % columns], axis=-1) * UNIT_SIDE  # [R, K, 2]
        within = jnp.stack(jnp.meshgrid(*[jnp.arange(UNIT_SIDE)] * 2, indexing="ij"), axis=-1)
        places = corner[:, :, None, None] + within[None, None]
        return to_grid(places, grid).astype(jnp.float32)

    def _add_positions(self, x: jax.Array, places: jax.Array) -> jax.Array:
        """Return tokens [B, H, W, E] with what they are told of their places [R, H, W, 2]."""
        raise NotImplementedError

    @nn.nowrap
    def _block_fields(self, stage: int, full: bool) -> dict[str, Any]:
        """Return `mlp_ratio` and `make_attention` of the blocks of a stage."""
        raise NotImplementedError

    def _run(
        self,
        block: TransformerBlock,
        x: jax.Array,
        places: jax.Array,
        full: bool,
        *,
        shifted: bool,
        rng: jax.Array | None,
    ) -> jax.Array:
        """Run a block on tokens [B, H, W, D]; `shifted` is every second one of a stage."""
        raise NotImplementedError

    @nn.nowrap
    def block_flops(self, stage: int, grid: tuple[int, int], full: bool) -> int:
        """Return forward FLOPs of a block of a stage on one image's grid of tokens."""
        raise NotImplementedError

    @nn.nowrap
    def flops(self, units: int, unit_size: int) -> tuple[int, int]:
        """Return forward FLOPs of (embedding, stages) for one image of which `units` are seen."""
        full, stages = self.is_full(units), 0
        for stage, grid in enumerate(self.stage_grids(units)):
            if stage:
                stages += 2 * math.prod(grid) * 4 * self.width(stage - 1) * self.width(stage)
            stages += self.stage_depths[stage] * self.block_flops(stage, grid, full)
        return 2 * units * unit_size * self.embed_dim, stages
