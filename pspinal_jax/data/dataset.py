"""A data set as arrays in memory, checked once when it is made."""

# DOC of data/splits: """Holding validation examples out of the training split."""

import dataclasses
import zlib

import numpy as np

from pspinal_jax.errors import DataError, UsageError


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples with their labels.

    Attributes:
      inputs: images uint8 [N, H, W, C], or features float32 [N, D].
      labels: int32 [N], each 0 .. num_classes - 1.
    """

    inputs: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def join(self, other: "Split") -> "Split":
        """These examples, then those of `other`."""
        return Split(np.concatenate([self.inputs, other.inputs]), np.concatenate([self.labels, other.labels]))

    def take(self, indices: np.ndarray) -> "Split":
        """The examples at `indices`, in that order."""
        return Split(self.inputs[indices], self.labels[indices])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Train and test split, the classes' names, where it all came from, and a validation split of its own or None."""

    train: Split
    test: Split
    class_names: tuple[str, ...]
    source: str
    validation: Split | None = None

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.class_names)

    def fingerprint(self) -> str:
        """A checksum of every example, so that a resumed run notices that its data changed."""
        crc = 0
        for split in (self.train, self.test, *([self.validation] if self.validation else [])):
            for array in (split.inputs, split.labels):
                crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
        return f"{crc:08x}"


def make_dataset(
    splits: dict[str, tuple[np.ndarray, np.ndarray]],
    source: str,
    num_classes: int | None,
    class_names: tuple[str, ...] | None = None,
) -> Dataset:
    """Check raw arrays and bring them into the form that training takes.

    Args:
      splits: 'train', 'test' and perhaps 'validation', each (inputs, labels). Inputs: uint8 [N, H, W] or
        [N, H, W, C], or floating [N, D].
      source: where they come from; named in every error.
      num_classes: C, or None for one more than the largest training label.
      class_names: their names; the numbers as text where None.

    Raises:
      DataError: if a shape, dtype, length, label or value does not fit.
    """
    checked = {name: _check_split(f"{source}: {name}", *arrays) for name, arrays in splits.items()}
    train = checked["train"]
    for name, other in checked.items():
        if train.inputs.shape[1:] != other.inputs.shape[1:] or train.inputs.dtype != other.inputs.dtype:
            raise DataError(
                f"{source}: train has inputs of shape {train.inputs.shape[1:]} ({train.inputs.dtype}) and {name} "
                f"{other.inputs.shape[1:]} ({other.inputs.dtype}); they must be the same"
            )
    if num_classes is None:
        num_classes = len(class_names) if class_names else max(2, int(train.labels.max()) + 1)
    if class_names is None:
        class_names = tuple(map(str, range(num_classes)))
    if len(class_names) != num_classes:
        raise DataError(f"{source}: {len(class_names)} class names for {num_classes} classes")
    for name, split in checked.items():
        low, high = int(split.labels.min()), int(split.labels.max())
        if low < 0 or high >= num_classes:
            raise DataError(
                f"{source}: {name}_labels go from {low} to {high}, expected 0 .. {num_classes - 1}; "
                "correct the labels or set --data.num-classes"
            )
    return Dataset(train, checked["test"], class_names, source, checked.get("validation"))


def _check_split(where: str, inputs: np.ndarray, labels: np.ndarray) -> Split:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{where}_labels have shape {labels.shape} and dtype {labels.dtype}, expected integers [N]")
    if inputs.ndim < 1 or len(inputs) != len(labels):
        raise DataError(f"{where}: {len(inputs) if inputs.ndim else 0} images but {len(labels)} labels")
    if len(labels) == 0:
        raise DataError(f"{where} is empty")
    if inputs.dtype == np.uint8 and inputs.ndim in (3, 4):
        images = inputs if inputs.ndim == 4 else inputs[..., None]
        return Split(np.ascontiguousarray(images), labels.astype(np.int32))
    if np.issubdtype(inputs.dtype, np.floating) and inputs.ndim == 2:
        bad = ~np.isfinite(inputs).all(axis=1)
        if bad.any():
            raise DataError(
                f"{where}: features hold NaN or infinity in {int(bad.sum())} rows, first in row {int(bad.argmax())}"
            )
        return Split(np.ascontiguousarray(inputs, np.float32), labels.astype(np.int32))
    raise DataError(
        f"{where}_images have shape {inputs.shape} and dtype {inputs.dtype}, expected uint8 images [N, H, W] or "
        "[N, H, W, C], or floating-point features [N, D]"
    )


def hold_out(num_examples: int, num_validation: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, validation), both sorted: `num_validation` drawn without replacement by `seed`, and the rest.

    Raises:
      UsageError: if nothing would be left to train on.
    """
    if num_validation >= num_examples:
        raise UsageError(
            f"data.num_validation is {num_validation}, but train has {num_examples} examples; choose fewer with "
            "--data.num-validation"
        )
    shuffled = np.random.default_rng(seed).permutation(num_examples)
    return np.sort(shuffled[num_validation:]), np.sort(shuffled[:num_validation])
