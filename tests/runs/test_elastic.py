"""A run that stops on one mesh of devices goes on on another."""

import json
import os
import subprocess
import sys
from pathlib import Path

import chex
import numpy as np
import pytest

from pspinal_jax.runs.result import load_variables

SCRIPT = Path(__file__).with_name("train_on_devices.py")
ONE, EIGHT, CUT = ("1", "-1", "1", "1"), ("8", "-1", "1", "1"), ("8", "-1", "2", "2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four classes, so that an axis of two devices can share them."""
    rng = np.random.default_rng(0)

    def draw(count):
        labels = rng.integers(0, 4, count)
        images = rng.integers(0, 120, (count, 4, 4))
        images[np.arange(count), labels] += 90
        return images.astype(np.uint8), labels

    (train_images, train_labels), (test_images, test_labels) = draw(96), draw(48)
    path = tmp_path_factory.mktemp("data") / "four.npz"
    np.savez(
        path, train_images=train_images, train_labels=train_labels, test_images=test_images, test_labels=test_labels
    )
    return path


def train_on(devices, data, workdir, *flags):
    """Runs `train` in a process of its own; what its script prints."""
    output = subprocess.run(
        [sys.executable, str(SCRIPT), str(data), str(workdir), *devices, *flags],
        env={**os.environ, "NPROC": "16"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert output.returncode == 0, output.stderr
    return json.loads(output.stdout.splitlines()[-1])


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [[line["train_loss"], line["validation_loss"]] for line in lines]


def assert_same_run(workdir, whole, num_seeds=1):
    np.testing.assert_allclose(losses(workdir), losses(whole), rtol=1e-4)
    assert len(losses(workdir)) == 3
    for index in range(num_seeds):
        ours, theirs = (load_variables(run, index)[0] for run in (workdir, whole))
        chex.assert_trees_all_close(ours, theirs, rtol=0, atol=1e-4)


ALL_PAIRS = ((ONE, EIGHT), (ONE, CUT), (CUT, ONE), (CUT, EIGHT))


@pytest.mark.slow
@pytest.mark.parametrize(("num_seeds", "pairs"), [(1, ALL_PAIRS), (2, ALL_PAIRS[1:3])])
def test_a_run_goes_on_on_another_mesh(data, tmp_path, num_seeds, pairs):
    """From one device, 8, or 8 with parameters cut, to another of them; against a run that never stopped."""
    flags = ["--num-seeds", str(num_seeds)]
    lead = [num_seeds] if num_seeds > 1 else []
    whole = tmp_path / "whole"
    assert train_on(ONE, data, whole, *flags)["finished"]
    places = {ONE: [208, 4], EIGHT: [208, 4], CUT: [208, 2]}
    hidden = {ONE: [80, 64], EIGHT: [80, 64], CUT: [40, 64]}
    for first, second in pairs:
        workdir = tmp_path / ("_".join([*first, "to", *second]))
        stopped = train_on(first, data, workdir, *flags, "--stop-at", "6")
        assert not stopped["finished"] and stopped["serial"] == 0
        resumed = train_on(second, data, workdir, *flags)
        assert resumed["finished"] and resumed["serial"] == 6  # in the middle of the second epoch
        for item in ("params", "best/params", "opt_state/trace"):
            assert resumed[f"{item}/head/output/kernel"] == lead + places[second]
            assert resumed[f"{item}/head/layer_2/kernel"] == lead + hidden[second]
        assert_same_run(workdir, whole, num_seeds)
