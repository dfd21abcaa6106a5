"""The pre-norm transformer block and its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.nn.attention import AttentionFn, SelfAttention
from mae_jax.nn.layers import (
    LAYER_NORM_EPS,
    XAVIER,
    Dtype,
    Initializer,
    drop_path,
    gelu,
    layer_norm,
    linear,
)

# What the backward pass of a block is given: all that its forward pass made; the products of
# weights alone, the rest made again ("products"); or nothing but the block's input ("block").
REMATS = ("none", "products", "block")


class Mlp(nn.Module):
    """Linear, GELU, Linear.

    Attributes:
      mlp_dim: width between the two.
      kernel_init: of the weights.
      tanh_gelu: the approximation by a tanh, in place of the exact (erf) GELU.
    """

    mlp_dim: int
    dtype: Dtype = jnp.float32
    kernel_init: Initializer = XAVIER
    tanh_gelu: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens [..., D] to [..., D]."""
        fc1 = linear(self.mlp_dim, self.dtype, "fc1", kernel_init=self.kernel_init)
        fc2 = linear(x.shape[-1], self.dtype, "fc2", kernel_init=self.kernel_init)
        hidden = fc1(x)
        return fc2(nn.gelu(hidden, approximate=True) if self.tanh_gelu else gelu(hidden))


class TransformerBlock(nn.Module):
    """x += Attn(LN(x)); x += MLP(LN(x)), each branch under drop path.

    Attributes:
      num_heads: attention heads.
      mlp_ratio: width of the MLP over that of the tokens.
      drop_path_rate: probability of dropping a branch.
      attention: what attends; see `AttentionFn`.
      epsilon: of the norms.
      kernel_init: of the weights.
      make_attention: makes the module `attn`, called as `make_attention(num_heads, dtype,
        attention, kernel_init, name=...)`; None: there is no attention, and no `norm1`.
      tanh_gelu: see `Mlp`.
      remat: what is made again in the backward pass to save memory, a name in `REMATS`.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    dtype: Dtype = jnp.float32
    attention: AttentionFn = jax.nn.dot_product_attention
    epsilon: float = LAYER_NORM_EPS
    kernel_init: Initializer = XAVIER
    make_attention: Callable[..., nn.Module] | None = SelfAttention
    tanh_gelu: bool = False
    remat: str = "none"

    def __call__(
        self, x: jax.Array, drop_path_rng: jax.Array | None = None, **context: Any
    ) -> jax.Array:
        """Map tokens [B, ..., D] to the same.

        Args:
          x: for example [B, T, D].
          drop_path_rng: key of drop path; None: none.
          context: what the attention takes beside tokens.
        """

        def branches(block: TransformerBlock, x: jax.Array) -> jax.Array:
            return block._branches(x, drop_path_rng, context)

        if self.remat == "none":
            return branches(self, x)
        policy = None
        if self.remat == "products":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return nn.remat(branches, policy=policy)(self, x)

    @nn.compact
    def _branches(
        self, x: jax.Array, drop_path_rng: jax.Array | None, context: dict[str, Any]
    ) -> jax.Array:
        """Return the tokens with both branches added."""
        attn_rng, mlp_rng = (
            (None, None) if drop_path_rng is None else jax.random.split(drop_path_rng)
        )
        if self.make_attention is not None:
            attn = self.make_attention(
                self.num_heads, self.dtype, self.attention, self.kernel_init, name="attn"
            )
            branch = attn(layer_norm(self.dtype, "norm1", epsilon=self.epsilon)(x), **context)
            x = x + drop_path(branch, self.drop_path_rate, attn_rng)
        width = int(x.shape[-1] * self.mlp_ratio)
        mlp = Mlp(width, self.dtype, self.kernel_init, self.tanh_gelu, name="mlp")
        branch = mlp(layer_norm(self.dtype, "norm2", epsilon=self.epsilon)(x))
        return x + drop_path(branch, self.drop_path_rate, mlp_rng)


def block_flops(
    tokens: int, width: int, mlp_ratio: float = 4.0, *, attended: int | None = None
) -> int:
    """Return forward FLOPs of one block on one sequence: products only, two a multiply-add.

    Args:
      tokens: of the sequence.
      width: of a token.
      mlp_ratio: of the MLP.
      attended: tokens that each looks at; None: all.
    """
    attended = tokens if attended is None else attended
    products = 2 * tokens * (4 + 2 * mlp_ratio) * width**2
    return int(products + 4 * tokens * attended * width)
