"""What `bench data` measures, and on what; how fast it is, no test says."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from mae_jax.errors import ConfigError
from mae_jax.tools import bench, corpus, data_times

IMAGES = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("corpus")


def flags(made, *more):
    given = [f"--corpus={made}", f"--images={IMAGES}", "--repeats=1", "--crops=2", "--threads=1"]
    return bench.parse(["data", *given, *more])[1]


def test_every_contender_has_its_figures_and_its_pixels_are_pillows_or_near(made, tmp_path, capsys):
    rows = {
        row["contender"]: row for row in data_times.run(flags(made, f"--json={tmp_path / 'rows'}"))
    }
    names = [name for name in rows if not name.startswith("loader")]
    assert names == [
        "decoding alone, the floor",
        "Pillow, as torchvision",
        "training, data.resample=pil",
        "training, data.resample=fast",
        "data.crops_per_image=2",
        "evaluation",
        "Pillow's evaluation, as torchvision",
    ]
    for row in rows.values():
        assert row["images_per_cpu_second"] > 0
        assert row["over_pillow"] > 0
        assert row["images"] == IMAGES
    assert rows[data_times.PILLOW]["over_pillow"] == 1
    # The same boxes: with others these would be 10 to 20 dB.
    assert rows["training, data.resample=pil"]["psnr_least"] == "same pixels"
    assert rows["evaluation"]["psnr_least"] == "same pixels"
    fast = rows["training, data.resample=fast"]
    assert fast["psnr_mean"] == "same pixels" or fast["psnr_mean"] > 40  # without OpenCV: Pillow
    one = rows["loader, 1 core"]
    assert one["images_per_second"] > 0
    assert one["over_one_core"] is None
    lines = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [line["contender"] for line in lines] == list(rows)
    assert all("processor" in line for line in lines)
    said = capsys.readouterr().out
    assert f"{IMAGES} images, " in said
    assert said.count("\n| ") == len(rows) + 2


def test_crops_are_counted_and_ratios_are_those_of_a_round(monkeypatch):
    # Warm-up, then 1 and 2 seconds, 2 and 8, 4 and 6; in the middle round the second begins.
    turns = iter([1, 1, 1.0, 2.0, 8.0, 2.0, 4.0, 6.0])
    monkeypatch.setattr(data_times, "_seconds", lambda contender, encoded: next(turns))
    first = data_times.Contender(data_times.PILLOW, lambda data, rng: None)
    second = data_times.Contender("4 crops", lambda data, rng: None, rows=4)
    rows = data_times.measure([first, second], [b""] * 12, repeats=3)
    assert [row["images_per_cpu_second"] for row in rows] == [12 / 2, 4 * 12 / 6]
    assert [row["over_pillow"] for row in rows] == [1, pytest.approx(4 / 2)]


def test_the_corpus_is_of_imagenets_kind_and_the_same_anywhere(made, tmp_path):
    path = corpus.make(str(made), IMAGES)
    more = corpus.make(str(tmp_path), 2 * IMAGES)
    sizes = []
    for number in range(2 * IMAGES):
        with Image.open(f"{more}/{number:06d}.jpg") as image:
            sizes.append(image.size)
            assert JpegImagePlugin.get_sampling(image) == 2  # 4:2:0
            assert np.asarray(image).std() > 10
    assert set(sizes) == {(500, 375), (375, 500)}
    assert sizes.count((500, 375)) > IMAGES
    for number in range(IMAGES):
        name = f"{number:06d}.jpg"
        with open(f"{path}/{name}", "rb") as one, open(f"{more}/{name}", "rb") as other:
            assert one.read() == other.read()
    assert corpus.make(str(made), IMAGES) == path  # made once


def test_psnr_by_hand():
    black, grey = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 51, np.uint8)
    assert data_times.psnr(black, grey) == pytest.approx(20 * math.log10(5))
    assert data_times.psnr(grey, black) == pytest.approx(20 * math.log10(5))
    assert data_times.psnr(grey, grey) == math.inf


def test_what_cannot_be_is_refused_in_one_line(made, tmp_path):
    with pytest.raises(ConfigError, match=r"^--threads=-1: expected at least 0$"):
        data_times.run(flags(made, "--threads=-1"))
    with pytest.raises(ConfigError, match=r"^--path: .* got nothing at /nowhere$"):
        data_times.run(flags(made, "--path=/nowhere"))
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"^--path: expected JPEGs that can be decoded, got "):
        data_times.run(flags(made, f"--path={tmp_path}"))
