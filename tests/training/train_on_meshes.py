"""Run as a script, with simulated devices: the same training on several meshes, its results into one .npz.

Prints the memory that each device needs for a chunk of steps, as the compiled program reports it.

A mesh of fewer devices than there are takes the first ones, so that one process serves them all.
"""

import argparse
import re
from functools import partial

import jax
import numpy as np
from jax.sharding import AxisType
from steps_support import make_programs

from pspinal_jax.augment import mix
from pspinal_jax.backbones import resnet, vgg5
from pspinal_jax.heads import ProgressiveSpinalHead
from pspinal_jax.models import Classifier
from pspinal_jax.training import sharding
from pspinal_jax.training.optimizers import make_optimizer
from pspinal_jax.training.sharding import AXES
from pspinal_jax.training.state import EpochMetrics
from pspinal_jax.training.step import EpochPlan

BATCH, EXAMPLES, STEPS = 16, 48, 20
SHAPES = {"fc": (10,), "vgg5": (28, 28, 1), "resnet": (32, 32, 3)}


def make_model(name, classes, width, dtype):
    head = ProgressiveSpinalHead(classes, width, 3, norm="batch", layer_dropout_rate=0.2, param_dtype=dtype)
    backbone = None
    if name == "vgg5":
        vgg5.STAGES, vgg5.NUM_FEATURES = ((4, 4), (4, 4), (8, 8, 8), (8, 8, 8)), 8
        backbone = vgg5.VGG5(param_dtype=dtype)
    if name == "resnet":
        resnet.VARIANTS["resnet18"], resnet.STAGE_CHANNELS = resnet.Variant((1, 1, 1, 1), 1), (4, 4, 8, 8)
        backbone = resnet.ResNet("resnet18", param_dtype=dtype)
    return Classifier(head=head, backbone=backbone, dtype=dtype)


def train(arguments, mesh):
    """Losses of every step, parameters after the last, an evaluation, and what the compiled programs say."""
    dtype = np.dtype(arguments.dtype)
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(EXAMPLES, *SHAPES[arguments.model])).astype(dtype)
    labels = rng.integers(0, arguments.classes, EXAMPLES).astype(np.int32)
    options, clip = {}, 0.0
    if arguments.every_option:
        weights = tuple(np.linspace(0.5, 1.5, arguments.classes).tolist())
        options, clip = {"mix": partial(mix, mixup=0.4), "class_weights": weights, "ema_decay": 0.7}, 0.5
    run = make_programs(
        make_model(arguments.model, arguments.classes, arguments.width, dtype),
        make_optimizer(momentum=0.5, gradient_clip=clip),
        inputs.shape[1:],
        dtype,
        BATCH,
        BATCH,
        label_smoothing=0.1,
        micro_batches=arguments.micro_batches,
        mesh=mesh,
        **options,
    )
    data, seed = run.replicate((inputs, labels)), run.replicate(np.uint32(0))
    order = np.concatenate([rng.permutation(EXAMPLES) for _ in range(-(-STEPS * BATCH // EXAMPLES))]).astype(np.int32)
    plan = run.replicate(EpochPlan(order, np.full(STEPS, arguments.rate, dtype)))
    state, totals = run.init(seed), run.replicate(EpochMetrics.zero()._replace(loss=np.zeros((), dtype)))
    chunk = run.chunk.lower(state, totals, seed, plan, np.int32(0), np.int32(1), data).compile()
    sums = [0.0]
    for step in range(arguments.steps):
        state, totals = chunk(
            state, totals, seed, plan, run.replicate(np.int32(step)), run.replicate(np.int32(1)), data
        )
        sums.append(float(totals.loss))
    leaves = jax.tree.leaves((state.params, state.batch_stats, state.opt_state, state.ema))
    evaluation = run.evaluate(state.variables, data, np.int32(EXAMPLES - 1))
    texts = chunk.as_text(), run.init.lower(seed).compile().as_text()
    return {
        "losses": np.diff(sums) / BATCH,
        "leaves": np.concatenate([np.ravel(leaf) for leaf in leaves]) if arguments.classes < 1000 else np.zeros(0),
        "loss": evaluation.loss,
        "predictions": evaluation.predictions[: EXAMPLES - 1],
        "reduces": "all-reduce" in texts[0],
        "holds_all_classes": any(re.search(rf"[\[,]{arguments.classes}[\],]", text) is not None for text in texts),
        "argument_bytes": chunk.memory_analysis().argument_size_in_bytes,
        "temporary_bytes": chunk.memory_analysis().temp_size_in_bytes,
        "shard": state.params["head"]["output"]["kernel"].addressable_shards[0].data.shape,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("meshes", nargs="+", help="e.g. 2x2x2")
    parser.add_argument("--model", default="fc")
    parser.add_argument("--dtype", default="float64")
    parser.add_argument("--classes", type=int, default=104)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--every-option", type=int, default=0)
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_x64", arguments.dtype == "float64")
    sharding.MIN_SHARDED_SIZE = 64  # or the small arrays here would all stay whole
    results = {}
    for name in arguments.meshes:
        shape = tuple(map(int, name.split("x")))
        found = train(arguments, jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3))
        print(f"{name}: {found['argument_bytes']:,} bytes of arguments, {found['temporary_bytes']:,} temporary")
        results |= {f"{name}/{key}": np.asarray(value) for key, value in found.items()}
    np.savez(arguments.out, **results)


main()
