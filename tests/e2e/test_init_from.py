"""Going on with pre-training from the weights of another run."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mae_jax import api, build
from mae_jax.config import load_config
from mae_jax.tasks.pretrain import PretrainTask
from mae_jax.tools import convert_checkpoint
from mae_jax.train import sharding
from mae_jax.types import Rng
from tests.checkpoints import tiny_config, write_checkpoint, write_params
from tests.helpers import SHRINK, finish, metrics, overrides, run, saved_arrays, start, tiny_run

PHOTOS = SHRINK | {"epochs": "0.1", "optimizer.warmup_epochs": "0.05", "eval.every": "0"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return converted weights for `photos`, made tiny: a folder of transformers, made ours."""
    folder = tmp_path_factory.mktemp("source")
    run = write_checkpoint(folder / "run", load_config("photos", PHOTOS))
    theirs, ours = str(folder / "theirs"), folder / "ours"
    assert convert_checkpoint.main([str(run), theirs, "--to=transformers"]) == 0
    assert convert_checkpoint.main([theirs, str(ours)]) == 0
    return ours


@pytest.mark.slow
def test_first_loss_is_that_of_the_weights_it_starts_from(source, tmp_path):
    flags = ["--config=photos", f"--workdir={tmp_path / 'run'}", *overrides(PHOTOS)]
    status, output = run([*flags, f"--config.init_from={source}", "--stop_at_step=3"])
    assert status == 0, output
    assert f"started from {source} (step 0): encoder and decoder" in output
    assert "started from scratch" not in output

    model = api.load(source)
    config = load_config("photos", PHOTOS)
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    train, _ = build.build_sources(config)
    batches = build.build_batches(
        config, train, build.build_readers(config)[0], start_step=0, mesh=mesh
    )
    task = PretrainTask(model.module, config.data.mean, config.data.std)
    rng = Rng(jax.random.key(config.seed), 0)
    loss, _ = jax.jit(lambda params, batch: task.loss(params, {}, batch, rng))(
        model.params, next(batches)
    )
    batches.close()
    (first,) = (row for row in metrics(tmp_path / "run") if row["step"] == 1)
    assert first["train/loss"] == pytest.approx(float(loss), rel=1e-6)
    # The rate of the first step is 0: the parameters are still those it started from.
    status, output = run([*flags, f"--config.init_from={source}", "--stop_at_step=4"])
    assert "resumed from step 3" in output


@pytest.mark.slow
def test_an_encoder_for_another_grid_gets_a_fresh_decoder_where_it_has_none(tmp_path):
    config = tiny_config()
    whole = api.load(write_checkpoint(tmp_path / "whole", config))
    source = write_params(tmp_path / "encoder", config, {"encoder": whole.params["encoder"]})
    flags = tiny_run(tmp_path / "run", model__image_size="32,24")
    status, output = run([*flags, f"--config.init_from={source}", "--stop_at_step=1"])
    assert status == 0, output
    assert "(step 0): the encoder; the decoder is fresh, for it has none" in output
    saved = saved_arrays(tmp_path / "run", 1)
    leaves = jax.tree.leaves_with_path(whole.params["encoder"])
    for path, leaf in leaves:
        name = f"params['encoder']{jax.tree_util.keystr(path)}"
        np.testing.assert_array_equal(saved[name], leaf)


def test_weights_that_do_not_fit_are_refused_in_one_line(source, tmp_path):
    process = start([*tiny_run(tmp_path / "run"), f"--config.init_from={source}"])
    status, output = finish(process)
    assert status == 2
    (line,) = (line for line in output.splitlines() if line.startswith("error:"))
    assert "encoder/patch_embed/kernel: expected shape [16, 16], got [192, 16]" in line
