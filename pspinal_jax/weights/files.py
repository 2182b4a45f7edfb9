"""Reading a state dict, names to tensors, from a file or from the Hugging Face hub; never by unpickling objects."""

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pspinal_jax.errors import DataError
from pspinal_jax.files import expanded
from pspinal_jax.weights.hub import PREFIX, fetch
from pspinal_jax.weights.layout import listed

_PYTORCH = (".pt", ".pth", ".bin")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
_DTYPES |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)} | {
    f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)
}
"""What is taken: safetensors' names of dtypes, and PyTorch's."""


def read_state_dict(source: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch model by their names, as NumPy arrays; PyTorch itself is needed for .pt and .pth only.

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
    try:
        import torch
    except ImportError as error:
        raise DataError(
            f"weights: reading {path} needs PyTorch (in the checkout: pip install '.[torch]'), or save it as "
            ".safetensors"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of other makes, which it then refuses
            # A file in the format of before PyTorch 1.6 is no zip archive and cannot be mapped into memory.
            is_zip = zipfile.is_zipfile(path)
            if is_zip:
                _check_archive(path)
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
            return _unless_empty(path, _tensors_of(held, path, torch))
    except DataError:
        raise
    except pickle.UnpicklingError as error:
        raise DataError(
            f"weights: {path} is damaged or holds pickled objects beside tensors, and is not read, because unpickling "
            "can run any code; where you trust it, re-save it as a state dict: torch.save(model.state_dict(), FILE)"
        ) from error
    except Exception as error:  # a damaged file may raise anything
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"weights: {path} is no readable PyTorch file ({told}); save it again") from error


def _check_archive(path: Path) -> None:
    """Compare the checksums in a zip of PyTorch's, which torch.load leaves unread; it stores members uncompressed."""
    with zipfile.ZipFile(path) as archive:
        odd = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        bad = f"{odd[0]} is compressed" if odd else archive.testzip()
    if bad is not None:
        raise DataError(f"weights: {path} is damaged: {bad} is not what was saved; fetch or save it again")


def _tensors_of(held: Any, path: Path, torch: Any) -> dict[str, np.ndarray]:
    if not isinstance(held, Mapping):
        raise _no_state_dict(path, type(held).__name__)
    plain = {name for name, value in held.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}
    if wrong := [str(name) for name in held if name not in plain]:
        raise _no_state_dict(path, listed(wrong))
    arrays, largest = {}, path.stat().st_size
    for name, tensor in held.items():
        _check_kind(path, name, _kind(tensor, torch))
        if tensor.nbytes > largest:  # one number expanded to any size, say
            raise DataError(f"weights: {path} holds {name} of {tensor.nbytes} bytes, more than the file has")
        tensor = tensor.detach().resolve_neg()
        arrays[name] = _single(path, name, (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
    return arrays


def _kind(tensor: Any, torch: Any) -> str:
    """The dtype's name of a plain tensor, or in words what else `tensor` is."""
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout is not torch.strided:
        return f"a {str(tensor.layout).removeprefix('torch.')} tensor"
    return "a meta tensor, without values" if tensor.is_meta else str(tensor.dtype).removeprefix("torch.")


def _check_kind(path: Path, name: Any, kind: str) -> None:
    if kind not in _DTYPES.values():
        raise DataError(
            f"weights: {path} holds {name} as {kind}, expected a dense tensor of one of {', '.join(_DTYPES.values())}; "
            "save it as float32"
        )


def _single(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    """`array` in float32 if it is floating-point, bfloat16 (NumPy's kind V) included, else as it is."""
    if array.dtype.kind not in "fV":
        return array
    with np.errstate(over="ignore"):
        single = array.astype(np.float32)
    if array.dtype == np.float64 and np.isinf(single).sum() > np.isinf(array).sum():
        raise DataError(f"weights: {path} holds {name} with numbers beyond float32's range; save it as float32")
    return single


def _unless_empty(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if not arrays:
        raise _no_state_dict(path, "nothing")
    return arrays


def _no_state_dict(path: Path, held: str) -> DataError:
    return DataError(
        f"weights: {path} is no state dict, names to tensors: it holds {held}; save model.state_dict() alone"
    )
