"""JAX's strict settings: no dtype is promoted and nothing moved between host and devices unasked."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from small_runs import options, small_recipe

import pspinal_jax
from pspinal_jax.runs.train import train

STRICT = {"jax_numpy_dtype_promotion": "strict", "jax_transfer_guard": "disallow"}
X = np.random.default_rng(0).normal(size=(90, 6)).astype(np.float32)
Y = X[:, :3].argmax(1).astype(np.int32)
WHOLE = """
import sys

import flax.linen as nn
import numpy as np

import pspinal_jax

path, workdir = sys.argv[1:]
with np.load(path) as arrays:
    images, labels = arrays["train_images"], arrays["train_labels"]
small = {"data__path": path, "data__num_validation": 24, "batch_size": 16, "eval_batch_size": 16, "epochs": 2}
options = {"num_seeds": 2, "ema_decay": 0.9, "gradient_clip": 1.0, "micro_batches": 2, "label_smoothing": 0.1}
run = pspinal_jax.train("digits", workdir=workdir, retrain=True, **small, **options)
run.evaluate()
run.predict(images[:3])
features = images.reshape(len(images), -1) / 255
result = pspinal_jax.fit(pspinal_jax.ProgressiveSpinalHead(3, 8), (features, labels), num_seeds=2, epochs=2)
result.evaluate(features, labels)
result.predict(features)
comparison = pspinal_jax.compare(features, labels, trials=2, num_seeds=2, epochs=2, batch_size=16, progress=False)
comparison.best_model.predict_proba(features[:3])
print("tensorflow_datasets" in sys.modules)
"""


@pytest.fixture
def strict():
    before = {name: jax.config.values[name] for name in STRICT}
    for name, value in STRICT.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_run_under_strict_settings(strict, npz_path, tmp_path):
    with pytest.raises(ValueError, match="promotion"):
        jax.numpy.add(*jax.device_put((np.int32(1), np.float32(1))))
    with pytest.raises(RuntimeError, match="Disallowed host-to-device transfer"):
        jax.jit(lambda x: x)(np.arange(2))
    assert train(small_recipe(npz_path, epochs=1), options(tmp_path / "run"))["test_examples"] == 50
    run = pspinal_jax.load_run(tmp_path / "run")
    assert run.evaluate()["examples"] == 50 and len(run.predict(np.zeros((2, 4, 4), np.uint8))) == 2


def test_a_fit_under_strict_settings(strict):
    result = pspinal_jax.fit(pspinal_jax.ProgressiveSpinalHead(3, 4), (X, Y), validation=0.2, epochs=1, batch_size=16)
    assert result.predict(X).shape == (90, 3) and result.evaluate(X, Y)["loss"] > 0


@pytest.mark.slow
def test_everything_under_strict_settings_and_without_tfds(npz_path, tmp_path):
    settings = {name.upper(): value for name, value in STRICT.items()}
    command = [sys.executable, "-c", WHOLE, npz_path, tmp_path / "run"]
    ran = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.splitlines()[-1] == "False", "nothing of TFDS is needed to train from arrays"
