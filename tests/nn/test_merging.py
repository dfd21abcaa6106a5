"""Four neighbours become one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.nn.merging import ConvDownsample, PatchMerge, neighbours
from tests.weights import apply, normal, random_params


def test_neighbours_stand_side_by_side_in_the_order_asked_for():
    x = jnp.arange(16).reshape(1, 4, 4, 1)
    assert neighbours(x)[0, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert neighbours(x, column_major=True)[0, 1].tolist() == [[8, 12, 9, 13], [10, 14, 11, 15]]


def test_patch_merge_norms_four_together_and_halves_their_width():
    x = normal((2, 4, 6, 3))
    params = jax.tree.map(np.asarray, random_params(PatchMerge().init, x))
    assert params["norm"]["scale"].shape == (12,)
    assert set(params["reduction"]) == {"kernel"}
    out = apply(PatchMerge(), params, x)
    four = np.concatenate([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], axis=-1)
    deviation = np.sqrt(four.var(axis=-1, keepdims=True) + 1e-6)
    normed = (four - four.mean(axis=-1, keepdims=True)) / deviation
    normed = normed * params["norm"]["scale"] + params["norm"]["bias"]
    np.testing.assert_allclose(out, normed @ params["reduction"]["kernel"], atol=2e-6)


@pytest.mark.parametrize("use_norm", [True, False])
def test_downsampling_is_a_convolution_of_stride_two(use_norm):
    x = normal((2, 4, 6, 3))
    module = ConvDownsample(5, use_norm=use_norm)
    params = jax.tree.map(np.asarray, random_params(module.init, x))
    assert ("norm" in params) == use_norm
    normed = x
    if use_norm:
        deviation = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
        normed = (x - x.mean(axis=-1, keepdims=True)) / deviation
        normed = normed * params["norm"]["scale"] + params["norm"]["bias"]
    kernel = np.asarray(params["proj"]["kernel"]).reshape(2, 2, 3, 5)
    expected = params["proj"]["bias"] + sum(
        normed[:, i::2, j::2] @ kernel[i, j] for i in (0, 1) for j in (0, 1)
    )
    np.testing.assert_allclose(apply(module, params, x), expected, atol=2e-6)
