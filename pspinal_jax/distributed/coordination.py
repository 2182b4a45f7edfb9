"""What the processes of a run ask each other. Every function is called by all of them, in the same order."""

import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from pspinal_jax.errors import UsageError
from pspinal_jax.files import differences

Result = TypeVar("Result")

_LONGEST_WAIT = 7 * 24 * 3600 * 1000
"""Milliseconds. Nobody waits for the dead so long: see failure.py."""
_numbers = itertools.count()


def count() -> int:
    """How many processes take part: 1 unless JAX's distributed system runs."""
    jax = sys.modules.get("jax")  # who has not imported it has not joined
    return jax.process_count() if jax is not None and jax.distributed.is_initialized() else 1


def index() -> int:
    """The number of this process, 0 .. count - 1."""
    return sys.modules["jax"].process_index() if count() > 1 else 0


def is_primary() -> bool:
    """Whether this is process 0, which alone prepares data, writes files other than checkpoints, and prints."""
    return index() == 0


def client() -> Any:
    """JAX's client of the coordination service, for which it has no public name (Orbax takes it from here too)."""
    from jax._src import distributed

    return distributed.global_state.client


def barrier() -> None:
    """Return when every process has come here."""
    if count() > 1:
        client().wait_at_barrier(f"pspinal_jax/barrier/{next(_numbers)}", _LONGEST_WAIT)


def broadcast_from_primary(action: Callable[[], Result]) -> Result:
    """What `action`, a JSON value, returns on process 0; the others do not call it."""
    if count() == 1:
        return action()
    key = f"pspinal_jax/value/{next(_numbers)}"
    if is_primary():
        result = action()
        client().key_value_set(key, json.dumps(result))
        return result
    return json.loads(client().blocking_key_value_get(key, _LONGEST_WAIT))


def primary_first(action: Callable[[], Result]) -> Result:
    """What `action` returns here; the others call it when process 0 has finished, and find what it left on disk."""
    if not is_primary():
        barrier()
        return action()
    result = action()
    barrier()
    return result


def gather(values: Sequence[float]) -> np.ndarray:
    """The `values` of every process, [count, N]; in float32 where there is more than one."""
    if count() == 1:
        return np.asarray([values], float)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(np.asarray(values, np.float32)))


def assert_same(values: Mapping[str, Any]) -> None:
    """Check that `values`, JSON values by name, are the same on every process.

    Raises:
      UsageError: on a process that differs from process 0; the first differences are named.
    """
    if count() == 1:
        return
    there = broadcast_from_primary(lambda: dict(values))
    here = json.loads(json.dumps(dict(values)))
    found = differences(here, there, lambda name, mine, other: f"{name} is {mine!r} here and {other!r} there")
    if found:
        listed = ", ".join(found[:4])
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        raise UsageError(
            f"process {index()} differs from process 0: {listed}{more}; start all with the same command and the "
            "same files"
        )
    barrier()  # nobody goes on into a run that another will not join
