"""The examples of a comparison: which are trained on, validated on and tested on, by split and seed."""

import dataclasses

import numpy as np

from pspinal_jax.comparison.program import Examples, Part
from pspinal_jax.comparison.settings import Scaling
from pspinal_jax.data.dataset import ArraySplit, Dataset, draw_together, split_by_class
from pspinal_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class SplitExamples:
    """The examples of one split into training pool and test; the pool comes first.

    Attributes:
      inputs: float32 or uint8 [P + T, D].
      labels: int32 [P + T].
      num_pool: P, of which a part is validated on.
      own_validation: how many at the end of the pool are a validation split of the data's own; 0 for none.
      copies: integers [P + T], equal for rows that splits keep together; None to draw each by itself.
    """

    inputs: np.ndarray
    labels: np.ndarray
    num_pool: int
    own_validation: int
    copies: np.ndarray | None

    @property
    def test_labels(self) -> np.ndarray:
        """int32 [T]."""
        return self.labels[self.num_pool :]

    def copies_apart(self) -> int:
        """How many test examples have a copy in the pool, of those that splits keep together where they can."""
        return (
            0 if self.copies is None else int(np.isin(self.copies[self.num_pool :], self.copies[: self.num_pool]).sum())
        )

    def rows(self, validation_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows (train, validation) of the pool; where the data brings no validation split, `seed` cuts it by class.

        Copies go to one side, see `draw_together`; every seed has equally many rows.
        """
        if self.own_validation:
            return np.split(np.arange(self.num_pool), [self.num_pool - self.own_validation])  # type: ignore[return-value]
        copies = None if self.copies is None else self.copies[: self.num_pool]
        return split_by_class(self.labels[: self.num_pool], validation_fraction, seed, copies)

    def examples(self, with_test: bool) -> Examples:
        """What a program gets: no label of the test, and without `with_test` zeros in place of its inputs."""
        inputs = self.inputs
        if not with_test:
            inputs = np.concatenate([inputs[: self.num_pool], np.zeros_like(inputs[self.num_pool :])])
        return Examples(inputs, np.where(np.arange(len(self.labels)) < self.num_pool, self.labels, 0).astype(np.int32))


def flattened(data: Dataset[ArraySplit]) -> Dataset[ArraySplit]:
    """`data` with images as rows [N, D]."""
    splits = {name: ArraySplit(s.inputs.reshape(len(s), -1), s.labels) for name, s in data.splits.items()}
    return dataclasses.replace(data, splits=splits, example_shape=splits["train"].inputs.shape[1:])


def make_split(
    data: Dataset[ArraySplit], number: int, num_splits: int, seed: int, copies: np.ndarray | None = None
) -> SplitExamples:
    """Split `number` of the flattened `data`.

    Split 0 is the data's own. The others join everything and draw, by class, as many test examples as the data's own
    test split has; where there are several, a validation split of the data's own is part of the pool. `copies`:
    integers, of train, validation and test one after the other, equal for rows to keep together where that can be.
    """
    train, validation, test = data.train, data.validation, data.test
    own = 0
    if validation is not None:
        own = len(validation) if num_splits == 1 else 0
        train = train.join(validation)
    whole = train.join(test)
    if number:
        drawn = _draw_like(whole.labels, test.labels, [seed, number], copies)
        order = np.concatenate([np.setdiff1d(np.arange(len(whole)), drawn), drawn])
        whole, copies = whole.take(order), None if copies is None else copies[order]
    return SplitExamples(whole.inputs, whole.labels, len(train), own, copies)


def _draw_like(labels: np.ndarray, test: np.ndarray, seed: list[int], copies: np.ndarray | None) -> np.ndarray:
    """Sorted indices: of each class as many, drawn without replacement, as `test` has."""
    drawn = []
    for label, count in zip(*np.unique(test, return_counts=True), strict=True):
        members = np.flatnonzero(labels == label)
        order = np.random.default_rng([*seed, int(label)]).permutation(members)
        drawn.append(draw_together(order, count, copies, exact=True))
    return np.sort(np.concatenate(drawn))


def standardisation(inputs: np.ndarray, scaling: Scaling) -> tuple[np.ndarray, np.ndarray]:
    """(shift, scale), float32 [D], of (x - shift) * scale, from the training rows alone.

    'each': every feature is centred and divided by its standard deviation; a constant one becomes 0. 'all': one mean
    and one deviation for all features, which keeps them in proportion. 'none': features stay as they are, and pixels
    (uint8) go to 0 .. 1.
    """
    width = inputs.shape[1]
    if scaling == "none":
        return np.zeros(width, np.float32), np.full(width, 1 / 255 if inputs.dtype == np.uint8 else 1.0, np.float32)
    axis = 0 if scaling == "each" else None
    mean = np.broadcast_to(inputs.mean(axis, dtype=np.float64), width)
    deviation = np.broadcast_to(inputs.std(axis, dtype=np.float64), width)
    constant = deviation <= 1e-6 * np.maximum(np.abs(mean), 1e-30)
    return mean.astype(np.float32), np.where(constant, 0.0, 1 / np.where(constant, 1.0, deviation)).astype(np.float32)


def make_part(
    split: SplitExamples,
    rows: tuple[np.ndarray, np.ndarray],
    with_test: bool,
    eval_batch_size: int,
    scaling: Scaling,
) -> Part:
    """What a training of `split` works on: `rows` (train, validation), and which are predicted, test rows last."""
    train, validation = rows
    test = np.arange(split.num_pool, len(split.labels))
    evaluated = np.concatenate([validation, test])
    evaluated = np.pad(evaluated, (0, -len(evaluated) % eval_batch_size)).astype(np.int32)
    shift, scale = standardisation(split.inputs[train], scaling)
    count = len(validation) + (len(test) if with_test else 0)
    return Part(train.astype(np.int32), evaluated, np.int32(count), shift, scale)


def check_sizes(train: np.ndarray, validation: np.ndarray, batch_size: int, source: str) -> None:
    """Raise UsageError unless there is a batch to train on and an example to validate on."""
    if not len(validation):
        raise UsageError(
            f"{source}: no example is left to validate on; give a validation split, or a larger --validation-fraction"
        )
    if batch_size > len(train):
        raise UsageError(
            f"batch_size is {batch_size}, but only {len(train)} examples are left to train on; choose a smaller "
            "--batch-size"
        )
