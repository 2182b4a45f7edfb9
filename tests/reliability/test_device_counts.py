"""Any number of devices: a batch that does not divide over them is no reason to refuse, or for another result."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from pspinal_jax.errors import UsageError
from pspinal_jax.training import sharding
from pspinal_jax.training.sharding import fit_mesh

SCRIPT = Path(__file__).with_name("commands_on_devices.py")


@pytest.mark.parametrize(
    ("asked", "processes", "options", "shape"),
    [
        ((-1, 1, 1), [3], {"rows": 12}, (3, 1, 1)),
        ((-1, 1, 1), [3], {"rows": 10}, (2, 1, 1)),
        ((-1, 1, 1), [8], {"rows": 10}, (5, 1, 1)),
        ((-1, 1, 1), [4], {"rows": 7}, (1, 1, 1)),
        ((-1, 1, 2), [8], {"rows": 6}, (3, 1, 2)),
        ((-1, 1, 1), [8], {"rows": 6, "least": 2}, (3, 1, 1)),
        # Each process has the same number of devices in the mesh, and none is left out.
        ((-1, 1, 1), [2, 2], {"rows": 6}, (2, 1, 1)),
        ((-1, 1, 1), [1, 1, 1], {"rows": 10}, (3, 1, 1)),
        # What was asked for in numbers is taken; every device then computes the whole batch.
        ((3, 1, 1), [3], {"rows": 10}, (3, 1, 1)),
        ((-1, 2, 1), [4], {"rows": 9}, (2, 2, 1)),
        # A run that goes on takes what there is.
        ((4, 1, 1), [3], {"rows": 12, "resuming": True}, (3, 1, 1)),
        ((4, 1, 1), [3], {"rows": 10, "resuming": True}, (2, 1, 1)),
        ((-1, 4, 1), [3], {"rows": 12, "resuming": True}, (1, 2, 1)),
        ((-1, 2, 2), [1], {"rows": 12, "resuming": True}, (1, 1, 1)),
        ((-1, 1, 1), [8], {"rows": 12, "resuming": True}, (6, 1, 1)),
        ((-1, 1, 4), [2, 1], {"rows": 12, "resuming": True}, (1, 1, 2)),
        ((-1, 1, 2), [1, 1, 1], {"rows": 12, "resuming": True}, (3, 1, 1)),
    ],
)
def test_which_devices_are_used(monkeypatch, asked, processes, options, shape):
    devices = [SimpleNamespace(process_index=index) for index, count in enumerate(processes) for _ in range(count)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "device_count", lambda: len(devices))
    monkeypatch.setattr(sharding, "_mesh_of", lambda shape: shape)
    assert fit_mesh(*asked, **options) == shape


def test_a_new_run_on_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="the number of devices; change"):
        fit_mesh(jax.device_count() + 1, 1, 1, rows=12)


def on_devices(count, *commands):
    """Standard output and error of each command, all of which must succeed, on so many simulated devices."""
    commands = [[str(word) for word in command] for command in commands]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(count), json.dumps(commands)],
        env={**os.environ, "NPROC": "16"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for command, (status, out, errors) in zip(commands, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert status == 0, (command, errors)
        yield out, errors


FLAGS = (
    "--data.num-classes 3 --data.num-validation 20 --epochs 2 --batch-size 10 --eval-batch-size 10 "
    "--model.layer-width 4 --model.norm batch --checkpoint-seconds 0"
)


def train(data, workdir, *flags):
    return ["train", "digits", "--data.path", data, "--workdir", workdir, *FLAGS.split(), *flags]


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [[line["train_loss"], line["validation_loss"], line["validation_accuracy"]] for line in lines]


@pytest.fixture(scope="module")
def runs(npz_path, tmp_path_factory):
    """Runs on one device and on three by their names, and what the commands said."""
    place = tmp_path_factory.mktemp("devices")
    image = place / "image.png"
    with np.load(npz_path) as arrays:
        Image.fromarray(arrays["test_images"][0]).save(image)

    def uses(run):
        predict = ["predict", run, image, "--top", "3", "--json"]
        return ["evaluate", run], predict, ["export", run, "--output", f"{run}_export"]

    one, _, alone, _ = on_devices(1, train(npz_path, place / "one"), *uses(place / "one"))
    evaluation = json.loads((place / "one" / "evaluation.json").read_text())
    result = json.loads((place / "one" / "result.json").read_text())
    (place / "one" / "result.json").rename(place / "result.json")  # as a kill at the very end leaves it
    said = on_devices(
        3,
        train(npz_path, place / "two"),
        train(npz_path, place / "whole", "--mesh.data", "3"),
        train(npz_path, place / "parts", "--micro-batches", "2"),
        train(npz_path, place / "one"),
        *uses(place / "one"),
        ["predict", "--artifact", place / "one_export", image, "--top", "3", "--json"],
    )
    return SimpleNamespace(place=place, one=one, alone=alone, evaluation=evaluation, result=result, said=list(said))


@pytest.mark.slow
def test_training_uses_fewer_devices_or_all_for_the_whole_batch_and_says_so(runs):
    two, whole, parts, again, *_ = [errors for _, errors in runs.said]
    assert "batch_size 10 does not divide over 3 devices: training uses 2 of them" in two
    assert "batch_size 10 does not divide over 3 devices: each of them computes every batch whole" in whole
    assert "batch_size 10 in its micro-batches does not divide over 3 devices: training uses 1 of them" in parts
    assert "training uses 2 of them" in again and "does not divide" not in runs.one[1]


@pytest.mark.slow
def test_the_result_is_one_devices(runs):
    for name in ("two", "whole"):
        np.testing.assert_allclose(losses(runs.place / name), losses(runs.place / "one"), rtol=2e-3)


@pytest.mark.slow
def test_a_run_is_resumed_evaluated_predicted_and_exported_on_any_number_of_devices(runs):
    one = runs.place / "one"
    result = json.loads((one / "result.json").read_text())
    assert result["test_accuracy"] == runs.result["test_accuracy"]
    evaluation = json.loads((one / "evaluation.json").read_text())
    assert evaluation["confusion"] == runs.evaluation["confusion"]
    assert evaluation["loss"] == pytest.approx(runs.evaluation["loss"], rel=1e-5)
    answers = [json.loads(out)[0]["classes"] for out in (runs.alone[0], runs.said[5][0], runs.said[7][0])]
    for other in answers[1:]:
        assert [entry["class"] for entry in other] == [entry["class"] for entry in answers[0]]
        probabilities = [[entry["probability"] for entry in answer] for answer in (other, answers[0])]
        np.testing.assert_allclose(*probabilities, atol=1e-5)


@pytest.mark.slow
def test_batch_norm_per_device_takes_as_many_devices_as_have_two_examples(npz_path, tmp_path):
    command = train(npz_path, tmp_path / "run", "--batch-norm", "per_device")
    ((_, errors),) = on_devices(6, command)
    assert "batch_size 10 does not divide over 6 devices: training uses 5 of them" in errors
    (tmp_path / "run" / "result.json").unlink()
    ((_, again),) = on_devices(1, command)
    assert "with batch_norm=per_device 1 devices give another result than 6" in again
