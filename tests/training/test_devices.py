"""The same training on meshes of simulated devices."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


def run_script(script, tmp_path, *arguments):
    """The arrays that one of the scripts beside this file writes."""
    out = tmp_path / "results.npz"
    output = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), str(out), *arguments],
        # Simulated devices wait for each other in threads: with fewer than twice as many a long loop dies.
        env={**os.environ, "NPROC": "16"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert output.returncode == 0, output.stderr
    with np.load(out) as arrays:
        return dict(arrays)


def train_on(tmp_path, *meshes, **options):
    """Results of train_on_meshes.py by mesh."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    arrays = run_script("train_on_meshes.py", tmp_path, *meshes, *flags)
    return {
        mesh: {name.split("/")[1]: array for name, array in arrays.items() if name.startswith(mesh + "/")}
        for mesh in meshes
    }


def assert_same(results, tolerance):
    first, *others = results.values()
    assert np.ptp(first["losses"]) > 1e-3 and len(first["leaves"]) > 1000
    for other in others:
        np.testing.assert_allclose(other["losses"], first["losses"], rtol=0, atol=tolerance)
        np.testing.assert_allclose(other["leaves"], first["leaves"], rtol=0, atol=tolerance)
        np.testing.assert_array_equal(other["predictions"], first["predictions"])
        np.testing.assert_allclose(other["loss"], first["loss"], rtol=1e-5)
        assert other["reduces"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return train_on(tmp_path_factory.mktemp("meshes"), "1x1x1", "4x1x1", "2x2x2")


def test_training_does_not_depend_on_the_mesh(results):
    """Batch norm, dropout and label smoothing included: losses of 20 steps, parameters, statistics, momenta."""
    assert_same(results, 1e-9)


@pytest.mark.slow
def test_mixing_weights_clipping_and_averages_do_not_depend_on_the_mesh(tmp_path):
    assert_same(train_on(tmp_path, "1x1x1", "2x1x1", "2x2x2", every_option=1, micro_batches=2), 1e-6)


def test_parameters_are_sharded_as_the_mesh_says(results):
    shards = {mesh: tuple(found["shard"]) for mesh, found in results.items()}
    assert shards == {"1x1x1": (34, 104), "4x1x1": (34, 104), "2x2x2": (17, 52)}
    assert results["2x2x2"]["argument_bytes"] < 0.6 * results["4x1x1"]["argument_bytes"]


def test_no_device_holds_what_belongs_to_all_classes(results):
    """By the shapes in the compiled initialisation, forward and backward pass, loss and update."""
    holds = {mesh: bool(found["holds_all_classes"]) for mesh, found in results.items()}
    assert holds == {"1x1x1": True, "4x1x1": True, "2x2x2": False}


@pytest.mark.slow
def test_jit_shard_map_and_pmap_agree(tmp_path):
    """Five steps of plain SGD: parameters, statistics and sums, with statistics of the whole batch and of a device's.

    With dropout in the latter, where every device draws a mask of its own.
    """
    found = run_script("compare_replicas.py", tmp_path)
    for reference, others in (
        ("global_jit", ("global_shard_map", "global_pmap")),
        ("device_pmap", ("device_shard_map",)),
    ):
        for other in others:
            np.testing.assert_allclose(found[other], found[reference], rtol=0, atol=1e-9, err_msg=other)
    # The last three are the sums of losses, correct predictions and examples.
    difference = np.abs(found["device_no_dropout"] - found["global_jit"])[:-3]
    assert difference.max() > 1e-3


MESHES = ("1x1x1", "2x1x1", "4x1x1", "8x1x1", "2x2x2")


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "rate", "tolerance"), [("float64", 0.1, 1e-9), ("float32", 1e-3, 1e-4)])
@pytest.mark.parametrize("model", ["fc", "vgg5", "resnet"])
def test_every_model_trains_alike_on_every_mesh(tmp_path, model, dtype, rate, tolerance):
    # Convolutions take half a minute a mesh to compile.
    meshes = (*MESHES, "1x8x1", "1x1x8") if model == "fc" else MESHES
    assert_same(train_on(tmp_path, *meshes, model=model, dtype=dtype, rate=rate), tolerance)


@pytest.mark.slow
def test_micro_batches_train_alike_on_every_mesh(tmp_path):
    assert_same(train_on(tmp_path, "1x1x1", "8x1x1", "2x2x2", micro_batches=2), 1e-9)


@pytest.mark.slow
def test_a_hundred_thousand_classes(tmp_path):
    results = train_on(tmp_path, "1x1x1", "1x1x8", "2x1x4", classes=100_000, dtype="float32", steps=3)
    whole, *sharded = results.values()
    assert whole["holds_all_classes"] and tuple(whole["shard"]) == (34, 100_000)
    for found, width in zip(sharded, (12_500, 25_000), strict=True):
        assert not found["holds_all_classes"] and tuple(found["shard"]) == (34, width)
        np.testing.assert_allclose(found["losses"], whole["losses"], rtol=1e-5)
        np.testing.assert_array_equal(found["predictions"], whole["predictions"])
