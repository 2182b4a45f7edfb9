"""The training states of all seeds of a run, whether they run one after the other or as one program."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pspinal_jax.processes.arrays import put
from pspinal_jax.training.chunk import Batch, EpochPlan
from pspinal_jax.training.programs import Programs
from pspinal_jax.training.state import Totals, TrainState


@dataclasses.dataclass
class _Lane:
    """One program's worth of state: a seed, or all of them along a leading axis."""

    seed: jax.Array
    state: TrainState
    totals: Totals
    best: Any
    plan: EpochPlan | None = None
    rates: np.ndarray | None = None


class Lanes:
    """K seeds in training.

    One lane per seed when they run one after the other; a single lane with a leading axis when vectorised. Either way
    the checkpointed trees are the same: plain for one seed, with a leading axis of length K for more.
    """

    def __init__(self, programs: Programs, seeds: list[int]) -> None:
        self._programs = programs
        self.seeds = seeds
        groups: list[Any] = [seeds] if programs.vectorized else seeds
        self._lanes = [self._start(programs.replicate(np.asarray(group, np.uint32))) for group in groups]

    def _start(self, seed: jax.Array) -> _Lane:
        state = self._programs.init(seed)
        return _Lane(seed, state, self._programs.zero_totals(seed), _variables(state, copy=True))

    def start_from(self, variables: dict[str, Any]) -> None:
        """Start every seed from these variables (of one seed) in place of its own initialisation.

        Args:
          variables: 'params' and 'batch_stats', or either; entries at their top that are absent stay as initialised.
        """

        def place(new: Any, old: jax.Array) -> jax.Array:
            return put(np.broadcast_to(np.asarray(new, old.dtype), old.shape), old.sharding)

        for lane in self._lanes:
            for name, given in variables.items():
                there = getattr(lane.state, name)
                fresh = {entry: jax.tree.map(place, tree, there[entry]) for entry, tree in given.items()}
                lane.state = lane.state.replace(**{name: {**there, **fresh}})  # type: ignore[attr-defined]
            lane.best = _variables(lane.state, copy=True)

    def continue_from_best(self, other: "Lanes") -> None:
        """Start every seed from the parameters and statistics that were best in `other`."""
        for lane, finished in zip(self._lanes, other._lanes, strict=True):
            lane.state = lane.state.replace(  # type: ignore[attr-defined]
                step=finished.state.step, **jax.tree.map(jnp.copy, finished.best)
            )
            lane.best = _variables(lane.state, copy=True)

    def plan_epoch(self, order: Any, epoch: int, rates: np.ndarray) -> None:
        """Fix the order and the learning rates [K, S] of the coming epoch, counted from 0."""
        for index, lane in enumerate(self._lanes):
            indices = self._programs.replicate(order(lane.seed, np.int32(epoch)))
            lane_rates = rates if self._programs.vectorized else rates[index]
            lane.plan = EpochPlan(indices, self._programs.replicate(lane_rates))
            lane.rates = lane_rates

    def orders(self) -> list[np.ndarray]:
        """The planned epoch's order of each lane, int32, on the host: [N], or [K, N] of all seeds as one program."""
        return [np.asarray(lane.plan.order) for lane in self._lanes if lane.plan is not None]

    def examples(self, index: int, step: int, batch_size: int) -> np.ndarray:
        """Which training examples the seed at `index` sees in step `step` of the planned epoch."""
        order = self.orders()[0][index] if self._programs.vectorized else self.orders()[index]
        return order[step * batch_size : (step + 1) * batch_size]

    def learning_rate(self, index: int, step: int) -> float:
        """The learning rate of that step."""
        lane = self._lanes[0 if self._programs.vectorized else index]
        assert lane.rates is not None
        return float(lane.rates[index, step] if self._programs.vectorized else lane.rates[step])

    def warm_up(self) -> None:
        """Compile the keeping of the best, by keeping none."""
        for lane in self._lanes:
            lane.best = self._programs.keep(lane.best, _variables(lane.state), np.zeros(lane.seed.shape, bool))

    def rehearse(self, batch: Batch) -> None:
        """Compile a step on a batch from the host, by taking it with a copy of a state."""
        lane = self._lanes[0]
        state, totals = jax.tree.map(jnp.copy, (lane.state, lane.totals))
        jax.block_until_ready(self._programs.batch_step(state, totals, lane.seed, np.float32(0), batch))

    def run_batch(self, index: int, step: int, batch: Batch) -> None:
        """Step `step` of the epoch on `batch` for the seed at `index`; does not wait for it."""
        lane = self._lanes[index]
        assert lane.rates is not None
        lane.state, lane.totals = self._programs.batch_step(lane.state, lane.totals, lane.seed, lane.rates[step], batch)

    def idle(self, index: int) -> bool:
        """Whether the devices have done all that the seed at `index` asked of them."""
        return bool(self._lanes[index].totals.count.is_ready())

    def block(self) -> None:
        """Return when all that was asked of the devices is done."""
        jax.block_until_ready([lane.totals for lane in self._lanes])

    def run_chunk(self, first: int, num_steps: int, data: Batch, *, tail_size: int = 0) -> None:
        """`num_steps` steps of the epoch, from step `first` on, for every seed; returns when they are done."""
        program = self._programs.tail(tail_size) if tail_size else self._programs.chunk
        for lane in self._lanes:
            lane.state, lane.totals = program(
                lane.state, lane.totals, lane.seed, lane.plan, np.int32(first), np.int32(num_steps), data
            )
        self.block()

    def totals(self) -> dict[str, list[Any]]:
        """The epoch's sums so far, by the fields of `Totals`, each with an entry per seed."""
        fields = [field.name for field in dataclasses.fields(Totals)]
        return {name: self._gather([getattr(lane.totals, name) for lane in self._lanes]).tolist() for name in fields}

    def set_totals(self, totals: dict[str, list[Any]] | None) -> None:
        """Set the epoch's sums, to zero for None."""
        for index, lane in enumerate(self._lanes):
            if totals is None:
                lane.totals = self._programs.zero_totals(lane.seed)
                continue
            pick = slice(None) if self._programs.vectorized else index
            lane.totals = self._programs.replicate(
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
            self._programs.evaluate(lane.best if best else _variables(lane.state), data, np.int32(count))
            for lane in self._lanes
        ]
        return {name: self._gather([getattr(result, name) for result in results]) for name in results[0]._fields}

    def keep_best(self, improved: np.ndarray) -> None:
        """Make the current parameters the best of every seed where `improved` bool [K] says so."""
        for index, lane in enumerate(self._lanes):
            flags = improved if self._programs.vectorized else improved[index]
            if np.any(flags):
                lane.best = self._programs.keep(lane.best, _variables(lane.state), flags)

    def trees(self) -> dict[str, Any]:
        """The arrays of a checkpoint, by item."""
        states = [lane.state for lane in self._lanes]
        return {
            "params": self._stack([state.params for state in states]),
            "batch_stats": self._stack([state.batch_stats for state in states]),
            "opt_state": self._stack([state.opt_state for state in states]),
            "best": self._stack([lane.best for lane in self._lanes]),
        }

    def set_trees(self, trees: dict[str, Any], step: int) -> None:
        """Go on from a checkpoint's arrays, taken `step` steps into the stage."""
        for index, lane in enumerate(self._lanes):
            picked = {name: self._pick(tree, index) for name, tree in trees.items()}
            lane.best = self._programs.place(picked.pop("best"))
            steps = jnp.full_like(lane.state.step, step)
            lane.state = self._programs.place(TrainState(step=steps, **picked))

    def _stack(self, trees: list[Any]) -> Any:
        if len(trees) == 1:
            return trees[0]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    def _pick(self, tree: Any, index: int) -> Any:
        if len(self._lanes) == 1:
            return tree
        return jax.tree.map(lambda leaf: leaf[index], tree)

    def _gather(self, values: list[jax.Array]) -> np.ndarray:
        if self._programs.vectorized:
            return np.asarray(values[0])
        return np.stack([np.asarray(value) for value in values])


def _variables(state: TrainState, *, copy: bool = False) -> dict[str, Any]:
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return jax.tree.map(jnp.copy, variables) if copy else variables
