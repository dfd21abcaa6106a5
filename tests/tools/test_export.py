"""A model in one file that runs without us, or that is read without us."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest
import safetensors
from ml_collections import ConfigDict

from mae_jax import api, build
from mae_jax.tools import export, outputs, portable
from mae_jax.train.checkpoint import Checkpoints
from tests.checkpoints import tiny_config, write_checkpoint
from tests.helpers import environment, saved_arrays
from tests.weights import random_params

TINY = {
    "model__channels": "3",
    "data__mean": "0.5,0.4,0.3",
    "data__std": "0.2,0.25,0.5",
    "model__depth": "1",  # many programs are compiled here
}
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 3), dtype=np.uint8)

# Runs an exported file on images of two batch sizes, with jax and numpy and nothing else.
ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mae_jax", "flax", "optax", "orbax", "etils", "ml_collections"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
try:
    import flax
except ImportError:
    print("alone")
import jax, jax.export, numpy as np

images = np.load("images.npy")
for name in sys.argv[1:]:
    exported = jax.export.deserialize(open(name, "rb").read())
    outputs = {str(size): exported.call(images[:size]) for size in (1, 5)}
    np.savez(name + ".npz", **outputs)
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return write_checkpoint(folder, tiny_config(**TINY), averaged=True)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """Return the folder of a classifier of 7 classes."""
    config = tiny_config(**TINY).copy_and_resolve_references().unlock()
    config.model.update(num_classes=7, pooling="mean")
    folder = tmp_path_factory.mktemp("runs") / "classifier"
    save(folder, config, random_params(build.build_model(config).init, np.zeros((1, 28, 28, 3))))
    return folder


def save(folder: Path, config: ConfigDict, params, **meta) -> None:
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save_params(params, meta={"config": config.to_dict(), **meta})
    checkpoints.close()


def write(workdir: Path, out: Path, *more: str) -> bytes:
    assert export.main([f"--checkpoint={workdir}", f"--out={out}", *more]) == 0
    return out.read_bytes()


def test_a_program_runs_with_jax_alone(workdir, classifier, tmp_path, capsys):
    np.save(tmp_path / "images.npy", IMAGES)
    write(workdir, tmp_path / "mean.stablehlo")
    write(classifier, tmp_path / "logits.stablehlo")
    said = capsys.readouterr().out.splitlines()
    given, products = "uint8 [b, 28, 28, 3]", "float32 products"
    assert f"mean.stablehlo: mean, {given} -> float32 [b, 16], {products}, " in said[0]
    assert said[0].endswith("MB, step 3, averaged weights")
    assert f"logits.stablehlo: logits, {given} -> float32 [b, 7], {products}, " in said[1]
    assert said[1].endswith("MB, step 0")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, "mean.stablehlo", "logits.stablehlo"],
        cwd=tmp_path,
        env=environment(PYTHONPATH=""),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "alone\n"), done.stderr
    for name, expected in (
        ("mean", api.load(workdir).features(IMAGES)),
        ("logits", api.load(classifier).logits(IMAGES)),
    ):
        found = np.load(tmp_path / f"{name}.stablehlo.npz")
        for size in (1, 5):
            assert found[str(size)].dtype == np.float32
            np.testing.assert_allclose(found[str(size)], expected[:size], rtol=0, atol=1e-6)
        assert np.ptp(expected, axis=0).min() > 1e-3  # images differ


def test_every_output_is_that_of_the_library(workdir, classifier):
    model, fine_tuned = api.load(workdir), api.load(classifier)
    for loaded, expected in (
        (
            model,
            {
                "mean": model.features(IMAGES),
                "tokens": model.encode(IMAGES),
                "cls": model.features(IMAGES, pool="cls"),
            },
        ),
        (fine_tuned, {"mean": fine_tuned.features(IMAGES), "logits": fine_tuned.logits(IMAGES)}),
    ):
        known = outputs.outputs(loaded)
        assert list(known) == list(expected)
        call_all = jax.jit(lambda *args, known=known: {k: call(*args) for k, call in known.items()})
        for name, found in call_all(outputs.variables(loaded), IMAGES).items():
            np.testing.assert_allclose(found, expected[name], rtol=0, atol=1e-6)
            assert outputs.output_shape(loaded, known[name]) == expected[name].shape[1:]


def test_a_program_is_for_all_platforms_and_tells_nothing_of_this_machine(workdir, tmp_path):
    content = write(workdir, tmp_path / "new" / "folder" / "a.stablehlo")
    exported = jax.export.deserialize(bytearray(content))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert str(exported.in_avals[0]) == "uint8[b,28,28,3]"
    assert str(exported.out_avals[0]) == "float32[b,16]"
    assert b".py" not in content
    assert write(workdir, tmp_path / "a.stablehlo") == content
    assert jax.config.jax_traceback_in_locations_limit != 0


def test_named_arrays_are_the_parameters_bit_by_bit(workdir, tmp_path, capsys):
    out = tmp_path / "deep" / "a.safetensors"
    write(workdir, out)
    assert capsys.readouterr().out.endswith("MB, step 3, averaged weights\n")
    with safetensors.safe_open(out, "numpy") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert "encoder/block_00/attn/qkv/kernel" in arrays
    assert "decoder/mask_token" in arrays
    saved = {
        name.removeprefix("ema['").removesuffix("']").replace("']['", "/"): array
        for name, array in saved_arrays(workdir, 3).items()
        if name.startswith("ema")
    }
    assert arrays.keys() == saved.keys()
    for name, array in saved.items():
        assert arrays[name].dtype == np.float32
        assert arrays[name].shape == array.shape
        assert arrays[name].tobytes() == array.tobytes(), name
    config = api.config_of(json.loads(metadata["config"]))
    assert config.to_dict() == tiny_config(**TINY).to_dict()
    assert json.loads(metadata["step"]) == 3
    assert json.loads(metadata["averaged"]) is True
    assert set(metadata) == {"config", "step", "averaged", "mae_jax"}


def test_an_encoder_without_a_decoder_is_exported(workdir, tmp_path):
    model = api.load(workdir)
    params = {"encoder": model.params["encoder"]}
    save(tmp_path / "encoder", model.config, params, parts=["encoder"])
    program = write(tmp_path / "encoder", tmp_path / "a.stablehlo")
    assert program == write(workdir, tmp_path / "b.stablehlo")  # as the decoder is not in either
    write(tmp_path / "encoder", tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert {name.partition("/")[0] for name in file.keys()} == {"encoder"}  # noqa: SIM118


def refusal(capsys, *argv):
    """Run, expect status 2, and return the one line."""
    assert export.main([str(argument) for argument in argv]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    return last


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--out=a.stablehlo"], "--checkpoint: expected a folder, got nothing"),
        (["--checkpoint=x"], "--out=: expected a name that ends in .stablehlo or .safetensors"),
        (["--checkpoint=x", "--out=a.onnx"], "--out=a.onnx: expected a name that ends in "),
        (["--checkpoint=x", "--out=.stablehlo"], "--out=.stablehlo: expected a name that ends in"),
        (["--chekpoint=x"], "--chekpoint: there is no such flag; did you mean --checkpoint?"),
        (["--pool=max"], "argument --pool: invalid choice: 'max'"),
        (
            ["--checkpoint=x", "--out=a.safetensors", "--pool=cls"],
            "--pool=cls: a .safetensors file holds parameters, no program",
        ),
        (["--checkpoint=/no/such", "--out=a.stablehlo"], "/no/such: expected the folder of a run"),
    ],
)
def test_a_wrong_flag_is_refused(capsys, argv, message):
    assert message in refusal(capsys, *argv)


def test_what_does_not_fit_is_refused(workdir, classifier, tmp_path, capsys, monkeypatch):
    out = f"--out={tmp_path}/new/a.stablehlo"
    headless = write_checkpoint(tmp_path / "run", tiny_config(model__use_cls_token="False"))
    for run, pool, message in (
        (workdir, "logits", "expected mean, tokens, cls of this pre-trained model"),
        (headless, "cls", "expected mean, tokens of this pre-trained model"),
        (classifier, "tokens", "expected mean, logits of this classifier"),
    ):
        last = refusal(capsys, f"--checkpoint={run}", out, f"--pool={pool}")
        assert f"--pool={pool}: {message}" in last
    monkeypatch.setattr(portable, "LARGEST", 1000)
    last = refusal(capsys, f"--checkpoint={workdir}", out)
    assert "expected an encoder below 0.00 GB" in last
    assert last.endswith("take .safetensors")
    assert not (tmp_path / "new").exists()
    last = refusal(capsys, f"--checkpoint={workdir}", "--out=/dev/null/a.safetensors")
    assert "--out: cannot write /dev/null/a.safetensors: File exists" in last
