"""`pspinal_jax.compare`: a comparison of heads on arrays at hand, or of a data set that a command has read."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pspinal_jax.comparison.ledger import Ledger, check_workdir, keeps_copies_together
from pspinal_jax.comparison.report import format_table, format_terminal, make_result, plot, write_report
from pspinal_jax.comparison.run import CompareConfig, Comparer
from pspinal_jax.comparison.settings import Ranges
from pspinal_jax.data.dataset import ArraySplit, Dataset, cut_test
from pspinal_jax.data.tables import make_dataset
from pspinal_jax.environment import enable_compilation_cache
from pspinal_jax.errors import RunError, UsageError
from pspinal_jax.files import expanded
from pspinal_jax.progress import warn


class Comparison:
    """The outcome of a comparison; printed, it is a table and a sentence.

    Attributes:
      result: what compare.json holds: ``result["methods"]["dense"]["test_accuracy"]["mean"]`` is 0 .. 1.
    """

    def __init__(self, result: dict[str, Any]) -> None:
        self.result = result

    def __repr__(self) -> str:
        return format_terminal(self.result)

    def _repr_markdown_(self) -> str:
        return format_table(self.result)

    @property
    def best(self) -> str:
        """The head, or floor, that did best on validation."""
        return str(self.result["best_on_validation"])

    def plot(self) -> Any:
        """A matplotlib Figure: test accuracy of every seed, and paired differences with their 95 % intervals."""
        return plot(self.result)


def compare(
    features: Any,
    labels: Any,
    *,
    test_features: Any = None,
    test_labels: Any = None,
    test_fraction: float = 0.2,
    class_names: Sequence[str] | None = None,
    workdir: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Comparison:
    """Compare heads on arrays: which one, tuned alike, is better than a linear layer by more than the noise?

    Example::

        >>> import numpy as np, pspinal_jax
        >>> rng = np.random.default_rng(0)
        >>> labels = rng.integers(0, 3, 120)
        >>> features = np.eye(3, 8)[labels] + rng.normal(0, 0.5, (120, 8))
        >>> small = dict(heads=("mlp", "dense"), trials=2, num_seeds=2, epochs=1, batch_size=16, layer_width=4)
        >>> comparison = pspinal_jax.compare(features, labels, progress=False, **small)
        >>> sorted(comparison.result["methods"])
        ['dense', 'knn', 'mlp', 'ridge']

    Args:
      features: numbers [N, D], as an array or a frame (pandas, Polars, PyArrow), or images uint8 [N, H, W] or
        [N, H, W, C], which are flattened.
      labels: integers or text [N], as an array, list or series. Integers 0 .. C-1 are numbers of classes; other labels
        are names of classes.
      test_features: of the test split, likewise; without it `test_fraction` of each class is cut from `features` by
        the seed.
      test_labels: its labels.
      test_fraction: see `test_features`.
      class_names: names of the C classes.
      workdir: folder for trials.jsonl, compare.json, compare.md and compare.png; called again with it, finished trials
        are not run again. None: nothing is written.
      progress: whether to show progress on standard error.
      **settings: fields of `pspinal_jax.comparison.run.CompareConfig`: heads, floors, trials, num_seeds, splits, seed,
        match ('published' or 'parameters'), layer_width, num_layers, epochs, batch_size, validation_fraction,
        standardize, mode, workers; and learning_rate, weight_decay, dropout_rate and label_smoothing as (low, high).

    Returns:
      A `Comparison`.

    Raises:
      DataError: if the arrays do not fit, a column is text, or a cell or a label is missing or masked.
      UsageError: if a setting does not.
      RunError: if `workdir` holds something else, or cannot be written.
    """
    folder = None if workdir is None else expanded(workdir)
    config = dataclasses.replace(make_config(settings), keep_copies_together=keeps_copies_together(folder))
    if (test_features is None) != (test_labels is None):
        raise UsageError("test_features and test_labels are given together, or neither")
    names = None if class_names is None else tuple(map(str, class_names))
    splits = {"train": (features, labels)} | ({} if test_features is None else {"test": (test_features, test_labels)})
    data = make_dataset(splits, "arrays", None, names)
    if test_features is None:
        data = cut_test(data, test_fraction, config.seed, config.keep_copies_together)
    return compare_data(data, config, folder, "pspinal_jax.compare(features, labels, ..)", progress)


def make_config(settings: dict[str, Any]) -> CompareConfig:
    """A config from its fields and the ranges', flat; UsageError names one that there is not."""
    ranges = {name: tuple(settings.pop(name)) for name in Ranges.__dataclass_fields__ if name in settings}
    for name in settings:
        if name not in CompareConfig.__dataclass_fields__:
            known = ", ".join([*CompareConfig.__dataclass_fields__, *Ranges.__dataclass_fields__])
            raise UsageError(f"compare has no setting {name!r}; there are: {known}")
    if "heads" in settings:
        settings["heads"] = tuple([settings["heads"]] if isinstance(settings["heads"], str) else settings["heads"])
    return CompareConfig(**{**settings, **({"ranges": Ranges(**ranges)} if ranges else {})})


def compare_data(
    data: Dataset[ArraySplit], config: CompareConfig, workdir: Path | None, command: str, progress: bool = True
) -> Comparison:
    """The comparison on `data`, or what is left of it in `workdir`; raises as `compare`."""
    enable_compilation_cache()
    if workdir is not None:
        check_workdir(workdir)
    ledger = Ledger(workdir)
    config = dataclasses.replace(config, keep_copies_together=keeps_copies_together(workdir))
    comparer = Comparer(data, config, ledger, progress)
    counts, text = comparer.copies
    if drawn := counts["test_in_train_of_drawn_splits"]:
        text = "; ".join(
            [*filter(None, [text]), f"of the splits that are drawn, {drawn:,} test examples are also in train"]
        )
    if text:
        warn(f"{data.source}: {text}")
    with ledger.opened(comparer.identity(), len(comparer.splits[0].test_labels)):
        comparer.run()
        result = make_result(comparer, command)
        if workdir is not None:
            try:
                write_report(workdir, result)
            except OSError as error:
                raise RunError(f"{workdir} cannot be written: {error.strerror or error}") from error
    return Comparison(result)
