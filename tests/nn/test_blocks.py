"""The transformer block, against numpy in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mae_jax.errors import ConfigError
from mae_jax.nn import blocks
from mae_jax.nn.attention import SelfAttention
from mae_jax.nn.blocks import Mlp, TransformerBlock, block_flops
from mae_jax.nn.layers import drop_path, dropout, gelu
from tests.weights import apply, normal, quick_jit, random_params

WIDTH, HEADS = 12, 3

Arrays = Mapping[str, Any]


def slow_linear(p: Arrays, x: np.ndarray) -> np.ndarray:
    return x @ p["kernel"] + p["bias"]


def slow_norm(p: Arrays, x: np.ndarray) -> np.ndarray:
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * p["scale"] + p["bias"]


def slow_attention(p: Arrays, x: np.ndarray, heads: int) -> np.ndarray:
    d = x.shape[-1]
    size = d // heads
    out = np.zeros_like(x)
    qkv = slow_linear(p["qkv"], x)
    for b in range(x.shape[0]):
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            q, k, v = (qkv[b, :, i * d : (i + 1) * d][:, part] for i in range(3))
            weight = np.exp(q @ k.T / math.sqrt(size))
            out[b, :, part] = weight / weight.sum(-1, keepdims=True) @ v
    return slow_linear(p["proj"], out)


def slow_mlp(p: Arrays, x: np.ndarray) -> np.ndarray:
    hidden = slow_linear(p["fc1"], x)
    erf = np.vectorize(math.erf)
    return slow_linear(p["fc2"], hidden * 0.5 * (1 + erf(hidden / math.sqrt(2))))


def slow_block(p: Arrays, x: np.ndarray, heads: int) -> np.ndarray:
    x = x + slow_attention(p["attn"], slow_norm(p["norm1"], x), heads)
    return x + slow_mlp(p["mlp"], slow_norm(p["norm2"], x))


def make_params(module: Any, x: jax.Array) -> tuple[Any, Any]:
    """Return random parameters, float32, and the same in float64."""
    params = random_params(module.init, x)
    return params, jax.tree.map(lambda a: np.asarray(a, np.float64), params)


@pytest.fixture
def x() -> np.ndarray:
    return normal((2, 5, WIDTH))


def test_attention_equals_a_loop_over_images_and_heads(x):
    module = SelfAttention(HEADS)
    params, wide = make_params(module, x)
    expected = slow_attention(wide, np.asarray(x, np.float64), HEADS)
    np.testing.assert_allclose(apply(module, params, x), expected, atol=3e-6)


def test_mlp_has_the_exact_gelu(x):
    module = Mlp(20)
    params, wide = make_params(module, x)
    out = apply(module, params, x)
    expected = slow_mlp(wide, np.asarray(x, np.float64))
    np.testing.assert_allclose(out, expected, atol=3e-6)
    hidden = slow_linear(wide["fc1"], np.asarray(x, np.float64))
    tanh = np.asarray(jax.nn.gelu(jnp.asarray(hidden, jnp.float32), approximate=True))
    assert np.abs(slow_linear(wide["fc2"], tanh) - expected).max() > 1e-4  # the test can tell


def test_gelu_has_the_digits_of_its_dtype():
    x = np.linspace(-9, 9, 2001).astype(np.float32)
    phi = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x.tolist()])
    slope = phi + x * np.exp(-0.5 * x.astype(np.float64) ** 2) / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(gelu(jnp.asarray(x)), x * phi, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu))(x), slope, rtol=1e-6, atol=1e-6)
    # Of bfloat16 too, 8 bits: 1 + erf would be off by half of -0.004 at -3.
    few = jnp.asarray(x[(x > -4) & (x < 9)], jnp.bfloat16)
    wide = np.asarray(few, np.float64)
    phi = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in wide.tolist()])
    np.testing.assert_allclose(np.asarray(gelu(few), np.float64), wide * phi, rtol=0.08)


def assert_close(tree: Any, expected: Any) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), tree, expected
    )


@pytest.mark.parametrize("remat", ["products", "block"])
def test_what_is_made_again_changes_no_output_and_no_gradient(remat, x):
    params = random_params(TransformerBlock(HEADS).init, x)
    rng = jax.random.key(3)

    def loss(params, remat):
        block = TransformerBlock(HEADS, drop_path_rate=0.5, remat=remat)
        return jnp.sum(block.apply({"params": params}, x, rng, mask=jnp.ones((2, 5, 5), bool)) ** 2)

    shapes = jax.eval_shape(TransformerBlock(HEADS, remat=remat).init, jax.random.key(0), x)
    assert jax.tree.structure(shapes["params"]) == jax.tree.structure(params)
    gradient = quick_jit(jax.grad(loss), static_argnums=1)
    assert_close(gradient(params, remat), gradient(params, "none"))
    assert "remat" in str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(params, remat))


def test_block_equals_the_slow_one(x):
    module = TransformerBlock(HEADS, mlp_ratio=2.0)
    params, wide = make_params(module, x)
    assert params["mlp"]["fc1"]["kernel"].shape == (WIDTH, 2 * WIDTH)
    expected = slow_block(wide, np.asarray(x, np.float64), HEADS)
    np.testing.assert_allclose(apply(module, params, x), expected, atol=1e-5)


def test_layer_norm_adds_1e_6_to_the_variance():
    x = 1e-3 * normal((4, 16))
    module = blocks.layer_norm(jnp.float32, "norm")
    params, wide = make_params(module, x)
    expected = slow_norm(wide, np.asarray(x, np.float64))
    np.testing.assert_allclose(apply(module, params, x), expected, atol=1e-6)


def test_layer_norm_is_exact_far_from_zero():
    x = 1000 + normal((4, 64))  # E[x^2] - E[x]^2 would be 5 % off
    module = blocks.layer_norm(jnp.float32, "norm")
    params, wide = make_params(module, x)
    expected = slow_norm(wide, np.asarray(x, np.float64))
    np.testing.assert_allclose(apply(module, params, x), expected, atol=3e-4)


def test_parameters_have_these_names_and_shapes(x):
    params, _ = make_params(TransformerBlock(HEADS), x)
    shapes = {k: v.shape for k, v in traverse_util.flatten_dict(params, sep="/").items()}
    assert shapes == {
        "norm1/scale": (12,),
        "norm1/bias": (12,),
        "attn/qkv/kernel": (12, 36),
        "attn/qkv/bias": (36,),
        "attn/proj/kernel": (12, 12),
        "attn/proj/bias": (12,),
        "norm2/scale": (12,),
        "norm2/bias": (12,),
        "mlp/fc1/kernel": (12, 48),
        "mlp/fc1/bias": (48,),
        "mlp/fc2/kernel": (48, 12),
        "mlp/fc2/bias": (12,),
    }


def test_initial_kernels_are_xavier_uniform_and_biases_zero():
    init = jax.jit(TransformerBlock(4).init)
    params = init(jax.random.key(0), jnp.zeros((1, 2, 128)))["params"]
    bounds = {
        "attn/qkv": math.sqrt(6 / (128 + 3 * 128)),  # of the fused matrix
        "attn/proj": math.sqrt(6 / (128 + 128)),
        "mlp/fc1": math.sqrt(6 / (128 + 512)),
        "mlp/fc2": math.sqrt(6 / (512 + 128)),
    }
    flat = traverse_util.flatten_dict(params, sep="/")
    for name, bound in bounds.items():
        kernel = np.asarray(flat[f"{name}/kernel"])
        assert 0.999 * bound < np.abs(kernel).max() <= bound
        np.testing.assert_allclose(kernel.std(), bound / math.sqrt(3), rtol=0.02)
        assert not np.any(flat[f"{name}/bias"])
    for name in ("norm1", "norm2"):
        assert np.all(flat[f"{name}/scale"] == 1)
        assert not np.any(flat[f"{name}/bias"])


def test_another_attention_function_takes_the_place_of_the_usual_one(x):
    def only_the_first_value(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        assert query.shape == key.shape == value.shape == (2, 5, HEADS, WIDTH // HEADS)
        return jnp.broadcast_to(value[:, :1], value.shape)

    module = SelfAttention(HEADS, attention=only_the_first_value)
    params, wide = make_params(module, x)
    value = slow_linear(wide["qkv"], np.asarray(x, np.float64))[:, :1, 2 * WIDTH :]
    expected = np.repeat(slow_linear(wide["proj"], value), 5, axis=1)
    np.testing.assert_allclose(apply(module, params, x), expected, atol=3e-6)


def test_bfloat16_is_for_products_alone(x):
    module = TransformerBlock(HEADS, dtype=jnp.bfloat16)
    params, _ = make_params(module, x.astype(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    out = apply(module, params, x.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    exact = apply(TransformerBlock(HEADS), params, x)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.05)
    assert not np.array_equal(out.astype(jnp.float32), exact)


def test_layer_norm_of_bfloat16_has_float32_statistics():
    x = (8 + normal((4, 768))).astype(jnp.bfloat16)
    module = blocks.layer_norm(jnp.bfloat16, "norm")
    params, wide = make_params(module, x)
    out = apply(module, params, x)
    assert out.dtype == jnp.bfloat16
    expected = slow_norm(wide, np.asarray(x, np.float64))
    # Half a unit in the last of bfloat16's 8 digits, and nothing from the statistics.
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=2**-8, atol=1e-4)


def test_softmax_of_bfloat16_is_float32():
    tokens = 3000  # added up in bfloat16, thousands of equal weights do not come to 1
    q = jnp.zeros((1, 1, 1, 4), jnp.bfloat16)
    k, v = jnp.zeros((1, tokens, 1, 4), jnp.bfloat16), jnp.ones((1, tokens, 1, 4), jnp.bfloat16)
    out = SelfAttention(1, jnp.bfloat16).attention(q, k, v)
    np.testing.assert_allclose(out.astype(jnp.float32), np.ones(out.shape), rtol=2**-7)


def test_dropout_drops_single_values_and_scales_the_others():
    x = 2 + np.abs(normal((500, 3, 4)))
    ratio = np.asarray(dropout(x, 0.2, jax.random.key(1)) / x).ravel()
    kept = ratio > 0
    np.testing.assert_allclose(ratio[kept], 1 / 0.8, rtol=1e-6)
    assert abs(kept.mean() - 0.8) < 4 * math.sqrt(0.8 * 0.2 / kept.size)
    assert dropout(x, 0.2, None) is x
    assert dropout(x, 0.0, jax.random.key(1)) is x


def test_drop_path_without_a_key_or_rate_changes_nothing(x):
    assert drop_path(x, 0.5, None) is x
    assert drop_path(x, 0.0, jax.random.key(0)) is x


def test_drop_path_drops_whole_samples_and_scales_the_others():
    x = 2 + np.abs(normal((2000, 3, 4)))
    ratio = np.asarray(drop_path(x, 0.2, jax.random.key(1)) / x)
    each = ratio.reshape(2000, -1)
    np.testing.assert_allclose(each, np.repeat(each[:, :1], 12, axis=1), rtol=1e-6)
    kept = each[:, 0] > 0
    np.testing.assert_allclose(each[kept], 1 / 0.8, rtol=1e-6)
    assert not each[~kept].any()
    assert abs(kept.mean() - 0.8) < 4 * math.sqrt(0.8 * 0.2 / 2000)


def test_drop_path_keeps_the_dtype_and_no_nan_of_what_it_drops():
    x = jnp.full((64, 2), jnp.nan, jnp.bfloat16)
    out = drop_path(x, 0.5, jax.random.key(0))
    assert out.dtype == jnp.bfloat16
    assert 0 < np.isnan(np.asarray(out, np.float32)[:, 0]).sum() < 64


def test_the_two_branches_of_a_block_are_dropped_independently():
    x = normal((64, 2, WIDTH))
    module = TransformerBlock(HEADS, drop_path_rate=0.5)
    params, wide = make_params(module, x)
    out = np.asarray(apply(module, params, x, jax.random.key(1)))
    wide_x = np.asarray(x, np.float64)
    matches = []
    for attn in (0, 2):  # dropped, or kept and doubled
        branch = slow_attention(wide["attn"], slow_norm(wide["norm1"], wide_x), HEADS)
        middle = wide_x + attn * branch
        for mlp in (0, 2):
            end = middle + mlp * slow_mlp(wide["mlp"], slow_norm(wide["norm2"], middle))
            matches.append(np.abs(out - end).max(axis=(1, 2)) < 1e-4)
    np.testing.assert_array_equal(np.sum(matches, axis=0), np.ones(64))  # each is one of the four
    assert np.all(np.sum(matches, axis=1) > 4)  # and all four occur: 16 are expected of each


def test_block_without_a_key_is_deterministic(x):
    module = TransformerBlock(HEADS, drop_path_rate=0.9)
    params, _ = make_params(module, x)
    plain = apply(TransformerBlock(HEADS), params, x)
    np.testing.assert_array_equal(apply(module, params, x), plain)


def test_flops_count_two_a_multiply_add_of_every_product():
    tokens, width = 5, 8
    products = [
        tokens * width * 3 * width,  # qkv
        tokens * tokens * width,  # logits
        tokens * tokens * width,  # weighted sum
        tokens * width * width,  # proj
        tokens * width * 2 * width,  # fc1
        tokens * 2 * width * width,  # fc2
    ]
    assert block_flops(tokens, width, mlp_ratio=2.0) == 2 * sum(products)


def test_heads_that_do_not_divide_the_width_are_refused(x):
    with pytest.raises(ConfigError, match="num_heads 5 does not divide embed_dim 12"):
        SelfAttention(5).init(jax.random.key(0), x)
