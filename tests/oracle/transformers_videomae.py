"""The other side: transformers' VideoMAE with our weights. Needs torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import (
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
)

from mae_jax.convert.families.videomae import TRANSFORMERS
from mae_jax.models.classifier import Classifier
from mae_jax.pretrain.videomae import VideoMAE
from tests.oracle.agreement import Result, Tree

LAYOUT = TRANSFORMERS
EPSILON = 1e-6


def config_of(model: VideoMAE | Classifier, **fields: Any) -> VideoMAEConfig:
    """Return the configuration of a model of the same dimensions."""
    encoder, unit = model.encoder, model.unit
    return VideoMAEConfig(
        hidden_size=encoder.embed_dim,
        num_hidden_layers=encoder.depth,
        num_attention_heads=encoder.num_heads,
        intermediate_size=int(encoder.embed_dim * encoder.mlp_ratio),
        image_size=list(unit.image_size),
        num_frames=unit.frames,
        tubelet_size=unit.tubelet_size,
        patch_size=unit.patch_size,
        num_channels=unit.channels,
        hidden_act="gelu",
        layer_norm_eps=EPSILON,
        qv_bias=True,
        **fields,
    )


def fill(theirs: Any, params: Tree, model: VideoMAE | Classifier) -> Any:
    """Return their model with our weights, and epsilon 1e-6 where theirs cannot be told."""
    state = LAYOUT.to_theirs(params, model.unit)
    theirs.load_state_dict(
        {name: torch.from_numpy(np.array(array, order="C")) for name, array in state.items()},
        strict=True,
    )
    for norm in (getattr(getattr(theirs, "decoder", None), "norm", None), _fc_norm(theirs)):
        if norm is not None:
            norm.eps = EPSILON
    return theirs.eval()


def _fc_norm(theirs: Any) -> Any:
    return getattr(theirs, "fc_norm", None)


def gradients_of(theirs: Any, params: Tree) -> dict[str, np.ndarray]:
    """Return the gradients at our paths, in our shapes."""
    gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    return LAYOUT.to_ours(gradients, params)


def pixels(clips: np.ndarray) -> torch.Tensor:
    """Return clips [B, F, H, W, C] as theirs, [B, F, C, H, W]."""
    return torch.from_numpy(clips.copy()).permute(0, 1, 4, 2, 3)


def run(model: VideoMAE, params: Tree, image: np.ndarray, mask: np.ndarray) -> Result:
    """Return loss, predictions of the hidden cubes and gradients in our layout."""
    decoder = model.decoder
    config = config_of(
        model,
        use_mean_pooling=False,
        decoder_hidden_size=decoder.embed_dim,
        decoder_num_hidden_layers=decoder.depth,
        decoder_num_attention_heads=decoder.num_heads,
        decoder_intermediate_size=int(decoder.embed_dim * decoder.mlp_ratio),
        norm_pix_loss=model.norm_pix_loss,
    )
    theirs = fill(VideoMAEForPreTraining(config), params, model)
    out = theirs(pixel_values=pixels(image), bool_masked_pos=torch.from_numpy(mask > 0))
    out.loss.backward()
    return Result(out.loss.item(), out.logits.detach().numpy(), gradients_of(theirs, params))


def classify(model: Classifier, params: Tree, image: np.ndarray, label: np.ndarray) -> Result:
    """Return loss, logits and gradients of their classifier."""
    config = config_of(model, use_mean_pooling=True, num_labels=model.num_classes)
    theirs = fill(VideoMAEForVideoClassification(config), params, model)
    logits = theirs(pixel_values=pixels(image)).logits
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(label))
    loss.backward()
    return Result(loss.item(), logits.detach().numpy(), gradients_of(theirs, params))
