"""The layout of heads' parameters inside a compiled chunk: the one that their implementations compute with.

Outside (checkpoints, evaluation, callbacks, the user's hands) there is only the documented tree. Converting moves
numbers and computes nothing, so results do not depend on where chunks begin and end.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pspinal_jax.heads.layouts import Layout, convert_batch_stats, convert_params
from pspinal_jax.training.state import Totals, TrainState, trainable

Layouts = Mapping[tuple[str, ...], Layout]
"""The layout of each head's variables, by their path from the collection on: ``("params", "head")``."""
_CONVERT = {"params": convert_params, "batch_stats": convert_batch_stats}
_PROBED_STEPS = 16


def head_layouts(layout: Layout, path: Sequence[str] = ("head",), statistics: Sequence[str] | None = None) -> Layouts:
    """The layout of one head, whose parameters and running statistics have these paths in their collections."""
    names = {"params": path, "batch_stats": path if statistics is None else statistics}
    return {} if layout == "tree" else {(name, *names[name]): layout for name in names}


def in_layouts(
    layouts: Layouts, frozen: tuple[str, ...], run: Callable[..., tuple[TrainState, Totals]]
) -> Callable[..., tuple[TrainState, Totals]]:
    """`run(state, ..) -> (state, totals)` with its inside in `layouts`, and the documented tree going in and out.

    The optimiser's state covers the entries of the parameters that are not `frozen`.
    """
    if not layouts:
        return run

    def converted(state: TrainState, *arguments: Any) -> tuple[TrainState, Totals]:
        state, totals = run(convert_state(state, layouts, frozen), *arguments)
        return convert_state(state, as_trees(layouts), frozen), totals

    return converted


def as_trees(layouts: Layouts) -> Layouts:
    """The documented trees of the same heads."""
    return dict.fromkeys(layouts, "tree")


def convert_state(state: TrainState, layouts: Layouts, frozen: tuple[str, ...] = ()) -> TrainState:
    """`state` with all that belongs to its heads in the given layouts, the optimiser's state included."""
    convert = {name: partial(_convert_heads, layouts, name) for name in _CONVERT}
    return TrainState(
        step=state.step,
        params=convert["params"](state.params),
        batch_stats=convert["batch_stats"](state.batch_stats),
        ema={name: convert[name](tree) for name, tree in state.ema.items()},
        opt_state=_convert_copies(convert["params"], trainable(state.params, frozen), state.opt_state),
    )


def _convert_heads(layouts: Layouts, collection: str, tree: Any) -> Any:
    for (name, *path), layout in layouts.items():
        if name == collection:
            tree = _convert_at(path, partial(_CONVERT[name], layout=layout), tree)
    return tree


def _convert_at(path: Sequence[str], convert: Callable[[Any], Any], tree: Any) -> Any:
    if not path:
        return convert(tree)
    return {**tree, path[0]: _convert_at(path[1:], convert, tree[path[0]])} if path[0] in tree else tree


def _convert_copies(convert: Callable[[Any], Any], params: Any, tree: Any) -> Any:
    """`tree` with `convert` applied to every part that is built like `params`: momenta, averages."""
    structure = jax.tree.structure(params)

    def is_copy(part: Any) -> bool:
        return bool(jax.tree.structure(part) == structure)  # type: ignore[operator]

    return jax.tree.map(lambda part: convert(part) if is_copy(part) else part, tree, is_leaf=is_copy)


def commutes(optimizer: optax.GradientTransformation, shapes: Any, layouts: Layouts) -> bool:
    """Whether `optimizer` does the same to parameters of these `shapes` in the documented tree and in `layouts`.

    One that works entry by entry does; one that treats arrays by their names, ranks or norms does not. Some steps are
    tried, without a gradient, where weight decay alone shows, and with one that is larger from array to array.
    """
    places = [path[1:] for path in layouts if path[0] == "params"]
    rng = np.random.default_rng(0)

    def random(path: Any, leaf: Any) -> np.ndarray:
        inside = any(tuple(key.key for key in path[: len(place)]) == place for place in places)
        return rng.normal(size=leaf.shape if inside else (1,) * len(leaf.shape)).astype(leaf.dtype)

    def moved(params: Any, gradients: Any) -> Any:
        def step(_: Any, carry: Any) -> Any:
            total, state = carry
            updates, state = optimizer.update(gradients, state, params)
            return jax.tree.map(jnp.add, total, updates), state

        start = jax.tree.map(jnp.zeros_like, params), optimizer.init(params)
        return jax.lax.fori_loop(0, _PROBED_STEPS, step, start)

    params = jax.tree_util.tree_map_with_path(random, shapes)
    leaves, structure = jax.tree.flatten(params)
    convert = partial(_convert_heads, layouts, "params")
    try:
        for scale in (0.0, 10.0):
            gradients = jax.tree.unflatten(structure, [leaf * scale * (i + 1) for i, leaf in enumerate(leaves)])
            total, state = jax.jit(moved)(params, gradients)
            expected = convert(total), _convert_copies(convert, params, state)
            found = jax.jit(moved)(convert(params), convert(gradients))
            same = jax.tree.map(partial(np.allclose, rtol=1e-3, atol=1e-30), found, expected)
            if not all(jax.tree.leaves(same)):
                return False
    except (ValueError, TypeError, KeyError, AttributeError):  # an optimiser for this tree of parameters alone
        return False
    return True
