"""What pspinal_jax/layers does by hand, against plain JAX: forward and gradients inside a compiled loop, in turn.

python results/workarounds.py [--rounds 7]    # a line a case: milliseconds and how many times faster ours is

Each case is timed as programs with convolutions are compiled here (oneDNN's convolutions from JAX 0.12 on, on CPU) and,
where that differs, without those options (`PSPINAL_JAX_ONEDNN=off`). The loop is the training loop's fori_loop.
"""

import argparse
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pspinal_jax.benchmark.timing import ratio, time_interleaved
from pspinal_jax.environment import convolution_options, jit_with, processor
from pspinal_jax.layers.conv import conv_same
from pspinal_jax.layers.depthwise import depthwise_conv
from pspinal_jax.layers.dropout import dropout_scale
from pspinal_jax.layers.norm import EPSILON, batch_statistics, norm_relu, normalize
from pspinal_jax.layers.pooling import max_pool_2x2, max_pool_3x3

Function = Callable[..., jax.Array]
LAYOUT = ("NHWC", "HWIO", "NHWC")


def plain_conv(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution of lax, whose gradients are autodiff's."""
    return lax.conv_general_dilated(inputs, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)


def plain_depthwise(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution of lax with a group a channel."""
    groups = inputs.shape[-1]
    return lax.conv_general_dilated(
        inputs, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT, feature_group_count=groups
    )


def plain_norm_relu(inputs: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """The same expression, differentiated by JAX."""
    mean, variance = batch_statistics(inputs)
    return nn.relu(normalize(inputs, mean, variance, scale, bias, EPSILON))


def our_dropout(inputs: jax.Array) -> jax.Array:
    """Our mask, of a key that is another in every step."""
    return inputs * dropout_scale(_key(inputs), 0, 0.2, inputs.shape, inputs.dtype)  # type: ignore[arg-type]


def plain_dropout(inputs: jax.Array) -> jax.Array:
    """flax.linen's."""
    return nn.Dropout(0.2, deterministic=False).apply({}, inputs, rngs={"dropout": _key(inputs)})


def _key(inputs: jax.Array) -> jax.Array:
    return jax.random.key(lax.bitcast_convert_type(inputs[0, 0], jnp.uint32))


CASES: dict[str, tuple[Function, Function, tuple[tuple[int, ...], ...]]] = {
    "conv 3x3, 28x28x64": (conv_same, plain_conv, ((16, 28, 28, 64), (3, 3, 64, 64))),
    "conv 3x3, 14x14x128": (conv_same, plain_conv, ((16, 14, 14, 128), (3, 3, 128, 128))),
    "conv 3x3, 3x3x256": (conv_same, plain_conv, ((64, 3, 3, 256), (3, 3, 256, 256))),
    "conv 3x3 on 1x1x512": (conv_same, plain_conv, ((16, 1, 1, 512), (3, 3, 512, 512))),
    "conv 1x1, 28x28x128 to 512": (conv_same, plain_conv, ((8, 28, 28, 128), (1, 1, 128, 512))),
    "depthwise 3x3, 28x28x144": (depthwise_conv, plain_depthwise, ((2, 28, 28, 144), (3, 3, 1, 144))),
    "depthwise 5x5, 14x14x480": (depthwise_conv, plain_depthwise, ((2, 14, 14, 480), (5, 5, 1, 480))),
    "max pool 2x2, 28x28x64": (max_pool_2x2, lambda x: nn.max_pool(x, (2, 2), (2, 2)), ((64, 28, 28, 64),)),
    "max pool 3x3, 112x112x64": (
        max_pool_3x3,
        lambda x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))),
        ((8, 112, 112, 64),),
    ),
    "batch norm + ReLU, 28x28x64": (
        lambda *operands: norm_relu(*operands)[0],
        plain_norm_relu,
        ((64, 28, 28, 64), (64,), (64,)),
    ),
    "dropout, 64x784": (our_dropout, plain_dropout, ((64, 784),)),
}


def looped(
    function: Function, shapes: tuple[tuple[int, ...], ...], options: dict[str, bool | str]
) -> Callable[..., None]:
    """So many steps, each of which moves all operands along their gradients."""
    rng = np.random.default_rng(0)
    operands = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    weights = jnp.asarray(rng.normal(size=jax.eval_shape(function, *operands).shape), jnp.float32)

    def step(operands: list[jax.Array], weights: jax.Array) -> list[jax.Array]:
        _, gradients = jax.value_and_grad(lambda given: jnp.sum(function(*given) * weights))(operands)
        return [operand - 1e-6 * gradient for operand, gradient in zip(operands, gradients, strict=True)]

    def steps(count: jax.Array, operands: list[jax.Array], weights: jax.Array) -> list[jax.Array]:
        return lax.fori_loop(0, count, lambda _, current: step(current, weights), operands)

    program = jit_with(options, steps)
    return lambda count: jax.block_until_ready(program(np.int32(count), operands, weights))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds-per-round", type=float, default=0.2)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    given = parser.parse_args()
    ours = convolution_options(jax.default_backend())
    print(f"jax {jax.__version__}, {processor()}, float32, milliseconds: ours, plain JAX, ours is faster by (95 %)")
    for name, (by_hand, plain, shapes) in CASES.items():
        for kind, options in {"oneDNN": ours, "XLA": {}}.items():
            if given.only not in name or (kind == "oneDNN" and not ours):
                continue
            work = {key: looped(each, shapes, options) for key, each in (("ours", by_hand), ("plain", plain))}
            timings = time_interleaved(work, rounds=given.rounds, seconds_per_round=given.seconds_per_round)
            milliseconds = [1e3 * float(np.median(timings[key].seconds)) for key in ("ours", "plain")]
            gain = ratio(timings["plain"], timings["ours"])
            low, high = gain["interval_95"]
            times = f"{milliseconds[0]:9.3f} {milliseconds[1]:9.3f}"
            print(f"{name:28} {kind:7} {times} {gain['median']:6.2f} ({low:.2f} .. {high:.2f})", flush=True)


if __name__ == "__main__":
    main()
