"""Optimisers as optax chains that yield a direction; the step multiplies it by the rate.

One place for the schedule (decay included: the decoupled decay of AdamW is scaled by the rate as
well), so that a skipped update cannot shift it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import optax


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
