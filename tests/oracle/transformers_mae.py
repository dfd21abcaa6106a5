"""The other side: `ViTMAEForPreTraining` of transformers with our weights. Needs torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae import modeling_vit_mae

from mae_jax.pretrain import mae
from tests.oracle.agreement import Result, Tree

BLOCKS = {"encoder": "vit.layers", "decoder": "decoder.decoder_layers"}
PARTS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn/proj": "attention.o_proj",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
}
OTHERS = {
    "encoder/patch_embed": "vit.embeddings.patch_embeddings.projection",
    "encoder/norm": "vit.layernorm",
    "decoder/embed": "decoder.decoder_embed",
    "decoder/norm": "decoder.decoder_norm",
    "decoder/pred": "decoder.decoder_pred",
}
TOKENS = {
    "encoder/cls_token": "vit.embeddings.cls_token",
    "decoder/mask_token": "decoder.mask_token",
}


def names(path: str) -> list[str]:
    """Return what torch calls our parameter at `path`: three names for query, key and value."""
    if path in TOKENS:
        return [TOKENS[path]]
    module, kind = path.rsplit("/", 1)
    kind = "bias" if kind == "bias" else "weight"
    if module in OTHERS:
        return [f"{OTHERS[module]}.{kind}"]
    half, block, part = module.split("/", 2)
    prefix = f"{BLOCKS[half]}.{int(block.removeprefix('block_'))}"
    if part == "attn/qkv":
        return [f"{prefix}.attention.{x}_proj.{kind}" for x in "qkv"]
    return [f"{prefix}.{PARTS[part]}.{kind}"]


def to_torch(path: str, array: np.ndarray, model: mae.MaskedAutoencoder) -> list[np.ndarray]:
    """Return the arrays of `names(path)`: kernels transposed, the embedding as a convolution."""
    if path == "encoder/patch_embed/kernel":
        p = model.unit.patch_size
        return [array.reshape(p, p, model.unit.channels, -1).transpose(3, 2, 0, 1)]
    parts = np.split(array, 3, axis=-1) if "/qkv/" in path else [array]
    return [part.T if path.endswith("kernel") else part for part in parts]


def from_torch(path: str, arrays: list[np.ndarray]) -> np.ndarray:
    """Undo `to_torch`."""
    if path == "encoder/patch_embed/kernel":
        return arrays[0].transpose(2, 3, 1, 0).reshape(-1, len(arrays[0]))
    parts = [array.T if path.endswith("kernel") else array for array in arrays]
    return np.concatenate(parts, axis=-1)


def in_our_layout(
    tensors: Mapping[str, torch.Tensor], paths: Iterable[str]
) -> dict[str, np.ndarray]:
    """Return the arrays at our `paths` of tensors that have their names."""
    return {
        path: from_torch(path, [tensors[n].detach().numpy() for n in names(path)]) for path in paths
    }


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
        name: torch.from_numpy(part.copy())
        for path, array in params.items()
        for name, part in zip(names(path), to_torch(path, array, model), strict=True)
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
