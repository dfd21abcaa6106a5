"""Fine-tuning of a pre-trained VideoMAE on labelled clips.

    python -m mae_jax.main --config=videomae_finetune --config.init_from=runs/videomae \
        --config.data.path=k400 --config.model.num_classes=400

Variants: a size and a set as in `videomae`, but for `vit_l_ssv2`; `motion`, digits that move, with
the encoder of `--config=videomae:motion`, and `motion_scratch`, the same without it. Each clip that
is decoded is cropped twice, and both are rows of the batch; the rate does not count the second.
Accuracy is that of probabilities averaged over 5 clips x 3 crops (Something-Something: 2 x 3).

Expected: see `videomae`. We have not run them to the end.

Source: arXiv 2203.12602; MCG-NJU/VideoMAE `FINETUNE.md`, `scripts`.
"""

from ml_collections import ConfigDict

from mae_jax import recipes

# Base rate, clips, crops of each, epochs, layer decay, drop path, rows mixed in one way (those of a
# GPU of the official command), classes.
PUBLISHED = {
    "vit_b_k400": (5e-4, 384, 2, 75.0, 0.75, 0.1, 12, 400),
    "vit_s_k400": (5e-4, 384, 2, 150.0, 0.75, 0.1, 12, 400),
    "vit_l_k400": (2e-3, 128, 2, 35.0, 0.75, 0.1, 4, 400),
    "vit_h_k400": (1e-3, 512, 2, 50.0, 0.75, 0.2, 16, 400),
    "vit_s_ssv2": (1e-3, 384, 2, 40.0, 0.7, 0.1, 12, 174),
    "vit_b_ssv2": (5e-4, 384, 2, 30.0, 0.75, 0.1, 12, 174),
    "vit_b_ucf101": (5e-4, 128, 2, 100.0, 0.7, 0.2, 32, 101),
}
DEMOS = ("motion", "motion_scratch")


def get_config(variant: str = "") -> ConfigDict:
    """Return the configuration."""
    variant = variant or "vit_b_k400"
    if variant not in (*PUBLISHED, *DEMOS):
        raise ValueError(f"variant {variant!r} is not one of {', '.join((*PUBLISHED, *DEMOS))}")
    config = recipes.video(recipes.finetune())
    data = config.data
    data.rand_augment = "rand-m7-n4-mstd0.5-inc1"
    if variant in DEMOS:
        return recipes.video_demo_finetune(config, variant)
    rate, batch_size, crops, epochs, layer_decay, drop_path, group, classes = PUBLISHED[variant]
    config.model.size = variant[:5]
    config.model.num_classes = classes
    config.model.drop_path_rate = drop_path
    if variant in ("vit_h_k400", "vit_b_ucf101"):
        config.model.head_dropout = 0.5
    config.batch_size, config.epochs = batch_size, epochs
    config.optimizer.base_learning_rate = rate
    config.optimizer.layer_decay = layer_decay
    data.crops_per_image = crops
    data.mixup_group = group
    data.test_clips, data.test_crops = 5, 3
    if variant.endswith("ssv2"):
        data.sampling = "uniform"
        data.flip = False  # left and right are part of the labels
        data.test_clips = 2
    # Per 256 clips, as the released code: as these two scripts say, else its default.
    least = 1e-5 if variant in ("vit_h_k400", "vit_b_ucf101") else 1e-6
    config.optimizer.min_learning_rate = config.get_ref("batch_size").to_float() * (least / 256)
    return config
