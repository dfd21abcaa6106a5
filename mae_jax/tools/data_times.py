"""Images that are decoded, cropped and resized in a second of a core: ours, and Pillow's beside.

One core is measured in its own seconds (`time.process_time`), so that what else the machine does
counts little; all contenders have their turn in each round, and ratios are taken within a round.
Several cores can only be measured by the clock, which wants a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mae_jax import config as configs
from mae_jax.data import loader, transforms
from mae_jax.data.processes import available_cores
from mae_jax.data.readers import Reader
from mae_jax.data.readers import images as image_reader
from mae_jax.data.sources import Source, folder, prepared
from mae_jax.errors import ConfigError
from mae_jax.tools import corpus, records, rounds

CONFIG = "vit_b"  # whose transforms are measured; those of all recipes for ImageNet are the same
BATCH_SIZE = 64
WARM_UP = 20  # images of a contender
COMPARED = 200  # images at most whose pixels are
PILLOW = "Pillow, as torchvision"

COLUMNS = {
    "contender": ("", ""),
    "images_per_cpu_second": ("images (crops) a CPU-second", ".0f"),
    "over_pillow": ("over Pillow", ".2f"),
    "psnr_mean": ("PSNR to Pillow, mean", ".1f"),
    "psnr_least": ("least", ".1f"),
    "images_per_second": ("images/s", ".0f"),
    "over_one_core": ("over one core", ".2f"),
}

Rng = np.random.Generator


@dataclasses.dataclass(frozen=True)
class Contender:
    """Something that makes pixels of encoded images.

    Attributes:
      name: for the table.
      read: makes pixels of an encoded image, drawing from a generator.
      rows: crops that it makes of an image.
      like: whose pixels its own are compared with; it draws the same; None: nobody's.
    """

    name: str
    read: Callable[[bytes, Rng], Any]
    rows: int = 1
    like: Callable[[bytes, Rng], np.ndarray] | None = None


def run(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure what the flags of `mae_jax.tools.bench data` ask for, print a table, return its rows.

    Raises:
      ConfigError: if there is nothing to read, or a file is no image.
    """
    for name, least in (("workers", 0), ("threads", 0)):
        if (value := getattr(flags, name)) is not None and value < least:
            raise ConfigError(f"--{name}={value}: expected at least {least}")
    path = flags.path or corpus.make(flags.corpus, flags.images)
    try:
        source = _open(path)
    except ConfigError as error:
        raise ConfigError(str(error).replace("data.path", "--path", 1)) from error
    encoded = [source[index]["image"] for index in range(min(flags.images, len(source)))]
    kib = sum(map(len, encoded)) / len(encoded) / 1024
    rows = measure(contenders(flags.crops, source.exif), encoded, flags.repeats)
    pillow = next(row for row in rows if row["contender"] == PILLOW)
    rows += measure_loader(source, flags, pillow["images_per_cpu_second"])
    shared = {"images": len(encoded), "kib": round(kib, 1), "load": round(os.getloadavg()[0], 1)}
    rows = [{**shared, **row} for row in rows]
    print(
        f"{len(encoded)} images, {kib:.0f} KiB on average, of {path}; {flags.repeats} rounds;"
        f" {available_cores()} cores, load {shared['load']}\n\n{records.table(rows, COLUMNS)}",
        flush=True,
    )
    if flags.json:
        records.append(flags.json, rows)
    return rows


def _open(path: str) -> Source:
    """Return all images of a folder, or what is trained on of a prepared one."""
    if os.path.exists(os.path.join(path, prepared.MANIFEST)):
        return prepared.make("train", path=path)
    return folder.make("all", path=path)


def contenders(crops: int, exif: bool) -> list[Contender]:
    """Return what is measured: decoding alone, Pillow, and the readers of `CONFIG`."""
    config = configs.load_config(CONFIG)
    size, scale = config.data.image_size, config.data.crop_scale
    box = transforms.RandomResizedCrop(size, scale, config.data.crop_ratio).box

    def pillow(data: bytes, rng: Rng) -> np.ndarray:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        top, left, height, width = box(image.height, image.width, rng)
        image = image.crop((left, top, left + width, top + height))
        image = image.resize(size[::-1], Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image)

    short_side = int(size[0] / image_reader.crop_fraction(config.data.crop_fraction, size))

    def pillow_centre(data: bytes, rng: Rng) -> np.ndarray:
        del rng
        image = Image.open(io.BytesIO(data)).convert("RGB")
        shorter = min(image.size)
        # Whole numbers, as torchvision has them.
        wide, high = (side * short_side // shorter for side in image.size)
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
        left, top = round((wide - size[1]) / 2), round((high - size[0]) / 2)
        return np.asarray(image.crop((left, top, left + size[1], top + size[0])))

    def ours(name: str, **fields: str) -> Contender:
        changed = {f"data.{field}": value for field, value in fields.items()}
        reader = image_reader.training(configs.load_config(CONFIG, changed))
        return Contender(
            name, _reading(reader, exif), reader.views, pillow if reader.views == 1 else None
        )

    return [
        Contender("decoding alone, the floor", _decoder()),
        Contender(PILLOW, pillow),
        ours("training, data.resample=pil", resample="pil"),
        ours("training, data.resample=fast", resample="fast"),
        ours(f"data.crops_per_image={crops}", resample="fast", crops_per_image=str(crops)),
        Contender(
            "evaluation", _reading(image_reader.evaluation(config.data), exif), like=pillow_centre
        ),
        Contender("Pillow's evaluation, as torchvision", pillow_centre),
    ]


def _decoder() -> Callable[[bytes, Rng], Any]:
    """Return what decodes and does no more: simplejpeg where it is installed, else Pillow."""
    try:
        import simplejpeg
    except ImportError:
        return lambda data, rng: Image.open(io.BytesIO(data)).load()
    return lambda data, rng: simplejpeg.decode_jpeg(data)


def _reading(reader: Reader, exif: bool) -> Callable[[bytes, Rng], np.ndarray]:
    return lambda data, rng: reader({"image": data}, rng, exif=exif)["image"]


def measure(
    contending: Sequence[Contender], encoded: Sequence[bytes], repeats: int
) -> list[dict[str, Any]]:
    """Return a row for each contender: `images_per_cpu_second`, `over_pillow`, PSNR.

    PSNR is in decibels of 255, or the words "same pixels" where all are.

    Raises:
      ConfigError: if a file is no image that all of them can decode.
    """
    times: dict[str, list[float]] = {one.name: [] for one in contending}
    try:
        for one in contending:
            _seconds(one, encoded[:WARM_UP])
        for number in range(repeats):
            for one in rounds.turn(contending, number):
                times[one.name].append(_seconds(one, encoded) / one.rows)
        return [
            {
                "contender": one.name,
                "crops": one.rows,
                "images_per_cpu_second": len(encoded) / statistics.median(times[one.name]),
                "over_pillow": rounds.ratio(times[PILLOW], times[one.name]),
                **_fidelity(one, encoded[:COMPARED]),
            }
            for one in contending
        ]
    except (OSError, ValueError) as error:  # of any library that decodes
        raise ConfigError(
            f"--path: expected JPEGs that can be decoded, got {type(error).__name__}: {error}"
        ) from error


def _seconds(contender: Contender, encoded: Sequence[bytes]) -> float:
    """Return the seconds of the processor that all images take."""
    rng = np.random.default_rng(0)  # all contenders draw the same boxes
    start = time.process_time()
    for data in encoded:
        contender.read(data, rng)
    return time.process_time() - start


def _fidelity(contender: Contender, encoded: Sequence[bytes]) -> dict[str, Any]:
    """Return how near the pixels are to those that they are compared with."""
    if contender.like is None:
        return {}
    found = []
    for number, data in enumerate(encoded):
        ours = contender.read(data, np.random.default_rng(number))
        theirs = contender.like(data, np.random.default_rng(number))
        found.append(psnr(ours, theirs))
    if min(found) == math.inf:
        return {"psnr_mean": "same pixels", "psnr_least": "same pixels"}
    return {"psnr_mean": statistics.mean(found), "psnr_least": min(found)}


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return 10 log10(255^2 / mean squared difference) of two uint8 images, infinite if equal."""
    error = np.mean(np.square(ours.astype(np.float64) - theirs))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def measure_loader(
    source: Source, flags: argparse.Namespace, pillow: float
) -> list[dict[str, Any]]:
    """Return rows of the whole loader on one core and on all: batches of 64, from files.

    Args:
      source: of the images.
      flags: `images` (how many are read in a round), `repeats`, `workers`, `threads`.
      pillow: its images per CPU-second.
    """
    reader = image_reader.training(configs.load_config(CONFIG))
    cores = _cores()
    counts = [1, len(cores)] if len(cores) > 1 else [1]
    batch_size = min(BATCH_SIZE, len(source))
    steps = max(flags.images // batch_size, 2)
    clock: dict[int, list[float]] = {count: [] for count in counts}
    processor: dict[int, list[float]] = {count: [] for count in counts}
    for number in range(flags.repeats):
        for count in rounds.turn(counts, number):
            with _pinned(cores[:count]):
                seconds, own = _loading(source, reader, batch_size, steps, flags)
            clock[count].append(seconds)
            processor[count].append(own)
    rows = []
    images = steps * batch_size
    for count in counts:
        # Seconds of worker processes are not ours.
        rate = None if flags.workers else images / statistics.median(processor[count])
        rows.append(
            {
                "contender": f"loader, {count} core{'s' * (count > 1)}",
                "cores": count,
                "images_per_cpu_second": rate,
                "over_pillow": rate and rate / pillow,
                "images_per_second": images / statistics.median(clock[count]),
                "over_one_core": rounds.ratio(clock[1], clock[count]) if count > 1 else None,
            }
        )
    return rows


def _loading(
    source: Source, reader: Reader, batch_size: int, steps: int, flags: argparse.Namespace
) -> tuple[float, float]:
    """Return the seconds by the clock, and of this process's threads, that batches take.

    Both begin when the loader runs already, with as many batches under way as at the end.
    """
    batches = loader.train_batches(
        source,
        reader,
        batch_size=batch_size,
        seed=0,
        workers=flags.workers or 0,
        threads=flags.threads,
    )
    try:
        ahead = 2 * (flags.threads or available_cores()) * max(flags.workers or 0, 1)
        for _ in range(ahead):
            next(batches)
        start, own = time.perf_counter(), time.process_time()
        for _ in range(steps):
            next(batches)
        return time.perf_counter() - start, time.process_time() - own
    finally:
        batches.close()


def _cores() -> list[int]:
    """Return the cores that this process may use; where they cannot be chosen, none but one."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]


@contextlib.contextmanager
def _pinned(cores: Sequence[int]) -> Iterator[None]:
    """Keep this thread, and those that it starts, on some cores."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
