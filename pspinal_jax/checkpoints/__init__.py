"""Checkpoints by Orbax, with a checksum of every array, and a reader of the newest intact one."""

import contextlib
import copy
import functools
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from pspinal_jax.checkpoints.checksum import json_checksum, tree_checksums
from pspinal_jax.distributed import broadcast_from_primary, count
from pspinal_jax.errors import RunError
from pspinal_jax.files import plain_path, require_file
from pspinal_jax.progress import warn

SECONDS_FOR_OTHERS = 50
"""How long a process waits at a save for the others, of which one may have found its disk full; Orbax: 20 minutes."""
_OF_ANOTHER = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|Gloo|barrier|coordination service", re.I)
"""In what JAX's connection to the other processes raises when one of them has gone."""
Trees = dict[str, Any]
"""Trees of arrays by the name of their item: params, batch_stats, opt_state, best."""


class CheckpointStore:
    """The checkpoints of one run. Use it as a context manager, or the last save is lost.

    Saves are asynchronous: `save` returns once the arrays have been copied. The two newest checkpoints are kept, in
    case one is damaged. Each contains the best parameters so far. With several processes, every process saves and
    restores its part of the arrays.
    """

    def __init__(self, directory: Path) -> None:
        _ignore_late_reads()
        self._directory = directory.absolute()
        _check_files(self._directory)
        self._opened = contextlib.ExitStack()
        with self._writing():
            self._directory.parent.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self._opened.enter_context(plain_path(self._directory)),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=2,
                    cleanup_tmp_directories=True,
                    async_options=ocp.AsyncOptions(timeout_secs=SECONDS_FOR_OTHERS),
                ),
            )
        self._last_time = -float("inf")
        self._last_cost: float | None = None
        self._progress: dict[str, Any] | None = None  # of the newest checkpoint

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None and count() > 1:
            return  # closing would wait for the other processes, which may not come
        try:
            with self._writing(), self._opened:
                self._manager.close()
        except RunError:  # the last save failed in the background
            if kind is None:
                raise

    @property
    def empty(self) -> bool:
        """Whether nothing has been saved."""
        return not self._manager.all_steps()

    def due(self, seconds: float) -> bool:
        """Whether `seconds` have passed since the last save, and enough more to keep saving below 5 % of the time."""
        return time.monotonic() - self._last_time >= max(seconds, 20 * (self._last_cost or 0.0))

    def save(self, step: int, trees: Trees, progress: dict[str, Any]) -> None:
        """Save `trees` and the JSON value `progress`, unless they are saved already.

        The checkpoint's number is `step`, or the next free one if other progress was saved at that step. Nothing is
        overwritten.

        Raises:
          RunError: if the disk is full or not writable. Earlier checkpoints are kept.
        """
        start, newest = time.monotonic(), self._manager.latest_step()
        if newest is not None and progress == self._progress:
            return
        # The copy is taken before the next step donates these buffers.
        trees = {name: jax.tree.map(lambda leaf: leaf.copy(), tree) for name, tree in _with_leaves(trees).items()}
        record = {
            "position": progress,
            "position_checksum": json_checksum(progress),
            "checksums": {name: tree_checksums(tree) for name, tree in trees.items()},
        }
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        number = step if newest is None else max(step, newest + 1)
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.save(number, args=ocp.args.Composite(record=ocp.args.JsonSave(record), **items))
        self._progress = copy.deepcopy(progress)
        self._last_time = time.monotonic()
        # The first save of a process also pays for Orbax's set-up, which says nothing about the next.
        self._last_cost = 0.0 if self._last_cost is None else self._last_time - start

    def finish(self) -> None:
        """Wait until the last save is on the disk; called by all processes.

        Raises:
          RunError: if it could not be written. Earlier checkpoints are kept.
        """
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
            own = _error_of_the_disk(error)
            if own is None:
                raise  # `distributed` says what it means
            raise RunError(
                f"a checkpoint cannot be written to {self._directory}: {_reason(own)}; put that right and run the "
                "same command again: earlier checkpoints are kept"
            ) from error

    def restore(self, abstract: Callable[[dict[str, Any]], Trees]) -> tuple[Trees, dict[str, Any]] | None:
        """The newest intact checkpoint, see `read_newest`, or None. Damaged newer ones are deleted."""
        if self.empty:
            return None
        step, trees, progress = _newest(self._manager, abstract)
        for newer in [other for other in self._manager.all_steps() if other > step]:
            self._manager.delete(newer)
        self._progress = copy.deepcopy(progress)
        return trees, progress


def _with_leaves(trees: Trees) -> Trees:
    return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}


def _error_of_the_disk(error: BaseException | None) -> OSError | ValueError | None:
    """`error`, or what it followed on: a process that cannot write waits in vain for the others before it says so."""
    while error is not None:
        of_another = count() > 1 and _OF_ANOTHER.search(str(error))
        if isinstance(error, OSError | ValueError) and not of_another:  # tensorstore: a full disk is a ValueError
            return error
        error = error.__cause__ or error.__context__
    return None


def _reason(error: Exception) -> str:
    """In the operating system's words, which tensorstore gives as a number at the end of many others."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else " ".join(str(error).split())[:300]


def read_newest(directory: Path, abstract: Callable[[dict[str, Any]], Trees]) -> tuple[Trees, dict[str, Any]]:
    """Read the newest checkpoint in `directory`, without changing the directory or falling back to an older one.

    Args:
      directory: a run's checkpoints folder.
      abstract: progress -> the trees to read, as jax.ShapeDtypeStruct with shardings; other items are not read.

    Returns:
      (trees, progress).

    Raises:
      RunError: if there is no checkpoint, or the newest is damaged.
    """
    _check_files(directory)
    options = ocp.CheckpointManagerOptions(read_only=True)
    with plain_path(directory) as path, ocp.CheckpointManager(path, options=options) as manager:
        if not manager.all_steps():
            raise RunError(f"{directory} holds no checkpoint")
        _, trees, progress = _newest(manager, abstract, fall_back=False)
        return trees, progress


def _check_files(directory: Path) -> None:
    """Raise RunError for a pipe or a device in `directory`: the checkpoint reader would wait for it."""
    for path in directory.rglob("*"):
        try:
            if not path.is_dir():
                require_file(path)
        except FileNotFoundError:  # a training that goes on removes old ones
            continue
        except OSError as error:
            raise RunError(f"{path} cannot be read: {error.strerror or error}; remove it") from error


def _newest(
    manager: ocp.CheckpointManager, abstract: Callable[[dict[str, Any]], Trees], fall_back: bool = True
) -> tuple[int, Trees, dict[str, Any]]:
    """(step, trees, progress) of the newest whole checkpoint; a warning names every damaged one.

    Of several processes, process 0 looks for it by itself: if one found damage while it restores together with the
    others, these would wait for it.
    """
    if count() == 1:
        return _search(manager, abstract, fall_back)

    def on_host(progress: dict[str, Any]) -> Trees:
        return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract(progress))

    def search() -> int:
        alone = ocp.options.MultiprocessingOptions(active_processes={0}, barrier_sync_key_prefix="alone")
        options = ocp.CheckpointManagerOptions(read_only=True, create=False, multiprocessing_options=alone)
        with ocp.CheckpointManager(Path(manager.directory), options=options) as by_itself:
            return _search(by_itself, on_host, fall_back)[0]

    step = broadcast_from_primary(search)
    return step, *_read(manager, step, abstract, check=False)


def _search(
    manager: ocp.CheckpointManager, abstract: Callable[[dict[str, Any]], Trees], fall_back: bool
) -> tuple[int, Trees, dict[str, Any]]:
    problems: list[str] = []
    _ignore_late_reads()
    for step in sorted(manager.all_steps(), reverse=True)[: None if fall_back else 1]:
        try:
            trees, progress = _read(manager, step, abstract)
        except RunError:
            raise
        except Exception as error:  # Orbax raises bare exceptions of many kinds on damaged files
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            problems.append(f"checkpoint {step} in {manager.directory} is damaged ({reason})")
            continue
        for problem in problems:
            warn(f"{problem}; using checkpoint {step} instead")
        return step, trees, progress
    end = "no whole checkpoint is left: train again in another workdir"
    raise RunError(f"{'; '.join(problems)}; {end if fall_back else 'only `train` resumes from an older one'}")


def _read(
    manager: ocp.CheckpointManager, step: int, abstract: Callable[[dict[str, Any]], Trees], check: bool = True
) -> tuple[Trees, dict[str, Any]]:
    record = manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
    if not isinstance(record, dict) or json_checksum(record["position"]) != record["position_checksum"]:
        raise ValueError("its progress does not match its checksum")
    expected = abstract(record["position"])
    items = {name: ocp.args.StandardRestore(tree) for name, tree in _with_leaves(expected).items()}
    restored = manager.restore(step, args=ocp.args.Composite(**items))
    trees = {name: restored[name] if name in items else tree for name, tree in expected.items()}
    for name, tree in trees.items() if check else ():
        for path, checksum in tree_checksums(tree).items():
            if record["checksums"][name].get(path) != checksum:
                raise ValueError(f"{name}/{path} does not match its checksum")
    return trees, record["position"]


@functools.cache
def _ignore_late_reads() -> None:
    """Silence reads and writes that end after Orbax has given up on a damaged checkpoint or a full disk.

    Orbax raises the first array's error and closes its event loop. tensorstore then reports every other array to the
    closed loop, and Python prints a traceback for each, and for each read that is given up; asyncio does so for those
    whose error nobody asked for, and warns of reads and writes that never began. Only the first error is of use. Each
    filter drops one exact message of these libraries and nothing else.
    """
    report = sys.unraisablehook

    def filtered(unraisable: Any) -> None:
        error = unraisable.exc_value
        late = isinstance(error, RuntimeError) and "Event loop is closed" in str(error)
        given_up = isinstance(error.__cause__, GeneratorExit) and "reading array index" in str(error)
        if not (late or given_up):
            report(unraisable)

    sys.unraisablehook = filtered
    logging.getLogger("asyncio").addFilter(_is_news)
    warnings.filterwarnings("ignore", r"coroutine '(Store|async_|_read_).*' was never awaited", RuntimeWarning)


def _is_news(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    # A ValueError is what tensorstore raises where the operating system refuses.
    return not (isinstance(error, ValueError) and "exception was never retrieved" in record.getMessage())
