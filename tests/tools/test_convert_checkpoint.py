"""Conversion from the command line, with files that need no PyTorch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mae_jax import api
from mae_jax.convert import outgoing, weights
from mae_jax.convert.families.mae import OFFICIAL
from mae_jax.tools import convert_checkpoint
from tests.checkpoints import tiny_config, write_checkpoint
from tests.convert import cases
from tests.helpers import environment


def convert(*argv: object) -> None:
    assert convert_checkpoint.main([str(word) for word in argv]) == 0


def refusal(capsys, *argv: object) -> str:
    """Run, expect status 2, and return the one line on stderr."""
    assert convert_checkpoint.main([str(word) for word in argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def written(path, parts=cases.FULL, **fields):
    """Write random weights as a checkpoint of ours."""
    made = cases.make(parts, **fields)
    weights.write(path, made, "test")
    return made


@pytest.mark.parametrize(
    ("parts", "fields", "to"),
    [
        (cases.FULL, {}, "transformers"),
        (cases.ENCODER, {"positions": "learned"}, "transformers"),
        (cases.HEAD, {"pooling": "cls"}, "transformers"),
        (cases.ENCODER, {"use_cls_token": False}, "timm"),
        (cases.HEAD, {"pooling": "mean", "positions": "learned"}, "timm"),
    ],
    ids=["full", "encoder", "classifier", "timm encoder", "timm classifier"],
)
def test_ours_theirs_and_back_are_the_same_bits(tmp_path, capsys, parts, fields, to):
    made = written(tmp_path / "ours", parts, **fields)
    convert(tmp_path / "ours", tmp_path / "theirs", f"--to={to}")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{tmp_path}/ours: a checkpoint of ours, step 0"
    assert said[-1] == f"wrote {tmp_path}/theirs ({to})"
    told = [] if to == "transformers" else cases.FLAGS
    convert(tmp_path / "theirs", tmp_path / "back", *told)
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {tmp_path}/back (mae_jax)"
    back, _ = weights.read(str(tmp_path / "back"))
    cases.assert_same(back.params, made.params)
    assert back.parts == parts
    convert(tmp_path / "back", tmp_path / "again", f"--to={to}")
    file = "model.safetensors" if to == "transformers" else ""
    cases.assert_same(load_file(tmp_path / "theirs" / file), load_file(tmp_path / "again" / file))


@pytest.mark.parametrize("name", ["hivit_relative", "mixmim", "swin"])
def test_the_authors_files_of_other_methods_are_read(tmp_path, capsys, name):
    made = cases.make_tiny(name, cases.HEAD)
    state = outgoing.state_of(made, outgoing.layout_of(made, "official"))
    save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, tmp_path / "theirs")
    model = made.config.model
    flags = [f"--num_heads={model.num_heads}", "--image_size={},{}".format(*model.image_size)]
    if "window_size" in model:
        flags.append(f"--window_size={model.window_size}")
    convert(tmp_path / "theirs", tmp_path / "ours", *flags)
    assert f"{len(state)} read, all mapped" in capsys.readouterr().out
    loaded = api.load(tmp_path / "ours")
    cases.assert_same(weights.flat(loaded.params), made.params)
    assert loaded.module == weights.model_of(made.config)
    for to in ("timm", "transformers"):
        message = refusal(capsys, tmp_path / "ours", tmp_path / "new", f"--to={to}")
        assert message.startswith("error: --to: expected official, the only kind of file that")
    assert not (tmp_path / "new").exists()


def test_a_converted_model_loads_and_draws(tmp_path):
    made = written(tmp_path / "ours", norm_pix_loss=False)
    convert(tmp_path / "ours", tmp_path / "theirs", "--to=transformers")
    convert(tmp_path / "theirs", tmp_path / "back")
    model = api.load(tmp_path / "back")
    assert model.config.model.norm_pix_loss is False
    images = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3), dtype=np.uint8)
    plan = model.plan(2)
    mine = api.load(tmp_path / "ours")
    np.testing.assert_array_equal(model.reconstruct(images, plan), mine.reconstruct(images, plan))
    assert model.config.model.to_dict() == made.config.model.to_dict()


def test_the_checkpoint_says_where_it_is_from(tmp_path):
    written(tmp_path / "ours", cases.ENCODER)
    convert(tmp_path / "ours", tmp_path / "theirs.st", "--to=timm")
    convert(tmp_path / "theirs.st", tmp_path / "back", *cases.FLAGS)
    checkpoints = weights.Checkpoints(tmp_path / "back" / "checkpoints", read_only=True)
    meta = checkpoints.read_json(0, "meta")
    checkpoints.close()
    assert meta["source"] == "theirs.st"
    assert meta["parts"] == ["encoder"]
    assert meta.keys() == {"config", "mae_jax", "jax", "source", "parts"}
    assert api.load(tmp_path / "back").params.keys() == {"encoder"}


def test_a_run_is_converted_by_its_average_and_one_step_by_its_number(tmp_path, capsys):
    run = write_checkpoint(tmp_path / "run", tiny_config(), steps=(3, 5), averaged=True)
    convert(run, tmp_path / "newest", "--to=timm")
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("a checkpoint of ours, step 5, averaged weights")
    assert said[-1].endswith("newest (timm, without the decoder)")
    loaded = api.load(run)
    theirs = load_file(tmp_path / "newest")
    kernel = loaded.params["encoder"]["block_01"]["mlp"]["fc1"]["kernel"]
    np.testing.assert_array_equal(theirs["blocks.1.mlp.fc1.weight"], np.asarray(kernel).T)
    assert not any(name.startswith(("decoder", "mask")) for name in theirs)
    convert(run / "checkpoints" / "3", tmp_path / "third", "--to=timm")
    assert "step 3" in capsys.readouterr().out


def timm_file(path, **changes):
    """Write an encoder with timm's names; a change of None leaves an array out."""
    state = outgoing.state_of(cases.make(cases.ENCODER), OFFICIAL)
    state = {k: np.ascontiguousarray(v) for k, v in state.items()} | changes
    save_file({k: v for k, v in state.items() if v is not None}, path)
    return path


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"norm.bias": None}, [], "norm.bias is missing"),
        ({"extra": np.zeros(2, np.float32)}, [], "extra has no place in this model"),
        ({"norm.bias": np.zeros(2, np.float32)}, [], "norm.bias: expected shape [16], got [2]"),
        ({"norm.bias": np.zeros(16, np.float16)}, [], "norm.bias: expected float32, got F16"),
        ({}, ["--image_size=12,16"], "--image_size: expected height,width of 9 patches"),
        ({}, ["--num_heads=3"], "model.embed_dim 16 must be a positive multiple of 4 and of"),
        ({}, ["--ignore=head.*"], "--ignore=head.*: no array has such a name"),
        ({}, ["--to=official"], "--image_size"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(tmp_path, capsys, changes, flags, message):
    source = timm_file(tmp_path / "theirs", **changes)
    if "--to=official" in flags:  # a model without a class token, by which the official code goes
        written(tmp_path / "ours", cases.ENCODER, use_cls_token=False)
        source, cases_flags, message = tmp_path / "ours", [], "has a class token"
    else:
        cases_flags = cases.FLAGS
    before = sorted(tmp_path.rglob("*"))
    assert message in refusal(capsys, source, tmp_path / "new", *cases_flags, *flags)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_ignored_array_is_left_out(tmp_path):
    source = timm_file(tmp_path / "theirs", extra=np.zeros(2, np.float16))
    convert(source, tmp_path / "new", *cases.FLAGS, "--ignore=ex*")
    assert (tmp_path / "new").is_dir()


def test_what_is_there_is_not_overwritten(tmp_path, capsys):
    source = timm_file(tmp_path / "theirs")
    (tmp_path / "new").mkdir()
    message = refusal(capsys, source, tmp_path / "new", *cases.FLAGS)
    assert message.endswith("new is there already; expected the name of something new")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("parts", "fields", "to", "message"),
    [
        (cases.ENCODER, {"use_cls_token": False}, "transformers", "a ViT of transformers has a"),
        (cases.FULL, {"image_size": (8, 16)}, "transformers", "takes square images"),
        (cases.HEAD, {"pooling": "mean"}, "transformers", "takes the class token, 'cls'"),
        (cases.FULL, {"mask_tokens_in_encoder": True}, "timm", "other libraries have no such"),
        (cases.FULL, {}, "mae_jax", "is a checkpoint of ours already"),
    ],
)
def test_what_others_have_not_is_refused(tmp_path, capsys, parts, fields, to, message):
    if "mask_tokens_in_encoder" in fields:
        config = tiny_config(model__mask_tokens_in_encoder="True")
        write_checkpoint(tmp_path / "ours", config)
    else:
        written(tmp_path / "ours", parts, **fields)
    capsys.readouterr()
    assert message in refusal(capsys, tmp_path / "ours", tmp_path / "new", f"--to={to}")
    assert [child.name for child in tmp_path.iterdir()] == ["ours"]


def test_flags_that_a_checkpoint_of_ours_tells_itself_are_refused(tmp_path, capsys):
    written(tmp_path / "ours", cases.ENCODER)
    for flag in ("--norm_pix_loss=false", "--ignore=x", "--image_size=12"):
        message = refusal(capsys, tmp_path / "ours", tmp_path / "new", "--to=timm", flag)
        assert message.startswith(f"error: {flag.split('=')[0]}: {tmp_path}/ours is a checkpoint")
    assert "--to: expected official, transformers, timm, for" in refusal(
        capsys, tmp_path / "ours", tmp_path / "new"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["x"], "expected SRC and DST: what to convert, and what to write"),
        (["x", "y", "--too=timm"], "--too: there is no such flag; did you mean --to?"),
        (["x", "y", "--to=torch"], "invalid choice: 'torch'"),
        (["x", "y", "--norm_pix_loss=yes"], "expected true or false, got 'yes'"),
        (["x", "y", "--image_size=1,2,3"], "expected height,width in pixels, got '1,2,3'"),
        (["x", "y", "--image_size=0"], "expected height,width in pixels, got '0'"),
        (["x", "y", "--num_heads=-1"], "expected a number of at least 1, got '-1'"),
        (["x", "y", "--window_size=big"], "expected a number of at least 1, got 'big'"),
        (["x", "y", "--compat_decoder_order=1"], "expected true or false, got '1'"),
        (["/no/such", "/no/new"], "/no/such: expected a file or a folder of weights, got none"),
    ],
)
def test_a_wrong_flag_is_refused(capsys, argv, message):
    assert message in refusal(capsys, *argv)


def test_a_conversion_without_torch_files_does_not_import_torch(tmp_path):
    source = timm_file(tmp_path / "theirs")
    code = (
        "import sys; from mae_jax.tools.convert_checkpoint import main\n"
        "print('STATUS', main(sys.argv[1:]), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "new"), *cases.FLAGS],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    assert "STATUS 0 False" in done.stdout
