"""MAE ViT-B/16 at 224 pixels on a folder of one's own images.

    python -m mae_jax.main --config=folder --config.data.path=/path/to/images

The folder may be flat, hold one folder a class (then read-outs are measured), or `train` and `val`;
JPEG, PNG and WebP count, at any depth. Without a split a tenth is held out. On a CPU, or for a
first look, take a small model: `--config.model.size=vit_s --config.model.image_size=96`.

Expected: the loss starts near 1.0 (normalised targets) and falls below 0.8 within some hundred
steps on natural photographs; see `docs/pictures-and-losses.md`.

Source: the recipe of arXiv 2111.06377 with a batch for one device and a schedule for thousands
rather than a million of images. The base rate is the paper's.
"""

from ml_collections import ConfigDict

from mae_jax import recipes


def get_config() -> ConfigDict:
    """Return the configuration."""
    config = recipes.mae_pretrain()
    config.data.source = "folder"
    config.data.path = ""
    config.batch_size = 64
    config.epochs = 400.0
    config.optimizer.warmup_epochs = 20.0
    config.eval.every = 500
    config.eval.batch_size = 64
    config.eval.train_examples = 5_000
    config.eval.val_examples = 1_000
    config.run.save_every = 250
    return config
