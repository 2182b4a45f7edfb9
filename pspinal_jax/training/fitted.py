"""What `fit` gives back: the trained model and its history."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from pspinal_jax.distributed import is_primary, whole
from pspinal_jax.errors import UsageError
from pspinal_jax.files import expanded
from pspinal_jax.training.arrays import count_examples, to_numpy
from pspinal_jax.training.examples import ResidentSplit
from pspinal_jax.training.history import History
from pspinal_jax.training.models import Model
from pspinal_jax.training.programs import Programs, padded_split
from pspinal_jax.training.seed_states import SeedStates
from pspinal_jax.training.sources import to_batch
from pspinal_jax.training.step import count_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Fit:
    """A trained model.

    Attributes:
      history: an entry for each epoch, see `History`.
    """

    def __init__(
        self,
        model: Model,
        programs: Programs,
        seed_states: SeedStates,
        history: History,
        names: list[str],
        example: Any,
        best: bool,
    ) -> None:
        self.history = history
        self._model, self._programs, self._seed_states = model, programs, seed_states
        self._names, self._example, self._best = names, example, best
        self._trees = seed_states.variables(best=best)

    @property
    def variables(self) -> Any:
        """What was trained: linen's collections, the nnx module in evaluation mode, or params as ``init`` made them.

        Of K seeds a list of K.
        """
        count = len(self._seed_states.seeds)
        if count == 1:
            return self._model.restore(self._trees)
        return [self._model.restore(jax.tree.map(lambda leaf, i=i: leaf[i], self._trees)) for i in range(count)]

    def predict(self, x: Any) -> np.ndarray:
        """The logits [N, ...] of `x` in evaluation mode, float32 or as the model computes; of K seeds [K, N, ...].

        Raises:
          DataError: if `x` does not hold numbers, or other shapes than the training's.
        """
        inputs = to_numpy(x, "x")
        count = count_examples(inputs, "x")
        self._check(inputs, self._example[0], "x")
        return predict_logits(self._programs, self._trees, inputs, count, stacked=len(self._seed_states.seeds) > 1)

    def evaluate(self, x: Any, y: Any) -> dict[str, Any]:
        """Mean loss and metrics over all examples, each counted once; of K seeds a list of K for each.

        Raises:
          DataError: as `predict`.
        """
        arrays = to_batch((x, y))
        self._check(arrays, self._example, "(x, y)")
        split = ResidentSplit.place(self._programs, arrays, self._programs.eval_batch_size)
        sums = split.evaluate(partial(self._seed_states.evaluate, best=self._best))
        means = {name: (sums[name] / count_rows(arrays)).tolist() for name in self._names}
        return {name: values[0] if len(values) == 1 else values for name, values in means.items()}

    def plot(self) -> "Figure":
        """Loss and metrics by epoch as a matplotlib Figure; of K seeds their mean and range."""
        return self.history.plot()

    def save(self, path: Path | str) -> None:
        """Write the variables as one .safetensors file, which `pspinal_jax.weights.read_variables` reads.

        Names are those of `variables`, levels joined by "/"; of nnx and functions below ``params``.
        """
        from pspinal_jax.weights.variables import save_variables

        trees = self._trees
        named = {"params": trees["params"], **(trees["batch_stats"] if isinstance(trees["batch_stats"], dict) else {})}
        if is_primary():
            save_variables(expanded(Path(path)), jax.tree.map(whole, named))

    def _check(self, arrays: Any, example: Any, name: str) -> None:
        found = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), arrays)
        if jax.tree.map(lambda leaf: leaf.shape, found) != jax.tree.map(lambda leaf: leaf.shape, example):
            raise UsageError(f"{name} holds examples of shapes {found}, but the model was trained on {example}")

    def _repr_html_(self) -> str:
        return self.history._repr_html_()

    def __repr__(self) -> str:
        return f"Fit({self.history.summary()})"


def predict_logits(programs: Programs, variables: Any, inputs: Any, count: int, *, stacked: bool = False) -> np.ndarray:
    """The logits [count, ...] of host arrays, in batches of one size; of `stacked` variables [K, count, ...]."""
    size, axis = programs.eval_batch_size, int(stacked)
    parts = []
    for start in range(0, count, size):
        rows = jax.tree.map(lambda leaf, start=start: leaf[start : start + size], inputs)
        batch = programs.shard_batch(padded_split((rows, ()), size)[0])
        parts.append(whole(programs.logits(stacked)(variables, batch)))
    logits = np.concatenate(parts, axis) if parts else np.zeros(0, np.float32)
    return logits[:, :count] if stacked else logits[:count]
