"""Features of every example of a split, in shards: a shard is there in full or not at all."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import api, build
from mae_jax.data import loader
from mae_jax.data.sources import Source, open_split, other_data, source_fields
from mae_jax.errors import ConfigError
from mae_jax.files import completed, is_local, written_locally
from mae_jax.tools import array_records, beam, manifests
from mae_jax.tools.outputs import Output, Variables, choose, output_shape, outputs, variables
from mae_jax.train import sharding
from mae_jax.types import Params

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Shards:
    """The files of a split, and who is in which.

    Attributes:
      folder: of the files.
      total: number of examples of the split.
      size: examples of a file; the last one may have fewer.
      format: "npz" or "array_record".
      scratch: see `mae_jax.files.completed`.
    """

    folder: epath.Path
    total: int
    size: int
    format: str
    scratch: epath.Path | None = None

    def __len__(self) -> int:
        return -(-self.total // self.size)

    def path(self, number: int) -> epath.Path:
        """Return the file of a shard."""
        return self.folder / f"features-{number:05d}-of-{len(self):05d}.{self.format}"

    def examples(self, number: int) -> range:
        """Return the examples of a shard, by index in the source."""
        return range(number * self.size, min((number + 1) * self.size, self.total))

    def missing(self) -> list[int]:
        """Return the shards that are still to be written."""
        return [number for number in range(len(self)) if not self.path(number).exists()]

    def write(self, number: int, arrays: Arrays) -> None:
        """Write a shard; the same arrays give the same bytes.

        An npz file holds the arrays. A record of an array_record file is an npz file of one row.

        Raises:
          ConfigError: if it cannot be written.
        """
        with (
            completed(self.path(number), scratch=self.scratch) as temporary,
            written_locally(temporary) as local,
        ):
            if self.format == "npz":
                with open(local, "wb") as file:
                    _save(file, arrays)
                return
            with array_records.writing(local, "group_size:1") as writer:
                for row in zip(*arrays.values(), strict=True):
                    record = io.BytesIO()
                    _save(record, dict(zip(arrays, row, strict=True)))
                    writer.write(record.getvalue())


def _save(file: IO[bytes], arrays: Mapping[str, Any]) -> None:
    np.savez(file, **arrays)


@dataclasses.dataclass(frozen=True)
class Extraction:
    """What is to be extracted, and into which files.

    Attributes:
      model: has the parameters and says how images are prepared.
      pool: name of the output.
      output: from images to features.
      data: `config.data` of the examples.
      source: of the examples.
      shards: divides them; the size is a multiple of `batch_size`, so that an example has the same
        batch wherever we begin.
      batch_size: images at a time.
    """

    model: api.Pretrained
    pool: str
    output: Output
    data: ConfigDict
    source: Source
    shards: Shards
    batch_size: int

    @classmethod
    def open(cls, flags: argparse.Namespace) -> Extraction:
        """Load and open what the flags of `mae_jax.tools.extract_features` name.

        Raises:
          ConfigError: if the checkpoint or the data are no good.
        """
        model = api.load(flags.checkpoint)
        pool = flags.pool or next(iter(outputs(model)))
        output = choose(model, pool)
        given = {"source": flags.source, "path": flags.path, "eval_split": flags.split}
        data = other_data(model.config.data, given)
        data.path = _whole_path(data.path)
        source = open_split(data, data.eval_split)
        folder = epath.Path(flags.out).expanduser()
        scratch = folder / beam.SCRATCH if flags.beam else None
        shards = Shards(folder, len(source), flags.shard_size, flags.format, scratch)
        return cls(model, pool, output, data, source, shards, flags.batch_size)

    def claim(self) -> None:
        """Claim the folder for these features.

        Raises:
          ConfigError: if it holds others.
        """
        model, shards = self.model, self.shards
        manifests.claim(
            shards.folder / "features.json",
            {
                "checkpoint": {
                    "step": model.step,
                    "averaged": model.averaged,
                    "parameters": digest(model.params | {"extra": model.extra}),
                },
                "source": {
                    "name": self.data.source,
                    "split": self.data.eval_split,
                    **source_fields(self.data),
                    "fingerprint": self.source.fingerprint(),
                },
                "features": {
                    "pool": self.pool,
                    "shape": list(output_shape(model, self.output)),
                    "products": np.dtype(build.compute_dtype(model.config)).name,
                },
                "files": {
                    "format": shards.format,
                    "count": len(shards),
                    "examples": shards.total,
                    "shard_size": shards.size,
                    "batch_size": self.batch_size,
                },
            },
            files="features-*-of-*",
            field="--out",
        )

    def write(self, numbers: Sequence[int]) -> None:
        """Write some shards, in ascending order; says of each that it is there."""
        shards = self.shards
        mesh = sharding.make_mesh(-1, 1)
        for number, arrays in extract(
            self.model, self.output, self.source, shards, numbers, self.batch_size, mesh
        ):
            shards.write(number, arrays)
            bad = arrays["replaced"].sum()
            note = f", {bad} of them bad, with the features of the next good one" if bad else ""
            # At once, that a log shows how far it is.
            print(f"{shards.path(number).name}: {len(arrays['index'])} examples{note}", flush=True)


def write(flags: argparse.Namespace) -> None:
    """Write what the flags of `mae_jax.tools.extract_features` ask for and is not there yet.

    Raises:
      ConfigError: if the checkpoint or the data are no good, or the folder holds other features.
    """
    extraction = Extraction.open(flags)
    extraction.claim()
    model, data, shards = extraction.model, extraction.data, extraction.shards
    missing = shards.missing()
    weights = ", averaged weights" if model.averaged else ""
    print(
        f"{shards.folder}: {extraction.pool} {list(output_shape(model, extraction.output))} of"
        f" {shards.total:,} examples, {data.source} {data.eval_split}, step {model.step}{weights}"
    )
    if len(missing) < len(shards):
        print(f"{len(shards) - len(missing)} of {len(shards)} files are there already")
    if flags.beam:
        write_with_beam(flags, data.path, shards, missing)
    else:
        extraction.write(missing)
    beam.remove_scratch(shards.folder)
    print(f"complete: {len(shards)} files")


def write_with_beam(
    flags: argparse.Namespace, data_path: str, shards: Shards, missing: Sequence[int]
) -> None:
    """Have workers of Beam write the shards that are missing; `data_path` is of the examples.

    Raises:
      ConfigError: if workers do not see the folders of `flags`, under the same path, or if their
        checkpoint or examples are others than those that the folder is claimed for.
    """
    if missing:
        flags = _with_whole_paths(flags, data_path)
        beam.run(missing, functools.partial(_writer, flags), flags.beam_options)
    if lost := shards.missing():
        raise ConfigError(
            f"--out={shards.folder}: expected a folder that all workers share, got no"
            f" {shards.path(lost[0]).name} in it"
        )


def _writer(flags: argparse.Namespace) -> Callable[[int], None]:
    """Return what a worker does with the number of a shard."""
    extraction = Extraction.open(flags)
    extraction.claim()  # a run that goes on may have a newer step by now

    def write_one(number: int) -> None:
        if not extraction.shards.path(number).exists():
            extraction.write([number])

    return write_one


def _with_whole_paths(flags: argparse.Namespace, data_path: str) -> argparse.Namespace:
    """Return flags that mean the same in another folder, where Beam's workers run."""
    paths = {
        name: os.path.abspath(os.path.expanduser(getattr(flags, name)))
        for name in ("checkpoint", "out")
        if is_local(getattr(flags, name))
    }
    return argparse.Namespace(**vars(flags) | paths | {"path": data_path})


def _whole_path(path: str) -> str:
    """Return `data.path`, absolute if there is such a file here: it may be the name of a set."""
    local = os.path.expanduser(path)
    return os.path.abspath(local) if os.path.exists(local) else path


def digest(params: Params) -> str:
    """Return a short hexadecimal digest of names and values."""
    state = hashlib.blake2b(digest_size=8)
    for name, leaf in sorted(traverse_util.flatten_dict(params, sep="/").items()):
        state.update(name.encode())
        state.update(np.asarray(leaf).tobytes())
    return state.hexdigest()


def extract(
    model: api.Pretrained,
    output: Output,
    source: Source,
    shards: Shards,
    missing: Sequence[int],
    batch_size: int,
    mesh: Mesh,
) -> Iterator[tuple[int, Arrays]]:
    """Yield (number, arrays) of the shards that are missing.

    The arrays are `features` float32 [n, ...]; `label` int32 [n], -1 for none; `index` int32 [n],
    of the example in the source; and `replaced` bool [n]: the image cannot be read, and features
    and label are those of the next one that can.

    Args:
      model: has the parameters and says how images are prepared.
      output: from images to features.
      source: of the examples.
      shards: divides them; the size is a multiple of `batch_size`, so that an example has the same
        batch wherever we begin.
      missing: numbers of shards, ascending.
      batch_size: images at a time.
      mesh: devices to share a batch.
    """
    if not missing:
        return
    batches = loader.eval_batches(
        source,
        build.build_eval_reader(model.config.data, one_view=True),
        batch_size=batch_size,
        examples=[index for number in missing for index in shards.examples(number)],
    )
    computed = _computed(output, variables(model), batches, mesh)
    for number in missing:
        count = len(shards.examples(number))
        parts = list(itertools.islice(computed, -(-count // batch_size)))
        yield number, {name: np.concatenate([p[name] for p in parts])[:count] for name in parts[0]}


def _computed(
    output: Output, values: Variables, batches: loader.EvalBatches, mesh: Mesh
) -> Iterator[Arrays]:
    """Yield the arrays of each batch; the next one is computed while one is fetched and used."""
    put = build.put_function(mesh)
    values = jax.device_put(values, sharding.replicated(mesh))
    before: tuple[jax.Array, Arrays] | None = None
    for batch in batches:
        images = batch["image"]
        padding = -len(images) % mesh.size
        images = np.pad(images, [(0, padding), *[(0, 0)] * (images.ndim - 1)])
        after = _apply(output, values, put({"image": images})["image"]), batch
        if before is not None:
            yield _fetched(*before)
        before = after
    if before is not None:
        yield _fetched(*before)


@functools.partial(jax.jit, static_argnums=0)
def _apply(output: Output, values: Variables, images: jax.Array) -> jax.Array:
    return output(values, images)


def _fetched(features: jax.Array, batch: Arrays) -> Arrays:
    return {
        "features": jax.device_get(features)[: len(batch["asked"])],
        "label": batch["label"],
        "index": batch["asked"],
        "replaced": batch["replaced"],
    }
