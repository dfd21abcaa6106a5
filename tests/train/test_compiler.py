"""Where compiled programs are kept."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from mae_jax.errors import ConfigError
from mae_jax.train import compiler
from tests.helpers import kept_programs


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    with kept_programs(None):
        yield


def test_programs_are_kept_in_the_folder(tmp_path):
    folder = tmp_path / "programs"
    assert compiler.keep_programs(str(folder)) == str(folder)
    jax.jit(lambda x: jnp.sin(x) * 7.0)(1.0)
    assert list(folder.iterdir())


def test_auto_is_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.keep_programs("auto") == str(tmp_path / "mae_jax" / "compiled")
    assert (tmp_path / "mae_jax" / "compiled").is_dir()


def test_auto_is_jaxs_own_setting_where_there_is_one(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert compiler.keep_programs("auto") == str(tmp_path)


def test_auto_that_cannot_be_written_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compiler.keep_programs("auto") == ""
    assert jax.config.jax_compilation_cache_dir is None


def test_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.compilation_cache .*file: expected a folder"):
        compiler.keep_programs(str(tmp_path / "file"))


def test_empty_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.keep_programs("") == ""
    jax.jit(lambda x: jnp.cos(x) * 5.0)(1.0)
    assert not list(tmp_path.iterdir())
