"""Examples as people have them (arrays, masked arrays, frames, labels of text, CSV and Parquet files) to a data set.

All examples that are held in memory pass through `make_dataset`. A missing cell or label is an error; nothing is filled
in or left out in silence.
"""

import dataclasses
import numbers
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pspinal_jax.data.dataset import ArraySplit, Dataset, array_dataset, check_labels, cut_test, first_names
from pspinal_jax.distributed import is_primary
from pspinal_jax.errors import DataError
from pspinal_jax.files import require_file
from pspinal_jax.progress import say

LABEL_COLUMNS = ("label", "labels", "target", "class")
"""Names of a table's column of labels, in any case; without one of them it is the last column."""
_INDEX_COLUMNS = ("Unnamed: 0", "__index_level_0__")
"""What pandas calls the column that it wrote for its row numbers."""
_WRITTEN_MISSING = ("", "nan", "<NA>")
"""What NumPy and pandas make of a missing label when they turn labels into text."""
_MAX_EXACT = 2.0**53

Classes = int | Sequence[str] | None
"""How many classes there are, the names of a run's classes that labels are matched with, or None to find them."""


def make_dataset(
    splits: dict[str, tuple[Any, Any]],
    source: str,
    classes: Classes = None,
    class_names: tuple[str, ...] | None = None,
) -> Dataset[ArraySplit]:
    """Check examples and convert them to uint8 images or float32 features.

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
    for name in sorted(splits, key=lambda name: name != "train"):
        given, given_labels = splits[name]
        where = f"{source}: {name}"
        inputs[name], columns[name] = _inputs(where, given)
        labels[name] = _labels(where, given_labels)
        if len(inputs[name]) != len(labels[name]):
            raise DataError(f"{where}: {len(inputs[name])} examples but {len(labels[name])} labels")
        for what, found in (("columns", columns), ("shape", {key: value.shape[1:] for key, value in inputs.items()})):
            if found[name] != found["train"]:
                raise DataError(f"{where} has the {what} {found[name]}, expected those of train, {found['train']}")
        if inputs[name].dtype != inputs["train"].dtype:
            raise DataError(f"{where} holds {inputs[name].dtype}, expected {inputs['train'].dtype} as in train")
    numbered, names = _find_classes(source, labels, classes, class_names)
    arrays = {name: ArraySplit(inputs[name], numbered[name]) for name in splits}
    return dataclasses.replace(array_dataset(arrays, names, source), columns=columns["train"])


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
        raise DataError(f"{path} has the columns {', '.join(found)}, expected one column of labels; rename the others")
    label = found[0] if found else names[-1]
    is_index = names[0] in _INDEX_COLUMNS and np.array_equal(frame[names[0]], np.arange(len(frame)))
    features = [name for name in names[int(is_index) :] if name != label]
    if not features:
        raise DataError(f"{path} has the one column {label!r}, expected columns of features and one of labels")
    if is_primary() and (classes is None or isinstance(classes, int)):  # not again for a run that is evaluated
        numbered = "; the row numbers in its first column are left out" if is_index else ""
        say(f"{path}: labels are its column {label!r}, features its {len(features)} others{numbered}")
    data = make_dataset({"train": (frame[features], frame[label])}, str(path), classes)
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
            raise DataError(f"{source} lacks columns on which the run was trained: {first_names(missing)}")
        inputs = _features(source, [(name, held[name]) for name in columns])
    else:
        inputs, _ = _inputs(source, given)
    if inputs.ndim != 2 or inputs.shape[1] != width:
        raise DataError(f"{source} has shape {list(inputs.shape)}, but the run was trained on {width} features")
    return inputs


def _read_frame(path: Path) -> Any:
    try:
        import pandas as pd
    except ImportError as error:
        raise DataError(f"{path} is read by pandas, which is not installed; run: pip install pandas") from error
    try:
        require_file(path)
        if path.suffix.lower() == ".parquet":
            frame = pd.read_parquet(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # of lines that it would cut short
                separator = "\t" if path.suffix.lower() == ".tsv" else ","
                frame = pd.read_csv(path, sep=separator, low_memory=False, index_col=False)
    except Exception as error:  # pandas and PyArrow raise many kinds
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"{path} cannot be read as a table: {reason}") from error
    if frame.empty:
        raise DataError(f"{path} is empty: it has no line below the names of the columns")
    if pd.to_numeric(frame.columns.to_series(), errors="coerce").notna().all():
        raise DataError(f"{path} begins with numbers, expected a first line with the names of its columns")
    return frame


def _columns(given: Any) -> list[tuple[str, np.ndarray]] | None:
    """(name, values [N]) of each column of a frame of pandas, Polars or PyArrow; None for anything else."""
    if hasattr(given, "collect"):
        given = given.collect()
    if hasattr(given, "to_pandas") and hasattr(given, "column_names"):
        given = given.to_pandas()
    if hasattr(given, "iloc") and hasattr(given, "columns"):
        return [(str(name), series.to_numpy()) for name, series in given.items()]
    if hasattr(given, "get_columns"):
        return [(series.name, series.to_numpy()) for series in given.get_columns()]
    return None


def _array(where: str, what: str, given: Any, dtype: Any = None) -> np.ndarray:
    """`given` as an array; DataError if a part of it is masked, or rows have different lengths."""
    if isinstance(given, list | tuple):
        masked = np.array([np.ma.is_masked(row) for row in given], bool)
    else:
        masked = np.ma.getmaskarray(given) if np.ma.isMaskedArray(given) else np.zeros(0, bool)
    if masked.any():
        raise DataError(
            f"{where}: {masked.sum():,} of {masked.size:,} {what} are masked, the first in row "
            f"{np.argwhere(masked)[0][0]}; fill them in, or leave those examples out"
        )
    try:
        return np.asarray(given, dtype)
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: the {what} are not an array: {' '.join(str(error).split())}") from error


def _inputs(where: str, given: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """Images uint8 [N, H, W, C] or features float32 [N, D], and the names of a frame's columns."""
    columns = _columns(given)
    if columns is None:
        values = _array(where, "cells of the features", given)
        if 0 in values.shape:
            raise DataError(f"{where} is empty: its inputs have shape {values.shape}")
        if values.dtype == np.uint8 and values.ndim in (3, 4):
            return np.ascontiguousarray(values if values.ndim == 4 else values[..., None]), ()
        if values.dtype.names:
            columns = [(name, values[name]) for name in values.dtype.names]
        elif values.ndim == 2:
            numeric = values.dtype.kind in "biuf"
            by_column = [("", values)] if numeric else [(str(index), column) for index, column in enumerate(values.T)]
            return _features(where, by_column), ()
        else:
            raise DataError(
                f"{where}: inputs have shape {values.shape} and dtype {values.dtype}, expected uint8 images [N, H, W] "
                "or [N, H, W, C], or features [N, D], which are numbers"
            )
    if not columns or not len(columns[0][1]):
        raise DataError(f"{where} is empty: its features have {len(columns)} columns")
    return _features(where, columns), tuple(name for name, _ in columns)


def _features(where: str, columns: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """float32 [N, D] of columns [N] or [N, K]; DataError unless all are numbers that float32 holds."""
    singles = []
    for name, values in columns:
        with np.errstate(over="ignore"):
            single = _numbers(where, name, values).astype(np.float32)
        bad = ~np.isfinite(single)
        if bad.any():
            row, *column = np.argwhere(bad)[0]
            raise DataError(
                f"{where}: column {name or str(column[0])!r} of the features lacks {bad.sum():,} of {bad.size:,} "
                f"values (NaN, infinity or beyond float32's range), the first in row {row}; fill them in, or leave "
                "those examples out"
            )
        singles.append(single)
    return np.ascontiguousarray(np.column_stack(singles))


def _numbers(where: str, name: str, values: np.ndarray) -> np.ndarray:
    """The numbers of a column, NaN for what is missing; DataError if it holds anything else."""
    if values.dtype.kind in "biuf":
        return values
    cells = list(values) if values.dtype.kind in "mM" else values.tolist()
    for cell in cells:
        if not _is_missing(cell) and not isinstance(cell, numbers.Real | np.bool_):
            raise DataError(
                f"{where}: column {name!r} of the features holds {cell!r:.60}, expected numbers; encode it as numbers "
                "or leave it out"
            )
    return np.array([np.nan if _is_missing(cell) else cell for cell in cells], np.float64)


def _is_missing(cell: Any) -> bool:
    if isinstance(cell, float | np.floating):
        return bool(np.isnan(cell))
    return cell is None or type(cell).__name__ in ("NAType", "NaTType")


def _labels(where: str, given: Any) -> np.ndarray:
    """Integers, booleans or text [N]; DataError if some are missing, or are not labels."""
    columns = _columns(given)
    if columns is not None and len(columns) == 1:
        given = columns[0][1]
    # A list of text and NaN would become text that reads 'nan'.
    values = _array(where, "labels", given, object if isinstance(given, list | tuple) else None)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise DataError(f"{where}_labels have shape {values.shape}, expected one label an example, [N]")
    if values.dtype.kind in "OSUT":
        try:
            cells = [cell.decode() if isinstance(cell, bytes) else cell for cell in values.tolist()]
        except UnicodeDecodeError as error:
            raise DataError(f"{where}_labels are bytes that are not UTF-8 ({error}); save them as text") from error
        missing: Any = [
            cell.strip() in _WRITTEN_MISSING if isinstance(cell, str) else _is_missing(cell) for cell in cells
        ]
        kinds = {type(cell).__name__ for cell in cells}
        is_text, is_numeric = kinds == {"str"}, all(isinstance(cell, numbers.Real | np.bool_) for cell in cells)
        if not any(missing) and not is_text and not is_numeric:
            raise DataError(f"{where}_labels hold {' and '.join(sorted(kinds))}, expected integers or text")
        values = values if any(missing) else np.array(cells)
    else:
        missing = np.isnan(values) if values.dtype.kind == "f" else np.zeros(1, bool)
    if np.any(missing):
        raise DataError(
            f"{where}: {np.sum(missing):,} of {len(values):,} labels are missing (NaN, None or empty), the first in "
            f"row {np.argmax(missing)}; fill them in, or leave those examples out"
        )
    if values.dtype.kind == "f":
        wrong = values[~np.isfinite(values) | (values != np.round(values)) | (np.abs(values) > _MAX_EXACT)]
        if len(wrong):
            raise DataError(f"{where}_labels hold {wrong[0]:g}, expected integers or text: a class for each example")
        values = values.astype(np.int64)
    if values.dtype.kind not in "iubU":
        raise DataError(f"{where}_labels have dtype {values.dtype}, expected integers or text [N]")
    return values


def _find_classes(
    source: str, labels: dict[str, np.ndarray], classes: Classes, class_names: tuple[str, ...] | None
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Numbers of classes 0 .. C-1, int32 [N] by split, and the names of the classes; see `make_dataset`."""
    count = classes if isinstance(classes, int) else None
    names = class_names or (None if classes is None or isinstance(classes, int) else tuple(classes))
    if class_names and len(set(class_names)) < len(class_names):
        raise DataError(f"{source}: class_names hold a name twice: {first_names(class_names)}")
    if class_names and count not in (None, len(class_names)):
        raise DataError(f"{source}: {len(class_names)} class names for {count} classes")
    if class_names and all(values.dtype.kind == "b" for values in labels.values()):
        labels = {name: values.astype(int) for name, values in labels.items()}
    by_name = any(values.dtype.kind not in "iu" for values in labels.values()) or (names and not class_names)
    if by_name:
        labels = {name: values.astype(str) for name, values in labels.items()}
    lengths = [len(values) for values in labels.values()]
    found, numbered = np.unique(np.concatenate(list(labels.values())), return_inverse=True)
    limits = np.iinfo(np.int32)
    if not by_name and (found[0] < limits.min or found[-1] > limits.max):
        raise DataError(f"{source}: labels go from {found[0]} to {found[-1]}, expected 0 .. C-1 for C classes")
    inferred = names is None and (by_name or count is None)
    size = len(names) if names else count or len(found)
    plain = not by_name and found[0] >= 0 and found[-1] < size
    if by_name:
        names = names or tuple(found.tolist())
        unknown = [label for label in found.tolist() if label not in set(names)]
        if unknown:
            raise DataError(
                f"{source}: labels hold {first_names(unknown)}, expected one of the classes {first_names(names)}"
            )
        if count not in (None, len(names)):
            raise DataError(f"{source}: the labels name {len(names)} classes, but data.num_classes is {count}")
        numbered = np.array([names.index(label) for label in found.tolist()])[numbered]
    elif not plain and size == len(found):
        _check_plausible(source, labels["train"])
        names = names or tuple(map(str, found.tolist()))
        if is_primary():
            say(f"{source}: labels {found[0]} .. {found[-1]} are {len(names)} classes, named {first_names(names)}")
    else:
        names = names or tuple(map(str, range(count or int(labels["train"].max()) + 1)))
        numbered = found[numbered]
    by_split = dict(zip(labels, np.split(numbered, np.cumsum(lengths)[:-1]), strict=True))
    for name, values in by_split.items():
        check_labels(f"{source}: {name}", values, len(names))
    if inferred:
        _check_trained(source, by_split, names, every_class=not plain)
    return {name: values.astype(np.int32) for name, values in by_split.items()}, names


def _check_trained(source: str, labels: dict[str, np.ndarray], names: tuple[str, ...], every_class: bool) -> None:
    """Raise DataError unless training labels are of two classes and, if asked, of `every_class`."""
    trained = np.unique(labels["train"])
    if len(trained) < 2:
        raise DataError(f"{source}: all train_labels are {names[trained[0]]!r}, expected two classes")
    for name, values in labels.items():
        unseen = [names[label] for label in np.setdiff1d(values, trained)] if every_class else []
        if unseen:
            raise DataError(f"{source}: {name} has classes of which train has no example: {first_names(unseen)}")


def _check_plausible(source: str, labels: np.ndarray) -> None:
    """Raise DataError if a single example has a label far beyond the others: it is damaged sooner than a class."""
    values, counts = np.unique(labels, return_counts=True)
    far = values[(np.abs(values) >= max(1000, len(labels))) & (counts == 1)]
    if len(far):
        raise DataError(
            f"{source}: train_labels go up to {far[-1]}, with {len(labels)} examples, of which one has it; correct it, "
            "or number the classes from 0"
        )
