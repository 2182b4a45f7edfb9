"""`benchmark head`: forward and backward pass of the head alone, in training mode, beside PyTorch's."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pspinal_jax.benchmark.measurement import Case, Entry, Settings, checked, has_torch, in_precisions, timed
from pspinal_jax.benchmark.timing import Precision, Work, layer_dtype, set_precision
from pspinal_jax.errors import RunError
from pspinal_jax.heads import ProgressiveSpinalHead
from pspinal_jax.heads.layouts import NATIVE_LAYOUT, Computed, Layout, convert_params

IMPLEMENTATIONS: tuple[Computed, ...] = ("fused", "unrolled", "scan")
_DROPOUT_RATE = 0.2
_TOLERANCE = 1e-9


class Shape(NamedTuple):
    """Sizes of a head and its batch."""

    num_features: int
    layer_width: int
    num_layers: int
    num_classes: int
    batch_size: int

    def __str__(self) -> str:
        return f"D {self[0]}, W {self[1]}, L {self[2]}, C {self[3]}, batch {self[4]}"

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products, forward and backward: three products per kernel.

        Layer 1 does read x, and x takes part in the backward pass, as on top of a backbone.
        """
        d, w, layers, classes, batch = self
        entries = sum((d + i * w) * w for i in range(layers)) + (d + layers * w) * classes
        return 6 * batch * entries


SHAPES = (
    Shape(784, 128, 4, 10, 64),
    Shape(256, 64, 4, 10, 64),
    Shape(2048, 200, 4, 101, 16),
    Shape(2048, 1024, 4, 250, 16),
    Shape(2048, 1024, 4, 250, 128),
)


class HeadGradient:
    """The gradient of a head of one shape, by each of our implementations, and the arrays that it is taken on."""

    def __init__(self, shape: Shape, dtype: Any = jnp.float32) -> None:
        self.shape = shape
        self.dtype = dtype
        rng = np.random.default_rng(0)
        self.features = rng.standard_normal((shape.batch_size, shape.num_features)).astype(np.float32)
        self.weights = rng.standard_normal((shape.batch_size, shape.num_classes)).astype(np.float32)
        head = self.head("unrolled", 0.0)
        self.params = jax.jit(lambda: head.init(jax.random.key(0), self.features, train=False))()["params"]

    def head(self, implementation: Computed, dropout_rate: float) -> ProgressiveSpinalHead:
        """The head of this shape."""
        return ProgressiveSpinalHead(
            self.shape.num_classes,
            self.shape.layer_width,
            self.shape.num_layers,
            dropout_rate=dropout_rate,
            implementation=implementation,
            dtype=self.dtype,
        )

    def gradient(self, implementation: Computed, dropout_rate: float) -> Callable[..., Any]:
        """(params in the implementation's own layout, features, key) -> gradients of both."""
        head = self.head(implementation, dropout_rate)

        def loss(params: Any, features: jax.Array, key: jax.Array) -> jax.Array:
            logits: Any = head.apply({"params": params}, features, train=True, rngs={"dropout": key})
            return jnp.sum(logits.astype(jnp.float32) * self.weights)

        return jax.grad(loss, (0, 1))

    def in_loop(self, implementation: Computed, layout: Layout | None = None) -> Work:
        """So many passes in one compiled loop, as inside a training epoch; every gradient is computed in full.

        Args:
          implementation: which.
          layout: of parameters and gradients; None for the implementation's own.
        """
        gradient = self.gradient(implementation, _DROPOUT_RATE)
        params = jax.jit(lambda tree: convert_params(tree, layout or NATIVE_LAYOUT[implementation]))(self.params)

        @jax.jit
        def run(params: Any, features: jax.Array, count: jax.Array) -> Any:
            keys = jax.random.split(jax.random.key(0), 64)

            def body(index: jax.Array, carry: Any) -> Any:
                features, _ = carry
                grads, grad_features = gradient(params, features, keys[index % 64])
                # The next pass depends on this one, so that none can be left out.
                return features + 1e-12 * grad_features, grads

            return lax.fori_loop(0, count, body, (features, jax.tree.map(jnp.zeros_like, params)))

        features = jnp.asarray(self.features)
        return lambda count: jax.block_until_ready(run(params, features, np.int32(count)))

    def by_call(self, implementation: Computed) -> Work:
        """The same passes, each a jitted call from Python."""
        gradient = jax.jit(self.gradient(implementation, _DROPOUT_RATE))
        params = jax.jit(lambda tree: convert_params(tree, NATIVE_LAYOUT[implementation]))(self.params)
        key, features = jax.random.key(0), jnp.asarray(self.features)

        def work(count: int) -> None:
            result = None
            for _ in range(count):
                result = gradient(params, features, key)
            jax.block_until_ready(result)

        return work

    def op_by_op(self) -> Work:
        """The same passes without compilation: every operation a call of its own."""
        gradient = self.gradient("unrolled", _DROPOUT_RATE)
        key, features = jax.random.key(0), jnp.asarray(self.features)

        def work(count: int) -> None:
            with jax.disable_jit():
                for _ in range(count):
                    jax.block_until_ready(gradient(self.params, features, key))

        return work


def cases(settings: Settings, shapes: Sequence[Shape] = ()) -> list[Case]:
    """The head at several sizes, beside PyTorch's."""
    shapes = shapes or SHAPES

    def check() -> None:
        for shape in [min(shapes, key=lambda shape: shape.flops)] if settings.quick else shapes:
            check_equal(HeadGradient(shape))

    def case(shape: Shape, precision: Precision) -> list[Entry]:
        head = HeadGradient(shape, jnp.dtype(layer_dtype(precision)))
        work = alternatives(head, settings.quick)
        if has_torch():
            work |= torch_alternatives(head)
        title, rows = f"{shape}, {precision}", shape.batch_size
        return [timed(title, work, shape.flops, precision, settings, examples=rows)]

    cases = [
        (f"{shape}, {name}", run)
        for shape in shapes
        for name, run in in_precisions(settings.precisions, partial(case, shape))
    ]
    return checked(check, cases) if has_torch() else cases


def alternatives(head: HeadGradient, quick: bool = False) -> dict[str, Work]:
    """Our alternatives, by name; the first is what the others are compared with, and `quick` are only a few."""
    if quick:
        loops = {f"{name}, compiled loop": head.in_loop(name) for name in IMPLEMENTATIONS[:2]}
        return loops | {"fused, call by call": head.by_call("fused")}
    return {f"{name}, compiled loop": head.in_loop(name) for name in IMPLEMENTATIONS} | {
        "fused from the documented tree": head.in_loop("fused", "tree"),
        "fused, call by call": head.by_call("fused"),
        "unrolled, op by op": head.op_by_op(),
    }


def torch_alternatives(head: HeadGradient) -> dict[str, Work]:
    """PyTorch in each of its modes on the same arrays.

    Raises:
      ImportError: if torch is not installed.
    """
    import torch

    from pspinal_jax.benchmark.torch_reference import MODES, load_head, repeated, torch_device

    device, dtype = torch_device(), torch.bfloat16 if head.dtype == jnp.bfloat16 else torch.float32
    weights = torch.from_numpy(head.weights).to(device)
    work: dict[str, Work] = {}
    for mode, make_step in MODES.items():
        features = torch.from_numpy(head.features).to(device, dtype).requires_grad_()
        model = load_head(head.params, _DROPOUT_RATE).to(device, dtype)
        # The features take part as a parameter does: both gradients are computed in full, and cleared.
        leaves = torch.optim.SGD([features, *model.parameters()])

        def loss_of(features: Any, model: Any = model) -> Any:
            return (model(features).float() * weights).sum()

        step = make_step(loss_of, leaves.zero_grad, lambda: None)
        work[mode] = repeated(step, lambda _, features=features: features)  # type: ignore[misc]
    return work


def check_equal(head: HeadGradient) -> None:
    """In float64 and without dropout, every implementation's gradients must be PyTorch's.

    (In float32 rounding puts a few pre-activations on the other side of ReLU's kink.)

    Raises:
      ImportError: if torch is not installed.
      RunError: if they are not: the timings would compare different work.
    """
    import torch

    from pspinal_jax.benchmark.torch_reference import load_head

    set_precision("float32")
    model = load_head(head.params, 0.0).double()
    features = torch.from_numpy(head.features).double().requires_grad_()
    (model(features) * torch.from_numpy(head.weights)).sum().backward()
    theirs = {"features": features.grad, "output": model.output.weight.grad.T}
    theirs |= {f"layer_{index + 1}": layer.weight.grad.T for index, layer in enumerate(model.layers)}
    with jax.enable_x64(True):
        exact = HeadGradient(head.shape, jnp.float64)
        inputs = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (head.params, head.features))
        for implementation in IMPLEMENTATIONS:
            gradient = jax.jit(exact.gradient(implementation, 0.0))
            grads, grad_features = gradient(*inputs, jax.random.key(0))
            ours = {"features": grad_features} | {name: layer["kernel"] for name, layer in grads.items()}
            for name, expected in theirs.items():
                difference = float(np.abs(expected.numpy() - ours[name]).max() / np.abs(ours[name]).max())
                if not difference <= _TOLERANCE:
                    raise RunError(
                        f"benchmark: {implementation}'s gradient of {name} differs from PyTorch's by {difference:.1e}"
                    )
