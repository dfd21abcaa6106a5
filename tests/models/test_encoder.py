"""What all encoders share: layers of parameters, drop path, and taking tables elsewhere."""

import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.errors import ConfigError
from mae_jax.models.encoder import Encoder
from mae_jax.models.transfer import transfer_encoder
from mae_jax.nn.pos_embed import bicubic_matrix, resize_relative_table


class Pyramid(Encoder):
    """Three stages, and positions that can be learned."""

    grid_size: tuple[int, int] = (2, 3)
    positions: str = "none"
    drop_path_rate: float = 0.5
    final_norm: bool = True

    @property
    def depths(self):
        return (2, 1, 3)

    @property
    def position_grid(self):
        return (4, 6)

    def fixed_table(self):
        return np.ones((1, 24, 4), np.float32)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("patch_embed/kernel", 0),
        ("pos_embed", 0),
        ("mask_token", 0),
        ("block_00/norm1/scale", 1),
        ("block_05/attn/bias/table", 6),
        ("downsample_1/reduction/kernel", 3),
        ("downsample_2/norm/bias", 4),
        ("norm/scale", 7),
        ("", 7),
    ],
)
def test_layers_count_blocks_through_all_stages(name, layer):
    assert Pyramid().layer_id(name) == layer
    assert Pyramid().top_layer == 7


def test_drop_path_grows_linearly_over_all_blocks():
    rates = [Pyramid().drop_path(i, None)[0] for i in range(6)]
    np.testing.assert_allclose(rates, np.linspace(0, 0.5, 6))


def test_backbone_is_the_same_encoder_with_other_fields():
    backbone = Pyramid().as_backbone(grid_size=(4, 4), drop_path_rate=0.1)
    assert backbone == Pyramid(grid_size=(4, 4), drop_path_rate=0.1)


def test_missing_tables_stay_fresh_and_tables_of_another_window_are_resized():
    table = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32)
    params = {
        "block_00": {"attn": {"bias": {"table": table}}, "norm1": {"scale": jnp.ones(3)}},
        "norm": {"scale": jnp.ones(3)},
    }
    fresh = {
        "block_00": {
            "attn": {"bias": {"table": jnp.zeros((7, 3, 2))}},
            "norm1": {"scale": jnp.zeros(3)},
        },
        "block_01": {"attn": {"bias": {"table": jnp.zeros((7, 3, 2))}}},
        "mask_token": jnp.zeros((1, 1, 3)),
    }
    taken = transfer_encoder(params, Pyramid(), Pyramid(), fresh)
    assert taken.keys() == {"block_00"}
    by_hand = np.einsum("ih,hwk->iwk", bicubic_matrix(5, 7), table)
    np.testing.assert_allclose(taken["block_00"]["attn"]["bias"]["table"], by_hand, atol=1e-6)
    del fresh["block_01"]
    fresh["downsample_1"] = {"norm": {"scale": jnp.zeros(3)}}
    with pytest.raises(ConfigError, match="encoder/downsample_1/norm/scale is missing"):
        transfer_encoder(params, Pyramid(), Pyramid(), fresh)


def test_learned_positions_start_as_the_fixed_table_of_the_position_grid():
    target = Pyramid(positions="learned")
    fresh = {"pos_embed": jnp.zeros((1, 24, 4))}
    taken = transfer_encoder({}, Pyramid(), target, fresh)
    np.testing.assert_array_equal(taken["pos_embed"], np.ones((1, 24, 4)))


def test_a_table_of_another_rank_is_refused():
    with pytest.raises(
        ConfigError, match=r"table: expected \[2 h - 1, 2 w - 1, heads\], got \[9, 2\]"
    ):
        resize_relative_table(np.zeros((9, 2)), (5, 5))
