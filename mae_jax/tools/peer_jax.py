"""What is compared in JAX: this library, a plain MAE, and the model of young-geng/m3ae_public."""

from __future__ import annotations

import importlib
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mae_jax.nn.patches import normalize_units
from mae_jax.tools import rounds, step_times
from mae_jax.tools.plain_mae import PlainMAE
from mae_jax.train.optimizer import decay_mask

Loss = Callable[[Any, jax.Array, jax.Array], jax.Array]
"""(parameters, images [B, S, S, 3], key) -> loss."""


def make(spec: dict[str, Any]) -> Ours | Trained:
    """Return the contender that a spec names; see `mae_jax.tools.peer_times`.

    Raises:
      ImportError: if there is no such code.
    """
    name = spec["name"].partition("@")[0]
    if name == "ours":
        return Ours(spec)
    makers = {"plain": plain, "m3ae_public": m3ae_public}
    return Trained(spec, *makers[name](spec))


def device_kind() -> str:
    """Return what JAX calls the device."""
    return jax.devices()[0].device_kind


def peak_bytes() -> int | None:
    """Return the most bytes that were in use on the device; None: it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def checksum(params: Any) -> int:
    """Return a number that changes when parameters do."""
    return zlib.crc32(np.asarray(jax.tree.leaves(params)[0]).tobytes())


class Ours:
    """A config's step as `bench step` times it."""

    note = None

    def __init__(self, spec: dict[str, Any]):
        """Compile it."""
        self._contender = step_times.contender(step_times.Case(spec["config"], spec["batch_size"]))
        self.compile_seconds = self._contender.compile_seconds

    def take(self, steps: int) -> float:
        """Take steps, to their end; return the last loss."""
        self._contender.take(steps)
        return self._contender.losses[-1]

    def checksum(self) -> int:
        """Return a number that changes when parameters do."""
        return checksum(self._contender.state.params)


class Trained:
    """A loss with AdamW around it, as people write it."""

    def __init__(self, spec: dict[str, Any], params: Any, loss: Loss, note: str | None):
        """Compile the step.

        Args:
          spec: of the contender.
          params: to start from.
          loss: of them.
          note: what is to be known of the comparison.
        """
        self.note = note
        adamw = spec["adamw"]
        optimizer = optax.adamw(
            adamw["learning_rate"],
            **{name: adamw[name] for name in ("b1", "b2", "eps", "weight_decay")},
            mask=decay_mask,
        )
        side = spec["dims"]["image_size"]
        rng = np.random.default_rng(0)
        shape = (spec["batch_size"], side, side, 3)
        self._images = [
            jax.device_put(rng.standard_normal(shape, np.float32)) for _ in range(rounds.BATCHES)
        ]

        def step(state: Any, images: jax.Array, key: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
            params, opt_state = state
            key, own = jax.random.split(key)
            value, grads = jax.value_and_grad(loss)(params, images, own)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), key, value

        self._state, self._key = (params, optimizer.init(params)), jax.random.key(1)
        begun = time.perf_counter()
        jitted = jax.jit(step, donate_argnums=0)
        self._step = jitted.lower(self._state, self._images[0], self._key).compile()
        self.compile_seconds = time.perf_counter() - begun
        self._taken = 0

    def take(self, steps: int) -> float:
        """Take steps, to their end; return the last loss."""
        for _ in range(steps):
            images = self._images[self._taken % len(self._images)]
            self._state, self._key, loss = self._step(self._state, images, self._key)
            self._taken += 1
        jax.block_until_ready((self._state, loss))
        return float(loss)

    def checksum(self) -> int:
        """Return a number that changes when parameters do."""
        return checksum(self._state[0])


def plain(spec: dict[str, Any]) -> tuple[Any, Loss, str | None]:
    """Return parameters, loss and note of `PlainMAE`."""
    dims = dict(spec["dims"])
    side = dims.pop("image_size")
    model = PlainMAE(**dims, mask_ratio=spec["mask_ratio"], dtype=jnp.dtype(spec["dtype"]))
    count = (side // dims["patch_size"]) ** 2
    init = jax.jit(model.init)
    params = init(jax.random.key(0), jnp.zeros((1, side, side, 3)), jnp.zeros((1, count)))

    def loss(params: Any, images: jax.Array, key: jax.Array) -> jax.Array:
        value = model.apply(params, images, jax.random.uniform(key, (len(images), count)))
        return jnp.asarray(value)

    return params, loss, None


def m3ae_public(spec: dict[str, Any]) -> tuple[Any, Loss, str | None]:
    """Return parameters, loss and note of the model for images of a checkout, as it is.

    Raises:
      ImportError: if it is not there, or does not import.
    """
    sys.path.insert(0, spec["m3ae_public"])
    theirs = importlib.import_module("m3ae.model")
    dims = spec["dims"]
    dtype = jnp.dtype(spec["dtype"])
    model = theirs.MaskedAutoencoder(
        config_updates={
            "emb_dim": dims["embed_dim"],
            "depth": dims["depth"],
            "num_heads": dims["num_heads"],
            "dec_emb_dim": dims["decoder_embed_dim"],
            "dec_depth": dims["decoder_depth"],
            "dec_num_heads": dims["decoder_num_heads"],
            "image_mask_ratio": spec["mask_ratio"],
        },
        image_output_dim=3 * dims["patch_size"] ** 2,
    )

    def patches_of(images: jax.Array) -> jax.Array:
        return theirs.extract_patches(images, dims["patch_size"])

    def keys(key: jax.Array) -> dict[str, jax.Array]:
        names = model.rng_keys()
        return dict(zip(names, jax.random.split(key, len(names)), strict=True))

    side = dims["image_size"]
    init = jax.jit(lambda key, images: model.init(keys(key), patches_of(images)))
    params = init(jax.random.key(0), jnp.zeros((1, side, side, 3)))

    def loss(params: Any, images: jax.Array, key: jax.Array) -> jax.Array:
        patches = patches_of(images)
        cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        output, mask, *_ = model.apply(cast, patches.astype(dtype), rngs=keys(key))
        return theirs.patch_mse_loss(output.astype(jnp.float32), normalize_units(patches), mask)

    return params, loss, "one mask for all images of a batch, GELU by a tanh: less work"
