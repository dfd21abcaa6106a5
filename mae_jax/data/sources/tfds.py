"""A set of TensorFlow Datasets, prepared as array_record or TFRecord, read without TensorFlow.

`data.path` is a TFDS name (`imagenet2012`, `name/config:1.0.0`) in the usual data folder
(`TFDS_DATA_DIR`, else `~/tensorflow_datasets`), or the folder of a prepared set. Images arrive as
the bytes that were stored; EXIF rotation is not applied, as TFDS does not. TFRecord files must be
local, and are looked through when they are opened. `data.caption` names the feature with the
captions, where there are such: `caption`, or `captions/text` for the `text` of each of `captions`
(coco_captions). Prepare a set once with

    import tensorflow_datasets as tfds
    tfds.builder("imagenet2012", file_format="array_record").download_and_prepare()
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mae_jax.data.sources import array_record, tfrecord
from mae_jax.errors import ConfigError


class TfdsSource:
    """The records of one split.

    Attributes:
      records: a random-access data source of TFDS.
      name: of set and split, for messages.
      classes: names of the values of its label; empty if it has none.
      num_classes: number of these values.
      caption: names of the feature that holds captions, from the outside in; empty: none does.
    """

    exif = False

    def __init__(
        self, records: Any, name: str, classes: Sequence[str], caption: Sequence[str] = ()
    ):
        self.records = records
        self.name = name
        self.caption = tuple(caption)
        self.classes = tuple(classes)
        self.num_classes = len(self.classes)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = array_record.read(self.records, index)
        label = int(record["label"]) if self.num_classes else -1
        captions = {"caption": _texts(record, self.caption)} if self.caption else {}
        return {"image": record["image"], "label": label, **captions}

    def captions(self) -> Iterator[str]:
        """Iterate over all captions, of records that can be read."""
        for index in range(len(self) if self.caption else 0):
            try:
                record = array_record.read(self.records, index)
            except OSError:
                continue
            yield from _texts(record, self.caption)

    def describe(self, index: int) -> str:
        """Name the record by its place in the split."""
        return f"record {index} of {self.name}"

    def fingerprint(self) -> str:
        """Digest name, version, split, size and the feature with captions, not the images."""
        text = " ".join([self.name, str(len(self)), *self.caption])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def make(split: str, *, path: str, held_out: float = 0.1, caption: str = "") -> TfdsSource:
    """Return a split of a prepared set.

    Args:
      split: as TFDS has it: "train", "validation", "train[:90%]".
      path: name of the set, or folder of a prepared one.
      held_out: not used; the splits are those of the set.
      caption: the feature that holds captions, "/" before one within another; "": none.

    Raises:
      ConfigError: if there is no such set or split, if it is not prepared, or in a format without
        random access, if a TFRecord file is damaged, or if there is no feature `image` or no text
        `caption`.
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
    within = _path_to(features, caption, name) if caption else ()
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
    label: Any = features["label"] if "label" in list(features) else None
    # Numbers, where the set gives its classes no names.
    classes = label.names if getattr(label, "num_classes", None) else ()
    return TfdsSource(records, f"{name} {split}", classes, within)


def _path_to(features: Any, caption: str, name: str) -> tuple[str, ...]:
    """Return the names, from the outside in, of a feature of texts."""
    # A name may hold a slash itself, as `image/filename` does.
    within = (caption,) if caption in features else tuple(caption.split("/"))
    feature = features
    try:
        for part in within:
            feature = feature[part]
        is_text = feature.np_dtype == np.object_
    except (KeyError, TypeError, AttributeError):  # of a feature without any within
        is_text = False
    if not is_text:
        raise ConfigError(
            f"data.caption: expected a feature of texts, such as caption or captions/text, got"
            f" {caption!r}; {name} has {', '.join(features)}"
        )
    return within


def _texts(record: Any, within: Sequence[str]) -> tuple[str, ...]:
    """Return the captions of a record, of which one feature holds one or several."""
    for part in within:
        record = record[part]
    return tuple(
        one.decode(errors="replace") if isinstance(one, bytes) else str(one)
        for one in np.ravel(np.asarray(record, object))
    )


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
