"""Writes fixtures/: what commit e35a5cb leaves on the disk and computes, for test_older_files.py.

It reaches into that commit's modules, so it runs on that commit only; README.md has the commands.
"""

import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from pspinal_jax.data.digits import read_digits
from pspinal_jax.runs.examples import InMemoryExamples
from test_older_files import DROPOUT_KEY, FIXTURES, INIT_KEY, machine, timeless

from pspinal_jax import fuse_params, heads, pack_batch_stats, pack_params
from pspinal_jax.__main__ import main
from pspinal_jax.backbones import VGG5, ResNet
from pspinal_jax.models import Classifier
from pspinal_jax.runs.result import load_variables
from pspinal_jax.training import loop as trainer
from pspinal_jax.weights import classifier_state_dict, resnet_state_dict, save_variables

COMMON = "--data.path digits.npz --eval-batch-size 50 --model.layer-width 4 --epochs"
VALIDATION = "--data.num-validation 60 --retrain --batch-size 32 --model.norm batch --model.num-layers 2"
PAPER = "--protocol paper --rounds 2 --optimizer.steering best_on_test --batch-size 48 --data.no-drop-remainder"
SGD = "--optimizer.name sgd --optimizer.learning-rate 0.05 --optimizer.nesterov --optimizer.schedule step"
PLAIN = "--model.norm none --model.implementation unrolled --model.layer-dropout-rate 0.1 --model.num-layers 1"
RUNS = {
    "finished": f"{COMMON} 2 --num-seeds 2 {VALIDATION}",
    "unfinished": f"{COMMON} 3 {VALIDATION}",
    "unfinished_paper": f"{COMMON} 4 --num-seeds 2 {PAPER} {SGD} {PLAIN}",
}
HEADS = {
    "progressive": ("ProgressiveSpinalHead", {"num_layers": 2, "layer_width": 3}),
    "progressive_norm": (
        "ProgressiveSpinalHead",
        {"num_layers": 2, "layer_width": 3, "norm": "batch", "layer_dropout_rate": 0.1},
    ),
    "spinal": ("SpinalHead", {"num_layers": 2, "layer_width": 3, "norm": "batch"}),
    "mlp": ("MLPHead", {"layer_width": 3, "norm": "batch"}),
    "dense": ("DenseHead", {"dropout_rate": 0.2}),
}


def write_data():
    splits = read_digits()
    arrays = {}
    for name, count in [("train", 320), ("test", 100)]:
        images, labels = (part[:count] for part in splits[name])
        arrays |= {f"{name}_images": images[..., 0], f"{name}_labels": labels.astype(np.uint8)}
    np.savez_compressed("digits.npz", **arrays)
    return arrays["test_images"][:8, ..., None]


def stop_after(chunks):
    """SIGTERM in the next run's chunk of that number; chunks are of three steps and fewer."""
    trainer.CHUNK_SECONDS, InMemoryExamples.first_chunk = 0.0, 3
    whole, calls = trainer.Trainer._chunk_steps, [0]

    def counted(self, remaining):
        calls[0] += 1
        if calls[0] == chunks:
            signal.raise_signal(signal.SIGTERM)
        return min(3, remaining, whole(self, remaining) + 2)

    trainer.Trainer._chunk_steps = counted
    return lambda: setattr(trainer.Trainer, "_chunk_steps", whole)


def archive(run):
    """The run as it lies there, without what nothing reads: the older checkpoint of two, and the drawing."""
    (Path(run) / "curves.png").unlink(missing_ok=True)
    _, *older = sorted((Path(run) / "checkpoints").iterdir(), key=lambda path: int(path.name), reverse=True)
    for checkpoint in older:
        shutil.rmtree(checkpoint)
    shutil.make_archive(str(FIXTURES / run), "zip", ".", run)


def make_runs(images):
    expected, selected = {}, {}
    for run, flags in RUNS.items():
        command = ["train", "digits", "--workdir", run, *flags.split()]
        if run != "finished":
            undo = stop_after(chunks=5)
            assert main(command) == 0 and not (Path(run) / "result.json").exists()
            archive(run)
            undo()
            shutil.rmtree(run)
        assert main(command) == 0
        result = json.loads((Path(run) / "result.json").read_text())
        lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        expected[run] = {"command": command, "result": timeless(result), "metrics": timeless(lines)}
        for index in range(len(result["seeds"])):
            selected[f"{run}_{index}"] = load_variables(Path(run), index)[0]
    archive("finished")

    assert main(["evaluate", "finished", "--seed-index", "0"]) == 0
    evaluation = json.loads(Path("finished/evaluation.json").read_text())
    expected["finished"] |= {"loss": evaluation.pop("loss"), "evaluation": evaluation}
    shutil.rmtree(FIXTURES / "export", ignore_errors=True)
    assert main(["export", "finished", "--output", str(FIXTURES / "export"), "--seed-index", "1"]) == 0
    program = jax.export.deserialize(bytearray((FIXTURES / "export" / "model.jaxexport").read_bytes()))
    selected["probabilities"] = program.call(images)
    save_variables(FIXTURES / "selected.safetensors", selected)
    return expected


def make_heads():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((8, 6)).astype(np.float32)
    described, arrays = {}, {"features": features}
    for case, (name, attributes) in HEADS.items():
        described[case] = {"class": name, "attributes": {"num_classes": 4, **attributes}}
        head = getattr(heads, name)(num_classes=4, **attributes)
        init = head.init(jax.random.key(INIT_KEY), features, train=False)
        # Norms that have learnt nothing are 1/0/0/1 and would hide what is swapped.
        variables = jax.tree.map(lambda leaf: rng.uniform(0.2, 1.0, leaf.shape).astype(leaf.dtype), init)
        variables["params"] = jax.tree.map(lambda leaf: leaf - 0.5, variables["params"])
        forms = {"init": init, "tree": variables}
        if name == "ProgressiveSpinalHead":
            stats = variables.get("batch_stats", {})
            forms["fused"] = {"params": fuse_params(variables["params"]), "batch_stats": stats}
            forms["packed"] = {"params": pack_params(variables["params"]), "batch_stats": pack_batch_stats(stats)}
        rngs = {"dropout": jax.random.key(DROPOUT_KEY)}
        logits, new = head.apply(variables, features, train=True, rngs=rngs, mutable=["batch_stats"])
        outputs = {"eval": head.apply(variables, features, train=False), "train": logits, "new": dict(new)}
        arrays[case] = {**forms, "outputs": outputs}
    save_variables(FIXTURES / "heads.safetensors", arrays)
    return described


def make_backbones():
    """Names, shapes and dtypes: the arrays themselves are big."""
    head = heads.ProgressiveSpinalHead(10, 4)
    models = {
        "vgg5": (Classifier(head, VGG5()), (2, 28, 28, 1), lambda zeros: classifier_state_dict(zeros, "vgg5")),
        "resnet18": (ResNet("resnet18"), (2, 64, 64, 3), lambda zeros: resnet_state_dict(zeros, "resnet18")),
    }
    described = {}
    for name, (model, shape, state_dict) in models.items():
        inputs = jax.ShapeDtypeStruct(shape, jnp.float32)
        tree = jax.eval_shape(lambda x, model=model: model.init(jax.random.key(0), x, train=False), inputs)
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)
        described[name] = {
            "variables": {key: [*leaf.shape, str(leaf.dtype)] for key, leaf in flatten_dict(tree, sep="/").items()},
            "state_dict": {key: [*leaf.shape, str(leaf.dtype)] for key, leaf in state_dict(zeros).items()},
        }
    return described


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)  # as the test does
    FIXTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
        os.chdir(folder)
        images = write_data()
        shutil.copy("digits.npz", FIXTURES)
        described = {"commit": commit, "machine": machine()}
        described |= {"runs": make_runs(images), "heads": make_heads(), "backbones": make_backbones()}
    (FIXTURES / "expected.json").write_text(json.dumps(described, indent=1) + "\n")
