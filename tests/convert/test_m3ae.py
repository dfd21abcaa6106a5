"""M3AE's pickles: names by hand, there and back, and that nothing in a file is run."""

from __future__ import annotations

import collections
import os
import pickle
import sys
import types
from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util

from mae_jax import build
from mae_jax.config import load_config
from mae_jax.convert import files, linen, outgoing, weights
from mae_jax.convert.incoming import weights_of
from mae_jax.convert.reader import Told
from mae_jax.convert.weights import Weights
from mae_jax.errors import ConfigError
from mae_jax.models.transfer import transfer_encoder
from tests.convert import cases

TINY: dict[str, Any] = {
    "size": "small",
    "image_size": (12, 16),
    "patch_size": 4,
    "vocabulary_size": 13,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 4,
    "decoder_embed_dim": 8,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "released": {},
    "deep heads": {"output_head_depth": 2},
    "images alone": {"vocabulary_size": 0, "use_type_vectors": False},
}
TOLD = Told(image_size=(12, 16), num_heads=4, decoder_num_heads=2)


def tiny(kind: str = "released") -> Weights:
    return cases.make(method="m3ae", **TINY | KINDS[kind])


def tree_of(path: Any) -> dict[str, Any]:
    return pickle.loads(path.read_bytes())["state"]["params"]["params"]


def flat(tree: dict[str, Any], start: str = "") -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        inner = isinstance(value, dict)
        found |= flat(value, f"{start}{name}/") if inner else {start + name: value}
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_ours_theirs_and_back_are_the_same_bits_and_the_same_model(kind, tmp_path):
    made = tiny(kind)
    outgoing.write_official(tmp_path / "model.pkl", made)
    stored = files.read(tmp_path / "model.pkl")
    assert stored.kind == "pickle of a linen tree"
    back, lines = weights_of(stored, TOLD)
    cases.assert_same(back.params, made.params)
    assert weights.model_of(back.config) == weights.model_of(made.config)
    assert back.config.data.mean == (0.5762, 0.5503, 0.5213)
    assert "(CC12M's, as the released models have)" in "\n".join(lines)
    outgoing.write_official(tmp_path / "again.pkl", back)
    assert (tmp_path / "again.pkl").read_bytes() == (tmp_path / "model.pkl").read_bytes()


def test_the_authors_baseline_is_fine_tuned_without_type_vectors(tmp_path):
    made = tiny("images alone")
    outgoing.write_official(tmp_path / "model.pkl", made)
    back, _ = weights_of(files.read(tmp_path / "model.pkl"), TOLD)
    source = weights.model_of(back.config).encoder
    params = traverse_util.unflatten_dict(back.params, sep="/")["encoder"]
    sizes = {name: TINY[name] for name in ("patch_size", "embed_dim", "depth", "num_heads")}
    fields = {f"model.{name}": str(value) for name, value in sizes.items()}
    fields |= {"model.image_size": "12,16"}

    def taken(use: str) -> Any:
        fields["model.use_type_vectors"] = use
        classifier = build.build_model(load_config("m3ae_finetune", fields))
        images = np.zeros((1, *classifier.example()["image"].shape), np.float32)
        fresh = jax.eval_shape(classifier.init, jax.random.key(0), images)["params"]["encoder"]
        return transfer_encoder(params, source, classifier.encoder, fresh)

    np.testing.assert_array_equal(taken("False")["cls_token"], params["cls_token"])
    message = "^model.use_type_vectors True: the encoder to start from has not been trained with"
    with pytest.raises(ConfigError, match=message):
        taken("True")


def test_names_and_shapes_are_those_of_the_authors_tree(tmp_path):
    made = tiny()
    outgoing.write_official(tmp_path / "model.pkl", made)
    found = flat(tree_of(tmp_path / "model.pkl"))
    shapes = {name: array.shape for name, array in found.items()}
    expected: dict[str, tuple[int, ...]] = {
        "text_embedding/embedding": (13, 16),
        "image_embedding/kernel": (48, 16),
        "image_embedding/bias": (16,),
        "cls_token": (1, 1, 16),
        "decoder_input_projection/kernel": (16, 8),
        "decoder_input_projection/bias": (8,),
        "decoder_image_output/Dense_0/kernel": (8, 48),
        "decoder_image_output/Dense_0/bias": (48,),
        "decoder_text_output/Dense_0/kernel": (8, 13),
        "decoder_text_output/Dense_0/bias": (13,),
    }
    for half, d, depth in (("encoder", 16, 2), ("decoder", 8, 1)):
        norms = [f"{half}/LayerNorm_0"]
        for i in range(depth):
            block = f"{half}/Block_{i}"
            norms += [f"{block}/LayerNorm_0", f"{block}/LayerNorm_1"]
            for name, inner, outer in (
                ("Attention_0/Dense_0", d, 3 * d),
                ("Attention_0/Dense_1", d, d),
                ("TransformerMLP_0/fc1", d, 4 * d),
                ("TransformerMLP_0/fc2", 4 * d, d),
            ):
                expected |= {f"{block}/{name}/kernel": (inner, outer)}
                expected |= {f"{block}/{name}/bias": (outer,)}
        expected |= {f"{norm}/{leaf}": (d,) for norm in norms for leaf in ("scale", "bias")}
        for kind in ("image", "text"):
            expected[f"{half}_{kind}_type_embedding"] = (1, 1, d)
            expected[f"{kind}_mask_embedding"] = (1, 1, 8)
    assert shapes == expected
    pairs = {
        "encoder/patch_embed/kernel": "image_embedding/kernel",
        "encoder/block_01/attn/qkv/kernel": "encoder/Block_1/Attention_0/Dense_0/kernel",
        "decoder/block_00/norm2/scale": "decoder/Block_0/LayerNorm_1/scale",
        "decoder/text_mask": "text_mask_embedding",
        "decoder/image_type": "decoder_image_type_embedding",
    }
    for ours, theirs in pairs.items():
        np.testing.assert_array_equal(made.params[ours], found[theirs])


def their_class(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """Return a class that is called `name`, with its module, while the patch lasts."""
    module, _, own = name.rpartition(".")
    made = type(own, (), {"__module__": module, "__init__": lambda self, *args: None})
    parts = module.split(".")
    for number in range(1, len(parts) + 1):
        package = types.ModuleType(".".join(parts[:number]))
        monkeypatch.setitem(sys.modules, package.__name__, package)
    setattr(sys.modules[module], own, made)
    return made


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_state_of_their_class_is_read_without_it(protocol, tmp_path):
    made = tiny()
    path = tmp_path / "model.pkl"
    outgoing.write_official(path, made)
    tree = tree_of(path)
    with pytest.MonkeyPatch.context() as patch:
        state = their_class(patch, "m3ae.model.M3AETrainState")()
        adam = their_class(patch, "optax._src.transform.ScaleByAdamState")()
        state.__dict__ |= {
            "step": 3,
            "params": {"params": tree},
            "opt_state": (adam, np.float32(1)),
        }
        flags = collections.OrderedDict(clip=1.0)
        stored = {"step": 3, "epoch": 1, "variant": {"flags": flags}, "state": state}
        path.write_bytes(pickle.dumps(stored, protocol=protocol))
    assert "m3ae.model" not in sys.modules
    back, _ = weights_of(files.read(path), TOLD)
    cases.assert_same(back.params, made.params)


def refusal(path: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        files.read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


class _Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("place", ["state", "variant"])
def test_another_class_is_refused_by_name_and_not_called(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"step": 0, place: _Evil()}, protocol=4))
    name = f"{os.mkdir.__module__}.mkdir"
    assert refusal(path).endswith(
        f"refused, and nothing in it was run: it names {name}, which no such file needs"
    )
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["eval", "exec", "open", "__import__"])
def test_functions_of_python_are_refused(name, tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(b"\x80\x04c__builtin__\n" + name.encode() + b"\n.")
    assert f"builtin__.{name}" in refusal(path) or f"builtins.{name}" in refusal(path)


def test_stand_ins_do_nothing(tmp_path):
    """What would be a call of jax or cloudpickle is an object that only keeps its arguments."""
    made = linen.StandIn("rm", flags=1)
    made.append(1)
    made["a"] = 2
    assert isinstance(made(3), linen.StandIn)
    assert made.args == ("rm",)
    path = tmp_path / "model.pkl"
    call = b"\x80\x04cjax.numpy\nfromfile\n(V/etc/passwd\ntR."
    path.write_bytes(call)
    assert "expected state.params['params'] of M3AE, got none" in refusal(path)


def test_damaged_files_are_refused(tmp_path):
    outgoing.write_official(tmp_path / "whole.pkl", tiny())
    whole, path = (tmp_path / "whole.pkl").read_bytes(), tmp_path / "model.pkl"
    for size in (12, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "refused, and nothing in it was run" in refusal(path)


def test_other_numbers_than_float32_are_refused(tmp_path):
    path = tmp_path / "model.pkl"
    for value, kind in ((np.zeros((1, 1, 4), np.float16), "float16"), ("text", "str")):
        stored = {"state": {"params": {"params": {"cls_token": value}}}}
        path.write_bytes(pickle.dumps(stored, protocol=4))
        assert refusal(path).endswith(f"cls_token: expected float32, got {kind}")


def test_what_nobody_else_has_is_refused():
    with pytest.raises(ConfigError, match=r"model\.positions 'learned': the authors' M3AE"):
        cases.make(method="m3ae", **TINY, positions="learned")
    with pytest.raises(ConfigError, match=r"model\.output_head_depth 4: expected at most 3"):
        cases.make(method="m3ae", **TINY, output_head_depth=4)
    with pytest.raises(ConfigError, match=r"^--to: expected official, the only kind of file that"):
        outgoing.layout_of(tiny(), "timm")


def test_the_image_size_is_the_released_one_unless_told(tmp_path):
    made = tiny()
    outgoing.write_official(tmp_path / "model.pkl", made)
    told = Told(num_heads=4, decoder_num_heads=2)
    back, lines = weights_of(files.read(tmp_path / "model.pkl"), told)
    assert back.config.model.image_size == (256, 256)
    assert any("images of 256 x 256, as released: the file does not tell" in line for line in lines)
