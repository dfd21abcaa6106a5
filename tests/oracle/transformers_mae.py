"""The other side: `ViTMAEForPreTraining` of transformers with our weights. Needs torch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae import modeling_vit_mae

from mae_jax.convert.families.mae import TRANSFORMERS_5_MEMORY
from mae_jax.pretrain import mae
from tests.oracle.agreement import Result, Tree

LAYOUT = TRANSFORMERS_5_MEMORY


def in_our_layout(tensors: Mapping[str, torch.Tensor], params: Tree) -> dict[str, np.ndarray]:
    """Return tensors that have their names as arrays with the paths and shapes of `params`."""
    arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    return LAYOUT.to_ours(arrays, params)


def position_table(width: int, grid_size: tuple[int, int]) -> torch.Tensor:
    """Return [1, 1 + N, D], made by their function, because a fresh model's are zeros.

    It puts the row first, so the halves are swapped, as their code does where it calls it.
    """
    make = modeling_vit_mae.build_2d_sinusoidal_position_embedding
    return torch.roll(make(*grid_size, width, cls_token=True), width // 2, dims=1)[None]


def build(model: mae.MaskedAutoencoder, params: Tree) -> ViTMAEForPreTraining:
    """Return their model of the same dimensions, with our weights and epsilon 1e-6."""
    config = ViTMAEConfig(
        hidden_size=model.encoder.embed_dim,
        num_hidden_layers=model.encoder.depth,
        num_attention_heads=model.encoder.num_heads,
        intermediate_size=int(model.encoder.embed_dim * model.encoder.mlp_ratio),
        decoder_hidden_size=model.decoder.embed_dim,
        decoder_num_hidden_layers=model.decoder.depth,
        decoder_num_attention_heads=model.decoder.num_heads,
        decoder_intermediate_size=int(model.decoder.embed_dim * model.decoder.mlp_ratio),
        image_size=model.unit.image_size[0],
        patch_size=model.unit.patch_size,
        num_channels=model.unit.channels,
        mask_ratio=model.mask_ratio,
        norm_pix_loss=model.norm_pix_loss,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    theirs = ViTMAEForPreTraining(config).eval()
    state = {
        name: torch.from_numpy(array.copy())
        for name, array in LAYOUT.to_theirs(params, model.unit).items()
    }
    for name, width in (
        ("vit.embeddings.position_embeddings", config.hidden_size),
        ("decoder.decoder_pos_embed", config.decoder_hidden_size),
    ):
        state[name] = position_table(width, model.unit.grid_size)
    theirs.load_state_dict(state, strict=True)
    return theirs


def run(
    model: mae.MaskedAutoencoder,
    params: Tree,
    image: np.ndarray,
    noise: np.ndarray,
    dtype: torch.dtype = torch.float32,
) -> Result:
    """Return loss, predictions of the hidden patches and gradients in our layout."""
    theirs = build(model, params).to(dtype)
    pixels = torch.from_numpy(image).permute(0, 3, 1, 2).to(dtype)
    out = theirs(pixel_values=pixels, noise=torch.from_numpy(noise))
    out.loss.backward()
    hidden = np.argsort(out.ids_restore.numpy(), axis=1)[:, model.keep_count() :]
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    return Result(
        out.loss.item(),
        np.take_along_axis(out.logits.detach().numpy(), hidden[..., None], axis=1),
        in_our_layout(gradients, params),
    )
