"""`benchmark head` and `benchmark depth`: the head alone, forward and backward, in training mode."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pspinal_jax.benchmark.timing import (
    EAGER,
    Case,
    Entry,
    Precision,
    Settings,
    Work,
    beyond,
    calls,
    has_torch,
    layer_dtype,
    looped,
    timed,
    torch_device,
    torch_modes,
)
from pspinal_jax.errors import RunError
from pspinal_jax.heads import ProgressiveSpinalHead
from pspinal_jax.heads.layouts import NATIVE_LAYOUT, Computed, Layout, convert_params
from pspinal_jax.training.examples import check_at_least

IMPLEMENTATIONS: tuple[Computed, ...] = ("fused", "unrolled", "scan")
AT_DEPTH: dict[str, tuple[Computed, Layout, int]] = {
    "unrolled": ("unrolled", "tree", 256),
    "fused, fused parameters": ("fused", "fused", 64),
    "scan, documented tree": ("scan", "tree", 1024),
    "scan, packed parameters": ("scan", "packed", 1024),
}
"""Implementation, layout and most layers: the fused layout is made in L^2 pieces, and 'auto' leaves it at 64."""
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
        params = self._params(implementation, layout)

        def body(index: jax.Array, carry: Any) -> Any:
            params, keys, features, _ = carry
            grads, grad_features = gradient(params, features, keys[index % 64])
            # The next pass depends on this one, so that none can be left out.
            return params, keys, features + 1e-12 * grad_features, grads

        keys = jax.random.split(jax.random.key(0), 64)
        return looped(body, (params, keys, jnp.asarray(self.features), jax.tree.map(jnp.zeros_like, params)))

    def by_call(self, implementation: Computed, layout: Layout | None = None) -> Work:
        """The same passes, each a jitted call from Python."""
        gradient = jax.jit(self.gradient(implementation, _DROPOUT_RATE))
        return calls(gradient, self._params(implementation, layout), jnp.asarray(self.features), jax.random.key(0))

    def _params(self, implementation: Computed, layout: Layout | None) -> Any:
        return jax.jit(lambda tree: convert_params(tree, layout or NATIVE_LAYOUT[implementation]))(self.params)

    def op_by_op(self) -> Work:
        """The same passes without compilation: every operation a call of its own."""
        gradient = self.gradient("unrolled", _DROPOUT_RATE)
        arguments = (self.params, jnp.asarray(self.features), jax.random.key(0))

        def work(count: int) -> None:
            with jax.disable_jit():
                calls(gradient, *arguments)(count)

        return work


def head(
    settings: Settings,
    num_features: int | None = None,
    layer_width: int | None = None,
    num_layers: int | None = None,
    num_classes: int | None = None,
    batch_size: int | None = None,
) -> list[Case]:
    """The head beside PyTorch's, at several sizes or at the given ones, of which the first shape has the others."""
    given = dict(zip(Shape._fields, (num_features, layer_width, num_layers, num_classes, batch_size), strict=True))
    asked = {name: value for name, value in given.items() if value is not None}
    check_at_least(1, **asked)
    shapes = (SHAPES[0]._replace(**asked),) if asked else SHAPES

    def case(shape: Shape, precision: Precision, quick: bool) -> Entry:
        gradient = HeadGradient(shape, jnp.dtype(layer_dtype(precision)))
        work = alternatives(gradient, settings.quick) | torch_alternatives(gradient, torch_modes(quick))
        return timed(f"{shape}, {precision}", work, shape.flops, precision, settings, examples=shape.batch_size)

    sizes = [(shape, precision) for shape in shapes for precision in settings.precisions]
    cases = [
        Case(f"{shape}, {precision}", partial(case, shape, precision, False), precision) for shape, precision in sizes
    ]
    smallest = min(shapes, key=lambda shape: shape.flops)
    check = [Case("same gradients", lambda: check_equal(HeadGradient(smallest)))] * has_torch()
    if not settings.quick:
        return check + cases
    first = Case(f"{cases[0].name}, the first forms", partial(case, *sizes[0], True), sizes[0][1])
    return [*check, first, *(beyond(each, 4) for each in cases)]


def alternatives(head: HeadGradient, quick: bool = False) -> dict[str, Work]:
    """Our alternatives, by name; the first is what the others are compared with, and `quick` are only a few."""
    work = {f"{name}, compiled loop": head.in_loop(name) for name in IMPLEMENTATIONS[: 2 if quick else None]}
    work["fused, call by call"] = head.by_call("fused")
    if not quick:
        work["fused from the documented tree"] = head.in_loop("fused", "tree")
        work["unrolled, op by op"] = head.op_by_op()
    return work


def torch_alternatives(head: HeadGradient, modes: Sequence[str] = (EAGER,)) -> dict[str, Work]:
    """PyTorch in each of `modes` on the same arrays.

    Raises:
      ImportError: if torch is not installed.
    """
    if not modes:
        return {}
    import torch

    from pspinal_jax.benchmark.torch_reference import load_head, repeated, training_step

    device, dtype = torch_device(), torch.bfloat16 if head.dtype == jnp.bfloat16 else torch.float32
    weights = torch.from_numpy(head.weights).to(device)

    def work(mode: str) -> Work:
        features = torch.from_numpy(head.features).to(device, dtype).requires_grad_()
        model = load_head(head.params, _DROPOUT_RATE).to(device, dtype)
        # The features take part as a parameter does: both gradients are computed in full, and cleared.
        leaves = torch.optim.SGD([features, *model.parameters()])
        loss_of: Any = lambda features: (model(features).float() * weights).sum()  # noqa: E731
        return repeated(training_step(mode, loss_of, leaves.zero_grad, lambda: None), lambda _: features)

    return {mode: work(mode) for mode in modes}


def check_equal(head: HeadGradient) -> None:
    """In float64 and without dropout, every implementation's gradients must be PyTorch's.

    (In float32 rounding puts a few pre-activations on the other side of ReLU's kink.)

    Raises:
      ImportError: if torch is not installed.
      RunError: if they are not: the timings would compare different work.
    """
    import torch

    from pspinal_jax.benchmark.torch_reference import load_head

    model = load_head(head.params, 0.0).double()
    features = torch.from_numpy(head.features).double().requires_grad_()
    (model(features) * torch.from_numpy(head.weights)).sum().backward()
    expected = {"features": features.grad, "output": model.output.weight.grad.T}
    expected |= {f"layer_{index + 1}": layer.weight.grad.T for index, layer in enumerate(model.layers)}
    with jax.enable_x64(True):
        exact = HeadGradient(head.shape, jnp.float64)
        inputs = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (head.params, head.features))
        for implementation in IMPLEMENTATIONS:
            grads, found = jax.jit(exact.gradient(implementation, 0.0))(*inputs, jax.random.key(0))
            for name, value in ({"features": found} | {name: layer["kernel"] for name, layer in grads.items()}).items():
                difference = float(np.abs(expected[name].numpy() - value).max() / np.abs(value).max())
                if not difference <= _TOLERANCE:
                    raise RunError(
                        f"benchmark: {implementation}'s gradient of {name} differs from PyTorch's by {difference:.1e}"
                    )


def depth(settings: Settings, depths: Sequence[int] = ()) -> list[Case]:
    """The head's gradient by number of layers: the first call, which compiles, and later ones."""

    def case(layers: int) -> Entry:
        jax.config.update("jax_enable_compilation_cache", False)  # of this process, which measures nothing else
        shape = Shape(256, 16, layers, 10, 64)
        head = HeadGradient(shape)
        work = {
            name: head.by_call(how, layout) for name, (how, layout, deepest) in AT_DEPTH.items() if layers <= deepest
        }
        work |= torch_alternatives(head, torch_modes(quick=True))
        title, rounds = f"gradient of the head, {shape}, float32", 1 if settings.quick else settings.rounds
        entry = timed(title, work, shape.flops, "float32", settings, examples=shape.batch_size, rounds=rounds)
        first = {name: [timing["first_call"]] for name, timing in entry["alternatives"].items()}
        return entry | {"bars": entry["bars"] | {"s of the first call": first}}

    cases = [Case(f"{layers} layers", partial(case, layers)) for layers in depths or settings.depths]
    return [cases[0], *(beyond(each, 3) for each in cases[1:])]
