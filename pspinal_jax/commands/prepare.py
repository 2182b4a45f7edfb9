"""`pspinal-jax prepare NAME`: make a data set ready to train on."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from pspinal_jax.commands.parse import parse
from pspinal_jax.data.catalogue import CATALOGUE, DataSet, find_data_set
from pspinal_jax.errors import DataError, UsageError, printable
from pspinal_jax.recipes import list_recipes


@dataclasses.dataclass(frozen=True)
class PrepareArguments:
    """Arguments of `prepare`."""

    name: Annotated[str, tyro.conf.Positional]
    """Data set: digits, mnist, fashion_mnist, kmnist, qmnist, emnist_digits, emnist_letters, stl10, caltech101,
    fruits360 or birds225."""
    raw: Path | None = None
    """Folder with the raw files under the names they are published by, or with their archive, or what that holds; by
    default they are downloaded, but for fruits360 and birds225."""
    npz: Path | None = None
    """An .npz file in their place: train_images, train_labels, test_images, test_labels; images upright, labels
    from 0."""
    data_dir: Path | None = None
    """TFDS data folder to prepare in; by default TFDS's own (TFDS_DATA_DIR, else ~/tensorflow_datasets)."""


def main(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status."""
    if not args:
        raise UsageError(f"prepare takes a data set: {', '.join(CATALOGUE)}")
    parsed = parse(
        PrepareArguments,
        args,
        prog="pspinal-jax prepare",
        description="Prepare a data set as array_record, from a download, raw files or an .npz file.",
        example="pspinal-jax prepare digits",
    )
    data_set = find_data_set(parsed.name)
    try:
        return _prepare(data_set, parsed)
    except KeyboardInterrupt:
        raise DataError(f"stopped before {data_set.name} was prepared; run the same command again") from None


def _prepare(data_set: DataSet, arguments: PrepareArguments) -> int:
    from pspinal_jax.data.prepare import prepare_data_set

    done = prepare_data_set(data_set, arguments.data_dir, arguments.raw, arguments.npz, show_progress=True)
    if done.was_there:
        print(
            printable(
                f"{data_set.name} is already prepared in {done.directory}; delete that folder to prepare it again"
            )
        )
    else:
        print(printable(f"{data_set.name} is prepared in {done.directory}"))
    print(f"train on it with: {printable(_train_command(data_set, arguments.data_dir))}")
    sys.stdout.flush()
    return 0


def _train_command(data_set: DataSet, data_dir: Path | None) -> str:
    recipe = data_set.name.replace("_", "-")
    words = ["pspinal-jax", "train", recipe if recipe in list_recipes() else "RECIPE"]
    if words[-1] == "RECIPE":
        words += ["--data.name", data_set.name]
    if data_dir is not None:
        words += ["--data.data-dir", str(data_dir)]
    return shlex.join(words)
