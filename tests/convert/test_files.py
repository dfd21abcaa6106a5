"""Reading and writing files without PyTorch: what is damaged or strange is refused in one line."""

from __future__ import annotations

import json
import struct
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from mae_jax.convert import files
from mae_jax.errors import ConfigError

STATE = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(1, np.float32)}


def refusal(path, ignore=()) -> str:
    with pytest.raises(ConfigError) as caught:
        files.read(path, ignore)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def safetensors_file(path, header: bytes, data: bytes = b"", length: int | None = None):
    size = struct.pack("<Q", len(header) if length is None else length)
    path.write_bytes(size + header + data)
    return path


def test_a_safetensors_file_is_known_by_its_contents(tmp_path):
    path = tmp_path / "weights.pth"
    files.write_safetensors(path, {"a.weight": STATE["a.weight"].T, "b": STATE["b"]})
    stored = files.read(path)
    assert stored.kind == "safetensors file"
    assert stored.name == "weights.pth"
    np.testing.assert_array_equal(stored.state["a.weight"], STATE["a.weight"].T)
    assert stored.state.keys() == STATE.keys()


def test_a_safetensors_file_whose_length_looks_like_a_pickle_is_known(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(0x0280)
    path = safetensors_file(tmp_path / "x", header, np.ones(1, np.float32).tobytes())
    assert path.read_bytes().startswith(b"\x80\x02")  # protocol 2
    assert files.read(path).state == {"a": 1}


@pytest.mark.parametrize("content", [b"", b"text", b"\0" * 64, b"GIF89a" + b"\0" * 50])
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert "expected a PyTorch or a safetensors file, it is neither" in refusal(path)


def test_nothing_there_is_refused(tmp_path):
    assert "expected a file or a folder of weights, got none there" in refusal(tmp_path / "no")


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (b"{}", 2**62),
        (b"{}", 2**64 - 1),
        (b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', None),  # no data
        (b'{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,16]}}', None),
        (b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}', None),
        (b'{"a":{"dtype":"F99","shape":[4],"data_offsets":[0,16]}}', None),
        (b'{"a":', None),
        (b"{" * 100_000, None),
    ],
)
def test_a_damaged_safetensors_file_is_refused(tmp_path, header, length):
    path = safetensors_file(tmp_path / "x", header, length=length)
    assert "a damaged safetensors file: " in refusal(path)


def test_a_safetensors_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "x"
    save_file(STATE, path)
    whole = path.read_bytes()
    for size in (4, 9, 40, len(whole) - 1):
        path.write_bytes(whole[:size])
        refusal(path)


def test_an_index_is_of_integers_and_nothing_else(tmp_path):
    index = np.arange(4, dtype=np.int64).reshape(2, 2)
    name = "layers.0.attn.relative_position_index"
    path = tmp_path / "x"
    save_file({name: index, **STATE}, path)
    read = files.read(path).state[name]
    np.testing.assert_array_equal(read, index)
    assert read.dtype == np.int64
    save_file({name: index.astype(np.float32)}, path)
    assert refusal(path).endswith(f"{name}: expected int64, got F32")


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F64", "I64"])
def test_other_numbers_than_float32_are_refused_by_name(tmp_path, dtype):
    size = {"F16": 2, "BF16": 2}.get(dtype, 8)
    entry = {"dtype": dtype, "shape": [1], "data_offsets": [0, size]}
    path = safetensors_file(tmp_path / "x", json.dumps({"z.b": entry}).encode(), b"\0" * size)
    assert refusal(path) == f"{path}: z.b: expected float32, got {dtype}"
    assert files.read(path, ["z.*"]).state == {}


def test_names_to_ignore_must_be_there(tmp_path):
    save_file(STATE, tmp_path / "x")
    assert files.read(tmp_path / "x", ["b"]).state.keys() == {"a.weight"}
    assert files.read(tmp_path / "x", ["a.*", "[ab]"]).state == {}
    with pytest.raises(ConfigError, match="--ignore=B: no array has such a name"):
        files.read(tmp_path / "x", ["b", "B"])


def test_a_folder_gives_its_settings(tmp_path):
    folder = tmp_path / "deep"
    files.write_folder(folder, STATE, {"model_type": "vit"})
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    stored = files.read(folder)
    assert (stored.name, stored.kind) == ("deep", "folder")
    assert stored.config == {"model_type": "vit"}
    assert stored.preprocessor == {"image_mean": [0.5]}
    np.testing.assert_array_equal(stored.state["a.weight"], STATE["a.weight"])


def sharded(folder, **weight_map):
    folder.mkdir()
    for number, (name, array) in enumerate(STATE.items()):
        save_file({name: array}, folder / f"part-{number}.safetensors")
    index = {"a.weight": "part-0.safetensors", "b": "part-1.safetensors"} | weight_map
    (folder / files.SHARDS).write_text(json.dumps({"weight_map": index}))
    return folder


def test_shards_are_put_together(tmp_path):
    stored = files.read(sharded(tmp_path / "folder"))
    for name, array in STATE.items():
        np.testing.assert_array_equal(stored.state[name], array)


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("b", "../part-1.safetensors", "'../part-1.safetensors' is no file in this folder"),
        ("b", "part-2.safetensors", "'part-2.safetensors' is no file in this folder"),
        ("c", "part-1.safetensors", "part-1.safetensors: c is missing, though the index has it"),
        ("b", 3, "expected 'weight_map', a file for each array"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, name, file, message):
    folder = sharded(tmp_path / "folder", **{name: file})
    save_file(STATE, tmp_path / "part-1.safetensors")
    assert message in refusal(folder)


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff", "[" * 100_000])
def test_settings_that_are_no_json_object_are_refused(tmp_path, text):
    files.write_folder(tmp_path / "folder", STATE, {})
    (tmp_path / "folder" / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"config\.json: expected (JSON: |a JSON object, got)"):
        files.read(tmp_path / "folder")


def test_a_folder_without_weights_is_refused(tmp_path):
    assert "expected a run of ours, or a folder with model.safetensors," in refusal(tmp_path)


def test_without_torch_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for start in (files.ZIP, files.PICKLE):
        path = tmp_path / "x"
        path.write_bytes(start + b"\0" * 20)
        assert refusal(path).endswith("need PyTorch: pip install 'mae_jax[convert]'")
