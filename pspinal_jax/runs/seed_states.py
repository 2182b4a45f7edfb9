"""The training states of all seeds of a run, whether they run one after the other or as one program."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pspinal_jax.distributed.arrays import put
from pspinal_jax.training.chunk import Batch, EpochPlan
from pspinal_jax.training.programs import Programs
from pspinal_jax.training.state import Totals, TrainState


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

    def run_batch(self, index: int, step: int, batch: Batch) -> None:
        """Step `step` of the epoch on `batch` for the seed at `index`; does not wait for it."""
        group = self._groups[index]
        assert group.rates is not None
        group.state, group.totals = self._programs.batch_step(
            group.state, group.totals, group.seed, group.rates[step], batch
        )

    def idle(self, index: int) -> bool:
        """Whether the devices have done all that the seed at `index` asked of them."""
        return bool(self._groups[index].totals.count.is_ready())

    def block(self) -> None:
        """Return when all that was asked of the devices is done."""
        jax.block_until_ready([group.totals for group in self._groups])

    def run_chunk(self, first: int, num_steps: int, data: Batch, *, tail_size: int = 0) -> None:
        """`num_steps` steps of the epoch, from step `first` on, for every seed; returns when they are done."""
        program = self._programs.tail(tail_size) if tail_size else self._programs.chunk
        for group in self._groups:
            group.state, group.totals = program(
                group.state, group.totals, group.seed, group.plan, np.int32(first), np.int32(num_steps), data
            )
        self.block()

    def totals(self) -> dict[str, list[Any]]:
        """The epoch's sums so far, by the fields of `Totals`, each with an entry per seed."""
        fields = [field.name for field in dataclasses.fields(Totals)]
        return {name: self._gather([getattr(group.totals, name) for group in self._groups]).tolist() for name in fields}

    def set_totals(self, totals: dict[str, list[Any]] | None) -> None:
        """Set the epoch's sums, to zero for None."""
        for index, group in enumerate(self._groups):
            if totals is None:
                group.totals = self._programs.zero_totals(group.seed)
                continue
            pick = slice(None) if self._programs.vectorized else index
            group.totals = self._programs.replicate(
                Totals(
                    **{
                        name: np.asarray(values, np.float32 if name == "loss" else np.int32)[pick]
                        for name, values in totals.items()
                    }
                )
            )

    def evaluate(self, data: Batch, count: int, *, best: bool = False) -> dict[str, np.ndarray]:
        """Loss and correct [K], predictions [K, M], of the current or the best parameters on a padded split."""
        results = [
            self._programs.evaluate(group.best if best else _variables(group.state), data, np.int32(count))
            for group in self._groups
        ]
        return {name: self._gather([getattr(result, name) for result in results]) for name in results[0]._fields}

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
