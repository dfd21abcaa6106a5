"""HiViT: a pyramid inside of each unit, and global attention between the units."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.errors import ConfigError
from mae_jax.models.encoder import Encoder
from mae_jax.nn.attention import AttentionFn, RelativeTable, SelfAttention
from mae_jax.nn.blocks import block_flops
from mae_jax.nn.layers import NORMAL_002, Dtype, TokenDense, fan_in_uniform, layer_norm
from mae_jax.nn.merging import PatchMerge
from mae_jax.nn.patches import subdivide
from mae_jax.nn.pos_embed import sincos_2d

SIDE = 4  # patches of the stem across a unit: halved twice, one token is left
STEM_MLP_RATIO = 3
MLP_RATIO = 4


class HiViTEncoder(Encoder):
    """Embed 4 x 4 patches of each unit, merge them to one token by MLPs, then attend globally.

    The two stages of the stem have no attention and so never look beyond a unit: units that are
    hidden can be left out before the stem, which changes nothing for the others.

    Parameters: `patch_embed`, `patch_norm`, `block_00` ..., `downsample_1`, `downsample_2`, and
    where used `norm` and `pos_embed` [1, N, 4 E].

    Attributes:
      grid_size: units (down, across); indices count in raster order.
      channels: of the image; a unit has SIDE^2 patches of p x p x channels values.
      stem_dim: E, width of a patch of the stem; a unit has 4 E at the end.
      stage_depths: of the three stages as they are published. A depth d of the first two stands for
        2 d blocks, each an MLP alone; of the last for d blocks.
      num_heads: of the last stage.
      positions: "learned" (a parameter that starts as the sine-cosine table, as in the released
        pre-training) or "fixed" (that table). They are added before the last stage.
      relative_positions: biases of the attention by relative place, a table a block, zero at first.
      multi_scale: put the tokens of all three stages side by side: [B, K, 16 E + 8 E + 4 E].
      drop_path_rate: of the last block; grows linearly from 0 at the first, the stem's included.
      final_norm: norm what comes out, all scales together. (The released class without
        `multi_scale` has that norm and does not use it.)

    Source: HiViT, arXiv 2205.14949; zhangxiaosong18/hivit.
    """

    grid_size: tuple[int, int]
    channels: int
    stem_dim: int
    stage_depths: tuple[int, int, int]
    num_heads: int
    positions: str = "learned"
    relative_positions: bool = False
    multi_scale: bool = True
    drop_path_rate: float = 0.0
    final_norm: bool = True
    dtype: Dtype = jnp.float32
    attention: AttentionFn = jax.nn.dot_product_attention
    remat: str = "none"

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each stage."""
        first, second, last = self.stage_depths
        return 2 * first, 2 * second, last

    @property
    def output_dim(self) -> int:
        """D, the width of the tokens that come out."""
        return (SIDE**2 + SIDE * 2 + 4 if self.multi_scale else 4) * self.stem_dim

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
          units: [B, K, U].
          ids: int [R, K] their places in the grid, R = B or 1.
          replaced: must be None: the encoder has no token to put there.
          drop_path_rng: key of drop path; None: none (evaluation).

        Returns:
          [B, K, D] in `dtype`, after the final norm if there is one, in the order given.

        Raises:
          ConfigError: if positions are unknown, a unit cannot be cut, or `replaced` is given.
        """
        if replaced is not None:
            raise ConfigError("replaced: expected None, for HiViT's encoder has no mask token")
        patches = subdivide(units, SIDE, self.channels)
        init = fan_in_uniform(patches.shape[-1])
        x = TokenDense(
            self.stem_dim, kernel_init=init, bias_init=init, dtype=self.dtype, name="patch_embed"
        )(patches)
        x = layer_norm(self.dtype, "patch_norm")(x)  # [B, K, SIDE, SIDE, E]
        scales = []
        for stage in (0, 1):
            x = self._blocks(x, stage, drop_path_rng)
            scales.append(x.reshape(*x.shape[:2], -1))
            x = PatchMerge(self.dtype, kernel_init=NORMAL_002, name=f"downsample_{stage + 1}")(x)
        x = x.reshape(*x.shape[:2], -1)  # [B, K, 4 E]
        positions = jnp.take(self.position_table(), ids, axis=0, mode="clip")
        x = x + positions.astype(self.dtype)
        x = self._blocks(x, 2, drop_path_rng, ids)
        if self.multi_scale:
            x = jnp.concatenate([*scales, x], axis=-1)
        return layer_norm(self.dtype, "norm")(x) if self.final_norm else x

    def _blocks(
        self,
        x: jax.Array,
        stage: int,
        drop_path_rng: jax.Array | None,
        ids: jax.Array | None = None,
    ) -> jax.Array:
        """Run the blocks of a stage, with attention where `ids` are given."""
        make_attention: Callable[..., nn.Module] | None = None if ids is None else SelfAttention
        context = {}
        if ids is not None and self.relative_positions:
            table = functools.partial(
                RelativeTable, grid_size=self.grid_size, table_init=nn.initializers.zeros
            )
            make_attention = functools.partial(SelfAttention, position_bias=table)
            context = {"relation": ids}
        first = sum(self.depths[:stage])
        for i in range(first, first + self.depths[stage]):
            rate, rng = self.drop_path(i, drop_path_rng)
            block = self.block(
                i,
                rate,
                self.num_heads,
                mlp_ratio=STEM_MLP_RATIO if ids is None else MLP_RATIO,
                kernel_init=NORMAL_002,
                make_attention=make_attention,
            )
            x = block(x, rng, **context)
        return x

    @nn.nowrap
    def fixed_table(self) -> np.ndarray:
        """Return float32 [1, N, 4 E], the sine-cosine table."""
        return sincos_2d(4 * self.stem_dim, self.grid_size)[None]

    @nn.nowrap
    def as_backbone(self, **fields: Any) -> Self:
        """Return the encoder as a classifier has it: tokens of the last stage, as they are.

        Whatever `final_norm` is asked for, there is none: that of pre-training is of all scales.
        """
        return super().as_backbone(**fields | {"multi_scale": False, "final_norm": False})

    @nn.nowrap
    def layer_id(self, name: str) -> int:
        """Return the layer of a parameter below `encoder`, or of the head with "".

        As `Encoder.layer_id`, but a downsampling belongs to the block *before* it.

        Source: zhangxiaosong18/hivit, where merging is numbered with the blocks.
        """
        downsample = re.match(r"downsample_(\d+)/", name)
        if downsample is None:
            return super().layer_id(name)
        return sum(self.depths[: int(downsample[1])])

    @nn.nowrap
    def flops(self, units: int, unit_size: int) -> tuple[int, int]:
        """Return forward FLOPs of (embedding, the rest) for one image of which `units` are seen."""
        rest = self.depths[2] * block_flops(units, 4 * self.stem_dim, MLP_RATIO)
        for stage in (0, 1):
            width, tokens = self.stem_dim * 2**stage, units * (SIDE // 2**stage) ** 2
            mlps = self.depths[stage] * 2 * STEM_MLP_RATIO * tokens * width**2
            merge = tokens // 4 * 4 * width * 2 * width
            rest += 2 * (mlps + merge)
        return 2 * units * unit_size * self.stem_dim, rest
