"""Checksums: every bit counts, and the layout does not."""

from __future__ import annotations

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mae_jax.train import checksums, sharding
from mae_jax.train.optimizer import adamw

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool")


def draw(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return arbitrary bits as numbers of a type, NaN and infinities among them."""
    raw = np.random.default_rng(seed).bytes(int(np.prod(shape)) * jnp.dtype(dtype).itemsize)
    if dtype == "bool":
        return (np.frombuffer(raw, np.uint8) % 2).astype(bool).reshape(shape)
    return np.frombuffer(raw, jnp.dtype(dtype)).reshape(shape)


def digest(array: np.ndarray | jax.Array) -> str:
    (value,) = checksums.of_arrays({"a": array}).values()
    return value


def mix(x: int) -> int:
    x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
    x = (x ^ x >> 15) * 0xD35A2D97 % 2**32
    return x ^ x >> 15


def slowly(array: np.ndarray) -> str:
    """Return the digest by Python's integers, word by word."""
    size = array.dtype.itemsize
    raw, first, second = array.tobytes(), 0, 0
    for position in range(array.size):
        word = int.from_bytes(raw[position * size : (position + 1) * size], "little")
        key = mix((position + 0x9E3779B9) % 2**32)
        mixed = mix(word ^ key)
        first += mixed
        second += mixed * (key | 1)
    return f"{first % 2**32:08x}{second % 2**32:08x}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (7,), (3, 4), (2, 3, 5)])
def test_digest_is_that_of_a_slow_version(dtype, shape):
    array = draw(dtype, shape)
    assert digest(array) == digest(jnp.asarray(array)) == slowly(array)


def test_digest_of_one_is_worked_by_hand():
    key = mix(0x9E3779B9)
    mixed = mix(0x3F800000 ^ key)  # the bits of 1.0
    assert digest(np.float32(1.0)) == f"{mixed:08x}{mixed * (key | 1) % 2**32:08x}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_bit_that_changes_shows(dtype):
    array = draw(dtype, (5, 6))
    before, rng = digest(array), np.random.default_rng(1)
    for _ in range(40):
        raw = bytearray(array.tobytes())
        bit = 0 if dtype == "bool" else int(rng.integers(8))
        raw[rng.integers(len(raw))] ^= 1 << bit
        assert digest(np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)) != before


def test_order_of_equal_numbers_shows():
    array = draw("float32", (6, 8))
    assert len({digest(a) for a in (array, array[::-1], array[:, ::-1], array.reshape(8, 6))}) == 3
    assert len({digest(np.zeros(n, np.float32)) for n in range(5)}) == 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_digest_does_not_depend_on_how_an_array_is_laid_out(dtype):
    array = draw(dtype, (8, 16))
    mesh = sharding.make_mesh(2, 4)
    for spec in (P(), P("fsdp"), P(None, "fsdp"), P("data", "fsdp"), P(("data", "fsdp"))):
        laid_out = jax.device_put(array, NamedSharding(mesh, spec))
        assert digest(laid_out) == slowly(array), spec


def test_paths_are_those_that_orbax_reads_back():
    params = {"block_00": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3, jnp.bfloat16)}}
    state = {"opt_state": adamw(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05).init(params)}
    kinds = checksums.kinds(state)
    assert kinds["opt_state/0/mu/block_00/kernel"] == "float32[2,3]"
    assert kinds["opt_state/0/nu/block_00/bias"] == "bfloat16[3]"
    assert kinds["opt_state/0/count"] == "int32[]"
    assert checksums.of_arrays(state).keys() == kinds.keys()


def test_json_counts_and_the_order_of_its_keys_does_not():
    value = {"a": 1, "b": {"c": (0.5, None), "d": "x"}}
    same = {"b": {"d": "x", "c": [0.5, None]}, "a": 1}
    assert checksums.of_json(value) == checksums.of_json(same)
    others = [{**value, "a": 2}, {**value, "a": 1.0}, {**value, "e": None}, {"a": 1}, [value]]
    assert len({checksums.of_json(other) for other in (value, *others)}) == 6


def test_record_comes_back_through_json_and_knows_what_was_saved():
    arrays = {"params": {"w": jnp.ones((2, 3))}, "train": {"step": jnp.int32(4)}}
    stored = json.loads(json.dumps(checksums.record_of(arrays, {"meta": {"seed": 3}})))
    record = checksums.Record.of(stored)
    assert record.items() == ["meta", "params", "train"]
    assert record.kinds("params") == {"params/w": "float32[2,3]"}
    assert record.sums == checksums.of_arrays(arrays)
    assert record.texts == {"meta": checksums.of_json({"seed": 3})}


def test_record_with_any_changed_bit_is_refused():
    stored = checksums.record_of({"params": {"w": jnp.ones(2)}}, {"meta": {}})
    text = json.dumps(stored).encode()
    accepted = 0
    for position in range(len(text)):
        for bit in range(8):
            changed = bytearray(text)
            changed[position] ^= 1 << bit
            try:
                assert checksums.Record.of(json.loads(changed)) == checksums.Record.of(stored)
                accepted += 1  # a blank that became another one
            except ValueError:
                pass
    assert accepted < 30


@pytest.mark.parametrize("lost", ["arrays", "json", "sha256", "all"])
def test_record_that_lacks_a_part_is_refused(lost):
    stored = copy.deepcopy(checksums.record_of({"params": {"w": jnp.ones(2)}}, {}))
    if lost != "all":
        del stored[lost]
    with pytest.raises(ValueError, match="checksums"):
        checksums.Record.of([] if lost == "all" else stored)  # type: ignore[arg-type]
