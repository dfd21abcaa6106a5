"""Pictures: colours, geometry and captions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import ImageFont

from mae_jax.tasks import pictures
from mae_jax.tasks.pictures import FONT_SIZE, GAP, grid, to_uint8

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


def normalised(pixels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    return ((pixels / 255.0 - mean) / std).astype(np.float32)


def draw(channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (2, 5, 6, channels), dtype=np.uint8)


def test_a_clip_is_a_strip_of_frames_and_a_film():
    clips = np.random.default_rng(0).integers(0, 256, (2, 12, 120, 112, 3), dtype=np.uint8)
    still, film = pictures.draw({"masked": clips, "original": 255 - clips})
    step = 112 + GAP
    assert still.shape[1] == GAP + 8 * step  # of 12 frames, 8: 0, 1, 3, 4, ...
    assert still.shape[0] == 4 * (FONT_SIZE + 3 + GAP + 120 + GAP)
    band = FONT_SIZE + 3 + GAP + 120 + GAP
    for row, clip in enumerate((clips[0], 255 - clips[0], clips[1], 255 - clips[1])):
        top = row * band + FONT_SIZE + 3 + GAP
        for column, frame in enumerate((0, 1, 3, 4, 6, 7, 9, 10)):
            left = GAP + column * step
            shown = still[top : top + 120, left : left + 112]
            np.testing.assert_array_equal(shown, clip[frame])
    assert len(film) == 12
    expected = grid({"masked": clips[:, 5], "original": 255 - clips[:, 5]})
    np.testing.assert_array_equal(film[5], expected)


def test_every_colour_survives_normalisation_and_back():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    out = to_uint8(normalised(pixels, MEAN, STD), MEAN, STD)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, pixels)


def test_colours_beyond_the_range_are_cut_and_not_wrapped():
    images = np.array([-9.0, 9.0, 0.0], np.float32).reshape(1, 1, 3, 1).repeat(3, axis=3)
    out = to_uint8(images, (0.5,) * 3, (0.5,) * 3)
    assert out[0, 0, :, 0].tolist() == [0, 255, 128]


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (4, [0, 1, 2])])
def test_other_numbers_of_channels_are_shown_in_three(channels, shown):
    pixels = draw(channels)
    mean, std = (MEAN * 2)[:channels], (STD * 2)[:channels]
    out = to_uint8(normalised(pixels, mean, std), mean, std)
    assert out.shape == (2, 5, 6, 3)
    np.testing.assert_array_equal(out, pixels[..., shown])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_hidden_pixels_are_grey_and_the_others_as_they_were(channels):
    pixels = draw(channels)
    mean, std = (MEAN * 2)[:channels], (STD * 2)[:channels]
    hidden = np.zeros((2, 5, 6, 1), np.float32)
    hidden[0, :3] = 1.0
    hidden[0, 3:] = 2.0  # hidden in another way
    images = normalised(pixels, mean, std)
    out = to_uint8(images, mean, std, hidden)
    assert out.dtype == np.uint8
    assert (out[0, :3] == 128).all()
    plain = to_uint8(images, mean, std)
    assert (out[0, 3:] == 48).all()
    np.testing.assert_array_equal(out[1], plain[1])


def cells(
    picture: np.ndarray, columns: int, rows: int, height: int, width: int
) -> list[list[np.ndarray]]:
    """Cut a picture into its images, column by column, from the lower right corner."""
    top = picture.shape[0] - rows * (height + GAP)
    return [
        [
            picture[
                top + row * (height + GAP) : top + row * (height + GAP) + height,
                GAP + column * (width + GAP) : GAP + column * (width + GAP) + width,
            ]
            for row in range(rows)
        ]
        for column in range(columns)
    ]


@pytest.mark.parametrize(
    ("size", "factor"),
    [
        ((112, 112), 1),
        ((224, 224), 1),
        ((111, 200), 2),
        ((28, 28), 4),
        ((32, 40), 4),
        ((1, 3), 112),
    ],
)
def test_small_images_are_enlarged_by_whole_pixels(size, factor):
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (2, *size, 3), dtype=np.uint8) for name in ("a", "b", "c")}
    picture = grid(images)
    height, width = size[0] * factor, size[1] * factor
    caption = GAP + FONT_SIZE + 3
    assert picture.dtype == np.uint8
    assert picture.shape == (caption + 2 * (height + GAP), GAP + 3 * (width + GAP), 3)
    shown = cells(picture, columns=3, rows=2, height=height, width=width)
    for column, name in zip(shown, images, strict=True):
        for cell, image in zip(column, images[name], strict=True):
            np.testing.assert_array_equal(cell[::factor, ::factor], image)
            np.testing.assert_array_equal(cell[factor - 1 :: factor, factor - 1 :: factor], image)


def test_gaps_are_white_and_captions_are_written_above_their_column():
    picture = grid({name: np.zeros((2, 112, 112, 3), np.uint8) for name in ("left", "", "right")})
    top = picture.shape[0] - 2 * (112 + GAP)
    assert (picture[:, :GAP] == 255).all()
    assert (picture[:, -GAP:] == 255).all()
    assert (picture[-GAP:] == 255).all()
    assert (picture[top + 112 : top + 112 + GAP] == 255).all()
    for column, written in enumerate((True, False, True)):
        left = GAP + column * (112 + GAP)
        above = picture[:top, left : left + 112]
        assert (above < 100).any() == written
        assert (picture[top:, left + 112 : left + 112 + GAP] == 255).all()


def test_long_captions_are_broken_at_spaces_and_make_room_for_the_longest():
    text = "reconstruction (true patch mean and std)"
    image = np.zeros((1, 112, 112, 3), np.uint8)
    font = ImageFont.load_default(FONT_SIZE)
    lines = pictures._wrap(text, font, 112)
    assert len(lines) > 1
    assert " ".join(lines) == text
    assert all(font.getlength(line) <= 112 for line in lines)
    # As few as possible: each line is full.
    for line, following in itertools.pairwise(lines):
        assert font.getlength(f"{line} {following.split(' ')[0]}") > 112
    picture = grid({"short": image, text: image})
    assert picture.shape[0] == GAP + len(lines) * (FONT_SIZE + 3) + 112 + GAP


def test_word_wider_than_its_column_stands_alone():
    font = ImageFont.load_default(FONT_SIZE)
    assert pictures._wrap("a reconstruction b", font, 20) == ["a", "reconstruction", "b"]
