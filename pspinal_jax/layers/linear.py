"""Linear layers: declaring their variables (and their batch norm's) in linen's collections, checks of arguments, and
where hand-written gradients lie.

The default initialisation is torch.nn.Linear's, on which the published scripts rely.
"""

import numbers
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pspinal_jax.layers.norm import statistics_dtype

Initializer = jax.nn.initializers.Initializer
Activation = Callable[[jax.Array], jax.Array]
Norm = Literal["batch", "none"] | None
Tree = dict[str, Any]
"""A nested dict of arrays, as in linen's variable collections."""


def torch_linear_init(fan_in: int) -> Initializer:
    """Uniform in ±1/sqrt(fan_in), for the kernel and the bias alike (SpinalNet scripts; torch.nn.Linear).

    Args:
      fan_in: number of inputs of the linear layer, at least 1.

    Returns:
      An initializer ``(key, shape, dtype) -> array``.
    """
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: Any, dtype: Any = None, out_sharding: Any = None) -> jax.Array:
        values = jax.random.uniform(key, shape, dtype or jnp.float32, -bound, bound)
        return values if out_sharding is None else jax.lax.with_sharding_constraint(values, out_sharding)

    return init


class NormVariables(nn.Module):
    """scale, bias [W] in ``params`` and mean, var [W] in ``batch_stats``, float32 or wider."""

    width: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> tuple[Tree, dict[str, nn.Variable]]:
        """The two parameters, and the two variables of the running statistics."""
        shape = (self.width,)
        params = {
            "scale": self.param("scale", nn.initializers.ones, shape, self.param_dtype),
            "bias": self.param("bias", nn.initializers.zeros, shape, self.param_dtype),
        }
        dtype = statistics_dtype(self.param_dtype)
        running = {
            "mean": self.variable("batch_stats", "mean", jnp.zeros, shape, dtype),
            "var": self.variable("batch_stats", "var", jnp.ones, shape, dtype),
        }
        return params, running


class Linear(NamedTuple):
    """What makes a linear layer's variables, apart from its fan-in."""

    width: int
    batch_norm: bool = False
    param_dtype: Any = jnp.float32
    kernel_init: Initializer | None = None
    bias_init: Initializer | None = None


def declare_linear(module: nn.Module, fan_in: int, linear: Linear) -> tuple[Tree, dict[str, nn.Variable]]:
    """Declare kernel [fan_in, width], bias [width] and, with batch norm, `norm`, in a compact method of `module`.

    Returns:
      The parameters as a dict, and the variables of the running statistics (empty without norm).
    """
    default = torch_linear_init(fan_in)
    shape = (fan_in, linear.width)
    params: Tree = {
        "kernel": module.param("kernel", linear.kernel_init or default, shape, linear.param_dtype),
        "bias": module.param("bias", linear.bias_init or default, shape[1:], linear.param_dtype),
    }
    running: dict[str, nn.Variable] = {}
    if linear.batch_norm:
        params["norm"], running = NormVariables(linear.width, linear.param_dtype, name="norm")()
    return params, running


class LinearVariables(nn.Module):
    """The variables of a linear layer, declared but not applied."""

    fan_in: int
    linear: Linear

    @nn.compact
    def __call__(self) -> tuple[Tree, dict[str, nn.Variable]]:
        """Declare the variables and return them: parameters, and running statistics of batch norm."""
        return declare_linear(self, self.fan_in, self.linear)


def check_floating(name: str, array: Any, advice: str) -> None:
    """Raise TypeError unless `array` is a floating-point array."""
    if not hasattr(array, "dtype") or not jnp.issubdtype(array.dtype, jnp.floating):
        kind = getattr(array, "dtype", type(array).__name__)
        raise TypeError(f"{name} must be a floating-point array, got {kind}; {advice}")


def check_images(images: Any, name: str, min_side: int) -> None:
    """Raise TypeError or ValueError unless `images` are floating-point [N, H, W, 3] with sides of `min_side` or more.

    Args:
      images: what a backbone is given.
      name: of the backbone.
      min_side: its smallest side.
    """
    check_floating("images", images, "normalise them first")
    if images.ndim != 4 or images.shape[3] != 3 or min(images.shape[1:3]) < min_side:
        expected = f"[N, H, W, 3] with H and W at least {min_side}"
        raise ValueError(f"{name} takes images of shape {expected}, got {images.shape}")


def as_rows(features: jax.Array, dtype: Any, param_dtype: Any) -> jax.Array:
    """`features` [..., D] as rows [N, D] of the dtype to compute in.

    Args:
      features: floating-point array [..., D].
      dtype: that dtype, or None for the wider of the features' and `param_dtype`.
      param_dtype: dtype of the parameters.

    Raises:
      TypeError: if `features` is not a floating-point array.
      ValueError: if it has no last axis, or an empty one.
    """
    check_floating("features", features, "convert it, e.g. images.astype('float32') / 255")
    if features.ndim < 1 or features.shape[-1] < 1:
        raise ValueError(f"features must have shape [..., D] with D >= 1, got {features.shape}")
    features = jnp.asarray(features)  # NumPy's float64 becomes what JAX computes in
    if dtype is None:
        dtype = jnp.promote_types(features.dtype, param_dtype)
    return features.reshape(-1, features.shape[-1]).astype(dtype)


def relu(values: jax.Array) -> jax.Array:
    """max(x, 0), as `jax.nn.relu`, which cannot be pickled."""
    return jax.nn.relu(values)


def check_head(head: Any) -> None:
    """Raise ValueError for the first attribute of a linen head that is outside its range; its norm 'none' becomes None.

    Rates are probabilities below 1, and `dropout_rate` may be a scalar array, which is taken as it is.
    """
    for name in ("num_classes", "layer_width", "num_layers"):
        value = getattr(head, name, 1)
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    for name in ("dropout_rate", "layer_dropout_rate"):
        rate, arrays = getattr(head, name, 0.0), name == "dropout_rate"
        if isinstance(rate, jax.Array):
            if not arrays or rate.ndim or not jnp.issubdtype(rate.dtype, jnp.floating):
                expected = "a number or a floating-point array of no axes" if arrays else "a number"
                raise ValueError(f"{name} must be {expected}, got an array {rate.dtype}{list(rate.shape)}")
        elif not 0.0 <= rate < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {rate!r}")
    if hasattr(head, "norm"):
        check_choice("norm", head.norm, (None, "none", "batch"))
        head.norm = None if head.norm == "none" else head.norm
        if not callable(head.activation):
            raise ValueError(f"activation must be a function of an array, as jax.nn.relu is, got {head.activation!r}")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def product(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    """``inputs [N, I] @ kernel [I, O]`` in the inputs' dtype, to which the kernel is cast.

    XLA's CPU compiler is slow at products whose result has 16 bits and fast at the same product in float32, so there
    those are computed so and rounded, forward and in both gradients (reverse-mode derivatives only, then).
    """
    if inputs.dtype not in (jnp.bfloat16, jnp.float16):
        return inputs @ kernel.astype(inputs.dtype)
    return _half_product(kernel.dtype, inputs, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _half_product(kernel_dtype: Any, inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    return _contract(1, 0, inputs, kernel.astype(inputs.dtype))


def _half_product_fwd(
    kernel_dtype: Any, inputs: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    kernel = kernel.astype(inputs.dtype)
    return _contract(1, 0, inputs, kernel), (inputs, kernel)


def _half_product_bwd(
    kernel_dtype: Any, residuals: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    inputs, kernel = residuals
    inputs_grad = _contract(1, 1, grad, kernel)
    # Parameters of float32 get the sums as they are: rounded in between, they would cost two passes over memory.
    kernel_grad = _contract(0, 0, inputs, grad, kernel_dtype, explicit_sharding(kernel))
    return summed_as(inputs_grad, inputs), summed_as(kernel_grad, kernel)


_half_product.defvjp(_half_product_fwd, _half_product_bwd)


def _contract(
    left_axis: int,
    right_axis: int,
    left: jax.Array,
    right: jax.Array,
    dtype: Any = None,
    sharding: NamedSharding | None = None,
) -> jax.Array:
    """The product of two matrices of one dtype over these axes, as `dtype` (by default theirs)."""
    dtype = dtype or left.dtype

    def multiply(left: jax.Array, right: jax.Array, *, result: Any) -> jax.Array:
        axes = (((left_axis,), (right_axis,)), ((), ()))
        product = lax.dot_general(left, right, axes, preferred_element_type=result, out_sharding=sharding)
        return product.astype(dtype)

    def wide(left: jax.Array, right: jax.Array) -> jax.Array:
        # Of a constant operand XLA 0.12 makes products that its CPU then has no code for.
        left, right = lax.optimization_barrier((left, right))
        if explicit_sharding(left) or explicit_sharding(right):  # nor has it code for some that vmap makes there
            left, right = left.astype(jnp.float32), right.astype(jnp.float32)
        return multiply(left, right, result=jnp.float32)

    return lax.platform_dependent(left, right, cpu=wide, default=partial(multiply, result=left.dtype))


def summed_as(grad: jax.Array, primal: jax.Array) -> jax.Array:
    """Inside shard_map, the gradient of what all devices hold alike is the sum over them, as autodiff makes it."""
    varying = _varying(grad) - _varying(primal)
    return lax.psum(grad, tuple(varying)) if varying else grad


def explicit_sharding(primal: jax.Array) -> NamedSharding | None:
    """Where the gradient of `primal` lies on a mesh of Explicit axes; None where the compiler decides."""
    sharding = jax.typeof(primal).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def joined(arrays: Sequence[jax.Array], axis: int) -> jax.Array:
    """jnp.concatenate, also where vmap maps some of the arrays over a mesh of Explicit axes and leaves others alone.

    JAX's rule for that expects those others on the mesh too (jax 0.12.0), where a choice of all their entries brings
    them. (So does reshard, but vmap has no rule for its gradient.)
    """
    meshes = [jax.typeof(array).sharding.mesh for array in arrays]
    explicit = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
    if explicit is not None:
        full = partial(lax.full, sharding=NamedSharding(explicit, PartitionSpec()))
        arrays = [
            lax.select(full(array.shape, True), array, full(array.shape, 0, array.dtype)) if mesh.empty else array
            for array, mesh in zip(arrays, meshes, strict=True)
        ]
    return jnp.concatenate(arrays, axis)


def _varying(array: jax.Array) -> frozenset[str]:
    """The axes of shard_map over which `array` differs."""
    kind = getattr(jax.typeof(array), "manual_axis_type", None)
    return getattr(kind, "varying", frozenset())
