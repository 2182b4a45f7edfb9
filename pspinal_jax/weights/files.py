"""Reading a state dict, names to tensors, from a file or from the Hugging Face hub; never by unpickling objects."""

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pspinal_jax.errors import DataError
from pspinal_jax.weights.hub import PREFIX, fetch

_PYTORCH = (".pt", ".pth", ".bin")
_FLOATING = ("F64", "F32", "F16", "BF16")
_DTYPES = (*_FLOATING, "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")


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
      DataError: if the source cannot be had or read, or holds anything but tensors.
    """
    if str(source).startswith(PREFIX):
        return _read_safetensors(fetch(str(source)))
    path = Path(source).expanduser()
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
                dtype = file.get_slice(name).get_dtype()
                if dtype not in _DTYPES:
                    raise DataError(f"weights: {path} holds {name} as {dtype}, expected one of {', '.join(_DTYPES)}")
                array = file.get_tensor(name)  # bfloat16 too: jax registers ml_dtypes' types with NumPy
                arrays[name] = array.astype(np.float32) if dtype in _FLOATING else array
    except (SafetensorError, OSError) as error:
        raise DataError(f"weights: {path} is no readable safetensors file ({error}); fetch or save it again") from error
    return arrays


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
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise DataError(
            f"weights: {path} is damaged or holds pickled objects beside tensors, and is not read, because unpickling "
            "can run any code; where you trust it, re-save it as a state dict: torch.save(model.state_dict(), FILE)"
        ) from error
    except Exception as error:  # a damaged file may raise anything
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"weights: {path} is no readable PyTorch file ({told}); save it again") from error
    return _tensors_of(held, path, torch)


def _tensors_of(held: Any, path: Path, torch: Any) -> dict[str, np.ndarray]:
    wrong = type(held).__name__
    if isinstance(held, Mapping):
        wrong = ", ".join(str(name) for name, value in held.items() if not isinstance(value, torch.Tensor))
        if held and not wrong:
            return {
                str(name): (tensor.detach().float() if tensor.is_floating_point() else tensor.detach()).numpy()
                for name, tensor in held.items()
            }
    raise DataError(
        f"weights: {path} is no state dict, names to tensors: it holds {wrong or 'nothing'}; save model.state_dict() "
        "alone"
    )
