"""What `fit` gives back: the trained model and its history."""

from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from pspinal_jax.distributed import is_primary, whole
from pspinal_jax.environment import jit_with
from pspinal_jax.errors import UsageError
from pspinal_jax.files import expanded
from pspinal_jax.training.arrays import count_examples, to_numpy
from pspinal_jax.training.examples import ResidentSplit
from pspinal_jax.training.models import Model
from pspinal_jax.training.programs import Programs, padded_split
from pspinal_jax.training.seed_states import SeedStates
from pspinal_jax.training.sharding import replicated_on, shard_batch
from pspinal_jax.training.sources import to_batch
from pspinal_jax.training.step import count_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class History(list[dict[str, Any]]):
    """A dict for each epoch: epoch, step, train_loss, validation_loss, metrics, seconds; a list by seed for K seeds."""

    def to_pandas(self) -> Any:
        """As a pandas.DataFrame with a row for each epoch."""
        from pandas import DataFrame

        return DataFrame(list(self))


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
        self._apply: Any = None

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
        size, mesh = self._programs.eval_batch_size, self._programs.mesh
        if self._apply is None:
            apply = partial(self._model.apply, train=False)
            seeds = apply if len(self._seed_states.seeds) == 1 else jax.vmap(apply, (0, None))
            self._apply = jit_with(self._programs.compiler_options, seeds, out_shardings=replicated_on(mesh))
        axis = 0 if len(self._seed_states.seeds) == 1 else 1
        parts = []
        for start in range(0, count, size):
            rows = jax.tree.map(lambda leaf, start=start: leaf[start : start + size], inputs)
            parts.append(whole(self._apply(self._trees, shard_batch(mesh, padded_split((rows, ()), size)[0]))))
        logits = np.concatenate(parts, axis) if parts else np.zeros(0, np.float32)
        return logits[:count] if axis == 0 else logits[:, :count]

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
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5 * len(self._names), 4), layout="constrained")
        for axis, name in zip(np.ravel(figure.subplots(1, len(self._names))), self._names, strict=True):
            for split in ("train", "validation"):
                key = f"{split}_{name}"
                values = np.array([np.atleast_1d(line[key]) for line in self.history if key in line])
                if not len(values):
                    continue
                epochs = np.arange(1, len(values) + 1)
                axis.plot(epochs, values.mean(1), marker=".", label=split)
                if values.shape[1] > 1:
                    axis.fill_between(epochs, values.min(1), values.max(1), alpha=0.2)
            axis.set_xlabel("epoch")
            axis.set_ylabel(name)
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend()
        return figure

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
        names = ["epoch", *_shown_names(self.history)]
        rows = [[f"<td>{_shown(line.get(name))}</td>" for name in names] for line in self.history]
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {_shown(self.history[-1][name])}" for name in _shown_names(self.history))
        return f"Fit({len(self.history)} epochs: {shown})"


def _shown_names(history: History) -> list[str]:
    return [name for name in (history[-1] if history else {}) if name.startswith(("train_", "validation_"))]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"{np.mean(value):.4f} ± {np.std(value, ddof=1):.4f}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
