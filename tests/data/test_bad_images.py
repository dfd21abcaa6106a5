"""What lies in people's folders: odd images are used, bad ones replaced, and a run goes on."""

import dataclasses
import io
import itertools
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_jax.data import loader, transforms
from mae_jax.data.readers.images import ImageReader
from mae_jax.data.sources import folder
from mae_jax.errors import ConfigError
from tests.helpers import metrics, run, tiny_run

COLOUR = np.array([160.0, 110.0, 60.0])  # mean of the picture
LUMA = np.full(3, COLOUR @ [0.299, 0.587, 0.114])
NO_WARNING = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


def picture(width=48, height=40):
    """Red grows to the right and green downwards, so that each central box has the mean COLOUR."""
    pixels = np.tile(COLOUR, (height, width, 1))
    pixels[:, :, 0] += 60 * (np.arange(width) - (width - 1) / 2) / width
    pixels[:, :, 1] += 60 * (np.arange(height)[:, None] - (height - 1) / 2) / height
    return Image.fromarray(np.uint8(pixels.round()))


def encode(image, file_format, **options):
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def jpeg(image=None, **options):
    return encode(image or picture(), "JPEG", quality=95, **options)


def png(image=None, **options):
    return encode(image or picture(), "PNG", **options)


def raw_png(width, height, depth, rows):
    """Write a colour PNG by hand; its header may promise more than `rows` hold."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def deep_grey():
    return Image.fromarray(np.uint16(np.asarray(picture().convert("L"))) * 257)


def deep_colour():
    rows = np.asarray(picture()).astype(">u2") * 257
    return raw_png(48, 40, 16, [row.astype(">u2").tobytes() for row in rows])


def transparent():
    image = picture()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def grey_transparent():
    image = picture().convert("L")
    image.putalpha(7)
    return image


def animation(file_format, **options):
    frames = [picture(), Image.new("RGB", (48, 40), "white")]
    return encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)


def zipped():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("picture.jpg", jpeg())
    return stream.getvalue()


def overwritten(data, after, value):
    """Overwrite the bytes that follow the first `after`."""
    place = data.index(after) + len(after)
    return data[:place] + value + data[place + len(value) :]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file: its bytes, the end of its name, and the mean colour that it has to give."""

    make: Callable[[], bytes]
    suffix: str = "jpg"
    mean: np.ndarray | None = None  # None: it is bad


ODD = {
    "grey_jpeg": Kind(lambda: jpeg(picture().convert("L")), "jpg", LUMA),
    "grey_png": Kind(lambda: png(picture().convert("L")), "png", LUMA),
    "16_bit_grey": Kind(lambda: png(deep_grey()), "png", LUMA),
    "32_bit_tiff": Kind(lambda: encode(deep_grey().convert("I"), "TIFF"), "png", LUMA),
    "16_bit_colour": Kind(deep_colour, "png", COLOUR),
    "cmyk": Kind(lambda: jpeg(picture().convert("CMYK")), "jpg", COLOUR),
    "rgba": Kind(lambda: png(transparent()), "png", COLOUR),
    "rgba_webp": Kind(lambda: encode(transparent(), "WEBP", exact=True), "webp", COLOUR),
    "palette": Kind(lambda: png(picture().convert("P")), "png", COLOUR),
    "palette_alpha": Kind(lambda: png(picture().convert("P"), transparency=3), "png", COLOUR),
    "grey_alpha": Kind(lambda: png(grey_transparent()), "png", LUMA),
    "one_bit": Kind(lambda: png(picture().convert("1")), "png", LUMA),
    "one_pixel": Kind(lambda: png(picture(1, 1)), "png", COLOUR),
    "wide": Kind(lambda: jpeg(picture(5000, 2)), "jpg", COLOUR),
    "tall": Kind(lambda: png(picture(2, 5000)), "png", COLOUR),
    "rotated": Kind(lambda: jpeg(exif=rotated()), "jpg", COLOUR),
    "damaged_exif": Kind(lambda: jpeg(exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12"), "jpg", COLOUR),
    "progressive": Kind(lambda: jpeg(progressive=True), "jpg", COLOUR),
    "no_icc_profile": Kind(lambda: jpeg(icc_profile=b"no profile at all"), "jpg", COLOUR),
    "trailing_garbage": Kind(lambda: jpeg() + b"\0garbage" * 100, "jpg", COLOUR),
    "gif_named_jpg": Kind(lambda: encode(picture(), "GIF"), "jpg", COLOUR),
    "bmp_named_png": Kind(lambda: encode(picture(), "BMP"), "png", COLOUR),
    "png_named_jpg": Kind(lambda: png(), "jpg", COLOUR),
    "animated_webp": Kind(lambda: animation("WEBP"), "webp", COLOUR),
    "animated_png": Kind(lambda: animation("PNG"), "png", COLOUR),
    "animated_gif": Kind(lambda: animation("GIF"), "jpg", COLOUR),
}
BAD = {
    "jpeg_cut_by_one_byte": Kind(lambda: jpeg()[:-1]),
    "jpeg_cut_in_half": Kind(lambda: jpeg()[: len(jpeg()) // 2]),
    "jpeg_cut_in_its_header": Kind(lambda: jpeg()[:100]),
    "jpeg_without_its_start": Kind(lambda: jpeg()[2:]),
    "jpeg_of_damaged_tables": Kind(lambda: overwritten(jpeg(), b"\xff\xc4", b"\0\x03")),
    "jpeg_of_zero_height": Kind(lambda: overwritten(jpeg(), b"\xff\xc0\0\x11\x08", b"\0\0")),
    "png_cut": Kind(lambda: png()[:-60], "png"),
    "png_of_wrong_checksum": Kind(lambda: overwritten(png(), b"IDAT", b"\0\0\0\0"), "png"),
    "png_of_zero_width": Kind(lambda: raw_png(0, 5, 8, []), "png"),
    "webp_cut": Kind(lambda: encode(picture(), "WEBP")[:-50], "webp"),
    "gif_cut": Kind(lambda: encode(picture(), "GIF")[:60]),
    "bomb_20000": Kind(lambda: raw_png(20_000, 20_000, 8, []), "png"),
    "bomb_12000": Kind(lambda: png(Image.new("1", (12_000, 12_000))), "png"),
    "empty": Kind(lambda: b""),
    "zeros": Kind(lambda: bytes(5000)),
    "text": Kind(lambda: b"not an image\n"),
    "html": Kind(lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
    "svg": Kind(lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "png"),
    "zip": Kind(zipped),
    "noise": Kind(lambda: np.random.default_rng(0).bytes(3000)),
    "float_tiff": Kind(lambda: encode(Image.new("F", (20, 20), 0.5), "TIFF"), "png"),
}
# Read well when the folder was listed, and not any more.
GONE = ("vanished", "now_a_folder", "now_a_broken_link", "a_link_to_itself")


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def spoil(path: Path) -> None:
    path.unlink()
    if "folder" in path.name:
        path.mkdir()
    elif "broken" in path.name:
        path.symlink_to("nowhere.png")
    elif "itself" in path.name:
        path.symlink_to(path)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A folder of all kinds, each followed by a good image, as a source opened before some went."""
    root = tmp_path_factory.mktemp("zoo")
    kinds = ODD | BAD | dict.fromkeys(GONE, Kind(png, "png"))
    for name, kind in kinds.items():
        write(root / "train" / f"{name}.{kind.suffix}", kind.make())
        write(root / "train" / f"{name}.~good.png", png())
    write(root / "val" / "good.png", png())
    source = folder.make("train", path=str(root))
    for name in GONE:
        spoil(root / "train" / f"{name}.png")
    return source


def index_of(source, name):
    (index,) = [i for i, n in enumerate(source.names) if n.startswith(f"{name}.") and "~" not in n]
    return index


def load(source, index, transform=None):
    transform = transform or transforms.eval_transform((16, 16), crop_fraction=1.0)
    example = loader.LoadExample(source, ImageReader(3, transform))
    return example.random_map(index, np.random.default_rng(index))


def test_there_are_many_kinds():
    assert len(ODD) + len(BAD) + len(GONE) >= 50


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("name", ODD)
def test_an_odd_image_is_used_and_has_its_colours(zoo, name):
    index = index_of(zoo, name)
    example = load(zoo, index)
    assert not example["replaced"]
    assert example["index"] == example["asked"] == index
    assert example["image"].shape == (16, 16, 3)
    assert example["image"].dtype == np.uint8
    # A web palette and dithering to black and white keep the mean only about.
    np.testing.assert_allclose(example["image"].mean(axis=(0, 1)), ODD[name].mean, atol=12)
    random = load(zoo, index, transforms.train_transform((16, 16), augment="random_resized_crop"))
    assert random["image"].shape == (16, 16, 3)
    assert not random["replaced"]


def test_a_rotated_image_is_turned_upright(zoo):
    plain = load(zoo, index_of(zoo, "progressive"))["image"].astype(int)
    turned = load(zoo, index_of(zoo, "rotated"))["image"].astype(int)
    assert (plain[:, 12, 0] - plain[:, 3, 0]).min() > 5  # red grows to the right
    assert (turned[12, :, 0] - turned[3, :, 0]).min() > 5  # and after the turn downwards


@NO_WARNING
@pytest.mark.parametrize("name", [*BAD, *GONE])
def test_a_bad_image_is_replaced_by_the_next_one(zoo, name):
    index = index_of(zoo, name)
    example = load(zoo, index)
    assert example["replaced"]
    assert example["asked"] == index
    assert example["index"] == index + 1
    np.testing.assert_array_equal(example["image"], load(zoo, index + 1)["image"])


def test_a_folder_named_as_an_image_and_links_to_nowhere_are_not_images(tmp_path):
    write(tmp_path / "x.jpg" / "inside.png", png())
    write(tmp_path / "y.png", png())
    (tmp_path / "link.png").symlink_to("nowhere.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "empty.png").mkdir()
    names = [n for split in ("train", "val") for n in folder.make(split, path=str(tmp_path)).names]
    assert sorted(names) == ["x.jpg/inside.png", "y.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_replaced(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        write(tmp_path / "train" / name, png())
    write(tmp_path / "val" / "d.png", png())
    (tmp_path / "train" / "a.png").chmod(0)
    example = load(folder.make("train", path=str(tmp_path)), 0)
    assert (example["index"], example["replaced"]) == (1, True)


def batches(source, **options):
    transform = transforms.train_transform((16, 16), augment="random_resized_crop")
    options = {"batch_size": 16, "seed": 3, "threads": 1, **options}
    return loader.train_batches(source, ImageReader(3, transform), **options)


def take(iterator, count):
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()


def assert_same(batches, expected):
    for batch, other in zip(batches, expected, strict=True):
        for name, array in other.items():
            np.testing.assert_array_equal(batch[name], array, err_msg=name)


@pytest.fixture(scope="module")
def two_epochs(zoo):
    """The batches as they are without threads and workers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return take(batches(zoo, threads=0), 2 * len(zoo) // 16)


def test_the_loader_replaces_all_bad_images_and_no_others(zoo, two_epochs):
    replaced = {int(i) for batch in two_epochs for i in batch["asked"][batch["replaced"]]}
    assert replaced == {index_of(zoo, name) for name in (*BAD, *GONE)}


@NO_WARNING
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_batches_are_the_same_for_any_number_of_threads(zoo, two_epochs):
    assert_same(take(batches(zoo, threads=3), len(two_epochs)), two_epochs)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_batches_are_the_same_for_any_number_of_workers(zoo, two_epochs, workers):
    assert_same(take(batches(zoo, workers=workers), len(two_epochs)), two_epochs)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_nothing_but_bad_images_is_said_in_one_line(tmp_path, workers):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        write(tmp_path / "train" / name, b"text")
    write(tmp_path / "val" / "d.png", png())
    source = folder.make("train", path=str(tmp_path))
    message = (
        r"^data.path: \S*[abc].jpg and the 2 examples after it cannot be used; the last one: not"
    )
    with pytest.raises(ConfigError, match=message) as caught:
        take(batches(source, workers=workers), 1)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_goes_on_over_bad_images_and_stops_above_the_limit(zoo, tmp_path):
    flags = tiny_run(
        tmp_path / "run",
        data__source="folder",
        data__path=os.path.dirname(zoo.root),
        data__mean="0.5,0.5,0.5",
        data__std="0.25,0.25,0.25",
        data__augment="random_crop",
        model__channels="3",
        epochs="3",
        optimizer__warmup_epochs="1",
        run__log_every="1",
    )
    status, output = run(flags)
    assert status == 2, output
    last = output.splitlines()[-1]
    assert "error: data.max_bad_share 0.001: expected at most 10 of " in last
    assert f"such as {zoo.root}/" in last
    assert "Traceback" not in output
    more = ["--config.data.max_bad_share=1", "--allow_change=data.max_bad_share"]
    status, output = run([*flags, *more, "--config.run.workers=2", "--stop_at_step=12"])
    assert status == 0, output
    assert "replaced by the next example: " in output
    rows = metrics(tmp_path / "run")
    assert np.isfinite([row["train/loss"] for row in rows]).all()
    assert 10 < rows[-1]["train/bad_examples"] <= len(BAD) + len(GONE)
