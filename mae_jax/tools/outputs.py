"""What a trained model makes of images, as pure functions by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from mae_jax.api import Pretrained
from mae_jax.errors import ConfigError
from mae_jax.models.classifier import Classifier
from mae_jax.tasks.inputs import ImageModel
from mae_jax.types import Params

Variables = tuple[Params, Any]


def variables(model: Pretrained) -> Variables:
    """Return parameters and extra variables of a model."""
    return model.params, model.extra


@dataclasses.dataclass(frozen=True)
class Output:
    """A pure function of (variables, images uint8 [B, H, W, C]) that returns float32 [B, ...].

    Variables are the parameters and what a module has beside them, as `variables` returns them.

    Equal ones are compiled once.

    Attributes:
      task: the module with the normalisation of its input.
      name: of the module's function that is called.
      first_token: take the first of the tokens that it returns.
    """

    task: ImageModel
    name: str
    first_token: bool = False

    def __call__(self, variables: Variables, images: jax.Array) -> jax.Array:
        """Return what the module makes of images."""
        params, extra = variables
        output = self.task.call(self.name, params, {"image": images}, extra=extra)
        return output[:, 0] if self.first_token else output


def outputs(model: Pretrained) -> dict[str, Output]:
    """Return what there is to be had of a model; its features are first.

    Of a pre-trained model these are `mean`, float32 [B, D], the mean of the patch tokens; `tokens`,
    float32 [B, c + N, D]; and `cls`, float32 [B, D], where there is a class token; all after the
    final norm. Of a classifier they are what its linear layer sees, float32 [B, D], by the name of
    its pooling, `mean` or `cls`; and `logits`, float32 [B, classes].
    """
    task, module = model.task, model.module
    if isinstance(module, Classifier):
        return {module.pooling: Output(task, "features"), "logits": Output(task, "logits")}
    known = {"mean": Output(task, "features"), "tokens": Output(task, "encode")}
    if module.encoder.use_cls_token:
        known["cls"] = Output(task, "encode", first_token=True)
    return known


def output_shape(model: Pretrained, output: Output) -> tuple[int, ...]:
    """Return the shape of what `output` makes of one image."""
    images = jax.ShapeDtypeStruct((1, *image_shape(model)), np.uint8)
    return jax.eval_shape(output, variables(model), images).shape[1:]


def image_shape(model: Pretrained) -> tuple[int, ...]:
    """Return the shape of an image, (H, W, C)."""
    return model.module.example()["image"].shape


def choose(model: Pretrained, pool: str) -> Output:
    """Return the output that `--pool` names.

    Raises:
      ConfigError: if the model has none of that name.
    """
    known = outputs(model)
    if pool not in known:
        kind = "classifier" if isinstance(model.module, Classifier) else "pre-trained model"
        raise ConfigError(f"--pool={pool}: expected {', '.join(known)} of this {kind}")
    return known[pool]
