"""Examples as people have them (arrays, masked arrays, frames, labels of text, CSV and Parquet files) to a data set.

All examples that are held in memory pass through `make_dataset`, wherever they come from. A cell or a label that is
missing is refused with a count, and never filled in or left out in silence.
"""

import dataclasses
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pspinal_jax.data.copies import copies_of_a_class
from pspinal_jax.data.dataset import ArraySplit, Dataset, array_dataset, check_labels, split_by_class
from pspinal_jax.distributed import is_primary
from pspinal_jax.errors import DataError, UsageError
from pspinal_jax.files import require_file
from pspinal_jax.progress import say

LABEL_COLUMNS = ("label", "labels", "target", "class")
"""Names of a table's column of labels, in any case; without one of them it is the last column."""
_INDEX_COLUMNS = ("Unnamed: 0", "__index_level_0__")
"""What pandas calls the column that it wrote for its row numbers."""
_WRITTEN_MISSING = ("", "nan", "<NA>")
"""What NumPy and pandas make of a missing label when they turn labels into text."""

Classes = int | Sequence[str] | None
"""How many classes there are, the names of a run's classes that labels are matched with, or None to find them."""


def make_dataset(
    splits: dict[str, tuple[Any, Any]],
    source: str,
    classes: Classes = None,
    class_names: tuple[str, ...] | None = None,
) -> Dataset[ArraySplit]:
    """Check examples and bring them into what training takes.

    Args:
      splits: 'train' and perhaps 'test' and 'validation', each (inputs, labels). Inputs: uint8 [N, H, W] or
        [N, H, W, C], numbers [N, D], or a frame (pandas, Polars, PyArrow) of D columns of numbers. Labels: integers or
        text [N], as array, list, series or frame of one column.
      source: where they come from; named in every error.
      classes: C; or the names of a run's classes, to which labels belong by their text; or None for the classes that
        the labels name. Labels 0 .. C-1 are numbers of classes; others become classes that are named by them, in order.
      class_names: names of the classes 0 .. C-1, each once; the labels as text where None.

    Raises:
      DataError: if a shape, dtype, length, label or value does not fit, or a cell or a label is missing.
    """
    inputs, labels, columns = {}, {}, {}
    for name, (given, given_labels) in splits.items():
        inputs[name], columns[name] = _inputs(f"{source}: {name}", given)
        labels[name] = _labels(f"{source}: {name}", given_labels)
        _check_lengths(f"{source}: {name}", inputs[name], labels[name])
    for name, there in columns.items():
        if there != columns["train"]:
            raise DataError(
                f"{source}: {name} has the columns {_listed(there)} and train {_listed(columns['train'])}; they must "
                "be the same, in the same order"
            )
    if class_names and (twice := [name for name, count in Counter(class_names).items() if count > 1]):
        raise DataError(f"{source}: the class name {twice[0]!r} stands there more than once; every class needs its own")
    numbered, names = _find_classes(source, labels, classes, class_names)
    checked = {name: _check_split(f"{source}: {name}", inputs[name], numbered[name]) for name in splits}
    train = checked["train"]
    for name, other in checked.items():
        if train.inputs.shape[1:] != other.inputs.shape[1:] or train.inputs.dtype != other.inputs.dtype:
            raise DataError(
                f"{source}: train has inputs of shape {train.inputs.shape[1:]} ({train.inputs.dtype}) and {name} "
                f"{other.inputs.shape[1:]} ({other.inputs.dtype}); they must be the same"
            )
    return dataclasses.replace(array_dataset(checked, names, source), columns=tuple(columns["train"] or ()))


def cut_test(
    data: Dataset[ArraySplit], fraction: float, seed: int, keep_copies_together: bool = True, needs_test: bool = True
) -> Dataset[ArraySplit]:
    """`data`, which has no test split, with `fraction` of each class cut from its training split by `seed`.

    Copies go to one side, see `pspinal_jax.data.copies`, unless `keep_copies_together` is false.

    Raises:
      UsageError: if `fraction` does not lie in 0 < fraction < 1, or, where the test split is needed, no class has
        enough examples.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"test_fraction is {fraction}, expected 0 < test_fraction < 1")
    whole = data.train
    copies = copies_of_a_class(whole.digests, whole.labels) if keep_copies_together else None
    rest, drawn = split_by_class(whole.labels, fraction, seed, copies)
    if needs_test and not len(drawn):
        raise UsageError(
            f"{data.source}: no class has enough examples to hold out {fraction:g} of it; give test examples apart"
        )
    splits = {"train": whole.take(rest), "test": whole.take(drawn)}
    return dataclasses.replace(data, splits=splits, uncut=whole)


def read_table(
    path: Path, classes: Classes, test_fraction: float, seed: int, needs_test: bool = True
) -> Dataset[ArraySplit]:
    """The features and labels of a CSV, TSV or Parquet file; its test split is cut as `cut_test` does.

    The labels are the column named as in `LABEL_COLUMNS`, else the last one; all others are features. A first column
    without a name that counts the rows is left out.

    Raises:
      DataError: if the file is missing or unreadable, pandas is not installed, or a column does not fit.
      UsageError: as `cut_test`.
    """
    frame = _read_frame(path)
    names = [str(name) for name in frame.columns]
    found = [name for name in names if name.strip().lower() in LABEL_COLUMNS]
    if len(found) > 1:
        raise DataError(
            f"{path} has the columns {_listed(found)}, expected one column of labels; leave the others out, or give "
            "them another name if they are features"
        )
    label = found[0] if found else names[-1]
    left_out = [
        name for name in names[:1] if name in _INDEX_COLUMNS and np.array_equal(frame[name], np.arange(len(frame)))
    ]
    taken = [name for name in names if name != label and name not in left_out]
    if not taken:
        raise DataError(
            f"{path} has the one column {label!r}, expected columns of features and one of labels, between commas"
        )
    line = f"{path}: labels are its column {label!r}, features its {len(taken)} others"
    line += "; the row numbers in its first column are left out" if left_out else ""
    if is_primary() and (classes is None or isinstance(classes, int)):  # a run has said so before
        say(line)
    data = make_dataset({"train": (frame[taken], frame[label])}, str(path), classes)
    return cut_test(data, test_fraction, seed, needs_test=needs_test)


def read_rows(given: Any, columns: Sequence[str], width: int) -> np.ndarray:
    """Features float32 [N, D] to predict from.

    Args:
      given: the path of a table, a frame, or an array.
      columns: names of the features that a run was trained on, by which a table or a frame is read, whatever else it
        holds; none where they have no names.
      width: D.

    Raises:
      DataError: if the table cannot be read, a column is not there or not of numbers, or a value is missing.
    """
    source = str(given) if isinstance(given, Path) else "features"
    given = _read_frame(given) if isinstance(given, Path) else given
    held = dict(_columns(given) or ())
    if held and columns:
        if missing := [name for name in columns if name not in held]:
            raise DataError(f"{source} has no column {_listed(missing)}, on which the run was trained")
        inputs = np.column_stack([_numbers(source, name, held[name]) for name in columns])
    else:
        inputs, _ = _inputs(source, given)
    if inputs.ndim != 2 or inputs.shape[1] != width:
        raise DataError(f"{source} has shape {list(inputs.shape)}, but the run was trained on {width} features")
    return _check_split(source, inputs, np.zeros(len(inputs), np.int32)).inputs


def _read_frame(path: Path) -> Any:
    try:
        import pandas as pd
    except ImportError as error:
        raise DataError(
            f"{path} is read by pandas, which is not installed ({error}); run: pip install pandas"
        ) from None
    try:
        require_file(path)
        if path.suffix.lower() == ".parquet":
            frame = pd.read_parquet(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # of lines that it would cut short
                separator = "\t" if path.suffix.lower() == ".tsv" else ","
                frame = pd.read_csv(path, sep=separator, low_memory=False, index_col=False)
    except FileNotFoundError:
        raise DataError(f"data file {path} does not exist") from None
    except ImportError as error:
        raise DataError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    except Exception as error:  # pandas and PyArrow raise many kinds
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"{path} cannot be read as a table: {reason}") from error
    if not len(frame) or not len(frame.columns):
        raise DataError(f"{path} is empty: it has no line below the names of the columns")
    if all(_is_number(str(name)) for name in frame.columns):
        raise DataError(
            f"{path} begins with the numbers {_listed(list(map(str, frame.columns)))}, expected the names of its "
            "columns; write a first line with names"
        )
    return frame


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _listed(names: Sequence[str] | None, most: int = 5) -> str:
    """The first of `names`, quoted, and how many more there are."""
    if names is None:
        return "none"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def _unmasked(where: str, what: str, given: Any) -> Any:
    """`given` without its mask; DataError if something lies under it."""
    if isinstance(given, list | tuple):
        hidden = np.array([np.ma.is_masked(each) for each in given], bool)
    elif np.ma.isMaskedArray(given):
        hidden = np.ma.getmaskarray(given)
    else:
        return given
    if hidden.any():
        raise DataError(
            f"{where}: {hidden.sum():,} of {hidden.size:,} {what} are masked, the first in row "
            f"{np.argwhere(hidden)[0][0]}; numbers under a mask mean nothing: fill them in, or leave those examples out"
        )
    return given.data if np.ma.isMaskedArray(given) else given


def _array(where: str, what: str, given: Any, dtype: Any = None) -> np.ndarray:
    try:
        return np.asarray(given, dtype)
    except (ValueError, TypeError) as error:  # of rows of different lengths
        raise DataError(f"{where}: the {what} are no array: {' '.join(str(error).split())}") from error


def _columns(given: Any) -> list[tuple[str, np.ndarray]] | None:
    """(name, values [N]) of each column of a frame of pandas, Polars or PyArrow; None for anything else."""
    if hasattr(given, "to_pandas") and hasattr(given, "column_names"):
        given = given.to_pandas()
    if not hasattr(given, "columns") or not hasattr(given, "dtypes"):
        return None
    if hasattr(given, "collect"):
        given = given.collect()
    series = [given.iloc[:, i] for i in range(given.shape[1])] if hasattr(given, "iloc") else given.get_columns()
    return [(str(each.name), each.to_numpy()) for each in series]


def _inputs(where: str, given: Any) -> tuple[np.ndarray, list[str] | None]:
    """Images as they are, features as numbers [N, D]; and the names of a frame's columns."""
    columns = _columns(given)
    if columns is None:
        values = _array(where, "features", _unmasked(where, "cells of the features", given))
        if values.dtype.names:
            columns = [(name, values[name]) for name in values.dtype.names]
        elif values.ndim != 2 or values.dtype.kind not in "OUSbiu":
            return values, None
        elif values.dtype.kind in "biu":
            return values.astype(np.float64), None
        else:
            cells = values.astype(object)
            return np.column_stack([_numbers(where, i, cells[:, i]) for i in range(cells.shape[1])]), None
    if not columns:
        raise DataError(f"{where}: the features have no column")
    return np.column_stack([_numbers(where, name, values) for name, values in columns]), [name for name, _ in columns]


def _numbers(where: str, name: str | int, values: np.ndarray) -> np.ndarray:
    """float64 [N] of a column; DataError if it holds anything but numbers, or misses some."""
    if values.dtype.kind not in "biufO":
        values = values.astype(object)
    if values.dtype.kind == "O":
        other = [value for value in values if not _is_missing(value) and not _is_real(value)]
        if other:
            kind = "text" if isinstance(other[0], str | bytes) else type(other[0]).__name__
            raise DataError(
                f"{where}: column {name!r} of the features holds {kind} ({other[0]!r:.60}), expected numbers; encode "
                "it as numbers or leave it out"
            )
        values = np.array([np.nan if _is_missing(value) else float(value) for value in values])
    numbers = values.astype(np.float64)
    missing = np.isnan(numbers)
    if missing.any():
        raise DataError(
            f"{where}: column {name!r} of the features lacks {missing.sum():,} of {len(missing):,} values (NaN), the "
            f"first in row {missing.argmax()}; fill them in, or leave those examples out"
        )
    return numbers


def _is_missing(value: Any) -> bool:
    if isinstance(value, float | np.floating):
        return bool(np.isnan(value))
    return value is None or type(value).__name__ in ("NAType", "NaTType")


def _is_real(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.bool_ | np.integer | np.floating)


def _labels(where: str, given: Any) -> np.ndarray:
    """Integers, booleans or text [N]; DataError if some are missing, or are no labels."""
    columns = _columns(given)
    if columns is not None and len(columns) == 1:
        given = columns[0][1]
    given = _unmasked(where, "labels", given)
    # A list of text and NaN would become text that reads 'nan'.
    values = _array(where, "labels", given, object if isinstance(given, list | tuple) else None)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise DataError(f"{where}_labels have shape {values.shape}, expected one label an example, [N]")
    if values.dtype.kind == "S":
        values = values.astype(object)
    if values.dtype.kind == "O":
        values = _of_objects(where, values)
    if values.dtype.kind in "UT":
        values = values.astype(str)
        _check_there(where, np.isin(np.strings.strip(values), _WRITTEN_MISSING))
    elif values.dtype.kind == "f":
        _check_there(where, np.isnan(values))
        wrong = values[~np.isfinite(values) | (values != np.round(values)) | (np.abs(values) > 2.0**53)]
        if len(wrong):
            raise DataError(
                f"{where}_labels have dtype {values.dtype} and hold {wrong[0]:g}, expected integers or text: a class "
                "for each example"
            )
        values = values.astype(np.int64)
    elif values.dtype.kind not in "iub":
        raise DataError(f"{where}_labels have dtype {values.dtype}, expected integers or text [N]")
    return values


def _of_objects(where: str, values: np.ndarray) -> np.ndarray:
    _check_there(where, np.array([_is_missing(value) for value in values], bool))
    try:
        plain = [value.decode() if isinstance(value, bytes) else value for value in values]
    except UnicodeDecodeError as error:
        raise DataError(f"{where}_labels are bytes that are no UTF-8 ({error}); save them as text") from error
    if all(isinstance(value, str) for value in plain):
        return np.array(plain, str)
    other = [value for value in plain if not _is_real(value)]
    if other:
        kinds = sorted({type(value).__name__ for value in plain})
        raise DataError(f"{where}_labels hold {' and '.join(kinds)} ({other[0]!r:.60}), expected integers or text")
    return _array(where, "labels", plain)


def _check_there(where: str, missing: np.ndarray) -> None:
    if missing.any():
        raise DataError(
            f"{where}: {missing.sum():,} of {len(missing):,} labels are missing (NaN, None or empty), the first in row "
            f"{missing.argmax()}; fill them in, or leave those examples out"
        )


def _find_classes(
    source: str, labels: dict[str, np.ndarray], classes: Classes, class_names: tuple[str, ...] | None
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Numbers of classes 0 .. C-1, int32 [N] by split, and the names of the classes; see `make_dataset`."""
    known = None if classes is None or isinstance(classes, int) else tuple(classes)
    if class_names is not None and all(values.dtype.kind == "b" for values in labels.values()):
        labels = {name: values.astype(int) for name, values in labels.items()}
    if isinstance(classes, int) and class_names is not None and len(class_names) != classes:
        raise DataError(f"{source}: {len(class_names)} class names for {classes} classes")
    if any(values.dtype.kind not in "iu" for values in labels.values()) or (known and class_names is None):
        return _numbered_by_text(source, labels, classes if known is None else None, class_names or known)
    for name, values in labels.items():
        _check_range(f"{source}: {name}", values)
    found = np.unique(np.concatenate([np.unique(values).astype(np.int64) for values in labels.values()]))
    count = len(class_names) if class_names else classes if isinstance(classes, int) else None
    plain = found[0] >= 0 and found[-1] < (count or len(found))
    if plain:
        names = class_names or tuple(map(str, range(count or int(labels["train"].max()) + 1)))
    elif count is None or count == len(found):
        _check_plausible(source, labels["train"])
        names = class_names or tuple(map(str, found.tolist()))
        labels = {name: np.searchsorted(found, values) for name, values in labels.items()}
        if is_primary():
            shown = ", ".join(map(str, found[:5])) + (f" .. {found[-1]}" if len(found) > 5 else "")
            say(f"{source}: labels {shown} are {len(names)} classes, named {_listed(names)}")
    else:
        names = tuple(map(str, range(count)))
    for name, values in labels.items():
        check_labels(f"{source}: {name}", values, len(names))
    if count is None:
        _check_trained(source, labels, names, named=not plain)
    return {name: values.astype(np.int32) for name, values in labels.items()}, names


def _numbered_by_text(
    source: str, labels: dict[str, np.ndarray], count: Classes, names: tuple[str, ...] | None
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """As `_find_classes`, of labels that are the names of their classes; None for those that stand there."""
    texts = {name: values.astype(str) for name, values in labels.items()}
    found = np.unique(np.concatenate([np.unique(values) for values in texts.values()])).tolist()
    places = {name: place for place, name in enumerate(names or found)}
    for name, values in texts.items():
        unknown = [label for label in np.unique(values).tolist() if label not in places]
        if unknown:
            raise DataError(
                f"{source}: {name}_labels hold {_listed(unknown)}, expected one of the {len(places)} classes "
                f"{_listed(list(places))}"
            )
    if count is not None and count != len(places):
        raise DataError(f"{source}: the labels name {len(places)} classes, but data.num_classes is {count}")
    numbered = {
        name: np.array([places[label] for label in np.unique(values).tolist()], np.int32)[
            np.unique(values, return_inverse=True)[1]
        ]
        for name, values in texts.items()
    }
    if names is None:
        _check_trained(source, numbered, tuple(places), named=True)
    return numbered, tuple(places)


def _check_trained(source: str, labels: dict[str, np.ndarray], names: tuple[str, ...], named: bool) -> None:
    """Raise DataError unless training labels are of two classes, and, where the labels name them, of all classes."""
    trained = np.unique(labels["train"])
    if len(trained) < 2:
        raise DataError(
            f"{source}: all {len(labels['train']):,} train_labels are {names[trained[0]]!r}, expected two classes"
        )
    for name, values in labels.items():
        unseen = [names[label] for label in np.setdiff1d(values, trained)] if named else []
        if unseen:
            raise DataError(
                f"{source}: {name} has the classes {_listed(unseen)}, of which train has no example; add some, or "
                "leave these out"
            )


def _check_range(where: str, labels: np.ndarray) -> None:
    """Raise DataError unless the labels fit into int32, before a cast would make others of them."""
    limits = np.iinfo(np.int32)
    low, high = int(labels.min()), int(labels.max())
    if low < limits.min or high > limits.max:
        raise DataError(f"{where}_labels go from {low} to {high}, expected 0 .. C-1, the numbers of C classes")


def _check_plausible(source: str, labels: np.ndarray) -> None:
    """Raise DataError if a single example has a label far beyond the others: it is damaged sooner than a class."""
    values, counts = np.unique(labels, return_counts=True)
    far = values[(np.abs(values) >= max(1000, len(labels))) & (counts == 1)]
    if len(far):
        raise DataError(
            f"{source}: train_labels go up to {far[-1]}, with {len(labels)} examples, of which one has it; correct it, "
            "or number the classes from 0"
        )


def _check_lengths(where: str, inputs: np.ndarray, labels: np.ndarray) -> None:
    if inputs.ndim < 1 or len(inputs) != len(labels):
        raise DataError(f"{where}: {len(inputs) if inputs.ndim else 0} examples but {len(labels)} labels")
    if len(labels) == 0:
        raise DataError(f"{where} is empty")
    if 0 in inputs.shape:
        raise DataError(f"{where}_images have shape {inputs.shape}: there is nothing in them")


def _check_split(where: str, inputs: np.ndarray, labels: np.ndarray) -> ArraySplit:
    if inputs.dtype == np.uint8 and inputs.ndim in (3, 4):
        images = inputs if inputs.ndim == 4 else inputs[..., None]
        return ArraySplit(np.ascontiguousarray(images), labels)
    if np.issubdtype(inputs.dtype, np.floating) and inputs.ndim == 2:
        with np.errstate(over="ignore"):
            single = np.ascontiguousarray(inputs, np.float32)
        for values, what in ((inputs, "NaN or infinity"), (single, "numbers beyond float32's range")):
            bad = ~np.isfinite(values).all(axis=1)
            if bad.any():
                raise DataError(
                    f"{where}: features hold {what} in {int(bad.sum())} rows, first in row {int(bad.argmax())}"
                )
        return ArraySplit(single, labels)
    raise DataError(
        f"{where}_images have shape {inputs.shape} and dtype {inputs.dtype}, expected uint8 images [N, H, W] or "
        "[N, H, W, C], or features [N, D], which are numbers"
    )
