"""simplejpeg and OpenCV against Pillow: equal pixels decoded, nearly equal ones resized."""

import io
import math
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
import skimage.data
import sklearn.datasets
from PIL import Image, ImageOps

from mae_jax.data import fast, transforms
from mae_jax.data.transforms import MAX_PIXELS, BadExample

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def photographs():
    """Photographs, uint8 [H, W, 3], of about the size of ImageNet's."""
    china, flower = sklearn.datasets.load_sample_images().images
    of_skimage = (skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee())
    return [photo[:375, :500] for photo in (china, flower, *of_skimage, skimage.data.rocket())]


def encode(image, file_format="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def rotated(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def psnr(one, other):
    return 10 * math.log10(255**2 / np.mean((one.astype(float) - other.astype(float)) ** 2))


class TestDecode:
    @pytest.mark.parametrize(
        "options",
        [
            {"subsampling": "4:2:0"},
            {"subsampling": "4:2:2", "quality": 60},
            {"subsampling": "4:4:4", "quality": 95},
            {"subsampling": "4:2:0", "progressive": True},
            {"keep_rgb": True},
            {"exif": rotated(1)},
            {"quality": 5},
        ],
        ids=["420", "422", "444", "progressive", "rgb", "upright", "quality_5"],
    )
    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_pixels_are_those_of_pillow(self, photographs, options, channels):
        for photo in photographs[:3]:
            photo = Image.fromarray(photo[20:193, 30:281])  # sides that no block of pixels divides
            for image in (photo, photo.convert("L")):
                if image.mode == "L" and "keep_rgb" in options:
                    continue
                data = encode(image, **options)
                pixels, by_pillow = fast.Decode(channels, exif=True).read(data)
                mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
                expected = np.asarray(Image.open(io.BytesIO(data)).convert(mode))
                np.testing.assert_array_equal(pixels, expected.reshape(pixels.shape))
                assert not by_pillow

    def test_jpegs_are_decoded_by_simplejpeg(self, photographs, monkeypatch):
        calls = []
        once = simplejpeg.decode_jpeg
        monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a: calls.append(a) or once(*a))
        image = Image.fromarray(photographs[0][:40, :50])
        for data, colours in ((encode(image), "RGB"), (encode(image.convert("L")), "GRAY")):
            fast.Decode(3)(data)
            assert calls.pop() == (data, colours)
        fast.Decode(3)(encode(image, "PNG"))
        fast.Decode(3)(photographs[0])
        assert not calls

    @pytest.mark.parametrize(
        ("make", "by_pillow"),
        [
            (lambda image: encode(image.convert("CMYK")), True),
            (lambda image: encode(image, exif=rotated(6)), True),
            (lambda image: encode(image)[:-2] + b"\0" * 20 + b"\xff\xd9", True),  # a warning
            (lambda image: encode(image, "PNG"), False),
            (lambda image: encode(image.convert("P"), "PNG"), False),
            (lambda image: encode(image, "WEBP"), False),
            (lambda image: encode(image) + b"\0garbage" * 100, False),
        ],
        ids=["cmyk", "rotated", "warning", "png", "palette", "webp", "garbage"],
    )
    def test_what_pillow_decodes_is_as_ever_and_told_if_it_is_a_jpeg(
        self, photographs, make, by_pillow
    ):
        data = make(Image.fromarray(photographs[3][:60, :80]))
        pixels, told = fast.Decode(3, exif=True).read(data)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        np.testing.assert_array_equal(pixels, np.asarray(expected))
        assert told is by_pillow

    def test_a_rotation_nobody_asks_for_does_not_matter(self, photographs):
        data = encode(Image.fromarray(photographs[0]), exif=rotated(6))
        pixels, by_pillow = fast.Decode(3).read(data)
        assert pixels.shape == photographs[0].shape
        assert not by_pillow

    def test_truncated_files_are_bad_examples(self, photographs):
        data = encode(Image.fromarray(photographs[0]))
        for end in (-1, -400, len(data) // 2, 200):
            with pytest.raises(BadExample, match="Error"):
                fast.Decode(3)(data[:end])

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    def test_too_many_pixels_are_refused_before_decoding(self):
        data = encode(Image.new("L", (8, 8)))
        start = data.index(b"\xff\xc0") + 5
        data = data[:start] + b"\x27\x10\x27\x10" + data[start + 4 :]  # 10,000 x 10,000
        assert MAX_PIXELS < 10_000**2
        with pytest.raises(BadExample, match="pixels are more than"):
            fast.Decode(3)(data)


class TestResize:
    def boxes(self, photographs, size, count=8):
        """Yield what `RandomResizedCrop` cuts out of photographs, and what Pillow makes of it."""
        rng, crop = np.random.default_rng(0), transforms.RandomResizedCrop(size)
        for photo in photographs:
            for _ in range(count):
                top, left, height, width = crop.box(*photo.shape[:2], rng)
                box = photo[top : top + height, left : left + width]
                yield box, transforms.resize(box, size)

    @pytest.mark.parametrize(
        ("size", "mean", "worst"),
        [((224, 224), 48, 40), ((160, 200), 46.5, 39), ((96, 96), 44.5, 40), ((448, 448), 49, 43)],
    )
    def test_boxes_of_photographs_are_nearly_those_of_pillow(self, photographs, size, mean, worst):
        found = [psnr(fast.resize(a, size), b) for a, b in self.boxes(photographs, size)]
        assert np.mean(found) >= mean
        assert np.min(found) >= worst

    def test_it_is_nearer_to_pillow_than_what_opencv_has(self, photographs):
        size = (224, 224)
        plain = {
            kind: [
                psnr(cv2.resize(box, size, interpolation=kind), expected)
                for box, expected in self.boxes(photographs, size)
            ]
            for kind in (cv2.INTER_AREA, cv2.INTER_CUBIC, cv2.INTER_LINEAR)
        }
        found = [psnr(fast.resize(a, size), b) for a, b in self.boxes(photographs, size)]
        assert np.mean(found) > max(map(np.mean, plain.values())) + 1

    @pytest.mark.parametrize("side", [200, 170, 125, 100])
    def test_stripes_of_one_pixel_alias_much_less_than_by_interpolation_alone(self, side):
        stripes = np.zeros((300, 300, 3), np.uint8)
        stripes[:, ::2] = 255
        alone = cv2.resize(stripes, (side, side), interpolation=cv2.INTER_CUBIC)
        assert fast.resize(stripes, (side, side)).std() < 0.55 * alone.std()

    @pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 7])
    @pytest.mark.parametrize("size", [(16, 24), (90, 70), (40, 11), (40, 50), (40, 20)])
    def test_channels_are_independent(self, channels, size):
        y, x = np.mgrid[:40, :50]
        waves = [np.sin(y / (5 + c)) * np.cos(x / (7 + c)) for c in range(channels)]
        image = np.uint8(127.5 + 100 * np.stack(waves, axis=-1))
        resized = fast.resize(image, size)
        assert resized.shape == (*size, channels)
        assert resized.dtype == np.uint8
        for channel in range(channels):
            alone = fast.resize(image[:, :, channel : channel + 1], size)
            np.testing.assert_array_equal(resized[:, :, channel : channel + 1], alone)
        assert np.abs(resized.astype(int) - transforms.resize(image, size)).max() <= 12

    @pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 2), (3, 3), (2000, 2000)])
    def test_odd_shapes_keep_their_colour(self, shape):
        image = np.full((*shape, 3), (10, 130, 250), np.uint8)
        assert (fast.resize(image, (16, 24)) == image[0, 0]).all()

    def test_what_has_the_size_already_is_unchanged(self, photographs):
        np.testing.assert_array_equal(fast.resize(photographs[0], (375, 500)), photographs[0])

    def test_views_of_any_strides_can_be_resized(self, photographs):
        for view in (photographs[0][::-1], photographs[0][:, ::-2], photographs[0].swapaxes(0, 1)):
            expected = fast.resize(np.ascontiguousarray(view), (64, 64))
            np.testing.assert_array_equal(fast.resize(view, (64, 64)), expected)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_mirroring_exchanges_left_and_right(channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 8, channels), dtype=np.uint8)
    np.testing.assert_array_equal(fast.mirror(image), image[:, ::-1])
    flip = transforms.HorizontalFlip(1.0, fast.mirror)
    np.testing.assert_array_equal(flip(image, np.random.default_rng(0)), image[:, ::-1])


def test_opencv_starts_no_threads_of_its_own_where_training_images_are_read():
    code = (
        "import sys, cv2\n"
        "before = cv2.getNumThreads()\n"
        "from mae_jax.data import transforms\n"
        "assert cv2.getNumThreads() == before\n"
        "from mae_jax.data import fast\n"
        "print(cv2.getNumThreads(), 'jax' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["1", "False"], done.stderr
