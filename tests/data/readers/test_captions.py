"""Images with captions: what becomes of an example, and which captions are taken."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from mae_jax import build
from mae_jax.data import loader
from mae_jax.data.readers import captions, images
from mae_jax.data.sources import open_split
from mae_jax.errors import ConfigError

TEXTS = ["a red owl", "two blue owls", "a red moss on a blue stone", ["green", "moss"], None, "  "]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("captions")
    with (root / "captions.jsonl").open("w") as file:
        for number, caption in enumerate(TEXTS * 4):
            pixels = np.full((40, 50, 3), 9 * number, np.uint8)
            Image.fromarray(pixels).save(root / f"{number}.png")
            file.write(json.dumps({"file": f"{number}.png", "caption": caption}) + "\n")
    return root


@pytest.fixture
def config(folder):
    config = ConfigDict({"task": "pretrain", "model": {"vocabulary_size": 100}})
    config.data = {
        "source": "captions",
        "path": str(folder),
        "held_out": 0.25,
        "split": "train",
        "eval_split": "val",
        "vocabulary": "",
        "vocabulary_size": 100,
        "text_length": 5,
        "image_size": (32, 32),
        "channels": 3,
        "augment": "random_resized_crop",
        "crop_scale": (0.2, 1.0),
        "crop_ratio": (1.0, 1.0),
        "flip": True,
        "resample": "pil",
        "crops_per_image": 1,
        "crop_fraction": 1.0,
    }
    return config


@pytest.fixture
def rng():
    return np.random.default_rng(3)


IMAGE = np.zeros((40, 50, 3), np.uint8)


def test_arrays_of_an_example(config, rng):
    read = captions.evaluation(config.data)
    arrays = read({"image": IMAGE, "caption": "a red red owl on a stone", "label": 3}, rng)
    assert {name: (x.shape, str(x.dtype)) for name, x in arrays.items()} == {
        "image": ((32, 32, 3), "uint8"),
        "text": ((5,), "int32"),
        "padding": ((5,), "bool"),
    }
    assert not arrays["padding"].any()  # longer than 5 pieces
    assert read.words.decode(arrays["text"]).startswith("a red red owl")
    assert read.views == 1


def test_the_image_is_that_of_the_reader_of_images(config):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    both = (
        reader.training(config)({"image": image, "caption": "owl"}, np.random.default_rng(7))
        for reader in (captions, images)
    )
    np.testing.assert_array_equal(*(arrays["image"] for arrays in both))


@pytest.mark.parametrize("example", [{}, {"caption": None}, {"caption": ""}, {"caption": [" "]}])
def test_without_a_caption_all_is_padding(config, rng, example):
    for read in (captions.training(config), captions.evaluation(config.data)):
        arrays = read({"image": IMAGE, **example}, rng)
        assert arrays["padding"].all()
        assert not arrays["text"].any()


def test_of_several_captions_training_draws_and_evaluation_takes_the_first(config, rng):
    example = {"image": IMAGE, "caption": ("", "red", "blue", "moss")}

    def counts(read):
        found = [read({**example}, rng) for _ in range(300)]
        texts = [read.words.decode(x["text"][~x["padding"]]) for x in found]
        return {text: texts.count(text) for text in set(texts)}

    assert counts(captions.evaluation(config.data)) == {"red": 300}
    drawn = counts(captions.training(config))
    assert drawn.keys() == {"red", "blue", "moss"}
    assert min(drawn.values()) > 70


def test_batches_of_a_source_hold_words_and_workers_can_make_them(config):
    read = pickle.loads(pickle.dumps(captions.training(config)))
    source = open_split(config.data, "train")
    batch = next(loader.train_batches(source, read, batch_size=18, seed=0))
    assert batch["text"].shape == batch["padding"].shape == (18, 5)
    assert batch["text"].dtype == np.int32
    assert batch["padding"].dtype == bool
    for index, text, padding in zip(batch["index"], batch["text"], batch["padding"], strict=True):
        true = source[int(index)]["caption"]
        assert padding.all() == (not true)
        if len(true) == 1:
            assert true[0].startswith(read.words.decode(text[~padding]))


def test_a_model_with_fewer_words_is_refused(config):
    config.model.vocabulary_size = 20
    with pytest.raises(ConfigError, match=r"model.vocabulary_size: expected at least \d\d, .* 20"):
        captions.training(config)


def test_what_is_kept_makes_the_reader_without_the_captions(config):
    read = captions.evaluation(config.data)
    kept = json.loads(json.dumps(read.kept))  # as a checkpoint keeps it
    config.data.update({**kept, "path": "/nowhere"})
    assert captions.evaluation(config.data) == read


class TestTextsWithoutAnImage:
    @pytest.fixture
    def unpaired(self, config, tmp_path):
        path = tmp_path / "texts.txt"
        path.write_text("red owl\nblue\nmoss on a stone\n")
        config.model.unpaired_loss_weight = 0.5
        config.data.update({"unpaired_text": str(path), "unpaired_text_length": 3})
        return config

    def test_each_example_gets_one_at_random(self, unpaired, rng):
        for read in (captions.training(unpaired), captions.evaluation(unpaired.data)):
            found = set()
            for _ in range(50):
                arrays = read({"image": IMAGE, "caption": "owl"}, rng)
                ids, padding = arrays["unpaired_text"], arrays["unpaired_padding"]
                assert (ids.shape, ids.dtype, padding.dtype) == ((3,), np.int32, np.bool_)
                assert read.words.decode(arrays["text"][~arrays["padding"]]) == "owl"
                found.add(read.words.decode(ids[~padding]))
            assert "blue" in found
            assert len(found) == 3

    def test_the_rest_is_as_it_is_without_them(self, unpaired):
        example = {"image": np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)}
        with_texts = captions.training(unpaired)(example, np.random.default_rng(1))
        unpaired.data.unpaired_text, unpaired.model.unpaired_loss_weight = "", 0.0
        without = captions.training(unpaired)(example, np.random.default_rng(1))
        assert with_texts.keys() - without.keys() == {"unpaired_text", "unpaired_padding"}
        for name, array in without.items():
            np.testing.assert_array_equal(with_texts[name], array)

    def test_other_ones_are_other_data_and_none_change_nothing(self, unpaired):
        class Source:
            def fingerprint(self) -> str:
                return "images"

        def fingerprint() -> str:
            return build.data_fingerprint(Source(), captions.training(unpaired))

        path = Path(unpaired.data.unpaired_text)
        content = path.read_text()
        first = fingerprint()
        found = {first}
        for changed in (content + "more\n", content.replace("blue\n", "")):
            path.write_text(changed)
            found.add(fingerprint())
        assert len(found) == 3
        path.rename(path.with_name("elsewhere.txt"))
        path.with_name("elsewhere.txt").write_text(content)
        unpaired.data.unpaired_text = str(path.with_name("elsewhere.txt"))
        assert fingerprint() == first
        unpaired.data.unpaired_text, unpaired.model.unpaired_loss_weight = "", 0.0
        assert fingerprint() == "images"
        images_alone = images.evaluation(unpaired.data)
        assert build.data_fingerprint(Source(), images_alone) == "images"

    @pytest.mark.parametrize("fields", [{"weight": 0.0}, {"path": ""}])
    def test_a_file_without_a_weight_or_a_weight_without_a_file_is_refused(self, unpaired, fields):
        unpaired.model.unpaired_loss_weight = fields.get("weight", 0.5)
        unpaired.data.unpaired_text = fields.get("path", unpaired.data.unpaired_text)
        with pytest.raises(ConfigError, match=r"^model.unpaired_loss_weight, data.unpaired_text"):
            captions.training(unpaired)
