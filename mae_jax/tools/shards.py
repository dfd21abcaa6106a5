"""A folder of images as array_record shards: `plan`, `write_shard` for each, `finish`.

Each shard is a pure function of its plan and the files that it names, and nothing is shared while
shards are written, so that any number of processes, or of machines, may write them in any order:
`finish` makes the same manifest of them. `mae_jax.data.sources.prepared` describes the files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader
from etils import epath
from PIL import Image

from mae_jax.data.processes import end_with_parent
from mae_jax.data.sources import EVAL_SPLITS, THREADS, allowed_bad
from mae_jax.data.sources.folder import own_splits
from mae_jax.data.sources.prepared import (
    FORMAT,
    MANIFEST,
    STARTED,
    check_sizes,
    join_record,
    read_index,
    read_manifest,
    split_record,
)
from mae_jax.data.transforms import BadExample, Decode, resize
from mae_jax.errors import ConfigError
from mae_jax.files import completed, is_local, read_locally, words_of, written_locally
from mae_jax.tools import array_records, beam, manifests

SHARD_BYTES = 128 * 2**20  # of images as they are in the folder; a shard of resized ones is smaller
LEAST_SHARDS = 16  # that several processes have something to do
CHUNK = 2**22  # bytes that are digested at a time
# Files are written as they are: JPEG does not get smaller, and the flag of each is at hand.
WRITER = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is made of each image.

    Attributes:
      short_side: images whose shorter side is larger are resized to it; 0: none is.
      quality: of the JPEG of those.
    """

    short_side: int = 0
    quality: int = 95


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """What a shard is made of.

    Attributes:
      file: its name.
      split: "train" or "val".
      root: the folder of the images.
      names: relative paths with "/" of the images.
      labels: class of each, -1 without one.
      options: what is made of each.
    """

    file: str
    split: str
    root: str
    names: tuple[str, ...]
    labels: tuple[int, ...]
    options: Options


@dataclasses.dataclass(frozen=True)
class Shard:
    """What a shard holds.

    Attributes:
      plan: what it was made of.
      names: of the records.
      labels: of the records.
      size: in bytes.
      sha256: of the file.
      left_out: names of bad images, and why if this process has seen it.
    """

    plan: ShardPlan
    names: tuple[str, ...]
    labels: tuple[int, ...]
    size: int
    sha256: str
    left_out: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All shards of a folder.

    Attributes:
      shards: in order.
      classes: names of the classes; empty if the images have none.
      labelled: the splits that have labels.
      facts: what the outputs depend on, for the manifests.
      not_taken: folders of other splits, of which there are no shards.
    """

    shards: tuple[ShardPlan, ...]
    classes: tuple[str, ...]
    labelled: frozenset[str]
    facts: dict[str, Any]
    not_taken: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """Return the number of images."""
        return sum(len(shard.names) for shard in self.shards)


# Yields each shard of some plans in a folder, and whether it had to be written, in any order.
Ensure = Callable[[Sequence[ShardPlan], str], Iterator[tuple[Shard, bool]]]


def plan(folder: str, options: Options = Options(), shards: int | None = None) -> Plan:
    """Divide the images of a folder: those of a split, sorted by name, into equal parts.

    Args:
      folder: as the folder source takes it, or one of a bucket.
      options: what is made of each image.
      shards: number of shards of the training split, a validation split has as many by its share;
        None: so many that each is of `SHARD_BYTES`, but `LEAST_SHARDS` if there are as many images.

    Raises:
      ConfigError: naming FOLDER, if there is nothing to read.
    """
    try:
        splits = own_splits(folder)
    except ConfigError as error:
        raise ConfigError(str(error).replace("data.path", "FOLDER", 1)) from error
    digest = hashlib.blake2b(digest_size=16)
    plans: list[ShardPlan] = []
    counts: dict[str, int] = {}
    total = images = 0
    per_shard = 0.0
    for split, files in splits.items():
        with ThreadPoolExecutor(THREADS) as pool:
            sizes = list(pool.map(_size, map(files.describe, range(len(files)))))
        for name, label, size in zip(files.names, files.labels, sizes, strict=True):
            digest.update(json.dumps([split, name, label, size]).encode())
        images, total = images + len(files), total + sum(sizes)
        if not per_shard:
            wanted = shards or max(math.ceil(sum(sizes) / SHARD_BYTES), LEAST_SHARDS)
            per_shard = max(len(files) / wanted, 1)
        count = counts[split] = max(round(len(files) / per_shard), 1)
        bounds = [number * len(files) // count for number in range(count + 1)]
        plans += [
            ShardPlan(
                f"{split}-{number:05d}-of-{count:05d}.array_record",
                split,
                files.root,
                tuple(files.names[start:stop]),
                tuple(files.labels[start:stop]),
                options,
            )
            for number, (start, stop) in enumerate(itertools.pairwise(bounds))
        ]
    return Plan(
        tuple(plans),
        splits["train"].classes,
        frozenset(split for split, files in splits.items() if files.num_classes),
        {
            "format": FORMAT,
            "options": {**dataclasses.asdict(options), "shards": counts},
            "source": {
                "images": images,
                "bytes": total,
                "digest_of_names_labels_sizes": digest.hexdigest(),
            },
        },
        _not_taken([files.root for files in splits.values()]),
    )


def _not_taken(roots: Sequence[str]) -> tuple[str, ...]:
    """Return the folders of splits beside those of several splits."""
    beside = [os.path.join(os.path.dirname(roots[0]), name) for name in EVAL_SPLITS]
    others = [path for path in beside if path not in roots and epath.Path(path).is_dir()]
    return tuple(others if len(roots) > 1 else ())


def _size(path: str) -> int:
    try:
        return os.path.getsize(path) if is_local(path) else epath.Path(path).stat().length
    except OSError:
        return -1


def prepare_image(data: bytes, options: Options) -> bytes:
    """Return the bytes of an image file to store: those that came, unless it is to be resized.

    A resized image is JPEG 4:4:4 without metadata, its EXIF rotation applied; where there is
    transparency it is PNG. 16-bit grey becomes 8-bit, CMYK and palettes become RGB, as in training.

    Raises:
      BadExample: if the image cannot be decoded to its end.
    """
    pixels = Decode(3, exif=True)(data)
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    if not 0 < options.short_side < shorter:
        return data
    channels = _channels(data)
    if channels != 3:
        pixels = Decode(channels, exif=True)(data)
    size = (height * options.short_side // shorter, width * options.short_side // shorter)
    resized = resize(pixels, size)
    image = Image.fromarray(resized[:, :, 0] if channels == 1 else resized)
    encoded = io.BytesIO()
    if channels == 4:
        image.save(encoded, "PNG")
    else:
        image.save(encoded, "JPEG", quality=options.quality, subsampling="4:4:4")
    return encoded.getvalue()


def _channels(data: bytes) -> int:
    with Image.open(io.BytesIO(data)) as image:
        if image.has_transparency_data:
            return 4
        return 1 if image.mode in ("1", "L") or image.mode.startswith("I") else 3


def write_shard(plan: ShardPlan, out: str, scratch: epath.Path | None = None) -> Shard:
    """Write a shard into the folder `out`; the same plan and files give the same bytes.

    Images that cannot be decoded, or are gone, are left out.

    Args:
      plan: what it is made of.
      out: a folder, or one of a bucket.
      scratch: see `mae_jax.files.completed`.

    Raises:
      ConfigError: if it cannot be written, or an image not be read.
    """
    left_out = {}
    path = epath.Path(out) / plan.file
    with (
        completed(path, field="OUT", scratch=scratch) as temporary,
        written_locally(temporary) as local,
        array_records.writing(local, WRITER) as writer,
    ):
        for name, label in zip(plan.names, plan.labels, strict=True):
            try:
                image = _read_image(plan, name)
            except BadExample as error:
                left_out[name] = " ".join(str(error).split())
                continue
            writer.write(join_record(name, label, image))
    shard = _read_shard(plan, path)
    if shard.left_out.keys() != left_out.keys():
        raise RuntimeError(f"{path} cannot be read back as it was written")
    return dataclasses.replace(shard, left_out=left_out)


def _read_image(plan: ShardPlan, name: str) -> bytes:
    """Return the bytes of an image to store.

    Raises:
      BadExample: if it is bad, or gone.
      ConfigError: if it cannot be read at this time; it may be a good one.
    """
    path = os.path.join(plan.root, name)
    try:
        data = epath.Path(path).read_bytes()
    except FileNotFoundError as error:
        raise BadExample(str(error)) from error
    except OSError as error:  # of the network, the disk or its permissions
        raise ConfigError(
            f"FOLDER: expected images that can be read, got {words_of(error)} at {_printable(path)}"
        ) from error
    try:
        return prepare_image(data, plan.options)
    except OSError as error:  # Pillow's, of one too long for JPEG
        raise BadExample(str(error)) from error


def _is_good(plan: ShardPlan, name: str) -> bool:
    try:
        _read_image(plan, name)
    except BadExample:
        return False
    return True


def ensure_shard(
    plan: ShardPlan, out: str, scratch: epath.Path | None = None
) -> tuple[Shard, bool]:
    """Return the shard of the folder `out`, and whether it had to be written.

    It is written if there is none, or one that is damaged, of other images, or without one that
    was bad when it was written and is good now; raises as `write_shard` does.
    """
    path = epath.Path(out) / plan.file
    try:
        if (
            path.exists()
            and (shard := _read_shard(plan, path)).names
            and not any(_is_good(plan, name) for name in shard.left_out)
        ):
            return shard, False
    except OSError:
        pass
    return write_shard(plan, out, scratch), True


def _read_shard(plan: ShardPlan, path: epath.Path) -> Shard:
    """Read a shard through; of one that is cut off there are no records.

    Raises:
      OSError: if it is damaged, or holds images of another plan.
    """
    with read_locally(path) as local:
        return _read_local_shard(plan, local)


def _read_local_shard(plan: ShardPlan, path: str) -> Shard:
    names, labels = [], []
    try:
        reader = ArrayRecordReader(path)
        for place in range(reader.num_records()):
            line = json.loads(split_record(reader.read([place])[0])[0])
            names.append(line["name"])
            labels.append(line["label"])
        reader.close()
    except (RuntimeError, ValueError, LookupError, TypeError) as error:
        raise OSError(f"{path} is damaged: {error}") from error
    held = set(names)
    planned = zip(plan.names, plan.labels, strict=True)
    if [one for one in planned if one[0] in held] != list(zip(names, labels, strict=True)):
        raise OSError(f"{path} does not hold the planned images")
    left_out = dict.fromkeys((name for name in plan.names if name not in held), "")
    size, digest = os.path.getsize(path), _sha256(epath.Path(path))
    return Shard(plan, tuple(names), tuple(labels), size, digest, left_out)


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def finish(plan: Plan, shards: Sequence[Shard], out: str) -> None:
    """Write the indices, then the manifest, of shards in the order of their plans."""
    splits = {}
    for split in dict.fromkeys(shard.plan.split for shard in shards):
        of_split = [shard for shard in shards if shard.plan.split == split]
        index = json.dumps(
            {
                "labels": [label for shard in of_split for label in shard.labels],
                "names": [name for shard in of_split for name in shard.names],
            }
        ).encode()
        file = f"{split}.index.json"
        with completed(epath.Path(out) / file, field="OUT") as temporary:
            temporary.write_bytes(index)
        splits[split] = {
            "examples": sum(len(shard.names) for shard in of_split),
            "labelled": split in plan.labelled,
            "left_out": [name for shard in of_split for name in shard.left_out],
            "index": {
                "file": file,
                "bytes": len(index),
                "sha256": hashlib.sha256(index).hexdigest(),
            },
            "shards": [
                {
                    "file": shard.plan.file,
                    "examples": len(shard.names),
                    "bytes": shard.size,
                    "sha256": shard.sha256,
                }
                for shard in of_split
            ],
        }
    manifest = {**plan.facts, "classes": list(plan.classes), "splits": splits}
    with completed(epath.Path(out) / MANIFEST, field="OUT") as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n")


def prepare(plan: Plan, out: str, *, ensure: Ensure, max_bad_share: float) -> None:
    """Write what the folder `out` lacks of the shards of a plan, and the manifest; says how far.

    Args:
      plan: of all shards.
      out: a folder, or one of a bucket.
      ensure: calls `ensure_shard` for each, here (`in_processes`) or elsewhere.
      max_bad_share: of the images that may be left out.

    Raises:
      ConfigError: if the folder holds something else, if it cannot be written, or if more images
        are bad than `allowed_bad` has it; shards that are there stay.
    """
    folder = epath.Path(out)
    manifests.claim(folder / STARTED, plan.facts, files="*.array_record", field="OUT")
    for path in plan.not_taken:
        parts = " and ".join(dict.fromkeys(shard.split for shard in plan.shards))
        print(f"not taken: {path}: the parts are {parts}; prepare it by itself if you need it")
    if (folder / MANIFEST).exists() and _is_whole(plan, out):
        print(f"{out}: complete already, {len(plan.shards)} shards")
        return
    allowed = allowed_bad(max_bad_share, plan.images)
    shards: dict[str, Shard] = {}
    bad = there = 0
    for shard, written in ensure(plan.shards, out):
        shards[shard.plan.file] = shard
        there += not written
        for name, reason in shard.left_out.items():
            print(f"left out: {_printable(name)}" + (f": {reason}" if reason else ""))
        bad += len(shard.left_out)
        if bad > allowed:
            name, reason = next(iter(shard.left_out.items()))
            raise ConfigError(
                f"--max_bad_share={max_bad_share:g}: expected at most {allowed} of {plan.images}"
                f" images that cannot be used, got {bad} so far, such as {_printable(name)}"
                + (f": {reason}" if reason else "")
            )
        if written:  # at once, that a log shows how far it is
            print(f"{shard.plan.file}: {len(shard.names):,} images", flush=True)
    finish(plan, [shards[one.file] for one in plan.shards], out)
    beam.remove_scratch(folder)
    size = sum(shard.size for shard in shards.values())
    print(
        f"{out}: complete, {len(shards)} shards ({there} were there), {plan.images - bad:,} images,"
        f" {size / 1e9:.2f} GB, {bad} left out"
    )


def _is_whole(plan: Plan, out: str) -> bool:
    """Return whether all files are there, and no image that was left out is good by now."""
    try:
        parts = read_manifest(out)["splits"]
        for part in parts.values():
            check_sizes(out, part)
            read_index(out, part)
    except ConfigError:
        return False
    left_out = {split: set(part["left_out"]) for split, part in parts.items()}
    return not any(
        _is_good(shard, name)
        for shard in plan.shards
        for name in left_out[shard.split].intersection(shard.names)
    )


def _printable(name: str) -> str:
    return os.fsencode(name).decode(errors="replace")


def in_processes(
    plans: Sequence[ShardPlan], out: str, *, processes: int
) -> Iterator[tuple[Shard, bool]]:
    """Yield each shard, as soon as it is there, and whether it had to be written."""
    if processes == 1:
        for one in plans:
            yield ensure_shard(one, out)
        return
    # Spawned, as other threads run here.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, len(plans)), context, _prepare_worker)
    try:
        for done in as_completed([pool.submit(ensure_shard, one, out) for one in plans]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    end_with_parent()


def verify(out: str, *, processes: int) -> None:
    """Compare every file of a finished folder with the manifest; says how many.

    Raises:
      ConfigError: naming those that are missing or differ.
    """
    try:
        manifest = read_manifest(out)
    except ConfigError as error:
        raise ConfigError(str(error).replace("data.path", "OUT", 1)) from error
    parts = manifest["splits"].values()
    files = [file for part in parts for file in (*part["shards"], part["index"])]

    def is_right(file: dict[str, Any]) -> bool:
        path = epath.Path(out) / file["file"]
        try:
            return path.stat().length == file["bytes"] and _sha256(path) == file["sha256"]
        except OSError:
            return False

    with ThreadPoolExecutor(processes) as pool:  # a digest is computed outside Python's lock
        right = list(pool.map(is_right, files))
    if wrong := [file["file"] for file, good in zip(files, right, strict=True) if not good]:
        raise ConfigError(
            f"OUT={out}: {len(wrong)} of {len(files)} files are missing or damaged: remove"
            f" {', '.join(wrong)} and start prepare_data again"
        )
    size = sum(file["bytes"] for file in files)
    print(f"{out}: {len(files)} files, {size / 1e9:.2f} GB, are what the manifest says")
