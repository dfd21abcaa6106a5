"""The other side of the comparison of training: a plain PyTorch loop. Needs torch.

Written after the description of the official recipe: AdamW with decay for all but vectors, as timm
groups parameters (tokens have three axes there, as here), and a rate set anew at each step.
Position tables are not trained.

Source: arXiv 2111.06377, table 8.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from mae_jax.pretrain import mae
from mae_jax.recipes import IMAGENET_MEAN, IMAGENET_STD
from tests.oracle import transformers_mae
from tests.oracle.agreement import Trained, Tree
from tests.oracle.training_case import (
    B1,
    B2,
    DECAY,
    EPS,
    PEAK,
    TOTAL_STEPS,
    WARMUP_STEPS,
    Batch,
)


def rate(step: int) -> float:
    """Return the learning rate of the update that `step` others came before."""
    if step < WARMUP_STEPS:
        return PEAK * step / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / (TOTAL_STEPS - WARMUP_STEPS)
    return PEAK * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return AdamW with two groups: vectors do not decay, all else does."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(B1, B2), eps=EPS)


def train(
    model: mae.MaskedAutoencoder,
    params: Tree,
    batches: list[Batch],
    dtype: torch.dtype = torch.float32,
) -> Trained:
    """Train their model from `params`, a step a batch; returns its parameters in our layout.

    Args:
      model: ours, for its dimensions.
      params: arrays by path.
      batches: the first of the run.
      dtype: of parameters and products.
    """
    theirs = transformers_mae.build(model, params).to(dtype).train()
    optimizer = make_optimizer(theirs)
    mean, std = (torch.tensor(x, dtype=dtype) for x in (IMAGENET_MEAN, IMAGENET_STD))
    losses = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        pixels = (torch.from_numpy(batch.image).to(dtype) / 255 - mean) / std
        out = theirs(pixel_values=pixels.permute(0, 3, 1, 2), noise=torch.from_numpy(batch.noise))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    trained = dict(theirs.named_parameters())
    return Trained(np.asarray(losses), transformers_mae.in_our_layout(trained, params))
