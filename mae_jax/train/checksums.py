"""Checksums of arrays, computed where the arrays are, and of JSON.

Storage can change a bit without a word: zstd is used by Orbax without its own checksum, so that a
flipped bit in a data file comes back as wrong numbers. A digest is 64 bits of integer sums, so that
it depends neither on the order of addition nor on how an array is spread over devices.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def flat(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by path, `params/encoder/block_00/mlp/kernel` for example.

    A field of a tuple with names is written as a key of a dict is, and as Orbax reads it back.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def kinds(tree: Any) -> dict[str, str]:
    """Return dtype and shape of each leaf by path, `float32[8,16]`."""
    return {
        path: f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in flat(tree).items()
    }


def of_arrays(tree: Any) -> dict[str, str]:
    """Return the digest of each leaf by path: 16 hexadecimal digits.

    Of arrays that several processes hold, all of these have to call this.

    Args:
      tree: of numpy or jax arrays, of any shape, and of bool or numbers of up to 4 bytes (8 where
        jax has these).
    """
    leaves = flat(tree)
    sums = jax.device_get({path: _program(_replicated(x))(x) for path, x in leaves.items()})
    return {path: f"{int(first):08x}{int(second):08x}" for path, (first, second) in sums.items()}


def of_json(value: Any) -> str:
    """Return the SHA-256 of what JSON keeps of a value, whatever the order of keys."""
    kept = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Record:
    """What a step was when it was saved.

    Attributes:
      entries: dtype, shape and digest of each array by path, `float32[8,16] 0123456789abcdef`.
      texts: the digest of each item of JSON by name.
    """

    entries: dict[str, str]
    texts: dict[str, str]

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Record:
        """Return a record as `record_of` has made it, after JSON.

        Raises:
          ValueError: if it is not as it was made.
        """
        try:
            record = cls(stored["arrays"], stored["json"])
            if stored["sha256"] == of_json(record._content()):
                return record
        except (KeyError, TypeError) as error:
            raise ValueError("not a record of checksums") from error
        raise ValueError("the checksum of the checksums differs")

    def _content(self) -> dict[str, Any]:
        return {"arrays": self.entries, "json": self.texts}

    def stored(self) -> dict[str, Any]:
        """Return the record for JSON, with a digest of its own."""
        return {**self._content(), "sha256": of_json(self._content())}

    def items(self) -> list[str]:
        """Return the names of all items there are."""
        return sorted({path.partition("/")[0] for path in self.entries} | self.texts.keys())

    def kinds(self, item: str) -> dict[str, str]:
        """Return dtype and shape of each array of an item, as the function `kinds`."""
        return {
            path: entry.partition(" ")[0]
            for path, entry in self.entries.items()
            if path.partition("/")[0] == item
        }

    @property
    def sums(self) -> dict[str, str]:
        """The digest of each array by path, as `of_arrays`."""
        return {path: entry.partition(" ")[2] for path, entry in self.entries.items()}


def record_of(arrays: dict[str, Any], texts: dict[str, Any]) -> dict[str, Any]:
    """Return for JSON what trees of arrays and values of JSON are, by name of their item."""
    sums = of_arrays(arrays)
    entries = {path: f"{kind} {sums[path]}" for path, kind in kinds(arrays).items()}
    return Record(entries, {name: of_json(text) for name, text in texts.items()}).stored()


def _replicated(leaf: Any) -> NamedSharding | None:
    """Return where the sums are to be: on every device that has a part, so that all can read."""
    sharding = getattr(leaf, "sharding", None)
    return NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else None


@functools.cache
def _program(out_sharding: NamedSharding | None) -> Any:
    # Compiled for each shape; one program for a whole state takes longer than all of these.
    return jax.jit(_sums, out_shardings=out_sharding)


def _sums(array: jax.Array) -> jax.Array:
    """Return uint32 [2], sums modulo 2^32 over the array's words, each mixed with its position.

    For one position both terms are bijections of the word, so that one changed word always shows.
    """
    words = _words(array)
    position = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        along = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position += along * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    key = _mix(position + jnp.uint32(0x9E3779B9))  # so that position 0 is mixed as well
    first = _mix(words ^ key)
    second = first * (key | jnp.uint32(1))
    return jnp.stack([jnp.sum(x, dtype=jnp.uint32) for x in (first, second)])


def _words(array: jax.Array) -> jax.Array:
    """Return the bits of an array as uint32, a word an element; of 8 bytes two, in a last axis."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    if array.dtype.itemsize >= 4:
        return lax.bitcast_convert_type(array, jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}[array.dtype.itemsize]
    return lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """Return a bijection of uint32 in which each bit depends on all.

    Source: the constants of https://github.com/skeeto/hash-prospector, "lowbias32", second edition.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)
