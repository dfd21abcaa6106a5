"""What is compared in PyTorch: ViTMAE of transformers, and the official code where it is given."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
import types
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from mae_jax.tools import rounds


def make(spec: dict[str, Any]) -> Trained:
    """Return the contender that a spec names; see `mae_jax.tools.peer_times`.

    Raises:
      ImportError: if a library or the checkout is not there.
    """
    return Trained(spec)


def device_kind() -> str:
    """Return what PyTorch calls the device."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def peak_bytes() -> int | None:
    """Return the most bytes that were in use on the device; None: it does not say."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


class Trained:
    """A model with fused AdamW around it; products in bfloat16 by autocast if asked for."""

    # Its first steps compile, if anything does: they are part of warming up.
    compile_seconds = None

    def __init__(self, spec: dict[str, Any]):
        """Build it."""
        import torch

        torch.manual_seed(0)
        torch.set_num_threads(spec["threads"])
        # As XLA has it on a GPU: products of float32 may round their factors.
        torch.set_float32_matmul_precision("high")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        name = spec["name"]
        model, self._loss, self.note = official(spec) if name == "official" else transformers(spec)
        self._model = model.to(self._device).train()
        self._forward = torch.compile(self._model) if name == "compile" else self._model
        self._optimizer = optimizer(self._model, spec["adamw"])
        self._bfloat16 = spec["dtype"] == "bfloat16"
        side = spec["dims"]["image_size"]
        rng = np.random.default_rng(0)
        shape = (spec["batch_size"], 3, side, side)
        self._images = [
            torch.from_numpy(rng.standard_normal(shape, np.float32)).to(self._device)
            for _ in range(rounds.BATCHES)
        ]
        self._taken = 0

    def take(self, steps: int) -> float:
        """Take steps, to their end; return the last loss."""
        import torch

        for _ in range(steps):
            images = self._images[self._taken % len(self._images)]
            self._taken += 1
            with (
                torch.autocast(self._device.type, dtype=torch.bfloat16)
                if self._bfloat16
                else contextlib.nullcontext()
            ):
                loss = self._loss(self._forward, images)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    def checksum(self) -> int:
        """Return a number that changes when parameters do."""
        weight = next(p for p in self._model.parameters() if p.requires_grad and p.ndim > 1)
        return zlib.crc32(weight.detach().float().cpu().numpy().tobytes())


def optimizer(model: Any, adamw: dict[str, float]) -> Any:
    """Return fused AdamW with two groups: vectors do not decay, all else does."""
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": adamw["weight_decay"]},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=adamw["learning_rate"],
        betas=(adamw["b1"], adamw["b2"]),
        eps=adamw["eps"],
        fused=True,
    )


def transformers(spec: dict[str, Any]) -> tuple[Any, Callable[[Any, Any], Any], str | None]:
    """Return a model, (model, images) -> loss, and a note."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    dims = spec["dims"]
    config = ViTMAEConfig(
        hidden_size=dims["embed_dim"],
        num_hidden_layers=dims["depth"],
        num_attention_heads=dims["num_heads"],
        intermediate_size=4 * dims["embed_dim"],
        decoder_hidden_size=dims["decoder_embed_dim"],
        decoder_num_hidden_layers=dims["decoder_depth"],
        decoder_num_attention_heads=dims["decoder_num_heads"],
        decoder_intermediate_size=4 * dims["decoder_embed_dim"],
        image_size=dims["image_size"],
        patch_size=dims["patch_size"],
        mask_ratio=spec["mask_ratio"],
        norm_pix_loss=True,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    config._attn_implementation = "eager" if spec["name"] == "eager" else "sdpa"
    return ViTMAEForPreTraining(config), lambda model, images: model(pixel_values=images).loss, None


def official(spec: dict[str, Any]) -> tuple[Any, Callable[[Any, Any], Any], str | None]:
    """Return the model of a checkout of facebookresearch/mae, (model, images) -> loss, and a note.

    Its files are left alone. What it needs of timm and numpy and is no more, is made up for here.

    Raises:
      ImportError: if it is not there.
    """
    import torch

    vars(np).setdefault("float", float)
    note = _provide_timm()
    sys.path.insert(0, spec["official"])
    theirs = importlib.import_module("models_mae")
    dims = dict(spec["dims"])
    model = theirs.MaskedAutoencoderViT(
        img_size=dims.pop("image_size"),
        **dims,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
        norm_pix_loss=True,
    )
    return model, lambda model, images: model(images, spec["mask_ratio"])[0], note


def _provide_timm() -> str:
    """See to it that `timm.models.vision_transformer` imports; return whose blocks it has."""
    from torch import nn

    found: Any
    try:
        found = importlib.import_module("timm.models.vision_transformer")
    except ImportError:  # not there, or too old for this torch
        for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
            del sys.modules[name]
        for name in ("timm", "timm.models"):
            sys.modules[name] = types.ModuleType(name)
        made = types.ModuleType("timm.models.vision_transformer")
        made.Block, made.PatchEmbed = _timm_classes(nn)  # type: ignore[attr-defined]
        sys.modules[made.__name__] = made
        return "blocks: ours, after timm 0.3.2"
    if "qk_scale" not in inspect.signature(found.Block.__init__).parameters:
        block = found.Block
        found.Block = lambda *args, qk_scale=None, **kwargs: block(*args, **kwargs)
    return f"blocks: timm {sys.modules['timm'].__version__}"


def _timm_classes(nn: Any) -> tuple[type, type]:
    """Return `Block` and `PatchEmbed` with the arguments that timm 0.3.2 has for them."""

    class Attention(nn.Module):
        def __init__(self, dim: int, num_heads: int, qkv_bias: bool):
            super().__init__()
            self.num_heads = num_heads
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
            self.proj = nn.Linear(dim, dim)

        def forward(self, x: Any) -> Any:
            b, t, d = x.shape
            head_dim = d // self.num_heads
            qkv = self.qkv(x).reshape(b, t, 3, self.num_heads, head_dim).permute(2, 0, 3, 1, 4)
            q, k, v = qkv[0], qkv[1], qkv[2]
            weights = ((q @ k.transpose(-2, -1)) * head_dim**-0.5).softmax(dim=-1)
            return self.proj((weights @ v).transpose(1, 2).reshape(b, t, d))

    class Mlp(nn.Module):
        def __init__(self, dim: int, hidden: int):
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

        def forward(self, x: Any) -> Any:
            return self.fc2(self.act(self.fc1(x)))

    class Block(nn.Module):
        def __init__(
            self,
            dim: int,
            num_heads: int,
            mlp_ratio: float = 4.0,
            qkv_bias: bool = False,
            qk_scale: float | None = None,
            norm_layer: Any = nn.LayerNorm,
        ):
            super().__init__()
            self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
            self.attn = Attention(dim, num_heads, qkv_bias)
            self.mlp = Mlp(dim, int(dim * mlp_ratio))

        def forward(self, x: Any) -> Any:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    class PatchEmbed(nn.Module):
        def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int):
            super().__init__()
            self.patch_size = (patch_size, patch_size)
            self.num_patches = (img_size // patch_size) ** 2
            self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

        def forward(self, x: Any) -> Any:
            return self.proj(x).flatten(2).transpose(1, 2)

    return Block, PatchEmbed
