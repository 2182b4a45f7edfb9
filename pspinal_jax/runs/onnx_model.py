"""ONNX: a JAX function as a model that ONNX Runtime runs, written from the function's jaxpr.

Each primitive becomes a node or a few. ONNX Runtime's basic optimisations then compute what is constant, fold batch
norm into convolutions and drop transposes that cancel. The table holds the primitives of inference, which every head
and backbone here and most others are made of.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pspinal_jax.errors import RunError, UsageError

OPSET = 18
"""ONNX Runtime 1.14 and newer run it."""
_IR_VERSION = 8  # the oldest that has this opset
_BATCH = 65_537
"""Stands for the open batch size while tracing: a prime that divides no side of a model; nothing is computed."""
_UNKNOWN = "the model computes with {}, which the ONNX writer does not know; export it without --format onnx"


def check_installed() -> None:
    """Raise UsageError, naming the extra, where onnx or onnxruntime is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UsageError(f"--format onnx needs {error.name}; in the checkout: pip install '.[onnx]'") from None


def write_onnx(
    path: Path,
    function: Callable[[Any, jax.Array], dict[str, jax.Array]],
    variables: Any,
    example: jax.ShapeDtypeStruct,
    metadata: Mapping[str, str],
) -> None:
    """Write `function` as an ONNX model with an open batch size N.

    Args:
      path: the file to write.
      function: ``function(variables, inputs [N, ...])`` gives the model's outputs [N, ...] by name.
      variables: a tree of arrays, the model's constants.
      example: shape and dtype of one input; the model's input is called images if that is uint8, else features.
      metadata: texts by name.

    Raises:
      RunError: if the function computes with something that is not in the table.
    """
    import onnx
    import onnxruntime
    from onnx import helper

    name = "images" if example.dtype == np.uint8 else "features"
    batch = jax.ShapeDtypeStruct((_BATCH, *example.shape), example.dtype)
    outputs = jax.eval_shape(function, variables, batch)
    graph = _Graph(name, batch.shape)
    held = [graph.constant(leaf) for leaf in jax.tree.leaves(variables)]
    found = graph.translate(jax.jit(function).trace(variables, batch).jaxpr, [*held, name])
    for one, (output, aval) in zip(found, sorted(outputs.items()), strict=True):
        graph.nodes.append(helper.make_node("Identity", [graph.whole(one, aval.shape)], [output]))

    def described(name: str, aval: Any) -> Any:
        return helper.make_tensor_value_info(name, _onnx_dtype(aval.dtype), ["N", *aval.shape[1:]])

    ends = [described(name, batch)], [described(*output) for output in sorted(outputs.items())]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "classifier", *ends, graph.constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
        producer_name="pspinal_jax",
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3  # without the warning that further optimisations would be for this machine alone
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    except Exception as error:  # of its many kinds
        raise RunError(f"ONNX Runtime does not take the model: {' '.join(str(error).split())[:300]}") from error
    model = onnx.load(path)
    del model.opset_import[:]  # which ONNX Runtime fills with its own domains; the checker shows that none is used
    model.opset_import.append(helper.make_opsetid("", OPSET))
    helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model)
    onnx.save(model, path)


def run_onnx(path: Path, batches: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs by name of the model in `path` for all `batches` [N, ...], computed by ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names, (inputs,) = [output.name for output in session.get_outputs()], session.get_inputs()
    parts = [session.run(names, {inputs.name: batch}) for batch in batches]
    return {name: np.concatenate(each) for name, each in zip(names, zip(*parts, strict=True), strict=True)}


def _onnx_dtype(dtype: Any) -> int:
    from onnx import helper

    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


class _Graph:
    """The model that is being written. An array is a name in it.

    An array may have rank 0, or sides of 1, where the jaxpr has larger ones: ONNX broadcasts in elementwise nodes.

    Attributes:
      shapes: the shape of each array, `_BATCH` in place of N.
      fixed: names of the arrays that do not depend on the input.
      numbers: those that are constants of rank 0.
    """

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.input = name
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.shapes = {name: shape}
        self.fixed: set[str] = set()
        self.numbers: dict[str, np.ndarray] = {}

    def constant(self, value: Any) -> str:
        """Add an array of numbers."""
        from onnx import numpy_helper

        array, name = np.asarray(value), f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        self.shapes[name] = array.shape
        self.fixed.add(name)
        if array.ndim == 0:
            self.numbers[name] = array
        return name

    def integers(self, values: Any) -> str:
        """Add axes, sides or places."""
        return self.constant(np.asarray(values, np.int64))

    def node(self, kind: str, inputs: Sequence[str], shape: Sequence[int], **attributes: Any) -> str:
        """Add a node with one output of `shape`; returns its name."""
        from onnx import helper

        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        self.shapes[name] = tuple(shape)
        if self.fixed.issuperset(inputs):
            self.fixed.add(name)
        return name

    def translate(self, jaxpr: Any, inputs: Sequence[str]) -> list[str]:
        """Add what `jaxpr`, closed or not, computes of `inputs`; returns the names of its outputs."""
        closed = [self.constant(value) for value in getattr(jaxpr, "consts", ())]
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        names = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed, *inputs], strict=True))

        def read(atom: Any) -> str:
            return self.constant(np.asarray(atom.val, atom.aval.dtype)) if hasattr(atom, "val") else names[atom]

        for equation in jaxpr.eqns:
            outputs = self._of_equation(equation, [read(atom) for atom in equation.invars])
            names.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _of_equation(self, equation: Any, inputs: list[str]) -> list[str]:
        kind, params, shape = equation.primitive.name, equation.params, equation.outvars[0].aval.shape
        if kind in _UNCHANGED:
            return inputs
        if kind == "platform_index":
            return [""]  # the platform is none of JAX's, see cond
        if kind == "cond" and None in (params.get("branches_platforms") or ()):
            return self.translate(params["branches"][params["branches_platforms"].index(None)], inputs[1:])
        if kind in _CALLS:
            return self.translate(params.get("call_jaxpr", params.get("jaxpr")), inputs)
        if kind in _NODES:
            first, *rest = _NODES[kind]
            name = self.elementwise(first, *inputs)
            return [self.elementwise(rest[0], name) if rest else name]
        if kind in _ELEMENTWISE:
            return [_ELEMENTWISE[kind](self, inputs, params)]
        if kind == "broadcast_in_dim":
            return [self._broadcast(inputs[0], shape, params["broadcast_dimensions"])]
        wholes = [self.whole(name, atom.aval.shape) for name, atom in zip(inputs, equation.invars, strict=True)]
        if kind == "split":
            ends = [0, *np.cumsum(params["sizes"]).tolist()]
            return [self.slice(wholes[0], {params["axis"]: (*cut, 1)}) for cut in itertools.pairwise(ends)]
        if kind in _OTHERS:
            return [_OTHERS[kind](self, wholes, params, shape)]
        raise RunError(_UNKNOWN.format(kind))

    def elementwise(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node that broadcasts its inputs."""
        return self.node(kind, inputs, np.broadcast_shapes(*(self.shapes[name] for name in inputs)), **attributes)

    def _broadcast(self, name: str, shape: Sequence[int], places: Sequence[int]) -> str:
        """The array with its sides in these places of `shape`, and sides of 1 in the others."""
        sides = [1] * len(shape)
        for place, side in zip(places, self.shapes[name], strict=False):
            sides[place] = side
        return name if self.shapes[name] == () else self.reshape(name, sides)

    def whole(self, name: str, shape: Sequence[int]) -> str:
        """The array, broadcast to `shape`."""
        held = self.shapes.get(name, shape)
        if held == tuple(shape):
            return name
        held = held or (1,) * len(shape)
        sides = [1 if side == before else side for before, side in zip(held, shape, strict=True)]
        if _BATCH not in sides:
            return self.node("Expand", [name, self.integers(sides)], shape)
        parts = [
            self.node("Shape", [self.input], (1,), start=0, end=1) if side == _BATCH else self.integers([side])
            for side in sides
        ]
        return self.node("Expand", [name, self.node("Concat", parts, (len(sides),), axis=0)], shape)

    def reshape(self, name: str, shape: Sequence[int]) -> str:
        """The array [N, ..] in another shape, in which one side is a multiple of N."""
        if self.shapes[name] == tuple(shape):
            return name
        sides = [-1 if side and side % _BATCH == 0 else side for side in shape]
        return self.node("Reshape", [name, self.integers(sides)], shape)

    def transpose(self, name: str, order: Sequence[int]) -> str:
        """The array with its axes in another order."""
        return self.node("Transpose", [name], [self.shapes[name][axis] for axis in order], perm=list(map(int, order)))

    def slice(self, name: str, cuts: Mapping[int, tuple[int, int, int]]) -> str:
        """The array's entries by axis: start, limit, stride."""
        shape = list(self.shapes[name])
        cuts = {axis: cut for axis, cut in cuts.items() if cut != (0, shape[axis], 1)}
        if not cuts:
            return name
        for axis, (start, limit, stride) in cuts.items():
            shape[axis] = -(-(limit - start) // stride)
        starts, limits, strides = (self.integers(part) for part in zip(*cuts.values(), strict=True))
        return self.node("Slice", [name, starts, limits, self.integers(list(cuts)), strides], shape)


_Rule = Callable[[_Graph, list[str], Any], str]


def _bound(kind: str) -> _Rule:
    """The larger, or the smaller, of two arrays; Relu or Clip where one is a number, which runtimes fuse."""

    def rule(graph: _Graph, inputs: list[str], _: Any) -> str:
        numbers = [name for name in inputs if graph.shapes[name] == ()]
        if len(numbers) != 1:
            return graph.elementwise(kind, *inputs)
        (array,) = (name for name in inputs if name != numbers[0])
        if kind == "Max" and graph.numbers.get(numbers[0]) == 0:
            return graph.elementwise("Relu", array)
        return graph.node("Clip", [array, *[""] * (kind == "Min"), *numbers], graph.shapes[array])

    return rule


def _subtract(graph: _Graph, inputs: list[str], _: Any) -> str:
    """Of a constant, the sum with its negative, which is exact: runtimes fold a sum into the convolution before it."""
    if inputs[1] not in graph.fixed:
        return graph.elementwise("Sub", *inputs)
    return graph.elementwise("Add", inputs[0], graph.elementwise("Neg", inputs[1]))


def _select(graph: _Graph, inputs: list[str], _: Any) -> str:
    return graph.elementwise("Where", inputs[0], *inputs[:0:-1])


def _cast(graph: _Graph, inputs: list[str], params: Any) -> str:
    if inputs[0] in graph.numbers:
        return graph.constant(graph.numbers[inputs[0]].astype(params["new_dtype"]))
    return graph.elementwise("Cast", *inputs, to=_onnx_dtype(params["new_dtype"]))


def _power(graph: _Graph, inputs: list[str], params: Any) -> str:
    return graph.elementwise("Pow", *inputs, graph.constant(np.float32(params["y"])))


def _is_finite(graph: _Graph, inputs: list[str], _: Any) -> str:
    kinds = [graph.elementwise(kind, *inputs) for kind in ("IsInf", "IsNaN")]
    return graph.elementwise("Not", graph.elementwise("Or", *kinds))


_UNCHANGED = {"stop_gradient", "copy", "copy_p", "optimization_barrier", "sharding_constraint"}
_CALLS = {"jit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat2"}
_SAME_NAME = "add mul div pow exp log tanh erf neg abs sign sqrt floor ceil sin cos and or not"
_OTHER_NAME = (
    "eq:Equal lt:Less le:LessOrEqual gt:Greater ge:GreaterOrEqual logistic:Sigmoid rsqrt:Sqrt,Reciprocal ne:Equal,Not"
)
_NODES = {name: [name.capitalize()] for name in _SAME_NAME.split()}
_NODES |= {name: kinds.split(",") for name, kinds in (each.split(":") for each in _OTHER_NAME.split())}
"""Elementwise primitives by the node that computes them, and the one that follows it."""
_ELEMENTWISE: dict[str, _Rule] = {
    "square": lambda graph, inputs, _: graph.elementwise("Mul", *inputs, *inputs),
    "log1p": lambda graph, inputs, _: graph.elementwise(
        "Log", graph.elementwise("Add", *inputs, graph.constant(np.float32(1)))
    ),
    "expm1": lambda graph, inputs, _: graph.elementwise(
        "Sub", graph.elementwise("Exp", *inputs), graph.constant(np.float32(1))
    ),
    "erfc": lambda graph, inputs, _: graph.elementwise(
        "Sub", graph.constant(np.float32(1)), graph.elementwise("Erf", *inputs)
    ),
    "max": _bound("Max"),
    "min": _bound("Min"),
    "sub": _subtract,
    "select_n": _select,
    "convert_element_type": _cast,
    "integer_pow": _power,
    "is_finite": _is_finite,
}


def _reduce(kind: str) -> Callable[..., str]:
    def rule(graph: _Graph, inputs: list[str], params: Any, shape: Sequence[int]) -> str:
        return graph.node(kind, [*inputs, graph.integers(params["axes"])], shape, keepdims=0)

    return rule


def _product(graph: _Graph, inputs: list[str], params: Any, shape: Sequence[int]) -> str:
    """MatMul where it is the product of rows with a matrix, otherwise Einsum."""
    (left, right), batch = params["dimension_numbers"]
    ranks = [len(graph.shapes[name]) for name in inputs]
    if (tuple(left), tuple(right), ranks[1], *map(tuple, batch)) == ((ranks[0] - 1,), (0,), 2, (), ()):
        return graph.node("MatMul", inputs, shape)
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    terms = [[next(letters) for _ in range(rank)] for rank in ranks]
    for ours, others in ((left, right), batch):
        for one, other in zip(ours, others, strict=True):
            terms[1][other] = terms[0][one]
    shared = [terms[0][axis] for axis in batch[0]]
    gone = {*shared, *(terms[0][axis] for axis in left)}
    result = shared + [letter for term in terms for letter in term if letter not in gone]
    return graph.node("Einsum", inputs, shape, equation=f"{','.join(map(''.join, terms))}->{''.join(result)}")


def _convolve(graph: _Graph, inputs: list[str], params: Any, shape: Sequence[int]) -> str:
    images, kernel, outputs = params["dimension_numbers"]
    pads = np.asarray(params["padding"])
    if {*params["lhs_dilation"], params["batch_group_count"]} != {1} or (pads < 0).any():
        raise RunError(_UNKNOWN.format("a transposed convolution"))
    maps = graph.node(
        "Conv",
        [graph.transpose(inputs[0], images), graph.transpose(inputs[1], kernel)],
        [shape[axis] for axis in outputs],
        strides=[*params["window_strides"]],
        pads=pads.T.ravel().tolist(),
        dilations=[*params["rhs_dilation"]],
        group=params["feature_group_count"],
    )
    return graph.transpose(maps, np.argsort(outputs).tolist())


def _pool(graph: _Graph, inputs: list[str], params: Any, shape: Sequence[int]) -> str:
    window, strides, pads = (np.asarray(params[name]) for name in ("window_dimensions", "window_strides", "padding"))
    dilations = {*params["base_dilation"], *params["window_dilation"]}
    if len(window) != 4 or {*window[[0, 3]], *strides[[0, 3]]} != {1} or pads[[0, 3]].any() or dilations != {1}:
        raise RunError(_UNKNOWN.format(f"a maximum over windows of {window.tolist()}"))
    maps = graph.node(
        "MaxPool",
        [graph.transpose(inputs[0], (0, 3, 1, 2))],
        [shape[axis] for axis in (0, 3, 1, 2)],
        kernel_shape=window[1:3].tolist(),
        strides=strides[1:3].tolist(),
        pads=pads[1:3].T.ravel().tolist(),
    )
    return graph.transpose(maps, (0, 2, 3, 1))


def _pad(graph: _Graph, inputs: list[str], params: Any, shape: Sequence[int]) -> str:
    low, high, interior = np.asarray(params["padding_config"]).T
    if interior.any():
        raise RunError(_UNKNOWN.format("padding between entries"))
    return graph.node("Pad", [inputs[0], graph.integers([*low, *high]), inputs[1]], shape)


def _stack(graph: _Graph, inputs: list[str], params: Any, shape: Sequence[int]) -> str:
    axis = params["axis"]
    parts = [graph.reshape(name, [*shape[:axis], 1, *shape[axis + 1 :]]) for name in inputs]
    return graph.node("Concat", parts, shape, axis=axis)


def _slice(graph: _Graph, inputs: list[str], params: Any, shape: Sequence[int]) -> str:
    strides = params["strides"] or [1] * len(shape)
    cuts = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return graph.slice(inputs[0], dict(enumerate(cuts)))


_OTHERS: dict[str, Callable[..., str]] = {
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "dot_general": _product,
    "conv_general_dilated": _convolve,
    "reduce_window_max": _pool,
    "pad": _pad,
    "stack": _stack,
    "slice": _slice,
    **dict.fromkeys(("reshape", "squeeze"), lambda graph, inputs, params, shape: graph.reshape(*inputs, shape)),
    "transpose": lambda graph, inputs, params, shape: graph.transpose(*inputs, params["permutation"]),
    "concatenate": lambda graph, inputs, params, shape: graph.node("Concat", inputs, shape, axis=params["dimension"]),
}
