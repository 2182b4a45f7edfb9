"""Whether the run's first process can listen where the others will look for it."""

import errno
import os
import socket

from pspinal_jax.errors import RunError

_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


def check_port(address: str) -> None:
    """Ask the system for the port of `address`, HOST:PORT, as JAX's coordinator soon will, and give it back.

    JAX's own service ends with a segmentation fault on a port that is taken (jaxlib 0.10 to 0.12).

    Raises:
      RunError: if the port is taken or not allowed.
    """
    where = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or f"[::]:{address.rpartition(':')[2]}"
    host, _, port = where.rpartition(":")
    try:
        try:
            _bind(host.strip("[]"), int(port))
        except OSError as error:
            if host != "[::]" or error.errno not in _NO_IPV6:
                raise
            _bind("0.0.0.0", int(port))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"process 0 cannot listen at {where} for --coordinator-address {address}: {reason}; choose another port"
        ) from error


def _bind(host: str, port: int) -> None:
    family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        # A run that ended a moment ago leaves its port waiting, which does not keep a new one from listening.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(place)
