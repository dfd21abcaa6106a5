"""RandAugment: operations against values by hand and Pillow, and what is drawn."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mae_jax.data import augment
from mae_jax.data.augment import OPERATIONS, RandAugment, apply_operation, parse_rand_augment
from mae_jax.errors import ConfigError

FILL = (124, 116, 104)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
SIGNED = {*augment.ENHANCE, *augment.AFFINE, "rotate"}
# What level 0 leaves as it is. The others have no strength, or keep 4 bits.
NEUTRAL = sorted(SIGNED | {"solarize", "solarize_add"})


def generator(seed=0):
    return np.random.default_rng(seed)


def noise(height=9, width=14, seed=0):
    return generator(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def act(name, pixels, level, resample=Image.Resampling.BICUBIC):
    image = Image.fromarray(pixels)
    return np.asarray(apply_operation(name, image, level, fill=FILL, resample=resample))


def grey(*values):
    """One row of grey pixels."""
    return np.repeat(np.array(values, np.uint8)[None, :, None], 3, axis=2)


def row(pixels):
    assert (pixels == pixels[:, :, :1]).all()
    return pixels[0, :, 0].tolist()


class TestOperations:
    def test_there_are_fifteen(self):
        assert len(set(OPERATIONS)) == len(OPERATIONS) == 15

    @pytest.mark.parametrize("name", NEUTRAL)
    def test_level_0_leaves_the_image_as_it_is(self, name):
        np.testing.assert_array_equal(act(name, noise(), 0.0), noise())

    @pytest.mark.parametrize("name", OPERATIONS)
    @pytest.mark.parametrize("level", [-1.0, -0.9, 0.37, 1.0])
    def test_size_and_kind_stay_and_something_happens(self, name, level):
        pixels = noise(24, 30) // 5 * 4 + 20  # room for contrast, pixels enough for a histogram
        out = act(name, pixels, level)
        assert (out.shape, out.dtype) == ((24, 30, 3), np.uint8)
        assert (out != pixels).any()

    @pytest.mark.parametrize("name", OPERATIONS)
    def test_only_operations_with_a_direction_regard_the_sign(self, name):
        same = np.array_equal(act(name, noise(), 0.7), act(name, noise(), -0.7))
        assert same == (name not in SIGNED)

    @pytest.mark.parametrize(
        ("level", "kept"), [(0, 4), (0.24, 4), (0.25, 3), (0.9, 1), (0.99, 1), (1, 0)]
    )
    def test_posterize_keeps_four_to_no_bits(self, level, kept):
        step = 2 ** (8 - kept)
        np.testing.assert_array_equal(
            act("posterize", noise(), level), noise().astype(int) // step * step
        )

    def test_solarize_inverts_from_a_threshold_that_falls(self):
        # 256 - int(256 * 0.9) = 26
        assert row(act("solarize", grey(0, 25, 26, 200, 255), 0.9)) == [0, 25, 229, 55, 0]
        assert row(act("solarize", grey(0, 25, 200, 255), 1.0)) == [255, 230, 55, 0]

    def test_solarize_add_brightens_the_dark_half(self):
        # int(110 * 0.9) = 99
        assert row(act("solarize_add", grey(0, 127, 128, 255), 0.9)) == [99, 226, 128, 255]

    def test_invert_is_its_own_inverse(self):
        assert row(act("invert", grey(0, 1, 255), 0.9)) == [255, 254, 0]

    def test_auto_contrast_stretches_each_channel(self):
        pixels = np.stack([grey(20, 37, 71)[:, :, 0], *[grey(0, 7, 255)[:, :, 0]] * 2], axis=2)
        out = act("auto_contrast", pixels, 0.9)
        assert out[0, :, 0].tolist() == [0, 85, 255]  # times 5
        assert out[0, :, 1].tolist() == [0, 7, 255]

    def test_equalize_spreads_the_values_evenly(self):
        # 255 pixels below the brightest: a step of the result for each, rounded half down.
        ramp = grey(*np.sort(generator(1).choice(100, 86, replace=False)))  # step (86 - 1) // 255
        np.testing.assert_array_equal(act("equalize", ramp, 0.9), ramp)  # too few pixels
        wide = np.tile(grey(10, 20, 30, 40), (255, 1, 1))  # step 255 * 3 // 255 = 3
        assert row(act("equalize", wide, 0.9)) == [0, 85, 170, 255]

    @pytest.mark.parametrize(("level", "factor"), [(1, 1.9), (0.5, 1.45), (-0.5, 0.55), (-1, 0.1)])
    def test_brightness_multiplies(self, level, factor):
        out = act("brightness", grey(0, 10, 100, 200), level)
        assert row(out) == [0, *(min(255, int(v * factor)) for v in (10, 100, 200))]

    def test_contrast_moves_away_from_the_mean_and_towards_it(self):
        assert row(act("contrast", grey(80, 120), 1.0)) == [62, 138]  # 100 -+ 20 * 1.9
        assert row(act("contrast", grey(80, 120), -1.0)) == [98, 102]  # 100 -+ 20 * 0.1

    def test_color_moves_away_from_grey_and_towards_it(self):
        pixels = np.full((2, 2, 3), (200, 100, 50), np.uint8)
        grey_value = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
        for level in (0.8, -0.8):
            expected = [grey_value + (v - grey_value) * (1 + 0.9 * level) for v in (200, 100, 50)]
            out = act("color", pixels, level)[0, 0]
            np.testing.assert_allclose(out, np.clip(expected, 0, 255), atol=1)

    def test_sharpness_keeps_what_is_flat(self):
        flat = np.full((6, 6, 3), 90, np.uint8)
        np.testing.assert_array_equal(act("sharpness", flat, 1.0), flat)
        dot = flat.copy()
        dot[3, 3] = 150
        assert act("sharpness", dot, 1.0)[3, 3, 0] > 150 > act("sharpness", dot, -1.0)[3, 3, 0]


K = np.arange(16).reshape(4, 4)
GREYS = 16 * K + 1
# What each operation makes of these four by four pixels. Of a level of +-5/9 the factor is 1.5 or
# 0.5, and a translation is of one pixel in four.
BY_HAND = [
    ("invert", 0.5, 254 - 16 * K),
    ("auto_contrast", 0.5, 17 * K),  # from 1 ... 241 to 0 ... 255
    ("equalize", 0.5, GREYS),  # needs 255 pixels to do anything
    ("posterize", 0.5, K // 4 * 64),  # two bits
    ("solarize", 0.5, np.where(K < 8, GREYS, 255 - GREYS)),  # from 128 on
    ("solarize_add", 0.5, np.where(K < 8, GREYS + 55, GREYS)),
    ("color", 5 / 9, GREYS),  # there is no colour
    ("contrast", 5 / 9, (24 * K - 59).clip(0, 255)),  # 121 + 1.5 (16 k - 120)
    ("contrast", -5 / 9, 8 * K + 61),  # 121 + 0.5 (16 k - 120)
    ("brightness", 5 / 9, (24 * K + 1).clip(0, 255)),  # 24 k + 1.5
    ("brightness", -5 / 9, 8 * K),  # 8 k + 0.5
]
# The same of geometry, as the k whose pixel is read; -1: none, the fill colour. Shears are of 0.15,
# 0.45, 0.75 and 1.05 pixels. A turn by 30 degrees moves the outer ring one on, but for corners.
GEOMETRY_BY_HAND = [
    ("shear_x", 1.0, [[0, 1, 2, 3], [4, 5, 6, 7], [9, 10, 11, -1], [13, 14, 15, -1]]),
    ("shear_x", -1.0, [[0, 1, 2, 3], [4, 5, 6, 7], [-1, 8, 9, 10], [-1, 12, 13, 14]]),
    ("shear_y", 1.0, [[0, 1, 6, 7], [4, 5, 10, 11], [8, 9, 14, 15], [12, 13, -1, -1]]),
    ("shear_y", -1.0, [[0, 1, -1, -1], [4, 5, 2, 3], [8, 9, 6, 7], [12, 13, 10, 11]]),
    ("translate_x", 5 / 9, [[1, 2, 3, -1], [5, 6, 7, -1], [9, 10, 11, -1], [13, 14, 15, -1]]),
    ("translate_x", -5 / 9, [[-1, 0, 1, 2], [-1, 4, 5, 6], [-1, 8, 9, 10], [-1, 12, 13, 14]]),
    ("translate_y", 5 / 9, [[4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [-1, -1, -1, -1]]),
    ("translate_y", -5 / 9, [[-1, -1, -1, -1], [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
    ("rotate", 1.0, [[-1, 2, 3, -1], [0, 5, 6, 11], [4, 9, 10, 15], [-1, 12, 13, -1]]),
    ("rotate", -1.0, [[-1, 0, 1, -1], [8, 5, 6, 3], [12, 9, 10, 7], [-1, 14, 15, -1]]),
]


class TestFourByFour:
    @staticmethod
    def act(name, values, level):
        pixels = np.repeat(np.asarray(values, np.uint8)[:, :, None], 3, axis=2)
        return act(name, pixels, level, Image.Resampling.NEAREST)

    @pytest.mark.parametrize(("name", "level", "expected"), BY_HAND)
    def test_values(self, name, level, expected):
        out = self.act(name, GREYS, level)
        for channel in range(3):
            np.testing.assert_array_equal(out[:, :, channel], expected)

    @pytest.mark.parametrize(("name", "level", "expected"), GEOMETRY_BY_HAND)
    def test_places(self, name, level, expected):
        out = self.act(name, GREYS, level)
        read = np.asarray(expected)
        np.testing.assert_array_equal(out[read < 0], np.tile(FILL, ((read < 0).sum(), 1)))
        for channel in range(3):
            np.testing.assert_array_equal(out[read >= 0, channel], 16 * read[read >= 0] + 1)

    @pytest.mark.parametrize(
        ("level", "dot", "near"),
        [(5 / 9, 73, 38), (-5 / 9, 57, 40)],  # 49 + f (65 - 49), 41 + f (39 - 41); f = 1.5, 0.5
    )
    def test_sharpness(self, level, dot, near):
        """Smoothed by (1 1 1; 1 5 1; 1 1 1) / 13 the dot is 49 and what is near it 41."""
        values = np.full((4, 4), 39)
        values[1, 1] = 39 + 26
        expected = np.full((4, 4), 39)  # the rim is left as it is
        expected[1:3, 1:3] = near
        expected[1, 1] = dot
        np.testing.assert_array_equal(self.act("sharpness", values, level)[:, :, 0], expected)

    @pytest.mark.parametrize(
        ("level", "expected"), [(5 / 9, (238, 88, 13)), (-5 / 9, (162, 112, 87))]
    )
    def test_color(self, level, expected):
        """Grey is 59.8 + 58.7 + 5.7, rounded to 124; colours lie 76, -24 and -74 off."""
        pixels = np.tile(np.array((200, 100, 50), np.uint8), (4, 4, 1))
        np.testing.assert_array_equal(act("color", pixels, level), np.tile(expected, (4, 4, 1)))


class TestGeometry:
    @pytest.mark.parametrize(
        ("name", "axis", "sides"), [("translate_x", 1, (9, 20)), ("translate_y", 0, (20, 9))]
    )
    def test_translation_is_a_share_of_the_side(self, name, axis, sides):
        pixels = noise(*sides)
        filled = np.full((*sides, 3), FILL, np.uint8)
        expected = np.moveaxis(filled, axis, 0)  # by 0.45 * 20 * 2 / 3 = 6 pixels
        expected[:-6] = np.moveaxis(pixels, axis, 0)[6:]
        np.testing.assert_array_equal(act(name, pixels, 2 / 3), np.moveaxis(expected, 0, axis))
        back = act(name, pixels[::-1, ::-1], -2 / 3)[::-1, ::-1]
        np.testing.assert_array_equal(back, act(name, pixels, 2 / 3))

    def test_the_longest_translation_is_under_half(self):
        out = act("translate_x", noise(4, 20), 1.0)
        np.testing.assert_array_equal(out[:, :11], noise(4, 20)[:, 9:])
        assert (out[:, 11:] == FILL).all()

    @pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
    @pytest.mark.parametrize("level", [0.9, -0.55])
    def test_rotation_is_of_thirty_degrees_at_most(self, level, resample):
        image = Image.fromarray(noise())
        expected = image.rotate(30 * level, resample, fillcolor=FILL)
        np.testing.assert_array_equal(act("rotate", noise(), level, resample), expected)

    def test_rotation_is_counter_clockwise_where_positive(self):
        pixels = np.zeros((41, 41, 3), np.uint8)
        pixels[18:23, 35:40] = 255  # at the right
        rows, columns = np.nonzero(act("rotate", pixels, 1.0)[:, :, 0] > 200)
        angle = np.degrees(np.arctan2(20 - rows.mean(), columns.mean() - 20))
        assert angle == pytest.approx(30, abs=1.5)

    @pytest.mark.parametrize("level", [1.0, -1.0])
    def test_shear_moves_each_row_by_its_height(self, level):
        """Read at x + 0.3 level (y + 0.5), the middle of the row, to which pixels are nearest."""
        pixels = noise(12, 30)
        out = act("shear_x", pixels, level, Image.Resampling.NEAREST)
        for y in range(12):
            columns = np.floor(np.arange(30) + 0.5 + 0.3 * level * (y + 0.5)).astype(int)
            inside = (columns >= 0) & (columns < 30)
            expected = np.where(inside[:, None], pixels[y, columns.clip(0, 29)], FILL)
            np.testing.assert_array_equal(out[y], expected)

    def test_shears_are_each_other_transposed(self):
        upright = act("shear_y", noise(9, 14).transpose(1, 0, 2), 0.8)
        np.testing.assert_array_equal(upright.transpose(1, 0, 2), act("shear_x", noise(9, 14), 0.8))


@pytest.fixture
def applied(monkeypatch):
    """Return the list that fills with (name, level, resample, fill) of what is applied."""
    calls = []

    def record(name, image, level, *, fill, resample):
        calls.append((str(name), level, resample, fill))
        return image.copy()

    monkeypatch.setattr(augment, "apply_operation", record)
    return calls


class TestDraws:
    def test_the_generator_decides_alone(self):
        transform, image = RandAugment(fill=FILL), noise(20, 20)
        before = image.copy()
        outs = [transform(image, generator(seed)) for seed in range(20)]
        for seed, out in enumerate(outs):
            assert (out.shape, out.dtype) == (image.shape, np.uint8)
            np.testing.assert_array_equal(transform(image, generator(seed)), out)
        assert len({out.tobytes() for out in outs}) > 10
        np.testing.assert_array_equal(image, before)

    def test_mirrored_views_are_taken(self):
        image = noise(20, 20)
        expected = RandAugment()(np.ascontiguousarray(image[:, ::-1]), generator(3))
        np.testing.assert_array_equal(RandAugment()(image[:, ::-1], generator(3)), expected)

    def test_operations_are_equally_likely_and_half_are_applied(self, applied):
        rng, image, rounds = generator(), noise(2, 2), 6000
        per_image = Counter()
        for _ in range(rounds):
            before = len(applied)
            RandAugment()(image, rng)
            per_image[len(applied) - before] += 1
        expected = rounds / 15
        counts = Counter(name for name, *_ in applied)
        assert counts.keys() == set(OPERATIONS)
        assert max(abs(n - expected) for n in counts.values()) < 4.5 * expected**0.5
        for times, share in ((0, 0.25), (1, 0.5), (2, 0.25)):
            assert per_image[times] / rounds == pytest.approx(share, abs=0.025)

    def test_an_operation_may_come_twice(self, applied):
        rng = generator()
        for _ in range(400):
            RandAugment(probability=1.0)(noise(2, 2), rng)
        names = [name for name, *_ in applied]
        twice = sum(a == b for a, b in zip(names[::2], names[1::2], strict=True))
        assert 10 < twice < 50  # 400 / 15 = 27

    def test_magnitudes_scatter_about_nine_and_stop_at_ten(self):
        rng = generator()
        levels = 10 * np.array([RandAugment().level(rng) for _ in range(8000)])
        assert np.abs(levels).max() == 10
        assert (np.abs(levels) == 10).mean() == pytest.approx(0.0228, abs=0.006)  # above 2 sd
        assert np.median(np.abs(levels)) == pytest.approx(9, abs=0.03)
        below = np.quantile(np.abs(levels), 0.1587)
        assert below == pytest.approx(8.5, abs=0.04)  # one sd below
        assert (levels > 0).mean() == pytest.approx(0.5, abs=0.025)

    def test_each_operation_draws_a_level_of_its_own(self, applied):
        rng, draws = generator(), 10_000
        transform = RandAugment(probability=1.0)
        for _ in range(draws // 2):
            transform(noise(2, 2), rng)
        names = np.array([name for name, *_ in applied])
        levels = np.array([level for _, level, *_ in applied])
        magnitudes, signs = np.abs(levels), np.sign(levels)
        for values in (magnitudes, signs):  # of the first and second operation on an image
            assert abs(np.corrcoef(values[::2], values[1::2])[0, 1]) < 4 / (draws / 2) ** 0.5
        assert abs(np.corrcoef(magnitudes, signs)[0, 1]) < 4 / draws**0.5
        for name in OPERATIONS:
            of_name = levels[names == name]
            assert np.abs(of_name).mean() == pytest.approx(0.9 - 0.0004, abs=0.008)  # sd 0.0019
            assert (of_name > 0).mean() == pytest.approx(0.5, abs=0.08)  # sd 0.019

    def test_magnitudes_do_not_fall_below_zero(self):
        rng = generator()
        levels = [abs(RandAugment(magnitude=0.0).level(rng)) for _ in range(1000)]
        assert np.mean(np.equal(levels, 0)) == pytest.approx(0.5, abs=0.06)

    def test_interpolation_is_one_of_those_given(self, applied):
        rng = generator()
        both = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
        for _ in range(400):
            RandAugment(resample=both, fill=FILL)(noise(2, 2), rng)
        kinds = Counter(resample for _, _, resample, _ in applied)
        assert kinds.keys() == set(both)
        assert kinds[both[0]] / kinds.total() == pytest.approx(0.5, abs=0.12)
        assert {fill for *_, fill in applied} == {FILL}
        applied.clear()
        for _ in range(50):
            RandAugment()(noise(2, 2), rng)
        assert {resample for _, _, resample, _ in applied} == {Image.Resampling.BICUBIC}

    @pytest.mark.parametrize("channels", [1, 4])
    def test_other_than_colour_images_are_refused(self, channels):
        with pytest.raises(ConfigError, match=rf"model.channels: expected 3 .* got {channels};"):
            RandAugment()(np.zeros((4, 4, channels), np.uint8), generator())


class TestParse:
    def test_the_recipe_of_mae(self):
        expected = RandAugment(
            magnitude=9, magnitude_std=0.5, count=2, probability=0.5, fill=(124, 116, 104)
        )
        assert parse_rand_augment("rand-m9-mstd0.5-inc1", IMAGENET_MEAN) == expected

    def test_sections_have_the_defaults_of_timm_and_any_order(self):
        found = parse_rand_augment("rand-inc1", (0.0, 0.5, 1.0))
        assert found == RandAugment(10, 0, 2, 0.5, fill=(0, 128, 255))
        found = parse_rand_augment("rand-p0.25-inc1-n3-m5", (0.0, 0.5, 1.0))
        assert found == RandAugment(5, 0, 3, 0.25, fill=(0, 128, 255))

    @pytest.mark.parametrize(
        "text",
        [
            *("", "rand", "m9-inc1", "rand-m9-mstd0.5", "rand-m9-inc0", "rand-m9-mstd0.5-inc"),
            *("original-mstd0.5", "augmix-m9-inc1", "rand-m11-inc1", "rand-m9.5-inc1"),
            *("rand-m9-m8-inc1", "rand-m9-mmax20-inc1", "rand-m9-tweights-inc1"),
            *("rand-m9-mstd101-inc1", "rand-m9-p1.5-inc1", "rand-m9-n2.5-inc1", "rand-m9-inc1-"),
            *("rand-m-1-inc1", "rand-m9-x-inc1", "Rand-m9-inc1"),
        ],
    )
    def test_other_texts_are_refused_by_name(self, text):
        with pytest.raises(ConfigError) as caught:
            parse_rand_augment(text, IMAGENET_MEAN)
        assert "data.rand_augment: expected" in str(caught.value)
        assert str(caught.value).endswith(f"got {text!r}")
        assert "\n" not in str(caught.value)

    def test_a_mean_of_other_channels_is_refused(self):
        with pytest.raises(ConfigError, match=r"data.mean: expected 3 values .* got 1"):
            parse_rand_augment("rand-m9-inc1", (0.5,))
