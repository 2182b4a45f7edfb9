"""Run as a script: `train` on so many simulated devices; --stop-at N stops as SIGTERM would after N steps."""

import argparse
import dataclasses
import json
import signal
from pathlib import Path

import jax

from pspinal_jax.recipes import DataConfig, MeshConfig, ModelConfig, OptimizerConfig, load_recipe
from pspinal_jax.recipes.schema import RunOptions
from pspinal_jax.runs.train import train
from pspinal_jax.training.examples import InMemoryExamples
from pspinal_jax.training.loop import Stopped, Trainer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("devices", type=int)
    parser.add_argument("mesh", nargs=3, type=int)
    parser.add_argument("--stop-at", type=int)
    parser.add_argument("--num-seeds", type=int, default=1)
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", arguments.devices)
    InMemoryExamples.first_chunk = 1
    restore, chunk_steps, shards = Trainer._restore, Trainer._chunk_steps, {}

    def looked_at(self):
        restore(self)
        shards["serial"] = self.progress.serial
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.seed_states.trees()):
            shards[jax.tree_util.keystr(path, simple=True, separator="/")] = leaf.sharding.shard_shape(leaf.shape)

    def stopping(self, remaining):
        steps = chunk_steps(self, remaining)
        if arguments.stop_at is not None:
            steps = min(steps, arguments.stop_at - self.progress.serial)
            if self.progress.serial + steps == arguments.stop_at:
                signal.raise_signal(signal.SIGTERM)
        return steps

    Trainer._restore, Trainer._chunk_steps = looked_at, stopping
    recipe = dataclasses.replace(
        load_recipe("digits"),
        data=DataConfig("small", path=arguments.data, mean=0.3, std=0.2, num_validation=32),
        model=ModelConfig(layer_width=64, num_layers=3, norm="batch"),
        optimizer=OptimizerConfig("sgd", learning_rate=0.02),
        epochs=3,
        batch_size=16,
        eval_batch_size=16,
        num_seeds=arguments.num_seeds,
        mesh=MeshConfig(*arguments.mesh),
    )
    try:
        train(recipe, RunOptions(workdir=arguments.workdir, checkpoint_seconds=0.0))
        shards["finished"] = True
    except Stopped:
        shards["finished"] = False
    print(json.dumps(shards))


main()
