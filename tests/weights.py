"""Weights for tests, and applying a module with them as one compiled program."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.types import Params


def random_params(init: Callable[..., Any], *args: Any, seed: int = 0, **kwargs: Any) -> Params:
    """Return parameters in which every part shows, without running the initialisers.

    Kernels are Xavier uniform, tokens normal with deviation 0.02, both as initialised. Biases and
    norms are random too: zeros and ones would hide a mistake in where they are used.

    Args:
      init: of a module, or a function like it.
      *args: of `init` after the key.
      seed: of the numbers.
      **kwargs: of `init`; not traced.
    """
    shapes = jax.eval_shape(functools.partial(init, **kwargs), jax.random.key(0), *args)["params"]
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        if name == "kernel":
            bound = math.sqrt(6 / sum(leaf.shape))
            values = rng.uniform(-bound, bound, leaf.shape)
        elif name.endswith("token"):
            values = 0.02 * rng.standard_normal(leaf.shape)
        else:
            values = float(name == "scale") + 0.1 * rng.standard_normal(leaf.shape)
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return standard normal float32 numbers, from numpy: nothing to compile."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# For small programs that run once: compiling takes all the time, and optimising half of that.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(quick_jit, static_argnums=0, static_argnames=("method", "skip"))
def apply(module: Any, params: Params, *args: Any, method: str | None = None, **kwargs: Any) -> Any:
    """Apply a module; compiling the whole is quicker than compiling each operation."""
    return module.apply({"params": params}, *args, method=method, **kwargs)
