"""Position tables on other grids, against PyTorch's own interpolation."""

from __future__ import annotations

import numpy as np
import pytest

from mae_jax.nn.pos_embed import resize_table

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize(
    ("old", "new"), [((14, 14), (24, 24)), ((16, 16), (14, 14)), ((14, 14), (10, 18))]
)
def test_resized_table_is_that_of_pytorch(old, new):
    import torch

    rng = np.random.default_rng(0)
    table = rng.standard_normal((1, 1 + old[0] * old[1], 64)).astype(np.float32)
    grid = torch.from_numpy(table[:, 1:]).reshape(1, *old, 64).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    theirs = theirs.permute(0, 2, 3, 1).reshape(1, -1, 64).numpy()
    ours = resize_table(table, old, new, prefix=1)
    np.testing.assert_array_equal(ours[:, 0], table[:, 0])
    difference = np.abs(ours[:, 1:] - theirs).max()
    print(f"{old} to {new}: {difference:.2g} apart, of values up to {np.abs(theirs).max():.2g}")
    assert difference <= 1e-5
