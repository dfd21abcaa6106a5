"""MixMIM written down slowly in torch: loops over images, windows and heads. Needs torch.

From the paper (arXiv 2205.13137) and the layout of the released checkpoints: weights are a
dictionary with the names of those files. It shares no code with ours and none with theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

State = Mapping[str, Tensor]


class Shape(NamedTuple):
    """What the weights do not tell.

    Attributes:
      cells: (down, across) of an image.
      stem: side of a small patch in pixels; a cell has 8 x 8 of them.
      depths: blocks of the four stages.
      heads: of the attention of each stage.
      windows: side of the windows of each stage.
      decoder_depth: blocks of the decoder.
      decoder_heads: of its attention.
    """

    cells: tuple[int, int]
    stem: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    windows: tuple[int, ...]
    decoder_depth: int = 0
    decoder_heads: int = 1


def sincos(width: int, rows: int, columns: int) -> Tensor:
    """Return the fixed positions [rows, columns, width], the column's half first."""
    table = torch.zeros(rows, columns, width, dtype=torch.float64)
    quarter = width // 4
    for row in range(rows):
        for column in range(columns):
            for k in range(quarter):
                omega = 10000.0 ** (-k / quarter)
                table[row, column, k] = math.sin(column * omega)
                table[row, column, quarter + k] = math.cos(column * omega)
                table[row, column, 2 * quarter + k] = math.sin(row * omega)
                table[row, column, 3 * quarter + k] = math.cos(row * omega)
    return table.float()


def norm(x: Tensor, state: State, name: str) -> Tensor:
    """Layer norm with epsilon 1e-5."""
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * state[f"{name}.weight"] + state[
        f"{name}.bias"
    ]


def linear(x: Tensor, state: State, name: str) -> Tensor:
    """Multiply by a weight [out, in], and add a bias if there is one."""
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def attend(
    x: Tensor, state: State, name: str, heads: int, bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Let the tokens [T, D] of one window look at each other.

    Args:
      x: the tokens.
      state: weights.
      name: of the attention.
      heads: of it.
      bias: [T, T, heads].
      mask: 0 or 1 of each token; those of unlike values do not see each other.
    """
    width = x.shape[1]
    size = width // heads
    q, k, v = linear(x, state, f"{name}.qkv").split(width, dim=1)
    outputs = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        logits = q[:, part] @ k[:, part].T * size**-0.5
        if bias is not None:
            logits = logits + bias[:, :, head]
        if mask is not None:
            logits = logits.masked_fill(mask[:, None] != mask[None, :], -1e30)
        outputs.append(torch.softmax(logits, dim=1) @ v[:, part])
    return linear(torch.cat(outputs, dim=1), state, f"{name}.proj")


def mlp(x: Tensor, state: State, name: str) -> Tensor:
    """Two products with an exact GELU between."""
    hidden = linear(x, state, f"{name}.fc1")
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return linear(hidden, state, f"{name}.fc2")


def relative_bias(table: Tensor, down: int, across: int) -> Tensor:
    """Return [T, T, heads] of a window from its table [(2 down - 1) (2 across - 1), heads]."""
    places = [(row, column) for row in range(down) for column in range(across)]
    index = [
        [
            (query[0] - key[0] + down - 1) * (2 * across - 1) + query[1] - key[1] + across - 1
            for key in places
        ]
        for query in places
    ]
    return table[torch.tensor(index)]


def encoder_block(
    x: Tensor, state: State, name: str, heads: int, window: int, mask: Tensor | None
) -> Tensor:
    """Run a block on the grid [H, W, D] of one image; `mask` [H, W]."""
    rows, columns, width = x.shape
    down, across = min(window, rows), min(window, columns)
    bias = relative_bias(state[f"{name}.attn.relative_position_bias_table"], down, across)
    normed = norm(x, state, f"{name}.norm1")
    attended = torch.zeros_like(x)
    for top in range(0, rows, down):
        for left in range(0, columns, across):
            here = slice(top, top + down), slice(left, left + across)
            tokens = normed[here].reshape(-1, width)
            own = None if mask is None else mask[here].reshape(-1)
            out = attend(tokens, state, f"{name}.attn", heads, bias, own)
            attended = attended.clone()
            attended[here] = out.reshape(down, across, width)
    x = x + attended
    return x + mlp(norm(x, state, f"{name}.norm2"), state, f"{name}.mlp")


def downsample(x: Tensor, state: State, name: str) -> Tensor:
    """Merge 2 x 2 neighbours of the grid [H, W, D] of one image."""
    parts = [x[row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
    x = norm(torch.cat(parts, dim=-1), state, f"{name}.norm")
    return linear(x, state, f"{name}.reduction")


def encode(state: State, shape: Shape, images: Tensor, mask: Tensor | None) -> Tensor:
    """Return the tokens [B, N, 8 E] of images [B, C, H, W].

    Args:
      state: weights.
      shape: of the model.
      images: normalised.
      mask: 0 or 1 of each cell [rows, columns]: 1 is where the image is mixed with the one as far
        from the end of the batch as it is from the start. None: nothing is mixed.
    """
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    stem = functional.conv2d(images, weight, bias, stride=shape.stem).permute(0, 2, 3, 1)
    stem = norm(stem, state, "patch_embed.norm")
    positions = sincos(stem.shape[-1], stem.shape[1], stem.shape[2])
    encoded = []
    for i in range(len(images)):
        x = stem[i]
        if mask is not None:
            fine = upsample(mask, 8)[..., None]
            x = stem[i] * (1 - fine) + stem[len(images) - 1 - i] * fine
        x = x + positions
        for stage, depth in enumerate(shape.depths):
            own = None if mask is None else upsample(mask, 8 // 2**stage)
            for block in range(depth):
                name = f"layers.{stage}.blocks.{block}"
                x = encoder_block(x, state, name, shape.heads[stage], shape.windows[stage], own)
            if stage + 1 < len(shape.depths):
                x = downsample(x, state, f"layers.{stage}.downsample")
        encoded.append(norm(x, state, "norm").reshape(-1, x.shape[-1]))
    return torch.stack(encoded)


def upsample(mask: Tensor, factor: int) -> Tensor:
    """Repeat each value of [rows, columns] to a square."""
    return mask.repeat_interleave(factor, dim=0).repeat_interleave(factor, dim=1)


def decode(state: State, shape: Shape, tokens: Tensor) -> Tensor:
    """Run the decoder's blocks on one sequence [N, d] and predict [N, U]."""
    rows, columns = shape.cells
    x = tokens + sincos(tokens.shape[1], rows, columns).reshape(rows * columns, -1)
    for block in range(shape.decoder_depth):
        name = f"decoder_blocks.{block}"
        normed = norm(x, state, f"{name}.norm1")
        x = x + attend(normed, state, f"{name}.attn", shape.decoder_heads, None, None)
        x = x + mlp(norm(x, state, f"{name}.norm2"), state, f"{name}.mlp")
    return linear(norm(x, state, "decoder_norm"), state, "decoder_pred")


def reconstruct(state: State, shape: Shape, images: Tensor, mask: Tensor) -> Tensor:
    """Return the predictions [B, N, U] of all cells of all images, each from the other cells."""
    latent = linear(encode(state, shape, images, mask), state, "decoder_embed")
    flat = mask.reshape(-1, 1)
    token = state["mask_token"].reshape(1, -1)
    count = len(images)
    merged = []
    for i in range(count):
        of_image = decode(state, shape, latent[i] * (1 - flat) + token * flat)
        # The mixture in which this image is the partner shows what mask = 1 is.
        other = latent[count - 1 - i]
        of_partner = decode(state, shape, other * flat + token * (1 - flat))
        merged.append(of_image * flat + of_partner * (1 - flat))
    return torch.stack(merged)


def targets(shape: Shape, images: Tensor, *, normalise: bool) -> Tensor:
    """Return the cells [B, N, U] of images [B, C, H, W], values in the order row, column, channel.

    Normalised with the unbiased variance.
    """
    side = 8 * shape.stem
    rows, columns = shape.cells
    cells = [
        images[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
        .permute(0, 2, 3, 1)
        .reshape(len(images), -1)
        for row in range(rows)
        for column in range(columns)
    ]
    stacked = torch.stack(cells, dim=1)
    if not normalise:
        return stacked
    mean = stacked.mean(-1, keepdim=True)
    variance = ((stacked - mean) ** 2).sum(-1, keepdim=True) / (stacked.shape[-1] - 1)
    return (stacked - mean) / torch.sqrt(variance + 1e-6)


def mask_of(noise: Tensor, shape: Shape, ratio: float) -> Tensor:
    """Return the mask [rows, columns]: 1 for the int(N r) cells with the largest noise [N]."""
    rows, columns = shape.cells
    hide = int(rows * columns * ratio)
    mask = torch.zeros(rows * columns)
    mask[torch.argsort(noise)[rows * columns - hide :]] = 1
    return mask.reshape(rows, columns)


def classify(state: State, shape: Shape, images: Tensor) -> Tensor:
    """Return logits [B, classes]."""
    return linear(encode(state, shape, images, None).mean(dim=1), state, "head")


def resize_table(table: Tensor, old: int, new: int) -> Tensor:
    """Return a table [(2 old - 1)^2, heads] as one of a window of `new` tokens a side."""
    image = table.T.reshape(1, -1, 2 * old - 1, 2 * old - 1)
    size = (2 * new - 1, 2 * new - 1)
    image = functional.interpolate(image, size=size, mode="bicubic", align_corners=False)
    return image.reshape(table.shape[1], -1).T
