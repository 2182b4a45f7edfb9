"""What oneDNN's convolutions do to trained accuracy: the recipe kmnist (VGG-5) with them and without, same seeds.

python results/onednn_accuracy.py mnist.npz kmnist.npz [--train 600 --test 1000 --epochs 4 --seeds 3 --first-seed 0]
    [--dtypes float32 bfloat16]

Each run trains on the first images of the file, in batches of 16 so that few images make enough steps, and is tested on
its first test images; nothing is selected. First come errors against float64, of a convolution, its inputs' and its
kernel's gradient; then a line a data set and dtype: mean and standard deviation over the seeds, the seeds'
differences (oneDNN less default), and the 95 % interval of their mean by Student's t.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from pspinal_jax.environment import convolution_options, jit_with, processor
from pspinal_jax.layers.conv import conv_same


def accuracies(data: Path, given: argparse.Namespace, dtype: str, switch: str) -> np.ndarray:
    """Test accuracy of every seed, in percent."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pspinal_jax", "train", "kmnist", "--data.path", str(data), "--dtype", dtype]
        command += ["--data.num-validation", "0", "--batch-size", "16"]
        command += ["--epochs", str(given.epochs), "--seed", str(given.first_seed)]
        command += ["--num-seeds", str(given.seeds)]
        environment = os.environ | {"PSPINAL_JAX_ONEDNN": switch}
        subprocess.run([*command, "--workdir", folder + "/run"], check=True, capture_output=True, env=environment)
        run = Path(folder) / "run"
        used = json.loads((run / "config.json").read_text())["compiler_options"]
        if bool(used) != (switch == "on"):
            raise SystemExit(f"PSPINAL_JAX_ONEDNN={switch}, but the programs were compiled with {used}")
        return 100 * np.asarray(json.loads((run / "result.json").read_text())["test_accuracy"]["each"])


def rounding(side: int, channels: int, options: dict[str, bool | str]) -> str:
    """Errors of a convolution, its inputs' and its kernel's gradient in float32, as parts of float64's (RMS)."""
    rng = np.random.default_rng(0)
    maps, kernel = (16, side, side, channels), (3, 3, channels, channels)
    operands = [rng.normal(size=shape) for shape in (maps, kernel, maps)]

    def results(inputs: jax.Array, kernel: jax.Array, grad: jax.Array) -> tuple[jax.Array, ...]:
        outputs, pullback = jax.vjp(conv_same, inputs, kernel)
        return outputs, *pullback(grad)

    with jax.enable_x64(True):
        exact = [np.asarray(value) for value in jax.jit(results)(*map(jnp.asarray, operands))]
    given = jit_with(options, results)(*(jnp.asarray(operand, jnp.float32) for operand in operands))
    errors = [
        np.sqrt(np.mean((value - true) ** 2) / np.mean(true**2)) for value, true in zip(given, exact, strict=True)
    ]
    return ", ".join(f"{error:.1e}" for error in errors)


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+")
    for name, value in (("train", 600), ("test", 1000), ("epochs", 4), ("seeds", 3), ("first-seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    given = parser.parse_args()
    if not convolution_options(jax.default_backend()):
        raise SystemExit(f"jax {jax.__version__} has no convolutions of oneDNN here, expected JAX 0.12 or newer on CPU")
    print(f"jax {jax.__version__}, {processor()}, {given.train} images, {given.epochs} epochs, {given.seeds} seeds")
    for side, channels in ((28, 64), (14, 128), (7, 256), (3, 256)):
        library, default = (rounding(side, channels, options) for options in (convolution_options("cpu"), {}))
        print(f"errors at {side}x{side}x{channels}: oneDNN {library}; default {default}")
    for path in given.data:
        with tempfile.TemporaryDirectory() as folder, np.load(path) as arrays:
            part = Path(folder) / path.name
            counts = {name: given.test if "test" in name else given.train for name in arrays}
            np.savez(part, **{name: arrays[name][:count] for name, count in counts.items()})
            for dtype in given.dtypes:
                found = {switch: accuracies(part, given, dtype, switch) for switch in ("on", "off")}
                said = [f"{values.mean():.2f} ± {values.std(ddof=1):.2f}" for values in found.values()]
                differences = found["on"] - found["off"]
                low, high = stats.t.interval(0.95, given.seeds - 1, differences.mean(), stats.sem(differences))
                each = ", ".join(f"{value:+.2f}" for value in differences)
                mean = f"{differences.mean():+.2f} ({low:+.2f} .. {high:+.2f})"
                print(f"{path.stem:8} {dtype:9} oneDNN {said[0]}, default {said[1]}; {each}; mean {mean}", flush=True)


if __name__ == "__main__":
    main()
