"""Models of any of JAX's libraries as the training step needs them: `init` and `apply`, called as linen's are."""

import inspect
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from pspinal_jax.errors import UsageError
from pspinal_jax.heads import ProgressiveSpinalHead
from pspinal_jax.heads.equation import layer_name
from pspinal_jax.heads.layouts import layout_of
from pspinal_jax.interop.nnx import ProgressiveSpinalHead as NnxHead

_TRAIN = ("train", "training", "is_training")
_OPPOSITE = "deterministic"
_RANDOM = ("key", "rng")


class FoundHead(NamedTuple):
    """A progressive head inside a model.

    Attributes:
      head: the linen head that computes.
      params: the path of its parameters in the model's.
      statistics: the path of its running statistics in the model's ``batch_stats``.
    """

    head: ProgressiveSpinalHead
    params: tuple[str, ...]
    statistics: tuple[str, ...]


def as_model(model: Any) -> "Model":
    """`model` as the training step needs it.

    Its variables are ``{"params": .., "batch_stats": ..}``: what the optimiser moves, and what else training changes.

    Args:
      model: a linen module, an nnx module, or a pair of functions (init, apply).

    Raises:
      UsageError: if it is none of these.
    """
    if isinstance(model, nn.Module):
        return LinenModel(model)
    if isinstance(model, nnx.Module):
        return NnxModel(model)
    if isinstance(model, tuple) and len(model) == 2 and all(map(callable, model)):
        return FunctionModel(*model)
    raise UsageError(
        f"the model is of type {type(model).__name__}, expected a flax.linen or flax.nnx module or a pair of functions "
        "(init(key, x) -> params, apply(params, x) -> logits)"
    )


def _flags(function: Callable[..., Any]) -> Callable[[bool], dict[str, Any]]:
    """Train -> the keyword of `function` for it; none where it has none."""
    names = inspect.signature(function).parameters
    for name in _TRAIN:
        if name in names:
            return lambda train: {name: train}
    return (lambda train: {_OPPOSITE: not train}) if _OPPOSITE in names else lambda train: {}


class LinenModel:
    """A linen module called as ``model(x)`` or ``model(x, train=..)``; `training` and `deterministic` are known too.

    All collections but params, batch statistics or others, are kept and updated in training. Every stream of random
    numbers that the module asks for is there.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._flags = _flags(type(module).__call__)

    def init(self, key: jax.Array, inputs: Any, train: bool = False) -> dict[str, Any]:
        """The variables that training starts from, for inputs of these shapes [N, ...]."""
        variables = dict(self._module.init(key, inputs, **self._flags(train)))
        return {"params": variables.pop("params", {}), "batch_stats": variables}

    def apply(self, variables: Any, inputs: Any, *, train: bool, rngs: Any = None, mutable: Any = ()) -> Any:
        """The logits [N, ...]; in training (logits, {'batch_stats': new ones})."""
        given = {"params": variables["params"], **variables["batch_stats"]}
        flags = self._flags(train)
        if not train:
            return self._module.apply(given, inputs, **flags)
        streams = {**rngs, "params": jax.random.fold_in(rngs["dropout"], 1)}
        changing = list(variables["batch_stats"])
        logits, updated = self._module.apply(given, inputs, rngs=streams, mutable=changing, **flags)
        return logits, {"batch_stats": {**variables["batch_stats"], **updated}}

    def restore(self, variables: dict[str, Any]) -> dict[str, Any]:
        """The module's collections, for its ``apply``."""
        return {"params": variables["params"], **variables["batch_stats"]}

    def heads(self, inputs: Any) -> list[FoundHead]:
        """The progressive heads in it, which take variables of any layout.

        A head inside ``nn.vmap`` or ``nn.scan``, with parameters of more axes, is left out.
        """
        found: dict[tuple[str, ...], ProgressiveSpinalHead] = {}

        def note(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            if isinstance(context.module, ProgressiveSpinalHead):
                found[context.module.path] = context.module
            return call(*args, **kwargs)

        with nn.intercept_methods(note):
            variables = jax.eval_shape(lambda inputs: self.init(jax.random.key(0), inputs), inputs)
        params = flatten_dict(variables["params"])
        return [
            FoundHead(head, path, ("batch_stats", *path))
            for path, head in found.items()
            if params[*path, "layer_1", "kernel"].ndim == 2
        ]


class NnxModel:
    """An nnx module, which stays as it is: its parameters are where every seed starts.

    Other state than parameters and random numbers, such as batch statistics, is kept and updated in training. The
    streams of random numbers are seeded anew for each step.
    """

    def __init__(self, module: nnx.Module) -> None:
        self._module, self._graphs = module, dict[bool, Any]()
        for train in (False, True):
            copy = nnx.clone(module)
            (copy.train if train else copy.eval)()
            self._graphs[train], self._params, self._random, self._rest = self._split(copy)
        self._flags = _flags(type(module).__call__)

    def init(self, key: jax.Array, inputs: Any, train: bool = False) -> dict[str, Any]:
        """The variables that training starts from; the parameters are the module's, whatever the key."""
        return {"params": _plain(self._params), "batch_stats": _plain(self._rest)}

    def apply(self, variables: Any, inputs: Any, *, train: bool, rngs: Any = None, mutable: Any = ()) -> Any:
        """The logits [N, ...]; in training (logits, {'batch_stats': new ones})."""
        key = jax.random.key(0) if rngs is None else rngs["dropout"]
        module = self._merge(variables, train, _seeded(self._random, key))
        logits = module(inputs, **self._flags(train))
        if not train:
            return logits
        *_, rest = self._split(module)
        return logits, {"batch_stats": _plain(rest)}

    def restore(self, variables: dict[str, Any]) -> nnx.Module:
        """The module in evaluation mode, with these variables."""
        return self._merge(variables, False, self._random)

    def heads(self, inputs: Any) -> list[FoundHead]:
        """The progressive heads in it, which take variables of any layout."""
        nodes = {tuple(map(str, path)): node for path, node in nnx.iter_graph(self._module)}
        return [FoundHead(node.head, path, path) for path, node in nodes.items() if isinstance(node, NnxHead)]

    def _split(self, module: nnx.Module) -> tuple[Any, ...]:
        return nnx.split(module, nnx.Param, nnx.RngState, ...)

    def _merge(self, variables: Mapping[str, Any], train: bool, random: nnx.State) -> Any:
        params, rest = _filled(self._params, variables["params"]), _filled(self._rest, variables["batch_stats"])
        module = nnx.merge(self._graphs[train], params, random, rest)
        for path, head in [*nnx.iter_graph(module)]:
            if isinstance(head, NnxHead):
                new, running = (_at(variables[name], path) for name in ("params", "batch_stats"))
                if layout_of(new) != "tree":
                    _exchange(head, new, running)
        return module


def _plain(state: nnx.State) -> dict[str, Any]:
    """A state as nested dicts with text for keys."""
    flat = flatten_dict(nnx.to_pure_dict(state))
    return unflatten_dict({tuple(map(str, path)): leaf for path, leaf in flat.items()})


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    """What lies at `path` in nested dicts; {} where nothing does."""
    return reduce(lambda subtree, name: subtree.get(str(name), {}), path, tree)


def _exchange(head: NnxHead, params: Mapping[str, Any], running: Mapping[str, Any]) -> None:
    """Give `head` variables of another layout in place of its own."""

    def variables(kind: type, tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return kind(tree)
        return nnx.Dict({name: variables(kind, leaf) for name, leaf in tree.items()})

    for name in [*(layer_name(index + 1) for index in range(head.head.num_layers)), "output"]:
        delattr(head, name)
    for kind, tree in ((nnx.Param, params), (nnx.BatchStat, running)):
        for name, leaf in tree.items():
            setattr(head, name, variables(kind, leaf))


def _filled(state: nnx.State, plain: Mapping[str, Any]) -> nnx.State:
    """A copy of `state` with the leaves of `plain`, see `_plain`; the others stay."""
    leaves = flatten_dict(plain)
    own = flatten_dict(nnx.to_pure_dict(state))
    pure = {path: leaves.get(tuple(map(str, path)), leaf) for path, leaf in own.items()}
    copy = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(copy, unflatten_dict(pure))
    return copy


def _seeded(random: nnx.State, key: jax.Array) -> nnx.State:
    """The streams of `random` begun anew, each with a key of its own, or with one for each layer of a stack."""

    def begun(index: int, leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.zeros_like(leaf)
        own = jax.random.fold_in(key, index)
        return jax.random.split(own, leaf.shape) if leaf.shape else own

    leaves, structure = jax.tree.flatten(random)
    seeded: nnx.State = jax.tree.unflatten(structure, [begun(*each) for each in enumerate(leaves)])
    return seeded


class FunctionModel:
    """A pair of functions: init(key, x) -> params, any pytree of arrays, and apply(params, x) -> logits.

    `apply` may take `train`, and `key` or `rng` for random numbers in training; in evaluation these are None.
    """

    def __init__(self, init: Callable[..., Any], apply: Callable[..., Any]) -> None:
        self._init, self._apply = init, apply
        self._flags = _flags(apply)
        names = inspect.signature(apply).parameters
        self._random = next((name for name in _RANDOM if name in names), None)

    def init(self, key: jax.Array, inputs: Any, train: bool = False) -> dict[str, Any]:
        """The variables that training starts from, for inputs of these shapes [N, ...]."""
        return {"params": {"model": self._init(key, inputs)}, "batch_stats": {}}

    def apply(self, variables: Any, inputs: Any, *, train: bool, rngs: Any = None, mutable: Any = ()) -> Any:
        """The logits [N, ...]; in training (logits, {'batch_stats': new ones})."""
        random = {} if self._random is None else {self._random: rngs["dropout"] if train else None}
        logits = self._apply(variables["params"]["model"], inputs, **self._flags(train), **random)
        return (logits, {"batch_stats": {}}) if train else logits

    def heads(self, inputs: Any) -> list[FoundHead]:
        """None: what the functions compute with is not known."""
        return []

    def restore(self, variables: dict[str, Any]) -> Any:
        """The parameters, as `init` made them."""
        return variables["params"]["model"]


Model = LinenModel | NnxModel | FunctionModel
