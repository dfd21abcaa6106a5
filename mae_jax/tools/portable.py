"""A model as bytes that other programs read: StableHLO with its weights, or safetensors."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator

import jax
import jax.export
import numpy as np
import safetensors.numpy
from etils import epath
from flax import traverse_util

import mae_jax
from mae_jax import api, build
from mae_jax.errors import ConfigError
from mae_jax.files import completed
from mae_jax.models.classifier import Classifier
from mae_jax.tools.outputs import Output, choose, image_shape, output_shape, variables

PLATFORMS = ("cpu", "cuda", "tpu")
LARGEST = 2**31  # bytes of a flatbuffer, the container of jax.export


def write(flags: argparse.Namespace) -> None:
    """Write what the flags of `mae_jax.tools.export` ask for and say what it is.

    Raises:
      ConfigError: if the checkpoint is no good or has no such output, or nothing can be written.
    """
    model = api.load(flags.checkpoint)
    out = epath.Path(flags.out).expanduser()
    if out.suffix == ".stablehlo":
        pool = flags.pool or ("logits" if isinstance(model.module, Classifier) else "mean")
        output = choose(model, pool)
        content = program(model, output)
        what = f"{pool}, {signature(model, output)}"
    else:
        content = parameters(model)
        what = "float32 parameters"
    with completed(out) as temporary:
        temporary.write_bytes(content)
    weights = ", averaged weights" if model.averaged else ""
    print(f"{out}: {what}, {len(content) / 1e6:.3g} MB, step {model.step}{weights}")


def program(model: api.Pretrained, output: Output) -> bytes:
    """Return a function from images, uint8 [b, H, W, C] with any b, serialised with its weights.

    `jax.export.deserialize` makes an object of it whose `call` runs on `PLATFORMS`. The products
    are in the dtype that the model has on the devices of this process.

    Args:
      model: a pre-trained model or a classifier.
      output: see `mae_jax.tools.outputs`.

    Raises:
      ConfigError: if the weights are too large for the container.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params["encoder"]))
    if size >= LARGEST:
        raise ConfigError(
            f"--out: expected an encoder below {LARGEST / 1e9:.2f} GB, which is all that a"
            f" .stablehlo file holds, got {size / 1e9:.2f} GB: take .safetensors"
        )
    shape = ", ".join(map(str, image_shape(model)))
    images = jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"b, {shape}"), np.uint8)
    jitted = jax.jit(lambda images: output(variables(model), images))
    with _no_source_lines():
        return bytes(jax.export.export(jitted, platforms=PLATFORMS)(images).serialize())


@contextlib.contextmanager
def _no_source_lines() -> Iterator[None]:
    """Keep out of programs where the source of each operation lies on this machine."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def signature(model: api.Pretrained, output: Output) -> str:
    """Return a line on what `program` takes and returns."""
    given, returned = (
        f"[b, {', '.join(map(str, shape))}]"
        for shape in (image_shape(model), output_shape(model, output))
    )
    products = np.dtype(build.compute_dtype(model.config)).name
    return f"uint8 {given} -> float32 {returned}, {products} products"


def parameters(model: api.Pretrained) -> bytes:
    """Return the parameters as a safetensors file, by names such as `encoder/norm/scale`.

    The batch statistics of a linear probe are there too, under `batch_stats/`.
    Its metadata are strings, as the format wants them: `config`, `step` and `averaged` in JSON, and
    `mae_jax`, the version.
    """
    arrays = traverse_util.flatten_dict(jax.device_get(model.params | model.extra), sep="/")
    metadata = {
        "config": json.dumps(model.config.to_dict()),
        "step": json.dumps(model.step),
        "averaged": json.dumps(model.averaged),
        "mae_jax": mae_jax.__version__,
    }
    return safetensors.numpy.save(arrays, metadata)
