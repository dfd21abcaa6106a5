"""The batches of a step are one thing, however the work is shared out."""

import dataclasses
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_jax.data import loader, transforms
from mae_jax.data.processes import available_cores
from mae_jax.data.readers.images import ImageReader
from mae_jax.data.sources import folder
from mae_jax.errors import ConfigError

NUM_IMAGES = 23
TRANSFORM = transforms.train_transform((12, 12), augment="random_resized_crop")
ROOT = Path(__file__).parents[2]


class Memory:
    """Random grey images in memory."""

    num_classes = 3
    exif = False

    def __init__(self, count=NUM_IMAGES, bad=()):
        self.images = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 1), dtype=np.uint8)
        self.bad = bad

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = b"" if index in self.bad else self.images[index]
        return {"image": image, "label": index % 3}

    def describe(self, index):
        return f"memory {id(self)}, {index}"

    def fingerprint(self):
        return "memory"


@dataclasses.dataclass(frozen=True)
class Identity:
    def __call__(self, image, rng):
        return image


@pytest.fixture
def pictures(tmp_path):
    """Write a folder of noise, two classes."""
    rng = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (14, 15, 3), dtype=np.uint8)).save(path)
    (tmp_path / "val" / "a").mkdir(parents=True)
    (tmp_path / "val" / "a" / "0.png").write_bytes(path.read_bytes())
    return tmp_path


def take(iterator, count):
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def train(count, source=None, transform=TRANSFORM, **options):
    options = {"batch_size": 8, "seed": 7, "threads": 0, **options}
    read = ImageReader(options.pop("channels", 1), transform)
    return take(loader.train_batches(source or Memory(), read, **options), count)


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert set(batch) == set(other) == {"image", "label", "index", "asked", "replaced"}
        for name in other:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)
            assert batch[name].dtype == other[name].dtype


class TestTrainBatches:
    def test_batch_holds_what_it_says(self):
        source = Memory()
        (batch,) = train(1, source, Identity(), batch_size=5)
        assert batch["image"].shape == (5, 16, 16, 1)
        dtypes = {name: array.dtype.name for name, array in batch.items()}
        assert dtypes == {
            "image": "uint8",
            "label": "int32",
            "index": "int32",
            "asked": "int32",
            "replaced": "bool",
        }
        np.testing.assert_array_equal(batch["image"], source.images[batch["index"]])
        np.testing.assert_array_equal(batch["label"], batch["index"] % 3)
        np.testing.assert_array_equal(batch["index"], batch["asked"])
        assert not batch["replaced"].any()

    def test_every_example_comes_once_in_each_epoch(self):
        batches = train(3 * NUM_IMAGES, batch_size=4)  # 12 epochs, batches span their borders
        order = np.concatenate([batch["index"] for batch in batches]).reshape(-1, NUM_IMAGES)
        np.testing.assert_array_equal(np.sort(order), np.tile(np.arange(NUM_IMAGES), (12, 1)))
        assert len(np.unique(order, axis=0)) == 12
        assert (order[0] != np.arange(NUM_IMAGES)).any()

    def test_augmentation_of_an_image_differs_between_epochs(self):
        batches = train(2, batch_size=NUM_IMAGES)
        first, second = (batch["image"][np.argsort(batch["index"])] for batch in batches)
        same = (first == second).all(axis=(1, 2, 3))
        assert not same.any()

    def test_same_seed_same_batches_another_seed_others(self):
        assert_same(train(4), train(4))
        (batch,) = train(1, batch_size=NUM_IMAGES)
        (other,) = train(1, batch_size=NUM_IMAGES, seed=8)
        assert (batch["index"] != other["index"]).any()
        image, other_image = (b["image"][np.argsort(b["index"])] for b in (batch, other))
        assert not (image == other_image).all(axis=(1, 2, 3)).any()  # another augmentation, too

    @pytest.mark.parametrize("process_count", [2, 4])
    def test_processes_share_out_the_rows_of_the_same_global_batches(self, process_count):
        parts = [
            train(9, process_index=i, process_count=process_count) for i in range(process_count)
        ]
        joined = [
            {name: np.concatenate([part[name] for part in step]) for name in step[0]}
            for step in zip(*parts, strict=True)
        ]
        assert_same(joined, train(9))

    @pytest.mark.parametrize("threads", [1, 4, None])
    def test_threads_do_not_change_batches(self, threads):
        assert_same(train(9, threads=threads), train(9))

    @pytest.mark.parametrize("start_step", [1, 5, 8])
    @pytest.mark.parametrize("process_count", [1, 2])
    def test_batches_go_on_at_any_step(self, start_step, process_count):
        options = {"process_count": process_count, "process_index": process_count - 1}
        resumed = train(9 - start_step, start_step=start_step, threads=2, **options)
        assert_same(resumed, train(9, **options)[start_step:])

    def test_far_steps_cost_nothing(self):
        (batch,) = train(1, start_step=10**9)
        assert batch["index"].shape == (8,)

    def test_batch_may_be_larger_than_the_source(self):
        (batch,) = train(1, Memory(3), batch_size=9)
        np.testing.assert_array_equal(np.sort(batch["index"]), [0, 0, 0, 1, 1, 1, 2, 2, 2])

    @pytest.mark.parametrize("batch_size", [0, 9])
    def test_batch_size_must_divide_among_processes(self, batch_size):
        with pytest.raises(ConfigError, match=f"batch_size: .* 2 processes, got {batch_size}"):
            loader.train_batches(
                Memory(), ImageReader(1, TRANSFORM), batch_size=batch_size, seed=0, process_count=2
            )

    @pytest.mark.slow
    def test_workers_do_not_change_batches(self, pictures):
        source = folder.make("train", path=str(pictures))
        expected = train(9, source, channels=3)
        assert_same(train(9, source, channels=3, workers=2, threads=1), expected)
        resumed = train(4, source, channels=3, workers=3, start_step=5)
        assert_same(resumed, expected[5:])

    @pytest.mark.slow
    def test_workers_end_when_their_parent_is_killed(self, pictures):
        script = (
            "import multiprocessing, time\n"
            "from mae_jax.data import loader, transforms\n"
            "from mae_jax.data.readers.images import ImageReader\n"
            "from mae_jax.data.sources import folder\n"
            "if __name__ == '__main__':\n"
            f"    source = folder.make('train', path={str(pictures)!r})\n"
            "    read = ImageReader(3, transforms.eval_transform((8, 8)))\n"
            "    batches = loader.train_batches(\n"
            "        source, read, batch_size=2, seed=0, workers=1)\n"
            "    next(batches)\n"
            "    print(*(p.pid for p in multiprocessing.active_children()), flush=True)\n"
            "    time.sleep(600)\n"
        )
        path = pictures / "script.py"  # the workers import the main module: it must be a file
        path.write_text(script)
        parent = subprocess.Popen(
            [sys.executable, str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        try:
            workers = [int(pid) for pid in parent.stdout.readline().split()]
        finally:
            parent.send_signal(signal.SIGKILL)
            parent.wait()
            parent.stdout.close()
        assert workers
        deadline = time.monotonic() + 30
        while any(map(is_running, workers)):
            assert time.monotonic() < deadline, "a worker outlives its parent"
            time.sleep(0.1)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")  # a zombie that nobody waits for has ended
    return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")


class TestBadExamples:
    def test_damaged_file_is_replaced_by_the_next_one_and_named_once(self, pictures, caplog):
        source = folder.make("train", path=str(pictures))
        bad = Path(source.describe(4))
        bad.write_bytes(bad.read_bytes()[:-40])
        with caplog.at_level(logging.WARNING):
            batches = train(3, source, channels=3, batch_size=12)  # three epochs
        for batch in batches:
            rows = np.flatnonzero(batch["replaced"])
            assert batch["index"][rows].tolist() == [5]
            assert batch["asked"][rows].tolist() == [4]
            assert sorted(batch["index"]) == [0, 1, 2, 3, 5, 5, 6, 7, 8, 9, 10, 11]
            np.testing.assert_array_equal(batch["label"], np.array(source.labels)[batch["index"]])
        assert [record.getMessage().count(str(bad)) for record in caplog.records] == [1]
        assert_same(train(3, source, channels=3, batch_size=12, threads=3), batches)

    def test_file_that_vanished_is_replaced(self, pictures):
        source = folder.make("train", path=str(pictures))
        os.remove(source.describe(11))
        (batch,) = train(1, source, channels=3, batch_size=12)
        assert batch["index"][batch["replaced"]].tolist() == [0]  # after the last comes the first

    def test_several_in_a_row_are_skipped(self):
        (batch,) = train(1, Memory(5, bad=(1, 2, 3)), batch_size=5)
        assert batch["index"][batch["replaced"]].tolist() == [4, 4, 4]
        assert sorted(batch["asked"][batch["replaced"]]) == [1, 2, 3]

    @pytest.mark.parametrize("threads", [0, 2])
    def test_nothing_but_bad_examples_ends_with_the_name_of_one(self, threads):
        source = Memory(5, bad=range(5))
        message = rf"^data.path: memory {id(source)}, \d and the 4 examples after it cannot be used"
        with pytest.raises(ConfigError, match=message) as caught:
            train(1, source, threads=threads)
        assert "\n" not in str(caught.value)

    def test_search_gives_up_before_it_has_read_a_large_source(self):
        with pytest.raises(ConfigError, match="and the 99 examples after it"):
            train(1, Memory(1000, bad=range(1000)))

    def test_mistake_in_the_configuration_is_not_taken_for_a_bad_example(self, pictures):
        with pytest.raises(ConfigError, match="channels"):
            train(1, folder.make("train", path=str(pictures)), channels=2)


class TestLimitOfBadExamples:
    def batches(self, source, **options):
        options = {"batch_size": 20, "seed": 0, "threads": 0, **options}
        read = ImageReader(options.pop("channels", 1), TRANSFORM)
        return loader.train_batches(source, read, **options)

    def test_bad_examples_are_counted_once_each_and_only_once_handed_out(self):
        batches = self.batches(Memory(40, bad=(3, 4, 9)), batch_size=4)
        assert batches.scalars() == {"bad_examples": 0.0}
        met, counts = set(), []
        for batch in itertools.islice(batches, 30):  # three epochs
            met |= set(batch["asked"].tolist()) & {3, 4, 9}
            counts.append(batches.scalars()["bad_examples"])
            assert counts[-1] == len(met)
        assert counts[0] < 3  # so that the count has grown
        assert counts[-1] == 3

    @pytest.mark.parametrize(
        ("examples", "share", "allowed"),
        [(40, 0.0, 10), (40, 0.25, 10), (40, 0.3, 12), (400, 0.0299, 11)],
    )
    def test_ten_or_the_share_may_be_bad_and_not_one_more(self, examples, share, allowed):
        source = Memory(examples, bad=range(0, 2 * allowed, 2))
        epoch = examples // 20
        batches = self.batches(source, max_bad_share=share)
        assert len(list(itertools.islice(batches, epoch))) == epoch
        assert batches.scalars() == {"bad_examples": float(allowed)}
        source.bad = range(0, 2 * allowed + 2, 2)
        with pytest.raises(ConfigError) as caught:
            list(itertools.islice(self.batches(source, max_bad_share=share), epoch))
        expected = f"{allowed} of {examples} examples that cannot be used, got {allowed + 1},"
        assert f"data.max_bad_share {share:g}: expected at most {expected}" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_the_message_names_a_bad_example_and_the_reason(self, pictures):
        source = folder.make("train", path=str(pictures))
        for index in range(11):
            Path(source.describe(index)).write_bytes(b"text")
        with pytest.raises(ConfigError, match=r"\.png: not an image of a kind that Pillow knows$"):
            next(self.batches(source, channels=3, max_bad_share=0.0))

    def test_an_example_that_can_be_read_now_is_said_to_be_bad_at_times(self):
        class Moody(Memory):
            failed = frozenset()

            def __getitem__(self, index):
                if index % 2 == 0 and index not in self.failed:
                    self.failed |= {index}
                    raise OSError("input/output error")
                return super().__getitem__(index)

        with pytest.raises(ConfigError, match=r"memory \d+, \d+: cannot be read at times$"):
            list(itertools.islice(self.batches(Moody(40), max_bad_share=0.001), 2))

    @pytest.mark.parametrize("share", [-0.1, 1.5])
    def test_a_share_out_of_bounds_is_refused(self, share):
        with pytest.raises(ConfigError, match=r"data.max_bad_share: expected in \[0, 1\], got"):
            self.batches(Memory(), max_bad_share=share)


@dataclasses.dataclass(frozen=True)
class TwoViews:
    """An image and its negative."""

    field = "image"
    views = 2

    def __call__(self, example, rng, *, exif=False):
        return {"image": np.stack([example["image"], 255 - example["image"]])}


class TwoViewsOrNone(TwoViews):
    """Of encoded images, all bad here, nothing."""

    def __call__(self, example, rng, *, exif=False):
        if isinstance(example["image"], bytes):
            raise transforms.BadExample("encoded")
        return super().__call__(example, rng)


class TestViews:
    def test_views_of_an_example_are_rows_one_after_the_other(self):
        source = Memory()
        batches = take(loader.train_batches(source, TwoViews(), batch_size=4, seed=7, threads=0), 6)
        plain = train(6, source, batch_size=4)
        for batch, of_examples in zip(batches, plain, strict=True):
            assert batch["image"].shape == (8, 16, 16, 1)
            for name in ("index", "label", "asked", "replaced"):
                assert batch[name].tolist() == of_examples[name].repeat(2).tolist()
            np.testing.assert_array_equal(batch["image"][::2], source.images[batch["index"][::2]])
            np.testing.assert_array_equal(batch["image"][1::2], 255 - batch["image"][::2])

    def test_processes_share_out_the_examples_with_their_views(self):
        def part(index, count):
            return take(
                loader.train_batches(
                    Memory(),
                    TwoViews(),
                    batch_size=4,
                    seed=7,
                    threads=0,
                    process_index=index,
                    process_count=count,
                ),
                3,
            )

        for whole, first, second in zip(part(0, 1), part(0, 2), part(1, 2), strict=True):
            joined = {name: np.concatenate([first[name], second[name]]) for name in whole}
            assert_same([joined], [whole])

    def test_padding_has_as_many_rows_as_examples_have(self):
        first, second = loader.eval_batches(Memory(5), TwoViews(), batch_size=4)
        assert first["weight"].tolist() == [1.0] * 8
        assert second["weight"].tolist() == [1, 1] + [0] * 6
        assert second["index"].tolist() == [4, 4, 0, 0, 1, 1, 2, 2]


class TestEvalBatches:
    def batches(self, source, **options):
        read = ImageReader(options.pop("channels", 1), transforms.eval_transform((12, 12)))
        return loader.eval_batches(source, read, **{"batch_size": 4, **options})

    def test_all_examples_come_in_order_and_the_tail_is_padded(self):
        batches = self.batches(Memory(10))
        assert len(batches) == 3
        batches = list(batches)
        assert np.concatenate([b["index"] for b in batches]).tolist() == [*range(10), 0, 1]
        weight = np.concatenate([b["weight"] for b in batches])
        assert weight.tolist() == [1] * 10 + [0] * 2
        assert weight.dtype == np.float32
        assert batches[0]["image"].shape == (4, 12, 12, 1)

    def test_full_batches_need_no_padding(self):
        batches = list(self.batches(Memory(8)))
        assert len(batches) == 2
        assert all(b["weight"].tolist() == [1, 1, 1, 1] for b in batches)

    def test_batch_larger_than_the_source_repeats_it(self):
        (batch,) = self.batches(Memory(3), batch_size=8)
        assert batch["index"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
        assert batch["weight"].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]

    def test_limit_takes_evenly_spaced_examples(self):
        batches = list(self.batches(Memory(10), batch_size=3, limit=4))
        assert [b["index"].tolist() for b in batches] == [[0, 2, 5], [7, 0, 2]]
        assert [b["weight"].tolist() for b in batches] == [[1, 1, 1], [1, 0, 0]]

    def test_limit_above_the_number_of_examples_takes_all(self):
        batches = list(self.batches(Memory(6), batch_size=3, limit=100))
        assert [b["index"].tolist() for b in batches] == [[0, 1, 2], [3, 4, 5]]

    def test_limit_below_one_is_refused(self):
        with pytest.raises(ConfigError, match="got 0"):
            self.batches(Memory(6), limit=0)

    def test_chosen_examples_come_in_the_order_given(self):
        batches = list(self.batches(Memory(10, bad=(9,)), batch_size=3, examples=[7, 2, 8, 9]))
        assert [b["asked"].tolist() for b in batches] == [[7, 2, 8], [9, 7, 2]]
        assert [b["index"].tolist() for b in batches] == [[7, 2, 8], [0, 7, 2]]
        assert [b["weight"].tolist() for b in batches] == [[1, 1, 1], [0, 0, 0]]

    def test_what_replaces_a_bad_example_does_not_count_and_is_told_once(self, caplog):
        batches = self.batches(Memory(10, bad=(0, 4, 9)), max_bad_share=0.0)
        for _ in range(2):
            read = list(batches)
            assert np.concatenate([b["index"] for b in read]).tolist() == [
                *[1, 1, 2, 3, 5, 5, 6, 7, 8, 1],
                *[1, 1],
            ]
            weight = np.concatenate([b["weight"] for b in read])
            assert weight.tolist() == [0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0]
            assert weight.dtype == np.float32
            assert batches.left_out == 3
        said = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
        assert said == ["left out of what is measured: 3 of 10 examples, which cannot be used"]

    def test_replaced_views_do_not_count_and_are_one_example(self):
        batches = loader.eval_batches(Memory(5, bad=(1,)), TwoViewsOrNone(), batch_size=5)
        (batch,) = batches
        assert batch["weight"].tolist() == [1, 1, 0, 0, 1, 1, 1, 1, 1, 1]
        assert batches.left_out == 1

    def test_more_bad_examples_than_allowed_end_the_measurement(self):
        source = Memory(40, bad=range(3, 14))
        few = self.batches(source, max_bad_share=11 / 40)
        assert sum(b["weight"].sum() for b in few) == 29
        expected = (
            rf"^data.max_bad_share 0.1: expected at most 10 of 40 examples that cannot be used, got"
            rf" 11, such as memory {id(source)}, 3: not an image"
        )
        with pytest.raises(ConfigError, match=expected):
            list(self.batches(source, max_bad_share=0.1))

    def test_without_a_limit_any_number_may_be_bad_and_nothing_is_said(self, caplog):
        batches = list(self.batches(Memory(40, bad=range(3, 33))))
        assert sum(b["weight"].sum() for b in batches) == 10
        assert "left out" not in caplog.text

    def test_share_of_bad_examples_outside_0_to_1_is_refused(self):
        with pytest.raises(ConfigError, match=r"data.max_bad_share: expected in \[0, 1\], got 2"):
            self.batches(Memory(6), max_bad_share=2.0)

    @pytest.mark.parametrize("process_count", [2, 4])
    def test_processes_share_out_the_same_batches(self, process_count):
        whole = list(self.batches(Memory(10)))
        parts = [
            list(self.batches(Memory(10), process_index=i, process_count=process_count))
            for i in range(process_count)
        ]
        for step, batch in enumerate(whole):
            for name, array in batch.items():
                joined = np.concatenate([part[step][name] for part in parts])
                np.testing.assert_array_equal(joined, array)

    def test_batches_can_be_iterated_over_again(self):
        batches = self.batches(Memory(10))
        next(iter(batches))  # an iteration that is given up
        first, second = list(batches), list(batches)
        for batch, other in zip(first, second, strict=True):
            for name, array in batch.items():
                np.testing.assert_array_equal(array, other[name])


@pytest.mark.parametrize(("cores", "workers"), [(1, 0), (2, 0), (8, 0), (9, 2), (16, 4), (96, 24)])
def test_small_hosts_load_in_threads_and_large_ones_in_workers(cores, workers):
    assert loader.default_workers(cores) == workers


@pytest.mark.parametrize(
    ("workers", "cores", "threads"),
    [(0, 1, 1), (0, 2, 2), (0, 96, 8), (24, 96, 4), (2, 2, 1), (2, 9, 4), (4, 1, 1)],
)
def test_threads_do_not_outnumber_the_cores(workers, cores, threads):
    assert loader.default_threads(workers, cores) == threads


def test_the_next_batch_is_loaded_while_nobody_asks_for_it():
    indices, second_batch = [], threading.Event()

    class Watched(Memory):
        def __getitem__(self, index):
            indices.append(index)
            if len(indices) == 16:
                second_batch.set()
            return super().__getitem__(index)

    options = {"batch_size": 8, "seed": 7, "threads": 1}
    batches = loader.train_batches(Watched(), ImageReader(1, TRANSFORM), **options)
    next(batches)
    assert second_batch.wait(timeout=30)
    batches.close()


def test_cores_are_counted():
    assert 1 <= available_cores() <= os.cpu_count()


def test_worker_modules_import_neither_jax_nor_anything_optional():
    code = (
        "import sys\n"
        "import mae_jax.data.transforms\n"
        "from mae_jax.data.sources import digits, folder, photos, tfds, tfrecord\n"
        "print(sorted({'jax', 'flax', 'grain', 'tensorflow', 'torch', 'mlxtend',\n"
        "              'tensorflow_datasets', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
