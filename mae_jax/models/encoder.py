"""What all encoders of units have in common."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.models.fields import check_choice
from mae_jax.nn.attention import AttentionFn
from mae_jax.nn.blocks import TransformerBlock
from mae_jax.nn.layers import Dtype

# Of encoders that add a table of them.
POSITIONS = ("fixed", "learned")


class Encoder(nn.Module):
    """An encoder of the units to be seen: `encoder(units [B, K, U], ids [R, K], ...)`.

    Its parameters are `block_00` ..., numbered through all stages, `downsample_1` ..., each before
    the blocks of that stage (stages count from 0), `norm` at the end, and what stands before.
    `positions` is "fixed" (a table that is no parameter), "learned" (`pos_embed`, which starts as
    that table) or "none".
    """

    if TYPE_CHECKING:  # fields of every subclass

        @property
        def grid_size(self) -> tuple[int, ...]:
            """Units (down, across), or (time, down, across)."""
            ...

        @property
        def positions(self) -> str:
            """One of "fixed", "learned" or "none"."""
            ...

        @property
        def drop_path_rate(self) -> float:
            """Probability of dropping a branch of the last block."""
            ...

        @property
        def final_norm(self) -> bool:
            """Whether tokens are normed at the end."""
            ...

        @property
        def dtype(self) -> Dtype:
            """Of the products."""
            ...

        @property
        def attention(self) -> AttentionFn:
            """What attends."""
            ...

        @property
        def remat(self) -> str:
            """What blocks make again in the backward pass."""
            ...

    # Whether a learned token comes before the others; a field where there is a choice.
    use_cls_token = False
    # Whether a classifier that pools keeps the final norm, in place of one after pooling.
    norms_before_pooling = False
    # Whether a classifier norms what it has pooled even where the tokens were normed.
    norms_after_pooling = False
    # The positions of a classifier, unless told otherwise.
    classifier_positions = "learned"

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each stage."""
        raise NotImplementedError

    @property
    def output_dim(self) -> int:
        """D, the width of the tokens that come out."""
        raise NotImplementedError

    @property
    def position_grid(self) -> tuple[int, ...]:
        """The grid of the table of positions: (down, across), or (time, down, across)."""
        return self.grid_size

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
          replaced: bool [R, K], where what a unit is embedded as gives way to a learned token,
            `mask_token`, its position staying; None: nowhere, and there is no such token.
          drop_path_rng: key of drop path; None: none (evaluation).

        Returns:
          [B, c + T, D] in `dtype`; c = 1 with a class token, which comes first, else 0.
        """
        raise NotImplementedError

    def encode_all(self, units: jax.Array, *, drop_path_rng: jax.Array | None = None) -> jax.Array:
        """Encode all units [B, N, U] with nothing hidden; returns [B, c + T, D]."""
        return self(units, jnp.arange(units.shape[1])[None], drop_path_rng=drop_path_rng)

    @nn.nowrap
    def patch_tokens(self, tokens: jax.Array) -> jax.Array:
        """Return the tokens [B, c + T, D] without the class token."""
        return tokens[:, int(self.use_cls_token) :]

    @nn.nowrap
    def fixed_table(self) -> np.ndarray:
        """Return float32 [1, c + P, D], the fixed positions, zeros for a class token."""
        raise NotImplementedError

    def position_table(self) -> jax.Array:
        """Return float32 [c + P, D], fixed or learned; row 0 belongs to a class token.

        Raises:
          ConfigError: if `positions` are not one of `POSITIONS`.
        """
        check_choice("positions", self.positions, POSITIONS)
        table = jnp.asarray(self.fixed_table())
        if self.positions == "learned":
            fixed = table
            table = self.param("pos_embed", lambda _: fixed)
        return table[0]

    @nn.nowrap
    def flops(self, units: int, unit_size: int) -> tuple[int, int]:
        """Return forward FLOPs of (embedding, the rest) for one image of which `units` are seen."""
        raise NotImplementedError

    @nn.nowrap
    def as_backbone(self, **fields: Any) -> Self:
        """Return the encoder as a classifier has it, with other values of `fields`."""
        return self.clone(parent=None, name=None, **fields)

    @nn.nowrap
    def drop_path(self, i: int, rng: jax.Array | None) -> tuple[float, jax.Array | None]:
        """Return rate and key of block i: the rate grows linearly to `drop_path_rate`."""
        rate = self.drop_path_rate * i / max(1, sum(self.depths) - 1)
        return rate, None if rng is None else jax.random.fold_in(rng, i)

    def block(self, i: int, rate: float, num_heads: int, **fields: Any) -> TransformerBlock:
        """Make block i: what the blocks of all encoders have alike, and `fields` of its own.

        Args:
          i: its number through all stages.
          rate: of drop path; see `drop_path`.
          num_heads: attention heads.
          fields: of `TransformerBlock`.
        """
        return TransformerBlock(
            num_heads=num_heads,
            drop_path_rate=rate,
            dtype=self.dtype,
            attention=self.attention,
            remat=self.remat,
            name=f"block_{i:02d}",
            **fields,
        )

    @property
    def top_layer(self) -> int:
        """The highest layer id, which has the full learning rate."""
        return sum(self.depths) + 1

    @nn.nowrap
    def layer_id(self, name: str) -> int:
        """Return the layer, for rates that decay with depth, of a parameter.

        0 is what stands before the blocks, i + 1 block i, with the downsampling before it.

        Args:
          name: path of a parameter below `encoder`, or "" for what is outside, the head.
        """
        part = name.partition("/")[0]
        numbered = re.fullmatch(r"(block|downsample)_(\d+)", part)
        if numbered is None:
            return self.top_layer if part in ("", "norm") else 0
        number = int(numbered[2])
        return 1 + (number if numbered[1] == "block" else sum(self.depths[:number]))
