"""The other side of the comparison of classifiers: a ViT, LARS and plain loops in PyTorch.

Written after the description of the official recipes, without what is random (drop path, mixing,
erasing).

Source: arXiv 2111.06377, appendix A.1, tables 9 and 10.
"""

from __future__ import annotations

import math
import re

import numpy as np
import torch
from torch import nn

from mae_jax.models.classifier import Classifier
from mae_jax.recipes import IMAGENET_MEAN, IMAGENET_STD
from tests.oracle.agreement import Trained, Tree
from tests.oracle.classifier_case import (
    BATCH_SIZE,
    TOTAL_STEPS,
    WARMUP_STEPS,
    Batch,
    Finetuning,
    Probed,
    Probing,
    classifier,
)

EPS = 1e-6


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, ratio: float):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        hidden = int(ratio * width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, T, D] to [B, T, D]."""
        b, t, width = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).reshape(b, t, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, d]
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
        x = x + self.attn["proj"]((weights @ v).transpose(1, 2).reshape(b, t, width))
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class VisionTransformer(nn.Module):
    """A ViT with a class token and learned positions, pooled by mean (and then normed) or by it."""

    def __init__(self, model: Classifier):
        super().__init__()
        encoder, unit = model.encoder, model.unit
        width, patch = encoder.embed_dim, unit.patch_size
        self.pooling = model.pooling
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + unit.count, width))
        self.patch_embed = nn.Conv2d(unit.channels, width, patch, patch)
        self.blocks = nn.ModuleList(
            Block(width, encoder.num_heads, encoder.mlp_ratio) for _ in range(encoder.depth)
        )
        self.norm = nn.LayerNorm(
            width, eps=EPS
        )  # of all tokens before, or of the mean after pooling
        self.head = nn.Linear(width, model.num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Map images [B, 3, H, W] to [B, D]."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0] if self.pooling == "cls" else self.norm(x[:, 1:].mean(dim=1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images [B, 3, H, W] to logits [B, K]."""
        return self.head(self.features(images))


def their_name(path: str) -> str:
    """Return the name of the parameter at our path."""
    name = re.sub(r"block_0*(\d+)", r"blocks/\1", path.removeprefix("encoder/"))
    name = name.replace("head/norm", "norm").replace("head/linear", "head")
    return re.sub(r"(kernel|scale)$", "weight", name).replace("/", ".")


def to_theirs(params: Tree, model: Classifier) -> dict[str, torch.Tensor]:
    """Return tensors by their names."""
    patch, channels = model.unit.patch_size, model.unit.channels

    def one(path: str, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array.copy())
        if path == "encoder/patch_embed/kernel":
            return tensor.T.reshape(-1, patch, patch, channels).permute(0, 3, 1, 2)
        return tensor.T if path.endswith("kernel") else tensor

    return {their_name(path): one(path, array) for path, array in params.items()}


def to_ours(theirs: nn.Module, params: Tree) -> dict[str, np.ndarray]:
    """Return the arrays at the paths of `params`."""
    tensors = {name: tensor.detach() for name, tensor in theirs.named_parameters()}

    def one(path: str) -> np.ndarray:
        tensor = tensors[their_name(path)]
        if path == "encoder/patch_embed/kernel":
            return tensor.permute(2, 3, 1, 0).flatten(0, 2).numpy().copy()
        return (tensor.T if path.endswith("kernel") else tensor).numpy().copy()

    return {path: one(path) for path in params}


def build(model: Classifier, params: Tree) -> VisionTransformer:
    """Return their model with our weights."""
    theirs = VisionTransformer(model)
    theirs.load_state_dict(to_theirs(params, model), strict=True)
    return theirs


def pixels(batch: Batch) -> torch.Tensor:
    """Return normalised images [B, 3, H, W]."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return ((torch.from_numpy(batch.image) / 255 - mean) / std).permute(0, 3, 1, 2)


def rate(step: int, peak: float, minimum: float) -> float:
    """Return the learning rate of the update that `step` others came before."""
    if step < WARMUP_STEPS:
        return peak * step / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / (TOTAL_STEPS - WARMUP_STEPS)
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * progress)) / 2


def layer_id(name: str, blocks: int) -> int:
    """Return 0 for what makes the tokens, b + 1 for block b, and blocks + 1 for the rest."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else blocks + 1


def parameter_groups(theirs: VisionTransformer, recipe: Finetuning) -> list[dict]:
    """Return a group for each layer and for decay or none, with the factor of its rate."""
    top = len(theirs.blocks) + 1
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in theirs.named_parameters():
        layer = layer_id(name, top - 1)
        decays = parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
        group = {
            "params": [],
            "weight_decay": recipe.weight_decay if decays else 0.0,
            "factor": recipe.layer_decay ** (top - layer),
        }
        groups.setdefault((layer, decays), group)["params"].append(parameter)
    return list(groups.values())


def finetune(params: Tree, batches: list[Batch], recipe: Finetuning) -> Trained:
    """Fine-tune their model from `params`, a step a batch; returns parameters in our layout."""
    theirs = build(classifier(recipe.pooling), params).train()
    groups = parameter_groups(theirs, recipe)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, recipe.b2), eps=1e-8)
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    losses = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, recipe.peak, recipe.minimum) * group["factor"]
        loss = criterion(theirs(pixels(batch)), torch.from_numpy(batch.label).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return Trained(np.asarray(losses), to_ours(theirs, params))


class Lars(torch.optim.Optimizer):
    """LARS as the official linear probing has it: the rate comes after the momentum."""

    def __init__(self, parameters, momentum: float, weight_decay: float, trust_coefficient: float):
        fields = {"momentum": momentum, "decay": weight_decay, "trust": trust_coefficient}
        super().__init__(parameters, {"lr": 0.0, **fields})

    @torch.no_grad()
    def step(self) -> None:
        """Make an update."""
        for group in self.param_groups:
            for p in group["params"]:
                g = p.grad
                if p.ndim > 1:
                    g = g + group["decay"] * p
                    norms = p.norm(), g.norm()
                    if min(norms) > 0:
                        g = g * (group["trust"] * norms[0] / norms[1])
                mu = self.state[p].setdefault("mu", torch.zeros_like(p))
                mu.mul_(group["momentum"]).add_(g)
                p.sub_(group["lr"] * mu)


def probe(params: Tree, batches: list[Batch], recipe: Probing) -> Probed:
    """Train a batch norm for each group, and a head on them all, from `params`; see `Probed`."""
    model = classifier("cls", norm_group=BATCH_SIZE // recipe.norm_groups)
    theirs = build(model, params).eval()
    width, count = model.encoder.embed_dim, recipe.norm_groups
    norms = [nn.BatchNorm1d(width, affine=False, eps=EPS).train() for _ in range(count)]
    optimizer = Lars(
        theirs.head.parameters(), recipe.momentum, recipe.weight_decay, recipe.trust_coefficient
    )
    losses = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, recipe.peak, 0.0)
        with torch.no_grad():
            features = theirs.features(pixels(batch))
        # Group j holds the rows j, j + count, j + 2 count ...
        normed = [norm(features[j::count]) for j, norm in enumerate(norms)]
        label = torch.from_numpy(batch.label).long()
        labels = [label[j::count] for j in range(count)]
        loss = nn.functional.cross_entropy(theirs.head(torch.cat(normed)), torch.cat(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    norm = nn.BatchNorm1d(width, affine=False, eps=EPS).eval()
    norm.running_mean = torch.stack([n.running_mean for n in norms]).mean(dim=0)
    norm.running_var = torch.stack([n.running_var for n in norms]).mean(dim=0)
    with torch.no_grad():
        logits = theirs.head(norm(theirs.features(pixels(batches[0]))))
    head = to_ours(theirs, {path: a for path, a in params.items() if path.startswith("head/")})
    mean, var = norm.running_mean.numpy(), norm.running_var.numpy()
    return Probed(Trained(np.asarray(losses), head), mean, var, logits.numpy())
