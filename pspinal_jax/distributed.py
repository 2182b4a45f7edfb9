"""Several processes as one run: joining, agreeing, ending together, and arrays that are sharded over them.

With one process all of it does nothing. JAX is imported where it is used, so that every room can ask `is_primary`.
The functions that exchange values are called by all processes, in the same order.
"""

import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np

from pspinal_jax import __version__
from pspinal_jax.errors import PSpinalError, RunError, UsageError
from pspinal_jax.files import cache_folder, differences, held
from pspinal_jax.progress import say
from pspinal_jax.recipes.schema import ProcessOptions

Result = TypeVar("Result")

_BLOCK_BYTES = 2**26
VARIABLES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
"""Option -> the variable that stands for it where none of the three is given; Kubeflow Trainer sets them."""


def count() -> int:
    """How many processes take part: 1 unless JAX's distributed system runs."""
    jax = sys.modules.get("jax")  # a process that has not imported it has not joined
    return jax.process_count() if jax is not None and jax.distributed.is_initialized() else 1


def index() -> int:
    """The number of this process, 0 .. count - 1."""
    return sys.modules["jax"].process_index() if count() > 1 else 0


def is_primary() -> bool:
    """Whether this is process 0, which alone prepares data, writes files other than checkpoints, and prints."""
    return index() == 0


def barrier() -> None:
    """Return when every process has called it."""
    gather([0])


def gather(values: Sequence[float]) -> np.ndarray:
    """The `values` of every process, [count, N]; in float32 where there is more than one."""
    if count() == 1:
        return np.asarray([values], float)
    import jax
    from jax.experimental.multihost_utils import process_allgather

    with jax.transfer_guard("allow"):  # here and below: of what JAX itself moves to and fro
        return np.asarray(process_allgather(np.asarray(values, np.float32)))


def broadcast_from_primary(action: Callable[[], Result]) -> Result:
    """What `action`, a JSON value, returns on process 0; the others do not call it."""
    if count() == 1:
        return action()
    import jax
    from jax.experimental.multihost_utils import broadcast_one_to_all

    content = json.dumps(action()).encode() if is_primary() else b""
    with jax.transfer_guard("allow"):
        buffer = np.zeros(broadcast_one_to_all(np.int32(len(content))), np.uint8)
        buffer[: len(content)] = np.frombuffer(content, np.uint8)
        return json.loads(broadcast_one_to_all(buffer).tobytes())


def primary_first(action: Callable[[], Result]) -> Result:
    """What `action` returns in this process; the others call it after process 0, and find what it left on disk."""
    if is_primary():
        result = action()
        barrier()
        return result
    barrier()
    return action()


def assert_same(values: Mapping[str, Any]) -> None:
    """Check that `values`, JSON values by name, are the same on every process.

    Raises:
      UsageError: on all processes; a process that differs from process 0 names the first differences.
    """
    if count() == 1:
        return
    expected = broadcast_from_primary(lambda: dict(values))
    found = json.loads(json.dumps(dict(values)))
    wrong = differences(found, expected, lambda name, mine, first: f"{name} is {mine!r}, on process 0 {first!r}")
    if gather([bool(wrong)]).any():
        which = f"process {index()} differs from process 0: {', '.join(wrong)}" if wrong else "a process differs"
        raise UsageError(f"{which}; start all with the same command and files")


def put(tree: Any, shardings: Any) -> Any:
    """`jax.device_put`, where every process holds host arrays whole: each device gets its part without a check.

    (Across processes `jax.device_put` sends all of a host array around to check that it is the same everywhere.)

    Args:
      tree: arrays, on the host or on devices.
      shardings: one for all, or a tree of them.
    """
    import jax

    def one(leaf: Any, sharding: Any) -> Any:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        array = np.asarray(jax.device_get(leaf))
        array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
        return jax.make_array_from_callback(array.shape, sharding, lambda place: array[place])

    if count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda leaf: one(leaf, shardings), tree)
    return jax.tree.map(one, tree, shardings)


def whole(array: Any) -> np.ndarray:
    """All of `array` on the host of every process, wherever its parts lie; all processes call it."""
    import jax

    if getattr(array, "is_fully_addressable", True) or array.is_fully_replicated:
        return np.asarray(jax.device_get(array))
    from jax.experimental.multihost_utils import process_allgather

    with jax.transfer_guard("allow"):
        return np.asarray(process_allgather(array, tiled=True))


def rows_of(array: Any) -> Iterator[np.ndarray]:
    """Yield `array` in blocks of its first axis, on the host of every process; all processes go through it.

    An array of which a part lies on other processes is not put together on any device: no block is much larger than
    64 MiB, or one row.
    """
    if getattr(array, "is_fully_addressable", True) or array.is_fully_replicated:
        yield whole(array)
        return
    rows = max(1, _BLOCK_BYTES // max(1, array.nbytes // len(array)))
    for start in range(0, len(array), rows):
        yield whole(array[start : start + rows])


@contextlib.contextmanager
def joined(options: ProcessOptions) -> Iterator[None]:
    """Be one of the run's processes inside the `with`, and leave together with the others at its end.

    An exception inside is printed as one line and ends the process. That breaks the connection to the others, whose
    next exchange raises, so that they end in the same way.

    Raises:
      UsageError: if `options` do not fit together, or there is no cluster that JAX knows.
      RunError: if the others cannot be reached.
    """
    given = _check(options)
    if not options.distributed:
        yield
        return
    import jax

    if jax.distributed.is_initialized():  # by an engine, which also ends it
        yield
        return
    with _place(given):
        _initialize(options, given)
        try:
            everywhere = {"jax": jax.__version__, "pspinal_jax": __version__}
            assert_same(everywhere | {"num_processes": given.get("num_processes")})
            yield
            barrier()
        except BaseException as error:
            _end(error)
        jax.distributed.shutdown()


@contextlib.contextmanager
def _place(given: dict[str, Any]) -> Iterator[None]:
    """Hold the place of this process in its run, on this machine: a second one there would make JAX end both runs.

    Raises:
      RunError: if another process holds it.
    """
    folder = cache_folder()
    if not given or folder is None:
        yield
        return
    (folder / "joined").mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.-]", "-", f"{given['coordinator_address']}-{given['process_id']}.lock")
    with held(folder / "joined" / name) as other:
        if other is not None:
            raise RunError(
                f"{other} is process {given['process_id']} of a run at coordinator_address "
                f"{given['coordinator_address']} already; choose another port"
            )
        yield


def _end(error: BaseException) -> NoReturn:
    """Print `error` as one line, and exit without JAX's shutdown, which would wait for the other processes."""
    import jax

    line, status = str(error), 1
    if isinstance(error, PSpinalError):
        status = error.exit_status
    elif isinstance(error, KeyboardInterrupt):
        line, status = "interrupted", 128 + signal.SIGINT
    elif isinstance(error, jax.errors.JaxRuntimeError | ValueError):  # a collective operation raises either of them
        line = (
            f"process {index()} of {count()} lost contact with another process ({' '.join(str(error).split())[:200]}); "
            "start all of them again with the same commands to go on from the last checkpoint"
        )
    elif not isinstance(error, OSError):
        traceback.print_exception(error)
        line = f"{type(error).__name__}: {error}"
    say(f"error: {line}")
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    if is_primary():
        # It holds the coordination service, whose end aborts the others: they may be printing an error too.
        time.sleep(2)
    os._exit(status)


def check_port(address: str) -> None:
    """Check that the port of `address`, HOST:PORT, is free; JAX's own service crashes on one that is taken.

    Raises:
      RunError: if the port is taken or not allowed.
    """
    where = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or address.rpartition(":")[2]
    host, _, port = where.rpartition(":")
    dual = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual or host.startswith("[") else socket.AF_INET
    try:
        socket.create_server((host.strip("[]"), int(port)), family=family, dualstack_ipv6=dual).close()
    except (OSError, ValueError) as error:
        raise RunError(f"process 0 cannot listen on port {where} for coordinator_address {address}: {error}") from error


def _check(options: ProcessOptions) -> dict[str, Any]:
    """The arguments that were given, if they are right."""
    given = {name: value for name in VARIABLES if (value := getattr(options, name)) is not None}
    if given and (len(given) < len(VARIABLES) or not options.distributed):
        raise UsageError(f"{', '.join(given)} given alone; give {', '.join(VARIABLES)} and distributed")
    if options.distributed and not given and all(os.environ.get(variable) for variable in VARIABLES.values()):
        given = {name: os.environ[variable] for name, variable in VARIABLES.items()}
        for name in ("num_processes", "process_id"):
            if not given[name].isdecimal():
                raise UsageError(f"the environment's {VARIABLES[name]} is {given[name]!r}, expected a number")
            given[name] = int(given[name])
    if given:
        host, _, port = given["coordinator_address"].rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise UsageError(f"coordinator_address is {given['coordinator_address']!r}, expected HOST:PORT")
        if not 0 <= given["process_id"] < given["num_processes"]:
            raise UsageError(f"process_id is {given['process_id']}, expected 0 .. {given['num_processes'] - 1}")
    return given


def _initialize(options: ProcessOptions, given: dict[str, Any]) -> None:
    import jax

    # JAX's own service for preemption notices would catch SIGTERM, which the loop handles itself.
    jax.config.update("jax_enable_preemption_service", False)
    if given and given["process_id"] == 0:
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
    except Exception as error:  # of many kinds, by the cluster's client or by JAX's
        if isinstance(error, ValueError) and not given:
            raise UsageError(
                "distributed=True found no cluster that JAX knows (SLURM, Open MPI, Kubernetes, Cloud TPU); give "
                "coordinator_address, num_processes and process_id"
            ) from error
        reason = " ".join(str(error).split())[:300]
        raise RunError(
            f"the run's processes could not be joined within {options.initialization_timeout} s: check that all are "
            f"started, alike but for process_id, and the port open ({reason})"
        ) from error
    jax.devices()  # found here, by all processes at once
