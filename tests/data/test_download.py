"""Downloads against a server of our own, and what a user is told where none answers."""

import dataclasses
import functools
import hashlib
import http.server
import socket
import threading
import time

import pytest
from raw_files import MNIST_NAMES, examples, write_raw

from pspinal_jax.data import load_data
from pspinal_jax.data.catalogue import CATALOGUE
from pspinal_jax.data.prepare import prepare_data_set
from pspinal_jax.errors import DataError
from pspinal_jax.recipes import DataConfig


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        self.server.requests.append(self.command + " " + self.path)


@pytest.fixture
def server(tmp_path):
    write_raw(tmp_path / "upstream", "mnist", examples(10))
    handler = functools.partial(Handler, directory=tmp_path / "upstream")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.requests = []
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def mnist_at(port, folder=None):
    """MNIST's entry with its addresses moved to this machine; with `folder`, the checksums of the files there."""
    downloads = []
    for item in CATALOGUE["mnist"].downloads:
        changes = {"url": f"http://127.0.0.1:{port}/{item.file}"}
        if folder is not None:
            content = (folder / item.file).read_bytes()
            changes |= {"sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}
        downloads.append(dataclasses.replace(item, **changes))
    return dataclasses.replace(CATALOGUE["mnist"], downloads=tuple(downloads))


def test_files_are_fetched_checked_and_kept(tmp_path, server):
    data_set = mnist_at(server.server_port, tmp_path / "upstream")
    prepare_data_set(data_set, tmp_path / "data")
    data = load_data(DataConfig("mnist", data_dir=tmp_path / "data"))
    assert (data.train.inputs[..., 0] == examples(10)["train"][0]).all()
    kept = tmp_path / "data" / "downloads" / "manual" / "mnist"
    assert sorted(path.name for path in kept.iterdir()) == sorted(MNIST_NAMES)
    assert len([line for line in server.requests if line.startswith("GET")]) == 4


def test_files_that_lie_there_whole_are_not_fetched_again(tmp_path, server):
    data_set = mnist_at(server.server_port, tmp_path / "upstream")
    kept = tmp_path / "data" / "downloads" / "manual" / "mnist"
    kept.mkdir(parents=True)
    for name in MNIST_NAMES[:3]:
        (kept / name).write_bytes((tmp_path / "upstream" / name).read_bytes())
    damaged = bytearray((kept / MNIST_NAMES[0]).read_bytes())
    damaged[50] ^= 1
    (kept / MNIST_NAMES[0]).write_bytes(damaged)
    (kept / "tmp1a2b3c").write_bytes(b"of a killed process")
    prepare_data_set(data_set, tmp_path / "data")
    fetched = [line.split("/")[-1] for line in server.requests if line.startswith("GET")]
    assert fetched == [MNIST_NAMES[0], MNIST_NAMES[3]]
    assert sorted(path.name for path in kept.iterdir()) == sorted(MNIST_NAMES)


def assert_refused(data_set, tmp_path, message):
    with pytest.raises(DataError, match=message) as caught:
        prepare_data_set(data_set, tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data" / "mnist").exists()
    assert not [path for path in tmp_path.glob("data/downloads/**/*") if path.is_file()]
    return str(caught.value)


def test_a_wrong_checksum_is_refused(tmp_path, server):
    message = assert_refused(mnist_at(server.server_port), tmp_path, "known hash: expected sha256:440fcabf")
    missing = f"{MNIST_NAMES[0]} is missing and cannot be fetched from 127.0.0.1:{server.server_port}"
    assert missing in message and "--raw DIR" in message


def test_a_file_that_is_gone_is_named(tmp_path, server):
    data_set = mnist_at(server.server_port, tmp_path / "upstream")
    (tmp_path / "upstream" / MNIST_NAMES[0]).unlink()
    assert_refused(data_set, tmp_path, rf"{MNIST_NAMES[0]} is missing .*404")


def assert_says_what_to_do(data_set, tmp_path):
    start = time.monotonic()
    message = assert_refused(
        data_set, tmp_path, r"^mnist: train-images-idx3-ubyte\.gz is missing and cannot be fetched"
    )
    assert time.monotonic() - start < 10
    assert message.endswith("into a folder DIR and run: pspinal-jax prepare mnist --raw DIR")
    assert all(name in message for name in MNIST_NAMES)
    assert not (tmp_path / "data").exists()


def test_a_refused_connection_is_told_at_once(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        assert_says_what_to_do(mnist_at(unused.getsockname()[1]), tmp_path)


def test_a_server_that_never_answers_is_told_within_seconds(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert_says_what_to_do(mnist_at(silent.getsockname()[1]), tmp_path)


def test_a_name_that_never_resolves_is_told_within_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(15))
    assert_says_what_to_do(mnist_at(9), tmp_path)
