"""The paper's large models spread over devices: what each holds, and that they move bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mae_jax import build
from mae_jax import config as configs
from mae_jax.train import sharding
from mae_jax.train.checkpoint import Checkpoints
from tests.e2e.test_full_size import PARAMETERS
from tests.train.test_compiled import collectives, lowered, of_spread_parameters

DEVICES = 8
FLOAT = 4  # bytes


def block(dim: int, mlp_dim: int) -> Iterator[tuple[int, ...]]:
    """Yield the shapes of a transformer block's parameters."""
    for shape in ((dim, 3 * dim), (dim, dim), (dim, mlp_dim), (mlp_dim, dim)):
        yield from (shape, shape[1:])
    yield from [(dim,)] * 4  # of two norms


def vit_h() -> Iterator[tuple[int, ...]]:
    """Yield the shapes of all parameters of MAE with ViT-H/14, tables 8 and 9 of the ViT paper."""
    pixels, dim, decoder_dim = 14 * 14 * 3, 1280, 512
    yield from [(pixels, dim), (dim,), (1, 1, dim)]
    for _ in range(32):
        yield from block(dim, 4 * dim)
    yield from [(dim, decoder_dim), (decoder_dim,), (1, 1, decoder_dim)]
    for _ in range(8):
        yield from block(decoder_dim, 4 * decoder_dim)
    yield from [(decoder_dim, pixels), (pixels,)]
    yield from [(dim,)] * 2 + [(decoder_dim,)] * 2  # the last norms


@pytest.mark.drill  # minutes of compilation
def test_vit_h_over_eight_devices_compiles_and_each_holds_its_eighth():
    matrices = sum(math.prod(shape) for shape in vit_h() if len(shape) > 1)
    vectors = sum(math.prod(shape) for shape in vit_h() if len(shape) == 1)
    assert matrices + vectors == PARAMETERS["vit_h"]
    # Every matrix has an axis that 8 divides, so that no more than its eighth is held.
    assert all(any(size % DEVICES == 0 for size in s) for s in vit_h() if len(s) > 1)
    params = FLOAT * (matrices // DEVICES + vectors)

    step = lowered("vit_h", DEVICES, fsdp=DEVICES)
    state, batch = step.in_avals[0]
    scalars = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 0]
    # Parameters and two moments of each.
    expected = 3 * params + sum(leaf.dtype.itemsize for leaf in scalars)
    compiled = step.compile()
    placed, _ = compiled.input_shardings[0]
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed
    )
    assert sharding.bytes_per_device(target) == expected
    assert {name: array.shape for name, array in batch.items()}.keys() == {"image", "label"}
    held = compiled.memory_analysis().argument_size_in_bytes
    print(f"{held:,} bytes a device, {expected:,} of them the state")
    # A row of the batch: the image, and the label if it is not left out, for nobody looks at it.
    assert held - expected - 224 * 224 * 3 in (0, 4)
    kernel = placed.params["encoder"]["block_00"]["attn"]["qkv"]["kernel"]
    assert kernel.shard_shape((1280, 3840)) == (1280, 480)
    # What is exchanged are parameters and gradients: no activations.
    assert collectives(compiled.as_text()) == of_spread_parameters(state.params, DEVICES)


def values(index: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return numbers of an array that no other has."""
    return np.random.default_rng(index).random(shape, np.float32)


@pytest.mark.drill  # ViT-L's 1.3 GB of parameters, three times written and read
def test_vit_l_goes_from_replicated_to_sharded_and_back_bit_for_bit(tmp_path):
    config = configs.load_config("vit_l")
    task = build.build_task(config, build.build_model(config))
    shapes = jax.eval_shape(lambda: build.initial_variables(config, task, 0))[0]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PARAMETERS["vit_l"]

    def target(data: int, fsdp: int) -> Any:
        mesh = sharding.make_mesh(data, fsdp, jax.devices()[:2])
        where = sharding.state_sharding(shapes, mesh)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where
        )

    replicated, spread = target(2, 1), target(1, 2)
    held = [sharding.bytes_per_device(where) for where in (replicated, spread)]
    assert held[0] == FLOAT * PARAMETERS["vit_l"]
    assert held[0] / 2 < held[1] < 0.501 * held[0]

    leaves, structure = jax.tree.flatten(replicated)
    params = structure.unflatten(
        jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index, i=i, leaf=leaf: values(i, leaf.shape)[index]
        )
        for i, leaf in enumerate(leaves)
    )
    for name, where in (("replicated", spread), ("spread", replicated)):
        folder = Path(tmp_path / name)
        saving = Checkpoints(folder)
        saving.save_params(params, meta={})
        saving.close()
        del params
        reading = Checkpoints(folder, read_only=True)
        params = reading.restore_params(0, where)
        reading.close()
        for i, (leaf, wanted) in enumerate(
            zip(jax.tree.leaves(params), jax.tree.leaves(where), strict=True)
        ):
            assert leaf.sharding == wanted.sharding
            expected = values(i, leaf.shape)
            for shard in leaf.addressable_shards:  # never a whole copy on the host
                assert np.asarray(shard.data).tobytes() == expected[shard.index].tobytes()
