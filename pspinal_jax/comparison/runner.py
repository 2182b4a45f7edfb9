"""Trainings of a head by one compiled program: one after the other on every core of a CPU, or many as one on devices.

On CPU a vectorised head gains nothing, but cores do: a thread for each calls the same single-threaded executable (as
fast as a process for each, measured, and compiled once). Elsewhere the program is mapped over an axis of slots, which
is cut over the devices of the mesh; they exchange nothing.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pspinal_jax.comparison.program import Examples, Outcome, Part, Plan, train_head
from pspinal_jax.comparison.settings import Setting
from pspinal_jax.distributed import put
from pspinal_jax.models import abstract_variables, count_parameters
from pspinal_jax.training.sharding import make_mesh, replicated_on

Mode = Literal["auto", "loop", "vmap"]
_SLOTS = PartitionSpec("data")


class Task(NamedTuple):
    """One training.

    Attributes:
      key: whose it is; handed back.
      head: name of its head.
      setting: hyper-parameters.
      seed: of all random numbers.
      part: which examples; tasks that run together have parts of the same shapes and counts.
    """

    key: Any
    head: str
    setting: Setting
    seed: int
    part: Part


class Runner:
    """The programs of all heads, each compiled when it is first needed, and once.

    Attributes:
      mode: 'loop' or 'vmap'.
      compilations: how many programs were compiled, by head.
      slots: how many trainings are one program, by head; 1 with 'loop'.
    """

    def __init__(
        self, heads: dict[str, nn.Module], plan: Plan, most_slots: int, mode: Mode = "auto", workers: int | None = None
    ) -> None:
        self._heads, self._plan, self._most_slots = heads, plan, most_slots
        one_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
        self.mode = ("loop" if one_cpu else "vmap") if mode == "auto" else mode
        self.workers = workers or _cores()
        self.compilations: dict[str, int] = dict.fromkeys(heads, 0)
        self.slots: dict[str, int] = dict.fromkeys(heads, 1)
        self._mesh = make_mesh()
        self._programs: dict[str, Callable[..., Outcome]] = {}
        self._locks = {name: threading.Lock() for name in heads}
        self._rates: np.ndarray | None = None

    def run(self, tasks: Sequence[Task], examples: Examples, chosen_first: Sequence[str]) -> Iterator[Any]:
        """Yield (task, outcome on the host, seconds of its own) as they end.

        Args:
          tasks: what to train.
          examples: all examples, of the same shapes in every call.
          chosen_first: the heads in the order in which to begin with their tasks.
        """
        if not tasks:
            return
        ordered = sorted(tasks, key=lambda task: chosen_first.index(task.head))
        place = replicated_on(self._mesh) if self.mode == "vmap" else jax.devices()[0]
        resident = Examples(*jax.device_put(tuple(examples), place))
        yield from (self._loop if self.mode == "loop" else self._vectorised)(ordered, resident)

    def _loop(self, tasks: list[Task], examples: Examples) -> Iterator[Any]:
        def work(task: Task) -> tuple[Outcome, float]:
            program = self._program(task, examples)
            start = time.perf_counter()
            outcome = jax.device_get(program(*self._operands(task), examples))
            return outcome, time.perf_counter() - start

        pool = ThreadPoolExecutor(self.workers)
        try:
            heads = list(dict.fromkeys(task.head for task in tasks))
            first = {head: next(task for task in tasks if task.head == head) for head in heads}
            list(pool.map(lambda task: self._program(task, examples), first.values()))
            futures: dict[Future[Any], Task] = {pool.submit(work, task): task for task in tasks}
            for future in as_completed(futures):
                yield futures[future], *future.result()
        finally:  # on an error, or where nobody asks for more: what has begun is all that still runs
            pool.shutdown(wait=True, cancel_futures=True)

    def _vectorised(self, tasks: list[Task], examples: Examples) -> Iterator[Any]:
        slots_sharding = NamedSharding(self._mesh, _SLOTS)
        for head in dict.fromkeys(task.head for task in tasks):
            waiting = [task for task in tasks if task.head == head]
            program = self._program(waiting[0], examples)
            while waiting:
                group, waiting = waiting[: self.slots[head]], waiting[self.slots[head] :]
                # What is left of the slots does the last task again.
                filled = group + group[-1:] * (self.slots[head] - len(group))
                start = time.perf_counter()
                settings, seeds, rates, parts = _stack([self._operands(task) for task in filled])
                settings, seeds, parts = put((settings, seeds, parts), slots_sharding)
                outcomes = jax.device_get(program(settings, seeds, rates, parts, filled[0].part.count, examples))
                seconds = (time.perf_counter() - start) / len(group)
                for index, task in enumerate(group):
                    yield task, jax.tree.map(lambda leaf, i=index: leaf[i], outcomes), seconds

    def _operands(self, task: Task) -> tuple[Any, ...]:
        if self._rates is None:
            self._rates = self._plan.rates(len(task.part.train))
        setting: Any = Setting(*map(np.float32, task.setting))  # type: ignore[arg-type]
        return setting, np.uint32(task.seed), self._rates, task.part

    def _program(self, task: Task, examples: Examples) -> Callable[..., Outcome]:
        with self._locks[task.head]:
            if task.head not in self._programs:
                compile_ = self._compile_one if self.mode == "loop" else self._compile_slots
                self._programs[task.head] = compile_(task, examples)
            return self._programs[task.head]

    def _compile_one(self, task: Task, examples: Examples) -> Callable[..., Outcome]:
        head, plan = self._heads[task.head], self._plan

        def train(setting: Setting, seed: Any, rates: Any, part: Part, examples: Examples) -> Outcome:
            return train_head(head, plan, setting, seed, rates, part, examples)[1]

        # The other threads have the other cores.
        options: dict[str, Any] = {"xla_cpu_multi_thread_eigen": False} if jax.default_backend() == "cpu" else {}
        self.compilations[task.head] += 1
        return jax.jit(train).lower(*self._operands(task), examples).compile(compiler_options=options)

    def _compile_slots(self, task: Task, examples: Examples) -> Callable[..., Outcome]:
        """The program over as many slots as are asked for, or as the device's memory holds."""
        devices = self._mesh.size
        memory = _memory_for_slots(examples)
        each = _estimated_bytes(self._heads[task.head], self._plan, task.part, examples)
        slots = -(-min(self._most_slots, max(1, int(memory / each)) * devices) // devices) * devices
        while True:
            compiled = self._lower(task, slots, examples).compile()
            self.compilations[task.head] += 1
            analysis = compiled.memory_analysis()
            needed = 0 if analysis is None else analysis.temp_size_in_bytes + analysis.output_size_in_bytes
            if needed <= memory or slots == devices:
                self.slots[task.head] = slots
                return compiled
            slots = max(devices, slots // 2 // devices * devices)

    def _lower(self, task: Task, slots: int, examples: Examples) -> Any:
        head, plan = self._heads[task.head], self._plan

        def train(setting: Setting, seed: Any, rates: Any, part: Part, count: Any, examples: Examples) -> Outcome:
            return train_head(head, plan, setting, seed, rates, part._replace(count=count), examples)[1]

        mapped = jax.vmap(train, (0, 0, None, Part(0, 0, 0, 0, 0), None, None))
        whole = PartitionSpec()
        # Nothing is said between devices, so there is nothing for shard_map to check.
        sharded = jax.shard_map(
            mapped,
            mesh=self._mesh,
            in_specs=(_SLOTS, _SLOTS, whole, _SLOTS, whole, whole),
            out_specs=_SLOTS,
            check_vma=False,
        )
        setting, seed, rates, part = self._operands(task)
        stacked = _stack([(setting, seed, rates, part)] * slots)
        slots_sharding = NamedSharding(self._mesh, _SLOTS)
        settings, seeds, parts = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=slots_sharding),
            (stacked[0], stacked[1], stacked[3]),
        )
        return jax.jit(sharded).lower(settings, seeds, rates, parts, task.part.count, examples)


def _stack(operands: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """(settings, seeds, rates, parts) with a leading axis of slots, but for the rates, which are everyone's."""
    settings, seeds, rates, parts = zip(*operands, strict=True)
    settings, parts = (jax.tree.map(lambda *leaves: np.stack(leaves), *trees) for trees in (settings, parts))
    return settings, np.stack(seeds), rates[0], parts


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_for_slots(examples: Examples) -> float:
    """Bytes on a device for slots: nine tenths of what is there beside the examples.

    A device tells its memory; where it does not (a CPU's), a quarter of the machine's is shared by all.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = float(stats.get("bytes_limit", 0))
    if not limit:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**32
        return machine / 4 / jax.local_device_count()
    return max(0.0, 0.9 * (limit - sum(array.nbytes for array in examples)))


def _estimated_bytes(head: Any, plan: Plan, part: Part, examples: Examples) -> float:
    """About what a slot takes: parameters, gradients and two moments, now and in the next step; a batch; its rows."""
    num_features = examples.inputs.shape[1]
    parameters = count_parameters(abstract_variables(head, (num_features,))["params"])
    width = num_features + 4 * getattr(head, "layer_width", 0) * getattr(head, "num_layers", 1) + head.num_classes
    batch = 8 * max(plan.batch_size, plan.eval_batch_size) * width
    return 4.0 * (8 * parameters + batch + 4 * len(part.train) + 2 * len(part.evaluated) + 2 * num_features)
