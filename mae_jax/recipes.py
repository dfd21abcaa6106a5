"""What configs share: pure functions that return ConfigDicts, with the source of each number.

Imports no jax, so that a configuration can be read and checked in an instant.
"""

from __future__ import annotations

from collections.abc import Sequence

from ml_collections import ConfigDict, config_dict

# Per-channel statistics of ImageNet in [0, 1], as facebookresearch/mae `main_pretrain.py` has them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# The same of CC12M, as young-geng/m3ae_public `data.py` has them.
CC12M_MEAN = (0.5762, 0.5503, 0.5213)
CC12M_STD = (0.3207, 0.3169, 0.3307)


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

    config.model = model = _encoder()
    model.mask_ratio = 0.75
    model.norm_pix_loss = True
    model.positions = "fixed"
    model.mask_sampling = "random"
    model.mask_tokens_in_encoder = False
    model.loss_on = "hidden"
    model.decoder_embed_dim = config_dict.placeholder(int)
    model.decoder_depth = config_dict.placeholder(int)
    model.decoder_num_heads = config_dict.placeholder(int)

    config.data = data = _data(model)
    data.augment = "random_resized_crop"
    data.crop_scale = (0.2, 1.0)
    data.crop_ratio = (3 / 4, 4 / 3)
    data.flip = True
    # Evaluation: the short side is resized to image_size / crop_fraction, then cropped.
    data.crop_fraction = 224 / 256

    config.optimizer = optimizer = _adamw()
    optimizer.base_learning_rate = 1.5e-4  # per 256 images
    optimizer.warmup_epochs = 40.0
    optimizer.b2 = 0.95

    config.eval = evaluation = ConfigDict()
    evaluation.every = 3120  # steps: 10 epochs of ImageNet; the end of the schedule always counts
    evaluation.batch_size = 256
    evaluation.train_examples = 20_000  # at most: features for read-outs, the mean predictor
    evaluation.val_examples = 10_000
    evaluation.readouts = True
    evaluation.pictures = 8

    config.run = _run(save_every=312)
    return config


def finetune() -> ConfigDict:
    """Return the official end-to-end fine-tuning of MAE ViT-B on ImageNet at 224 pixels.

    Source: the commands of facebookresearch/mae `FINETUNE.md` for the released weights; where they
    differ from table 9 of arXiv 2111.06377 see `finetune_variant`.

    Fields without a value (`None`) take that of the model size, or of the rule beside them.
    """
    config = ConfigDict()
    config.task = "finetune"
    config.seed = 0
    config.batch_size = 1024
    config.epochs = 100.0
    # Folder of a run or of converted weights; "scratch": none, on purpose.
    config.init_from = ""

    config.model = model = _encoder()
    model.positions = "learned"
    model.num_classes = 1000
    model.pooling = "mean"  # or "cls"
    model.drop_path_rate = 0.1
    model.head_dropout = 0.0  # share of what the last layer sees
    model.norm_group = 0  # examples of a group of the probe's batch norm; 0: none

    config.data = data = _data(model)
    data.per_class = 0  # labelled images of each class to train on, drawn by the seed; 0: all
    data.augment = "random_resized_crop"
    data.crop_scale = (0.08, 1.0)
    data.crop_ratio = (3 / 4, 4 / 3)
    data.flip = True
    data.rand_augment = "rand-m9-mstd0.5-inc1"  # "": none
    data.erasing_probability = 0.25
    data.mixup_alpha = 0.8
    data.cutmix_alpha = 1.0
    data.mixup_probability = 1.0
    data.mixup_switch_probability = 0.5
    data.mixup_group = 32  # images mixed in one way: the batch of a GPU of the official command
    data.label_smoothing = 0.1
    # Evaluation, as in pre-training; None: 224 / 256 up to 224 pixels, 1 above (the whole image).
    data.crop_fraction = config_dict.placeholder(float)

    config.optimizer = optimizer = _adamw()
    optimizer.base_learning_rate = 5e-4  # per 256 images
    optimizer.min_learning_rate = 1e-6
    optimizer.warmup_epochs = 5.0
    optimizer.b2 = 0.999
    optimizer.no_decay = ("cls_token", "pos_embed")  # beside all vectors
    optimizer.layer_decay = 0.65
    # Last blocks to train, in halves; 0: the head alone; -1: everything.
    optimizer.trainable_blocks = -1.0

    config.eval = evaluation = ConfigDict()
    evaluation.every = 1251  # steps: an epoch of ImageNet; the end of the schedule always counts
    evaluation.batch_size = 256

    config.run = _run(save_every=417)
    return config


def linear_probe() -> ConfigDict:
    """Return the official linear probe: the class token, a batch norm, LARS, a frozen encoder.

    Source: arXiv 2111.06377, table 10, and facebookresearch/mae `FINETUNE.md`; batch 16384 on 32
    GPUs, each of which normalises its 512 images.
    """
    config = finetune()
    config.batch_size = 16384
    config.epochs = 90.0
    config.model.positions = "fixed"  # frozen in any case
    config.model.pooling = "cls"
    config.model.drop_path_rate = 0.0
    config.model.norm_group = 512
    config.data.augment = "random_resized_crop_clamped"
    _no_mixing(config)
    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "lars"
    optimizer.base_learning_rate = 0.1
    optimizer.min_learning_rate = 0.0
    optimizer.warmup_epochs = 10.0
    optimizer.weight_decay = 0.0
    optimizer.momentum = 0.9
    optimizer.trust_coefficient = 0.001
    optimizer.ema_decay = 0.0
    optimizer.layer_decay = 1.0
    optimizer.trainable_blocks = 0.0
    config.eval.every = 780  # 10 epochs of ImageNet
    config.run.save_every = 78
    return config


def scratch() -> ConfigDict:
    """Return the paper's supervised training from scratch, of ViT-B on ImageNet at 224 pixels.

    Source: arXiv 2111.06377, appendix A.2, table 11. The paper does not name the pooling; ours is
    that of fine-tuning.
    """
    config = finetune()
    config.init_from = "scratch"
    config.batch_size = 4096
    config.epochs = 300.0
    config.data.erasing_probability = 0.0
    config.optimizer.base_learning_rate = 1e-4
    config.optimizer.min_learning_rate = 0.0
    config.optimizer.warmup_epochs = 20.0
    config.optimizer.weight_decay = 0.3
    config.optimizer.b2 = 0.95
    config.optimizer.layer_decay = 1.0
    config.optimizer.ema_decay = 0.9999
    config.eval.every = 3120
    config.run.save_every = 312
    return config


def measurement(task: str) -> ConfigDict:
    """Return what the measurements of a checkpoint share: nothing is trained.

    Args:
      task: "knn", "few_shot" or "evaluate".

    Fields of `data` without a value (`None`) are those of the checkpoint.
    """
    config = ConfigDict()
    config.task = task
    config.seed = 0
    config.init_from = ""
    config.data = data = ConfigDict()
    for name in ("source", "path", "split", "eval_split"):
        data[name] = config_dict.placeholder(str)
    data.held_out = config_dict.placeholder(float)
    data.crop_fraction = config_dict.placeholder(float)
    data.max_bad_share = config_dict.placeholder(float)
    config.eval = ConfigDict({"batch_size": 256})
    config.run = ConfigDict({"mesh": {"data": -1, "fsdp": 1}})
    return config


def digits(config: ConfigDict, *, batch_size: int) -> ConfigDict:
    """Make a config one of the packaged digits, for the encoder that `configs/demo.py` trains.

    Source: our own set-up.
    """
    config.batch_size = batch_size
    config.model.size = "vit_s"
    config.model.image_size = (28, 28)
    config.model.channels = 1
    config.model.patch_size = 4
    config.model.embed_dim = 64
    config.model.depth = 4
    config.model.num_heads = 4
    config.data.source = "digits"
    config.data.path = ""
    config.data.held_out = 0.2
    config.data.mean = (0.1307,)  # of MNIST's training images, as usually quoted
    config.data.std = (0.3081,)
    config.data.crop_scale = (0.6, 1.0)
    config.data.resample = "pil"  # what the figures of the documents were measured with
    config.data.flip = False  # a mirrored digit is no digit
    config.data.crop_fraction = 1.0
    config.eval.batch_size = 250
    return config


def digits_at_64(config: ConfigDict) -> ConfigDict:
    """Make a config on the digits one at 64 pixels, of 8 epochs: so is the demo of each method."""
    config.model.image_size = (64, 64)
    config.model.norm_pix_loss = False
    config.batch_size = 32  # 1,000 small steps take these models further than 250 large ones
    config.epochs = 8.0
    config.optimizer.warmup_epochs = 1.0
    config.optimizer.base_learning_rate = 1.2e-2
    config.eval.every = 0  # at the end alone
    config.run.save_every = 500
    return config


def digits_finetune(config: ConfigDict) -> ConfigDict:
    """Make a config fine-tune the encoder of `make demo` on ten labels a class."""
    config = _digits_labels(config)
    config.optimizer.base_learning_rate = 1.2e-2
    config.optimizer.layer_decay = 0.75
    return config


def digits_linear_probe(config: ConfigDict) -> ConfigDict:
    """Make a config probe the encoder of `make demo` on ten labels a class."""
    config = _digits_labels(config)
    config.model.norm_group = config.batch_size
    # LARS trusts a step to change 0.001 of a weight's norm; there are 102 of them.
    config.optimizer.base_learning_rate = 300.0
    return config


def digits_scratch(config: ConfigDict) -> ConfigDict:
    """Make a config train the encoder of `make demo` from scratch on ten labels a class."""
    config = _digits_labels(config)
    config.init_from = "scratch"
    config.epochs = 170.0  # five times those of fine-tuning: there is more to learn
    config.optimizer.warmup_epochs = 15.0
    config.optimizer.base_learning_rate = 1.2e-2
    config.optimizer.weight_decay = 0.05
    config.optimizer.ema_decay = 0.97  # a run has 510 steps
    return config


def _digits_labels(config: ConfigDict) -> ConfigDict:
    """Make a config train on 100 labelled digits, without what is for large sets."""
    config = digits(config, batch_size=32)
    config.init_from = "runs/demo"
    config.epochs = 34.0  # of 3 steps
    config.model.num_classes = 10
    config.model.drop_path_rate = 0.0
    config.data.per_class = 10
    _no_mixing(config)
    config.optimizer.warmup_epochs = 3.0
    config.eval.every = 0  # at the end alone
    config.run.save_every = 60
    return config


def _encoder() -> ConfigDict:
    """Return the fields of `model` that an encoder needs."""
    model = ConfigDict()
    model.name = "mae"
    model.size = "vit_b"
    model.image_size = (224, 224)
    model.channels = 3
    model.use_cls_token = True
    model.patch_size = config_dict.placeholder(int)
    model.embed_dim = config_dict.placeholder(int)
    model.depth = config_dict.placeholder(int)
    model.num_heads = config_dict.placeholder(int)
    # "auto": bfloat16 on accelerators, float32 on CPU. Parameters are float32 in any case.
    model.dtype = "auto"
    return model


def _data(model: ConfigDict) -> ConfigDict:
    """Return the fields of `data` on where images come from, for ImageNet."""
    data = ConfigDict()
    data.source = "tfds"
    data.path = "imagenet2012"
    data.split = "train"
    data.eval_split = "validation"
    # Share held out where the data have no split of their own.
    data.held_out = 0.1
    # Share of bad images, which are replaced in training and left out of what is measured, that
    # ends the run; 10 may be bad. Our own.
    data.max_bad_share = 0.001
    # Of training images: "fast", which differs from Pillow by little, or "pil", Pillow bit for bit.
    data.resample = "fast"
    data.crops_per_image = 1  # of each image that is decoded, each a row beside `batch_size`
    data.image_size = model.get_ref("image_size")  # one value: set either
    data.channels = model.get_ref("channels")
    data.mean = IMAGENET_MEAN
    data.std = IMAGENET_STD
    return data


def _adamw() -> ConfigDict:
    """Return the fields of `optimizer` with what all official recipes have in common."""
    optimizer = ConfigDict()
    optimizer.name = "adamw"
    optimizer.min_learning_rate = 0.0
    optimizer.weight_decay = 0.05
    optimizer.b1 = 0.9
    optimizer.eps = 1e-8
    optimizer.clip_norm = 0.0  # 0: gradients are not clipped, as in the official recipes
    # Average of the parameters, for read-outs, pictures and export; 0: none is kept.
    optimizer.ema_decay = 0.0
    return optimizer


def _run(*, save_every: int) -> ConfigDict:
    """Return the fields of `run`."""
    run = ConfigDict()
    run.log_every = 20
    run.save_every = save_every
    run.keep_checkpoints = 3
    run.max_nonfinite_steps = 5
    # Parts that a batch is cut into, one after the other: saves memory, changes no result.
    run.accumulation = 1
    # Decoding processes; -1: none up to 8 cores (threads serve), a quarter of the cores above.
    run.workers = -1
    # In each of these, or without any; -1: as many as there are cores for, at most 4, or 8.
    run.threads = -1
    # What the backward pass makes again, to save memory: "none"; "products": all but products of
    # weights; "block": whole blocks. Changes no result.
    run.remat = "none"
    # What attends in each part: "xla", or, on NVIDIA GPUs in bfloat16, "cudnn", which takes neither
    # biases nor masks.
    run.attention = ConfigDict({"encoder": "xla", "decoder": "xla"})
    # Folder of compiled programs; "auto": in the user's cache; "": none.
    run.compilation_cache = "auto"
    run.mesh = ConfigDict({"data": -1, "fsdp": 1})
    return run


def _no_mixing(config: ConfigDict) -> None:
    """Switch off what turns images and labels into something between."""
    config.data.rand_augment = ""
    config.data.erasing_probability = 0.0
    config.data.mixup_alpha = 0.0
    config.data.cutmix_alpha = 0.0
    config.data.label_smoothing = 0.0


# Base rate, layer decay, drop path, epochs of fine-tuning.
_OFFICIAL_FINETUNE = {  # facebookresearch/mae FINETUNE.md
    "vit_b": (5e-4, 0.65, 0.1, 100.0),
    "vit_l": (1e-3, 0.75, 0.2, 50.0),
    "vit_h": (1e-3, 0.75, 0.3, 50.0),
}
_PAPER_FINETUNE = {  # arXiv 2111.06377, table 9
    "vit_b": (1e-3, 0.75, 0.1, 100.0),
    "vit_l": (1e-3, 0.75, 0.1, 50.0),
    "vit_h": (1e-3, 0.75, 0.2, 50.0),
}
# Drop path, epochs of training from scratch: arXiv 2111.06377, table 11.
_SCRATCH = {"vit_b": (0.1, 300.0), "vit_l": (0.2, 200.0), "vit_h": (0.2, 200.0)}


def split_variant(variant: str, default: str) -> tuple[str, list[str]]:
    """Return the size that a variant such as `vit_h_448` begins with, and its other parts.

    Args:
      variant: `vit_b`, `vit_l` or `vit_h`, and what follows, joined by "_"; empty: `default`.
      default: a size.

    Raises:
      ValueError: if there is no such size.
    """
    variant = variant or default
    size = variant[:5]
    if size not in _OFFICIAL_FINETUNE or variant[5:6] not in ("", "_"):
        sizes = ", ".join(_OFFICIAL_FINETUNE)
        raise ValueError(f"variant {variant!r} does not begin with one of {sizes}")
    return size, [part for part in variant[6:].split("_") if part]


def finetune_variant(config: ConfigDict, variant: str) -> ConfigDict:
    """Apply a variant such as `vit_l`, `vit_l_paper` or `vit_h_448` to a fine-tuning config.

    Args:
      config: changed in place and returned.
      variant: the size, then `paper` (table 9, for weights trained on raw pixels for 800 epochs,
        without random erasing) in place of the official commands (for those with normalised targets
        and 1600 epochs), and `448` pixels.

    Raises:
      ValueError: if a part is unknown.
    """
    size, parts = split_variant(variant, "vit_b")
    for part in parts:
        if part not in ("paper", "448"):
            raise ValueError(f"variant {part!r} is not one of paper, 448")
    table = _PAPER_FINETUNE if "paper" in parts else _OFFICIAL_FINETUNE
    rate, layer_decay, drop_path, epochs = table[size]
    config.model.size = size
    config.optimizer.base_learning_rate = rate
    config.optimizer.layer_decay = layer_decay
    config.model.drop_path_rate = drop_path
    config.epochs = epochs
    if size == "vit_h":
        config.data.mixup_group = 16  # 64 GPUs share the batch
    if "paper" in parts:
        config.data.erasing_probability = 0.0
    if "448" in parts:
        config.model.image_size = (448, 448)
    return config


def size_variant(config: ConfigDict, variant: str) -> ConfigDict:
    """Apply a variant that is a size, `vit_b` unless given, and nothing else.

    Raises:
      ValueError: if it is unknown.
    """
    size, parts = split_variant(variant, "vit_b")
    if parts:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(_SCRATCH)}")
    config.model.size = size
    return config


def scratch_variant(config: ConfigDict, variant: str) -> ConfigDict:
    """Apply a size to a config of training from scratch.

    Raises:
      ValueError: if it is unknown.
    """
    config = size_variant(config, variant)
    config.model.drop_path_rate, config.epochs = _SCRATCH[config.model.size]
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


def hivit(config: ConfigDict, variant: str) -> ConfigDict:
    """Make a config of pre-training or fine-tuning one of HiViT.

    Args:
      config: changed in place and returned.
      variant: "base" (also if empty), "small" or "tiny"; "demo": digits enlarged to 64 pixels, 8 x
        8 units, for which `digits` has been applied.

    Raises:
      ValueError: if it is unknown.
    """
    _stem_method(config, "hivit", variant, ("base", "small", "tiny", "demo"))
    config.model.positions = "learned"
    if variant == "demo":
        config.model.size = "tiny"
        config.model.depths = (1, 1, 3)
        config.model.num_heads = 4
    return config


def mixmim(config: ConfigDict, variant: str) -> ConfigDict:
    """Make a config of pre-training or fine-tuning one of MixMIM.

    Args:
      config: changed in place and returned.
      variant: "base" (also if empty), "large" or "huge"; "demo": digits enlarged to 64 pixels, 4 x
        4 cells, for which `digits` has been applied.

    Raises:
      ValueError: if it is unknown.
    """
    _stem_method(config, "mixmim", variant, ("base", "large", "huge", "demo"))
    config.model.positions = "fixed"
    config.model.window_sizes = config_dict.placeholder(tuple)
    if variant == "demo":
        config.model.size = "base"
        config.model.depths = (1, 1, 1, 1)
        config.model.num_heads = 1
        config.model.window_sizes = (8, 8, 8, 4)
    return config


def _stem_method(config: ConfigDict, name: str, variant: str, known: Sequence[str]) -> None:
    """Give `config.model` the fields of a method with stages above a stem of small patches.

    Raises:
      ValueError: if the variant is none of `known`, of which the first is meant if it is empty.
    """
    variant = variant or known[0]
    if variant not in known:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(known)}")
    model = config.model
    for field in ("use_cls_token", "patch_size", "embed_dim", "depth"):
        del model[field]
    model.name = name
    model.size = variant
    model.stem_patch_size = config_dict.placeholder(int)
    model.stem_dim = config_dict.placeholder(int)
    model.depths = config_dict.placeholder(tuple)
    if variant == "demo":
        model.image_size = (64, 64)
        model.stem_patch_size = 2
        model.stem_dim = 16


# Warm-up, epochs of pre-training; layer decay, drop path, images mixed in one way (those that a GPU
# has at once) of fine-tuning: implus/UM-MAE `Makefile`.
_UM_MAE = {
    "swin_t": (10.0, 200.0, 0.85, 0.1, 64),
    "swin_l": (40.0, 800.0, 0.7, 0.2, 32),
    "pvt_s": (10.0, 200.0, 0.85, 0.1, 64),
    "vit_b": (10.0, 200.0, 0.8, 0.1, 64),
}
_UM_MAE_DEMOS = {"demo": "swin_t", "demo_pvt": "pvt_s", "demo_vit": "vit_b"}


def um_mae(config: ConfigDict, variant: str, known: Sequence[str]) -> ConfigDict:
    """Make a config of pre-training or fine-tuning one of UM-MAE, or of SimMIM beside it.

    Args:
      config: changed in place and returned.
      variant: a name in `known`, the first if empty: `swin_t`, `swin_l`, `pvt_s`, `vit_b`, or one
        of the digits, enlarged to 64 pixels, `demo` (Swin), `demo_pvt`, `demo_vit`, for which
        `digits` has been applied.
      known: the variants that there are.

    Raises:
      ValueError: if the variant is unknown.
    """
    variant = variant or known[0]
    if variant not in known:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(known)}")
    demo = variant in _UM_MAE_DEMOS
    size = _UM_MAE_DEMOS.get(variant, variant)
    model = config.model
    for name in ("use_cls_token", "patch_size", "depth"):
        del model[name]
    model.name = "um_mae"
    model.size = size
    model.depths = config_dict.placeholder(tuple)
    model.embed_dim = config_dict.placeholder(int)
    model.num_heads = config_dict.placeholder(int)
    side = "patch_size" if size == "vit_b" else "stem_patch_size"
    model[side] = config_dict.placeholder(int)
    if size.startswith("swin"):
        model.positions = "none"
        model.window_size = config_dict.placeholder(int)
    if size != "vit_b":
        model.image_size = (256, 256)
    if demo:
        model.image_size = (64, 64)
        model[side] = 8 if size == "vit_b" else 2
        model.embed_dim = 64 if size == "vit_b" else 16
        model.depths = (4,) if size == "vit_b" else (1, 1, 1, 1)
        model.num_heads = 4 if size == "vit_b" else 1
        if size == "swin_t":
            model.window_size = 8
    return config


def um_mae_pretrain(config: ConfigDict, variant: str, known: Sequence[str]) -> ConfigDict:
    """Apply the schedule of UM-MAE's pre-training, and `um_mae`."""
    config = um_mae(config, variant, known)
    for name in ("mask_tokens_in_encoder", "loss_on"):
        del config.model[name]
    warmup, epochs, *_ = _UM_MAE[config.model.size]
    config.epochs = epochs
    config.optimizer.warmup_epochs = warmup
    if variant.startswith("demo"):
        config = digits_at_64(config)
    return config


def um_mae_finetune(config: ConfigDict, variant: str, known: Sequence[str]) -> ConfigDict:
    """Apply what UM-MAE's fine-tuning has of its own for a size, and `um_mae`."""
    config = um_mae(config, variant, known)
    _, _, layer_decay, drop_path, group = _UM_MAE[config.model.size]
    if not variant.startswith("demo"):
        config.data.mixup_group = group
        config.optimizer.layer_decay = layer_decay
        config.model.drop_path_rate = drop_path
    return config


def video(config: ConfigDict) -> ConfigDict:
    """Make a config of images one of clips, for VideoMAE: 16 frames, every fourth of a film.

    Args:
      config: of pre-training or fine-tuning; changed in place and returned.

    Source: arXiv 2203.12602, appendix; MCG-NJU/VideoMAE `scripts`.
    """
    model, data = config.model, config.data
    for name in ("use_cls_token", "positions"):
        del model[name]
    model.name = "videomae"
    model.frames = 16
    model.tubelet_size = config_dict.placeholder(int)
    data.source = "clips"
    data.path = ""  # a folder with a folder for each class, or a list; see docs/data.md
    data.split, data.eval_split = "train", "val"
    data.reader = "clips"
    data.frames = model.get_ref("frames")
    data.sampling = "dense"  # every `stride`-th frame; "uniform": one of each of `frames` segments
    data.stride = 4
    data.test_clips = 1  # of a film, times
    data.test_crops = 1  # along the longer side: their probabilities are averaged
    del data["crop_fraction"]  # the whole short side is seen
    del data["resample"]  # bilinear
    config.eval.batch_size = 16  # films, each with as many rows as it has views
    return config


def video_demo(config: ConfigDict, variant: str) -> ConfigDict:
    """Make a pre-training config of clips one of 64 pixels and 16 frames, minutes on a CPU.

    Args:
      config: of `video`; changed in place and returned.
      variant: "demo", the film of `data.source=bunny`, or "motion", digits that move.
    """
    config = _small_clips(config)
    config.batch_size = 32
    config.optimizer.base_learning_rate = 6e-3
    config.optimizer.warmup_epochs = 1.0
    config.model.decoder_embed_dim = 48
    config.model.decoder_depth = 2
    config.model.decoder_num_heads = 4
    config.eval.every = 0  # at the end alone
    config.eval.batch_size = 50
    config.eval.train_examples = 1000
    config.eval.val_examples = 1000
    config.eval.pictures = 3
    config.run.save_every = 200
    config.epochs = 8.0  # of 125 steps
    if variant == "demo":
        config.data.source = "bunny"
        config.model.patch_size = 8
        config.data.stride = 1
        config.data.held_out = 0.25
        config.model.decoder_num_heads = 2  # 512 cubes: attention is what takes the time
        config.model.channels = 3
        config.data.mean, config.data.std = IMAGENET_MEAN, IMAGENET_STD
        config.data.augment = "none"  # of one film a few hundred steps do not teach all crops
        config.batch_size = 16
        config.epochs = 100.0  # of 85 clips
        config.optimizer.base_learning_rate = 2.4e-2
        config.optimizer.warmup_epochs = 5.0
    return config


def video_demo_finetune(config: ConfigDict, variant: str) -> ConfigDict:
    """Make a fine-tuning config of clips one of digits that move, with few labels.

    Args:
      config: of `video`; changed in place and returned.
      variant: "motion", with the encoder of `videomae:motion`, or "motion_scratch".
    """
    config = _small_clips(config)
    _no_mixing(config)
    scratch = variant == "motion_scratch"
    config.init_from = "scratch" if scratch else "runs/videomae_motion"
    config.batch_size = 32
    config.model.num_classes = 10
    config.model.drop_path_rate = 0.0
    config.data.per_class = 10
    config.data.augment = "none"
    config.data.flip = False  # left would become right
    config.optimizer.base_learning_rate = 1.2e-2
    config.optimizer.layer_decay = 1.0 if scratch else 0.75
    config.epochs = 34.0
    config.optimizer.warmup_epochs = 3.0
    config.eval.every = 0
    config.eval.batch_size = 50
    config.run.save_every = 60
    return config


def _small_clips(config: ConfigDict) -> ConfigDict:
    """Make a config of clips one of a tiny ViT on the moving digits."""
    model, data = config.model, config.data
    model.size = "vit_s"
    model.image_size = (64, 64)
    model.patch_size = 16
    model.embed_dim = 96
    model.depth = 4
    model.num_heads = 4
    model.channels = 1
    data.source = "moving_digits"
    data.stride = 1
    data.mean, data.std = (0.03,), (0.15,)
    data.held_out = 0.2
    config.run.log_every = 20
    return config


def captions_demo(config: ConfigDict) -> ConfigDict:
    """Make a config of M3AE one of pairs of digits with captions at 64 pixels, minutes on a CPU."""
    model, data = config.model, config.data
    model.size = "small"
    model.image_size = (64, 64)
    model.channels = 1
    model.patch_size = 16
    model.embed_dim = 64
    model.depth = 4
    model.num_heads = 4
    model.decoder_embed_dim = 48
    model.decoder_depth = 2
    model.decoder_num_heads = 4
    model.vocabulary_size = 200
    model.text_length = 10
    # A digit is four patches, and of half of them it cannot be read.
    model.mask_ratio = 0.25
    model.text_mask_ratio = 0.5
    model.text_loss_weight = 2.0
    model.mask_per = "sample"
    data.source = "captioned_digits"
    data.held_out = 0.2
    data.scored_words = (
        *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    )
    data.mean, data.std = (0.194,), (0.214,)
    data.resample = "pil"
    data.augment = "none"
    data.flip = False  # left would no longer be left
    data.crop_fraction = 1.0
    config.batch_size = 64
    config.epochs = 8.0
    config.optimizer.warmup_epochs = 0.5
    config.optimizer.base_learning_rate = 6e-3
    config.eval.every = 0  # at the end alone
    config.eval.batch_size = 100
    config.eval.train_examples = 1000
    config.eval.val_examples = 1000
    config.eval.readouts = False
    config.eval.pictures = 4
    config.run.save_every = 500
    return config
