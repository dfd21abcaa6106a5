"""Which files words stand for, and masks out of files."""

from __future__ import annotations

import types

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from mae_jax.data.sources import folder
from mae_jax.errors import ConfigError
from mae_jax.tools import comparison


def test_a_folder_stands_for_its_images_in_order(tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt", ".hidden.png", "sub/c.webp", ".cache/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = list(comparison.image_paths([str(tmp_path)]))
    assert found == [str(tmp_path / name) for name in ("a.JPG", "b.png", "sub/c.webp")]


def test_links_are_followed_but_not_back(tmp_path):
    images, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for root in (images, elsewhere):
        root.mkdir()
        (root / "a.png").touch()
    (images / "0_linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(images)
    (images / "lost.png").symlink_to(tmp_path / "nothing")
    found = list(comparison.image_paths([str(images)]))
    assert found == [str(images / name) for name in ("a.png", "0_linked/a.png")]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folder.os, "scandir", refuse)
    message = f"^--images: expected a readable folder, got Permission denied at {tmp_path}"
    with pytest.raises(ConfigError, match=message):
        list(comparison.image_paths([str(tmp_path)]))


def test_a_name_with_a_comma_or_a_bracket_is_one_file(tmp_path):
    for name in ("a,b.png", "c[1].png"):
        (tmp_path / name).touch()
        path = str(tmp_path / name)
        assert list(comparison.image_paths([path])) == [path]
    assert list(comparison.image_paths(["a.png,b.png"])) == ["a.png", "b.png"]


def test_a_folder_is_not_read_to_its_end(tmp_path, monkeypatch):
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "a.png").touch()
    paths = comparison.image_paths([str(tmp_path)])
    assert next(paths) == str(tmp_path / "0" / "a.png")
    (tmp_path / "2" / "b.png").touch()  # not looked at yet
    assert len(list(paths)) == 3


def test_a_patch_is_hidden_if_half_of_it_is_white(tmp_path):
    # Patches of 4 x 4 pixels on a grid of 2 x 3: 0, 7, 8, 16 white pixels; nearly white; grey.
    mask = np.zeros((8, 12), np.uint8)
    mask[:4, 4:8].flat[:7] = 255
    mask[:4, 8:].flat[:8] = 255
    mask[4:, :4] = 255
    mask[4:, 4:8] = 128
    mask[4:, 8:] = 127
    expected = [[0, 0, 1], [1, 1, 0]]
    for name in ("mask.png", "colour.png"):
        image = Image.fromarray(mask)
        (image if name == "mask.png" else image.convert("RGB")).save(tmp_path / name)
        assert comparison.read_mask(str(tmp_path / name), (2, 3)).tolist() == expected


def test_a_coarse_mask_covers_whole_patches(tmp_path):
    Image.fromarray(np.array([[255, 0]], np.uint8)).save(tmp_path / "left.png")
    mask = comparison.read_mask(str(tmp_path / "left.png"), (4, 6))
    assert mask.tolist() == [[1, 1, 1, 0, 0, 0]] * 4


@pytest.mark.parametrize(
    ("trained", "ratios", "caption"),
    [
        ({"mask_ratio": 0.75, "mask_sampling": "block"}, None, "block 75% seed 3"),
        ({"mask_ratio": 0.75}, [0.5], "random 50% seed 3"),
        ({}, None, "random seed 3"),  # of UM-MAE
    ],
)
def test_what_is_not_asked_for_is_as_in_training(trained, ratios, caption):
    model = types.SimpleNamespace(config=ConfigDict({"model": trained}))
    (variant,) = comparison.variants(model, None, ratios, [3])
    assert variant.caption == caption
    ratio = None if ratios is None else ratios[0]
    assert variant.fields == {"sampling": None, "mask_ratio": ratio, "seed": 3}


def test_a_mask_hides_the_same_places_in_all_time_slots_of_a_clip(tmp_path):
    Image.fromarray(np.array([[255, 0]], np.uint8)).save(tmp_path / "left.png")
    mask = comparison.read_mask(str(tmp_path / "left.png"), (3, 1, 2))
    assert mask.tolist() == [[[1, 0]]] * 3


def test_an_array_is_taken_as_it_is(tmp_path):
    np.save(tmp_path / "mask.npy", np.eye(3, dtype=bool))
    mask = comparison.read_mask(str(tmp_path / "mask.npy"), (3, 3))
    np.testing.assert_array_equal(mask, np.eye(3))


@pytest.mark.parametrize("name", ["a.png", "a.npy", "pickled.npy", "words.npy", "empty.npy"])
def test_a_file_that_holds_no_mask_is_refused_by_name(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"" if name == "empty.npy" else b"nothing")
    if name == "pickled.npy":
        np.save(path, np.array([{}], object))
    if name == "words.npy":
        np.save(path, np.array(["hide", "show"]))
    with pytest.raises(ConfigError, match=rf"--mask={path}: expected an image or a .npy array, "):
        comparison.read_mask(str(path), (2, 2))
