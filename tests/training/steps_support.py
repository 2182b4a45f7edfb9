"""The programs of a model, from the options that a recipe would give."""

import dataclasses
from functools import partial

import jax

from pspinal_jax.training.programs import Programs
from pspinal_jax.training.step import EvalStep, TrainStep, target_losses


def make_programs(
    model, optimizer, shape, dtype, batch_size, eval_batch_size, label_smoothing=0.0, class_weights=None, **options
):
    loss = partial(target_losses, label_smoothing=label_smoothing, class_weights=class_weights)
    known = {field.name for field in dataclasses.fields(Programs)}
    execution = {name: options.pop(name) for name in list(options) if name in known}
    step, inputs = TrainStep(model.apply, optimizer, loss, **options), jax.ShapeDtypeStruct(shape, dtype)
    return Programs(model, step, EvalStep(model.apply), inputs, batch_size, eval_batch_size, **execution)
