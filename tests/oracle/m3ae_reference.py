"""The other side: M3AE as a slow, literal PyTorch program, one example at a time. Needs torch.

Written after a description of the released model, with its names of parameters and its order of
tokens: the decoder puts what was kept and what was hidden back in their places.

Source: arXiv 2205.14204.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

EPS = 1e-6
BLOCKED = -1e7

Params = Mapping[str, torch.Tensor]


class Sizes(NamedTuple):
    """What the shapes of parameters do not tell."""

    grid: tuple[int, int]
    depth: int
    heads: int
    decoder_depth: int
    decoder_heads: int
    head_depth: int


def waves(width: int, place: int) -> list[float]:
    """Return sines, then cosines, of a place."""
    angles = [place * 10000 ** (-k / (width / 2)) for k in range(width // 2)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


def image_table(width: int, grid: tuple[int, int]) -> torch.Tensor:
    """Return [N, D]: the waves of the column, then those of the row."""
    rows, columns = grid
    places = [(row, column) for row in range(rows) for column in range(columns)]
    table = [waves(width // 2, column) + waves(width // 2, row) for row, column in places]
    return torch.tensor(table, dtype=torch.float64).float()


def text_table(width: int, length: int) -> torch.Tensor:
    """Return [L, D]."""
    table = [waves(width, place) for place in range(length)]
    return torch.tensor(table, dtype=torch.float64).float()


def patches(image: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Cut an image [H, W, C] into patches [N, p p C]."""
    size = image.shape[0] // grid[0]
    cut = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            top, left = row * size, column * size
            cut.append(image[top : top + size, left : left + size].reshape(-1))
    return torch.stack(cut)


def dense(params: Params, name: str, x: torch.Tensor) -> torch.Tensor:
    """Return x W + b."""
    return x @ params[f"{name}/kernel"] + params[f"{name}/bias"]


def norm(params: Params, name: str, x: torch.Tensor) -> torch.Tensor:
    """Norm over the width."""
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + EPS) * params[f"{name}/scale"] + params[
        f"{name}/bias"
    ]


def gelu(x: torch.Tensor) -> torch.Tensor:
    """Return the approximation by a tanh."""
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attend(
    params: Params, name: str, x: torch.Tensor, heads: int, padding: torch.Tensor
) -> torch.Tensor:
    """Return the attention of tokens [T, D] to each other; none looks where padding [T] is."""
    width = x.shape[-1]
    size = width // heads
    qkv = dense(params, f"{name}/Dense_0", x)
    out = []
    for head in range(heads):
        q, k, v = (
            qkv[:, part * width + head * size : part * width + (head + 1) * size]
            for part in range(3)
        )
        logits = q @ k.T * size**-0.5
        logits = torch.where(padding[None], torch.tensor(BLOCKED), logits)
        out.append(torch.softmax(logits, dim=-1) @ v)
    return dense(params, f"{name}/Dense_1", torch.cat(out, dim=-1))


def transformer(
    params: Params, name: str, x: torch.Tensor, depth: int, heads: int, padding: torch.Tensor
) -> torch.Tensor:
    """Run pre-norm blocks and a norm on tokens [T, D]."""
    for i in range(depth):
        block = f"{name}/Block_{i}"
        normed = norm(params, f"{block}/LayerNorm_0", x)
        x = x + attend(params, f"{block}/Attention_0", normed, heads, padding)
        hidden = dense(
            params, f"{block}/TransformerMLP_0/fc1", norm(params, f"{block}/LayerNorm_1", x)
        )
        x = x + dense(params, f"{block}/TransformerMLP_0/fc2", gelu(hidden))
    return norm(params, f"{name}/LayerNorm_0", x)


def head(params: Params, name: str, x: torch.Tensor, depth: int) -> torch.Tensor:
    """Return predictions from tokens."""
    if depth:
        x = norm(params, f"{name}/LayerNorm_0", x)
    for i in range(depth):
        y = norm(params, f"{name}/LayerNorm_{i + 1}", gelu(dense(params, f"{name}/Dense_{i}", x)))
        x = y if i == 0 else x + y
    return dense(params, f"{name}/Dense_{depth}", x)


def kind(params: Params, name: str) -> torch.Tensor | float:
    """Return the vector of a kind of token, 0 if there is none."""
    return params[name][0] if name in params else 0.0


def image_tokens(params: Params, sizes: Sizes, image: torch.Tensor) -> torch.Tensor:
    """Return the encoder's tokens of all patches."""
    x = dense(params, "image_embedding", patches(image, sizes.grid))
    return x + image_table(x.shape[-1], sizes.grid) + kind(params, "encoder_image_type_embedding")


def text_tokens(params: Params, text: torch.Tensor) -> torch.Tensor:
    """Return the encoder's tokens of all words."""
    x = params["text_embedding/embedding"][text]
    return x + text_table(x.shape[-1], len(text)) + kind(params, "encoder_text_type_embedding")


def put_back(kept: torch.Tensor, hidden: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """Return [N, d] in image or text order; `order` is that of the kept, then of the others."""
    rows: list[torch.Tensor] = [hidden] * len(order)
    for token, place in zip(kept, order, strict=False):
        rows[place] = token
    return torch.stack(rows)


def predict_one(
    params: Params,
    sizes: Sizes,
    image: torch.Tensor | None,
    text: torch.Tensor | None,
    padding: torch.Tensor | None,
    orders: Mapping[str, Sequence[int]],
    keep: Mapping[str, int],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return predictions for all patches and all words of one example."""
    nothing = torch.zeros(1, dtype=torch.bool)
    tokens, blocked = [params["cls_token"][0]], [nothing]
    if image is not None:
        chosen = orders["image"][: keep["image"]]
        tokens.append(image_tokens(params, sizes, image)[list(chosen)])
        blocked.append(nothing.repeat(len(chosen)))
    if text is not None and padding is not None:
        chosen = orders["text"][: keep["text"]]
        tokens.append(text_tokens(params, text)[list(chosen)])
        blocked.append(padding[list(chosen)])
    x, mask = torch.cat(tokens), torch.cat(blocked)
    x = transformer(params, "encoder", x, sizes.depth, sizes.heads, mask)
    x = dense(params, "decoder_input_projection", x)
    width = x.shape[-1]
    tokens, blocked, start = [x[:1]], [nothing], 1
    if image is not None:
        kept = x[start : start + keep["image"]]
        start += keep["image"]
        y = put_back(kept, params["image_mask_embedding"][0, 0], orders["image"])
        y = y + image_table(width, sizes.grid) + kind(params, "decoder_image_type_embedding")
        tokens.append(y)
        blocked.append(nothing.repeat(len(y)))
    if text is not None and padding is not None:
        y = put_back(x[start:], params["text_mask_embedding"][0, 0], orders["text"])
        y = y + text_table(width, len(y)) + kind(params, "decoder_text_type_embedding")
        tokens.append(y)
        blocked.append(padding)
    x, mask = torch.cat(tokens), torch.cat(blocked)
    x = transformer(params, "decoder", x, sizes.decoder_depth, sizes.decoder_heads, mask)
    images = texts = None
    start = 1
    if image is not None:
        count = sizes.grid[0] * sizes.grid[1]
        images = head(params, "decoder_image_output", x[1 : 1 + count], sizes.head_depth)
        start += count
    if text is not None:
        texts = head(params, "decoder_text_output", x[start:], sizes.head_depth)
    return images, texts


def losses(
    params: Params,
    sizes: Sizes,
    batch: Mapping[str, torch.Tensor],
    noise: Mapping[str, np.ndarray],
    keep: Mapping[str, int],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the mean loss of image, text and unpaired text, and the predictions at hidden places.

    Args:
      params: by their names.
      sizes: of the model.
      batch: as ours.
      noise: by modality, [1, N] or [B, N].
      keep: by modality, how many places stay.
    """
    total: dict[str, torch.Tensor] = {}
    outputs: dict[str, list[torch.Tensor]] = {}
    orders = {name: np.argsort(rows, axis=1) for name, rows in noise.items()}
    count = len(batch["image"])
    for row in range(count):
        order = {name: rows[row % len(rows)].tolist() for name, rows in orders.items()}

        def add(name: str, loss: torch.Tensor, hidden: torch.Tensor) -> None:
            total[name] = total.get(name, torch.zeros(())) + loss / count
            outputs.setdefault(name, []).append(hidden)

        has_text = "text" in noise
        text, padding = (batch[x][row] if has_text else None for x in ("text", "padding"))
        images, texts = predict_one(params, sizes, batch["image"][row], text, padding, order, keep)
        hidden = order["image"][keep["image"] :]
        target = patches(batch["image"][row], sizes.grid)
        assert images is not None
        errors = [((images[n] - target[n]) ** 2).mean() for n in hidden]
        add("image", torch.stack(errors).mean(), images[hidden])
        if texts is not None and text is not None and padding is not None:
            hidden = order["text"][keep["text"] :]
            add("text", word_loss(texts, text, padding, hidden), texts[hidden])
        if "unpaired_text" in noise:
            text, padding = batch["unpaired_text"][row], batch["unpaired_padding"][row]
            alone, kept = {"text": order["unpaired_text"]}, {"text": keep["unpaired_text"]}
            texts = predict_one(params, sizes, None, text, padding, alone, kept)[1]
            assert texts is not None
            hidden = order["unpaired_text"][keep["unpaired_text"] :]
            add("unpaired_text", word_loss(texts, text, padding, hidden), texts[hidden])
    return total, {name: torch.stack(rows) for name, rows in outputs.items()}


def word_loss(
    logits: torch.Tensor, text: torch.Tensor, padding: torch.Tensor, hidden: Sequence[int]
) -> torch.Tensor:
    """Return the mean cross entropy of the hidden words of a text, 0 if none is."""
    total, words = torch.zeros(()), 0.0
    for place in hidden:
        if not padding[place]:
            row = logits[place]
            total = total + torch.logsumexp(row, dim=0) - row[text[place]]
            words += 1
    return total / max(words, 1e-5)


def classify(params: Params, sizes: Sizes, images: torch.Tensor, *, mean: bool) -> torch.Tensor:
    """Return the logits of the authors' classifier, by the class token or the mean of patches."""
    rows = []
    for image in images:
        x = torch.cat([params["cls_token"][0], image_tokens(params, sizes, image)])
        nothing = torch.zeros(len(x), dtype=torch.bool)
        x = transformer(params, "encoder", x, sizes.depth, sizes.heads, nothing)
        pooled = x[1:].mean(0) if mean else x[0]
        rows.append(dense(params, "Dense_0", norm(params, "LayerNorm_0", pooled)))
    return torch.stack(rows)
