"""Between a PyTorch state dict and linen's variables: which layer of ours is which of torch's, both ways, strictly."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pspinal_jax.errors import DataError

StateDict = Mapping[str, np.ndarray]
Path = tuple[str, ...]
Shapes = Mapping[str, tuple[int, ...]]

_TENSORS = {"kernel": "weight", "bias": "bias", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_AXES = {4: (2, 3, 1, 0), 2: (1, 0)}
"""Of a kernel: OIHW to HWIO, [out, in] to [in, out]. Everything else is a vector."""
_NAMES_TOLD, _LONGEST_NAME = 10, 80
_WRAPPERS = ("module.", "_orig_mod.")


class Layer(NamedTuple):
    """A layer of ours, and the torch modules that hold its tensors.

    Attributes:
      path: our names, below the collection.
      weights: name of the convolution or linear module: its weight, and bias if it has one.
      norm: name of the batch-norm module; empty where there is none.
    """

    path: Path
    weights: str
    norm: str = ""


class Entry(NamedTuple):
    """One tensor: its torch name, the path of ours with the collection, and the shape and axes of ours."""

    name: str
    path: Path
    shape: tuple[int, ...]
    axes: tuple[int, ...] | None

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape in torch's order of axes."""
        return self.shape if self.axes is None else tuple(self.shape[i] for i in np.argsort(self.axes))


def entries_of(layers: Iterable[Layer], variables: Mapping[str, Any]) -> list[Entry]:
    """One entry for each leaf of `variables`, a model's tree of arrays or shapes, all of whose layers are given."""
    by_path = {layer.path: layer for layer in layers}
    entries = []
    for path, leaf in flatten_dict(variables).items():
        in_norm = path[-2] == "norm"
        layer = by_path[path[1:-2] if in_norm else path[1:-1]]
        module = layer.norm if in_norm else layer.weights
        axes = _AXES[len(leaf.shape)] if path[-1] == "kernel" else None
        entries.append(Entry(f"{module}.{_TENSORS[path[-1]]}", path, tuple(leaf.shape), axes))
    return entries


def to_variables(state_dict: StateDict, entries: list[Entry], whom: str) -> dict[str, Any]:
    """The tree of `entries` filled from `state_dict`.

    torch's counters num_batches_tracked are left out knowingly: nothing computes with them.

    Args:
      state_dict: names to arrays.
      entries: one for every tensor.
      whom: what it is to fit, for the message.

    Raises:
      DataError: unless every tensor is used, every entry filled and every shape right; all that is wrong is listed.
    """
    norms = {entry.name.removesuffix(".running_mean") for entry in entries if entry.path[-1] == "mean"}
    counters = {f"{name}.num_batches_tracked" for name in norms}
    given = {name: array for name, array in state_dict.items() if name not in counters}
    _check({entry.name: entry.torch_shape for entry in entries}, given, f"the state dict does not fit {whom}")
    tree = {}
    for entry in entries:
        array = _floating(given[entry.name])
        # A copy in any case: what was read may be a file mapped into memory.
        tree[entry.path] = np.array(array if entry.axes is None else array.transpose(entry.axes), order="C")
    return unflatten_dict(tree)


def unwrapped(state_dict: StateDict) -> StateDict:
    """`state_dict` without what DataParallel (module.) and torch.compile (_orig_mod.) set before every name."""
    for prefix in _WRAPPERS * 2:  # either may wrap the other
        if state_dict and all(name.startswith(prefix) for name in state_dict):
            state_dict = {name.removeprefix(prefix): array for name, array in state_dict.items()}
    return state_dict


def to_state_dict(variables: Mapping[str, Any], entries: list[Entry], whom: str) -> dict[str, np.ndarray]:
    """The tensors of `variables`, which must be the tree of `entries`, by their torch names.

    torch's load_state_dict sets num_batches_tracked by itself.

    Raises:
      DataError: unless every leaf has an entry, every entry a leaf, and every shape is right.
    """
    given = {"/".join(path): leaf for path, leaf in flatten_dict(dict(variables)).items()}
    _check({"/".join(entry.path): entry.shape for entry in entries}, given, f"the variables do not fit {whom}")
    state_dict = {}
    for entry in entries:
        array = _floating(np.asarray(given["/".join(entry.path)]))
        back = array if entry.axes is None else array.transpose(np.argsort(entry.axes))
        state_dict[entry.name] = np.array(back, order="C")
    return state_dict


def _check(expected: Shapes, given: Mapping[str, Any], what: str) -> None:
    missing = [name for name in expected if name not in given]
    extra = [name for name in given if name not in expected]
    misshapen = []
    for name, shape in expected.items():
        if name not in given:
            continue
        found = given[name]
        if tuple(found.shape) != shape:
            misshapen.append(f"{name} {list(found.shape)} for {list(shape)}")
        elif not jnp.issubdtype(found.dtype, jnp.floating):
            misshapen.append(f"{name} of {found.dtype} for floating-point")
    kinds = (("missing", missing), ("extra", extra), ("of another shape", misshapen))
    wrong = [f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds if names]
    if wrong:
        raise DataError(f"{what}: {'; '.join(wrong)}")


def listed(names: list[str]) -> str:
    """The first of `names`, and how many more there are."""
    first = ", ".join(map(told, names[:_NAMES_TOLD]))
    return first if len(names) <= _NAMES_TOLD else f"{first} and {len(names) - _NAMES_TOLD} more"


def told(name: str) -> str:
    """`name`, which comes from a file, as one line of a message can hold it."""
    return name if name.isprintable() and len(name) <= _LONGEST_NAME else repr(name[:_LONGEST_NAME])


def _floating(array: np.ndarray) -> np.ndarray:
    """`array` in a dtype that NumPy and torch share: float32 for the half precisions."""
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)
