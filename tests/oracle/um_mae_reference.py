"""UM-MAE for Swin, PVT and ViT, and its classifiers, in plain torch, slow and literal.

Written from the method's description (arXiv 2205.10063), not from our modules. Weights are tensors
by the names of the authors' checkpoints. Grids are lists of Python loops where that is clearer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from torch.nn import functional

State = Mapping[str, torch.Tensor]
"""Weights by the authors' names, such as `blocks.0.attn.posmlp.0.weight`."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The dimensions of a model, those of each stage in lists.

    Attributes:
      family: "swin", "pvt" or "vit".
      patch: pixels of the side of a stem patch; of a ViT, of a unit.
      depths: blocks of each stage.
      heads: of each stage.
      decoder_depth: blocks.
      decoder_heads: heads.
      window: of the full grid; of the compact one half.
      reductions: of PVT on the full grid; on the compact one half, but at least 1.
      norm_pix: the target is normalised.
      released_order: pair kept units and positions as the released code does.
    """

    family: str
    patch: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    decoder_depth: int = 2
    decoder_heads: int = 2
    window: int = 16
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    norm_pix: bool = True
    released_order: bool = False

    @property
    def unit(self) -> int:
        """Pixels of the side of a unit."""
        return self.patch if self.family == "vit" else 4 * self.patch


def linear(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    """Apply a linear layer."""
    return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def norm(state: State, name: str, x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Apply a layer norm, the variance that of the values themselves."""
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + epsilon)
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def convolution(state: State, name: str, grid: torch.Tensor, stride: int) -> torch.Tensor:
    """Apply a convolution whose kernel is its stride to a grid [B, H, W, C]."""
    x = grid.permute(0, 3, 1, 2)
    x = functional.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=stride)
    return x.permute(0, 2, 3, 1)


def mlp(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    """Linear, erf GELU, linear."""
    hidden = linear(state, f"{name}.fc1", x)
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    return linear(state, f"{name}.fc2", hidden)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of one sequence, q [T, C] to k and v [S, C]; bias [heads, T, S]."""
    width = q.shape[1] // heads
    out = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        logits = q[:, part] @ k[:, part].T * width**-0.5
        if bias is not None:
            logits = logits + bias[head]
        out.append(torch.softmax(logits, dim=1) @ v[:, part])
    return torch.cat(out, dim=1)


def global_block(state: State, name: str, x: torch.Tensor, heads: int) -> torch.Tensor:
    """Run a block of a ViT or a decoder on sequences [B, T, C]; norms have epsilon 1e-6."""
    qkv = linear(state, f"{name}.attn.qkv", norm(state, f"{name}.norm1", x, 1e-6))
    out = torch.stack([attend(*row.chunk(3, dim=1), heads) for row in qkv])
    x = x + linear(state, f"{name}.attn.proj", out)
    return x + mlp(state, f"{name}.mlp", norm(state, f"{name}.norm2", x, 1e-6))


def position_table(width: int, rows: int, columns: int) -> torch.Tensor:
    """Return float64 [rows columns, width]: sines and cosines of the column, then of the row."""
    table = torch.zeros(rows * columns, width, dtype=torch.float64)
    quarter = width // 4
    for row in range(rows):
        for column in range(columns):
            for k in range(quarter):
                omega = torch.tensor(10000.0, dtype=torch.float64) ** (-k / quarter)
                place = table[row * columns + column]
                place[k] = torch.sin(column * omega)
                place[quarter + k] = torch.cos(column * omega)
                place[2 * quarter + k] = torch.sin(row * omega)
                place[3 * quarter + k] = torch.cos(row * omega)
    return table


def swin_block(
    state: State,
    name: str,
    grid: torch.Tensor,
    places: torch.Tensor,
    heads: int,
    window: int,
    shift: int,
) -> torch.Tensor:
    """Run a Swin block on a grid [B, H, W, C] of tokens at `places` [B, H, W, 2]."""
    side = grid.shape[1]
    if side <= window:
        window, shift = side, 0
    qkv = linear(state, f"{name}.attn.qkv", norm(state, f"{name}.norm1", grid, 1e-5))
    # A token's region: which of three strips its row and column lie in after the shift.
    strip = [0] * (side - window) + [1] * (window - shift) + [2] * shift
    out = torch.zeros_like(grid)
    for b in range(len(grid)):
        for top in range(0, side, window):
            for left in range(0, side, window):
                shifted = [(top + i, left + j) for i in range(window) for j in range(window)]
                at = [((i + shift) % side, (j + shift) % side) for i, j in shifted]
                rows, columns = [i for i, _ in at], [j for _, j in at]
                here = places[b, rows, columns]
                d = here[None, :] - here[:, None]  # [query, key, 2]: key minus query
                log = torch.sign(d) * torch.log(1 + d.abs())
                one, two = (state[f"{name}.attn.posmlp.{i}.weight"].flatten(1) for i in (0, 2))
                hidden = torch.relu(log @ one.T + state[f"{name}.attn.posmlp.0.bias"])
                bias = (hidden @ two.T + state[f"{name}.attn.posmlp.2.bias"]).permute(2, 0, 1)
                if shift:
                    region = torch.tensor([3 * strip[i] + strip[j] for i, j in shifted])
                    bias = bias - 100.0 * (region[None, :] != region[:, None])
                out[b, rows, columns] = attend(*qkv[b, rows, columns].chunk(3, dim=1), heads, bias)
    grid = grid + linear(state, f"{name}.attn.proj", out)
    return grid + mlp(state, f"{name}.mlp", norm(state, f"{name}.norm2", grid, 1e-5))


def pvt_block(
    state: State, name: str, grid: torch.Tensor, heads: int, reduction: int
) -> torch.Tensor:
    """Run a PVT block on a grid [B, H, W, C]."""
    x = norm(state, f"{name}.norm1", grid, 1e-5)
    q = linear(state, f"{name}.attn.q", x).flatten(1, 2)
    seen = functional.avg_pool2d(x.permute(0, 3, 1, 2), reduction).permute(0, 2, 3, 1)
    seen = convolution(state, f"{name}.attn.sr", seen, 1).flatten(1, 2)
    kv = linear(state, f"{name}.attn.kv", norm(state, f"{name}.attn.norm", seen, 1e-5))
    out = torch.stack([attend(a, *b.chunk(2, dim=1), heads) for a, b in zip(q, kv, strict=True)])
    grid = grid + linear(state, f"{name}.attn.proj", out.reshape(grid.shape))
    return grid + mlp(state, f"{name}.mlp", norm(state, f"{name}.norm2", grid, 1e-5))


def compact(grid: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the kept unit of each 2 x 2, 4 x 4 of [B, H, W, C], as a grid of half the side.

    `mask` is 0/1 [B, M, M], 1 = removed.
    """
    b, h, w, c = grid.shape
    out = torch.zeros(b, h // 2, w // 2, c, dtype=grid.dtype)
    for n in range(b):
        for i in range(mask.shape[1]):
            for j in range(mask.shape[2]):
                if not mask[n, i, j]:
                    y, x = i // 2 * 4, j // 2 * 4
                    out[n, y : y + 4, x : x + 4] = grid[n, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
    return out


def stem(state: State, shape: Shape, image: torch.Tensor) -> torch.Tensor:
    """Embed images [B, H, W, C] as a grid of tokens, normed in Swin."""
    grid = convolution(state, "patch_embed.proj", image, shape.patch)
    return norm(state, "patch_embed.norm", grid, 1e-6) if shape.family == "swin" else grid


def stages(
    state: State, shape: Shape, grid: torch.Tensor, places: torch.Tensor, *, full: bool
) -> torch.Tensor:
    """Run the stages of a pyramid on a grid [B, H, W, C] of tokens at `places` [B, H, W, 2]."""
    number = 0
    for stage, depth in enumerate(shape.depths):
        for j in range(depth):
            name = f"blocks.{number}"
            if stage and j == 0:
                if shape.family == "swin":
                    grid = norm(state, f"{name}.downsample.norm", grid, 1e-6)
                grid = convolution(state, f"{name}.downsample.proj", grid, 2)
                places = places[:, ::2, ::2] / 2
            heads = shape.heads[stage]
            if shape.family == "swin":
                window = shape.window if full else shape.window // 2
                shift = window // 2 if j % 2 else 0
                grid = swin_block(state, name, grid, places, heads, window, shift)
            else:
                r = shape.reductions[stage]
                r = r if full else max(1, r // 2)
                grid = pvt_block(state, name, grid, heads, r)
            number += 1
    return grid


def token_places(side: int, batch_size: int) -> torch.Tensor:
    """Return float64 [B, H, W, 2], the row and column of each token."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([rows, columns], dim=-1).double()
    return places.repeat(batch_size, 1, 1, 1)


def amplify(of_units: torch.Tensor) -> torch.Tensor:
    """Return [B, 4 M, 4 M, 1] for the tokens of units [B, M, M]."""
    return of_units.repeat_interleave(4, 1).repeat_interleave(4, 2)[..., None]


def encode_pyramid(
    state: State, shape: Shape, image: torch.Tensor, mask: torch.Tensor, replaced: torch.Tensor
) -> torch.Tensor:
    """Return the encoder's grid [B, h, w, D]; `mask` and `replaced` are bool [B, M, M]."""
    grid = stem(state, shape, image)
    token = state["vis_mask_token"]
    if shape.family == "swin":
        token = norm(state, "patch_embed.norm", token, 1e-6)
    grid = torch.where(amplify(replaced), token[None], grid)
    places = token_places(grid.shape[1], len(image))
    if shape.family == "pvt":
        table = position_table(grid.shape[3], grid.shape[1], grid.shape[2])
        grid = grid + table.reshape(1, *grid.shape[1:])
    x = stages(state, shape, compact(grid, mask), compact(places, mask), full=False)
    return norm(state, "norm", x, 1e-6)


def encode_vit(
    state: State, shape: Shape, image: torch.Tensor, mask: torch.Tensor, replaced: torch.Tensor
) -> torch.Tensor:
    """Return the encoder's tokens [B, 1 + K, D]; kept units are in raster order."""
    tokens = convolution(state, "patch_embed.proj", image, shape.patch)
    tokens = torch.where(replaced[..., None], state["vis_mask_token"][None], tokens)
    table = position_table(tokens.shape[3], tokens.shape[1], tokens.shape[2])
    tokens = tokens.flatten(1, 2) + table
    rows = [row[~of.flatten()] for row, of in zip(tokens, mask, strict=True)]
    x = torch.stack([torch.cat([state["cls_token"][0], row]) for row in rows])
    for i in range(shape.depths[0]):
        x = global_block(state, f"blocks.{i}", x, shape.heads[0])
    return norm(state, "norm", x, 1e-6)


def block_order(mask: torch.Tensor) -> list[int]:
    """Return the kept units of one mask [M, M] in the order of the 2 x 2 blocks."""
    m, order = len(mask), []
    for top in range(0, m, 2):
        for left in range(0, m, 2):
            for i, j in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                if not mask[i, j]:
                    order.append(i * m + j)
    return order


def predictions(
    state: State, shape: Shape, image: torch.Tensor, mask: torch.Tensor, replaced: torch.Tensor
) -> torch.Tensor:
    """Return predictions [B, hidden, U] of the hidden units, raster order.

    Args:
      state: weights.
      shape: dimensions.
      image: [B, H, W, C].
      mask: bool [B, M, M], True where a unit is removed.
      replaced: bool [B, M, M], True where a kept unit is to be a token.
    """
    m, width = mask.shape[1], state["mask_token"].shape[2]
    prefix = []
    if shape.family == "vit":
        x = linear(state, "decoder_embed", encode_vit(state, shape, image, mask, replaced))
        prefix, kept = x[:, :1], x[:, 1:]
    else:
        grid = encode_pyramid(state, shape, image, mask, replaced)
        x = linear(state, "decoder_embed", grid).permute(0, 3, 1, 2)
        kept = functional.pixel_shuffle(x, 2).flatten(2).permute(0, 2, 1)
    table = position_table(width, m, m)
    sequences = []
    for n in range(len(image)):
        flat = mask[n].flatten()
        raster = [i for i in range(m * m) if not flat[i]]
        in_blocks = shape.family != "vit" and not shape.released_order
        order = block_order(mask[n]) if in_blocks else raster
        removed = state["mask_token"][0] + table[flat]
        tokens = torch.cat([kept[n] + table[order], removed])
        sequences.append(torch.cat([prefix[n], tokens]) if len(prefix) else tokens)
    x = torch.stack(sequences)
    for i in range(shape.decoder_depth):
        x = global_block(state, f"decoder_blocks.{i}", x, shape.decoder_heads)
    x = linear(state, "decoder_pred", norm(state, "decoder_norm", x, 1e-6))
    return x[:, -int(mask[0].sum()) :]


def target(shape: Shape, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the hidden units [B, hidden, U] of images [B, H, W, C]."""
    p, m = shape.unit, mask.shape[1]
    rows = []
    for n in range(len(image)):
        units = [
            image[n, i * p : i * p + p, j * p : j * p + p].flatten()
            for i in range(m)
            for j in range(m)
            if mask[n, i, j]
        ]
        rows.append(torch.stack(units))
    values = torch.stack(rows)
    if shape.norm_pix:
        variance = values.var(dim=-1, keepdim=True)
        values = (values - values.mean(dim=-1, keepdim=True)) / torch.sqrt(variance + 1e-6)
    return values


def logits(state: State, shape: Shape, image: torch.Tensor) -> torch.Tensor:
    """Return a pyramid's logits [B, classes]: the full grid, the mean, a norm."""
    grid = stem(state, shape, image)
    if shape.family == "pvt":
        grid = grid + state["pos_embed"].reshape(1, *grid.shape[1:])
    places = token_places(grid.shape[1], len(image))
    x = stages(state, shape, grid, places, full=True).mean(dim=(1, 2))
    return linear(state, "head", norm(state, "fc_norm", x, 1e-6))


def leaves(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Return arrays as float64 tensors that gather gradients."""
    return {k: torch.tensor(v, dtype=torch.float64).requires_grad_() for k, v in arrays.items()}
