"""Attention with position biases, masks and groups, against loops in numpy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.errors import ConfigError
from mae_jax.nn.attention import RelativeTable, SelfAttention
from tests.weights import quick_jit, random_params

HEADS, WIDTH = 2, 8


def attention(grid_size):
    return SelfAttention(HEADS, position_bias=functools.partial(RelativeTable, grid_size=grid_size))


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def reference(params, x, places, allowed=None):
    """Attention of one sequence [T, D] of tokens at places (row, column), in float64 and loops."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    t, d = x.shape
    qkv = np.asarray(x, np.float64) @ params["qkv"]["kernel"] + params["qkv"]["bias"]
    q, k, v = qkv.reshape(t, 3, HEADS, d // HEADS).transpose(1, 2, 0, 3)
    table = params["bias"]["table"]
    middle = np.array(table.shape[:2]) // 2
    out = np.zeros((t, HEADS, d // HEADS))
    for head, i in itertools.product(range(HEADS), range(t)):
        logits = np.full(t, -np.inf)
        for j in range(t):
            if allowed is None or allowed[i][j]:
                down, across = np.subtract(places[i], places[j]) + middle
                logits[j] = q[head, i] @ k[head, j] / np.sqrt(d / HEADS) + table[down, across, head]
        weights = np.exp(logits - logits.max())
        out[i, head] = weights / weights.sum() @ v[head]
    return out.reshape(t, d) @ params["proj"]["kernel"] + params["proj"]["bias"]


def test_bias_of_a_difference_is_query_minus_key_row_then_column():
    table = RelativeTable(1, (2, 3))
    values = jnp.arange(15.0).reshape(3, 5, 1)
    bias = table.apply({"params": {"table": values}}, jnp.arange(6)[None])
    assert bias.shape == (1, 1, 6, 6)
    assert bias[0, 0, 0, 0] == 7.0  # the middle: no difference
    assert bias[0, 0, 3, 0] == 12.0  # a row below the key
    assert bias[0, 0, 0, 3] == 2.0
    assert bias[0, 0, 1, 0] == 8.0  # a column to the right of the key
    assert bias[0, 0, 0, 5] == 0.0  # a row above and two columns to the left


def test_attention_with_a_table_equals_loops_for_tokens_anywhere():
    module, ids = attention((3, 4)), jnp.array([[0, 11, 5], [7, 2, 3]])
    x = draw(2, 3, WIDTH)
    params = random_params(module.init, x, ids)
    ours = module.apply({"params": params}, x, ids)
    for row in range(2):
        places = [divmod(int(i), 4) for i in ids[row]]
        np.testing.assert_allclose(ours[row], reference(params, x[row], places), atol=1e-5)


def test_each_window_looks_at_itself_alone_and_where_its_mask_lets_it():
    module, ids = attention((2, 2)), jnp.arange(4)[None, None].reshape(1, 4)
    x = draw(2, 3, 4, WIDTH)  # two images of three windows
    group = jnp.array([[0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1]])
    mask = (group[:, :, None] == group[:, None, :])[None]  # [1, windows, T, T]
    params = random_params(module.init, x, ids)
    ours = module.apply({"params": params}, x, ids, mask)
    assert ours.shape == x.shape
    places = list(itertools.product(range(2), range(2)))
    for image, window in itertools.product(range(2), range(3)):
        theirs = reference(params, x[image, window], places, mask[0, window])
        np.testing.assert_allclose(ours[image, window], theirs, atol=1e-5)


def test_biases_of_each_sample_are_not_mixed_up_between_windows():
    module = SelfAttention(HEADS, position_bias=functools.partial(RelativeTable, grid_size=(3, 4)))
    x, ids = draw(2, 4, WIDTH), jnp.array([[0, 11, 5, 1], [7, 2, 3, 9]])
    params = random_params(module.init, x, ids)
    together = module.apply({"params": params}, x, ids)
    for row in range(2):
        alone = module.apply({"params": params}, x[row : row + 1], ids[row : row + 1])
        np.testing.assert_allclose(together[row], alone[0], atol=1e-6)


def test_groups_equal_a_mask_that_keeps_them_apart():
    module = attention((2, 4))
    ids = jnp.array([[6, 0, 3, 5, 1, 7, 2, 4]])
    x = draw(2, 8, WIDTH)
    params = random_params(module.init, x, ids)
    group = jnp.arange(8) >= 5
    mask = (group[:, None] == group[None, :])[None]

    def loss(x, params, by):
        if by == "mask":
            out = module.apply({"params": params}, x, ids, mask)
        else:
            out = module.apply({"params": params}, x, (ids[:, :5], ids[:, 5:]), lengths=(5, 3))
        return jnp.sum(out**3), out

    for by_mask, by_groups in zip(
        *(
            jax.tree.leaves(
                quick_jit(jax.grad(functools.partial(loss, by=by), (0, 1), has_aux=True))(x, params)
            )
            for by in ("mask", "groups")
        ),
        strict=True,
    ):
        np.testing.assert_allclose(by_groups, by_mask, atol=2e-4)


def test_a_number_of_heads_that_does_not_divide_the_width_is_refused():
    with pytest.raises(ConfigError, match="num_heads 3 does not divide embed_dim 8"):
        SelfAttention(3).init(jax.random.key(0), draw(1, 2, 8))


def test_without_a_bias_of_keys_it_is_full_attention_with_a_bias_of_zero():
    module, x = SelfAttention(HEADS, qkv_bias="query_value"), draw(2, 5, WIDTH)
    params = random_params(module.init, x)
    assert params.keys() == {"qkv", "q_bias", "v_bias", "proj"}
    assert params["qkv"].keys() == {"kernel"}
    bias = jnp.concatenate([params["q_bias"], jnp.zeros(WIDTH), params["v_bias"]])
    full = {"qkv": {**params["qkv"], "bias": bias}, "proj": params["proj"]}
    np.testing.assert_allclose(
        module.apply({"params": params}, x),
        SelfAttention(HEADS).apply({"params": full}, x),
        atol=1e-6,
    )


def test_an_unknown_bias_is_refused():
    module = SelfAttention(HEADS, qkv_bias="key")
    with pytest.raises(ConfigError, match="qkv_bias 'key' is not one of full, query_value"):
        module.init(jax.random.key(0), draw(1, 2, WIDTH))
