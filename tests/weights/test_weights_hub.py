"""Weights from the hub: its cache without a network, and what is told without one. Nothing leaves this machine."""

import hashlib
import socket
import time

import numpy as np
import pytest
from safetensors.numpy import save

from pspinal_jax.errors import DataError
from pspinal_jax.weights import hub, read_state_dict

huggingface_hub = pytest.importorskip("huggingface_hub")
from huggingface_hub import constants  # noqa: E402

NAME = "hf:somebody/some-net"
CONTENT = save({"w": np.float32([1, 2, 3])})


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        yield


def fill_cache(tmp_path, content, digest=None):
    """What the hub's client leaves behind: a blob named after the content's SHA-256, and a link to it."""
    folder = tmp_path / "hub" / "models--somebody--some-net"
    commit, digest = "a" * 40, digest or hashlib.sha256(content).hexdigest()
    for name in ("refs", "blobs", f"snapshots/{commit}"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "blobs" / digest).write_bytes(content)
    link = folder / "snapshots" / commit / "model.safetensors"
    link.symlink_to(f"../../blobs/{digest}")
    return link


def refusal(source=NAME):
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        read_state_dict(source)
    assert time.monotonic() - start < 8  # the deadline is 1.5 s, the hub's own client takes over 20
    assert str(caught.value).startswith(f"weights: {source} ") and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_cached_file_needs_no_network(tmp_path):
    fill_cache(tmp_path, CONTENT)
    np.testing.assert_array_equal(read_state_dict(NAME)["w"], [1, 2, 3])


def test_a_refused_connection_is_told_at_once():
    message = refusal()
    assert "is not in the hub's cache and cannot be fetched (" in message and "refused" in message
    assert message.endswith("fetch model.safetensors of it elsewhere and give that file, or run again with a network")


def test_a_server_that_never_answers_is_told_within_seconds(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "cannot be fetched (" in refusal()


def test_a_name_that_never_resolves_is_told_within_seconds(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(10))
    assert "(no answer within 1.5 s)" in refusal()


def test_offline_mode_is_told(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "(HF_HUB_OFFLINE is set)" in refusal()


@pytest.mark.parametrize("name", ["hf:", "hf:net", "hf:a/b/c", "hf:../etc/passwd", "hf:a b/c", "hf:a--b/c"])
def test_names_are_checked(name):
    assert "is not a name on the hub, expected hf:OWNER/NAME" in refusal(name)


@pytest.fixture
def download(monkeypatch, tmp_path):
    """The client's download replaced by one that leaves `held` in the cache, or raises it."""
    held = {}
    real = huggingface_hub.hf_hub_download

    def fake(repository, name, local_files_only=False):
        if local_files_only:
            return real(repository, name, local_files_only=True)
        if isinstance(held["what"], Exception):
            raise held["what"]
        return str(fill_cache(tmp_path, *held["what"]))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake)
    monkeypatch.setattr(hub, "problem_reaching", lambda url, seconds: None)
    return held


def test_a_download_is_kept(download):
    download["what"] = (CONTENT,)
    np.testing.assert_array_equal(read_state_dict(NAME)["w"], [1, 2, 3])
    del download["what"]
    np.testing.assert_array_equal(read_state_dict(NAME)["w"], [1, 2, 3])


def test_a_download_with_another_checksum_is_refused_and_not_kept(download, tmp_path):
    download["what"] = (CONTENT, "b" * 64)
    assert f"has SHA-256 {hashlib.sha256(CONTENT).hexdigest()}, expected {'b' * 64}; try again" in refusal()
    assert not [path for path in (tmp_path / "hub").rglob("*") if path.name in ("b" * 64, "model.safetensors")]


@pytest.mark.parametrize("error", [OSError("disk full\nand more"), RuntimeError("")])
def test_a_failed_download_is_told_in_one_line(download, error):
    download["what"] = error
    assert ("(disk full" if str(error) else "(RuntimeError)") in refusal()
