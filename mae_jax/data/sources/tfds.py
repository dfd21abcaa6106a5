"""A set of TensorFlow Datasets, prepared as array_record or TFRecord, read without TensorFlow.

`data.path` is a TFDS name (`imagenet2012`, `name/config:1.0.0`) in the usual data folder
(`TFDS_DATA_DIR`, else `~/tensorflow_datasets`), or the folder of a prepared set. Images arrive as
the bytes that were stored; EXIF rotation is not applied, as TFDS does not. TFRecord files must be
local, and are looked through when they are opened. Prepare a set once with

    import tensorflow_datasets as tfds
    tfds.builder("imagenet2012", file_format="array_record").download_and_prepare()
"""

from __future__ import annotations

import functools
import hashlib
import os
from typing import Any

from mae_jax.data.sources import tfrecord
from mae_jax.errors import ConfigError


class TfdsSource:
    """The records of one split.

    Attributes:
      records: a random-access data source of TFDS.
      name: of set and split, for messages.
      num_classes: of its label; 0 if it has none.
    """

    exif = False

    def __init__(self, records: Any, name: str, num_classes: int):
        self.records = records
        self.name = name
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            record = self.records[index]
        except RuntimeError as error:  # what array_record raises for a damaged file
            raise OSError(str(error)) from error
        label = int(record["label"]) if self.num_classes else -1
        return {"image": record["image"], "label": label}

    def describe(self, index: int) -> str:
        """Name the record by its place in the split."""
        return f"record {index} of {self.name}"

    def fingerprint(self) -> str:
        """Digest name, version, split and size, not the images."""
        text = f"{self.name} {len(self)}"
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def make(split: str, *, path: str, held_out: float = 0.1) -> TfdsSource:
    """Return a split of a prepared set.

    Args:
      split: as TFDS has it: "train", "validation", "train[:90%]".
      path: name of the set, or folder of a prepared one.
      held_out: not used; the splits are those of the set.

    Raises:
      ConfigError: if there is no such set or split, if it is not prepared, or in a format without
        random access, if a TFRecord file is damaged, or if there is no feature `image`.
    """
    del held_out
    import tensorflow_datasets as tfds

    builder = _builder(tfds, path)
    name = builder.info.full_name
    if not builder.info.splits:
        raise ConfigError(
            f"data.path: {name} is not prepared in {builder.data_dir}; once:"
            f" tfds.builder({path!r}, file_format='array_record').download_and_prepare()"
        )
    file_format = builder.info.file_format.value
    if file_format not in ("array_record", "parquet", "tfrecord"):
        raise ConfigError(
            f"data.path: {name} is prepared as {file_format}, which cannot be read in random order;"
            " prepare it in another data folder with file_format='array_record'"
        )
    features = builder.info.features
    if "image" not in features:
        raise ConfigError(f"data.path: {name} has no feature image, but {', '.join(features)}")
    try:
        parts = builder.info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        splits = ", ".join(builder.info.splits)
        raise ConfigError(
            f"data.split, data.eval_split: {name} has {splits}, got {split!r}"
        ) from error
    decoders = {"image": tfds.decode.SkipDecoding()}
    if file_format == "tfrecord":
        records: Any = tfrecord.Records(
            [
                tfrecord.Part(os.fspath(p.filename), p.skip, p.take, p.examples_in_shard)
                for p in parts
            ],
            functools.partial(features.deserialize_example_np, decoders=decoders),
        )
    else:
        records = builder.as_data_source(split, decoders=decoders)
    label = features["label"] if "label" in list(features) else None
    num_classes = getattr(label, "num_classes", None) or 0
    return TfdsSource(records, f"{name} {split}", num_classes)


def _builder(tfds: Any, path: str) -> Any:
    if not path:
        raise ConfigError("data.path: expected the name of a TFDS set or a folder, got nothing")
    folder = os.path.expanduser(path)
    try:
        if os.path.isdir(folder):
            return tfds.builder_from_directory(folder)
        return tfds.builder(path)
    except Exception as error:  # the name, a version, a folder of something else: many types
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"data.path: {path!r} is no set of TFDS here: {reason}") from error
