"""An entry of the compilation cache that a kill cut off is dropped, as JAX would warn of it for ever."""

import os
import zlib

import jax
import pytest

from pspinal_jax import environment


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache with an older entry, in use from the next start on; what JAX was configured with comes back."""
    (tmp_path / "older-cache").write_bytes(b"\x78 damaged too, but not by the newest kill")
    os.utime(tmp_path / "older-cache", (1, 1))
    monkeypatch.setenv(environment.CACHE_SWITCH, str(tmp_path))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    names += ("jax_persistent_cache_min_entry_size_bytes",)
    was = {name: jax.config.values[name] for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path
    for name, value in was.items():
        jax.config.update(name, value)


def test_a_folder_that_xla_cannot_name_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PSPINAL_JAX_CACHE", str(tmp_path / "caf\udce9"))
    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        for configured in (None, str(tmp_path / "caf\udce9")):
            jax.config.update("jax_compilation_cache_dir", configured)
            assert environment.enable_compilation_cache() is None
            assert jax.config.values["jax_compilation_cache_dir"] is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (zlib.compress(b"program" * 99), True),
        (zlib.compress(b"program" * 99)[:-5], False),
        (b"", False),
        (b"(\xb5/\xfd, of zstandard", True),
    ],
)
def test_the_newest_entry_is_dropped_only_if_it_was_cut_off(folder, content, kept):
    (folder / "newest-cache").write_bytes(content)
    assert environment.enable_compilation_cache() == folder
    assert (folder / "newest-cache").exists() == kept
    assert (folder / "older-cache").exists()
