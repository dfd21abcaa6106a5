"""Partial fine-tuning on ImageNet-1k: the last blocks are trained, the rest is frozen.

    python -m mae_jax.main --config=partial --config.init_from=runs/vit_l_800ep_raw
    python -m mae_jax.main --config=partial --config.init_from=... \
        --config.optimizer.trainable_blocks=0.5

One block unless told otherwise; 0.5 is the MLP of the last block. Variants: `vit_l` (the default,
as in the paper), `vit_b`, `vit_h`; `demo`, 100 digits with the encoder of `make demo`.

Expected on ImageNet, ViT-L, as the paper reports for 0.5, 1, 2, 4, 6, 12, 18, 24 blocks: 79.1,
81.0, 83.1, 84.2, 84.4, 84.6, 84.7, 84.9 % top-1 (figure 9); the best of 50, 100 and 200 epochs
(`--config.epochs`), fewer blocks needing more. 0 blocks are the linear probe, 73.5. We have not
run it.

Source: arXiv 2111.06377, section 4.3, with the settings of table 9, which has no random erasing.
"""

from ml_collections import ConfigDict

from mae_jax import recipes


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration."""
    config = recipes.finetune()
    if variant == "demo":
        config = recipes.digits_finetune(config)
    else:
        config = recipes.finetune_variant(config, f"{variant or 'vit_l'}_paper")
    config.optimizer.trainable_blocks = 1.0
    return config
