"""Whether two processes round alike: a checksum of what a run's programs give in their first steps."""

from typing import Any

import numpy as np

from pspinal_jax.checkpoints.checksum import json_checksum, tree_checksums
from pspinal_jax.runs.build import RunSetup
from pspinal_jax.training.chunk import Batch
from pspinal_jax.training.loop import longest_epoch
from pspinal_jax.training.programs import make_order
from pspinal_jax.training.seed_states import SeedStates

_STEPS = 4
"""Enough that every array, momenta included, has passed through every sum."""


def first_steps_checksum(setup: RunSetup) -> str:
    """Checksum of all that seed 0 gives in the first steps, the last, smaller batch and an evaluation of each stage.

    On CPU, a product's sums may be cut into as many pieces as there are threads. Where they are cut is a matter of
    shapes and threads, not of what is summed: processes that agree in these steps, bit for bit, agree in all.

    Args:
      setup: of a run whose seeds are programs of their own, on arrays.
    """
    rate = setup.recipe.optimizer.learning_rate
    rates = np.full((1, longest_epoch(setup.stages)), rate, np.float32)
    given: list[Any] = []
    for stage in setup.stages:
        states = SeedStates(setup.programs, [0])
        states.plan_epoch(make_order(stage.subset, setup.examples.count, False, shuffle=False), 0, rates)
        for first in (0, stage.whole_steps) if stage.tail_size else (0,):
            states.run(next(setup.examples.chunks(states, stage, first, lambda remaining: min(_STEPS, remaining))))
        given += [tree_checksums(states.trees()), states.totals()]
        if stage.evaluates:
            given.append(tree_checksums(_evaluate_a_batch(setup, stage.evaluates, states)))
    return json_checksum(given)


def _evaluate_a_batch(setup: RunSetup, split: str, states: SeedStates) -> dict[str, np.ndarray]:
    def evaluate(data: Batch, count: int) -> dict[str, np.ndarray]:
        return states.evaluate(data, min(count, setup.programs.eval_batch_size))

    return setup.splits[split].evaluate(evaluate)
