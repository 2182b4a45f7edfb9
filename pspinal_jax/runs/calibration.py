"""The temperature of a run's probabilities, and its score for rejecting images of none of its classes.

calibration.safetensors   float32, by seed: SEED/temperature [], SEED/means [D, C] and SEED/held_out [M]

Both are fitted on pictures that were held out of training: the validation part or, for a head on features that is
trained on all pictures, a fifth that an additional training of the head leaves out. With logits z [C] and features x
[D],

    probabilities = softmax(z / temperature)
    score = max(means^T x) / |x|

A temperature (C. Guo et al., "On calibration of modern neural networks", ICML 2017) never changes a predicted class.
The columns of `means` are the mean training features of each class, scaled to length 1, so the score is the cosine to
the nearest class mean. Pictures with a score below a threshold are called unknown. The threshold accepts the fraction
`accept` of `held_out`, the scores of the held-out pictures. results/unknown.py compares this score with others.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pspinal_jax.data.dataset import Dataset, Split, draw_by_class, split_by_class
from pspinal_jax.distributed import is_primary, whole
from pspinal_jax.environment import jit_with
from pspinal_jax.errors import PSpinalError, UsageError
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.runs.build import RunSetup, set_up, split_examples
from pspinal_jax.runs.directory import RunDirectory, writing
from pspinal_jax.runs.scores import Scored, calibration_error, log_softmax
from pspinal_jax.training.fitted import HistoryLog
from pspinal_jax.training.images import streaming_split
from pspinal_jax.training.loop import Trainer
from pspinal_jax.training.programs import of_seed, padded_split
from pspinal_jax.weights.variables import read_variables, save_variables

CALIBRATION = "calibration.safetensors"
ACCEPT = 0.95
MIN_EXAMPLES = 40
"""Smallest number of held-out examples for a temperature and a threshold; with it, two of them score below."""
_PER_CLASS = 50
"""Largest number of training pictures per class for its mean, since each has to run through the backbone."""
_FOLD = 0.2


@dataclasses.dataclass(frozen=True)
class Unknown:
    """The score for rejecting images of no known class; see the module's docstring.

    Attributes:
      means: float32 [D, C], columns of length 1.
      held_out: float32 [M], the scores of held-out examples, increasing.
    """

    means: np.ndarray
    held_out: np.ndarray

    @classmethod
    def of(cls, arrays: Mapping[str, Any]) -> "Unknown":
        """Make it from `arrays` named after the attributes with the prefix ``unknown/``; others are ignored."""
        return cls(*(arrays[f"unknown/{field.name}"] for field in dataclasses.fields(cls)))

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """As `of` takes them."""
        return {f"unknown/{name}": np.asarray(value) for name, value in vars(self).items()}

    def scores(self, features: Any) -> jax.Array:
        """Scores float32 [N] of features [N, D]; larger scores are closer to a known class."""
        rows = features.astype(jnp.float32)
        return (rows @ self.means).max(-1) / jnp.maximum(jnp.linalg.norm(rows, axis=-1), 1e-12)

    def threshold(self, accept: float = ACCEPT) -> float:
        """The score that the fraction `accept` of new pictures of known classes is expected to reach.

        It is the k-th smallest of the M held-out scores, k = (1 - accept) (M + 1) rounded down: a new score is as
        likely to fall into any of the M + 1 gaps between them (V. Vovk et al., "Algorithmic learning in a random
        world", 2005).

        Raises:
          UsageError: if `accept` does not lie between 0 and 1, or there are too few scores to tell.
        """
        if not 0 < accept < 1:
            raise UsageError(f"accept is {accept:g}, expected 0 < accept < 1")
        count, place = len(self.held_out), self._place(accept)
        if place < 1:
            most = 1 - 1 / (count + 1)
            raise UsageError(f"accept is {accept:g}, expected at most {most:.4f} with {count} held-out scores")
        return float(self.held_out[place - 1])

    def thresholds(self, accepted: Sequence[float]) -> dict[float, float]:
        """The `threshold` of each fraction in `accepted` for which there are enough held-out scores."""
        told = [accept for accept in accepted if self._place(accept) >= 1]
        return {accept: self.threshold(accept) for accept in told}

    def _place(self, accept: float) -> int:
        return math.floor((1 - accept) * (len(self.held_out) + 1) + 1e-9)


class Calibration(NamedTuple):
    """Of one seed: the temperature, and the score for the unknown, None where the run cannot reject."""

    temperature: float
    unknown: Unknown | None


def calibrate(
    trainer: Trainer, setup: RunSetup, data: Dataset[Split], recipe: Recipe, workers: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fit the temperature and the score of a trained run; called by all processes.

    Args:
      trainer: the trainer, after training.
      setup: the set-up that it trained with.
      data: the data that it trained on.
      recipe: the recipe of the whole run.
      workers: number of processes that decode images; 0 for threads.

    Returns:
      The entry of result.json, and the arrays of calibration.safetensors by seed, {} if too little was held out.

    Raises:
      Stopped: after SIGINT or SIGTERM.
    """
    train, held = split_examples(setup.recipe, data)
    pool = data.train if data.validation is None else data.train.join(data.validation)
    found: dict[str, Any] = {"examples": len(held), "of": "validation", "reason": ""}
    of_fold: Outputs | None = None
    if recipe.protocol == "paper" or recipe.retrain:
        found["examples"] = 0
        found["reason"] = "what was held out is trained on in the end" if recipe.retrain else "nothing was held out"
    elif not len(held) and len(data.example_shape) == 1:
        fold = _Fold.of(data, recipe)
        held = fold.held
        found |= {"examples": len(held), "of": f"{_FOLD:.0%} of the training examples, left out of another training"}
        try:
            of_fold = fold.outputs(trainer, setup, data) if len(held) >= MIN_EXAMPLES else None
        except PSpinalError as error:  # the run itself has been trained
            found["reason"] = f"another training on a part of the examples failed: {error}"
    if not found["reason"] and len(held) < MIN_EXAMPLES:
        found["reason"] = f"{len(held)} examples were held out, and {MIN_EXAMPLES} are needed"
    if found["reason"]:
        return found, {}
    rows, _ = draw_by_class(pool.labels[train], lambda members: max(0, members - _PER_CLASS), 0)
    outputs, labels, arrays = _Outputs(setup, workers, trainer.stop_if_asked), pool.labels[held], dict[str, Any]()
    columns: dict[str, list[Any]] = {"temperature": [], "loss": [], "calibration_error": [], "threshold": []}
    for index, variables in enumerate(_of_seeds(trainer)):
        seen = outputs(variables, pool.take(train[rows]))
        new = outputs(variables, pool.take(held)) if of_fold is None else of_fold
        if not np.isfinite(new.logits).all():
            return found | {"reason": "training diverged"}, {}
        temperature = fit_temperature(new.logits, labels)
        unknown = fit_unknown(seen.features, pool.labels[train[rows]], data.num_classes, new.features)
        arrays[str(index)] = {"temperature": np.float32(temperature), **vars(unknown)}
        columns["temperature"].append(temperature)
        columns["threshold"].append(unknown.threshold(ACCEPT))
        for name, measure in _MEASURES.items():
            columns[name].append([measure(Scored.of(labels, log_softmax(new.logits / t))) for t in (1.0, temperature)])
    for name in _MEASURES:
        before, after = zip(*columns.pop(name), strict=True)
        found[name] = {"before": list(before), "after": list(after)}
    return found | columns | {"accept": ACCEPT}, arrays


_MEASURES: dict[str, Callable[[Scored], float]] = {
    "loss": lambda scored: float(-scored.log_likelihood.mean()),
    "calibration_error": lambda scored: calibration_error(scored.confidence, scored.predictions == scored.labels),
}


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature that maximises the likelihood of the labels [N], given the logits [N, C].

    An additional example counts as evenly spread over the classes, since otherwise the temperature would be 0 if all
    predictions are right.
    """
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        rows = log_softmax(logits / np.exp(log_temperature))
        return float(-rows[np.arange(len(labels)), labels].sum() - rows.mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-4, 4), method="bounded").x))


def fit_unknown(features: np.ndarray, labels: np.ndarray, num_classes: int, held_out: np.ndarray) -> Unknown:
    """The score of features [N, D] that were trained on with labels [N], and of the features [M, D] held out."""
    sums = np.zeros((num_classes, features.shape[1]))
    np.add.at(sums, labels, features)
    means = (sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)).T.astype(np.float32)
    return Unknown(means, np.sort(np.asarray(Unknown(means, np.zeros(0, np.float32)).scores(held_out))))


class Outputs(NamedTuple):
    """Features float32 [N, D] and logits float32 [N, C]."""

    features: np.ndarray
    logits: np.ndarray


class _Outputs:
    """The outputs of a set-up's model in evaluation."""

    def __init__(self, setup: RunSetup, workers: int = 0, before_call: Callable[[], None] = lambda: None) -> None:
        self._setup, self._workers, self._before_call = setup, workers, before_call

        def both(variables: Any, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
            outputs: Any = setup.model.apply(variables, inputs, method="features_and_logits")
            features, logits = outputs
            return features.astype(jnp.float32), logits.astype(jnp.float32)

        programs = setup.programs
        self._compiled = jit_with(programs.compiler_options, both, out_shardings=programs.replicated)

    def __call__(self, variables: Any, split: Split) -> Outputs:
        """The outputs for `split`."""
        parts = []
        for inputs, count in self._batches(split):
            self._before_call()
            parts.append([whole(each)[:count] for each in self._compiled(variables, inputs)])
        features, logits = zip(*parts, strict=True)
        return Outputs(np.concatenate(features), np.concatenate(logits))

    def _batches(self, split: Split) -> Iterator[tuple[Any, int]]:
        programs, size = self._setup.programs, self._setup.programs.eval_batch_size
        if split.inputs is None:
            side = self._setup.recipe.data.side
            with contextlib.closing(streaming_split(programs, split, side, self._workers).batches()) as batches:
                for (images, _), count in batches:
                    yield images, count
            return
        for start in range(0, len(split), size):
            rows = split.inputs[start : start + size]
            yield programs.shard_batch(padded_split((rows, ()), size)[0]), len(rows)


def _of_seeds(trainer: Trainer) -> Iterator[Any]:
    """The selected variables of each seed."""
    count, trees = len(trainer.seed_states.seeds), trainer.seed_states.variables(best=True)
    for index in range(count):
        yield of_seed(trees, index) if count > 1 else trees


class _Fold(NamedTuple):
    """Cached features: rows [N] of the training split to train on once more, and those [M] to leave out."""

    train: np.ndarray
    held: np.ndarray

    @classmethod
    def of(cls, data: Dataset[Split], recipe: Recipe) -> "_Fold":
        """The training split holds pass after pass of the same pictures; a picture's rows go to one side."""
        views = max(1, recipe.feature_views)
        count = len(data.train) // views
        first = data.train.take(np.arange(count))
        rest, held = split_by_class(first.labels, _FOLD, recipe.data.split_seed, first.digests, first.groups)
        return cls(np.concatenate([rest + view * count for view in range(views)]), held)

    def outputs(self, of_all: Trainer, setup: RunSetup, data: Dataset[Split]) -> Outputs:
        """For the rows left out, of a head that is trained on the others as that `of_all` was."""
        splits = {"train": data.train.take(self.train), "test": data.train.take(self.held)}
        whole_batches = dataclasses.replace(setup.recipe.data, drop_remainder=True)
        recipe = dataclasses.replace(setup.recipe, num_seeds=1, data=whole_batches)
        if recipe.batch_size > len(self.train):
            recipe = dataclasses.replace(recipe, batch_size=len(self.train), micro_batches=1)
        again = set_up(recipe, dataclasses.replace(data, splits=splits), mesh=setup.programs.mesh)
        stages = [dataclasses.replace(stage, name="calibrate") for stage in again.stages]
        trainer = Trainer(
            dataclasses.replace(again, stages=stages), HistoryLog(None), None, of_all.stop, math.inf, of_all.start
        )
        trainer.run()
        return _Outputs(again)(next(_of_seeds(trainer)), splits["test"])


def save_calibration(directory: RunDirectory, arrays: dict[str, Any]) -> None:
    """Write the arrays of `calibrate`, if there are any; raises RunError."""
    if arrays and is_primary():
        with writing(directory.path / CALIBRATION):
            save_variables(directory.path / CALIBRATION, arrays)
        directory.record(CALIBRATION)


def read_calibration(directory: RunDirectory, seed_index: int) -> Calibration | None:
    """The calibration of one seed; None if the run has none, such as runs of earlier versions.

    Raises:
      PSpinalError: if the file is missing or damaged.
    """
    if CALIBRATION not in directory.recorded():
        return None
    directory.verify(CALIBRATION)
    held = read_variables(directory.path / CALIBRATION)[str(seed_index)]
    return Calibration(float(held.pop("temperature")), Unknown(**held) if held else None)
