"""Converted weights: what PyTorch and transformers make of them, and files that are refused."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax import api, recipes
from mae_jax.convert import files, incoming, outgoing, weights
from mae_jax.convert.families.mae import OFFICIAL
from mae_jax.convert.weights import Weights
from mae_jax.errors import ConfigError
from mae_jax.tools import convert_checkpoint
from tests.convert import cases
from tests.oracle import agreement, mae_case
from tests.weights import apply, random_params

pytestmark = pytest.mark.oracle

FULL_SIZES: dict[str, dict[str, Any]] = {
    "vit_b": {"size": "vit_b"},
    "vit_l": {"size": "vit_l"},
    "vit_h": {"size": "vit_h", "depth": 2, "decoder_depth": 2},  # fewer blocks, for memory
}


def convert(*argv: object) -> None:
    assert convert_checkpoint.main([str(word) for word in argv]) == 0


# ---------------------------------------------------------------- there and back, bit by bit


KINDS: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "official-full": (cases.FULL, {}, "official"),
    "official-encoder": (cases.ENCODER, {"positions": "learned"}, "official"),
    "official-mean": (cases.HEAD, {"pooling": "mean", "positions": "learned"}, "official"),
    "transformers-full": (cases.FULL, {}, "transformers"),
    "transformers-cls": (cases.HEAD, {"pooling": "cls", "num_classes": 1000}, "transformers"),
    "timm-encoder": (cases.ENCODER, {}, "timm"),
}
MORE_KINDS = KINDS | {
    "official-cls": (cases.HEAD, {"pooling": "cls"}, "official"),
    "timm-mean": (cases.HEAD, {"pooling": "mean"}, "timm"),
}


@pytest.mark.parametrize(
    ("size", "kind"),
    [("tiny", kind) for kind in MORE_KINDS] + [(s, kind) for s in FULL_SIZES for kind in KINDS],
)
def test_ours_theirs_and_back_are_the_same_bits(tmp_path, size, kind):
    parts, fields, to = MORE_KINDS[kind]
    made = cases.make(parts, **FULL_SIZES.get(size, {}), **fields)
    outgoing.WRITERS[to](tmp_path / "theirs", made)
    told = cases.TOLD if size == "tiny" else incoming.Told(norm_pix_loss=False)
    theirs = files.read(tmp_path / "theirs")
    back, _ = incoming.weights_of(theirs, told)
    assert back.parts == parts
    cases.assert_same(back.params, made.params)
    if size != "tiny":
        assert back.config.model.size == size
    weights.write(tmp_path / "ours", back, "test")
    stored, _ = weights.read(str(tmp_path / "ours"))
    outgoing.WRITERS[to](tmp_path / "again", stored)
    cases.assert_same(files.read(tmp_path / "again").state, theirs.state)


def test_a_file_is_what_the_official_code_loads(tmp_path):
    import torch

    made = cases.make(cases.FULL)
    weights.write(tmp_path / "ours", made, "test")
    convert(tmp_path / "ours", tmp_path / "new.pth", "--to=official")
    stored = torch.load(tmp_path / "new.pth", weights_only=True)
    assert stored.keys() == {"model"}
    assert all(tensor.is_contiguous() for tensor in stored["model"].values())
    expected = outgoing.state_of(made, OFFICIAL)
    cases.assert_same({k: v.numpy() for k, v in stored["model"].items()}, expected)


# ---------------------------------------------------------------- the same outputs


def fields_of(size: str) -> dict[str, Any]:
    fields = mae_case.SMALL if size == "small" else FULL_SIZES[size]
    return {**fields, "norm_pix_loss": False}  # the reconstruction is then what is predicted


def tolerance(size: str) -> float:
    return (agreement.SMALL if size == "small" else agreement.FULL_SIZE).predictions


def check(ours: np.ndarray, theirs: np.ndarray, allowed: float) -> None:
    share = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max() / allowed
    print(f"of its tolerance: {share:.3g}")
    assert ours.shape == theirs.shape
    assert share <= 1


def there_and_back(folder: Path, made: Weights, kind: Any) -> tuple[Any, api.Pretrained]:
    """Return transformers' model of our weights, and ours of the file that it saves."""
    weights.write(folder / "ours", made, "test")
    convert(folder / "ours", folder / "theirs", "--to=transformers")
    model, info = kind.from_pretrained(folder / "theirs", output_loading_info=True)
    assert {name: list(found) for name, found in info.items() if found} == {}
    assert model.config.layer_norm_eps == 1e-6
    model.save_pretrained(folder / "saved")
    convert(folder / "saved", folder / "back")
    loaded = api.load(folder / "back")
    cases.assert_same(weights.flat(jax.device_get(loaded.params)), made.params)
    return model.eval(), loaded


@pytest.mark.parametrize("size", ["small", "vit_b", "vit_l"])
def test_a_pretrained_model_computes_what_transformers_does(tmp_path, size):
    import torch
    from transformers import ViTMAEForPreTraining

    config = recipes.mae_pretrain()
    config.model.update(fields_of(size))
    params = mae_case.random_weights(weights.model_of(config), seed=5)
    made = Weights(config, cases.FULL, params)
    theirs, loaded = there_and_back(tmp_path, made, ViTMAEForPreTraining)
    assert theirs.config.norm_pix_loss is False
    module: Any = loaded.module
    image, noise = mae_case.random_inputs(module, 2, seed=6)
    pixels = torch.from_numpy(image).permute(0, 3, 1, 2)
    plan = module.plan(jax.random.key(0), 2, jnp.asarray(noise))
    with torch.no_grad():
        logits = theirs(pixel_values=pixels, noise=torch.from_numpy(noise)).logits
        theirs.config.mask_ratio = theirs.vit.config.mask_ratio = 0.0
        in_order = torch.arange(module.unit.count).expand(2, -1) / module.unit.count
        tokens = theirs.vit(pixel_values=pixels, noise=in_order).last_hidden_state
    images = apply(module, loaded.params, {"image": image}, plan, method="reconstruct")
    check(module.unit.split(images), logits.numpy(), tolerance(size))
    features = apply(module, loaded.params, {"image": image}, method="encode")
    check(features, tokens.numpy(), tolerance(size))


@pytest.mark.parametrize(
    ("size", "positions"),
    [("small", "learned"), ("small", "fixed"), ("vit_b", "learned"), ("vit_l", "learned")],
)
def test_a_classifier_computes_what_transformers_does(tmp_path, size, positions):
    import torch
    from transformers import ViTForImageClassification

    config = recipes.mae_pretrain()
    config.task = "finetune"
    config.model.update(fields_of(size) | {"positions": positions})
    config.model.num_classes, config.model.pooling = 7, "cls"
    module = weights.model_of(config)
    image = mae_case.random_inputs(module, 2, seed=6)[0]
    tree = random_params(module.init, jnp.asarray(image), seed=5)
    made = Weights(config, cases.HEAD, jax.device_get(weights.flat(tree)))
    theirs, loaded = there_and_back(tmp_path, made, ViTForImageClassification)
    with torch.no_grad():
        logits = theirs(pixel_values=torch.from_numpy(image).permute(0, 3, 1, 2)).logits
    assert logits.shape == (2, 7)
    check(apply(loaded.module, loaded.params, image), logits.numpy(), tolerance(size))


def test_an_encoder_is_a_vitmae_model(tmp_path):
    from transformers import ViTMAEModel

    made = cases.make(cases.ENCODER, positions="learned")
    theirs, loaded = there_and_back(tmp_path, made, ViTMAEModel)
    assert loaded.params.keys() == {"encoder"}
    table = theirs.embeddings.position_embeddings.detach().numpy()
    np.testing.assert_array_equal(table, made.params["encoder/pos_embed"])


def test_the_modules_of_transformers_in_memory_are_read_from_a_torch_file(tmp_path):
    import torch
    from transformers import ViTMAEForPreTraining

    made = cases.make(cases.FULL)
    theirs, _ = there_and_back(tmp_path, made, ViTMAEForPreTraining)
    torch.save(theirs.state_dict(), tmp_path / "state.bin")
    convert(tmp_path / "state.bin", tmp_path / "new", *cases.FLAGS)
    cases.assert_same(weights.read(str(tmp_path / "new"))[0].params, made.params)


def test_a_pooler_is_left_out_when_that_is_asked_for(tmp_path, capsys):
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ViTConfig(**sizes, intermediate_size=64, image_size=12, patch_size=4)
    ViTModel(config).save_pretrained(tmp_path / "theirs")
    argv = [str(tmp_path / "theirs"), str(tmp_path / "new")]
    assert convert_checkpoint.main(argv) == 2
    assert "pooler.dense.bias and 1 more have no place" in capsys.readouterr().err
    convert(*argv, "--ignore=pooler.*")
    said = capsys.readouterr().out
    assert "layer_norm_eps is 1e-12 in config.json" in said
    assert "positions  learned" in said


# ---------------------------------------------------------------- files of PyTorch


def tensors(made: Weights | None = None) -> dict[str, Any]:
    import torch

    state = outgoing.state_of(made or cases.make(cases.FULL), OFFICIAL)
    return {name: torch.from_numpy(np.array(array)) for name, array in state.items()}


def refusal(capsys, path: Path) -> str:
    """Convert, expect status 2, nothing written, and one line; return it."""
    before = sorted(path.parent.rglob("*"))
    assert convert_checkpoint.main([str(path), str(path.parent / "new"), *cases.FLAGS]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sorted(path.parent.rglob("*")) == before
    assert line.startswith(f"error: {path}: ")
    return line


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_of_the_training_script_is_read(tmp_path, capsys, zipped):
    import torch

    made = cases.make(cases.FULL)
    optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
    stored = {
        "model": tensors(made),
        "optimizer": optimizer.state_dict(),
        "epoch": 799,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(norm_pix_loss=True, model="mae_vit_base_patch16", lr=None),
    }
    torch.save(stored, tmp_path / "old.pth", _use_new_zipfile_serialization=zipped)
    convert(tmp_path / "old.pth", tmp_path / "new", *cases.FLAGS[1:])
    assert "target     normalised patches (args.norm_pix_loss in" in capsys.readouterr().out
    back, _ = weights.read(str(tmp_path / "new"))
    cases.assert_same(back.params, made.params)
    assert back.config.model.norm_pix_loss is True


def test_parameters_and_a_state_at_the_top_are_read(tmp_path):
    import torch

    made = cases.make(cases.ENCODER)
    state = {name: torch.nn.Parameter(tensor) for name, tensor in tensors(made).items()}
    torch.save(state, tmp_path / "top.pth")
    convert(tmp_path / "top.pth", tmp_path / "new", *cases.FLAGS)
    cases.assert_same(weights.read(str(tmp_path / "new"))[0].params, made.params)


class Command:
    """Runs a command when it is unpickled by pickle itself."""

    def __init__(self, mark: Path):
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._mark}",)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_a_file_that_would_run_a_command_is_refused(tmp_path, capsys, how):
    import torch

    mark = tmp_path / "mark"
    stored = {"model": tensors(), "args": Command(mark)}
    path = tmp_path / "bad.pth"
    if how == "pickle":
        path.write_bytes(pickle.dumps({"args": Command(mark)}, protocol=2))
    else:
        torch.save(stored, path, _use_new_zipfile_serialization=how == "zip")
    message = refusal(capsys, path)
    assert "refused, and nothing in it was run: " in message
    assert "GLOBAL posix.system" in message
    assert not mark.exists()
    if how == "pickle":  # the command is a real one
        pickle.loads(path.read_bytes())
        assert mark.exists()


def test_another_class_than_the_flags_is_refused(tmp_path, capsys):
    import torch

    torch.save({"model": tensors(), "args": Path("x")}, tmp_path / "bad.pth")
    assert "refused, and nothing in it was run" in refusal(capsys, tmp_path / "bad.pth")


@pytest.mark.parametrize("size", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_that_is_cut_is_refused(tmp_path, capsys, size, zipped):
    import torch

    path = tmp_path / "bad.pth"
    torch.save({"model": tensors()}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(size * len(whole))])
    refusal(capsys, path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_numbers_than_float32_are_refused_by_name(tmp_path, capsys, dtype):
    import torch

    state = tensors()
    state["blocks.1.attn.proj.weight"] = state["blocks.1.attn.proj.weight"].to(
        getattr(torch, dtype)
    )
    torch.save({"model": state}, tmp_path / "bad.pth")
    message = refusal(capsys, tmp_path / "bad.pth")
    assert message.endswith(f"blocks.1.attn.proj.weight: expected float32, got {dtype}")


def strange(name: str) -> Any:
    import torch

    return {
        "number": lambda: 3,
        "huge": lambda: torch.zeros(1).expand(2**40),
        "sparse": lambda: torch.eye(2).to_sparse(),
        "nothing": lambda: torch.empty(4, device="meta"),
    }[name]()


@pytest.mark.parametrize("name", ["number", "huge", "sparse", "nothing"])
def test_what_is_no_plain_tensor_is_refused_by_name(tmp_path, capsys, name):
    import torch

    torch.save({"model": {**tensors(), "norm.bias": strange(name)}}, tmp_path / "bad.pth")
    assert "norm.bias: expected a " in refusal(capsys, tmp_path / "bad.pth")


def test_a_file_without_a_state_is_refused(tmp_path, capsys):
    import torch

    for stored, message in (
        ([1, 2], "expected a dict of tensors, got list"),
        ({"epoch": 3}, "epoch: expected a tensor, got int"),
    ):
        torch.save(stored, tmp_path / "bad.pth")
        assert message in refusal(capsys, tmp_path / "bad.pth")


def test_a_linear_probe_is_read_as_its_encoder(tmp_path):
    import torch

    state = tensors(cases.make(cases.ENCODER))
    state |= {"head.0.running_mean": torch.zeros(16), "head.1.weight": torch.zeros(5, 16)}
    torch.save({"model": state}, tmp_path / "probe.pth")
    with pytest.raises(ConfigError, match=r"head\.0\.running_mean and 1 more have no place"):
        incoming.weights_of(files.read(tmp_path / "probe.pth"), cases.TOLD)
    stored = files.read(tmp_path / "probe.pth", ["head.*"])
    assert incoming.weights_of(stored, cases.TOLD)[0].parts == cases.ENCODER
