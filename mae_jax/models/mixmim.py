"""MixMIM's encoder: a pyramid with attention in windows, over one image or a mixture of two."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.errors import ConfigError
from mae_jax.models.encoder import Encoder
from mae_jax.nn.attention import AttentionFn, RelativeTable, SelfAttention
from mae_jax.nn.blocks import block_flops
from mae_jax.nn.layers import Dtype, TokenDense, fan_in_uniform, layer_norm
from mae_jax.nn.masking import mask_of
from mae_jax.nn.merging import PatchMerge
from mae_jax.nn.patches import from_grid, subdivide, to_grid
from mae_jax.nn.pos_embed import sincos_2d
from mae_jax.nn.windows import partition, unpartition
from mae_jax.types import MaskPlan

EPSILON = 1e-5  # of all norms, decoder included: PyTorch's own default, not MAE's

# Largest side of a window, and of a grid that is one window: the published windows follow from
# these, 14, 14, 14, 7 at 224 pixels and 16, 16, 24, 12 at 384.
MAX_WINDOW, MAX_WHOLE = 16, 24
# The least side that is chosen for one of several windows: a grid's side of, say, 34 has no larger
# divisor up to 16 than 2, and tokens would hardly see each other. Our own number.
MIN_WINDOW = 7


class Stage(NamedTuple):
    """What the blocks between two mergings have in common.

    Attributes:
      side: tokens along the side of a cell.
      grid_size: tokens (down, across) of the image.
      window: tokens (down, across) of a window.
      width: of a token.
      num_heads: of the attention.
      depth: number of blocks.
    """

    side: int
    grid_size: tuple[int, int]
    window: tuple[int, int]
    width: int
    num_heads: int
    depth: int

    @property
    def cells(self) -> tuple[int, int]:
        """Cells (down, across) of the image."""
        return self.grid_size[0] // self.side, self.grid_size[1] // self.side

    @property
    def tokens(self) -> int:
        """Tokens of the image."""
        return math.prod(self.grid_size)

    @property
    def is_global(self) -> bool:
        """Whether one window is the whole grid."""
        return self.window == self.grid_size


class Arranged(NamedTuple):
    """The tokens of a stage as its attention takes them.

    Attributes:
      tokens: [B, T, D], or [B, windows, T, D].
      context: what the attention takes beside them; see `SelfAttention`.
      undo: brings tokens like these back to cells [B, N, t, t, D].
    """

    tokens: jax.Array
    context: dict[str, Any]
    undo: Callable[[jax.Array], jax.Array]


class MixMIMEncoder(Encoder):
    """Embed cells of 8 x 8 small patches; four stages with attention in windows, halving the grid.

    Between blocks tokens lie as cells [B, N, t, t, D], t = 8, 4, 2, 1: merging four neighbours is
    then within a cell, and the tokens of one of two mixed images are a choice of cells.

    Parameters: `patch_embed`, `patch_norm`, `block_00` ... (each with a table of relative
    positions), `downsample_1` ..., `norm`, and with learned positions `pos_embed` [1, P, E].

    Attributes:
      grid_size: cells (down, across); indices count in raster order.
      stem_dim: width E of the first stage; each stage doubles it.
      stage_depths: blocks of each stage.
      num_heads: heads of the first stage; each stage doubles them.
      channels: of the image.
      mlp_ratio: width of the MLP over that of the tokens.
      window_sizes: side of each stage's windows, at most the grid's; None: the largest divisor of
        the grid's side up to 16, which must be 7 at least, or the whole side up to 24.
      positions: "fixed" (sine-cosine table of the small patches, no variable) or "learned".
      drop_path_rate: of the last block; grows linearly from 0 at the first.
      final_norm: norm the tokens at the end.

    Source: MixMAE, arXiv 2205.13137, section 3; Sense-X/MixMIM `models_mixmim.py`.
    """

    grid_size: tuple[int, int]
    stem_dim: int
    stage_depths: tuple[int, ...]
    num_heads: int
    channels: int = 3
    mlp_ratio: float = 4.0
    window_sizes: tuple[int, ...] | None = None
    positions: str = "fixed"
    drop_path_rate: float = 0.0
    final_norm: bool = True
    dtype: Dtype = jnp.float32
    attention: AttentionFn = jax.nn.dot_product_attention
    remat: str = "none"

    norms_before_pooling = True
    classifier_positions = "fixed"

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each stage."""
        return self.stage_depths

    @property
    def output_dim(self) -> int:
        """Width of the last stage."""
        return self.stem_dim * 2 ** (len(self.depths) - 1)

    @property
    def cell_side(self) -> int:
        """Small patches along the side of a cell: one token is left of them at the end."""
        return 2 ** (len(self.depths) - 1)

    @property
    def position_grid(self) -> tuple[int, int]:
        """Small patches (down, across)."""
        return self.grid_size[0] * self.cell_side, self.grid_size[1] * self.cell_side

    @nn.nowrap
    def stages(self) -> list[Stage]:
        """Return the stages.

        Raises:
          ConfigError: if a window does not divide its grid, there is not one for each stage, or
            the rule finds none that is large enough.
        """
        sizes = self.window_sizes
        if sizes is not None and len(sizes) != len(self.depths):
            raise ConfigError(
                f"model.window_sizes {sizes}: expected one for each of {len(self.depths)} stages"
            )
        stages = []
        for i, depth in enumerate(self.depths):
            side = self.cell_side // 2**i
            grid = self.grid_size[0] * side, self.grid_size[1] * side
            window = tuple(
                _default_window(length) if sizes is None else min(sizes[i], length)
                for length in grid
            )
            if min(window) < 1 or grid[0] % window[0] or grid[1] % window[1]:
                raise ConfigError(
                    f"model.window_sizes {sizes}: expected divisors of the grid of each stage,"
                    f" that of stage {i} is {grid[0]} x {grid[1]}"
                )
            if sizes is None and any(
                size < min(MIN_WINDOW, length) for size, length in zip(window, grid, strict=True)
            ):
                raise ConfigError(
                    f"model.window_sizes None: the grid of stage {i}, {grid[0]} x {grid[1]}, has"
                    f" windows of {window[0]} x {window[1]} at most, expected {MIN_WINDOW} or more"
                    " a side; give a size for each stage, or another model.image_size"
                )
            width, heads = self.stem_dim * 2**i, self.num_heads * 2**i
            stages.append(Stage(side, grid, (window[0], window[1]), width, heads, depth))
        return stages

    @nn.compact
    def __call__(
        self,
        units: jax.Array,
        ids: jax.Array,
        *,
        replaced: jax.Array | None = None,
        drop_path_rng: jax.Array | None = None,
        groups: MaskPlan | None = None,
    ) -> jax.Array:
        """Encode all cells of one image, or of a mixture of two.

        Args:
          units: [B, N, U], all of them.
          ids: int [1, N], 0 ... N - 1: windows are places of the grid, so cells cannot be missing.
          replaced: must be None; there is no mask token.
          drop_path_rng: key of drop path; None: none (evaluation).
          groups: which cells are of one image and which of the other, one division (R = 1) for the
            batch: the two do not look at each other. None: all are of one.

        Returns:
          [B, N, 8 E] in `dtype`, after the final norm, in raster order.

        Raises:
          ConfigError: if `positions` is unknown, there are not N cells, or cells are replaced.
        """
        count = self.grid_size[0] * self.grid_size[1]
        if units.shape[1] != count or ids.shape != (1, count) or replaced is not None:
            raise ConfigError(
                f"MixMIM's encoder: expected all {count} cells in raster order, none replaced, got"
                f" {units.shape[1]} and ids {list(ids.shape)}"
            )
        stages = self.stages()
        x = subdivide(units, self.cell_side, self.channels)
        init = fan_in_uniform(x.shape[-1])
        x = TokenDense(
            self.stem_dim, kernel_init=init, bias_init=init, dtype=self.dtype, name="patch_embed"
        )(x)
        x = layer_norm(self.dtype, "patch_norm", epsilon=EPSILON)(x)
        x = x + self._positions().astype(self.dtype)
        number = 0
        for i, stage in enumerate(stages):
            if i:
                x = PatchMerge(self.dtype, EPSILON, name=f"downsample_{i}")(x)
            tokens, context, undo = _arrange(x, stage, groups)
            make_attention = functools.partial(
                SelfAttention,
                position_bias=functools.partial(RelativeTable, grid_size=stage.window),
            )
            for _ in range(stage.depth):
                rate, rng = self.drop_path(number, drop_path_rng)
                block = self.block(
                    number,
                    rate,
                    stage.num_heads,
                    mlp_ratio=self.mlp_ratio,
                    epsilon=EPSILON,
                    make_attention=make_attention,
                )
                tokens = block(tokens, rng, **context)
                number += 1
            x = undo(tokens)
        x = x.reshape(-1, count, self.output_dim)
        return layer_norm(self.dtype, "norm", epsilon=EPSILON)(x) if self.final_norm else x

    def _positions(self) -> jax.Array:
        """Return the positions float32 [1, N, t, t, E] of the small patches."""
        return from_grid(self.position_table().reshape(1, *self.position_grid, -1), self.cell_side)

    @nn.nowrap
    def fixed_table(self) -> np.ndarray:
        """Return float32 [1, P, E], the sine-cosine table of the small patches in raster order."""
        return sincos_2d(self.stem_dim, self.position_grid)[None]

    @nn.nowrap
    def flops(self, units: int, unit_size: int, groups: tuple[int, ...] = ()) -> tuple[int, int]:
        """Return forward FLOPs of (embedding, the rest) for one image.

        Args:
          units: N; there are no fewer.
          unit_size: U.
          groups: cells of each of the mixed images, for the attention that is global is computed
            within each alone; what a mask blocks in a window is computed and counted. Empty: one.
        """
        rest = 0
        for i, stage in enumerate(self.stages()):
            if i:  # four of half the width become one
                rest += 2 * stage.tokens * (2 * stage.width) * stage.width
            pairs = stage.tokens * math.prod(stage.window)
            if stage.is_global and groups:
                pairs = sum((cells * stage.side**2) ** 2 for cells in groups)
            products = block_flops(stage.tokens, stage.width, self.mlp_ratio, attended=0)
            rest += stage.depth * (products + 4 * pairs * stage.width)
        return 2 * units * unit_size * self.stem_dim, rest

    @nn.nowrap
    def layer_id(self, name: str) -> int:
        """Return the layer of a parameter as the authors count: norm and head with the last block.

        No parameter is of the top layer, so that none has the full rate.

        Source: Sense-X/MixMIM `util/lr_decay.py`.
        """
        if name.partition("/")[0] in ("", "norm"):
            return sum(self.depths)
        return super().layer_id(name)


def _default_window(length: int) -> int:
    """Return the side of the windows of a grid with a side of `length`."""
    if length <= MAX_WHOLE:
        return length
    return max(size for size in range(1, MAX_WINDOW + 1) if length % size == 0)


def _arrange(x: jax.Array, stage: Stage, groups: MaskPlan | None) -> Arranged:
    """Bring cells [B, N, t, t, D] into the order in which a stage attends."""
    if not stage.is_global:
        return _in_windows(x, stage, groups)
    places = jnp.arange(stage.tokens, dtype=jnp.int32).reshape(1, *stage.grid_size, 1)
    places = from_grid(places, stage.side)[0, ..., 0]  # [N, t, t]
    context: dict[str, Any]
    if groups is None:
        context = {"relation": places.reshape(1, -1)}
        return Arranged(_flat(x), context, lambda out: out.reshape(x.shape))
    # Exact, and it saves half of the attention: each image's tokens side by side, then two
    # attentions in place of one with half of it blocked.
    order = jnp.concatenate([groups.ids_keep, groups.ids_mask], axis=1)[0]
    back = jnp.argsort(order)
    of_groups = groups.ids_keep[0], groups.ids_mask[0]
    context = {
        "relation": [places[ids].reshape(1, -1) for ids in of_groups],
        "lengths": [len(ids) * stage.side**2 for ids in of_groups],
    }

    def undo(out: jax.Array) -> jax.Array:
        return jnp.take(out.reshape(x.shape), back, axis=1, mode="clip")

    return Arranged(_flat(jnp.take(x, order, axis=1, mode="clip")), context, undo)


def _flat(x: jax.Array) -> jax.Array:
    """Return cells [B, N, t, t, D] as [B, N t t, D]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _in_windows(x: jax.Array, stage: Stage, groups: MaskPlan | None) -> Arranged:
    """Arrange cells [B, N, t, t, D] as windows [B, n, T, D]."""

    def windows(cells: jax.Array) -> jax.Array:
        return partition(to_grid(cells, stage.cells), stage.window)

    context: dict[str, Any] = {"relation": jnp.arange(math.prod(stage.window))[None]}
    if groups is not None:
        image = mask_of(groups)[..., None, None, None]  # [1, N, 1, 1, 1]
        image = jnp.broadcast_to(image, (*image.shape[:2], stage.side, stage.side, 1))
        of_token = windows(image)[..., 0]  # [1, n, T]
        context["mask"] = of_token[..., :, None] == of_token[..., None, :]

    def undo(out: jax.Array) -> jax.Array:
        return from_grid(unpartition(out, stage.grid_size, stage.window), stage.side)

    return Arranged(windows(x), context, undo)
