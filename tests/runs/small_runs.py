"""Runs on the 96 images of tests/conftest.py: their recipe and options, what they wrote, and what stands for a kill."""

import dataclasses
import json

from pspinal_jax.recipes import DataConfig, ModelConfig, load_recipe
from pspinal_jax.recipes.schema import RunOptions
from pspinal_jax.training.costs import MEASURED


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def small_recipe(npz_path, **changes):
    """The shipped default recipe, made small, with other values of its fields."""
    small = {
        "data": DataConfig("small", path=npz_path, mean=0.3, std=0.2, num_validation=24),
        "model": ModelConfig(layer_width=6, num_layers=3, norm="batch"),
        "epochs": 4,
        "batch_size": 16,
        "eval_batch_size": 16,
    }
    return dataclasses.replace(load_recipe("digits"), **(small | changes))


def options(workdir, **fields):
    return RunOptions(workdir=workdir, checkpoint_seconds=0.0, **fields)


def metrics(workdir, *without):
    """The lines of metrics.jsonl without times."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in (*MEASURED, *without)} for line in lines]
