"""The results of `fit`: the trained model, its history, and their folder."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from pspinal_jax.data.arrays import count_examples, to_batch, to_numpy
from pspinal_jax.distributed import barrier, is_primary, whole
from pspinal_jax.errors import RunError, UsageError
from pspinal_jax.files import differences, expanded, held, json_text, write_json, write_text
from pspinal_jax.training.examples import EvaluatedSplit, one_example
from pspinal_jax.training.loop import REPORT
from pspinal_jax.training.models import Model
from pspinal_jax.training.programs import Programs, SeedStates, of_seed, padded_split
from pspinal_jax.training.stages import per_seed
from pspinal_jax.training.step import count_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_IDENTITY, _METRICS = "fit.json", "metrics.jsonl"
_SPLITS = ("train", "validation", "test")
_MAX_POINTS = 1000
"""Largest number of points of a curve; more of them are closer than a line's width and make the drawing large."""


class History(list[dict[str, Any]]):
    """A list with a dict for each epoch: stage, epoch, step, train_loss, validation_loss, .., seconds.

    With K seeds, values that differ by seed are lists of K. Notebooks display the history as a table.
    """

    def to_pandas(self) -> Any:
        """The history as a pandas.DataFrame with a row for each epoch."""
        from pandas import DataFrame

        return DataFrame(list(self))

    def plot(self) -> "Figure":
        """Loss and metrics by epoch as a matplotlib Figure; for K seeds, their mean and range."""
        from matplotlib.figure import Figure

        names = self._metrics()
        figure = Figure(figsize=(5 * max(1, len(names)), 4), layout="constrained")
        self.draw(figure, names)
        return figure

    def draw(self, figure: "Figure", names: list[str]) -> None:
        """Draw the metrics `names` into `figure`, side by side."""
        epochs = self._epochs()
        shown = np.unique(np.linspace(0, max(0, len(self) - 1), _MAX_POINTS).round().astype(int))[: len(self)]
        for axis, name in zip(np.ravel(figure.subplots(1, max(1, len(names)))), names, strict=False):
            percent = name.endswith("accuracy")
            for split in _SPLITS:
                present = [index for index in shown if f"{split}_{name}" in self[index]]
                if not present:
                    continue
                values = np.array([np.atleast_1d(self[index][f"{split}_{name}"]) for index in present], float)
                values *= 100 if percent else 1
                axis.plot(epochs[present], values.mean(1), marker=".", label=split)
                if values.shape[1] > 1:
                    axis.fill_between(epochs[present], values.min(1), values.max(1), alpha=0.2)
            axis.set_xlabel("epoch")
            axis.set_ylabel(f"{name} (%)" if percent else name)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend()

    def summary(self) -> str:
        """The last epoch as one line."""
        if not self:
            return "no epochs"
        means = ", ".join(f"{name} {_shown(value)}" for name, value in self[-1].items() if _is_mean(name))
        return f"{len(self)} epochs: {means}"

    def _repr_html_(self) -> str:
        names = [name for name in dict.fromkeys(name for line in self for name in line) if _is_mean(name)]
        names = [*(["stage"] if len({line["stage"] for line in self}) > 1 else []), "epoch", *names]
        body = "".join(_table_row([_shown(line.get(name)) for name in names], "td") for line in self)
        return f"<table>{_table_row(names, 'th')}{body}</table>"

    def _metrics(self) -> list[str]:
        found = {name.split("_", 1)[1]: None for line in self for name in line if _is_mean(name)}
        return list(found)

    def _epochs(self) -> np.ndarray:
        """The epoch of each line, counted on from stage to stage."""
        numbers, before = [], 0
        for stage in dict.fromkeys(line["stage"] for line in self):
            of_stage = [line["epoch"] for line in self if line["stage"] == stage]
            numbers += [before + epoch for epoch in of_stage]
            before += max(of_stage)
        return np.array(numbers)


def _table_row(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _is_mean(name: str) -> bool:
    return name.startswith(tuple(f"{split}_" for split in _SPLITS))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        values = np.array(value, float)
        return f"{values.mean():.4f} ± {values.std(ddof=1):.4f}"
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)


class HistoryLog:
    """The history of a fit in memory and, in a workdir, as lines of metrics.jsonl."""

    def __init__(self, folder: Path | None) -> None:
        self.history, self._folder = History(), folder

    def rewind(self, finished: Sequence[tuple[str, int]]) -> None:
        """Keep only the lines of these epochs."""
        if self._folder is not None and (path := self._folder / _METRICS).exists():
            lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
            self.history = History(lines[: len(finished)])
        self._write()

    def append(self, line: dict[str, Any]) -> None:
        """Add one line."""
        self.history.append(line)
        self._write()

    def _write(self) -> None:
        if self._folder is not None and is_primary():
            write_text(self._folder / _METRICS, "".join(json_text(line) + "\n" for line in self.history))

    def report(self, found: dict[str, Any]) -> Path | None:
        """Write down what was found where a step was not finite; where that lies."""
        if self._folder is None:
            return None
        path = self._folder / REPORT
        if is_primary():
            write_json(path, found)
        return path


@contextlib.contextmanager
def held_workdir(workdir: Path | str, identity: dict[str, Any]) -> Iterator[Path]:
    """The folder of a training, in nobody else's use; raises UsageError if it holds another training."""
    folder = expanded(Path(workdir))
    path = folder / _IDENTITY
    with contextlib.ExitStack() as opened:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            other = opened.enter_context(held(folder / ".lock")) if is_primary() else None
            if other is not None:
                raise RunError(f"{folder} is in use: {other} trains there")
            found = json.loads(path.read_text()) if path.exists() else identity
            if found is identity and is_primary():
                write_json(path, identity)
        except (OSError, ValueError) as error:
            raise RunError(f"workdir {folder} cannot be used: {error}") from error
        changed = differences(found, identity, lambda name, old, new: f"{name} was {old} and is {new}")
        if changed:
            raise UsageError(f"workdir {folder} holds another training: {', '.join(changed)}; choose another one")
        barrier()
        yield folder


class Fit:
    """A trained model.

    Attributes:
      history: an entry for each epoch, see `History`.
    """

    def __init__(
        self, model: Model, programs: Programs, seed_states: SeedStates, history: History, *, best: bool
    ) -> None:
        self.history = history
        self._model, self._programs, self._seed_states, self._best = model, programs, seed_states, best
        self._trees = seed_states.variables(best=best)

    @property
    def variables(self) -> Any:
        """The trained variables: linen's collections, the nnx module in evaluation mode, or params as from ``init``.

        For K seeds, a list of K.
        """
        return per_seed([self._model.restore(variables) for variables in self._of_seeds()])

    def predict(self, x: Any) -> np.ndarray:
        """The logits [N, ...] of `x` in evaluation mode, in float32 or the model's dtype; for K seeds [K, N, ...].

        Raises:
          DataError: if `x` does not hold numbers, or has other shapes than in training.
        """
        inputs = to_numpy(x, "x")
        count_examples(inputs, "x")
        self._check(inputs, self._programs.inputs, "x")
        logits = [predict_logits(self._programs, variables, inputs) for variables in self._of_seeds()]
        return logits[0] if len(logits) == 1 else np.stack(logits)

    def evaluate(self, x: Any, y: Any) -> dict[str, Any]:
        """Mean loss and metrics over all examples, each counted once; for K seeds, a list of K for each.

        Raises:
          DataError: like `predict`.
        """
        arrays = to_batch((x, y))
        self._check(arrays, (self._programs.inputs, self._programs.labels), "(x, y)")
        split = EvaluatedSplit.in_memory(self._programs, arrays)
        sums = split.evaluate(partial(self._seed_states.evaluate, best=self._best))
        names = ["loss", *self._programs.eval_step.metrics]
        return {name: per_seed((sums[name] / split.count).tolist()) for name in names}

    def plot(self) -> "Figure":
        """Loss and metrics by epoch as a matplotlib Figure; for K seeds, their mean and range."""
        return self.history.plot()

    def save(self, path: Path | str) -> None:
        """Write the variables to a .safetensors file, which `pspinal_jax.weights.read_variables` reads.

        Names are those of `variables`, with levels joined by "/"; for nnx and functions, they are below ``params``.
        """
        from pspinal_jax.weights.variables import save_variables

        named = jax.tree.map(whole, {"params": self._trees["params"], **self._trees["batch_stats"]})
        if is_primary():
            save_variables(expanded(Path(path)), named)

    def _of_seeds(self) -> list[Any]:
        count = len(self._seed_states.seeds)
        return [self._trees] if count == 1 else [of_seed(self._trees, index) for index in range(count)]

    def _check(self, arrays: Any, example: Any, name: str) -> None:
        found = one_example(arrays)
        if jax.tree.map(lambda leaf: leaf.shape, found) != jax.tree.map(lambda leaf: leaf.shape, example):
            raise UsageError(f"{name} holds examples of shapes {found}, but the model was trained on {example}")

    def _repr_html_(self) -> str:
        return self.history._repr_html_()

    def __repr__(self) -> str:
        return f"Fit({self.history.summary()})"


def predict_logits(programs: Programs, variables: Any, inputs: Any) -> np.ndarray:
    """The logits [N, ...] of host arrays under the variables of one seed, in batches of one size."""
    size, count = programs.eval_batch_size, count_rows((inputs, ()))
    parts = []
    for start in range(0, count, size):
        rows = jax.tree.map(lambda leaf, start=start: leaf[start : start + size], inputs)
        batch = programs.shard_batch(padded_split((rows, ()), size)[0])
        parts.append(whole(programs.logits(variables, batch)))
    return np.concatenate(parts)[:count] if parts else np.zeros(0, np.float32)
