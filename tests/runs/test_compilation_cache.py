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
