"""The compiled programs, with their jit, donation and shardings, and the states of the seeds."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import cache, cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jax.sharding import Mesh, NamedSharding

from pspinal_jax.distributed import put
from pspinal_jax.environment import jit_with, loop_options
from pspinal_jax.training import keys, sharding
from pspinal_jax.training.costs import count_flops
from pspinal_jax.training.state import EpochMetrics, Layouts, Step, TrainState, in_layouts
from pspinal_jax.training.step import Batch, EpochPlan, EvalStep, TrainStep, count_rows, evaluate_split, run_chunk

_GPU_BLOCK = 32


@dataclasses.dataclass(eq=False)
class Programs:
    """The programs of a run on a mesh of devices, each compiled when first called.

    The data is replicated on every device; batches and parameters are sharded as described in sharding.py. XLA inserts
    the communication, so that the programs compute what one device would, including batch norm over the whole batch.
    With `vectorized`, states, seeds, totals and plans have a leading seed axis.

    Attributes:
      model: initialised as ``model.init(key, inputs, train=False)``; the steps apply it.
      train_step: the training step. The last, smaller batch of an epoch is not split into micro-batches.
      eval_step: the evaluation step.
      inputs: shape and dtype of one example's inputs, without the batch axis: `jax.ShapeDtypeStruct` or a tree of them.
      batch_size: examples per step over all devices; if they do not divide evenly, each device computes all of them.
      eval_batch_size: examples per evaluation step, rounded up to a multiple of the devices that share them.
      labels: shape and dtype of one example's labels, like `inputs`.
      vectorized: whether all seeds run as one program over a leading axis.
      head_layouts: layouts of the heads' variables inside a chunk; programs take and return the documented tree.
      mesh: the devices; by default all of them on the axis data.
      compiler_options: XLA options of the programs that train and evaluate, in addition to `loop_options`.
      block: number of steps in a block, see `run_chunk`; by default 32 on GPUs, where it matters, else 1.
      batch_norm_per_device: whether each device's part of a training batch is normalised separately. The last, smaller
        batch of an epoch is normalised as a whole. Parameters must not be sharded.
    """

    model: Any
    train_step: TrainStep
    eval_step: EvalStep
    inputs: Any
    batch_size: int
    eval_batch_size: int
    labels: Any = dataclasses.field(default_factory=lambda: jax.ShapeDtypeStruct((), np.int32))
    vectorized: bool = False
    head_layouts: Layouts = dataclasses.field(default_factory=dict)
    mesh: Mesh = dataclasses.field(default_factory=sharding.make_mesh)
    compiler_options: Mapping[str, bool | str] = dataclasses.field(default_factory=dict)
    block: int = 0
    batch_norm_per_device: bool = False

    def __post_init__(self) -> None:
        self.eval_batch_size = sharding.divisible_size(self.mesh, self.eval_batch_size)
        platform = self.mesh.devices.flat[0].platform
        self.block = self.block or (_GPU_BLOCK if platform == "gpu" else 1)
        self.compiler_options = {**self.compiler_options, **loop_options(platform)}

    @cached_property
    def init(self) -> Callable[..., TrainState]:
        """Seed -> state."""
        return jax.jit(self._over_seeds(self._initial), out_shardings=self._state_shardings)

    @cached_property
    def zero_totals(self) -> Callable[..., EpochMetrics]:
        """Seed -> totals."""

        def zero_totals(seed: jax.Array) -> EpochMetrics:
            state = jax.eval_shape(self._initial, jax.ShapeDtypeStruct((), np.uint32))
            batch = _batch_of_two(self.inputs), _batch_of_two(self.labels)
            sums = jax.eval_shape(self.eval_step, state.variables, batch, jax.ShapeDtypeStruct((2,), bool))
            return EpochMetrics.zero({name: sums.metrics[name].dtype for name in self.train_step.metrics})

        return jax.jit(self._over_seeds(zero_totals), out_shardings=self.replicated)

    @cached_property
    def chunk(self) -> Step:
        """(state, totals, seed, plan, first, num_steps, data) -> (state, totals); state and totals are donated."""
        return self._chunk(self.batch_size, last=False)

    @cached_property
    def tail(self) -> Callable[[int], Step]:
        """Number of examples -> the same program for a last batch of that size."""
        return cache(partial(self._chunk, last=True))

    @cached_property
    def batch_step(self) -> Step:
        """(state, totals, seed, learning_rate, batch) -> (state, totals), one step on a batch from the host.

        State and totals are donated. Never vectorised.
        """

        def batch_step(state: TrainState, totals: EpochMetrics, seed: jax.Array, rate: jax.Array, batch: Batch) -> Any:
            take = self._step(last=count_rows(batch) != self.batch_size)
            return take(state, totals, batch, rate, keys.step_key(seed, state.step))

        return self._jit_steps(batch_step)

    @cached_property
    def evaluate(self) -> Callable[..., Any]:
        """(variables, data, count) -> Evaluation; data of a multiple of `eval_batch_size` examples."""

        def evaluate(variables: Any, data: Batch, count: jax.Array) -> Any:
            def one(batch: Batch, mask: jax.Array) -> Any:
                return self.eval_step(variables, self._sharded(batch), mask)

            return evaluate_split(one, self.eval_batch_size, data, count, whole=self.block > 1)

        program = _named("evaluate", self._over_seeds(evaluate, (0, None, None)))
        return jit_with(self.compiler_options, program, out_shardings=self.replicated)

    @cached_property
    def logits(self) -> Callable[..., jax.Array]:
        """(variables of one seed, inputs) -> logits in evaluation."""
        apply = partial(self.eval_step.apply, train=False)
        return jit_with(self.compiler_options, apply, out_shardings=self.replicated)

    @cached_property
    def update_best(self) -> Callable[..., Any]:
        """(best, candidate, improved) -> best; the older best is donated."""
        found = self._state_shardings
        if sharding.shards_parameters(self.mesh):
            found = {"params": found.params, "batch_stats": found.batch_stats}
        return jax.jit(self._over_seeds(_update_best, (0, 0, 0)), donate_argnums=0, out_shardings=found)

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of replicated arrays."""
        return sharding.replicated_on(self.mesh)

    def replicate(self, tree: Any) -> Any:
        """`tree`, replicated on every device of the mesh."""
        return put(tree, self.replicated)

    def place(self, tree: Any) -> Any:
        """A state, or parts of one, sharded over the mesh as the programs expect it."""
        return put(tree, sharding.shardings(self.mesh, tree, stacked=self.vectorized))

    def shard_batch(self, batch: Batch) -> Batch:
        """A host's batch, sharded over the devices."""
        return sharding.shard_batch(self.mesh, batch)

    def _over_seeds(self, function: Callable[..., Any], axes: tuple[Any, ...] = (0,)) -> Callable[..., Any]:
        return jax.vmap(function, axes) if self.vectorized else function

    def _initial(self, seed: jax.Array) -> TrainState:
        return self.train_step.init(self.model, _batch_of_two(self.inputs), seed)

    @cached_property
    def _state_shardings(self) -> Any:
        """Of a state: one for all of it where nothing is sharded."""
        if not sharding.shards_parameters(self.mesh):
            return self.replicated
        seed = jax.ShapeDtypeStruct((1,) if self.vectorized else (), np.uint32)
        states = jax.eval_shape(self._over_seeds(self._initial), seed)
        return sharding.shardings(self.mesh, states, stacked=self.vectorized)

    def _jit_steps(self, function: Callable[..., Any]) -> Step:
        results = self._state_shardings, self.replicated
        program = _named("train_steps", function)
        return jit_with(self.compiler_options, program, donate_argnums=(0, 1), out_shardings=results)

    def _chunk(self, size: int, last: bool) -> Step:
        run = partial(run_chunk, self._step(last), size, self.batch_size, 1 if last else self.block)
        converted = in_layouts(self.head_layouts, self.train_step.frozen, run)
        return self._jit_steps(self._over_seeds(converted, (0, 0, 0, EpochPlan(0, 0), None, None, None)))

    def _step(self, last: bool) -> Step:
        """The training step over the devices: on a whole batch, or on the last, smaller one of an epoch."""
        step, mesh = self.train_step, self.mesh
        descend = dataclasses.replace(step, micro_batches=1).descend if last else step.descend
        if self.batch_norm_per_device and not last:
            descend = sharding.per_device(mesh, descend)

        def take(
            state: TrainState, totals: EpochMetrics, batch: Batch, rate: jax.Array, key: jax.Array
        ) -> tuple[TrainState, EpochMetrics]:
            batch = step.prepare(batch if last else self._sharded(batch), key)
            state, totals = descend(state, totals, batch, rate, key)
            if sharding.shards_parameters(mesh):  # or XLA may gather in one step what it has to shard again in the next
                state = lax.with_sharding_constraint(state, sharding.shardings(mesh, state))
            return state, totals

        return take

    def _sharded(self, batch: Batch) -> Batch:
        return lax.with_sharding_constraint(batch, sharding.batch_sharding(self.mesh, count_rows(batch)))


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` by a name, which traces and dumps of its program show."""

    def called(*args: Any) -> Any:
        return function(*args)

    called.__name__ = called.__qualname__ = name
    return called


def _batch_of_two(example: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), example)


def _update_best(best: Any, candidate: Any, improved: jax.Array) -> Any:
    return jax.tree.map(partial(jnp.where, improved), candidate, best)


def padded_split(split: Batch, batch_size: int) -> Batch:
    """Host arrays (inputs, labels) of a split, padded with zeros to a multiple of `batch_size`."""
    extra = -count_rows(split) % batch_size
    return jax.tree.map(lambda array: np.pad(array, [(0, extra)] + [(0, 0)] * (array.ndim - 1)), split)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Steps of an epoch and their data.

    Attributes:
      first: index of the first step in the epoch.
      steps: number of steps.
      data: all examples, on the devices, from which the steps gather their batches; None if batches come from the host.
      tail_size: number of examples of the last, smaller batch, if the chunk is that batch; else 0.
      batches: iterator over steps, with one batch for each seed; there may be fewer than `steps`.
    """

    first: int
    steps: int
    data: Batch | None = None
    tail_size: int = 0
    batches: Iterable[Iterable[Batch]] = ()


@dataclasses.dataclass
class _Group:
    """The state that one program moves: of the seed at the index `which`, or of all seeds along a leading axis."""

    which: Any
    seed: jax.Array
    state: TrainState
    totals: EpochMetrics
    best: Any
    plan: Any = None


class SeedStates:
    """The states of K seeds in training.

    Seeds that run one after the other have one group each; vectorised seeds have a single group with a leading axis.
    The checkpointed trees are the same in both cases: plain for one seed, with a leading axis of length K for more.

    Attributes:
      seeds: the K seeds.
      epoch: the planned epoch's number.
      rates: its learning rates [K, S].
      calls: the programs called so far, name -> (jitted function, shapes of its arguments).
    """

    def __init__(self, programs: Programs, seeds: list[int]) -> None:
        self._programs = programs
        self.seeds, self.epoch, self.rates = seeds, 0, np.zeros((len(seeds), 0), np.float32)
        self.calls: dict[str, tuple[Any, Any]] = {}
        self._groups = []
        for which in [slice(None)] if programs.vectorized else range(len(seeds)):
            seed = programs.replicate(np.asarray(seeds, np.uint32)[which])
            state = programs.init(seed)
            best = jax.tree.map(jnp.copy, state.variables)
            self._groups.append(_Group(which, seed, state, programs.zero_totals(seed), best))

    def start_from(self, variables: dict[str, Any]) -> None:
        """Start every seed from these variables of one seed, instead of its own initialisation.

        Args:
          variables: 'params' and 'batch_stats', or parts of them; missing entries stay as initialised.
        """

        def place(new: Any, old: jax.Array) -> jax.Array:
            return put(np.broadcast_to(np.asarray(new, old.dtype), old.shape), old.sharding)

        for group in self._groups:
            trees = {}
            for name, given in variables.items():
                drawn = flatten_dict(getattr(group.state, name), keep_empty_nodes=True)
                new = {path: place(leaf, drawn[path]) for path, leaf in flatten_dict(given).items()}
                trees[name] = unflatten_dict(drawn | new)
            self._start(group, trees)

    def continue_from_best(self, other: "SeedStates") -> None:
        """Start every seed from the parameters and statistics that were best in `other`."""
        for group, finished in zip(self._groups, other._groups, strict=True):
            self._start(group, {"step": finished.state.step, **jax.tree.map(jnp.copy, finished.best)})

    def _start(self, group: _Group, replaced: dict[str, Any]) -> None:
        """Replace parts of the state; its moving averages begin at the parameters and running statistics."""
        state = group.state.replace(**replaced)  # type: ignore[attr-defined]
        current = {"params": state.params, "batch_stats": state.batch_stats}
        ema = {name: {entry: current[name][entry] for entry in tree} for name, tree in state.ema.items()}
        group.state = state.replace(ema=jax.tree.map(jnp.copy, ema))
        group.best = jax.tree.map(jnp.copy, group.state.variables)

    def plan_epoch(self, order: Any, epoch: int, rates: np.ndarray) -> None:
        """Fix the order and the learning rates [K, S] of the coming epoch, counted from 0."""
        self.epoch, self.rates = epoch, rates
        for group in self._groups:
            indices = order(group.seed, self._programs.replicate(np.int32(epoch)))
            group.plan = self._programs.replicate(EpochPlan(indices, rates[group.which]))

    def orders(self) -> np.ndarray:
        """The planned epoch's order of each seed, int32 [K, N], on the host."""
        return self._gather([group.plan.order for group in self._groups])

    def variables(self, *, best: bool) -> dict[str, Any]:
        """The best or the current parameters and statistics, of one seed, or of K with a leading axis."""
        variables: dict[str, Any] = _stack([group.best if best else group.state.variables for group in self._groups])
        return variables

    @property
    def state(self) -> TrainState:
        """The state of one seed, or of K with a leading axis: a view that the next step may overwrite."""
        state: TrainState = _stack([group.state for group in self._groups])
        return state

    def compile_step(self, batch: Batch) -> None:
        """Compile a step on a batch from the host, by taking it with a copy of a state."""
        group = self._groups[0]
        state, totals = jax.tree.map(jnp.copy, (group.state, group.totals))
        name = "step" if count_rows(batch) == self._programs.batch_size else "tail"
        given = state, totals, group.seed, self._programs.replicate(np.float32(0)), batch
        jax.block_until_ready(self._call(name, self._programs.batch_step, *given))

    def run(self, chunk: Chunk) -> int:
        """Take the steps of `chunk` for every seed, and return their number when they are done."""
        taken = 0
        if chunk.data is not None:
            taken = chunk.steps
            take = self._programs.tail(chunk.tail_size) if chunk.tail_size else self._programs.chunk
            name = "tail" if chunk.tail_size else "steps"
            rest = *self._programs.replicate((np.int32(chunk.first), np.int32(taken))), chunk.data
            for group in self._groups:
                sums = group.state, group.totals, group.seed, group.plan
                group.state, group.totals = self._call(name, take, *sums, *rest)
        for batches in chunk.batches:
            take, step = self._programs.batch_step, min(chunk.first + taken, self.rates.shape[1] - 1)
            for group, batch in zip(self._groups, batches, strict=True):
                rate = self._programs.replicate(self.rates[group.which, step])
                group.state, group.totals = take(group.state, group.totals, group.seed, rate, batch)
            taken += 1
        jax.block_until_ready([group.totals for group in self._groups])
        return taken

    def _call(self, name: str, program: Any, *args: Any) -> Any:
        if name not in self.calls:
            self.calls[name] = program, jax.tree.map(_shape, args)
        return program(*args)

    def step_flops(self) -> dict[str, float]:
        """Operations of a step of all seeds, by dtype, see `count_flops`; {} before a step was called."""
        for name, steps in (("steps", self._programs.block), ("step", 1)):
            if name in self.calls:
                program, args = self.calls[name]
                flops = count_flops(program, *args)
                return {dtype: len(self._groups) * count / steps for dtype, count in flops.items()}
        return {}

    def idle(self) -> bool:
        """Whether the devices have finished all work of the seeds."""
        return bool(self._groups[-1].totals.count.is_ready())

    def totals(self) -> dict[str, list[Any]]:
        """The epoch's sums so far, by the fields of `EpochMetrics`, each with an entry per seed."""
        groups = [group.totals.by_name for group in self._groups]
        return {name: self._gather([sums[name] for sums in groups]).tolist() for name in groups[0]}

    def set_totals(self, totals: dict[str, list[Any]] | None) -> None:
        """Set the epoch's sums; None sets them to zero."""
        for group in self._groups:
            group.totals = zero = self._programs.zero_totals(group.seed)
            if totals is not None:
                sums = {name: np.asarray(totals[name], leaf.dtype)[group.which] for name, leaf in zero.by_name.items()}
                metrics = {name: sums.pop(name) for name in zero.metrics}
                group.totals = self._programs.replicate(EpochMetrics(metrics=metrics, **sums))

    def evaluate(self, data: Batch, count: int, *, best: bool = False) -> dict[str, np.ndarray]:
        """Sums of loss and metrics [K], predictions [K, M], of the current or the best parameters on a padded split."""
        program, rest = self._programs.evaluate, (data, self._programs.replicate(np.int32(count)))
        starts = [group.best if best else group.state.variables for group in self._groups]
        results = [self._call("evaluate", program, variables, *rest) for variables in starts]
        sums = [{**result.metrics, "loss": result.loss, "predictions": result.predictions} for result in results]
        return {name: self._gather([each[name] for each in sums]) for name in sums[0]}

    def update_best(self, improved: np.ndarray) -> None:
        """Make the current parameters the best of every seed where `improved` bool [K] says so."""
        for group in self._groups:
            better = self._programs.replicate(improved[group.which])
            group.best = self._programs.update_best(group.best, group.state.variables, better)

    def trees(self) -> dict[str, Any]:
        """The arrays of a checkpoint, by item."""
        state = self.state
        names = ("params", "batch_stats", "opt_state", "ema")
        return {name: getattr(state, name) for name in names} | {"best": self.variables(best=True)}

    def set_trees(self, trees: dict[str, Any], step: int) -> None:
        """Resume from a checkpoint's arrays, saved after `step` steps of the stage."""
        for group in self._groups:
            picked = dict(of_seed(trees, group.which) if len(self._groups) > 1 else trees)
            steps: Any = np.full(group.state.step.shape, step, np.int32)
            best = picked.pop("best")
            group.best, group.state = self._programs.place((best, TrainState(step=steps, **picked)))

    def _gather(self, values: list[jax.Array]) -> np.ndarray:
        arrays = jax.device_get(values)
        return arrays[0] if self._programs.vectorized else np.stack(arrays)


def _shape(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=getattr(array, "sharding", None))


@partial(jax.jit, static_argnums=1)
def of_seed(trees: Any, index: int) -> Any:
    """The arrays of one seed, of those of K with a leading axis; compiled, as jax moves an index to the device."""
    return jax.tree.map(lambda leaf: leaf[index], trees)


def _stack(trees: list[Any]) -> Any:
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
