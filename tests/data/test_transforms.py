"""Decoding, crops and flips against values by hand, Pillow, and a slow resampler in numpy."""

import dataclasses
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mae_jax.data import transforms
from mae_jax.data.transforms import (
    BadExample,
    CenterCrop,
    Decode,
    HorizontalFlip,
    RandomCrop,
    RandomResizedCrop,
    RandomResizedCropClamped,
)
from mae_jax.errors import ConfigError


def generator(seed=0):
    return np.random.default_rng(seed)


def noise(height, width, channels, seed=0):
    return generator(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height, width, channels):
    """An image whose resampling is not dominated by overshoot."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(y / (5 + c)) * np.cos(x / (7 + c)) for c in range(channels)]
    return np.uint8(127.5 + 100 * np.stack(waves, axis=-1))


def encode(image, file_format="PNG", **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def png_claiming(width, height):
    def chunk(kind, data):
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


class TestDecode:
    @pytest.mark.parametrize("channels", [3, 4])
    def test_lossless_files_come_back_exactly(self, channels):
        image = noise(5, 7, channels)
        np.testing.assert_array_equal(Decode(channels)(encode(image)), image)

    def test_grey_keeps_its_channel_axis_and_is_repeated_for_colour(self):
        grey = noise(5, 7, 1)
        data = encode(grey[:, :, 0])
        np.testing.assert_array_equal(Decode(1)(data), grey)
        np.testing.assert_array_equal(Decode(3)(data), np.repeat(grey, 3, axis=2))

    def test_colour_becomes_grey_by_the_luma_weights(self):
        pixels = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8)
        expected = [76, 150, 29, 255]  # 0.299, 0.587, 0.114
        assert Decode(1)(encode(pixels)).ravel().tolist() == expected
        assert Decode(1)(pixels).ravel().tolist() == expected

    def test_16_bit_grey_is_scaled_and_not_clipped(self):
        deep = np.array([[0, 255, 256, 511, 32768, 65535]], np.uint16)
        assert Decode(1)(encode(deep)).ravel().tolist() == [0, 0, 1, 1, 128, 255]
        assert Decode(3)(encode(deep))[0, :, 2].tolist() == [0, 0, 1, 1, 128, 255]

    def test_alpha_is_dropped_and_the_hidden_colour_shows(self):
        hidden = np.array([[[10, 20, 30, 0], [1, 2, 3, 128]]], np.uint8)
        assert Decode(3)(encode(hidden)).tolist() == [[[10, 20, 30], [1, 2, 3]]]
        assert Decode(1)(encode(Image.new("LA", (1, 1), (77, 0)))).tolist() == [[[77]]]

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize(("transparency", "alpha"), [(1, 0), (bytes([255, 100]), 100)])
    def test_palette_gives_its_colours_whatever_its_transparency(self, transparency, alpha):
        image = Image.new("P", (2, 1))
        image.putpalette([9, 8, 7, 60, 50, 40])
        image.putdata([0, 1])
        data = encode(image, transparency=transparency)
        assert Decode(3)(data).tolist() == [[[9, 8, 7], [60, 50, 40]]]
        assert Decode(4)(data).tolist() == [[[9, 8, 7, 255], [60, 50, 40, alpha]]]

    def test_cmyk_becomes_rgb(self):
        data = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
        assert np.abs(Decode(3)(data).astype(int) - [255, 0, 0]).max() <= 2

    def test_one_bit_becomes_black_and_white(self):
        image = Image.new("1", (2, 1))
        image.putpixel((1, 0), 1)
        assert Decode(1)(encode(image)).ravel().tolist() == [0, 255]

    @pytest.mark.parametrize("size", [(1, 1), (5000, 2), (2, 5000)])
    def test_odd_shapes_decode(self, size):
        assert Decode(3)(encode(Image.new("RGB", size), "JPEG")).shape == (size[1], size[0], 3)

    # Where row 0 and column 0 of the file belong on the upright picture: EXIF 2.3, tag 0x0112.
    @pytest.mark.parametrize(
        ("orientation", "upright"),
        [
            (1, [[1, 2, 3], [4, 5, 6]]),  # top, left
            (2, [[3, 2, 1], [6, 5, 4]]),  # top, right
            (3, [[6, 5, 4], [3, 2, 1]]),  # bottom, right
            (4, [[4, 5, 6], [1, 2, 3]]),  # bottom, left
            (5, [[1, 4], [2, 5], [3, 6]]),  # left, top
            (6, [[4, 1], [5, 2], [6, 3]]),  # right, top
            (7, [[6, 3], [5, 2], [4, 1]]),  # right, bottom
            (8, [[3, 6], [2, 5], [1, 4]]),  # left, bottom
        ],
    )
    def test_exif_rotation_is_applied_when_asked_for(self, orientation, upright):
        stored = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(stored, exif=exif)
        assert Decode(1, exif=True)(data)[:, :, 0].tolist() == upright
        assert Decode(1, exif=False)(data)[:, :, 0].tolist() == stored.tolist()

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
    def test_damaged_exif_does_not_cost_the_image(self):
        data = encode(smooth(6, 4, 3), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
        assert Decode(3, exif=True)(data).shape == (6, 4, 3)

    @pytest.mark.parametrize(
        ("file_format", "cut"),
        [("JPEG", 1), ("JPEG", 400), ("PNG", 50), ("PNG", 400), ("WEBP", 1), ("WEBP", 400)],
    )
    def test_truncated_file_is_a_bad_example(self, file_format, cut):
        data = encode(noise(32, 32, 3), file_format)
        assert Decode(3)(data).shape == (32, 32, 3)
        with pytest.raises(BadExample, match="Error"):
            Decode(3)(data[:-cut])

    @pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
    def test_what_is_no_image_is_a_bad_example(self, data):
        with pytest.raises(BadExample):
            Decode(3)(data)

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize("side", [9_460, 20_000, 2_000_000_000])
    def test_too_many_pixels_are_refused_before_decoding(self, side):
        with pytest.raises(BadExample, match=r"pixels|limit|Decompression"):
            Decode(3)(png_claiming(side, side))

    def test_images_just_below_the_limit_get_as_far_as_their_pixels(self):
        assert 9_459 * 9_459 <= transforms.MAX_PIXELS < 9_460 * 9_460
        with pytest.raises(BadExample) as caught:
            Decode(3)(png_claiming(9_459, 9_459))
        assert "more than" not in str(caught.value)

    def test_image_of_floats_is_a_bad_example(self):
        with pytest.raises(BadExample, match="float"):
            Decode(3)(encode(Image.new("F", (2, 2)), "TIFF"))

    def test_encoded_images_need_a_channel_count_that_pillow_has(self):
        with pytest.raises(ConfigError, match=r"model.channels: expected 1, 3 or 4 .* got 2"):
            Decode(2)(encode(noise(2, 2, 3)))

    def test_arrays_pass_with_any_channel_count(self):
        image = noise(3, 4, 5)
        np.testing.assert_array_equal(Decode(5)(image), image)

    def test_arrays_are_converted_between_grey_and_colour(self):
        grey = noise(3, 4, 1)
        np.testing.assert_array_equal(Decode(1)(grey[:, :, 0]), grey)
        np.testing.assert_array_equal(Decode(3)(grey), np.repeat(grey, 3, axis=2))
        colour = noise(3, 4, 4)
        np.testing.assert_array_equal(Decode(3)(colour), colour[:, :, :3])
        np.testing.assert_array_equal(Decode(4)(grey)[:, :, 3], np.full((3, 4), 255))

    @pytest.mark.parametrize(
        ("array", "reason"),
        [
            (np.zeros((2, 2, 3), np.float32), "expected uint8"),
            (np.zeros((2, 2, 2, 3), np.uint8), "expected uint8"),
            (np.zeros((0, 2, 3), np.uint8), "expected uint8"),
            (np.zeros((2, 2, 5), np.uint8), "expected 3 channels, got 5"),
        ],
    )
    def test_other_arrays_are_bad_examples(self, array, reason):
        with pytest.raises(BadExample, match=reason):
            Decode(3)(array)


def bicubic_weights(size_in, size_out):
    """[out, in] weights of antialiased bicubic interpolation with a = -0.5 (Keys 1981)."""
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    centre = (np.arange(size_out) + 0.5) * scale
    t = np.abs((np.arange(size_in)[None] + 0.5 - centre[:, None]) / stretch)
    near = 1.5 * t**3 - 2.5 * t**2 + 1
    far = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    weights = np.where(t < 1, near, np.where(t < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


def slow_resize(image, height, width):
    rows = bicubic_weights(image.shape[0], height)
    columns = bicubic_weights(image.shape[1], width)
    return np.einsum("ah,bw,hwc->abc", rows, columns, image.astype(np.float64), optimize=True).clip(
        0, 255
    )


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [(16, 24), (90, 70), (40, 11)])
def test_resizing_is_antialiased_bicubic_with_independent_channels(channels, size):
    image = smooth(40, 50, channels)
    resized = transforms.resize(image, size)
    assert resized.shape == (*size, channels)
    assert resized.dtype == np.uint8
    # Two passes round to integers, each by at most 1/2.
    np.testing.assert_allclose(resized, slow_resize(image, *size), atol=1.2)


class TestRandomResizedCrop:
    def boxes(self, crop, height, width, count=4000):
        rng = generator(1)
        return np.array([crop.box(height, width, rng) for _ in range(count)])

    def test_boxes_lie_within_the_image_and_the_bounds(self):
        crop = RandomResizedCrop((8, 8), (0.1, 0.5), (0.5, 1.5))
        top, left, height, width = self.boxes(crop, 300, 400).T
        assert min(top.min(), left.min()) >= 0
        assert (top + height).max() <= 300
        assert (left + width).max() <= 400
        area = height * width / (300 * 400)
        assert 0.098 < area.min() < 0.11  # rounding of the sides
        assert 0.49 < area.max() < 0.505
        assert 0.49 < (width / height).min() < 0.52
        assert 1.47 < (width / height).max() < 1.52

    def test_area_and_log_ratio_are_uniform_and_independent_where_all_boxes_fit(self):
        crop = RandomResizedCrop((8, 8), (0.05, 0.25), (0.5, 2.0))
        top, left, height, width = self.boxes(crop, 1000, 1000).T
        area = (height * width / 1e6 - 0.05) / 0.2
        ratio = np.log(width / height) / np.log(4) + 0.5
        free = np.maximum(1, np.array([1000 - height, 1000 - width]))
        for uniform in (area, ratio, top / free[0], left / free[1]):
            quantiles = np.quantile(uniform, [0.1, 0.25, 0.5, 0.75, 0.9])
            np.testing.assert_allclose(quantiles, [0.1, 0.25, 0.5, 0.75, 0.9], atol=0.03)
        assert (
            np.abs(np.corrcoef([area, ratio, top / free[0], left / free[1]]) - np.eye(4)).max()
            < 0.06
        )

    def test_every_position_is_taken(self):
        crop = RandomResizedCrop((8, 8), (4 / 12, 4 / 12), (1.0, 1.0))  # 2 x 2 in 3 x 4
        positions = {tuple(box) for box in self.boxes(crop, 3, 4, count=200).tolist()}
        assert positions == {(top, left, 2, 2) for top in range(2) for left in range(3)}

    def test_boxes_that_do_not_fit_are_drawn_again(self):
        crop = RandomResizedCrop((8, 8))
        _, _, height, width = self.boxes(crop, 300, 400, count=20_000).T
        rng = generator(2)
        area = rng.uniform(0.2, 1.0, 100_000) * 300 * 400
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 100_000))
        fits = (np.sqrt(area * ratio) <= 400) & (np.sqrt(area / ratio) <= 300)
        assert 0.6 < fits.mean() < 0.8  # so that it matters
        np.testing.assert_allclose((height * width).mean(), area[fits].mean(), rtol=0.01)
        np.testing.assert_allclose(
            np.log(width / height).mean(), np.log(ratio[fits]).mean(), atol=0.01
        )

    @pytest.mark.parametrize(
        ("height", "width", "box"),
        [
            (10, 1000, (0, 493, 10, 13)),  # 10 x 4/3 = 13.3 wide
            (1000, 10, (493, 0, 13, 10)),  # 10 / (3/4) = 13.3 high
            (1, 5000, (0, 2499, 1, 1)),
        ],
    )
    def test_long_images_fall_back_to_the_central_box_of_an_allowed_ratio(self, height, width, box):
        assert RandomResizedCrop((8, 8), scale=(1.0, 1.0)).box(height, width, generator()) == box

    def test_image_of_an_allowed_ratio_in_which_nothing_fits_is_taken_whole(self):
        crop = RandomResizedCrop((8, 8), scale=(4.0, 4.0))
        assert crop.box(20, 22, generator()) == (0, 0, 20, 22)

    @pytest.mark.parametrize("channels", [1, 3, 5])
    def test_box_is_cut_before_it_is_resized(self, channels):
        image = noise(40, 50, channels)
        crop = RandomResizedCrop((16, 24))
        top, left, height, width = crop.box(40, 50, generator(5))
        out = crop(image, generator(5))
        assert out.shape == (16, 24, channels)
        for channel in range(channels):
            plane = Image.fromarray(image[:, :, channel])
            plane = plane.crop((left, top, left + width, top + height))
            expected = plane.resize((24, 16), Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(out[:, :, channel], np.asarray(expected))

    def test_whole_image_of_the_right_size_is_unchanged(self):
        image = noise(28, 28, 1)
        crop = RandomResizedCrop((28, 28), (1.0, 1.0), (1.0, 1.0))
        np.testing.assert_array_equal(crop(image, generator()), image)

    def test_result_depends_on_the_generator_alone(self):
        image = noise(40, 50, 3)
        crop = RandomResizedCrop((8, 8))
        np.testing.assert_array_equal(crop(image, generator(3)), crop(image, generator(3)))
        assert (crop(image, generator(3)) != crop(image, generator(4))).any()


class TestRandomResizedCropClamped:
    def boxes(self, crop, height, width, count=4000):
        rng = generator(1)
        return np.array([crop.box(height, width, rng) for _ in range(count)])

    @pytest.mark.parametrize(("height", "width"), [(300, 400), (40, 500), (7, 5)])
    def test_sides_are_drawn_once_rounded_and_cut_down_to_the_image(self, height, width):
        crop = RandomResizedCropClamped((8, 8), (0.08, 1.0))
        rng, same, cut = generator(2), generator(2), 0
        for _ in range(300):
            area = height * width * same.uniform(0.08, 1.0)
            ratio = np.exp(same.uniform(np.log(3 / 4), np.log(4 / 3)))
            wide, high = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
            cut += wide > width or high > height
            wide, high = min(wide, width), min(high, height)
            top, left = same.integers(height - high + 1), same.integers(width - wide + 1)
            assert crop.box(height, width, rng) == (top, left, high, wide)
        assert cut > 10  # so that it matters

    def test_a_box_that_cannot_fit_keeps_its_other_side(self):
        crop = RandomResizedCropClamped((8, 8), (1.0, 1.0), (1.0, 1.0))
        # 100 x 400 pixels are a square of 200: cut to 100 x 200.
        top, left, height, width = self.boxes(crop, 100, 400).T
        assert set(zip(top, height, width, strict=True)) == {(0, 100, 200)}
        assert set(left) == set(range(201))
        quantiles = np.quantile(left, [0.25, 0.5, 0.75])
        np.testing.assert_allclose(quantiles, [50, 100, 150], atol=6)

    def test_large_boxes_are_more_frequent_than_with_drawing_again(self):
        clamped, again = (
            self.boxes(kind((8, 8), (0.08, 1.0)), 300, 400)[:, 2:].prod(axis=1).mean() / 120_000
            for kind in (RandomResizedCropClamped, RandomResizedCrop)
        )
        # Uniform in 0.08 ... 1 has the mean 0.54; cutting down costs less than leaving out does.
        assert again + 0.02 < clamped < 0.54

    def test_a_side_is_at_least_one_pixel(self):
        crop = RandomResizedCropClamped((8, 8), (0.01, 0.02), (0.1, 10.0))
        boxes = self.boxes(crop, 3, 2, count=200)
        assert boxes[:, 2:].min() == 1

    def test_box_is_cut_and_resized(self):
        image = noise(40, 50, 3)
        crop = RandomResizedCropClamped((16, 24), (1.0, 1.0))
        top, left, height, width = crop.box(40, 50, generator(5))
        expected = transforms.resize(image[top : top + height, left : left + width], (16, 24))
        np.testing.assert_array_equal(crop(image, generator(5)), expected)


class TestHorizontalFlip:
    def test_flip_mirrors_columns(self):
        image = noise(3, 4, 2)
        np.testing.assert_array_equal(HorizontalFlip(1.0)(image, generator()), np.flip(image, 1))
        np.testing.assert_array_equal(HorizontalFlip(0.0)(image, generator()), image)

    def test_half_of_the_images_are_flipped(self):
        image, rng = np.array([[[0], [1]]], np.uint8), generator()
        flipped = [HorizontalFlip()(image, rng)[0, 0, 0] for _ in range(2000)]
        assert 0.46 < np.mean(flipped) < 0.54


class TestCenterCrop:
    @pytest.mark.parametrize(
        ("shape", "resized", "top", "left"),
        [
            ((300, 400), (256, 341), 16, 58),  # (341 - 224) / 2 = 58.5, to even
            ((400, 300), (341, 256), 58, 16),
            ((300, 500), (256, 426), 16, 101),  # 256 x 500 / 300 = 426.7, cut off
            ((300, 398), (256, 339), 16, 58),  # (339 - 224) / 2 = 57.5, to even
            ((256, 256), (256, 256), 16, 16),
            ((100, 100), (256, 256), 16, 16),
        ],
    )
    def test_224_is_cut_out_of_256_as_in_the_official_evaluation(self, shape, resized, top, left):
        image = smooth(*shape, 3)
        whole = Image.fromarray(image).resize(resized[::-1], Image.Resampling.BICUBIC)
        expected = np.asarray(whole)[top : top + 224, left : left + 224]
        np.testing.assert_array_equal(CenterCrop((224, 224))(image), expected)

    # Odd sizes, smaller than the crop, long, and of the crop's own size.
    @pytest.mark.parametrize(
        "shape",
        [(375, 500), (500, 333), (97, 131), (225, 223), (641, 257), (61, 400), (384, 384)],
    )
    @pytest.mark.parametrize(("size", "short"), [(224, 256), (384, 384), (448, 448)])
    @pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
    def test_files_become_bit_for_bit_what_plain_pillow_makes_of_them(
        self, shape, size, short, file_format
    ):
        pixels = smooth(*shape, 3) ^ noise(*shape, 3) % 16
        data = encode(pixels if file_format == "JPEG" else pixels[:, :, 0], file_format)

        image = Image.open(io.BytesIO(data)).convert("RGB")
        width, height = image.size
        if width < height:
            image = image.resize((short, int(short * height / width)), Image.Resampling.BICUBIC)
        else:
            image = image.resize((int(short * width / height), short), Image.Resampling.BICUBIC)
        left, top = round((image.width - size) / 2), round((image.height - size) / 2)
        expected = np.asarray(image.crop((left, top, left + size, top + size)))

        transform = transforms.eval_transform((size, size), crop_fraction=size / short)
        np.testing.assert_array_equal(transform(Decode(3)(data), generator()), expected)

    @pytest.mark.parametrize(
        ("shape", "size", "resized"),
        [
            ((100, 100), (32, 64), (128, 128)),
            ((100, 100), (64, 32), (128, 128)),
            ((50, 400), (32, 64), (64, 512)),
            ((400, 50), (32, 64), (1024, 128)),
        ],
    )
    def test_size_that_is_not_square_is_covered_in_both_directions(self, shape, size, resized):
        image = smooth(*shape, 1)
        top, left = (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2
        expected = slow_resize(image, *resized)[top : top + size[0], left : left + size[1]]
        out = CenterCrop(size, fraction=0.5)(image)
        assert out.shape == (*size, 1)
        np.testing.assert_allclose(out, expected, atol=1.2)

    @pytest.mark.parametrize("size", [(28, 28), (17, 31), (1, 1), (224, 224)])
    @pytest.mark.parametrize("shape", [(1, 1), (5, 300), (300, 5), (29, 31)])
    @pytest.mark.parametrize("fraction", [1.0, 0.9, 0.875, 0.3])
    def test_result_always_has_the_size(self, size, shape, fraction):
        out = CenterCrop(size, fraction)(smooth(*shape, 1))
        assert out.shape == (*size, 1)
        assert out.dtype == np.uint8

    def test_image_of_the_right_size_is_unchanged_at_fraction_1(self):
        image = noise(28, 20, 1)
        np.testing.assert_array_equal(CenterCrop((28, 20), 1.0)(image), image)

    def test_image_that_would_become_huge_is_a_bad_example(self):
        with pytest.raises(BadExample, match="2 x 5000 is too long and thin"):
            CenterCrop((224, 224))(np.zeros((2, 5000, 3), np.uint8))


class TestRandomCrop:
    def places(self, crop, height, width, count=4000):
        """Crop an image of different numbers, at most 255, and find the boxes in it."""
        image = np.arange(height * width, dtype=np.uint8).reshape(height, width, 1)
        rng, places = generator(1), []
        for _ in range(count):
            box = crop(image, rng)
            top, left = divmod(int(box[0, 0, 0]), width)
            assert box.shape == (*crop.size, 1)
            np.testing.assert_array_equal(
                box, image[top : top + crop.size[0], left : left + crop.size[1]]
            )
            places.append((top, left))
        return places

    def test_all_places_within_the_image_are_equally_likely(self):
        # 4 / 0.5 = 8 is the short side already; 8 - 4 + 1 = 5 by 10 - 4 + 1 = 7 places.
        places = self.places(RandomCrop((4, 4), 0.5), 8, 10)
        count = np.zeros((5, 7))
        np.add.at(count, tuple(np.array(places).T), 1)
        assert count.sum() == 4000
        # Mean 114, deviation 10.5; four of them.
        np.testing.assert_allclose(count, 4000 / 35, atol=42)

    def test_at_fraction_1_the_box_moves_along_the_long_side_alone(self):
        assert set(self.places(RandomCrop((8, 8), 1.0), 8, 16)) == {(0, left) for left in range(9)}
        assert set(self.places(RandomCrop((8, 8), 1.0), 8, 8, count=5)) == {(0, 0)}

    @pytest.mark.parametrize(
        ("shape", "resized"), [((300, 400), (256, 341)), ((400, 300), (341, 256))]
    )
    def test_224_is_cut_out_of_256_as_in_the_evaluation(self, shape, resized):
        image = smooth(*shape, 3)
        whole = np.asarray(Image.fromarray(image).resize(resized[::-1], Image.Resampling.BICUBIC))
        rng = generator(3)
        top, left = rng.integers(resized[0] - 223), rng.integers(resized[1] - 223)
        expected = whole[top : top + 224, left : left + 224]
        np.testing.assert_array_equal(RandomCrop((224, 224))(image, generator(3)), expected)

    @pytest.mark.parametrize("size", [(28, 28), (17, 31), (1, 1)])
    @pytest.mark.parametrize("shape", [(1, 1), (5, 300), (300, 5), (29, 31)])
    @pytest.mark.parametrize("fraction", [1.0, 0.9, 0.3])
    def test_result_always_has_the_size(self, size, shape, fraction):
        out = RandomCrop(size, fraction)(smooth(*shape, 1), generator())
        assert out.shape == (*size, 1)
        assert out.dtype == np.uint8

    def test_image_that_would_become_huge_is_a_bad_example(self):
        with pytest.raises(BadExample, match="2 x 5000 is too long and thin"):
            RandomCrop((224, 224))(np.zeros((2, 5000, 3), np.uint8), generator())


class TestTransforms:
    def test_training_crops_at_random_and_flips(self):
        transform = transforms.train_transform(
            (8, 12), augment="random_resized_crop", crop_scale=(0.5, 0.6), crop_ratio=(1.0, 1.0)
        )
        crop, flip = transform.steps
        assert dataclasses.astuple(crop)[:3] == ((8, 12), (0.5, 0.6), (1.0, 1.0))
        assert isinstance(flip, HorizontalFlip)
        image = noise(40, 50, 3)
        expected = flip(crop(image, rng := generator(7)), rng)
        np.testing.assert_array_equal(transform(image, generator(7)), expected)

    def test_defaults_are_those_of_mae_pretraining(self):
        crop = transforms.train_transform((224, 224), augment="random_resized_crop").steps[0]
        assert dataclasses.astuple(crop)[:3] == ((224, 224), (0.2, 1.0), (3 / 4, 4 / 3))

    def test_flip_can_be_left_out(self):
        transform = transforms.train_transform((8, 8), augment="random_resized_crop", flip=False)
        assert [type(step) for step in transform.steps] == [RandomResizedCrop]

    def test_no_augmentation_is_the_evaluation_crop(self):
        transform = transforms.train_transform(
            (8, 8), augment="none", flip=False, crop_fraction=0.5
        )
        image = noise(40, 50, 3)
        expected = transforms.eval_transform((8, 8), crop_fraction=0.5)(image, generator())
        np.testing.assert_array_equal(transform(image, generator()), expected)

    def test_without_augmentation_images_are_mirrored_unless_flip_is_off(self):
        steps = transforms.train_transform((8, 8), augment="none").steps
        assert [type(step) for step in steps] == [CenterCrop, HorizontalFlip]

    def test_random_crop_has_the_fraction_of_the_evaluation_and_a_flip(self):
        crop, flip = transforms.train_transform(
            (8, 12), augment="random_crop", crop_fraction=0.75
        ).steps
        assert crop == RandomCrop((8, 12), 0.75)
        assert flip == HorizontalFlip(0.5)

    def test_clamped_crop_has_the_ranges_and_a_flip(self):
        crop, flip = transforms.train_transform(
            (8, 12), augment="random_resized_crop_clamped", crop_scale=(0.08, 1.0)
        ).steps
        assert crop == RandomResizedCropClamped((8, 12), (0.08, 1.0), (3 / 4, 4 / 3))
        assert flip == HorizontalFlip(0.5)

    @pytest.mark.parametrize("flip", [True, False])
    def test_what_comes_after_comes_last_and_draws_on(self, flip):
        def invert_some(image, rng):
            return np.where(rng.random(image.shape) < 0.5, 255 - image, image)

        fields = {"augment": "random_resized_crop", "flip": flip}
        plain = transforms.train_transform((8, 8), **fields)
        longer = transforms.train_transform((8, 8), **fields, after=invert_some)
        assert longer.steps == (*plain.steps, invert_some)
        image = noise(40, 50, 3)
        expected = invert_some(plain(image, rng := generator(7)), rng)
        np.testing.assert_array_equal(longer(image, generator(7)), expected)

    def test_unknown_augmentation_is_refused(self):
        with pytest.raises(ConfigError, match=r"data.augment: expected .* got 'autoaugment'"):
            transforms.train_transform((8, 8), augment="autoaugment")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.9, 0.5)),
        ("crop_scale", (0.5, 1.5)),
        ("crop_ratio", (2.0, 0.5)),
        ("crop_fraction", 0.0),
        ("crop_fraction", 1.2),
    ],
)
def test_a_range_out_of_bounds_is_refused(field, value):
    with pytest.raises(ConfigError, match=f"data.{field}: expected"):
        transforms.train_transform((8, 8), augment="random_resized_crop", **{field: value})


@pytest.mark.parametrize("fraction", [-0.5, 0.0, 1.2, 87.5, float("nan")])
def test_a_fraction_out_of_bounds_is_refused_in_evaluation_too(fraction):
    with pytest.raises(ConfigError, match=r"data.crop_fraction: expected in \(0, 1\], got"):
        transforms.eval_transform((8, 8), crop_fraction=fraction)
