"""What oneDNN's convolutions do to trained accuracy: the recipe kmnist (VGG-5) with them and without, same seeds.

python results/onednn_accuracy.py mnist.npz kmnist.npz [--train 1500 --test 2000 --epochs 4 --seeds 3]

Each run trains on the first images of the file, in batches of 32 so that few images make enough steps, and is tested on
its first test images; nothing is selected. A line a data set and dtype: mean and standard deviation over the seeds, and
the seeds' differences (oneDNN less default).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from pspinal_jax.environment import convolution_options, processor


def accuracies(data: Path, given: argparse.Namespace, dtype: str, switch: str) -> np.ndarray:
    """Test accuracy of every seed, in percent."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pspinal_jax", "train", "kmnist", "--data.path", str(data), "--dtype", dtype]
        command += ["--data.num-validation", "0", "--batch-size", "32"]
        command += ["--epochs", str(given.epochs), "--num-seeds", str(given.seeds)]
        environment = os.environ | {"PSPINAL_JAX_ONEDNN": switch}
        subprocess.run([*command, "--workdir", folder + "/run"], check=True, capture_output=True, env=environment)
        run = Path(folder) / "run"
        used = json.loads((run / "config.json").read_text())["compiler_options"]
        if bool(used) != (switch == "on"):
            raise SystemExit(f"PSPINAL_JAX_ONEDNN={switch}, but the programs were compiled with {used}")
        return 100 * np.asarray(json.loads((run / "result.json").read_text())["test_accuracy"]["each"])


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+")
    for name, value in (("train", 1500), ("test", 2000), ("epochs", 4), ("seeds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    if not convolution_options(jax.default_backend()):
        raise SystemExit(f"jax {jax.__version__} has no convolutions of oneDNN here, expected JAX 0.12 or newer on CPU")
    print(f"jax {jax.__version__}, {processor()}, {given.train} images, {given.epochs} epochs, {given.seeds} seeds")
    for path in given.data:
        with tempfile.TemporaryDirectory() as folder, np.load(path) as arrays:
            part = Path(folder) / path.name
            counts = {name: given.test if "test" in name else given.train for name in arrays}
            np.savez(part, **{name: arrays[name][:count] for name, count in counts.items()})
            for dtype in ("float32", "bfloat16"):
                found = {switch: accuracies(part, given, dtype, switch) for switch in ("on", "off")}
                said = [f"{values.mean():.2f} ± {values.std(ddof=1):.2f}" for values in found.values()]
                differences = ", ".join(f"{value:+.2f}" for value in found["on"] - found["off"])
                print(f"{path.stem:8} {dtype:9} oneDNN {said[0]}, default {said[1]}; {differences}", flush=True)


if __name__ == "__main__":
    main()
