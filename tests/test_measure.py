"""Measuring a checkpoint from the command line: the figures, going on, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from mae_jax import api, build, measurements
from mae_jax import config as configs
from mae_jax import main as program
from mae_jax.data import imagenet
from mae_jax.data.readers import images as image_reader
from mae_jax.data.sources import folder as folder_source
from mae_jax.tasks import readout, robustness
from mae_jax.tasks.inputs import ImageModel
from tests.checkpoints import tiny_config, write_checkpoint, write_params
from tests.helpers import overrides
from tests.weights import random_params

# Images of 8 x 8 in four patches, and one block: a model that is compiled in a second.
SMALL = {"model__image_size": "8", "model__depth": "1", "data__crop_fraction": "0.75"}
CLASSES = ("ape", "bee", "cat")


def draw(folder: Path, counts: dict[str, int], seed: int) -> None:
    """Write so many images of each class, a folder; one class is a little brighter than another."""
    rng = np.random.default_rng(seed)
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for image in range(count):
            pixels = np.clip(rng.normal(90 + 25 * number, 25, (8, 8)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{image}.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Return a folder with 10 images of each of three classes to train on and 7 held out."""
    folder = tmp_path_factory.mktemp("images")
    draw(folder / "train", dict.fromkeys(CLASSES, 10), seed=0)
    draw(folder / "val", dict.fromkeys(CLASSES, 7), seed=1)
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> Path:
    """Return another folder of the same classes, of which a half is held out."""
    folder = tmp_path_factory.mktemp("others")
    draw(folder, {"ape": 4, "bee": 8, "cat": 12}, seed=2)
    return folder


def of_folder(path: Path) -> dict[str, str]:
    """Return the fields of a configuration of a small model on a folder, half of it held out."""
    return SMALL | {"data__source": "folder", "data__path": str(path), "data__held_out": "0.5"}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, images) -> Path:
    config = tiny_config(**of_folder(images))
    return write_checkpoint(tmp_path_factory.mktemp("runs") / "mae", config)


def classifier_params(config: ConfigDict) -> dict[str, Any]:
    size = (*config.data.image_size, config.data.channels)
    return random_params(build.build_model(config).init, np.zeros((1, *size), np.float32), seed=4)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, images) -> Path:
    config = tiny_config("finetune:demo", **of_folder(images), model__num_classes="3")
    folder = tmp_path_factory.mktemp("runs") / "classifier"
    return write_params(folder, config, classifier_params(config))


def flags(config: str, workdir: Path, fields: dict[str, Any]) -> list[str]:
    """Return the flags of a measurement; "__" in a name stands for the dot."""
    fields = {name.replace("__", "."): str(value) for name, value in fields.items()}
    return [
        f"--config={config}",
        f"--workdir={workdir}",
        *overrides({"eval.batch_size": 16} | fields),
    ]


def figures(workdir: Path) -> dict[str, dict[str, float]]:
    return json.loads((workdir / "results.json").read_text())["figures"]


def replace_figures(workdir: Path, new: dict[str, dict[str, float]]) -> None:
    results = json.loads((workdir / "results.json").read_text())
    (workdir / "results.json").write_text(json.dumps(results | {"figures": new}))


def measured(config: str, workdir: Path, *more: str, **fields: Any) -> dict[str, dict[str, float]]:
    """Measure to the end; returns the results."""
    assert program.main([*flags(config, workdir, fields), *more]) == 0
    return figures(workdir)


def refusal(capsys, config: str, workdir: Path, *more: str, **fields: Any) -> str:
    """Expect status 2; returns the one line on stderr."""
    assert program.main([*flags(config, workdir, fields), *more]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def of_both(checkpoint: Path, folder: Path, share: float) -> tuple[np.ndarray, ...]:
    """Return by the library features and labels to train on, and those held out."""
    model = api.load(checkpoint)
    arrays: list[np.ndarray] = []
    for split in ("train", "val"):
        source = folder_source.make(split, path=str(folder), held_out=share)
        paths = [source.describe(number) for number in range(len(source))]
        arrays += model.features(model.prepare(paths)), np.asarray(source.labels)
    return tuple(arrays)


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def damaged(images, tmp_path) -> Path:
    """Return a copy of `images` with a bad image to train on and two that are held out."""
    folder = shutil.copytree(images, tmp_path / "damaged")
    for name in ("train/bee/3", "val/ape/6", "val/cat/0"):
        (folder / f"{name}.png").write_bytes(b"no image")
    return folder


class TestBadImages:
    def test_they_are_left_out_of_the_features_and_counted(self, pretrained, damaged, tmp_path):
        found = measured(
            "knn", tmp_path / "knn", init_from=pretrained, data__path=damaged, eval__neighbours=3
        )
        for name in ("train/bee/3", "val/ape/6", "val/cat/0"):
            (damaged / f"{name}.png").unlink()
        alone = readout.knn_top1(*of_both(pretrained, damaged, 0.5), k=3)
        assert found["knn"] == {"top1": pytest.approx(alone), "left_out": 3}

    def test_they_are_left_out_of_accuracy_and_counted(self, classifier, damaged, tmp_path, capsys):
        found = measured("evaluate", tmp_path / "run", init_from=classifier, data__path=damaged)
        assert "  left_out 2\n" in capsys.readouterr().out
        assert found["folder_validation"].pop("left_out") == 2
        for name in ("val/ape/6", "val/cat/0"):
            (damaged / f"{name}.png").unlink()
        alone = measured("evaluate", tmp_path / "alone", init_from=classifier, data__path=damaged)
        assert found["folder_validation"] == pytest.approx(alone["folder_validation"], rel=1e-6)

    def test_too_many_are_refused_unless_they_are_allowed(
        self, classifier, images, tmp_path, capsys
    ):
        folder = shutil.copytree(images, tmp_path / "damaged")
        for number in range(11):
            (folder / "val" / CLASSES[number % 3] / f"{number // 3}.png").write_bytes(b"")
        fields = {"init_from": classifier, "data__path": folder}
        said = refusal(capsys, "evaluate", tmp_path / "run", **fields)
        assert "data.max_bad_share 0.001: expected at most 10 of 21 examples that cannot" in said
        found = measured("evaluate", tmp_path / "run", **fields, data__max_bad_share=0.6)
        assert found["folder_validation"]["left_out"] == 11


class TestFeatures:
    def test_knn_is_the_vote_on_the_features_of_the_checkpoints_data(
        self, pretrained, images, tmp_path
    ):
        both = of_both(pretrained, images, 0.5)
        expected = {k: readout.knn_top1(*both, k=k) for k in (1, 20)}
        assert expected[1] != expected[20]
        assert 34 < expected[1] < 99  # no figure that a constant answer would have
        for k in (1, 20):
            found = measured("knn", tmp_path / str(k), init_from=pretrained, eval__neighbours=k)
            assert found == {"knn": {"top1": expected[k]}}

    def test_few_shot_is_ridge_regression_for_each_number_of_labels(
        self, pretrained, images, tmp_path
    ):
        both = of_both(pretrained, images, 0.5)
        found = measured(
            "few_shot",
            tmp_path,
            init_from=pretrained,
            eval__labels_per_class="1,8",
            eval__draws=3,
        )
        expected = {}
        for count in (1, 8):
            mean, std = readout.linear_top1(*both, per_class=count, draws=3)
            expected |= {f"top1_{count}": mean, f"top1_{count}_std": std}
        assert found["few_shot"] == pytest.approx(expected)
        assert expected["top1_1"] != expected["top1_8"] > 50

    def test_another_folder_takes_the_place_of_the_checkpoints(self, pretrained, others, tmp_path):
        both = of_both(pretrained, others, 0.25)
        assert len(both[0]) == 18
        found = measured(
            "knn",
            tmp_path,
            init_from=pretrained,
            data__path=others,
            data__held_out=0.25,
            eval__neighbours=3,
        )
        assert found == {"knn": {"top1": readout.knn_top1(*both, k=3)}}

    def test_features_of_a_classifier_are_what_its_linear_layer_sees(
        self, classifier, images, tmp_path
    ):
        both = of_both(classifier, images, 0.5)
        found = measured("knn", tmp_path, init_from=classifier, eval__neighbours=3)
        assert found == {"knn": {"top1": readout.knn_top1(*both, k=3)}}


class TestEvaluate:
    def test_figures_picture_and_table_are_those_of_the_held_out_images(
        self, classifier, images, tmp_path
    ):
        model = api.load(classifier)
        source = folder_source.make("val", path=str(images))
        logits = model.logits(model.prepare([source.describe(i) for i in range(len(source))]))
        labels = np.asarray(source.labels)
        chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        found = measured("evaluate", tmp_path, init_from=classifier)
        assert found.keys() == {"folder_validation"}
        figures = found["folder_validation"]
        assert figures.keys() == {"top1", "loss"}  # five of three classes are all
        assert figures["top1"] == pytest.approx(100 * (logits.argmax(axis=1) == labels).mean())
        assert 0 < figures["top1"] < 100
        loss = -np.log(chances[np.arange(len(labels)), labels]).mean()
        assert figures["loss"] == pytest.approx(loss, abs=1e-5)
        rows = (tmp_path / "tables" / "per_class.csv").read_text().splitlines()
        assert [row.split(",")[:2] for row in rows[1:]] == [[name, "7"] for name in CLASSES]
        assert np.asarray(Image.open(tmp_path / "pictures" / "confusion.png")).ndim == 3

    def test_another_split_and_folder(self, classifier, others, tmp_path):
        fields = {"init_from": classifier, "data__path": others, "data__eval_split": "all"}
        found = measured("evaluate", tmp_path, **fields)
        assert found.keys() == {"folder_all"}
        rows = (tmp_path / "tables" / "per_class.csv").read_text().splitlines()
        assert [row.split(",")[1] for row in rows[1:]] == ["4", "8", "12"]


class TestSameCommandAgain:
    def test_changes_nothing_and_says_so(self, pretrained, tmp_path, capsys):
        first = measured("knn", tmp_path, init_from=pretrained)
        before = contents(tmp_path)
        assert before.keys() == {"config.json", "results.json"}
        assert json.loads(before["config.json"])["init_from"] == str(pretrained)
        capsys.readouterr()
        replace_figures(tmp_path, {"knn": {"top1": -1.0}})
        assert measured("knn", tmp_path, init_from=pretrained) == {"knn": {"top1": -1.0}}
        said = capsys.readouterr().out
        assert "knn: there already" in said
        assert f"finished: {tmp_path / 'results.json'}" in said
        (tmp_path / "results.json").write_bytes(before["results.json"])
        assert measured("knn", tmp_path, init_from=pretrained) == first
        assert contents(tmp_path) == before

    def test_another_configuration_is_refused_by_name(self, pretrained, others, tmp_path, capsys):
        measured("knn", tmp_path, init_from=pretrained)
        before = contents(tmp_path)
        message = refusal(capsys, "knn", tmp_path, init_from=pretrained, eval__neighbours=3)
        assert "eval.neighbours is 3, but" in message
        assert "was made with 20" in message
        message = refusal(capsys, "knn", tmp_path, init_from=pretrained, data__path=others)
        assert f"data.path is '{others}', but" in message
        message = refusal(capsys, "few_shot", tmp_path, init_from=pretrained)
        assert f"task is 'few_shot', but {tmp_path} was made with 'knn'" in message
        assert contents(tmp_path) == before

    def test_a_field_may_be_allowed_to_differ(self, classifier, others, tmp_path):
        first = measured("evaluate", tmp_path, init_from=classifier)
        more = {"data__path": others, "data__eval_split": "all"}
        both = measured("evaluate", tmp_path, "--allow_change=data", init_from=classifier, **more)
        assert both.keys() == {"folder_validation", "folder_all"}
        assert both["folder_validation"] == first["folder_validation"]

    def test_the_folder_of_a_training_run_is_left_alone(self, classifier, tmp_path, capsys):
        (tmp_path / "config.json").write_text(configs.to_json(configs.load_config("finetune:demo")))
        before = contents(tmp_path)
        message = refusal(capsys, "evaluate", tmp_path, init_from=classifier)
        assert "task is 'evaluate', but" in message
        assert "was made with 'finetune': take another --workdir" in message
        assert contents(tmp_path) == before


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unlabelled")
    draw(folder, {"one": 6}, seed=3)
    return folder


@pytest.fixture(scope="module")
def thousand(tmp_path_factory, images) -> tuple[Path, dict[str, Any]]:
    """Return a classifier whose answer is always the same, and its first and second choice."""
    config = tiny_config("finetune:demo", **of_folder(images), model__num_classes="1000")
    params = classifier_params(config)
    params["head"]["linear"]["kernel"] = np.zeros((16, 1000), np.float32)
    params["head"]["linear"]["bias"] = np.zeros(1000, np.float32)
    # Of all classes the favourite is none of ImageNet-A and none of -R; the next is one of both.
    wnids = imagenet.wnids()
    both = set(imagenet.wnids_of("imagenet_a")) & set(imagenet.wnids_of("imagenet_r"))
    either = set(imagenet.wnids_of("imagenet_a")) | set(imagenet.wnids_of("imagenet_r"))
    favourite = next(wnid for wnid in wnids[500:] if wnid not in either)
    second = sorted(both)[len(both) // 2]
    params["head"]["linear"]["bias"][wnids.index(favourite)] = 9.0
    params["head"]["linear"]["bias"][wnids.index(second)] = 5.0
    folder = write_params(tmp_path_factory.mktemp("runs") / "thousand", config, params)
    return folder, {"favourite": favourite, "second": second}


@pytest.fixture(scope="module")
def sets(tmp_path_factory, thousand) -> dict[str, Path]:
    """Return folders in the layout of ImageNet-A, -R, -Sketch and -C with a few images."""
    root = tmp_path_factory.mktemp("sets")
    favourite, second = thousand[1]["favourite"], thousand[1]["second"]
    for name, seconds in (("imagenet_a", 3), ("imagenet_r", 2)):
        first, *_, last = imagenet.wnids_of(name)
        draw(root / name, {first: 1, second: seconds, last: 4}, seed=5)
    draw(root / "imagenet_sketch", {favourite: 2, second: 5, "n01440764": 1}, seed=6)
    for number, corruption in enumerate(robustness.ALEXNET_ERRORS):
        for severity in measurements.SEVERITIES:
            folder = root / "imagenet_c" / corruption / str(severity)
            draw(folder, {favourite: 1, "n01440764": wrong(number, severity)}, seed=7)
    return {path.name: path for path in root.iterdir()}


def wrong(corruption: int, severity: int) -> int:
    """Return how many images of a part are not of the class that is always answered."""
    return severity if corruption % 2 else 1


def of_sets(sets: dict[str, Path], *names: str) -> dict[str, Path]:
    return {f"sets__{name}": sets[name] for name in names}


@pytest.fixture
def fractions(monkeypatch) -> list[float]:
    """Return the `crop_fraction` of each set that is measured."""
    seen: list[float] = []
    transform = image_reader.eval_transform

    def noted(image_size: tuple[int, int], *, crop_fraction: float) -> Any:
        seen.append(crop_fraction)
        return transform(image_size, crop_fraction=crop_fraction)

    monkeypatch.setattr(image_reader, "eval_transform", noted)
    return seen


class TestRobustness:
    def test_the_best_of_the_columns_of_a_set_is_the_answer(
        self, thousand, sets, tmp_path, fractions
    ):
        names = ("imagenet_a", "imagenet_r", "imagenet_sketch")
        found = measured("robustness", tmp_path, init_from=thousand[0], **of_sets(sets, *names))
        assert list(found) == list(names)
        shares = {name: figures["top1"] for name, figures in found.items()}
        # Of 8 images of A 3 are of the second class, which wins where the first is no answer.
        assert shares == pytest.approx(
            {"imagenet_a": 100 * 3 / 8, "imagenet_r": 100 * 2 / 7, "imagenet_sketch": 100 * 2 / 8}
        )
        total = np.log(np.exp(5.0) + 199)  # of the exponentials of 200 logits
        assert found["imagenet_a"]["loss"] == pytest.approx(total - 5 * 3 / 8, abs=1e-5)
        assert not (tmp_path / "tables").exists()
        assert fractions == [0.75] * 3  # the checkpoint's

    def test_the_mean_corruption_error_goes_on_with_what_is_missing(
        self, thousand, sets, tmp_path, capsys, monkeypatch, fractions
    ):
        traced = []
        call = ImageModel.call

        def counted(task: ImageModel, name: str, *args: Any, **kwargs: Any) -> Any:
            traced.append(name)
            return call(task, name, *args, **kwargs)

        monkeypatch.setattr(ImageModel, "call", counted)
        fields = {"init_from": thousand[0], **of_sets(sets, "imagenet_c")}
        found = measured("robustness", tmp_path, **fields)
        assert traced == ["logits"]  # compiled once for all of the parts
        assert len(found) == 75 + 1
        assert fractions == [1.0] * 75  # the images were cropped before they were spoilt
        relative, plain = [], []
        for number, (corruption, of_alexnet) in enumerate(robustness.ALEXNET_ERRORS.items()):
            counts = [wrong(number, severity) for severity in (1, 2, 3, 4, 5)]
            errors = [count / (1 + count) for count in counts]
            for severity, error in zip((1, 2, 3, 4, 5), errors, strict=True):
                top1 = found[f"imagenet_c/{corruption}/{severity}"]["top1"]
                assert top1 == pytest.approx(100 * (1 - error))
            plain.append(np.mean(errors))
            relative.append(plain[-1] / of_alexnet)
        expected = {"mce": 100 * np.mean(relative), "mean_error": 100 * np.mean(plain)}
        assert found["imagenet_c"] == pytest.approx(expected)
        assert expected["mce"] > expected["mean_error"] + 5

        deleted = ["imagenet_c/snow/3", "imagenet_c/jpeg_compression/5", "imagenet_c"]
        kept = {name: value for name, value in found.items() if name not in deleted}
        kept["imagenet_c/fog/1"] = {"top1": 0.0}
        replace_figures(tmp_path, kept)
        capsys.readouterr()
        again = measured("robustness", tmp_path, **fields)
        said = capsys.readouterr().out
        assert said.count("there already") == 73
        for name in deleted[:2]:
            assert f"{name}:  top1" in said
            assert again[name] == found[name]
        fog = list(robustness.ALEXNET_ERRORS).index("fog")
        worse = (
            (1 - wrong(fog, 1) / (1 + wrong(fog, 1))) / 5 / robustness.ALEXNET_ERRORS["fog"] / 15
        )
        assert again["imagenet_c"]["mce"] == pytest.approx(expected["mce"] + 100 * worse)

    def test_a_stopped_run_keeps_what_is_done_and_goes_on(
        self, thousand, sets, tmp_path, capsys, monkeypatch
    ):
        names = ("imagenet_a", "imagenet_r")
        fields = {"init_from": thousand[0], **of_sets(sets, *names)}
        open_set = measurements._open_set

        def stopped(name: str, place: str) -> Any:
            if name == "imagenet_r":
                signal.raise_signal(signal.SIGTERM)
            return open_set(name, place)

        monkeypatch.setattr(measurements, "_open_set", stopped)
        assert program.main(flags("robustness", tmp_path, fields)) == 75
        said = capsys.readouterr().out
        assert "stopped by SIGTERM; 1 of 2 measurements are saved" in said
        assert "mae_jax.main --config=robustness" in said
        assert list(figures(tmp_path)) == ["imagenet_a"]
        monkeypatch.setattr(measurements, "_open_set", open_set)
        assert list(measured("robustness", tmp_path, **fields)) == list(names)
        assert capsys.readouterr().out.count("there already") == 1

    def test_images_of_other_classes_than_the_200_do_not_count(self, thousand, tmp_path, fractions):
        favourite, second = thousand[1]["favourite"], thousand[1]["second"]
        draw(
            tmp_path / "a", {favourite: 5, second: 1, imagenet.wnids_of("imagenet_a")[0]: 2}, seed=8
        )
        found = measured(
            "robustness",
            tmp_path / "run",
            init_from=thousand[0],
            sets__imagenet_a=tmp_path / "a",
            data__crop_fraction=0.5,
        )
        assert fractions == [0.5]
        assert found["imagenet_a"]["top1"] == pytest.approx(100 / 3)


class TestRefusals:
    @pytest.mark.parametrize(
        ("config", "checkpoint", "fields", "message"),
        [
            ("knn", "", {}, "init_from: expected the folder of a run or a checkpoint, got nothing"),
            (
                "knn",
                "{tmp}/nowhere",
                {},
                "nowhere: expected the folder of a run or a checkpoint, got",
            ),
            ("knn", "{pretrained}", {"eval__batch_size": 12}, "eval.batch_size 12 cannot be split"),
            (
                "knn",
                "{pretrained}",
                {"eval__neighbours": 0},
                "eval.neighbours 0: expected at least",
            ),
            (
                "knn",
                "{pretrained}",
                {"data__path": "{unlabelled}"},
                "data.split 'train': expected labelled images, got images without labels",
            ),
            ("knn", "{pretrained}", {"data__path": "{tmp}/no"}, "data.path: expected a folder of"),
            (
                "few_shot",
                "{pretrained}",
                {"eval__labels_per_class": "1,0"},
                "eval.labels_per_class (1, 0): expected at least 1",
            ),
            ("few_shot", "{pretrained}", {"eval__draws": 0}, "eval.draws 0: expected at least 1"),
            (
                "evaluate",
                "{classifier}",
                {"data__crop_fraction": 0},
                "data.crop_fraction: expected in (0, 1], got 0",
            ),
            (
                "knn",
                "{pretrained}",
                {"data__crop_fraction": 87.5},
                "data.crop_fraction: expected in (0, 1], got 87.5",
            ),
            (
                "evaluate",
                "{pretrained}",
                {},
                "init_from: expected a fine-tuned classifier, got a pre-trained model",
            ),
            (
                "evaluate",
                "{classifier}",
                {"data__path": "{unlabelled}"},
                "data.eval_split 'validation': expected labelled images",
            ),
            ("evaluate", "{thousand}", {}, "data.eval_split 'validation' has 3 classes"),
            (
                "robustness",
                "{classifier}",
                {"sets__imagenet_a": "{images}"},
                "expected a classifier of ImageNet's 1000 classes, got one of 3",
            ),
            (
                "robustness",
                "{pretrained}",
                {"sets__imagenet_a": "{images}"},
                "init_from: expected a fine-tuned classifier, got a pre-trained model",
            ),
            (
                "robustness",
                "{thousand}",
                {},
                "sets.imagenet_a, sets.imagenet_c, sets.imagenet_r, sets.imagenet_sketch: expected"
                " a folder or tfds:NAME for at least one, got nothing",
            ),
            (
                "robustness",
                "{thousand}",
                {"sets__imagenet_a": "{tmp}/nowhere"},
                "sets.imagenet_a: expected a folder of images or tfds:NAME, got",
            ),
            (
                "robustness",
                "{thousand}",
                {"sets__imagenet_c": "{images}"},
                "sets.imagenet_c: expected a folder of images or tfds:NAME, got",
            ),
            (
                "robustness",
                "{thousand}",
                {"sets__imagenet_r": "{images}/train"},
                "sets.imagenet_r: expected classes named by WordNet ids of ImageNet, such as"
                " n01440764, got 'ape'",
            ),
            (
                "robustness",
                "{thousand}",
                {"sets__imagenet_sketch": "{unlabelled}"},
                "sets.imagenet_sketch: expected classes named by WordNet ids, got none in",
            ),
            (
                "knn",
                "{pretrained}",
                {"task": "few_shot"},
                "--config.task=few_shot: a config is for one task, here 'knn'",
            ),
            ("knn", "{pretrained}", {"eval__neighbors": 3}, "did you mean eval.neighbours?"),
        ],
    )
    def test_a_mistake_is_one_line_and_nothing_is_written(
        self, request, capsys, tmp_path, config, checkpoint, fields, message
    ):
        def place(text: Any) -> Any:
            """Return a text with the names of fixtures replaced by their folders."""
            known = {"tmp": tmp_path}
            for name in ("pretrained", "classifier", "thousand", "images", "unlabelled"):
                if f"{{{name}}}" in str(text):
                    value = request.getfixturevalue(name)
                    known[name] = value if isinstance(value, Path) else value[0]
            return str(text).format(**known)

        fields = {name: place(value) for name, value in fields.items()}
        workdir = tmp_path / "run"
        said = refusal(capsys, config, workdir, init_from=place(checkpoint), **fields)
        assert message in said
        assert not workdir.exists()
