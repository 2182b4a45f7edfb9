"""`pspinal-jax prepare NAME` converts a data set for training."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from pspinal_jax.commands.parse import parse
from pspinal_jax.data.catalogue import CATALOGUE, find_data_set
from pspinal_jax.errors import DataError, UsageError, printable
from pspinal_jax.recipes import list_recipes


@dataclasses.dataclass(frozen=True)
class PrepareArguments:
    """Convert a data set to array_record, from a download, raw files or an .npz file."""

    name: Annotated[str, tyro.conf.Positional]
    """Data set: digits, mnist, fashion_mnist, kmnist, qmnist, emnist_digits, emnist_letters, stl10, caltech101,
    fruits360 or birds225."""
    raw: Path | None = None
    """Folder with the raw files under their published names, with their archive, or with its contents. By default they
    are downloaded; fruits360 and birds225 cannot be."""
    npz: Path | None = None
    """An .npz file to use instead: train_images, train_labels, test_images, test_labels; images upright, labels
    from 0."""
    data_dir: Path | None = None
    """TFDS data folder to write to; by default TFDS's own (TFDS_DATA_DIR, else ~/tensorflow_datasets)."""


def prepare(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status."""
    if not args:
        raise UsageError(f"prepare takes a data set: {', '.join(CATALOGUE)}")
    parsed = parse(PrepareArguments, args, "prepare", "digits")
    data_set = find_data_set(parsed.name)
    try:
        from pspinal_jax.data.prepare import prepare_data_set

        done = prepare_data_set(data_set, parsed.data_dir, parsed.raw, parsed.npz, show_progress=True)
    except KeyboardInterrupt:
        raise DataError(f"stopped before {data_set.name} was prepared; run the same command again") from None
    again = "; delete that folder to prepare it again" if done.was_there else ""
    print(printable(f"{data_set.name} is {'already ' if done.was_there else ''}prepared in {done.directory}{again}"))
    recipe = data_set.name.replace("_", "-")
    words = ["train", recipe] if recipe in list_recipes() else ["train", "RECIPE", "--data.name", data_set.name]
    words += [] if parsed.data_dir is None else ["--data.data-dir", str(parsed.data_dir)]
    print(f"train on it with: {printable(shlex.join(['pspinal-jax', *words]))}")
    return 0
