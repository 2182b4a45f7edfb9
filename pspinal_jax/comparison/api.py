"""`pspinal_jax.compare`: a comparison of heads on arrays, or on a data set read by the command."""

import dataclasses
import functools
import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pspinal_jax.backbones.efficientnet import SCALES
from pspinal_jax.comparison.baselines import BASELINES
from pspinal_jax.comparison.best import Source, best_held, save_best
from pspinal_jax.comparison.report import (
    format_html,
    format_table,
    format_terminal,
    list_rows,
    make_result,
    plot,
    write_report,
)
from pspinal_jax.comparison.search import Comparer
from pspinal_jax.comparison.settings import HEADS, CompareConfig
from pspinal_jax.comparison.trial_log import ADVICE, TrialLog
from pspinal_jax.data import load_data
from pspinal_jax.data.catalogue import CATALOGUE
from pspinal_jax.data.dataset import cut_test
from pspinal_jax.data.npz import read_npz
from pspinal_jax.data.tables import make_dataset
from pspinal_jax.data.tfds import open_prepared
from pspinal_jax.environment import enable_compilation_cache
from pspinal_jax.errors import DataError, UsageError
from pspinal_jax.files import expanded, write_json
from pspinal_jax.models import build_model, with_default_preprocessing
from pspinal_jax.progress import say, warn
from pspinal_jax.recipes import load_recipe
from pspinal_jax.recipes.schema import TABLES, AugmentConfig, Card, DataConfig
from pspinal_jax.runs.directory import read_checked
from pspinal_jax.runs.run import Run, load_run
from pspinal_jax.runs.start import complete_backbone, extract_features, save_features, start_variables

MAX_PIXELS = 64 * 64 * 3
"""Largest number of pixels of images that heads see directly; of larger images they see a backbone's features."""


class Comparison:
    """The result of a comparison. Printing it, or displaying it in a notebook, shows a table and a summary.

    Attributes:
      result: the contents of compare.json: ``result["methods"]["dense"]["test_accuracy"]["mean"]`` is 0 .. 1.
    """

    def __init__(self, result: dict[str, Any], save: Callable[[Path], None] | None = None) -> None:
        self.result, self._save = result, save

    def __repr__(self) -> str:
        return format_terminal(self.result)

    def _repr_markdown_(self) -> str:
        return format_table(self.result)

    def _repr_html_(self) -> str:
        return format_html(self.result)

    @property
    def best(self) -> str:
        """Name of the head or baseline that is best on validation."""
        return str(self.result["best_on_validation"])

    @property
    def table(self) -> Any:
        """One row per method, as a pandas.DataFrame or, without pandas, a list of dicts."""
        rows = list_rows(self.result)
        try:
            from pandas import DataFrame
        except ImportError:
            return rows
        return DataFrame(rows).set_index("method")

    @functools.cached_property
    def best_model(self) -> Run:
        """The best head or linear baseline, ``result["saved"]``, as a run: ``best_model.predict_proba(x)``.

        It is stored in the folder best of the work directory. Without a work directory, it is in a temporary folder,
        which is deleted with this object.

        Raises:
          UsageError: if the comparison has neither a head nor a linear baseline.
        """
        if self._save is None or self.result.get("saved") is None:
            raise UsageError("there is no best model: a run directory holds heads and linear baselines")
        if (path := self.result["execution"]["best_model"]) is None:
            folder = tempfile.mkdtemp()
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._save(path := Path(folder) / "best")
        return load_run(path)

    def plot(self) -> Any:
        """Test accuracy of every seed, and paired differences with 95 % intervals, as a matplotlib Figure."""
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
    also: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Comparison:
    """Compare heads and baselines on arrays, all tuned alike, with intervals for every difference.

    Example::

        >>> import numpy as np, pspinal_jax
        >>> rng = np.random.default_rng(0)
        >>> labels = rng.integers(0, 3, 120)
        >>> features = np.eye(3, 8)[labels] + rng.normal(0, 0.5, (120, 8))
        >>> small = dict(heads=("mlp", "dense"), floors=False, trials=2, num_seeds=2, epochs=1, batch_size=16)
        >>> comparison = pspinal_jax.compare(features, labels, progress=False, **small)
        >>> sorted(comparison.result["methods"])
        ['dense', 'dense_average', 'mlp', 'mlp_average']

    Args:
      features: numbers [N, D], as an array or a frame (pandas, Polars, PyArrow); or images uint8 [N, H, W] or
        [N, H, W, C], which are flattened; or tokens, floats [N, T, D], which are averaged over T.
      labels: integers or text [N], as an array, list or series. Integers 0 .. C-1 are class numbers; other labels are
        class names.
      test_features: features of the test split. By default, `test_fraction` of each class is split off from `features`
        by the seed.
      test_labels: labels of the test split.
      test_fraction: see `test_features`.
      class_names: names of the C classes.
      workdir: folder for trials.jsonl, compare.json, compare.md, compare.png, probabilities and best (the best model).
        Repeating the call resumes a comparison: finished trials are not run again. None writes nothing.
      progress: whether to show progress on standard error.
      also: row name -> scikit-learn classifier, with one setting each and on unscaled features. Classifiers with a
        random state are fitted with `num_seeds` of them.
      **settings: fields of `pspinal_jax.comparison.settings.CompareConfig`: heads, floors, trials, num_seeds, refit,
        save, splits, seed, match ('published' or 'parameters'), layer_width, num_layers, epochs, batch_size,
        validation_fraction, standardize, mode, workers, engine ('threads' or 'ray'), ray_address; and learning_rate,
        weight_decay, dropout_rate and label_smoothing as (low, high).

    Returns:
      A `Comparison`.

    Raises:
      DataError: if the arrays do not match, a column is text, or a cell or a label is missing or masked.
      UsageError: if a setting is invalid, or `workdir` holds something else.
      RunError: if `workdir` is damaged, in use or not writable.
      OSError: if writing to `workdir` fails.
    """
    known = CompareConfig.__dataclass_fields__
    if unknown := settings.keys() - known:
        raise UsageError(f"compare has no setting {unknown.pop()!r}; there are: {', '.join(known)}")
    if isinstance(settings.get("heads"), str):
        settings["heads"] = (settings["heads"],)
    config = CompareConfig(**settings)
    for name, estimator in (also or {}).items():
        if name in (*HEADS, *BASELINES) or not (hasattr(estimator, "fit") and hasattr(estimator, "get_params")):
            raise UsageError(
                f"also has {name!r}: {estimator!r:.60}, expected scikit-learn classifiers by names of their own"
            )
    log = TrialLog(None if workdir is None else expanded(workdir))
    if (test_features is None) != (test_labels is None):
        raise UsageError("test_features and test_labels are given together, or neither")
    splits = {"train": (_pooled(features), labels)}
    if test_features is not None:
        splits["test"] = _pooled(test_features), test_labels
    data = make_dataset(splits, "arrays", None, None if class_names is None else tuple(map(str, class_names)))
    if test_features is None:
        data = cut_test(data, test_fraction, config.seed, log.keep_copies_together)
    source = Source.of(data, DataConfig("arrays"), also or {})
    return compare_data(source, config, log, "pspinal_jax.compare(features, labels, ..)", progress)


def _pooled(features: Any) -> Any:
    """Tokens [N, T, D] averaged over those of T that are not masked; anything else unchanged."""
    tokens = np.asanyarray(features) if getattr(features, "ndim", 0) == 3 else np.zeros(0, int)
    if tokens.dtype.kind != "f":
        return features
    say(f"features [N, T, D] = {list(tokens.shape)} are tokens: the mean over T is taken")
    return tokens.mean(1, dtype=np.float32)


def compare_data(
    source: Source, config: CompareConfig, log: TrialLog, command: str, progress: bool = True
) -> Comparison:
    """Run, or resume, the comparison on `source` in the work directory of `log`; raises like `compare`."""
    enable_compilation_cache()
    comparer = Comparer(source.data, config, log, progress, source.estimators)
    counts, text = comparer.copies
    if drawn := counts["test_in_train_of_drawn_splits"]:
        text += f"{'; ' if text else ''}of the splits that are drawn, {drawn:,} test examples are also in train"
    if text:
        warn(f"{source.data.source}: {text}")
    with comparer.cluster(), log.opened(comparer.identity()):
        comparer.run()
        result = make_result(comparer, command)
        held, best = best_held(result), result["best_on_validation"]

        def save(path: Path) -> None:
            save_best(comparer, result, str(held), source, path)

        result["saved"], path = held, None
        if log.workdir is not None and config.save and held is not None:
            path = log.workdir / "best"
            save(path)
            if held != best:
                say(f"{best} is best on validation, which a run directory cannot hold; {path} is {held}")
        result["execution"]["best_model"] = None if path is None else str(path)
        if log.workdir is not None:
            write_report(log.workdir, result)
    return Comparison(result, save)


def load_features(source: str, log: TrialLog, backbone: str | None, weights: str | None, seed: int = 0) -> Source:
    """The data set that `source` names, as features or small images.

    Args:
      source: an .npz file, a table (.csv, .tsv, .parquet), the directory or the name of a prepared data set, or a
        folder of class folders.
      log: the comparison's log, in whose work directory the features of a folder of images are kept.
      backbone: backbone that computes them; None for that of the recipe `folder`.
      weights: weights of the backbone; None for those of that recipe, 'random' for random numbers.
      seed: seed of a table's test split, which is a fifth of each class.

    Raises:
      DataError: if the data does not exist or cannot be read.
      UsageError: if a backbone is given but not used, or does not exist.
    """
    path = expanded(source)
    if path.is_dir() and not ((path / "dataset_info.json").is_file() and _has_small_images(path)):
        return _features_of_images(path, log, backbone, weights)
    if path.exists() or path.suffix.lower() in (".npz", *TABLES):
        config = DataConfig(name="features", path=path, split_seed=seed)
    elif source in CATALOGUE:
        config = DataConfig(name=source)
    else:
        raise DataError(
            f"{source} does not exist; compare takes an .npz file, a table, a folder, the directory of a prepared data "
            f"set, or the name of one: {', '.join(CATALOGUE)}"
        )
    if backbone is not None or weights is not None:
        raise UsageError(f"--backbone and --weights are for folders of images; {source} is taken as it is")
    return Source.of(load_data(config), config)


def _has_small_images(directory: Path) -> bool:
    shape = open_prepared(directory).info.features["image"].shape
    return None not in shape and math.prod(shape) <= MAX_PIXELS


def _features_of_images(folder: Path, log: TrialLog, backbone: str | None, weights: str | None) -> Source:
    """The features of a folder of images, computed once and kept in the work directory of `log`."""
    recipe, workdir = load_recipe("folder"), log.workdir or Path()
    name: Any = backbone or recipe.model.backbone
    if name not in SCALES:
        raise UsageError(
            f"--backbone is {name}, expected one of {', '.join(SCALES)}; for another backbone, give compare the .npz "
            "file that extract-features writes"
        )
    weights = None if weights == "random" else weights or recipe.model.weights
    changes: dict[str, Any] = {"path": folder, "augment": "none", "validation_fraction": 0.0}
    data = dataclasses.replace(recipe.data, keep_copies_together=log.keep_copies_together, **changes)
    model_config = dataclasses.replace(recipe.model, backbone=name, weights=weights)
    recipe = with_default_preprocessing(dataclasses.replace(recipe, data=data, model=model_config, freeze="backbone"))
    images = load_data(recipe.data)
    identity = {"images": images.fingerprint(), "backbone": name, "weights": weights}
    identity["image_size"] = recipe.data.image_size

    @functools.cache
    def variables() -> dict[str, Any]:
        return complete_backbone(recipe, model, start_variables(recipe, model, None, images), images)

    model = build_model(recipe, images.example_shape, images.num_classes)
    whole = dataclasses.replace(
        recipe, card=Card("compare", "none", "the best of a comparison"), cache_features=True, augment=AugmentConfig()
    )
    path, record = workdir / "features.npz", workdir / "features.json"
    if record.exists() and path.exists():
        if read_checked(record, dict, advice=ADVICE) != identity:
            raise UsageError(f"{workdir} holds features of other images or another backbone; choose another --workdir")
        return Source(read_npz(path, images.num_classes), whole, images, variables)
    features = extract_features(recipe, model, variables(), images)
    workdir.mkdir(parents=True, exist_ok=True)
    save_features(path, features)
    write_json(record, identity)
    return Source(features, whole, images, variables)
