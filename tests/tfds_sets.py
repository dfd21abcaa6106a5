"""Tiny sets, prepared without TensorFlow: `imagenet2012` in two formats, and one with captions."""

from __future__ import annotations

import functools
import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

SIZES = {"train": 20, "validation": 16}
VERSION = "5.1.0"


def jpeg(number: int, size: tuple[int, int] = (80, 60)) -> bytes:
    """Return a JPEG of this width and height, another one for each number."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size).save(file, format="JPEG")
    return file.getvalue()


@functools.cache
def imagenet() -> type[tfds.core.GeneratorBasedBuilder]:
    """Return the class of 20 + 16 JPEGs; TFDS lets a process register a name once.

    The name hides the class that TFDS has of it, so that the set is found as ImageNet is.
    """

    class Imagenet2012(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("5.1.0")

        def _info(self) -> Any:
            names = [f"n{number:08d}" for number in range(1000)]
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(encoding_format="jpeg"),
                        "label": tfds.features.ClassLabel(names=names),
                        "file_name": tfds.features.Text(),
                    }
                ),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {name: self._generate_examples(count) for name, count in SIZES.items()}

        def _generate_examples(self, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
            for number in range(count):
                image = io.BytesIO(jpeg(number))
                yield number, {"image": image, "label": number % 7, "file_name": f"{number}.JPEG"}

    return Imagenet2012


def prepare(folder: Path) -> Path:
    """Prepare the JPEGs of `imagenet` in a TFDS data folder; returns the folder of the set."""
    imagenet()(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder / "imagenet2012" / VERSION


CAPTIONS = ("an öwl", "moss", "green moss", "two owls", "a stone", "")


def prepare_captioned(folder: Path) -> Path:
    """Prepare three JPEGs with a title and two captions each, named as in coco_captions."""

    class Captioned(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            text = tfds.features.Text()
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(encoding_format="jpeg"),
                        "image/id": np.int64,
                        "image/title": text,
                        "captions": tfds.features.Sequence({"id": np.int64, "text": text}),
                    }
                ),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            for number in range(3):
                texts = CAPTIONS[2 * number : 2 * number + 2]
                yield (
                    number,
                    {
                        "image": io.BytesIO(jpeg(number)),
                        "image/id": number,
                        "image/title": texts[0],
                        "captions": [{"id": number, "text": text} for text in texts],
                    },
                )

    Captioned(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder / "captioned" / "1.0.0"


def as_tfrecord(prepared: Path, folder: Path, shards: int = 3) -> Path:
    """Rewrite the records of a set as TFRecord files; returns the folder of the new set."""
    folder.mkdir(parents=True)
    builder = tfds.builder_from_directory(prepared)
    info = json.loads((prepared / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    for split in info["splits"]:
        name = split["name"]
        raw = builder.as_data_source(
            name, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        records = [raw[index] for index in range(len(raw))]
        parts = [list(part) for part in np.array_split(np.arange(len(records)), shards)]
        split["shardLengths"] = [str(len(part)) for part in parts]
        for number, part in enumerate(parts):
            file = f"imagenet2012-{name}.tfrecord-{number:05d}-of-{shards:05d}"
            write_tfrecord(folder / file, [records[index] for index in part])
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for other in prepared.iterdir():
        if other.suffix in (".json", ".txt") and other.name != "dataset_info.json":
            (folder / other.name).write_bytes(other.read_bytes())
    return folder


def write_tfrecord(path: Path, records: list[bytes]) -> None:
    """Write records with checksums of zero, which nobody here looks at."""
    with path.open("wb") as file:
        for record in records:
            file.write(struct.pack("<Q", len(record)) + bytes(4) + record + bytes(4))
