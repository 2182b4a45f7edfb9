"""Joining the other processes of a run, before JAX is asked for anything else."""

import contextlib
import errno
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from pspinal_jax.distributed.coordination import barrier, count, index
from pspinal_jax.distributed.failure import abort_caught, ending_together, lost, native_output_aside
from pspinal_jax.errors import RunError, UsageError
from pspinal_jax.recipes.options import ProcessOptions

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


@contextlib.contextmanager
def joined(options: ProcessOptions) -> Iterator[None]:
    """Be one of the run's processes inside the `with`, and leave together with the others at its end.

    Where there is more than one, whatever is raised inside is printed as one line and ends the process, and soon all of
    them; see failure.py.

    Raises:
      UsageError: if `options` do not fit together, or there is no cluster that JAX knows.
      RunError: if the others cannot be reached.
    """
    given = _check(options)
    if not options.distributed:
        yield
        return
    name = "x" if options.process_id is None else str(options.process_id)
    with native_output_aside(name) as log:
        lines = [_not_joined(options, log)]
        with abort_caught(lines):
            _initialize(options, given, log)
            if count() == 1:
                yield
            else:
                lines.append(lost(log))
                with ending_together(log):
                    yield
                    barrier()
            jax.distributed.shutdown()


def _check(options: ProcessOptions) -> dict[str, Any]:
    """The arguments that were given, if they are right."""
    names = ("coordinator_address", "num_processes", "process_id")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
    if given and not options.distributed:
        raise UsageError(f"{flags} given without --distributed; add it, or leave them out")
    if given and len(given) < len(names):
        missing = ", ".join(f"--{name.replace('_', '-')}" for name in names if name not in given)
        raise UsageError(f"{flags} given without {missing}; give all three, or none to ask the cluster")
    for name in ("initialization_timeout", "heartbeat_timeout"):
        if getattr(options, name) < 1:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} is {getattr(options, name)}, expected 1 or more seconds")
    if given:
        _check_given(given["coordinator_address"], given["num_processes"], given["process_id"])
    return given


def _check_given(address: str, num_processes: int, process_id: int) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UsageError(f"--coordinator-address is {address!r}, expected HOST:PORT, as 10.0.0.1:1234")
    if num_processes < 1:
        raise UsageError(f"--num-processes is {num_processes}, expected 1 or more")
    if not 0 <= process_id < num_processes:
        raise UsageError(f"--process-id is {process_id}, expected 0 .. {num_processes - 1}")


def _initialize(options: ProcessOptions, given: dict[str, Any], log: Path) -> None:
    # JAX's own service for preemption notices would catch SIGTERM, which the loop wants to hear of itself.
    jax.config.update("jax_enable_preemption_service", False)
    if given and options.process_id == 0:
        check_port(given["coordinator_address"])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a Kubernetes that cannot be asked: the error below says what to do
            jax.distributed.initialize(
                **given,
                # With all that is needed at hand, a cluster around us must not also choose among our devices.
                cluster_detection_method="deactivate" if given else None,
                initialization_timeout=options.initialization_timeout,
                heartbeat_timeout_seconds=options.heartbeat_timeout,
                shutdown_timeout_seconds=max(options.heartbeat_timeout, 60),
            )
    except ValueError as error:
        if given:
            raise RunError(f"{_not_joined(options, log)}: {error}") from error
        raise UsageError(
            "--distributed found no cluster that JAX knows (SLURM, Open MPI, Kubernetes, Cloud TPU); give "
            "--coordinator-address, --num-processes and --process-id"
        ) from error
    except Exception as error:  # of many kinds, by the cluster's client or by JAX's
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"{_not_joined(options, log)} ({type(error).__name__}: {reason})") from error
    index()  # devices are found here, by all processes at once


def _not_joined(options: ProcessOptions, log: Path) -> str:
    address = _address(options)
    seconds = options.initialization_timeout
    if options.process_id == 0:
        missing = f"not all {options.num_processes} processes reached this one at {address} within {seconds} s"
    else:
        missing = f"the run's other processes could not be joined at {address} within {seconds} s"
    return f"{missing}; check that all are started, alike but for --process-id, and the port open (log in {log})"


def _address(options: ProcessOptions) -> str:
    return options.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS") or "the cluster's address"
