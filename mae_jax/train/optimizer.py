"""Optimisers as optax chains that yield a direction; the step multiplies it by the rate.

One place for the schedule (decay included: the decoupled decay of AdamW is scaled by the rate as
well), so that a skipped update cannot shift it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from mae_jax.errors import ConfigError
from mae_jax.types import Params


def path_name(path: tuple[Any, ...]) -> str:
    """Return a key path of a parameter as `encoder/block_00/attn/qkv/kernel`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def decay_mask(params: Any, no_decay: Sequence[str] = ()) -> Any:
    """Return a tree of bools: which parameters weight decay applies to.

    Vectors (biases, norms) never decay; arrays of higher rank do, class and mask token included
    (they are [1, 1, D]), unless the last part of their path is in `no_decay`.

    Source: facebookresearch/mae with timm's `add_weight_decay`.
    """

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        return leaf.ndim > 1 and path_name(path).rsplit("/", 1)[-1] not in no_decay

    return jax.tree_util.tree_map_with_path(decays, params)


def adamw(
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float = 0.0,
    no_decay: Sequence[str] = (),
) -> optax.GradientTransformation:
    """Return AdamW's direction, m / (sqrt(v) + eps) + decay x p, to be multiplied by -rate.

    Args:
      b1: decay of the mean m of gradients.
      b2: decay of the mean v of their squares.
      eps: added to the root.
      weight_decay: of parameters p of rank 2 and more.
      clip_norm: gradients whose common norm is larger are scaled down to it; 0: none are.
      no_decay: names of parameters that do not decay either.

    Source: "Decoupled Weight Decay Regularization", arXiv 1711.05101, as in `torch.optim.AdamW`.
    """
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    return optax.chain(
        *clip,
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=lambda p: decay_mask(p, no_decay)),
    )


def lars(
    *, momentum: float, weight_decay: float, trust_coefficient: float
) -> optax.GradientTransformation:
    """Return the direction of LARS, a momentum of trusted gradients, to be multiplied by -rate.

    For arrays of rank 2 and more the gradient, decay included, is scaled by coefficient x
    ||p|| / ||g|| (by 1 where a norm is 0); vectors neither decay nor are scaled. The rate comes
    after the momentum, where `optax.lars` has it before: with a rate that changes, they differ.

    Args:
      momentum: of the direction.
      weight_decay: added to the gradient as decay x p.
      trust_coefficient: of the ratio of norms.

    Source: "Large Batch Training of Convolutional Networks", arXiv 1708.03888, as in
    facebookresearch/mae `util/lars.py`.
    """
    trust = optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient)
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        optax.masked(trust, decay_mask),
        optax.trace(decay=momentum),
    )


def layer_factors(
    params: Params, layer_decay: float, layer_id: Callable[[str], int], top_layer: int
) -> Any:
    """Return the factor of the rate of each parameter, decay ** (top layer - layer id).

    Args:
      params: any tree.
      layer_decay: in (0, 1].
      layer_id: the layer of the parameter at a path such as `encoder/block_00/norm1/scale`.
      top_layer: the one of factor 1.

    Source: BEiT, arXiv 2106.08254; facebookresearch/mae `util/lr_decay.py`.
    """

    def factor(path: tuple[Any, ...], _: Any) -> float:
        return layer_decay ** (top_layer - layer_id(path_name(path)))

    return jax.tree_util.tree_map_with_path(factor, params)


def trainable_mask(params: Params, blocks: float, layer_id: Callable[[str], int]) -> Any:
    """Return a tree of bools: what is trained when the last blocks are tuned and the rest frozen.

    Args:
      params: `encoder`, with `block_00` ..., and more.
      blocks: how many of the last blocks; a half is the MLP of the block before, with its norm.
        What follows the blocks is trained as well; with 0 only what is outside of the encoder.
        -1: everything.
      layer_id: the layer of the parameter at a path such as `encoder/block_00/norm1/scale`: i + 1
        for block i, and 0 for what stands before.

    Raises:
      ConfigError: if there are not so many blocks, or `blocks` is no multiple of a half.

    Source: MAE, arXiv 2111.06377, section 4.3 (partial fine-tuning).
    """
    depth = sum(name.startswith("block_") for name in params["encoder"])
    if blocks != -1 and (not 0 <= blocks <= depth or 2 * blocks != int(2 * blocks)):
        raise ConfigError(
            f"optimizer.trainable_blocks {blocks:g}: expected -1 (everything) or 0, 0.5, 1 ..."
            f" {depth}, the blocks of the encoder"
        )

    def trained(path: tuple[Any, ...], _: Any) -> bool:
        name = path_name(path)
        if blocks == -1 or not name.startswith("encoder/"):
            return True
        if name.startswith("encoder/norm/"):
            return blocks > 0
        layer = layer_id(name)
        from_the_end = depth + 1 - layer  # 1: the last block
        if layer == 0 or from_the_end > blocks + 0.5:
            return False
        return from_the_end <= blocks or "/mlp/" in name or "/norm2/" in name

    return jax.tree_util.tree_map_with_path(trained, params)
