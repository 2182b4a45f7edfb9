"""The training states of all seeds of a run, whether they run one after the other or as one program."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pspinal_jax.distributed import put
from pspinal_jax.training.chunk import Batch, EpochPlan
from pspinal_jax.training.programs import Programs
from pspinal_jax.training.state import Totals, TrainState


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Steps of an epoch, and the data that they take.

    Attributes:
      first: number of the first step in the epoch.
      steps: how many.
      data: all examples, on the devices; the steps gather their batches there. None where batches are brought.
      tail_size: examples of the last, smaller batch, if this is the one; else 0.
      batches: a step's batches, one for each seed, until they are used up; there may be fewer than `steps`.
    """

    first: int
    steps: int
    data: Batch | None = None
    tail_size: int = 0
    batches: Iterable[Iterable[Batch]] = ()


@dataclasses.dataclass
class _Group:
    """One program's worth of state: a seed, or all of them along a leading axis."""

    seed: jax.Array
    state: TrainState
    totals: Totals
    best: Any
    plan: EpochPlan | None = None
    rates: np.ndarray | None = None


class SeedStates:
    """K seeds in training.

    One group per seed when they run one after the other; a single group with a leading axis when vectorised. Either way
    the checkpointed trees are the same: plain for one seed, with a leading axis of length K for more.
    """

    def __init__(self, programs: Programs, seeds: list[int]) -> None:
        self._programs = programs
        self.seeds = seeds
        self.epoch = 0
        """The planned epoch's number."""
        groups: list[Any] = [seeds] if programs.vectorized else seeds
        self._groups = [self._start(programs.replicate(np.asarray(group, np.uint32))) for group in groups]

    def _start(self, seed: jax.Array) -> _Group:
        state = self._programs.init(seed)
        return _Group(seed, state, self._programs.zero_totals(seed), _variables(state, copy=True))

    def start_from(self, variables: dict[str, Any]) -> None:
        """Start every seed from these variables (of one seed) in place of its own initialisation.

        Args:
          variables: 'params' and 'batch_stats', or parts of them; what is absent stays as initialised.
        """

        def place(new: Any, old: jax.Array) -> jax.Array:
            return put(np.broadcast_to(np.asarray(new, old.dtype), old.shape), old.sharding)

        for group in self._groups:
            for name, given in variables.items():
                there = flatten_dict(getattr(group.state, name), keep_empty_nodes=True)
                fresh = {path: place(leaf, there[path]) for path, leaf in flatten_dict(given).items()}
                group.state = group.state.replace(**{name: unflatten_dict(there | fresh)})  # type: ignore[attr-defined]
            group.state = _averaging_anew(group.state)
            group.best = _variables(group.state, copy=True)

    def continue_from_best(self, other: "SeedStates") -> None:
        """Start every seed from the parameters and statistics that were best in `other`."""
        for group, finished in zip(self._groups, other._groups, strict=True):
            group.state = group.state.replace(  # type: ignore[attr-defined]
                step=finished.state.step, **jax.tree.map(jnp.copy, finished.best)
            )
            group.state = _averaging_anew(group.state)
            group.best = _variables(group.state, copy=True)

    def plan_epoch(self, order: Any, epoch: int, rates: np.ndarray) -> None:
        """Fix the order and the learning rates [K, S] of the coming epoch, counted from 0."""
        self.epoch = epoch
        for index, group in enumerate(self._groups):
            indices = self._programs.replicate(order(group.seed, np.int32(epoch)))
            group_rates = rates if self._programs.vectorized else rates[index]
            group.plan = EpochPlan(indices, self._programs.replicate(group_rates))
            group.rates = group_rates

    def orders(self) -> list[np.ndarray]:
        """The planned epoch's order of each group, int32, on the host: [N], or [K, N] of all seeds as one program."""
        return [np.asarray(group.plan.order) for group in self._groups if group.plan is not None]

    def examples(self, index: int, step: int, batch_size: int) -> np.ndarray:
        """Which training examples the seed at `index` sees in step `step` of the planned epoch."""
        order = self.orders()[0][index] if self._programs.vectorized else self.orders()[index]
        return order[step * batch_size : (step + 1) * batch_size]

    def learning_rate(self, index: int, step: int) -> float:
        """The learning rate of that step."""
        group = self._groups[0 if self._programs.vectorized else index]
        assert group.rates is not None
        return float(group.rates[index, step] if self._programs.vectorized else group.rates[step])

    def variables(self, *, best: bool) -> dict[str, Any]:
        """The best or the current parameters and statistics, of one seed, or of K with a leading axis."""
        variables: dict[str, Any] = self._stack(
            [group.best if best else _variables(group.state) for group in self._groups]
        )
        return variables

    @property
    def state(self) -> TrainState:
        """The state of one seed, or of K with a leading axis: a view that the next step may overwrite."""
        states = [group.state for group in self._groups]
        stacked: TrainState = self._stack(states)
        return stacked

    def warm_up(self) -> None:
        """Compile `update_best`, by updating none."""
        for group in self._groups:
            group.best = self._programs.update_best(
                group.best, _variables(group.state), np.zeros(group.seed.shape, bool)
            )

    def compile_step(self, batch: Batch) -> None:
        """Compile a step on a batch from the host, by taking it with a copy of a state."""
        group = self._groups[0]
        state, totals = jax.tree.map(jnp.copy, (group.state, group.totals))
        jax.block_until_ready(self._programs.batch_step(state, totals, group.seed, np.float32(0), batch))

    def run(self, chunk: Chunk) -> int:
        """Take the steps of `chunk` for every seed; returns how many when they are done."""
        if chunk.data is not None:
            self._run_resident(chunk)
            taken = chunk.steps
        else:
            taken = 0
            for batches in chunk.batches:
                for group, batch in zip(self._groups, batches, strict=True):
                    assert group.rates is not None
                    rate = group.rates[min(chunk.first + taken, len(group.rates) - 1)]
                    group.state, group.totals = self._programs.batch_step(
                        group.state, group.totals, group.seed, rate, batch
                    )
                taken += 1
        jax.block_until_ready([group.totals for group in self._groups])
        return taken

    def _run_resident(self, chunk: Chunk) -> None:
        program = self._programs.tail(chunk.tail_size) if chunk.tail_size else self._programs.chunk
        for group in self._groups:
            group.state, group.totals = program(
                group.state,
                group.totals,
                group.seed,
                group.plan,
                np.int32(chunk.first),
                np.int32(chunk.steps),
                chunk.data,
            )

    def idle(self, index: int) -> bool:
        """Whether the devices have done all that the seed at `index` asked of them."""
        return bool(self._groups[index].totals.count.is_ready())

    def totals(self) -> dict[str, list[Any]]:
        """The epoch's sums so far, by the fields of `Totals`, each with an entry per seed."""
        groups = [group.totals.sums for group in self._groups]
        return {name: self._gather([sums[name] for sums in groups]).tolist() for name in groups[0]}

    def set_totals(self, totals: dict[str, list[Any]] | None) -> None:
        """Set the epoch's sums, to zero for None."""
        for index, group in enumerate(self._groups):
            group.totals = zero = self._programs.zero_totals(group.seed)
            if totals is not None:
                pick = slice(None) if self._programs.vectorized else index
                sums = {name: np.asarray(totals[name], leaf.dtype)[pick] for name, leaf in zero.sums.items()}
                metrics = {name: sums.pop(name) for name in zero.metrics}
                group.totals = self._programs.replicate(Totals(metrics=metrics, **sums))

    def evaluate(self, data: Batch, count: int, *, best: bool = False) -> dict[str, np.ndarray]:
        """Sums of loss and metrics [K], predictions [K, M], of the current or the best parameters on a padded split."""
        results = [
            self._programs.evaluate(group.best if best else _variables(group.state), data, np.int32(count))
            for group in self._groups
        ]
        sums = [{**result.metrics, "loss": result.loss, "predictions": result.predictions} for result in results]
        return {name: self._gather([each[name] for each in sums]) for name in sums[0]}

    def update_best(self, improved: np.ndarray) -> None:
        """Make the current parameters the best of every seed where `improved` bool [K] says so."""
        for index, group in enumerate(self._groups):
            flags = improved if self._programs.vectorized else improved[index]
            if np.any(flags):
                group.best = self._programs.update_best(group.best, _variables(group.state), flags)

    def trees(self) -> dict[str, Any]:
        """The arrays of a checkpoint, by item."""
        states = [group.state for group in self._groups]
        return {
            "params": self._stack([state.params for state in states]),
            "batch_stats": self._stack([state.batch_stats for state in states]),
            "opt_state": self._stack([state.opt_state for state in states]),
            "ema": self._stack([state.ema for state in states]),
            "best": self._stack([group.best for group in self._groups]),
        }

    def set_trees(self, trees: dict[str, Any], step: int) -> None:
        """Go on from a checkpoint's arrays, taken `step` steps into the stage."""
        for index, group in enumerate(self._groups):
            picked = {name: self._pick(tree, index) for name, tree in trees.items()}
            group.best = self._programs.place(picked.pop("best"))
            steps = jnp.full_like(group.state.step, step)
            group.state = self._programs.place(TrainState(step=steps, **picked))

    def _stack(self, trees: list[Any]) -> Any:
        if len(trees) == 1:
            return trees[0]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    def _pick(self, tree: Any, index: int) -> Any:
        if len(self._groups) == 1:
            return tree
        return jax.tree.map(lambda leaf: leaf[index], tree)

    def _gather(self, values: list[jax.Array]) -> np.ndarray:
        if self._programs.vectorized:
            return np.asarray(values[0])
        return np.stack([np.asarray(value) for value in values])


def _variables(state: TrainState, *, copy: bool = False) -> dict[str, Any]:
    return jax.tree.map(jnp.copy, state.variables) if copy else state.variables


def _averaging_anew(state: TrainState) -> TrainState:
    """`state` with its moving averages begun at its parameters and running statistics, which were replaced."""
    current = {"params": state.params, "batch_stats": state.batch_stats}
    ema = {name: {entry: current[name][entry] for entry in tree} for name, tree in state.ema.items()}
    return state.replace(ema=jax.tree.map(jnp.copy, ema))  # type: ignore[attr-defined]
