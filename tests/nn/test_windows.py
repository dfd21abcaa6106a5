"""Windows of a grid."""

from __future__ import annotations

import numpy as np
import pytest

from mae_jax.nn.windows import partition, unpartition


def test_the_windows_of_a_small_grid_are_the_ones_seen_by_eye():
    grid = np.arange(24).reshape(1, 4, 6, 1)
    windows = np.asarray(partition(grid, (2, 3)))[0, :, :, 0]
    assert windows.tolist() == [
        [0, 1, 2, 6, 7, 8],
        [3, 4, 5, 9, 10, 11],
        [12, 13, 14, 18, 19, 20],
        [15, 16, 17, 21, 22, 23],
    ]


@pytest.mark.parametrize("window", [(1, 1), (2, 3), (4, 2), (4, 6)])
def test_windows_put_together_are_the_grid(window):
    grid = np.arange(2 * 4 * 6 * 5).reshape(2, 4, 6, 5)
    windows = partition(grid, window)
    assert windows.shape == (2, 24 // (window[0] * window[1]), window[0] * window[1], 5)
    assert np.array_equal(unpartition(windows, (4, 6), window), grid)
