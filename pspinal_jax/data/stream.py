"""Batches of examples in a given order, read and decoded ahead of use by grain."""

import atexit
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator
from functools import partial
from typing import Any

import numpy as np

from pspinal_jax.data.dataset import Split
from pspinal_jax.errors import DataError, RunError, UsageError

_MAX_THREADS = 8
_BATCHES_AHEAD = 2
"""How many finished batches may wait, per worker process."""
_RAN_THE_SCRIPT = 87
"""Exit status of a worker process that never came to its work, see `end_within_a_worker`."""


def end_within_a_worker() -> None:
    """End this process if it is a worker that still imports its main module, a script that is not guarded.

    Worker processes are spawned: each imports the user's script. Without `if __name__ == "__main__"` the script does in
    them all that it does, beginning with what starts workers.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # what multiprocessing itself looks at
        os._exit(_RAN_THE_SCRIPT)


def stream(
    split: Split,
    order: np.ndarray,
    size: tuple[int, int],
    batch_size: int,
    *,
    first_batch: int = 0,
    workers: int = 0,
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
    """The examples at `order`, images decoded, in batches.

    The batches do not depend on `workers`. What comes before `first_batch` is not read. Closing the generator early, or
    letting go of it, ends the worker processes. Each worker takes a few seconds to start (grain imports jax there,
    though it computes nothing), so one long stream is better than many short ones.

    Args:
      split: what to read from.
      order: integers [M], numbers of examples; may repeat.
      size: (H, W) that every image is resized to.
      batch_size: B; the last batch holds what is left.
      first_batch: number of the batch to begin with.
      workers: processes that read and decode; 0 for threads of this process.

    Yields:
      Examples [B, ...], images as uint8 [B, H, W, 3], and labels int32 [B].

    Raises:
      DataError: if grain is not installed, or an image cannot be read; the message names it.
      RunError: if a worker process dies.
      UsageError: if worker processes run the script that started them.
    """
    end_within_a_worker()
    order = np.asarray(order)[first_batch * batch_size :]
    if not len(order):
        return
    workers = min(workers, -(-len(order) // batch_size))  # grain has no use for a worker without a batch
    split = split.take(order)
    batches = _Running(_pipeline(split, size, batch_size, workers))
    try:
        for first in range(0, len(order), batch_size):
            # From a worker they lie in shared memory, of which there may be little.
            yield np.array(batches.read()), split.labels[first : first + batch_size].astype(np.int32)
    finally:
        batches.close()


class _Running:
    """A grain pipeline at work, closed once: by its user, or else before the interpreter is taken apart."""

    def __init__(self, pipeline: Any) -> None:
        self._iterator = iter(pipeline)
        atexit.register(self.close)

    def read(self) -> Any:
        try:
            return next(self._iterator)
        except RuntimeError as error:
            if "Worker process" not in str(error):
                raise
            if f"exit code {_RAN_THE_SCRIPT}" in str(error):
                script = getattr(sys.modules["__main__"], "__file__", "the script")
                raise UsageError(
                    f'{script} has no `if __name__ == "__main__":` before what it does, so each worker process runs it '
                    "from its top; put that line there, or leave workers out"
                ) from None
            raise RunError(
                "a worker process that decodes images ended unexpectedly, perhaps for want of memory or shared "
                "memory; use fewer workers"
            ) from error

    def close(self) -> None:
        atexit.unregister(self.close)
        iterator, self._iterator = self._iterator, None
        if iterator is None:
            return
        iterator.close()
        del iterator
        freeing = getattr(_import_grain().multiprocessing.SharedMemoryArray, "_del_thread_pool", None)
        if freeing is not None:
            # The last batches' shared memory hangs on cycles of objects in grain, and is freed in a thread of its own.
            # A process that ended before that would get a warning of a leak.
            gc.collect()
            freeing.apply(int)


def _pipeline(split: Split, size: tuple[int, int], batch_size: int, workers: int) -> Any:
    grain = _import_grain()
    # Batched before the workers, to whom grain deals out elements.
    batches = grain.MapDataset.range(len(split)).map(partial(split.read, size=size)).batch(batch_size)
    if workers == 0:
        threads = min(_MAX_THREADS, os.cpu_count() or 1)
        return batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_BATCHES_AHEAD)
    return batches.to_iter_dataset(reading).mp_prefetch(options, _start_worker)


def _start_worker(index: int, count: int) -> None:
    """Leave Ctrl-C, which reaches every process of a terminal, to the main process, and end when it has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_main_process, daemon=True).start()


def _end_with_main_process() -> None:
    main = multiprocessing.parent_process()
    if main is not None:
        main.join()
        os._exit(1)


def _import_grain() -> Any:
    try:
        import grain
        from absl import flags
    except ImportError as error:
        raise DataError(f"grain is not installed ({error}); images are read with it: install grain") from error
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain passes its flags to worker processes, and nobody else parses them
    return grain
