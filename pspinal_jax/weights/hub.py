"""A file of a repository on the Hugging Face hub: from the cache without a network, and a quick error offline."""

import hashlib
import re
from pathlib import Path

from pspinal_jax.errors import DataError, printable
from pspinal_jax.network import problem_reaching

PREFIX = "hf:"
_FILE = "model.safetensors"
_SECONDS_TO_ANSWER = 1.5


def fetch(source: str) -> Path:
    """Fetch the file model.safetensors of `source`, hf:OWNER/NAME.

    A copy in the hub's cache (HF_HOME) is used without the network. The SHA-256 of a download is compared with the
    hub's.

    Raises:
      DataError: if there is no such file, or no network, or the package huggingface_hub is missing.
    """
    try:
        import huggingface_hub
        from huggingface_hub import constants
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise DataError(
            f"weights: {source} needs the package huggingface_hub (in the checkout: pip install '.[hub]'), or give "
            "a file FILE.safetensors"
        ) from error
    repository = source.removeprefix(PREFIX)
    try:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
            raise HFValidationError
        return Path(huggingface_hub.hf_hub_download(repository, _FILE, local_files_only=True))
    except HFValidationError as error:
        raise DataError(f"weights: {source} is not a name on the hub, expected hf:OWNER/NAME") from error
    except LocalEntryNotFoundError:
        pass
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        if problem := problem_reaching(constants.ENDPOINT, _SECONDS_TO_ANSWER):  # the hub's own client tries for 23 s
            raise problem
        path = Path(huggingface_hub.hf_hub_download(repository, _FILE))
    except Exception as error:  # of the hub, or of whichever HTTP library this version of its client is built on
        reason = printable(str(error) or type(error).__name__)
        raise DataError(
            f"weights: {source} is not in the hub's cache and cannot be fetched ({reason}); fetch {_FILE} of it "
            "elsewhere and give that file, or run again with a network"
        ) from error
    # The cache names a large file's content after the SHA-256 that the hub announced.
    content = path.resolve()
    with content.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if re.fullmatch("[0-9a-f]{64}", content.name) and digest != content.name:
        content.unlink()
        path.unlink(missing_ok=True)
        raise DataError(f"weights: {source} has SHA-256 {digest}, expected {content.name}; try again")
    return path
