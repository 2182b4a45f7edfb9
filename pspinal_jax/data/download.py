"""Fetching raw files: a quick answer where the network is not there, and no file kept whose checksum is wrong."""

import errno
import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from pspinal_jax.data.catalogue import DataSet, Download
from pspinal_jax.errors import DataError
from pspinal_jax.files import atomic_file
from pspinal_jax.network import problem_reaching, reason
from pspinal_jax.progress import progress_bar

_SECONDS_TO_ANSWER = 4.0
_SECONDS_WITHOUT_DATA = 20.0
_CHUNK = 1 << 18
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_NETWORK_ERRORS = (OSError, http.client.HTTPException)  # URLError and timeouts are OSErrors


def missing_downloads(data_set: DataSet, folder: Path) -> list[Download]:
    """What of `data_set` does not lie in `folder`, whole and unchanged."""
    return [item for item in data_set.downloads if not _is_whole(folder / item.file, item)]


def check_reachable(data_set: DataSet, missing: list[Download]) -> None:
    """Return if a server answers for the first missing file; takes a few seconds at most.

    Raises:
      DataError: if none does; the message says what to do without a network.
    """
    if not missing:
        return
    problem = problem_reaching(missing[0].url, _SECONDS_TO_ANSWER)
    if problem is not None:
        raise _unreachable(data_set, missing, missing[0], problem) from None


def download(data_set: DataSet, missing: list[Download], folder: Path, show_progress: bool) -> None:
    """Fetch `missing` into `folder`; a file appears there only once it is whole and its checksum is right.

    Raises:
      DataError: if one cannot be fetched, or is not the file on record.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for item in missing:
        try:
            with atomic_file(folder / item.file) as part:
                digest = _fetch(item, part, show_progress)
                if digest != item.sha256:
                    raise DataError(
                        f"{data_set.name}: {item.url} has SHA-256 {digest}, expected {item.sha256}; try again, or give "
                        "the raw files with --raw DIR"
                    )
        except _NETWORK_ERRORS as error:
            if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
                raise
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it holds the connection
            raise _unreachable(data_set, missing, item, error) from error


def _fetch(item: Download, target: Path, show_progress: bool) -> str:
    digest = hashlib.sha256()
    with (
        urllib.request.urlopen(item.url, timeout=_SECONDS_WITHOUT_DATA) as response,
        target.open("wb") as file,
        progress_bar(item.num_bytes, f"download {item.file}", "B", show_progress) as bar,
    ):
        while piece := response.read(_CHUNK):
            file.write(piece)
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()


def _is_whole(path: Path, item: Download) -> bool:
    try:
        if item.num_bytes is not None and path.stat().st_size != item.num_bytes:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == item.sha256
    except OSError:
        return False


def _unreachable(data_set: DataSet, missing: list[Download], item: Download, problem: Exception) -> DataError:
    names = ", ".join(other.file for other in missing)
    return DataError(
        f"{data_set.name}: {item.file} is not here and cannot be fetched from {urlsplit(item.url).netloc} "
        f"({reason(problem)}); put {names} into a folder DIR and run: pspinal-jax prepare {data_set.name} --raw DIR"
    )
