"""Clips of films, from files to rows of a batch."""

import logging
import pickle

import numpy as np
import pytest
from ml_collections import ConfigDict

pytest.importorskip("av")

from mae_jax.data import loader, video
from mae_jax.data.readers import clips
from mae_jax.data.sources.clips import Films
from mae_jax.errors import ConfigError
from tests import films

COUNTS = (30, 12, 40, 7, 25, 33)  # frames of the films


def config(task="pretrain", **fields):
    data = {
        "frames": 4,
        "stride": 3,
        "sampling": "dense",
        "image_size": (16, 16),
        "channels": 3,
        "augment": "multi_scale_crop",
        "crop_scale": (0.5, 1.0),
        "crop_ratio": (0.75, 1.33),
        "flip": False,
        "crops_per_image": 1,
        "rand_augment": "",
        "test_clips": 1,
        "test_crops": 1,
    }
    return ConfigDict({"task": task, "data": {**data, **fields}})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    names = [f"{number}.mp4" for number in range(len(COUNTS))]
    for name, count in zip(names, COUNTS, strict=True):
        films.write(folder / name, count)
    return Films(str(folder), names, list(range(len(names))), len(names), ())


def train(source, batches=1, fields=None, **options):
    options = {"batch_size": 4, "seed": 7, "threads": 0, **options}
    stream = loader.train_batches(source, clips.training(config(**(fields or {}))), **options)
    taken = [next(stream) for _ in range(batches)]
    stream.close()
    return taken


class TestTraining:
    def test_a_clip_has_every_third_frame_of_its_film(self, source):
        for batch in train(source, 6):
            assert batch["image"].shape == (4, 4, 16, 16, 3)
            assert batch["image"].dtype == np.uint8
            for clip, index in zip(films.numbers(batch["image"]), batch["index"], strict=True):
                assert clip.max() < COUNTS[index]
                expected = clip[0] + 3 * np.arange(4)
                if COUNTS[index] < 12:  # too short
                    expected = np.array([0, 3, 6, 6])
                np.testing.assert_array_equal(clip, expected)

    def test_starts_differ(self, source):
        starts = {int(films.numbers(b["image"])[i, 0]) for b in train(source, 6) for i in range(4)}
        assert len(starts) > 5

    def test_uniform_clips_take_one_frame_of_each_segment(self, source):
        for batch in train(source, 6, {"sampling": "uniform"}):
            for clip, index in zip(films.numbers(batch["image"]), batch["index"], strict=True):
                assert (clip // (COUNTS[index] // 4)).tolist() == [0, 1, 2, 3]

    def test_crops_are_rows_beside_each_other_of_one_decoded_clip(self, source, monkeypatch):
        once, decoded = video.read_frames, []

        def read_frames(*args):
            decoded.append(args[0])
            return once(*args)

        monkeypatch.setattr(clips, "read_frames", read_frames)
        (batch,) = train(noisy(), 1, {"crops_per_image": 3, "task": "finetune"})
        image = batch["image"].reshape(4, 3, 4, 16, 16, 3)
        assert len(decoded) == 4
        for name in ("label", "index"):
            assert (batch[name].reshape(4, 3) == batch[name][::3, None]).all()
        means = image.astype(float).mean((3, 4, 5))  # of frames: each film has a brightness
        assert (np.ptp(means, axis=(1, 2)) < 40).all()
        assert (np.ptp(means[:, 0, 0]) > 40).all()
        for views in image:
            assert len(np.unique(views.reshape(3, -1), axis=0)) == 3  # each cropped by itself

    def test_threads_do_not_change_them(self, source):
        fields = {"crops_per_image": 2, "augment": "random_resized_crop", "flip": True}
        for one, other in zip(
            train(source, 4, fields), train(source, 4, fields, threads=4), strict=True
        ):
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])

    @pytest.mark.slow
    def test_worker_processes_do_not_change_them(self, source):
        for one, other in zip(train(source, 4), train(source, 4, workers=2), strict=True):
            np.testing.assert_array_equal(one["image"], other["image"])

    def test_rand_augment_is_of_fine_tuning_alone_and_comes_before_the_crop(self):
        fields = {"rand_augment": "rand-m7-n4-mstd0.5-inc1", "flip": True}
        steps = clips.training(config("finetune", **fields)).transform.transform.steps
        assert [type(step).__name__ for step in steps] == [
            "RandAugment",
            "MultiScaleCrop",
            "HorizontalFlip",
        ]
        assert (steps[0].magnitude, steps[0].count, steps[0].fill) == (7, 4, (128, 128, 128))
        steps = clips.training(config("pretrain", **fields)).transform.transform.steps
        assert [type(step).__name__ for step in steps] == ["MultiScaleCrop", "HorizontalFlip"]

    def test_without_augmentation_the_crop_is_that_of_evaluation(self):
        fields = {"augment": "none", "frames": 5, "stride": 1}
        example = {"video": films.noise(5), "label": 0}
        (seen,) = clips.training(config(**fields))(example, np.random.default_rng(0)).values()
        (expected,) = clips.evaluation(config(**fields).data)(
            example, np.random.default_rng(1)
        ).values()
        np.testing.assert_array_equal(seen, expected)

    def test_readers_can_be_sent_to_workers(self):
        for reader in (clips.training(config()), clips.evaluation(config().data)):
            assert pickle.loads(pickle.dumps(reader)) is not None


def noisy():
    """Return films in memory, 6 of noise of a brightness of their own, 20 frames each."""

    class Memory:
        num_classes, exif = 6, False

        def __len__(self):
            return 6

        def __getitem__(self, index):
            return {"video": films.noise(20) // 8 + 40 * index, "label": index}

        def describe(self, index):
            return f"film {index}"

    return Memory()


class TestEvaluation:
    def batches(self, source, **fields):
        reader = clips.evaluation(config(**fields).data)
        return list(loader.eval_batches(source, reader, batch_size=4))

    def test_clips_and_crops_of_a_film_are_rows_beside_each_other(self, source):
        batches = self.batches(source, test_clips=2, test_crops=3)
        assert [b["image"].shape for b in batches] == [(24, 4, 16, 16, 3)] * 2
        label = np.concatenate([b["label"] for b in batches]).reshape(8, 6)
        np.testing.assert_array_equal(label, [[i % 6] * 6 for i in range(8)])
        weight = np.concatenate([b["weight"] for b in batches]).reshape(8, 6)
        np.testing.assert_array_equal(weight, [[float(i < 6)] * 6 for i in range(8)])
        first = films.numbers(batches[0]["image"])[:6].reshape(2, 3, 4)
        # Of 30 frames, 10 are every third; a clip of 4 starts at the first or the seventh of them.
        assert first.tolist() == [[[0, 3, 6, 9]] * 3, [[18, 21, 24, 27]] * 3]

    def test_crops_go_along_the_longer_side(self):
        ramp = np.broadcast_to(
            np.arange(0, 192, 4, dtype=np.uint8)[None, None, :, None], (9, 16, 48, 3)
        )
        reader = clips.evaluation(config(test_crops=3).data)
        assert reader.views == 3
        image = reader({"video": ramp, "label": 0}, np.random.default_rng(0))["image"]
        assert image.shape == (3, 4, 16, 16, 3)
        np.testing.assert_array_equal(image[:, 0, 0, 0, 0], [0, 64, 128])

    def test_one_clip_of_one_crop_is_the_middle(self, source):
        (first, _) = self.batches(source)
        assert films.numbers(first["image"])[0].tolist() == [9, 12, 15, 18]
        (first, _) = self.batches(source, sampling="uniform")
        assert films.numbers(first["image"])[0].tolist() == [3, 11, 18, 26]

    def test_grey_clips_have_one_channel(self, source):
        (first, _) = self.batches(source, channels=1)
        assert first["image"].shape == (4, 4, 16, 16, 1)


def test_films_that_cannot_be_read_are_replaced_by_the_next_and_named(tmp_path, caplog):
    names = ["cut.mp4", "empty.mp4", "good.mp4", "short.mp4"]
    cut = films.write(tmp_path / "cut.mp4", films.noise(12))
    with open(cut, "rb+") as file:
        file.truncate(2000)
    (tmp_path / "empty.mp4").write_bytes(b"")
    films.write(tmp_path / "good.mp4", 20)
    films.write(tmp_path / "short.mp4", 2)
    source = Films(str(tmp_path), names, [0, 1, 2, 3], 4, ())
    reader = clips.evaluation(config().data)
    with caplog.at_level(logging.WARNING):
        (batch,) = loader.eval_batches(source, reader, batch_size=4)
    assert batch["index"].tolist() == [2, 2, 2, 3]
    assert batch["label"].tolist() == [2, 2, 2, 3]
    assert batch["replaced"].tolist() == [True, True, False, False]
    assert films.numbers(batch["image"])[3].tolist() == [0, 0, 0, 0]
    messages = [record.getMessage() for record in caplog.records]
    assert [sum(name in message for message in messages) for name in names] == [1, 1, 0, 0]
    assert all("not a film that PyAV can read" in message for message in messages)


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"augment": "random_crop"},
                "data.augment: expected multi_scale_crop, .*'random_crop'",
            ),
            ({"sampling": "sparse"}, "data.sampling: expected dense or uniform, got 'sparse'"),
            ({"frames": 0}, "data.frames: expected at least 1, got 0"),
            ({"stride": 0}, "data.stride: expected at least 1, got 0"),
            ({"crops_per_image": 0}, "data.crops_per_image: expected at least 1, got 0"),
            ({"channels": 4}, "model.channels: expected 1 or 3 with clips, got 4"),
            (
                {"augment": "random_resized_crop", "crop_scale": (0.0, 1.0)},
                "data.crop_scale: .*0.0, 1.0",
            ),
            (
                {"augment": "random_resized_crop", "crop_ratio": (2.0, 1.0)},
                "data.crop_ratio: .*2.0, 1.0",
            ),
            ({"rand_augment": "rand-m99-inc1"}, "data.rand_augment: .*rand-m99-inc1"),
            (
                {"rand_augment": "rand-m7-inc1", "channels": 1},
                "model.channels: expected 3 with data.rand_augment, got 1",
            ),
        ],
    )
    def test_fields_of_training(self, fields, message):
        with pytest.raises(ConfigError, match=f"^{message}"):
            clips.training(config("finetune", **fields))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"test_clips": 0}, "data.test_clips: expected at least 1, got 0"),
            ({"test_crops": -1}, "data.test_crops: expected at least 1, got -1"),
            ({"sampling": ""}, "data.sampling: expected dense or uniform, got ''"),
            ({"frames": -4}, "data.frames: expected at least 1, got -4"),
        ],
    )
    def test_fields_of_evaluation(self, fields, message):
        with pytest.raises(ConfigError, match=f"^{message}"):
            clips.evaluation(config(**fields).data)

    def test_a_crop_fraction_means_nothing_to_clips(self):
        with pytest.raises(ConfigError, match=r"data.crop_fraction: expected none with clips, got"):
            clips.evaluation(config().data, 0.875)
