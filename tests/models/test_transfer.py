"""Taking an encoder elsewhere: the same function where nothing changes, tables where grids do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.errors import ConfigError
from mae_jax.models.transfer import fill, make_classifier, transfer_encoder
from mae_jax.nn.pos_embed import resize_table, sincos_2d
from tests.weights import apply, normal, random_params


def encoder_params(model, encoder=None, seed=0):
    units = jnp.zeros((1, 4, model.unit.size))
    init = (encoder or model.encoder).init
    return random_params(init, units, jnp.arange(4)[None], seed=seed)


def transfer(model, params, target):
    return transfer_encoder(params, model.encoder, target, encoder_params(model, target, seed=1))


def encode(encoder, params, units):
    return apply(encoder, params, units, jnp.arange(units.shape[1])[None])


@pytest.mark.parametrize("use_cls_token", [True, False])
def test_fixed_positions_become_learned_ones_with_the_same_tokens(tiny_mae, use_cls_token):
    model = tiny_mae(depth=1, use_cls_token=use_cls_token)
    params = encoder_params(model)
    target = model.encoder.clone(positions="learned")
    moved = transfer(model, params, target)
    assert moved["pos_embed"].shape == (1, use_cls_token + 16, 16)
    units = normal((2, 16, model.unit.size))
    np.testing.assert_allclose(
        encode(target, moved, units), encode(model.encoder, params, units), atol=1e-6
    )


def test_the_norm_is_left_out_where_there_is_none(tiny_mae):
    model = tiny_mae(depth=1)
    target = model.encoder.clone(final_norm=False)
    moved = transfer(model, encoder_params(model), target)
    assert "norm" not in moved
    assert moved.keys() == {"block_00", "cls_token", "patch_embed"}


@pytest.mark.parametrize(
    ("options", "keeps_norm"),
    [
        ({"pooling": "mean"}, False),
        ({"pooling": "cls"}, True),
        ({"pooling": "cls", "norm_group": 2, "positions": "fixed"}, True),
        ({"pooling": "mean", "norm_group": 2}, True),
    ],
)
def test_a_classifier_takes_what_it_has_a_place_for(tiny_mae, options, keeps_norm):
    model = tiny_mae(depth=1)
    params = encoder_params(model)
    classifier = make_classifier(model.unit, model.encoder, 3, drop_path_rate=0.2, **options)
    moved = transfer(model, params, classifier.encoder)
    learned = options.get("positions", "learned") == "learned"
    expected = {"block_00", "cls_token", "patch_embed"}
    expected |= {"norm"} if keeps_norm else set()
    expected |= {"pos_embed"} if learned else set()
    assert moved.keys() == expected
    for name in expected - {"pos_embed"}:
        assert jax.tree.leaves(moved[name])[0] is jax.tree.leaves(params[name])[0], name
    assert classifier.encoder.drop_path_rate == 0.2
    assert model.encoder.drop_path_rate == 0.0


def test_head_is_filled_from_one_that_fits():
    head = {"linear": {"kernel": jnp.ones((16, 3)), "bias": jnp.ones(3)}}
    more = {**head, "norm": {"scale": jnp.ones(16)}}
    assert fill(head, more, "head") == head
    other = {"linear": {"kernel": jnp.ones((16, 5)), "bias": jnp.ones(5)}}
    with pytest.raises(ConfigError, match=r"^head/linear/(kernel|bias): expected shape .*3\], got"):
        fill(head, other, "head")
    with pytest.raises(ConfigError, match=r"^head/norm/scale is missing$"):
        fill(more, head, "head")


def test_positions_of_another_grid_are_resized_and_the_class_token_keeps_its_own(tiny_mae):
    model = tiny_mae(depth=1)
    classifier = make_classifier(model.unit, model.encoder, 3, image_size=(48, 64))
    moved = transfer(model, encoder_params(model), classifier.encoder)
    table = np.pad(sincos_2d(16, (4, 4)), ((1, 0), (0, 0)))[None]
    expected = resize_table(table, (4, 4), (6, 8), prefix=1)
    np.testing.assert_allclose(moved["pos_embed"], expected, atol=1e-6)
    assert not moved["pos_embed"][0, 0].any()


def test_what_does_not_fit_is_refused_by_name(tiny_mae):
    model = tiny_mae(depth=1)
    params = encoder_params(model)
    deeper = tiny_mae(depth=2).encoder
    with pytest.raises(ConfigError, match=r"^encoder/block_01/attn/proj/bias is missing$"):
        transfer(model, params, deeper)
    wrong = {**params, "norm": {"scale": jnp.ones(8), "bias": jnp.ones(16)}}
    with pytest.raises(ConfigError, match=r"encoder/norm/scale: expected shape \[16\], got \[8\]"):
        transfer(model, wrong, model.encoder)


def test_a_mask_token_comes_along_or_stays_fresh(tiny_mae):
    model = tiny_mae(depth=1)
    params = encoder_params(model)
    token, other = jnp.ones((1, 1, 16)), jnp.zeros((1, 1, 16))
    fresh = {**params, "mask_token": other}
    moved = transfer_encoder(params, model.encoder, model.encoder, fresh)
    assert "mask_token" not in moved  # the caller keeps the fresh one
    given = {**params, "mask_token": token}
    moved = transfer_encoder(given, model.encoder, model.encoder, fresh)
    assert moved["mask_token"] is token
    assert "mask_token" not in transfer_encoder(given, model.encoder, model.encoder, params)


def test_learned_positions_are_not_lost_silently(tiny_mae):
    learned, fixed = (tiny_mae(depth=1, positions=kind) for kind in ("learned", "fixed"))
    params = encoder_params(learned)
    with pytest.raises(ConfigError, match=r"model.positions 'fixed': .* has learned positions"):
        transfer_encoder(params, learned.encoder, fixed.encoder, encoder_params(fixed))
