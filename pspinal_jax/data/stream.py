"""Batches of encoded images in a given order, read and decoded ahead of use by threads or processes."""

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import numpy as np

from pspinal_jax.data.dataset import Split
from pspinal_jax.errors import RunError

_MAX_THREADS = 8
_BATCHES_AHEAD = 2
"""How many batches are read ahead, by each worker process or by the threads."""

_read: Callable[[int], np.ndarray]
"""What a worker process reads with, set as it starts."""


def end_within_a_worker() -> None:
    """End this process if it is a worker that still imports its main module, a script that is not guarded.

    Worker processes are spawned: each imports the user's script. Without `if __name__ == "__main__"` the script does in
    them all that it does, beginning with what starts workers.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # what multiprocessing itself looks at
        os._exit(1)


def stream(
    split: Split, batches: Iterable[np.ndarray], size: tuple[int, int], workers: int = 0
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
    """The images of each batch, decoded. They do not depend on `workers`; closing the generator early ends these.

    Args:
      split: what to read from.
      batches: for each batch, integers [B], numbers of examples; taken from the iterable a little ahead of use.
      size: (H, W) that every image is resized to.
      workers: processes that read and decode; 0 for threads of this process.

    Yields:
      Images uint8 [B, H, W, 3], and labels int32 [B].

    Raises:
      DataError: if an image cannot be read; the message names it.
      RunError: if a worker process dies.
    """
    end_within_a_worker()
    pool: Executor
    if workers:
        spawn = multiprocessing.get_context("spawn")
        pool, read = ProcessPoolExecutor(workers, spawn, _start_worker, (split, size)), _read_in_worker
    else:
        pool, read = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)), partial(split.read, size=size)
    remaining = iter(batches)
    waiting: deque[tuple[np.ndarray, Iterator[np.ndarray]]] = deque()
    try:
        while True:
            for numbers in itertools.islice(remaining, _BATCHES_AHEAD * max(1, workers) - len(waiting)):
                # A process decodes a whole batch; threads, which know no chunks, an image each.
                waiting.append((numbers, pool.map(read, numbers.tolist(), chunksize=max(1, len(numbers)))))
            if not waiting:
                return
            numbers, images = waiting.popleft()
            yield np.array([*images], np.uint8).reshape(-1, *size, 3), split.labels[numbers].astype(np.int32)
    except BrokenProcessPool:
        script = getattr(sys.modules["__main__"], "__file__", "the script")
        raise RunError(
            f"a worker process that decodes images ended unexpectedly: use fewer workers if memory is short, or put "
            f'`if __name__ == "__main__":` before what {script} does, which every worker imports'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(split: Split, size: tuple[int, int]) -> None:
    """Leave Ctrl-C, which reaches every process of a terminal, to the main process, and end when it has ended."""
    global _read
    _read = partial(split.read, size=size)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_main_process, daemon=True).start()


def _read_in_worker(number: int) -> np.ndarray:
    return _read(number)


def _end_with_main_process() -> None:
    main = multiprocessing.parent_process()
    if main is not None:
        main.join()
        os._exit(1)
