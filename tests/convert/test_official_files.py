"""PyTorch files as the authors' code writes and loads them, of each method."""

from __future__ import annotations

import argparse

import numpy as np
import pytest

from mae_jax.convert import outgoing, weights
from mae_jax.tools import convert_checkpoint
from tests.convert import cases

pytestmark = pytest.mark.oracle


def convert(*argv: object) -> None:
    assert convert_checkpoint.main([str(word) for word in argv]) == 0


@pytest.mark.parametrize("parts", [cases.FULL, cases.HEAD], ids=["full", "classifier"])
@pytest.mark.parametrize("name", cases.METHODS)
def test_ours_theirs_and_back_are_the_same_bits(tmp_path, capsys, name, parts):
    import torch

    made = cases.make_tiny(name, parts)
    weights.write(tmp_path / "ours", made, "test")
    convert(tmp_path / "ours", tmp_path / "theirs.pth", "--to=official")
    order = "the authors' code gives this decoder another order" in capsys.readouterr().out
    assert order == (parts == cases.FULL and name in ("swin", "pvt"))
    stored = torch.load(tmp_path / "theirs.pth", weights_only=True)
    assert stored.keys() == {"model"}
    assert all(tensor.is_contiguous() for tensor in stored["model"].values())
    expected = outgoing.state_of(made, outgoing.layout_of(made, "official"))
    cases.assert_same({k: v.numpy() for k, v in stored["model"].items()}, expected)

    model = made.config.model
    args = argparse.Namespace(norm_pix_loss=True, input_size=model.image_size[0])
    torch.save({**stored, "args": args}, tmp_path / "trained.pth")
    flags = [f"--num_heads={model.num_heads}", "--image_size={},{}".format(*model.image_size)]
    if parts == cases.FULL:
        flags += [f"--decoder_num_heads={model.decoder_num_heads}"]
    if "frames" in model:
        flags += [f"--frames={model.frames}"]
    convert(tmp_path / "trained.pth", tmp_path / "back", *flags, "--window_size=8")
    back, _ = weights.read(str(tmp_path / "back"))
    cases.assert_same(back.params, made.params)
    convert(tmp_path / "back", tmp_path / "again.pth", "--to=official")
    again = torch.load(tmp_path / "again.pth", weights_only=True)["model"]
    for key, tensor in stored["model"].items():
        np.testing.assert_array_equal(again[key].numpy(), tensor.numpy())


def test_a_file_of_deepspeed_has_its_arrays_elsewhere(tmp_path):
    import torch

    made = cases.make_tiny("videomae", cases.HEAD)
    state = outgoing.state_of(made, outgoing.layout_of(made, "official"))
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in state.items()}
    torch.save({"module": tensors, "dp_world_size": 8}, tmp_path / "theirs.pt")
    flags = ["--num_heads=4", "--image_size=12,16", "--frames=6"]
    convert(tmp_path / "theirs.pt", tmp_path / "back", *flags)
    back, _ = weights.read(str(tmp_path / "back"))
    cases.assert_same(back.params, made.params)
