"""The coordinator's port is asked for before JAX, which would end with a segmentation fault."""

import re
import socket

import pytest

from pspinal_jax.distributed.join import check_port
from pspinal_jax.errors import RunError


@pytest.fixture
def port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken, taken.getsockname()[1]


def test_a_free_port_stays_free(port):
    taken, number = port
    taken.close()
    check_port(f"127.0.0.1:{number}")
    check_port(f"127.0.0.1:{number}")


@pytest.mark.parametrize("bind", [None, "127.0.0.1"])
def test_a_port_that_somebody_listens_on_is_named(port, bind, monkeypatch):
    taken, number = port
    taken.listen()
    if bind:
        monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", f"{bind}:{number}")
    where = f"{bind or '[::]'}:{number}"
    message = f"cannot listen at {where} for --coordinator-address 127.0.0.1:{number}: Address already"
    with pytest.raises(RunError, match=re.escape(message)):
        check_port(f"127.0.0.1:{number}")


@pytest.mark.parametrize("bind", ["203.0.113.1:1234", "no port"])  # an address of nobody's, and none
def test_a_bind_address_that_is_none_is_named(bind, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", bind)
    with pytest.raises(RunError, match=f"cannot listen at {bind}"):
        check_port("127.0.0.1:1234")


def test_without_ipv6_the_older_protocol_is_asked(port, monkeypatch):
    taken, number = port
    taken.close()
    socket_of, families = socket.socket, []

    def without_ipv6(family, kind, protocol):
        families.append(family)
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        return socket_of(family, kind, protocol)

    monkeypatch.setattr(socket, "socket", without_ipv6)
    check_port(f"127.0.0.1:{number}")
    assert families == [socket.AF_INET6, socket.AF_INET]
