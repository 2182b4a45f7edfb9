"""The layout of a head's parameters inside a compiled chunk: the one that its implementation computes with.

Outside (checkpoints, evaluation, the user's hands) there is only the documented tree. Going in and out moves numbers
and computes nothing, so results do not depend on where chunks begin and end.
"""

from collections.abc import Callable
from typing import Any

import jax

from pspinal_jax.heads.layouts import Layout, convert_batch_stats, convert_params
from pspinal_jax.training.state import Totals, TrainState, trainable


def in_layout(
    layout: Layout, frozen: tuple[str, ...], run: Callable[..., tuple[TrainState, Totals]]
) -> Callable[..., tuple[TrainState, Totals]]:
    """`run(state, ..) -> (state, totals)` with its inside in `layout`, and the documented tree going in and out.

    The optimiser's state covers the entries of the parameters that are not `frozen`.
    """
    if layout == "tree":
        return run

    def converted(state: TrainState, *arguments: Any) -> tuple[TrainState, Totals]:
        state, totals = run(convert_state(state, layout, frozen), *arguments)
        return convert_state(state, "tree", frozen), totals

    return converted


def convert_state(state: TrainState, layout: Layout, frozen: tuple[str, ...] = ()) -> TrainState:
    """`state` with all that belongs to its ``head`` in the given layout, the optimiser's state included."""

    def params(tree: Any) -> Any:
        return _convert_head(convert_params, tree, layout)

    def batch_stats(tree: Any) -> Any:
        return _convert_head(convert_batch_stats, tree, layout)

    convert = {"params": params, "batch_stats": batch_stats}
    return TrainState(
        step=state.step,
        params=params(state.params),
        batch_stats=batch_stats(state.batch_stats),
        ema={name: convert[name](tree) for name, tree in state.ema.items()},
        opt_state=_convert_copies(params, trainable(state.params, frozen), state.opt_state),
    )


def _convert_head(convert: Callable[[Any, Layout], Any], tree: Any, layout: Layout) -> Any:
    return {**tree, "head": convert(tree["head"], layout)} if "head" in tree else tree


def _convert_copies(convert: Callable[[Any], Any], params: Any, tree: Any) -> Any:
    """`tree` with `convert` applied to every part that is built like `params`: momenta, averages."""
    structure = jax.tree.structure(params)

    def is_copy(part: Any) -> bool:
        return bool(jax.tree.structure(part) == structure)  # type: ignore[operator]

    return jax.tree.map(lambda part: convert(part) if is_copy(part) else part, tree, is_leaf=is_copy)
