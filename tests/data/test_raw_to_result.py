"""Each 28x28 data set, from files as published to an evaluated run, by the commands that a user types."""

import json
from pathlib import Path

import numpy as np
import pytest
from raw_files import NUM_CLASSES, examples, write_raw

from pspinal_jax.__main__ import main
from pspinal_jax.data import load_data
from pspinal_jax.errors import DataError
from pspinal_jax.recipes import DataConfig

SMALL = ["--epochs", "1", "--batch-size", "16", "--eval-batch-size", "32"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NUM_CLASSES)
def test_raw_files_become_an_evaluated_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    raw = write_raw(tmp_path / "raw", name, examples(NUM_CLASSES[name], num_train=60, num_test=52))
    assert main(["prepare", name, "--raw", str(raw), "--data-dir", "data"]) == 0
    words = capsys.readouterr().out.splitlines()[-1].split()
    start = words.index("pspinal-jax") + 1
    assert words[start] == "train"
    # The command that prepare suggests, on as few examples as there are.
    assert main([*words[start:], "--data.num-validation", "20", *SMALL]) == 0
    run = Path("runs") / name.replace("_", "-")
    result = json.loads((run / "result.json").read_text())
    assert result["protocol"] == "validation" and 0 <= result["test_accuracy"]["mean"] <= 1
    assert main(["evaluate", str(run)]) == 0
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["examples"] == 52
    assert evaluation["accuracy"] == pytest.approx(result["test_accuracy"]["mean"], abs=1e-6)
    assert len(evaluation["confusion"]) == NUM_CLASSES[name]


@pytest.mark.slow
def test_a_paper_twin_sees_emnist_as_it_is_stored(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = examples(26, num_train=60, num_test=52)
    write_raw(tmp_path / "raw", "emnist_letters", made)
    assert main(["prepare", "emnist_letters", "--raw", "raw", "--data-dir", "data"]) == 0
    upright, stored = (
        load_data(DataConfig("emnist_letters", data_dir=Path("data"), transposed=transposed)).train.inputs[..., 0]
        for transposed in (False, True)
    )
    np.testing.assert_array_equal(upright, made["train"][0])
    np.testing.assert_array_equal(stored, made["train"][0].transpose(0, 2, 1))
    assert main(["train", "emnist-letters-paper", "--data.data-dir", "data", "--workdir", "run", *SMALL]) == 0
    result = json.loads(Path("run/result.json").read_text())
    assert result["protocol"] == "paper" and "best_on_test_accuracy" in result


def test_what_is_no_square_image_is_not_transposed(tmp_path):
    split = {"train_images": np.zeros((4, 6), np.float32), "test_images": np.zeros((4, 6), np.float32)}
    labels = np.array([0, 1, 0, 1])
    np.savez(tmp_path / "features.npz", **split, train_labels=labels, test_labels=labels)
    with pytest.raises(DataError, match=r"shape \(6,\); data.transposed takes square images"):
        load_data(DataConfig("emnist_letters", path=tmp_path / "features.npz", transposed=True))
