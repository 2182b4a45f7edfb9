"""A small data set of features, and a comparison of it that takes a second."""

import json

import numpy as np

from pspinal_jax.comparison.api import compare_data
from pspinal_jax.comparison.best import Source
from pspinal_jax.comparison.settings import CompareConfig
from pspinal_jax.comparison.trial_log import TrialLog
from pspinal_jax.data.tables import make_dataset
from pspinal_jax.recipes.schema import DataConfig

SMALL = {
    "heads": ("progressive", "dense"),
    "trials": 3,
    "num_seeds": 2,
    "epochs": 2,
    "batch_size": 16,
    "layer_width": 4,
    "num_layers": 2,
    "refit": False,
    "save": False,
}


def make_features(num_train=120, num_test=60, seed=0):
    """Splits of features [N, 6] in which three classes overlap."""
    rng = np.random.default_rng(seed)

    def draw(count):
        labels = np.arange(count) % 3
        return np.eye(3, 6)[labels] * 2 + rng.normal(0, 1, (count, 6)) * 3 ** np.arange(6), labels

    return {"train": draw(num_train), "test": draw(num_test)}


def small_data(**changes):
    return make_dataset({**make_features(), **changes}, "small", None)


def run(workdir=None, data=None, **changes):
    """What compare.json holds."""
    config = CompareConfig(**{**SMALL, **changes})
    data = data or small_data()
    return compare_data(
        Source.of(data, DataConfig("small")), config, TrialLog(workdir), "command", progress=False
    ).result


def lasting(result):
    """All of compare.json that does not depend on how often it was interrupted."""
    return json.loads(json.dumps({name: value for name, value in result.items() if name != "execution"}))
