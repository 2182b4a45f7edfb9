"""Fixtures that several folders share: a small data set that can be learnt, and a run of it."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Tests wait for compilation above all: a program that several of them use, or a second run of the suite, is compiled
# once. Subprocesses inherit the folder. Set before jax is imported.
CACHE = Path(__file__).parents[1] / ".cache" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Compile fast where the programs are small: optimising them takes longer than they run. Jax is imported later."""
    if "not slow" in (config.option.markexpr or ""):
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def pytest_collection_finish() -> None:
    """Collect garbage seldom: each collection walks through all that jax and the tests loaded, a fifth of the time."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture
def optimised() -> Iterator[None]:
    """For tests that compare bits with what an ordinary process wrote, or read what the compiler makes."""
    import jax

    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", before)


def make_arrays(num_train: int = 96, num_test: int = 50, num_classes: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """Images [N, 4, 4] whose class shows in which rows are bright, with noise."""
    rng = np.random.default_rng(seed)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.integers(0, num_classes, count)
        images = rng.integers(0, 120, (count, 4, 4))
        images[np.arange(count), labels] += 90
        return images.astype(np.uint8), labels.astype(np.int64)

    train, test = draw(num_train), draw(num_test)
    return {
        "train_images": train[0],
        "train_labels": train[1],
        "test_images": test[0],
        "test_labels": test[1],
    }


@pytest.fixture(scope="session")
def arrays() -> dict[str, np.ndarray]:
    return make_arrays()


@pytest.fixture(scope="session")
def npz_path(arrays: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "small.npz"
    np.savez(path, **arrays)
    return path
