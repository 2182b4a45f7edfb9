"""What a run reports, where its numbers are not finite or its lines are many."""

import json

import numpy as np
import pytest

from pspinal_jax.checkpoints.checksum import json_checksum
from pspinal_jax.files import json_text, write_json
from pspinal_jax.runs.directory import MetricsWriter, RunDirectory
from pspinal_jax.runs.scores import plot_curves, summary

NAN, INFINITE = float("nan"), float("inf")


def test_json_has_null_for_what_is_not_finite(tmp_path):
    value = {"a": [1, NAN, (np.float64("inf"), "NaN")], "b": {"c": -INFINITE, "d": None, "e": True}, "f": 0.1}
    plain = {"a": [1, None, [None, "NaN"]], "b": {"c": None, "d": None, "e": True}, "f": 0.1}
    assert json.loads(json_text(value)) == plain and "\n" not in json_text(value)
    write_json(tmp_path / "value.json", value)
    assert (tmp_path / "value.json").read_text() == json.dumps(plain, indent=2) + "\n"


def test_result_json_that_holds_null_matches_its_checksum(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_result({"test_loss": summary([INFINITE, 1.0])})
    written = json.loads(run.result_path.read_text())
    checksum = written.pop("checksum")
    assert written == {"test_loss": {"mean": None, "std": None, "each": [None, 1.0]}}
    assert checksum == json_checksum(written)


@pytest.mark.parametrize("values", [NAN, [1.0, INFINITE]], ids=["one seed", "two"])
def test_curves_and_events_of_lines_that_hold_null(tmp_path, values, capsys):
    lines = [{"stage": "train", "epoch": 1, "step": 1, "train_loss": 1.0 if values is NAN else [1.0, 2.0]}]
    lines.append({"stage": "train", "epoch": 2, "step": 2, "train_loss": values})
    with MetricsWriter(RunDirectory(tmp_path)) as metrics:
        for line in lines:
            metrics.append(line)
    written = RunDirectory(tmp_path).metrics()
    assert None in np.ravel(written[1]["train_loss"])
    plot_curves(written, tmp_path / "curves.svg", "")
    assert (tmp_path / "curves.svg").exists() and not capsys.readouterr().err
    with MetricsWriter(RunDirectory(tmp_path), tensorboard=True) as metrics:
        metrics.rewind([("train", 1), ("train", 2)])


def test_curves_of_many_lines_are_thinned_out_and_keep_their_ends(tmp_path, monkeypatch):
    lines = [
        {"stage": stage, "epoch": epoch, "step": epoch, "train_loss": [1.0, 2.0], "train_accuracy": [0.5, 0.6]}
        for stage in ("train", "retrain")
        for epoch in range(1, 50_001)
    ]
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda self, epochs, *rest, **options: drawn.append(epochs))
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda self: None)
    plot_curves(lines, tmp_path / "curves.svg", "")
    for epochs in drawn:
        assert (epochs[0], epochs[-1]) == (1, 100_000) and len(epochs) == 1000 and (np.diff(epochs) > 0).all()
    assert len(drawn) == 2 and (tmp_path / "curves.svg").stat().st_size < 1_000_000
