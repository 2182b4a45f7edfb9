"""State dicts of PyTorch: reading from a file or the hub, and strict conversion to linen's variables and back."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pspinal_jax.errors import DataError, printable
from pspinal_jax.files import expanded
from pspinal_jax.weights.hub import PREFIX, fetch
from pspinal_jax.weights.torch_file import DTYPES, INTEGERS, StoredTensor, read_torch_file

StateDict = Mapping[str, np.ndarray]

_PYTORCH = (".pt", ".pth", ".bin")
_MAX_SHARED = 16
"""Times the file's size: how large all tensors together may be that share numbers."""
_TENSORS = {"kernel": "weight", "bias": "bias", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_AXES = {4: (2, 3, 1, 0), 2: (1, 0)}
"""Of a kernel: OIHW to HWIO, [out, in] to [in, out]. Everything else is a vector."""
_MAX_NAMES, _MAX_NAME, _MAX_REASON = 10, 80, 300
_WRAPPERS = ("module.", "_orig_mod.")


def read_state_dict(source: str | Path) -> dict[str, np.ndarray]:
    """Read the tensors of a PyTorch model by name, as NumPy arrays, without PyTorch.

    Example::

        >>> from pspinal_jax.weights import read_state_dict, resnet_variables
        >>> state_dict = read_state_dict('hf:timm/wide_resnet101_2.tv_in1k')  # doctest: +SKIP
        >>> variables = resnet_variables(state_dict, 'wide_resnet101_2')  # doctest: +SKIP

    Args:
      source: a .safetensors file; a .pt or .pth file with a state dict; or hf:OWNER/NAME for model.safetensors of that
        repository on the Hugging Face hub, which is read from the hub's cache if it is there.

    Returns:
      Names to arrays in torch's order of axes. Floating-point arrays are float32, whatever their stored precision.

    Raises:
      DataError: if the source cannot be found or read, is damaged according to its checksums, or holds anything but
        dense tensors of real numbers, from 8-bit integers to float64 (docs/pretrained_weights.md has the table).
    """
    path = fetch(str(source)) if str(source).startswith(PREFIX) else expanded(source)
    if path.suffix not in (".safetensors", *_PYTORCH):
        raise DataError(f"weights: {source} is not one of FILE.safetensors, FILE.pt, FILE.pth and hf:OWNER/NAME")
    if not path.is_file():
        raise DataError(f"weights: there is no file {path}")
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path) if path.suffix == ".safetensors" else _read_pytorch(path)
        if not arrays:
            raise ValueError("it holds no tensors")
        return {name: _single(name, array) for name, array in arrays.items()}
    except Exception as error:  # a damaged file may raise anything
        reason = printable(str(error) or type(error).__name__)[:_MAX_REASON]
        raise DataError(
            f"weights: {path} is not a readable state dict ({reason}); save model.state_dict() alone"
        ) from error


def _read_pytorch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of the file by name, as views of its content."""
    held, limit, total = read_torch_file(path), _MAX_SHARED * path.stat().st_size, 0
    tensors: Mapping[Any, Any] = held if isinstance(held, dict) else {f"a {type(held).__name__}": None}
    wrong = [name for name, each in tensors.items() if not isinstance(name, str) or not isinstance(each, StoredTensor)]
    if wrong:
        raise ValueError(f"it holds {listed(wrong)}, expected names and tensors alone")
    for name, tensor in tensors.items():
        total += math.prod(tensor.shape) * tensor.dtype.itemsize
        if total > limit:  # one number expanded to any size, say
            raise ValueError(f"it holds {listed([name])} of shape {tensor.shape}, more than the file has")
    return {name: tensor.array() for name, tensor in tensors.items()}


def _single(name: str, array: np.ndarray) -> np.ndarray:
    """A copy of `array`, which may be a view of the file, in float32 if it is floating-point."""
    if array.dtype.name not in DTYPES:
        raise ValueError(f"it holds {listed([name])} as {array.dtype}, expected one of {', '.join(DTYPES)}")
    if array.dtype.name in ("bool", *INTEGERS):
        return array.copy()
    with np.errstate(over="ignore"):
        single = array.astype(np.float32)
    if array.dtype == np.float64 and np.isinf(single).sum() > np.isinf(array).sum():
        raise ValueError(f"it holds {listed([name])} with numbers beyond float32's range")
    return single


def unwrapped(state_dict: StateDict) -> StateDict:
    """`state_dict` without the prefixes of DataParallel (module.) and torch.compile (_orig_mod.)."""
    for prefix in _WRAPPERS * 2:  # either may wrap the other
        if state_dict and all(name.startswith(prefix) for name in state_dict):
            state_dict = {name.removeprefix(prefix): array for name, array in state_dict.items()}
    return state_dict


class Entry(NamedTuple):
    """A tensor: its torch name, and the path (including the collection), shape and axes of our array."""

    name: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...]


def entries_of(variables: Mapping[str, Any], module_of: Callable[[str, bool], str]) -> list[Entry]:
    """An entry for each leaf of `variables`, a model's tree of arrays or shapes.

    Args:
      variables: the tree.
      module_of: function from our layer, such as "stage_1/block_2/conv_1", or its batch norm, to torch's module.
    """
    entries = []
    for path, leaf in flatten_dict(variables).items():
        is_norm = path[-2] == "norm"
        module = module_of("/".join(path[1 : -2 if is_norm else -1]), is_norm)
        axes = _AXES[len(leaf.shape)] if path[-1] == "kernel" else (0,)
        entries.append(Entry(f"{module}.{_TENSORS[path[-1]]}", path, tuple(leaf.shape), axes))
    return entries


def to_variables(state_dict: StateDict, entries: list[Entry], model: str) -> dict[str, Any]:
    """The tree of `entries`, filled from `state_dict`.

    torch's counters num_batches_tracked are ignored, since nothing computes with them.

    Args:
      state_dict: names to arrays.
      entries: one entry for every tensor.
      model: name of the model, for messages.

    Raises:
      DataError: unless every tensor is used, every entry is filled and every shape is right; all problems are listed.
    """
    norms = {entry.name.removesuffix(".running_mean") for entry in entries if entry.path[-1] == "mean"}
    counters = {f"{name}.num_batches_tracked" for name in norms}
    given = {name: array for name, array in state_dict.items() if name not in counters}
    shapes = {entry.name: tuple(entry.shape[axis] for axis in np.argsort(entry.axes)) for entry in entries}
    _check(shapes, given, f"the state dict does not fit {model}")
    # A copy in any case: the array may be a file mapped into memory.
    return unflatten_dict(
        {entry.path: np.array(_floating(given[entry.name]).transpose(entry.axes), order="C") for entry in entries}
    )


def to_state_dict(variables: Mapping[str, Any], entries: list[Entry], model: str) -> dict[str, np.ndarray]:
    """The tensors of `variables`, which must be the tree of `entries`, by torch name.

    num_batches_tracked is left to torch's load_state_dict.

    Raises:
      DataError: unless every leaf has an entry, every entry a leaf, and every shape is right.
    """
    given = {"/".join(path): leaf for path, leaf in flatten_dict(dict(variables)).items()}
    _check({"/".join(entry.path): entry.shape for entry in entries}, given, f"the variables do not fit {model}")
    arrays = {entry: _floating(np.asarray(given["/".join(entry.path)])) for entry in entries}
    return {entry.name: np.array(array.transpose(np.argsort(entry.axes)), order="C") for entry, array in arrays.items()}


def _check(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Any], what: str) -> None:
    misfits = []
    for name, shape in expected.items():
        if name in given and tuple(given[name].shape) != shape:
            misfits.append(f"{name} {list(given[name].shape)} for {list(shape)}")
        elif name in given and not jnp.issubdtype(given[name].dtype, jnp.floating):
            misfits.append(f"{name} of {given[name].dtype} for floating-point")
    kinds = {
        "missing": [name for name in expected if name not in given],
        "extra": [name for name in given if name not in expected],
        "of another shape": misfits,
    }
    wrong = [f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds.items() if names]
    if wrong:
        raise DataError(f"{what}: {'; '.join(wrong)}")


def listed(names: list[Any]) -> str:
    """The first of `names`, which come from a file, in a form for messages, and the number of further ones."""
    first = ", ".join(printable(name)[:_MAX_NAME] for name in names[:_MAX_NAMES])
    return first if len(names) <= _MAX_NAMES else f"{first} and {len(names) - _MAX_NAMES} more"


def _floating(array: np.ndarray) -> np.ndarray:
    """`array` in a dtype that NumPy and torch share: float32 for the half precisions."""
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)
