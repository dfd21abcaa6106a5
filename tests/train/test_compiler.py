"""How programs are compiled, and where they are kept."""

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


def test_options_of_the_platform_are_known_to_this_jax_and_used():
    lowered = jax.jit(lambda x: jnp.tan(x) * 3.0).lower(1.0)
    asked = []

    class Noting:
        def compile(self, compiler_options=None):
            asked.append(compiler_options)
            return lowered.compile(compiler_options)

    assert compiler.compile_step(Noting(), "cpu")(1.0) == pytest.approx(3 * 1.5574077)
    assert asked == [compiler.OPTIONS["cpu"]]
    compiler.compile_step(Noting(), "tpu")
    compiler.compile_step(Noting(), "cpu", remat=True)
    assert asked[1:] == [None, None]


def test_an_option_that_is_gone_costs_no_run(monkeypatch):
    lowered = jax.jit(lambda x: jnp.tan(x) * 3.0).lower(1.0)
    monkeypatch.setitem(compiler.OPTIONS, "cpu", {"xla_cpu_no_such_option": True})
    assert compiler.compile_step(lowered, "cpu")(0.0) == 0.0


def test_other_errors_of_compiling_are_not_swallowed():
    class Failing:
        def compile(self, compiler_options=None):
            raise jax.errors.JaxRuntimeError("INTERNAL: another mistake")

    with pytest.raises(jax.errors.JaxRuntimeError, match="another mistake"):
        compiler.compile_step(Failing(), "cpu")
