"""MAE for small colour images, 32 x 32 (the size of CIFAR), from a folder.

    python -m mae_jax.main --config=small --config.data.path=/path/to/images

Patches of 4 pixels, so that there are 64 of them, and a narrow decoder. Larger images are resized.

Source: our own set-up: ViT-Tiny width (192, 12 blocks; DeiT, arXiv 2012.12877) with a decoder of
128 x 4; the crop is milder than ImageNet's because 32 pixels leave little to crop.
"""

from ml_collections import ConfigDict

from mae_jax import recipes


def get_config() -> ConfigDict:
    """Return the configuration."""
    config = recipes.mae_pretrain()
    config.data.source = "folder"
    config.data.path = ""
    config.batch_size = 256
    config.epochs = 400.0

    config.model.size = "vit_s"
    config.model.image_size = (32, 32)
    config.model.patch_size = 4
    config.model.embed_dim = 192
    config.model.num_heads = 3
    config.model.decoder_embed_dim = 128
    config.model.decoder_num_heads = 4

    config.data.crop_scale = (0.4, 1.0)
    config.data.crop_fraction = 1.0

    config.optimizer.base_learning_rate = 1e-3
    config.optimizer.warmup_epochs = 20.0

    config.eval.every = 2_000
    config.run.save_every = 500
    return config
