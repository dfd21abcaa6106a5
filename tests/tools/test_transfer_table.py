"""The comparison of ways to use an encoder with few labels."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mae_jax import api, build
from mae_jax.data.sources import labels_of
from mae_jax.tools import few_labels, transfer_table
from mae_jax.tools.few_labels import Examples, choose, judge, table
from tests.checkpoints import tiny_config, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("demo"), tiny_config("demo"))


@pytest.fixture
def quick(monkeypatch):
    """Compare what takes no training, and one way that trains, for a few steps."""
    compared = {10: ("k-NN", "few-shot", "full"), 50: ("few-shot",)}
    monkeypatch.setattr(few_labels, "COMPARED", compared)
    shrunk = {"epochs": "1", "optimizer.warmup_epochs": "0"}
    shrunk |= {"model.embed_dim": "16", "model.depth": "2", "model.num_heads": "2"}
    monkeypatch.setattr(few_labels, "TRAINED", {"full": ("finetune:demo", shrunk)})


class Guess:
    """A way whose scores know the truth as far as they were told to."""

    choices = (1.0, 2.0, 3.0)

    def __init__(self, right):
        self.right, self.asked = right, []

    def scores(self, chosen, choice, seed, of):
        self.asked.append((choice, len(chosen), len(of.indices), set(chosen) & set(of.indices)))
        labels = of.labels()
        scores = np.eye(10)[labels]
        wrong = np.arange(len(labels)) >= self.right[choice]
        scores[wrong] = np.eye(10)[(labels[wrong] + 1) % 10]
        return scores


def test_the_choice_is_made_on_labels_that_were_held_back():
    train, _ = build.open_sources(few_labels.configs.load_config("demo").data)
    way = Guess({1.0: 5, 2.0: 15, 3.0: 10})
    best, tried = choose(way, 10, train)
    assert best == 2.0
    assert tried == {"1": 25.0, "2": 75.0, "3": 50.0}
    assert way.asked == [(choice, 80, 20, set()) for choice in way.choices]


def test_equal_choices_are_decided_by_the_loss():
    labels = np.array([0, 1])
    sure, unsure = (np.array([[s, 0.0], [0.0, s]]) for s in (5.0, 1.0))
    assert judge(sure, labels)[0] == judge(unsure, labels)[0] == 100.0
    assert judge(sure, labels) > judge(unsure, labels)
    # By hand: log(1 + exp(-5))
    assert judge(sure, labels)[1] == pytest.approx(-np.log1p(np.exp(-5.0)))
    assert judge(sure[:, ::-1], labels)[0] == 0.0


def test_the_table_has_mean_and_deviation_over_the_seeds():
    rows = {"full, 100 labels": {"top1": [80.0, 84.0]}, "full, 500 labels": {"top1": [90.0, 90.0]}}
    text = table(rows, 2)
    assert "| full | 82.0 ± 2.8 | 90.0 ± 0.0 |" in text
    assert "| k-NN |  |  |" in text


def test_examples_are_those_of_the_indices():
    train, _ = build.open_sources(few_labels.configs.load_config("demo").data)
    some = Examples(train, np.array([7, 3]))
    np.testing.assert_array_equal(some.images()[1], train[3]["image"])
    np.testing.assert_array_equal(some.labels(), labels_of(train)[[7, 3]])


@pytest.mark.slow
def test_results_are_kept_and_not_done_again(checkpoint, quick, tmp_path, capsys, monkeypatch):
    flags = [f"--checkpoint={checkpoint}", f"--out={tmp_path}", "--seeds=2"]
    assert transfer_table.main(flags) == 0
    first = json.loads((tmp_path / "results.json").read_text())
    assert set(first["rows"]) == {
        *("k-NN, 100 labels", "few-shot, 100 labels", "full, 100 labels", "few-shot, 500 labels"),
    }
    for row in first["rows"].values():
        assert len(row["top1"]) == 2
        assert all(0 <= value <= 100 for value in row["top1"])
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out

    model = api.load(checkpoint)
    train, held_out = build.open_sources(model.config.data)
    ridge = few_labels.Ridge(model, train)
    chosen = few_labels.readout.label_draws(labels_of(train), 10, 1, 1)[0]
    of = Examples(held_out, np.arange(len(held_out)))
    alone, _ = judge(ridge.scores(chosen, 1.0, 1, of), of.labels())
    assert first["rows"]["few-shot, 100 labels"]["top1"][1] == alone

    del first["rows"]["few-shot, 100 labels"]
    first["rows"]["k-NN, 100 labels"]["top1"] = [1.0, 2.0]
    (tmp_path / "results.json").write_text(json.dumps(first))
    monkeypatch.setattr(few_labels, "Training", None)  # would fail if it were asked for
    assert transfer_table.main(flags) == 0
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["rows"]["k-NN, 100 labels"]["top1"] == [1.0, 2.0]
    assert again["rows"]["few-shot, 100 labels"]["top1"][1] == alone


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--checkpoint: expected a folder, got nothing"),
        (["--checkpoint={c}"], "--out: expected a folder, got nothing"),
        (["--checkpoint={c}", "--out={t}", "--seeds=1"], "--seeds=1: expected at least 2"),
        (["--checkpoint={t}/none", "--out={t}"], "expected the folder of a run"),
    ],
)
def test_a_mistake_is_one_line(checkpoint, tmp_path, capsys, flags, message):
    assert transfer_table.main([f.format(c=checkpoint, t=tmp_path) for f in flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_results_of_another_checkpoint_are_refused(checkpoint, quick, tmp_path, capsys):
    (tmp_path / "results.json").write_text(
        json.dumps({"of": {"checkpoint": "elsewhere", "step": 3}, "rows": {}})
    )
    assert transfer_table.main([f"--checkpoint={checkpoint}", f"--out={tmp_path}"]) == 2
    assert "holds results of {'checkpoint': 'elsewhere', 'step': 3}" in capsys.readouterr().err
