"""MAE ViT-Huge/14 on ImageNet-1k at 224 pixels: the official recipe.

    python -m mae_jax.main --config=configs/vit_h.py
    python -m mae_jax.main --config=configs/vit_h.py:1600ep_raw

The data are TFDS `imagenet2012`, prepared as array_record (`docs/data.md`). A folder does as well:
`--config.data.source=folder --config.data.path=/path/to/imagenet`.

Variants, joined by "_": `800ep` (the default) or `1600ep`; `norm` (the default, targets normalised
for each patch) or `raw` (pixels; the pictures of the paper).

Expected: the paper reports, for 1600 epochs with normalised targets, 86.9 % top-1 on ImageNet after
fine-tuning (table 3) and 76.6 % for a linear probe (table 12). We have not run it to the end.
One step costs 290.29 GFLOP per image.

Source: arXiv 2111.06377, appendix A.1; facebookresearch/mae `PRETRAIN.md`.
"""

from ml_collections import ConfigDict

from mae_jax import recipes


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration."""
    config = recipes.mae_pretrain()
    config.model.size = "vit_h"
    return recipes.pretrain_variant(config, variant)
