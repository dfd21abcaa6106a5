"""PVT over units: averages that are looked at, and the table of positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.errors import ConfigError
from mae_jax.models.pvt import PVTEncoder, ReducedAttention
from mae_jax.nn import masking
from mae_jax.nn.pos_embed import sincos_2d
from tests.weights import apply, normal, random_params


def make(grid_size=(4, 4), **fields) -> PVTEncoder:
    fields = {"stage_depths": (1, 1, 1, 1)} | fields
    return PVTEncoder(grid_size=grid_size, channels=1, embed_dim=8, num_heads=1, **fields)


def test_attention_is_to_averages_of_squares():
    x = normal((1, 4, 4, 6))
    module = ReducedAttention(2, reduction=2)
    p = jax.tree.map(np.asarray, random_params(module.init, x))
    out = apply(module, p, x)

    def linear(name, x):
        return x @ p[name]["kernel"] + p[name]["bias"]

    seen = linear("reduce", x.reshape(2, 2, 2, 2, 6).mean(axis=(1, 3)).reshape(4, 6))
    deviation = np.sqrt(seen.var(axis=1, keepdims=True) + 1e-5)
    seen = (seen - seen.mean(axis=1, keepdims=True)) / deviation
    kv, q = linear("kv", seen * p["norm"]["scale"] + p["norm"]["bias"]), linear("q", x[0, 0, 0])
    heads = []
    for head in range(2):
        part = slice(3 * head, 3 * head + 3)
        logits = kv[:, part] @ q[part] * 3**-0.5
        weights = np.exp(logits) / np.exp(logits).sum()
        heads.append(weights @ kv[:, 6:][:, part])
    np.testing.assert_allclose(out[0, 0, 0], linear("proj", np.concatenate(heads)), atol=2e-6)


def test_reductions_halve_on_the_compact_grid():
    encoder = make((16, 16))
    assert [encoder.reach(r, full=True) for r in encoder.reductions] == [8, 4, 2, 1]
    assert [encoder.reach(r, full=False) for r in encoder.reductions] == [4, 2, 1, 1]
    assert [encoder.width(stage) for stage in range(4)] == [8, 16, 40, 64]


def test_learned_positions_start_as_the_table_of_all_tokens():
    encoder = make(positions="learned")
    table = encoder.fixed_table()
    np.testing.assert_array_equal(table[0], sincos_2d(8, (16, 16)))
    assert encoder.position_grid == (16, 16)
    units, ids = jnp.zeros((1, 16, 64)), jnp.arange(16)[None]
    shapes = jax.eval_shape(lambda: encoder.init(jax.random.key(0), units, ids))["params"]
    assert shapes["pos_embed"].shape == table.shape
    assert "patch_norm" not in shapes
    assert set(shapes["downsample_1"]) == {"proj"}
    assert set(shapes["block_00"]["attn"]) == {"q", "kv", "reduce", "norm", "proj"}
    assert shapes["block_00"]["mlp"]["fc1"]["kernel"].shape == (8, 64)


def test_a_unit_gets_the_positions_of_its_own_place():
    plan = masking.uniform_plan(jax.random.key(0), 2, (4, 4))
    encoder = make()
    grid = encoder._places(plan.ids_keep, (2, 2))
    added = np.asarray(encoder._add_positions(jnp.zeros((2, 8, 8, 8)), grid))
    table = sincos_2d(8, (16, 16)).reshape(16, 16, 8)
    for n, ids in enumerate(np.asarray(plan.ids_keep)):
        for block, unit in enumerate(ids):
            i, j, y, x = *divmod(block, 2), *divmod(unit, 4)
            np.testing.assert_array_equal(
                added[n, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4],
                table[4 * y : 4 * y + 4, 4 * x : 4 * x + 4],
            )


@pytest.mark.parametrize(
    ("grid_size", "units", "fields", "message"),
    [
        ((14, 14), 49, {}, "28 x 28 stem patches cannot be halved 3 times"),
        ((6, 6), 36, {"reductions": (16, 4, 2, 1)}, "24 x 24 tokens cannot be averaged .* 16 x 16"),
        ((4, 4), 16, {"positions": "none"}, "positions 'none' is not one of fixed, learned"),
        ((4, 4), 5, {}, "expected all of 4 x 4 units, or one of each 2 x 2, got 5"),
    ],
)
def test_what_cannot_be_run_is_refused(grid_size, units, fields, message):
    with pytest.raises(ConfigError, match=message):
        make(grid_size, **fields).check(units)
