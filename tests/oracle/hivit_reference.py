"""The other side: HiViT and MAE with it as a slow, literal PyTorch program. Needs torch.

Written after a description of the released model, with its names of parameters: merging is counted
with the blocks, and a block of the stem has `norm2` and `mlp` alone.

Source: arXiv 2205.14949.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

EPS = 1e-6


def position_table(width: int, grid_size: tuple[int, int]) -> torch.Tensor:
    """Return the sine-cosine table [1, N, D]: sines and cosines of the column, then of the row."""
    quarter = width // 4
    rows = []
    for row in range(grid_size[0]):
        for column in range(grid_size[1]):
            values = []
            for place in (column, row):
                angles = [place * 10000 ** (-k / quarter) for k in range(quarter)]
                values += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(values)
    return torch.tensor(rows, dtype=torch.float64).float()[None]


def relative_index(grid_size: tuple[int, int]) -> torch.Tensor:
    """Return [N, N]: which entry of a table the difference of two places has."""
    places = [(row, column) for row in range(grid_size[0]) for column in range(grid_size[1])]
    index = torch.zeros(len(places), len(places), dtype=torch.long)
    for i, (row, column) in enumerate(places):
        for j, (other_row, other_column) in enumerate(places):
            down = row - other_row + grid_size[0] - 1
            across = column - other_column + grid_size[1] - 1
            index[i, j] = down * (2 * grid_size[1] - 1) + across
    return index


class Attention(nn.Module):
    """Attention, with a table of biases if `entries` is not 0."""

    def __init__(self, width: int, heads: int, entries: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        if entries:
            self.relative_position_bias_table = nn.Parameter(torch.zeros(entries, heads))

    def forward(self, x: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
        """Map [B, T, D] to the same; `index` [B, T, T] says which biases."""
        width = x.shape[-1]
        size = width // self.heads
        qkv = self.qkv(x)
        heads = []
        for head in range(self.heads):
            q, k, v = (
                qkv[:, :, part * width + head * size : part * width + (head + 1) * size]
                for part in range(3)
            )
            logits = q @ k.transpose(1, 2) / math.sqrt(size)
            if index is not None:
                logits = logits + self.relative_position_bias_table[index, head]
            heads.append(torch.softmax(logits, dim=-1) @ v)
        return self.proj(torch.cat(heads, dim=-1))


class Block(nn.Module):
    """A pre-norm block; without heads it is an MLP alone."""

    def __init__(self, width: int, heads: int, ratio: int, entries: int = 0):
        super().__init__()
        if heads:
            self.norm1 = nn.LayerNorm(width, eps=EPS)
            self.attn = Attention(width, heads, entries)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        fc1, fc2 = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)
        self.mlp = nn.ModuleDict({"fc1": fc1, "fc2": fc2})

    def forward(self, x: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        """Map [..., D] to the same."""
        if hasattr(self, "attn"):
            x = x + self.attn(self.norm1(x), index)
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class Merge(nn.Module):
    """Four neighbours to one."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width, eps=EPS)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, K, s, s, D] to [B, K, s / 2, s / 2, 2 D]."""
        parts = [x[:, :, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
        return self.reduction(self.norm(torch.cat(parts, dim=-1)))


class HiViT(nn.Module):
    """The encoder with a decoder, or with a head for `num_classes`."""

    def __init__(
        self,
        *,
        grid_size: tuple[int, int],
        channels: int,
        patch: int,
        width: int,
        depths: tuple[int, int, int],
        heads: int,
        relative: bool,
        multi_scale: bool,
        norm_pix: bool = True,
        decoder: tuple[int, int, int] | None = None,
        num_classes: int = 0,
    ):
        super().__init__()
        self.grid_size, self.patch, self.norm_pix = grid_size, patch, norm_pix
        self.multi_scale, self.relative = multi_scale, relative
        count, entries = grid_size[0] * grid_size[1], 0
        if relative:
            self.register_buffer("relative_position_index", relative_index(grid_size))
            entries = (2 * grid_size[0] - 1) * (2 * grid_size[1] - 1)
        proj, norm = nn.Conv2d(channels, width, patch, patch), nn.LayerNorm(width, eps=EPS)
        self.patch_embed = nn.ModuleDict({"proj": proj, "norm": norm})
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, count, 4 * width))
        self.blocks = nn.ModuleList()
        for stage in range(2):
            stage_width = width * 2**stage
            for _ in range(2 * depths[stage]):
                self.blocks.append(Block(stage_width, heads=0, ratio=3))
            self.blocks.append(Merge(stage_width))
        for _ in range(depths[2]):
            self.blocks.append(Block(4 * width, heads, ratio=4, entries=entries))
        if num_classes:
            self.fc_norm = nn.LayerNorm(4 * width, eps=EPS)
            self.head = nn.Linear(4 * width, num_classes)
            return
        latent = (16 + 8 + 4 if multi_scale else 4) * width
        if multi_scale:  # the released class has a norm without it too, and does not apply it
            self.norm = nn.LayerNorm(latent, eps=EPS)
        assert decoder is not None
        size, decoder_depth, decoder_heads = decoder
        self.decoder_embed = nn.Linear(latent, size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size))
        self.register_buffer("decoder_pos_embed", position_table(size, grid_size))
        self.decoder_blocks = nn.ModuleList(
            Block(size, decoder_heads, ratio=4) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(size, eps=EPS)
        self.decoder_pred = nn.Linear(size, (4 * patch) ** 2 * channels)

    def encode(self, images: torch.Tensor, ids_keep: torch.Tensor) -> torch.Tensor:
        """Map images [B, C, H, W] and the units to be kept [B, K] to [B, K, D]."""
        patches = self.patch_embed["proj"](images).permute(0, 2, 3, 1)
        units = []
        for row in range(self.grid_size[0]):
            for column in range(self.grid_size[1]):
                units.append(patches[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4])
        x = self.patch_embed["norm"](torch.stack(units, dim=1))  # [B, N, 4, 4, E]
        x = torch.stack([one[ids] for one, ids in zip(x, ids_keep, strict=True)])
        positions = torch.stack([self.absolute_pos_embed[0, ids] for ids in ids_keep])
        index = None
        if self.relative:
            pairs = [self.relative_position_index[ids][:, ids] for ids in ids_keep]
            index = torch.stack(pairs)
        scales = []
        for block in self.blocks:
            if isinstance(block, Merge):
                scales.append(x.flatten(2))
                x = block(x)
                if x.shape[2] == 1:
                    x = x.flatten(2) + positions
            else:
                x = block(x, index) if hasattr(block, "attn") else block(x)
        return torch.cat([*scales, x], dim=-1) if self.multi_scale else x

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """Map images [B, C, H, W] to logits [B, K]."""
        every = torch.arange(self.absolute_pos_embed.shape[1]).expand(len(images), -1)
        return self.head(self.fc_norm(self.encode(images, every).mean(dim=1)))

    def targets(self, images: torch.Tensor) -> torch.Tensor:
        """Cut images [B, C, H, W] into units [B, N, U], channel fastest, and normalise them."""
        side = 4 * self.patch
        units = []
        for row in range(self.grid_size[0]):
            for column in range(self.grid_size[1]):
                part = images[:, :, side * row : side * row + side]
                part = part[:, :, :, side * column : side * column + side]
                units.append(part.permute(0, 2, 3, 1).flatten(1))
        target = torch.stack(units, dim=1)
        if self.norm_pix:
            variance = target.var(dim=-1, keepdim=True)  # unbiased
            target = (target - target.mean(dim=-1, keepdim=True)) / (variance + 1e-6).sqrt()
        return target

    def forward(
        self, images: torch.Tensor, noise: torch.Tensor, keep: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss and the predictions [B, M, U] of the units hidden, in order of noise."""
        order = torch.argsort(noise, dim=1)
        kept, hidden = order[:, :keep], order[:, keep:]
        latent = self.encode(images, kept)
        if self.multi_scale:
            latent = self.norm(latent)
        tokens = self.decoder_embed(latent)
        whole = []
        for b in range(len(images)):
            row = [self.mask_token[0, 0]] * order.shape[1]
            for token, place in zip(tokens[b], kept[b].tolist(), strict=True):
                row[place] = token
            whole.append(torch.stack(row))
        x = torch.stack(whole) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        x = self.decoder_pred(self.decoder_norm(x))
        error = ((x - self.targets(images)) ** 2).mean(dim=-1)
        mask = torch.zeros_like(error)
        mask.scatter_(1, hidden, 1.0)
        loss = (error * mask).sum() / mask.sum()
        return loss, torch.stack([one[ids] for one, ids in zip(x, hidden, strict=True)])


def with_state(model: HiViT, state: dict[str, np.ndarray]) -> HiViT:
    """Return the model with a state by its names; buffers stay."""
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in state.items()}
    buffers = dict(model.named_buffers())
    model.load_state_dict(tensors | buffers, strict=True)
    return model
