"""seen.safetensors: digests of the examples that a run has seen, by which copies are found in what is evaluated later.

train, validation   of the run's own examples, uint64 [N], see `pspinal_jax.data.dataset`
before              of those that the run given by --init-from has seen, and the one before it
"""

from pathlib import Path
from typing import Any

import numpy as np

from pspinal_jax.data.dataset import Contents
from pspinal_jax.errors import PSpinalError
from pspinal_jax.progress import warn
from pspinal_jax.runs import manifest
from pspinal_jax.runs.directory import writing
from pspinal_jax.weights.variables import read_variables, save_variables

SEEN = "seen.safetensors"
KINDS = ("train", "validation", "before")


def keep_seen(run: Path, contents: Contents, rows: tuple[np.ndarray, np.ndarray], init_from: Path | None) -> None:
    """Write the file of the run in the directory `run` unless it is there.

    Args:
      run: its directory.
      contents: of its data.
      rows: which of them are trained on, and which validated on.
      init_from: the run that it starts from, or None.

    Raises:
      RunError: if it cannot be written.
    """
    if SEEN in manifest.recorded(run):
        return
    digests = [contents.digests[each] for each in rows]
    before = None if init_from is None else read_seen(init_from)
    digests.append(np.zeros(0, np.uint64) if before is None else np.concatenate(list(before.values())))
    with writing(run / SEEN):
        save_variables(run / SEEN, {kind: np.unique(each) for kind, each in zip(KINDS, digests, strict=True)})
    manifest.record(run, SEEN)


def read_seen(run: Path) -> dict[str, np.ndarray] | None:
    """Digests by kind; None for a run of an earlier version, and for a damaged file, which is warned of."""
    try:
        if SEEN not in manifest.recorded(run):
            return None
        manifest.check(run, SEEN)
        found: dict[str, Any] = read_variables(run / SEEN)
    except PSpinalError as error:
        warn(str(error))
        return None
    return {kind: np.ravel(found[kind]) for kind in KINDS if kind in found}
