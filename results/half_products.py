"""bfloat16 against float32 on CPU: the head, forward and backward, dropout on, at the sizes of docs/performance.md.

python results/half_products.py [--rounds 15]    # both dtypes in turn; medians in milliseconds, and their ratio
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from pspinal_jax import ProgressiveSpinalHead
from pspinal_jax.heads.fused import fuse_params

SIZES = [
    (784, 128, 4, 10, 64),
    (256, 64, 4, 10, 64),
    (2048, 200, 4, 101, 16),
    (2048, 1024, 4, 250, 16),
    (2048, 1024, 4, 250, 128),
]
SECONDS = 0.1
"""About how long each timing takes."""


def make_pass(size: tuple[int, ...], dtype: object) -> object:
    """A function that runs one pass and waits for it; compiled and run once already."""
    num_features, width, num_layers, num_classes, rows = size
    implementation = "fused" if rows >= 32 else "unrolled"  # as `auto` trains
    head = ProgressiveSpinalHead(num_classes, width, num_layers=num_layers, implementation=implementation, dtype=dtype)
    features = jnp.asarray(np.random.default_rng(0).normal(size=(rows, num_features)), jnp.float32)
    tree = ProgressiveSpinalHead(num_classes, width, num_layers=num_layers)
    params = tree.init(jax.random.key(0), features, train=False)["params"]
    params = fuse_params(params) if implementation == "fused" else params

    def loss(params: object, features: jax.Array, key: jax.Array) -> jax.Array:
        logits = head.apply({"params": params}, features, train=True, rngs={"dropout": key})
        return jnp.sum(logits.astype(jnp.float32) ** 2)

    gradient, key = jax.jit(jax.grad(loss, (0, 1))), jax.random.key(1)

    def run() -> None:
        jax.block_until_ready(gradient(params, features, key))

    run()
    return run


def seconds(run: object, count: int) -> float:
    """Of one pass, over `count` of them."""
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print(f"jax {jax.__version__} on {jax.devices()[0].platform}")
    for size in SIZES:
        passes = [make_pass(size, dtype) for dtype in (jnp.float32, jnp.bfloat16)]
        count = max(1, round(SECONDS / seconds(passes[0], 3)))
        times = [[seconds(run, count) for run in passes] for _ in range(rounds)]
        single, half = (1000 * statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(one / other for one, other in times)
        print(f"{size}: float32 {single:.2f} ms, bfloat16 {half:.2f} ms, {ratio:.2f} times float32's speed", flush=True)


if __name__ == "__main__":
    main()
