"""The table of all methods: what it compares, reads and refuses. The runs are tested elsewhere."""

import json

import pytest

from mae_jax import config as configs
from mae_jax.errors import ConfigError
from mae_jax.tools import family_table
from mae_jax.tools.family_table import COMPARED, figures, table


def test_all_methods_see_the_same_images_in_the_same_order():
    loaded = [configs.load_config(name) for name in COMPARED.values()]
    first = loaded[0]
    for config in loaded[1:]:
        assert config.data.to_dict() == first.data.to_dict()
        for name in ("seed", "batch_size", "epochs", "task"):
            assert config[name] == first[name], name
    assert first.data.source == "digits"
    assert first.data.image_size == (64, 64)


def write_metrics(folder, rows):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


END = {
    "loss": 0.5,
    "mean_predictor_loss": 0.625,
    "linear_top1": 61.25,
    "linear_top1_std": 1.5,
    "random_linear_top1": 40.0,
    "knn_top1": 70.0,
    "random_knn_top1": 45.04,
}


def test_figures_are_those_of_the_end_and_the_median_speed_without_the_first(tmp_path):
    rows = [
        {"step": i, "train/loss": 1.0, "train/images_per_second": speed}
        for i, speed in enumerate((1.0, 100.0, 300.0, 200.0))
    ]
    rows.insert(2, {"step": 1, "val/loss": 9.0})
    rows.append({"step": 4} | {f"val/{name}": value for name, value in END.items()})
    write_metrics(tmp_path / "run", rows)
    found = figures(tmp_path / "run")
    assert {name: found[name] for name in END} == END
    assert found["images_per_second"] == 200.0


def test_a_row_of_the_table_has_its_figures_rounded():
    row = END | {"images_per_second": 203.6, "seconds": 93.0, "encoder": 151_600, "all": 200_499}
    line = table({"MAE": row}).splitlines()[-1]
    assert line == (
        "| MAE | 152 k / 200 k | 0.5000 | 0.800 | 61.2 ± 1.5 (40.0) | 70.0 (45.0) | 204 | 1.6 |"
    )


def test_a_run_that_fails_ends_the_comparison(tmp_path):
    with pytest.raises(ConfigError, match="--config=no_such: ended with status 2"):
        family_table.train("no_such", tmp_path / "run")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--out: expected a folder, got nothing"),
        (["--out=x", "--only=hivit"], "--only=hivit: expected one of demo:64px, hivit:demo"),
        (["--uot=x"], "--uot: there is no such flag; did you mean --out?"),
    ],
)
def test_mistakes_are_answered_in_one_line(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert family_table.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
