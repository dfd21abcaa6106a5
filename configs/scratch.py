"""Supervised training from scratch on ImageNet-1k, the paper's baseline.

    python -m mae_jax.main --config=scratch:vit_l

Variants: `vit_b` (the default), `vit_l`, `vit_h`; `demo`, 100 digits.

Expected on ImageNet, as the paper reports: 82.3 (B), 82.6 (L), 83.1 (H) % top-1 of the averaged
weights (table 3). Users could not fully match it (81.9 and 82.0, facebookresearch/mae issue 41). We
have not run it.

Source: arXiv 2111.06377, appendix A.2, table 11.
"""

from ml_collections import ConfigDict

from mae_jax import recipes


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration."""
    config = recipes.scratch()
    if variant == "demo":
        return recipes.digits_scratch(config)
    return recipes.scratch_variant(config, variant)
