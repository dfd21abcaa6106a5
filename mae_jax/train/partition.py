"""Taking the trainable leaves out of a tree of parameters, and putting them back."""

from __future__ import annotations

from typing import Any

from flax import traverse_util

from mae_jax.types import Params


def select(tree: Params, mask: Any | None) -> Params:
    """Return the leaves that `mask` has as true, in their nested dictionaries; None: the tree.

    Args:
      tree: nested dictionaries.
      mask: the same dictionaries of bools. A dictionary of which nothing is taken is left out.
    """
    if mask is None:
        return tree
    wanted = traverse_util.flatten_dict(mask)
    flat = traverse_util.flatten_dict(tree)
    return traverse_util.unflatten_dict({path: flat[path] for path in flat if wanted[path]})


def restrict(tree: Any, part: Any) -> Any:
    """Return the leaves of `tree` at the places of those of `part`; nested dictionaries both."""
    flat = traverse_util.flatten_dict(tree)
    places = traverse_util.flatten_dict(part)
    return traverse_util.unflatten_dict({place: flat[place] for place in places})


def merge(tree: Params, selected: Params) -> Params:
    """Return `tree` with the leaves of `selected` in their places."""
    flat = traverse_util.flatten_dict(tree)
    return traverse_util.unflatten_dict(flat | traverse_util.flatten_dict(selected))
