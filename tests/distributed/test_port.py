"""The coordinator's port is asked for before JAX, which would end with a segmentation fault."""

import re
import socket

import pytest

from pspinal_jax.distributed import check_port
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
    where = f"{bind}:{number}" if bind else number
    message = f"cannot listen on port {where} for coordinator_address 127.0.0.1:{number}: "
    with pytest.raises(RunError, match=re.escape(message) + ".*in use"):
        check_port(f"127.0.0.1:{number}")


@pytest.mark.parametrize("bind", ["203.0.113.1:1234", "no port"])  # an address of nobody's, and none
def test_a_bind_address_that_is_none_is_named(bind, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", bind)
    with pytest.raises(RunError, match=f"cannot listen on port {bind}"):
        check_port("127.0.0.1:1234")


def test_without_ipv6_the_older_protocol_is_asked(port, monkeypatch):
    taken, number = port
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    taken.listen()
    with pytest.raises(RunError, match="in use"):
        check_port(f"127.0.0.1:{number}")
