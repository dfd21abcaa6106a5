"""Images that `python -m mae_jax.tools.prepare_data` has put into array_record shards.

`data.path` is a folder with

- `manifest.json`: what the shards were made of, and of each its examples, bytes and SHA-256. It is
  written last: a folder without it is not finished.
- `train-00000-of-00016.array_record`, ..., and the same for `val` if the images had such a split:
  the images, sorted by name as the folder source has them. A record is one line of JSON,
  `{"label": 3, "name": "cats/1.jpg"}` (-1: no label), a line feed, and the bytes of an image file.
- `train.index.json` (and `val`): `labels` and `names` of all records in their order.

Without a split `val`, `data.held_out` of the images are held out, the same ones as of a folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath

from mae_jax.data.sources import array_record, held_out_split, is_training
from mae_jax.data.sources.folder import existing_folder, held_out_names
from mae_jax.errors import ConfigError

FORMAT = 1
MANIFEST = "manifest.json"
STARTED = "started.json"  # there from the first moment on


@dataclasses.dataclass(frozen=True)
class _Shard:
    """What `ArrayRecordDataSource` wants to know of a file, so that it need not open it."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class Prepared:
    """Some records of a split.

    Attributes:
      shards: paths of the shards.
      starts: int64, the number of the first record of each.
      names: relative paths that the images had, of all records.
      indices: int64 [N], the records that are the examples.
      labels: int32 [N], the class of each example, -1 without one.
      num_classes: 0 if the images have no labels.
      classes: names of the classes; empty if they have none.
    """

    exif = True  # images that were not resized are the files' bytes

    def __init__(
        self,
        folder: str,
        split: Mapping[str, Any],
        content: Mapping[str, Sequence[Any]],
        indices: Sequence[int] | np.ndarray,
        classes: Sequence[str],
    ):
        self.shards = [os.path.join(folder, shard["file"]) for shard in split["shards"]]
        counts = [int(shard["examples"]) for shard in split["shards"]]
        self.starts = np.cumsum([0, *counts[:-1]])
        self.names = list(content["names"])
        self.indices = np.asarray(indices, np.int64)
        self.labels = np.asarray(content["labels"], np.int32)[self.indices]
        self.classes = tuple(classes)
        self.num_classes = len(self.classes)
        self._digests = [str(shard["sha256"]) for shard in split["shards"]]
        # Opens files when they are read, once for all threads, and anew in another process.
        self._records = ArrayRecordDataSource(
            [_Shard(path, 0, count, count) for path, count in zip(self.shards, counts, strict=True)]
        )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        _, image = split_record(array_record.read(self._records, int(self.indices[index])))
        return {"image": image, "label": int(self.labels[index])}

    def describe(self, index: int) -> str:
        """Return the name that the image had, and its shard."""
        record = int(self.indices[index])
        shard = self.shards[int(np.searchsorted(self.starts, record, side="right")) - 1]
        return f"{self.names[record]} in {shard}"

    def fingerprint(self) -> str:
        """Digest the digests of the shards, and which records are the examples."""
        digest = hashlib.blake2b(" ".join(self._digests).encode(), digest_size=8)
        digest.update(self.indices.astype("<i8").tobytes())
        return digest.hexdigest()


def make(split: str, *, path: str, held_out: float = 0.1) -> Prepared:
    """Return the split "train" or "val" of prepared images.

    Args:
      split: "train" or "val" ("validation", "test": the same, unless the manifest has several of
        these).
      path: the folder that `prepare_data` wrote; `~` is the user's home.
      held_out: as in the folder source: the share for "val" where there is no such split.

    Raises:
      ConfigError: naming `data.path` or `data.held_out`, if the folder is not finished, if a file
        is missing or of another size than the manifest says, or if there is nothing to hold out.
    """
    training = is_training(split)
    folder = existing_folder(path)
    manifest = read_manifest(folder)
    own = manifest["splits"]
    held_out_part = held_out_split(split, own.__contains__)
    part = own["train" if training or held_out_part is None else held_out_part]
    check_sizes(folder, part)
    content = read_index(folder, part)
    indices: Sequence[int] | np.ndarray = np.arange(len(content["names"]))
    if held_out_part is None:
        # Images that were left out count here, so that the others fall as they do in the folder.
        chosen = held_out_names(
            [*content["names"], *part["left_out"]],
            held_out,
            by_class=part["labelled"],
            where=folder,
        )
        indices = [i for i, name in enumerate(content["names"]) if (name in chosen) != training]
    if not len(indices):
        raise ConfigError(f"data.path: expected images, got none of the split {split} in {folder}")
    return Prepared(folder, part, content, indices, manifest["classes"] if part["labelled"] else ())


def join_record(name: str, label: int, image: bytes) -> bytes:
    """Return a record: a line of JSON, a line feed, the bytes of an image file."""
    return json.dumps({"label": label, "name": name}).encode() + b"\n" + image


def split_record(record: bytes) -> tuple[bytes, bytes]:
    """Return the line of JSON and the bytes of the image."""
    line, _, image = record.partition(b"\n")
    return line, image


def read_manifest(folder: str) -> dict[str, Any]:
    """Return what `manifest.json` holds.

    Raises:
      ConfigError: naming `data.path`, if it is not there, or not such a manifest.
    """
    path = epath.Path(folder) / MANIFEST
    if not path.exists():
        started = (epath.Path(folder) / STARTED).exists()
        reason = "it is not finished, start prepare_data again" if started else "see prepare_data"
        raise ConfigError(
            f"data.path: expected a folder with {MANIFEST}, got none in {folder}: {reason}"
        )
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format"]
        if version == FORMAT:
            for part in manifest["splits"].values():
                for file_facts in (*part["shards"], part["index"]):
                    str(file_facts["file"]), int(file_facts["bytes"]), str(file_facts["sha256"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"data.path: {path} is no manifest of prepared images: {type(error).__name__}: {error}"
        ) from error
    if version != FORMAT:
        raise ConfigError(f"data.path: expected format {FORMAT} in {path}, got {version!r}")
    return manifest


def check_sizes(folder: str, part: Mapping[str, Any]) -> None:
    """Refuse a split of which a shard is missing or of another size than the manifest says.

    Raises:
      ConfigError: naming `data.path` and the file.
    """
    for shard in part["shards"]:
        path = epath.Path(folder) / shard["file"]
        try:
            size: int | None = path.stat().length
        except OSError:
            size = None
        if size != shard["bytes"]:
            got = "nothing" if size is None else f"{size} bytes"
            raise ConfigError(
                f"data.path: expected {shard['bytes']} bytes, got {got} at {path}: copy it again,"
                " or remove it and start prepare_data again"
            )


def read_index(folder: str, part: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return `labels` and `names` of the records of a split.

    Raises:
      ConfigError: naming `data.path` and the file, if it is not the one of the manifest.
    """
    path = epath.Path(folder) / part["index"]["file"]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"data.path: cannot read {path}: {error.strerror}") from error
    if (digest := hashlib.sha256(data).hexdigest()) != part["index"]["sha256"]:
        raise ConfigError(
            f"data.path: expected SHA-256 {part['index']['sha256']}, got {digest} of {path}"
        )
    return json.loads(data)
