"""The mean corruption error of ImageNet-C: errors weighed by how hard a corruption is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mae_jax.errors import ConfigError

SEVERITIES = 5

# AlexNet's mean error over the severities of each corruption. By name: lists of these numbers go
# around that are paired with names in another order. The four further corruptions of the set
# (speckle noise, Gaussian blur, spatter, saturate) are for validation and not part of the mean.
# Source: Hendrycks and Dietterich, arXiv 1903.12261.
ALEXNET_ERRORS: Mapping[str, float] = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}


def mean_corruption_error(errors: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """Return the mean corruption error and the plain mean error, both in percent.

    The first is the mean over corruptions of a model's mean error over severities, divided by
    AlexNet's; the second divides by nothing.

    Args:
      errors: corruption -> its error at each of the 5 severities, in [0, 1].

    Raises:
      ConfigError: if a corruption is missing or not one of the 15, has not 5 errors, or one of them
        is not in [0, 1].

    Source: Hendrycks and Dietterich, arXiv 1903.12261, section 4.
    """
    for wrong, names in (
        ("missing", ALEXNET_ERRORS.keys() - errors.keys()),
        ("unknown", errors.keys() - ALEXNET_ERRORS.keys()),
    ):
        if names:
            raise ConfigError(
                f"corruptions: expected the {len(ALEXNET_ERRORS)} of ImageNet-C,"
                f" {wrong}: {', '.join(sorted(names))}"
            )
    for name, values in errors.items():
        if len(values) != SEVERITIES:
            raise ConfigError(
                f"corruption {name}: expected errors at {SEVERITIES} severities, got {len(values)}"
            )
        if not all(0 <= value <= 1 for value in values):
            raise ConfigError(f"corruption {name}: expected errors in [0, 1], got {list(values)}")
    # In one order, so that the sums are rounded alike for any order of `errors`.
    means = {name: np.mean(errors[name]) for name in ALEXNET_ERRORS}
    relative = [mean / ALEXNET_ERRORS[name] for name, mean in means.items()]
    return 100.0 * float(np.mean(relative)), 100.0 * float(np.mean(list(means.values())))
