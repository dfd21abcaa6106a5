"""End-to-end fine-tuning of a pre-trained encoder on ImageNet-1k, by the official recipes.

    python -m mae_jax.main --config=finetune:vit_b --config.init_from=runs/vit_b_1600ep
    python -m mae_jax.main --config=finetune:vit_l_paper --config.init_from=runs/vit_l_800ep_raw

Variants: `vit_b` (the default), `vit_l` or `vit_h`, the official commands for weights trained with
normalised targets for 1600 epochs; with `_paper` table 9, for raw pixels and 800 epochs; `_448` for
448 pixels; `demo`, 100 digits with the encoder of `make demo`.

`init_from` is the folder of a run or of converted weights (`docs/weights.md`). Data of one's own:
`--config.data.source=folder --config.data.path=DIR --config.model.num_classes=7`.

Expected on ImageNet, as the paper and the official code report: 83.6 (B), 85.9 (L), 86.9 (H) %
top-1 (table 3); for `_paper` 84.9 (L; table 1). We have not run them. For 448 pixels, where the
paper has 87.8 (H), no recipe is published; users of the official code met NaN near epoch 30 in
half precision: stay with bfloat16 or float32 and mean pooling, and if need be clip
(`--config.optimizer.clip_norm=1.0`).

Source: arXiv 2111.06377, table 9; facebookresearch/mae `FINETUNE.md`.
"""

from ml_collections import ConfigDict

from mae_jax import recipes


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration."""
    config = recipes.finetune()
    if variant == "demo":
        return recipes.digits_finetune(config)
    return recipes.finetune_variant(config, variant)
