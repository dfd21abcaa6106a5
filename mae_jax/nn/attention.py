"""Attention: global, in windows, or in groups, with position biases and masks.

Softmax is in float32 whatever the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.errors import ConfigError
from mae_jax.nn.layers import NORMAL_002, XAVIER, Dtype, Initializer, linear

AttentionFn = Callable[..., jax.Array]
"""(query, key, value, bias=None, mask=None), the first three [B, T, heads, head_dim], to the same;
`bias` is added to the logits [B, heads, T, T], `mask` is True where a token may be looked at. As
`jax.nn.dot_product_attention`: scales by head_dim^-1/2 and takes a float32 softmax."""

QKV_BIASES = ("full", "query_value")


class RelativeTable(nn.Module):
    """A learned bias for each head and difference of two places in a grid.

    Parameter: `table` [2 h - 1, 2 w - 1, heads]; entry (dy + h - 1, dx + w - 1) belongs to the
    difference (dy, dx) = query - key.

    Attributes:
      num_heads: heads.
      grid_size: (h, w) of the window, or of the whole grid.
      table_init: of the table.

    Source: Swin Transformer, arXiv 2103.14030, section 3.2.
    """

    num_heads: int
    grid_size: tuple[int, int]
    table_init: Initializer = NORMAL_002

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Return the biases float32 [R, heads, T, T] of tokens at places `ids` [R, T], raster."""
        (rows, columns), heads = self.grid_size, self.num_heads
        table = self.param("table", self.table_init, (2 * rows - 1, 2 * columns - 1, heads))
        row, column = ids // columns, ids % columns
        down = row[:, :, None] - row[:, None, :] + rows - 1
        across = column[:, :, None] - column[:, None, :] + columns - 1
        flat = table.reshape(-1, heads)
        bias = jnp.take(flat, down * (2 * columns - 1) + across, axis=0, mode="clip")
        return jnp.moveaxis(bias, -1, 1)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused query-key-value product, biases included.

    The fused kernel is [D, 3 D], laid out (q, k, v) x head x head_dim; Xavier on the fused shape
    has the bound sqrt(6 / (D + 3 D)), as the official initialisation.

    Parameters: `qkv`, `proj`, and without a bias of keys `q_bias` and `v_bias`, both [D], in place
    of the one of `qkv`.

    Attributes:
      num_heads: divides the width.
      attention: see `AttentionFn`.
      kernel_init: of the weights.
      position_bias: makes the module `bias`, called as `position_bias(num_heads, name=...)`, that
        turns what a call has as `relation` into biases [..., heads, T, T]; None: there are none.
      qkv_bias: "full", or "query_value": keys have none. (Softmax does not see a bias of all keys;
        what is stored and trained differs.)
    """

    num_heads: int
    dtype: Dtype = jnp.float32
    attention: AttentionFn = jax.nn.dot_product_attention
    kernel_init: Initializer = XAVIER
    position_bias: Callable[..., nn.Module] | None = None
    qkv_bias: str = "full"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        relation: Any = None,
        mask: jax.Array | None = None,
        *,
        lengths: Sequence[int] = (),
    ) -> jax.Array:
        """Map tokens [..., T, D] to [..., T, D]: each row of T tokens looks at itself alone.

        Args:
          x: for example [B, T, D], or [B, windows, T, D].
          relation: what `position_bias` takes. Its biases [..., heads, T, T] are broadcast over
            the leading axes of `x`. With `lengths`: one for each group.
          mask: bool [..., T, T], True where the second may be looked at; broadcast alike.
          lengths: sizes of groups of consecutive tokens, together T, that look at themselves
            alone: the same as a mask, without the products that it blocks. Empty: one group.
        """
        *lead, t, d = x.shape
        if d % self.num_heads:
            raise ConfigError(f"num_heads {self.num_heads} does not divide embed_dim {d}")
        if self.qkv_bias not in QKV_BIASES:
            raise ConfigError(f"qkv_bias {self.qkv_bias!r} is not one of {', '.join(QKV_BIASES)}")
        full = self.qkv_bias == "full"
        fused = linear(3 * d, self.dtype, "qkv", kernel_init=self.kernel_init, use_bias=full)
        qkv = fused(x)
        if not full:
            query, value = (
                self.param(name, nn.initializers.zeros, (d,)) for name in ("q_bias", "v_bias")
            )
            biases = jnp.concatenate([query, jnp.zeros_like(query), value]).astype(self.dtype)
            qkv = qkv + biases.reshape(*(1 for _ in qkv.shape[1:]), -1)
        qkv = qkv.reshape(-1, t, 3, self.num_heads, d // self.num_heads)
        bias = None
        if self.position_bias is not None:
            bias = self.position_bias(self.num_heads, name="bias")

        def attend(start: int, stop: int, relation: Any) -> jax.Array:
            q, k, v = (qkv[:, start:stop, i] for i in range(3))
            extra = {}
            if bias is not None:
                extra["bias"] = _rows(bias(relation), lead)
            if mask is not None:
                extra["mask"] = _rows(mask[..., None, :, :], lead)
            return self.attention(q, k, v, **extra)

        if lengths:
            relations = [None] * len(lengths) if relation is None else relation
            stops = [sum(lengths[: i + 1]) for i in range(len(lengths))]
            out = jnp.concatenate(
                [
                    attend(stop - length, stop, of_group)
                    for length, stop, of_group in zip(lengths, stops, relations, strict=True)
                ],
                axis=1,
            )
        else:
            out = attend(0, t, relation)
        out = out.reshape(*lead, t, d)
        return linear(d, self.dtype, "proj", kernel_init=self.kernel_init)(out)


def _rows(x: jax.Array, lead: Sequence[int]) -> jax.Array:
    """Return [..., h, T, T] as [B ..., h, T, T] flattened to four axes, broadcast over `lead`."""
    if all(size == 1 for size in x.shape[:-3]):
        return x.reshape(1, *x.shape[-3:])
    return jnp.broadcast_to(x, (*lead, *x.shape[-3:])).reshape(-1, *x.shape[-3:])
