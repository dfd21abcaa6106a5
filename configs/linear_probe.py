"""Linear probing on ImageNet-1k: a linear layer on the frozen class token.

    python -m mae_jax.main --config=linear_probe:vit_l --config.init_from=runs/vit_l_1600ep

Variants: `vit_b` (the default), `vit_l`, `vit_h`; `demo`, 100 digits with the encoder of `make
demo`. The batch of 16,384 images is cut into parts by `--config.run.accumulation=16`.

Expected on ImageNet, as the paper reports: 68.0 (B), 75.8 (L), 76.6 (H) % top-1 (table 12); the
official code gives 67.8, 76.0, 77.2, and says that 50 epochs are enough for L and H. We have not
run it.

Source: arXiv 2111.06377, table 10; facebookresearch/mae `main_linprobe.py`.
"""

from ml_collections import ConfigDict

from mae_jax import recipes


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration."""
    config = recipes.linear_probe()
    if variant == "demo":
        return recipes.digits_linear_probe(config)
    return recipes.size_variant(config, variant)
