"""Reading a state dict, names to tensors, from a file or from the Hugging Face hub; never by unpickling objects."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pspinal_jax.errors import DataError
from pspinal_jax.files import expanded
from pspinal_jax.weights.hub import PREFIX, fetch
from pspinal_jax.weights.layout import listed, told
from pspinal_jax.weights.torch_file import read_torch_file
from pspinal_jax.weights.torch_pickle import StoredTensor

_PYTORCH = (".pt", ".pth", ".bin")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
_DTYPES |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)} | {
    f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)
}
"""What is taken: safetensors' names of dtypes, and PyTorch's."""
_MOST_SHARED = 16
"""Times the file's size: how large all tensors together may be that share numbers."""


def read_state_dict(source: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch model by their names, as NumPy arrays; PyTorch itself is not needed.

    Example::

        >>> from pspinal_jax.weights import read_state_dict, resnet_variables
        >>> state_dict = read_state_dict('hf:timm/wide_resnet101_2.tv_in1k')  # doctest: +SKIP
        >>> variables = resnet_variables(state_dict, 'wide_resnet101_2')  # doctest: +SKIP

    Args:
      source: a .safetensors file; a .pt or .pth file that holds a state dict; or hf:OWNER/NAME, model.safetensors of
        that repository on the Hugging Face hub, from its cache where it lies there.

    Returns:
      Names to arrays in torch's order of axes; floating-point ones are float32, whatever precision they were stored in.

    Raises:
      DataError: if the source cannot be had or read, is damaged as far as checksums tell, or holds anything but dense
        tensors of real numbers in 8-bit integers to float64 (docs/photographs.md has the table).
    """
    if str(source).startswith(PREFIX):
        return _read_safetensors(fetch(str(source)))
    path = expanded(source)
    if path.suffix != ".safetensors" and path.suffix not in _PYTORCH:
        raise DataError(f"weights: {source} is none of FILE.safetensors, FILE.pt, FILE.pth and hf:OWNER/NAME")
    if not path.is_file():
        raise DataError(f"weights: there is no file {path}")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pytorch(path)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    arrays: dict[str, np.ndarray] = {}
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                _check_kind(path, name, _DTYPES.get(kind := file.get_slice(name).get_dtype(), kind))
                # bfloat16 too: jax registers ml_dtypes' types with NumPy.
                arrays[name] = _single(path, name, file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise DataError(f"weights: {path} is no readable safetensors file ({error}); fetch or save it again") from error
    return _unless_empty(path, arrays)


def _read_pytorch(path: Path) -> dict[str, np.ndarray]:
    held, size = read_torch_file(path), path.stat().st_size
    if not isinstance(held, Mapping):
        raise _no_state_dict(path, "a tensor" if isinstance(held, StoredTensor) else f"a {type(held).__name__}")
    plain = {name for name, value in held.items() if isinstance(name, str) and isinstance(value, StoredTensor)}
    if wrong := [str(name) for name in held if name not in plain]:
        raise _no_state_dict(path, listed(wrong))
    arrays, total = {}, 0
    for name, tensor in held.items():
        _check_kind(path, name, tensor.kind)
        total += tensor.nbytes
        if tensor.nbytes > size or total > _MOST_SHARED * size:  # one number expanded to any size, say
            raise DataError(
                f"weights: {path} holds {told(name)} of {tensor.nbytes} bytes and {total} with those before it, more "
                "than the file has; save clones of the tensors"
            )
        try:
            arrays[name] = _single(path, name, tensor.array())
        except ValueError as error:
            raise DataError(f"weights: {path} holds {told(name)}, but {error}; save it again") from error
    return _unless_empty(path, arrays)


def _check_kind(path: Path, name: str, kind: str) -> None:
    if kind not in _DTYPES.values():
        raise DataError(
            f"weights: {path} holds {told(name)} as {kind}, expected a dense tensor of one of "
            f"{', '.join(_DTYPES.values())}; save it as float32"
        )


def _single(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    """`array` in float32 if it is floating-point, bfloat16 (NumPy's kind V) included, else as it is."""
    if array.dtype.kind not in "fV":
        return array.copy()  # it may be a view of the file
    with np.errstate(over="ignore"):
        single = array.astype(np.float32)
    if array.dtype == np.float64 and np.isinf(single).sum() > np.isinf(array).sum():
        raise DataError(f"weights: {path} holds {told(name)} with numbers beyond float32's range; save it as float32")
    return single


def _unless_empty(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if not arrays:
        raise _no_state_dict(path, "nothing")
    return arrays


def _no_state_dict(path: Path, held: str) -> DataError:
    return DataError(
        f"weights: {path} is no state dict, names to tensors: it holds {held}; save model.state_dict() alone"
    )
