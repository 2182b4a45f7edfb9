"""A loss or gradient that is not finite stops the run, and what is needed to see it again is written down."""

from typing import Any

from pspinal_jax.errors import RunError
from pspinal_jax.processes.agree import is_primary
from pspinal_jax.recipes.schema import Recipe
from pspinal_jax.runs.directory import RunDirectory, write_json
from pspinal_jax.runs.lanes import Lanes
from pspinal_jax.runs.stages import Position, Stage

REPORT = "nonfinite.json"


def check_finite(
    recipe: Recipe,
    lanes: Lanes,
    totals: dict[str, list[Any]],
    stage: Stage,
    position: Position,
    directory: RunDirectory,
) -> None:
    """Raise RunError, naming the step, if one of the epoch so far was not finite; called before anything is saved.

    nonfinite.json in the run's directory tells the seed, the epoch, the step, its learning rate and its examples. The
    run is a function of its recipe, so training on from the last checkpoint comes by that step again.
    """
    for index, bad in enumerate(totals["bad_step"]):
        if bad < 0:
            continue
        step = bad - (position.epochs_before + position.epoch) * stage.steps_per_epoch
        report = {
            "seed": lanes.seeds[index],
            "stage": stage.name,
            "epoch": position.epoch + 1,
            "step_of_epoch": step + 1,
            "step_of_stage": bad + 1,
            "learning_rate": lanes.learning_rate(index, step),
            "examples": lanes.examples(index, step, recipe.batch_size).tolist(),
        }
        if is_primary():
            write_json(directory.path / REPORT, report)
        raise RunError(
            f"the loss or a gradient of seed {report['seed']} is not finite at step {step + 1} of epoch "
            f"{report['epoch']}; the last checkpoint before it is kept, and {directory.path / REPORT} tells which "
            "examples it saw; lower --optimizer.learning-rate, or leave such steps out with --on-nonfinite skip (in "
            "another --workdir)"
        )
