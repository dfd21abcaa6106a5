"""What configs share: pure functions that return ConfigDicts, with the source of each number.

Imports no jax, so that a configuration can be read and checked in an instant.
"""

from __future__ import annotations

from ml_collections import ConfigDict, config_dict

# Per-channel statistics of ImageNet in [0, 1], as facebookresearch/mae `main_pretrain.py` has them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def mae_pretrain() -> ConfigDict:
    """Return the official pre-training recipe of MAE on ImageNet at 224 pixels.

    Source: arXiv 2111.06377, appendix A.1, table 8, and the commands of facebookresearch/mae
    `PRETRAIN.md`: batch 4096, base rate 1.5e-4, 40 epochs of warm-up, 800 epochs.

    Fields without a value (`None`) take that of the model size. Steps count updates.
    """
    config = ConfigDict()
    config.task = "pretrain"
    config.seed = 0
    config.batch_size = 4096
    config.epochs = 800.0
    # Folder of a run or of converted weights to go on from, with a schedule of one's own.
    config.init_from = ""

    config.model = model = ConfigDict()
    model.name = "mae"
    model.size = "vit_b"
    model.image_size = (224, 224)
    model.channels = 3
    model.mask_ratio = 0.75
    model.norm_pix_loss = True
    model.use_cls_token = True
    model.positions = "fixed"
    model.mask_sampling = "random"
    model.mask_tokens_in_encoder = False
    model.loss_on = "hidden"
    model.patch_size = config_dict.placeholder(int)
    model.embed_dim = config_dict.placeholder(int)
    model.depth = config_dict.placeholder(int)
    model.num_heads = config_dict.placeholder(int)
    model.decoder_embed_dim = config_dict.placeholder(int)
    model.decoder_depth = config_dict.placeholder(int)
    model.decoder_num_heads = config_dict.placeholder(int)
    # "auto": bfloat16 on accelerators, float32 on CPU. Parameters are float32 in any case.
    model.dtype = "auto"

    config.data = data = ConfigDict()
    data.source = "tfds"
    data.path = "imagenet2012"
    data.split = "train"
    data.eval_split = "validation"
    # Share held out where the data have no split of their own.
    data.held_out = 0.1
    # Share of bad training images, which are replaced, that ends the run; 10 may be bad. Our own.
    data.max_bad_share = 0.001
    data.image_size = model.get_ref("image_size")  # one value: set either
    data.channels = model.get_ref("channels")
    data.mean = IMAGENET_MEAN
    data.std = IMAGENET_STD
    data.augment = "random_resized_crop"
    data.crop_scale = (0.2, 1.0)
    data.crop_ratio = (3 / 4, 4 / 3)
    data.flip = True
    # Evaluation: the short side is resized to image_size / crop_fraction, then cropped.
    data.crop_fraction = 224 / 256

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "adamw"
    optimizer.base_learning_rate = 1.5e-4  # per 256 images
    optimizer.min_learning_rate = 0.0
    optimizer.warmup_epochs = 40.0
    optimizer.weight_decay = 0.05
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
    optimizer.eps = 1e-8
    optimizer.clip_norm = 0.0  # 0: gradients are not clipped, as in the official pre-training
    # Average of the parameters, for read-outs, pictures and export; 0: none is kept.
    optimizer.ema_decay = 0.0

    config.eval = evaluation = ConfigDict()
    evaluation.every = 3120  # steps: 10 epochs of ImageNet; the end of the schedule always counts
    evaluation.batch_size = 256
    evaluation.train_examples = 20_000  # at most: features for read-outs, the mean predictor
    evaluation.val_examples = 10_000
    evaluation.readouts = True
    evaluation.pictures = 8

    config.run = run = ConfigDict()
    run.log_every = 20
    run.save_every = 312
    run.keep_checkpoints = 3
    run.max_nonfinite_steps = 5
    # Parts that a batch is cut into, one after the other: saves memory, changes no result.
    run.accumulation = 1
    # Decoding processes; -1: none up to 8 cores (threads serve), a quarter of the cores above.
    run.workers = -1
    run.mesh = ConfigDict({"data": -1, "fsdp": 1})
    return config


def pretrain_variant(config: ConfigDict, variant: str) -> ConfigDict:
    """Apply a variant such as `1600ep` or `800ep_raw` to an ImageNet pre-training config.

    Args:
      config: changed in place and returned.
      variant: parts joined by "_": `800ep` or `1600ep` (the whole schedule), `norm` or `raw` (the
        target); empty: 800 epochs with normalised targets.

    Raises:
      ValueError: if a part is unknown.
    """
    parts = {
        "800ep": ("epochs", 800.0),
        "1600ep": ("epochs", 1600.0),
        "norm": ("model.norm_pix_loss", True),
        "raw": ("model.norm_pix_loss", False),
    }
    for part in filter(None, variant.split("_")):
        if part not in parts:
            raise ValueError(f"variant {part!r} is not one of {', '.join(parts)}")
        name, value = parts[part]
        config.update_from_flattened_dict({name: value})
    return config
