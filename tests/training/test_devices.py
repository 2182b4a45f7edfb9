"""The same training on 1, 2 and 4 simulated devices."""

import os
import subprocess
import sys

import numpy as np

SCRIPT = """
import sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
jax.config.update("jax_enable_x64", True)
from pspinal_jax.heads import ProgressiveSpinalHead
from pspinal_jax.models.classifier import Classifier
from pspinal_jax.recipes import OptimizerConfig
from pspinal_jax.training.chunk import EpochPlan
from pspinal_jax.training.optimizers import make_optimizer
from pspinal_jax.training.programs import build_programs, make_order

rng = np.random.default_rng(0)
inputs, labels = rng.normal(size=(64, 6)), rng.integers(0, 4, 64).astype(np.int32)
head = ProgressiveSpinalHead(num_classes=4, layer_width=5, norm="batch", layer_dropout_rate=0.2, param_dtype="float64")
run = build_programs(
    Classifier(head=head, dtype="float64"), make_optimizer(OptimizerConfig(momentum=0.5)), input_shape=(6,),
    input_dtype=np.float64, batch_size=8, eval_batch_size=8, label_smoothing=0.0, vectorized=False,
)
assert run.mesh.size == int(sys.argv[1])
data = run.replicate((inputs, labels))
seed = run.replicate(np.uint32(0))
plan = EpochPlan(make_order(np.arange(64), 64, False)(seed, np.int32(0)), np.full(8, 0.1))
state, totals = run.init(seed), run.zero_totals(seed)
arguments = (state, totals, seed, run.replicate(plan), np.int32(0), np.int32(8), data)
if run.mesh.size > 1:
    assert "all-reduce" in run.chunk.lower(*arguments).compile().as_text()
state, totals = run.chunk(*arguments)
leaves = jax.tree.leaves((state.params, state.batch_stats))
print(repr(np.concatenate([np.ravel(leaf) for leaf in leaves]).tolist()))
"""


def train_on(devices: int) -> np.ndarray:
    environment = {**os.environ, "NPROC": str(2 * devices)}
    output = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(devices)], env=environment, capture_output=True, text=True, check=False
    )
    assert output.returncode == 0, output.stderr
    return np.array(eval(output.stdout.splitlines()[-1]))


def test_parameters_do_not_depend_on_the_number_of_devices():
    one = train_on(1)
    for devices in (2, 4):
        np.testing.assert_allclose(train_on(devices), one, rtol=0, atol=1e-12)
