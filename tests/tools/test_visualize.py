"""Drawing what a model makes of one's own photographs, from the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_jax.tasks.pictures import GAP
from mae_jax.tools import visualize
from tests.checkpoints import tiny_config, write_checkpoint

SIDE = 28 * 4  # as images of 28 pixels are shown
HIDDEN = 128


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("runs") / "tiny", tiny_config())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder of three grey images, the second of them turned, and one that is none."""
    folder = tmp_path_factory.mktemp("images")
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(3):
        upright = image(number)
        turned = upright.rotate(90, expand=True)
        kept, more = (turned, {"exif": exif}) if number == 1 else (upright, {})
        kept.save(folder / f"{number}.png", **more)
    (folder / "1_bad.jpg").write_bytes(b"nothing")
    return folder


def image(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 120, (42, 28), dtype=np.uint8)
    return Image.fromarray(pixels)


def draw(workdir: Path, out: Path, *flags: object) -> np.ndarray:
    argv = [f"--checkpoint={workdir}", f"--out={out}", *map(str, flags)]
    assert visualize.main(argv) == 0
    return np.asarray(Image.open(out))


def cells(picture: np.ndarray, rows: int) -> np.ndarray:
    """Return the images of a picture at their own size, [columns, rows, 28, 28]."""
    step = SIDE + GAP
    columns = (picture.shape[1] - GAP) // step
    assert picture.shape[1] == GAP + columns * step
    below = picture[picture.shape[0] - rows * step :]
    return np.stack(
        [
            [
                below[row * step : row * step + SIDE : 4, GAP + column * step :][:, :SIDE:4, 0]
                for row in range(rows)
            ]
            for column in range(columns)
        ]
    )


def hidden(masked: np.ndarray) -> np.ndarray:
    """Return which of 7 x 7 patches are grey, for images darker than that."""
    return (masked.reshape(*masked.shape[:-2], 7, 4, 7, 4) == HIDDEN).all(axis=(-3, -1))


def test_one_mask_gives_the_columns_of_a_run(workdir, folder, tmp_path, capsys):
    picture = draw(workdir, tmp_path / "deep" / "a.png", f"--images={folder}")
    said = capsys.readouterr()
    assert said.out == f"{tmp_path}/deep/a.png: 3 image(s), 1 mask(s), step 3\n"
    assert said.err == f"left out: {folder}/1_bad.jpg: not an image of a kind that Pillow knows\n"
    masked, reconstruction, pasted, original = cells(picture, rows=3)
    for number, shown in enumerate(original):  # turned upright, and the centre cut out
        np.testing.assert_array_equal(shown, np.asarray(image(number))[7:35])
    unseen = hidden(masked)
    assert unseen.sum(axis=(1, 2)).tolist() == [37, 37, 37]  # of 49
    unseen = unseen.repeat(4, axis=1).repeat(4, axis=2)
    np.testing.assert_array_equal(pasted, np.where(unseen, reconstruction, original))
    assert (reconstruction != original).any()


def test_the_same_command_gives_the_same_bytes_and_another_seed_others(workdir, folder, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        draw(workdir, tmp_path / f"{name}.png", f"--images={folder}", f"--seed={seed}")
    first, again, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert first == again
    assert first != other


def test_masks_stand_side_by_side(workdir, folder, tmp_path, capsys):
    mask = np.zeros((7, 7), np.uint8)
    mask[:, :5] = mask[:2, 5] = 1  # 37, as of the others: one program draws all
    np.save(tmp_path / "left.npy", mask)
    flags = [f"--images={folder}", "--limit=2", f"--mask=random,grid,{tmp_path}/left.npy"]
    shown = cells(draw(workdir, tmp_path / "a.png", *flags, "--mask_ratio=0.75"), rows=2)
    assert "the first 2 images; --limit=N takes more\n" in capsys.readouterr().out
    original, by_chance, _, by_grid, pasted, left, _ = shown
    for number, seen in enumerate(original):
        np.testing.assert_array_equal(seen, np.asarray(image(number))[7:35])
    assert hidden(by_chance).sum(axis=(1, 2)).tolist() == [37, 37]
    grid = hidden(by_grid)
    assert grid.sum(axis=(1, 2)).tolist() == [37, 37]
    assert (grid[:, 1:] | grid[:, :-1]).all()  # no two that are seen touch
    np.testing.assert_array_equal(hidden(left), np.stack([mask, mask]))
    seen = ~grid.repeat(4, axis=1).repeat(4, axis=2)
    np.testing.assert_array_equal(pasted[seen], original[seen])
    assert (pasted[~seen] != original[~seen]).any()


def test_masks_of_one_name_in_two_folders_are_both_drawn(workdir, folder, tmp_path):
    mask = np.arange(49).reshape(7, 7) < 37
    for name, array in (("one", mask), ("two", mask[::-1])):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "mask.npy", array)
    paths = f"{tmp_path}/one/mask.npy,{tmp_path}/two/mask.npy"
    flags = [f"--images={folder}/0.png", f"--mask={paths}"]
    shown = cells(draw(workdir, tmp_path / "a.png", *flags), rows=1)
    np.testing.assert_array_equal(hidden(shown[1::2, 0]), np.stack([mask, mask[::-1]]))


def test_every_ratio_is_drawn_with_every_seed_and_none_twice(workdir, folder, tmp_path):
    flags = ["--mask_ratio=0.75,0.5", "--seed=1,2,1", f"--images={folder}/0.png", "--mask=random"]
    shown = cells(draw(workdir, tmp_path / "a.png", *flags), rows=1)
    masks = hidden(shown[1::2, 0])
    assert masks.sum(axis=(1, 2)).tolist() == [37, 37, 25, 25]
    assert len(np.unique(masks, axis=0)) == 4


def test_files_may_be_given_in_several_ways(workdir, folder, tmp_path, capsys, monkeypatch):
    first, second = folder / "0.png", folder / "2.png"
    monkeypatch.chdir(tmp_path)
    for words in (
        [f"--images={first},{second}"],
        [f"--images={first}", f"--images={second}"],
        ["--images", first, second],
        [f"--images={first}", "--seed=0", second],
        [f"--images={folder}/[02].png"],
    ):
        assert visualize.main([f"--checkpoint={workdir}", *map(str, words)]) == 0
        assert capsys.readouterr().out == "visualize.png: 2 image(s), 1 mask(s), step 3\n"
        original = cells(np.asarray(Image.open("visualize.png")), rows=2)[-1]
        for number, shown in zip((0, 2), original, strict=True):
            np.testing.assert_array_equal(shown, np.asarray(image(number))[7:35])


def test_the_average_is_drawn_and_said_to_be(folder, tmp_path, capsys):
    averaged = write_checkpoint(tmp_path / "run", tiny_config(), averaged=True)
    draw(averaged, tmp_path / "a.png", f"--images={folder}/0.png")
    assert capsys.readouterr().out.endswith("step 3, averaged weights\n")


def refusal(capsys, argv):
    """Run, expect status 2, and return the last line."""
    assert visualize.main([str(argument) for argument in argv]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    return last


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--images=x"], "--checkpoint: expected a folder, got nothing"),
        (["--checkpoint=x"], "--images: expected a folder or files, got nothing"),
        (["--chekpoint=x"], "--chekpoint: there is no such flag; did you mean --checkpoint?"),
        (["--mask_ratios=0.5"], "did you mean --mask_ratio?"),
        (["--mask_ratio=0.5,much"], "expected float, or several with commas between"),
        (["--seed=1.5"], "expected int, or several with commas between, got '1.5'"),
        (["--checkpoint=x", "--images=x", "--seed=-1"], "--seed: expected numbers from 0 to"),
        (["--checkpoint=x", "--images=x", "--limit=0"], "--limit=0: expected at least 1"),
        (["--checkpoint=x", "--images=x", "--out=a.gif"], "expected a name that ends in .png"),
        (["--checkpoint=/no/such", "--images=x"], "/no/such: expected the folder of a run"),
    ],
)
def test_a_wrong_flag_is_refused(capsys, argv, message):
    assert message in refusal(capsys, argv)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--mask=blok",
            "--mask: blok 75% seed 0: model.mask_sampling 'blok' is not one of random,",
        ),
        ("--mask=/no/such.png", "--mask=/no/such.png: expected an image or a .npy array, No such"),
        ("--mask_ratio=1.5", "mask_ratio 1.5 keeps -24 of 49 units"),
        ("--out=/dev/null/a.png", "--out=/dev/null/a.png: "),
    ],
)
def test_what_does_not_fit_is_refused(
    workdir, folder, tmp_path, monkeypatch, capsys, flag, message
):
    monkeypatch.chdir(tmp_path)
    argv = [f"--checkpoint={workdir}", f"--images={folder}/0.png", flag]
    assert message in refusal(capsys, argv)
    assert not list(tmp_path.iterdir())


def test_images_that_are_all_bad_are_an_error(workdir, folder, tmp_path, capsys):
    argv = [f"--checkpoint={workdir}", f"--images={folder}/1_bad.jpg,/no/such/*.jpg"]
    assert "got 2 file(s) and none can be read" in refusal(capsys, argv)
    (tmp_path / "empty").mkdir()
    argv = [f"--checkpoint={workdir}", f"--images={tmp_path}/empty"]
    assert "got 0 file(s)" in refusal(capsys, argv)
